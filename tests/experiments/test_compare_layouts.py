"""The comparison of ways to give a layout: equal networks, resumed runs, guided arms, figures and their errors."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments import compare_layouts
from experiments.compare_layouts import LayoutComparison, accuracy_of, compare_arms, table_rows
from experiments.metrics.layout import arms, bench, comparison
from experiments.metrics.layout.arms import ARMS, match_parameters, pixel_runs
from experiments.metrics.layout.bench import Bench, Run, count_seeds, ordered_runs
from helpers.tiny_runs import ROOT, call, parse_config
from train.config import DataConfig, SamplingConfig
from train.data.loading import ImageSource
from train.datasets import shapes
from train.distributed import DistContext
from train.samplers import ddpm
from train.spaces import PixelSpace
from train.trained_sampler import TrainedSampler

pytestmark = pytest.mark.usefixtures("tiny_judges")
SCRIPT = "experiments/compare_layouts.py"
DATA = "--dataset shapes --img_size 16 --shapes_count 24"
TINY = (
    f"{DATA} --sampler ddpm --channels 8 --channel_mults 1 2 --res_blocks 1 "
    "--attn_factors 2 --heads 1 --total_steps 20 --train_steps 2 --batch_size 4 --sample_steps 2 --no_amp "
    "--n_images 10 --min_judge 0 --parameter_tolerance 0.4"
)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A folder for runs and judges, which are trained once."""
    return tmp_path_factory.mktemp("logs")


def compare(logs: Path, flags: str, name: str) -> dict:
    call(SCRIPT, f"--logs_root {logs} --log_dir {name} {TINY} {flags}")
    return json.loads((logs / name / "results.json").read_text())


def refused(logs: Path, flags: str, capfd) -> str:
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"--logs_root {logs} {TINY} {flags}")
    assert stop.value.code == 2
    return re.sub(r"[\s│╭╰╮╯─]+", " ", capfd.readouterr().err)  # without frame and line breaks


def test_each_run_is_trained_measured_and_shown_once(logs, trained_names, monkeypatch, capsys):
    drawn, loaded, draw = {}, {}, TrainedSampler.draw

    def record(model, indices, seed, options, conditions, **kwargs):
        drawn.setdefault((str(model.run), options.guidance), []).append(conditions)
        if (weights := logs / "a" / f"{model.run}.safetensors").is_file():  # later than the check of its settings
            saved, used = load_file(weights), model.sampler.network.state_dict()
            loaded[str(model.run)] = saved.keys() == used.keys() and all(torch.equal(saved[k], used[k]) for k in used)
        return draw(model, indices, seed, options, conditions, **kwargs)

    monkeypatch.setattr(TrainedSampler, "draw", record)
    flags = "--arms none map --seeds map=2 --guided_arms 1 --generated_at_once 6"
    results = compare(logs, flags, "a")
    out, folder = capsys.readouterr().out, logs / "a"
    assert trained_names == ["none_0", "map_0", "map_1"]
    assert loaded == dict.fromkeys(trained_names, True)
    guided = ["map_0_guidance_2", "map_1_guidance_2"]  # what has no layout is never the best
    assert list(results["measured"]) == [*trained_names, *guided]
    run = results["trained"]["map_1"]
    assert (run["arm"], run["seed"], run["steps"]) == ("map", 1, 2) and run["minutes"] > 0
    assert run["settings"]["layout_colors"] == 6 and run["settings"]["layout_classes"] == 10
    figures = results["measured"]["map_0"]["figures"]
    assert figures.keys() == {"all", "small", "occluded", "contact", "overlap"}
    assert {"crop accuracy", "colour", "AP50", "spurious", "crop FD", "mIoU"} <= figures["all"].keys()
    assert results["yardsticks"]["real scenes"]["all"]["colour"] > 0.9
    assert results["yardsticks"]["real scenes, wrong layouts"]["all"]["colour"] < 0.5
    table = (folder / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:7]] == [
        *("real scenes", "none", "map", "map", "real scenes, wrong layouts")
    ]  # fmt: skip
    assert "real scenes" in out and "± " in out and "standard error" in out
    with Image.open(folder / "layouts.png") as picture:
        assert picture.width == 12 + 5 * (160 + 12)  # the layout, three columns of samples, the real scenes
    asked = [[part["boxes"] for part in parts] for key, parts in drawn.items() if key[0] == "map_0"]
    asked = [torch.cat([boxes[..., 0].sum(1) for boxes in parts]) for parts in asked]  # of left sides
    dataset, items = shapes.build(shapes.Config(), "val"), np.load(folder / "map_0.npz")["held_out"]
    left = [dataset.read_at_size(int(item), (16, 16))["boxes"][:, 0].sum() / 16 for item in items]
    assert len({*items.tolist()}) == 10 and all(torch.allclose(each, torch.stack(left)) for each in asked)
    flags = f"{DATA} --min_judge 0 --samples {folder / 'map_0.npz'} --log_dir again"
    call("experiments/calc_layout.py", f"--logs_root {logs} {flags}")
    again = json.loads((logs / "again" / "results.json").read_text())["figures"]["samples"]
    assert again == figures and (logs / "again" / "layouts_samples.png").is_file()


