"""The demo page in a real browser, on runs of own images without presets: codes, and pixels of ddpm."""

import io
import re
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.page_components import (
    MOST_FIELDS,
    Settings,
    hint_inputs,
    read_metadata,
    show_errors,
    slider_step,
    text_inputs,
)
from experiments.playground import AS_IN_DATA, Playground, Runs
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
from helpers.tiny_runs import DDPM, GAN, SAMPLER, VQGAN, call
from models.conditions.numbers import NumberField
from train.samplers._metadata import MetadataFields
from train.samplers.ddpm import Sampling

CLASSES = ("<b>shoe", "hat", "t-shirt")  # in the order of their numbers


def in_browser(test):
    return pytest.mark.slow(needs_gradio(needs_browser(test)))


@needs_gradio
def test_errors_on_the_page_are_escaped():
    import gradio as gr

    with pytest.raises(gr.Error) as error, show_errors():
        raise ValueError("got <img src=x>: pass --temp T")
    assert error.value.message == "got &lt;img src=x&gt;: pass temperature T"


@needs_gradio
def test_out_of_memory_is_one_line():
    import gradio as gr

    for failure in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 TiB")):
        with pytest.raises(gr.Error) as error, show_errors():
            raise failure
        assert error.value.message == "out of memory: enter fewer images" and not error.value.print_exception
    with pytest.raises(RuntimeError, match="another fault"), show_errors():
        raise RuntimeError("another fault")


def model_of(words, numbers, reads_prompts, **initial):
    """A model of these fields, as the page sees it."""
    fields = MetadataFields(words, numbers)
    initial = dict.fromkeys(fields.unknown, "unknown") | initial
    return SimpleNamespace(metadata_fields=fields, initial_metadata=initial, reads_prompts=reads_prompts)


@needs_gradio
def test_boxes_of_prompts_and_metadata_are_those_of_the_model():
    fields = {"year": NumberField(2000, 2030), "lon": NumberField(-180, 180, cyclic=True)}
    model = model_of({"light": ("day", "night")}, fields, True, year="2018")
    boxes = {box.label: box for box in text_inputs(model) if box.visible}
    assert [*boxes] == ["prompt", "negative prompt", "light", "year", "year unknown", "lon", "lon unknown"]
    assert [value for _, value in boxes["light"].choices] == ["unknown", "day", "night"]
    assert [boxes[name].value for name in ("light", "year unknown", "lon unknown")] == ["unknown", False, True]
    sliders = {name: (box.minimum, box.value, box.maximum, box.step) for name, box in boxes.items() if name in fields}
    assert sliders == {"year": (2000, 2018, 2030, 1), "lon": (-180, -180, 180, 1)}
    many = model_of({}, {f"n{i}": NumberField(0, 1) for i in range(MOST_FIELDS + 3)}, False)
    for other in (model_of({}, {}, False), many):
        assert list(map(type, text_inputs(other))) == list(map(type, text_inputs(model)))  # updates fit the boxes
    assert sum(box.visible for box in text_inputs(many)) == 2 * MOST_FIELDS


@needs_gradio
def test_a_slider_holds_a_number_outside_the_range():
    for value, ends in (("-5", (-5, 10)), ("3", (0, 10)), ("12.5", (0, 12.5))):
        slider = text_inputs(model_of({}, {"height": NumberField(0, 10)}, False, height=value))[2 + MOST_FIELDS]
        assert (slider.minimum, slider.maximum, slider.value) == (*ends, float(value))


def test_steps_of_sliders_are_round():
    steps = {(0, 31): 1, (1980, 2100): 1, (-40, 40): 1, (0, 12): 0.1, (0, 1): 0.01, (0, 4): 0.01, (1.5, 61.5): 0.1}
    assert {ends: slider_step(*ends) for ends in steps} == steps


