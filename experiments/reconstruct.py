"""Images through a trained VQGAN and back: originals, reconstructions and error maps, at any size."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import _root
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from experiments.harness.batches import ResumableBatches
from experiments.harness.experiment import (
    ExperimentSetup,
    FirstStageModelConfig,
    FirstStageOutputConfig,
    run_experiment,
)
from experiments.harness.images import save_grid
from experiments.harness.report import table
from experiments.metrics.image_pairs import l1, psnr
from train.data.loading import build_dataset
from train.data.transforms import ValueRange, as_uint8, range_for_image, to_float, to_item, to_pixels, to_uint8
from train.datasets import UnreadableImage, files_fingerprint
from train.datasets._decode import decode
from train.datasets.folder import SUFFIXES, list_images
from train.distributed import DistContext
from train.execution import autocast
from train.files import atomic_write
from train.first_stage import FirstStage
from train.logging import grid_image
from vq.tiles import decode_tiled, encode_tiled, seam_ratio, seams, tile_starts

SHOWN = 16  # images in the overview, and validation images where no number is given
LISTED = 40  # rows of the printed table
ERROR_MAX = 0.25  # where the error map's colours end, a share of the range from black to white
COLOURS = "inferno"
THUMBNAIL = 192  # side, pixels
LEGEND = 30  # height, pixels


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Reconstruction."""

    images: str | None = None
    """An image, or a folder of images in any tree; left out, validation images as the VQGAN was trained on them."""
    n_images: int | None = None
    """The first so many; left out, all of --images, 16 validation images."""
    size: int | None = None
    """Resize the short side to this many pixels; left out, images of --images keep their own size."""
    tile: int | None = None
    """Side of the tiles that larger images are cut into, codes; left out, as large as the images trained on."""
    overlap: int | None = None
    """What neighbouring tiles share, codes; left out, a quarter of a tile."""
    batch_size: int = 1
    """Tiles computed at once: memory grows with it."""
    compare_whole: bool = False
    """Also reconstruct each image whole, and say how far its tiles are from that; memory grows with the image."""

    def __post_init__(self):
        for name in ("n_images", "size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"got {name} {value}, wanted at least 1: pass --{name} N")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Reconstructs images; overview.png, images/<name>.png and results.json lie in <logs_root>/<log_dir>."""

    reconstruction: ReconstructionConfig
    model: FirstStageModelConfig
    output: FirstStageOutputConfig


def prepare(config: Config, model: FirstStage, world: DistContext) -> ExperimentSetup:
    """The images, and how they are cut. ValueError, FileNotFoundError where there are none, or no such tiles."""
    settings = config.reconstruction
    tiles, originals = make_tiles(settings, model), find_originals(settings, model)
    of = "" if settings.images is None else f"_{Path(settings.images).resolve().stem}"
    origin = {"image_files": originals.fingerprint}
    return ExperimentSetup((settings, tiles, originals), origin, f"reconstructions{of}")


class TooSmall(ValueError):
    """An image that has not one code."""


class Tiles(NamedTuple):
    """How an image is cut: lengths in codes, and how many tiles are computed together."""

    tile: int
    overlap: int
    at_once: int = 1


def make_tiles(config: ReconstructionConfig, first: FirstStage) -> Tiles:
    """What the flags say of tiles, the rest from the grid that the VQGAN was trained on; ValueError for no tiles."""
    tile = max(first.vqgan.grid) if config.tile is None else config.tile
    overlap = tile // 4 if config.overlap is None else config.overlap
    tile_starts(tile, tile, overlap)  # refuses what are no tiles
    return Tiles(tile, overlap, config.batch_size)


class Originals(NamedTuple):
    """Images by number."""

    names: list[str]
    read: Callable[[int], Tensor]  # uint8 (C, H, W); `UnreadableImage` or `TooSmall`
    fingerprint: str


def find_originals(config: ReconstructionConfig, first: FirstStage) -> Originals:
    """The images that the flags name, or validation images."""

    def fit(image: Any) -> Tensor:
        return preprocess(image, config.size, first.data.n_channels, first.vqgan.config.factor, first.data.data_range)

    if config.images is not None:
        return images_of_path(Path(config.images).expanduser(), config.n_images, fit)
    return validation_images(first, config.n_images or SHOWN, None if config.size is None else fit)


def images_of_path(path: Path, count: int | None, fit: Callable[[Any], Tensor]) -> Originals:
    """One file, or the first `count` images of a folder, sorted by path; all of them without `count`.

    FileNotFoundError where there is no such path, ValueError for a folder without images.
    """
    if path.is_file():
        root, names = path.parent, [path.name]
    elif path.is_dir():
        try:
            root, names = path, list_images(path)[:count]
        except ValueError as error:
            raise ValueError(f"{path} holds no image: wanted {' '.join(SUFFIXES)} files, check --images") from error
    else:
        raise FileNotFoundError(f"{path} not found: pass an image or a folder of images as --images")
    return Originals(names, lambda i: fit(decode(root / names[i])), files_fingerprint(root, names))


def validation_images(first: FirstStage, count: int, fit: Callable[[Any], Tensor] | None) -> Originals:
    """The first images of the validation split, cut as in training without `fit`."""
    dataset = build_dataset(first.data, first.reader, "val")

    def read(index: int) -> Tensor:
        image, data = dataset[index]["image"], first.data
        if fit is not None:
            return fit(image)
        return as_uint8(
            to_item({"image": image}, data.size, data.n_channels, data.data_range)["image"].as_subclass(Tensor)
        )

    names = [f"val_{i:06d}" for i in range(min(len(dataset), count))]
    return Originals(names, read, dataset.fingerprint())


def picture_names(names: list[str]) -> list[str]:
    """Paths of pictures, all different: the names without their suffix, with it where two would be one."""
    short = [str(Path(name).with_suffix("")) for name in names]
    distinct = len({name.lower() for name in short}) == len(short)
    return [f"{name}.png" for name in (short if distinct else names)]


def preprocess(
    image: Any, size: int | None, n_channels: int, factor: int, data_range: ValueRange | None = None
) -> Tensor:
    """An image of a file or a data set as uint8 (n_channels, H, W), H and W multiples of `factor`: its centre, at its
    own size.

    `size` is what its short side is resized to first. `TooSmall` for one that is smaller than `factor` pixels.
    """
    from torchvision.transforms.v2 import functional as F

    pixels = to_pixels(image, n_channels, range_for_image(image, data_range))
    if size is not None:
        pixels = F.resize(pixels, [size], F.InterpolationMode.BICUBIC, antialias=True)
    height, width = F.get_size(pixels)
    if height < factor or width < factor:
        raise TooSmall(f"it is {width}x{height} pixels, wanted at least {factor}x{factor}: pass --size N to enlarge it")
    cut = F.center_crop(pixels, [height // factor * factor, width // factor * factor])
    return as_uint8((F.to_image(cut) if isinstance(cut, Image.Image) else cut).as_subclass(Tensor))


@torch.inference_mode()
def reconstruct(first: FirstStage, image: Tensor, tiles: Tiles | None) -> tuple[Tensor, Tensor]:
    """uint8 (C, H, W) -> ids (h, w), the reconstruction; whole where there are no `tiles`."""
    x, vqgan = to_float(image)[None], first.vqgan
    with autocast(first.device, first.amp):
        if tiles is None:
            ids = vqgan.encode(x.to(first.device))
            fake = vqgan.decode(ids)
        else:
            ids = encode_tiled(vqgan, x, tiles.tile, tiles.overlap, tiles_per_batch=tiles.at_once)
            fake = decode_tiled(vqgan, ids, tiles.tile, tiles.overlap, tiles_per_batch=tiles.at_once)
    return ids[0].cpu(), to_uint8(fake[0]).cpu()


def measure_image(first: FirstStage, image: Tensor, ids: Tensor, fake: Tensor, tiles: Tiles) -> dict[str, Any]:
    """What is said of one image; None stands for what is not there, or infinite."""
    factor, (height, width) = first.vqgan.config.factor, image.shape[1:]
    rows, columns = (seams(side, tiles.tile, tiles.overlap, factor) for side in ids.shape)
    found = {
        "psnr": psnr(image[None], fake[None]).item(),
        "l1": l1(image[None], fake[None]).item(),
        "bits_per_pixel": math.log2(first.vqgan.config.codebook_size) * ids.numel() / (height * width),
        "seams": seam_ratio(fake[None], rows, columns, factor),
        "seams_of_original": seam_ratio(image[None], rows, columns, factor),
    }
    found = {name: value if math.isfinite(value) else None for name, value in found.items()}
    return {"width": width, "height": height, "codes": list(ids.shape), **found}


def compare_to_whole(first: FirstStage, image: Tensor, ids: Tensor, fake: Tensor) -> dict[str, float]:
    """How far the tiled reconstruction is from the one of the whole image at once."""
    whole_ids, whole = reconstruct(first, image, None)
    same = (whole_ids == ids).float().mean().item()
    return {"l1_to_whole": l1(whole[None], fake[None]).item(), "codes_as_whole": same}


def measure(
    settings: ReconstructionConfig, tiles: Tiles, originals: Originals, model: FirstStage, batches: ResumableBatches
) -> dict[str, Any]:
    """All pictures, and what is said of each.

    Images that cannot be read, or are too small, are named and left out; ValueError where none is left.
    """
    records, skipped, shown = [], [], []
    for name, picture, image in readable_images(originals, skipped):
        ids, fake = reconstruct(model, image, tiles)
        record = {"image": name, "picture": f"images/{picture}", **measure_image(model, image, ids, fake, tiles)}
        if settings.compare_whole:
            record |= compare_to_whole(model, image, ids, fake)
        panel = panels(image, fake)
        save_panels(batches.folder / "images" / picture, panel)
        if len(records) < SHOWN:
            shown += [thumbnail(part) for part in panel]
        records.append(record)
    if not records:
        image, reason = skipped[0].values()
        raise ValueError(f"not one of {len(skipped)} images can be used; the first, {image}: {reason}")
    save_overview(batches.folder / "overview.png", torch.stack(shown))
    return {
        "vqgan": model.origin,
        "tile": tiles.tile,
        "overlap": tiles.overlap,
        "error_map": f"mean absolute error over channels, 0 to {ERROR_MAX} of the range",
        "mean": mean_of_records(records),
        "images": records,
        "skipped": skipped,
    }


def readable_images(originals: Originals, skipped: list[dict[str, str]]) -> Iterator[tuple[str, str, Tensor]]:
    """(name, path of its picture, uint8 (C, H, W)) of each image of use; others go to `skipped`, with reasons."""
    pictures = picture_names(originals.names)
    for i, name in enumerate(tqdm(originals.names, "reconstructing", unit="img", dynamic_ncols=True, mininterval=1.0)):
        try:
            image = originals.read(i)
        except (UnreadableImage, TooSmall) as error:
            skipped.append({"image": name, "reason": str(error)})
        else:
            yield name, pictures[i], image


def mean_of_records(records: list[dict[str, Any]]) -> dict[str, float | None]:
    """The mean of each number over the images that have it."""
    names = [name for name in records[0] if name not in ("image", "picture", "width", "height", "codes")]
    found = {name: [record[name] for record in records if record[name] is not None] for name in names}
    return {name: sum(values) / len(values) if values else None for name, values in found.items()}


def report(results: dict[str, Any], folder: Path) -> str:
    """A table for people, and where the pictures lie."""
    whole = "l1_to_whole" in results["mean"]
    rows = [("image", "pixels", "codes", "bits/pixel", "PSNR dB", "L1", "seams", "of original")]
    rows[0] += ("L1 to whole", "same codes") * whole
    names = "bits_per_pixel", "psnr", "l1", "seams", "seams_of_original"
    names += ("l1_to_whole", "codes_as_whole") * whole
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
        "L1: images in [-1, 1]. seams: neighbouring pixels differ so many times as much across the borders of tiles as "
        "elsewhere; compare with the original's, at the same places."
    )
    lines += [f"left out: {skipped['image']}: {skipped['reason']}" for skipped in results["skipped"]]
    if results["skipped"]:
        lines.append(f"{len(results['skipped'])} images left out")
    lines += [f"error maps: {results['error_map']}", str(folder / "overview.png"), str(folder / "images")]
    return "\n".join(lines)


@cache
def colour_table() -> Tensor:
    """(256, 3) uint8: the colours of errors from 0 to ERROR_MAX."""
    from matplotlib import colormaps

    return torch.from_numpy(colormaps[COLOURS](range(256), bytes=True)[:, :3].copy())


def error_map(image: Tensor, other: Tensor) -> Tensor:
    """Two images (C, H, W) uint8 -> (3, H, W) uint8: the colour of their absolute difference, mean over channels.

    0 is the first colour; ERROR_MAX of the range, and all above, the last.
    """
    error = (image.short() - other.short()).abs().sum(0) / (len(image) * 255)  # (H, W) in [0, 1]
    levels = (error / ERROR_MAX * 255).round().clamp(max=255).long()
    return colour_table()[levels].permute(2, 0, 1)


def panels(image: Tensor, fake: Tensor) -> Tensor:
    """Original and reconstruction (C, H, W) uint8 -> (3, 3, H, W): both, in colour, and their error map."""
    return torch.stack([image.expand(3, -1, -1), fake.expand(3, -1, -1), error_map(image, fake)])


def save_panels(path: Path, shown: Tensor) -> None:
    """A PNG of panels (3, 3, H, W), left to right."""
    save_grid(path, shown, columns=3)


def thumbnail(image: Tensor) -> Tensor:
    """(3, H, W) uint8 -> (3, THUMBNAIL, THUMBNAIL): the whole of it, on white; small ones keep their square pixels."""
    from torchvision.transforms.v2 import functional as F

    height, width = image.shape[1:]
    scale = THUMBNAIL / max(height, width)
    size = [max(1, round(side * scale)) for side in (height, width)]
    how = F.InterpolationMode.NEAREST if scale > 1 else F.InterpolationMode.BILINEAR
    small = F.resize(image, size, how, antialias=True)
    left, top = (THUMBNAIL - size[1]) // 2, (THUMBNAIL - size[0]) // 2
    right, bottom = THUMBNAIL - size[1] - left, THUMBNAIL - size[0] - top
    return F.pad(small, [left, top, right, bottom], fill=255)


def save_overview(path: Path, thumbnails: Tensor) -> None:
    """A PNG of thumbnails (3 N, 3, S, S), three to an image, two images to a row, below the colours of errors."""
    grid = grid_image(thumbnails, min(6, len(thumbnails)))
    canvas = Image.new("RGB", (grid.width, grid.height + LEGEND), "white")
    canvas.paste(grid, (0, LEGEND))
    draw_legend(canvas)
    with atomic_write(path) as scratch:
        canvas.save(scratch, format="PNG")


def draw_legend(canvas: Image.Image) -> None:
    """Says at the top of a picture what its columns and the colours of errors are."""
    draw, font, middle = ImageDraw.Draw(canvas), ImageFont.load_default(14), LEGEND // 2
    bar = colour_table()[::2].expand(LEGEND - 16, -1, -1)  # (height, 128, 3)
    left = 8
    for thing in ("original, reconstruction, error:  0", bar, f"{ERROR_MAX:.0%} of the range, or more"):
        if isinstance(thing, Tensor):
            canvas.paste(Image.fromarray(thing.contiguous().numpy()), (left, 8))
            left += bar.shape[1] + 8
        else:
            draw.text((left, middle), thing, "black", font, anchor="lm")
            left += round(draw.textlength(thing, font)) + 8


if __name__ == "__main__":
    run_experiment("reconstructions", Config, measure, report, prepare=prepare, one_process=True)
