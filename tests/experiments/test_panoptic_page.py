"""The tab Panoptic of the demo page: maps painted in a real browser, and the images sampled of them."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.metrics.contact_sheet import class_color
from experiments.panoptic_page import SAMPLE
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
from train.datasets import shapes

SIZE = 16
CLASSES = shapes.Shapes.region_classes
DISC, SKY, SAND = map(CLASSES.index, ("disc", "sky", "sand"))
TEXT = "--attn_block_type transformer --text_width 16 --text_layers 1 --text_heads 2"


def in_browser(test):
    return pytest.mark.slow(needs_gradio(needs_browser(test)))


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A logs folder with a pixel model of segments, their words and captions, and one of boxes."""
    logs = tmp_path_factory.mktemp("panoptic_page")
    tiny = f"--logs_root {logs} --sampler ddpm {UNET} --batch_size 4 --total_steps 20 --sample_steps 3 --train_steps 4"
    tiny += f" --dataset shapes --img_size {SIZE} --shapes_count 20 --no_amp --lr 0.01 --ema_beta 0 --warmup_iters 1"
    reads = "--conditions text region_words layout --layout_regions segments --experts disc,ring sky"
    call("train_sampler.py", f"{tiny} --steps_per_eval 0 {reads} {TEXT} --log_dir scenes")
    call("train_sampler.py", f"{tiny} --steps_per_eval 0 --conditions layout --log_dir boxes")
    return logs


@pytest.fixture(scope="module")
def address(logs):
    flags = "--sampler ddpm --dataset shapes --load_dir scenes --no_amp --batch_size 9 --sample_steps 3 --seed 3"
    with served(logs, flags) as address:
        yield address


@pytest.fixture
def tab(address):
    with tab_at(address) as page:
        turn_to(page, "Panoptic")
        page.wait_for_function("document.querySelector('panoptic-canvas')?.scene.key")
        yield page


def map_on(tab):
    """The ids (H, W) and the regions on the canvas, as the page reads them."""
    painting = json.loads(tab.evaluate("document.querySelector('panoptic-canvas').painting"))
    ids = np.repeat(*np.array(painting["runs"]).T).reshape(painting["size"])
    return ids, painting["regions"]


def drag(tab, *points):
    """Paints a stroke through points of the canvas, in pixels of the map."""
    place = tab.locator("panoptic-canvas canvas").bounding_box()
    for number, (x, y) in enumerate(points):
        step = place["x"] + x * place["width"] / SIZE, place["y"] + y * place["height"] / SIZE
        tab.mouse.move(*step, steps=1 if number == 0 else 5)
        if number == 0:
            tab.mouse.down()
    tab.mouse.up()


def select(tab, label, option):
    tab.get_by_label(label).select_option(option)


def brush_size(tab, pixels):
    tab.get_by_label("size of the brush").fill(str(pixels))


def wait_for_map(tab, act):
    """Waits until the canvas shows another map than before the act."""
    key = tab.evaluate("document.querySelector('panoptic-canvas').scene.key")
    act()
    tab.wait_for_function("key => document.querySelector('panoptic-canvas').scene.key !== key", arg=key)


@in_browser
def test_maps_are_painted_pixel_by_pixel(tab):
    assert map_on(tab)[0].tolist() == np.zeros((SIZE, SIZE)).tolist()
    select(tab, "class to paint", "sky")
    select(tab, "tool", "fill")
    drag(tab, (8, 8))
    select(tab, "tool", "brush")
    select(tab, "class to paint", "disc")
    brush_size(tab, 1)
    drag(tab, (2.5, 2.5), (6.5, 2.5))
    press(tab, "new instance")
    drag(tab, (10.5, 12.5))
    ids, regions = map_on(tab)
    expected = np.ones((SIZE, SIZE))
    expected[2, 2:7], expected[12, 10] = 2, 3
    assert np.array_equal(ids, expected)
    assert [region["number"] for region in regions] == [SKY, DISC, DISC]

    brush_size(tab, 4)
    select(tab, "tool", "eraser")
    drag(tab, (10.5, 12.5))
    ids, _ = map_on(tab)
    assert 3 not in ids and 9 <= (ids == 0).sum() <= 16 and (ids[:10] > 0).all()
    tab.get_by_label("undo the last stroke").click()
    assert np.array_equal(map_on(tab)[0], expected)
    tab.get_by_label("remove region 2").click()
    ids, regions = map_on(tab)
    assert (ids == np.where(expected == 2, 0, expected)).all() and regions[1] is None
    tab.get_by_label("words of region 3").fill("a red disc ")
    assert [region and region["words"] for region in map_on(tab)[1]] == ["", None, "a red disc "]
    tab.get_by_label("undo the last stroke").click()  # of the removal; the words were typed since
    ids, regions = map_on(tab)
    assert np.array_equal(ids, expected) and [region["words"] for region in regions] == ["", "", "a red disc "]
    select(tab, "class to paint", "sky")
    assert tab.get_by_label("new instance").is_disabled()  # stuff has one region
    turn_to(tab, "Sample")
    turn_to(tab, "Panoptic")
    assert np.array_equal(map_on(tab)[0], ids)


