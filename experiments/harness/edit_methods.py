"""The methods of experiments/edit.py: each edits a batch of images, from their own conditions to those of a target."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion.editing import MaskRule, code_differences, diffedit, flowedit, mask_of_differences, noise_differences
from diffusion.inversion import ddim_inversion, ddpm_noise_maps, replay
from diffusion.process import ContinuousProcess
from diffusion.rng import Streams, seed_of
from diffusion.types import Denoiser
from experiments.harness.editing import (
    InputImages,
    StrengthMaps,
    conditions_for,
    draw,
    encode_images,
    expand_mask,
    redraw_input,
    scale_strength,
)
from experiments.harness.inversion import ddim_steps, ddim_times, in_double_precision
from models.control import is_hint_field
from models.ranges import COUNT, COUNT_OR_ZERO, FINITE, NOT_NEGATIVE, check_ranges
from train.class_names import ClassLabel
from train.condition_source import Row
from train.config import SamplingConfig
from train.loop import Batch
from train.samplers import LearnedSampler, NotFiniteError, select_solver
from train.samplers.absorbing import AbsorbingSampler
from train.samplers.ddpm import GaussianSampler, Sampling
from train.trained_sampler import TrainedSampler

MASK_STRENGTH, NOISINGS, MASK_RULE = 0.5, 10, "diffusers"  # defaults of diffedit
NOISE_MAPS = ("ddpm_inversion", "cyclediffusion")  # two names: CycleDiffusion shares its noise in the same way
OF_TWO_SIDES = ("diffedit", "flowedit", *NOISE_MAPS)  # methods that ask for predictions under the source too
USED_BY = {  # methods that have an option
    **dict.fromkeys(("mask", "paste"), ("sdedit", "diffedit")),
    **{"strength_map": ("sdedit",)},
    **dict.fromkeys(("mask_rule", "mask_strength"), ("diffedit",)),
    **dict.fromkeys(("source", "source_label", "source_prompt", "source_guidance"), OF_TWO_SIDES),
    **{"noisings": ("diffedit", "flowedit"), "plain_steps": ("flowedit",)},
}


@dataclass(frozen=True, kw_only=True)
class EditingConfig:
    """Editing."""

    method: Literal["sdedit", "diffedit", "flowedit", "ddpm_inversion", "cyclediffusion"] = "sdedit"
    """sdedit: masks or noises all of the image, then redraws it; diffedit: finds where source and target differ, and
    redraws that alone; not for codes, and without a mask: flowedit follows the difference of the two predictions,
    ddpm_inversion, or cyclediffusion, samples with the noise that leads to the image under the source."""
    label: tuple[ClassLabel, ...] = ()
    """Classes to redraw each image as, by name or number; if omitted, all (at most the first ten)."""
    prompt: tuple[str, ...] = ()
    """Texts to redraw each image after, for a run with --conditions text, instead of classes."""
    target_file: str | None = None
    """File (.json or .csv) of conditions to redraw the images under, a row each, used in turn: any fields of the model,
    in place of the image's own. Instead of classes."""
    strength: float = 0.7
    """How much of the image to redraw, in (0, 1]: the fraction of its codes to mask, or the noise level to start at."""
    source: Literal["image", "null"] = "image"
    """All methods but sdedit: conditions that describe the image: its own (of held-out images, or rows of
    --condition_file) with those below, or none."""
    source_label: ClassLabel | None = None
    """Class of the images, by name or number; held-out images know theirs."""
    source_prompt: str | None = None
    """Text that describes the images."""
    source_guidance: float | None = None
    """Guidance scale of the source; default: --guidance for the mask of diffedit, which inverts without, else 1."""
    mask: tuple[str, ...] = ()
    """sdedit, diffedit: masks of any size, white where the image may change, one for all --image or one each; if
    omitted, all of it (sdedit), or the mask that diffedit finds."""
    strength_map: tuple[str, ...] = ()
    """sdedit: grey pictures of any size, one for all images or one each, that --strength is multiplied by: pixels are
    redrawn by it where they are white, less where they are grey, and not at all where they are black."""
    paste: bool = False
    """sdedit with --mask or --strength_map, diffedit: copy the pixels that may not change from the input, also through
    a VQGAN."""
    noisings: int | None = None
    """Random noisings or maskings to average over: of diffedit for the mask (default: 10), of flowedit in each step
    (default: 1)."""
    mask_rule: MaskRule | None = None
    """diffedit: where the mask is. diffusers: differences above 1.5 times their mean; paper: above half of their range,
    without outliers. Default: diffusers."""
    mask_strength: float | None = None
    """diffedit: noise level, or fraction of masked codes, at which source and target are compared; default: 0.5."""
    plain_steps: int | None = None
    """flowedit: number of last steps that sample under the target alone; more of them are freer. Default: 0."""

    EVERYDAY = ("method", "label", "strength")
    RANGES = {
        **{"label": NOT_NEGATIVE, "strength": "(0, 1]", "source_label": NOT_NEGATIVE, "source_guidance": FINITE},
        **{"noisings": COUNT, "mask_strength": "(0, 1)", "plain_steps": COUNT_OR_ZERO},
    }

    def __post_init__(self):
        check_ranges(self)
        defaults = self.__dataclass_fields__
        for name, methods in USED_BY.items():
            if vars(self)[name] != defaults[name].default and self.method not in methods:
                raise ValueError(f"got {name} for method {self.method}: pass --method {' or '.join(methods)}")
        targets = [name for name in ("label", "prompt", "target_file") if vars(self)[name]]
        if len(targets) > 1:
            raise ValueError(
                f"got {' and '.join(targets)}: pass one of them; rows of --target_file may have all fields"
            )
        own = [name for name in ("source_label", "source_prompt", "source_guidance") if vars(self)[name] is not None]
        if self.source == "null" and own:
            raise ValueError(f"got source null and {own[0]}: pass one of them")
        computed = [name for name in ("noisings", "mask_rule", "mask_strength") if vars(self)[name] is not None]
        if self.mask and computed:
            raise ValueError(f"got mask and {computed[0]}, a setting of the mask that diffedit finds: pass one of them")
        if self.paste and self.method == "sdedit" and not (self.mask or self.strength_map):
            raise ValueError("got paste without a mask: pass --mask FILE, --strength_map FILE, or --method diffedit")

    def source_options(self, options: SamplingConfig) -> SamplingConfig:
        """Returns the sampling options for predictions under the source, where `options` are those of the target."""
        options = replace(options, metadata=())
        if self.source_guidance is not None:
            return replace(options, guidance=self.source_guidance)
        return options if self.method == "diffedit" else options.without_guidance()


