/* SPDX-License-Identifier: Apache-2.0 */
/* transport.c - the gRPC C core, seen from a thread that waits.
 *
 * A call is driven by batches of operations; each batch ends with one event on the call's
 * completion queue, and a call may have one message on its way out and one on its way in.  A
 * stream keeps as many batches going as it can, so that an answer finds its place without anybody
 * asking:
 *
 *     START    send and receive initial metadata      once, at the beginning
 *     STATUS   receive the status                     once; its event means that the call is over
 *     SEND     a message out                          busy from stream_send() to the event
 *     RECEIVE  a message in                           posted again as soon as one was taken
 *     FINISH   no more messages out                   once
 *
 * stream_pump() waits for one event and notes what it says; everything else is a loop around it.
 * A queue is freed or used again only after the events of all its batches were seen.
 */
#include "clients/c/transport.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <grpc/byte_buffer.h>
#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>
#include <grpc/support/alloc.h>

#include "clients/c/bulk.h"
#include "clients/c/error.h"

enum {
    IDLE_MAX = 64,            /* queues, and streams per method, kept for later */
    COPY_BYTES_MAX = 16 << 10,/* below, a copy is cheaper than lending */
    /* Largest message from the service: a page of 256 channels and 128 heads in fp32 is half. */
    RECEIVE_BYTES_MAX = 64 << 20,
    KEEPALIVE_MS = 30000,     /* while calls are open; the service allows one per 10 s */
    KEEPALIVE_TIMEOUT_MS = 10000,
    /* A restarted service is back within a second: look often, gRPC's own first pause is 1 s. */
    RECONNECT_FIRST_MS = 50,
    RECONNECT_MAX_MS = 2000,
};

static const char *const METHOD_PATHS[METHOD_COUNT] = {
    [METHOD_HEALTH_CHECK] = "/grpc.health.v1.Health/Check",
    [METHOD_STATS] = "/kivi.v1.Admin/Stats",
    [METHOD_LAYOUTS] = "/kivi.v1.Admin/Layouts",
    [METHOD_REGISTER_LAYOUT] = "/kivi.v1.Kivi/RegisterLayout",
    [METHOD_LOOKUP] = "/kivi.v1.Kivi/Lookup",
    [METHOD_OPEN_SESSION] = "/kivi.v1.Kivi/OpenSession",
    [METHOD_COMMIT] = "/kivi.v1.Kivi/Commit",
    [METHOD_CLOSE] = "/kivi.v1.Kivi/Close",
    [METHOD_DELETE] = "/kivi.v1.Kivi/Delete",
    [METHOD_DESCRIBE] = "/kivi.v1.Kivi/Describe",
    [METHOD_LIST] = "/kivi.v1.Kivi/List",
    [METHOD_PUT] = "/kivi.v1.Kivi/Put",
    [METHOD_GET] = "/kivi.v1.Kivi/Get",
    [METHOD_APPEND] = "/kivi.v1.Kivi/Append",
    [METHOD_ATTEND] = "/kivi.v1.Kivi/Attend",
    [METHOD_FETCH] = "/kivi.v1.Kivi/Fetch",
};

struct transport {
    grpc_channel *channel;
    char *target;
    void *methods[METHOD_COUNT]; /* the channel's handles for METHOD_PATHS */
    uint32_t timeout_ms, spin_us;
    uint32_t start_flags; /* of SEND_INITIAL_METADATA */

    pthread_mutex_t lock; /* the pools */
    grpc_completion_queue *queues[IDLE_MAX];
    size_t queue_count;
    struct stream *streams[METHOD_COUNT][IDLE_MAX];
    size_t stream_count[METHOD_COUNT];
};

enum tag { TAG_START = 1, TAG_STATUS, TAG_SEND, TAG_RECEIVE, TAG_FINISH };

struct stream {
    struct transport *transport;
    enum method method;
    grpc_channel *channel;  /* its own, or NULL: the transport's */
    grpc_call *call;
    grpc_completion_queue *queue;
    uint32_t batches;       /* whose event is still to come */
    uint64_t unanswered;    /* messages sent less messages taken */

