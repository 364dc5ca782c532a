"""Reconstructs images of any size with a VQGAN or another autoencoder: originals, reconstructions, error maps."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import ExperimentSetup, FirstStageOutputConfig, run_experiment
from experiments.harness.first_stage import FirstStageModelConfig
from experiments.harness.images import save_grid
from experiments.harness.report import table
from experiments.metrics.image_pairs import l1, psnr
from models.ranges import COUNT, MILLION, SIZE, check_ranges
from train.data.loading import build_dataset, fixed_subset
from train.data.transforms import (
    ValueRange,
    as_uint8,
    range_for_image,
    to_float,
    to_item,
    to_picture,
    to_pixels,
)
from train.datasets import UnreadableImage, content_fingerprint, files_fingerprint
from train.datasets._channels import decode_channels
from train.datasets.folder import SUFFIXES, list_images
from train.distributed import DistContext
from train.files import atomic_write
from train.first_stage import FirstStage, VQGANStage
from train.logging import grid_image
from train.progress import Progress
from vq.tiles import Tiles, make_tiles, seam_ratio, seams, tile_difference

SHOWN = 16  # images in the overview; also the default number of validation images
LISTED = 40  # rows of the printed table
ERROR_MAX = 0.25  # largest error of the colour map, as a fraction of the range from black to white
COLOURS = "inferno"
THUMBNAIL = 192  # side, pixels
LEGEND = 30  # height, pixels
TILE = 64  # latents: the default for autoencoders that name no size of their training images
COLUMNS = {  # what is measured of each image, and its heading
    **{"bits_per_pixel": "bits/pixel", "psnr": "PSNR dB", "l1": "L1", "seams": "seam ratio"},
    **{"seams_of_original": "of original", "l1_to_whole": "L1 to untiled", "l1_at_seams": "at seams"},
    **{"l1_inside": "elsewhere", "codes_as_whole": "equal codes", "latents_to_whole": "L1 of latents"},
}


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Reconstruction."""

    images: str | None = None
    """An image, or a folder of images (recursive); if omitted, validation images of a VQGAN, preprocessed as in
    training."""
    n_images: int | None = None
    """Number of images: the first of --images by path (default: all), or a fixed random subset of the validation split
    (default: 16)."""
    size: int | None = None
    """Resize the short side to this many pixels; if omitted, images of --images keep their own size."""
    tile: int | None = None
    """Side of the tiles for larger images, in codes or latents; if omitted, the grid of a VQGAN's training images, 64
    latents for other autoencoders."""
    overlap: int | None = None
    """Overlap of neighbouring tiles, in codes or latents; if omitted, a quarter of a tile."""
    batch_size: int = 1
    """Tiles processed at once; memory grows with it."""
    compare_whole: bool = False
    """Also reconstruct each image without tiles and report the difference; memory grows with the image."""

    EVERYDAY = ("images", "n_images", "size", "tile")
    RANGES = {
        "n_images": COUNT,
        "size": SIZE,
        "tile": SIZE,
        "overlap": "[0, 65536]",
        "batch_size": MILLION,
    }

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Reconstructs images; writes overview.png, images/<name>.png and results.json to <logs_root>/<log_dir>."""

    EXAMPLES = (
        "python experiments/reconstruct.py --dataset mnist",
        "python experiments/reconstruct.py --load_dir vqgan_mnist --images ~/photos --size 64",
    )

    reconstruction: ReconstructionConfig
    model: FirstStageModelConfig
    output: FirstStageOutputConfig


def prepare(config: Config, model: FirstStage, world: DistContext) -> ExperimentSetup:
    """Finds the images and the tiling. ValueError, FileNotFoundError: no images, or invalid tiles."""
    settings = config.reconstruction
    default = max(model.vqgan.grid) if isinstance(model, VQGANStage) else TILE
    tile = default if settings.tile is None else settings.tile
    tiles, originals = make_tiles(tile, settings.overlap, settings.batch_size), find_originals(settings, model)
    suffix = "" if settings.images is None else f"_{Path(settings.images).resolve().stem}"
    return ExperimentSetup(
        (settings, tiles, originals), {"data_fingerprint": originals.fingerprint}, f"reconstructions{suffix}"
    )


class TooSmall(ValueError):
    """Raised for an image smaller than one code."""


class Originals(NamedTuple):
    """The original images, by index."""

    names: list[str]
    read: Callable[[int], Tensor]  # returns uint8 (C, H, W); raises UnreadableImage or TooSmall
    fingerprint: str


def find_originals(config: ReconstructionConfig, first_stage: FirstStage) -> Originals:
    """Returns the images of --images, or validation images; ValueError for an autoencoder that has none of these."""
    is_vqgan = isinstance(first_stage, VQGANStage)
    n_channels, data_range = first_stage.n_channels, first_stage.data.data_range if is_vqgan else None

    def fit(image: Any) -> Tensor:
        return preprocess(image, config.size, n_channels, first_stage.factor, data_range)

    if config.images is not None:
        return images_of_path(Path(os.path.expanduser(config.images)), config.n_images, fit, n_channels)
    if not is_vqgan:
        raise ValueError(f"the autoencoder in {first_stage.run} names no data: pass an image or a folder as --images")
    return validation_images(first_stage, config.n_images or SHOWN, None if config.size is None else fit)


def images_of_path(path: Path, count: int | None, fit: Callable[[Any], Tensor], n_channels: int = 3) -> Originals:
    """Returns one image file, or the first `count` images (default: all) of a folder, sorted by path.

    FileNotFoundError: no such path. ValueError: the folder has no images.
    """
    if path.is_file():
        root, names = path.parent, [path.name]
    elif path.is_dir():
        try:
            root, (names, others) = path, list_images(path)
        except ValueError as error:
            raise ValueError(f"{path} holds no images: wanted {' '.join(SUFFIXES)} files, check --images") from error
        names = names[:count]
        if others:
            print(f"left out of {path}: {others}", flush=True)
    else:
        raise FileNotFoundError(f"{path} not found: pass an image or a folder of images as --images")
    return Originals(names, lambda i: fit(decode_channels(root / names[i], n_channels)), files_fingerprint(root, names))


def validation_images(first_stage: VQGANStage, count: int, fit: Callable[[Any], Tensor] | None) -> Originals:
    """Returns a fixed random subset of the validation split, preprocessed by `fit`, by default as in training."""
    dataset = build_dataset(first_stage.data, first_stage.reader, "val")
    indices = sorted(fixed_subset(len(dataset), count))

    def read(i: int) -> Tensor:
        image, data = dataset[indices[i]]["image"], first_stage.data
        if fit is not None:
            return fit(image)
        return as_uint8(
            to_item({"image": image}, data.size, data.n_channels, data.data_range)["image"].as_subclass(Tensor)
        )

    return Originals([f"val_{index:06d}" for index in indices], read, content_fingerprint(dataset))


def picture_names(names: list[str]) -> list[str]:
    """Returns distinct paths for the pictures: the names without suffixes, or with them if two would coincide."""
    short = [str(Path(name).with_suffix("")) for name in names]
    distinct = len({name.lower() for name in short}) == len(short)
    return [f"{name}.png" for name in (short if distinct else names)]


def preprocess(
    image: Any, size: int | None, n_channels: int, factor: int, data_range: ValueRange | None = None
) -> Tensor:
    """Crops an image at its centre to uint8 (n_channels, H, W), with H and W multiples of `factor`.

    With `size`, its short side is resized to it first. TooSmall: a side is below `factor` pixels.
    """
    from torchvision.transforms.v2 import functional as F

    pixels = to_pixels(image, n_channels, range_for_image(image, data_range))
    if size is not None:
        pixels = F.resize(pixels, [size], F.InterpolationMode.BICUBIC, antialias=True)
    height, width = F.get_size(pixels)
    if height < factor or width < factor:
        raise TooSmall(f"{width}x{height} pixels, wanted at least {factor}x{factor}: pass --size N to enlarge it")
    crop = F.center_crop(pixels, [height // factor * factor, width // factor * factor])
    return as_uint8((F.to_image(crop) if isinstance(crop, Image.Image) else crop).as_subclass(Tensor))


@torch.inference_mode()
def reconstruct(first_stage: FirstStage, image: Tensor) -> tuple[Tensor, Tensor]:
    """Encodes and decodes an image, uint8 (C, H, W): returns codes (h, w) or latents (D, h, w), and the reconstruction,
    uint8 (C, H, W)."""
    x = to_float(image)[None]
    if isinstance(first_stage, VQGANStage):
        codes = first_stage.encode(x).cpu()  # so that tiles are put together on the CPU
        fake = first_stage.decode(codes)
    else:
        codes = first_stage.encode_latents(x).cpu()
        fake = first_stage.decode_latents(codes)
    return codes[0], fake[0].cpu()


def measure_image(first_stage: FirstStage, image: Tensor, codes: Tensor, fake: Tensor) -> dict[str, Any]:
    """Measures one reconstruction in tiles; infinite or undefined values become None."""
    (height, width), grid, tiles = image.shape[1:], codes.shape[-2:], first_stage.tiles
    rows, columns = (seams(side, tiles.tile, tiles.overlap, first_stage.factor) for side in grid)
    bits = math.nan  # of latents, which are real numbers
    if isinstance(first_stage, VQGANStage):
        bits = math.log2(first_stage.vqgan.config.codebook_size) * codes.numel() / (height * width)
    metrics = {
        "psnr": psnr(image[None], fake[None]).item(),
        "l1": l1(image[None], fake[None]).item(),
        "bits_per_pixel": bits,
        "seams": seam_ratio(fake[None], rows, columns, first_stage.factor),
        "seams_of_original": seam_ratio(image[None], rows, columns, first_stage.factor),
    }
    return {"width": width, "height": height, "codes": list(grid), **finite_or_none(metrics)}


def compare_to_whole(first_stage: FirstStage, image: Tensor, codes: Tensor, fake: Tensor) -> dict[str, float | None]:
    """Compares a reconstruction in tiles with that of the whole image at once."""
    whole_codes, whole = reconstruct(replace(first_stage, tiles=None), image)
    tile, overlap, _ = first_stage.tiles
    pixels = to_float(fake)[None], to_float(whole)[None]
    difference = tile_difference(*pixels, tile, overlap, first_stage.factor)
    metrics = {"l1_to_whole": l1(whole[None], fake[None]).item()}
    metrics |= {"l1_at_seams": difference.at_seams, "l1_inside": difference.inside}
    if first_stage.has_codes:
        metrics["codes_as_whole"] = (whole_codes == codes).float().mean().item()
    else:
        metrics["latents_to_whole"] = (whole_codes - codes).abs().mean().item()
    return finite_or_none(metrics)


def finite_or_none(metrics: dict[str, float]) -> dict[str, float | None]:
    """Returns the numbers with None for those that are infinite or undefined."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def measure(
    settings: ReconstructionConfig, tiles: Tiles, originals: Originals, model: FirstStage, batches: ResumableBatches
) -> dict[str, Any]:
    """Reconstructs, measures and saves all images.

    Unreadable and too small images are listed and skipped; ValueError if none is left.
    """
    records, skipped, thumbnails = [], [], []
    model = replace(model, tiles=tiles)
    for name, picture, image in readable_images(originals, skipped):
        codes, fake = reconstruct(model, image)
        record = {"image": name, "picture": f"images/{picture}", **measure_image(model, image, codes, fake)}
        if settings.compare_whole:
            record |= compare_to_whole(model, image, codes, fake)
        panel = panels(image, fake)
        save_panels(batches.folder / "images" / picture, panel)
        if len(records) < SHOWN:
            thumbnails += [thumbnail(part) for part in panel]
        records.append(record)
    if not records:
        image, reason = skipped[0].values()
        raise ValueError(f"none of {len(skipped)} images can be used; the first, {image}: {reason}")
    save_overview(batches.folder / "overview.png", torch.stack(thumbnails))
    return {
        "vqgan" if model.has_codes else "autoencoder": model.provenance,
        "tile": tiles.tile,
        "overlap": tiles.overlap,
        "error_map": f"mean absolute error over the channels of a panel, 0 to {ERROR_MAX} of the range",
        "mean": mean_of_records(records),
        "images": records,
        "skipped": skipped,
    }


