"""The build backend in setup.py, and what the objects that it compiles may contain."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
RELEASE = Path("build", "native", "release")

setuptools = pytest.importorskip("setuptools", reason='needs `pip install ".[test]"`')


def load_backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


backend = load_backend()


class Target:
    """A bare environment to install into, asked about its build as pip does it."""

    def __init__(self, folder: Path):
        venv.create(folder / "target", symlinks=True)
        self.python = folder / "target/bin/python"
        self.packages = next((folder / "target/lib").glob("python*/site-packages"))
        # pip's build environment: setuptools, laid over the target by PYTHONPATH.
        self.layer = folder / "layer"
        self.layer.mkdir()
        packages = Path(setuptools.__file__).parents[1]
        for name in ("setuptools", "_distutils_hack"):
            (self.layer / name).symlink_to(packages / name)

    def put_torch(self, version: str, *, headers: bool = True) -> None:
        torch = self.packages / "torch"
        torch.mkdir()
        (torch / "__init__.py").write_text("raise SystemExit('the build imported torch')")
        (torch / "version.py").write_text(f"__version__ = '{version}'\n")
        if headers:
            (torch / "include/torch/csrc/stable").mkdir(parents=True)
            (torch / "include/torch/csrc/stable/library.h").touch()

    def requires(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the hook that says what the build needs."""
        return self.ask("get_requires_for_build_wheel", **environment)

    def ask(self, function: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Print what a function of setup.py returns in the environment of a build."""
        clean = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME")}
        return subprocess.run(
            [self.python, "-c", f"import setup; print(setup.{function}())"],
            cwd=ROOT,
            env=clean | {"PYTHONPATH": str(self.layer)} | environment,
            capture_output=True,
            text=True,
        )


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(tmp_path)


def assert_stopped(run: subprocess.CompletedProcess[str], *words: str) -> None:
    """The run failed with one line that holds the words, and without a traceback."""
    assert run.returncode != 0
    assert len(run.stderr.splitlines()) == 1 and run.stderr.startswith("fastattn: "), run.stderr
    for word in words:
        assert word in run.stderr


def test_an_empty_target_requires_torch(target: Target):
    assert target.requires().stdout.strip() == "['torch>=2.10']"


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0+git1234"])
def test_a_torch_in_the_target_is_enough(target: Target, version: str):
    target.put_torch(version)
    run = target.requires()
    assert run.stdout.strip() == "[]", run.stderr


def test_a_torch_in_the_active_environment_is_enough(target: Target, tmp_path: Path):
    """Build tools other than pip build in an environment that does not see the target's."""
    (tmp_path / "second").mkdir()
    active = Target(tmp_path / "second")
    active.put_torch("2.10.0")
    prefix = str(active.python.parents[1])
    assert target.requires(VIRTUAL_ENV=prefix).stdout.strip() == "[]"


def test_an_old_torch_is_refused(target: Target):
    target.put_torch("2.9.1+cu128")
    assert_stopped(target.requires(), "needs torch >= 2.10", "2.9.1+cu128", "pip install -U torch")


def test_a_torch_without_headers_is_refused(target: Target):
    target.put_torch("2.13.0", headers=False)
    assert_stopped(target.requires(), "2.13.0", "C++ headers")


def test_a_missing_compiler_is_named(target: Target):
    assert_stopped(target.requires(PATH=""), "no C++ compiler", "apt-get install g++")
    assert_stopped(target.requires(CXX="no-such-g++"), "'no-such-g++'", "apt-get install g++")


def test_an_old_compiler_is_refused(target: Target, tmp_path: Path):
    old = tmp_path / "old-g++"
    old.write_text("#!/bin/sh\necho 'error: no -std=c++20' >&2\nexit 1\n")
    old.chmod(0o755)
    assert_stopped(target.requires(CXX=str(old)), "C++20", str(old), "error: no -std=c++20")


def test_the_build_takes_this_environments_torch():
    include = backend.torch_include()
    assert include is not None
    assert (include / "torch/csrc/stable/library.h").is_file()


def put_nvcc(folder: Path, script: str = "exit 0") -> str:
    """A compiler of CUDA that does nothing but what the script says; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvcc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvcc").chmod(0o755)
    return str(folder / "nvcc")


def test_nvcc_is_looked_for_on_path_then_in_cuda_home_then_in_packages(
    target: Target, tmp_path: Path
):
    assert target.ask("nvcc", PATH="").stdout == "None\n"
    packaged = put_nvcc(target.packages / "nvidia/cu13/bin")
    assert target.ask("nvcc", PATH="").stdout.strip() == packaged
    home = put_nvcc(tmp_path / "cuda/bin")
    told = {"CUDA_HOME": str(tmp_path / "cuda")}
    assert target.ask("nvcc", PATH="", **told).stdout.strip() == home
    first = put_nvcc(tmp_path / "first")
    assert target.ask("nvcc", PATH=str(tmp_path / "first"), **told).stdout.strip() == first


def test_a_wheel_serves_every_python():
    command = backend.PlatformWheel(setuptools.Distribution({"ext_modules": [object()]}))
    command.ensure_finalized()
    python, abi, platform = command.get_tag()
    assert (python, abi) == ("py3", "none")
    assert platform.startswith("linux_")


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """A source tree whose only kernel is one line, with the real setup.py."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    (tmp_path / "fastattn").mkdir()
    (tmp_path / "fastattn/__init__.py").write_text('__version__ = "0"\n')
    room = tmp_path / "csrc/room"
    room.mkdir(parents=True)
    (room / "room.h").write_text("namespace fastattn::FASTATTN_ISA { int lanes(); }\n")
    (room / "cpu.cpp").write_text(
        '#include "room/room.h"\nint fastattn::FASTATTN_ISA::lanes() { return FASTATTN_LANES; }\n'
    )
    (room / "bind.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) int fastattn_one() { return 1; }\n'
    )
    return tmp_path


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_a_second_build_compiles_only_what_changed(small_tree: Path):
    first = build(small_tree)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (small_tree / "fastattn/libfastattn.so").is_file()
    assert "no work to do" in build(small_tree).stdout

    os.utime(small_tree / "csrc/room/room.h")
    compiled = re.findall(r"compile (\S+)", build(small_tree).stdout)
    _, architecture = backend.compiler()
    isas = backend.ISAS.get(architecture, backend.PORTABLE)
    assert sorted(compiled) == sorted(f"{RELEASE}/{isa}/room/cpu.o" for isa in isas)


def test_an_instrumented_build_leaves_the_ordinary_one_alone(small_tree: Path):
    assert build(small_tree, FASTATTN_SANITIZE="address,undefined").returncode == 0
    instrumented = small_tree / "build/native/address-undefined/libfastattn.so"
    assert b"__asan_init" in instrumented.read_bytes()
    assert not (small_tree / "fastattn/libfastattn.so").exists()


def test_a_compile_error_shows_the_compilers_words(small_tree: Path):
    with (small_tree / "csrc/room/cpu.cpp").open("a") as source:
        source.write('#error "the reason"\n')
    run = build(small_tree)
    assert "csrc/room/cpu.cpp:3" in run.stdout and "the reason" in run.stdout
    assert_stopped(run, "C++ build failed")


def test_cuda_kernels_are_embedded(small_tree: Path):
    if backend.nvcc() is None:
        pytest.skip("there is no nvcc, or one that fails: `pip install nvidia-cuda-nvcc`")
    source = small_tree / "csrc/room/cuda.cu"
    source.write_text('extern "C" __global__ void room_kernel() {}\n')
    run = build(small_tree)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (small_tree / RELEASE / "cuda/room.ptx").is_file()
    symbols_of = subprocess.run(
        ["nm", small_tree / RELEASE / "cuda/room.o"], capture_output=True, text=True
    )
    assert "_binary_room_ptx_start" in symbols_of.stdout


def test_an_nvcc_that_cannot_is_left_out(small_tree: Path, tmp_path: Path):
    (small_tree / "csrc/room/cuda.cu").touch()
    put_nvcc(tmp_path / "bin", "echo 'too old' >&2; exit 1")
    run = build(small_tree, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert run.returncode == 0 and "no CUDA kernels" in run.stderr and "too old" in run.stderr
    assert (small_tree / "fastattn/libfastattn.so").is_file()


# A function that the linker may merge with another object's (a template of std::, an inline
# function of a shared header) must not be compiled for one ISA: the linker keeps one copy for all,
# and the copy with AVX-512 in it would then run on machines without.


def symbols(*arguments: str | Path) -> list[tuple[str, str]]:
    """The name and the kind, after nm, of each symbol defined for others."""
    listing = subprocess.run(
        ["nm", "--defined-only", "--extern-only", "--format=posix", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = map(str.split, listing.stdout.splitlines())
    return [(row[0], row[1]) for row in rows if len(row) >= 2]


def shared_code(compiled: Path, isa: str) -> list[str]:
    """The functions in an ISA's object whose name does not hold that ISA's namespace."""
    namespace = f"8fastattn{len(isa)}{isa}"
    return [name for name, kind in symbols(compiled) if kind in "TWi" and namespace not in name]


def runs_at_load(compiled: Path) -> bool:
    """Whether an object brings code that runs when the library is loaded, on any machine."""
    listing = subprocess.run(
        ["objdump", "-h", compiled], capture_output=True, text=True, check=True
    )
    return re.search(r"\.(init_array|ctors)\b", listing.stdout) is not None


def kernel_objects() -> list[tuple[str, Path]]:
    """The ISA and the path of each object that the last build in this checkout compiled per ISA."""
    script = ROOT / RELEASE / "build.ninja"
    text = script.read_text() if script.is_file() else ""
    pattern = rf"build ({RELEASE}/(\w+)/\S+/cpu\.o): compile"
    return [(isa, ROOT / path) for path, isa in re.findall(pattern, text)]


def test_kernels_share_no_code_between_isas():
    objects = kernel_objects()
    if not objects:
        pytest.skip("no objects to look at: run `pip install .` in this checkout first")
    assert {path: names for isa, path in objects if (names := shared_code(path, isa))} == {}
    assert [path for _, path in objects if runs_at_load(path)] == []


def test_shared_code_would_be_seen(tmp_path: Path):
    source = tmp_path / "cpu.cpp"
    source.write_text(
        "#include <cstdlib>\n"
        "namespace fastattn { [[gnu::noinline]] inline int half(int x) { return x / 2; } }\n"
        "namespace fastattn::wide {\n"
        "static const int at_load = std::rand();\n"
        "int own() { return half(at_load); }\n"
        "}\n"
    )
    command, _ = backend.compiler()
    compiled = tmp_path / "cpu.o"
    subprocess.run([*command, "-std=c++20", "-O1", "-c", source, "-o", compiled], check=True)
    assert shared_code(compiled, "wide") == ["_ZN8fastattn4halfEi"]
    assert runs_at_load(compiled)


def test_the_library_shows_only_its_own_functions():
    from fastattn import _library

    assert _library.LIBRARY is not None, _library.WHY_NOT
    names = [name for name, _ in symbols("--dynamic", _library.PATH)]
    assert names and all(name.startswith("fastattn_") for name in names), names
