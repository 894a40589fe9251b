/* SPDX-License-Identifier: Apache-2.0 */
/* engine_layouts.c - REGISTER, LAYOUTS: the shapes this service holds.
 *
 * A layout is kept as a record of its own, so that blocks and sessions mean something after a
 * restart before any client has come back.  It is never forgotten: there are few.
 *
 * Record, one part of LAYOUT_RECORD_BYTES: "KIVILAYO", version u32 = 1, length of model u32, struct
 * kv_layout (44 bytes, little endian), model, zeros.
 */
#include "service/engine_private.h"

#include <stdio.h>

struct layout_record {
    char magic[8];
    uint32_t version;
    uint32_t model_bytes;
    struct kv_layout layout;
    char model[LAYOUT_RECORD_BYTES - 60];
};
static_assert(sizeof(struct layout_record) == LAYOUT_RECORD_BYTES, "written as it stands");
static_assert(LAYOUT_RECORD_BYTES - 60 > KV_MODEL_MAX, "a model fits with its end");

struct layout_entry *engine_layout(struct kv_engine *engine,
                                   const struct kv_digest *fingerprint) {
    for (uint32_t i = 0; i < engine->layout_count; i++)
        if (kv_digest_equal(&engine->layouts[i].info.fingerprint, fingerprint))
            return &engine->layouts[i];
    return NULL;
}

struct layout_entry *layout_add(struct kv_engine *engine, const struct kv_layout *layout,
                                const char *model) {
    if (engine->layout_count == engine->options.layouts_max) return NULL;
    struct layout_entry *entry = &engine->layouts[engine->layout_count++];
    size_t row = (size_t)layout->head_dim * kv_dtype_bytes(layout->dtype);
    memset(entry, 0, sizeof *entry);
    entry->shape = kv_layout_shape(layout);
    entry->shape_raw = kv_shape_raw(&entry->shape);
    entry->packed_bytes = (uint32_t)kv_page_bytes(&entry->shape);
    entry->raw_bytes = (uint32_t)kv_shape_bytes_raw(&entry->shape);
    entry->row_bytes = layout->heads * row;
    entry->query_bytes = layout->heads_q * row;
    entry->energy_count = (size_t)layout->heads * layout->head_dim;

    entry->info.layout = *layout;
    entry->info.fingerprint = kv_layout_fingerprint(layout, model);
    snprintf(entry->info.model, sizeof entry->info.model, "%s", model);
    entry->info.page_bytes_packed = entry->packed_bytes;
    entry->info.page_bytes_raw = entry->raw_bytes;
    entry->info.bits_per_element = kv_shape_bits(&entry->shape);
    memcpy(&entry->tag, entry->info.fingerprint.bytes, sizeof entry->tag);
    return entry;
}

bool layout_record_decode(const uint8_t *bytes, struct kv_layout *layout,
                          char model[KV_MODEL_MAX + 1]) {
    const struct layout_record *record = (const struct layout_record *)bytes;
    char field[48], message[200];
    if (memcmp(record->magic, "KIVILAYO", 8) != 0 || record->version != 1 ||
        record->model_bytes > KV_MODEL_MAX)
        return false;
    *layout = record->layout;
    memcpy(model, record->model, record->model_bytes);
    model[record->model_bytes] = 0;
    return strlen(model) == record->model_bytes &&
           kv_layout_check(layout, model, field, message) == KV_OK;
}

static void record_fill(const struct layout_entry *entry, uint8_t *out) {
    struct layout_record record = {.magic = {'K', 'I', 'V', 'I', 'L', 'A', 'Y', 'O'}, .version = 1};
    record.model_bytes = (uint32_t)strlen(entry->info.model);
    record.layout = entry->info.layout;
    memcpy(record.model, entry->info.model, record.model_bytes);
    memcpy(out, &record, sizeof record);
}

/* ---- REGISTER ------------------------------------------------------------------------------- */

