"""The Triton kernels: how they are chosen, and what the emulator finds in what Triton compiles."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math

import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.dispatch import CUDA_DTYPES
from fastattn.emulator import device
from fastattn.testing import Case, Draw, all_cases, assert_case_close_to_oracle, run

CASES = {case.id: case for case in all_cases()}
WHY_NOT = fastattn.backends()["triton-emulator"]

emulated = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


# the choice of a kernel


def test_triton_is_imported_on_first_use(python) -> None:
    code = (
        "import sys, torch, fastattn; x = torch.ones(2, 8, requires_grad=True);"
        "fastattn.rms_norm(x, [8]).sum().backward(); print('triton' in sys.modules)"
    )
    assert python("-c", code).stdout.strip() == "False"


@emulated
def test_environment_forces_triton(python) -> None:
    code = "import torch, fastattn; print(fastattn.explain('rms_norm', torch.ones(2, 8), [8]))"
    found = python("-c", code, FASTATTN_KERNEL="triton-emulator")
    assert "triton-emulator: chosen" in found.stdout
    found = python("-c", code, FASTATTN_KERNEL="triton")
    assert "'triton' is forced, but a tensor is on cpu" in found.stderr


def test_absence_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(dispatch, "WHY_NO_TRITON", dispatch._why_no_triton())
    for kernel in ("triton", "triton-emulator"):
        assert "pip install" in fastattn.backends()[kernel]
        with (
            fastattn.use_kernel(kernel),
            pytest.raises(
                fastattn.UnavailableKernelError, match=r"pip install.*fastattn\[triton\]"
            ),
        ):
            fastattn.rms_norm(torch.ones(2, 8), [8])


@emulated
def test_old_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, refused in (("3.5.1", True), ("3.6.0", False), ("4.0.0+git1", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert bool(dispatch._why_no_triton()) == refused


@emulated
def test_other_dtypes_and_ops_are_refused() -> None:
    with fastattn.use_kernel("triton-emulator"):
        with pytest.raises(fastattn.UnavailableKernelError, match="float64 has no Triton kernel"):
            fastattn.rms_norm(torch.ones(2, 8).double(), [8])
        with pytest.raises(fastattn.UnavailableKernelError, match="it has no Triton kernel"):
            fastattn.additive_attention(*torch.ones(3, 1, 1, 2, 8), torch.ones(8))


@emulated
def test_torch_compile_traces_it() -> None:
    """Forward and backward are opaque ops of the graph, which no longer asks what is forced."""
    x, weight = torch.randn(5, 64, requires_grad=True), torch.randn(64, requires_grad=True)

    def step(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return fastattn.rms_norm(x, [64], weight)

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with fastattn.use_kernel("triton-emulator"):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        grads = [torch.autograd.grad(f(x, weight).sum(), [x, weight]) for f in (step, compiled)]
        torch.compile(step, fullgraph=True, backend=backend)(x.detach(), weight.detach())
    assert all(map(torch.equal, *grads))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert "fastattn.rms_norm_fwd.triton" in targets


# in the emulator


WATCHED = [
    ("add_layer_norm-everything", torch.bfloat16),
    ("add_layer_norm-many_columns", torch.float16),
    ("attention-one_row", torch.bfloat16),
    ("attention_varlen-no_rows", torch.float16),
]


@emulated
@pytest.mark.parametrize(("case_id", "dtype"), WATCHED)
def test_every_schedule_gives_the_same_bits(case_id: str, dtype: torch.dtype) -> None:
    """And nothing is found under any of them: a finding would raise."""
    case = CASES[case_id]
    with device.watching(thorough=True) as reports:
        run(case, case.inputs(dtype), "triton-emulator")
    assert reports and all(report.ok for report in reports)


@emulated
def test_rows_of_whole_sectors() -> None:
    """What is divisible by 16 is known to be, and moved 16 bytes at a time."""
    x, weight = torch.randn(16, 256).bfloat16(), torch.randn(256).bfloat16()
    with device.watching() as reports, fastattn.use_kernel("triton-emulator"):
        fastattn.rms_norm(x, [256], weight)
    counters = reports[0].counters
    assert counters.sector_efficiency >= 0.95, counters
    assert any("v4" in opcode and "ld.global" in opcode for opcode in counters.mix()), counters


@emulated
@pytest.mark.parametrize("cols", [64, 48, 63], ids="{} columns".format)
def test_hints_are_true(cols: int) -> None:
    """Of views that begin anywhere and rows of any length."""
    memory = torch.randn(4 * cols + 1)
    for x in (memory[1:].view(4, cols), memory[:-1].view(4, cols)):
        leaf = x.detach().requires_grad_()
        with fastattn.use_kernel("triton-emulator"):
            out = fastattn.rms_norm(leaf, [cols])
            (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        eager = torch.nn.functional.rms_norm(leaf, [cols])
        torch.testing.assert_close(out, eager)
        torch.testing.assert_close(grad, torch.autograd.grad(eager.square().sum(), leaf)[0])


@emulated
def test_hints_are_true_of_any_strides() -> None:
    case = CASES["attention-causal_tall"]
    found, plain = (
        run(case, case.inputs(torch.bfloat16, layout), "triton-emulator")
        for layout in ("sliced", "contiguous")
    )
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@emulated
def test_a_false_hint_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.ops import launch

    honest = launch.compile_for

    def lying(architecture, kernel, arguments, options):
        aligned = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        return honest(architecture, kernel, aligned, options)

    x = torch.randn(4 * 64 + 1)[1:].view(4, 64)
    with fastattn.use_kernel("triton-emulator"):
        fastattn.rms_norm(x, [64])
        monkeypatch.setattr(launch, "compile_for", lying)
        with pytest.raises(RuntimeError, match="misaligned"):
            fastattn.rms_norm(x, [64])


@emulated
def test_fused_arithmetic_would_be_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why `launch` has `fuse`: threads that reduce a row differ in the last bit with it."""
    from fastattn.ops import launch

    honest = launch.compile_for
    monkeypatch.setattr(
        launch,
        "compile_for",
        lambda architecture, kernel, arguments, options: honest(
            architecture, kernel, arguments, options | {"enable_fp_fusion": True}
        ),
    )
    with (
        fastattn.use_kernel("triton-emulator"),
        pytest.raises(RuntimeError, match="race-write-after-write"),
    ):
        fastattn.layer_norm(torch.randn(300, 37), [37])


