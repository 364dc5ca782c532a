"""Words of regions: each region of an image reads its own prompt, by masked cross-attention (Küchler 2025, MaMoE).

The prompt of the whole image is the condition `text`, whose text encoder this one shares. Equal words are one group of
tokens, whose membership names all regions that read it.

Shapes: R regions, T different texts of an image, C chunks of a text, L tokens of a chunk with its start and end, M =
C (L - 2) tokens of a text that are read, perhaps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.conditioning import RegionEncoder, Tokens
from models.conditions.layout import FIELDS_OF
from models.conditions.text import CaptionEncoder, EncoderOptions, occurrences, tokenize
from models.prompts import PromptTokenizer
from models.regions import Regions, find_present
from models.streams import GatedTokens

FIELDS = FIELDS_OF["segments"]  # batch fields that the encoder reads, with its default options
SHARES = "text"  # the condition whose text encoder it reads with, if a network has it
WORDS, NUMBERS = "region_words", "region_words_of"  # fields of words that were tokenized, or encoded, with the data
Mode = Literal["all", "things", "background", "instances"]
Shape = Literal["segments", "boxes", "masks"]


@dataclass(frozen=True, kw_only=True)
class Config(EncoderOptions):
    """Words of regions, read by cross-attention where the region is; the text encoder is that of the condition text."""

    region_words_mode: Mode = "all"
    """Which regions read words. all: every one those of its instance (box_words) or else the name of its class; things:
    only things; background: only stuff; instances: only those of instances, no names of classes."""
    region_words_regions: Shape = "segments"
    """segments: of the fields panoptic, segment_id and segment_class, whose instances are known by box_id; boxes or
    masks: of the field of that name, and box_class."""
    region_words_names: tuple[str, ...] = ()
    """Words for each class of regions, by number; default: the names in the data set."""
    region_words_classes: tuple[str, ...] = ()
    """Names of the classes in the data set, which count as no words of an instance; default: those of the data set."""
    region_words_stuff: tuple[int, ...] = ()
    """Numbers of the classes that are stuff, not things; default: those of the data set."""
    region_words_everywhere: str = ""
    """Words that all places read, such as the name of the data set; they are dropped with the regions."""
    region_words_gated: bool = False
    """A cross-attention of their own, through a gate that starts at 0, reads the words, not that of the prompt: a
    trained network that gets them by --load_partial starts unchanged."""

    RANGES = {"region_words_stuff": "[0, 65536]"}
    OF_DATA = ("region_words_names", "region_words_classes", "region_words_stuff")

    def for_data(
        self,
        region_classes: int,
        metadata: Mapping[str, Sequence[str]] | None = None,
        numbers: Mapping[str, Any] | None = None,
        names: Sequence[str] = (),
        things: Sequence[bool] = (),
    ) -> "Config":
        """Returns the options with the names of classes, and which are stuff, that data declare.

        ValueError for another number of names than the data have classes.
        """
        options = super().for_data(region_classes, metadata, numbers, names, things)
        own = self.region_words_names
        if own and region_classes not in (0, len(own)):
            got = f"got region_words_names of {len(own)} classes"
            raise ValueError(f"{got}, the data set has {region_classes}: name each, or leave --region_words_names out")
        stuff = tuple(number for number, is_thing in enumerate(things) if not is_thing)
        return replace(
            options,
            region_words_names=own or tuple(names),
            region_words_classes=self.region_words_classes or tuple(names),
            region_words_stuff=self.region_words_stuff or stuff,
        )

    @property
    def rule(self) -> "WordRule":
        """Which words each region reads."""
        return WordRule(
            mode=self.region_words_mode,
            regions=self.region_words_regions,
            names=self.region_words_names,
            classes=self.region_words_classes or self.region_words_names,
            stuff=frozenset(self.region_words_stuff),
            everywhere=self.region_words_everywhere,
        )


class RegionTexts(NamedTuple):
    """The words of the regions of a batch."""

    texts: list[list[str]]  # the different ones of each image
    numbers: Tensor  # (B, R) int64: which of them a region reads, -1: none


@dataclass(frozen=True, kw_only=True)
class WordRule:
    """Which words each region of an image reads.

    Published `things` takes class 0 for stuff, and instances without words of their own stop it: here stuff is what the
    data call so, and a thing without words reads the name of its class. ValueError for a mode that needs names, or
    stuff, that there are not.
    """

    mode: Mode
    regions: Shape = "segments"
    names: tuple[str, ...] = ()  # the words for each class, by number
    classes: tuple[str, ...] = ()  # the names of the classes in the data, by number
    stuff: frozenset[int] = frozenset()  # numbers of classes
    everywhere: str = ""  # words that all places read

    def __post_init__(self):
        if self.mode != "instances" and not self.names:
            got = f"got no names of classes of regions for region_words_mode {self.mode}, and none from the data"
            raise ValueError(f"{got}: pass --region_words_names NAME ..., or --region_words_mode instances")
        if self.mode == "background" and not self.stuff:
            got = "got region_words_mode background, and no class that is stuff"
            raise ValueError(f"{got}: pass --region_words_stuff NUMBER ..., or another mode")

    @property
    def kind(self) -> Literal["segment", "box"]:
        """What the fields of regions describe."""
        return "segment" if self.regions == "segments" else "box"

    def words_of(self, number: int, given: str = "") -> str:
        """Returns the words of a region of a class, "" for none; `given` are those of its instance, if any.

        Blank ones, and the name of the class, count as none given.
        """
        name, own = (each[number] if number < len(each) else "" for each in (self.names, self.classes))
        given = "" if given == own or not given.strip() else given
        if self.mode == "instances":
            return given
        if self.mode != "all" and (number in self.stuff) != (self.mode == "background"):
            return ""
        return given or name.replace("_", " ")

    def read(self, batch: Mapping[str, Any], images: Sequence[str] | None = None) -> RegionTexts:
        """Returns the words of the regions that fields of a batch describe; `images` are names, for messages.

        ValueError for another number of words than instances, and for words that are no texts.
        """
        present, classes = find_present(batch, self.kind).tolist(), batch[f"{self.kind}_class"].tolist()
        texts, numbers = [], torch.full((len(present), len(present[0])), -1)
        for row, (is_there, own) in enumerate(zip(present, classes, strict=True)):
            given = self.given_words(batch, row, f"image {row} of the batch" if images is None else images[row])
            places = {self.everywhere: 0} if self.everywhere else {}
            for region in (region for region, each in enumerate(is_there) if each):
                words = self.words_of(own[region], given[region] if region in given else "")
                if words:
                    numbers[row, region] = places.setdefault(words, len(places))
            texts.append([*places])
        return RegionTexts(texts, numbers)

    def given_words(self, batch: Mapping[str, Any], row: int, image: str) -> dict[int, str]:
        """Returns the words of the instances of an image by the number of their region; {} without any."""
        words = batch.get("box_words")
        if words is None:
            return {}
        words, key = words[row], "box_id" if self.kind == "segment" else "box_class"
        if key not in batch:
            raise ValueError(f"{image}: got box_words without box_id, by which segments know them: add it")
        mask = batch[f"{key}_mask"][row] if f"{key}_mask" in batch else torch.ones_like(batch[key][row]).bool()
        ids = batch[key][row][mask].tolist()
        if not isinstance(words, list | tuple) or len(words) != len(ids) or not all(isinstance(w, str) for w in words):
            got = f"{len(words)} texts" if isinstance(words, list | tuple) else repr(words)
            wanted = f'a text for each of {len(ids)} instances: "" for none'
            raise ValueError(f"{image}: got {got} as box_words, wanted {wanted}")
        if self.kind == "box":
            return dict(enumerate(words))
        of_id = dict(zip(ids, words, strict=True))
        return {place: of_id[each] for place, each in enumerate(batch["segment_id"][row].tolist()) if each in of_id}


def arrange(words: RegionTexts, values: Tensor, mask: Tensor, places: Mapping[str, int]) -> dict[str, Tensor]:
    """Returns the fields WORDS (B, T, ...), its mask, and NUMBERS (B, R), from the `values` (U, ...) of all different
    texts and which of their tokens are read, `mask`; `places` are those of the texts, "" that of padding."""
    longest = max(1, *map(len, words.texts))  # at least one, so that all ranks use the text encoder
    rows = [[places[text] for text in own] + [places[""]] * (longest - len(own)) for own in words.texts]
    index = torch.tensor(rows)
    return {WORDS: values[index], f"{WORDS}_mask": mask[index], NUMBERS: words.numbers}


def different_texts(words: RegionTexts) -> dict[str, int]:
    """Returns the place of each different text of a batch, of "" too, which pads the lists of an image."""
    return {text: place for place, text in enumerate(dict.fromkeys([*sum(words.texts, []), ""]))}


def tokenize_words(words: RegionTexts, length: int, tokenizer: PromptTokenizer) -> dict[str, Tensor]:
    """Returns the ids of words, (B, T, C, L), and which between the first and the last are words, (B, T, C, L - 2), as
    `arrange` does."""
    places = different_texts(words)
    ids, mask = tokenize([*places], length, tokenizer)
    longest = max(3, int(mask.sum(-1).max()))  # a place to read at least
    inside = mask[..., 2:longest]  # what has two tokens before it, a start and another: as many as stand between
    return arrange(words, ids[..., :longest], inside, places)


class RegionWords(RegionEncoder):
    """Encodes the words of regions as tokens, of which a region reads its own, and places without any region none.

    The start and the end of a text, and padding, are not read, whatever --text_padding. The null is no token at all.
    The text encoder is that of `captions`; unless `owns_encoder`, it is part of another condition, which holds its
    weights. With `gated`, they are GatedTokens.
    """

    describes_regions = True

    def __init__(self, captions: CaptionEncoder, rule: WordRule, owns_encoder: bool = True, gated: bool = False):
        super().__init__()
        width = captions.token_width
        self.token_width, self.gated_width = (0, width) if gated else (width, 0)
        self.rule, self.kind = rule, GatedTokens if gated else Tokens
        self.own = captions if owns_encoder else None
        self.other = [] if owns_encoder else [captions]  # in a list: its weights are those of that condition alone
        self.fields = FIELDS_OF[rule.regions]
        instances = ("box_id", "box_words") if rule.kind == "segment" else ("box_words",)
        self.optional_fields, self.prepared_fields = instances, (WORDS, NUMBERS)
        self.limits = {self.fields[-1]: len(rule.names)} if rule.names else {}

    @property
    def captions(self) -> CaptionEncoder:
        """The encoder of texts."""
        return self.other[0] if self.own is None else self.own

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer of the text encoder, which knows its new words."""
        return self.captions.tokenizer

    def kept_modules(self) -> set[nn.Module]:
        return set() if self.own is None else self.own.kept_modules()

    def forward(
        self,
        raw: Mapping[str, Any] | None,
        x: Tensor,
        drop: Tensor | None = None,
        regions: Regions | None = None,
    ) -> Tokens:
        if regions is None:
            values = torch.zeros(len(x), 0, self.captions.token_width, device=x.device)
            return self.kind(values, x.new_zeros(len(x), 0).bool())
        values, mask, numbers = self.read(raw, x.device)  # (B, T, M, D), (B, T, M), (B, R)
        texts = torch.arange(values.shape[1], device=x.device)
        membership = (numbers.unsqueeze(1) == texts[:, None]) & regions.present.unsqueeze(1)  # (B, T, R)
        everywhere = ((texts == 0) & bool(self.rule.everywhere)).expand(len(x), -1)  # (B, T)
        everywhere = everywhere if drop is None else everywhere & ~drop.unsqueeze(1)
        present = mask & (membership.any(-1) | everywhere).unsqueeze(-1)
        values = values.masked_fill(~present.unsqueeze(-1), 0)  # padding is the same in all images
        length = values.shape[2]
        membership, everywhere = (each.repeat_interleave(length, 1) for each in (membership, everywhere))
        return self.kind(values.flatten(1, 2), present.flatten(1), membership, everywhere)

    def read(self, raw: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the tokens of all texts, which of them are read, and the number of each region's text."""
        if WORDS in raw:
            words, mask, numbers = raw[WORDS], raw[f"{WORDS}_mask"], raw[NUMBERS]
        else:
            fields = self.tokenize(raw)
            words, mask, numbers = (each.to(device) for each in fields.values())
        values = words if words.is_floating_point() else self.encode(words)[..., 1:-1, :].flatten(2, 3)
        return values, mask.flatten(2), numbers

    def tokenize(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the ids of the words of a batch, which are read, and the number of each region's text; see
        `tokenize_words`."""
        return tokenize_words(self.rule.read(batch), self.captions.length, self.tokenizer)

    def encode(self, ids: Tensor) -> Tensor:
        """Encodes ids (B, T, C, L), equal texts once where that costs no wait for a device: (B, T, C, L, D)."""
        texts = ids.flatten(0, 1)
        if self.training and ids.device.type == "cpu" and not torch.compiler.is_compiling():
            texts, places = texts.unique(dim=0, return_inverse=True)
            tokens = self.captions.encode_ids(texts)[places]
        else:
            tokens = self.captions.encode_ids(texts)  # in sampling it encodes equal chunks once
        return tokens.view(*ids.shape, -1)

    def tokens_of_texts(self, batch: Mapping[str, Any]) -> list[dict[str, list[int]]]:
        """Returns the tokens that each text of each image has, by their numbers in the condition; of raw texts."""
        words, (_, mask, _) = self.rule.read(batch), self.tokenize(batch).values()
        read = mask.flatten(2)
        length = read.shape[2]
        return [
            {text: (read[row, i].nonzero()[:, 0] + i * length).tolist() for i, text in enumerate(own)}
            for row, own in enumerate(words.texts)
        ]

    def tokens_of_words(self, batch: Mapping[str, Any], phrase: str) -> list[list[int]]:
        """Returns the tokens of a word or phrase in the texts of each image; none in texts that do not have it."""
        found = []
        for own in self.tokens_of_texts(batch):
            tokens = []
            for text, places in own.items():
                tokens += [places[i] for part in occurrences(text, phrase, self.tokenizer) for i in part]
            found.append(tokens)
        return found


def build(config: Config, width: int, n_classes: int, text: CaptionEncoder | None = None) -> RegionWords:
    """Builds the encoder, which shares the text encoder of the condition `text`, or has one of its own; it depends on
    neither the width of embeddings nor the number of classes of images."""
    gated = config.region_words_gated
    if text is not None:
        return RegionWords(text, config.rule, owns_encoder=False, gated=gated)
    captions = CaptionEncoder(config.build_encoder(), "empty", bool(config.text_encoder))
    return RegionWords(captions, config.rule, gated=gated)
