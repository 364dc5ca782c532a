"""JSON configs in the layout of the reference's MNIST.json: how they are converted, and what is refused."""

import json

import pytest
import torch

import train_sampler
from helpers.tiny_runs import ROOT, call
from models.blocks import ResBlock
from models.unet_attention import SelfAttentionBlock
from train.cli import parse as cli
from train.cli.json_config import SHAPE, read_json
from train.samplers._process import make_process
from train.samplers.ddpm import make_network

FILE = ROOT / "configs" / "mnist_unet.json"
MODEL, BETAS = "denoising_model.model_args", "diffusion.beta_schedule_args"
PUBLISHED = {  # reconstructed from the reference's configs/palette
    **{"expt_name": "mnist", "expt_dir": "experiments", "gpu_ids": [0], "max_epochs": 100},
    "denoising_model": {
        "model": "UNet",
        "model_args": {
            **{"in_channel": 1, "out_channel": 1, "inner_channel": 64, "res_blocks": 2, "attn_res": [8]},
            **{"channel_mults": [1, 2, 4, 8], "num_head_channels": 32, "num_groups": 32},
            **{"res_block_type": "basic", "attn_block_type": "basic", "scale_skip_connection": True},
        },
    },
    "diffusion": {
        "training_target": "noise",
        "loss_fn": "mse",
        "beta_schedule_args": {"schedule": "linear", "n_timestep": 1000, "linear_start": 1e-6, "linear_end": 0.01},
        "optim_args": {"lr": 5e-5, "weight_decay": 0},
    },
    "data": {
        **{"dataset": "mnist", "root": "/data/mnist", "image_size": 32, "condition": None},
        **{"convert_mask2mesh": False, "convert_mask2onehot": False, "batch_size": 16, "val_batch_size": 8},
        "train_args": {"split": "train", "data_len": -1},
        "val_args": {"split": "test", "data_len": 8},
    },
    "ddpm": {"train_steps": 375_000},
}
REMOVED = object()


def write_config(tmp_path, changes=None):
    """Writes PUBLISHED with changed values at dotted keys."""
    content = json.loads(json.dumps(PUBLISHED))
    for dotted, value in (changes or {}).items():
        *above, key = dotted.split(".")
        section = content
        for name in above:
            section = section.setdefault(name, {})
        if value is REMOVED:
            del section[key]
        else:
            section[key] = value
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    return path


def parse_config(path, *flags):
    """The config that train_sampler.py parses from the file."""
    words = ["--config", str(path), *flags]
    return cli.parse(train_sampler.Config, None, words, base_values=cli.first_stage_data)


def test_the_bundled_json_file_key_by_key():
    content = json.loads(FILE.read_text())
    model, data = content["denoising_model"]["model_args"], content["data"]
    diffusion, flags = content["diffusion"], dict(content["ddpm"])
    config = read_json(FILE)
    assert config.pop("ddpm") == {
        **{key: value for key, value in flags.items() if key != "in_memory"},
        "log_dir": content["expt_name"],
        "channels": model["inner_channel"],
        "channel_mults": model["channel_mults"],
        "res_blocks": model["res_blocks"],
        "attn_factors": model["attn_res"],
        "head_width": model["num_head_channels"],
        "heads": 1,
        "res_block_type": "basic",
        "attn_block_type": "softmax",
        "scale_skip": model["scale_skip_connection"],
        "resblock_updown": True,
        "class_conditional": False,
        "prediction": "eps",
        "variance": "fixed_small",
        "loss_type": "simple",
        "schedule": "linear",
        "total_steps": diffusion["beta_schedule_args"]["n_timestep"],
        "first_beta": diffusion["beta_schedule_args"]["linear_start"],
        "last_beta": diffusion["beta_schedule_args"]["linear_end"],
        "lr": diffusion["optim_args"]["lr"],
        "weight_decay": 0,
        "batch_size": data["batch_size"],
    }
    assert config == {"sampler": "ddpm", "dataset": "mnist", "img_size": 32, "n_channels": 1, "in_memory": True}


