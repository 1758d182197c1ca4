"""The race on a GPU: all but the time itself, in the emulator and on a clock of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastattn
from bench import rows as results
from bench.gpu import __main__ as cli
from bench.gpu import ahead, clock, machine, race, report
from bench.gpu.cases import CALLS, GROUPS, bf16, trained
from bench.gpu.rows import KERNELS, Row, races
from bench.kinds import Attention, CrossEntropy, Linear, Norm
from fastattn import _library, dispatch

CASES = [case for group in GROUPS.values() for case in group]
emulated = pytest.mark.skipif(bool(_library.WHY_NO_CUDA), reason=_library.WHY_NO_CUDA)
SMALL = Linear(rows=16, width_in=64, width_out=64, dtype="bfloat16")


class Cuda:
    """Stands in for torch.cuda: time passes where a call says so, and in a graph when replayed."""

    def __init__(self) -> None:
        self.now, self.capturing, self.restored = 0.0, False, False
        generator = SimpleNamespace(clone_state=lambda: "state", graphsafe_set_state=self.restore)
        self.default_generators = [generator]
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                cuda.now += 1e-7
                self.at = cuda.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            seconds = 0.0

            def replay(self) -> None:
                cuda.now += self.seconds

        self.Event, self.CUDAGraph = Event, CUDAGraph

    def restore(self, state: str) -> None:
        self.restored = state == "state"

    def current_device(self) -> int:
        return 0

    def current_stream(self) -> str:
        return "a stream"

    def synchronize(self) -> None:
        pass

    def stream(self, stream: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def graph(self, graph: object, stream: str) -> Iterator[None]:
        begin, self.capturing = self.now, True
        try:
            yield
        finally:
            graph.seconds, self.now, self.capturing = self.now - begin, begin, False

    def call(self, seconds: float, fails_at: str = "") -> clock.Call:
        def run() -> list[str]:
            if fails_at == "once" or (fails_at == "capture" and self.capturing):
                raise RuntimeError(f"fails at {fails_at}\nand more")
            self.now += seconds
            return ["result"]

        return run


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    monkeypatch.setattr(clock, "cuda", made)
    return made


def test_graphs_hold_several_short_calls(cuda: Cuda) -> None:
    lanes = clock.on_gpu({"short": cuda.call(1e-4), "long": cuda.call(0.1)})
    short, long = lanes["short"], lanes["long"]
    assert (short.timed, short.calls, short.repeats) == ("graph", 5, 4)
    assert (long.timed, long.calls, long.repeats) == ("graph", 1, 1)
    assert short.timing.median == pytest.approx(1e-4, rel=1e-2)
    assert long.timing.median == pytest.approx(0.1, rel=1e-2)
    assert short.timing.samples == clock.ROUNDS and short.timing.calls == 20
    assert short.result == ["result"]


def test_what_has_no_graph_is_called_and_what_fails_says_so(cuda: Cuda) -> None:
    lanes = clock.on_gpu({"called": cuda.call(1e-3, "capture"), "broken": cuda.call(1, "once")})
    assert lanes["broken"] == "RuntimeError: fails at once"
    assert lanes["called"].timed == "events" and lanes["called"].result is None
    assert lanes["called"].note == "without a graph: RuntimeError: fails at capture"
    assert lanes["called"].timing.median == pytest.approx(1e-3, rel=1e-2)
    assert cuda.restored


def test_a_lane_that_fails_late_leaves_the_others(cuda: Cuda) -> None:
    def late(times: int) -> None:
        cuda.now += 1e-3
        if len(other.samples) >= 3:
            raise torch.OutOfMemoryError("out of memory")

    other = clock.Lane(lambda times: None, clock.GRAPH)
    lanes = clock.race({"late": lambda: clock.Lane(late, clock.GRAPH), "other": lambda: other})
    assert lanes["late"] == "OutOfMemoryError: out of memory"
    assert lanes["other"].timing.samples == clock.ROUNDS


def test_pythons_clock_counts_calls_inside_their_context(cuda: Cuda) -> None:
    seen = []

    def call() -> None:
        seen.append((dispatch.forced(), torch.is_grad_enabled()))

    lane = clock.in_python({"a": (lambda: fastattn.use_kernel("reference"), call)})["a"]
    assert lane.timed == "python" and 0 < lane.timing.median < 1e-3
    assert set(seen) == {("reference", False)}


@emulated
def test_a_race_gives_speeds_only_beside_matching_results(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["emulator", "eager"]
    rows = race.race("a group", SMALL, machine.EMULATOR, names, "cpu", race.on_gpu)
    assert [(row.provider, row.status, row.timed) for row in rows] == [
        ("emulator", "ok", "graph"),
        ("eager", "ok", "graph"),
    ]
    assert all(row.tflops > 0 and row.gbs is None and row.error <= row.allowed for row in rows)
    honest = fastattn.linear
    monkeypatch.setattr(fastattn, "linear", lambda *a, **k: honest(*a, **k) * 1.1)
    fused, eager = race.race("a group", SMALL, machine.EMULATOR, names, "cpu", race.on_gpu)
    assert fused.status == results.MISMATCH and "output" in fused.note
    assert fused.median_ms is None and eager.median_ms > 0


@emulated
def test_a_graph_that_writes_something_else_gets_no_speed() -> None:
    def measure(case, work, names):
        wrong = [torch.ones(16, 64, dtype=torch.bfloat16)]
        return {name: clock.Lane(lambda times: None, "graph", result=wrong) for name in names}

    (row,) = race.race("a group", SMALL, machine.EMULATOR, ["emulator"], "cpu", measure)
    assert row.status == results.MISMATCH and row.median_ms is None and "error" in row.note


def test_a_refusal_and_a_failure_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("broken")

    case = Attention(batch=1, heads=1, seq=8, head_dim=8)
    names = ["cuda", "sdpa-flash", "sdpa-cudnn"]
    cuda, flash, cudnn = race.race("a group", case, machine.EMULATOR, names, "cpu", None)
    assert cuda.status == cudnn.status == results.LEFT_OUT and flash.status == results.OK
    assert "is forced" in cuda.note and cudnn.note
    monkeypatch.setattr(fastattn, "attention", broken)
    (row,) = race.race("a group", case, machine.EMULATOR, ["cuda"], "cpu", None)
    assert (row.status, row.note) == (results.FAILED, "RuntimeError: broken")
    monkeypatch.setattr(race.providers, "build", broken)
    rows = race.race("a group", case, machine.EMULATOR, ["cuda", "eager"], "cpu", None)
    assert [(row.provider, row.status) for row in rows] == [("cuda", results.FAILED)]


def test_a_backends_warnings_become_its_reason() -> None:
    texts = [
        "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:1.)",
        "Expected dtype Half. (Triggered internally at sdp_utils.cpp:2.)",
        "cuDNN attention has been runtime disabled. (Triggered internally at sdp_utils.cpp:3.)",
    ]
    with pytest.warns(UserWarning) as warned:
        for text in texts:
            warnings.warn(text, UserWarning, stacklevel=1)
    assert race.refusals(warned) == ["Expected dtype Half"]


def test_reasons_of_many_cases_name_a_few() -> None:
    assert report.some(["a", "b", "c", "d"]) == "a, b, c, d"
    assert report.some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_kernels_are_compiled_in_other_processes() -> None:
    """And what fails there stops nothing."""
    heard = []
    case = Norm(kind="rms_norm", rows=2, cols=32)
    ahead.compile_all([case], lambda: heard.append(1), "cpu", "reference-that-is-not-there")
    assert heard == [1]
    ahead.compile_one(case, "cpu", "eager")


@pytest.mark.skipif(
    bool(why := dispatch.WHY_NO_TRITON or _library.WHY_NOT), reason=why or "Triton is there"
)
def test_tritons_kernels_match_backward_too() -> None:
    """What is wide in a narrow call, the loss, is so for all."""
    for case in (
        CrossEntropy(rows=8, width=64, classes=64),
        Norm(kind="rms_norm", rows=4, cols=64),
    ):
        (narrow,) = trained(*bf16(case))
        names = ["triton-emulator", "eager"]
        rows = race.race("a group", narrow, machine.EMULATOR, names, "cpu", None)
        assert [row.status for row in rows] == [results.OK, results.OK], rows


FLASH_ATTN = """
from torch.nn.functional import scaled_dot_product_attention as sdpa
def flash_attn_func(query, key, value, causal):
    tensors = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    return sdpa(*tensors, is_causal=causal).transpose(1, 2)
