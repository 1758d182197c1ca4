"""What tests of kernels need: the error rule, poison, an ISA, cases; long because the cases have a
line for every feature of every function.

The cases enumerate each public function with its features and the shapes that break kernels; `run`
computes one of them, gradients included, on any kernel, dtype and memory layout:

    case = fastattn.testing.cases("attention")[0]
    inputs = case.inputs(torch.bfloat16)
    found = run(case, inputs, kernel="cpu")
    eager = run(case, inputs, kernel="reference")
    oracle = run(case, widened(inputs), kernel="reference")
    for name in oracle:
        assert_close_to_oracle(found[name], eager[name], oracle[name], name=name)
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastattn
from fastattn import _library

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "Case",
    "Draw",
    "all_cases",
    "assert_case_close_to_oracle",
    "assert_close_to_oracle",
    "assert_results_close_to_oracle",
    "assert_vanishes",
    "cases",
    "laid_out",
    "poisoned",
    "run",
    "use_isa",
    "use_threads",
    "widened",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "sliced", "transposed", "heads_inside", "expanded")

M_PERTURB, MALLOC_BYTE = -6, 0x7F  # glibc's mallopt; four such bytes are 3e38, two are an fp16 NaN


# the error rule


def assert_close_to_oracle(
    kernel: Tensor,
    eager: Tensor,
    oracle: Tensor,
    factor: float = 2.0,
    name: str = "result",
    eager_error: float = 0.0,
) -> None:
    """`kernel` is as close to the truth as eager PyTorch in the same dtype, within a factor.

    max |kernel - oracle| <= factor * max |eager - oracle| + 2 * rounding, where rounding is
    max |(oracle + 0.3 - 0.3) - oracle| computed in the dtype of `kernel`. The factor is 2 for
    outputs and 3 for gradients. An fp64 result, which eager gives no error to compare with, may
    differ from the oracle by 300 eps of the largest value. Where the oracle is infinite or NaN,
    `kernel` must be too.

    Args:
        kernel: the result in question; eager: eager PyTorch's, in the same dtype and shape.
        oracle: eager PyTorch's in fp64, from the same inputs.
        eager_error: an error that eager may make beside the one seen here; the larger one counts.

    Raises:
        AssertionError: with both errors and the bound; also where a shape or a dtype differs.
    """
    assert kernel.dtype == eager.dtype, f"{name}: dtype {kernel.dtype}, not {eager.dtype}"
    assert kernel.shape == oracle.shape, f"{name}: shape {kernel.shape}, not {oracle.shape}"
    kernel, eager, oracle = kernel.detach(), eager.detach(), oracle.detach().double()
    finite = oracle.isfinite()
    strange, wanted = kernel[~finite].double(), oracle[~finite]
    assert bool(((strange == wanted) | (strange.isnan() & wanted.isnan())).all()), (
        f"{name}: differs where the oracle is infinite or NaN"
    )
    kernel, eager, oracle = kernel[finite], eager[finite], oracle[finite]
    error = _largest(kernel.double() - oracle)
    if kernel.dtype == torch.float64:
        limit = max(300 * torch.finfo(torch.float64).eps * _largest(oracle), factor * eager_error)
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e} in fp64"
        return
    rounded = oracle.to(kernel.dtype)
    eager_error = max(eager_error, _largest(eager.double() - oracle))
    limit = factor * eager_error + 2 * _largest((rounded + 0.3 - 0.3) - rounded)
    assert error <= limit, (
        f"{name}: error {error:.2e}, allowed {limit:.2e}, eager's own {eager_error:.2e}"
    )


def assert_results_close_to_oracle(
    case: Case,
    inputs: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    eager: Mapping[str, Tensor],
    oracle: Mapping[str, Tensor],
) -> None:
    """All that `run` finds keeps the error rule; a gradient that vanishes, its own."""
    assert found.keys() == oracle.keys()
    for name in oracle:
        if name.removeprefix("grad ") in case.vanishing:
            largest = max(_largest(tensor.double()) for tensor in inputs.values())
            terms = max(tensor.numel() for tensor in inputs.values())
            assert_vanishes(found[name], 4 * largest**2, terms, name)
        else:
            factor = 3 if name.startswith("grad") else 2
            assert_close_to_oracle(found[name], eager[name], oracle[name], factor, name)


def assert_case_close_to_oracle(
    case: Case, dtype: torch.dtype, kernel: str, device: str = "cpu"
) -> None:
    """The same of a case in `dtype` on `kernel`; what runs on a device comes from there."""
    inputs = case.inputs(dtype)
    oracle = run(case, widened(inputs), "reference")
    there, moved = {name: tensor.to(device) for name, tensor in inputs.items()}, case.on(device)
    eager, found = run(moved, there, "reference"), run(moved, there, kernel)
    assert {str(tensor.device) for tensor in found.values()} == {device}
    eager, found = ({k: v.cpu() for k, v in each.items()} for each in (eager, found))
    assert_results_close_to_oracle(case, inputs, found, eager, oracle)


def assert_vanishes(gradient: Tensor, magnitude: float, terms: int, name: str = "result") -> None:
    """A gradient that is mathematically zero is no more than the rounding noise of its terms.

    Its relative error means nothing, so the bound is absolute: `terms` addends of size `magnitude`,
    each with a rounding error of a few eps of the gradient's dtype, at random.
    """
    limit = 8 * torch.finfo(gradient.dtype).eps * magnitude * math.sqrt(terms)
    found = _largest(gradient)
    assert found <= limit, f"{name}: {found:.2e} should be zero, allowed {limit:.2e}"


def _largest(difference: Tensor) -> float:
    """The largest absolute value, NaN if there is one, 0 of nothing."""
    return difference.abs().max().item() if difference.numel() else 0.0


# the machine under test


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels on ISA `name` inside the `with` block.

    Raises:
        ValueError: the library lacks it or this machine cannot run it.
    """
    before = fastattn.isa()
    _library.select_isa(name)
    try:
        yield
    finally:
        _library.select_isa(before)


