"""Reads PTX text into plain objects: variables, functions, statements, and where each stands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

WIDTHS = {
    **{f"{kind}{bits}": bits // 8 for kind in "bsu" for bits in (8, 16, 32, 64)},
    **{"b128": 16, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "pred": 0},
    **{"f16x2": 4, "bf16x2": 4, "f32x2": 8},
}


class PtxError(ValueError):
    """PTX that the emulator cannot run; the message names the line and the reason."""


@dataclass(frozen=True)
class Location:
    """A line of source code, from `.loc` (`nvcc -lineinfo`)."""

    file: str
    line: int
    inlined_at: Location | None = None

    def __str__(self) -> str:
        outer = f", inlined at {self.inlined_at}" if self.inlined_at else ""
        return f"{self.file}:{self.line}{outer}"


@dataclass
class Statement:
    """One instruction: `@guard opcode operands`, as text."""

    opcode: str
    operands: list[str]
    guard: str | None
    negated: bool
    line: int
    source: Location | None


@dataclass
class Variable:
    """A `.shared`, `.global`, `.const`, `.local` or `.param` declaration."""

    name: str
    space: str
    type: str
    bytes: int
    align: int
    values: bytes | None = None
    external: bool = False


@dataclass
class Function:
    """An `.entry`: its parameters, registers, variables and statements. Labels are indices."""

    name: str
    params: list[Variable] = field(default_factory=list)
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    directives: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class PtxModule:
    """All of a PTX file."""

    target: str
    variables: dict[str, Variable]
    functions: dict[str, Function]


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_LABEL = re.compile(r"([$%\w]+)\s*:(?!:)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_VARIABLE = re.compile(
    r"(?P<external>\.extern\s+)?(?:\.visible\s+|\.weak\s+|\.common\s+)*"
    r"\.(?P<space>shared|global|const|local|param)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?(?:\.attribute\([^)]*\)\s*)?(?:\.v(?P<vector>\d)\s+)?"
    r"\.(?P<type>\w+)\s+(?:\.ptr\s+(?:\.(?:global|shared|const|local)\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(?P<name>[\w$.]+)\s*(?P<dims>(?:\[\s*\w*\s*\]\s*)*)(?:=\s*(?P<values>.*))?$",
    re.S,
)


def split_operands(text: str) -> list[str]:
    """Splits at the commas that stand outside of brackets."""
    parts, depth, begin = [], 0, 0
    for i, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[begin:i].strip())
            begin = i + 1
    parts.append(text[begin:].strip())
    return [part for part in parts if part]


def number(text: str) -> int | None:
    """The bits of a PTX constant, None where the text is none."""
    text = text.strip()
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
        return int(match[1] or match[2], 16)
    if match := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        digits = match[2]
        octal = re.fullmatch(r"0[0-7]+", digits)
        return int(match[1] + digits, 8 if octal else 0)
    return None


def _variable(text: str, line: int) -> Variable:
    match = _VARIABLE.match(text.strip())
    if match is None:
        raise PtxError(f"line {line}: cannot read the declaration {text.strip()!r}")
    width = WIDTHS[match["type"]] * int(match["vector"] or 1)
    count = 1
    for dim in re.findall(r"\[\s*(\w*)\s*\]", match["dims"] or ""):
        count *= int(dim, 0) if dim else 0
    values = None
    if match["values"]:
        values = b""
        for item in split_operands(match["values"].strip().strip("{}")):
            value = number(item)
            if value is None:
                raise PtxError(f"line {line}: {item!r} as an initial value is not supported")
            values += (value % (1 << 8 * width)).to_bytes(width, "little")
    return Variable(
        match["name"],
        match["space"],
        match["type"],
        width * count,
        int(match["align"] or width or 1),
        values,
        bool(match["external"]),
    )


class _Reader:
    """Cuts the text at `;`, `{` and `}` and keeps count of lines."""

    def __init__(self, text: str):
        self.text = _COMMENT.sub(lambda m: "\n" * m[0].count("\n"), text)
        self.position = 0
        self.line = 1

    def skip_blank(self) -> None:
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.line += self.text[self.position] == "\n"
            self.position += 1

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Consumes what the pattern matches here."""
        self.skip_blank()
        found = pattern.match(self.text, self.position)
        if found:
            self.line += found[0].count("\n")
            self.position = found.end()
        return found


