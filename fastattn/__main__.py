"""`python -m fastattn info`: versions, instruction sets, and which kernels run here or why not."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

import torch

import fastattn
from fastattn import _library


def info() -> dict[str, Any]:
    """What decides how fastattn runs on this machine, as plain values."""
    return {
        "fastattn": fastattn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "threads": torch.get_num_threads(),
        "library": str(_library.PATH) if _library.LIBRARY else None,
        "build": _library.build_info(),
        "isa": fastattn.isa(),
        "isas": _library.isas(),
        "kernels": fastattn.backends(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("FASTATTN_")},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for a reader: one aligned line per fact."""
    isas = [
        name + (" (in use)" if name == found["isa"] else "" if runs else " (not on this machine)")
        for name, runs in found["isas"].items()
    ]
    rows = [
        *((name, str(found[name])) for name in ("fastattn", "torch", "python", "machine")),
        ("threads", str(found["threads"])),
        ("library", found["library"] or "none"),
        ("build", found["build"]),
        ("instruction sets", ", ".join(isas) or "none"),
        *((f"kernel {name}", why or "runs") for name, why in found["kernels"].items()),
        ("environment", " ".join(f"{k}={v}" for k, v in found["environment"].items()) or "-"),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def main(arguments: list[str] | None = None) -> int:
    """Print what `arguments` ask for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastattn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, instruction sets and kernels")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    found = info()
    print(json.dumps(found, indent=2) if options.json else "\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
