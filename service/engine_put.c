/* SPDX-License-Identifier: Apache-2.0 */
/* engine_put.c - PUT, PUT_END: blocks into the cache, a page at a time.
 *
 * A block that is being put stands in a table, by stream and digest:
 *
 *      (none) --first page: reserve--> FILLING --last page--> (none), in the cache
 *         |                               | a page was bad, and no other is being written
 *         |                               +--> abandoned
 *         +--first page: it is there--> THERE --its other pages, or others push it out--> (none)
 *
 * THERE exists so that a block that was not needed is answered once, however many of its pages the
 * client had sent by then.  Pages of a block may be on several lanes at once: they write different
 * parts of its memory, and `on_lanes` says when it can be given back.  Pages that land (engine_land.c)
 * are counted beside those.
 */
#include "service/engine_private.h"

#include <stdlib.h>

enum { SHORT_BYTES = 512 << 10 };

struct put_block {
    enum { PUT_FREE, PUT_FILLING, PUT_FAILED, PUT_THERE } state;
    uint64_t stream;
    uint64_t order; /* rises: which is the oldest */
    struct kv_digest digest;
    struct layout_entry *layout;
    bool raw;
    enum kv_durability durability;
    struct kv_slot slot;
    uint8_t *device;    /* its bytes in the gpu tier until it is committed; NULL: none */
    uint32_t on_lanes;  /* pages being worked on */
    uint32_t page_count; /* that are done, or came although the block was there; without landed ones */
};

enum kv_status engine_puts_open(struct kv_engine *engine) {
    /* Every stream of a busy service may have its credit of blocks open; more streams than a
     * quarter of the requests share what there is. */
    engine->put_max = KV_PUT_OPEN_MAX * 2 * (engine->options.request_count / 4);
    engine->puts = calloc(engine->put_max, sizeof engine->puts[0]);
    return engine->puts ? engine_landings_open(engine, engine->put_max) : KV_BUSY;
}

static uint32_t put_index(const struct kv_engine *engine, const struct put_block *block) {
    return (uint32_t)(block - engine->puts);
}

/* Its stream has no page on a lane of ours or of rpc's. */
static void put_free(struct kv_engine *engine, struct put_block *block) {
    bool alone = landing_end(engine, put_index(engine, block));
    KV_CHECK(alone && block->on_lanes == 0);
    if (block->state == PUT_FILLING || block->state == PUT_FAILED)
        kv_store_abandon(engine->options.store, &block->slot);
    gpu_scratch_free(engine, block->device);
    block->device = NULL;
    block->state = PUT_FREE;
}

void engine_puts_close(struct kv_engine *engine) {
    for (uint32_t i = 0; engine->puts && i < engine->put_max; i++)
        if (engine->puts[i].state != PUT_FREE) put_free(engine, &engine->puts[i]);
    free(engine->puts);
    engine_landings_close(engine);
}

static uint32_t page_bytes(const struct put_block *block) {
    return block->raw ? block->layout->raw_bytes : block->layout->packed_bytes;
}

static uint64_t block_bytes(const struct put_block *block) {
    return (uint64_t)page_bytes(block) * block->layout->info.layout.layers;
}

/* ---- The table -------------------------------------------------------------------------------- */

static struct put_block *put_find(struct kv_engine *engine, uint64_t stream,
                                  const struct kv_digest *digest) {
    for (uint32_t i = 0; i < engine->put_max; i++) {
        struct put_block *block = &engine->puts[i];
        if (block->state != PUT_FREE && block->stream == stream &&
            kv_digest_equal(&block->digest, digest))
            return block;
    }
    return NULL;
}

/* A free entry for a stream that stays inside its credit.  NULL: it does not, or all are in use. */
static struct put_block *put_entry(struct kv_engine *engine, uint64_t stream) {
    struct put_block *unused = NULL, *oldest = NULL;
    uint32_t filling = 0, there = 0;
    for (uint32_t i = 0; i < engine->put_max; i++) {
        struct put_block *block = &engine->puts[i];
        if (block->state == PUT_FREE) unused = block;
        if (block->state == PUT_FREE || block->stream != stream) continue;
        if (block->state != PUT_THERE) {
            filling++;
            continue;
        }
        there++;
        if (!oldest || block->order < oldest->order) oldest = block;
    }
    if (filling >= KV_PUT_OPEN_MAX) return NULL;
    if (there >= KV_PUT_OPEN_MAX || (!unused && oldest)) {
        oldest->state = PUT_FREE;
        unused = oldest;
    }
    return unused;
}

