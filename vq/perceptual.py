"""Frozen perceptual distances: LPIPS (Zhang et al. 2018) and distances of ResNet-50 logits (Weber et al. 2024)."""

import urllib.error
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vq.weights import read_tensors

# Smallest image that a network takes, in pixels along each side.
MIN_SIDE = {"vgg": 16, "alex": 31, "squeeze": 17, "resnet50": 1}
# Names in torchvision.
BACKBONES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1", "resnet50": "resnet50"}


class LogitDistance(nn.Module):
    """Mean squared difference of ResNet-50's 1,000 ImageNet logits, for images (B, 3, H, W) in [-1, 1] -> (B,).

    The perceptual loss of VQGAN+ (Weber et al. 2024, "MaskBit", section 2) with torchvision's IMAGENET1K_V1 weights.
    Images are resized to 224x224 (bilinear, antialiased) and normalised with ImageNet's mean and standard deviation.
    """

    def __init__(self, pretrained: bool):
        super().__init__()
        import torchvision

        self.net = torchvision.models.resnet50(weights="IMAGENET1K_V1" if pretrained else None)
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def logits(self, images: Tensor) -> Tensor:
        """Returns the logits (B, 1000) of images (B, 3, H, W) in [-1, 1]."""
        resized = F.interpolate((images + 1) / 2, size=(224, 224), mode="bilinear", antialias=True)
        return self.net((resized - self.mean) / self.std)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        return (self.logits(images) - self.logits(others)).square().mean(1)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, eq. 1) of images (B, 3, H, W) in [-1, 1] -> (B,) float32.

    The sum over layers of the weighted squared difference of unit feature vectors, averaged over positions. Features
    are computed in autocast's dtype, and compared in float32. `network` is an lpips.LPIPS, whose parts it takes.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.net, self.scaling_layer, self.lins = network.net, network.scaling_layer, network.lins

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        features, other_features = (self.net(self.scaling_layer(x)) for x in (images, others))
        total = images.new_zeros(len(images))
        with torch.autocast(images.device.type, enabled=False):
            for a, b, linear in zip(features, other_features, self.lins, strict=True):
                difference = unit_vectors(a.float()) - unit_vectors(b.float())
                total = total + linear(difference.square()).mean((1, 2, 3))
        return total


