"""Small judges of shapes rank real scenes above shifted, blurred and wrong ones, in the expected order and size."""

import pytest
import torch
from torch.nn import functional as F

from experiments.metrics.layout import obedience
from experiments.metrics.layout.crop_classifier import RECIPE, train_crop_classifier
from experiments.metrics.layout.judges import Judges, load_scenes, open_scenes
from experiments.metrics.layout.obedience import ALL, CAS_RECIPE, Measurement, make_reference, wrong_layouts
from experiments.metrics.layout.scene_network import RECIPE as SCENE_RECIPE
from experiments.metrics.layout.scene_network import train_scene_network
from train.config import DataConfig
from train.datasets import shapes

pytestmark = pytest.mark.slow


def shifted(images: torch.Tensor, pixels: int) -> torch.Tensor:
    return torch.cat([images[..., :1].expand(-1, -1, -1, pixels), images[..., :-pixels]], 3)


@pytest.fixture(scope="module")
def figures():
    """All figures of 250 real scenes of 32 pixels and of changed ones, by kind."""
    data = DataConfig(dataset="shapes", img_size=32)
    mine, val = (open_scenes(data, shapes.Config(), split) for split in ("judge", "val"))
    images, layouts, items = load_scenes(mine, range(1500), "judge")
    n_classes = len(shapes.Shapes.region_classes)
    crops = train_crop_classifier(images, layouts, n_classes, RECIPE._replace(steps=350), 0, with_nothing=True)
    network = train_scene_network(images, layouts, n_classes, SCENE_RECIPE._replace(steps=300, batch_size=32), 0)
    real = load_scenes(val, range(250), "real")
    patch = pytest.MonkeyPatch()
    patch.setattr(obedience, "CAS_RECIPE", CAS_RECIPE._replace(steps=100))
    judges, palette = Judges(crops, network, {}), shapes.PALETTE
    measure = Measurement(judges, make_reference(load_scenes(mine, range(300), "")), palette, n_classes, seed=0)
    noise = 25 * torch.randn(real.images.shape, generator=torch.Generator().manual_seed(0))
    blurred = F.interpolate(F.avg_pool2d(real.images.float(), 2), scale_factor=2, mode="bilinear")
    changed = {
        "real": real.images,
        **{f"shifted {pixels}": shifted(real.images, pixels) for pixels in (1, 2, 4)},
        "noise": (real.images + noise).round().clamp(0, 255).to(torch.uint8),
        "blurred": blurred.round().to(torch.uint8),
    }
    kinds = {name: measure(each, real.layouts) for name, each in changed.items()}
    kinds["wrong"] = measure(real.images, wrong_layouts(real.layouts, torch.tensor(real.items)))
    patch.undo()
    return {name: each[ALL] for name, each in kinds.items()}


def test_crop_accuracy_is_as_sensitive_as_expected(figures):
    accuracy = {name: each["crop accuracy"] for name, each in figures.items()}
    assert accuracy["real"] > 0.95 and accuracy["noise"] > 0.9
    assert 0.75 < accuracy["shifted 1"] < 0.95 and 0.65 < accuracy["blurred"] < 0.95
    assert 0.1 < accuracy["shifted 2"] < 0.5 and accuracy["shifted 4"] < 0.1 and accuracy["wrong"] < 0.08
    order = [accuracy[name] for name in ("real", "noise", "blurred", "shifted 2", "shifted 4")]
    assert order == sorted(order, reverse=True)


def test_colours_are_right_and_at_chance_under_wrong_layouts(figures):
    assert figures["real"]["colour"] > 0.99 and abs(figures["wrong"]["colour"] - 1 / 6) < 0.06
    assert figures["blurred"]["colour"] > 0.85


@pytest.mark.parametrize("figure", ["AP", "AP50", "mIoU", "pixel accuracy", "crop FD"])
def test_every_figure_falls_with_the_shift(figures, figure):
    values = [figures[name][figure] for name in ("real", "shifted 1", "shifted 2", "shifted 4")]
    assert values == sorted(values, reverse=figure != "crop FD") and len({*values}) == 4
    wrong, real = figures["wrong"][figure], figures["real"][figure]
    assert wrong > 5 * real if figure == "crop FD" else wrong < real / 2


def test_objects_at_other_places_are_spurious(figures):
    assert figures["wrong"]["spurious"] > 3 * figures["real"]["spurious"]
    assert figures["shifted 4"]["spurious"] > 2 * figures["real"]["spurious"]


def test_a_classifier_of_wrong_crops_fails_on_real_ones(figures):
    assert figures["real"]["CAS"] > 0.8 and figures["wrong"]["CAS"] < 0.35
