"""The presets that fine-tune Stable Diffusion: the commands in them, small runs of them, and their memory."""

import re

import numpy as np
import pytest
from PIL import Image

from helpers.run_asserts import weights
from helpers.tiny_runs import ROOT, UNET, call, parse_config
from train.runs import read_run

SMALL = "--train_steps 1 --warmup_iters 0 --num_workers 0 --sample_steps 2 --steps_per_eval 0 --no_amp"


def preset_commands(name):
    """The flags of each call of train_sampler.py in the comment of a preset."""
    text = (ROOT / f"configs/{name}.yaml").read_text().replace("\\\n#", "")
    return re.findall(r"^#   python train_sampler\.py (.*)$", text, re.MULTILINE)


def test_the_second_run_of_the_curriculum_starts_from_the_first(monkeypatch, tmp_path):
    configs = [
        parse_config("train_sampler.py", f"{flags} --logs_root {tmp_path}", monkeypatch)
        for flags in preset_commands("sd_curriculum")
    ]
    first, second = configs
    assert (first["img_size"], second["img_size"]) == (512, 256) and first["load_dir"] == "sd15"
    assert second["load_dir"] == first["log_dir"] != second["log_dir"]
    assert {key for key in first if first[key] != second[key]} == {"img_size", "load_dir", "log_dir"}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Logs with a run `sd15` of a tiny UNet with captions, and the folder `images` of images and text files."""
    logs = tmp_path_factory.mktemp("presets")
    (logs / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(logs / f"images/{i}.png")
        (logs / f"images/{i}.txt").write_text(f"image {i}\n")
    data = f"--dataset captions --data_dir {logs}/images --image_dir . --prompts .txt --img_size 16"
    flags = f"--sampler ddpm --conditions text --text_width 16 --attn_block_type transformer {UNET} {data}"
    call("train_sampler.py", f"--logs_root {logs} --log_dir sd15 --batch_size 4 {SMALL} {flags}")
    return logs


@pytest.mark.parametrize("name", ["sd_lora", "sd_curriculum"])
def test_a_preset_fine_tunes_a_small_network(name, logs):
    if name == "sd_curriculum":
        pytest.importorskip("bitsandbytes")
    for flags, size in zip(preset_commands(name), (16, 8), strict=False):
        flags = flags.replace("PATH", f"{logs}/images").replace("--img_size 256", "")
        call("train_sampler.py", f"{flags} --logs_root {logs} --img_size {size} --accumulate 1 --batch_size 4 {SMALL}")
    run, base = logs / ("sd_lora" if name == "sd_lora" else "sd_256"), weights(logs / "sd15", 1)
    content, learned = read_run(run), weights(run, 1)
    assert content["data"]["img_size"] == size and content["training"]["activation_checkpointing"]
    if name == "sd_lora":
        assert learned and all(".adapters." in key for key in learned)
    else:
        first = weights(logs / "sd_512", 1)
        assert learned.keys() == first.keys() == base.keys()
        near = [(learned[key] - first[key]).abs().max() for key in base]
        assert 0 < max(near) < 1.2e-5  # a step of 1e-5 from the weights of the first run
