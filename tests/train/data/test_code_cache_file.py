"""A code cache survives what happens to processes and disks: killed, full, damaged, of other weights, unreadable."""

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

from helpers.toy_encoding import CHUNK, COUNT, EVERYTHING, Encoder, captions, code_file, codes_in, encode, files, same
from train.data import code_cache
from train.data.loading import TrainingCodes

# interrupted


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4, 5, 7])
def test_what_was_encoded_is_not_encoded_again(tmp_path, fails_at):
    first, second = Encoder(fails_at), Encoder()
    with pytest.raises(KeyboardInterrupt):
        codes_in(tmp_path, first)
    whole_chunks = (fails_at - 1) // 2  # of two batches each
    assert same(codes_in(tmp_path, second))
    assert second.images == COUNT - CHUNK * whole_chunks
    assert files(tmp_path) == [".codes", ".lock", ".note"]


EVENTS = [(os, "fsync"), (Path, "open"), (Path, "replace"), (Path, "mkdir"), (shutil, "rmtree"), (Path, "unlink")]


def before_each_event(patch, act):
    """Has `act` called before everything that changes the disk."""
    for owner, name in EVENTS:
        real = getattr(owner, name)

        def wrapped(*args, name=name, real=real, **kwargs):
            if name != "open" or (args[1] if len(args) > 1 else kwargs["mode"]) != "rb":
                act()
            return real(*args, **kwargs)

        patch.setattr(owner, name, wrapped)


def halves(folder):
    """A file of two chunks."""
    return code_file(folder, chunk=6)


def killed_at(n, folder, annotated):
    """A process that kills itself before its n-th event."""
    seen = []

    def act():
        seen.append(True)
        if len(seen) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    before_each_event(pytest.MonkeyPatch(), act)
    codes_in(folder, file=halves(folder), annotated=annotated)


