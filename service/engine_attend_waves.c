/* SPDX-License-Identifier: Apache-2.0 */
/* engine_attend_waves.c - ATTEND's pages through the kernel.
 *
 * The pages of all items stand in a row; a wave takes as many from it as fit the pin and the arena, and
 * is merged into what earlier waves left.  There are two, so that the disk reads the next one while the
 * kernel works on this one.  A context larger than half the arena pins single pages instead of whole
 * blocks: its blocks would push each other out.
 */
#include "service/engine_attend.h"

#include <stdio.h>

static void attend_waves(struct kv_engine *engine, struct task *task);

/* ---- A wave ---------------------------------------------------------------------------------- */

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
void waves_begin(struct kv_engine *engine, struct task *task) {
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

void waves_release(struct kv_engine *engine, struct task *task) {
    for (int i = 0; i < 2; i++) wave_release(engine, &task->lane->waves[i]);
}
