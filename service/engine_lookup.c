/* SPDX-License-Identifier: Apache-2.0 */
/* engine_lookup.c - LOOKUP: the longest prefix of a chain that is in the cache.
 *
 * Only the block table is asked, never the disk.  A chain may be 8192 blocks long and hashing it
 * takes milliseconds, so it goes a slice at a time and other requests run in between; a deadline
 * that passes in the middle answers with what was found until then, because a shorter prefix is a
 * right answer too.
 */
#include "service/engine_private.h"

#include <stdio.h>

static struct kv_lookup_block *reply_of(const struct kv_request *request) {
    return (struct kv_lookup_block *)(request->staging + request->reply_offset);
}

static void lookup_finish(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    struct kv_lookup *lookup = &request->lookup;
    uint64_t cold_bytes = 0;
    lookup->block_count = task->chain.block;
    for (uint32_t i = 0; i < lookup->block_count; i++)
        if (reply_of(request)[i].tier == KV_TIER_NVME) cold_bytes += reply_of(request)[i].bytes;
    uint64_t us_per_mib = kv_store_stats(engine->options.store)->restore_us_per_mib;
    lookup->load_us = cold_bytes / 1024 * us_per_mib / 1024;
    if (task->chain.unprotected) lookup->lease_ms = 0;
    request->reply_bytes = lookup->block_count * sizeof(struct kv_lookup_block);
    task_finish(engine, task);
}

static void lookup_step(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    if (!request || task->stopped == KV_CANCELLED) {
        if (request) request_fail(request, KV_CANCELLED, "", "the client went away");
        task_finish(engine, task);
        return;
    }
    struct kv_lookup *lookup = &request->lookup;
    const struct layout_entry *layout = engine_layout(engine, &lookup->fingerprint);
    bool missing = task->stopped != KV_OK;
    for (uint32_t i = 0; i < SLICE_BLOCKS && !missing && task->chain.block < task->chain.count; i++) {
        uint32_t block = task->chain.block;
        if (lookup->digest_count)
            task->chain.digest = ((const struct kv_digest *)request->staging)[block];
        else
            task->chain.digest = kv_chain_next(&task->chain.digest,
                                               (const uint32_t *)request->staging +
                                                   block * KV_BLOCK_TOKENS);
        struct kv_block_info info;
        missing = !block_find(engine, layout, block, &task->chain.digest, &info);
        if (missing) break;
        reply_of(request)[block] = (struct kv_lookup_block){
            .digest = task->chain.digest,
            .bytes = (uint64_t)info.extent.part_count * info.extent.part_bytes,
            .tier = info.tier,
        };
        uint64_t until_us = engine->now_us + lookup->lease_ms * 1000ull;
        if (lookup->lease_ms && !kv_store_protect(engine->options.store, &task->chain.digest,
                                                  until_us))
            task->chain.unprotected = true;
        task->chain.block++;
    }
    if (missing || task->chain.block == task->chain.count) lookup_finish(engine, task);
    else task_again(task, lookup_step);
}

void lookup_start(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    struct kv_lookup *lookup = &request->lookup;
    bool by_digest = lookup->digest_count > 0;
    uint64_t blocks = by_digest ? lookup->digest_count : lookup->token_count / KV_BLOCK_TOKENS;
    size_t question = by_digest ? lookup->digest_count * sizeof(struct kv_digest)
                                : lookup->token_count * sizeof(uint32_t);
    request->reply_offset = (question + 63) / 64 * 64;
    size_t reply = blocks * sizeof(struct kv_lookup_block);
    lookup->block_count = 0;
    if (!engine_layout(engine, &lookup->fingerprint))
        request_fail(request, KV_NOT_FOUND, "fingerprint", "no such layout is registered");
    else if (by_digest && lookup->token_count)
        request_fail(request, KV_INVALID, "digests", "given beside token_ids; one of the two");
    else if (blocks > KV_LOOKUP_BLOCKS_MAX ||
             (blocks && request->reply_offset + reply > request->staging_bytes))
        request_fail(request, KV_INVALID, by_digest ? "digests" : "token_ids",
                     "%llu blocks are more than %d", (unsigned long long)blocks,
                     KV_LOOKUP_BLOCKS_MAX);
    if (request->status != KV_OK) {
        task_finish(engine, task);
        return;
    }
    if (lookup->lease_ms > KV_LEASE_MS_MAX) lookup->lease_ms = KV_LEASE_MS_MAX;
    task->chain.count = (uint32_t)blocks;
    task->chain.digest = kv_chain_root(&lookup->fingerprint, &lookup->salt);
    if (blocks == 0) lookup_finish(engine, task);
    else task_run(engine, task, lookup_step);
}
