"""What the cells of an ablation are drawn from, on tiny models with random weights."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from experiments.harness import ablation_cells
from experiments.harness.ablation_cells import (
    PlannedCell,
    canvas_shape,
    check_drawable,
    open_cell,
    read_at_size,
    source_key,
)
from experiments.harness.ablation_file import Axis, Cell, Point
from helpers.prompted import MODELS, draw, make_model, options_of


@pytest.fixture(autouse=True)
def stored_settings(monkeypatch):
    """The runs of the tiny models have no folders: two steps of the solver are their own settings."""

    def read(run):
        return SimpleNamespace(sampling=options_of(read.model))

    read.model = MODELS["ddpm"]
    monkeypatch.setattr(ablation_cells, "read_stored_config", read)
    return read


def open_at(stored_settings, name="ddpm", model=None, **settings):
    stored_settings.model = model or MODELS[name]
    return open_cell(stored_settings.model, settings, 0, {})


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_and_a_negative_are_those_of_the_cell(name, stored_settings):
    model, settings = MODELS[name], {"guidance": 3.0}
    cell = open_at(stored_settings, name, prompt="a red house", negative="rain", seed=7, **settings)
    images = cell.draw([0, 1])["image"].int()
    for number in (0, 1):
        assert torch.equal(images[number], draw(model, "a red house", 7, number, "rain", **settings))
    other = open_at(stored_settings, name, prompt="a red house", seed=7, **settings)
    assert not torch.equal(other.draw([0])["image"].int(), images[:1])


def test_weights_of_words_are_read(stored_settings):
    plain, weighted = (
        open_at(stored_settings, prompt=words, prompt_syntax="a1111").draw([0, 1])["image"].int()
        for words in ("a house", "a (house:1.9)")
    )
    assert not torch.equal(plain, weighted)


def test_the_null_class_is_a_label(stored_settings):
    model = make_model(n_classes=3)
    for label, number in ((None, 3), (2, 2), ("1", 1)):
        cell = open_at(stored_settings, model=model, prompt="a", label=label)
        assert cell.draw([0, 5])["label"].tolist() == [number] * 2


def test_hints_of_cells_are_their_own(stored_settings, tmp_path):
    """Cells share sources of conditions if they have one hint; it counts by its content, not by its path."""
    cell, cells = open_at(stored_settings, prompt="a"), {}
    for name, level in (("a", 0), ("b", 99), ("c", 0)):
        Image.new("L", (4, 4), level).save(tmp_path / f"{name}.png")
        options = dataclasses.replace(cell.options, hint=(str(tmp_path / f"{name}.png"),))
        cells[name] = dataclasses.replace(cell, options=options)
    assert len({source_key(each.options, {}) for each in cells.values()}) == 3
    a, b, c = (each.identity(1) for each in cells.values())
    assert a == c != b


def test_everything_that_changes_the_images_is_in_the_identity(stored_settings, tmp_path):
    for name in ("a", "b"):
        Image.new("L", (4, 4), 10 if name == "a" else 200).save(tmp_path / f"{name}.png")
    a, b = ({"image": str(tmp_path / f"{name}.png")} for name in ("a", "b"))
    variants = [{}, {"seed": 1}, {"guidance": 2.0}, {"sample_steps": 3}, {"solver": "ddim"}, {"prompt": "b"}, a, b]
    variants += [{"negative": "c", "guidance": 2.0}, {"size": 8}, a | {"strength": 0.5}, {"prompt_syntax": "compel"}]
    cells = [open_at(stored_settings, **{"prompt": "a"} | own) for own in variants]
    assert len({repr(cell.identity(2)) for cell in cells}) == len(variants)
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes())
    same = open_at(stored_settings, prompt="a", image=str(tmp_path / "c.png"))  # content counts, not the path
    assert same.identity(2) == cells[6].identity(2) != cells[6].identity(3)


def test_what_a_model_does_not_have_is_refused(stored_settings):
    for settings, message in (
        ({"temp": 0.5}, "got temp, which the sampler ddpm does not have"),
        ({"solver": "halton"}, "got solver 'halton'"),
        ({"guidance": "much"}, "got guidance 'much', wanted a number"),
        ({"label": 1}, "got label 1 for a sampler without classes"),
        ({"strength": 0.5}, "got strength 0.5 without an image"),
        ({"negative": "rain"}, "with guidance 1, which ignores it"),
    ):
        with pytest.raises(ValueError, match=message):
            open_at(stored_settings, prompt="a", **settings)
    with pytest.raises(ValueError, match="got negative 'rain' without a prompt"):
        open_at(stored_settings, negative="rain")
    with pytest.raises(FileNotFoundError, match="none.png not found"):
        open_at(stored_settings, prompt="a", image="none.png")


def test_sizes_are_pixels_whatever_the_space():
    latents = SimpleNamespace(space=SimpleNamespace(factor=8), run="run")
    assert canvas_shape(latents, (64, 96)) == (8, 12)
    with pytest.raises(ValueError, match="got size 64x100 for run, wanted multiples of 8"):
        canvas_shape(latents, (64, 100))


def test_an_image_is_read_at_the_size_of_its_cell(tmp_path):
    Image.new("L", (9, 6), 77).save(tmp_path / "a.png")
    image = read_at_size(tmp_path / "a.png", MODELS["ddpm"], (8, 12))
    assert image.shape == (1, 8, 12) and image.dtype == torch.uint8 and (image == 77).all()


def plans(reasons):
    """Cells of two models (rows) and two temperatures (columns)."""
    return [
        PlannedCell(Cell((i, j), (f"m{i}", f"temp {j}"), f"m{i}", {"temp": j}), reason=reasons[i][j])
        for i in range(2)
        for j in range(2)
    ]


def test_a_cell_is_refused_only_if_no_model_can_draw_it():
    models = Axis("model", tuple(Point(f"m{i}", {"model": f"m{i}"}) for i in range(2)))
    axes = (models, Axis("temp", tuple(Point(f"temp {i}", {"temp": i}) for i in range(2))))
    check_drawable(plans([["", ""], ["no temp", "no temp"]]), axes)
    check_drawable(plans([["", "too hot"], ["no temp", ""]]), axes)
    with pytest.raises(ValueError, match="1 of 2 cells can be drawn by no model of the grid: m0, temp 1: too hot$"):
        check_drawable(plans([["", "too hot"], ["", "no temp"]]), axes)