    grpc_byte_buffer *outgoing; /* on its way while send_busy */
    bool send_busy, finish_busy;
    atomic_size_t lent;     /* pieces of the caller that gRPC may still read; pairs with the
                               release callback, which runs on any gRPC thread */

    grpc_byte_buffer *incoming;
    bool receive_busy;
    bool receive_over;      /* the last batch brought no message: none will come */
    grpc_byte_buffer *taken; /* what `message` points into */
    grpc_byte_buffer_reader reader; /* of taken, open while it lives */
    struct wire_message message;
    struct wire_piece *pieces;
    size_t piece_max;

    bool over;              /* the status is there */
    grpc_status_code status;
    grpc_slice status_text;
    grpc_metadata_array initial, trailing;
    struct kivi_error failure; /* why we ended it ourselves; code 0: we did not */
};

/* ---- Time and waiting -------------------------------------------------------------------- */

uint64_t stream_clock_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

uint64_t stream_deadline_us(const struct stream *stream, uint32_t timeout_ms) {
    if (timeout_ms == 0) timeout_ms = stream->transport->timeout_ms;
    return stream_clock_us() + (uint64_t)timeout_ms * 1000;
}

static gpr_timespec after_us(uint64_t us) {
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_micros((int64_t)us,
                                                                           GPR_TIMESPAN));
}

/* The next event, or one of type GRPC_QUEUE_TIMEOUT after wait_us. */
static grpc_event queue_next(grpc_completion_queue *queue, uint32_t spin_us, uint64_t wait_us) {
    if (spin_us > 0) {
        uint64_t begin = stream_clock_us();
        do {
            grpc_event event =
                grpc_completion_queue_next(queue, gpr_inf_past(GPR_CLOCK_MONOTONIC), NULL);
            if (event.type != GRPC_QUEUE_TIMEOUT) return event;
        } while (stream_clock_us() - begin < (spin_us < wait_us ? spin_us : wait_us));
    }
    /* gRPC rounds a deadline up to its next millisecond, so "now" would sleep. */
    gpr_timespec until = wait_us > 0 ? after_us(wait_us) : gpr_inf_past(GPR_CLOCK_MONOTONIC);
    return grpc_completion_queue_next(queue, until, NULL);
}

/* ---- Transport --------------------------------------------------------------------------- */

static grpc_completion_queue *queue_borrow(struct transport *transport) {
    grpc_completion_queue *queue = NULL;
    pthread_mutex_lock(&transport->lock);
    if (transport->queue_count > 0) queue = transport->queues[--transport->queue_count];
    pthread_mutex_unlock(&transport->lock);
    return queue ? queue : grpc_completion_queue_create_for_next(NULL);
}

static void queue_destroy(grpc_completion_queue *queue) {
    grpc_completion_queue_shutdown(queue);
    while (grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).type !=
           GRPC_QUEUE_SHUTDOWN)
        ;
    grpc_completion_queue_destroy(queue);
}

/* The queue has no event to come. */
static void queue_return(struct transport *transport, grpc_completion_queue *queue) {
    pthread_mutex_lock(&transport->lock);
    bool kept = transport->queue_count < IDLE_MAX;
    if (kept) transport->queues[transport->queue_count++] = queue;
    pthread_mutex_unlock(&transport->lock);
    if (!kept) queue_destroy(queue);
}

