"""The tab Edit of the demo page: what it edits and refuses, and its parts in a real browser."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.edit_descriptions import (
    PER_SIDE,
    Description,
    describe_side,
    description_boxes,
    description_values,
    first_description,
    held_out_image,
    read_description,
    sample_image,
)
from experiments.edit_page import (
    OPTIONS,
    Edit,
    Handlers,
    edit_image,
    find_difference,
    has_effect,
    method_boxes,
    read_settings,
    reason_against,
    with_mask,
)
from experiments.harness.edit_methods import EditingConfig
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.harness.layout_edits import LayoutNames, Region
from experiments.page_components import MOST_FIELDS, SIDE, brushed_mask
from experiments.playground import AS_IN_DATA, NO_CLASS, Playground, Request, enlarge_to_picture, preprocess
from helpers.browser import (
    choose,
    content,
    enter,
    field,
    needs_browser,
    needs_gradio,
    new_images,
    press,
    served,
    tab_at,
    turn_to,
)
from helpers.prompted import MODELS, TEXT, make_model, options_of
from models.conditioning import ConditionConfig
from models.conditions import boxes, metadata, numbers, text
from models.conditions.metadata import UNKNOWN
from train.cli.plugins import merge_configs

DOG, CAT = Description(prompt="a dog"), Description(prompt="a cat")
IMAGE = torch.randint(256, (1, 4, 4), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def page_of(model, **settings):
    """A model as the page has it, and a request for three images."""
    options = options_of(model, **{"sample_steps": 4, "guidance": 3.0} | settings)
    play = Playground(model, options, model.condition_source(options, skip=model.sampler.conditions))
    return play, Request(options=options, count=3, seed=5)


def loaded(logs, name, **settings):
    """A run of a few steps as the page has it, and a request for two images."""
    model = load_model(ModelConfig(sampler=name), OutputConfig(logs_root=str(logs), device="cpu", amp=False))
    options = options_of(model, **{"sample_steps": 3, "guidance": 2.0} | settings)
    return Playground(model, options, model.condition_source(options)), Request(options=options, count=2, seed=1)


def edit_of(method, source=DOG, target=CAT, **settings):
    return Edit(source, target, EditingConfig(method=method, **settings))


def test_equal_sides_give_the_image_and_others_do_not():
    play, request = page_of(MODELS["ddpm"])
    for method in ("diffedit", "flowedit"):
        same = edit_of(method, CAT, CAT, source_guidance=3.0)
        result = edit_image(play, request, same, IMAGE, None)
        assert torch.equal(result.batch["image"], IMAGE.expand(3, 1, 4, 4)), method
        assert not torch.equal(edit_image(play, request, edit_of(method), IMAGE, None).batch["image"][0], IMAGE)
    with pytest.raises(ValueError, match="from and to do not differ"):
        find_difference(play, request, edit_of("diffedit", CAT, CAT), IMAGE)


def test_the_mask_on_the_page_is_that_of_the_first_edit():
    play, request = page_of(MODELS["ddpm"])
    edit = edit_of("diffedit", strength=1)
    free = edit_image(play, request, edit, IMAGE, None)
    mask = find_difference(play, request, edit, IMAGE)
    assert torch.equal(mask, free.mask) and 0 < mask.sum() < 16
    within = edit_image(play, request, edit_of("diffedit", strength=1, mask=("a",)), IMAGE, mask)
    assert torch.equal(within.batch["image"], free.batch["image"][:1])  # one result, for it depends on no noise
    assert within.calls == 4 + 4 * 2 and free.calls == 10 * (2 + 2) + within.calls
    assert "**12** network calls" in within.summary and f"mask: {mask.float().mean():.0%}" in within.summary


@pytest.mark.parametrize("method", ["sdedit", "diffedit"])
def test_nothing_changes_where_the_brush_was_not(method):
    play, request = page_of(MODELS["ddpm"])
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:2, 1:] = True
    images = edit_image(play, request, edit_of(method, mask=("a",)), IMAGE, mask).batch["image"]
    assert (images[..., ~mask] == IMAGE[..., ~mask]).all() and not (images[..., mask] == IMAGE[..., mask]).all()
    assert len(images) == (3 if method == "sdedit" else 1)


def test_a_mask_survives_the_editor():
    mask = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    canvas = with_mask(enlarge_to_picture(IMAGE, SIDE), mask)
    image, read = preprocess(canvas["background"].convert("L"), brushed_mask(canvas), (4, 4), 1)
    assert torch.equal(image, IMAGE) and torch.equal(read, mask)
    assert canvas["composite"].size == canvas["layers"][0].size == (SIDE, SIDE)


def test_empty_descriptions_are_null_or_refused():
    play, request = page_of(make_model("ddpm", n_classes=3))
    empty, label, both = Description(), Description(1), Description(1, "a cat")
    first, second = (
        edit_image(play, request, edit_of("flowedit", source, both), IMAGE, None) for source in (empty, both)
    )
    assert not torch.equal(first.batch["image"], second.batch["image"])
    assert first.batch["label"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="there is nothing to edit the image to"):
        edit_image(play, request, edit_of("flowedit", both, empty), IMAGE, None)
    with pytest.raises(ValueError, match="got a description without a text, which this run reads too"):
        edit_image(play, request, edit_of("flowedit", both, label), IMAGE, None)


def test_options_without_effect_are_left_out():
    values = {"mask_rule": "paper", "noisings": "7", "plain_steps": "2", "source_guidance": "1.5", "paste": True}
    values = [values[name] for name in OPTIONS]
    found = {
        (method, masked): {name for name in OPTIONS if has_effect(name, method, masked)}
        for method in ("sdedit", "diffedit", "flowedit")
        for masked in (False, True)
    }
    assert found[("diffedit", False)] == {"mask_rule", "noisings", "source_guidance", "paste"}
    assert found[("diffedit", True)] == {"source_guidance", "paste"}
    assert (found[("sdedit", False)], found[("sdedit", True)]) == (set(), {"paste"})
    settings = read_settings("diffedit", 0.5, values, False)
    assert (settings.mask_rule, settings.noisings, settings.plain_steps, settings.strength) == ("paper", 7, None, 0.5)
    assert read_settings("diffedit", 0.5, values, True).noisings is None
    with pytest.raises(ValueError, match="got a mask for flowedit, which takes none: press Clear the mask"):
        read_settings("flowedit", 0.5, values, True)
    with pytest.raises(ValueError, match="got 0 for noisings, wanted at least 1"):
        read_settings("diffedit", 0.5, ["", "0", "", "", False], False)


@needs_gradio
def test_boxes_are_those_that_the_model_reads():
    with_classes = make_model("ddpm", n_classes=3)
    found = {}
    for name, model in (("texts", MODELS["ddpm"]), ("both", with_classes), ("codes", MODELS["absorbing"])):
        boxes = description_boxes(page_of(model)[0])
        found[name] = {box.label for box in boxes if box.visible}
    assert found["texts"] == found["codes"] == {"from text", "to text"}
    assert found["both"] == {"from class", "from text", "to class", "to text"}
    choices = [[text for text, _ in box.choices] for box in description_boxes(page_of(with_classes)[0])[::PER_SIDE]]
    assert choices == [[NO_CLASS, "0", "1", "2"], ["0", "1", "2"]]
    shown = [box.label for box in method_boxes(page_of(MODELS["ddpm"])[0]) if box.visible]
    assert shown == ["method", "strength", "mask rule", "noisings", "source guidance", "paste"]
    assert [text for text, _ in method_boxes(page_of(MODELS["absorbing"])[0])[0].choices] == ["sdedit", "diffedit"]


def page_of_fields(*names, **fields):
    """A model of captions and other conditions, as the page has it, with names of boxes."""
    kinds = {"numbers": numbers.Config, "boxes": boxes.Config, "metadata": metadata.Config}
    options = merge_configs([text.Config, *(kinds[name] for name in names)], ConditionConfig)
    play, request = page_of(make_model(conditions=("text", *names), condition_options=options(**TEXT, **fields)))
    play.__dict__["layout_names"] = LayoutNames(("disc", "ring")) if "boxes" in names else None
    return play, request


def test_sides_differ_by_numbers_and_words():
    fields = {"numbers_fields": ("lon",), "numbers_ranges": ("lon=-180:180",), "metadata_values": ("light=day",)}
    play, request = page_of_fields("numbers", "metadata", **fields)
    shows = [Description(prompt="a dog", metadata=given) for given in ({"lon": 5.0}, {"lon": -7.0, "light": "day"})]
    batches = [describe_side(play, request, each, request.options).conditions for each in shows]
    assert [batch["lon"].tolist() for batch in batches] == [[5.0] * 3, [-7.0] * 3]
    assert [batch["light"][0] for batch in batches] == [UNKNOWN, "day"]
    assert Description(metadata={"lon": torch.nan, "light": UNKNOWN}).is_empty and not shows[0].is_empty
    assert first_description(play, batches[1], NO_CLASS) == shows[1]


def test_sides_differ_by_boxes():
    play, request = page_of_fields("boxes", boxes_width=16, boxes_classes=2)
    layouts = (Region((0.0, 0.0, 0.5, 0.5), 0),), (Region((0.25, 0.0, 0.75, 0.5), 1), Region((0.0, 0.5, 1.0, 1.0), 0))
    shows = [Description(prompt="a dog", layout=layout) for layout in layouts]
    batches = [describe_side(play, request, each, request.options).conditions for each in shows]
    assert [batch["box_class"][0].tolist() for batch in batches] == [[0], [1, 0]]
    assert [first_description(play, batch, NO_CLASS).layout for batch in batches] == [*layouts]
    assert not Description(layout=layouts[0]).is_empty


@needs_gradio
def test_boxes_of_a_side_hold_what_an_image_shows():
    fields = {
        "numbers_fields": ("lon", "lat"),
        "numbers_ranges": ("lon=-180:180", "lat=-90:90"),
        "boxes_width": 16,
        "boxes_classes": 2,
    }
    play, _ = page_of_fields("boxes", "numbers", **fields)
    labels = [box.label for box in description_boxes(play) if box.visible]
    one = ["text", "boxes", "lon", "lon unknown", "lat", "lat unknown"]
    assert labels == [f"{side} {name}" for side in ("from", "to") for name in one]
    shows = Description(
        prompt="a dog", layout=(Region((0.0, 0.25, 1.0, 0.5), 1),), metadata={"lon": 5.0, "lat": torch.nan}
    )
    values = description_values(play, shows)
    initial = [box.value for box in description_boxes(play)[:PER_SIDE]]
    values = [first if isinstance(new, dict) else new for first, new in zip(initial, values, strict=True)]
    read = read_description(play, *values)
    assert (read.prompt, read.layout) == (shows.prompt, shows.layout)
    assert read.metadata == {"lon": 5.0, "lat": UNKNOWN}


def test_models_without_classes_and_texts_have_a_reason():
    plain = make_model(conditions=(), condition_options=ConditionConfig())
    play = Playground(plain, options_of(plain), plain.condition_source(options_of(plain)))
    assert (
        "no classes and reads no texts, boxes or numbers" in reason_against(play)
        and reason_against(page_of(MODELS["ddpm"])[0]) == ""
    )


def test_images_of_the_data_and_samples_come_with_their_class(trained_ddpm):
    play, request = loaded(trained_ddpm, "ddpm")
    dataset = play.trained.dataset("val")
    image, shows = held_out_image(play, len(dataset) + 3)
    assert shows == Description(int(dataset.labels[3])) and image.shape == (1, 8, 8) and image.dtype == torch.uint8
    image, shows = sample_image(play, replace(request, label=7))
    assert shows == Description(7) and torch.equal(image, play.draw(replace(request, label=7))[0])
    assert sample_image(play, replace(request, label=NO_CLASS))[1] == Description()


def test_codes_are_edited_by_class(trained):
    play, request = loaded(trained, "absorbing")
    image, _ = held_out_image(play, 0)
    edit = edit_of("diffedit", Description(3), Description(8))
    result = edit_image(play, request, edit, image, None)
    assert torch.equal(result.mask, find_difference(play, request, edit, image))
    assert result.batch["label"].tolist() == [8, 8] and len(result.batch["image"]) == 2 and result.calls > 10


@needs_gradio
def test_the_tab_edits_what_its_boxes_hold(trained_ddpm):
    """Every value goes through the editor and the boxes, as in the browser."""
    import gradio as gr

    play, _ = loaded(trained_ddpm, "ddpm")
    settings = FixedSettings(play, count=2, seed=4)
    handlers = Handlers(settings, None)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    picture = Image.fromarray(pixels).resize((384, 384), Image.Resampling.NEAREST)
    canvas = {"background": picture, "layers": [], "composite": picture}
    sides = [[label, "", "", *[UNKNOWN] * MOST_FIELDS, *[0, True] * MOST_FIELDS] for label in (3, 8)]
    boxes = [*sides[0], *sides[1], "diffedit", 0.7, "", "5", "", "", False]
    found, seed = handlers.find_mask(canvas, *boxes)
    assert seed == 4 and found["background"].size == (384, 384)
    asked = handlers.read(found, *boxes)[2:]
    assert asked[0].source == Description(3) and asked[0].target == Description(8)
    assert torch.equal(asked[1], torch.from_numpy(pixels)[None]) and asked[2].any()
    assert handlers.read(canvas, *boxes)[4] is None and handlers.read(canvas, *boxes)[2].settings.noisings == 5
    again, _ = handlers.find_mask(found, *boxes)  # with the same options, whatever mask there was
    assert again["layers"][0].tobytes() == found["layers"][0].tobytes()
    with pytest.raises(gr.Error, match="there is no image"):
        handlers.find_mask(None, *boxes)


class FixedSettings:
    """Settings that are always the same: the initial ones of a page."""

    def __init__(self, play, **request):
        self.play, self.request = play, Request(options=play.options, label=AS_IN_DATA, **request)

    def read(self):
        return self.play, self.request


# In the browser


def press_and_wait(tab, button):
    """Presses a button that fills the editor, and waits until it has: another seed, and a picture on the canvas."""
    seed = field(tab, "seed")
    before = seed.input_value()
    press(tab, button)
    tab.wait_for_function("([box, before]) => box.value !== before", arg=[seed.element_handle(), before])
    tab.wait_for_timeout(2000)


@pytest.mark.slow
@needs_gradio
@needs_browser
def test_a_mask_is_found_brushed_and_edited_in(trained_ddpm):
    flags = "--sampler ddpm --no_amp --device cpu --sample_steps 3 --guidance 2"
    with served(trained_ddpm, flags) as address, tab_at(address) as tab:
        enter(tab, "images", 2)
        turn_to(tab, "Edit")
        press(tab, "Edit")
        tab.get_by_text("there is no image: press A new sample").wait_for()
        press_and_wait(tab, "An image of the data")
        assert field(tab, "from class").input_value() in map(str, range(10))
        choose(tab, "from class", NO_CLASS)
        tab.get_by_role("option").first.wait_for(state="hidden")
        choose(tab, "to class", "8")
        press_and_wait(tab, "Find the mask")
        press(tab, "Edit")
        images, sources = new_images(tab, 3)  # in a mask that is given, the result is a single one
        before, mask, result = map(content, images)
        assert 0 < (mask == 255).mean() < 1 and {*np.unique(mask)} == {0, 255}
        assert np.array_equal(result[mask == 0], before[mask == 0]) and not np.array_equal(result, before)
        tab.get_by_text("network calls and").wait_for()
        assert tab.locator(".slider-wrap:visible, [data-testid='imageslider']:visible").count() > 0

        press(tab, "Clear the mask")
        choose(tab, "method", "flowedit")
        field(tab, "mask rule").wait_for(state="hidden")
        enter(tab, "noisings", 2)
        press(tab, "Edit")
        images, _ = new_images(tab, 3, sources[1:])  # the image before, and two results
        assert np.array_equal(content(images[0]), before)
        tab.get_by_text("flowedit: 12 network calls").wait_for()  # 2 noisings, 2 steps, 1 call for null and 2 for 8
