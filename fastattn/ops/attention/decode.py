"""Attention of few queries to a cache of keys and values, into which new ones are appended."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import checks, dispatch, registry
from fastattn.ops.attention import arguments, reference

PAGES = "Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved"


def _empty(*args: Any) -> list[str]:
    if any([isinstance(arg, Tensor) and 0 in arg.shape for arg in args]):
        return ["a tensor is empty"]
    return []


def _refusals(first: Tensor, *rest: Any) -> list[str]:
    # The others are on its device. They have its dtype or another that the kernels take.
    return dispatch.cpu_refusals(first) + _empty(first, *rest)


def _gpu_refusals(common: Callable[..., list[str]], *args: Any) -> list[str]:
    of_heads = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() == 4]
    return common(*of_heads) + _empty(*args) + arguments.too_wide(128, 256, *of_heads)


def decode_shapes(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Empty (out, lse), laid out as every kernel lays them out."""
    batch, heads, q_len, _ = query.shape
    out = query.new_empty(batch, q_len, heads, value_cache.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, q_len, dtype=reference.wide(query.dtype))


def _append_fake(*args: Any) -> None:
    return None


KERNELS = {
    "cpu": _refusals,
    "cuda": functools.partial(_gpu_refusals, dispatch.cuda_refusals),
    "triton": functools.partial(_gpu_refusals, dispatch.triton_refusals),
}
APPEND = registry.inference_op(
    "attention_append(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value,"
    f" Tensor cache_seqlens, {PAGES}) -> ()",
    reference=reference.append,
    fake=_append_fake,
    kernels=KERNELS,
    file="triton_decode",
)
DECODE = registry.inference_op(
    "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens,"
    f" SymInt appended, {PAGES}, Tensor? alibi_slopes, Tensor? sinks, SymInt? left, SymInt? right,"
    " float scale, float softcap) -> (Tensor out, Tensor lse)",
    reference=reference.decode,
    fake=decode_shapes,
    kernels=KERNELS,
    file="triton_decode",
)

PLAIN = registry.plain_op(
    "attention_decode(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    f" Tensor cache_seqlens, Tensor? key, Tensor? value, {PAGES}, bool causal, float? scale)"
    " -> Tensor"
)


def _check_sizes(name: str, tensor: Tensor, sizes: tuple[int | None, ...], words: str) -> None:
    """Four dimensions of the sizes given; None is any."""
    shape = tensor.shape
    if len(shape) == 4:
        for size, own in zip(sizes, shape, strict=True):
            if size is not None and size != own:
                break
        else:
            return
    wanted = ["any" if size is None else size for size in sizes]
    raise ValueError(f"{name} must be {words} = {wanted}, got {list(shape)}")


def _check_integers(name: str, tensor: Tensor, query: Tensor, words: str, *sizes: int) -> None:
    checks.on_device(name, tensor, "query", query)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be torch.int32 or torch.int64, got {tensor.dtype}")
    dims = words.count(",") + 1
    if tensor.dim() != dims or tuple(tensor.shape[: len(sizes)]) != sizes:
        raise ValueError(f"{name} must be [{words}], got {list(tensor.shape)}")


def _check_rotary(
    cos: Tensor | None, sin: Tensor | None, interleaved: bool | None, query: Tensor
) -> None:
    if (cos is None) != (sin is None):
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise ValueError(f"{missing} must come with the other table, got None")
    if cos is None:
        if interleaved is not None:
            raise ValueError(
                f"rotary_interleaved is of use only with rotary_cos, got {interleaved}"
            )
        return
    if not isinstance(interleaved, bool):
        raise TypeError(
            "rotary_interleaved must say which elements are pairs, True for neighbours (GPT-J) or "
            f"False for halves (GPT-NeoX, LLaMA), got {interleaved!r}"
        )
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        checks.floating(name, table)
        checks.on_device(name, table, "query", query)
        if table.dtype not in (query.dtype, reference.wide(query.dtype)):
            raise TypeError(
                f"{name} must be {query.dtype} or {reference.wide(query.dtype)}, got {table.dtype}"
            )
        if table.dim() != 2 or 2 * table.shape[1] > query.shape[3]:
            raise ValueError(
                f"{name} must be (positions, at most {query.shape[3] // 2}), "
                f"got {list(table.shape)}"
            )
    checks.same("rotary_sin", sin, "rotary_cos", cos)


