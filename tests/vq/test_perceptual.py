"""Perceptual losses: inputs, sources of the weights and, with real weights, values.

`LPIPS_SQUEEZE` names a folder with squeeze.backbone.pth (torchvision's ImageNet features) and the images in imgs/.
"""

import os
import sys
import urllib.error
import warnings
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vq.config import VQGANLossConfig
from vq.perceptual import BACKBONES, LPIPS, MIN_SIDE, LogitDistance, Perceptual, load_perceptual
from vq.weights import read_tensors


class Distance(nn.Module):
    """Replaces LPIPS by the mean squared difference of RGB images."""

    def __init__(self, net, linear, pretrained):
        super().__init__()
        self.weight, self.dropout = nn.Parameter(torch.ones(1)), nn.Dropout(0.5)

    def forward(self, x, y):
        assert x.shape[1] == y.shape[1] == 3
        return self.dropout(self.weight * (x - y).square().mean((1, 2, 3)))


def unreachable(*args, **kwargs):
    raise urllib.error.URLError("no route to host")


@pytest.fixture
def fake_lpips(monkeypatch):
    """Replaces LPIPS by a class."""
    return lambda distance: monkeypatch.setattr("vq.perceptual.lpips_distance", distance)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and nothing in torch's cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_distance_per_image_of_grey_or_colour(fake_lpips, channels):
    fake_lpips(Distance)
    name, perceptual = load_perceptual("auto")
    x = torch.rand(4, channels, 16, 16)
    assert name == "vgg"
    assert torch.allclose(perceptual(x, -x), (2 * x).square().mean((1, 2, 3)))


def test_the_network_is_frozen_and_its_dropout_never_wakes(fake_lpips):
    fake_lpips(Distance)
    _, perceptual = load_perceptual("alex")
    parent = nn.Sequential(perceptual).train()
    assert not any(module.training for module in perceptual.modules()) and parent.training
    assert not any(p.requires_grad for p in perceptual.parameters())


def packages_distance(net, linear=True):
    """LPIPS of the lpips package on a random network; `linear`: with its trained linear layers."""
    lpips = pytest.importorskip("lpips")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return lpips.LPIPS(net=net, verbose=False, pretrained=linear, pnet_rand=True)


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_in_float32_it_is_the_package_to_the_bit(net):
    package = packages_distance(net)
    x, y = (torch.rand(3, 3, 48, 64, requires_grad=True) * 2 - 1 for _ in range(2))
    results = [distance(x, y).flatten() for distance in (package, LPIPS(package))]
    assert torch.equal(*results) and results[0].min() > 0
    assert torch.equal(*(torch.autograd.grad(each.sum(), y)[0] for each in results))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vgg_in_half_precision_is_within_1e_2(dtype):
    distance = LPIPS(packages_distance("vgg").requires_grad_(False))
    x, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.tensor([0.2, 1.0]).view(2, 1, 1, 1)
    y = (x + noise * torch.randn(2, 3, 32, 32)).requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            value = distance(x, y)
        results.append((value, torch.autograd.grad(value.sum(), y)[0].flatten(1)))
    (expected, gradient), (actual, half_gradient) = results
    assert actual.dtype == torch.float32 and not torch.equal(actual, expected)
    assert torch.allclose(actual, expected, rtol=1e-2, atol=0) and 0.01 < expected.min() < 0.03
    assert torch.cosine_similarity(gradient, half_gradient).min() > 0.98


@pytest.mark.parametrize(("net", "is_half"), [("vgg", True), ("squeeze", False), ("resnet50", False)])
def test_only_vgg_follows_autocast(net, is_half):
    pytest.importorskip("lpips")
    perceptual, (x, y) = Perceptual(net, trained=False), torch.rand(2, 1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = perceptual(x, y)
    assert distance.dtype == torch.float32 and torch.equal(distance, perceptual(x, y)) == (not is_half)


def test_none_is_none():
    assert load_perceptual("none") == ("none", None)
    assert load_perceptual("none", "no such file") == ("none", None)  # --perceptual_weight 0


def test_auto_without_weights_warns_and_goes_on_without(fake_lpips):
    fake_lpips(unreachable)
    with pytest.warns(UserWarning, match="without the perceptual loss.*no route"):
        assert load_perceptual("auto") == ("none", None)


@pytest.mark.parametrize("net", ["squeeze", "resnet50"])
def test_a_named_network_without_weights_is_an_error(offline, net):
    if net == "squeeze":
        pytest.importorskip("lpips")
    with pytest.raises(ValueError, match=f"the {net} weights .*no route.*--perceptual_weights.*--perceptual_net none"):
        load_perceptual(net)


def test_a_missing_library_is_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips"):
        load_perceptual("auto")
    assert Perceptual("resnet50", trained=False)(*torch.zeros(2, 1, 3, 8, 8)) == 0  # it does not need lpips


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="'vgg19', wanted one of vgg, alex, squeeze, resnet50"):
        Perceptual("vgg19")
    with pytest.raises(ValueError, match="with random weights: leave one of them out"):
        Perceptual("squeeze", trained=False, weights="x.pth")
    assert {"auto", "none", *BACKBONES} == set(get_args(get_type_hints(VQGANLossConfig)["perceptual_net"]))


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_images_too_small_for_the_network_are_rejected(fake_lpips, net):
    with torch.device("meta"):
        network = packages_distance(net, linear=False).to("meta")
        min_side = MIN_SIDE[net]
        assert network(torch.empty(2, 3, min_side, min_side), torch.empty(2, 3, min_side, min_side)).shape[0] == 2
        with pytest.raises(RuntimeError):
            network(torch.empty(2, 3, min_side, min_side - 1), torch.empty(2, 3, min_side, min_side - 1))
    fake_lpips(Distance)
    perceptual = load_perceptual(net)[1]
    with pytest.raises(ValueError, match=rf"{min_side}x{min_side - 1} .*{net}, wanted {min_side} .*--img_size"):
        perceptual(*torch.zeros(2, 1, 3, min_side, min_side - 1))
    perceptual(*torch.zeros(2, 1, 3, min_side, min_side))


