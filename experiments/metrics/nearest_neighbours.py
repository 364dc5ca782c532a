"""The training images nearest to given ones: by features over the whole split, the best ranked anew; a picture."""

from collections.abc import Callable
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
from train.data.transforms import View, as_uint8, training_views
from train.files import atomic_write

CHUNK = 1000  # training images searched at a time, and kept of
SMALLEST, LARGEST = 64, 128  # pixels of the longer side of an image in the picture
GAP, TEXT, MARGIN = 4, 15, 12  # between images, for a line of text, around all and after the first column
BLACK, GREY, RED = (0, 0, 0), (110, 110, 110), (210, 0, 0)


class Candidates(NamedTuple):
    """The training images nearest to each of n queries, from the nearest on; each once, in its nearest view."""

    distances: Tensor  # (n, c) float64, of features
    images: Tensor  # (n, c) int64: indices in the training split
    views: Tensor  # (n, c) int64: of `training_views`


def merge_candidates(parts: list[Candidates], most: int) -> Candidates:
    """Of all parts together the `most` nearest images, or as many as there are, each once, in its nearest view.

    A part that leaves images out holds at least `most`, so that no image is missing here.
    """
    distances, images, views = (torch.cat(each, 1) for each in zip(*parts, strict=True))
    order = distances.argsort(dim=1, stable=True)
    found = Candidates(*(each.gather(1, order) for each in (distances, images, views)))
    by_image = found.images.argsort(dim=1, stable=True)  # of one image the nearest view comes first
    same = found.images.gather(1, by_image)
    again = torch.zeros_like(same, dtype=torch.bool)
    again[:, 1:] = same[:, 1:] == same[:, :-1]
    again = torch.zeros_like(again).scatter(1, by_image, again)  # back in the order of distances
    most = min(most, int((~again).sum(1).min()) if len(again) else 0)
    kept = again.long().argsort(dim=1, stable=True)[:, :most]
    return Candidates(*(each.gather(1, kept) for each in found))


def search_chunk(
    queries: Tensor, images: Tensor, index: Tensor, views: list[View], extract: Callable[[Tensor], Tensor], most: int
) -> Candidates:
    """Of training images uint8 (m, C, H, W) with indices (m,) those nearest to queries (n, D), in any of the views."""
    parts = []
    for i, view in enumerate(views):
        near = nearest(queries, extract(view(images)), min(most, len(images)))
        seen = torch.full_like(near.indices, i)
        parts.append(Candidates(near.distances.cpu(), index[near.indices.cpu()], seen.cpu()))
    return merge_candidates(parts, most)


def find_candidates(
    queries: Tensor,
    source: ImageSource,
    features: Features,
    most: int,
    batches: ResumableBatches,
    name: str,
) -> Candidates:
    """The `most` nearest training images to queries (n, D) by features, of the whole source in all its training views;
    on every rank. What an earlier start searched is read."""
    views, world, batch_size = training_views(source.config), batches.world, batches.batch_size
    here = torch.device("cpu") if world.device.type == "mps" else world.device
    queries = queries.to(here)

    def extract(images: Tensor) -> Tensor:
        parts = [features.extract(part.expand(-1, 3, -1, -1)) for part in images.split(batch_size)]
        return torch.cat(parts).to(here)

    def make(indices: list[int]) -> dict[str, Tensor]:
        read = list(images_in_order(source, batch_size, indices))
        if not read:  # none of them can be read
            return {"index": torch.zeros(0, dtype=torch.long)}
        images, index = (torch.cat([batch[key] for batch in read]) for key in ("image", "index"))
        return {"index": index} | search_chunk(queries, images, index, views, extract, most)._asdict()

    best = None
    chunks = batches.resume(name, range(len(source)), make, size=CHUNK)
    for chunk in progress(chunks, len(source), "training images", world.is_main):
        if "distances" in chunk:
            found = Candidates(*(chunk[field] for field in Candidates._fields))
            best = found if best is None else merge_candidates([best, found], most)
    return broadcast_object(world, best)


