"""Samples from layouts, on the command line: get_samples.py, generate_big_samples.py and run_layout_to_image.py."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness.images import read_samples
from experiments.run_layout_to_image import report
from helpers.tiny_runs import DDPM, call
from train.datasets import shapes
from train.layout_files import vocabulary_of
from train.layouts import read_layouts

SHAPES = "--dataset shapes --img_size 16 --shapes_count 40"
LAYOUTS = [
    {"name": "one", "boxes": [[0.1, 0.2, 0.5, 0.7]], "classes": ["disc"], "colors": ["red"]},
    {"name": "two", "boxes": [[0, 0, 0.5, 1], [0.25, 0.5, 1, 1]], "classes": ["ring", "bow"], "colors": ["blue", 3]},
    {"name": "none", "boxes": [], "classes": [], "colors": []},
]
QUICK = "--no_amp --device cpu --sample_steps 2 --batch_size 4"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A run of one step whose conditions are a map of boxes with colours, and metadata; and one of segments."""
    logs = tmp_path_factory.mktemp("logs")
    run = f"--logs_root {logs} --no_amp --train_steps 1 --steps_per_eval 0"
    flags = DDPM.replace("--img_size 8", SHAPES)
    call("train_sampler.py", f"{run} {flags} --conditions layout metadata --layout_colors 6 --log_dir boxes")
    call("train_sampler.py", f"{run} {flags} --conditions layout --layout_regions segments --log_dir segments")
    return logs


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(LAYOUTS))
    return path


def sample(logs, flags):
    call("experiments/get_samples.py", f"--logs_root {logs} --load_dir boxes {QUICK} {flags}")


def refused(capfd, script, flags):
    with pytest.raises(SystemExit) as stop:
        call(f"experiments/{script}.py", flags)
    assert stop.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith(f"{script}.py: ")]
    return line


def classes_of_batches(batches):
    """The classes of the regions of each image."""
    pairs = [zip(batch["box_class"], batch["box_class_mask"], strict=True) for batch in batches]
    return [row[mask].tolist() for rows in pairs for row, mask in rows]


def colors_in(path):
    with Image.open(path) as picture:
        return len(picture.convert("RGB").getcolors(1 << 20))


