/* SPDX-License-Identifier: Apache-2.0 */
/* rpc.h - the service on the wire.
 *
 * Everything that knows gRPC is in this folder; nothing outside sees a gRPC type.  The rpc layer
 * owns the listeners, the threads that decode and encode, and the calls.  It makes requests of
 * messages, hands them to the engine, and sends what comes back.
 *
 *    accept thread --fd--> gRPC --event--> lane thread --submit--> engine thread
 *                                             ^                          |
 *                                             +------ gRPC <--send-------+ on_done
 *
 * Bounds.  connections_max, streams_max a connection, calls_max in all; a stream has at most two
 *          frames inside (Put: KV_PUT_OPEN_MAX) and is not read from beyond them; messages on
 *          their way live in rpc_bytes_max.  A client that takes no answer for stall_ms is cut off.
 * Health.  grpc.health.v1 answers for "", "kivi.v1.Kivi" and "kivi.v1.Admin": SERVING while the
 *          engine is ready and nobody drains (readiness); and for "live": SERVING for as long as
 *          the process answers at all (liveness).
 */
#ifndef KV_SERVICE_RPC_RPC_H
#define KV_SERVICE_RPC_RPC_H

#include "service/config.h"
#include "service/engine.h"

struct kv_rpc;

/* Listens and serves from here on; the engine may start to run later.  The configuration and the
 * engine are borrowed until close.  KV_BUSY: someone answers at the socket already, or memory.
 * KV_INVALID: an address cannot be used.  KV_IO_ERROR.  `why` (KV_CONFIG_WHY_MAX) says it. */
enum kv_status kv_rpc_open(const struct kv_config *config, struct kv_engine *engine,
                           struct kv_rpc **out, char *why);

/* Stops politely, and blocks for it: health says NOT_SERVING, no new connection, no new call, what
 * runs may finish for grace_ms, the rest is cancelled.  The engine must be running: calls end
 * when their requests do.  True if nothing had to be cancelled.  Not from the engine thread. */
bool kv_rpc_drain(struct kv_rpc *rpc, uint32_t grace_ms);

/* [any thread] Ends the grace of a drain at once. */
void kv_rpc_hurry(struct kv_rpc *rpc);

/* Frees everything.  After drain, and after the engine has given all requests back. */
void kv_rpc_close(struct kv_rpc *rpc);

#endif
