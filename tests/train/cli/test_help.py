"""--help: everyday flags and examples; --help_all: all flags; hints for flags of other codebases."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import tyro

from helpers.tiny_runs import ROOT, call, parse_config
from train.cli.help import HINTS, LAST_LINE, format_help

SCRIPTS = [
    str(path.relative_to(ROOT))
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "experiments").glob("*.py")])
    if "__main__" in path.read_text()
]


def print_help(script, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        call(script, flags)
    assert stop.value.code == 0
    return capsys.readouterr().out.rstrip()


def examples_in(text):
    """The example commands of a help, joined as a shell does."""
    return [line.strip() for line in text.replace("\\\n      ", "").splitlines() if line.startswith("  python ")]


def test_every_script_shows_everyday_flags_and_examples(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    of_samplers = [f"{script} --sampler ddpm" for script in ("train_sampler.py", "experiments/get_samples.py")]
    for command in [*SCRIPTS, *of_samplers, "train_sampler.py --sampler autoregressive --dataset folder"]:
        script, _, typed = command.partition(" ")
        text = print_help(script, f"{typed} -h", capsys)
        flags, lines = re.findall(r"^  --(\w+)", text, re.MULTILINE), text.splitlines()
        assert 8 <= len(flags) == len(set(flags)) <= 15, (command, flags)
        assert max(map(len, lines)) <= 80 and lines[-1] == LAST_LINE, command
        assert text.index("everyday flags:") < text.index("examples:")
        named = "experiments/benchmark.py" if "/benchmark_" in script else script  # to which they forward
        assert [example.split()[:2] for example in examples_in(text)] == [["python", named]] * 2, command


@pytest.mark.slow
def test_every_example_is_a_valid_command(capsys, monkeypatch):
    for script in (script for script in SCRIPTS if script != "convert.py"):  # which reads the weights
        for example in examples_in(print_help(script, "--help", capsys)):
            parse_config(script, example.partition(".py ")[2], monkeypatch)


def test_plugins_bring_their_own_everyday_flags(capsys):
    ddpm = print_help("train_sampler.py", "--sampler ddpm --dataset lsun --help", capsys)
    codes = print_help("train_sampler.py", "--dataset folder --help", capsys)
    for flag, of_ddpm in (("process", True), ("category", True), ("bert_n_emb", False), ("label_from", False)):
        assert (f"--{flag} " in ddpm, f"--{flag} " in codes) == (of_ddpm, not of_ddpm), flag
    assert "--sampler ddpm" in ddpm.partition("examples:")[2]


@dataclass(frozen=True, kw_only=True)
class Group:
    shape: tuple[int, int] = (4, 8)
    """Height and width."""
    names: tuple[str, ...] = ()
    """Names, 100 % yours."""
    kind: Literal["a", "b"] | None = None
    """Kind; default: a."""
    fast: bool = True
    """Whether
    it is fast."""
    source: Annotated[str, tyro.conf.arg(name="from")] = "here"
    """Where from."""
    rare: float = 0.5
    """Rare here."""
    other: int = 1
    """Never everyday."""

    EVERYDAY = ("shape", "names", "kind", "fast", "source", "rare")


@dataclass(frozen=True, kw_only=True)
class Nested(Group):
    size: int = 3
    """Size."""

    EVERYDAY = ("size",)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Does it."""

    EXAMPLES = ("python it.py --fast", "python it.py --size {size} " + "--shape 2 2 " * 5 + "--fast")
    NOT_EVERYDAY = ("rare", "left_out")

    group: Nested = Nested()
    left_out: Group = Group()


HELP = """usage: it.py [--flag VALUE ...]

Does it.

everyday flags:
  --shape INT INT    Height and width. (default: 4 8)
  --names [STR ...]  Names, 100 % yours.
  --kind {a,b}       Kind; default: a.
  --fast, --no_fast  Whether it is fast. (default: on)
  --from STR         Where from. (default: here)
  --size INT         Size. (default: 3)
  --config FILE      """


