/* SPDX-License-Identifier: Apache-2.0 */
/* wire.c - taking protobuf messages apart without copying what is large.
 *
 * A message is a row of fields: a varint key, field number << 3 | wire type, and a body whose
 * length the wire type gives (0 varint, 1 eight bytes, 2 a varint length and so many bytes, 5 four
 * bytes; 3 and 4 were groups and are refused).  The row lies in pieces that may end anywhere, also
 * inside a varint.  The reader below steps over them; everything it steps over goes to the header,
 * except the body of field 15, of which views are kept.  Should the field come twice the last one
 * counts, as protobuf says.
 */
#include "clients/c/wire.h"

#include <stdlib.h>
#include <string.h>

enum { VARINT_BYTES_MAX = 10 };

struct reader {
    const struct wire_piece *piece, *end;
    size_t offset; /* into *piece */
    size_t left;   /* bytes to the end of the message */
};

/* Skips exhausted and empty pieces.  With left > 0 the reader stands on a byte afterwards. */
static void reader_settle(struct reader *reader) {
    while (reader->piece < reader->end && reader->offset == reader->piece->bytes) {
        reader->piece++;
        reader->offset = 0;
    }
}

static bool header_append(struct wire_message *message, const void *data, size_t bytes) {
    if (bytes > WIRE_HEADER_MAX - message->header_bytes) return false;
    memcpy(message->header + message->header_bytes, data, bytes);
    message->header_bytes += bytes;
    return true;
}

/* A varint, with the bytes that spell it, for they may have to be repeated in the header. */
struct varint {
    uint64_t value;
    uint8_t spelled[VARINT_BYTES_MAX];
    size_t bytes;
};

static bool read_varint(struct reader *reader, struct varint *varint) {
    varint->value = 0;
    varint->bytes = 0;
    while (varint->bytes < VARINT_BYTES_MAX && reader->left > 0) {
        reader_settle(reader);
        uint8_t byte = reader->piece->data[reader->offset++];
        reader->left--;
        varint->value |= (uint64_t)(byte & 0x7F) << (7 * varint->bytes);
        varint->spelled[varint->bytes++] = byte;
        if (byte < 0x80) return true;
    }
    return false;
}

/* The next run of at most `bytes` bytes that lie together. */
static struct wire_piece read_run(struct reader *reader, size_t bytes) {
    reader_settle(reader);
    struct wire_piece run = {.data = reader->piece->data + reader->offset,
                             .bytes = reader->piece->bytes - reader->offset};
    if (run.bytes > bytes) run.bytes = bytes;
    reader->offset += run.bytes;
    reader->left -= run.bytes;
    return run;
}

static bool take_header(struct wire_message *message, struct reader *reader, size_t bytes) {
    while (bytes > 0) {
        struct wire_piece run = read_run(reader, bytes);
        if (!header_append(message, run.data, run.bytes)) return false;
        bytes -= run.bytes;
    }
    return true;
}

/* `payload` has room for one view per piece, and a field cannot lie in more. */
static void take_payload(struct wire_message *message, struct reader *reader, size_t bytes) {
    message->payload_count = 0;
    message->payload_bytes = bytes;
    while (bytes > 0) {
        struct wire_piece run = read_run(reader, bytes);
        message->payload[message->payload_count++] = run;
        bytes -= run.bytes;
    }
}

static bool split_field(struct wire_message *message, struct reader *reader) {
    struct varint key, number;
    if (!read_varint(reader, &key)) return false;
    uint64_t field = key.value >> 3;
    if (field == 0 || field > (1u << 29) - 1) return false;

    size_t body;
    number.bytes = 0;
    switch (key.value & 7) {
    case 0: /* the varint is the body */
        if (!read_varint(reader, &number)) return false;
        body = 0;
        break;
    case 1: body = 8; break;
    case 2:
        if (!read_varint(reader, &number) || number.value > reader->left) return false;
        body = (size_t)number.value;
        break;
    case 5: body = 4; break;
    default: return false;
    }
    if (body > reader->left) return false;

    if (field == WIRE_PAYLOAD_FIELD && (key.value & 7) == 2) {
        take_payload(message, reader, body);
        return true;
    }
    return header_append(message, key.spelled, key.bytes) &&
           header_append(message, number.spelled, number.bytes) &&
           take_header(message, reader, body);
}

static bool message_reserve(struct wire_message *message, size_t count) {
    if (!message->header) message->header = malloc(WIRE_HEADER_MAX);
    if (!message->header) return false;
    if (count > message->payload_max) {
        struct wire_piece *grown = realloc(message->payload, count * sizeof *grown);
        if (!grown) return false;
        message->payload = grown;
        message->payload_max = count;
    }
    return true;
}

bool wire_split(struct wire_message *message, const struct wire_piece *pieces, size_t count) {
    struct reader reader = {.piece = pieces, .end = pieces + count};
    for (size_t i = 0; i < count; i++) reader.left += pieces[i].bytes;

    message->header_bytes = message->payload_count = message->payload_bytes = 0;
    if (!message_reserve(message, count)) return false;
    while (reader.left > 0)
        if (!split_field(message, &reader)) return false;
    return true;
}

void wire_gather(const struct wire_message *message, size_t offset, size_t bytes, void *to) {
    uint8_t *next = to;
    for (size_t i = 0; i < message->payload_count && bytes > 0; i++) {
        struct wire_piece piece = message->payload[i];
        if (offset >= piece.bytes) {
            offset -= piece.bytes;
            continue;
        }
        size_t run = piece.bytes - offset < bytes ? piece.bytes - offset : bytes;
        memcpy(next, piece.data + offset, run);
        next += run;
        bytes -= run;
        offset = 0;
    }
}

void wire_message_free(struct wire_message *message) {
    free(message->header);
    free(message->payload);
    memset(message, 0, sizeof *message);
}

size_t wire_pack_max(const ProtobufCMessage *message) {
    return protobuf_c_message_get_packed_size(message) + WIRE_TAIL_MAX;
}

size_t wire_pack(const ProtobufCMessage *message, size_t payload_bytes, uint8_t *to) {
    size_t bytes = protobuf_c_message_pack(message, to);
    if (payload_bytes == 0) return bytes;

    to[bytes++] = WIRE_PAYLOAD_FIELD << 3 | 2;
    for (uint64_t left = payload_bytes; ; left >>= 7) {
        to[bytes++] = (uint8_t)(left & 0x7F) | (left > 0x7F ? 0x80 : 0);
        if (left <= 0x7F) return bytes;
    }
}
