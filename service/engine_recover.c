/* SPDX-License-Identifier: Apache-2.0 */
/* engine_recover.c - what a directory held when the engine opened.
 *
 * Layouts first, because everything else refers to them; then the first part of every session's
 * snapshot, which has its name.  The rest of a snapshot is read when somebody opens it.  Last, tail
 * chunks that no snapshot refers to are dropped: they are of a commit that a crash cut short, or of
 * a session that was being deleted.
 *
 * This runs before there are requests, so it may allocate and wait.
 */
#include "service/engine_private.h"

#include <stdio.h>
#include <stdlib.h>

struct kept {
    struct kv_digest key;
    uint64_t tag;
};

struct recovery {
    struct kv_engine *engine;
    struct kept *kept;
    size_t count, capacity;
    bool out_of_memory;
    struct kv_digest *chunks; /* that are referred to, sorted */
    size_t chunk_count, chunk_capacity;
    bool pinned;              /* of the pin that is waited for: the answer is in `status` */
    enum kv_status status;
};

static void visit(void *context, const struct kv_digest *key,
                  const struct kv_block_extent *extent) {
    struct recovery *recovery = context;
    if (recovery->count == recovery->capacity) {
        size_t capacity = recovery->capacity ? 2 * recovery->capacity : 256;
        struct kept *kept = realloc(recovery->kept, capacity * sizeof kept[0]);
        if (!kept) {
            recovery->out_of_memory = true;
            return;
        }
        recovery->kept = kept;
        recovery->capacity = capacity;
    }
    recovery->kept[recovery->count++] = (struct kept){.key = *key, .tag = extent->tag};
}

static void on_pinned(struct kv_pin *pin, enum kv_status status) {
    struct recovery *recovery = pin->owner;
    recovery->status = status;
    recovery->pinned = true;
}

/* Reads the first part of a record and hands it to `use`.  KV_ABORTED: it said no. */
static enum kv_status read_first_part(struct recovery *recovery, const struct kept *kept,
                                      bool (*use)(struct recovery *, const uint8_t *bytes)) {
    struct kv_engine *engine = recovery->engine;
    struct wave *wave = &engine->lanes[0].waves[0];
    wave->keys[0] = kept->key;
    wave->pin.keys = wave->keys;
    wave->pin.addresses = wave->addresses;
    wave->pin.entries_private = wave->entries;
    wave->pin.count = 1;
    wave->pin.part = 0;
    wave->pin.tag = kept->tag;
    wave->pin.on_ready = on_pinned;
    wave->pin.owner = recovery;
    recovery->pinned = false;
    kv_store_pin(engine->options.store, &wave->pin);
    while (!recovery->pinned) {
        if (kv_store_poll(engine->options.store) > 0) continue;
        kv_store_wait(engine->options.store, kv_inbox_wake_fd(engine->inbox), 10000);
    }
    if (recovery->status != KV_OK) return recovery->status;
    bool good = use(recovery, wave->addresses[0]);
    kv_store_unpin(engine->options.store, &wave->pin);
    return good ? KV_OK : KV_ABORTED;
}

/* False: there are more than layouts_max.  A record that cannot be read is left alone. */
static bool use_layout(struct recovery *recovery, const uint8_t *bytes) {
    struct kv_layout layout;
    char model[KV_MODEL_MAX + 1];
    if (!layout_record_decode(bytes, &layout, model)) return true;
    return layout_add(recovery->engine, &layout, model) != NULL;
}

static bool keep_chunks(struct recovery *recovery, const struct snapshot_head *head) {
    for (uint32_t c = 0; c < head->chunk_count; c++) {
        if (recovery->chunk_count == recovery->chunk_capacity) {
            size_t capacity = recovery->chunk_capacity ? 2 * recovery->chunk_capacity : 256;
            struct kv_digest *chunks = realloc(recovery->chunks, capacity * sizeof chunks[0]);
            if (!chunks) return false;
            recovery->chunks = chunks;
            recovery->chunk_capacity = capacity;
        }
        recovery->chunks[recovery->chunk_count++] =
            kv_digest_tail(head->nonce, head->generation, c);
    }
    return true;
}

/* False: there are more than sessions_max. */
static bool use_session(struct recovery *recovery, const uint8_t *bytes) {
    struct kv_engine *engine = recovery->engine;
    const struct snapshot_head *head = (const struct snapshot_head *)bytes;
    if (!snapshot_head_valid(bytes, SNAPSHOT_PART_BYTES)) return true;
    if (!keep_chunks(recovery, head)) return false;
    struct layout_entry *layout = engine_layout(engine, &head->fingerprint);
    if (!layout || names_find(&engine->names, head->name)) return true;
    struct known *known = names_insert(&engine->names, head->name);
    if (!known) return false;
    known->layout = layout;
    known->salt.count = head->salt_count;
    memcpy(known->salt.bytes, head->salt, head->salt_count);
    known->used_us = engine->now_us;
    known->committed = true;
    memcpy(known->nonce, head->nonce, sizeof known->nonce);
    known->generation = head->generation;
    known->chunk_count = head->chunk_count;
    known->block_count = head->block_count;
    known->length = head->length;
    struct kv_digest key = kv_digest_session(head->name);
    struct kv_block_info info;
    if (kv_store_find(engine->options.store, &key, &info)) known->durability = info.durability;
    engine->stats.recovered_sessions++;
    return true;
}

/* Reads every record of a kind.  A damaged one is the store's to quarantine and count. */
static bool recover_kind(struct recovery *recovery, uint64_t tag,
                         bool (*use)(struct recovery *, const uint8_t *)) {
    for (size_t i = 0; i < recovery->count; i++) {
        if (recovery->kept[i].tag != tag) continue;
        if (read_first_part(recovery, &recovery->kept[i], use) == KV_ABORTED) return false;
    }
    return true;
}

static int compare(const void *a, const void *b) {
    return memcmp(a, b, KV_DIGEST_BYTES);
}

static void drop_orphans(struct recovery *recovery) {
    if (recovery->chunk_count)
        qsort(recovery->chunks, recovery->chunk_count, sizeof recovery->chunks[0], compare);
    for (size_t i = 0; i < recovery->count; i++) {
        const struct kept *kept = &recovery->kept[i];
        if (kept->tag != TAG_TAIL) continue;
        bool wanted = recovery->chunk_count &&
                      bsearch(&kept->key, recovery->chunks, recovery->chunk_count,
                              sizeof recovery->chunks[0], compare);
        if (!wanted) kv_store_drop(recovery->engine->options.store, &kept->key);
    }
}

enum kv_status engine_recover(struct kv_engine *engine, char *why, size_t why_bytes) {
    struct recovery recovery = {.engine = engine};
    enum kv_status status = KV_OK;
    kv_store_each(engine->options.store, KV_CLASS_KEEP, visit, &recovery);
    if (recovery.out_of_memory) {
        snprintf(why, why_bytes, "out of memory");
        status = KV_BUSY;
    } else if (!recover_kind(&recovery, TAG_LAYOUT, use_layout)) {
        snprintf(why, why_bytes, "layouts_max: the directory holds more than %u",
                 engine->options.layouts_max);
        status = KV_INVALID;
    } else if (!recover_kind(&recovery, TAG_SESSION, use_session)) {
        snprintf(why, why_bytes, "sessions_max: the directory holds more than %u",
                 engine->options.sessions_max);
        status = KV_INVALID;
    } else {
        drop_orphans(&recovery);
    }
    free(recovery.kept);
    free(recovery.chunks);
    return status;
}