def test_the_bundled_json_file_runs(tmp_path):
    config = parse_config(FILE, "--data_dir", str(tmp_path), "--lr", "1e-3")
    assert config.sampler.sampler == "ddpm" and config.reader.data_dir == str(tmp_path)
    assert config.training.lr == 1e-3  # a flag overrides the file
    assert config.training.train_steps == json.loads(FILE.read_text())["ddpm"]["train_steps"]


def test_the_published_shape_parses(tmp_path):
    config = parse_config(write_config(tmp_path))
    assert config.logging.log_dir == "mnist" and config.logging.logs_root == "experiments"
    assert config.reader.data_dir == "/data/mnist" and config.data.img_size == 32 and config.data.n_channels == 1
    assert config.training.train_steps == 375_000 and config.training.lr == 5e-5 and config.training.batch_size == 16


@pytest.mark.parametrize("steps", [1000, 200])
def test_betas_match_the_file_for_any_number_of_steps(steps, tmp_path):
    path = write_config(tmp_path, {f"{BETAS}.n_timestep": steps})
    alpha_bar = make_process(parse_config(path).sampler, pixels=True).alpha_bar
    betas = torch.linspace(1e-6, 0.01, steps, dtype=torch.float64)
    torch.testing.assert_close(alpha_bar[1:], (1 - betas).cumprod(0), rtol=1e-12, atol=0)
    scaled = (1 - betas * 1000 / steps).cumprod(0)  # with unconverted betas
    assert steps == 1000 or not torch.allclose(alpha_bar[1:], scaled, rtol=1e-2)


