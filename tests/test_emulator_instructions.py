"""Single PTX instructions under the emulator, against Python and torch."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable

import pytest
import torch

from fastattn import _library, emulator
from fastattn.emulator import abi
from fastattn.emulator.opcodes import FORMS
from fastattn.emulator.ptx import WIDTHS

pytestmark = pytest.mark.skipif(
    _library.LIBRARY is None, reason=f"needs the compiled library: {_library.WHY_NOT}"
)

LANES = 32
STORAGE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = {
    **{"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
}


def kernel(body: str, parameters: int) -> emulator.Kernel:
    """A kernel of `parameters` pointers, p0 and up, whose threads run `body` with their byte
    offset for elements of 8 bytes in %at and registers of every width."""
    params = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "\n".join(
        f"ld.param.u64 %a{i}, [p{i}]; add.u64 %a{i}, %a{i}, %at;" for i in range(parameters)
    )
    return emulator.load(
        f"""
.version 8.8
.target sm_90a
.address_size 64
.visible .entry probe({params}) {{
    .reg .pred %p<4>; .reg .b16 %h<8>; .reg .b32 %r<16>; .reg .b64 %d<8>, %a<9>, %at;
    .shared .align 128 .b8 place[2048];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %at, %r0, 8;
    {loads}
    {body}
    ret;
}}
"""
    )["probe"]


def register(width: int, index: int) -> str:
    return f"%{ {2: 'h', 4: 'r', 8: 'd'}[max(width, 2)] }{index}"


def column(values: list[float], kind: str) -> torch.Tensor:
    """One value a lane, as the low bytes of eight."""
    width = WIDTHS[kind]
    values = (values * LANES)[:LANES]
    if kind in FLOATS:
        narrow = torch.tensor(values, dtype=torch.float64).to(FLOATS[kind]).view(STORAGE[width])
        bits = [int(x) % (1 << 8 * width) for x in narrow]
    else:
        bits = [int(x) % (1 << 8 * width) for x in values]
    return torch.tensor([x - (1 << 64) if x >> 63 else x for x in bits])


def values_of(out: torch.Tensor, kind: str) -> list[float]:
    width = WIDTHS[kind]
    raw = [int(x) & ((1 << 8 * width) - 1) for x in out]
    if kind in FLOATS:
        signed = [x - (1 << 8 * width) if x >> (8 * width - 1) else x for x in raw]
        return torch.tensor(signed, dtype=STORAGE[width]).view(FLOATS[kind]).double().tolist()
    return [x - (1 << 8 * width) if kind[0] == "s" and x >> (8 * width - 1) else x for x in raw]


def apply(opcode: str, result: str, *operands: tuple[str, list[float]]) -> list[float]:
    """What `opcode` makes of the operands, each a type and up to 32 values."""
    body = ""
    for i, (kind, _) in enumerate(operands, 1):
        bits = f"b{8 * WIDTHS[kind]}"
        body += f"ld.global.{bits} {register(WIDTHS[kind], i)}, [%a{i}];"
    names = [register(WIDTHS[kind], i) for i, (kind, _) in enumerate(operands, 1)]
    target = register(WIDTHS[result], 0 if WIDTHS[result] != 4 else 9)
    body += (
        f"{opcode} {target}, {', '.join(names)}; st.global.b{8 * WIDTHS[result]} [%a0], {target};"
    )
    out = torch.zeros(LANES, dtype=torch.int64)
    columns = [column(values, kind) for kind, values in operands]
    kernel(body, 1 + len(operands)).launch(1, LANES, out, *columns).require()
    return values_of(out, result)


def wrap(x: int, kind: str) -> int:
    bits = 8 * WIDTHS[kind]
    x %= 1 << bits
    return x - (1 << bits) if kind[0] == "s" and x >> (bits - 1) else x


CORNERS = {
    "s16": [0, 1, -1, 7, -9, 32767, -32768, 255],
    "u16": [0, 1, 2, 7, 9, 65535, 32768, 255],
    "s32": [0, 1, -1, 13, -7, 2**31 - 1, -(2**31), 65537],
    "u32": [0, 1, 2, 13, 7, 2**32 - 1, 2**31, 65537],
    "s64": [0, 1, -1, 13, -7, 2**63 - 1, -(2**63), 2**33 + 5],
    "u64": [0, 1, 2, 13, 7, 2**64 - 1, 2**63, 2**33 + 5],
}
INTEGERS: dict[str, Callable[[int, int, int], int]] = {
    "add": lambda a, b, _: a + b,
    "sub": lambda a, b, _: a - b,
    "mul.lo": lambda a, b, _: a * b,
    "mul.hi": lambda a, b, bits: a * b >> bits,
    "min": lambda a, b, _: min(a, b),
    "max": lambda a, b, _: max(a, b),
    "div": lambda a, b, _: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1) if b else -1,
    "rem": lambda a, b, _: int(math.copysign(1, a)) * (abs(a) % abs(b)) if b else a,
}


@pytest.mark.parametrize("kind", CORNERS)
@pytest.mark.parametrize("name", INTEGERS)
def test_integer_arithmetic(name: str, kind: str):
    left = [a for a in CORNERS[kind] for _ in range(4)]
    right = [CORNERS[kind][i % 8] for i in range(LANES)]
    found = apply(f"{name}.{kind}", kind, (kind, left), (kind, right))
    bits = 8 * WIDTHS[kind]
    expected = [wrap(INTEGERS[name](a, b, bits), kind) for a, b in zip(left, right, strict=True)]
    assert found == expected


def test_wide_products():
    pairs = [-(2**31), 2**31 - 1, -1, 12345]
    found = apply("mul.wide.s32", "s64", ("s32", pairs), ("s32", pairs[::-1]))
    assert found[:4] == [a * b for a, b in zip(pairs, pairs[::-1], strict=True)]
    found = apply("mad.wide.u32", "u64", ("u32", [2**32 - 1]), ("u32", [2**32 - 1]), ("u64", [9]))
    assert found[0] == (2**32 - 1) ** 2 + 9


BITS = [
    ("and.b32", "b32", [("b32", [12]), ("b32", [10])], 8),
    ("xor.b64", "b64", [("b64", [2**40 + 5]), ("b64", [1])], 2**40 + 4),
    ("not.b16", "b16", [("b16", [0x0FF0])], 0xF00F),
    ("cnot.b32", "b32", [("b32", [0])], 1),
    ("shl.b32", "b32", [("b32", [3]), ("u32", [31])], 2**31),
    ("shl.b32", "b32", [("b32", [3]), ("u32", [32])], 0),
    ("shr.s32", "s32", [("s32", [-8]), ("u32", [1])], -4),
    ("shr.s32", "s32", [("s32", [-8]), ("u32", [99])], -1),
    ("shr.u64", "u64", [("u64", [2**63]), ("u32", [63])], 1),
    ("shf.l.wrap.b32", "b32", [("b32", [0x80000000]), ("b32", [1]), ("u32", [33])], 3),
    ("shf.r.clamp.b32", "b32", [("b32", [5]), ("b32", [7]), ("u32", [40])], 7),
    ("bfe.u32", "u32", [("u32", [0xABCD]), ("u32", [4]), ("u32", [8])], 0xBC),
    ("bfe.s32", "s32", [("s32", [0xABCD]), ("u32", [4]), ("u32", [8])], -68),
    ("bfe.s32", "s32", [("s32", [-5]), ("u32", [28]), ("u32", [16])], -1),
    ("bfi.b32", "b32", [("b32", [5]), ("b32", [0xFFFF]), ("u32", [4]), ("u32", [4])], 0xFF5F),
    ("brev.b32", "b32", [("b32", [1])], 2**31),
    ("popc.b64", "u32", [("b64", [2**64 - 1])], 64),
    ("clz.b32", "u32", [("b32", [1])], 31),
    ("bfind.s32", "u32", [("s32", [-1])], 2**32 - 1),
    ("bfind.u32", "u32", [("u32", [256])], 8),
    ("bfind.shiftamt.u32", "u32", [("u32", [256])], 23),
    ("bfind.shiftamt.s32", "u32", [("s32", [-1])], 2**32 - 1),
    (
        "prmt.b32",
        "b32",
        [("b32", [0x33221100]), ("b32", [0x77665584]), ("b32", [0x8C47])],
        0x00FF8477,
    ),
    ("sad.s32", "s32", [("s32", [-3]), ("s32", [4]), ("s32", [100])], 107),
]


@pytest.mark.parametrize("case", BITS, ids=lambda case: case[0])
def test_bits(case: tuple):
    opcode, result, operands, expected = case
    assert apply(opcode, result, *operands)[0] == expected


def test_lop3_follows_its_table():
    for table in (0x80, 0xFE, 0x96, 0xE8, 0x1B):
        a, b, c = 0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA  # every row of a truth table
        body = f"mov.u32 %r1, {a}; mov.u32 %r2, {b}; mov.u32 %r3, {c};"
        body += f"lop3.b32 %r4, %r1, %r2, %r3, {table}; st.global.u32 [%a0], %r4;"
        out = torch.zeros(LANES, dtype=torch.int64)
        kernel(body, 1).launch(1, 1, out).require()
        assert int(out[0]) == table * 0x01010101


NUMBERS = [0.0, -0.0, 1.5, -2.25, 3e-5, 65504.0, 0.1, -7.0]


@pytest.mark.parametrize("kind", FLOATS)
def test_floating_point(kind: str):
    dtype = FLOATS[kind]
    x = torch.tensor((NUMBERS * 4)[:LANES], dtype=torch.float64).to(dtype)
    y = x.roll(3)
    rounding = ".rn" if kind in ("f32", "f64") else ""
    left, right = (kind, x.tolist()), (kind, y.tolist())
    for name, expected in (
        (f"add{rounding}", x + y),
        (f"sub{rounding}", x - y),
        (f"mul{rounding}", x * y),
        ("min", torch.minimum(x, y)),
        ("max", torch.maximum(x, y)),
    ):
        assert apply(f"{name}.{kind}", kind, left, right) == expected.double().tolist(), name
    exact = (x.double() * y.double() + x.double()).to(dtype)
    fused = apply(f"fma.rn.{kind}", kind, left, right, left)
    assert fused == pytest.approx(exact.double().tolist(), rel=torch.finfo(dtype).eps)


def test_min_and_max_of_nan_and_zeros():
    nan, inputs = math.nan, [("f32", [math.nan, 1.0]), ("f32", [2.0, math.nan])]
    assert apply("min.f32", "f32", *inputs)[:2] == [2.0, 1.0]
    assert all(math.isnan(x) for x in apply("max.NaN.f32", "f32", *inputs)[:2])
    zeros = apply("min.f32", "f32", ("f32", [0.0]), ("f32", [-0.0]))
    assert math.copysign(1, zeros[0]) == -1 and nan != nan


def test_approximate_functions():
    x = [0.25, 1.0, 2.0, 9.0]
    for opcode, function in (
        ("rcp.approx.ftz.f32", lambda v: 1 / v),
        ("sqrt.approx.f32", math.sqrt),
        ("rsqrt.approx.f32", lambda v: v**-0.5),
        ("ex2.approx.ftz.f32", lambda v: 2**v),
        ("lg2.approx.f32", math.log2),
        ("tanh.approx.f32", math.tanh),
        ("sin.approx.f32", math.sin),
    ):
        assert apply(opcode, "f32", ("f32", x))[:4] == pytest.approx([*map(function, x)], rel=1e-6)
    subnormal = struct.unpack("<f", struct.pack("<I", 1000))[0]
    assert apply("add.ftz.f32", "f32", ("f32", [subnormal]), ("f32", [0.0]))[0] == 0.0
    assert apply("add.f32", "f32", ("f32", [subnormal]), ("f32", [0.0]))[0] == subnormal
    assert apply("add.sat.f32", "f32", ("f32", [0.75]), ("f32", [0.5]))[0] == 1.0


CONVERSIONS = [
    ("cvt.rzi.s32.f32", "s32", "f32", [1.9, -1.9, 3e9, math.nan], [1, -1, 2**31 - 1, 0]),
    ("cvt.rni.s32.f32", "s32", "f32", [2.5, 3.5, -0.5, 1e-9], [2, 4, 0, 0]),
    ("cvt.rmi.f32.f32", "f32", "f32", [1.5, -1.5, 2.0, -0.25], [1, -2, 2, -1]),
    ("cvt.rpi.u32.f32", "u32", "f32", [1.1, -5.0, 0.0, 2.0], [2, 0, 0, 2]),
    ("cvt.rn.f32.s32", "f32", "s32", [3, -3, 2**24 + 1, 0], [3, -3, 2**24, 0]),
    ("cvt.s64.s32", "s64", "s32", [-1, 5, -(2**31), 0], [-1, 5, -(2**31), 0]),
    ("cvt.u64.u32", "u64", "u32", [2**32 - 1, 5, 1, 0], [2**32 - 1, 5, 1, 0]),
    ("cvt.u32.u64", "u32", "u64", [2**32 + 7, 5, 1, 0], [7, 5, 1, 0]),
    ("cvt.sat.s8.s32", "s16", "s32", [300, -300, 5, -5], [127, -128, 5, -5]),
    ("cvt.s32.s8", "s32", "s16", [0xFF, 0x7F, 0x80, 0], [-1, 127, -128, 0]),
    (
        "cvt.rn.f16.f32",
        "f16",
        "f32",
        [1e-8, 65519.0, 65520.0, 0.1],
        [0, 65504, math.inf, 0.0999755859375],
    ),
    ("cvt.rz.bf16.f32", "bf16", "f32", [1.999, -1.999, 1.0, 3.0], [1.9921875, -1.9921875, 1, 3]),
    (
        "cvt.f32.f16",
        "f32",
        "f16",
        [2**-24, -65504.0, math.inf, 0.1],
        [2**-24, -65504, math.inf, 0.0999755859375],
    ),
    ("cvt.rna.tf32.f32", "f32", "f32", [1 + 2**-11, 1 + 2**-12, -1.0, 0.0], [1 + 2**-10, 1, -1, 0]),
    (
        "cvt.rn.f32.f64",
        "f32",
        "f64",
        [0.1, 1e300, -2.0, 0.0],
        [0.10000000149011612, math.inf, -2, 0],
    ),
]


@pytest.mark.parametrize("case", CONVERSIONS, ids=lambda case: case[0])
def test_conversions(case: tuple):
    opcode, result, source, values, expected = case
    assert apply(opcode, result, (source, values))[:4] == expected


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_every_half_survives_the_way_through_fp32(kind: str):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(FLOATS[kind])
    every = every[~every.isnan()].double()
    sample = every[torch.randperm(len(every))[: 32 * 8]].tolist()
    for i in range(0, len(sample), LANES):
        part = sample[i : i + LANES]
        wide = apply(f"cvt.f32.{kind}", "f32", (kind, part))
        assert apply(f"cvt.rn.{kind}.f32", kind, ("f32", wide)) == part


def test_pairs_are_packed_with_the_first_operand_high():
    (packed, *_) = apply("cvt.rn.bf16x2.f32", "b32", ("f32", [1.0]), ("f32", [-2.0]))
    assert packed == 0x3F80C000
    (packed, *_) = apply("cvt.rn.relu.f16x2.f32", "b32", ("f32", [1.0]), ("f32", [-2.0]))
    assert packed == 0x3C000000


def test_comparisons():
    nan = math.nan
    for name, a, b, expected in (
        ("lt.f32", 1.0, nan, 0),
        ("ltu.f32", 1.0, nan, 1),
        ("ne.f32", 1.0, nan, 0),
        ("neu.f32", 1.0, nan, 1),
        ("num.f32", 1.0, 2.0, 1),
        ("nan.f32", 1.0, nan, 1),
        ("lt.s32", -1, 1, 1),
        ("lo.u32", -1, 1, 0),
        ("hs.u32", -1, 1, 1),
    ):
        kind = name.split(".")[1]
        body = f"ld.global.b32 %r1, [%a1]; ld.global.b32 %r2, [%a2]; setp.eq.s32 %p1, %r0, {LANES};"
        body += f"setp.{name} %p0|%p2, %r1, %r2; selp.b32 %r3, 1, 0, %p0; selp.b32 %r4, 2, 0, %p2;"
        body += (
            f"setp.{name.replace('.', '.or.', 1)} %p3, %r1, %r2, !%p1; @%p3 add.s32 %r4, %r4, 4;"
        )
        body += "or.b32 %r3, %r3, %r4; st.global.b32 [%a0], %r3;"
        out = torch.zeros(LANES, dtype=torch.int64)
        kernel(body, 3).launch(1, 1, out, column([a], kind), column([b], kind)).require()
        assert int(out[0]) == (1 if expected else 2) + 4, name


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_comparisons_of_pairs(kind: str):
    """One predicate is of the low halves, the other of the high ones."""
    one, two, nan = (int(column([x], kind)[0]) & 0xFFFF for x in (1.0, 2.0, math.nan))
    for name, expected in (("lt", 1), ("gt", 0), ("ne", 1), ("neu", 3), ("nan", 2)):
        body = "ld.global.b32 %r1, [%a1]; ld.global.b32 %r2, [%a2];"
        body += f"setp.{name}.{kind}x2 %p0|%p2, %r1, %r2;"
        body += "selp.b32 %r3, 1, 0, %p0; selp.b32 %r4, 2, 0, %p2;"
        body += "or.b32 %r3, %r3, %r4; st.global.b32 [%a0], %r3;"
        out = torch.zeros(LANES, dtype=torch.int64)
        pairs = (column([x], "b32") for x in (nan << 16 | one, one << 16 | two))
        kernel(body, 3).launch(1, 1, out, *pairs).require()
        assert int(out[0]) == expected, name


def test_votes_matches_and_reductions():
    body = """
    and.b32 %r1, %r0, 3; setp.eq.u32 %p0, %r1, 0;
    vote.sync.ballot.b32 %r2, %p0, -1; vote.sync.any.pred %p1, !%p0, -1;
    match.sync.any.b32 %r3, %r1, -1; redux.sync.add.s32 %r4, %r0, -1;
    elect.sync _|%p2, -1; selp.b32 %r5, 1, 0, %p2; selp.b32 %r6, 2, 0, %p1; or.b32 %r5, %r5, %r6;
    shfl.sync.up.b32 %r7|%p3, %r0, 1, 0, -1; activemask.b32 %r8;
    """
    for i, source in enumerate((2, 3, 4, 5, 7, 8)):
        body += f"st.global.b32 [%a{i}], %r{source};"
    outs = [torch.zeros(LANES, dtype=torch.int64) for _ in range(6)]
    kernel(body, 6).launch(1, LANES, *outs).require()
    ballot, match, total, elected, up, active = (o.tolist() for o in outs)
    assert ballot == [0x11111111] * 32 and total == [496] * 32 and active == [2**32 - 1] * 32
    assert match == [0x11111111 << (i & 3) for i in range(32)]
    assert elected == [3, *[2] * 31] and up == [0, *range(31)]


@pytest.mark.parametrize(
    ("opcode", "start", "expected"),
    [
        ("atom.global.add.u32", 0, 32),
        ("atom.global.max.s32", -5, 1),
        ("atom.global.exch.b32", 9, 1),
        ("atom.global.inc.u32", 0, 0),
        ("atom.global.xor.b32", 1, 1),
        ("red.relaxed.gpu.global.add.u32", 3, 35),
    ],
)
def test_atomics(opcode: str, start: int, expected: int):
    target = "" if opcode.startswith("red") else "%r2, "
    body = f"ld.param.u64 %d1, [p0]; mov.u32 %r1, 1; {opcode} {target}[%d1], %r1;"
    memory = torch.tensor([start], dtype=torch.int32)
    kernel(body, 1).check(1, LANES, memory).require()
    assert memory.item() == expected


def test_vectors_narrow_elements_and_local_memory():
    body = """
    .local .align 16 .b8 depot[32]; .reg .b64 %SP, %SPL;
    mov.u64 %SPL, depot; cvta.local.u64 %SP, %SPL;
    ld.global.v2.u16 {%h1, %h2}, [%a1]; ld.global.s8 %h3, [%a1+4]; ld.global.u8 %r3, [%a1+5];
    st.local.v2.u16 [%SPL+4], {%h1, %h2}; ld.u32 %r1, [%SP+4]; cvt.s32.s16 %r2, %h3;
    add.s32 %r2, %r2, %r3; mov.b64 %d1, {%r1, %r2}; st.global.u64 [%a0], %d1;
    """
    source = torch.tensor([0x0000_7FFE_1234_5678] * LANES)
    out = torch.zeros(LANES, dtype=torch.int64)
    kernel(body, 2).launch(1, LANES, out, source).require()
    assert int(out[0]) == ((-2 + 0x7F) << 32) | 0x12345678


def test_tiles_are_stored_as_they_are_loaded():
    body = """
    mov.u32 %r1, place; mad.lo.s32 %r2, %r0, 16, %r1;
    mul.lo.s32 %r3, %r0, 65537; add.s32 %r4, %r3, 1; add.s32 %r5, %r3, 2; add.s32 %r6, %r3, 3;
    stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r2], {%r3, %r4, %r5, %r6};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r7, %r8, %r9, %r10}, [%r2];
    sub.s32 %r7, %r7, %r3; sub.s32 %r8, %r8, %r4; sub.s32 %r9, %r9, %r5; sub.s32 %r10, %r10, %r6;
    or.b32 %r7, %r7, %r8; or.b32 %r7, %r7, %r9; or.b32 %r7, %r7, %r10; st.global.b32 [%a0], %r7;
    """
    out = torch.ones(LANES, dtype=torch.int64)
    kernel(body, 1).check(1, LANES, out).require()
    assert not (out & 0xFFFFFFFF).any()


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"),
    [("m16n8k8", "tf32", torch.float32), ("m16n8k8", "f16", torch.float16)],
)
def test_products_of_tensor_cores(shape: str, kind: str, dtype: torch.dtype):
    """Operands are read by every lane in the layout that the PTX manual draws."""
    a, b = torch.randn(16, 8).to(dtype), torch.randn(8, 8).to(dtype)
    lane = torch.arange(LANES)
    row, quad = lane // 4, lane % 4
    if kind == "tf32":
        bits = lambda x: (x.view(torch.int32) & ~0x1FFF).long()  # noqa: E731
        registers = [a[row, quad], a[row + 8, quad], a[row, quad + 4], a[row + 8, quad + 4]]
        registers += [b[quad, row], b[quad + 4, row]]
        columns = [bits(x.contiguous()) for x in registers]
        a, b = ((x.view(torch.int32) & ~0x1FFF).view(dtype) for x in (a, b))
        groups = "{%r1, %r2, %r3, %r4}, {%r5, %r6}"
    else:
        pairs = [
            (a[row, 2 * quad], a[row, 2 * quad + 1]),
            (a[row + 8, 2 * quad], a[row + 8, 2 * quad + 1]),
        ]
        pairs += [(b[2 * quad, row], b[2 * quad + 1, row])]
        columns = [torch.stack(p, 1).contiguous().view(torch.int32)[:, 0].long() for p in pairs]
        groups = "{%r1, %r2}, {%r3}"
    body = "".join(f"ld.global.b32 %r{i}, [%a{i}];" for i in range(1, len(columns) + 1))
    body += f"mov.b32 %r9, 0; mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 "
    body += "{%r10, %r11, %r12, %r13}, " + groups + ", {%r9, %r9, %r9, %r9};"
    body += "mov.b64 %d1, {%r10, %r11}; st.global.b64 [%a0], %d1;"
    body += "mov.b64 %d1, {%r12, %r13}; st.global.b64 [%a0+256], %d1;"
    out = torch.zeros(2 * LANES, dtype=torch.int64)
    kernel(body, 1 + len(columns)).launch(1, LANES, out, *columns).require()
    assert torch.equal(out.view(torch.float32).reshape(16, 8), (a.double() @ b.double()).float())


def test_indexed_jumps():
    body = """
    and.b32 %r1, %r0, 3;
    targets: .branchtargets L0, L1, L2;
    brx.idx %r1, targets;
    L0: mov.u32 %r2, 10; bra END;
    L1: mov.u32 %r2, 11; bra END;
    L2: mov.u32 %r2, 12;
    END: st.global.u32 [%a0], %r2;
    """
    out = torch.zeros(LANES, dtype=torch.int64)
    report = kernel(body, 1).launch(1, LANES, out)
    assert out.tolist() == [10, 11, 12, 0] * 8  # the fourth target is not there
    assert [finding.kind for finding in report.findings] == ["bad-jump"]


# --- what is not known is refused, all of it and by name


def test_unknown_instructions_are_named():
    probe = kernel("frobnicate.b32 %r1, %r2; add.rz.f32 %r1, %r2, %r3; add.s32 %r1, %r2, %h1;", 1)
    with pytest.raises(emulator.PtxError) as error:
        probe.launch(1, 1, torch.zeros(8))
    message = str(error.value)
    assert "`frobnicate.b32 %r1, %r2`: unknown instruction" in message
    assert "`add.rz.f32 %r1, %r2, %r3`: there is no operation add.rz.f32" in message
    assert re.search(r"line \d+: `", message)


def test_operands_of_the_wrong_width_are_refused():
    with pytest.raises(emulator.PtxError, match="%h1 has 16 bits, and 32 are expected"):
        kernel("add.s32 %r1, %r2, %h1;", 1).launch(1, 1, torch.zeros(8))


@pytest.mark.parametrize("text", ["\n.entry broken( {", "\n???", "\n.visible .entry f() {\n  ?; }"])
def test_text_that_is_no_ptx_is_refused(text: str):
    with pytest.raises(emulator.PtxError, match="line"):
        emulator.load(text)


def test_every_form_of_the_table_reaches_an_operation():
    names = set(abi.operations())
    for opcode in FORMS:
        assert any(name == opcode or name.startswith(f"{opcode}.") for name in names), opcode
