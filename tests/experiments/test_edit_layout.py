"""Editing by layout end to end on tiny models: the rest of the image stays to the bit, and the boxes are drawn anew."""

import json
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness.editing import load_input_images
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.harness.layout_edits import Region, apply_edits, changed_pixels, parse_edit, read_layout
from experiments.playground import Playground, Request
from helpers.parametrize import slow_after
from helpers.tiny_runs import GAN, ROOT, SAMPLER, UNET, VQGAN, call
from train.samplers.ddpm import GaussianSampler, Sampling
from train.trained_sampler import TrainedSampler

SHAPES = "--dataset shapes --img_size 16 --shapes_count 20 --conditions layout --layout_colors 6"
TINY = f"--sampler ddpm {UNET} --batch_size 4 --total_steps 20 --sample_steps 3 --warmup_iters 10"
MODEL = "--sampler ddpm --dataset shapes --load_dir layout"
SIZE, BACKGROUND = (16, 16), 10  # a grey level


@pytest.fixture(scope="module")
def layout_logs(tmp_path_factory):
    """A logs folder with a pixel model of layouts whose network predicts x0, trained for two steps."""
    logs = tmp_path_factory.mktemp("layout_logs")
    flags = f"{SHAPES} {TINY} --prediction x0 --variance fixed_small --train_steps 2 --no_amp --log_dir layout"
    call("train_sampler.py", f"--logs_root {logs} {flags}")
    return logs


def edit(logs, flags, edits):
    """Runs the script in this process; each edit is one word of the command line."""
    words = f"--logs_root {logs} --no_amp --device cpu {flags}".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["edit_layout.py", *words, *(["--edit", *edits] if edits else [])])
        patch.syspath_prepend(ROOT / "experiments")
        runpy.run_path(str(ROOT / "experiments" / "edit_layout.py"), run_name="__main__")


def load(logs, **model):
    chosen = {"sampler": "ddpm", "dataset": "shapes", "load_dir": "layout"} | model
    return load_model(ModelConfig(**chosen), OutputConfig(logs_root=str(logs), device="cpu", amp=False))


