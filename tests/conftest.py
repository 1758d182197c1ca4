"""What all tests share: seeds, the marker `slow`, transformers, PTX kernels, child processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

# bench is run from the checkout, not installed
sys.path.append(str(Path(__file__).resolve().parents[1]))

import fastattn
from bench import programs
from fastattn import emulator
from fastattn.integrations import huggingface

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption(
        "--fuzz-cases",
        type=int,
        help="how many calls tests/test_fuzz.py draws anew; by default 2000, always the same",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes or gigabytes; runs with --slow")
    os.environ.pop("FASTATTN_TUNE", None)  # what is tuned depends on the machine
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # which share the machine's cores
        torch.set_num_threads(max(1, torch.get_num_threads() // int(workers)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {
        "slow": "" if config.getoption("--slow") else "slow: run with --slow",
        "cuda": "" if torch.cuda.is_available() else "no CUDA device here",
    }
    for item in items:
        for marker, reason in skipped.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    if "PYTEST_XDIST_WORKER" in os.environ:  # the longest first, so that none is alone at the end
        items.sort(key=lambda item: item.path.name != "test_mutants.py")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread(fixed_seed: None) -> Iterator[None]:
    """On tensors of a test's size threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """The package, which then knows attn_implementation="fastattn"."""
    why = 'needs transformers: pip install "fastattn[test]"'
    package = pytest.importorskip("transformers", reason=why)
    huggingface.register()
    return package


@pytest.fixture(scope="module", params=["committed", "compiled"])
def kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, emulator.Kernel]:
    """The kernels of the module's SOURCE: from the PTX beside it, and fresh from nvcc."""
    source = ROOT / "tests/data" / request.module.SOURCE
    if request.param == "committed":
        return emulator.load(source.with_suffix(".ptx"))
    nvcc = programs.find("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc: with it, fresh PTX is tested beside the committed")
    out = tmp_path_factory.mktemp("ptx") / source.with_suffix(".ptx").name
    flags = [f"-arch={request.module.ARCHITECTURE}", "-std=c++20", "-lineinfo", "-ptx"]
    subprocess.run([nvcc, *flags, source, "-o", out], check=True)
    return emulator.load(out)


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a fresh interpreter that imports the package under test.

    `package` names the folder to import fastattn from in its stead; other keywords become
    environment variables. Variables of this process that steer fastattn are not passed on.
    """

    def run(
        *arguments: str, package: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        folder = package or Path(fastattn.__file__).parents[1]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")}
        return subprocess.run(
            [sys.executable, *arguments],
            env=inherited | {"PYTHONPATH": str(folder)} | environment,
            cwd=folder,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def peak_growth(python: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., int]:
    """By how many bytes code raises the highest memory use of a fresh process after other code."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process's own memory is read from /proc, which is not here")
    # Not ru_maxrss: that begins with what the parent process had.
    peak = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))
"""

    def grown(before: str, code: str, **environment: str) -> int:
        measured = f"{peak}{before}\nlow = peak()\n{code}\nprint(peak() - low)"
        done = python("-c", measured, **environment)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    return grown
