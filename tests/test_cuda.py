"""The CUDA kernels: what the emulator finds and counts, and when they are chosen."""

from __future__ import annotations

import math
import re
import struct

import pytest
import torch

import fastattn
from fastattn import _library, dispatch, emulator, registry
from fastattn.emulator import device
from fastattn.ops.ffn import choice
from fastattn.testing import all_cases, run

CASES = {
    case.id: case
    for case in all_cases()
    if "cuda" in registry.FUNCTIONS[case.function][1].kernels and not case.refused
}

emulated = pytest.mark.skipif(bool(_library.WHY_NO_CUDA), reason=_library.WHY_NO_CUDA)


# in the emulator

WATCHED = [
    ("add_layer_norm-everything", torch.bfloat16),
    ("add_layer_norm-dropout", torch.float32),
    ("add_layer_norm-dropout", torch.float16),
    ("add_rms_norm-odd_sizes", torch.bfloat16),
    ("layer_norm-few_columns", torch.float32),
    ("attention-causal_tall", torch.float16),
    ("attention-one_key", torch.float32),
    ("attention-odd_sizes", torch.bfloat16),
    ("attention_varlen-everything", torch.float16),
    ("linear-gelu", torch.bfloat16),
    ("ffn-silu_gated", torch.float16),
    ("ffn-odd_sizes", torch.float32),
]


@emulated
@pytest.mark.parametrize(("case_id", "dtype"), WATCHED)
def test_every_schedule_gives_the_same_bits(case_id: str, dtype: torch.dtype) -> None:
    """And nothing is found under any of them: a finding would raise."""
    case = CASES[case_id]
    with device.watching(thorough=True) as reports:
        run(case, case.inputs(dtype), "emulator", gradients=not case.id.startswith("attention"))
    assert reports and all(report.ok for report in reports)


ALIGNED = [
    ("layer_norm-plain", torch.float32),
    ("add_layer_norm-plain", torch.bfloat16),
    ("add_rms_norm-dropout", torch.float16),
]


@emulated
@pytest.mark.parametrize(("case_id", "dtype"), ALIGNED)
def test_memory_is_moved_whole(case_id: str, dtype: torch.dtype) -> None:
    """Rows of whole 16 bytes: every sector is used, and no bank serves twice."""
    case = CASES[case_id]
    with device.watching() as reports:
        run(case, case.inputs(dtype), "emulator")
    for report in reports:
        assert report.counters.bank_conflicts == 1, report.counters
        assert report.counters.sector_efficiency >= 0.95, report.counters


