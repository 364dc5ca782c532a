"""Encoding of images with masked pixels, which must not affect the result."""

import pytest
import torch

from diffusion.rng import Streams
from train.data.transforms import to_float
from train.first_stage import load_vqgan_stage
from train.spaces import CodeSpace, LatentSpace, PixelSpace, any_in_cells, fill_masked


def test_a_hidden_pixel_gets_the_nearest_visible_one():
    image = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :, 2:] = True
    expected = image.clone()
    expected[..., 2:] = image[..., 1:2]
    assert torch.equal(fill_masked(image, mask), expected)
    assert torch.equal(fill_masked(image, torch.zeros_like(mask)), image)
    assert (fill_masked(image, torch.ones_like(mask)) == 128).all()
    assert torch.equal(image.flatten(), torch.arange(16, dtype=torch.uint8))  # the input is unchanged


def test_each_image_of_a_batch_has_its_mask():
    images = torch.stack([torch.full((3, 4, 4), 7, dtype=torch.uint8), torch.full((3, 4, 4), 9, dtype=torch.uint8)])
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = mask[1, 3, 3] = True
    assert torch.equal(fill_masked(images, mask), images)


def test_a_cell_is_known_only_if_all_of_it_is_visible():
    mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    mask[0, 1, 3] = True
    assert torch.equal(any_in_cells(mask, 2), torch.tensor([[[False, True, False], [False, False, False]]]))
    with pytest.raises(ValueError, match="4x6 pixels, wanted multiples of 4"):
        any_in_cells(mask, 4)


@pytest.fixture(scope="module", params=["pixels", "latents", "codes"])
def space(request, trained):
    first_stage = load_vqgan_stage(trained / "vqgan_digits", None, torch.device("cpu"), amp=False)
    return {
        "pixels": PixelSpace(first_stage.data),
        "latents": LatentSpace(first_stage, 2.0, first_stage.data.size),
        "codes": CodeSpace(first_stage),
    }[request.param]


def test_hidden_pixels_do_not_affect_the_start_of_sampling(space):
    images = (Streams([0, 1]).uniform((2, 1, 16, 16)) * 256).byte()
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, 7:], mask[1, :, :5] = True, True
    start = space.encode_masked(images, mask)
    inverted = space.encode_masked(torch.where(mask.unsqueeze(1), 255 - images, images), mask)
    assert torch.equal(start.x0, inverted.x0) and torch.equal(start.keep, inverted.keep) and start.strength == 1
    side = 16 // space.factor
    assert start.keep.shape == (2, side, side)
    assert start.keep[0].sum() == 7 // space.factor * side  # whole rows above, whole columns beside
    assert start.keep[1].sum() == (16 - 5) // space.factor * side


def test_with_nothing_hidden_it_is_the_image(space):
    images = (Streams([0, 1]).uniform((2, 1, 16, 16)) * 256).byte()
    start = space.encode_masked(images, torch.zeros(2, 16, 16, dtype=torch.bool))
    assert start.keep.all()
    expected = space.encode_batch({"image": to_float(images)})
    assert torch.equal(start.x0, expected["x0"] if "x0" in expected else space.first_stage.encode(images))


def test_interpolation_is_gradual_between_the_two_images(space):
    images = (Streams([0, 1]).uniform((2, 1, 16, 16)) * 256).byte()
    a, b = space.encode_masked(images, torch.zeros(2, 16, 16, dtype=torch.bool)).x0.chunk(2)
    path = [space.interpolate(a, b, weight, Streams([5])) for weight in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert torch.equal(path[0], a) and torch.allclose(path[-1].double(), b.double())
    distances = [(x - a).float().abs() for x in path]
    assert distances[0].sum() < distances[2].sum() < distances[4].sum()
    if space.tokens:
        assert all(((x == a) | (x == b)).all() for x in path)
        changed = [x != a for x in path]
        assert all((now | ~before).all() for before, now in zip(changed, changed[1:], strict=False))
    else:
        assert torch.allclose(path[2], (a + b) / 2, atol=1e-6)
