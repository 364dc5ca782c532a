"""User code by dotted path: hooks that observe training, and functions that adapt items."""

import importlib
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffusion.gaussian import cosine
from helpers.tiny_runs import DDPM, SAMPLER, call
from train.datasets import DatasetConfig
from train.registry import import_callable
from train.sampler_loading import check_allowed
from train.samplers import ddpm

WATCH = """
recorded = []

def keep(state, outputs):
    recorded.append((state.step, {name: value.clone() for name, value in outputs.items()}))

def count(state, outputs):
    recorded.append(("counted", dict(outputs)))

constant = 3
"""

ADAPT = """
import torch
from torchvision import tv_tensors
from train.datasets import Ragged

items = []

def upper(item):
    items.append(dict(item))
    image = item["image"].clone()
    image[:, image.shape[1] // 2 :] = 0
    return item | {"condition_image": image}

def forgets(item):
    return {"image": item["image"], "label": item["label"]}

def nothing(item):
    pass

def words(item):
    return item | {"name": ("a", "png")}

def crops(item):
    crops.side = getattr(crops, "side", 4) + 1
    return item | {"condition_image": item["image"][:, : crops.side]}

def annotated(item):
    n = int(item["label"]) % 3
    classes, parts = (tv_tensors.Mask(item["image"][0].expand(*size, 8, 8)) for size in ((), (n,)))
    fields = {"caption": f"a {n}", "words": ["a"] * n, "ids": Ragged(torch.arange(n))}
    return item | fields | {"classes": classes, "parts": parts}

def unlabelled(item):
    return {"image": item["image"], "condition_image": item["image"]}
"""


@pytest.fixture
def user_modules(tmp_path, monkeypatch):
    """User modules, importable for one test."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_own").mkdir()
    (tmp_path / "my_own" / "__init__.py").write_text("")
    (tmp_path / "my_own" / "watching.py").write_text(WATCH)
    (tmp_path / "my_own" / "adapting.py").write_text(ADAPT)
    (tmp_path / "my_own" / "needy.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "my-own.py").write_text("def upper(item):\n    return item\n")
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("my_own", "my-own")]:
        del sys.modules[name]


def error_message(script, flags, capfd):
    """The error message of a script that exits with code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(script, flags)
    assert stop.value.code == 2
    message = capfd.readouterr().err
    assert "Traceback" not in message
    return message


# --hooks


EPS = "--prediction eps --variance learned_range --schedule cosine"  # not those of the preset


@pytest.mark.parametrize("kind", ["ddpm", "absorbing"])
def test_hooks_get_inputs_and_predictions_at_every_step(kind, user_modules, trained, tmp_path):
    flags = f"{SAMPLER} --logs_root {trained}" if kind == "absorbing" else f"{DDPM} {EPS} --logs_root {tmp_path}"
    watch = "--hooks my_own.watching.keep my_own.watching.count"
    call("train_sampler.py", f"{flags} --train_steps 3 --no_amp --log_dir watched_{kind} --accumulate 2 {watch}")
    from my_own.watching import recorded

    steps = recorded[::2]
    assert [step for step, _ in steps] == [1, 2, 3] and [step for step, _ in recorded[1::2]] == ["counted"] * 3
    for _, outputs in steps:
        assert {"loss", "losses", "x_t", "t", "prediction", "x0_hat", "x0"} <= outputs.keys()
        assert outputs["losses"].shape == outputs["t"].shape == (4,)  # both micro-batches
        assert torch.allclose(outputs["loss"], outputs["losses"].mean()) or "times" in flags
        assert outputs["losses"].isfinite().all() and not any(value.requires_grad for value in outputs.values())
        assert outputs["x_t"].shape == outputs["x0"].shape == outputs["x0_hat"].shape
        if kind == "absorbing":
            hidden = outputs["x_t"] == 16
            assert torch.equal(outputs["x_t"][~hidden], outputs["x0"][~hidden])
            assert torch.equal(outputs["x0_hat"][~hidden], outputs["x0"][~hidden])
            assert (outputs["x0_hat"] < 16).all() and outputs["prediction"].shape[-1] == 16
        else:
            assert outputs["x0"].shape == (4, 1, 8, 8) and outputs["prediction"].shape == (4, 2, 8, 8)
    if kind == "ddpm":  # the network starts at 0: eps is 0, which determines x0
        first = steps[0][1]
        alpha = cosine(20)[(20 * first["t"]).round().long()].sqrt().float().view(-1, 1, 1, 1)
        assert torch.allclose(first["x_t"], alpha * first["x0_hat"], atol=1e-5)
        assert not torch.equal(steps[1][1]["prediction"], first["prediction"])  # the network has been trained


