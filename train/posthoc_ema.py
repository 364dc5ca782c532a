"""Averages whose length is chosen after training: power-function profiles, tracked, kept now and then, recombined.

Karras et al. 2024 (arXiv:2312.02696), section 3 and appendix C. A profile of exponent g weighs the weights of time tau
in an average at time t by p(tau) = (g + 1) tau^g / t^(g + 1). Its length relative to t is its standard deviation, std.
`<run>/ema_profiles/step_00002000.safetensors` holds every tracked average of a step, as "0.05/network.blocks.0.weight".
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
from train.files import fsync, write_errors_as_oserror

MAX_STD = ((1 + math.sqrt(5)) / 2) ** -2.5  # 0.3003: the greatest std of any exponent, at g = (sqrt(5) - 3) / 2
MAX_FIT_ERROR = 0.1  # a recombined profile farther than this from the wanted one, relative to its norm, is refused
NEGLIGIBLE = 1e-9  # snapshots that weigh less than this are not read: float32 would not show them


def std_from_gamma(gamma: float) -> float:
    """The relative standard deviation of a profile: std^2 = (g + 1) / ((g + 2)^2 (g + 3))."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_from_std(std: float) -> float:
    """The exponent of a profile by its relative standard deviation, the inverse of `std_from_gamma` (algorithm 2).

    With u = g + 2 that is u^3 + u^2 - u / std^2 + 1 / std^2 = 0, and with u = y - 1/3 it is y^3 + p y + q = 0, whose
    three roots are real; the greatest of them, by Viete's cosine, is the profile that leans to late times.
    """
    if not 0 < std <= MAX_STD:
        raise ValueError(f"got relative length {std} of an average, wanted above 0 and at most {MAX_STD:.4f}")
    p, q = -1 / 3 - std**-2, 2 / 27 + 4 / 3 * std**-2
    cosine = 1.5 * q / p * math.sqrt(-3 / p)
    return 2 * math.sqrt(-p / 3) * math.cos(math.acos(max(cosine, -1.0)) / 3) - 7 / 3


class PosthocEMA(WeightAverage):
    """An average with a power-function profile of relative length std: decay (1 - 1 / step)^(gamma + 1).

    The weights of step n weigh (n / t)^(gamma + 1) - ((n - 1) / t)^(gamma + 1) in it at step t: the profile's integral
    over (n - 1, n]. At step 1 it is the weights themselves.
    """

    def __init__(self, model: nn.Module, std: float):
        super().__init__(model)
        self.std, self.gamma = std, gamma_from_std(std)

    def decay(self, step: int) -> float:
        if step < 1:
            raise ValueError(f"got step {step} of an average, wanted 1 for the first")
        return (1 - 1 / step) ** (self.gamma + 1)


def snapshot_path(run: Path, step: int) -> Path:
    return run / "ema_profiles" / f"step_{step:08d}.safetensors"


def snapshot_steps(run: Path) -> list[int]:
    """Steps of which a run's profiles were kept, oldest first."""
    names = [f.stem.removeprefix("step_") for f in (run / "ema_profiles").glob("step_*.safetensors")]
    return sorted(int(name) for name in names if name.isdigit())


def drop_snapshots_after(run: Path, step: int) -> list[int]:
    """Deletes what lies after the checkpoint a run goes on from, and returns its steps."""
    dropped = [kept for kept in snapshot_steps(run) if kept > step]
    for kept in dropped:
        snapshot_path(run, kept).unlink()
    return dropped


def buffer_names(profiles: Mapping[str, PosthocEMA]) -> set[str]:
    """Names as in a snapshot of what the averages, by "<std>/<module>", copy and do not average."""
    return {f"{name}.{key}" for name, profile in profiles.items() for key, _ in profile.module.named_buffers()}


