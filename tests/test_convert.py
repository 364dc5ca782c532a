"""Conversion of guided-diffusion weights: runs give the same outputs, sample and train; unfit weights are refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from helpers.guided_layout import FLAGS, build_unet, to_guided_weights
from helpers.parametrize import slow_after
from helpers.tiny_runs import call, run
from train.checkpoint import checkpoint_path, read_tensors
from train.config import DataConfig
from train.converters import guided
from train.sampler_loading import load_sampler
from train.spaces import PixelSpace

FIXTURE = Path(os.environ.get("GUIDED_FIXTURES", ""))
HAS_FIXTURE = pytest.mark.skipif(
    not (FIXTURE / "unet.pt").is_file(),
    reason="GUIDED_FIXTURES names no folder with unet.pt, weights of the public UNet",
)
VARIATIONS = {
    "plain": {},
    "resblock_updown": {"resblock_updown": True},
    "no scale_shift": {"use_scale_shift_norm": False},
    "new attention order": {"use_new_attention_order": True},
    "new order, wide heads": {"use_new_attention_order": True, "num_head_channels": 4},
    "fixed variance": {"learn_sigma": False},
    "no classes": {"class_cond": False},
    "attention everywhere": {"attention_resolutions": "8,4", "num_res_blocks": 2, "num_head_channels": 8},
    "no attention on the levels": {"attention_resolutions": "1", "resblock_updown": True},
    "one level": {"channel_mult": "2", "attention_resolutions": "8"},
    "three levels": {"channel_mult": "0.5,1,1", "attention_resolutions": "2", "resblock_updown": True},
}


def write(folder, weights, flags):
    torch.save(weights, folder / "unet.pt")
    (folder / "unet.json").write_text(json.dumps(flags))
    return f"--from guided --weights {folder}/unet.pt --config_json {folder}/unet.json --logs_root {folder}/logs"


def load_run(run, ema=True):
    """Load the sampler of a run as experiments do."""
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]
    return load_sampler(run, None, PixelSpace(DataConfig(**data)), torch.device("cpu"), ema=ema, amp=False)


def outputs(network, size=8):
    torch.manual_seed(1)
    x, t = torch.randn(3, network.config.in_channels, size, size), torch.tensor([0.0, 17.0, 999.0])
    fields = {"label": torch.tensor([0, 3, 4])} if "label" in network.encoders else None
    with torch.no_grad():
        return network(x, t, fields)


@pytest.mark.parametrize("name", slow_after(5, VARIATIONS))
def test_a_converted_run_gives_the_outputs_of_its_weights(name, tmp_path):
    flags = FLAGS | VARIATIONS[name]
    network = build_unet(flags)
    command = write(tmp_path, to_guided_weights(network, flags["use_new_attention_order"]), flags)
    call("convert.py", f"{command} --dataset digits --log_dir converted")
    expected = outputs(network)
    assert expected.std() > 0.1
    for ema in (True, False):
        trained = load_run(tmp_path / "logs" / "converted", ema)
        assert (outputs(trained.sampler.network) - expected).abs().max() < 1e-5
    assert trained.step == 0 and trained.data.n_channels == 1 and trained.data.img_size == 8
    if flags["class_cond"]:
        assert trained.sampler.network.encoders["label"].embedding.weight[-1].abs().max() == 0
        assert trained.class_frequencies.tolist() == [0.1] * 10


def test_old_and_new_attention_orders_differ():
    """Otherwise the parametrised test could not distinguish the two orders."""
    network = build_unet(FLAGS)
    old, new = to_guided_weights(network, new_order=False), to_guided_weights(network, new_order=True)
    name = "middle_block.1.qkv.weight"
    assert not torch.equal(old[name], new[name]) and torch.equal(old[name].sort(0)[0], new[name].sort(0)[0])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The folder of the weights and of logs/converted, a converted run of step 7, and the flags of its conversion."""
    folder = tmp_path_factory.mktemp("theirs")
    command = write(folder, to_guided_weights(build_unet(FLAGS)), FLAGS | {"timestep_respacing": "ddim4"})
    call("convert.py", f"{command} --dataset digits --log_dir converted --step 7")
    return folder, command


