"""Turns a PTX function into the program that the runtime executes.

Every register becomes a slot in the register file of a warp, and so does every constant and special
register, so that operations know one kind of operand only. Whatever the tables do not know is
refused with its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from fastattn.emulator import abi
from fastattn.emulator.opcodes import (
    CACHE,
    CLOCKS,
    COMPARISONS,
    FLAGS,
    FORMS,
    HINTS,
    LOCAL_WINDOW,
    ROUNDINGS,
    SCOPES,
    SHARED_WINDOW,
    SHUFFLES,
    SPACES,
    SPECIAL_REGISTERS,
)
from fastattn.emulator.ptx import (
    WIDTHS,
    Function,
    PtxError,
    PtxModule,
    Statement,
    Variable,
    number,
    split_operands,
)

LANES = 32


@dataclass
class Program:
    """A translated function. `statements[i]` is what instruction i was made of."""

    function: Function
    instructions: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    operands: list[int] = field(default_factory=list)
    initials: list[tuple[int, int, int, int]] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    file_bytes: int = 0
    local_bytes: int = 0
    static_shared: int = 0

    def __post_init__(self) -> None:
        self._native: abi.Program | None = None

    @property
    def native(self) -> abi.Program:
        """The same as the runtime reads it."""
        if self._native is None:
            instructions = (abi.Instruction * len(self.instructions))(*self.instructions)
            operands = (abi.c_int32 * max(1, len(self.operands)))(*self.operands)
            initials = (abi.Initial * max(1, len(self.initials)))(
                *((slot, width, special, 0, value) for slot, width, special, value in self.initials)
            )
            self._native = abi.Program(
                instructions,
                operands,
                initials,
                len(self.instructions),
                len(self.initials),
                self.file_bytes,
                self.local_bytes,
                self.static_shared,
            )
        return self._native


def translate(module: PtxModule, name: str, addresses: dict[str, int]) -> Program:
    """The program of entry `name`.

    `addresses` holds where its parameters and the module's .global and .const variables lie.
    Raises PtxError that names every kind of instruction which the emulator lacks.
    """
    return _Translation(module, module.functions[name], addresses).run()


class _Translation:
    def __init__(self, module: PtxModule, function: Function, addresses: dict[str, int]):
        self.program = Program(function)
        self.function = function
        self.slots: dict[object, int] = {}
        self.jumps: list[tuple[int, str]] = []  # operands to fill with the index of a label
        self.symbols = dict(addresses)
        self._place_variables(module)

    def _place_variables(self, module: PtxModule) -> None:
        """Lays out shared memory, the dynamic part last, and local memory."""
        declared = [*module.variables.values(), *self.function.variables]
        used = {word for s in self.function.statements for o in s.operands for word in _words(o)}
        ends = {"shared": 0, "local": 0}
        dynamic: list[Variable] = []
        for variable in declared:
            if variable.space not in ends or variable.name not in used:
                continue
            if variable.space == "shared" and (variable.external or variable.bytes == 0):
                dynamic.append(variable)
                continue
            begin = -(-ends[variable.space] // variable.align) * variable.align
            self.symbols[variable.name] = begin
            ends[variable.space] = begin + variable.bytes
        align = max((v.align for v in dynamic), default=1)
        self.program.static_shared = -(-ends["shared"] // align) * align
        for variable in dynamic:
            self.symbols[variable.name] = self.program.static_shared
        self.program.local_bytes = -(-ends["local"] // 16) * 16

    def run(self) -> Program:
        statements = self.function.statements
        begins: list[int] = []
        unknown: dict[str, PtxError] = {}
        end = Statement("exit", [], None, False, statements[-1].line if statements else 0, None)
        for statement in [*statements, end]:
            begins.append(len(self.program.instructions))
            try:
                self.lower(statement)
            except (PtxError, KeyError, IndexError, ValueError) as error:
                reason = str(error) if isinstance(error, PtxError) else f"operands {error!r}"
                text = f"{statement.opcode} {', '.join(statement.operands)}"
                message = f"line {statement.line}: `{text}`: {reason}"
                unknown.setdefault(statement.opcode, PtxError(message))
        if unknown:
            raise PtxError(
                f"{self.function.name}: the emulator does not know\n  "
                + "\n  ".join(map(str, unknown.values()))
            )
        self._link(begins)
        return self.program

    def _link(self, begins: list[int]) -> None:
        """Puts instruction numbers in place of labels, and marks where jumps arrive."""
        program = self.program
        leaders = set()
        for at, label in self.jumps:
            target = begins[self.function.labels[label]]
            program.operands[at] = target
            leaders.add(target)
        names = {index: name for name, index in abi.operations().items()}
        for i, (operation, *_rest) in enumerate(program.instructions):
            if names[operation].split(".")[0] in ("bar", "shfl", "vote", "mma", "ldmatrix"):
                leaders.add(i + 1)
        program.instructions = [
            (*fields[:4], int(i in leaders)) for i, fields in enumerate(program.instructions)
        ]

    # --- slots

    def allocate(self, width: int) -> int:
        """A new slot; width 0 is a predicate."""
        size = width * LANES or 4
        begin = -(-self.program.file_bytes // min(size, 64)) * min(size, 64)
        self.program.file_bytes = begin + size
        return begin

    def constant(self, value: int, width: int) -> int:
        """A slot that holds a number; for a predicate (width 0) any but 0 is true."""
        value = (0xFFFFFFFF if value else 0) if width == 0 else value % (1 << 8 * width)
        key = ("constant", value, width)
        if key not in self.slots:
            self.slots[key] = self.allocate(width)
            self.program.initials.append((self.slots[key], width, -1, value))
        return self.slots[key]

    def kept(self, key: object, width: int) -> int:
        """The slot of a register or the like, allocated when it first comes."""
        if key not in self.slots:
            self.slots[key] = self.allocate(width)
        return self.slots[key]

    def width_of(self, register: str) -> int:
        return WIDTHS[self.function.registers[register]]

    def slot(self, text: str, width: int, register_width: int | None = None) -> int:
        """The slot of an operand that is to be `width` bytes wide in its register."""
        if text == "_":  # a result that nobody wants
            return self.kept(("sink", width), width)
        if text in self.function.registers:
            found = self.width_of(text)
            if found != (width if register_width is None else register_width):
                raise PtxError(f"{text} has {8 * found} bits, and {8 * width} are expected")
            return self.kept(text, found)
        if text.startswith("%"):
            special = SPECIAL_REGISTERS.get(text[1:])
            if special is None:
                raise PtxError(f"unknown register {text}")
            key = ("special", special, width)
            if key not in self.slots:
                self.kept(key, width)
                self.program.initials.append((self.slots[key], width, special, 0))
            return self.slots[key]
        value = LANES if text == "WARP_SZ" else number(text)
        if value is None:
            value = self.symbol(text)
        return self.constant(value, width)

    def symbol(self, text: str) -> int:
        match = re.fullmatch(r"([\w$.@]+)(?:\s*\+\s*(-?\w+))?", text)
        if match is None or match[1] not in self.symbols:
            raise PtxError(f"unknown symbol {text}")
        return self.symbols[match[1]] + (int(match[2], 0) if match[2] else 0)

    def any_slot(self, text: str, width: int) -> tuple[int, int]:
        """A slot and its bytes a lane, for operands whose register may be wider than their type."""
        if text in self.function.registers:
            width = self.width_of(text)
        return self.slot(text, width), width

    def address(self, text: str) -> list[int]:
        """The three operands of an address: a slot, its bytes a lane, an offset."""
        match = re.fullmatch(r"\[\s*([%\w$.@]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if match is None:
            raise PtxError(f"cannot read the address {text}")
        base, offset = match[1], int(match[2], 0) if match[2] else 0
        if base in self.function.registers:
            return [self.slot(base, self.width_of(base)), self.width_of(base), offset]
        value = number(base)
        return [self.constant(self.symbol(base) if value is None else value, 8), 8, offset]

    # --- instructions

    def emit(self, name: str, operands: list[int], flags: int = 0) -> None:
        """Adds an instruction; raises PtxError where the runtime lacks the operation."""
        operation = abi.operations().get(name)
        if operation is None:
            raise PtxError(f"there is no operation {name}")
        statement = self.statement
        guard = -1
        if statement.guard:
            guard = self.slot(statement.guard, 0)
            flags |= FLAGS["negated"] * statement.negated
        program = self.program
        program.instructions.append((operation, flags, guard, len(program.operands), 0))
        program.operands += operands
        program.statements.append(statement)

    def lower(self, statement: Statement) -> None:
        self.statement = statement
        base, *qualifiers = statement.opcode.split(".")
        special = _SPECIAL.get(base)
        if special is not None:
            special(self, qualifiers, statement.operands)
        elif base in HINTS:
            self.emit("nothing", [])
        else:
            self.lower_regular(base, qualifiers, statement.operands)

    def lower_regular(self, base: str, qualifiers: list[str], operands: list[str]) -> None:
        """An instruction that the table of forms describes."""
        if not qualifiers or qualifiers[-1] not in WIDTHS:
            raise PtxError("unknown instruction")
        *qualifiers, kind = qualifiers
        if base == "mad" and kind.startswith("f"):
            base = "fma"
        row = FORMS.get(f"{base}.{qualifiers[0]}" if qualifiers else base) or FORMS.get(base)
        if base in ("min", "max") and len(operands) == 4:
            qualifiers.append("3")
            row = FORMS[f"{base}.3"]
        if row is None:
            raise PtxError("unknown instruction")
        flags = sum(FLAGS[q] for q in qualifiers if q in row.flags)
        rest = [q for q in qualifiers if q not in row.flags and q not in row.ignored]
        if len(operands) != len(row.shape):
            raise PtxError(f"takes {len(row.shape)} operands")
        width = WIDTHS[kind]
        name_kind = f"b{8 * width}" if row.by_width and kind != "pred" else kind
        widths = {"t": width, "w": 2 * width, "i": 4, "p": 0}
        self.emit(
            ".".join([base, *rest, name_kind]),
            [
                number(text) if letter == "#" else self.slot(text, widths[letter])
                for letter, text in zip(row.shape, operands, strict=True)
            ],
            flags,
        )


def _words(text: str) -> list[str]:
    return re.findall(r"[%\w$.@]+", text)


def _elements(text: str) -> list[str]:
    """The registers of a vector operand, or the single one."""
    return split_operands(text[1:-1]) if text.startswith("{") else [text]


# --- the irregular instructions, each with its own way to read operands

_SPECIAL: dict[str, Callable[[_Translation, list[str], list[str]], None]] = {}


def _lowers(*names: str) -> Callable:
    def register(function: Callable) -> Callable:
        for name in names:
            _SPECIAL[name] = function
        return function

    return register


@_lowers("mov")
def _mov(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
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
def _setp(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
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
def _cvt(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
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
def _cvta(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
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
def _isspacep(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
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
def _ld(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    memory = _memory(qualifiers)
    (kind,) = memory.rest
    width = WIDTHS[kind]
    parts = [t.any_slot(text, width) for text in _elements(operands[0])]
    head = [*t.address(operands[1]), memory.space, width, memory.vector, int(kind[0] == "s")]
    t.emit("ld", [*head, *(x for part in parts for x in part)], memory.flags)


@_lowers("st")
def _st(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    memory = _memory(qualifiers)
    (kind,) = memory.rest
    width = WIDTHS[kind]
    parts = [t.any_slot(text, width) for text in _elements(operands[1])]
    head = [*t.address(operands[0]), memory.space, width, memory.vector]
    t.emit("st", [*head, *(x for part in parts for x in part)], memory.flags)


@_lowers("atom", "red")
def _atom(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
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
def _cp(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
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
def _fence(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    flags = 0 if "cta" in qualifiers else FLAGS["gpu"]
    if qualifiers[0] in ("proxy", "mbarrier_init"):
        flags |= FLAGS["async_proxy"]
    t.emit("fence", [], flags)


@_lowers("bra")
def _bra(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.jumps.append((len(t.program.operands), operands[0]))
    t.emit("bra", [0])


@_lowers("brx")
def _brx(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    targets = t.function.tables[operands[1]]
    begin = len(t.program.operands) + 1
    t.jumps.extend((begin + i, target) for i, target in enumerate(targets))
    t.emit("brx.idx", [t.slot(operands[0], 4), *(0 for _ in targets)])


@_lowers("ret", "exit")
def _exit(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.emit("exit", [])


@_lowers("trap")
def _trap(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.emit("trap", [])


@_lowers("nanosleep")
def _nanosleep(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.emit("yield", [])


@_lowers("bar", "barrier")
def _bar(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
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
def _shfl(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    _sync, mode, _kind = qualifiers
    target, _, inside = operands[0].partition("|")
    slots = [t.slot(target.strip(), 4), t.slot(inside.strip() or "_", 0)]
    slots += [t.slot(text, 4) for text in operands[1:5]]
    t.emit("shfl", [*slots, SHUFFLES[mode]])


@_lowers("vote")
def _vote(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    _sync, mode, kind = qualifiers
    source = t.slot(operands[1].lstrip("!"), 0)
    target = t.slot(operands[0], WIDTHS[kind])
    negated = int(operands[1].startswith("!"))
    t.emit(f"vote.{mode}", [target, source, t.slot(operands[2], 4), negated])


@_lowers("match")
def _match(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    _sync, mode, kind = qualifiers
    target, _, all_equal = operands[0].partition("|")
    slots = [t.slot(target.strip(), 4), t.slot(all_equal.strip() or "_", 0)]
    slots += [t.slot(operands[1], WIDTHS[kind]), t.slot(operands[2], 4)]
    t.emit(f"match.{mode}.{kind}", slots)


@_lowers("redux")
def _redux(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    _sync, *operation = qualifiers
    t.emit(f"redux.{'.'.join(operation)}", [t.slot(text, 4) for text in operands])


@_lowers("elect")
def _elect(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    target, _, elected = operands[0].partition("|")
    slots = [t.slot(target.strip(), 4), t.slot(elected.strip(), 0), t.slot(operands[1], 4)]
    t.emit("elect", slots)


@_lowers("activemask")
def _activemask(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.emit("activemask", [t.slot(operands[0], 4)])


@_lowers("createpolicy")
def _createpolicy(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    t.emit("mov.b64", [t.slot(operands[0], 8), t.constant(0, 8)])


@_lowers("ldmatrix", "stmatrix")
def _tiles(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
    name = t.statement.opcode.split(".")[0]
    if "m8n8" not in qualifiers or qualifiers[-1] != "b16":
        raise PtxError("only tiles of 8x8 16-bit elements are known")
    tiles = int(next(q[1:] for q in qualifiers if re.fullmatch(r"x\d", q)))
    address, registers = operands if name == "stmatrix" else reversed(operands)
    slots = [t.slot(text, 4) for text in _elements(registers)]
    head = [*t.address(address), tiles, int("trans" in qualifiers)]
    t.emit(name, [*head, *slots], FLAGS["aligned"])


@_lowers("mma")
def _mma(t: _Translation, qualifiers: list[str], operands: list[str]) -> None:
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
