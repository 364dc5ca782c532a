"""Distances during training equal those of calc_FID and do not affect the weights."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from experiments.metrics import training_distance
from experiments.metrics.cmmd import cmmd
from experiments.metrics.features import pixels
from experiments.metrics.frechet import Statistics, frechet_distance
from experiments.metrics.kid import kernel_distance
from experiments.metrics.training_distance import eval_mode, sample_distance
from helpers.tiny_runs import DDPM, GAN, VQGAN, call
from train.config import DataConfig, LoggingConfig, SamplingConfig, TrainingConfig
from train.datasets import ArrayDataset
from train.distance_config import MEASURES
from train.distributed import DistContext
from train.logging import tensorboard_tag
from train.samplers import NotFiniteError

FD = "--FD_features pixels --steps_per_FD 2 --FD_samples 7 --FD_measures fd kid cmmd"
WEIGHTS = "checkpoints/step_00000004/model.safetensors"
OPTIMIZERS = "checkpoints/step_00000004/state.pt"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A pixel sampler and a VQGAN, each trained with and without distances, the sampler also without EMA."""
    logs = tmp_path_factory.mktemp("distance")
    ddpm = f"--logs_root {logs} --train_steps 4 --no_amp {DDPM} --dropout 0.1"
    vqgan = f"--logs_root {logs} --train_steps 4 --no_amp {VQGAN} {GAN}"
    call("train_sampler.py", f"{ddpm} {FD} --log_dir sampler_with")
    call("train_sampler.py", f"{ddpm} --log_dir sampler_without")
    call("train_sampler.py", f"{ddpm} {FD} --no_ema --log_dir plain_with")
    call("train_vqgan.py", f"{vqgan} {FD} --log_dir vqgan_with")
    call("train_vqgan.py", f"{vqgan} --log_dir vqgan_without")
    return logs


