"""The operations: each case's inputs, and how fastattn and PyTorch compute it.

Eager is PyTorch's own functions called one after the other, as a model's author would write them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastattn
from bench.cases import AdditiveAttention, Attention, Case, FeedForward, Linear, Model, Norm
from bench.work import SEED, Work, differentiate


class Recipe(NamedTuple):
    """Inputs by name, per provider the function that takes them, and the function that is exact."""

    inputs: dict[str, Tensor | None]
    functions: dict[str, Callable[..., Any]]
    oracle: Callable[..., Any]


def build(case: Case, *, compiled: bool = False) -> Work:
    """Make a case runnable on inputs drawn from a fixed seed, torch.compile included if wanted.

    Raises `UnavailableError` where a package that the case needs is missing.
    """
    if isinstance(case, Model):
        from bench import models  # here, as only these cases need transformers

        return models.build(case, compiled=compiled)
    torch.manual_seed(SEED)
    inputs, functions, oracle = RECIPES[type(case)](case)
    dtype = getattr(torch, case.dtype)
    inputs = {name: leaf(value, dtype, case.backward) for name, value in inputs.items()}
    if compiled:
        functions["compile"] = torch.compile(functions["eager"], dynamic=False)
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
        return differentiate(oracle, fresh, cotangents and [c.to(dtype) for c in cotangents])

    def exact(provider: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return computed(dtype, provider if case.dropout else None)

    return Work(
        calls={
            provider: functools.partial(differentiate, function, inputs, cotangents)
            for provider, function in functions.items()
        },
        exact=exact,
        names=["output", "sum"][: len(outputs)] + [f"gradient of {name}" for name in leaves],
        outputs=len(outputs),
        random=case.dropout > 0,
    )


def leaf(value: Tensor | None, dtype: torch.dtype, backward: bool) -> Tensor | None:
    """A floating tensor in `dtype`, wanting a gradient in a backward case; others as they are."""
    if value is None or not value.is_floating_point():
        return value
    return value.detach().to(dtype).requires_grad_(backward)


def attention(case: Attention) -> Recipe:
    """query, key and value (B, H, S, D), with a mask (B, 1, 1, S) or a bias (1, H, S, S)."""
    shape = (case.batch, case.heads, case.seq, case.head_dim)
    inputs = {name: torch.randn(shape) for name in ("query", "key", "value")}
    inputs["bias"] = torch.randn(1, case.heads, case.seq, case.seq) if case.bias else None
    inputs["mask"] = None
    if case.padding:  # [B, 1, 1, S]
        inputs["mask"] = torch.arange(case.seq) < torch.tensor(case.lengths)[:, None, None, None]
    triangle = None
    if case.causal:  # models build it once, so eager is not charged for it
        triangle = torch.ones(case.seq, case.seq, dtype=torch.bool).tril()

    def fused(query, key, value, bias, mask):
        return fastattn.attention(
            query, key, value, bias=bias, mask=mask, causal=case.causal, dropout_p=case.dropout
        )

    def eager(query, key, value, bias, mask, keep=None):
        scores = query @ key.transpose(-1, -2) * case.head_dim**-0.5  # [B, H, S, S]
        if bias is not None:
            scores = scores + bias
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
        added = mask if bias is None else bias
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

    return Recipe(inputs, {"fused": fused, "eager": eager, "sdpa": sdpa}, by_head)


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


def kept(function: Callable[..., Tensor], inputs: dict[str, Tensor | None]) -> Tensor:
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
        added = () if residual is None else (residual,)
        return kernel(input, *added, shape, eps=1e-5, **affine)

    def eager(input, *, residual=None, **affine):
        if residual is None:
            return plain(input, shape, eps=1e-5, **affine)
        summed = input + residual
        return plain(summed, shape, eps=1e-5, **affine), summed

    return Recipe(inputs, {"fused": fused, "eager": eager}, eager)


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
    fused = functools.partial(fastattn.ffn, activation=case.activation)
    activation = ACTIVATIONS[case.activation]

    def eager(input, up_weight, down_weight, gate_weight=None, up_bias=None, down_bias=None):
        hidden = F.linear(input, up_weight, up_bias)
        if gate_weight is None:
            hidden = activation(hidden)
        else:
            hidden = activation(F.linear(input, gate_weight)) * hidden
        return F.linear(hidden, down_weight, down_bias)

    return Recipe(inputs, {"fused": fused, "eager": eager}, eager)


RECIPES: dict[type[Case], Callable[[Any], Recipe]] = {
    AdditiveAttention: additive_attention,
    Attention: attention,
    Norm: norm,
    Linear: linear,
    FeedForward: feed_forward,
}
