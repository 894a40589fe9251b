/* SPDX-License-Identifier: Apache-2.0 */
/* engine.c - opening, the loop, and the way out.
 *
 * The loop does four things in turn, none of which blocks: starts what came in, lets the store run
 * its callbacks, steps every task whose wait is over, and now and then looks for what is too late
 * or idle.  When a whole turn moved nothing it sleeps in kv_store_wait(), the only place.
 *
 * It never spins: every CPU it would spin on has a worker, a lane or a client to run (NOTES.md has the
 * numbers).  What a sleep and a wake-up would cost more than is done in place instead: see
 * kv_stream_in_place().
 */
#include "service/engine_private.h"
#include "service/log.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

enum {
    HOUSEKEEPING_US = 5000,   /* how late a cancelled or late request may be noticed */
    IDLE_WAIT_US = 200000,    /* between looks for idle sessions */
    STAGING_EXTRA = 64 * 1024,
    GPU_ARENA_MIN = 2 << 20,
};

static step_fn stats_start;

static step_fn *const starts[] = {
    [KV_REQUEST_REGISTER] = register_start, [KV_REQUEST_LAYOUTS] = layouts_start,
    [KV_REQUEST_LOOKUP] = lookup_start,     [KV_REQUEST_PUT] = put_start,
    [KV_REQUEST_PUT_END] = put_end_start,   [KV_REQUEST_GET] = get_start,
    [KV_REQUEST_OPEN] = open_start,         [KV_REQUEST_COMMIT] = close_start,
    [KV_REQUEST_CLOSE] = close_start,       [KV_REQUEST_DELETE] = delete_start,
    [KV_REQUEST_LIST] = list_start,         [KV_REQUEST_DESCRIBE] = describe_start,
    [KV_REQUEST_APPEND] = append_start,     [KV_REQUEST_ATTEND] = attend_start,
    [KV_REQUEST_FETCH] = fetch_start,       [KV_REQUEST_STATS] = stats_start,
};

/* ---- Opening and closing ---------------------------------------------------------------- */

static enum kv_status check_options(const struct kv_engine_options *o, char *why,
                                    size_t why_bytes) {
    const char *wrong = NULL;
    if (o->request_count < 8 || o->request_count > 4096) wrong = "request_count: 8 .. 4096";
    else if (o->staging_count < 1 || o->staging_count > o->request_count)
        wrong = "staging_count: 1 .. request_count";
    else if (o->message_bytes_max < 64 * 1024 || o->message_bytes_max > 1u << 30)
        wrong = "message_bytes_max: 64 KiB .. 1 GiB";
    else if (o->layouts_max < 1) wrong = "layouts_max: at least 1";
    else if (o->sessions_open_max < 1 || o->sessions_open_max > o->sessions_max)
        wrong = "sessions_open_max: 1 .. sessions_max";
    else if (o->session_tokens_max < KV_BLOCK_TOKENS || o->session_tokens_max > 1 << 24)
        wrong = "session_tokens_max: 128 .. 16777216";
    else if (o->tail_bytes_max == 0) wrong = "tail_bytes_max: above 0";
    else if (o->arena_bytes == 0) wrong = "arena_bytes: as given to the store";
    else if (o->deadline_ms_max == 0) wrong = "deadline_ms_max: above 0";
    if (!wrong) return KV_OK;
    snprintf(why, why_bytes, "%s", wrong);
    return KV_INVALID;
}

static enum kv_status open_lanes(struct kv_engine *engine) {
    /* Pages one message can touch: what its bytes fill at the smallest row, and two more at the
     * ends of every layer or item. */
    size_t rows_bytes = 64 * 2 * 2;
    engine->fault_max = (uint32_t)(engine->options.message_bytes_max / rows_bytes /
                                   KV_BLOCK_TOKENS) + 2 * KV_LAYERS_MAX;
    enum kv_status status = KV_OK;
    for (int i = 0; i < LANES && status == KV_OK; i++) {
        struct lane *lane = &engine->lanes[i];
        status = kv_stream_open(engine->options.device, &lane->stream);
        if (status == KV_OK)
            status = kv_device_alloc(engine->options.device, KV_MEMORY_PINNED,
                                     engine->fault_max * sizeof lane->faults[0],
                                     (void **)&lane->faults);
    }
    engine->lanes_free = LANES;
    return status;
}

