"""Random calls of every function against the oracle: shapes, strides, features, dtypes, ISAs.

`pytest tests/test_fuzz.py --fuzz-cases 50000` draws more, and others in every run; without it the
calls are always the same. A failure prints the smallest call that shows it, and how to replay it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, bfloat16, float16, float32, float64

import fastattn
from fastattn import _library
from fastattn.testing import (
    LAYOUTS,
    Case,
    Draw,
    assert_results_close_to_oracle,
    eager_and_oracle,
    laid_out,
    largest_errors,
    numbers,
    poisoned,
    run,
    use_isa,
    use_threads,
    widened,
)

RUNNABLE = [name for name, runs in _library.isas().items() if runs]
pytestmark = pytest.mark.skipif(not RUNNABLE, reason=f"no compiled library: {_library.WHY_NOT}")

# Ones, primes, and what lies around the sizes of vectors, tiles and blocks.
SIZES = [1, 2, 3, 4, 5, 7, 8, 11, 12, 13, 15, 16, 17, 23, 31, 32, 33, 37, 47, 48, 49, 61, 63, 64]
SIZES += [65, 80, 95, 96, 97, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300]
SHARES = {
    "attention": 0.3,
    "attention_varlen": 0.1,
    "attention_decode": 0.1,
    "scaled_dot_product_attention": 0.07,
    "additive_attention": 0.1,
    "layer_norm": 0.04,
    "add_layer_norm": 0.04,
    "rms_norm": 0.04,
    "add_rms_norm": 0.04,
    "linear": 0.05,
    "linear_cross_entropy": 0.04,
    "ffn": 0.05,
    "apply_rope": 0.03,
}
assert math.isclose(sum(SHARES.values()), 1)


@dataclass(frozen=True)
class Call:
    """A call with all that decides its result; the name of the case is the seed of its values."""

    case: Case
    dtype: torch.dtype
    layouts: Mapping[str, str]
    isa: str
    threads: int


# what is drawn; simpler choices first, for these are what a failure is shrunk to


def size(limit: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in SIZES if n <= max(1, limit)])


def seldom(*values: Any) -> st.SearchStrategy[Any]:
    """None in two of three draws, else one of the values."""
    return st.one_of(st.none(), st.none(), st.sampled_from(values))


@st.composite
def broadcast(draw: st.DrawFn, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to `sizes`, at times with fewer dimensions."""
    shape = tuple(draw(st.sampled_from((n, 1))) for n in sizes)
    leading = draw(st.integers(0, len(sizes) - 1))
    return shape[leading:] if all(n == 1 for n in shape[:leading]) else shape


@st.composite
def dropout(draw: st.DrawFn) -> dict[str, Any]:
    dropout_p = draw(seldom(0.1, 0.5, 1.0))
    return {"dropout_p": dropout_p, "seed": draw(st.integers(0, 2**63 - 1))} if dropout_p else {}


@st.composite
def terms(
    draw: st.DrawFn, batch: int, heads: int, decoding: bool = False
) -> tuple[dict[str, Draw], dict[str, Any]]:
    """What attention takes beside query, key and value, whatever their layout."""
    tensors = {}
    bound = seldom(0, 1, 5, 70)
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.none(), st.tuples(bound, bound))),
        "scale": draw(seldom(0.5, -0.3, 0.0)),
        "softcap": draw(seldom(2.0, 30.0)),
        "return_lse": draw(st.booleans()),
    }
    if draw(seldom(True)):
        tensors["alibi_slopes"] = Draw(draw(st.sampled_from(((heads,), (batch, heads)))), "slopes")
    if kind := draw(seldom("normal", "fp32")):
        tensors["sinks"] = Draw((heads,), kind)
    if decoding:
        return tensors, options
    options["align"] = draw(st.sampled_from(("bottom_right", "top_left")))
    return tensors, options | draw(dropout())


@st.composite
def grouped(draw: st.DrawFn) -> tuple[int, int, int]:
    """(batch, heads of queries, heads of keys)."""
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    return (
        draw(st.sampled_from((1, 2, 3))),
        kv_heads * draw(st.sampled_from((1, 1, 2, 3))),
        kv_heads,
    )


