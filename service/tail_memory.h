/* SPDX-License-Identifier: Apache-2.0 */
/* tail_memory.h - memory for what open sessions keep exact, under one cap.
 *
 * It comes out of the store's arena.  Pages, which kernels read and the CPU does not, come out of the
 * gpu tier where there is one and it has room; beside kernels that read pinned memory across the bus,
 * the arena is always good enough. */
#ifndef KV_SERVICE_TAIL_MEMORY_H
#define KV_SERVICE_TAIL_MEMORY_H

#include "proto/kv_check.h"
#include "storage/gpu_tier.h"
#include "storage/store.h"

struct tail_memory {
    struct kv_store *store;   /* borrowed */
    struct kv_gpu_tier *gpu;  /* borrowed; NULL: device memory is host memory */
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

/* The same for a page.  Only kernels and streams may touch it. */
static inline enum kv_status tail_alloc_page(struct tail_memory *memory, size_t bytes, void **out) {
    if (!memory->gpu) return tail_alloc(memory, bytes, out);
    if (bytes > memory->max - memory->used) return KV_UNAVAILABLE;
    void *address = kv_gpu_alloc(memory->gpu, bytes);
    if (!address) return tail_alloc(memory, bytes, out);
    memory->used += bytes;
    *out = address;
    return KV_OK;
}

static inline void tail_free(struct tail_memory *memory, void *address, size_t bytes) {
    if (!address) return;
    KV_CHECK(memory->used >= bytes);
    memory->used -= bytes;
    if (memory->gpu && kv_gpu_owns(memory->gpu, address)) kv_gpu_free(memory->gpu, address);
    else kv_store_memory_free(memory->store, address);
}

#endif