static enum kv_status open_tables(struct kv_engine *engine) {
    const struct kv_engine_options *options = &engine->options;
    /* A request answered early may leave its task behind, waiting for the disk. */
    engine->task_count = 2 * options->request_count + 2 * LANES;
    engine->tasks = calloc(engine->task_count, sizeof engine->tasks[0]);
    engine->layouts = calloc(options->layouts_max, sizeof engine->layouts[0]);
    engine->session_count = options->sessions_open_max + SLOTS_EXTRA;
    engine->sessions = calloc(engine->session_count, sizeof engine->sessions[0]);
    bool named = names_open(&engine->names, options->sessions_max);
    if (!engine->tasks || !engine->layouts || !engine->sessions || !named) return KV_BUSY;

    for (uint32_t i = 0; i < engine->task_count; i++)
        list_append(&engine->free_tasks, &engine->tasks[i]);

    /* Generations begin somewhere else each time, so that a handle from before a restart means
     * nothing. */
    uint32_t generation = 0;
    if (getrandom(&generation, sizeof generation, 0) != sizeof generation) return KV_IO_ERROR;
    for (uint32_t i = 0; i < engine->session_count; i++) {
        engine->sessions[i].slot = i;
        engine->sessions[i].generation = generation;
    }
    return KV_OK;
}

static enum kv_status open_gpu(struct kv_engine *engine, char *why, size_t why_bytes) {
    const struct kv_engine_options *options = &engine->options;
    if (options->gpu_arena_bytes < GPU_ARENA_MIN) {
        snprintf(why, why_bytes, "gpu_arena_bytes: at least %u MiB", GPU_ARENA_MIN >> 20);
        return KV_INVALID;
    }
    const struct kv_gpu_tier_options tier = {
        .device = options->device,
        .bytes = options->gpu_arena_bytes,
        .blocks_max = options->blocks_max,
        .keep_us = options->gpu_keep_ms * 1000ull,
    };
    enum kv_status status = kv_gpu_tier_open(&tier, &engine->gpu);
    if (status != KV_OK)
        snprintf(why, why_bytes, "gpu_arena_bytes: the device has not got %llu bytes of memory to give",
                 (unsigned long long)tier.bytes);
    engine->tail.gpu = engine->gpu;
    return status;
}

enum kv_status kv_engine_open(const struct kv_engine_options *options, struct kv_engine **out,
                              char *why, size_t why_bytes) {
    enum kv_status status = check_options(options, why, why_bytes);
    if (status != KV_OK) return status;
    struct kv_engine *engine = calloc(1, sizeof *engine);
    if (!engine) {
        snprintf(why, why_bytes, "out of memory");
        return KV_BUSY;
    }
    engine->options = *options;
    engine->staging_bytes = 3 * (size_t)options->message_bytes_max + STAGING_EXTRA;
    engine->is_host = kv_device_is_host(options->device);
    engine->tail.store = options->store;
    engine->tail.max = options->tail_bytes_max;
    engine->opened_us = engine->now_us = engine_clock_us();

    const struct kv_inbox_options inbox = {
        .device = options->device,
        .request_count = options->request_count,
        .staging_count = options->staging_count,
        .staging_bytes = engine->staging_bytes,
    };
    snprintf(why, why_bytes, "out of memory: staging takes %u buffers of %zu bytes",
             options->staging_count, engine->staging_bytes);
    status = kv_inbox_open(&inbox, &engine->inbox);
    if (status == KV_OK) status = open_tables(engine);
    if (status == KV_OK && !engine->is_host) status = open_gpu(engine, why, why_bytes);
    if (status == KV_OK) status = open_lanes(engine);
    if (status == KV_OK) status = engine_puts_open(engine);
    if (status == KV_OK) status = engine_recover(engine, why, why_bytes);
    if (status != KV_OK) {
        kv_engine_close(engine);
        return status;
    }
    why[0] = 0;
    atomic_store(&engine->ready, true);
    *out = engine;
    return KV_OK;
}

