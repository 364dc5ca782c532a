"""The comparison of a panoptic model's parts: what each arm has, resumed runs, tables and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiments import compare_panoptic
from experiments.compare_panoptic import ARMS, PanopticComparison, format_figure, format_figures, group_rows, table_rows
from experiments.metrics.layout.bench import Bench
from helpers.tiny_runs import UNET, call
from train.trained_sampler import TrainedSampler

pytestmark = pytest.mark.usefixtures("tiny_judges")
SCRIPT = "experiments/compare_panoptic.py"
MODEL = "--conditions text region_words --text_width 16 --text_layers 1"
TINY = (
    f"--dataset shapes --img_size 16 --shapes_count 24 --shapes_kinds large --sampler ddpm {UNET} {MODEL} "
    "--attn_block_type transformer --experts disc,square sky,sand --process flow --train_steps 2 --batch_size 4 "
    "--sample_steps 2 --no_amp --n_images 10 --min_judge 0"
)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A folder for runs and judges, which are trained once."""
    return tmp_path_factory.mktemp("logs")


def compare(logs: Path, flags: str, name: str) -> dict:
    call(SCRIPT, f"--logs_root {logs} --log_dir {name} {TINY} {flags}")
    return json.loads((logs / name / "results.json").read_text())


def refused(logs: Path, flags: str, capfd, model: str = MODEL) -> str:
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"--logs_root {logs} {TINY.replace(MODEL, model)} {flags}")
    assert stop.value.code == 2
    return re.sub(r"[\s│╭╰╮╯─]+", " ", capfd.readouterr().err)  # without frame and line breaks


def test_each_arm_is_a_part_of_the_model(logs, trained_names, monkeypatch, capsys):
    fields, draw = {}, TrainedSampler.draw

    def record(model, indices, seed, options, conditions, **kwargs):
        fields.setdefault(str(model.run), set()).update(conditions)
        assert options.guidance == 2
        return draw(model, indices, seed, options, conditions, **kwargs)

    monkeypatch.setattr(TrainedSampler, "draw", record)
    results = compare(logs, "--seeds experts=2 --guidance 2", "a")
    assert trained_names == ["text_0", "words_0", "experts_0", "router_0", "experts_1"]
    settings = {name: each["settings"] for name, each in results["trained"].items()}
    assert settings["text_0"]["conditions"] == ["text"]
    assert settings["words_0"]["conditions"] == settings["router_0"]["conditions"] == ["text", "region_words"]
    experts = {name: (len(each["experts"]), each["router_experts"]) for name, each in settings.items()}
    assert experts == {
        **{"text_0": (0, 0), "words_0": (0, 0), "experts_0": (2, 0), "experts_1": (2, 0)},
        **{"router_0": (0, 3)},
    }
    assert "panoptic" not in fields["text_0"]
    assert {"caption", "panoptic", "box_words"} <= fields["words_0"] & fields["experts_0"] & fields["router_0"]
    counts = {name: each["parameters"] for name, each in results["trained"].items()}
    assert counts["text_0"] == counts["words_0"] < counts["experts_0"] < counts["router_0"]
    check_files(results, logs / "a", capsys.readouterr().out)


def check_files(results: dict, folder: Path, out: str) -> None:
    """Checks the figures, the tables and the picture of a comparison of all arms."""
    groups = ["all", "disc, square", "sky, sand", "other classes"]
    figures = results["measured"]["experts_1_guidance_2"]["figures"]
    assert list(figures["maps"]) == groups and figures["FD"] > results["yardsticks"]["real scenes"]["FD"] > 0
    assert list(figures["maps"]["all"]) == ["regions", "class", "colour", "mIoU"]
    colors = {name: each["maps"]["all"]["colour"][0] for name, each in results["yardsticks"].items()}
    assert colors["real scenes"] > 0.9 and colors["real scenes, wrong maps"] < 0.5
    names = [line.split("|")[1].strip() for line in (folder / "table.md").read_text().splitlines() if "|" in line]
    rows = ["arm", "---", "real scenes", *ARMS, "real scenes, wrong maps"]
    assert names == 2 * rows and "standard error" in out and "mIoU, sky, sand" in out
    with Image.open(folder / "layouts.png") as picture:
        assert picture.width == 12 + 6 * (160 + 12)  # the map, four arms, the real scenes


