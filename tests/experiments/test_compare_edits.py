"""The comparison of methods of editing, on tiny models: figures, cost, what is resumed, tables and the picture."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from experiments import compare_edits
from experiments.compare_edits import OWN, REAL, UNCHANGED, Method, changes_of, figures_of, parse_method, plan_methods
from experiments.harness import edit_methods, inversion
from experiments.harness.edit_methods import METHODS, Edited
from experiments.harness.editing import InputImages
from experiments.metrics.edit_tasks import ASKED, CLASS, COLOR, MOVE, OTHERS, Edits
from helpers.tiny_runs import DDPM, call
from train.samplers import LearnedSampler
from train.samplers.absorbing import AbsorbingSampler
from train.samplers.ddpm import GaussianSampler
from train.trained_sampler import TrainedSampler

LEARNED = "--train_steps 20 --lr 0.02 --warmup_iters 0 --ema_beta 0.5 --no_amp --steps_per_eval 0"  # conditions matter
DIGITS = "--sampler ddpm --n_images 3 --classes 2 --sample_steps 3 --guidance 2"


def compare(logs, flags):
    call("experiments/compare_edits.py", f"--logs_root {logs} --no_amp --device cpu {flags}")


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def edits_with(changes, n=4, regions=None):
    """Edits of n grey images of 4 x 4 pixels."""
    images = torch.arange(n * 16, dtype=torch.uint8).view(n, 1, 4, 4)
    inputs = InputImages(images, torch.zeros(n, 4, 4).bool(), ("a",) * n)
    texts = tuple(f"{i} {change}" for i in range(n) for change in changes)
    return Edits("class", inputs, ({},) * len(texts), texts, changes, lambda: None, regions)


def model_of(kind):
    """A model with the methods of a kind of sampler."""
    sampler = Mock(spec=kind)
    sampler.config = SimpleNamespace(sampler="some")
    return SimpleNamespace(sampler=sampler)


# Methods


def test_entries_name_methods_and_strengths():
    assert parse_method("flowedit") == Method("flowedit", 0.7) and str(Method("diffedit", 0.9)) == "diffedit 0.9"
    assert parse_method("sdedit:0.25") == Method("sdedit", 0.25)
    for entry in ("inversion", "sdedit:", "sdedit:2", "sdedit:0", "sdedit:nan", "auto:0.5", ""):
        with pytest.raises(ValueError, match="wanted NAME or NAME:STRENGTH"):
            parse_method(entry)


def test_auto_stands_for_all_methods_of_a_model():
    names = {kind: [each.name for each in plan_methods(("auto",), model_of(kind))] for kind in METHODS}
    assert names[GaussianSampler] == ["sdedit", "diffedit", "flowedit", "ddpm_inversion"]
    assert names[AbsorbingSampler] == ["sdedit", "diffedit"] and names[LearnedSampler] == ["sdedit"]
    gaussian = model_of(GaussianSampler)
    twice = plan_methods(("flowedit", "auto", "flowedit:0.5", "cyclediffusion"), gaussian)
    assert [str(each) for each in twice][:2] == ["flowedit 0.7", "sdedit 0.7"] and len(twice) == 6
    assert [str(each) for each in twice][-2:] == ["flowedit 0.5", "cyclediffusion 0.7"]
    with pytest.raises(ValueError, match="got method flowedit for sampler some, wanted sdedit or diffedit"):
        plan_methods(("flowedit",), model_of(AbsorbingSampler))


# Figures


def test_shares_have_errors_over_images():
    edits = edits_with((COLOR, CLASS, MOVE))
    asked = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0]).bool()
    figures = figures_of({ASKED: asked, OTHERS: torch.tensor([1.0, float("nan"), 0.5] * 4)}, edits)
    assert figures[ASKED]["value"] == 0.5 and figures[ASKED]["error"] == pytest.approx(1 / 6)  # of 2/3, 2/3, 2/3, 0
    assert figures[OTHERS] == 0.75
    assert [figures["of_change"][change]["value"] for change in (COLOR, CLASS, MOVE)] == [0.75, 0.75, 0]
    assert figures_of({ASKED: asked}, edits_with((CLASS,) * 3))["of_change"] == {}


def test_changes_are_measured_where_they_may_not_be():
    regions = torch.zeros(4, 4, 4).bool()
    regions[:, :2] = True
    edits, cost = edits_with((CLASS,), regions=regions), torch.tensor([[3.0, 0.5], [5.0, 1.5]] * 2)
    same = changes_of({"image": edits.originals, "mask": torch.zeros(4, 4, 4).bool(), "cost": cost}, edits)
    assert {same[name] for name in ("change", "masked", "outside_mask", "outside_thing")} == {0}
    assert (same["calls"], same["seconds"]) == (4, 1)
    image, mask = edits.originals.clone(), torch.zeros(4, 4, 4).bool()
    image[..., 3] += 51  # a fifth of the range in a quarter of the pixels
    mask[..., 2:] = True
    other = changes_of({"image": image, "mask": mask, "cost": cost}, edits)
    wanted = {"change": 0.05, "masked": 0.5, "outside_mask": 0, "outside_thing": 0.05}
    assert {name: other[name] for name in wanted} == pytest.approx(wanted)
    assert changes_of({"image": image, "mask": ~mask, "cost": cost}, edits)["outside_mask"] == pytest.approx(0.1)


# The command


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A model of classes of 8x8 digits."""
    logs = tmp_path_factory.mktemp("logs")
    call("train_sampler.py", f"--logs_root {logs} {DDPM} {LEARNED} --log_dir ddpm_digits", validation_images=4)
    return logs


