"""The code cache survives kills, full disks, damage, other weights and unreadable images."""

import dataclasses
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from helpers.toy_encoding import (
    ALL_CODES,
    CHUNK,
    COUNT,
    Encoder,
    captions,
    code_file,
    encode,
    load_codes,
    suffixes,
    table_matches,
)
from train.data import code_cache
from train.data import code_file as code_file_module
from train.data.codes import TrainingCodes

# interruptions


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5, 7])
def test_finished_chunks_are_not_encoded_again(tmp_path, fails_at):
    first, second = Encoder(fails_at), Encoder()
    with pytest.raises(KeyboardInterrupt):
        load_codes(tmp_path, first)
    complete_chunks = (fails_at - 1) // 2  # two batches per chunk
    assert table_matches(load_codes(tmp_path, second))
    assert second.images == COUNT - CHUNK * complete_chunks
    assert suffixes(tmp_path) == [".codes", ".lock", ".note"]


FILE_OPERATIONS = [
    (os, "fsync"),
    (Path, "open"),
    (Path, "replace"),
    (Path, "mkdir"),
    (shutil, "rmtree"),
    (Path, "unlink"),
]


def hook_file_operations(patch, act):
    """Patches every file operation to call `act` first."""
    for owner, name in FILE_OPERATIONS:
        real = getattr(owner, name)

        def wrapped(*args, name=name, real=real, **kwargs):
            if name != "open" or (args[1] if len(args) > 1 else kwargs["mode"]) != "rb":
                act()
            return real(*args, **kwargs)

        patch.setattr(owner, name, wrapped)


def two_chunk_file(folder):
    """A code file with two chunks."""
    return code_file(folder, chunk=6)


def encode_and_kill(n, folder, annotated):
    """Encodes, but kills this process before its n-th file operation."""
    events = []

    def act():
        events.append(True)
        if len(events) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    hook_file_operations(pytest.MonkeyPatch(), act)
    load_codes(folder, file=two_chunk_file(folder), annotated=annotated)


@pytest.mark.parametrize("annotated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_encoding_resumes_after_a_kill_at_any_moment(tmp_path, annotated):
    context, n, code, image_counts = multiprocessing.get_context("fork"), 0, None, []
    while code != 0:
        n += 1
        process = context.Process(target=encode_and_kill, args=(n, tmp_path / str(n), annotated))
        process.start()
        process.join(20)
        code, encoder = process.exitcode, Encoder()
        assert code in (0, -signal.SIGKILL)
        table = load_codes(tmp_path / str(n), encoder, file=two_chunk_file(tmp_path / str(n)), annotated=annotated)
        assert table_matches(table) and (not annotated or captions(table) == [f"image {i}, été" for i in range(COUNT)])
        assert suffixes(tmp_path / str(n)) == [*[".annotations"] * annotated, ".codes", ".lock", ".note"], n
        assert not list((tmp_path / str(n)).glob(".*"))
        image_counts.append(encoder.images)
    assert n > 25 and set(image_counts) == {11, 5, 0} and image_counts == sorted(image_counts, reverse=True)


def test_a_chunk_is_flushed_before_its_note(tmp_path, monkeypatch):
    events, fsync, write_text = [], os.fsync, code_file_module.write_text

    def record_fsync(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def record_note(path, text):
        write_text(path, text)
        events.append(path.name)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here to identify the flushed file")
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(code_file_module, "write_text", record_note)
    load_codes(tmp_path)
    for chunk in range(4):
        position = events.index(f"{chunk:08d}.note")
        assert events[position - 1].startswith(f".{chunk:08d}.note.")  # its temporary file
        assert events[position - 2] == code_file(tmp_path).path.name


# full disks


def test_too_little_disk_space_is_refused_before_encoding(tmp_path, monkeypatch):
    class DiskUsage:
        free = COUNT * 8 * 2 - 1

    encoder = Encoder()
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="codes of mine need 0.000 GB .*free disk space"),
    ):
        patch.setattr(code_cache.shutil, "disk_usage", lambda path: DiskUsage)
        load_codes(tmp_path, encoder)
    assert encoder.images == 0
    DiskUsage.free += 1
    monkeypatch.setattr(code_cache.shutil, "disk_usage", lambda path: DiskUsage)
    assert table_matches(load_codes(tmp_path))


