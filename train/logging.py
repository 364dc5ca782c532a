"""Logging from the main process: TensorBoard, metrics.jsonl, progress, PNG image grids, and a service of --logger."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from train.data.transforms import to_picture, to_uint8
from train.datasets._channels import PICTURES
from train.distance_config import is_distance
from train.distributed import DistContext, is_sharded
from train.files import fsync, parse_json, write_text
from train.loggers import MetricWriter
from train.loop import Outputs, TrainState
from train.perf import PerfMonitor
from train.progress import Progress

OPTIMIZATION = ("lr", "grad_norm", "disc_grad_norm", "skipped_steps", "ema_distance")

CAPTION_HEIGHT = 15  # pixels


def grid_image(
    images: Tensor, columns: int | None = None, enlarge_to: int = 64, captions: Sequence[str] = ()
) -> Image.Image:
    """Returns a grid of uint8 images (B, C, H, W) in reading order, two pixels apart; enlarges small ones by an
    integer. The channels of other images than grey and RGB stand side by side, the images further apart. Captions
    stand above the first images; rows without any take no room for them."""
    B, C, H, W = images.shape
    panels, gap = (1, 2) if C in PICTURES else (C, 8)
    columns = columns or math.ceil(math.sqrt(B / panels))
    scale = max(1, enlarge_to // max(H, W))
    images = to_picture(images.repeat_interleave(scale, 2).repeat_interleave(scale, 3).cpu())
    H, W, rows = H * scale + gap, images.shape[3] + gap, math.ceil(B / columns)
    captioned = math.ceil(len(captions) / columns)  # rows
    tops = [row * H + gap + CAPTION_HEIGHT * min(row + 1, captioned) for row in range(rows + 1)]
    canvas = torch.full((3, tops[-1], columns * W + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = tops[i // columns], i % columns * W + gap
        canvas[:, top : top + H - gap, left : left + W - gap] = image
    picture = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    for i, caption in enumerate(captions):
        draw_caption(picture, caption, (i % columns * W + gap, tops[i // columns] - CAPTION_HEIGHT), W - gap)
    return picture


def draw_caption(picture: Image.Image, text: str, place: tuple[int, int], width: int) -> None:
    """Writes text at (left, top), shortened to a width in pixels."""
    font = ImageFont.load_default(size=11)
    shown = text
    while shown and font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text.rstrip()}…"
    ImageDraw.Draw(picture).text(place, shown, "black", font)


def tensorboard_tag(name: str) -> str:
    """Returns the TensorBoard tag of a metric, in one of the groups train, val, codes, experts, optim and perf."""
    kind = name.partition("/")[0]
    if kind in ("val", "codes", "experts", "perf"):
        return name
    group = "val" if is_distance(kind) else "optim" if kind in OPTIMIZATION else "train"
    return f"{group}/{name}"


class Logger:
    """A hook for `fit` that averages the scalar outputs of steps and writes them every `every` steps.

    metrics.jsonl gets one JSON object per call of `log_scalars`, several at some steps; lines after step `start`, left
    by an interrupted run, are dropped. The running averages are part of the training state (`counters["metrics"]`), so
    that a resumed run writes the same lines. `latest` has the last value of each metric of this session; the progress
    bar shows those that `bar_metrics` maps its labels to. TensorBoard also gets, once in a run, its config.yaml and a
    layout with training and validation in one chart. `service` gets the curves and images of TensorBoard, too.
    """

    def __init__(
        self,
        folder: Path,
        world: DistContext,
        monitor: PerfMonitor,
        *,
        every: int,
        start: int,
        steps: int,
        bar_metrics: Mapping[str, str],
        service: MetricWriter | None = None,
    ):
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.world, self.monitor, self.every, self.steps = folder, world, monitor, every, steps
        self.last_read_step, self.bar_metrics, self.service = start, bar_metrics, service
        self.latest: dict[str, float] = {}
        if world.is_main:
            earlier = truncate_metrics(folder / "metrics.jsonl", start or -1)  # a run that starts anew has no step 0
            self.has_layout = any('"val/' in line for line in earlier)
            if start == 0:  # an attempt that ended before its first checkpoint is gone
                for path in folder.glob("events.out.tfevents.*"):
                    path.unlink()
            self.writer = SummaryWriter(str(folder), purge_step=start + 1)
            if start == 0:
                self.writer.add_text("config", f"```yaml\n{(folder / 'config.yaml').read_text()}```")
            self.progress = Progress(folder.name, steps, "step", initial=start)

    def __call__(self, state: TrainState, outputs: Outputs) -> None:
        means = state.counters["metrics"]
        for name, value in outputs.items():
            if value.ndim == 0 and name != "finite":
                value = value.detach().float()
                sum_and_count = torch.stack([value, torch.ones_like(value)])  # some metrics start later than others
                if "finite" in outputs:
                    sum_and_count = sum_and_count.where(outputs["finite"], 0)
                means.add(name, sum_and_count / self.world.size)
        if self.world.is_main:
            self.progress.update()
        if state.step % self.every and state.step != self.steps:
            return
        state.settle()
        values = read_means(means.reduce_and_reset())
        values |= {f"ema_distance/{name}": self.ema_distance(state, name) for name in state.averages}
        if state.bad_steps:
            values["skipped_steps"] = float(len(state.bad_steps))
        speed = self.monitor.read(state.step - self.last_read_step)
        self.last_read_step = state.step
        if self.world.is_main:
            self.log_scalars(state.step, values | speed)

    def ema_distance(self, state: TrainState, name: str) -> float:
        """Returns the distance between an EMA and its module, relative to the norm of the module."""
        norms = state.averages[name].squared_norms(state.modules[name])
        if is_sharded(state.modules[name]):
            norms = self.world.sum(norms)
        return (norms[0] / norms[1]).sqrt().item()

    def log_best(self, state: TrainState, name: str, value: float) -> None:
        """Updates the lowest value of a metric and its step in the state, and logs it as `<name>_best`.

        Step 0, the weights of another run, has no checkpoint and is not the best.
        """
        if state.step and value < state.best.get(name, (float("inf"), 0))[0]:
            state.best[name] = (value, state.step)
        if name in state.best:  # absent while all values are non-finite
            self.log_scalars(state.step, {f"{name}_best": state.best[name][0]})

    def log_scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes one line of metrics.jsonl and one point of each TensorBoard curve (main process only).

        Lowest values so far have no curve of their own.
        """
        if not self.world.is_main:
            return
        curves = {name: value for name, value in values.items() if not name.endswith("_best")}
        for name, value in curves.items():
            self.writer.add_scalar(tensorboard_tag(name), value, step)
        if self.service is not None and curves:
            self.service.log_scalars(step, {tensorboard_tag(name): value for name, value in curves.items()})
        validated = [name.removeprefix("val/") for name in curves if name.startswith("val/")]
        if validated and not self.has_layout:
            self.writer.add_custom_scalars({"training and validation": {name: compare(name) for name in validated}})
            self.has_layout = True
        self.latest |= curves
        self.progress.numbers = {
            label: self.latest[name] for label, name in self.bar_metrics.items() if name in self.latest
        }
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def log_images(
        self, name: str, step: int, images: Tensor, columns: int | None = None, captions: Sequence[str] = ()
    ) -> None:
        """Writes images (B, C, H, W) in [-1, 1] as a grid to images/ and to TensorBoard (main process only)."""
        if not self.world.is_main:
            return
        picture = grid_image(to_uint8(images), columns, captions=captions)
        path = self.folder / "images" / f"{name}_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        self.writer.add_image(f"val/{name}", np.asarray(picture), step, dataformats="HWC")
        if self.service is not None:
            self.service.log_image(step, f"val/{name}", picture)

    def log_histogram(self, name: str, step: int, counts: Tensor) -> None:
        """Writes counts (K,) of K categories as a TensorBoard histogram (main process only)."""
        if self.world.is_main:
            ids = torch.arange(len(counts), dtype=torch.float64)
            c = counts.double().cpu()
            self.writer.add_histogram_raw(
                name, min=0, max=len(counts) - 1, num=int(c.sum()), sum=float(c @ ids), sum_squares=float(c @ ids**2),
                bucket_limits=ids.tolist(), bucket_counts=c.tolist(), global_step=step,
            )  # fmt: skip

    def flush(self) -> None:
        """Flushes TensorBoard and metrics.jsonl to disk."""
        if self.world.is_main:
            self.writer.flush()
            if (self.folder / "metrics.jsonl").is_file():
                fsync(self.folder / "metrics.jsonl")

    def close(self) -> None:
        if self.world.is_main:
            self.progress.close()
            self.writer.close()
            if self.service is not None:
                self.service.close()


def read_means(sums: dict[str, Tensor]) -> dict[str, float]:
    """Returns the means of named sums and counts (2,), all in one copy from the device; without those of count 0."""
    if not sums:
        return {}
    totals, counts = torch.stack(list(sums.values()), 1)
    pairs = torch.stack([totals / counts, counts], 1).tolist()
    return {name: mean for name, (mean, count) in zip(sums, pairs, strict=True) if count}


def compare(name: str) -> list[str | list[str]]:
    """Returns a TensorBoard chart of a quantity in training and validation."""
    return ["Multiline", [f"(train|codes|val)/{re.escape(name)}$"]]


def truncate_metrics(path: Path, step: int) -> list[str]:
    """Drops the lines of metrics.jsonl after `step`, and from an incomplete or damaged line on; returns the others."""
    lines: list[str] = []
    if not path.is_file():
        return lines
    for line in path.read_text(errors="replace").splitlines():
        try:
            if parse_json(line)["step"] <= step:
                lines.append(line)
        except (ValueError, TypeError, LookupError):
            break
    write_text(path, "".join(f"{line}\n" for line in lines))
    return lines
