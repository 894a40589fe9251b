/* SPDX-License-Identifier: Apache-2.0 */
/* tail_memory.h - arena memory for what open sessions keep exact, under one cap. */
#ifndef KV_SERVICE_TAIL_MEMORY_H
#define KV_SERVICE_TAIL_MEMORY_H

#include "proto/kv_check.h"
#include "storage/store.h"

struct tail_memory {
    struct kv_store *store; /* borrowed */
    uint64_t used, max;     /* bytes */
};

/* KV_BUSY: the arena has no room now, try again after the store has made progress.
 * KV_UNAVAILABLE: the cap is reached, and only a session that closes changes that. */
static inline enum kv_status tail_alloc(struct tail_memory *memory, size_t bytes, void **out) {
    if (bytes > memory->max - memory->used) return KV_UNAVAILABLE;
    void *address = kv_store_memory_alloc(memory->store, bytes);
    if (!address) return KV_BUSY;
    memory->used += bytes;
    *out = address;
    return KV_OK;
}

static inline void tail_free(struct tail_memory *memory, void *address, size_t bytes) {
    if (!address) return;
    KV_CHECK(memory->used >= bytes);
    memory->used -= bytes;
    kv_store_memory_free(memory->store, address);
}

#endif