/* ---- One page ------------------------------------------------------------------------------------ */

static void put_begin(struct kv_engine *engine, struct task *task);

static void put_fail(struct kv_engine *engine, struct task *task, enum kv_status status,
                     const char *field, const char *message) {
    if (task->request) request_fail(task->request, status, field, "%s", message);
    task_finish(engine, task);
}

/* A page of the block could not be taken: none of it will be.  What a lane still writes to is freed with
 * the next page that comes for it, or with the stream. */
static void block_fail(struct kv_engine *engine, struct put_block *block) {
    block->state = PUT_FAILED;
    if (landing_end(engine, put_index(engine, block)) && block->on_lanes == 0) put_free(engine, block);
}

/* Element `fault` - 1 of the page is none that the codec takes. */
static void page_fault(struct kv_request *request, const struct put_block *block, uint32_t fault) {
    const struct kv_layout *l = &block->layout->info.layout;
    uint32_t half = KV_BLOCK_TOKENS * l->heads * l->head_dim, element = fault - 1;
    request_fail(request, KV_INVALID, "data",
                 "%s of token %u, head %u, channel %u is not finite or above 65504",
                 element >= half ? "v" : "k", element % half / (l->heads * l->head_dim),
                 element / l->head_dim % l->heads, element % l->head_dim);
}

static void put_durable(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    if (request && task->stopped != KV_OK)
        request_fail(request, task->stopped, "", "stopped before the block was durable");
    else if (request && task->store_status != KV_OK)
        request_fail(request, task->store_status, "", "the block is there, but its write failed");
    else if (request && task->no_disk) request->put.durability = KV_VOLATILE;
    task_finish(engine, task);
}

/* The block is in the cache: answers when it is as durable as was asked. */
static void put_there(struct kv_engine *engine, struct task *task, enum kv_durability durability,
                      uint64_t bytes_held, bool existed) {
    struct kv_put *put = &task->request->put;
    put->complete = true;
    put->existed = existed;
    put->bytes_held = bytes_held;
    put->durability = durability < KV_VOLATILE ? KV_VOLATILE : durability;
    struct kv_block_info info;
    bool found = kv_store_find(engine->options.store, &put->digest, &info);
    if (durability <= KV_VOLATILE || (found && info.durability >= durability)) {
        if (found) put->durability = info.durability;
        task_finish(engine, task);
        return;
    }
    task_sync(engine, task, &task->sync, &put->digest, durability);
    task_wait_store(task, put_durable);
}

/* Commits the block if all its pages are in; the task ends either way, or waits for the disk. */
static void block_try(struct kv_engine *engine, struct task *task, struct put_block *block) {
    uint32_t landed = landing_count(engine, put_index(engine, block));
    if (block->page_count + landed < block->layout->info.layout.layers) {
        task_finish(engine, task);
        return;
    }
    /* Landed pages had no request that was counted, but for the one that was told of. */
    engine->stats.bytes_in += (uint64_t)landed * 2 * KV_BLOCK_TOKENS * block->layout->row_bytes;
    if (task->request->put.landed) engine->stats.bytes_in -= task->request->bytes_in;
    landing_end(engine, put_index(engine, block));
    uint64_t bytes = block_bytes(block);
    enum kv_durability durability = block->durability;
    kv_store_commit(engine->options.store, &block->slot, false);
    gpu_adopt(engine, &block->digest, block->device);
    engine->stats.blocks_sealed++;
    block->device = NULL;
    block->state = PUT_FREE;
    put_there(engine, task, durability, bytes, false);
}

static void put_taken(struct kv_engine *engine, struct task *task) {
    struct put_block *block = task->put.block;
    struct kv_request *request = task->request;
    enum kv_status device = kv_device_status(engine->options.device);
    block->on_lanes--;
    gpu_scratch_free(engine, task->put.scratch);
    task->put.scratch = NULL;
    uint32_t fault = task->lane->faults[0];
    if (task->stopped != KV_OK || device != KV_OK || fault || !request) {
        if (request && fault)
            page_fault(request, block, fault);
        else if (request)
            request_fail(request, device != KV_OK ? device : task->stopped, "",
                         "stopped before the page was taken");
        block_fail(engine, block);
        task_finish(engine, task);
        return;
    }
    if (block->state == PUT_FAILED) {
        block_fail(engine, block);
        put_fail(engine, task, KV_INVALID, "data", "another page of this block was refused");
        return;
    }
    block->page_count++;
    block_try(engine, task, block);
}

