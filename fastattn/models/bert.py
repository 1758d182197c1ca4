"""BERT in one file: encoder, pooled output and masked-LM head, under their Hugging Face names.

"BERT: Pre-training of Deep Bidirectional Transformers", https://arxiv.org/abs/1810.04805.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import models
from fastattn.models import parts


def _size(layers: int, heads: int, width: int) -> dict[str, int]:
    names = "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size"
    return dict(zip(names, (layers, heads, width, 4 * width), strict=True))


SIZES = {  # for BertConfig(**SIZES["bert-base"])
    "bert-tiny": _size(2, 2, 128),
    "bert-small": _size(4, 8, 512),
    "bert-base": _size(12, 12, 768),
    "bert-large": _size(24, 16, 1024),
}


@dataclass(frozen=True)
class BertConfig:
    """Sizes and rates, named as in Hugging Face's config.json; the defaults are BERT base's."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            got = self.hidden_size, self.num_attention_heads
            raise ValueError(f"hidden_size must be a multiple of num_attention_heads, got {got}")
        parts.check_activation("hidden_act", self.hidden_act)

    @classmethod
    def from_json(cls, path: str | Path) -> BertConfig:
        """Reads a config.json; raises ValueError for what would make it another model."""
        needed = {"model_type": "bert", "is_decoder": False, "tie_word_embeddings": True}
        needed["position_embedding_type"] = "absolute"
        return models.read_config(cls, path, needed)


class Embeddings(nn.Module):
    """Word, token type and position, summed and normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, pad = config.hidden_size, config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=pad)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, types: Tensor, positions: Tensor, ops: Any) -> Tensor:
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(types)
        x = x + self.position_embeddings(positions)  # [B, S, E]
        return self.dropout(parts.norm(ops, x, self.LayerNorm))


class SelfAttention(nn.Module):
    """Every token attends to all tokens of its own row that are no padding."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        width = config.hidden_size
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, attend: parts.Padded, ops: Any) -> Tensor:
        query, key, value = (
            parts.linear(ops, x, proj).unflatten(-1, (self.heads, -1))
            for proj in (self.query, self.key, self.value)
        )  # [B, S, H, D]
        dropout_p = self.dropout_p if self.training else 0.0
        return attend(query, key, value, dropout_p=dropout_p).flatten(-2)  # [B, S, E]


class Layer(nn.Module):
    """Self-attention and feed-forward, each followed by residual add and norm."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        # the dictionaries give the parameters their names
        after = _dense_and_norm(width, width, eps)
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": after})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, inner)})
        self.output = _dense_and_norm(inner, width, eps)
        self.dropout_p = config.hidden_dropout_prob
        self.activation = parts.ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, attend: parts.Padded, ops: Any) -> Tensor:
        proj, norm = self.attention["output"].values()
        after = {"dropout_p": self.dropout_p if self.training else 0.0, "return_sum": False}
        out = parts.linear(ops, self.attention["self"](x, attend, ops), proj)
        x = parts.add_norm(ops, out, x, norm, **after)
        down, norm = self.output.values()
        out = parts.ffn(ops, x, self.intermediate["dense"], down, activation=self.activation)
        return parts.add_norm(ops, out, x, norm, **after)  # [B, S, E]


class BertOutput(NamedTuple):
    """What the encoder returns."""

    last_hidden_state: Tensor  # [B, S, E]
    pooler_output: Tensor | None  # [B, E]


class Bert(nn.Module):
    """The encoder. `kernels` names the ops (see fastattn.models) and may be changed at any time."""

    def __init__(self, config: BertConfig, kernels: str = "fused", pooler: bool = True) -> None:
        super().__init__()
        models.ops(kernels)
        self.config, self.kernels = config, kernels
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.pooler = nn.ModuleDict({"dense": dense}) if pooler else None
        parts.init_weights(self, config.initializer_range)

    @classmethod
    def from_pretrained(cls, folder: str | Path, kernels: str = "fused") -> Bert:
        """Loads a Hugging Face folder in eval mode, in the dtype of its weights.

        Reads config.json and model.safetensors or pytorch_model.bin, names with or without
        "bert.". Raises FileNotFoundError, or ValueError for the config of another model.
        """
        config, state = _read(Path(folder))
        state = {k.removeprefix("bert."): v for k, v in state.items() if k.startswith("bert.")}
        with torch.device("meta"):
            model = cls(config, kernels, pooler="pooler.dense.weight" in state)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> BertOutput:
        """Encodes token ids.

        Args:
            input_ids: (B, S) integers.
            attention_mask: (B, S) bool or integer, 1 at tokens and 0 at padding; None: no padding.
            token_type_ids: (B, S) integers; None: all 0.
            position_ids: (S,) or (B, S) integers; None: 0 .. S - 1.

        Returns the last hidden state (B, S, E) and, with a pooler, the first token's state after
        its linear layer and tanh (B, E). Fused kernels leave out padding, whose state is then 0,
        unless torch.compile, which cannot know how much there is, traces the model. Raises
        ValueError naming the argument.
        """
        mask = parts.visible(input_ids, attention_mask, self.config.max_position_embeddings)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
        ops = models.ops(self.kernels)
        attend = parts.self_attention(self.kernels, mask)
        ids = input_ids, token_type_ids, position_ids
        x = self.embeddings(*(attend.pack(x.expand(input_ids.shape)) for x in ids), ops)
        for layer in self.encoder["layer"]:
            x = layer(x, attend, ops)  # [B, S, E]
        x = attend.unpack(x)
        if self.pooler is None:
            return BertOutput(x, None)
        return BertOutput(x, parts.linear(ops, x[:, 0], self.pooler["dense"]).tanh())


class PredictionHead(nn.Module):
    """From the encoder's last state to logits over the vocabulary."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.transform = _dense_and_norm(width, width, config.layer_norm_eps)
        self.decoder = nn.Linear(width, config.vocab_size)
        self.activation = parts.ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, ops: Any) -> Tensor:
        return parts.linear(ops, self._transformed(x, ops), self.decoder)  # [B, S, vocab]

    def loss(self, x: Tensor, target: Tensor, ops: Any) -> Tensor:
        weight, bias = self.decoder.weight, self.decoder.bias
        return ops.linear_cross_entropy(self._transformed(x, ops), weight, target, linear_bias=bias)

    def _transformed(self, x: Tensor, ops: Any) -> Tensor:
        dense, norm = self.transform.values()
        return parts.norm(ops, parts.linear(ops, x, dense, self.activation), norm)  # [B, S, E]


