"""Shards at URLs: downloaded on demand, a bounded number cached, and refused if they changed since indexing."""

import fcntl
import functools
import http.server
import multiprocessing
import os
import resource
import shutil
import threading
import time

import pytest

from train.config import DataConfig
from train.data.loading import ImageSource, TrainingImages, images_in_order
from train.datasets import SPLITS
from train.datasets.webdataset import Config, build, tar
from train.datasets.webdataset import store as stores
from train.datasets.webdataset.store import ShardStore, read_chunk, short_hash

pytest.importorskip("webdataset", reason="needs the optional package webdataset")

LIMIT = 2


@pytest.fixture
def remote(tmp_path, tiny):
    """A folder of five shards of three samples, read only through pipes."""
    for shard in range(5):
        members = {f"{number:02d}.png": tiny.png(number) for number in range(3 * shard, 3 * shard + 3)}
        tiny.save_shard(tmp_path / "remote" / f"{shard}.tar", members)
    return tmp_path / "remote"


def config_of(remote, shards="{0..4}", **flags) -> Config:
    """A config whose downloads append the number of their shard to a file."""
    url = f"pipe:sh -c 'echo $0 >> {remote}/downloaded && cat {remote}/$0.tar' {shards}"
    return Config(data_dir=url, mix_shards=1, shards_on_disk=LIMIT, **flags)


def downloaded_shards(remote) -> list[int]:
    return [int(line) for line in (remote / "downloaded").read_text().split()]


def numbers(dataset) -> list[int]:
    return [dataset[i]["image"].getpixel((0, 0))[0] for i in range(len(dataset))]


def on_disk(folder) -> int:
    return len([path for path in (folder / "shards").iterdir() if path.suffix in (".tar", ".part")])


def test_all_samples_are_read_within_the_disk_limit(remote, shard_cache, monkeypatch):
    counts, real = [], ShardStore.reserve

    def reserve(store, aside):
        real(store, aside)
        counts.append(on_disk(shard_cache))

    monkeypatch.setattr(ShardStore, "reserve", reserve)
    splits = [build(config_of(remote, val_fraction=0.2), split) for split in SPLITS]
    assert sorted(numbers(splits[0]) + numbers(splits[1])) == list(range(15))
    assert splits[1].blocks.sizes == (3,)
    assert len(counts) >= 5 and max(counts) <= LIMIT and on_disk(shard_cache) <= LIMIT


def test_a_shard_is_downloaded_once_per_pass_and_indexed_once(remote):
    dataset = build(config_of(remote, val_fraction=0.2), "train")
    assert sorted(set(downloaded_shards(remote))) == [0, 1, 2, 3, 4]
    (remote / "downloaded").write_text("")
    source = TrainingImages(ImageSource(dataset, DataConfig(img_size=4)), seed=0)
    for position in range(len(dataset)):
        source[[position]]
    assert len(downloaded_shards(remote)) <= 4  # block by block, so no download is repeated
    (remote / "downloaded").write_text("")
    build(config_of(remote, val_fraction=0.2), "train")
    assert len(downloaded_shards(remote)) <= 1  # only the shard whose first image is decoded


