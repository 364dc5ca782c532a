"""The logic of the demo page: sampling, also step by step, inpainting and editing with the samplers of a folder.

It maps settings to images and knows nothing of the browser; demo.py builds the page.
"""

import queue
import re
import string
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from diffusion.solvers import Solver, get_solver, solvers_for
from experiments.harness.controls import Control, make_controls, parse_value
from experiments.harness.editing import expand_mask
from experiments.harness.layout_edits import (
    FIELDS,
    EditedLayout,
    Layout,
    LayoutNames,
    changed_pixels,
    layout_fields,
    read_layout,
    read_layout_names,
)
from models.conditioning import Conditioner
from models.conditions.image import MASK
from models.conditions.metadata import UNKNOWN
from train.checkpoint import resolve_step, saved_steps
from train.condition_source import ConditionSource
from train.config import SamplingConfig
from train.data.hints import NOT_OF_PICTURES
from train.data.transforms import ValueRange, as_uint8, range_for_image, to_item, to_picture
from train.datasets._channels import PICTURES
from train.datasets._decode import to_supported_mode
from train.hint_files import make_hint
from train.loop import Batch
from train.samplers._guidance import IMAGES
from train.samplers._metadata import MetadataFields
from train.spaces import EditInput
from train.trained_sampler import TrainedSampler

DECISIVE = ("solver", "spacing")  # choices on which it depends which other settings there are
AS_IN_DATA, NO_CLASS = "random (data frequencies)", "none (unconditional)"
CAPTION = "caption"  # the field of a batch that prompts fill
GREY = 128
MOST_WATCHED = 100  # steps of sampling that are kept to look at them again
MOST_NAMED, MOST_NEAREST = 20, 5  # choices that a message names, and nearest ones if there are more


def escape_markdown(text: str) -> str:
    """Returns Markdown that shows the text as it is: a folder's name may contain anything."""
    return "".join(f"\\{each}" if each in string.punctuation else each for each in text)


class DenoisingStep(NamedTuple):
    """One step of sampling, as uint8 images (B, C, H, W)."""

    step: int  # from 1
    t: float  # time after the step; 0 is data
    current: Tensor  # x after the step, masked codes in grey
    predicted: Tensor  # the network's prediction of x0


class WatchedSteps:
    """Evenly spaced steps of sampling, at most MOST_WATCHED, and the last one."""

    def __init__(self):
        self.steps: list[DenoisingStep] = []
        self.stride = 1

    def add(self, moment: DenoisingStep) -> None:
        """Adds the next step; drops every second one when there are too many."""
        self.steps = [each for each in self.steps if (each.step - 1) % self.stride == 0]
        if len(self.steps) == MOST_WATCHED:
            self.steps, self.stride = self.steps[::2], 2 * self.stride
        self.steps.append(moment)

    def nearest(self, number: float) -> DenoisingStep:
        """Returns the kept step whose number is nearest."""
        return min(self.steps, key=lambda each: abs(each.step - number))


