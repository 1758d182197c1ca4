"""Which kernel a call runs on, how that is forced, and how a refusal is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import _library, dispatch
from fastattn.testing import cases

built = pytest.mark.skipif(
    _library.LIBRARY is None, reason=f"no compiled library: {_library.WHY_NOT}"
)
ROWS = torch.ones(2, 8)


@built
def test_explain_names_the_kernel() -> None:
    query = torch.zeros(1, 2, 4, 8)
    choice = fastattn.explain("attention", query, query, query, causal=True)
    assert choice == ("cpu", {})
    assert str(choice) == "cpu: chosen"


def test_explain_gives_reasons() -> None:
    choice = fastattn.explain("layer_norm", ROWS.to("meta"), [8])
    assert choice.kernel == "reference"
    assert any("meta" in reason for reason in choice.refused["cpu"])
    assert "cpu: " in str(choice)


def test_explain_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="function_name must be one of"):
        fastattn.explain("softmax", ROWS)
    with pytest.raises(ValueError, match="normalized_shape"):
        fastattn.explain("layer_norm", ROWS, [7])


@pytest.mark.parametrize("name", sorted(fastattn.registry.FUNCTIONS))
def test_explain_knows_every_function(name: str) -> None:
    case = cases(name)[0]
    arguments = {**case.inputs(torch.float32), **case.options}
    with fastattn.use_kernel("reference"):
        assert fastattn.explain(name, **arguments).kernel == "reference"


@built
def test_use_kernel_forces_and_restores() -> None:
    before = fastattn.explain("rms_norm", ROWS, [8]).kernel
    with fastattn.use_kernel("reference"):
        assert fastattn.explain("rms_norm", ROWS, [8]).kernel == "reference"
        with fastattn.use_kernel("cpu"):
            assert fastattn.explain("rms_norm", ROWS, [8]).kernel == "cpu"
    assert fastattn.explain("rms_norm", ROWS, [8]).kernel == before


def test_forced_and_unavailable_is_an_error() -> None:
    with fastattn.use_kernel("cpu"), pytest.raises(fastattn.UnavailableKernelError, match="meta"):
        fastattn.layer_norm(ROWS.to("meta"), [8])


def test_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of"), fastattn.use_kernel("tpu"):
        pass


def test_environment_forces_a_kernel(python) -> None:
    code = (
        "import torch, fastattn; print(fastattn.explain('rms_norm', torch.ones(2, 8), [8]).kernel)"
    )
    assert python("-c", code, FASTATTN_KERNEL="reference").stdout.strip() == "reference"
    found = python("-c", code, FASTATTN_KERNEL="tpu")
    assert found.returncode != 0
    assert "FASTATTN_KERNEL must be one of" in found.stderr


def test_a_refusal_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._told.clear()
    with caplog.at_level("WARNING", "fastattn"):
        for _ in range(3):
            fastattn.layer_norm(ROWS.to("meta"), [8])
    assert len(caplog.records) == 1
    assert "meta" in caplog.text


def test_debug_logs_every_call(python) -> None:
    code = "import torch, fastattn\nfor _ in range(3): fastattn.rms_norm(torch.ones(2, 8), [8])"
    assert python("-c", code, FASTATTN_LOG="debug").stderr.count("rms_norm") == 3
    assert python("-c", code).stderr == ""


def test_backends() -> None:
    found = fastattn.backends()
    assert list(found) == list(dispatch.KERNELS)
    assert found["reference"] == ""
    assert (found["cpu"] == "") == (_library.LIBRARY is not None)


def test_without_a_library_the_reference_runs(python, tmp_path: Path) -> None:
    package = Path(fastattn.__file__).parent
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package, tmp_path / "fastattn", ignore=ignore)
    code = (
        "import torch, fastattn; x = torch.randn(2, 8, requires_grad=True);"
        "out = fastattn.rms_norm(x, [8]); out.sum().backward();"
        "print(x.grad is not None, fastattn.isa());"
        "print(fastattn.backends()['cpu'])"
    )
    found = python("-c", code, package=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[0] == "True None"
    assert "was not built" in found.stdout
    assert "was not built" in found.stderr  # and the user was told at the call


def test_info(python) -> None:
    text = python("-m", "fastattn", "info")
    assert text.returncode == 0, text.stderr
    assert fastattn.__version__ in text.stdout
    assert "instruction sets" in text.stdout
    found = json.loads(python("-m", "fastattn", "info", "--json", FASTATTN_LOG="error").stdout)
    assert found["torch"] == torch.__version__
    assert found["kernels"] == fastattn.backends()
    assert found["environment"] == {"FASTATTN_LOG": "error"}
    assert python("-m", "fastattn").returncode == 2
