/* SPDX-License-Identifier: Apache-2.0 */
/* engine_append.c - APPEND: K and V of new tokens, for one layer or all.
 *
 *   start --> begin: check, reserve, ingest --> ingested: no NaN? seal --> sealed: publish, answer
 */
#include "service/engine_private.h"

#include <stdio.h>

/* True and the task ended: nobody waits for it, so nothing is to happen. */
static bool append_stopped(struct kv_engine *engine, struct task *task) {
    enum kv_status device = kv_device_status(engine->options.device);
    if (task->stopped == KV_OK && device == KV_OK) return false;
    struct lane *lane = task->lane;
    if (lane->part_count) stage_rollback(engine, &lane->parts[0]);
    if (task->request && task->stopped == KV_OK)
        request_fail(task->request, device, "", "the compute device has failed");
    else if (task->request)
        request_fail(task->request, task->stopped, "", "stopped before the tokens were added");
    task_finish(engine, task);
    return true;
}

static void append_fail(struct kv_engine *engine, struct task *task, enum kv_status status,
                        const char *field, const char *message) {
    request_fail(task->request, status, field, "%s", message);
    task_finish(engine, task);
}

/* What the message says of itself, against the session's layout. */
static bool append_check(struct kv_engine *engine, struct task *task, struct part *part) {
    struct kv_request *request = task->request;
    const struct kv_append *append = &request->append;
    const struct layout_entry *layout = part->session->layout;
    const struct kv_layout *l = &layout->info.layout;
    const char *field = "", *message = NULL;
    char text[160];

    /* tokens < 2^32, a row < 2^18, layers < 2^9: no overflow. */
    uint64_t bytes = (uint64_t)append->tokens * layout->row_bytes * 2 * part->layer_count;
    if (!append->all_layers && append->layer >= l->layers) {
        field = "layer";
        snprintf(text, sizeof text, "%u is not below %u", append->layer, l->layers);
        message = text;
    } else if (append->tokens == 0) {
        field = "tokens";
        message = "0 is not at least 1";
    } else if (bytes != request->bytes_in) {
        field = "data";
        snprintf(text, sizeof text, "%zu bytes, but K and V of %u tokens in %u layers are %llu",
                 request->bytes_in, append->tokens, part->layer_count, (unsigned long long)bytes);
        message = text;
    } else if (part->energy &&
               !energy_valid(part->energy, layout->energy_count * part->layer_count)) {
        field = "query_energy";
        message = "not all in 0 .. 1e30";
    }
    if (message) {
        append_fail(engine, task, KV_INVALID, field, message);
        return false;
    }
    enum kv_status status = stage_check(engine, part, append->expected_length, &field, text);
    if (status == KV_OK) return true;
    append_fail(engine, task, status, field, text);
    return false;
}

static void append_sealed(struct kv_engine *engine, struct task *task) {
    if (append_stopped(engine, task)) return;
    struct part *part = &task->lane->parts[0];
    struct kv_append *append = &task->request->append;
    uint64_t shared = engine->stats.blocks_shared;
    stage_publish(engine, part);
    append->length = part->session->length[part->layer];
    append->session_length = session_length(part->session);
    append->sealed_tokens = (uint64_t)part->session->block_count * KV_BLOCK_TOKENS;
    append->blocks_shared = (uint32_t)(engine->stats.blocks_shared - shared);
    task_finish(engine, task);
}

static void append_ingested(struct kv_engine *engine, struct task *task) {
    if (append_stopped(engine, task)) return;
    struct part *part = &task->lane->parts[0];
    char message[160];
    enum kv_status status = stage_fault(task->lane, part, message);
    if (status != KV_OK) {
        stage_rollback(engine, part);
        append_fail(engine, task, status, "data", message);
        return;
    }
    if (!stage_due(part)) {
        append_sealed(engine, task);
        return;
    }
    stage_seal(engine, task->lane, part);
    task_wait_ticket(engine, task, append_sealed);
}

static void append_reserve(struct kv_engine *engine, struct task *task) {
    if (append_stopped(engine, task)) return;
    struct kv_request *request = task->request;
    struct part *part = &task->lane->parts[0];
    const uint32_t *ids = request->append.has_token_ids
                              ? (const uint32_t *)(request->staging +
                                                   request->append.token_ids_offset)
                              : NULL;
    const char *message = "";
    enum kv_status status = stage_reserve(engine, part, ids, &message);
    if (status == KV_INVALID) {
        append_fail(engine, task, status, "token_ids", message);
    } else if (status == KV_BUSY && task_wait_memory(engine, task, append_reserve)) {
        return;
    } else if (status != KV_OK) {
        request_fail_memory(engine, request);
        task_finish(engine, task);
    } else {
        stage_ingest(engine, task->lane, part);
        task_wait_ticket(engine, task, append_ingested);
    }
}

static void append_begin(struct kv_engine *engine, struct task *task) {
    if (append_stopped(engine, task)) return;
    struct kv_request *request = task->request;
    struct kv_append *append = &request->append;
    struct session *session = engine_session(engine, append->session);
    if (!session) {
        append_fail(engine, task, KV_NOT_FOUND, "session", "no such session is open");
        return;
    }
    bool all = append->all_layers;
    struct part *part = &task->lane->parts[0];
    *part = (struct part){
        .session = session,
        .layer = all ? 0 : append->layer,
        .layer_count = all ? session->layout->info.layout.layers : 1,
        .tokens = append->tokens,
        .data = request->staging,
        .energy = append->has_energy
                      ? (const float *)(request->staging + append->energy_offset)
                      : NULL,
    };
    if (!append_check(engine, task, part)) return;
    task->lane->part_count = 1;
    append_reserve(engine, task);
}

void append_start(struct kv_engine *engine, struct task *task) {
    struct session *session = engine_session(engine, task->request->append.session);
    if (!session) {
        append_fail(engine, task, KV_NOT_FOUND, "session", "no such session is open");
        return;
    }
    task_take_turn(task, session);
    task_enqueue(engine, task, append_begin);
}
