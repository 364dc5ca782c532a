"""Average precision by COCO's rules, against hand-made cases and an independent brute force; spurious objects."""

import json
import random

import pytest
import torch

from experiments.metrics.layout.detections import (
    THRESHOLDS,
    Detections,
    average_precision,
    count_spurious,
    match,
    read_detections,
)
from experiments.metrics.layout.layouts import Layouts


def asked(*objects, count=1, visible=None, crowd=None) -> Layouts:
    """Layouts of objects (image, class, box)."""
    n = len(objects)
    return Layouts(
        count=count,
        image=torch.tensor([each[0] for each in objects], dtype=torch.long),
        boxes=torch.tensor([each[2] for each in objects], dtype=torch.float64).view(-1, 4),
        classes=torch.tensor([each[1] for each in objects], dtype=torch.long),
        visible=torch.ones(n).double() if visible is None else torch.tensor(visible).double(),
        crowd=torch.zeros(n).bool() if crowd is None else torch.tensor(crowd),
    )


def found(*rows) -> Detections:
    """Detections (image, class, box, score)."""
    return Detections(
        torch.tensor([each[0] for each in rows], dtype=torch.long),
        torch.tensor([each[2] for each in rows], dtype=torch.float64).view(-1, 4),
        torch.tensor([each[1] for each in rows], dtype=torch.long),
        torch.tensor([each[3] for each in rows], dtype=torch.float64),
    )


A, B, C = (0.0, 0.0, 0.4, 0.4), (0.5, 0.5, 0.9, 0.9), (0.0, 0.6, 0.2, 0.9)


def test_perfect_detections_have_precision_one():
    layouts = asked((0, 0, A), (0, 1, B), (1, 0, C), count=2)
    detections = found((0, 0, A, 0.9), (0, 1, B, 0.2), (1, 0, C, 0.5))
    assert average_precision(detections, layouts) == pytest.approx((1, 1, 1))


def test_a_surer_wrong_detection_halves_the_precision():
    result = average_precision(found((0, 0, C, 0.9), (0, 0, A, 0.5)), asked((0, 0, A)))
    assert result == pytest.approx((0.5, 0.5, 0.5))
    assert average_precision(found((0, 0, C, 0.1), (0, 0, A, 0.5)), asked((0, 0, A))) == pytest.approx((1, 1, 1))


def test_half_the_objects_give_the_recalls_up_to_a_half():
    """Recalls 0, .01, ..., .50 are reached: 51 of 101."""
    result = average_precision(found((0, 0, A, 0.9)), asked((0, 0, A), (0, 0, B)))
    assert result.AP50 == pytest.approx(51 / 101)


def test_thresholds_count_by_their_overlap():
    whole, part = (0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 0.375)  # IoU .75: 6 of the 10 thresholds, of which .75 is one
    result = average_precision(found((0, 0, part, 0.9)), asked((0, 0, whole)))
    assert result == pytest.approx((0.6, 1, 1))


def test_an_object_is_taken_once_and_a_crowd_many_times():
    twice = found((0, 0, A, 0.9), (0, 0, A, 0.8), (0, 0, B, 0.7))
    assert average_precision(twice, asked((0, 0, A), (0, 0, B))).AP50 == pytest.approx((51 + 50 * 2 / 3) / 101)
    inside = found((0, 0, A, 0.9), (0, 0, A, 0.8), (0, 0, B, 0.7))
    with_crowd = asked((0, 0, (0.0, 0.0, 0.5, 0.5)), (0, 0, B), crowd=[True, False])
    assert average_precision(inside, with_crowd).AP50 == pytest.approx(1)


def test_hidden_objects_neither_count_nor_make_wrong():
    layouts = asked((0, 0, A), (0, 0, B), visible=[0.29, 1.0])
    assert average_precision(found((0, 0, A, 0.9), (0, 0, B, 0.5)), layouts).AP50 == pytest.approx(1)
    assert average_precision(found((0, 0, B, 0.5)), layouts).AP50 == pytest.approx(1)
    just_seen = asked((0, 0, A), (0, 0, B), visible=[0.3, 1.0])
    assert average_precision(found((0, 0, B, 0.5)), just_seen).AP50 == pytest.approx(51 / 101)


def test_a_class_that_was_not_asked_for_does_not_count():
    assert average_precision(found((0, 1, A, 0.9)), asked((0, 0, A))).AP == 0
    assert average_precision(found((0, 1, A, 0.9), (0, 0, A, 0.1)), asked((0, 0, A))).AP == pytest.approx(1)
    assert average_precision(found((0, 0, A, 0.9)), asked()).AP is None


def test_only_the_hundred_surest_of_an_image_count():
    many = [(0, 0, C, 0.9)] * 100
    assert average_precision(found(*many[:99], (0, 0, A, 0.5)), asked((0, 0, A))).AP50 == pytest.approx(0.01)
    assert average_precision(found(*many, (0, 0, A, 0.5)), asked((0, 0, A))).AP50 == 0


def test_objects_outside_a_bucket_are_ignored():
    layouts = asked((0, 0, A), (0, 0, B))
    detections = found((0, 0, A, 0.9), (0, 0, B, 0.8), (0, 0, C, 0.85))
    counted, eligible = torch.tensor([False, True]), torch.tensor([True, True, False])
    assert average_precision(detections, layouts, counted).AP50 == pytest.approx(0.5)
    assert average_precision(detections, layouts, counted, eligible).AP50 == pytest.approx(1)


def test_a_box_that_counts_goes_before_an_ignored_one():
    iou = torch.tensor([[0.6, 0.9]], dtype=torch.float64)
    hit, on_ignored = match(iou, torch.tensor([False, True]), torch.zeros(2).bool())
    assert hit[:, 0].tolist() == [True] * 9 + [False]
    assert on_ignored[:, 0].tolist() == [False] * 3 + [True] * 6 + [False]


