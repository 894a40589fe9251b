/* SPDX-License-Identifier: Apache-2.0 */
/* engine_commit.c - a session into its snapshot.
 *
 *   begin   how long is what can be kept, into how many chunks does its tail go
 *   chunk   reserve, copy a slice at a time (on the lane's stream what the device has), commit; next
 *   sync    the layout's record, the chunks, the sealed blocks: all as durable as asked
 *   write   the snapshot, which refers to all of them; sync
 *   done    the chunks of the snapshot before it are dropped
 *
 * Nothing of it holds the session's memory still but the turn, which the task has until the end.
 *
 * Length.  A snapshot has one length for all layers, the shortest; what some layers have beyond it
 * is not kept.  A block below it that only some layers have packed, and so long ago that their
 * exact rows are gone, cannot be kept either, neither as a block nor exactly: then the snapshot
 * ends before it.  That takes layers more than 128 tokens apart, the middle of a prefill.
 *
 * A commit whose client is gone is finished all the same.
 */
#include "service/engine_private.h"

static void commit_chunk(struct kv_engine *engine, struct task *task);
static void commit_sync(struct kv_engine *engine, struct task *task);
static void commit_write(struct kv_engine *engine, struct task *task);

/* ---- What is kept -------------------------------------------------------------------------- */

/* Where a layer's exact rows of a live block are; NULL if they are not exact any more. */
static const uint8_t *exact_page(const struct session *session, const struct live_block *live,
                                 uint32_t layer) {
    const struct live_page *page = &live->pages[layer];
    if (page->raw) return page->raw;
    bool sink = page->state == PAGE_SEALED && live->state == LIVE_FILLING &&
                session_block_raw(session->layout, live->index);
    return sink ? live_packed(live) + (size_t)layer * session->layout->raw_bytes : NULL;
}

static uint32_t length_to_keep(const struct session *session) {
    uint32_t length = session_length(session);
    uint32_t layers = session->layout->info.layout.layers;
    for (const struct live_block *live = session->live_first; live; live = live->next) {
        uint32_t begin = live->index * KV_BLOCK_TOKENS;
        if (begin >= length) break;
        for (uint32_t l = 0; l < layers; l++)
            if (!exact_page(session, live, l)) return begin;
    }
    return length;
}

/* ---- Failing ---------------------------------------------------------------------------------- */

static void commit_fail(struct kv_engine *engine, struct task *task, enum kv_status status) {
    for (uint32_t c = 0; c < task->commit.chunk; c++) {
        struct kv_digest key =
            kv_digest_tail(task->commit.session->nonce, task->commit.generation, c);
        kv_store_drop(engine->options.store, &key);
    }
    task->store_status = status;
    commit_done(engine, task);
}

/* Room for a record; false: the task waits or has failed. */
static bool commit_reserve(struct kv_engine *engine, struct task *task,
                           const struct kv_digest *key, const struct kv_block_extent *extent,
                           step_fn *again) {
    enum kv_status status = kv_store_reserve(engine->options.store, key, KV_CLASS_KEEP, extent,
                                             &task->commit.slot);
    if (status == KV_OK) {
        task->give_up_us = 0;
        return true;
    }
    if (status == KV_BUSY && task_wait_memory(engine, task, again)) return false;
    /* KV_INVALID: a layer's tail is longer than a segment.  It is shorter once blocks are sealed. */
    commit_fail(engine, task, KV_BUSY);
    return false;
}

/* ---- The tail ----------------------------------------------------------------------------------- */

static uint32_t tail_tokens(const struct task *task) {
    return task->commit.length - task->commit.block_count * KV_BLOCK_TOKENS;
}

static uint32_t chunk_layer_count(const struct task *task) {
    uint32_t layers = task->commit.session->layout->info.layout.layers;
    uint32_t left = layers - task->commit.chunk * task->commit.chunk_layers;
    return left < task->commit.chunk_layers ? left : task->commit.chunk_layers;
}

/* The page that is next, and how many of its tokens are the tail's. */
static uint32_t copy_tokens(const struct task *task) {
    uint32_t left = tail_tokens(task) - task->commit.page * KV_BLOCK_TOKENS;
    return left < KV_BLOCK_TOKENS ? left : KV_BLOCK_TOKENS;
}

