"""GPU kernels of packed sequences and of a cache in the emulator, CUDA's and Triton's: boundaries,
pages, memory, leaks, refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import attention_decode, registry
from fastattn.emulator import device
from fastattn.testing import Case, Draw, assert_case_close_to_oracle, cases, laid_out, run

CASES = {case.name: case for case in cases("attention_decode")}


@pytest.fixture(params=["emulator", "triton-emulator"], autouse=True)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    if why_not := fastattn.backends()[request.param]:
        pytest.skip(why_not)
    with fastattn.use_kernel(request.param):
        yield request.param


in_cuda = pytest.mark.parametrize("kernel", ["emulator"], indirect=True)


# packed sequences


@pytest.mark.parametrize(
    ("starts", "longest"),
    [([1, 5, 9], 9), ([0, 5, 8], 9), ([0, 9, 5], 9), ([-1, 0, 9], 9), ([0, 5, 9], 4)],
)
def test_boundaries_that_are_none_stop_the_kernels(
    kernel: str, starts: list[int], longest: int
) -> None:
    """Those of queries and those of keys, which the host does not read."""
    prepare = registry.FUNCTIONS["attention_varlen"][0]
    good = torch.tensor([0, 4, 9])
    args = prepare(*torch.randn(3, 9, 2, 16).bfloat16(), good, good, 9, 9)
    ops = torch.ops.fastattn.attention_fwd
    forward = ops.triton if kernel in registry.TRITON else ops.default
    forward(*args)
    for of_keys in (0, 1):
        bad = list(args)
        bad[8 + of_keys], bad[16 + of_keys] = torch.tensor(starts), longest
        with pytest.raises(RuntimeError, match="trap"):
            forward(*bad)


def test_many_sequences_are_found() -> None:
    """More than a warp looks at at a time, most of them short, in numbers of either width and any
    stride."""
    lengths = torch.tensor([n % 4 for n in range(70)] + [80])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tensors = [torch.randn(int(starts[-1]), 1, 16) for _ in range(3)]
    with fastattn.use_kernel("cpu"):
        expected = fastattn.attention_varlen(*tensors, starts, starts, causal=True)
    for given in (starts, starts.int(), starts.repeat_interleave(2)[::2]):
        found = fastattn.attention_varlen(*tensors, given, starts, causal=True)
        torch.testing.assert_close(found, expected)


# a cache


def cached(
    length: int, head_dim: int = 16, heads: tuple[int, int] = (4, 2), batch: int = 1
) -> list[Tensor]:
    """A query of one position, and caches of keys and values."""
    query = torch.randn(batch, heads[0], 1, head_dim)
    return [query, *(torch.randn(batch, heads[1], length, head_dim) for _ in range(2))]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [
        (torch.float32, 128, 72),
        (torch.bfloat16, 72, 128),
        (torch.float16, 256, 40),
    ],
)
def test_wide_heads(kernel: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    tensors = {
        "query": Draw((1, 4, 1, head_dim)),
        "key_cache": Draw((1, 2, 300, head_dim), "distinct"),
        "value_cache": Draw((1, 2, 300, value_dim), "distinct"),
    }
    options = {"cache_seqlens": 290, "return_lse": True}
    case = Case("attention_decode", f"wide_{head_dim}", tensors, options, inference=True)
    assert_case_close_to_oracle(case, dtype, kernel)


@pytest.mark.parametrize("name", ["everything", "rotary"])
def test_every_schedule_gives_the_same_bits(kernel: str, name: str) -> None:
    """And nothing is found under any of them: a finding would raise."""
    case = CASES[name]
    with device.watching(thorough=True) as reports:
        run(case, case.inputs(torch.bfloat16), kernel)
    assert len(reports) == 3 and all(report.ok for report in reports)


@in_cuda
@pytest.mark.parametrize("paged", [False, True], ids=["whole", "paged"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_memory_is_moved_whole(head_dim: int, paged: bool) -> None:
    """Tiles without bank conflicts, rows without wasted sectors, and products on tensor cores."""
    query, *caches = (tensor.bfloat16() for tensor in cached(512, head_dim, (8, 1)))
    new = {"key": torch.randn(1, 1, 1, head_dim).bfloat16()}
    new["value"] = new["key"] + 1
    if paged:
        caches = [cache.view(32, 1, 16, head_dim) for cache in caches]
        new["block_table"] = torch.randperm(32)[None]
    with device.watching() as reports:
        attention_decode(query, *caches, cache_seqlens=500, **new)
    for report in reports:
        assert report.counters.bank_conflicts == 1, report.counters
        assert report.counters.sector_efficiency >= 0.95, report.counters
    assert reports[1].counters.mix()["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"] > 0


@in_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_rows_meet_no_bank_twice(dtype: torch.dtype) -> None:
    """Nor do they when they cannot be moved 16 bytes at a time."""
    query, *caches = (tensor.to(dtype) for tensor in cached(150, 13, (8, 2)))
    with device.watching() as reports:
        attention_decode(query, *caches, cache_seqlens=149)
    for report in reports:
        assert report.counters.bank_conflicts == 1, report.counters


@in_cuda
def test_keys_are_read_once_for_all_heads_that_share_them() -> None:
    for heads in (1, 8):
        tensors = [tensor.bfloat16() for tensor in cached(512, 64, (heads, 1))]
        with device.watching() as reports:
            attention_decode(*tensors, cache_seqlens=512)
        sites = [site for site in reports[0].counters.sites if "cp.async" in site.place.text]
        # What comes in sectors and goes in wavefronts: keys and values, and for each of the splits
        # of 128 keys the queries, which are of four sectors, and go as 16 rows with zeros.
        size, splits = 2 * 512 * 64 * 2, 4
        expected = size // 32 + size // 128 + splits * (4 * heads + 16)
        assert sum(site.transfers for site in sites) == expected


@pytest.mark.parametrize("page", [1, 7, 64])
def test_pages_change_nothing(page: int) -> None:
    lengths, columns = torch.tensor([290, 4]), 320 // page
    query, *caches = cached(columns * page, batch=2)
    key, value = (torch.randn(2, 2, 1, 16) for _ in range(2))
    table = torch.randperm(2 * columns).view(2, columns)
    paged = []
    for cache in caches:
        own = cache.view(2, 2, columns, page, 16).transpose(1, 2).flatten(0, 1)
        paged.append(torch.empty_like(own).index_copy_(0, table.flatten(), own))
    new = {"key": key, "value": value, "cache_seqlens": lengths}
    whole = attention_decode(query, *caches, **new)
    assert attention_decode(query, *paged, block_table=table.int(), **new).equal(whole)
    for cache, pages in zip(caches, paged, strict=True):
        own = pages[table.flatten()].view(2, columns, 2, page, 16)
        assert own.transpose(1, 2).flatten(2, 3).equal(cache)


def test_of_sequences_that_share_a_page_the_last_wins(kernel: str) -> None:
    """So does the later of two positions of one sequence, and no two blocks write to one place."""
    caches = {name: [torch.zeros(3, 1, 4, 8) for _ in range(2)] for name in (kernel, "cpu")}
    table = torch.tensor([[0, 1, 0], [2, 1, 1], [1, 0, 2]])  # pages of 4 positions
    new = {
        "query": torch.randn(3, 2, 1, 8),
        "key": torch.randn(3, 1, 7, 8),
        "value": torch.randn(3, 1, 7, 8),
        "cache_seqlens": torch.tensor([3, 5, 0]),
        "block_table": table,
    }
    for name, own in caches.items():
        with fastattn.use_kernel(name):
            attention_decode(key_cache=own[0], value_cache=own[1], **new)
    assert all(map(torch.equal, caches[kernel], caches["cpu"]))


def test_what_is_not_in_use_is_not_read() -> None:
    """Neither positions beyond a length nor entries of the table beyond the pages in use."""
    query, *caches = cached(4, batch=6)
    query, table = query[:2], torch.tensor([[2, 5, -1], [4, 10**6, 7]])
    used = {"cache_seqlens": torch.tensor([5, 3]), "block_table": table}
    out = attention_decode(query, *caches, **used)
    for cache in caches:
        for page, count in enumerate([0, 0, 4, 0, 3, 1]):
            cache[page, :, count:] = math.nan
    assert attention_decode(query, *caches, **used).equal(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hidden_key_does_not_leak(dtype: torch.dtype) -> None:
    query = torch.randn(1, 4, 5, 16).to(dtype)
    caches = [tensor.to(dtype) for tensor in cached(300)[1:]]
    for cache in caches:
        cache[:, :, 298] = math.nan
        cache[:, :, 10] = math.inf
    options = {"cache_seqlens": 300, "causal": True, "window": (200, None)}
    out = attention_decode(query, *caches, **options)
    assert out[:, :, :3].isfinite().all() and out[:, :, 3:].isnan().all()
    clean = [cache.nan_to_num(0, 0, 0) for cache in caches]
    assert attention_decode(query, *clean, **options)[:, :, :3].equal(out[:, :, :3])


def test_a_sequence_without_keys_gives_zero() -> None:
    tensors, sinks = cached(8, batch=2), torch.randn(4, dtype=torch.float64)
    options = {"cache_seqlens": torch.tensor([0, 8]), "return_lse": True}
    out, lse = attention_decode(*tensors, **options)
    assert (out[0] == 0).all() and (lse[0] == -math.inf).all() and lse[1].isfinite().all()
    out, lse = attention_decode(*tensors, sinks=sinks, **options)
    assert (out[0] == 0).all()
    torch.testing.assert_close(lse[0, :, 0], sinks.float())


@pytest.mark.parametrize("layout", ["sliced", "transposed", "heads_inside"])
def test_any_strides(layout: str) -> None:
    """Of the query, of the caches and of what is put into them."""
    tensors = [tensor.bfloat16() for tensor in (*cached(40, 24), *cached(3, 24)[1:])]
    found = []
    for give in (lambda tensor: laid_out(tensor, layout), torch.Tensor.contiguous):
        query, *caches, key, value = (give(laid_out(tensor, layout)) for tensor in tensors)
        found.append(
            [attention_decode(query, *caches, key=key, value=value, cache_seqlens=30), *caches]
        )
    assert all(map(torch.equal, *found))


def test_a_step_is_refused_before_anything_is_written() -> None:
    tensors = cached(4, 129)
    new = {"key": tensors[0][:, :2], "value": tensors[0][:, :2]}
    with pytest.raises(fastattn.UnavailableKernelError, match="heads are wider than 128"):
        attention_decode(*tensors, cache_seqlens=2, **new)
    with pytest.raises(fastattn.UnavailableKernelError, match="float64 has no"):
        attention_decode(*(tensor.double() for tensor in cached(4)), cache_seqlens=2)


@pytest.mark.parametrize(
    ("lengths", "table", "positions"),
    [
        ([6], [[0, 1]], 9),
        ([-1], [[0, 1]], 9),
        ([3], [[0, 3]], 9),
        ([3], [[0, -1]], 9),
        ([3], [[0, 1]], 3),
    ],
    ids=["no room", "negative", "no such page", "negative page", "no such angle"],
)
def test_what_the_host_has_not_read_stops_the_kernels(
    kernel: str, lengths: list[int], table: list[list[int]], positions: int
) -> None:
    """Pages of 3 positions, of which one more is taken."""
    caches = [torch.zeros(3, 1, 3, 8) for _ in range(2)]
    new = [torch.randn(1, 1, 1, 8) for _ in range(2)]
    angles = [torch.randn(positions, 4) for _ in range(2)]
    pages = torch.tensor(lengths), torch.tensor(table), *angles, False
    given = pages[0], 1, *pages[1:], None, None, None, None, 1.0, 0.0
    overload = "default" if kernel == "emulator" else "triton"
    with pytest.raises(RuntimeError, match="trap"):
        getattr(torch.ops.fastattn.attention_append, overload)(*caches, *new, *pages)
    with pytest.raises(RuntimeError, match="trap"):
        getattr(torch.ops.fastattn.attention_decode, overload)(new[0], *caches, *given)
