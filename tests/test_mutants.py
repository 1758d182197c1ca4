"""A CUDA kernel that lacks one of its barriers, waits or bounds is found out in the emulator.

Every launch of some small calls is recorded. A mutant of a kernel replays them on the same memory,
and is caught where a check speaks or where it leaves other bits than the whole kernel did. Types
that share a body share its mutants, once their kernels are known to synchronise alike.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from mutant_calls import HARMLESS, KERNELS

import fastattn
from bench import resources
from fastattn import _library, emulator
from fastattn.emulator import TensorMap, device
from fastattn.emulator.launch import Memory
from fastattn.emulator.ptx import Location, Statement

pytestmark = pytest.mark.skipif(bool(_library.WHY_NO_CUDA), reason=_library.WHY_NO_CUDA)

# recording and replaying

SCHEDULES = ({"order": "forward", "late": True}, {"order": "reverse", "late": False})


@dataclass
class Recorded:
    """A launch, the bytes of each argument before it, and those that it left."""

    grid: list[int]
    block: list[int]
    shared: int
    arguments: list[Memory | TensorMap | bytes | None]
    before: dict[int, bytes]
    after: dict[int, bytes] = field(default_factory=dict)

    def run(
        self, kernel: emulator.Kernel, schedule: Mapping[str, Any] = SCHEDULES[0]
    ) -> tuple[emulator.Report, dict[int, bytes]]:
        """What a kernel's checks say of this launch, and the bytes that it leaves."""
        copies: dict[int, tuple[int, Any]] = {}
        for address, data in self.before.items():
            copy = ctypes.create_string_buffer(len(data) + 32)
            at = -(-ctypes.addressof(copy) // 16) * 16 + address % 16
            ctypes.memmove(at, data, len(data))
            copies[address] = at, copy
        arguments = [
            replace(each, address=copies[each.address][0]) if isinstance(each, Memory) else each
            for each in self.arguments
        ]
        report = kernel.launch(
            self.grid, self.block, *arguments, shared=self.shared, count=False, patience=20_000,
            **schedule,
        )  # fmt: skip
        left = {a: ctypes.string_at(copies[a][0], len(data)) for a, data in self.before.items()}
        return report, left

    def catches(self, mutant: emulator.Kernel, schedule: Mapping[str, Any]) -> bool:
        """Whether a mutant that does this launch is found out."""
        report, left = self.run(mutant, schedule)
        return not report.ok or left != self.after


def kept(argument: Memory | TensorMap | bytes | None) -> Memory | TensorMap | bytes | None:
    """An argument whose matrix is there as long as itself: kernels do not write to those."""
    if isinstance(argument, TensorMap):
        return replace(argument, tensor=argument.tensor.clone())
    return argument


@functools.cache
def launches(call: Callable[[], None]) -> list[tuple[str, Recorded]]:
    """The launches of a call, and, where rows take turns, the same by a single block."""
    found: list[tuple[str, Recorded]] = []
    run = device._run

    def watch(launch: device.Launch) -> None:
        name = launch.kernel.decode()
        arguments = [kept(device._argument(launch.arguments[i])) for i in range(launch.count)]
        spans = {each.address: each.bytes for each in arguments if isinstance(each, Memory)}
        before = {at: ctypes.string_at(at, size) for at, size in spans.items()}
        grids = [launch.grid[:]]
        if name.startswith(("norm_forward", "norm_backward")) and launch.grid[0] > 1:
            grids.append([1, 1, 1])
        for grid in grids:
            found.append((name, Recorded(grid, launch.block[:], launch.shared, arguments, before)))
        run(launch)

    with pytest.MonkeyPatch.context() as patch, fastattn.use_kernel("emulator"):
        patch.setattr(device, "_run", watch)
        torch.manual_seed(0)
        call()
    return found


def recorded(name: str, kernel: emulator.Kernel) -> list[Recorded]:
    """A kernel's launches in its calls, with what they leave."""
    found = [each for call in KERNELS[name] for own, each in launches(call) if own == name]
    for each in found:
        report, each.after = each.run(kernel)
        assert report.ok, report
    return found


# the mutants

# Opcodes of barriers, arrivals, waits, commits and fences.
SYNCHRONISES = (
    r"bar|mbarrier\.(?:init|arrive)|cp\.async\.(?:wait|commit|mbarrier)\w*"
    r"|fence\.(?:proxy|mbarrier_init)|wgmma\.(?:fence|commit_group|wait_group)"
)

LOOSER = {"lt": "le", "le": "lt", "ge": "gt", "gt": "ge"}


class Mutant(NamedTuple):
    """What was changed, and the statements instead of which it has others, or none."""

    what: str
    statements: dict[int, Statement | None]

    def of(self, kernel: emulator.Kernel) -> emulator.Kernel:
        """The mutant as a kernel."""
        function, ptx = kernel.function, kernel.module.ptx
        left = [self.statements.get(i, each) for i, each in enumerate(function.statements)]
        gone = sorted(i for i, each in self.statements.items() if each is None)
        changed = replace(
            function,
            statements=[each for each in left if each is not None],
            labels={at: i - bisect.bisect_left(gone, i) for at, i in function.labels.items()},
        )
        module = emulator.Module(replace(ptx, functions={kernel.name: changed}))
        return emulator.Kernel(module, changed)


@functools.cache
def source(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


def texts(location: Location | None) -> str:
    """The lines of source of an instruction, the innermost first."""
    found = []
    while location is not None:
        found.append(source(location.file)[location.line - 1].strip())
        location = location.inlined_at
    return " < ".join(found)


def mutants(kernel: emulator.Kernel) -> Iterator[Mutant]:
    """A kernel without one of its barriers, waits, commits and fences; with a wait for one group
    less; with copies of all 16 bytes; with one bound that is larger by one, wherever a line was
    unrolled to.
    """
    together: dict[str, dict[int, Statement | None]] = {}
    counts = Counter(statement.opcode for statement in kernel.function.statements)
    seen: Counter[str] = Counter()
    for i, statement in enumerate(kernel.function.statements):
        opcode, operands = statement.opcode, statement.operands
        seen[opcode] += 1
        where = f"{seen[opcode]} of {counts[opcode]}, {texts(statement.source)}"
        if re.match(rf"({SYNCHRONISES})\b", opcode):
            yield Mutant(f"without {opcode}: {where}", {i: None})
        if opcode.startswith("mbarrier.try_wait"):  # with the branch back to it
            yield Mutant(f"without {opcode}: {where}", {i: None, i + 1: None})
        if re.match(r"(cp\.async|wgmma)\.wait_group\b", opcode):
            looser = replace(statement, operands=[str(int(operands[0]) + 1)])
            yield Mutant(f"{opcode} loosened: {where}", {i: looser})
        if statement.source is None or statement.source.line == 0:
            continue  # of the compiler's own
        if re.match(r"cp\.async\.c[ag]\.", opcode):
            whole = replace(statement, operands=operands[:3])
            what = f"copies of all 16 bytes: {texts(statement.source)}"
            together.setdefault(what, {})[i] = whole
        bound = re.match(r"setp\.(lt|le|ge|gt)\.s(?:32|64)$", opcode)
        if bound and "/attention/" not in statement.source.file:
            looser = replace(statement, opcode=f"setp.{LOOSER[bound[1]]}{opcode[7:]}")
            what = f"{bound[1]} loosened: {texts(statement.source)}"
            together.setdefault(what, {})[i] = looser
    for what, statements in together.items():
        yield Mutant(what, statements)


@functools.cache
def rooms() -> dict[str, str]:
    """The room of each kernel."""
    entry = re.compile(r"\.entry (\w+)\(")
    return {name: room for room in resources.ROOMS for name in entry.findall(_library.ptx(room))}


@pytest.mark.parametrize("name", KERNELS)
def test_every_mutant_is_found_out(name: str) -> None:
    kernel = device.kernel(rooms()[name], name)
    launches, unnoticed, count = recorded(name, kernel), [], 0
    for mutant in mutants(kernel):
        what = f"{name}: {mutant.what}"
        if any(all(word in what for word in words) for words in HARMLESS):
            continue
        count += 1
        broken = mutant.of(kernel)
        if not any(each.catches(broken, how) for how in SCHEDULES for each in launches):
            unnoticed.append(what)
    assert count and not unnoticed, f"{len(unnoticed)} of {count}:\n" + "\n".join(unnoticed)


def skeleton(text: str) -> list[str]:
    """How a kernel synchronises and copies: its instructions for that, in their order, once where
    one was unrolled.
    """
    pattern = rf"\t((?:{SYNCHRONISES}|cp\.async)[\w.:]*(?: \d)?)\b"
    return [each for each, _ in itertools.groupby(re.findall(pattern, text))]


@pytest.mark.parametrize(
    "room", ["attention", "attention_decode", "attention_sm90", "ffn", "ffn_sm90", "norm"]
)
def test_mutants_stand_for_every_kernel(room: str) -> None:
    """A kernel without mutants of its own synchronises as one of its kind does, or not at all."""
    names = re.findall(r"\.entry (\w+)\(", _library.ptx(room))
    shapes = {name: skeleton(_library.ptx(room, name)) for name in names}
    tried = KERNELS.keys() & shapes.keys()
    for name, shape in shapes.items():
        kind = re.match(r"(norm|ffn)_([a-z]+_)*?(?=f32|bf16|f16)|attention_[a-z]+_", name)
        alike = [other for other in tried if kind and other.startswith(kind[0])]
        found = not shape or any(shapes[other] == shape for other in alike)
        assert found, f"{name} has no mutants"