/* To the service: the one connection that is made again, or one for a stream of bulk, which may be NULL. */
static grpc_channel *channel_open(const char *target, bool bulk) {
    grpc_arg arguments[] = {
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH,
         .value.integer = RECEIVE_BYTES_MAX},
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, .value.integer = -1},
        /* An append must not be sent twice behind the caller's back, and a retry buffer would hold
         * on to lent memory. */
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_ENABLE_RETRIES, .value.integer = 0},
        /* Clients of one process share no connection: each has its own place in the queue. */
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, .value.integer = 1},
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_KEEPALIVE_TIME_MS, .value.integer = KEEPALIVE_MS},
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
         .value.integer = KEEPALIVE_TIMEOUT_MS},
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, .value.integer = 0},
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS,
         .value.integer = RECONNECT_FIRST_MS},
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_MIN_RECONNECT_BACKOFF_MS,
         .value.integer = RECONNECT_FIRST_MS},
        {GRPC_ARG_INTEGER, (char *)GRPC_ARG_MAX_RECONNECT_BACKOFF_MS,
         .value.integer = RECONNECT_MAX_MS},
    };
    grpc_channel_args list = {sizeof arguments / sizeof *arguments, arguments};
    if (bulk) return bulk_channel_open(target, &list);
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    grpc_channel *channel = grpc_channel_create(target, credentials, &list);
    grpc_channel_credentials_release(credentials);
    return channel;
}

struct transport *transport_open(const struct kivi_options *options, struct kivi_error *error) {
    struct transport *transport = calloc(1, sizeof *transport);
    if (!transport) {
        error_set(error, KIVI_RESOURCE_EXHAUSTED, "", "out of memory");
        return NULL;
    }
    grpc_init();
    pthread_mutex_init(&transport->lock, NULL);
    transport->timeout_ms = options->timeout_ms;
    transport->spin_us = options->spin_us;
    if (options->wait_for_service)
        transport->start_flags =
            GRPC_INITIAL_METADATA_WAIT_FOR_READY | GRPC_INITIAL_METADATA_WAIT_FOR_READY_EXPLICITLY_SET;
    transport->target = strdup(options->target);
    if (!transport->target) abort();
    transport->channel = channel_open(options->target, false);
    for (int i = 0; i < METHOD_COUNT; i++)
        transport->methods[i] =
            grpc_channel_register_call(transport->channel, METHOD_PATHS[i], NULL, NULL);
    return transport;
}

void transport_close(struct transport *transport) {
    for (int i = 0; i < METHOD_COUNT; i++)
        for (size_t j = 0; j < transport->stream_count[i]; j++)
            stream_close(transport->streams[i][j]);
    for (size_t i = 0; i < transport->queue_count; i++) queue_destroy(transport->queues[i]);
    grpc_channel_destroy(transport->channel);
    pthread_mutex_destroy(&transport->lock);
    free(transport->target);
    free(transport);
    grpc_shutdown();
}

/* ---- Status ------------------------------------------------------------------------------ */

/* What trailing metadata says under `key`, or "". */
static void metadata_find(const grpc_metadata_array *metadata, const char *key, char *value,
                          size_t value_bytes) {
    value[0] = 0;
    for (size_t i = 0; i < metadata->count; i++) {
        if (grpc_slice_str_cmp(metadata->metadata[i].key, key) != 0) continue;
        grpc_slice found = metadata->metadata[i].value;
        size_t bytes = GRPC_SLICE_LENGTH(found);
        if (bytes >= value_bytes) bytes = value_bytes - 1;
        memcpy(value, GRPC_SLICE_START_PTR(found), bytes);
        value[bytes] = 0;
    }
}

static int status_report(grpc_status_code status, grpc_slice text,
                         const grpc_metadata_array *trailing, struct kivi_error *error) {
    if (status == GRPC_STATUS_OK || !error) return (int)status;
    char sentence[sizeof error->message], retry[16];
    size_t bytes = GRPC_SLICE_LENGTH(text);
    if (bytes >= sizeof sentence) bytes = sizeof sentence - 1;
    memcpy(sentence, GRPC_SLICE_START_PTR(text), bytes);
    sentence[bytes] = 0;

    error_set(error, (int)status, NULL, "%s", sentence);
    char field[sizeof error->field];
    metadata_find(trailing, "kivi-field", field, sizeof field);
    if (field[0]) memcpy(error->field, field, sizeof field);
    metadata_find(trailing, "kivi-scope", error->scope, sizeof error->scope);
    metadata_find(trailing, "kivi-retry-ms", retry, sizeof retry);
    error->retry_ms = (uint32_t)strtoul(retry, NULL, 10);
    return (int)status;
}

