"""Every public function on every kernel, dtype and layout, enumerated from the registry."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import dispatch, registry
from fastattn.dispatch import CUDA_DTYPES
from fastattn.testing import (
    DTYPES,
    LAYOUTS,
    Case,
    all_cases,
    assert_case_close_to_oracle,
    assert_close_to_oracle,
    assert_results_close_to_oracle,
    cases,
    eager_and_oracle,
    error_rule,
    poisoned,
    run,
    use_threads,
    widened,
)

COMPOSED = {"attention_weights"}  # of PyTorch's functions: no kernel to choose
WITHIN = {"attention_append"}  # what another op's function calls too: attention_decode
CASES = {case.id: case for case in all_cases()}
SHORT = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}


def name_of(value: object) -> str | None:
    return SHORT.get(value) if isinstance(value, torch.dtype) else None


@functools.lru_cache(maxsize=16)
def baseline(case_id: str, dtype: torch.dtype, repeated: bool) -> tuple[dict[str, Tensor], ...]:
    """What a case's results on every kernel and in every layout are compared with."""
    case = CASES[case_id]
    with use_threads(1):
        layout = "expanded" if repeated else "contiguous"
        return eager_and_oracle(case, case.inputs(dtype, layout))


def test_every_function_and_op_has_cases() -> None:
    public = {
        name
        for name in fastattn.__all__
        if getattr(getattr(fastattn, name), "__module__", "").startswith("fastattn.ops.")
    }
    assert public == set(registry.FUNCTIONS) | COMPOSED
    without = [name for name in registry.FUNCTIONS if not cases(name)]
    assert not without, f"functions without cases in fastattn.testing: {without}"
    used = {record.name for _, record in registry.FUNCTIONS.values()}
    assert used | WITHIN == set(registry.OPS)
    assert len(CASES) == len(all_cases()), "two cases have one id"


# values and gradients


def emulated(case: Case) -> tuple[torch.dtype, ...]:
    """The dtypes in which the CUDA kernel of a case is tried.

    Not all: a large attention in fp32, without tensor cores, takes seconds, and products, norms and
    PyTorch's own arguments in fp16 run the code of bf16.
    """
    some = ["one_row", "one_key", "odd_sizes"]
    if "attention" not in case.function:
        some.append("dropout")
    if case.function == "scaled_dot_product_attention":
        return (torch.bfloat16,)
    if "attention" in case.function:
        return CUDA_DTYPES if case.name in some else (torch.bfloat16, torch.float16)
    return CUDA_DTYPES if case.name in some else (torch.float32, torch.bfloat16)


# Between them these have every feature; the others are slow, for Triton compiles each for seconds.
QUICK_IN_TRITON = {
    "layer_norm": ("odd_sizes", "two_dimensions", "no_rows"),
    "rms_norm": ("fp32_parameters", "many_columns"),
    "add_layer_norm": ("no_parameters", "weight_only", "few_columns", "many_columns", "everything"),
    "add_rms_norm": ("dropout", "fp32_residual", "sum_unwritten", "no_rows"),
    "attention": ("odd_sizes", "causal_tall", "sinks", "everything"),
    "attention_varlen": ("no_rows", "everything"),
    "attention_decode": ("few_queries", "paged", "odd_sizes", "everything"),
    "linear": ("odd_sizes", "gelu_tanh", "no_features", "no_outputs", "no_rows"),
    "ffn": ("gelu", "relu_gated", "everything", "no_hidden"),
    "linear_cross_entropy": (
        *("plain", "ignored", "all_ignored", "sum", "none", "smoothing", "softcap", "vector"),
        *("one_class", "chunks", "everything", "no_rows", "no_features"),
    ),
    "apply_rope": (
        *("plain", "partial_interleaved", "odd_sizes", "one_row", "query_alone"),
        *("positions", "shared_positions", "no_angles", "no_rows"),
    ),
}


def compiled_by_triton(case: Case) -> list[tuple]:
    """Each case in every dtype that Triton has, some of them in one without --slow."""
    quick = case.refused or case.name in QUICK_IN_TRITON.get(case.function, ())
    usual = CUDA_DTYPES[list(CASES).index(case.id) % len(CUDA_DTYPES)]
    if "attention" in case.function:  # which in fp32 is slow to compile, and to run
        usual = torch.float32 if case.name == "odd_sizes" else torch.bfloat16
    return [
        pytest.param(
            *(case.id, dtype, "triton-emulator", "contiguous"),
            marks=() if quick and dtype == usual else pytest.mark.slow,
        )
        for dtype in CUDA_DTYPES
    ]


