"""CLIPScore of a sampler's images: how well they fit their captions, beside other captions and held-out images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from torch import Tensor
from torch.nn import functional as F

from experiments.harness.batches import ResumableBatches, gather_in_order, rank_indices
from experiments.harness.experiment import ExperimentSetup, ModelConfig, OutputConfig, run_experiment
from experiments.harness.images import read_samples
from experiments.harness.report import progress, table
from experiments.harness.results import load_results
from experiments.metrics.distances import batches_name, concatenate
from experiments.metrics.features import clip
from models.prompts import parse_prompt, plain_words
from models.ranges import check_ranges
from train.cli.files import read_run_config
from train.config import SamplingConfig
from train.data.loading import ImageSource, fixed_subset, images_in_order
from train.data.transforms import grey_to_rgb
from train.distributed import DistContext
from train.files import sha256
from train.trained_sampler import TrainedSampler

WEIGHT = 2.5  # of the cosine in the score
SAME = 1 - 1e-6  # cosine of the features of equal captions, at least


@dataclass(frozen=True, kw_only=True)
class CLIPScoreConfig:
    """CLIPScore."""

    n_samples: int = 1000
    """Number of generated images, and at most of held-out ones."""
    samples: str | None = None
    """Results folder of get_samples.py with prompts: measure its images instead of new ones."""
    clip_dir: str | None = None
    """Folder of a CLIP model with its tokenizer, as transformers saves it; the publication has ViT-B/32."""
    caption_prefix: str = "A photo depicts"
    """Words before each caption, as in the publication; "" for none, as in other tools."""

    EVERYDAY = ("n_samples", "samples", "clip_dir")
    RANGES = {"n_samples": "[2, 1000000000]"}

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures how well images fit their captions; writes results.json to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/calc_clip_score.py --load_dir {sampler}_text --clip_dir CLIP",
        "python experiments/calc_clip_score.py --load_dir {sampler}_text --clip_dir CLIP --samples DIR",
    )

    clip_score: CLIPScoreConfig
    model: ModelConfig
    sampling: SamplingConfig
    output: OutputConfig


class Captioned(NamedTuple):
    """Images and their captions."""

    images: Tensor  # uint8 (B, C, H, W)
    captions: Sequence[str]  # B


CaptionedAt = Callable[[list[int]], Captioned]


class Embedder:
    """Maps captioned images to their features in CLIP: "image" and "caption" (B, D), and which captions are "cut"."""

    def __init__(self, settings: CLIPScoreConfig, device: torch.device):
        self.prefix = settings.caption_prefix.strip()
        self.encode_captions = clip.build_captions(device, settings.clip_dir)
        self.encode_images = clip.build(device, settings.clip_dir)

    def __call__(self, captioned: Captioned) -> dict[str, Tensor]:
        captions, cut = self.encode_captions([f"{self.prefix} {each}".strip() for each in captioned.captions])
        images = self.encode_images(grey_to_rgb(captioned.images))
        return {"image": images.cpu(), "caption": captions.cpu(), "cut": cut}


def clip_scores(images: Tensor, captions: Tensor) -> Tensor:
    """Returns the CLIPScore of each image with its caption, features (N, D) of both -> (N,) float64 in [0, 2.5].

    It is 2.5 max(cos, 0) (Hessel et al. 2021, eq. 1). Other tools report 100 max(cos, 0), which is 40 times as much.
    """
    return WEIGHT * F.cosine_similarity(images.double(), captions.double()).clamp(min=0)


def prepare(config: Config, model: TrainedSampler, world: DistContext) -> ExperimentSetup:
    """Opens the samples. ValueError: a model that reads no captions; FileNotFoundError, ValueError: samples without."""
    settings, sampling = config.clip_score, config.sampling
    if "caption" not in model.sampler.conditions:
        raise ValueError(f"{model.run} reads no captions: pass a run with --conditions text")
    if settings.samples is not None:
        count, captioned_at, provenance = read_captioned(Path(settings.samples).expanduser(), model)
        return ExperimentSetup((settings, count, captioned_at, False), provenance, draws=False)
    source = model.condition_source(sampling)

    def draw(indices: list[int]) -> Captioned:
        conditions = source.draw(config.output.seed, indices)
        images = model.draw(indices, config.output.seed, sampling, conditions)["image"]
        return Captioned(images, conditions["caption"])

    has_real = source.held_out_items([0]) is not None  # their captions are those of held-out images
    return ExperimentSetup((settings, settings.n_samples, draw, has_real), source=source)


def read_captioned(folder: Path, model: TrainedSampler) -> tuple[int, CaptionedAt, dict[str, str]]:
    """Reads what get_samples.py wrote with prompts: the number of images, a function from indices to them and the plain
    words of their prompts, and hashes that identify both."""
    file, results, settings = folder / "samples.npz", load_results(folder) or {}, folder / "config.yaml"
    images = read_samples(file, model.data.n_channels)["image"]
    prompts = [each.get("prompt") for each in results.get("images", [])]
    drawn = read_run_config(settings).get("samples", {}) if settings.is_file() else {}
    syntax = drawn.get("prompt_syntax", "plain")
    if len(prompts) != len(images):
        got = f"got {len(images)} images and {len(prompts)} prompts in {folder}"
        raise ValueError(f"{got}: pass the results of get_samples.py with --prompt or --prompts")
    hashes = {"samples_sha256": sha256(file), "prompts_sha256": sha256(folder / "results.json")}
    hashes |= {} if syntax == "plain" else {"prompt_syntax": syntax}
    captions = [plain_words(parse_prompt(prompt, syntax)) for prompt in prompts]
    return len(images), lambda indices: Captioned(images[indices], [captions[i] for i in indices]), hashes


def measure(
    settings: CLIPScoreConfig,
    count: int,
    captioned_at: CaptionedAt,
    has_real: bool,
    model: TrainedSampler,
    batches: ResumableBatches,
) -> dict[str, Any] | None:
    """Scores the images with their captions and with those of other images, and held-out ones if `has_real`. All ranks
    must call it; only the main rank gets the results."""
    embed, is_main = Embedder(settings, model.device), batches.world.is_main
    name = batches_name("captioned", clip.VERSION, batches.files, count)
    found = batches.resume(name, range(count), lambda indices: embed(captioned_at(indices)))
    kinds = {"generated": concatenate(progress(found, count, "sampling", is_main), count, ("image", "caption", "cut"))}
    if has_real:
        real = progress(real_features(embed, model, count, batches), count, "held-out images", is_main)
        kinds["real"] = concatenate(real, count, ("image", "caption", "cut"))
    if not is_main:
        return None
    scores = {}
    for kind, each in kinds.items():
        scores[kind] = summarize(clip_scores(each["image"], each["caption"]))
        others = each["caption"].roll(1, 0)
        differ = F.cosine_similarity(each["caption"].double(), others.double()) < SAME
        if differ.any():  # not all images are of one prompt
            scores[f"{kind}_other_captions"] = summarize(clip_scores(each["image"], others)[differ])
    cut = int(kinds["generated"]["cut"].sum())
    return {"metric": "CLIPScore", "weight": WEIGHT, **scores, "captions_cut": cut, "run": batches.run}


def real_features(
    embed: Embedder, model: TrainedSampler, count: int, batches: ResumableBatches
) -> Iterator[dict[str, Tensor]]:
    """Yields the features of up to `count` held-out images and their captions, on the main rank; all must iterate."""
    held_out, world, size = model.dataset("val"), batches.world, batches.batch_size
    indices = rank_indices(world, fixed_subset(len(held_out), count), size)

    def own() -> Iterator[dict[str, Tensor]]:
        for batch in images_in_order(ImageSource(held_out, model.data), size, indices):
            captions = [model.conditions_of(held_out[i], i)["caption"] for i in batch["index"].tolist()]
            yield embed(Captioned(batch["image"], captions))

    return gather_in_order(world, own())


def summarize(scores: Tensor) -> dict[str, Any]:
    """Returns the mean of scores (N,), its standard error, None for a single one, and their number."""
    error = scores.std().item() / len(scores) ** 0.5 if len(scores) > 1 else None
    return {"mean": scores.mean().item(), "error": error, "n": len(scores)}


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the table of scores."""
    names = {"generated": "generated", "real": "held-out real images"}
    rows = [("images", "captions", "count", "CLIPScore", "100 max(cos, 0)")]
    for kind, label in names.items():
        for end, captions in (("", "their own"), ("_other_captions", "of another image")):
            if (each := results.get(kind + end)) is not None:
                error = "" if each["error"] is None else f" ± {each['error']:.2g}"
                hundred = f"{each['mean'] * 100 / results['weight']:.4g}"
                rows.append((label, captions, str(each["n"]), f"{each['mean']:.4g}{error}", hundred))
    notes = ["CLIPScore: 2.5 max(cos, 0) of the features of image and caption, ± standard error; higher is better"]
    if results["captions_cut"]:
        notes.append(f"{results['captions_cut']} captions of generated images have more tokens than CLIP reads")
    return "\n".join(["", table(rows), *notes, "", str(folder / "results.json")])


if __name__ == "__main__":
    run_experiment("clip_score", Config, measure, report, files=("clip_dir",), prepare=prepare)