/* Copies one page's rows into the chunk; true if the device is doing it. */
static bool copy_page(struct kv_engine *engine, struct task *task) {
    const struct session *session = task->commit.session;
    const struct kv_shape *shape = &session->layout->shape;
    uint32_t layer = task->commit.chunk * task->commit.chunk_layers + task->commit.layer;
    const struct live_block *live =
        session_live(session, task->commit.block_count + task->commit.page);
    uint8_t *out = task->commit.slot.address +
                   task->commit.layer * snapshot_layer_bytes(shape, tail_tokens(task)) +
                   snapshot_layer_bytes(shape, task->commit.page * KV_BLOCK_TOKENS);
    return rows_save(engine, task->lane->stream, shape, exact_page(session, live, layer),
                     copy_tokens(task), out);
}

static void copy_advance(struct task *task) {
    task->commit.page++;
    if (task->commit.page * KV_BLOCK_TOKENS < tail_tokens(task)) return;
    task->commit.page = 0;
    task->commit.layer++;
}

static void commit_copy(struct kv_engine *engine, struct task *task) {
    const struct kv_shape *shape = &task->commit.session->layout->shape;
    uint32_t layers = chunk_layer_count(task), queued = 0;
    uint64_t copied = 0;
    enum kv_status device = kv_device_status(engine->options.device);
    if (device != KV_OK) {
        kv_store_abandon(engine->options.store, &task->commit.slot);
        commit_fail(engine, task, device);
        return;
    }
    if (task->commit.layer == layers) {
        kv_store_commit(engine->options.store, &task->commit.slot, false);
        task->commit.chunk++;
        task_again(task, commit_chunk);
        return;
    }
    while (task->commit.layer < layers && copied < SLICE_BYTES && queued < SLICE_COPIES) {
        copied += snapshot_layer_bytes(shape, copy_tokens(task));
        queued += copy_page(engine, task);
        copy_advance(task);
    }
    if (queued) task_wait_ticket(engine, task, commit_copy);
    else task_again(task, commit_copy);
}

static void commit_chunk(struct kv_engine *engine, struct task *task) {
    const struct session *session = task->commit.session;
    if (task->commit.chunk == task->commit.chunk_count) {
        commit_sync(engine, task);
        return;
    }
    const struct kv_block_extent extent = {
        .tag = TAG_TAIL,
        .part_count = chunk_layer_count(task),
        .part_bytes =
            (uint32_t)snapshot_layer_bytes(&session->layout->shape, tail_tokens(task)),
    };
    struct kv_digest key =
        kv_digest_tail(session->nonce, task->commit.generation, task->commit.chunk);
    if (!commit_reserve(engine, task, &key, &extent, commit_chunk)) return;
    task->commit.layer = task->commit.page = 0;
    commit_copy(engine, task);
}

/* ---- Durable, in order ------------------------------------------------------------------------------ */

/* What the snapshot refers to: number 0 is the layout's record, then the chunks, then the blocks. */
static struct kv_digest reference(const struct task *task, uint32_t number) {
    const struct session *session = task->commit.session;
    if (number == 0) return kv_digest_layout_record(&session->layout->info.fingerprint);
    if (number <= task->commit.chunk_count)
        return kv_digest_tail(session->nonce, task->commit.generation, number - 1);
    return session->keys[number - 1 - task->commit.chunk_count];
}

static void commit_sync(struct kv_engine *engine, struct task *task) {
    if (task->store_status != KV_OK) {
        commit_fail(engine, task, task->store_status);
        return;
    }
    uint32_t count = 1 + task->commit.chunk_count + task->commit.block_count;
    uint32_t syncs = 0, looked = 0;
    for (; task->commit.sync_next < count && syncs < SYNCS && looked < SLICE_BLOCKS; looked++) {
        struct kv_digest key = reference(task, task->commit.sync_next++);
        struct kv_block_info info;
        bool waits = !task->no_disk && kv_store_find(engine->options.store, &key, &info) &&
                     info.durability < task->commit.durability;
        if (waits)
            task_sync(engine, task, &task->lane->syncs[syncs++], &key, task->commit.durability);
    }
    bool more = task->commit.sync_next < count || syncs;
    if (syncs) task_wait_store(task, commit_sync);
    else if (more) task_again(task, commit_sync);
    else commit_write(engine, task);
}

static void commit_written(struct kv_engine *engine, struct task *task) {
    struct session *session = task->commit.session;
    struct known *known = session->known;
    if (task->store_status != KV_OK) {
        /* The snapshot is in memory and refers to chunks in memory: leave both, and say that it
         * is not durable.  The next commit writes it again. */
        commit_done(engine, task);
        return;
    }
    known->durability = task->no_disk ? KV_VOLATILE : task->commit.durability;
    session->dirty = false;
    commit_done(engine, task);
}