@pytest.fixture(scope="module")
def digits(logs):
    """Results of all methods on a model of classes of digits."""
    compare(logs, f"{DIGITS} --log_dir compared")
    return logs / "compared"


def test_every_method_is_compared_on_classes(digits):
    results = read_results(digits)
    assert (results["by"], results["n_images"], results["n_edits"]) == ("class", 3, 6)
    methods = {each["method"]: each for each in results["methods"]}
    assert [*methods] == ["sdedit", "diffedit", "flowedit", "ddpm_inversion"]
    assert methods["diffedit"]["outside_mask"] == 0 < methods["diffedit"]["masked"] < 1
    assert "outside_mask" not in methods["flowedit"] and "outside_thing" not in methods["flowedit"]
    own = results["compared_with"][OWN][ASKED]["value"]
    for each in methods.values():
        assert 0 <= each[ASKED]["value"] <= 1 and each["change"] > 0 and each["calls"] > 0 and each["seconds"] > 0
        assert each["of_own"] == (each[ASKED]["value"] / own if own else None)
    assert {*results["compared_with"]} == {OWN, UNCHANGED, REAL} and len(results["asked"]) == 6
    assert results["compared_with"][UNCHANGED][ASKED]["value"] < results["compared_with"][REAL][ASKED]["value"]
    trips = results["round_trips"]
    assert [*trips] == ["fixed_point", "bdia", "ddpm"] and trips["ddpm"]["calls"] == 6
    assert all(trips[name]["latent_max"] < 1e-9 and trips[name]["pixels_max"] == 0 for name in ("bdia", "ddpm"))


def test_tables_and_the_picture_are_saved(digits, capsys):
    compare(digits.parent, f"{DIGITS} --log_dir compared")  # reports again
    out, page = capsys.readouterr().out, (digits / "table.md").read_text()
    for words in (
        "flowedit 0.7",
        "own samples",
        "network calls per image",
        "round trip",
        "6 edits of 3 held-out images",
    ):
        assert words in out and words in page
    with Image.open(digits / "compare_edits.png") as picture:
        assert picture.width > 6 * 160 and picture.height > 3 * 160  # original, 4 methods, own samples


def test_a_method_that_returns_its_input_changes_nothing(logs, monkeypatch, conditions):
    tasks, options, find = [], [], inversion.ddim_steps
    same = lambda task: tasks.append(task) or Edited(task.images, None)  # noqa: E731
    monkeypatch.setitem(METHODS[GaussianSampler], "flowedit", same)
    monkeypatch.setattr(inversion, "ddim_steps", lambda *args: options.append(args[1]) or find(*args))
    compare(logs, f"{DIGITS} --methods flowedit:0.5 --log_dir same")
    results = read_results(logs / "same")
    (row,), (task,), (samples,) = results["methods"], tasks, conditions
    assert (row["change"], row["calls"], row["strength"]) == (0, 0, 0.5)
    assert row[ASKED] == results["compared_with"][UNCHANGED][ASKED]
    assert task.settings.strength == 0.5 and task.indices == [0, 0, 1, 1, 2, 2]
    source, target = (side.conditions["label"] for side in (task.source, task.target))
    assert torch.equal(samples["label"], target) and (source != target).all() and torch.equal(source[::2], source[1::2])
    assert (task.target.options.guidance, task.source.options.guidance) == (2, 1)
    assert len(options) == 3 and all(each.guidance == 1 for each in options)  # the round trips


