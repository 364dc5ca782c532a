"""Resumable batches: each batch is computed once and read back unchanged."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from experiments.harness.batches import BATCHES_FOLDER, ResumableBatches
from train.distributed import DistContext

ALONE = DistContext(torch.device("cpu"))


class BatchMaker:
    """Computes batches, records their indices, and fails at one of them."""

    def __init__(self, fails_at=None):
        self.requested, self.fails_at = [], fails_at

    def __call__(self, indices: list[int]) -> dict[str, Tensor]:
        if len(self.requested) == self.fails_at:
            raise RuntimeError("cut off")
        self.requested.append(indices)
        index = torch.tensor(indices)
        noise = torch.stack([torch.rand(3, 2, generator=torch.Generator().manual_seed(i)) for i in indices])
        halves = noise.transpose(1, 2)[:, ::2]  # a view with gaps
        return {"noise": noise, "image": (255 * noise).byte(), "halves": halves, "same": noise, "index": index}


def run_batches(folder, make, *, name="noise", count=10, size=3, world=ALONE):
    return list(ResumableBatches(world, folder, size).resume(name, range(count), make))


def interrupt(folder, make, **kwargs):
    with pytest.raises(RuntimeError, match="cut off"):
        run_batches(folder, make, **kwargs)


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, reference in zip(batches, expected, strict=True):
        assert list(batch) == list(reference)  # in the same order: a progress bar counts the first
        assert all(
            torch.equal(batch[key], reference[key]) and batch[key].dtype == reference[key].dtype for key in reference
        )


def test_batches_come_in_order_and_unchanged(tmp_path):
    make = BatchMaker()
    batches = run_batches(tmp_path, make)
    assert make.requested == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert_same(batches, [BatchMaker()(indices) for indices in make.requested])
    assert run_batches(tmp_path, make, count=0) == []


@pytest.mark.parametrize("batches_before", [0, 1, 2, 3])
def test_an_interrupted_run_resumes(tmp_path, batches_before):
    uninterrupted = run_batches(tmp_path / "whole", BatchMaker())
    interrupt(tmp_path / "cut", BatchMaker(fails_at=batches_before))
    resumed = BatchMaker()
    assert_same(run_batches(tmp_path / "cut", resumed), uninterrupted)
    assert resumed.requested == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]][batches_before:]
    assert_same(run_batches(tmp_path / "cut", BatchMaker(fails_at=0)), uninterrupted)  # everything is saved by now


def test_a_batch_is_saved_before_it_is_yielded(tmp_path):
    next(ResumableBatches(ALONE, tmp_path, 3).resume("noise", range(10), BatchMaker()))
    resumed = BatchMaker()
    run_batches(tmp_path, resumed)
    assert len(resumed.requested) == 3


def test_other_names_and_folders_share_nothing(tmp_path):
    run_batches(tmp_path, BatchMaker())
    for other in ({"name": "other"}, {"folder": tmp_path / "x"}):
        make = BatchMaker()
        run_batches(**({"folder": tmp_path, "make": make} | other))
        assert sum(make.requested, []) == list(range(10))


def test_batches_of_other_sizes_are_used_by_index(tmp_path):
    """Sizes 3, then 4, then 2, each interrupted: every index is computed once."""
    whole = run_batches(tmp_path / "whole", BatchMaker(), count=14)
    interrupt(tmp_path / "cut", BatchMaker(fails_at=2), count=14)
    second = BatchMaker(fails_at=2)
    interrupt(tmp_path / "cut", second, count=14, size=4)
    assert second.requested == [[6, 7], [8, 9, 10, 11]]
    last = BatchMaker()
    batches = run_batches(tmp_path / "cut", last, count=14, size=2)
    assert last.requested == [[12, 13]] and [len(batch["index"]) for batch in batches] == [3, 3, 2, 4, 2]
    joined = [{key: torch.cat([batch[key] for batch in each]) for key in each[0]} for each in (batches, whole)]
    assert_same(joined[:1], joined[1:])


def test_batches_of_an_earlier_version_are_read(tmp_path):
    """They have no positions: a file's name gives them."""
    save_file({"index": torch.tensor([0, 1, 2])}, kept(tmp_path, "noise_3_000000"), {"names": "index"})
    save_file({"index": torch.tensor([3])}, kept(tmp_path, "noise_3_000001"), {"names": "index"})
    assert [batch["index"].tolist() for batch in run_batches(tmp_path, BatchMaker(fails_at=0), count=4)] == [
        [0, 1, 2],
        [3],
    ]


