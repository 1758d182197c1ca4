"""What holds of every module of fastattn.nn, and its norms against torch.nn's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from module_parity import DTYPES, E, H, N, check, randn, twins
from torch import Tensor, nn

import fastattn

pytestmark = pytest.mark.usefixtures("one_thread")

CONSTRUCTED = [
    ("LayerNorm", (E,), {}),
    ("LayerNorm", (E,), {"bias": False}),
    ("RMSNorm", ([3, E],), {}),
    ("MultiheadAttention", (E, H), {}),
    ("MultiheadAttention", (E, H), {"kdim": 3, "vdim": 5, "add_bias_kv": True, "bias": False}),
    ("TransformerEncoderLayer", (E, H, 40), {}),
    ("TransformerEncoderLayer", (E, H, 40), {"bias": False, "dtype": torch.float64}),
    ("TransformerDecoderLayer", (E, H, 40), {"norm_first": True}),
    ("TransformerDecoderLayer", (E, H, 40), {"bias": False, "dtype": torch.float64}),
]


@pytest.mark.parametrize(("name", "args", "kwargs"), CONSTRUCTED, ids=str)
def test_state_moves_both_ways_and_starts_like_torchs(name, args, kwargs) -> None:
    modules = []
    for namespace in (fastattn.nn, nn):
        torch.manual_seed(7)
        modules.append(getattr(namespace, name)(*args, **kwargs))
    ours, theirs = modules
    assert isinstance(ours, type(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        *CONSTRUCTED,
        ("FeedForward", (E,), {"gated": True, "activation": "silu"}),
        ("AdditiveAttention", (E, 12, 16), {}),
    ],
    ids=str,
)
def test_modules_pickle_copy_and_print(name, args, kwargs) -> None:
    module = getattr(fastattn.nn, name)(*args, **kwargs)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(other) is type(module)
        for a, b in zip(module.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    assert repr(module).startswith(f"{name}(")


# norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("LayerNorm", {"normalized_shape": E}),
        ("LayerNorm", {"normalized_shape": [3, E], "eps": 1e-2}),
        ("LayerNorm", {"normalized_shape": (E,), "bias": False}),
        ("LayerNorm", {"normalized_shape": E, "elementwise_affine": False}),
        ("RMSNorm", {"normalized_shape": E}),
        ("RMSNorm", {"normalized_shape": [3, E], "eps": 1e-2}),
        ("RMSNorm", {"normalized_shape": E, "elementwise_affine": False}),
    ],
)
@pytest.mark.parametrize("residual", [False, True])
def test_norms_match_torch(name: str, kwargs: dict, residual: bool, dtype: torch.dtype) -> None:
    ours, theirs = twins(name, **kwargs, dtype=dtype)
    inputs = [randn(N, 3, E, dtype=dtype) for _ in range(1 + residual)]

    def call(module: nn.Module, x: Tensor, residual: Tensor | None = None):
        if residual is None:
            return module(x)
        if module is ours:
            return module(x, residual)
        return module(x + residual), x + residual

    check(ours, theirs, call, inputs)
