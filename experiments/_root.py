"""Puts the repository's root first on the path of imports.

Each script here imports it before anything of the project: Python puts the script's own folder first, from which the
project's packages are not seen, and an environment may know another checkout's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
