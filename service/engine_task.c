/* SPDX-License-Identifier: Apache-2.0 */
/* engine_task.c - who runs when: turns, lanes, waiting, stopping.
 *
 * A task is in one list at a time:
 *
 *   free --start--> blocked --all turns are its own--> laneless --a lane is free--> running --> free
 *
 * Only `running` is looked at in every turn of the loop, and it is short: a task per lane, and the
 * few that need none.  The other two are looked at when a turn or a lane is given back, and every
 * few milliseconds for those that were cancelled or are too late.
 */
#include "service/engine_private.h"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>

uint64_t engine_clock_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

void list_append(struct task_list *list, struct task *task) {
    KV_CHECK(!task->list);
    task->list = list;
    task->next = NULL;
    task->prev = list->last;
    if (list->last) list->last->next = task;
    else list->first = task;
    list->last = task;
}

void list_remove(struct task *task) {
    struct task_list *list = task->list;
    KV_CHECK(list);
    if (task->prev) task->prev->next = task->next;
    else list->first = task->next;
    if (task->next) task->next->prev = task->prev;
    else list->last = task->prev;
    task->list = NULL;
    task->next = task->prev = NULL;
}

/* ---- Answers ------------------------------------------------------------------------------ */

void request_fail(struct kv_request *request, enum kv_status status, const char *field,
                  const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(request->message, sizeof request->message, format, values);
    va_end(values);
    snprintf(request->field, sizeof request->field, "%s", field);
    request->status = status;
    request->reply_bytes = 0;
    if (status != KV_BUSY) return;
    if (request->scope == KV_SCOPE_NONE) request->scope = KV_SCOPE_NODE;
    request->retry_ms = RETRY_MS;
}

void request_fail_memory(struct kv_engine *engine, struct kv_request *request) {
    bool capped = engine->tail.used + (engine->tail.max >> 4) >= engine->tail.max;
    request_fail(request, KV_BUSY, "",
                 "no room for exact tokens: open sessions hold %llu of %llu bytes%s",
                 (unsigned long long)engine->tail.used, (unsigned long long)engine->tail.max,
                 capped ? "" : ", and the arena is in use");
}

void task_answer(struct kv_engine *engine, struct task *task) {
    struct kv_request *request = task->request;
    if (!request) return;
    task->request = NULL;
    engine->stats.requests++;
    engine->stats.bytes_in += request->bytes_in;
    if (request->status != KV_OK) engine->stats.errors++;
    else engine->stats.bytes_out += request->reply_bytes;
    request->on_done(request);
}

static void answer_stopped(struct kv_engine *engine, struct task *task) {
    if (!task->request) return;
    const char *why = task->stopped == KV_CANCELLED  ? "the client went away"
                      : task->stopped == KV_DEADLINE ? "the deadline passed"
                                                     : "the service is stopping";
    request_fail(task->request, task->stopped, "", "%s", why);
    task_answer(engine, task);
}

/* ---- Turns and lanes ------------------------------------------------------------------------- */

void task_take_turn(struct task *task, struct session *session) {
    KV_CHECK(task->turn_count < KV_ATTEND_ITEMS_MAX);
    struct turn *turn = &task->turns[task->turn_count++];
    *turn = (struct turn){.task = task, .session = session};
    if (session->turn_last) {
        session->turn_last->next = turn;
        task->turns_missing++;
    } else {
        session->turn_first = turn;
    }
    session->turn_last = turn;
}

/* A slot that nobody waits for and nothing is open in belongs to nobody.  A name that was never
 * committed goes with it. */
static void slot_release(struct kv_engine *engine, struct session *session) {
    if (session->turn_first || session->open || !session->known) return;
    struct known *known = session->known;
    session->known = NULL;
    known->session = NULL;
    if (!known->committed) names_remove(&engine->names, known);
}

static void turn_give_back(struct kv_engine *engine, struct turn *turn) {
    struct session *session = turn->session;
    if (session->turn_first == turn) {
        session->turn_first = turn->next;
        if (!turn->next) session->turn_last = NULL;
        else if (--turn->next->task->turns_missing == 0) {
            list_remove(turn->next->task);
            turn->next->task->wait = WAIT_LANE;
            list_append(&engine->laneless, turn->next->task);
        }
    } else { /* it never was ours: leave the queue in the middle */
        struct turn *before = session->turn_first;
        while (before->next != turn) before = before->next;
        before->next = turn->next;
        if (session->turn_last == turn) session->turn_last = before;
    }
    slot_release(engine, session);
}