"""


@emulated
def test_the_race_on_a_gpu_in_the_emulator(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All but the clock: a case of each kind, with what stands in for flash-attn."""
    (tmp_path / "flash_attn.py").write_text(FLASH_ATTN)
    monkeypatch.syspath_prepend(tmp_path)
    kinds = {}
    for group, cases in GROUPS.items():
        for case in cases:
            options = (getattr(case, name, None) for name in ("bias", "dropout", "kind"))
            kinds.setdefault((type(case), *options, case.backward), (group, case))
    groups: dict[str, list] = {}
    for group, case in kinds.values():
        groups.setdefault(group, []).append(case)
    monkeypatch.setattr(cli, "GROUPS", groups)
    kept = tmp_path / "gpu.csv"
    assert cli.main(["--emulated", "--csv", str(kept)]) == 0
    rows = results.read_csv(kept, Row)
    assert len({row.case for row in rows}) == len(kinds)
    assert not [row for row in rows if row.status in (results.MISMATCH, results.FAILED)]
    mine = [row for row in rows if row.provider in KERNELS]
    assert len(mine) == len(kinds)
    assert {row.case for row in mine if row.status != results.OK} == {
        row.case
        for row in mine
        if row.title == "linear cross-entropy"  # Triton's alone
    }
    assert [row.status for row in rows if row.provider == "flash-attn"] == [results.OK] * 2
    said = capsys.readouterr().out
    assert "Attention of one query" in said and "it has no CUDA kernel" in said