void kv_engine_close(struct kv_engine *engine) {
    if (!engine) return;
    for (uint32_t i = 0; engine->sessions && i < engine->session_count; i++)
        if (engine->sessions[i].open) session_unload(engine, &engine->sessions[i]);
    engine_puts_close(engine);
    for (int i = 0; i < LANES; i++) {
        struct lane *lane = &engine->lanes[i];
        if (lane->stream) kv_stream_close(lane->stream);
        if (lane->faults)
            kv_device_free(engine->options.device, KV_MEMORY_PINNED, lane->faults,
                           engine->fault_max * sizeof lane->faults[0]);
    }
    kv_gpu_tier_close(engine->gpu);
    names_close(&engine->names);
    kv_inbox_free(engine->inbox);
    free(engine->sessions);
    free(engine->layouts);
    free(engine->tasks);
    free(engine);
}

/* ---- Requests in ------------------------------------------------------------------------- */

static void stats_start(struct kv_engine *engine, struct task *task) {
    struct kv_engine_stats *stats = &engine->stats;
    stats->backend = kv_device_name(engine->options.device);
    stats->io_engine = kv_store_io_engine(engine->options.store);
    stats->ready = kv_engine_ready(engine);
    stats->arena_bytes_max = engine->options.arena_bytes;
    stats->disk_bytes_max = engine->options.disk_bytes;
    stats->blocks_max = engine->options.blocks_max;
    stats->uptime_ms = (engine->now_us - engine->opened_us) / 1000;
    stats->sessions_open = engine->sessions_open;
    stats->sessions_known = engine->names.count;
    stats->sessions_max = engine->options.sessions_max;
    stats->layouts = engine->layout_count;
    stats->tail_bytes = engine->tail.used;
    stats->tail_bytes_max = engine->tail.max;
    stats->store = *kv_store_stats(engine->options.store);
    if (engine->gpu) stats->gpu = *kv_gpu_stats(engine->gpu);
    task->request->stats = *stats;
    task_finish(engine, task);
}

static void refuse(struct kv_engine *engine, struct kv_request *request, enum kv_status status,
                   const char *why) {
    request_fail(request, status, "", "%s", why);
    engine->stats.requests++;
    engine->stats.errors++;
    request->on_done(request);
}

static void start_request(struct kv_engine *engine, struct kv_request *request) {
    request->next_private = NULL;
    request->status = KV_OK;
    if (engine->draining) {
        refuse(engine, request, KV_UNAVAILABLE, "the service is stopping");
        return;
    }
    struct task *task = task_create(engine, request);
    if (!task) { /* every task that was answered early still waits for the disk */
        refuse(engine, request, KV_BUSY, "too many requests wait for the disk");
        return;
    }
    KV_CHECK((size_t)request->kind < sizeof starts / sizeof starts[0]);
    starts[request->kind](engine, task);
}

static bool start_requests(struct kv_engine *engine, struct kv_request *request) {
    bool any = request != NULL;
    while (request) {
        struct kv_request *next = request->next_private;
        start_request(engine, request);
        request = next;
    }
    return any;
}

/* ---- The loop ------------------------------------------------------------------------------- */

static void close_idle(struct kv_engine *engine, uint64_t idle_us) {
    for (uint32_t i = 0; i < engine->session_count; i++) {
        struct session *session = &engine->sessions[i];
        bool idle = session->open && !session->turn_first &&
                    engine->now_us >= session->used_us + idle_us;
        if (idle && !session_close_idle(engine, session)) return;
    }
}

