/* SPDX-License-Identifier: Apache-2.0 */
/* engine_close.c - how a session is left: COMMIT, CLOSE, DELETE, and the idle limit. */
#include "service/engine_private.h"

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
    if (request && task_was_stopped(engine, task)) return;
    bool gone = request ? engine_session(engine, request->commit.session) != session
                        : !session->open;
    if (gone) {
        task_fail(engine, task, KV_NOT_FOUND, "session", "no such session is open");
        return;
    }
    if (task->commit.commit) commit_begin(engine, task);
    else close_end(engine, task);
}

void close_start(struct kv_engine *engine, struct task *task) {
    struct kv_commit *commit = &task->request->commit;
    struct session *session = engine_session(engine, commit->session);
    if (!session) {
        task_fail(engine, task, KV_NOT_FOUND, "session", "no such session is open");
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
        task_fail(engine, task, task->store_status, "name",
                  "it is forgotten, but that could not be made durable");
    else task_finish(engine, task);
}

static void delete_begin(struct kv_engine *engine, struct task *task) {
    if (task_was_stopped(engine, task)) return;
    struct session *session = task->open.session;
    struct known *known = session->known;
    if (!session->open && !known->committed) {
        task_fail(engine, task, KV_NOT_FOUND, "name", "no session has this name");
        return;
    }
    struct kv_digest key = kv_digest_session(known->name);
    if (known->committed && kv_store_drop(engine->options.store, &key) == KV_BUSY) {
        if (!task_wait_memory(engine, task, delete_begin))
            task_fail(engine, task, KV_BUSY, "name", "its snapshot is in use");
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

void delete_start(struct kv_engine *engine, struct task *task) {
    session_named(engine, task, delete_begin);
}