def backbone(net):
    """torchvision's network with random weights; users have state dicts of this kind."""
    torchvision = pytest.importorskip("torchvision")
    return getattr(torchvision.models, BACKBONES[net])()


@pytest.fixture(scope="module")
def squeeze():
    pytest.importorskip("lpips")
    torch.manual_seed(7)
    return backbone("squeeze").state_dict()


def save_weights(tmp_path, state):
    torch.save(state, tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


def feature_weights(state):
    return {name.removeprefix("features."): v for name, v in state.items() if name.startswith("features.")}


def test_weights_load_offline_from_full_or_feature_files(offline, tmp_path, squeeze):
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    feature_file = save_weights(tmp_path, feature_weights(squeeze))
    name, features = load_perceptual("squeeze", feature_file)
    full = Perceptual("squeeze", weights=save_weights(tmp_path, squeeze))
    assert name == "squeeze" and torch.equal(features(x, y), full(x, y)) and (features(x, x) == 0).all()
    loaded = {n.partition(".")[2]: v for n, v in features.distance.net.state_dict().items()}
    assert loaded.keys() == feature_weights(squeeze).keys()
    assert all(torch.equal(value, squeeze[f"features.{n}"]) for n, value in loaded.items())
    assert not any(p.requires_grad for p in features.parameters()) and not features.distance.training


def test_the_distance_is_the_papers(offline, tmp_path, squeeze):
    """Zhang et al. 2018, eq. 1, with the package's linear layers, on the features of torchvision's own network."""
    import lpips

    features = backbone("squeeze").features.eval()
    features.load_state_dict(feature_weights(squeeze))
    linear = torch.load(Path(lpips.__file__).parent / "weights/v0.1/squeeze.pth", "cpu", weights_only=True)
    x, y = torch.rand(2, 3, 3, 40, 36) * 2 - 1
    shift, scale = torch.tensor([[-0.03, -0.088, -0.188], [0.458, 0.448, 0.45]]).view(2, 1, 3, 1, 1)
    total, activations = torch.zeros(3), [(z - shift) / scale for z in (x, y)]
    layers = iter(range(7))
    for i, layer in enumerate(features):
        activations = [layer(z) for z in activations]
        if i in (1, 4, 7, 9, 10, 11, 12):
            a, b = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in activations)
            weight = linear[f"lin{next(layers)}.model.1.weight"]
            total += ((a - b).square() * weight).sum(1).mean((1, 2))
    distance = Perceptual("squeeze", weights=save_weights(tmp_path, squeeze))(x, y)
    assert torch.allclose(distance, total, rtol=1e-4) and distance.min() > 1e-3


WRONG = {
    "nothing": lambda s: {},
    "one too few": lambda s: dict(list(s.items())[1:]),
    "one too many": lambda s: {**s, "fc.weight": torch.zeros(3)},
    "both kinds": lambda s: {**s, "0.weight": s["features.0.weight"]},
    "another shape": lambda s: {**s, "features.0.bias": torch.zeros(63)},
    "a classifier beside bare features": lambda s: {**feature_weights(s), "classifier.1.bias": torch.zeros(1000)},
    "another network": lambda s: {f"features.{i}.weight": torch.zeros(3) for i in (0, 2, 5)},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_of_other_weights_is_refused(offline, tmp_path, squeeze, case):
    with pytest.raises(ValueError, match=r"weights.pth does not fit --perceptual_net squeeze \(\d+ .*squeezenet1_1"):
        load_perceptual("squeeze", save_weights(tmp_path, WRONG[case](squeeze)))


def test_a_file_that_holds_no_tensors_is_refused_and_not_run(offline, tmp_path, squeeze):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="nothing in it was run"):
        load_perceptual("squeeze", str(path))
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match="nothing in it was run"):
        load_perceptual("auto", str(path))
    torch.save(nn.Linear(1, 1), path)
    with pytest.raises(ValueError, match="nothing in it was run"):
        load_perceptual("squeeze", str(path))
    torch.save({"state_dict": squeeze}, path)
    with pytest.raises(ValueError, match="not a bare state dict of named tensors"):
        load_perceptual("squeeze", str(path))
    with pytest.raises(ValueError, match="is not a file.*--perceptual_weights FILE"):
        load_perceptual("squeeze", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="none.pth not found: wanted torchvision.*resnet50.*FILE"):
        load_perceptual("resnet50", str(tmp_path / "none.pth"))


