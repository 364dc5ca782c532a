"""Optimizers, parameter freezing, gradient clipping and stepping, and the handling of non-finite steps."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam

from models.experts import experts_of
from train.data.collate import field_to_tensor, pad
from train.distributed import DistContext, grad_norm, is_sharded, local_grads
from train.execution import LossScale
from train.files import write_errors_as_oserror
from train.loop import Batch, TrainState
from train.progress import print_above
from train.registry import did_you_mean, import_callable

FUSED_DEVICES = ("cpu", "cuda", "mps")  # with fused optimizer kernels in torch
NEW_TOKENS = "new_tokens"  # the part of a network that are the new words of its text encoder
EXPERTS = "experts"  # the part of a network that are its experts, with their routers
WINDOW = 1_000  # recent steps among which bad ones are counted


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Optimizer:
    """Builds the optimizer `name`, or the class at a dotted path, called with (parameters, lr=, weight_decay=).

    Weight decay is decoupled, w -= lr weight_decay w (Loshchilov & Hutter 2019), except in adam and sgd, which add
    weight_decay w to the gradient; it acts on all parameters, also on those of norms, gates and adapters. `betas` are
    the decay rates of the averages of the gradient and of its square; sgd uses the first as its momentum, adafactor and
    user classes use neither. ValueError for an unknown name, for adafactor and adamw8bit with sharded parameters, which
    they do not support, and for adamw8bit without bitsandbytes.

    Muon is not included: it applies to the matrices of hidden layers only, so a network would need two optimizers.
    """
    parameters = list(parameters)
    if name in OPTIMIZERS:
        optimizer = OPTIMIZERS[name](parameters, lr, weight_decay, betas)
    elif "." in name:
        optimizer = import_callable(name, "optimizer")(parameters, lr=lr, weight_decay=weight_decay)
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"got optimizer {name!r}, which returned a {type(optimizer).__name__}, not an Optimizer")
    else:
        names = ", ".join(OPTIMIZERS)
        raise ValueError(
            f"unknown optimizer {name!r}{did_you_mean(name, OPTIMIZERS)}; there are: {names}, "
            "or package.module.Class of your own"
        )
    optimizer.register_load_state_dict_post_hook(match_parameter_strides)
    return optimizer


def is_selected(name: str, prefixes: Sequence[str]) -> bool:
    """Returns whether a dotted name equals or starts with one of the prefixes; True without prefixes.

    A part `*` of a prefix stands for any one part of the name: "blocks.*.gated". The prefix "new_tokens" are the new
    words of a text encoder, wherever it is.
    """
    parts = name.split(".")

    def matches(prefix: list[str]) -> bool:
        if prefix == [NEW_TOKENS]:
            return parts[-1] == NEW_TOKENS
        first = parts[: len(prefix)]
        return len(first) == len(prefix) and all(a in ("*", b) for a, b in zip(prefix, first, strict=True))

    return not prefixes or any(matches(prefix.split(".")) for prefix in prefixes)


def freeze_all_but(module: nn.Module, prefixes: Sequence[str], learned: Collection[str] = ()) -> None:
    """Freezes all parameters whose dotted names neither are in `learned` nor start with one of the prefixes.

    Without both nothing changes; the prefix "experts" are all experts, with their routers. ValueError for a prefix that
    matches no parameter or buffer, and if no trainable parameter is left.
    """
    if not prefixes and not learned:
        return
    prefixes = name_experts(module, prefixes)
    names = [name for name, _ in module.named_parameters()]
    names += [name for name, _ in module.named_buffers()]
    for prefix in prefixes:
        if not any(is_selected(name, [prefix]) for name in names):
            parts = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
            top = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ValueError(
                f"got --train_only {prefix}, which matches no parameter{did_you_mean(prefix, parts)}; its parts are: "
                f"{top}"
            )
    selected = {name for name, _ in module.named_parameters() if name in learned}
    selected |= {name for name, _ in module.named_parameters() if prefixes and is_selected(name, prefixes)}
    if not any(name in selected and p.requires_grad for name, p in module.named_parameters()):
        raise ValueError(f"got --train_only {' '.join(prefixes)}, which leaves nothing to train: name more parts")
    for name, parameter in module.named_parameters():
        if name not in selected:  # never unfreezes what the module itself has frozen
            parameter.requires_grad_(False)


def name_experts(module: nn.Module, prefixes: Sequence[str]) -> list[str]:
    """Returns the prefixes with the names of the layers of experts instead of "experts", if the module has any."""
    layers = list(experts_of(module))
    return [name for prefix in prefixes for name in (layers if prefix == EXPERTS and layers else [prefix])]


def can_fuse(parameters: list[nn.Parameter]) -> bool | None:
    """Returns True if a fused kernel can update all parameters, else None: torch chooses (foreach on CUDA, or a loop).

    torch never chooses the fused kernel by itself.
    """
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters) or None


def any_sharded(parameters: list[nn.Parameter]) -> bool:
    """Returns whether any of the parameters is sharded (FSDP2)."""
    return any(is_sharded(p) for p in parameters)


def sgd(parameters: list[nn.Parameter], lr: float, decay: float, betas: tuple[float, float]) -> Optimizer:
    fused = None if any_sharded(parameters) else can_fuse(parameters)  # unlike Adam's, SGD's does not support shards
    return torch.optim.SGD(parameters, lr, betas[0], weight_decay=decay, fused=fused)


def adafactor(parameters: list[nn.Parameter], lr: float, decay: float, betas: tuple[float, float]) -> Optimizer:
    if any_sharded(parameters):
        raise ValueError("adafactor needs unsharded parameters: pass --optimizer adamw or --parallel ddp")
    return torch.optim.Adafactor(parameters, lr, weight_decay=decay)


def adamw8bit(parameters: list[nn.Parameter], lr: float, decay: float, betas: tuple[float, float]) -> Optimizer:
    """Builds AdamW whose moments of tensors of 4,096 elements or more have 8 bits (Dettmers et al. 2022)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        needs = "got optimizer adamw8bit, which needs the package bitsandbytes"
        raise ValueError(f"{needs}: pip install bitsandbytes, or pass --optimizer adamw") from error
    if any_sharded(parameters):
        raise ValueError("adamw8bit needs unsharded parameters: pass --optimizer adamw or --parallel ddp")
    for p in parameters:  # its kernels take them as flat memory, in the order of their elements
        p.data = p.data.contiguous()
    return AdamW8bit(parameters, lr, betas, weight_decay=decay)