/* The last page of a block that is being put behind its first one. */
static void put_landed(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    struct put_block *block =
        request ? put_find(engine, request->put.stream, &request->put.digest) : NULL;
    if (task->stopped != KV_OK) {
        put_fail(engine, task, task->stopped, "", "stopped before the block was complete");
    } else if (!block || block->state == PUT_THERE) {
        task_finish(engine, task); /* the first page came in last: it has answered for all of them */
    } else if (block->state == PUT_FAILED) {
        block_fail(engine, block);
        put_fail(engine, task, KV_INVALID, "data", "another page of this block was refused");
    } else if (request->put.fault) {
        page_fault(request, block, request->put.fault);
        block_fail(engine, block);
        task_finish(engine, task);
    } else {
        block_try(engine, task, block);
    }
}

static size_t scratch_of(const struct kv_request *request, const struct layout_entry *layout) {
    const struct kv_put *put = &request->put;
    size_t end = request->bytes_in;
    size_t energy = put->energy_offset + layout->energy_count * sizeof(float);
    if (put->has_energy && energy > end) end = energy;
    return (end + 63) / 64 * 64;
}

static size_t page_offset(const struct task *task) {
    return (size_t)task->request->put.layer * page_bytes(task->put.block);
}

/* In the store's memory. */
static uint8_t *page_slot(const struct task *task) {
    return task->put.block->slot.address + page_offset(task);
}

/* Where kernels make the page: in the gpu tier, from where page_out() brings it to the store. */
static uint8_t *page_target(const struct task *task) {
    const struct put_block *block = task->put.block;
    return block->device ? block->device + page_offset(task) : page_slot(task);
}

static void page_out(const struct task *task) {
    const struct put_block *block = task->put.block;
    if (block->device)
        kv_stream_copy(task->lane->stream, page_slot(task), page_target(task), page_bytes(block));
}

/* Where a page lies as rows before it is packed. */
static uint8_t *page_scratch(const struct task *task) {
    if (task->put.scratch) return task->put.scratch;
    return task->request->staging + scratch_of(task->request, task->put.block->layout);
}

/* The rows are a raw page now, and free of NaN: pack it. */
static void put_quantize(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    if (!request || task->stopped != KV_OK || task->lane->faults[0]) {
        put_taken(engine, task);
        return;
    }
    const struct kv_put *put = &request->put;
    const struct layout_entry *layout = task->put.block->layout;
    const struct kv_quantize quantize = {
        .raw = page_scratch(task),
        .energy =
            put->has_energy ? (const float *)(request->staging + put->energy_offset) : NULL,
        .packed = page_target(task),
    };
    kv_kernel_quantize(task->lane->stream, &layout->shape, 1, &quantize);
    page_out(task);
    task_wait_ticket(engine, task, put_taken);
}

/* The first page of a block whose others land: a copy of at most 40 us, less than waking a worker and
 * being woken by it, if nobody else waits for the engine. */
static bool page_is_short(const struct kv_engine *engine, const struct task *task, bool raw) {
    return raw && task->request->put.pieces && task->put.block->layout->raw_bytes <= SHORT_BYTES &&
           engine_is_free(engine);
}

/* Packed bytes straight into the block; rows to a raw page first, in the block itself if it stays
 * raw, or behind the rows in staging. */
