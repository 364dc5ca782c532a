"""Hints of control branches on the demo page: their fields, and an upload in a real browser."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.edit_descriptions import Description, describe_side
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.page_components import Settings, all_controls, hint_inputs, text_inputs
from experiments.playground import AS_IN_DATA, Playground, Request, Runs
from helpers.browser import content, enter, needs_browser, needs_gradio, new_images, press, served, tab_at
from helpers.tiny_runs import DDPM, call
from train.data.transforms import as_uint8
from train.samplers.ddpm import Sampling


@pytest.fixture(scope="module")
def controlled(tmp_path_factory):
    """A logs folder with a run of digits, `plain`, and a control branch beside it, `grey`."""
    logs = tmp_path_factory.mktemp("controlled")
    flags = f"--logs_root {logs} {DDPM} --dataset digits --train_steps 1 --no_amp --steps_per_eval 0"
    call("train_sampler.py", f"{flags} --log_dir plain")
    call("train_sampler.py", f"{flags} --log_dir grey --load_dir plain --control grey --hint_widths 4 6")
    return logs


def page_of(logs, run):
    """The sampler of a run as the page has it, and the settings of its page."""
    output = OutputConfig(logs_root=str(logs), device="cpu", amp=False)
    model, options = load_model(ModelConfig(sampler="ddpm", load_dir=run), output), Sampling(sample_steps=2)
    play = Playground(model, options, model.condition_source(options))
    controls = {key: each.value for key, each in all_controls(play).items()}
    return play, Settings(Runs(logs, None, play), 2, *[None] * 8, text_inputs(play), hint_inputs(play), controls)


@needs_gradio
def test_hints_of_uploads_reach_every_image(controlled, conditions, tmp_path):
    play, settings = page_of(controlled, "grey")
    *files, ready = settings.hints
    assert [box.label for box in files if box.visible] == ["hint"] and not ready.value
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "hint.png")
    values = [box.value for box in settings.texts]

    def drawn(*uploads, **changes):
        own = [changes.get(key.name, value) for key, value in settings.controls.items()]
        asked = settings.read("grey", play.trained.step, AS_IN_DATA, 2, 0, True, "grey", *values, *uploads, False, *own)
        play.sample(asked[1])
        return conditions.pop()["hint_image"], asked[1].options.control_strength

    hints, strength = drawn(str(tmp_path / "hint.png"), None, None, control_strength="0.5")
    assert torch.equal(as_uint8(hints), torch.from_numpy(pixels).expand(2, 1, 8, 8)) and strength == (0.5,)
    held_out, strength = drawn(None, None, None)
    assert len(held_out.unique(dim=0)) == 2 and strength == (1.0,)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.png: its content is none of"):
        drawn(str(tmp_path / "broken.png"), None, None)


@needs_gradio
def test_an_empty_description_keeps_the_hint(controlled):
    """As the other side of an edit has it: both differ in the class alone."""
    play, _ = page_of(controlled, "grey")
    hint = torch.full((1, 8, 8), 77, dtype=torch.uint8)
    request = Request(options=play.options, count=2, hints={"hint_image": hint})
    null, target = (describe_side(play, request, shows, play.options) for shows in (Description(), Description(3)))
    assert torch.equal(null.conditions["hint_image"], target.conditions["hint_image"])
    assert null.conditions["label"].tolist() == [10, 10] and target.conditions["label"].tolist() == [3, 3]
    x = torch.zeros(2, 1, 8, 8)
    with play.trained.inference():
        denoise = play.trained.make_denoiser(x, null.options, null.conditions)
        assert denoise(x, torch.full((2,), 0.5)).x0.isfinite().all()


@needs_gradio
def test_runs_without_a_branch_have_no_fields_of_hints(controlled):
    play, settings = page_of(controlled, "plain")
    assert not any(box.visible for box in settings.hints) and play.hint_fields == []
    shown = [each.name for each in all_controls(play).values() if each.visible]
    assert not any(name.startswith("control_") for name in shown)
    shown = [each.name for each in all_controls(page_of(controlled, "grey")[0]).values() if each.visible]
    assert {"control_strength", "control_guess", "control_middle_only"} <= {*shown}


@needs_gradio
def test_hints_of_unknown_kinds_are_ready(controlled):
    play, _ = page_of(controlled, "grey")
    unknown = replace(play, trained=replace(play.trained, hint_makers={"hint_image": None}))
    assert unknown.takes_ready_hints and hint_inputs(unknown)[-1].value
    with pytest.raises(ValueError, match="whose kind is not known: pass pictures of hints"):
        unknown.make_hint("hint_image", Image.new("L", (8, 8)), ready=False)


@pytest.mark.slow
@needs_gradio
@needs_browser
def test_a_picture_is_uploaded_as_a_hint(controlled, tmp_path):
    Image.new("L", (24, 16), 200).save(tmp_path / "grey.png")
    files = f"--control_files {controlled}/grey/control.safetensors"
    flags = f"--sampler ddpm --load_dir plain --no_amp --device cpu --sample_steps 2 {files}"
    with served(controlled, flags) as url, tab_at(url) as tab:
        enter(tab, "images", 2)
        tab.locator("input[type=file]").first.set_input_files(tmp_path / "grey.png")
        tab.get_by_text("grey.png").first.wait_for()
        enter(tab, "hint strength", "0.5")
        press(tab, "Sample")
        images, _ = new_images(tab, 3)  # the hint is the first
        assert (content(images[0]) == 200).all()
