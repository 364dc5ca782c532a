"""Conversion of samplers of unleashing-transformers: the same logits and losses; unfit weights are refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from diffusion.absorbing import AbsorbingDiffusion
from helpers.tiny_runs import call
from helpers.unleashing_layout import SIZE, build_vqgan, sampler_logits, sampler_weights, to_unleashing_weights
from train.checkpoint import checkpoint_path
from train.conversions._runs import load_converted
from train.converters import unleashing
from train.first_stage import load_vqgan_stage
from train.sampler_loading import load_sampler
from train.spaces import CodeSpace

FIXTURE = Path(os.environ.get("UT_FIXTURES", ""))
CPU = torch.device("cpu")
PREFIXES = {"absorbing": "_denoise_fn.", "autoregressive": "net."}


def ids_of(kind, shape=(3, 16), codes=32):
    """Random codes, some of them masked for the absorbing sampler."""
    rng = torch.Generator().manual_seed(5)
    return torch.randint(codes + (kind == "absorbing"), shape, generator=rng)


def load_run(logs, name, ema=True):
    first = load_vqgan_stage(logs / "vqgan_folder", None, CPU, amp=False)
    return load_sampler(logs / name, None, CodeSpace(first), CPU, ema=ema, amp=False)


@torch.no_grad()
def logits_of(logs, name, ids, ema=True):
    return load_run(logs, name, ema).sampler.network(ids.unflatten(1, (4, 4))).flatten(1, 2)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder with a converted VQGAN, and plain and averaged weights and the converted run of each kind of sampler."""
    folder = tmp_path_factory.mktemp("theirs")
    torch.save(to_unleashing_weights(*build_vqgan()), folder / "vqgan_1200.th")
    flags = f"--from unleashing --logs_root {folder}/logs --dataset folder"
    call("convert.py", f"{flags} --weights {folder}/vqgan_1200.th --img_size {SIZE}")
    for kind in PREFIXES:
        torch.save(sampler_weights(kind, seed=1), folder / f"{kind}_700.th")
        torch.save(sampler_weights(kind, seed=2), folder / f"{kind}_ema_700.th")
        call("convert.py", f"{flags} --weights {folder}/{kind}_ema_700.th --bert_n_head 3")
    return folder, flags


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_converted_run_gives_the_logits_of_its_weights(kind, converted):
    logs, ids = converted[0] / "logs", ids_of(kind)
    plain, averaged = (sampler_logits(sampler_weights(kind, seed=seed), 3, ids) for seed in (1, 2))
    assert averaged.std() > 0.5 and (plain - averaged).abs().max() > 0.5
    assert (logits_of(logs, f"{kind}_folder", ids) - averaged).abs().max() < 1e-5
    assert (logits_of(logs, f"{kind}_folder", ids, ema=False) - plain).abs().max() < 1e-5
    assert load_run(logs, f"{kind}_folder").step == 700


def test_reference_logits_depend_on_heads_norms_and_positions():
    """Otherwise the previous test could not find errors in them."""
    weights, ids = sampler_weights("absorbing"), ids_of("absorbing")
    right = sampler_logits(weights, 3, ids)
    assert (sampler_logits(weights, 6, ids) - right).abs().max() > 0.01
    other = weights | {"_denoise_fn.pos_emb": weights["_denoise_fn.pos_emb"].flip(1)}
    assert (sampler_logits(other, 3, ids) - right).abs().max() > 0.01
    smaller = {k: 0.5 * v if k[12:19] in ("pos_emb", "tok_emb") else v for k, v in weights.items()}
    assert (sampler_logits(smaller, 3, ids) - right).abs().max() > 0.01  # norms without eps would not change


