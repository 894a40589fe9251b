/* SPDX-License-Identifier: Apache-2.0 */
/* serve.c - what a call does next.
 *
 * call_step() may run on any of the three threads, after anything has happened, and is never wrong
 * to run once more: it looks at the call and does what can be done now.
 *
 *    input    a message that arrived is decoded if a flight and a request are free; if not, the call
 *             waits, and its client with it, because nothing more is read
 *    engine   a held frame goes in when the one before it came back well
 *    output   answers leave one at a time, in order (Put: as they come)
 *    end      when all that was accepted is answered, with the status that was noted
 *
 * A failure is noted with the position of its frame: answers before it are still sent, frames
 * behind it are dropped.
 */
#include <grpc/byte_buffer.h>
#include <grpc/slice.h>

#include "service/rpc/internal.h"

/* ---- Flights ------------------------------------------------------------------------------------ */

struct flight *flight_free(struct call *call) {
    for (uint32_t i = 0; i < call->method->flights; i++)
        if (call->flights[i].state == FLIGHT_FREE) return &call->flights[i];
    return NULL;
}

static bool flights_idle(const struct call *call) {
    for (uint32_t i = 0; i < FLIGHTS_MAX; i++)
        if (call->flights[i].state != FLIGHT_FREE) return false;
    return true;
}

bool call_has_work(const struct call *call) {
    for (uint32_t i = 0; i < FLIGHTS_MAX; i++)
        if (call->flights[i].state == FLIGHT_ENGINE) return true;
    return false;
}

struct flight *flight_take(struct call *call, enum flight_state state, struct kv_request *request) {
    struct flight *flight = flight_free(call);
    flight->state = state;
    flight->request = request;
    flight->sequence = call->sequence_next++;
    flight->failed = false;
    return flight;
}

/* The request is done: what it was lent goes back to gRPC. */
static void flight_return(struct flight *flight) {
    if (flight->message) grpc_byte_buffer_destroy(flight->message);
    flight->message = NULL;
}

static void flight_clear(struct flight *flight) {
    flight_return(flight);
    if (flight->answer) grpc_byte_buffer_destroy(flight->answer);
    if (flight->request) kv_engine_release(flight->call->rpc->engine, flight->request);
    flight->answer = NULL;
    flight->request = NULL;
    flight->state = FLIGHT_FREE;
}

/* First the engine is asked, then the call is on the waiting list, then the engine is asked again:
 * a request freed in between is seen by one of the two. */
struct kv_request *flight_request(struct call *call) {
    struct kv_engine *engine = call->rpc->engine;
    struct kv_request *request = kv_engine_acquire(engine, call->method->staging);
    if (!request) {
        helper_wait(call);
        request = kv_engine_acquire(engine, call->method->staging);
    }
    if (request) helper_unwait(call);
    return request;
}

/* ---- Answers ------------------------------------------------------------------------------------- */

/* Where an encoder writes: one slice, with room behind it for a payload that is copied. */
struct answer_room {
    grpc_slice head;
    size_t copied;
    size_t used;
};

static uint8_t *answer_head(void *context, size_t bytes) {
    struct answer_room *room = context;
    room->head = grpc_slice_malloc(bytes + room->copied);
    room->used = bytes;
    return GRPC_SLICE_START_PTR(room->head);
}

/* gRPC has sent the payload, on whichever thread it was. */
static void answer_sent(void *context) {
    struct kv_request *request = context;
    /* Pairs with the store in answer_make(): everything done to the request before it was sent is
     * done for whoever gets it next.  gRPC orders the two as well, where no sanitizer can see it. */
    atomic_load_explicit(&request->cancelled, memory_order_acquire);
    struct kv_rpc *rpc = request->owner;
    kv_engine_release(rpc->engine, request);
}

/* The message for a finished request.  A large payload is sent from staging, and the request
 * goes with it (flight->request becomes NULL). */
static grpc_byte_buffer *answer_make(struct flight *flight) {
    struct kv_request *request = flight->request;
    const struct method *method = flight->call->method;
    bool has_payload = request->status == KV_OK &&
                       (method->encode == kv_encode_attend || method->shape == SHAPE_PAGES);
    size_t payload = has_payload ? request->reply_bytes : 0;
    struct answer_room room = {.copied = payload <= COPY_MAX ? payload : 0};

    if (method->encode)
        method->encode(request, answer_head, &room);
    else
        pages_encode(flight, request, answer_head, &room);
    if (payload == 0 || room.copied) {
        if (payload)
            memcpy(GRPC_SLICE_START_PTR(room.head) + room.used,
                   request->staging + request->reply_offset, payload);
        grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&room.head, 1);
        grpc_slice_unref(room.head);
        return message;
    }
    void *bytes = request->staging + request->reply_offset;
    request->owner = flight->call->rpc;
    flight->request = NULL;
    atomic_store_explicit(&request->cancelled, false, memory_order_release); /* the last touch */
    grpc_slice slices[2] = {room.head,
                            grpc_slice_new_with_user_data(bytes, payload, answer_sent, request)};
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(slices, 2);
    grpc_slice_unref(slices[0]);
    grpc_slice_unref(slices[1]);
    return message;
}

