"""Spaces of samplers: pixels, codes and latents encode and decode images, and reopen from a run."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.annotated_images import annotated_dataset, assert_same_fields
from helpers.run_asserts import assert_equal_bits, weights
from helpers.tiny_runs import UNET, call
from helpers.toy_encoding import BrokenDataset
from train import spaces
from train.data.code_file import CodeTable
from train.data.hints import with_hints
from train.data.loading import ImageSource, TrainingImages, build_dataset
from train.data.transforms import to_float
from train.distributed import DistContext
from train.first_stage import load_vqgan_stage

CPU = torch.device("cpu")
LATENT = f"--sampler ddpm --batch_size 4 --total_steps 20 --sample_steps 3 --no_amp {UNET}"


@pytest.fixture(scope="module")
def first_stage(trained):
    return load_vqgan_stage(trained / "vqgan_digits", None, CPU, amp=False)


@pytest.fixture(scope="module")
def data(first_stage):
    return first_stage.data


@pytest.fixture(scope="module")
def digits(first_stage):
    return build_dataset(first_stage.data, first_stage.reader, "train")


def images_of(digits, data, n=16):
    """The first n training images as uint8, and their batch."""
    batch = TrainingImages(ImageSource(digits, data), seed=3)[list(range(n))]
    return ((batch["image"] + 1) * 127.5).round().to(torch.uint8), batch


# encoding and decoding


def test_pixels_are_the_images_themselves(digits, data):
    space = spaces.PixelSpace(data)
    assert (
        space.model_args == {"shape": (1, 16, 16), "pixels": True}
        and space.provenance == {}
        and space.first_stage is None
    )
    images, batch = images_of(digits, data)
    x0 = space.encode_batch(batch)["x0"]
    assert -1 <= x0.min() < -0.9 and 0.5 < x0.max() <= 1
    assert torch.equal(space.decode(x0), images)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(space.decode(to_float(levels)), levels)
    assert space.extra_arrays(x0) == {}
    assert all(torch.equal(image, images) for image in space.preview(x0, x0))


def test_latents_decode_to_the_vqgans_reconstruction(first_stage, digits, data):
    space = spaces.LatentSpace(first_stage, 3.0, first_stage.data.size)
    images, batch = images_of(digits, data)
    x0 = space.encode_batch(batch)["x0"]
    assert space.model_args == {"shape": (4, 4, 4), "pixels": False} and x0.shape == (16, 4, 4, 4)
    assert torch.equal(space.decode(x0), first_stage.decode(first_stage.encode(images)))
    assert torch.allclose(x0, 3 * spaces.LatentSpace(first_stage, 1.0, first_stage.data.size).encode_batch(batch)["x0"])
    assert space.extra_arrays(x0) == {} and not x0.requires_grad


def test_every_code_comes_back_from_its_own_vector(first_stage):
    """Latents equal to codes decode to the images of those codes, at any scale."""
    ids = torch.arange(16).view(1, 4, 4)
    codebook = first_stage.vqgan.quantizer.codebook.weight  # (K, D)
    latents = codebook[ids].permute(0, 3, 1, 2)
    for scale in (0.1, 1.0, 7.3):
        assert torch.equal(
            spaces.LatentSpace(first_stage, scale, first_stage.data.size).decode(latents * scale),
            first_stage.decode(ids),
        )


def test_codes_are_those_of_the_images(first_stage, digits, data):
    space = spaces.CodeSpace(first_stage)
    assert space.model_args == {"codes": 16, "grid": (4, 4)} and space.workers(data) == 0
    data = dataclasses.replace(data, shift=0)
    source = space.source(digits, "train", data, 3, DistContext(CPU))
    batch = space.encode_batch(source[list(range(8))])
    images, expected = images_of(digits, data, 8)  # the same seed: the same order
    assert torch.equal(batch["codes"], first_stage.encode(images))
    assert torch.equal(batch["label"], expected["label"])
    assert torch.equal(space.decode(batch["codes"]), first_stage.decode(first_stage.encode(images)))
    assert torch.equal(space.extra_arrays(batch["codes"])["codes"], batch["codes"])


@pytest.fixture
def cached_space(first_stage, tmp_path):
    """Latents in a file in a folder of their own."""
    return spaces.LatentSpace(dataclasses.replace(first_stage, run=tmp_path), 3.0, first_stage.data.size, cached=True)


@pytest.mark.parametrize("views", [{"shift": 0}, {"shift": 1, "horizontal_flip": True}, {"shift": 0, "crop_margin": 4}])
def test_cached_latents_are_those_of_the_images(first_stage, cached_space, digits, data, views):
    data, positions = dataclasses.replace(data, cache_images=False, **views), [*range(40), len(digits) + 3, 5]
    sources = [
        space.source(digits, "train", data, 3, DistContext(CPU), None)
        for space in (spaces.LatentSpace(first_stage, 3.0, first_stage.data.size), cached_space)
    ]
    assert len(sources[0]) == len(sources[1]) and cached_space.workers(dataclasses.replace(data, num_workers=2)) == 0
    plain, cached = (cached_space.encode_batch(source[positions]) for source in sources)
    torch.testing.assert_close(cached["x0"], plain["x0"], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(cached[name], plain[name]) for name in ("label", "position")) and "image" not in cached
    assert cached["x0"].dtype == torch.float32 and not cached["x0"].requires_grad


def test_latents_are_encoded_once_and_scaled_when_read(cached_space, digits, data, monkeypatch):
    world, positions = DistContext(CPU), list(range(9))
    first = cached_space.encode_batch(cached_space.source(digits, "train", data, 3, world, None)[positions])["x0"]
    (path,) = (cached_space.first_stage.run / "codes").glob("*.latents")
    assert path.stat().st_size == len(digits) * 9 * 4 * 4 * 4 * 4  # 9 views of 4x4x4 floats
    monkeypatch.setattr(type(cached_space.first_stage), "encode_latents", lambda *args: 1 / 0)
    other = dataclasses.replace(cached_space, scale=6.0)  # a file of raw latents serves any scale
    again = other.encode_batch(other.source(digits, "train", data, 3, world, None)[positions])["x0"]
    assert torch.equal(again, 2 * first)


def test_an_unreadable_image_has_the_latents_of_the_next(first_stage, cached_space, data):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16), np.uint8)
    dataset = BrokenDataset(pixels, np.arange(12), 12, broken=(0, 4, 5))
    data, batches = dataclasses.replace(data, shift=0), []
    for space in (spaces.LatentSpace(first_stage, 3.0, first_stage.data.size), cached_space):
        with pytest.warns(UserWarning, match="skipped"):
            batch = space.source(dataset, "train", data, 1, DistContext(CPU), None)[[*range(12)]]
        batches.append(space.encode_batch(batch))
    torch.testing.assert_close(batches[1]["x0"], batches[0]["x0"], rtol=1e-5, atol=1e-5)
    assert torch.equal(batches[1]["label"], batches[0]["label"]) and {0, 4, 5}.isdisjoint(batches[1]["label"].tolist())


def test_cached_latents_keep_annotations_in_their_view(cached_space, data):
    dataset, data = annotated_dataset(5, 16), dataclasses.replace(data, shift=0, horizontal_flip=True)
    plain, cached = (
        space.source(dataset, "train", data, 3, DistContext(CPU), None)[[*range(10)]]
        for space in (spaces.PixelSpace(data), cached_space)
    )
    assert plain.pop("image").shape == (10, 1, 16, 16) and cached.pop("latents").shape == (10, 4, 4, 4)
    assert_same_fields(cached, plain)


@pytest.mark.parametrize("cached", [True, False])
def test_cached_latents_and_codes_have_the_hints_of_images(cached, first_stage, cached_space, data):
    """The grey hint of a grey image is the image, whose latents or codes, in the same view, come with it."""
    dataset, data = annotated_dataset(5, 16), dataclasses.replace(data, shift=1, horizontal_flip=True)
    adapt = with_hints(None, {"hint_image": "grey", "condition_image": "edges"})
    space = cached_space if cached else spaces.CodeSpace(first_stage)
    for split, count in (("train", 90), ("val", 5)):
        source = space.source(dataset, split, data, 3, DistContext(CPU), adapt)
        batch = source[[*range(count)]]
        assert len(source) == (5 if cached else count) and batch["hint_image"].shape == (count, 1, 16, 16)
        encode, field = (first_stage.encode_latents, "latents") if cached else (first_stage.encode, "codes")
        torch.testing.assert_close(encode(batch["hint_image"]), batch[field], rtol=1e-5, atol=1e-5)
        assert batch["hint_image"].unique(dim=0).shape[0] > 4 and batch["condition_image"].unique().tolist() == [-1, 1]
        assert torch.equal(batch["label"], torch.tensor([source.item_index(k) for k in range(count)]))
    plain = spaces.PixelSpace(data).source(dataset, "train", data, 3, DistContext(CPU), adapt)[[*range(9)]]
    if cached:
        again = space.source(dataset, "train", data, 3, DistContext(CPU), adapt)[[*range(9)]]
        assert all(torch.equal(again[name], plain[name]) for name in ("hint_image", "condition_image"))


def test_latents_and_codes_have_files_of_their_own(first_stage, tmp_path, digits, data):
    stage, world = dataclasses.replace(first_stage, run=tmp_path), DistContext(CPU)
    codes = stage.encode_dataset(digits, "val", data, 50, world)
    latents = stage.encode_dataset(digits, "val", data, 50, world, latents=True)
    assert torch.equal(stage.vqgan.quantizer.assign(latents.ids[0]), codes.ids[0])
    assert len({path.stem for path in (tmp_path / "codes").iterdir() if path.suffix != ".lock"}) == 2


def test_latents_that_cannot_be_cached_are_refused(cached_space, first_stage, digits, data):
    with pytest.raises(ValueError, match="--cache_latents and --adapt"):
        cached_space.source(digits, "train", data, 3, DistContext(CPU), lambda item: item)
    with pytest.raises(ValueError, match="--cache_latents and --adapt"):
        adapt = with_hints(lambda item: item, {"hint_image": "grey"})
        cached_space.source(digits, "train", data, 3, DistContext(CPU), adapt)
    with pytest.raises(ValueError, match="--adapt for codes"):
        spaces.CodeSpace(first_stage).source(digits, "train", data, 3, DistContext(CPU), adapt)


def test_masked_codes_are_shown_as_grey_squares(first_stage):
    space = spaces.CodeSpace(first_stage)
    x = torch.arange(16).view(1, 4, 4).clone()
    predicted = torch.nn.functional.one_hot(x.flip(1), 16).float()
    x_image, x0_image = space.preview(x, predicted)
    assert torch.equal(x_image, space.decode(x)) and torch.equal(x0_image, x_image)  # nothing is masked
    x[0, 1, 2] = 16
    x_image, x0_image = space.preview(x, predicted)
    grey = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    grey[..., 4:8, 8:12] = True
    assert torch.equal(x_image, torch.where(grey, 128, x0_image))
    completed = torch.arange(16).view(1, 4, 4).clone()
    completed[0, 1, 2] = 10  # predicted at this position: row 2 of the flipped grid
    assert torch.equal(x0_image, space.decode(completed))


def test_validation_images_are_neither_mirrored_nor_shifted(digits, data):
    views = dataclasses.replace(data, horizontal_flip=True, shift=2)
    space = spaces.PixelSpace(views)
    plain = TrainingImages(ImageSource(digits, dataclasses.replace(data, shift=0)), 0)[list(range(32))]["image"]
    moved = space.source(digits, "train", views, 0, DistContext(CPU), None)[list(range(32))]["image"]
    still = space.source(digits, "val", views, 0, DistContext(CPU), None)[list(range(32))]["image"]
    assert torch.equal(still, plain) and not torch.equal(moved, plain)


def test_codes_without_labels_have_none(first_stage, digits, data, monkeypatch):
    table = CodeTable(torch.zeros(1, 5, 4, 4, dtype=torch.int32), torch.arange(5))
    monkeypatch.setattr(type(first_stage), "encode_dataset", lambda *args: table)
    plain = SimpleNamespace(n_classes=0)
    batch = spaces.CodeSpace(first_stage).source(plain, "train", data, 0, DistContext(CPU))[[0, 1]]
    assert "label" not in batch and batch["codes"].dtype == torch.int64


# end to end


def test_a_run_of_cached_latents_resumes_bit_by_bit(trained):
    flags = f"{LATENT} --logs_root {trained} --ae_load_dir vqgan_digits --cache_latents"
    call("train_sampler.py", f"{flags} --train_steps 3 --log_dir straight")
    for steps in (1, 3):
        call("train_sampler.py", f"{flags} --train_steps {steps} --log_dir stopped")
    assert_equal_bits(weights(trained / "straight", 3), weights(trained / "stopped", 3))
