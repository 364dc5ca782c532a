"""Puts the repository's root first on sys.path.

Each script here imports it before any project module: Python puts the script's own folder first, from where the
project's packages cannot be imported, and the environment may have another checkout installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
