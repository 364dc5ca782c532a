"""get_samples.py on tiny trained models: images of one class, and interrupted runs."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from experiments.check_digits import GOALS, conditional_accuracy
from experiments.harness.first_stage import FirstStageModelConfig, load_chosen_vqgan
from experiments.harness.images import read_samples
from helpers.tiny_runs import DDPM, SAMPLER, call
from train.data.transforms import to_uint8
from train.trained_sampler import TrainedSampler
from vq.tiles import decode_tiled


def samples(logs, flags):
    call("experiments/get_samples.py", f"--logs_root {logs} --no_amp --batch_size 4 {flags}")


@pytest.fixture
def draw_calls(monkeypatch):
    """The arguments of every sampled batch."""
    batches, draw = [], TrainedSampler.draw

    def record(model, indices, seed, options, conditions, **kwargs):
        batches.append({"indices": indices, "conditions": conditions, **kwargs})
        return draw(model, indices, seed, options, conditions, **kwargs)

    monkeypatch.setattr(TrainedSampler, "draw", record)
    return batches


def test_an_interrupted_run_resumes_to_the_same_files(trained, draw_calls, monkeypatch):
    flags = "--n_samples 10 --save_individually --save_process"
    samples(trained, f"{flags} --log_dir samples_whole")
    uninterrupted, resumed = trained / "samples_whole", trained / "samples_cut"
    draw_calls.clear()
    draw = TrainedSampler.draw

    def interrupted_draw(model, indices, *args, **kwargs):
        if indices[0] == 8:
            raise KeyboardInterrupt
        return draw(model, indices, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(TrainedSampler, "draw", interrupted_draw)
        samples(trained, f"{flags} --log_dir samples_cut")
    assert stop.value.code == 130
    assert not any((resumed / name).exists() for name in ("results.json", "samples.npz", "samples.png"))
    draw_calls.clear()
    samples(trained, f"{flags} --log_dir samples_cut")
    assert [batch["indices"] for batch in draw_calls] == [
        [8, 9],
        [0, 1, 2, 3, 4, 5],
    ]  # the last are those of process.png
    assert draw_calls[0]["on_step"] is None and draw_calls[1]["on_step"] is not None
    files = {path.relative_to(uninterrupted) for path in uninterrupted.rglob("*")}
    assert {path.relative_to(resumed) for path in resumed.rglob("*")} == files and len(files) == 6 + 10
    for path in files - {uninterrupted.relative_to(uninterrupted) / "config.yaml"}:
        if path.suffix in (".png", ".json"):
            assert (uninterrupted / path).read_bytes() == (resumed / path).read_bytes()
    with np.load(uninterrupted / "samples.npz") as one, np.load(resumed / "samples.npz") as other:
        assert one.files == other.files
        assert all(np.array_equal(one[name], other[name]) for name in one.files)


def test_all_images_of_one_class(trained, draw_calls):
    flags = "--n_samples 6 --label 7 --guidance 3"
    samples(trained, f"{flags} --log_dir samples_seven --save_process")
    assert read_samples(trained / "samples_seven" / "samples.npz")["labels"].tolist() == [7] * 6
    assert [batch["conditions"]["label"].tolist() for batch in draw_calls] == [[7] * 4, [7] * 2, [7] * 6]
    samples(trained, "--n_samples 24 --guidance 3 --log_dir samples_any")
    mixed = read_samples(trained / "samples_any" / "samples.npz")
    samples(trained, "--n_samples 24 --guidance 3 --label 7 --log_dir samples_sevens")
    sevens = read_samples(trained / "samples_sevens" / "samples.npz")
    same = (mixed["codes"] == sevens["codes"]).flatten(1).all(1)
    assert len(mixed["labels"].unique()) > 5 and 0 < (mixed["labels"] == 7).sum() < 24
    assert same[mixed["labels"] == 7].all()  # the noise of an image does not depend on the classes of others


def test_another_class_is_another_experiment(trained, capsys):
    samples(trained, "--n_samples 2 --label 1 --log_dir samples_one")
    with pytest.raises(SystemExit) as stop:
        samples(trained, "--n_samples 2 --label 2 --log_dir samples_one")
    assert stop.value.code == 2 and "--label 1 -> 2" in capsys.readouterr().err
    results = json.loads((trained / "samples_one" / "results.json").read_text())
    assert results == {"n_samples": 2, "seed": 0, "label": 1}


@pytest.mark.parametrize(
    ("label", "message"),
    [(-1, "got label -1, wanted a class from 0 to 9"), ("hat", "got label 'hat', wanted one of 0, 1, 2")],
)
def test_an_unknown_class_is_refused(trained, label, message, capsys):
    with pytest.raises(SystemExit) as stop:
        samples(trained, f"--n_samples 2 --label {label} --log_dir samples_none")
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (trained / "samples_none").exists()


def test_a_model_without_classes_has_none(trained, capsys):
    flags = f"--train_steps 1 --no_amp {SAMPLER} --no_class_conditional --guidance 1 --log_dir classless"
    call("train_sampler.py", f"--logs_root {trained} {flags}")
    with pytest.raises(SystemExit) as stop:
        samples(trained, "--n_samples 2 --label 0 --load_dir classless --log_dir samples_none")
    assert stop.value.code == 2 and "a sampler without classes: leave the label out" in capsys.readouterr().err
    samples(trained, "--n_samples 2 --load_dir classless --log_dir samples_classless")
    assert "labels" not in read_samples(trained / "samples_classless" / "samples.npz")


def test_a_class_of_pixels(trained_ddpm, draw_calls):
    samples(trained_ddpm, "--sampler ddpm --n_samples 3 --label 4 --log_dir samples_four")
    assert read_samples(trained_ddpm / "samples_four" / "samples.npz")["labels"].tolist() == [4, 4, 4]
    assert draw_calls[0]["conditions"].keys() == {"label"}


@pytest.mark.slow
def test_other_conditions_do_not_depend_on_the_class(trained_ddpm, draw_calls, monkeypatch):
    """A network with an image condition gets the same images with and without --label."""
    flags = "--adapt my_grey.grey --conditions image --condition_channels 1 --log_dir grey"
    folder = trained_ddpm / "code"
    folder.mkdir()
    (folder / "my_grey.py").write_text(
        "def grey(item):\n    return item | {'condition_image': item['image'].float().mean(0, keepdim=True).byte()}\n"
    )
    monkeypatch.syspath_prepend(folder)
    call("train_sampler.py", f"--logs_root {trained_ddpm} --train_steps 1 --no_amp {DDPM} {flags}")
    flags = "--sampler ddpm --load_dir grey --allow my_grey.grey --n_samples 3 --log_dir"
    samples(trained_ddpm, f"{flags} grey_any")
    samples(trained_ddpm, f"{flags} grey_two --label 2")
    assert draw_calls[1]["conditions"]["label"].tolist() == [2, 2, 2]
    assert torch.equal(draw_calls[1]["conditions"]["condition_image"], draw_calls[0]["conditions"]["condition_image"])


def test_conditional_accuracy_uses_the_requested_classes():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 5.0, 1.0], [1.0, 0.0, 0.0]])
    assert conditional_accuracy(logits, torch.tensor([0, 2, 0, 1])) == 0.5
    assert conditional_accuracy(logits, torch.tensor([0, 1, 3, 3])) == 0.5  # 3 is the null class
    assert conditional_accuracy(logits, torch.full((4,), 3)) is None is conditional_accuracy(logits, None)
    assert GOALS["samples whose class the classifier gives as asked"][1:] == (">=", 0.97)


def test_digits_are_checked_against_the_requested_classes(trained, capsys):
    goal = "samples whose class the classifier gives as asked"
    samples(trained, "--n_samples 20 --log_dir samples_twenty")
    path = trained / "samples_twenty" / "samples.npz"
    call("experiments/check_digits.py", f"--logs_root {trained} --samples {path} --log_dir checked")
    results = json.loads((trained / "checked" / "results.json").read_text())
    assert 0 <= results[goal] <= 1 and GOALS[goal].label in capsys.readouterr().out
    with np.load(path) as arrays:
        without_labels = {name: arrays[name] for name in ("arr_0", "codes")}
    np.savez(trained / "unasked.npz", **without_labels)
    flags = f"--logs_root {trained} --samples {trained / 'unasked.npz'} --log_dir checked_unasked"
    call("experiments/check_digits.py", flags)
    without = json.loads((trained / "checked_unasked" / "results.json").read_text())
    assert without == {name: value for name, value in results.items() if name != goal}


@pytest.mark.slow
def test_prompts_of_a_file(tmp_path, draw_calls, capsys):
    shapes = "--dataset shapes --shapes_count 20 --conditions text --attn_block_type transformer --text_width 16"
    train = f"--logs_root {tmp_path} {DDPM} {shapes} --train_steps 1 --no_amp --log_dir text"
    call("train_sampler.py", train, validation_images=4)
    items = [
        {"prompt": "a (red:1.4) disc", "seed": 7, "guidance": 3, "negative": "blue", "output": "one.jpg"},
        {"prompt": "two blue rings BREAK a disc", "sample_steps": 2},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, items)))
    flags = f"--load_dir text --prompts {file} --prompt_syntax a1111 --n_seeds 2 --log_dir prompts"
    samples(tmp_path, flags)
    results = json.loads((tmp_path / "prompts" / "results.json").read_text())
    assert [image["seed"] for image in results["images"]] == [7, 0, 7, 0]
    assert all((tmp_path / "prompts" / image["file"]).is_file() for image in results["images"])
    assert read_samples(tmp_path / "prompts" / "samples.npz")["image"].shape == (4, 3, 8, 8)
    count = len(draw_calls)
    samples(tmp_path, flags)
    assert len(draw_calls) == count  # the results are there
    file.write_text(json.dumps(items[0]))
    with pytest.raises(SystemExit):
        samples(tmp_path, flags)
    assert "--prompts: other content" in capsys.readouterr().err
    file.write_text(json.dumps({"promt": "a"}))
    with pytest.raises(SystemExit) as stop:
        samples(tmp_path, f"--load_dir text --prompts {file} --log_dir none")
    assert stop.value.code == 2 and "item 1: got the key 'promt', did you mean 'prompt'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    samples(tmp_path, "--load_dir text --prompt disc --negative ring --guidance 2 --n_samples 3 --log_dir one")
    images = json.loads((tmp_path / "one" / "results.json").read_text())["images"]
    assert [(each["prompt"], each["negative"], each["number"]) for each in images] == [
        ("disc", "ring", i) for i in range(3)
    ]
    shutil.copytree(tmp_path / "text", tmp_path / "second")
    (tmp_path / "models.yaml").write_text("other: second\n")
    file.write_text('{"prompt": "a disc"}\n{"prompt": "a disc", "model_name": "other", "num_inference_steps": 2}')
    samples(tmp_path, f"--load_dir text --prompts {file} --models {tmp_path / 'models.yaml'} --log_dir both")
    images = json.loads((tmp_path / "both" / "results.json").read_text())["images"]
    assert [(each["model"], each["file"]) for each in images] == [
        ("text", "images/000000.png"),
        ("other", "images/000001.png"),
    ]
    assert "models_sha256" in (tmp_path / "both" / "config.yaml").read_text()


def test_codes_are_decoded_in_tiles(trained):
    flags = "--n_samples 3 --sample_steps 2"
    samples(trained, f"{flags} --log_dir in_tiles --tile 2 --overlap 1")
    found = np.load(trained / "in_tiles" / "samples.npz")
    vqgan = load_chosen_vqgan(FirstStageModelConfig(), str(trained), torch.device("cpu"), amp=False).vqgan
    codes = torch.from_numpy(found["codes"]).long()
    wanted = to_uint8(decode_tiled(vqgan, codes, 2, 1)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found["arr_0"][..., :1], wanted)
    with torch.no_grad():
        assert not np.array_equal(to_uint8(vqgan.decode(codes)).permute(0, 2, 3, 1).numpy(), wanted)


def test_tiles_are_refused_for_pixels(trained_ddpm, capsys):
    with pytest.raises(SystemExit) as stop:
        samples(trained_ddpm, "--sampler ddpm --n_samples 2 --tile 4")
    assert stop.value.code == 2
    assert re.search("got --tile 4, but .*ddpm_digits was trained on pixels: leave it out", capsys.readouterr().err)
