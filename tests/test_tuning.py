"""Tuning of the Triton kernels' launch knobs, with a timer in place of a GPU's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.emulator import device
from fastattn.testing import Case, Draw, all_cases, assert_case_close_to_oracle
from fastattn.testing import run as run_case

WHY_NOT = fastattn.backends()["triton-emulator"]
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
if not WHY_NOT:
    from triton.runtime.errors import OutOfResources

    from fastattn.ops import launch, tuning
    from fastattn.ops.attention import triton_tiles
    from fastattn.ops.ffn import triton as ffn
    from fastattn.ops.norm import triton as norm


@dataclass(frozen=True)
class Size:
    of: int


SIZES = Size(1), Size(2), Size(3)
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}  # of a block


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the choices are kept, in a process that knows none and has told nothing."""
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(tuning, "_told", set())
    forget(monkeypatch)
    yield tmp_path / "new/tuning.json"
    monkeypatch.undo()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_known", None)


def timer_of(times: list[float]) -> Callable[[Callable[[], None]], float]:
    """Runs what it times, and takes the next time from the list."""

    def timer(function: Callable[[], None]) -> float:
        function()
        return times.pop(0)

    return timer


def refuses(function: Callable[[], None]) -> float:
    raise AssertionError("something was timed")


def run(*shape: object, choices: tuple[Size, ...] = SIZES) -> list[int]:
    """The sizes that were launched, in order."""
    launched: list[int] = []
    tuning.run(lambda size: launched.append(size.of), choices, "kernel", shape, torch.ones(1))
    return launched


def test_it_is_off_by_default(file: Path) -> None:
    assert run() == [1] and not file.exists()


def test_there_is_nothing_to_choose_from_one(file: Path) -> None:
    with tuning.measuring(refuses):
        assert run(choices=SIZES[:1]) == [1]
    assert not file.exists()


def test_the_fastest_is_chosen_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tuning.measuring(timer_of([3.0, 1.0, 2.0])):
        assert run(64) == [1, 2, 3, 2]
    with tuning.measuring(refuses):
        assert run(64) == [2]
        forget(monkeypatch)  # another process
        assert run(64) == [2]
        with pytest.raises(AssertionError, match="timed"):
            run(128)
    assert run(64) == [1]
    ((key, kept),) = json.loads(file.read_text()).items()
    assert "sm_80" in key and "triton" in key and "float32" in key and kept == {"of": 2}


def test_processes_share_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tuning.measuring(timer_of([1.0, 2.0])):
        run(1, choices=SIZES[:2])
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"of another process": {"of": 1}}))
    with tuning.measuring(timer_of([2.0, 1.0])):
        run(2, choices=SIZES[:2])
    assert len(json.loads(file.read_text())) == 3


@pytest.mark.parametrize("text", ["{", "[]", "\x00", '{"kernel": 3}'])
def test_a_file_that_is_none_is_measured_anew(
    file: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with tuning.measuring(timer_of([2.0, 1.0, 3.0])):
        assert run() == [1, 2, 3, 2]
    forget(monkeypatch)
    with tuning.measuring(refuses):
        assert run() == [2]


def test_what_is_no_longer_a_choice_is_measured_anew() -> None:
    with tuning.measuring(timer_of([2.0, 2.0, 1.0])):
        assert run() == [1, 2, 3, 3]
    with tuning.measuring(timer_of([2.0, 1.0])):
        assert run(choices=SIZES[:2]) == [1, 2, 2]


def test_a_folder_that_cannot_be_written_costs_the_file_alone(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.write_text("a file, no folder")
    with tuning.measuring(timer_of([2.0, 1.0, 3.0])), caplog.at_level("WARNING", "fastattn"):
        assert run() == [1, 2, 3, 2]
    with tuning.measuring(refuses):
        assert run() == [2]
    assert "cannot be written" in caplog.text


def test_what_does_not_fit_is_not_chosen() -> None:
    def timer(function: Callable[[], None]) -> float:
        function()
        raise OutOfResources(1, 0, "shared memory")

    with tuning.measuring(timer):
        assert run() == [1, 2, 3, 1]


def test_nothing_is_measured_while_a_graph_is_captured(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with tuning.measuring(refuses), caplog.at_level("WARNING", "fastattn"):
        assert run() == run() == [1]
    assert caplog.text.count("while a CUDA graph is captured") == 1 and not file.exists()


def test_without_a_gpu_it_says_so(python: Callable) -> None:
    """As the environment variable asks, here in the emulator."""
    code = "import torch, fastattn; fastattn.rms_norm(torch.ones(2, 64), [64])"
    forced = {"FASTATTN_KERNEL": "triton-emulator"}
    found = python("-c", code, FASTATTN_TUNE="1", **forced)
    assert found.returncode == 0 and "norm_forward is not tuned" in found.stderr
    assert python("-c", code, FASTATTN_TUNE="0", **forced).stderr == ""
    found = python("-c", code, FASTATTN_TUNE="yes", **forced)
    assert "FASTATTN_TUNE must be 0 or 1, got 'yes'" in found.stderr


# the choices


def attention(head_dim: int) -> Case:
    shapes = {"query": (1, 2, 70, head_dim), "key": (1, 1, 200, head_dim)}
    shapes["value"] = shapes["key"]
    tensors = {name: Draw(shape) for name, shape in shapes.items()}
    return Case("attention", f"causal_{head_dim}", tensors, {"causal": True})


CASES = {case.id: case for case in (*all_cases(), attention(64), attention(128))}


def choices() -> Iterator[tuple[str, int]]:
    """A case and a number for each choice that tuning alone makes."""
    if WHY_NOT:
        return
    knobs, products = triton_tiles.KNOBS[80], ffn.KNOBS[80]
    for case_id, tables in {
        "attention-causal_64": (knobs.forward[128], knobs.backward[128]),
        "attention-causal_128": (knobs.forward[256], knobs.backward[256]),
        "attention_decode-odd_sizes": (knobs.decode[256],),
        "ffn-everything": (products.product, products.gated),
        "add_layer_norm-everything": (norm.KNOBS[80],),
    }.items():
        yield from ((case_id, i) for i in range(1, max(map(len, tables))))


@pytest.mark.parametrize("architecture", [80, pytest.param(90, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("case_id", "chosen"), list(choices()))
def test_every_choice_is_right(
    case_id: str, chosen: int, architecture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the shared memory of its GPU, under the emulator's checks, and by the error rule."""
    case = CASES[case_id]
    monkeypatch.setattr(
        tuning, "_best", lambda launches, choices, *rest: choices[min(chosen, len(choices) - 1)]
    )
    with tuning.measuring(refuses):
        with launch.compiling(architecture) as kernels:
            run_case(case, case.inputs(torch.bfloat16), "triton-emulator")
        assert kernels
        assert all(kernel.metadata.shared <= MOST_SHARED[architecture] for kernel in kernels)
        with device.emulating(architecture):
            assert_case_close_to_oracle(case, torch.bfloat16, "triton-emulator")
