/* SPDX-License-Identifier: Apache-2.0 */
/* server.c - the server: its settings, its lanes, and how it stops.
 *
 * Settings that are not gRPC's defaults, each measured or reproduced with version 1.51:
 *
 *    resource quota            bounds what messages on their way may occupy
 *    compression off           blocks are incompressible; and a compressed message of a few bytes
 *                              could become a very large one
 *    keepalive                 a client that vanished without a word is noticed after 40 s
 *    generic call              without one, a call to an unknown method hangs until its deadline
 *
 * Connections come from listen.c, already accepted.  A TLS listener (a later issue) would be added
 * here with grpc_server_add_http2_port() and its credentials, because gRPC wraps only connections
 * that it accepted itself.
 */
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>
#include <grpc/support/log.h>
#include <grpc/support/time.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "proto/descriptors_c.h"
#include "service/rpc/internal.h"

static_assert(sizeof(struct kv_request) <= KV_CONFIG_REQUEST_BYTES, "the memory that is promised");

bool server_ready(struct kv_rpc *rpc) {
    pthread_mutex_lock(&rpc->lock);
    bool draining = rpc->draining;
    pthread_mutex_unlock(&rpc->lock);
    return !draining && kv_engine_ready(rpc->engine);
}

/* ---- New calls ----------------------------------------------------------------------------------- */

/* A call nobody serves: is it part of the contract, or a mistake? */
static void end_unknown(struct call *call) {
    char symbol[256], text[sizeof call->end.text];
    char *path = grpc_slice_to_c_string(call->details.method);
    const char *from = path[0] == '/' ? path + 1 : path;
    snprintf(symbol, sizeof symbol, "%s", from);
    char *slash = strchr(symbol, '/');
    if (slash) *slash = '.';
    if (slash && kv_standard_declares(call->rpc->standard, symbol))
        snprintf(text, sizeof text, "%.100s: not served by this version", slash + 1);
    else
        snprintf(text, sizeof text, "there is no method %.200s", from);
    call_end(call, KV_UNSUPPORTED, text);
    gpr_free(path);
}

/* A client came for this method; `call` is locked and nobody has seen it yet. */
static void on_accepted(struct call *call, bool ok) {
    struct kv_rpc *rpc = call->rpc;
    call->armed = false;
    if (!ok) return; /* the server is stopping: it goes back to the pool */

    pthread_mutex_lock(&rpc->lock);
    bool crowded = ++rpc->live > rpc->config->calls_max;
    call->number = ++rpc->streams;
    pthread_mutex_unlock(&rpc->lock);

    if (call->method->shape == SHAPE_UNKNOWN) call->deadline = call->details.deadline;
    call_begin(call);
    call->in = call->arriving;
    call->arriving = NULL;
    bool question = call->method->shape == SHAPE_UNARY || call->method->shape == SHAPE_PAGES ||
                    call->method->shape == SHAPE_CHECK || call->method->shape == SHAPE_WATCH;
    if (call->method->shape == SHAPE_UNKNOWN)
        end_unknown(call);
    else if (crowded)
        call_end(call, KV_BUSY, "calls_max calls are open");
    else if (question && !call->in)
        call_end(call, KV_INVALID, "the call came without a message");
}

/* Makes the server accept one more call of a method.  Without a free call it is owed, and done when
 * one is recycled. */
void server_arm(struct kv_rpc *rpc, uint32_t method, uint32_t lane) {
    const struct method *what = &methods[method];
    grpc_completion_queue *queue = rpc->lanes[lane].queue;
    struct call *call = call_take(rpc);

    pthread_mutex_lock(&rpc->lock);
    bool wanted = !rpc->draining;
    if (!call && wanted) {
        rpc->debts[rpc->debt_count].method = method;
        rpc->debts[rpc->debt_count++].lane = lane;
    }
    if (call && !wanted) {
        call->next_free = rpc->free_calls;
        rpc->free_calls = call;
    }
    pthread_mutex_unlock(&rpc->lock);
    if (!call || !wanted) return;

    call_prepare(call, what, &rpc->lanes[lane], on_accepted);
    grpc_call_error error;
    if (what->shape == SHAPE_UNKNOWN) {
        error = grpc_server_request_call(rpc->server, &call->grpc, &call->details, &call->metadata,
                                         queue, queue, &call->accepted);
    } else {
        bool question = what->shape != SHAPE_DUPLEX && what->shape != SHAPE_REFLECTION;
        error = grpc_server_request_registered_call(
            rpc->server, rpc->registered[method], &call->grpc, &call->deadline, &call->metadata,
            question ? &call->arriving : NULL, queue, queue, &call->accepted);
    }
    KV_CHECK(error == GRPC_CALL_OK);
}