def test_the_short_help_has_types_and_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = format_help(Config(), "it.py")
    assert text.startswith(HELP), text
    assert "\n  python it.py --fast\n  python it.py --size 3 --shape 2 2" in text and " \\\n      --shape 2 2" in text


def test_help_shows_the_values_of_the_preset(capsys):
    assert "(default: 5000)" not in print_help("train_sampler.py", "--help", capsys)
    text = " ".join(print_help("train_sampler.py", "--dataset mnist --sampler ddpm --help", capsys).split())
    assert "before a resume. (default: 5000)" in text


def test_help_all_shows_every_flag(capsys, monkeypatch):
    text = print_help("train_sampler.py", "--sampler ddpm --help_all", capsys)
    config = parse_config("train_sampler.py", "--sampler ddpm", monkeypatch)
    assert [name for name in config if f"--{name}" not in text] == []


def test_words_of_other_codebases_lead_to_our_flags(capsys):
    for script, flags, words in (
        ("train_vqgan.py", "--epochs 5", "unknown flag --epochs: pass --train_steps N"),
        ("train_vqgan.py", "--lr 1 --learning-rate=0.1", "unknown flag --learning_rate: pass --lr X"),
        ("train_vqgan.py", "--num_steps 5", "pass --train_steps N\n"),
        ("train_sampler.py", "--num_steps 5", "pass --train_steps N for training, --sample_steps N for sampling"),
        ("experiments/get_samples.py", "--num_steps 5", "pass --sample_steps N"),
        ("experiments/get_samples.py", "--cfg_scale 2", "pass --guidance X"),
        ("train_sampler.py", "--fp16", "--amp is on by default; pass --amp_dtype"),
        ("experiments/calc_FID.py", "--no_fp16", "unknown flag --no_fp16: pass --no_amp\n"),
        ("train_vqgan.py", "--scheduler cosine", "unknown flag --scheduler: pass --lr_schedule NAME\n"),
        ("train_sampler.py", "--scheduler cosine", "pass --lr_schedule NAME for the learning rate, --solver NAME"),
        ("experiments/get_samples.py", "--scheduler ddim", "pass --solver NAME\n"),
        ("train_sampler.py", "--gpus 2", "torchrun"),
    ):
        with pytest.raises(SystemExit) as stop:
            call(script, flags)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1 and words in message, message


def test_errors_name_the_help_that_has_every_flag(capsys):
    for flags in ("--no_flip", "--grad_clip much", "--bert_n_headz 3"):  # the first is no --horizontal_flip
        with pytest.raises(SystemExit) as stop:
            call("train_sampler.py", flags)
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.endswith("train_sampler.py --help_all shows every flag\n"), message
        assert "--help " not in message and "horizontal" not in message


@dataclass(frozen=True, kw_only=True)
class Mine:
    """Does it."""

    size: int = 3
    """Size."""
    bare: int = 4

    EVERYDAY = ("size", "bare", "sise")


def test_an_everyday_flag_without_a_docstring_is_named():
    with pytest.raises(ValueError, match="got bare, sise in EVERYDAY of .*test_help.Mine, wanted fields with"):
        format_help(Mine(), "it.py")


def test_every_hint_is_given_somewhere(monkeypatch):
    scripts = ("train_vqgan.py", "train_sampler.py", "train_sampler.py --sampler ddpm", "experiments/get_samples.py")
    scripts += ("experiments/reconstruct.py",)
    known = [{*parse_config(*script.partition(" ")[::2], monkeypatch)} for script in scripts]
    for _, *hints in HINTS:
        for flags in (set(re.findall(r"--(?:no_)?(\w+)", hint)) for hint in hints):
            assert any(flags <= own for own in known), flags
    words = " ".join(names for names, *_ in HINTS).split()
    assert len(words) == len(set(words))
