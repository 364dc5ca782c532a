"""Figures of panoptic maps: which regions there are, what they show, and standard errors over images."""

import math

import pytest
import torch

from experiments.metrics.layout.layouts import UNLABELLED, Layouts, join_layouts, named_color, read_layout
from experiments.metrics.layout.map_obedience import (
    CLASS,
    COLOR,
    EVERY,
    LEAST_PIXELS,
    MIOU,
    NO_REGION,
    REGIONS,
    REST,
    count_pixels,
    estimate_words,
    find_regions,
    jackknife,
    mean_iou,
    measure_maps,
    name_groups,
    share_by_image,
    shown_classes,
)
from experiments.metrics.layout.obedience import of_pixels, with_all
from train.datasets import shapes

PALETTE = (("red", (220, 30, 40)), ("blue", (30, 80, 220)))
GROUPS = {"all": (0, 1, 2), "things": (0, 1), "ground": (2,)}


def two_images() -> Layouts:
    """Images of 8 x 8 pixels on ground of class 2: one with two things side by side, one with a single thing."""
    owner = torch.full((2, 8, 8), -1, dtype=torch.int16)
    owner[0, :4, :4], owner[0, :4, 4:], owner[1, 4:] = 0, 1, 0
    pixels = torch.full((2, 8, 8), 2, dtype=torch.uint8)
    pixels[0, :4, :4], pixels[0, :4, 4:], pixels[1, 4:] = 0, 1, 1
    ones = torch.ones(3, dtype=torch.float64)
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 1, 1]]).double()
    args = torch.tensor([0, 0, 1]), boxes, torch.tensor([0, 1, 1]), ones, ones < 0
    return Layouts(2, *args, torch.tensor([0, 1, 1]), owner, pixels)


def painted(layouts: Layouts) -> torch.Tensor:
    """Images (N, 3, H, W) whose things have their colours."""
    images = torch.zeros(layouts.count, 3, 8, 8, dtype=torch.uint8)
    for row, image in enumerate(layouts.image.tolist()):
        color = torch.tensor(PALETTE[layouts.colors[row]][1], dtype=torch.uint8)
        images[image][:, layouts.visible_pixels(row)] = color[:, None]
    return images


def test_regions_are_things_and_the_pixels_of_other_classes():
    regions = find_regions(two_images())
    assert regions.image.tolist() == [0, 0, 1, 0, 1] and regions.classes.tolist() == [0, 1, 1, 2, 2]
    assert regions.objects.tolist() == [0, 1, 2, -1, -1]
    assert regions.labels[0, 0, [0, 7]].tolist() == [0, 1] and regions.labels[0, 7, 0] == 3
    assert regions.labels[1, [0, 7], 0].tolist() == [4, 2]


def test_things_of_a_class_are_regions_of_their_own():
    layouts = two_images()
    layouts.classes[1], layouts.pixels[0, :4, 4:] = 0, 0
    assert find_regions(layouts).classes.tolist() == [0, 0, 1, 2, 2]


def test_small_hidden_and_unlabelled_parts_are_no_regions():
    layouts = two_images()
    layouts.visible[0] = 0.1
    layouts.pixels[1, :4] = UNLABELLED
    layouts.owner[0, :4, 4:], layouts.pixels[0, :4, 4:] = -1, 2
    layouts.owner[0, 0, 8 - (LEAST_PIXELS - 1) :] = 1  # a pixel too few
    regions = find_regions(layouts)
    assert regions.classes.tolist() == [1, 2] and regions.image.tolist() == [1, 0]
    assert (regions.labels[0, :4, :4] == NO_REGION).all() and (regions.labels[1, :4] == NO_REGION).all()


def test_without_things_each_class_of_an_image_is_a_region():
    layouts = two_images()
    nothing = torch.zeros(0)
    none = Layouts(2, nothing.long(), nothing.view(0, 4), nothing.long(), nothing, nothing > 0, pixels=layouts.pixels)
    regions = find_regions(none)
    assert regions.classes.tolist() == [0, 1, 2, 1, 2] and (regions.objects == -1).all()
    with pytest.raises(ValueError, match="without maps of classes"):
        find_regions(Layouts(2, *(getattr(none, name) for name in ("image", "boxes", "classes", "visible", "crowd"))))


def test_a_region_shows_the_class_of_most_of_its_pixels():
    layouts, predicted = two_images(), two_images().pixels.clone()
    predicted[0, :3, :4] = 1  # 12 of 16 pixels of the first thing
    predicted[1, 4:6] = 2  # half of the third, in which the other half decides by the lower number
    assert shown_classes(find_regions(layouts), predicted, 3).tolist() == [1, 1, 1, 2, 2]


