/* SPDX-License-Identifier: Apache-2.0 */
/* local.c - calls that never reach the engine: health, and reflection.
 *
 * Readiness and liveness differ: "live" is SERVING while the process answers, so that a service
 * that drains is not killed for it; every other name is about whether new work is taken.
 */
#include <grpc/byte_buffer.h>
#include <grpc/slice.h>

#include "service/rpc/internal.h"

static uint8_t *slice_room(void *context, size_t bytes) {
    grpc_slice *slice = context;
    *slice = grpc_slice_malloc(bytes);
    return GRPC_SLICE_START_PTR(*slice);
}

static grpc_byte_buffer *slice_message(grpc_slice slice) {
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return message;
}

/* Takes the message that arrived apart; false: it is damaged, and the call ends. */
static bool take_in(struct call *call, struct workspace *workspace, struct kv_inbound *in) {
    *in = (struct kv_inbound){.memory = workspace->memory, .memory_bytes = workspace->memory_bytes};
    size_t count = call_pieces(call->in, workspace->pieces);
    return count && kv_wire_split(workspace->pieces, count, workspace->scratch,
                                  workspace->scratch_bytes, &in->wire) == KV_OK;
}

static void drop_in(struct call *call) {
    grpc_byte_buffer_destroy(call->in);
    call->in = NULL;
}

static enum kv_health health_of(struct kv_rpc *rpc, const char *service) {
    static const char *const ready[] = {"", "kivi.v1.Kivi", "kivi.v1.Admin"};
    if (strcmp(service, "live") == 0) return KV_HEALTH_SERVING;
    for (size_t i = 0; i < sizeof ready / sizeof ready[0]; i++)
        if (strcmp(service, ready[i]) == 0)
            return server_ready(rpc) ? KV_HEALTH_SERVING : KV_HEALTH_NOT_SERVING;
    return KV_HEALTH_UNKNOWN;
}

static grpc_byte_buffer *health_message(enum kv_health health) {
    grpc_slice slice;
    kv_health_encode(health, slice_room, &slice);
    return slice_message(slice);
}

/* The question of Check and of Watch. */
static bool health_question(struct call *call, struct workspace *workspace) {
    struct kv_inbound in;
    bool ok = take_in(call, workspace, &in) &&
              kv_health_service(&in, call->service, sizeof call->service) == KV_OK;
    drop_in(call);
    if (!ok) call_end(call, KV_INVALID, "the message is damaged");
    return ok;
}

static void check_step(struct call *call, struct workspace *workspace) {
    if (!call->in || !workspace || call->ending) return;
    if (!health_question(call, workspace)) return;
    enum kv_health health = health_of(call->rpc, call->service);
    if (health == KV_HEALTH_UNKNOWN)
        call_end(call, KV_NOT_FOUND, "there is no such service");
    else
        call_finish(call, health_message(health));
}

/* Tells the status, and tells it again when it changes.  In a drain it is told once more and the
 * stream ends: a watcher must not hold it up. */
static void watch_step(struct call *call, struct workspace *workspace) {
    if (call->in && workspace && !call->ending) {
        if (!health_question(call, workspace)) return;
        call->told = 0;
    }
    if (call->told < 0 || call->sending || call->gone) return;
    enum kv_health health = health_of(call->rpc, call->service);
    if (call->told != (int)health) {
        call->told = (int)health;
        call_send(call, health_message(health));
        return;
    }
    pthread_mutex_lock(&call->rpc->lock);
    bool draining = call->rpc->draining;
    pthread_mutex_unlock(&call->rpc->lock);
    if (draining) call_end(call, KV_UNAVAILABLE, "the service is stopping");
}

static void reflection_step(struct call *call, struct workspace *workspace) {
    if (call->in && workspace && !call->sending && call->end.code == GRPC_STATUS_OK) {
        struct kv_inbound in;
        grpc_slice slice;
        bool ok = take_in(call, workspace, &in) &&
                  kv_reflection_answer(call->rpc->standard, &in, slice_room, &slice) == KV_OK;
        drop_in(call);
        if (ok)
            call_send(call, slice_message(slice));
        else
            call_end(call, KV_INVALID, "the message is damaged");
    }
    if (!call->ending && !call->reading && !call->in && !call->sending) call_read(call);
}

void local_step(struct call *call, struct workspace *workspace) {
    switch (call->method->shape) {
    case SHAPE_CHECK: check_step(call, workspace); break;
    case SHAPE_WATCH: watch_step(call, workspace); break;
    default: reflection_step(call, workspace); break;
    }
    if (call->ending && !call->finishing && !call->sending && !call->in) call_finish(call, NULL);
}