@emulated
def test_the_command_on_what_stands_in_for_a_gpu(
    cuda: Cuda, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = race.race

    def small(group, case, here, names, device, measure):
        assert device == "cuda"
        names = ["emulator" if name == "cuda" else name for name in names]
        case = dataclasses.replace(case, **case.tiny)
        return honest(group, case, here, names, "cpu", measure)

    monkeypatch.setattr(race, "race", small)
    monkeypatch.setattr(machine, "survey", lambda: machine.EMULATOR)
    for name, stand_in in {
        "is_available": lambda: True,
        "Stream": lambda: "a stream",
        "stream": cuda.stream,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    kept = tmp_path / "gpu.csv"
    command = ["--kernels", "cuda", "--only", "linear/512x*", "--csv", str(kept)]
    assert cli.main(command) == 0
    rows = results.read_csv(kept, Row)
    assert [(row.provider, row.status, row.timed) for row in rows] == [
        (name, "ok", "graph") for name in ("emulator", "eager")
    ]
    said = capsys.readouterr()
    assert "Linear and FFN, GB/s" in said.out and f"Wrote {kept}" in said.err.replace("\n", "")


@emulated
def test_a_mismatch_fails_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fastattn.linear
    monkeypatch.setattr(fastattn, "linear", lambda *a, **k: honest(*a, **k) * 1.1)
    assert cli.main(["--emulated", "--only", "linear-gelu*"]) == 1
    assert "MISMATCH" in capsys.readouterr().out


def made_rows() -> list[Row]:
    """What a race may have found; no GPU has."""
    about = dict(
        group="Attention, forward", case="attention/b1/fwd/bf16", title="attention", shape="B1",
        passes="fwd", dtype="bfloat16", gpu="a GPU", driver="1.2", torch="2.11.0", triton="3.6.0",
        fastattn="0.1.0", python="3.12.3", date="2000-01-01", product_tflops=700.0, copy_gbs=4000.0,
    )  # fmt: skip
    timed = dict(status="ok", timed="graph", p20_ms=1.0, p80_ms=1.5, samples=11, calls_per_sample=4)
    timed |= dict(error=1e-3, eager_error=1e-3, allowed=3e-3, judged="output")
    call = about | timed | dict(group=CALLS, case="linear/1x8x8/fwd/bf16", title="linear")
    call |= dict(shape="1x8x8", timed="python")
    return [
        Row(**about, **timed, provider="cuda", median_ms=1.25, tflops=400.0),
        Row(**about, provider="triton", status="MISMATCH", note="output: error 1"),
        Row(**about, **timed, provider="eager", median_ms=5.0, tflops=100.0),
        Row(
            **about | timed | dict(timed="events"),
            provider="sdpa-flash", median_ms=1.0, tflops=500.0, note="without a graph: why",
        ),
        Row(**about, provider="sdpa-cudnn", status="left out", note="refuses"),
        Row(**call, provider="cuda", median_ms=0.04),
        Row(**call, provider="eager", median_ms=0.02),
    ]  # fmt: skip


def test_csv_gives_back_the_rows_and_the_same_markdown(tmp_path: Path) -> None:
    results.write_csv(made_rows(), tmp_path / "gpu.csv", Row)
    back = results.read_csv(tmp_path / "gpu.csv", Row)
    assert back == made_rows()
    assert report.markdown(back) == report.markdown(made_rows())
    with pytest.raises(ValueError, match=r"gpu\.csv is not a benchmark's CSV"):
        results.read_csv(tmp_path / "gpu.csv")


def test_markdown_shows_rates_ratios_and_reasons() -> None:
    text = report.markdown(made_rows())
    lines = text.splitlines()
    assert (
        "| Attention, forward, TFLOP/s | fastattn ms | spread | cuda | triton | eager | SDPA flash "
        "| SDPA cuDNN | × best rival | × eager |" in lines
    )
    assert (
        "| attention, B1 fwd | 1.25 | ±20 % | 400 | MISMATCH | 100 | 500* | left out "
        "| 0.80 SDPA flash | 4.00 |" in lines
    )
    assert "| linear, 1x8x8 fwd | 40.0 | 20.0 | 0.50 eager | 0.50 |" in lines
    assert "a GPU, driver 1.2, fastattn 0.1.0, torch 2.11.0, Triton 3.6.0" in text
    assert "MISMATCH: triton: output: error 1 (attention/b1/fwd/bf16)" in lines
    assert "SDPA flash: without a graph: why (attention/b1/fwd/bf16)" in lines
    for table in (lines[i : i + 3] for i, line in enumerate(lines) if line.startswith("| ---")):
        assert len({line.count("|") for line in table if line}) == 1


def test_a_call_that_has_no_speed_shows_no_ratio() -> None:
    mine, *others = made_rows()[:3]
    (found,) = races([dataclasses.replace(mine, median_ms=None), *others])[mine.group]
    assert found.fused is None and found.best.provider == "eager"
    assert [column.cell(found) for column in report.columns([found])][-2:] == ["", ""]


def test_tables_are_put_into_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, kept = tmp_path / "GPU.md", tmp_path / "gpu.csv"
    results.write_csv(made_rows(), kept, Row)
    page.write_text("before\n\n{}\nold\n{}\nafter\n".format(*report.MARKS))
    command = ["--report", str(kept), "--markdown", str(page)]
    for _ in range(2):
        assert cli.main(command) == 0
        assert capsys.readouterr().out == report.markdown(made_rows()) + "\n"
        text = page.read_text()
        assert text.startswith("before") and text.endswith("after\n") and "old" not in text
        assert text.count(report.markdown(made_rows())) == 1
    page.write_text("no place")
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "to put the tables between" in capsys.readouterr().err


def test_the_page_has_a_place_for_the_tables() -> None:
    text = Path(report.__file__).parents[1].joinpath("GPU.md").read_text()
    assert 0 < text.find(report.MARKS[0]) < text.find(report.MARKS[1])


def test_list_shows_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list"]) == 0
    names = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert names == [case.name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "atention"], "matches none"),
        (["--kernels", "cuda,metal"], "'metal' is none of cuda, triton"),
        (["--csv", "nowhere/at/all.csv"], "there is no folder"),
        (["--report", "absent.csv"], "absent.csv"),
        (["--markdown", "GPU.md"], "comes with --report"),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_bad_arguments_are_refused_in_words(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_the_command_says_what_works(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cli.main([])
    assert "--emulated" in capsys.readouterr().err


@pytest.mark.cuda
def test_the_race_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """A few cases of each group; with -n 0 on a GPU of its own, and shown."""
    few = ["s512", "s1024", "16384x1024", "512x4096", "1x8", "s1-d8"]
    with capsys.disabled():  # the table is what it is for
        assert cli.main(["--only", *few]) == 0
