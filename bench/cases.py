"""What is raced: a table of cases, one line each, and the choice among them.

A new row is one new line in `CASES`.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import replace

from bench.kinds import (
    AdditiveAttention,
    Attention,
    Case,
    CrossEntropy,
    Decode,
    FeedForward,
    Generation,
    Linear,
    Model,
    Norm,
    Rope,
    Varlen,
)

# Filled by hand, read by everyone: shape, what is switched on, whether it belongs to --quick.
CASES: tuple[Case, ...] = (
    # the real model first: the reason for the rest
    Model(weights="minilm", batch=1, seq=128, quick=True),
    Model(weights="minilm", batch=8, seq=128, quick=True),
    Model(weights="minilm", batch=16, quick=True),
    Model(weights="minilm", batch=32),
    Model(weights="minilm", batch=1, seq=512),
    Model(weights="minilm", batch=4, seq=128, backward=True, dropout=0.1, quick=True),
    Model(weights="minilm", batch=4, seq=128, backward=True, dropout=0.1, dtype="bfloat16"),
    Model(weights="bert-base", batch=1, seq=128),
    Model(weights="bert-base", batch=1, seq=128, dtype="bfloat16"),
    Model(weights="bert-base", batch=8, seq=128),
    Model(weights="bert-base", batch=1, seq=512),
    Model(weights="bert-base", batch=8, seq=128, backward=True, dropout=0.1),
    Model(weights="bert-base", batch=2, seq=512, backward=True, dropout=0.1),
    Generation(task="prefill", batch=1, seq=512),
    Generation(task="decode", batch=1, seq=512),
    Generation(task="decode", batch=1, seq=512, dtype="bfloat16"),
    # the lengths of T5's own pre-training (arXiv:1910.10683): a text, and what was cut out of it
    Generation(task="training", batch=2, seq=512, written=114, backward=True, dropout=0.1),
    # attention forward
    Attention(batch=1, heads=12, seq=512, head_dim=64, quick=True),
    Attention(batch=1, heads=12, seq=512, head_dim=64, causal=True, quick=True),
    Attention(batch=8, heads=12, seq=128, head_dim=64),
    Attention(batch=8, heads=12, seq=128, head_dim=64, causal=True),
    Attention(batch=8, heads=12, seq=128, head_dim=64, padding=True, quick=True),
    Attention(batch=1, heads=12, seq=2048, head_dim=64),
    Attention(batch=1, heads=12, seq=2048, head_dim=64, causal=True),
    Attention(batch=1, heads=8, seq=512, head_dim=128),
    Attention(batch=1, heads=8, seq=512, head_dim=128, causal=True),
    Attention(batch=1, heads=8, seq=2048, head_dim=128),
    Attention(batch=1, heads=8, seq=2048, head_dim=128, causal=True),
    Attention(batch=1, heads=8, seq=8192, head_dim=64),
    Attention(batch=1, heads=8, seq=8192, head_dim=64, causal=True),
    Attention(batch=1, heads=8, seq=8192, head_dim=128),
    Attention(batch=1, heads=8, seq=8192, head_dim=128, causal=True),
    Attention(batch=1, heads=1, seq=1, head_dim=8),
    Attention(batch=1, heads=12, seq=1024, head_dim=64, bias=True),
    Attention(batch=1, heads=12, seq=1024, head_dim=64, dtype="bfloat16"),
    Attention(batch=1, heads=12, seq=1024, head_dim=64, dtype="float16"),
    Varlen(batch=8, heads=12, seq=512, head_dim=64),
    Varlen(batch=8, heads=12, seq=512, head_dim=64, causal=True),
    # attention of few queries
    Decode(batch=1, heads=32, kv_heads=8, seq=4096, head_dim=128, quick=True),
    Decode(batch=8, heads=32, kv_heads=8, seq=4096, head_dim=128),
    Decode(batch=1, heads=32, kv_heads=8, seq=16384, head_dim=128),
    Decode(batch=8, heads=32, kv_heads=8, seq=16384, head_dim=128),
    Decode(batch=1, heads=32, kv_heads=8, seq=16384, head_dim=128, dtype="bfloat16"),
    Decode(batch=1, heads=32, kv_heads=8, seq=4096, head_dim=128, queries=5),
    Decode(batch=1, heads=32, kv_heads=8, seq=4096, head_dim=128, queries=256),
    Decode(batch=1, heads=6, kv_heads=6, seq=1500, head_dim=64, cached=False),
    Decode(batch=1, heads=32, kv_heads=8, seq=4096, head_dim=128, cached=False),
    # attention forward and backward
    Attention(batch=1, heads=12, seq=512, head_dim=64, backward=True, quick=True),
    Attention(batch=1, heads=12, seq=512, head_dim=64, causal=True, backward=True),
    Attention(batch=1, heads=12, seq=2048, head_dim=64, backward=True),
    Attention(batch=1, heads=12, seq=2048, head_dim=64, causal=True, backward=True),
    Attention(batch=1, heads=12, seq=1024, head_dim=64, backward=True, dtype="bfloat16"),
    Attention(batch=8, heads=12, seq=128, head_dim=64, padding=True, backward=True),
    Attention(batch=1, heads=12, seq=512, head_dim=64, dropout=0.1, backward=True, quick=True),
    Attention(batch=1, heads=12, seq=1024, head_dim=64, dropout=0.1, backward=True),
    Attention(batch=1, heads=12, seq=512, head_dim=64, bias=True, backward=True, quick=True),
    Attention(batch=1, heads=12, seq=1024, head_dim=64, bias=True, backward=True),
    Attention(batch=1, heads=12, seq=1024, head_dim=64, relative=True, backward=True),
    Attention(batch=1, heads=12, seq=1024, head_dim=64, value_dim=128, backward=True),
    Attention(batch=1, heads=8, seq=1024, head_dim=128, backward=True),
    Varlen(batch=8, heads=12, seq=512, head_dim=64, causal=True, backward=True),
    # additive attention
    AdditiveAttention(batch=8, heads=1, q_len=64, kv_len=128, head_dim=128),
    AdditiveAttention(
        batch=8, heads=1, q_len=64, kv_len=128, head_dim=128, backward=True, quick=True
    ),
    AdditiveAttention(batch=1, heads=4, q_len=512, kv_len=512, head_dim=64, backward=True),
    AdditiveAttention(batch=64, heads=1, q_len=1, kv_len=50, head_dim=256, backward=True),
    # norms
    Norm(kind="layer_norm", rows=1, cols=8),
    Norm(kind="layer_norm", rows=1, cols=16384),
    Norm(kind="layer_norm", rows=8192, cols=64),
    Norm(kind="layer_norm", rows=8192, cols=64, backward=True),
    Norm(kind="layer_norm", rows=64, cols=16384, backward=True),
    Norm(kind="layer_norm", rows=128, cols=768),
    Norm(kind="layer_norm", rows=512, cols=768),
    Norm(kind="layer_norm", rows=512, cols=768, backward=True),
    Norm(kind="layer_norm", rows=4096, cols=4096, quick=True),
    Norm(kind="layer_norm", rows=4096, cols=4096, backward=True),
    Norm(kind="rms_norm", rows=1, cols=16384),
    Norm(kind="rms_norm", rows=8192, cols=64),
    Norm(kind="rms_norm", rows=8192, cols=64, backward=True),
    Norm(kind="rms_norm", rows=64, cols=16384, backward=True),
    Norm(kind="rms_norm", rows=128, cols=768),
    Norm(kind="rms_norm", rows=4096, cols=4096, quick=True),
    Norm(kind="rms_norm", rows=4096, cols=4096, backward=True, quick=True),
    Norm(kind="rms_norm", rows=4096, cols=4096, dtype="bfloat16"),
    Norm(kind="add_layer_norm", rows=128, cols=768),
    Norm(kind="add_layer_norm", rows=4096, cols=768),
    Norm(kind="add_layer_norm", rows=4096, cols=768, backward=True),
    Norm(kind="add_layer_norm", rows=4096, cols=768, postnorm=True),
    Norm(kind="add_layer_norm", rows=4096, cols=768, dropout=0.1, backward=True, quick=True),
    Norm(kind="add_layer_norm", rows=4096, cols=768, dropout=0.1, postnorm=True, backward=True),
    Norm(kind="add_rms_norm", rows=4096, cols=4096),
    Norm(kind="add_rms_norm", rows=4096, cols=4096, dropout=0.1, backward=True),
    # rotary position embedding
    Rope(batch=1, heads=32, kv_heads=8, seq=512, head_dim=128),
    Rope(batch=1, heads=32, kv_heads=8, seq=2048, head_dim=128),
    Rope(batch=1, heads=32, kv_heads=8, seq=512, head_dim=128, backward=True),
    Rope(batch=1, heads=32, kv_heads=8, seq=512, head_dim=128, dtype="bfloat16"),
    # linear and feed-forward
    Linear(rows=1, width_in=8, width_out=8),
    Linear(rows=1, width_in=4096, width_out=16384),
    Linear(rows=4, width_in=4096, width_out=16384),
    Linear(rows=8, width_in=4096, width_out=16384),
    Linear(rows=1, width_in=4096, width_out=16384, dtype="bfloat16"),
    Linear(rows=128, width_in=768, width_out=768),
    Linear(rows=128, width_in=768, width_out=3072, activation="gelu", quick=True),
    Linear(rows=512, width_in=768, width_out=3072, activation="gelu", quick=True),
    Linear(rows=512, width_in=768, width_out=768),
    Linear(rows=512, width_in=3072, width_out=768),
    Linear(rows=128, width_in=4096, width_out=4096),
    Linear(rows=512, width_in=4096, width_out=4096),
    Linear(rows=512, width_in=4096, width_out=4096, backward=True),
    Linear(rows=512, width_in=768, width_out=3072, activation="gelu", backward=True),
    Linear(rows=512, width_in=768, width_out=3072, activation="gelu", dtype="bfloat16"),
    FeedForward(rows=128, width=768, hidden=3072, quick=True),
    FeedForward(rows=512, width=768, hidden=3072),
    FeedForward(rows=512, width=768, hidden=3072, backward=True),
    FeedForward(rows=512, width=768, hidden=3072, recompute=True, backward=True),
    FeedForward(rows=512, width=768, hidden=3072, dropout=0.1, backward=True),
    FeedForward(rows=128, width=768, hidden=2048, activation="silu", gated=True),
    FeedForward(rows=512, width=768, hidden=2048, activation="silu", gated=True),
    FeedForward(rows=512, width=768, hidden=2048, activation="silu", gated=True, backward=True),
    CrossEntropy(rows=512, width=768, classes=50257),
    CrossEntropy(rows=512, width=768, classes=50257, backward=True),
    CrossEntropy(rows=2048, width=576, classes=49152, backward=True),
)


def select(
    cases: Iterable[Case],
    *,
    quick: bool = False,
    only: Iterable[str] = (),
    dtypes: Iterable[str] = (),
) -> list[Case]:
    """The cases asked for, in table order.

    A pattern with * or ? is matched against the whole name, any other one anywhere in it.
    `dtypes` runs what is left in those data types instead of its own.
    Raises ValueError naming the pattern that matches nothing, with the nearest names.
    """
    chosen = [case for case in cases if case.quick or not quick]
    patterns = list(only)
    for pattern in patterns:
        if not any(_matches(case.name, pattern) for case in chosen):
            names = [case.name for case in chosen]
            parts = {part for name in names for part in (name, *name.split("/"))}
            near = difflib.get_close_matches(pattern, sorted(parts), n=3, cutoff=0.5)
            hint = f" (did you mean {', '.join(near)}?)" if near else ""
            among = f"{len(names)} {'quick ' if quick else ''}cases"
            raise ValueError(
                f"--only {pattern!r} matches none of the {among}{hint}; --list shows their names"
            )
    if patterns:
        chosen = [case for case in chosen if any(_matches(case.name, p) for p in patterns)]
    if dtypes:
        chosen = [replace(case, dtype=dtype) for case in chosen for dtype in dtypes]
    return list(dict.fromkeys(chosen))


def _matches(name: str, pattern: str) -> bool:
    pattern = pattern.lower()
    return fnmatch.fnmatchcase(name, pattern if set(pattern) & set("*?[") else f"*{pattern}*")