def test_a_converted_run_has_the_files_of_a_trained_run(converted, trained_ddpm):
    run = converted[0] / "logs" / "converted"
    ours, other = (yaml.safe_load((path / "config.yaml").read_text()) for path in (run, trained_ddpm / "ddpm_digits"))
    origin = ours.pop("origin")  # like that of a run started with --load_dir
    assert origin.keys() == {"class_frequencies", "class_names", "load_weights"}
    assert {group: list(keys) for group, keys in ours.items()} == {g: list(k) for g, k in other.items() if g in ours}
    assert list(ours) == [group for group in other if group not in ("origin", "fine_tuning", "hints")]
    step = max((trained_ddpm / "ddpm_digits" / "checkpoints").glob("step_*"))
    assert {path.name for path in checkpoint_path(run, 7).iterdir()} == {path.name for path in step.iterdir()}
    assert (run / "checkpoints" / "latest").read_text() == "step_00000007\n"
    plain, averaged = (read_tensors(checkpoint_path(run, 7) / f"{name}.safetensors") for name in ("model", "ema"))
    assert plain.keys() == averaged.keys() and all(torch.equal(plain[key], averaged[key]) for key in plain)


@pytest.mark.slow
def test_a_converted_run_samples_with_its_respacing_and_trains(converted):
    logs = converted[0] / "logs"
    call(
        "experiments/get_samples.py",
        f"--sampler ddpm --load_dir converted --n_samples 2 --logs_root {logs} --log_dir s",
    )
    sampling = yaml.safe_load((logs / "s" / "config.yaml").read_text())["sampling"]
    assert (sampling["solver"], sampling["sample_steps"], sampling["spacing"]) == ("ddim", 4, "leading")
    assert np.load(logs / "s" / "samples.npz")["arr_0"].shape == (2, 8, 8, 3)
    unet = "--channels 8 --channel_mults 1 2 --res_blocks 1 --attn_factors 2 --heads 2 --img_size 8 --no_amp"
    flags = f"--logs_root {logs} --log_dir on --load_dir converted --train_steps 1 --batch_size 2 --lr 1e-9"
    call("train_sampler.py", f"--sampler ddpm {flags} --sample_steps 1 {unet}")
    assert (outputs(load_run(logs / "on").sampler.network) - outputs(build_unet(FLAGS))).abs().max() < 1e-3


def test_converting_other_weights_into_the_same_run_is_refused(converted, tmp_path, capfd):
    folder, command = converted
    file = folder / "logs" / "converted" / "config.yaml"
    before = file.read_text()
    call("convert.py", f"{command} --dataset digits --log_dir converted --step 7")
    other = to_guided_weights(build_unet(FLAGS))
    other["out.2.bias"] += 1
    command = write(tmp_path, other, FLAGS | {"timestep_respacing": "ddim4"})
    again = f"{command} --logs_root {folder}/logs --log_dir converted --step 7"
    refused(again, capfd, "holds another run", "other weights to start from", "the same data and weights")
    assert file.read_text() == before


def test_converting_again_rewrites_no_config_of_a_trained_run(converted, tmp_path, capfd):
    folder, command = converted
    run = Path(shutil.copytree(folder / "logs" / "converted", tmp_path / "converted"))
    file = run / "config.yaml"
    file.write_text(file.read_text() + "changes:\n  7:\n    lr: [1, 2]\n")
    again = f"{command} --dataset digits --logs_root {tmp_path} --log_dir converted --step"
    call("convert.py", f"{again} 7 --keep_last 5")
    content = yaml.safe_load(file.read_text())
    assert content["changes"] == {7: {"lr": [1, 2]}} and content["logging"]["keep_last"] == 5
    before = file.read_text()
    refused(f"{again} 6 --keep_last 6", capfd, "has been trained to step 7: convert to another --log_dir")
    assert file.read_text() == before


