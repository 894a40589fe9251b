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
 *
 * Waves.  The pages of all items stand in a row; a wave takes as many from it as fit the pin and
 * the arena, and is merged into what earlier waves left.  There are two, so that the disk reads
 * the next one while the kernel works on this one.  A context larger than half the arena pins
 * single pages instead of whole blocks: its blocks would push each other out.
 */
#include "service/engine_private.h"

#include <stdarg.h>
#include <stdio.h>

static void attend_reserve(struct kv_engine *engine, struct task *task);
static void attend_waves(struct kv_engine *engine, struct task *task);
static void attend_finish(struct kv_engine *engine, struct task *task);

/* ---- Items ------------------------------------------------------------------------------- */

__attribute__((format(printf, 4, 5))) static void
item_fail(struct kv_attend_item *item, enum kv_status status, const char *field,
          const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(item->message, sizeof item->message, format, values);
    va_end(values);
    snprintf(item->field, sizeof item->field, "%s", field);
    item->status = status;
}

/* The part takes no further part; what it has staged stays until the kernels are done with it. */
static void part_fail(struct task *task, struct part *part, enum kv_status status,
                      const char *field, const char *message) {
    part->status = status;
    if (task->request)
        item_fail(&task->request->attend.items[part->item], status, field, "%s", message);
}

static bool part_lives(const struct part *part) {
    return part->status == KV_OK;
}

static uint32_t length_after(const struct part *part) {
    return part->session->length[part->layer] + part->tokens;
}

/* Tokens that a row sees. */
static uint32_t row_sees(const struct part *part, uint32_t row) {
    uint32_t length = length_after(part);
    if (part->visible_given) return part->visible_given[row];
    if (part->mask == KV_MASK_ALL) return length;
    uint32_t behind = part->rows - 1 - row;
    return length > behind ? length - behind : 0;
}

static struct layout_entry *layout_of(const struct task *task) {
    return task->attend.layout;
}

/* ---- Waves ---------------------------------------------------------------------------------- */

/* Walks a part's blocks in order. */
struct walk {
    const struct part *part;
    const struct live_block *live;
    uint32_t index;
};

static struct walk walk_begin(const struct part *part, uint32_t index) {
    struct walk walk = {.part = part, .index = index};
    if (index >= part->session->block_count) walk.live = session_live(part->session, index);
    return walk;
}

static struct page_source walk_source(const struct walk *walk) {
    const struct part *part = walk->part;
    return session_source(part->session, part->layer, walk->index, walk->live,
                          length_after(part));
}

static void walk_next(struct walk *walk) {
    walk->index++;
    if (walk->live) walk->live = walk->live->next;
    else if (walk->index == walk->part->session->block_count)
        walk->live = walk->part->session->live_first;
}

static uint32_t blocks_seen(const struct part *part) {
    return (part->seen + KV_BLOCK_TOKENS - 1) / KV_BLOCK_TOKENS;
}

/* Adds a sealed block to the wave: the gpu tier has it, or it has to be pinned.  False: that is full. */
static bool wave_add(struct kv_engine *engine, struct task *task, struct wave *wave,
                     const struct kv_digest *key) {
    struct wave_block *block = &wave->blocks[wave->block_count];
    *block = (struct wave_block){.gpu = gpu_hold(engine, task->lane->stream, key),
                                 .host = WAVE_NOT_PINNED};
    if (block->gpu == KV_GPU_NONE) {
        if (wave->pin.count >= task->attend.wave_blocks) return false;
        block->host = (uint16_t)wave->pin.count;
        wave->keys[wave->pin.count++] = *key;
    }
    wave->block_count++;
    return true;
}

/* Adds a part's blocks from `block` on to the wave; returns where it stopped. */
static uint32_t wave_take(struct kv_engine *engine, struct task *task, struct wave *wave, uint32_t part_index,
                          uint32_t block, uint32_t *pages) {
    const struct part *part = &task->lane->parts[part_index];
    struct range *range = &wave->ranges[wave->range_count];
    uint32_t end = blocks_seen(part);
    *range = (struct range){.part = part_index, .from = block, .to = block};
    struct walk walk = walk_begin(part, block);
    for (; range->to < end && *pages < KV_ATTEND_PAGES_MAX; walk_next(&walk)) {
        struct page_source source = walk_source(&walk);
        if (source.key && !wave_add(engine, task, wave, source.key)) break;
        (*pages)++;
        range->to++;
    }
    bool empty_context = end == 0;
    if (range->to > range->from || empty_context) wave->range_count++;
    return range->to;
}