/* ---- Lanes ---------------------------------------------------------------------------------------- */

/* The next event.  For spin_us after the last one the queue is asked without sleeping. */
static grpc_event lane_next(struct lane *lane, uint64_t *spin_until) {
    uint32_t spin_us = lane->rpc->config->spin_us;
    struct timespec now;
    while (spin_us) {
        grpc_event event = grpc_completion_queue_next(lane->queue, gpr_inf_past(GPR_CLOCK_MONOTONIC),
                                                      NULL);
        clock_gettime(CLOCK_MONOTONIC, &now);
        uint64_t at = (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
        if (event.type != GRPC_QUEUE_TIMEOUT) {
            *spin_until = at + spin_us;
            return event;
        }
        if (at >= *spin_until) break;
    }
    grpc_event event =
        grpc_completion_queue_next(lane->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    if (spin_us) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        *spin_until = (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000 + spin_us;
    }
    return event;
}

static void *lane_run(void *context) {
    struct lane *lane = context;
    uint64_t spin_until = 0;
    for (;;) {
        grpc_event event = lane_next(lane, &spin_until);
        if (event.type == GRPC_QUEUE_SHUTDOWN) return NULL;
        struct tag *tag = event.tag;
        struct call *call = tag->call;
        if (!call) { /* the server has shut down */
            pthread_mutex_lock(&lane->rpc->lock);
            lane->rpc->shut = true;
            pthread_cond_broadcast(&lane->rpc->drained);
            pthread_mutex_unlock(&lane->rpc->lock);
            continue;
        }
        pthread_mutex_lock(&call->lock);
        /* An accepted call begins without references: it takes its first here. */
        bool first = tag == &call->accepted;
        uint32_t method = (uint32_t)(call->method - methods);
        if (first) call->refs++;
        tag->run(call, event.success);
        if (call->grpc) call_step(call, &lane->workspace);
        call_unlock(call, 1);
        /* Only now, so that no two calls are ever locked at once; the other armed one covers. */
        if (first && event.success)
            server_arm(lane->rpc, method, (uint32_t)(lane - lane->rpc->lanes));
    }
}

static enum kv_status workspace_open(struct workspace *workspace, uint64_t message_bytes_max) {
    /* The rest of a message is at most the message; unpacked it may be larger, within reason. */
    workspace->scratch_bytes = (size_t)message_bytes_max + (64 << 10);
    workspace->memory_bytes = 2 * (size_t)message_bytes_max;
    workspace->scratch = malloc(workspace->scratch_bytes);
    workspace->memory = malloc(workspace->memory_bytes);
    return workspace->scratch && workspace->memory ? KV_OK : KV_BUSY;
}

static void workspace_close(struct workspace *workspace) {
    free(workspace->scratch);
    free(workspace->memory);
}

/* ---- Opening --------------------------------------------------------------------------------------- */

static grpc_arg argument(const char *key, int value) {
    return (grpc_arg){.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)key, .value.integer = value};
}

static void server_create(struct kv_rpc *rpc) {
    const struct kv_config *config = rpc->config;
    rpc->quota = grpc_resource_quota_create("kivid");
    grpc_resource_quota_resize(rpc->quota, config->rpc_bytes_max);
    grpc_arg arguments[] = {
        argument(GRPC_ARG_MAX_CONCURRENT_STREAMS, (int)config->streams_max),
        /* The largest payload, and the fields around it. */
        argument(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)config->message_bytes_max + (64 << 10)),
        argument(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1),
        argument(GRPC_ARG_ENABLE_PER_MESSAGE_COMPRESSION, 0),
        argument(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1), /* identity alone */
        argument(GRPC_ARG_KEEPALIVE_TIME_MS, 30000),
        argument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000),
        argument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
        argument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        argument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 9000),
        {.type          = GRPC_ARG_POINTER,
         .key           = (char *)(uintptr_t)GRPC_ARG_RESOURCE_QUOTA,
         .value.pointer = {rpc->quota, grpc_resource_quota_arg_vtable()}},
    };
    grpc_channel_args channel = {sizeof arguments / sizeof arguments[0], arguments};
    rpc->server = grpc_server_create(&channel, NULL);

    for (uint32_t i = 0; i < rpc->lane_count; i++) {
        rpc->lanes[i].rpc = rpc;
        rpc->lanes[i].queue = grpc_completion_queue_create_for_next(NULL);
        grpc_server_register_completion_queue(rpc->server, rpc->lanes[i].queue, NULL);
    }
    for (size_t i = 0; i < method_count; i++) {
        enum shape shape = methods[i].shape;
        if (shape == SHAPE_UNKNOWN) continue;
        bool question = shape != SHAPE_DUPLEX && shape != SHAPE_REFLECTION;
        rpc->registered[i] = grpc_server_register_method(
            rpc->server, methods[i].path, NULL,
            question ? GRPC_SRM_PAYLOAD_READ_INITIAL_BYTE_BUFFER : GRPC_SRM_PAYLOAD_NONE, 0);
        KV_CHECK(rpc->registered[i]);
    }
    grpc_server_start(rpc->server);
}

