"""The figures of obedience, with judges that answer by rule: their values by bucket, and the wrong layouts."""

import pytest
import torch
from torch import nn

from experiments.metrics.layout import obedience
from experiments.metrics.layout.crops import SIDE
from experiments.metrics.layout.detections import Detections
from experiments.metrics.layout.fitting import Recipe, fit, shuffled_batches
from experiments.metrics.layout.judges import Judges, Scenes
from experiments.metrics.layout.layouts import UNLABELLED, Layouts
from experiments.metrics.layout.obedience import (
    ALL,
    Measurement,
    feature_distance,
    inside_boxes,
    make_reference,
    of_detections,
    of_pixels,
    with_all,
    wrong_layouts,
)

LEVELS = (50, 150)  # brightness of an object of each class


class ByBrightness(nn.Module):
    """Classifies a crop by the brightness of its middle; background is nothing."""

    def forward(self, crops):
        level = crops[:, 0, SIDE // 2, SIDE // 2].float()
        return -(level[:, None] - torch.tensor([*map(float, LEVELS), 0.0])).abs()

    def features(self, crops):
        return crops.float().mean((2, 3))


class Scenery(nn.Module):
    """Answers with these maps of classes, and finds no objects."""

    objects = None

    def __init__(self, pixels):
        super().__init__()
        self.pixels = nn.functional.one_hot(pixels.long(), 3).permute(0, 3, 1, 2).float()

    def forward(self, images):
        return None, self.pixels[: len(images)]


def paint(boxes, classes) -> Scenes:
    """Scenes of 20 x 20 pixels with one object each."""
    images = torch.zeros(len(boxes), 3, 20, 20, dtype=torch.uint8)
    pixels = torch.full((len(boxes), 20, 20), 2, dtype=torch.uint8)
    for image, maps, (left, top, right, bottom), number in zip(images, pixels, boxes, classes, strict=True):
        image[:, top:bottom, left:right] = LEVELS[number]
        maps[top:bottom, left:right] = number
    n = len(boxes)
    layouts = Layouts(
        n,
        torch.arange(n),
        torch.tensor(boxes).double() / 20,
        torch.tensor(classes),
        torch.ones(n).double(),
        torch.zeros(n).bool(),
        owner=torch.where(pixels < 2, 0, -1).to(torch.int16),
        pixels=pixels,
    )
    return Scenes(images, layouts, list(range(n)))


@pytest.fixture
def scenes():
    return paint([(0, 0, 10, 10), (12, 12, 16, 16), (10, 4, 20, 16), (2, 12, 6, 16)], [0, 1, 1, 0])


def measure(scenes, **changes) -> Measurement:
    judges = Judges(ByBrightness(), Scenery(scenes.layouts.pixels), {})
    fields = {"judges": judges, "reference": make_reference(scenes), "palette": None} | changes
    return Measurement(**fields, n_classes=3, seed=0)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(obedience, "CAS_RECIPE", Recipe(steps=2, batch_size=4, peak_lr=1e-3))


def test_perfect_scenes_have_the_best_figures(scenes, short):
    figures = measure(scenes)(scenes.images, scenes.layouts)
    assert list(figures) == [ALL, "small", "occluded", "contact", "overlap"]
    assert figures[ALL]["objects"] == 4 and figures["small"]["objects"] == 2 and figures["occluded"]["objects"] == 0
    for bucket in (ALL, "small"):
        assert figures[bucket]["crop accuracy"] == figures[bucket]["mIoU"] == figures[bucket]["pixel accuracy"] == 1
        assert figures[bucket]["crop FD"] == pytest.approx(0, abs=1e-6)
    assert figures["occluded"]["crop accuracy"] is None is figures["occluded"]["mIoU"]
    assert 0 <= figures[ALL]["CAS"] <= 1 and "colour" not in figures[ALL] and "AP" not in figures[ALL]


def test_a_wrong_object_lowers_its_own_bucket(scenes, short):
    images = scenes.images.clone()
    images[1] = 0  # a small object is missing
    figures = measure(scenes)(images, scenes.layouts)
    assert figures[ALL]["crop accuracy"] == 0.75 and figures["small"]["crop accuracy"] == 0.5
    assert figures[ALL]["crop FD"] > 100


def test_ignored_objects_do_not_count(scenes, short):
    scenes.layouts.visible[1] = 0.2
    images = scenes.images.clone()
    images[1] = 0
    figures = measure(scenes)(images, scenes.layouts)
    assert figures[ALL]["objects"] == 3 and figures[ALL]["crop accuracy"] == 1


def test_colours_are_counted_by_bucket(scenes, short):
    palette = (("dark", (50, 50, 50)), ("light", (150, 150, 150)))
    layouts = Layouts(**scenes.layouts.__dict__ | {"colors": torch.tensor([0, 0, 1, 0])})  # the second is light
    figures = measure(scenes, palette=palette)(scenes.images, layouts)
    assert figures[ALL]["colour"] == 0.75 and figures["small"]["colour"] == 0.5


def test_pixels_count_within_boxes_and_where_labelled(scenes):
    predicted, layouts = scenes.layouts.pixels.clone(), scenes.layouts
    predicted[1, 12:16, 12:14] = 2  # half of an object of class 1, of 136 pixels of it
    predicted[0, 19] = 0  # background taken for class 0, of 116 pixels
    figures = of_pixels(predicted, layouts, with_all(layouts), 3)
    background = 4 * 400 - 116 - 136
    ious = [116 / 136, 128 / 136, (background - 20) / (background + 8)]
    assert figures[ALL]["mIoU"] == pytest.approx(sum(ious) / 3)
    assert figures[ALL]["pixel accuracy"] == pytest.approx(1 - 28 / 1600)
    assert figures["small"]["pixel accuracy"] == pytest.approx(24 / 32)
    assert figures["small"]["mIoU"] == pytest.approx((1 + 8 / 16) / 2)
    layouts.pixels[1, 12:16, 12:14] = UNLABELLED
    assert of_pixels(predicted, layouts, with_all(layouts), 3)["small"]["pixel accuracy"] == 1


def test_pixels_of_a_box_are_those_whose_centre_it_covers(scenes):
    layouts = Layouts(
        **scenes.layouts.__dict__ | {"boxes": torch.tensor([[0.026, 0.0, 0.126, 0.974]]).double().expand(4, 4)}
    )
    inside = inside_boxes(layouts, torch.tensor([False, True, False, False]))
    assert inside[1, 5].nonzero()[:, 0].tolist() == [1, 2] and inside[1, :, 1].sum() == 19 and inside.sum() == 38


def test_spurious_objects_are_means_over_images(scenes):
    place = torch.tensor([[0.0, 0.75, 0.25, 1.0]]).double()
    found = Detections(torch.tensor([1]), place, torch.tensor([0]), torch.tensor([0.9]).double())
    figures = of_detections(found, scenes.layouts, with_all(scenes.layouts))
    assert figures[ALL]["spurious"] == 0.25 and figures["small"]["spurious"] == 0.5
    assert figures["occluded"]["spurious"] is None is figures["occluded"]["AP"] and figures[ALL]["AP"] == 0


def test_large_detections_do_not_make_small_ones_wrong(scenes):
    boxes, classes = scenes.layouts.boxes, scenes.layouts.classes
    wrong = torch.tensor([[0.5, 0.5, 1.0, 1.0]]).double()
    found = Detections(
        torch.tensor([3, 1, 2, 3, 0]),
        torch.cat([wrong, boxes[1:], boxes[:1]]),
        torch.cat([torch.tensor([0]), classes[1:], classes[:1]]),
        torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]).double(),
    )
    figures = of_detections(found, scenes.layouts, with_all(scenes.layouts))
    assert figures["small"]["AP"] == pytest.approx(1) and figures[ALL]["AP"] < 1


