/* SPDX-License-Identifier: Apache-2.0 */
/* inbox.h - the pool of requests and the way into the engine thread.
 *
 *    acquire --> (rpc layer fills it) --> push ==inbox==> take --> (engine) --> release
 *
 * Threads.  [any thread], except take, waiting, doze, awake and close: the engine thread.
 * Memory.   All of it is allocated by kv_inbox_open().  A request's staging buffer comes from a
 *           pool of its own, because a request that carries no data needs none.
 */
#ifndef KV_SERVICE_INBOX_H
#define KV_SERVICE_INBOX_H

#include "service/engine.h"

struct kv_inbox;

struct kv_inbox_options {
    struct kv_device *device; /* borrowed; its pinned memory holds the staging buffers */
    uint32_t request_count;
    uint32_t staging_count;
    size_t staging_bytes;
};

/* KV_BUSY: out of memory.  On failure *out is untouched. */
enum kv_status kv_inbox_open(const struct kv_inbox_options *options, struct kv_inbox **out);
void kv_inbox_free(struct kv_inbox *inbox);

struct kv_request *kv_inbox_acquire(struct kv_inbox *inbox, bool with_staging);
void kv_inbox_release(struct kv_inbox *inbox, struct kv_request *request);
void kv_inbox_on_free(struct kv_inbox *inbox, void (*on_free)(void *context), void *context);

/* False: the inbox is closed, and the request is still the caller's. */
bool kv_inbox_push(struct kv_inbox *inbox, struct kv_request *request);

/* What was pushed since the last call, oldest first, linked by next_private; NULL: nothing. */
struct kv_request *kv_inbox_take(struct kv_inbox *inbox);

/* Something was pushed that take has not taken. */
bool kv_inbox_waiting(const struct kv_inbox *inbox);

/* The engine is about to sleep on the wake descriptor.  False: there is work, do not. */
bool kv_inbox_doze(struct kv_inbox *inbox);
void kv_inbox_awake(struct kv_inbox *inbox);

/* As take, and every later push is refused. */
struct kv_request *kv_inbox_close(struct kv_inbox *inbox);

/* The eventfd that a push writes while the engine dozes. */
int kv_inbox_wake_fd(const struct kv_inbox *inbox);
void kv_inbox_wake(struct kv_inbox *inbox); /* [any thread, or a signal handler] */

#endif