@pytest.mark.slow
def test_hooks_change_nothing(user_modules, tmp_path):
    flags = f"{DDPM} --logs_root {tmp_path} --train_steps 2 --no_amp"
    call("train_sampler.py", f"{flags} --log_dir one")
    call("train_sampler.py", f"{flags} --log_dir two --hooks my_own.watching.keep")
    one, two = (
        (tmp_path / name / "checkpoints" / "step_00000002" / "model.safetensors").read_bytes()
        for name in ("one", "two")
    )
    assert one == two
    call("train_sampler.py", f"{flags} --log_dir two")  # a run can resume without hooks


WRONG = {
    "my_own.watching.nothing": "my_own.watching has no function nothing",
    "my_own.watching.constant": "my_own.watching has no function constant",
    "my_own.wathing.keep": "there is no module my_own.wathing",
    "nobodys.module.keep": "there is no module nobodys",
    "keep": "wanted package.module.function",
}


@pytest.mark.parametrize("flag", ["--hooks", "--adapt"])
@pytest.mark.parametrize("path", WRONG)
def test_a_wrong_dotted_path_is_refused_in_one_line(path, flag, user_modules, tmp_path, capfd):
    message = error_message("train_sampler.py", f"{DDPM} --logs_root {tmp_path} --train_steps 1 {flag} {path}", capfd)
    assert message.startswith("train_sampler.py: got ") and message.count("\n") == 1
    assert f"{flag} {path!r}" in message and WRONG[path] in message
    assert not (tmp_path / "ddpm_digits").exists()


@pytest.mark.parametrize("path", ["", ".keep", "my_own..keep", "my_own.", "my_own.watching."])
def test_a_malformed_dotted_path_is_a_clean_error(path, user_modules):
    with pytest.raises(ValueError, match="got --hooks"):
        import_callable(path, "--hooks")


def test_import_errors_of_user_modules_are_named(user_modules):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        import_callable("my_own.needy.function", "--hooks")


# --adapt

IMAGE = "--conditions image --condition_channels 1 --n_channels 1"


@pytest.fixture
def adapted(user_modules, tmp_path):
    """A run conditioned on the upper half of digits, trained for two steps."""
    flags = f"{DDPM} {IMAGE} --logs_root {tmp_path} --no_amp --adapt my_own.adapting.upper"
    call("train_sampler.py", f"{flags} --train_steps 2 --log_dir upper")
    return tmp_path


def test_adapt_adds_the_fields_that_conditions_need(adapted, monkeypatch):
    from my_own.adapting import items

    assert {"image", "label"} <= items[0].keys()
    assert items[0]["image"].dtype == torch.uint8 and items[0]["image"].shape == (1, 8, 8)
    content = yaml.safe_load((adapted / "upper" / "config.yaml").read_text())
    assert content["sampler"]["adapt"] == "my_own.adapting.upper"
    inputs = []
    from models.conditions.image import ImageEncoder

    forward = ImageEncoder.forward
    monkeypatch.setattr(
        ImageEncoder, "forward", lambda self, raw, x, drop=None: inputs.append(raw) or forward(self, raw, x, drop)
    )
    flags = "--load_dir upper --n_samples 5 --batch_size 3 --sample_steps 2 --no_amp --guidance 2.0"
    allow = "--allow my_own.adapting.upper"
    call("experiments/get_samples.py", f"--logs_root {adapted} {flags} {allow} --log_dir s5")
    with np.load(adapted / "s5" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 8, 8, 3) and arrays["labels"].shape == (5,)
    images = [raw for raw in inputs if raw is not None]
    assert [len(raw) for raw in images] == [1, 3, 2]  # a trial with one image, then the batches
    assert {tuple(raw.shape[1:]) for raw in images} == {(1, 8, 8)}
    assert all((raw[:, :, 4:] == -1).all() and raw[:, :, :4].max() > 0 for raw in images)
    assert sum(raw is None for raw in inputs) == 3  # the null, once per batch


@pytest.mark.slow
def test_samples_with_adapt_do_not_depend_on_the_batch(adapted):
    flags = "--load_dir upper --n_samples 3 --sample_steps 2 --no_amp --allow my_own.adapting.upper"
    for size in (3, 1):
        call("experiments/get_samples.py", f"--logs_root {adapted} {flags} --batch_size {size} --log_dir b{size}")
    with np.load(adapted / "b3" / "samples.npz") as batched, np.load(adapted / "b1" / "samples.npz") as single:
        assert np.array_equal(batched["arr_0"], single["arr_0"]) and np.array_equal(batched["labels"], single["labels"])


