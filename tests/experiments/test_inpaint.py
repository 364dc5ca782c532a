"""Inpainting end to end on tiny models: visible pixels stay, masked ones have no effect, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness.editing import add_margins, centring_margins, load_input_images, mask_part
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.metrics.classifier import class_agreement
from helpers.parametrize import slow_after
from helpers.tiny_runs import call
from train.trained_sampler import TrainedSampler


def inpaint(logs, flags):
    call("experiments/inpaint.py", f"--logs_root {logs} --no_amp --device cpu {flags}")


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


def pixels(path):
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image))[..., 0]


@pytest.fixture
def starts(monkeypatch):
    """The edit input and the result of every sampled batch."""
    batches, draw = [], TrainedSampler.draw

    def record(self, *args, edit, **kwargs):
        result = draw(self, *args, edit=edit, **kwargs)
        batches.append((edit, result))
        return result

    monkeypatch.setattr(TrainedSampler, "draw", record)
    return batches


@pytest.fixture
def picture(tmp_path):
    """A grey picture, 16x16, and a mask of another size that hides its lower half."""
    image = (torch.arange(256).view(16, 16)).to(torch.uint8).numpy()
    Image.fromarray(image).save(tmp_path / "one.png")
    mask = np.zeros((8, 32), np.uint8)
    mask[4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


@pytest.mark.parametrize("solver", slow_after(1, ["remask", "ancestral", "halton", "confidence"]))
def test_kept_codes_never_change(trained, starts, solver):
    flags = f"--n_images 2 --results 2 --hide left --solver {solver} --sample_steps 3"
    inpaint(trained, f"{flags} --log_dir kept_{solver}")
    start, result = starts[0]
    assert start.keep.sum() == 4 * 8 and len(starts) == 2  # the second call masks everything, for the chance level
    assert torch.equal(result["codes"][start.keep], start.x0[start.keep])
    assert result["codes"].max() < 16 and not starts[1][0].keep.any()


@pytest.mark.parametrize("logs", ["trained", "trained_ddpm"])
def test_by_default_the_lower_half_of_held_out_images_is_masked(logs, request, starts, capsys):
    logs = request.getfixturevalue(logs)
    model = "--sampler ddpm" if logs.name.startswith("ddpm") else ""
    flags = f"{model} --n_images 3 --results 2 --sample_steps 2 --batch_size 4 --log_dir lower"
    inpaint(logs, flags)
    results = read_results(logs / "lower")
    assert results["hidden_share"] == 0.5 and results["n_images"] == 3 and results["results_per_image"] == 2
    assert 0 <= results["survival"]["value"] <= 1 and 0 <= results["chance"]["value"] <= 1
    assert "chance level (everything masked)" in capsys.readouterr().out
    trained = load_model(ModelConfig(sampler="ddpm" if model else "absorbing"), OutputConfig(logs_root=str(logs)))
    inputs = load_input_images((), 3, trained)
    pictures = sorted((logs / "lower" / "images").glob("*.png"))
    assert len(pictures) == 6
    half = trained.data.size[0] // 2
    first = pixels(pictures[0])
    assert torch.equal(first[:half], inputs.image[0, 0, :half]) and not torch.equal(first, pixels(pictures[1]))
    assert not (logs / "lower" / ".kept").exists() and (logs / "lower" / "inpainted.png").is_file()
    starts.clear()
    inpaint(logs, flags)
    assert not starts  # a repeated run prints the saved report


def test_masked_pixels_do_not_affect_the_results(trained, picture):
    """A mask of any size is resized; the masked pixels do not change the results."""
    image = np.array(Image.open(picture / "one.png"))
    other = image.copy()
    other[8:] = 255 - image[8:]
    Image.fromarray(other).save(picture / "two.png")
    for name in ("one", "two"):
        flags = f"--image {picture / name}.png --mask {picture / 'mask.png'} --results 2 --log_dir of_{name}"
        inpaint(trained, f"{flags} --sample_steps 2")
    one, two = (trained / f"of_{name}" / "images" / f"000_{name}_1.png" for name in ("one", "two"))
    assert torch.equal(pixels(one), pixels(two))
    assert torch.equal(pixels(one)[:8], torch.from_numpy(image)[:8])


def test_transparent_pixels_are_inpainted(trained, picture):
    image = Image.open(picture / "one.png").convert("RGBA")
    alpha = np.full((16, 16), 255, np.uint8)
    alpha[:, 12:] = 200  # partly transparent pixels count as masked
    image.putalpha(Image.fromarray(alpha))
    image.save(picture / "clear.png")
    inpaint(trained, f"--image {picture / 'clear.png'} --results 1 --sample_steps 2 --log_dir clear")
    assert read_results(trained / "clear")["hidden_share"] == 0.25


def test_no_paste_keeps_the_models_rendering(trained):
    flags = "--n_images 1 --results 1 --sample_steps 2"
    inpaint(trained, f"{flags} --log_dir pasted")
    inpaint(trained, f"{flags} --no_paste --log_dir rendered")
    one, two = (next((trained / name / "images").glob("*.png")) for name in ("pasted", "rendered"))
    assert torch.equal(pixels(one)[8:], pixels(two)[8:]) and not torch.equal(pixels(one)[:8], pixels(two)[:8])
    assert "rendered by the model" in read_results(trained / "rendered")["visible_pixels"]


def test_repaint_is_counted_and_keeps_what_is_visible(trained_ddpm, starts, capsys):
    flags = "--sampler ddpm --n_images 2 --results 1 --sample_steps 4 --solver ddim"
    inpaint(trained_ddpm, f"{flags} --repaint_resamplings 3 --repaint_jump 1 --log_dir repainted")
    start, result = starts[0]
    assert start.keep.any() and "network calls per image" in capsys.readouterr().out
    results = read_results(trained_ddpm / "repainted")
    assert results["network_calls_per_image"] == 4 + 3 * 2
    assert results["run"]["sampling"]["repaint_resamplings"] == 3
    with pytest.raises(SystemExit):  # the calls belong to a batch size
        inpaint(trained_ddpm, f"{flags} --repaint_resamplings 3 --repaint_jump 1 --batch_size 1 --log_dir repainted")
    assert "batch_size" in capsys.readouterr().err


def test_other_strength_maps_are_another_experiment(trained_ddpm, picture, capsys):
    flags = f"--sampler ddpm --image {picture / 'one.png'} --results 1 --sample_steps 2 --log_dir same_maps"
    for grey in (255, 128):
        Image.new("L", (16, 16), grey).save(picture / "levels.png")
        if grey == 255:
            inpaint(trained_ddpm, f"{flags} --strength_map {picture / 'levels.png'}")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        inpaint(trained_ddpm, f"{flags} --strength_map {picture / 'levels.png'}")
    error = capsys.readouterr().err
    assert "--strength_map: other maps" in error and "--image" not in error


@pytest.mark.parametrize(("logs", "sampler"), [("trained", "absorbing"), ("trained_ddpm", "ddpm")])
def test_a_strength_map_softens_the_mask(logs, sampler, request, picture, starts):
    logs, levels = request.getfixturevalue(logs), np.zeros((16, 16), np.uint8)
    levels[:, 4:8], levels[:, 8:] = 51, 255
    Image.fromarray(levels).save(picture / "levels.png")
    flags = f"--sampler {sampler} --image {picture / 'one.png'} --results 1 --sample_steps 8"
    inpaint(logs, f"{flags} --strength_map {picture / 'levels.png'} --log_dir softened")
    start, _ = starts[0]
    quarter = start.keep.shape[-1] // 4
    assert start.keep[..., :quarter].all() and not start.keep[..., quarter:].any() and start.strength == 1
    assert torch.allclose(start.strength_map[..., quarter : 2 * quarter], torch.tensor(0.2))
    assert (start.strength_map[..., 2 * quarter :] == 1).all()
    model = load_model(ModelConfig(sampler=sampler), OutputConfig(logs_root=str(logs)))
    image = load_input_images((str(picture / "one.png"),), 1, model).image[0, 0]
    (path,) = (logs / "softened" / "images").glob("*.png")
    kept = image.shape[1] // 4
    assert torch.equal(pixels(path)[:, :kept], image[:, :kept])
    assert not torch.equal(pixels(path)[:, kept:], image[:, kept:])


def test_outpainting_extends_the_canvas_around_the_image(trained, trained_ddpm, starts):
    flags = "--n_images 1 --results 1 --sample_steps 2"
    inpaint(trained, f"{flags} --outpaint 1 0 0 2 --log_dir around")
    start, result = starts.pop()
    assert result["image"].shape[2:] == (20, 24) and start.keep[0, 1:, 2:].all() and start.keep.sum() == 16
    assert torch.equal(result["codes"][start.keep], start.x0[start.keep])
    assert not starts and "survival" not in read_results(trained / "around")
    inpaint(trained_ddpm, f"{flags} --sampler ddpm --shape 12 8 --hide top --log_dir taller")
    start, result = starts.pop()
    assert result["image"].shape[2:] == (12, 8) and start.keep[0, 6:10].all() and start.keep.sum() == 4 * 8


def test_margins_centre_the_grid():
    assert centring_margins((4, 4), (7, 4)) == (1, 0, 2, 0) and centring_margins((4, 4), (4, 5)) == (0, 1, 0, 0)
    with pytest.raises(ValueError, match="--shape"):
        centring_margins((4, 4), (3, 8))


def test_hide_part_and_add_margins_mask_the_right_pixels(trained):
    model = load_model(ModelConfig(), OutputConfig(logs_root=str(trained)))
    inputs = load_input_images((), 2, model)
    assert mask_part(inputs, "centre").mask[0, 4:12, 4:12].all() and mask_part(inputs, "centre").mask[0].sum() == 64
    assert mask_part(inputs, "right").mask[:, :, 8:].all() and not mask_part(inputs, "right").mask[:, :, :8].any()
    larger = add_margins(inputs, (1, 2, 3, 4))
    assert larger.mask.shape == (2, 20, 22) and torch.equal(larger.image[:, :, 1:17, 4:20], inputs.image)
    assert larger.mask[0].sum() == 20 * 22 - 16 * 16 and not larger.mask[:, 1:17, 4:20].any()


def test_class_agreement_has_the_error_of_independent_images():
    agreement = class_agreement(torch.tensor([1, 2]), torch.tensor([[1, 1, 1, 0], [2, 0, 0, 0]]))
    assert agreement.value == 0.5 and agreement.error == pytest.approx(0.25)
    assert class_agreement(torch.tensor([1]), torch.tensor([[1]])) == (1.0, None)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--image {one}", ["one.png is fully opaque", "--mask"]),
        ("--image nowhere.png --hide top", ["nowhere.png not found"]),
        ("--mask {mask}", ["--mask without --image"]),
        ("--image {one} --mask {mask} {mask}", ["got 2 masks for 1 images"]),
        ("--image {one} --mask {one} --hide top --label 10", ["label 10", "0 to 9"]),
        ("--results 0", ["results 0", "--results"]),
        ("--outpaint 1 1 1 1 --shape 8 8", ["pass one of them"]),
        ("--shape 3 8", ["shape (3, 8)", "--shape"]),
        ("--image {black} --mask {black}", ["nothing of black.png is masked"]),
    ],
)
def test_invalid_settings_are_refused_in_one_line(trained, picture, capsys, flags, expected):
    Image.new("L", (16, 16)).save(picture / "black.png")
    files = {name: picture / f"{name}.png" for name in ("one", "mask", "black")}
    with pytest.raises(SystemExit) as stop:
        inpaint(trained, f"{flags.format(**files)} --log_dir inpaint_refused")
    assert stop.value.code == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert all(word in message for word in expected), message
    assert not (trained / "inpaint_refused").exists()
