"""compare_samplers.py: which solvers run, what is measured, and what is reused."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch

from diffusion.absorbing import AbsorbingDiffusion
from diffusion.autoregressive import Autoregression
from diffusion.edm import EDM
from diffusion.solvers import solvers_for
from experiments.compare_samplers import (
    SolverRun,
    expand_entries,
    format_report,
    load_or_start_results,
    mean_costs,
    parse_entry,
    plot,
    summarize_runs,
)
from experiments.harness.batches import ResumableBatches
from experiments.harness.results import write_results
from experiments.metrics.features import FeaturesConfig, load_features
from helpers.tiny_runs import call, run
from train.config import DataConfig

SCRIPT = "experiments/compare_samplers.py"
ABSORBING = solvers_for(AbsorbingDiffusion(2))
TINY = "--n_samples 6 --batch_size 4 --features pixels --no_amp"


def read_results(logs, name):
    return json.loads((logs / name / "results.json").read_text())


def test_entries_round_trip_through_their_string():
    expected = {
        "halton": SolverRun("halton", None),
        "halton:12": SolverRun("halton", 12),
        "halton:temp=0.9": SolverRun("halton", None, (("temp", "0.9"),)),
        "remask:8:remasking=cap,remask_eta=0.1": SolverRun("remask", 8, (("remasking", "cap"), ("remask_eta", "0.1"))),
    }
    for entry, solver_run in expected.items():
        assert parse_entry(entry) == solver_run and str(solver_run) == entry
    assert expected["halton"].series == expected["halton:12"].series == "halton"
    assert expected["halton:temp=0.9"].series == "halton temp=0.9"


BROKEN = ["", ":4", "halton:", "halton:0", "halton:-1", "halton:x", "halton:4:temp", "halton:4:", "a:4:t=1:2", "a:t=1,"]


@pytest.mark.parametrize("entry", [*BROKEN, "auto:4", "auto:temp=0.9", "a:4:t=1=2"])
def test_invalid_entries_are_refused(entry):
    with pytest.raises(ValueError, match="name:steps:key=value"):
        parse_entry(entry)


def test_entries_expand_to_unique_runs():
    runs = expand_entries(["a:9", "a", "first_hitting", "b:t=1"], [4, 9], ABSORBING, 16)
    assert list(map(str, runs)) == ["a:9", "a:4", "first_hitting", "b:4:t=1", "b:9:t=1"]


def test_auto_is_the_baseline_and_all_other_solvers():
    entries = list(map(str, expand_entries(["auto"], [4, 32], ABSORBING, 16)))
    assert entries[:5] == ["ancestral:256", "ancestral:4", "ancestral:32", "halton:4", "confidence:4"]
    assert entries[5:8] == ["remask:4", "remask:32", "first_hitting"]  # 16 codes have no use for 32 steps
    assert entries[8:] == ["discrete:4", "discrete:32"]  # other solvers
    assert "halton:32" in map(str, expand_entries(["halton"], [4, 32], ABSORBING, 16))  # named explicitly
    solvers = {name: entry for name, entry in solvers_for(EDM()).items() if name in ("ddpm", "heun")}
    assert list(map(str, expand_entries(["auto"], [5], solvers, 1))) == ["ddpm:250", "heun:5"]
    assert list(map(str, expand_entries(["auto"], [5], solvers_for(Autoregression(2)), 16))) == ["raster"]


def test_costs_are_per_batch_and_per_image():
    costs = torch.tensor([[3, 40, 8.0, 10], [5, 20, 2.0, 10], [4, 18, 2.0, 4]], dtype=torch.float64)
    assert mean_costs(costs) == {"calls_per_batch": 4, "evaluations_per_image": 3.25, "seconds_per_image": 0.5}


SETS = {
    "a:9/0": {"distance": 4.0, "calls_per_batch": 9, "evaluations_per_image": 9, "seconds_per_image": 1.0},
    "a:9/1": {"distance": 6.0, "calls_per_batch": 9, "evaluations_per_image": 9, "seconds_per_image": 3.0},
    "b:2:t=1/0": {"distance": 5.0, "calls_per_batch": 2, "evaluations_per_image": 2, "seconds_per_image": 0.5},
    "b:2:t=1/1": {"distance": 5.8, "calls_per_batch": 2, "evaluations_per_image": 2, "seconds_per_image": 0.5},
    "c/0": {"distance": 20.0, "calls_per_batch": 1, "evaluations_per_image": 1, "seconds_per_image": 0.1},
    "c/1": {"distance": 20.0, "calls_per_batch": 1, "evaluations_per_image": 1, "seconds_per_image": 0.1},
}
RUNS = [parse_entry(entry) for entry in ("a:9", "b:2:t=1", "c")]


def test_distances_are_relative_to_the_first_run():
    first, second, third = summarize_runs(SETS, RUNS)
    assert (first["distance"], first["relative"], first["seconds_per_image"]) == (5.0, 1.0, 2.0)
    assert second["relative"] == pytest.approx(1.08) and second["solver"] == "b t=1" and second["steps"] == 2
    assert third["relative"] == 4.0 and third["steps"] is None


def test_the_cheapest_solver_near_the_baseline_is_named(tmp_path):
    rows = summarize_runs(SETS, RUNS)
    rows.append(rows[1] | {"solver": "d", "distance": 5.0, "relative": 1.0, "evaluations_per_image": 8})
    comparison = type("Comparison", (), {"seeds": 2, "n_samples": 10})
    text = format_report({"metric": "FD(pixels)", "summary": rows}, comparison)
    assert "2 sets of 10 images per solver" in text and "b t=1 in 2 steps, 4 times as fast" in text
    assert "5.400 ± 0.566" in text and "1.080" in text
    assert "times as fast" not in format_report({"metric": "FD(pixels)", "summary": [rows[0], rows[2]]}, comparison)
    plot(tmp_path / "plot.png", rows, "FD(pixels)", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


SOLVERS = "ancestral:5 halton:2:temp=0.5 first_hitting confidence:3:choice_temp=2"
KEYS = ["ancestral:5", "halton:2:temp=0.5", "first_hitting", "confidence:3:choice_temp=2"]


def test_comparison_reports_distance_and_cost_and_resumes(trained, capfd):
    flags = f"--logs_root {trained} {TINY} --log_dir compared --guidance 1 --solvers {SOLVERS} --seeds 2"
    call(SCRIPT, flags)
    out, path = capfd.readouterr().out, trained / "compared" / "results.json"
    results = read_results(trained, "compared")
    assert list(results["sets"]) == [f"{key}/{seed}" for seed in (0, 1) for key in KEYS]
    first_hitting = results["sets"]["first_hitting/0"]
    assert (
        first_hitting["calls_per_batch"] == 16
        and 15 < first_hitting["evaluations_per_image"] <= 16
        and first_hitting["seconds_per_image"] > 0
    )
    assert results["sets"]["halton:2:temp=0.5/0"]["calls_per_batch"] == 2
    assert len({each["distance"] for each in results["sets"].values()}) == 8
    assert all(key.replace(":", "_") + f"_{seed}.png" in names(path.parent) for key in KEYS for seed in (0, 1))
    assert "compare_samplers.png" in names(path.parent) and ".kept" not in names(path.parent)
    assert "relative to ancestral" in out and "halton temp=0.5" in out

    unchanged, removed = results["sets"]["ancestral:5/0"], results["sets"].pop("confidence:3:choice_temp=2/1")
    unchanged["seconds_per_image"] = 1e6
    path.write_text(json.dumps(results))
    call(SCRIPT, flags)
    resumed = read_results(trained, "compared")
    assert resumed["sets"]["ancestral:5/0"] == unchanged  # not measured again
    assert resumed["sets"]["confidence:3:choice_temp=2/1"]["distance"] == pytest.approx(removed["distance"])
    assert resumed["summary"][0]["seconds_per_image"] > 1e5
    with pytest.raises(SystemExit):
        call(SCRIPT, f"{flags} --batch_size 3")
    assert "--batch_size 4 -> 3" in capfd.readouterr().err  # seconds and calls are of this batch size


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_an_interrupted_set_resumes(trained, monkeypatch):
    from train.trained_sampler import TrainedSampler

    flags = f"--logs_root {trained} {TINY} --solvers ancestral:3 --log_dir"
    call(SCRIPT, f"{flags} set_whole")
    draw, sampled_indices = TrainedSampler.draw, []

    def interrupted_draw(self, indices, *args, **kwargs):
        sampled_indices.append(indices)
        if len(sampled_indices) == 2:
            raise KeyboardInterrupt
        return draw(self, indices, *args, **kwargs)

    monkeypatch.setattr(TrainedSampler, "draw", interrupted_draw)
    with pytest.raises(SystemExit):
        call(SCRIPT, f"{flags} set_cut")
    call(SCRIPT, f"{flags} set_cut")
    assert sampled_indices == [[0, 1, 2, 3], [4, 5], [4, 5]]
    one, two = (read_results(trained, name)["sets"]["ancestral:3/0"] for name in ("set_whole", "set_cut"))
    assert one["distance"] == two["distance"] and one["evaluations_per_image"] == two["evaluations_per_image"]


def test_one_solver_is_measured_as_calc_fid_measures_it(trained):
    call(SCRIPT, f"--logs_root {trained} {TINY} --solvers halton:3:temp=0.7 --seed 5 --log_dir one")
    flags = "--solver halton --sample_steps 3 --temp 0.7 --seed 5 --log_dir one_fid"
    call("experiments/calc_FID.py", f"--logs_root {trained} {TINY} {flags}")
    distance = read_results(trained, "one")["sets"]["halton:3:temp=0.7/5"]["distance"]
    assert distance == pytest.approx(read_results(trained, "one_fid")["value"], rel=1e-9)


def test_only_sampling_is_timed(trained, monkeypatch):
    from experiments.metrics.features import pixels
    from train.trained_sampler import TrainedSampler

    clock, draw, build = SimpleNamespace(now=0.0), TrainedSampler.draw, pixels.build

    def with_duration(seconds, function):
        def timed(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)

        return timed

    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    monkeypatch.setattr(TrainedSampler, "draw", with_duration(8.0, draw))
    monkeypatch.setattr(pixels, "build", lambda device: with_duration(100.0, build(device)))
    call(SCRIPT, f"--logs_root {trained} {TINY} --batch_size 3 --solvers ancestral:1 --log_dir timed")
    assert read_results(trained, "timed")["sets"]["ancestral:1/0"]["seconds_per_image"] == pytest.approx(8 / 3)


@pytest.mark.parametrize("name", ["compare_samplers", "compare_quantizers", "compare_attention", "ablate"])
def test_all_commands_with_features_take_a_clip_folder(name):
    config = importlib.import_module(f"experiments.{name}").Config
    group = config.__dataclass_fields__["ablation" if name == "ablate" else "comparison"].type
    assert issubclass(group, FeaturesConfig)
    with pytest.raises(FileNotFoundError, match="none/config.json not found"):
        group(clip_dir="none").load(DataConfig(dataset="digits"), torch.device("cpu"))


def test_sets_of_another_clip_model_are_measured_again(tmp_path):
    """The hashes of its files tell, not the path."""
    features = load_features("pixels", torch.device("cpu"))
    own, other = (ResumableBatches(None, tmp_path, run={"files": {"clip_dir": letter * 64}}) for letter in "ab")
    write_results(tmp_path, load_or_start_results(features, own) | {"sets": {"ddim:4/0": {"distance": 1.0}}})
    assert {*load_or_start_results(features, own)["sets"]} == {"ddim:4/0"}
    for batches in (other, ResumableBatches(None, tmp_path)):
        assert load_or_start_results(features, batches)["sets"] == {}


def test_other_features_are_measured_again(trained):
    flags = f"--logs_root {trained} {TINY} --solvers ancestral:2 --log_dir other_features"
    call(SCRIPT, flags)
    path = trained / "other_features" / "results.json"
    results = read_results(trained, "other_features")
    path.write_text(json.dumps(results | {"features_version": 0, "sets": {"ancestral:2/0": {"distance": 0.0}}}))
    call(SCRIPT, flags)
    assert read_results(trained, "other_features")["sets"]["ancestral:2/0"]["distance"] > 0


@pytest.mark.slow
def test_every_gaussian_solver_is_measured(trained_ddpm, capfd):
    flags = f"--logs_root {trained_ddpm} --sampler ddpm {TINY} --log_dir solvers --steps 2"
    call(SCRIPT, f"{flags} --solvers ddpm:5 ddim dpmpp_2m unipc heun:3 --guidance 1")
    results = read_results(trained_ddpm, "solvers")["sets"]
    assert list(results) == ["ddpm:5/0", "ddim:2/0", "dpmpp_2m:2/0", "unipc:2/0", "heun:3/0"]
    assert results["heun:3/0"]["calls_per_batch"] == results["heun:3/0"]["evaluations_per_image"] == 5
    assert "relative to ddpm" in capfd.readouterr().out


@pytest.mark.slow
def test_two_processes_measure_what_one_does(trained):
    flags = f"--logs_root {trained} {TINY} --solvers ancestral:3 halton:2 --log_dir"
    call(SCRIPT, f"{flags} of_one")
    process = run(SCRIPT, f"{flags} of_two", processes=2)
    assert process.returncode == 0, process.stderr
    one, two = (read_results(trained, name)["summary"] for name in ("of_one", "of_two"))
    for mine, other in zip(one, two, strict=True):
        assert mine.keys() == other.keys()
        for key in ("distance", "relative", "calls_per_batch", "evaluations_per_image"):
            assert other[key] == pytest.approx(mine[key], rel=1e-6)


REFUSED = {  # flags -> words that the message must contain
    "--solvers ancestral:4 haltom:4": ["haltom", "halton"],
    "--solvers halton:0": ["'halton:0'", "name:steps"],
    "--solvers": ["no solvers", "--solvers"],
    "--solvers ancestral:4:choice_temp=2": ["--solvers ancestral:4:choice_temp=2", "choice_temp 2.0"],
    "--solvers ancestral:4:tempp=2": ["tempp"],
    "--solvers ancestral:4:temp=-1": ["--solvers ancestral:4:temp=-1", "temp"],
    "--solvers first_hitting:4": ["first_hitting takes 16 steps"],
    "--steps 0": ["steps (0,)", "--steps"],
    "--seeds 0": ["seeds 0", "--seeds"],
    "--n_samples 1": ["n_samples 1", "--n_samples"],
    "--solver halton": ["solver halton", "--solvers"],
    "--sample_steps 8": ["sample_steps 8", "--solvers"],
    "--choice_temp 2": ["choice_temp 2.0", "key=value"],
}


@pytest.mark.parametrize("flags", REFUSED)
def test_invalid_flags_are_refused_before_sampling(flags, trained, capfd):
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"--logs_root {trained} --log_dir compare_refused {flags}")
    message = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and "Traceback" not in message
    assert all(word in message for word in REFUSED[flags]), message
    assert not (trained / "compare_refused").exists()
