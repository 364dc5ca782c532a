"""Post-hoc EMA: weight averages whose length is chosen after training.

Karras et al. 2024 (arXiv:2312.02696), section 3 and appendix C. Averages with power-function profiles are tracked
during training, saved as snapshots, and combined afterwards. A profile of exponent gamma gives the weights of time tau
the density p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) in the average at time t. Its length relative to t is its
standard deviation, std. `<run>/ema_profiles/step_00002000.safetensors` holds every tracked average of a step, with keys
such as "0.05/network.blocks.0.weight".
"""

import json
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.registry import current_names
from train.ema import WeightAverage
from train.files import fsync, parse_json, write_errors_as_oserror

MAX_STD = ((1 + math.sqrt(5)) / 2) ** -2.5  # 0.3003: the largest std, at gamma = (sqrt(5) - 3) / 2
MAX_FIT_ERROR = 0.1  # largest accepted error of a combined profile, relative to the norm of the target
NEGLIGIBLE = 1e-9  # snapshots with a smaller weight are not read: float32 would not resolve them


def std_from_gamma(gamma: float) -> float:
    """Returns the relative std of a profile: std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_from_std(std: float) -> float:
    """Returns the exponent of a profile of relative std, the inverse of `std_from_gamma` (algorithm 2).

    With u = gamma + 2 this is u^3 + u^2 - u / std^2 + 1 / std^2 = 0, and with u = y - 1/3 it is y^3 + p y + q = 0. Its
    three roots are real; the largest (by Viete's trigonometric formula) is the profile that emphasises late times.
    """
    if not 0 < std <= MAX_STD:
        raise ValueError(f"got a relative length of {std} for an average, wanted more than 0 and at most {MAX_STD:.4f}")
    p, q = -1 / 3 - std**-2, 2 / 27 + 4 / 3 * std**-2
    cosine = 1.5 * q / p * math.sqrt(-3 / p)
    return 2 * math.sqrt(-p / 3) * math.cos(math.acos(max(cosine, -1.0)) / 3) - 7 / 3


class PosthocEMA(WeightAverage):
    """An average with a power-function profile of relative std: decay (1 - 1 / step)^(gamma + 1).

    In the average at step t, step n has weight (n / t)^(gamma + 1) - ((n - 1) / t)^(gamma + 1), the integral of the
    profile over (n - 1, n]. At step 1 the average equals the weights.
    """

    def __init__(self, model: nn.Module, std: float, share_frozen: bool = False):
        super().__init__(model, share_frozen)
        self.std, self.gamma = std, gamma_from_std(std)

    def decay(self, step: int) -> float:
        if step < 1:
            raise ValueError(f"got step {step} of an average, wanted at least 1")
        return (1 - 1 / step) ** (self.gamma + 1)


def snapshot_path(run: Path, step: int) -> Path:
    return run / "ema_profiles" / f"step_{step:08d}.safetensors"


def snapshot_steps(run: Path) -> list[int]:
    """Returns the steps of a run's EMA snapshots, oldest first."""
    names = [f.stem.removeprefix("step_") for f in (run / "ema_profiles").glob("step_*.safetensors")]
    return sorted(int(name) for name in names if name.isdigit())


def drop_snapshots_after(run: Path, step: int) -> list[int]:
    """Deletes the snapshots after the checkpoint that a run resumes from, and returns their steps."""
    dropped = [later for later in snapshot_steps(run) if later > step]
    for later in dropped:
        snapshot_path(run, later).unlink()
    return dropped


def buffer_names(averages: Mapping[str, PosthocEMA]) -> set[str]:
    """Returns the snapshot keys of buffers, which are copied, not averaged; `averages` are by "<std>/<module>"."""
    return {f"{name}.{key}" for name, average in averages.items() for key, _ in average.module.named_buffers()}


def save_snapshot(
    run: Path, step: int, tensors: Mapping[str, Tensor], *,
    copied: Collection[str] = (), dtype: torch.dtype = torch.float32,
) -> Path:  # fmt: skip
    """Saves the tracked averages of a step: full tensors on the CPU, by "<std>/<module>.<key of its state_dict>".

    Averages are stored as `dtype`; tensors named in `copied` (see `buffer_names`) and integers are stored unchanged.
    The file is written atomically and holds the CRC-32 of each tensor.
    """
    stored, storages = {}, set()
    for key, value in tensors.items():
        value = value.detach().to(dtype if value.is_floating_point() and key not in copied else value.dtype)
        value = value.contiguous()
        stored[key] = value.clone() if value.untyped_storage().data_ptr() in storages else value  # no shared storage
        storages.add(stored[key].untyped_storage().data_ptr())
    checks = {key: crc32(value) for key, value in stored.items()}
    names = sorted(key for key, value in stored.items() if key in copied or not is_averageable(value))
    path = snapshot_path(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(".step_*"):  # of a process that was killed while saving
        leftover.unlink()
    temporary = path.with_name(f".{path.name}.new")
    try:
        with write_errors_as_oserror(temporary):
            save_file(stored, temporary, {"step": str(step), "copied": json.dumps(names), "crc32": json.dumps(checks)})
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # frees space on a full disk
    fsync(path.parent)
    return path


def is_averageable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def crc32(tensor: Tensor) -> int:
    """Returns the CRC-32 of the bytes of a contiguous tensor."""
    return zlib.crc32(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy())


class EMASnapshot:
    """An open snapshot file, which verifies the CRC-32 of every tensor it reads."""

    def __init__(self, path: Path, file: safe_open):
        self.path, self.file = path, file
        try:
            metadata = file.metadata() or {}
            step, self.copied = int(metadata["step"]), parse_json(metadata["copied"])
            self.checks = parse_json(metadata["crc32"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a snapshot of EMA profiles ({error!r}): move it elsewhere") from error
        if snapshot_path(path.parent.parent, step) != path:
            raise ValueError(f"{path} holds the profiles of step {step}: rename it accordingly, or delete it")
        if set(file.keys()) != set(self.checks):
            raise ValueError(f"{path} is damaged (its tensors are not those it lists): delete it and use another one")

    def profiles(self, name: str) -> list[str]:
        """Returns the prefixes "<std>/<module>." of the profiles of a module."""
        keys = [key.partition("/") for key in self.checks]
        return sorted({f"{std}/{name}." for std, _, rest in keys if rest.startswith(f"{name}.")})

    def keys(self, prefix: str) -> list[str]:
        """Returns the keys below a prefix, without it."""
        return sorted(key.removeprefix(prefix) for key in self.checks if key.startswith(prefix))

    def read(self, key: str) -> Tensor:
        """Reads and verifies a tensor; ValueError if it is damaged."""
        tensor = self.file.get_tensor(key)
        if crc32(tensor) != self.checks[key]:
            raise ValueError(f"{self.path} is damaged (the CRC-32 of {key} differs): delete it and use another one")
        return tensor


@contextmanager
def open_snapshot(run: Path, step: int) -> Iterator[EMASnapshot]:
    """Opens a snapshot; ValueError if the file is damaged or not a snapshot."""
    path = snapshot_path(run, step)
    try:
        with safe_open(path, framework="pt") as file:
            yield EMASnapshot(path, file)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and use another one") from error


class ProfileFit(NamedTuple):
    """The linear combination of tracked profiles that approximates a target profile."""

    weights: Tensor  # (P,) float64, sum 1
    error: float  # norm of the residual, relative to the norm of the target


def inner_product(t_a: Tensor, gamma_a: Tensor, t_b: Tensor, gamma_b: Tensor) -> Tensor:
    """Returns the inner products of profiles (the integrals of their products), elementwise, float64.

    Up to the earlier of the two times, the product is (a + 1) (b + 1) tau^(a + b) / (t_a^(a + 1) t_b^(b + 1)); after it
    the product is 0. For t_a <= t_b the integral is (a + 1) (b + 1) / (a + b + 1) * (t_a / t_b)^b / t_b, with the
    exponent of the later profile.
    """
    early, late = torch.minimum(t_a, t_b), torch.maximum(t_a, t_b)
    exponent = torch.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (early / late) ** exponent / late


def fit_profile(steps: Collection[float], stds: Collection[float], step: float, std: float) -> ProfileFit:
    """Fits the profile of (step, std) by P profiles: least squares (algorithm 3), with weights (P,) of sum 1.

    The constraint on the sum is an addition: without it, values that are the same in all snapshots come out wrong, by
    1 % for snapshots every eighth of the training. With a Lagrange multiplier m, the minimum of x' A x - 2 b' x subject
    to 1' x = 1 solves [A 1; 1' 0] [x; m] = [b; 1], here for profiles scaled to norm 1 by diag(A)^(-1/2).
    """
    time = torch.tensor([*steps], dtype=torch.float64) / step  # (P,), the target at 1
    gamma = torch.tensor([gamma_from_std(s) for s in stds], dtype=torch.float64)
    one, target_gamma = torch.ones(1, dtype=torch.float64), torch.tensor([gamma_from_std(std)], dtype=torch.float64)
    products = inner_product(time[:, None], gamma[:, None], time, gamma)  # (P, P)
    target = inner_product(time, gamma, one, target_gamma)  # (P,)
    norm = inner_product(one, target_gamma, one, target_gamma)  # (1,)
    scale = products.diagonal().rsqrt()
    system = torch.zeros(len(time) + 1, len(time) + 1, dtype=torch.float64)
    system[:-1, :-1] = scale[:, None] * products * scale
    system[-1, :-1] = system[:-1, -1] = scale
    weights = scale * torch.linalg.solve(system, torch.cat([scale * target, one]))[:-1]
    residual = norm - 2 * weights @ target + weights @ products @ weights
    return ProfileFit(weights, (residual / norm).clamp(min=0).sqrt().item())


def reconstruct_ema(run: Path, step: int | None, name: str, std: float) -> dict[str, Tensor]:
    """Returns the state_dict of module `name` averaged with relative length `std`, at a saved step (None: the newest).

    Combines all snapshots up to that step, one tensor at a time, in float64; buffers are those of the step.
    FileNotFoundError if there is no snapshot; ValueError if one is damaged or there are too few for that length.
    """
    gamma_from_std(std)
    steps = [saved for saved in snapshot_steps(run) if step is None or saved <= step]
    if not snapshot_steps(run):
        raise FileNotFoundError(f"{run} kept no EMA profiles: train with --ema_profiles 0.05 0.1")
    if step is not None and step not in steps:
        saved = ", ".join(map(str, snapshot_steps(run)))
        raise FileNotFoundError(f"{run} kept no EMA profiles of step {step}; there are {saved}: pass one of them")
    basis = []  # (step, prefix) of every profile to combine
    for saved in steps:
        with open_snapshot(run, saved) as snapshot:
            basis += [(saved, prefix) for prefix in snapshot.profiles(name)]
    stds = [float(prefix.partition("/")[0]) for _, prefix in basis]
    if not basis or basis[-1][0] != steps[-1]:
        raise ValueError(f"{snapshot_path(run, steps[-1])} has no profile of a module {name!r}")
    weights, error = fit_profile([saved for saved, _ in basis], stds, steps[-1], std)
    if error > MAX_FIT_ERROR:
        raise ValueError(
            f"an average of relative length {std} at step {steps[-1]} cannot be combined from lengths "
            f"{sorted(set(stds))} saved at {len(steps)} steps: the error is {error:.0%}, wanted at most "
            f"{MAX_FIT_ERROR:.0%}; choose a length between or close to those, train with it in --ema_profiles, or save "
            "snapshots more often"
        )
    return combine(run, basis, weights)


def combine(run: Path, basis: list[tuple[int, str]], weights: Tensor) -> dict[str, Tensor]:
    """Returns the weighted sum of a module's profiles, given by step and prefix, with the buffers of the last one."""
    with open_snapshot(run, basis[-1][0]) as newest:
        prefix = basis[-1][1]
        keys = newest.keys(prefix)
        buffers = {key: newest.read(prefix + key) for key in keys if prefix + key in newest.copied}
    totals: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for (step, prefix), weight in zip(basis, weights.tolist(), strict=True):
        if abs(weight) < NEGLIGIBLE:
            continue
        with open_snapshot(run, step) as snapshot:
            stored = {new: old for old, new in current_names(snapshot.keys(prefix), keys).items()}
            if stored.keys() != set(keys):
                raise ValueError(f"{snapshot.path} is of another network than step {basis[-1][0]}: move it elsewhere")
            for key in [key for key in keys if key not in buffers]:
                tensor = snapshot.read(prefix + stored[key])
                if key not in totals:
                    dtypes[key] = torch.promote_types(tensor.dtype, torch.float32)
                    totals[key] = torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float64))
                if tensor.shape != totals[key].shape:
                    raise ValueError(f"{snapshot.path} has {prefix + key} in another shape: move it elsewhere")
                totals[key].add_(tensor, alpha=weight)
    for key, dtype in dtypes.items():
        totals[key] = totals[key].to(dtype)
    return {key: buffers[key] if key in buffers else totals[key] for key in keys}
