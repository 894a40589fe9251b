# SPDX-License-Identifier: Apache-2.0
"""Values of the contract as small dataclasses; nothing here talks to the service."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, List, NamedTuple, Optional, Sequence, Union

import numpy as np

from .v1 import types_pb2


class Durability(enum.IntEnum):
    """What a write has reached."""
    VOLATILE = types_pb2.VOLATILE
    WRITTEN = types_pb2.WRITTEN
    SYNCED = types_pb2.SYNCED


class Tier(enum.IntEnum):
    """Where a block is."""
    GPU = types_pb2.TIER_GPU
    HOST = types_pb2.TIER_HOST
    NVME = types_pb2.TIER_NVME
    REMOTE = types_pb2.TIER_REMOTE


_DTYPE_TO_WIRE = {"f16": types_pb2.DTYPE_F16, "bf16": types_pb2.DTYPE_BF16,
                  "f32": types_pb2.DTYPE_F32}
_DTYPE_FROM_WIRE = {number: name for name, number in _DTYPE_TO_WIRE.items()}


@dataclasses.dataclass(frozen=True)
class Codec:
    """How pages are packed, written out; a preset's name is usually enough.  See
    proto/kivi/v1/types.proto for the meaning of each field."""
    kind: str  # "raw", "minmax", "unbiased"
    key_bits: int = 0
    value_bits: int = 0
    group: int = 0
    value_rotated: bool = False
    mixes: Sequence[Sequence[int]] = ()

    def _to_wire(self) -> Any:
        return types_pb2.Codec(
            kind=types_pb2.Codec.Kind.Value(self.kind.upper()), key_bits=self.key_bits,
            value_bits=self.value_bits, group=self.group, value_rotated=self.value_rotated,
            mixes=[width for mix in self.mixes for width in mix])


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model's cache shape.

    Attributes:
        layers, kv_heads, query_heads, head_dim: of the model.
        dtype: of K, V and Q on the wire: "f16", "bf16" or "f32".
        codec: a preset's name (raw16, kivi2-paper, kivi4-paper, kivi2.5, kivi2, kivi1.75,
            kivi1.5) or a Codec.
        model: free text that tells models of one shape apart; part of the identity.
        softmax_scale: multiplies q.k; None: 1 / sqrt(head_dim).
        window_tokens, sink_blocks: the ends kept exact; None for both: the preset's.
    """
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    dtype: str = "f16"
    codec: Union[str, Codec] = "kivi2"
    model: str = ""
    softmax_scale: Optional[float] = None
    window_tokens: Optional[int] = None
    sink_blocks: Optional[int] = None

    @staticmethod
    def of(config: Any, *, dtype: Optional[str] = None, codec: Union[str, Codec] = "kivi2",
           **more: Any) -> "Layout":
        """The layout of a Hugging Face model config.

        dtype: None takes the config's (float32 if it says nothing).  `more` goes to Layout.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = text.num_attention_heads
        if dtype is None:
            name = str(getattr(text, "dtype", None) or getattr(text, "torch_dtype", None)
                       or "float32").replace("torch.", "")
            dtype = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}.get(name, "f32")
        if getattr(text, "query_pre_attn_scalar", None):  # Gemma
            more.setdefault("softmax_scale", text.query_pre_attn_scalar ** -0.5)
        if getattr(text, "attention_multiplier", None):  # Granite
            more.setdefault("softmax_scale", text.attention_multiplier)
        more.setdefault("model", getattr(config, "_name_or_path", "") or text.model_type)
        return Layout(
            layers=text.num_hidden_layers,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            query_heads=heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            dtype=dtype, codec=codec, **more)

    def _to_wire(self) -> Any:
        if self.dtype not in _DTYPE_TO_WIRE:
            raise ValueError(f"dtype: {self.dtype!r} is not one of f16, bf16, f32")
        wire = types_pb2.Layout(
            model=self.model, layers=self.layers, kv_heads=self.kv_heads,
            query_heads=self.query_heads, head_dim=self.head_dim,
            dtype=_DTYPE_TO_WIRE[self.dtype], softmax_scale=self.softmax_scale or 0)
        if isinstance(self.codec, str):
            wire.codec.preset = self.codec
        else:
            wire.codec.CopyFrom(self.codec._to_wire())
        if (self.window_tokens is None) != (self.sink_blocks is None):
            raise ValueError("window_tokens and sink_blocks: give both or neither")
        if self.window_tokens is not None:
            wire.exact.window_tokens = self.window_tokens
            wire.exact.sink_blocks = self.sink_blocks or 0
        return wire


@dataclasses.dataclass(frozen=True)
class LayoutInfo:
    """A layout as the service holds it, every default written out.

    Attributes:
        fingerprint: 32 bytes that name it.
        page_bytes_packed, page_bytes_full: one layer of one block of 128 tokens, packed and in
            16 bits.
        bits_per_element: of a packed page, metadata counted.
    """
    fingerprint: bytes
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    dtype: str
    codec: str
    model: str
    softmax_scale: float
    window_tokens: int
    sink_blocks: int
    page_bytes_packed: int
    page_bytes_full: int
    bits_per_element: float

    @staticmethod
    def _from_wire(wire: Any) -> "LayoutInfo":
        layout = wire.layout
        return LayoutInfo(
            wire.fingerprint, layout.layers, layout.kv_heads, layout.query_heads, layout.head_dim,
            _DTYPE_FROM_WIRE[layout.dtype], layout.codec.preset or "custom", layout.model,
            layout.softmax_scale, layout.exact.window_tokens, layout.exact.sink_blocks,
            wire.page_bytes_packed, wire.page_bytes_full, wire.bits_per_element)


@dataclasses.dataclass(frozen=True)
class SessionInfo:
    """What the service knows of a session; tokens and bytes as in the contract."""
    name: str
    fingerprint: bytes
    length: int
    length_committed: int
    sealed_tokens: int
    bytes_held: int
    bytes_full: int
    blocks_host: int
    blocks_nvme: int
    blocks_missing: int
    open: bool
    age_seconds: float
    durability: Optional[Durability]

    @staticmethod
    def _from_wire(wire: Any) -> "SessionInfo":
        return SessionInfo(
            wire.name, wire.fingerprint, wire.length, wire.length_committed, wire.sealed_tokens,
            wire.bytes_held, wire.bytes_full, wire.blocks_host, wire.blocks_nvme,
            wire.blocks_missing, wire.open, wire.age_ms / 1000,
            Durability(wire.durability) if wire.durability else None)


class Partial(NamedTuple):
    """Attention over some tokens: mergeable with attention over others.

    out: float32 [rows, query_heads, head_dim];  lse: float32 [rows, query_heads], natural log of
    the sum of exp(score).  A row that saw nothing has out 0 and lse -inf.
    """
    out: np.ndarray
    lse: np.ndarray


class FetchPart(NamedTuple):
    """K and V of tokens begin .. begin + len(k) - 1 of one layer: [tokens, kv_heads, head_dim],
    float16, or float32 for layouts of bf16 and f32."""
    layer: int
    begin: int
    k: np.ndarray
    v: np.ndarray


@dataclasses.dataclass(frozen=True)
class LookupResult:
    """The usable prefix of a chain: digests in order, where each is, and tokens covered.
    load_seconds: what bringing the cold ones to memory would take."""
    digests: List[bytes]
    tiers: List[Tier]
    tokens: int
    load_seconds: float
    lease_seconds: float


@dataclasses.dataclass(frozen=True)
class PutResult:
    """A block is in the cache.  existed: it was there before."""
    digest: bytes
    existed: bool
    durability: Durability
    bytes_held: int


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint sets of tokens.

    m = max(a, b);  out = (out_a e^(a-m) + out_b e^(b-m)) / (e^(a-m) + e^(b-m)).
    """
    top = np.maximum(a.lse, b.lse)
    safe = np.where(np.isneginf(top), 0, top)
    weight_a, weight_b = np.exp(a.lse - safe), np.exp(b.lse - safe)
    total = weight_a + weight_b
    divisor = np.where(total > 0, total, 1)
    out = (a.out * weight_a[..., None] + b.out * weight_b[..., None]) / divisor[..., None]
    with np.errstate(divide="ignore"):
        return Partial(out.astype(np.float32), (safe + np.log(total)).astype(np.float32))
