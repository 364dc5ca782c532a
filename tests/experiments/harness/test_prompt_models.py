"""Files of prompts whose items name the model that draws them."""

import dataclasses
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from diffusion.rng import seed_of
from experiments.harness import prompt_models
from experiments.harness.prompt_inputs import PromptsConfig, open_prompts
from experiments.harness.prompt_models import PromptsOfModels, open_prompts_of_models
from helpers.prompted import MODELS, close, draw, make_model, options_of
from train.trained_sampler import TrainedSampler

OTHER = dataclasses.replace(make_model("absorbing"), run=Path("/runs/codes"), weights="v")


@pytest.fixture
def open_file(tmp_path, monkeypatch):
    """Opens a list of items beside the loaded run tiny, with the models `names` in the --models file."""

    def open_items(objects: list[dict], names: tuple[str, ...] = ("big",), other: TrainedSampler = OTHER, **settings):
        monkeypatch.setattr(prompt_models, "load_run", lambda *_: (other, options_of(other, sample_steps=3)))
        prompts, models = tmp_path / "prompts.json", tmp_path / "models.yaml"
        prompts.write_text(json.dumps(objects))
        models.write_text("".join(f"{name}: /runs/codes\n" for name in names))
        own = {name: settings.pop(name) for name in ("negative",) if name in settings}
        config, n_seeds = PromptsConfig(prompts=str(prompts), models=str(models), **own), settings.pop("n_seeds", None)
        loaded = MODELS["ddpm"]
        return open_prompts_of_models(config, loaded, options_of(loaded, **settings), 3, n_seeds, str(tmp_path))

    return open_items


def images(inputs: PromptsOfModels, *indices: int) -> torch.Tensor:
    return inputs.draw(list(indices))["image"].int()


def test_items_are_drawn_by_the_models_they_name(open_file):
    objects = [
        {"prompt": "a cat"},
        {"prompt": "a dog", "model_name": "big"},
        {"prompt": "a hat", "model_name": "big", "seed": 7, "guidance": 2},
        {"prompt": "a cat", "model": "tiny", "guidance": 2},
    ]
    inputs = open_file(objects, n_seeds=2)
    loaded = MODELS["ddpm"]
    wanted = [
        draw(loaded, "a cat", 3, 0),
        draw(OTHER, "a dog", 3, 1, sample_steps=3),  # with the settings of its own run
        draw(OTHER, "a hat", 7, 0, sample_steps=3, guidance=2.0),
        draw(loaded, "a cat", 3, 3, guidance=2.0),
        draw(loaded, "a cat", 3, 4),
        draw(OTHER, "a dog", 3, 5, sample_steps=3),
        draw(OTHER, "a hat", 7, 1, sample_steps=3, guidance=2.0),
    ]
    drawn = images(inputs, *range(7))
    assert drawn.shape == (7, 3, 4, 4)
    assert all(close(each, grey.expand_as(each)) for each, grey in zip(drawn, wanted, strict=True))
    assert close(drawn[[6, 3, 1]], images(inputs, 6, 3, 1))  # in any order and batch
    records = inputs.records(8)
    assert [record["model"] for record in records] == ["tiny", "big", "big", "tiny"] * 2
    assert [record["number"] for record in records] == [0, 1, 0, 3, 4, 5, 1, 7]
    assert [record["sample_steps"] for record in records] == [2, 3, 3, 2] * 2
    assert records[5]["file"] == "images/000001_1.png" and records[5]["prompt"] == "a dog"


def test_a_file_without_models_is_drawn_as_without_the_flag(open_file, tmp_path):
    inputs = open_file([{"prompt": "a cat"}, {"prompt": "a dog", "sample_steps": 3}], n_seeds=2)
    config = PromptsConfig(prompts=str(tmp_path / "prompts.json"))
    alone = open_prompts(config, MODELS["ddpm"], options_of(MODELS["ddpm"]), 3, n_seeds=2)
    plain = alone.draw([0, 1, 2, 3])["image"].int()
    assert torch.equal(images(inputs, 0, 1, 2, 3), plain.expand(-1, 3, -1, -1))
    assert inputs.records(4) == alone.records(4)