def logged(run, name):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sampler", "vqgan"])
def test_measuring_distances_does_not_change_training(logs, kind):
    one, other = (load_file(logs / f"{kind}_{way}" / WEIGHTS) for way in ("with", "without"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_measuring_distances_without_ema_changes_no_weights(logs):
    """Without EMA the trained network itself is measured."""
    one, other = (load_file(logs / run / WEIGHTS) for run in ("plain_with", "sampler_without"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize(("run", "flags"), [("sampler_with", "--ema"), ("plain_with", "--no_ema")])
def test_the_distance_equals_that_of_calc_fid(logs, run, flags):
    distances = logged(logs / run, "FD(pixels)/7_samples")
    assert list(distances) == [2, 4] and distances[2] != distances[4]
    model_flags = f"--logs_root {logs} --sampler ddpm --load_dir {run} --log_dir f_{run} {flags}"
    call("experiments/calc_FID.py", f"{model_flags} --n_samples 7 --sample_steps 4 --features pixels --no_amp --cmmd")
    results = json.loads((logs / f"f_{run}" / "results.json").read_text())
    assert distances[4] == pytest.approx(results["value"], rel=1e-5)
    kid, cmmd = (logged(logs / run, f"{name}(pixels)/7_samples")[4] for name in ("KD", "CMMD"))
    assert kid == pytest.approx(results["kernel"]["generated"]["mean"], rel=1e-5)
    assert cmmd == pytest.approx(results["cmmd"]["generated"], rel=1e-5)
    assert results["n_reference"] == 1438


@pytest.mark.slow
def test_reconstruction_distance_equals_that_of_calc_fid(logs):
    distances = logged(logs / "vqgan_with", "FD(pixels)/7_reconstructions")
    assert list(distances) == [2, 4]
    flags = "--bert_n_emb 16 --bert_n_head 2 --bert_n_layers 1 --train_steps 1 --no_amp --log_dir codes"
    call("train_sampler.py", f"--logs_root {logs} --sampler absorbing --ae_load_dir vqgan_with {flags}")
    model_flags = f"--logs_root {logs} --load_dir codes --log_dir f_codes --no_amp"
    call("experiments/calc_FID.py", f"{model_flags} --n_samples 7 --sample_steps 1 --features pixels --cmmd")
    results = json.loads((logs / "f_codes" / "results.json").read_text())
    assert distances[4] == pytest.approx(results["reconstructions"], rel=1e-5)
    kid, cmmd = (logged(logs / "vqgan_with", f"{name}(pixels)/7_reconstructions")[4] for name in ("KD", "CMMD"))
    assert kid == pytest.approx(results["kernel"]["reconstructions"]["mean"], rel=1e-5)
    assert cmmd == pytest.approx(results["cmmd"]["reconstructions"], rel=1e-5)


@pytest.mark.slow
def test_the_best_distance_is_recorded(logs):
    distances, best = (logged(logs / "sampler_with", f"FD(pixels)/7_samples{end}") for end in ("", "_best"))
    assert best == {2: distances[2], 4: min(distances.values())}
    saved_state = torch.load(logs / "sampler_with" / OPTIMIZERS, weights_only=True)
    best_step = min(distances, key=distances.get)
    assert saved_state["best"]["FD(pixels)/7_samples"] == (distances[best_step], best_step)


@pytest.mark.slow
def test_statistics_of_training_images_are_cached_once(logs):
    files = [path.name for path in (logs / ".cache" / "statistics").glob("*.npz")]
    assert len(files) == 2 and all(name.startswith("digits_pixels_") for name in files)  # of 8x8 and of 16x16 images


def test_too_few_images_are_refused_before_training(tmp_path, capfd):
    with pytest.raises(SystemExit):
        call("train_sampler.py", f"--logs_root {tmp_path} --train_steps 2 {DDPM} {FD} --FD_samples 1")
    assert "--FD_samples" in capfd.readouterr().err


def test_eval_mode_restores_each_modules_mode():
    network = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(3), nn.Sequential(nn.Dropout()))
    network[1].eval()
    with eval_mode(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == [True, True, False, True, True]


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8), dtype=np.uint8)


def hook_of(draw, logs_root, **logging):
    """A hook of distances of images that `draw` makes, with pixels as features, and the list of what it logs."""
    model = SimpleNamespace(
        world=DistContext(torch.device("cpu")),
        data=DataConfig(dataset="digits", img_size=8),
        condition_source=lambda sampling: SimpleNamespace(draw=lambda seed, indices: {"label": (seed, indices)}),
        draw=draw,
        space=SimpleNamespace(decode=lambda x: x.nan_to_num(9).add(128).to(torch.uint8)),
    )
    logged = []
    logger = SimpleNamespace(log_scalars=lambda step, values: logged.append(values), log_best=lambda *args: None)
    logging = LoggingConfig(logs_root=str(logs_root), FD_features="pixels", **logging)
    real = ArrayDataset(IMAGES, np.zeros(6, dtype=np.int64), 1)
    return sample_distance(model, real, TrainingConfig(batch_size=2), SamplingConfig(), logging)(logger), logged


def state_at(step):
    return SimpleNamespace(step=step, eval_module=lambda name: nn.Identity())


def test_samples_that_are_not_finite_do_not_end_the_training(tmp_path, capsys):
    """Nor lose the checkpoint that is due at the same step; previews go on too."""

    def draw(indices, *args, **kwargs):
        raise NotFiniteError(
            "solver ddim gave values that are not finite", torch.full((len(indices), 1, 8, 8), torch.nan)
        )

    hook, logged = hook_of(draw, tmp_path, FD_samples=4)
    hook(state_at(3), {})
    assert capsys.readouterr().out.count("distance at step 3: solver ddim gave") == 2
    assert logged[0]["FD(pixels)/4_samples"] > 0


def test_each_measure_is_that_of_the_same_samples(tmp_path, monkeypatch):
    """At each step the noise and the conditions are the same, and features are in the order of the samples, which
    decides which of them are in the random subsets of the kernel distance."""
    monkeypatch.setattr(training_distance, "SUBSETS", 3)
    monkeypatch.setattr(training_distance, "SUBSET_SIZE", 2)
    calls = []

    def draw(indices, seed, sampling, conditions, **options):
        calls.append((indices, seed, conditions))
        return {"image": torch.stack([torch.full((3, 8, 8), 40 * i, dtype=torch.uint8) for i in indices])}

    hook, logged = hook_of(draw, tmp_path, FD_samples=5, FD_measures=("cmmd", "kid", "fd"))
    for step in (3, 6):
        hook(state_at(step), {})
    assert calls[:3] == calls[3:] and [each for indices, *_ in calls[:3] for each in indices] == list(range(5))
    assert all(conditions == {"label": (seed, indices)} for indices, seed, conditions in calls)
    samples = torch.cat([draw([i], 0, None, None)["image"] for i in range(5)])
    real = torch.from_numpy(IMAGES)[:, None].expand(-1, 3, -1, -1)
    samples, real = map(pixels.build("cpu"), (samples, real))
    assert (
        logged[0]
        == logged[1]
        == {
            "CMMD(pixels)/5_samples": pytest.approx(cmmd(samples, real), rel=1e-6),
            "KD(pixels)/5_samples": pytest.approx(kernel_distance(samples, real, 3, 2).mean, rel=1e-6),
            "FD(pixels)/5_samples": pytest.approx(
                frechet_distance(Statistics().update(samples), Statistics().update(real))
            ),
        }
    )
    assert list(logged[0]) == ["CMMD(pixels)/5_samples", "KD(pixels)/5_samples", "FD(pixels)/5_samples"]


@pytest.mark.parametrize("measures", [(), ("fid",), ("fd", "fd")])
def test_unknown_and_repeated_measures_are_refused(measures):
    with pytest.raises(ValueError, match="FD_measures.*wanted some of fd, kid, cmmd, each once: pass --FD_measures fd"):
        LoggingConfig(FD_measures=measures)


@pytest.mark.parametrize("name", MEASURES.values())
def test_distances_are_curves_of_validation(name):
    assert tensorboard_tag(f"{name}(clip)/5_samples") == f"val/{name}(clip)/5_samples"
    assert tensorboard_tag("loss") == "train/loss"