OptimizerFactory = Callable[[list[nn.Parameter], float, float, tuple[float, float]], Optimizer]
OPTIMIZERS: dict[str, OptimizerFactory] = {
    "adamw": lambda p, lr, decay, betas: AdamW(p, lr, betas, weight_decay=decay, fused=can_fuse(p)),
    "adam": lambda p, lr, decay, betas: Adam(p, lr, betas, weight_decay=decay, fused=can_fuse(p)),
    "radam": lambda p, lr, decay, betas: RAdam(p, lr, betas, weight_decay=decay, decoupled_weight_decay=True),
    "nadam": lambda p, lr, decay, betas: NAdam(p, lr, betas, weight_decay=decay, decoupled_weight_decay=True),
    "sgd": sgd,
    "adafactor": adafactor,
    "adamw8bit": adamw8bit,
}


@torch.no_grad()
def match_parameter_strides(optimizer: Optimizer) -> None:
    """Gives every loaded moment the strides of its parameter.

    A state saved in another memory format has other strides. The fused kernels treat parameter, gradient and moments
    as flat memory: on the CPU they would silently pair the wrong numbers.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class StepResult(NamedTuple):
    """What `clip_and_step` did: norms () of each optimizer's gradients, and whether all are finite, () bool."""

    norms: list[Tensor]
    finite: Tensor


def clip_and_step(
    state: TrainState, names: list[str], world: DistContext, *, lr: float, clip: float
) -> StepResult | None:
    """Clips the gradients of each named optimizer to norm `clip` (0: no clipping), then takes a step with each.

    Returns the norms before clipping. If one of them is not finite, no weight or moment changes; the norms are global,
    so all processes decide alike. Fused Adam decides on the device, so the host need not wait for it. With other
    optimizers and with a loss scale it waits, and None is returned for a step that was not taken.
    """
    scale: LossScale | None = state.extras.get("loss_scale")
    optimizers = [state.optimizers[name] for name in names]
    parameters = [[p for g in optimizer.param_groups for p in g["params"]] for optimizer in optimizers]
    norms = torch.stack([grad_norm(group, world) for group in parameters])
    if scale is not None:
        norms = norms / scale.value
    finite = norms.isfinite().all()
    waits = scale is not None or not all(map(can_skip_on_device, optimizers))
    taken = not waits or bool(finite)
    for norm, optimizer, group in zip(norms, optimizers, parameters, strict=True):
        if taken:
            set_learning_rate(optimizer, lr)
            divisor = torch.ones_like(norm) if clip == 0 else ((norm + 1e-6) / clip).clamp(min=1)
            if waits:
                divide_grads(group, divisor if scale is None else divisor * scale.value)
                optimizer.step()
            else:
                step_if_finite(optimizer, finite, divisor)
        optimizer.zero_grad()
    if scale is not None:
        scale.record_finite() if taken else scale.record_overflow()
    return StepResult(list(norms), finite) if taken else None


