"""The tab Look of the demo page: what it records and draws, and its parts in a real browser."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import look_page
from experiments.look_page import (
    CENTRE,
    CODES,
    MEAN,
    WORDS,
    draw_maps,
    kind_boxes,
    kinds_of,
    look,
    parse_words,
    reason_against,
)
from experiments.playground import Playground, Request
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
from helpers.captioned import write_captioned_images
from helpers.prompted import MODELS, make_model, options_of
from helpers.tiny_runs import DDPM, call
from models.attention_recorder import find_layers
from models.conditioning import ConditionConfig

PROMPT = "a red star, a redder ring"


def page_of(model, **settings):
    """A model as the page has it, and a request for two images."""
    options = options_of(model, **settings)
    play = Playground(model, options, model.condition_source(options, skip=("caption",)))
    return play, Request(options=options, count=2, seed=3, prompt=PROMPT)


@pytest.fixture(scope="module", params=["ddpm", "absorbing"])
def page(request):
    return page_of(MODELS[request.param], sample_steps=4, guidance=2.0)


def test_the_mean_is_that_of_the_steps_over_the_sample(page):
    play, request = page
    attention = look(play, request, WORDS)
    mean, *steps = attention.moments
    assert mean.step == 0 and [each.step for each in steps] == [1, 2, 3, 4]
    assert torch.equal(mean.image, play.draw(request)[0])
    torch.testing.assert_close(torch.stack([each.heats[MEAN] for each in steps]).mean(0), mean.heats[MEAN])
    assert not torch.allclose(steps[0].heats[MEAN], steps[-1].heats[MEAN], atol=1e-5)


def test_maps_are_of_whole_words_and_phrases(page):
    play, request = page
    attention = look(play, request, WORDS)
    moment = attention.moments[0]
    assert [name for name, _ in attention.maps(play, (), moment.heats[MEAN])] == ["a", "red", "star", "redder", "ring"]
    star, phrase = attention.maps(play, ["star", "a red star"], moment.heats[MEAN])
    assert (star[0], phrase[0]) == ("star", "a red star") and star[1].shape == (4, 4)
    assert not torch.equal(star[1], phrase[1])
    with pytest.raises(ValueError, match="got the word 'hat', wanted one of 'a red star"):
        attention.maps(play, ["hat"], moment.heats[MEAN])


def test_words_are_checked_before_sampling(page, conditions):
    play, request = page
    with pytest.raises(ValueError, match="'hat'"):
        look(play, request, WORDS, ["hat"])
    assert not conditions


def test_the_first_of_many_steps_are_kept_evenly(page, monkeypatch):
    play, request = page
    monkeypatch.setattr(look_page, "MOST_STEPS", 3)
    options = replace(request.options, sample_steps=8)
    attention = look(play, replace(request, options=options), WORDS)
    assert [each.step for each in attention.moments] == [0, 1, 5] and attention.nearest(4).step == 5


def test_each_code_spreads_its_attention_over_all_codes():
    play, request = page_of(MODELS["absorbing"], sample_steps=4)
    attention = look(play, request, CODES)
    for moment in attention.moments:
        assert moment.heats[MEAN].shape == (16, 4, 4)
        torch.testing.assert_close(moment.heats[MEAN].sum((1, 2)), torch.ones(16))


def test_a_clicked_code_is_framed_and_named():
    play, request = page_of(MODELS["absorbing"], sample_steps=2)
    attention = look(play, request, CODES)
    picture, ((first, name),) = draw_maps(play, attention, (), (0.99, 0.3), 0)
    assert name == "row 2, column 4" and picture.size == first.size == (384, 384)
    assert picture.getpixel((383, 100)) == look_page.FRAME != picture.getpixel((383, 300))
    _, ((second, _),) = draw_maps(play, attention, (), (0.0, 0.0), 0)
    assert first.tobytes() != second.tobytes()


def test_maps_of_words_lie_over_the_picture_of_the_step(page):
    play, request = page
    attention = look(play, request, WORDS)
    picture, maps = draw_maps(play, attention, ["star"], CENTRE, 2)
    assert [name for _, name in maps] == ["star"] and maps[0][0].size == picture.size
    small = picture.resize((4, 4), Image.Resampling.NEAREST).convert("L")
    assert list(small.tobytes()) == attention.nearest(2).image[0].flatten().tolist()


def test_a_layer_is_shown_alone(page):
    play, request = page
    attention = look(play, request, WORDS)
    layers = find_layers(play.trained.sampler.network)
    averaged = [name for name in layers if not name.startswith("middle")]  # as in DAAM
    for moment in attention.moments:
        assert list(moment.heats) == [MEAN, *layers]
        torch.testing.assert_close(torch.stack([moment.heats[name] for name in averaged]).mean(0), moment.heats[MEAN])
    (mean,), (last,) = (draw_maps(play, attention, ["star"], CENTRE, 0, name)[1] for name in (MEAN, layers[-1]))
    assert mean[1] == last[1] == "star" and (mean[0].tobytes() != last[0].tobytes()) == (len(layers) > 1)


def test_models_have_the_kinds_of_their_attention():
    found = {name: kinds_of(page_of(model)[0]) for name, model in MODELS.items()}
    assert found == {"ddpm": [WORDS], "absorbing": [WORDS, CODES]}
    plain = make_model(conditions=(), condition_options=ConditionConfig(), n_classes=3)
    play = Playground(plain, options_of(plain), plain.condition_source(options_of(plain)))
    assert kinds_of(play) == [] and "attends to none of its conditions (label)" in reason_against(play)
    with pytest.raises(ValueError, match="attends to none of its"):
        look(play, Request(options=play.options), WORDS)


@needs_gradio
def test_boxes_are_those_of_the_attention_of_the_model():
    for name, visible in (("ddpm", [False, True, False]), ("absorbing", [True, True, False])):
        boxes = kind_boxes(page_of(MODELS[name])[0])
        assert [box.visible for box in boxes] == visible and boxes[0].value == WORDS


def test_words_are_separated_by_commas():
    assert parse_words(" red star,ring ,, ") == ["red star", "ring"] and parse_words("") == []


# In the browser


def in_browser(test):
    return pytest.mark.slow(needs_gradio(needs_browser(test)))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A logs folder with a run of captions, `text`, and one of digits."""
    logs = tmp_path_factory.mktemp("look_page")
    data = write_captioned_images(tmp_path_factory.mktemp("captions"), ["a red star", "a blue ring"])
    text = "--conditions text --text_width 16 --text_layers 1 --text_heads 2 --attn_block_type transformer"
    flags = f"--logs_root {logs} {DDPM} --no_amp --train_steps 2 --steps_per_eval 0"
    call("train_sampler.py", f"{flags} {data} {text} --log_dir text")
    call("train_sampler.py", f"{flags} --dataset digits --log_dir classes")
    return logs


