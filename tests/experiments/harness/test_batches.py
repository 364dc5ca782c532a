"""Batches kept on disk: what is made once is not made again, and is what it was."""

import os

import pytest
import torch
from torch import Tensor

from experiments.harness.batches import BATCHES_FOLDER, ResumableBatches
from train.distributed import DistContext

ALONE = DistContext(torch.device("cpu"))


class Maker:
    """Makes batches, keeps count of them, and fails at one."""

    def __init__(self, fails_at=None):
        self.asked, self.fails_at = [], fails_at

    def __call__(self, indices: list[int]) -> dict[str, Tensor]:
        if len(self.asked) == self.fails_at:
            raise RuntimeError("cut off")
        self.asked.append(indices)
        index = torch.tensor(indices)
        noise = torch.stack([torch.rand(3, 2, generator=torch.Generator().manual_seed(i)) for i in indices])
        halves = noise.transpose(1, 2)[:, ::2]  # a view with gaps
        return {"noise": noise, "image": (255 * noise).byte(), "halves": halves, "same": noise, "index": index}


def go(folder, make, *, name="noise", count=10, size=3, world=ALONE):
    return list(ResumableBatches(world, folder, size).resume(name, range(count), make))


def cut_off(folder, make, **how):
    with pytest.raises(RuntimeError, match="cut off"):
        go(folder, make, **how)


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for got, want in zip(found, wanted, strict=True):
        assert list(got) == list(want)  # in the same order: a progress bar counts the first
        assert all(torch.equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in want)


def test_batches_come_in_order_and_as_they_were_made(tmp_path):
    make = Maker()
    found = go(tmp_path, make)
    assert make.asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert_same(found, [Maker()(indices) for indices in make.asked])
    assert go(tmp_path, make, count=0) == []


@pytest.mark.parametrize("made_before", [0, 1, 2, 3])
def test_a_start_that_was_cut_off_is_gone_on_with(tmp_path, made_before):
    whole = go(tmp_path / "whole", Maker())
    cut_off(tmp_path / "cut", Maker(fails_at=made_before))
    again = Maker()
    assert_same(go(tmp_path / "cut", again), whole)
    assert again.asked == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]][made_before:]
    assert_same(go(tmp_path / "cut", Maker(fails_at=0)), whole)  # all is there by now


def test_a_batch_is_kept_before_it_is_handed_out(tmp_path):
    next(ResumableBatches(ALONE, tmp_path, 3).resume("noise", range(10), Maker()))
    again = Maker()
    go(tmp_path, again)
    assert len(again.asked) == 3


def test_other_names_sizes_and_folders_share_nothing(tmp_path):
    go(tmp_path, Maker())
    for other in ({"name": "other"}, {"size": 2}, {"folder": tmp_path / "x"}):
        make = Maker()
        go(**({"folder": tmp_path, "make": make} | other))
        assert sum(make.asked, []) == list(range(10))


def test_a_batch_that_is_half_written_is_not_there(tmp_path, monkeypatch):
    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr("experiments.harness.batches.save_file", half)
        with pytest.raises(OSError, match="could not write"):
            go(tmp_path, Maker())
    assert list((tmp_path / BATCHES_FOLDER).iterdir()) == []


def test_bytes_are_on_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("bytes"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("name"), replace(*paths)))
    go(tmp_path, Maker(), count=4)
    assert order == ["bytes", "name"] * 2


def test_a_damaged_batch_is_named(tmp_path):
    go(tmp_path, Maker())
    path = min((tmp_path / BATCHES_FOLDER).iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path.name} is damaged.*delete it"):
        go(tmp_path, Maker())
    path.unlink()
    again = Maker()
    assert_same(go(tmp_path, again), go(tmp_path / "whole", Maker()))  # what follows it is made again, too


def test_what_is_cleared_is_made_anew_and_nothing_else_goes(tmp_path):
    batches = ResumableBatches(ALONE, tmp_path, 3)
    batches.clear()  # nothing there
    go(tmp_path, Maker())
    (tmp_path / "results.json").touch()
    batches.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_file_is_named_by_kind_size_and_number(tmp_path):
    """Files of an earlier version of the code are read: their names stay."""
    make = Maker()
    list(ResumableBatches(ALONE, tmp_path, 3).resume("noise", range(10), make, size=6))
    assert make.asked == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    names = sorted(path.name for path in (tmp_path / ".kept").iterdir())
    assert names == ["noise_6_000000.safetensors", "noise_6_000001.safetensors"]


class OneOfTwo(DistContext):
    """One of two processes, where the other says `others`: numbers that are summed up, and batches."""

    def sum(self, x):
        return x + self.others["done"]

    def any(self, *flags):
        return [flag or bool(self.others["left"]) for flag in flags]


def one_of_two(rank, **others):
    world = OneOfTwo(torch.device("cpu"), rank, 2)
    world.__class__.others = others
    return world


def test_the_main_process_keeps_what_all_make(tmp_path, monkeypatch):
    """It makes each other batch from the first that is not there on; the others' come to it."""
    cut_off(tmp_path, Maker(fails_at=1))  # in one process
    theirs = [Maker()([6, 7, 8])]
    gather_objects = lambda world, made: [made, theirs.pop() if theirs else None]  # noqa: E731
    monkeypatch.setattr("experiments.harness.batches.gather_objects", gather_objects)
    make = Maker()
    found = go(tmp_path, make, world=one_of_two(0, done=0, left=[]))
    assert make.asked == [[3, 4, 5], [9]]
    assert_same(found, go(tmp_path / "whole", Maker()))
    assert_same(go(tmp_path, Maker(fails_at=0)), found)


def test_another_process_hears_from_the_main_one_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.harness.batches.gather_objects", lambda world, made: [])
    go(tmp_path, Maker())  # files that it sees, or not, do not count
    make = Maker()
    assert go(tmp_path, make, world=one_of_two(1, done=1, left=[])) == []
    assert make.asked == [[6, 7, 8]]