def _check_positions(
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    key_cache: Tensor,
    appended: int,
    q_len: int,
    rotary_cos: Tensor | None,
) -> None:
    """The values of `cache_seqlens` and `block_table`; the kernels check them too."""
    pages, size = key_cache.shape[0], key_cache.shape[2]
    room = size * (1 if block_table is None else block_table.shape[1])
    least = max(0, q_len - appended) if rotary_cos is not None else 0
    for b, length in enumerate(cache_seqlens.tolist()):
        if not least <= length <= room - appended:
            raise ValueError(
                f"cache_seqlens must lie in [{least}, {room - appended}], where the cache has room "
                f"for {room} keys and {appended} are appended, got {length} for sequence {b}"
            )
        if rotary_cos is not None and rotary_cos.shape[0] < length + appended:
            raise ValueError(
                f"rotary_cos must have a row for each of {length + appended} positions, "
                f"got {rotary_cos.shape[0]}"
            )
        if block_table is not None and size:
            used = block_table[b, : math.ceil((length + appended) / size)]
            if used.numel() and not (used.min() >= 0 and used.max() < pages):
                raise ValueError(
                    f"block_table must name pages in [0, {pages}) for all that is in use, "
                    f"got {used.tolist()} for sequence {b}"
                )


def _split_args(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cache_seqlens: Tensor | int,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[tuple | None, tuple]:
    """The arguments of the op that appends, or None, and of the one that attends."""
    checks.floating("key_cache", key_cache)
    device = key_cache.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        query, key, value = (
            t.to(key_cache.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t
            for t in (query, key, value)
        )
    checks.floating("query", query)
    if query.dim() != 4:
        raise ValueError(f"query must be (B, H, Sq, D), got {query.dim()} dimensions")
    batch, heads, q_len, width = query.shape
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        checks.same(name, cache, "query", query, shape=False)
    lead = batch if block_table is None else None
    layout = "(B, Hkv, S, D)" if block_table is None else "(pages, Hkv, page, D)"
    _check_sizes("key_cache", key_cache, (lead, None, None, width), layout)
    _check_sizes("value_cache", value_cache, (*key_cache.shape[:3], None), layout)
    kv_heads = key_cache.shape[1]
    if heads % kv_heads if kv_heads else heads:
        raise ValueError(
            f"key_cache must have a number of heads that divides query's {heads}, got {kv_heads}"
        )
    if isinstance(cache_seqlens, int) and not isinstance(cache_seqlens, bool):
        cache_seqlens = torch.full((batch,), cache_seqlens, device=query.device)
    _check_integers("cache_seqlens", cache_seqlens, query, "B", batch)
    if block_table is not None:
        _check_integers("block_table", block_table, query, "B, pages of a sequence", batch)
    if (key is None) != (value is None):
        raise ValueError(f"{'key' if key is None else 'value'} must come with the other, got None")
    if key is not None:
        for name, tensor, cache in (("key", key, key_cache), ("value", value, value_cache)):
            checks.same(name, tensor, "query", query, shape=False)
            length = None if name == "key" or key.dim() != 4 else key.shape[2]
            sizes = (batch, kv_heads, length, cache.shape[3])
            _check_sizes(name, tensor, sizes, "(B, Hkv, new keys, D)")
            if 0 in cache.stride() and any(
                n > 1 and s == 0 for n, s in zip(cache.shape, cache.stride(), strict=True)
            ):
                raise ValueError(
                    f"{name}_cache must not be expanded to be appended to, "
                    f"got strides {list(cache.stride())}"
                )
    _check_rotary(rotary_cos, rotary_sin, rotary_interleaved, query)
    left, right = arguments.bounds(causal, window)
    alibi_slopes, sinks = arguments.terms_of_heads(alibi_slopes, sinks, query, batch, heads)
    scale, softcap = arguments.scale_and_softcap(width, scale, softcap)
    if torch.is_grad_enabled():
        for name, tensor in (
            ("query", query),
            ("key_cache", key_cache),
            ("value_cache", value_cache),
            ("key", key),
            ("value", value),
            ("rotary_cos", rotary_cos),
            ("rotary_sin", rotary_sin),
            ("alibi_slopes", alibi_slopes),
            ("sinks", sinks),
        ):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name} must not require a gradient, for attention_decode has none: call it "
                    "under torch.no_grad(), got requires_grad=True"
                )
    appended = 0 if key is None else key.shape[2]
    if not torch.compiler.is_compiling() and query.device.type == "cpu":
        _check_positions(cache_seqlens, block_table, key_cache, appended, q_len, rotary_cos)
    caches = key_cache, value_cache
    pages = block_table, rotary_cos, rotary_sin, bool(rotary_interleaved)
    return (
        None if key is None else (*caches, key, value, cache_seqlens, *pages),
        (
            query,
            *caches,
            cache_seqlens,
            appended,
            *pages,
            alibi_slopes,
            sinks,
            left,
            right,
            scale,
            softcap,
        ),
    )


