"""What a detector sees of a shard: columns joined by uid before the call. `filters/_wants.py` says what it may ask for.

Nothing else of a run is known to a detector.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

SIDE = 64  # of `pixels`
BANDS = 16  # of `spectrum`


def _absent() -> np.ndarray:
    return np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class Drawn:
    """How neighbours are looked for, the same in all shards of a run: at least `k` of each row.

    Of a pool also: `digests`, of its uids and of each of its columns, which tell it from any other; `probes`, how many
    inverted lists a search looks at, 0 for all rows.
    """

    k: int = 0
    digests: tuple[tuple[str, str], ...] = ()
    probes: int = 0

    def digest(self, columns: Iterable[str]) -> list[str]:
        """Of the uids and of these columns."""
        known = dict(self.digests)
        return [known["uid"], *(known[name] for name in columns)]


@dataclass(frozen=True)
class Batch:
    """n pairs. Columns that no detector of the run `needs` are empty.

    uid: str[n].
    image_embedding, text_embedding: float32[n, d], not normalised, NaN rows where a pair has none; `earlier_…` the same
    of another checkpoint of the same run.
    similarity_trace, loss_trace: float32[n, epochs], what training saw of the pair before the step that could memorise
    it.
    poisoned: bool[n], from a ledger.
    caption: str[n]; image: bytes[n] as stored; image_sha256: str[n] in hex; None where there is no usable one.
    pixels: uint8[n, SIDE, SIDE, 3], the shorter side scaled, the middle of the longer one; image_hash: uint64[n],
    perceptual; both mean something where `decoded`: bool[n].
    spectrum: float32[n, BANDS], log10 of the mean squared DCT coefficient of each band of frequencies, low to high, NaN
    where the image cannot be decoded.
    facts: float32[n, f] of the encoding (`pipeline.facts.NAMES`), NaN where one does not apply.
    size: float32[n, 2], width and height as stored.
    url, language: str[n] ("" unknown), as the sample's metadata says.
    published_similarity: float32[n]; hash_agrees: float32[n], 1 where the published hash is that of the stored image, 0
    where it is not, NaN where there is none.

    No columns: `drawn`; `found`, the neighbours that `filters._knn` has found for these rows, and `asked`, those that
    were asked of it.
    """

    uid: np.ndarray
    image_embedding: np.ndarray = field(default_factory=_absent)
    text_embedding: np.ndarray = field(default_factory=_absent)
    earlier_image_embedding: np.ndarray = field(default_factory=_absent)
    earlier_text_embedding: np.ndarray = field(default_factory=_absent)
    similarity_trace: np.ndarray = field(default_factory=_absent)
    loss_trace: np.ndarray = field(default_factory=_absent)
    poisoned: np.ndarray = field(default_factory=_absent)
    caption: np.ndarray = field(default_factory=_absent)
    image: np.ndarray = field(default_factory=_absent)
    image_sha256: np.ndarray = field(default_factory=_absent)
    pixels: np.ndarray = field(default_factory=_absent)
    image_hash: np.ndarray = field(default_factory=_absent)
    decoded: np.ndarray = field(default_factory=_absent)
    spectrum: np.ndarray = field(default_factory=_absent)
    facts: np.ndarray = field(default_factory=_absent)
    size: np.ndarray = field(default_factory=_absent)
    url: np.ndarray = field(default_factory=_absent)
    language: np.ndarray = field(default_factory=_absent)
    published_similarity: np.ndarray = field(default_factory=_absent)
    hash_agrees: np.ndarray = field(default_factory=_absent)
    drawn: Drawn = Drawn()
    found: dict[Any, Any] = field(default_factory=dict, init=False, compare=False, repr=False)
    asked: set[Any] = field(default_factory=set, init=False, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.uid)

    def take(self, rows: np.ndarray) -> "Batch":
        """These rows, in this order."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        return Batch(**{name: values[rows] if len(values) else values for name, values in columns.items()})


COLUMNS = tuple(f.name for f in fields(Batch) if f.name not in ("drawn", "found", "asked"))


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float[n] of row i of one and row i of the other; NaN where either has no direction."""
    return np.asarray((unit(one) * unit(other)).sum(axis=1))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one; a zero row stays NaN, which is the most suspicious score there is."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
