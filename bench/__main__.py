"""The command `python -m bench`: choose cases, race them, report."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import rows as results
from bench.cases import CASES, select
from bench.kinds import DTYPES, Case
from bench.rows import DATA, FAILED, GPU_TABLE, MISMATCH, Row
from bench.terminal import Console, Progress, Table, console, progress_bar, shown, what_to_run

LAST = Path(__file__).with_name("results") / "last.csv"

DESCRIPTION = """\
Race fastattn against eager PyTorch, PyTorch's own fused calls and torch.compile: interleaved runs,
medians and spread, beside this machine's measured limits. Every timed call is first checked
against float64; one that does not match gets no speed, and the exit status is 1."""

EPILOG = """\
examples:
  python -m bench --quick                        the main cases, two to three minutes
  python -m bench --only 'attention*/fwd*'       a pattern of names; --list shows them
  python -m bench --only rms_norm --dtype bf16   any text in a name will do
  python -m bench --threads 1,2 --csv all.csv --html all.html
  python -m bench --report all.csv --png all.png redraw what was measured before"""


def parser() -> argparse.ArgumentParser:
    """The options, as `python -m bench --help` shows them."""
    made = argparse.ArgumentParser(
        "python -m bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = what_to_run(made)
    what.add_argument("--quick", action="store_true", help="the main cases: 2 to 3 minutes")
    what.add_argument(
        "--dtype", type=dtypes, default=[], metavar="TYPES", help="run the cases in fp32,bf16,fp16"
    )
    what.add_argument(
        "--threads",
        type=counts,
        default=[],
        metavar="N[,N]",
        help="with these numbers of threads, one after the other (default: as torch has it)",
    )
    what.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="race torch.compile too, and ONNX Runtime and OpenVINO on BERT and GPT-2 where they "
        "are installed (default: yes, but not with --quick)",
    )
    what.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure peak memory, in a process for each call",
    )
    what.add_argument(
        "--seconds", type=positive, help="of timing per case (default: 4, with --quick 0.5)"
    )
    where = made.add_argument_group(
        "what to keep", "Without these, only the terminal and bench/results/last.csv are written."
    )
    for kind in ("csv", "json", "png", "html"):
        where.add_argument(f"--{kind}", type=Path, metavar="FILE", help=KEEP[kind])
    where.add_argument(
        "--report",
        nargs="*",
        type=Path,
        metavar="CSV",
        help="run nothing: print results kept as CSV (default: bench/data/*.csv) as Markdown, "
        "and write them to the files named above",
    )
    return made


KEEP = {
    "csv": "every number, one line per case and provider",
    "json": "the same as JSON",
    "png": "the picture (needs matplotlib)",
    "html": "a self-contained page with the picture and the tables",
}


def dtypes(text: str) -> list[str]:
    """Data types by their short or long names."""
    names = {**{short: name for name, short in DTYPES.items()}, **{name: name for name in DTYPES}}
    wanted = text.lower().split(",")
    for name in wanted:
        if name not in names:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(names)}")
    return [names[name] for name in wanted]


def counts(text: str) -> list[int]:
    """Numbers of threads."""
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} must be one or more positive integers: 1,2")
    return [int(part) for part in text.split(",")]


def positive(text: str) -> float:
    """A number of seconds above zero."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser()
    args = options.parse_args(arguments)
    out = console()
    files = [file for kind in KEEP if (file := getattr(args, kind))]
    for file in files:
        if not file.resolve().parent.is_dir():
            options.error(f"{file}: there is no folder {file.resolve().parent}")
    if args.report is not None:
        paths = args.report or sorted({*DATA.glob("*.csv")} - {GPU_TABLE})
        if not paths:
            options.error(f"--report: there is no CSV in {DATA}; name one")
        if files and len(paths) > 1:
            options.error(f"--report: {files[0]} can hold one CSV, not {len(paths)}; name one")
        try:
            kept = [results.read_csv(path) for path in paths]
        except (OSError, ValueError) as error:
            options.error(str(error))
        return max(redraw(found, args) for found in kept)
    try:
        cases = select(CASES, quick=args.quick, only=args.only, dtypes=args.dtype)
    except ValueError as error:
        options.error(str(error))
    if args.list:
        out.print(listing(cases))
        return 0
    found, finished = run(cases, args)
    from bench import report

    out.print(report.terminal(found, out.width))
    keep(found)
    status = write(found, args)
    if not finished:
        return 130
    return 1 if any(row.status in (MISMATCH, FAILED) for row in found) else status


