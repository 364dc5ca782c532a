"""A run is identified by what it learns, a results folder by what it measures: not by where and how it is counted."""

import os
import shutil
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments.get_samples import Config as SamplesRun
from helpers.tiny_runs import DDPM, VQGAN, call
from train.checkpoint import MANIFEST, checkpoint_path, saved_steps
from train.cli.parse import flag_names, to_dict
from train.cli.plugins import make_default_config
from train.config import CHANGEABLE, SecondStageConfig, TrainingConfig
from train.datasets import ArrayDataset, content_fingerprint, folder
from train.identity import comparison_identity, results_identity
from train.runs import (
    ResumePoint,
    initial_weights_provenance,
    open_run,
    read_continued_network,
    read_run,
    resumed_config,
    resumed_provenance,
    write_config,
)

OLD_DATA, NEW_DATA = "a" * 64, "b" * 64


def with_settings(config: Any, **settings: Any) -> Any:
    """The config with these flags, whichever groups they belong to."""
    groups = {field.name: getattr(config, field.name) for field in fields(config)}
    own = {name: {k: v for k, v in settings.items() if k in flag_names(group)} for name, group in groups.items()}
    return replace(config, **{name: replace(group, **own[name]) for name, group in groups.items()})


@pytest.fixture
def ddpm() -> SecondStageConfig:
    return make_default_config(SecondStageConfig, {"sampler": "ddpm", "dataset": "digits"}).config


def resume(run, there, now, step=400, origin=None, **old_origin):
    """The content of config.yaml after resuming at `step` a run that was started as `there`."""
    old = to_dict(there) | {"origin": {"data_fingerprint": OLD_DATA} | old_origin}
    content = to_dict(now) | {"origin": {"data_fingerprint": OLD_DATA} | (origin or {})}
    return resumed_config(ResumePoint(run, step), old, content)


ELSEWHERE = {"data_dir": "/d/", "steps_per_ema_snapshot": 7, "ae_load_dir": "moved", "load_dir": "moved"}
PICTURES = {"solver": "ddim", "sample_steps": 3, "guidance": 2.0, "eta": 0.5, "clip": False}


@pytest.mark.parametrize("settings", [ELSEWHERE, PICTURES])
def test_places_and_pictures_are_not_of_a_run(ddpm, tmp_path, settings):
    resume(tmp_path, with_settings(ddpm, data_dir="/d"), with_settings(ddpm, **settings))


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"seed": 1}, {"channels": 8}, {"horizontal_flip": True}])
def test_what_is_learned_is_of_a_run(ddpm, tmp_path, settings):
    (name,) = settings
    with pytest.raises(
        ValueError, match=f"holds another run .--(no_)?{name}.* -> .*: pass the values there .--log_"
    ) as e:
        resume(tmp_path, ddpm, with_settings(ddpm, **settings))
    assert f"--resume {checkpoint_path(tmp_path, 400)} --log_dir NEW" in str(e.value) and "--change" not in str(e.value)
    partial = f"--load_dir {tmp_path} --load_partial --log_dir NEW"
    there = f"in a new folder with {partial} (if" if name == "channels" else f"(another network: {partial})"
    assert there in str(e.value)


def test_other_data_and_weights_make_another_run(ddpm, tmp_path):
    texts = {
        "data_fingerprint": "--data_dir: other images",
        "ae_weights": "--ae_load_dir: other weights",
        "load_weights": "other weights to start from",
        "some_hash": "some_hash: other content",
    }
    for name, text in texts.items():
        with pytest.raises(ValueError, match=f"holds another run .{text}.: ") as e:
            resume(tmp_path, ddpm, ddpm, origin={name: NEW_DATA}, **{name: OLD_DATA})
        assert "pass the same data and weights, or keep" in str(e.value) and "values there" not in str(e.value)
    images = {"data_fingerprint": OLD_DATA, "training_images": 1203}
    with pytest.raises(ValueError, match="run .--data_dir: other images .1,203 -> 1,180..: pass the same data"):
        resume(tmp_path, ddpm, ddpm, origin={"data_fingerprint": NEW_DATA, "training_images": 1180}, **images)
    resume(tmp_path, ddpm, ddpm, origin={"training_images": 1180}, **images)  # the same data, counted otherwise
    with pytest.raises(ValueError, match="pass the values there with the same data and weights .--log_dir alone"):
        resume(tmp_path, ddpm, with_settings(ddpm, seed=1), origin={"load_weights": NEW_DATA})