static void put_page(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    struct put_block *block = task->put.block;
    const struct layout_entry *layout = block->layout;
    struct kv_stream *stream = task->lane->stream;
    bool raw = block->raw || layout->shape.codec.kind == KV_CODEC_RAW;
    block->on_lanes++;
    task->lane->faults[0] = 0;
    if (request->put.form == KV_FORM_PACKED) {
        kv_stream_copy(stream, page_target(task), request->staging, layout->packed_bytes);
        page_out(task);
        task_wait_ticket(engine, task, put_taken);
        return;
    }
    size_t scratch = scratch_of(request, layout);
    KV_CHECK(scratch + layout->raw_bytes <= request->staging_bytes);
    if (!raw) task->put.scratch = gpu_scratch(engine, layout->raw_bytes);
    const struct kv_ingest ingest = {
        .keys = request->put.pieces ? NULL : request->staging,
        .values = request->put.pieces ? NULL
                                      : request->staging + KV_BLOCK_TOKENS * layout->row_bytes,
        .pieces = request->put.pieces,
        .piece_count = request->put.piece_count,
        .dtype = layout->info.layout.dtype,
        .tokens = KV_BLOCK_TOKENS,
        .page = raw ? page_target(task) : page_scratch(task),
        .fault = &task->lane->faults[0],
    };
    if (page_is_short(engine, task, raw)) {
        size_t array_bytes = request->put.piece_count * sizeof request->put.pieces[0];
        task->lane->faults[0] = kv_kernel_ingest_here(engine->options.device, &layout->shape, &ingest,
                                                      request->staging + array_bytes);
        put_taken(engine, task);
        return;
    }
    kv_kernel_ingest(stream, &layout->shape, 1, &ingest);
    if (raw) page_out(task);
    task_wait_ticket(engine, task, raw ? put_taken : put_quantize);
}

/* ---- Which block it is of ------------------------------------------------------------------------ */

static void block_init(struct put_block *block, const struct kv_put *put,
                       struct layout_entry *layout) {
    static uint64_t order; /* the engine thread's */
    memset(block, 0, sizeof *block);
    block->stream = put->stream;
    block->order = ++order;
    block->digest = put->digest;
    block->layout = layout;
    block->raw = put->raw;
    block->durability = put->durability;
}

/* The first page of a block on this stream.  False: the task has ended or waits. */
static bool block_begin(struct kv_engine *engine, struct task *task,
                        struct layout_entry *layout) {
    struct kv_put *put = &task->request->put;
    struct kv_block_info info;
    struct put_block *block = put_entry(engine, put->stream);
    if (!block) {
        put_fail(engine, task, KV_BUSY, "digest",
                 "more incomplete blocks than the stream's credit, or than there is room for");
        return false;
    }
    if (kv_store_find(engine->options.store, &put->digest, &info)) {
        if (info.extent.tag != layout->tag) {
            put_fail(engine, task, KV_MISMATCH, "digest", "the block there is of another layout");
            return false;
        }
        block_init(block, put, layout);
        block->state = PUT_THERE;
        landing_begin(engine, put_index(engine, block), put, layout, NULL);
        landing_claim(engine, put_index(engine, block), put->layer);
        if (++block->page_count == layout->info.layout.layers) block->state = PUT_FREE;
        engine->stats.blocks_shared++;
        put_there(engine, task, put->durability,
                  (uint64_t)info.extent.part_count * info.extent.part_bytes, true);
        return false;
    }
    struct put_block fresh;
    block_init(&fresh, put, layout);
    const struct kv_block_extent extent = {
        .tag = layout->tag,
        .part_count = layout->info.layout.layers,
        .part_bytes = page_bytes(&fresh),
    };
    enum kv_status status = kv_store_reserve(engine->options.store, &put->digest, KV_CLASS_BLOCK,
                                             &extent, &fresh.slot);
    if (status == KV_BUSY && task_wait_memory(engine, task, put_begin)) return false;
    if (status != KV_OK) {
        put_fail(engine, task, KV_BUSY, "",
                 status == KV_EXISTS ? "somebody else is putting this block now"
                                     : "no room for the block");
        return false;
    }
    fresh.state = PUT_FILLING;
    fresh.device = gpu_scratch(engine, (uint64_t)extent.part_count * extent.part_bytes);
    *block = fresh;
    bool lands = engine->is_host && (put->raw || layout->shape.codec.kind == KV_CODEC_RAW);
    landing_begin(engine, put_index(engine, block), put, layout, lands ? fresh.slot.address : NULL);
    landing_claim(engine, put_index(engine, block), put->layer);
    task->put.block = block;
    return true;
}

