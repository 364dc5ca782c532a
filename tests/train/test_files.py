"""Files of arrays that are damaged, foreign or malicious, and JSON with a key twice, are refused with a reason."""

import io
import json
import random
import zipfile

import numpy as np
import pytest

from train.files import parse_unique_json, read_arrays, sha256_of_network

WANTED = "wanted what the test wrote"


def read(path):
    return read_arrays(path, ("mu", "n"), WANTED)


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(content: object) -> bytes:
    file = io.BytesIO()
    np.save(file, content)
    return file.getvalue()


def archive(member: bytes, flags: int = 0) -> bytes:
    """A zip archive whose member mu.npy has this content, and these flags in its header."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("mu.npy", member)
    content = bytearray(file.getvalue())
    content[content.index(b"PK\x01\x02") + 8] |= flags
    content[6] |= flags
    return bytes(content)


def test_only_the_named_arrays_are_read(tmp_path):
    (tmp_path / "a.npz").write_bytes(npz(mu=np.arange(3), words=np.array(["a"]), objects=np.array([{}])))
    assert {name: array.tolist() for name, array in read(tmp_path / "a.npz").items()} == {"mu": [0, 1, 2]}


def test_files_of_other_kinds_are_refused(tmp_path):
    header = b"\x93NUMPY\x01\x00"
    files = {
        "empty": b"",
        "array": npy(np.arange(3)),
        "pickle": npz(mu=np.array([{}])),
        "words": npz(mu=np.array(["a"])),
        "encrypted": archive(npy(np.arange(3)), flags=1),
        "no array": archive(b"just words"),
        "empty array": archive(b""),
        "unfinished header": archive(header + b"\x10\x00{'descr': ((((\n"),
        "token": archive(header + b"\x03\x00'''"),
        "large": archive(npy(np.arange(3)).replace(b"(3,), }", b"(9999999999999,), }")[:128]),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read .*: {WANTED}"):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="is a folder: wanted"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.npz is not found: wanted"):
        read(tmp_path / "none.npz")


def test_damaged_archives_are_refused_or_read(tmp_path):
    file, rng = io.BytesIO(), random.Random(0)
    np.savez_compressed(file, mu=np.arange(50), n=np.int64(3))
    for content in (file.getvalue(), npz(mu=np.arange(5), n=np.int64(3))):
        for _ in range(300):
            damaged = bytearray(content[: rng.choice([len(content), rng.randrange(len(content))])])
            for _ in range(rng.randint(1, 4) if damaged else 0):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            (tmp_path / "damaged.npz").write_bytes(damaged)
            try:
                read(tmp_path / "damaged.npz")
            except ValueError as error:
                assert "damaged.npz cannot be read" in str(error)


# JSON of users


def test_unique_json_is_json():
    text = '{"a": [{}, {"b": null, "a": "}"}], "b": 1.5}'
    assert parse_unique_json(text) == json.loads(text) and parse_unique_json("[3]") == [3]
    for broken in ("{", "[" * 100_000):
        with pytest.raises(json.JSONDecodeError):
            parse_unique_json(broken)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": 1, "a": 1}', "line 5 column 16"),
        ('[{},\n{"a": {"b": {}}, "c": {"x": "}", "x": 2}}]', "line 6 column 40"),
        ('[{"\\"}": "\\\\"},\n\n{"x": 1, "a": {"x": "{"}, "x": 2\n}]', "line 8 column 1"),
    ],
)
def test_a_key_twice_is_refused_with_its_place(text, place):
    """Braces in texts end no object."""
    with pytest.raises(ValueError, match=f"^{place}: got the key '[ax]' twice in an object that ends there: leave one"):
        parse_unique_json(text, first_line=5)


def test_the_hash_of_a_network_is_that_of_its_files(tmp_path):
    """Weights of another format beside safetensors are not read, nor is what is no part of the network."""

    def write(**contents):
        for name, content in contents.items():
            (tmp_path / name.replace("__", ".")).write_text(content)
        return sha256_of_network(tmp_path)

    hashes = [write(config__json="{}", model__bin="a"), write(model__bin="b"), write(model__safetensors="c")]
    hashes += [write(merges__txt="a b"), write(config__json="[]"), write(more__json="{}")]
    assert len({*hashes}) == 6
    assert write(model__bin="d", picture__png="e") == hashes[-1]
