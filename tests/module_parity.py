"""What tests of fastattn.nn share: sizes, masks, twins in torch.nn, the error rule."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastattn
from fastattn.testing import assert_close_to_oracle

DTYPES = [torch.float32, torch.bfloat16]
FACTOR = 5.0
N, L, S, E, H = 2, 5, 7, 24, 4  # batch, queries, keys, width, heads


def twins(name: str, *args, dtype: torch.dtype, theirs: Callable | None = None, **kwargs):
    """A torch.nn module with random parameters, and fastattn's with the same ones."""
    theirs = (theirs or getattr(nn, name))(*args, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    theirs.to(dtype)
    ours = getattr(fastattn.nn, name)(*args, **kwargs).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def outputs_and_gradients(module: nn.Module, call: Callable, inputs: list[Tensor]) -> dict:
    """Outputs of call(module, *inputs), and gradients of all inputs and parameters."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    module.zero_grad()
    torch.manual_seed(1)
    outs = call(module, *inputs)
    outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out is not None]
    torch.manual_seed(2)
    sum((out * torch.randn(out.shape).to(out.dtype)).sum() for out in outs).backward()
    found = {f"out {i}": out for i, out in enumerate(outs)}
    found |= {f"grad of input {i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    return {name: x.detach() for name, x in found.items() if x is not None}


def check(ours: nn.Module, theirs: nn.Module, call: Callable, inputs: list[Tensor]) -> None:
    """The error rule against torch's own module; a module is a chain of ops, whose errors add."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = outputs_and_gradients(copy.deepcopy(theirs).double(), call, wide)
    eager = outputs_and_gradients(theirs, call, inputs)
    fused = outputs_and_gradients(ours, call, inputs)
    assert fused.keys() == eager.keys() == exact.keys()
    for name, oracle in exact.items():
        assert_close_to_oracle(fused[name], eager[name], oracle, factor=FACTOR, name=name)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def name_of(activation: object) -> str:
    """What a test's id calls it, in every process."""
    return getattr(activation, "__name__", str(activation))


def padding(batch: int = N) -> Tensor:
    """[N, S], True at the padding; the rows differ, and no row is all padding."""
    return torch.arange(S) >= torch.tensor([S - 2, S - 4])[:batch, None]


def hide(q_len: int = L, *lead: int) -> Tensor:
    """[*lead, L, S], True where a query may not attend; every query sees key 0."""
    hidden = torch.rand(*lead, q_len, S) < 0.4
    hidden[..., 0] = False
    return hidden


def as_bias(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
