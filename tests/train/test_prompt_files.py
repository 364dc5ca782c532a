"""Files of prompts: every format gives the same items, and whatever is wrong with them is an error."""

import json

import pytest

from train.prompt_files import ALIASES, CHECKS, PromptItem, prompts_provenance, read_prompts


def read(tmp_path, name: str, text: str) -> list[PromptItem]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_prompts(path)


def read_objects(tmp_path, *objects: object) -> list[PromptItem]:
    return read(tmp_path, "prompts.json", json.dumps(objects))


def error_of(tmp_path, *objects: object) -> str:
    with pytest.raises(ValueError) as error:
        read_objects(tmp_path, *objects)
    return str(error.value)


def test_a_prompt_a_line(tmp_path):
    text = "\ufeff# animals\n\na cat, (wild:1.2)\n  a dog # 2 negative=blurry, negative=x \n negative=noise\n"
    first, second, third = read(tmp_path, "prompts.txt", text)
    assert first == PromptItem(number=3, prompt="a cat, (wild:1.2)", output="images/000000.png")
    assert (second.number, second.prompt, second.negative) == (4, "a dog # 2", "blurry, negative=x")
    assert (third.prompt, third.negative, third.output) == ("", "noise", "images/000002.png")


def test_rows_of_a_table(tmp_path):
    text = "img_name,prompt,negative,seed,guidance,metadata\n"
    text += 'a/1.png,"a cat, a dog",,3,1.5,\n2.jpg,,blur,,,lon=1.5 light=day\n'
    first, second = read(tmp_path, "prompts.csv", text)
    assert first == PromptItem(number=1, prompt="a cat, a dog", output="a/1.png", seed=3, guidance=1.5)
    assert second.metadata == {"lon": "1.5", "light": "day"} and second.prompt == "" and second.negative == "blur"


def test_columns_without_name_and_content_are_left_out(tmp_path):
    (item,) = read(tmp_path, "prompts.csv", "prompt,,seed\na cat,,3\n")
    assert item == PromptItem(number=1, prompt="a cat", output="images/000000.png", seed=3)


def test_objects_of_a_list_and_of_lines_are_the_same(tmp_path):
    objects = [
        {"prompt": "a cat", "seed": 2**63 - 1},
        {"prompt": "", "negative": None, "metadata": {"lon": 1, "light": "day"}},
    ]
    listed = read_objects(tmp_path, *objects)
    lines = read(tmp_path, "prompts.jsonl", "\n".join(map(json.dumps, objects)) + "\n")
    assert listed == lines and [item.seed for item in listed] == [2**63 - 1, None]
    assert listed[1].metadata == {"lon": 1, "light": "day"}


@pytest.mark.parametrize("sign", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_only_line_breaks_end_a_line(tmp_path, sign):
    """JSON has some of the other signs for a break in texts."""
    prompt = f"a cat{sign}a dog"
    (line,) = read(tmp_path, "prompts.txt", f"{prompt}\n")
    written = json.dumps({"prompt": prompt}, ensure_ascii=sign < " ")
    (item,) = read(tmp_path, "prompts.jsonl", f"{written}\n\n")
    assert line.prompt == item.prompt == prompt


def test_missing_metadata_are_unknown(tmp_path):
    item, listed = read_objects(
        tmp_path,
        {"prompt": "a", "metadata": {"lon": None, "lat": 3, "light": None}},
        {"prompt": "a", "metadata": [1.5, None, None, None, 2018, None, None]},
    )
    assert item.metadata == {"lon": "unknown", "lat": 3, "light": "unknown"}
    assert [listed.metadata[field] for field in ("lon", "lat", "year", "day")] == [1.5, "unknown", 2018, "unknown"]


def test_keys_of_other_tools_are_understood(tmp_path):
    (item,) = read_objects(
        tmp_path,
        {
            "model_name": "ddpm_shapes",
            "prompt": "a satellite image",
            "negative_prompt": "clouds",
            "metadata": [-90.8, 14.4, 0.5, 0.1, 2018, 6, 3],
            "output_path": "out/one.png",
            "num_inference_steps": 20,
            "guidance_scale": 7.5,
            "height": 64,
            "width": 32,
        },
    )
    assert (item.model, item.negative, item.output) == ("ddpm_shapes", "clouds", "out/one.png")
    assert (item.sample_steps, item.guidance, item.height, item.width) == (20, 7.5, 64, 32)
    numbers = {"lon": -90.8, "lat": 14.4, "gsd": 0.5, "cloud_cover": 0.1, "year": 2018, "month": 6, "day": 3}
    assert item.metadata == numbers


def test_every_alias_names_a_key():
    assert {*ALIASES.values()} <= {*CHECKS} and not ALIASES.keys() & CHECKS.keys()
    assert {*CHECKS} == {*PromptItem.__dataclass_fields__} - {"number"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a cat", "got 'a cat', wanted an object such as"),
        ({"negative": "x"}, "got no prompt"),
        ({"prompt": None}, "got prompt null, wanted a text"),
        ({"prompt": 3}, "got prompt 3, wanted a text"),
        ({"prompt": "a", "guidence": 2}, "got the key 'guidence', did you mean 'guidance'?, wanted some of prompt"),
        ({"prompt": "a", "guidance": 2, "guidance_scale": 3}, "got guidance twice, also as 'guidance_scale'"),
        ({"prompt": "a", "guidance": float("nan")}, "got guidance NaN, wanted a number"),
        ({"prompt": "a", "guidance": "much"}, "got guidance 'much', wanted a number"),
        ({"prompt": "a", "guidance": True}, "got guidance true, wanted a number"),
        ({"prompt": "a", "seed": -1}, "got seed -1, wanted a whole number from 0"),
        ({"prompt": "a", "seed": 2**63}, "wanted a whole number from 0"),
        ({"prompt": "a", "seed": 1.5}, "got seed 1.5"),
        ({"prompt": "a", "seed": True}, "got seed true"),
        ({"prompt": "a", "sample_steps": 0}, "got sample_steps 0, wanted a whole number from 1"),
        ({"prompt": "a", "height": 0}, "got height 0"),
        ({"prompt": "a", "metadata": [1, 2]}, "got metadata with 2 numbers, wanted 7: lon, lat, gsd"),
        ({"prompt": "a", "metadata": {"lon": [1]}}, "got metadata"),
        ({"prompt": "a", "metadata": "lon=1 lat=2 lon=3"}, "'lon=1 lat=2 lon=3' with lon twice: leave one of them out"),
        ({"prompt": "a", "metadata": "lon"}, "wanted fields and values such as lon=-90.8"),
        ({"prompt": "a", "output": "/tmp/a.png"}, "wanted a path inside the output folder"),
        ({"prompt": "a", "output": "b/../../a.png"}, "wanted a path inside the output folder"),
        ({"prompt": "a", "output": "..\\a.png"}, "wanted a path inside the output folder"),
        ({"prompt": "a", "output": "C:a.png"}, "wanted a path inside the output folder"),
        ({"prompt": "a", "output": "a.txt"}, "wanted a picture: .png"),
        ({"prompt": "a", "output": ".png"}, "wanted a picture"),
        ({"prompt": "a", "output": ""}, "wanted a picture"),
    ],
)
def test_a_broken_item_is_an_error_with_its_number(tmp_path, content, message):
    error = error_of(tmp_path, {"prompt": "fine"}, content)
    assert "1 of 2 items cannot be used: item 2: " in error and message in error