@needs_gradio
def test_boxes_are_read_as_the_fields_they_show():
    model = model_of(
        {"light": ("day",), "sky": ("blue",)}, {"year": NumberField(0, 1), "lon": NumberField(-9, 9)}, True
    )
    values = {"prompt": "a seven ", "light": "day", "year": 1, "lon": 0, "lon unknown": False}
    typed = [values.get(box.label, box.value) if box.visible else box.value for box in text_inputs(model)]
    assert read_metadata(model, typed[2:]) == {"light": "day", "sky": "unknown", "year": "unknown", "lon": 0}
    many = model_of({}, {f"n{i}": NumberField(0, 1) for i in range(MOST_FIELDS + 1)}, False)
    values = [box.value for box in text_inputs(many)]
    assert read_metadata(many, values[2:])[f"n{MOST_FIELDS}"] == "unknown"  # for which there is no slider


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A logs folder with runs of rotated digits, `turned` with their thickness, `tilted` less and without it."""
    logs = tmp_path_factory.mktemp("numbered")
    flags = f"--logs_root {logs} {DDPM} --conditions numbers --no_class_conditional --train_steps 1 --no_amp"
    for name, data in (("turned", "--digits_rotation 40 --digits_thickness"), ("tilted", "--digits_rotation 10")):
        call("train_sampler.py", f"{flags} --dataset digits {data} --steps_per_eval 0 --log_dir {name}")
    return logs


@needs_gradio
def test_numbers_of_sliders_reach_every_image(numbered, conditions):
    output = OutputConfig(logs_root=str(numbered), device="cpu", amp=False)
    model, options = load_model(ModelConfig(sampler="ddpm", load_dir="turned"), output), Sampling(sample_steps=2)
    play = Playground(model, options, model.condition_source(options))
    settings = Settings(Runs(numbered, None, play), 2, *[None] * 8, text_inputs(play), hint_inputs(play), {})
    changes = {"rotation": 0, "rotation unknown": False, "thickness": 1.5}  # which stays unknown
    values = [changes.get(box.label, box.value) for box in (*settings.texts, *settings.hints)]
    _, request = settings.read("turned", model.step, AS_IN_DATA, 2, 0, True, "turned", *values)
    play.sample(request)
    (batch,) = conditions
    assert batch["rotation"].tolist() == [0, 0] and batch["thickness"].isnan().all()


@pytest.fixture(scope="module")
def own_images(tmp_path_factory):
    """A logs folder with runs of a folder of images in three classes, none with a preset or steps of sampling."""
    root, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(80 * label, 80 * label + 80, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    data = f"--dataset folder --data_dir {root / 'images'} --label_from folder"
    flags = f"{data} --logs_root {root / 'logs'} --train_steps 3 --warmup_iters 0 --no_amp"
    call("train_vqgan.py", f"{flags} {VQGAN} {GAN}")
    sampler, ddpm = (each.replace("--sample_steps 4", "") for each in (SAMPLER, DDPM))
    call("train_sampler.py", f"{flags} {sampler} --img_size 16 --steps_per_checkpoint 2")
    call("train_sampler.py", f"{flags} {ddpm}")
    return root / "logs"


@pytest.fixture(scope="module", params=["absorbing", "ddpm"])
def address(request, own_images):
    with served(own_images, f"--sampler {request.param} --dataset folder --no_amp --batch_size 9") as url:
        yield url


@pytest.fixture
def tab(address):
    with tab_at(address) as page:
        yield page


def is_absorbing(tab):
    return field(tab, "run").input_value() == "absorbing_folder"


@in_browser
def test_the_first_press_draws_and_empty_stays_empty(tab):
    assert field(tab, "steps").input_value() == ""
    assert field(tab, "steps").get_attribute("placeholder") == ("256" if is_absorbing(tab) else "20")
    press(tab, "Sample")
    _, sources = new_images(tab, 9)
    tab.get_by_text("more settings").click()
    empty = "last temperature" if is_absorbing(tab) else "dynamic threshold"
    field(tab, empty).wait_for()
    tab.wait_for_timeout(500)
    press(tab, "Sample")
    new_images(tab, 9, sources)  # the page draws another seed
    assert {field(tab, each).input_value() for each in (empty, "steps", "guidance interval")} == {""}


@in_browser
def test_the_seed_changes_unless_it_is_fixed(tab):
    enter(tab, "images", 2)
    press(tab, "Sample")
    images, sources = new_images(tab, 2)
    first, seed = [content(each) for each in images], field(tab, "seed").input_value()
    press(tab, "Sample")
    others, sources = new_images(tab, 2, sources)
    assert not np.array_equal(first[0], content(others[0]))
    assert field(tab, "seed").input_value() != seed and not field(tab, "fix the seed").is_checked()
    enter(tab, "seed", seed)
    assert field(tab, "fix the seed").is_checked()
    enter(tab, "images", 1)
    press(tab, "Sample")
    assert np.array_equal(content(new_images(tab, 1, sources)[0][0]), first[0])
    assert field(tab, "seed").input_value() == seed


@in_browser
def test_classes_are_chosen_by_name(tab):
    field(tab, "class").click()
    options = tab.get_by_role("option").all_inner_texts()
    assert [each.strip("✓ \n") for each in options[2:]] == list(CLASSES)
    tab.get_by_role("option", name="hat", exact=True).click()
    enter(tab, "images", 2)
    press(tab, "Sample")
    _, sources = new_images(tab, 2)
    assert tab.locator(".thumbnail-item .caption-label").all_inner_texts() == ["hat", "hat"]
    choose(tab, "class", "random (data frequencies)")
    enter(tab, "images", 9)
    press(tab, "Sample")
    new_images(tab, 9, sources)
    assert {*tab.locator(".thumbnail-item .caption-label").all_inner_texts()} == {*CLASSES}


@in_browser
def test_only_the_fields_of_the_solver_are_there(tab):
    tab.get_by_text("more settings").click()
    own = {"absorbing": "confidence", "ddpm": "ddim"}["absorbing" if is_absorbing(tab) else "ddpm"]
    label = "choice temperature" if is_absorbing(tab) else "eta"
    assert not field(tab, label).is_visible()
    enter(tab, "images", 2)
    choose(tab, "solver", own)
    enter(tab, label, 0.5)
    press(tab, "Sample")
    _, sources = new_images(tab, 2)
    choose(tab, "solver", "first_hitting" if is_absorbing(tab) else "heun")
    field(tab, label).wait_for(state="hidden")
    enabled = field(tab, "steps").is_enabled()
    assert enabled is not is_absorbing(tab)  # one step per code
    press(tab, "Sample")
    new_images(tab, 2, sources)


@in_browser
def test_numbers_out_of_their_limits_are_named(tab):
    enter(tab, "images", 500)
    press(tab, "Sample")
    tab.get_by_text("got 500 for images, wanted 1 to 9").wait_for()
    tab.get_by_text("Download").first.wait_for(state="hidden")  # nor an empty gallery
    assert tab.locator(".thumbnail-item").count() == 0
    enter(tab, "images", 2)
    enter(tab, "steps", 0)
    press(tab, "Sample")
    tab.get_by_text("got 0 for steps, wanted at least 1").wait_for()
    enter(tab, "steps", "a few")
    press(tab, "Sample")
    tab.get_by_text("got 'a few' for steps, wanted an integer").wait_for()
    assert tab.get_by_text("Traceback").count() == 0


@in_browser
def test_images_are_downloaded_as_png_and_npz(tab):
    assert not tab.get_by_text("Download").first.is_visible()
    enter(tab, "images", 3)
    press(tab, "Sample")
    shown = [content(each) for each in new_images(tab, 3)[0]]
    files = []
    for name in ("Download PNG files (.zip)", "Download array (.npz)"):
        with tab.expect_download() as download:
            press(tab, name)
        assert re.fullmatch(r"(absorbing|ddpm)_folder_3_seed\d+\.(zip|npz)", download.value.suggested_filename)
        files.append(download.value.path())
    with np.load(files[1]) as arrays:
        images, labels = arrays["arr_0"], arrays["labels"]
    with zipfile.ZipFile(files[0]) as archive:
        pictures = [Image.open(io.BytesIO(archive.read(name))) for name in sorted(archive.namelist())]
    assert labels.shape == (3,) and all(
        np.array_equal(each, image) for each, image in zip(pictures, images, strict=True)
    )
    for pixels, image in zip(shown, images, strict=True):
        scale = len(pixels) // len(image)
        assert np.array_equal(pixels[::scale, ::scale], np.asarray(Image.fromarray(image).convert("L")))


@in_browser
def test_another_run_and_step_are_chosen_on_the_page(tab):
    was_absorbing = is_absorbing(tab)
    other, fields = (
        ("ddpm_folder", ("spacing", "top-k")) if was_absorbing else ("absorbing_folder", ("top-k", "spacing"))
    )
    tab.get_by_text("more settings").click()
    enter(tab, "images", 2)
    press(tab, "Sample")
    _, sources = new_images(tab, 2)
    choose(tab, "run", other)
    field(tab, fields[0]).wait_for()
    assert not field(tab, fields[1]).is_visible()
    tab.wait_for_function("title => document.title === title", arg=f"{other}: samples")
    press(tab, "Sample")
    _, sources = new_images(tab, 2, sources)
    if was_absorbing:
        choose(tab, "run", "absorbing_folder")
        field(tab, "top-k").wait_for()
    choose(tab, "step", "2")
    press(tab, "Sample")
    new_images(tab, 2, sources)
    with tab.expect_download() as download:
        press(tab, "Download array (.npz)")
    assert download.value.suggested_filename.startswith("absorbing_folder_2_")


@in_browser
def test_watching_on_the_page(tab):
    enter(tab, "images", 2)
    enter(tab, "steps", 7)
    turn_to(tab, "Watch")
    frames = []
    tab.on("request", lambda request: frames.append(request.url) if request.url.endswith(".png") else None)
    press(tab, "Watch")
    step = tab.get_by_label("number input for step")
    step.wait_for()
    tab.wait_for_function("box => box.value === '7' && !box.disabled", arg=step.element_handle())
    assert len({*frames}) >= 4  # frames arrived during sampling
    frame = tab.locator(".image-frame img:visible").first
    last = content(frame)
    source = frame.get_attribute("src")
    step.fill("1")
    step.press("Enter")
    tab.wait_for_function("([image, was]) => image.src !== was", arg=[frame.element_handle(), source])
    assert not np.array_equal(content(frame), last)
    press(tab, "Stop")


@in_browser
def test_inpainting_with_the_brush(tab):
    enter(tab, "images", 2)
    press(tab, "Sample")
    images, sources = new_images(tab, 2)
    selected = content(images[1])
    images[1].click()
    turn_to(tab, "Inpaint")
    canvas = tab.locator("canvas:visible").first
    canvas.wait_for()
    tab.wait_for_timeout(2000)  # until the image is on it
    press(tab, "Inpaint")
    tab.get_by_text("nothing is masked").wait_for()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x - 100, y)
    tab.mouse.down()
    tab.mouse.move(x + 100, y, steps=10)
    tab.mouse.up()
    tab.wait_for_timeout(500)
    press(tab, "Inpaint")
    hidden, *results = (content(each) for each in new_images(tab, 3, sources)[0])
    selected = np.asarray(Image.fromarray(selected).resize(hidden.shape[::-1], Image.Resampling.NEAREST))
    grey = hidden == 128
    assert 0.1 < grey.mean() < 0.7
    assert np.array_equal(hidden[~grey], selected[~grey])  # unmasked pixels are unchanged
    assert not np.array_equal(results[0], results[1])


@in_browser
def test_uploads_are_opened_or_their_fault_is_told(tab, tmp_path):
    def upload(name, data):
        (tmp_path / name).write_bytes(data)
        tab.get_by_test_id("Upload an image-upload-button").set_input_files(tmp_path / name)

    def png(size):
        file = io.BytesIO()
        Image.new("1", size).save(file, "PNG")
        return file.getvalue()

    turn_to(tab, "Inpaint")
    for name, data, message in (
        ("notes.txt", b"no image", "notes.txt: its content is none of"),
        ("holiday.png", b"broken", "holiday.png: its content is none of"),
        ("huge.png", png((10_000, 10_000)), "huge.png: got 10000 x 10000 pixels, wanted at most"),
    ):
        upload(name, data)
        tab.get_by_text(message).wait_for()
    press(tab, "Inpaint")
    tab.get_by_text("there is no image").wait_for()
    upload("wide.png", png((96, 32)))
    tab.wait_for_timeout(2000)
    press(tab, "Inpaint")
    tab.get_by_text("nothing is masked").wait_for()
    press(tab, "New sample")


@in_browser
def test_a_moved_slider_is_no_longer_unknown(numbered):
    def move(name):
        slider, unknown = tab.get_by_label(f"range slider for {name}"), field(tab, f"{name} unknown")
        slider.wait_for()
        assert unknown.is_checked()
        ends = [slider.get_attribute(end) for end in ("min", "max")]
        slider.press("ArrowRight")
        tab.wait_for_function("box => !box.checked", arg=unknown.element_handle())
        return *ends, slider.input_value()

    with (
        served(numbered, "--sampler ddpm --load_dir tilted --no_amp --device cpu --sample_steps 2") as url,
        tab_at(url) as tab,
    ):
        assert move("rotation") == ("-10", "10", "-9.9") and not field(tab, "thickness unknown").is_visible()
        enter(tab, "images", 2)
        press(tab, "Sample")
        _, sources = new_images(tab, 2)
        choose(tab, "run", "turned")
        assert move("thickness") == ("0", "4", "0.01") and move("rotation") == ("-40", "40", "-39")
        press(tab, "Sample")
        new_images(tab, 2, sources)
