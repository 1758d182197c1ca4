"""Builds libfastattn.so with ninja, and is the build backend that pip calls (PEP 517)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.build_meta import (  # noqa: F401  the hooks that setuptools answers
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # only where the build is not isolated: pip brings the one that it needs
    raise SystemExit("fastattn: needs setuptools >= 77: `pip install -U setuptools`.") from None

ROOT = Path(__file__).resolve().parent
LIBRARY = Path("fastattn", "libfastattn.so")

# The oldest torch whose stable ABI has all that csrc uses. A library built for it loads in every
# later torch, whichever torch the headers came from.
TORCH_MINIMUM = (2, 10)

COMMON_FLAGS = shlex.split(
    "-std=c++20 -fPIC -pthread -fvisibility=hidden -ffunction-sections -fdata-sections "
    "-Wall -Wextra -Wno-psabi -fno-math-errno -fno-trapping-math -Icsrc"
)
LINK_FLAGS = shlex.split("-shared -pthread -Wl,--gc-sections -Wl,-z,noexecstack")
# PTX for the oldest architecture that a file's kernels know: see csrc/cuda/driver.cpp.
CUDA_FLAGS = shlex.split("-std=c++20 -ptx -lineinfo -Icsrc -Werror all-warnings")
ARCHITECTURES = {"sm90": "compute_90a"}  # by the end of a file's name; of others compute_80

# Architecture of the compiler's output -> {ISA: (lanes of fp32, flags)}. The emulated vector, which
# is there for tests, fits no register: at -Og g++ takes a third of the time over it. Nor is there
# much in scalar code to optimise.
PORTABLE = {"emu16": (16, ["-Og"]), "scalar": (1, ["-O1"])}
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2]
AVX512 += ["-Wno-uninitialized"]  # g++ 12 complains about its own avx512fintrin.h
ISAS = {
    "x86_64": PORTABLE | {"avx2": (8, AVX2), "avx512": (16, AVX512)},
    "aarch64": PORTABLE | {"neon": (4, [])},
}

# Threads are the same in every ISA: of those that ThreadSanitizer sees, one runs anywhere, and one
# is quick.
THREADED = ("scalar", "avx2", "neon")

VECTORISE = ["-fvect-cost-model=dynamic", "-Wno-ignored-optimization-argument"]  # clang does anyhow

# Refused by compilers that know -std=c++20 but not enough of C++20, or none of its library.
CXX20_PROBE = """
#include <concepts>
#include <span>
#if __GNUC__ < 11 && !defined(__clang__)
#error "g++ is older than 11"
#endif
"""

# What the kernels take from CUDA and from C++20.
CUDA_PROBE = """
#include <concepts>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
__global__ void probe() {}
"""


def stop(message: str) -> SystemExit:
    """The exception that ends the build with one sentence and no traceback."""
    return SystemExit(f"fastattn: {message}")


def folders(package: str) -> Iterator[Path]:
    """The folders of a package in reach, without importing it.

    pip builds in an environment of its own, laid over the target's by PYTHONPATH: a child started
    with -E does not see that layer, but all that the target environment sees (a virtual
    environment with or without system packages, the user's packages, conda). Tools which build in
    a virtual environment of their own leave only VIRTUAL_ENV or CONDA_PREFIX to find the target.
    """
    spec = importlib.util.find_spec(package)
    yield from map(Path, (spec and spec.submodule_search_locations) or ())
    find = (
        f"import importlib.util as u; s = u.find_spec({package!r})\n"
        "print(*(s and s.submodule_search_locations or ()), sep='\\n')"
    )
    prefixes = (os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX"))
    interpreters = [sys.executable, *(f"{prefix}/bin/python" for prefix in prefixes if prefix)]
    for python in dict.fromkeys(interpreters):
        with contextlib.suppress(OSError):
            child = subprocess.run([python, "-E", "-c", find], capture_output=True, text=True)
            yield from map(Path, child.stdout.splitlines())


def torch_include() -> Path | None:
    """The include folder of a torch that is new enough, or None where there is no torch at all.

    Any torch will do, since its headers do not shape the binary.
    """
    refusals = []
    for folder in dict.fromkeys(folders("torch")):
        version_file = folder / "version.py"
        text = version_file.read_text() if version_file.is_file() else ""
        version = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", text)
        if version is None:
            continue
        if (int(version[2]), int(version[3])) < TORCH_MINIMUM:
            refusals.append(
                f"needs torch >= {'.'.join(map(str, TORCH_MINIMUM))}, but {folder.parent} has "
                f"{version[1]}: upgrade it first, for example with `pip install -U torch`."
            )
        elif not (folder / "include/torch/csrc/stable/library.h").is_file():
            refusals.append(
                f"the torch {version[1]} in {folder.parent} comes without its C++ headers "
                "(include/torch/csrc/stable): install torch from PyPI or from pytorch.org."
            )
        else:
            return folder / "include"
    if refusals:
        raise stop(refusals[0])
    return None


def compiler() -> tuple[list[str], str]:
    """The C++ compiler's command and the architecture that it compiles for."""
    if not sys.platform.startswith("linux"):
        raise stop(f"builds on Linux only so far, and this is {sys.platform}.")
    named = os.environ.get("CXX")
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), "")
    command = shlex.split(named) if named else [found]
    if not shutil.which(command[0]):
        missing = f"CXX names {named!r}, which is not there" if named else "no C++ compiler found"
        raise stop(
            f"{missing}: install one, for example with `apt-get install g++` (Debian, Ubuntu), "
            "`dnf install gcc-c++` (Fedora) or `conda install gxx`, or set CXX."
        )
    probe = subprocess.run(
        [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
        input=CXX20_PROBE,
        capture_output=True,
        text=True,
    )
    if probe.returncode:
        said = next(filter(None, (probe.stderr + probe.stdout).splitlines()), "no message")
        raise stop(
            f"needs a C++20 compiler (g++ >= 11 or clang++ >= 14), and {shlex.join(command)} "
            f"refuses C++20 ({said}): install a newer one or name it in CXX."
        )
    target = subprocess.run([*command, "-dumpmachine"], capture_output=True, text=True)
    return command, target.stdout.strip().split("-")[0]


def ninja() -> str:
    """The ninja program: PyPI's, which pip brings as a build requirement, or the one on PATH."""
    with contextlib.suppress(ImportError):
        from ninja import BIN_DIR

        return str(Path(BIN_DIR, "ninja"))
    program = shutil.which("ninja")
    if program is None:
        raise stop("ninja is missing: install it with `pip install ninja`.")
    return program


def nvcc() -> str | None:
    """The CUDA compiler on PATH, in CUDA_HOME or of a package from PyPI; None for a build without
    CUDA kernels.

    One that is too old, that lacks headers or that refuses the machine's g++, is no reason to go
    without the other kernels.
    """
    places = [os.environ.get("PATH", os.defpath)]
    if home := os.environ.get("CUDA_HOME"):
        places.append(f"{home}/bin")
    places += [str(place) for root in folders("nvidia") for place in root.glob("cu*/bin")]
    found = shutil.which("nvcc", path=os.pathsep.join(places))
    if found is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.cu")
        source.write_text(CUDA_PROBE)
        command = [found, *cuda_flags(source), str(source), "-o", str(source.with_suffix(".ptx"))]
        probe = subprocess.run(command, capture_output=True, text=True)
    if probe.returncode:
        said = next(filter(None, (probe.stderr + probe.stdout).splitlines()), "no message")
        print(f"fastattn: no CUDA kernels, for {found} fails: {said}", file=sys.stderr)
        return None
    return found


def cuda_flags(source: Path) -> list[str]:
    """nvcc's for a file: PTX for the architecture that its name ends with."""
    architecture = ARCHITECTURES.get(source.stem.rpartition("_")[2], "compute_80")
    return [*CUDA_FLAGS, "-gencode", f"arch={architecture},code={architecture}"]


def ninja_file(folder: Path, command: list[str], arch: str, include: Path, sanitize: str) -> str:
    """The text of build.ninja; its paths are relative to the root of the source tree."""
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    link_extra = shlex.split(os.environ.get("LDFLAGS", ""))
    isas = ISAS.get(arch, PORTABLE)
    if sanitize == "thread":
        isas = {name: isa for name, isa in isas.items() if name in THREADED}
        entries = " ".join(f"X({name}, __VA_ARGS__)" for name in isas)
        extra = [*extra, f"-DFASTATTN_FOREACH_ISA(X, ...)={entries}"]
    if sanitize:
        instrument = [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
        # For every file, whatever its own flags say; it takes a third of the time of -O1 -g.
        debug = ["-Og", "-g1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"]
        extra = [*debug, *instrument, *extra]
        link_extra = [*instrument, *link_extra]
    stub, exports = folder / "stub/libtorch_cpu.so", folder / "exports.map"
    # Kernels get no torch headers: those are for bind.cpp and csrc/common.
    target_version = (TORCH_MINIMUM[0] << 56) | (TORCH_MINIMUM[1] << 48)
    torch_flags = ["-isystem", str(include), f"-DTORCH_TARGET_VERSION={target_version:#018x}ull"]

    def quoted(arguments: list[str]) -> str:
        return shlex.join(arguments).replace("$", "$$")

    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {folder}",
        "rule compile",
        f"  command = {quoted([*command, *COMMON_FLAGS])} -O2 $flags {quoted(extra)}"
        " -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {quoted([*command, *LINK_FLAGS])} -Wl,--version-script={exports} $in -o $out"
        f" -Wl,--push-state,--no-as-needed {stub} -Wl,--pop-state {quoted(link_extra)}",
        "  description = link $out",
        # An empty library under the name of torch's. Linked against it, ours finds torch's symbols
        # in the libtorch_cpu.so that the process has loaded, and needs none for the build.
        "rule stub",
        f"  command = {quoted(command)} -shared -Wl,-soname,{stub.name} -x c++ /dev/null -o $out",
        "  description = link $out",
        f"build {stub}: stub",
        # Without this our copies of std:: templates would serve the rest of the process too.
        "rule exports",
        "  command = echo '{ global: fastattn_*; local: *; };' > $out",
        "  description = write $out",
        f"build {exports}: exports",
    ]
    objects: list[str] = []

    def compile_source(source: Path, out: str, flags: list[str]) -> None:
        objects.append(str(folder / out / source.relative_to("csrc").with_suffix(".o")))
        lines.append(f"build {objects[-1]}: compile {source}")
        lines.append(f"  flags = {quoted(flags)}")

    sources = sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.cpp"))
    kernels = [source for source in sources if source.match("csrc/*/cpu.cpp")]
    for isa, (lanes, flags) in isas.items():
        for source in kernels:
            defines = [f"-DFASTATTN_ISA={isa}", f"-DFASTATTN_LANES={lanes}"]
            # At -O2 g++ thinks some of attention's loops over masks too dear to vectorise.
            more = VECTORISE if source.parent.name == "attention" and not sanitize else []
            compile_source(source, isa, [*more, *flags, *defines])
    for source in sources:
        if source.match("csrc/emulator/*"):  # its clocks and its products are vectors
            compile_source(source, "common", ["-O3"])
        elif source not in kernels:  # a call's way to its kernel: nothing to optimise
            compile_source(source, "common", ["-O1", *torch_flags])
    if not sanitize and (cuda := nvcc()):  # what runs on a GPU is nothing for a sanitizer
        lines += [
            "rule ptx",
            f"  command = {quoted([cuda])} $flags -MD -MF $out.d $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            # The text becomes the symbols _binary_<name>_ptx_start and _end, after its file's.
            "rule embed",
            "  command = cd $$(dirname $in) && ld -r -b binary -z noexecstack $$(basename $in)"
            " -o $$(basename $out)",
            "  description = embed $in",
        ]
        for source in sorted(path.relative_to(ROOT) for path in (ROOT / "csrc").glob("*/cuda*.cu")):
            # csrc/norm/cuda.cu becomes norm.ptx, csrc/attention/cuda_backward.cu
            # attention_backward.ptx.
            name = source.parent.name + source.stem.removeprefix("cuda")
            text = folder / "cuda" / f"{name}.ptx"
            objects.append(str(text.with_suffix(".o")))
            lines += [
                f"build {text}: ptx {source}",
                f"  flags = {quoted(cuda_flags(source))}",
                f"build {objects[-1]}: embed {text}",
            ]
    lines += [f"build {folder / LIBRARY.name}: link {' '.join(objects)} | {stub} {exports}", ""]
    return "\n".join(lines)


def build_library() -> Path:
    """Bring the library up to date and return where it lies.

    The ordinary one is also put into the checkout's fastattn/, so that the package works from
    there. FASTATTN_SANITIZE=address,undefined (or thread) builds an instrumented one instead,
    which stays in build/native/.
    """
    sanitize = os.environ.get("FASTATTN_SANITIZE", "")
    command, arch = compiler()
    import fcntl  # Windows has none, and compiler() has refused it in words.

    include = torch_include()
    if include is None:
        raise stop("torch is missing, whose headers the build needs: `pip install torch` first.")
    folder = Path("build", "native", sanitize.replace(",", "-") or "release")
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    # Two builds in one checkout take turns: ninja itself does not lock its folder.
    with open(ROOT / folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        script = folder / "build.ninja"
        (ROOT / script).write_text(ninja_file(folder, command, arch, include, sanitize))
        run = subprocess.run([ninja(), "-f", str(script), "-j", jobs], cwd=ROOT)
        if run.returncode:
            raise stop("the C++ build failed; the compiler's message stands above.")
        library = ROOT / folder / LIBRARY.name
        if not sanitize:
            replace_file(library, ROOT / LIBRARY)
    return library


def replace_file(source: Path, destination: Path) -> None:
    """Copy in one step: a process that has the old file loaded keeps it whole."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    fresh = destination.with_name(f".{destination.name}.{os.getpid()}")
    shutil.copy2(source, fresh)
    os.replace(fresh, destination)


class BuildLibrary(build_ext):
    """Lets ninja build the one "extension", a plain shared library, and packages it."""

    def build_extension(self, ext: Extension) -> None:
        replace_file(build_library(), Path(self.get_ext_fullpath(ext.name)))

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def copy_extensions_to_source(self) -> None:
        """Nothing to do: build_library has put it there."""


class PlatformWheel(bdist_wheel):
    """A wheel for every Python on this platform: the library has no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]

    def run(self) -> None:
        # setuptools would pack modules that have been deleted since the last build.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What pip must bring for the build: a torch only where none is in reach.

    A plain requirement would put a second torch, several GB of it, into the environment that pip
    throws away after the build.
    """
    compiler()
    if torch_include() is None:
        return [f"torch>={'.'.join(map(str, TORCH_MINIMUM))}"]
    return []


get_requires_for_build_editable = get_requires_for_build_wheel

if __name__ == "__main__":
    setup(
        ext_modules=[Extension("fastattn.libfastattn", sources=[])],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    )
