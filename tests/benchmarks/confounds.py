"""How well encoding alone tells the poisons of every attack that `validate-attack` has tried: the confound table.

`python -m tests.benchmarks.confounds OUT`, where OUT is the folder of `mithridate validate-attack`. Of each attack the
largest dose with seed 0 is probed; results are kept beside the trials, so that an interrupted run goes on. Ends with
the table of docs/results/confounds.md.
"""

import json
import sys
from pathlib import Path

from pipeline.probe import FEWEST, probe

SHOWN = ("encoding", "header", "size", "json", "colour", "caption")


def main(out: str) -> None:
    """Probe what is left to probe and print the table."""
    found: dict[str, dict] = {}
    for trial in sorted(Path(out).glob("*-seed0/trial.json")):
        row = json.loads(trial.read_text())[0]
        if row["poisons"] > found.get(row["attack"], {"poisons": 0})["poisons"]:
            found[row["attack"]] = row | {"folder": trial.parent}
    print("| attack | poisons | " + " | ".join(SHOWN) + " | control | telling fact |")
    print("|---|---|" + "---|" * (len(SHOWN) + 2))
    for attack, row in sorted(found.items()):
        told = row["folder"] / "probe"
        if not (told / "probe.json").exists():
            probe(str(row["folder"] / "poisoned"), str(told))
        result = json.loads((told / "probe.json").read_text())
        families = result["families"] | {"control": result["control"]}
        cells = [_cell(families[name]) for name in (*SHOWN, "control")]
        facts = families["encoding"].get("facts") or [{"fact": "–"}]
        print(f"| `{attack}` | {row['poisons']} | {' | '.join(cells)} | {facts[0]['fact']} |")
    print(f"\nAUROC with its 95% interval; – where fewer than {FEWEST} poisons have an image of their own.")


def _cell(family: dict) -> str:
    if family["auroc"] is None:
        return "–"
    return f"{family['auroc']:.2f} ({family['auroc_low']:.2f}–{family['auroc_high']:.2f})"


if __name__ == "__main__":
    main(sys.argv[1])
