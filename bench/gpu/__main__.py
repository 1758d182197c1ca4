"""The command `python -m bench.gpu`: choose cases, race them on a GPU, report."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench import rows as results
from bench.cases import select
from bench.gpu import report
from bench.gpu.cases import CALLS, GROUPS
from bench.gpu.rows import KERNELS, Row
from bench.kinds import Case
from bench.rows import GPU_TABLE, MISMATCH
from bench.terminal import Console, Table, console, progress_bar, shown, what_to_run

DESCRIPTION = """\
Race fastattn's GPU kernels against eager PyTorch and SDPA by backend, and flash-attn where it is
installed: medians of interleaved rounds, replayed from CUDA graphs, beside this GPU's measured
limits. Every timed call is first checked against float64; one that does not match gets no speed,
and the exit status is 1. What cannot run says why."""

EPILOG = """\
examples:
  python -m bench.gpu                          all of it, Triton's compilation included
  python -m bench.gpu --only norm --kernels cuda
  python -m bench.gpu --csv bench/data/gpu.csv
  python -m bench.gpu --report --markdown bench/GPU.md
                                               put what bench/data/gpu.csv holds into the page"""

EMULATED = {"cuda": "emulator", "triton": "triton-emulator"}


def parser() -> argparse.ArgumentParser:
    """The options, as `python -m bench.gpu --help` shows them."""
    made = argparse.ArgumentParser(
        "python -m bench.gpu",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = what_to_run(made)
    what.add_argument(
        "--kernels",
        type=kernels,
        metavar="NAMES",
        help="which of fastattn's: cuda,triton (the default; with --emulated cuda)",
    )
    what.add_argument("--compile", action="store_true", help="race torch.compile too")
    what.add_argument(
        "--emulated",
        action="store_true",
        help="all but the times: tiny sizes, on CPU tensors, fastattn's kernels in the emulator",
    )
    where = made.add_argument_group("what to keep")
    where.add_argument(
        "--csv", type=Path, metavar="FILE", help="every number, one line per case and provider"
    )
    where.add_argument(
        "--report",
        nargs="?",
        type=Path,
        const=GPU_TABLE,
        metavar="CSV",
        help="run nothing: print what was kept as CSV (default: bench/data/gpu.csv) as Markdown",
    )
    where.add_argument(
        "--markdown",
        type=Path,
        metavar="PAGE",
        help="with --report: put it into a page that has a place for it, between "
        f"{report.MARKS[0]} and {report.MARKS[1]}",
    )
    return made


def kernels(text: str) -> list[str]:
    """Kernels by name."""
    wanted = text.lower().split(",")
    for name in wanted:
        if name not in EMULATED:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(EMULATED)}")
    return wanted


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser()
    args = options.parse_args(arguments)
    if args.csv and not args.csv.resolve().parent.is_dir():
        options.error(f"{args.csv}: there is no folder {args.csv.resolve().parent}")
    if args.markdown and not args.report:
        options.error("--markdown puts what was kept into a page: it comes with --report")
    if args.report:
        try:
            found = results.read_csv(args.report, Row)
            print(report.markdown(found))
            if args.markdown:
                report.insert(found, args.markdown)
        except (OSError, ValueError) as error:
            options.error(str(error))
        return 0
    try:
        chosen = select([case for group in GROUPS.values() for case in group], only=args.only)
    except ValueError as error:
        options.error(str(error))
    cases = [(group, case) for group, all_of in GROUPS.items() for case in all_of if case in chosen]
    if args.list:
        console().print(listing(cases))
        return 0
    import torch

    if not args.emulated and not torch.cuda.is_available():
        options.error("torch sees no CUDA device: --emulated shows that this works")
    found, finished = run(cases, args)
    console().print(report.terminal(found))
    if not finished:
        return 130
    return int(any(row.status == MISMATCH and row.provider in KERNELS for row in found))


def listing(cases: Sequence[tuple[str, Case]]) -> Table:
    """The cases by group and name."""
    table = Table("group", "name (--only matches any part of it)", box=None, pad_edge=False)
    for group, case in cases:
        table.add_row(group, case.name)
    return table


def run(cases: Sequence[tuple[str, Case]], args: argparse.Namespace) -> tuple[list[Row], bool]:
    """Race the cases on a GPU or in the emulator; False as well if the user interrupted."""
    import torch

    from bench.gpu import ahead, machine, providers
    from bench.gpu.race import in_python, on_gpu, race

    if "FASTATTN_LOG" not in os.environ:  # the report says what was refused, and why
        logging.getLogger("fastattn").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    errors = Console(stderr=True)
    wanted = args.kernels or (["cuda"] if args.emulated else ["cuda", "triton"])
    rivals = [*providers.RIVALS, *(["compile"] if args.compile else [])]
    stream = contextlib.nullcontext()
    if args.emulated:
        wanted = [EMULATED[kernel] for kernel in wanted]
        cases = list(dict.fromkeys((group, replace(case, **case.tiny)) for group, case in cases))
    else:
        stream = torch.cuda.stream(torch.cuda.Stream())  # the default one cannot be captured
    found: list[Row] = []
    bar = progress_bar(errors)

    def say(what: str, begun: float) -> None:
        if bar.disable:
            errors.print(f"{time.perf_counter() - begun:5.1f} s  {what}")

    try:
        with bar, stream:
            begun = time.perf_counter()
            if "triton" in wanted:
                task = bar.add_task("compiling Triton's kernels", total=len(cases))
                ahead.compile_all([case for _, case in cases], lambda: bar.advance(task))
                bar.remove_task(task)
                say("compiling Triton's kernels", begun)
            task = bar.add_task("measuring this GPU's limits", total=len(cases))
            here = machine.EMULATOR if args.emulated else machine.survey()
            gc.freeze()  # else each collection below would go over all that was imported
            for group, case in cases:
                bar.update(task, description=case.name)
                begun = time.perf_counter()
                names = [*wanted, *(providers.CALLED if group == CALLS else rivals)]
                if args.emulated:
                    found += race(group, case, here, names, "cpu", None)
                else:
                    clock = in_python if group == CALLS else on_gpu
                    found += race(group, case, here, names, "cuda", clock)
                    release()
                if args.csv:  # now, for the next case may be the last
                    results.write_csv(found, args.csv, Row)
                bar.advance(task)
                say(case.name, begun)
    except KeyboardInterrupt:
        errors.print("Interrupted: this is what was measured so far.")
        return found, False
    if args.csv:
        errors.print(f"Wrote {shown(args.csv)}")
    return found, True


def release() -> None:
    """Give back what a case has left in the GPU's memory, graphs included."""
    import torch

    gc.collect()
    with contextlib.suppress(RuntimeError):  # after a fault nothing works, and each case says so
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