def test_all_broken_items_are_reported_together(tmp_path):
    error = error_of(tmp_path, {"prompt": 1}, {"prompt": "a"}, {"promt": "a"})
    assert "2 of 3 items" in error and "item 1: got prompt 1" in error and "item 3: got the key 'promt'" in error
    many = error_of(tmp_path, *[{"prompt": i} for i in range(25)])
    assert "25 of 25 items" in many and many.endswith("; and 15 more") and "item 11" not in many


def test_no_two_items_have_one_picture(tmp_path):
    error = error_of(tmp_path, {"prompt": "a", "output": "x/A.png"}, {"prompt": "b", "output": "x//a.png"})
    assert "item 2: got output x/a.png, which item 1 has" in error
    error = error_of(tmp_path, {"prompt": "a", "output": "images/000001.png"}, {"prompt": "b"})
    assert "item 2: got output images/000001.png, which item 1 has" in error


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "it is not JSON"),
        ("a.json", "{}", "it is not a list"),
        ("a.json", "[]", "has no prompts"),
        ("a.txt", "# nothing\n\n", "has no prompts"),
        ("a.csv", "name,text\na,b\n", "wanted prompt in the first line"),
        ("a.csv", "prompt,seed\na,b,c\n", "line 2 has another number of columns"),
        ("a.csv", "prompt,sed\na,\n", "a.csv: got the key 'sed', did you mean 'seed'?, wanted some of prompt"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"\n', "item 2: got '{\"prompt\"', wanted an object"),
        (
            "a.json",
            '[{"prompt": "a"},\n {"prompt": "b", "seed": 1, "seed": 2}]',
            "a.json: line 2 column 38: got the key 'seed' twice",
        ),
        ("a.json", '[{"prompt": "a", "metadata": {"lon": 1, "lon": 2}}]', "got the key 'lon' twice"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n\n{"prompt": "b", "prompt": "c"}',
            "a.jsonl: line 3 column 30: got the key 'prompt' twice",
        ),
        (
            "a.csv",
            "prompt,seed,seed\na,1,2\n",
            "a.csv: got the column 'seed' twice in the first line: leave one of them out",
        ),
        ("a.yaml", "prompt: a", "wanted a .txt, .csv, .json, .jsonl file"),
    ],
)
def test_files_that_are_no_prompts(tmp_path, name, text, message):
    with pytest.raises(ValueError, match="prompts|a\\.(json|csv|yaml)") as error:
        read(tmp_path, name, text)
    assert message in str(error.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass a .txt, .csv, .json or .jsonl file as --prompts"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="not text in UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def test_a_file_is_identified_by_its_content(tmp_path):
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.txt").write_text("a cat")
    assert prompts_provenance(tmp_path / "a.txt") == prompts_provenance(str(tmp_path / "b.txt"))
    (tmp_path / "b.txt").write_text("a dog")
    assert prompts_provenance(tmp_path / "a.txt") != prompts_provenance(tmp_path / "b.txt")
    assert prompts_provenance(None) == {}
