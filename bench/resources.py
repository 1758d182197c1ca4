"""What every GPU kernel takes of a GPU: `python -m bench.resources` compiles them and says so.

With --write the table goes to csrc/cuda/resources.csv, against which tests/test_resources.py holds
the kernels; where rooms are named, their rows alone are measured and replaced. The input is the PTX
in the library, so this is the code that a driver would make; and, under names that begin with
triton_, what Triton makes of the calls of bench/triton_calls.py.
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import programs, roofline, triton_calls
from fastattn import _library

TABLE = Path(__file__).parents[1] / "csrc/cuda/resources.csv"
ROOMS = (
    "attention",
    "attention_backward",
    "attention_backward_sm90",
    "attention_bias",
    "attention_bias_sm90",
    "attention_decode",
    "attention_sm90",
    "ffn",
    "ffn_sm90",
    "norm",
)
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
RELEASE = "13.0.88"  # of the nvcc and the ptxas that the table is made with
TRITON_ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
REGISTERS, GRANULE = 65536, 8  # of a multiprocessor, and what a thread's are rounded up to


class Resources(NamedTuple):
    """One kernel on one architecture.

    `code` is a checksum of its PTX, which says whether the row is of today's kernel. `shared` is
    the memory that it names itself, without what a launch adds; all of it in Triton. `warps` of a
    multiprocessor are what registers allow. `products` are the tensor instructions of its main loop
    and `tensor_bound` is the part of the time, in percent, that tensor cores can be busy there at
    most: see bench/roofline.py. None without such a loop, the products also in Triton, the bound
    also where the rate of tensor cores is not published.
    """

    kernel: str
    architecture: str
    code: str
    threads: int
    registers: int
    spilled: int
    shared: int
    warps: int
    products: int | None = None
    tensor_bound: int | None = None


def architectures(room: str) -> tuple[str, ...]:
    """Those that a room's kernels are for; what is of sm_90a is for no other."""
    return ("sm_90a",) if room.endswith("_sm90") else ARCHITECTURES


@functools.cache
def codes(room: str) -> dict[str, str]:
    """The kernels of a room, each with a checksum of its PTX.

    That does not depend on lines and paths of the source, nor on the kernels around it.
    """
    text = re.sub(r"\s*(//|\.loc\t).*", "", _library.ptx(room))
    text = re.sub(r"_[0-9a-f]{8}_(\d+_cuda\w*?_cu_)[0-9a-f]{8}|(BB)\d+", r"\1\2", text)
    kernels = re.findall(r"\.entry (\w+)(\([\s\S]*?\n}\n)", text)
    return {name: f"{zlib.crc32(body.encode()):08x}" for name, body in kernels}


def why_not() -> str:
    """Why the CUDA kernels cannot be measured here as the table was; "" where they can."""
    if _library.WHY_NO_CUDA:
        return _library.WHY_NO_CUDA
    for name in ("ptxas", "nvdisasm"):
        if programs.find(name) is None:
            return f"there is no {name}: `pip install nvidia-cuda-nvcc triton` brings one"
    version = subprocess.run([programs.find("ptxas"), "--version"], capture_output=True, text=True)
    for name, text in (("ptxas", version.stdout), ("nvcc", _library.ptx("norm"))):
        found = re.search(r"release [\d.]+, V([\d.]+)", text)[1]
        if found != RELEASE:
            return f"the table is of CUDA {RELEASE}, and {name} is of {found}"
    return ""


def measured(room: str, architecture: str) -> Iterator[Resources]:
    """What ptxas and nvdisasm say of a room's kernels, where `why_not` finds no fault."""
    text, checksums = _library.ptx(room), codes(room)
    threads = dict(re.findall(r"\.entry (\w+)\([^{]*?\.maxntid (\d+)", text))
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, f"{room}.ptx"), Path(folder, f"{room}.cubin")
        source.write_text(text)
        # On all cores: as many kernels at a time.
        command = [programs.find("ptxas"), "-v", "--split-compile=0", f"-arch={architecture}"]
        run = subprocess.run([*command, source, "-o", cubin], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(run.stderr)
        loops = roofline.main_loops(cubin)
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    for name, stores, loads, registers, rest in re.findall(pattern, run.stderr, re.S):
        shared = re.search(r"(\d+) bytes smem", rest)
        row = _resources(
            name,
            architecture,
            checksums[name],
            int(threads[name]),
            int(registers),
            int(stores) + int(loads),
            int(shared[1]) if shared else 0,
        )
        if loop := loops.get(name):
            products = roofline.tensor_instructions(loop.elements())
            row = row._replace(products=products, tensor_bound=_bound(loop, architecture))
        yield row


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
        row = _resources(name, architecture, "", threads, registers, spilled, memory)
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(kernel.asm["cubin"])
            if loop := roofline.main_loops(cubin).get(kernel.name):
                row = row._replace(tensor_bound=_bound(loop, architecture))
        found[name] = max(row, found.get(name, row), key=lambda row: (row.spilled, row.registers))
    yield from found.values()


def _resources(
    kernel: str,
    architecture: str,
    code: str,
    threads: int,
    registers: int,
    spilled: int,
    shared: int,
) -> Resources:
    blocks = REGISTERS // (-(-registers // GRANULE) * GRANULE * threads)
    warps = min(64, blocks * threads // 32)
    return Resources(kernel, architecture, code, threads, registers, spilled, shared, warps)


def _bound(loop: Counter[str], architecture: str) -> int | None:
    known = architecture in roofline.TENSOR
    return roofline.roof(loop, architecture).percent if known else None


def read() -> list[Resources]:
    """The committed table."""
    with TABLE.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [Resources(*row[:3], *(int(each) if each else None for each in row[3:])) for row in rows]


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
    if chosen != {"triton"} and (reason := why_not()):
        parser.error(reason)
    rows = [
        row
        for room in ROOMS
        if room in chosen
        for arch in architectures(room)
        for row in measured(room, arch)
    ]
    if "triton" in chosen:
        for call in triton_calls.CALLS:
            for arch in TRITON_ARCHITECTURES:
                rows += measured_in_triton(call, arch)
    if options.write:
        others = {name for room in ROOMS if room not in chosen for name in codes(room)}
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