def names_of_maps(tab):
    return tab.locator(".thumbnail-item:visible .caption-label").all_inner_texts()


@in_browser
def test_words_are_looked_at_step_by_step(captioned):
    flags = "--sampler ddpm --load_dir text --no_amp --device cpu --sample_steps 3"
    with served(captioned, flags) as address, tab_at(address) as tab:
        enter(tab, "prompt", "a red star")
        turn_to(tab, "Look")
        press(tab, "Look")
        _, sources = new_images(tab, 3)
        assert names_of_maps(tab) == ["a", "red", "star"]
        step = tab.get_by_label("number input for step")
        step.fill("2")
        step.press("Enter")
        _, sources = new_images(tab, 3, sources)
        enter(tab, "words", "red star, hat")
        field(tab, "words").press("Enter")
        tab.get_by_text("got the word 'hat', wanted one of").wait_for()
        enter(tab, "words", "red star")
        field(tab, "words").press("Enter")
        _, sources = new_images(tab, 1, sources)
        choose(tab, "layer", "up_blocks.0.1.cross")
        new_images(tab, 1, sources)
        choose(tab, "run", "classes")
        tab.get_by_text("attends to none of its conditions (label)").wait_for()
        tab.get_by_role("button", name="Look", exact=True).wait_for(state="hidden")


@in_browser
def test_a_click_shows_what_a_code_looks_at(trained):
    with served(trained, "--no_amp --device cpu --sample_steps 3") as address, tab_at(address) as tab:
        turn_to(tab, "Look")
        press(tab, "Look")
        images, sources = new_images(tab, 1)
        before, (name,) = content(images[0]), names_of_maps(tab)
        box = tab.locator("button.selectable:visible, .image-frame.selectable:visible").first.bounding_box()
        tab.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + 0.1 * box["height"])
        images, _ = new_images(tab, 1, sources)
        assert names_of_maps(tab) != [name] and not np.array_equal(content(images[0]), before)