/* Whether the store could ever hold a block of this shape: it says KV_INVALID if not. */
static enum kv_status probe(struct kv_engine *engine, const struct kv_layout *layout) {
    struct kv_shape shape = kv_layout_shape(layout);
    struct kv_digest key = kv_digest_session("");
    const size_t page_bytes[2] = {kv_page_bytes(&shape), kv_shape_bytes_raw(&shape)};
    for (int i = 0; i < (layout->sink_blocks ? 2 : 1); i++) {
        struct kv_block_extent extent = {
            .part_count = layout->layers, .part_bytes = (uint32_t)page_bytes[i]};
        struct kv_slot slot;
        enum kv_status status =
            kv_store_reserve(engine->options.store, &key, KV_CLASS_BLOCK, &extent, &slot);
        if (status == KV_OK) kv_store_abandon(engine->options.store, &slot);
        if (status == KV_INVALID) return status;
    }
    return KV_OK;
}

static bool register_check(struct kv_engine *engine, struct kv_request *request) {
    const struct kv_layout *layout = &request->reg.layout;
    enum kv_status status =
        kv_layout_check(layout, request->reg.model, request->field, request->message);
    if (status != KV_OK) {
        request->status = status;
        return false;
    }
    uint64_t page_bytes = 2ull * KV_BLOCK_TOKENS * layout->heads * layout->head_dim *
                          kv_dtype_bytes(layout->dtype);
    if (page_bytes > engine->options.message_bytes_max) {
        request_fail(request, KV_INVALID, "layout.kv_heads",
                     "%u heads make a page %llu bytes, more than a message may hold (%u)",
                     layout->heads, (unsigned long long)page_bytes,
                     engine->options.message_bytes_max);
        return false;
    }
    if (probe(engine, layout) == KV_OK) return true;
    request_fail(request, KV_INVALID, "layout.layers",
                 "a block of %u layers is larger than this store can ever hold", layout->layers);
    return false;
}

static enum kv_status record_write(struct kv_engine *engine, const struct layout_entry *entry) {
    const struct kv_block_extent extent = {
        .tag = TAG_LAYOUT, .part_count = 1, .part_bytes = LAYOUT_RECORD_BYTES};
    struct kv_digest key = kv_digest_layout_record(&entry->info.fingerprint);
    struct kv_slot slot;
    enum kv_status status =
        kv_store_reserve(engine->options.store, &key, KV_CLASS_KEEP, &extent, &slot);
    if (status != KV_OK) return status;
    record_fill(entry, slot.address);
    kv_store_commit(engine->options.store, &slot, false);
    return KV_OK;
}

static void register_try(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    if (!request || task->stopped != KV_OK) {
        if (request) request_fail(request, task->stopped, "", "stopped before it was done");
        task_finish(engine, task);
        return;
    }
    struct kv_digest fingerprint =
        kv_layout_fingerprint(&request->reg.layout, request->reg.model);
    struct layout_entry *entry = engine_layout(engine, &fingerprint);
    request->reg.created = entry == NULL;
    if (!entry) {
        entry = layout_add(engine, &request->reg.layout, request->reg.model);
        if (!entry) {
            request_fail(request, KV_BUSY, "layout", "all %u layouts are in use",
                         engine->options.layouts_max);
            task_finish(engine, task);
            return;
        }
        if (record_write(engine, entry) != KV_OK) {
            engine->layout_count--;
            if (task_wait_memory(engine, task, register_try)) return;
            request_fail(request, KV_BUSY, "", "no room for the layout's record");
            task_finish(engine, task);
            return;
        }
    }
    request->reg.info = entry->info;
    task_finish(engine, task);
}

void register_start(struct kv_engine *engine, struct task *task) {
    if (register_check(engine, task->request)) task_run(engine, task, register_try);
    else task_finish(engine, task);
}

/* ---- LAYOUTS --------------------------------------------------------------------------------- */

void layouts_start(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    struct kv_layouts *layouts = &request->layouts;
    struct kv_layout_info *out = (struct kv_layout_info *)request->staging;
    size_t fit = request->staging ? request->staging_bytes / sizeof *out : 0;
    uint32_t first = layouts->first;
    layouts->count = 0;
    while (first + layouts->count < engine->layout_count && layouts->count < fit) {
        out[layouts->count] = engine->layouts[first + layouts->count].info;
        layouts->count++;
    }
    layouts->more = first + layouts->count < engine->layout_count;
    request->reply_offset = 0;
    request->reply_bytes = layouts->count * sizeof *out;
    task_finish(engine, task);
}
