"""A disk that fills up during a save: the older checkpoint stays intact, and the run can resume."""

import errno
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from experiments.harness.images import read_samples
from helpers.run_asserts import assert_equal_bits, checkpoint, weights
from helpers.tiny_runs import DDPM, VQGAN, call
from train import checkpoint as module
from train.checkpoint import load_checkpoint, save_checkpoint, saved_steps, verify_checkpoint
from train.config import DataConfig
from train.data import image_cache
from train.data.loading import ImageSource
from train.datasets import ArrayDataset
from train.distributed import DistContext
from train.ema import EMA
from train.loop import TrainState
from train.optim import BadStepRecorder
from train.posthoc_ema import save_snapshot


def state_of(width: int = 3) -> TrainState:
    torch.manual_seed(0)
    network = nn.Linear(width, width)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network(torch.randn(4, width)).square().sum().backward()
    optimizer.step()
    return TrainState({"network": network}, {"network": optimizer}, {"network": EMA(network, 0.9)}, step=7)


class FailingWrites:
    """Makes the n-th write of a save fail with the error that its function raises on a full disk."""

    def __init__(self, monkeypatch, n: int):
        self.n, self.calls = n, 0
        os_error, torch_save = (lambda: OSError(errno.ENOSPC, "No space left on device")), torch.save
        self.wrap(monkeypatch, module, "save_file", lambda: SafetensorError("I/O error: No space left on device"))
        self.wrap(monkeypatch, module, "fsync", os_error)
        self.wrap(monkeypatch, module, "write_text", os_error)
        self.wrap(monkeypatch, Path, "rename", os_error)
        self.wrap(monkeypatch, Path, "mkdir", os_error)

        def save_half(content, file):
            if self.fails():
                file.write(b"half of it")
                raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")
            torch_save(content, file)

        monkeypatch.setattr(module.torch, "save", save_half)

    def fails(self) -> bool:
        self.calls += 1
        return self.calls == self.n

    def wrap(self, monkeypatch, owner, name: str, error) -> None:
        real = getattr(owner, name)

        def checked(*args, **kwargs):
            if self.fails():
                raise error()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, checked)


@pytest.mark.parametrize("step", [7, 8])
def test_any_failed_write_keeps_a_complete_checkpoint(tmp_path, monkeypatch, step):
    """For a new checkpoint, and when that of step 7 is overwritten."""
    n, done = 0, False
    while not done:
        n += 1
        run, state = tmp_path / str(n), state_of()
        save_checkpoint(run, state)
        state.step = step
        with monkeypatch.context() as patch:
            failing = FailingWrites(patch, n)
            try:
                save_checkpoint(run, state)
                done = True
            except OSError:
                pass
        assert saved_steps(run) in ([7], sorted({7, step})), n
        for saved_step in saved_steps(run):
            verify_checkpoint(checkpoint(run, saved_step))
            load_checkpoint(run, saved_step, state_of())
        save_checkpoint(run, state)  # now with free space
        assert saved_steps(run) == sorted({7, step})
        assert [f.name for f in (run / "checkpoints").glob(".step_*")] == []
    assert failing.calls == n - 1 >= 10  # each write has failed once


