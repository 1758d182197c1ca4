"""What is true of attention whatever computes it, and what it says to bad input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import attention, scaled_dot_product_attention
from fastattn.ops import philox
from fastattn.testing import poisoned

INF, NAN = math.inf, math.nan


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastattn.use_kernel(request.param):
        yield request.param


def qkv(
    batch: int = 2,
    heads: int = 2,
    q_len: int = 70,
    kv_len: int = 100,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_heads: int | None = None,
    grad: bool = False,
) -> list[Tensor]:
    shapes = (heads, q_len), (kv_heads or heads, kv_len), (kv_heads or heads, kv_len)
    return [torch.randn(batch, *shape, dim).to(dtype).requires_grad_(grad) for shape in shapes]


def grads(function: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random projection of the output."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return torch.autograd.grad(out, leaves, weights)


# softmax


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window": (5, 2)},
        {"softcap": 3.0},
        {"alibi_slopes": torch.tensor([0.5, 0.1])},
        {"scale": -2.0},
        {"mask": torch.arange(100) % 3 > 0},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_weights_sum_to_one(options: dict) -> None:
    query, key, _ = qkv()
    out = attention(query, key, torch.ones(2, 2, 100, 3), **options)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_weights_and_sink_sum_to_one() -> None:
    query, key, _ = qkv()
    sinks = torch.tensor([1.0, -2.0])
    out, lse = attention(query, key, torch.ones(2, 2, 100, 1), sinks=sinks, return_lse=True)
    torch.testing.assert_close(out[..., 0], 1 - torch.exp(sinks[:, None] - lse))


def test_keys_have_no_order() -> None:
    query, key, value = qkv(dtype=torch.float64)
    order = torch.randperm(100)
    torch.testing.assert_close(
        attention(query, key[:, :, order], value[:, :, order]), attention(query, key, value)
    )


def test_a_constant_added_to_a_row_shifts_lse_alone() -> None:
    query, key, value = qkv(dtype=torch.float64)
    shift = 3 * torch.randn(2, 2, 70, 1, dtype=torch.float64)
    out, lse = attention(query, key, value, return_lse=True)
    shifted, shifted_lse = attention(query, key, value, bias=shift, return_lse=True)
    torch.testing.assert_close(shifted, out)
    torch.testing.assert_close(shifted_lse, lse + shift[..., 0])


def test_lse_is_the_log_sum_of_exponentials() -> None:
    query, key, value = qkv(dtype=torch.float64, grad=True)
    lse = attention(query, key, value, return_lse=True)[1]
    scores = query @ key.mT / 4
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    found = torch.autograd.grad(lse.sin().sum(), (query, key))
    torch.testing.assert_close(
        found, torch.autograd.grad(scores.logsumexp(-1).sin().sum(), (query, key))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_scores_pick_the_largest(kernel: str, dtype: torch.dtype) -> None:
    dtype = torch.float32 if kernel == "reference" else dtype  # which rounds scores to the dtype
    query, key, value = qkv(q_len=5, kv_len=300, dtype=dtype)
    best = (query.double() @ key.double().mT).argmax(-1)
    out, lse = attention(query, key, value, scale=1e4, return_lse=True)
    assert lse.isfinite().all()
    torch.testing.assert_close(out, value.gather(2, best[..., None].expand(-1, -1, -1, 16)))
    for bias in (1e30, -1e30):
        level = attention(query, key, value, bias=torch.full((1,), bias), scale=0.0)
        torch.testing.assert_close(level, value.mean(2, keepdim=True).expand_as(level))


def test_a_late_maximum_rescales_what_came_before() -> None:
    query, key, value = qkv(q_len=3, kv_len=1000, dtype=torch.float64)
    bias = torch.linspace(-300, 300, 1000, dtype=torch.float64)
    scores = query @ key.mT / 4 + bias
    torch.testing.assert_close(attention(query, key, value, bias=bias), scores.softmax(-1) @ value)


# what may be seen


ALIGNMENTS = [
    (q_len, kv_len, align, causal, window)
    for (q_len, kv_len), align, causal, window in product(
        [(9, 9), (4, 11), (11, 4), (70, 260), (260, 70)],
        ["bottom_right", "top_left"],
        [False, True],
        [None, (0, 0), (3, None), (None, 2), (-1, 4), (2, 1), (100, 60)],
    )
    if causal or window
]


@pytest.mark.parametrize(("q_len", "kv_len", "align", "causal", "window"), ALIGNMENTS)
def test_bounds_are_those_of_a_written_mask(
    q_len: int, kv_len: int, align: str, causal: bool, window: tuple | None
) -> None:
    query, key, value = qkv(1, 2, q_len, kv_len, 8, dtype=torch.float64)
    left, right = (None if b in (None, -1) else b for b in window or (None, None))
    mask = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for row in range(q_len):
        own = row + (kv_len - q_len if align == "bottom_right" else 0)
        for column in range(kv_len):
            mask[row, column] = not (
                (left is not None and column < own - left)
                or (right is not None and column > own + right)
                or (causal and column > own)
            )
    bounds = {"align": align, "causal": causal, "window": window}
    out, lse = attention(query, key, value, **bounds, return_lse=True)
    masked, masked_lse = attention(query, key, value, mask=mask, return_lse=True)
    torch.testing.assert_close(out, masked)
    torch.testing.assert_close(lse, masked_lse)
    seen = mask.any(-1)
    assert (out[:, :, ~seen] == 0).all() and (lse[:, :, ~seen] == -INF).all()
    torch.testing.assert_close(
        grads(lambda *t: attention(*t, **bounds), [query, key, value]),
        grads(lambda *t: attention(*t, mask=mask), [query, key, value]),
    )


@pytest.mark.parametrize("length", [100, 300])
def test_causal_output_ignores_the_future(length: int) -> None:
    query, key, value = qkv(q_len=length, kv_len=length)
    now = length * 2 // 3
    out = attention(query, key, value, causal=True)
    for future in (7.0, NAN, INF, -INF):
        changed = [tensor.clone() for tensor in (query, key, value)]
        for tensor in changed:
            tensor[:, :, now:] = future
        again = attention(*changed, causal=True)
        if math.isfinite(future):
            assert again[:, :, :now].equal(out[:, :, :now])
        else:
            torch.testing.assert_close(again[:, :, :now], out[:, :, :now])
            assert again[:, :, now:].isnan().all()


def test_gradients_of_the_past_ignore_the_future() -> None:
    query, key, value = qkv(q_len=200, kv_len=200)
    other = [
        torch.cat([t[:, :, :150], torch.randn_like(t[:, :, 150:])], 2) for t in (query, key, value)
    ]
    past = grads(lambda *t: attention(*t, causal=True)[:, :, :150], [query, key, value])
    again = grads(lambda *t: attention(*t, causal=True)[:, :, :150], other)
    for grad, grad_again in zip(past, again, strict=True):
        torch.testing.assert_close(grad_again, grad)
        assert (grad[:, :, 150:] == 0).all() and (grad_again[:, :, 150:] == 0).all()


@pytest.mark.parametrize("rubbish", [NAN, INF, -INF])
@pytest.mark.parametrize("hide", ["mask", "bias", "window"])
def test_nothing_leaks_from_under_a_mask(hide: str, rubbish: float) -> None:
    """Keys that no query sees may hold anything: outputs and gradients are those of zeros there."""
    query, key, value = qkv(q_len=100, kv_len=100)
    visible = torch.arange(100) < 60
    options = {
        "mask": {"mask": visible},
        "bias": {"bias": torch.zeros(100).masked_fill(~visible, -INF)},
        "window": {"window": (None, -1), "align": "top_left"},
    }[hide]
    if hide == "window":  # queries 0 ... 59 with their own and earlier keys
        query, options = query[:, :, :60], {"causal": True, "align": "top_left"}
    clean, dirty = [query], [query]
    for tensor in (key, value):
        clean.append(tensor.masked_fill(~visible[:, None], 0))
        dirty.append(tensor.masked_fill(~visible[:, None], rubbish))
    out, lse = attention(*dirty, **options, return_lse=True)
    clean_out, clean_lse = attention(*clean, **options, return_lse=True)
    torch.testing.assert_close(out, clean_out)
    torch.testing.assert_close(lse, clean_lse)
    found = grads(lambda *t: attention(*t, **options), dirty)
    expected = grads(lambda *t: attention(*t, **options), clean)
    for grad, ref in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, ref)
    for grad in found[1:]:
        assert (grad[:, :, 60:] == 0).all()


def test_what_is_seen_is_not_hidden() -> None:
    """One NaN spoils the rows that see it, and only those."""
    for position in range(3):
        tensors = qkv(q_len=40, kv_len=40)
        tensors[position][:, :, 25, 3] = NAN
        out = attention(*tensors, causal=True)
        rows = out.isnan().any(-1)[0, 0].nonzero().flatten().tolist()
        assert rows == ([25] if position == 0 else list(range(25, 40)))


def test_a_query_that_sees_nothing_gives_zero() -> None:
    mask = torch.rand(2, 1, 70, 100) < 0.5
    mask[:, :, 10:20] = False
    query, key, value = qkv(grad=True)
    bias = torch.randn(2, 2, 70, 100, requires_grad=True)
    out, lse = attention(query, key, value, mask=mask, bias=bias, return_lse=True)
    assert (out[:, :, 10:20] == 0).all() and (lse[:, :, 10:20] == -INF).all()
    (out.sum() + lse.sum()).backward()
    for tensor in (query, key, value, bias):
        assert tensor.grad.isfinite().all()
    assert (query.grad[:, :, 10:20] == 0).all() and (bias.grad[:, :, 10:20] == 0).all()
    nothing = attention(query, key, value, mask=torch.zeros(1, dtype=torch.bool))
    for grad in torch.autograd.grad(nothing.sum(), (query, key, value)):
        assert (grad == 0).all()
    assert (nothing == 0).all()


def test_no_keys_give_zero(kernel: str) -> None:
    query, key, value = qkv(kv_len=0, grad=True)
    if kernel == "cpu":
        with pytest.raises(fastattn.UnavailableKernelError, match="empty"):
            attention(query, key, value)
        return
    out, lse = attention(query, key, value, return_lse=True)
    assert out.equal(torch.zeros_like(out)) and (lse == -INF).all()
    (out.sum() + lse.sum()).backward()
    assert query.grad.equal(torch.zeros_like(query)) and key.grad.shape == key.shape
    sinks = torch.tensor([2.0, 3.0])
    assert attention(query, key, value, sinks=sinks, return_lse=True)[1][0, :, 0].equal(sinks)


# features


def test_grouped_heads_are_repeated_heads() -> None:
    query, key, value = qkv(heads=6, kv_heads=2)

    def repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1))

    torch.testing.assert_close(attention(query, key, value), repeated(query, key, value))
    torch.testing.assert_close(
        grads(attention, [query, key, value]), grads(repeated, [query, key, value])
    )


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_terms_of_the_scores(align: str) -> None:
    """softcap, bias, ALiBi and sinks as their papers write them, in this order."""
    query, key, value = qkv(q_len=20, kv_len=33, dtype=torch.float64)
    bias = torch.randn(2, 20, 33, dtype=torch.float64)
    slopes, sinks = torch.tensor([[0.5, 0.1], [0.2, 0.7]]), torch.randn(2, dtype=torch.float64)

    def written(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        scores = 2.5 * torch.tanh(0.3 * query @ key.mT / 2.5) + bias
        own = torch.arange(20)[:, None] + (13 if align == "bottom_right" else 0)
        scores = scores - slopes.double()[:, :, None, None] * (own - torch.arange(33)).abs()
        column = sinks[None, :, None, None].expand(2, 2, 20, 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :33] @ value

    def ours(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
        return attention(
            query,
            key,
            value,
            bias=bias,
            sinks=sinks,
            alibi_slopes=slopes,
            align=align,
            scale=0.3,
            softcap=2.5,
        )

    leaves = [query, key, value, bias, sinks]
    torch.testing.assert_close(ours(*leaves), written(*leaves))
    torch.testing.assert_close(grads(ours, leaves), grads(written, leaves))


@pytest.mark.parametrize("rows", [1, 5])
def test_bias_of_one_key_changes_nothing(rows: int) -> None:
    """Nor is its gradient what its memory held before."""
    tensors = [*qkv(q_len=rows, kv_len=1), torch.randn(2, rows, 1)]
    with poisoned():
        *_, grad = grads(lambda q, k, v, b: attention(q, k, v, bias=b), tensors)
    assert grad.abs().max() < 1e-5


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 100), (1, 2, 70, 1), (2, 1, 1, 1), (70, 100), (100,), (2, 2, 1, 100), ()]
)
def test_gradient_of_bias_sums_where_it_broadcasts(shape: tuple[int, ...]) -> None:
    query, key, value = qkv(dtype=torch.float64)
    bias = torch.randn(shape, dtype=torch.float64)
    mask = torch.rand(2, 2, 70, 100) < 0.7  # else what broadcasts over keys would cancel

    def short(bias: Tensor) -> Tensor:
        return attention(query, key, value, bias=bias, mask=mask, sinks=torch.ones(2))

    (found,) = grads(short, [bias])
    (whole,) = grads(short, [bias.expand(2, 2, 70, 100).contiguous()])
    torch.testing.assert_close(found, whole.sum_to_size(shape))


def test_output_is_laid_out_for_the_projection() -> None:
    assert attention(*qkv()).transpose(1, 2).is_contiguous()


def test_one_tensor_as_query_key_and_value() -> None:
    (x, *_) = qkv(kv_len=70)
    (found,) = grads(lambda x: attention(x, x, x), [x])
    torch.testing.assert_close(found, sum(grads(attention, [x, x.clone(), x.clone()])))


def test_slopes_learn_on_the_reference_only(kernel: str) -> None:
    slopes = torch.rand(2, requires_grad=True)
    if kernel == "cpu":
        with pytest.raises(fastattn.UnavailableKernelError, match="alibi_slopes requires a grad"):
            attention(*qkv(), alibi_slopes=slopes)
    else:
        attention(*qkv(), alibi_slopes=slopes).square().sum().backward()
        assert (slopes.grad != 0).all()


# dropout


def weights_of(kernel: str, p: float, seed: int, q_len: int = 65, kv_len: int = 130) -> Tensor:
    """The attention weights themselves: uniform scores, an identity for the values."""
    query, key = torch.zeros(2, 3, q_len, 4), torch.zeros(2, 3, kv_len, 4)
    value = torch.eye(kv_len).expand(2, 3, -1, -1)
    with fastattn.use_kernel(kernel):
        return attention(query, key, value, dropout_p=p, seed=seed)


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 17, 2**63 - 1])
def test_dropout_is_philox_counted_by_position(kernel: str, seed: int) -> None:
    weights = weights_of(kernel, 0.3, seed)
    kept = philox.keep(torch.tensor([seed]), 6, 65, 130, 0.3).view(2, 3, 65, 130)
    assert ((weights != 0) == kept).all()
    torch.testing.assert_close(weights[kept], torch.full_like(weights[kept], 1 / 130 / 0.7))
    smaller = weights_of(kernel, 0.3, seed, q_len=20, kv_len=50)
    assert ((smaller != 0) == kept[:, :, :20, :50]).all()


def test_philox_gives_the_published_numbers() -> None:
    """The known answers of Random123 for philox4x32-10."""
    for counter, key, answer in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        words = philox.philox_4x32_10(
            [torch.tensor(c) for c in counter], [torch.tensor(k) for k in key]
        )
        assert [word.item() for word in words] == answer


def test_dropout_keeps_the_mean(kernel: str) -> None:
    weights = torch.stack([weights_of(kernel, 0.25, seed) for seed in range(20)])
    n = weights.numel()
    dropped = (weights == 0).double().mean().item()
    assert abs(dropped - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    assert abs(weights.double().mean().item() * 130 - 1) < 5 * math.sqrt(0.25 / 0.75 / n)
    assert not weights[0].equal(weights[1])


def test_dropout_seeds_come_from_torch_unless_given(kernel: str) -> None:
    tensors = qkv(q_len=8, kv_len=8)
    torch.manual_seed(5)
    first, second = (attention(*tensors, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert attention(*tensors, dropout_p=0.5).equal(first)
    assert not first.equal(second)
    state = torch.get_rng_state()
    seeded = attention(*tensors, dropout_p=0.5, seed=9)
    assert torch.get_rng_state().equal(state), "a given seed must leave torch's generator alone"
    assert attention(*tensors, dropout_p=0.5, seed=torch.tensor([9])).equal(seeded)
    attention(*tensors)
    assert torch.get_rng_state().equal(state), "no dropout must draw no seed"
    assert (attention(*tensors, dropout_p=1.0) == 0).all()


# torch's own function


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=["2d", "3d", "4d", "5d"])
@pytest.mark.parametrize("mask", [None, "causal", "bool", "float", "row", "single", "empty_rows"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_sdpa_is_torchs(lead: tuple[int, ...], mask: str | None, scale: float | None) -> None:
    query = torch.randn(*lead, 11, 8, dtype=torch.float64)
    key, value = torch.randn(*lead, 7, 8).double(), torch.randn(*lead, 7, 5).double()
    attn_mask = {
        "bool": torch.rand(11, 7) < 0.7,
        "float": torch.randn(*lead, 11, 7).double(),
        "row": torch.randn(1, 7).double(),
        "single": torch.randn(11, 1).double(),
        "empty_rows": (torch.arange(11) % 3 > 0)[:, None].expand(11, 7),
    }.get(mask)
    options = {"is_causal": mask == "causal", "scale": scale}
    leaves = [query, key, value]
    if attn_mask is not None and attn_mask.is_floating_point() and mask != "single":
        leaves.append(attn_mask)
    elif attn_mask is not None:
        options["attn_mask"] = attn_mask

    def ours(*t: Tensor) -> Tensor:
        return scaled_dot_product_attention(*t, **options)

    def torchs(*t: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*t, **options)

    torch.testing.assert_close(ours(*leaves), torchs(*leaves))
    torch.testing.assert_close(grads(ours, leaves), grads(torchs, leaves))


@pytest.mark.parametrize("lead", [(), (2,), (2, 2)], ids=["3d", "4d", "5d"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_groups_heads_as_torch(lead: tuple[int, ...], is_causal: bool) -> None:
    query = torch.randn(*lead, 6, 9, 8)
    key, value = torch.randn(*lead, 2, 9, 8), torch.randn(*lead, 2, 9, 8)
    options = {"is_causal": is_causal, "enable_gqa": True}
    torch.testing.assert_close(
        scaled_dot_product_attention(query, key, value, **options),
        F.scaled_dot_product_attention(query, key, value, **options),
    )


def test_a_relative_bias_is_never_a_matrix(peak_growth: Callable[..., int], kernel: str) -> None:
    drawn = (
        "x, r = (torch.randn(size, requires_grad=True) for size in ((2, 2, {0}, 4), 2 * {0} - 1))"
    )
    step = f"{drawn}\nfastattn.attention(x, x, x, relative_bias=r).sum().backward()"
    before, code = "import torch, fastattn\n" + step.format(200), step.format(2048)
    grown, matrix = peak_growth(before, code, FASTATTN_KERNEL=kernel), 2048 * 2048 * 4
    assert grown > matrix if kernel == "reference" else grown < matrix / 2


def test_sdpa_broadcasts_as_torch() -> None:
    query, key, value = torch.randn(2, 3, 9, 8), torch.randn(1, 3, 7, 8), torch.randn(2, 1, 7, 8)
    torch.testing.assert_close(
        scaled_dot_product_attention(query, key, value),
        F.scaled_dot_product_attention(query, key.expand(2, 3, 7, 8), value.expand(2, 3, 7, 8)),
    )
    for attn_mask in (torch.randn(3, 1, 7), torch.randn(2, 1, 9, 7), torch.randn(1, 1, 1, 7)):
        torch.testing.assert_close(
            scaled_dot_product_attention(
                query, query, query, attn_mask.expand(2, 3, 9, 7)[..., :1]
            ),
            F.scaled_dot_product_attention(
                query, query, query, attn_mask.expand(2, 3, 9, 7)[..., :1]
            ),
        )


def test_sdpa_takes_an_fp32_mask_with_narrow_inputs() -> None:
    query, key, value = qkv(dtype=torch.bfloat16)
    mask = torch.randn(70, 100)
    found = scaled_dot_product_attention(query, key, value, mask)
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), mask)
    torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
