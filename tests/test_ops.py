"""Every public function on every kernel, dtype and layout, enumerated from the registry."""

from __future__ import annotations

import ctypes
import functools
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import registry
from fastattn.testing import (
    DTYPES,
    LAYOUTS,
    Case,
    Draw,
    all_cases,
    assert_close_to_oracle,
    assert_vanishes,
    cases,
    poisoned,
    run,
    use_threads,
    widened,
)

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
    """Eager PyTorch's results in `dtype`, and the oracle's from the same values."""
    case = CASES[case_id]
    inputs = case.inputs(dtype, "expanded" if repeated else "contiguous")
    inputs = {name: tensor.contiguous() for name, tensor in inputs.items()}
    with use_threads(1):
        return run(case, inputs, "reference"), run(case, widened(inputs), "reference")


def check(case: Case, inputs: dict[str, Tensor], found: dict[str, Tensor], repeated: bool) -> None:
    """All outputs and gradients keep the error rule; a gradient that vanishes, its own."""
    eager, oracle = baseline(case.id, next(iter(inputs.values())).dtype, repeated)
    assert found.keys() == oracle.keys()
    for name in oracle:
        if name.removeprefix("grad ") in case.vanishing:
            largest = max(tensor.double().abs().max().item() for tensor in inputs.values())
            terms = max(tensor.numel() for tensor in inputs.values())
            assert_vanishes(found[name], 4 * largest**2, terms, name)
        else:
            factor = 2 if name.startswith("out") else 3
            assert_close_to_oracle(found[name], eager[name], oracle[name], factor, name)


def test_every_function_and_op_has_cases() -> None:
    public = {
        name
        for name in fastattn.__all__
        if getattr(getattr(fastattn, name), "__module__", "").startswith("fastattn.ops.")
    }
    assert public == set(registry.FUNCTIONS)
    without = [name for name in registry.FUNCTIONS if not cases(name)]
    assert not without, f"functions without cases in fastattn.testing: {without}"
    assert {record.name for _, record in registry.FUNCTIONS.values()} == set(registry.OPS)
    assert len(CASES) == len(all_cases()), "two cases have one id"


# values and gradients


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
    return found


@pytest.mark.parametrize(("case_id", "dtype", "kernel", "layout"), enumerated(), ids=name_of)
def test_matches_oracle(case_id: str, dtype: torch.dtype, kernel: str, layout: str) -> None:
    case = CASES[case_id]
    inputs = case.inputs(dtype, layout)
    if case.refused and kernel == "cpu":
        with pytest.raises(fastattn.UnavailableKernelError, match=case.refused):
            run(case, inputs, "cpu")
        kernel = "reference"
    # That the number of threads changes nothing is a test of its own.
    with use_threads(2 if (kernel, layout) == ("cpu", "contiguous") else 1):
        found = run(case, inputs, kernel)
    check(case, inputs, found, layout == "expanded")


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


# memory, repetition, threads


COMPUTED = [case for case in CASES.values() if not case.refused]
by_case = pytest.mark.parametrize("case", COMPUTED, ids=lambda case: case.id)


