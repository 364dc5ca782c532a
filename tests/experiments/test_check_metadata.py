"""The check of words: which images are asked for, what is counted, and the command, with a sampler of known images."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import check_metadata
from experiments.check_metadata import (
    ALIKE,
    BEFORE,
    FLOOR,
    GIVEN,
    MOST_WORDS,
    NEW,
    REAL,
    SAMPLES,
    STAYS,
    STRIP,
    STRIP_ROWS,
    SWAPPED,
    compute_figures,
    draw_strips,
    find_occurring,
    plan_requests,
    report,
    requested_images,
    share_of_matches,
)
from experiments.metrics import image_classifier
from helpers.tiny_runs import DDPM, ROOT, call, parse_config
from models.conditions.metadata import NULL
from train.trained_sampler import TrainedSampler

VALUES = {"place": ("bay", "hill", "lake"), "tone": ("bright", "dark")}
LEVELS = {"place": (40, 130, 220), "tone": (230, 20)}  # of the upper and of the lower half of an image
OCCURRING = {"place": [2, 1, 3], "tone": [1, 2]}
N = 400  # images of each kind


def draw_words(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random words of n images."""
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randint(1, 1 + len(words), (n,), generator=rng) for name, words in VALUES.items()}


GIVEN_WORDS = draw_words(N)
REQUESTS = plan_requests(GIVEN_WORDS, OCCURRING)


def asked(request) -> dict[str, int]:
    """The words of a request."""
    words = {name: int(numbers[request.index]) for name, numbers in GIVEN_WORDS.items()}
    return words | ({request.field: request.number} if request.field else {})


def figures_of(show, given=GIVEN_WORDS, real_predicted=None):
    """The figures, by field, of a model that shows the words `show(asked, request)`."""
    rows = [show(asked(request), request) for request in REQUESTS]
    shown = {name: torch.tensor([row[name] for row in rows]) for name in VALUES}
    real = draw_words(6, seed=1)
    return {row["field"]: row for row in compute_figures(REQUESTS, given, shown, real, real_predicted or real)}


def test_one_word_changes_and_the_noise_stays():
    assert [(each.kind, each.index) for each in REQUESTS[:N]] == [(GIVEN, index) for index in range(N)]
    for field, numbers in OCCURRING.items():
        changed = [each for each in REQUESTS if (each.kind, each.field) == (SWAPPED, field)]
        assert [each.index for each in changed] == [*range(N)]
        new, before = torch.tensor([each.number for each in changed]), GIVEN_WORDS[field]
        assert (new != before).all() and {*new.tolist()} == {*numbers}
    places = {(int(GIVEN_WORDS["place"][each.index]), each.number) for each in REQUESTS if each.field == "place"}
    assert {(a, b) for a in (1, 2, 3) for b in (1, 2, 3) if a != b} <= places  # each for all others


def test_strips_show_the_most_frequent_words_of_the_same_images():
    many = [*range(20, 0, -1)]
    requests = plan_requests({"place": torch.tensor([NULL, 3])}, {"place": many})
    strips = [each for each in requests if each.kind == STRIP]
    words = [*range(20 - MOST_WORDS + 1, 21)]
    assert [(each.index, each.number) for each in strips] == [
        (r, number) for r in range(STRIP_ROWS) for number in words
    ]
    assert {each.number for each in requests if each.kind == SWAPPED} <= {*many}  # also where the word is unknown


def test_words_that_occur_are_found_by_frequency():
    numbers = {
        "place": torch.tensor([2, 2, 4, 0, 0, 0]),
        "tone": torch.tensor([1, 1, 0, 0, 1, 1]),
        "none": torch.zeros(6).long(),
    }
    assert find_occurring(numbers) == {"place": [2, 4]}


def test_images_are_drawn_with_their_conditions_but_for_one_word():
    drawn = []

    def draw(indices, seed, options, conditions):
        drawn.append((indices, seed, options, {name: list(map(int, each)) for name, each in conditions.items()}))
        return {"image": torch.zeros(len(indices)), "label": torch.zeros(len(indices))}

    words = {name: [VALUES[name][number - 1] for number in numbers] for name, numbers in GIVEN_WORDS.items()}

    def conditions_of(seed, indices):
        assert seed == 7
        return {name: [each[i] for i in indices] for name, each in words.items()} | {"label": indices}

    source, model = SimpleNamespace(draw=conditions_of), SimpleNamespace(draw=draw)
    make = requested_images(REQUESTS, VALUES, model, 7, "options", source)
    positions = [len(REQUESTS) - 1, 3, N + 3, 2 * N + 3]
    assert make(positions).keys() == {"image"}
    chosen = [REQUESTS[position] for position in positions]
    indices, expected = [each.index for each in chosen], [asked(each) for each in chosen]
    assert indices[1:] == [3, 3, 3] and len({(*each.values(),) for each in expected[1:]}) == 3
    columns = {name: [each[name] for each in expected] for name in VALUES}
    assert drawn == [(indices, 7, "options", columns | {"label": indices})]