def test_positions_are_in_raster_order():
    weights = sampler_weights("absorbing")
    position = unleashing.convert_code_sampler(weights, (2, 8))[0]["position"].value
    assert torch.equal(position[1, 3], weights["_denoise_fn.pos_emb"][0, 11])


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_converted_run_has_the_files_of_a_trained_run(kind, converted):
    content = yaml.safe_load((converted[0] / "logs" / f"{kind}_folder" / "config.yaml").read_text())
    groups = ["sampler", "first", "data", "reader", "training", "sampling", "logging", "origin"]
    assert list(content) == groups
    sampler, origin = content["sampler"], content["origin"]
    expected = {"sampler": kind, "bert_n_emb": 12, "bert_n_head": 3, "bert_n_layers": 2, "mlp_ratio": 4.0}
    expected |= {"total_steps": 8, "schedule": "linear"} if kind == "absorbing" else {}
    assert expected.items() <= sampler.items() and not sampler["class_conditional"]
    first = load_vqgan_stage(converted[0] / "logs" / "vqgan_folder", None, CPU, amp=False)
    assert first.provenance.items() <= origin.items() and origin["class_frequencies"] == []
    assert origin.keys() == {*first.provenance, "class_frequencies", "load_weights"}
    assert (content["data"]["dataset"], content["data"]["img_size"]) == ("folder", SIZE)
    step = checkpoint_path(converted[0] / "logs" / f"{kind}_folder", 700)
    files = {"model.safetensors", "ema.safetensors", "state.pt", "manifest.json"}
    assert {path.name for path in step.iterdir()} == files


@pytest.mark.parametrize(("kind", "options"), [("absorbing", "--sample_steps 3"), ("autoregressive", "")])
def test_a_converted_run_can_be_sampled(kind, options, converted):
    logs = converted[0] / "logs"
    flags = f"--logs_root {logs} --sampler {kind} --dataset folder --n_samples 2 --log_dir samples_{kind}"
    call("experiments/get_samples.py", f"{flags} {options}")
    assert np.load(logs / f"samples_{kind}" / "samples.npz")["arr_0"].shape == (2, SIZE, SIZE, 3)


def test_a_converted_sampler_trains_further(converted, tmp_path):
    logs, data, ids = converted[0] / "logs", tmp_path / "images", ids_of("absorbing")
    data.mkdir()
    for i in range(30):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 20, 3), np.uint8)).save(data / f"{i}.png")
    network = "--bert_n_emb 12 --bert_n_head 3 --bert_n_layers 2 --total_steps 8 --warmup_iters 1"
    flags = f"--logs_root {logs} --log_dir on --load_dir absorbing_folder --train_steps 1 --batch_size 2 --lr 1e-9"
    call("train_sampler.py", f"--dataset folder --data_dir {data} {network} {flags} --no_amp --steps_per_eval 0")
    plain = sampler_logits(sampler_weights("absorbing", seed=1), 3, ids)
    assert (logits_of(logs, "on", ids, ema=False) - plain).abs().max() < 1e-3


def test_every_tensor_is_converted_or_reported(converted, tmp_path, capfd):
    folder, flags = converted
    for kind in PREFIXES:
        tensors, omitted = unleashing.convert_code_sampler(weights := sampler_weights(kind), (4, 4))
        merged = 8 + (kind == "autoregressive")  # keys and values; start token
        assert len(tensors) + len(omitted) + merged == len(weights)
        call("convert.py", f"{flags} --weights {folder}/{kind}_700.th --bert_n_head 3 --log_dir again_{kind}")
        output = capfd.readouterr().out
        assert f"{kind}_700.th" in output and f"{kind}_ema_700.th" in output and "3 heads" in output
        for reason in omitted.values():
            assert reason in output
        one, two = (
            checkpoint_path(folder / "logs" / f"{run}_{n}", 700) for run, n in (("again", kind), (kind, "folder"))
        )
        assert all((one / f).read_bytes() == (two / f).read_bytes() for f in ("model.safetensors", "ema.safetensors"))


def test_one_file_serves_as_both_and_heads_default_to_eight(converted, tmp_path):
    folder, flags = converted
    weights = sampler_weights("absorbing", width=16, mlp=3, layers=1)
    torch.save(weights, tmp_path / "absorbing_ema_9.th")
    call("convert.py", f"{flags} --weights {tmp_path}/absorbing_ema_9.th --log_dir alone")
    ids = ids_of("absorbing")
    for ema in (True, False):
        assert torch.allclose(logits_of(folder / "logs", "alone", ids, ema), sampler_logits(weights, 8, ids), atol=1e-5)


