"""Which kernel a call runs on, how that is forced, and how a refusal is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import _library, dispatch
from fastattn.ops import norm
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


HEADS, TOKENS = torch.randn(2, 2, 4, 8), torch.randn(2, 3, 8)
WEIGHT, VECTOR = torch.randn(8, 8), torch.randn(8)
TABLE = torch.randn(4, 4)
PLAIN = {
    "layer_norm": lambda: fastattn.layer_norm(TOKENS, [8], VECTOR, VECTOR),
    "add_layer_norm": lambda: fastattn.add_layer_norm(TOKENS, TOKENS, 8, VECTOR)[1],
    "rms_norm": lambda: fastattn.rms_norm(TOKENS, (3, 8)),
    "add_rms_norm": lambda: fastattn.add_rms_norm(TOKENS, TOKENS, (8,), return_sum=False),
    "linear": lambda: fastattn.linear(TOKENS, WEIGHT, VECTOR, "gelu"),
    "ffn": lambda: fastattn.ffn(TOKENS, WEIGHT, WEIGHT, gate_weight=WEIGHT, activation="silu"),
    "attention": lambda: fastattn.attention(HEADS, HEADS, HEADS, causal=True, scale=0.5),
    "bias": lambda: fastattn.attention(HEADS, HEADS, HEADS, bias=HEADS[:1, :1, :, :4]),
    "scaled_dot_product_attention": lambda: fastattn.scaled_dot_product_attention(
        HEADS, HEADS, HEADS, HEADS[..., :4] > 0
    ),
    "attention_decode": lambda: fastattn.attention_decode(
        HEADS, HEADS.clone(), HEADS.clone(), cache_seqlens=0, key=HEADS, value=HEADS
    ),
    "apply_rope": lambda: fastattn.apply_rope(HEADS, HEADS, TABLE, TABLE)[1],
}


def refuse(*args: object) -> None:
    raise AssertionError("the long way")


@built
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_call_goes_straight_to_the_kernel(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(dispatch, "choose", refuse)
        straight = PLAIN[name]()
    with torch.no_grad(), monkeypatch.context() as patched:
        patched.setattr(dispatch, "plain", lambda: False)
        assert torch.equal(straight, PLAIN[name]())


@built
def test_a_plain_call_is_differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    x = TOKENS.clone().requires_grad_()

    def gradient() -> torch.Tensor:
        out = fastattn.ffn(fastattn.rms_norm(x, [8]), WEIGHT, WEIGHT)
        return torch.autograd.grad(out.square().sum(), x)[0]

    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "plain", lambda: False)
        checked = gradient()
    monkeypatch.setattr(dispatch, "choose", refuse)
    assert torch.equal(gradient(), checked)


@built
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.Tensor._make_subclass(type("Own", (torch.Tensor,), {}), ROWS),
        lambda: ROWS.to("meta"),
        lambda: ROWS.to_sparse(),
        lambda: torch.nested.nested_tensor([ROWS, ROWS]),
        lambda: [1.0],
        lambda: 1.0,
    ],
    ids=["subclass", "meta", "sparse", "nested", "list", "number"],
)
@pytest.mark.parametrize("gradient", [False, True], ids=["", "gradient"])
def test_what_is_no_plain_tensor_takes_the_long_way(
    make: Callable[[], object], gradient: bool
) -> None:
    rows = ROWS.clone().requires_grad_(gradient)
    assert torch.equal(
        norm.PLAIN_ADD_RMS_NORM(rows, rows, None, [8], 1.0, True)[1].detach(), 2 * ROWS
    )
    assert norm.PLAIN_ADD_RMS_NORM(rows, make(), None, [8], 1.0, True) is None
    assert norm.PLAIN_ADD_RMS_NORM(make(), rows, None, [8], 1.0, True) is None
    assert norm.PLAIN_ADD_RMS_NORM(rows, None, None, [8], 1.0, True) is None
    assert norm.PLAIN_ADD_RMS_NORM(rows, rows, make(), [8], 1.0, True) is None


def test_where_something_else_decides_calls_take_the_long_way() -> None:
    with fastattn.use_kernel("reference"):
        assert not dispatch.plain()
    with torch.autocast("cpu"):
        assert not dispatch.plain()
    with TorchDispatchMode():
        assert not dispatch.plain()
    seen = []
    torch.func.vmap(lambda row: seen.append(dispatch.plain()) or row)(ROWS)
    with torch.autograd.forward_ad.dual_level():
        seen.append(dispatch.plain())
    assert seen == [False, False]


def test_a_refused_append_writes_nothing() -> None:
    cache, new = torch.zeros(2, 2, 4, 8), torch.ones(2, 2, 1, 8)
    with torch.no_grad(), pytest.raises(ValueError, match="key_cache must be"):
        fastattn.attention_decode(
            torch.ones(2, 2, 1, 6), cache, cache, cache_seqlens=1, key=new, value=new
        )
    assert not cache.any()


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