def readable_images(originals: Originals, skipped: list[dict[str, str]]) -> Iterator[tuple[str, str, Tensor]]:
    """Yields (name, path of the picture, uint8 (C, H, W)) of each usable image; adds others to `skipped`."""
    pictures = picture_names(originals.names)
    with Progress("reconstructing", len(originals.names), "image") as bar:
        for i, name in enumerate(originals.names):
            try:
                image = originals.read(i)
            except (UnreadableImage, TooSmall) as error:
                skipped.append({"image": name, "reason": str(error)})
            else:
                yield name, pictures[i], image
            bar.update()


def mean_of_records(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """Returns the mean of each number over the images that have it."""
    names = [name for name in records[0] if name not in ("image", "picture", "width", "height", "codes")]
    columns = {name: [record[name] for record in records if record[name] is not None] for name in names}
    return {name: sum(values) / len(values) if values else None for name, values in columns.items()}


def report(results: dict[str, Any], folder: Path) -> str:
    """Formats the table of all images."""
    names = [name for name in COLUMNS if name in results["mean"]]
    rows = [("image", "pixels", "codes" if "vqgan" in results else "latents", *(COLUMNS[name] for name in names))]
    listed = results["images"][:LISTED]
    for record in [*listed, {"image": f"mean of {len(results['images'])}", **results["mean"]}]:
        size = f"{record['width']}x{record['height']}" if "width" in record else ""
        codes = f"{record['codes'][1]}x{record['codes'][0]}" if "codes" in record else ""
        numbers = ("-" if record[name] is None else f"{record[name]:.4g}" for name in names)
        rows.append((record["image"], size, codes, *numbers))
    lines = [f"\n{table(rows)}\n"]
    if len(listed) < len(results["images"]):
        lines.append(f"(the first {LISTED} images; all are in results.json)")
    lines.append(
        "PSNR: higher is better. L1: of values in [-1, 1], lower is better. seam ratio: mean difference of pixels\n"
        "across tile borders over that of other neighbours; visible seams raise it above the original's."
    )
    if "l1_to_whole" in names:
        lines.append(
            "L1 to untiled: of tiles and the image in one piece, in all, where tiles are blended, and elsewhere."
        )
    lines += [f"skipped: {skipped['image']}: {skipped['reason']}" for skipped in results["skipped"]]
    if results["skipped"]:
        lines.append(f"{len(results['skipped'])} images skipped")
    lines += [f"error maps: {results['error_map']}", str(folder / "overview.png"), str(folder / "images")]
    return "\n".join(lines)


@cache
def colour_table() -> Tensor:
    """Returns the colours of errors from 0 to ERROR_MAX: uint8 (256, 3)."""
    from matplotlib import colormaps

    return torch.from_numpy(colormaps[COLOURS](range(256), bytes=True)[:, :3].copy())


def error_map(image: Tensor, other: Tensor) -> Tensor:
    """Colours the absolute difference of two images, averaged over channels: uint8 (C, H, W) twice -> uint8 (3, H, W).

    0 has the first colour; ERROR_MAX of the range and above the last.
    """
    error = (image.short() - other.short()).abs().sum(0) / (len(image) * 255)  # (H, W) in [0, 1]
    levels = (error / ERROR_MAX * 255).round().clamp(max=255).long()
    return colour_table()[levels].permute(2, 0, 1)


def panels(image: Tensor, fake: Tensor) -> Tensor:
    """Stacks the original, the reconstruction (uint8 (C, H, W) each) and their error map: pictures (3, 3, H, W)."""
    image, fake = to_picture(image), to_picture(fake)
    return torch.stack([image, fake, error_map(image, fake)])


def save_panels(path: Path, images: Tensor) -> None:
    """Saves panels (3, 3, H, W) as a PNG, left to right."""
    save_grid(path, images, columns=3)


def thumbnail(image: Tensor) -> Tensor:
    """Fits an image (3, H, W) uint8 into a white (3, THUMBNAIL, THUMBNAIL); enlarges without smoothing."""
    from torchvision.transforms.v2 import functional as F

    height, width = image.shape[1:]
    scale = THUMBNAIL / max(height, width)
    size = [max(1, round(side * scale)) for side in (height, width)]
    mode = F.InterpolationMode.NEAREST if scale > 1 else F.InterpolationMode.BILINEAR
    small = F.resize(image, size, mode, antialias=True)
    left, top = (THUMBNAIL - size[1]) // 2, (THUMBNAIL - size[0]) // 2
    right, bottom = THUMBNAIL - size[1] - left, THUMBNAIL - size[0] - top
    return F.pad(small, [left, top, right, bottom], fill=255)


def save_overview(path: Path, thumbnails: Tensor) -> None:
    """Saves thumbnails (3 N, 3, S, S), three per image and two images per row, below a legend of error colours."""
    grid = grid_image(thumbnails, min(6, len(thumbnails)))
    canvas = Image.new("RGB", (grid.width, grid.height + LEGEND), "white")
    canvas.paste(grid, (0, LEGEND))
    draw_legend(canvas)
    with atomic_write(path) as scratch:
        canvas.save(scratch, format="PNG")


def draw_legend(canvas: Image.Image) -> None:
    """Draws the legend of the columns and the error colours at the top of a picture."""
    draw, font, middle = ImageDraw.Draw(canvas), ImageFont.load_default(14), LEGEND // 2
    bar = colour_table()[::2].expand(LEGEND - 16, -1, -1)  # (height, 128, 3)
    left = 8
    texts = "original | reconstruction | absolute error:  0", f"{ERROR_MAX:.0%} of the range or more"
    for item in (texts[0], bar, texts[1]):
        if isinstance(item, Tensor):
            canvas.paste(Image.fromarray(item.contiguous().numpy()), (left, 8))
            left += bar.shape[1] + 8
        else:
            draw.text((left, middle), item, "black", font, anchor="lm")
            left += round(draw.textlength(item, font)) + 8


if __name__ == "__main__":
    run_experiment("reconstructions", Config, measure, report, prepare=prepare, one_process=True)
