"""Tiny runs of the scripts, which take seconds."""

import dataclasses
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from train import sampler, trained_sampler, vqgan
from train.cli import parse as cli
from train.data import loading

ROOT = Path(__file__).resolve().parents[2]
VQGAN = (
    "--nf 4 --ch_mult 1 2 2 --emb_dim 4 --codebook_size 16 --batch_size 4 --img_size 16 --ndf 4 --disc_layers 1 "
    "--shift 0"  # one view of each image, of the nine of the preset: samplers encode them all
)
GAN = "--disc_start_step 3 --diff_aug --perceptual_net none"
SAMPLER = "--bert_n_emb 16 --bert_n_head 2 --bert_n_layers 2 --batch_size 4 --sample_steps 4 --warmup_iters 100"
UNET = "--channels 8 --channel_mults 1 2 --res_blocks 1 --attn_factors 2 --heads 1"
DDPM = f"--sampler ddpm --img_size 8 --batch_size 4 --total_steps 20 --sample_steps 4 --warmup_iters 100 {UNET}"


def call(script: str, flags: str | list[str], *, validation_images: int = 20) -> None:
    """Runs a script in this process with the given flags, or their words; SystemExit if it exits with an error.

    Validation takes at most `validation_images`: on all 359 digits it would take most of the time of a tiny run.
    """
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(ROOT / script), *(flags.split() if isinstance(flags, str) else flags)]
    sys.path.insert(0, str((ROOT / script).parent))  # as Python does
    try:
        with pytest.MonkeyPatch.context() as patch:
            for stage in (sampler, vqgan):
                patch.setattr(stage, "VALIDATION_IMAGES", min(validation_images, stage.VALIDATION_IMAGES))
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


def run(script: str, flags: str = "", *, processes: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs a script in a subprocess, or in several under torchrun, with one thread each."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / script), *flags.split()]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)


def parse_config(script, flags, monkeypatch):
    """The config that a script would pass to main, as a flat dict."""
    configs = []
    monkeypatch.setattr(cli, "run_main", lambda main, config: configs.append(config))
    call(script, flags)
    return {key: value for group in cli.to_dict(configs[0]).values() for key, value in group.items()}


def keep_few_images(patch: pytest.MonkeyPatch, **counts: int) -> None:
    """Reduces the splits of data sets that are arrays to their first images."""
    build = loading.build_dataset

    def first_images(data, reader, split):
        dataset, n = build(data, reader, split), counts[split]
        return dataclasses.replace(dataset, images=dataset.images[:n], labels=dataset.labels[:n])

    for module in (loading, trained_sampler):
        patch.setattr(module, "build_dataset", first_images)
