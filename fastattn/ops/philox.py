"""The random bits of dropout: counted by position, the same on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import checks

MASK32 = 0xFFFFFFFF
BLOCK, LANES = 64, 16  # one counter serves the keys lane, lane + 16, lane + 32, lane + 48 of 64


def threshold(dropout_p: float) -> int:
    """A position is dropped when its 32 random bits are below this."""
    return min(round(dropout_p * 2**32), MASK32)


def philox_4x32_10(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox 4x32 with ten rounds (Salmon et al. 2011); int64 tensors holding 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32) & MASK32 ^ c1 ^ k0,
            product1 & MASK32,
            (product0 >> 32) & MASK32 ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return [c0, c1, c2, c3]


def keep(
    seed: Tensor, heads: int, rows: int, keys: int, dropout_p: float, first_head: int = 0
) -> Tensor:
    """Bool [heads, rows, keys], True = kept, of heads from the first on; the seed is one int64."""
    seed = seed.reshape(())
    blocks = (keys + BLOCK - 1) // BLOCK
    counter = torch.arange(blocks * LANES, device=seed.device)
    row = torch.arange(rows, device=seed.device)
    head = torch.arange(heads, device=seed.device) + first_head
    words = philox_4x32_10(
        [
            counter[None, None],
            row[None, :, None],
            head[:, None, None],
            torch.zeros_like(row)[None, :, None],
        ],
        [seed & MASK32, seed >> 32 & MASK32],
    )
    words = [word.unflatten(-1, (blocks, LANES)) for word in torch.broadcast_tensors(*words)]
    bits = torch.stack(words, -2).flatten(-3)  # [heads, rows, blocks * BLOCK]
    return bits[..., :keys] >= threshold(dropout_p)


def unused(dropout_p: float, seed: int | Tensor | None) -> bool:
    """Whether these certainly ask for no dropout."""
    return seed is None and type(dropout_p) in (float, int) and dropout_p == 0


def checked_seed(
    dropout_p: float, seed: int | Tensor | None, device: torch.device
) -> Tensor | None:
    """The seed as one int64, None without dropout; torch's generator draws one where None is given.

    Raises:
        TypeError, ValueError: `dropout_p` is no probability, or `seed` no seed or of no use.
    """
    checks.finite("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    if dropout_p == 0:
        if seed is not None:
            raise ValueError("seed is of use only with dropout_p > 0, got dropout_p = 0")
        return None
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed must hold one int64 on {device}, got {seed.numel()} of {seed.dtype} "
                f"on {seed.device}"
            )
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, an int64 tensor or None, got {type(seed).__name__}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2**63), got {seed}")
    # By a kernel, not by a copy from the host, which a CUDA graph could not hold.
    return torch.full((1,), seed, dtype=torch.int64, device=device)