/* ---- One question, one answer ------------------------------------------------------------ */

/* A message without large parts, as gRPC wants it. */
static grpc_byte_buffer *buffer_pack(const ProtobufCMessage *message) {
    grpc_slice slice = grpc_slice_malloc(protobuf_c_message_get_packed_size(message));
    protobuf_c_message_pack(message, GRPC_SLICE_START_PTR(slice));
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

static ProtobufCMessage *buffer_unpack(grpc_byte_buffer *buffer,
                                       const ProtobufCMessageDescriptor *type) {
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, buffer)) return NULL;
    grpc_slice whole = grpc_byte_buffer_reader_readall(&reader);
    ProtobufCMessage *message = protobuf_c_message_unpack(type, NULL, GRPC_SLICE_LENGTH(whole),
                                                          GRPC_SLICE_START_PTR(whole));
    grpc_slice_unref(whole);
    grpc_byte_buffer_reader_destroy(&reader);
    return message;
}

int transport_call(struct transport *transport, enum method method,
                   const ProtobufCMessage *question, const ProtobufCMessageDescriptor *type,
                   ProtobufCMessage **answer, uint32_t timeout_ms, struct kivi_error *error) {
    uint64_t wait_us = (uint64_t)(timeout_ms ? timeout_ms : transport->timeout_ms) * 1000;
    grpc_completion_queue *queue = queue_borrow(transport);
    grpc_call *call =
        grpc_channel_create_registered_call(transport->channel, NULL, GRPC_PROPAGATE_DEFAULTS,
                                            queue, transport->methods[method], after_us(wait_us),
                                            NULL);
    grpc_byte_buffer *out = buffer_pack(question), *in = NULL;
    grpc_metadata_array initial, trailing;
    grpc_metadata_array_init(&initial);
    grpc_metadata_array_init(&trailing);
    grpc_status_code status = GRPC_STATUS_UNKNOWN;
    grpc_slice text = grpc_empty_slice();

    grpc_op batch[6] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA, .flags = transport->start_flags},
        {.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = out},
        {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT},
        {.op = GRPC_OP_RECV_INITIAL_METADATA,
         .data.recv_initial_metadata.recv_initial_metadata = &initial},
        {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &in},
        {.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
         .data.recv_status_on_client = {.trailing_metadata = &trailing,
                                        .status = &status,
                                        .status_details = &text}},
    };
    if (grpc_call_start_batch(call, batch, 6, NULL, NULL) == GRPC_CALL_OK) {
        /* gRPC ends the call at its deadline, so this wait is bounded. */
        while (queue_next(queue, transport->spin_us, wait_us).type != GRPC_OP_COMPLETE)
            ;
    }

    int code = status_report(status, text, &trailing, error);
    if (code == KIVI_OK) {
        *answer = in ? buffer_unpack(in, type) : NULL;
        if (!*answer) code = error_set(error, KIVI_INTERNAL, "", "the answer is not a %s", type->name);
    }
    grpc_slice_unref(text);
    grpc_metadata_array_destroy(&initial);
    grpc_metadata_array_destroy(&trailing);
    if (in) grpc_byte_buffer_destroy(in);
    grpc_byte_buffer_destroy(out);
    grpc_call_unref(call);
    queue_return(transport, queue);
    return code;
}

/* ---- Streams ----------------------------------------------------------------------------- */

static void batch_start(struct stream *stream, const grpc_op *ops, size_t count, enum tag tag) {
    /* Fails only for a batch that may not be started now, which would be our mistake. */
    if (grpc_call_start_batch(stream->call, ops, count, (void *)(intptr_t)tag, NULL) !=
        GRPC_CALL_OK)
        abort();
    stream->batches++;
}

