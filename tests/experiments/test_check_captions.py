"""The check of captions: which captions are asked for with which noise, what is counted, and the command."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from experiments import check_captions
from experiments.check_captions import (
    HELD_OUT,
    LAST,
    LONG_WORDS,
    REPEATED,
    SEEN,
    SWAPPED,
    Sentences,
    captioned_images,
    compute_figures,
    count_tokens,
    plan_requests,
    report,
    swapped_label,
)
from experiments.metrics import image_classifier
from helpers.tiny_runs import DDPM, call
from models.tokenizer import Tokenizer
from train.datasets import digits

NOUNS = ("hat", "shoe", "bag", "dress")
TEXT = "--conditions text --text_width 8 --text_layers 1 --text_heads 2 --no_amp"


def sentences(*templates: str) -> Sentences:
    captions = tuple(tuple(each.format(noun=noun) for each in templates) for noun in NOUNS)
    return Sentences(templates, captions)


SEEN_SENTENCES = sentences("{noun}", "a photo of a {noun}", "the {noun} of today")
HELD_OUT_SENTENCES = sentences("this is a {noun}", "one sees the {noun} here")
DIGITS = digits.build(digits.Config(), "val")  # without captions
N = 5  # images of a caption


@pytest.fixture(scope="module")
def requests():
    return plan_requests(SEEN_SENTENCES, HELD_OUT_SENTENCES, N)


def of_kind(requests, kind):
    return [request for request in requests if request.kind == kind]


def read_noun(caption: str, words: int | None = None) -> int:
    """What a model shows that reads so many words of a caption: the class of its first noun, or else the last class."""
    read = [word.strip(",") for word in caption.split()[:words]]
    return next((NOUNS.index(word) for word in read if word in NOUNS), len(NOUNS) - 1)


def figures_of(requests, read):
    """The figures of a model that shows what `read` makes of a caption, where real images are recognised as they are
    here: two of three hats, a shoe, no bag; a dress is none of the held-out images."""
    predicted, labels = torch.tensor([read(request.caption) for request in requests]), torch.tensor([0, 0, 0, 1, 2])
    return compute_figures(requests, predicted, torch.tensor([True, True, False, True, False]), labels, NOUNS)


def test_every_sentence_is_asked_with_every_noun(requests):
    for kind, asked in ((SEEN, SEEN_SENTENCES), (HELD_OUT, HELD_OUT_SENTENCES)):
        captions = [request.caption for request in of_kind(requests, kind)]
        assert sorted(captions) == sorted(caption for row in asked.captions for caption in row for _ in range(N))
    assert all(read_noun(request.caption) == request.label for request in requests)


def test_of_many_sentences_some_from_first_to_last_are_asked():
    training = sentences(*(f"sentence {number}: a {{noun}}" for number in range(11)))
    requests = plan_requests(training, HELD_OUT_SENTENCES, 1)
    asked = {request.template for request in of_kind(requests, SEEN)}
    assert asked == {f"sentence {number}: a {{noun}}" for number in (0, 3, 6, 9)}
    assert {request.template for request in of_kind(requests, HELD_OUT)} == {*HELD_OUT_SENTENCES.templates}
    (last,) = (request for request in of_kind(requests, LAST) if request.label == 0)
    assert "sentence 5: a" in last.caption and last.caption.startswith("sentence 0: a, sentence 1: a, ")


def test_a_swapped_noun_is_another_one_with_the_same_noise(requests):
    swapped, before = of_kind(requests, SWAPPED), of_kind(requests, HELD_OUT)
    assert len(swapped) == len(before) == 2 * 4 * N
    for new, old in zip(swapped, before, strict=True):
        assert (new.noise, new.template, new.before) == (old.noise, old.template, old.label)
        assert new.label != old.label and read_noun(new.caption) == new.label
        assert new.caption.replace(NOUNS[new.label], NOUNS[old.label]) == old.caption
    assert {(each.before, each.label) for each in swapped} == {(k, (k + 1 + i) % 4) for k in range(4) for i in (0, 1)}


def test_every_class_is_swapped_for_all_others_in_turn():
    for n_classes in (2, 3, 10):
        for label in range(n_classes):
            others = [swapped_label(label, sentence, n_classes) for sentence in range(n_classes - 1)]
            assert {label, *others} == {*range(n_classes)}
            assert swapped_label(label, n_classes - 1, n_classes) == others[0]


def test_images_of_a_class_have_the_same_noise_in_each_sentence(requests):
    for kind in (SEEN, HELD_OUT, SWAPPED, REPEATED, LAST):
        noises = {label: {each.noise for each in of_kind(requests, kind) if each.before == label} for label in range(4)}
        assert noises == {label: {*range(label * N, label * N + N)} for label in range(4)}


def test_long_captions_have_their_length_and_one_noun(requests):
    for request in of_kind(requests, REPEATED) + of_kind(requests, LAST):
        words = request.caption.replace(",", "").split()
        assert len(words) == LONG_WORDS and {*words} & {*NOUNS} == {NOUNS[request.label]}
    for request in of_kind(requests, LAST):
        words = request.caption.replace(",", "").split()
        assert words.count(NOUNS[request.label]) == 1 and words.index(NOUNS[request.label]) == LONG_WORDS - 1
        known = {word for row in SEEN_SENTENCES.captions for caption in row for word in caption.split()}
        assert {*words[:-4]} <= known  # of sentences of training
    assert len({request.caption for request in of_kind(requests, REPEATED)}) == 4


def test_images_are_drawn_with_their_captions_and_their_noise(requests):
    drawn = []

    def draw(noises, seed, options, conditions):
        drawn.append((noises, seed, conditions))
        return {"image": torch.zeros(len(noises)), "codes": torch.zeros(len(noises))}

    source = SimpleNamespace(draw=lambda seed, noises: {"caption": [""] * len(noises), "year": noises})
    make = captioned_images(requests, SimpleNamespace(draw=draw), 7, None, source)
    chosen = [len(requests) - 1, 0, 101]
    assert make(chosen).keys() == {"image"}
    noises, captions = ([getattr(requests[i], name) for i in chosen] for name in ("noise", "caption"))
    assert drawn == [(noises, 7, {"caption": captions, "year": noises})]


def test_a_model_that_reads_everything_is_right_throughout(requests):
    figures = figures_of(requests, read_noun)
    assert all(each["right"] == 1 for each in (*figures["kinds"].values(), *figures["sentences"], *figures["classes"]))
    assert figures["kept"] == {"n": 2 * 4 * N, "right": 0}
    assert [each["n"] for each in figures["classes"]] == [2 * N] * 4


def test_a_model_that_cuts_long_captions_is_found_out(requests):
    kinds = figures_of(requests, lambda caption: read_noun(caption, 77))["kinds"]
    assert kinds[LAST]["right"] == 1 / 4  # the class that it shows without a noun
    assert all(each["right"] == 1 for kind, each in kinds.items() if kind != LAST)


def test_a_model_that_does_not_know_a_sentence_is_found_out(requests):
    figures = figures_of(requests, lambda caption: 3 if caption.startswith("one sees") else read_noun(caption))
    right = {each["sentence"]: each["right"] for each in figures["sentences"]}
    assert right.pop("one sees the {noun} here") == 1 / 4 and set(right.values()) == {1}
    assert figures["kinds"][HELD_OUT]["right"] == 5 / 8 and figures["kinds"][SEEN]["right"] == 1
    assert [each["right"] for each in figures["classes"]] == [1 / 2, 1 / 2, 1 / 2, 1]


def test_a_model_that_follows_the_noise_keeps_the_noun_before(requests):
    predicted = torch.tensor([request.before for request in requests])
    figures = compute_figures(requests, predicted, torch.ones(4).bool(), torch.arange(4), NOUNS)
    assert figures["kinds"][SWAPPED]["right"] == 0 and figures["kept"]["right"] == 1
    assert figures["kinds"][HELD_OUT]["right"] == 1


def test_real_images_count_by_class(requests):
    figures = figures_of(requests, read_noun)
    assert [each["real"] for each in figures["classes"]] == [
        {"n": 3, "right": pytest.approx(2 / 3)},
        {"n": 1, "right": 1},
        {"n": 1, "right": 0},
        {"n": 0, "right": None},
    ]
    assert figures["real"] == {"n": 5, "right": pytest.approx((2 / 3 + 1 + 0) / 3)}


def test_no_token_of_a_long_caption_is_cut(requests, monkeypatch):
    captions = [of_kind(requests, REPEATED)[0].caption, "a hat"]
    counts = count_tokens(captions, 77, Tokenizer())
    assert (counts["words"], counts["chunks"], counts["cut"]) == ([2, LONG_WORDS], [1, 3], 0)
    assert counts["tokens"][0] == 2 and counts["tokens"][1] > LONG_WORDS  # the commas are tokens
    tokenize = check_captions.tokenize
    monkeypatch.setattr(check_captions, "tokenize", lambda *args: tuple(each[:, :1] for each in tokenize(*args)))
    assert count_tokens(captions, 77, Tokenizer())["cut"] == counts["tokens"][1] - 75


def model_with(**sampler) -> SimpleNamespace:
    return SimpleNamespace(run="run", sampler=SimpleNamespace(**sampler), dataset=lambda split: DIGITS)


def test_other_models_are_refused():
    config = SimpleNamespace(captions=SimpleNamespace(n_samples=1), sampling=None)
    refusals = {
        "run reads no captions: train with --conditions text": ({"image": None}, 0),
        "the class beside the caption: train with --no_class_conditional": ({"text": None}, 10),
        "train with --captions templates on data with classes": ({"text": None}, 0),
    }
    for message, (encoders, n_classes) in refusals.items():
        model = model_with(network=SimpleNamespace(encoders=encoders), n_classes=n_classes)
        with pytest.raises(ValueError, match=message):
            check_captions.prepare(config, model, None)


def test_the_command_asks_a_run_and_judges_its_samples(tmp_path, conditions, monkeypatch, capsys):
    monkeypatch.setattr(image_classifier, "RECIPE", image_classifier.RECIPE._replace(epochs=1))
    monkeypatch.setattr(image_classifier, "MAX_IMAGES", 64)
    flags = f"{DDPM} {TEXT} --captions templates --no_class_conditional --attn_block_type transformer"
    call("train_sampler.py", f"--logs_root {tmp_path} {flags} --train_steps 1 --steps_per_eval 0 --log_dir run")
    conditions.clear()
    options = "--n_samples 1 --sample_steps 1 --batch_size 40 --no_amp --log_dir checked"
    call("experiments/check_captions.py", f"--logs_root {tmp_path} --sampler ddpm --load_dir run {options}")
    results = json.loads((tmp_path / "checked" / "results.json").read_text())
    captions = [caption for batch in conditions for caption in batch["caption"]]
    assert len(captions) == sum(each["n"] for each in results["kinds"].values()) > 50
    assert results["long_captions"]["cut"] == 0 and results["long_captions"]["words"] == [LONG_WORDS] * 2
    assert [each["class"] for each in results["classes"]] == [*"0123456789"]
    assert sum(each["real"]["n"] for each in results["classes"]) == 64
    out = capsys.readouterr().out
    assert report(results, tmp_path / "checked") in out and "real held-out images" in out
    with Image.open(tmp_path / "checked" / "captions.png") as picture:
        assert picture.height > 10 * 64