def unit_vectors(features: Tensor) -> Tensor:
    """Scales the feature vectors of all positions (B, C, H, W) to length 1; zeros stay."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


class Perceptual(nn.Module):
    """Perceptual distance of images (B, C, H, W) in [-1, 1], C 1 or 3 -> (B,) float32.

    `net` is vgg, alex or squeeze (LPIPS, with the linear layers of version 0.1 from the lpips package), or resnet50
    (`LogitDistance`). ImageNet weights are read from the file `weights`, else from torchvision's cache or a download.
    `trained=False` uses random weights, for benchmarks. The network stays frozen and in eval mode. Under autocast vgg
    computes its features in half precision, which changes distances above 0.01 by less than 1e-2 (tried on random
    weights); the others stay in float32, since bfloat16 changed a distance of 0.045 on squeeze by 1.4e-2. ValueError
    for images that are too small for the network.
    """

    def __init__(self, net: str, trained: bool = True, weights: str | None = None):
        super().__init__()
        if net not in BACKBONES:
            raise ValueError(f"got perceptual network {net!r}, wanted one of {', '.join(BACKBONES)}")
        if weights is not None and not trained:
            raise ValueError(f"got the weights {weights} for a network with random weights: leave one of them out")
        self.net = net
        wanted = f"wanted torchvision's ImageNet weights of {BACKBONES[net]}; pass --perceptual_weights FILE"
        tensors = None if weights is None else read_tensors(Path(weights), wanted)
        downloaded = trained and weights is None
        if net == "resnet50":
            self.distance = LogitDistance(downloaded)
        else:
            self.distance = lpips_distance(net, linear=trained, pretrained=downloaded)
        if tensors is not None:
            load_backbone(self.distance.net, tensors, net, str(weights))
        self.distance.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Perceptual":
        return super().train(False)  # frozen: dropout stays off

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if min(height, width) < MIN_SIDE[self.net]:
            raise ValueError(
                f"got images of {height}x{width} for the perceptual network {self.net}, wanted {MIN_SIDE[self.net]} "
                "pixels or more along each side: pass another --perceptual_net, or a larger --img_size"
            )
        device = images.device.type
        with torch.autocast(device, enabled=self.net == "vgg" and torch.is_autocast_enabled(device)):
            return self.distance(*(x.float().expand(-1, 3, -1, -1) for x in (images, others)))


def lpips_distance(net: str, linear: bool, pretrained: bool) -> LPIPS:
    """Builds LPIPS from the lpips package; `linear` and `pretrained` load trained linear layers and backbone weights.

    ValueError if the package is not installed.
    """
    try:
        import lpips
    except ImportError as error:
        raise ValueError(
            "the perceptual loss needs lpips: `pip install lpips`, or pass --perceptual_net none"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips uses torchvision's deprecated `pretrained` argument
        return LPIPS(lpips.LPIPS(net=net, verbose=False, pretrained=linear, pnet_rand=not pretrained))


@torch.no_grad()
def load_backbone(network: nn.Module, tensors: dict[str, Tensor], net: str, source: str) -> None:
    """Loads a torchvision state dict; ValueError for weights that are missing, unknown or of another shape.

    For LPIPS it may be that of the whole network (`features.0.weight`), whose `classifier.` is ignored, or of its
    features alone (`0.weight`). `num_batches_tracked` of batch norms is ignored: old files lack it, and evaluation does
    not use it.
    """
    prefix = "features." if net != "resnet50" and any(name.startswith("features.") for name in tensors) else ""
    wanted = {}
    for name, tensor in network.state_dict().items():
        key = name if net == "resnet50" else name.partition(".")[2]  # lpips prefixes slices: slice2.3.squeeze.bias
        if not key.endswith("num_batches_tracked"):
            wanted[prefix + key] = tensor
    ignored = ("classifier.",) if prefix else ()
    stored = {n for n in tensors if not n.startswith(ignored) and not n.endswith("num_batches_tracked")}
    missing, unknown = sorted(wanted.keys() - stored), sorted(stored - wanted.keys())
    misshapen = [name for name in wanted.keys() & stored if wanted[name].shape != tensors[name].shape]
    if missing or unknown or misshapen:
        faults = {"missing": missing, "unknown": unknown, "of another shape": sorted(misshapen)}
        summary = "; ".join(f"{len(names)} {fault}, e.g. {names[0]}" for fault, names in faults.items() if names)
        raise ValueError(
            f"{source} does not fit --perceptual_net {net} ({summary}): wanted torchvision's state dict of "
            f"{BACKBONES[net]}{'' if net == 'resnet50' else ', of the whole network or its features'}; "
            "pass it with --perceptual_weights FILE"
        )
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])


def net_for_channels(net: str, n_channels: int) -> str:
    """Returns `net`, which takes grey and RGB images. For others: none instead of auto, with a warning.

    ValueError for a network named for other images.
    """
    if n_channels in (1, 3) or net == "none":
        return net
    reason = f"it takes grey or RGB images, not {n_channels} channels"
    if net != "auto":
        raise ValueError(f"got the perceptual network {net}, but {reason}: pass --perceptual_net none")
    warnings.warn(f"training without the perceptual loss: {reason}", stacklevel=2)
    return "none"


def load_perceptual(net: str, weights: str | None = None) -> tuple[str, Perceptual | None]:
    """Returns (name, module) for `--perceptual_net`, with weights from a file if given; ("none", None) for none.

    auto is vgg, or none with a warning if its weights are neither cached nor downloadable.
    """
    if net == "none":
        return "none", None
    name = "vgg" if net == "auto" else net
    try:
        return name, Perceptual(name, weights=weights)
    except (urllib.error.URLError, TimeoutError) as error:
        if net != "auto":
            raise ValueError(
                f"the {net} weights of the perceptual loss could not be downloaded ({error}): pass their file with "
                "--perceptual_weights, put them into torch's hub cache, or pass --perceptual_net none"
            ) from error
        warnings.warn(
            f"training without the perceptual loss: its weights could not be downloaded ({error})", stacklevel=2
        )
        return "none", None
