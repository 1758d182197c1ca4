"""What a GPU alone can show: parity on one, streams, graphs and devices, of both GPU languages.

What the tests do there they also do on CPU tensors in the emulator, where there is but one stream
and a graph is a second call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastattn import _library, registry
from fastattn.dispatch import CUDA_DTYPES
from fastattn.testing import Case, all_cases, assert_case_close_to_oracle, run

CASES = {case.id: case for case in all_cases() if not case.refused}

# Of each function with a GPU kernel a small call, which has seeds and ragged edges in it.
SMALL = {
    "attention": "odd_sizes",
    "attention_varlen": "no_rows",
    "attention_decode": "rotary",
    "scaled_dot_product_attention": "grouped",
    "layer_norm": "odd_sizes",
    "add_layer_norm": "everything",
    "rms_norm": "fp32_parameters",
    "add_rms_norm": "dropout",
    "linear": "odd_sizes",
    "ffn": "everything",
    "linear_cross_entropy": "odd_sizes",
    "apply_rope": "partial",
}


def kernels_of(function: str) -> list[str]:
    return [each for each in ("cuda", "triton") if each in registry.FUNCTIONS[function][1].kernels]


class Gpu:
    """Where a kernel runs, with the streams and graphs of that place."""

    first, second = "cuda:0", "cuda:1"

    @staticmethod
    @contextlib.contextmanager
    def busy_stream() -> Iterator[None]:
        """Another stream, on which all that is launched inside has to wait for some milliseconds.

        What is launched anywhere else comes before that.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            yield
        torch.cuda.synchronize()

    @staticmethod
    def graph(function: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Callable]:
        """What the function returns, from within a graph, and what replays that."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = function()
        return found, graph.replay


class Emulated:
    """The same on the CPU."""

    first = second = "cpu"
    busy_stream = contextlib.nullcontext

    @staticmethod
    def graph(function: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Callable]:
        found = function()

        def replay() -> None:
            for name, tensor in function().items():
                found[name].copy_(tensor)

        return found, replay


def places() -> list:
    """Each function on each of its kernels, and those in CUDA C++ in the emulator too."""
    why = _library.WHY_NO_CUDA
    found = []
    for function in SMALL:
        case = CASES[f"{function}-{SMALL[function]}"]
        for kernel in kernels_of(function):
            name = f"{case.id}-{kernel}"
            found.append(pytest.param(case, kernel, Gpu, marks=pytest.mark.cuda, id=name))
        if "cuda" in kernels_of(function):
            skipped = pytest.mark.skipif(bool(why), reason=why)
            found.append(
                pytest.param(case, "emulator", Emulated, marks=skipped, id=f"{case.id}-emulator")
            )
    return found


everywhere = pytest.mark.parametrize(("case", "kernel", "place"), places())


def test_every_function_with_a_gpu_kernel_has_a_call() -> None:
    assert set(SMALL) == {function for function in registry.FUNCTIONS if kernels_of(function)}


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].equal(expected[name]), name


def first_run(
    case: Case, kernel: str, device: str
) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]]:
    """Inputs, gradients of the outputs and results: all on the device, and the kernels loaded."""
    inputs = {name: each.to(device) for name, each in case.inputs(torch.bfloat16).items()}
    outs = run(case, inputs, kernel, gradients=False)
    grads = [torch.ones_like(out) for name, out in outs.items() if name.startswith("out")]
    return inputs, grads, run(case, inputs, kernel, grads=grads)


def floating(inputs: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in inputs.items() if tensor.is_floating_point()]


@everywhere
def test_launches_go_to_the_current_stream(case: Case, kernel: str, place: type) -> None:
    """Forward and backward: on any other they would read what is not there yet."""
    case = case.on(place.first)
    inputs, grads, expected = first_run(case, kernel, place.first)
    late = inputs | {name: torch.zeros_like(inputs[name]) for name in floating(inputs)}
    with place.busy_stream():
        for name in floating(inputs):
            late[name].copy_(inputs[name])
        found = run(case, late, kernel, grads=grads)
    same_bits(found, expected)


@everywhere
def test_a_graph_replays(case: Case, kernel: str, place: type) -> None:
    """Forward and backward, on what its inputs hold by then."""
    case = case.on(place.first)
    inputs, grads, expected = first_run(case, kernel, place.first)
    kept = inputs | {name: -inputs[name] for name in floating(inputs)}
    found, replay = place.graph(lambda: run(case, kept, kernel, grads=grads))
    for name in floating(inputs):
        kept[name].copy_(inputs[name])
    replay()
    same_bits(found, expected)


@everywhere
def test_kernels_run_where_the_inputs_are(case: Case, kernel: str, place: type) -> None:
    """On a GPU that is not the current one."""
    if place is Gpu and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert_case_close_to_oracle(case, torch.bfloat16, kernel, place.second)
    assert place is Emulated or torch.cuda.current_device() == 0


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case_id", "kernel"),
    [(each.id, kernel) for each in CASES.values() for kernel in kernels_of(each.function)],
)
def test_matches_oracle(case_id: str, kernel: str, dtype: torch.dtype) -> None:
    assert_case_close_to_oracle(CASES[case_id], dtype, kernel, Gpu.first)
