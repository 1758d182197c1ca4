"""Who takes part in a race on a GPU: fastattn's kernels, and PyTorch's own by backend."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from bench import baselines
from bench.gpu.rows import KERNELS
from bench.kinds import Attention, Case
from bench.work import Work


class Provider(NamedTuple):
    """Which of a case's functions it calls, and what that has to happen in."""

    function: str
    context: Callable[[], AbstractContextManager] = nullcontext


PROVIDERS = {
    **{name: Provider("fused", functools.partial(fastattn.use_kernel, name)) for name in KERNELS},
    "eager": Provider("eager"),
    "sdpa": Provider("sdpa"),  # whose backend PyTorch chooses
    "sdpa-flash": Provider("sdpa", functools.partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)),
    "sdpa-cudnn": Provider("sdpa", functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
    "sdpa-efficient": Provider(
        "sdpa", functools.partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION)
    ),
    "flash-attn": Provider("flash-attn"),
    "compile": Provider("compile"),
}
RIVALS = ("eager", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flash-attn")
CALLED = ("eager", "sdpa")  # the rivals where the cost of a call is all that counts


def build(case: Case, names: Iterable[str]) -> Work:
    """A case made runnable, with a call for each provider that can take part."""
    names = list(names)

    def raced(functions: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        known = functions | others(case)
        chosen = {name: PROVIDERS[name] for name in names if PROVIDERS[name].function in known}
        return {
            name: within(provider.context, known[provider.function])
            for name, provider in chosen.items()
        }

    if "compile" in names:
        torch.compiler.reset()  # else all cases of an operation count towards one limit
    work = baselines.build(case, compiled="compile" in names, extend=raced)
    calls = {  # backward needs the context too
        name: within(PROVIDERS[name].context, work.calls[name])
        for name in names
        if name in work.calls
    }
    return replace(work, calls=calls)


def bare(
    case: Case, names: Iterable[str]
) -> dict[str, tuple[Callable[[], AbstractContextManager], Callable[[], Any]]]:
    """The providers' functions on inputs of a case, with the context that each has to run in."""
    calls = baselines.build(case).calls
    found = {}
    for name in names:
        function, inputs, _ = calls[PROVIDERS[name].function].args
        found[name] = PROVIDERS[name].context, functools.partial(function, **inputs)
    return found


def others(case: Case) -> dict[str, Callable[..., Any]]:
    """The functions of a case that only a GPU has."""
    if not isinstance(case, Attention) or case.bias or case.dropout:
        return {}
    if importlib.util.find_spec("flash_attn") is None:
        return {}
    return {"flash-attn": functools.partial(flash, case)}


def flash(case: Attention, query, key, value, bias, mask) -> Tensor:
    """flash-attn, which takes and gives [B, S, H, D]."""
    from flash_attn import flash_attn_func

    tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return flash_attn_func(*tensors, causal=case.causal).transpose(1, 2)


def within(
    context: Callable[[], AbstractContextManager], function: Callable[..., Any]
) -> Callable[..., Any]:
    """The function, inside a context of its own each time."""
    if context is nullcontext:
        return function

    @functools.wraps(function, updated=())
    def run(*args: Any, **options: Any) -> Any:
        with context():
            return function(*args, **options)

    return run