/* Fills the wave from where the last one stopped.  False: nothing is left. */
static bool wave_build(struct kv_engine *engine, struct task *task, struct wave *wave) {
    struct lane *lane = task->lane;
    uint32_t pages = 0;
    wave->range_count = 0;
    wave->pin.count = 0;
    wave->block_count = 0;
    wave->part = task->attend.part;
    wave->block = task->attend.block;
    for (; task->attend.part < lane->part_count; task->attend.part++, task->attend.block = 0) {
        const struct part *part = &lane->parts[task->attend.part];
        if (!part_lives(part) || part->rows == 0) continue;
        task->attend.block =
            wave_take(engine, task, wave, task->attend.part, task->attend.block, &pages);
        if (task->attend.block < blocks_seen(part)) break; /* the wave is full */
    }
    return wave->range_count > 0;
}

static void wave_pinned(struct kv_pin *pin, enum kv_status status) {
    struct wave *wave = (struct wave *)((char *)pin - offsetof(struct wave, pin));
    task_on_pinned(pin, KV_OK);
    wave->status = status;
    wave->state = status == KV_OK ? WAVE_READY : WAVE_FAILED;
}

static void wave_pin(struct kv_engine *engine, struct task *task, struct wave *wave) {
    wave->state = WAVE_READY;
    wave->pin.from_disk = 0;
    if (wave->pin.count == 0) return;
    wave->pin.keys = wave->keys;
    wave->pin.addresses = wave->addresses;
    wave->pin.entries_private = wave->entries;
    wave->pin.part = task->attend.layer_pins ? (int32_t)task->lane->parts[0].layer : -1;
    wave->pin.tag = layout_of(task)->tag;
    wave->pin.on_ready = wave_pinned;
    wave->pin.owner = task;
    wave->status = kv_store_pin_now(engine->options.store, &wave->pin);
    if (wave->status == KV_OK) return;
    if (wave->status != KV_BUSY) {
        wave->state = WAVE_FAILED;
        return;
    }
    wave->state = WAVE_PINNING;
    task->store_pending++;
    kv_store_pin(engine->options.store, &wave->pin);
}

static void wave_release(struct kv_engine *engine, struct wave *wave) {
    bool pinned = wave->state == WAVE_READY || wave->state == WAVE_RUNNING;
    if (pinned && wave->pin.count) kv_store_unpin(engine->options.store, &wave->pin);
    if (wave->state != WAVE_FREE) wave_gpu_release(engine, wave);
    wave->state = WAVE_FREE;
}

/* Where the kernel finds a layer's page of the wave's block number `number`. */
static const void *wave_page(const struct kv_engine *engine, const struct task *task,
                             const struct wave *wave, uint32_t number, size_t offset) {
    const struct wave_block *block = &wave->blocks[number];
    if (block->gpu != KV_GPU_NONE) return kv_gpu_block_address(engine->gpu, block->gpu) + offset;
    const uint8_t *address = wave->addresses[block->host];
    return task->attend.layer_pins ? address : address + offset;
}