static enum kv_status pool_open(struct kv_rpc *rpc) {
    uint32_t armed = (uint32_t)method_count * rpc->lane_count * ARMED;
    rpc->call_count = rpc->config->calls_max + armed + SPARE_CALLS;
    rpc->calls = calloc(rpc->call_count, sizeof *rpc->calls);
    rpc->debts = calloc(armed, sizeof *rpc->debts);
    if (!rpc->calls || !rpc->debts) return KV_BUSY;
    for (uint32_t i = 0; i < rpc->call_count; i++) {
        struct call *call = &rpc->calls[rpc->call_count - 1 - i];
        pthread_mutex_init(&call->lock, NULL);
        call->next_free = rpc->free_calls;
        rpc->free_calls = call;
    }
    return KV_OK;
}

static enum kv_status lanes_open(struct kv_rpc *rpc) {
    uint64_t message_bytes_max = rpc->config->message_bytes_max;
    enum kv_status status = workspace_open(&rpc->helper_workspace, message_bytes_max);
    for (uint32_t i = 0; i < rpc->lane_count && status == KV_OK; i++)
        status = workspace_open(&rpc->lanes[i].workspace, message_bytes_max);
    for (uint32_t i = 0; i < rpc->lane_count && status == KV_OK; i++) {
        for (uint32_t method = 0; method < method_count; method++)
            for (uint32_t n = 0; n < ARMED; n++) server_arm(rpc, method, i);
        rpc->lanes[i].started =
            pthread_create(&rpc->lanes[i].thread, NULL, lane_run, &rpc->lanes[i]) == 0;
        if (!rpc->lanes[i].started) status = KV_BUSY;
    }
    return status;
}

/* gRPC's own complaints, in our log. */
static void log_from_grpc(gpr_log_func_args *from) {
    enum kv_log_level level = from->severity == GPR_LOG_SEVERITY_ERROR  ? KV_LOG_WARN
                              : from->severity == GPR_LOG_SEVERITY_INFO ? KV_LOG_INFO
                                                                        : KV_LOG_DEBUG;
    kv_log(level, "grpc: %s", from->message);
}

enum kv_status kv_rpc_open(const struct kv_config *config, struct kv_engine *engine,
                           struct kv_rpc **out, char *why) {
    static struct kv_standard standard;
    standard.descriptors = (struct kv_span){kv_descriptors, kv_descriptors_bytes};
    struct kv_rpc *rpc = calloc(1, sizeof *rpc);
    if (!rpc) return KV_BUSY;
    rpc->config = config;
    rpc->engine = engine;
    rpc->lend = kv_engine_takes_pieces(engine);
    rpc->standard = &standard;
    rpc->lane_count = config->rpc_threads;
    rpc->wait_last = &rpc->wait_first;
    rpc->shut_tag = (struct tag){NULL, NULL};
    pthread_mutex_init(&rpc->lock, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&rpc->changed, &monotonic);
    pthread_cond_init(&rpc->drained, &monotonic);
    pthread_condattr_destroy(&monotonic);

    gpr_set_log_function(log_from_grpc);
    grpc_init();
    snprintf(why, KV_CONFIG_WHY_MAX, "rpc: not enough memory or threads");
    server_create(rpc);
    enum kv_status status = pool_open(rpc);
    if (status == KV_OK) status = lanes_open(rpc);
    if (status == KV_OK) status = helper_open(rpc);
    if (status == KV_OK) status = listener_open(rpc, &rpc->listener, why);
    if (status != KV_OK) {
        kv_rpc_drain(rpc, 0);
        kv_rpc_close(rpc);
        return status;
    }
    *out = rpc;
    return KV_OK;
}

