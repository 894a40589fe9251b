# SPDX-License-Identifier: Apache-2.0
"""Client of kivid: KV caches outside the engine, held at 2 bits, attended on from afar.

    import kivi
    with kivi.Client("unix:///run/kivid/kivid.sock") as client:
        layout = kivi.Layout(layers=1, kv_heads=8, query_heads=32, head_dim=128)
        with client.session("chat-42", layout) as s:
            s.append(0, k, v)              # k, v: [tokens, kv_heads, head_dim]
            out, lse = s.attend(0, q)      # q: [rows, query_heads, head_dim]

`kivi.Client` blocks; `kivi.aio.Client` is the same for asyncio; `kivi.hf` plugs into Hugging Face
transformers; `python -m kivi.eval` measures what a codec costs a model.
"""

from ._calls import Tls
from ._types import (Codec, Durability, FetchPart, Layout, LayoutInfo, LookupResult, Partial,
                     PutResult, SessionInfo, Tier, merge)
from .client import Client, Session
from .errors import (Aborted, AlreadyExists, Cancelled, DataLoss, DeadlineExceeded,
                     FailedPrecondition, Internal, InvalidArgument, KiviError, NotFound,
                     PermissionDenied, ResourceExhausted, Unauthenticated, Unavailable,
                     Unimplemented)

__all__ = [
    "Aborted", "AlreadyExists", "Cancelled", "Client", "Codec", "DataLoss", "DeadlineExceeded",
    "Durability", "FailedPrecondition", "FetchPart", "Internal", "InvalidArgument", "KiviError",
    "Layout", "LayoutInfo", "LookupResult", "NotFound", "Partial", "PermissionDenied",
    "PutResult", "ResourceExhausted", "Session", "SessionInfo", "Tier", "Unauthenticated",
    "Tls", "Unavailable", "Unimplemented", "merge",
]
__version__ = "0.1.0"
