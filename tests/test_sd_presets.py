"""The presets that fine-tune Stable Diffusion: the commands in them, small runs of them, and their memory."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.metrics.pretrained_speed import PretrainedBenchmarkConfig
from helpers.run_asserts import weights
from helpers.tiny_runs import ROOT, UNET, call, parse_config
from models.conditions import region_words, text
from models.experts import ExpertOptions, add_experts, experts_of
from models.lora import LoRAOptions, adapt, adapters_of, select_layers
from models.unet import UNet
from train.datasets.panoptic_folder import CITYSCAPES
from train.runs import read_run
from train.samplers._experts import PRESETS

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


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """A folder of images with panoptic maps: a road below the sky, and a car with words of its own."""
    folder = tmp_path_factory.mktemp("streets")
    rng, panoptic = np.random.default_rng(0), np.zeros((20, 20, 3), np.uint8)
    panoptic[:10], panoptic[10:], panoptic[8:14, 4:12] = (0, 1, 10), (0, 2, 0), (93, 193, 13)  # 256 R + G, class
    for split, count in (("train", 8), ("val", 4)):
        names = [f"{split}{i}.png" for i in range(count)]
        for name in names:
            for place, values in (
                (split, rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)),
                (f"panoptic/{split}", panoptic),
            ):
                (folder / place).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(folder / place / name)
        with (folder / f"prompts_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("img_name", "prompt"), *((name, f"a street {name}") for name in names)])
        words = {name: {str(256 * 93 + 193): "a red car"} for name in names}
        (folder / f"instance_prompts_{split}.json").write_text(json.dumps(words))
    return folder


def test_the_panoptic_preset_adds_regions_to_a_text_model(logs, streets):
    """From a model of captions that predicts v; what it lacks and the adapters learn, and are all that is saved."""
    data = f"--dataset captions --data_dir {logs}/images --image_dir . --prompts .txt --img_size 16"
    flags = (
        f"--sampler ddpm --conditions text --text_width 16 --attn_block_type transformer --prediction v {UNET} {data}"
    )
    call("train_sampler.py", f"--logs_root {logs} --log_dir sd21 --batch_size 4 {SMALL} {flags}")
    (flags,) = preset_commands("sd_panoptic")
    small = f"--img_size 16 --accumulate 1 --batch_size 4 --lora_rank 2 --optimizer adamw {SMALL}"
    call("train_sampler.py", f"{flags.replace('PATH', str(streets))} --logs_root {logs} {small}")
    content, learned, base = read_run(logs / "sd_panoptic"), weights(logs / "sd_panoptic", 1), weights(logs / "sd21", 1)
    assert content["sampler"]["prediction"] == "v" and content["sampler"]["zero_terminal_snr"]
    assert content["sampler"]["channels"] == 8 and content["origin"]["base"]["partial"]
    others = {key for key in learned if ".adapters." not in key and ".feed_forward." not in key}
    assert others and all(key.startswith("network.gated_blocks.") for key in others)
    stacked = [key for key in learned if ".feed_forward." in key]
    assert stacked and all(learned[key].shape == (5, *base[key].shape) for key in stacked)


def test_the_size_of_the_panoptic_preset_is_as_the_page_says():
    """Built in full on the meta device; docs/panoptic.md estimates its memory from these numbers."""
    groups = tuple(tuple(map(int, group.split(","))) for group in PRESETS["cityscapes_5"])
    config = region_words.Config(region_words_gated=True, region_words_names=CITYSCAPES)
    with torch.device("meta"):
        captions = text.build(text.Config(text_width=1024, text_layers=1, text_heads=16), 1280, 0)
        words = region_words.build(config, 1280, 0, captions)
        network = UNet(replace(PretrainedBenchmarkConfig().unet), {"text": captions, "region_words": words})
        whole = sum(p.numel() for name, p in network.named_parameters() if not name.startswith(("encoders.", "gated_")))
        layers = [name for name in select_layers(network, ["attention"]) if not name.startswith("gated_")]
        adapt(network, "lora", LoRAOptions(rank=128, alpha=128), layers)
        add_experts(network, ExpertOptions(groups=groups))
    experts = sum(p.numel() for layer in experts_of(network).values() for p in layer.parameters())
    gated = sum(p.numel() for p in network.gated_blocks.parameters())
    adapters = sum(p.numel() for adapter in adapters_of(network).values() for p in adapter.parameters())
    assert (whole, experts, gated) == (865_910_724, 743_985_600, 50_402_256) and adapters == 26_558_464
