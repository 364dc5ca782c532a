"""Hidden parts of images drawn again, several times each, and whether a classifier's answer survives."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.editing import draw, in_batches, save_pictures, save_rows
from experiments.experiment import write_results
from experiments.given_images import Given, centred, given_images, with_margins, with_masks, with_part
from experiments.kept import forget
from experiments.metrics.survival import Share, agreement, answers, classifier_of
from experiments.table import table
from train.cli import to_dict
from train.generate import TrainedSampler

GREY = 128  # of what is hidden


def inputs(config: Any, trained: TrainedSampler) -> Given:
    """The images that the flags name, and what of them is hidden. ValueError where nothing is."""
    wanted, files = config.inpainting, config.given.image
    given = given_images(files, config.given.n_images, trained)
    larger = wanted.outpaint is not None or wanted.shape is not None
    if wanted.hide is not None:
        given = with_part(given, wanted.hide)
    if wanted.mask or (files and wanted.hide is None and not larger):
        given = with_masks(given, files, wanted.mask, trained.data.size)
    if not files and wanted.hide is None and not larger:
        given = with_part(given, "bottom")
    if larger:
        factor = trained.space.factor
        grid = tuple(side // factor for side in trained.data.size)
        margins = wanted.outpaint or centred(grid, wanted.shape)
        given = with_margins(given, tuple(factor * margin for margin in margins))
    whole = [name for name, hidden in zip(given.names, given.hidden, strict=True) if not hidden.any()]
    if whole:
        raise ValueError(f"nothing of {whole[0]} is hidden: a mask is white where the image is to be filled in")
    return given


def canvas_of(given: Given, trained: TrainedSampler) -> tuple[int, int]:
    """Height and width of what is drawn, in the sampler's space."""
    height, width = (side // trained.space.factor for side in given.hidden.shape[1:])
    return height, width


def inpaint(config: Any, trained: TrainedSampler, given: Given, folder: Path) -> dict[str, Any] | None:
    """The pictures, results.json and its content, in the main process; the others take part."""
    count, label = config.inpainting.results, config.inpainting.label
    how = {"window_stride": config.inpainting.window_stride}

    def filled(places: list[int], hidden: Tensor, first_seed: int) -> Tensor:
        rows = [place // count for place in places]
        start = trained.space.begun(given.image[rows].to(trained.device), hidden[rows].to(trained.device))
        labels = None if label is None else [label] * len(places)
        shape = tuple(start.keep.shape[1:])
        return draw(trained, config, start, [first_seed + p for p in places], labels, shape=shape, **how)

    n = len(given) * count
    made = in_batches("inpainted", n, lambda places: filled(places, given.hidden, 0), config, trained, folder)
    same_size = tuple(given.hidden.shape[1:]) == trained.data.size  # a classifier knows no larger canvases
    classifier, blank = classifier_of(trained.data) if same_size else None, None
    if classifier is not None:
        nothing = torch.ones_like(given.hidden)
        blank = in_batches("all hidden", n, lambda places: filled(places, nothing, n), config, trained, folder)
    if made is None:
        return None
    results = by_image(made, given, config.inpainting.paste)
    run = to_dict(config) | {"step": trained.step} | trained.origin
    save_pictures(folder, given.names, results, [str(i) for i in range(count)], run)
    masked = torch.where(given.hidden.unsqueeze(1), GREY, given.image)
    save_rows(folder / "inpainted.png", given.image, masked, results)
    found = {
        "n_images": len(given),
        "results_per_image": count,
        "hidden_share": given.hidden.float().mean().item(),
        "visible_pixels": "those given" if config.inpainting.paste else "as the model renders them",
    }
    if classifier is not None:
        of_originals = answers(classifier, given.image)
        found["survival"] = agreement(of_originals, answers(classifier, results))._asdict()
        chance = answers(classifier, blank.view(len(given), count, *blank.shape[1:]))
        found["chance"] = agreement(of_originals, chance)._asdict()
    write_results(folder, found | {"run": run})
    forget(folder)
    return found


def by_image(made: Tensor, given: Given, paste: bool) -> Tensor:
    """(N results, C, H, W) -> (N, results, C, H, W), with the visible pixels of the given images on them if asked."""
    made = made.view(len(given), -1, *made.shape[1:])
    return torch.where(given.hidden[:, None, None], made, given.image.unsqueeze(1)) if paste else made


def told_in_words(found: dict[str, Any]) -> str:
    rows = [
        ("inpainting", ""),
        ("images, results of each", f"{found['n_images']}, {found['results_per_image']}"),
        ("hidden", f"{100 * found['hidden_share']:.0f} % of the pixels"),
        ("visible pixels in the pictures", found["visible_pixels"]),
    ]
    if "survival" in found:
        rows.append(("the classifier's answer survives", str(Share(**found["survival"]))))
        rows.append(("chance: as often with all hidden", str(Share(**found["chance"]))))
    return table(rows)