def test_unet_arguments_and_script_flags_give_equal_settings():
    weights = to_guided_weights(build_unet(FLAGS))
    reference_flags = {
        "image_size": 8,
        "in_channels": 1,
        "model_channels": 8,
        "out_channels": 2,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": [1, 2],
        "num_classes": 10,
        "num_heads": 2,
        "use_scale_shift_norm": True,
    }
    from_arguments = guided.pixel_sampler_settings(weights, reference_flags)
    from_flags = guided.pixel_sampler_settings(weights, FLAGS)
    defaults = (from_arguments["schedule"], from_arguments["total_steps"])
    assert defaults == ("linear", 1000)  # the defaults of that code
    assert all(from_arguments[key] == from_flags[key] for key in from_arguments if key != "schedule")
    inferred = guided.pixel_sampler_settings(weights, {})  # all but the image size and heads
    assert inferred.items() <= from_arguments.items()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"variance": "learned_range", "loss_type": "hybrid", "prediction": "eps", "schedule": "cosine"}),
        ({"use_kl": True, "predict_xstart": True}, {"loss_type": "vlb", "prediction": "x0"}),
        ({"learn_sigma": False}, {"variance": "fixed_large", "loss_type": "simple"}),
        ({"learn_sigma": False, "sigma_small": True}, {"variance": "fixed_small"}),
        ({"timestep_respacing": "25"}, {"solver": "ddpm", "sample_steps": 25, "spacing": "linspace"}),
        ({"diffusion_steps": 4000, "rescale_timesteps": False}, {"total_steps": 4000}),
        ({"diffusion_steps": 4000, "rescale_timesteps": True}, {"total_steps": 4000, "time_scale": 0.25}),
        ({"num_head_channels": 4}, {"head_width": 4}),
        ({"use_checkpoint": True, "dropout": 0.1}, {"activation_checkpointing": True, "dropout": 0.1}),
        ({"channel_mult": ""}, {"channel_mults": (1, 2)}),
    ],
)
def test_reference_flags_are_translated(changes, expected):
    flags = FLAGS | changes
    weights = to_guided_weights(build_unet({**flags, "channel_mult": "1,2"}))
    assert expected.items() <= guided.pixel_sampler_settings(weights, flags).items()


def refused(flags, capfd, *expected):
    with pytest.raises(SystemExit) as stop:
        call("convert.py", flags)
    message = " ".join(capfd.readouterr().err.split())
    assert stop.value.code == 2 and "Traceback" not in message and len(message) < 900
    for word in expected:
        assert word in message, message


MISSING = "input_blocks.1.0.out_layers.3.bias"
REFUSED_WEIGHTS = {
    "missing": (lambda w: w.pop(MISSING), ["down_blocks.0.0.conv2.bias", "(8,)"]),
    "no such layout": (lambda w: [w.pop(name) for name in list(w) if "time" in name], ["time_embed.0.weight", "label"]),
    "extra": (lambda w: w.update({"middle_block.3.bias": torch.zeros(2)}), ["middle_block.3.bias", "unexpected"]),
    "twice": (lambda w: w.update({"norm.weight": torch.zeros(8)}), ["out.0.weight and norm.weight"]),
    "shape": (lambda w: w.update({MISSING: torch.zeros(3)}), [MISSING, "(3,)", "(8,)"]),
    "channels": (lambda w: w.update({"out.2.weight": torch.zeros(3, 8, 3, 3)}), ["from 1 to 3 channels"]),
    "classifier": (lambda w: [w.pop(k) for k in list(w) if "output_" in k], ["output_blocks", "classifier"]),
    "nested": (lambda w: w.update({"state": {}}), ["holds a dict", "state dict"]),
}


@pytest.mark.parametrize("case", REFUSED_WEIGHTS)
def test_unfit_weights_are_refused_and_leave_no_files(case, tmp_path, capfd):
    change, expected = REFUSED_WEIGHTS[case]
    weights = to_guided_weights(build_unet(FLAGS))
    change(weights)
    refused(f"{write(tmp_path, weights, FLAGS)} --log_dir converted", capfd, *expected)
    assert not (tmp_path / "logs").exists()