@pytest.mark.slow
def test_experiments_on_a_run_with_adapt_need_its_code(adapted, capfd):
    flags = f"--logs_root {adapted} --load_dir upper --n_samples 2 --sample_steps 1 --log_dir x"
    message = error_message("experiments/get_samples.py", flags, capfd)
    assert "was trained with --adapt my_own.adapting.upper, which is code" in message
    assert "--allow my_own.adapting.upper" in message and message.count("\n") == 1
    message = error_message("experiments/get_samples.py", f"{flags} --allow my_own.adapting.forgets", capfd)
    assert "--allow my_own.adapting.upper" in message
    assert not (adapted / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra_flags", ["--accumulate 2 --channels_last yes", "--num_workers 1 --max_bad_steps 0 --lr 1e30"]
)
def test_unused_fields_are_kept(extra_flags, user_modules, tmp_path, capfd):
    """In the loop, validation and the saved batches of bad steps."""
    flags = (
        f"--logs_root {tmp_path} {DDPM} --n_channels 1 --no_amp --steps_per_eval 1 --adapt my_own.adapting.annotated"
    )
    if "lr" not in extra_flags:
        call("train_sampler.py", f"{flags} --train_steps 2 --steps_per_eval 1 {extra_flags}")
        return
    with pytest.raises(SystemExit):
        call("train_sampler.py", f"{flags} --train_steps 9 --warmup_iters 0 --grad_clip 0 {extra_flags}")
    assert "were not finite" in capfd.readouterr().err
    (path,) = tmp_path.rglob("bad_steps/*.safetensors")
    assert {"caption", "words", "ids", "ids_mask", "parts_mask", "classes"} <= load_file(path).keys()


@pytest.mark.parametrize(("function", "field"), [("forgets", "condition_image"), ("unlabelled", "label")])
def test_an_adapt_that_omits_a_field_is_refused(function, field, user_modules, tmp_path, capfd):
    flags = f"{DDPM} {IMAGE} --logs_root {tmp_path} --no_amp --train_steps 1 --adapt my_own.adapting.{function}"
    message = error_message("train_sampler.py", flags, capfd)  # the last line, after those of the progress bar
    assert f"held-out images have no {field}: add them to the items of the data set" in message


@pytest.mark.parametrize(
    ("function", "message"), [("nothing", "NoneType"), ("words", "'name'"), ("crops", "'condition_image'")]
)
def test_an_adapt_whose_items_do_not_collate_is_refused(function, message, user_modules, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        call("train_sampler.py", f"--logs_root {tmp_path} {DDPM} --train_steps 1 --adapt my_own.adapting.{function}")
    assert stop.value.code == 2 and message in capfd.readouterr().err


def test_a_condition_without_an_adapt_is_refused(tmp_path, capfd):
    message = error_message("train_sampler.py", f"{DDPM} {IMAGE} --logs_root {tmp_path} --train_steps 1", capfd)
    assert "condition_image" in message and "--adapt" in message


def test_an_adapt_changed_since_training_is_refused(adapted, monkeypatch, capfd):
    from my_own import adapting

    monkeypatch.setattr(adapting, "upper", adapting.forgets)
    flags = "--load_dir upper --n_samples 2 --sample_steps 1 --allow my_own.adapting.upper --log_dir x"
    message = error_message("experiments/get_samples.py", f"--logs_root {adapted} {flags}", capfd)
    assert "condition_image" in message and "--adapt" in message


# code named by a run needs permission


def test_every_setting_that_names_code_must_be_allowed(tmp_path):
    reader, sampler = DatasetConfig(), ddpm.Config(res_block_type="my.blocks.Block", adapt="my_own.adapting.upper")
    with pytest.raises(ValueError, match="--adapt my_own.adapting.upper, which is code: pass --allow my_own.adapting"):
        check_allowed(tmp_path, reader, ("my.blocks.Block",), sampler)
    with pytest.raises(ValueError, match="--res_block_type my.blocks.Block, which is code: pass --allow my.blocks"):
        check_allowed(tmp_path, reader, ("my_own.adapting.upper",), sampler)
    check_allowed(tmp_path, reader, ("my.blocks.Block", "my_own.adapting.upper"), sampler)
    check_allowed(tmp_path, DatasetConfig(data_dir="/data/birds.v2"), (), ddpm.Config(channels=8))


@pytest.mark.parametrize("path", ["my-own.upper", "über.f", "_mine.f", "my_own.adapting.upper", "my_own.2.f"])
def test_every_importable_path_must_be_allowed(path, tmp_path):
    """importlib accepts module names that are not identifiers, so the check must not be limited to identifiers."""
    with pytest.raises(ValueError, match="--allow"):
        check_allowed(tmp_path, DatasetConfig(), (), ddpm.Config(adapt=path))


def test_an_edited_config_runs_no_code(adapted, monkeypatch, capfd):
    path = adapted / "upper" / "config.yaml"
    path.write_text(path.read_text().replace("my_own.adapting.upper", "my-own.upper"))
    flags = f"--logs_root {adapted} --load_dir upper --n_samples 2 --sample_steps 1 --log_dir x"
    capfd.readouterr()
    with pytest.raises(SystemExit):
        call("experiments/get_samples.py", flags)
    assert "my-own" not in sys.modules
    assert "--allow my-own.upper" in capfd.readouterr().err
