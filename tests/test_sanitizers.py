"""The enumerated cases on libraries with the sanitizers of addresses, of undefined behaviour and of
threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastattn

ROOT = Path(__file__).resolve().parents[1]

RUN = """
import sys, torch
from fastattn import UnavailableKernelError, _library, testing
torch.set_num_threads(2)
ran = 0
isas = [name for name, runs in _library.isas().items() if runs]
for isa in isas if sys.argv[1] == "all" else isas[-1:]:
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
OVERFLOW = """
import ctypes
from fastattn import _library
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
block = libc.malloc(64)
libc.memset(ctypes.c_void_p(block), 0, ctypes.c_size_t(65))
"""

# Heads that lie in one place, which the op's own workers write at the same time.
RACE = """
import fastattn, torch
torch.set_num_threads(2)
cache = torch.zeros(1, 1, 64, 64).expand(1, 64, 64, 64)
new = torch.randn(1, 64, 64, 64)
start = torch.zeros(1, dtype=torch.int64)
append = torch.ops.fastattn.attention_append
append(cache, cache, new, new, start, None, None, None, False)
"""


# Libraries that no sanitizer sees: what they call, such as memcpy, is no finding, and what ours
# calls is one.
FOREIGN = """
called_from_lib:libtorch_cpu.so
called_from_lib:libtorch_python.so
called_from_lib:libc10.so
"""


@dataclass(frozen=True)
class Sanitizer:
    """What g++ calls it, its runtimes, its options, which ISAs it is for, a fault and its name."""

    name: str
    runtimes: tuple[str, ...]
    options: dict[str, str]
    isas: str
    fault: str
    finding: str


SANITIZERS = [
    Sanitizer(
        "address,undefined",
        ("libasan.so", "libubsan.so"),
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        "all",
        OVERFLOW,
        "heap-buffer-overflow",
    ),
    # csrc/common/parallel.cpp says what torch's pool orders. At the end of Python torch unlocks a
    # mutex that is gone. Threads are the same in every ISA.
    Sanitizer(
        "thread",
        ("libtsan.so",),
        {"TSAN_OPTIONS": "suppressions=foreign halt_on_error=1 report_mutex_bugs=0"},
        "widest",
        RACE,
        "data race",
    ),
]


@pytest.fixture(scope="module", params=SANITIZERS, ids=lambda sanitizer: sanitizer.name)
def instrumented(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Sanitizer, Path]:
    """A sanitizer, and a folder with the package on a library that it instruments."""
    sanitizer = request.param
    if not (ROOT / "setup.py").exists() or shutil.which("g++") is None:
        pytest.skip("needs the source tree and g++ to build the instrumented library")
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=ROOT,
        env=os.environ | {"FASTATTN_SANITIZE": sanitizer.name},
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
    built = ROOT / "build/native" / sanitizer.name.replace(",", "-") / "libfastattn.so"
    shutil.copy2(built, package)
    (folder / "foreign").write_text(FOREIGN)
    return sanitizer, folder


def run(
    sanitizer: Sanitizer, folder: Path, code: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    runtimes = []
    for name in sanitizer.runtimes:
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
        if not Path(found.stdout.strip()).is_absolute():
            pytest.skip(f"g++ has no {name}: install the sanitizer's runtime of this name")
        runtimes.append(found.stdout.strip())
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")}
        | {"LD_PRELOAD": " ".join(runtimes), "PYTHONPATH": str(folder)}
        | sanitizer.options,
        capture_output=True,
        text=True,
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the system scatters memory more than the sanitizer knows: vm.mmap_rnd_bits")
    return done


@pytest.mark.slow
def test_cases_are_clean(instrumented: tuple[Sanitizer, Path]) -> None:
    found = run(*instrumented, RUN, instrumented[0].isas)
    assert found.returncode == 0, found.stderr[-6000:]
    assert int(found.stdout.split()[-1]) > 100


@pytest.mark.slow
def test_a_fault_is_seen(instrumented: tuple[Sanitizer, Path]) -> None:
    sanitizer, folder = instrumented
    found = run(sanitizer, folder, sanitizer.fault)
    assert found.returncode != 0
    assert sanitizer.finding in found.stderr