class InpaintingResult(NamedTuple):
    """Inpainted images and their input."""

    masked_input: Tensor  # uint8 (C, H, W): the input, grey where it is inpainted
    results: Batch  # as `Playground.sample` returns them


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request of the page for images."""

    options: SamplingConfig
    label: str | int = AS_IN_DATA  # a number or a text of `Playground.classes`
    count: int = 1  # number of images
    seed: int = 0  # image i of a seed is always the same
    layout: Layout | None = None  # None: that of the data
    prompt: str = ""  # what all images show; "": captions of the data
    negative: str = ""  # what guidance moves away from; "": the null
    metadata: Mapping[str, str | float] = field(default_factory=dict)  # by field; others are of the data
    hints: Mapping[str, Tensor] = field(default_factory=dict)  # of control branches, by field; others are of the data

    def __post_init__(self):
        if self.count < 1 or self.seed < 0:
            raise ValueError(
                f"got {self.count} images, seed {self.seed}: wanted at least 1 image and a seed of 0 or more"
            )


class Cancelled(Exception):
    """Raised in a worker whose results are no longer read."""


@dataclass(frozen=True)
class Playground:
    """A trained sampler behind the demo page."""

    trained: TrainedSampler
    options: SamplingConfig  # initial settings of the page
    source: ConditionSource  # of all conditions, except a class chosen on the page

    @property
    def classes(self) -> list[tuple[str, str | int]]:
        """The choices of the class control, (text, label); empty for a model without classes."""
        count = self.trained.sampler.n_classes
        names = self.trained.class_names or map(str, range(count))
        return [(AS_IN_DATA, AS_IN_DATA), (NO_CLASS, NO_CLASS), *zip(names, range(count), strict=True)] if count else []

    @cached_property
    def layout_names(self) -> LayoutNames | None:
        """The names of the classes and colours of boxes; None if the model reads no boxes, or masks or words too."""
        sampler = self.trained.sampler
        more = "masks" in sampler.conditions or "box_words" in sampler.optional_conditions
        if FIELDS[0] not in sampler.conditions or more:
            return None
        return read_layout_names(self.trained.sampler.network, self.trained.dataset("val"), str(self.trained.run))

    @property
    def reads_prompts(self) -> bool:
        """Whether the model reads captions."""
        return CAPTION in self.trained.sampler.conditions

    @property
    def metadata_fields(self) -> MetadataFields:
        """The words and the numbers that the model is conditioned on."""
        return MetadataFields.of(self.trained.sampler.network)

    @property
    def initial_metadata(self) -> dict[str, str]:
        """The value of each field of metadata that the page begins with: that of the options, or else unknown."""
        given = dict(word.partition("=")[::2] for word in self.options.metadata)
        return dict.fromkeys(self.metadata_fields.unknown, UNKNOWN) | given

    @property
    def hint_fields(self) -> list[str]:
        """The batch fields of the hints of control branches."""
        return [*self.trained.channels_of_hints]

    @property
    def takes_ready_hints(self) -> bool:
        """Whether no hint can be made of a picture, so that pictures must be hints already."""
        makers = self.trained.hint_makers.values()
        return all(maker is None or maker.kind in NOT_OF_PICTURES for maker in makers)

    def make_hint(self, name: str, picture: Image.Image, ready: bool) -> Tensor:
        """Makes the hint of a field, uint8 (C, H, W), of a picture, or takes the picture for it if it is `ready`."""
        trained = self.trained
        return make_hint(picture, trained.hint_makers[name], trained.channels_of_hints[name], trained.data, ready)

    @property
    def controls(self) -> list[Control]:
        """The controls of the model's settings, with the solvers of its process."""
        sampler = self.trained.sampler
        conditioners = [each for each in sampler.network.modules() if isinstance(each, Conditioner)]
        regions = any(each.region_encoders for each in conditioners)
        images = any(name in each for each in conditioners for name in IMAGES)
        solvers = sorted(solvers_for(sampler.process))
        hints = any(each.hints for each in conditioners)
        return make_controls(self.options, solvers, bool(sampler.conditions), regions, images, hints)

    def controls_of(self, **choices: Any) -> list[Control]:
        """The controls beside these choices, such as of a solver: settings without effect are not visible, steps that
        are not free not editable."""
        options, process = replace(self.options, **choices), self.trained.sampler.process
        entry = get_solver(process, options.solver)
        hidden = {*options.option_names()} - {*entry.option_names} | options.names_without_effect(process)
        controls = [each._replace(visible=each.name not in hidden) for each in self.controls]
        steps = {"placeholder": str(self.default_steps(entry)), "editable": entry.takes_any_steps}
        steps |= {} if entry.takes_any_steps else {"value": None}
        return [each._replace(**steps) if each.name == "sample_steps" else each for each in controls]

    def default_steps(self, solver: Solver) -> int:
        """Returns the steps of a solver that are left out; one per code if neither it nor the process has a number."""
        codes = self.trained.space.tokens
        return solver.steps(self.trained.sampler.process, codes) or codes

    def settings(self, values: dict[str, Any]) -> SamplingConfig:
        """Returns the options with the values of controls, by name; ValueError if one is not valid.

        Settings without effect are left out, and steps that are empty or not free are those of the solver.
        """
        entry = get_solver(self.trained.sampler.process, values.get("solver", self.options.solver))
        choices = {name: value for name, value in values.items() if name in DECISIVE}
        controls = {each.name: each for each in self.controls_of(**choices)}
        options = {name: None for name, control in controls.items() if not control.visible}
        options |= {name: parse_value(controls[name], value) for name, value in values.items() if name not in options}
        if options.get("sample_steps", self.options.sample_steps) is None or not entry.takes_any_steps:
            options["sample_steps"] = self.default_steps(entry)
        return replace(self.options, **options)

    def conditions(self, request: Request) -> Batch | None:
        """Returns the conditions of the requested images; None if unconditional."""
        source, classes = self.source, dict(self.classes)
        if request.layout is not None:
            source = source.with_values(**layout_fields(request.layout, bool(self.layout_names.colors)))
        if request.prompt:
            source = source.with_values(**{CAPTION: request.prompt})
        if request.metadata:
            words = [f"{name}={value}" for name, value in request.metadata.items()]
            source = source.with_values(**self.metadata_fields.parse(words))
        if request.hints:
            source = source.with_values(**request.hints)
        label = classes.get(request.label, request.label)
        if label == AS_IN_DATA:
            return source.draw(request.seed, range(request.count))
        if label not in classes.values():
            raise ValueError(f"got class {label!r}, wanted {describe_choices(str(label), classes)}")
        if label == NO_CLASS and {*source.fields} == {"label"}:
            return None
        return source.with_values(label=None if label == NO_CLASS else label).draw(request.seed, range(request.count))

    def sample(self, request: Request, **kwargs) -> Batch:
        """Samples the requested images, as `TrainedSampler.draw` returns them; `kwargs` go there. Without any
        condition, guidance is 1. ValueError for a negative prompt without guidance."""
        if request.negative:
            if request.options.guidance == 1:
                raise ValueError("got a negative prompt with --guidance 1, which ignores it: enter 3, or so")
            kwargs["negative"] = {CAPTION: [request.negative] * request.count}
        conditions, indices = self.conditions(request), list(range(request.count))
        unconditional = conditions is None and request.label == NO_CLASS
        options = request.options.without_guidance() if unconditional else request.options
        return self.trained.draw(indices, request.seed, options, conditions, **kwargs)

    def draw(self, request: Request, **kwargs) -> Tensor:
        """Samples the requested images, uint8 (B, C, H, W)."""
        return self.sample(request, **kwargs)["image"]

    def captions(self, batch: Batch) -> list[str | None]:
        """Returns the class of each image of `sample`; None for an image without one."""
        texts = {label: text for text, label in self.classes}
        labels = batch["label"].tolist() if "label" in batch else [None] * len(batch["image"])
        return [texts.get(label) for label in labels]

    def watch(self, request: Request) -> Iterator[DenoisingStep]:
        """Yields every step of sampling the same images as it happens; closing the iterator stops the work."""

        def work(put: Callable[[DenoisingStep], None]) -> None:
            def on_step(i: int, t: float, s: float, x: Tensor, predicted: Tensor) -> Tensor:
                current, prediction = self.trained.space.preview(x, predicted)
                put(DenoisingStep(i + 1, s, current.cpu(), prediction.cpu()))
                return x

            self.draw(request, on_step=on_step)

        return stream(work)

    def inpaint(self, request: Request, picture: Image.Image, mask: Image.Image) -> InpaintingResult:
        """Inpaints the masked region of a picture (`mask`: an L image of the same size, 255 where to inpaint).

        The picture is converted to the model's size and channels. Random classes mean none here, without guidance: the
        visible part determines the content. ValueError: nothing is masked.
        """
        data = self.trained.data
        if data.n_channels not in PICTURES:
            raise ValueError(f"a model of {data.n_channels} channels takes no pictures: use experiments/inpaint.py")
        if MASK in self.trained.sampler.conditions:
            raise ValueError("this model reads masks: use experiments/inpaint.py --image FILE --mask FILE")
        image, pixel_mask = preprocess(picture, mask, data.size, data.n_channels, data.data_range)
        if not pixel_mask.any():
            raise ValueError("nothing is masked: brush over the region to inpaint")
        if request.label == AS_IN_DATA and self.classes:
            request = replace(request, label=NO_CLASS, negative="", options=replace(request.options, guidance=1.0))
        start = self.encode_masked(image, pixel_mask, request.count)
        masked = torch.where(expand_mask(~start.keep[0].cpu(), pixel_mask.shape), GREY, image)
        return InpaintingResult(masked, self.sample(request, edit=start))

    def encode_masked(self, image: Tensor, mask: Tensor, count: int) -> EditInput:
        """Encodes an image uint8 (C, H, W) `count` times, to sample what its mask (H, W) covers."""
        device = self.trained.device
        start = self.trained.space.encode_masked(image[None].to(device), mask[None].to(device))
        return EditInput(*(each.expand(count, *each.shape[1:]) for each in (start.x0, start.keep)))

    def draw_layout(self, seed: int) -> Layout:
        """Returns the layout of a held-out item, or that of a row of the --condition_file."""
        batch = self.source.draw(seed, [seed])
        present = {
            name: batch.get(f"{name}_mask", torch.ones(batch[name].shape[:2], dtype=torch.bool))
            for name in FIELDS
            if name in batch
        }
        return read_layout({name: batch[name][mask] for name, mask in present.items()})

    def edit_layout(self, request: Request, image: Tensor, layout: EditedLayout) -> Batch:
        """Samples the boxes that change in an image uint8 (C, H, W) anew, under the layout after the edits.

        The pixels outside these boxes, as they were and as they are, are those of the image. A random class means none
        here: the rest of the image determines it. ValueError: nothing changes.
        """
        if not layout.changed_boxes:
            raise ValueError("no box has changed: move, add, remove or relabel one")
        if request.label == AS_IN_DATA and self.classes:
            request = replace(request, label=NO_CLASS)
        mask = changed_pixels(layout.changed_boxes, self.trained.data.size, self.trained.space.factor)
        start = self.encode_masked(image, mask, request.count)
        batch = self.sample(replace(request, layout=layout.after), edit=start)
        return batch | {"image": torch.where(mask, batch["image"], image)}


