"""The code cache: its content, several ranks and jobs, and the key of a VQGAN's codes."""

import dataclasses
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.toy_encoding import (
    ALL_CODES,
    COUNT,
    Encoder,
    code_file,
    encode,
    load_codes,
    run_two_ranks,
    suffixes,
    table_matches,
)
from train import first_stage
from train.config import DataConfig
from train.data import code_cache
from train.data.codes import TrainingCodes
from train.data.loading import ImageSource
from train.data.transforms import View, training_views
from train.datasets import ArrayDataset, DatasetConfig
from train.distributed import DistContext
from train.first_stage import VQGANStage
from vq.autoencoder import VQGAN
from vq.config import VQGANConfig

CPU = torch.device("cpu")

# content


@pytest.mark.parametrize(("batch_size", "chunk", "workers"), [(1, 3, 0), (2, 3, 2), (5, 4, 0), (100, 3, 0), (2, 50, 0)])
def test_codes_do_not_depend_on_batch_or_chunk_size(tmp_path, batch_size, chunk, workers):
    encoder = Encoder()
    file = code_file(tmp_path, chunk=chunk)
    assert table_matches(load_codes(tmp_path, encoder, batch_size=batch_size, workers=workers, file=file))
    assert encoder.images == COUNT and max(encoder.sizes) == min(batch_size, chunk, COUNT)
    assert suffixes(tmp_path) == [".codes", ".lock", ".note"]


def test_codes_are_encoded_once(tmp_path):
    load_codes(tmp_path)
    assert table_matches(load_codes(tmp_path, lambda images: 1 / 0))
    table = code_cache.load_or_encode(
        code_file(tmp_path), lambda: 1 / 0, encode, 1, DistContext(CPU)
    )  # opens no images
    assert table_matches(table)


def test_codes_of_a_read_only_run_are_kept_elsewhere(tmp_path, monkeypatch, capsys):
    run, spare = tmp_path / "run", tmp_path / "spare"
    run.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_relative_to(run))
    file = dataclasses.replace(code_file(run / "codes"), fallback=spare)
    assert table_matches(load_codes(run, file=file))
    assert list(run.iterdir()) == [] and suffixes(spare) == [".codes", ".lock", ".note"]
    assert capsys.readouterr().out == f"{run / 'codes'} is read-only: the codes are kept in {spare}\n"
    assert table_matches(load_codes(run, lambda images: 1 / 0, file=file))
    load_codes(run, file=code_file(run / "codes"))  # whole codes of the run itself are read
    spare.rename(tmp_path / "gone")
    assert table_matches(load_codes(run, lambda images: 1 / 0, file=file)) and not spare.exists()


def test_mapped_ids_index_like_a_tensor(tmp_path):
    with pytest.warns(UserWarning, match="skipped"):
        ids = load_codes(tmp_path, broken=(0, 4)).ids
    expected = ALL_CODES[:, [1, 2, 3, 5, 6, 7, 8, 9, 10]]
    views, rows = torch.tensor([0, 1, 1, 0]), torch.tensor([8, 0, 3, 4])
    assert tuple(ids.shape) == expected.shape and len(ids) == 2
    for key in [
        (views, rows),
        (0, rows),
        (slice(None), rows),
        (1, 3),
        (slice(1, 2), slice(2, 7, 2)),
        1,
        views,
        (1, -1),
    ]:
        assert torch.equal(ids[key], expected[key]) and ids[key].dtype == torch.int64, key
    ids[0].zero_()  # a copy in memory
    assert torch.equal(ids[:], expected)


@pytest.mark.parametrize(("codebook_size", "size"), [(2**16, 2), (2**16 + 1, 4)])
def test_a_code_takes_two_bytes_if_they_suffice(tmp_path, codebook_size, size):
    file = code_file(tmp_path, codebook_size=codebook_size)
    table = load_codes(tmp_path, lambda images: encode(images) - encode(images) + codebook_size - 1, file=file)
    assert (table.ids[:] == codebook_size - 1).all()
    assert file.path.stat().st_size == COUNT * 8 * size


def test_ids_are_memory_mapped_and_not_pickled(tmp_path):
    table = load_codes(tmp_path)
    size = len(pickle.dumps(table))
    assert table_matches(table) and isinstance(table.ids.memmap, np.memmap) and table.ids.memmap.mode == "r"
    assert len(pickle.dumps(table)) == size
    assert table_matches(pickle.loads(pickle.dumps(table)))


