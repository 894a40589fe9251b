/* SPDX-License-Identifier: Apache-2.0 */
/* engine_get.c - FETCH and GET: one page back to rows.
 *
 *      packed page --dequantize--> raw page --emit--> rows of the wire's dtype
 *
 * FETCH takes the page from wherever a session has it, GET from the cache by digest.  Both are
 * called layer by layer over many blocks, so of a cold block only this layer's part is read: whole
 * blocks would push each other out of the arena before their next layer's turn.
 *
 * Where the gpu tier has a copy of the block, that is what is read; it is neither looked for on disk nor
 * brought there.  The raw page in between lies in the gpu tier, or where there is none in the request's
 * own staging buffer, which is empty otherwise.
 */
#include "service/engine_private.h"

#include <stdio.h>

static void page_finish(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    enum kv_status device = kv_device_status(engine->options.device);
    if (task->page.pinned) kv_store_unpin(engine->options.store, &task->lane->waves[0].pin);
    if (task->page.gpu_held) gpu_release(engine, task->page.gpu_held - 1);
    gpu_scratch_free(engine, task->page.scratch);
    if (request && task->stopped != KV_OK)
        request_fail(request, task->stopped, "", "stopped before it was done");
    else if (request && device != KV_OK)
        request_fail(request, device, "", "the compute device has failed");
    task_finish(engine, task);
}

static void page_fail(struct kv_engine *engine, struct task *task, enum kv_status status,
                      const char *field, const char *message) {
    request_fail(task->request, status, field, "%s", message);
    page_finish(engine, task);
}

/* Rows [token, token + tokens) of a page to the reply, as `dtype`: the layout's, or F32.  A packed
 * page on its way to F32 goes through f16 whatever the layout: bf16 would round it to 8 bits. */
static void page_emit(struct kv_engine *engine, struct task *task, const void *page, bool raw,
                      const struct layout_entry *layout, uint32_t token, uint32_t tokens,
                      enum kv_dtype dtype) {
    struct kv_request *request = task->request;
    struct kv_stream *stream = task->lane->stream;
    struct kv_shape shape = layout->shape;
    size_t half = tokens * (size_t)shape.heads * shape.head_dim * kv_dtype_bytes(dtype);
    request->reply_offset = (layout->raw_bytes + 63) / 64 * 64;
    request->reply_bytes = 2 * half;
    KV_CHECK(request->reply_offset + request->reply_bytes <= request->staging_bytes);
    if (!raw) {
        task->page.scratch = gpu_scratch(engine, layout->raw_bytes);
        void *unpacked = task->page.scratch ? task->page.scratch : request->staging;
        const struct kv_dequantize item = {
            .packed = page,
            .raw = unpacked,
            .dtype = dtype == KV_DTYPE_F32 && shape.codec.kind != KV_CODEC_RAW
                         ? KV_DTYPE_F16
                         : (enum kv_dtype)shape.dtype,
        };
        kv_kernel_dequantize(stream, &shape, 1, &item);
        page = unpacked;
        shape.dtype = (uint8_t)item.dtype;
    }
    uint8_t *reply = request->staging + request->reply_offset;
    const struct kv_emit item = {
        .page = page,
        .token = token,
        .tokens = tokens,
        .dtype = dtype,
        .keys = reply,
        .values = reply + half,
    };
    kv_kernel_emit(stream, &shape, 1, &item);
    task_wait_ticket(engine, task, page_finish);
}

/* A layer's page of the block, if the gpu tier has it. */
static const uint8_t *page_on_gpu(struct kv_engine *engine, struct task *task,
                                  const struct kv_digest *key, uint32_t layer,
                                  uint32_t page_bytes) {
    uint32_t block = gpu_hold(engine, task->lane->stream, key);
    if (block == KV_GPU_NONE) return NULL;
    task->page.gpu_held = 1 + block;
    engine->stats.pages_from_gpu++;
    return kv_gpu_block_address(engine->gpu, block) + (size_t)layer * page_bytes;
}

