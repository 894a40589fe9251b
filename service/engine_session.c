/* SPDX-License-Identifier: Apache-2.0 */
/* engine_session.c - OPEN, COMMIT, CLOSE, DELETE, DESCRIBE, LIST: sessions by name.
 *
 * A name is bound to a slot while anybody works with it, and the slot's queue of turns is what
 * keeps an OPEN, a DELETE and the idle limit from meeting.  A name that was never committed and
 * that nobody uses is forgotten with its slot.
 */
#include "service/engine_private.h"

#include <stdio.h>
#include <sys/random.h>

/* ---- Slots and handles -------------------------------------------------------------------- */

uint64_t session_handle(const struct session *session) {
    return (uint64_t)session->generation << 32 | (session->slot + 1);
}

struct session *engine_session(struct kv_engine *engine, uint64_t handle) {
    uint32_t slot = (uint32_t)handle - 1;
    if (slot >= engine->session_count) return NULL;
    struct session *session = &engine->sessions[slot];
    return session->open && session->generation == handle >> 32 ? session : NULL;
}

struct session *session_bind(struct kv_engine *engine, struct known *known, bool to_open) {
    if (known->session) return known->session;
    uint32_t unbound = 0;
    struct session *found = NULL;
    for (uint32_t i = 0; i < engine->session_count; i++) {
        if (engine->sessions[i].known) continue;
        found = &engine->sessions[i];
        unbound++;
    }
    /* The last few are for deleting and describing, which is what helps when all are open. */
    if (!found || (to_open && unbound <= SLOTS_EXTRA)) return NULL;
    found->known = known;
    known->session = found;
    return found;
}

void session_unload(struct kv_engine *engine, struct session *session) {
    session_clear(session, &engine->tail);
    engine->sessions_open--;
}

static void fail_end(struct kv_engine *engine, struct task *task, enum kv_status status,
                     const char *field, const char *message) {
    if (task->request) request_fail(task->request, status, field, "%s", message);
    task_finish(engine, task);
}

/* True and the task ended: it was stopped while it waited for its turn. */
static bool stopped(struct kv_engine *engine, struct task *task) {
    if (task->stopped == KV_OK) return false;
    fail_end(engine, task, task->stopped, "", "stopped before it was done");
    return true;
}

/* 1 .. KV_NAME_MAX bytes of UTF-8 without control characters.  Surrogates and overlong forms are
 * left to who displays it; what matters is that a name is printable and compares as bytes. */
static bool name_valid(const char *name) {
    size_t bytes = strnlen(name, KV_NAME_MAX + 1);
    if (bytes < 1 || bytes > KV_NAME_MAX) return false;
    for (size_t i = 0; i < bytes;) {
        uint8_t c = (uint8_t)name[i];
        if (c < 0x20 || c == 0x7f) return false;
        size_t more = c < 0x80 ? 0 : c >> 5 == 6 ? 1 : c >> 4 == 14 ? 2 : c >> 3 == 30 ? 3 : 4;
        if (more > 3) return false;
        for (i++; more; more--, i++)
            if (((uint8_t)name[i] & 0xc0) != 0x80) return false;
    }
    return true;
}

/* ---- OPEN ------------------------------------------------------------------------------------ */

static void open_answer(struct kv_engine *engine, struct task *task);

/* From here on it has a handle. */
static void session_opened(struct kv_engine *engine, struct session *session) {
    session->generation++;
    session->used_us = engine->now_us;
    session->known->used_us = engine->now_us;
}

/* Position of the first token that is not there, a slice of the chain at a time. */
static void open_answer(struct kv_engine *engine, struct task *task) {
    struct session *session = task->open.session;
    if (!task->request) {
        task_finish(engine, task);
        return;
    }
    struct kv_open *open = &task->request->open;
    uint32_t end = task->open.block + SLICE_BLOCKS;
    bool missing = false;
    for (; task->open.block < session->block_count && task->open.block < end && !missing;) {
        struct kv_block_info info;
        missing = !kv_store_find(engine->options.store, &session->keys[task->open.block], &info);
        if (!missing) task->open.block++;
    }
    if (!missing && task->open.block < session->block_count) {
        task_again(task, open_answer);
        return;
    }
    open->length = session_length(session);
    open->usable = missing ? (uint64_t)task->open.block * KV_BLOCK_TOKENS : open->length;
    open->session = session_handle(session);
    open->created = task->open.created;
    open->info = session->layout->info;
    task_finish(engine, task);
}