def _decode_args(*args: Any, **kwargs: Any) -> tuple:
    return _split_args(*args, **kwargs)[1]


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    *,
    cache_seqlens: Tensor | int,
    key: Tensor | None = None,
    value: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of new queries to all keys in a cache, after the new ones are put there.

    For generating text: one call a layer and step. The keys of one head are shared out among all
    cores (flash-decoding, Dao et al. 2023), and read once for all query heads that share them. Many
    queries, those of a prompt, take the way of `attention` on the CPU; on a GPU keys are read again
    for every 16 queries, so that a long prompt is better served by `attention`. For inference only.

    Args:
        query: [B, H, Sq, D]. The last query's position is that of the last key, so that query i
            stands at cache_seqlens + new keys - Sq + i.
        key_cache: [B, Hkv, S, D]; value_cache: [B, Hkv, S, Dv]; H is a multiple of Hkv. With
            `block_table` [pages, Hkv, page, D] and [pages, Hkv, page, Dv]. Any strides: what
            flash-attn lays out as [B, S, Hkv, D] is passed as `.transpose(1, 2)`.
        cache_seqlens: [B], int32 or int64, or one number: the keys of each sequence that are in the
            cache. It is not changed.
        key: [B, Hkv, Sn, D]; value: [B, Hkv, Sn, Dv]; written into the caches, in place, from
            position cache_seqlens on.
        block_table: [B, pages of a sequence], int32 or int64: the pages in which a sequence's
            positions lie, page after page (PagedAttention, Kwon et al. 2023, arXiv:2309.06180).
            Entries beyond its length are not looked at. Of sequences that write to one page, the
            last wins.
        rotary_cos, rotary_sin: [positions, at most D / 2], in query's dtype or at least fp32. Turn
            the first elements of each query and new key by its position (arXiv:2104.09864).
        rotary_interleaved: which elements are pairs, neighbours or halves; to be given with the
            tables.
        causal, window, scale, softcap, alibi_slopes, sinks, return_lse: as `attention` with
            align="bottom_right".

    Returns:
        [B, H, Sq, Dv], laid out as [B, Sq, H, Dv]; with `return_lse` also [B, H, Sq].

    Under autocast query, key and value take the cache's dtype.

    Raises:
        TypeError: a dtype or a kind of argument is wrong. ValueError: a shape, device, head count,
        number or position does not fit, or a gradient is asked for. What `cache_seqlens` and
        `block_table` hold raises RuntimeError inside torch.compile, when the graph runs, and stops
        the kernel on a GPU.
    """
    if (
        window is softcap is alibi_slopes is sinks is None
        and type(causal) is bool
        and (scale is None or type(scale) is float)
        and (rotary_interleaved is None if rotary_cos is None else type(rotary_interleaved) is bool)
        and return_lse is False
    ):
        lengths = cache_seqlens
        if type(lengths) is int and isinstance(query, Tensor) and query.dim():
            lengths = torch.full((len(query),), lengths)
        pages = block_table, rotary_cos, rotary_sin, rotary_interleaved is True
        out = PLAIN(query, key_cache, value_cache, lengths, key, value, *pages, causal, scale)
        if out is not None:
            if key is not None:
                registry.count_writes(key_cache, value_cache)
            return out
    append, attend = _split_args(
        query,
        key_cache,
        value_cache,
        cache_seqlens=cache_seqlens,
        key=key,
        value=value,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
    )
    if append is not None:
        APPEND(*append)
    outs = DECODE(*attend)
    return tuple(outs) if return_lse else outs[0]


registry.function("attention_decode", _decode_args, DECODE)