def can_skip_on_device(optimizer: Optimizer) -> bool:
    """Returns whether `step_if_finite` supports an optimizer: fused Adam or AdamW of unsharded parameters."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and type(optimizer) in (Adam, AdamW) and not any_sharded(optimizer.param_groups[0]["params"])


def step_if_finite(optimizer: Optimizer, finite: Tensor, divisor: Tensor) -> None:
    """Takes a step with the gradients divided by `divisor` () if `finite` () is true; it does not synchronise.

    These are the two attributes by which torch's GradScaler tells a fused optimizer to divide and to skip.
    """
    optimizer.grad_scale, optimizer.found_inf = divisor.float(), (~finite).float()
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate, times the factor of each group that has one (see `scale_learning_rates`)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def parse_scales(words: Sequence[str]) -> dict[str, float]:
    """Returns the factors of --lr_scale by part; ValueError for other words than part=factor and for a part twice."""
    scales: dict[str, float] = {}
    for word in words:
        part, _, factor = word.partition("=")
        try:
            value = float(factor)
        except ValueError:
            value = -1.0
        if not part or part in scales or not 0 < value < float("inf"):
            wanted = "wanted a part of the network and a factor above 0, each part once"
            raise ValueError(f"got --lr_scale {word}, {wanted}: pass text=0.75")
        scales[part] = value
    return scales


def is_part(name: str, part: str) -> bool:
    """Returns whether a parameter belongs to a part of --lr_scale: "lora" are the adapters, the name of a condition is
    its encoder, others are names as in --train_only."""
    if part == "lora":
        return ".adapters." in name
    return is_selected(name, [part, f"encoders.{part}"])


def scale_learning_rates(optimizer: Optimizer, module: nn.Module, scales: Mapping[str, float]) -> None:
    """Splits a new optimizer's group of parameters by the factor of their part, `lr_scale`.

    A parameter in several parts takes the factor of the last one that is given. ValueError for a part in which nothing
    learns.
    """
    if not scales:
        return
    (group,) = optimizer.param_groups
    learned = {id(p) for p in group["params"]}
    factors = {}
    for part, factor in scales.items():
        parts, parameters = name_experts(module, [part]), module.named_parameters()
        own = [p for name, p in parameters if any(is_part(name, each) for each in parts) and id(p) in learned]
        if not own:
            tops = dict.fromkeys(n.partition(".")[0] for n, p in module.named_parameters() if id(p) in learned)
            raise ValueError(f"got --lr_scale {part}, in which nothing learns; what learns is in: {', '.join(tops)}")
        factors |= {id(p): factor for p in own}
    by_factor: dict[float, list[nn.Parameter]] = {}
    for p in group["params"]:
        by_factor.setdefault(factors.get(id(p), 1.0), []).append(p)
    groups = [{**group, "params": params, "lr_scale": factor} for factor, params in by_factor.items()]
    optimizer.param_groups[:] = groups


def divide_grads(parameters: list[nn.Parameter], divisor: Tensor) -> None:
    """Divides the gradients of the parameters by `divisor` (), in place."""
    torch._foreach_div_(local_grads(parameters), divisor)


class BadStepRecorder:
    """The `on_skipped` of `fit`: saves the batches of bad steps, and ends the run if there are too many."""

    def __init__(self, run: Path, world: DistContext, max_bad_steps: int):
        self.run, self.world, self.max_bad_steps = run, world, max_bad_steps

    def __call__(self, state: TrainState, step: int, micro_batches: Sequence[Batch]) -> None:
        """Saves the global batch of a step as bad_steps/step_<step>.safetensors; ValueError after too many bad steps.

        An overflow of the float16 loss scale is not a bad step: the scale is lowered.
        """
        if "loss_scale" in state.extras and not state.extras["loss_scale"].exhausted:
            return
        state.bad_steps.append(step)
        recent = [bad for bad in state.bad_steps if bad > step - WINDOW]
        path = self.run / "bad_steps" / f"step_{step:08d}.safetensors"
        self.save_batch(path, micro_batches)
        if self.world.is_main:
            print_above(f"step {step} skipped, loss or gradient not finite ({len(recent)} recently): {path}")
        if len(recent) > self.max_bad_steps:
            raise ValueError(
                f"{len(recent)} of the last {WINDOW} steps were not finite, --max_bad_steps allows "
                f"{self.max_bad_steps}: look at the batches in {path.parent}, then resume with a smaller --lr and "
                "--change lr, or with --no_amp --change amp"
            )

    def save_batch(self, path: Path, micro_batches: Sequence[Batch]) -> None:
        """Saves the fields of the global batch, in any order: "position" identifies the samples.

        Padded fields have the length of the longest micro-batch; strings are stored as JSON in UTF-8, (B, bytes) uint8.
        """
        batch = {
            name: self.gather_micro_batches([field_to_tensor(batch[name]) for batch in micro_batches]).cpu()
            for name in micro_batches[0]
        }
        if self.world.is_main:
            path.parent.mkdir(exist_ok=True)
            with write_errors_as_oserror(path):
                save_file({name: tensor.contiguous() for name, tensor in batch.items()}, path)

    def gather_micro_batches(self, micro_batches: list[Tensor]) -> Tensor:
        """Concatenates (B, n, ...) of the micro-batches of all processes, padded to the largest n."""
        if micro_batches[0].ndim > 1:
            longest = torch.tensor([max(part.shape[1] for part in micro_batches)], device=self.world.device)
            longest = int(self.world.gather(longest).max())
            micro_batches = [pad(part, longest, axis=1) for part in micro_batches]
        return self.world.gather(torch.cat(micro_batches).to(self.world.device))
