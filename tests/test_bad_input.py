"""Bad input raises what names the argument; long because a function has many ways to be wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import _library, registry
from fastattn.emulator import device

randn = torch.randn

# A good call of every function; each test spoils one argument.
QKV = {"query": randn(2, 4, 5, 8), "key": randn(2, 2, 6, 8), "value": randn(2, 2, 6, 7)}
GOOD: dict[str, dict[str, Any]] = {
    "attention": QKV
    | {
        "mask": torch.ones(5, 6, dtype=torch.bool),
        "bias": randn(4, 5, 6),
        "relative_bias": randn(4, 10),
        "alibi_slopes": randn(4),
        "sinks": randn(4),
    },
    "attention_varlen": {
        "query": randn(7, 4, 8),
        "key": randn(9, 2, 8),
        "value": randn(9, 2, 7),
        "cu_seqlens_q": torch.tensor([0, 3, 7]),
        "cu_seqlens_k": torch.tensor([0, 4, 9]),
        "alibi_slopes": randn(4),
        "sinks": randn(4),
    },
    "attention_decode": {
        "query": randn(2, 4, 2, 8),
        "key_cache": randn(5, 2, 4, 8),
        "value_cache": randn(5, 2, 4, 7),
        "cache_seqlens": torch.tensor([3, 6]),
        "key": randn(2, 2, 2, 8),
        "value": randn(2, 2, 2, 7),
        "block_table": torch.tensor([[4, 0], [1, 3]]),
        "rotary_cos": randn(9, 3),
        "rotary_sin": randn(9, 3),
        "rotary_interleaved": False,
        "alibi_slopes": randn(4),
        "sinks": randn(4),
    },
    "scaled_dot_product_attention": {
        "query": randn(2, 4, 5, 8),
        "key": randn(2, 4, 6, 8),
        "value": randn(2, 4, 6, 7),
        "attn_mask": randn(5, 6),
    },
    "additive_attention": {
        "query": randn(2, 4, 5, 8),
        "key": randn(2, 4, 6, 8),
        "value": randn(2, 4, 6, 7),
        "weight": randn(4, 8),
        "mask": torch.ones(5, 6, dtype=torch.bool),
    },
    "layer_norm": {
        "input": randn(3, 8),
        "weight": randn(8),
        "bias": randn(8),
        "normalized_shape": [8],
    },
    "rms_norm": {"input": randn(3, 8), "weight": randn(8), "normalized_shape": [8]},
    "linear": {"input": randn(3, 8), "weight": randn(5, 8), "bias": randn(5)},
    "ffn": {
        "input": randn(3, 8),
        "up_weight": randn(9, 8),
        "gate_weight": randn(9, 8),
        "down_weight": randn(5, 9),
        "up_bias": randn(9),
        "gate_bias": randn(9),
        "down_bias": randn(5),
    },
    "linear_cross_entropy": {
        "input": randn(3, 8),
        "linear_weight": randn(5, 8),
        "target": torch.tensor([4, -100, 0]),
        "linear_bias": randn(5),
    },
    "apply_rope": {
        "query": randn(2, 4, 5, 8),
        "key": randn(2, 2, 5, 8),
        "cos": randn(7, 4),
        "sin": randn(7, 4),
        "positions": torch.tensor([0, 3, 6, 1, 2]),
    },
}
for _name in ("layer_norm", "rms_norm"):
    GOOD[f"add_{_name}"] = GOOD[_name] | {"residual": randn(3, 8)}

FAULTS: dict[str, Callable[[Tensor], object]] = {
    "a list": lambda tensor: tensor.tolist(),
    "an integer dtype": lambda tensor: tensor.long(),
    "a complex dtype": lambda tensor: tensor.to(torch.complex64),
    "another dtype": lambda tensor: tensor.half(),
    "another device": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
    "0-dimensional": lambda tensor: tensor.flatten()[0],
    "of too many dimensions": lambda tensor: tensor.expand(2, 2, 2, *tensor.shape),
    "too long": lambda tensor: torch.cat([tensor, tensor, tensor[..., :1]], -1),
}
# What is no fault: these are converted or broadcast, or say what dtype the others must have.
FINE = {
    ("attention", "bias", "0-dimensional"),
    ("attention", "mask", "0-dimensional"),
    ("attention", "mask", "an integer dtype"),
    ("additive_attention", "mask", "0-dimensional"),
    ("additive_attention", "value", "too long"),
    ("attention", "alibi_slopes", "another dtype"),
    ("attention", "sinks", "another dtype"),
    ("attention_varlen", "alibi_slopes", "another dtype"),
    ("attention_varlen", "sinks", "another dtype"),
    ("attention_decode", "alibi_slopes", "another dtype"),
    ("attention_decode", "sinks", "another dtype"),
    ("attention_decode", "cache_seqlens", "an integer dtype"),
    ("attention_decode", "block_table", "an integer dtype"),
    ("attention_decode", "block_table", "too long"),
    ("attention_varlen", "value", "too long"),
    *(("attention_varlen", f"cu_seqlens_{which}", "an integer dtype") for which in "qk"),
    ("scaled_dot_product_attention", "attn_mask", "0-dimensional"),
    ("attention", "value", "too long"),
    ("scaled_dot_product_attention", "value", "too long"),
    ("apply_rope", "positions", "an integer dtype"),
    ("apply_rope", "cos", "another dtype"),
    ("apply_rope", "sin", "another dtype"),
    ("linear", "input", "of too many dimensions"),
    ("linear_cross_entropy", "target", "an integer dtype"),
    ("ffn", "input", "of too many dimensions"),
    *((name, "input", "of too many dimensions") for name in ("layer_norm", "rms_norm")),
    *((name, "input", "another dtype") for name in ("layer_norm", "rms_norm")),
    *((name, "input", "another dtype") for name in ("add_layer_norm", "add_rms_norm")),
    *(
        ("scaled_dot_product_attention", name, "of too many dimensions")
        for name in ("query", "key", "value")
    ),
}
# The one that complains is another argument, which is checked against the spoilt one.
BLAMED = {
    "query": "key|query",
    "input": r"\w+",
    "value": "value|key",
    "key_cache": "key",
    "value_cache": "value",
    "up_weight": "up_|down_|gate_",
}


def spoilt() -> list[tuple[str, str, str]]:
    return [
        (function, name, fault)
        for function, arguments in GOOD.items()
        for name, argument in arguments.items()
        if isinstance(argument, Tensor)
        for fault in FAULTS
        if (function, name, fault) not in FINE
    ]


def test_every_function_has_a_good_call() -> None:
    assert set(GOOD) == set(registry.FUNCTIONS)
    for function, arguments in GOOD.items():
        getattr(fastattn, function)(**arguments)
        assert fastattn.explain(function, **arguments).kernel == "cpu"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("function", "name", "fault"), spoilt())
def test_a_spoilt_tensor_is_named(function: str, name: str, fault: str) -> None:
    arguments = GOOD[function]
    bad = arguments | {name: FAULTS[fault](arguments[name])}
    with pytest.raises((TypeError, ValueError), match=BLAMED.get(name, rf"\b{name}\b")) as caught:
        getattr(fastattn, function)(**bad)
    assert "got" in str(caught.value)
    with pytest.raises(type(caught.value), match=re.escape(str(caught.value))):
        fastattn.explain(function, **bad)


NAN, INF = math.nan, math.inf
TABLE: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    *(("attention", {"scale": bad}, ValueError, "scale") for bad in (NAN, INF, -INF)),
    *(("attention", {"scale": bad}, TypeError, "scale") for bad in ("1", torch.tensor(1.0), [1])),
    *(("attention", {"softcap": bad}, ValueError, "softcap") for bad in (0, -1.0, NAN, INF)),
    *(("attention", {"dropout_p": bad}, ValueError, "dropout_p") for bad in (-0.1, 1.1, NAN)),
    *(("attention", {"window": bad}, ValueError, "window") for bad in ((-2, 0), (0, -5))),
    *(
        ("attention", {"window": bad}, TypeError, "window")
        for bad in (3, (1,), (1, 2, 3), "ab", (1.0, 2), (True, 1), torch.tensor(3))
    ),
    *(("attention", {"causal": bad}, TypeError, "causal") for bad in (1, "yes", None)),
    *(("attention", {"align": bad}, ValueError, "align") for bad in ("left", None, 0)),
    *(("attention", {"dropout_p": 0.1, "seed": s}, ValueError, "seed") for s in (-1, 2**63)),
    *(("attention", {"dropout_p": 0.1, "seed": s}, TypeError, "seed") for s in (0.5, True, "1")),
    ("attention", {"dropout_p": 0.1, "seed": torch.zeros(2).long()}, ValueError, "seed"),
    ("attention", {"dropout_p": 0.1, "seed": torch.zeros(1)}, ValueError, "seed"),
    ("attention", {"seed": 3}, ValueError, "seed"),
    ("attention", {"query": randn(4, 5, 8)}, ValueError, "query"),
    ("attention", {"query": randn(3, 4, 5, 8)}, ValueError, "key"),
    ("attention", {"query": randn(2, 3, 5, 8)}, ValueError, "key.*heads.*3"),
    ("attention", {"query": randn(2, 4, 5, 9)}, ValueError, "key.*head_dim 9"),
    ("attention", {"value": randn(2, 2, 5, 8)}, ValueError, "value"),
    ("attention", {"value": randn(2, 4, 6, 8)}, ValueError, "value"),
    ("attention", {"key": randn(2, 0, 6, 8), "value": randn(2, 0, 6, 8)}, ValueError, "heads"),
    ("attention", {"mask": torch.ones(5, 7).bool()}, ValueError, r"mask.*\[5, 7\]"),
    ("attention", {"mask": torch.ones(2, 1, 1, 1, 6).bool()}, ValueError, "mask"),
    ("attention", {"mask": torch.ones(5, 6)}, TypeError, "mask.*bias"),
    ("attention", {"bias": randn(2, 5, 6)}, ValueError, "bias"),
    *(
        ("attention", {"relative_bias": randn(bad)}, ValueError, "relative_bias")
        for bad in ((), (1,), (11,), (2, 10), (3, 1, 10), (1, 1, 1, 10))
    ),
    ("attention", {"alibi_slopes": randn(2, 3)}, ValueError, "alibi_slopes"),
    ("attention", {"sinks": randn(2, 4)}, ValueError, "sinks"),
    *(("additive_attention", {"causal": bad}, TypeError, "causal") for bad in (1, "yes", None)),
    ("additive_attention", {"query": randn(4, 5, 8)}, ValueError, "query"),
    ("additive_attention", {"query": randn(2, 3, 5, 8)}, ValueError, r"key.*\[2, 3\]"),
    ("additive_attention", {"query": randn(2, 4, 5, 9)}, ValueError, "key.*width 9"),
    ("additive_attention", {"value": randn(2, 4, 5, 7)}, ValueError, "value.*length 6"),
    ("additive_attention", {"weight": randn(4)}, ValueError, r"weight.*\[4, 8\]"),
    ("additive_attention", {"weight": randn(4, 1)}, ValueError, "weight"),
    ("additive_attention", {"mask": torch.ones(5, 7).bool()}, ValueError, r"mask.*\[5, 7\]"),
    *(
        ("attention_varlen", {"cu_seqlens_q": torch.tensor(bad)}, ValueError, "cu_seqlens_q")
        for bad in ([1, 3, 7], [0, 3, 6], [0, 3, 8], [0, 4, 3, 7], [0, -1, 7], [0], [[0, 3, 7]])
    ),
    ("attention_varlen", {"cu_seqlens_k": torch.tensor([0, 4, 8, 9])}, ValueError, "cu_seqlens_q"),
    ("attention_varlen", {"cu_seqlens_k": None}, TypeError, "cu_seqlens_k"),
    ("attention_varlen", {"max_seqlen_q": 3}, ValueError, "max_seqlen_q.*3.*4"),
    ("attention_varlen", {"max_seqlen_k": 4}, ValueError, "max_seqlen_k"),
    ("attention_varlen", {"max_seqlen_k": -1}, ValueError, "max_seqlen_k"),
    *(("attention_varlen", {"max_seqlen_q": b}, TypeError, "max_seqlen_q") for b in (4.0, True)),
    ("attention_varlen", {"query": randn(1, 7, 4, 8)}, ValueError, "query"),
    ("attention_varlen", {"align": "top"}, ValueError, "align"),
    ("attention_varlen", {"window": (-3, 0)}, ValueError, "window"),
    ("attention_varlen", {"dropout_p": 2.0}, ValueError, "dropout_p"),
    *(
        ("attention_decode", {"cache_seqlens": torch.tensor(bad)}, ValueError, "cache_seqlens")
        for bad in ([3, 7], [-1, 2], [2, 2**40], [1, 2, 3], [[1, 2]])
    ),
    ("attention_decode", {"cache_seqlens": 7}, ValueError, "cache_seqlens.*6.*got 7"),
    ("attention_decode", {"cache_seqlens": True}, TypeError, "cache_seqlens"),
    ("attention_decode", {"cache_seqlens": 1.0}, TypeError, "cache_seqlens"),
    (
        "attention_decode",
        {"block_table": torch.tensor([[4, 0], [1, 5]])},
        ValueError,
        "block_table",
    ),
    (
        "attention_decode",
        {"block_table": torch.tensor([[-1, 0], [1, 0]])},
        ValueError,
        "block_table",
    ),
    ("attention_decode", {"block_table": torch.tensor([[4], [1]])}, ValueError, "cache_seqlens"),
    ("attention_decode", {"block_table": None}, ValueError, "key_cache"),
    ("attention_decode", {"key": None}, ValueError, "key"),
    ("attention_decode", {"value": None}, ValueError, "value"),
    ("attention_decode", {"value": randn(2, 2, 1, 7)}, ValueError, "value"),
    ("attention_decode", {"query": randn(2, 3, 2, 8)}, ValueError, "key_cache.*heads.*3"),
    ("attention_decode", {"rotary_sin": None}, ValueError, "rotary_sin"),
    ("attention_decode", {"rotary_sin": randn(8, 3)}, ValueError, "rotary_sin"),
    ("attention_decode", {"rotary_interleaved": None}, TypeError, "rotary_interleaved"),
    (
        "attention_decode",
        {"rotary_cos": randn(7, 3), "rotary_sin": randn(7, 3)},
        ValueError,
        "rotary_cos.*8 positions",
    ),
    (
        "attention_decode",
        {"rotary_cos": None, "rotary_sin": None},
        ValueError,
        "rotary_interleaved",
    ),
    ("attention_decode", {"causal": 1}, TypeError, "causal"),
    ("attention_decode", {"softcap": -1.0}, ValueError, "softcap"),
    ("attention_decode", {"query": randn(2, 4, 2, 8).requires_grad_()}, ValueError, "query.*grad"),
    (
        "attention_decode",
        {"value_cache": randn(1, 2, 4, 7).expand(5, -1, -1, -1)},
        ValueError,
        "value_cache.*expanded",
    ),
    ("scaled_dot_product_attention", {"is_causal": True}, ValueError, "attn_mask"),
    ("scaled_dot_product_attention", {"attn_mask": randn(6, 5)}, ValueError, "attn_mask"),
    ("scaled_dot_product_attention", {"dropout_p": -1}, ValueError, "dropout_p"),
    ("scaled_dot_product_attention", {"scale": NAN}, ValueError, "scale"),
    ("scaled_dot_product_attention", {"query": randn(8)}, ValueError, "query"),
    ("scaled_dot_product_attention", {"key": randn(3, 4, 6, 8)}, ValueError, "batch dimensions"),
    (
        "scaled_dot_product_attention",
        {"query": randn(5, 8), "key": randn(6, 8), "value": randn(6, 8), "enable_gqa": True},
        ValueError,
        "enable_gqa",
    ),
    *(
        (name, options, error, match)
        for name in ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm")
        for options, error, match in (
            ({"eps": NAN}, ValueError, "eps"),
            ({"eps": "small"}, TypeError, "eps"),
            ({"normalized_shape": []}, ValueError, "normalized_shape"),
            ({"normalized_shape": [7]}, ValueError, "normalized_shape"),
            ({"normalized_shape": 3}, ValueError, "normalized_shape"),
            ({"normalized_shape": [1, 3, 8]}, ValueError, "normalized_shape"),
            ({"normalized_shape": "8"}, (TypeError, ValueError), "normalized_shape"),
            ({"normalized_shape": None}, TypeError, "normalized_shape"),
        )
    ),
    *(
        (name, options, error, match)
        for name in ("add_layer_norm", "add_rms_norm")
        for options, error, match in (
            ({"residual": randn(3, 1)}, ValueError, "residual"),
            ({"residual": None}, TypeError, "residual"),
            ({"residual": randn(3, 8).double()}, TypeError, "residual"),
            ({"input": randn(3, 8).double(), "weight": None}, TypeError, "residual"),
            ({"return_sum": 0}, TypeError, "return_sum"),
        )
    ),
    *(
        (name, options, error, match)
        for name in ("add_layer_norm", "add_rms_norm", "ffn")
        for options, error, match in (
            ({"dropout_p": -0.1}, ValueError, "dropout_p"),
            ({"dropout_p": NAN}, ValueError, "dropout_p"),
            ({"dropout_p": "0.1"}, TypeError, "dropout_p"),
            ({"dropout_p": 0.1, "seed": -1}, ValueError, "seed"),
            ({"dropout_p": 0.1, "seed": 0.5}, TypeError, "seed"),
            ({"seed": 3}, ValueError, "seed"),
        )
    ),
    ("apply_rope", {"query": randn(2, 4, 8)}, ValueError, "query"),
    ("apply_rope", {"query": randn(2, 4, 5, 7)}, ValueError, "key"),
    ("apply_rope", {"query": randn(2, 4, 5, 7), "key": None}, ValueError, r"cos.*D = 7"),
    ("apply_rope", {"key": randn(3, 2, 5, 8)}, ValueError, "key"),
    ("apply_rope", {"key": randn(2, 2, 6, 8)}, ValueError, "key"),
    ("apply_rope", {"cos": randn(7, 3)}, ValueError, "cos"),
    ("apply_rope", {"cos": randn(2, 7, 4), "sin": randn(2, 7, 4)}, ValueError, "cos"),
    ("apply_rope", {"positions": None}, ValueError, "cos"),
    ("apply_rope", {"positions": torch.zeros(3, 5).long()}, ValueError, "positions"),
    ("apply_rope", {"positions": torch.zeros(5)}, TypeError, "positions"),
    *(
        ("apply_rope", {"positions": torch.tensor([0, 1, bad, 0, 0])}, ValueError, "positions")
        for bad in (7, -1, 2**62, -(2**63))
    ),
    ("apply_rope", {"interleaved": 1}, TypeError, "interleaved"),
    ("apply_rope", {"inplace": None}, TypeError, "inplace"),
    (
        "apply_rope",
        {"query": randn(2, 1, 5, 8).expand(2, 4, 5, 8), "inplace": True},
        ValueError,
        "query.*strides",
    ),
    *(("linear", {"activation": bad}, ValueError, "activation") for bad in ("tanh", 3, "")),
    *(("ffn", {"activation": bad}, ValueError, "activation") for bad in ("tanh", None)),
    *(
        ("linear_cross_entropy", {"target": torch.tensor(bad)}, ValueError, "target")
        for bad in ([0, 1, 5], [0, -1, 1], [0, 2**40, 1], [0, 1], [[0, 1, 2]])
    ),
    ("linear_cross_entropy", {"target": torch.zeros(3).int()}, TypeError, "target.*int32"),
    ("linear_cross_entropy", {"target": torch.zeros(3)}, TypeError, "target.*float32"),
    ("linear_cross_entropy", {"linear_weight": randn(5, 7)}, ValueError, "linear_weight"),
    ("linear_cross_entropy", {"linear_bias": randn(4)}, ValueError, "linear_bias"),
    (
        "linear_cross_entropy",
        {"linear_weight": randn(0, 8), "linear_bias": None},
        ValueError,
        "linear_weight must have a class",
    ),
    *(
        ("linear_cross_entropy", {"reduction": bad}, ValueError, "reduction")
        for bad in ("max", None, 1)
    ),
    *(
        ("linear_cross_entropy", {"ignore_index": bad}, TypeError, "ignore_index")
        for bad in (None, True, 1.0)
    ),
    ("linear_cross_entropy", {"ignore_index": 0}, ValueError, "target.*got -100"),
    *(
        ("linear_cross_entropy", {"label_smoothing": bad}, ValueError, "label_smoothing")
        for bad in (-0.1, 1.1, NAN)
    ),
    *(
        ("linear_cross_entropy", {"softcap": bad}, ValueError, "softcap")
        for bad in (0, -1.0, NAN, INF)
    ),
    ("ffn", {"gate_weight": None}, ValueError, "gate_bias"),
    ("ffn", {"gate_weight": randn(10, 8)}, ValueError, "gate_"),
    ("ffn", {"down_weight": randn(5, 8)}, ValueError, "down_weight"),
    ("ffn", {"recompute": 1}, TypeError, "recompute"),
]


@pytest.mark.parametrize(("function", "options", "error", "match"), TABLE)
def test_a_bad_value_is_named(
    function: str, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        getattr(fastattn, function)(**GOOD[function] | options)


def negative(tensor: Tensor) -> Tensor:
    """The same values as a view whose sign is still to be applied."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg() and view.equal(tensor)
    return view


