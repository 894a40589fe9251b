/* SPDX-License-Identifier: Apache-2.0 */
/* gpu_tier.h - copies of blocks in device memory, and runs of it for whoever fills blocks.
 *
 * Everything here is a copy.  A block belongs to the store (store.h), which has it in pinned memory, on
 * disk or both; what is here can be given up at any moment without losing a byte, so eviction never
 * waits and nothing here ever fails but by saying that there is no room.  Who gets no room reads the
 * pinned memory instead, across the bus.
 *
 *            add                    the copy's ticket is reached
 *  (absent) -----> COMING, pinned ------------------------------> THERE
 *     ^    adopt                                                   | unpinned and coldest,
 *     |    +---------------- a run that was filled ---------->     | or of a record that is gone
 *     +-----------------------------------------------------------+
 *
 * A copy is of one *record*: a key and the store's sequence number of it (struct kv_block_info).  Who
 * finds one asks the store whether it still has that record (kv_store_use_copy): a key may have been
 * dropped and stored again, with other bytes.
 *
 * Order.    The copy of a block that is COMING was queued on some stream.  Work queued on that stream
 *           later finds it; work on another stream has to wait for kv_gpu_block_there().  Bytes are
 *           reused only when nobody pins them, so whoever reads a copy keeps its pin until its own ticket
 *           is reached.
 * Memory.   One allocation of device memory, in units of 4 KiB, and the index, at open.
 * Threads.  The engine thread.
 */
#ifndef KV_STORAGE_GPU_TIER_H
#define KV_STORAGE_GPU_TIER_H

#include "kernels/device.h"
#include "proto/kv_types.h"

struct kv_gpu_tier;

#define KV_GPU_NONE UINT32_MAX

struct kv_gpu_tier_options {
    struct kv_device *device; /* borrowed; closed after the tier */
    uint64_t bytes;           /* of device memory, at least 1 MiB */
    uint32_t blocks_max;      /* copies at once */
    /* A copy that was used within so long is not evicted to make room for another copy: contexts that
     * do not fit together would push each other out between two layers of one step. */
    uint64_t keep_us;
};

/* KV_BUSY: the device has not got so much memory, or the host has none for the index. */
enum kv_status kv_gpu_tier_open(const struct kv_gpu_tier_options *options, struct kv_gpu_tier **out);
/* No run is held and nothing is pinned.  NULL is closed. */
void kv_gpu_tier_close(struct kv_gpu_tier *tier);

/* ---- Runs ------------------------------------------------------------------------------ */

/* Device memory of one's own: exact tokens, blocks being filled.  Evicts if it must; NULL: no room. */
void *kv_gpu_alloc(struct kv_gpu_tier *tier, uint64_t bytes);
void kv_gpu_free(struct kv_gpu_tier *tier, void *memory);
/* Whether an address lies in the tier: what the CPU must not read. */
bool kv_gpu_owns(const struct kv_gpu_tier *tier, const void *memory);

/* ---- Copies of blocks -------------------------------------------------------------------- */

/* The copy of a key, and of which record it is; KV_GPU_NONE: there is none. */
uint32_t kv_gpu_block_find(struct kv_gpu_tier *tier, const struct kv_digest *key, uint64_t *sequence);
/* It is of a record that the store has no more.  One that is pinned stays until another look. */
void kv_gpu_block_forget(struct kv_gpu_tier *tier, uint32_t block);
void kv_gpu_block_pin(struct kv_gpu_tier *tier, uint32_t block, uint64_t now_us);
void kv_gpu_block_unpin(struct kv_gpu_tier *tier, uint32_t block);
uint8_t *kv_gpu_block_address(const struct kv_gpu_tier *tier, uint32_t block);

/* Room for a copy that is not there, pinned and COMING; KV_GPU_NONE: no room, or it is COMING or THERE
 * already.  The caller queues the copy and says where: kv_gpu_block_comes(). */
uint32_t kv_gpu_block_add(struct kv_gpu_tier *tier, const struct kv_digest *key, uint64_t sequence,
                          uint64_t bytes, uint64_t now_us);
void kv_gpu_block_comes(struct kv_gpu_tier *tier, uint32_t block, struct kv_stream *stream,
                        uint64_t ticket);
/* True if work on `stream` (NULL: none yet) may read it now. */
bool kv_gpu_block_there(struct kv_gpu_tier *tier, uint32_t block, const struct kv_stream *stream);

/* A run that holds a block's bytes, all of them there, becomes the copy of its record.  Without room in
 * the index, or beside another copy, the run is freed. */
void kv_gpu_block_adopt(struct kv_gpu_tier *tier, const struct kv_digest *key, uint64_t sequence,
                        void *memory, uint64_t now_us);

struct kv_gpu_stats {
    uint64_t bytes_max, bytes_used; /* now */
    uint64_t blocks;
    uint64_t copies, bytes_copied;  /* in from pinned memory, since open */
    uint64_t adopted;               /* copies that were made where they are */
    uint64_t evictions;
    uint64_t refusals;              /* no room: read across the bus instead */
};
const struct kv_gpu_stats *kv_gpu_stats(struct kv_gpu_tier *tier);

#endif
