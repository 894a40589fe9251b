/* SPDX-License-Identifier: Apache-2.0 */
/* engine_attend_check.c - ATTEND: what the message says, and whether that can be.
 *
 * The frame is checked as a whole before anything waits; an item, against its session, when its turn has
 * come.  A frame that is wrong is refused; an item that is wrong only fails itself.
 */
#include "service/engine_attend.h"

#include <stdarg.h>
#include <stdio.h>

/* ---- Items ------------------------------------------------------------------------------- */

void item_fail(struct kv_attend_item *item, enum kv_status status, const char *field,
               const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(item->message, sizeof item->message, format, values);
    va_end(values);
    snprintf(item->field, sizeof item->field, "%s", field);
    item->status = status;
}

void part_fail(struct task *task, struct part *part, enum kv_status status, const char *field,
               const char *message) {
    part->status = status;
    if (task->request)
        item_fail(&task->request->attend.items[part->item], status, field, "%s", message);
}

/* ---- What the message says -------------------------------------------------------------------- */

static size_t item_query_bytes(const struct layout_entry *layout,
                               const struct kv_attend_item *item) {
    return item->rows * layout->query_bytes;
}

static size_t item_reply_bytes(const struct layout_entry *layout,
                               const struct kv_attend_item *item) {
    const struct kv_layout *l = &layout->info.layout;
    return (size_t)item->rows * l->heads_q * (l->head_dim + 1) * sizeof(float);
}

/* Where the question ends in staging: data, and the arrays the rpc layer put behind it. */
static size_t question_end(const struct kv_request *request) {
    size_t end = request->bytes_in;
    for (uint32_t i = 0; i < request->attend.item_count; i++) {
        const struct kv_attend_item *item = &request->attend.items[i];
        size_t visible = item->has_visible ? item->visible_offset + item->rows * 4ull : 0;
        size_t ids = item->has_token_ids ? item->token_ids_offset + item->append_tokens * 4ull : 0;
        if (visible > end) end = visible;
        if (ids > end) end = ids;
    }
    return (end + 63) / 64 * 64;
}

/* Rules about the whole frame.  False: it was refused. */
static bool frame_check(struct kv_request *request, const struct layout_entry *layout) {
    struct kv_attend_request *attend = &request->attend;
    uint64_t bytes = 0, reply = 0; /* 64 items of less than 2^51 bytes each */
    if (attend->layer >= layout->info.layout.layers) {
        request_fail(request, KV_INVALID, "layer", "%u is not below %u", attend->layer,
                     layout->info.layout.layers);
        return false;
    }
    for (uint32_t i = 0; i < attend->item_count; i++) {
        struct kv_attend_item *item = &attend->items[i];
        if (item->rows > KV_ROWS_MAX) {
            request_fail(request, KV_INVALID, "items.rows", "%u of item %u is above %d",
                         item->rows, i, KV_ROWS_MAX);
            return false;
        }
        item->data_offset = bytes;
        bytes += item_query_bytes(layout, item) +
                 2ull * item->append_tokens * layout->row_bytes;
        reply += item_reply_bytes(layout, item);
    }
    if (bytes != request->bytes_in) {
        request_fail(request, KV_INVALID, "data",
                     "%zu bytes, but the rows and tokens of the items are %llu",
                     request->bytes_in, (unsigned long long)bytes);
        return false;
    }
    request->reply_offset = question_end(request);
    if (request->reply_offset + reply > request->staging_bytes) {
        request_fail(request, KV_INVALID, "items.rows",
                     "the answer would be %llu bytes, more than a message may be",
                     (unsigned long long)reply);
        return false;
    }
    return true;
}

/* Rules about one item, against its session as it is now. */
static bool item_check(struct kv_engine *engine, struct kv_attend_item *item,
                       const struct part *part) {
    const char *field = "";
    char message[160];
    if (part->tokens) {
        enum kv_status status =
            stage_check(engine, part, item->expected_length, &field, message);
        if (status != KV_OK) {
            item_fail(item, status, field, "%s", message);
            return false;
        }
    }
    for (uint32_t row = 0; part->visible_given && row < part->rows; row++) {
        if (part->visible_given[row] <= length_after(part)) continue;
        item_fail(item, KV_INVALID, "items.visible", "%u of row %u is beyond %u tokens",
                  part->visible_given[row], row, length_after(part));
        return false;
    }
    return true;
}