def test_perfect_images_have_the_best_figures_in_every_group():
    layouts = two_images()
    figures = measure_maps(painted(layouts), layouts, layouts.pixels, GROUPS, 3, PALETTE)
    assert [figures[name][REGIONS] for name in GROUPS] == [5, 3, 2]
    for name in GROUPS:
        assert figures[name][CLASS] == (1, 0) and figures[name][MIOU] == (1, 0)
    assert figures["all"][COLOR] == figures["things"][COLOR] == (1, 0) and figures["ground"][COLOR] is None


def test_wrong_class_and_colour_count_in_their_group_alone():
    layouts, predicted = two_images(), two_images().pixels.clone()
    predicted[1, :4] = 0  # the ground of the second image is taken for a thing
    layouts.colors[2] = 0  # which is blue in the image
    figures = measure_maps(painted(two_images()), layouts, predicted, GROUPS, 3, PALETTE)
    assert figures["all"][CLASS].value == 4 / 5 and figures["things"][CLASS].value == 1
    assert figures["ground"][CLASS].value == 1 / 2 and figures["things"][COLOR].value == 2 / 3
    assert figures["ground"][MIOU].value == 32 / 64 and figures["things"][MIOU].value == (16 / 48 + 1) / 2
    layouts.colors[2] = -1  # its words name no colour
    figures = measure_maps(painted(two_images()), layouts, predicted, GROUPS, 3, PALETTE)
    assert figures["things"][COLOR] == (1, None)  # of one image


def test_figures_of_all_classes_are_those_of_all_pixels():
    rng = torch.Generator().manual_seed(0)
    layouts = two_images()
    predicted = torch.randint(3, (2, 8, 8), generator=rng).to(torch.uint8)
    layouts.pixels[0, 5] = UNLABELLED
    expected = of_pixels(predicted, layouts, with_all(layouts), 3)["all"]["mIoU"]
    value = mean_iou(count_pixels(layouts, predicted, 3).sum(0)).item()
    assert value == pytest.approx(expected, abs=1e-12) and 0 < value < 1


def test_classes_that_are_not_asked_for_have_no_overlap():
    counts = torch.tensor([[4.0, 0], [2.0, 2], [2.0, 0]])  # asked, shown, right of two classes
    assert mean_iou(counts).item() == 0.5 and mean_iou(counts[:, 1:]).isnan()


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = torch.rand(20, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sums = torch.cat([values, torch.ones_like(values)], 1)
    value, error = jackknife(sums, lambda sums: sums[..., 0] / sums[..., 1])
    assert value == pytest.approx(values.mean().item())
    assert error == pytest.approx(values.std().item() / math.sqrt(20))
    assert jackknife(sums[:1], lambda sums: sums[..., 0])[1] is None


def test_regions_of_an_image_are_no_independent_answers():
    right = torch.tensor([True, True, True, True, False, False, False, False])
    image = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    value, error = share_by_image(right, torch.ones(8) > 0, image, 4)
    assert value == 0.5 and error == pytest.approx(math.sqrt(0.25 / 3))  # of four answers, not eight
    assert share_by_image(right, torch.zeros(8) > 0, image, 4) is None
    assert share_by_image(right, torch.ones(8) > 0, image, 40) == (value, error)  # images without regions say nothing
    assert share_by_image(right, image == 3, image, 4) == (0.0, None)  # of one image, no error is known


def test_groups_are_named_by_their_classes_and_the_rest_is_one():
    names = ("disc", "ring", "sky", "sand")
    assert name_groups([(1,), (2, 3)], names) == {EVERY: (0, 1, 2, 3), "ring": (1,), "sky, sand": (2, 3), REST: (0,)}
    assert [*name_groups([(0, 1), (2, 3)], names)] == [EVERY, "disc, ring", "sky, sand"]
    assert [*name_groups([], names)] == [EVERY]


def test_colours_are_those_that_words_name():
    names = ["red", "blue"]
    assert [named_color(words, names) for words in ("a Blue ring", "red-blue disc", "a redder ring")] == [1, 0, -1]
    size = (64, 64)
    item = shapes.build(shapes.Config(shapes_count=4), "train").read_at_size(1, size)
    names = [name for name, _ in shapes.PALETTE]
    colors = item.pop("box_color")
    by_words = read_layout(item, size, names)
    assert torch.equal(by_words["colors"], colors.as_subclass(torch.Tensor)) and len(colors) > 0
    assert read_layout(item, size)["colors"] is None
    regions = find_regions(join_layouts([by_words]))
    assert sorted({*regions.classes.tolist()}) == sorted({*item["segment_class"].tolist()})


def test_a_figure_is_written_with_its_error():
    assert estimate_words([0.5, 0.01]) == "0.500 ± 0.010"
    assert estimate_words(None) == "-" and estimate_words((0.25, None)) == "0.250"