@in_browser
def test_the_map_painted_is_the_condition_of_the_images(tab):
    enter(tab, "images", 2)
    select(tab, "class to paint", "sky")
    select(tab, "tool", "fill")
    drag(tab, (8, 8))
    press(tab, SAMPLE)
    images, sources = new_images(tab, 2)
    sky = [content(image) for image in images]
    select(tab, "class to paint", "sand")
    drag(tab, (8, 8))
    press(tab, SAMPLE)
    images, sources = new_images(tab, 2, excluded=sources)
    assert not np.array_equal(content(images[0]), sky[0])
    enter(tab, "prompt", "a red disc")
    press(tab, SAMPLE)
    images, sources = new_images(tab, 2, excluded=sources)
    enter(tab, "prompt", "")
    tab.get_by_label("undo the last stroke").click()
    press(tab, SAMPLE)
    images, _ = new_images(tab, 2, excluded=sources)
    assert all(np.array_equal(content(image), before) for image, before in zip(images, sky, strict=True))


@in_browser
def test_maps_come_from_the_data_and_from_pictures(tab, tmp_path):
    wait_for_map(tab, lambda: press(tab, "A map of the data"))
    ids, regions = map_on(tab)
    assert {*np.unique(ids)} == {*range(1, len(regions) + 1)} or 0 in ids
    assert all(0 <= region["number"] < len(CLASSES) for region in regions)
    with tab.expect_download() as download:
        tab.get_by_label("save the picture of the map").click()
    saved = np.asarray(Image.open(download.value.path()).convert("RGB"))
    colors = np.array([(128, 128, 128), *(class_color(region["number"]) for region in regions)])
    assert np.array_equal(saved, colors[ids])
    picture = np.full((2 * SIZE, 2 * SIZE, 3), class_color(SAND), np.uint8)
    picture[4:12, 4:12] = class_color(DISC)
    Image.fromarray(picture).save(tmp_path / "mine.png")
    upload = tab.locator("input[type=file]:not([webkitdirectory])").locator("visible=false")
    chooser = tab.get_by_role("button", name="Open a painted picture")
    assert upload.count() and chooser.count()
    with tab.expect_file_chooser() as chosen:
        chooser.click()
    wait_for_map(tab, lambda: chosen.value.set_files(tmp_path / "mine.png"))
    ids, regions = map_on(tab)
    assert [region["number"] for region in regions] == [DISC, SAND]
    expected = np.full((SIZE, SIZE), 2)
    expected[2:6, 2:6] = 1
    assert np.array_equal(ids, expected)
    wait_for_map(tab, lambda: press(tab, "Clear the map"))
    assert not map_on(tab)[0].any()


@in_browser
def test_runs_without_segments_have_a_message_instead(tab):
    turn_to(tab, "Sample")
    choose(tab, "run", "boxes")
    turn_to(tab, "Panoptic")
    tab.get_by_text("This run reads no segments").wait_for()
    tab.locator("panoptic-canvas canvas").wait_for(state="hidden")
    choose(tab, "run", "scenes")
    tab.locator("panoptic-canvas canvas").wait_for()
    choose(tab, "run", "boxes")  # while the tab is open
    tab.get_by_text("This run reads no segments").wait_for()
    tab.locator("panoptic-canvas canvas").wait_for(state="hidden")
    assert not tab.get_by_role("button", name="Sample this map").is_visible()