def test_other_weights_are_other_results(open_file):
    objects = [{"prompt": "a", "model": "big"}]
    first, again = open_file(objects), open_file(objects)
    other = open_file(objects, other=dataclasses.replace(OTHER, weights="w2"))
    assert first.provenance == again.provenance and first.provenance.keys() == {"prompts_sha256", "models_sha256"}
    assert first.provenance["models_sha256"] != other.provenance["models_sha256"]


def test_whatever_is_wrong_is_one_error(open_file):
    objects = [{"prompt": "a"}, {"prompt": "a", "model": "bigg"}, {"prompt": "b", "model": "none"}]
    with pytest.raises(ValueError, match=r"2 of 3 .*: item 2: got model 'bigg', did you mean 'big'.*; item 3: got mod"):
        open_file(objects)
    objects = [{"prompt": "a", "height": 8}, {"prompt": "a", "model": "big", "width": 9}, {"prompt": "b"}]
    with pytest.raises(ValueError, match=r"2 of 3 .*: item 1: got an image of 8x4.*; item 2: got an image of 4x9"):
        open_file(objects)


def test_models_draw_images_of_one_size(open_file):
    large = dataclasses.replace(OTHER, data=dataclasses.replace(OTHER.data, img_size=8))
    objects = [{"prompt": "a"}, {"prompt": "a", "model": "big"}]
    with pytest.raises(ValueError, match="got models of different sizes, tiny 4x4, big 8x8"):
        open_file(objects, other=large)
    assert len(open_file(objects[1:], other=large)) == 1  # the loaded run draws none
    many = dataclasses.replace(OTHER, data=dataclasses.replace(OTHER.data, n_channels=5))
    with pytest.raises(ValueError, match="got models of different channels, tiny 1, big 5"):
        open_file(objects, other=many)


def test_steps_are_those_of_the_loaded_run(open_file):
    inputs = open_file([{"prompt": "a"}, {"prompt": "a", "model": "big"}], n_seeds=2)
    inputs.check_steps([0, 2])
    with pytest.raises(ValueError, match="got prompts for several models"):
        inputs.check_steps([0, 1])


@pytest.mark.parametrize("text", ["a: 3\n", "a:\n", "- a\n"])
def test_a_file_of_models_holds_folders(tmp_path, text):
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(ValueError, match="models.yaml: got .*, wanted"):
        prompt_models.read_models(str(tmp_path / "models.yaml"))


def test_the_name_of_the_loaded_run_is_no_other_model(open_file):
    with pytest.raises(ValueError, match="got tiny in .*models.yaml, which --load_dir loads: give it another name"):
        open_file([{"prompt": "a"}], names=("tiny",))


def test_models_need_prompts_and_a_file(tmp_path):
    with pytest.raises(ValueError, match="got models a.yaml without items that name them: pass --prompts FILE"):
        PromptsConfig(prompt="a", models="a.yaml")
    with pytest.raises(FileNotFoundError, match="a.yaml not found: pass a YAML file as --models"):
        prompt_models.read_models(str(tmp_path / "a.yaml"))


class FakePipeline:
    """A pipeline whose images are noise of the generator plus a brightness of its arguments."""

    def __init__(self):
        self.calls, self.scheduler = [], torch.Generator()

    @classmethod
    def from_pretrained(cls, folder, local_files_only):
        assert local_files_only
        return cls()

    def set_progress_bar_config(self, disable):
        assert disable

    def to(self, device):
        return self

    def __call__(
        self, prompt, height=4, width=4, num_inference_steps=9, guidance_scale=5.0, generator=None, output_type="pil"
    ):
        assert output_type == "np" and torch.is_grad_enabled() is False
        self.calls.append((prompt, num_inference_steps, guidance_scale))
        image = torch.rand(height, width, 3, generator=generator) / 2 + num_inference_steps / 100
        return type("Output", (), {"images": image[None].numpy().astype(np.float32)})


