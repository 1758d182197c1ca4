"""The examples run, and what they train learns something."""

from __future__ import annotations

import runpy
from pathlib import Path

import model_parity
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_characters(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("rich", "matplotlib"):
        pytest.importorskip(package, reason='pip install "fastattn[test]"')
    main = runpy.run_path(str(EXAMPLES / "characters.py"))["main"]
    curve = tmp_path / "loss.png"
    with model_parity.one_seed_and_thread():
        held_out = main(["--model", model, "--steps", "30", "--width", "32", "--plot", str(curve)])
    assert held_out < 4.0  # uniform over some 100 characters would be 4.6
    assert curve.stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "ms on eager PyTorch" in printed and "The statement " in printed