def test_a_model_that_shows_its_words_is_right_throughout():
    figures = figures_of(lambda words, request: words)
    for name, others in (("place", {"tone"}), ("tone", {"place"})):
        row = figures[name]
        assert row[SAMPLES] == row[NEW] == {"n": N, "right": 1} and row[BEFORE]["right"] == 0
        assert row[REAL] == {"n": 6, "right": 1}
        assert row[STAYS] == {other: {"n": N, "right": 1} for other in others}
        assert row[FLOOR] == row[ALIKE] < 1 / len(VALUES[name]) + 0.03


def test_a_model_that_ignores_a_field_is_right_by_chance():
    chosen = draw_words(N, seed=2)["place"]  # by the noise
    figures = figures_of(lambda words, request: words | {"place": int(chosen[request.index])})
    place, tone = figures["place"], figures["tone"]
    assert place[SAMPLES]["right"] == pytest.approx(place[FLOOR], abs=0.05) and 0.28 < place[FLOOR] < 0.38
    assert place[NEW]["right"] + place[BEFORE]["right"] < 0.75 and place[NEW]["right"] < 0.42
    assert place[STAYS]["tone"]["right"] == tone[STAYS]["place"]["right"] == 1
    assert tone[SAMPLES]["right"] == tone[NEW]["right"] == 1


def test_a_model_that_follows_the_noise_shows_the_word_before():
    figures = figures_of(lambda words, request: {name: int(each[request.index]) for name, each in GIVEN_WORDS.items()})
    for row in figures.values():
        assert (row[SAMPLES]["right"], row[NEW]["right"], row[BEFORE]["right"]) == (1, 0, 1)


def test_a_model_that_mixes_fields_is_found_out():
    figures = figures_of(lambda words, request: words | ({"tone": 1} if words["place"] == 3 else {}))
    to_lake = [each for each in REQUESTS if each.kind == SWAPPED and each.field == "place"]
    moved = [each for each in to_lake if (each.number == 3) != (asked(each._replace(field=""))["place"] == 3)]
    dark = sum(asked(each)["tone"] == 2 for each in moved)
    assert figures["place"][STAYS]["tone"]["right"] == pytest.approx(1 - dark / N) and 0.2 < dark / N < 0.5
    assert figures["tone"][STAYS]["place"]["right"] == figures["place"][NEW]["right"] == 1
    assert 0.5 < figures["tone"][NEW]["right"] < 1


