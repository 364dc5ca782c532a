"""The logged metrics, images and histograms are correct."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from train.distributed import DistContext
from train.logging import Logger, grid_image, truncate_metrics
from train.loop import RunningSums, Timer, TrainState
from train.perf import PerfMonitor

WORLD = DistContext(torch.device("cpu"))


def open_logger(folder: Path, start: int = 0) -> Logger:
    (folder / "config.yaml").write_text("data:\n  dataset: digits\n")
    meter = PerfMonitor(None, WORLD, Timer(), {"images": 2}, torch.float32)
    return Logger(
        folder, WORLD, meter, every=3, start=start, steps=4, bar_metrics={"loss": "loss", "usage": "codes/usage"}
    )


@pytest.fixture
def logger(tmp_path):
    logger = open_logger(tmp_path)
    yield logger
    logger.close()


def test_each_metric_is_averaged_over_its_own_steps(logger, tmp_path):
    steps = [{"loss": 1.0}, {"loss": 2.0}, {"loss": 6.0, "late": 5.0}, {"loss": 7.0}]
    counters = {"metrics": RunningSums(WORLD)}
    for number, metrics in enumerate(steps, 1):
        outputs = {name: torch.tensor(value) for name, value in metrics.items()} | {"losses": torch.ones(2)}
        logger(TrainState({}, {}, counters=counters, step=number), outputs)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]  # every third step, and the last
    assert (lines[0]["loss"], lines[0]["late"]) == (3.0, 5.0)
    assert lines[1]["loss"] == 7.0 and "late" not in lines[1]
    assert not any("losses" in line for line in lines)  # per-example outputs are for hooks
    assert lines[0]["perf/images_per_second"] == pytest.approx(2 * lines[0]["perf/steps_per_second"])


def test_a_grid_is_in_reading_order_and_enlarges_small_images():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 32, 32) * 10
    grid = grid_image(images, columns=3)
    assert grid.size == (3 * 66 + 2, 2 * 66 + 2)
    assert [grid.getpixel((34 + 66 * (i % 3), 34 + 66 * (i // 3)))[0] for i in range(6)] == [0, 10, 20, 30, 40, 50]
    assert grid.getpixel((0, 0)) == (255, 255, 255)


def test_captions_stand_above_their_images():
    images = torch.full((4, 1, 64, 64), 200, dtype=torch.uint8)
    plain = grid_image(images, columns=2)
    first_row, all_rows = (
        grid_image(images, columns=2, captions=["hat", "a long name of a class"] * n) for n in (1, 2)
    )
    assert [picture.size[1] - plain.size[1] for picture in (first_row, all_rows)] == [15, 30]
    for row, captions in enumerate((first_row, all_rows)):
        below = captions.crop((0, captions.height - 66, captions.width, captions.height))
        assert below.tobytes() == plain.crop((0, plain.height - 66, plain.width, plain.height)).tobytes()
        dark = torch.from_numpy(np.array(captions.convert("L"))) < 100
        assert dark.any(1).nonzero().max() < 2 + 15 + 66 * row + 15 * row  # text only above images,
        assert not dark[:, 66:68].any() and not dark[:, 132:].any() and dark[:, 68:132].any()  # within their width


def test_images_and_histograms_reach_tensorboard(logger, tmp_path):
    logger.log_images("samples", 3, torch.zeros(4, 3, 8, 8))
    logger.log_histogram("codes", 3, torch.tensor([1.0, 0.0, 2.0]))
    logger.writer.flush()
    assert (tmp_path / "images" / "samples_00000003.png").is_file()
    (events,) = tmp_path.glob("events.out.tfevents.*")
    assert b"samples" in events.read_bytes() and b"codes" in events.read_bytes()


def test_tensorboard_has_groups_a_layout_and_the_config_once(tmp_path):
    """Also after a restart at step 0 and a resume, which drops later curves."""
    metrics = {"loss": 1.0, "l1": 0.5, "lr": 1.0, "ema_distance/network": 1.0, "loss_by_level/0.2": 1.0}
    metrics |= {"perf/mfu": 1.0, "FD(digits)/9_samples": 1.0}
    validation = {"val/l1": 0.5, "val/l1_best": 0.5, "val/usage": 1.0}
    for start, steps in [(0, 1), (0, 4), (2, 4)]:
        logger = open_logger(tmp_path, start)
        for step in range(start + 1, steps + 1):
            logger.log_scalars(step, metrics)
            logger.log_scalars(step, {"codes/usage": 0.9} | validation)
        logger.log_images("samples", steps, torch.zeros(4, 3, 8, 8))
        numbers = logger.progress.numbers
        logger.close()
    assert numbers == {"loss": 1.0, "usage": 0.9}
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = {"train/loss", "train/l1", "optim/lr", "optim/ema_distance/network", "train/loss_by_level/0.2", "perf/mfu"}
    tags |= {"val/FD(digits)/9_samples", "val/l1", "val/usage", "codes/usage"}
    assert {*events.Tags()["scalars"]} == tags and events.Tags()["images"] == ["val/samples"]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    (config,), (layout,) = (events.Tensors(name) for name in ("config/text_summary", "custom_scalars__config__"))
    assert "dataset: digits" in config.tensor_proto.string_val[0].decode()
    (category,) = Layout.FromString(layout.tensor_proto.string_val[0]).category
    charts = {chart.title: re.compile(chart.multiline.tag[0]) for chart in category.chart}
    shown = {title: {tag for tag in tags if pattern.match(tag)} for title, pattern in charts.items()}
    assert shown == {"l1": {"train/l1", "val/l1"}, "usage": {"codes/usage", "val/usage"}}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {*rows[0]} == {"step", *metrics} and rows[1]["val/l1_best"] == 0.5  # names of the file are not changed


def test_a_truncated_line_ends_the_kept_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