void task_enqueue(struct kv_engine *engine, struct task *task, step_fn *step) {
    task->step = step;
    task->wait = task->turns_missing ? WAIT_TURN : WAIT_LANE;
    list_append(task->turns_missing ? &engine->blocked : &engine->laneless, task);
}

void task_run(struct kv_engine *engine, struct task *task, step_fn *step) {
    task_again(task, step);
    list_append(&engine->running, task);
}

static void lane_take(struct kv_engine *engine, struct task *task) {
    struct lane *lane = engine->lanes;
    while (lane->task) lane++;
    lane->task = task;
    lane->part_count = 0;
    lane->fault_count = 0;
    atomic_store_explicit(&lane->cancel, false, memory_order_relaxed);
    for (int i = 0; i < 2; i++) lane->waves[i].state = WAVE_FREE;
    engine->lanes_free--;
    task->lane = lane;
}

/* ---- Waiting ---------------------------------------------------------------------------------- */

void task_wait_ticket(struct kv_engine *engine, struct task *task, step_fn *step) {
    task->ticket = kv_stream_mark(task->lane->stream);
    task->step = step;
    if (kv_stream_reached(task->lane->stream, task->ticket)) { /* it ran in place */
        task->wait = WAIT_AGAIN;
        return;
    }
    kv_stream_notify(task->lane->stream, kv_inbox_wake_fd(engine->inbox));
    task->wait = WAIT_TICKET;
}

void task_wait_store(struct task *task, step_fn *step) {
    task->wait = WAIT_STORE;
    task->step = step;
}

void task_again(struct task *task, step_fn *step) {
    task->wait = WAIT_AGAIN;
    task->step = step;
}

bool task_wait_memory(struct kv_engine *engine, struct task *task, step_fn *step) {
    if (task->give_up_us == 0) task->give_up_us = engine->now_us + MEMORY_WAIT_US;
    if (engine->now_us >= task->give_up_us || task->stopped != KV_OK) return false;
    task->retry_us = engine->now_us + RETRY_US;
    task->wait = WAIT_MEMORY;
    task->step = step;
    return true;
}

static bool task_ready(const struct kv_engine *engine, const struct task *task) {
    switch (task->wait) {
    case WAIT_TICKET: return kv_stream_reached(task->lane->stream, task->ticket);
    case WAIT_STORE: return task->store_pending == 0;
    case WAIT_MEMORY:
        return engine->store_progress || engine->now_us >= task->retry_us || task->stopped != KV_OK;
    case WAIT_AGAIN: return true;
    default: return false;
    }
}

static void sync_done(struct kv_sync *sync, enum kv_status status) {
    struct task *task = sync->owner;
    sync->owner = NULL;
    task->store_pending--;
    if (status == KV_UNAVAILABLE) task->no_disk = true;
    else if (status != KV_OK && status != KV_NOT_FOUND && task->store_status == KV_OK)
        task->store_status = status;
}

void task_sync(struct kv_engine *engine, struct task *task, struct kv_sync *sync,
               const struct kv_digest *key, enum kv_durability durability) {
    *sync = (struct kv_sync){
        .key = *key, .durability = durability, .on_done = sync_done, .owner = task};
    task->store_pending++;
    kv_store_sync(engine->options.store, sync);
}

void task_on_pinned(struct kv_pin *pin, enum kv_status status) {
    struct task *task = pin->owner;
    task->store_pending--;
    if (status != KV_OK && task->store_status == KV_OK) task->store_status = status;
}

static void one_pinned(struct kv_pin *pin, enum kv_status status) {
    struct wave *wave = (struct wave *)((char *)pin - offsetof(struct wave, pin));
    task_on_pinned(pin, KV_OK);
    wave->status = status;
}

void pin_one(struct kv_engine *engine, struct task *task, const struct kv_digest *key,
             uint64_t tag, int32_t part) {
    struct wave *wave = &task->lane->waves[0];
    wave->keys[0] = *key;
    wave->pin.keys = wave->keys;
    wave->pin.addresses = wave->addresses;
    wave->pin.entries_private = wave->entries;
    wave->pin.count = 1;
    wave->pin.part = part;
    wave->pin.tag = tag;
    wave->pin.on_ready = one_pinned;
    wave->pin.owner = task;
    wave->status = kv_store_pin_now(engine->options.store, &wave->pin);
    if (wave->status != KV_BUSY) return;
    task->store_pending++;
    kv_store_pin(engine->options.store, &wave->pin);
}

/* ---- Life ---------------------------------------------------------------------------------------- */