def kept(folder, name):
    (folder / BATCHES_FOLDER).mkdir(exist_ok=True)
    return folder / BATCHES_FOLDER / f"{name}.safetensors"


def test_a_partially_written_batch_leaves_no_file(tmp_path, monkeypatch):
    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise RuntimeError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr("experiments.harness.batches.save_file", half)
        with pytest.raises(OSError, match="could not write"):
            run_batches(tmp_path, BatchMaker())
    assert list((tmp_path / BATCHES_FOLDER).iterdir()) == []


def test_bytes_are_synced_before_the_file_is_renamed(tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("bytes"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("name"), replace(*paths)))
    run_batches(tmp_path, BatchMaker(), count=4)
    assert order == ["bytes", "name"] * 2


def test_a_damaged_batch_is_reported_by_path(tmp_path):
    run_batches(tmp_path, BatchMaker())
    path = min((tmp_path / BATCHES_FOLDER).iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path.name} is damaged.*delete it"):
        run_batches(tmp_path, BatchMaker())
    path.unlink()
    resumed = BatchMaker()
    assert_same(
        run_batches(tmp_path, resumed), run_batches(tmp_path / "whole", BatchMaker())
    )  # later batches are recomputed as well


def test_clear_deletes_only_the_batches(tmp_path):
    batches = ResumableBatches(ALONE, tmp_path, 3)
    batches.clear()  # no batches yet
    run_batches(tmp_path, BatchMaker())
    (tmp_path / "results.json").touch()
    batches.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_batch_files_are_named_by_kind_size_and_number(tmp_path):
    """The names must not change, so that files of earlier versions can be read."""
    make = BatchMaker()
    list(ResumableBatches(ALONE, tmp_path, 3).resume("noise", range(10), make, size=6))
    assert make.requested == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    names = sorted(path.name for path in (tmp_path / ".kept").iterdir())
    assert names == ["noise_6_000000.safetensors", "noise_6_000001.safetensors"]


class OneOfTwo(DistContext):
    """One of two ranks; `others` are the numbers and batches of the other."""

    def sum(self, x):
        return x + self.others["done"]

    def any(self, *flags):
        return [flag or bool(self.others["left"]) for flag in flags]


def one_of_two(rank, **others):
    world = OneOfTwo(torch.device("cpu"), rank, 2)
    world.__class__.others = others
    return world


def test_the_main_rank_saves_the_batches_of_all_ranks(tmp_path, monkeypatch):
    """It computes every second batch from the first missing one and receives the others."""
    interrupt(tmp_path, BatchMaker(fails_at=1))  # in one process
    other_batches = [BatchMaker()([6, 7, 8])]
    gather_objects = lambda world, batch: [batch, other_batches.pop() if other_batches else None]  # noqa: E731
    monkeypatch.setattr("experiments.harness.batches.gather_objects", gather_objects)
    make = BatchMaker()
    batches = run_batches(tmp_path, make, world=one_of_two(0, done=0, left=[]))
    assert make.requested == [[3, 4, 5], [9]]
    assert_same(batches, run_batches(tmp_path / "whole", BatchMaker()))
    assert_same(run_batches(tmp_path, BatchMaker(fails_at=0)), batches)


def test_other_ranks_learn_from_the_main_rank_what_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.harness.batches.gather_objects", lambda world, batch: [])
    run_batches(tmp_path, BatchMaker())  # files that this rank sees do not count
    make = BatchMaker()
    assert run_batches(tmp_path, make, world=one_of_two(1, done=3, left=[])) == []
    assert make.requested == [[6, 7, 8]]
