"""The CUDA attention kernels for sm_90 in the emulator, both ways: cases, schedules, memory, leaks,
and what is left to the kernels for sm_80."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import _library, emulator
from fastattn.emulator import device
from fastattn.testing import Case, Draw, assert_case_close_to_oracle, cases, laid_out, run

pytestmark = pytest.mark.skipif(bool(_library.WHY_NO_CUDA), reason=_library.WHY_NO_CUDA)

BF16, F16 = HALVES = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def on_sm90() -> Iterator[None]:
    with device.emulating(90), fastattn.use_kernel("emulator"):
        yield


def kernels(reports: list[emulator.Report]) -> list[str]:
    return [report.kernel for report in reports]


def wide(head_dim: int, value_dim: int, extra: bool = False) -> Case:
    """Several blocks of queries and of keys, without extras or with all of them."""
    tensors = {
        "query": Draw((1, 2, 150, head_dim)),
        "key": Draw((1, 1, 300, head_dim)),
        "value": Draw((1, 1, 300, value_dim)),
        "sinks": Draw((2,)),
    }
    options = {"causal": True, "window": (200, None), "return_lse": True}
    if extra:
        tensors["mask"] = Draw((150, 300), "mask")
        tensors["bias"] = Draw((2, 150, 300), "fp32")
        tensors["alibi_slopes"] = Draw((2,), "slopes")
        options |= {"softcap": 2.0, "dropout_p": 0.2, "seed": 3}
    name = f"wide_{head_dim}" + "_extra" * extra
    return Case("attention", name, tensors, options, inference=True)


def whole_rows(case: Case) -> bool:
    """Whether rows of keys and values are whole 16 bytes."""
    return all(case.tensors[name].shape[-1] % 8 == 0 for name in ("key", "value"))


SERVED = [
    case
    for function in ("attention", "attention_varlen")
    for case in cases(function)
    if not case.refused and whole_rows(case)
]
ENUMERATED = [replace(case, inference=True) for case in SERVED]
WIDE = [
    wide(64, 56), wide(72, 128), wide(256, 40),
    wide(56, 64, extra=True), wide(128, 72, extra=True),
]  # fmt: skip


def of_one_type(cases: list[Case]) -> pytest.MarkDecorator:
    """Cases in one of two types, whose code is the same."""
    typed = zip(cases, itertools.cycle(HALVES), strict=False)
    return pytest.mark.parametrize(
        ("case", "dtype"),
        [pytest.param(case, dtype, id=f"{case.id}-{dtype}") for case, dtype in typed],
    )


@of_one_type(ENUMERATED + WIDE)
def test_matches_oracle(case: Case, dtype: torch.dtype) -> None:
    with device.watching() as reports:
        assert_case_close_to_oracle(case, dtype, "emulator")
    assert reports and all(name.endswith("_sm90") for name in kernels(reports))


def of_groups(reports: list[emulator.Report]) -> list[str]:
    """The kernels which sum gradients of queries, keys and values up, and of a bias."""
    summing = ("queries", "keys", "bias")
    return [name for name in kernels(reports) if name.split("_")[2] in summing]


# All that have gradients, and several blocks of either side.
DIFFERENTIATED = [case for case in SERVED if not case.inference] + [
    replace(case, inference=False)
    for case in (wide(64, 56), wide(72, 128), wide(56, 64, extra=True), wide(128, 72, extra=True))
]


@of_one_type(DIFFERENTIATED)
def test_gradients_match_oracle(case: Case, dtype: torch.dtype) -> None:
    with device.watching() as reports:
        assert_case_close_to_oracle(case, dtype, "emulator")
    summing = of_groups(reports)
    assert len(summing) >= 2 and all(name.endswith("_sm90") for name in summing)


def gradients(tensors: list[Tensor], grad_out: Tensor, **options: object) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(fastattn.attention(*leaves, **options), leaves, grad_out)


@pytest.mark.parametrize("terms", ["", "bias", "fp32 bias", "dropout"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_memory_of_gradients_is_moved_whole(head_dim: int, terms: str) -> None:
    """Under every schedule, of 64, with the same bits."""
    *tensors, grad_out = (torch.randn(1, 1, 192, head_dim).bfloat16() for _ in range(4))
    options = {"dropout_p": 0.1, "seed": 3} if terms == "dropout" else {}
    leaves = [tensor.requires_grad_() for tensor in tensors]
    if "bias" in terms:
        bias = torch.randn(192, 192, dtype=torch.float32 if "fp32" in terms else BF16)
        leaves.append(bias.requires_grad_())
        options["bias"] = bias
    with device.watching(thorough=head_dim == 64) as reports:
        out = fastattn.attention(*tensors, causal=True, **options)
        torch.autograd.grad(out, leaves, grad_out)
    assert len(of_groups(reports)) == 2 + ("bias" in terms)
    for report in reports:
        assert report.ok, report
        assert report.counters.bank_conflicts == 1, report.counters
        assert report.counters.sector_efficiency >= 0.95, report.counters


@pytest.mark.parametrize("rubbish", [math.nan, -math.inf])
@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_nothing_leaks_into_gradients(kind: str, rubbish: float) -> None:
    """From keys that a mask or a bias hides, of the second with a row that sees nothing."""
    query, key, value, grad_out = (torch.randn(2, 1, 170, 16).bfloat16() for _ in range(4))
    hidden = torch.arange(170) >= 100
    bias = torch.randn(170, 170).bfloat16()
    bias[:, hidden] = bias[5] = -math.inf

    def found() -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        terms = {"mask": ~hidden} if kind == "mask" else {"bias": bias.clone().requires_grad_()}
        out = fastattn.attention(*leaves, **terms)
        leaves += [] if kind == "mask" else [terms["bias"]]
        grads = torch.autograd.grad(out, leaves, grad_out)
        return [grads[0], *(grad[:, :, ~hidden] for grad in grads[1:3]), *grads[3:]]

    expected = found()
    key[:, :, hidden] = value[:, :, hidden] = rubbish
    assert all(map(torch.equal, found(), expected))


@pytest.mark.parametrize("position", range(4), ids=["query", "key", "value", "grad_out"])
def test_what_is_not_finite_spoils_the_gradients_that_meet_it(position: int) -> None:
    """As the kernels for sm_80 have it, among rows whose blocks are the same and others."""
    *tensors, grad_out = (torch.randn(1, 1, 200, 16).bfloat16() for _ in range(4))
    (*tensors, grad_out)[position][:, :, 150, 3] = math.nan
    found = gradients(tensors, grad_out, causal=True)
    with device.emulating(80):
        expected = gradients(tensors, grad_out, causal=True)
    assert found[0].isnan().any() and not found[0].isnan().all()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0.1, rtol=0.1, equal_nan=True)


GRADIENTS_LEFT = {
    "wide": {"head_dim": 136},
    "odd": {"head_dim": 20},
    "sm_80": {"architecture": 80},
}


@pytest.mark.parametrize("kind", GRADIENTS_LEFT)
def test_gradients_left_to_other_kernels(kind: str) -> None:
    change = GRADIENTS_LEFT[kind]
    shape = (1, 1, 20, change.get("head_dim", 24))
    *tensors, grad_out = (torch.randn(shape).half() for _ in range(4))
    with device.emulating(change.get("architecture", 90)), device.watching() as reports:
        gradients(tensors, grad_out)
    assert of_groups(reports) and not any(name.endswith("_sm90") for name in of_groups(reports))


@pytest.mark.parametrize("extra", [False, True])
def test_every_schedule_gives_the_same_bits(extra: bool) -> None:
    """Also of the second look at values that are no numbers."""
    case = wide(64, 64, extra)
    inputs = case.inputs(BF16)
    inputs["value"][:, :, 200] = math.nan
    with device.watching(thorough=True) as reports:
        run(case, inputs, "emulator")
    assert kernels(reports) == [f"attention_forward_bf16_{'extra_' * extra}64_sm90"]
    assert all(report.ok for report in reports)


@pytest.mark.parametrize(
    ("head_dim", "extra"), [(64, False), (128, False), (256, False), (64, True), (128, True)]
)
def test_memory_is_moved_whole(head_dim: int, extra: bool) -> None:
    """Tiles without bank conflicts, rows without wasted sectors, and products of warp groups."""
    query, key, value = (torch.randn(1, 1, n, head_dim).bfloat16() for n in (64, 192, 192))
    terms = {"mask": torch.rand(64, 192) < 0.8, "bias": torch.randn(64, 192)} if extra else {}
    with device.watching() as reports:
        fastattn.attention(query, key, value, causal=True, **terms)
    counters = reports[0].counters
    assert counters.bank_conflicts == 1, counters
    assert counters.sector_efficiency >= 0.95, counters
    mix = counters.mix()
    assert any(op.startswith("wgmma.mma_async") for op in mix)
    assert not any(op.startswith("mma.sync") for op in mix)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", range(3), ids=["query", "key", "value"])
def test_what_is_not_finite_spoils_who_sees_it(position: int, rubbish: float) -> None:
    """And nobody else, among rows whose block of keys is the same and others."""
    tensors = [torch.randn(1, 1, 200, 16).bfloat16() for _ in range(3)]
    expected = fastattn.attention(*tensors, causal=True)
    tensors[position][:, :, 150, 3] = rubbish
    found = fastattn.attention(*tensors, causal=True)
    spoilt = [150] if position == 0 else [*range(150, 200)]
    assert found.isnan().all(-1)[0, 0].nonzero().flatten().tolist() == spoilt
    others = [row for row in range(200) if row not in spoilt]
    torch.testing.assert_close(found[:, :, others], expected[:, :, others])


@pytest.mark.parametrize("rubbish", [math.nan, -math.inf])
def test_nothing_leaks_from_under_a_mask(rubbish: float) -> None:
    query, key, value = (torch.randn(2, 1, 170, 16).bfloat16() for _ in range(3))
    mask = torch.arange(170) < 100
    expected = fastattn.attention(query, key, value, mask=mask, return_lse=True)
    key[:, :, 100:] = value[:, :, 100:] = rubbish
    found = fastattn.attention(query, key, value, mask=mask, return_lse=True)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5])], ids=["", "sinks"])
def test_rows_that_see_no_keys_are_zero(sinks: Tensor | None) -> None:
    """Those of whole blocks, and those beside others that see some."""
    query, key, value = (torch.randn(1, 1, n, 16).half() for n in (400, 20, 20))
    out, lse = fastattn.attention(query, key, value, sinks=sinks, causal=True, return_lse=True)
    assert (out[:, :, :380] == 0).all() and out[:, :, 380:].all()
    assert (lse[:, :, :380] == (-math.inf if sinks is None else 0.5)).all()
    assert lse[:, :, 380:].isfinite().all()


@pytest.mark.parametrize("layout", ["sliced", "transposed", "heads_inside", "expanded"])
def test_any_strides(layout: str) -> None:
    """Of queries, and where rows are whole, of keys and values."""
    query, key, value = (torch.randn(2, 3, 40, 24).bfloat16() for _ in range(3))
    found = laid_out(query, layout)
    of_keys = layout if layout in ("heads_inside", "expanded") else "contiguous"
    strided = [found, laid_out(key, of_keys), laid_out(value, of_keys)]
    with device.watching() as reports:
        found = fastattn.attention(*strided)
        expected = fastattn.attention(*(tensor.contiguous() for tensor in strided))
    assert kernels(reports) == ["attention_forward_bf16_64_sm90"] * 2
    assert torch.equal(found, expected)


def shifted(tensor: Tensor) -> Tensor:
    """The same elsewhere, not on a multiple of 16 bytes."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


LEFT = {
    "fp32": ("attention_forward_f32_extra_32", {"dtype": torch.float32}),
    "odd": ("attention_forward_bf16_64", {"head_dim": 20}),
    "key": ("attention_forward_bf16_64", {"shift": "key"}),
    "value": ("attention_forward_bf16_64", {"shift": "value"}),
    "wide": ("attention_forward_bf16_extra_256", {"head_dim": 136, "softcap": 2.0}),
    "sm_80": ("attention_forward_bf16_64", {"architecture": 80}),
    "sm_100": ("attention_forward_bf16_64", {"architecture": 100}),
}


@pytest.mark.parametrize("kind", LEFT)
def test_what_is_left_to_other_kernels(kind: str) -> None:
    kernel, change = LEFT[kind]
    shape, dtype = (1, 2, 40, change.get("head_dim", 24)), change.get("dtype", BF16)
    tensors = {name: torch.randn(shape).to(dtype) for name in ("query", "key", "value")}
    if name := change.get("shift"):
        tensors[name] = shifted(tensors[name])
    with device.emulating(change.get("architecture", 90)), device.watching() as reports:
        fastattn.attention(**tensors, softcap=change.get("softcap"))
    assert kernels(reports) == [kernel]
