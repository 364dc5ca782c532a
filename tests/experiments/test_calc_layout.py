"""The command that measures layouts: real scenes, samples of a run by their held-out items, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.calc_layout import settings_of_samples
from experiments.metrics.layout import obedience
from helpers.tiny_runs import DDPM, call
from train.data.transforms import to_item
from train.datasets import shapes
from train.layout_files import vocabulary_of
from train.layouts import Layout, write_layouts
from train.trained_sampler import TrainedSampler

pytestmark = pytest.mark.usefixtures("tiny_judges")
SCRIPT = "experiments/calc_layout.py"
SHAPES = "--dataset shapes --img_size 16 --shapes_count 40"
GREY = "def grey(item):\n    return {'image': item['image'], 'condition_image': item['image'][:1]}\n"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A folder for runs and judges, which are trained once."""
    return tmp_path_factory.mktemp("logs")


def measure(logs: Path, flags: str, name: str) -> dict:
    call(SCRIPT, f"--logs_root {logs} --min_judge 0 --log_dir {name} {flags}")
    return json.loads((logs / name / "results.json").read_text())


def refused(logs: Path, flags: str, capfd) -> str:
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"--logs_root {logs} {flags}")
    assert stop.value.code == 2
    return capfd.readouterr().err


def test_real_scenes_are_measured_beside_wrong_layouts(logs, capsys):
    results = measure(logs, f"{SHAPES} --n_images 20", "real")
    out = capsys.readouterr().out
    assert results["figures"].keys() == {"real scenes", "wrong layouts"} and results["n_images"] == 20
    real = results["figures"]["real scenes"]
    assert real.keys() == {"all", "small", "occluded", "contact", "overlap"}
    expected = ["objects", "crop accuracy", "crop FD", "CAS", "colour", "AP", "AP50", "AP75", "spurious", "mIoU"]
    assert list(real["all"]) == [*expected, "pixel accuracy"]
    assert real["all"]["colour"] > 0.9 > 0.5 > results["figures"]["wrong layouts"]["all"]["colour"]
    assert results["judges"]["crop classifier"][:12] in out and "seed 0" in out
    assert "real scenes" in out and "occluded" in out
    call(SCRIPT, f"--logs_root {logs} --min_judge 0 --log_dir real {SHAPES} --n_images 20")
    assert capsys.readouterr().out.split("\n", 1)[1] == out.split("\n", 1)[1]  # reported again, not measured


def test_regions_of_maps_are_measured_by_group_of_classes(logs, capsys):
    results = measure(logs, f"{SHAPES} --n_images 20 --class_groups disc,ring sky", "groups")
    maps, out = results["maps"], capsys.readouterr().out
    assert maps.keys() == results["figures"].keys() == {"real scenes", "wrong layouts"}
    assert list(maps["real scenes"]) == ["all", "disc, ring", "sky", "other classes"]
    regions = [each["regions"] for each in maps["real scenes"].values()]
    assert regions[0] == sum(regions[1:]) and min(regions) > 0
    assert maps["real scenes"]["all"]["mIoU"][0] == pytest.approx(results["figures"]["real scenes"]["all"]["mIoU"])
    assert maps["real scenes"]["all"]["colour"][0] > 0.9 > 0.5 > maps["wrong layouts"]["all"]["colour"][0]
    assert maps["real scenes"]["sky"]["colour"] is None and "regions of maps" in out and "disc, ring" in out
    call(
        SCRIPT, f"--logs_root {logs} --min_judge 0 --log_dir groups {SHAPES} --n_images 20 --class_groups disc,ring sky"
    )
    assert capsys.readouterr().out.split("\n", 1)[1] == out.split("\n", 1)[1]  # reported again, not measured


def test_groups_that_the_data_do_not_have_are_refused(logs, capfd):
    assert "in --class_groups, did you mean 'ring'?" in refused(logs, f"{SHAPES} --class_groups rings", capfd)
    assert "got class 12 in --class_groups, wanted 0 to 9" in refused(logs, f"{SHAPES} --class_groups 12", capfd)