def test_a_comparison_resumes_with_what_is_missing(logs, trained_names, monkeypatch, capsys):
    flags = "--arms class_map --guided_arms 0"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Bench, "sample", lambda *args: exec("raise KeyboardInterrupt"))
        compare(logs, flags, "b")
    assert trained_names == ["class_map_0"]
    first = compare(logs, flags, "b")
    assert trained_names == ["class_map_0"] and list(first["measured"]) == ["class_map_0"]
    capsys.readouterr()
    more = compare(logs, "--arms class_map per_object --seeds per_object=1 --guided_arms 0", "b")
    assert trained_names == ["class_map_0", "per_object_0"]
    assert more["measured"]["class_map_0"] == first["measured"]["class_map_0"]
    monkeypatch.setattr(Bench, "sample", lambda *args: pytest.fail("sampled again"))
    table = capsys.readouterr().out.split("\n\n", 1)[1]
    compare(logs, "--arms class_map per_object --seeds per_object=1 --guided_arms 0", "b")
    assert capsys.readouterr().out.split("\n\n", 1)[1] == table and len(trained_names) == 2


def test_other_settings_of_an_arm_are_refused(logs, monkeypatch, capfd):
    compare(logs, "--arms class_map --guided_arms 0", "c")
    changed = ARMS["class_map"]._replace(options={"layout_places": True})
    monkeypatch.setitem(ARMS, "class_map", changed)
    error = refused(logs, "--log_dir c --arms class_map --guided_arms 0", capfd)
    assert "class_map_0 with other settings" in error and "--no_layout_places -> --layout_places" in error
    assert "--train_steps 2 -> 3" in refused(logs, "--log_dir c --arms class_map --train_steps 3", capfd)


def test_training_and_evaluation_take_their_own_kinds(logs, monkeypatch):
    kinds, sample, load = {}, Bench.sample, comparison.load_judges

    def record(bench, *args):
        kinds["train"] = bench.train_images.dataset.config.shapes_kinds
        kinds["held out"] = bench.held_out.source.dataset.config.shapes_kinds
        return sample(bench, *args)

    def record_judges(source, *args):
        kinds["judges"] = source.dataset.config.shapes_kinds
        return load(source, *args)

    monkeypatch.setattr(Bench, "sample", record)
    monkeypatch.setattr(comparison, "load_judges", record_judges)
    compare(logs, "--arms none --shapes_kinds free small --eval_kinds nested occlusion", "d")
    assert kinds["train"] == ("free", "small") and kinds["held out"] == ("nested", "occlusion")
    assert kinds["judges"] == ("free", "small", "nested", "occlusion")