class RankedNeighbours(NamedTuple):
    """The k nearest training images of each of n queries, by the closeness they were ranked by."""

    distances: Tensor  # (n, k) float64
    images: Tensor  # (n, k) int64
    views: Tensor  # (n, k) int64
    feature_distances: Tensor  # (n, k) float64
    equal: Tensor  # (n,) bool: some candidate is the query, pixel by pixel


def rank_candidates(
    query: Tensor, shown: Tensor, found: Candidates, image_distance: ImageDistance, k: int
) -> RankedNeighbours:
    """Of one query uint8 (C, H, W), candidates uint8 (c, C, H, W) and what was found of them, (1, c): n is 1."""
    distances = image_distance.distances(query, shown)
    order = distances.argsort(stable=True)[:k]
    near = [each[:, order] for each in (found.images, found.views, found.distances)]
    return RankedNeighbours(distances[order][None], *near, (shown == query).flatten(1).all(1).any()[None])


def rerank_candidates(
    queries: Tensor,
    table: Candidates,
    source: ImageSource,
    image_distance: ImageDistance,
    k: int,
    batches: ResumableBatches,
    name: str,
) -> Batches:
    """`RankedNeighbours` of images uint8 (n, C, H, W) in batches, as dicts: on the main rank alone, while all make them."""
    views = training_views(source.config)

    def make(indices: list[int]) -> dict[str, Tensor]:
        rows = []
        for i in indices:
            own = Candidates(*(each[i : i + 1] for each in table))
            shown = torch.stack(
                [training_view(source, views, *each) for each in zip(own.images[0], own.views[0], strict=True)]
            )
            rows.append(rank_candidates(queries[i], shown, own, image_distance, k))
        return RankedNeighbours(*map(torch.cat, zip(*rows, strict=True)))._asdict()

    return progress(batches.resume(name, range(len(queries)), make), len(queries), "ranking", batches.world.is_main)


def training_view(source: ImageSource, views: list[View], image: Tensor, view: Tensor) -> Tensor:
    """uint8 (C, H, W): a training image as it was trained on."""
    return views[int(view)](as_uint8(source[int(image)]["image"].as_subclass(Tensor)))


class PictureRow(NamedTuple):
    """One line of the picture."""

    image: Tensor  # uint8 (C, H, W)
    caption: str  # below it
    neighbours: Tensor  # uint8 (k, C, H, W)
    distances: list[float]  # k


def save_neighbour_picture(path: Path, sections: dict[str, list[PictureRow]], title: str) -> None:
    """A PNG of all rows, in sections with a heading each. A neighbour at distance 0 is framed in red."""
    rows = [row for section in sections.values() for row in section]
    width, height = display_size(rows[0].image)
    columns = max(len(row.neighbours) for row in rows)
    across = 2 * MARGIN + width + MARGIN + columns * (width + GAP)
    down = 2 * MARGIN + TEXT + len(sections) * (2 * TEXT + GAP) + len(rows) * (height + TEXT + GAP)
    canvas = Image.new("RGB", (max(across, 420), down), (255, 255, 255))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    draw.text((MARGIN, MARGIN), title, BLACK, font)
    top = MARGIN + TEXT
    for heading, section in sections.items():
        draw.text((MARGIN, top + TEXT), heading, BLACK, font)
        top += 2 * TEXT + GAP
        for row in section:
            draw_row(canvas, draw, font, row, top)
            top += height + TEXT + GAP
    with atomic_write(path) as scratch:
        canvas.save(scratch, format="PNG")


def draw_row(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, row: PictureRow, top: int
) -> None:
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


def display_size(image: Tensor) -> tuple[int, int]:
    """Width and height in the picture of an image (C, H, W): small ones are enlarged by a whole number."""
    height, width = image.shape[1:]
    longer = max(height, width)
    scale = max(1, SMALLEST // longer) if longer <= LARGEST else LARGEST / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


def display_image(image: Tensor) -> Image.Image:
    size = display_size(image)
    larger = size[0] >= image.shape[2]
    colour = Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
    return colour.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.BOX)
