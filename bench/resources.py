"""What every GPU kernel takes of a GPU: `python -m bench.resources` compiles them and says so.

With --write the table goes to csrc/cuda/resources.csv, against which tests/test_resources.py holds
the kernels; where rooms are named, their rows alone are measured and replaced. The input is the PTX
in the library, so this is the code that a driver would make; and, under names that begin with
triton_, what Triton makes of the calls of bench/triton_calls.py.
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import roofline, triton_calls
from fastattn import _library

TABLE = Path(__file__).parents[1] / "csrc/cuda/resources.csv"
ROOMS = ("attention", "attention_backward", "attention_bias", "attention_decode", "ffn", "norm")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
TRITON_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
REGISTERS, GRANULE = 65536, 8  # of a multiprocessor, and what a thread's are rounded up to


class Resources(NamedTuple):
    """One kernel on one architecture.

    `shared` is the memory that it names itself, without what a launch adds; all of it in Triton.
    `warps` of a multiprocessor are what registers allow. `tensor_bound` is the part of the time, in
    percent, that tensor cores can be busy at most: see bench/roofline.py. None without tensor
    instructions and where their rate is not published.
    """

    kernel: str
    architecture: str
    threads: int
    registers: int
    spilled: int
    shared: int
    warps: int
    tensor_bound: int | None


def names(room: str) -> list[str]:
    """The kernels of a room."""
    return re.findall(r"\.entry (\w+)\(", _library.ptx(room))


def measured(room: str, architecture: str) -> Iterator[Resources]:
    """What ptxas and nvdisasm say of a room's kernels. Raises RuntimeError where one is missing."""
    if shutil.which("ptxas") is None:
        raise RuntimeError("ptxas is not on PATH: it comes with nvcc")
    text = _library.ptx(room)
    threads = dict(re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", text))
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, f"{room}.ptx"), Path(folder, f"{room}.cubin")
        source.write_text(text)
        command = ["ptxas", "-v", f"-arch={architecture}", source, "-o", cubin]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr)
        bounds = roofline.bounds(cubin, architecture)
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for name, stores, loads, registers, rest in re.findall(pattern, run.stderr, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        memory, spilled = int(shared[1]) if shared else 0, int(stores) + int(loads)
        bound = bounds[name].percent if name in bounds else None
        yield _resources(
            name, architecture, int(threads[name]), int(registers), spilled, memory, bound
        )


def measured_in_triton(call: str, architecture: str) -> Iterator[Resources]:
    """What the binaries say that Triton makes for one of the calls.

    Where a call compiles a kernel more than once, the one that takes most counts.
    """
    found: dict[str, Resources] = {}
    for kernel in triton_calls.compiled(call, int(re.sub(r"\D", "", architecture))):
        spilled, registers = triton_calls.spilled_and_registers(kernel)
        name = f"triton_{kernel.name}_{call.partition('_')[2]}"
        threads = 32 * kernel.metadata.num_warps
        memory = kernel.metadata.shared
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(kernel.asm["cubin"])
            roof = roofline.bounds(cubin, architecture).get(kernel.name)
        bound = roof and roof.percent
        row = _resources(name, architecture, threads, registers, spilled, memory, bound)
        found[name] = max(row, found.get(name, row), key=lambda row: (row.spilled, row.registers))
    yield from found.values()


def _resources(
    kernel: str,
    architecture: str,
    threads: int,
    registers: int,
    spilled: int,
    shared: int,
    tensor_bound: int | None,
) -> Resources:
    blocks = REGISTERS // (-(-registers // GRANULE) * GRANULE * threads)
    warps = min(64, blocks * threads // 32)
    return Resources(kernel, architecture, threads, registers, spilled, shared, warps, tensor_bound)


def read() -> list[Resources]:
    """The committed table."""
    with TABLE.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [Resources(*row[:2], *(int(each) if each else None for each in row[2:])) for row in rows]


def write(rows: Sequence[Resources]) -> None:
    """Commit a table."""
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Resources._fields)
        writer.writerows(sorted(rows, key=lambda row: row[:2]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    parser.add_argument("rooms", nargs="*", help=f"of {', '.join(ROOMS)} and triton; all if none")
    parser.add_argument("--write", action="store_true", help=f"to {TABLE.name}")
    options = parser.parse_args(arguments)
    everything = {*ROOMS, "triton"}
    chosen = set(options.rooms) or everything
    if unknown := chosen - everything:
        parser.error(f"rooms must be of {sorted(everything)}, got {sorted(unknown)}")
    rows = [
        row
        for room in ROOMS
        if room in chosen
        for arch in ARCHITECTURES
        for row in measured(room, arch)
    ]
    if "triton" in chosen:
        for call in triton_calls.CALLS:
            for arch in TRITON_ARCHITECTURES:
                rows += measured_in_triton(call, arch)
    if options.write:
        others = {name for room in ROOMS if room not in chosen for name in names(room)}
        left = [
            row
            for row in (read() if chosen != everything else [])
            if row.kernel in others or (row.kernel.startswith("triton_") and "triton" not in chosen)
        ]
        write(left + rows)
    for row in rows:
        print(*row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
