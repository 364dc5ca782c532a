"""The tab Layout of the demo page: what the canvas sends, and boxes drawn, dragged and edited in a real browser."""

import json

import numpy as np
import pytest

from experiments.harness.layout_edits import LayoutNames, Region, changed_pixels
from experiments.layout_page import EDIT, SAMPLE, read_canvas
from helpers.browser import (
    choose,
    content,
    enter,
    needs_browser,
    needs_gradio,
    new_images,
    press,
    served,
    tab_at,
    turn_to,
)
from helpers.tiny_runs import UNET, call

NAMES = LayoutNames(("disc", "ring"), ("red", "blue"))
BEFORE = (Region((0.0, 0.0, 0.5, 0.5), 0, 0), Region((0.1, 0.2, 0.7, 0.9), 1, 1), Region((0.5, 0.0, 1.0, 0.5), 1, 0))
SIZE = 16


def canvas(*boxes):
    """The text of a canvas with boxes (id, region)."""
    return json.dumps([{"id": number, **region._asdict()} for number, region in boxes])


def test_boxes_on_the_canvas_are_matched_with_those_before():
    moved, added = BEFORE[2]._replace(box=(0.5, 0.5, 1.0, 1.0)), Region((0, 0, 1, 1), 0, 1)
    layout = read_canvas(canvas((1, BEFORE[1]), (2, moved), (None, added)), BEFORE, NAMES)
    assert layout.regions == (None, BEFORE[1], moved, added)
    assert layout.changed_boxes == [BEFORE[0].box, BEFORE[2].box, moved.box, added.box]
    assert read_canvas(canvas(*enumerate(BEFORE)), BEFORE, NAMES).changed_boxes == []  # to the last bit


def test_impossible_boxes_on_the_canvas_are_refused():
    with pytest.raises(ValueError, match="got blue ring, wanted a box"):
        read_canvas(canvas((None, Region((0.5, 0, 0.2, 1), 1, 1))), (), NAMES)


# In the browser