_WORD = re.compile(r"[.\w$]+")
_DIRECTIVE_LINE = re.compile(r"\.(?:version|target|address_size|pragma)\b[^\n]*")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:[^\n]*\binlined_at\s+(\d+)\s+(\d+))?[^\n]*")
_FILE_LINE = re.compile(r"\.file\b[^\n]*")
_SECTION = re.compile(r"\.section\s+[.\w]+\s*\{[^}]*\}")
_ENTRY = re.compile(
    r"(?:\.(?:visible|weak|extern)\s+)*\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{;]*)\{", re.S
)
_FUNC = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.func\b[^{;]*[;{]", re.S)
_DECLARATION = re.compile(
    r"(?:\.(?:extern|visible|weak|common)\s+)*\.(?:shared|global|const|local|param)\b[^;]*;"
)
_REG_DECLARATION = re.compile(r"\.reg\b[^;]*;")
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*([^;]*);", re.S)
_BRANCH_TABLE = re.compile(r"([$\w]+)\s*:\s*\.branchtargets\s+([^;]*);")
_PRAGMA = re.compile(r"\.pragma[^;]*;")
_BRACE = re.compile(r"[{}]")


def parse(text: str) -> PtxModule:
    """The module that PTX text describes. Raises PtxError where it cannot be read."""
    files = {number: name for number, name in _FILE.findall(text)}
    target = re.search(r"\.target\s+(\w+)", text)
    module = PtxModule(target[1] if target else "", {}, {})
    reader = _Reader(text)
    while True:
        reader.skip_blank()
        if reader.position >= len(reader.text):
            return module
        if reader.match(_DIRECTIVE_LINE) or reader.match(_FILE_LINE) or reader.match(_LOC):
            continue
        if reader.match(_SECTION):
            continue
        line = reader.line
        if entry := reader.match(_ENTRY):
            function = _entry(entry, line)
            _body(reader, function, files)
            module.functions[function.name] = function
        elif found := reader.match(_FUNC):
            if found[0].endswith("{"):
                _skip_body(reader)
        elif found := reader.match(_DECLARATION):
            variable = _variable(found[0][:-1], line)
            module.variables[variable.name] = variable
        else:
            rest = reader.text[reader.position : reader.position + 60].split("\n")[0]
            raise PtxError(f"line {line}: cannot read {rest!r}")


def _entry(match: re.Match[str], line: int) -> Function:
    function = Function(match[1])
    function.params = [_variable(text, line) for text in split_operands(match[2] or "")]
    for name, values in re.findall(r"\.(\w+)\s+([\d,\s]+)", match[3]):
        function.directives[name] = [int(value) for value in values.replace(",", " ").split()]
    return function


def _skip_body(reader: _Reader) -> None:
    depth = 1
    while depth:
        character = reader.text[reader.position]
        depth += (character == "{") - (character == "}")
        reader.line += character == "\n"
        reader.position += 1


def _body(reader: _Reader, function: Function, files: dict[str, str]) -> None:
    """Names declared in an inner block get a suffix, so that all are distinct afterwards."""
    scopes: list[dict[str, str]] = [{}]
    blocks = 0
    source: Location | None = None

    def declare(name: str) -> str:
        unique = name if len(scopes) == 1 else f"{name}@{blocks}.{len(scopes)}"
        scopes[-1][name] = unique
        return unique

    def name_of(file: str) -> str:
        return files.get(file, f"file {file}")

    def resolve(text: str) -> str:
        def rename(match: re.Match[str]) -> str:
            for scope in reversed(scopes):
                if match[0] in scope:
                    return scope[match[0]]
            return match[0]

        return re.sub(r"[%$\w]+", rename, text) if len(scopes) > 1 else text

    while True:
        if found := reader.match(_LOC):
            file, line, outer_file, outer_line = found.groups()
            outer = Location(name_of(outer_file), int(outer_line)) if outer_file else None
            source = Location(name_of(file), int(line), outer)
            continue
        line = reader.line
        if found := reader.match(_BRACE):
            if found[0] == "{":
                scopes.append({})
                blocks += 1
                # Labels may be used before they stand.
                for name in _labels_of_block(reader):
                    declare(name)
            elif len(scopes) == 1:
                return
            else:
                scopes.pop()
        elif reader.match(_PRAGMA):
            continue
        elif found := reader.match(_REG_DECLARATION):
            kind, names = _REGISTERS.match(found[0][:-1]).groups()
            for name in (n.strip() for n in names.split(",")):
                if group := re.fullmatch(r"([%\w$]+)<(\d+)>", name):
                    for i in range(int(group[2])):
                        function.registers[declare(f"{group[1]}{i}")] = kind
                else:
                    function.registers[declare(name)] = kind
        elif found := reader.match(_DECLARATION):
            variable = _variable(found[0][:-1], line)
            variable.name = declare(variable.name)
            function.variables.append(variable)
        elif found := reader.match(_BRANCH_TABLE):
            function.tables[resolve(found[1])] = [resolve(x) for x in split_operands(found[2])]
        elif found := reader.match(_LABEL):
            function.labels[resolve(found[1])] = len(function.statements)
        elif found := reader.match(_STATEMENT):
            negated, guard, opcode, operands = found.groups()
            function.statements.append(
                Statement(
                    opcode,
                    [resolve(text) for text in split_operands(operands)],
                    resolve(guard) if guard else None,
                    bool(negated),
                    line,
                    source,
                )
            )
        else:
            rest = reader.text[reader.position : reader.position + 60].split("\n")[0]
            raise PtxError(f"line {line}: cannot read {rest!r}")


def _labels_of_block(reader: _Reader) -> list[str]:
    depth, end = 1, reader.position
    while depth:
        depth += (reader.text[end] == "{") - (reader.text[end] == "}")
        end += 1
    # Vectors of operands hold no colon, so what looks like a label is one.
    return re.findall(r"(?:^|[;{}\n])\s*([$%\w]+)\s*:(?!:)", reader.text[reader.position : end])
