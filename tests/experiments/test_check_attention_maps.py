"""check_attention_maps.py: which objects are compared, the figures of known maps, and the command."""

import json

import pytest
import torch

from experiments import check_attention_maps
from experiments.check_attention_maps import (
    BOXES,
    THRESHOLDS,
    WORDS,
    CheckMapsConfig,
    Thing,
    box_mask,
    compared_images,
    compute_figures,
    find_choices,
    find_things,
    is_named_once,
    report,
    streams_of,
    visible_masks,
)
from experiments.harness.attention_targets import RealImages, Target
from helpers.tiny_runs import DDPM, ROOT, call, parse_config
from models.attention_recorder import find_layers
from models.conditions import text
from models.conditions.layout import FIELDS_OF
from train.inference import load
from train.samplers import ddpm

DATA = "--dataset digit_pairs --digit_pairs_count 12 --img_size 8 --img_width 16 --n_channels 1"
TEXT = "--text_width 16 --text_layers 1 --text_heads 2"
MODEL = DDPM.replace("--img_size 8 ", "") + " --attn_block_type transformer"


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A run with captions and boxes, and one with gated boxes alone, trained for a step."""
    logs = tmp_path_factory.mktemp("logs")
    preset = logs / "tiny.yaml"  # in place of that of the data
    preset.write_text("dataset: digit_pairs\n")
    flags = f"--config {preset} --logs_root {logs} {DATA} {MODEL} --boxes_width 16 --train_steps 1 --no_amp"
    call("train_sampler.py", f"{flags} --conditions text boxes {TEXT} --log_dir both", validation_images=4)
    call("train_sampler.py", f"{flags} --conditions boxes --boxes_gated --log_dir gated", validation_images=4)
    return logs


@pytest.fixture(scope="module")
def images(logs):
    return RealImages.open(load(logs / "both", amp=False).model, 6, ddpm.Sampling(), 0, 2)


def test_objects_are_those_of_words_and_of_boxes(images):
    things = find_things(images.model, images, 0)
    item = images.source[images.items[0]]
    assert [(thing.kind, thing.target.name) for thing in things] == [
        *((WORDS, word) for word in item["box_words"]),
        *((BOXES, f"box {i}") for i in (0, 1)),
    ]
    for i in (0, 1):
        assert torch.equal(things[i].mask, item["masks"].as_subclass(torch.Tensor)[i] > 0)
        assert (things[i].mask != things[2 + i].mask).float().mean() < 0.1  # the box of a square is the square
    assert [thing.target.tokens for thing in things[2:]] == [(1,), (2,)]


def test_tokens_of_segments_are_not_those_of_boxes(images, monkeypatch):
    conditions = images.conditions([0])
    monkeypatch.setattr(RealImages, "conditions", lambda images, indices: conditions)
    monkeypatch.setattr(images.model.sampler.network.encoders["boxes"], "fields", FIELDS_OF["segments"])
    assert {thing.kind for thing in find_things(images.model, images, 0)} == {WORDS}


def test_objects_whose_words_are_ambiguous_are_left_out():
    encoder = text.build(text.Config(text_width=8, text_layers=1, text_heads=2), 8, 0)
    caption = "a red disc, two blue rings and a red ring"
    assert is_named_once(caption, "red disc", ["red disc", "red ring"], encoder)
    assert not is_named_once(caption, "blue ring", ["blue ring"], encoder)  # a plural
    assert not is_named_once(caption, "red", ["red"], encoder)  # twice
    assert not is_named_once(caption, "red disc", ["red disc", "red disc"], encoder)


def test_what_is_in_front_hides_what_is_behind():
    masks = torch.tensor([[[1, 1, 0]], [[0, 1, 1]], [[0, 0, 1]]])
    assert visible_masks(masks).int().tolist() == [[[1, 0, 0]], [[0, 1, 0]], [[0, 0, 1]]]


def test_boxes_cover_the_pixels_whose_centres_they_hold():
    mask = box_mask(torch.tensor([1.0, 0.4, 2.6, 2.0]), (3, 4))
    assert mask.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def known_things(count):
    """Images of 8 x 8 with an object on the left and one on the right, and heat that is 1 there."""
    left = torch.zeros(8, 8, dtype=torch.bool)
    left[:, :4] = True
    own = [Thing(WORDS, Target("left", "text", (0,)), left), Thing(WORDS, Target("right", "text", (1,)), ~left)]
    return [own] * count, torch.stack([left.float(), 1 - left.float()]).expand(count, 2, 8, 8)


def figures_of(monkeypatch, heat, things):
    heats = [heat] if isinstance(heat, torch.Tensor) else heat

    def record(settings, images, indices, things, most, choices):
        return torch.zeros(len(indices), 1, 8, 8, dtype=torch.uint8), [each[indices] for each in heats]

    monkeypatch.setattr(check_attention_maps, "record_things", record)
    choices = {"tokens": [None] * len(heats)}
    batch = compared_images(CheckMapsConfig(), None, things, 2, choices)(list(range(len(things))))
    return compute_figures(batch, torch.ones(len(things), 2, dtype=torch.bool))


def test_maps_that_are_the_objects_overlap_them_wholly(monkeypatch):
    things, heat = known_things(4)
    figures = figures_of(monkeypatch, heat, things)
    assert figures["iou"]["mean"] == 1 and figures["other"]["mean"] == 0 and figures["iou"]["n"] == 4
    assert figures["inside"]["mean"] == pytest.approx(1) and figures["inside_other"]["mean"] == pytest.approx(0)
    assert figures["area"]["mean"] == 0.5


def test_maps_of_the_wrong_objects_do_not(monkeypatch):
    things, heat = known_things(4)
    figures = figures_of(monkeypatch, heat.flip(1), things)
    assert figures["iou"]["mean"] == 0 and figures["other"]["mean"] == 1


def test_thresholds_are_chosen_on_other_images_than_measured():
    """Images with odd numbers would want the last threshold; those with even ones want the first."""
    iou = torch.zeros(4, 1, 1, len(THRESHOLDS))
    iou[0::2, ..., 0], iou[1::2, ..., -1] = 1.0, 1.0
    figures = compute_figures(overlapping(iou), torch.ones(4, 1, dtype=torch.bool))
    assert figures["iou"]["threshold"] == THRESHOLDS[0] and figures["iou"]["mean"] == 0
    assert "other" not in figures


def overlapping(iou):
    """What is measured of objects whose maps overlap them so, and lie in them by the number of the choice."""
    inside = torch.arange(iou.shape[2]).expand(iou.shape[:3]).float()
    whole = {"iou": iou, "other": torch.full_like(iou, torch.nan), "area": torch.ones(iou.shape[:2])}
    return whole | {"inside": inside, "inside_other": inside}


def test_layers_are_chosen_on_other_images_than_measured():
    """The third choice is best where layers are chosen, the second where they are measured."""
    iou = torch.zeros(4, 1, 3, len(THRESHOLDS))
    iou[0::2, :, 2, 5], iou[1::2, :, 1, 5], iou[1::2, :, 2, 5] = 0.7, 1.0, 0.5
    figures = compute_figures(overlapping(iou), torch.ones(4, 1, dtype=torch.bool))
    assert figures["choice"] == 2 and figures["iou"]["mean"] == 0.5 and figures["inside"]["mean"] == 2
    iou[0::2, :, 2] = torch.nan  # layers that do not read these objects
    assert compute_figures(overlapping(iou), torch.ones(4, 1, dtype=torch.bool))["choice"] == 0


def test_the_best_of_several_layers_is_measured(monkeypatch):
    things, heat = known_things(4)
    figures = figures_of(monkeypatch, [heat.flip(1), heat, 0.5 + 0 * heat], things)
    assert figures["choice"] == 1 and figures["iou"]["mean"] == 1 and figures["inside"]["mean"] == pytest.approx(1)


def test_the_command_measures_words_and_boxes(logs, capsys):
    flags = f"--logs_root {logs} --sampler ddpm --load_dir both --n_images 6 --real_times 2 --no_amp --log_dir checked"
    call("experiments/check_attention_maps.py", flags)
    results = json.loads((logs / "checked" / "results.json").read_text())
    for kind in (WORDS, BOXES):
        assert 0 <= results[kind]["iou"]["mean"] <= 1 and results[kind]["n"] == 12
        assert results[kind]["area"]["mean"] == pytest.approx(64 / 288, abs=0.08)
    assert (logs / "checked" / "attention_maps.png").is_file()
    assert "words: overlap (IoU) of its map with the object" in capsys.readouterr().out
    assert report(results, logs).count("\n") > 10


def test_batches_without_objects_are_read_as_all_others(logs):
    """Of a network that attends to nothing but gated boxes."""
    images = RealImages.open(load(logs / "gated", amp=False).model, 2, ddpm.Sampling(), 0, 2)
    things = [find_things(images.model, images, 0), []]
    streams = streams_of(images.model, things)
    assert streams == ["gated"] and streams_of(images.model, []) == []
    draw = compared_images(CheckMapsConfig(), images, things, 2, dict.fromkeys(streams, [None]))
    empty, other = draw([1])["heat_0"], draw([0])["heat_0"]
    assert empty.shape == other.shape and empty.isnan().all() and other.isfinite().all()


def test_the_command_compares_layers(logs, capsys):
    flags = f"--logs_root {logs} --sampler ddpm --load_dir both --n_images 6 --real_times 2 --no_amp --log_dir layers"
    call("experiments/check_attention_maps.py", f"{flags} --best_layer")
    results = json.loads((logs / "layers" / "results.json").read_text())
    layers = find_layers(load(logs / "both", amp=False).model.sampler.network)
    assert len(layers) > 1 and all(results[kind]["layers"] in ("mean of layers", *layers) for kind in (WORDS, BOXES))
    assert f"words: maps of {results[WORDS]['layers']}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="got best_layer and map_layers"):
        CheckMapsConfig(best_layer=True, map_layers=("a",))


def test_layers_of_two_kinds_are_not_compared(images):
    assert find_choices(CheckMapsConfig(), images.model, ["tokens", "gated"]) == {"tokens": [None], "gated": [None]}
    with pytest.raises(ValueError, match="got best_layer for a model whose words"):
        find_choices(CheckMapsConfig(best_layer=True), images.model, ["tokens", "gated"])


def test_models_without_words_and_boxes_are_refused(trained_ddpm, capsys):
    with pytest.raises(SystemExit) as stop:
        call("experiments/check_attention_maps.py", f"--logs_root {trained_ddpm} --sampler ddpm --n_images 4 --no_amp")
    assert stop.value.code == 2 and "without words or boxes of objects" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["digit_pairs", "shapes_words", "shapes_boxes"])
def test_presets_train_what_the_check_reads(name, monkeypatch, tmp_path):
    flags = f"--config {ROOT / 'configs' / f'{name}.yaml'} --logs_root {tmp_path}"
    config = parse_config("train_sampler.py", flags, monkeypatch)
    checked = parse_config("experiments/check_attention_maps.py", flags, monkeypatch)
    assert checked["load_dir"] == config["log_dir"] == f"ddpm_{name}"
    assert config["attn_block_type"] == "transformer" and config["conditions"][0] in ("text", "boxes")
