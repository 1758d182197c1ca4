"""The enumerated cases on a library built with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = "address,undefined"

RUN = """
import sys, torch
from fastattn import UnavailableKernelError, _library, testing
torch.set_num_threads(2)
ran = 0
for isa, runs in _library.isas().items():
    if not runs:
        continue
    with testing.use_isa(isa), testing.poisoned():
        for case in testing.all_cases():
            if case.refused:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                testing.run(case, case.inputs(dtype, "sliced"), "cpu")
                ran += 1
print("ran", ran)
"""

# Past the end of a heap block: what the checker must see in the process that the cases run in.
FAULT = """
import ctypes
from fastattn import _library
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
block = libc.malloc(64)
libc.memset(ctypes.c_void_p(block), 0, ctypes.c_size_t(65))
"""


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package on an instrumented library."""
    if not (ROOT / "setup.py").exists() or shutil.which("g++") is None:
        pytest.skip("needs the source tree and g++ to build the instrumented library")
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=ROOT,
        env=os.environ | {"FASTATTN_SANITIZE": SANITIZERS},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout[-4000:] + build.stderr[-4000:]
    folder = tmp_path_factory.mktemp("instrumented")
    package = folder / "fastattn"
    shutil.copytree(
        Path(fastattn.__file__).parent,
        package,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    built = ROOT / "build/native" / SANITIZERS.replace(",", "-") / "libfastattn.so"
    shutil.copy2(built, package)
    return folder


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
        if not Path(found.stdout.strip()).is_absolute():
            pytest.skip(f"g++ has no {name}: install the sanitizer runtimes, libasan and libubsan")
        runtimes.append(found.stdout.strip())
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")}
        | {
            "LD_PRELOAD": " ".join(runtimes),
            "PYTHONPATH": str(folder),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_cases_are_clean(instrumented: Path) -> None:
    found = run(instrumented, RUN)
    assert found.returncode == 0, found.stderr[-6000:]
    assert int(found.stdout.split()[-1]) > 100


@pytest.mark.slow
def test_a_fault_is_seen(instrumented: Path) -> None:
    found = run(instrumented, FAULT)
    assert found.returncode != 0
    assert "heap-buffer-overflow" in found.stderr
