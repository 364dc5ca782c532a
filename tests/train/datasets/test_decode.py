"""Images of any mode decode to grey (8 or 16 bits) or RGB, upright; broken files are unreadable."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from train.data.transforms import to_item
from train.datasets import UnreadableImage
from train.datasets._decode import FORMATS, decode, to_grey_or_rgb

GREY = np.arange(0, 252, 12, dtype=np.uint8).reshape(3, 7)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_eight_bit_images_are_unchanged(kind):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode(encode(Image.fromarray(rgb), kind, **options))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), rgb)


def test_grey_and_black_and_white_stay_grey():
    image = decode(encode(Image.fromarray(GREY)))
    assert image.mode == "L" and np.array_equal(np.asarray(image), GREY)
    image = decode(encode(Image.fromarray(GREY).convert("1")))
    assert image.mode == "L" and set(np.unique(np.asarray(image))) <= {0, 255}


@pytest.mark.parametrize("kind, mode", [("PNG", "I;16"), ("TIFF", "I;16"), ("TIFF", "I;16B")])
def test_sixteen_bit_grey_is_kept_and_scaled_to_eight_on_request(kind, mode):
    levels = np.array([[0, 128, 129, 257, 32896, 65406, 65407, 65535]], np.uint16)
    data = levels.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    image = decode(encode(Image.frombytes(mode, (8, 1), data), kind))
    assert image.mode == "I;16" and np.array_equal(np.asarray(image), levels)
    for eight in (to_grey_or_rgb(image), to_item({"image": image}, (1, 8), 1)["image"][0]):
        assert np.asarray(eight).tolist() == [[0, 0, 1, 1, 128, 254, 255, 255]]


def test_thirty_two_bit_grey_is_clamped_to_sixteen_bits():
    image = decode(encode(Image.fromarray(np.array([[-5, 0, 257, 65535, 70000]], np.int32)), "TIFF"))
    assert np.asarray(image).tolist() == [[0, 0, 257, 65535, 65535]]
    assert np.asarray(to_grey_or_rgb(image)).tolist() == [[0, 0, 1, 255, 255]]


def test_a_palette_becomes_rgb():
    rgb = Image.new("RGB", (4, 3), (10, 200, 30))
    image = decode(encode(rgb.quantize(4)))
    assert image.mode == "RGB" and image.getpixel((1, 1)) == (10, 200, 30)


def test_cmyk_becomes_rgb():
    image = decode(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = image.getpixel((8, 8))
    assert image.mode == "RGB" and red > 250 and green < 5 and blue < 5


def test_alpha_is_composited_on_white():
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    image = decode(encode(Image.fromarray(pixels)))
    assert image.mode == "RGB"
    assert np.asarray(image).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]


def test_grey_alpha_is_composited_on_white_and_stays_grey():
    pixels = np.array([[[77, 255], [77, 0], [0, 51]]], np.uint8)
    image = decode(encode(Image.fromarray(pixels)))
    assert image.mode == "L" and np.asarray(image).tolist() == [[77, 255, 204]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])])
def test_a_transparent_palette_entry_becomes_white(transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    decoded = decode(encode(image, transparency=transparency))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_a_transparent_colour_becomes_white():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    decoded = decode(encode(image, transparency=(9, 9, 9)))
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(1, 2, 3), (255, 255, 255)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_exif_orientation_is_applied(kind):
    image = Image.new("L", (32, 16))
    image.paste(255, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # displayed rotated by 90 degrees clockwise
    upright = decode(encode(image.convert("RGB"), kind, exif=exif.tobytes()))
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4))[0] > 200 and upright.getpixel((8, 28))[0] < 50


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_truncated_file_is_unreadable(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    content = encode(Image.fromarray(noise), kind).getvalue()
    path = tmp_path / "cut.img"
    for length in (0, 10, len(content) // 2, len(content) - 200):
        path.write_bytes(content[:length])
        with pytest.raises(UnreadableImage, match=r"cut.img: .+"):
            decode(path)


def test_missing_files_texts_and_floats_are_unreadable(tmp_path):
    with pytest.raises(UnreadableImage, match="gone.png"):
        decode(tmp_path / "gone.png")
    with pytest.raises(UnreadableImage, match="archive entry 7: "):
        decode(io.BytesIO(b"just words"), name="archive entry 7")
    with pytest.raises(UnreadableImage, match="floats of unknown range"):
        decode(encode(Image.new("F", (2, 2)), "TIFF"), name="depth.tif")


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "TGA", "DDS", "PCX", "SGI", "IM"])
def test_only_the_formats_of_photographs_are_decoded(kind):
    with pytest.raises(UnreadableImage, match="named.png: "):
        decode(encode(Image.new("RGB", (16, 16)), kind), name="named.png")


def test_postscript_starts_no_program(monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *args, **options: started.append(args))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    with pytest.raises(UnreadableImage, match="x.png: its content is none of JPEG, PNG"):
        decode(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"), name="x.png")
    assert not started


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "AVIF"])
def test_other_formats_of_folders_are_decoded(kind):
    image = decode(encode(Image.new("RGB", (16, 9), (200, 40, 120)), kind))
    assert image.mode == "RGB" and np.abs(np.asarray(image).astype(int) - (200, 40, 120)).max() <= 3


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_above_the_limit_is_unreadable(tmp_path):
    wide = Image.new("1", (13_000, 13_000))
    wide.save(tmp_path / "wide.png")
    with pytest.raises(
        UnreadableImage, match="wide.png: got 13000 x 13000 pixels, wanted at most 89478485: .*--max_pixels"
    ):
        decode(tmp_path / "wide.png")
    with pytest.raises(UnreadableImage, match="got 7 x 3 pixels, wanted at most 20"):
        decode(encode(Image.fromarray(GREY)), max_pixels=20)
    assert decode(encode(Image.fromarray(GREY)), max_pixels=21).size == (7, 3)


def png_chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def test_a_png_with_odd_metadata_is_read():
    image = Image.new("RGB", (16, 9), (200, 40, 120))
    image.putpixel((3, 3), (1, 2, 3))
    content = encode(image).getvalue()
    long = zlib.compress(bytes(3 << 20))
    odd = [
        (b"zTXt", b"a\0\0" + long),
        (b"iCCP", b"a\0\0" + long),
        (b"gAMA", b"1"),
        (b"tEXt", b"a\0b", 5),
        (b"sRGB", b""),
    ]
    odd += [(b"eXIf", b"no EXIF"), (b"acTL", b"12"), (b"fdAT", bytes(9)), (b"zTXt", b"a\0\5b"), (b"pHYs", b"1")]
    for position in (33, content.rindex(b"IEND") - 4):
        for chunk in odd:
            damaged = content[:position] + png_chunk(*chunk) + content[position:]
            assert np.array_equal(np.asarray(decode(io.BytesIO(damaged))), np.asarray(image)), chunk


def test_a_palette_png_without_its_palette_is_unreadable():
    content = encode(Image.fromarray(GREY).convert("P")).getvalue()
    with pytest.raises(UnreadableImage, match="a.png: "):
        decode(io.BytesIO(content.replace(b"PLTE", b"pLTE")), name="a.png")


def test_a_decompression_bomb_is_unreadable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UnreadableImage, match="bomb.png: "):
        decode(encode(Image.fromarray(GREY)), name="bomb.png")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", FORMATS)
def test_corrupted_bytes_give_an_image_or_unreadable_image(kind):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in ("BMP", "GIF") else {"exif": exif.tobytes()}
    content = encode(Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8)), kind, **options).getvalue()
    for _ in range(200):
        data = bytearray(content)
        for position in rng.integers(0, min(len(data), 300), 3):
            data[position] = rng.integers(256)
        try:
            assert decode(io.BytesIO(bytes(data)), name="fuzzed").mode in ("L", "I;16", "RGB")
        except UnreadableImage as error:
            assert str(error).startswith("fuzzed: ")