@emulated
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_moves_memory_whole(head_dim: int) -> None:
    """Tiles without bank conflicts, rows without wasted sectors, and products on tensor cores."""
    query, key, value = (torch.randn(1, 1, 64, head_dim).bfloat16() for _ in range(3))
    with device.watching() as reports, fastattn.use_kernel("emulator"):
        fastattn.attention(query, key, value, causal=True)
    counters = reports[0].counters
    assert counters.bank_conflicts == 1, counters
    assert counters.sector_efficiency >= 0.95, counters
    assert counters.mix()["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] > 0


@emulated
@pytest.mark.parametrize("dtype", dispatch.CUDA_DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_products_move_memory_whole(gated: bool, dtype: torch.dtype) -> None:
    """Forward and backward of a block, whose rows are whole 16 bytes."""
    sizes = {"input": (80, 64), "up_weight": (128, 64), "down_weight": (64, 128)}
    sizes |= {"up_bias": (128,)} | ({"gate_weight": (128, 64)} if gated else {})
    leaves = {name: torch.randn(size).to(dtype).requires_grad_() for name, size in sizes.items()}
    with device.watching() as reports, fastattn.use_kernel("emulator"):
        torch.autograd.grad(fastattn.ffn(**leaves).sum(), list(leaves.values()))
    assert len(reports) == 11 if gated else 9
    for report in reports:
        counters = report.counters
        assert counters.sector_efficiency >= 0.95, counters
        if dtype != torch.float32:
            assert counters.bank_conflicts == 1, counters
            products = sum(n for name, n in counters.mix().items() if name.startswith("mma.sync"))
            assert (products > 0) == ("forward" in report.kernel or "grad" in report.kernel)
        # Lanes of fp32 share what they read, so that 16 bytes a lane are fewer than four
        # wavefronts hold; they take no more than four.
        for site in (site for site in counters.sites if site.space == "shared"):
            wide = re.search(r"\.v(\d)\.|\.x(4)\.", site.place.text)
            wavefronts = int(wide[1] or wide[2]) if wide else 1
            assert site.transfers <= site.executed * wavefronts, site


@emulated
def test_products_begin_anywhere() -> None:
    """Operands that are not aligned, and others that are, give the same bits."""
    tensors = [torch.randn(size).bfloat16() for size in ((20, 48), (24, 48), (24,))]
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in tensors]
    assert all(tensor.data_ptr() % 16 for tensor in shifted)
    with fastattn.use_kernel("emulator"):
        whole, parts = (fastattn.linear(*each, "silu") for each in (tensors, shifted))
    assert torch.equal(whole, parts)


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_rows_are_independent(dtype: torch.dtype) -> None:
    """What is not finite spoils its own row, and what lies behind a matrix nothing."""
    x, weight = torch.randn(70, 40).to(dtype), torch.randn(33, 40).to(dtype)
    with fastattn.use_kernel("emulator"):
        expected = fastattn.linear(x, weight, activation="gelu")
        x[3], x[65] = math.nan, math.inf
        found = fastattn.linear(x, weight, activation="gelu")
    others = torch.ones(70, dtype=torch.bool)
    others[[3, 65]] = False
    assert found[3].isnan().all() and torch.equal(found[others], expected[others])


@emulated
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", range(3), ids=["query", "key", "value"])
def test_what_is_not_finite_spoils_who_sees_it(position: int, rubbish: float) -> None:
    """And nobody else: one bad element among queries, keys or values of a causal attention."""
    tensors = [torch.randn(1, 1, 80, 16) for _ in range(3)]
    expected = fastattn.attention(*tensors, causal=True)
    tensors[position][:, :, 25, 3] = rubbish
    with fastattn.use_kernel("emulator"):
        found = fastattn.attention(*tensors, causal=True)
    rows = found.isnan().all(-1)[0, 0].nonzero().flatten().tolist()
    assert rows == ([25] if position == 0 else [*range(25, 80)])
    torch.testing.assert_close(found[:, :, :25], expected[:, :, :25])


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rubbish", [math.nan, -math.inf])
def test_nothing_leaks_from_under_a_mask(rubbish: float, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 1, 70, 16).to(dtype) for _ in range(3))
    mask = torch.arange(70) < 40
    with fastattn.use_kernel("emulator"):
        expected = fastattn.attention(query, key, value, mask=mask, return_lse=True)
        key[:, :, 40:] = value[:, :, 40:] = rubbish
        found = fastattn.attention(query, key, value, mask=mask, return_lse=True)
    assert all(map(torch.equal, found, expected))


@emulated
@pytest.mark.parametrize("layout", ["sliced", "transposed", "heads_inside", "expanded"])
def test_any_strides(layout: str) -> None:
    case = CASES["attention-mask"]
    inputs = case.inputs(torch.bfloat16, layout)
    plain = {name: tensor.contiguous() for name, tensor in inputs.items()}
    for found, expected in zip(
        run(case, inputs, "emulator", gradients=False).values(),
        run(case, plain, "emulator", gradients=False).values(),
        strict=True,
    ):
        assert torch.equal(found, expected)


@emulated
def test_wide_heads_are_refused() -> None:
    for dtype, widest in ((torch.float32, 128), (torch.bfloat16, 256)):
        wide = torch.randn(1, 1, 2, widest + 1).to(dtype)
        with (
            fastattn.use_kernel("emulator"),
            pytest.raises(fastattn.UnavailableKernelError, match=f"wider than {widest}"),
        ):
            fastattn.attention(wide, wide, wide)


@emulated
def test_rows_too_long_for_registers() -> None:
    """Rows that are read again, and sums of gradients that stay in global memory."""
    x, weight = torch.randn(3, 30_000), torch.randn(30_000)
    found = {}
    for kernel in ("emulator", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        with fastattn.use_kernel(kernel):
            out = fastattn.layer_norm(leaves[0], [30_000], leaves[1])
            found[kernel] = (out, *torch.autograd.grad(out.square().sum(), leaves))
    for ours, eager in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@emulated
def test_a_view_that_is_not_aligned() -> None:
    memory = torch.randn(4 * 64 + 1)
    for x in (memory[1:].view(4, 64), memory[:-1].view(4, 64)):
        with fastattn.use_kernel("emulator"):
            out = fastattn.rms_norm(x, [64])
        torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, [64]))


@emulated
def test_a_fault_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """An output that is declared too small is written out of bounds, and the call says so."""
    honest = device._argument

    def smaller(given: device.Argument) -> object:
        if given.written:
            given.extent //= 2
        return honest(given)

    monkeypatch.setattr(device, "_argument", smaller)
    with (
        fastattn.use_kernel("emulator"),
        pytest.raises(RuntimeError, match=r"out-of-bounds[\s\S]*norm_forward_plain_f32"),
    ):
        fastattn.layer_norm(torch.randn(4, 64), [64])


