# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers on kivid: the cache lives in the service, attention comes back.

    kivi.hf.register()
    model.set_attn_implementation("kivi")
    with client.session("chat-42", model=model.config) as s:
        out = model.generate(**inputs, past_key_values=kivi.hf.RemoteCache(model.config, s))

Three modes, two of them built:

    attend   K, V and queries of new tokens go to the service, outputs and their log-sum-exp come
             back.  A decode step is one frame per layer.  A long prefill attends locally among
             the new tokens and merges that with the stored prefix through the log-sum-exp.
    fetch    K and V are appended and come back dequantized, for any stock attention.
    packed   packed pages come back and are attended on by the worker's own 2-bit kernel, so that
             neither queries nor full-precision keys cross the wire.  Not built.

What works: full attention (MHA, GQA, MQA), batches (one session per sequence), left padding,
greedy search and sampling, resuming by name.  What does not, and says so: sliding-window and
hybrid layers, attention soft caps, beam search and assisted decoding (both rewrite the past).
"""

from __future__ import annotations

import threading
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from ._types import Layout
from .client import Session
from .errors import KiviError

# New tokens up to this many go through the service in one frame, queries and all; more attend
# locally among themselves first, because their K and V are still here.
REMOTE_ROWS_MAX = 32
_FRAME_ROWS = 128
_TORCH = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}

_seen = threading.local()  # .ids: the last token ids that went through an embedding


def register() -> None:
    """Makes the attention implementation "kivi" known to transformers.  Idempotent."""
    if getattr(register, "done", False):
        return
    AttentionInterface.register("kivi", _attention)
    AttentionMaskInterface.register("kivi", _mask)
    # Blocks are shared by token ids, and a cache is never told them; the embedding is.
    nn.modules.module.register_module_forward_pre_hook(_remember_ids)
    register.done = True


def layout_of(config: Any, **more: Any) -> Layout:
    """The layout of a model config, after checking that its attention can be served.

    Raises:
        NotImplementedError: naming the kind of layer that cannot.
    """
    check(config)
    return Layout.of(config, **more)


def check(config: Any) -> None:
    """Refuses, by name, what the service cannot hold."""
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        raise NotImplementedError(
            f"layer_types: {', '.join(sorted(kinds))} layers are not supported by RemoteCache; "
            "only full_attention is. Use transformers' DynamicCache for this model.")
    window = getattr(text, "sliding_window", None)
    if window is not None and getattr(text, "use_sliding_window", True):
        raise NotImplementedError(
            f"sliding_window: {window}: sliding-window layers are not supported by RemoteCache; "
            "set config.sliding_window = None if the context stays below the window, or use "
            "transformers' DynamicCache.")
    if getattr(text, "attn_logit_softcapping", None):
        raise NotImplementedError(
            "attn_logit_softcapping: soft-capped attention is not supported by RemoteCache.")


class RemoteCache(Cache):
    """A transformers cache whose tokens live in one or more kivid sessions.

    Args:
        config: the model's config.
        sessions: one Session, or one per sequence of the batch.
        mode: "attend" (needs model.set_attn_implementation("kivi")) or "fetch".

    A cache belongs to one thread.  Its sessions stay open; commit or close them yourself.
    """

    def __init__(self, config: Any, sessions: Union[Session, Sequence[Session]], *,
                 mode: str = "attend") -> None:
        check(config)
        if mode == "packed":
            raise NotImplementedError("mode: 'packed' is described in kivi.hf, but not built; use "
                                      "'attend', or 'fetch' for a stock attention")
        if mode not in ("attend", "fetch"):
            raise ValueError(f"mode: {mode!r} is not one of attend, fetch")
        self.sessions: List[Session] = ([sessions] if isinstance(sessions, Session)
                                        else list(sessions))
        lengths = {s.length for s in self.sessions}
        if len(lengths) != 1:
            raise ValueError(f"sessions: their lengths differ ({sorted(lengths)}); resume them "
                             "one by one, each with a RemoteCache of its own")
        for s in self.sessions:
            if s.usable < s.length:
                raise KiviError(f"session {s.name}: tokens from {s.usable} on were evicted; "
                                "delete it and prefill again")
        info = self.sessions[0].info
        text = config.get_text_config(decoder=True)
        if info.layers != text.num_hidden_layers:
            raise ValueError(f"config: {text.num_hidden_layers} layers, the session's layout has "
                             f"{info.layers}")
        kind = _AttendLayer if mode == "attend" else _FetchLayer
        super().__init__(layers=[kind(self, i, lengths.copy().pop()) for i in range(info.layers)])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        raise NotImplementedError("beam search rewrites the past, which lives in the service; use "
                                  "num_beams=1, or a DynamicCache")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("assisted decoding takes tokens back, which the service does "
                                  "not do yet; call generate() without an assistant")

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats != 1:
            raise NotImplementedError("several sequences per prompt: open one session for each "
                                      "and repeat the inputs instead")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise NotImplementedError("selecting sequences of a batch is not supported; use one "
                                  "RemoteCache per group of sequences")

    def reset(self) -> None:
        raise NotImplementedError("a session cannot be emptied; delete it and open another")


class _Layer(CacheLayerMixin):
    """One layer: counts tokens as transformers does (padding included)."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: RemoteCache, index: int, length: int) -> None:
        super().__init__()
        self.sessions = cache.sessions
        self.index = index
        self.seen = length
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def get_mask_sizes(self, query_length: int) -> Tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def wire(self, states: torch.Tensor) -> torch.Tensor:
        """[heads, tokens, dim] -> [tokens, heads, dim] in the layout's dtype, in host memory."""
        dtype = _TORCH[self.sessions[0].info.dtype]
        return states.transpose(0, 1).to("cpu", dtype).contiguous()

    def token_ids(self, batch: int, tokens: int) -> Optional[torch.Tensor]:
        """Ids of the new tokens, [batch, tokens], when layer 0 brings them."""
        ids = getattr(_seen, "ids", None)
        if self.index != 0 or ids is None or tuple(ids.shape) != (batch, tokens):
            return None
        return ids.cpu()

    def batch_checked(self, states: torch.Tensor) -> int:
        if states.shape[0] != len(self.sessions):
            raise ValueError(f"sessions: {len(self.sessions)} for a batch of {states.shape[0]}; "
                             "give RemoteCache one session per sequence")
        return states.shape[0]