/* The pin has answered: true if the page is there. */
static bool page_pinned(struct kv_engine *engine, struct task *task, step_fn *again,
                        const char *field) {
    struct wave *wave = &task->lane->waves[0];
    task->page.pinned = wave->status == KV_OK;
    if (!task->request || task->stopped != KV_OK) {
        page_finish(engine, task);
        return false;
    }
    if (wave->status == KV_OK) {
        engine->stats.pages_from_nvme += wave->pin.from_disk;
        engine->stats.pages_from_host += 1 - wave->pin.from_disk;
        return true;
    }
    if (wave->status == KV_BUSY && task_wait_memory(engine, task, again)) return false;
    const char *why = wave->status == KV_NOT_FOUND  ? "the block is not in the cache"
                      : wave->status == KV_CORRUPT  ? "the block failed its checksum and is gone"
                      : wave->status == KV_MISMATCH ? "the block is of another layout"
                      : wave->status == KV_BUSY     ? "the block finds no room in memory"
                                                    : "the block could not be read";
    page_fail(engine, task, wave->status, field, why);
    return false;
}

/* ---- FETCH ----------------------------------------------------------------------------------- */

static void fetch_begin(struct kv_engine *engine, struct task *task);

static enum kv_dtype fetch_dtype(const struct kv_fetch *fetch, const struct kv_layout *layout) {
    return fetch->dtype ? fetch->dtype : (enum kv_dtype)layout->dtype;
}

static void fetch_read(struct kv_engine *engine, struct task *task) {
    if (!page_pinned(engine, task, fetch_begin, "session")) return;
    const struct kv_fetch *fetch = &task->request->fetch;
    const struct layout_entry *layout = task->page.session->layout;
    uint32_t block = (uint32_t)(fetch->begin / KV_BLOCK_TOKENS);
    page_emit(engine, task, task->lane->waves[0].addresses[0], session_block_raw(layout, block),
              layout, (uint32_t)(fetch->begin % KV_BLOCK_TOKENS), fetch->tokens,
              fetch_dtype(fetch, &layout->info.layout));
}

static void fetch_page(struct kv_engine *engine, struct task *task) {
    const struct kv_fetch *fetch = &task->request->fetch;
    const struct session *session = task->page.session;
    uint32_t block = (uint32_t)(fetch->begin / KV_BLOCK_TOKENS);
    const struct live_block *live =
        block < session->block_count ? NULL : session_live(session, block);
    struct page_source source =
        session_source(session, fetch->layer, block, live, session->length[fetch->layer]);
    const void *page = source.memory;
    if (source.key)
        page = page_on_gpu(engine, task, source.key, fetch->layer,
                           session_page_bytes(session->layout, block));
    else engine->stats.pages_from_host++;
    if (!page) {
        pin_one(engine, task, source.key, session->layout->tag, (int32_t)fetch->layer);
        task_wait_store(task, fetch_read);
        return;
    }
    page_emit(engine, task, page, source.raw, session->layout,
              (uint32_t)(fetch->begin % KV_BLOCK_TOKENS), fetch->tokens,
              fetch_dtype(fetch, &session->layout->info.layout));
}

static void fetch_begin(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    if (!request || task->stopped != KV_OK) {
        page_finish(engine, task);
        return;
    }
    struct kv_fetch *fetch = &request->fetch;
    struct session *session = engine_session(engine, fetch->session);
    task->page.session = session;
    if (!session) {
        page_fail(engine, task, KV_NOT_FOUND, "session", "no such session is open");
        return;
    }
    const struct kv_layout *l = &session->layout->info.layout;
    fetch->length = fetch->layer < l->layers ? session->length[fetch->layer]
                                             : session_length(session);
    fetch->layers = l->layers;
    session->used_us = engine->now_us;
    uint64_t end = fetch->begin + fetch->tokens;
    if (fetch->tokens == 0)
        page_finish(engine, task); /* only asked how long it is */
    else if (fetch->layer >= l->layers)
        page_fail(engine, task, KV_INVALID, "layers", "beyond the layout's layers");
    else if (end < fetch->begin || end > session->length[fetch->layer])
        page_fail(engine, task, KV_INVALID, "end", "beyond the session's tokens");
    else if (fetch->begin / KV_BLOCK_TOKENS != (end - 1) / KV_BLOCK_TOKENS)
        page_fail(engine, task, KV_INVALID, "begin", "the range crosses a multiple of 128");
    else if (fetch_dtype(fetch, l) != l->dtype && fetch->dtype != KV_DTYPE_F32)
        page_fail(engine, task, KV_INVALID, "dtype", "neither the layout's nor F32");
    else fetch_page(engine, task);
}