/* An earlier item of the frame is about the same session. */
static bool repeated(const struct kv_attend_request *attend, uint32_t item) {
    for (uint32_t i = 0; i < item; i++)
        if (attend->items[i].session == attend->items[item].session) return true;
    return false;
}

static void part_begin(struct kv_engine *engine, struct task *task, uint32_t index,
                       uint8_t *reply) {
    struct kv_request *request = task->request;
    struct kv_attend_item *item = &request->attend.items[index];
    struct part *part = &task->lane->parts[index];
    *part = (struct part){.item = index, .status = item->status};
    if (item->status != KV_OK) return;
    part->session = engine_session(engine, item->session);
    if (!part->session) {
        part_fail(task, part, KV_NOT_FOUND, "session", "no such session is open");
        return;
    }
    const struct layout_entry *layout = part->session->layout;
    const uint8_t *data = request->staging + item->data_offset;
    part->layer = request->attend.layer;
    part->layer_count = 1;
    part->tokens = item->append_tokens;
    part->query = data;
    part->data = data + item_query_bytes(layout, item);
    part->rows = item->rows;
    part->mask = item->mask;
    if (item->has_visible)
        part->visible_given = (const uint32_t *)(request->staging + item->visible_offset);
    part->observed = part->rows && !item->no_energy && !repeated(&request->attend, index);
    part->reply = reply;
    part->reply_bytes = item_reply_bytes(layout, item);
    if (!item_check(engine, item, part)) {
        part->status = item->status;
        return;
    }
    for (uint32_t row = 0; row < part->rows; row++)
        if (row_sees(part, row) > part->seen) part->seen = row_sees(part, row);
}

static void attend_begin(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    uint8_t *reply = request->staging + request->reply_offset;
    bool any = false;
    for (uint32_t i = 0; i < request->attend.item_count; i++) {
        part_begin(engine, task, i, reply);
        task->lane->part_count++;
        if (!part_lives(&task->lane->parts[i])) continue;
        reply += task->lane->parts[i].reply_bytes;
        any = true;
    }
    if (any) attend_reserve(engine, task);
    else attend_finish(engine, task);
}

/* ---- The beginning ------------------------------------------------------------------------------------ */

/* Finds the sessions and takes their turns; the layout is what the items agree on. */
static struct layout_entry *sessions_find(struct kv_engine *engine, struct task *task) {
    struct kv_attend_request *attend = &task->request->attend;
    struct layout_entry *layout = NULL;
    for (uint32_t i = 0; i < attend->item_count; i++) {
        struct kv_attend_item *item = &attend->items[i];
        struct session *session = engine_session(engine, item->session);
        item->status = KV_OK;
        if (!session) {
            item_fail(item, KV_NOT_FOUND, "session", "no such session is open");
            continue;
        }
        if (layout && session->layout != layout) {
            request_fail(task->request, KV_INVALID, "items",
                         "item %u is of another layout than those before it", i);
            return NULL;
        }
        layout = session->layout;
    }
    return layout;
}

static bool repeats_valid(struct kv_request *request) {
    struct kv_attend_request *attend = &request->attend;
    bool appends = false;
    for (uint32_t i = 0; i < attend->item_count; i++) appends |= attend->items[i].append_tokens > 0;
    for (uint32_t i = 0; appends && i < attend->item_count; i++) {
        if (!repeated(attend, i)) continue;
        request_fail(request, KV_INVALID, "items",
                     "item %u names a session again, in a frame that appends", i);
        return false;
    }
    return true;
}

void attend_start(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    struct kv_attend_request *attend = &request->attend;
    if (attend->item_count < 1 || attend->item_count > KV_ATTEND_ITEMS_MAX) {
        request_fail(request, KV_INVALID, "items", "%u are not 1 .. %d", attend->item_count,
                     KV_ATTEND_ITEMS_MAX);
        task_finish(engine, task);
        return;
    }
    struct layout_entry *layout = sessions_find(engine, task);
    bool good = request->status == KV_OK;
    if (good && layout) good = frame_check(request, layout) && repeats_valid(request);
    if (!good || !layout) {
        task_finish(engine, task); /* refused, or no item has a session */
        return;
    }
    for (uint32_t i = 0; i < attend->item_count; i++)
        if (attend->items[i].status == KV_OK && !repeated(attend, i))
            task_take_turn(task, engine_session(engine, attend->items[i].session));
    task->attend.layout = layout;
    task_enqueue(engine, task, attend_begin);
}
