"""calc_approximate_ELBO.py for other models of codes (exact, continuous time), and for interrupted runs."""

import json

import matplotlib.figure
import pytest
import torch

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.metrics.decoder_likelihood import TrainedHead
from helpers.tiny_runs import SAMPLER, call
from train.trained_sampler import TrainedSampler

SCRIPT = "experiments/calc_approximate_ELBO.py"
SIZES = SAMPLER.replace(" --sample_steps 4", "")
HEAD = "--train_steps 3 --train_batch_size 4 --steps_per_eval 2"
RUNS = {  # flags for training, and flags for measuring
    "autoregressive": ("--sampler autoregressive --log_dir causal", "--sampler autoregressive --load_dir causal"),
    "continuous": ("--total_steps None --log_dir continuous", "--load_dir continuous"),
}


@pytest.fixture(scope="module")
def logs(trained):
    for flags, _ in RUNS.values():
        call("train_sampler.py", f"--logs_root {trained} --train_steps 2 --no_amp {SIZES} {flags}")
    return trained


@pytest.fixture
def measure(logs):
    """measure(run, log_dir, flags): the results of the script's run in a folder."""

    def run_script(run, log_dir, flags=""):
        command = f"{RUNS[run][1]} --n_images 7 --batch_size 2 --no_amp {HEAD} --log_dir {log_dir} {flags}"
        call(SCRIPT, f"--logs_root {logs} {command}")
        return json.loads((logs / log_dir / "results.json").read_text())

    return run_script


def bound_of(logs, model, calls=None):
    trained = load_model(model, OutputConfig(logs_root=str(logs), amp=False))
    return trained.log_likelihood(trained.batches("val")[list(range(7))], 0, calls)


def test_autoregressive_likelihood_is_exact(measure, logs, capsys):
    report = measure("autoregressive", "elbo_causal")
    total = bound_of(logs, ModelConfig(sampler="autoregressive", load_dir="causal")).total.double()
    assert report["value"] == pytest.approx(total.mean().item(), abs=1e-5)
    assert report["standard_error"] == pytest.approx(total.std().item() / 7**0.5, abs=1e-5)
    assert (report["method"], report["calls"], report["terms"], report["terms_of"]) == ("exact", 1, [], None)
    assert report["decoder"] is None and report["prior"] == 0
    assert report["bits_per_dim"] > report["decoder_bits_per_dim"]  # includes the bits of the codes
    out = capsys.readouterr().out
    assert "val split, 7 images, exact\n" in out and "bits per dimension" in out and "terms" not in out
    assert {path.name for path in (logs / "elbo_causal").iterdir()} == {"config.yaml", "results.json"}
    repeated = measure("autoregressive", "elbo_causal_calls", "--calls 3 --seed 5")  # nothing is random
    assert (repeated["value"], repeated["standard_error"]) == (report["value"], report["standard_error"])


def test_continuous_time_terms_are_by_number_of_masked_codes(measure, logs, capsys, monkeypatch):
    panels, subplots = [], matplotlib.figure.Figure.subplots
    monkeypatch.setattr(
        matplotlib.figure.Figure, "subplots", lambda figure: panels.append(subplots(figure)) or panels[-1]
    )
    report = measure("continuous", "elbo_continuous", "--no_decoder --calls None")
    bound = bound_of(logs, ModelConfig(load_dir="continuous"))
    assert report["terms"] == pytest.approx(bound.terms.double().mean(0).tolist(), abs=1e-5)
    assert len(report["terms"]) == report["calls"] == 16 and report["terms_of"] == "number of masked codes"
    assert sum(report["terms"]) == pytest.approx(report["value"], abs=1e-5)
    assert report["method"] == "variational bound" and report["decoder"] is None
    assert all(term == pytest.approx(report["value"] / 16, rel=0.5) for term in report["terms"])  # an untrained model
    (panel,) = panels
    (stairs,) = panel.patches
    assert stairs.get_data().edges.tolist() == [
        k + 0.5 for k in range(17)
    ]  # the stair of k masked codes is centred on k
    assert stairs.get_data().values.tolist() == pytest.approx(report["terms"])
    assert panel.get_xlabel() == "number of masked codes" and panel.get_ylabel() == "term (bits per code)"
    out = capsys.readouterr().out
    assert "16 of 16 terms" in out and "reconstruction term" not in out and "terms.png" in out
    few = measure("continuous", "elbo_continuous_few", "--no_decoder --calls 6")
    assert few["calls"] == 6 and few["terms"][:3] == pytest.approx(report["terms"][:3], abs=1e-5)