def test_a_refusal_lists_five_settings_as_they_are_typed(ddpm, tmp_path):
    five = {"channel_mults": (1, 2), "img_width": 64, "lr": 1e-3, "lr_schedule": "cosine", "batch_size": 2}
    with pytest.raises(ValueError, match="holds another run") as e:
        resume(tmp_path, ddpm, with_settings(ddpm, **five, seed=3, ema=False))
    assert "(--channel_mults 1 2 2 2 -> 1 2, --img_width not set -> 64, --batch_size 20 -> 2, --lr " in str(e.value)
    assert "--lr 0.0001 -> 0.001, --lr_schedule constant -> cosine and 2 more): " in str(e.value)
    with pytest.raises(ValueError, match=".--ema -> --no_ema.: "):
        resume(tmp_path, ddpm, with_settings(ddpm, ema=False))


def test_facts_about_the_data_are_not_listed_in_full(ddpm, tmp_path):
    old, new = {"class_frequencies": [0.5] * 1000}, {"class_frequencies": [0.25] * 1000}
    with pytest.raises(ValueError, match="run .other class frequencies.: "):
        resume(tmp_path, ddpm, ddpm, origin=new, **old)
    with pytest.raises(ValueError, match="run .--data_dir: other images.: "):
        resume(tmp_path, ddpm, ddpm, origin=new | {"data_fingerprint": NEW_DATA}, **old)


def test_a_changed_accumulate_is_noted_with_its_step(ddpm, tmp_path, capsys):
    content = resume(tmp_path, ddpm, with_settings(ddpm, accumulate=4))
    assert content["changes"] == {400: {"accumulate": [1, 4]}} and content["training"]["accumulate"] == 4
    assert "accumulate: 1 until step 400, 4 from there on" in capsys.readouterr().out
    again = to_dict(with_settings(ddpm, accumulate=2)) | {"origin": content["origin"]}
    write_config(tmp_path, resumed_config(ResumePoint(tmp_path, 500), content, again))
    assert read_run(tmp_path)["changes"] == {400: {"accumulate": [1, 4]}, 500: {"accumulate": [4, 2]}}


def test_changes_are_noted_from_the_first_value_to_the_newest(ddpm, tmp_path):
    """What was in force between two steps of the note is what the weights have seen."""
    content, notes = to_dict(ddpm) | {"origin": {}}, []
    for step, accumulate in ((400, 2), (400, 4), (500, 8), (300, 8), (300, 1)):
        now = to_dict(with_settings(ddpm, accumulate=accumulate)) | {"origin": {}}
        content = resumed_config(ResumePoint(tmp_path, step), content, now)
        notes.append({at: note["accumulate"] for at, note in content.get("changes", {}).items()})
    assert notes == [{400: [1, 2]}, {400: [1, 4]}, {400: [1, 4], 500: [4, 8]}, {300: [1, 8]}, {}]


def test_change_takes_new_settings_in_place(ddpm, tmp_path):
    smaller = with_settings(ddpm, lr=1e-5, amp=False)
    with pytest.raises(ValueError, match="--lr 0.0001 -> 1e-05.*the new ones: here with --change lr amp,") as e:
        resume(tmp_path, ddpm, smaller)
    assert "--load_partial" not in str(e.value)  # the same network
    with pytest.raises(ValueError, match="run .--lr 0.0001 -> 1e-05.: .* --change lr amp,"):
        resume(tmp_path, ddpm, with_settings(smaller, change=("amp",)))
    content = resume(tmp_path, ddpm, with_settings(smaller, change=("lr", "amp")))
    assert content["changes"] == {400: {"amp": [True, False], "lr": [1e-4, 1e-5]}}
    assert {*CHANGEABLE} < flag_names(ddpm.training)


def test_old_runs_note_the_data_that_they_find(ddpm, tmp_path, capsys):
    moved = with_settings(ddpm, data_dir="/new")
    content = to_dict(with_settings(ddpm, data_dir="/old")) | {"origin": {}}
    for _ in range(2):
        now = to_dict(moved) | {"origin": {"data_fingerprint": NEW_DATA}}
        content = resumed_config(ResumePoint(tmp_path, 4), content, now)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "had no fingerprint of its data" in lines[0]
    assert "--data_dir /old -> /new" in lines[0]