/* The longest prefix of the given tokens that is in the cache, a slice at a time. */
static void open_attach(struct kv_engine *engine, struct task *task) {
    struct session *session = task->open.session;
    if (!task->request || task->stopped != KV_OK) {
        session_unload(engine, session);
        stopped(engine, task);
        return;
    }
    const uint32_t *ids = (const uint32_t *)task->request->staging;
    uint32_t blocks = task->request->open.token_count / KV_BLOCK_TOKENS;
    for (uint32_t i = 0; i < SLICE_BLOCKS && session->block_count < blocks; i++) {
        uint32_t block = session->block_count;
        struct kv_digest digest = kv_chain_next(&session->head, ids + block * KV_BLOCK_TOKENS);
        struct kv_block_info info;
        bool found = block_find(engine, session->layout, block, &digest, &info) &&
                     session_reserve_keys(session, &engine->tail, block + 1) == KV_OK;
        if (!found) blocks = block;
        else session->keys[session->block_count++] = session->head = digest;
    }
    if (session->block_count < blocks) {
        task_again(task, open_attach);
        return;
    }
    if (session->block_count) {
        session->ids_mode = IDS_GIVEN;
        session->ids_length = session->ids_staged =
            (uint64_t)session->block_count * KV_BLOCK_TOKENS;
        for (uint32_t l = 0; l < session->layout->info.layout.layers; l++)
            session->length[l] = session->block_count * KV_BLOCK_TOKENS;
        engine->stats.blocks_shared += session->block_count;
    }
    session_opened(engine, session);
    open_answer(engine, task);
}

static void open_create(struct kv_engine *engine, struct task *task) {
    if (stopped(engine, task)) return;
    struct session *session = task->open.session;
    struct kv_open *open = &task->request->open;
    uint8_t nonce[16];
    if (getrandom(nonce, sizeof nonce, 0) != sizeof nonce) {
        fail_end(engine, task, KV_IO_ERROR, "", "no random bytes");
        return;
    }
    struct known *known = session->known;
    known->layout = engine_layout(engine, &open->fingerprint);
    known->salt = open->salt;
    enum kv_status status = session_init(session, &engine->tail, known->layout, &known->salt, nonce);
    if (status == KV_BUSY && task_wait_memory(engine, task, open_create)) return;
    if (status != KV_OK) {
        request_fail_memory(engine, task->request);
        task_finish(engine, task);
        return;
    }
    engine->sessions_open++;
    task->open.created = true;
    open_attach(engine, task);
}

void open_loaded(struct kv_engine *engine, struct task *task) {
    struct session *session = task->open.session;
    if (session->open) {
        session_opened(engine, session);
        open_answer(engine, task);
        return;
    }
    if (task->stopped != KV_OK) {
        stopped(engine, task);
        return;
    }
    const char *why = task->store_status == KV_NOT_FOUND ? "its snapshot is gone"
                      : task->store_status == KV_CORRUPT ? "its snapshot failed its checksum"
                                                         : "its snapshot cannot be read now";
    if (task->store_status == KV_BUSY && task->request) request_fail_memory(engine, task->request);
    else if (task->request)
        request_fail(task->request, task->store_status, "name", "%s", why);
    task_finish(engine, task);
}

static const char *open_mismatch(const struct known *known, const struct kv_open *open) {
    if (!kv_digest_equal(&known->layout->info.fingerprint, &open->fingerprint))
        return "fingerprint";
    bool same = known->salt.count == open->salt.count &&
                memcmp(known->salt.bytes, open->salt.bytes, open->salt.count) == 0;
    return same ? NULL : "salt";
}