def test_the_least_recently_used_shard_is_evicted(remote, shard_cache):
    dataset = build(config_of(remote), "train")
    (remote / "downloaded").write_text("")
    index_of_shard = {int(row["key"]) // 3: i for i, row in enumerate(dataset.rows)}
    shutil.rmtree(shard_cache / "shards")
    for shard in (0, 1, 0, 2, 0, 1):
        dataset[index_of_shard[shard]]
    assert downloaded_shards(remote) == [0, 1, 2, 1]


def test_processes_share_cached_shards(remote, shard_cache):
    dataset = build(config_of(remote), "train")
    source = ImageSource(dataset, DataConfig(img_size=4, num_workers=2))
    indices = [i for batch in images_in_order(source, 2) for i in batch["index"].tolist()]
    assert indices == list(range(len(dataset)))
    assert on_disk(shard_cache) <= LIMIT


def test_a_shard_downloaded_by_another_process_is_reused(remote, shard_cache, monkeypatch):
    dataset = build(config_of(remote), "train")
    dataset[0]
    (remote / "downloaded").write_text("")
    attempts, real = [], ShardStore.open_cached

    def miss_first_attempt(store, stamp):
        attempts.append(stamp)
        return real(store, stamp) if len(attempts) > 1 else None

    monkeypatch.setattr(ShardStore, "open_cached", miss_first_attempt)
    dataset[0]
    assert len(attempts) == 2 and not downloaded_shards(remote)


def build_together(barrier, config, queue):
    barrier.wait()
    queue.put(numbers(build(config, "train")))


def test_processes_that_start_together_index_each_shard_once(remote, shard_cache, tmp_path, monkeypatch):
    scan = tar.scan

    def log_scan(file, name, wanted):
        with (tmp_path / "scanned").open("a") as log:
            log.write(f"{name[-1]}\n")
        return scan(file, name, wanted)

    monkeypatch.setattr(tar, "scan", log_scan)
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    config = config_of(remote, "{0..2}", val_fraction=0.34)
    processes = [context.Process(target=build_together, args=(barrier, config, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=20) for _ in processes]
    for process in processes:
        process.join()
    assert results[0] == results[1] == results[2] and len(results[0]) == 6
    assert sorted((tmp_path / "scanned").read_text().split()) == ["0", "1", "2"]
    assert on_disk(shard_cache) <= LIMIT and not list((shard_cache / "shards").glob("*.part"))


def test_a_shard_that_changed_since_indexing_is_refused(remote, shard_cache, tiny):
    dataset = build(config_of(remote), "train")
    for shard in range(5):
        tiny.save_shard(remote / f"{shard}.tar", {f"{i:02d}.png": tiny.png(100 + i) for i in range(3)})
    shutil.rmtree(shard_cache / "shards")
    with pytest.raises(ValueError, match="has changed since it was indexed.*--shard_cache"):
        dataset[0]
    assert on_disk(shard_cache) == 0


@pytest.mark.parametrize("url", ["pipe:cat {remote}/9.tar", "pipe:cat {remote}/0.tar; exit 3", "ais://here/0.tar"])
def test_a_failed_download_is_reported_and_leaves_no_file(remote, shard_cache, url):
    with pytest.raises(FileNotFoundError, match="cannot be downloaded"):
        build(Config(data_dir=url.replace("{remote}", str(remote))), "train")
    assert on_disk(shard_cache) == 0 and not list(shard_cache.glob("index/*.npy"))


def test_a_download_that_stalls_is_given_up(shard_cache, monkeypatch):
    monkeypatch.setattr(stores, "PIPE_STALL_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match="cannot be downloaded .nothing arrived for 0.2 seconds"):
        build(Config(data_dir="pipe:sleep 30"), "train")
    assert time.monotonic() - start < 10 and on_disk(shard_cache) == 0


def test_a_command_may_be_silent_for_longer_than_a_server(remote, monkeypatch):
    monkeypatch.setattr(stores, "STALL_SECONDS", 0.01)
    assert len(build(Config(data_dir=f"pipe:sleep 0.1; cat {remote}/0.tar"), "train")) == 2


def test_a_descriptor_above_1023_is_read():
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    reading, writing = os.pipe()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(2048, limit[0]), limit[1]))
        with os.fdopen(fcntl.fcntl(reading, fcntl.F_DUPFD, 1024), "rb") as stream:
            os.write(writing, b"abc")
            assert read_chunk(stream, 1) == b"abc"
            os.close(writing)
            assert read_chunk(stream, 1) == b""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        os.close(reading)


def test_downloads_of_killed_processes_free_their_slots(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "POLL_SECONDS", 0.001)
    store = ShardStore(tmp_path, 1)
    (tmp_path / f"{short_hash('pipe:gone')}.part").write_bytes(b"half a shard")
    (tmp_path / "source").write_bytes(b"whole")
    file, stamp = store.download(f"pipe:cat {tmp_path}/source")
    with file:
        assert file.read() == b"whole"
    assert [path.name for path in tmp_path.iterdir() if path.suffix in (".tar", ".part")] == [f"{stamp}.tar"]


def test_file_urls_are_read_in_place(remote, shard_cache):
    dataset = build(Config(data_dir=f"file:{remote}/{{0..4}}.tar"), "train")
    assert len(numbers(dataset)) == len(dataset) and not (shard_cache / "shards").exists()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset downloads http URLs with curl")
def test_a_rewritten_shard_on_a_server_is_reindexed(remote, tiny):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(remote))) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            config = Config(data_dir=f"http://127.0.0.1:{server.server_port}/{{0..4}}.tar", val_fraction=0.2)
            before = [build(config, split) for split in SPLITS]
            assert sorted(numbers(before[0]) + numbers(before[1])) == list(range(15))
            members = {"new.png": tiny.png(99)} | {f"n{i}.png": tiny.png(99) for i in range(20)}
            tiny.save_shard(remote / "3.tar", members)
            after = [build(config, split) for split in SPLITS]
            assert sum(map(len, after)) == 12 + 21 and 99 in numbers(after[0]) + numbers(after[1])
            with pytest.raises(FileNotFoundError, match="cannot be downloaded"):
                build(Config(data_dir=f"http://127.0.0.1:{server.server_port}/9.tar"), "train")
        finally:
            server.shutdown()
