/* SPDX-License-Identifier: Apache-2.0 */
/* engine_load.c - a snapshot back into a session.
 *
 *   begin --> read: chain, energy, ids --> chunk: rows into pages, a slice at a time --> end
 *
 * A tail that cannot be read (its chunk failed a checksum) costs the tail, not the session: it
 * opens as long as its sealed blocks are, and its length says so.
 *
 * The session gets a fresh nonce.  Blocks without token ids are named by it, and a session that
 * goes on differently than it did before a crash must not find the blocks of that other life.
 */
#include "service/engine_private.h"

#include <sys/random.h>

static void load_chunk(struct kv_engine *engine, struct task *task);

/* Over, well or not: open_loaded() answers. */
static void load_end(struct kv_engine *engine, struct task *task, enum kv_status status) {
    task->store_status = status;
    if (status != KV_OK && task->open.session->open) session_unload(engine, task->open.session);
    open_loaded(engine, task);
}

/* The snapshot's numbers become the session's. */
static void load_head(struct task *task, const struct snapshot *from) {
    struct session *session = task->open.session;
    const struct snapshot_head *head = from->head;
    size_t layers = head->layers;
    if (head->block_count)
        memcpy(session->keys, from->keys, head->block_count * sizeof from->keys[0]);
    session->block_count = head->block_count;
    session->head = head->head;
    memcpy(session->rows_seen, from->rows_seen, layers * sizeof from->rows_seen[0]);
    memcpy(session->energy, from->energy, layers * head->energy_count * sizeof from->energy[0]);
    for (size_t l = 0; l < layers; l++)
        session->length[l] = head->block_count * KV_BLOCK_TOKENS;
    session->ids_length = session->ids_staged = session->length[0];
    if (head->block_count) session->ids_mode = head->ids_given ? IDS_GIVEN : IDS_NONE;

    task->open.length = head->length;
    task->open.generation = head->generation;
    task->open.chunk_count = head->chunk_count;
    task->open.chunk_layers = head->chunk_layers;
    memcpy(task->open.nonce, head->nonce, sizeof head->nonce);
}

static uint32_t tail_tokens(const struct task *task) {
    return (uint32_t)(task->open.length - task->open.session->length[0]);
}

/* Pages for the whole tail.  KV_BUSY and the like: those that were made stay until unload. */
static enum kv_status load_pages(struct kv_engine *engine, struct task *task) {
    struct session *session = task->open.session;
    enum kv_status status = KV_OK;
    for (uint32_t l = 0; l < session->layout->info.layout.layers && status == KV_OK; l++)
        status = session_stage_pages(session, &engine->tail, l, tail_tokens(task));
    return status;
}

static enum kv_status load_ids(struct task *task, const struct snapshot *from) {
    const char *message;
    if (tail_tokens(task) == 0) return KV_OK;
    const uint32_t *ids = from->head->ids_given ? from->ids : NULL;
    return session_stage_ids(task->open.session, task->open.session->length[0],
                             tail_tokens(task), ids, &message);
}

static enum kv_status load_session(struct kv_engine *engine, struct task *task,
                                   const struct snapshot *from) {
    struct session *session = task->open.session;
    const struct known *known = session->known;
    uint8_t nonce[16];
    if (getrandom(nonce, sizeof nonce, 0) != sizeof nonce) return KV_IO_ERROR;
    enum kv_status status =
        session_init(session, &engine->tail, known->layout, &known->salt, nonce);
    if (status != KV_OK) return status;
    engine->sessions_open++;
    status = session_reserve_keys(session, &engine->tail, from->head->block_count);
    if (status != KV_OK) return status;
    load_head(task, from);
    if (tail_tokens(task)) status = load_pages(engine, task);
    if (status == KV_OK) status = load_ids(task, from);
    return status;
}

/* All rows are there. */
static void load_tail_done(struct kv_engine *engine, struct task *task) {
    struct session *session = task->open.session;
    uint32_t tokens = tail_tokens(task);
    for (uint32_t l = 0; l < session->layout->info.layout.layers; l++)
        if (tokens) session_publish(session, &engine->tail, l, tokens);
    session_publish_ids(session);
    session->dirty = false;
    load_end(engine, task, KV_OK);
}

/* The tail is lost; the sealed blocks are the session. */
static void load_tail_lost(struct kv_engine *engine, struct task *task) {
    struct session *session = task->open.session;
    enum ids_mode mode = session->ids_mode;
    for (uint32_t l = 0; l < session->layout->info.layout.layers; l++)
        session_rollback(session, &engine->tail, l);
    if (session->block_count) session->ids_mode = mode;
    session->dirty = true;
    load_end(engine, task, KV_OK);
}

static uint32_t chunk_layer_count(const struct task *task) {
    uint32_t layers = task->open.session->layout->info.layout.layers;
    uint32_t left = layers - task->open.chunk * task->open.chunk_layers;
    return left < task->open.chunk_layers ? left : task->open.chunk_layers;
}

static uint32_t copy_tokens(const struct task *task) {
    uint32_t left = tail_tokens(task) - task->open.page * KV_BLOCK_TOKENS;
    return left < KV_BLOCK_TOKENS ? left : KV_BLOCK_TOKENS;
}

