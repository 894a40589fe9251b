/* SPDX-License-Identifier: Apache-2.0 */
/* gpu_tier.c - an arena over device memory, a hash of what is in it, and a list by age.
 *
 * A copy is in the age list while nobody pins it; the list is in order of last use, so its head is the
 * coldest.  Nothing here touches device memory: the caller's streams do. */
#include "storage/gpu_tier.h"

#include "proto/kv_check.h"
#include "storage/arena.h"

#include <stdlib.h>

struct block {
    struct kv_digest key;
    uint64_t sequence;
    uint64_t used_us;
    struct kv_stream *stream; /* COMING on it; NULL: THERE */
    uint64_t ticket;          /* of the copy; 0: not queued yet */
    uint32_t unit;            /* KV_ARENA_NONE: this entry is free */
    uint32_t pins;
    uint32_t next;            /* in its bucket, or of the free ones */
    uint32_t older, newer;    /* in the age list, while pins is 0 */
};

struct kv_gpu_tier {
    struct kv_gpu_tier_options options;
    struct kv_arena *arena;
    uint8_t *memory;
    struct block *blocks;  /* [options.blocks_max] */
    uint32_t *buckets;     /* [bucket_mask + 1] */
    uint32_t bucket_mask;
    uint32_t spare;        /* free entries */
    uint32_t oldest, newest;
    uint32_t held;         /* runs that are nobody's copy */
    uint32_t pinned;       /* copies with pins */
    struct kv_gpu_stats stats;
};

/* ---- The index ----------------------------------------------------------------------------- */

static uint32_t *bucket_of(struct kv_gpu_tier *tier, const struct kv_digest *key) {
    uint32_t word; /* a digest is as good as random */
    memcpy(&word, key->bytes, sizeof word);
    return &tier->buckets[word & tier->bucket_mask];
}

static uint32_t find(struct kv_gpu_tier *tier, const struct kv_digest *key) {
    uint32_t index = *bucket_of(tier, key);
    while (index != KV_GPU_NONE && !kv_digest_equal(&tier->blocks[index].key, key))
        index = tier->blocks[index].next;
    return index;
}

static void age_push(struct kv_gpu_tier *tier, uint32_t index) {
    struct block *block = &tier->blocks[index];
    block->newer = KV_GPU_NONE;
    block->older = tier->newest;
    if (tier->newest != KV_GPU_NONE) tier->blocks[tier->newest].newer = index;
    else tier->oldest = index;
    tier->newest = index;
}

static void age_remove(struct kv_gpu_tier *tier, uint32_t index) {
    struct block *block = &tier->blocks[index];
    if (block->older != KV_GPU_NONE) tier->blocks[block->older].newer = block->newer;
    else tier->oldest = block->newer;
    if (block->newer != KV_GPU_NONE) tier->blocks[block->newer].older = block->older;
    else tier->newest = block->older;
}

/* Of a copy that nobody pins. */
static void discard(struct kv_gpu_tier *tier, uint32_t index) {
    struct block *block = &tier->blocks[index];
    KV_CHECK(block->pins == 0);
    uint32_t *link = bucket_of(tier, &block->key);
    while (*link != index) link = &tier->blocks[*link].next;
    *link = block->next;
    age_remove(tier, index);
    kv_arena_free(tier->arena, block->unit);
    block->unit = KV_ARENA_NONE;
    block->next = tier->spare;
    tier->spare = index;
    tier->stats.blocks--;
}

/* A copy that is COMING may be evicted once nobody pins it, for then its ticket has been reached. */
static bool evict(struct kv_gpu_tier *tier, uint64_t before_us) {
    if (tier->oldest == KV_GPU_NONE || tier->blocks[tier->oldest].used_us > before_us) return false;
    discard(tier, tier->oldest);
    tier->stats.evictions++;
    return true;
}

/* Units for so many bytes, at the cost of copies last used before that moment. */
static uint32_t take(struct kv_gpu_tier *tier, uint64_t bytes, uint64_t before_us) {
    uint64_t units = (bytes + KV_ARENA_UNIT - 1) / KV_ARENA_UNIT;
    if (units == 0 || units > kv_arena_units_total(tier->arena)) return KV_ARENA_NONE;
    for (;;) {
        uint32_t unit = kv_arena_alloc(tier->arena, (uint32_t)units);
        if (unit != KV_ARENA_NONE) return unit;
        if (!evict(tier, before_us)) {
            tier->stats.refusals++;
            return KV_ARENA_NONE;
        }
    }
}