void fetch_start(struct kv_engine *engine, struct task *task) {
    struct session *session = engine_session(engine, task->request->fetch.session);
    if (!session) {
        page_fail(engine, task, KV_NOT_FOUND, "session", "no such session is open");
        return;
    }
    task_take_turn(task, session);
    task_enqueue(engine, task, fetch_begin);
}

/* ---- GET ------------------------------------------------------------------------------------------ */

static void get_begin(struct kv_engine *engine, struct task *task);

/* Whether a block of this size holds raw pages of the layout; false if neither form fits. */
static bool form_of(const struct layout_entry *layout, const struct kv_block_extent *extent,
                    bool *raw) {
    *raw = extent->part_bytes == layout->raw_bytes;
    return extent->tag == layout->tag &&
           extent->part_count == layout->info.layout.layers &&
           (*raw || extent->part_bytes == layout->packed_bytes);
}

static void get_reply(struct kv_engine *engine, struct task *task, const uint8_t *page, bool raw) {
    struct kv_request *request = task->request;
    struct kv_get *get = &request->get;
    const struct layout_entry *layout = engine_layout(engine, &get->fingerprint);
    if (get->form == KV_FORM_FULL || raw) {
        get->form = KV_FORM_FULL;
        page_emit(engine, task, page, raw, layout, 0, KV_BLOCK_TOKENS, layout->info.layout.dtype);
        return;
    }
    request->reply_offset = 0;
    request->reply_bytes = layout->packed_bytes;
    kv_stream_copy(task->lane->stream, request->staging, page, layout->packed_bytes);
    task_wait_ticket(engine, task, page_finish);
}

static void get_read(struct kv_engine *engine, struct task *task) {
    if (!page_pinned(engine, task, get_begin, "digests")) return;
    const struct kv_get *get = &task->request->get;
    struct kv_block_info info;
    bool raw = false;
    KV_CHECK(kv_store_find(engine->options.store, &get->digest, &info)); /* it is pinned */
    form_of(engine_layout(engine, &get->fingerprint), &info.extent, &raw);
    get_reply(engine, task, task->lane->waves[0].addresses[0], raw);
}

static void get_begin(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    if (!request || task->stopped != KV_OK) {
        page_finish(engine, task);
        return;
    }
    const struct kv_get *get = &request->get;
    const struct layout_entry *layout = engine_layout(engine, &get->fingerprint);
    struct kv_block_info info;
    bool raw;
    if (!kv_store_find(engine->options.store, &get->digest, &info)) {
        page_fail(engine, task, KV_NOT_FOUND, "digests", "the block is not in the cache");
    } else if (!form_of(layout, &info.extent, &raw)) {
        page_fail(engine, task, KV_MISMATCH, "digests", "the block is of another layout");
    } else {
        const uint8_t *page =
            page_on_gpu(engine, task, &get->digest, get->layer, info.extent.part_bytes);
        if (page) {
            get_reply(engine, task, page, raw);
            return;
        }
        pin_one(engine, task, &get->digest, layout->tag, (int32_t)get->layer);
        task_wait_store(task, get_read);
    }
}

void get_start(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    const struct kv_get *get = &request->get;
    const struct layout_entry *layout = engine_layout(engine, &get->fingerprint);
    if (!layout)
        page_fail(engine, task, KV_NOT_FOUND, "fingerprint", "no such layout is registered");
    else if (get->layer >= layout->info.layout.layers)
        page_fail(engine, task, KV_INVALID, "layers", "beyond the layout's layers");
    else if (get->form != KV_FORM_FULL && get->form != KV_FORM_PACKED)
        page_fail(engine, task, KV_INVALID, "form", "neither FULL nor PACKED");
    else task_enqueue(engine, task, get_begin);
}