def test_random_weights_load_nothing(offline):
    pytest.importorskip("lpips")
    for net in ("squeeze", "resnet50"):
        perceptual = Perceptual(net, trained=False)
        x = torch.rand(1, 1, 32, 32, requires_grad=True)
        distance = perceptual(x, torch.zeros_like(x))
        distance.sum().backward()
        assert distance.shape == (1,) and x.grad.abs().sum() > 0 and not perceptual.distance.training


def test_the_logits_come_from_a_file_with_or_without_counters(offline, tmp_path):
    network = backbone("resnet50").eval()
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.normal_(1 if name.endswith("weight") and p.ndim == 1 else 0, 0.02)
        for name, b in network.named_buffers():
            if name.endswith("running_mean"):
                b.normal_()
    state = network.state_dict()
    without_counters = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    name, perceptual = load_perceptual("resnet50", save_weights(tmp_path, without_counters))
    x, y = torch.rand(2, 2, 3, 224, 224) * 2 - 1
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    with torch.no_grad():
        a, b = (network(((z + 1) / 2 - mean) / std) for z in (x, y))
        distance = perceptual(x, y)
    assert name == "resnet50" and distance.shape == (2,) and distance.min() > 0
    assert torch.allclose(distance, (a - b).square().sum(1) / 1000, rtol=1e-4)
    assert len(without_counters) == 267 and load_perceptual("resnet50", save_weights(tmp_path, state))[0] == "resnet50"
    with pytest.raises(ValueError, match=r"1 missing, e.g. fc.bias\): wanted .* of resnet50; pass it"):
        load_perceptual("resnet50", save_weights(tmp_path, {n: v for n, v in state.items() if n != "fc.bias"}))


def test_logits_are_of_images_resized_to_224():
    distance = LogitDistance(pretrained=False)
    distance.net = nn.Flatten()
    logits = distance.logits(torch.full((2, 3, 50, 30), 0.2)).view(2, 3, 224, 224)
    expected = torch.tensor([(0.6 - 0.485) / 0.229, (0.6 - 0.456) / 0.224, (0.6 - 0.406) / 0.225]).view(1, 3, 1, 1)
    assert torch.allclose(logits, expected.expand(2, 3, 224, 224), atol=1e-5)
    stripes = (-1.0) ** torch.arange(672) * torch.ones(1, 3, 8, 1)
    smooth = distance.logits(stripes).view(1, 3, 224, 224) * distance.std + distance.mean
    # without antialiasing the columns would alternate between 1 and 0
    assert (smooth - 0.5)[..., 2:-2].abs().max() < 0.1


REAL = os.environ.get("LPIPS_SQUEEZE", "")
with_weights = pytest.mark.skipif(not REAL, reason="LPIPS_SQUEEZE names no folder with squeeze.backbone.pth and imgs/")


@pytest.fixture(scope="module")
def real():
    return load_perceptual("squeeze", f"{REAL}/squeeze.backbone.pth")[1]


@with_weights
def test_random_images_are_as_far_apart_as_torchmetrics_prints(real):
    g = torch.Generator().manual_seed(42)
    a, b = (torch.rand(2, 3, 100, 100, generator=g) * 2 - 1 for _ in range(2))
    assert real(a, b).tolist() == pytest.approx([0.1024, 0.0938], abs=5e-5)
    torch.manual_seed(42)
    a, b = (torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2))
    assert real(a, b).mean().item() == pytest.approx(0.1005, abs=5e-5)


@with_weights
@pytest.mark.parametrize("name, value", [("ex_p0", 0.71105), ("ex_p1", 0.14790)])
def test_photographs_are_as_far_apart_as_lpips_finds_them(real, name, value):
    images = []
    for file in ("ex_ref", name):
        with Image.open(f"{REAL}/imgs/{file}.png") as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        images.append(pixels.movedim(-1, 0)[None] / 127.5 - 1)
    assert real(*images).item() == pytest.approx(value, abs=2e-5)


def test_broken_external_weights_have_the_remedy_of_their_flag(tmp_path):
    torch.save({"a": torch.tensor([0.0, torch.nan])}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match="net.pth holds NaN in 1 of 1 tensors, such as a: pass --perceptual_weights"):
        read_tensors(tmp_path / "net.pth", "pass --perceptual_weights FILE")