static uint32_t insert(struct kv_gpu_tier *tier, const struct kv_digest *key, uint64_t sequence,
                       uint32_t unit, uint64_t now_us) {
    uint32_t index = tier->spare;
    KV_CHECK(index != KV_GPU_NONE);
    struct block *block = &tier->blocks[index];
    uint32_t *bucket = bucket_of(tier, key);
    tier->spare = block->next;
    *block = (struct block){
        .key = *key, .sequence = sequence, .used_us = now_us, .unit = unit, .next = *bucket};
    *bucket = index;
    tier->stats.blocks++;
    return index;
}

/* ---- Open, close ------------------------------------------------------------------------------ */

static enum kv_status index_open(struct kv_gpu_tier *tier) {
    uint32_t buckets = 1;
    while (buckets < tier->options.blocks_max) buckets *= 2;
    tier->bucket_mask = buckets - 1;
    tier->blocks = calloc(tier->options.blocks_max, sizeof tier->blocks[0]);
    tier->buckets = malloc(buckets * sizeof tier->buckets[0]);
    if (!tier->blocks || !tier->buckets) return KV_BUSY;
    memset(tier->buckets, 0xff, buckets * sizeof tier->buckets[0]);
    for (uint32_t i = 0; i < tier->options.blocks_max; i++) {
        tier->blocks[i].unit = KV_ARENA_NONE;
        tier->blocks[i].next = i + 1 < tier->options.blocks_max ? i + 1 : KV_GPU_NONE;
    }
    tier->spare = 0;
    tier->oldest = tier->newest = KV_GPU_NONE;
    return KV_OK;
}

static void tier_free(struct kv_gpu_tier *tier) {
    if (tier->memory)
        kv_device_free(tier->options.device, KV_MEMORY_DEVICE, tier->memory, tier->options.bytes);
    kv_arena_close(tier->arena);
    free(tier->blocks);
    free(tier->buckets);
    free(tier);
}

enum kv_status kv_gpu_tier_open(const struct kv_gpu_tier_options *options,
                                struct kv_gpu_tier **out) {
    uint64_t units = options->bytes / KV_ARENA_UNIT;
    KV_CHECK(units >= 256 && units <= 1u << 31 && options->blocks_max >= 1);
    struct kv_gpu_tier *tier = calloc(1, sizeof *tier);
    if (!tier) return KV_BUSY;
    tier->options = *options;
    if (tier->options.blocks_max > units) tier->options.blocks_max = (uint32_t)units;
    void *memory = NULL;
    enum kv_status status = index_open(tier);
    if (status == KV_OK) status = kv_arena_open((uint32_t)units, &tier->arena);
    if (status == KV_OK)
        status = kv_device_alloc(options->device, KV_MEMORY_DEVICE, options->bytes, &memory);
    if (status != KV_OK) {
        tier_free(tier);
        return status;
    }
    tier->memory = memory;
    *out = tier;
    return KV_OK;
}

void kv_gpu_tier_close(struct kv_gpu_tier *tier) {
    if (!tier) return;
    KV_CHECK(tier->held == 0 && tier->pinned == 0);
    tier_free(tier);
}

/* ---- Runs --------------------------------------------------------------------------------------- */

static uint8_t *address_of(const struct kv_gpu_tier *tier, uint32_t unit) {
    return tier->memory + (uint64_t)unit * KV_ARENA_UNIT;
}

void *kv_gpu_alloc(struct kv_gpu_tier *tier, uint64_t bytes) {
    uint32_t unit = take(tier, bytes, UINT64_MAX);
    if (unit == KV_ARENA_NONE) return NULL;
    tier->held++;
    return address_of(tier, unit);
}

static uint32_t unit_of(const struct kv_gpu_tier *tier, const void *memory) {
    KV_CHECK(kv_gpu_owns(tier, memory));
    return (uint32_t)(((uintptr_t)memory - (uintptr_t)tier->memory) / KV_ARENA_UNIT);
}

void kv_gpu_free(struct kv_gpu_tier *tier, void *memory) {
    if (!memory) return;
    KV_CHECK(tier->held > 0);
    tier->held--;
    kv_arena_free(tier->arena, unit_of(tier, memory));
}

