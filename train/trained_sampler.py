"""A trained sampler as experiments use it: loaded from its run, drawn from with one seed per image, and scored."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.rng import Streams, seed_of
from diffusion.types import Bound, Denoiser, OnStep
from models.attention_recorder import MapRecorder
from models.control import hint_field
from train.class_names import class_captions
from train.condition_images import encode_condition_images, make_adapt
from train.condition_source import ConditionSource, Row, read_rows
from train.config import DataConfig, SamplingConfig
from train.data.captions import choose_caption
from train.data.hints import HintMaker, HintsConfig, ItemHints, hint_channels, with_hint_of_source
from train.data.loading import Adapt, BatchSource, apply_adapt, build_dataset, temporary_seed, to_device
from train.data.transforms import View, check_8_bits
from train.datasets import Dataset, DatasetConfig
from train.distributed import DistContext
from train.execution import autocast, frozen_weights_cast_once
from train.hint_files import combine_rows, read_hints
from train.loop import Batch
from train.registry import load_plugin
from train.samplers import LearnedSampler
from train.samplers._metadata import MetadataFields
from train.spaces import EditInput, PixelSpace, Space
from vq.tiles import make_tiles


@dataclass(frozen=True)
class TrainedSampler:
    """A learned model of images, as experiments use it: `draw` and `sample_batches` sample, `log_likelihood` scores."""

    run: Path
    step: int
    sampler: LearnedSampler
    space: Space
    data: DataConfig
    reader: DatasetConfig
    class_frequencies: Tensor | None  # (n_classes,) in the training split; None without classes
    weights: str  # SHA-256 of the weights' file, or of the EMA snapshots that they were reconstructed from
    world: DistContext  # the ranks that share an experiment
    amp: bool  # bfloat16 autocast where the device computes it natively
    class_names: tuple[str, ...] = ()  # by class number, as recorded in training; empty: the classes have no names
    hint_makers: Mapping[str, HintMaker | None] = field(default_factory=dict)  # of control branches, by batch field
    hints: HintsConfig = HintsConfig()  # which hint the image condition reads, and how it is made

    @property
    def device(self) -> torch.device:
        return self.world.device

    def in_tiles(self, tile: int, overlap: int | None = None) -> Self:
        """Returns the same model, whose first stage encodes and decodes larger images in tiles; see `make_tiles`.

        ValueError for invalid tiles, and for a sampler of pixels.
        """
        if self.space.first_stage is None:
            raise ValueError(f"got --tile {tile}, but {self.run} was trained on pixels: leave it out")
        first_stage = replace(self.space.first_stage, tiles=make_tiles(tile, overlap))
        return replace(self, space=replace(self.space, first_stage=first_stage))

    @property
    def provenance(self) -> dict[str, Any]:
        """What identifies the model: the SHA-256 of its weights, and the provenance of its space."""
        return {"sampler_weights": self.weights} | self.space.provenance

    def dataset(self, split: str) -> Dataset:
        """Returns a split of the training data, read from the folder that the run or datasets.yaml names."""
        return build_dataset(self.data, self.reader, split)

    @cached_property
    def region_classes(self) -> tuple[str, ...]:
        """The names of the classes of regions, by number; () if the data have none. The data are read once for it."""
        return tuple(getattr(self.dataset("val"), "region_classes", ()))

    def batches(self, split: str) -> BatchSource:
        """Returns a split in a fixed shuffle (train: with its augmentations): a list of positions -> a batch."""
        return self.space.source(self.dataset(split), split, self.data, 0, self.world, self.adapt)

    @property
    def adapt(self) -> Adapt | None:
        """The function from an item to the fields of a batch: the user's (--adapt), then that which adds hints; None
        without either."""
        own, makers = make_adapt(self.sampler.config), {name: each for name, each in self.makers.items() if each}
        return ItemHints(own, makers) if makers else own

    @property
    def makers(self) -> dict[str, HintMaker | None]:
        """What makes the hints of items, by batch field; None: not known."""
        kind = self.hints.condition_image
        return ({"condition_image": HintMaker(kind, self.hints)} if kind else {}) | self.hint_makers

    def conditions_of(self, item: dict[str, Any], index: int) -> Row:
        """Returns the conditions that an item of the data set holds, except the label; ValueError if one is missing
        that is not optional."""
        names, item = [name for name in self.sampler.conditions if name != "label"], choose_caption(item)
        if names and self.adapt is not None:
            with temporary_seed(seed_of(0, "adapt", index)):
                item = apply_adapt(self.adapt, View()(item))  # a copy: the function may change it
        if missing := sorted({*names} - {*item}):
            raise ValueError(f"{self.run} is conditioned on {', '.join(missing)}: pass --condition_file with them")
        optional = [name for name in self.sampler.optional_conditions if name in item]
        return {name: item[name] for name in (*names, *optional)}

    def read_rows(self, condition_file: str | None, flag: str = "condition_file") -> list[Row]:
        """Returns the rows of a --condition_file, or of the file of another flag, [] without one, with the classes as
        numbers; see `read_rows`. If the condition_image is a hint, it is made of a row's source_image, if it has one.
        """
        words, kind = tuple(MetadataFields.of(self.sampler.network).words), self.hints.condition_image
        size, n = (self.sampler.n_classes, self.class_names), self.data.n_channels
        channels = {"condition_image": hint_channels(kind, n), "source_image": n} if kind else {}
        channels |= self.channels_of_hints
        rows = read_rows(condition_file, self.data, *size, words, channels, flag=flag)
        maker = HintMaker(kind, self.hints) if kind and "source_image" not in self.sampler.conditions else None
        return rows if maker is None else [with_hint_of_source(row, "condition_image", maker) for row in rows]

    def with_hints(self, rows: Sequence[Row], options: SamplingConfig) -> list[Row]:
        """Returns rows of conditions, used in turn, with the hints of --hint, which are used in turn too."""
        return combine_rows(rows, read_hints(options, self.channels_of_hints, self.hint_makers, self.data))

    @property
    def channels_of_hints(self) -> dict[str, int]:
        """The channels of the hints of control branches, by batch field."""
        encoders = self.sampler.network.encoders
        return {hint_field(name): encoders[name].hint_channels for name in encoders.hints}

    @property
    def metadata_fields(self) -> tuple[str, ...]:
        """The fields of --conditions metadata and numbers; () without these conditions."""
        return tuple(MetadataFields.of(self.sampler.network).unknown)

    def with_metadata(self, rows: Sequence[Row], options: SamplingConfig, skip: Collection[str] = ()) -> list[Row]:
        """Returns rows of conditions with the values of --metadata, words and numbers, which override theirs.

        Where nothing but the label, metadata and `skip` is missing in a row, so that no held-out image gives it, the
        other fields of metadata are unknown. ValueError for unknown fields and values, also in the rows.
        """
        fields = MetadataFields.of(self.sampler.network)
        if not fields.unknown:
            if options.metadata:
                got = f"got metadata {' '.join(options.metadata)}, which {self.run} is not conditioned on"
                raise ValueError(f"{got}: leave --metadata out, or train with --conditions metadata or numbers")
            return list(rows)
        given = fields.parse(options.metadata)
        rows = [fields.read_row(row, f"row {i}") for i, row in enumerate(rows)]
        if not given:
            return rows
        rows = [{**row, **given} for row in rows or ({},)]
        missing = {*self.sampler.conditions} - {"label", *skip, *rows[0]}
        unknown = fields.unknown if missing <= fields.unknown.keys() else {}
        return [{**{name: unknown[name] for name in missing & unknown.keys()}, **row} for row in rows]

    def captions(self, labels: Tensor | None) -> list[str]:
        """Returns the names of classes, labels (B,), or their numbers if they have none; [] without labels."""
        return class_captions(labels, self.sampler.n_classes, self.class_names)

    def condition_source(self, options: SamplingConfig, skip: Collection[str] = ()) -> ConditionSource:
        """Returns the source of the conditions of generated images.

        Held-out images are read only for conditions that are neither in the --condition_file, nor in --metadata, nor in
        `skip`, the fields that the caller fills in. All ranks must call it. Raises FileNotFoundError or ValueError for
        a --condition_file or --metadata that cannot be used, and for uniform classes where none are drawn.
        """
        rows = self.with_hints(self.read_rows(options.condition_file), options)
        sampler, rows = self.sampler, self.with_metadata(rows, options, skip)
        missing = {*sampler.conditions} - {"label", *skip, *(rows[0] if rows else ())}
        held_out = self.batches("val") if missing else None
        frequencies = self.class_frequencies
        if options.class_sampling == "uniform":
            if frequencies is None or held_out is not None:
                reason = "the sampler has none" if frequencies is None else "they come with other held-out conditions"
                raise ValueError(f"got class_sampling uniform for the classes, but {reason}: leave it out")
            frequencies = (frequencies > 0).double()
        source = ConditionSource(
            sampler.conditions,
            sampler.n_classes,
            frequencies,
            held_out,
            metadata=self.metadata_fields,
            optional=sampler.optional_conditions,
        )
        return source.with_rows(rows)

    def sample_batches(
        self, n: int, seed: int, options: SamplingConfig, *, batch_size: int = 50, **keywords: Any
    ) -> Iterator[Batch]:
        """Yields n images of a seed in batches, as `draw` returns them; `keywords` are those of `draw`.

        Each rank yields its share of the batches: together they are those of a single process.
        """
        source = self.condition_source(options)
        for first in self.world.local_items(list(range(0, n, batch_size))):
            indices = list(range(first, min(first + batch_size, n)))
            yield self.draw(indices, seed, options, source.draw(seed, indices), **keywords)

    @torch.no_grad()
    def draw(
        self,
        indices: list[int],
        seed: int | Sequence[int],
        options: SamplingConfig,
        conditions: Batch | None,
        *,
        edit: EditInput | None = None,
        network: nn.Module | None = None,
        shape: tuple[int, int] | None = None,
        window_stride: int | None = None,
        on_step: OnStep | None = None,
        negative: Batch | None = None,
        recorder: MapRecorder | None = None,
    ) -> Batch:
        """Returns {"image": uint8 (B, C, H, W)}, with "codes" (B, h, w) and "label" (B,) where the model has them.

        Image i of a seed does not depend on the batch it is drawn in; each image may have a seed of its own.
        `conditions` are raw fields, as the `draw` of a `condition_source` returns them; None: all null. `negative` are
        fields that guidance moves away from instead of the null. `edit` is known data to begin from, `network` replaces
        the sampler's own. `on_step(i, t, s, x, prediction)` is called after each step, with x in the sampler's space.
        `recorder` adds up the attention maps of the network.
        ValueError for options of another sampler.
        """
        self.check_options(options)
        batch = None if conditions is None else to_device(conditions, self.device)
        negative = None if negative is None else to_device(negative, self.device)
        batch, negative = (self.with_encoded_images(fields, shape) for fields in (batch, negative))
        seeds = [seed] * len(indices) if isinstance(seed, int) else seed
        rng = Streams([seed_of(own, "sample", i) for own, i in zip(seeds, indices, strict=True)], self.device)
        network = network or self.sampler.network
        with autocast(self.device, self.amp), frozen_weights_cast_once(network):
            x = self.sampler.sample(
                network,
                rng,
                batch=batch,
                options=options,
                shape=shape,
                window_stride=window_stride,
                edit=edit,
                on_step=on_step,
                negative=negative,
                recorder=recorder,
            )
        outputs = {"image": self.space.decode(x).cpu()} | self.space.extra_arrays(x)
        return outputs if batch is None or "label" not in batch else outputs | {"label": batch["label"].cpu()}

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Runs the sampler's network as `draw` does: without gradients, in bfloat16 where `amp` asks for it."""
        with torch.no_grad(), autocast(self.device, self.amp), frozen_weights_cast_once(self.sampler.network):
            yield

    def make_denoiser(
        self,
        x: Tensor,
        options: SamplingConfig,
        conditions: Batch | None,
        *,
        negative: Batch | None = None,
        recorder: MapRecorder | None = None,
    ) -> Denoiser:
        """Returns the guided denoiser of x (B, ...) in the sampler's space, under `conditions` as `draw` takes them.

        It is for inversion and editing; make and call it in `with model.inference():`.
        """
        self.check_options(options)
        batch, negative = (
            None if fields is None else self.with_encoded_images(to_device(fields, self.device), tuple(x.shape[-2:]))
            for fields in (conditions, negative)
        )
        network = self.sampler.network
        return self.sampler.make_denoiser(network, batch, options, x, negative=negative, recorder=recorder)

    def with_encoded_images(self, batch: Batch | None, shape: tuple[int, int] | None = None) -> Batch | None:
        """Returns fields of conditions with their images as the image condition reads them."""
        return encode_condition_images(self.sampler.network, self.space, batch, shape)

    def check_options(self, options: SamplingConfig) -> None:
        """Raises ValueError unless these are options of this sampler, such as a train.samplers.absorbing.Sampling."""
        wanted = load_plugin("train.samplers", self.sampler.config.sampler, "sampler").Sampling
        if not isinstance(options, wanted):
            got = f"{type(options).__module__}.{type(options).__qualname__}"
            raise ValueError(f"got {got} as sampling options, wanted {wanted.__module__}.{wanted.__qualname__}")

    @torch.no_grad()
    def dry_run(
        self, options: SamplingConfig, source: ConditionSource, network: nn.Module | None = None, **keywords: Any
    ) -> None:
        """Samples one image up to its first step. ValueError for what the sampler cannot do.

        `source` is the `condition_source` of these options; `network` replaces the sampler's own; `keywords` are those
        of `LearnedSampler.sample`.
        """

        def stop(*step: Any) -> Tensor:
            raise _FirstStepDone

        conditions, rng = source.draw(0, [0]), Streams([0], self.device)
        batch = None if conditions is None else to_device(conditions, self.device)
        batch = self.with_encoded_images(batch, keywords.get("shape"))
        with suppress(_FirstStepDone), autocast(self.device, self.amp):
            network = network or self.sampler.network
            self.sampler.sample(network, rng, batch=batch, options=options, on_step=stop, **keywords)

    def log_likelihood(self, batch: Batch, seed: int = 0, nfe: int | None = None) -> Bound:
        """Returns -log2 p of a batch as `batches` gives it, in the sampler's `unit`.

        `nfe` is the number of network calls per image (edm and flow: steps of the probability flow; autoregressive:
        ignored); None: all terms of a bound (edm, flow: 50 steps). The random numbers of an image
        are a function of the seed and its position. ValueError for pixels that are not of 8 bits.
        """
        rng = Streams([seed_of(seed, "likelihood", k) for k in batch["position"].tolist()], self.device)
        if isinstance(self.space, PixelSpace):
            check_8_bits(batch["image"])
        batch = self.with_encoded_images(self.space.encode_batch(to_device(batch, self.device)))
        with autocast(self.device, self.amp):
            return self.sampler.log_likelihood(self.sampler.network, batch, rng, nfe)


class _FirstStepDone(Exception):
    """Ends a dry run after the first step."""


def class_frequencies(dataset: Dataset) -> list[float]:
    """Returns the relative frequency of each class in a data set, n_classes numbers; empty without labels."""
    if dataset.n_classes == 0:
        return []
    return (np.bincount(dataset.labels, minlength=dataset.n_classes) / len(dataset)).tolist()