def test_mapped_and_in_memory_codes_give_equal_batches(tmp_path):
    mapped = TrainingCodes(load_codes(tmp_path).ids, torch.arange(COUNT), seed=3)
    in_memory = TrainingCodes(ALL_CODES.int(), torch.arange(COUNT), seed=3)
    assert len(mapped) == len(in_memory) == 2 * COUNT
    for positions in ([0, 5, 21], list(range(22)), list(range(20, 50))):
        batch, expected = pickle.loads(pickle.dumps(mapped))[positions], in_memory[positions]
        assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    indices = [in_memory.order[k] for k in (4, 1)]
    assert torch.equal(in_memory[[4, 1]]["codes"], ALL_CODES.flatten(0, 1)[indices])


def put_codes(queue, source):
    queue.put(source[[1, 2, 3]]["codes"].tolist())


def test_a_forked_process_reads_its_parents_memmap(tmp_path):
    source = TrainingCodes(load_codes(tmp_path).ids, None, seed=3)
    expected, context = source[[1, 2, 3]]["codes"].tolist(), multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=put_codes, args=(queue, source))
    process.start()
    assert queue.get(timeout=20) == expected
    process.join()


# several ranks and jobs


def test_two_ranks_share_the_work_and_write_the_same_file(tmp_path):
    results = run_two_ranks(tmp_path)
    assert [result["images"] for result in results] == [6, 5]  # chunks 0 and 2, 1 and 3
    assert all(result["ids"] == ALL_CODES.tolist() for result in results)
    load_codes(tmp_path / "alone")
    by_two, by_one = (code_file(folder).path.read_bytes() for folder in (tmp_path, tmp_path / "alone"))
    assert by_two == by_one and table_matches(load_codes(tmp_path, lambda images: 1 / 0))
    assert [result["images"] for result in run_two_ranks(tmp_path)] == [0, 0]