def enumerated() -> list[tuple[str, torch.dtype, str, str]]:
    found: list[tuple[str, torch.dtype, str, str]] = []
    for case in CASES.values():
        layouts = [
            layout
            for layout in LAYOUTS
            if layout != "heads_inside" or any(len(d.shape) == 4 for d in case.tensors.values())
        ]
        for dtype in DTYPES:
            found += [(case.id, dtype, "cpu", layout) for layout in layouts]
            found.append((case.id, dtype, "reference", "sliced"))
        found += [(case.id, torch.float32, "reference", layout) for layout in layouts[2:]]
        if "cuda" in registry.FUNCTIONS[case.function][1].kernels:
            found += [(case.id, dtype, "emulator", "contiguous") for dtype in emulated(case)]
        if "triton" in registry.FUNCTIONS[case.function][1].kernels:
            found += compiled_by_triton(case)
    return found


@pytest.mark.parametrize(("case_id", "dtype", "kernel", "layout"), enumerated(), ids=name_of)
def test_matches_oracle(case_id: str, dtype: torch.dtype, kernel: str, layout: str) -> None:
    case = CASES[case_id]
    inputs = case.inputs(dtype, layout)
    if kernel in dispatch.RUNS and (why_not := fastattn.backends()[kernel]):
        pytest.skip(why_not)
    if case.refused and kernel != "reference":
        with pytest.raises(fastattn.UnavailableKernelError, match=case.refused):
            run(case, inputs, kernel)
        kernel = "reference"
    # That the number of threads changes nothing is a test of its own.
    with use_threads(2 if (kernel, layout) == ("cpu", "contiguous") else 1):
        found = run(case, inputs, kernel)
        if kernel == "cpu":  # where a plain call has an op of its own
            same_bits(run(case, inputs, kernel, gradients=False), found)
    compared = baseline(case_id, dtype, layout == "expanded")
    assert_results_close_to_oracle(case, inputs, found, *compared)


