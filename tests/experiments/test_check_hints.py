"""The check of hints: with a sampler that draws the held-out images, and with hints of others."""

import json

import pytest
import torch

from experiments.check_hints import Images, compare_hints
from helpers.tiny_runs import DDPM, call
from train.data.hints import HintMaker
from train.data.transforms import as_uint8
from train.spaces import PixelSpace
from train.trained_sampler import TrainedSampler

LARGER = DDPM.replace("--img_size 8", "--img_size 16")  # in images of 8x8, all is near an edge
RUN = f"{LARGER} --dataset digits --no_amp --train_steps 1 --steps_per_eval 0"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with `base`, without hints, a control branch `control` beside it, and `image`, with a condition image."""
    logs = tmp_path_factory.mktemp("hints")
    for name, flags in (
        ("base", ""),
        ("control", "--load_dir base --control edges --hint_widths 4 6"),
        ("image", "--conditions image --condition_image grey"),
    ):
        call("train_sampler.py", f"--logs_root {logs} --log_dir {name} {RUN} {flags}")
    return logs


def check(logs, run, flags):
    command = f"--logs_root {logs} --sampler ddpm --load_dir {run} --no_amp --sample_steps 2 --log_dir of_{run} {flags}"
    call("experiments/check_hints.py", command)
    return json.loads((logs / f"of_{run}" / "results.json").read_text())


def test_samples_equal_to_the_held_out_images_follow_their_edges(logs, monkeypatch, capsys):
    def draw(model, indices, seed, options, conditions):
        source = PixelSpace(model.data).source(model.dataset("val"), "val", model.data, 0, model.world, model.adapt)
        offset = 0 if "hint_image" in conditions else 1  # the base draws the next image
        items = source[[(index + offset) % len(source) for index in indices]]
        assert "hint_image" not in conditions or torch.equal(items["hint_image"], conditions["hint_image"])
        return {"image": as_uint8(items["image"])}

    monkeypatch.setattr(TrainedSampler, "draw", draw)
    figures = check(logs, "control", "--n_samples 60 --batch_size 25 --base base")["figures"]
    perfect = {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert figures["samples"] == figures["real"] == perfect
    assert 0 < figures["base"]["f1"] < 0.9 and 0 < figures["others"]["f1"] < 0.9
    assert "samples without hints" in capsys.readouterr().out and (logs / "of_control/hints.png").stat().st_size


def test_a_real_sampler_of_condition_images_is_measured_in_db(logs):
    results = check(logs, "image", "--n_samples 6")
    assert results["kind"] == "grey" and {*results["figures"]} == {"samples", "real", "others"}
    assert results["figures"]["real"]["equal"] == 6  # PSNR of equal hints is infinite
    assert results["figures"]["samples"]["equal"] == 0 and results["figures"]["samples"]["psnr"] < 30


def test_models_without_a_hint_and_other_sizes_are_refused(logs, capsys):
    with pytest.raises(SystemExit) as error:
        check(logs, "base", "")
    assert error.value.code == 2 and "has 0 kinds of hints, wanted one kind" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        check(logs, "image", "--base control --condition_file rows.json")
    assert error.value.code == 2 and "leave --condition_file out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        check(logs, "control", "--base control")
    assert error.value.code == 2 and "pass a run without hints" in capsys.readouterr().err


def test_psnr_of_hints_is_of_images_that_differ():
    images = torch.full((2, 1, 8, 8), 100, dtype=torch.uint8)
    hints = torch.stack([images[0], images[1] + 10])
    figures = compare_hints(Images(images, hints), HintMaker("grey"))
    assert figures["equal"] == 1 and figures["psnr"] == pytest.approx(20 * torch.log10(torch.tensor(25.5)).item())
