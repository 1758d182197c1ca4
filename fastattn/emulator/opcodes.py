"""The regular PTX instructions as data: what their operands are, and which qualifiers they take.

A row gives the shape of the operands, the qualifiers that change nothing under the emulator, and
those that become flags. The letters of a shape: t has the width of the instruction's type, w twice
that, i is 32 bits wide, p is a predicate, # is a number. What remains of the opcode after both
kinds of qualifiers are taken away is the name of an operation of the runtime; an instruction whose
name it lacks is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

FLAGS = {
    **{"ftz": 1 << 0, "sat": 1 << 1, "relu": 1 << 2},
    **{"negated": 1 << 4, "strong": 1 << 5, "acquire": 1 << 6, "release": 1 << 7},
    **{"gpu": 1 << 8, "aligned": 1 << 9, "async_proxy": 1 << 10},
}


@dataclass(frozen=True)
class Form:
    """How the operands and qualifiers of an opcode are read."""

    shape: str
    ignored: frozenset[str]
    flags: frozenset[str]
    by_width: bool  # only the width of the type matters: f32 and u32 are b32


def _row(shape: str, ignored: str = "", flags: str = "", by_width: bool = False) -> Form:
    return Form(shape, frozenset(ignored.split()), frozenset(flags.split()), by_width)


FORMS: dict[str, Form] = {
    "add": _row("ttt", "rn", "ftz sat"),
    "sub": _row("ttt", "rn", "ftz sat"),
    "mul": _row("ttt", "rn", "ftz sat"),
    "mul.wide": _row("wtt"),
    "mad": _row("tttt"),
    "mad.wide": _row("wttw"),
    "fma": _row("tttt", "rn", "ftz sat relu"),
    "div": _row("ttt", "rn approx full", "ftz"),
    "rem": _row("ttt"),
    "sad": _row("tttt"),
    "neg": _row("tt", "", "ftz"),
    "abs": _row("tt", "", "ftz"),
    "min": _row("ttt", "", "ftz relu"),
    "max": _row("ttt", "", "ftz relu"),
    "min.3": _row("tttt", "", "ftz"),
    "max.3": _row("tttt", "", "ftz"),
    "rcp": _row("tt", "rn approx", "ftz"),
    "sqrt": _row("tt", "rn approx", "ftz"),
    "rsqrt": _row("tt", "approx", "ftz"),
    "ex2": _row("tt", "approx", "ftz"),
    "lg2": _row("tt", "approx", "ftz"),
    "sin": _row("tt", "approx", "ftz"),
    "cos": _row("tt", "approx", "ftz"),
    "tanh": _row("tt", "approx"),
    "copysign": _row("ttt"),
    "dp4a": _row("tttt"),
    "and": _row("ttt"),
    "or": _row("ttt"),
    "xor": _row("ttt"),
    "not": _row("tt"),
    "cnot": _row("tt"),
    "shl": _row("tti"),
    "shr": _row("tti"),
    "shf": _row("ttti"),
    "bfe": _row("ttii"),
    "bfi": _row("tttii"),
    "brev": _row("tt"),
    "popc": _row("it"),
    "clz": _row("it"),
    "bfind": _row("it"),
    "prmt": _row("tttt"),
    "lop3": _row("tttt#"),
    "selp": _row("tttp", by_width=True),
    "mov": _row("tt", by_width=True),
}

# Without effect on what a kernel computes.
HINTS = frozenset(
    ["prefetch", "prefetchu", "applypriority", "griddepcontrol", "setmaxnreg", "pmevent", "brkpt"]
)

SPECIAL_REGISTERS = {
    name: index
    for index, name in enumerate(
        [f"{word}.{axis}" for word in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"]
        + ["laneid", "warpid", "nwarpid"]
        + [f"lanemask_{which}" for which in ("eq", "le", "lt", "ge", "gt")]
        + [f"{word}.{axis}" for word in ("clusterid", "nclusterid") for axis in "xyz"]
        + [f"cluster_{word}.{axis}" for word in ("ctaid", "nctaid") for axis in "xyz"]
        + ["cluster_ctarank", "cluster_nctarank", "dynamic_smem_size", "total_smem_size"]
    )
}

CLOCKS = {"%clock": "clock.b32", "%clock_hi": "clock.b32"}
CLOCKS |= {"%clock64": "clock.b64", "%globaltimer": "clock.b64", "%globaltimer_lo": "clock.b32"}

COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
ROUNDINGS = {
    **{"rn": 1, "rni": 1, "rz": 2, "rzi": 2, "rm": 3, "rmi": 3, "rp": 4, "rpi": 4, "rna": 5},
}
SPACES = {"global": 1, "shared": 2, "local": 3, "const": 4, "param": 4}
SHUFFLES = {"bfly": 0, "up": 1, "down": 2, "idx": 3}
# Cache hints of loads and stores.
CACHE = frozenset(["ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc"])
SCOPES = frozenset(["cta", "cluster", "gpu", "sys"])

SHARED_WINDOW, LOCAL_WINDOW = 1 << 44, 2 << 44
BUFFER_SHIFT = 34
