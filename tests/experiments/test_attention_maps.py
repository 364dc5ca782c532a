"""attention_maps.py on tiny models: what is mapped, that the maps are those of the recorder, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.attention_maps import OVERLAP, MapsConfig, join_batches, overlaps, select_targets
from experiments.harness.attention_targets import RealImages, Target, find_targets, relative_heat
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from helpers.pages import blocks
from helpers.tiny_runs import DDPM, ROOT, call
from models.attention_recorder import MapRecorder
from models.heat_maps import enlarge, heat_maps, intersection_over_union, mean_heat
from train.inference import load
from train.samplers import ddpm
from train.trained_sampler import TrainedSampler

DATA = "--dataset digit_pairs --digit_pairs_count 12 --img_size 8 --img_width 16 --n_channels 1"
TEXT = "--conditions text --text_width 16 --text_layers 1 --text_heads 2"
MODEL = DDPM.replace("--img_size 8 ", "") + " --attn_block_type transformer"
PROMPT = ["--prompt", "a three left of a seven, a three"]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Runs with captions, and with captions and boxes, trained for a step."""
    logs = tmp_path_factory.mktemp("logs")
    preset = logs / "tiny.yaml"  # in place of that of the data
    preset.write_text("dataset: digit_pairs\n")
    training = f"--config {preset} --logs_root {logs} {DATA} {MODEL} --train_steps 1 --no_amp"
    call("train_sampler.py", f"{training} {TEXT} --log_dir ddpm_digit_pairs", validation_images=4)
    call("train_sampler.py", f"{training} --conditions boxes --boxes_width 16 --log_dir boxes", validation_images=4)
    return logs


