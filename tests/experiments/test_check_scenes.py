"""The check of scenes: which scenes are asked for, what is found in images, what is counted, and the command."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from experiments import check_scenes
from experiments.check_scenes import (
    BOTH,
    CLASS,
    COLOR,
    COUNTS,
    FLOOR,
    HELD_OUT,
    NUMBER,
    PLACES,
    REAL,
    SAMPLES,
    SEEN,
    compute_figures,
    draw_picture,
    plan_requests,
    report,
    requested_images,
    scenes_of,
)
from experiments.harness.batches import ResumableBatches
from experiments.metrics.layout import scene_network
from experiments.metrics.layout.detections import Detections, without_overlaps
from experiments.metrics.layout.judges import load_scenes, open_scenes
from experiments.metrics.layout.scene_network import Contents, find_contents
from helpers.tiny_runs import DDPM, ROOT, call, parse_config
from train.config import DataConfig
from train.datasets import shapes
from train.datasets._shapes_scene import COLORS, GROUNDS, THINGS

DATA = DataConfig(dataset="shapes", img_size=32)
READER = shapes.Config(shapes_things=("square", "ring"), shapes_held_out=("red-square", "blue-ring"))
N = 2  # images of a pair and number


@pytest.fixture(scope="module")
def planned():
    return plan_requests(DATA, READER, N)


@pytest.fixture(scope="module")
def requests(planned):
    return planned[0]


def contents_of(
    requests, things_of=lambda each: [(each.thing, each.color)] * each.count, grounds_of=lambda each: each.grounds
):
    """What is found in images that show `things_of` each request, (class, colour) each, on `grounds_of` it."""
    things = torch.zeros(len(requests), len(THINGS), len(COLORS), dtype=torch.long)
    for row, request in enumerate(requests):
        for thing, color in things_of(request):
            things[row, thing, color] += 1
    return Contents(things, torch.tensor([grounds_of(request) for request in requests]))


def figures_of(requests, **shown):
    """The figures of such samples beside real scenes that show all."""
    return compute_figures(requests, contents_of(requests, **shown), contents_of(requests))


def rights(figures, kind, images=SAMPLES):
    return [figures["kinds"][kind][name][images]["right"] for name in (CLASS, COLOR, BOTH)]


def test_every_pair_is_asked_for_as_often(requests):
    asked = [(each.pair, each.count) for each in requests]
    pairs = {(THINGS.index(name), color) for name in ("square", "ring") for color in range(len(COLORS))}
    assert {*asked} == {(pair, count) for pair in pairs for count in COUNTS}
    assert all(asked.count(each) == N for each in {*asked})
    held_out = {f"{COLORS[each.color]}-{THINGS[each.thing]}" for each in requests if each.held_out}
    assert held_out == {"red-square", "blue-ring"}


def test_captions_say_what_is_asked_for(requests):
    numbers = {1: "a {} {}", 2: "two {} {}s", 3: "three {} {}s"}
    for each in requests:
        phrase = numbers[each.count].format(COLORS[each.color], THINGS[each.thing]).replace("a orange", "an orange")
        grounds = " over ".join(dict.fromkeys(GROUNDS[number] for number in each.grounds))
        assert each.caption.startswith((f"{phrase}, {grounds}", f"{phrase} in front of {grounds}, a "))
    assert len({each.caption.partition(" in front")[1] for each in requests}) == 2  # both kinds of captions


def test_all_pairs_are_asked_for_in_the_same_scenes(requests):
    scenes = {pair: [each.scene for each in requests if each.pair == pair] for pair in {each.pair for each in requests}}
    assert len({tuple(each) for each in scenes.values()}) == 1
    grounds = {(each.scene, each.grounds) for each in requests}
    assert len(grounds) == len({each.scene for each in requests})


def test_captions_by_template_are_those_of_validation():
    data = DataConfig(dataset="shapes", img_size=8, captions="templates")
    reader = shapes.Config(shapes_things=("bow",), shapes_held_out=("red-bow",))
    captions = {each.caption for each in plan_requests(data, reader, N)[0] if each.count == 2 and each.held_out}
    assert captions <= {"this is two red bows", "a photograph in which one sees two red bows"} and captions


@pytest.fixture
def oracle(monkeypatch):
    """Makes the networks find what there is in scenes, and returns a function to give them these."""

    def use(layouts):
        scores = torch.full((len(layouts),), 0.9, dtype=torch.float64)
        found = Detections(layouts.image, layouts.boxes, layouts.classes, scores)
        monkeypatch.setattr(scene_network, "detect", lambda network, images: found)
        monkeypatch.setattr(scene_network, "segment", lambda network, images: layouts.pixels)

    return use


def test_what_there_is_is_found(oracle):
    source = open_scenes(DATA, shapes.Config(shapes_kinds=("free", "small")), "val")
    scenes = load_scenes(source, range(60), "scenes")
    oracle(scenes.layouts)
    things, grounds = find_contents(None, scenes.images)
    wanted = torch.zeros_like(things)
    where = scenes.layouts.image, scenes.layouts.classes, scenes.layouts.colors
    wanted.index_put_(where, torch.ones(len(scenes.layouts)).long(), accumulate=True)
    same = (things == wanted).flatten(1).all(1)
    assert same.double().mean() > 0.95, same  # but for a colour that rain or a neighbour hides
    locations = [source[index]["location"].split("-") for index in scenes.items]
    assert grounds.tolist() == [[GROUNDS.index(each[0]), GROUNDS.index(each[-1])] for each in locations]


def test_real_scenes_show_what_their_captions_say(planned, oracle):
    requests, images = planned
    only = {"shapes_things": ("ring",), "shapes_held_out": ("blue-ring",), "shapes_val_pairs": "held_out"}
    source = open_scenes(DATA, shapes.Config(shapes_kinds=("free",), **only), "val")
    rows = [i for i, each in enumerate(requests) if each.pair == (THINGS.index("ring"), COLORS.index("blue"))]
    asked, scenes = [requests[i] for i in rows], load_scenes(source, [requests[i].scene for i in rows], "scenes")
    assert torch.equal(images[rows], scenes.images)
    oracle(scenes.layouts)
    assert all(each.all() for each in check_scenes.judge(asked, find_contents(None, images[rows])).values())


def test_things_that_are_doubtful_or_found_twice_do_not_count(oracle, monkeypatch):
    scenes = load_scenes(open_scenes(DATA, shapes.Config(shapes_kinds=("free",)), "val"), [0, 1], "scenes")
    oracle(scenes.layouts)
    found = scene_network.detect(None, None)
    weak = Detections(found.image, found.boxes, found.classes, torch.full((len(found.image),), 0.2).double())
    shown = find_contents(None, scenes.images).things
    assert shown.sum() == len(scenes.layouts)
    twice = Detections(
        found.image.repeat_interleave(2),
        *(each.repeat_interleave(2, 0) for each in (found.boxes, found.classes, found.scores)),
    )
    twice.scores[1::2], twice.classes[1::2] = 0.5, (twice.classes[1::2] + 1) % len(THINGS)  # also as another class
    monkeypatch.setattr(scene_network, "detect", lambda *_: twice)
    assert torch.equal(find_contents(None, scenes.images).things, shown)
    oracle(scenes.layouts)
    monkeypatch.setattr(scene_network, "segment", lambda *_: torch.full((2, 32, 32), len(THINGS)))
    assert find_contents(None, scenes.images).things.sum() == 0
    oracle(scenes.layouts)
    monkeypatch.setattr(scene_network, "detect", lambda *_: weak)
    assert find_contents(None, scenes.images).things.sum() == 0


def test_of_things_in_one_place_the_surest_counts():
    boxes = [[0.1, 0.1, 0.5, 0.5], [0.12, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.5], [0.3, 0.1, 0.7, 0.5]]
    image, scores = torch.tensor([0, 0, 1, 1]), torch.tensor([0.5, 0.6, 0.4, 0.9], dtype=torch.float64)
    kept = without_overlaps(Detections(image, torch.tensor(boxes).double(), torch.tensor([2, 3, 2, 3]), scores))
    assert (kept.image.tolist(), kept.classes.tolist()) == ([0, 1, 1], [3, 2, 3])  # 1 of 3 shared is no overlap
    assert len(without_overlaps(kept[torch.zeros(3).bool()]).image) == 0


def test_a_model_that_shows_everything_is_right_throughout(requests):
    figures = figures_of(requests)
    for kind in (SEEN, HELD_OUT):
        assert rights(figures, kind) == rights(figures, kind, REAL) == [1, 1, 1]
        assert rights(figures, kind, FLOOR) == pytest.approx([1 / 2, 1 / 6, 1 / 12])  # of 2 classes and 6 colours
    assert [figures["kinds"][kind][BOTH][SAMPLES]["n"] for kind in (SEEN, HELD_OUT)] == [10 * N, 2 * N]
    assert [row[SAMPLES] for row in figures[NUMBER]] == [{"n": 12 * N, "right": 1}] * 3
    assert figures[PLACES][SAMPLES] == {"n": 36 * N, "right": 1}


def test_other_colours_of_held_out_pairs_are_found_out(requests):
    other = lambda each: [(each.thing, (each.color + each.held_out) % 6)] * each.count  # noqa: E731
    figures = figures_of(requests, things_of=other)
    assert rights(figures, SEEN) == [1, 1, 1] and rights(figures, HELD_OUT) == [1, 0, 0]
    assert rights(figures, HELD_OUT, REAL) == [1, 1, 1]
    wrong = {(row["color"], row["thing"]) for row in figures["pairs"] if row[SAMPLES]["right"] == 0}
    assert wrong == {("red", "square"), ("blue", "ring")}
    assert {row["kind"] for row in figures["pairs"] if row[SAMPLES]["right"] == 0} == {HELD_OUT}


def test_class_and_colour_of_two_things_are_not_both(requests):
    apart = lambda each: [(each.thing, (each.color + 1) % 6), ((each.thing + 1) % 6, each.color)]  # noqa: E731
    assert rights(figures_of(requests, things_of=apart), SEEN) == [1, 1, 0]


def test_a_model_that_cannot_count_is_found_out(requests):
    figures = figures_of(requests, things_of=lambda each: [each.pair] * 2)
    assert [row[SAMPLES]["right"] for row in figures[NUMBER]] == [0, 1, 0]
    assert [row[REAL]["right"] for row in figures[NUMBER]] == [1, 1, 1] and rights(figures, SEEN) == [1, 1, 1]


def test_grounds_are_told_apart_by_place(requests):
    two = [each for each in requests if each.grounds[0] != each.grounds[1]]
    assert figures_of(two, grounds_of=lambda each: each.grounds[::-1])[PLACES][SAMPLES]["right"] == 0


def test_a_model_that_reads_nothing_is_at_the_floor(requests):
    figures = figures_of(requests, things_of=lambda each: [(THINGS.index("ring"), 0), (THINGS.index("ring"), 1)])
    for kind in (SEEN, HELD_OUT):
        assert rights(figures, kind, FLOOR) == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    assert rights(figures, SEEN) == pytest.approx([5 / 10, 3 / 10, 2 / 10])


def test_without_held_out_pairs_there_is_one_kind(requests):
    figures = figures_of([each._replace(held_out=False) for each in requests])
    assert figures["kinds"].keys() == {SEEN} and "*" not in "".join(report(figures, ROOT).splitlines()[:15])


def test_images_are_drawn_with_the_noise_of_their_scenes(requests):
    drawn = []

    def draw(noises, seed, options, conditions):
        drawn.append((noises, seed, conditions))
        return {"image": torch.zeros(len(noises)), "codes": torch.zeros(len(noises))}

    chosen = [len(requests) - 1, 0, 5]
    assert requested_images(requests, SimpleNamespace(draw=draw), 7, None)(chosen).keys() == {"image"}
    captions, noises = ([getattr(requests[i], name) for i in chosen] for name in ("caption", "scene"))
    assert drawn == [(noises, 7, {"caption": captions})]


def test_the_picture_has_held_out_pairs_beside_others(requests):
    samples = torch.zeros(len(requests), 3, 32, 32, dtype=torch.uint8)
    for image, each in zip(samples, requests, strict=True):
        image[0], image[1], image[2] = 40 * each.thing, 40 * each.color, 255 * each.held_out
    picture = draw_picture(requests, samples, samples)
    width, height = (picture.width - 12) // 2, (picture.height - 12) // 2  # 2 pairs held out
    for row, pair in enumerate([("square", "red"), ("ring", "blue")]):
        thing, color = THINGS.index(pair[0]), COLORS.index(pair[1])
        left, right = (picture.getpixel((20 + side * width, 12 + row * height + 40)) for side in (0, 1))
        assert left == (40 * thing, 40 * color, 255) and right[::2] == (40 * thing, 0)


@pytest.mark.parametrize("captions", ["own", "templates"])
def test_the_detector_knows_all_scenes(requests, captions, tmp_path, monkeypatch):
    opened, blank = [], torch.zeros(len(requests), 3, 32, 32, dtype=torch.uint8)
    judges = SimpleNamespace(scenes=None, hashes={"scene network": "abc"})
    monkeypatch.setattr(check_scenes, "open_scenes", lambda *args: opened.append(args))
    monkeypatch.setattr(check_scenes, "load_judges", lambda source, folder, seed: judges)
    found = lambda network, images: contents_of(requests, **({} if images.any() else {"things_of": lambda each: []}))  # noqa: E731
    monkeypatch.setattr(check_scenes, "find_contents", found)
    model = SimpleNamespace(data=replace(DATA, captions=captions), reader=replace(READER, shapes_seed=3))
    batches = ResumableBatches(SimpleNamespace(is_main=True), tmp_path)
    monkeypatch.setattr(ResumableBatches, "resume", lambda self, name, rows, make: iter([make([*rows])]))
    results = check_scenes.measure(requests, blank + 1, lambda rows: {"image": blank[rows]}, tmp_path, model, batches)
    assert opened == [(DATA, shapes.Config(shapes_seed=3), "judge")]
    assert (rights(results, SEEN), rights(results, SEEN, REAL)) == ([0, 0, 0], [1, 1, 1])
    assert (PLACES in results) == (captions == "own") and results["judge"] == "abc"
    assert (PLACES in report(results, tmp_path)) == (captions == "own")


def model_with(reader, channels, conditions):
    data = SimpleNamespace(dataset="data", n_channels=channels)
    return SimpleNamespace(run="run", reader=reader, data=data, sampler=SimpleNamespace(conditions=conditions))


def test_other_models_are_refused():
    refusals = {
        "run was trained on data with 1 channels, wanted scenes in colour": (READER, 1, ("caption",)),
        "wanted scenes in colour: train with --dataset shapes": (object(), 3, ("caption",)),
        "run reads no conditions, wanted captions alone: train with --conditions text": (READER, 3, ()),
        "run reads caption, boxes, wanted captions alone": (READER, 3, ("caption", "boxes")),
    }
    for message, model in refusals.items():
        with pytest.raises(ValueError, match=message):
            check_scenes.prepare(None, model_with(*model), None)


def test_the_command_asks_a_run_and_judges_its_samples(tmp_path, conditions, tiny_judges, capsys):
    text = "--conditions text --text_width 8 --text_layers 1 --text_heads 2 --attn_block_type transformer"
    data = "--dataset shapes --img_size 16 --shapes_count 8 --shapes_things bow --shapes_held_out red-bow"
    flags = f"{DDPM.replace('--img_size 8', data)} {text} --no_amp --train_steps 1 --steps_per_eval 0 --log_dir run"
    call("train_sampler.py", f"--logs_root {tmp_path} {flags}")
    conditions.clear()
    options = "--n_samples 1 --sample_steps 1 --batch_size 5 --no_amp --log_dir checked"
    command = f"--logs_root {tmp_path} --load_dir run --sampler ddpm {options}"
    call("experiments/check_scenes.py", command)
    results = json.loads((tmp_path / "checked" / "results.json").read_text())
    captions = [caption for batch in conditions for caption in batch["caption"]]
    assert len(captions) == len(COUNTS) * len(COLORS) == results[PLACES][SAMPLES]["n"]
    assert results["kinds"][HELD_OUT][BOTH][REAL]["n"] == 1 and results["kinds"][SEEN][BOTH][SAMPLES]["n"] == 5
    out = capsys.readouterr().out
    assert report(results, tmp_path / "checked") in out and "pairs held out, samples" in out
    with Image.open(tmp_path / "checked" / "scenes.png") as picture:
        assert picture.height > 2 * 64
    call("experiments/check_scenes.py", command)  # reports again
    assert len(conditions) == 4


@pytest.mark.parametrize(
    ("trained_on", "asked"),
    [
        (("free", "small"), {"free"}),
        (("large",), {"large"}),
        (("large", "free"), {"large", "free"}),
        (("nested",), {"free"}),
    ],
)
def test_scenes_are_of_a_kind_that_the_model_knows(trained_on, asked):
    scenes = scenes_of("red-disc", DATA, shapes.Config(shapes_kinds=trained_on), 3)
    assert {item["scene_kind"] for _, item in scenes} == asked


def test_the_preset_leaves_out_each_class_in_one_colour(monkeypatch, tmp_path):
    path = ROOT / "configs" / "shapes_captions.yaml"
    config = parse_config("train_sampler.py", f"--config {path} --logs_root {tmp_path}", monkeypatch)
    held_out = [tuple(pair.split("-")) for pair in config["shapes_held_out"]]
    assert {thing for _, thing in held_out} == {*config["shapes_things"]}  # each class once, in different colours
    assert len({color for color, _ in held_out}) == len(held_out) == 4
    checked = parse_config("experiments/check_scenes.py", f"--config {path} --logs_root {tmp_path}", monkeypatch)
    assert (checked["load_dir"], checked["dataset"], checked["sampler"]) == (config["log_dir"], "shapes", "ddpm")
