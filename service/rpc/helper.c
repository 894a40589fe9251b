/* SPDX-License-Identifier: Apache-2.0 */
/* helper.c - the thread that moves calls nothing else would move.
 *
 *    waiting    a call that found no free request is on a list; when one becomes free the helper
 *               takes the first and lets it try again
 *    time       every TICK_MS: who has waited too long, which client does not read, which watcher
 *               has not heard, which stream is idle in a drain
 *
 * on_free runs on whichever thread released, possibly deep inside gRPC: it only leaves a note.
 */
#include <errno.h>
#include <time.h>

#include "service/rpc/internal.h"

/* ---- The waiting list ------------------------------------------------------------------------------ */

void helper_wait(struct call *call) {
    struct kv_rpc *rpc = call->rpc;
    if (!call->wait_ms) call->wait_ms = now_ms();
    pthread_mutex_lock(&rpc->lock);
    if (!call->in_wait) {
        call->in_wait = true;
        call->refs++;
        call->next_wait = NULL;
        *rpc->wait_last = call;
        rpc->wait_last = &call->next_wait;
    }
    pthread_mutex_unlock(&rpc->lock);
}

/* With rpc->lock.  The reference that the list held is the caller's to drop. */
static void list_remove(struct kv_rpc *rpc, struct call *call) {
    struct call **link = &rpc->wait_first;
    while (*link != call) link = &(*link)->next_wait;
    *link = call->next_wait;
    if (rpc->wait_last == &call->next_wait) rpc->wait_last = link;
    call->in_wait = false;
}

void helper_unwait(struct call *call) {
    struct kv_rpc *rpc = call->rpc;
    call->wait_ms = 0;
    pthread_mutex_lock(&rpc->lock);
    if (call->in_wait) {
        list_remove(rpc, call);
        call->refs--; /* never the last: whoever calls this is inside a step */
    }
    pthread_mutex_unlock(&rpc->lock);
}

void helper_freed(void *context) {
    struct kv_rpc *rpc = context;
    pthread_mutex_lock(&rpc->lock);
    if (rpc->wait_first) {
        rpc->freed = true;
        pthread_cond_signal(&rpc->changed);
    }
    pthread_mutex_unlock(&rpc->lock);
}

void helper_nudge(struct kv_rpc *rpc) {
    pthread_mutex_lock(&rpc->lock);
    rpc->freed = true;
    pthread_cond_signal(&rpc->changed);
    pthread_mutex_unlock(&rpc->lock);
}

/* Lets the first in line try; false: nobody waits, or it still has to. */
static bool serve_first(struct kv_rpc *rpc) {
    pthread_mutex_lock(&rpc->lock);
    struct call *call = rpc->wait_first;
    if (call) list_remove(rpc, call);
    pthread_mutex_unlock(&rpc->lock);
    if (!call) return false;

    pthread_mutex_lock(&call->lock);
    call_step(call, &rpc->helper_workspace);
    bool waits_again = call->in_wait;
    call_unlock(call, 1);
    return !waits_again;
}

/* ---- Time ------------------------------------------------------------------------------------------- */

/* What a tick has to know. */
struct tick {
    uint64_t now;
    bool draining, crowded; /* someone waits for a request */
};

/* Longer than `limit` ago.  What happened while the tick went round lies behind tick->now. */
static bool passed(const struct tick *tick, uint64_t since, uint64_t limit) {
    return tick->now > since && tick->now - since > limit;
}

static void cut_off(struct call *call, const char *why) {
    kv_log(KV_LOG_WARN, "rpc: %s cut off: %s", call->method->path, why);
    grpc_call_cancel_with_status(call->grpc, GRPC_STATUS_RESOURCE_EXHAUSTED, why, NULL);
    call->since_ms = 0;
}

static void tick_call(struct call *call, const struct tick *tick) {
    const struct kv_config *config = call->rpc->config;
    uint64_t stall = tick->crowded && call->pins_staging ? CROWDED_STALL_MS : config->stall_ms;
    if ((call->sending || call->finishing) && call->since_ms && passed(tick, call->since_ms, stall))
        cut_off(call, "the client does not read its answers");

    uint64_t patience =
        call->method->shape == SHAPE_UNARY ? UNARY_WAIT_MS : config->deadline_ms_max;
    if (call->wait_ms && passed(tick, call->wait_ms, patience))
        call_end(call, KV_BUSY, "every request of the service is in use");

    bool stream = call->method->shape == SHAPE_DUPLEX || call->method->shape == SHAPE_REFLECTION;
    if (tick->draining && stream && !call->ending && !call->in && !call->accepting &&
        passed(tick, call->active_ms, DRAIN_IDLE_MS)) {
        bool busy = false;
        for (uint32_t i = 0; i < FLIGHTS_MAX; i++)
            busy |= call->flights[i].state != FLIGHT_FREE;
        if (!busy) call_end(call, KV_UNAVAILABLE, "the service is stopping");
    }
}

static void tick_all(struct kv_rpc *rpc) {
    struct tick tick = {.now = now_ms()};
    pthread_mutex_lock(&rpc->lock);
    tick.draining = rpc->draining;
    tick.crowded = rpc->wait_first != NULL;
    pthread_mutex_unlock(&rpc->lock);

    for (uint32_t i = 0; i < rpc->call_count; i++) {
        struct call *call = &rpc->calls[i];
        pthread_mutex_lock(&call->lock);
        /* A slot that is free, or armed, has nobody to be kept waiting. */
        if (call->refs == 0 || call->armed) {
            pthread_mutex_unlock(&call->lock);
            continue;
        }
        call->refs++;
        tick_call(call, &tick);
        call_step(call, &rpc->helper_workspace);
        call_unlock(call, 1);
    }
}

static void *helper_run(void *context) {
    struct kv_rpc *rpc = context;
    uint64_t next_tick = now_ms() + TICK_MS;
    pthread_mutex_lock(&rpc->lock);
    while (!rpc->closing) {
        uint64_t now = now_ms();
        if (!rpc->freed && now < next_tick) {
            struct timespec until = {.tv_sec  = (time_t)(next_tick / 1000),
                                     .tv_nsec = (long)(next_tick % 1000) * 1000000};
            pthread_cond_timedwait(&rpc->changed, &rpc->lock, &until);
        }
        bool freed = rpc->freed;
        rpc->freed = false;
        pthread_mutex_unlock(&rpc->lock);

        while (freed && serve_first(rpc)) {
        }
        if (now_ms() >= next_tick) {
            tick_all(rpc);
            next_tick = now_ms() + TICK_MS;
        }
        pthread_mutex_lock(&rpc->lock);
    }
    pthread_mutex_unlock(&rpc->lock);
    return NULL;
}

enum kv_status helper_open(struct kv_rpc *rpc) {
    if (pthread_create(&rpc->helper, NULL, helper_run, rpc) != 0) return KV_BUSY;
    rpc->helper_started = true;
    kv_engine_on_free(rpc->engine, helper_freed, rpc);
    return KV_OK;
}

void helper_close(struct kv_rpc *rpc) {
    if (!rpc->helper_started) return;
    pthread_mutex_lock(&rpc->lock);
    rpc->closing = true;
    pthread_cond_signal(&rpc->changed);
    pthread_mutex_unlock(&rpc->lock);
    pthread_join(rpc->helper, NULL);
    rpc->helper_started = false;
}
