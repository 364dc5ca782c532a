"""A trained VQGAN from Python: encoding, decoding, and what it refuses."""

import pytest
import torch

from train.data.transforms import to_float
from train.inference import load, load_vqgan


@pytest.fixture(scope="module")
def vqgan(trained):
    return load_vqgan(trained / "vqgan_digits", device="cpu", amp=False)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(256, (5, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_encode_and_decode(vqgan, images):
    ids = vqgan.encode(images)
    assert ids.shape == (5, 4, 4) and ids.dtype == torch.int64
    assert torch.equal(ids, vqgan.first_stage.encode(images))
    assert torch.equal(ids, vqgan.encode(to_float(images)))
    decoded = vqgan.decode(ids)
    assert decoded.dtype == torch.uint8 and torch.equal(decoded, vqgan.first_stage.decode(ids))
    assert torch.equal(vqgan.decode(ids.to(torch.int32)), decoded)
    assert torch.equal(vqgan.reconstruct(images), decoded)
    assert vqgan.encode(images[:1, :, :8].repeat(1, 1, 1, 2)).shape == (1, 2, 8)  # any multiples of the factor
    assert torch.equal(vqgan.encode(images, batch_size=2), ids)


def test_what_a_vqgan_is(vqgan, trained):
    codes = load(trained / "absorbing_digits", device="cpu", amp=False)
    assert (vqgan.codebook_size, vqgan.factor, vqgan.channels, vqgan.image_size) == (16, 4, 1, (16, 16))
    assert vqgan.step == 5 and codes.vqgan.codebook_size == 16
    assert "vqgan_digits" in repr(vqgan) and "vqgan_digits" in repr(codes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda images: images.expand(-1, 3, -1, -1), ValueError, r"got colour images .* takes grey .*: convert them"),
        (lambda images: images.expand(-1, 4, -1, -1), ValueError, "got images of 4 channels"),
        (lambda images: images[0], ValueError, r"got images \(1, 16, 16\), wanted a tensor \(B, C, H, W\)"),
        (lambda images: images[:0], ValueError, r"got images \(0, 1, 16, 16\)"),
        (lambda images: images[..., :15], ValueError, "16x15 pixels, wanted multiples of 4"),
        (lambda images: images.float(), ValueError, r"from 0 to 255, wanted floats in \[-1, 1\], or uint8"),
        (lambda images: to_float(images) * torch.nan, ValueError, "from nan to nan"),
        (lambda images: to_float(images) / 0, ValueError, "inf"),
        (lambda images: images.long(), TypeError, "images of torch.int64"),
        (lambda images: images.bool(), TypeError, "images of torch.bool"),
        (lambda images: [1, 2], TypeError, "images of type list"),
    ],
)
def test_images_that_do_not_fit_are_refused(vqgan, images, change, error, message):
    images = images.clone()
    images[:, :, 0, 0], images[:, :, 0, 1] = 0, 255
    with pytest.raises(error, match=message):
        vqgan.encode(change(images))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.full((1, 4, 4), 16), ValueError, "got codes from 16 to 16, wanted 0 to 15"),
        (torch.full((1, 4, 4), -1), ValueError, "got codes from -1 to -1, wanted 0 to 15"),
        (torch.zeros(1, 4, 4), TypeError, "got codes of torch.float32"),
        (torch.zeros(1, 4, 4, dtype=torch.bool), TypeError, "got codes of torch.bool"),
        (torch.zeros(4, 4, dtype=torch.int64), ValueError, r"got codes \(4, 4\), wanted \(B, h, w\)"),
        ([[0]], TypeError, "got codes of list"),
    ],
)
def test_codes_that_do_not_fit_are_refused(vqgan, ids, error, message):
    with pytest.raises(error, match=message):
        vqgan.decode(ids)


def test_grey_images_for_a_colour_model_are_refused(vqgan, images, monkeypatch):
    monkeypatch.setattr(type(vqgan), "channels", 3)
    with pytest.raises(ValueError, match=r"got grey images .* takes colour .*: pass images.expand"):
        vqgan.encode(images)