static void open_begin(struct kv_engine *engine, struct task *task) {
    if (stopped(engine, task)) return;
    struct session *session = task->open.session;
    struct known *known = session->known;
    const struct kv_open *open = &task->request->open;
    bool exists = session->open || known->committed;
    const char *mismatch = exists ? open_mismatch(known, open) : NULL;
    if (exists && open->mode == KV_OPEN_CREATE)
        fail_end(engine, task, KV_EXISTS, "name", "a session of this name exists");
    else if (!exists && open->mode == KV_OPEN_EXISTING)
        fail_end(engine, task, KV_NOT_FOUND, "name", "no session has this name");
    else if (mismatch)
        fail_end(engine, task, KV_MISMATCH, mismatch, "the session of this name has another");
    else if (session->open) {
        session->used_us = engine->now_us;
        open_answer(engine, task);
    } else if (engine->sessions_open >= engine->options.sessions_open_max) {
        fail_end(engine, task, KV_BUSY, "", "as many sessions are open as may be");
    } else if (known->committed) {
        load_begin(engine, task);
    } else {
        open_create(engine, task);
    }
}

void open_start(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    const struct kv_open *open = &request->open;
    if (!name_valid(open->name)) {
        fail_end(engine, task, KV_INVALID, "name",
                 "1 .. 200 bytes of UTF-8 without control characters");
        return;
    }
    if (!engine_layout(engine, &open->fingerprint)) {
        fail_end(engine, task, KV_NOT_FOUND, "fingerprint", "no such layout is registered");
        return;
    }
    if (open->token_count > engine->options.session_tokens_max) {
        fail_end(engine, task, KV_INVALID, "token_ids", "more than the longest session");
        return;
    }
    struct known *known = names_find(&engine->names, open->name);
    if (!known) known = names_insert(&engine->names, open->name);
    if (!known) {
        fail_end(engine, task, KV_BUSY, "name", "as many sessions are known as may be");
        return;
    }
    struct session *session = session_bind(engine, known, true);
    if (!session) {
        if (!known->committed) names_remove(&engine->names, known);
        fail_end(engine, task, KV_BUSY, "", "as many sessions are open as may be");
        return;
    }
    task->open.session = session;
    task_take_turn(task, session);
    task_enqueue(engine, task, open_begin);
}

/* ---- COMMIT, CLOSE ------------------------------------------------------------------------------- */

static void close_end(struct kv_engine *engine, struct task *task) {
    struct session *session = task->commit.session;
    const struct known *known = session->known;
    if (task->request) {
        struct kv_commit *commit = &task->request->commit;
        commit->length = known->committed ? known->length : 0;
        commit->durability = known->committed ? known->durability : KV_VOLATILE;
    }
    if (task->commit.close) session_unload(engine, session);
    task_finish(engine, task);
}

void commit_done(struct kv_engine *engine, struct task *task) {
    if (task->store_status == KV_OK) {
        close_end(engine, task);
        return;
    }
    /* The idle limit tries again, but later; a service that stops does not. */
    task->commit.session->used_us = engine->draining ? UINT64_MAX : engine->now_us;
    if (task->request && task->store_status == KV_BUSY)
        request_fail(task->request, KV_BUSY, "", "no room for the session's snapshot");
    else if (task->request)
        request_fail(task->request, task->store_status, "",
                     "the session is in memory, but a write failed");
    task_finish(engine, task);
}

static void close_begin(struct kv_engine *engine, struct task *task) {
    struct session *session = task->commit.session;
    struct kv_request *request = task->request;
    if (request && stopped(engine, task)) return;
    bool gone = request ? engine_session(engine, request->commit.session) != session
                        : !session->open;
    if (gone) {
        fail_end(engine, task, KV_NOT_FOUND, "session", "no such session is open");
        return;
    }
    if (task->commit.commit) commit_begin(engine, task);
    else close_end(engine, task);
}

