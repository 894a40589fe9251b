/* SPDX-License-Identifier: Apache-2.0 */
/* opponent.c - the least a gRPC stream can cost. */
#include "clients/cli/opponent.h"

#include <signal.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/slice.h>

#include "clients/c/bulk.h"

static const char *const METHOD = "/kivi.bench.Opponent/Stream";

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* The next event's tag; spins first, as libkivi does. */
static intptr_t next_tag(grpc_completion_queue *queue, uint32_t spin_us, bool *success) {
    grpc_event event = {.type = GRPC_QUEUE_TIMEOUT};
    double until = seconds_now() + spin_us * 1e-6;
    while (spin_us && event.type == GRPC_QUEUE_TIMEOUT && seconds_now() < until)
        event = grpc_completion_queue_next(queue, gpr_inf_past(GPR_CLOCK_MONOTONIC), NULL);
    if (event.type == GRPC_QUEUE_TIMEOUT)
        event = grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    *success = event.success;
    return (intptr_t)event.tag;
}

static void start(grpc_call *call, const grpc_op *ops, size_t count, intptr_t tag) {
    if (grpc_call_start_batch(call, ops, count, (void *)tag, NULL) != GRPC_CALL_OK) abort();
}

/* Waits for one event of a call that has one batch under way. */
static bool run(grpc_completion_queue *queue, grpc_call *call, const grpc_op *ops, size_t count) {
    bool success;
    start(call, ops, count, 1);
    next_tag(queue, 0, &success);
    return success;
}

/* One stream: messages in, dropped; one message and the status out. */
static void serve_call(grpc_call *call, grpc_completion_queue *queue) {
    grpc_op first = {.op = GRPC_OP_SEND_INITIAL_METADATA};
    run(queue, call, &first, 1);
    for (;;) {
        grpc_byte_buffer *message = NULL;
        grpc_op receive = {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &message};
        run(queue, call, &receive, 1);
        if (!message) break;
        grpc_byte_buffer_destroy(message);
    }
    int cancelled = 0;
    grpc_slice text = grpc_slice_from_static_string("x");
    grpc_byte_buffer *answer = grpc_raw_byte_buffer_create(&text, 1);
    grpc_op last[] = {{.op = GRPC_OP_SEND_MESSAGE, .data.send_message.send_message = answer},
                      {.op = GRPC_OP_SEND_STATUS_FROM_SERVER},
                      {.op = GRPC_OP_RECV_CLOSE_ON_SERVER,
                       .data.recv_close_on_server.cancelled = &cancelled}};
    run(queue, call, last, 3);
    grpc_byte_buffer_destroy(answer);
    grpc_call_unref(call);
}

static void serve(const char *path) {
    char address[600];
    snprintf(address, sizeof address, "unix:%s", path);
    grpc_init();
    grpc_arg argument = {GRPC_ARG_INTEGER, (char *)GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH,
                         .value.integer = -1};
    grpc_channel_args arguments = {1, &argument};
    grpc_server *server = grpc_server_create(&arguments, NULL);
    grpc_completion_queue *queue = grpc_completion_queue_create_for_next(NULL);
    grpc_server_register_completion_queue(server, queue, NULL);
    grpc_server_credentials *credentials = grpc_insecure_server_credentials_create();
    if (!grpc_server_add_http2_port(server, address, credentials)) _exit(1);
    grpc_server_start(server);
    for (;;) {
        grpc_call *call;
        grpc_call_details details;
        grpc_metadata_array metadata;
        bool success;
        grpc_call_details_init(&details);
        grpc_metadata_array_init(&metadata);
        grpc_server_request_call(server, &call, &details, &metadata, queue, queue, (void *)1);
        next_tag(queue, 0, &success);
        if (!success) _exit(1);
        grpc_call_details_destroy(&details);
        grpc_metadata_array_destroy(&metadata);
        serve_call(call, queue);
    }
}

pid_t opponent_serve(const char *path) {
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        serve(path);
    }
    return child < 0 ? 0 : child;
}

struct opponent {
    grpc_channel *channel;
    grpc_completion_queue *queue;
    uint32_t spin_us;
};

/* On a socket set as libkivi sets the one of a Put, once the server listens. */
static grpc_channel *connect_soon(const char *address, const grpc_channel_args *arguments) {
    const struct timespec pause = {.tv_nsec = 5000000};
    for (int i = 0; i < 1000; i++) {
        grpc_channel *channel = bulk_channel_open(address, arguments);
        if (channel) return channel;
        nanosleep(&pause, NULL);
    }
    abort(); /* the server is our own child, and does nothing before it listens */
}