@pytest.fixture
def pipeline_file(tmp_path, monkeypatch):
    """Opens items beside the loaded run tiny, where turbo is a pipeline."""
    fake, folder = ModuleType("diffusers"), tmp_path / "turbo"
    fake.DiffusionPipeline = FakePipeline
    monkeypatch.setitem(sys.modules, "diffusers", fake)
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")

    def open_items(objects: list[dict], **settings):
        prompts, models = tmp_path / "prompts.json", tmp_path / "models.yaml"
        prompts.write_text(json.dumps(objects))
        models.write_text(f"turbo: diffusers:{folder}\n")
        config = PromptsConfig(prompts=str(prompts), models=str(models), **settings)
        loaded = MODELS["ddpm"]
        return open_prompts_of_models(config, loaded, options_of(loaded), 3, 2, str(tmp_path))

    return open_items


def test_a_pipeline_draws_items_of_its_name(pipeline_file):
    size = {"height": 4, "width": 4}
    objects = [{"prompt": "a cat"}, {"prompt": "a dog", "model": "turbo", "seed": 5, "guidance": 0, **size}]
    objects += [{"prompt": "a hat", "model": "turbo", "sample_steps": 2, **size}]
    inputs = pipeline_file(objects)
    drawn = images(inputs, *range(6))
    assert close(drawn[0], draw(MODELS["ddpm"], "a cat", 3, 0).expand(3, -1, -1))
    assert inputs.parts["turbo"].pipeline.calls[:3] == [("a dog", 9, 0), ("a hat", 2, 5.0), ("a dog", 9, 0)]
    assert torch.equal(images(inputs, 5, 1), drawn[[5, 1]])  # each image has noise of its own, in any batch
    assert not torch.equal(drawn[1], drawn[4]) and not torch.equal(drawn[2], drawn[5])
    again = pipeline_file(objects[1:])
    assert torch.equal(images(again, 0, 2), drawn[[1, 4]])  # with a seed, the place in the file is nothing
    assert inputs.records(6)[1] == {
        "file": "images/000001.png", "model": "turbo", "prompt": "a dog", "negative": None, "seed": 5, "number": 0,
        "solver": "Generator", "sample_steps": None, "guidance": 0,
    }  # fmt: skip


def test_an_image_of_a_pipeline_has_its_own_seed(pipeline_file):
    own = {"model": "turbo", "height": 4, "width": 4}
    inputs = pipeline_file([{"prompt": "a cat"}, {"prompt": "a hat", **own}, {"prompt": "a dog", "seed": 5, **own}])
    keys = {1: (3, 1), 2: (5, 0), 4: (3, 4), 5: (5, 1)}  # seed, and number among the images of that seed
    for image, (seed, number) in zip(images(inputs, *keys), keys.values(), strict=True):
        rng = torch.Generator().manual_seed(seed_of(seed, "sample", number))
        wanted = torch.rand(4, 4, 3, generator=rng) / 2 + 0.09
        assert close(image, (255 * wanted).round().int().permute(2, 0, 1))


def test_what_a_pipeline_does_not_take_is_refused(pipeline_file):
    objects = [{"prompt": "a", "model": "turbo", "negative": "b"}, {"prompt": "a", "model": "turbo", "metadata": "x=1"}]
    with pytest.raises(ValueError, match="2 of 2 .*: item 1: got negative_prompt, which Fake.*; item 2: got met"):
        pipeline_file(objects)
    with pytest.raises(ValueError, match="got models of different sizes, tiny 4x4, turbo 8x4, wanted one: give items"):
        pipeline_file([{"prompt": "a"}, {"prompt": "a", "model": "turbo", "height": 8, "width": 4}])
    with pytest.raises(ValueError, match="got prompt_syntax a1111 for a pipeline, wanted plain"):
        pipeline_file([{"prompt": "a", "model": "turbo"}], prompt_syntax="a1111")


def test_a_pipeline_needs_diffusers_and_a_folder(pipeline_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # not installed
    with pytest.raises(ValueError, match="turbo needs packages that are not installed .*: pip install diffusers"):
        pipeline_file([{"prompt": "a", "model": "turbo"}])
    (tmp_path / "turbo" / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match="model_index.json not found: pass a folder that diffusers saved"):
        pipeline_file([{"prompt": "a", "model": "turbo"}])
