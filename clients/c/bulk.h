/* SPDX-License-Identifier: Apache-2.0 */
/* bulk.h - a connection of its own for a stream that carries a lot.
 *
 * For unix sockets.  What lies in such a socket at most is the sender's SO_SNDBUF, 208 KiB unless asked
 * otherwise, and a sender that filled it sleeps until three quarters are gone: less than a page of rows, so
 * that both sides spend their time waking each other.  gRPC does not let its sockets be set, but takes one
 * that is connected.  A connection of its own also keeps the pages out of the way of other calls.
 */
#ifndef KIVI_CLIENTS_C_BULK_H
#define KIVI_CLIENTS_C_BULK_H

#include <grpc/grpc.h>

/* A channel on a new connection, which is the caller's and ends with the service: it is never made again.
 * NULL: the target is not a unix socket's path ("unix:PATH", "unix:///PATH"), or nobody listens there now. */
grpc_channel *bulk_channel_open(const char *target, const grpc_channel_args *arguments);

#endif
