"""Conditions of generated images: from rows, class frequencies, or held-out items."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from train.condition_source import ConditionSource, condition_provenance, read_rows
from train.config import DataConfig

DATA = DataConfig(img_size=8)
FREQUENCIES = torch.tensor([0.7, 0.0, 0.3])


class HeldOut:
    """Five items with an image, a label and words."""

    def __len__(self):
        return 5

    def __getitem__(self, positions):
        indices = torch.tensor(positions)
        words = [f"item {k}" for k in positions]
        return {"condition_image": indices.float(), "label": 10 + indices, "words": words, "position": indices}

    def item_index(self, position):
        return (3 * position) % 5


def label_source(**options):
    return ConditionSource(("label",), 3, FREQUENCIES, **options)


def test_labels_follow_class_frequencies_not_the_batch():
    source = label_source()
    labels = source.draw(7, range(4000))["label"]
    assert (labels == 1).sum() == 0 and abs((labels == 0).float().mean().item() - 0.7) < 0.04
    assert torch.equal(torch.cat([source.draw(7, [i])["label"] for i in (3, 900)]), labels[[3, 900]])
    assert not torch.equal(source.draw(8, range(4000))["label"], labels)


def test_held_out_items_are_cycled_with_all_their_fields():
    source = ConditionSource(("condition_image", "label"), 20, torch.ones(20) / 20, HeldOut())
    batch = source.draw(0, [3, 4, 5, 6])
    assert batch.keys() == {"condition_image", "label"}
    assert batch["condition_image"].tolist() == [3, 4, 0, 1] and batch["label"].tolist() == [13, 14, 10, 11]


def test_the_items_that_conditions_are_from_are_told():
    source = ConditionSource(("condition_image", "label"), 20, torch.ones(20) / 20, HeldOut())
    assert source.held_out_items([3, 4, 5, 6]).tolist() == [4, 2, 0, 3]
    assert source.with_values(label=2).held_out_items([1]).tolist() == [3]
    assert source.with_values(condition_image=1.0).held_out_items([1]) is None
    assert label_source().held_out_items([1]) is None


def test_metadata_leave_conditions_those_of_held_out_items():
    source = ConditionSource(("condition_image", "label", "light"), 20, None, HeldOut(), metadata=("light",))
    night = source.with_values(light="night", label=2)
    assert night.held_out_items([3, 4, 5, 6]).tolist() == [4, 2, 0, 3]
    batch = night.draw(0, [3, 6])
    assert batch["condition_image"].tolist() == [3, 1] and batch["light"] == ["night"] * 2
    assert night.with_values(condition_image=1.0).held_out_items([1]) is None


def test_rows_override_other_sources_field_by_field():
    rows = [{"words": "a"}, {"words": "b"}]
    source = ConditionSource(("words", "label"), 3, FREQUENCIES).with_rows(rows)
    batch = source.draw(7, [0, 1, 2])
    assert batch["words"] == ["a", "b", "a"] and torch.equal(batch["label"], label_source().draw(7, [0, 1, 2])["label"])
    combined = ConditionSource(("condition_image", "label"), 20, None, HeldOut()).with_rows([{"label": 2}])
    assert combined.draw(7, [4, 5])["condition_image"].tolist() == [4, 0]
    assert combined.draw(7, [4])["label"].tolist() == [2]


def test_typed_values_override_rows():
    source = ConditionSource(
        ("words", "label"), 3, FREQUENCIES, rows=({"words": "a", "label": 0}, {"words": "b", "label": 1})
    )
    assert source.with_values(label=2).draw(0, [0, 1]) == {"words": ["a", "b"], "label": pytest.approx([2, 2])}
    assert label_source().with_values(label=2).draw(0, [5, 6])["label"].tolist() == [2, 2]


def test_label_none_is_the_null_class():
    assert label_source().with_rows([{"label": None}, {"label": 1}]).draw(0, [0, 1])["label"].tolist() == [3, 1]


def test_a_sampler_without_conditions_is_given_none():
    assert ConditionSource(()).draw(0, [0, 1]) is None


WRONG = {
    "got the condition word, this sampler takes: label": {"word": "a"},
    "got label 3, wanted a class from 0 to 2, or null for none": {"label": 3},
    "got label True, wanted a class": {"label": True},
    "got label 'dog', wanted a class": {"label": "dog"},
}


@pytest.mark.parametrize("message", WRONG)
def test_rows_that_the_sampler_does_not_take_are_refused(message):
    with pytest.raises(ValueError, match=message):
        label_source().with_rows([WRONG[message]])


def test_fields_without_a_source_are_refused():
    with pytest.raises(ValueError, match="got no words to sample with: pass them in a --condition_file"):
        ConditionSource(("words",)).draw(0, [0])
    with pytest.raises(ValueError, match="held-out images have no boxes"):
        ConditionSource(("boxes",), held_out=HeldOut()).draw(0, [0])
    flag = "pass them in a --condition_file, or as --metadata light=..."
    with pytest.raises(ValueError, match=f"got no boxes, light to sample with: {flag}$"):
        ConditionSource(("boxes", "light"), metadata=("light",)).draw(0, [0])
    with pytest.raises(ValueError, match=f"held-out images have no light: .* or {flag}$"):
        ConditionSource(("light",), held_out=HeldOut(), metadata=("light",)).draw(0, [0])


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return pixels


def test_json_and_csv_give_the_same_rows(tmp_path, picture):
    rows = [{"label": 3, "size": 0.5, "words": "a, b", "condition_image": "a.png"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text('label,size,words,condition_image\n3,0.5,"a, b",a.png\n')
    (from_json,), (from_csv,) = (read_rows(str(tmp_path / f"rows.{kind}"), DATA) for kind in ("json", "csv"))
    assert from_json.keys() == from_csv.keys() and from_json["label"] == from_csv["label"] == 3
    assert from_json["size"] == from_csv["size"] == 0.5 and from_json["words"] == from_csv["words"] == "a, b"
    for row in (from_json, from_csv):
        assert isinstance(row["condition_image"], tv_tensors.Image)
        assert np.array_equal(row["condition_image"].permute(1, 2, 0).numpy(), picture)
    source = ConditionSource(("label", "size", "words", "condition_image"), 4).with_rows([from_json])
    batch = source.draw(0, [0, 1])
    expected = torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(batch["condition_image"], expected.expand(2, 3, 8, 8), atol=1e-6)


def test_classes_are_given_by_name_or_number(tmp_path):
    (tmp_path / "rows.json").write_text('[{"label": "hat"}, {"label": 0}, {"label": "2"}, {"label": null}]')
    (tmp_path / "rows.csv").write_text("label\nhat\n0\n2\n")
    json_rows, csv_rows = (
        read_rows(str(tmp_path / f"rows.{kind}"), DATA, 3, ("bag", "hat", "2 shoes")) for kind in ("json", "csv")
    )
    assert [row["label"] for row in json_rows] == [1, 0, 2, None] and csv_rows == json_rows[:3]
    with pytest.raises(ValueError, match="rows.csv: got label 'hat', did you mean 'hats'"):
        read_rows(str(tmp_path / "rows.csv"), DATA, 3, ("bag", "hats", "shoe"))
    (tmp_path / "rows.csv").write_text("label\n3\n7\n")  # names, as there is no class 3 or 7
    assert [row["label"] for row in read_rows(str(tmp_path / "rows.csv"), DATA, 3, ("3", "5", "7"))] == [0, 2]


def test_lists_of_numbers_become_tensors(tmp_path):
    (tmp_path / "rows.json").write_text('[{"place": [0.5, 1, 2], "tags": ["a", "b"]}]')
    (row,) = read_rows(str(tmp_path / "rows.json"), DATA)
    assert row["place"].tolist() == [0.5, 1, 2] and row["tags"] == ["a", "b"]


def test_a_column_has_one_type_whatever_the_batch(tmp_path):
    (tmp_path / "rows.csv").write_text("size,words\n1,1984\n0.5,nan\n")
    rows = read_rows(str(tmp_path / "rows.csv"), DATA)
    assert [type(row["size"]) for row in rows] == [float, float] and [row["words"] for row in rows] == ["1984", "nan"]
    (tmp_path / "rows.json").write_text('[{"size": 1, "place": [1, 2]}, {"size": 0.5, "place": [0.5, 2]}]')
    rows = read_rows(str(tmp_path / "rows.json"), DATA)
    source = ConditionSource(("size", "place")).with_rows(rows)
    batch = source.draw(0, [0, 1])
    assert all(torch.equal(source.draw(0, [i])[name][0], batch[name][i]) for i in (0, 1) for name in batch)


def test_lists_of_lists_are_ragged_and_may_be_empty(tmp_path):
    (tmp_path / "rows.json").write_text(
        '[{"boxes": [[0, 0, 4, 4]]}, {"boxes": []}, {"boxes": [[1, 1, 2, 2], [0, 0, 8, 8]]}]'
    )
    source = ConditionSource(("boxes",)).with_rows(read_rows(str(tmp_path / "rows.json"), DATA))
    batch = source.draw(0, [0, 1, 2])
    assert batch["boxes"].shape == (3, 2, 4) and batch["boxes_mask"].tolist() == [
        [True, False],
        [False] * 2,
        [True] * 2,
    ]


def test_grey_and_colour_images_can_be_mixed(tmp_path, picture):
    Image.fromarray(picture[..., 0]).save(tmp_path / "grey.png")
    (tmp_path / "rows.csv").write_text("condition_image\na.png\ngrey.png\n")
    rows = read_rows(str(tmp_path / "rows.csv"), DATA)
    assert [tuple(row["condition_image"].shape) for row in rows] == [(3, 8, 8)] * 2


BROKEN = {
    "rows.txt, wanted a .json or .csv file": ("rows.txt", "a"),
    "has no rows": ("rows.csv", "label\n"),
    "rows.csv has no rows, wanted at least one": ("rows.csv", ""),
    "is not JSON": ("rows.json", "[{"),
    "is not a list of objects": ("rows.json", '{"label": 3}'),
    "field 'boxes' is not a tensor": ("rows.json", '[{"boxes": [[0, 0]]}, {"boxes": [[0, 0, 1]]}]'),
    "row 1 and the first differ in words": ("rows.json", '[{"label": 3}, {"label": 3, "words": "a"}]'),
    "rows.json: line 2 column 24: got the key 'label' twice": (
        "rows.json",
        '[{"label": 3},\n{"label": 3, "label": 4}]',
    ),
    "rows.csv: got the column 'label' twice in the first line: leave": ("rows.csv", "label,words,label\n3,a,4\n"),
    "row 0 does not have the same number of columns as the header": ("rows.csv", "label,words\n3\n"),
    "none.png not found, which .* names as condition_image": ("rows.json", '[{"condition_image": "none.png"}]'),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, message):
    name, text = BROKEN[message]
    (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_rows(str(tmp_path / name), DATA)


def test_a_file_that_is_missing_is_refused(tmp_path):
    assert read_rows(None, DATA) == []
    with pytest.raises(FileNotFoundError, match="pass a .json or .csv file as --condition_file"):
        read_rows(str(tmp_path / "rows.json"), DATA)


def test_provenance_depends_on_the_content_of_a_file(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("label\n3\n")
    provenance = condition_provenance(str(path))
    path.write_text("label\n4\n")
    assert condition_provenance(None) == {} and provenance.keys() == {"condition_sha256"}
    assert provenance != condition_provenance(str(path))


def test_provenance_depends_on_the_images_a_file_names(tmp_path, picture):
    path = tmp_path / "rows.csv"
    path.write_text("condition_image\na.png\n")
    provenance = condition_provenance(str(path))
    Image.fromarray(255 - picture).save(tmp_path / "a.png")
    assert provenance != condition_provenance(str(path))
