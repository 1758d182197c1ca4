"""`python -m fastattn.emulator check kernel.ptx …`: runs a kernel under every check."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

import torch

from fastattn.emulator import PtxError, load

DTYPES = {
    **{"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64},
    **{"i8": torch.int8, "u8": torch.uint8, "i16": torch.int16, "i32": torch.int32},
    "i64": torch.int64,
}

ARGUMENTS = """\
ARG stands for a parameter of the kernel, in order:
  f32[64,128]=normal   an array of that dtype and shape with normal values (the default)
  bf16[64]=0           an array full of one number
  i32[64]=range        0, 1, 2, …
  128, 1e-5, null      a number, a float, a null pointer
dtypes: """ + " ".join(DTYPES)


def argument(text: str) -> Any:
    """The value that an argument of the command line stands for."""
    if text == "null":
        return None
    array = re.fullmatch(r"(\w+)\[([\d,]*)\](?:=(.+))?", text)
    if array is None:
        return int(text, 0) if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text) else float(text)
    dtype = DTYPES.get(array[1])
    if dtype is None:
        raise ValueError(f"{text!r} has the dtype {array[1]}, and there are {' '.join(DTYPES)}")
    shape = [int(n) for n in array[2].split(",") if n]
    fill = array[3] or ("normal" if dtype.is_floating_point else "range")
    if fill == "normal":
        return torch.randn(shape).to(dtype)
    if fill == "range":
        return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    return torch.full(shape, float(fill) if dtype.is_floating_point else int(fill), dtype=dtype)


def size(text: str) -> list[int]:
    """One to three numbers with commas between them."""
    return [int(n) for n in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns 0 for sound kernels, 1 for faults, 2 for what cannot be run."""
    parser = argparse.ArgumentParser(
        prog="python -m fastattn.emulator",
        description="Runs PTX on the CPU, with the checks that hardware lacks.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the kernels of a file and what they take")
    listing.add_argument("ptx")
    check = commands.add_parser(
        "check",
        help="run a kernel under every schedule and check",
        epilog=ARGUMENTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("ptx")
    check.add_argument("--kernel", default="", help="its name, or a part that no other has")
    check.add_argument("--grid", type=size, required=True, help="blocks: x or x,y or x,y,z")
    check.add_argument("--block", type=size, required=True, help="threads of a block, likewise")
    check.add_argument("--cluster", type=size, help="blocks of a cluster, likewise")
    check.add_argument("--shared", type=int, default=0, help="bytes of dynamic shared memory")
    check.add_argument("--counters", action="store_true", help="print what was counted, too")
    check.add_argument("--args", nargs="*", default=[], metavar="ARG", help="see below")
    options = parser.parse_args(arguments)
    try:
        module = load(options.ptx)
        if options.command == "list":
            for name in module.kernels:
                kernel = module[name]
                print(name, *(parameter.type for parameter in kernel.function.params))
                print(f"  {len(kernel.program.instructions)} instructions")
            return 0
        torch.manual_seed(0)
        values = [argument(text) for text in options.args]
        report = module[options.kernel].check(
            options.grid, options.block, *values, shared=options.shared, cluster=options.cluster
        )
    except (OSError, PtxError, TypeError, ValueError, KeyError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(report)
    if options.counters:
        print(report.counters)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