def refused(flags, capfd, *expected):
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        call("convert.py", flags)
    message = " ".join(capfd.readouterr().err.split())
    assert stop.value.code == 2 and "Traceback" not in message and len(message) < 900
    for word in expected:
        assert word in message, message


BLOCK = "_denoise_fn.blocks.1."
ABSORBING_CHANGES = {
    "missing": (lambda w: w.pop(f"{BLOCK}ln2.bias"), ["blocks.1.norm2.bias (12,) is missing"]),
    "no key": (lambda w: w.pop(f"{BLOCK}attn.key.bias"), ["attn.key.bias is missing"]),
    "no query": (lambda w: w.pop(f"{BLOCK}attn.query.bias"), ["attn.query.bias is missing"]),
    "extra": (lambda w: w.update({f"{BLOCK}attn.norm.bias": torch.zeros(2)}), ["attn.norm.bias is unexpected"]),
    "outside": (lambda w: w.update({"start_tok": torch.zeros(2)}), ["start_tok is unexpected"]),
    "masks": (lambda w: w.update({f"{BLOCK}attn.mask": torch.ones(1, 1, 16, 16)}), ["attn.mask is unexpected"]),
    "twice": (lambda w: w.update({"norm.bias": torch.zeros(12)}), ["ln_f.bias and norm.bias"]),
    "shape": (
        lambda w: w.update({f"{BLOCK}attn.value.bias": torch.zeros(3)}),
        ["value.bias is of shape (3,)", "(12,)"],
    ),
    "empty": (lambda w: w.update({"_denoise_fn.head.weight": torch.zeros(0, 0)}), ["head.weight is of shape (0, 0)"]),
    "a number": (lambda w: w.update({"Lt_history": torch.tensor(3.0)}), ["Lt_history is of shape ()"]),
    "no head": (lambda w: w.pop("_denoise_fn.head.weight"), ["head.weight is missing"]),
    "no mask id": (lambda w: w.update({"_denoise_fn.tok_emb.weight": torch.zeros(32, 12)}), ["32 codes", "the mask"]),
    "a block": (lambda w: [w.pop(k) for k in list(w) if "blocks.0" in k], ["got blocks [1]"]),
    "two kinds": (lambda w: w.update({"net.x": torch.zeros(1)}), ["absorbing and of autoregressive"]),
    "nothing known": (lambda w: [w.pop(k) for k in list(w) if "_den" in k], ["an unknown model", "Lt_history"]),
}


AUTOREGRESSIVE_CHANGES = {
    "sees all": (lambda w: w.update({"net.blocks.0.attn.mask": torch.ones(1, 1, 16, 16)}), ["0.attn.mask", "causal"]),
    "no start": (lambda w: w.pop("net.start_tok"), ["net.start_tok is missing"]),
    "mask id": (lambda w: w.update({"net.tok_emb.weight": torch.zeros(33, 12)}), ["33 codes", "the same number"]),
    "losses": (lambda w: w.update({"Lt_count": torch.zeros(3)}), ["Lt_count is unexpected"]),
}
CASES = [("absorbing", *case) for case in ABSORBING_CHANGES.values()] + [
    ("autoregressive", *c) for c in AUTOREGRESSIVE_CHANGES.values()
]


@pytest.mark.parametrize(("kind", "change", "expected"), CASES, ids=[*ABSORBING_CHANGES, *AUTOREGRESSIVE_CHANGES])
def test_unfit_weights_are_refused_by_name(kind, change, expected, converted):
    change(weights := sampler_weights(kind))
    with pytest.raises(ValueError) as error:
        unleashing.code_sampler_settings(weights)
        tensors, _ = unleashing.convert_code_sampler(weights, (4, 4))
        load_converted(load_run(converted[0] / "logs", f"{kind}_folder").sampler.network, tensors, "the file")
    for word in expected:
        assert word in str(error.value)


@pytest.mark.parametrize(("sizes", "expected"), [({"codes": 31}, "out of 31"), ({"tokens": 25}, "25 codes per image")])
def test_another_vqgan_is_refused(sizes, expected):
    with pytest.raises(ValueError, match=f"{expected}.*4 x 4, out of 32.*--ae_load_dir"):
        unleashing.check_vqgan_fits(sampler_weights("absorbing", **sizes), 32, (4, 4))


