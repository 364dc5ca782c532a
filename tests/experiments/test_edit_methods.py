"""DiffEdit and FlowEdit by experiments/edit.py on tiny models of classes, captions and codes: what stays, the calls."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness import edit_methods, inversion
from experiments.harness.edit_methods import EditingConfig, EditTask, Side, find_method
from experiments.harness.editing import StrengthMaps, load_input_images
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from helpers.captioned import write_captioned_images
from helpers.prompted import make_model, options_of
from helpers.tiny_runs import DDPM, call
from models.conditioning import Condition
from train.trained_sampler import TrainedSampler

METHODS = ("diffedit", "flowedit", "ddpm_inversion")
CAPTIONS = ["a red star", "a blue ring"]
LEARNED = "--train_steps 20 --lr 0.02 --warmup_iters 0 --ema_beta 0.5 --no_amp"  # conditions matter after it


def edit(logs, flags):
    words = flags if isinstance(flags, list) else flags.split()
    call("experiments/edit.py", ["--logs_root", str(logs), "--no_amp", "--device", "cpu", *words])


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def pixels(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("L")))


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A model of classes of 8x8 digits."""
    logs = tmp_path_factory.mktemp("logs")
    call("train_sampler.py", f"--logs_root {logs} {DDPM} {LEARNED} --log_dir ddpm_digits", validation_images=4)
    return logs


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A model of captions of 8x8 images."""
    logs = tmp_path_factory.mktemp("logs")
    data = write_captioned_images(tmp_path_factory.mktemp("data"), CAPTIONS)
    text = "--conditions text --text_width 16 --text_layers 1 --text_heads 2 --attn_block_type transformer"
    flags = f"--logs_root {logs} {data} {DDPM} {text} {LEARNED} --log_dir text"
    call("train_sampler.py", flags, validation_images=4)
    return logs


# By class


def test_diffedit_by_class_keeps_the_rest_and_counts_its_calls(classes, capsys):
    flags = "--sampler ddpm --n_images 3 --label 3 8 --sample_steps 4 --strength 1 --guidance 2 --noisings 3"
    edit(classes, f"--method diffedit {flags} --log_dir by_class")
    folder, results = classes / "by_class", read_results(classes / "by_class")
    model = load_model(ModelConfig(sampler="ddpm"), OutputConfig(logs_root=str(classes)))
    inputs = load_input_images((), 3, model)
    for k, label in enumerate((3, 8)):
        row = results["of_label"][k]
        assert row["calls"] == 3 * (2 + 2) + 4 + 4 * 2  # noisings x guided sides, inversion, guided decoding
        assert row["seconds"] > 0 and row["outside"] == 0 and 0 < row["masked"] < 1 and "asked" in row
        for i, name in enumerate(inputs.names):
            mask = pixels(folder / "masks" / f"{i:03d}_{name}_as_{label}.png") == 255
            image = pixels(folder / "images" / f"{i:03d}_{name}_as_{label}.png")
            assert torch.equal(image[~mask], inputs.image[i, 0][~mask])
    assert "network calls per image" in capsys.readouterr().out
    with Image.open(folder / "edited.png") as grid:
        assert grid.width > 4 * 8  # original | mask | result | mask | result


def test_flowedit_by_class_counts_its_calls(classes):
    flags = "--sampler ddpm --n_images 2 --label 3 --sample_steps 4 --strength 1 --noisings 2"
    for name, options, calls in (
        ("flow", "", 2 * 2 * 4),
        ("guided", "--guidance 2 --plain_steps 1", 2 * 3 * (1 + 2) + 2),
        ("both", "--guidance 2 --source_guidance 3", 2 * 4 * (2 + 2)),
    ):
        edit(classes, f"--method flowedit {flags} {options} --log_dir {name}")
        (row,) = read_results(classes / name)["of_label"]
        assert row["calls"] == calls and row["distance"] > 0 and "outside" not in row
        assert not (classes / name / "masks").exists()


@pytest.mark.parametrize("method", METHODS)
def test_the_own_class_of_an_image_changes_nothing(classes, method, tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "a.png")
    flags = f"--sampler ddpm --method {method} --image {tmp_path / 'a.png'} --sample_steps 3 --label 3 4"
    edit(classes, f"{flags} --source_label 3 --guidance 2 --source_guidance 2 --log_dir own_{method}")
    own, other = read_results(classes / f"own_{method}")["of_label"]
    assert own["distance"] == 0 < other["distance"]


def test_costs_belong_to_a_batch_size(classes, capsys):
    flags = "--sampler ddpm --method flowedit --n_images 2 --label 3 --sample_steps 2 --log_dir costs"
    edit(classes, f"{flags} --batch_size 1")
    with pytest.raises(SystemExit):
        edit(classes, f"{flags} --batch_size 2")
    assert "batch_size" in capsys.readouterr().err


def test_noise_maps_edit_under_both_names(classes):
    flags = "--sampler ddpm --n_images 2 --label 3 --sample_steps 4 --strength 1 --guidance 2"
    for method in ("ddpm_inversion", "cyclediffusion"):
        edit(classes, f"--method {method} {flags} --log_dir {method}")
        (row,) = read_results(classes / method)["of_label"]
        assert row["calls"] == 4 + 4 * 2 and row["distance"] > 0
    first, second = (sorted((classes / name / "images").glob("*")) for name in ("ddpm_inversion", "cyclediffusion"))
    assert len(first) == 2 and all(torch.equal(pixels(a), pixels(b)) for a, b in zip(first, second, strict=True))


def test_sdedit_keeps_what_its_mask_leaves(classes, tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "a.png")
    Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 2, 0)).save(tmp_path / "right.png")
    flags = f"--sampler ddpm --image {tmp_path / 'a.png'} --mask {tmp_path / 'right.png'} --label 3 --sample_steps 3"
    for method in ("sdedit", "diffedit"):
        edit(classes, f"{flags} --method {method} --strength 1 --log_dir right_{method}")
        (row,) = read_results(classes / f"right_{method}")["of_label"]
        assert (row["masked"], row["outside"]) == (0.5, 0) and row["inside"] > 0
        image = pixels(classes / f"right_{method}" / "images" / "000_a_as_3.png")
        assert torch.equal(image[:, :4], pixels(tmp_path / "a.png")[:, :4])
    assert row["calls"] == 3 + 3  # inversion and decoding: none for a mask that is given


def test_targets_of_a_file_and_a_null_source(classes, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"label": 3}, {"label": None}]))
    flags = "--sampler ddpm --n_images 2 --sample_steps 3 --method flowedit --source null"
    edit(classes, f"{flags} --target_file {tmp_path / 'rows.json'} --log_dir rows")
    results = read_results(classes / "rows")
    assert results["names"] == ["target"] and "asked" not in results["of_label"][0]
    first, second = sorted((classes / "rows" / "images").glob("*_as_target.png"))
    model = load_model(ModelConfig(sampler="ddpm"), OutputConfig(logs_root=str(classes)))
    image = load_input_images((), 2, model).image[:, 0]
    assert not torch.equal(pixels(first), image[0]) and torch.equal(pixels(second), image[1])  # null to null


# By caption


@pytest.mark.parametrize("method", ["sdedit", *METHODS])
def test_captions_edit(captioned, method):
    flags = f"--sampler ddpm --dataset captions --load_dir text --method {method} --n_images 2 --sample_steps 3"
    own = ["--source_prompt", CAPTIONS[0]] if method != "sdedit" else []
    edit(captioned, [*flags.split(), "--prompt", *CAPTIONS, *own, "--log_dir", method])
    results = read_results(captioned / method)
    assert results["names"] == CAPTIONS and results["method"] == method
    same, other = results["of_label"]
    assert other["distance"] > 0 and (same["distance"] == 0) == (method != "sdedit")
    assert len(list((captioned / method / "images").glob("*_as_1.png"))) == 2


def test_the_source_of_held_out_images_is_their_caption(captioned, monkeypatch):
    given, make = [], TrainedSampler.make_denoiser

    def record(self, x, options, conditions, **kwargs):
        given.append(conditions)
        return make(self, x, options, conditions, **kwargs)

    monkeypatch.setattr(TrainedSampler, "make_denoiser", record)
    flags = "--sampler ddpm --dataset captions --load_dir text --method flowedit --n_images 3 --sample_steps 2"
    edit(captioned, [*flags.split(), "--prompt", "a green disc", "--log_dir", "held_out"])
    source, target = given
    assert {*source["caption"]} <= {*CAPTIONS} and len(source["caption"]) == 3
    assert target["caption"] == ["a green disc"] * 3


# From Python


def read_text(network, args, kwargs, output):
    """Adds to what a fresh network predicts something that depends on the text, most in one corner."""
    condition = next(each for each in args if isinstance(each, Condition))
    read = condition.tokens().values.mean(1) @ torch.linspace(-1, 1, 16)  # (B,)
    return output + read.sin()[:, None, None, None] * torch.linspace(0, 1, 16).view(4, 4) ** 3


@pytest.fixture(scope="module")
def model():
    """A model of captions of 4x4 pixels, with random weights."""
    model = make_model("ddpm")
    model.sampler.network.register_forward_hook(read_text, with_kwargs=True)
    return model


def task_of(model, method, prompts, *, images=None, indices=None, mask=None, **settings):
    """A task for one image of each prompt; the source is "a dog"."""
    rng = torch.Generator().manual_seed(3)
    images = torch.randint(256, (len(prompts), 1, 4, 4), generator=rng, dtype=torch.uint8) if images is None else images
    options = options_of(model, sample_steps=4, guidance=2.0)
    sides = [Side({"caption": texts}, options) for texts in (["a dog"] * len(prompts), list(prompts))]
    config, indices = EditingConfig(method=method, **settings), indices or list(range(len(prompts)))
    return EditTask(model, config, images, mask, *sides, 0, indices)


@pytest.mark.parametrize("method", METHODS)
def test_an_edit_does_not_depend_on_the_batch(model, method):
    prompts = ["a cat", "a hat", "a dog"]
    settings = {} if method == "ddpm_inversion" else {"noisings": 2}
    task = task_of(model, method, prompts, **settings)
    whole = find_method(method, model)(task)
    for i, prompt in enumerate(prompts):
        alone = task_of(model, method, [prompt], images=task.images[i : i + 1], indices=[i], **settings)
        result = find_method(method, model)(alone)
        assert (result.image[0].int() - whole.image[i].int()).abs().max() <= 1  # rounding of other batches
        if result.mask is not None:
            assert torch.equal(result.mask[0], whole.mask[i])
    assert torch.equal(whole.image[2], task.images[2]) and not torch.equal(whole.image[1], task.images[1])


def test_the_inversion_is_neither_guided_nor_clipped(model, monkeypatch):
    given, make = [], TrainedSampler.make_denoiser
    monkeypatch.setattr(
        TrainedSampler,
        "make_denoiser",
        lambda self, x, options, conditions: given.append((options, conditions)) or make(self, x, options, conditions),
    )
    find_method("diffedit", model)(task_of(model, "diffedit", ["a cat"]))
    unguided = [(options.clip, conditions["caption"]) for options, conditions in given if options.guidance == 1]
    assert unguided == [(False, ["a dog"])] and len(given) == 4


def test_the_mask_is_found_at_its_own_noise_level(model, monkeypatch):
    given = []

    def record(source, target, process, x, t, *, rng, n):
        given.append((process.start, t, n))
        return torch.rand(len(x), 4, 4)

    monkeypatch.setattr(edit_methods, "noise_differences", record)
    task = task_of(model, "diffedit", ["a cat"], strength=1.0, mask_strength=0.3, noisings=7)
    edit_methods.find_mask(task)
    start = edit_methods.ddim_times(model, task.target.options.without_guidance(), 0.3)[0].start
    assert given == [(start, start, 7)] and start < task.ddim_times[0].start


def test_pixels_that_may_not_change_are_those_of_the_input(model):
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    task = task_of(model, "diffedit", ["a cat"], mask=mask, paste=True)
    edited, inside = task.edited(255 - task.images, mask), mask.unsqueeze(1)
    assert torch.equal(edited.image, torch.where(inside, 255 - task.images, task.images))
    maps = torch.zeros(1, 4, 4)
    maps[:, 1:] = 0.2
    edited = replace(task, strengths=StrengthMaps(maps, 0.2)).edited(255 - task.images, mask)
    assert torch.equal(edited.mask, mask & (maps > 0)) and not edited.mask[:, 0].any()
    assert torch.equal(edited.image[..., 0, :], task.images[..., 0, :])


def test_plain_steps_alone_ignore_the_source(model):
    task = task_of(model, "flowedit", ["a cat"], strength=1.0, plain_steps=4)
    other = replace(task, source=Side({"caption": ["a hat"]}, task.source.options))
    target = replace(task, target=other.source)
    first, second, third = (find_method("flowedit", model)(each).image for each in (task, other, target))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_the_source_has_a_guidance_of_its_own(model):
    options = options_of(model, guidance=3.0)
    scales = {
        (method, scale): EditingConfig(method=method, source_guidance=scale).source_options(options).guidance
        for method in METHODS
        for scale in (None, 2.0)
    }
    assert scales == {
        ("diffedit", None): 3,
        ("diffedit", 2.0): 2,
        ("flowedit", None): 1,
        ("flowedit", 2.0): 2,
        ("ddpm_inversion", None): 1,
        ("ddpm_inversion", 2.0): 2,
    }


def test_too_little_noise_is_refused(model):
    with pytest.raises(ValueError, match="got strength 0.001, wanted more noise"):
        find_method("flowedit", model)(task_of(model, "flowedit", ["a cat"], strength=0.001))


# Codes


@pytest.fixture
def draws(monkeypatch):
    """The edit input and the codes of every sampled batch."""
    batches, draw = [], TrainedSampler.draw

    def record(self, *args, edit, **kwargs):
        result = draw(self, *args, edit=edit, **kwargs)
        batches.append((edit, result["codes"]))
        return result

    monkeypatch.setattr(TrainedSampler, "draw", record)
    return batches


def test_codes_outside_the_mask_stay(trained, draws):
    flags = "--method diffedit --n_images 4 --label 1 --strength 1 --sample_steps 4 --guidance 2 --noisings 4"
    edit(trained, f"{flags} --log_dir edited_codes")
    ((start, codes),) = draws
    assert torch.equal(codes[start.keep], start.x0[start.keep]) and start.strength == 1
    assert start.keep.flatten(1).any(1).all() and not start.keep.all()
    (row,) = read_results(trained / "edited_codes")["of_label"]
    assert row["masked"] == pytest.approx((~start.keep).float().mean().item())
    assert 4 * (2 + 2) < row["calls"] <= 4 * (2 + 2) + 2 * 4
    edit(trained, f"{flags} --paste --log_dir pasted_codes")
    assert read_results(trained / "pasted_codes")["of_label"][0]["outside"] == 0 < row["outside"]


# What is refused


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--method flowedit", "got method flowedit for sampler absorbing, wanted sdedit or diffedit"),
        ("--noisings 3", "got noisings for method sdedit: pass --method diffedit or flowedit"),
        ("--method flowedit --mask_rule paper", "got mask_rule for method flowedit: pass --method diffedit"),
        ("--method diffedit --plain_steps 2", "got plain_steps for method diffedit: pass --method flowedit"),
        ("--method diffedit --mask a.png", "got --mask without --image"),
        ("--method diffedit --mask a.png --mask_rule paper", "got mask and mask_rule"),
        ("--paste", "got paste without a mask"),
        ("--source_label 3", "got source_label for method sdedit"),
        ("--method diffedit --source null --source_label 3", "got source null and source_label"),
        ("--method diffedit --source null --source_guidance 2", "got source null and source_guidance"),
        ("--method diffedit --source_label 12", "label 12, wanted a class from 0 to 9"),
        ("--label 1 --prompt star", "got label and prompt: pass one of them"),
        ("--prompt star", "which reads label: pass a run with --conditions text"),
        ("--target_file none.json", "none.json not found: pass a .json or .csv file as --target_file"),
        ("--method diffedit --mask_strength 1", "wanted a number in (0, 1)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(trained, capsys, flags, expected):
    with pytest.raises(SystemExit) as stop:
        edit(trained, f"{flags} --n_images 2 --log_dir methods_refused")
    assert stop.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (trained / "methods_refused").exists()


DDIM_ALONE = [
    ("--solver ddim --eta 1", "got eta 1.0, but the steps are those of ddim: leave it out, or pass --eta None"),
    ("--repaint_resamplings 2", "got repaint_resamplings 2"),
    ("--guidance 2 --guidance_interval 0.111 0.112", "which holds none of the 4 steps"),
    ("--strength 0.001", "got strength 0.001, wanted more noise"),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("flags", "expected"), DDIM_ALONE)
def test_what_ddim_would_ignore_is_refused(classes, capsys, method, flags, expected):
    common = f"--sampler ddpm --method {method} --n_images 2 --label 3 --sample_steps 4 --strength 1 --log_dir ignored"
    with pytest.raises(SystemExit) as stop:
        edit(classes, f"{common} {flags}")
    assert stop.value.code == 2 and not (classes / "ignored").exists()
    assert expected in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_without_float64_noise_maps_are_float32(model, monkeypatch):
    """As on Metal, which has no float64."""
    task = task_of(model, "ddpm_inversion", ["a cat", "a dog"])
    exact = find_method("ddpm_inversion", model)(task).image
    monkeypatch.setattr(edit_methods, "in_double_precision", lambda x: x)
    monkeypatch.setattr(inversion, "in_float64", None)
    rounded = find_method("ddpm_inversion", model)(task).image
    assert (rounded.int() - exact.int()).abs().max() <= 1


def test_values_that_are_not_finite_name_the_method(model):
    task = task_of(model, "flowedit", ["a cat"])
    with pytest.raises(ValueError, match="^method flowedit gave values that are not finite: pass --no_amp, less"):
        task.decoded(task.x * torch.nan)


def test_guidance_needs_conditions_of_the_source(classes, capsys, tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "a.png")
    with pytest.raises(SystemExit):
        edit(classes, f"--sampler ddpm --method flowedit --image {tmp_path / 'a.png'} --label 3 --source_guidance 2")
    assert "pass --source_label or --source_prompt" in " ".join(capsys.readouterr().err.split())


def test_the_flag_of_too_little_noise_is_named(model):
    with pytest.raises(ValueError, match="got mask_strength 0.001, .*: pass a larger --mask_strength"):
        find_method("diffedit", model)(task_of(model, "diffedit", ["a cat"], mask_strength=0.001))


def test_a_model_without_classes_needs_a_target(captioned, capsys):
    with pytest.raises(SystemExit):
        edit(captioned, "--sampler ddpm --dataset captions --load_dir text --n_images 2")
    assert "was trained without classes: pass --prompt TEXT" in " ".join(capsys.readouterr().err.split())


def test_words_of_metadata_are_a_target():
    from experiments.edit import read_targets

    model = make_model("ddpm", words=True)
    options = replace(options_of(model), metadata=("light=night",))
    (target,) = read_targets(EditingConfig(), options, model)
    assert target.name == "light=night" and target.row(5) == {}
