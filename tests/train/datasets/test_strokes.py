"""Rotation and thickness of handwritten digits."""

import math

import numpy as np
import pytest

from models.conditions.numbers import NumberField
from train.datasets import ArrayDataset, digits, mnist
from train.datasets._strokes import draw_rotations, rotate, stroke_thickness, with_strokes


def bar(width, length=20, degrees=0.0, size=28, samples=16):
    """A bright bar of a length and width in pixels, turned anticlockwise, with grey borders: (size, size) uint8."""
    y, x = (np.mgrid[: size * samples, : size * samples] + 0.5) / samples - size / 2
    angle = math.radians(-degrees)  # y points down
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    inside = (abs(along) < length / 2) & (abs(across) < width / 2)
    shares = inside.reshape(size, samples, size, samples).mean((1, 3))
    return np.rint(255 * shares).astype(np.uint8)


def test_the_thickness_of_a_bar_is_its_width_but_for_the_ends():
    for width in (2, 3, 4, 6):
        expected = 2 * 20 * width / (2 * 20 + 2 * width)
        measured = stroke_thickness(np.stack([bar(width, degrees=degrees) for degrees in (0, 10, 30, 45, 90)]))
        assert np.abs(measured / expected - 1).max() < 0.08


def test_thickness_does_not_depend_on_brightness_and_place():
    images = np.stack([bar(4), np.roll(bar(4), (5, 2), (0, 1)), bar(4) // 3])
    measured = stroke_thickness(images)
    assert np.allclose(measured, measured[0], rtol=1e-2) and np.isnan(stroke_thickness(images * 0)).all()


def test_images_turn_anticlockwise():
    turned = rotate(np.stack([bar(4), bar(4)]), np.array([30.0, 0.0])).astype(float)
    assert np.abs(turned[0] - bar(4, degrees=30)).mean() < 4 < 20 < np.abs(turned[0] - bar(4, degrees=-30)).mean()
    assert np.array_equal(turned[1], bar(4))


def test_digits_are_as_they_were_by_default():
    dataset = digits.build(digits.Config(), "val")
    assert dataset[3].keys() == {"image", "label"} and dataset.number_fields == {}
    assert dataset.fingerprint()[:16] == "3751789ff780b62e"


def test_items_have_the_numbers_that_were_asked_for():
    plain = digits.build(digits.Config(), "train")
    config = digits.Config(digits_rotation=40, digits_thickness=True)
    dataset = digits.build(config, "train")
    assert dataset.number_fields == {"rotation": NumberField(-40, 40), "thickness": NumberField(0, 4)}
    angles = dataset.numbers["rotation"]
    assert -40 < angles.min() < -39.5 and 39.5 < angles.max() < 40 and abs(angles.mean()) < 2
    item = dataset[7]
    assert item["rotation"] == angles[7] and type(item["thickness"]) is float
    assert np.array_equal(item["image"], rotate(plain.images[7:8], angles[7:8])[0])
    assert item["thickness"] == stroke_thickness(item["image"][None])[0]
    unmeasured = digits.build(digits.Config(digits_rotation=40), "train")
    assert len({each.fingerprint() for each in (plain, dataset, unmeasured)}) == 3
    whole = digits.build(digits.Config(digits_rotation=180), "train")
    assert whole.number_fields["rotation"].cyclic


def test_an_angle_belongs_to_the_image_whatever_the_split():
    images, _ = digits.load_all()
    angles = {}
    for fraction in (0.2, 0.5):
        for split in ("train", "val"):
            dataset = digits.build(digits.Config(digits_rotation=40, val_fraction=fraction), split)
            plain = digits.build(digits.Config(val_fraction=fraction), split)
            for image, angle in zip(plain.images, dataset.numbers["rotation"], strict=True):
                assert angles.setdefault(image.tobytes(), angle) == angle
    assert len(angles) > 0.99 * len(images)
    assert np.array_equal(draw_rotations(5, 0), draw_rotations(9, 0)[:5]) and not np.array_equal(
        draw_rotations(5, 0), draw_rotations(5, 1)
    )


def test_mnist_has_them_too(tmp_path, tiny):
    tiny.save_mnist(tmp_path)
    config = mnist.Config(data_dir=str(tmp_path), digits_rotation=10, digits_thickness=True)
    train, val = (mnist.build(config, split) for split in ("train", "val"))
    assert {*train[0]} == {"image", "label", "rotation", "thickness"}
    assert train.numbers["rotation"][0] != val.numbers["rotation"][0]


def test_an_angle_above_180_degrees_is_refused():
    with pytest.raises(ValueError, match="got digits_rotation 200, wanted at most 180"):
        digits.Config(digits_rotation=200)


def test_only_some_digits_and_images_are_used():
    whole, nines = (digits.build(digits.Config(only_digits=only), "train") for only in ((), (9,)))
    assert len(whole) == 1438 and {*nines.labels.tolist()} == {9} and nines.n_classes == 10
    assert np.array_equal(nines.images, whole.images[whole.labels == 9])
    few = digits.build(digits.Config(only_digits=(3, 9), max_images=5), "train")
    assert np.array_equal(few.images, whole.images[np.isin(whole.labels, (3, 9))][:5])


def test_each_digit_keeps_its_own_rotation():
    whole, nines = (digits.build(digits.Config(only_digits=only, digits_rotation=40), "val") for only in ((), (9,)))
    kept = whole.labels == 9
    assert np.array_equal(nines.numbers["rotation"], whole.numbers["rotation"][kept])
    assert np.array_equal(nines.images, whole.images[kept])


def test_digits_without_images_are_refused(tmp_path):
    labels = np.zeros(4, np.int64)
    dataset = ArrayDataset(np.zeros((4, 8, 8), np.uint8), labels, 10)
    with pytest.raises(ValueError, match="got only_digits 9, of which there are no images"):
        with_strokes(dataset, digits.Config(only_digits=(9,)), np.zeros(4))
    with pytest.raises(ValueError, match="got only_digits .10,., wanted at most 9"):
        digits.Config(only_digits=(10,))
