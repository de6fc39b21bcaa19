"""Purpose and numbers → a generator's seed: streams of random numbers part here. Used wherever noise is drawn."""

from __future__ import annotations

import hashlib


def stream_seed(purpose: str, *numbers: int) -> int:
    """The seed of the stream that `purpose` and `numbers` (a user's seed, a row, a step) name: 0 ≤ seed < 2^63.

    Hashed, never added or multiplied: torch's CPU generator reads the low 32 bits of a seed alone, so that seeds which
    differ above them, or sums of two numbers, would give two purposes the same noise. Any 32 of these bits will do.
    """
    text = "\0".join([purpose, *(str(int(number)) for number in numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