@pytest.mark.parametrize("steps", [1000, 200])
def test_quad_is_linear_in_the_square_root(steps, tmp_path):
    path = write_config(tmp_path, {f"{BETAS}.n_timestep": steps, f"{BETAS}.schedule": "quad"})
    betas = torch.linspace(1e-6**0.5, 0.01**0.5, steps, dtype=torch.float64).square()
    process = make_process(parse_config(path).sampler, pixels=True)
    torch.testing.assert_close(process.alpha_bar[1:], (1 - betas).cumprod(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", ["configs", "published"])
def test_the_network_has_the_blocks_of_the_file(path, tmp_path):
    path = FILE if path == "configs" else write_config(tmp_path)
    model = json.loads(path.read_text())["denoising_model"]["model_args"]
    config = parse_config(path).sampler
    process = make_process(config, pixels=True)
    with torch.device("meta"):
        network = make_network(config, process, model["in_channel"], 10 * config.class_conditional)
    widths = [mult * model["inner_channel"] for mult in model["channel_mults"]]
    assert network.conv_in.in_channels == model["in_channel"]
    assert network.conv_out.out_channels == model["out_channel"]
    assert not network.encoders
    steps = list(network.down_blocks)
    for level, width in enumerate(widths):
        attends = 2**level in model["attn_res"]
        for _ in range(model["res_blocks"]):
            blocks = steps.pop(0)
            assert [type(block) for block in blocks] == [ResBlock, SelfAttentionBlock][: 1 + attends]
            assert blocks[0].conv2.out_channels == width and blocks[0].scale_skip is model["scale_skip_connection"]
            assert blocks[0].norm2.num_groups == model["num_groups"]
        if level < len(widths) - 1:
            assert [block.resample for block in steps.pop(0)] == ["down"]  # a ResBlock, as in Palette
    assert not steps
    heads = {module.heads for module in network.modules() if hasattr(module, "heads")}
    assert heads == {widths[-1] // model["num_head_channels"]}


MAPPED = {  # changed keys -> the resulting flags
    "v": ({"diffusion.training_target": "v"}, {"prediction": "v"}),
    "x0": ({"diffusion.training_target": "y_0"}, {"prediction": "x0"}),
    "cosine": (
        {f"{BETAS}.schedule": "cosine", f"{BETAS}.linear_start": None, f"{BETAS}.linear_end": None},
        {"schedule": "cosine", "first_beta": REMOVED, "last_beta": REMOVED},
    ),
    "learned": ({f"{MODEL}.out_channel": 2}, {"variance": "learned_range", "loss_type": "hybrid"}),
    "heads": ({f"{MODEL}.num_head_channels": -1, f"{MODEL}.num_heads": 4}, {"head_width": None, "heads": 4}),
    "own block": ({f"{MODEL}.attn_block_type": "mine.blocks.Mine"}, {"attn_block_type": "mine.blocks.Mine"}),
    "no skip scale": ({f"{MODEL}.scale_skip_connection": None}, {"scale_skip": REMOVED}),
    "accumulate": ({"trainer_args.accumulate_grad_batches": 4}, {"batch_size": 64, "accumulate": 4}),
    "device": ({"trainer_args.accelerator": "gpu"}, {"device": "cuda"}),
    "ours last": ({"ddpm.lr": 1e-3, "ddpm.resblock_updown": False}, {"lr": 1e-3, "resblock_updown": False}),
    "epochs": ({"max_epochs": REMOVED, "ddpm": REMOVED}, {"train_steps": REMOVED}),
    "validation": ({"trainer_args.check_val_every_n_epoch": 1, "ddpm.steps_per_eval": 9}, {"steps_per_eval": 9}),
    "neutral": (
        {"callbacks": [], "gpu_ids": None, "sampling_args": None, "trainer_args.strategy": "ddp", "text_model": {}},
        {"callbacks": REMOVED},
    ),
}


@pytest.mark.parametrize("case", MAPPED)
def test_values_become_flags(case, tmp_path):
    changes, flags = MAPPED[case]
    section = read_json(write_config(tmp_path, changes))["ddpm"]
    assert {key: section.get(key, REMOVED) for key in flags} == flags
    parse_config(tmp_path / "mine.json")  # only existing flags


REFUSED = {  # key and value -> words in the message, besides file and key
    **{(f"{MODEL}.in_channel", value): ["1 or 3", "conditions"] for value in (6, 0, "1", True)},
    (f"{MODEL}.out_channel", 3): ["3", "wanted 1", "learned variance"],
    (f"{MODEL}.num_groups", 16): ["16", "wanted 32"],
    (f"{MODEL}.attn_res", (16,)): ["16", "[1, 2, 4, 8]"],
    (f"{MODEL}.attn_res", 8): ["8", "a list"],
    (f"{MODEL}.channel_mults", ()): ["[]", "a list"],
    (f"{MODEL}.inner_channel", 64.0): ["64.0", "whole number"],
    (f"{MODEL}.inner_channel", REMOVED): ["missing", "whole number"],
    (f"{MODEL}.num_head_channels", 0): ["-1"],
    (f"{MODEL}.scale_skip_connection", 1): ["true or false"],
    (f"{MODEL}.res_block_type", 3): ["a word"],
    ("denoising_model.model", "PartialUNet"): ["PartialUNet", "UNet"],
    ("denoising_model.model_args", ()): ["an object"],
    ("diffusion.training_target", "velocity"): ["velocity", '"noise" or "v" or "y_0"'],
    ("diffusion.training_target", "nois"): ["did you mean 'noise'"],
    ("diffusion.loss_fn", "mae"): ["mae", "mse", "loss_type"],
    ("diffusion.fast_sampler", "plms"): ["plms", "solver", "'ddpm'"],
    ("diffusion.guidance_scale", 5): ["5", "guidance"],
    ("diffusion.model_args", "x"): ["latents", "linear as quad"],
    ("diffusion.unet_init_weights", "a.ckpt"): ["a.ckpt", "load_dir"],
    (f"{BETAS}.schedule", "sqrt_linear"): ["sqrt_linear", '"linear" or "quad" or "cosine"'],
    (f"{BETAS}.schedule", "cosine"): ["cosine", "linear_start"],
    (f"{BETAS}.schedule", REMOVED): ["missing"],
    (f"{BETAS}.linear_start", 0): ["(0, 1)"],
    (f"{BETAS}.linear_end", REMOVED): ["needs"],
    (f"{BETAS}.n_timestep", "1000"): ["1000", "whole number"],
    ("diffusion.optim_args.weight_decay", 0.01): ["0.01", "AdamW"],
    ("diffusion.optim_args.lr", 0): ["above 0"],
    ("data.condition", "mask"): ["mask", "null", "conditions"],
    ("data.convert_mask2mesh", True): ["true", "false", "conditions"],
    ("data.convert_mask2onehot", True): ["true", "false", "conditions"],
    ("data.train_args.data_len", 100): ["100", "-1"],
    ("data.train_args.split", "test"): ["train"],
    ("data.dataset", ()): ["a word"],
    ("max_epochs", "many"): ["many", "whole number"],
    ("trainer_args.check_val_every_n_epoch", 1): ["steps_per_eval", "'ddpm'"],
    ("trainer_args.devices", (0, 1)): ["torchrun"],
    ("trainer_args.accelerator", "tpu"): ["tpu", "gpu"],
    ("save_model_config.every_n_epochs", 2): ["steps_per_checkpoint"],
    ("save_model_config.save_top_k", 5): ["5", "-1"],
    ("gpu_ids", (0, 1, 2, 3)): ["[0, 1, 2, 3]", "torchrun"],
    ("callbacks", ("callbacks.wandb",)): ["hooks"],
    ("sampling_args", 3): ["get_samples.py"],
    ("vqvae_model", 3): ["ae_load_dir"],
    ("ddpm", 3): ["object"],
    ("max_epochz", 3): ["max_epochs"],
    ("dat", 3): ["'data'"],
    ("denoising_model.model_arg", 3): ["'model_args'"],
    (f"{MODEL}.inner_chanel", 3): ["'inner_channel'"],
    (f"{BETAS}.linear_strat", 3): ["'linear_start'"],
    ("data.img_size", 3): ["'image_size'"],
}


@pytest.mark.parametrize("key, value", REFUSED, ids=lambda part: "gone" if part is REMOVED else str(part)[:40])
def test_errors_name_the_file_and_the_key(key, value, tmp_path):
    path = write_config(tmp_path, {key: value})
    with pytest.raises(ValueError) as error:
        read_json(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    for word in (str(path), key.rpartition(".")[2], *REFUSED[key, value]):
        assert word in message, message


def test_a_duplicate_key_is_refused_with_its_place(tmp_path):
    path = write_config(tmp_path)
    path.write_text('{"gpu_ids": [0],\n"gpu_ids": [1]}')
    with pytest.raises(ValueError, match="mine.json: line 2 column 15: got the key 'gpu_ids' twice in an object"):
        read_json(path)


def test_epochs_must_be_given_in_steps(tmp_path):
    with pytest.raises(ValueError, match="max_epochs 100.*write train_steps.*'ddpm'"):
        read_json(write_config(tmp_path, {"ddpm": REMOVED}))


def test_the_latent_layout_is_reported_before_missing_keys(tmp_path):
    inner = {"loss_fn": "mse", "beta_schedule_args": PUBLISHED["diffusion"]["beta_schedule_args"]}
    with pytest.raises(ValueError, match="linear as quad"):
        read_json(write_config(tmp_path, {"diffusion": {"model": "DDIM_ldm.Some", "model_args": inner}}))


def test_an_unknown_flag_in_the_section_suggests_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="mine.json: unknown key 'train_step'.*'train_steps'"):
        parse_config(write_config(tmp_path, {"ddpm.train_step": 3}))


@pytest.mark.parametrize("text", ["{", "", "[1]", "3", '{"expt_name": }', "null"])
def test_a_file_without_a_json_object_is_refused(text, tmp_path, capfd):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="broken.json"):
        read_json(path)
    with pytest.raises(SystemExit) as stop:
        call("train_sampler.py", f"--config {path}")
    assert stop.value.code == 2 and "broken.json" in capfd.readouterr().err


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        read_json(tmp_path / "nowhere.json")


def leaves(shape, content, above=""):
    """The dotted keys of the published file that are missing from the table."""
    for key, value in content.items():
        if key not in shape:
            yield above + key
        elif isinstance(shape[key], dict):
            yield from leaves(shape[key], value, f"{above}{key}.")


def test_every_published_key_is_known():
    assert not list(leaves(SHAPE, PUBLISHED))