void close_start(struct kv_engine *engine, struct task *task) {
    struct kv_commit *commit = &task->request->commit;
    struct session *session = engine_session(engine, commit->session);
    if (!session) {
        fail_end(engine, task, KV_NOT_FOUND, "session", "no such session is open");
        return;
    }
    bool close = task->request->kind == KV_REQUEST_CLOSE;
    task->commit.session = session;
    task->commit.close = close;
    task->commit.commit = !close || commit->commit;
    task->commit.durability =
        commit->durability == KV_SYNCED ? KV_SYNCED : KV_WRITTEN;
    task_take_turn(task, session);
    task_enqueue(engine, task, close_begin);
}

bool session_close_idle(struct kv_engine *engine, struct session *session) {
    struct task *task = task_create(engine, NULL);
    if (!task) return false;
    task->commit.session = session;
    task->commit.close = task->commit.commit = true;
    task->commit.durability = KV_WRITTEN;
    task_take_turn(task, session);
    task_enqueue(engine, task, close_begin);
    return true;
}

/* ---- DELETE ------------------------------------------------------------------------------------------ */

static void delete_done(struct kv_engine *engine, struct task *task) {
    if (task->store_status != KV_OK)
        fail_end(engine, task, task->store_status, "name",
                 "it is forgotten, but that could not be made durable");
    else task_finish(engine, task);
}

static void delete_begin(struct kv_engine *engine, struct task *task) {
    if (stopped(engine, task)) return;
    struct session *session = task->open.session;
    struct known *known = session->known;
    if (!session->open && !known->committed) {
        fail_end(engine, task, KV_NOT_FOUND, "name", "no session has this name");
        return;
    }
    struct kv_digest key = kv_digest_session(known->name);
    if (known->committed && kv_store_drop(engine->options.store, &key) == KV_BUSY) {
        if (!task_wait_memory(engine, task, delete_begin))
            fail_end(engine, task, KV_BUSY, "name", "its snapshot is in use");
        return;
    }
    if (session->open) session_unload(engine, session);
    if (!known->committed) {
        task_finish(engine, task);
        return;
    }
    for (uint32_t c = 0; c < known->chunk_count; c++) {
        struct kv_digest chunk = kv_digest_tail(known->nonce, known->generation, c);
        kv_store_drop(engine->options.store, &chunk);
    }
    known->committed = false;
    task_sync(engine, task, &task->sync, &key, KV_SYNCED);
    task_wait_store(task, delete_done);
}

static bool named_start(struct kv_engine *engine, struct task *task, step_fn *begin) {
    struct known *known = names_find(&engine->names, task->request->named.name);
    bool exists = known && (known->committed || known->session);
    if (!exists) {
        fail_end(engine, task, KV_NOT_FOUND, "name", "no session has this name");
        return false;
    }
    struct session *session = session_bind(engine, known, false);
    if (!session) {
        fail_end(engine, task, KV_BUSY, "", "too many sessions are in use");
        return false;
    }
    task->open.session = session;
    task_take_turn(task, session);
    task_enqueue(engine, task, begin);
    return true;
}

void delete_start(struct kv_engine *engine, struct task *task) {
    named_start(engine, task, delete_begin);
}

/* ---- DESCRIBE, LIST -------------------------------------------------------------------------------------- */

static void info_fill(const struct kv_engine *engine, const struct known *known,
                      struct kv_session_info *out) {
    const struct session *session = known->session;
    const struct layout_entry *layout = known->layout;
    const struct kv_layout *l = &layout->info.layout;
    bool open = session && session->open;
    uint32_t blocks = open ? session->block_count : known->block_count;
    uint64_t row = (uint64_t)l->layers * l->heads * l->head_dim * 2 * 2;
    uint64_t used_us = open ? session->used_us : known->used_us;

    memset(out, 0, sizeof *out);
    memcpy(out->name, known->name, sizeof out->name);
    out->fingerprint = layout->info.fingerprint;
    out->length = open ? session_length(session) : known->length;
    out->length_committed = known->committed ? known->length : 0;
    out->sealed_tokens = (uint64_t)blocks * KV_BLOCK_TOKENS;
    uint32_t raw_blocks = 0;
    while (raw_blocks < blocks && session_block_raw(layout, raw_blocks)) raw_blocks++;
    out->bytes_held = (uint64_t)l->layers * ((uint64_t)raw_blocks * layout->raw_bytes +
                                             (uint64_t)(blocks - raw_blocks) * layout->packed_bytes);
    if (out->length > out->sealed_tokens)
        out->bytes_held += (out->length - out->sealed_tokens) * row;
    out->bytes_full = out->length * row;
    out->open = open;
    out->age_ms = (engine->now_us - used_us) / 1000;
    out->durability = known->committed ? known->durability : KV_VOLATILE;
}

