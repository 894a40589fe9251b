# SPDX-License-Identifier: Apache-2.0
"""The client for asyncio: kivi.Client's calls as coroutines, on grpc.aio.

    async with kivi.aio.Client("unix:///run/kivid/kivid.sock") as client:
        async with await client.session("chat-42", layout) as s:
            await s.append(0, k, v)
            out, lse = await s.attend(0, q)

Arguments, results and errors are those of kivi.Client and kivi.Session; see there.  A Session is
used by one task at a time.
"""

from __future__ import annotations

import asyncio
from typing import (Any, AsyncIterator, Awaitable, Callable, Dict, List, Mapping, Optional,
                    Sequence, Tuple)

import grpc
import grpc.aio

from . import _calls
from ._calls import LayoutLike, Tls
from ._types import (Durability, FetchPart, Layout, LayoutInfo, LookupResult, Partial, PutResult,
                     SessionInfo)
from .errors import DeadlineExceeded, KiviError, Unavailable, from_rpc
from .v1 import admin_pb2, admin_pb2_grpc, kivi_pb2, kivi_pb2_grpc


class _Frames:
    """One long-lived bidirectional stream: a request, then its response."""

    def __init__(self, method: Callable[..., Any], metadata: Sequence[Tuple[str, str]]) -> None:
        self._method = method
        self._metadata = metadata
        self._lock = asyncio.Lock()
        self._call: Any = None

    async def exchange(self, request: Any, timeout: float) -> Any:
        async with self._lock:
            if self._call is None:
                self._call = self._method(metadata=self._metadata)
            try:
                return await asyncio.wait_for(self._round_trip(request), timeout)
            except asyncio.TimeoutError:
                self._drop()
                raise DeadlineExceeded(f"no answer within {timeout} s") from None
            except grpc.aio.AioRpcError as error:
                self._drop()
                raise from_rpc(error) from None
            except BaseException:
                self._drop()
                raise

    async def _round_trip(self, request: Any) -> Any:
        try:
            await self._call.write(request)
        except asyncio.InvalidStateError:  # the stream is over; read() says how
            pass
        response = await self._call.read()
        if response is grpc.aio.EOF:
            code = await self._call.code()
            if code != grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    code, await self._call.initial_metadata(),
                    await self._call.trailing_metadata(), await self._call.details())
            raise Unavailable("the service ended the stream")
        return response

    async def close(self) -> None:
        async with self._lock:
            if self._call is not None:
                await self._call.done_writing()
                self._drop()

    def _drop(self) -> None:
        self._call.cancel()
        self._call = None


