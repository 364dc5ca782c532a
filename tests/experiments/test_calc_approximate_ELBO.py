"""calc_approximate_ELBO.py end to end on tiny models: its results, and settings that must not change them."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from experiments.calc_approximate_ELBO import spread_over_strata, stratum_widths
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.metrics.decoder_likelihood import DecoderBits, TrainedHead, load_head, summarize_image_bits
from helpers.parametrize import slow_after
from helpers.process_pool import ProcessPool
from helpers.run_asserts import assert_same_losses, lines
from helpers.tiny_runs import DDPM, ROOT, UNET, call
from train.data.loading import ImageSource
from train.data.shuffle import EpochShuffle

SCRIPT = "experiments/calc_approximate_ELBO.py"
HEAD = "--train_steps 3 --train_batch_size 4 --steps_per_eval 2"
IMAGE_KEYS = {
    "bits_per_dim", "bits_per_dim_standard_error", "codes_bits_per_dim", "decoder_bits_per_dim", "head"
}  # fmt: skip
MODELS = {  # flags, and calls per image, fewer than the terms
    "absorbing": (HEAD, 9),
    "ddpm": ("--sampler ddpm", 6),
    "edm": ("--sampler ddpm --load_dir edm", 3),
    "flow": ("--sampler ddpm --load_dir flow", 3),
}
STEPS = {"absorbing": 256, "ddpm": 20, "edm": 0, "flow": 0}


def read_results(logs, name):
    return json.loads((logs / name / "results.json").read_text())


@pytest.fixture(scope="module")
def logs_of(trained, trained_ddpm):
    """The logs folder of each kind of model."""
    data = f"--config {ROOT / 'configs' / 'digits.yaml'}"  # not ddpm_digits.yaml, which has another prediction
    for process in ("edm", "flow"):
        flags = f"--logs_root {trained_ddpm} --train_steps 2 --no_amp {DDPM} --process {process} --log_dir {process}"
        call("train_sampler.py", f"{data} {flags}")
    return {name: trained if name == "absorbing" else trained_ddpm for name in MODELS}


@pytest.fixture(scope="module")
def measure(logs_of):
    """measure(model, flags): the results of the script's run in a folder `log_dir`."""

    def run_script(model, log_dir, flags=""):
        model_flags, calls = MODELS[model]
        flags = f"--n_images 7 --batch_size 4 --no_amp --calls {calls} --log_dir {log_dir} {flags}"
        call(SCRIPT, f"--logs_root {logs_of[model]} {model_flags} {flags}")
        return read_results(logs_of[model], log_dir)

    return run_script


@pytest.fixture(scope="module")
def reports(measure):
    return {model: measure(model, f"elbo_{model}") for model in MODELS}


@pytest.mark.parametrize("model", slow_after(2, MODELS))
def test_the_value_is_the_mean_bound_of_the_first_positions(model, reports, logs_of):
    report, load_dir = reports[model], model if model in ("edm", "flow") else None
    sampler = "absorbing" if model == "absorbing" else "ddpm"
    settings = ModelConfig(sampler=sampler, load_dir=load_dir)
    trained = load_model(settings, OutputConfig(logs_root=str(logs_of[model]), amp=False))
    bound = trained.log_likelihood(trained.batches("val")[list(range(7))], 0, MODELS[model][1])
    assert report["value"] == pytest.approx(bound.total.double().mean().item(), abs=1e-5)
    assert report["standard_error"] == pytest.approx(bound.total.double().std().item() / 7**0.5, abs=1e-5)
    assert report["prior"] == pytest.approx(bound.prior.double().mean().item(), abs=1e-5)
    assert report["unit"] == trained.sampler.unit and report["n_images"] == 7 and report["split"] == "val"
    assert report["run"]["sampler_weights"] == trained.weights and report["calls"] == MODELS[model][1]