/* One page's rows out of the chunk; true if the device is doing it. */
static bool copy_page(struct kv_engine *engine, struct task *task) {
    const struct session *session = task->open.session;
    const struct kv_shape *shape = &session->layout->shape;
    uint32_t layer = task->open.chunk * task->open.chunk_layers + task->open.layer;
    struct live_block *live = session_live(session, session->block_count + task->open.page);
    const uint8_t *from = task->lane->waves[0].addresses[0] +
                          task->open.layer * snapshot_layer_bytes(shape, tail_tokens(task)) +
                          snapshot_layer_bytes(shape, task->open.page * KV_BLOCK_TOKENS);
    return rows_load(engine, task->lane->stream, shape, live->pages[layer].raw, copy_tokens(task),
                     from);
}

static void copy_advance(struct task *task) {
    task->open.page++;
    if (task->open.page * KV_BLOCK_TOKENS < tail_tokens(task)) return;
    task->open.page = 0;
    task->open.layer++;
}

static void load_copy(struct kv_engine *engine, struct task *task) {
    const struct kv_shape *shape = &task->open.session->layout->shape;
    uint32_t layers = chunk_layer_count(task), queued = 0;
    uint64_t copied = 0;
    enum kv_status device = kv_device_status(engine->options.device);
    if (task->open.layer == layers || device != KV_OK) {
        kv_store_unpin(engine->options.store, &task->lane->waves[0].pin);
        task->open.chunk++;
        if (device == KV_OK) task_again(task, load_chunk);
        else load_end(engine, task, device);
        return;
    }
    while (task->open.layer < layers && copied < SLICE_BYTES && queued < SLICE_COPIES) {
        copied += snapshot_layer_bytes(shape, copy_tokens(task));
        queued += copy_page(engine, task);
        copy_advance(task);
    }
    if (queued) task_wait_ticket(engine, task, load_copy);
    else task_again(task, load_copy);
}

static bool chunk_fits(struct kv_engine *engine, struct task *task) {
    struct wave *wave = &task->lane->waves[0];
    const struct session *session = task->open.session;
    struct kv_block_info info;
    return kv_store_find(engine->options.store, &wave->keys[0], &info) &&
           info.extent.part_count == chunk_layer_count(task) &&
           info.extent.part_bytes ==
               snapshot_layer_bytes(&session->layout->shape, tail_tokens(task));
}

static void load_chunk_read(struct kv_engine *engine, struct task *task) {
    struct wave *wave = &task->lane->waves[0];
    if (wave->status == KV_OK && !chunk_fits(engine, task)) {
        kv_store_unpin(engine->options.store, &wave->pin);
        wave->status = KV_CORRUPT;
    }
    if (wave->status == KV_NOT_FOUND || wave->status == KV_CORRUPT ||
        wave->status == KV_MISMATCH) {
        load_tail_lost(engine, task);
    } else if (wave->status == KV_BUSY && task_wait_memory(engine, task, load_chunk)) {
        return;
    } else if (wave->status != KV_OK) {
        load_end(engine, task, wave->status);
    } else {
        task->open.layer = task->open.page = 0;
        load_copy(engine, task);
    }
}

static void load_chunk(struct kv_engine *engine, struct task *task) {
    if (task->open.chunk == task->open.chunk_count) {
        load_tail_done(engine, task);
        return;
    }
    struct kv_digest key =
        kv_digest_tail(task->open.nonce, task->open.generation, task->open.chunk);
    pin_one(engine, task, &key, TAG_TAIL, -1);
    task_wait_store(task, load_chunk_read);
}

/* The snapshot is what the table of names says it is. */
static bool load_check(const struct task *task, const struct snapshot *from) {
    const struct known *known = task->open.session->known;
    const struct layout_entry *layout = known->layout;
    return strcmp(from->head->name, known->name) == 0 &&
           kv_digest_equal(&from->head->fingerprint, &layout->info.fingerprint) &&
           from->head->layers == layout->info.layout.layers &&
           from->head->energy_count == layout->energy_count;
}

static void load_read(struct kv_engine *engine, struct task *task) {
    struct wave *wave = &task->lane->waves[0];
    struct known *known = task->open.session->known;
    enum kv_status status = wave->status;
    if (status == KV_BUSY && task_wait_memory(engine, task, load_begin)) return;
    if (status == KV_OK) {
        struct kv_block_info info = {0};
        struct snapshot snapshot;
        bool found = kv_store_find(engine->options.store, &wave->keys[0], &info);
        uint64_t bytes = (uint64_t)info.extent.part_count * info.extent.part_bytes;
        bool good = found && snapshot_decode(wave->addresses[0], bytes, &snapshot) &&
                    load_check(task, &snapshot);
        status = good ? load_session(engine, task, &snapshot) : KV_CORRUPT;
        kv_store_unpin(engine->options.store, &wave->pin);
    }
    /* A snapshot that is gone does not come back: the name is free again. */
    if (status == KV_NOT_FOUND || status == KV_CORRUPT) known->committed = false;
    if (status == KV_UNAVAILABLE) status = KV_BUSY; /* no room for its tail */
    if (status == KV_OK) task_again(task, load_chunk);
    else load_end(engine, task, status);
}

void load_begin(struct kv_engine *engine, struct task *task) {
    struct kv_digest key = kv_digest_session(task->open.session->known->name);
    pin_one(engine, task, &key, TAG_SESSION, -1);
    task_wait_store(task, load_read);
}
