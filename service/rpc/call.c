/* SPDX-License-Identifier: Apache-2.0 */
/* call.c - one call of one client: its batches, its end, its place in the pool.
 *
 * gRPC's rules, all learned the hard way: memory given to a batch stays until its tag comes back;
 * one send and one receive outstanding; a receive may come back before the send that caused it;
 * the status is a batch too, and the call is over only when every tag has come back.  `refs`
 * counts them.
 */
#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/slice.h>
#include <grpc/support/time.h>
#include <stdio.h>
#include <time.h>

#include "service/rpc/internal.h"

uint64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* ---- The pool ----------------------------------------------------------------------------------- */

struct call *call_take(struct kv_rpc *rpc) {
    pthread_mutex_lock(&rpc->lock);
    struct call *call = rpc->free_calls;
    if (call) rpc->free_calls = call->next_free;
    pthread_mutex_unlock(&rpc->lock);
    return call;
}

static void on_over(struct call *call, bool ok);
static void on_greeted(struct call *call, bool ok);
static void on_received(struct call *call, bool ok);
static void on_sent(struct call *call, bool ok);
static void on_finished(struct call *call, bool ok);

/* Everything but the lock starts anew.  The helper looks at every slot at any time, so it is done
 * with the lock held. */
void call_prepare(struct call *call, const struct method *method, struct lane *lane,
                  void (*accepted)(struct call *call, bool ok)) {
    struct kv_rpc *rpc = lane->rpc;
    pthread_mutex_lock(&call->lock);
    memset(&call->lock + 1, 0, sizeof *call - sizeof call->lock);
    call->rpc = rpc;
    call->lane = lane;
    call->method = method;
    call->armed = true;
    call->end_sequence = UINT64_MAX;
    call->told = -1;
    call->accepted = (struct tag){accepted, call};
    call->over = (struct tag){on_over, call};
    call->greeted = (struct tag){on_greeted, call};
    call->received = (struct tag){on_received, call};
    call->sent = (struct tag){on_sent, call};
    call->finished = (struct tag){on_finished, call};
    for (uint32_t i = 0; i < FLIGHTS_MAX; i++) call->flights[i].call = call;
    grpc_metadata_array_init(&call->metadata);
    grpc_call_details_init(&call->details);
    call->end_text = grpc_empty_slice();
    pthread_mutex_unlock(&call->lock);
}

static void recycle(struct call *call) {
    struct kv_rpc *rpc = call->rpc;
    if (call->in) grpc_byte_buffer_destroy(call->in);
    if (call->arriving) grpc_byte_buffer_destroy(call->arriving);
    if (call->out) grpc_byte_buffer_destroy(call->out);
    for (size_t i = 0; i < call->trailer_count; i++) grpc_slice_unref(call->trailers[i].value);
    grpc_slice_unref(call->end_text);
    pages_free(call);
    grpc_metadata_array_destroy(&call->metadata);
    grpc_call_details_destroy(&call->details);
    bool was_live = call->grpc != NULL;
    if (call->grpc) grpc_call_unref(call->grpc);
    call->grpc = NULL;

    uint32_t method = 0, lane = 0;
    pthread_mutex_lock(&rpc->lock);
    call->next_free = rpc->free_calls;
    rpc->free_calls = call;
    rpc->live -= was_live;
    bool owed = rpc->debt_count > 0 && !rpc->draining;
    if (owed) {
        rpc->debt_count--;
        method = rpc->debts[rpc->debt_count].method;
        lane = rpc->debts[rpc->debt_count].lane;
    }
    if (rpc->live == 0) pthread_cond_broadcast(&rpc->drained);
    pthread_mutex_unlock(&rpc->lock);
    if (owed) server_arm(rpc, method, lane);
}

