"""What PyTorch does to a call: derivatives, transforms, torch.compile, checkpoints, autocast."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import registry
from fastattn.testing import Case, Draw, all_cases, numbers, run

CASES = {case.id: case for case in all_cases()}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


# derivatives


def tiny(function: str, options: dict, **shapes: tuple[int, ...] | Draw) -> Case:
    """A case small enough for finite differences."""
    draws = {k: v if isinstance(v, Draw) else Draw(v) for k, v in shapes.items()}
    return Case(function, "tiny", draws, options)


QKV = {"query": (1, 2, 3, 2), "key": (1, 1, 4, 2), "value": (1, 1, 4, 3)}
ADDITIVE = {"query": (1, 2, 3, 2), "key": (1, 2, 4, 2), "value": (1, 2, 4, 3)}
NORM = {"input": (2, 5), "weight": (5,)}
LINEAR = {"input": (2, 3), "weight": (4, 3), "bias": (4,)}
LOSS = {
    "input": (2, 2),
    "linear_weight": (3, 2),
    "linear_bias": (3,),
    "target": numbers(2, -100),
}
FFN = {"input": (2, 3), "up_weight": (4, 3), "down_weight": (2, 4)}
BIASES = {"up_bias": (4,), "down_bias": (2,)}
ANGLES = {"cos": Draw((3, 2), "slopes"), "sin": Draw((3, 2), "slopes")}
TINY = [
    tiny("attention", {"causal": True, "softcap": 2.0, "return_lse": True}, **QKV, bias=(2, 3, 4)),
    tiny("attention", {"dropout_p": 0.4, "seed": 5}, **QKV, sinks=(2,), mask=Draw((3, 4), "mask")),
    tiny("attention", {"window": (1, 1)}, **QKV, alibi_slopes=Draw((2,), "slopes"), bias=(3, 1)),
    tiny(
        "attention_varlen",
        {"causal": True, "dropout_p": 0.3, "seed": 6, "return_lse": True},
        query=(5, 2, 2),
        key=(6, 1, 2),
        value=(6, 1, 3),
        cu_seqlens_q=numbers(0, 2, 5),
        cu_seqlens_k=numbers(0, 3, 6),
        sinks=(2,),
    ),
    tiny("scaled_dot_product_attention", {"enable_gqa": True}, **QKV, attn_mask=(3, 4)),
    tiny("additive_attention", {"causal": True}, **ADDITIVE, weight=(2, 2)),
    tiny("additive_attention", {}, **ADDITIVE, weight=(2,), mask=Draw((3, 4), "mask")),
    tiny("layer_norm", {"normalized_shape": [5]}, **NORM, bias=(5,)),
    tiny("add_layer_norm", {"normalized_shape": [5]}, **NORM, residual=(2, 5)),
    tiny(
        "add_layer_norm",
        {"normalized_shape": [5], "dropout_p": 0.4, "seed": 5, "return_sum": False},
        **NORM,
        residual=(2, 5),
    ),
    tiny("rms_norm", {"normalized_shape": [5]}, **NORM),
    tiny("add_rms_norm", {"normalized_shape": [5]}, **NORM, residual=(2, 5)),
    tiny(
        "add_rms_norm",
        {"normalized_shape": [5], "dropout_p": 0.4, "seed": 5},
        **NORM,
        residual=(2, 5),
    ),
    *(tiny("linear", {"activation": a}, **LINEAR) for a in (None, "gelu", "gelu_tanh", "silu")),
    tiny("linear_cross_entropy", {"label_smoothing": 0.2}, **LOSS),
    tiny("linear_cross_entropy", {"reduction": "none", "softcap": 1.5}, **LOSS),
    tiny("ffn", {"activation": "gelu"}, **FFN, **BIASES),
    tiny("ffn", {"activation": "silu"}, **FFN, gate_weight=(4, 3), gate_bias=(4,)),
    tiny("ffn", {"dropout_p": 0.4, "seed": 5, "recompute": True}, **FFN, **BIASES),
    tiny("apply_rope", {}, query=(1, 2, 3, 5), key=(1, 1, 3, 5), **ANGLES),
    tiny("apply_rope", {"key": None, "interleaved": True}, query=(2, 1, 3, 4), **ANGLES),
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


@pytest.mark.parametrize(
    "function",
    [
        lambda x: fastattn.attention(x, x, x),
        lambda x: fastattn.add_layer_norm(x, x, [4])[0],
        lambda x: fastattn.linear(x, x[0, 0], activation="gelu"),
        lambda x: fastattn.linear_cross_entropy(x[0, 0], x[0, 0], torch.tensor([0, 2, 1])),
    ],
    ids=["attention", "add_layer_norm", "linear", "linear_cross_entropy"],
)
def test_a_tensor_may_stand_in_several_places(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    with fastattn.use_kernel("cpu"):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)
        expected = torch.autograd.grad(function(x).sum(), x)[0]
        found = torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(found.detach(), expected)


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
    "attention_varlen-everything",
    "scaled_dot_product_attention-float_mask",
    "additive_attention-mask",
    "layer_norm-odd_sizes",
    "add_layer_norm-dropout",
    "rms_norm-plain",
    "add_rms_norm-everything",
    "linear-gelu",
    "linear_cross_entropy-ignored",
    "ffn-everything",
    "apply_rope-positions",
]
by_one_each = pytest.mark.parametrize("case_id", ONE_EACH)


def test_one_each_is_every_function() -> None:
    differentiable = {
        name for name, (_, record) in registry.FUNCTIONS.items() if isinstance(record, registry.Op)
    }
    assert {CASES[case_id].function for case_id in ONE_EACH} == differentiable


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
    graphs = []
    for batch, length in ((2, 5), (3, 9), (4, 70)):
        x = torch.randn(batch, length, 16, requires_grad=True)
        found = torch.autograd.grad(block(x).sum(), x)[0]
        with torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(found, torch.autograd.grad(block(x).sum(), x)[0])
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0]


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


AUTOCAST = {
    "attention",
    "attention_varlen",
    "additive_attention",
    "scaled_dot_product_attention",
    "linear",
    "linear_cross_entropy",
    "ffn",
}


@by_one_each
def test_autocast_is_that_of_pytorch(case_id: str) -> None:
    """Products run in autocast's dtype and return it; norms, as on the CPU they do, stay.

    A loss is fp32 whatever its product is.
    """
    case = CASES[case_id]
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(case, inputs, "cpu")
    dtype = torch.bfloat16 if case.function in AUTOCAST else torch.float32
    loss = case.function == "linear_cross_entropy"
    assert found["out 0"].dtype == (torch.float32 if loss else dtype)
    for name in case.differentiable(inputs):
        assert found[f"grad {name}"].dtype == torch.float32
    narrow = case.function in ("attention", "attention_varlen")
    keep = ("bias", "sinks", "alibi_slopes") if narrow else ()
    cast = {
        name: tensor.to(dtype) if tensor.is_floating_point() and name not in keep else tensor
        for name, tensor in inputs.items()
    }
    same = run(case, cast, "cpu")
    for name, tensor in found.items():
        assert tensor.to(same[name].dtype).equal(same[name]), name


def test_autocast_leaves_fp64_alone() -> None:
    x, weight = torch.randn(2, 3).double(), torch.randn(4, 3).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastattn.linear(x, weight).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert fastattn.linear(x.float(), weight.float()).dtype == torch.float32