def test_any_os_error_is_one_line_and_keeps_finished_chunks(tmp_path, monkeypatch):
    n, image_counts, done = 0, [], False
    while not done:
        n, events = n + 1, []

        def act(n=n, events=events):
            events.append(True)
            if len(events) == n:
                raise OSError(errno.ENOSPC, "No space left on device")

        folder, encoder = tmp_path / str(n), Encoder()
        folder.mkdir()
        with monkeypatch.context() as patch:
            hook_file_operations(patch, act)
            try:
                load_codes(folder, file=two_chunk_file(folder))
                done = True
            except ValueError as error:
                assert "could not encode into" in str(error) and "No space left" in str(error)
                assert "\n" not in str(error)
            except OSError as error:  # before the lock is acquired
                assert n < 3 and "No space left" in str(error)
        assert table_matches(load_codes(folder, encoder, file=two_chunk_file(folder))), n
        assert suffixes(folder) == [".codes", ".lock", ".note"]
        image_counts.append(encoder.images)
    assert n > 25 and set(image_counts) == {11, 5, 0} and image_counts == sorted(image_counts, reverse=True)


@pytest.fixture
def small_disk(tmp_path):
    if shutil.which("mount") is None:
        pytest.skip("no mount command here")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_fills_up_meanwhile_ends_in_one_line(small_disk):
    def encode_and_fill_disk(images):
        (small_disk / "filler").write_bytes(b"0" * shutil.disk_usage(small_disk).free)
        return encode(images)

    with pytest.raises(
        ValueError, match="could not encode into .*codes: .*No space left on device; finished chunks are kept"
    ):
        load_codes(small_disk / "codes", encode_and_fill_disk)
    (small_disk / "filler").unlink()
    assert table_matches(load_codes(small_disk / "codes"))


# other weights and damage


def test_codes_of_other_weights_are_refused(tmp_path):
    load_codes(tmp_path)
    source, other = code_file(tmp_path), code_file(tmp_path, key="other")
    for suffix in ("codes", "note"):
        shutil.copy(source.sibling(suffix), other.sibling(suffix))
    with pytest.raises(ValueError, match=r"other weights or data \(key key, wanted other\): delete .*mine_.*\*"):
        load_codes(tmp_path, file=other)
    with pytest.raises(KeyboardInterrupt):
        load_codes(tmp_path / "part", Encoder(fails_at=3))
    shutil.copytree(code_file(tmp_path / "part").sibling("chunks"), code_file(tmp_path / "part", "x").sibling("chunks"))
    with pytest.raises(ValueError, match="other weights"):
        load_codes(tmp_path / "part", file=code_file(tmp_path / "part", "x"))