def test_a_comparison_resumes_with_what_is_missing(logs, trained_names, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Bench, "sample", lambda *args: exec("raise KeyboardInterrupt"))
        compare(logs, "--arms words", "b")
    assert trained_names == ["words_0"]
    first = compare(logs, "--arms words", "b")
    assert trained_names == ["words_0"] and list(first["measured"]) == ["words_0"]
    capsys.readouterr()
    more = compare(logs, "--arms text words --seeds text=1", "b")
    assert trained_names == ["words_0", "text_0"] and more["measured"]["words_0"] == first["measured"]["words_0"]
    table = capsys.readouterr().out.split("\n\n", 1)[1]
    monkeypatch.setattr(Bench, "sample", lambda *args: pytest.fail("sampled again"))
    compare(logs, "--arms text words --seeds text=1", "b")
    assert capsys.readouterr().out.split("\n\n", 1)[1] == table and len(trained_names) == 2


def test_what_cannot_be_compared_is_refused(logs, capfd):
    messages = {
        "--arms wordz": "got arms ['wordz'], wanted one or more of text, words, experts, router",
        "--seeds experts": "got 'experts' in seeds, wanted ARM=COUNT",
        "--n_images 1001": "the validation split has 1000: pass --n_images N",
        "--guidance 2 --region_guidance 3": "got region_guidance, but maps are held-out ones",
        "--adapt mine.grey": "got adapt mine.grey, which comparisons do not apply",
        "--load_dir x": "leave --load_dir, --hooks, --resume out",
    }
    for flags, message in messages.items():
        assert message in refused(logs, flags, capfd), flags
    models = {
        "--conditions text": "got experts of groups of classes without a condition of regions",
        "--conditions region_words": "wanted captions and regions: pass --conditions text region_words",
    }
    for model, message in models.items():
        assert message in refused(logs, "", capfd, model), model
    assert not list(logs.glob("compare_panoptic*"))


def figures(value: float | None, error: float = 0.01) -> dict:
    of_group = {"regions": 5, "class": [value, error], "colour": None, "mIoU": [value, error]}
    return {"maps": {"all": of_group, "disc": of_group}, "FD": 2 * value}


def test_several_runs_have_their_deviation_one_that_of_images():
    assert format_figures([figures(0.5)]) == ["0.500 ± 0.010", "0.500 ± 0.010", "-", "1.000"]
    assert format_figure([figures(0.4), figures(0.6)], "disc", "mIoU") == f"0.500 ± {0.02**0.5:.3f}"
    assert format_figure([figures(0.5, None)], "all", "class") == "0.500"


def test_the_tables_have_a_row_for_each_arm():
    trained = {f"{arm}_0": {"parameters": 1000, "minutes": 2.0, "steps": 60} for arm in ("words", "text")}
    trained["text_1"] = {"parameters": 1000, "minutes": 4.0, "steps": 60}
    measured = {
        name: {"arm": name[:-2], "run": name, "seed": int(name[-1]), "guidance": 1.0, "figures": figures(0.5)}
        for name in ("text_1", "words_0", "text_0")
    }
    yardsticks = {"real scenes": figures(1.0), "real scenes, wrong maps": figures(0.1)}
    rows = table_rows(trained, measured, yardsticks)
    assert [row[:4] for row in rows[2:-1]] == [("text", "2", "1,000", "3.00"), ("words", "1", "1,000", "2.00")]
    groups = group_rows(measured, yardsticks)
    assert groups[0] == ("arm", "mIoU, disc", "class, disc") and len(groups) == 5  # discs have no colours here
    assert {len(row) for row in rows} == {8} and {len(row) for row in groups} == {3}


def test_the_distance_is_that_of_features_of_whole_images(monkeypatch):
    features = torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    judges = type("Judges", (), {"scenes": None})
    judged = type("Judged", (), {"measurement": type("Measurement", (), {"judges": judges})})
    monkeypatch.setattr(compare_panoptic, "scene_features", lambda network, images: images)
    comparison = PanopticComparison(None, judged, Path(), {}, {}, features)
    assert comparison.distance(features) == pytest.approx(0, abs=1e-6)
    assert comparison.distance(features + 1) == pytest.approx(4)