@emulated
@pytest.mark.parametrize("rubbish", [math.nan, -math.inf])
def test_nothing_leaks_from_under_a_mask(rubbish: float) -> None:
    """Keys that no query sees may hold anything: all results are those of zeros there."""
    query, key, value = (torch.randn(1, 1, 70, 16).bfloat16() for _ in range(3))
    mask, results = torch.arange(70) < 40, []
    for hidden in (0, rubbish):
        key[:, :, 40:] = value[:, :, 40:] = hidden
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        with fastattn.use_kernel("triton-emulator"):
            out, lse = fastattn.attention(*leaves, mask=mask, return_lse=True)
            results.append((out, lse, *torch.autograd.grad(out.sum() + lse.sum(), leaves)))
    assert all(map(torch.equal, *results))


@emulated
@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", range(3), ids=["query", "key", "value"])
def test_what_is_not_finite_spoils_who_sees_it(position: int, rubbish: float) -> None:
    """And nobody else: one bad element among queries, keys or values of a causal attention."""
    tensors = [torch.randn(1, 1, 70, 16).bfloat16() for _ in range(3)]
    tensors[position][:, :, 25, 3] = rubbish
    with fastattn.use_kernel("triton-emulator"):
        found = fastattn.attention(*tensors, causal=True)
    rows = found.isnan().all(-1)[0, 0].nonzero().flatten().tolist()
    assert rows == ([25] if position == 0 else [*range(25, 70)])
    assert bool(found[:, :, :25].isfinite().all())


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [(torch.bfloat16, 256, 40), (torch.float16, 72, 200), (torch.float32, 128, 72)],
    ids=str,
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_wide_heads(dtype: torch.dtype, head_dim: int, value_dim: int, dropout_p: float) -> None:
    """Forward and backward, on tiles of their own; dropout has others in turn."""
    shapes = {"query": (1, 2, 20, head_dim), "key": (1, 1, 70, head_dim)}
    tensors = {name: Draw(shape) for name, shape in shapes.items()}
    tensors["value"] = Draw((1, 1, 70, value_dim))
    options = {"causal": True, "dropout_p": dropout_p, "seed": 7 if dropout_p else None}
    case = Case("attention", f"wide_{head_dim}", tensors, options)
    assert_case_close_to_oracle(case, dtype, "triton-emulator")


# what Triton makes for sm_90a: other instructions, other layouts, other waits


FOR_HOPPER = [
    ("add_layer_norm-everything", CUDA_DTYPES),
    ("rms_norm-many_columns", CUDA_DTYPES[:2]),
    ("apply_rope-partial_interleaved", CUDA_DTYPES),
    ("linear_cross_entropy-everything", CUDA_DTYPES),
    ("ffn-everything", CUDA_DTYPES),
    ("attention-odd_sizes", CUDA_DTYPES),
    ("attention-everything", CUDA_DTYPES[1:]),
    ("attention_varlen-everything", CUDA_DTYPES[1:]),
    ("attention_decode-everything", CUDA_DTYPES[1:]),
]


@emulated
@pytest.mark.parametrize(
    ("case_id", "dtype"),
    [
        pytest.param(
            case_id,
            dtype,
            marks=pytest.mark.slow if i and case_id.startswith(("ffn", "attention")) else (),
        )
        for case_id, dtypes in FOR_HOPPER
        for i, dtype in enumerate(sorted(dtypes, key=str))
    ],
    ids=str,
)
def test_for_hopper(case_id: str, dtype: torch.dtype) -> None:
    """Every kernel in every dtype, without a report and within the error rule."""

    with device.emulating(90):
        assert_case_close_to_oracle(CASES[case_id], dtype, "triton-emulator")


@emulated
def test_copies_for_hopper_wait_for_the_products_before() -> None:

    case = CASES["attention-plain"]
    with device.emulating(90):
        run(case, case.inputs(torch.bfloat16), "triton-emulator")


@emulated
def test_products_for_hopper_are_those_of_warp_groups() -> None:

    x, weight = torch.randn(2, 128, 64).half()
    with device.watching() as reports, device.emulating(90), fastattn.use_kernel("triton-emulator"):
        found = fastattn.linear(x, weight)
    assert any(opcode.startswith("wgmma.mma_async") for opcode in reports[0].counters.mix())
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight))
