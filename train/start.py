"""The start of a training: what is trained and on what, when it will end, and what suits the machine better."""

import shlex
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime, timedelta
from pathlib import Path

import torch
from torch import nn

from models.experts import experts_of
from train.cli.files import read_config, resolve_data_dir
from train.cli.parse import Source
from train.config import ROOT, DataConfig, TrainingConfig
from train.datasets import DatasetConfig, folder
from train.distributed import DistContext
from train.execution import training_dtype
from train.loop import Outputs, Timer, TrainState
from train.progress import format_duration, print_above
from train.runs import resumed_run

PRESET = "photos_laptop"  # in configs/: trains within an hour on a CPU
MEASURED_STEPS, MEASURED_SECONDS = 20, 30.0  # of which the first that is reached gives the time per step
STEP_PHASES = ("data", "step", "ema", "hooks", "logging")  # what a `Timer` counts at every step
NAMED_CLASSES = 20  # at most
DAY = 24 * 3600.0  # settings with which a training takes longer than this on a CPU are meant for a GPU


def check_warmup(run: Path, training: TrainingConfig, source: Source) -> None:
    """Raises ValueError for a new run of which more than a quarter would be a warm-up that no flag and no file set."""
    steps, warmup = training.train_steps, training.warmup_iters
    if source == "default" and 4 * warmup > steps and resumed_run(run, training.resume) is None:
        raise ValueError(
            f"the learning rate would rise for {warmup:,} steps (the default of --warmup_iters), more than a quarter "
            f"of --train_steps {steps}: pass --warmup_iters {steps // 20}"
        )


def print_start(
    state: TrainState,
    training: TrainingConfig,
    world: DistContext,
    model: str,
    images: int,
    class_names: Sequence[str] = (),
) -> None:
    """Prints the classes, the device, the sizes of the `model`, and the length of the training (main process only)."""
    if not world.is_main:
        return
    dtype = training_dtype(training, world.device)
    precision = str(dtype).removeprefix("torch.")
    if training.amp and dtype == torch.float32:
        precision += f": {world.device} has no native half precision"
    sizes = [f"{name} {sum(p.numel() for p in module.parameters()):,}" for name, module in state.modules.items()]
    epochs = training.train_steps * training.batch_size / images
    if class_names:
        more = ["..."] if len(class_names) > NAMED_CLASSES else []
        print(f"classes: {', '.join([*class_names[:NAMED_CLASSES], *more])}")
    print(f"device: {describe_device(world)}, {precision}")
    print(f"model: {model}; parameters: {', '.join(sizes)}")
    for line in filter(None, (describe_experts(each, dtype) for each in state.modules.values())):
        print(line)
    print(f"steps: {training.train_steps:,} of {training.batch_size} images, {epochs:,.1f} epochs", flush=True)


def describe_experts(network: nn.Module, dtype: torch.dtype) -> str:
    """Returns how many experts a network has, and how their products are computed in this dtype; "" without any."""
    layers = [*experts_of(network).values()]
    if not layers:
        return ""
    device = layers[0].contract.bias.device
    with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype):
        ways = Counter(each.products(torch.empty(0, each.contract.bias.shape[1], device=device)) for each in layers)
    words = {"grouped": "in one grouped product", "loop": "in a loop"}
    counts = ", ".join(f"{count} {words[way]}" for way, count in sorted(ways.items()))
    return f"experts: {layers[0].router.count} in each of {len(layers)} layers, computed {counts}"


def describe_device(world: DistContext) -> str:
    """Returns the device of a process, such as "cpu (2 threads)", and the number of processes if there are several."""
    device = f"{world.device} ({torch.get_num_threads()} threads)"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    return device if world.size == 1 else f"{world.size} processes, {device}"


class DurationEstimate:
    """A hook for `fit` that prints, once, the time per step and when the training will end.

    `timer` is that of `fit`: validation and pictures, which are rare, do not count. If a new training on a CPU would
    take more than a day, it also prints the flags for the same data that suit a CPU. `section` is that of the script in
    a preset, and `note` is added to the estimate.
    """

    def __init__(
        self,
        training: TrainingConfig,
        data: DataConfig,
        reader: DatasetConfig,
        world: DistContext,
        timer: Timer,
        section: str,
        note: str = "",
    ):
        self.steps, self.data, self.reader, self.world = training.train_steps, data, reader, world
        self.timer, self.section, self.note = timer, section, note
        self.first: tuple[int, float] | None = None  # the first step, which is slower than others, and its end
        self.done = not world.is_main

    def __call__(self, state: TrainState, outputs: Outputs) -> None:
        if self.done:
            return
        now = sum(self.timer.seconds[phase] for phase in STEP_PHASES)
        self.first = self.first or (state.step, now)
        steps, seconds = state.step - self.first[0], now - self.first[1]
        if steps < 1 or (steps < MEASURED_STEPS and seconds < MEASURED_SECONDS):
            return
        self.done, left = True, self.steps - state.step
        if left == 0:
            return
        rest = left * seconds / steps
        end = f", until {datetime.now() + timedelta(seconds=rest):%H:%M}" if rest < DAY else ""
        takes = f"the other {left:,} take about {format_duration(rest)}"
        lines = [f"{seconds / steps:.3g} seconds a step: {takes}{end}, plus validation and pictures{self.note}"]
        if rest > DAY and self.first[0] == 1 and self.world.device.type == "cpu":
            flags = preset_flags(self.section, self.data, self.reader)
            advice = f"these settings are meant for a GPU: here train with {flags} (configs/{PRESET}.yaml)"
            lines += [] if flags is None else [advice]
        print_above("\n".join(lines))


def preset_flags(section: str, data: DataConfig, reader: DatasetConfig) -> str | None:
    """Returns the flags with which `PRESET` trains on the same images, with or without classes as now.

    None if it cannot: it is in use, has no section of this name, or is for images that are read in another way.
    """
    preset = read_config(ROOT / "configs" / f"{PRESET}.yaml")
    if data.dataset == PRESET or section not in preset or not isinstance(reader, folder.Config):
        return None
    flags = [] if section == "vqgan" else [f"--sampler {section}"]
    path = resolve_data_dir(data.dataset, reader.data_dir)
    flags += [f"--dataset {PRESET}", *([] if path is None else [f"--data_dir {shlex.quote(path)}"])]
    if reader.label_from == "none":
        flags += ["--label_from none", *([] if section == "vqgan" else ["--guidance 1"])]
    return " ".join(flags)
