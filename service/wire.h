/* SPDX-License-Identifier: Apache-2.0 */
/* wire.h - finds the one large field of a message without unpacking it.
 *
 * Every message of the contract has at most one large field, `bytes data = 15`, at its top level.
 * Unpacking it like the others would copy megabytes into fresh memory, once to make the message
 * contiguous and once more into the field.  The splitter walks the top level of a message that
 * arrived in pieces and takes it apart:
 *
 *     pieces   [tag 1 ... | tag 15, length, pay] [load payload] [payload | tag 4 ...]
 *     rest     [tag 1 ... | tag 4 ...]            copied, small: for protobuf-c
 *     data     first piece, offset, bytes         a view: gathered once, to where it belongs
 *
 * What it accepts, and where `data` ends up when the field comes twice (the last one wins), is
 * what protobuf-c's own unpacking does with the whole message; tests/service/wire_fuzz.c holds the
 * two against each other.  It is stricter in one thing: a field numbered 0 is refused, as the
 * encoding's definition says.
 *
 * Threads.  [any thread]  Pure functions over memory the caller owns.
 */
#ifndef KV_SERVICE_WIRE_H
#define KV_SERVICE_WIRE_H

#include "proto/kv_types.h"

enum { KV_WIRE_DATA_FIELD = 15 };

/* A message taken apart.  Good for as long as the pieces and the scratch memory are. */
struct kv_wire {
    const uint8_t *rest; /* every other field, in order, contiguous */
    size_t rest_bytes;
    const struct kv_span *data; /* the piece the payload begins in */
    const struct kv_span *end;  /* behind the last piece */
    size_t data_offset;         /* where in *data */
    size_t data_bytes;          /* 0: empty or absent, and `data` means nothing */
};

/* KV_OK.  KV_INVALID: not a protobuf message.  KV_BUSY: the rest does not fit `scratch`. */
enum kv_status kv_wire_split(const struct kv_span *pieces, size_t piece_count, uint8_t *scratch,
                             size_t scratch_bytes, struct kv_wire *out);

/* Copies the payload, data_bytes of it. */
void kv_wire_gather(const struct kv_wire *wire, uint8_t *target);

/* ---- Walking contiguous messages ------------------------------------------------------------ */

/* One field: a number for varints and fixed widths, bytes for the rest. */
struct kv_wire_field {
    uint32_t number;
    uint8_t type; /* the encoding's wire type: 0, 1, 2 or 5 */
    uint64_t value;
    struct kv_span bytes;
};

/* Takes the next field off the front of `message`.  False at its end and at damage (then
 * message->count is not 0). */
bool kv_wire_next(struct kv_span *message, struct kv_wire_field *out);

/* Writes the tag and length that stand before a payload of `bytes`; returns how many bytes that
 * took, at most KV_WIRE_DATA_HEAD_MAX. */
enum { KV_WIRE_DATA_HEAD_MAX = 11 };
size_t kv_wire_data_head(uint8_t target[KV_WIRE_DATA_HEAD_MAX], uint64_t bytes);

#endif
