"""--condition_image from training to samples: hints of held-out items and of pictures, on pixels, latents and codes."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from experiments.harness.source_images import open_source_images
from helpers import tiny_regions
from helpers.tiny_runs import DDPM, SAMPLER, call, parse_config
from models.conditions.image import ImageEncoder
from train.config import FineTuningConfig, TrainingConfig
from train.data.hints import HintMaker, HintsConfig
from train.data.transforms import to_float, to_item
from train.finetuning import find_base
from train.inference import load
from train.runs import read_run
from train.sampler_loading import read_stored_config

HINTED = f"{DDPM} --conditions image --condition_image edges --edge_thresholds 0.05 0.1 --edge_sigma 0.5 --no_amp"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with a run on 8x8 digits that is conditioned on their edges."""
    logs = tmp_path_factory.mktemp("hinted")
    call("train_sampler.py", f"{HINTED} --logs_root {logs} --train_steps 2 --log_dir edges --no_class_conditional")
    return logs


def seen_images(monkeypatch):
    """A list to which the raw condition images are appended."""
    seen, forward = [], ImageEncoder.forward

    def record(self, raw, x, drop=None):
        seen.append(raw)
        return forward(self, raw, x, drop)

    monkeypatch.setattr(ImageEncoder, "forward", record)
    return seen


def test_the_channels_of_the_hint_are_those_of_the_condition(logs):
    content = read_run(logs / "edges")
    assert content["sampler"]["condition_channels"] == 1
    assert content["hints"] == {
        **{"condition_image": "edges", "edge_sigma": 0.5, "edge_thresholds": [0.05, 0.1], "small_factor": 4}
    }


def test_samples_have_the_hints_of_held_out_items(logs, monkeypatch):
    seen = seen_images(monkeypatch)
    flags = "--load_dir edges --n_samples 3 --sample_steps 2 --no_amp --log_dir samples --save_individually"
    call("experiments/get_samples.py", f"--logs_root {logs} {flags} --save_held_out")
    model = load(logs / "edges", device="cpu", amp=False).model
    with np.load(logs / "samples" / "samples.npz") as arrays:
        held_out = arrays["held_out"].tolist()
    items = [to_item(model.dataset("val")[i], (8, 8), 1) for i in held_out]
    hints = [HintMaker("edges", model.hints)(item).as_subclass(torch.Tensor) for item in items]
    assert torch.equal([raw for raw in seen if raw is not None][-1], to_float(torch.stack(hints)))
    assert len(torch.stack(hints).unique(dim=0)) == 3
    for number, (item, hint) in enumerate(zip(items, hints, strict=True)):
        for folder, image in (("held_out", item["image"]), ("condition_image", hint)):
            picture = np.asarray(Image.open(logs / "samples" / folder / f"{number:06d}.png"))
            assert np.array_equal(picture[..., 0], image[0])
    with pytest.raises(SystemExit):
        call(
            "experiments/get_samples.py",
            f"--logs_root {logs} {flags.removesuffix('--save_individually')} --save_held_out",
        )


def test_rows_name_pictures_that_hints_are_made_of(logs, tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, 8:] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text(json.dumps([{"source_image": "a.png"}]))
    model = load(logs / "edges", device="cpu", amp=False).model
    (row,) = model.read_rows(str(tmp_path / "rows.json"))
    assert row.keys() == {"condition_image"} and row["condition_image"].shape == (1, 8, 8)
    assert (row["condition_image"][0, 1:-1, 2:6] > 0).any(1).all() and not row["condition_image"][..., (0, 7)].any()
    (tmp_path / "ready.json").write_text(json.dumps([{"condition_image": "a.png"}]))
    (row,) = model.read_rows(str(tmp_path / "ready.json"))  # a hint itself, of the channels of the condition
    assert row["condition_image"].shape == (1, 8, 8) and row["condition_image"][..., 5:].min() > 250
    (tmp_path / "both.json").write_text(json.dumps([{"condition_image": "a.png", "source_image": "a.png"}]))
    with pytest.raises(ValueError, match="a source_image and a condition_image: pass the condition_image alone"):
        model.read_rows(str(tmp_path / "both.json"))


def test_a_run_that_starts_from_it_has_the_same_hints(logs, monkeypatch):
    flags = f"--logs_root {logs} --load_dir edges"
    config = parse_config("train_sampler.py", f"{flags} --log_dir tuned", monkeypatch)
    assert (config["condition_image"], config["edge_sigma"], config["conditions"]) == ("edges", 0.5, ["image"])
    config = parse_config("train_sampler.py", f"{flags} --log_dir tuned --edge_sigma 1.5", monkeypatch)
    assert config["edge_sigma"] == 1.5
    resumed = parse_config("train_sampler.py", f"--logs_root {logs} --log_dir edges", monkeypatch)
    assert resumed["edge_thresholds"] == [0.05, 0.1]


