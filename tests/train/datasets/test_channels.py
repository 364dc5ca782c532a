"""Images of any number of channels: .npy files, pages of TIFF files, transparency; what cannot be read is named."""

import io
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from train.data.transforms import to_item
from train.datasets import UnreadableImage, webdataset
from train.datasets._channels import channels_last, decode_channels
from train.datasets.folder import Config, build


def draw(shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return io.BytesIO(file.getvalue())


def tif(pages):
    file, (first, *rest) = (
        io.BytesIO(),
        [page if isinstance(page, Image.Image) else Image.fromarray(page) for page in pages],
    )
    first.save(file, "TIFF", save_all=True, append_images=rest)
    return io.BytesIO(file.getvalue())


def read(file, n_channels, data_range=None):
    """The image that training gets at the size of the file, (n_channels, 6, 7)."""
    image = decode_channels(file, n_channels, "a file")
    return to_item({"image": image}, (6, 7), n_channels, data_range)["image"].as_subclass(torch.Tensor).numpy()


def test_npy_files_have_their_channels_last_or_first():
    for n in range(1, 6):
        for dtype in (np.uint8, np.uint16, ">u2", np.float32, np.float16, np.int16):
            pixels = draw((n, 6, 7), dtype)
            data_range = None if dtype == np.uint8 else (0, 255)
            for array in (pixels, pixels.transpose(1, 2, 0), np.asfortranarray(pixels)):
                image = read(npy(array), n, data_range)
                levels = image if dtype == np.uint8 else np.round((image + 1) * 127.5)
                assert np.array_equal(levels, pixels.astype(np.uint8)), (n, dtype)
    assert np.array_equal(channels_last(draw((5, 6, 5)), 5), draw((5, 6, 5)))  # the last axis first


def test_grey_and_colour_npy_files_stand_for_each_other():
    grey, colour = draw((6, 7)), draw((6, 7, 3))
    for array in (grey, grey[None], grey[..., None]):
        assert (read(npy(array), 3) == grey).all() and (read(npy(array), 1) == grey).all()
    expected = np.asarray(Image.fromarray(colour).convert("L"))
    assert (read(npy(colour), 1) == expected).all() and (read(npy(colour.transpose(2, 0, 1)), 1) == expected).all()


def test_grey_pages_of_a_tif_are_channels():
    for n in range(2, 6):
        for dtype in (np.uint8, np.uint16, np.float32):
            pixels = draw((n, 6, 7), dtype)
            image = read(tif(pixels), n, None if dtype == np.uint8 else (0, 255))
            assert np.array_equal(image if dtype == np.uint8 else np.round((image + 1) * 127.5), pixels), (n, dtype)


def test_the_first_page_is_a_grey_or_colour_picture():
    pixels = draw((4, 6, 7))
    assert (read(tif(pixels), 1) == pixels[0]).all()
    with pytest.warns(UserWarning, match="4 pages, the first is read: pass --n_channels 4 to read each"):
        assert (read(tif(pixels), 3) == pixels[0]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        colour = draw((6, 7, 3))
        assert (read(tif([colour, colour[::-1]]), 3) == colour.transpose(2, 0, 1)).all()


def test_pictures_have_alpha_if_the_run_has_a_channel_for_it(tmp_path):
    rgba = draw((6, 7, 4))
    for mode, n in (("RGBA", 4), ("LA", 2)):
        picture = Image.fromarray(rgba).convert(mode)
        for kind in ("png", "webp", "tif")[: 1 if n == 2 else 3]:
            picture.save(tmp_path / f"a.{kind}", **({"lossless": True, "exact": True} if kind == "webp" else {}))
            image = read(tmp_path / f"a.{kind}", n)
            assert np.array_equal(image, np.asarray(picture).transpose(2, 0, 1)), (mode, kind)
        Image.fromarray(rgba[..., :3]).save(tmp_path / "opaque.png")
        assert (read(tmp_path / "opaque.png", n)[-1] == 255).all()
    Image.fromarray(rgba).save(tmp_path / "a.png")
    white = Image.alpha_composite(Image.new("RGBA", (7, 6), "white"), Image.fromarray(rgba)).convert("RGB")
    assert np.array_equal(read(tmp_path / "a.png", 3), np.asarray(white).transpose(2, 0, 1))


class Secret:
    def __reduce__(self):
        return print, ("unpickled",)


def test_hidden_colours_do_not_bleed_when_resized():
    for n_channels, mode in ((2, "LA"), (4, "RGBA")):
        pixels = np.full((8, 8, n_channels), 255, np.uint8)
        pixels[:, :3, :-1], pixels[:, :3, -1], pixels[:, 3:, :-1] = 200, 0, 40  # hidden | shown
        image = to_item({"image": Image.fromarray(pixels, mode)}, (4, 4), n_channels)["image"]
        colours, alpha = image[:-1], image[-1]
        assert 0 < alpha[0, 1] < 255 and (colours[:, alpha > 0].int() - 40).abs().max() <= 2
        assert (colours[:, alpha == 0] == 0).all()


def test_other_channels_and_contents_are_unreadable(capsys):
    page, bits16 = draw((6, 7)), draw((6, 7), np.uint16)
    samples = (
        tif([Image.fromarray(draw((6, 7, 4)))])
        .getvalue()
        .replace(b"\x15\x01\x03\0\1\0\0\0\4", b"\x15\x01\x03\0\1\0\0\0\5")
    )
    cases = [
        (npy(draw((6, 7, 5))), 4, r"got an image \(6, 7, 5\), wanted \(H, W, 4\) or \(4, H, W\): pass --n_channels 5"),
        (npy(page), 2, r"got an image \(6, 7\), .*pass --n_channels 1"),
        (npy(draw((1, 6, 7, 2))), 2, "wanted"),
        (npy(np.float32(3)), 2, r"got an image \(\)"),
        (npy(draw((6, 0, 2))), 2, "at least 1 pixel"),
        (npy(page > 3), 1, "array of bool, wanted numbers"),
        (npy(page * 1j), 1, "array of complex"),
        (npy(np.array([Secret()]), allow_pickle=True), 1, "array of object"),
        (npy(np.zeros((6, 7), [("á", "u1")])), 1, "version|array of"),
        (tif([page] * 3), 5, "a file: got 3 pages, wanted 5: pass --n_channels 3 to read each as a channel"),
        (tif([page, bits16]), 2, "page 2 is I;16"),
        (tif([page, page[:3]]), 2, r"page 2 is L \(7, 3\), wanted L \(7, 6\) as the first"),
        (tif([bits16]), 2, "a picture of mode I;16, wanted 2 channels: save it as .npy"),
        (tif([draw((6, 7, 3))]), 5, "a picture of mode RGB, wanted 5 channels"),
        (io.BytesIO(samples), 5, "save it as .npy, or as .tif with a grey page per channel"),
    ]
    for file, n, message in cases:
        with pytest.raises(UnreadableImage, match=message) as refusal:
            decode_channels(file, n, "a file")
        assert str(refusal.value).startswith("a file: ") and "\n" not in str(refusal.value)
    assert not capsys.readouterr().out
    with pytest.raises(UnreadableImage, match="got 7 x 6 pixels, wanted at most 20: .*--max_pixels"):
        decode_channels(npy(draw((5, 6, 7))), 5, "a file", max_pixels=20)
    with pytest.raises(UnreadableImage, match="gone.npy"):
        decode_channels("gone.npy", 5)


def test_a_size_is_refused_before_it_is_read():
    """A header alone may promise any number of pixels."""
    content = npy(draw((6, 7, 5))).getvalue()
    for sides in (b"(9000, 9000, 5)", b"(-6, -7, 5)", b"(6, 7, 5, 1)"):
        header = content[:128].replace(b"(6, 7, 5)" + b" " * (len(sides) - 9), sides)
        with pytest.raises(UnreadableImage, match="truncated|at least 1 pixel|wanted"):
            decode_channels(io.BytesIO(header), 5, "a file")


def test_a_damaged_npy_file_is_unreadable_or_an_image():
    rng, content = np.random.default_rng(0), npy(draw((6, 7, 5))).getvalue()
    for length in range(6, len(content) - 1, 7):
        with pytest.raises(UnreadableImage, match="^cut: "):
            decode_channels(io.BytesIO(content[:length]), 5, "cut")
    for _ in range(500):
        data = bytearray(content)
        for position in rng.integers(6, 128, rng.integers(1, 4)):
            data[position] = rng.integers(256)
        try:
            assert decode_channels(io.BytesIO(bytes(data)), 5, "fuzzed").shape[2] == 5
        except UnreadableImage as error:
            assert str(error).startswith("fuzzed: ")


def test_npy_files_are_images_where_there_are_no_others(tmp_path, tiny):
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", draw((6, 7, 5 if i else 4)))
    splits = [build(Config(data_dir=str(tmp_path), val_fraction=0.5), split, 5) for split in ("train", "val")]
    assert sorted(name for split in splits for name in split.names) == [f"{i}.npy" for i in range(4)]
    sizes = [
        None if name == "0.npy" else split[i]["image"].shape for split in splits for i, name in enumerate(split.names)
    ]
    assert sizes.count((6, 7, 5)) == 3
    message = re.escape(f"{tmp_path}: none of its 2 images can be read; first error: ") + ".*pass --n_channels 5"
    with pytest.raises(ValueError, match=message.replace("5", "[45]")):
        build(Config(data_dir=str(tmp_path), val_fraction=0.5), "train")
    tiny.save_images(tmp_path, "a.png", "b.png")
    train = build(Config(data_dir=str(tmp_path), val_fraction=0.5), "train")
    assert train.names in (["a.png"], ["b.png"]) and any("4 .npy" in note for note in train.notes)


def test_a_class_of_arrays_called_train_is_no_split(tmp_path, tiny):
    for name in ("bus", "train"):
        (tmp_path / name).mkdir()
        for i in range(4):
            np.save(tmp_path / name / f"{i}.npy", draw((6, 7, 5)))
    train = build(Config(data_dir=str(tmp_path), label_from="folder"), "train", 5)
    assert train.class_names == ("bus", "train")
    (tmp_path / "bus").rename(tmp_path / "val")
    np.save(tmp_path / "stray.npy", draw((6, 7, 5)))
    train = build(Config(data_dir=str(tmp_path)), "train", 5)
    assert train.root == tmp_path / "train" and "images outside the split folders: 1" in train.notes[1]
    tiny.save_images(tmp_path, "train/a.png", "val/a.png")
    (tmp_path / "stray.npy").rename(tmp_path / "train" / "stray.npy")
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "0.npy", draw((6, 7, 5)))  # beside pictures no image
    assert build(Config(data_dir=str(tmp_path)), "train").root == tmp_path / "train"


def test_npy_members_of_shards_are_images(tmp_path, tiny):
    pytest.importorskip("webdataset", reason="needs the optional package webdataset")
    members = {f"{i}.npy": npy(draw((6, 7, 5))).getvalue() for i in range(4)}
    members |= {f"{i}.json": b'{"boxes": [[0, 1, 2, 3]]}' for i in range(4)}
    tiny.save_shard(tmp_path / "0.tar", members)
    config = webdataset.Config(data_dir=str(tmp_path), image_ext=("npy",), box_fields=("boxes",), val_fraction=0.5)
    item = webdataset.build(config, "train", 5)[0]
    assert item["image"].shape == (6, 7, 5) and item["boxes"].canvas_size == (6, 7)