def run(cases: Sequence[Case], args: argparse.Namespace) -> tuple[list[Row], bool]:
    """Race the cases at each number of threads; False as well if the user interrupted."""
    try:
        import fastattn  # noqa: F401
    except ImportError as error:
        sys.exit(
            f"python -m bench needs fastattn ({error}): pip install '.[bench]' in the source tree."
        )
    import torch

    from bench import machine, memory
    from bench.run import Settings, race

    if "FASTATTN_LOG" not in os.environ:  # the report says which calls fell back, and why
        logging.getLogger("fastattn").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    errors = Console(stderr=True)
    if args.memory and (why := memory.why_not()):
        errors.print(f"{why}.")
    compiled = not args.quick if args.compile is None else args.compile
    settings = Settings(
        seconds=args.seconds or (0.5 if args.quick else 4.0),
        compiled=compiled,
        memory=args.memory and not memory.why_not(),
    )
    threads = args.threads or [torch.get_num_threads()]
    found: list[Row] = []
    bar = progress_bar(errors)
    try:
        with bar:
            task = bar.add_task("starting", total=len(cases) * len(threads))
            if settings.memory:
                memory.prepare()
            for count in threads:
                torch.set_num_threads(count)
                bar.update(task, description="measuring this machine's limits")
                here = machine.survey(count, seconds=0.5 if args.quick else 2.0)
                for case in cases:
                    bar.update(task, description=case.name)
                    if bar.disable:
                        errors.print(f"{case.name}, threads: {count}")
                    begun = bar.tasks[task].completed
                    found += race(case, here, settings, ticker(bar, task, begun))
    except KeyboardInterrupt:
        errors.print("Interrupted: this is what was measured so far.")
        return found, False
    return found, True


def ticker(bar: Progress, task: object, begun: float) -> Callable[[float], None]:
    """Moves the bar by the fraction of one case."""
    return lambda done: bar.update(task, completed=begun + done)


def redraw(found: Sequence[Row], args: argparse.Namespace) -> int:
    """Print results as Markdown and write the files asked for; the exit status."""
    from bench import report

    print(report.markdown(found))
    return write(found, args)


def keep(found: Sequence[Row]) -> None:
    """Remember the last run, so that it can be drawn without running again."""
    if not found:
        return
    try:
        LAST.parent.mkdir(exist_ok=True)
        results.write_csv(found, LAST)
    except OSError:
        return
    print(f"\nKept in {shown(LAST)}; python -m bench --report {shown(LAST)} --html FILE draws it.")


def write(found: Sequence[Row], args: argparse.Namespace) -> int:
    """Write the files that were asked for; 1 if one could not be."""
    picture, why = None, ""
    if args.png or args.html:
        try:
            from bench import figure

            picture = figure.png(found)
        except ImportError:
            why = "the picture needs matplotlib: pip install matplotlib"
        except ValueError as error:
            why = str(error)
    if args.csv:
        results.write_csv(found, args.csv)
    if args.json:
        results.write_json(found, args.json)
    if args.png and picture:
        args.png.write_bytes(picture)
    if args.html:
        from bench import page

        args.html.write_text(page.html(found, picture), encoding="utf-8")
    if why:
        print(f"Left out: {why}.", file=sys.stderr)
    for kind in KEEP:
        if (file := getattr(args, kind)) and (kind != "png" or picture):
            print(f"Wrote {shown(file)}", file=sys.stderr)
    return 1 if args.png and not picture else 0


def listing(cases: Sequence[Case]) -> Table:
    """The cases by name, the ones of --quick marked."""
    table = Table("quick", "name (--only matches any part of it)", box=None, pad_edge=False)
    for case in cases:
        table.add_row("yes" if case.quick else "", case.name)
    return table


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # stop quietly when piped into head
    sys.exit(main())
