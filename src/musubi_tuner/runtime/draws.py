"""Randomness by name: what an item draws depends on the seed, the epoch and the item, never on the process or the batch it is in.

So that resuming, another number of processes, or a preview in between change nothing.
"""

import hashlib

import torch


def generator_for(seed: int, *names: object) -> torch.Generator:
    """A CPU generator whose state is a hash of `seed` and `names`."""
    return torch.Generator().manual_seed(seed_for(seed, *names))


def seed_for(seed: int, *names: object) -> int:
    """A hash of `seed` and `names`, for a generator of any device."""
    text = "|".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "little") & (2**63 - 1)


def uniform(generator: torch.Generator) -> float:
    """A number from 0 up to, but not including, 1."""
    return torch.rand((), generator=generator, dtype=torch.float64).item()
