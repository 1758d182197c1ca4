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


@_lowers("mapa")
def _mapa(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    width = WIDTHS[qualifiers[-1]]
    base = t.address(f"[{operands[1]}]")
    t.emit("mapa", [t.slot(operands[0], width), width, *base, t.slot(operands[2], 4)])


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
    if qualifiers[1] == "bulk":
        _bulk(t, qualifiers[2:], operands)
        return
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
        case "mbarrier":
            counted = int("noinc" in qualifiers)
            t.emit("cp.async.mbarrier.arrive", [*t.address(operands[0]), counted])
        case _:
            raise PtxError("unknown asynchronous copy")


def _bulk(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    """Copies by the copy engine; a cache policy at the end is dropped."""
    kind = qualifiers[0].split("::")[0]
    if kind in ("commit_group", "wait_group"):
        t.emit(f"bulk.{kind}", [number(operands[0])] if operands else [])
        return
    if kind == "prefetch":
        t.emit("nothing", [])
        return
    tensor = kind == "tensor"
    spaces = [q.split("::")[0] for q in qualifiers if q.split("::")[0] in ("shared", "global")]
    known = {"tile", "bulk_group", "mbarrier::complete_tx::bytes", "L2::cache_hint", "tensor"}
    known |= {"multicast::cluster"}
    words = {q for q in qualifiers if q.split("::")[0] not in ("shared", "global")} - known
    if any(not re.fullmatch(r"[1-5]d", word) for word in words):
        raise PtxError("unknown asynchronous copy")
    loading = spaces[0] == "shared"
    shared, other = operands[:2] if loading else operands[1::-1]
    at = 2 if tensor else 3
    mbarrier = t.address(operands[at]) if loading else t.address("[0]")
    blocks = t.slot(operands[at + 1], 2) if "multicast::cluster" in qualifiers else -1
    if tensor:
        base, corner = split_operands(other[1:-1])
        tail = [t.slot(text, 4) for text in _elements(corner)]
        where = t.address(f"[{base}]")
        tail = [len(tail), *tail]
    else:
        where, tail = t.address(other), [t.slot(operands[2], 4)]
    name = f"bulk.{'tensor.' * tensor}{'load' if loading else 'store'}"
    t.emit(name, [*t.address(shared), *where, *mbarrier, blocks, *tail])


# Where the fields of a tensor map lie, and from one index to the next (csrc/emulator/bulk.cpp).
MAP_FIELDS = {
    **{"global_address": (0, 0), "rank": (8, 0), "box_dim": (12, 4), "global_dim": (32, 4)},
    **{"global_stride": (56, 8), "element_stride": (88, 4), "elemtype": (108, 0)},
    **{"interleave_layout": (112, 0), "swizzle_mode": (116, 0), "fill_mode": (120, 0)},
}


@_lowers("tensormap")
def _tensormap(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    if qualifiers[0] == "cp_fenceproxy":
        where = [*t.address(operands[0]), *t.address(operands[1])]
        t.emit("tensormap.publish", where, FLAGS["aligned"])
        return
    if qualifiers[:2] != ["replace", "tile"]:
        raise PtxError("unknown instruction")
    begin, step = MAP_FIELDS[qualifiers[2]]
    base, width, offset = t.address(operands[0])
    offset += begin + step * (number(operands[1]) if len(operands) == 3 else 0)
    space, bytes_ = SPACES[qualifiers[3].split("::")[0]], WIDTHS[qualifiers[-1]]
    value = t.slot(operands[-1], bytes_)
    t.emit("st", [base, width, offset, space, bytes_, 1, value, bytes_])


@_lowers("mbarrier")
def _mbarrier(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    one, nothing = t.constant(1, 4), t.constant(0, 4)
    match qualifiers[0]:
        case "init":
            t.emit("mbarrier.init", [*t.address(operands[0]), t.slot(operands[1], 4)])
        case "inval":
            t.emit("mbarrier.inval", t.address(operands[0]))
        case "expect_tx":
            t.emit("mbarrier.expect_tx", [*t.address(operands[0]), t.slot(operands[1], 4)])
        case "arrive":
            state, where = t.slot(operands[0], 8), t.address(operands[1])
            amount = t.slot(operands[2], 4) if len(operands) > 2 else one
            amounts = [one, amount] if "expect_tx" in qualifiers else [amount, nothing]
            t.emit("mbarrier.arrive", [state, *where, *amounts])
        case "try_wait" | "test_wait":
            parity = int("parity" in qualifiers)
            value = t.slot(operands[2], 4 if parity else 8)
            t.emit(
                "mbarrier.wait", [t.slot(operands[0], 0), *t.address(operands[1]), value, parity]
            )
        case _:
            raise PtxError("unknown instruction")


@_lowers("wgmma")
def _wgmma(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    aligned = FLAGS["aligned"]
    if qualifiers[0] in ("fence", "commit_group", "wait_group"):
        t.emit(f"wgmma.{qualifiers[0]}", [number(text) for text in operands], aligned)
        return
    _mma_async, _sync, _aligned, shape, d, a, b = qualifiers
    match = re.fullmatch(r"m64n(\d+)k16", shape)
    if match is None or d != "f32" or a != b:
        raise PtxError("unknown form of wgmma")
    results, left, right, adding, *numbers = operands
    registers = left.startswith("{")
    signs, transposed = numbers[:2], [number(text) for text in numbers[2:]]
    transposed = [0] * (2 - len(transposed)) + transposed
    n = int(match[1])
    slots = [t.slot(text, 4) for text in _elements(results)]
    if len(slots) != n // 2:
        raise PtxError(f"takes {n // 2} registers")
    slots += [t.slot(text, 4 if registers else 8) for text in _elements(left)]
    head = [n, int(registers), *transposed, *map(number, signs), t.slot(adding, 0)]
    t.emit(f"wgmma.{a}", [*head, *slots, t.slot(right, 8)], aligned)


@_lowers("fence", "membar")
def _fence(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    flags = 0 if "cta" in qualifiers else FLAGS["gpu"]
    if qualifiers[0] == "proxy" and qualifiers[1].split("::")[0] == "async":
        flags |= FLAGS["async_proxy"]
    t.emit("fence", [], flags)


@_lowers("bra")
def _bra(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.jumps.append((len(t.program.operands), operands[0]))
    t.emit("bra", [0])


@_lowers("brx")
def _brx(t: Translation, qualifiers: list[str], operands: list[str]) -> None:
    targets = t.function.tables[operands[1]]
    begin = len(t.program.operands) + 2
    t.jumps.extend((begin + i, target) for i, target in enumerate(targets))
    t.emit("brx.idx", [t.slot(operands[0], 4), len(targets), *(0 for _ in targets)])


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
    if kinds[0] == "cluster":
        flags = FLAGS["aligned"] if "aligned" in qualifiers else 0
        ordered = int("relaxed" not in kinds)
        t.emit(f"barrier.cluster.{kinds[1]}", [ordered], flags)
        return
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