class Side(NamedTuple):
    """The conditions of a batch, of source or target, with the sampling options for them."""

    conditions: Batch | None  # as `TrainedSampler.draw` takes them; None: null
    options: SamplingConfig


def own_conditions(inputs: InputImages, settings: EditingConfig, model: TrainedSampler) -> tuple[Row, ...]:
    """Returns the conditions that describe each image: those of its item or row, with what the settings say."""
    given = {"label": settings.source_label, "caption": settings.source_prompt}
    given = {name: value for name, value in given.items() if value is not None}
    labels = inputs.labels if model.sampler.n_classes else ()
    rows = [inputs.rows[i % len(inputs.rows)] if inputs.rows else {} for i in range(len(inputs))]
    rows = [{"label": label, **row} for label, row in zip(labels, rows, strict=True)] if labels else rows
    return tuple({**row, **given} for row in rows)


def open_sides(
    inputs: InputImages,
    images: list[int],
    fields: Sequence[Row],
    settings: EditingConfig,
    sampling: SamplingConfig,
    model: TrainedSampler,
) -> tuple[Side, Side]:
    """Returns the source and the target of edits of the input images of these numbers; `fields` are those of each
    target that differ from its image's own, which are the `rows` of the inputs."""
    target = Side(*conditions_for(model, inputs, images, None, sampling, fields))
    options = settings.source_options(sampling)
    if settings.method == "sdedit":  # which has no source
        return Side(None, options.without_guidance()), target
    if settings.source == "null" or not any(inputs.rows):
        return null_side(inputs, images, options.without_guidance(), model), target
    return Side(*conditions_for(model, inputs, images, None, options)), target


