"""WebDataset: samples of tar shards, their split and order, and malformed shards."""

import dataclasses
import io
import json
import os
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from train.cli import parse as cli
from train.config import DataConfig, SecondStageConfig
from train.data.loading import ImageSource, TrainingImages, training_batches
from train.datasets import SPLITS, UnreadableImage
from train.datasets.webdataset import Config, build, tar
from train.distributed import DistContext

pytest.importorskip("webdataset", reason="needs the optional package webdataset")

DATA = DataConfig(img_size=4, n_channels=3)


@pytest.fixture
def shards(tmp_path, tiny):
    """Six shards of four samples, numbered by their labels and red values; equal in size and modification time."""
    for shard in range(6):
        members = {}
        for number in range(4 * shard, 4 * shard + 4):
            members |= {f"s/{number:04d}.png": tiny.png(number), f"s/{number:04d}.cls": b"%d\n" % number}
            members[f"s/{number:04d}.json"] = json.dumps({"kind": number, "text": "a b"}).encode()
            members[f"s/{number:04d}.txt"] = f"number {number}\nthis is {number}\n".encode()
        os.utime(tiny.save_shard(tmp_path / f"shards-{shard:03d}.tar", members), ns=(0, 10**18))
    return tmp_path


def numbers(dataset) -> list[int]:
    return [dataset[i]["image"].getpixel((0, 0))[0] for i in range(len(dataset))]


@pytest.mark.parametrize("name", ["", "/*.tar", "/shards-{000..005}.tar", "/shards-{000..004}.tar::{}/shards-005.tar"])
@pytest.mark.parametrize("label_from", ["cls", "json"])
def test_folders_globs_and_brace_patterns_are_equivalent(shards, name, label_from):
    pattern = str(shards) + name.replace("::{}", f"::{shards}")
    config = Config(data_dir=pattern, label_from=label_from, label_field="kind", mix_shards=2)
    train, val = (build(config, split) for split in SPLITS)
    assert sorted(numbers(train) + numbers(val)) == list(range(24))
    for dataset in (train, val):
        assert dataset.n_classes == 24 and numbers(dataset) == dataset.labels.tolist()
        assert [dataset[i]["label"] for i in range(len(dataset))] == dataset.labels.tolist()
        assert sum(dataset.blocks.sizes) == len(dataset) and dataset.blocks.window == 2
    assert train.blocks.sizes == tuple(np.bincount(train.labels // 4).tolist())


def test_a_file_beside_the_shards_names_the_classes(shards):
    config = Config(data_dir=str(shards), label_from="cls")
    assert build(config, "train").class_names == ()
    names = [f"class {i}" for i in range(26)]
    (shards / "classes.txt").write_text("\n".join(names) + "\n")
    for split in SPLITS:
        dataset = build(config, split)
        assert dataset.class_names == tuple(names[:24]) and not dataset.notes
    assert build(Config(data_dir=str(shards)), "train").class_names == ()  # without labels
    (shards / "classes.txt").write_text("hat\nbag\n")
    with pytest.raises(ValueError, match="classes.txt has 2 lines, wanted the names of classes 0 to 23"):
        build(config, "train")
    own = dataclasses.replace(config, class_names=tuple(names[:24]))
    assert build(own, "train").class_names == own.class_names


def test_validation_shards_are_left_out_of_training(shards):
    config = Config(data_dir=str(shards), val_shards=f"{shards}/shards-00{{1,4}}.tar")
    assert numbers(build(config, "val")) == [4, 5, 6, 7, 16, 17, 18, 19]
    assert numbers(build(config, "train")) == [0, 1, 2, 3, *range(8, 16), *range(20, 24)]
    with pytest.raises(ValueError, match="are all shards"):
        build(Config(data_dir=f"{shards}/shards-001.tar", val_shards=str(shards)), "train")


@pytest.mark.parametrize("workers", [0, 2])
def test_json_fields_stay_with_their_image(shards, workers, scanned):
    config = Config(data_dir=str(shards), label_from="cls", json_fields=("text", "kind"))
    source = TrainingImages(ImageSource(build(config, "train"), DATA), seed=3)
    options = {"start": 0, "steps": 3, "batch_size": 4, "accumulate": 1, "workers": workers}
    for (batch,) in training_batches(source, world=DistContext(torch.device("cpu")), **options):
        assert batch["text"] == ["a b"] * 4 and torch.equal(batch["kind"], batch["label"])
    build(config, "val")
    assert len(scanned) == 6
    unannotated = build(Config(data_dir=str(shards), label_from="cls"), "train")
    assert len(scanned) == 12 and unannotated[0].keys() == {"image", "label"}
    assert unannotated.fingerprint() != source.source.dataset.fingerprint()


def test_captions_of_two_shards_survive_two_workers(shards):
    config = Config(data_dir=f"{shards}/shards-00{{0,1}}.tar", label_from="cls", caption_ext=("txt",))
    dataset = build(config, "train")
    assert len(dataset.blocks.sizes) == 2
    source, options = TrainingImages(ImageSource(dataset, DATA), seed=3), {"batch_size": 4, "accumulate": 1}
    options |= {"start": 0, "steps": 20, "world": DistContext(torch.device("cpu"))}
    alone, loaded = ([batch for (batch,) in training_batches(source, workers=n, **options)] for n in (0, 2))
    assert [batch["caption"] for batch in loaded] == [batch["caption"] for batch in alone]
    seen = {pair for batch in loaded for pair in zip(batch["label"].tolist(), batch["caption"], strict=True)}
    assert seen == {(n, f"{words} {n}") for n in dataset.labels.tolist() for words in ("number", "this is")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"kind": 1}', "sample a: its .json does not have all of kind, text .'text'.*--json_fields"),
        (b'{"kind": 1, "text": null}', "field 'text' is None, wanted a number, a string"),
        (b'{"kind": 1, "text": [[0, 1]]}', "boxes: --box_fields; lists of varying length: --id_fields"),
        (b"[1]", "its .json does not have all of"),
        (b"cat", "its .json does not have all of"),
        (None, "sample a has no regular .json .*--json_fields"),
    ],
)
def test_samples_without_the_fields_are_refused(tmp_path, tiny, content, message):
    members = {"a.png": tiny.png()} | ({} if content is None else {"a.json": content})
    members |= {"b.png": tiny.png(), "b.json": b'{"kind": 1, "text": ""}'}
    tiny.save_shard(tmp_path / "one.tar", members)
    with pytest.raises(ValueError, match=f"one.tar.*{message}"):
        for split in SPLITS:
            dataset = build(Config(data_dir=str(tmp_path), json_fields=("kind", "text")), split)
            [dataset[i] for i in range(len(dataset))]


