"""The logic of the demo page: sampling, step-by-step sampling and inpainting with a trained sampler.

It maps settings to images and knows nothing of the browser; demo.py builds the page.
"""

import queue
import re
import string
import threading
import types
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from diffusion.solvers import solvers_for
from train.cli.help import field_docs
from train.condition_source import ConditionSource
from train.config import SamplingConfig
from train.data.transforms import ValueRange, as_uint8, range_for_image, to_item, to_picture
from train.datasets._channels import PICTURES
from train.datasets._decode import to_supported_mode
from train.loop import Batch
from train.spaces import EditInput
from train.trained_sampler import TrainedSampler

LABELS = {  # of flags whose names are not the usual terms
    "sample_steps": "steps",
    "temp": "temperature",
    "last_temp": "last temperature",
    "choice_temp": "choice temperature",
    "guidance": "guidance scale",
    "top_k": "top-k",
    "top_p": "top-p",
}
CONTROL_KINDS = {int: "integer", float: "number", bool: "switch"}
AS_IN_DATA, NO_CLASS = "random (data frequencies)", "none (unconditional)"
GREY = 128


class Control(NamedTuple):
    """A control of the page for one sampling setting."""

    name: str
    label: str
    help: str  # help text of the flag
    kind: Literal["choice", "switch", "integer", "number", "numbers"]  # numbers: several, separated by spaces
    value: Any  # initial value
    choices: tuple[str, ...] = ()
    optional: bool = False  # may be empty, meaning None
    count: int = 1  # how many numbers


def make_controls(options: SamplingConfig, solvers: list[str], conditional: bool) -> list[Control]:
    """Returns a control for each setting with a supported type, except the source of the conditions; guidance only for
    conditional models."""
    kinds, helps, controls = typing.get_type_hints(type(options)), field_docs(type(options)), []
    for field in fields(options):
        name, value, (kind, optional) = field.name, getattr(options, field.name), split_optional(kinds[field.name])
        own = {"name": name, "label": label_of(name), "help": helps.get(name, "")}
        own |= {"value": value, "optional": optional}
        if name in ("condition_file", "class_sampling") or (name.startswith("guidance") and not conditional):
            continue  # the source of conditions is opened once, with the page
        if name == "solver":
            controls.append(Control(**own, kind="choice", choices=tuple(solvers)))
        elif typing.get_origin(kind) is Literal:
            controls.append(Control(**own, kind="choice", choices=typing.get_args(kind)))
        elif typing.get_origin(kind) is tuple:
            own["value"] = None if value is None else " ".join(f"{each:g}" for each in value)
            controls.append(Control(**own, kind="numbers", count=len(typing.get_args(kind))))
        elif kind in CONTROL_KINDS:
            controls.append(Control(**own, kind=CONTROL_KINDS[kind]))
    return controls


def split_optional(kind: Any) -> tuple[Any, bool]:
    """Splits an optional type into the type and whether it may be None."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    rest = [each for each in typing.get_args(kind) if each is not types.NoneType]
    return rest[0], len(rest) < len(typing.get_args(kind))


def parse_value(control: Control, value: Any) -> Any:
    """Converts the content of a control to a value of its field; ValueError if it is not valid."""
    if value is None or value == "":
        if not control.optional:
            raise ValueError(f"{control.label} is empty: enter a value")
        return None
    if control.kind == "integer" and int(value) != value:
        raise ValueError(f"got {value} for {control.label}, wanted an integer")
    if control.kind == "numbers":
        try:
            numbers = tuple(float(word) for word in value.split())
        except ValueError:
            numbers = ()
        if len(numbers) != control.count:
            raise ValueError(f"got {value!r} for {control.label}, wanted {control.count} numbers separated by spaces")
        return numbers
    return {"integer": int, "number": float}.get(control.kind, lambda v: v)(value)


def flags_to_labels(message: str) -> str:
    """Replaces flags in an error message by labels of the page: `pass --temp T` becomes `pass temperature T`."""
    return re.sub(r"--(\w+)", lambda flag: label_of(flag[1]), message)


def label_of(name: str) -> str:
    """Returns the label of a setting on the page."""
    return LABELS.get(name, name.replace("_", " "))


def escape_markdown(text: str) -> str:
    """Returns Markdown that shows the text as it is: a folder's name may contain anything."""
    return "".join(f"\\{each}" if each in string.punctuation else each for each in text)