class Client:
    """As kivi.Client, for asyncio."""

    def __init__(self, target: str, *, timeout: float = 30.0, token: Optional[str] = None,
                 tls: Optional[Tls] = None, retries: int = 3,
                 options: Sequence[Tuple[str, Any]] = ()) -> None:
        arguments = _calls.channel_options(options)
        self._channel = (grpc.aio.secure_channel(target, tls.credentials(), arguments) if tls
                         else grpc.aio.insecure_channel(target, arguments))
        self._kivi = kivi_pb2_grpc.KiviStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)
        self._metadata = _calls.call_credentials(token)
        self._timeout = timeout
        self._retries = retries
        self._layouts: Dict[Layout, LayoutInfo] = {}

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def register(self, layout: LayoutLike, *, codec: Optional[str] = None,
                       timeout: Optional[float] = None) -> LayoutInfo:
        layout = _calls.as_layout(layout, codec)
        if layout not in self._layouts:
            response = await self._unary(
                self._kivi.RegisterLayout,
                kivi_pb2.RegisterLayoutRequest(layout=layout._to_wire()), timeout)
            self._layouts[layout] = LayoutInfo._from_wire(response.info)
        return self._layouts[layout]

    async def session(self, name: str, layout: Optional[LayoutLike] = None, *,
                      model: Optional[Any] = None, codec: Optional[str] = None, salt: bytes = b"",
                      mode: str = "open_or_create", token_ids: Optional[Any] = None,
                      timeout: Optional[float] = None) -> "Session":
        info = layout if isinstance(layout, LayoutInfo) else await self.register(
            layout if layout is not None else model, codec=codec, timeout=timeout)
        request = kivi_pb2.OpenSessionRequest(
            name=name, fingerprint=info.fingerprint, salt=salt,
            mode=kivi_pb2.OpenSessionRequest.Mode.Value(mode.upper()),
            token_ids=_calls.fixed_ids(token_ids))
        response = await self._unary(self._kivi.OpenSession, request, timeout)
        return Session(self, name, response)

    async def sessions(self, prefix: str = "", *, timeout: Optional[float] = None
                       ) -> AsyncIterator[SessionInfo]:
        request = kivi_pb2.ListRequest(prefix=prefix)
        async for response in self._stream(self._kivi.List, request, timeout):
            yield SessionInfo._from_wire(response)

    async def describe(self, name: str, *, timeout: Optional[float] = None) -> SessionInfo:
        response = await self._unary(self._kivi.Describe, kivi_pb2.DescribeRequest(name=name),
                                     timeout)
        return SessionInfo._from_wire(response.info)

    async def delete(self, name: str, *, timeout: Optional[float] = None) -> None:
        await self._unary(self._kivi.Delete, kivi_pb2.DeleteRequest(name=name), timeout)

    async def lookup(self, info: LayoutInfo, token_ids: Optional[Any] = None, *,
                     digests: Optional[Sequence[bytes]] = None, salt: bytes = b"",
                     lease: float = 0, timeout: Optional[float] = None) -> LookupResult:
        request = _calls.lookup_request(info, token_ids, digests, salt, lease)
        return _calls.lookup_result(await self._unary(self._kivi.Lookup, request, timeout))

    async def put(self, info: LayoutInfo, pages: Mapping[int, Tuple[Any, Any]], *,
                  digest: Optional[bytes] = None, parent: Optional[bytes] = None,
                  token_ids: Optional[Any] = None, salt: bytes = b"",
                  durability: Durability = Durability.VOLATILE,
                  query_energy: Optional[Mapping[int, Any]] = None, raw: bool = False,
                  timeout: Optional[float] = None) -> PutResult:
        frames = _calls.put_frames(info, pages, digest, parent, token_ids, salt, durability,
                                   query_energy or {}, raw)
        call = self._kivi.Put(frames, timeout=timeout or self._timeout, metadata=self._metadata)
        try:
            async for response in call:
                return _calls.put_result(response)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None
        finally:
            call.cancel()
        raise Unavailable("the service ended the stream without an answer")

    async def get(self, info: LayoutInfo, digests: Sequence[bytes], *,
                  layers: Sequence[int] = (), timeout: Optional[float] = None
                  ) -> AsyncIterator[Any]:
        shapes = _calls.Shapes(info)
        request = kivi_pb2.GetRequest(fingerprint=info.fingerprint, digests=list(digests),
                                      layers=list(layers))
        async for response in self._stream(self._kivi.Get, request, timeout):
            yield _calls.got(shapes, response)

    async def stats(self, *, timeout: Optional[float] = None) -> Any:
        return await self._unary(self._admin.Stats, admin_pb2.StatsRequest(), timeout)

    async def _unary(self, method: Callable[..., Awaitable[Any]], request: Any,
                     timeout: Optional[float], retry: bool = True) -> Any:
        wait = 0.1
        for attempt in range(self._retries + 1):
            try:
                return await method(request, timeout=timeout or self._timeout,
                                    metadata=self._metadata)
            except grpc.aio.AioRpcError as rpc_error:
                error = from_rpc(rpc_error)
                if not retry or not isinstance(error, Unavailable) or attempt == self._retries:
                    raise error from None
            await asyncio.sleep(wait)
            wait *= 2

    async def _stream(self, method: Callable[..., Any], request: Any, timeout: Optional[float]
                      ) -> AsyncIterator[Any]:
        try:
            async for response in method(request, timeout=timeout or self._timeout,
                                         metadata=self._metadata):
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None


