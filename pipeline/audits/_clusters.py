"""Pairs that have a key in common with others, as the halves of a perceptual hash: marked by keys, grouped by linkage.

Trade-off: single linkage; of a long chain of look-alikes the ends need not look alike. Groups are exact in their keys,
whatever the sketch that found the candidates has too many; only what does not stand out of its background is missed.
"""

import numpy as np
import polars as pl

from filters._sketch import background
from pipeline.audit_columns import Rows
from pipeline.audits._audit import Marks, marks


def standing_out(sketch: np.ndarray, least: int) -> float:
    """The least count that is not noise: `least`, until a dataset of some 300,000 images fills the sketch."""
    noise = background(sketch)
    return least if noise < 1 else least + noise + 4 * noise**0.5


def marked_by_keys(rows: Rows, at: np.ndarray, kind: str, keys: np.ndarray, shared: np.ndarray) -> Marks:
    """Of the pairs `at` int[n] those with a key, of uint64[n, k], that is `shared` bool[n, k]; `keys` lists these."""
    some = np.flatnonzero(shared.any(axis=1))
    listed = pl.Series([keys[row][shared[row]].tolist() for row in some], dtype=pl.List(pl.UInt64))
    return marks(rows, at[some], kind, [""] * len(some), keys=listed)


def clustered(marked: Marks) -> Marks:
    """Pairs that share a key, directly or by others, are one group, called by its least key."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not marked.height:
        return marked.drop("keys")
    shared = marked.with_row_index("row").explode("keys").select("row", "keys")
    key = shared["keys"].rank("dense").to_numpy().astype(np.int64) - 1 + marked.height
    edges = coo_array((np.ones(len(key), bool), (shared["row"].to_numpy(), key)), shape=(n := int(key.max()) + 1, n))
    label = connected_components(edges, directed=False)[1][: marked.height]
    named = marked.with_columns(label=pl.Series(label, dtype=pl.Int64), least=pl.col("keys").list.min())
    return named.with_columns(group=pl.format("{}", pl.col("least").min().over("label"))).drop("keys", "label", "least")
