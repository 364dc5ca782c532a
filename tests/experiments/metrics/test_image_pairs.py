"""The distances that rank neighbours: of pixels, and LPIPS with images enlarged for it."""

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


class Seen(nn.Module):
    """In the place of LPIPS: the mean absolute difference, and what it was given."""

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
    "size, shown", [((8, 8), 64), ((28, 28), 84), ((63, 90), 126), ((64, 64), 64), ((65, 200), 65)]
)
def test_small_images_are_enlarged_by_a_whole_number(size, shown):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    large = enlarge(images)
    assert min(large.shape[2:]) == shown and large.shape[3] * size[0] == large.shape[2] * size[1]
    assert large.mean().item() == pytest.approx(images.mean().item(), abs=0.02)
    flat = enlarge(torch.full((1, 1, *size), 0.3))
    torch.testing.assert_close(flat, torch.full_like(flat, 0.3))


def test_a_learned_distance_is_taken_in_batches_of_minus_one_to_one():
    net = Seen()
    found = lpips_distance(net, torch.device("cpu"), 2)
    image, others = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
    others[3] = 255
    assert found.name == "LPIPS (alex)"
    assert found.distances(image, others).tolist() == [0, 0, 0, 2, 0]
    assert net.shapes == [(2, 1, 64, 64), (2, 1, 64, 64), (1, 1, 64, 64)]


def no_weights(net, weights):
    raise ValueError("no weights") from urllib.error.URLError("no route to host")


def test_without_weights_auto_is_pixels_and_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr(image_pairs, "load_perceptual", no_weights)
    assert choose_distance("auto", "alex", None, ALONE, 9).name == "pixels"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "pixels, not by LPIPS" in said and "no route" in said and "--perceptual_w" in said
    with pytest.raises(ValueError, match="--rerank pixels"):
        choose_distance("lpips", "alex", None, ALONE, 9)
    with pytest.raises(ValueError, match="no weights"):  # a file that was named does not become something else
        choose_distance("auto", "alex", "alex.pth", ALONE, 9)
    assert choose_distance("pixels", "alex", None, ALONE, 9).name == "pixels" and capsys.readouterr().out == ""


class OtherFailed(DistContext):
    """One of two processes, where the other has no weights."""

    def any(self, *flags):
        return [True for _ in flags]


def test_all_processes_rank_alike(monkeypatch, capsys):
    monkeypatch.setattr(image_pairs, "load_perceptual", lambda net, weights: (net, Seen()))
    assert choose_distance("auto", "alex", None, ALONE, 9).name == "LPIPS (alex)"
    assert choose_distance("auto", "alex", None, OtherFailed(torch.device("cpu")), 9).name == "pixels"
    assert "another process" in capsys.readouterr().out


@pytest.mark.skipif("LPIPS_SQUEEZE" not in os.environ, reason="LPIPS_SQUEEZE names no folder with squeeze.backbone.pth")
def test_real_weights_tell_what_is_alike_from_what_is_not():
    found = choose_distance("lpips", "squeeze", f"{os.environ['LPIPS_SQUEEZE']}/squeeze.backbone.pth", ALONE, 4)
    image = torch.zeros(1, 16, 16, dtype=torch.uint8)
    image[:, 3:12, 6:9] = 255
    moved, negative = image.roll(1, 2), 255 - image
    distances = found.distances(image, torch.stack([image, moved, negative])).tolist()
    assert distances[0] == 0 and 0 < distances[1] < distances[2]
