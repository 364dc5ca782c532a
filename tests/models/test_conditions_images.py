"""Images as conditions: the mask of inpainting, and several images with dates."""

import pytest
import torch

from models.conditions import image, images
from models.conditions.image import white_pixels

NAN = torch.nan


def x(count=2):
    return torch.zeros(count, 4, 6, 8)


# Inpainting


def test_inpainting_puts_the_mask_before_the_image():
    encoder = image.build(image.Config(condition_channels=5, image_input="inpainting"), 8, 0)
    latents, mask = torch.randn(2, 4, 6, 8), -torch.ones(2, 1, 12, 16)
    mask[0, :, 4:, :] = 1
    out = encoder({"condition_image": latents, "mask_image": mask}, x()).values
    assert torch.equal(out[:, 1:], latents)
    assert out[0, 0].tolist() == [[0.0] * 8] * 2 + [[1.0] * 8] * 4 and not out[1, 0].any()
    assert encoder.fields == ("condition_image", "mask_image")
    assert torch.equal(encoder(None, x()).values, torch.zeros(2, 5, 6, 8))


def test_inpainting_wants_one_channel_less_for_the_image():
    encoder = image.build(image.Config(condition_channels=5, image_input="inpainting"), 8, 0)
    with pytest.raises(
        ValueError, match=r"got a condition image \(2, 5, 6, 8\), wanted \(2, 4, h, w\): see --condition_"
    ):
        encoder({"condition_image": torch.zeros(2, 5, 6, 8), "mask_image": torch.ones(2, 1, 6, 8)}, x())


def test_a_mask_is_white_from_the_middle_level_on():
    """At the first pixel of each cell, as public code reduces masks."""
    levels = torch.tensor([0, 127, 128, 255]) / 127.5 - 1
    assert white_pixels(levels.view(1, 1, 1, 4).expand(1, 3, 1, 4), (1, 4)).tolist() == [[[[0.0, 0, 1, 1]]]]
    assert white_pixels(levels.view(1, 1, 1, 4), (1, 2)).tolist() == [[[[0.0, 1]]]]
    cells = torch.tensor([1.0, -1, -1, 1]).view(1, 1, 1, 4)
    assert white_pixels(cells, (1, 2)).tolist() == [[[[1.0, 0]]]]


# Several images


def build(width=4):
    torch.manual_seed(0)
    return images.build(images.Config(images_channels=2, images_width=width), 8, 0)


def batch(dates, seed=1):
    dates = torch.tensor(dates)
    pictures = torch.randn(*dates.shape, 2, 6, 8, generator=torch.Generator().manual_seed(seed))
    return {"condition_images": pictures, "condition_dates": dates}


def test_the_order_of_images_does_not_matter_but_their_dates_do():
    encoder, raw = build(), batch([[-3.0, -1, -2], [-5, -4, -0.5]])
    out = encoder(raw, x()).values
    order = [2, 0, 1]
    shuffled = {name: value[:, order] for name, value in raw.items()}
    assert torch.allclose(encoder(shuffled, x()).values, out, atol=1e-6)
    swapped = raw | {"condition_dates": raw["condition_dates"].flip(1)}
    assert (encoder(swapped, x()).values - out).abs().max() > 1e-3
    later = raw | {"condition_dates": raw["condition_dates"] - 1}  # in the same order
    assert (encoder(later, x()).values - out).abs().max() > 1e-3


def test_absent_images_and_batch_mates_change_nothing():
    encoder, raw = build(), batch([[-2.0, -1]])
    out = encoder(raw, x(1)).values
    padded = batch([[NAN, -2.0, NAN, -1, -1.5], [-1, -2, -3, -4, -5]], seed=2)
    padded["condition_images"][0, [1, 3]] = raw["condition_images"][0]
    padded["condition_images_mask"] = torch.tensor([[True] * 4 + [False], [True] * 5])
    assert torch.allclose(encoder(padded, x()).values[:1], out, atol=1e-6)
    assert (
        encoder(padded | {"condition_images_mask": torch.ones(2, 5).bool()}, x()).values[:1] - out
    ).abs().max() > 0.01


def test_neighbours_in_time_are_read_together():
    encoder, raw = build(), batch([[-2.0, -1]])
    parts = [encoder({name: value[:, i : i + 1] for name, value in raw.items()}, x(1)).values for i in range(2)]
    assert (encoder(raw, x(1)).values - sum(parts)).abs().max() > 1e-3


def test_without_an_image_the_map_is_0_and_not_the_null():
    encoder = build()
    torch.nn.init.ones_(encoder.null)
    out = encoder(batch([[NAN, NAN], [-1.0, NAN]]), x()).values
    assert torch.equal(out[0], torch.zeros(4, 6, 8)) and out[1].abs().max() > 1e-3
    assert torch.equal(encoder(None, x()).values, torch.ones(2, 4, 6, 8))


def test_images_of_another_size_are_resized():
    encoder, raw = build(), batch([[-2.0, -1], [-1, NAN]])
    large = raw | {"condition_images": raw["condition_images"].repeat_interleave(2, 3).repeat_interleave(2, 4)}
    assert torch.allclose(encoder(large, x()).values, encoder(raw, x()).values, atol=0.2)
    assert encoder(large, x()).values.shape == (2, 4, 6, 8)


WRONG = {
    r"got condition images \(2, 3, 6, 8\), wanted \(2, N, 2, h, w\)": {"condition_images": torch.zeros(2, 3, 6, 8)},
    r"got condition images \(2, 2, 3, 6, 8\), wanted": {"condition_images": torch.zeros(2, 2, 3, 6, 8)},
    r"got dates \(2, 3\) for condition images \(2, 2, 2, 6, 8\), wanted \(2, 2\)": {
        "condition_dates": torch.zeros(2, 3)
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_fields_of_other_shapes_are_refused(message):
    with pytest.raises(ValueError, match=message):
        build()(batch([[-2.0, -1], [-1, NAN]]) | WRONG[message], x())


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="got images_width 5, wanted an even number"):
        images.Config(images_width=5)