static void fill_head(const struct task *task, struct snapshot_head *head) {
    const struct session *session = task->commit.session;
    const struct known *known = session->known;
    *head = (struct snapshot_head){
        .generation = task->commit.generation,
        .length = task->commit.length,
        .block_count = task->commit.block_count,
        .ids_given = session->ids_mode == IDS_GIVEN,
        .ids_count = session->ids_mode == IDS_GIVEN ? tail_tokens(task) : 0,
        .layers = session->layout->info.layout.layers,
        .energy_count = (uint32_t)session->layout->energy_count,
        .chunk_count = task->commit.chunk_count,
        .chunk_layers = task->commit.chunk_count ? task->commit.chunk_layers : 0,
        .salt_count = known->salt.count,
        .fingerprint = session->layout->info.fingerprint,
        .head = session->head,
    };
    memcpy(head->salt, known->salt.bytes, known->salt.count);
    memcpy(head->nonce, session->nonce, sizeof head->nonce);
    memcpy(head->name, known->name, sizeof known->name);
}

/* The ids of the tail stand in live blocks; the record wants them in one piece. */
static void write_ids(const struct task *task, uint8_t *record) {
    uint32_t left = tail_tokens(task);
    uint8_t *at = record + sizeof(struct snapshot_head) +
                  task->commit.block_count * sizeof(struct kv_digest);
    for (const struct live_block *live = task->commit.session->live_first; left;
         live = live->next) {
        uint32_t tokens = left < KV_BLOCK_TOKENS ? left : KV_BLOCK_TOKENS;
        memcpy(at, live->ids, tokens * sizeof live->ids[0]);
        at += tokens * sizeof live->ids[0];
        left -= tokens;
    }
}

static void drop_old_chunks(struct kv_engine *engine, const struct known *known) {
    if (!known->committed) return;
    for (uint32_t c = 0; c < known->chunk_count; c++) {
        struct kv_digest key = kv_digest_tail(known->nonce, known->generation, c);
        kv_store_drop(engine->options.store, &key);
    }
}

static void commit_write(struct kv_engine *engine, struct task *task) {
    struct session *session = task->commit.session;
    struct known *known = session->known;
    struct snapshot_head head;
    fill_head(task, &head);
    const struct kv_block_extent extent =
        snapshot_extent(TAG_SESSION, snapshot_total_bytes(&head));
    struct kv_digest key = kv_digest_session(known->name);
    if (!commit_reserve(engine, task, &key, &extent, commit_write)) return;

    const struct snapshot snapshot = {
        .head = &head,
        .keys = session->keys,
        .ids = NULL, /* in pieces, below */
        .rows_seen = session->rows_seen,
        .energy = session->energy,
    };
    snapshot_encode(&snapshot, &extent, task->commit.slot.address);
    if (head.ids_count) write_ids(task, task->commit.slot.address);
    kv_store_commit(engine->options.store, &task->commit.slot, false);
    drop_old_chunks(engine, known);

    known->committed = true;
    known->length = task->commit.length;
    known->block_count = task->commit.block_count;
    known->chunk_count = task->commit.chunk_count;
    known->generation = task->commit.generation;
    memcpy(known->nonce, session->nonce, sizeof known->nonce);
    known->durability = KV_VOLATILE;
    known->used_us = session->used_us;
    session->dirty = true;
    if (task->no_disk) {
        commit_written(engine, task);
        return;
    }
    task_sync(engine, task, &task->sync, &key, task->commit.durability);
    task_wait_store(task, commit_written);
}

void commit_begin(struct kv_engine *engine, struct task *task) {
    struct session *session = task->commit.session;
    const struct known *known = session->known;
    if (!session->dirty && known->committed &&
        (known->durability >= task->commit.durability || known->durability == KV_VOLATILE)) {
        task->store_status = KV_OK; /* nothing is new, or there is no disk */
        commit_done(engine, task);
        return;
    }
    task->commit.length = length_to_keep(session);
    task->commit.block_count = session->block_count;
    task->commit.generation = ++session->commits;
    uint64_t layer_bytes = snapshot_layer_bytes(&session->layout->shape, tail_tokens(task));
    uint32_t layers = session->layout->info.layout.layers;
    task->commit.chunk_layers = snapshot_chunk_layers(layer_bytes, layers);
    task->commit.chunk_count = layer_bytes ? (layers + task->commit.chunk_layers - 1) /
                                                 task->commit.chunk_layers
                                           : 0;
    commit_chunk(engine, task);
}