def same_bits(found: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in found:
        assert found[name].equal(other[name]), f"{name} differs"


def test_error_rule_catches_a_fault() -> None:
    oracle = torch.randn(1000, dtype=torch.float64)
    eager = oracle.float()
    assert_close_to_oracle(eager, eager, oracle)
    for fault in (1e-6, float("nan"), float("inf")):
        wrong = eager.clone()
        wrong[500] += fault
        with pytest.raises(AssertionError, match="error"):
            assert_close_to_oracle(wrong, eager, oracle)
    with pytest.raises(AssertionError, match="infinite or NaN"):
        assert_close_to_oracle(eager, eager, oracle.masked_fill(oracle > 2, float("inf")))
    with pytest.raises(AssertionError, match="dtype"):
        assert_close_to_oracle(eager.double(), eager, oracle)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_oracle(eager[:1], eager[:1], oracle)
    with pytest.raises(AssertionError, match="fp64"):
        assert_close_to_oracle(oracle + 1e-12, oracle, oracle)


def test_eagers_luck_with_one_draw_is_not_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    case, fault = CASES["linear-one_row"], 1.2e-6

    def computed(each: Case, inputs: dict[str, Tensor], kernel: str) -> dict[str, Tensor]:
        if each.name != case.name or inputs["input"].dtype == torch.float64:
            return run(each, inputs, "reference")
        exact = run(each, widened(inputs), "reference")
        found = {name: tensor.float() for name, tensor in exact.items()}
        return found if kernel == "reference" else found | {"out 0": found["out 0"] + fault}

    monkeypatch.setattr(error_rule, "run", computed)
    assert_case_close_to_oracle(case, torch.float32, "cpu")
    fault = 1e-5
    with pytest.raises(AssertionError, match="out 0"):
        assert_case_close_to_oracle(case, torch.float32, "cpu")


# memory, repetition, threads


COMPUTED = [case for case in CASES.values() if not case.refused]
by_case = pytest.mark.parametrize("case", COMPUTED, ids=lambda case: case.id)


@by_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_bits_depend_on_nothing_but_the_inputs(case: Case, dtype: torch.dtype) -> None:
    """Not on the run, the number of threads or what the memory held before."""
    inputs = case.inputs(dtype)
    with use_threads(1):
        once = run(case, inputs, "cpu")
        with poisoned():
            same_bits(run(case, inputs, "cpu"), once)
    for threads in (2, 3):
        with use_threads(threads):
            same_bits(run(case, inputs, "cpu"), once)


def test_calls_from_several_threads() -> None:
    chosen = list({case.function: case for case in COMPUTED}.values())
    inputs = [case.inputs(torch.float32) for case in chosen]
    alone = [run(case, given, gradients=False) for case, given in zip(chosen, inputs, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        order = [*range(len(chosen))] * 8
        again = pool.map(lambda i: run(chosen[i], inputs[i], gradients=False), order)
        for i, found in zip(order, again, strict=True):
            same_bits(found, alone[i])


def test_poison_reaches_fresh_memory() -> None:
    """The guard itself: what the library would allocate is neither finite nor small."""
    torch_library = ctypes.CDLL(torch._C.__file__)  # resolves the symbols of libtorch
    size = ctypes.c_int64(1000)
    with poisoned():
        for _ in range(3):
            handle, data = ctypes.c_void_p(), ctypes.POINTER(ctypes.c_float)()
            torch_library.aoti_torch_empty_strided(
                ctypes.c_int64(1),
                ctypes.byref(size),
                ctypes.byref(ctypes.c_int64(1)),
                torch_library.aoti_torch_dtype_float32(),
                torch_library.aoti_torch_device_type_cpu(),
                0,
                ctypes.byref(handle),
            )
            torch_library.aoti_torch_get_data_ptr(handle, ctypes.byref(data))
            assert all(data[i] > 1e38 for i in range(size.value))
            ctypes.memset(data, 0, 4 * size.value)  # the next round gets this block, poisoned again
            torch_library.aoti_torch_delete_tensor_object(handle)


# the torch ops underneath


class Recorder(TorchDispatchMode):
    """Notes the arguments of every call of one of our torch ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastattn":
            given = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
            self.calls.append((func, tuple(given)))
        return func(*args, **(kwargs or {}))


FORWARD_ALONE = "attention_decode-plain", "linear_cross_entropy-ignored"  # makes the gradients too

# One case per op would do for the schema; these are those that take every argument once.
CHECKED = [
    "attention-everything",
    "attention-sinks",
    "attention-plain",
    "attention_varlen-everything",
    "attention_decode-plain",
    "attention_decode-everything",
    "additive_attention-causal_tall",
    "additive_attention-plain",
    "add_layer_norm-odd_sizes",
    "add_layer_norm-dropout",
    "add_layer_norm-everything",
    "layer_norm-no_parameters",
    "add_rms_norm-fp32_parameters",
    "add_rms_norm-fp32_residual",
    "rms_norm-no_parameters",
    "linear-gelu",
    "linear-no_bias",
    "linear-no_features",
    "linear_cross_entropy-ignored",
    "linear_cross_entropy-none",
    "ffn-silu_gated",
    "ffn-no_bias",
    "apply_rope-partial",
    "apply_rope-positions",
    "apply_rope-query_alone",
]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case_id", CHECKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_opcheck(case_id: str, dtype: torch.dtype) -> None:
    case = CASES[case_id]
    with Recorder() as recorder:
        run(case, case.inputs(dtype), "cpu")
    assert len(recorder.calls) == (1 if case_id in FORWARD_ALONE else 2)
    for op, args in recorder.calls:
        torch.library.opcheck(op, args)


CHECKED_IN_TRITON = [
    "attention-one_row",
    "attention_decode-everything",
    "layer_norm-no_parameters",
    "rms_norm-no_parameters",
    "linear-gelu",
    "linear_cross_entropy-none",
    "ffn-silu_gated",
    "apply_rope-partial",
]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case_id", CHECKED_IN_TRITON)
def test_opcheck_in_triton(case_id: str) -> None:
    if why_not := fastattn.backends()["triton-emulator"]:
        pytest.skip(why_not)
    case = CASES[case_id]
    with Recorder() as recorder:
        run(case, case.inputs(torch.bfloat16), "triton-emulator")
    assert len(recorder.calls) == 2
    with fastattn.use_kernel("triton-emulator"):
        for op, args in recorder.calls:
            assert op._overloadname == "triton"
            torch.library.opcheck(op, args)


def test_every_torch_op_is_checked() -> None:
    def of(case_ids: list[str]) -> set[str]:
        return {registry.FUNCTIONS[CASES[case_id].function][1].name for case_id in case_ids}

    assert of(CHECKED) | WITHIN == set(registry.OPS)
    in_triton = {name for name, record in registry.OPS.items() if "triton" in record.kernels}
    assert of(CHECKED_IN_TRITON) | WITHIN == in_triton
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastattn::")}
    expected = {"fastattn::rope_", "fastattn::rope_.triton"}  # checked in test_rope.py
    for name, record in registry.OPS.items():
        ways = ("_fwd", "_bwd") if isinstance(record, registry.Op) else ("",)
        expected |= {f"fastattn::{name}{way}" for way in ways}
        if "triton" in record.kernels:
            expected |= {f"fastattn::{name}{way}.triton" for way in ways}
    # Those of plain calls stand in test_dispatch.py, and behind every case that needs no gradient.
    assert {op for op in ours - expected if not op.endswith(".plain")} == set()
    assert expected <= ours
