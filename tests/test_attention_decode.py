"""What is true of a cache: steps are full causal attention, pages change nothing, nothing leaks."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import attention, attention_decode
from fastattn.ops.attention import reference
from fastattn.testing import use_threads

HEADS, KV_HEADS, DIM = 4, 2, 16


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    with fastattn.use_kernel(request.param):
        yield request.param


def qkv(batch: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        torch.randn(batch, heads, length, DIM, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def caches(batch: int, room: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """What nobody has written yet is NaN."""
    return [torch.full((batch, KV_HEADS, room, DIM), math.nan, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("options", [{}, {"window": (9, None)}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("interleaved", [None, False, True], ids=["plain", "halves", "neighbours"])
def test_steps_are_full_causal_attention(options: dict, interleaved: bool | None) -> None:
    query, key, value = qkv(2, 40)
    key_cache, value_cache = caches(2, 50)
    angles = torch.rand(50, 5, dtype=torch.float64) * 6
    rotary = {}
    if interleaved is not None:
        rotary = {
            "rotary_cos": angles.cos(),
            "rotary_sin": angles.sin(),
            "rotary_interleaved": interleaved,
        }
    steps, done = [], 0
    for size in (17, 1, 1, 4, 1, 16):
        now = slice(done, done + size)
        steps.append(
            attention_decode(
                query[:, :, now],
                key_cache,
                value_cache,
                key=key[:, :, now],
                value=value[:, :, now],
                cache_seqlens=done,
                causal=True,
                **rotary,
                **options,
            )
        )
        done += size
    if interleaved is not None:
        tables = angles.cos(), angles.sin(), 0, interleaved
        query, key = (torch.stack([reference.rotated(x, *tables) for x in t]) for t in (query, key))
    full = attention(query, key, value, causal=True, **options)
    torch.testing.assert_close(torch.cat(steps, 2), full)
    torch.testing.assert_close(key_cache[:, :, :40], key)
    assert value_cache[:, :, :40].equal(value)
    assert key_cache[:, :, 40:].isnan().all() and value_cache[:, :, 40:].isnan().all()


def test_rotation_keeps_lengths_and_differences() -> None:
    """Scores depend on the distance of positions alone, in either convention."""
    angles = torch.arange(60, dtype=torch.float64)[:, None] * torch.rand(8, dtype=torch.float64)
    x = torch.randn(1, 1, DIM, dtype=torch.float64)
    y = torch.randn(1, 1, DIM, dtype=torch.float64)
    for interleaved in (False, True):

        def turned(x: Tensor, position: int, interleaved: bool = interleaved) -> Tensor:
            return reference.rotated(x, angles.cos(), angles.sin(), position, interleaved)

        torch.testing.assert_close(turned(x, 33).norm(), x.norm())
        torch.testing.assert_close(
            (turned(x, 50) * turned(y, 43)).sum(), (turned(x, 7) * turned(y, 0)).sum()
        )
        assert not turned(x, 7).allclose(x)


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_rotation_by_no_angles_turns_nothing(interleaved: bool) -> None:
    query, key, value = qkv(1, 6)
    seqlens, none = torch.tensor([6]), torch.zeros(6, 0, dtype=torch.float64)
    with fastattn.use_kernel("reference"):  # the others refuse what is empty
        still = attention_decode(query, key, value, cache_seqlens=seqlens)
        turned = attention_decode(
            query,
            key,
            value,
            cache_seqlens=seqlens,
            rotary_cos=none,
            rotary_sin=none,
            rotary_interleaved=interleaved,
        )
    assert turned.equal(still)


@pytest.mark.parametrize("window", [None, (50, None)], ids=["all", "window"])
@pytest.mark.parametrize("queries", [3, 30])
@pytest.mark.parametrize("page", [1, 5, 16, 320])
def test_pages_change_nothing(page: int, queries: int, window: tuple | None) -> None:
    batch, room, lengths = 3, 320, torch.tensor([290, 4, 131])
    key_cache, value_cache = (
        torch.randn(batch, KV_HEADS, room, DIM, dtype=torch.float32) for _ in range(2)
    )
    columns = room // page
    table = torch.randperm(batch * columns).view(batch, columns)
    paged = []
    for cache in (key_cache, value_cache):
        own = cache.view(batch, KV_HEADS, columns, page, DIM).transpose(1, 2).flatten(0, 1)
        paged.append(torch.empty_like(own).index_copy_(0, table.flatten(), own))
    query, key, value = qkv(batch, queries, torch.float32)
    new = {"key": key, "value": value, "cache_seqlens": lengths, "causal": True, "window": window}
    whole = attention_decode(query, key_cache, value_cache, **new)
    split = attention_decode(query, *paged, block_table=table.int(), **new)
    assert split.equal(whole)
    for cache, pages in zip((key_cache, value_cache), paged, strict=True):
        own = pages[table.flatten()].view(batch, columns, KV_HEADS, page, DIM)
        assert own.transpose(1, 2).flatten(2, 3).equal(cache)


@pytest.mark.parametrize("queries", [1, 12])
def test_what_is_not_in_use_is_not_read(queries: int) -> None:
    """Neither positions beyond a length nor entries of the table beyond the pages in use."""
    query = torch.randn(2, HEADS, queries, DIM)
    key_cache, value_cache = (torch.randn(6, KV_HEADS, 4, DIM) for _ in range(2))
    lengths, table = torch.tensor([5, 3]), torch.tensor([[2, 5, -1], [4, 10**6, 7]])
    out = attention_decode(query, key_cache, value_cache, cache_seqlens=lengths, block_table=table)
    for cache in (key_cache, value_cache):
        for page, used in enumerate([0, 0, 4, 0, 3, 1]):
            cache[page, :, used:] = math.nan
    again = attention_decode(
        query, key_cache, value_cache, cache_seqlens=lengths, block_table=table
    )
    torch.testing.assert_close(again, out)


@pytest.mark.parametrize("queries", [5, 12])
def test_a_hidden_key_does_not_leak(queries: int) -> None:
    query, key, value = qkv(1, 300, torch.float32)
    for tensor in (key, value):
        tensor[:, :, 298] = math.nan
        tensor[:, :, 10] = math.inf
    rows, before = query[:, :, :queries], slice(queries - 2)  # those that come before the NaN
    options = {"cache_seqlens": 300, "causal": True, "window": (200, None)}
    out = attention_decode(rows, key, value, **options)
    assert out[:, :, before].isfinite().all() and out[:, :, queries - 2 :].isnan().all()
    clean = [tensor.nan_to_num(0, 0, 0) for tensor in (key, value)]
    expected = attention_decode(rows, *clean, **options)
    torch.testing.assert_close(out[:, :, before], expected[:, :, before])


@pytest.mark.parametrize("queries", [1, 9])
def test_a_sequence_without_keys_gives_zero(queries: int) -> None:
    query, key, value = qkv(2, 9)
    query = query[:, :, :queries]
    sinks = torch.randn(HEADS, dtype=torch.float64)
    options = {"cache_seqlens": torch.tensor([0, 9]), "return_lse": True}
    out, lse = attention_decode(query, key, value, **options)
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all() and lse[1].isfinite().all()
    out, lse = attention_decode(query, key, value, sinks=sinks, **options)
    assert (out[0] == 0).all()
    torch.testing.assert_close(lse[0], sinks[:, None].expand(HEADS, queries))


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", ["cpu"], indirect=True)
def test_bits_depend_on_no_other_sequence_and_no_thread(
    kernel: str, dtype: torch.dtype, queries: int
) -> None:
    lengths = (3000, 17, 700)
    query, key, value = qkv(3, 3000, dtype)
    query = query[:, :, :queries]
    found = []
    for threads in (1, 2, 3):
        with use_threads(threads):
            options = {"cache_seqlens": torch.tensor(lengths)}
            found.append(attention_decode(query, key, value, **options))
    assert found[0].equal(found[1]) and found[0].equal(found[2])
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        alone = attention_decode(query[one], key[one], value[one], cache_seqlens=length)
        assert alone.equal(found[0][one])


def test_autograd_notices_what_was_written() -> None:
    query, key, value = qkv(1, 1)
    key_cache, value_cache = caches(1, 4)
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    product = (weight * key_cache).sum()
    before = value_cache._version
    attention_decode(query, key_cache, value_cache, cache_seqlens=0)
    assert value_cache._version == before, "nothing is written without new keys"
    attention_decode(query, key_cache, value_cache, key=key, value=value, cache_seqlens=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_gradients_are_refused_in_words() -> None:
    tensors = dict(zip(("query", "key_cache", "value_cache"), qkv(1, 4), strict=True))
    for name in tensors:
        given = tensors | {name: tensors[name].clone().requires_grad_()}
        with pytest.raises(ValueError, match=f"{name} must not require a gradient.*no_grad"):
            attention_decode(**given, cache_seqlens=4)
        with torch.no_grad():
            attention_decode(**given, cache_seqlens=4)


def test_autocast_takes_the_dtype_of_the_cache() -> None:
    query, key, value = qkv(1, 2, torch.float32)
    key_cache, value_cache = caches(1, 4, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention_decode(
            query, key_cache, value_cache, key=key, value=value, cache_seqlens=0, causal=True
        )
    assert out.dtype == torch.bfloat16
    assert key_cache[:, :, :2].equal(key.bfloat16())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kernel", ["cpu"], indirect=True)  # the reference reads lengths
def test_compiles_into_one_graph(kernel: str, backend: str) -> None:
    if backend == "inductor" and shutil.which("c++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=backend, dynamic=False)
    def step(query: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        key_cache, value_cache, key, value, lengths = tensors
        out = attention_decode(
            query * 2, key_cache, value_cache, key=key, value=value, cache_seqlens=lengths
        )
        return out + 1, key_cache.clone()

    query, key, value = qkv(2, 1, torch.float32)
    found, expected = caches(2, 9, torch.float32), caches(2, 9, torch.float32)
    for length in range(4):
        lengths = torch.tensor([length, 2 * length])
        for cache in (*found, *expected):
            cache[:, :, 0].nan_to_num_(0.5)
            cache[1, :, : 2 * length].nan_to_num_(0.5)
        out, copied = step(query, *found, key, value, lengths)
        new = {"key": key, "value": value, "cache_seqlens": lengths}
        plain = attention_decode(query * 2, *expected, **new) + 1
        torch.testing.assert_close(out, plain)
        for cache, ref in zip((*found, copied), (*expected, expected[0]), strict=True):
            assert cache.nan_to_num(7).equal(ref.nan_to_num(7))
    with pytest.raises(RuntimeError, match="cache_seqlens"):
        step(query, *found, key, value, torch.tensor([0, 9]))
