"""Low-rank adapters of linear layers and convolutions: LoRA (Hu et al. 2022) and DoRA (Liu et al. 2024).

An adapted layer keeps its weight and bias under their own names. Rows of a fused layer (queries, keys, values) have
adapters of their own, its slices, so that they are those of files that do not fuse them. Several adapters may be there
at once, each with a strength; every one adds its change to the layer's output:

    LoRA: s B A x, with s = strength alpha / rank
    DoRA: strength (m / |V| V x - W x), with V = W + alpha / rank B A and |V| the norms of its rows
"""

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention
from models.blocks import FeedForward, ResBlock
from models.embeddings import TimeEmbedding
from models.ranges import POSITIVE, SIZE, check_ranges
from models.registry import did_you_mean
from models.router import LearnedRouter
from models.sdpa import upcast

GROUPS = ("attention", "feed_forward", "projections", "convolutions", "time", "text")
WHOLE = "all"  # the slice of a layer that is not fused


@dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """Options of new adapters."""

    rank: int = 8
    alpha: float = 8.0  # the change is multiplied by alpha / rank
    dropout: float = 0.0  # of the input
    dora: bool = False

    RANGES = {"rank": SIZE, "alpha": POSITIVE, "dropout": "[0, 1)"}

    def __post_init__(self):
        check_ranges(self)


