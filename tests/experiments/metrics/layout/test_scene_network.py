"""The scene network: targets and decoding are inverse, the loss is least at the target, sizes of images."""

import pytest
import torch
from torch import nn

from experiments.metrics.layout import scene_network
from experiments.metrics.layout.detections import average_precision
from experiments.metrics.layout.fitting import Recipe
from experiments.metrics.layout.layouts import UNLABELLED, Layouts
from experiments.metrics.layout.scene_network import (
    SceneNetwork,
    detect,
    object_loss,
    object_targets,
    segment,
    train_scene_network,
)

SHAPE = torch.Size((2, 3, 8, 16))  # images, classes, cells


def example(**changes) -> Layouts:
    boxes = [[0.1, 0.2, 0.3, 0.8], [0.5, 0.1, 0.75, 0.5], [0.52, 0.15, 0.95, 0.9], [0.9, 0.9, 1, 1]]
    fields = {
        "count": 2,
        "image": torch.tensor([0, 0, 1, 1]),
        "boxes": torch.tensor(boxes).double(),
        "classes": torch.tensor([2, 0, 1, 1]),
        "visible": torch.ones(4).double(),
        "crowd": torch.zeros(4).bool(),
    }
    return Layouts(**fields | changes)


class Oracle(nn.Module):
    """Outputs what it is given, whatever the images."""

    def __init__(self, objects=None, pixels=None):
        super().__init__()
        self.outputs = objects, pixels

    def forward(self, images):
        return self.outputs


def perfect_outputs(layouts: Layouts) -> torch.Tensor:
    """Heat maps whose sigmoid is the target, with the boxes at the centres."""
    target, (image, row, column), wanted = object_targets(layouts, SHAPE)
    boxes = torch.zeros(SHAPE[0], 4, *SHAPE[2:])
    boxes[image, :, row, column] = wanted
    return torch.cat([target.logit(eps=1e-4), boxes], 1)


def test_perfect_outputs_decode_to_the_boxes_asked_for():
    layouts = example()
    found = detect(Oracle(perfect_outputs(layouts)), torch.zeros(2, 3, 16, 32))
    best = found[found.scores > 0.99]
    assert best.image.tolist() == [0, 0, 1, 1] and sorted(best.classes.tolist()) == [0, 1, 1, 2]
    assert average_precision(found, layouts) == pytest.approx((1, 1, 1))
    order = [(best.boxes - box).abs().sum(1).argmin() for box in layouts.boxes]
    assert (best.boxes[torch.stack(order)] - layouts.boxes).abs().max() < 1e-6


def test_detections_of_later_batches_keep_their_image(monkeypatch):
    class ByFirstPixel(nn.Module):
        def forward(self, images):
            return perfect_outputs(example())[images[:, 0, 0, 0].long()], None

    images = torch.zeros(3, 3, 16, 32)
    images[1:] = 1
    monkeypatch.setattr(scene_network, "EVALUATED", 1)
    detections = detect(ByFirstPixel(), images)
    assert detections[detections.scores > 0.99].image.tolist() == [0, 0, 1, 1, 2, 2]


def test_heat_maps_peak_at_centres_and_fall_with_the_side():
    target, _, _ = object_targets(example(), SHAPE)
    assert target[0, 2, 4, 3] == 1 and target[0, 0, 2, 10] == 1 and (target == 1).sum() == 4
    sigma = 0.25 * 16 / 6  # cells, of box 1: 4 cells wide, 3.2 high
    assert target[0, 0, 2, 11].item() == pytest.approx(torch.tensor(-1 / (2 * (3.2 / 6) ** 2)).exp().item())
    assert sigma > 3.2 / 6 and target[0, 1].max() == 0


def test_crowds_and_hidden_objects_are_no_targets():
    layouts = example(crowd=torch.tensor([True, False, False, False]), visible=torch.tensor([1, 0.2, 1, 1]).double())
    target, (image, _, _), _ = object_targets(layouts, SHAPE)
    assert target[0].max() == 0 and image.tolist() == [1, 1]


def test_the_loss_is_least_at_the_target():
    layouts = example()
    outputs = perfect_outputs(layouts)
    best = object_loss(outputs, layouts)
    assert best < 0.3
    moved = torch.roll(outputs, 1, 3)
    wider, flat = outputs.clone(), outputs.clone()
    wider[:, -4] += 0.5
    flat[:, :3] = -4
    assert all(object_loss(worse, layouts) > 2 * best + 0.1 for worse in (moved, flat))
    assert object_loss(wider, layouts) == pytest.approx(best.item() + 0.5**2 / 2)
    assert object_loss(outputs, example(crowd=torch.ones(4).bool())) > 0  # no object: the heat is wrong


@pytest.mark.parametrize("size", [(16, 32), (15, 21), (40, 16)])
def test_outputs_have_the_size_of_the_image(size, monkeypatch):
    monkeypatch.setattr(scene_network, "MAX_SIDE", 32)
    network = SceneNetwork(3, 2, 5).eval()
    objects, pixels = network(torch.zeros(2, 3, *size, dtype=torch.uint8))
    assert pixels.shape == (2, 5, *size) and objects.shape[:2] == (2, 6)
    reduced = [side * 32 // max(*size, 32) for side in size]
    assert list(objects.shape[2:]) == [-(-side // 2) for side in reduced]


def test_heads_are_left_out_where_nothing_is_known():
    objects, pixels = SceneNetwork(1, 0, 4)(torch.zeros(2, 1, 8, 8))
    assert objects is None and pixels.shape == (2, 4, 8, 8)
    objects, pixels = SceneNetwork(1, 3, 0)(torch.zeros(2, 1, 8, 8))
    assert pixels is None and objects.shape == (2, 7, 4, 4)


def test_segments_are_the_most_likely_classes():
    logits = torch.zeros(2, 4, 3, 5)
    logits[0, 2], logits[1, 3] = 1, 1
    assert segment(Oracle(pixels=logits), torch.zeros(2, 3, 3, 5)).unique(dim=0)[:, 0, 0].tolist() == [2, 3]


def test_unlabelled_pixels_do_not_count():
    images = torch.randint(256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pixels = torch.full((4, 8, 8), UNLABELLED, dtype=torch.uint8)
    pixels[:, :4] = 1
    network = SceneNetwork(1, 0, 2).eval()
    expected = nn.functional.cross_entropy(network(images)[1][:, :, :4], pixels[:, :4].long())
    assert network.loss(images, Layouts(4, *empty(), pixels=pixels)).item() == pytest.approx(expected.item())


def test_larger_images_come_in_smaller_batches(monkeypatch):
    sizes, whole = [], SceneNetwork.loss
    monkeypatch.setattr(
        SceneNetwork, "loss", lambda self, images, _: sizes.append(len(images)) or whole(self, images, _)
    )
    for side in (16, 64, 128):
        layouts = Layouts(40, *empty(), pixels=torch.zeros(40, side, side, dtype=torch.uint8))
        images = torch.zeros(40, 1, side, side, dtype=torch.uint8)
        train_scene_network(images, layouts, 2, Recipe(steps=1, batch_size=32, peak_lr=1e-3), seed=0)
    assert sizes == [32, 8, 4]


def empty():
    """The fields of layouts without objects."""
    none = torch.zeros(0)
    return none.long(), torch.zeros(0, 4).double(), none.long(), none.double(), none.bool()
