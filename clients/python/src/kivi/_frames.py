# SPDX-License-Identifier: Apache-2.0
"""One long-lived bidirectional stream on which every request has one response, in order.

A frame is on the path of every layer of every token, so what a stream costs is paid thousands of
times a second.  grpcio's own iterator hands a request to one thread that writes it and the answer
to another that reads it; both hops wake a sleeping thread.  _DirectStream does write and read as
one batch on a completion queue that the calling thread itself waits on, as grpcio does for its
blocking unary calls.  It needs parts of grpcio that are not public; where they are missing or have
another shape, _IteratorStream does the same through the public interface, slower.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import grpc

from .errors import DeadlineExceeded, Unavailable, from_rpc

try:
    from grpc._cython import cygrpc
except ImportError:  # another grpcio than those known
    cygrpc = None

_NO_FLAGS = 0
_BY_NUMBER: Dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}

Metadata = Sequence[Tuple[str, str]]


class _Ended(grpc.RpcError):
    """The stream's status, asked for as of any grpc.RpcError."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Metadata) -> None:
        super().__init__(details)
        self._status = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._status[0]

    def details(self) -> str:
        return self._status[1]

    def trailing_metadata(self) -> Metadata:
        return self._status[2]


class _DirectStream:
    """The stream on a completion queue of its own, driven by the thread that asks.

    Raises (when made):
        AttributeError, TypeError: this grpcio has other insides.
    """

    _OPENING, _STATUS, _FRAME, _CLOSING = range(4)  # tags: which batch an event ends

    def __init__(self, method: Any, metadata: Metadata) -> None:
        self._serialize = method._request_serializer
        self._parse = method._response_deserializer
        self._receive = cygrpc.ReceiveMessageOperation(_NO_FLAGS)
        self._status: Optional[_Ended] = None
        self._call = method._channel.segregated_call(
            cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS, method._method, None, None,
            tuple(metadata), None,
            (((cygrpc.SendInitialMetadataOperation(tuple(metadata), _NO_FLAGS),
               cygrpc.ReceiveInitialMetadataOperation(_NO_FLAGS)), self._OPENING),
             ((cygrpc.ReceiveStatusOnClientOperation(_NO_FLAGS),), self._STATUS)),
            method._context, method._registered_call_handle)
        self._due = {self._OPENING, self._STATUS}

    def exchange(self, request: Any) -> Any:
        """The response, or raises grpc.RpcError; StopIteration if the stream ended well."""
        send = cygrpc.SendMessageOperation(self._serialize(request), _NO_FLAGS)
        if not self._start(self._FRAME, (send, self._receive)):
            self._drain()
            raise self._over()
        message = None
        while self._FRAME in self._due:
            event = self._next()
            if event.tag == self._FRAME:
                message = next((done.message() for done in event.batch_operations
                                if done.type() == cygrpc.OperationType.receive_message), None)
        if message is None:
            self._drain()
            raise self._over()
        return self._parse(message)

    def finish(self) -> None:
        """Ends the stream from our side."""
        self._start(self._CLOSING, (cygrpc.SendCloseFromClientOperation(_NO_FLAGS),))
        self.cancel()
        self._drain()

    def cancel(self) -> None:
        """Makes a waiting exchange() return; from any thread."""
        self._call.cancel(cygrpc.StatusCode.cancelled, "cancelled by the client")

    def _start(self, tag: int, operations: Tuple[Any, ...]) -> bool:
        if self._status is not None or not self._call.operate(operations, tag):
            return False
        self._due.add(tag)
        return True

    def _next(self) -> Any:
        event = self._call.next_event()
        self._due.discard(event.tag)
        if event.tag == self._STATUS:
            done = event.batch_operations[0]
            details = done.details()
            self._status = _Ended(
                _BY_NUMBER.get(done.code(), grpc.StatusCode.UNKNOWN),
                details.decode(errors="replace") if isinstance(details, bytes) else details or "",
                done.trailing_metadata() or ())
        return event

    def _drain(self) -> None:
        """Waits for what is under way, so that grpc can free the call: the status comes last."""
        while self._due:
            self._next()

    def _over(self) -> Exception:
        if self._status is None or self._status.code() == grpc.StatusCode.OK:
            return StopIteration()
        return self._status


class _IteratorStream:
    """The same through grpcio's public interface."""

    def __init__(self, method: Callable[..., Any], metadata: Metadata) -> None:
        self._requests: "queue.SimpleQueue[Any]" = queue.SimpleQueue()
        self._call = method(iter(self._requests.get, None), metadata=metadata)
        self.cancel = self._call.cancel

    def exchange(self, request: Any) -> Any:
        self._requests.put(request)
        return next(self._call)

    def finish(self) -> None:
        self._requests.put(None)
        self._call.cancel()


def _open(method: Any, metadata: Metadata) -> Any:
    if cygrpc is not None:
        try:
            return _DirectStream(method, metadata)
        except (AttributeError, TypeError):
            pass
    return _IteratorStream(method, metadata)


class Frames:
    """A stream that opens itself when it is needed, with a deadline for each answer.

    A watchdog cancels the stream when an answer is late, because reading from a stream has no
    deadline of its own; the next request opens a new one.  Any thread may use it; they take turns.
    """

    def __init__(self, method: Callable[..., Any], metadata: Metadata) -> None:
        self._method = method
        self._metadata = metadata
        self._lock = threading.Lock()
        self._stream: Any = None
        self._timer: Optional["_Watchdog"] = None

    def exchange(self, request: Any, timeout: float) -> Any:
        with self._lock:
            if self._stream is None:
                self._stream = _open(self._method, self._metadata)
                self._timer = _Watchdog(self._stream.cancel)
            self._timer.arm(timeout)
            try:
                return self._stream.exchange(request)
            except grpc.RpcError as error:
                late = self._timer.fired
                self._drop()
                if late:
                    raise DeadlineExceeded(f"no answer within {timeout} s") from None
                raise from_rpc(error) from None
            except StopIteration:
                self._drop()
                raise Unavailable("the service ended the stream") from None
            except BaseException:
                self._drop()
                raise
            finally:
                if self._timer is not None:
                    self._timer.disarm()

    def close(self) -> None:
        with self._lock:
            if self._stream is not None:
                self._drop()

    def _drop(self) -> None:
        self._timer.stop()
        stream, self._stream, self._timer = self._stream, None, None
        stream.finish()


class _Watchdog:
    """Calls `action` once if it stays armed past a moment.  One sleeping thread, no work per
    frame but two assignments."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._action = action
        self._due: Optional[float] = None
        self._stopped = threading.Event()
        self.fired = False
        threading.Thread(target=self._run, name="kivi-watchdog", daemon=True).start()

    def arm(self, seconds: float) -> None:
        self._due = time.monotonic() + seconds

    def disarm(self) -> None:
        self._due = None

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(0.1):
            due = self._due
            if due is not None and time.monotonic() >= due:
                self.fired = True
                self._action()
                return
