"""WebDataset: boxes, label maps, captions and numbers of samples."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from train.config import DataConfig
from train.data.loading import ImageSource, TrainingImages, training_batches
from train.datasets import SPLITS
from train.datasets.webdataset import Config, build
from train.distributed import DistContext

pytest.importorskip("webdataset", reason="needs the optional package webdataset")


RESERVED_FIELDS = [{"json_fields": ("label",)}, {"box_fields": ("image",)}, {"mask_ext": ("label.png",)}]


@pytest.mark.parametrize("fields", RESERVED_FIELDS)
def test_extra_fields_may_not_be_image_label_or_duplicates(fields):
    with pytest.raises(ValueError, match="items have them already"):
        Config(**fields)
    with pytest.raises(ValueError, match="wanted each once"):
        Config(json_fields=("seg",), mask_ext=("seg.png",))


LEVELS = np.array([[0, 1], [2, 17]], np.uint8).repeat(4, 0).repeat(4, 1)


@pytest.fixture
def annotated(tmp_path, tiny):
    """Two shards of two images with boxes, ids, a grey and a palette label map, and numbers."""
    palette = Image.fromarray(LEVELS, mode="P")
    palette.putpalette(list(range(256)) * 3)
    for shard in range(2):
        members = {}
        for i in (2 * shard, 2 * shard + 1):
            boxes = [[0, 0, 4, 4], [4, 4, 8, 8]][: i % 3]
            content = {"boxes": boxes, "ids": list(range(len(boxes))), "point": [0.5, i], "tags": ["a"] * (i % 3)}
            members |= {
                f"{i}.jpg": tiny.encode_png(Image.new("L", (8, 8), 10 * i)),
                f"{i}.json": json.dumps(content).encode(),
            }
            members |= {
                f"{i}.seg.png": tiny.encode_png(Image.fromarray(LEVELS)),
                f"{i}.part.png": tiny.encode_png(palette),
            }
        tiny.save_shard(tmp_path / f"shards-{shard}.tar", members)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_boxes_and_label_maps_round_trip(annotated, workers):
    config = Config(
        data_dir=str(annotated), image_ext=("jpg",), val_fraction=0.25, mask_ext=("seg.png", "part.png"),
        json_fields=("point",), box_fields=("boxes",), id_fields=("ids",),
    )  # fmt: skip
    data = DataConfig(img_size=8, n_channels=1, horizontal_flip=True, num_workers=workers)
    source = TrainingImages(ImageSource(build(config, "train"), data), seed=3)
    options = {"start": 0, "steps": 6, "batch_size": 2, "accumulate": 1, "workers": workers}
    combinations, maps = set(), torch.from_numpy(LEVELS)
    for (batch,) in training_batches(source, world=DistContext(torch.device("cpu")), **options):
        assert torch.equal(batch["ids_mask"], batch["boxes_mask"]) and batch["ids"].dtype == torch.int64
        for seg, part, boxes, mask, point in zip(
            batch["seg"], batch["part"], batch["boxes"], batch["boxes_mask"], batch["point"], strict=True
        ):
            flipped = not torch.equal(seg, maps)
            assert torch.equal(seg, maps.flip(1) if flipped else maps) and torch.equal(part, seg)
            count = int(point[1]) % 3
            assert mask.sum() == count and point[0] == 0.5
            expected = [[0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1]] if flipped else [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
            assert boxes[:count].tolist() == expected[:count]
            combinations.add((int(point[1]), flipped))
    assert len({number for number, _ in combinations}) == 3 and len({flipped for _, flipped in combinations}) == 2


def test_captions_are_the_lines_of_text_members(tmp_path, tiny):
    members = {f"{i}.png": tiny.png(i) for i in range(4)}
    members |= {f"{i}.txt": f"\ufeffleft of {i}\r\n\nanother\n".encode() for i in range(4)} | {"2.txt": b"\n"}
    shard = tiny.save_shard(tmp_path / "one.tar", members)
    config = Config(data_dir=str(tmp_path), caption_ext=("txt",), val_fraction=0.25)
    items = {
        dataset[i]["image"].getpixel((0, 0))[0]: dataset[i]
        for dataset in (build(config, s) for s in SPLITS)
        for i in range(len(dataset))
    }
    assert items[3]["captions"] == ["left of 3", "another"] and items[2]["captions"] == []
    data = DataConfig(img_size=4, n_channels=3, horizontal_flip=True)
    images = TrainingImages(ImageSource(build(config, "train"), data), seed=3)
    assert {text.split()[0] for text in images[list(range(40))]["caption"] if text} == {"left", "right", "another"}
    plain = build(Config(data_dir=str(tmp_path), val_fraction=0.25), "train")
    assert plain.content_fingerprint() != images.source.dataset.content_fingerprint() and "captions" not in plain[0]
    with pytest.raises(ValueError, match="wanted each once"):
        Config(json_fields=("captions",), caption_ext=("txt",))
    tiny.save_shard(shard, members | {f"{i}.txt": b"caf\xe9" for i in range(4)})
    with pytest.raises(ValueError, match="one.tar sample .: its captions are not UTF-8"):
        build(config, "train")
    tiny.save_shard(shard, {name: content for name, content in members.items() if name != "1.txt"})
    with pytest.raises(ValueError, match="sample 1 has no regular .txt .*--caption_ext"):
        build(config, "train")


def test_an_rgb_mask_is_refused(tmp_path, tiny):
    for key in "ab":
        members = {f"{key}.jpg": tiny.png(), f"{key}.seg.png": tiny.encode_png(Image.new("RGB", (8, 8)))}
        tiny.save_shard(tmp_path / f"{key}.tar", members)
    with pytest.raises(ValueError, match="mode RGB, wanted grey or a palette"):
        build(Config(data_dir=str(tmp_path), image_ext=("jpg",), mask_ext=("seg.png",)), "train")
    with pytest.raises(ValueError, match="has no regular .part.png .*--mask_ext"):
        build(Config(data_dir=str(tmp_path), image_ext=("jpg",), mask_ext=("part.png",)), "train")