REFUSED_FLAGS = {  # changes of the JSON (...: key left out) -> words of the message
    "unknown": ({"num_chanels": 8}, ["num_chanels", "'num_channels'"]),
    "type": ({"num_res_blocks": "1"}, ["num_res_blocks", "'1'", "int"]),
    "other network": ({"num_res_blocks": 2}, ["res_blocks is 2 in the JSON, 1 in the weights"]),
    "other attention": ({"attention_resolutions": "8"}, ["attn_factors is (1,) in the JSON, (2,) in the weights"]),
    "times": ({"diffusion_steps": 4000, "rescale_timesteps": ...}, ["rescale_timesteps", "4000"]),
    "no image size": ({"image_size": None}, ["image_size", "None", "int"]),
    "bound": (
        {"diffusion_steps": 4000, "rescale_timesteps": False, "rescale_learned_sigmas": False},
        ["rescale_learned_sigmas", "1 / 4000"],
    ),
    "schedule": ({"noise_schedule": "sqrt"}, ["noise_schedule", "'sqrt'", "linear or cosine"]),
    "sections": ({"timestep_respacing": "10,10,5"}, ["timestep_respacing", "10,10,5"]),
    "heads": ({"num_heads": 3}, ["3 heads", "divisor"]),
    "heads above": ({"num_heads_upsample": 1}, ["num_heads_upsample"]),
    "words": ({"channel_mult": "1;2"}, ["channel_mult", "1;2"]),
    "resampling": ({"conv_resample": False}, ["conv_resample"]),
}


@pytest.mark.parametrize("case", REFUSED_FLAGS)
def test_unsupported_reference_flags_are_refused(case, tmp_path, capfd):
    changes, expected = REFUSED_FLAGS[case]
    reference_flags = {key: value for key, value in (FLAGS | changes).items() if value is not ...}
    refused(
        f"{write(tmp_path, to_guided_weights(build_unet(FLAGS)), reference_flags)} --log_dir converted",
        capfd,
        *expected,
    )
    assert not (tmp_path / "logs").exists()


class Code:
    def __reduce__(self):
        return os.mkdir, (os.environ["MADE_BY_CODE"],)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MADE_BY_CODE", str(tmp_path / "ran"))
    command = write(tmp_path, {"out.0.weight": Code()}, FLAGS)
    refused(command, capfd, "unet.pt", "mkdir, which is code")
    assert not (tmp_path / "ran").exists()
    for content in (b"", b"hello world" * 50, b"PK\x03\x04 and no more"):
        (tmp_path / "unet.pt").write_bytes(content)
        refused(command, capfd, "unet.pt", "damaged")
    (tmp_path / "unet.pt").unlink()
    refused(command, capfd, "unet.pt", "not found")


def test_missing_settings_are_requested_by_flag(tmp_path, capfd):
    command = write(tmp_path, to_guided_weights(build_unet(FLAGS)), FLAGS)
    without = command.replace(f"--config_json {tmp_path}/unet.json", "")
    refused(without, capfd, "attention heads", "--heads")
    refused(f"--logs_root {tmp_path}/logs", capfd, "--weights")
    refused(f"{command} --from guidde", capfd, "guidde", "'guided'")
    refused(f"{command} --load_dir other", capfd, "--load_dir")
    (tmp_path / "unet.json").write_text("{")
    refused(command, capfd, "unet.json", "not JSON")
    assert not (tmp_path / "logs").exists()
    call("convert.py", f"{without} --heads 2 --img_size 8 --log_dir converted")
    assert torch.equal(outputs(load_run(tmp_path / "logs" / "converted").sampler.network), outputs(build_unet(FLAGS)))


@HAS_FIXTURE
def test_public_weights_reproduce_their_outputs(tmp_path):
    flags = f"--weights {FIXTURE}/unet.pt --config_json {FIXTURE}/unet_config.json --logs_root {tmp_path}"
    process = run("convert.py", f"--from guided {flags} --dataset cifar10 --log_dir public")
    assert process.returncode == 0, process.stderr
    trained = load_run(tmp_path / "public")
    io = {name: torch.from_numpy(value) for name, value in np.load(FIXTURE / "unet_io.npz").items()}
    with torch.no_grad():
        out = trained.sampler.network(io["x"], io["t"], {"label": io["y"]})
    assert io["out"].std() > 0.01 and (out - io["out"]).abs().max() < 1e-5 * max(1.0, io["out"].abs().max().item())