@pytest.mark.parametrize("model", ["absorbing", "ddpm"])
def test_the_terms_of_a_bound_add_up_and_are_plotted(model, reports, logs_of):
    report, calls, steps = reports[model], MODELS[model][1], STEPS[model]
    assert report["method"] == "variational bound" and len(report["terms"]) == steps
    assert report["prior"] + sum(report["terms"]) == pytest.approx(report["value"], abs=1e-4)
    assert report["decoder"] == report["terms"][0]
    assert len(set(report["terms"][calls // 2 :])) == calls - calls // 2  # one value per stratum
    with Image.open(logs_of[model] / f"elbo_{model}" / "terms.png") as picture:
        assert picture.size[0] > 500 and len(picture.convert("RGB").getcolors(1 << 20)) > 3


def test_untrained_models_have_about_uniform_likelihood(reports):
    assert 3 < reports["absorbing"]["value"] < 5  # of 16 codes
    assert all(4 < reports[model]["value"] < 15 for model in ("ddpm", "edm", "flow"))  # of 256 levels


@pytest.mark.parametrize("model", ["edm", "flow"])
def test_probability_flow_likelihood_has_no_terms(model, reports, logs_of):
    report = reports[model]
    assert (report["method"], report["terms"], report["decoder"]) == ("probability flow", [], None)
    assert {path.name for path in (logs_of[model] / f"elbo_{model}").iterdir()} == {"config.yaml", "results.json"}


@pytest.mark.parametrize("model", slow_after(2, MODELS))
def test_results_depend_on_the_seed_but_not_the_batch_size(model, measure, reports):
    rebatched = measure(model, f"elbo_{model}_batch", "--batch_size 3")
    for name in ("value", "standard_error", "prior", "terms"):
        assert rebatched[name] == pytest.approx(reports[model][name], abs=1e-5)
    for name in IMAGE_KEYS & rebatched.keys() - {"head"}:
        assert rebatched[name] == pytest.approx(reports[model][name], rel=1e-5)
    assert measure(model, f"elbo_{model}_seed", "--seed 1")["value"] != reports[model]["value"]


@pytest.mark.slow
def test_all_terms_can_be_computed_and_no_image_repeats(measure, trained_ddpm, capsys):
    complete = measure("ddpm", "elbo_whole", "--calls None --n_images 10000 --batch_size 200")
    by_default = measure("ddpm", "elbo_default", "--calls None --n_images None --batch_size 200")
    assert (by_default["value"], by_default["n_images"]) == (complete["value"], 359)
    assert complete["n_images"] == 359 and complete["calls"] == 20 and len(set(complete["terms"])) == 20
    assert measure("ddpm", "elbo_one", "--calls 1 --n_images 1")["standard_error"] is None
    assert read_results(trained_ddpm, "elbo_one")["decoder"] is None  # the one value is a mean over all steps
    estimate = measure("ddpm", "elbo_few", "--calls 6 --n_images 359 --batch_size 200")
    assert abs(complete["value"] - estimate["value"]) < 4 * estimate["standard_error"]  # of the same images
    assert estimate["terms"][:3] == pytest.approx(complete["terms"][:3], abs=1e-5)
    train = measure("ddpm", "elbo_train", "--split train")
    assert train["split"] == "train" and train["value"] != pytest.approx(complete["value"], abs=1e-4)


def test_a_repeated_run_prints_the_saved_report(measure, reports, logs_of, capsys, monkeypatch):
    monkeypatch.setattr("train.trained_sampler.TrainedSampler.log_likelihood", None)  # nothing is measured
    capsys.readouterr()
    assert measure("absorbing", "elbo_absorbing") == reports["absorbing"]
    out = capsys.readouterr().out
    value, error = (f"{reports['absorbing'][name]:.4f}" for name in ("value", "standard_error"))
    assert f"{value} ± {error}" in out and "bits per code" in out and "9 of 256 terms" in out
    assert "reconstruction term (t = 1/256)" in out and "terms.png" in out
    total, error = (f"{reports['absorbing'][name]:.4f}" for name in ("bits_per_dim", "bits_per_dim_standard_error"))
    assert f"{total} ± {error}" in out and "bits per dimension" in out and "8-bit images" in out
    measure("edm", "elbo_edm")
    out = capsys.readouterr().out
    assert "probability flow" in out and "bits per dimension" in out and "decoder" not in out and ".png" not in out


def test_a_failed_run_leaves_no_results(measure, logs_of, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            measure("ddpm", "elbo_stopped")
    folder = logs_of["ddpm"] / "elbo_stopped"
    assert {path.name for path in folder.iterdir()} == {"config.yaml", ".kept"}
    monkeypatch.setattr("train.trained_sampler.TrainedSampler.log_likelihood", None)
    measure("ddpm", "elbo_stopped")  # the next run succeeds with the saved measurements
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "results.json", "terms.png"}


# decoder bits


@pytest.fixture(scope="module")
def codes(trained):
    """The trained sampler of codes."""
    return load_model(ModelConfig(), OutputConfig(logs_root=str(trained), amp=False))


@pytest.fixture(scope="module")
def head(reports, codes, trained):
    """The head that the script trained."""
    return load_head(trained / f"likelihood_vqgan_digits_{codes.space.first_stage.step}", codes.space.first_stage)


def test_image_bits_are_code_bits_plus_decoder_bits(reports, codes, head):
    report, order = reports["absorbing"], EpochShuffle(359, 0)
    held_out = ImageSource(codes.dataset("val"), codes.data)
    images = torch.stack([held_out[order[k]]["image"] for k in range(7)])
    batch = codes.batches("val")[list(range(7))]
    assert torch.equal(codes.space.first_stage.encode(images), batch["codes"])
    decoder_bits = head.bits_per_dim(batch["codes"], images).double()
    code_bits = codes.log_likelihood(batch, 0, 9).total.double() * 4 * 4 / (16 * 16)
    assert report["codes_bits_per_dim"] == pytest.approx(code_bits.mean().item(), abs=1e-5)
    assert report["decoder_bits_per_dim"] == pytest.approx(decoder_bits.mean().item(), rel=1e-5)
    assert report["bits_per_dim"] == pytest.approx((code_bits + decoder_bits).mean().item(), rel=1e-5)
    error = (code_bits + decoder_bits).std().item() / 7**0.5
    assert report["bits_per_dim_standard_error"] == pytest.approx(error, rel=1e-4)
    assert report["head"] == {"run": head.run.name, "step": 3} and report["run"]["head_weights"] == head.weights


@pytest.mark.parametrize("split", ["val", "train"])
def test_decoder_bits_use_the_encoded_views(codes, head, split):
    source, positions = codes.batches(split), [0, 5, 7, 11, 400, 9000, 9001, 9002]
    bits = DecoderBits(head, codes, split, source)
    batch, images = source[positions], torch.stack([bits.image(k) for k in positions])
    assert torch.equal(codes.space.first_stage.encode(images), batch["codes"])
    assert len(bits.views) == (9 if split == "train" else 1)
    assert torch.allclose(bits(batch), head.bits_per_dim(batch["codes"], images))


def test_unreadable_images_do_not_shift_the_others(codes, head, monkeypatch):
    full_table = codes.space.first_stage.encode_dataset(codes.dataset("val"), "val", codes.data, 1, codes.world)
    readable = torch.tensor([i for i in range(359) if i not in (0, 17, 200)])
    table = full_table._replace(ids=full_table.ids[torch.zeros_like(readable), readable].unsqueeze(0), index=readable)
    monkeypatch.setattr("train.first_stage.VQGANStage.encode_dataset", lambda *args: table)
    source = codes.batches("val")
    bits = DecoderBits(head, codes, "val", source)
    batch = source[list(range(40))]
    images = torch.stack([bits.image(k) for k in range(40)])
    assert len(source) == 356 and torch.equal(codes.space.first_stage.encode(images), batch["codes"])


def test_the_report_adds_up():
    code_bits, decoder_bits = torch.tensor([2.0, 4.0, 6.0]).double(), torch.tensor([1.0, 3.0, 2.0]).double()
    head = TrainedHead(SimpleNamespace(name="likelihood"), 7, "", None, None)
    summary = summarize_image_bits(code_bits, decoder_bits, tokens=4, dimensions=64, head=head)
    assert summary.keys() == IMAGE_KEYS and summary["head"] == {"run": "likelihood", "step": 7}
    assert summary["codes_bits_per_dim"] == 4 * 4 / 64 and summary["decoder_bits_per_dim"] == 2
    assert summary["bits_per_dim"] == summary["codes_bits_per_dim"] + summary["decoder_bits_per_dim"]
    per_image = torch.tensor([1.125, 3.25, 2.375])
    assert summary["bits_per_dim_standard_error"] == pytest.approx(per_image.std().item() / 3**0.5)
    assert summarize_image_bits(code_bits[:1], decoder_bits[:1], 4, 64, head)["bits_per_dim_standard_error"] is None


def test_no_decoder_reports_only_the_bound_on_codes(measure, reports, monkeypatch, capsys):
    monkeypatch.setattr("experiments.metrics.decoder_likelihood.load_head", None)  # none is needed
    monkeypatch.setattr("experiments.metrics.decoder_likelihood.train_head", None)
    report = measure("absorbing", "elbo_codes", "--no_decoder")
    with_decoder = reports["absorbing"]
    assert IMAGE_KEYS <= with_decoder.keys() and report.keys() == with_decoder.keys() - IMAGE_KEYS
    assert all(report[name] == with_decoder[name] for name in report if name != "run")
    assert "bits per dimension" not in capsys.readouterr().out
    assert not any(IMAGE_KEYS & reports[model].keys() for model in ("ddpm", "edm", "flow"))


@pytest.mark.slow
def test_a_trained_head_is_reused_and_can_be_trained_further(measure, trained, codes, capsys):
    head_flags = "--head_dir head_of_mine"
    first = measure("absorbing", "elbo_head", head_flags)
    assert "training the decoder's log-variance head: 0 of 3 steps done" in capsys.readouterr().out
    measure("absorbing", "elbo_head_again", f"{head_flags} --batch_size 7")
    out = capsys.readouterr().out
    assert "training the decoder's" not in out and "head: head_of_mine, step 3" in out
    longer = measure(
        "absorbing", "elbo_head", f"{head_flags} --train_steps 5"
    )  # the same folder: its report is out of date
    out = capsys.readouterr().out
    assert "3 of 5 steps done" in out and "head: head_of_mine, step 5" in out
    assert longer["head"]["step"] == 5 and longer["value"] == first["value"]
    assert longer["decoder_bits_per_dim"] != first["decoder_bits_per_dim"]
    assert longer["run"]["head_weights"] == load_head(trained / "head_of_mine", codes.space.first_stage).weights
    with pytest.raises(SystemExit):
        measure("absorbing", "elbo_head_other", f"{head_flags} --train_steps 5 --lr 0.5")
    assert "log-variance head (--head_dir)" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_train_and_report_like_one(trained, reports, tmp_path):
    logs = tmp_path / "logs"
    for name in ("vqgan_digits", "absorbing_digits"):
        shutil.copytree(trained / name, logs / name)
    pool = ProcessPool(2)
    pool.run(SCRIPT, f"--logs_root {logs} --n_images 7 --batch_size 2 --no_amp --calls 9 {HEAD} --log_dir elbo")
    pool.close()
    name = reports["absorbing"]["head"]["run"]
    assert_same_losses(logs / name, trained / name)
    assert [row["step"] for row in lines(logs / name) if "val/bits_per_dim" in row] == [2, 3]
    report = read_results(logs, "elbo")
    assert report["head"] == reports["absorbing"]["head"] and IMAGE_KEYS <= report.keys()
    for name in (IMAGE_KEYS | {"value", "standard_error"}) - {"head"}:
        assert report[name] == pytest.approx(reports["absorbing"][name], rel=1e-4)


def test_latents_are_refused(trained, capfd):
    flags = "--sampler ddpm --ae_load_dir vqgan_digits --batch_size 4 --total_steps 20 --log_dir latent"
    call("train_sampler.py", f"--logs_root {trained} --train_steps 2 --no_amp {flags} {UNET}")
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"--logs_root {trained} --sampler ddpm --load_dir latent --n_images 4 --no_amp")
    assert stop.value.code == 2
    assert "latents are continuous" in capfd.readouterr().err


@pytest.mark.parametrize("flag", ["n_images", "calls", "train_steps", "train_batch_size"])
def test_nothing_to_measure_is_refused(flag, trained_ddpm, capfd):
    with pytest.raises(SystemExit) as stop:
        call(SCRIPT, f"--logs_root {trained_ddpm} --sampler ddpm --{flag} 0")
    assert stop.value.code == 2
    message = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert f"got {flag} 0, wanted at least 1: pass --{flag} N" in message


@pytest.mark.parametrize(("steps", "calls", "widths"), [(5, None, [1] * 5), (9, 4, [1, 1, 3, 4]), (0, 3, [])])
def test_spreading_over_strata_keeps_the_sum(steps, calls, widths):
    assert stratum_widths(steps, calls) == widths
    if steps:
        terms = torch.arange(float(steps)) ** 2
        spread = spread_over_strata(terms, widths)
        assert spread.sum() == terms.sum() and len(spread) == steps
        assert len(spread.unique()) == len(widths) and torch.equal(spread[:2], terms[:2])
