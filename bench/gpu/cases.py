"""What is raced on a GPU: a table of cases, one line each, in groups with a table of their own."""

from __future__ import annotations

from dataclasses import replace

from bench.kinds import Attention, Case, CrossEntropy, Decode, FeedForward, Linear, Norm, Varlen

CALLS = "A call from Python"


def bf16(*cases: Case) -> tuple[Case, ...]:
    """The same in bf16."""
    return tuple(replace(case, dtype="bfloat16") for case in cases)


def trained(*cases: Case) -> tuple[Case, ...]:
    """The same forward and backward."""
    return tuple(replace(case, backward=True) for case in cases)


def both(*cases: Case) -> tuple[Case, ...]:
    """Each forward, and then forward and backward."""
    return tuple(each for case in cases for each in (case, *trained(case)))


def attention(seq: int, head_dim: int, *, causal: bool = False) -> Attention:
    """16384 tokens with heads of 2048 features in all."""
    return Attention(
        batch=16384 // seq, heads=2048 // head_dim, seq=seq, head_dim=head_dim, causal=causal
    )


GROUPS: dict[str, tuple[Case, ...]] = {
    "Attention, forward": (
        *bf16(
            attention(512, 64),
            attention(2048, 64),
            attention(2048, 64, causal=True),
            attention(8192, 64, causal=True),
            attention(512, 128, causal=True),
            attention(2048, 128),
            attention(2048, 128, causal=True),
            attention(8192, 128),
            attention(8192, 128, causal=True),
            attention(512, 256),
            attention(2048, 256),
            attention(8192, 256, causal=True),
            Varlen(batch=8, heads=16, seq=2048, head_dim=64),
        ),
        Attention(batch=4, heads=16, seq=2048, head_dim=64),
        Attention(batch=4, heads=16, seq=2048, head_dim=128, causal=True),
    ),
    "Attention, forward and backward": trained(
        *bf16(
            attention(2048, 64),
            attention(2048, 64, causal=True),
            attention(2048, 128),
            attention(2048, 128, causal=True),
            attention(8192, 128, causal=True),
            attention(2048, 256, causal=True),
            Attention(batch=4, heads=16, seq=2048, head_dim=64, dropout=0.1),
            Attention(batch=4, heads=16, seq=2048, head_dim=64, bias=True),
            Varlen(batch=8, heads=16, seq=2048, head_dim=64, causal=True),
        ),
        Attention(batch=4, heads=16, seq=2048, head_dim=64),
    ),
    "Attention of one query": bf16(
        Decode(batch=1, heads=32, kv_heads=8, seq=4096, head_dim=128),
        Decode(batch=8, heads=32, kv_heads=8, seq=8192, head_dim=128),
        Decode(batch=64, heads=32, kv_heads=8, seq=2048, head_dim=128),
        Decode(batch=8, heads=12, kv_heads=12, seq=1024, head_dim=64),
    ),
    "Norms": both(
        *bf16(
            *(
                Norm(kind=kind, rows=rows, cols=cols)
                for kind in ("layer_norm", "rms_norm", "add_layer_norm")
                for rows, cols in ((16384, 1024), (16384, 4096), (65536, 768), (2048, 16384))
            )
        )
    ),
    "Linear and FFN": (
        *bf16(
            Linear(rows=4096, width_in=768, width_out=3072, activation="gelu"),
            Linear(rows=16384, width_in=1024, width_out=4096, activation="gelu"),
            Linear(rows=512, width_in=4096, width_out=4096),
            *both(
                Linear(rows=8192, width_in=3072, width_out=768),
                Linear(rows=4096, width_in=4096, width_out=4096),
                Linear(rows=8192, width_in=8192, width_out=8192),
                FeedForward(rows=8192, width=768, hidden=3072),
            ),
            FeedForward(rows=4096, width=4096, hidden=11008, activation="silu", gated=True),
            *trained(CrossEntropy(rows=8192, width=768, classes=50257)),
        ),
        Linear(rows=4096, width_in=768, width_out=3072, activation="gelu"),
    ),
    CALLS: bf16(
        Norm(kind="layer_norm", rows=1, cols=8),
        Attention(batch=1, heads=1, seq=1, head_dim=8),
        Linear(rows=1, width_in=8, width_out=8),
    ),
}
