/* SPDX-License-Identifier: Apache-2.0 */
/* transport.h - calls and streams over gRPC, for one waiting thread each.
 *
 * The only header behind which libkivi uses gRPC.  A transport is a channel; a stream is one call
 * with messages both ways and a completion queue of its own, so that a waiting thread is woken by
 * its own answer and by nothing else.
 *
 * Threads.  A transport may be used by any number of threads, a stream by one at a time.
 * Waiting.  Nothing runs between calls: the thread that waits for an answer does the socket's work
 *           meanwhile, first spinning for spin_us, then asleep.
 * Pools.    Streams of the two hot methods, which any session's frames may travel on, are lent from
 *           a pool and given back: there are as many as threads at work, not as many as sessions.
 */
#ifndef KIVI_CLIENTS_C_TRANSPORT_H
#define KIVI_CLIENTS_C_TRANSPORT_H

#include "clients/c/kivi.h"
#include "clients/c/wire.h"

struct transport;
struct stream;

enum method {
    METHOD_HEALTH_CHECK,
    METHOD_STATS,
    METHOD_LAYOUTS,
    METHOD_REGISTER_LAYOUT,
    METHOD_LOOKUP,
    METHOD_OPEN_SESSION,
    METHOD_COMMIT,
    METHOD_CLOSE,
    METHOD_DELETE,
    METHOD_DESCRIBE,
    METHOD_LIST,
    METHOD_PUT,
    METHOD_GET,
    METHOD_APPEND,
    METHOD_ATTEND,
    METHOD_FETCH,
    METHOD_COUNT,
};

/* Options with their defaults filled in. */
struct transport *transport_open(const struct kivi_options *options, struct kivi_error *error);
void transport_close(struct transport *transport);

/* One question, one answer.  *answer goes back to protobuf_c_message_free_unpacked(). */
int transport_call(struct transport *transport, enum method method,
                   const ProtobufCMessage *question, const ProtobufCMessageDescriptor *type,
                   ProtobufCMessage **answer, uint32_t timeout_ms, struct kivi_error *error);

/* Begins a call with streams.  NULL: memory is out. */
struct stream *stream_open(struct transport *transport, enum method method,
                           struct kivi_error *error);

/* A stream of METHOD_APPEND or METHOD_ATTEND from the pool, or a new one; and back.  A stream that
 * has failed, or has answers outstanding, is closed instead of kept. */
struct stream *stream_borrow(struct transport *transport, enum method method,
                             struct kivi_error *error);
void stream_return(struct stream *stream);

/* When the waiting functions below give up, in stream_clock_us(); from timeout_ms, where 0 is the
 * client's default. */
uint64_t stream_deadline_us(const struct stream *stream, uint32_t timeout_ms);
uint64_t stream_clock_us(void);

/* Sends one message: `header` packed, then the pieces of the payload, borrowed until
 * stream_settle(), an answer that implies they were read, or stream_close().  Returns when the
 * connection has taken the message in, which flow control may delay. */
int stream_send(struct stream *stream, const ProtobufCMessage *header,
                const struct wire_piece *payload, size_t count, uint64_t deadline_us,
                struct kivi_error *error);

/* Says that no more messages will be sent. */
int stream_finish(struct stream *stream, uint64_t deadline_us, struct kivi_error *error);

/* The next message, valid until the next stream function.  *message is NULL when the service has
 * ended the stream with success. */
int stream_receive(struct stream *stream, const struct wire_message **message,
                   uint64_t deadline_us, struct kivi_error *error);

/* True if stream_receive() would not wait for a message. */
bool stream_ready(struct stream *stream);

/* Waits until gRPC has let go of all payloads. */
void stream_settle(struct stream *stream);

/* Cancels what is under way and frees the stream.  NULL is fine. */
void stream_close(struct stream *stream);

#endif