def test_an_interrupted_comparison_runs_no_method_again(logs, monkeypatch):
    runs = []

    def method(name):
        def edit(task):
            runs.append(name)
            if runs == ["flowedit", "sdedit"]:
                raise KeyboardInterrupt
            return Edited(task.images, None)

        return edit

    for name in ("flowedit", "sdedit"):
        monkeypatch.setitem(METHODS[GaussianSampler], name, method(name))
    flags = f"{DIGITS} --methods flowedit sdedit --log_dir again"
    with pytest.raises(SystemExit):
        compare(logs, flags)
    monkeypatch.setattr(TrainedSampler, "draw", None)  # the own samples are there too
    monkeypatch.setattr(TrainedSampler, "dry_run", None)
    compare(logs, flags)
    assert runs == ["flowedit", "sdedit", "sdedit"] and len(read_results(logs / "again")["methods"]) == 2
    assert not (logs / "again" / ".kept").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--methods raster", "got methods entry 'raster', wanted NAME or NAME:STRENGTH"),
        ("--classes 10", "got classes 10, wanted at most 9"),
        ("--changes move", "whose images are no drawn scenes"),
        ("--changes shape", "got changes shape, wanted some of color, class, move"),
        ("--methods flowedit:0.001", "wanted more noise than the least"),
    ],
)
def test_unsupported_comparisons_are_refused(logs, capsys, flags, expected):
    with pytest.raises(SystemExit) as stop:
        compare(logs, f"--sampler ddpm --n_images 2 {flags} --log_dir refused")
    assert stop.value.code == 2 and not (logs / "refused").exists()
    assert expected in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_codes_are_compared_without_round_trips(trained):
    compare(trained, "--n_images 2 --classes 1 --sample_steps 2 --log_dir compared_codes")
    results = read_results(trained / "compared_codes")
    assert [each["method"] for each in results["methods"]] == ["sdedit", "diffedit"]
    assert results["round_trips"] == {} and "round trip" not in (trained / "compared_codes" / "table.md").read_text()


def test_scenes_are_edited_by_their_layouts(tmp_path, tiny_judges, monkeypatch):
    boxes = "--conditions boxes --boxes_colors 6 --boxes_width 8 --attn_block_type transformer"
    data = "--dataset shapes --img_size 16 --shapes_count 8 --shapes_kinds large"
    flags = f"{DDPM.replace('--img_size 8', data)} {boxes} --no_amp --train_steps 1 --steps_per_eval 0 --log_dir run"
    call("train_sampler.py", f"--logs_root {tmp_path} {flags}")
    given, find = [], edit_methods.conditions_for
    monkeypatch.setattr(edit_methods, "conditions_for", lambda *args: given.append(find(*args)) or given[-1])
    options = "--methods sdedit flowedit --n_images 2 --sample_steps 2 --log_dir compared"
    compare(tmp_path, f"--sampler ddpm --dataset shapes --load_dir run {options}")
    target, source = (batch for batch, _ in given[-2:])
    differing = [name for name in ("box_color", "box_class", "boxes") if not torch.equal(target[name], source[name])]
    assert len(differing) == 3 and len(target["boxes"]) == 6
    results = read_results(tmp_path / "compared")
    row, _ = results["methods"]
    assert (results["by"], results["n_edits"]) == ("layout", 6) and {*row["of_change"]} == {COLOR, CLASS, MOVE}
    assert row["outside_thing"] > 0 and {ASKED, CLASS, COLOR, OTHERS} <= row.keys()
    assert results["compared_with"][REAL][COLOR]["value"] > 0.6 and {*results["judges"]} == {
        "crop classifier",
        "scene network",
    }
    assert "outside the thing" in compare_edits.report(results, tmp_path)