def test_what_cannot_be_compared_is_refused(logs, capfd):
    messages = {
        "--arms mapp": "got arms ['mapp'], wanted one or more of none, class_map, map",
        "--arms codes": "and codes beside them",
        "--seeds map": "got 'map' in seeds, wanted ARM=COUNT",
        "--seeds map=0": "got 'map=0' in seeds",
        "--arms map --conditions layout": "got conditions ('layout',), but every arm has settings of its own",
        "--arms map --guidance 2": "got guidance 2, but layouts are held-out ones",
        "--arms map --condition_drop 0": "pass --guided_arms 0",
        "--arms map --load_dir x": "leave --load_dir, --hooks, --resume out",
        "--arms map --n_images 1001": "the validation split has 1000: pass --n_images N",
        "--arms map --eval_kinds nestd": "--eval_kinds: got shapes_kinds nestd, wanted some of free",
        "--arms per_object_places --parameter_tolerance 0.0001": "parameters, wanted",
    }
    for flags, message in messages.items():
        assert message in refused(logs, flags, capfd), flags
    assert "wanted ddpm" in refused_sampler(logs, capfd)
    assert not list(logs.glob("compare_layouts*"))


def refused_sampler(logs: Path, capfd) -> str:
    with pytest.raises(SystemExit):
        call(SCRIPT, f"--logs_root {logs} --dataset shapes --img_size 16 --sampler absorbing")
    return capfd.readouterr().err


def test_kinds_need_data_that_have_them():
    with pytest.raises(ValueError, match="whose scenes have no kinds: leave it out"):
        compare_layouts.with_kinds(compare_layouts.DatasetConfig(), ["nested"])


# Equal networks


def preset_bench(monkeypatch, tmp_path) -> Bench:
    """A bench with the networks of the preset."""
    preset = ROOT / "configs" / "shapes_layouts.yaml"
    flat = parse_config(SCRIPT, f"--config {preset} --logs_root {tmp_path}", monkeypatch)
    names = ("channels", "channel_mults", "res_blocks", "attn_factors", "heads", "prediction", "variance")
    values = {name: tuple(flat[name]) if isinstance(flat[name], list) else flat[name] for name in names}
    data = DataConfig(dataset="shapes", img_size=flat["img_size"], n_channels=flat["n_channels"])
    source = ImageSource(shapes.build(shapes.Config(), "train"), data)
    world = DistContext(torch.device("cpu"))
    training = compare_layouts.BriefTrainingConfig()
    sampler = ddpm.Config(sampler="ddpm", **values)
    return Bench(sampler, data, shapes.Config(), training, SamplingConfig(), source, None, None, world, 1)


def test_the_arms_of_the_preset_have_equal_networks(monkeypatch, tmp_path):
    bench = preset_bench(monkeypatch, tmp_path)
    runs = pixel_runs(bench, list(ARMS), 0.05)  # ValueError beyond
    counts = {name: bench.count(run.settings, run.space) for name, run in runs.items()}
    assert 1.8e6 < counts["none"] < 2.1e6
    assert max(counts.values()) / min(counts.values()) < 1.06
    for name, run in runs.items():
        fields = bench.build(run.settings, run.space).conditions
        assert ("box_color" in fields) == (name != "none"), name
    wide = arms.pixel_settings(bench.sampler, ARMS["box_tokens"], bench.train_images.dataset)(96)
    assert bench.count(wide, runs["none"].space) > 1.3 * counts["none"]  # without narrower levels
    with pytest.raises(ValueError, match=r"got box_tokens 1,\d{3},\d{3} parameters, wanted"):
        arms.check_parameters({"none": counts["none"], "box_tokens": 1_000_000}, counts["none"], 0.05)