def pixels(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("solver", slow_after(1, ["ddpm", "ddim", "heun"]))
def test_pixels_outside_the_boxes_stay_to_the_bit(layout_logs, solver, capsys):
    edits, name = ("move 0 by 0.125 -0.0625", "add disc red 0 0 0.2 0.2"), f"kept_{solver}"
    flags = f"{MODEL} --n_images 3 --results 2 --no_paste --sample_steps 3 --solver {solver} --log_dir {name}"
    edit(layout_logs, flags, edits)
    trained, results = load(layout_logs), read_results(layout_logs / name)
    inputs = load_input_images((), 3, trained)
    for number, (image, row) in enumerate(zip(inputs.image, inputs.rows, strict=True)):
        before = read_layout(row)
        left, top, right, bottom = before[0].box
        moved = (left + 0.125, top - 0.0625, right + 0.125, bottom - 0.0625)
        mask = changed_pixels([before[0].box, moved, (0, 0, 0.2, 0.2)], SIZE)
        assert 0 < mask.float().mean() < 1
        for column in range(2):
            result = pixels(next((layout_logs / name / "images").glob(f"00{number}_*_{column}.png")))
            assert torch.equal(result[:, ~mask], image[:, ~mask]) and not torch.equal(result, image)
        after = results["images"][number]["after"]
        assert after[0]["box"] == pytest.approx(moved) and after[-1]["region"] == "red disc"
    assert results["change_outside"] == 0 < results["change_inside"]
    assert "as rendered by the model" in capsys.readouterr().out
    assert (layout_logs / name / "layout_edited.png").is_file() and not (layout_logs / name / ".kept").exists()


def test_results_are_reported_again_and_go_on_as_an_input(layout_logs, monkeypatch, capsys):
    flags = f"{MODEL} --n_images 2 --sample_steps 2 --log_dir first"
    edit(layout_logs, flags, ["remove 0"])
    printed, folder = capsys.readouterr().out, layout_logs / "first"
    with monkeypatch.context() as patch:
        patch.setattr(TrainedSampler, "draw", None)
        edit(layout_logs, flags, ["remove 0"])  # the saved report
    assert printed.split("editing by layout")[1] == capsys.readouterr().out.split("editing by layout")[1]
    before = [read_layout(row) for row in load_input_images((), 2, load(layout_logs)).rows]
    layouts = json.loads((folder / "layouts.json").read_text())
    assert [len(row["boxes"]) for row in layouts] == [len(layout) - 1 for layout in before]
    files = " ".join(str(path) for path in sorted((folder / "images").glob("*.png")))
    again = f"{MODEL} --image {files} --layouts {folder / 'layouts.json'} --sample_steps 2 --log_dir second"
    edit(layout_logs, again, ["add ring blue 0.1 0.1 0.5 0.5"])
    results = read_results(layout_logs / "second")
    for layout, image in zip(layouts, results["images"], strict=True):
        assert [each["box"] for each in image["before"]] == [pytest.approx(box) for box in layout["boxes"]]
        words = [" ".join(pair) for pair in zip(layout["colors"], layout["classes"], strict=True)]
        assert [each["region"] for each in image["before"]] == words
        assert image["after"][-1] == {"region": "blue ring", "box": [0.1, 0.1, 0.5, 0.5]}
    assert "layouts_sha256" in (layout_logs / "second" / "config.yaml").read_text()


def test_layouts_of_samples_are_edited_and_sampled_again(layout_logs, tmp_path):
    """The file that get_samples.py writes is one that edit_layout.py reads, and the other way round."""
    given = [
        {"name": "a", "boxes": [[0.1, 0.2, 0.5, 0.7]], "classes": ["disc"], "colors": ["red"]},
        {"name": "b", "boxes": [[0.0, 0.5, 0.5, 1.0]], "classes": ["bow"], "colors": ["green"]},
    ]
    (tmp_path / "mine.json").write_text(json.dumps(given))
    quick = f"--logs_root {layout_logs} --load_dir layout --no_amp --device cpu --sample_steps 2 --save_individually"
    call("experiments/get_samples.py", f"{quick} --layouts {tmp_path / 'mine.json'} --n_samples 2 --log_dir drawn")
    images = " ".join(map(str, sorted((layout_logs / "drawn" / "images").glob("*.png"))))
    beside = layout_logs / "drawn" / "layouts.json"
    flags = f"{MODEL} --image {images} --layouts {beside} --sample_steps 2 --log_dir moved"
    edit(layout_logs, flags, ["move 0 by 0.6 0"])  # beyond the image, which the layouts are clipped to
    (first, second) = json.loads((layout_logs / "moved" / "layouts.json").read_text())
    assert first["boxes"] == [pytest.approx([0.7, 0.2, 1, 0.7])] and second["boxes"] == [
        pytest.approx([0.6, 0.5, 1, 1])
    ]
    assert (first["classes"], first["colors"], second["classes"]) == (["disc"], ["red"], ["bow"])
    moved = layout_logs / "moved" / "layouts.json"
    call("experiments/get_samples.py", f"{quick} --layouts {moved} --n_samples 2 --log_dir redrawn")
    again = json.loads((layout_logs / "redrawn" / "layouts.json").read_text())
    assert again == [first, second]


@pytest.mark.parametrize(
    ("flags", "edits", "expected"),
    [
        ("--n_images 2", ["move 70 0 0 1 1"], "but val_"),
        ("--n_images 2", [], "got no --edit, wanted for example 'remove REGION'; regions of val_"),
        ("--n_images 2 --layouts {layouts}", [], ": 0 red disc"),
        ("--n_images 2", ["move 0 by 0 0"], "leaves the layout of val_"),
        ("--n_images 2", ["add cat red 0 0 1 1"], "unknown class 'cat'"),
        ("--image {picture}", ["remove 0"], "pass --layouts FILE.json"),
        ("--layouts a.json --condition_file {rows}", ["remove 0"], "got --layouts and --condition_file"),
        ("--n_images 2 --margin -1", ["remove 0"], "margin -1"),
    ],
)
def test_invalid_settings_are_refused_in_one_line(layout_logs, tmp_path, capsys, flags, edits, expected):
    Image.new("RGB", SIZE).save(tmp_path / "a.png")
    (tmp_path / "rows.json").write_text('[{"boxes": [[0, 0, 1, 1]], "box_class": [0], "box_color": [0]}]')
    (tmp_path / "layouts.json").write_text('[{"boxes": [[0, 0, 1, 1]], "classes": ["disc"], "colors": ["red"]}]')
    files = {"picture": tmp_path / "a.png", "rows": tmp_path / "rows.json", "layouts": tmp_path / "layouts.json"}
    with pytest.raises(SystemExit) as stop:
        edit(layout_logs, f"{MODEL} --log_dir refused {flags.format(**files)}", edits)
    assert stop.value.code == 2 and not (layout_logs / "refused").exists()
    assert expected in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_models_without_boxes_are_refused(trained_ddpm, capsys):
    with pytest.raises(SystemExit) as stop:
        edit(trained_ddpm, "--sampler ddpm --n_images 1", ["remove 0"])
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and "reads no boxes: pass a run with --conditions layout" in message


# A network that draws what its layout says


def level(number):
    """The grey level of a class."""
    return 100 + 10 * number


@pytest.fixture
def painter(layout_logs, monkeypatch):
    """The page's model with a network that paints each class in its level."""

    def paint(self, network, x, t, condition):
        regions = condition.regions
        front = regions.front(*x.shape[2:], "nearest")  # (B, H, W)
        classes = torch.nn.functional.pad(regions.class_ids, (1, 0))  # front is -1 where there is no region
        numbers = classes.gather(1, front.flatten(1) + 1).view_as(front)
        levels = torch.where(front >= 0, level(numbers), BACKGROUND).unsqueeze(1).expand_as(x)
        return levels / 127.5 - 1

    monkeypatch.setattr(GaussianSampler, "predict", paint)
    trained, options = load(layout_logs), Sampling(sample_steps=3)
    return Playground(trained, options, trained.condition_source(options))


def noise():
    return torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def covered(*box):
    return changed_pixels([box], SIZE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("move 0 0.5 0.5 1 1", [((0, 0, 0.5, 0.5), BACKGROUND), ((0.5, 0.5, 1, 1), level(2))]),
        ("remove 0", [((0, 0, 0.5, 0.5), BACKGROUND)]),
        ("add ring red 0.5 0 1 0.5", [((0.5, 0, 1, 0.5), level(4))]),
        ("relabel 0 ring", [((0, 0, 0.5, 0.5), level(4))]),
    ],
)
def test_the_boxes_show_the_new_layout_and_the_rest_is_kept(painter, text, expected):
    before = (Region((0.0, 0.0, 0.5, 0.5), 2, 0), Region((0.0, 0.75, 0.25, 1.0), 3, 0))
    layout, image = apply_edits(before, [parse_edit(text, painter.layout_names)]), noise()
    request = Request(options=painter.options, count=2)
    batch = painter.edit_layout(request, image, layout)
    for result in batch["image"]:
        shown = image.clone()
        for box, grey in expected:
            shown[:, covered(*box)] = grey
        assert torch.equal(result, shown)