@pytest.mark.parametrize(
    ("schedule", "step", "length", "accepted"),
    [
        ("constant", 900, 2000, True),
        ("constant", 900, 800, False),  # it has taken more steps
        ("decay_tail", 800, 2000, True),  # of 1000, with a tail of 200
        ("decay_tail", 801, 2000, False),
        ("decay_tail", 500, 700, True),  # the tail begins early
        ("decay_tail", 500, 699, False),
        ("cosine", 100, 2000, True),  # still in the warm-up
        ("cosine", 101, 2000, False),
    ],
)
def test_a_run_changes_its_length_before_its_decay(ddpm, tmp_path, schedule, step, length, accepted):
    there = with_settings(ddpm, train_steps=1000, lr_schedule=schedule, decay_steps=200, warmup_iters=100)
    if accepted:
        resume(tmp_path, there, with_settings(there, train_steps=length), step=step)
    else:
        with pytest.raises(ValueError, match=f"--train_steps 1000 -> {length}"):
            resume(tmp_path, there, with_settings(there, train_steps=length), step=step)


def test_what_a_space_measured_comes_from_the_resumed_run(tmp_path):
    """Such as the scale of latents: a branch keeps its source's, and a folder without a checkpoint has none."""
    source, new = tmp_path / "source", tmp_path / "new"
    for run in (source, new):
        write_config(run, {"origin": {"latent_scale": 2.0}})
    checkpoint_path(source, 4).mkdir(parents=True)
    (checkpoint_path(source, 4) / MANIFEST).touch()
    assert resumed_provenance(source, "auto") == {"latent_scale": 2.0}
    assert resumed_provenance(new, str(checkpoint_path(source, 4))) == {"latent_scale": 2.0}
    assert resumed_provenance(new, "auto") == resumed_provenance(new, "never") == {}
    with pytest.raises(FileNotFoundError, match="got --resume /nowhere, wanted"):
        resumed_provenance(new, "/nowhere")


def test_a_config_without_a_group_of_settings_is_read(tmp_path):
    write_config(tmp_path, {"origin": {"load_weights": OLD_DATA}})
    assert initial_weights_provenance(tmp_path, TrainingConfig(), "logs") == {"load_weights": OLD_DATA}
    checkpoint_path(tmp_path / "other", 4).mkdir(parents=True)
    (checkpoint_path(tmp_path / "other", 4) / MANIFEST).touch()
    write_config(tmp_path / "other", {"network": {"quantizer": "l2"}})
    assert read_continued_network(tmp_path, TrainingConfig(load_dir="other"), str(tmp_path), "l2") == {}


# results folders


@pytest.fixture
def samples() -> SamplesRun:
    return make_default_config(SamplesRun, {"sampler": "absorbing", "dataset": "digits"}).config


def test_sampling_settings_are_of_results_but_not_batch_size(samples, tmp_path):
    open_run(tmp_path, samples, {}, results_identity)
    (tmp_path / "samples.npz").touch()
    same = {"load_dir": "absorbing_digits", "allow": ("my.Class",), "device": "cpu"}
    same |= {"lora": ("style.safetensors",), "textual_inversion": ("toy.pt",)}  # by their content
    output = replace(samples.output, batch_size=7)
    moved = replace(with_settings(samples, **same), output=output)
    open_run(tmp_path, moved, {}, results_identity)
    for settings in ({"guidance": 2.0}, {"n_samples": 3}, {"ema": False}):
        with pytest.raises(ValueError, match=f"{[*settings][0]}.* -> .*: pass another --log_dir, or"):
            open_run(tmp_path, with_settings(samples, **settings), {}, results_identity)


def test_moved_data_of_results_are_known_by_content(samples, tmp_path):
    open_run(tmp_path, samples, {"data_fingerprint": OLD_DATA}, results_identity)
    (tmp_path / "samples.npz").touch()
    moved = replace(samples, model=replace(samples.model, data_dir="/new"))
    open_run(tmp_path, moved, {"data_fingerprint": OLD_DATA}, results_identity)
    with pytest.raises(ValueError, match="--data_dir: other images"):
        open_run(tmp_path, moved, {"data_fingerprint": NEW_DATA}, results_identity)
    with pytest.raises(ValueError, match="--data_dir /new -> not set"):  # unknown content: the place counts
        open_run(tmp_path, samples, {}, results_identity)


def test_a_results_folder_without_results_takes_settings(samples, tmp_path):
    open_run(tmp_path, samples, {}, results_identity)
    open_run(tmp_path, with_settings(samples, guidance=2.0), {}, results_identity)
    (tmp_path / "config.yaml").rename(tmp_path / "notes.txt")  # a folder of other files
    open_run(tmp_path, samples, {}, results_identity)