@pytest.fixture
def small_disk(tmp_path):
    """A file system of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill_disk(disk: Path, free: int) -> Path:
    """Fills a file system up to `free` bytes, in full pages; returns the filler file."""
    filler = disk / "filler"
    filler.write_bytes(b"0" * max(0, shutil.disk_usage(disk).free - free))
    return filler


@pytest.fixture
def mounted_disk(request):
    if shutil.which("mount") is None:
        pytest.skip("no mount command here")
    return request.getfixturevalue("small_disk")


def test_a_full_disk_is_always_an_oserror(mounted_disk):
    """save_file and torch.save raise SafetensorError, RuntimeError or OSError."""
    state = state_of(100)  # 40 to 80 KB per file
    save_checkpoint(mounted_disk, state)
    size = sum(f.stat().st_size for f in checkpoint(mounted_disk, 7).iterdir())
    state.step, failures = 8, 0
    for free in range(0, size + 32_768, 8_192):
        filler = fill_disk(mounted_disk, free)
        try:
            save_checkpoint(mounted_disk, state)
        except OSError as error:
            failures += 1
            assert "No space left" in str(error)
            assert saved_steps(mounted_disk) in ([7], [7, 8])  # both if only "latest" did not fit
            for step in saved_steps(mounted_disk):
                verify_checkpoint(checkpoint(mounted_disk, step))
            assert [f.name for f in (mounted_disk / "checkpoints").iterdir() if f.name.startswith(".step")] == []
        filler.unlink()
        shutil.rmtree(checkpoint(mounted_disk, 8), ignore_errors=True)
    assert failures > 10
    save_checkpoint(mounted_disk, state)
    assert saved_steps(mounted_disk) == [7, 8]


def test_saving_a_bad_batch_to_a_full_disk_is_an_oserror(mounted_disk):
    fill_disk(mounted_disk, 8_192)
    bad = BadStepRecorder(mounted_disk, DistContext(torch.device("cpu")), max_bad_steps=1)
    with pytest.raises(OSError, match="No space left"):
        bad(state_of(), 0, [{"position": torch.arange(4), "image": torch.zeros(4, 3, 64, 64)}])


def test_saving_an_ema_snapshot_to_a_full_disk_is_an_oserror(mounted_disk):
    fill_disk(mounted_disk, 8_192)
    with pytest.raises(OSError, match="No space left"):  # other errors would end the writer thread silently
        save_snapshot(mounted_disk, 1, {"0.1/network.weight": torch.zeros(100, 100)})


@pytest.mark.parametrize("script", ["train_vqgan.py", "train_sampler.py"])
def test_a_run_on_a_full_disk_ends_cleanly_and_resumes_later(mounted_disk, tmp_path, capsys, script):
    kind = f"{VQGAN} --perceptual_net none" if script == "train_vqgan.py" else f"{DDPM} --ema_profiles 0.1"
    flags = f"--no_amp --log_dir run --steps_per_eval 0 --steps_per_save_output 100 --steps_per_log 1 {kind}"
    call(script, f"--logs_root {mounted_disk} --train_steps 2 {flags}")
    call(script, f"--logs_root {tmp_path} --train_steps 4 {flags}")
    filler = fill_disk(mounted_disk, 60_000)  # for the logs
    with pytest.raises(SystemExit) as stop:
        call(script, f"--logs_root {mounted_disk} --train_steps 4 {flags}")
    errors = [line for line in capsys.readouterr().err.splitlines() if f"{script}: " in line]
    assert stop.value.code == 2 and len(errors) == 1 and "could not save" in errors[0] and "No space left" in errors[0]
    assert saved_steps(mounted_disk / "run") == [2]
    filler.unlink()
    call(script, f"--logs_root {mounted_disk} --train_steps 4 {flags}")
    assert_equal_bits(weights(mounted_disk / "run", 4), weights(tmp_path / "run", 4))


def one_line_about_space(capsys, script: str, flags: str) -> None:
    """Runs a script, which must end in one line about a full disk."""
    with pytest.raises(SystemExit) as stop:
        call(script, flags)
    errors = [line for line in capsys.readouterr().err.splitlines() if f"{Path(script).name}: " in line]
    assert stop.value.code == 2 and len(errors) == 1 and "No space left" in errors[0], errors


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 90_000, 140_000])
def test_sampling_on_a_full_disk_ends_cleanly_and_goes_on_later(mounted_disk, trained_ddpm, tmp_path, capsys, free):
    """Whichever file does not fit: the config, a batch, or the images of samples.npz."""
    shutil.copytree(trained_ddpm / "ddpm_digits", mounted_disk / "ddpm_digits")
    shutil.copytree(trained_ddpm / "ddpm_digits", tmp_path / "ddpm_digits")
    flags = "--sampler ddpm --n_samples 300 --batch_size 100 --sample_steps 2 --no_amp --log_dir samples"
    filler = fill_disk(mounted_disk, free)
    one_line_about_space(capsys, "experiments/get_samples.py", f"--logs_root {mounted_disk} {flags}")
    filler.unlink()
    for logs in (mounted_disk, tmp_path):
        call("experiments/get_samples.py", f"--logs_root {logs} {flags}")
    one, other = (read_samples(logs / "samples" / "samples.npz") for logs in (mounted_disk, tmp_path))
    assert_equal_bits(one, other)
    assert not [path for path in (mounted_disk / "samples").iterdir() if path.name.startswith(".")]


def test_caching_images_on_a_disk_that_fills_up_is_an_oserror(mounted_disk, monkeypatch):
    images = ArrayDataset(np.arange(64 * 1024, dtype=np.uint8).reshape(64, 32, 32), np.zeros(64, np.int64), 1)
    config = DataConfig(img_size=32, cache_images=True)
    filler = fill_disk(mounted_disk, 32_768)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(image_cache, "check_disk_space", lambda folder, size: None)  # there was enough at that time
        ImageSource(images, config, mounted_disk / "cache")
    assert [path.suffix for path in (mounted_disk / "cache").iterdir()] == [".lock"]
    filler.unlink()
    cached, plain = ImageSource(images, config, mounted_disk / "cache"), ImageSource(images, DataConfig(img_size=32))
    assert all(torch.equal(cached[i]["image"], plain[i]["image"]) for i in range(64))