/* ---- The engine's side --------------------------------------------------------------------------- */

static enum verdict request_verdict(struct flight *flight, const struct kv_request *request) {
    const struct method *method = flight->call->method;
    if (method->shape == SHAPE_PAGES) return pages_done(flight, request);
    if (request->kind == KV_REQUEST_PUT_END) return VERDICT_SILENT;
    if (request->kind == KV_REQUEST_PUT) {
        if (request->status == KV_INVALID) return VERDICT_FAIL;
        if (request->status == KV_OK && !request->put.complete) return VERDICT_SILENT;
        return VERDICT_ANSWER;
    }
    return request->status == KV_OK ? VERDICT_ANSWER : VERDICT_FAIL;
}

/* On the engine thread: the request is ours again. */
static void on_done(struct kv_request *request) {
    struct flight *flight = request->owner;
    struct call *call = flight->call;
    pthread_mutex_lock(&call->lock);
    KV_CHECK(flight->state == FLIGHT_ENGINE && flight->request == request);

    enum verdict verdict = call->gone ? VERDICT_SILENT : request_verdict(flight, request);
    if (verdict == VERDICT_FAIL) call_end_with(call, request, flight->sequence);
    if (verdict == VERDICT_KEEP) {
        flight->state = FLIGHT_READY;
        flight->index = 0;
    } else if (verdict == VERDICT_ANSWER) {
        grpc_byte_buffer *answer = answer_make(flight);
        flight_return(flight);
        if (flight->request) kv_engine_release(call->rpc->engine, flight->request);
        flight->request = NULL;
        flight->answer = answer;
        flight->state = FLIGHT_READY;
    } else {
        flight_clear(flight);
    }
    call_step(call, NULL);
    call_unlock(call, 1);
}

void flight_submit(struct flight *flight) {
    struct call *call = flight->call;
    struct kv_request *request = flight->request;
    request->deadline_us = call_deadline_us(call);
    request->owner = flight;
    request->on_done = on_done;
    flight->state = FLIGHT_ENGINE;
    call->refs++;
    kv_engine_submit(call->rpc->engine, request);
}

static void submit_held(struct call *call) {
    for (uint32_t i = 0; i < call->method->flights; i++) {
        struct flight *flight = &call->flights[i];
        if (flight->state != FLIGHT_HELD) continue;
        if (call->gone || flight->sequence >= call->end_sequence)
            flight_clear(flight);
        else if (!call->method->serial || !call_has_work(call))
            flight_submit(flight);
    }
}

/* ---- Input ---------------------------------------------------------------------------------------- */

static enum kv_status decode(struct call *call, struct workspace *workspace,
                             grpc_byte_buffer *message, struct kv_request *request) {
    struct kv_inbound in = {.memory          = workspace->memory,
                            .memory_bytes    = workspace->memory_bytes,
                            .fingerprint     = &call->fingerprint,
                            .has_fingerprint = &call->has_fingerprint,
                            .lend            = call->rpc->lend};
    size_t count = call_pieces(message, workspace->pieces);
    enum kv_status status =
        count ? kv_wire_split(workspace->pieces, count, workspace->scratch,
                              workspace->scratch_bytes, &in.wire)
              : KV_BUSY;
    if (status == KV_OK) return call->method->decode(&in, request);
    strcpy(request->message, status == KV_BUSY ? "the message is in too many parts"
                                               : "the message is damaged");
    return request->status = KV_INVALID;
}

/* A page that can go into its block does so here; true: that was all there was to do. */
static bool land(struct call *call, struct kv_request *request) {
    if (request->kind != KV_REQUEST_PUT) return false;
    request->put.stream = call->number;
    return request->put.pieces && kv_engine_land(call->rpc->engine, request) == KV_LANDED;
}

/* The message that arrived becomes a request.  Its payload is copied without the lock, so that the
 * engine thread never waits for a copy; or it is lent, and the message kept until the request is done. */
static void accept(struct call *call, struct workspace *workspace) {
    struct kv_request *request = flight_request(call);
    if (!request) return;
    struct flight *flight = flight_take(call, FLIGHT_DECODING, request);
    grpc_byte_buffer *message = call->in;
    call->in = NULL;
    call->accepting = true;
    call->accepted_bytes = grpc_byte_buffer_length(message);
    pthread_mutex_unlock(&call->lock);

    enum kv_status status = decode(call, workspace, message, request);
    bool landed = status == KV_OK && land(call, request);
    bool lent = request->kind == KV_REQUEST_PUT && request->put.pieces;
    if (!lent) grpc_byte_buffer_destroy(message);

    pthread_mutex_lock(&call->lock);
    call->accepting = false;
    flight->message = lent ? message : NULL;
    if (status != KV_OK) {
        call_end_with(call, request, flight->sequence);
        flight_clear(flight);
    } else if (landed) {
        flight_clear(flight);
    } else {
        flight->state = FLIGHT_HELD;
    }
}