def test_one_and_two_ranks_resume_each_others_encoding(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        load_codes(tmp_path / "one", Encoder(fails_at=3))
    results = run_two_ranks(tmp_path / "one")
    assert [result["images"] for result in results] == [5, 3]  # chunks 1 and 3, 2
    assert [result["progress"] for result in results] == [[11], []]  # the second rank has no progress bar
    assert all(result["ids"] == ALL_CODES.tolist() for result in results)

    failed, encoder = run_two_ranks(tmp_path / "two", fails_at=(3, None)), Encoder()
    assert "[Errno 28] No space left" in failed[0]["error"] and "see the other processes" in failed[1]["error"]
    assert table_matches(load_codes(tmp_path / "two", encoder))
    assert encoder.images == 3  # the chunk of the rank that failed


def test_two_ranks_report_unreadable_images_once(tmp_path):
    results = run_two_ranks(tmp_path / "some", broken=(0, 4, 10))
    readable = [i for i in range(COUNT) if i not in (0, 4, 10)]
    assert all(result["index"] == readable and result["ids"] == ALL_CODES[:, readable].tolist() for result in results)
    assert [result["warnings"] for result in results] == [1, 0]
    failed = run_two_ranks(tmp_path / "none", broken=tuple(range(COUNT)))
    assert all("none of its 11 images can be read; first error: image 0" in result["error"] for result in failed)
    assert suffixes(tmp_path / "none") == [".lock"]


def encode_together(barrier, folder, log, queue):
    def encode_and_log(images):
        with log.open("a") as file:
            file.write("x\n" * len(images))
        return encode(images)

    barrier.wait()
    queue.put(load_codes(folder, encode_and_log).ids[:].tolist())


def test_jobs_that_start_together_encode_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue, log = context.Barrier(3), context.Queue(), tmp_path / "log"
    arguments = (barrier, tmp_path / "codes", log, queue)
    processes = [context.Process(target=encode_together, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert results == [ALL_CODES.tolist()] * 3 and log.read_text().count("x") == COUNT


def test_a_waiting_job_says_so(tmp_path, capsys):
    lock, tries = code_cache.FileLock(code_file(tmp_path).sibling("lock")), []
    acquire = code_cache.FileLock.acquire

    def release_at_third_try(self, timeout):
        tries.append(timeout)
        if len(tries) == 3:
            lock.release()
        return acquire(self, timeout=0.01)

    lock.acquire()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_cache.FileLock, "acquire", release_at_third_try)
        assert table_matches(load_codes(tmp_path))
    assert len(tries) == 3 and capsys.readouterr().out.count("another job is encoding into") == 1
    lock.acquire(timeout=0)  # it was released
    lock.release()


# the key of a VQGAN's codes

NETWORK = VQGANConfig(nf=4, ch_mult=(1, 2), res_blocks=1, attn_resolutions=(), codebook_size=16, emb_dim=4)
IMAGES = ArrayDataset(np.random.default_rng(1).integers(0, 256, (7, 8, 8), np.uint8), np.arange(7), 7)
DATA = DataConfig(dataset="mine", img_size=8, n_channels=1)


CHANGES = [
    {"horizontal_flip": True},
    {"shift": 1},
    {"shift": 2},
    {"crop_margin": 2},
    {"crop_margin": 4},
    {"img_size": 16},
    {"img_size": 12, "crop_margin": 4},
    {"img_width": 16},
    {"n_channels": 3},
]


def make_first_stage(folder, **changes):
    torch.manual_seed(0)
    fields = {"weights": "abc", "amp": False} | changes
    vqgan = VQGAN(NETWORK, DATA.size, 1).eval()
    torch.nn.init.normal_(vqgan.quantizer.codebook.weight)
    return VQGANStage(folder, vqgan, DATA, DatasetConfig(), 0, device=CPU, **fields)


@pytest.mark.parametrize(
    "changes", [{}, {"horizontal_flip": True, "shift": 1}, {"horizontal_flip": True, "crop_margin": 4}]
)
def test_only_the_training_split_is_encoded_in_all_views(tmp_path, changes):
    stage, data = make_first_stage(tmp_path), dataclasses.replace(DATA, **changes)
    table = stage.encode_dataset(IMAGES, "train", data, 3, DistContext(CPU))
    source = ImageSource(IMAGES, data, margin=data.crop_margin)
    images = torch.stack([source[i]["image"] for i in range(7)])
    expected = torch.stack([stage.encode(view(images)) for view in training_views(data)])
    assert torch.equal(table.ids[:], expected) and len(expected) in (1, 18, 10) and len(expected.unique()) > 4
    for batch_size in (1, 100):
        reencoded = make_first_stage(tmp_path / str(batch_size)).encode_dataset(
            IMAGES, "train", data, batch_size, DistContext(CPU)
        )
        assert torch.equal(reencoded.ids[:], expected)
    plain = torch.stack([ImageSource(IMAGES, DATA)[i]["image"] for i in range(7)])
    assert torch.equal(stage.encode_dataset(IMAGES, "val", data, 3, DistContext(CPU)).ids[:], stage.encode(plain)[None])


def test_the_key_depends_on_everything_that_changes_codes(tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr(first_stage, "load_or_encode", lambda file, *args: keys.append((file.key, file.path)))
    monkeypatch.setattr(first_stage, "has_native_bf16", lambda device: True)
    stage, world = make_first_stage(tmp_path), DistContext(CPU)
    pixels = IMAGES.images.copy()
    pixels[3, 0, 0] ^= 1
    stage.encode_dataset(IMAGES, "train", DATA, 3, world)
    stage.encode_dataset(dataclasses.replace(IMAGES, images=pixels), "train", DATA, 3, world)
    for changes in CHANGES:
        stage.encode_dataset(IMAGES, "train", dataclasses.replace(DATA, **changes), 3, world)
    make_first_stage(tmp_path, weights="abd").encode_dataset(IMAGES, "train", DATA, 3, world)
    make_first_stage(tmp_path, amp=True).encode_dataset(IMAGES, "train", DATA, 3, world)
    make_first_stage(tmp_path, channels_last=True).encode_dataset(IMAGES, "train", DATA, 3, world)
    other = make_first_stage(tmp_path)
    other.vqgan.config = dataclasses.replace(NETWORK, unit_range=True)
    other.encode_dataset(IMAGES, "train", DATA, 3, world)
    for view in (View(flip=True), View(dx=1), View(dy=1), View(crop=(0, 0, 8, 8))):  # the same number of views
        monkeypatch.setattr(first_stage, "training_views", lambda data, sides, view=view: [view])
        stage.encode_dataset(IMAGES, "train", DATA, 3, world)
    monkeypatch.setattr(first_stage, "training_views", training_views)
    monkeypatch.setattr(first_stage, "CHUNK_SIZE", 513)
    stage.encode_dataset(IMAGES, "train", DATA, 3, world)
    assert len({key for key, _ in keys}) == len({path for _, path in keys}) == len(keys) == 20


def test_the_key_ignores_what_does_not_change_codes(tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr(first_stage, "load_or_encode", lambda file, *args: keys.append(file.path))
    stage = make_first_stage(tmp_path)
    stage.encode_dataset(IMAGES, "train", DATA, 3, DistContext(CPU))
    stage.encode_dataset(IMAGES, "train", dataclasses.replace(DATA, num_workers=3, in_memory=True), 5, DistContext(CPU))
    make_first_stage(tmp_path, amp=True).encode_dataset(
        IMAGES, "train", DATA, 3, DistContext(CPU)
    )  # no effect on a CPU without bfloat16
    assert len(set(keys)) == 1 or first_stage.has_native_bf16(CPU)
    stage.encode_dataset(IMAGES, "val", DATA, 3, DistContext(CPU))
    assert len(set(keys[:2])) == 1 and keys[-1] != keys[0]  # the split is in the name, and fingerprints differ