class Session:
    """As kivi.Session, for asyncio."""

    def __init__(self, client: Client, name: str, opened: Any) -> None:
        self._client = client
        self.name = name
        self.handle: int = opened.session
        self.info = LayoutInfo._from_wire(opened.info)
        self._shapes = _calls.Shapes(self.info)
        self._evicted_from: Optional[int] = (
            opened.usable if opened.usable < opened.length else None)
        self.created: bool = opened.created
        self.lengths: List[int] = [opened.length] * self.info.layers
        self._attends = _Frames(client._kivi.Attend, client._metadata)
        self._appends = _Frames(client._kivi.Append, client._metadata)

    @property
    def length(self) -> int:
        """Tokens that every layer has, as this client knows."""
        return min(self.lengths)

    @property
    def usable(self) -> int:
        """First token that had been evicted when the session was opened, or `length`."""
        return self.length if self._evicted_from is None else self._evicted_from

    async def __aenter__(self) -> "Session":
        return self

    async def __aexit__(self, kind: Any, value: Any, trace: Any) -> None:
        if kind is None:
            await self.close()
            return
        try:
            await self.close(commit=False)
        except KiviError:
            pass  # the exception on its way says more

    async def append(self, layer: int, k: Any, v: Any, *, token_ids: Optional[Any] = None,
                     query_energy: Optional[Any] = None, expected_length: Optional[int] = None,
                     timeout: Optional[float] = None) -> int:
        at = self.lengths[layer] if expected_length is None else expected_length
        for frame in self._shapes.append_frames(self.handle, layer, k, v, at, token_ids,
                                                query_energy):
            response = await self._appends.exchange(frame, timeout or self._client._timeout)
            self.lengths[layer] = response.length
        return self.lengths[layer]

    async def attend(self, layer: int, q: Any, k: Optional[Any] = None, v: Optional[Any] = None,
                     *, causal: bool = True, visible: Optional[Any] = None,
                     token_ids: Optional[Any] = None, energy: bool = True,
                     timeout: Optional[float] = None) -> Partial:
        item, parts, rows = self._shapes.attend_item(
            self.handle, q, k, v, self.lengths[layer] if k is not None else None, token_ids,
            causal, visible, energy)
        request = kivi_pb2.AttendRequest(layer=layer, items=[item], data=b"".join(parts))
        response = await self._attends.exchange(request, timeout or self._client._timeout)
        result = self._shapes.partials(response, [rows])[0]
        if isinstance(result, KiviError):
            raise result
        self.lengths[layer] = response.items[0].length
        return result

    async def fetch(self, layers: Sequence[int] = (), begin: int = 0, end: int = 0, *,
                    timeout: Optional[float] = None) -> AsyncIterator[FetchPart]:
        request = kivi_pb2.FetchRequest(session=self.handle, layers=list(layers), begin=begin,
                                        end=end)
        async for response in self._client._stream(self._client._kivi.Fetch, request, timeout):
            yield self._shapes.fetched(response)

    async def commit(self, durability: Durability = Durability.WRITTEN, *,
                     timeout: Optional[float] = None) -> Durability:
        response = await self._client._unary(
            self._client._kivi.Commit,
            kivi_pb2.CommitRequest(session=self.handle, durability=int(durability)), timeout)
        return Durability(response.durability)

    async def close(self, *, commit: bool = True, timeout: Optional[float] = None) -> None:
        await self._attends.close()
        await self._appends.close()
        await self._client._unary(
            self._client._kivi.Close,
            kivi_pb2.CloseRequest(session=self.handle, commit=commit), timeout, retry=False)