@st.composite
def attention(draw: st.DrawFn) -> tuple[dict[str, Draw], dict[str, Any]]:
    batch, heads, kv_heads = draw(grouped())
    q_len = draw(size(6000 // (batch * heads)))
    kv_len = draw(size(6000 // (batch * heads * q_len)))
    head_dim, value_dim = draw(size(100)), draw(size(100))
    scores = (batch, heads, q_len, kv_len)
    more, options = draw(terms(batch, heads))
    tensors = {
        "query": Draw((batch, heads, q_len, head_dim)),
        "key": Draw((batch, kv_heads, kv_len, head_dim)),
        "value": Draw((batch, kv_heads, kv_len, value_dim)),
    }
    if draw(seldom(True)):
        tensors["mask"] = Draw(draw(broadcast(scores)), "mask")
    if kind := draw(seldom("normal", "fp32", "holes")):
        tensors["bias"] = Draw(draw(broadcast(scores)), kind)
    if kind := draw(seldom("normal", "fp32", "holes")):
        sizes = *draw(broadcast((batch, heads))), q_len + kv_len - 1
        tensors["relative_bias"] = Draw(sizes, kind)
    return tensors | more, options


@st.composite
def varlen(draw: st.DrawFn) -> tuple[dict[str, Draw], dict[str, Any]]:
    batch, heads, kv_heads = draw(grouped())
    longest = draw(size(6000 // (batch * heads)))
    head_dim, value_dim = draw(size(100)), draw(size(100))

    def lengths(longest: int) -> list[int]:
        others = st.sampled_from([n for n in (0, *SIZES) if n <= longest])
        return draw(st.permutations([longest, *(draw(others) for _ in range(batch - 1))]))

    q_lens, kv_lens = lengths(longest), lengths(draw(size(6000 // (batch * heads * longest))))
    more, options = draw(terms(batch, heads))
    tensors = {
        "query": Draw((sum(q_lens), heads, head_dim), "distinct"),
        "key": Draw((sum(kv_lens), kv_heads, head_dim), "distinct"),
        "value": Draw((sum(kv_lens), kv_heads, value_dim), "distinct"),
        "cu_seqlens_q": numbers(0, *accumulate(q_lens)),
        "cu_seqlens_k": numbers(0, *accumulate(kv_lens)),
    }
    return tensors | more, options


@st.composite
def decode(draw: st.DrawFn) -> tuple[dict[str, Draw], dict[str, Any]]:
    batch, heads, kv_heads = draw(grouped())
    q_len, new = draw(st.sampled_from((1, 1, 2, 5))), draw(st.sampled_from((0, 1, 5)))
    head_dim, value_dim = draw(size(100)), draw(size(100))
    lengths = [draw(st.sampled_from((0, *SIZES, 700))) for _ in range(batch)]
    room = max(1, max(lengths) + new)
    more, options = draw(terms(batch, heads, decoding=True))
    lead = (batch, kv_heads, room)
    if page := draw(seldom(1, 7, 16)):
        columns = -(-room // page)
        lead = (batch * columns + 1, kv_heads, page)
        owned = tuple(range(batch * columns, 0, -1))  # all but the first page
        more["block_table"] = Draw((batch, columns), "numbers", owned)
    tensors = {
        "query": Draw((batch, heads, q_len, head_dim)),
        "key_cache": Draw((*lead, head_dim), "distinct"),
        "value_cache": Draw((*lead, value_dim), "distinct"),
        "cache_seqlens": numbers(*lengths),
    }
    if new:
        tensors["key"] = Draw((batch, kv_heads, new, head_dim))
        tensors["value"] = Draw((batch, kv_heads, new, value_dim))
    turns = q_len <= min(lengths) + new and head_dim > 1
    if turns and (angles := draw(seldom(1, head_dim // 2))):
        tensors["rotary_cos"] = tensors["rotary_sin"] = Draw((room, angles))
        options["rotary_interleaved"] = draw(st.booleans())
    return tensors | more, options


@st.composite
def sdpa(draw: st.DrawFn) -> tuple[dict[str, Draw], dict[str, Any]]:
    lead = draw(st.sampled_from(((), (3,), (2, 3), (2, 1, 2))))
    q_len = draw(size(5000))
    kv_len = draw(size(5000 // q_len))
    head_dim, value_dim = draw(size(100)), draw(size(100))
    tensors = {
        "query": Draw((*lead, q_len, head_dim)),
        "key": Draw((*lead, kv_len, head_dim)),
        "value": Draw((*lead, kv_len, value_dim)),
    }
    options = {"scale": draw(seldom(0.5, -0.3)), "is_causal": draw(st.booleans())}
    if not options["is_causal"] and (kind := draw(seldom("mask", "normal", "fp32", "holes"))):
        tensors["attn_mask"] = Draw(draw(broadcast((*lead, q_len, kv_len))), kind)
    return tensors, options


@st.composite
def additive(draw: st.DrawFn) -> tuple[dict[str, Draw], dict[str, Any]]:
    batch, heads = draw(st.sampled_from((1, 2, 3))), draw(st.sampled_from((1, 2, 3)))
    q_len = draw(size(5000 // (batch * heads)))
    kv_len = draw(size(5000 // (batch * heads * q_len)))
    width = draw(size(60000 // (batch * heads * q_len * kv_len)))
    tensors = {
        "query": Draw((batch, heads, q_len, width)),
        "key": Draw((batch, heads, kv_len, width)),
        "value": Draw((batch, heads, kv_len, draw(size(130)))),
        "weight": Draw(draw(st.sampled_from(((width,), (heads, width)))), "weight"),
    }
    if draw(seldom(True)):
        tensors["mask"] = Draw(draw(broadcast((batch, heads, q_len, kv_len))), "mask")
    return tensors, {"causal": draw(st.booleans())}


@st.composite
def norm(draw: st.DrawFn, function: str) -> tuple[dict[str, Draw], dict[str, Any]]:
    normalized = (draw(size(300)),) if draw(st.booleans()) else (draw(size(12)), draw(size(33)))
    shape = (*draw(st.sampled_from(((), (1,), (3, 5), (70,), (2, 1, 33)))), *normalized)
    tensors = {"input": Draw(shape)}
    if function.startswith("add_"):
        tensors["residual"] = Draw(shape, draw(st.sampled_from(("normal", "wide"))))
    for name in ("weight", "bias") if function.endswith("layer_norm") else ("weight",):
        if kind := draw(st.sampled_from((None, "normal", "fp32"))):
            tensors[name] = Draw(normalized, kind)
    options = {"normalized_shape": normalized, "eps": draw(st.sampled_from((1e-5, 1e-3)))}
    if function.startswith("add_"):
        options["return_sum"] = draw(st.booleans())
    return tensors, options


LEADING = st.sampled_from(((), (1,), (3, 5), (13,), (2, 1, 33)))


@st.composite
def linear(draw: st.DrawFn) -> tuple[dict[str, Draw], dict[str, Any]]:
    features, outs = draw(size(300)), draw(size(300))
    tensors = {
        "input": Draw((*draw(LEADING), features)),
        "weight": Draw((outs, features), "weight"),
    }
    if draw(st.booleans()):
        tensors["bias"] = Draw((outs,))
    return tensors, {
        "activation": draw(st.sampled_from((None, "relu", "gelu", "gelu_tanh", "silu")))
    }


@st.composite
def loss(draw: st.DrawFn) -> tuple[dict[str, Draw], dict[str, Any]]:
    features, classes, lead = draw(size(130)), draw(size(300)), draw(LEADING)
    targets = [7919 * i % 10007 % classes for i in range(math.prod(lead))]
    if draw(st.booleans()):
        targets = [-100 if i % 3 == 1 else target for i, target in enumerate(targets)]
    tensors = {
        "input": Draw((*lead, features)),
        "linear_weight": Draw((classes, features), "weight"),
        "target": Draw(lead, "numbers", tuple(targets)),
    }
    if draw(st.booleans()):
        tensors["linear_bias"] = Draw((classes,))
    return tensors, {
        "reduction": draw(st.sampled_from(("mean", "sum", "none"))),
        "label_smoothing": draw(st.sampled_from((0.0, 0.1))),
        "softcap": draw(seldom(2.0)),
    }


@st.composite
def ffn(draw: st.DrawFn) -> tuple[dict[str, Draw], dict[str, Any]]:
    features, hidden, outs = draw(size(130)), draw(size(200)), draw(size(130))
    tensors = {
        "input": Draw((*draw(LEADING), features)),
        "up_weight": Draw((hidden, features), "weight"),
        "down_weight": Draw((outs, hidden), "weight"),
    }
    gated = draw(st.booleans())
    if gated:
        tensors["gate_weight"] = Draw((hidden, features), "weight")
    if draw(st.booleans()):
        tensors |= {"up_bias": Draw((hidden,)), "down_bias": Draw((outs,))}
        if gated:
            tensors["gate_bias"] = Draw((hidden,))
    options = {
        "activation": draw(st.sampled_from(("relu", "gelu", "gelu_tanh", "silu"))),
        "recompute": draw(st.booleans()),
    }
    return tensors, options | draw(dropout())


@st.composite
def rope(draw: st.DrawFn) -> tuple[dict[str, Draw], dict[str, Any]]:
    batch, heads, kv_heads = draw(grouped())
    length, width = draw(size(65)), draw(size(130))
    angles = draw(st.sampled_from((width // 2, 0, width // 4)))
    lead = draw(st.sampled_from(((length,), (batch, length))))
    tensors = {
        "query": Draw((batch, heads, length, width)),
        "key": Draw((batch, kv_heads, length, width)),
        "cos": Draw((*lead, angles), "slopes"),
        "sin": Draw((*lead, angles), "slopes"),
    }
    if len(lead) == 1 and draw(seldom(True)):
        tensors["positions"] = numbers(*reversed(range(length)))
    return tensors, {"interleaved": draw(st.booleans())}


@st.composite
def calls(draw: st.DrawFn, function: str) -> Call:
    families = {
        "attention": attention,
        "attention_varlen": varlen,
        "attention_decode": decode,
        "scaled_dot_product_attention": sdpa,
        "additive_attention": additive,
        "linear": linear,
        "linear_cross_entropy": loss,
        "ffn": ffn,
        "apply_rope": rope,
    }
    family = families[function]() if function in families else norm(function)
    tensors, options = draw(family)
    written = tuple(f"{name}_cache" for name in ("key", "value") if f"{name}_cache" in tensors)
    case = Case(
        function,
        str(draw(st.integers(0, 999))),
        tensors,
        options,
        written=written if "key" in tensors else (),
        inference=function == "attention_decode",
    )
    distinct = [layout for layout in LAYOUTS if layout != "expanded"]
    return Call(
        case,
        draw(st.sampled_from((float32, bfloat16, float16, float64))),
        {
            name: draw(st.sampled_from(distinct if tensor.kind == "distinct" else LAYOUTS))
            for name, tensor in tensors.items()
        },
        draw(st.sampled_from(RUNNABLE)),
        draw(st.sampled_from((1, 1, 1, 2))),
    )


# what must be true


def noise(
    call: Call, inputs: Mapping[str, Tensor], oracle: Mapping[str, Tensor]
) -> dict[str, float]:
    """By result, the error that a fused pass makes and an eager one does not.

    Forward finds the logsumexp of a row in base 2, and rounds it once more for that. Backward finds
    the softmax again from the statistics of its rows, which are kept in at least fp32 and round a
    weight by eps * |score|, and the gradient of a score as weight * (grad . value - grad . out)
    from `out` as the caller got it, in his dtype. Eager keeps the softmax, which over one key is
    exactly 1. Of a norm of few equal columns, the terms grad * weight * rstd cancel; to centre x
    rounds it too, which in all dtypes but fp64, where eager is the oracle, shows in eager's error.
    Sizes are those of the inputs, which are normal, so that a product of vectors is no longer than
    4.5 times the other's length; errors of many rows add up at random.
    """
    case, options, reach = call.case, call.case.options, 4.5
    accumulated = torch.finfo(torch.promote_types(call.dtype, float32)).eps
    found = {}
    if options.get("return_lse"):
        found["out 1"] = accumulated * oracle["out 1"].nan_to_num(0, 0, 0).abs().max().item()

    def longest(tensor: Tensor) -> float:
        return tensor.nan_to_num(0, 0, 0).norm(dim=-1).max().item()

    if case.function in ("linear", "linear_cross_entropy", "ffn", "apply_rope", "attention_decode"):
        return found
    if "input" in inputs:
        x = inputs["input"] + inputs.get("residual", torch.zeros(()))
        x = x.flatten(x.dim() - len(options["normalized_shape"]))
        size = x.abs().amax(-1)
        centred = case.function.endswith("layer_norm")
        x = x - x.mean(-1, keepdim=True) if centred else x
        rstd = (x.square().mean(-1) + options["eps"]).rsqrt()
        terms = rstd * (1 + size * rstd) if centred and call.dtype == float64 else rstd
        weight = inputs["weight"].abs().max().item() if "weight" in inputs else 1.0
        error = torch.finfo(call.dtype).eps * reach * weight * terms.max().item()
        return {"grad input": error, "grad residual": error}
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    if case.function == "additive_attention":
        slope = inputs["weight"].abs().max().item()
        highest, by_query, by_key = inputs["weight"].abs().sum(-1).max().item(), slope, slope
    else:
        scale = options.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else abs(scale)
        highest = scale * longest(key) * reach
        by_query, by_key = (scale * t.abs().max().item() for t in (key, query))
    for name in (biases := ("bias", "relative_bias", "attn_mask", "sinks")):
        if name in inputs and inputs[name].is_floating_point():
            highest += inputs[name].nan_to_num(0, 0, 0).abs().max().item()
    if "alibi_slopes" in inputs:
        dim = 0 if case.function == "attention_varlen" else -2
        highest += max(query.shape[dim], key.shape[dim])
    weight = accumulated * (1 + highest) / (1 - options.get("dropout_p", 0) % 1)
    score = (weight + torch.finfo(call.dtype).eps) * reach * (longest(value) + 1)
    rows = math.sqrt(math.prod(query.shape[:-1]))
    return found | {
        "grad query": score * by_query,
        "grad key": score * by_key * rows,
        "grad value": weight * reach * rows,
        **{f"grad {name}": score * rows for name in (*biases, "weight")},
    }


FEW, MANY = 3, 1000  # draws of a call's values


def check(call: Call) -> None:
    """The error rule, for outputs and gradients, on memory that holds NaN.

    Eager's error is at least `noise`, and the largest of several draws of values: of a few elements
    one draw says little, so that nothing is found wrong by less than many.
    """
    case, seed = call.case, int(call.case.name)
    inputs, eager, oracle, errors = eagerly(call, seed)
    for name, error in noise(call, widened(inputs), oracle).items():
        errors[name] = max(errors.get(name, 0.0), error)
    with use_isa(call.isa), use_threads(call.threads), poisoned():
        found = run(case, inputs, "cpu")
        for name, tensor in run(case, inputs, "cpu", gradients=False).items():
            assert tensor.equal(found[name]), f"{name} differs where no gradient is needed"
    compare = partial(assert_results_close_to_oracle, case, inputs, found, eager, oracle, errors)
    for draw in range(1, MANY):
        if draw >= FEW:
            with contextlib.suppress(AssertionError):
                return compare()
        for name, error in eagerly(call, seed + 1000 * draw)[3].items():
            errors[name] = max(errors[name], error)
    compare()


def eagerly(call: Call, seed: int) -> tuple[dict[str, Any], ...]:
    """Inputs by a seed, what eager PyTorch makes of them, the oracle, and their distances."""
    case = replace(call.case, name=str(seed))
    inputs = {
        name: laid_out(tensor, call.layouts[name])
        for name, tensor in case.inputs(call.dtype).items()
    }
    with use_threads(1):
        eager, oracle = eager_and_oracle(case, inputs)
    return inputs, eager, oracle, largest_errors(eager, oracle)


@pytest.mark.parametrize("function", SHARES)
def test_random_calls(function: str, request: pytest.FixtureRequest) -> None:
    asked = request.config.getoption("--fuzz-cases")
    cases = 2000 if asked is None else asked

    @settings(
        max_examples=max(1, round(cases * SHARES[function])),
        derandomize=asked is None,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls(function))
    def every(call: Call) -> None:
        check(call)

    every()


def test_every_function_is_drawn() -> None:
    assert set(SHARES) == set(fastattn.registry.FUNCTIONS)
