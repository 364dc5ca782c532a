"""Judges are trained once, kept by what they depend on, and the same again from the same seed."""

import pytest
import torch

from experiments.metrics.layout import crop_classifier, judges, scene_network
from experiments.metrics.layout.judges import judge_split, load_judges, load_scenes, open_scenes
from train.config import DataConfig
from train.datasets import UnreadableImage, shapes

DATA = DataConfig(dataset="shapes", img_size=16)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(crop_classifier, "RECIPE", crop_classifier.RECIPE._replace(steps=2, batch_size=8))
    monkeypatch.setattr(scene_network, "RECIPE", scene_network.RECIPE._replace(steps=2, batch_size=4))
    monkeypatch.setattr(judges, "SCENES", 12)


def judging(**options):
    return open_scenes(DATA, shapes.Config(**options), "judge")


def test_judges_are_read_again_and_equal_when_trained_again(tmp_path, monkeypatch):
    first = load_judges(judging(), tmp_path / "a", 0)
    second = load_judges(judging(), tmp_path / "b", 0)
    assert first.hashes == second.hashes and first.hashes.keys() == {"crop classifier", "scene network"}
    weights = {name: tensor.clone() for name, tensor in first.scenes.state_dict().items()}
    monkeypatch.setattr(judges, "load_scenes", None)  # nothing is read where nothing is trained
    again = load_judges(judging(), tmp_path / "a", 0)
    assert again.hashes == first.hashes and not again.crops.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.scenes.state_dict().items())


@pytest.mark.parametrize("change", ["seed", "data", "size", "recipe", "version", "scenes"])
def test_whatever_they_depend_on_makes_other_files(tmp_path, monkeypatch, change):
    load_judges(judging(), tmp_path, 0)
    source, seed = judging(shapes_seed=1) if change == "data" else judging(), int(change == "seed")
    if change == "size":
        source = open_scenes(DataConfig(dataset="shapes", img_size=18), shapes.Config(), "judge")
    if change == "recipe":
        for module in (crop_classifier, scene_network):
            monkeypatch.setattr(module, "RECIPE", module.RECIPE._replace(peak_lr=1e-3))
    if change == "version":
        monkeypatch.setattr(judges, "VERSION", -1)
    if change == "scenes":
        monkeypatch.setattr(judges, "SCENES", 10)
    load_judges(source, tmp_path, seed)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_a_damaged_file_is_named(tmp_path):
    load_judges(judging(), tmp_path, 0)
    for path in tmp_path.glob("*_scenes_*.safetensors"):
        path.write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="is damaged .*: delete it"):
        load_judges(judging(), tmp_path, 0)


def test_scenes_for_judges_are_of_another_split():
    assert judge_split(DATA) == "judge" and judge_split(DataConfig(dataset="digits")) == "train"
    mine, other = (
        load_scenes(open_scenes(DATA, shapes.Config(), split), range(3), "").images for split in ("judge", "val")
    )
    assert not torch.equal(mine, other)


def test_unreadable_scenes_are_left_out(monkeypatch):
    source, read = judging(), type(judging()).__getitem__

    def broken(self, index):
        if index == 1:
            raise UnreadableImage("broken")
        return read(self, index)

    monkeypatch.setattr(type(source), "__getitem__", broken)
    scenes = load_scenes(source, range(3), "")
    assert scenes.items == [0, 2] and scenes.layouts.count == len(scenes.images) == 2
    with pytest.raises(ValueError, match="none of 1 images"):
        load_scenes(source, [1], "")


def test_data_without_layouts_are_refused(monkeypatch):
    item_of = shapes.item_of
    monkeypatch.setattr(shapes, "item_of", lambda *a: {k: item_of(*a)[k] for k in ("image", "captions", "boxes")})
    with pytest.raises(ValueError, match="shapes has no layouts to obey: pass a --dataset"):
        judging()


def test_data_with_maps_alone_have_no_crop_classifier(tmp_path, monkeypatch):
    item_of = shapes.item_of
    monkeypatch.setattr(shapes, "item_of", lambda *a: {k: item_of(*a)[k] for k in ("image", "semantic")})
    found = load_judges(judging(), tmp_path, 0)
    assert found.crops is None and found.scenes.objects is None and found.hashes.keys() == {"scene network"}