@contextlib.contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Let torch, and with it the CPU kernels, use `count` threads inside the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that kernels have not written yet with NaN and huge values.

    Scratch memory of the kernels becomes NaN. Whatever the C library allocates, the kernels'
    outputs among it, is filled with the byte 0x7f: 3e38 in fp32 and bf16, NaN in fp16, 1e306 in
    fp64, so that what a kernel forgets to write fails any comparison. Other threads are poisoned
    too.

    Raises:
        RuntimeError: there is no compiled library, or the C library is not glibc.
    """
    if _library.LIBRARY is None:
        raise RuntimeError(_library.WHY_NOT)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        raise RuntimeError("fresh memory is poisoned through glibc's mallopt, got none") from None
    _library.LIBRARY.fastattn_poison_scratch(1)
    mallopt(M_PERTURB, MALLOC_BYTE ^ 0xFF)  # glibc fills with the complement
    try:
        yield
    finally:
        mallopt(M_PERTURB, 0)
        _library.LIBRARY.fastattn_poison_scratch(0)


# the cases


class Draw(NamedTuple):
    """How to draw a tensor argument.

    kind: "normal"; "weight", normal over the square root of the last size; "fp32", normal and fp32
    whatever the dtype of the case; "wide", normal and at least fp32; "holes", normal with some
    -inf; "slopes", in (0, 1) and fp32; "mask", bool with four fifths True and the first row all
    False; "distinct", normal and never laid out as "expanded"; "numbers", int64 and not drawn but
    given. Only a floating tensor other than slopes gets a gradient.
    """

    shape: tuple[int, ...]
    kind: str = "normal"
    values: tuple[int, ...] = ()

    def draw(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        if self.kind == "numbers":
            return torch.tensor(self.values, dtype=torch.int64).reshape(self.shape)
        if self.kind == "mask":
            mask = torch.rand(self.shape, generator=generator) < 0.8
            if mask.dim() > 1 and mask.shape[-2] > 1:
                mask[..., :1, :] = False
            return mask
        if self.kind == "slopes":
            return torch.rand(self.shape, generator=generator)
        values = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        if self.kind == "weight":
            values /= math.sqrt(max(1, self.shape[-1]))
        if self.kind == "holes":
            values[torch.rand(self.shape, generator=generator) < 0.2] = -math.inf
        if self.kind == "fp32" or (self.kind == "wide" and dtype != torch.float64):
            dtype = torch.float32
        return values.to(dtype)


@dataclass(frozen=True)
class Case:
    """One call of a public function.

    `vanishing` names the arguments whose gradient is mathematically zero, `refused` the reason for
    which the compiled kernels leave the case to the reference, `written` the arguments that the
    call writes to. An `inference` case has no gradients.
    """

    function: str
    name: str
    tensors: Mapping[str, Draw]
    options: Mapping[str, Any] = field(default_factory=dict)
    vanishing: tuple[str, ...] = ()
    refused: str = ""
    written: tuple[str, ...] = ()
    inference: bool = False

    @property
    def id(self) -> str:
        return f"{self.function}-{self.name}"

    def inputs(self, dtype: torch.dtype, layout: str = "contiguous") -> dict[str, Tensor]:
        """The tensor arguments; values depend on the case alone, except that "expanded" repeats."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        return {
            name: laid_out(
                draw.draw(generator, dtype),
                "contiguous" if (layout, draw.kind) == ("expanded", "distinct") else layout,
            )
            for name, draw in self.tensors.items()
        }

    def on(self, device: str) -> Case:
        """The same call of tensors on a device, where those among its options are then too."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return replace(self, options=moved)

    def call(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        """The function's outputs as a tuple."""
        out = getattr(fastattn, self.function)(**tensors, **self.options)
        return out if isinstance(out, tuple) else (out,)

    def differentiable(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of the arguments that get a gradient."""
        if self.inference:
            return []
        return [
            name
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and self.tensors[name].kind != "slopes"
        ]


def numbers(*values: int) -> Draw:
    """An argument of one dimension that holds these numbers."""
    return Draw((len(values),), "numbers", values)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides; what lies between them in memory is NaN.

    "sliced" takes every other element behind an offset, "transposed" reverses the order of the
    dimensions in memory, "heads_inside" keeps [B, H, S, D] as [B, S, H, D], "expanded" repeats the
    first element of the first of three or more dimensions with stride 0.
    """
    if layout == "sliced" and tensor.dim():
        gaps = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), 1)
        if tensor.is_floating_point():
            gaps.fill_(math.nan)
        gaps[..., 1::2] = tensor
        return gaps[..., 1::2]
    if layout == "transposed":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "heads_inside" and tensor.dim() == 4:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded" and tensor.dim() > 2 and 0 not in tensor.shape:
        return tensor[:1].contiguous().expand(tensor.shape)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    return tensor.contiguous()


