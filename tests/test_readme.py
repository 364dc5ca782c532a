"""The README is short, states the size of the code correctly, and its Python runs."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from helpers.pages import README, blocks, commands, prose, words
from helpers.tiny_runs import ROOT, SAMPLER, VQGAN, call

TEXT = README.read_text()


def test_it_is_short():
    assert words(TEXT) <= 1500
    assert len(TEXT.splitlines()) <= 220


def section_of(heading: str) -> str:
    """The text of a section."""
    return TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def table_of(heading: str) -> list[str]:
    """The rows of the table in a section, without the header."""
    return [line for line in section_of(heading).splitlines() if line.startswith("|")][2:]


def test_presets_are_chosen_from_at_most_ten_rows():
    assert 1 <= len(table_of("Which model, which preset")) <= 10


def test_results_have_one_number_in_a_cell():
    rows = table_of("Results")
    assert rows
    for row in rows:
        for cell in row.strip("|").split("|")[2:]:
            assert re.fullmatch(r"\d+(\.\d+)?|", cell.strip()), row


def test_sizes_of_the_tree_are_true():
    tree = dict(re.findall(r"^(\w+)/ +([\d,]+) lines", TEXT, re.M))
    assert {"models", "diffusion", "vq", "train", "experiments", "tests"} == set(tree)
    for folder, stated in tree.items():
        lines = sum(len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py"))
        assert abs(int(stated.replace(",", "")) - lines) <= 0.1 * lines, f"{folder}: {lines} lines"


def test_names_of_the_code_tour_are_where_it_says():
    """`Name` in [file](file), as the README writes it."""
    references = re.findall(r"`(\w+)(?:\.(\w+))?`[^`\[]*? in\s+\[([\w/.]+)\]", prose(TEXT))
    assert len(references) >= 3
    for name, attribute, file in references:
        text = (ROOT / file).read_text()
        assert re.search(rf"^(def|class) {name}\b", text, re.M), f"{name} in {file}"
        assert not attribute or re.search(rf"^    def {attribute}\b", text, re.M), f"{name}.{attribute} in {file}"


def test_it_says_how_to_cite_and_whose_the_licence_is():
    (entry,) = blocks(TEXT, "bibtex")
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert entry.startswith("@software{") and f"{{{version}}}" in entry
    assert "**Licence**" in TEXT and not (ROOT / "LICENSE").exists()


def test_its_python_runs(tmp_path, monkeypatch):
    """On tiny runs of the embedded digits, under the name of the run that it loads."""
    (code,) = blocks(TEXT, "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    common = f"--logs_root {tmp_path / 'logs'} --no_amp"
    call("train_vqgan.py", f"{common} --train_steps 2 {VQGAN} --perceptual_net none --log_dir vqgan_digits")
    call(
        "train_sampler.py", f"{common} --train_steps 2 {SAMPLER} --ae_load_dir vqgan_digits --log_dir absorbing_digits"
    )
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["images"].shape == (16, 1, 16, 16) and (tmp_path / "sevens.png").is_file()


def call_on_own_pictures(tmp_path: Path, script: str, flags: str, steps: int) -> None:
    """A command of the section, but of `steps` training steps, and with the images in tmp_path."""
    shorter = "--n_samples 2" if script.startswith("experiments/") else f"--train_steps {steps}"
    flags = flags.replace("/path/to/images", str(tmp_path / "images"))
    call(script, f"{flags} {shorter} --logs_root {tmp_path / 'logs'}")


@pytest.mark.slow
def test_own_pictures_become_samples(tmp_path):
    """By the commands as they are written, but of STEPS training steps, and without the page."""
    STEPS, section = 2, section_of("Train on your own pictures")
    preset = yaml.safe_load((ROOT / "configs" / "photos_laptop.yaml").read_text())
    for i in range(40):
        save_noise(tmp_path / "images" / ("hat", "shoe")[i % 2] / f"{i}.png", i)
    for script, flags in commands(section):
        if script != "demo.py":
            call_on_own_pictures(tmp_path, script, flags, STEPS)
    for folder in re.findall(r"`(logs/\w+)`", section):
        samples = re.fullmatch(r"logs/samples_([a-z]+)_\w+_(\d+)", folder)
        assert samples is None or int(samples[2]) == preset[samples[1]]["train_steps"], folder
        folder = tmp_path / (folder if samples is None else re.sub(r"_\d+$", f"_{STEPS}", folder))
        assert list(folder.glob("images/*.png" if samples is None else "samples.png")), folder


@pytest.mark.slow
def test_own_pictures_need_no_class_folders(tmp_path):
    """With the flags that the section adds for them, in pixels."""
    section = section_of("Train on your own pictures")
    (where, sampler) = re.search(
        r"no class\s+folders, add `(.+?)` where the folder is given, and `(.+?)` to `train_sampler.py`", section
    ).groups()
    for i in range(40):
        save_noise(tmp_path / "images" / f"{i}.png", i)
    ddpm = [(script, flags) for script, flags in commands(section) if "ddpm" in flags and script != "demo.py"]
    assert len(ddpm) == 2
    for script, flags in ddpm:
        flags += f" {where}" if "--data_dir" in flags else ""
        flags += f" {sampler}" if script == "train_sampler.py" else ""
        call_on_own_pictures(tmp_path, script, flags, 2)
    assert (tmp_path / "logs" / "samples_ddpm_photos_laptop_2" / "samples.png").is_file()


def save_noise(path: Path, seed: int) -> None:
    """Saves an image of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize("heading", ("Start", "Train on your own pictures", "From Python", "Results", "Cite"))
def test_it_has_the_sections_that_readers_look_for(heading):
    assert f"\n## {heading}\n" in TEXT