def null_side(inputs: InputImages, images: list[int], options: SamplingConfig, model: TrainedSampler) -> Side:
    """Returns null conditions, but with the hints of --hint, which the target has too; ValueError if the model reads
    others than classes beside them."""
    if not options.hint:
        return Side(None, options)
    others = [name for name in model.sampler.conditions if name != "label" and not is_hint_field(name)]
    if others:
        got = f"got hint for a source without {', '.join(others)}"
        raise ValueError(f"{got}: pass --source_prompt, or --condition_file with rows of the images")
    return Side(*conditions_for(model, replace(inputs, rows=()), images, None, options))


def edit_times(
    model: TrainedSampler, settings: EditingConfig, source: Sampling, target: Sampling
) -> tuple[ContinuousProcess, list[float]]:
    """Returns the process from noise of the strength on, and the times of its steps of ddim, by which all methods but
    sdedit edit with Gaussian models.

    ValueError: the options of source or target do not fit, or there is too little noise.
    """
    if settings.method == "diffedit":  # which inverts without guidance
        if not settings.mask:
            mask_strength = settings.mask_strength or MASK_STRENGTH
            ddim_times(model, target.without_guidance(), mask_strength, "mask_strength")
    else:
        ddim_times(model, source, settings.strength)
    return ddim_times(model, target, settings.strength)


class Edited(NamedTuple):
    """Edited images, and where they may differ from the input."""

    image: Tensor  # uint8 (B, C, H, W) on the CPU
    mask: Tensor | None  # (B, H, W) bool on the CPU; None: everywhere


@dataclass(frozen=True)
class EditTask:
    """A batch of images to edit. The random numbers of an image depend on the seed and its index alone."""

    model: TrainedSampler
    settings: EditingConfig
    images: Tensor  # uint8 (B, C, H, W)
    mask: Tensor | None  # (B, h, w) bool, of codes or latents: where the user lets the images change
    source: Side
    target: Side
    seed: int
    indices: list[int]
    strengths: StrengthMaps | None = None

    @cached_property
    def x(self) -> Tensor:
        """The images in the sampler's space."""
        return encode_images(self.images, self.model)

    def streams(self, purpose: str) -> Streams:
        """Returns a random stream for each image."""
        return Streams([seed_of(self.seed, purpose, i) for i in self.indices], self.model.device)

    def denoiser(self, side: Side) -> Denoiser:
        """Returns the guided denoiser of one side."""
        return self.model.make_denoiser(self.x, side.options, side.conditions)

    @property
    def ddim_times(self) -> tuple[ContinuousProcess, list[float]]:
        """The process from noise of the strength on, and the times of its steps of ddim."""
        return edit_times(self.model, self.settings, self.source.options, self.target.options)

    def draw(self, mask: Tensor | None) -> Tensor:
        """Masks or noises what the mask (B, h, w) covers, or everything, by the strength, and samples it under the
        target: uint8 images."""
        start = redraw_input(self.x, self.model, self.settings.strength)
        start = scale_strength(start, self.strengths, self.model)
        start = start if mask is None else start._replace(keep=~mask)
        return draw(self.model, self.target.options, self.seed, start, self.indices, self.target.conditions)

    def edited(self, image: Tensor, mask: Tensor | None) -> Edited:
        """Returns a result, with pixels from the input where the settings say so: outside the mask (B, h, w), and where
        the strength is 0."""
        if mask is None and self.strengths is None:
            return Edited(image, None)
        pixels = torch.ones(len(image), *image.shape[2:], dtype=torch.bool)
        if mask is not None:
            pixels = expand_mask(mask.cpu(), tuple(image.shape[2:]))
        if self.strengths is not None:
            pixels = pixels & (self.strengths.maps > 0)
        if self.settings.paste:
            image = torch.where(pixels.unsqueeze(1), image, self.images)
        return Edited(image, pixels)

    def decoded(self, x: Tensor) -> Tensor:
        """Returns samples x of ddim as uint8 images; NotFiniteError if they are not finite."""
        if not x.isfinite().all():
            got = f"method {self.settings.method} gave values that are not finite"
            remedy = "pass --no_amp, less --guidance or --strength, or weights from before the training diverged"
            raise NotFiniteError(f"{got}: {remedy}", x)
        return self.model.space.decode(x).cpu()


def edit_by_sdedit(task: EditTask) -> Edited:
    """Redraws the images, or what the user's mask covers (Meng et al. 2022, SDEdit)."""
    return task.edited(task.draw(task.mask), task.mask)