def test_codes_of_earlier_versions_are_listed_once_as_removable(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(code_file_module, "VERSION", 1)
        load_codes(tmp_path)
    old = code_file(tmp_path)
    capfd.readouterr()
    for listed in (True, False):  # the second time nothing is encoded
        load_codes(tmp_path, file=code_file(tmp_path, key="new"))
        output = capfd.readouterr().out
        assert (f"to free {old.path.stat().st_size / 1e9:.3g} GB, delete {old.path}" in output) == listed
    records = old.sibling("annotations")
    records.mkdir()
    (records / "00000000.records").write_bytes(b"1" * 10**7)
    load_codes(tmp_path, file=code_file(tmp_path, key="newest"))
    size = (old.path.stat().st_size + 10**7) / 1e9
    assert f"to free {size:.3g} GB, delete {old.path} {records}" in capfd.readouterr().out
    old.delete()
    load_codes(tmp_path, file=code_file(tmp_path, key="newer"))
    assert "delete" not in capfd.readouterr().out  # caches of this version are kept


def test_another_key_is_another_file(tmp_path):
    load_codes(tmp_path)
    encoder = Encoder()
    assert table_matches(load_codes(tmp_path, encoder, file=code_file(tmp_path, key="other")))
    assert encoder.images == COUNT
    assert table_matches(load_codes(tmp_path, lambda images: 1 / 0))


def flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "images", "message"),
    [
        ("cut", 2, "1 of 4 chunks"),
        ("longer", 2, "1 of 4 chunks"),
        ("gone", 11, "4 of 4 chunks"),
        ("empty", 11, "4 of 4 chunks"),
        ("a bit", 3, "1 of 4 chunks"),
        ("two bits", 6, "2 of 4 chunks"),
        ("note cut", 11, "note is damaged"),
        ("note's bit", 11, "note is damaged"),
        ("note empty", 11, "note is damaged"),
        ("note gone", 11, None),
    ],
)
def test_damage_is_reported_and_damaged_chunks_re_encoded(tmp_path, damage, images, message):
    load_codes(tmp_path)
    path, note = (code_file(tmp_path).sibling(suffix) for suffix in ("codes", "note"))
    if damage in ("a bit", "two bits"):
        flip_bit(path, 4 * 16)
        flip_bit(path, 5 * 16 if damage == "a bit" else 0)
    elif damage == "note's bit":
        flip_bit(note, note.read_bytes().rindex(b"unreadable") - 4)  # the last checksum
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b"1")
    elif damage.endswith("cut"):
        (path if damage == "cut" else note).write_bytes((path if damage == "cut" else note).read_bytes()[:-1])
    elif damage.endswith("empty"):
        (path if damage == "empty" else note).write_bytes(b"")
    else:
        (path if damage == "gone" else note).unlink()
    encoder = Encoder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert table_matches(load_codes(tmp_path, encoder))
    assert encoder.images == images and len({str(warning.message) for warning in caught}) == (message is not None)
    assert message is None or message in str(caught[0].message)
    assert path.stat().st_size == COUNT * 16
    assert table_matches(load_codes(tmp_path, lambda images: 1 / 0))


def test_an_interrupted_repair_is_resumed(tmp_path):
    load_codes(tmp_path)
    flip_bit(code_file(tmp_path).path, 0)
    flip_bit(code_file(tmp_path).path, 4 * 16)
    for fails_at, damaged in ((1, 2), (3, 2)):
        with pytest.warns(UserWarning, match=f"{damaged} of 4 chunks"), pytest.raises(KeyboardInterrupt):
            load_codes(tmp_path, Encoder(fails_at))
    encoder = Encoder()
    with pytest.warns(UserWarning, match="1 of 4 chunks"):
        assert table_matches(load_codes(tmp_path, encoder))
    assert encoder.images == CHUNK


def test_damage_in_an_unfinished_file_is_re_encoded(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        load_codes(tmp_path, Encoder(fails_at=6))  # two chunks are done
    flip_bit(code_file(tmp_path).path, 0)
    encoder = Encoder()
    with pytest.warns(UserWarning, match="damaged: 1 of 2 chunks are encoded again"):
        assert table_matches(load_codes(tmp_path, encoder))
    assert encoder.images == COUNT - CHUNK


# unreadable images


def test_unreadable_images_are_left_out_and_reported_once(tmp_path):
    broken, readable = (2, 3, 4, 5, 10), [0, 1, 6, 7, 8, 9]  # a full chunk, and images of other chunks
    with pytest.raises(KeyboardInterrupt):
        load_codes(tmp_path, Encoder(fails_at=4), broken=broken)
    with pytest.warns(UserWarning, match="skipped 5 unreadable images: image 2: .*; image 3: .*; image 10: ") as caught:
        assert table_matches(load_codes(tmp_path, broken=broken), readable)
    assert len(caught) == 1
    assert table_matches(load_codes(tmp_path, lambda images: 1 / 0, broken=broken), readable)
    labels = torch.arange(COUNT)[load_codes(tmp_path).index]
    batch = TrainingCodes(load_codes(tmp_path).ids, labels, seed=0)[list(range(12))]
    assert set(batch["label"].tolist()) == set(readable)
    for codes, label in zip(batch["codes"], batch["label"], strict=True):
        assert any(torch.equal(codes, ALL_CODES[view, label]) for view in (0, 1))


def test_a_data_set_without_readable_images_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="nothing was encoded for mine: none of its 11 .*first error: image 0: cut"):
        load_codes(tmp_path, broken=tuple(range(COUNT)))
    assert suffixes(tmp_path) == [".lock"]
    with pytest.raises(ValueError, match="nothing was encoded for mine: the data set is empty"):
        load_codes(tmp_path, file=dataclasses.replace(code_file(tmp_path), count=0))
