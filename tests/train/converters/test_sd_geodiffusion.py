"""GeoDiffusion's folders: places as added words, prompts by their template, and runs that draw layouts."""

import json

import pytest
import torch
from PIL import Image

from helpers.tiny_runs import call
from helpers.tiny_sd import GENERATION, PLACES, write_geodiffusion
from models.tokenizer import Tokenizer, load_vocabulary
from train.converters.sd.files import read_source
from train.converters.sd.geodiffusion import check_places, generation_settings, make_location_prompt
from train.converters.sd.tokenizer import read_added_words
from train.location_prompts import place_word
from train.text_encoder_file import read_text_encoder

LAYOUTS = [
    {"name": "a", "camera": "back", "boxes": [[0, 0, 1, 1], [0.3, 0.6, 1, 1]], "classes": ["car", "traffic-cone"]},
    {"name": "b", "camera": "front left", "boxes": [], "classes": []},
]
PROMPTS = ["An image of back camera with car <l0> <l11> traffic cone <l5> <l11>", "An image of front left camera with "]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("geo")
    write_geodiffusion(folder / "tiny")
    call("convert.py", f"--from sd --weights {folder / 'tiny'} --logs_root {folder / 'logs'} --log_dir geo --no_amp")
    return folder / "logs"


def draw(run, output, flags=""):
    call("experiments/run_layout_to_image.py", f"{run} --output_dir {output} --no_amp --n_seeds 1 {flags}")
    return json.loads((output / "results.json").read_text())


def test_a_folder_becomes_a_run_that_draws_layouts(logs, tmp_path):
    """The command of the published code, without layouts."""
    results = draw(logs / "geo", tmp_path)
    assert results["prompts"][0].startswith("An image of front camera with car <l")
    assert results["names"] == ["crossing", "bus_stop"]
    with Image.open(tmp_path / "images" / "crossing_0.png") as image:
        assert image.size == (48, 32)


def test_layouts_of_a_file_become_prompts(logs, tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text(json.dumps(LAYOUTS))
    assert draw(logs / "geo", tmp_path / "own", f"--layouts {tmp_path / 'mine.json'}")["prompts"] == PROMPTS
    again = tmp_path / "own" / "layouts.json"
    assert draw(logs / "geo", tmp_path / "again", f"--layouts {again}")["prompts"] == PROMPTS
    given = draw(logs / "geo", tmp_path / "given", f"--layouts {again} --metadata camera=top")["prompts"]
    assert given == [prompt.replace("back", "top").replace("front left", "top") for prompt in PROMPTS]


def test_places_change_the_image(logs, tmp_path):
    boxes = [[0, 0, 0.4, 0.4]], [[0.6, 0.6, 1, 1]]
    layouts = [{"name": n, "camera": "back", "boxes": b, "classes": ["car"]} for n, b in zip("ab", boxes, strict=True)]
    (tmp_path / "two.json").write_text(json.dumps(layouts))
    run = tmp_path / "out"
    draw(logs / "geo", run, f"--layouts {tmp_path / 'two.json'} --guidance 30")
    pictures = [Image.open(run / "images" / f"{name}_0.png").tobytes() for name in "ab"]
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize(
    ("layouts", "flags", "message"),
    [
        ([{"boxes": [[0, 0, 1, 1]], "classes": ["car"]}], "", "layout_000: got no text camera for the prompt"),
        ([LAYOUTS[0] | {"boxes": [[0, 0, 1, 1]] * 5, "classes": ["car"] * 5}], "", "a: got 5 boxes, wanted at most 4"),
        (LAYOUTS, "--metadata weather=rain", "got metadata weather=rain, wanted each field of the prompt once: camera"),
        (LAYOUTS, "--metadata camera=a camera=b", "got metadata camera=a camera=b, wanted each field"),
    ],
)
def test_layouts_that_make_no_prompt_are_refused(logs, tmp_path, capsys, layouts, flags, message):
    (tmp_path / "mine.json").write_text(json.dumps(layouts))
    with pytest.raises(SystemExit) as stop:
        draw(logs / "geo", tmp_path / "out", f"--layouts {tmp_path / 'mine.json'} {flags}")
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_are_those_of_the_folder(logs):
    text = (logs / "geo" / "config.yaml").read_text()
    for line in ("img_size: 32", "img_width: 48", "guidance: 3.5", "sample_steps: 2", "text_vocab_size: 49420"):
        assert line in text
    assert "<l{0..11}>" in text and "<l11>" not in text
    encoder = read_text_encoder(logs / "geo" / "text_encoder.safetensors")
    assert encoder.tokenizer.encode("car <l11>") == [*Tokenizer().encode("car"), 49_419]


def test_a_folder_is_written_back_to_the_bit(logs, tmp_path):
    call("convert.py", f"--to diffusers --load_dir geo --logs_root {logs} --output {tmp_path / 'back'}")
    first, back = read_source(logs.parent / "tiny"), read_source(tmp_path / "back")
    assert back.configs == first.configs and back.configs["added_tokens"] == PLACES
    for part, tensors in first.parts.items():
        assert back.parts[part].keys() == tensors.keys()
        assert all(torch.equal(back.parts[part][name], value) for name, value in tensors.items())


def test_added_words_are_not_for_a_single_file(logs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        call("convert.py", f"--to sd --load_dir geo --logs_root {logs} --output {tmp_path / 'one.safetensors'}")
    assert "added words, such as <l{0..11}>, which a single file cannot hold" in capsys.readouterr().err
    assert not (tmp_path / "one.safetensors").exists()


# Generation


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scheduler": 1}, "has an unknown key 'scheduler'"),
        ({"prompt_template": None}, "wanted a text with fields"),
        ({"width": "wide"}, "has width 'wide', wanted type int"),
        ({"num_inference_steps": 2.5}, "has num_inference_steps 2.5, wanted type int"),
        ({"num_bucket_per_side": [4]}, "got places in a grid"),
        ({"max_num_bbox": 0}, "most_boxes 0, wanted whole numbers above 0"),
    ],
)
def test_generation_that_cannot_be_obeyed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        generation_settings(GENERATION | change)


