"""Control branches of runs: their flags, in training and in sampling, and where they are added to a network.

A run of --control trains a branch beside the network of --load_dir (see models/control.py); train/data/hints.py makes
the hints. The settings of its encoder that are left out are those of the data and the space, and are saved with the
run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, Self

from torch import nn

from models.conditioning import Condition
from models.control import HINT, HintConfig, add_control, build_branch, guess_strengths, hint_field, scale_hints
from models.ranges import FINITE, SIZE, SIZE_OR_ZERO, check_ranges

HINT_SETTINGS = tuple(field.name for field in fields(HintConfig))


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """The control branch of a run."""

    control: Literal["", "edges", "image", "mask", "boxes", "grey", "small"] = ""
    """Train a control branch beside the network of --load_dir, guided by hints of this kind, which are made from the
    images or their annotations; image: the picture before, of a data set of pairs."""
    control_lock: bool = True
    """Of --control only the branch learns; --no_control_lock: the network of --load_dir too."""
    load_control: str | None = None
    """File of a control branch to start from, such as the control.safetensors of a run on the same --load_dir, or of
    convert.py; by default the branch starts as a copy that changes nothing. Its settings of hints are taken over."""
    hint_channels: int = 0
    """Channels of hints, to which grey ones are repeated; 0: those of their kind."""
    hint_widths: tuple[int, ...] = ()
    """Widths of the convolutions of hints; default: 16 32 for pixels, for latents up to 16 32 96 256."""
    hint_factor: int = 0
    """Height of hints over that of what is sampled; 0: that of the images, 8 for latents of Stable Diffusion."""

    RANGES = {"hint_channels": SIZE_OR_ZERO, "hint_widths": SIZE, "hint_factor": SIZE_OR_ZERO}

    def __post_init__(self):
        check_ranges(self)
        given = [name for name in ("load_control", *HINT_SETTINGS) if getattr(self, name)]
        given += ["no_control_lock"] * (not self.control_lock)
        if given and not self.control:
            raise ValueError(f"got {given[0]} without --control: pass --control edges, or leave --{given[0]} out")

    def with_hint(self, channels: int, factor: int) -> Self:
        """Returns the settings with those of the hint where they are left out: its channels, and its height over that
        of what is sampled. ValueError if they do not fit together."""
        if not self.control:
            return self
        factor, widths = self.hint_factor or factor, HintConfig.hint_widths
        widths += widths[-1:] * (factor.bit_length() - len(widths))
        values = {
            "hint_channels": self.hint_channels or channels,
            "hint_widths": self.hint_widths or widths[: max(2, factor.bit_length())],
            "hint_factor": factor,
        }
        HintConfig(**values)  # checks them
        return replace(self, **values)

    def with_hint_of(self, hint: HintConfig, path: Path) -> Self:
        """Returns the settings with those of the hint of a file; ValueError for other ones that are given."""
        for name in HINT_SETTINGS:
            given, own = getattr(self, name), getattr(hint, name)
            if given and given != own:
                got = f"got {name} {given} with --load_control {path}, whose branch has {own}"
                raise ValueError(f"{got}: leave --{name} out")
        return replace(self, **asdict(hint))

    @property
    def hint(self) -> HintConfig:
        """The architecture of the encoder of hints; see `with_hint`."""
        return HintConfig(**{name: getattr(self, name) for name in HINT_SETTINGS})

    @property
    def hint_kinds(self) -> dict[str, str]:
        """The kind of hint in each batch field that training needs; {} without --control."""
        return {hint_field(HINT): self.control} if self.control else {}

    def add_branch(self, network: nn.Module) -> None:
        """Adds the new branch of --control to a network, if any, as a copy that changes nothing."""
        if self.control:
            add_control(network, build_branch(network, self.hint))


@dataclass(frozen=True, kw_only=True)
class ControlSampling:
    """The hints and strengths of control branches in sampling."""

    hint: tuple[str, ...] = ()
    """Pictures that hints of control branches are made from: for each branch a file, or a folder whose pictures are
    used in turn. By default hints are those of held-out images."""
    hint_ready: bool = False
    """The pictures of --hint are hints already, such as edges."""
    control_strength: tuple[float, ...] = (1.0,)
    """Strength of control branches: one number, or one for each skip of the UNet, from the first to the last, and one
    for the middle."""
    control_guess: bool = False
    """Guess mode, for hints without a prompt: guidance starts from no hint, and strengths rise from 0.1 at the first
    skip to 1 in the middle."""
    control_middle_only: bool = False
    """Control the middle of the UNet alone, which leaves more to the network."""

    RANGES = {"control_strength": FINITE}

    def __post_init__(self):
        check_ranges(self)
        if not self.control_strength:
            raise ValueError("got no control_strength, wanted one number or several: pass --control_strength 1")
        if self.hint_ready and not self.hint:
            raise ValueError("got hint_ready without pictures: pass --hint FILE, or leave --hint_ready out")

    def branch_strengths(self, outputs: int) -> list[float]:
        """Returns the strength of each output of a branch with so many, the middle last; ValueError for another number
        of strengths, and for a branch without a middle."""
        count = len(self.control_strength)
        if count not in (1, outputs):
            wanted = f"wanted one, or {outputs}: skips, then the middle" if outputs > 1 else "wanted one"
            raise ValueError(f"got {count} numbers as control_strength, {wanted}: pass --control_strength 1")
        if self.control_middle_only and outputs == 1:
            raise ValueError("got control_middle_only for a transformer, which has no middle: leave it out")
        strengths = list(self.control_strength) * (outputs // count)
        if self.control_guess:
            strengths = [own * guess for own, guess in zip(strengths, guess_strengths(outputs), strict=True)]
        return [0.0] * (outputs - 1) + strengths[-1:] if self.control_middle_only else strengths


def weigh_hints(conditions: Sequence[Condition], control: nn.ModuleDict, options: ControlSampling) -> list[Condition]:
    """Returns the encoded conditions of a guidance chain with the strengths of the options for the hints of the
    branches `control` of the network.

    ValueError for strengths that do not fit the branches, and for settings of branches of a network without any.
    """
    if not control:
        refuse_settings(options)
        return list(conditions)
    strengths = {name: options.branch_strengths(branch.outputs) for name, branch in control.items()}
    return [scale_hints(condition, strengths) for condition in conditions]


def refuse_settings(options: ControlSampling) -> None:
    """Raises ValueError for settings of control branches, of a network that has none."""
    given = [field.name for field in fields(ControlSampling) if getattr(options, field.name) != field.default]
    if given:
        got = f"got {given[0]} for a model without a control branch"
        raise ValueError(f"{got}: leave --{given[0]} out, or sample with --control_files FILE")