class _AttendLayer(_Layer):
    """Hands K and V on to the attention function, which sends them with the queries."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        self.batch_checked(key_states)
        key_states._kivi_layer = self  # how _attention finds this layer again
        return key_states, value_states

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               mask: Optional[torch.Tensor], scaling: Optional[float]) -> torch.Tensor:
        """query [B, Hq, T, D], key and value [B, H, T, D] -> [B, T, Hq, D]."""
        batch, tokens = query.shape[0], query.shape[2]
        info = self.sessions[0].info
        if scaling is not None and abs(scaling / info.softmax_scale - 1) > 1e-5:
            raise ValueError(f"softmax_scale: the model uses {scaling}, the session's layout "
                             f"{info.softmax_scale}; open the session with "
                             f"kivi.Layout.of(config, softmax_scale={scaling})")
        kept = [tokens] * batch
        if mask is not None:
            recent = mask[:, -tokens:]
            kept = [int(n) for n in recent.sum(-1)]
            for row, count in zip(recent, kept):
                if count and not bool(row[tokens - count:].all()):
                    raise ValueError("attention_mask: only left padding is supported; pad with "
                                     "padding_side='left'")
        ids = self.token_ids(batch, tokens)
        out = query.new_zeros(batch, tokens, query.shape[1], query.shape[3])
        q, k, v = [], [], []
        for b, n in enumerate(kept):
            q.append(self.wire(query[b, :, tokens - n:]))
            k.append(self.wire(key[b, :, tokens - n:]))
            v.append(self.wire(value[b, :, tokens - n:]))
        id_rows = [None if ids is None else ids[b, tokens - n:] for b, n in enumerate(kept)]
        active = [b for b, n in enumerate(kept) if n]
        if max(kept, default=0) <= REMOTE_ROWS_MAX:
            results = self._remote(active, q, k, v, id_rows)
        else:
            results = [self._prefill(b, q[b], k[b], v[b], id_rows[b]) for b in active]
        for b, result in zip(active, results):
            out[b, tokens - kept[b]:] = result.to(out.dtype).to(out.device)
        self.seen += tokens
        return out

    def _remote(self, active: List[int], q: Any, k: Any, v: Any, ids: Any) -> List[torch.Tensor]:
        """Everything in one frame: append, then attend on all of it."""
        if not active:
            return []
        first, *others = [self.sessions[b] for b in active]
        pick = lambda values: [values[b] for b in active]
        outs = []
        for result in first.attend_batch(self.index, others, pick(q), pick(k), pick(v),
                                         token_ids=pick(ids)):
            if isinstance(result, KiviError):
                raise result
            outs.append(torch.from_numpy(result.out.copy()))
        return outs

    def _prefill(self, b: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                 ids: Optional[torch.Tensor]) -> torch.Tensor:
        """New tokens among themselves here, the stored prefix there, merged."""
        session, info = self.sessions[b], self.sessions[b].info
        out, lse = _causal_attention(q, k, v, info.softmax_scale)
        past = session.lengths[self.index]
        for at in range(0, len(q) if past else 0, _FRAME_ROWS):
            rows = slice(at, at + _FRAME_ROWS)
            there = session.attend(self.index, q[rows], energy=False,
                                   visible=torch.full((len(q[rows]),), past))
            out[rows], lse[rows] = _merge(out[rows], lse[rows], torch.from_numpy(there.out.copy()),
                                          torch.from_numpy(there.lse.copy()))
        energy = q.float().square().mean(0).unflatten(0, (info.kv_heads, -1)).mean(1)
        session.append(self.index, k, v, token_ids=ids, query_energy=energy)
        return out


class _FetchLayer(_Layer):
    """Appends, then gives back all K and V as the service would attend on them.

    Sealed tokens never change, so only what is newer than the last fetch's exact tail is fetched
    again.
    """

    def __init__(self, cache: RemoteCache, index: int, length: int) -> None:
        super().__init__(cache, index, length)
        self.parts: List[Optional[Tuple[torch.Tensor, torch.Tensor]]] = [None] * len(self.sessions)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any,
               **kwargs: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        batch = self.batch_checked(key_states)
        ids = self.token_ids(batch, key_states.shape[2])
        keys, values = [], []
        for b, session in enumerate(self.sessions):
            session.append(self.index, self.wire(key_states[b]), self.wire(value_states[b]),
                           token_ids=None if ids is None else ids[b])
            k, v = self._whole(b, session)
            keys.append(k)
            values.append(v)
        self.seen += key_states.shape[2]
        stack = lambda parts, like: torch.stack(parts).transpose(1, 2).to(like.device, like.dtype)
        return stack(keys, key_states), stack(values, value_states)

    def _whole(self, b: int, session: Session) -> Tuple[torch.Tensor, torch.Tensor]:
        """[tokens, heads, dim] of K and of V."""
        length, info = session.lengths[self.index], session.info
        stable = max(0, length - info.window_tokens - 2 * 128) // 128 * 128
        held = self.parts[b]
        begin = 0 if held is None else len(held[0])
        parts = [] if held is None else [held]
        for part in session.fetch([self.index], begin, length):
            parts.append((torch.from_numpy(part.k.copy()), torch.from_numpy(part.v.copy())))
        k, v = (torch.cat([p[i] for p in parts]) for i in (0, 1))
        self.parts[b] = (k[:stable], v[:stable]) if stable else None
        return k, v


def _attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               attention_mask: Optional[torch.Tensor], scaling: Optional[float] = None,
               dropout: float = 0.0, **kwargs: Any) -> Tuple[torch.Tensor, None]:
    """The implementation behind set_attn_implementation("kivi")."""
    layer = getattr(key, "_kivi_layer", None)
    if layer is None:
        raise RuntimeError('attention implementation "kivi" needs past_key_values='
                           "kivi.hf.RemoteCache(...); for anything else set another "
                           'implementation, such as "sdpa"')
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: not supported by RemoteCache")
    with torch.no_grad():
        return layer.attend(query, key, value, attention_mask, scaling), None


def _mask(batch_size: int, *args: Any, attention_mask: Optional[torch.Tensor] = None,
          **kwargs: Any) -> Optional[torch.Tensor]:
    """The padding mask [batch, seen + new] as it is, or None where nothing is padded."""
    if attention_mask is None or attention_mask.ndim != 2 or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


def _remember_ids(module: nn.Module, args: Tuple[Any, ...]) -> None:
    if isinstance(module, nn.Embedding) and args and getattr(args[0], "ndim", 0) == 2:
        _seen.ids = args[0]


def _causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
                      ) -> Tuple[torch.Tensor, torch.Tensor]:
    """q [T, Hq, D], k and v [T, H, D] -> out [T, Hq, D], lse [T, Hq], float32, in row panels so
    that memory stays linear."""
    tokens, heads, dim = q.shape
    group = heads // k.shape[1]
    keys = k.float().permute(1, 2, 0).repeat_interleave(group, 0)  # [Hq, D, T]
    values = v.float().transpose(0, 1).repeat_interleave(group, 0)  # [Hq, T, D]
    out, lse = q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:2],
                                                                      dtype=torch.float32)
    panel = 256
    for at in range(0, tokens, panel):
        end = min(tokens, at + panel)
        scores = q[at:end].float().transpose(0, 1) @ keys[..., :end] * scale
        later = torch.arange(end) > torch.arange(at, end)[:, None]
        scores.masked_fill_(later, -torch.inf)
        total = scores.logsumexp(-1)
        out[at:end] = ((scores - total[..., None]).exp() @ values[:, :end]).transpose(0, 1)
        lse[at:end] = total.T
    return out, lse


def _merge(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
           ) -> Tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two sets of tokens; see the contract's formula."""
    lse = torch.logaddexp(lse_a, lse_b)
    return (out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]), lse
