"""What a detector learns from the pool, once a process and not once a shard: the pool of a run is that of every shard.

Trade-off: the last few are held in memory, whoever asks for them again or not.
"""

from collections.abc import Callable, Hashable
from typing import TypeVar

from filters._batch import Batch, Drawn

KEPT = 16
T = TypeVar("T")

_learnt: dict[tuple[Drawn, Hashable], object] = {}


def learnt(pool: Batch, what: Hashable, make: Callable[[], T]) -> T:
    """`make()`, remembered for pools of the same digests; `what` tells it from what others learn: the detector, say.

    A pool whose digests nobody has told is learnt from anew.
    """
    if not pool.drawn.digests:
        return make()
    key = (pool.drawn, what)
    made = _learnt.pop(key) if key in _learnt else make()
    _learnt[key] = made  # the last used is the last to go
    while len(_learnt) > KEPT:
        del _learnt[next(iter(_learnt))]
    return made  # type: ignore[return-value]  # what was put under the key
