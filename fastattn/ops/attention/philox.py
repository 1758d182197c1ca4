"""The dropout mask of attention: counter-based random bits, the same on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

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
    seed: Tensor,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    dropout_p: float,
    first_head: int = 0,
) -> Tensor:
    """Bool [batch, heads, q_len, kv_len], True = kept, from a seed of one int64.

    Heads are counted over the batch, from `first_head` on.
    """
    seed = seed.reshape(())
    key = torch.arange(kv_len, device=seed.device)
    row = torch.arange(q_len, device=seed.device)
    head = torch.arange(batch * heads, device=seed.device) + first_head
    words = philox_4x32_10(
        [
            (key // BLOCK * LANES + key % LANES)[None, None],
            row[None, :, None],
            head[:, None, None],
            torch.zeros_like(row)[None, :, None],
        ],
        [seed & MASK32, seed >> 32 & MASK32],
    )
    bits = torch.stack(torch.broadcast_tensors(*words))  # [4, batch * heads, q_len, kv_len]
    choice = (key % BLOCK // LANES).expand(1, *bits.shape[1:])
    bits = bits.gather(0, choice).squeeze(0)
    return (bits >= threshold(dropout_p)).view(batch, heads, q_len, kv_len)