/* Counts blocks by tier; as many digests as fit go to the reply. */
static void describe_blocks(struct kv_engine *engine, struct kv_request *request,
                            const struct kv_digest *keys, uint32_t count) {
    struct kv_session_info *info = &request->named.info;
    size_t fit = request->staging ? request->staging_bytes / sizeof keys[0] : 0;
    for (uint32_t i = 0; i < count; i++) {
        struct kv_block_info block;
        if (!kv_store_find(engine->options.store, &keys[i], &block)) info->blocks_missing++;
        else if (block.tier == KV_TIER_NVME) info->blocks_nvme++;
        else info->blocks_host++;
    }
    uint32_t digests = count < fit ? count : (uint32_t)fit;
    if (digests) memcpy(request->staging, keys, digests * sizeof keys[0]);
    request->named.digest_count = digests;
    request->reply_offset = 0;
    request->reply_bytes = digests * sizeof keys[0];
}

static void describe_read(struct kv_engine *engine, struct task *task) {
    struct wave *wave = &task->lane->waves[0];
    struct snapshot snapshot;
    if (wave->status == KV_OK && task->request) {
        struct kv_block_info info = {0};
        bool found = kv_store_find(engine->options.store, &wave->keys[0], &info);
        uint64_t bytes = (uint64_t)info.extent.part_count * info.extent.part_bytes;
        if (found && snapshot_decode(wave->addresses[0], bytes, &snapshot))
            describe_blocks(engine, task->request, snapshot.keys, snapshot.head->block_count);
        else request_fail(task->request, KV_CORRUPT, "name", "its snapshot cannot be read");
    } else if (task->request) {
        request_fail(task->request, wave->status, "name", "its snapshot cannot be read");
    }
    if (wave->status == KV_OK) kv_store_unpin(engine->options.store, &wave->pin);
    task_finish(engine, task);
}

static void describe_begin(struct kv_engine *engine, struct task *task) {
    if (stopped(engine, task)) return;
    struct session *session = task->open.session;
    struct known *known = session->known;
    struct kv_request *request = task->request;
    if (!session->open && !known->committed) {
        fail_end(engine, task, KV_NOT_FOUND, "name", "no session has this name");
        return;
    }
    info_fill(engine, known, &request->named.info);
    request->named.layout = known->layout->info;
    if (session->open) {
        describe_blocks(engine, request, session->keys, session->block_count);
        task_finish(engine, task);
        return;
    }
    struct kv_digest key = kv_digest_session(known->name);
    pin_one(engine, task, &key, TAG_SESSION, -1);
    task_wait_store(task, describe_read);
}

void describe_start(struct kv_engine *engine, struct task *task) {
    named_start(engine, task, describe_begin);
}

void list_start(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    struct kv_list *list = &request->list;
    struct kv_session_info *out = (struct kv_session_info *)request->staging;
    size_t fit = request->staging ? request->staging_bytes / sizeof *out : 0;
    if (list->limit && list->limit < fit) fit = list->limit;
    size_t prefix = strlen(list->prefix);
    uint32_t i = names_first(&engine->names, list->prefix, list->after);
    list->count = 0;
    list->more = false;
    for (; i < engine->names.count; i++) {
        const struct known *known = &engine->names.entries[engine->names.order[i]];
        if (strncmp(known->name, list->prefix, prefix) != 0) break;
        bool exists = known->committed || (known->session && known->session->open);
        if (!exists) continue; /* being opened */
        if (list->count == fit) {
            list->more = true;
            break;
        }
        info_fill(engine, known, &out[list->count++]);
    }
    request->reply_offset = 0;
    request->reply_bytes = list->count * sizeof *out;
    task_finish(engine, task);
}
