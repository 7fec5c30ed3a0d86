"""Uniform numbers as a function of seeds and uids, for many pairs at once: never of order or worker count.

Trade-off: `pipeline.draw` hashes a uid with blake2b, a microsecond each; this mixes the bits of a whole epoch in
milliseconds, and is no cryptographic hash.
"""

import numpy as np

# The salts, so that no two draws share one. The order of an epoch is mix(uid, seed, epoch), epochs count from 1.
BEFORE = 0  # in the place of the epoch: what is drawn once a run
POOL = 1  # after (seed, BEFORE)
PIXELS, DEFENSE = 2, 3  # after (seed, epoch): the keys of the recipe's augmentation, and those of a defense's
SECOND_VIEW, CROP, JITTER, NOISE, NOISE_ANGLE, CUTOUT = 1, 11, 12, 13, 14, 15  # after a defense's key


def mix(keys: np.ndarray, *salts: int) -> np.ndarray:
    """uint64[n] -> uint64[n], uniform: the finaliser of splitmix64 (Steele, Lea & Flood 2014), once a salt."""
    with np.errstate(over="ignore"):
        for salt in (*salts, 0):
            keys = keys + np.uint64((salt * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
            keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            keys = keys ^ (keys >> np.uint64(31))
    return keys


def keys_of(uid: np.ndarray) -> np.ndarray:
    """The 128-bit hex uids, ASCII [n], folded to uint64[n]."""
    raw = np.frombuffer(bytes.fromhex(b"".join(uid.tolist()).decode()), ">u8").reshape(-1, 2).astype(np.uint64)
    return raw[:, 0] ^ mix(raw[:, 1], 1)
