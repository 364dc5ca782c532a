"""The CLIPScore of a tiny model of captions, by transformers' own CLIP model with random weights."""

import json

import pytest
import torch
import yaml

from experiments.calc_clip_score import clip_scores
from experiments.harness.experiment import ModelConfig, OutputConfig, load_model
from experiments.harness.images import read_samples
from helpers.captioned import write_captioned_images
from helpers.tiny_runs import DDPM, call
from train.data.loading import ImageSource

tiny_clip = pytest.importorskip("helpers.tiny_clip")
CAPTIONS = ["a red cat", "the dog", "a bird on the mat", "x"]
PREFIX = "so"


@pytest.fixture(scope="module")
def clip_model():
    return tiny_clip.make_clip()


@pytest.fixture(scope="module")
def folder(clip_model, tmp_path_factory):
    return tiny_clip.save_clip(tmp_path_factory.mktemp("clip"), clip_model)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A model of captions of 8x8 images, trained for two steps, and four of its samples with prompts."""
    logs = tmp_path_factory.mktemp("logs")
    data = write_captioned_images(tmp_path_factory.mktemp("data"), CAPTIONS)
    text = "--conditions text --text_width 16 --text_layers 1 --text_heads 2 --attn_block_type transformer --no_amp"
    call("train_sampler.py", f"--logs_root {logs} {data} {DDPM} {text} --train_steps 2 --log_dir run")
    (logs / "prompts.txt").write_text("\n".join(CAPTIONS))
    call("experiments/get_samples.py", f"{run_flags(logs)} --prompts {logs / 'prompts.txt'} --log_dir samples")
    return logs


def run_flags(logs):
    return f"--logs_root {logs} --sampler ddpm --load_dir run --dataset captions --sample_steps 2 --no_amp"


def measure(logs, folder, log_dir, flags, prefix=PREFIX):
    command = f"{run_flags(logs)} --clip_dir {folder} --caption_prefix={prefix} --log_dir {log_dir} {flags}"
    call("experiments/calc_clip_score.py", command)
    return json.loads((logs / log_dir / "results.json").read_text())


@torch.no_grad()
def cosines(model, folder, images, captions):
    """Cosines (N, N) of images and captions by transformers' CLIPModel as a whole."""
    from transformers import CLIPImageProcessor, CLIPTokenizer

    tokens = CLIPTokenizer.from_pretrained(folder)(captions, padding=True, truncation=True, max_length=12)
    pixels = CLIPImageProcessor.from_pretrained(folder)(list(images), return_tensors="pt")
    inputs = {name: torch.tensor(each) for name, each in tokens.items()} | dict(pixels)
    return model(**inputs).logits_per_image / model.logit_scale.exp()


def test_scores_are_those_of_the_publication():
    images = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    captions = torch.tensor([[5.0, 0.0], [3.0, 0.0], [1.0, 0.0]])
    expected = torch.tensor([2.5, 2.5 / 2**0.5, 0.0]).double()  # a negative cosine counts as 0
    torch.testing.assert_close(clip_scores(images, captions), expected)


@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_given_samples_are_scored_with_their_prompts(logs, folder, clip_model, prefix):
    flags = f"--samples {logs / 'samples'} --batch_size 3"
    results = measure(logs, folder, f"given_{prefix}", flags, prefix)
    images = read_samples(logs / "samples" / "samples.npz")["image"]
    cosine = cosines(clip_model, folder, images, [f"{prefix} {caption}".strip() for caption in CAPTIONS])
    own, other = (2.5 * each.clamp(min=0) for each in (cosine.diag(), cosine.roll(1, 1).diag()))
    assert results["generated"]["mean"] == pytest.approx(own.mean().item(), abs=1e-6)
    assert results["generated"]["error"] == pytest.approx(own.std().item() / 2, abs=1e-6)
    assert results["generated_other_captions"]["mean"] == pytest.approx(other.mean().item(), abs=1e-6)
    assert results["generated"]["n"] == 4 and "real" not in results
    assert results["captions_cut"] == 1  # the longest has more than 12 tokens
    assert abs(own.mean() - other.mean()) > 1e-4  # else any pairing would pass


def test_of_weighted_prompts_the_plain_words_are_scored(logs, folder):
    """The images are the same: only the prompts that results.json lists are read anew."""
    source, weighted = logs / "samples", logs / "weighted"
    results = json.loads((source / "results.json").read_text())
    settings = yaml.safe_load((source / "config.yaml").read_text())
    words = measure(logs, folder, "of_words", f"--samples {source}")
    weighted.mkdir()
    (weighted / "samples.npz").write_bytes((source / "samples.npz").read_bytes())
    for image in results["images"]:
        first, _, rest = image["prompt"].partition(" ")
        image["prompt"] = f"({first}:1.3) BREAK [{rest}]"
    (weighted / "results.json").write_text(json.dumps(results))
    scores = []
    for syntax in ("a1111", "plain"):
        settings["samples"]["prompt_syntax"] = syntax
        (weighted / "config.yaml").write_text(yaml.safe_dump(settings))
        scores.append(measure(logs, folder, f"of_{syntax}", f"--samples {weighted}")["generated"]["mean"])
    assert scores[0] == pytest.approx(words["generated"]["mean"], abs=1e-6)
    assert abs(scores[1] - scores[0]) > 1e-4  # brackets of plain text are characters


def test_samples_have_held_out_captions_beside_real_images(logs, folder, clip_model, capsys):
    results = measure(logs, folder, "drawn", "--n_samples 6")
    assert results["generated"]["n"] == 6 and results["real"]["n"] == 4  # all held-out images
    model = load_model(
        ModelConfig(sampler="ddpm", dataset="captions", load_dir="run"), OutputConfig(logs_root=str(logs))
    )
    held_out = ImageSource(model.dataset("val"), model.data)
    images = torch.stack([held_out[i]["image"] for i in range(4)])
    prefixed = [f"{PREFIX} {held_out[i]['captions'][0]}" for i in range(4)]
    expected = 2.5 * cosines(clip_model, folder, images, prefixed).diag().clamp(min=0)
    assert results["real"]["mean"] == pytest.approx(expected.mean().item(), abs=1e-6)
    out = capsys.readouterr().out
    assert "held-out real images" in out and "captions of generated images have more tokens" in out


def test_what_cannot_be_scored_is_refused(logs, folder, trained_ddpm, tmp_path, capsys):
    def refused(command):
        with pytest.raises(SystemExit) as stop:
            call("experiments/calc_clip_score.py", command)
        assert stop.value.code == 2
        return " ".join(capsys.readouterr().err.replace("│", " ").split())

    assert "pass --clip_dir DIR" in refused(f"{run_flags(logs)} --n_samples 2 --log_dir none")
    no_captions = f"--logs_root {trained_ddpm} --sampler ddpm --clip_dir {folder}"
    assert "reads no captions: pass a run with --conditions text" in refused(no_captions)
    (tmp_path / "samples.npz").write_bytes((logs / "samples" / "samples.npz").read_bytes())
    (tmp_path / "results.json").write_text('{"n_samples": 4}')
    lost = f"{run_flags(logs)} --clip_dir {folder} --samples {tmp_path}"
    assert "got 4 images and 0 prompts" in refused(lost)