def save_snapshot(
    run: Path, step: int, tensors: Mapping[str, Tensor], *,
    copied: Collection[str] = (), dtype: torch.dtype = torch.float32,
) -> Path:  # fmt: skip
    """Keeps the tracked averages of a step: whole tensors on the CPU, by "<std>/<module>.<key of its state_dict>".

    Averaged ones are stored as `dtype`; those named in `copied` (see `buffer_names`), and whole numbers, as they are.
    The file appears at once and whole, and knows the CRC-32 of each tensor.
    """
    stored, places = {}, set()
    for key, value in tensors.items():
        value = value.detach().to(dtype if value.is_floating_point() and key not in copied else value.dtype)
        value = value.contiguous()
        stored[key] = value.clone() if value.untyped_storage().data_ptr() in places else value  # none may be shared
        places.add(stored[key].untyped_storage().data_ptr())
    checks = {key: crc32(value) for key, value in stored.items()}
    names = sorted(key for key, value in stored.items() if key in copied or not is_averageable(value))
    path = snapshot_path(run, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    for unfinished in path.parent.glob(".step_*"):  # left by a process that was killed while it saved
        unfinished.unlink()
    aside = path.with_name(f".{path.name}.new")
    try:
        with write_errors_as_oserror(aside):
            save_file(stored, aside, {"step": str(step), "copied": json.dumps(names), "crc32": json.dumps(checks)})
        fsync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)  # of a full disk
    fsync(path.parent)
    return path


def is_averageable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def crc32(tensor: Tensor) -> int:
    """Of a contiguous tensor's bytes."""
    return zlib.crc32(tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy())


class EMASnapshot:
    """An open snapshot; every tensor read from it is checked."""

    def __init__(self, path: Path, file: safe_open):
        self.path, self.file = path, file
        try:
            about = file.metadata() or {}
            step, self.copied, self.checks = int(about["step"]), json.loads(about["copied"]), json.loads(about["crc32"])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is no snapshot of EMA profiles ({error!r}): move it elsewhere") from error
        if snapshot_path(path.parent.parent, step) != path:
            raise ValueError(f"{path} holds the profiles of step {step}: give it that name back, or delete it")
        if set(file.keys()) != set(self.checks):
            raise ValueError(f"{path} is damaged (its tensors are not those it lists): delete it and take another")

    def profiles(self, name: str) -> list[str]:
        """The prefixes "<std>/<module>." of the profiles there are of a module."""
        parts = [key.partition("/") for key in self.checks]
        return sorted({f"{std}/{name}." for std, _, rest in parts if rest.startswith(f"{name}.")})

    def keys(self, prefix: str) -> list[str]:
        return sorted(key.removeprefix(prefix) for key in self.checks if key.startswith(prefix))

    def read(self, key: str) -> Tensor:
        tensor = self.file.get_tensor(key)
        if crc32(tensor) != self.checks[key]:
            raise ValueError(f"{self.path} is damaged (the CRC-32 of {key} differs): delete it and take another")
        return tensor


@contextmanager
def open_snapshot(run: Path, step: int) -> Iterator[EMASnapshot]:
    """ValueError where a snapshot is cut short, or is none."""
    path = snapshot_path(run, step)
    try:
        with safe_open(path, framework="pt") as file:
            yield EMASnapshot(path, file)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and take another") from error


class ProfileFit(NamedTuple):
    """How tracked profiles combine into a wanted one."""

    shares: Tensor  # (P,) float64, of sum 1
    error: float  # norm of what the combination lacks, relative to that of the wanted profile