def edit_codes_by_diffedit(task: EditTask) -> Edited:
    """Redraws the codes where predictions under source and target differ."""
    mask = find_mask(task) if task.mask is None else task.mask
    return task.edited(task.draw(mask), mask)


def find_mask(task: EditTask) -> Tensor:
    """Returns where what is predicted under source and target differs, noise or codes: (B, h, w) bool."""
    settings, sampler, options = task.settings, task.model.sampler, task.target.options
    strength, random = settings.mask_strength or MASK_STRENGTH, {"rng": task.streams("difference")}
    random["n"] = settings.noisings or NOISINGS
    with task.model.inference():
        source, target = map(task.denoiser, (task.source, task.target))
        if isinstance(sampler, GaussianSampler):
            process, _ = ddim_times(task.model, options.without_guidance(), strength, "mask_strength")
            differences = noise_differences(source, target, process, task.x, process.start, **random)
        else:
            process = sampler.sampling_process(select_solver(sampler.process, options)[0], options)
            differences = code_differences(source, target, process, task.x, strength, **random)
    return mask_of_differences(differences, settings.mask_rule or MASK_RULE)


def edit_by_diffedit(task: EditTask) -> Edited:
    """Inverts the images under the source without guidance and clipping, which have no inverse, and decodes what the
    mask covers under the target."""
    process, times = task.ddim_times
    mask = find_mask(task) if task.mask is None else task.mask
    with task.model.inference():
        options = replace(task.source.options.without_guidance(), clip=False, dynamic_threshold=None)
        source = task.denoiser(task.source._replace(options=options))
        found = ddim_inversion(source, process, task.x, times, iterations=1)  # as published
        x = diffedit(task.denoiser(task.target), process, found.states, mask, times, rng=task.streams("edit"))
    return task.edited(task.decoded(x), mask)


def edit_by_flowedit(task: EditTask) -> Edited:
    """Follows the difference of the predictions under source and target."""
    process, times = task.ddim_times
    options = {"n": task.settings.noisings or 1, "plain_steps": task.settings.plain_steps or 0}
    with task.model.inference():
        source, target = map(task.denoiser, (task.source, task.target))
        x = flowedit(source, target, process, task.x, times, rng=task.streams("edit"), **options)
    return task.edited(task.decoded(x), None)


def edit_by_ddpm_inversion(task: EditTask) -> Edited:
    """Finds the noise with which ancestral sampling under the source leads to the images, and samples with it under the
    target."""
    x0, strength = in_double_precision(task.x), task.settings.strength
    with task.model.inference():
        source, target = (
            ddim_steps(task.model, side.options, side.conditions, x0, strength) for side in (task.source, task.target)
        )
        start, maps = ddpm_noise_maps(source.denoise, source.process, x0, source.times, task.streams("edit"))
        x = replay(target.denoise, target.process, start, maps, target.times).to(task.x)
    return task.edited(task.decoded(x), None)


METHODS: dict[type[LearnedSampler], dict[str, Callable[[EditTask], Edited]]] = {  # of samplers, by name
    GaussianSampler: {
        **{"sdedit": edit_by_sdedit, "diffedit": edit_by_diffedit, "flowedit": edit_by_flowedit},
        **dict.fromkeys(NOISE_MAPS, edit_by_ddpm_inversion),
    },
    AbsorbingSampler: {"sdedit": edit_by_sdedit, "diffedit": edit_codes_by_diffedit},
    LearnedSampler: {"sdedit": edit_by_sdedit},
}


def methods_for(model: TrainedSampler) -> dict[str, Callable[[EditTask], Edited]]:
    """Returns the methods that the sampler of a model has, by name."""
    return next(methods for kind, methods in METHODS.items() if isinstance(model.sampler, kind))


def find_method(name: str, model: TrainedSampler) -> Callable[[EditTask], Edited]:
    """Returns the function of a method; ValueError if the sampler has none of this name."""
    methods = methods_for(model)
    if name not in methods:
        got = f"got method {name} for sampler {model.sampler.config.sampler}"
        raise ValueError(f"{got}, wanted {' or '.join(methods)}: pass --method {[*methods][-1]}")
    return methods[name]