def test_a_branch_beside_locked_hints_has_their_options(logs, tmp_path):
    """One setting is read by both: the base, which stays as it is, would read other hints than it was trained with."""
    training, control = TrainingConfig(load_dir="edges"), FineTuningConfig(control="edges")
    own = {"condition_image": "edges", "edge_sigma": 0.5, "edge_thresholds": (0.05, 0.1)}
    find = partial(find_base, tmp_path, training, control, str(logs))
    for same in (own, own | {"small_factor": 2}, own | {"condition_image": "", "edge_sigma": 2.0}):
        assert find(HintsConfig(**same)).run == logs / "edges"  # the base reads no small_factor, or hints of its items
    for name, value in {"condition_image": "grey", "edge_sigma": 2.0, "edge_thresholds": (0.02, 0.1)}.items():
        with pytest.raises(ValueError, match=f"got {name} .* beside .*/edges, whose condition_image.*leave --{name}"):
            find(HintsConfig(**own | {name: value}))
    other = HintsConfig(**own | {"edge_sigma": 2.0})
    assert find_base(tmp_path, training, replace(control, control_lock=False), str(logs), other).run == logs / "edges"
    assert find_base(tmp_path, training, FineTuningConfig(lora_rank=2), str(logs), other).run == logs / "edges"


def test_the_command_refuses_other_hints_in_a_line(logs, capfd):
    with pytest.raises(SystemExit) as stop:
        call("train_sampler.py", f"--logs_root {logs} --load_dir edges --control edges --edge_sigma 2 --log_dir new")
    assert stop.value.code == 2 and not (logs / "new").exists()
    assert "got edge_sigma 2.0 beside" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--condition_image edges", "got condition_image edges, which no condition reads: pass --conditions image"),
        ("--conditions image --condition_image grey --condition_channels 2", "which has 1: leave --condition_channels"),
        ("--conditions image --condition_image image", "the items have no source_image.*pairs"),
        ("--conditions image --condition_image small --small_factor 3", "small_factor 3 for images of 8x8.*divisor"),
    ],
)
def test_hints_that_do_not_fit_are_refused_in_a_line(flags, message, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        call("train_sampler.py", f"{DDPM} --logs_root {tmp_path} --no_amp --train_steps 1 {flags} --log_dir new")
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and not (tmp_path / "new").exists()
    assert re.search(message, error), error


@pytest.mark.parametrize("space", ["latents", pytest.param("codes", marks=pytest.mark.slow)])
def test_hints_come_with_latents_and_codes(space, trained, tmp_path, monkeypatch):
    """The condition of a batch of cached latents or codes is resized to their grid."""
    seen = seen_images(monkeypatch)
    latents = f"{DDPM.replace('--img_size 8', '--img_size 16')} --cache_latents --ae_load_dir {trained}/vqgan_digits"
    codes = f"{SAMPLER} --dataset digits --ae_load_dir {trained}/vqgan_digits"
    flags = "--conditions image --condition_image small --small_factor 2 --no_amp --train_steps 2 --num_workers 0"
    run = f"{latents if space == 'latents' else codes} {flags}"
    call("train_sampler.py", f"{run} --logs_root {tmp_path} --log_dir hinted --steps_per_eval 1")
    assert {tuple(raw.shape[1:]) for raw in seen if raw is not None} == {(1, 16, 16)}
    call("experiments/get_samples.py", f"--logs_root {tmp_path} --load_dir hinted --n_samples 2 --no_amp --log_dir s")
    assert (tmp_path / "s" / "samples.png").is_file()


@pytest.mark.slow
def test_pairs_train_from_their_source_images(tmp_path, monkeypatch):
    seen = seen_images(monkeypatch)
    tiny_regions.save_pairs(tmp_path / "data")
    flags = f"{DDPM} --dataset pairs --data_dir {tmp_path}/data --conditions image --condition_image image --no_amp"
    call("train_sampler.py", f"{flags} --logs_root {tmp_path} --train_steps 2 --horizontal_flip --log_dir paired")
    content = yaml.safe_load(Path(tmp_path, "paired", "config.yaml").read_text())
    assert content["sampler"]["condition_channels"] == 3 and {raw.shape[1] for raw in seen if raw is not None} == {3}


def test_a_source_picture_becomes_the_hint(logs, tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, 8:] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    model = load(logs / "edges", device="cpu", amp=False).model
    (row,) = open_source_images(str(tmp_path / "a.png"), model, read_stored_config(model.run).sampling).rows
    image = to_item({"image": Image.open(tmp_path / "a.png")}, (8, 8), 1)["image"]
    assert torch.equal(row["condition_image"], HintMaker("edges", model.hints)({"image": image}))
    assert {*row["condition_image"].unique().tolist()} == {0, 255}
