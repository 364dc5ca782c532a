"""Pictures on the demo page: how they are brought to the size of a model, and enlarged."""

import numpy as np
import torch
from PIL import Image

from experiments.playground import enlarge_to_picture, preprocess


def test_a_16_bit_picture_is_scaled_by_the_data_range():
    levels = np.linspace(0, 4095, 64).reshape(8, 8).round().astype(np.uint16)
    mask = Image.new("L", (8, 8))
    image = preprocess(Image.fromarray(levels), mask, (8, 8), 1, (0, 4095))[0]
    assert np.abs(image[0].numpy() - levels / 4095 * 255).max() <= 0.51
    grey = Image.fromarray(image[0].numpy())  # an 8-bit picture is not rescaled
    assert torch.equal(preprocess(grey, mask, (8, 8), 1, (0, 4095))[0], image)


def test_an_uploaded_picture_and_its_mask_are_cropped_alike():
    wide = Image.new("RGBA", (96, 32), "red")
    wide.paste("blue", (48, 0, 96, 32))
    mask = Image.new("L", wide.size)
    mask.paste(255, (48, 0, 96, 32))
    image, hidden = preprocess(wide, mask, (8, 8), 3)
    assert image.shape == (3, 8, 8) and hidden.shape == (8, 8)
    assert hidden[:, 4:].all() and not hidden[:, :4].any()
    assert torch.equal(image[2] > 128, hidden)  # the blue part is masked


def test_integer_enlargement_is_undone_exactly():
    image = torch.randint(256, (1, 6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = enlarge_to_picture(image, 43)
    assert picture.size == (40, 30)  # five times, within 43 pixels
    assert torch.equal(preprocess(picture, Image.new("L", picture.size), (6, 8), 1)[0], image)
    assert enlarge_to_picture(torch.zeros(3, 300, 200, dtype=torch.uint8)).size == (200, 300)


def test_other_pictures_are_cropped_and_antialiased():
    bands = Image.new("L", (96, 32))
    for k, level in enumerate((250, 100, 200, 250)):
        bands.paste(level, (24 * k, 0, 24 * k + 24, 32))
    image = preprocess(bands, Image.new("L", bands.size), (8, 8), 1)[0].float()
    assert image[:, :, :3].sub(100).abs().max() < 20 and image[:, :, 5:].sub(200).abs().max() < 20
    checks = Image.fromarray((255 * (torch.arange(16) + torch.arange(16)[:, None]).remainder(2)).byte().numpy())
    assert preprocess(checks, Image.new("L", checks.size), (8, 8), 1)[0].float().sub(127.5).abs().max() < 60