def test_a_layout_is_sampled_and_an_unchanged_one_is_not_edited(painter):
    layout = (Region((0.0, 0.0, 0.5, 0.5), 2, 0), Region((0.25, 0.25, 1.0, 1.0), 3, 0))  # the later one is in front
    image = painter.sample(Request(options=painter.options, layout=layout))["image"][0]
    shown = torch.full_like(image, BACKGROUND)
    shown[:, covered(0.0, 0.0, 0.5, 0.5)] = level(2)
    shown[:, covered(0.25, 0.25, 1.0, 1.0)] = level(3)
    assert torch.equal(image, shown)
    with pytest.raises(ValueError, match="no box has changed"):
        painter.edit_layout(Request(options=painter.options), image, apply_edits(layout, []))


def test_layouts_of_the_data_and_empty_ones(painter):
    items = painter.trained.batches("val")
    position = 5
    assert painter.draw_layout(position) == read_layout(
        {name: items[[position]][name][0] for name in ("boxes", "box_class", "box_color")}
    )
    image = painter.sample(Request(options=painter.options, layout=()))["image"]
    assert (image == BACKGROUND).all()


@pytest.mark.slow
def test_codes_outside_the_boxes_never_change(tmp_path, monkeypatch):
    """A cell of codes that a box touches in part is drawn anew; the others keep their codes, and their pixels."""
    shapes = SHAPES.replace("--conditions", "--log_dir layout --conditions")
    call("train_vqgan.py", f"--logs_root {tmp_path} --dataset shapes --shapes_count 20 --train_steps 4 {VQGAN} {GAN}")
    call("train_sampler.py", f"--logs_root {tmp_path} {shapes} {SAMPLER} --train_steps 2 --no_amp")
    starts, sample = [], TrainedSampler.draw

    def record(self, *args, edit, **keywords):
        batch = sample(self, *args, edit=edit, **keywords)
        starts.append((edit, batch))
        return batch

    monkeypatch.setattr(TrainedSampler, "draw", record)
    flags = "--dataset shapes --load_dir layout --n_images 2 --sample_steps 2"
    edit(tmp_path, f"{flags} --log_dir pasted --margin 1", ["add disc red 0.3 0.3 0.45 0.45"])
    (start, batch), kept = starts[0], torch.ones(2, 4, 4, dtype=torch.bool)
    kept[:, :3, :3] = False  # cell (1, 1), and one around it
    assert torch.equal(start.keep, kept) and torch.equal(batch["codes"][kept], start.x0[kept])
    results = read_results(tmp_path / "pasted")
    assert results["redrawn_share"] == pytest.approx(9 / 16) and results["outside"] == "copied from the input"
    assert results["change_outside"] > 0  # as rendered by the decoder
    for number, image in enumerate(load_input_images((), 2, load(tmp_path, sampler="absorbing")).image):
        result = pixels(next((tmp_path / "pasted" / "images").glob(f"00{number}_*.png")))
        assert torch.equal(result[:, 12:], image[:, 12:]) and torch.equal(result[:, :, 12:], image[:, :, 12:])
