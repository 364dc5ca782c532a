"""What a page can ask of a trained sampler: images, their way from noise, and parts of an image drawn anew.

From settings to images, without a browser; demo.py lays out the page.
"""

import ast
import inspect
import queue
import re
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

from diffusion.solvers import solvers_of
from train.condition_source import ConditionSource
from train.config import SamplingConfig
from train.data.transforms import ValueRange, as_uint8, range_for_image, to_item
from train.datasets._decode import to_supported_mode
from train.loop import Batch
from train.spaces import EditInput
from train.trained_sampler import TrainedSampler

LABELS = {  # where a flag's name is not the field's word
    "sample_steps": "steps",
    "temp": "temperature",
    "last_temp": "last temperature",
    "choice_temp": "choice temperature",
    "guidance": "guidance scale",
    "top_k": "top-k",
    "top_p": "top-p",
}
CONTROL_KINDS = {int: "whole", float: "number", bool: "switch"}
AS_IN_DATA, NO_CLASS = "as in the data", "none"
GREY = 128


class Control(NamedTuple):
    """One setting of a sampler's Sampling as a page shows it."""

    name: str
    label: str
    help: str  # the help of its flag
    kind: Literal["choice", "switch", "whole", "number", "numbers"]  # numbers: several, typed with spaces between
    value: Any  # that it begins with
    choices: tuple[str, ...] = ()
    optional: bool = False  # may be empty, for None
    count: int = 1  # of numbers


def make_controls(options: SamplingConfig, solvers: list[str], conditional: bool) -> list[Control]:
    """One for each field whose type has one, but for the file of conditions; guidance only for a conditional model."""
    kinds, helps, found = typing.get_type_hints(type(options)), field_docs(type(options)), []
    for field in fields(options):
        name, value, (kind, optional) = field.name, getattr(options, field.name), split_optional(kinds[field.name])
        own = {"name": name, "label": label_of(name), "help": helps.get(name, "")}
        own |= {"value": value, "optional": optional}
        if name == "condition_file" or (name.startswith("guidance") and not conditional):
            continue  # a file is read once, when the page opens
        if name == "solver":
            found.append(Control(**own, kind="choice", choices=tuple(solvers)))
        elif typing.get_origin(kind) is Literal:
            found.append(Control(**own, kind="choice", choices=typing.get_args(kind)))
        elif typing.get_origin(kind) is tuple:
            own["value"] = None if value is None else " ".join(f"{each:g}" for each in value)
            found.append(Control(**own, kind="numbers", count=len(typing.get_args(kind))))
        elif kind in CONTROL_KINDS:
            found.append(Control(**own, kind=CONTROL_KINDS[kind]))
    return found


def split_optional(kind: Any) -> tuple[Any, bool]:
    """A type, and whether None is allowed beside it."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return kind, False
    rest = [each for each in typing.get_args(kind) if each is not types.NoneType]
    return rest[0], len(rest) < len(typing.get_args(kind))


def field_docs(cls: type) -> dict[str, str]:
    """The strings below the fields of a dataclass and of those it builds on, by field: the help of its flags."""
    found = {}
    for each in reversed(cls.__mro__):
        if not hasattr(each, "__dataclass_fields__"):
            continue
        body = ast.parse(inspect.getsource(each)).body[0].body
        for line, below in zip(body, body[1:], strict=False):
            if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
                found[line.target.id] = ast.literal_eval(below.value)
    return found


def parse_value(control: Control, value: Any) -> Any:
    """What stands in a control, as its field has it."""
    if value is None or value == "":
        if not control.optional:
            raise ValueError(f"{control.label} is empty: give a value")
        return None
    if control.kind == "whole" and int(value) != value:
        raise ValueError(f"got {value} for {control.label}, wanted a whole number")
    if control.kind == "numbers":
        try:
            numbers = tuple(float(word) for word in value.split())
        except ValueError:
            numbers = ()
        if len(numbers) != control.count:
            raise ValueError(f"got {value!r} for {control.label}, wanted {control.count} numbers with a space between")
        return numbers
    return {"whole": int, "number": float}.get(control.kind, lambda it: it)(value)


def flags_to_labels(message: str) -> str:
    """An error's text whose flags are the labels of a page: `pass --temp T` is `pass temperature T`."""
    return re.sub(r"--(\w+)", lambda flag: label_of(flag[1]), message)