/* ---- Output ---------------------------------------------------------------------------------------- */

/* The flight whose answer may leave now: the oldest, unless order does not matter. */
static struct flight *answer_next(struct call *call) {
    bool any_order = call->method->decode == kv_decode_put;
    struct flight *oldest = NULL;
    for (uint32_t i = 0; i < FLIGHTS_MAX; i++) {
        struct flight *flight = &call->flights[i];
        if (flight->state == FLIGHT_FREE || (any_order && flight->state != FLIGHT_READY)) continue;
        if (!oldest || flight->sequence < oldest->sequence) oldest = flight;
    }
    return oldest && oldest->state == FLIGHT_READY ? oldest : NULL;
}

/* A List page is told entry by entry, from staging. */
static grpc_byte_buffer *list_entry(struct flight *flight) {
    const struct kv_request *request = flight->request;
    struct kv_session_info info;
    struct answer_room room = {0};
    memcpy(&info, request->staging + request->reply_offset + flight->index * sizeof info,
           sizeof info);
    kv_encode_session(&info, answer_head, &room);
    flight->index++;
    grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&room.head, 1);
    grpc_slice_unref(room.head);
    return message;
}

/* Starts the next send; true if something changed. */
static bool send_next(struct call *call) {
    if (call->sending) return false;
    struct flight *flight = answer_next(call);
    if (!flight) return false;
    bool listing = flight->request != NULL;
    bool over = call->gone || flight->sequence >= call->end_sequence || pages_drop(flight) ||
                (listing && flight->index == flight->request->list.count);
    if (over) {
        flight_clear(flight);
        return true;
    }
    if (listing) {
        call_send(call, list_entry(flight));
        return true;
    }
    grpc_byte_buffer *answer = flight->answer;
    flight->answer = NULL;
    call->pins_staging = grpc_byte_buffer_length(answer) > COPY_MAX + 4096;
    flight_clear(flight);
    if (call->method->shape == SHAPE_UNARY)
        call_finish(call, answer);
    else
        call_send(call, answer);
    return true;
}

/* ---- All together ---------------------------------------------------------------------------------- */

/* Tells the engine that a Put stream is over.  Needs a request, and waits for one if it must. */
static void put_end(struct call *call) {
    struct kv_request *request = flight_request(call);
    if (!request) return;
    call->put_ended = true;
    request->kind = KV_REQUEST_PUT_END;
    request->put.stream = call->number;
    struct flight *flight = flight_take(call, FLIGHT_HELD, request);
    flight_submit(flight);
}

static void try_end(struct call *call) {
    if (!call->ending || call->sending || call->accepting || call->in || !flights_idle(call)) return;
    bool is_put = call->method->decode == kv_decode_put;
    if (is_put && !call->put_ended && call->sequence_next > 0) {
        put_end(call);
        return;
    }
    helper_unwait(call);
    if (call->method->shape == SHAPE_UNARY && call->end.code == GRPC_STATUS_OK)
        call_end(call, KV_INVALID, "the call came without a message");
    call_finish(call, NULL);
}

/* Whether the next message is asked for.  Asking makes gRPC tell the client at once how much it may send: a
 * write of its own, between a small frame and the engine, that wakes a client who is not waiting for it.  So
 * behind a small frame the question waits until the answer is on its way; what the client sends meanwhile fits
 * the window anyway.  Unless the client does send meanwhile: then reading ahead is worth it.  Whether it does
 * shows while a question is open, which it is at every PROBE-th frame. */
static bool may_read(struct call *call) {
    if (call->ending || call->reading || call->in || call->accepting || !flight_free(call)) return false;
    bool ahead = call->sends_ahead || call->accepted_bytes > SMALL_FRAME || call->sequence_next % PROBE == 1;
    return ahead || !call->method->serial || !call_has_work(call);
}

void call_step(struct call *call, struct workspace *workspace) {
    if (call->finishing) return;
    switch (call->method->shape) {
    case SHAPE_CHECK:
    case SHAPE_WATCH:
    case SHAPE_REFLECTION: local_step(call, workspace); return;
    case SHAPE_UNKNOWN: call_finish(call, NULL); return;
    default: break;
    }

    bool fatal = call->ending && call->end.code != GRPC_STATUS_OK;
    /* A stream whose answer lies in staging and is not being read gets no second buffer. */
    bool room = flight_free(call) && !(call->pins_staging && call->method->shape == SHAPE_DUPLEX);
    if (!fatal && call->in && workspace && !call->accepting && room) {
        if (call->method->shape == SHAPE_PAGES)
            pages_accept(call, workspace);
        else
            accept(call, workspace);
        if (call->finishing) return; /* another thread went on meanwhile */
    }
    if (call->pages) pages_step(call);
    submit_held(call);
    while (send_next(call)) {
        if (call->finishing) return;
        submit_held(call);
        if (call->pages) pages_step(call);
    }
    if (call->method->shape == SHAPE_DUPLEX && may_read(call)) call_read(call);
    try_end(call);
}