/* The item of the kernel's call for one range; its pages go behind those at refs[*ref_count]. */
static struct kv_attend range_attend(struct kv_engine *engine, struct task *task,
                                     const struct wave *wave, uint32_t range_index,
                                     uint32_t *sealed, uint32_t *ref_count) {
    const struct range *range = &wave->ranges[range_index];
    struct part *part = &task->lane->parts[range->part];
    const struct layout_entry *layout = part->session->layout;
    const struct kv_layout *l = &layout->info.layout;
    struct kv_page_ref *refs = &engine->refs[*ref_count];
    uint32_t first = range->from * KV_BLOCK_TOKENS, tokens = 0;

    struct walk walk = walk_begin(part, range->from);
    for (uint32_t i = 0; i < range->to - range->from; i++, walk_next(&walk)) {
        struct page_source source = walk_source(&walk);
        const void *page = source.memory;
        if (source.key)
            page = wave_page(engine, task, wave, (*sealed)++,
                             (size_t)part->layer * session_page_bytes(layout, walk.index));
        refs[i] = (struct kv_page_ref){
            .page = page, .tokens = (uint16_t)source.tokens, .raw = source.raw};
        tokens += source.tokens;
    }
    *ref_count += range->to - range->from;

    uint32_t *visible = engine->visible[range_index];
    for (uint32_t row = 0; row < part->rows; row++) {
        uint32_t sees = row_sees(part, row);
        uint32_t here = sees > first ? sees - first : 0;
        visible[row] = here < tokens ? here : tokens;
    }
    bool merge = part->started;
    part->started = true;
    return (struct kv_attend){
        .query = part->query,
        .dtype = l->dtype,
        .heads_q = l->heads_q,
        .rows = part->rows,
        .score_scale = l->score_scale,
        .page_count = range->to - range->from,
        .pages = refs,
        .visible = visible,
        .merge = merge,
        .out = (float *)part->reply,
        .lse = (float *)part->reply + (size_t)part->rows * l->heads_q * l->head_dim,
        .cancel = &task->lane->cancel,
    };
}

static void wave_enqueue(struct kv_engine *engine, struct task *task, struct wave *wave) {
    struct lane *lane = task->lane;
    uint32_t sealed = 0, refs = 0;
    uint32_t held = wave->block_count - wave->pin.count; /* in the gpu tier already */
    if (task->attend.admits && !task->attend.layer_pins) wave_admit(engine, lane, wave);
    for (uint32_t i = 0; i < wave->range_count; i++)
        engine->attends[i] = range_attend(engine, task, wave, i, &sealed, &refs);
    kv_kernel_attend(lane->stream, &layout_of(task)->shape, wave->range_count, engine->attends);
    engine->stats.pages_from_nvme += wave->pin.from_disk;
    engine->stats.pages_from_gpu += held;
    engine->stats.pages_from_host += refs - wave->pin.from_disk - held;

    /* The last wave's end is announced by whoever waits for the task's end. */
    if (task->attend.part < lane->part_count)
        kv_stream_notify(lane->stream, kv_inbox_wake_fd(engine->inbox));
    wave->ticket = task->ticket = kv_stream_mark(lane->stream);
    wave->state = WAVE_RUNNING;
}

/* The part and block that a failed pin is about. */
static struct part *wave_culprit(struct task *task, const struct wave *wave, uint32_t *block) {
    uint32_t sealed = 0;
    for (uint32_t i = 0; i < wave->range_count; i++) {
        const struct range *range = &wave->ranges[i];
        struct part *part = &task->lane->parts[range->part];
        struct walk walk = walk_begin(part, range->from);
        for (; walk.index < range->to; walk_next(&walk)) {
            if (!walk_source(&walk).key) continue;
            *block = walk.index;
            if (wave->blocks[sealed++].host == wave->pin.failed) return part;
        }
    }
    KV_CHECK(!"a pin failed at a block it did not have");
    return NULL;
}

static void culprit_fail(struct task *task, const struct wave *wave) {
    uint32_t block = 0;
    struct part *part = wave_culprit(task, wave, &block);
    const char *what = wave->status == KV_NOT_FOUND  ? "was evicted"
                       : wave->status == KV_CORRUPT  ? "failed its checksum and is gone"
                       : wave->status == KV_IO_ERROR ? "could not be read"
                       : wave->status == KV_BUSY     ? "finds no room in memory"
                                                     : "is of another layout";
    char message[160];
    snprintf(message, sizeof message, "the block at token %u %s", block * KV_BLOCK_TOKENS, what);
    part_fail(task, part, wave->status, wave->status == KV_BUSY ? "" : "session", message);
}

