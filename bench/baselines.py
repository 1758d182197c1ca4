"""The operations: each case's inputs, and how fastattn and PyTorch compute it.

Eager is PyTorch's own functions called one after the other, as a model's author would write them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import fastattn
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
from bench.work import SEED, Work, differentiate


class Recipe(NamedTuple):
    """Inputs by name, per provider the function that takes them, and the function that is exact.

    `kept` says what the dropout of a function of the inputs keeps; the oracle takes it as `keep`.
    """

    inputs: dict[str, Tensor | None]
    functions: dict[str, Callable[..., Any]]
    oracle: Callable[..., Any]
    kept: Callable[[Callable[..., Any], dict[str, Tensor | None]], Tensor] | None = None
    outputs: tuple[str, ...] = ("output", "sum")


Functions = dict[str, Callable[..., Any]]  # by provider


def build(
    case: Case, *, compiled: bool = False, extend: Callable[[Functions], Functions] = dict
) -> Work:
    """Make a case runnable on inputs drawn from a fixed seed, torch.compile included if wanted.

    `extend` makes further providers of an operation's functions.
    Raises `UnavailableError` where a package that the case needs is missing.
    """
    if isinstance(case, Model):
        from bench import models  # here, as only these cases need transformers

        return models.build(case, compiled=compiled)
    if isinstance(case, Generation):
        from bench import language

        return language.build(case, compiled=compiled)
    torch.manual_seed(SEED)
    inputs, functions, oracle, kept, results = RECIPES[type(case)](case)
    dtype = getattr(torch, case.dtype)
    inputs = {name: leaf(value, dtype, case.backward) for name, value in inputs.items()}
    if compiled:
        functions["compile"] = torch.compile(functions["eager"], dynamic=False)
    functions = functions | extend(functions)
    with torch.no_grad():  # by the rival that needs least memory
        outputs = functions.get("sdpa", functions["eager"])(**inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    cotangents = [torch.randn_like(out) for out in outputs] if case.backward else None
    leaves = [name for name, value in inputs.items() if value is not None and value.requires_grad]

    @functools.cache
    def computed(dtype: torch.dtype, provider: str | None) -> tuple[Tensor, ...]:
        fresh = {name: leaf(value, dtype, case.backward) for name, value in inputs.items()}
        if provider is not None:
            fresh["keep"] = kept(functions[provider], inputs)
        wide = cotangents and [c.to(torch.promote_types(c.dtype, dtype)) for c in cotangents]
        return differentiate(oracle, fresh, wide)

    def exact(provider: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return computed(dtype, provider if case.dropout else None)

    return Work(
        calls={
            provider: functools.partial(differentiate, function, inputs, cotangents)
            for provider, function in functions.items()
        },
        exact=exact,
        names=[*results[: len(outputs)], *(f"gradient of {name}" for name in leaves)],
        outputs=len(outputs),
        random=case.dropout > 0,
    )


def leaf(value: Tensor | None, dtype: torch.dtype, backward: bool) -> Tensor | None:
    """A floating tensor in `dtype`, wanting a gradient in a backward case; others as they are."""
    if value is None or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(backward)


def attention(case: Attention) -> Recipe:
    """query and key (B, H, S, D), value (B, H, S, Dv), mask (B, 1, 1, S), bias (1, H, S, S) or
    (1, H, 2 S - 1), of which the rivals make a matrix.
    """
    value_dim = case.head_dim if case.value_dim is None else case.value_dim
    inputs = {
        name: torch.randn(case.batch, case.heads, case.seq, width)
        for name, width in (("query", case.head_dim), ("key", case.head_dim), ("value", value_dim))
    }
    inputs["bias"] = torch.randn(1, case.heads, case.seq, case.seq) if case.bias else None
    if case.relative:
        inputs["bias"] = torch.randn(1, case.heads, 2 * case.seq - 1)
    kind = "relative_bias" if case.relative else "bias"
    inputs["mask"] = None
    if case.padding:  # [B, 1, 1, S]
        inputs["mask"] = torch.arange(case.seq) < torch.tensor(case.lengths)[:, None, None, None]
    triangle = None
    if case.causal:  # models build it once, so eager is not charged for it
        triangle = torch.ones(case.seq, case.seq, dtype=torch.bool).tril()

    def fused(query, key, value, bias, mask):
        options = {kind: bias, "mask": mask, "causal": case.causal, "dropout_p": case.dropout}
        return fastattn.attention(query, key, value, **options)

    def matrix(bias):
        return bias.unfold(-1, case.seq, 1).flip(-2) if case.relative else bias

    def eager(query, key, value, bias, mask, keep=None):
        scores = query @ key.transpose(-1, -2) * case.head_dim**-0.5  # [B, H, S, S]
        if bias is not None:
            scores = scores + matrix(bias)
        for seen in (mask, triangle):
            if seen is not None:
                scores = scores.masked_fill(~seen, float("-inf"))
        weights = scores.softmax(-1)
        if keep is not None:
            weights = weights * keep / (1 - case.dropout)
        elif case.dropout:
            weights = F.dropout(weights, case.dropout)
        return weights @ value

    def sdpa(query, key, value, bias, mask):
        added = mask if bias is None else matrix(bias)
        return F.scaled_dot_product_attention(
            query, key, value, added, dropout_p=case.dropout, is_causal=case.causal
        )

    def by_head(query, key, value, bias, mask, keep=None):
        """`eager`, one head after the other, so that the oracle's S x S matrices fit in memory."""
        heads = [
            [
                tensor if tensor is None or tensor.shape[1] == 1 else tensor[:, [head]]
                for tensor in (query, key, value, bias, mask, keep)
            ]
            for head in range(case.heads)
        ]
        return torch.cat([checkpoint(eager, *one, use_reentrant=False) for one in heads], 1)

    functions = {"fused": fused, "eager": eager, "sdpa": sdpa}
    return Recipe(inputs, functions, by_head, kept_weights)


