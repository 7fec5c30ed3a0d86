"""The jobs, and what they share. Each verb is a module here; see docs/design.md for the flow."""

import sys
from pathlib import Path

# `python pipeline/poison.py` puts this very folder first on the path, where our tables.py would
# shadow the PyTables that pandas looks for. The package is reached through its parent instead.
_here = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _here]
