"""Trained runs from Python: what `load` and `load_vqgan` return and refuse."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.harness.images import read_samples
from helpers.tiny_runs import DDPM, ROOT, SAMPLER, call
from train.data.transforms import to_float, to_uint8
from train.inference import SamplerRun, load, load_vqgan
from train.trained_sampler import TrainedSampler

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def codes(trained) -> SamplerRun:
    """An absorbing sampler of codes of 16x16 digits, with classes."""
    return load(trained / "absorbing_digits", device="cpu", amp=False)


@pytest.fixture(scope="module")
def pixels(trained_ddpm) -> SamplerRun:
    """A Gaussian sampler of 8x8 digits, with classes."""
    return load(trained_ddpm / "ddpm_digits", device="cpu", amp=False)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(256, (5, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def with_names(codes, monkeypatch) -> SamplerRun:
    """A sampler of codes that recorded no names, as before they existed, with a data set that names its classes."""
    monkeypatch.setattr(TrainedSampler, "dataset", lambda model, split: SimpleNamespace(class_names=NAMES))
    return SamplerRun(dataclasses.replace(codes.model, class_names=()), codes.settings)


# Sampling


@pytest.mark.parametrize(
    ("name", "flags", "keywords"),
    [
        ("own_settings", "", {}),
        ("of_class", "--label 7 --guidance 3", {"label": 7, "guidance": 3}),
        pytest.param("other", "--solver halton --temp 0.5", {"solver": "halton", "temp": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_images_are_those_of_get_samples(codes, trained, name, flags, keywords):
    shared = f"--logs_root {trained} --no_amp --device cpu --n_samples 6 --seed 3"
    call("experiments/get_samples.py", f"{shared} {flags} --batch_size 4 --log_dir python_{name}")
    expected = read_samples(trained / f"python_{name}" / "samples.npz")["image"]
    assert torch.equal(codes.sample(6, seed=3, **keywords).expand(-1, 3, -1, -1), expected)


def test_pixels_are_those_of_get_samples(pixels, trained_ddpm):
    flags = "--sampler ddpm --no_amp --device cpu --n_samples 4 --label 4 --solver ddim --sample_steps 3 --eta 0.5"
    call("experiments/get_samples.py", f"--logs_root {trained_ddpm} {flags} --log_dir python_pixels")
    expected = read_samples(trained_ddpm / "python_pixels" / "samples.npz")["image"]
    sampled = pixels.sample(4, label=4, solver="ddim", sample_steps=3, eta=0.5)
    assert torch.equal(sampled.expand(-1, 3, -1, -1), expected)


def test_images_do_not_depend_on_the_batch(codes):
    expected = codes.sample(5, seed=1)
    assert expected.shape == (5, 1, 16, 16) and expected.dtype == torch.uint8
    assert torch.equal(codes.sample(5, seed=1, batch_size=2), expected)
    assert torch.equal(codes.sample(3, seed=1), expected[:3])
    assert not torch.equal(codes.sample(5, seed=2), expected)


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ([1, None, 8], [1, 10, 8]),
        ((1, 1, 8), [1, 1, 8]),
        (torch.tensor([1, 2, 8]), [1, 2, 8]),
        (torch.tensor(8), [8, 8, 8]),
        (None, [10, 10, 10]),
        (0, [0, 0, 0]),
    ],
)
def test_each_image_is_drawn_with_its_label(codes, monkeypatch, label, expected):
    labels, draw = [], TrainedSampler.draw

    def record(model, indices, seed, options, conditions, **keywords):
        labels.extend(conditions["label"].tolist())
        return draw(model, indices, seed, options, conditions, **keywords)

    monkeypatch.setattr(TrainedSampler, "draw", record)
    codes.sample(3, label=label, batch_size=2, sample_steps=1)
    assert labels == expected


@pytest.mark.parametrize(
    ("negative", "expected"),
    [({"label": 7}, [7, 7, 7]), ({"label": [1, None, 3]}, [1, 10, 3]), (None, None), ({}, None)],
)
def test_each_image_is_drawn_with_its_negative_label(codes, monkeypatch, negative, expected):
    labels, draw = [], TrainedSampler.draw

    def record(*args, negative, **keywords):
        labels.extend([None] if negative is None else negative["label"].tolist())
        return draw(*args, negative=negative, **keywords)

    monkeypatch.setattr(TrainedSampler, "draw", record)
    codes.sample(3, label=2, guidance=3.0, negative=negative, batch_size=2, sample_steps=1)
    assert labels == (expected or [None, None])


def test_negative_conditions_that_do_not_fit_are_refused(codes):
    with pytest.raises(ValueError, match="got the negative condition caption, this sampler takes: label"):
        codes.sample(2, guidance=5.0, negative={"caption": "a"})
    with pytest.raises(ValueError, match="got 2 values of label for 4 images"):
        codes.sample(4, guidance=5.0, negative={"label": [1, 2]})


def test_settings_of_the_run_are_the_defaults(codes):
    steps = []

    def on_step(i, t, s, x, prediction):
        steps.append(i)
        return x

    assert codes.settings.sample_steps == 4
    codes.sample(1, on_step=on_step)
    codes.sample(1, on_step=on_step, sample_steps=2)
    assert steps == [0, 1, 2, 3, 0, 1]


def test_another_canvas(codes, pixels):
    assert codes.sample(2, shape=(5, 6)).shape == (2, 1, 20, 24)
    assert pixels.sample(2, shape=(12, 8)).shape == (2, 1, 12, 8)


def test_classes_by_name(with_names):
    assert with_names.class_names == NAMES
    assert torch.equal(with_names.sample(2, label="seven"), with_names.sample(2, label=7))
    assert torch.equal(with_names.sample(2, label=["one", 3]), with_names.sample(2, label=[1, 3]))
    with pytest.raises(ValueError, match="label 'sevn', did you mean 'seven'"):
        with_names.sample(2, label="sevn")


def test_classes_are_drawn_as_in_the_data_or_uniformly(codes, pixels):
    frequencies = torch.tensor([0.9, 0.1, *[0.0] * 8], dtype=torch.float64)
    model = dataclasses.replace(codes.model, class_frequencies=frequencies)
    for name, fraction in (("data", 0.9), ("uniform", 0.5)):
        source = model.condition_source(dataclasses.replace(codes.settings, class_sampling=name))
        labels = source.draw(0, range(1000))["label"]
        assert labels.max() == 1 and (labels == 0).float().mean().item() == pytest.approx(fraction, abs=0.05)
    uniform = dataclasses.replace(codes.settings, class_sampling="uniform")
    with pytest.raises(ValueError, match="class_sampling uniform for the classes, but the sampler has none: leave it"):
        dataclasses.replace(codes.model, class_frequencies=None).condition_source(uniform)


def test_names_that_the_run_stored_come_first(trained, tmp_path):
    for name in ("vqgan_digits", "absorbing_digits"):
        shutil.copytree(trained / name, tmp_path / name)
    path = tmp_path / "absorbing_digits" / "config.yaml"
    content = yaml.safe_load(path.read_text())
    content["origin"]["class_names"] = list(NAMES)
    path.write_text(yaml.safe_dump(content))
    run = load("absorbing_digits", logs_root=tmp_path, device="cpu", amp=False)
    assert run.class_names == NAMES
    assert torch.equal(run.sample(1, label="two"), run.sample(1, label=2))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"guidanc": 2}, TypeError, "unexpected keyword 'guidanc', did you mean 'guidance'"),
        ({"lable": 2}, TypeError, "did you mean 'label'"),
        ({"condition_image": torch.zeros(1, 8, 8)}, TypeError, "unexpected keyword 'condition_image'"),
        ({"solver": "haltn"}, ValueError, "solver 'haltn', did you mean 'halton'"),
        ({"reveal": "cosin"}, ValueError, "did you mean 'cosine'"),
        ({"guidance": "much"}, ValueError, "got guidance 'much', wanted a number"),
        ({"sample_steps": 0}, ValueError, "got sample_steps 0, wanted at least 1"),
        ({"remask_eta": 0.5}, ValueError, "got remask_eta 0.5 for solver ancestral"),
        ({"label": 10}, ValueError, "got label 10, wanted a class from 0 to 9"),
        ({"label": -1}, ValueError, "got label -1, wanted a class from 0 to 9"),
        ({"label": True}, TypeError, "got label True, wanted a class number"),
        ({"label": 7.0}, TypeError, "got label 7.0, wanted a class number"),
        ({"label": "seven"}, ValueError, "got label 'seven', wanted one of 0, 1, .* 9 or a number"),
        ({"label": [1, 2, 3]}, ValueError, "got 3 values of label for 2 images"),
        ({"batch_size": 0}, ValueError, "got batch_size 0, wanted at least 1"),
        ({"seed": 0.5}, TypeError, "got seed 0.5, wanted a whole number"),
        ({"shape": (5,)}, TypeError, r"wanted \(height, width\)"),
        ({"shape": (5, 0)}, ValueError, "got width 0, wanted at least 1"),
    ],
)
def test_bad_arguments_are_refused(codes, keywords, error, message):
    with pytest.raises(error, match=message):
        codes.sample(2, **keywords)


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_numbers_of_images_are_refused(codes, n, error):
    with pytest.raises(error, match="got n"):
        codes.sample(n)


def test_draw_wants_the_options_of_its_sampler(codes, pixels):
    with pytest.raises(ValueError, match=r"got train\.samplers\.ddpm\.Sampling.*wanted train\.samplers\.absorbing"):
        codes.model.draw([0], 0, pixels.settings, None)


# Other conditions


@pytest.fixture(scope="module")
def image_conditioned(trained_ddpm, tmp_path_factory):
    """A Gaussian sampler conditioned on a class and on the image at half brightness."""
    folder = tmp_path_factory.mktemp("code")
    code = "def half(item):\n    return item | {'condition_image': item['image'] // 2}\n"
    (folder / "my_half.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        flags = f"{DDPM} --steps_per_eval 0 --adapt my_half.half --conditions image --condition_channels 1"
        call("train_sampler.py", f"--logs_root {trained_ddpm} --no_amp --train_steps 1 {flags} --log_dir python_image")
        run = trained_ddpm / "python_image"
        with pytest.raises(ValueError, match="pass --allow my_half.half"):
            load(run, device="cpu")
        model = load(run, device="cpu", amp=False, allow=["my_half.half"])
        weight = model.model.sampler.network.conv_in.weight  # as if it had learned to use the image
        weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        head = model.model.sampler.network.conv_out.weight
        head.data.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
        yield model


def test_images_as_conditions(image_conditioned):
    assert set(image_conditioned.conditions) == {"label", "condition_image"}
    pictures = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    batch = image_conditioned.sample(3, condition_image=pictures, label=2)
    assert torch.equal(image_conditioned.sample(3, condition_image=list(pictures), label=2), batch)
    assert torch.equal(image_conditioned.sample(3, condition_image=to_float(pictures), label=2), batch)
    assert torch.equal(image_conditioned.sample(3, condition_image=pictures[1], label=2)[1], batch[1])
    assert not torch.equal(image_conditioned.sample(3, condition_image=255 - pictures, label=2), batch)
    default = image_conditioned.sample(2, label=2)  # by default, held-out images
    assert default.shape == (2, 1, 8, 8)


def test_no_condition_at_all(image_conditioned):
    unconditional = image_conditioned.sample(2, condition_image=None, label=None)
    assert torch.equal(
        unconditional,
        image_conditioned.model.draw([0, 1], 0, image_conditioned.settings.__class__(sample_steps=4), None)["image"],
    )
    with pytest.raises(ValueError, match="condition_image=None beside other conditions: pass None for all"):
        image_conditioned.sample(2, condition_image=None, label=3)
    with pytest.raises(ValueError, match="condition_image=None beside other conditions"):
        image_conditioned.sample(2, condition_image=None)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (torch.zeros(2, 1, 8, 8), ValueError, "got 2 values of condition_image for 3 images"),
        (torch.zeros(8, 8), ValueError, r"got condition_image \(8, 8\), wanted a tensor \(C, h, w\)"),
        (torch.full((1, 8, 8), 7.0), ValueError, r"from 7 to 7, wanted floats in \[-1, 1\]"),
        (torch.zeros(1, 8, 8, dtype=torch.int64), TypeError, "condition_image of torch.int64"),
        ("cat.png", TypeError, "condition_image of type str"),
    ],
)
def test_bad_images_as_conditions_are_refused(image_conditioned, image, error, message):
    with pytest.raises(error, match=message):
        image_conditioned.sample(3, condition_image=image, label=1)


def test_likelihood_needs_its_conditions(image_conditioned):
    pictures = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    with pytest.raises(ValueError, match="got no condition_image, which python_image is conditioned on"):
        image_conditioned.log_likelihood(pictures, label=1)
    bound = image_conditioned.log_likelihood(pictures, label=1, condition_image=pictures, nfe=2)
    other_bound = image_conditioned.log_likelihood(pictures, label=1, condition_image=255 - pictures, nfe=2)
    assert not torch.equal(bound.total, other_bound.total)


# Likelihoods


def test_likelihood_of_pixels_is_the_experiments(pixels):
    batch = pixels.model.batches("val")[list(range(5))]
    bound = pixels.log_likelihood(to_uint8(batch["image"]), label=batch["label"], nfe=6, batch_size=5)
    expected = pixels.model.log_likelihood(batch, 0, 6)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(bound, expected, strict=True))
    assert pixels.unit == "bits per dimension" and bound.terms.shape == (5, 20)


def test_likelihood_of_codes_is_the_experiments(codes, images):
    labels = torch.tensor([3, 1, 4, 1, 5])
    batch = {"codes": codes.model.space.first_stage.encode(images), "label": labels, "position": torch.arange(5)}
    bound, expected = codes.log_likelihood(images, label=labels, nfe=9), codes.model.log_likelihood(batch, 0, 9)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(bound, expected, strict=True))
    assert codes.unit == "bits per code"


def test_likelihood_by_seed_and_batch(codes, images):
    expected = codes.log_likelihood(images, nfe=4, seed=1).total
    torch.testing.assert_close(codes.log_likelihood(images, nfe=4, seed=1, batch_size=2).total, expected)
    assert not torch.equal(codes.log_likelihood(images, nfe=4, seed=2).total, expected)


def test_likelihood_without_a_label_is_of_the_null(trained_ddpm):
    images, run = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8), load(trained_ddpm / "ddpm_digits", device="cpu")
    for module in (run.model.sampler.network.encoders.label.embedding, run.model.sampler.network.conv_out):
        torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    totals = [run.log_likelihood(images, nfe=4, **label).total for label in ({}, {"label": None}, {"label": 3})]
    assert torch.equal(totals[0], totals[1]) and not torch.equal(totals[0], totals[2])


def test_a_null_class_that_was_never_trained_is_refused(pixels, monkeypatch):
    config = dataclasses.replace(pixels.model.sampler.config, label_drop=0.0)
    monkeypatch.setattr(pixels.model.sampler, "config", config)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    for label in ({}, {"label": None}):
        with pytest.raises(ValueError, match="got no label, .* label_drop 0, .*: pass a label"):
            pixels.log_likelihood(images, nfe=2, **label)
    assert pixels.log_likelihood(images, nfe=2, label=3).total.shape == (2,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda images: images.float() / 127.5 - 1, TypeError, "8-bit images, pass uint8"),
        (lambda images: images[..., :4], ValueError, r"wanted \(B, 1, 8, 8\)"),
        (lambda images: images.expand(-1, 3, -1, -1), ValueError, "got colour images"),
        (lambda images: images.numpy(), TypeError, "images of type ndarray"),
    ],
)
def test_images_without_a_likelihood_are_refused(pixels, change, error, message):
    with pytest.raises(error, match=message):
        pixels.log_likelihood(change(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)))


def test_bad_arguments_of_a_likelihood_are_refused(pixels):
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="got nfe 0, wanted at least 1"):
        pixels.log_likelihood(images, nfe=0)
    with pytest.raises(TypeError, match="unexpected keyword 'labels', did you mean 'label'"):
        pixels.log_likelihood(images, labels=3)
    with pytest.raises(ValueError, match="got 3 values of label for 2 images"):
        pixels.log_likelihood(images, label=[1, 2, 3])


# Loading


@pytest.mark.parametrize("name", ["absorbing", "autoregressive", "ddpm", "latents"])
def test_every_kind_of_run(name):
    run = load(ROOT / "tests/fixtures/old_runs/runs" / f"{name}_digits", device="cpu", amp=False)
    images = run.sample(2, label=1)
    assert images.shape == (2, *run.image_shape) and images.dtype == torch.uint8
    assert (run.vqgan is None) == (name == "ddpm")
    if name == "latents":
        with pytest.raises(ValueError, match="latents are continuous and have no likelihood in bits"):
            run.log_likelihood(images)
    else:
        bound = run.log_likelihood(images, label=1, nfe=3)
        assert bound.total.shape == (2,) and (bound.terms.shape[1] == 0) == (name == "autoregressive")


def test_runs_by_name_and_by_path(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained.parent)
    relative = Path(trained.name) / "vqgan_digits"
    for run in (str(trained / "vqgan_digits"), relative, str(relative)):
        assert load_vqgan(run, device="cpu").first_stage.run == trained / "vqgan_digits"
    assert load_vqgan("vqgan_digits", logs_root=trained, device="cpu").first_stage.run == trained / "vqgan_digits"
    monkeypatch.setenv("HOME", str(trained))
    assert load_vqgan("~/vqgan_digits", device=torch.device("cpu")).first_stage.run == trained / "vqgan_digits"


def test_runs_that_were_moved_keep_their_vqgan(trained, tmp_path, codes):
    for name in ("vqgan_digits", "absorbing_digits"):
        shutil.copytree(trained / name, tmp_path / name)
    moved = load(tmp_path / "absorbing_digits", device="cpu", amp=False)
    assert moved.vqgan.first_stage.run == tmp_path / "vqgan_digits"
    assert torch.equal(moved.sample(2), codes.sample(2))
    (tmp_path / "vqgan_digits").rename(tmp_path / "tokenizer")
    renamed = load(tmp_path / "absorbing_digits", device="cpu", amp=False, ae_load_dir="tokenizer")
    assert torch.equal(renamed.sample(2), moved.sample(2))


def test_a_vqgan_elsewhere_is_found_again(trained, tmp_path):
    """At the path that --ae_load_dir had in training; or beside a run that is named by its path."""
    shutil.copytree(trained / "vqgan_digits", tmp_path / "disk" / "tokenizer")
    flags = f"--logs_root {tmp_path / 'mine'} --ae_load_dir {tmp_path / 'disk' / 'tokenizer'} --train_steps 1 --no_amp"
    call("train_sampler.py", f"{flags} {SAMPLER}")
    run = load(tmp_path / "mine" / "absorbing_digits", device="cpu")
    assert run.vqgan.first_stage.run == tmp_path / "disk" / "tokenizer"
    model, output = ModelConfig(load_dir=str(trained / "absorbing_digits")), OutputConfig(logs_root=str(tmp_path))
    assert load_model(model, output).space.first_stage.run == trained / "vqgan_digits"


def test_averaged_or_plain_weights(trained_ddpm, trained):
    path = trained_ddpm / "ddpm_digits"
    weights = {ema: load(path, ema=ema, device="cpu").model.weights for ema in (None, True, False)}
    assert weights[None] == weights[True] != weights[False]
    path = trained / "vqgan_digits"
    weights = {ema: load_vqgan(path, ema=ema, device="cpu").first_stage.weights for ema in (None, True, False)}
    assert weights[None] == weights[True] != weights[False]


def test_runs_without_an_average_give_plain_weights(trained_ddpm):
    flags = f"--train_steps 1 --no_amp --no_ema --steps_per_eval 0 {DDPM} --log_dir python_no_ema"
    call("train_sampler.py", f"--logs_root {trained_ddpm} {flags}")
    assert load("python_no_ema", logs_root=trained_ddpm, device="cpu").sample(1).shape == (1, 1, 8, 8)
    with pytest.raises(FileNotFoundError, match="has no averaged weights: pass ema=False"):
        load("python_no_ema", logs_root=trained_ddpm, device="cpu", ema=True)


def test_a_step_by_its_number(trained_ddpm, trained):
    assert load(trained_ddpm / "ddpm_digits", step=3, device="cpu").step == 3
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7 in .*: there are 3"):
        load(trained_ddpm / "ddpm_digits", step=7)
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
        load_vqgan(trained / "vqgan_digits", step=7)
    with pytest.raises(TypeError, match="got step '3', wanted a whole number"):
        load(trained_ddpm / "ddpm_digits", step="3")


@pytest.mark.parametrize("name", ["vqgan_digit", "VQGAN_digits"])
def test_the_nearest_run_is_named(trained, name):
    with pytest.raises(FileNotFoundError, match=r"did you mean 'vqgan_digits'\?; runs beside it: .*absorbing_digits"):
        load_vqgan(trained / name)
    with pytest.raises(FileNotFoundError, match="did you mean 'vqgan_digits'"):
        load(name, logs_root=trained)


def test_runs_of_another_kind_are_refused(trained):
    with pytest.raises(ValueError, match="vqgan_digits is no run of a sampler: load_vqgan loads it"):
        load(trained / "vqgan_digits")
    with pytest.raises(ValueError, match="absorbing_digits is no run of a VQGAN: load loads it"):
        load_vqgan(trained / "absorbing_digits")
    with pytest.raises(TypeError, match="got run 3, wanted the path or the name"):
        load(3)


@pytest.mark.parametrize("keywords", [{"device": "gpu"}, {"device": 0}, {"ema": False, "ema_length": 0.1}])
def test_bad_arguments_of_load_are_refused(trained, keywords):
    with pytest.raises(ValueError, match="got device|got ema=False and ema_length"):
        load(trained / "absorbing_digits", **keywords)
