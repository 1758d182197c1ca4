"""The benchmark's rows of whole models: what transformers and other runtimes are given matches."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

# bench is run from the checkout, not installed
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import baselines, cases, models, parity, report
from bench.kinds import Case, Generation, Model
from bench.rows import Row
from fastattn.models import gpt2, t5

RUNTIMES = {
    "onnxruntime": ["onnxruntime", "onnx", "onnxscript"],
    "openvino": ["openvino"],
}
GENERATION = [case for case in cases.CASES if isinstance(case, Generation)]
transformers = pytest.mark.skipif(
    models.missing({"transformers": "transformers"}) is not None,
    reason=str(models.missing({"transformers": "transformers"})),
)


@transformers
@pytest.mark.parametrize("case", GENERATION, ids=lambda case: case.name)
def test_models_that_write_match_each_time(monkeypatch, case):
    monkeypatch.setitem(gpt2.SIZES, "gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 32})
    small = {"num_layers": 2, "num_heads": 2, "d_model": 32, "d_ff": 64}
    monkeypatch.setitem(t5.SIZES, "t5-small", small)
    made, dtype = (
        baselines.build(dataclasses.replace(case, **case.tiny)),
        getattr(torch, case.dtype),
    )
    for provider in ("fused", "eager", "sdpa"):
        for _ in range(2):  # a cache must be as before
            verdict = parity.judge(made, provider, parity.run(made, provider), dtype)
            assert verdict.matches, (provider, verdict)
    assert (made.flops is None) != (made.traffic is None)


@transformers
def test_runtimes_race_in_fp32_alone(monkeypatch):
    monkeypatch.setitem(gpt2.SIZES, "gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 32})
    case = Generation(task="decode", batch=1, seq=16, dtype="bfloat16")
    assert list(baselines.build(case, compiled=True).calls) == ["fused", "eager", "sdpa", "compile"]


def exported(case: Case, runtime: str) -> parity.Verdict:
    """What becomes of the output of a case's model in a runtime for exported models."""
    for package in RUNTIMES[runtime]:
        pytest.importorskip(package, reason=f"pip install {' '.join(RUNTIMES[runtime])}")
    made = baselines.build(case, compiled=True)
    return parity.judge(made, runtime, parity.run(made, runtime), torch.float32)


@pytest.mark.skipif(models.missing() is not None, reason=str(models.missing()))
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_exported_bert_matches(runtime):
    verdict = exported(Model(weights="bert-tiny", batch=2), runtime)
    assert verdict.matches, verdict


@transformers
@pytest.mark.parametrize("task", ["prefill", "decode"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_exported_gpt2_matches(monkeypatch, runtime, task):
    monkeypatch.setitem(gpt2.SIZES, "gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 32})
    verdict = exported(Generation(task=task, **Generation.tiny | {"written": 0}), runtime)
    assert verdict.matches, verdict


def test_a_token_at_a_time_is_told_in_tokens_per_second():
    words = dict.fromkeys(("case", "group", "title", "shape", "dtype", "provider", "status"), "")
    assert report.rate(Row(**words, passes="token", gbs=1.0, median_ms=40.0)) == "25.0 tokens/s"
    assert report.rate(Row(**words, passes="fwd", gbs=1.5, median_ms=40.0)) == "1.50 GB/s"