class BertForMaskedLM(nn.Module):
    """The encoder and the head that predicts masked tokens; its decoder is the word embedding."""

    def __init__(self, config: BertConfig, kernels: str = "fused") -> None:
        super().__init__()
        self.bert = Bert(config, kernels, pooler=False)
        self.cls = nn.ModuleDict({"predictions": PredictionHead(config)})
        parts.init_weights(self, config.initializer_range)
        self._tie_weights()

    def _tie_weights(self) -> None:
        head = self.cls["predictions"]
        head.decoder.weight = self.bert.embeddings.word_embeddings.weight
        head.bias = head.decoder.bias  # Hugging Face's state dict holds both names

    @classmethod
    def from_pretrained(cls, folder: str | Path, kernels: str = "fused") -> BertForMaskedLM:
        """Loads a Hugging Face folder as Bert.from_pretrained does, with the masked-LM head."""
        config, state = _read(Path(folder))
        if "cls.predictions.transform.dense.weight" not in state:
            raise ValueError(f"{folder} has no weights of a masked-LM head (cls.predictions)")
        heads = "bert.pooler.", "cls.seq_relationship."  # of next-sentence prediction
        state = {k: v for k, v in state.items() if not k.startswith(heads)}
        # files keep one name of a shared tensor
        state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
        state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
        with torch.device("meta"):
            model = cls(config, kernels)
        model.load_state_dict(state, assign=True)
        model._tie_weights()
        return model.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, S, vocab_size) of every token; the arguments are Bert.forward's."""
        args = attention_mask, token_type_ids, position_ids
        return self.logits(self.bert(input_ids, *args).last_hidden_state)

    def logits(self, states: Tensor) -> Tensor:
        """Logits (..., vocab_size) of the encoder's states (..., E)."""
        return self.cls["predictions"](states, models.ops(self.bert.kernels))

    def loss(self, states: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy of target (...) int64 given the encoder's states (..., E).

        Targets that are -100 do not count. Fused ops compute no logits for them, and keep none.
        """
        return self.cls["predictions"].loss(states, target, models.ops(self.bert.kernels))


def sentence_embeddings(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Sentence-BERT's embedding: the mean over a sentence's tokens, scaled to unit length.

    Args: hidden (B, S, E); attention_mask (B, S), 1 at tokens and 0 at padding. Returns (B, E).
    See https://arxiv.org/abs/1908.10084.
    """
    total = (hidden * attention_mask[..., None]).sum(1)  # the mean, but for a length that is lost
    return F.normalize(total, dim=-1)


def _dense_and_norm(in_features: int, out_features: int, eps: float) -> nn.ModuleDict:
    norm = nn.LayerNorm(out_features, eps=eps)
    return nn.ModuleDict({"dense": nn.Linear(in_features, out_features), "LayerNorm": norm})


def _read(folder: Path) -> tuple[BertConfig, dict[str, Tensor]]:
    config = BertConfig.from_json(folder / "config.json")
    bare = "embeddings.", "encoder.", "pooler."
    state = {
        f"bert.{name}" if name.startswith(bare) else name: tensor
        for name, tensor in models.load_weights(folder).items()
    }
    state.pop("bert.embeddings.position_ids", None)  # a buffer of old checkpoints
    return config, state
