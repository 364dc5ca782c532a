"""The tab Edit of the demo page: changes what an image shows, and leaves the rest as it is.

edit_descriptions.py has what it shows and should show; harness/edit_methods.py has the methods.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from experiments.edit_descriptions import (
    PER_SIDE,
    Description,
    describe_side,
    description_boxes,
    description_values,
    held_out_image,
    link_boxes,
    read_description,
    sample_image,
)
from experiments.harness.controls import Control, component, make_controls, parse_value
from experiments.harness.edit_methods import (
    USED_BY,
    EditingConfig,
    EditTask,
    find_mask,
    find_method,
    methods_for,
)
from experiments.harness.editing import expand_mask
from experiments.metrics.cost import count_nfe
from experiments.page_components import (
    MASK_COLOR,
    SIDE,
    Results,
    Settings,
    add_editor,
    add_results,
    brushed_mask,
    fill_on,
    has_picture,
    open_upload,
    show_errors,
)
from experiments.playground import (
    NO_CLASS,
    Playground,
    Request,
    enlarge_to_picture,
    preprocess,
)
from models.conditions.image import MASK
from train.datasets._channels import PICTURES
from train.loop import Batch
from train.samplers.ddpm import GaussianSampler
from train.spaces import any_in_cells

COLUMNS = 3  # of the gallery
PREFERRED = "diffedit"  # the method that the tab begins with, if the model has it
OPTIONS = ("mask_rule", "noisings", "plain_steps", "source_guidance", "paste")  # of the methods
SAMPLE, ITEM, UPLOAD, CLEAR = "A new sample", "An image of the data", "Open an image", "Clear the mask"  # buttons
OF_COMPUTED_MASKS = ("mask_rule", "noisings")  # options of diffedit that have no effect on a mask of the user
HELP = (
    "Take an image, and enter what it shows (*from*) and what it should show (*to*). *diffedit* changes the image "
    "where these two differ: *Find the mask* shows where, and brush and eraser change the mask. *sdedit* redraws what "
    "you brush over, or all of the image. What the settings say of the image has no effect here, but hints do."
)


class Edit(NamedTuple):
    """What an image shows, what it should show, and how to change it."""

    source: Description
    target: Description
    settings: EditingConfig


class EditResult(NamedTuple):
    """Edited images, and what they cost."""

    batch: Batch  # "image" uint8 (B, C, H, W), with "label" for models of classes
    mask: Tensor | None  # (H, W) bool: where the first may differ from the input; None: everywhere
    calls: float  # network calls per image
    seconds: float  # per image

    @property
    def summary(self) -> str:
        """What the images cost, and how large the mask is, in a line of Markdown."""
        cost = f"**{self.calls:.4g}** network calls and {self.seconds:.2g} seconds per image"
        return cost if self.mask is None else f"{cost}; mask: {self.mask.float().mean().item():.0%} of the image"


def reason_against(play: Playground) -> str:
    """Returns in Markdown why the page cannot edit images with a model; "" if it can."""
    if play.trained.data.n_channels not in PICTURES or MASK in play.trained.sampler.conditions:
        return "This run reads more than pictures: edit them with `experiments/edit.py`."
    if not (play.classes or play.reads_prompts or play.layout_names or play.metadata_fields.unknown):
        return "This run has no classes and reads no texts, boxes or numbers. Choose one of a data set with them."
    return ""


def make_task(play: Playground, request: Request, edit: Edit, image: Tensor, mask: Tensor | None) -> EditTask:
    """Returns the task to edit an image uint8 (C, H, W) `request.count` times, in a mask (H, W) bool if there is one.

    ValueError: the target is empty.
    """
    if edit.target.is_empty:
        raise ValueError("there is nothing to edit the image to: enter what it should show")
    source = describe_side(play, request, edit.source, edit.settings.source_options(request.options))
    target = describe_side(play, request, edit.target, request.options)
    if mask is not None:
        cells = any_in_cells(mask[None], play.trained.space.factor).to(play.trained.device)
        mask = cells.expand(request.count, *cells.shape[1:])
    images, indices = image.expand(request.count, *image.shape), list(range(request.count))
    return EditTask(play.trained, edit.settings, images, mask, source, target, request.seed, indices)


def find_difference(play: Playground, request: Request, edit: Edit, image: Tensor) -> Tensor:
    """Returns where the model predicts something else for source and target of the first edited image: (H, W) bool.

    ValueError: nowhere.
    """
    mask = find_mask(make_task(play, replace(request, count=1), edit, image, None))[0].cpu()
    if not mask.any():
        raise ValueError("from and to do not differ in what the model predicts: enter others")
    return expand_mask(mask, tuple(image.shape[1:]))


def edit_image(play: Playground, request: Request, edit: Edit, image: Tensor, mask: Tensor | None) -> EditResult:
    """Edits an image uint8 (C, H, W) `request.count` times, inside a mask (H, W) bool if there is one.

    DiffEdit in a mask that is given depends on no random numbers, so its result is a single one.
    """
    method = edit.settings.method
    if method == "diffedit" and mask is not None and isinstance(play.trained.sampler, GaussianSampler):
        request = replace(request, count=1)
    task, start = make_task(play, request, edit, image, mask), time.perf_counter()
    with count_nfe(play.trained.sampler.network) as nfe:
        edited = find_method(method, play.trained)(task)
    seconds = (time.perf_counter() - start) / request.count
    label = dict(play.classes).get(edit.target.label, edit.target.label)
    labels = {} if label == NO_CLASS else {"label": torch.full((request.count,), label)}
    mask = None if edited.mask is None else edited.mask[0]
    return EditResult({"image": edited.image, **labels}, mask, nfe.evaluations / request.count, seconds)


def option_controls() -> dict[str, Control]:
    """Returns the controls of the method and of OPTIONS."""
    controls = {each.name: each for each in make_controls(EditingConfig(), [], *[True] * 4)}
    return {name: controls[name] for name in ("method", *OPTIONS)}


def has_effect(name: str, method: str, masked: bool) -> bool:
    """Whether an option has an effect on a method, with a mask of the user or without."""
    if method not in USED_BY[name] or (name == "paste" and method == "sdedit" and not masked):
        return False
    return not (masked and method == "diffedit" and name in OF_COMPUTED_MASKS)


def read_settings(method: str, strength: float, values: Sequence[Any], masked: bool) -> EditingConfig:
    """Returns the settings from the values of their boxes, those of OPTIONS without the ones that have no effect.

    ValueError for values out of range, and for a mask with a method that takes none.
    """
    if masked and method not in USED_BY["mask"]:
        raise ValueError(f"got a mask for {method}, which takes none: press {CLEAR}, or choose another method")
    controls, options = option_controls(), {"mask": ("of the page",)} if masked else {}
    for name, value in zip(OPTIONS, values, strict=True):
        if has_effect(name, method, masked):
            options[name] = parse_value(controls[name], value)
    return EditingConfig(method=method, strength=strength, **options)


def first_method(play: Playground) -> str:
    """Returns the method that the tab begins with."""
    methods = methods_for(play.trained)
    return PREFERRED if PREFERRED in methods else next(iter(methods))


def method_boxes(play: Playground) -> list:
    """Returns the boxes of the method, the strength and OPTIONS, or the updates of them."""
    import gradio as gr

    methods, method, controls = [*methods_for(play.trained)], first_method(play), option_controls()
    about, style = "More changes more.", {"allow_custom_value": True, "min_width": 320}  # choices are those of the run
    boxes = [gr.Dropdown(methods, value=method, label="method", info=controls["method"].hint, **style)]
    boxes.append(gr.Slider(0.05, 1, value=0.7, step=0.05, label="strength", info=about, min_width=320, buttons=[]))
    return boxes + [component(controls[name]._replace(visible=method in USED_BY[name])) for name in OPTIONS]


def show_options(method: str) -> list:
    """Returns updates of the button that finds the mask and of OPTIONS: those of the method are visible."""
    import gradio as gr

    return [gr.update(visible=method in users) for users in (("diffedit",), *(USED_BY[name] for name in OPTIONS))]


@dataclass(frozen=True)
class Handlers:
    """What the buttons of the tab do, and what another run does to it: updates of components."""

    settings: Settings
    results: Results

    def read(self, canvas: dict | None, *values: Any) -> tuple[Playground, Request, Edit, Tensor, Tensor | None]:
        """Returns what an edit needs of the values: of the editor, of `description_boxes`, of `method_boxes`, and of
        the settings. The mask is None where nothing is brushed."""
        if not has_picture(canvas):
            raise ValueError(f"there is no image: press {SAMPLE}, {ITEM} or {UPLOAD}")
        sides, values = values[: 2 * PER_SIDE], values[2 * PER_SIDE :]
        (method, strength, *options), values = values[: 2 + len(OPTIONS)], values[2 + len(OPTIONS) :]
        play, request = self.settings.read(*values)
        picture, data = canvas["background"], play.trained.data
        image, mask = preprocess(picture, brushed_mask(canvas), data.size, data.n_channels, data.data_range)
        mask = mask if mask.any() else None
        edit = Edit(
            read_description(play, *sides[:PER_SIDE]),
            read_description(play, *sides[PER_SIDE:]),
            read_settings(method, strength, options, mask is not None),
        )
        return play, request, edit, image, mask

    def take_sample(self, *values: Any) -> list:
        with show_errors():
            play, request = self.settings.read(*values)
            image, shows = sample_image(play, request)
            return [enlarge_to_picture(image, SIDE), *description_values(play, shows), request.seed]

    def take_item(self, *values: Any) -> list:
        with show_errors():
            play, request = self.settings.read(*values)
            image, shows = held_out_image(play, request.seed)
            return [enlarge_to_picture(image, SIDE), *description_values(play, shows), request.seed]

    def find_mask(self, canvas: dict | None, *values: Any) -> list:
        with show_errors():
            blank = canvas | {"layers": []} if has_picture(canvas) else None
            play, request, edit, image, _ = self.read(blank, *values)
            mask = find_difference(play, request, edit, image)
            return [with_mask(enlarge_to_picture(image, SIDE), mask), request.seed]

    def edit_image(self, canvas: dict | None, *values: Any) -> list:
        with show_errors():
            play, request, edit, image, mask = self.read(canvas, *values)
            result = edit_image(play, request, edit, image, mask)
            first = [(enlarge_to_picture(image, SIDE), "before")]
            if result.mask is not None:
                first.append((enlarge_to_picture(result.mask[None].to(torch.uint8) * 255, SIDE), "mask"))
            gallery = self.results.show(play, request, result.batch, first, f"_{edit.settings.method}")
            pair = first[0][0], enlarge_to_picture(result.batch["image"][0], SIDE)
            return [*gallery, request.seed, pair, f"{edit.settings.method}: {result.summary}"]

    def pick_run(self, run: str, last_choice: str) -> list:
        """Returns updates of the area, the message, the boxes and the button that finds the mask, and the run."""
        import gradio as gr

        if run == last_choice:
            return [gr.skip()] * (6 + 2 * PER_SIDE + len(OPTIONS))
        play = self.settings.runs.open(run)
        reason, find = reason_against(play), gr.update(visible=first_method(play) == "diffedit")
        areas = [gr.update(visible=not reason), gr.update(value=reason, visible=bool(reason))]
        return [*areas, *description_boxes(play), *method_boxes(play), find, run]


def with_mask(picture: Image.Image, mask: Tensor) -> dict[str, Any]:
    """Returns the content of an editor with a picture, and a mask (H, W) bool in the colour of the brush."""
    background = picture.convert("RGBA")
    alpha = enlarge_to_picture(mask[None].to(torch.uint8) * 255, 1).convert("L")
    layer = Image.new("RGBA", background.size, (*MASK_COLOR, 0))
    layer.putalpha(alpha.resize(background.size, Image.Resampling.NEAREST))
    composite = Image.alpha_composite(background, layer)
    return {"background": background, "layers": [layer], "composite": composite}


def clear_mask(canvas: dict | None) -> Image.Image | None:
    """Returns the picture of an editor alone."""
    return canvas["background"] if has_picture(canvas) else None


def add_edit_tab(settings: Settings, loaded: Any, gallery: Any) -> None:
    """Adds the tab; `loaded` is the event of another run, and `gallery` that of the samples, of which a click opens one
    here."""
    import gradio as gr

    play = settings.runs.current
    reason = reason_against(play)
    with gr.Tab("Edit"):
        message = gr.Markdown(reason, visible=bool(reason))
        with gr.Column(visible=not reason) as area:
            gr.Markdown(HELP)
            with gr.Row():
                sample, item, upload = gr.Button(SAMPLE), gr.Button(ITEM), gr.UploadButton(UPLOAD)
            with gr.Row():
                descriptions = description_boxes(play)
            link_boxes(descriptions)
            with gr.Row():
                methods = method_boxes(play)
            with gr.Row():
                find = gr.Button("Find the mask", visible=first_method(play) == "diffedit")
                clear, button = gr.Button(CLEAR), gr.Button("Edit", variant="primary")
            with gr.Row(visible=False) as pictures:
                editor = add_editor()
                with gr.Column():
                    results = add_results(COLUMNS)
            with results.area:
                cost = gr.Markdown()
                slider = gr.ImageSlider(show_label=False, format="png", interactive=False, buttons=[])
        last_choice = gr.State(settings.run.value)

    def select_sample(images: list, run: str, event: gr.SelectData) -> tuple[str, str | int]:
        path, text = images[event.index]
        return path, dict(settings.runs.open(run).classes).get(text, NO_CLASS)

    def select_result(images: list, event: gr.SelectData) -> tuple[str, str]:
        return images[0][0], images[event.index][0]

    handlers, source = Handlers(settings, results), [editor, *descriptions[:PER_SIDE]]
    filled, quietly = (pictures, editor, has_picture), {"show_progress": "hidden", "api_visibility": "private"}
    for each, take in ((sample, handlers.take_sample), (item, handlers.take_item)):
        fill_on([each.click], take, settings.inputs, [*source, settings.seed], *filled, show_progress_on=editor)
    fill_on([upload.upload], open_upload, upload, [editor], *filled, show_progress_on=editor)
    gallery.select(lambda: gr.Row(visible=True), None, pictures, **quietly)
    gallery.select(select_sample, [gallery, settings.run], source[:2], **quietly)
    inputs = [editor, *descriptions, *methods, *settings.inputs]
    find.click(handlers.find_mask, inputs, [editor, settings.seed], show_progress_on=editor)
    clear.click(clear_mask, editor, editor, **quietly)
    results.fill_on(button, handlers.edit_image, inputs, settings.seed, slider, cost)
    results.gallery.select(select_result, results.gallery, slider, **quietly)
    methods[0].input(show_options, methods[0], [find, *methods[2:]], **quietly)
    outputs = [area, message, *descriptions, *methods, find, last_choice]
    loaded.success(handlers.pick_run, [settings.run, last_choice], outputs, **quietly)