def in_browser(test):
    return pytest.mark.slow(needs_gradio(needs_browser(test)))


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A logs folder with a pixel model of layouts, and one of images of classes."""
    logs = tmp_path_factory.mktemp("layout_page")
    tiny = f"--logs_root {logs} --sampler ddpm {UNET} --batch_size 4 --total_steps 20 --sample_steps 3 --train_steps 2"
    shapes = f"--dataset shapes --img_size {SIZE} --shapes_count 20 --conditions layout --layout_colors 6"
    call("train_sampler.py", f"{tiny} --no_amp --warmup_iters 10 {shapes}")
    call("train_sampler.py", f"{tiny} --no_amp --warmup_iters 10 --dataset digits --img_size 8")
    return logs


@pytest.fixture
def tab(logs):
    flags = "--sampler ddpm --dataset shapes --no_amp --batch_size 9 --sample_steps 3"
    with served(logs, flags) as address, tab_at(address) as page:
        yield page


def boxes_on(tab):
    """The boxes on the canvas, as the page reads them."""
    return json.loads(tab.evaluate("document.querySelector('layout-canvas').regions"))


def drag(tab, start, end):
    """Drags from one point of the canvas to another, in fractions of it."""
    place = tab.locator("layout-canvas canvas").bounding_box()
    points = [(place["x"] + x * place["width"], place["y"] + y * place["height"]) for x, y in (start, end)]
    tab.mouse.move(*points[0])
    tab.mouse.down()
    tab.mouse.move(*points[1], steps=5)
    tab.mouse.up()


def shown_key(tab):
    return tab.evaluate("document.querySelector('layout-canvas')?.scene.key")


def wait_for_scene(tab, key):
    """Waits until the canvas shows another scene than that of this key."""
    condition = "key => document.querySelector('layout-canvas').scene.key !== key"
    tab.wait_for_function(condition, arg=key)


@in_browser
def test_boxes_are_drawn_sampled_dragged_and_edited(tab):
    enter(tab, "images", 2)
    turn_to(tab, "Layout")
    tab.locator("layout-canvas canvas").wait_for()
    tab.wait_for_function("document.querySelector('layout-canvas')?.scene.key")
    press(tab, EDIT)
    tab.get_by_text("there is no image to edit").wait_for()
    tab.get_by_label("class of the box").select_option("ring")
    tab.get_by_label("colour of the box").select_option("blue")
    drag(tab, (0.1, 0.1), (0.4, 0.4))
    drag(tab, (0.8, 0.6), (0.6, 0.9))  # from right to left
    drag(tab, (0.9, 0.1), (0.9, 0.1))  # a click is no box
    drawn = boxes_on(tab)
    assert [each["box"] for each in drawn] == [
        pytest.approx([0.1, 0.1, 0.4, 0.4], abs=0.01),
        pytest.approx([0.6, 0.6, 0.8, 0.9], abs=0.01),
    ]
    assert {(each["id"], each["number"], each["color"]) for each in drawn} == {(None, 4, 4)}
    key = shown_key(tab)
    press(tab, SAMPLE)
    images, _ = new_images(tab, 2)
    wait_for_scene(tab, key)
    first = content(images[0])
    sampled = boxes_on(tab)
    assert [(each["id"], each["box"]) for each in sampled] == [(i, each["box"]) for i, each in enumerate(drawn)]
    press(tab, EDIT)
    tab.get_by_text("no box has changed").wait_for()

    drag(tab, (0.25, 0.25), (0.25, 0.65))
    moved = boxes_on(tab)[0]
    assert moved["id"] == 0 and moved["box"] == pytest.approx([0.1, 0.5, 0.4, 0.8], abs=0.01)
    key = shown_key(tab)
    press(tab, EDIT)
    images, _ = new_images(tab, 3)  # the first is the one before, whose address is as before
    wait_for_scene(tab, key)
    before, *results = map(content, images)
    assert np.array_equal(before, first)
    mask = changed_pixels([sampled[0]["box"], moved["box"]], (SIZE, SIZE)).numpy()
    inside = mask.repeat(len(first) // SIZE, 0).repeat(len(first) // SIZE, 1)
    for result in results:
        assert np.array_equal(result[~inside], first[~inside])
        assert not np.array_equal(result[inside], first[inside])
    assert not np.array_equal(*results)

    key = shown_key(tab)
    images[0].click()  # back to the image before, with its layout
    wait_for_scene(tab, key)
    assert [each["box"] for each in boxes_on(tab)] == [each["box"] for each in sampled]


@in_browser
def test_boxes_are_relabelled_removed_and_resized(tab):
    turn_to(tab, "Layout")
    tab.wait_for_function("document.querySelector('layout-canvas')?.scene.key")
    drag(tab, (0.2, 0.2), (0.5, 0.5))
    tab.get_by_label("colour of the box").select_option("green")
    drag(tab, (0.5, 0.5), (0.8, 0.7))  # the corner
    assert boxes_on(tab)[0]["color"] == 3 and boxes_on(tab)[0]["box"] == pytest.approx([0.2, 0.2, 0.8, 0.7], abs=0.01)
    drag(tab, (0.5, 0.5), (0.0, 0.0))  # it stays in the image
    assert boxes_on(tab)[0]["box"] == pytest.approx([0.0, 0.0, 0.6, 0.5], abs=0.01)
    tab.keyboard.press("Delete")
    assert boxes_on(tab) == []
    key = shown_key(tab)
    press(tab, "A layout of the data")
    wait_for_scene(tab, key)
    taken = boxes_on(tab)
    assert taken and all(0 <= edge <= 1 for each in taken for edge in each["box"])
    assert tab.get_by_label("undo all changes").is_disabled()
    turn_to(tab, "Sample")
    turn_to(tab, "Layout")
    assert boxes_on(tab) == taken
    key = shown_key(tab)
    press(tab, "Clear")
    wait_for_scene(tab, key)
    assert boxes_on(tab) == []


@in_browser
def test_the_canvas_is_there_for_models_of_boxes_only(tab):
    canvas, message = tab.locator("layout-canvas"), tab.get_by_text("This run reads no boxes")
    turn_to(tab, "Layout")
    canvas.wait_for()
    assert not message.is_visible()
    choose(tab, "run", "ddpm_digits")
    message.wait_for()
    canvas.wait_for(state="hidden")
    choose(tab, "run", "ddpm_shapes")
    canvas.wait_for()
    message.wait_for(state="hidden")