def draw_maps(logs, results, flags, *words):
    model = [] if "--sampler" in flags else ["--sampler", "ddpm"]
    call(
        "experiments/attention_maps.py",
        [*f"--logs_root {logs} --no_amp --log_dir {results} {flags}".split(), *model, *words],
    )
    with np.load(logs / results / "maps.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file}
    return arrays, json.loads((logs / results / "results.json").read_text())


TINY = "--load_dir ddpm_digit_pairs --n_samples 3 --batch_size 2 --sample_steps 3 --guidance 2"


def test_maps_of_a_prompt_are_those_of_the_recorder(logs):
    arrays, results = draw_maps(logs, "prompted", TINY, *PROMPT, "--words", "three", "left of")
    assert arrays["names"].tolist() == [["three", "left of"]] * 3
    assert arrays["image"].shape == (3, 1, 8, 16) and arrays["heat"].shape == (3, 2, 4, 8)
    assert arrays["calls"].tolist() == [3] * 3
    run, recorder = load(logs / "ddpm_digit_pairs", amp=False), MapRecorder()
    settings = {"solver": "dpmpp_2m", "sample_steps": 3, "guidance": 2.0}
    images = run.sample(3, caption=PROMPT[1], recorder=recorder, **settings)
    assert torch.equal(images, run.sample(3, caption=PROMPT[1], **settings))
    maps = recorder.maps()
    first = maps.spans["text"].start + 1 + 1  # after the null and the start
    wanted = mean_heat(heat_maps(maps), [first + 1, first + 8]), mean_heat(heat_maps(maps), [first + 2, first + 3])
    assert np.allclose(arrays["heat"], torch.stack(wanted, 1).numpy(), atol=1e-5)
    assert np.abs(arrays["image"].astype(int) - images.numpy()).max() <= 1  # of other batches, to rounding
    overlays = sorted(path.name for path in (logs / "prompted" / "overlays").iterdir())
    assert overlays[:2] == ["000000_00_three.png", "000000_01_left_of.png"] and len(overlays) == 6
    assert (logs / "prompted" / "maps.png").is_file() and len(results["images"]) == 3
    for image in results["images"]:
        assert np.allclose(np.diag(image["overlaps"]), 1) and np.allclose(
            image["overlaps"], np.transpose(image["overlaps"])
        )


def test_words_of_a_negative_prompt_are_mapped(logs):
    """Equal prompts attend equally on both sides of guidance; another one has words of its own."""
    flags = f"{TINY} --daam"
    last, _ = draw_maps(logs, "last", flags, *PROMPT, "--negative", PROMPT[1])
    first, _ = draw_maps(logs, "first", f"{flags} --chain_part 0", *PROMPT, "--negative", PROMPT[1])
    assert np.array_equal(first["names"], last["names"]) and np.allclose(first["heat"], last["heat"], atol=1e-5)
    assert np.array_equal(first["image"], last["image"])
    words = ["--negative", "two (blue:1.5) rings", "--prompt_syntax", "a1111"]
    other, results = draw_maps(logs, "away", f"{flags} --chain_part 0 --relative", *PROMPT, *words)
    assert other["names"].tolist() == [["two", "blue", "rings"]] * 3 and results["negative"] == words[1]
    assert np.allclose(other["heat"].sum(1), 1, atol=0.02)  # the shares of all words


def test_weights_of_words_change_the_maps_but_not_the_words(logs):
    plain, _ = draw_maps(logs, "plain", TINY, *PROMPT, "--words", "three", "left of")
    words = ["--words", "three", "left of", "--prompt_syntax", "a1111"]
    one, _ = draw_maps(logs, "one", TINY, "--prompt", "a (three:1.0) left of a seven, a three", *words)
    most, _ = draw_maps(logs, "most", TINY, "--prompt", "a (three:9) left of a seven, a three", *words)
    assert plain["names"].tolist() == one["names"].tolist() == most["names"].tolist()
    assert np.allclose(one["heat"], plain["heat"], atol=1e-4) and not np.allclose(
        most["heat"], plain["heat"], atol=1e-4
    )


def test_maps_are_compared_with_masks_of_words(logs, tmp_path, capsys):
    """A mask that is what the map marks overlaps wholly; one of another image with none of it."""
    arrays, _ = draw_maps(logs, "unmasked", TINY, *PROMPT, "--words", "three", "left of")
    marked = enlarge(torch.from_numpy(arrays["heat"]), (8, 16)) > OVERLAP
    for name, mask in {"three": ~marked[0, 0], "000000_three": marked[0, 0], "000002_left_of": marked[2, 1]}.items():
        Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize((32, 16), 0).save(tmp_path / f"{name}.png")
    words = ["--words", "three", "left of", "--masks", str(tmp_path)]
    _, results = draw_maps(logs, "masked", TINY, *PROMPT, *words)
    found = [image["mask_overlaps"] for image in results["images"]]
    assert found[0] == [1.0, None] and found[2][1] == 1.0 and found[1][1] is None
    assert found[1][0] == pytest.approx(intersection_over_union(marked[1, 0], ~marked[0, 0]).item())
    text = capsys.readouterr().out
    assert re.search(r"left of +1.00 +1\n", text) and re.search(r"three +0.\d\d +3\n", text)
    (tmp_path / "seven.png").write_bytes((tmp_path / "three.png").read_bytes())
    with pytest.raises(SystemExit):
        draw_maps(logs, "mistaken", TINY, *PROMPT, *words)
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "seven.png, wanted some of three.png, left_of.png" in text


def test_a_recorder_is_for_one_batch(logs):
    run = load(logs / "ddpm_digit_pairs", amp=False)
    with pytest.raises(ValueError, match="for one batch, and 3 images in batches of 2: pass batch_size=3"):
        run.sample(3, caption="a three", batch_size=2, recorder=MapRecorder())


def test_steps_and_layers_add_up_to_the_maps(logs):
    flags = f"{TINY} --by_step --by_layer"
    mean, _ = draw_maps(logs, "steps", flags, *PROMPT)
    total, _ = draw_maps(logs, "daam", f"{flags} --daam", *PROMPT)
    assert mean["heat_by_step"].shape == (3, 3, 5, 4, 8) and (np.diff(mean["times"], axis=1) < 0).all()
    assert np.allclose(mean["heat_by_step"].mean(1), mean["heat"], atol=1e-5)
    assert np.allclose(total["heat"], 3 * mean["heat"], atol=1e-5)
    layers = [mean[name] for name in mean if name.startswith("layer/up") or name.startswith("layer/down")]
    assert {layer.shape[3:] for layer in layers} == {(4, 8)}
    assert np.allclose(np.concatenate(layers, 1).mean(1), mean["heat"], atol=1e-5)
    assert (logs / "steps" / "steps.png").is_file() and not (logs / "prompted" / "steps.png").exists()


def test_objects_of_held_out_images_are_mapped_by_their_classes(logs):
    flags = "--load_dir boxes --n_samples 3 --real --real_times 4"
    arrays, results = draw_maps(logs, "real", flags)
    model = load_model(
        ModelConfig(sampler="ddpm", dataset="digit_pairs", load_dir="boxes"),
        OutputConfig(logs_root=str(logs), amp=False),
    )
    images = RealImages.open(model, 3, ddpm.Sampling(), 0, 4)
    items = [images.source[index] for index in images.items]
    assert arrays["names"].tolist() == [item["box_words"] for item in items]
    assert np.array_equal(arrays["image"], np.stack([item["image"].numpy() for item in items]))
    assert [image["calls"] for image in results["images"]] == [4] * 3


def test_codes_show_what_a_box_attends_to(trained):
    flags = "--sampler absorbing --n_samples 2 --look_from 0 0 0.3 0.3 --by_step --sample_steps 4"
    arrays, _ = draw_maps(trained, "looks", flags)
    assert arrays["heat"].shape == (2, 1, 4, 4) and arrays["names"].tolist() == [["what it attends to"]] * 2
    assert np.allclose(arrays["heat"].sum((1, 2, 3)), 1, atol=1e-5)
    steps = arrays["heat_by_step"].sum((2, 3, 4))
    assert np.allclose(steps[np.isfinite(steps)], 1, atol=1e-5)
    assert np.isfinite(arrays["times"]).sum(1).tolist() == arrays["calls"].tolist()


@pytest.mark.parametrize(
    ("flags", "words", "message"),
    [
        (TINY, ["--prompt", "a hatter", "--words", "hat"], "got the word 'hat', wanted one of 'a hatter': a, hatter"),
        ("--load_dir boxes --n_samples 2", ["--prompt", "a three"], "pass a run with --conditions text"),
        ("--load_dir boxes --n_samples 2", ["--words", "three"], "wanted a run with --conditions text"),
        (TINY, ["--map_layers", "up_blocks.9.1.cross"], "wanted some of down_blocks"),
        (TINY, ["--look_from", "0.5", "0", "0.5", "1"], "wanted left < right and top < bottom"),
        (TINY, ["--real", *PROMPT], "leave one of them out"),
        (TINY, ["--real", "--condition_file", "rows.json"], "got condition_file for held-out images, which have"),
        (TINY, ["--real", "--metadata", "light=day"], "leave --metadata out"),
        (f"{TINY} --chain_part 0", PROMPT, "got chain_part 0, which has no words or objects: pass --negative TEXT"),
        (f"{TINY} --chain_part 2", PROMPT, "got part 2 of a chain of 2 conditions, wanted 0 to 1"),
        (
            f"{TINY} --guidance 1",
            [*PROMPT, "--negative", "a two"],
            "with guidance 1, which ignores it: pass --guidance",
        ),
        (f"{TINY} --real", ["--negative", "a two"], "got negative for real images, which are read without guidance"),
        (TINY, ["--prompt_syntax", "a1111"], "got prompt_syntax a1111 without a prompt: pass --prompt TEXT"),
        (TINY, ["--masks", "nowhere"], "nowhere has no PNG files: pass a folder of masks as --masks"),
        (TINY, ["--real_times", "3"], "got real_times 3 without --real: pass --real"),
    ],
    ids=[
        "part of a word",
        "no captions",
        "words without captions",
        "layer",
        "box",
        "real and a prompt",
        "real and a file",
        "real and words",
        "the null",
        "no such part",
        "negative without guidance",
        "real and negative",
        "syntax without a prompt",
        "no masks",
        "times",
    ],
)
def test_what_cannot_be_mapped_is_refused(logs, flags, words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        draw_maps(logs, "refused", flags, *words)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (logs / "refused" / "maps.npz").exists()


def test_classes_are_refused_since_they_are_no_tokens(trained_ddpm, capsys):
    with pytest.raises(SystemExit) as stop:
        draw_maps(trained_ddpm, "refused", "--n_samples 2 --sample_steps 2")
    assert stop.value.code == 2
    text = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "attends to no tokens of its conditions (label): what is a vector, as classes are, is added" in text


def test_targets_of_a_batch_are_its_words(logs):
    model = load(logs / "ddpm_digit_pairs", amp=False).model
    (one, other) = find_targets(model, {"caption": ["a three, a three", "two"]}, 2)
    assert [target.name for target in one] == ["a", "three"] and [target.name for target in other] == ["two"]
    assert one[1].tokens == (3, 6) and one[1].keys({"text": slice(5, 20)}) == [8, 11]
    with pytest.raises(ValueError, match="encoded already, whose words are not known"):
        find_targets(model, {"caption": torch.zeros(1, 4, 16)}, 1)


def test_names_of_classes_are_read_once(logs, monkeypatch):
    model, opened = load(logs / "boxes", amp=False).model, []
    dataset = model.dataset("val")
    monkeypatch.setattr(TrainedSampler, "dataset", lambda model, split: opened.append(split) or dataset)
    batch = {"boxes": torch.tensor([[[0, 0, 4.0, 4.0]]]), "box_class": torch.tensor([[3]])}
    for _ in range(3):
        assert [target.name for target in find_targets(model, batch, 1)[0]] == ["three"]
    assert opened == ["val"]


def test_images_with_fewer_targets_end_with_nan():
    heat = torch.arange(12.0).view(2, 3, 1, 2)
    targets = [[Target("a", "text", (0, 1))], [Target("b", "text", (1,)), Target("c", "text", (0,))]]
    selected = select_targets(heat, targets, {"text": slice(1, 3)}, 2)
    assert selected[0, 0].tolist() == [[3, 4]] and selected[0, 1].isnan().all()
    assert selected[1].tolist() == [[[10, 11]], [[8, 9]]]
    parts = [{"times": torch.ones(1, 2)}, {"times": torch.ones(2, 3)}]
    assert join_batches(parts)["times"].isnan().tolist() == [[False, False, True]] + [[False] * 3] * 2


def test_relative_heat_is_the_share_of_all_targets():
    heat = torch.rand(2, 4, 3, 5)
    targets = [[Target("a", "text", (0, 1)), Target("b", "text", (2,))], [Target("a", "text", (1,))]]
    relative = relative_heat(heat, targets, {"text": slice(1, 4)})
    assert torch.allclose(relative[0, 1:].sum(0), torch.ones(3, 5), atol=1e-3)
    assert torch.allclose(relative[0, 0], heat[0, 0] / heat[0, 1:].sum(0), rtol=1e-3)
    assert torch.allclose(relative[1, 2], torch.ones(3, 5), atol=1e-2)


def test_overlaps_are_those_of_the_warmer_halves():
    heat = torch.zeros(2, 2, 2)
    heat[0, 0], heat[1, :, 0] = 1, 1
    values = overlaps(heat, (2, 2))
    assert np.allclose(values, [[1, 1 / 3], [1 / 3, 1]]) and overlaps(heat[:0], (2, 2)) == []


def test_the_example_of_the_page_runs(logs, monkeypatch):
    monkeypatch.chdir(logs.parent)
    _, code = blocks((ROOT / "docs" / "attention.md").read_text(), "python")
    code, names = code.replace('"logs/ddpm_digit_pairs"', repr(str(logs / "ddpm_digit_pairs"))), {}
    exec(code, names)
    assert names["heat"].shape == (4, 8, 16) and names["heat"].min() == 0


def test_settings_that_exclude_each_other_are_refused():
    signed = {"relative": True, "signed": True}
    for settings in ({"prompt": "a", "layouts": "b"}, {"look_from": (0, 0, 1, 1), "words": ("hat",)}, signed):
        with pytest.raises(ValueError, match="pass one of them|leave one of them out"):
            MapsConfig(**settings)


def test_self_attention_is_mapped_under_any_condition():
    assert MapsConfig(chain_part=0, look_from=(0, 0, 1, 1)).make_recorder().part == 0
