/* SPDX-License-Identifier: Apache-2.0 */
/* engine_session.c - sessions by name and by handle, and OPEN.
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

bool session_named(struct kv_engine *engine, struct task *task, step_fn *begin) {
    struct known *known = names_find(&engine->names, task->request->named.name);
    bool exists = known && (known->committed || known->session);
    if (!exists) {
        task_fail(engine, task, KV_NOT_FOUND, "name", "no session has this name");
        return false;
    }
    struct session *session = session_bind(engine, known, false);
    if (!session) {
        task_fail(engine, task, KV_BUSY, "", "too many sessions are in use");
        return false;
    }
    task->open.session = session;
    task_take_turn(task, session);
    task_enqueue(engine, task, begin);
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
        task_was_stopped(engine, task);
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
    if (task_was_stopped(engine, task)) return;
    struct session *session = task->open.session;
    struct kv_open *open = &task->request->open;
    uint8_t nonce[16];
    if (getrandom(nonce, sizeof nonce, 0) != sizeof nonce) {
        task_fail(engine, task, KV_IO_ERROR, "", "no random bytes");
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
        task_was_stopped(engine, task);
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
    if (task_was_stopped(engine, task)) return;
    struct session *session = task->open.session;
    struct known *known = session->known;
    const struct kv_open *open = &task->request->open;
    bool exists = session->open || known->committed;
    const char *mismatch = exists ? open_mismatch(known, open) : NULL;
    if (exists && open->mode == KV_OPEN_CREATE)
        task_fail(engine, task, KV_EXISTS, "name", "a session of this name exists");
    else if (!exists && open->mode == KV_OPEN_EXISTING)
        task_fail(engine, task, KV_NOT_FOUND, "name", "no session has this name");
    else if (mismatch)
        task_fail(engine, task, KV_MISMATCH, mismatch, "the session of this name has another");
    else if (session->open) {
        session->used_us = engine->now_us;
        open_answer(engine, task);
    } else if (engine->sessions_open >= engine->options.sessions_open_max) {
        task_fail(engine, task, KV_BUSY, "", "as many sessions are open as may be");
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
        task_fail(engine, task, KV_INVALID, "name",
                  "1 .. 200 bytes of UTF-8 without control characters");
        return;
    }
    if (!engine_layout(engine, &open->fingerprint)) {
        task_fail(engine, task, KV_NOT_FOUND, "fingerprint", "no such layout is registered");
        return;
    }
    if (open->token_count > engine->options.session_tokens_max) {
        task_fail(engine, task, KV_INVALID, "token_ids", "more than the longest session");
        return;
    }
    struct known *known = names_find(&engine->names, open->name);
    if (!known) known = names_insert(&engine->names, open->name);
    if (!known) {
        task_fail(engine, task, KV_BUSY, "name", "as many sessions are known as may be");
        return;
    }
    struct session *session = session_bind(engine, known, true);
    if (!session) {
        if (!known->committed) names_remove(&engine->names, known);
        task_fail(engine, task, KV_BUSY, "", "as many sessions are open as may be");
        return;
    }
    task->open.session = session;
    task_take_turn(task, session);
    task_enqueue(engine, task, open_begin);
}
