"""Benchmarks Stable Diffusion's UNet, beside diffusers': experiments/benchmark.py --measure pretrained."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv[1:1] = ["--measure=pretrained"]
    runpy.run_path(str(Path(__file__).with_name("benchmark.py")), run_name="__main__")