static void housekeeping(struct kv_engine *engine) {
    if (engine->now_us < engine->housekeeping_us) return;
    engine->housekeeping_us = engine->now_us + HOUSEKEEPING_US;
    engine_expire_tasks(engine);
    if (kv_device_status(engine->options.device) != KV_OK && atomic_exchange(&engine->ready, false))
        kv_log(KV_LOG_ERROR,
               "engine: the compute device has failed (%s): not ready any more, until kivid is "
               "restarted; what is on disk is safe, exact tokens since the last commit are lost",
               kv_device_failure(engine->options.device));
    if (engine->options.session_idle_ms && !engine->draining)
        close_idle(engine, engine->options.session_idle_ms * 1000ull);
}

/* One turn; true if anything moved. */
static bool turn_once(struct kv_engine *engine) {
    engine->now_us = engine_clock_us();
    bool moved = start_requests(engine, kv_inbox_take(engine->inbox));
    engine->store_progress = kv_store_poll(engine->options.store) > 0;
    moved |= engine->store_progress;
    moved |= engine_step_tasks(engine);
    housekeeping(engine);
    return moved;
}

static void sleep_once(struct kv_engine *engine) {
    if (!kv_inbox_doze(engine->inbox)) return;
    bool tasks = engine->running.first || engine->laneless.first || engine->blocked.first;
    uint64_t timeout_us = tasks ? HOUSEKEEPING_US : IDLE_WAIT_US;
    for (struct task *task = engine->running.first; task; task = task->next)
        if (task->wait == WAIT_MEMORY) timeout_us = RETRY_US;
    if (!atomic_load(&engine->stopping) || engine->draining)
        kv_store_wait(engine->options.store, kv_inbox_wake_fd(engine->inbox), timeout_us);
    kv_inbox_awake(engine->inbox);
}

static void run_until(struct kv_engine *engine, bool (*done)(struct kv_engine *engine)) {
    while (!done(engine))
        if (!turn_once(engine)) sleep_once(engine);
}

static bool stop_asked(struct kv_engine *engine) {
    return atomic_load(&engine->stopping);
}

/* Draining is over when nothing runs and every session that could be closed is.  A commit that
 * fails leaves its session open: it is tried once, then the session is unloaded with the rest. */
static bool drained(struct kv_engine *engine) {
    if (engine->blocked.first || engine->laneless.first || engine->running.first) return false;
    for (uint32_t i = 0; i < engine->session_count; i++) {
        struct session *session = &engine->sessions[i];
        if (!session->open || session->used_us == UINT64_MAX) continue;
        if (!session_close_idle(engine, session)) return false;
        session->used_us = UINT64_MAX; /* tried */
    }
    return !engine->running.first && !engine->laneless.first && !engine->blocked.first;
}

void kv_engine_run(struct kv_engine *engine) {
    run_until(engine, stop_asked);
    atomic_store(&engine->ready, false);
    engine->draining = true;
    run_until(engine, drained);

    struct kv_request *late = kv_inbox_close(engine->inbox);
    start_requests(engine, late); /* each is told that the service is stopping */
}

void kv_engine_stop(struct kv_engine *engine) {
    atomic_store(&engine->stopping, true);
    kv_inbox_wake(engine->inbox);
}

bool kv_engine_ready(const struct kv_engine *engine) {
    return atomic_load(&engine->ready) && !atomic_load(&engine->stopping);
}

bool kv_engine_takes_pieces(const struct kv_engine *engine) {
    return engine->is_host;
}

struct kv_request *kv_engine_acquire(struct kv_engine *engine, bool with_staging) {
    return kv_inbox_acquire(engine->inbox, with_staging);
}

void kv_engine_release(struct kv_engine *engine, struct kv_request *request) {
    kv_inbox_release(engine->inbox, request);
}

void kv_engine_on_free(struct kv_engine *engine, void (*on_free)(void *context), void *context) {
    kv_inbox_on_free(engine->inbox, on_free, context);
}

void kv_engine_submit(struct kv_engine *engine, struct kv_request *request) {
    if (kv_inbox_push(engine->inbox, request)) return;
    request_fail(request, KV_UNAVAILABLE, "", "the service has stopped");
    request->on_done(request);
}