def test_every_wrong_layout_is_of_another_item(scenes):
    wrong = wrong_layouts(scenes.layouts, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(wrong.boxes, scenes.layouts.boxes.roll(-1, 0))
    repeated = wrong_layouts(scenes.layouts, torch.tensor([5, 5, 6, 6]))  # samples of two layouts, two of each
    assert torch.equal(repeated.boxes, scenes.layouts.boxes.roll(-2, 0))
    with pytest.raises(ValueError, match="too few different layouts"):
        wrong_layouts(scenes.layouts, torch.tensor([5, 5, 5, 6]))


def test_the_check_is_of_crops_or_of_pixels(scenes):
    assert measure(scenes).recognise(scenes.images, scenes.layouts) == ("crop accuracy", 1)
    without = measure(scenes, judges=Judges(None, Scenery(scenes.layouts.pixels), {}), reference=None)
    assert without.recognise(scenes.images, scenes.layouts) == ("mIoU", 1)
    assert without(scenes.images, scenes.layouts)[ALL].keys() == {"objects", "mIoU", "pixel accuracy"}


def test_distances_need_two_crops(scenes):
    features = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    assert feature_distance(features, features[:1]) is None
    assert feature_distance(features, features + 2) == pytest.approx(12, rel=1e-5)


def test_fitting_is_deterministic_and_keeps_the_global_state():
    def loss(network, rows, generator):
        return network(torch.rand(len(rows), 2, generator=generator)).square().mean()

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    networks = [fit(lambda: nn.Linear(2, 1), loss, 5, Recipe(3, 2, 0.1), seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(1), expected)
    a, b, c = (network.weight for network in networks)
    assert torch.equal(a, b) and not torch.equal(a, c) and not a.requires_grad
    with pytest.raises(ValueError, match="nothing to train a judge on"):
        fit(lambda: nn.Linear(2, 1), loss, 0, Recipe(3, 2, 0.1), 0)


def test_batches_show_every_row_once_before_any_again():
    batches = shuffled_batches(7, 3, torch.Generator().manual_seed(0))
    rows = torch.cat([next(batches) for _ in range(7)])
    assert [sorted(part.tolist()) for part in rows.split(7)] == [list(range(7))] * 3
    assert sorted(next(shuffled_batches(2, 5, torch.Generator())).tolist()) == [0, 1]  # fewer rows than a batch
