# SPDX-License-Identifier: Apache-2.0
"""Requests and answers of the contract as values, shared by the blocking and the async client.

Nothing here does I/O: a function makes a request message from arguments or a result from a
response message.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import grpc
import numpy as np

from . import tensors
from ._types import (Durability, FetchPart, Layout, LayoutInfo, LookupResult, Partial, PutResult,
                     SessionInfo, Tier)
from .errors import KiviError, from_code
from .v1 import kivi_pb2, types_pb2

BLOCK_TOKENS = 128
ROWS_MAX = 128
# A frame carries less than the service's message limit (4 MiB unless configured).
FRAME_BYTES = 2 << 20

LayoutLike = Union[Layout, LayoutInfo, Any]


@dataclasses.dataclass(frozen=True)
class Tls:
    """Files in PEM.  root: CA of the service (None: the system's); certificate and key: ours."""
    root: Optional[str] = None
    certificate: Optional[str] = None
    key: Optional[str] = None

    def credentials(self) -> grpc.ChannelCredentials:
        def read(path: Optional[str]) -> Optional[bytes]:
            return pathlib.Path(path).read_bytes() if path else None
        return grpc.ssl_channel_credentials(read(self.root), read(self.key),
                                            read(self.certificate))


def channel_options(extra: Sequence[Tuple[str, Any]]) -> List[Tuple[str, Any]]:
    return [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1),
            ("grpc.per_message_compression", 0), *extra]


def call_credentials(token: Optional[str]) -> Sequence[Tuple[str, str]]:
    return (("authorization", f"Bearer {token}"),) if token else ()


def as_layout(layout: LayoutLike, codec: Optional[str]) -> Layout:
    """A Layout from itself or from a transformers config (anything with num_hidden_layers)."""
    if isinstance(layout, Layout):
        return layout if codec is None else dataclasses.replace(layout, codec=codec)
    return Layout.of(layout, codec=codec or "kivi2")


def fixed_ids(token_ids: Optional[Any]) -> List[int]:
    if token_ids is None:
        return []
    ids, _ = tensors.to_numpy(token_ids)
    return [int(i) & 0xFFFFFFFF for i in ids.reshape(-1)]


def floats(values: Optional[Any]) -> List[float]:
    if values is None:
        return []
    return tensors.to_numpy(values)[0].astype(np.float32).reshape(-1).tolist()