class Adapter(nn.Module):
    """The change of some rows of a layer: `up` (rows, r) times `down` (r, in), for convolutions with kernels.

    `magnitude` makes it DoRA: (rows,) or, in files of LyCORIS, (1, in), of columns instead of rows. `scale` is alpha /
    rank, `strength` what the change is multiplied by.
    """

    def __init__(
        self, down: Tensor, up: Tensor, alpha: float, magnitude: Tensor | None = None, *, dropout: float = 0.0
    ):
        super().__init__()
        if down.shape[0] != up.shape[1] or up.ndim != down.ndim:
            raise ValueError(f"got down {tuple(down.shape)} and up {tuple(up.shape)}, wanted (r, in) and (rows, r)")
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.alpha, self.dropout, self.strength = float(alpha), dropout, 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def product(self) -> Tensor:
        """Returns alpha / rank times up times down, in the shape of the rows' weight."""
        product = upcast(self.up.flatten(1)) @ upcast(self.down.flatten(1))  # (rows, in or in k k)
        return self.scale * product.view(len(self.up), *self.down.shape[1:])

    def weight_change(self, weight: Tensor) -> Tensor:
        """Returns what is added to the rows' weight (rows, in, ...) to merge the adapter."""
        change = self.product()
        if self.magnitude is not None:
            changed = upcast(weight) + change
            factor = upcast(self.magnitude) / self.norms(changed)
            factor = factor.view(*factor.shape, *[1] * (weight.ndim - factor.ndim))
            change = factor * changed - upcast(weight)
        return self.strength * change

    def norms(self, changed: Tensor) -> Tensor:
        """Returns the norms of V = W + alpha / rank B A in the shape of the magnitudes."""
        return row_norms(changed) if self.magnitude.ndim == 1 else row_norms(changed.transpose(0, 1))[None]

    def output_change(self, layer: nn.Linear | nn.Conv2d, rows: slice, x: Tensor) -> Tensor:
        """Returns what is added to the output of a layer's rows for its input x."""
        dropped = F.dropout(x, self.dropout, self.training)
        if self.magnitude is None:
            return self.strength * self.scale * self.low_rank(layer, dropped)
        weight = layer.weight[rows]
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            norms = self.norms(upcast(weight) + self.product())  # constants, as in section 4.3 of the paper
        out = apply_weight(layer, weight, x)
        factor = (self.magnitude / norms).to(out.dtype).flatten()
        factor = factor if isinstance(layer, nn.Linear) else factor[:, None, None]
        if self.magnitude.ndim == 1:
            return self.strength * (factor * (out + self.scale * self.low_rank(layer, dropped)) - out)
        changed = apply_weight(layer, weight, factor * x) + self.scale * self.low_rank(layer, factor * dropped)
        return self.strength * (changed - out)

    def low_rank(self, layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
        """Returns B A x."""
        inner = apply_weight(layer, self.down, x)
        return F.linear(inner, self.up) if isinstance(layer, nn.Linear) else F.conv2d(inner, self.up)


def apply_weight(layer: nn.Linear | nn.Conv2d, weight: Tensor, x: Tensor) -> Tensor:
    """Returns a layer with this weight (rows, in, ...), and no bias, of x (..., in) or (B, in, H, W)."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)


def row_norms(weight: Tensor) -> Tensor:
    """Returns the norms of the rows of a weight (rows, ...), (rows,)."""
    return weight.flatten(1).norm(dim=1)


class AdaptedLayer(nn.Module):
    """Mixin of layers with adapters, by name and slice."""

    adapters: nn.ModuleDict  # of ModuleDicts
    slices: dict[str, slice]
    original: Tensor | None  # the weight without merged adapters

    def take_over(self, layer: nn.Linear | nn.Conv2d, slices: Mapping[str, slice]) -> None:
        """Takes the parameters of a layer, which are shared."""
        self.weight, self.bias = layer.weight, layer.bias
        self.adapters, self.slices, self.original = nn.ModuleDict(), dict(slices), None
        self.train(layer.training)

    def active(self) -> Iterator[tuple[slice, Adapter]]:
        """Returns the adapters that change the output, with their rows."""
        if self.original is None:
            for own in self.adapters.values():
                for name, adapter in own.items():
                    if adapter.strength != 0:
                        yield self.slices[name], adapter

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the changes of all adapters to the weight, and keeps the original."""
        changed = upcast(self.weight).clone()
        for rows, adapter in self.active():
            changed[rows] += adapter.weight_change(self.weight[rows])
        self.original = self.weight.detach().clone()
        self.weight.copy_(changed)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the original weight."""
        if self.original is not None:
            self.weight.copy_(self.original)
            self.original = None


class AdaptedLinear(AdaptedLayer, nn.Linear):
    """A linear layer with adapters."""

    def __init__(self, layer: nn.Linear, slices: Mapping[str, slice]):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.take_over(layer, slices)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        for rows, adapter in self.active():
            change = adapter.output_change(self, rows, x)
            after = self.out_features - rows.stop
            out = out + (F.pad(change, (rows.start, after)) if rows.start or after else change)
        return out


class AdaptedConv2d(AdaptedLayer, nn.Conv2d):
    """A convolution with adapters of all its rows."""

    def __init__(self, layer: nn.Conv2d, slices: Mapping[str, slice]):
        geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size, **geometry, device="meta")
        self.take_over(layer, slices)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        for rows, adapter in self.active():
            out = out + adapter.output_change(self, rows, x)
        return out


def slices_of(parent: nn.Module, name: str, layer: nn.Linear | nn.Conv2d) -> dict[str, slice]:
    """Returns the rows of each slice of a layer, by name: queries, keys and values of attention, or all rows."""
    fused = {"qkv": "qkv", "kv": "kv"}.get(name, "")
    if not isinstance(parent, Attention) or not fused:
        return {WHOLE: slice(0, layer.weight.shape[0])}
    sizes = dict(zip("qkv", parent.sizes, strict=True))
    slices, start = {}, 0
    for part in fused:
        slices[part] = slice(start, start + sizes[part])
        start += sizes[part]
    return slices


def layers_of(network: nn.Module) -> dict[str, tuple[nn.Module, nn.Linear | nn.Conv2d]]:
    """Returns the layers that may have adapters, with their parents, by name. Learned routers have none."""
    layers = {}
    for path, parent in network.named_modules():
        for name, layer in () if isinstance(parent, LearnedRouter) else parent.named_children():
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
                layers[f"{path}.{name}".removeprefix(".")] = (parent, layer)
    return layers


def groups_of(path: str, parent: nn.Module, layer: nn.Module) -> set[str]:
    """Returns the groups of GROUPS that a layer is in: those of text encoders are in "text" alone."""
    name, groups = path.rpartition(".")[2], set()
    if isinstance(parent, Attention):
        groups.add("attention")
    if isinstance(parent, FeedForward):
        groups.add("feed_forward")
    if name in ("proj_in", "proj_out"):
        groups.add("projections")
    if isinstance(layer, nn.Conv2d):
        groups.add("convolutions")
    if isinstance(parent, TimeEmbedding) or (isinstance(parent, ResBlock) and name == "embed"):
        groups.add("time")
    if path.startswith("encoders."):
        return {"text"} if groups & {"attention", "feed_forward"} else set()
    return groups


def select_layers(network: nn.Module, targets: Sequence[str], flag: str = "--lora_targets") -> list[str]:
    """Returns the names of the layers that targets name: groups of GROUPS, parts of the network, or patterns with *.

    ValueError for a target without layers.
    """
    layers, chosen = layers_of(network), set()
    for target in targets:
        found = [
            name
            for name, (parent, layer) in layers.items()
            if (target in GROUPS and target in groups_of(name, parent, layer))
            or name == target
            or name.startswith(f"{target}.")
            or fnmatch.fnmatchcase(name, target)
        ]
        if not found:
            near = did_you_mean(target, [*GROUPS, *layers])
            raise ValueError(f"got {flag} {target}, which names no layer{near}: choose of {', '.join(GROUPS)}")
        chosen |= set(found)
    return [name for name in layers if name in chosen]


def adapted_layer(network: nn.Module, name: str) -> AdaptedLayer:
    """Returns a layer of the network with a place for adapters, which replaces the plain one."""
    path, _, leaf = name.rpartition(".")
    parent = network.get_submodule(path)
    layer = getattr(parent, leaf)
    if not isinstance(layer, AdaptedLayer):
        kind = AdaptedLinear if isinstance(layer, nn.Linear) else AdaptedConv2d
        layer = kind(layer, slices_of(parent, leaf, layer))
        setattr(parent, leaf, layer)
    return layer


def add_adapter(network: nn.Module, name: str, layer_name: str, part: str, adapter: Adapter) -> None:
    """Adds an adapter to a slice of a layer; ValueError if it does not fit, or the slice has one of this name."""
    layer = adapted_layer(network, layer_name)
    weight, rows = layer.weight, layer.slices[part]
    wanted = (rows.stop - rows.start, *weight.shape[1:])
    got = (len(adapter.up), *adapter.down.shape[1:])
    if got != wanted:
        raise ValueError(
            f"got an adapter of {got} for {layer_name} ({part}), wanted {wanted}: it is of another network"
        )
    own = layer.adapters[name] if name in layer.adapters else nn.ModuleDict()
    if part in own:
        raise ValueError(f"{layer_name} ({part}) has an adapter {name} already: choose another name")
    own[part] = adapter.to(weight.device)
    layer.adapters[name] = own


def adapt(network: nn.Module, name: str, options: LoRAOptions, targets: Sequence[str]) -> list[str]:
    """Adds new adapters to all layers that `targets` name (see `select_layers`); returns the layers' names.

    They change nothing at first: `up` is zero, and the magnitudes of DoRA are the norms of the rows. Draws from the
    global generator. ValueError for targets without layers.
    """
    names = select_layers(network, targets)
    for layer_name in names:
        layer = adapted_layer(network, layer_name)
        for part, rows in layer.slices.items():
            weight = layer.weight[rows].detach()
            down = torch.empty(options.rank, *weight.shape[1:], dtype=weight.dtype, device=weight.device)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))
            up = weight.new_zeros(len(weight), options.rank, *[1] * (weight.ndim - 2))
            magnitude = row_norms(upcast(weight)) if options.dora else None
            adapter = Adapter(down, up, options.alpha, magnitude, dropout=options.dropout)
            add_adapter(network, name, layer_name, part, adapter)
    return names


def adapters_of(network: nn.Module, name: str | None = None) -> dict[tuple[str, str, str], Adapter]:
    """Returns the adapters of a network by (layer, name, slice), all or those of one name."""
    return {
        (path, own_name, part): adapter
        for path, layer in network.named_modules()
        if isinstance(layer, AdaptedLayer)
        for own_name, own in layer.adapters.items()
        if name in (None, own_name)
        for part, adapter in own.items()
    }


def set_strengths(network: nn.Module, strengths: Mapping[str, float]) -> None:
    """Sets the strengths of adapters by name; 0: without, 1: as trained. ValueError for a name that is not there."""
    found = adapters_of(network)
    names = {name for _, name, _ in found}
    for name in strengths.keys() - names:
        raise ValueError(f"got a strength of {name}, there are adapters {', '.join(sorted(names)) or 'of no name'}")
    for (_, name, _), adapter in found.items():
        adapter.strength = float(strengths.get(name, adapter.strength))


def merge(network: nn.Module) -> None:
    """Merges all adapters into the weights, which then compute the same; `unmerge` restores the originals.

    ValueError if they are merged already.
    """
    layers = [module for module in network.modules() if isinstance(module, AdaptedLayer)]
    if any(layer.original is not None for layer in layers):
        raise ValueError("the adapters are merged already: call unmerge first")
    for layer in layers:
        layer.merge()


def unmerge(network: nn.Module) -> None:
    """Restores the weights that `merge` changed, to the bit."""
    for module in network.modules():
        if isinstance(module, AdaptedLayer):
            module.unmerge()


def remove_adapters(network: nn.Module) -> None:
    """Replaces adapted layers by plain ones with their current weights."""
    for path, layer in list(network.named_modules()):
        if isinstance(layer, AdaptedLayer):
            parent = network.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], plain_layer(layer))


def plain_layer(layer: AdaptedLinear | AdaptedConv2d) -> nn.Linear | nn.Conv2d:
    """Returns a layer without adapters that shares the parameters of an adapted one."""
    if isinstance(layer, nn.Linear):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    else:
        geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **geometry, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)
