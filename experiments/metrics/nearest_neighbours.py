"""Nearest training images: a search by features over the whole split, reranking of the best candidates, a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from experiments.harness.batches import ResumableBatches, broadcast_object
from experiments.harness.report import progress
from experiments.metrics.distances import Batches
from experiments.metrics.features import Features
from experiments.metrics.image_pairs import ImageDistance
from experiments.metrics.neighbours import nearest
from train.data.loading import ImageSource, images_in_order
from train.data.transforms import View, as_uint8, to_picture, training_views
from train.files import atomic_write
from train.logging import draw_caption

CHUNK = 1000  # training images searched, and results saved, at a time
SMALLEST, LARGEST = 64, 128  # limits of the longer side of a displayed image, pixels
GAP, TEXT, MARGIN = 4, 15, 12  # pixels between images, per line of text, around the picture and after the first column
BLACK, GREY, RED = (0, 0, 0), (110, 110, 110), (210, 0, 0)


class Candidates(NamedTuple):
    """The training images nearest to each of n queries, nearest first; each image once, in its nearest view."""

    distances: Tensor  # (n, c) float64, between features
    images: Tensor  # (n, c) int64: indices in the training split
    views: Tensor  # (n, c) int64: indices in `training_views`


def merge_candidates(parts: list[Candidates], most: int) -> Candidates:
    """Returns the `most` nearest images of all parts, or as many as there are, each once, in its nearest view.

    Every part must hold its own `most` nearest images, or all of its images.
    """
    distances, images, views = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    order = distances.argsort(dim=1, stable=True)
    merged = Candidates(*(each.gather(1, order) for each in (distances, images, views)))
    by_image = merged.images.argsort(dim=1, stable=True)  # views of the same image are adjacent, the nearest first
    sorted_images = merged.images.gather(1, by_image)
    duplicate = torch.zeros_like(sorted_images, dtype=torch.bool)
    duplicate[:, 1:] = sorted_images[:, 1:] == sorted_images[:, :-1]
    duplicate = torch.zeros_like(duplicate).scatter(1, by_image, duplicate)  # back in the order of distances
    most = min(most, int((~duplicate).sum(1).min()) if len(duplicate) else 0)
    unique = duplicate.long().argsort(dim=1, stable=True)[:, :most]
    return Candidates(*(each.gather(1, unique) for each in merged))


def search_chunk(
    queries: Tensor, images: Tensor, index: Tensor, views: list[View], extract: Callable[[Tensor], Tensor], most: int
) -> Candidates:
    """Finds the training images, of uint8 (m, C, H, W) with indices (m,), nearest to queries (n, D) in any view."""
    parts = []
    for i, view in enumerate(views):
        near = nearest(queries, extract(view(images)), min(most, len(images)))
        view_index = torch.full_like(near.indices, i)
        parts.append(Candidates(near.distances.cpu(), index[near.indices.cpu()], view_index.cpu()))
    return merge_candidates(parts, most)


def find_candidates(
    queries: Tensor,
    source: ImageSource,
    features: Features,
    most: int,
    batches: ResumableBatches,
    name: str,
) -> Candidates:
    """Finds the `most` nearest training images to queries (n, D) by features, in all training views, in resumable
    chunks. All ranks must call it, and all get the result."""
    views, world, batch_size = training_views(source.config), batches.world, batches.batch_size
    here = torch.device("cpu") if world.device.type == "mps" else world.device
    queries = queries.to(here)

    def extract(images: Tensor) -> Tensor:
        parts = [features.extract(part) for part in images.split(batch_size)]
        return torch.cat(parts).to(here)

    def make(indices: list[int]) -> dict[str, Tensor]:
        loaded = list(images_in_order(source, batch_size, indices))
        if not loaded:  # none of the images is readable
            return {"index": torch.zeros(0, dtype=torch.long)}
        images, index = (torch.cat([batch[key] for batch in loaded]) for key in ("image", "index"))
        return {"index": index} | search_chunk(queries, images, index, views, extract, most)._asdict()

    best = None
    chunks = batches.resume(name, range(len(source)), make, size=CHUNK)
    for chunk in progress(chunks, len(source), "training images", world.is_main):
        if "distances" in chunk:
            part = Candidates(*(chunk[field] for field in Candidates._fields))
            best = part if best is None else merge_candidates([best, part], most)
    return broadcast_object(world, best)


class RankedNeighbours(NamedTuple):
    """The k nearest training images of each of n queries by the ranking distance, nearest first."""

    distances: Tensor  # (n, k) float64: ranking distances
    images: Tensor  # (n, k) int64
    views: Tensor  # (n, k) int64
    feature_distances: Tensor  # (n, k) float64
    equal: Tensor  # (n,) bool: some candidate equals the query pixel by pixel


def rank_candidates(
    query: Tensor, images: Tensor, candidates: Candidates, image_distance: ImageDistance, k: int
) -> RankedNeighbours:
    """Ranks the candidates (1, c), with images uint8 (c, C, H, W), of one query uint8 (C, H, W); n is 1."""
    distances = image_distance.distances(query, images)
    order = distances.argsort(stable=True)[:k]
    near = [each[:, order] for each in (candidates.images, candidates.views, candidates.distances)]
    return RankedNeighbours(distances[order][None], *near, (images == query).flatten(1).all(1).any()[None])


def rerank_candidates(
    queries: Tensor,
    candidates: Candidates,
    source: ImageSource,
    image_distance: ImageDistance,
    k: int,
    batches: ResumableBatches,
    name: str,
) -> Batches:
    """Yields the `RankedNeighbours` of queries uint8 (n, C, H, W) as resumable batches (dicts), on the main rank. All
    ranks must iterate."""
    views = training_views(source.config)

    def make(indices: list[int]) -> dict[str, Tensor]:
        rows = []
        for i in indices:
            own = Candidates(*(each[i : i + 1] for each in candidates))
            images = [training_view(source, views, *each) for each in zip(own.images[0], own.views[0], strict=True)]
            rows.append(rank_candidates(queries[i], torch.stack(images), own, image_distance, k))
        return RankedNeighbours(*map(torch.cat, zip(*rows, strict=True)))._asdict()

    return progress(batches.resume(name, range(len(queries)), make), len(queries), "ranking", batches.world.is_main)


def training_view(source: ImageSource, views: list[View], image: Tensor, view: Tensor) -> Tensor:
    """Returns a training image in one of its training views: uint8 (C, H, W)."""
    return views[int(view)](as_uint8(source[int(image)]["image"].as_subclass(Tensor)))


class PictureRow(NamedTuple):
    """One row of the picture: an image and its nearest training images."""

    image: Tensor  # uint8 (C, H, W)
    caption: str  # below the image
    neighbours: Tensor  # uint8 (k, C, H, W)
    distances: list[float]  # k, below the neighbours
    classes: Sequence[str] = ()  # of the image and its k neighbours, below the captions; empty: without such a line

    @property
    def text_height(self) -> int:
        """Height of the lines below the images, in pixels."""
        return 2 * TEXT if any(self.classes) else TEXT


def save_neighbour_picture(path: Path, sections: dict[str, list[PictureRow]], title: str) -> None:
    """Saves a PNG of all rows, in sections with headings. Neighbours at distance 0 are framed in red."""
    rows = [row for section in sections.values() for row in section]
    width, height = display_size(rows[0].image)
    columns = max(len(row.neighbours) for row in rows)
    across = 2 * MARGIN + width + MARGIN + columns * (width + GAP)
    down = 2 * MARGIN + TEXT + len(sections) * (2 * TEXT + GAP) + sum(height + row.text_height + GAP for row in rows)
    font = ImageFont.load_default(size=11)
    text_width = max(round(font.getlength(text)) for text in (title, *sections)) + 2 * MARGIN
    canvas = Image.new("RGB", (max(across, text_width), down), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), title, BLACK, font)
    top = MARGIN + TEXT
    for heading, section in sections.items():
        draw.text((MARGIN, top + TEXT), heading, BLACK, font)
        top += 2 * TEXT + GAP
        for row in section:
            draw_row(canvas, draw, font, row, top)
            top += height + row.text_height + GAP
    with atomic_write(path) as scratch:
        canvas.save(scratch, format="PNG")


def draw_row(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, row: PictureRow, top: int
) -> None:
    """Draws one row of the picture at this height."""
    width, height = display_size(row.image)
    canvas.paste(display_image(row.image), (MARGIN, top))
    draw.text((MARGIN, top + height + 1), row.caption, GREY, font)
    for i, (image, distance) in enumerate(zip(row.neighbours, row.distances, strict=True)):
        left = 2 * MARGIN + width + i * (width + GAP)
        canvas.paste(display_image(image), (left, top))
        colour = RED if distance == 0 else GREY
        if distance == 0:
            draw.rectangle((left - 2, top - 2, left + width + 1, top + height + 1), outline=RED, width=2)
        draw.text((left, top + height + 1), f"{distance:.3g}", colour, font)
    for i, name in enumerate(row.classes):
        left = MARGIN if i == 0 else 2 * MARGIN + width + (i - 1) * (width + GAP)
        draw_caption(canvas, name, (left, top + height + 1 + TEXT), width)


def display_size(image: Tensor) -> tuple[int, int]:
    """Returns the displayed (width, height) of an image (C, H, W); small ones are enlarged by an integer factor."""
    height, width = image.shape[1:]
    longer = max(height, width)
    scale = max(1, SMALLEST // longer) if longer <= LARGEST else LARGEST / longer
    return max(1, round(to_picture(image).shape[2] * scale)), max(1, round(height * scale))


def display_image(image: Tensor) -> Image.Image:
    """Resizes a uint8 image (C, H, W) to its displayed size."""
    size = display_size(image)
    picture = to_picture(image)
    larger = size[0] >= picture.shape[2]
    colour = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    return colour.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.BOX)