bool kv_gpu_owns(const struct kv_gpu_tier *tier, const void *memory) {
    uintptr_t at = (uintptr_t)memory, first = (uintptr_t)tier->memory;
    return at >= first && at - first < tier->options.bytes;
}

/* ---- Copies --------------------------------------------------------------------------------------- */

uint32_t kv_gpu_block_find(struct kv_gpu_tier *tier, const struct kv_digest *key,
                           uint64_t *sequence) {
    uint32_t index = find(tier, key);
    if (index != KV_GPU_NONE) *sequence = tier->blocks[index].sequence;
    return index;
}

void kv_gpu_block_forget(struct kv_gpu_tier *tier, uint32_t index) {
    if (tier->blocks[index].pins == 0) discard(tier, index);
}

void kv_gpu_block_pin(struct kv_gpu_tier *tier, uint32_t index, uint64_t now_us) {
    struct block *block = &tier->blocks[index];
    if (block->pins++ == 0) {
        age_remove(tier, index);
        tier->pinned++;
    }
    block->used_us = now_us;
}

void kv_gpu_block_unpin(struct kv_gpu_tier *tier, uint32_t index) {
    struct block *block = &tier->blocks[index];
    KV_CHECK(block->pins > 0);
    if (--block->pins > 0) return;
    tier->pinned--;
    age_push(tier, index);
}

uint8_t *kv_gpu_block_address(const struct kv_gpu_tier *tier, uint32_t index) {
    KV_CHECK(tier->blocks[index].pins > 0);
    return address_of(tier, tier->blocks[index].unit);
}

uint32_t kv_gpu_block_add(struct kv_gpu_tier *tier, const struct kv_digest *key, uint64_t sequence,
                          uint64_t bytes, uint64_t now_us) {
    uint64_t before_us = now_us > tier->options.keep_us ? now_us - tier->options.keep_us : 0;
    if (find(tier, key) != KV_GPU_NONE) return KV_GPU_NONE;
    if (tier->spare == KV_GPU_NONE && !evict(tier, before_us)) return KV_GPU_NONE;
    uint32_t unit = take(tier, bytes, before_us);
    if (unit == KV_ARENA_NONE) return KV_GPU_NONE;
    uint32_t index = insert(tier, key, sequence, unit, now_us);
    tier->blocks[index].pins = 1;
    tier->pinned++;
    tier->stats.copies++;
    tier->stats.bytes_copied += bytes;
    return index;
}

void kv_gpu_block_comes(struct kv_gpu_tier *tier, uint32_t index, struct kv_stream *stream,
                        uint64_t ticket) {
    KV_CHECK(tier->blocks[index].pins > 0);
    tier->blocks[index].stream = stream;
    tier->blocks[index].ticket = ticket;
}

bool kv_gpu_block_there(struct kv_gpu_tier *tier, uint32_t index, const struct kv_stream *stream) {
    struct block *block = &tier->blocks[index];
    if (block->stream == NULL || block->stream == stream) return true;
    if (!kv_stream_reached(block->stream, block->ticket)) return false;
    block->stream = NULL;
    return true;
}

void kv_gpu_block_adopt(struct kv_gpu_tier *tier, const struct kv_digest *key, uint64_t sequence,
                        void *memory, uint64_t now_us) {
    uint32_t old = find(tier, key);
    if (old != KV_GPU_NONE && tier->blocks[old].pins == 0) {
        discard(tier, old);
        old = KV_GPU_NONE;
    }
    if (old != KV_GPU_NONE || (tier->spare == KV_GPU_NONE && !evict(tier, UINT64_MAX))) {
        kv_gpu_free(tier, memory);
        return;
    }
    uint32_t index = insert(tier, key, sequence, unit_of(tier, memory), now_us);
    age_push(tier, index);
    KV_CHECK(tier->held > 0);
    tier->held--;
    tier->stats.adopted++;
}

const struct kv_gpu_stats *kv_gpu_stats(struct kv_gpu_tier *tier) {
    tier->stats.bytes_max = tier->options.bytes;
    tier->stats.bytes_used = (uint64_t)kv_arena_units_used(tier->arena) * KV_ARENA_UNIT;
    return &tier->stats;
}