void call_unlock(struct call *call, uint32_t refs) {
    KV_CHECK(call->refs >= refs);
    call->refs -= refs;
    bool last = call->refs == 0;
    pthread_mutex_unlock(&call->lock);
    /* Nothing refers to it any more but this function: no tag is out, no flight, no list. */
    if (last) recycle(call);
}

/* ---- Batches ------------------------------------------------------------------------------------ */

static void batch(struct call *call, const grpc_op *operations, size_t count, struct tag *tag) {
    call->refs++;
    grpc_call_error error = grpc_call_start_batch(call->grpc, operations, count, tag, NULL);
    KV_CHECK(error == GRPC_CALL_OK);
}

void call_begin(struct call *call) {
    grpc_op over = {.op = GRPC_OP_RECV_CLOSE_ON_SERVER,
                    .data.recv_close_on_server.cancelled = &call->cancelled};
    batch(call, &over, 1, &call->over);
    call->active_ms = now_ms();
    /* A unary answer takes its metadata along.  A stream's client wants to know at once. */
    enum shape shape = call->method->shape;
    if (shape == SHAPE_DUPLEX || shape == SHAPE_WATCH || shape == SHAPE_REFLECTION) {
        grpc_op greeting = {.op = GRPC_OP_SEND_INITIAL_METADATA};
        call->greeting = true;
        batch(call, &greeting, 1, &call->greeted);
    }
}

static void on_greeted(struct call *call, bool ok) {
}

void call_read(struct call *call) {
    KV_CHECK(!call->reading && !call->in);
    grpc_op receive = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &call->arriving};
    call->reading = true;
    batch(call, &receive, 1, &call->received);
}

static void on_received(struct call *call, bool ok) {
    call->reading = false;
    call->active_ms = now_ms();
    if (call->finishing || call->end.code != GRPC_STATUS_OK) return; /* too late: recycled with it */
    call->in = call->arriving;
    call->arriving = NULL;
    call->sends_ahead = call->in && call_has_work(call);
    /* No message: the client has said all, or is gone, which `over` tells apart. */
    if (!call->in && !call->ending) call->ending = true;
}

void call_send(struct call *call, grpc_byte_buffer *message) {
    KV_CHECK(!call->sending);
    grpc_op operations[2] = {{0}};
    size_t count = 0;
    if (!call->greeting) {
        operations[count++].op = GRPC_OP_SEND_INITIAL_METADATA;
        call->greeting = true;
    }
    operations[count].op = GRPC_OP_SEND_MESSAGE;
    operations[count++].data.send_message.send_message = message;
    call->out = message;
    call->sending = true;
    call->since_ms = now_ms();
    batch(call, operations, count, &call->sent);
}

static void on_sent(struct call *call, bool ok) {
    grpc_byte_buffer_destroy(call->out);
    call->out = NULL;
    call->sending = false;
    call->pins_staging = false;
    call->active_ms = now_ms();
}

/* ---- The end ------------------------------------------------------------------------------------ */

static void trailer(struct call *call, const char *key, const char *value) {
    if (!value[0]) return;
    grpc_metadata *entry = &call->trailers[call->trailer_count++];
    entry->key = grpc_slice_from_static_string(key);
    entry->value = grpc_slice_from_copied_string(value);
}

void call_finish(struct call *call, grpc_byte_buffer *last) {
    static const char *const scopes[] = {"", "tenant", "node", "tier"};
    KV_CHECK(!call->sending && !call->finishing);
    char retry[16] = "";
    if (call->end.retry_ms) snprintf(retry, sizeof retry, "%u", call->end.retry_ms);
    trailer(call, "kivi-field", call->end.field);
    trailer(call, "kivi-scope", scopes[call->end.scope]);
    trailer(call, "kivi-retry-ms", retry);
    if (call->end.text[0]) call->end_text = grpc_slice_from_copied_string(call->end.text);

    grpc_op operations[3] = {{0}};
    size_t count = 0;
    if (!call->greeting) operations[count++].op = GRPC_OP_SEND_INITIAL_METADATA;
    if (last) {
        operations[count].op = GRPC_OP_SEND_MESSAGE;
        operations[count++].data.send_message.send_message = last;
        call->out = last;
    }
    operations[count].op = GRPC_OP_SEND_STATUS_FROM_SERVER;
    operations[count].data.send_status_from_server.status = call->end.code;
    operations[count].data.send_status_from_server.status_details = &call->end_text;
    operations[count].data.send_status_from_server.trailing_metadata_count = call->trailer_count;
    operations[count++].data.send_status_from_server.trailing_metadata = call->trailers;
    call->greeting = call->finishing = call->ending = true;
    call->since_ms = now_ms();
    batch(call, operations, count, &call->finished);
}

