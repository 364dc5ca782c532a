"""The code cache: one table per key, there whole or not at all."""

import pytest
import torch

import vq.codes
from vq.codes import CodeTable, cache_key, cached_table, load_table, save_table

MADE_OF = {"weights": "abc", "data": "digits", "img_size": 32, "flips": False, "shifts": [0, 1]}
TABLE = CodeTable(torch.arange(24, dtype=torch.int32).view(2, 3, 2, 2), torch.tensor([0, 2, 5]))


def same(table, other):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(table, other, strict=True))


def test_any_change_is_another_key():
    changes = [{"weights": "abd"}, {"data": "mnist"}, {"img_size": 64}, {"flips": True}, {"shifts": [1, 0]}, {"new": 1}]
    keys = [cache_key(**MADE_OF), *(cache_key(**(MADE_OF | change)) for change in changes)]
    assert len(set(keys)) == len(keys)
    assert cache_key(**dict(reversed(MADE_OF.items()))) == keys[0]  # the order of the words is no change


def test_a_table_comes_back_as_it_was(tmp_path):
    path = tmp_path / "new" / "folder" / "codes.safetensors"
    assert load_table(path, "key") is None
    save_table(path, TABLE, "key")
    assert same(load_table(path, "key"), TABLE)


def test_a_table_that_is_a_view_is_kept_whole(tmp_path):
    view = CodeTable(TABLE.ids.transpose(0, 1), TABLE.index)
    save_table(tmp_path / "codes", view, "key")
    assert same(load_table(tmp_path / "codes", "key"), view)


def test_a_table_made_of_something_else_is_refused(tmp_path):
    save_table(tmp_path / "codes", TABLE, "key")
    with pytest.raises(ValueError, match=r"codes was made by other .*key, wanted other.*delete it"):
        load_table(tmp_path / "codes", "other")


def test_a_table_is_made_once(tmp_path):
    made = []

    def make():
        made.append(True)
        return TABLE

    for key, total in [("a" * 64, 1), ("a" * 64, 1), ("b" * 64, 2), ("a" * 64, 2)]:
        assert same(cached_table(tmp_path, "train", key, make), TABLE) and len(made) == total


def test_train_and_val_do_not_meet(tmp_path):
    val = CodeTable(TABLE.ids[:, :1], TABLE.index[:1])
    assert same(cached_table(tmp_path, "train", "key", lambda: TABLE), TABLE)
    assert same(cached_table(tmp_path, "val", "key", lambda: val), val)


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half a table")
        raise OSError("no space left")

    monkeypatch.setattr(vq.codes, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        cached_table(tmp_path, "train", "key", lambda: TABLE)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert same(cached_table(tmp_path, "train", "key", lambda: TABLE), TABLE)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_save_leaves_the_old_table(tmp_path, monkeypatch):
    save_table(tmp_path / "codes", TABLE, "key")
    monkeypatch.setattr(vq.codes, "save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_table(tmp_path / "codes", CodeTable(TABLE.ids + 1, TABLE.index), "key")
    assert same(load_table(tmp_path / "codes", "key"), TABLE)


def test_an_empty_data_set_is_refused_and_not_kept(tmp_path):
    with pytest.raises(ValueError, match="nothing was encoded for train"):
        cached_table(tmp_path, "train", "key", lambda: CodeTable(torch.empty(1, 0, 2, 2), torch.empty(0)))
    assert list(tmp_path.iterdir()) == []
