# SPDX-License-Identifier: Apache-2.0
"""Errors of the service as exceptions, one class per gRPC code of the contract."""

from __future__ import annotations

from typing import Any, Dict, Optional, Type

import grpc


class KiviError(Exception):
    """A call failed.

    Attributes:
        code: the gRPC status code.
        field: name of the request's field at fault, or "".
        scope: for ResourceExhausted: "tenant", "node" or "tier", else "".
        retry_after: seconds after which a retry may succeed, or None.
    """

    code = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, *, field: str = "", scope: str = "",
                 retry_after: Optional[float] = None) -> None:
        super().__init__(message)
        self.field = field
        self.scope = scope
        self.retry_after = retry_after


class InvalidArgument(KiviError):
    """A rule of the contract is broken; `field` says which argument."""
    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(KiviError):
    """No such session or block (evicted, closed, or never there)."""
    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(KiviError):
    """The name is taken."""
    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(KiviError):
    """The layout (or salt) is not the one named."""
    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(KiviError):
    """A compare-and-append lost the race: another writer was there first."""
    code = grpc.StatusCode.ABORTED


class ResourceExhausted(KiviError):
    """A limit is in use; see `scope` and `retry_after`."""
    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class DataLoss(KiviError):
    """Stored bytes failed their checksum; the block is gone."""
    code = grpc.StatusCode.DATA_LOSS


class Unavailable(KiviError):
    """The service cannot be reached, is draining, or a device of it failed."""
    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(KiviError):
    """The call took longer than its timeout."""
    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(KiviError):
    """The call was cancelled."""
    code = grpc.StatusCode.CANCELLED


class Unimplemented(KiviError):
    """Part of the contract that this version of the service does not serve."""
    code = grpc.StatusCode.UNIMPLEMENTED


class Unauthenticated(KiviError):
    """No valid credentials."""
    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(KiviError):
    """The identity may not do this."""
    code = grpc.StatusCode.PERMISSION_DENIED


class Internal(KiviError):
    """A defect of the service or of the transport."""
    code = grpc.StatusCode.INTERNAL


_BY_CODE: Dict[grpc.StatusCode, Type[KiviError]] = {
    c.code: c for c in KiviError.__subclasses__()}
_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def from_rpc(error: Any) -> KiviError:
    """The exception for a grpc.RpcError (sync or aio)."""
    metadata: Dict[str, str] = {}
    for key, value in (error.trailing_metadata() or ()):
        metadata[key] = value if isinstance(value, str) else value.decode("latin-1")
    retry = metadata.get("kivi-retry-ms", "")
    return _BY_CODE.get(error.code(), KiviError)(
        error.details() or str(error.code()),
        field=metadata.get("kivi-field", ""),
        scope=metadata.get("kivi-scope", ""),
        retry_after=int(retry) / 1000 if retry.isdigit() else None)


def from_code(code: int, message: str) -> KiviError:
    """The exception for a per-item status: a number and a "field: sentence" text."""
    field = message.split(":", 1)[0] if ":" in message else ""
    status = _BY_NUMBER.get(code, grpc.StatusCode.UNKNOWN)
    return _BY_CODE.get(status, KiviError)(message, field=field)
