"""The kinds of cases: what they are called, their sizes, and what each costs.

A case says nothing about how it is run; that is `baselines.py` (operations), `models.py` and
`language.py` (whole models).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One race: an operation, a shape, a data type, forward only or forward and backward."""

    dtype: str = "float32"
    backward: bool = False
    quick: bool = False

    group: ClassVar[str]  # the heading that the case is listed under
    tiny: ClassVar[dict[str, int]]  # sizes that load the same code but touch little memory
    dropout: ClassVar[float] = 0.0

    @property
    def title(self) -> str:
        """The operation and its options, in words."""
        raise NotImplementedError

    @property
    def shape(self) -> str:
        """The sizes, short enough for a table."""
        raise NotImplementedError

    @property
    def passes(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def name(self) -> str:
        """The name that `--only` matches, such as attention-causal/b1-h12-s512-d64/fwd/fp32."""
        parts = (self.title, self.shape, self.passes, DTYPES[self.dtype])
        return "/".join(part.lower().replace(" ", "-") for part in parts)

    @property
    def flops(self) -> float:
        """Floating-point operations of the call; 0 where memory traffic is the measure."""
        return 0.0

    @property
    def traffic(self) -> float:
        """Bytes that must be read and written; 0 where arithmetic is the measure."""
        return 0.0

    @property
    def reads(self) -> bool:
        """Whether next to all of the traffic is reading, so that reading is the limit."""
        return False

    @property
    def eager_bytes(self) -> float:
        """What the eager call is known to need beyond its inputs; 0 where that is modest."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Attention(Case):
    """softmax(q k^T / sqrt(d)) v with what is switched on; q is (B, H, S, D), v may be wider."""

    batch: int
    heads: int
    seq: int
    head_dim: int
    value_dim: int | None = None  # that of the others where None
    causal: bool = False
    padding: bool = False
    bias: bool = False  # learned, (1, H, S, S), with its gradient
    relative: bool = False  # learned, (1, H, 2 S - 1), one number for each distance
    dropout: float = 0.0

    group: ClassVar[str] = "attention"
    tiny: ClassVar[dict[str, int]] = {"batch": 1, "heads": 2, "seq": 64}

    @property
    def title(self) -> str:
        options = {
            "causal": self.causal,
            "padding mask": self.padding,
            "learned bias": self.bias,
            "relative bias": self.relative,
            f"dropout {self.dropout:g}": self.dropout > 0,
        }
        return " ".join(["attention", *(word for word, on in options.items() if on)])

    @property
    def shape(self) -> str:
        other = "" if self.value_dim is None else f"/{self.value_dim}"
        return f"B{self.batch} H{self.heads} S{self.seq} D{self.head_dim}{other}"

    @property
    def lengths(self) -> list[int]:
        """Keys that each sequence of the batch attends to: all, or staggered down to half."""
        if not self.padding:
            return [self.seq] * self.batch
        step = self.seq // (2 * max(self.batch, 2))
        return [self.seq - step * (row + 1) for row in range(self.batch)]

    @property
    def flops(self) -> float:
        if self.causal:
            pairs = sum(sum(min(row + 1, keys) for row in range(self.seq)) for keys in self.lengths)
        else:
            pairs = sum(self.seq * keys for keys in self.lengths)
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        # a product of either width forward; backward three more of the one, two of the other
        widths = 4 * self.head_dim + 3 * value_dim if self.backward else self.head_dim + value_dim
        return 2.0 * self.heads * widths * pairs

    @property
    def eager_bytes(self) -> float:
        matrix = self.batch * self.heads * self.seq**2 * (4 if self.dtype == "float32" else 2)
        return matrix * (5 if self.backward else 2)


@dataclass(frozen=True, kw_only=True)
class Varlen(Case):
    """The same of sequences from 1/8 of seq up to seq, packed; its rivals pad to the longest."""

    batch: int
    heads: int
    seq: int
    head_dim: int
    causal: bool = False

    group: ClassVar[str] = "attention"
    tiny: ClassVar[dict[str, int]] = {"batch": 2, "heads": 2, "seq": 16}

    @property
    def title(self) -> str:
        return "attention varlen causal" if self.causal else "attention varlen"

    @property
    def shape(self) -> str:
        return f"B{self.batch} H{self.heads} S{self.lengths[0]}-{self.seq} D{self.head_dim}"

    @property
    def lengths(self) -> list[int]:
        least = max(1, self.seq // 8)
        return [least + (self.seq - least) * n // max(1, self.batch - 1) for n in range(self.batch)]

    @property
    def flops(self) -> float:
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        return 4.0 * self.heads * self.head_dim * pairs * (3.5 if self.backward else 1.0)


@dataclass(frozen=True, kw_only=True)
class Decode(Case):
    """One query a sequence, or the last of several, against seq keys, whose heads queries share."""

    batch: int
    heads: int
    kv_heads: int
    seq: int
    head_dim: int
    queries: int = 1
    cached: bool = True  # False: by `attention`, as across to an encoder or by a patched model

    group: ClassVar[str] = "attention"
    tiny: ClassVar[dict[str, int]] = {"batch": 1, "seq": 256}

    @property
    def title(self) -> str:
        return "attention decode" if self.cached else "attention one query"

    @property
    def shape(self) -> str:
        length = f"{self.seq}" if self.queries == 1 else f"{self.queries}/{self.seq}"
        return f"B{self.batch} H{self.heads}/{self.kv_heads} S{length} D{self.head_dim}"

    @property
    def flops(self) -> float:
        if self.reads:
            return 0.0
        pairs = self.queries * self.seq - self.queries * (self.queries - 1) // 2
        return 4.0 * self.batch * self.heads * self.head_dim * pairs

    @property
    def traffic(self) -> float:
        if not self.reads:
            return 0.0
        size = 4.0 if self.dtype == "float32" else 2.0
        return 2 * self.batch * self.kv_heads * self.seq * self.head_dim * size

    @property
    def reads(self) -> bool:
        return self.queries == 1


@dataclass(frozen=True, kw_only=True)
class AdditiveAttention(Case):
    """softmax(w . tanh(q + k)) v over every pair of a query and a key, each (B, H, S, D)."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    head_dim: int

    group: ClassVar[str] = "attention"
    tiny: ClassVar[dict[str, int]] = {"batch": 1, "heads": 1, "q_len": 8, "kv_len": 64}

    @property
    def title(self) -> str:
        return "additive attention"

    @property
    def shape(self) -> str:
        return f"B{self.batch} H{self.heads} S{self.q_len}x{self.kv_len} D{self.head_dim}"

    @property
    def eager_bytes(self) -> float:
        pairs = self.batch * self.heads * self.q_len * self.kv_len * self.head_dim
        return pairs * (4.0 if self.dtype == "float32" else 2.0) * (3 if self.backward else 2)


@dataclass(frozen=True, kw_only=True)
class Norm(Case):
    """layer_norm or rms_norm over the last dimension, alone or with a residual added in front."""

    kind: str  # layer_norm, rms_norm, add_layer_norm, add_rms_norm
    rows: int
    cols: int
    dropout: float = 0.0  # of what is added to the residual
    postnorm: bool = False  # the sum is not wanted

    group: ClassVar[str] = "norm"
    tiny: ClassVar[dict[str, int]] = {"rows": 8}

    @property
    def title(self) -> str:
        options = {"postnorm": self.postnorm, f"dropout {self.dropout:g}": self.dropout > 0}
        return " ".join([self.kind, *(word for word, on in options.items() if on)])

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.cols}"

    @property
    def residual(self) -> bool:
        return self.kind.startswith("add")

    @property
    def traffic(self) -> float:
        sums = self.residual and not self.postnorm
        tensors = 2 + self.residual + sums  # read x (and the residual), write y (and the sum)
        if self.backward:  # read x, dy (and dsum), write dx (and with dropout that of the residual)
            tensors += 3 + sums + (self.dropout > 0)
        return tensors * self.rows * self.cols * (4.0 if self.dtype == "float32" else 2.0)


