"""What translation stands on: slots for operands, and the instructions that a table describes.

Every register becomes a slot in the register file of a warp, and so does every constant and special
register, so that operations know one kind of operand only.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from fastattn.emulator import abi
from fastattn.emulator.opcodes import FLAGS, FORMS, HINTS, SPECIAL_REGISTERS
from fastattn.emulator.ptx import (
    WIDTHS,
    Function,
    PtxError,
    PtxModule,
    Statement,
    Variable,
    number,
)

LANES = 32

# Lowers one instruction, given its qualifiers and operands.
Lowering = Callable[["Translation", list[str], list[str]], None]


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


class Translation:
    """The work on one function, with what the lowering of an instruction needs."""

    def __init__(
        self,
        module: PtxModule,
        function: Function,
        addresses: dict[str, int],
        irregular: dict[str, Lowering],
    ):
        self.irregular = irregular
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
        irregular = self.irregular.get(base)
        if irregular is not None:
            irregular(self, qualifiers, statement.operands)
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
