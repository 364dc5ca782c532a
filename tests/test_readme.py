"""Every command of the README: that it parses, and, where its data are at hand, that it runs on tiny networks."""

import re

import numpy as np
import pytest
from PIL import Image

from helpers.tiny_runs import ROOT, UNET, call, parsed

TEXT = (ROOT / "README.md").read_text().replace("\\\n", " ")
COMMANDS = [" ".join(line.partition("#")[0].split()) for line in re.findall(r"^python (.+)$", TEXT, re.M)]
VQGAN = (
    "--nf 4 --ch_mult 1 2 2 --emb_dim 4 --codebook_size 16 --batch_size 4 --img_size 16 --ndf 4 --disc_layers 1 "
    "--perceptual_net none --train_steps 2 --steps_per_eval 0"
)
CODES = "--bert_n_emb 16 --bert_n_head 2 --bert_n_layers 1 --batch_size 4 --train_steps 2 --steps_per_eval 0"
PIXELS = f"{UNET} --img_size 8 --batch_size 4 --total_steps 20 --train_steps 2 --steps_per_eval 0"
SMALL = {  # by script: what makes it a matter of seconds
    "experiments/get_samples.py": "--n_samples 30 --sample_steps 2 --batch_size 30",
    "experiments/calc_FID.py": "--n_samples 8 --sample_steps 2 --features pixels",
    "experiments/calc_VQGAN_FID.py": "--n_images 8 --features pixels",
    "experiments/reconstruct.py": "--n_images 1",
    "experiments/inpaint.py": "--n_images 2 --sample_steps 2",
    "experiments/compare_samplers.py": "--n_samples 4 --steps 2 --features pixels",
    "experiments/calc_approximate_ELBO.py": "--n_images 2 --calls 2",
    "experiments/generate_big_samples.py": "--n_samples 1 --shape 5 6 --sample_steps 2",
    "experiments/check_digits.py": "",
}
ELSEWHERE = {  # what a command needs that is not here
    **{f"--dataset {name}": "images to download" for name in ("ffhq", "churches", "cifar10", "mnist")},
    **{"convert.py": "released weights", "demo.py": "a browser"},
}


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_every_command_parses(command, monkeypatch, tmp_path, capfd):
    script, _, flags = command.partition(" ")
    if script == "convert.py":  # reads the weights to know what they are
        with pytest.raises(SystemExit):
            call(script, flags)
        assert ".th not found" in capfd.readouterr().err
    else:
        assert parsed(script, f"{flags} --logs_root {tmp_path}", monkeypatch)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for logs and images, which the commands fill in the order of the README."""
    place = tmp_path_factory.mktemp("readme")
    for split in ("train", "val"):
        (place / "images" / split).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 255, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "images" / split / f"{i}.png")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("number, command", list(enumerate(COMMANDS)))
def test_every_command_runs(number, command, place):
    missing = next((why for word, why in ELSEWHERE.items() if word in command), None)
    if missing is not None:
        pytest.skip(f"{command} needs {missing}")
    script, _, flags = command.partition(" ")
    flags = flags.replace("/path/to/images", str(place / "images"))
    flags = flags.replace("/path/to/photographs", str(place / "images" / "val"))
    if script == "train_vqgan.py":
        small = VQGAN
    elif script == "train_sampler.py":
        small = PIXELS if "ddpm" in flags else CODES
    else:
        small = SMALL[script] + ("" if "--log_dir" in flags else f" --log_dir results_{number}")
    if script == "experiments/check_digits.py":
        drawn = COMMANDS.index("experiments/get_samples.py --sampler ddpm --save_process")
        small += f" --samples {place / 'logs' / f'results_{drawn}' / 'samples.npz'}"
    call(script, f"{flags} {small} --no_amp --logs_root {place / 'logs'}")