def test_refused_weights_leave_no_files(converted, tmp_path, capfd):
    flags = f"{converted[1]} --weights {tmp_path}/absorbing_1.th --bert_n_head 3 --log_dir no"
    for weights, expected in (
        (sampler_weights("absorbing") | {"more": torch.zeros(1)}, "more is unexpected"),
        (sampler_weights("absorbing", tokens=25), "25 codes per image"),
    ):
        torch.save(weights, tmp_path / "absorbing_1.th")
        refused(flags, capfd, expected)
    assert not (converted[0] / "logs" / "no").exists()


def test_conflicting_flags_are_refused(converted, tmp_path, capfd):
    folder, flags = converted
    flags += f" --weights {folder}/absorbing_700.th --log_dir no"
    for head_flags, heads in (("", "8"), ("--bert_n_head 5", "5"), ("--bert_n_head=0", "0"), ("--bert_n_head x", "x")):
        refused(f"{flags} {head_flags}", capfd, f"is not a multiple of {heads} heads", "--bert_n_head")
    flags += " --bert_n_head 3"
    refused(f"{flags} --sampler autoregressive", capfd, "complete absorbing sampler", "--sampler")
    refused(f"{flags} --load_dir other", capfd, "--load_dir")
    refused(f"{flags} --config_json x.json", capfd, "--config_json")
    refused(f"{flags} --ae_load_dir none", capfd, "logs/none", "vqgan_<step>.th", "--ae_load_dir")
    refused(f"{flags} --ae_load_dir absorbing_folder", capfd, "absorbing_folder is not a VQGAN run")
    refused(f"{flags} --img_size 32", capfd, "img_size 32", f"trained with {SIZE}")
    refused(f"{flags} --from guided", capfd, "guided-diffusion")
    torch.save(sampler_weights("absorbing", steps=5), tmp_path / "absorbing_2.th")
    torch.save(sampler_weights("absorbing"), tmp_path / "absorbing_ema_2.th")
    refused(f"{flags} --weights {tmp_path}/absorbing_2.th", capfd, "absorbing_ema_2.th are of different samplers")
    assert not (folder / "logs" / "no").exists()


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """The logs folder of runs converted from public weights, and their recorded inputs and outputs."""
    if not (FIXTURE / "absorbing_100.th").is_file():
        pytest.skip("UT_FIXTURES names no folder with absorbing_100.th, public weights")
    logs = tmp_path_factory.mktemp("public")
    flags = f"--from unleashing --dataset folder --logs_root {logs}"
    call("convert.py", f"{flags} --weights {FIXTURE}/vqgan_100.th --img_size 64")
    call("convert.py", f"{flags} --weights {FIXTURE}/absorbing_100.th --bert_n_head 4")
    return logs, {name: torch.from_numpy(value) for name, value in np.load(FIXTURE / "absorbing_io.npz").items()}


@torch.no_grad()
def test_public_weights_reproduce_their_logits_and_losses(public):
    logs, io = public
    trained = load_run(logs, "absorbing_folder")
    assert trained.sampler.process == AbsorbingDiffusion(64, 256)
    x0, x_t = (io[name].unflatten(1, (16, 16)) for name in ("x0", "x_t"))
    logits = trained.sampler.network(x_t)
    assert (logits.flatten(1, 2) - io["logits"]).abs().max() < 1e-4
    t = io["t"] / 256
    for kind, name in (("elbo", "elbo_bits_per_token"), ("reweighted_elbo",) * 2, ("mlm",) * 2):
        loss = trained.sampler.process.loss(logits, x0, x_t, t, kind).per_example
        assert torch.allclose(loss, io[name], rtol=1e-5), kind


def test_reference_logits_match_those_of_public_weights(public):
    weights = torch.load(FIXTURE / "absorbing_100.th", weights_only=True)
    assert (sampler_logits(weights, 4, public[1]["x_t"]) - public[1]["logits"]).abs().max() < 1e-4
