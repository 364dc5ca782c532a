"""Class-changing edits end to end on tiny models."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness.editing import load_input_images
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from helpers.tiny_runs import call
from train.trained_sampler import TrainedSampler


def edit(logs, flags):
    call("experiments/edit.py", f"--logs_root {logs} --no_amp --device cpu {flags}")


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def draw_calls(monkeypatch):
    """(indices, conditions, options, edit input, result) of every batch."""
    batches, draw = [], TrainedSampler.draw

    def record(self, indices, seed, options, conditions, *, edit, **kwargs):
        result = draw(self, indices, seed, options, conditions, edit=edit, **kwargs)
        batches.append((indices, conditions, options, edit, result))
        return result

    monkeypatch.setattr(TrainedSampler, "draw", record)
    return batches


@pytest.mark.parametrize("sampler", ["absorbing", "ddpm"])
def test_every_image_is_edited_to_every_class(sampler, request, draw_calls, capsys):
    logs = request.getfixturevalue("trained" if sampler == "absorbing" else "trained_ddpm")
    edit(logs, f"--sampler {sampler} --n_images 2 --label 3 7 8 --sample_steps 2 --guidance 2 --log_dir edited")
    ((indices, conditions, options, edit_input, result),) = draw_calls
    assert conditions["label"].tolist() == [3, 7, 8] * 2 and options.guidance == 2
    assert indices == [0, 0, 0, 1, 1, 1]  # the noise of an image does not depend on its target class
    assert edit_input.strength == 0.7 and not edit_input.keep.any() and torch.equal(edit_input.x0[0], edit_input.x0[2])
    results = read_results(logs / "edited")
    assert results["labels"] == [3, 7, 8] and all(0 <= row["asked"]["value"] <= 1 for row in results["of_label"])
    names = sorted(path.name for path in (logs / "edited" / "images").glob("*.png"))
    assert len(names) == 6 and names[0].endswith("_as_3.png") and names[-1].endswith("_as_8.png")
    assert "target class" in capsys.readouterr().out and (logs / "edited" / "edited.png").is_file()
    draw_calls.clear()
    edit(logs, f"--sampler {sampler} --n_images 2 --label 3 7 8 --sample_steps 2 --guidance 2 --log_dir edited")
    assert not draw_calls and not (logs / "edited" / ".kept").exists()


def test_a_lower_strength_changes_less(trained, trained_ddpm):
    for logs, sampler in ((trained, "absorbing"), (trained_ddpm, "ddpm")):
        distances = []
        for strength in (0.1, 1.0):
            flags = f"--sampler {sampler} --n_images 6 --label 1 --strength {strength} --sample_steps 20"
            edit(logs, f"{flags} --log_dir at_{strength}")
            (row,) = read_results(logs / f"at_{strength}")["of_label"]
            distances.append(row["distance"])
        if sampler == "ddpm":  # not for codes, where the untrained decoder dominates
            assert distances[0] < distances[1]


def test_a_fraction_of_the_codes_is_kept(trained, draw_calls):
    edit(trained, "--n_images 40 --label 1 --strength 0.4 --sample_steps 4 --log_dir share")
    *_, edit_input, result = draw_calls[0]
    assert 0.6 <= (result["codes"] == edit_input.x0).float().mean() < 0.8  # some masked codes are sampled unchanged


@pytest.mark.parametrize("sampler", ["absorbing", "ddpm"])
def test_a_strength_map_keeps_where_it_is_black(sampler, request, tmp_path, draw_calls):
    logs = request.getfixturevalue("trained" if sampler == "absorbing" else "trained_ddpm")
    path, black = tmp_path / "map.png", torch.zeros(32, 32, dtype=torch.uint8)
    black[:, 8:] = 128
    Image.fromarray(black.numpy()).save(path)
    flags = f"--sampler {sampler} --n_images 2 --label 1 2 --sample_steps 8 --strength 0.9 --strength_map {path}"
    edit(logs, f"{flags} --paste --log_dir by_map")
    ((*_, start, result),) = draw_calls
    cells = start.strength_map.shape[-1]
    assert start.strength == pytest.approx(0.9 * 128 / 255) and not start.keep.any()
    assert (start.strength_map[..., : cells // 4] == 0).all()
    assert torch.allclose(start.strength_map[..., cells // 4 :], torch.tensor(start.strength))
    model = load_model(ModelConfig(sampler=sampler), OutputConfig(logs_root=str(logs)))
    images = load_input_images((), 2, model).image
    if sampler == "ddpm":
        quarter = images.shape[-1] // 4
        assert torch.equal(result["image"][::2, ..., :quarter], images[..., :quarter])
    else:
        assert torch.equal(result["codes"][..., : cells // 4], start.x0[..., : cells // 4])
    pictures = [Image.open(path).convert("L") for path in sorted((logs / "by_map" / "images").glob("*.png"))]
    pasted, kept = torch.stack([torch.from_numpy(np.array(each)) for each in pictures]), images.shape[3] // 4
    assert torch.equal(pasted[::2, ..., :kept], images[:, 0, :, :kept])
    assert not torch.equal(pasted[::2], images[:, 0])


def test_an_interrupted_edit_resumes(trained, monkeypatch, draw_calls):
    flags = "--n_images 4 --label 1 --batch_size 2 --sample_steps 2"
    edit(trained, f"{flags} --log_dir edit_whole")
    draw, calls = TrainedSampler.draw, []

    def interrupted_draw(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(TrainedSampler, "draw", interrupted_draw)
    with pytest.raises(SystemExit):
        edit(trained, f"{flags} --log_dir edit_again")
    draw_calls.clear()
    edit(trained, f"{flags} --log_dir edit_again")
    assert len(draw_calls) == 1  # the first batch was saved
    one, two = (
        {k: v for k, v in read_results(trained / name).items() if k != "run"} for name in ("edit_whole", "edit_again")
    )
    assert all(row.pop("seconds") > 0 for results in (one, two) for row in results["of_label"])
    assert one == two


def test_other_input_images_are_another_experiment(trained, tmp_path, capsys):
    model = load_model(ModelConfig(), OutputConfig(logs_root=str(trained)))
    image = load_input_images((), 1, model).image[0, 0]
    path = tmp_path / "a.png"
    for k in (0, 1):
        Image.fromarray((image // (k + 1)).numpy()).save(path)
        flags = f"--image {path} --label 1 --sample_steps 2 --log_dir same_name"
        if k == 0:
            edit(trained, flags)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        edit(trained, flags)
    assert "--image: other images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--strength 0", "wanted a number in (0, 1]"),
        ("--strength 1.5", "--strength"),
        ("--label 12", "label 12, wanted a class from 0 to 9"),
        ("--n_images 0", "--n_images"),
        ("--paste", "pass --mask FILE, --strength_map FILE"),
        ("--strength_map nowhere.png", "nowhere.png not found"),
    ],
)
def test_invalid_settings_are_refused(trained, capsys, flags, expected):
    with pytest.raises(SystemExit) as stop:
        edit(trained, f"{flags} --log_dir edit_refused")
    assert stop.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (trained / "edit_refused").exists()
