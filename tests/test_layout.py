"""Laws of the source tree, each with a planted violation that it must catch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh", ".j2"}
LONGEST = 500
GPU_TABLE = "bench/data/gpu.csv"

Law = Callable[[Path], Iterator[str]]


def sources(root: Path, *folders: str) -> Iterator[Path]:
    """The files of our own under `folders`, build products left out."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SOURCES and "__pycache__" not in path.parts:
                yield path


def torch_stays_at_the_boundary(root: Path) -> Iterator[str]:
    for path in sources(root, "csrc"):
        allowed = path.name.startswith("bind") or path.parent.name == "common"
        if not allowed and re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()):
            yield f"{path.relative_to(root)} includes a torch header"


def intrinsics_stay_in_simd(root: Path) -> Iterator[str]:
    for path in sources(root, "csrc"):
        named = re.search(
            r"\b_mm\d*_\w+|\bv(ld|st)1q?_\w+|immintrin\.h|arm_neon\.h", path.read_text()
        )
        if named and path.parent.name != "simd":
            yield f"{path.relative_to(root)} uses {named.group()}"


def assembly_stays_out(root: Path) -> Iterator[str]:
    for path in sources(root, "csrc"):
        allowed = path.name.startswith("ptx") or path.parent.name == "simd"
        if not allowed and re.search(r"\basm\b", path.read_text()):
            yield f"{path.relative_to(root)} holds assembly"


def rooms_are_mirrored(root: Path) -> Iterator[str]:
    rooms = {p.name for p in (root / "fastattn/ops").iterdir() if (p / "__init__.py").exists()}
    for room in sorted(rooms):
        for path in (
            *(f"csrc/{room}/{file}" for file in (f"{room}.h", "cpu.cpp", "bind.cpp")),
            f"fastattn/testing/rooms/{room}.py",
            f"tests/test_{room}.py",
        ):
            if not (root / path).exists():
                yield f"{path} is missing for fastattn/ops/{room}"
    for path in sorted((root / "csrc").glob("*/bind.cpp")):
        if path.parent.name not in rooms:
            yield f"fastattn/ops/{path.parent.name} is missing for csrc/{path.parent.name}"


def files_stay_readable(root: Path) -> Iterator[str]:
    for path in sources(root, "csrc", "fastattn", "bench", "tests"):
        text = path.read_text()
        reason = "long because" in text.split("\n\n")[0]
        if text.count("\n") > LONGEST and not reason:
            yield f"{path.relative_to(root)} has {text.count(chr(10))} lines and no reason for it"


def files_say_what_they_are(root: Path) -> Iterator[str]:
    for path in sources(root, "csrc", "fastattn", "bench", "tests"):
        opening = {".py": '"""', ".j2": ("{#", "<!")}.get(path.suffix, "// ")
        if not path.read_text().startswith(opening):
            yield f"{path.relative_to(root)} does not begin with a sentence on itself"


def nothing_is_left_undone(root: Path) -> Iterator[str]:
    mark = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
    for path in sources(root, "csrc", "fastattn", "bench", "tests"):
        if found := mark.search(path.read_text()):
            yield f"{path.relative_to(root)} holds a {found.group()}"


def tables_are_the_measured_ones(root: Path) -> Iterator[str]:
    bench = pytest.importorskip("bench.report", reason='pip install ".[test]" brings rich')
    from bench import rows

    kept = sorted({*(root / "bench/data").glob("*.csv")} - {root / GPU_TABLE})
    for path in kept:
        page = root / ("README.md" if path.stem == "quick" else "bench/SPEED.md")
        if bench.markdown(rows.read_csv(path)).strip() not in page.read_text():
            yield f"{page.relative_to(root)} does not hold the table of {path.relative_to(root)}"
    if not kept:
        yield "bench/data holds no CSV"


def tables_of_a_gpu_are_the_measured_ones(root: Path) -> Iterator[str]:
    bench = pytest.importorskip("bench.gpu.report", reason='pip install ".[test]" brings rich')
    from bench import rows
    from bench.gpu.rows import Row

    page, kept = root / "bench/GPU.md", root / GPU_TABLE
    if kept.exists() and bench.markdown(rows.read_csv(kept, Row)).strip() not in page.read_text():
        yield f"{page.relative_to(root)} does not hold the tables of {GPU_TABLE}"


PLANTED: dict[Law, tuple[str, str]] = {
    torch_stays_at_the_boundary: ("csrc/norm/cpu.cpp", "#include <torch/csrc/stable/tensor.h>\n"),
    intrinsics_stay_in_simd: ("csrc/norm/cpu.cpp", "auto x = _mm256_setzero_ps();\n"),
    assembly_stays_out: ("csrc/norm/cpu.cpp", 'asm volatile("");\n'),
    rooms_are_mirrored: ("fastattn/ops/loss/__init__.py", '"""A room with one wall."""\n'),
    files_stay_readable: ("fastattn/long.py", '"""Long."""\n' + "x = 1\n" * (LONGEST + 1)),
    files_say_what_they_are: ("fastattn/silent.py", "x = 1\n"),
    nothing_is_left_undone: ("fastattn/later.py", '"""Later."""\n# {}\n'.format("TO" + "DO")),
    tables_are_the_measured_ones: ("README.md", "# fastattn\n"),
    tables_of_a_gpu_are_the_measured_ones: ("bench/GPU.md", "# How fast on a GPU\n"),
}


@pytest.mark.parametrize("law", PLANTED, ids=lambda law: law.__name__)
def test_law_holds(law: Law) -> None:
    if not (ROOT / "csrc").exists():
        pytest.skip("the tests run outside a source tree: nothing to check")
    assert list(law(ROOT)) == []


@pytest.mark.parametrize("law", PLANTED, ids=lambda law: law.__name__)
def test_law_catches_a_violation(law: Law, tmp_path: Path) -> None:
    for folder in ("csrc", "fastattn/ops", "bench/data", "tests"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text("# fastattn\n")
    if law is tables_are_the_measured_ones:
        pytest.importorskip("rich", reason='pip install ".[test]" brings rich')
        quick = "bench/data/quick.csv"
        (tmp_path / quick).write_bytes((ROOT / quick).read_bytes())
    if law is tables_of_a_gpu_are_the_measured_ones:
        pytest.importorskip("rich", reason='pip install ".[test]" brings rich')
        from bench import rows
        from bench.gpu.rows import Row

        words = ("group", "case", "title", "shape", "passes", "provider", "status")
        row = Row(**dict.fromkeys(words, "ok"), dtype="bfloat16", gpu="a GPU")
        rows.write_csv([row], tmp_path / GPU_TABLE, Row)
    name, text = PLANTED[law]
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    assert list(law(tmp_path)), f"{law.__name__} missed what was planted in {name}"
