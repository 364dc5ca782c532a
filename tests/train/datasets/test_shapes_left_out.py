"""Kinds of scenes, things, grounds and pairs that are left out of `shapes`: the rest stays, and is as even."""

from collections import Counter
from functools import cache

import numpy as np
import pytest

from train.datasets import shapes
from train.datasets._shapes_scene import (
    COLORS,
    GROUNDS,
    KINDS,
    PAIRS,
    THINGS,
    choose_kind,
    choose_number,
    draw_scene,
)

FEWER_THINGS, FEWER_GROUNDS = ("disc", "square", "triangle", "ring"), ("sky", "sand", "water")


@cache
def val_scenes():
    return [draw_scene(0, "val", index) for index in range(1000)]


def share(flags):
    return np.mean(list(flags))


def test_kinds_left_out_are_replaced_and_others_stay():
    kept = ("free", "neighbours", "small")
    for scene in val_scenes()[:200]:
        held_out = draw_scene(0, "val", scene.index, kept[::-1])
        assert held_out.kind in kept
        assert held_out.file_name == scene.file_name  # what does not depend on the kind stays anyway
        assert (held_out.things == scene.things) == (scene.kind in kept)
    kinds = Counter(choose_kind((i + 0.5) / 7000, kept) for i in range(7000))
    assert kinds == {"free": 4000, "neighbours": 2000, "small": 1000}


def test_a_choice_stays_if_it_is_allowed_and_is_even_anyway():
    us = [(i + 0.5) / 5400 for i in range(5400)]
    pairs = [(int(6 * u), choose_number(u, range(6), [0, 2, 3])) for u in us]
    assert all(chosen == number for number, chosen in pairs if number in (0, 2, 3))
    others = Counter((number, chosen) for number, chosen in pairs if number in (1, 4, 5))
    assert others == {(number, chosen): 300 for number in (1, 4, 5) for chosen in (0, 2, 3)}


@cache
def simpler_scenes():
    return [draw_scene(0, "val", i, things=FEWER_THINGS[::-1], grounds=FEWER_GROUNDS[::-1]) for i in range(1000)]


def test_things_left_out_are_replaced():
    kept = {THINGS.index(name) for name in FEWER_THINGS}
    in_order = [draw_scene(0, "val", index, things=FEWER_THINGS) for index in range(20)]
    assert [scene.things for scene in in_order] == [scene.things for scene in simpler_scenes()[:20]]
    numbers = [thing.kind for scene in simpler_scenes() for thing in scene.things]
    assert set(numbers) == kept
    np.testing.assert_allclose([share(n == each for n in numbers) for each in kept], 1 / 4, atol=0.025)
    for scene in simpler_scenes():
        kinds = [thing.kind for thing in scene.things]
        if scene.kind == "nested" and len(kinds) > 1:
            assert kinds[0] != kinds[1]
        if scene.kind == "neighbours":
            assert kinds[0] == kinds[1]
    pairs = zip(val_scenes(), simpler_scenes(), strict=True)
    same = [scene.things == other.things for scene, other in pairs if {t.kind for t in scene.things} <= kept]
    assert share(same) > 0.95 and len(same) > 200  # but where a class left out had found no place


def test_grounds_left_out_are_replaced_and_others_stay():
    kept = {GROUNDS.index(name) for name in FEWER_GROUNDS}
    for scene, other in zip(val_scenes(), simpler_scenes(), strict=True):
        assert set(other.grounds) <= kept and len(other.grounds) == len(scene.grounds) == len(set(other.grounds))
        assert (other.grounds == scene.grounds) == (set(scene.grounds) <= kept)
        assert all(vars(other)[name] == vars(scene)[name] for name in ("kind", "horizon", "camera", "light", "weather"))
    pairs = Counter(scene.grounds for scene in simpler_scenes() if len(scene.grounds) == 2)
    assert len(pairs) == 6 and max(pairs.values()) < 1.4 * min(pairs.values())


@pytest.mark.parametrize("name", THINGS)
def test_one_class_of_things_makes_every_kind_of_scene(name):
    scenes = [draw_scene(0, "train", index, things=(name,)) for index in range(100)]
    assert {thing.kind for scene in scenes for thing in scene.things} == {THINGS.index(name)}
    assert {scene.kind for scene in scenes} == set(KINDS)
    assert min(scene.visible.min() for scene in scenes) > 0.3
    assert all(len(scene.things) >= 2 for scene in scenes if scene.kind in ("neighbours", "occlusion"))
    assert share(len(scene.things) >= 2 for scene in scenes if scene.kind == "nested") > 0.8


def pairs_in(scenes):
    return {f"{COLORS[thing.color]}-{THINGS[thing.kind]}" for scene in scenes for thing in scene.things}


def test_pairs_held_out_occur_in_validation_alone():
    held_out = ("red-disc", "blue-ring", "green-disc")
    config = shapes.Config(shapes_held_out=held_out)
    scenes = {split: [shapes.build(config, split).scene(i) for i in range(400)] for split in ("train", "val", "judge")}
    assert pairs_in(scenes["train"]) == {*PAIRS} - {*held_out}
    assert pairs_in(scenes["val"]) == pairs_in(scenes["judge"]) == {*PAIRS}
    assert [scene.things for scene in scenes["val"]] == [scene.things for scene in val_scenes()[:400]]
    plain = [draw_scene(0, "train", i) for i in range(400)]
    both = [*zip(plain, scenes["train"], strict=True)]
    assert all([t.kind for t in a.things] == [t.kind for t in b.things] for a, b in both)
    same = [a.things == b.things for a, b in both if not pairs_in([a]) & {*held_out}]
    assert len(same) > 200 and all(same)
    discs = Counter(thing.color for _, scene in both for thing in scene.things if THINGS[thing.kind] == "disc")
    assert len(discs) == 4 and max(discs.values()) < 1.6 * min(discs.values())


def test_validation_may_have_the_pairs_held_out_alone():
    config = shapes.Config(shapes_held_out=("red-disc", "blue-ring"), shapes_val_pairs="held_out")
    scenes = [shapes.build(config, "val").scene(i) for i in range(200)]
    assert pairs_in(scenes) == {"red-disc", "blue-ring"} and min(len(scene.things) for scene in scenes) >= 1
    assert {scene.kind for scene in scenes} == set(KINDS)
    assert not pairs_in(shapes.build(config, "train").scene(i) for i in range(200)) & {"red-disc", "blue-ring"}
    one = shapes.Config(shapes_held_out=("red-disc",), shapes_val_pairs="held_out")
    assert pairs_in(shapes.build(one, "val").scene(i) for i in range(100)) == {"red-disc"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes_held_out": ("red-disk",)}, "got shapes_held_out red-disk, wanted a colour and a class.*red-disc"),
        (
            {"shapes_held_out": tuple(f"{color}-bow" for color in COLORS)},
            "shapes_held_out with all colours of bow: leave",
        ),
        (
            {"shapes_val_pairs": "held_out"},
            "got shapes_val_pairs held_out and no pair held out: pass --shapes_held_out",
        ),
    ],
)
def test_pairs_that_leave_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        shapes.Config(**options)
