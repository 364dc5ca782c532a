"""The perceptual loss, with the library's network replaced by one that can be known."""

import sys
import urllib.error
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vq.perceptual import load_perceptual


class Distance(nn.Module):
    """In the place of LPIPS: the mean squared difference of RGB images."""

    def __init__(self, net, verbose):
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.ones(1)), nn.Dropout(0.5)

    def forward(self, x, y):
        assert x.shape[1] == y.shape[1] == 3
        return self.dropout(self.weight * (x - y).square().mean((1, 2, 3), keepdim=True))


def unreachable(net, verbose):
    raise urllib.error.URLError("no route to host")


@pytest.fixture
def lpips(monkeypatch):
    """Puts a class in the place of lpips.LPIPS."""
    return lambda network: monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=network))


@pytest.mark.parametrize("channels", [1, 3])
def test_one_distance_per_image_of_grey_or_colour(lpips, channels):
    lpips(Distance)
    name, perceptual = load_perceptual("auto")
    x = torch.rand(4, channels, 8, 8)
    assert name == "vgg"
    assert torch.allclose(perceptual(x, -x), (2 * x).square().mean((1, 2, 3)))


def test_the_network_is_frozen_and_its_dropout_never_wakes(lpips):
    lpips(Distance)
    _, perceptual = load_perceptual("alex")
    parent = nn.Sequential(perceptual).train()
    assert not any(module.training for module in perceptual.modules()) and parent.training
    assert not any(p.requires_grad for p in perceptual.parameters())


def test_none_is_none():
    assert load_perceptual("none") == ("none", None)


def test_auto_without_weights_warns_and_goes_on_without(lpips):
    lpips(unreachable)
    with pytest.warns(UserWarning, match="without the perceptual loss.*no route"):
        assert load_perceptual("auto") == ("none", None)


def test_a_named_network_without_weights_is_an_error(lpips):
    lpips(unreachable)
    with pytest.raises(ValueError, match="the vgg weights .*no route.*--perceptual_net none"):
        load_perceptual("vgg")


def test_a_missing_library_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips"):
        load_perceptual("auto")