static void receive_start(struct stream *stream) {
    grpc_op op = {.op = GRPC_OP_RECV_MESSAGE,
                  .data.recv_message.recv_message = &stream->incoming};
    stream->receive_busy = true;
    batch_start(stream, &op, 1, TAG_RECEIVE);
}

/* Waits at most wait_us for one event.  False: there was none. */
static bool stream_pump(struct stream *stream, uint64_t wait_us) {
    if (stream->batches == 0) return false;
    uint32_t spin_us = wait_us > 0 ? stream->transport->spin_us : 0;
    grpc_event event = queue_next(stream->queue, spin_us, wait_us);
    if (event.type != GRPC_OP_COMPLETE) return false;

    stream->batches--;
    switch ((enum tag)(intptr_t)event.tag) {
    case TAG_START: break;
    case TAG_STATUS: stream->over = true; break;
    case TAG_SEND:
        grpc_byte_buffer_destroy(stream->outgoing);
        stream->outgoing = NULL;
        stream->send_busy = false;
        break;
    case TAG_RECEIVE:
        stream->receive_busy = false;
        if (!stream->incoming) stream->receive_over = true;
        break;
    case TAG_FINISH: stream->finish_busy = false; break;
    }
    return true;
}

/* The same, for a wait that has a deadline; when that is over the call is cancelled, and its
 * failure is the deadline's. */
static void stream_wait(struct stream *stream, uint64_t deadline_us) {
    uint64_t now_us = stream_clock_us();
    uint64_t wait_us = now_us < deadline_us ? deadline_us - now_us : 0;
    if (stream->failure.code != KIVI_OK) wait_us = 1000; /* cancelled: the end is near */
    if (stream_pump(stream, wait_us) || stream->failure.code != KIVI_OK) return;
    if (stream_clock_us() < deadline_us) return;
    error_set(&stream->failure, KIVI_DEADLINE_EXCEEDED, "", "the service did not answer in time");
    grpc_call_cancel(stream->call, NULL);
}

/* Waits for the status of a call that is ending, and reports it. */
static int stream_status(struct stream *stream, uint64_t deadline_us, struct kivi_error *error) {
    while (!stream->over) stream_wait(stream, deadline_us);
    if (stream->failure.code != KIVI_OK) {
        if (error) *error = stream->failure;
        return stream->failure.code;
    }
    return status_report(stream->status, stream->status_text, &stream->trailing, error);
}