/* ---- Stopping ---------------------------------------------------------------------------------------- */

/* Sleeps until `*done` (guarded by rpc->lock, which is held) or the moment; false: the moment. */
static bool wait_for(struct kv_rpc *rpc, const bool *done, uint64_t until_ms, bool hurried) {
    struct timespec until = {.tv_sec  = (time_t)(until_ms / 1000),
                             .tv_nsec = (long)(until_ms % 1000) * 1000000};
    while (!*done && now_ms() < until_ms && !(hurried && rpc->hurry))
        pthread_cond_timedwait(&rpc->drained, &rpc->lock, &until);
    return *done;
}

bool kv_rpc_drain(struct kv_rpc *rpc, uint32_t grace_ms) {
    uint64_t until_ms = now_ms() + grace_ms;
    listener_stop(rpc->listener);
    pthread_mutex_lock(&rpc->lock);
    rpc->draining = true;
    uint32_t live = rpc->live;
    pthread_mutex_unlock(&rpc->lock);
    kv_log(KV_LOG_INFO, "rpc: draining, %u calls are open", live);

    grpc_server_shutdown_and_notify(rpc->server, rpc->lanes[0].queue, &rpc->shut_tag);
    if (!rpc->lanes[0].started) return true; /* never served; close waits for the tag */

    pthread_mutex_lock(&rpc->lock);
    bool polite = wait_for(rpc, &rpc->shut, until_ms, true);
    if (!polite) {
        /* Without calls it was only a client that does not close its connection. */
        polite = rpc->live == 0;
        kv_log(polite ? KV_LOG_INFO : KV_LOG_WARN, "rpc: the grace is over, %u calls are cut off",
               rpc->live);
        pthread_mutex_unlock(&rpc->lock);
        grpc_server_cancel_all_calls(rpc->server);
        pthread_mutex_lock(&rpc->lock);
        /* gRPC's part is prompt now; ours takes as long as the engine needs to notice. */
        bool shut = wait_for(rpc, &rpc->shut, UINT64_MAX / 2, false);
        KV_CHECK(shut);
    }
    bool none = false;
    uint64_t patience = now_ms() + rpc->config->deadline_ms_max + 1000;
    while (rpc->live > 0 && now_ms() < patience) wait_for(rpc, &none, now_ms() + TICK_MS, false);
    if (rpc->live > 0) kv_log(KV_LOG_ERROR, "rpc: %u calls did not end", rpc->live);
    pthread_mutex_unlock(&rpc->lock);
    return polite;
}

void kv_rpc_hurry(struct kv_rpc *rpc) {
    pthread_mutex_lock(&rpc->lock);
    rpc->hurry = true;
    pthread_cond_broadcast(&rpc->drained);
    pthread_mutex_unlock(&rpc->lock);
}

void kv_rpc_close(struct kv_rpc *rpc) {
    helper_close(rpc);
    kv_engine_on_free(rpc->engine, NULL, NULL);
    if (rpc->listener) listener_close(rpc->listener);

    for (uint32_t i = 0; i < rpc->lane_count; i++) {
        struct lane *lane = &rpc->lanes[i];
        grpc_completion_queue_shutdown(lane->queue);
        if (lane->started)
            pthread_join(lane->thread, NULL);
        else
            while (grpc_completion_queue_next(lane->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL)
                       .type != GRPC_QUEUE_SHUTDOWN) {
            }
    }
    grpc_server_destroy(rpc->server);
    for (uint32_t i = 0; i < rpc->lane_count; i++) {
        grpc_completion_queue_destroy(rpc->lanes[i].queue);
        workspace_close(&rpc->lanes[i].workspace);
    }
    workspace_close(&rpc->helper_workspace);
    grpc_resource_quota_unref(rpc->quota);
    /* Blocking: slices that point into staging are released before it returns. */
    grpc_shutdown_blocking();

    for (uint32_t i = 0; rpc->calls && i < rpc->call_count; i++)
        pthread_mutex_destroy(&rpc->calls[i].lock);
    free(rpc->calls);
    free(rpc->debts);
    pthread_cond_destroy(&rpc->changed);
    pthread_cond_destroy(&rpc->drained);
    pthread_mutex_destroy(&rpc->lock);
    free(rpc);
}
