"""Distances of generated images to real ones during training: their settings, and their names in the log."""

from dataclasses import dataclass

from models.ranges import COUNT_OR_ZERO, check_ranges

MEASURES = {"fd": "FD", "kid": "KD", "cmmd": "CMMD"}  # of --FD_measures: what each is called in the log


@dataclass(frozen=True, kw_only=True)
class DistanceLoggingConfig:
    """Distances during training."""

    steps_per_FD: int = 0
    """Steps between Frechet distances of generated (stage one: reconstructed) to real images; 0: none."""
    FD_samples: int = 1_000
    """Number of images for --steps_per_FD."""
    FD_features: str = "auto"
    """Features for --steps_per_FD: a file in experiments/metrics/features, or auto."""
    FD_measures: tuple[str, ...] = ("fd",)
    """Distances for --steps_per_FD: fd (Frechet), kid (kernel distance), cmmd (published with --FD_features clip)."""
    clip_dir: str | None = None
    """Folder of a CLIP model as transformers saves it, for --FD_features clip."""

    RANGES = {"steps_per_FD": COUNT_OR_ZERO, "FD_samples": "[2, 1000000000]"}

    def __post_init__(self):
        check_ranges(self)
        known, given = ", ".join(MEASURES), " ".join(self.FD_measures) or "none"
        if not self.FD_measures or len({*self.FD_measures} & MEASURES.keys()) < len(self.FD_measures):
            raise ValueError(f"got FD_measures {given}, wanted some of {known}, each once: pass --FD_measures fd")


def is_distance(name: str) -> bool:
    """Returns whether a metric in the log is such a distance, as "FD(inception)/1000_samples" is."""
    return name.startswith(tuple(f"{label}(" for label in MEASURES.values()))