class DenoisingStep(NamedTuple):
    """One step of sampling, as uint8 images (B, C, H, W)."""

    step: int  # from 1
    t: float  # time after the step; 0 is data
    current: Tensor  # x after the step, masked codes in grey
    predicted: Tensor  # the network's prediction of x0


class InpaintingResult(NamedTuple):
    """Inpainted images and their input."""

    masked_input: Tensor  # uint8 (C, H, W): the input, grey where it is inpainted
    results: Tensor  # uint8 (B, C, H, W)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request of the page for images."""

    options: SamplingConfig
    label: str = AS_IN_DATA  # one of `Playground.classes`
    count: int = 1  # number of images
    seed: int = 0  # image i of a seed is always the same

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
    def classes(self) -> list[str]:
        """The choices of the class control; empty for a model without classes."""
        count = self.trained.sampler.n_classes
        return [AS_IN_DATA, NO_CLASS, *map(str, range(count))] if count else []

    @property
    def controls(self) -> list[Control]:
        """The controls of the model's settings, with the solvers of its process."""
        solvers = sorted(solvers_for(self.trained.sampler.process))
        return make_controls(self.options, solvers, conditional=bool(self.trained.sampler.conditions))

    def settings(self, values: dict[str, Any]) -> SamplingConfig:
        """Returns the options with the values of controls, by name; ValueError if one is not valid."""
        controls = {each.name: each for each in self.controls}
        return replace(self.options, **{name: parse_value(controls[name], value) for name, value in values.items()})

    def conditions(self, request: Request) -> Batch | None:
        """Returns the conditions of the requested images; None if unconditional."""
        source = self.source
        if request.label == AS_IN_DATA:
            return source.draw(request.seed, range(request.count))
        if request.label not in self.classes:
            raise ValueError(
                f"got class {request.label!r}, wanted one of: {', '.join(self.classes) or '(the model has no classes)'}"
            )
        if request.label == NO_CLASS and {*source.fields} == {"label"}:
            return None
        label = None if request.label == NO_CLASS else int(request.label)
        return source.with_values(label=label).draw(request.seed, range(request.count))

    def draw(self, request: Request, **kwargs) -> Tensor:
        """Samples the requested images, uint8 (B, C, H, W); `kwargs` go to `TrainedSampler.draw`. Without any
        condition, guidance is 1."""
        conditions, indices = self.conditions(request), list(range(request.count))
        unconditional = conditions is None and request.label == NO_CLASS
        options = replace(request.options, guidance=1.0) if unconditional else request.options
        return self.trained.draw(indices, request.seed, options, conditions, **kwargs)["image"]

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
        image, pixel_mask = preprocess(picture, mask, data.size, data.n_channels, data.data_range)
        if not pixel_mask.any():
            raise ValueError("nothing is masked: brush over the region to inpaint")
        if request.label == AS_IN_DATA and self.classes:
            request = replace(request, label=NO_CLASS, options=replace(request.options, guidance=1.0))
        device = self.trained.device
        start = self.trained.space.encode_masked(image[None].to(device), pixel_mask[None].to(device))
        repeated = [each.expand(request.count, *each.shape[1:]) for each in (start.x0, start.keep)]
        masked = torch.where(expand_mask(~start.keep[0].cpu(), pixel_mask.shape), GREY, image)
        return InpaintingResult(masked, self.draw(request, edit=EditInput(*repeated)))


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


def expand_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Expands a mask of grid cells (h, w) to pixels (H, W)."""
    (h, w), (H, W) = mask.shape, size
    return mask.repeat_interleave(H // h, 0).repeat_interleave(W // w, 1)


def enlarge_to_picture(image: Tensor, side: int = 256) -> Image.Image:
    """Converts a uint8 image (C, H, W) to a picture, enlarged by the largest integer that keeps it within `side`
    pixels."""
    scale = max(1, side // max(image.shape[1:]))
    image = to_picture(image.repeat_interleave(scale, 1).repeat_interleave(scale, 2))
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