static void on_finished(struct call *call, bool ok) {
    call->pins_staging = false;
    call->since_ms = 0;
}

static void on_over(struct call *call, bool ok) {
    if (!call->cancelled) return;
    call->gone = true;
    for (uint32_t i = 0; i < FLIGHTS_MAX; i++)
        if (call->flights[i].state == FLIGHT_ENGINE)
            atomic_store(&call->flights[i].request->cancelled, true);
    call_end(call, KV_CANCELLED, "");
}

/* The first end counts. */
static bool end_once(struct call *call, uint64_t sequence) {
    if (call->finishing || call->end.code != GRPC_STATUS_OK) return false;
    call->ending = true;
    call->end_sequence = sequence;
    if (call->in) {
        grpc_byte_buffer_destroy(call->in);
        call->in = NULL;
    }
    return true;
}

void call_end(struct call *call, enum kv_status status, const char *text) {
    if (!end_once(call, call->sequence_next)) return;
    call->end.code = (grpc_status_code)kv_status_code(status);
    kv_status_text(status, "", text, call->end.text, sizeof call->end.text);
    if (status == KV_BUSY) {
        call->end.scope = KV_SCOPE_NODE;
        call->end.retry_ms = RETRY_MS;
    }
}

void call_end_with(struct call *call, const struct kv_request *request, uint64_t sequence) {
    if (!end_once(call, sequence)) return;
    call->end.code = (grpc_status_code)kv_status_code(request->status);
    kv_status_text(request->status, request->field, request->message, call->end.text,
                   sizeof call->end.text);
    snprintf(call->end.field, sizeof call->end.field, "%s", request->field);
    if (request->status != KV_BUSY) return;
    call->end.scope = request->scope ? request->scope : KV_SCOPE_NODE;
    call->end.retry_ms = request->retry_ms ? request->retry_ms : RETRY_MS;
}

/* ---- What a call says ---------------------------------------------------------------------------- */

uint64_t call_deadline_us(const struct call *call) {
    gpr_timespec at = call->deadline;
    if (gpr_time_cmp(at, gpr_inf_future(at.clock_type)) == 0) return 0;
    at = gpr_convert_clock_type(at, GPR_CLOCK_MONOTONIC);
    /* 0 means none: a deadline at the machine's start is as good as one just after it. */
    return at.tv_sec <= 0 ? 1 : (uint64_t)at.tv_sec * 1000000 + (uint64_t)at.tv_nsec / 1000;
}

size_t call_pieces(grpc_byte_buffer *message, struct kv_span *pieces) {
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, message)) return 0;
    size_t count = 0;
    grpc_slice *slice;
    bool fits = true;
    /* An empty message has no slice, but is one piece of nothing here. */
    pieces[0] = (struct kv_span){(const uint8_t *)"", 0};
    while (fits && grpc_byte_buffer_reader_peek(&reader, &slice)) {
        fits = count < PIECES_MAX;
        if (fits)
            pieces[count++] =
                (struct kv_span){GRPC_SLICE_START_PTR(*slice), GRPC_SLICE_LENGTH(*slice)};
    }
    grpc_byte_buffer_reader_destroy(&reader);
    if (!fits) return 0;
    return count ? count : 1;
}