struct task *task_create(struct kv_engine *engine, struct kv_request *request) {
    struct task *task = engine->free_tasks.first;
    if (!task) return NULL;
    list_remove(task);
    memset(&task->open, 0, sizeof task->open);
    memset(&task->commit, 0, sizeof task->commit);
    memset(&task->attend, 0, sizeof task->attend);
    task->request = request;
    task->stopped = KV_OK;
    task->retry_us = task->give_up_us = 0;
    task->lane = NULL;
    task->ticket = 0;
    task->store_pending = 0;
    task->store_status = KV_OK;
    task->no_disk = task->is_put = false;
    task->turn_count = task->turns_missing = 0;
    uint64_t latest = engine->now_us + engine->options.deadline_ms_max * 1000ull;
    bool given = request && request->deadline_us && request->deadline_us < latest;
    task->deadline_us = given ? request->deadline_us : latest;
    return task;
}

void task_finish(struct kv_engine *engine, struct task *task) {
    task_answer(engine, task);
    if (task->list) list_remove(task);
    for (uint32_t i = 0; i < task->turn_count; i++) turn_give_back(engine, &task->turns[i]);
    if (task->lane) {
        task->lane->task = NULL;
        engine->lanes_free++;
    }
    task->lane = NULL;
    task->wait = WAIT_ENDED;
    list_append(&engine->free_tasks, task);
}

void task_fail(struct kv_engine *engine, struct task *task, enum kv_status status,
               const char *field, const char *message) {
    if (task->request) request_fail(task->request, status, field, "%s", message);
    task_finish(engine, task);
}

bool task_was_stopped(struct kv_engine *engine, struct task *task) {
    if (task->stopped == KV_OK) return false;
    task_fail(engine, task, task->stopped, "", "stopped before it was done");
    return true;
}

/* A task that has not begun is simply dropped; one that waits for the store is answered now and
 * ends later; one whose kernels run is told to hurry. */
static void task_stop(struct kv_engine *engine, struct task *task, enum kv_status why) {
    task->stopped = why;
    if (!task->lane && task->wait != WAIT_STORE && task->list != &engine->running) {
        answer_stopped(engine, task);
        task_finish(engine, task);
        return;
    }
    if (task->lane) atomic_store_explicit(&task->lane->cancel, true, memory_order_relaxed);
    bool kernels = task->lane && task->ticket &&
                   !kv_stream_reached(task->lane->stream, task->ticket);
    if (task->wait == WAIT_STORE && !kernels) answer_stopped(engine, task);
}

static void expire(struct kv_engine *engine, struct task *task) {
    if (!task->request || task->stopped != KV_OK) return;
    if (atomic_load_explicit(&task->request->cancelled, memory_order_relaxed))
        task_stop(engine, task, KV_CANCELLED);
    else if (engine->now_us >= task->deadline_us) task_stop(engine, task, KV_DEADLINE);
    else if (engine->draining && !task->lane && task->list != &engine->running)
        task_stop(engine, task, KV_UNAVAILABLE);
}

static void expire_list(struct kv_engine *engine, struct task_list *list) {
    struct task *next;
    for (struct task *task = list->first; task; task = next) {
        next = task->next;
        expire(engine, task);
    }
}

void engine_expire_tasks(struct kv_engine *engine) {
    /* Dropping a blocked task moves others to `laneless` and never removes them. */
    expire_list(engine, &engine->blocked);
    expire_list(engine, &engine->laneless);
    expire_list(engine, &engine->running);
}

/* Work of this task may run here and now if nobody waits for the engine meanwhile: it is the only task
 * that runs, and no request has come since.  One that comes now waits KV_IN_PLACE_NS at most. */
bool engine_is_free(const struct kv_engine *engine) {
    return engine->running.first == engine->running.last && !engine->laneless.first &&
           !kv_inbox_waiting(engine->inbox);
}

/* A task that is too late already is not begun. */
static bool start_laneless(struct kv_engine *engine) {
    bool moved = false;
    while (engine->lanes_free && engine->laneless.first) {
        struct task *task = engine->laneless.first;
        moved = true;
        expire(engine, task);
        if (task->wait == WAIT_ENDED) continue;
        list_remove(task);
        lane_take(engine, task);
        task->wait = WAIT_AGAIN;
        list_append(&engine->running, task);
    }
    return moved;
}

bool engine_step_tasks(struct kv_engine *engine) {
    bool moved = start_laneless(engine);
    struct task *last = engine->running.last, *next;
    for (struct task *task = engine->running.first; task; task = next) {
        bool is_last = task == last;
        next = is_last ? NULL : task->next;
        if (!task_ready(engine, task)) continue;
        moved = true;
        if (task->lane) kv_stream_in_place(task->lane->stream, engine_is_free(engine));
        task->step(engine, task); /* removes nobody but itself from this list */
    }
    return moved;
}