struct opponent *opponent_open(const char *path, uint32_t spin_us) {
    char address[600];
    struct opponent *opponent = calloc(1, sizeof *opponent);
    if (!opponent) return NULL;
    snprintf(address, sizeof address, "unix:%s", path);
    grpc_init();
    grpc_arg argument = {GRPC_ARG_INTEGER, (char *)GRPC_ARG_MAX_SEND_MESSAGE_LENGTH,
                         .value.integer = -1};
    grpc_channel_args arguments = {1, &argument};
    opponent->channel = connect_soon(address, &arguments);
    opponent->queue = grpc_completion_queue_create_for_next(NULL);
    opponent->spin_us = spin_us;
    return opponent;
}

void opponent_close(struct opponent *opponent) {
    if (!opponent) return;
    grpc_channel_destroy(opponent->channel);
    grpc_completion_queue_shutdown(opponent->queue);
    bool success;
    next_tag(opponent->queue, 0, &success);
    grpc_completion_queue_destroy(opponent->queue);
    free(opponent);
    grpc_shutdown();
}

static void nothing(void *memory) {}

double opponent_stream(struct opponent *opponent, const uint8_t *data, size_t data_bytes,
                       size_t bytes, uint64_t count) {
    enum { TAG_START = 1, TAG_SEND, TAG_ANSWER };
    double began = seconds_now();
    grpc_call *call = grpc_channel_create_call(
        opponent->channel, NULL, GRPC_PROPAGATE_DEFAULTS, opponent->queue,
        grpc_slice_from_static_string(METHOD), NULL, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    grpc_metadata_array initial, trailing;
    grpc_metadata_array_init(&initial);
    grpc_metadata_array_init(&trailing);
    grpc_byte_buffer *answer = NULL, *message = NULL;
    grpc_status_code status = GRPC_STATUS_UNKNOWN;
    grpc_slice text = grpc_empty_slice();
    grpc_op begin = {.op = GRPC_OP_SEND_INITIAL_METADATA,
                     .flags = GRPC_INITIAL_METADATA_WAIT_FOR_READY};
    start(call, &begin, 1, TAG_START);
    grpc_op end[] = {{.op = GRPC_OP_RECV_INITIAL_METADATA,
                      .data.recv_initial_metadata.recv_initial_metadata = &initial},
                     {.op = GRPC_OP_RECV_MESSAGE, .data.recv_message.recv_message = &answer},
                     {.op = GRPC_OP_RECV_STATUS_ON_CLIENT,
                      .data.recv_status_on_client = {.trailing_metadata = &trailing,
                                                     .status = &status,
                                                     .status_details = &text}}};
    start(call, end, 3, TAG_ANSWER);

    uint64_t sent = 0;
    size_t at = 0;
    bool success = true, answered = false;
    intptr_t tag = TAG_SEND;
    for (;;) {
        if (tag == TAG_ANSWER) answered = true;
        if (tag == TAG_SEND) {
            if (message) grpc_byte_buffer_destroy(message);
            message = NULL;
            if (answered || !success || sent > count) break;
            grpc_op op = {.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT};
            if (sent < count) {
                if (at + bytes > data_bytes) at = 0;
                grpc_slice slice =
                    grpc_slice_new_with_user_data((void *)(data + at), bytes, nothing, NULL);
                message = grpc_raw_byte_buffer_create(&slice, 1);
                grpc_slice_unref(slice);
                at += bytes;
                op = (grpc_op){.op = GRPC_OP_SEND_MESSAGE,
                               .data.send_message.send_message = message};
            }
            sent++;
            start(call, &op, 1, TAG_SEND);
        }
        tag = next_tag(opponent->queue, opponent->spin_us, &success);
    }
    while (!answered) answered = next_tag(opponent->queue, opponent->spin_us, &success) == TAG_ANSWER;
    double seconds = seconds_now() - began;

    if (answer) grpc_byte_buffer_destroy(answer);
    grpc_slice_unref(text);
    grpc_metadata_array_destroy(&initial);
    grpc_metadata_array_destroy(&trailing);
    grpc_call_unref(call);
    return status == GRPC_STATUS_OK ? seconds : -1;
}