def varlen(case: Varlen) -> Recipe:
    """query, key and value (rows, H, D) of all sequences; SDPA pads them, and is charged for it."""
    shape = (sum(case.lengths), case.heads, case.head_dim)
    inputs = {name: torch.randn(shape) for name in ("query", "key", "value")}
    ends = torch.tensor([0, *case.lengths]).cumsum(0)
    inside = torch.arange(max(case.lengths)) < torch.tensor(case.lengths)[:, None]  # [B, S]
    triangle = torch.ones(case.seq, case.seq, dtype=torch.bool).tril()
    places = inside.nonzero(as_tuple=True)  # found once: on a GPU, finding them waits for it
    mask = inside[:, None, None] & (triangle if case.causal else True)

    def fused(query, key, value):
        return fastattn.attention_varlen(query, key, value, ends, ends, causal=case.causal)

    def eager(query, key, value):
        outs = []
        for tensors in zip(*(t.split(case.lengths) for t in (query, key, value)), strict=True):
            rows, keys, values = (t.transpose(0, 1) for t in tensors)  # [H, S, D]
            scores = rows @ keys.transpose(-1, -2) * case.head_dim**-0.5
            if case.causal:
                length = rows.shape[1]
                scores = scores.masked_fill(~triangle[:length, :length], float("-inf"))
            outs.append((scores.softmax(-1) @ values).transpose(0, 1))
        return torch.cat(outs)

    def sdpa(query, key, value):
        padded = (
            pad_sequence(t.split(case.lengths), batch_first=True).transpose(1, 2)
            for t in (query, key, value)
        )
        return F.scaled_dot_product_attention(*padded, mask).transpose(1, 2)[places]

    return Recipe(inputs, {"fused": fused, "eager": eager, "sdpa": sdpa}, eager)


