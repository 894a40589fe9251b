/* SPDX-License-Identifier: Apache-2.0 */
/* engine_attend.c - ATTEND: query rows of up to 64 sessions, one layer, perhaps after an append.
 *
 *   begin     what each item says, against its session
 *   reserve   pages for the rows to append
 *   ingest    rows into pages, query energy;  no full block?  straight on to the waves
 *   seal      (after a look for NaN) full blocks packed
 *   waves     pages pinned, attended, unpinned, some at a time
 *   finish    publish what was appended, put the answers side by side
 *
 * The order is what makes an answer checkable: out is attention over exactly what Fetch returns
 * right after it.  Nothing is published before the last page was attended, so an item that fails
 * half-way has changed nothing.
 */
#include "service/engine_attend.h"

/* ---- The append half -------------------------------------------------------------------------- */

static void rollback_part(struct kv_engine *engine, struct part *part) {
    if (part->staged) stage_rollback(engine, part);
    part->staged = false;
}

static void check_fault(struct task *task, struct part *part) {
    char message[160];
    if (!part_lives(part) || part->fault_count == 0) return;
    enum kv_status status = stage_fault(task->lane, part, message);
    if (status != KV_OK) part_fail(task, part, status, "data", message);
}

static void attend_seal(struct kv_engine *engine, struct task *task) {
    struct lane *lane = task->lane;
    if (task->stopped != KV_OK) {
        attend_finish(engine, task);
        return;
    }
    for (uint32_t i = 0; i < lane->part_count; i++) {
        struct part *part = &lane->parts[i];
        check_fault(task, part);
        if (part_lives(part)) stage_seal(engine, lane, part);
        else rollback_part(engine, part);
    }
    waves_begin(engine, task);
}

/* Query energy is learnt in a copy, so that a request that fails has taught nothing. */
static void stage_observe(struct kv_engine *engine, struct task *task) {
    struct lane *lane = task->lane;
    const struct layout_entry *layout = layout_of(task);
    uint32_t count = 0;
    for (uint32_t i = 0; i < lane->part_count; i++) {
        struct part *part = &lane->parts[i];
        if (!part_lives(part) || !part->observed) continue;
        struct session *session = part->session;
        memcpy(session->energy_staged, session->energy + part->layer * layout->energy_count,
               layout->energy_count * sizeof(float));
        *session->rows_staged = session->rows_seen[part->layer];
        engine->observes[count++] = (struct kv_observe){
            .query = part->query,
            .dtype = layout->info.layout.dtype,
            .heads_q = layout->info.layout.heads_q,
            .rows = part->rows,
            .energy = session->energy_staged,
            .rows_seen = session->rows_staged,
        };
    }
    if (count) kv_kernel_observe(lane->stream, &layout->shape, count, engine->observes);
}

static void attend_ingest(struct kv_engine *engine, struct task *task) {
    struct lane *lane = task->lane;
    bool due = false;
    stage_observe(engine, task);
    for (uint32_t i = 0; i < lane->part_count; i++) {
        struct part *part = &lane->parts[i];
        if (!part_lives(part)) continue;
        if (part->tokens) stage_ingest(engine, lane, part);
        due |= part->tokens && stage_due(part);
    }
    /* A block that is due may hold a row of this very message: look for NaN before packing it. */
    if (due) task_wait_ticket(engine, task, attend_seal);
    else waves_begin(engine, task);
}

void attend_reserve(struct kv_engine *engine, struct task *task) {
    struct lane *lane = task->lane;
    if (task->stopped != KV_OK) {
        attend_finish(engine, task);
        return;
    }
    for (uint32_t i = 0; i < lane->part_count; i++) {
        struct part *part = &lane->parts[i];
        if (!part_lives(part) || part->tokens == 0 || part->staged) continue;
        const struct kv_attend_item *item = &task->request->attend.items[part->item];
        const uint32_t *ids =
            item->has_token_ids
                ? (const uint32_t *)(task->request->staging + item->token_ids_offset)
                : NULL;
        const char *message = "no room for exact tokens";
        enum kv_status status = stage_reserve(engine, part, ids, &message);
        if (status == KV_BUSY && task_wait_memory(engine, task, attend_reserve)) return;
        if (status == KV_OK) part->staged = true;
        else if (status == KV_INVALID) part_fail(task, part, status, "token_ids", message);
        else part_fail(task, part, KV_BUSY, "", message);
    }
    attend_ingest(engine, task);
}

/* ---- The end ---------------------------------------------------------------------------------------- */

static bool attend_undone(struct kv_engine *engine, struct task *task) {
    enum kv_status device = kv_device_status(engine->options.device);
    if (task->stopped == KV_OK && device == KV_OK) return false;
    for (uint32_t i = 0; i < task->lane->part_count; i++)
        rollback_part(engine, &task->lane->parts[i]);
    if (task->request && task->stopped == KV_OK)
        request_fail(task->request, device, "", "the compute device has failed");
    else if (task->request)
        request_fail(task->request, task->stopped, "", "stopped before it was done");
    return true;
}

static void part_end(struct kv_engine *engine, struct task *task, struct part *part,
                     size_t *bytes) {
    struct kv_request *request = task->request;
    struct kv_attend_item *item = &request->attend.items[part->item];
    check_fault(task, part);
    if (part_lives(part)) {
        stage_publish(engine, part);
        uint8_t *target = request->staging + request->reply_offset + *bytes;
        if (target != part->reply) memmove(target, part->reply, part->reply_bytes);
        *bytes += part->reply_bytes;
        engine->stats.rows_attended += part->rows;
    } else {
        rollback_part(engine, part);
    }
    if (part->session) item->length = part->session->length[part->layer];
}

void attend_finish(struct kv_engine *engine, struct task *task) {
    struct lane *lane = task->lane;
    waves_release(engine, task);
    if (!attend_undone(engine, task)) {
        size_t bytes = 0;
        for (uint32_t i = 0; i < lane->part_count; i++)
            part_end(engine, task, &lane->parts[i], &bytes);
        task->request->reply_bytes = bytes;
    }
    task_finish(engine, task);
}
