"""Settings of sampling: each field is a flag."""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from diffusion.solvers import SolverOptions
from models.ranges import FINITE, MILLION
from train.control import ControlSampling

GUIDANCE_SCALES = ("guidance", "image_guidance", "region_guidance")  # settings; all but the first may be None


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(ControlSampling):
    """Base class of every learned sampler's Sampling."""

    solver: str = "ancestral"
    """Sampling algorithm."""
    sample_steps: int | None = None
    """Sampling steps per image; by default the solver's own choice."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1: no guidance."""
    image_guidance: float | None = None
    """Guidance scale of the conditions image and images; --guidance then scales what the others add to them (Brooks et
    al. 2023). 1: images without guidance. Default: --guidance scales all conditions together."""
    region_guidance: float | None = None
    """Guidance scale of regions beyond the other conditions, which --guidance then scales alone; in a model of regions
    alone, the only scale. Default: --guidance scales all conditions together."""
    condition_file: str | None = None
    """File (.json or .csv) of conditions, one row per image, used in turn; by default they are drawn from the data."""
    metadata: tuple[str, ...] = ()
    """Values of --conditions metadata and numbers for all images, such as camera=CAM_FRONT lon=-90.8, or light=unknown;
    fields left out come with the other conditions or, if there are none, are unknown."""
    class_sampling: Literal["data", "uniform"] = "data"
    """Classes of images for which neither --label nor a --condition_file gives one: as frequent as in the training
    data, or, of the classes that have training images, all equally frequent."""

    EVERYDAY = ("solver", "sample_steps", "guidance")
    RANGES = {"sample_steps": MILLION, **dict.fromkeys(GUIDANCE_SCALES, FINITE)}

    @classmethod
    def option_names(cls) -> list[str]:
        """Returns the names of the solver options of its process: the fields of the SolverOptions it inherits from."""
        bases = [base for base in cls.__mro__ if issubclass(base, SolverOptions)]
        own = [base for base in bases if not issubclass(base, SamplingConfig)]
        return list(dict.fromkeys(field.name for base in own for field in fields(base)))

    def names_without_effect(self, process: object) -> set[str]:
        """Returns the names of the settings that a process does not have, or not beside the other settings; solver
        options aside."""
        return set()

    @classmethod
    def solver_setting_names(cls) -> set[str]:
        """Returns the names of the settings that belong to the chosen solver, and are reset for another one."""
        return {"sample_steps", *cls.option_names()}

    @property
    def is_guided(self) -> bool:
        """Whether any guidance scale differs from 1."""
        return any(getattr(self, name) not in (None, 1) for name in GUIDANCE_SCALES)

    def without_guidance(self) -> Self:
        """Returns the same settings without guidance."""
        return replace(self, guidance=1.0, image_guidance=None, region_guidance=None)

    @property
    def solver_options(self) -> dict[str, Any]:
        """The solver options that are set, by name."""
        values = {name: getattr(self, name) for name in self.option_names()}
        return {name: value for name, value in values.items() if value is not None}

    def with_solver(self, solver: str, sample_steps: int | None = None) -> Self:
        """Returns the same settings for another solver, with its default options."""
        own = {field.name: field.default for field in fields(self) if field.name in self.solver_setting_names()}
        return replace(self, **own | {"solver": solver, "sample_steps": sample_steps})