def test_unknown_words_do_not_count():
    hidden = {**GIVEN_WORDS, "place": GIVEN_WORDS["place"].clone()}
    hidden["place"][N // 4 :] = NULL
    place = figures_of(lambda words, request: words, hidden)["place"]
    assert place[SAMPLES] == {"n": N // 4, "right": 1} and place[BEFORE]["n"] == N // 4 and place[NEW]["n"] == N
    real_predicted = draw_words(6, seed=1)
    real_predicted["tone"][:3] = 3 - real_predicted["tone"][:3]
    tone = figures_of(lambda words, request: words, real_predicted=real_predicted)["tone"]
    assert tone[REAL] == {"n": 6, "right": 0.5}


def test_matches_are_those_of_all_pairs_of_different_images():
    a, b = torch.tensor([1, 2, 2, 3, 1]), torch.tensor([1, 1, 2, 2, 0])
    pairs = [a[i] == b[j] for i in range(5) for j in range(5) if i != j]
    assert share_of_matches(a, b) == pytest.approx(sum(pairs) / 20)
    assert share_of_matches(a[:1], b[:1]) is None and share_of_matches(a[:0], b[:0]) is None


def test_strips_are_drawn_a_word_a_column():
    requests = [each for each in REQUESTS if each.kind == STRIP]
    images = torch.stack([paint(asked(request)) for request in requests])
    picture = np.asarray(draw_strips(requests, images, VALUES))[..., 0]
    columns = [[int((row == level).sum()) for level in LEVELS["place"]] for row in picture]
    strip = picture[columns.index([128, 128, 128])]
    assert [level for level in dict.fromkeys(strip.tolist()) if level != 255] == [*LEVELS["place"]]
    assert columns.count([128, 128, 128]) == STRIP_ROWS * 64  # the upper halves of the images


def test_data_without_two_words_are_refused(monkeypatch):
    one = check_metadata.WordedImages(torch.zeros(3, 1, 8, 8), {"tone": torch.ones(3).long()})
    monkeypatch.setattr(check_metadata, "load_worded_images", lambda model, split, values: one)
    monkeypatch.setattr(check_metadata, "find_metadata", lambda network: SimpleNamespace(values={"tone": ("dark",)}))
    model = SimpleNamespace(sampler=SimpleNamespace(network=None))
    with pytest.raises(ValueError, match="got no field of tone with two words in the training images"):
        check_metadata.measure(None, None, None, model, None)


def test_the_preset_is_checked_as_it_is_trained(monkeypatch, tmp_path):
    path = ROOT / "configs" / "shapes_metadata.yaml"
    config = parse_config("train_sampler.py", f"--config {path} --logs_root {tmp_path}", monkeypatch)
    checked = parse_config("experiments/check_metadata.py", f"--config {path} --logs_root {tmp_path}", monkeypatch)
    assert (checked["load_dir"], checked["dataset"], checked["sampler"]) == (config["log_dir"], "shapes", "ddpm")
    assert config["conditions"] == ["metadata"]


# The command, on images whose names say what they show


def paint(words: dict[str, int]) -> torch.Tensor:
    """An image (3, 8, 8) uint8 that shows words."""
    image = torch.empty(3, 8, 8, dtype=torch.uint8)
    for rows, name in ((slice(0, 4), "place"), (slice(4, 8), "tone")):
        image[:, rows] = LEVELS[name][words[name] - 1]
    return image


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A run on images of all words."""
    folder, logs = tmp_path_factory.mktemp("views"), tmp_path_factory.mktemp("logs")
    for number in range(60):
        place, tone = number % 3, number // 3 % 2
        pixels = paint({"place": place + 1, "tone": tone + 1}).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{VALUES['place'][place]}_{VALUES['tone'][tone]}_{number}.png")
    data = f"--dataset folder --data_dir {folder} --name_pattern {{place}}_{{tone}}_{{number:d}} --val_fraction 0.4"
    call("train_sampler.py", f"--logs_root {logs} {DDPM} {data} --conditions metadata --no_amp --train_steps 1")
    return logs


def check(logs, flags):
    options = "--sampler ddpm --dataset folder --load_dir ddpm_folder --no_amp"
    call("experiments/check_metadata.py", f"--logs_root {logs} {options} {flags}")


def test_a_perfect_sampler_is_read_like_real_images(logs, monkeypatch, capsys):
    recipe = image_classifier.FIELDS_RECIPE._replace(steps=30, batch_size=16)
    monkeypatch.setattr(image_classifier, "FIELDS_RECIPE", recipe)
    draws = []

    def draw(model, indices, seed, options, conditions):
        draws.append(indices)
        rows = range(len(indices))
        return {"image": torch.stack([paint({name: int(conditions[name][row]) for name in VALUES}) for row in rows])}

    monkeypatch.setattr(TrainedSampler, "draw", draw)
    check(logs, "--n_samples 24 --batch_size 40 --log_dir perfect")
    results = json.loads((logs / "perfect" / "results.json").read_text())
    assert (results["n_training_images"], results["n_held_out"]) == (36, 24)
    assert [row["field"] for row in results["fields"]] == [*VALUES]
    for row in results["fields"]:
        assert row[SAMPLES] == row[REAL] == row[NEW] == {"n": 24, "right": 1} and row[FLOOR] < 0.6
        assert all(each == {"n": 24, "right": 1} for each in row[STAYS].values())
    assert sum(map(len, draws)) == 3 * 24 + STRIP_ROWS * 5
    out, count = capsys.readouterr().out, len(draws)
    assert report(results, logs / "perfect") in out and (logs / "perfect" / "metadata.png").is_file()
    check(logs, "--n_samples 24 --log_dir perfect")  # reports again
    assert len(draws) == count and report(results, logs / "perfect") in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(logs, trained_ddpm, capsys):
    with pytest.raises(SystemExit) as stop:
        check(logs, "--metadata tone=dark --log_dir refused")
    assert stop.value.code == 2 and "got metadata tone=dark, but words that differ" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        call("experiments/check_metadata.py", f"--logs_root {trained_ddpm} --sampler ddpm --log_dir refused")
    assert stop.value.code == 2 and "train it with --conditions metadata" in capsys.readouterr().err
    assert not (logs / "refused").exists() and not (trained_ddpm / "refused").exists()
