"""Calls whose Triton kernels the table of resources measures, at the sizes that models have."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fastattn

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel

WIDTHS = (
    (torch.float32, 64),
    (torch.float32, 128),
    (torch.bfloat16, 64),
    (torch.bfloat16, 128),
    (torch.bfloat16, 256),
)
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _leaves(*tensors: Tensor) -> Iterator[Tensor]:
    return (tensor.requires_grad_() for tensor in tensors)


def _norm(cols: int, dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        # Everything at once: what takes most registers.
        x, residual = _leaves(torch.zeros(8, cols, dtype=dtype), torch.zeros(8, cols))
        weight, bias = _leaves(torch.zeros(cols, dtype=dtype), torch.zeros(cols, dtype=dtype))
        for out in fastattn.add_layer_norm(x, residual, [cols], weight, bias, dropout_p=0.1):
            out.sum().backward(retain_graph=True)

    return call


def _attention(width: int, dtype: torch.dtype, packed: bool, extra: bool) -> Callable[[], None]:
    def call() -> None:
        options = {"causal": True}
        if extra:  # everything at once
            options |= {
                "alibi_slopes": torch.zeros(2),
                "sinks": torch.zeros(2),
                "softcap": 20.0,
                "dropout_p": 0.1,
            }
        if packed:
            query, key, value = _leaves(*torch.zeros(3, 128, 2, width, dtype=dtype))
            starts = torch.tensor([0, 64, 128])
            out = fastattn.attention_varlen(query, key, value, starts, starts, **options)
            out.backward(torch.zeros_like(out))
            return
        if extra:
            options["mask"] = torch.ones(128, 128, dtype=torch.bool)
            options["bias"] = torch.zeros(2, 128, 128, dtype=dtype, requires_grad=True)
        query, key, value = _leaves(*torch.zeros(3, 1, 2, 128, width, dtype=dtype))
        out = fastattn.attention(query, key, value, **options)
        out.backward(torch.zeros_like(out))

    return call


def _decode(width: int, dtype: torch.dtype, extra: bool) -> Callable[[], None]:
    def call() -> None:
        query, key, value = torch.zeros(3, 1, 8, 1, width, dtype=dtype)
        caches = torch.zeros(2, 4, 2, 128, width, dtype=dtype)  # of 4 pages
        options = {"cache_seqlens": 130, "block_table": torch.arange(4)[None]}
        if extra:  # everything at once
            angles = torch.zeros(2, 512, width // 2)
            options |= {
                "rotary_cos": angles[0],
                "rotary_sin": angles[1],
                "rotary_interleaved": True,
                "window": (100, 0),
                "softcap": 20.0,
                "alibi_slopes": torch.zeros(8),
                "sinks": torch.zeros(8),
            }
        new = {"key": key[:, :2], "value": value[:, :2]}
        fastattn.attention_decode(query, *caches, **new, **options)

    return call


def _ffn(dtype: torch.dtype, gated: bool) -> Callable[[], None]:
    def call() -> None:
        x, up, down = _leaves(*torch.zeros(3, 64, 64, dtype=dtype))
        up_bias, down_bias = _leaves(*torch.zeros(2, 64, dtype=dtype))
        options = {"activation": "gelu"}
        if gated:
            gate, gate_bias = torch.zeros(64, 64, dtype=dtype), torch.zeros(64, dtype=dtype)
            options |= {"gate_weight": gate.requires_grad_(), "gate_bias": gate_bias}
        fastattn.ffn(x, up, down, up_bias, down_bias, **options, dropout_p=0.1).sum().backward()

    return call


def _rope(dtype: torch.dtype, interleaved: bool) -> Callable[[], None]:
    def call() -> None:
        query, key = _leaves(*torch.zeros(2, 2, 8, 64, 128, dtype=dtype))
        cos = torch.zeros(64, 48)
        positions = torch.arange(64)
        options = {"positions": positions, "interleaved": interleaved}
        query, key = fastattn.apply_rope(query, key, cos, cos, **options)
        (query.sum() + key.sum()).backward()

    return call


def _loss(dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        shapes = (2, 64), (32000, 64), (32000,)
        x, weight, bias = _leaves(*(torch.zeros(shape, dtype=dtype) for shape in shapes))
        target = torch.zeros(2).long()
        options = {"linear_bias": bias, "label_smoothing": 0.1, "softcap": 30.0}
        for reduction in ("mean", "none"):
            loss = fastattn.linear_cross_entropy(x, weight, target, reduction=reduction, **options)
            loss.sum().backward()

    return call


CALLS = (
    {
        f"ffn_{SHORT[dtype]}{'_gated' * gated}": _ffn(dtype, gated)
        for dtype in (torch.float32, torch.bfloat16)
        for gated in (False, True)
    }
    | {
        f"attention_{SHORT[dtype]}_{width}{'_packed' * packed}{'_extra' * extra}": _attention(
            width, dtype, packed, extra
        )
        for dtype, width in WIDTHS
        for packed in (False, True)
        for extra in (False, True)
    }
    | {
        f"decode_{SHORT[dtype]}_{width}{'_extra' * extra}": _decode(width, dtype, extra)
        for dtype, width in WIDTHS
        for extra in (False, True)
    }
    | {
        f"norm_{SHORT[dtype]}_{cols}": _norm(cols, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for cols in (1024, 4096, 8192)
    }
    | {f"loss_{SHORT[dtype]}": _loss(dtype) for dtype in (torch.float32, torch.bfloat16)}
    | {
        f"rope_{SHORT[dtype]}{'_interleaved' * interleaved}": _rope(dtype, interleaved)
        for dtype in (torch.float32, torch.bfloat16)
        for interleaved in (False, True)
    }
)


def compiled(call: str, architecture: int) -> list[CompiledKernel]:
    """The kernels of a call, forward and backward, for a GPU of `architecture`, say 90."""
    from fastattn.ops import launch

    with fastattn.use_kernel("triton-emulator"), launch.compiling(architecture) as kernels:
        CALLS[call]()
    return kernels


def spilled_and_registers(kernel: CompiledKernel) -> tuple[int, int]:
    """Bytes that a thread of a kernel spills, and its registers, as its binary says."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        binary, source = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        binary.write_bytes(kernel.asm["cubin"])
        said = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", binary)
        found = re.search(rf"Function {kernel.name}:\s*REG:(\d+) STACK:(\d+)", said)
        if found is None:
            raise RuntimeError(f"cuobjdump says nothing of {kernel.name}: {said}")
        if found[2] == "0":
            return 0, int(found[1])
        # What spills is on the stack, but not all that is there has been spilled.
        source.write_text(kernel.asm["ptx"])
        target = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
        flags = [] if kernel.metadata.enable_fp_fusion else ["--fmad=false"]
        ptxas = get_ptxas(kernel.metadata.target.arch).path
        said = _output(ptxas, "-v", f"-arch={target}", *flags, source, "-o", Path(folder, "out"))
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said))), int(found[1])


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr
