"""Do the `_released` detectors say what their authors' code says on the same batch?

    python -m tests.benchmarks.released CLONE [--json] [--rows 2048] [--dimensions 512]

CLONE is a clone of HanxunH/Detect-CLIP-Backdoor-Samples; nothing of it is kept here. Their detectors are run as they
are, in their precise mode, on features instead of images. Printed is the largest relative difference of a score, and
for the formulas how far they are from the released code.
"""

import argparse
import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import torch

from filters._batch import Batch
from pipeline import spec

K = 16
INTRINSIC = 24
EXACT = "donot_use_mm_for_euclid_dist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--dimensions", type=int, default=512)
    arguments = parser.parse_args()
    sys.path.insert(0, arguments.clone)
    found = {
        f"{name}, {of}": round(value, 8)
        for of in ("image", "both")
        for name, value in compare(features(arguments.rows, arguments.dimensions), of).items()
    }
    if arguments.json:
        print(json.dumps(found))


def features(n: int, dimensions: int, seed: int = 0) -> Batch:
    """Clusters of few intrinsic dimensions in a cone; texts lie among the images, so that they are neighbours too."""
    rng = np.random.default_rng(seed)
    centre, which = rng.normal(size=(20, dimensions)), rng.integers(20, size=n)
    cone, spread = 2 * rng.normal(size=dimensions), rng.normal(size=(INTRINSIC, dimensions)) / INTRINSIC**0.5
    image, text = (
        cone + centre[which] + rng.normal(size=(n, INTRINSIC)) @ spread + 0.1 * rng.normal(size=(n, dimensions))
        for _ in range(2)
    )
    uid = np.asarray([f"{i:032x}" for i in range(n)], dtype=object)
    return Batch(uid, image_embedding=image.astype(np.float32), text_embedding=text.astype(np.float32))


def compare(batch: Batch, of: str) -> dict[str, float]:
    theirs_of = {
        "kdist": ("k_distance", "KDistanceDetector", {}),
        "lid": ("lid_detection", "LIDDetector", {"est_type": "mle"}),
        "slof": ("slof", "SLOFDetector", {}),
        "dao": ("dao", "DAODetector", {"est_type": "mle"}),
    }
    identity = SimpleNamespace(encode_image=lambda x: x, encode_text=lambda x: x)
    images = torch.from_numpy(batch.image_embedding)
    texts = torch.from_numpy(batch.text_embedding) if of == "both" else None
    found = {}
    for name, (module, detector, options) in theirs_of.items():
        released = getattr(importlib.import_module(f"backdoor_sample_detector.{module}"), detector)
        theirs = released(k=K, compute_mode=EXACT, **options)(identity, images, texts).numpy()
        block = f"of={of!r}, size={max(2048, len(batch))}"
        # their k-th distance is of the row's (k + 1)-th neighbour, and k-distance has no neighbours to look up
        same = (
            f"{name}_released(k={K}, {block})" if name != "kdist" else f"kdist(k={K + 1}, reference='batch', {block})"
        )
        ours = spec.parse("detectors", same).score(batch, None)
        formula = spec.parse("detectors", f"{name}(k={K}, reference='batch', {block})").score(batch, None)
        found[name] = difference(ours, theirs)
        print(
            f"{name:<6}{of:<6} largest relative difference {found[name]:.1e}, "
            f"of the formula {difference(formula, theirs):.1e}",
            file=sys.stderr,
        )
    return found


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative to the score, or to half the median of those that are by chance near zero."""
    scale = np.maximum(np.abs(theirs), np.median(np.abs(theirs)) / 2)
    return float(np.max(np.abs(ours - theirs) / scale))


if __name__ == "__main__":
    main()