def test_discrete_time_terms_are_plotted_over_t(logs, monkeypatch):
    panels, subplots = [], matplotlib.figure.Figure.subplots
    monkeypatch.setattr(
        matplotlib.figure.Figure, "subplots", lambda figure: panels.append(subplots(figure)) or panels[-1]
    )
    call(SCRIPT, f"--logs_root {logs} --n_images 2 --calls 3 --no_amp --no_decoder --log_dir elbo_steps")
    report = json.loads((logs / "elbo_steps" / "results.json").read_text())
    (stairs,) = panels[0].patches
    assert report["terms_of"] == "times" and panels[0].get_xlabel() == "t"
    assert stairs.get_data().edges.tolist() == pytest.approx([k / 256 for k in range(257)])
    assert report["decoder"] == report["terms"][0]


class InterruptedLikelihood:
    """Computes likelihoods until interrupted after `after` batches; records their positions."""

    def __init__(self, monkeypatch, after=None):
        self.requested, self.after, self.score = [], after, TrainedSampler.log_likelihood
        monkeypatch.setattr(TrainedSampler, "log_likelihood", lambda model, *args: self(model, *args))

    def __call__(self, model, batch, *args):
        if len(self.requested) == self.after:
            raise KeyboardInterrupt
        self.requested.append(batch["position"].tolist())
        return self.score(model, batch, *args)


@pytest.mark.parametrize("run", RUNS)
def test_an_interrupted_run_resumes_to_the_same_report(measure, logs, monkeypatch, run):
    uninterrupted = measure(run, f"elbo_{run}_whole", "--calls 5")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        InterruptedLikelihood(patch, after=2)
        measure(run, f"elbo_{run}_cut", "--calls 5")
    assert stop.value.code == 130 and not (logs / f"elbo_{run}_cut" / "results.json").exists()
    recorder = InterruptedLikelihood(monkeypatch)
    resumed = measure(run, f"elbo_{run}_cut", "--calls 5")
    assert recorder.requested == [[4, 5], [6]]
    for report in (resumed, uninterrupted):
        del report["run"]["output"]["log_dir"]
    assert resumed == uninterrupted  # exactly
    assert not (logs / f"elbo_{run}_cut" / ".kept").exists()


@pytest.mark.slow
def test_a_head_trained_further_before_resuming_measures_all(measure, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        InterruptedLikelihood(patch, after=2)
        measure("autoregressive", "elbo_head_between", "--head_dir head_between")
    longer = HEAD.replace("--train_steps 3", "--train_steps 5")
    requested, bits = [], TrainedHead.bits_per_dim
    monkeypatch.setattr(
        TrainedHead,
        "bits_per_dim",
        lambda head, codes, images: requested.append(len(codes)) or bits(head, codes, images),
    )
    report = measure("autoregressive", "elbo_head_between", f"--head_dir head_between {longer}")
    assert requested == [2, 2, 2, 1] and report["head"]["step"] == 5


def test_another_experiment_in_the_same_folder_is_refused(measure, capsys):
    measure("autoregressive", "elbo_refused", "--no_decoder")
    with pytest.raises(SystemExit) as stop:
        measure("autoregressive", "elbo_refused", "--no_decoder --n_images 8")
    assert stop.value.code == 2 and "--n_images 7 -> 8" in capsys.readouterr().err


def test_the_whole_validation_split_is_the_default(logs):
    flags = f"{RUNS['autoregressive'][1]} --batch_size 200 --no_amp --no_decoder --log_dir elbo_all"
    call(SCRIPT, f"--logs_root {logs} {flags}")
    report = json.loads((logs / "elbo_all" / "results.json").read_text())
    trained = load_model(ModelConfig(sampler="autoregressive", load_dir="causal"), OutputConfig(logs_root=str(logs)))
    codes = trained.batches("val")
    totals = torch.cat([trained.log_likelihood(codes[[k]]).total for k in range(0, 359, 7)])
    assert report["n_images"] == len(codes) == 359
    assert report["value"] == pytest.approx(
        totals.double().mean().item(), abs=4 * totals.std().item() / len(totals) ** 0.5
    )