def test_all_random_numbers_of_a_run_are_of_its_seed(monkeypatch, tmp_path):
    tiny, seen = preset_bench(monkeypatch, tmp_path), []
    tiny = replace(tiny, training=replace(tiny.training, batch_size=4))

    def record(state, batches, step, *, seed, **options):
        seen.append((seed, step.training.seed, next(batches)[0]["image"], state.modules["network"].state_dict()))

    monkeypatch.setattr(bench, "fit", record)
    settings = arms.pixel_settings(tiny.sampler, ARMS["none"], tiny.train_images.dataset)(32)
    run = Run("none", 0, settings, PixelSpace(tiny.data), "none_0")
    for seed in (0, 1, 1):
        tiny.train(run.with_seed(seed), tmp_path / "weights.safetensors")
    first, second, again = seen
    assert [each[:2] for each in seen] == [(0, 0), (1, 1), (1, 1)]
    assert not torch.equal(first[2], second[2]) and torch.equal(second[2], again[2])
    assert any(not torch.equal(first[3][name], second[3][name]) for name in first[3])


def test_on_codes_the_map_of_the_decoder_is_joined(monkeypatch, tmp_path):
    bench = preset_bench(monkeypatch, tmp_path)
    of_unet, of_codes = (
        settings(bench.sampler, ARMS["map_decoder"], bench.train_images.dataset, *sizes)(32).condition_options
        for settings, sizes in ((arms.pixel_settings, ()), (arms.code_settings, (2, 2)))
    )
    assert of_unet.layout_into == "decoder" and of_codes == replace(of_unet, layout_into="input")


def test_on_codes_the_places_of_region_attention_come_with_a_map(monkeypatch, tmp_path):
    bench = preset_bench(monkeypatch, tmp_path)
    with_places, without = (
        arms.code_settings(bench.sampler, ARMS[name], bench.train_images.dataset, 2, 2)(32)
        for name in ("per_object_places", "per_object")
    )
    assert with_places.conditions == ("objects", "layout") and without.conditions == ("objects",)
    assert with_places.condition_options.layout_places and with_places.condition_options.layout_colors == 6


def test_the_nearest_number_of_parameters_is_chosen():
    def settings_of(width):
        return width  # stands for the settings

    def choose(wanted):
        return match_parameters(settings_of, range(1, 11), lambda width: 10 * width**2, wanted)

    assert [choose(wanted) for wanted in (0, 10, 24, 26, 91, 160, 1000, 5000)] == [1, 1, 1, 2, 3, 4, 10, 10]


def test_first_seeds_of_all_arms_come_first():
    assert count_seeds(["map=2", "none=3"], ARMS) == {"map": 2, "none": 3}
    order = ordered_runs(["none", "map", "per_object"], {"map": 2, "none": 3, "box_tokens": 9})
    assert order == [*(("none", 0), ("map", 0), ("per_object", 0)), ("none", 1), ("map", 1), ("none", 2)]


# Figures and their errors


def figures(accuracy: float | None, objects: int = 100) -> dict:
    row = {"crop accuracy": accuracy, "objects": objects, "colour": 0.5, "AP50": 0.25, "spurious": 1.0, "crop FD": 2.0}
    return {bucket: dict(row) for bucket in ("all", "small", "occluded", "contact", "overlap")}


def test_the_error_of_one_run_is_binomial():
    assert accuracy_of([figures(0.2)], "all") == pytest.approx((0.2, math.sqrt(0.2 * 0.8 / 100)))
    assert accuracy_of([], "all") is None and accuracy_of([figures(None)], "small") is None


def test_the_error_of_several_runs_is_the_larger_one():
    values = 0.2, 0.5, 0.8
    spread = accuracy_of([figures(value) for value in values], "overlap")
    assert spread == pytest.approx((0.5, np.std(values, ddof=1) / math.sqrt(3)))
    equal = accuracy_of([figures(0.5)] * 3, "overlap")
    assert equal == pytest.approx((0.5, math.sqrt(0.25 / 300)))