def test_training_into_a_results_folder_is_refused(samples, tmp_path, capfd):
    open_run(tmp_path / "results", samples, {}, results_identity)
    before = (tmp_path / "results" / "config.yaml").read_text()
    with pytest.raises(SystemExit):
        call("train_sampler.py", f"--logs_root {tmp_path} --log_dir results --train_steps 1 {DDPM}")
    assert "holds results: pass another --log_dir" in capfd.readouterr().err
    assert (tmp_path / "results" / "config.yaml").read_text() == before


def test_a_comparison_is_known_by_its_training_and_sampling(ddpm, tmp_path):
    """Folders of earlier versions have a fingerprint with modification times instead of the one of the content."""
    write_config(tmp_path, to_dict(ddpm) | {"origin": {"images": OLD_DATA}})
    (tmp_path / "results.json").touch()
    moved = with_settings(ddpm, device="cpu", num_workers=3)
    open_run(tmp_path, moved, {"data_fingerprint": NEW_DATA}, comparison_identity)
    for settings in ({"sample_steps": 7}, {"guidance": 2.0}, {"lr": 1.0}):
        with pytest.raises(ValueError, match=f"--{[*settings][0]} .* -> "):
            open_run(tmp_path, with_settings(ddpm, **settings), {}, comparison_identity)
    with pytest.raises(ValueError, match="other images"):
        open_run(tmp_path, ddpm, {"data_fingerprint": OLD_DATA}, comparison_identity)


# the content of data


def test_a_copy_without_times_has_the_same_content(tmp_path):
    for i in range(4):
        (tmp_path / "here").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "here" / f"{i}.png")
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    for path in (tmp_path / "there").iterdir():
        os.utime(path, (0, 0))
    here, there = (folder.build(folder.Config(data_dir=f"{tmp_path}/{name}"), "train") for name in ("here", "there"))
    assert content_fingerprint(here) == content_fingerprint(there) and here.fingerprint() != there.fingerprint()
    (tmp_path / "there" / there.names[0]).write_bytes(b"another size")
    assert content_fingerprint(here) != content_fingerprint(there)


def test_data_without_files_are_known_by_their_fingerprint():
    data = ArrayDataset(np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int64), 1)
    assert content_fingerprint(data) == data.fingerprint()


# what is checked before the folder is written, and what a folder without a checkpoint takes


STAGE_ONE = f"{VQGAN} --perceptual_net none"
LATE = [
    ("got eta 2.0", "train_sampler.py", f"{DDPM} --solver ddim --eta 2"),
    ("got 17 x 17 pixels", "train_sampler.py", f"{DDPM} --img_size 17"),
    ("--accumulate N", "train_sampler.py", f"{DDPM} --accumulate 3"),
    ("condition_image", "train_sampler.py", f"{DDPM} --conditions image"),
    ("unknown features", "train_sampler.py", f"{DDPM} --steps_per_FD 1 --FD_features nonsense"),
    ("got disc_layers 6", "train_vqgan.py", f"{STAGE_ONE} --disc_start_step 1 --disc_layers 6"),
]


def test_no_folder_is_left_by_settings_that_cannot_work(tmp_path, capfd):
    for message, script, flags in LATE:
        with pytest.raises(SystemExit) as stop:
            call(script, f"--logs_root {tmp_path} --log_dir run --train_steps 2 {flags}")
        assert stop.value.code == 2 and message in capfd.readouterr().err, flags
        assert not (tmp_path / "run").exists(), flags


def test_a_folder_without_a_checkpoint_takes_settings(tmp_path, capfd):
    flags = f"--logs_root {tmp_path} --log_dir run --train_steps 1 --steps_per_eval 0 {DDPM}"
    call("train_sampler.py", flags)
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if it had ended before the first one
    call("train_sampler.py", f"{flags} --lr 0.01 --seed 3")
    assert saved_steps(tmp_path / "run") == [1]
    with pytest.raises(SystemExit):
        call("train_sampler.py", f"{flags} --lr 0.001")
    assert "--lr 0.01 -> 0.001" in capfd.readouterr().err


def test_a_second_start_leaves_config_yaml_byte_for_byte(samples, tmp_path):
    origin = {"sampler_weights": "a", "ae_weights": "b", "data_fingerprint": OLD_DATA}
    open_run(tmp_path, samples, origin, results_identity)
    (tmp_path / "samples.npz").touch()
    first = (tmp_path / "config.yaml").read_bytes()
    open_run(tmp_path, samples, origin, results_identity)
    assert (tmp_path / "config.yaml").read_bytes() == first