@dataclass(frozen=True, kw_only=True)
class Rope(Case):
    """Rotary position embedding of query (B, H, S, D) and key (B, Hkv, S, D)."""

    batch: int
    heads: int
    kv_heads: int
    seq: int
    head_dim: int

    group: ClassVar[str] = "rope"
    tiny: ClassVar[dict[str, int]] = {"batch": 1, "heads": 2, "kv_heads": 1, "seq": 16}

    @property
    def title(self) -> str:
        return "apply_rope"

    @property
    def shape(self) -> str:
        return f"B{self.batch} H{self.heads}+{self.kv_heads} S{self.seq} D{self.head_dim}"

    @property
    def traffic(self) -> float:
        elements = self.batch * (self.heads + self.kv_heads) * self.seq * self.head_dim
        passes = 2 if self.backward else 1
        return 2 * passes * elements * (4.0 if self.dtype == "float32" else 2.0)


@dataclass(frozen=True, kw_only=True)
class Linear(Case):
    """act(x W^T + b) with x (rows, width_in) and W (width_out, width_in)."""

    rows: int
    width_in: int
    width_out: int
    activation: str | None = None

    group: ClassVar[str] = "linear and FFN"
    tiny: ClassVar[dict[str, int]] = {"rows": 8, "width_in": 64, "width_out": 64}

    @property
    def title(self) -> str:
        return f"linear {self.activation}" if self.activation else "linear"

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width_in}x{self.width_out}"

    @property
    def reads(self) -> bool:
        return self.rows <= 8 and not self.backward

    @property
    def flops(self) -> float:
        products = 0 if self.reads else 3 if self.backward else 1
        return 2.0 * products * self.rows * self.width_in * self.width_out

    @property
    def traffic(self) -> float:
        size = 4.0 if self.dtype == "float32" else 2.0
        return self.width_in * self.width_out * size if self.reads else 0.0