class Runs:
    """The runs of samplers that the page can choose from.

    The one used last stays in memory; one before it, until the next is loaded and what is being drawn from it is done.
    """

    def __init__(self, logs_root: Path, load: Callable[[Path, int | None], Playground], first: Playground):
        self.root, self.load, self.lock = str(logs_root), load, threading.Lock()
        self.first, self.current = first.trained.run, first
        self.listed = self.folders

    @property
    def folders(self) -> dict[str, Path]:
        """The runs that have a checkpoint, by name: those in the logs folder, and the one that the page opened with."""
        configs = [path for path in Path(self.root).glob("*/config.yaml") if saved_steps(path.parent)]
        samplers = [path for path in configs if re.search("^sampler:", path.read_text(errors="replace"), re.MULTILINE)]
        folders = {path.parent.name: path.parent.resolve() for path in sorted(samplers)}
        return folders if self.first in folders.values() else {str(self.first): self.first} | folders

    def name(self, run: Path) -> str:
        """Returns the name of a run in `folders`."""
        return next(name for name, folder in self.folders.items() if folder == run)

    def folder(self, name: str) -> Path:
        """Returns the folder of a run; ValueError if it is not in `folders`."""
        if name not in self.listed:
            self.listed = self.folders
        if name not in self.listed:
            raise ValueError(f"got run {name!r}, wanted {describe_choices(name, self.listed)}")
        return self.listed[name]

    def steps(self, name: str) -> list[int]:
        """Returns the steps of a run's checkpoints, the newest first."""
        return saved_steps(self.folder(name))[::-1]

    def open(self, name: str, step: int | str | None = None) -> Playground:
        """Returns the sampler of a run at a step, the newest if None; loads it unless it was used last."""
        with self.lock:
            folder, current = self.folder(name), self.current.trained
            step = str(resolve_step(folder, None, "step") if step is None else step)
            if (folder, step) != (current.run, str(current.step)):
                steps = {str(each): each for each in self.steps(name)}
                if step not in steps:
                    raise ValueError(f"got step {step} of {name}, wanted {describe_choices(step, steps)}")
                self.current = self.load(folder, steps[step])
            return self.current


