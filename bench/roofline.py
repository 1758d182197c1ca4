"""How busy a kernel's main loop can keep the tensor cores at best, from its machine code alone.

The loop is the smallest that holds nine tenths of a kernel's tensor instructions, or the most that
any loop holds where several share them out; and the way through it the shortest that takes all of
these and all copies: jumps pass over what serves masks, ragged edges, rows that are not aligned and
values that are not finite. For each unit of a quarter of a multiprocessor, this adds up the cycles
that one warp's instructions take there. The unit with the most sets the pace, and the bound is the
part of its time that tensor cores work. No latency is counted: a kernel is slower by as much as its
warps fail to hide. Of a loop whose code is not in the order in which it runs, all counts.

Rates are those of the CUDA programming guide's table of arithmetic throughput, where an instruction
on 16 lanes a cycle takes a warp two. From sm_90 on none is published for `mma.sync`, beside which
there are newer instructions, and there is no bound. A loop inside the main one counts once.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import programs

# Cycles of a warp instruction on the quarter of a multiprocessor: m16n8k16 on tensor cores, fp32.
TENSOR = {"sm_80": 8, "sm_86": 16, "sm_89": 16}
FP32 = {"sm_80": 2, "sm_86": 1, "sm_89": 1}

PRODUCTS = ("HMMA", "HGMMA")  # of a warp, and of a warp group on sm_90a

# Shared memory serves the four quarters in turn, 128 bytes a cycle: cycles of a warp instruction.
SHARED = {"LDSM.x4": 16, "LDGSTS": 16, "LDS": 4, "STS": 4}

UNITS = {
    "tensor": r"HMMA",
    "fp32": r"FFMA|FADD|FMUL|IMAD",
    "alu": r"IADD|LOP3|SHF|LEA|[IFP]SETP|[IF]?SEL|PRMT|VOTE|[IF]MNMX|PLOP3|SGXT|BMSK|IABS",
    "special": r"MUFU|F2F|I2F|F2I|POPC|FLO",
}


class Instruction(NamedTuple):
    """A line of machine code; `target` is the label that it jumps to, if a condition holds."""

    opcode: str
    target: str = ""
    conditional: bool = False


class Roof(NamedTuple):
    """The cycles that each unit needs for one round of the main loop, and what they leave."""

    cycles: dict[str, int]
    percent: int  # of the tensor cores' time


def functions(cubin: Path) -> dict[str, list[Instruction | str]]:
    """The instructions of each kernel of a compiled file, with labels as strings in between."""
    command = [programs.find("nvdisasm"), "-c", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Instruction | str]] = {}
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            body = found.setdefault(section[1], [])
        elif label := re.match(r"(\.L_x_\d+):", line):
            body.append(label[1])
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)(.*)", line):
            jump = re.match(r"BRA.*? (.*)`\((\.L_x_\d+)\)", code[2] + code[3])
            if code[1] == "@!PT ":  # never done, and takes no more than its issue
                body.append(Instruction("NOP"))
            elif jump:
                body.append(Instruction(code[2], jump[2], bool(code[1] or jump[1])))
            else:
                body.append(Instruction(code[2], "", bool(code[1])))
    return found


def loops(code: Sequence[Instruction | str]) -> list[tuple[int, int]]:
    """Where each loop begins and ends: at a label, and at the jump back to it."""
    labels = {each: i for i, each in enumerate(code) if isinstance(each, str)}
    return [
        (labels[each.target], i)
        for i, each in enumerate(code)
        if isinstance(each, Instruction) and labels.get(each.target, i) < i
    ]


def main_loop(code: Sequence[Instruction | str]) -> Counter[str] | None:
    """The opcodes of one round of the main loop; None where there is no tensor instruction."""

    def products(part: Sequence[Instruction | str]) -> int:
        return tensor_instructions(x.opcode for x in part if isinstance(x, Instruction))

    found = {span: count for span in loops(code) if (count := products(code[slice(*span)]))}
    if not found:
        return None
    least = min(0.9 * products(code), max(found.values()))
    main = [span for span, count in found.items() if count >= least]
    return Counter(shortest_way(code, *min(main, key=lambda span: span[1] - span[0])))


def tensor_instructions(opcodes: Iterable[str]) -> int:
    """How many there are among these, which a Counter says with `elements()`."""
    return sum(opcode.startswith(PRODUCTS) for opcode in opcodes)


def shortest_way(code: Sequence[Instruction | str], begin: int, end: int) -> list[str]:
    """The opcodes on the way down from one line to another that has most products and copies and,
    of such ways, the fewest other instructions; all opcodes where there is no way down.
    """
    labels = {each: i for i, each in enumerate(code) if isinstance(each, str)}
    best: dict[int, tuple[int, int, int]] = {}  # by line: minus those, the others, the next line
    for i in range(end, begin - 1, -1):
        here, next_lines, wanted, others = code[i], [i + 1], 0, 0
        if isinstance(here, Instruction):
            wanted = here.opcode.startswith((*PRODUCTS, "LDGSTS"))
            others = not wanted
            if not here.conditional and re.match("BRA|EXIT|RET", here.opcode):
                next_lines = []
            next_lines.append(labels.get(here.target, begin))
        onward = [(*best[at][:2], at) for at in next_lines if at > i and at in best]
        if i == end:
            onward = [(0, 0, end + 1)]
        if onward:
            most, fewest, at = min(onward)
            best[i] = most - wanted, fewest + others, at
    if begin not in best:  # the way through leads up as well
        return [each.opcode for each in code[begin : end + 1] if isinstance(each, Instruction)]
    found, i = [], begin
    while i <= end:
        here = code[i]
        if isinstance(here, Instruction):
            found.append(here.opcode)
        i = best[i][2]
    return found


def roof(opcodes: Counter[str], architecture: str) -> Roof:
    """The bound for a loop of these opcodes."""
    rates = {"tensor": TENSOR[architecture], "fp32": FP32[architecture], "alu": 2, "special": 8}
    cycles = {
        unit: rates[unit] * sum(n for name, n in opcodes.items() if re.match(pattern, name))
        for unit, pattern in UNITS.items()
    }
    cycles["issue"] = opcodes.total()
    cycles["shared"] = sum(
        count * next((SHARED[unit] for unit in SHARED if _touches(name, unit)), 0)
        for name, count in opcodes.items()
    )
    return Roof(cycles, round(100 * cycles["tensor"] / max(cycles.values())))


def _touches(opcode: str, unit: str) -> bool:
    name, _, width = unit.partition(".x")
    return opcode.split(".")[0] == name and (not width or opcode.endswith(f".{width}"))


def main_loops(cubin: Path) -> dict[str, Counter[str]]:
    """The main loop of each kernel of a compiled file that has one with tensor instructions."""
    mixes = {name: main_loop(code) for name, code in functions(cubin).items()}
    return {name: mix for name, mix in mixes.items() if mix}