/* Builds the wave anew, smaller or without the item at fault.  False: the task waits. */
static bool wave_retry(struct kv_engine *engine, struct task *task, struct wave *wave) {
    const struct wave *other = &task->lane->waves[task->attend.wave ^ 1];
    wave->state = WAVE_FREE;
    task->attend.part = wave->part;
    task->attend.block = wave->block;
    if (wave->status != KV_BUSY) {
        culprit_fail(task, wave);
        wave_gpu_release(engine, wave);
        return true;
    }
    wave_gpu_release(engine, wave);
    if (wave->pin.count > 1) {
        task->attend.wave_blocks = wave->pin.count / 2;
        return true;
    }
    task->attend.wave_blocks = 1;
    if (other->state == WAVE_RUNNING && !kv_stream_reached(task->lane->stream, other->ticket)) {
        kv_stream_notify(task->lane->stream, kv_inbox_wake_fd(engine->inbox));
        task->wait = WAIT_TICKET; /* its pins are in the way */
        task->ticket = kv_stream_mark(task->lane->stream);
        task->step = attend_waves;
        return false;
    }
    wave_release(engine, &task->lane->waves[task->attend.wave ^ 1]);
    if (!task->attend.layer_pins) {
        task->attend.layer_pins = true; /* one page, then */
        return true;
    }
    if (task_wait_memory(engine, task, attend_waves)) return false;
    culprit_fail(task, wave);
    return true;
}

/* The task is stopped: ends when neither kernel nor store use anything of it. */
static void attend_drain(struct kv_engine *engine, struct task *task) {
    if (task->store_pending) task_wait_store(task, attend_drain);
    else task_wait_ticket(engine, task, attend_finish);
}

static void attend_waves(struct kv_engine *engine, struct task *task) {
    for (;;) {
        struct wave *wave = &task->lane->waves[task->attend.wave];
        if (task->stopped != KV_OK) {
            attend_drain(engine, task);
            return;
        }
        switch (wave->state) {
        case WAVE_FREE:
            if (!wave_build(engine, task, wave)) {
                task_wait_ticket(engine, task, attend_finish);
                return;
            }
            wave_pin(engine, task, wave);
            break;
        case WAVE_PINNING: task_wait_store(task, attend_waves); return;
        case WAVE_FAILED:
            if (!wave_retry(engine, task, wave)) return;
            break;
        case WAVE_READY:
            wave_enqueue(engine, task, wave);
            task->attend.wave ^= 1;
            break;
        case WAVE_RUNNING:
            if (!kv_stream_reached(task->lane->stream, wave->ticket)) {
                task->ticket = wave->ticket;
                task->wait = WAIT_TICKET;
                task->step = attend_waves;
                return;
            }
            wave_release(engine, wave);
            break;
        }
    }
}

/* Contexts that take more than half of the gpu tier are not brought there: their blocks would push each
 * other out.  What is there is used, the rest is read across the bus. */
static bool gpu_fits(const struct kv_engine *engine, uint64_t bytes) {
    return engine->gpu && bytes <= engine->options.gpu_arena_bytes / 2;
}

/* How much is pinned at once: a quarter of the arena per wave, because others need some too.  Blocks on
 * their way to the gpu tier pass through the arena whole, however many there are. */
static void waves_begin(struct kv_engine *engine, struct task *task) {
    const struct layout_entry *layout = layout_of(task);
    uint64_t block_bytes = (uint64_t)layout->packed_bytes * layout->info.layout.layers;
    uint64_t blocks = 0;
    for (uint32_t i = 0; i < task->lane->part_count; i++)
        if (part_lives(&task->lane->parts[i]) && task->lane->parts[i].rows)
            blocks += task->lane->parts[i].session->block_count;
    task->attend.admits = gpu_fits(engine, blocks * block_bytes);
    task->attend.layer_pins =
        !task->attend.admits && blocks * block_bytes > engine->options.arena_bytes / 2;
    uint64_t unit = task->attend.layer_pins ? layout->packed_bytes : block_bytes;
    uint64_t fit = engine->options.arena_bytes / 4 / unit;
    task->attend.wave_blocks = fit < 1 ? 1 : fit > KV_PIN_MAX ? KV_PIN_MAX : (uint32_t)fit;
    task->attend.part = task->attend.block = task->attend.wave = 0;
    task->give_up_us = 0;
    attend_waves(engine, task);
}

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

static void attend_reserve(struct kv_engine *engine, struct task *task) {
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

static void attend_finish(struct kv_engine *engine, struct task *task) {
    struct lane *lane = task->lane;
    for (int i = 0; i < 2; i++) wave_release(engine, &lane->waves[i]);
    if (!attend_undone(engine, task)) {
        size_t bytes = 0;
        for (uint32_t i = 0; i < lane->part_count; i++)
            part_end(engine, task, &lane->parts[i], &bytes);
        task->request->reply_bytes = bytes;
    }
    task_finish(engine, task);
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
