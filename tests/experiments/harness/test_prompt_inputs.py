"""Prompts of images to generate: what each image is drawn with, whatever it is drawn beside."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from experiments import get_samples
from experiments.harness.batches import ResumableBatches
from experiments.harness.prompt_inputs import PromptInputs, PromptsConfig, open_prompts
from helpers.prompted import CLASSES, GRID, MODELS, MODULES, TEXT, UNET, close, draw, make_model, options_of
from models.conditions import text
from train.config import DataConfig
from train.datasets import DatasetConfig
from train.distributed import DistContext
from train.samplers import ddpm
from train.spaces import PixelSpace
from train.trained_sampler import TrainedSampler


def open_file(
    tmp_path: Path, objects: list[dict], model: TrainedSampler, n_seeds: int | None = None, **settings
) -> PromptInputs:
    """The prompts of a JSON file; settings are those of PromptsConfig, or else of sampling."""
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(objects))
    own = {name: settings.pop(name) for name in ("negative", "prompt_syntax") if name in settings}
    label = settings.pop("label", None)
    config = PromptsConfig(prompts=str(path), **own)
    return open_prompts(config, model, options_of(model, **settings), seed=3, n_seeds=n_seeds, label=label)


def images(inputs: PromptInputs, *indices: int) -> Tensor:
    return inputs.draw(list(indices))["image"].int()


@pytest.mark.parametrize("name", MODULES)
def test_one_prompt_for_all_images(name):
    model = MODELS[name]
    inputs = open_prompts(PromptsConfig(prompt="a cat (x)"), model, options_of(model), seed=3)
    drawn = images(inputs, 0, 1, 2)
    assert all(close(drawn[i], draw(model, "a cat (x)", 3, i)) for i in range(3))
    assert not torch.equal(drawn[0], drawn[1]) and not close(drawn[0], draw(model, "a dog", 3, 0))


@pytest.mark.parametrize("name", MODULES)
def test_prompts_of_a_file_have_settings_of_their_own(name, tmp_path):
    model = MODELS[name]
    objects = [
        {"prompt": "a cat"},
        {"prompt": "a dog", "seed": 7, "sample_steps": 3},
        {"prompt": "a cat", "guidance": 4, "negative": "a big dog with a hat"},
        {"prompt": "a cat", "guidance": 4},
    ]
    inputs = open_file(tmp_path, objects, model, n_seeds=2)
    drawn = images(inputs, *range(8))
    wanted = [
        draw(model, "a cat", 3, 0),
        draw(model, "a dog", 7, 0, sample_steps=3),
        draw(model, "a cat", 3, 2, "a big dog with a hat", guidance=4.0),
        draw(model, "a cat", 3, 3, guidance=4.0),
        draw(model, "a cat", 3, 4),
        draw(model, "a dog", 7, 1, sample_steps=3),
    ]
    assert all(close(a, b) for a, b in zip(drawn, wanted, strict=False))
    assert close(drawn[[5, 2]], images(inputs, 5, 2))  # in any order and batch
    assert not close(drawn[2], draw(model, "a cat", 3, 2, guidance=4.0))


def test_with_a_seed_of_its_own_the_place_in_the_file_is_nothing(tmp_path):
    """Also where the prompt leaves something open, here the class."""
    model = make_model("absorbing", n_classes=CLASSES)
    item, others = {"prompt": "a cat", "seed": 0}, [{"prompt": "a dog"}, {"prompt": "a dog", "seed": 4}]
    first = open_file(tmp_path, [item, *others], model).draw([0, 1, 2])
    last = open_file(tmp_path, [*others, item], model).draw([0, 1, 2])
    assert torch.equal(first["codes"][0], last["codes"][2]) and first["label"][0] == last["label"][2]
    many = open_file(tmp_path, [item], model, n_seeds=20).draw(list(range(20)))
    assert torch.equal(many["codes"][0], first["codes"][0]) and len(many["label"].unique()) > 1
    beside = open_file(tmp_path, [*others, item], model, n_seeds=20).draw(list(range(2, 60, 3)))
    assert torch.equal(beside["codes"], many["codes"]) and torch.equal(beside["label"], many["label"])
    assert open_file(tmp_path, [item, *others], model, label=2).draw([0, 1, 2])["label"].tolist() == [2, 2, 2]


def test_an_item_may_replace_the_negative_prompt_of_all(tmp_path):
    model = MODELS["ddpm"]
    objects = [{"prompt": "a cat"}, {"prompt": "a cat", "negative": ""}]
    inputs = open_file(tmp_path, objects, model, negative="a dog", guidance=4.0)
    assert inputs.negatives == ("a dog", "")
    first, second = images(inputs, 0, 1)  # in one batch
    assert close(first, draw(model, "a cat", 3, 0, "a dog", guidance=4.0))
    assert close(second, draw(model, "a cat", 3, 1, "", guidance=4.0))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("syntax", "same", "weighted"),
    [("a1111", "a (cat:1) and a dog", "a (cat:2) and a dog"), ("compel", "a (cat)1 and a dog", "a (cat)0.2 and a dog")],
)
def test_weights_of_words_change_images(name, syntax, same, weighted, tmp_path):
    model, plain = MODELS[name], draw(MODELS[name], "a cat and a dog", 5, 0)
    objects = [{"prompt": prompt, "seed": 5} for prompt in (same, weighted)]
    unweighted, changed = images(open_file(tmp_path, objects, model, prompt_syntax=syntax), 0, 1)
    assert close(unweighted, plain) and not close(changed, plain)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("padding", ["end", "zero"])
def test_weighted_prompts_have_the_padding_of_captions(name, padding, tmp_path):
    """In both halves of guidance, and with more chunks in either of them."""
    model = make_model(name, condition_options=text.Config(**TEXT, text_null="empty", text_padding=padding))
    long = "a cat and a dog " * 20
    for prompt, negative in (("a cat", "a dog"), (long, "a dog"), ("a cat", long), ("a cat", None)):
        object = {"prompt": prompt, "negative": negative, "seed": 5, "guidance": 2}
        objects = [{key: value for key, value in object.items() if value is not None}]
        (weighted,) = images(open_file(tmp_path, objects, model, prompt_syntax="a1111"), 0)
        assert close(weighted, draw(model, prompt, 5, 0, negative, guidance=2.0))
    model = replace_padding(model)
    assert not close(weighted, draw(model, "a cat", 5, 0, guidance=2.0))


def replace_padding(model: TrainedSampler) -> TrainedSampler:
    """The same model, with the other padding."""
    encoder = model.sampler.network.encoders["text"]
    encoder.pad_id = 0 if encoder.pad_id else encoder.tokenizer.end_id
    return model


@pytest.mark.parametrize("pooled", [False, True])
def test_equal_prompts_with_weights_share_a_call(pooled, tmp_path):
    """And equal negative prompts; different ones never. In the first call all codes are masked."""
    model, rows = make_model("absorbing", condition_options=text.Config(**TEXT, text_pooled=pooled)), []
    model.sampler.network.register_forward_pre_hook(lambda network, args: rows.append(len(args[0])))
    cat, other, dog = "a (cat:1.4)", "a (cat:1.5)", "a (dog:1.4)"
    for pairs, expected in (
        ([(cat, dog)] * 4, 2),
        ([(cat, dog), (cat, dog), (other, dog), (cat, "a dog")], 4),
        ([(cat, dog), (cat, "a dog"), (other, ""), (dog, cat)], 5),  # two prompts are negative ones elsewhere
    ):
        objects = [{"prompt": prompt, "negative": negative} for prompt, negative in pairs]
        inputs = open_file(tmp_path, objects, model, prompt_syntax="a1111", guidance=3.0)
        rows.clear()
        inputs.draw([0, 1, 2, 3])
        assert rows[0] == expected


def test_long_prompts_and_breaks(tmp_path):
    model, long = MODELS["ddpm"], "a cat and a dog " * 40 + "in a hat " * 60
    (drawn,) = images(open_file(tmp_path, [{"prompt": long}], model), 0)
    assert close(drawn, draw(model, long, 3, 0)) and not close(drawn, draw(model, long[:300], 3, 0))
    objects = [
        {"prompt": "a cat BREAK a dog", "seed": 1},
        {"prompt": "a cat", "seed": 1, "negative": long, "guidance": 2},
    ]
    both = open_file(tmp_path, objects, model, prompt_syntax="a1111")
    assert close(images(both, 0, 1)[1], draw(model, "a cat", 1, 0, long, guidance=2.0))


def test_metadata_of_items(tmp_path):
    model = make_model(words=True)
    objects = [{"prompt": "a", "metadata": {"light": "day"}, "seed": 1}, {"prompt": "a", "seed": 1}, {"prompt": "b"}]
    inputs = open_file(tmp_path, objects, model)
    assert len(images(inputs, 0, 1, 2)) == 3
    fields = [{name: row[name] for name in ("light", "camera")} for row in inputs.source.rows]
    assert fields == [{"light": "day", "camera": "unknown"}] + [{"light": "unknown", "camera": "unknown"}] * 2
    given = open_file(tmp_path, objects, model, metadata=("light=night", "camera=left"))
    assert [row["light"] for row in given.source.rows] == ["day", "night", "night"]
    assert [row["camera"] for row in given.source.rows] == ["left"] * 3


def test_metadata_that_no_item_gives_are_unknown(tmp_path):
    """A picture with a seed is the same in a file whose other items give some."""
    model = make_model(words=True)
    item, other = {"prompt": "a cat", "seed": 1}, {"prompt": "a", "metadata": {"light": "day"}}
    alone, beside = (images(open_file(tmp_path, objects, model), 0)[0] for objects in ([item], [item, other]))
    assert close(alone, beside)
    typed = open_prompts(PromptsConfig(prompt="a cat"), model, options_of(model), seed=1)
    assert typed.source.rows == ({"caption": "a cat", "light": "unknown", "camera": "unknown"},)


def test_wrong_metadata_of_all_items_are_one_error(tmp_path):
    model = make_model(words=True)
    with pytest.raises(ValueError, match="^got metadata light=day and light=night: pass one of them"):
        open_file(tmp_path, [{"prompt": "a"}, {"prompt": "b"}], model, metadata=("light=day", "light=night"))


def test_impossible_settings_are_reported_before_drawing(tmp_path):
    model = make_model("absorbing", condition_drop=0.0)
    objects = [
        {"prompt": "a"},
        {"prompt": "a", "guidance": 2},
        {"prompt": "a", "guidance": 2, "negative": "b"},  # in place of the null, which training has not seen
        {"prompt": "a", "sample_steps": 3},
        {"prompt": "b", "guidance": 2},
    ]
    with pytest.raises(ValueError, match="2 of 5 items cannot be used: item 2: got guidance 2.0, .*; item 5: got guid"):
        open_file(tmp_path, objects, model)
    model = MODELS["absorbing"]
    with pytest.raises(ValueError, match="1 of 2 items .*: item 2: first_hitting takes 16 steps .*, got 50"):
        objects = [{"prompt": "a"}, {"prompt": "a", "sample_steps": 50}]
        open_file(tmp_path, objects, model, solver="first_hitting", sample_steps=16)


def test_whatever_is_wrong_with_items_is_reported_together(tmp_path):
    model = MODELS["ddpm"]
    objects = [
        {"prompt": "a"},
        {"prompt": "a", "model": "stable"},
        {"prompt": "a", "height": 512, "width": 4},
        {"prompt": "a", "negative": "b"},
        {"prompt": "a [cat|dog]"},
        {"prompt": "a", "metadata": {"lon": 1}},
        {"prompt": "a", "output": "samples.png"},
        {"prompt": "a", "guidance": 2, "negative": "a AND b"},
    ]
    with pytest.raises(ValueError, match="7 of 8 items cannot be used") as error:
        open_file(tmp_path, objects, model, prompt_syntax="a1111")
    for message in (
        "item 2: got model 'stable', but tiny is loaded: pass --load_dir stable",
        "item 3: got an image of 512x4, the model draws 4x4",
        "item 4: got negative 'b' with guidance 1, which ignores it",
        "item 5: got [a|b] (alternation)",
        "item 6: got metadata lon=1, which",
        "got output samples.png, which another picture has",
        "item 8: got AND (composable diffusion)",
    ):
        assert message in str(error.value)
    fine = open_file(tmp_path, [{"prompt": "a", "model": "tiny", "height": 4, "width": 4}], model)
    assert len(fine) == 1


def test_pictures_of_repetitions_have_their_own_names(tmp_path):
    objects = [{"prompt": "a", "output": "x/a.png"}, {"prompt": "b"}]
    inputs = open_file(tmp_path, objects, MODELS["ddpm"], n_seeds=2)
    assert inputs.names == ("x/a.png", "images/000001.png", "x/a_1.png", "images/000001_1.png")
    with pytest.raises(ValueError, match=r"got output a_1\.png, which another picture has"):
        objects = [{"prompt": "a", "output": "a.png"}, {"prompt": "b", "output": "a_1.png"}]
        open_file(tmp_path, objects, MODELS["ddpm"], n_seeds=2)


def test_models_without_captions_take_no_prompts():
    sampler = ddpm.build(ddpm.Config(**UNET, sampler="ddpm"), shape=(1, *GRID), pixels=True, n_classes=CLASSES)
    model = TrainedSampler(
        *(Path("logs/tiny"), 0, sampler, PixelSpace(DataConfig(img_size=4, n_channels=1)), DataConfig()),
        *(DatasetConfig(), torch.ones(CLASSES) / CLASSES, "w", DistContext(torch.device("cpu")), False),
    )
    with pytest.raises(
        ValueError, match="got a prompt for logs/tiny, which reads label: pass a run with --cond.* text"
    ):
        open_prompts(PromptsConfig(prompt="a"), model, options_of(model), seed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "a", "prompts": "b.txt"}, "got --prompt and --prompts"),
        ({"negative": "a"}, "got negative 'a' without a prompt"),
        ({"prompt_syntax": "compel"}, "got prompt_syntax compel without a prompt"),
        ({"prompt": "a", "layouts": "b.json"}, "got --layouts and prompts"),
        ({"prompt": "a", "n_seeds": 2}, "got n_seeds 2 without layouts: pass --layouts FILE, --prompts FILE"),
    ],
)
def test_flags_that_do_not_fit_together(settings, message):
    with pytest.raises(ValueError, match=message):
        get_samples.SamplesConfig(**settings)
    get_samples.SamplesConfig(prompts="b.txt", n_seeds=2)


def test_files_and_results(tmp_path):
    """Each image is beside a record of what it was drawn with."""
    model = MODELS["ddpm"]
    objects = [{"prompt": "a cat", "output": "cats/one.png", "seed": 9}, {"prompt": "", "guidance": 2, "negative": "b"}]
    inputs = open_file(tmp_path, objects, model, n_seeds=2)
    settings = get_samples.SamplesConfig(prompts="prompts.json", n_seeds=2)
    batches = ResumableBatches(model.world, tmp_path / "results", batch_size=3, seed=3)
    results = get_samples.measure(settings, inputs.draw, inputs, model, batches)
    json.dumps(results)
    assert results["n_samples"] == 4 and results["prompts_sha256"] == inputs.provenance["prompts_sha256"]
    assert results["images"][0] == {
        "file": "cats/one.png", "model": "tiny", "prompt": "a cat", "negative": None, "seed": 9, "number": 0,
        "solver": "dpmpp_2m", "sample_steps": 2, "guidance": 1.0,
    }  # fmt: skip
    last = results["images"][3]
    assert (last["file"], last["negative"], last["guidance"]) == ("images/000001_1.png", "b", 2)
    assert (last["seed"], last["number"]) == (3, 3)
    drawn = images(inputs, 0, 1, 2, 3)
    for record, image in zip(results["images"], drawn, strict=True):
        with Image.open(tmp_path / "results" / record["file"]) as picture:
            saved = torch.from_numpy(np.array(picture.convert("L")))[None]
        assert close(saved, image)
        again = draw(
            *(model, record["prompt"], record["seed"], record["number"], record["negative"]),
            guidance=record["guidance"],
        )
        assert close(again, image)
    with pytest.raises(ValueError, match="got prompts of different settings, .* leave --save_process out"):
        inputs.check_steps([0, 1])
    inputs.check_steps([0, 2])
    with pytest.raises(ValueError, match="leave --save_process out"):
        inputs.draw([0, 1], on_step=lambda i, t, s, x, predicted: x)
