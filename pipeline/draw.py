"""Randomness as a function of (seed, spec, uid): never of order, worker count or sharding (design, promise 1)."""

import hashlib

import numpy as np


def hash64(seed: int, spec: str, uid: str) -> int:
    """A uniform 64-bit number. An exact dose of n takes the n samples with the smallest."""
    blob = f"{seed}\0{spec}\0{uid}".encode()
    return int.from_bytes(hashlib.blake2b(blob, digest_size=8).digest(), "big")


def generator(seed: int, spec: str, uid: str) -> np.random.Generator:
    """Random numbers of one sample under one spec; independent of `hash64` by its own key."""
    blob = f"{seed}\0{spec}\0{uid}".encode()
    return np.random.default_rng(
        int.from_bytes(hashlib.blake2b(blob, digest_size=16, key=b"generator").digest(), "big")
    )