@pytest.mark.parametrize("annotated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_same_command_goes_on(tmp_path, annotated):
    context, n, code, again = multiprocessing.get_context("fork"), 0, None, []
    while code != 0:
        n += 1
        process = context.Process(target=killed_at, args=(n, tmp_path / str(n), annotated))
        process.start()
        process.join(20)
        code, encoder = process.exitcode, Encoder()
        assert code in (0, -signal.SIGKILL)
        table = codes_in(tmp_path / str(n), encoder, file=halves(tmp_path / str(n)), annotated=annotated)
        assert same(table) and (not annotated or captions(table) == [f"image {i}, été" for i in range(COUNT)])
        assert files(tmp_path / str(n)) == [*[".annotations"] * annotated, ".codes", ".lock", ".note"], n
        assert not list((tmp_path / str(n)).glob(".*"))
        again.append(encoder.images)
    assert n > 25 and set(again) == {11, 5, 0} and again == sorted(again, reverse=True)


def test_a_chunk_is_on_disk_before_it_is_noted(tmp_path, monkeypatch):
    events, fsync, write_text = [], os.fsync, code_cache.write_text

    def synced(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def noted(path, text):
        write_text(path, text)
        events.append(path.name)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here to tell which file is flushed")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(code_cache, "write_text", noted)
    codes_in(tmp_path)
    for chunk in range(4):
        noted = events.index(f"{chunk:08d}.note")
        assert events[noted - 1].startswith(f".{chunk:08d}.note.")  # the note, aside
        assert events[noted - 2] == code_file(tmp_path).path.name


# full disks


def test_a_disk_without_room_is_an_error_before_anything_is_encoded(tmp_path, monkeypatch):
    class Full:
        free = COUNT * 8 * 2 - 1

    encoder = Encoder()
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="codes of mine need 0.000 GB .*make room"):
        patch.setattr(code_cache.shutil, "disk_usage", lambda path: Full)
        codes_in(tmp_path, encoder)
    assert encoder.images == 0
    Full.free += 1
    monkeypatch.setattr(code_cache.shutil, "disk_usage", lambda path: Full)
    assert same(codes_in(tmp_path))


def test_whatever_the_system_refuses_is_one_line_and_what_is_done_stays(tmp_path, monkeypatch):
    n, again, done = 0, [], False
    while not done:
        n, seen = n + 1, []

        def act(n=n, seen=seen):
            seen.append(True)
            if len(seen) == n:
                raise OSError(errno.ENOSPC, "No space left on device")

        folder, encoder = tmp_path / str(n), Encoder()
        folder.mkdir()
        with monkeypatch.context() as patch:
            before_each_event(patch, act)
            try:
                codes_in(folder, file=halves(folder))
                done = True
            except ValueError as error:
                assert (
                    "could not encode into" in str(error) and "No space left" in str(error) and "\n" not in str(error)
                )
            except OSError as error:  # before the lock was had
                assert n < 3 and "No space left" in str(error)
        assert same(codes_in(folder, encoder, file=halves(folder))), n
        assert files(folder) == [".codes", ".lock", ".note"]
        again.append(encoder.images)
    assert n > 25 and set(again) == {11, 5, 0} and again == sorted(again, reverse=True)


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


def test_a_disk_that_others_fill_meanwhile_ends_it_in_one_line(small_disk):
    def greedy(images):
        (small_disk / "filler").write_bytes(b"0" * shutil.disk_usage(small_disk).free)
        return encode(images)

    with pytest.raises(
        ValueError, match="could not encode into .*codes: .*No space left on device; what is done stays"
    ):
        codes_in(small_disk / "codes", greedy)
    (small_disk / "filler").unlink()
    assert same(codes_in(small_disk / "codes"))


# other weights, damage


def test_codes_of_other_weights_are_refused(tmp_path):
    codes_in(tmp_path)
    mine, other = code_file(tmp_path), code_file(tmp_path, key="other")
    for suffix in ("codes", "note"):
        shutil.copy(mine.beside(suffix), other.beside(suffix))
    with pytest.raises(ValueError, match=r"other weights or data \(key key, wanted other\): delete .*mine_.*\*"):
        codes_in(tmp_path, file=other)
    with pytest.raises(KeyboardInterrupt):
        codes_in(tmp_path / "part", Encoder(fails_at=3))
    shutil.copytree(code_file(tmp_path / "part").beside("chunks"), code_file(tmp_path / "part", "x").beside("chunks"))
    with pytest.raises(ValueError, match="other weights"):
        codes_in(tmp_path / "part", file=code_file(tmp_path / "part", "x"))


def test_codes_of_an_earlier_version_are_named_once_with_their_size(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(code_cache, "VERSION", 1)
        codes_in(tmp_path)
    old = code_file(tmp_path)
    capfd.readouterr()
    for wanted in (True, False):  # the second time nothing is encoded
        codes_in(tmp_path, file=code_file(tmp_path, key="new"))
        said = capfd.readouterr().out
        assert (f"to free {old.path.stat().st_size / 1e9:.3g} GB, delete {old.path}" in said) == wanted
    records = old.beside("annotations")
    records.mkdir()
    (records / "00000000.records").write_bytes(b"1" * 10**7)
    codes_in(tmp_path, file=code_file(tmp_path, key="newest"))
    size = (old.path.stat().st_size + 10**7) / 1e9
    assert f"to free {size:.3g} GB, delete {old.path} {records}" in capfd.readouterr().out
    old.delete()
    codes_in(tmp_path, file=code_file(tmp_path, key="newer"))
    assert "delete" not in capfd.readouterr().out  # what this version made stays


def test_another_key_is_another_file(tmp_path):
    codes_in(tmp_path)
    encoder = Encoder()
    assert same(codes_in(tmp_path, encoder, file=code_file(tmp_path, key="other"))) and encoder.images == COUNT
    assert same(codes_in(tmp_path, lambda images: 1 / 0))


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "images", "said"),
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
def test_damage_is_named_and_what_it_hit_encoded_again(tmp_path, damage, images, said):
    codes_in(tmp_path)
    path, note = (code_file(tmp_path).beside(suffix) for suffix in ("codes", "note"))
    if damage in ("a bit", "two bits"):
        flipped(path, 4 * 16)
        flipped(path, 5 * 16 if damage == "a bit" else 0)
    elif damage == "note's bit":
        flipped(note, note.read_bytes().rindex(b"unreadable") - 4)  # the last checksum
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
        assert same(codes_in(tmp_path, encoder))
    assert encoder.images == images and len({str(each.message) for each in caught}) == (said is not None)
    assert said is None or said in str(caught[0].message)
    assert path.stat().st_size == COUNT * 16
    assert same(codes_in(tmp_path, lambda images: 1 / 0))


def test_a_repair_that_is_interrupted_is_gone_on_with(tmp_path):
    codes_in(tmp_path)
    flipped(code_file(tmp_path).path, 0)
    flipped(code_file(tmp_path).path, 4 * 16)
    for fails_at, again in ((1, 2), (3, 2)):
        with pytest.warns(UserWarning, match=f"{again} of 4 chunks"), pytest.raises(KeyboardInterrupt):
            codes_in(tmp_path, Encoder(fails_at))
    encoder = Encoder()
    with pytest.warns(UserWarning, match="1 of 4 chunks"):
        assert same(codes_in(tmp_path, encoder))
    assert encoder.images == CHUNK


def test_what_a_half_made_file_lost_is_encoded_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        codes_in(tmp_path, Encoder(fails_at=6))  # two chunks are done
    flipped(code_file(tmp_path).path, 0)
    encoder = Encoder()
    with pytest.warns(UserWarning, match="damaged: 1 of 2 chunks are encoded again"):
        assert same(codes_in(tmp_path, encoder))
    assert encoder.images == COUNT - CHUNK


# unreadable images


def test_unreadable_images_are_left_out_and_named_once(tmp_path):
    broken, left = (2, 3, 4, 5, 10), [0, 1, 6, 7, 8, 9]  # the whole of a chunk, and its neighbour
    with pytest.raises(KeyboardInterrupt):
        codes_in(tmp_path, Encoder(fails_at=4), broken=broken)
    with pytest.warns(UserWarning, match="skipped 5 unreadable images: image 2: .*; image 3: .*; image 10: ") as caught:
        assert same(codes_in(tmp_path, broken=broken), left)
    assert len(caught) == 1
    assert same(codes_in(tmp_path, lambda images: 1 / 0, broken=broken), left)
    labels = torch.arange(COUNT)[codes_in(tmp_path).index]
    batch = TrainingCodes(codes_in(tmp_path).ids, labels, seed=0)[list(range(12))]
    assert set(batch["label"].tolist()) == set(left)
    for codes, label in zip(batch["codes"], batch["label"], strict=True):
        assert any(torch.equal(codes, EVERYTHING[view, label]) for view in (0, 1))


def test_a_data_set_of_nothing_is_refused_and_not_kept(tmp_path):
    with pytest.raises(ValueError, match="nothing was encoded for mine: not one of 11 .*the first is image 0: cut"):
        codes_in(tmp_path, broken=tuple(range(COUNT)))
    assert files(tmp_path) == [".lock"]
    with pytest.raises(ValueError, match="nothing was encoded for mine: the data set is empty"):
        codes_in(tmp_path, file=dataclasses.replace(code_file(tmp_path), count=0))