def same_bits(found: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name in found:
        assert found[name].equal(other[name]), f"{name} differs"


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


# One case per op would do for the schema; these are those that take every argument once.
CHECKED = [
    "attention-everything",
    "attention-sinks",
    "attention-plain",
    "add_layer_norm-odd_sizes",
    "layer_norm-no_parameters",
    "add_rms_norm-fp32_parameters",
    "rms_norm-no_parameters",
    "linear-gelu",
    "linear-no_bias",
    "linear-no_features",
    "ffn-silu_gated",
    "ffn-no_bias",
]


@pytest.mark.parametrize("case_id", CHECKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_opcheck(case_id: str, dtype: torch.dtype) -> None:
    case = CASES[case_id]
    with Recorder() as recorder:
        run(case, case.inputs(dtype), "cpu")
    assert len(recorder.calls) == 2
    for op, args in recorder.calls:
        torch.library.opcheck(op, args)


def test_every_torch_op_is_checked() -> None:
    checked = {registry.FUNCTIONS[CASES[case_id].function][1].name for case_id in CHECKED}
    assert checked == set(registry.OPS)
    ours = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastattn::")}
    assert ours == {f"fastattn::{name}_{way}" for name in registry.OPS for way in ("fwd", "bwd")}


# derivatives


def tiny(function: str, options: dict, **shapes: tuple[int, ...] | Draw) -> Case:
    """A case small enough for finite differences."""
    draws = {k: v if isinstance(v, Draw) else Draw(v) for k, v in shapes.items()}
    return Case(function, "tiny", draws, options)


QKV = {"query": (1, 2, 3, 2), "key": (1, 1, 4, 2), "value": (1, 1, 4, 3)}
NORM = {"input": (2, 5), "weight": (5,)}
LINEAR = {"input": (2, 3), "weight": (4, 3), "bias": (4,)}
FFN = {"input": (2, 3), "up_weight": (4, 3), "down_weight": (2, 4)}
BIASES = {"up_bias": (4,), "down_bias": (2,)}
TINY = [
    tiny("attention", {"causal": True, "softcap": 2.0, "return_lse": True}, **QKV, bias=(2, 3, 4)),
    tiny("attention", {"dropout_p": 0.4, "seed": 5}, **QKV, sinks=(2,), mask=Draw((3, 4), "mask")),
    tiny("attention", {"window": (1, 1)}, **QKV, alibi_slopes=Draw((2,), "slopes"), bias=(3, 1)),
    tiny("scaled_dot_product_attention", {"enable_gqa": True}, **QKV, attn_mask=(3, 4)),
    tiny("layer_norm", {"normalized_shape": [5]}, **NORM, bias=(5,)),
    tiny("add_layer_norm", {"normalized_shape": [5]}, **NORM, residual=(2, 5)),
    tiny("rms_norm", {"normalized_shape": [5]}, **NORM),
    tiny("add_rms_norm", {"normalized_shape": [5]}, **NORM, residual=(2, 5)),
    *(tiny("linear", {"activation": a}, **LINEAR) for a in (None, "gelu", "gelu_tanh", "silu")),
    tiny("ffn", {"activation": "gelu"}, **FFN, **BIASES),
    tiny("ffn", {"activation": "silu"}, **FFN, gate_weight=(4, 3), gate_bias=(4,)),
]
by_tiny = pytest.mark.parametrize("case", TINY, ids=lambda case: case.function)


def function_of(case: Case, inputs: dict[str, Tensor]) -> tuple[Callable, list[Tensor]]:
    """The call as a function of the tensors that get a gradient, and these."""
    names = case.differentiable(inputs)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return case.call(**inputs | dict(zip(names, tensors, strict=True)))

    return function, [inputs[name].clone().requires_grad_() for name in names]


@by_tiny
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    function, leaves = function_of(case, case.inputs(torch.float64))
    with fastattn.use_kernel("cpu"):
        assert torch.autograd.gradcheck(function, leaves)


@by_tiny
def test_second_derivatives_are_right(case: Case) -> None:
    function, leaves = function_of(case, case.inputs(torch.float64))
    with fastattn.use_kernel("cpu"):
        assert torch.autograd.gradgradcheck(function, leaves)


@by_tiny
def test_forward_mode_agrees_with_backward(case: Case) -> None:
    function, leaves = function_of(case, case.inputs(torch.float64))
    tangents = tuple(torch.randn_like(leaf) for leaf in leaves)
    expected = torch.autograd.functional.jvp(function, tuple(leaves), tangents)
    leaves = tuple(leaf.detach() for leaf in leaves)
    for found, ref in zip(torch.func.jvp(function, leaves, tangents), expected, strict=True):
        torch.testing.assert_close(found, ref)


@by_tiny
def test_transforms_agree_with_autograd(case: Case) -> None:
    function, leaves = function_of(case, case.inputs(torch.float64))

    def total(*tensors: Tensor) -> Tensor:
        return sum(out.square().sum() for out in function(*tensors))

    everything = tuple(range(len(leaves)))
    expected = torch.autograd.grad(total(*leaves), leaves)
    leaves = [leaf.detach() for leaf in leaves]
    torch.testing.assert_close(torch.func.grad(total, everything)(*leaves), expected)
    batch = [torch.stack([leaf, 2 * leaf, -leaf]) for leaf in leaves]
    together = torch.func.vmap(torch.func.grad(total, everything))(*batch)
    apart = [torch.func.grad(total, everything)(*item) for item in zip(*batch, strict=True)]
    torch.testing.assert_close(
        together, tuple(torch.stack(grads) for grads in zip(*apart, strict=True))
    )


def test_vmap_over_one_argument() -> None:
    weights, x = torch.randn(3, 4, 5), torch.randn(2, 5)
    found = torch.func.vmap(lambda w: fastattn.linear(x, w, activation="gelu"))(weights)
    torch.testing.assert_close(
        found, torch.stack([fastattn.linear(x, w, activation="gelu") for w in weights])
    )


# what else PyTorch does to a call


ONE_EACH = [
    "attention-everything",
    "scaled_dot_product_attention-float_mask",
    "layer_norm-odd_sizes",
    "add_layer_norm-plain",
    "rms_norm-plain",
    "add_rms_norm-odd_sizes",
    "linear-gelu",
    "ffn-silu_gated",
]
by_one_each = pytest.mark.parametrize("case_id", ONE_EACH)


def test_one_each_is_every_function() -> None:
    assert {CASES[case_id].function for case_id in ONE_EACH} == set(registry.FUNCTIONS)


def gradients(function: Callable, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Outputs and gradients of the sum of their squares."""
    for leaf in leaves:
        leaf.grad = None
    outs = function(*leaves)
    sum(out.float().nan_to_num(0, 0, 0).square().sum() for out in outs).backward()
    return *outs, *(leaf.grad for leaf in leaves)


def compiled(case: Case, backend: str, *, dynamic: bool) -> None:
    """torch.compile without graph breaks gives the very bits of the plain call."""
    torch._dynamo.reset()
    names = case.differentiable(inputs := case.inputs(torch.float32))
    others = {name: tensor for name, tensor in inputs.items() if name not in names}

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return case.call(**others, **dict(zip(names, tensors, strict=True)))

    fast = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    leaves = [inputs[name].clone().requires_grad_() for name in names]
    for found, ref in zip(gradients(fast, leaves), gradients(function, leaves), strict=True):
        assert found.equal(ref)
        assert found.stride() == ref.stride()


@by_one_each
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(case_id: str, dynamic: bool) -> None:
    compiled(CASES[case_id], "aot_eager", dynamic=dynamic)


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("case_id", ["attention-grouped", "ffn-gelu"])
def test_compiles_with_inductor(case_id: str) -> None:
    compiled(CASES[case_id], "inductor", dynamic=False)


def test_one_compiled_graph_serves_all_lengths() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @functools.partial(torch.compile, fullgraph=True, backend=counter, dynamic=True)
    def block(x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        mixed = fastattn.attention(heads, heads, heads, causal=True).transpose(1, 2).flatten(2)
        out, summed = fastattn.add_rms_norm(mixed, x, [16])
        return fastattn.linear(out, weight, activation="silu") + summed

    weight = torch.randn(16, 16)
    for batch, length in ((2, 5), (3, 9), (4, 70)):
        x = torch.randn(batch, length, 16, requires_grad=True)
        found = torch.autograd.grad(block(x).sum(), x)[0]
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(found, torch.autograd.grad(block(x).sum(), x)[0])
    assert counter.frame_count == 1


@by_one_each
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_changes_nothing(case_id: str, reentrant: bool) -> None:
    function, leaves = function_of(CASES[case_id], CASES[case_id].inputs(torch.float32))
    plain = gradients(function, leaves)
    saved = functools.partial(checkpoint, function, use_reentrant=reentrant)
    for found, ref in zip(gradients(saved, leaves), plain, strict=True):
        assert found.equal(ref)


@by_one_each
def test_nothing_is_recorded_without_need(case_id: str) -> None:
    case = CASES[case_id]
    inputs = case.inputs(torch.float32)
    recorded = case.call(
        **inputs
        | {
            n: inputs[n].clone().requires_grad_()
            for n in inputs
            if n in case.differentiable(inputs)
        }
    )
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for found, ref in zip(case.call(**inputs), recorded, strict=True):
                assert not found.requires_grad and found.equal(ref)


@by_one_each
def test_a_changed_input_is_noticed(case_id: str) -> None:
    function, leaves = function_of(CASES[case_id], CASES[case_id].inputs(torch.float32))
    first = leaves[0].clone()
    out = function(first, *leaves[1:])[0]
    first.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@by_one_each
def test_subsets_of_gradients(case_id: str) -> None:
    """A gradient does not depend on which others are asked for."""
    case = CASES[case_id]
    inputs = case.inputs(torch.float32)
    complete = run(case, inputs, "cpu")
    for name in case.differentiable(inputs):
        leaf = inputs[name].clone().requires_grad_()
        outs = case.call(**inputs | {name: leaf})
        generator = torch.Generator().manual_seed(1)
        grads = [(torch.randn(o.shape, generator=generator) * 16).round() / 16 for o in outs]
        (found,) = torch.autograd.grad(outs, leaf, grads)
        assert found.equal(complete[f"grad {name}"]), name


def test_calls_from_several_threads() -> None:
    chosen = [CASES[case_id] for case_id in ONE_EACH]
    inputs = [case.inputs(torch.float32) for case in chosen]
    alone = [run(case, given, gradients=False) for case, given in zip(chosen, inputs, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        again = pool.map(lambda i: run(chosen[i], inputs[i], gradients=False), [*range(8)] * 8)
        for i, found in enumerate(again):
            same_bits(found, alone[i % 8])


AUTOCAST = {"attention", "scaled_dot_product_attention", "linear", "ffn"}


@by_one_each
def test_autocast_is_that_of_pytorch(case_id: str) -> None:
    """Products run in autocast's dtype and return it; norms, as on the CPU they do, stay."""
    case = CASES[case_id]
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(case, inputs, "cpu")
    dtype = torch.bfloat16 if case.function in AUTOCAST else torch.float32
    assert found["out 0"].dtype == dtype
    for name in case.differentiable(inputs):
        assert found[f"grad {name}"].dtype == torch.float32
    keep = {"attention": ("bias", "sinks")}.get(case.function, ())
    cast = {
        name: tensor.to(dtype) if tensor.is_floating_point() and name not in keep else tensor
        for name, tensor in inputs.items()
    }
    same = run(
        case,
        cast | {"alibi_slopes": inputs["alibi_slopes"]} if "alibi_slopes" in cast else cast,
        "cpu",
    )
    same_bits({name: tensor.to(same[name].dtype) for name, tensor in found.items()}, same)


def test_autocast_leaves_fp64_alone() -> None:
    x, weight = torch.randn(2, 3).double(), torch.randn(4, 3).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastattn.linear(x, weight).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert fastattn.linear(x.float(), weight.float()).dtype == torch.float32