class Shapes:
    """Sizes of one session's rows, and frames cut to them."""

    def __init__(self, info: LayoutInfo) -> None:
        self.info = info
        self.element = 4 if info.dtype == "f32" else 2
        self.kv_row = info.kv_heads * info.head_dim * self.element
        self.q_row = info.query_heads * info.head_dim * self.element

    def kv(self, k: Any, v: Any) -> Tuple[memoryview, memoryview, int]:
        tail = (self.info.kv_heads, self.info.head_dim)
        keys = tensors.to_wire(k, self.info.dtype, (-1, *tail), "k")
        values = tensors.to_wire(v, self.info.dtype, (-1, *tail), "v")
        if len(keys) != len(values):
            raise ValueError(f"v: {len(values) // self.kv_row} tokens, but k has "
                             f"{len(keys) // self.kv_row}")
        return keys, values, len(keys) // self.kv_row

    def q(self, q: Any) -> Tuple[memoryview, int]:
        rows = tensors.to_wire(q, self.info.dtype,
                               (-1, self.info.query_heads, self.info.head_dim), "q")
        return rows, len(rows) // self.q_row

    def append_frames(self, session: int, layer: int, k: Any, v: Any, expected: int,
                      token_ids: Optional[Any], query_energy: Optional[Any]) -> Iterator[Any]:
        """AppendRequests of at most FRAME_BYTES each."""
        keys, values, tokens = self.kv(k, v)
        ids = fixed_ids(token_ids)
        if ids and len(ids) != tokens:
            raise ValueError(f"token_ids: {len(ids)}, but k has {tokens} tokens")
        step = max(1, FRAME_BYTES // (2 * self.kv_row))
        for at in range(0, tokens, step):
            count = min(step, tokens - at)
            span = slice(at * self.kv_row, (at + count) * self.kv_row)
            yield kivi_pb2.AppendRequest(
                session=session, layer=layer, expected_length=expected + at, tokens=count,
                token_ids=ids[at:at + count],
                query_energy=floats(query_energy) if at == 0 else [],
                data=b"".join((keys[span], values[span])))

    def attend_item(self, session: int, q: Any, k: Any, v: Any, expected: Optional[int],
                    token_ids: Optional[Any], causal: bool, visible: Optional[Any],
                    energy: bool) -> Tuple[Any, List[memoryview], int]:
        """(item, its data, rows)."""
        data, rows = self.q(q)
        if rows > ROWS_MAX:
            raise ValueError(f"q: {rows} rows, at most {ROWS_MAX} in one call")
        parts, tokens = [data], 0
        if (k is None) != (v is None):
            raise ValueError("k and v: give both or neither")
        if k is not None:
            keys, values, tokens = self.kv(k, v)
            parts += [keys, values]
        item = kivi_pb2.AttendRequest.Item(
            session=session, rows=rows, append_tokens=tokens, expected_length=expected or 0,
            mask=kivi_pb2.AttendRequest.CAUSAL if causal else kivi_pb2.AttendRequest.ALL,
            visible=[] if visible is None else fixed_ids(visible),
            token_ids=fixed_ids(token_ids), no_energy=not energy)
        return item, parts, rows

    def partials(self, response: Any, rows: Sequence[int]) -> List[Union[Partial, KiviError]]:
        """Per item its result or its error."""
        results: List[Union[Partial, KiviError]] = []
        heads, dim, at = self.info.query_heads, self.info.head_dim, 0
        for item, count in zip(response.items, rows):
            if item.code:
                results.append(from_code(item.code, item.message))
                continue
            out = tensors.from_wire(response.data, "f32", (count, heads, dim), at)
            at += out.nbytes
            lse = tensors.from_wire(response.data, "f32", (count, heads), at)
            at += lse.nbytes
            results.append(Partial(out, lse))
        return results

    def fetched(self, response: Any) -> FetchPart:
        shape = (response.tokens, self.info.kv_heads, self.info.head_dim)
        half = response.tokens * self.kv_row
        return FetchPart(response.layer, response.begin,
                         tensors.from_wire(response.data, self.info.dtype, shape),
                         tensors.from_wire(response.data, self.info.dtype, shape, half))


def put_frames(info: LayoutInfo, pages: Mapping[int, Tuple[Any, Any]], digest: Optional[bytes],
               parent: Optional[bytes], token_ids: Optional[Any], salt: bytes,
               durability: Durability, energy: Mapping[int, Any], raw: bool) -> Iterator[Any]:
    """PutRequests of one block: layer -> (k, v), each [128, kv_heads, head_dim]."""
    shapes = Shapes(info)
    for layer, (k, v) in pages.items():
        keys, values, tokens = shapes.kv(k, v)
        if tokens != BLOCK_TOKENS:
            raise ValueError(f"k: a block has {BLOCK_TOKENS} tokens, not {tokens}")
        yield kivi_pb2.PutRequest(
            fingerprint=info.fingerprint, digest=digest or b"", parent=parent or b"",
            token_ids=fixed_ids(token_ids), salt=salt, layer=layer, form=types_pb2.FORM_FULL,
            durability=int(durability), query_energy=floats(energy.get(layer)), raw=raw,
            data=b"".join((keys, values)))


def put_result(response: Any) -> PutResult:
    if response.code:
        raise from_code(response.code, response.message)
    return PutResult(response.digest, response.existed, Durability(response.durability),
                     response.bytes_held)


def got(shapes: Shapes, response: Any) -> Tuple[int, int, Any, Any]:
    """(index, layer, k, v) of a Get response, or (index, layer, error, None)."""
    if response.code:
        return (response.index, response.layer, from_code(response.code, response.message), None)
    page = shapes.fetched(kivi_pb2.FetchResponse(layer=response.layer, tokens=BLOCK_TOKENS,
                                                 data=response.data))
    return response.index, response.layer, page.k, page.v


def lookup_request(info: LayoutInfo, token_ids: Optional[Any], digests: Optional[Iterable[bytes]],
                   salt: bytes, lease: float) -> Any:
    if (token_ids is None) == (digests is None):
        raise ValueError("token_ids and digests: give exactly one")
    return kivi_pb2.LookupRequest(
        fingerprint=info.fingerprint, salt=salt, token_ids=fixed_ids(token_ids),
        digests=list(digests or ()), lease_ms=int(lease * 1000))


def lookup_result(response: Any) -> LookupResult:
    return LookupResult([b.digest for b in response.blocks],
                        [Tier(b.tier) for b in response.blocks], response.tokens,
                        response.load_us / 1e6, response.lease_ms / 1e3)


def session_infos(responses: Iterable[Any]) -> Iterator[SessionInfo]:
    for response in responses:
        yield SessionInfo._from_wire(response)