@dataclass(frozen=True, kw_only=True)
class FeedForward(Case):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) where gated."""

    rows: int
    width: int
    hidden: int
    activation: str = "gelu"
    gated: bool = False
    dropout: float = 0.0  # of what goes into the last layer
    recompute: bool = False

    group: ClassVar[str] = "linear and FFN"
    tiny: ClassVar[dict[str, int]] = {"rows": 8, "width": 64, "hidden": 64}

    @property
    def title(self) -> str:
        options = {
            "gated": self.gated,
            self.activation: True,
            f"dropout {self.dropout:g}": self.dropout > 0,
            "recompute": self.recompute,
        }
        return " ".join(["ffn", *(word for word, on in options.items() if on)])

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width}x{self.hidden}"

    @property
    def flops(self) -> float:
        products = 3 if self.gated else 2
        return 2.0 * products * self.rows * self.width * self.hidden * (3 if self.backward else 1)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Case):
    """The loss of a language model: rows (rows, width) against a vocabulary (classes, width)."""

    rows: int
    width: int
    classes: int

    group: ClassVar[str] = "linear and FFN"
    tiny: ClassVar[dict[str, int]] = {"rows": 8, "width": 64, "classes": 64}

    @property
    def title(self) -> str:
        return "linear cross-entropy"

    @property
    def shape(self) -> str:
        return f"{self.rows}x{self.width}x{self.classes}"

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.width * self.classes * (3 if self.backward else 1)


@dataclass(frozen=True, kw_only=True)
class Model(Case):
    """A whole BERT encoder: MiniLM with its pretrained weights, or a random BERT of some size.

    `seq` cuts running text into rows of exactly that many tokens; without it a row is one
    sentence, padded to the longest of the batch under a mask.
    """

    weights: str  # minilm, bert-base, bert-small
    batch: int
    seq: int | None = None
    dropout: float = 0.0  # as in training: on attention, embeddings and both residuals

    group: ClassVar[str] = "whole model"
    tiny: ClassVar[dict[str, int]] = {"batch": 1, "seq": 16}

    @property
    def title(self) -> str:
        return f"{self.weights} dropout {self.dropout:g}" if self.dropout else self.weights

    @property
    def shape(self) -> str:
        return f"B{self.batch} S{self.seq}" if self.seq else f"{self.batch} sentences"


@dataclass(frozen=True, kw_only=True)
class Generation(Case):
    """A model that writes, with random weights: GPT-2 small or, in training, T5 small.

    prefill: GPT-2 reads a prompt of `seq` tokens and fills its cache. decode: it adds a token to a
    cache of `seq`. training: T5 reads `seq` tokens and writes `written`, with its learned position
    bias.
    """

    task: str  # prefill, decode, training
    batch: int
    seq: int
    written: int = 0
    dropout: float = 0.0

    group: ClassVar[str] = "whole model"
    tiny: ClassVar[dict[str, int]] = {"batch": 1, "seq": 16, "written": 8}

    @property
    def title(self) -> str:
        model = "t5-small" if self.task == "training" else "gpt2"
        dropout = f" dropout {self.dropout:g}" if self.dropout else ""
        return f"{model} {self.task}{dropout}"

    @property
    def shape(self) -> str:
        return f"B{self.batch} S{self.seq}" + (f"/{self.written}" if self.written else "")

    @property
    def passes(self) -> str:
        return "token" if self.task == "decode" else super().passes

    @property
    def reads(self) -> bool:
        return self.task == "decode"