struct stream *stream_open(struct transport *transport, enum method method,
                           struct kivi_error *error) {
    struct stream *stream = calloc(1, sizeof *stream);
    if (!stream) {
        error_set(error, KIVI_RESOURCE_EXHAUSTED, "", "out of memory");
        return NULL;
    }
    stream->transport = transport;
    stream->method = method;
    stream->queue = queue_borrow(transport);
    stream->status_text = grpc_empty_slice();
    grpc_metadata_array_init(&stream->initial);
    grpc_metadata_array_init(&stream->trailing);
    if (method == METHOD_PUT) stream->channel = channel_open(transport->target, true);
    if (stream->channel)
        stream->call = grpc_channel_create_call(
            stream->channel, NULL, GRPC_PROPAGATE_DEFAULTS, stream->queue,
            grpc_slice_from_static_string(METHOD_PATHS[method]), NULL,
            gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    else
        stream->call = grpc_channel_create_registered_call(
            transport->channel, NULL, GRPC_PROPAGATE_DEFAULTS, stream->queue,
            transport->methods[method], gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);

    grpc_op status = {.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
                      .data.recv_status_on_client = {.trailing_metadata = &stream->trailing,
                                                     .status = &stream->status,
                                                     .status_details = &stream->status_text}};
    batch_start(stream, &status, 1, TAG_STATUS);
    grpc_op start[2] = {
        {.op = GRPC_OP_SEND_INITIAL_METADATA, .flags = transport->start_flags},
        {.op = GRPC_OP_RECV_INITIAL_METADATA,
         .data.recv_initial_metadata.recv_initial_metadata = &stream->initial},
    };
    batch_start(stream, start, 2, TAG_START);
    receive_start(stream);
    return stream;
}

static void taken_release(struct stream *stream) {
    if (!stream->taken) return;
    grpc_byte_buffer_reader_destroy(&stream->reader);
    grpc_byte_buffer_destroy(stream->taken);
    stream->taken = NULL;
}

void stream_settle(struct stream *stream) {
    /* The event of the send comes before the last byte has left; while we wait for that somebody
     * must turn the socket's crank, and that is this very queue. */
    while (atomic_load(&stream->lent) > 0)
        if (!stream_pump(stream, 1000) && stream->batches == 0)
            grpc_completion_queue_next(stream->queue, after_us(1000), NULL);
}

void stream_close(struct stream *stream) {
    if (!stream) return;
    if (!stream->over) grpc_call_cancel(stream->call, NULL);
    /* A cancelled call ends all its batches at once. */
    while (stream->batches > 0) stream_pump(stream, 1000000);
    /* What a call that ended early had not sent yet goes with the call. */
    grpc_call_unref(stream->call);
    if (stream->channel) grpc_channel_destroy(stream->channel);
    stream_settle(stream);

    taken_release(stream);
    if (stream->incoming) grpc_byte_buffer_destroy(stream->incoming);
    grpc_slice_unref(stream->status_text);
    grpc_metadata_array_destroy(&stream->initial);
    grpc_metadata_array_destroy(&stream->trailing);
    queue_return(stream->transport, stream->queue);
    wire_message_free(&stream->message);
    free(stream->pieces);
    free(stream);
}

struct stream *stream_borrow(struct transport *transport, enum method method,
                             struct kivi_error *error) {
    for (;;) {
        struct stream *stream = NULL;
        pthread_mutex_lock(&transport->lock);
        if (transport->stream_count[method] > 0)
            stream = transport->streams[method][--transport->stream_count[method]];
        pthread_mutex_unlock(&transport->lock);
        if (!stream) return stream_open(transport, method, error);

        /* It may have ended while nobody looked, with the service or the connection. */
        while (stream_pump(stream, 0))
            ;
        if (!stream->over && !stream->receive_over) return stream;
        stream_close(stream);
    }
}

void stream_return(struct stream *stream) {
    struct transport *transport = stream->transport;
    taken_release(stream);
    bool kept = false;
    if (!stream->over && !stream->receive_over && !stream->failure.code && !stream->unanswered) {
        pthread_mutex_lock(&transport->lock);
        size_t *count = &transport->stream_count[stream->method];
        kept = *count < IDLE_MAX;
        if (kept) transport->streams[stream->method][(*count)++] = stream;
        pthread_mutex_unlock(&transport->lock);
    }
    if (!kept) stream_close(stream);
}

static void piece_released(void *lent) {
    atomic_fetch_sub((atomic_size_t *)lent, 1);
}

/* Header and payload as one message: copied behind each other when small, else in place. */
static grpc_byte_buffer *message_build(struct stream *stream, const ProtobufCMessage *header,
                                       const struct wire_piece *payload, size_t count) {
    size_t bytes = 0;
    for (size_t i = 0; i < count; i++) bytes += payload[i].bytes;
    bool copy = bytes < COPY_BYTES_MAX;

    grpc_slice head = grpc_slice_malloc(wire_pack_max(header) + (copy ? bytes : 0));
    uint8_t *to = GRPC_SLICE_START_PTR(head);
    size_t head_bytes = wire_pack(header, bytes, to);
    for (size_t i = 0; copy && i < count; i++) {
        memcpy(to + head_bytes, payload[i].data, payload[i].bytes);
        head_bytes += payload[i].bytes;
    }
    grpc_slice used = grpc_slice_sub(head, 0, head_bytes);
    grpc_slice_unref(head);
    if (copy) {
        grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&used, 1);
        grpc_slice_unref(used);
        return buffer;
    }

    grpc_slice *slices = malloc((count + 1) * sizeof *slices);
    if (!slices) abort();
    size_t used_count = 0;
    slices[used_count++] = used;
    for (size_t i = 0; i < count; i++) {
        if (payload[i].bytes == 0) continue;
        atomic_fetch_add(&stream->lent, 1);
        slices[used_count++] = grpc_slice_new_with_user_data(
            (void *)payload[i].data, payload[i].bytes, piece_released, &stream->lent);
    }
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(slices, used_count);
    for (size_t i = 0; i < used_count; i++) grpc_slice_unref(slices[i]);
    free(slices);
    return buffer;
}