def describe_choices(got: str, choices: Collection[str]) -> str:
    """Returns in words which choices there are: all, or of many the number and the nearest."""
    if len(choices) <= MOST_NAMED:
        return f"one of: {', '.join(choices)}"
    nearest = get_close_matches(got, choices, MOST_NEAREST, cutoff=0)
    return f"one of {len(choices)}, such as: {', '.join(nearest)}"


def stream(work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """Runs `work(put)` in a thread and yields the items it puts; exceptions of `work` are raised here.

    After the iterator is closed, the next `put` stops the work.
    """
    items, closed, end = queue.SimpleQueue(), threading.Event(), object()

    def put(item: Any) -> None:
        if closed.is_set():
            raise Cancelled
        items.put(item)

    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(work, put)
        future.add_done_callback(lambda _: items.put(end))
        try:
            while (item := items.get()) is not end:
                yield item
            future.result()
        finally:
            closed.set()


def preprocess(
    picture: Image.Image,
    mask: Image.Image,
    size: tuple[int, int],
    n_channels: int,
    data_range: ValueRange | None = None,
) -> tuple[Tensor, Tensor]:
    """Resizes a picture and its mask to cover `size` and crops both at the centre: uint8 (C, H, W) and bool (H, W).

    A pixel is masked if at least half of it is.
    """
    if picture.size != mask.size:
        raise ValueError(f"got a picture of {picture.size} and a mask of {mask.size} pixels: wanted the same size")
    picture = to_supported_mode(picture)
    if picture.width * size[0] == picture.height * size[1]:  # undo an integer enlargement exactly
        small = picture.resize(size[::-1], Image.Resampling.NEAREST)
        same = small.resize(picture.size, Image.Resampling.NEAREST).tobytes() == picture.tobytes()
        picture = small if same else picture
    item = to_item({"image": picture}, size, n_channels, range_for_image(picture, data_range))
    image = as_uint8(item["image"].as_subclass(Tensor))
    return image, to_item({"image": mask}, size, 1)["image"][0].as_subclass(Tensor) >= GREY


def enlarge_to_picture(image: Tensor, side: int = 256) -> Image.Image:
    """Converts a uint8 image (C, H, W) to a picture, enlarged by the largest integer that keeps it within `side`
    pixels."""
    scale = max(1, side // max(image.shape[1:]))
    image = to_picture(image.repeat_interleave(scale, 1).repeat_interleave(scale, 2))
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