@emulated
@pytest.mark.parametrize("first", [0, 1])
def test_a_launcher_that_claims_alignment_is_found_out(first: int) -> None:
    memory = [torch.randn(65)[first:] for _ in range(3)]
    arguments = [emulator.launch.Memory(each.data_ptr(), 256) for each in memory]
    claim = struct.pack("<qii", 64, 1, 1)  # PointwiseScalars: size, activation, aligned
    grad_out, pre, grad_pre = arguments
    report = device.kernel("ffn", "ffn_activation_backward_f32").launch(
        1, 256, grad_out, pre, None, grad_pre, None, None, claim
    )
    assert ("misaligned" in str(report)) == bool(first), report


# the choice of a kernel


@emulated
def test_emulator_is_forced_or_not_used(python) -> None:
    x = torch.randn(2, 8)
    assert fastattn.explain("rms_norm", x, [8]).kernel == "cpu"
    with fastattn.use_kernel("emulator"):
        assert fastattn.explain("rms_norm", x, [8]).kernel == "emulator"
        with pytest.raises(fastattn.UnavailableKernelError, match="float64 has no CUDA kernel"):
            fastattn.rms_norm(x.double(), [8])
        with pytest.raises(fastattn.UnavailableKernelError, match=r"additive.*has no CUDA kernel"):
            fastattn.additive_attention(*(torch.ones(1, 1, 2, 8) for _ in range(3)), torch.ones(8))
    code = "import torch, fastattn; print(fastattn.explain('rms_norm', torch.ones(2, 8), [8]))"
    assert "emulator: chosen" in python("-c", code, FASTATTN_KERNEL="emulator").stdout


UP = choice.Product(8192, 3072, 768)  # of BERT, for 8192 tokens

# bytes of an element, part of cuBLAS's speed, multiprocessors, products, elements saved
CALL = (2, 0.85, 108, [UP], 2 * UP.rows * UP.cols)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({1: 0.35}, "cuBLAS is expected to be faster"),
        ({3: [UP._replace(depth=8192)]}, "cuBLAS is expected to be faster"),
        ({3: [UP, *UP.gradients()], 4: UP.rows * UP.cols}, "cuBLAS is expected to be faster"),
        ({1: 0.97, 2: 132}, ""),  # by wgmma
        ({4: 0}, "cuBLAS is expected to be faster"),  # without an activation
        ({0: 4, 1: 0.67}, "cuBLAS is expected to be faster"),  # in fp32
        ({3: [UP._replace(rows=128)]}, "24 squares of the result leave some of 108 idle"),
        ({3: [UP._replace(rows=256 * 5, cols=256 * 3)], 4: 10**6}, "leave some of 108 idle"),
        ({3: [UP._replace(depth=770)]}, "not whole 16 bytes"),
        ({3: [UP._replace(rows=0)]}, ""),
    ],
)
def test_products_are_left_to_cublas(changed: dict[int, object], reason: str) -> None:
    call = [changed.get(index, value) for index, value in enumerate(CALL)]
    reasons = choice.expected_losses(*call)
    assert bool(reasons) == bool(reason) and (not reason or any(reason in each for each in reasons))


def test_the_last_squares_cost_what_they_leave_idle() -> None:
    """One square more than multiprocessors takes as long as two for each."""
    full, more = (choice.Product(128, 128 * squares, 64) for squares in (100, 101))
    assert full.lost(1, 100) == 0
    assert more.lost(1, 100) == pytest.approx(99 * 128 * 128 * 64 / choice.CUBLAS)


def test_cuda_refuses_what_is_not_on_a_gpu() -> None:
    reason = "a tensor is on cpu" if not _library.WHY_NO_CUDA else "without nvcc|was not built"
    with (
        fastattn.use_kernel("cuda"),
        pytest.raises(fastattn.UnavailableKernelError, match=reason),
    ):
        fastattn.rms_norm(torch.ones(2, 8), [8])


def test_without_cuda_kernels_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "WHY_NO_CUDA", "the library was built without nvcc")
    with (
        fastattn.use_kernel("emulator"),
        pytest.raises(fastattn.UnavailableKernelError, match="without nvcc"),
    ):
        fastattn.rms_norm(torch.ones(2, 8), [8])
    assert dispatch.backends()["emulator"] == "the library was built without nvcc"


@emulated
def test_kernels_can_be_listed() -> None:
    listed = emulator.load(_library.ptx("norm")).kernels
    assert "norm_forward_bf16_f32_x4" in listed and "norm_fold_f32" in listed
