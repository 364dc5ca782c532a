"""Samples from panoptic maps with prompts, on the command line: run_panoptic_to_image.py."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny_regions import IDS, save_json, save_panoptic_folder, save_picture, save_text
from helpers.tiny_runs import DDPM, call
from train.data.formats import panoptic

QUICK = "--no_amp --device cpu --sample_steps 2 --batch_size 4"
TEXT = "--attn_block_type transformer --text_width 16 --text_layers 1 --text_heads 2"
READS = "--conditions text region_words"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_panoptic_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def logs(data, tmp_path_factory):
    """A run of few steps that reads captions and words of regions, and one of boxes."""
    logs = tmp_path_factory.mktemp("logs")
    run = f"--logs_root {logs} --no_amp --train_steps 4 --lr 0.01 --ema_beta 0 --steps_per_eval 0 --num_workers 0"
    prompts = "--prompts prompts_{split}.csv --instance_prompts words_{split}.json"
    folder = f"{DDPM.replace('iters 100', 'iters 1')} --dataset panoptic_folder --data_dir {data} {prompts}"
    call("train_sampler.py", f"{run} {folder} {TEXT} {READS} --log_dir scenes")
    call("train_sampler.py", f"{run} {DDPM} --dataset shapes --shapes_count 20 --conditions layout --log_dir boxes")
    return logs


@pytest.fixture
def maps(tmp_path):
    """Two maps in the encoding mamoe, of which the second has one more car; their prompts."""
    for name, ids in (("a.png", IDS), ("b.png", np.where(np.arange(8) > 5, 24001, IDS))):
        segments = np.array([1, 2, 24001]), np.array([13, 8, 13])
        save_picture(tmp_path / "maps" / name, panoptic.encode(ids, "mamoe", *segments))
    save_text(tmp_path / "prompts.csv", "img_name,prompt\na.png,a street\nb.png,two cars\n")
    save_json(tmp_path / "instances.json", {"b.png": {"24001": "a red car"}})
    return tmp_path


def draw(words):
    call("experiments/run_panoptic_to_image.py", f"{words} {QUICK}")


def refused(capfd, words):
    with pytest.raises(SystemExit) as stop:
        draw(words)
    assert stop.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("run_panoptic_to_image.py: ")]
    return line


def pixels_in(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))}


def same_images(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_each_map_gets_a_picture_beside_its_seeds(logs, maps, tmp_path, conditions, capsys):
    out = tmp_path / "out"
    words = f"--maps {maps / 'maps'} --panoptic_encoding mamoe --prompts {maps / 'prompts.csv'} --n_seeds 2"
    words += f" --instances {maps / 'instances.json'}"
    draw(f"{logs / 'scenes' / 'checkpoints'} {words} --output_dir {out}")
    (batch,) = conditions
    assert batch["box_words"][:2] == [[""], ["", "a red car"]]
    assert batch["box_id"][1].tolist() == [1, 24001]
    assert batch["caption"] == ["a street", "two cars"] * 2  # image i has map i modulo their number
    assert batch["segment_class"].tolist()[:2] == [[13, 8, 0], [13, 8, 13]]
    assert batch["segment_id"][1].tolist() == [1, 2, 24001]
    assert (batch["panoptic"][1, :, -1] == 24001).all()
    names = {f"{name}{end}.png" for name in "ab" for end in ("", "_layout")}
    assert {path.name for path in out.glob("*.png")} == names
    assert [*pixels_in(out)] == ["a_0.png", "a_1.png", "b_0.png", "b_1.png"]
    results = json.loads((out / "results.json").read_text())
    assert (results["names"], results["prompts"]) == (["a", "b"], ["a street", "two cars"])
    assert "four images of two maps: " in capsys.readouterr().out
    row, alone = (np.asarray(Image.open(out / name)) for name in ("a.png", "a_layout.png"))
    assert row.shape[1] > 3 * alone.shape[1]  # the map and two images


def test_the_inputs_written_give_the_same_images(logs, maps, tmp_path, conditions):
    first, again = tmp_path / "first", tmp_path / "again"
    words = f"--maps {maps / 'maps'} --panoptic_encoding mamoe --prompts {maps / 'prompts.csv'} --n_seeds 1"
    draw(f"{logs / 'scenes'} {words} --output_dir {first}")
    draw(
        f"{logs / 'scenes'} --maps {first / 'maps'} --prompts {first / 'prompts.csv'} --n_seeds 1 --output_dir {again}"
    )
    assert torch.equal(conditions[0]["panoptic"], conditions[1]["panoptic"])
    for name in ("caption", "box_words"):
        assert conditions[0][name] == conditions[1][name]
    assert same_images(pixels_in(first), pixels_in(again))


def test_without_prompts_classes_are_the_prompt(logs, maps, tmp_path, conditions):
    draw(
        f"{logs / 'scenes'} --maps {maps / 'maps'} --panoptic_encoding mamoe --n_seeds 1 --output_dir {tmp_path / 'a'}"
    )
    assert conditions[0]["caption"] == ["car, vegetation"] * 2
    one = f"--maps {maps / 'maps'} --panoptic_encoding mamoe --n_seeds 1 --n_images 1 --prompt night"
    draw(f"{logs / 'scenes'} {one} --output_dir {tmp_path / 'b'}")
    assert conditions[1]["caption"] == ["night"]


def test_finished_drawings_are_reported_and_others_refused(logs, maps, tmp_path, conditions, capfd):
    words = (
        f"{logs / 'scenes'} --maps {maps / 'maps'} --panoptic_encoding mamoe --n_seeds 1 --output_dir {tmp_path / 'o'}"
    )
    draw(words)
    images = pixels_in(tmp_path / "o")
    conditions.clear()
    draw(words)
    assert not conditions and same_images(images, pixels_in(tmp_path / "o"))
    save_picture(maps / "maps" / "a.png", panoptic.encode(IDS, "mamoe", np.array([1, 2]), np.array([11, 8])))
    assert "--maps: other content" in refused(capfd, words)


def test_words_of_instances_change_the_images(logs, maps, tmp_path):
    words = f"{logs / 'scenes'} --maps {maps / 'maps'} --panoptic_encoding mamoe --n_seeds 1 --guidance 9"
    draw(f"{words} --output_dir {tmp_path / 'plain'}")
    draw(f"{words} --instances {maps / 'instances.json'} --output_dir {tmp_path / 'worded'}")
    plain, worded = pixels_in(tmp_path / "plain"), pixels_in(tmp_path / "worded")
    assert np.array_equal(plain["a_0.png"], worded["a_0.png"])  # whose instances have no words of their own
    assert not np.array_equal(plain["b_0.png"], worded["b_0.png"])
    pictures = [np.asarray(Image.open(tmp_path / name / "b_layout.png")) for name in ("plain", "worded")]
    assert not np.array_equal(*pictures)  # which have the words


def test_guidance_of_regions_changes_the_images(logs, maps, tmp_path):
    words = f"{logs / 'scenes'} --maps {maps / 'maps'} --panoptic_encoding mamoe --n_seeds 1 --guidance 2"
    for strength in (0, 3):
        draw(f"{words} --region_guidance {strength} --output_dir {tmp_path / str(strength)}")
    assert not same_images(pixels_in(tmp_path / "0"), pixels_in(tmp_path / "3"))


def test_what_does_not_fit_the_model_is_refused(logs, maps, tmp_path, capfd):
    words = f"--maps {maps / 'maps'} --panoptic_encoding mamoe --output_dir {tmp_path / 'odd'}"
    line = refused(capfd, f"{logs / 'boxes'} {words}")
    assert "which reads boxes, box_class: pass a run with --conditions region_words" in line
    line = refused(capfd, f"{logs / 'boxes'} {words} --prompt night")
    assert "boxes and masks: run_layout_to_image.py" in line
    assert "got no maps" in refused(capfd, f"{logs / 'scenes'} --output_dir {tmp_path / 'odd'}")
    stray = f"{words} --prompts {maps / 'none.csv'}"
    assert "none.csv does not exist: pass a CSV file" in refused(capfd, f"{logs / 'scenes'} {stray}")
    assert "no run in" in refused(capfd, f"{tmp_path / 'nowhere'} {words}")
    assert not (tmp_path / "odd").exists()