def inner_product(t_a: Tensor, gamma_a: Tensor, t_b: Tensor, gamma_b: Tensor) -> Tensor:
    """The integral of the product of two profiles, elementwise, float64.

    The product is not 0 up to the earlier time t, where it is (a + 1) (b + 1) tau^(a + b) / (t_a^(a + 1) t_b^(b + 1)).
    For t_a <= t_b the integral is (a + 1) (b + 1) / (a + b + 1) * (t_a / t_b)^b / t_b: the exponent is the later one's.
    """
    early, late = torch.minimum(t_a, t_b), torch.maximum(t_a, t_b)
    exponent = torch.where(t_a < t_b, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (early / late) ** exponent / late


def fit_profile(steps: Collection[float], stds: Collection[float], step: float, std: float) -> ProfileFit:
    """The combination of P profiles nearest to that of (step, std) in least squares (algorithm 3), shares of sum 1.

    The sum is ours: without it what is the same in all snapshots comes back too large or small, by 1 % for snapshots
    every eighth of the training. With a multiplier m the minimum of x' A x - 2 b' x under 1' x = 1 solves
    [A 1; 1' 0] [x; m] = [b; 1], here for profiles scaled to norm 1, d = diag(A)^(-1/2).
    """
    time = torch.tensor([*steps], dtype=torch.float64) / step  # (P,), the wanted one at 1
    gamma = torch.tensor([gamma_from_std(s) for s in stds], dtype=torch.float64)
    one, wanted = torch.ones(1, dtype=torch.float64), torch.tensor([gamma_from_std(std)], dtype=torch.float64)
    products = inner_product(time[:, None], gamma[:, None], time, gamma)  # (P, P)
    target, norm = inner_product(time, gamma, one, wanted), inner_product(one, wanted, one, wanted)  # (P,), (1,)
    scale = products.diagonal().rsqrt()
    system = torch.zeros(len(time) + 1, len(time) + 1, dtype=torch.float64)
    system[:-1, :-1] = scale[:, None] * products * scale
    system[-1, :-1] = system[:-1, -1] = scale
    shares = scale * torch.linalg.solve(system, torch.cat([scale * target, one]))[:-1]
    square = norm - 2 * shares @ target + shares @ products @ shares
    return ProfileFit(shares, (square / norm).clamp(min=0).sqrt().item())


def reconstruct_ema(run: Path, step: int | None, name: str, std: float) -> dict[str, Tensor]:
    """The state_dict of module `name` at a kept step (None: the newest), averaged over a relative length of `std`.

    Made of all snapshots up to that step, read one tensor at a time and summed in float64; buffers are the step's own.
    FileNotFoundError, ValueError where there is none, it is damaged or too few are kept for that length.
    """
    gamma_from_std(std)
    steps = [kept for kept in snapshot_steps(run) if step is None or kept <= step]
    if not snapshot_steps(run):
        raise FileNotFoundError(f"{run} kept no EMA profiles: train with --ema_profiles 0.05 0.1")
    if step is not None and step not in steps:
        there = ", ".join(map(str, snapshot_steps(run)))
        raise FileNotFoundError(f"{run} kept no EMA profiles of step {step}; there are {there}: name one of them")
    basis = []  # (step, prefix) of every profile to combine
    for kept in steps:
        with open_snapshot(run, kept) as snapshot:
            basis += [(kept, prefix) for prefix in snapshot.profiles(name)]
    stds = [float(prefix.partition("/")[0]) for _, prefix in basis]
    if not basis or basis[-1][0] != steps[-1]:
        raise ValueError(f"{snapshot_path(run, steps[-1])} has no profile of a module {name!r}: name one it has")
    shares, error = fit_profile([kept for kept, _ in basis], stds, steps[-1], std)
    if error > MAX_FIT_ERROR:
        raise ValueError(
            f"an average of relative length {std} at step {steps[-1]} cannot be made of lengths {sorted(set(stds))} "
            f"kept at {len(steps)} steps: the nearest profile is {error:.0%} off, wanted {MAX_FIT_ERROR:.0%}; take a "
            f"length between or nearer to those, or train with it in --ema_profiles, or keep them more often"
        )
    return combine(run, basis, shares)


def combine(run: Path, basis: list[tuple[int, str]], shares: Tensor) -> dict[str, Tensor]:
    """The weighted sum of profiles of one module, given by step and prefix, the last one's step being the wanted."""
    with open_snapshot(run, basis[-1][0]) as newest:
        prefix = basis[-1][1]
        keys = newest.keys(prefix)
        buffers = {key: newest.read(prefix + key) for key in keys if prefix + key in newest.copied}
    totals: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for (step, prefix), share in zip(basis, shares.tolist(), strict=True):
        if abs(share) < NEGLIGIBLE:
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
                totals[key].add_(tensor, alpha=share)
    for key, dtype in dtypes.items():
        totals[key] = totals[key].to(dtype)
    return {key: buffers[key] if key in buffers else totals[key] for key in keys}
