/* SPDX-License-Identifier: Apache-2.0 */
/* engine_gpu.c - where a block's bytes are when the device has memory of its own.
 *
 *      gpu tier           <--copy, when a wave first attends them--     pinned arena  <-- restore -- disk
 *        ^    |                                                            ^
 *      pack   +-------- copy, when a block's last page is packed ----------+  --- commit, write --> disk
 *
 * The store has every block, in its arena or on disk; the gpu tier has copies of those that are used.
 * Kernels pack into the tier and the finished block is copied out, so it is hot from its first moment;
 * whatever is read and not there is copied in on the stream that is going to read it, in front of the
 * kernel.  Nobody waits for a copy: a page that is not there yet, or finds no room, is read from the
 * pinned arena across the bus.
 *
 * On a CPU there is no tier, and all of this comes to nothing.
 */
#include "service/engine_private.h"

/* Copies that one wave adds.  Two waves and what else a lane queues stay far below KV_STREAM_DEPTH. */
enum { COPIES_MAX = 64 };

uint32_t gpu_hold(struct kv_engine *engine, const struct kv_stream *stream,
                  const struct kv_digest *key) {
    uint64_t sequence;
    if (!engine->gpu) return KV_GPU_NONE;
    uint32_t block = kv_gpu_block_find(engine->gpu, key, &sequence);
    if (block == KV_GPU_NONE) return KV_GPU_NONE;
    if (!kv_store_use_copy(engine->options.store, key, sequence)) {
        kv_gpu_block_forget(engine->gpu, block);
        return KV_GPU_NONE;
    }
    if (!kv_gpu_block_there(engine->gpu, block, stream)) return KV_GPU_NONE;
    kv_gpu_block_pin(engine->gpu, block, engine->now_us);
    return block;
}

void gpu_release(struct kv_engine *engine, uint32_t block) {
    if (block != KV_GPU_NONE) kv_gpu_block_unpin(engine->gpu, block);
}

void gpu_adopt(struct kv_engine *engine, const struct kv_digest *key, uint8_t *memory) {
    struct kv_block_info info;
    if (!memory) return;
    if (!kv_store_find(engine->options.store, key, &info)) {
        kv_gpu_free(engine->gpu, memory);
        return;
    }
    kv_gpu_block_adopt(engine->gpu, key, info.sequence, memory, engine->now_us);
}

void *gpu_scratch(struct kv_engine *engine, uint64_t bytes) {
    return engine->gpu ? kv_gpu_alloc(engine->gpu, bytes) : NULL;
}

void gpu_scratch_free(struct kv_engine *engine, void *memory) {
    if (memory) kv_gpu_free(engine->gpu, memory);
}

/* ---- Waves --------------------------------------------------------------------------------- */

/* Room for the copy of one block; false: there is none, or another lane is copying it. */
static bool wave_copy(struct kv_engine *engine, struct lane *lane, struct wave *wave,
                      struct wave_block *block) {
    const struct kv_digest *key = &wave->keys[block->host];
    struct kv_block_info info;
    if (!kv_store_find(engine->options.store, key, &info)) return false; /* dropped; still pinned */
    uint64_t bytes = (uint64_t)info.extent.part_count * info.extent.part_bytes;
    block->gpu = kv_gpu_block_add(engine->gpu, key, info.sequence, bytes, engine->now_us);
    if (block->gpu == KV_GPU_NONE) return false;
    kv_stream_copy(lane->stream, kv_gpu_block_address(engine->gpu, block->gpu),
                   wave->addresses[block->host], bytes);
    return true;
}

void wave_admit(struct kv_engine *engine, struct lane *lane, struct wave *wave) {
    if (!engine->gpu) return;
    uint32_t copies = 0;
    uint16_t fresh[COPIES_MAX];
    for (uint32_t i = 0; i < wave->block_count && copies < COPIES_MAX; i++)
        if (wave->blocks[i].gpu == KV_GPU_NONE && wave_copy(engine, lane, wave, &wave->blocks[i]))
            fresh[copies++] = (uint16_t)i;
    if (copies == 0) return;
    uint64_t ticket = kv_stream_mark(lane->stream);
    for (uint32_t i = 0; i < copies; i++)
        kv_gpu_block_comes(engine->gpu, wave->blocks[fresh[i]].gpu, lane->stream, ticket);
}

void wave_gpu_release(struct kv_engine *engine, struct wave *wave) {
    for (uint32_t i = 0; i < wave->block_count; i++) gpu_release(engine, wave->blocks[i].gpu);
}

/* ---- Exact rows to and from a snapshot's chunk -------------------------------------------------- */

bool rows_save(struct kv_engine *engine, struct kv_stream *stream, const struct kv_shape *shape,
               const uint8_t *page, uint32_t tokens, uint8_t *out) {
    if (!engine->gpu || !kv_gpu_owns(engine->gpu, page)) {
        snapshot_rows_save(shape, page, tokens, out);
        return false;
    }
    size_t row = shape->head_dim * sizeof(uint16_t);
    kv_stream_copy_rows(stream, (struct kv_rows){out, tokens * row},
                        (struct kv_rows_const){page, KV_BLOCK_TOKENS * row}, tokens * row,
                        2u * shape->heads);
    return true;
}

bool rows_load(struct kv_engine *engine, struct kv_stream *stream, const struct kv_shape *shape,
               uint8_t *page, uint32_t tokens, const uint8_t *from) {
    if (!engine->gpu || !kv_gpu_owns(engine->gpu, page)) {
        snapshot_rows_load(shape, page, tokens, from);
        return false;
    }
    size_t row = shape->head_dim * sizeof(uint16_t);
    kv_stream_copy_rows(stream, (struct kv_rows){page, KV_BLOCK_TOKENS * row},
                        (struct kv_rows_const){from, tokens * row}, tokens * row,
                        2u * shape->heads);
    return true;
}
