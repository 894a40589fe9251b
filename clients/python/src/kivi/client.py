# SPDX-License-Identifier: Apache-2.0
"""The blocking client.

Threads.  A Client may be used by many threads; a Session by one at a time.
Retries.  Calls that change nothing, or the same thing twice, are retried while the service is
    unavailable (`retries` times, 0.1 s doubling).  Append, Attend and Put are not: a lost answer
    leaves open whether the tokens arrived; `Session.describe()` asks.
"""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, TypeVar

import grpc

from . import _calls
from ._calls import LayoutLike, Tls
from ._frames import Frames
from ._types import (Durability, FetchPart, Layout, LayoutInfo, LookupResult, Partial, PutResult,
                     SessionInfo)
from .errors import KiviError, Unavailable, from_rpc
from .v1 import admin_pb2, admin_pb2_grpc, kivi_pb2, kivi_pb2_grpc

T = TypeVar("T")


class Client:
    """A connection to kivid.

    Args:
        target: "unix:///path/kivid.sock", "host:port" or "dns:///name:port".
        timeout: seconds that a call may take; every method takes its own as well.
        token: bearer token, sent with every call.
        tls: Tls(...) for a TLS connection; None: plain text.
        retries: see the module.
        options: further gRPC channel arguments.
    """

    def __init__(self, target: str, *, timeout: float = 30.0, token: Optional[str] = None,
                 tls: Optional[Tls] = None, retries: int = 3,
                 options: Sequence[Tuple[str, Any]] = ()) -> None:
        arguments = _calls.channel_options(options)
        self._channel = (grpc.secure_channel(target, tls.credentials(), arguments) if tls
                         else grpc.insecure_channel(target, arguments))
        self._kivi = kivi_pb2_grpc.KiviStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)
        self._metadata = _calls.call_credentials(token)
        self._timeout = timeout
        self._retries = retries
        self._layouts: Dict[Layout, LayoutInfo] = {}

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection.  Open sessions stay in the service until its idle limit."""
        self._channel.close()

    # -- layouts and sessions -----------------------------------------------------------------

    def register(self, layout: LayoutLike, *, codec: Optional[str] = None,
                 timeout: Optional[float] = None) -> LayoutInfo:
        """Registers a layout (or a transformers config); idempotent.

        Raises:
            InvalidArgument: the service cannot represent it; `field` says what.
        """
        layout = _calls.as_layout(layout, codec)
        if layout not in self._layouts:
            request = kivi_pb2.RegisterLayoutRequest(layout=layout._to_wire())
            response = self._unary(self._kivi.RegisterLayout, request, timeout)
            self._layouts[layout] = LayoutInfo._from_wire(response.info)
        return self._layouts[layout]

    def session(self, name: str, layout: Optional[LayoutLike] = None, *,
                model: Optional[Any] = None, codec: Optional[str] = None, salt: bytes = b"",
                mode: str = "open_or_create", token_ids: Optional[Any] = None,
                timeout: Optional[float] = None) -> "Session":
        """Opens a session by name: new, or as it was last committed.

        Args:
            name: 1 to 200 bytes.
            layout: a Layout or LayoutInfo; or `model`, a transformers config.
            codec: a preset that replaces the layout's.
            salt: separates chains: only equal salts share blocks.
            mode: "open_or_create", "create" or "existing".
            token_ids: a new session starts with the longest prefix of these that is cached.

        Raises:
            FailedPrecondition: the name exists with another layout or salt.
            AlreadyExists, NotFound: as `mode` asks.
        """
        info = layout if isinstance(layout, LayoutInfo) else self.register(
            layout if layout is not None else model, codec=codec, timeout=timeout)
        request = kivi_pb2.OpenSessionRequest(
            name=name, fingerprint=info.fingerprint, salt=salt,
            mode=kivi_pb2.OpenSessionRequest.Mode.Value(mode.upper()),
            token_ids=_calls.fixed_ids(token_ids))
        return Session(self, name, request, timeout)

    def sessions(self, prefix: str = "", *, timeout: Optional[float] = None
                 ) -> Iterator[SessionInfo]:
        """Sessions by name."""
        return _calls.session_infos(
            self._stream(self._kivi.List, kivi_pb2.ListRequest(prefix=prefix), timeout))

    def describe(self, name: str, *, timeout: Optional[float] = None) -> SessionInfo:
        """One session.  NotFound if there is none."""
        response = self._unary(self._kivi.Describe, kivi_pb2.DescribeRequest(name=name), timeout)
        return SessionInfo._from_wire(response.info)

    def delete(self, name: str, *, timeout: Optional[float] = None) -> None:
        """Forgets a session, durably.  NotFound if there is none."""
        self._unary(self._kivi.Delete, kivi_pb2.DeleteRequest(name=name), timeout)

    # -- blocks -------------------------------------------------------------------------------

    def lookup(self, info: LayoutInfo, token_ids: Optional[Any] = None, *,
               digests: Optional[Sequence[bytes]] = None, salt: bytes = b"", lease: float = 0,
               timeout: Optional[float] = None) -> LookupResult:
        """The longest prefix of a text (or of a chain of digests) that is in the cache.

        lease: seconds for which the blocks found are protected from being dropped.
        """
        request = _calls.lookup_request(info, token_ids, digests, salt, lease)
        return _calls.lookup_result(self._unary(self._kivi.Lookup, request, timeout))

    def put(self, info: LayoutInfo, pages: Mapping[int, Tuple[Any, Any]], *,
            digest: Optional[bytes] = None, parent: Optional[bytes] = None,
            token_ids: Optional[Any] = None, salt: bytes = b"",
            durability: Durability = Durability.VOLATILE,
            query_energy: Optional[Mapping[int, Any]] = None, raw: bool = False,
            timeout: Optional[float] = None) -> PutResult:
        """Puts one block: layer -> (k, v), each [128, kv_heads, head_dim].

        Name it by `digest`, or by `parent` (None: the chain's root) and its 128 `token_ids`.
        query_energy: layer -> mean of q^2, [kv_heads, head_dim].  raw: keep in 16 bits.
        """
        frames = _calls.put_frames(info, pages, digest, parent, token_ids, salt, durability,
                                   query_energy or {}, raw)
        try:
            for response in self._kivi.Put(frames, timeout=timeout or self._timeout,
                                           metadata=self._metadata):
                return _calls.put_result(response)
        except grpc.RpcError as error:
            raise from_rpc(error) from None
        raise Unavailable("the service ended the stream without an answer")

    def get(self, info: LayoutInfo, digests: Sequence[bytes], *,
            layers: Sequence[int] = (), timeout: Optional[float] = None) -> Iterator[Any]:
        """Yields (index into digests, layer, k, v), layer-major; k, v: [128, kv_heads, head_dim].

        A block that fails is yielded as (index, layer, error, None), and the rest goes on.
        """
        shapes = _calls.Shapes(info)
        request = kivi_pb2.GetRequest(fingerprint=info.fingerprint, digests=list(digests),
                                      layers=list(layers))
        for response in self._stream(self._kivi.Get, request, timeout):
            yield _calls.got(shapes, response)

    # -- the service --------------------------------------------------------------------------

    def stats(self, *, timeout: Optional[float] = None) -> Any:
        """Counters and limits: kivi.v1.admin_pb2.StatsResponse."""
        return self._unary(self._admin.Stats, admin_pb2.StatsRequest(), timeout)

    def layouts(self, *, timeout: Optional[float] = None) -> List[LayoutInfo]:
        """Layouts that are registered."""
        response = self._unary(self._admin.Layouts, admin_pb2.LayoutsRequest(), timeout)
        return [LayoutInfo._from_wire(info) for info in response.layouts]

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Returns when the service can be reached.  Unavailable after `timeout` seconds."""
        try:
            grpc.channel_ready_future(self._channel).result(timeout)
        except grpc.FutureTimeoutError:
            raise Unavailable(f"not reached within {timeout} s") from None

    # -- inner --------------------------------------------------------------------------------

    def _unary(self, method: Callable[..., T], request: Any, timeout: Optional[float],
               retry: bool = True) -> T:
        wait = 0.1
        for attempt in range(self._retries + 1):
            try:
                return method(request, timeout=timeout or self._timeout, metadata=self._metadata)
            except grpc.RpcError as rpc_error:
                error = from_rpc(rpc_error)
                if not retry or not isinstance(error, Unavailable) or attempt == self._retries:
                    raise error from None
            time.sleep(wait)
            wait *= 2
        raise AssertionError("unreachable")

    def _stream(self, method: Callable[..., Any], request: Any, timeout: Optional[float]
                ) -> Iterator[Any]:
        try:
            yield from method(request, timeout=timeout or self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc(error) from None


class Session:
    """A conversation's cache in the service.  Made by Client.session(); a context manager that
    commits and closes on a clean exit, and only closes when an exception passes through.

    Attributes:
        name, info: its name and layout.
        lengths: tokens per layer as this client knows them; `length` is what all have.
        usable: first token that had been evicted when it was opened, or `length`.
        created: it did not exist before.
    """

    def __init__(self, client: Client, name: str, request: Any, timeout: Optional[float]) -> None:
        self._client = client
        self._request = request
        self.name = name
        self._attends = Frames(client._kivi.Attend, client._metadata)
        self._appends = Frames(client._kivi.Append, client._metadata)
        self._open(timeout)

    def _open(self, timeout: Optional[float]) -> None:
        response = self._client._unary(self._client._kivi.OpenSession, self._request, timeout)
        self.handle: int = response.session
        self.info = LayoutInfo._from_wire(response.info)
        self._shapes = _calls.Shapes(self.info)
        self._evicted_from: Optional[int] = (
            response.usable if response.usable < response.length else None)
        self.created: bool = response.created
        self.lengths: List[int] = [response.length] * self.info.layers

    @property
    def length(self) -> int:
        """Tokens that every layer has, as this client knows."""
        return min(self.lengths)

    @property
    def usable(self) -> int:
        """First token that had been evicted when the session was opened, or `length`."""
        return self.length if self._evicted_from is None else self._evicted_from

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            try:
                self.close(commit=False)
            except KiviError:
                pass  # the exception on its way says more

    def reopen(self, *, timeout: Optional[float] = None) -> None:
        """Opens the session again after the service was restarted: as last committed."""
        self._attends.close()
        self._appends.close()
        self._request.mode = kivi_pb2.OpenSessionRequest.OPEN_OR_CREATE
        self._open(timeout)

    def describe(self, *, timeout: Optional[float] = None) -> SessionInfo:
        """Asks the service what it holds."""
        return self._client.describe(self.name, timeout=timeout)

    def append(self, layer: int, k: Any, v: Any, *, token_ids: Optional[Any] = None,
               query_energy: Optional[Any] = None, expected_length: Optional[int] = None,
               timeout: Optional[float] = None) -> int:
        """Adds K and V of new tokens of one layer.

        Args:
            k, v: [tokens, kv_heads, head_dim] of the layout's dtype.
            token_ids: [tokens], with whichever layer comes first: makes blocks shareable.
            query_energy: [kv_heads, head_dim], running mean of q^2 of the queries to come.
            expected_length: tokens the layer has now; None: as this client knows.

        Returns:
            The layer's length now.

        Raises:
            Aborted: another writer was faster.
        """
        at = self.lengths[layer] if expected_length is None else expected_length
        for frame in self._shapes.append_frames(self.handle, layer, k, v, at, token_ids,
                                                query_energy):
            response = self._appends.exchange(frame, timeout or self._client._timeout)
            self.lengths[layer] = response.length
        return self.lengths[layer]

    def attend(self, layer: int, q: Any, k: Optional[Any] = None, v: Optional[Any] = None, *,
               causal: bool = True, visible: Optional[Any] = None,
               token_ids: Optional[Any] = None, energy: bool = True,
               timeout: Optional[float] = None) -> Partial:
        """Attention of query rows over the session, after appending k and v if given.

        Args:
            q: [rows, query_heads, head_dim], at most 128 rows.
            k, v: [tokens, kv_heads, head_dim]: appended first, in the same frame.
            causal: the rows are the newest tokens, row r of n sees length - n + 1 + r of them;
                False: every row sees everything.
            visible: [rows], explicit limits instead.
            energy: let these rows count for the session's query energy.

        Returns:
            Partial(out [rows, query_heads, head_dim] float32, lse [rows, query_heads]).
        """
        result = self._client_attend(layer, [(self, q, k, v, token_ids, causal, visible, energy)],
                                     timeout)[0]
        if isinstance(result, KiviError):
            raise result
        return result

    def attend_batch(self, layer: int, others: Sequence["Session"], q: Any,
                     k: Optional[Any] = None, v: Optional[Any] = None, *, causal: bool = True,
                     token_ids: Optional[Any] = None, timeout: Optional[float] = None
                     ) -> List[Any]:
        """attend() for this session and others of the same layout in one frame.

        q, k, v: sequences, one entry per session, this one's first; token_ids alike.

        Returns:
            Per session its Partial, or the KiviError that it met.
        """
        sessions = [self, *others]
        none = [None] * len(sessions)
        items = [(s, q[i], (k or none)[i], (v or none)[i],
                  (token_ids if token_ids is not None else none)[i], causal, None, True)
                 for i, s in enumerate(sessions)]
        return self._client_attend(layer, items, timeout)

    def _client_attend(self, layer: int, items: Sequence[Any], timeout: Optional[float]
                       ) -> List[Any]:
        wire, data, rows = [], [], []
        for session, q, k, v, token_ids, causal, visible, energy in items:
            item, parts, count = self._shapes.attend_item(
                session.handle, q, k, v, session.lengths[layer] if k is not None else None,
                token_ids, causal, visible, energy)
            wire.append(item)
            data += parts
            rows.append(count)
        request = kivi_pb2.AttendRequest(layer=layer, items=wire, data=b"".join(data))
        response = self._attends.exchange(request, timeout or self._client._timeout)
        for (session, *_), item in zip(items, response.items):
            if not item.code:
                session.lengths[layer] = item.length
        return self._shapes.partials(response, rows)

    def fetch(self, layers: Sequence[int] = (), begin: int = 0, end: int = 0, *,
              timeout: Optional[float] = None) -> Iterator[FetchPart]:
        """K and V of tokens begin .. end - 1 (end 0: the session's length), dequantized, in parts
        of at most 128 tokens, layer-major.  layers: () is all."""
        request = kivi_pb2.FetchRequest(session=self.handle, layers=list(layers), begin=begin,
                                        end=end)
        for response in self._client._stream(self._client._kivi.Fetch, request, timeout):
            yield self._shapes.fetched(response)

    def commit(self, durability: Durability = Durability.WRITTEN, *,
               timeout: Optional[float] = None) -> Durability:
        """Makes the session as it is now durable; returns what was reached."""
        response = self._client._unary(
            self._client._kivi.Commit,
            kivi_pb2.CommitRequest(session=self.handle, durability=int(durability)), timeout)
        return Durability(response.durability)

    def close(self, *, commit: bool = True, timeout: Optional[float] = None) -> None:
        """Unloads the session; commits it first unless told otherwise."""
        self._attends.close()
        self._appends.close()
        self._client._unary(self._client._kivi.Close,
                            kivi_pb2.CloseRequest(session=self.handle, commit=commit), timeout,
                            retry=False)