def test_a_missing_template_is_named():
    with pytest.raises(ValueError, match="lacks 'prompt_template'"):
        generation_settings({key: value for key, value in GENERATION.items() if key != "prompt_template"})


def test_a_number_of_places_is_that_of_both_sides():
    assert make_location_prompt(GENERATION | {"num_bucket_per_side": 4}).grid == (4, 4)


def test_a_tokenizer_without_the_places_is_refused():
    few = Tokenizer(added_ids={word: own for word, own in PLACES.items() if own < 49_410})
    with pytest.raises(ValueError, match="got a tokenizer without <l2> and 9 other places of 4 x 3"):
        check_places(GENERATION, few)
    check_places(GENERATION, Tokenizer(added_ids=PLACES))


# Added words


FORMS = {
    "added_tokens.json": PLACES,
    "tokenizer_config.json": {
        "added_tokens_decoder": {str(own): {"content": word, "special": False} for word, own in PLACES.items()}
        | {"49407": {"content": "<|endoftext|>", "special": True}}
    },
    "tokenizer.json": {"added_tokens": [{"id": own, "content": word} for word, own in PLACES.items()]},
}


@pytest.mark.parametrize("name", FORMS)
def test_added_words_are_read_from_each_file(tmp_path, name):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer" / name).write_text(json.dumps(FORMS[name]))
    for path in (tmp_path, tmp_path / "text_encoder", tmp_path / "tokenizer"):
        assert read_added_words(path, 49_407) == ("<l{0..11}>",)
    assert read_added_words(tmp_path / "alone.safetensors", 49_407) == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"<l0>": 49_409}, "has 1 added words with ids from 49409 to 49409, wanted one for each id from 49408 on"),
        ({"a": 49_408, "b": 49_408}, "wanted one for each id"),
        ({"<l0>": None}, "added words of another form"),
        ({"<l0>": "first"}, "added words of another form"),
    ],
)
def test_added_words_with_other_ids_are_refused(tmp_path, content, message):
    (tmp_path / "added_tokens.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_added_words(tmp_path, 49_407)


def test_ids_are_those_of_the_public_tokenizer():
    """With all 65,536 places."""
    transformers = pytest.importorskip("transformers")
    vocabulary, places = load_vocabulary(), [place_word(index) for index in range(256 * 256)]
    ids = {**vocabulary.ids, "<|startoftext|>": 49_406, "<|endoftext|>": 49_407}
    public = transformers.CLIPTokenizer(ids, [*vocabulary.ranks])
    public.add_tokens(places)
    own = Tokenizer(added_ids={word: 49_408 + index for index, word in enumerate(places)})
    for prompt in (*PROMPTS, "car <l0><l65535> <L300>, truck<l65536>", "A night image with construction <l1> <l23>"):
        expected = public(prompt)["input_ids"]
        assert [own.start_id, *own.encode(prompt), own.end_id] == expected, prompt