def decode(case: Decode) -> Recipe:
    """query (B, H, Q, D), and keys and values (B, Hkv, S, D), which fill a cache; the last Q keys
    are the queries' own, which see no later one.
    """
    cache = (case.batch, case.kv_heads, case.seq, case.head_dim)
    inputs = {
        "query": torch.randn(case.batch, case.heads, case.queries, case.head_dim),
        "key": torch.randn(cache),
        "value": torch.randn(cache),
    }
    lengths = torch.full((case.batch,), case.seq)
    causal = case.queries > 1
    seen = torch.ones(case.queries, case.seq, dtype=torch.bool).tril(case.seq - case.queries)

    def fused(query, key, value):
        if case.cached:
            return fastattn.attention_decode(
                query, key, value, cache_seqlens=lengths, causal=causal
            )
        return fastattn.attention(query, key, value, causal=causal)

    def eager(query, key, value):
        key, value = (t.repeat_interleave(case.heads // case.kv_heads, 1) for t in (key, value))
        scores = query @ key.transpose(-1, -2) * case.head_dim**-0.5  # [B, H, Q, S]
        if causal:
            scores = scores.masked_fill(~seen, -math.inf)
        return scores.softmax(-1) @ value

    def sdpa(query, key, value):
        mask = seen if causal else None
        return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)

    return Recipe(inputs, {"fused": fused, "eager": eager, "sdpa": sdpa}, eager)


def additive_attention(case: AdditiveAttention) -> Recipe:
    """query (B, H, Sq, D), key and value (B, H, Sk, D), weight (H, D)."""
    lead = (case.batch, case.heads)
    inputs = {
        "query": torch.randn(*lead, case.q_len, case.head_dim),
        "key": torch.randn(*lead, case.kv_len, case.head_dim),
        "value": torch.randn(*lead, case.kv_len, case.head_dim),
        "weight": torch.randn(case.heads, case.head_dim) * case.head_dim**-0.5,
    }

    def eager(query, key, value, weight):
        features = torch.tanh(query[:, :, :, None] + key[:, :, None])  # [B, H, Sq, Sk, D]
        scores = features @ weight[:, None, :, None]  # [B, H, Sq, Sk, 1]
        return scores.squeeze(-1).softmax(-1) @ value

    return Recipe(inputs, {"fused": fastattn.additive_attention, "eager": eager}, eager)


def kept_weights(function: Callable[..., Tensor], inputs: dict[str, Tensor | None]) -> Tensor:
    """Bool [B, H, S, S]: which weights the dropout of `function` keeps under the seed.

    Read off its own output: with columns of the identity as values it returns the weights. The
    values keep their shape, so the very code that is timed draws the mask.
    """
    value = inputs["value"]
    seq, width = value.shape[-2:]
    identity = F.pad(torch.eye(seq, dtype=value.dtype), (0, -seq % width))
    weights = []
    for columns in identity.split(width, -1):  # [S, D]
        probe = columns.expand(value.shape).contiguous().requires_grad_(value.requires_grad)
        torch.manual_seed(SEED)
        with torch.set_grad_enabled(value.requires_grad):
            weights.append(function(**{**inputs, "value": probe}).detach())
    return torch.cat(weights, -1)[..., :seq] != 0


def norm(case: Norm) -> Recipe:
    """input (and residual) (rows, cols), with weight and bias (cols)."""
    shape = (case.cols,)
    inputs = {"input": torch.randn(case.rows, case.cols)}
    if case.residual:
        inputs["residual"] = torch.randn(case.rows, case.cols)
    inputs["weight"] = 1 + 0.1 * torch.randn(shape)
    if case.kind.endswith("layer_norm"):
        inputs["bias"] = 0.1 * torch.randn(shape)
    plain = F.layer_norm if case.kind.endswith("layer_norm") else F.rms_norm
    kernel = getattr(fastattn, case.kind)

    def fused(input, *, residual=None, **affine):
        if residual is None:
            return kernel(input, shape, eps=1e-5, **affine)
        options = {"dropout_p": case.dropout, "return_sum": not case.postnorm}
        return kernel(input, residual, shape, eps=1e-5, **affine, **options)

    def eager(input, *, residual=None, keep=None, **affine):
        if residual is None:
            return plain(input, shape, eps=1e-5, **affine)
        if keep is not None:
            input = input * keep / (1 - case.dropout)
        elif case.dropout:
            input = F.dropout(input, case.dropout)
        summed = residual + input
        out = plain(summed, shape, eps=1e-5, **affine)
        return out if case.postnorm else (out, summed)

    return Recipe(inputs, {"fused": fused, "eager": eager}, eager, kept_elements)


def kept_elements(function: Callable[..., Any], inputs: dict[str, Tensor | None]) -> Tensor:
    """Bool (rows, cols): which elements the dropout of `function` keeps under the seed.

    Read off the norm of ones that were dropped or not, plus zeros: what is kept lies above the
    mean of its row.
    """
    probe = {"input": torch.ones_like(inputs["input"])}
    probe["residual"] = torch.zeros_like(inputs["input"])
    torch.manual_seed(SEED)
    out = function(**inputs | probe)
    normed = (out if isinstance(out, Tensor) else out[0]).detach()
    affine = [inputs.get(name) for name in ("weight", "bias")]
    weight, bias = (0 if t is None else t.detach() for t in affine)
    return (normed - bias) / weight > 0


def rope(case: Rope) -> Recipe:
    """query (B, H, S, D) and key (B, Hkv, S, D), which lie in memory as (B, S, H, D)."""
    shapes = {"query": case.heads, "key": case.kv_heads}
    inputs = {
        name: torch.randn(case.batch, case.seq, heads, case.head_dim).transpose(1, 2)
        for name, heads in shapes.items()
    }
    frequencies = 10000 ** -(torch.arange(0, case.head_dim, 2) / case.head_dim)
    angles = torch.arange(case.seq)[:, None] * frequencies  # [S, D / 2]
    tables = angles.cos(), angles.sin()
    doubled = [torch.cat((table, table), -1) for table in tables]  # as transformers holds them

    def fused(query, key):
        return fastattn.apply_rope(query, key, *tables)

    def rotate_half(x):
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

    def eager(query, key):
        cos, sin = (table.to(query.dtype) for table in doubled)
        return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin

    names = ("query", "key")
    return Recipe(inputs, {"fused": fused, "eager": eager}, eager, outputs=names)


ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def projection(width_in: int, width_out: int) -> Tensor:
    """A weight (width_out, width_in) that keeps the scale of what it is applied to."""
    return torch.randn(width_out, width_in) * width_in**-0.5


def linear(case: Linear) -> Recipe:
    """input (rows, width_in), weight (width_out, width_in), bias (width_out)."""
    inputs = {
        "input": torch.randn(case.rows, case.width_in),
        "weight": projection(case.width_in, case.width_out),
        "bias": 0.1 * torch.randn(case.width_out),
    }

    def fused(input, weight, bias):
        return fastattn.linear(input, weight, bias, activation=case.activation)

    def eager(input, weight, bias):
        return ACTIVATIONS[case.activation](F.linear(input, weight, bias))

    return Recipe(inputs, {"fused": fused, "eager": eager}, eager)


def feed_forward(case: FeedForward) -> Recipe:
    """input (rows, width) and the weights of two projections, or of three where gated."""
    inputs = {
        "input": torch.randn(case.rows, case.width),
        "up_weight": projection(case.width, case.hidden),
        "down_weight": projection(case.hidden, case.width),
    }
    if case.gated:  # without biases, as LLaMA has it
        inputs["gate_weight"] = projection(case.width, case.hidden)
    else:
        inputs["up_bias"] = 0.1 * torch.randn(case.hidden)
        inputs["down_bias"] = 0.1 * torch.randn(case.width)
    options = {"activation": case.activation, "dropout_p": case.dropout}
    fused = functools.partial(fastattn.ffn, **options, recompute=case.recompute)
    activation = ACTIVATIONS[case.activation]

    def eager(
        input, up_weight, down_weight, gate_weight=None, up_bias=None, down_bias=None, keep=None
    ):
        hidden = F.linear(input, up_weight, up_bias)
        if gate_weight is None:
            hidden = activation(hidden)
        else:
            hidden = activation(F.linear(input, gate_weight)) * hidden
        if keep is not None:
            hidden = hidden * keep / (1 - case.dropout)
        elif case.dropout:
            hidden = F.dropout(hidden, case.dropout)
        return F.linear(hidden, down_weight, down_bias)

    return Recipe(inputs, {"fused": fused, "eager": eager}, eager, kept_hidden)


def kept_hidden(function: Callable[..., Tensor], inputs: dict[str, Tensor | None]) -> Tensor:
    """Bool (rows, hidden): which elements the dropout of `function` keeps under the seed.

    Read off its own output, where rows of the identity as the last weight let them out.
    """
    ones = {name: torch.ones_like(tensor) for name, tensor in inputs.items()}
    ones["down_bias"] = torch.zeros(len(inputs["down_weight"]))
    identity = torch.eye(inputs["down_weight"].shape[1])
    width, hidden = inputs["down_weight"].shape
    kept = []
    for rows in F.pad(identity, (0, 0, 0, -hidden % width)).split(width):  # (width, hidden)
        torch.manual_seed(SEED)
        kept.append(function(**ones | {"down_weight": rows}).detach())
    return torch.cat(kept, -1)[:, :hidden] != 0


def cross_entropy(case: CrossEntropy) -> Recipe:
    """input (rows, width), weight (classes, width), and a class for each row."""
    inputs = {
        "input": torch.randn(case.rows, case.width),
        "weight": projection(case.width, case.classes),
        "target": torch.randint(case.classes, (case.rows,)),
    }

    def fused(input, weight, target):
        return fastattn.linear_cross_entropy(input, weight, target)

    def eager(input, weight, target):
        logits = F.linear(input, weight)
        wide = torch.promote_types(logits.dtype, torch.float32)  # as transformers takes the loss
        return F.cross_entropy(logits.to(wide), target)

    return Recipe(inputs, {"fused": fused, "eager": eager}, eager, outputs=("loss",))


RECIPES: dict[type[Case], Callable[[Any], Recipe]] = {
    Attention: attention,
    Varlen: varlen,
    Decode: decode,
    AdditiveAttention: additive_attention,
    Norm: norm,
    Rope: rope,
    Linear: linear,
    FeedForward: feed_forward,
    CrossEntropy: cross_entropy,
}