static void put_begin(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    if (!request || task->stopped != KV_OK) {
        put_fail(engine, task, task->stopped, "", "stopped before the page was taken");
        return;
    }
    struct kv_put *put = &request->put;
    struct layout_entry *layout = engine_layout(engine, &put->fingerprint);
    struct put_block *block = put_find(engine, put->stream, &put->digest);
    if (!block) {
        if (block_begin(engine, task, layout)) put_page(engine, task);
        return;
    }
    if (block->layout != layout || block->raw != put->raw) {
        put_fail(engine, task, KV_INVALID, block->raw != put->raw ? "raw" : "fingerprint",
                 "differs from the earlier pages of this block");
    } else if (block->state == PUT_FAILED) {
        block_fail(engine, block);
        put_fail(engine, task, KV_INVALID, "data", "another page of this block was refused");
    } else if (!landing_claim(engine, put_index(engine, block), put->layer)) {
        /* The same page again.  If its first copy landed, and the engine could not be told, it hears of
         * it now. */
        if (block->state == PUT_FILLING) block_try(engine, task, block);
        else task_finish(engine, task);
    } else if (block->state == PUT_THERE) {
        if (++block->page_count == layout->info.layout.layers) block->state = PUT_FREE;
        task_finish(engine, task);
    } else {
        task->put.block = block;
        put_page(engine, task);
    }
}

/* ---- What the message says -------------------------------------------------------------------------- */

static bool put_check(struct kv_request *request, const struct layout_entry *layout) {
    const struct kv_put *put = &request->put;
    bool full = put->form == KV_FORM_FULL;
    size_t bytes = full ? 2 * KV_BLOCK_TOKENS * layout->row_bytes : layout->packed_bytes;
    if (put->layer >= layout->info.layout.layers)
        request_fail(request, KV_INVALID, "layer", "%u is not below %u", put->layer,
                     layout->info.layout.layers);
    else if (!full && put->form != KV_FORM_PACKED)
        request_fail(request, KV_INVALID, "form", "neither FULL nor PACKED");
    else if (!full && put->raw)
        request_fail(request, KV_INVALID, "raw", "a packed page cannot stay raw");
    else if (request->bytes_in != bytes)
        request_fail(request, KV_INVALID, "data", "%zu bytes, but a page is %zu",
                     request->bytes_in, bytes);
    else if (put->has_energy && !energy_valid((const float *)(request->staging +
                                                              put->energy_offset),
                                              layout->energy_count))
        request_fail(request, KV_INVALID, "query_energy", "not all in 0 .. 1e30");
    else if (!full && !kv_page_valid(&layout->shape, request->staging))
        request_fail(request, KV_INVALID, "data", "not a page that this layout's codec could have made");
    return request->status == KV_OK;
}

void put_start(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    struct kv_put *put = &request->put;
    struct layout_entry *layout = engine_layout(engine, &put->fingerprint);
    put->complete = put->existed = false;
    put->bytes_held = 0;
    task->is_put = true;
    task->put.stream = put->stream;
    if (put->landed) {
        task_run(engine, task, put_landed);
        return;
    }
    if (!layout) {
        put_fail(engine, task, KV_NOT_FOUND, "fingerprint", "no such layout is registered");
        return;
    }
    if (!put_check(request, layout)) {
        task_finish(engine, task);
        return;
    }
    if (!put->has_digest) {
        struct kv_digest root = kv_chain_root(&put->fingerprint, &put->salt);
        put->digest = kv_chain_next(put->has_parent ? &put->parent : &root, put->token_ids);
    }
    task_enqueue(engine, task, put_begin);
}

/* ---- PUT_END -------------------------------------------------------------------------------------------- */

/* Pages of the stream that came before this may still wait for a lane or be on one. */
static bool stream_busy(const struct kv_engine *engine, const struct task *self) {
    const struct task_list *lists[] = {&engine->laneless, &engine->running};
    for (int i = 0; i < 2; i++)
        for (const struct task *task = lists[i]->first; task; task = task->next)
            if (task != self && task->is_put && task->put.stream == self->put.stream) return true;
    return false;
}

static void put_end_step(struct kv_engine *engine, struct task *task) {
    if (stream_busy(engine, task)) {
        task->retry_us = engine->now_us + RETRY_US;
        task->wait = WAIT_MEMORY;
        task->step = put_end_step;
        return;
    }
    for (uint32_t i = 0; i < engine->put_max; i++)
        if (engine->puts[i].state != PUT_FREE && engine->puts[i].stream == task->put.stream)
            put_free(engine, &engine->puts[i]);
    task_finish(engine, task);
}

void put_end_start(struct kv_engine *engine, struct task *task) {
    task->put.stream = task->request->put.stream;
    task_run(engine, task, put_end_step);
}