def test_groups_are_those_of_the_experts_of_the_run(tmp_path):
    sampler = {"experts": ["0,4", "6"]}
    for name, content in (
        ("run", {"data": {"dataset": "shapes", "img_size": 16}, "sampler": sampler}),
        ("samples", {"model": {"load_dir": "run"}, "output": {"logs_root": str(tmp_path)}}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(json.dumps(content))
    argv = ["--samples", str(tmp_path / "samples" / "samples.npz")]
    assert settings_of_samples(argv, "calc_layout").values["class_groups"] == ["0,4", "6"]
    argv += ["--dataset", "digits"]
    assert "class_groups" not in settings_of_samples(argv, "calc_layout").values


def test_a_poor_judge_is_refused_with_the_remedy(logs, capfd):
    error = refused(logs, f"{SHAPES} --n_images 20", capfd)
    assert "on real scenes" in error and "wanted 0.950" in error and "--min_judge" in error
    assert not list(logs.glob("layout_real*/results.json"))


def test_data_without_a_split_for_judges_need_twice_the_floor(logs, monkeypatch, capfd):
    monkeypatch.delattr(shapes, "JUDGE_SPLIT")
    answers = iter([("crop accuracy", 0.39), ("crop accuracy", 0.2), ("crop accuracy", 0.41), ("crop accuracy", 0.2)])
    monkeypatch.setattr(obedience.Measurement, "recognise", lambda *args: next(answers))
    assert "0.390 on real scenes (0.200 under wrong layouts), wanted 0.400" in refused(
        logs, f"{SHAPES} --n_images 8", capfd
    )
    call(SCRIPT, f"--logs_root {logs} {SHAPES} --n_images 8 --log_dir other")
    assert json.loads((logs / "other" / "results.json").read_text())["judge_split"] == "train"


@pytest.fixture(scope="module")
def samples(logs, request):
    """Samples of a run with an image condition, 6 of 4 held-out items, and their conditions."""
    folder, patch, conditions = logs / "code", pytest.MonkeyPatch(), []
    folder.mkdir()
    (folder / "my_grey.py").write_text(GREY)
    patch.syspath_prepend(folder)
    patch.setattr(shapes, "N_VAL", 4)
    request.addfinalizer(patch.undo)
    draw = TrainedSampler.draw

    def record(model, indices, seed, options, drawn, **kwargs):
        conditions.append(drawn["condition_image"])
        return draw(model, indices, seed, options, drawn, **kwargs)

    patch.setattr(TrainedSampler, "draw", record)
    run = "--adapt my_grey.grey --conditions image --condition_channels 1 --train_steps 1 --no_amp --log_dir grey"
    flags = DDPM.replace("--img_size 8", SHAPES)
    call("train_sampler.py", f"--logs_root {logs} {flags} {run} --steps_per_eval 0 --guidance 1")
    flags = "--sampler ddpm --load_dir grey --allow my_grey.grey --n_samples 6 --batch_size 4 --no_amp --sample_steps 2"
    call("experiments/get_samples.py", f"--logs_root {logs} {flags} --log_dir samples")
    return logs / "samples" / "samples.npz", torch.cat(conditions[-2:])


def test_samples_are_matched_with_the_layouts_asked_for(logs, samples):
    path, conditions = samples
    items = np.load(path)["held_out"]
    assert sorted(items[:4]) == [0, 1, 2, 3] and items[4:].tolist() == items[:2].tolist()
    dataset = shapes.build(shapes.Config(), "val")
    images = [to_item(dataset.read_at_size(int(item), (16, 16)), (16, 16), 3)["image"][:1] for item in items]
    assert torch.allclose(conditions, torch.stack(images).float() / 127.5 - 1)
    results = measure(logs, f"--samples {path}", "measured")  # the run names the data
    assert results["figures"].keys() == {"samples", "real scenes", "wrong layouts"}
    assert (results["n_images"], results["n_layouts"], results["size"]) == (6, 4, [16, 16])
    figures = {kind: each["all"]["colour"] for kind, each in results["figures"].items()}
    assert figures["real scenes"] > 0.9 > figures["samples"]  # of an untrained network
    assert results["run"]["reader"]["shapes_count"] == 40


def test_samples_may_bring_their_own_layouts(logs, samples, tmp_path, capsys):
    entries = [{"boxes": [[0.1, 0.1, 0.5, 0.6], [0.4, 0.4, 0.9, 0.9]], "classes": ["disc", "ring"]}]
    entries += [{"boxes": [[0.2, 0.1, 0.8, 0.6]], "classes": ["bow"]}, {"boxes": [], "classes": []}]
    (tmp_path / "layouts.json").write_text(json.dumps(entries))
    path, images = tmp_path / "samples.npz", np.load(samples[0])["arr_0"]
    np.savez(path, arr_0=images, layout=np.arange(6) % 3)
    results = measure(logs, f"{SHAPES} --samples {path}", "own")
    assert "6 images of 3 layouts of shapes, given ones" in capsys.readouterr().out
    assert (results["n_images"], results["n_layouts"]) == (6, 3)
    figures = {kind: each["all"] for kind, each in results["figures"].items()}
    assert figures["samples"]["objects"] == figures["wrong layouts"]["objects"] == 6
    assert figures["real scenes"]["objects"] > 6 and figures["samples"]["crop accuracy"] is not None
    buckets = results["figures"]["samples"]
    assert buckets["overlap"]["objects"] == 4 and buckets["small"]["objects"] == 0
    (tmp_path / "layouts.json").write_text(json.dumps(entries[:2]))
    with pytest.raises(SystemExit):
        call(SCRIPT, f"--logs_root {logs} --min_judge 0 {SHAPES} --samples {path}")
    assert "has 2 layouts, but the samples are of others" in capsys.readouterr().err


def test_maps_of_a_file_name_colours_by_their_words(logs, samples, tmp_path):
    dataset = shapes.build(shapes.Config(), "val")
    items = [dataset.read_at_size(index, (16, 16)) for index in range(3)]
    fields = ("panoptic", "segment_id", "segment_class", "box_id", "box_words")
    rows = [Layout(f"map_{i}", {field: item[field] for field in fields}) for i, item in enumerate(items)]
    write_layouts(tmp_path, rows, vocabulary_of(dataset, fields, (16, 16)))
    images = np.stack([np.array(item["image"]) for item in items])
    np.savez(tmp_path / "samples.npz", arr_0=images, layout=np.arange(3))
    maps = measure(logs, f"{SHAPES} --samples {tmp_path / 'samples.npz'}", "worded")["maps"]
    assert maps["samples"]["all"]["colour"][0] > 0.9 > maps["wrong layouts"]["all"]["colour"][0]
    (tmp_path / "layouts.json").write_text((tmp_path / "layouts.json").read_text().replace("red ", "pink "))
    fewer = measure(logs, f"{SHAPES} --samples {tmp_path / 'samples.npz'}", "less_worded")["maps"]["samples"]["all"]
    assert fewer["colour"][0] > 0.9 and fewer["regions"] == maps["samples"]["all"]["regions"]


def test_another_detector_adds_its_average_precision(logs, samples, tmp_path):
    items = np.load(samples[0])["held_out"]
    dataset, rows = shapes.build(shapes.Config(), "val"), []
    for number, index in enumerate(items):
        item = dataset.read_at_size(int(index), (16, 16))
        for box, label in zip(item["boxes"].tolist(), item["box_class"].tolist(), strict=True):
            sides = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            rows.append({"image_id": number, "category_id": label, "bbox": sides, "score": 0.9})
    (tmp_path / "found.json").write_text(json.dumps(rows))
    figures = measure(logs, f"--samples {samples[0]} --detections {tmp_path / 'found.json'}", "detected")["figures"]
    assert figures["samples"]["all"]["AP, --detections"] == pytest.approx(1, abs=1e-6)
    assert figures["wrong layouts"]["all"]["AP50, --detections"] < 0.2
    assert "AP, --detections" not in figures["real scenes"]["all"]


def test_samples_without_known_layouts_are_refused(logs, samples, tmp_path, capfd):
    path, images = tmp_path / "x.npz", np.zeros((3, 16, 16, 3), np.uint8)
    files = {
        "does not say which layouts its images are of": {},
        "got 2 numbers from 0 to 1 as held_out, wanted 3 from 0 to 3": {"held_out": np.arange(2)},
        "got 3 numbers from 2 to 4 as held_out": {"held_out": np.arange(2, 5)},
        "too few different layouts": {"held_out": np.ones(3, np.int64)},
    }
    for message, arrays in files.items():
        np.savez(path, arr_0=images, **arrays)
        assert message in refused(logs, f"{SHAPES} --samples {path} --min_judge 0", capfd)
    np.savez(path, arr_0=images[:, :8, :8], held_out=np.arange(3))
    assert "got samples of 8x8 pixels, wanted 16x16" in refused(logs, f"{SHAPES} --samples {path}", capfd)
    assert "digits has no layouts" in refused(logs, "--dataset digits", capfd)
    assert "wanted at least 2" in refused(logs, f"{SHAPES} --n_images 1", capfd)