int stream_send(struct stream *stream, const ProtobufCMessage *header,
                const struct wire_piece *payload, size_t count, uint64_t deadline_us,
                struct kivi_error *error) {
    while (stream->send_busy && !stream->over) stream_wait(stream, deadline_us);
    if (stream->over || stream->failure.code != KIVI_OK) {
        int code = stream_status(stream, deadline_us, error);
        return code ? code : error_set(error, KIVI_UNAVAILABLE, "", "the service ended the stream");
    }
    stream->outgoing = message_build(stream, header, payload, count);
    stream->send_busy = true;
    stream->unanswered++;
    grpc_op op = {.op = GRPC_OP_SEND_MESSAGE,
                  .data.send_message.send_message = stream->outgoing};
    batch_start(stream, &op, 1, TAG_SEND);
    return KIVI_OK;
}

int stream_finish(struct stream *stream, uint64_t deadline_us, struct kivi_error *error) {
    while (stream->send_busy && !stream->over) stream_wait(stream, deadline_us);
    if (stream->over || stream->failure.code != KIVI_OK)
        return stream_status(stream, deadline_us, error);
    grpc_op op = {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT};
    stream->finish_busy = true;
    batch_start(stream, &op, 1, TAG_FINISH);
    return KIVI_OK;
}

bool stream_ready(struct stream *stream) {
    while (stream_pump(stream, 0))
        ;
    return !stream->receive_busy;
}

/* Takes the message that has arrived apart.  Its slices stay where they are. */
static bool message_take(struct stream *stream) {
    stream->taken = stream->incoming;
    stream->incoming = NULL;
    if (!grpc_byte_buffer_reader_init(&stream->reader, stream->taken)) {
        grpc_byte_buffer_destroy(stream->taken);
        stream->taken = NULL;
        return false;
    }
    size_t count = 0;
    grpc_slice *slice;
    while (grpc_byte_buffer_reader_peek(&stream->reader, &slice)) {
        if (count == stream->piece_max) {
            size_t grown_max = count ? 2 * count : 32;
            struct wire_piece *grown = realloc(stream->pieces, grown_max * sizeof *grown);
            if (!grown) return false;
            stream->pieces = grown;
            stream->piece_max = grown_max;
        }
        stream->pieces[count++] = (struct wire_piece){.data = GRPC_SLICE_START_PTR(*slice),
                                                      .bytes = GRPC_SLICE_LENGTH(*slice)};
    }
    return wire_split(&stream->message, stream->pieces, count);
}

int stream_receive(struct stream *stream, const struct wire_message **message,
                   uint64_t deadline_us, struct kivi_error *error) {
    taken_release(stream);
    /* `incoming` is gRPC's until the event of its batch was seen. */
    while (stream->receive_busy) stream_wait(stream, deadline_us);
    if (!stream->incoming) {
        *message = NULL;
        return stream_status(stream, deadline_us, error);
    }
    bool good = message_take(stream);
    receive_start(stream);
    if (stream->unanswered > 0) stream->unanswered--;
    if (!good) {
        error_set(&stream->failure, KIVI_INTERNAL, "", "the service sent what is not a message");
        grpc_call_cancel(stream->call, NULL);
        return stream_status(stream, deadline_us, error);
    }
    *message = &stream->message;
    return KIVI_OK;
}

const char *kivi_transport_version(void) {
    return grpc_version_string();
}