def test_values_of_another_kind_than_a_field_takes_are_refused(tmp_path, tiny):
    values = [b'"words"', b"null", b'[["a"]]', b"[[1, 2], [3]]", b"[99999999999999999999]", b"[" * 99_999]
    for number, value in enumerate(values):
        members = {"a.png": tiny.png(), "b.png": tiny.png()} | dict.fromkeys(("a.json", "b.json"), b'{"x": %s}' % value)
        folder = tiny.save_shard(tmp_path / f"{number}" / "one.tar", members).parent
        for fields in ({"box_fields": ("x",)}, {"id_fields": ("x",)}):
            with pytest.raises(ValueError, match="one.tar sample "):
                build(Config(data_dir=str(folder), **fields), "train")[0]


def test_whole_shards_or_single_images_are_held_out(shards):
    val = build(Config(data_dir=str(shards), val_fraction=0.34), "val")
    assert val.blocks.sizes == (4, 4)
    val = build(Config(data_dir=str(shards), val_fraction=0.1), "val")
    assert len(val) == 2 and max(val.blocks.sizes) <= 2


def test_validation_shards_among_training_shards_are_refused(shards, tiny):
    tiny.save_shard(shards / "valley-000.tar", {"valley.png": tiny.png(0)})
    build(Config(data_dir=str(shards)), "train")  # a valley is no split
    tiny.save_shard(shards / "val-000.tar", {"v.png": tiny.png(0)})
    with pytest.raises(ValueError, match="val-000.tar is among .*--val_shards"):
        build(Config(data_dir=str(shards)), "train")
    assert numbers(build(Config(data_dir=str(shards), val_shards=f"{shards}/val-*.tar"), "val")) == [0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("processes, workers, start", [(1, 0, 0), (1, 3, 0), (2, 1, 2), (4, 0, 1)])
def test_sample_order_does_not_depend_on_ranks_and_workers(shards, processes, workers, start):
    config = Config(data_dir=str(shards), val_shards=f"{shards}/shards-005.tar", label_from="cls", mix_shards=2)
    source = TrainingImages(ImageSource(build(config, "train"), DATA), seed=3)
    expected = [source.order[k] for k in range(40)]
    assert sorted(expected[:20]) == sorted(expected[20:]) == list(range(20)) and expected[:20] != expected[20:]
    options = {"start": start, "steps": 10, "batch_size": 4, "accumulate": 1, "workers": workers}
    worlds = [DistContext(torch.device("cpu"), rank, processes) for rank in range(processes)]
    parts = zip(*(training_batches(source, world=world, **options) for world in worlds), strict=True)
    labels = [label for step in parts for (batch,) in step for label in batch["label"].tolist()]
    assert labels == expected[4 * start :]


def test_a_broken_image_is_reported_by_shard_and_sample(tmp_path, tiny):
    members = {"a.png": tiny.png(1), "b.png": tiny.png(2)[:40], "c.png": tiny.png(3)}
    path = tiny.save_shard(tmp_path / "one.tar", members)
    dataset = build(
        Config(data_dir=str(path), val_shards=str(tiny.save_shard(tmp_path / "v.tar", {"v.png": tiny.png()}))), "train"
    )
    assert dataset[2]["image"].getpixel((0, 0))[0] == 3
    with pytest.raises(UnreadableImage, match="one.tar sample b: "):
        dataset[1]
    tiny.save_shard(path, {"a.png": b"no", "b.png": b"images"})
    with pytest.raises(ValueError, match="none of its 1 images can be read"):
        build(Config(data_dir=str(path)), "val")


@pytest.mark.parametrize(
    "damage", ["in an image", "between samples", "without its end", "compressed", "nothing", "text"]
)
def test_incomplete_tars_are_refused(shards, damage):
    path = shards / "shards-002.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        third, end = tar.getmembers()[6], tar.getmembers()[-1]
    lengths = {
        "in an image": third.offset_data + 20,
        "between samples": third.offset,
        "without its end": end.offset_data + 512,
        "nothing": 0,
    }
    if damage == "compressed":
        path.unlink()
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    else:
        path.write_bytes(b"just words" * 200 if damage == "text" else content[: lengths[damage]])
    with pytest.raises(ValueError, match=r"shards-002.tar is not a complete, uncompressed tar \(.+\): download"):
        build(Config(data_dir=str(shards)), "train")


PNG = "a.png"
MALFORMED = {  # case -> members of a shard, flags, and words of the message
    "empty": ([], {}, "has no sample, wanted members such as 0000.jpg"),
    "hidden": ([".png", "._a.png", "README"], {}, "has no sample"),
    "no image": ([PNG, "a.cls", "b.cls", "b.txt"], {}, "sample b has no images .its members: cls, txt.*--skip_incomp"),
    "two images": ([PNG, "a.jpg"], {}, r"sample a has 2 images (?!.*--skip_incomplete)"),
    "twice": ([PNG, "b.png", PNG], {}, "sample a has two members .png: .*--dots_in_names"),
    "dots": (["a.1.png", "a.2.png"], {}, "sample a has no images .its members: 1.png, 2.png.*--dots_in_names"),
    "all incomplete": (
        ["a.txt", "b.txt"],
        {"skip_incomplete": True},
        r"has no complete sample .2 incomplete, such as: .* --dots_in_names if sample names contain dots.: write it",
    ),
    "no label": (
        [PNG, "a.json"],
        {"label_from": "cls"},
        "sample a has no regular .cls .*--label_from none, or pass --skip",
    ),
    "odd label": ([PNG, "a.cls"], {"label_from": "cls"}, "sample a: its .cls is b'cat', wanted a class"),
    "odd json": ([PNG, "a.json"], {"label_from": "json"}, "its .json field 'label' is b'cat'"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_samples_are_refused(tmp_path, tiny, case):
    names, flags, message = MALFORMED[case]
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for name in names:
            content = tiny.png() if name.endswith(("png", "jpg")) else b"cat"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=f"one.tar.*{message}"):
        build(Config(data_dir=str(tmp_path), **flags), "train")


def test_incomplete_samples_are_skipped_and_counted_on_request(tmp_path, tiny, scanned):
    members = {f"{i}.png": tiny.png(i) for i in range(6)} | {f"{i}.cls": b"%d" % i for i in range(4)} | {"x.cls": b"9"}
    tiny.save_shard(tmp_path / "one.tar", members)
    (tmp_path / "two.tgz").write_bytes(b"")
    config = Config(data_dir=str(tmp_path), label_from="cls", skip_incomplete=True)
    for _ in range(2):  # indexed, then read from the index
        train, val = (build(config, split) for split in SPLITS)
        assert sorted(numbers(train) + numbers(val)) == [0, 1, 2, 3] == sorted([*train.labels, *val.labels])
        skipped, other_files = train.notes
        assert "incomplete samples left out: 3, such as: " in skipped and "sample 4 has no regular .cls" in skipped
        assert "--skip_incomplete" not in skipped
        assert other_files == f"left out of {tmp_path}: files and folders not named .tar: 1, such as two.tgz"
        assert val.notes == train.notes
    assert len(scanned) == 1


def test_members_of_a_sample_need_not_be_adjacent(tmp_path, tiny):
    members = {f"{i}.png": tiny.png(i) for i in range(6)} | {f"{i}.cls": b"%d" % i for i in reversed(range(6))}
    tiny.save_shard(tmp_path / "one.tar", members)
    dataset = build(Config(data_dir=str(tmp_path), label_from="cls"), "train")
    assert numbers(dataset) == dataset.labels.tolist() and len(dataset) == 5


def test_sample_names_may_contain_dots_on_request(tmp_path, tiny):
    mask = tiny.encode_png(Image.new("L", (8, 8)))
    members = {}
    for i in range(3):
        image = f"v1.0/img.{i}"
        members |= {f"{image}.JPG": tiny.png(i), f"{image}.seg.png": mask, f"{image}.cls": b"%d" % i}
    tiny.save_shard(tmp_path / "one.tar", members)
    config = Config(data_dir=str(tmp_path), label_from="cls", mask_ext=("seg.png",), dots_in_names=True)
    datasets = [build(config, split) for split in SPLITS]
    assert sorted(number for each in datasets for number in numbers(each)) == [0, 1, 2]
    assert all(numbers(each) == each.labels.tolist() and "seg" in each[0] for each in datasets)
    assert datasets[0].rows["key"].tolist()[0].startswith(b"v1.0/img.")


def test_an_image_that_is_a_link_is_refused(tmp_path, tiny):
    with tarfile.open(tiny.save_shard(tmp_path / "one.tar", {"a.png": tiny.png()}), "a") as shard:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        shard.addfile(link)
    with pytest.raises(ValueError, match="sample b is stored as a link"):
        build(Config(data_dir=str(tmp_path)), "train")


@pytest.mark.parametrize("target", ["a.cls", "b.cls", "gone.cls"])
def test_a_label_that_is_a_link_is_incomplete(tmp_path, tiny, target):
    path = tiny.save_shard(tmp_path / "one.tar", {"a.png": tiny.png(), "a.cls": b"1", "b.png": tiny.png()})
    with tarfile.open(path, "a") as shard:
        link = tarfile.TarInfo("b.cls")
        link.type, link.linkname = tarfile.SYMTYPE, target
        shard.addfile(link)
    with pytest.raises(ValueError, match="sample b has no regular .cls"):
        build(Config(data_dir=str(tmp_path), label_from="cls"), "train")


def test_an_impossible_size_of_a_member_is_damage(tmp_path, tiny):
    path = tiny.save_shard(tmp_path / "one.tar", {"a.png": tiny.png(), "b.png": tiny.png()})
    header = bytearray(path.read_bytes()[:512])
    header[124:136], header[148:156] = b"\x80" + b"\x7f" * 11, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + path.read_bytes()[512:])
    with pytest.raises(ValueError, match="one.tar is not a complete, uncompressed tar"):
        build(Config(data_dir=str(tmp_path)), "train")


@pytest.mark.parametrize("label", ["-1", "true", '"3"', "1.5", "null", "99999999999"])
def test_malformed_class_ids_are_refused(tmp_path, tiny, label):
    tiny.save_shard(tmp_path / "one.tar", {"a.png": tiny.png(), "a.json": f'{{"label": {label}}}'.encode()})
    with pytest.raises(ValueError, match="its .json field 'label' is .*wanted a class"):
        build(Config(data_dir=str(tmp_path), label_from="json"), "train")


def test_image_ext_selects_one_of_several_images(tmp_path, tiny):
    members = {f"{i}.{kind}": tiny.png(value) for i in range(4) for kind, value in (("seg.png", 9), ("PNG", 5))}
    tiny.save_shard(tmp_path / "one.tar", members)
    assert set(numbers(build(Config(data_dir=str(tmp_path)), "train"))) == {5}
    assert set(numbers(build(Config(data_dir=str(tmp_path), image_ext=("seg.png",)), "train"))) == {9}


def test_a_sample_in_two_shards_needs_keys_per_shard(shards, tiny):
    tiny.save_shard(shards / "shards-006.tar", {"s/0009.png": tiny.png(200)})
    with pytest.raises(
        ValueError, match="sample s/0009 is in .*shards-002.tar and in .*shards-006.tar.*keys_per_shard"
    ):
        build(Config(data_dir=str(shards)), "train")
    splits = [build(Config(data_dir=str(shards), keys_per_shard=True), split) for split in SPLITS]
    assert sorted(numbers(splits[0]) + numbers(splits[1])) == [*range(24), 200]


def test_missing_and_duplicate_shards_are_refused(shards):
    with pytest.raises(FileNotFoundError, match="shards-006.tar is not a file.*--data_dir"):
        build(Config(data_dir=f"{shards}/shards-{{004..007}}.tar"), "train")
    with pytest.raises(FileNotFoundError, match="has no .tar.*--val_shards"):
        (shards / "empty").mkdir()
        build(Config(data_dir=str(shards), val_shards=f"{shards}/empty"), "train")
    with pytest.raises(ValueError, match="names .*shards-001.tar twice"):
        build(Config(data_dir=f"{shards}/shards-00{{1,2,1}}.tar"), "train")


@pytest.mark.parametrize("flags", [{"mix_shards": 0}, {"mix_shards": 8, "shards_on_disk": 15}, {"image_ext": ()}])
def test_invalid_flags_are_refused(flags):
    with pytest.raises(ValueError, match="got (mix_shards|no image_ext)"):
        Config(**flags)


def test_a_missing_package_names_the_pip_command(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ValueError, match="pip install webdataset"):
        build(Config(data_dir=str(shards)), "train")


@pytest.fixture
def scanned(monkeypatch):
    """The names of the shards indexed so far."""
    names, scan = [], tar.scan
    monkeypatch.setattr(tar, "scan", lambda file, name, wanted: names.append(name) or scan(file, name, wanted))
    return names


def test_shards_are_indexed_once_and_again_when_rewritten(shards, tiny, scanned):
    config = Config(data_dir=str(shards), label_from="cls")
    before = build(config, "train").fingerprint()
    assert len(scanned) == 6
    build(config, "val")
    assert len(scanned) == 6
    tiny.save_shard(shards / "shards-003.tar", {"n.png": tiny.png(77), "n.cls": b"3"})
    after = build(config, "train")
    assert len(scanned) == 7 and scanned[-1].endswith("shards-003.tar")
    assert after.fingerprint() != before
    assert 77 in numbers(after) + numbers(build(config, "val"))
    build(Config(data_dir=str(shards)), "train")
    assert len(scanned) == 13  # rows without labels differ


def test_an_incomplete_index_is_rebuilt(shards, shard_cache, scanned):
    dataset = build(Config(data_dir=str(shards)), "train")
    for size, path in zip((0, 3, 150, 300), sorted(shard_cache.glob("index/*.npy")), strict=False):
        path.write_bytes(path.read_bytes()[:size])
    assert build(Config(data_dir=str(shards)), "train").fingerprint() == dataset.fingerprint()
    assert len(scanned) == 10


def test_a_shard_that_changes_during_use_is_refused(shards, tiny):
    dataset = build(Config(data_dir=str(shards)), "train")
    for path in shards.glob("*.tar"):
        tiny.save_shard(path, {"other.png": tiny.png(1)})
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        dataset[0]


def test_webdataset_flags_parse_without_a_preset(shards):
    words = f"--dataset webdataset --data_dir {shards} --label_from cls --mix_shards 2 --image_ext png jpg --prefetch 3"
    config = cli.parse(SecondStageConfig, None, words.split())
    assert (config.reader.mix_shards, config.reader.image_ext, config.data.prefetch) == (2, ("png", "jpg"), 3)
    content = cli.to_dict(config)
    assert cli.to_dict(cli.from_dict(SecondStageConfig, content, "here")) == content