@pytest.mark.skipif(bool(_library.WHY_NO_CUDA), reason=_library.WHY_NO_CUDA)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "function", [f for f in GOOD if "cuda" in registry.FUNCTIONS[f][1].kernels]
)
def test_a_gpu_kernel_is_not_launched_on_bad_input(function: str) -> None:
    """All of the above raises what it does on the CPU, before a kernel starts."""
    good = GOOD[function]
    bad = [{name: FAULTS[fault](good[name])} for f, name, fault in spoilt() if f == function]
    bad += [options for f, options, _, _ in TABLE if f == function]
    for options in bad:
        with pytest.raises((TypeError, ValueError)) as expected:
            getattr(fastattn, function)(**good | options)
        with (
            device.watching() as reports,
            fastattn.use_kernel("emulator"),
            pytest.raises(expected.type, match=re.escape(str(expected.value))),
        ):
            getattr(fastattn, function)(**good | options)
        assert reports == []
    with device.watching() as reports, fastattn.use_kernel("emulator"):
        getattr(fastattn, function)(**good)
    assert reports


@pytest.mark.parametrize("function", GOOD)
def test_views_that_torch_resolves_late(function: str) -> None:
    """Negated views and tensors made in inference mode are like any other."""
    arguments = GOOD[function]
    expected = getattr(fastattn, function)(**arguments)
    late = {  # but for what is written to, which torch lets be negated in one argument only
        name: negative(a)
        if isinstance(a, Tensor) and a.is_floating_point() and not name.endswith("_cache")
        else a
        for name, a in arguments.items()
    }
    torch.testing.assert_close(getattr(fastattn, function)(**late), expected)
    with torch.inference_mode():
        made = {n: a.clone() if isinstance(a, Tensor) else a for n, a in arguments.items()}
    torch.testing.assert_close(getattr(fastattn, function)(**made), expected)