def widened(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The oracle's inputs: the same values, contiguous and in fp64."""
    return {
        name: tensor.contiguous().double() if tensor.is_floating_point() else tensor.contiguous()
        for name, tensor in inputs.items()
    }


def run(
    case: Case,
    inputs: Mapping[str, Tensor],
    kernel: str | None = None,
    gradients: bool = True,
    grads: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Outputs "out 0", ... and gradients "grad query", ... for these gradients of the outputs, by
    default random and always the same.

    What the call writes to is a copy of the input, and an output "written key_cache", ... too.
    """
    leaves = {
        name: copy.deepcopy(tensor) if name in case.written else tensor.detach()
        for name, tensor in inputs.items()
    }
    wanted = case.differentiable(leaves) if gradients else []
    for name in wanted:
        leaves[name].requires_grad_()
    with fastattn.use_kernel(kernel) if kernel else contextlib.nullcontext():
        outs = case.call(**leaves)
        found = {f"out {i}": out.detach() for i, out in enumerate(outs)}
        found |= {f"written {name}": leaves[name] for name in case.written}
        if wanted:
            generator = torch.Generator().manual_seed(1)
            # Sixteenths are exact in every dtype, so the oracle gets the same gradients.
            grads = grads or [
                (torch.randn(out.shape, generator=generator) * 16).round().div(16).to(out)
                for out in outs
            ]
            got = torch.autograd.grad(outs, [leaves[name] for name in wanted], grads)
            found |= {f"grad {name}": grad for name, grad in zip(wanted, got, strict=True)}
    return found


def _attention_cases(function: str) -> Iterator[Case]:
    def case(
        name: str,
        sizes: tuple[int, int, int, int, int, int, int],
        *,
        vanishing: tuple[str, ...] = (),
        refused: str = "",
        tensors: Mapping[str, Draw] | None = None,
        **options: Any,
    ) -> Case:
        batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim = sizes
        drawn = {
            "query": Draw((batch, heads, q_len, head_dim)),
            "key": Draw((batch, kv_heads, kv_len, head_dim)),
            "value": Draw((batch, kv_heads, kv_len, value_dim)),
        }
        return Case(function, name, drawn | dict(tensors or {}), options, vanishing, refused)

    usual = (2, 3, 3, 70, 130, 32, 32)
    if function == "scaled_dot_product_attention":
        yield case("plain", usual)
        yield case("causal", (2, 2, 2, 50, 110, 24, 40), is_causal=True)
        yield case("bool_mask", usual, tensors={"attn_mask": Draw((2, 1, 70, 130), "mask")})
        yield case("float_mask", usual, tensors={"attn_mask": Draw((70, 130), "holes")})
        yield case("grouped", (2, 4, 2, 33, 65, 16, 16), enable_gqa=True, scale=0.3)
        yield Case(
            function,
            "three_dimensions",
            {
                "query": Draw((5, 40, 16)),
                "key": Draw((5, 55, 16)),
                "value": Draw((5, 55, 24)),
                "attn_mask": Draw((40, 55)),
            },
        )
        yield case("no_batch", (0, 2, 2, 5, 5, 8, 8), refused="empty")
        return
    yield case("plain", usual)
    yield case("one_row", (2, 4, 4, 1, 65, 32, 32), return_lse=True)
    yield case("one_key", (2, 3, 3, 65, 1, 16, 24), vanishing=("query", "key"))
    yield case("odd_sizes", (3, 5, 1, 37, 53, 7, 13))
    yield case("one_feature", (2, 2, 2, 66, 70, 1, 1))
    yield case("long", (1, 1, 1, 200, 1100, 32, 16), return_lse=True)
    yield case("causal", (1, 3, 3, 197, 197, 32, 32), causal=True)
    yield case("causal_short", (2, 2, 2, 60, 200, 16, 16), causal=True)
    yield case("causal_tall", (2, 2, 2, 200, 60, 16, 16), causal=True, return_lse=True)
    yield case("causal_top_left", (2, 2, 2, 60, 200, 16, 16), causal=True, align="top_left")
    yield case("window", (2, 2, 2, 150, 210, 16, 16), window=(9, 4))
    yield case("window_causal", (1, 2, 2, 250, 250, 16, 16), window=(70, None), causal=True)
    yield case("grouped", (2, 6, 2, 70, 130, 32, 24), causal=True)
    yield case("mask", usual, tensors={"mask": Draw((2, 1, 70, 130), "mask")}, return_lse=True)
    yield case("padding", usual, tensors={"mask": Draw((2, 1, 1, 130), "mask")})
    yield case("bias", usual, tensors={"bias": Draw((2, 3, 70, 130), "holes")})
    yield case("bias_of_heads", usual, tensors={"bias": Draw((3, 70, 130))}, causal=True)
    yield case("bias_of_keys", usual, tensors={"bias": Draw((2, 1, 1, 130), "fp32")})
    yield case("bias_of_rows", usual, tensors={"bias": Draw((1, 3, 70, 1))}, vanishing=("bias",))
    yield case("alibi", usual, tensors={"alibi_slopes": Draw((3,), "slopes")}, causal=True)
    yield case("sinks", (2, 64, 32, 20, 40, 16, 16), tensors={"sinks": Draw((64,))}, causal=True)
    yield case("softcap", usual, softcap=1.5)
    yield case("dropout", usual, dropout_p=0.3, seed=2**62 + 12345)
    yield case("negative_scale", usual, scale=-0.4)
    yield case(
        "everything",
        (2, 4, 2, 130, 210, 24, 40),
        tensors={
            "mask": Draw((2, 1, 130, 210), "mask"),
            "bias": Draw((4, 130, 210), "fp32"),
            "alibi_slopes": Draw((2, 4), "slopes"),
        },
        causal=True,
        window=(150, None),
        softcap=4.0,
        dropout_p=0.2,
        seed=7,
        return_lse=True,
    )
    yield case("no_batch", (0, 2, 2, 5, 7, 8, 8), refused="empty", return_lse=True)
    yield case("no_queries", (2, 2, 2, 0, 7, 8, 8), refused="empty", return_lse=True)
    yield case("no_keys", (2, 2, 2, 5, 0, 8, 8), refused="empty", return_lse=True)


def _additive_cases(function: str) -> Iterator[Case]:
    def case(
        name: str,
        sizes: tuple[int, int, int, int, int, int],
        *,
        weight: tuple[int, ...] | None = None,
        mask: tuple[int, ...] | None = None,
        vanishing: tuple[str, ...] = (),
        refused: str = "",
        **options: Any,
    ) -> Case:
        batch, heads, q_len, kv_len, width, value_dim = sizes
        tensors = {
            "query": Draw((batch, heads, q_len, width)),
            "key": Draw((batch, heads, kv_len, width)),
            "value": Draw((batch, heads, kv_len, value_dim)),
            "weight": Draw(weight or (heads, width), "weight"),
        }
        if mask:
            tensors["mask"] = Draw(mask, "mask")
        return Case(function, name, tensors, options, vanishing, refused)

    yield case("plain", (2, 2, 70, 130, 32, 24))
    yield case("one_row", (3, 1, 1, 50, 64, 80))
    yield case("one_key", (2, 2, 65, 1, 16, 24), vanishing=("query", "key", "weight"))
    yield case("odd_sizes", (3, 5, 13, 37, 7, 5), weight=(7,))
    yield case("one_feature", (2, 2, 33, 40, 1, 1))
    yield case("long", (1, 1, 150, 600, 9, 16))
    yield case("wide", (1, 1, 17, 35, 300, 40))
    yield case("mask", (2, 3, 40, 70, 16, 16), mask=(2, 1, 40, 70))
    yield case("padding", (2, 2, 30, 90, 24, 16), mask=(2, 1, 1, 90))
    yield case("causal", (2, 2, 150, 150, 16, 8), causal=True)
    yield case("causal_tall", (1, 2, 90, 60, 16, 8), causal=True, mask=(90, 60))
    yield case("no_batch", (0, 2, 5, 7, 8, 8), refused="empty")
    yield case("no_queries", (2, 2, 0, 7, 8, 8), refused="empty")
    yield case("no_keys", (2, 2, 5, 0, 8, 8), refused="empty")


def _varlen_cases(function: str) -> Iterator[Case]:
    def case(
        name: str,
        q_lens: tuple[int, ...],
        kv_lens: tuple[int, ...],
        sizes: tuple[int, int, int, int],
        *,
        refused: str = "",
        tensors: Mapping[str, Draw] | None = None,
        **options: Any,
    ) -> Case:
        heads, kv_heads, head_dim, value_dim = sizes
        drawn = {
            "query": Draw((sum(q_lens), heads, head_dim), "distinct"),
            "key": Draw((sum(kv_lens), kv_heads, head_dim), "distinct"),
            "value": Draw((sum(kv_lens), kv_heads, value_dim), "distinct"),
            "cu_seqlens_q": numbers(0, *accumulate(q_lens)),
            "cu_seqlens_k": numbers(0, *accumulate(kv_lens)),
        }
        return Case(function, name, drawn | dict(tensors or {}), options, refused=refused)

    lengths = (5, 70, 1, 33)
    yield case("plain", lengths, lengths, (3, 3, 16, 16))
    yield case("causal", lengths, lengths, (2, 2, 16, 16), causal=True, max_seqlen_q=70)
    yield case("one_sequence", (70,), (130,), (2, 1, 24, 24), return_lse=True)
    yield case("no_rows", (0, 40, 0, 3, 7), (9, 0, 0, 50, 8), (2, 2, 16, 8), return_lse=True)
    yield case("long_and_short", (3, 900, 2), (2, 800, 5), (1, 1, 16, 16), causal=True)
    yield case(
        "everything",
        (20, 61, 0, 130),
        (50, 61, 3, 100),
        (4, 2, 24, 40),
        tensors={"alibi_slopes": Draw((4, 4), "slopes"), "sinks": Draw((4,))},
        causal=True,
        align="top_left",
        window=(40, None),
        softcap=4.0,
        dropout_p=0.2,
        seed=7,
        return_lse=True,
    )
    yield case("nothing", (0, 0), (0, 4), (2, 2, 8, 8), refused="empty", return_lse=True)


def _decode_cases(function: str) -> Iterator[Case]:
    def case(
        name: str,
        lengths: tuple[int, ...],
        sizes: tuple[int, int, int, int, int, int],
        *,
        page: int | None = None,
        new: int = 0,
        rotary: int = 0,
        refused: str = "",
        tensors: Mapping[str, Draw] | None = None,
        **options: Any,
    ) -> Case:
        heads, kv_heads, q_len, room, head_dim, value_dim = sizes
        batch = len(lengths)
        lead = (batch, kv_heads, room)
        drawn = {"query": Draw((batch, heads, q_len, head_dim))}
        if page is not None:
            columns = -(-room // page)
            lead = (batch * columns + 1, kv_heads, page)  # one page that nobody owns
            table = [n * 7 % lead[0] for n in range(1, lead[0])]  # 7 divides no such number here
            drawn["block_table"] = Draw((batch, columns), "numbers", tuple(table))
        drawn |= {
            "key_cache": Draw((*lead, head_dim), "distinct"),
            "value_cache": Draw((*lead, value_dim), "distinct"),
            "cache_seqlens": numbers(*lengths),
        }
        if new:
            drawn["key"] = Draw((batch, kv_heads, new, head_dim))
            drawn["value"] = Draw((batch, kv_heads, new, value_dim))
        if rotary:
            drawn["rotary_cos"] = drawn["rotary_sin"] = Draw((room, rotary))
        written = ("key_cache", "value_cache") if new else ()
        drawn |= tensors or {}
        return Case(function, name, drawn, options, (), refused, written, inference=True)

    yield case("plain", (300, 7, 1), (4, 4, 1, 300, 32, 32), return_lse=True)
    yield case("grouped", (520, 260), (12, 2, 1, 530, 40, 24), new=1)
    yield case("few_queries", (600, 0, 255), (6, 2, 4, 700, 32, 16), new=4, causal=True)
    yield case("paged", (70, 33, 0), (4, 2, 2, 90, 16, 16), page=16, new=3, return_lse=True)
    yield case("rotary", (40, 9), (4, 1, 3, 50, 24, 8), new=3, rotary=10, rotary_interleaved=False)
    yield case("prompt", (0, 30), (4, 2, 25, 60, 16, 16), new=25, causal=True, return_lse=True)
    yield case("window", (900, 30), (2, 1, 2, 900, 16, 16), window=(300, 0), softcap=2.0)
    yield case("odd_sizes", (37, 11), (5, 5, 3, 37, 7, 13), scale=-0.4)
    yield case(
        "everything",
        (500, 3),
        (8, 2, 3, 510, 48, 40),
        page=9,
        new=5,
        rotary=20,
        rotary_interleaved=True,
        tensors={"alibi_slopes": Draw((2, 8), "slopes"), "sinks": Draw((8,))},
        causal=True,
        window=(400, None),
        softcap=4.0,
        return_lse=True,
    )
    yield case("no_keys", (0, 0), (2, 2, 1, 0, 8, 8), refused="empty", return_lse=True)


def _norm_cases(function: str) -> Iterator[Case]:
    added, centred = function.startswith("add_"), function.endswith("layer_norm")

    def case(
        name: str,
        shape: tuple[int, ...],
        dims: int = 1,
        weight: str | None = "normal",
        bias: str | None = "normal",
        residual: str = "normal",
        **options: Any,
    ) -> Case:
        tensors = {"input": Draw(shape)}
        if added:
            tensors["residual"] = Draw(shape, residual)
        normalized = shape[len(shape) - dims :]
        if weight:
            tensors["weight"] = Draw(normalized, weight)
        if bias and centred:
            tensors["bias"] = Draw(normalized, bias)
        return Case(function, name, tensors, {"normalized_shape": normalized, **options})

    yield case("plain", (70, 256))
    yield case("odd_sizes", (3, 11, 37))
    yield case("one_row", (1, 1000), eps=1e-3)
    yield case("no_parameters", (40, 129), weight=None, bias=None)
    yield case("fp32_parameters", (90, 65), weight="fp32", bias="fp32")
    yield case("weight_only", (40, 72), bias=None)
    yield case("two_dimensions", (2, 15, 6, 21), dims=2)
    yield case("few_columns", (500, 3))
    yield case("many_columns", (2, 9000))
    yield case("no_rows", (0, 16))
    if not added:
        return
    yield case("dropout", (70, 200), dropout_p=0.3, seed=2**62 + 12345)
    yield case("fp32_residual", (5, 13, 50), residual="wide", weight="fp32")
    yield case("sum_unwritten", (40, 130), return_sum=False)
    yield case(
        "everything",
        (3, 15, 4, 30),
        dims=2,
        residual="wide",
        dropout_p=0.2,
        seed=7,
        return_sum=False,
    )


def _linear_cases(function: str) -> Iterator[Case]:
    def case(
        name: str, lead: tuple[int, ...], sizes: tuple[int, int], bias: bool, **options: Any
    ) -> Case:
        features, out_features = sizes
        tensors = {
            "input": Draw((*lead, features)),
            "weight": Draw((out_features, features), "weight"),
        }
        if bias:
            tensors["bias"] = Draw((out_features,))
        return Case(function, name, tensors, options)

    yield case("plain", (50,), (129, 70), bias=True)
    yield case("no_bias", (2, 25), (64, 40), bias=False)
    yield case("deep", (13,), (900, 33), bias=True)
    yield case("vector", (), (96, 48), bias=True)
    yield case("one_row", (1,), (257, 130), bias=True, activation="gelu")
    yield case("odd_sizes", (3, 7), (11, 5), bias=True, activation="silu")
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        yield case(activation, (60,), (100, 90), bias=True, activation=activation)
    yield case("no_rows", (0,), (16, 8), bias=True, activation="relu")
    yield case("no_features", (5,), (0, 8), bias=True)
    yield case("no_outputs", (5,), (8, 0), bias=True)


def _ffn_cases(function: str) -> Iterator[Case]:
    def case(
        name: str,
        lead: tuple[int, ...],
        sizes: tuple[int, int, int],
        *,
        gated: bool,
        bias: bool = True,
        **options: Any,
    ) -> Case:
        features, hidden, out_features = sizes
        tensors = {
            "input": Draw((*lead, features)),
            "up_weight": Draw((hidden, features), "weight"),
            "down_weight": Draw((out_features, hidden), "weight"),
        }
        if bias:
            tensors |= {"up_bias": Draw((hidden,)), "down_bias": Draw((out_features,))}
        if gated:
            tensors["gate_weight"] = Draw((hidden, features), "weight")
        if gated and bias:
            tensors["gate_bias"] = Draw((hidden,))
        return Case(function, name, tensors, options)

    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        for gated in (False, True):
            name = f"{activation}{'_gated' * gated}"
            yield case(name, (40,), (64, 96, 50), gated=gated, activation=activation)
    yield case("no_bias", (2, 15), (40, 72, 40), gated=True, bias=False, activation="silu")
    yield case("one_row", (1,), (70, 130, 70), gated=False)
    yield case("odd_sizes", (3, 5), (13, 29, 7), gated=True)
    yield case("deep", (9,), (500, 450, 30), gated=True, activation="silu")
    yield case("vector", (), (32, 48, 32), gated=False)
    yield case("dropout", (35,), (30, 150, 20), gated=False, dropout_p=0.3, seed=2**62 + 12345)
    yield case("recompute", (40,), (64, 96, 50), gated=False, recompute=True)
    yield case(
        "everything",
        (3, 13),
        (40, 150, 24),
        gated=True,
        activation="silu",
        dropout_p=0.2,
        seed=7,
        recompute=True,
    )
    yield case("no_rows", (0,), (16, 24, 16), gated=True, dropout_p=0.5, recompute=True)
    yield case("no_hidden", (4,), (16, 0, 8), gated=False)


def _loss_cases(function: str) -> Iterator[Case]:
    def case(
        name: str,
        lead: tuple[int, ...],
        sizes: tuple[int, int],
        *,
        bias: bool = True,
        ignored: int = 0,
        vanishing: tuple[str, ...] = (),
        **options: Any,
    ) -> Case:
        features, classes = sizes
        ignore_index = options.get("ignore_index", -100)
        targets = [7919 * i % 10007 % classes for i in range(math.prod(lead))]
        for i in range(ignored):  # the first row, and others here and there
            targets[4 * i % len(targets)] = ignore_index
        tensors = {
            "input": Draw((*lead, features)),
            "linear_weight": Draw((classes, features), "weight"),
            "target": Draw(lead, "numbers", tuple(targets)),
        }
        if bias:
            tensors["linear_bias"] = Draw((classes,))
        return Case(function, name, tensors, options, vanishing)

    yield case("plain", (50,), (129, 70))
    yield case("no_bias", (2, 25), (64, 40), bias=False)
    yield case("ignored", (3, 40), (30, 50), ignored=70)
    yield case("all_ignored", (4,), (16, 8), ignored=4, reduction="sum")
    yield case("sum", (60,), (40, 33), reduction="sum", ignored=3)
    yield case("none", (2, 30), (40, 33), reduction="none", ignored=3)
    yield case("smoothing", (40,), (50, 61), label_smoothing=0.1, ignored=3)
    yield case("softcap", (40,), (50, 61), softcap=1.5)
    yield case("vector", (), (96, 48))
    yield case("one_row", (1,), (257, 130))
    yield case("odd_sizes", (3, 7), (11, 5))
    yield case("one_class", (9,), (8, 1), vanishing=("input", "linear_weight", "linear_bias"))
    yield case("chunks", (270,), (5, 4099), ignored=11)  # more rows than logits are made of at once
    yield case(
        "everything",
        (5, 13),
        (10, 42),
        reduction="none",
        ignore_index=3,
        ignored=20,
        label_smoothing=0.2,
        softcap=2.0,
    )
    yield case("no_rows", (0,), (16, 8), reduction="sum")
    yield case("no_features", (5,), (0, 8))


def _rope_cases(function: str) -> Iterator[Case]:
    def case(
        name: str,
        sizes: tuple[int, int, int, int, int],
        angles: int,
        tables: tuple[int, ...] | None = None,
        **options: Any,
    ) -> Case:
        batch, heads, kv_heads, length, width = sizes
        table = Draw((*(tables or (length,)), angles), "slopes")
        tensors = {"query": Draw((batch, heads, length, width)), "cos": table, "sin": table}
        if kv_heads:
            tensors["key"] = Draw((batch, kv_heads, length, width))
        else:
            options["key"] = None
        return Case(function, name, tensors, options)

    yield case("plain", (2, 3, 3, 50, 64), 32)
    yield case("interleaved", (2, 3, 3, 50, 64), 32, interleaved=True)
    yield case("partial", (2, 4, 2, 33, 40), 12)
    yield case("partial_interleaved", (2, 4, 2, 33, 40), 12, interleaved=True)
    yield case("odd_sizes", (3, 5, 1, 7, 13), 5)
    yield case("odd_sizes_interleaved", (3, 5, 1, 7, 13), 5, interleaved=True)
    yield case("angles_of_batches", (2, 3, 1, 20, 32), 16, tables=(2, 20))
    yield case("one_row", (1, 8, 2, 1, 128), 64, tables=(1, 1))
    yield case("query_alone", (2, 3, 0, 17, 24), 12)
    positions = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    yield case("positions", (2, 3, 1, 5, 32), 16, tables=(10,), positions=positions)
    yield case(
        "shared_positions", (2, 3, 1, 5, 32), 8, (10,), positions=positions[0], interleaved=True
    )
    yield case("no_angles", (2, 2, 2, 5, 8), 0)
    yield case("no_rows", (2, 2, 2, 0, 8), 4)


_TABLE = {
    "attention": _attention_cases,
    "attention_varlen": _varlen_cases,
    "attention_decode": _decode_cases,
    "scaled_dot_product_attention": _attention_cases,
    "additive_attention": _additive_cases,
    "layer_norm": _norm_cases,
    "add_layer_norm": _norm_cases,
    "rms_norm": _norm_cases,
    "add_rms_norm": _norm_cases,
    "linear": _linear_cases,
    "linear_cross_entropy": _loss_cases,
    "ffn": _ffn_cases,
    "apply_rope": _rope_cases,
}


def cases(function: str) -> list[Case]:
    """The cases of one public function; none for a function that the table does not know."""
    return list(_TABLE[function](function)) if function in _TABLE else []


def all_cases() -> list[Case]:
    """The cases of every public function."""
    return [case for function in _TABLE for case in cases(function)]
