"""More energy in the high DCT frequencies than the low ones let expect.

Trade-off: finds what is pasted or added (patches, noise, checkerboards) and not what is smooth (SIG, low-frequency
triggers, photo filters); text, line drawings and sharpened pictures look alike. Blind to captions, needs no model.
Source: Zeng et al., ICCV 2021, who train a classifier of DCT spectra on triggered images. Without labels ours: what is
usual is a regression over the pool, in which a poison of one pair in a hundred weighs little.
"""

from dataclasses import dataclass

import numpy as np

from filters._batch import BANDS, Batch
from filters._learnt import learnt
from filters._robust import deviations
from pipeline.errors import InputError

HIGH = BANDS // 2  # the first of the high bands: half of the highest frequency along an axis
TINY = 1e-3  # log10: no band counts as surprising at 0.2% more energy


@dataclass(frozen=True)
class frequency_residue:
    """Largest excess of a high DCT band over what low bands predict, in robust deviations (after Zeng et al. 2021)."""

    needs = ("spectrum",)
    pools = needs

    def score(self, batch: Batch, pool: Batch) -> np.ndarray:
        predict, spread = learnt(pool, self, lambda: _fitted(pool.spectrum))
        own = batch.spectrum[:, HIGH:] - _low(batch.spectrum) @ predict
        return deviations(own, spread, TINY).max(axis=1)


def _fitted(spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What predicts the high bands from the low ones, and by how much it is off for each picture of the pool."""
    usual = spectrum[np.isfinite(spectrum).all(axis=1)].astype(np.float64)
    if len(usual) <= BANDS:
        raise InputError(f"frequency_residue: {len(usual)} of the pool's images can be decoded; give --pool more")
    predict = np.linalg.lstsq(_low(usual), usual[:, HIGH:], rcond=None)[0]
    return predict, usual[:, HIGH:] - _low(usual) @ predict


def _low(spectrum: np.ndarray) -> np.ndarray:
    return np.column_stack([spectrum[:, :HIGH], np.ones(len(spectrum))]).astype(np.float64)