def test_overlapping_inputs() -> None:
    memory = randn(400)
    windows = memory.as_strided((1, 2, 20, 8), (0, 3, 5, 1))  # rows that share elements
    packed = windows.contiguous()
    assert fastattn.attention(windows, windows, windows).equal(
        fastattn.attention(packed, packed, packed)
    )
    rows = memory.as_strided((30, 16), (2, 1))
    assert fastattn.rms_norm(rows, [16]).equal(fastattn.rms_norm(rows.contiguous(), [16]))
    assert fastattn.linear(rows, rows).equal(fastattn.linear(rows.clone(), rows.clone()))


def far_apart(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor whose elements lie up to 2**32 apart, in memory that is reserved but not touched."""
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    try:
        memory = torch.empty(last + 1, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"the system does not reserve {last * dtype.itemsize >> 30} GiB: {error}")
    return memory.as_strided(shape, strides).copy_(torch.randn(shape) > 0)


def test_offsets_beyond_32_bits() -> None:
    far = 2**31 + 64
    query = far_apart((1, 2, 3, 8), (0, far, 8, 1), torch.bfloat16)
    key = far_apart((1, 1, 3, 8), (0, 0, far // 2, 1), torch.bfloat16)
    value = far_apart((1, 1, 3, 2), (0, 0, 2, far), torch.bfloat16)
    mask = far_apart((1, 2, 1, 3), (0, far, 0, 1), torch.bool) | True
    packed = [tensor.contiguous() for tensor in (query, key, value)]
    assert fastattn.attention(query, key, value, mask=mask).equal(fastattn.attention(*packed))
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    found = torch.autograd.grad(fastattn.attention(*leaves).sum(), leaves)
    leaves = [tensor.requires_grad_() for tensor in packed]
    for grad, ref in zip(
        found, torch.autograd.grad(fastattn.attention(*leaves).sum(), leaves), strict=True
    ):
        assert grad.equal(ref)


def test_a_mask_of_more_than_2_to_31_elements() -> None:
    query, key = randn(1, 1, 2, 1), randn(1, 1, 1, 1).expand(1, 1, 2**21, 1)
    mask = torch.ones(1, dtype=torch.bool).expand(1024, 1024, 2, 2**21)
    assert mask.numel() > 2**31
    with pytest.raises(ValueError, match="mask"):
        fastattn.attention(query, key, key, mask=mask)


def free_memory() -> int:
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+)", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) << 10 if found else 0


@pytest.mark.slow
@pytest.mark.skipif(free_memory() < 14 << 30, reason="needs 14 GiB of free memory")
def test_more_than_2_to_31_elements() -> None:
    x = torch.ones(2**21 + 1, 1024, dtype=torch.bfloat16)
    x[-1] = randn(1024)
    last = x[-1:].clone()
    assert fastattn.rms_norm(x, [1024])[-1:].equal(fastattn.rms_norm(last, [1024]))
    del x
    x, weight = randn(2**16 + 1, 2).bfloat16(), randn(2**15, 2).bfloat16()
    assert fastattn.linear(x, weight)[-1:].equal(fastattn.linear(x[-1:], weight))