def test_image_i_gets_layout_i_modulo_their_number(logs, file, conditions):
    sample(logs, f"--layouts {file} --n_samples 7 --log_dir in_turn")
    assert classes_of_batches(conditions) == [[0], [4, 5], [], [0], [4, 5], [], [0]]
    assert torch.equal(conditions[0]["box_color"][1], torch.tensor([4, 3]))
    assert np.load(logs / "in_turn" / "samples.npz")["layout"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    vocabulary = vocabulary_of(shapes.build(shapes.Config(), "val"), ("boxes", "box_class", "box_color"), (16, 16))
    again = read_layouts(logs / "in_turn" / "layouts.json", vocabulary)
    for one, other in zip(again, read_layouts(file, vocabulary), strict=True):
        assert one.name == other.name and all(torch.equal(one.row[name], other.row[name]) for name in one.row)
    with Image.open(logs / "in_turn" / "layouts.png") as picture:
        width, height = picture.size
    assert width > 3.5 * 160 and height > 3 * 160  # a layout and three images, of three layouts
    assert colors_in(logs / "in_turn" / "layouts.png") > 100


def test_several_seeds_are_drawn_of_each_layout(logs, file, conditions, capsys):
    sample(logs, f"--layouts {file} --n_seeds 2 --log_dir seeds")
    assert len(read_samples(logs / "seeds" / "samples.npz")["image"]) == 6
    assert json.loads((logs / "seeds" / "results.json").read_text())["n_layouts"] == 3
    assert "3 layouts: " in capsys.readouterr().out


def test_layouts_are_drawn_with_the_metadata_that_are_given(logs, file, tmp_path, conditions):
    sample(logs, f"--layouts {file} --metadata light=night --n_samples 3 --log_dir night")
    assert classes_of_batches(conditions) == [[0], [4, 5], []]
    assert conditions[0]["light"] == ["night"] * 3 and conditions[0]["camera"] == ["unknown"] * 3
    file.write_text(json.dumps([layout | {"camera": "CAM_BACK"} for layout in LAYOUTS]))
    sample(logs, f"--layouts {file} --metadata light=night --n_samples 3 --log_dir back")
    assert conditions[-1]["light"] == ["night"] * 3 and conditions[-1]["camera"] == ["CAM_BACK"] * 3
    flags = f"{logs / 'boxes'} --output_dir {tmp_path / 'held'} {QUICK} --n_images 2 --n_seeds 1"
    run_layouts(f"{flags} --metadata light=night")
    assert conditions[-1]["light"] == ["night"] * 2 and "unknown" not in conditions[-1]["camera"]


def test_with_metadata_layouts_are_still_those_of_items(logs, conditions):
    sample(logs, "--metadata light=night --n_samples 3 --log_dir items")
    dataset, items = shapes.build(shapes.Config(), "val"), np.load(logs / "items" / "samples.npz")["held_out"]
    assert classes_of_batches(conditions) == [dataset[int(item)]["box_class"].tolist() for item in items]
    assert conditions[0]["light"] == ["night"] * 3
    assert conditions[0]["camera"] == [dataset[int(item)]["camera"] for item in items]


def test_a_folder_with_other_layouts_is_refused(logs, file, tmp_path, capfd):
    flags = f"--logs_root {logs} --load_dir boxes {QUICK} --n_samples 3 --log_dir resumed"
    call("experiments/get_samples.py", f"{flags} --layouts {file}")
    moved = tmp_path / "moved.json"
    moved.write_text(file.read_text())
    call("experiments/get_samples.py", f"{flags} --layouts {moved}")  # the same content
    file.write_text(json.dumps(LAYOUTS[:2]))
    assert "--layouts: other content" in refused(capfd, "get_samples", f"{flags} --layouts {file}")
    assert "layouts" in refused(capfd, "get_samples", flags)


def test_layouts_that_cannot_be_drawn_leave_no_folder(logs, file, capfd):
    flags = f"--logs_root {logs} --load_dir boxes {QUICK} --log_dir odd"
    wrong = f"{flags} --layouts {file}"
    assert "pass one of them" in refused(capfd, "get_samples", f"{wrong} --condition_file rows.json")
    assert "got --condition_file, but layouts" in refused(
        capfd, "run_layout_to_image", f"{flags} --condition_file a.csv"
    )
    with pytest.raises(SystemExit) as stop:
        sample(logs, "--n_seeds 3 --log_dir odd")
    assert stop.value.code == 2 and "got n_seeds 3 without layouts" in capfd.readouterr().err
    file.write_text(json.dumps([{"boxes": [[0, 0, 1, 1]], "classes": ["disc"]}]))
    assert "mine.json: layout_000 has no box_color" in refused(capfd, "get_samples", wrong)
    assert "layout_000 has no box_color" in refused(capfd, "generate_big_samples", f"{wrong} --shape 16 16")
    assert "nowhere not found" in refused(capfd, "run_layout_to_image", f"{flags} --layouts nowhere")
    assert not (logs / "odd").exists()


def test_a_model_without_regions_takes_no_layouts(trained_ddpm, file, capfd):
    flags = f"--logs_root {trained_ddpm} --sampler ddpm {QUICK} --layouts {file} --log_dir without"
    assert "which reads label: pass a run with boxes, masks or segments" in refused(capfd, "get_samples", flags)


def test_layouts_of_a_canvas_are_fractions_of_all_of_it(logs, tmp_path, conditions):
    path = tmp_path / "wide.json"
    path.write_text(json.dumps([{"boxes": [[12, 4, 20, 8]], "classes": ["disc"], "colors": [0], "size": [16, 24]}]))
    flags = f"--logs_root {logs} --load_dir boxes {QUICK} --shape 16 24 --n_samples 1"
    call("experiments/generate_big_samples.py", f"{flags} --layouts {path} --log_dir wide")
    assert torch.allclose(conditions[0]["boxes"], torch.tensor([[[0.5, 0.25, 20 / 24, 0.5]]]))
    with Image.open(logs / "wide" / "big_000.png") as picture:
        assert picture.size == (24, 16)
    assert colors_in(logs / "wide" / "layouts.png") > 100


# run_layout_to_image.py


def test_one_and_several_layouts_are_counted(tmp_path):
    one = {"names": ["a"], "n_layouts": 1, "n_seeds": 1}
    several = {"names": ["a", "b"], "n_layouts": 2, "n_seeds": 8}
    assert report(one, tmp_path).startswith(f"an image of a layout: {tmp_path / 'a.png'}\n")
    assert report(several, tmp_path).startswith(f"16 images of two layouts: {tmp_path / 'a.png'}, ...\n")


def run_layouts(words):
    call("experiments/run_layout_to_image.py", words)


def test_each_layout_gets_a_picture_beside_its_seeds(logs, file, tmp_path):
    out = tmp_path / "results"
    run_layouts(f"{logs / 'boxes'} --output_dir {out} {QUICK} --layouts {file} --n_seeds 2")
    assert {path.name for path in out.glob("*.png")} == {
        f"{name}{end}.png" for name in ("one", "two", "none") for end in ("", "_layout")
    }
    assert len(list((out / "images").glob("*.png"))) == 6
    results = json.loads((out / "results.json").read_text())
    assert (results["names"], results["n_seeds"]) == (["one", "two", "none"], 2) and results["run"]["layouts_sha256"]
    assert colors_in(out / "two.png") > 100 and colors_in(out / "two_layout.png") > 5 > colors_in(
        out / "none_layout.png"
    )
    sample(logs, f"--layouts {file} --n_seeds 2 --log_dir same")  # images k L + l are those of layout l
    images = read_samples(logs / "same" / "samples.npz")["image"]
    for number, name in enumerate(("one", "two", "none")):
        for seed in range(2):
            with Image.open(out / "images" / f"{name}_{seed}.png") as picture:
                pixels = torch.from_numpy(np.array(picture)).movedim(2, 0)
            assert torch.equal(pixels, images[3 * seed + number])


def test_without_layouts_those_of_held_out_images_are_drawn(logs, tmp_path, conditions, capsys):
    checkpoint = logs / "boxes" / "checkpoints" / "step_00000001"
    run_layouts(f"{checkpoint} --output_dir={tmp_path / 'held'} {QUICK} --n_images 3 --n_seeds 1")
    assert "step 1, " in capsys.readouterr().out
    names = json.loads((tmp_path / "held" / "results.json").read_text())["names"]
    dataset = shapes.build(shapes.Config(), "val")
    expected = [dataset[int(name.removeprefix("val_"))]["box_class"].tolist() for name in names]
    assert classes_of_batches(conditions[-1:]) == expected and len(expected) == 3
    written = json.loads((tmp_path / "held" / "layouts.json").read_text())
    assert [entry["name"] for entry in written] == names
    conditions.clear()
    run_layouts(f"{checkpoint} --output_dir={tmp_path / 'held'} {QUICK} --n_images 3 --n_seeds 1")
    assert not conditions  # reported again


def test_segments_are_drawn_from_maps_and_written_as_such(logs, tmp_path, conditions):
    classes = np.full((16, 16), 6, np.uint8)
    classes[:, 8:], classes[0] = 9, 255
    (tmp_path / "maps").mkdir()
    Image.fromarray(classes).save(tmp_path / "maps" / "a.png")
    run_layouts(
        f"{logs / 'segments'} --output_dir {tmp_path / 'out'} {QUICK} --layouts {tmp_path / 'maps'} --n_seeds 1"
    )
    batch = conditions[-1]
    assert batch["segment_class"].tolist() == [[6, 9]] and (batch["panoptic"][0, 0] == 0).all()
    vocabulary = vocabulary_of(
        shapes.build(shapes.Config(), "val"), ("panoptic", "segment_id", "segment_class"), (16, 16)
    )
    (layout,) = read_layouts(tmp_path / "out" / "layouts.json", vocabulary)
    assert layout.name == "a" and torch.equal(layout.row["panoptic"], batch["panoptic"][0])
    assert colors_in(tmp_path / "out" / "a_layout.png") > 5


def test_masks_are_drawn_written_and_read_again(tmp_path, conditions):
    """Those of held-out scenes, some of which overlap, by a network that reads them in two ways."""
    flags = DDPM.replace("--img_size 8", SHAPES) + " --train_steps 1 --steps_per_eval 0 --no_amp"
    masks = "--conditions layout objects --layout_regions masks --objects_regions masks --region_attention v2"
    call("train_sampler.py", f"--logs_root {tmp_path} {flags} {masks} --layout_colors 6 --log_dir masks")
    run_layouts(f"{tmp_path / 'masks'} --output_dir {tmp_path / 'held'} {QUICK} --n_images 3 --n_seeds 1")
    held = conditions[-1]
    dataset, names = shapes.build(shapes.Config(shapes_size=16), "val"), read_names(tmp_path / "held" / "layouts.json")
    items = [dataset[int(name.removeprefix("val_"))] for name in names]
    for row, item in zip(held["masks"], items, strict=True):
        assert torch.equal(row[: len(item["masks"])], item["masks"].as_subclass(torch.Tensor))
    assert colors_in(tmp_path / "held" / f"{names[0]}_layout.png") > 5
    beside = f"--layouts {tmp_path / 'held' / 'layouts.json'} --n_samples 3 --log_dir again"
    call("experiments/get_samples.py", f"--logs_root {tmp_path} --load_dir masks {QUICK} {beside}")
    seen = (held["masks"] > 0).flatten(2).any(2)
    for name in ("masks", "box_class", "box_color"):
        rows = zip(held[name], seen, conditions[-1][name], conditions[-1]["masks_mask"], strict=True)
        assert all(torch.equal(row[kept], again[present]) for row, kept, again, present in rows)


def read_names(path):
    return [entry["name"] for entry in json.loads(path.read_text())]


def test_odd_command_lines_are_refused(logs, tmp_path, capfd):
    assert "no run in" in refused(capfd, "run_layout_to_image", f"{tmp_path / 'x'} {QUICK}")
    step = logs / "boxes" / "checkpoints" / "step_00000009" / "weights.safetensors"
    assert "there are 1" in refused(capfd, "run_layout_to_image", f"{step} {QUICK}")
    with pytest.raises(SystemExit) as stop:
        run_layouts(f"{logs / 'boxes'} --output_dir a --log_dir b")
    assert stop.value.code == 2 and "got --output_dir a and --log_dir b" in capfd.readouterr().err
