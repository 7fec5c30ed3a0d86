"""Of the pairs that a report shows, the most alike images of the whole dataset, by the embeddings that were given.

Trade-off: every shard's embeddings are read once more, for one product with those of the few pairs that are shown;
what comes back from a shard does not grow with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from filters._batch import unit
from pipeline.audit_columns import Source
from pipeline.shard_map import each, succeeded
from pipeline.shards import Shard

NEAREST = 4  # of a pair
IMAGE = "image_embedding"
CUT = 100  # characters of a caption
Place = tuple[str, str]  # shard, uid


class Near(NamedTuple):
    """A pair and the cosine of its image's embedding with that of the one it is near to."""

    similarity: float
    shard: str
    uid: str
    caption: str


def nearest(
    shards: Sequence[Shard], source: Source, sha256: Mapping[str, str], features: Mapping[Place, np.ndarray]
) -> dict[Place, tuple[Near, ...]]:
    """NEAREST of each pair at most, itself left out, the nearest first; ties by shard and uid.

    `features`: their image embeddings, float32[d]; a pair without one, NaN, has no neighbours, and neither has a shard
    that cannot be read any more any to give.
    """
    queries = [place for place in sorted(features) if np.isfinite(features[place]).all()]
    if not queries:
        return {}
    out: dict[Place, list[Near]] = {place: [] for place in queries}
    rows, look = unit(np.stack([features[place] for place in queries])), _Nearest(source, sha256)
    for _, part in succeeded(each("neighbours", shards, look, queries, rows), most=len(shards)):
        for place, near in part.of.items():
            out[place] = sorted([*out[place], *near], key=lambda one: (-one.similarity, *one[1:]))[:NEAREST]
    return {place: tuple(near) for place, near in out.items()}


@dataclass(frozen=True)
class _Part:
    read: int
    of: Mapping[Place, Sequence[Near]]


@dataclass(frozen=True)
class _Nearest:
    """The most alike pairs of a shard, for each query."""

    source: Source
    sha256: Mapping[str, str]

    def __call__(self, shard: Shard, queries: Sequence[Place], features: np.ndarray) -> _Part:
        rows = self.source.rows(shard, self.sha256[shard.file], {IMAGE}, ())
        if not len(rows):
            return _Part(0, {})
        own = {str(uid): i for i, uid in enumerate(rows.uid)}
        cosine = np.nan_to_num(features @ unit(rows.image_embedding).T, nan=-np.inf)
        for query, (name, uid) in enumerate(queries):
            if name == shard.name:
                cosine[query, own[uid]] = -np.inf
        k = min(NEAREST, len(rows))
        best = np.argpartition(-cosine, k - 1, axis=1)[:, :k]
        return _Part(
            len(rows),
            {
                place: [
                    Near(float(cosine[query, i]), shard.name, str(rows.uid[i]), (rows.caption[i] or "")[:CUT])
                    for i in best[query]
                    if cosine[query, i] > -np.inf
                ]
                for query, place in enumerate(queries)
            },
        )
