"""What a launch found and counted, for people and for programs."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastattn.emulator.abi import Site
from fastattn.emulator.ptx import Location, Statement

SPACES = {1: "global", 2: "shared", 3: "local", 4: "const"}


@dataclass(frozen=True)
class Place:
    """An instruction: its line in the PTX, its text, and the source line it was compiled from."""

    line: int
    text: str
    source: Location | None

    @classmethod
    def of(cls, statement: Statement) -> Place:
        """The place of a statement."""
        text = f"{statement.opcode} {', '.join(statement.operands)}".strip()
        return cls(statement.line, text, statement.source)

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        return f"PTX line {self.line}{source}: {self.text}"


@dataclass(frozen=True)
class Finding:
    """One fault: what, where, who, and against whom. `count` says how often it was seen."""

    kind: str
    detail: str
    kernel: str
    place: Place | None
    block: tuple[int, int, int] | None
    thread: tuple[int, int, int] | None
    address: str | None
    other_place: Place | None = None
    other_block: tuple[int, int, int] | None = None
    other_thread: tuple[int, int, int] | None = None
    count: int = 1
    schedule: str = ""

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.detail}" + (f" at {self.address}" if self.address else "")]
        who = f"block {self.block} thread {self.thread}" if self.block else ""
        lines.append(f"  in {self.kernel}" + (f", {who}" if who else ""))
        if self.place:
            lines.append(f"  {self.place}")
        if self.other_place:
            other = f", block {self.other_block}" if self.other_block is not None else ""
            other += f" thread {self.other_thread}" if self.other_thread is not None else ""
            lines.append(f"  against {self.other_place}{other}")
        lines.append(f"  seen {self.count} times" + (f", {self.schedule}" if self.schedule else ""))
        return "\n".join(lines)


@dataclass(frozen=True)
class SiteCount:
    """What one instruction did in all: `transfers` are wavefronts of shared memory or sectors of
    global memory, `ideal` is the fewest that could have moved the same bytes."""

    place: Place
    space: str | None
    executed: int
    lanes: int
    transfers: int
    ideal: int


def space_of(statement: Statement) -> str | None:
    """The memory that an instruction speaks of; None for none."""
    opcode = statement.opcode
    if opcode.startswith(("ldmatrix", "stmatrix")):
        return "shared"
    if opcode.startswith("cp.async"):
        return "global"
    found = re.search(r"\.(global|shared|local|const|param)\b", opcode)
    if found:
        return found[1]
    return "generic" if opcode.startswith(("ld", "st", "atom", "red")) else None


@dataclass(frozen=True)
class Counters:
    """Everything that was counted, by instruction; brought into order when first looked at."""

    statements: Sequence[Statement] = field(repr=False)
    counted: Sequence[Site] = field(repr=False)

    @functools.cached_property
    def sites(self) -> list[SiteCount]:
        """What each instruction did, in the order of the program."""
        return [
            SiteCount(
                Place.of(statement),
                space_of(statement),
                site.executed,
                site.lanes,
                site.transfers,
                site.ideal,
            )
            for statement, site in zip(self.statements, self.counted, strict=True)
        ]

    def mix(self) -> Counter[str]:
        """How many instructions of each opcode warps have executed."""
        mix: Counter[str] = Counter()
        for site in self.sites:
            mix[site.place.text.split(" ")[0]] += site.executed
        return mix

    def _ratio(self, space: str) -> float:
        transfers = sum(s.transfers for s in self.sites if s.space == space)
        ideal = sum(s.ideal for s in self.sites if s.space == space)
        return transfers / ideal if ideal else 1.0

    @property
    def bank_conflicts(self) -> float:
        """Wavefronts of shared memory over the fewest possible: 1.0 is without conflicts."""
        return self._ratio("shared")

    @property
    def sector_efficiency(self) -> float:
        """The part of the bytes moved from and to global memory that was asked for: at most 1."""
        return 1 / self._ratio("global")

    def worst(self, space: str, top: int = 5) -> list[SiteCount]:
        """The instructions with the most transfers above the ideal."""
        wasteful = [s for s in self.sites if s.space == space and s.transfers > s.ideal]
        return sorted(wasteful, key=lambda s: s.ideal - s.transfers)[:top]

    def __str__(self) -> str:
        lines = [
            f"instructions of warps: {sum(s.executed for s in self.sites)}",
            f"shared memory: {self.bank_conflicts:.2f} x the ideal wavefronts",
            f"global memory: {self.sector_efficiency:.0%} of the bytes moved were asked for",
        ]
        for space, unit in (("shared", "wavefronts"), ("global", "sectors")):
            lines += [
                f"  {site.place}: {site.transfers} {unit}, ideal {site.ideal}"
                for site in self.worst(space)
            ]
        lines += [f"  {count:>10} {name}" for name, count in self.mix().most_common(12)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """The outcome of one launch or of a check."""

    kernel: str
    findings: list[Finding]
    counters: Counters

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        if self.ok:
            return f"{self.kernel}: nothing found"
        # Unrolling makes many instructions of one source line: the first stands for all.
        alike: dict[object, list[Finding]] = {}
        for finding in self.findings:
            sources = [p and (p.source or p.line) for p in (finding.place, finding.other_place)]
            alike.setdefault((finding.kind, *sources), []).append(finding)
        texts = []
        for first, *more in alike.values():
            others = f"\n  and at {len(more)} more PTX lines" if more else ""
            texts.append(str(first) + others)
        return "\n".join(texts)

    def require(self) -> Report:
        """The report itself. Raises EmulatorError with the findings where there are any."""
        if self.findings:
            raise EmulatorError(str(self))
        return self


class EmulatorError(RuntimeError):
    """A kernel with faults; the message lists them."""
