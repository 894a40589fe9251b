/* SPDX-License-Identifier: Apache-2.0 */
/* engine_list.c - what sessions there are: DESCRIBE, LIST. */
#include "service/engine_private.h"

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
    if (task_was_stopped(engine, task)) return;
    struct session *session = task->open.session;
    struct known *known = session->known;
    struct kv_request *request = task->request;
    if (!session->open && !known->committed) {
        task_fail(engine, task, KV_NOT_FOUND, "name", "no session has this name");
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
    session_named(engine, task, describe_begin);
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
