"""Turns a PTX function into the program that the runtime executes.

lower.py does the regular instructions; those here follow no common form, and each has its own way
to be read. Whatever neither knows is refused with its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from fastattn.emulator.lower import Lowering, Program, Translation
from fastattn.emulator.opcodes import (
    CACHE,
    CLOCKS,
    COMPARISONS,
    FLAGS,
    LOCAL_WINDOW,
    ROUNDINGS,
    SCOPES,
    SHARED_WINDOW,
    SHUFFLES,
    SPACES,
)
from fastattn.emulator.ptx import WIDTHS, PtxError, PtxModule, number, split_operands


def translate(module: PtxModule, name: str, addresses: dict[str, int]) -> Program:
    """The program of entry `name`.

    `addresses` holds where its parameters and the module's .global and .const variables lie.
    Raises PtxError that names every kind of instruction which the emulator lacks.
    """
    return Translation(module, module.functions[name], addresses, IRREGULAR).run()


IRREGULAR: dict[str, Lowering] = {}


def _elements(text: str) -> list[str]:
    """The registers of a vector operand, or the single one."""
    return split_operands(text[1:-1]) if text.startswith("{") else [text]


def _lowers(*names: str) -> Callable:
    def register(function: Callable) -> Callable:
        for name in names:
            IRREGULAR[name] = function
        return function

    return register


@_lowers("mov")
def _mov(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    width = WIDTHS[qualifiers[-1]]
    target, source = operands
    if source in CLOCKS:
        t.emit(CLOCKS[source], [t.slot(target, width)])
    elif target.startswith("{") or source.startswith("{"):
        packing = source.startswith("{")
        parts = _elements(source if packing else target)
        each = width // len(parts)
        whole = t.slot(target if packing else source, width)
        slots = [t.slot(part, each) for part in parts]
        t.emit("pack" if packing else "unpack", [whole, width, len(parts), each, *slots])
    else:
        t.lower_regular("mov", qualifiers, operands)


@_lowers("setp")
def _setp(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    flags = FLAGS["ftz"] if "ftz" in qualifiers else 0
    comparison, *rest, kind = (q for q in qualifiers if q != "ftz")
    comparison = COMPARISONS.get(comparison, comparison)
    results = [*operands[0].split("|"), "_"][:2]
    how, with_slot, negated = 0, 0, 0
    if rest:
        how = ["and", "or", "xor"].index(rest[0]) + 1
        negated = int(operands[3].startswith("!"))
        with_slot = t.slot(operands[3].lstrip("!"), 0)
    slots = [t.slot(r.strip(), 0) for r in results]
    slots += [t.slot(text, WIDTHS[kind]) for text in operands[1:3]]
    t.emit(f"setp.{comparison}.{kind}", [*slots, with_slot, how, negated], flags)


@_lowers("cvt")
def _cvt(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    flags = sum(FLAGS[q] for q in qualifiers if q in ("ftz", "sat", "relu"))
    rest = [q for q in qualifiers if q not in ("ftz", "sat", "relu")]
    rounding = ROUNDINGS[rest.pop(0)] if rest[0] in ROUNDINGS else 0
    if len(rest) != 2:
        raise PtxError("unknown conversion")
    to, source = rest
    name = f"cvt.{to}.{source}"
    if to in ("f16x2", "bf16x2"):
        t.emit(
            name, [t.slot(operands[0], 4), *(t.slot(x, 4) for x in operands[1:]), rounding], flags
        )
    elif to == "tf32":
        t.emit(name, [t.slot(operands[0], 4), t.slot(operands[1], 4), rounding], flags)
    else:
        if to.startswith("f") and source[0] in "us" and rounding > 1:
            raise PtxError("only conversions to the nearest are known")
        target = t.any_slot(operands[0], WIDTHS[to])
        t.emit(name, [*target, *t.any_slot(operands[1], WIDTHS[source]), rounding], flags)


@_lowers("cvta")
def _cvta(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    """Addresses of global memory are generic as they are; those of the others get a window."""
    space = qualifiers[1] if qualifiers[0] == "to" else qualifiers[0]
    space = space.split("::")[0]
    target, source = t.slot(operands[0], 8), t.slot(operands[1], 8)
    if space not in ("shared", "local"):
        t.emit("mov.b64", [target, source])
    elif qualifiers[0] == "to":
        t.emit("and.b64", [target, source, t.constant(SHARED_WINDOW - 1, 8)])
    else:
        window = SHARED_WINDOW if space == "shared" else LOCAL_WINDOW
        t.emit("or.b64", [target, source, t.constant(window, 8)])


@_lowers("isspacep")
def _isspacep(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    space = SPACES[qualifiers[0].split("::")[0]]
    t.emit("isspacep", [t.slot(operands[0], 0), t.slot(operands[1], 8), space])


@dataclass
class _Memory:
    """What the qualifiers of a memory instruction say."""

    space: int = 0
    flags: int = 0
    vector: int = 1
    rest: list[str] = field(default_factory=list)


def _memory(qualifiers: list[str]) -> _Memory:
    found = _Memory()
    for q in qualifiers:
        word, _, _detail = q.partition("::")
        if word in SPACES:
            found.space = SPACES[word]
        elif q in ("volatile", "relaxed"):
            found.flags |= FLAGS["strong"]
        elif q in ("acquire", "release"):
            found.flags |= FLAGS["strong"] | FLAGS[q]
        elif q == "acq_rel":
            found.flags |= FLAGS["strong"] | FLAGS["acquire"] | FLAGS["release"]
        elif q in SCOPES:
            found.flags |= FLAGS["gpu"] if q != "cta" else 0
        elif re.fullmatch(r"v\d", q):
            found.vector = int(q[1:])
        elif q not in CACHE and q not in ("weak", "noftz") and word not in ("L1", "L2"):
            found.rest.append(q)
    return found


@_lowers("ld", "ldu")
def _ld(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    memory = _memory(qualifiers)
    (kind,) = memory.rest
    width = WIDTHS[kind]
    parts = [t.any_slot(text, width) for text in _elements(operands[0])]
    head = [*t.address(operands[1]), memory.space, width, memory.vector, int(kind[0] == "s")]
    t.emit("ld", [*head, *(x for part in parts for x in part)], memory.flags)


@_lowers("st")
def _st(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    memory = _memory(qualifiers)
    (kind,) = memory.rest
    width = WIDTHS[kind]
    parts = [t.any_slot(text, width) for text in _elements(operands[1])]
    head = [*t.address(operands[0]), memory.space, width, memory.vector]
    t.emit("st", [*head, *(x for part in parts for x in part)], memory.flags)


@_lowers("atom", "red")
def _atom(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    memory = _memory(qualifiers)
    operation, kind = memory.rest
    if memory.vector != 1:
        raise PtxError("atomics on vectors are not known")
    width = WIDTHS[kind]
    if t.statement.opcode.startswith("red"):
        operands = ["_", *operands]
    values = [t.slot(text, width) for text in [*operands[2:4], "_"][:2]]
    # Without a scope an atomic reaches the device.
    if not SCOPES & set(qualifiers):
        memory.flags |= FLAGS["gpu"]
    head = [t.slot(operands[0], width), *t.address(operands[1]), memory.space]
    t.emit(f"atom.{operation}.{kind}", [*head, *values], memory.flags | FLAGS["strong"])


@_lowers("cp")
def _cp(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    if qualifiers[0] != "async":
        raise PtxError("unknown instruction")
    match qualifiers[1]:
        case "commit_group":
            t.emit("cp.async.commit_group", [])
        case "wait_group":
            t.emit("cp.async.wait_group", [number(operands[0])])
        case "wait_all":
            t.emit("cp.async.wait_all", [0])
        case "ca" | "cg":
            taken, ignored = -1, -1
            if len(operands) > 3 and t.function.registers.get(operands[3]) == "pred":
                ignored = t.slot(operands[3], 0)
            elif len(operands) > 3 and t.function.registers.get(operands[3]) != "b64":
                taken = t.slot(operands[3], 4)
            where = [*t.address(operands[0]), *t.address(operands[1])]
            t.emit("cp.async", [*where, number(operands[2]), taken, ignored])
        case _:
            raise PtxError("unknown asynchronous copy")


@_lowers("fence", "membar")
def _fence(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    flags = 0 if "cta" in qualifiers else FLAGS["gpu"]
    if qualifiers[0] in ("proxy", "mbarrier_init"):
        flags |= FLAGS["async_proxy"]
    t.emit("fence", [], flags)


@_lowers("bra")
def _bra(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.jumps.append((len(t.program.operands), operands[0]))
    t.emit("bra", [0])


@_lowers("brx")
def _brx(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    targets = t.function.tables[operands[1]]
    begin = len(t.program.operands) + 1
    t.jumps.extend((begin + i, target) for i, target in enumerate(targets))
    t.emit("brx.idx", [t.slot(operands[0], 4), *(0 for _ in targets)])


@_lowers("ret", "exit")
def _exit(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.emit("exit", [])


@_lowers("trap")
def _trap(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.emit("trap", [])


@_lowers("nanosleep")
def _nanosleep(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.emit("yield", [])


@_lowers("bar", "barrier")
def _bar(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    kinds = [q for q in qualifiers if q not in ("cta", "aligned")]
    if kinds == ["warp", "sync"]:
        t.emit("bar.warp.sync", [t.slot(operands[0], 4)])
        return
    if kinds not in (["sync"], ["arrive"]):
        raise PtxError("unknown barrier")
    aligned = t.statement.opcode.startswith("bar.") or "aligned" in qualifiers
    count = t.slot(operands[1], 4) if len(operands) > 1 else -1
    flags = FLAGS["aligned"] if aligned else 0
    t.emit(f"bar.{kinds[0]}", [t.slot(operands[0], 4), count], flags)


@_lowers("shfl")
def _shfl(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    _sync, mode, _kind = qualifiers
    target, _, inside = operands[0].partition("|")
    slots = [t.slot(target.strip(), 4), t.slot(inside.strip() or "_", 0)]
    slots += [t.slot(text, 4) for text in operands[1:5]]
    t.emit("shfl", [*slots, SHUFFLES[mode]])


@_lowers("vote")
def _vote(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    _sync, mode, kind = qualifiers
    source = t.slot(operands[1].lstrip("!"), 0)
    target = t.slot(operands[0], WIDTHS[kind])
    negated = int(operands[1].startswith("!"))
    t.emit(f"vote.{mode}", [target, source, t.slot(operands[2], 4), negated])


@_lowers("match")
def _match(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    _sync, mode, kind = qualifiers
    target, _, all_equal = operands[0].partition("|")
    slots = [t.slot(target.strip(), 4), t.slot(all_equal.strip() or "_", 0)]
    slots += [t.slot(operands[1], WIDTHS[kind]), t.slot(operands[2], 4)]
    t.emit(f"match.{mode}.{kind}", slots)


@_lowers("redux")
def _redux(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    _sync, *operation = qualifiers
    t.emit(f"redux.{'.'.join(operation)}", [t.slot(text, 4) for text in operands])


@_lowers("elect")
def _elect(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    target, _, elected = operands[0].partition("|")
    slots = [t.slot(target.strip(), 4), t.slot(elected.strip(), 0), t.slot(operands[1], 4)]
    t.emit("elect", slots)


@_lowers("activemask")
def _activemask(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.emit("activemask", [t.slot(operands[0], 4)])


@_lowers("createpolicy")
def _createpolicy(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.emit("mov.b64", [t.slot(operands[0], 8), t.constant(0, 8)])


@_lowers("ldmatrix", "stmatrix")
def _tiles(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    name = t.statement.opcode.split(".")[0]
    if "m8n8" not in qualifiers or qualifiers[-1] != "b16":
        raise PtxError("only tiles of 8x8 16-bit elements are known")
    tiles = int(next(q[1:] for q in qualifiers if re.fullmatch(r"x\d", q)))
    address, registers = operands if name == "stmatrix" else reversed(operands)
    slots = [t.slot(text, 4) for text in _elements(registers)]
    head = [*t.address(address), tiles, int("trans" in qualifiers)]
    t.emit(name, [*head, *slots], FLAGS["aligned"])


@_lowers("mma")
def _mma(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    _sync, _aligned, shape, *layout, d, a, b, c = qualifiers
    kinds = {"f16": 2, "bf16": 2, "tf32": 1, "e4m3": 4, "e5m2": 4, "s8": 4, "u8": 4}
    registers = [text for operand in operands for text in _elements(operand)]
    if (shape, a) == ("m8n8k4", "f64"):
        t.emit("mma.f64.f64", [t.slot(text, 8) for text in registers], FLAGS["aligned"])
        return
    match = re.fullmatch(r"m16n8k(\d+)", shape)
    if match is None or a not in kinds or d != c or layout[:2] != ["row", "col"] or layout[2:]:
        raise PtxError("unknown form of mma")
    k, half = int(match[1]), int(d == "f16")
    expected = 2 * (2 if half else 4) + k * 3 // (4 * kinds[a])
    if len(registers) != expected:
        raise PtxError(f"takes {expected} registers")
    slots = [t.slot(text, 4) for text in registers]
    t.emit(f"mma.{a}.{b}", [k, half, *slots], FLAGS["aligned"])
