"""The progress bar fits its terminal, a log gets few lines, and the commands named at the end of a run work."""

import fcntl
import os
import re
import struct
import sys
import termios
from types import SimpleNamespace

import pytest

from helpers.tiny_runs import GAN, SAMPLER, VQGAN, call, parse_config
from train import progress
from train.progress import Progress, close_bars, describe_end, format_duration, print_above

NUMBERS = {"loss": 0.12345, "l1": 0.056789, "usage": 0.98765}


class Clock(SimpleNamespace):
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """The clock of progress bars."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def terminal(monkeypatch):
    """Returns a function that makes stderr a terminal of so many columns, and one that reads what was written."""
    files = []

    def open_terminal(columns: int) -> None:
        main, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        files.extend([main, os.fdopen(terminal, "w", encoding="utf-8")])
        monkeypatch.setattr(sys, "stderr", files[-1])

    def read() -> str:
        files[-1].write("<end>")
        files[-1].flush()
        written = b""
        while not written.endswith(b"<end>"):
            written += os.read(files[-2], 100_000)
        return written.decode().removesuffix("<end>")

    yield open_terminal, read
    for file in files:
        os.close(file) if isinstance(file, int) else file.close()


def test_a_bar_of_80_columns_is_a_bar_and_never_wraps(terminal, clock):
    open_terminal, read = terminal
    for columns, total, name in [(80, 1000, "vqgan_digits"), (80, 1_400_000, "a_long_name" * 9), (30, 1000, "name")]:
        open_terminal(columns)
        with Progress(name, total, "step") as bar:
            bar.numbers = NUMBERS
            for _ in range(4):
                clock.now += 500
                bar.update(total // 4)
                bar.bar.refresh()
        written = read()
        drawings = [text for text in re.split(r"[\r\n]", written) if text.strip()]
        assert written.count("\n") == 1 and max(map(len, drawings)) < columns - 2
        if columns == 80:
            half = next(text for text in drawings if f"{total // 2}/{total}" in text)
            assert len(re.search(r"\|(.*)\|", half)[1]) >= 7
            assert re.search(r"50%\|.*\| \d+/\d+, .*/s.*, 17m left, loss 0.123, l1 0.0568", half)
            assert "in 33m" in drawings[-1] and (total > 1000 or "usage 0.988" in half)


def test_a_bar_that_does_not_end_leaves_a_clean_line(terminal, capsys):
    open_terminal, read = terminal
    open_terminal(80)
    with pytest.raises(KeyboardInterrupt), Progress("sampling", 10, "image") as bar:
        bar.update(3)
        print_above("a message")
        raise KeyboardInterrupt
    left_by_an_error = Progress("sampling", 10, "image")
    close_bars()
    left_by_an_error.close()
    assert read().rpartition("\r")[2] == "\x1b[K" and capsys.readouterr().out == "a message\n"
    assert not left_by_an_error.bar._instances


def test_a_log_gets_a_line_every_so_often(capsys, clock):
    with Progress("run", 40_000, "step") as log:
        log.numbers = NUMBERS
        for _ in range(40_000):
            clock.now += 0.1
            log.update()
    lines = capsys.readouterr().err.splitlines(keepends=True)
    assert len(lines) == 10 + 12 + 1 and all(line.endswith("\n") and "\r" not in line for line in lines)
    assert lines[0] == "run 1%: 300/40000, 10/s, 1h 6m left, loss 0.123, l1 0.0568, usage 0.988\n"
    assert lines[-1] == "run 100%: 40000/40000, 10/s, in 1h 7m, loss 0.123, l1 0.0568, usage 0.988\n"


def test_rate_and_time_left_are_of_this_session(capsys, clock):
    log = Progress("run", 1000, "step", initial=900)
    clock.now = 200
    log.update(50)
    assert capsys.readouterr().err == "run 95%: 950/1000, 4s/step, 3m 20s left\n"
    log.close()
    with Progress("run", 1000, "step", initial=1000), Progress("run", 9, "step", visible=False) as hidden:
        hidden.update(9)
    assert capsys.readouterr().err == ""  # unfinished, nothing to do, or hidden


def test_high_rates_are_written_out(capsys, clock):
    with Progress("run", 40_000, "step") as log:
        clock.now = 2
        log.update(40_000)
    assert capsys.readouterr().err == "run 100%: 40000/40000, 20,000/s, in 2s\n"


def test_durations_have_about_two_digits():
    seconds = [0.4, 7, 59.7, 303, 1000, 7200, 40 * 3600, 9 * 86_400 + 4 * 3600, 12 * 86_400]
    assert [format_duration(each) for each in seconds] == "0s,7s,1m 0s,5m 3s,17m,2h 0m,1d 16h,9d 4h,12d".split(",")


def test_the_end_says_what_was_reached(tmp_path):
    assert "pictures" not in describe_end(tmp_path, 1000, 500, 66, "step 96 %", {}, {})  # none were drawn
    (tmp_path / "images").mkdir()
    scores, best = {"val/l1": 0.0512, "val/usage": 0.98}, {"val/l1": (0.0508, 750)}
    text = describe_end(tmp_path, 1000, 500, 66, "step 96 %", scores, best)
    assert text.splitlines() == [
        "reached step 1000 from step 500 in 1m 6s",
        "time: step 96 %",
        "validation: l1 0.0512, usage 0.98, best l1 0.0508 at step 750",
        f"checkpoint: {tmp_path}/checkpoints/step_00001000",
        f"pictures: {tmp_path}/images",
    ]
    assert "reached" not in describe_end(tmp_path, 1000, 1000, 0, "", {}, best)  # nothing was left to do


def next_commands(output: str) -> list[str]:
    """The commands after "next:" without `python` and the folder of the script, as (script, flags)."""
    commands = output.partition("next: ")[2].splitlines()
    return [tuple(re.sub(r"^ *python \S*?(?=experiments/|train_)", "", line).split(" ", 1)) for line in commands]


@pytest.mark.slow
def test_the_commands_at_the_end_work_as_printed(tmp_path, capfd, monkeypatch):
    """For runs whose names are not the default ones."""
    flags = f"--logs_root {tmp_path} --log_dir my_codes --train_steps 2 {VQGAN} {GAN} --shift 1"
    call("train_vqgan.py", flags)
    ((script, flags),) = next_commands(capfd.readouterr().out)
    assert script == "train_sampler.py"
    call(script, f"{flags} --train_steps 2 --warmup_iters 0 {SAMPLER} --no_ema")
    output = capfd.readouterr().out
    assert f"checkpoint: {tmp_path / 'absorbing_my_codes' / 'checkpoints' / 'step_00000002'}\n" in output
    (samples, sample_flags), (fid, fid_flags) = next_commands(output)
    assert samples == "experiments/get_samples.py" and fid == "experiments/calc_FID.py"
    call(samples, f"{sample_flags} --n_samples 4")
    assert (tmp_path / "samples_absorbing_my_codes_2" / "samples.png").is_file()
    config = parse_config(fid, fid_flags, monkeypatch)
    assert config["load_dir"] == "absorbing_my_codes" and config["dataset"] == "digits" and not config["ema"]


def test_default_names_and_a_preset_give_short_commands(tmp_path, monkeypatch):
    root = progress.LoggingConfig.logs_root
    run = progress.Path(root) / "vqgan_digits"
    monkeypatch.setattr(sys, "argv", ["train_vqgan.py", "--config", "my own.yaml", "--nf", "4", "--img-size=8"])
    command = progress.sampler_command(run, "digits", root, {"img_size", "dataset"})
    typed = "--config 'my own.yaml' --img-size=8"
    assert command == f"python train_sampler.py --sampler absorbing --dataset digits {typed}"
    monkeypatch.setattr(sys, "argv", ["code/train_sampler.py", "--sampler", "ddpm"])
    commands = progress.experiment_commands(run.with_name("ddpm_mnist"), "ddpm", "mnist", root, ema=True)
    assert commands[1] == "python code/experiments/calc_FID.py --sampler ddpm --dataset mnist"
    (elsewhere, _) = progress.experiment_commands(tmp_path / "ddpm_mnist", "ddpm", "mnist", root, ema=True)
    assert elsewhere.endswith(f"--load_dir {tmp_path / 'ddpm_mnist'}")


def test_commands_for_other_names_parse(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_vqgan.py", "--shift", "1"])
    command = progress.sampler_command(tmp_path / "vqgan_mine", "digits", str(tmp_path), {"shift"})
    config = parse_config("train_sampler.py", command.partition(".py ")[2], monkeypatch)
    expected = {"ae_load_dir": "vqgan_mine", "log_dir": "absorbing_mine", "logs_root": str(tmp_path), "shift": 1}
    assert expected.items() <= config.items()
    monkeypatch.setattr(sys, "argv", ["train_sampler.py", "--shift", "1"])
    for command in progress.experiment_commands(tmp_path / "mine", "ddpm", "digits", str(tmp_path), ema=False):
        _, script, flags = command.split(" ", 2)
        config = parse_config(script, flags, monkeypatch)
        assert {"sampler": "ddpm", "load_dir": "mine", "ema": False}.items() <= config.items()
