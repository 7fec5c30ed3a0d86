"""CLIP training under frozen recipes. Runs without ray, polars and faiss; only launch.py needs ray."""

import sys
from pathlib import Path

# `python train/launch.py` puts this very folder first on the path, where our data.py and evaluate.py would shadow
# packages of these names.
_here = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _here]
