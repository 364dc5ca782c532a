"""The distances that rank neighbours: pixels, and LPIPS on enlarged images."""

import math
import os
import urllib.error

import pytest
import torch
from torch import nn

from experiments.metrics import image_pairs
from experiments.metrics.image_pairs import choose_distance, enlarge, lpips_distance, pixel_distance
from train.distributed import DistContext

ALONE = DistContext(torch.device("cpu"))


class RecordingLPIPS(nn.Module):
    """A mock of LPIPS: the mean absolute difference, recording its inputs' shapes."""

    net = "alex"

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, images, others):
        self.shapes.append(tuple(others.shape))
        assert images.shape == others.shape and others.abs().max() <= 1
        return (images - others).abs().mean((1, 2, 3))


def test_pixels_by_hand():
    image, others = torch.zeros(1, 2, 2, dtype=torch.uint8), torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    others[1], others[2, 0, 0, 0] = 255, 51
    assert pixel_distance().distances(image, others).tolist() == pytest.approx([0, 2, 0.2])
    assert pixel_distance().distances(others[1], image[None]).item() == 2  # bytes do not wrap around
    assert pixel_distance().distances(image.expand(3, 2, 2), others[1:2].expand(1, 3, 2, 2)).item() == pytest.approx(
        math.sqrt(12)
    )


@pytest.mark.parametrize(
    "size, enlarged_side", [((8, 8), 64), ((28, 28), 84), ((63, 90), 126), ((64, 64), 64), ((65, 200), 65)]
)
def test_small_images_are_enlarged_by_an_integer(size, enlarged_side):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    large = enlarge(images)
    assert min(large.shape[2:]) == enlarged_side and large.shape[3] * size[0] == large.shape[2] * size[1]
    assert large.mean().item() == pytest.approx(images.mean().item(), abs=0.02)
    flat = enlarge(torch.full((1, 1, *size), 0.3))
    torch.testing.assert_close(flat, torch.full_like(flat, 0.3))


def test_lpips_is_computed_in_batches_on_the_range_minus_1_to_1():
    net = RecordingLPIPS()
    distance = lpips_distance(net, torch.device("cpu"), 2)
    image, others = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    others[3] = 255
    assert distance.name == "LPIPS (alex)"
    assert distance.distances(image, others).tolist() == [0, 0, 0, 2, 0]
    assert net.shapes == [(2, 1, 64, 64), (2, 1, 64, 64), (1, 1, 64, 64)]


def no_weights(net, weights):
    raise ValueError("no weights") from urllib.error.URLError("no route to host")


def test_without_weights_auto_falls_back_to_pixels(monkeypatch, capsys):
    monkeypatch.setattr(image_pairs, "load_perceptual", no_weights)
    assert choose_distance("auto", "alex", None, ALONE, 9).name == "pixels"
    message = capsys.readouterr().out
    assert (
        message.count("\n") == 1
        and "pixels, not by LPIPS" in message
        and "no route" in message
        and "--perceptual_w" in message
    )
    with pytest.raises(ValueError, match="--rerank pixels"):
        choose_distance("lpips", "alex", None, ALONE, 9)
    with pytest.raises(ValueError, match="no weights"):  # an explicit file has no fallback
        choose_distance("auto", "alex", "alex.pth", ALONE, 9)
    assert choose_distance("pixels", "alex", None, ALONE, 9).name == "pixels" and capsys.readouterr().out == ""


class OtherFailed(DistContext):
    """A rank of two whose peer has no weights."""

    def any(self, *flags):
        return [True for _ in flags]


def test_all_ranks_use_the_same_distance(monkeypatch, capsys):
    monkeypatch.setattr(image_pairs, "load_perceptual", lambda net, weights: (net, RecordingLPIPS()))
    assert choose_distance("auto", "alex", None, ALONE, 9).name == "LPIPS (alex)"
    assert choose_distance("auto", "alex", None, OtherFailed(torch.device("cpu")), 9).name == "pixels"
    assert "another process" in capsys.readouterr().out


@pytest.mark.skipif("LPIPS_SQUEEZE" not in os.environ, reason="LPIPS_SQUEEZE names no folder with squeeze.backbone.pth")
def test_lpips_with_real_weights_orders_similar_images():
    distance = choose_distance("lpips", "squeeze", f"{os.environ['LPIPS_SQUEEZE']}/squeeze.backbone.pth", ALONE, 4)
    image = torch.zeros(1, 16, 16, dtype=torch.uint8)
    image[:, 3:12, 6:9] = 255
    shifted, negative = image.roll(1, 2), 255 - image
    distances = distance.distances(image, torch.stack([image, shifted, negative])).tolist()
    assert distances[0] == 0 and 0 < distances[1] < distances[2]