def label_of(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


class DenoisingStep(NamedTuple):
    """Images on their way: uint8 (B, C, H, W)."""

    step: int  # that was just made, from 1
    t: float  # where it ended, as the process has it; 0 is data
    current: Tensor  # what the solver has: masked codes are grey
    predicted: Tensor  # what the network predicts of it


class InpaintingResult(NamedTuple):
    """uint8 images."""

    hidden: Tensor  # (C, H, W), grey where it is drawn anew
    results: Tensor  # (B, C, H, W)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw, and how."""

    options: SamplingConfig
    label: str = AS_IN_DATA  # one of `Playground.classes`
    count: int = 1  # images
    seed: int = 0  # image i of a seed is always the same

    def __post_init__(self):
        if self.count < 1 or self.seed < 0:
            raise ValueError(f"got {self.count} images of seed {self.seed}, wanted at least 1, of a seed of 0 or more")


class Cancelled(Exception):
    """Nobody reads on."""


@dataclass(frozen=True)
class Playground:
    """A trained sampler with the settings that its page begins with."""

    trained: TrainedSampler
    options: SamplingConfig
    source: ConditionSource  # of conditions, but for the class that is asked for

    @property
    def classes(self) -> list[str]:
        """Empty for a model without classes."""
        count = self.trained.sampler.n_classes
        return [AS_IN_DATA, NO_CLASS, *map(str, range(count))] if count else []

    @property
    def controls(self) -> list[Control]:
        """The settings that the model has: guidance only with conditions, and its own process's solvers."""
        solvers = sorted(solvers_of(self.trained.sampler.process))
        return make_controls(self.options, solvers, conditional=bool(self.trained.sampler.conditions))

    def settings(self, values: dict[str, Any]) -> SamplingConfig:
        """The options with what stands in the controls of these names; ValueError for what is no value of theirs."""
        known = {each.name: each for each in self.controls}
        return replace(self.options, **{name: parse_value(known[name], value) for name, value in values.items()})

    def conditions(self, request: Request) -> Batch | None:
        """The conditions of its images, None for none."""
        source = self.source
        if request.label == AS_IN_DATA:
            return source.draw(request.seed, range(request.count))
        if request.label not in self.classes:
            raise ValueError(
                f"got class {request.label!r}, wanted one of: {', '.join(self.classes) or 'none there is'}"
            )
        if request.label == NO_CLASS and {*source.fields} == {"label"}:
            return None
        label = None if request.label == NO_CLASS else int(request.label)
        return source.with_values(label=label).draw(request.seed, range(request.count))

    def draw(self, request: Request, **how) -> Tensor:
        """uint8 (B, C, H, W); `how` as `TrainedSampler.draw` has it. Without any condition, guidance is 1."""
        conditions, indices = self.conditions(request), list(range(request.count))
        unconditional = conditions is None and request.label == NO_CLASS
        options = replace(request.options, guidance=1.0) if unconditional else request.options
        return self.trained.draw(indices, request.seed, options, conditions, **how)["image"]

    def watch(self, request: Request) -> Iterator[DenoisingStep]:
        """Every step of the same images, as it is made; closing the iterator ends the work."""

        def work(put: Callable[[DenoisingStep], None]) -> None:
            def on_step(i: int, t: float, s: float, x: Tensor, predicted: Tensor) -> Tensor:
                now, prediction = self.trained.space.shown(x, predicted)
                put(DenoisingStep(i + 1, s, now.cpu(), prediction.cpu()))
                return x

            self.draw(request, on_step=on_step)

        return stream(work)

    def inpaint(self, request: Request, picture: Image.Image, mask: Image.Image) -> InpaintingResult:
        """Several fillings of what is brushed over (255 in an L image of the picture's size; 0 is kept).

        The picture is brought to the size and channels that the model knows. Classes `as in the data` are none here,
        unguided: what is kept says what it is. ValueError where nothing is brushed.
        """
        data = self.trained.data
        image, hidden = preprocess(picture, mask, data.size, data.n_channels, data.data_range)
        if not hidden.any():
            raise ValueError("nothing is hidden: paint with the brush over what shall be drawn anew")
        if request.label == AS_IN_DATA and self.classes:
            request = replace(request, label=NO_CLASS, options=replace(request.options, guidance=1.0))
        device = self.trained.device
        begun = self.trained.space.begun(image[None].to(device), hidden[None].to(device))
        several = [each.expand(request.count, *each.shape[1:]) for each in (begun.x0, begun.keep)]
        shown = torch.where(expand_mask(~begun.keep[0].cpu(), hidden.shape), GREY, image)
        return InpaintingResult(shown, self.draw(request, edit=EditInput(*several)))


def stream(work: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """What `work(put)` puts, while it goes on in a thread of its own; what it raises, is raised here.

    Once the iterator is closed, the next `put` ends the work.
    """
    handed, closed, end = queue.SimpleQueue(), threading.Event(), object()

    def put(item: Any) -> None:
        if closed.is_set():
            raise Cancelled
        handed.put(item)

    with ThreadPoolExecutor(max_workers=1) as pool:
        working = pool.submit(work, put)
        working.add_done_callback(lambda _: handed.put(end))
        try:
            while (item := handed.get()) is not end:
                yield item
            working.result()
        finally:
            closed.set()


def preprocess(
    picture: Image.Image,
    mask: Image.Image,
    size: tuple[int, int],
    n_channels: int,
    data_range: ValueRange | None = None,
) -> tuple[Tensor, Tensor]:
    """uint8 (C, H, W) and bool (H, W): both resized to cover `size` and cut at the centre alike.

    A pixel is hidden where at least half of it is brushed over.
    """
    if picture.size != mask.size:
        raise ValueError(f"got a picture of {picture.size} and a mask of {mask.size} pixels: wanted the same size")
    picture = to_supported_mode(picture)
    if picture.width * size[0] == picture.height * size[1]:  # an image that was enlarged comes back as it was
        small = picture.resize(size[::-1], Image.Resampling.NEAREST)
        same = small.resize(picture.size, Image.Resampling.NEAREST).tobytes() == picture.tobytes()
        picture = small if same else picture
    item = to_item({"image": picture}, size, n_channels, range_for_image(picture, data_range))
    image = as_uint8(item["image"].as_subclass(Tensor))
    return image, to_item({"image": mask}, size, 1)["image"][0].as_subclass(Tensor) >= GREY


def expand_mask(places: Tensor, size: tuple[int, int]) -> Tensor:
    """Places (h, w) as pixels (H, W)."""
    (h, w), (H, W) = places.shape, size
    return places.repeat_interleave(H // h, 0).repeat_interleave(W // w, 1)


def enlarge_to_picture(image: Tensor, side: int = 256) -> Image.Image:
    """An image (C, H, W) uint8, enlarged whole-numbered as far as its longer side stays within `side` pixels."""
    scale = max(1, side // max(image.shape[1:]))
    image = image.expand(3, -1, -1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