# An independent implementation, from the definition


def overlap(a, b, crowd):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return common / (area_a if crowd else area_a + area_b - common)


def brute_force(rows, objects, ignored, crowd, n_images, threshold):
    """Average precision at one threshold: for each recall, the best precision of any cut at that recall or more."""
    of_classes = []
    for number in {each[1] for each, skip in zip(objects, ignored, strict=True) if not skip}:
        outcomes = []  # (score, 1 right, 0 wrong), without those on ignored boxes
        for index in range(n_images):
            left = [k for k, each in enumerate(objects) if each[:2] == (index, number)]
            mine = sorted((each for each in rows if each[:2] == (index, number)), key=lambda each: -each[3])[:100]
            for _, _, box, score in mine:
                fits = [k for k in left if overlap(box, objects[k][2], crowd[k]) >= threshold]
                fits = [k for k in fits if not ignored[k]] or fits
                best = max(fits, key=lambda k: (overlap(box, objects[k][2], crowd[k]), k), default=None)
                if best is None or not ignored[best]:
                    outcomes.append((score, int(best is not None)))
                if best is not None and not crowd[best]:
                    left.remove(best)
        outcomes.sort(key=lambda each: -each[0])
        wanted = sum(not skip for each, skip in zip(objects, ignored, strict=True) if each[1] == number)
        points = []  # (right, precision) of each cut
        for cut in range(1, len(outcomes) + 1):
            right = sum(each[1] for each in outcomes[:cut])
            points.append((right, right / cut))
        recalls = [max((p for right, p in points if 100 * right >= k * wanted), default=0) for k in range(101)]
        of_classes.append(sum(recalls) / 101)
    return sum(of_classes) / len(of_classes)


@pytest.mark.parametrize("seed", range(12))
def test_average_precision_is_that_of_a_brute_force(seed):
    draw = random.Random(seed)

    def box():
        left, top = draw.uniform(0, 0.6), draw.uniform(0, 0.6)
        return left, top, left + draw.uniform(0.1, 0.4), top + draw.uniform(0.1, 0.4)

    objects = sorted((draw.randrange(4), draw.randrange(2), box()) for _ in range(25))
    crowd = [draw.random() < 0.1 for _ in objects]
    visible = [draw.choice([0.2, 0.5, 1.0]) for _ in objects]
    rows = []
    for index, number, place in objects:
        for _ in range(draw.randrange(3)):
            near = tuple(side + draw.gauss(0, 0.03) for side in place)
            rows.append((index, number if draw.random() < 0.8 else 1 - number, near, draw.random()))
    rows += [(draw.randrange(4), draw.randrange(2), box(), draw.random()) for _ in range(10)]
    ignored = [c or v < 0.3 for c, v in zip(crowd, visible, strict=True)]
    expected = [brute_force(rows, objects, ignored, crowd, 4, threshold) for threshold in THRESHOLDS]
    result = average_precision(found(*rows), asked(*objects, count=4, visible=visible, crowd=crowd))
    assert result == pytest.approx((sum(expected) / 10, expected[0], expected[5]), abs=1e-9)
    assert 0 < result.AP < result.AP50 < 1


# Spurious objects and external detectors


def test_spurious_objects_match_no_box_of_any_class():
    layouts = asked((0, 0, A), (1, 0, B), (1, 0, (0.0, 0.0, 0.8, 0.8)), count=3, crowd=[False, False, True])
    detections = found(
        (0, 1, A, 0.9),  # of another class, at the place of a box
        (0, 0, C, 0.9),  # spurious
        (0, 0, C, 0.3),  # not sure enough
        (1, 0, A, 0.9),  # in the crowd
        (2, 1, A, 0.9),  # in an image without objects
    )
    assert count_spurious(detections, layouts).tolist() == [1, 0, 1]


def test_external_detections_are_read_in_fractions(tmp_path):
    file = tmp_path / "detections.json"
    file.write_text(json.dumps([{"image_id": 1, "category_id": 2, "bbox": [8, 4, 16, 2], "score": 0.5, "more": 1}]))
    detections = read_detections(file, 2, 3, (8, 32))
    assert detections.boxes.tolist() == [[0.25, 0.5, 0.75, 0.75]] and detections.image.tolist() == [1]
    assert detections.classes.tolist() == [2] and detections.scores.tolist() == [0.5]


@pytest.mark.parametrize(
    "text, message",
    {
        '{"annotations": []}': "holds a dict, wanted a list of",
        "[": "is not JSON",
        "[1]": "detection 0 is 1, wanted",
        '[{"image_id": 2, "category_id": 0, "bbox": [0, 0, 1, 1], "score": 1}]': "has image_id 2, wanted 0 to 1",
        '[{"image_id": 0, "category_id": 90, "bbox": [0, 0, 1, 1], "score": 1}]': "has category_id 90, wanted 0 to 2",
        '[{"image_id": 0, "category_id": 0, "bbox": [0, 0, -1, 1], "score": 1}]': "wanted [left, top, width, height]",
        '[{"image_id": 0, "category_id": 0, "bbox": [0, 0, NaN, 1], "score": 1}]': "",
        '[{"image_id": 0, "category_id": 0, "bbox": 3, "score": 1}]': "wanted [left, top, width, height]",
    }.items(),
)
def test_other_files_of_detections_are_refused(tmp_path, text, message):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(ValueError) as error:
        read_detections(tmp_path / "d.json", 2, 3, (8, 8))
    assert message in str(error.value)


def test_a_missing_file_of_detections_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass a detector's COCO results"):
        read_detections(tmp_path / "none.json", 1, 1, (8, 8))