def test_better_means_by_more_than_two_standard_errors():
    error = math.hypot(*(math.sqrt(p * (1 - p) / 100) for p in (0.3, 0.4)))
    test = compare_arms([figures(0.4)], [figures(0.3)], "overlap")
    assert test["difference"] == pytest.approx(0.1) and test["standard_error"] == pytest.approx(error)
    assert not test["passed"] and "+0.100" in test["text"] and "not more than 2" in test["text"]
    assert compare_arms([figures(0.4, 1000)], [figures(0.3, 1000)], "overlap")["passed"]
    assert not compare_arms([figures(0.3, 1000)], [figures(0.4, 1000)], "overlap")["passed"]
    assert compare_arms([], [figures(0.3)], "overlap") is None


def test_the_best_arms_are_those_with_a_layout(tmp_path):
    rows = [("none", 0.9, 1), ("map", 0.5, 1), ("class_map", 0.2, 1), ("per_object", 0.8, 1), ("per_object", 0.1, 1)]
    rows += [("class_map", 0.99, 2), ("map on codes", 0.95, 1)]
    measured = {
        str(i): {"arm": arm, "guidance": guidance, "figures": figures(value)}
        for i, (arm, value, guidance) in enumerate(rows)
    }
    results = LayoutComparison(None, None, tmp_path, {"trained": {}, "measured": measured}, {})
    assert results.best_arms(["none", "class_map", "map", "per_object"]) == ["map", "per_object", "class_map"]


def test_the_table_has_a_row_for_each_arm_and_guidance():
    trained = {name: {"parameters": 2_000_000, "minutes": i} for i, name in enumerate(("none_0", "map_0", "map_1"), 1)}
    trained["map_on_codes_x_0"] = {"parameters": 1_900_000, "minutes": 9}
    measured = {
        name: {"arm": arm, "run": run, "seed": seed, "guidance": guidance, "figures": figures(0.5)}
        for name, arm, run, seed, guidance in (
            ("map_on_codes_x_0", "map on codes", "map_on_codes_x_0", 0, 1.0),
            ("map_1_guidance_2", "map", "map_1", 1, 2.0),
            ("map_1", "map", "map_1", 1, 1.0),
            ("map_0", "map", "map_0", 0, 1.0),
            ("none_0", "none", "none_0", 0, 1.0),
        )
    }
    yardsticks = {"real scenes": figures(1.0), "real scenes, wrong layouts": figures(None)}
    rows = table_rows(trained, measured, yardsticks)
    assert {len(row) for row in rows} == {len(rows[0])}
    assert [row[:5] for row in rows[2:-1]] == [
        ("none", "1", "1", "2,000,000", "1.0"),
        ("map", "1", "2", "2,000,000", "2.5"),
        ("map", "2", "1", "2,000,000", "3.0"),
        ("map on codes", "1", "1", "1,900,000", "9.0"),
    ]
    assert rows[1][5] == "1.000 ± 0.000" and rows[-1][5] == "-" and rows[3][5] == "0.500 ± 0.035"
    assert rows[1][-1] == "-"  # no mIoU here


@pytest.mark.slow
def test_the_best_arm_is_trained_on_codes_too(logs, trained_names):
    small = "--nf 4 --ch_mult 1 2 2 --emb_dim 4 --codebook_size 16 --batch_size 4 --img_size 16 --ndf 4 --disc_layers 1"
    flags = (
        f"--dataset shapes --shapes_count 24 {small} --train_steps 1 --perceptual_net none --steps_per_eval 0 --no_amp"
    )
    call("train_vqgan.py", f"--logs_root {logs} {flags} --log_dir vqgan")
    flags = "--arms map codes --ae_load_dir vqgan --guided_arms 0 --code_layers 1 --code_heads 1"
    results = compare(logs, flags, "e")
    assert trained_names[0] == "map_0" and trained_names[1].startswith("map_on_codes_") and len(trained_names) == 2
    counts = [each["parameters"] for each in results["trained"].values()]
    assert counts[1] == pytest.approx(counts[0], rel=0.4)
    assert results["trained"][trained_names[1]]["settings"]["conditions"] == ["layout"]
