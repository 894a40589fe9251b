/* SPDX-License-Identifier: Apache-2.0 */
/* wire.c - a protobuf message's top level, over a list of pieces.
 *
 * The encoding: a message is fields one behind the other, each a varint tag (number * 8 + wire
 * type) and a value:
 *
 *     type 0   varint, at most 10 bytes        type 2   length (varint), then so many bytes
 *     type 1   8 bytes                         type 5   4 bytes
 *
 * Types 3 and 4 (groups) are not part of proto3.  Two limits are protobuf-c's: a tag or a length
 * is at most 5 bytes long, and a length at most INT_MAX; a message that breaks them would be refused by
 * unpacking, so it is refused here too.
 */
#include "service/wire.h"

#include <limits.h>

#include "proto/kv_check.h"

enum { TAG_BYTES_MAX = 5, VARINT_BYTES_MAX = 10 };
enum { TYPE_VARINT = 0, TYPE_8_BYTES = 1, TYPE_COUNTED = 2, TYPE_4_BYTES = 5 };

/* Where in the pieces we are. */
struct cursor {
    const struct kv_span *piece, *end;
    size_t offset; /* in *piece */
};

/* Steps over exhausted and empty pieces; false at the end of the message. */
static bool cursor_settle(struct cursor *at) {
    while (at->piece < at->end && at->offset == at->piece->count) {
        at->piece++;
        at->offset = 0;
    }
    return at->piece < at->end;
}

/* Copies `count` bytes to `target`, or steps over them if that is NULL. */
static bool cursor_take(struct cursor *at, size_t count, uint8_t *target) {
    while (count > 0) {
        if (!cursor_settle(at)) return false;
        size_t run = at->piece->count - at->offset;
        if (run > count) run = count;
        if (target) {
            memcpy(target, at->piece->bytes + at->offset, run);
            target += run;
        }
        at->offset += run;
        count -= run;
    }
    return true;
}

/* A varint of at most `bytes_max` bytes, which are also appended to `raw`. */
static bool cursor_varint(struct cursor *at, unsigned bytes_max, uint64_t *value, uint8_t *raw,
                          size_t *raw_bytes) {
    *value = 0;
    for (unsigned i = 0; i < bytes_max; i++) {
        if (!cursor_settle(at)) return false;
        uint8_t byte = at->piece->bytes[at->offset++];
        raw[(*raw_bytes)++] = byte;
        *value |= (uint64_t)(byte & 0x7f) << (7 * i);
        if (!(byte & 0x80)) return true;
    }
    return false;
}

/* A field's tag, and of its value whatever is a varint, into `raw`; `*bytes` is what follows. */
static bool cursor_head(struct cursor *at, uint32_t *number, unsigned *type, uint8_t *raw,
                        size_t *raw_bytes, size_t *bytes) {
    uint64_t tag, value;
    *raw_bytes = 0;
    if (!cursor_varint(at, TAG_BYTES_MAX, &tag, raw, raw_bytes)) return false;
    *number = (uint32_t)(tag >> 3);
    *type = (unsigned)(tag & 7);
    if (*number == 0) return false;
    switch (*type) {
    case TYPE_VARINT: *bytes = 0; return cursor_varint(at, VARINT_BYTES_MAX, &value, raw, raw_bytes);
    case TYPE_8_BYTES: *bytes = 8; return true;
    case TYPE_4_BYTES: *bytes = 4; return true;
    case TYPE_COUNTED:
        if (!cursor_varint(at, TAG_BYTES_MAX, &value, raw, raw_bytes)) return false;
        *bytes = (size_t)value;
        return value <= INT_MAX;
    default: return false;
    }
}

enum kv_status kv_wire_split(const struct kv_span *pieces, size_t piece_count, uint8_t *scratch,
                             size_t scratch_bytes, struct kv_wire *out) {
    struct cursor at = {pieces, pieces + piece_count, 0};
    size_t left = 0; /* of the message, behind the cursor */
    for (size_t i = 0; i < piece_count; i++) left += pieces[i].count;
    *out = (struct kv_wire){.rest = scratch, .end = at.end};

    while (cursor_settle(&at)) {
        uint8_t raw[TAG_BYTES_MAX + VARINT_BYTES_MAX];
        size_t raw_bytes, bytes;
        uint32_t number;
        unsigned type;
        if (!cursor_head(&at, &number, &type, raw, &raw_bytes, &bytes)) return KV_INVALID;
        left -= raw_bytes;
        if (bytes > left) return KV_INVALID;
        left -= bytes;

        if (number == KV_WIRE_DATA_FIELD && type == TYPE_COUNTED) {
            cursor_settle(&at);
            out->data = at.piece;
            out->data_offset = at.offset;
            out->data_bytes = bytes;
            cursor_take(&at, bytes, NULL);
            continue;
        }
        if (raw_bytes + bytes > scratch_bytes - out->rest_bytes) return KV_BUSY;
        memcpy(scratch + out->rest_bytes, raw, raw_bytes);
        out->rest_bytes += raw_bytes;
        cursor_take(&at, bytes, scratch + out->rest_bytes);
        out->rest_bytes += bytes;
    }
    return KV_OK;
}

void kv_wire_gather(const struct kv_wire *wire, uint8_t *target) {
    if (wire->data_bytes == 0) return;
    struct cursor at = {wire->data, wire->end, wire->data_offset};
    bool whole = cursor_take(&at, wire->data_bytes, target);
    KV_CHECK(whole);
}

bool kv_wire_next(struct kv_span *message, struct kv_wire_field *out) {
    struct cursor at = {message, message + 1, 0};
    if (message->count == 0) return false;

    uint8_t raw[TAG_BYTES_MAX + VARINT_BYTES_MAX];
    size_t raw_bytes, bytes;
    unsigned type;
    *out = (struct kv_wire_field){0};
    if (!cursor_head(&at, &out->number, &type, raw, &raw_bytes, &bytes)) return false;
    out->type = (uint8_t)type;
    out->bytes = (struct kv_span){message->bytes + raw_bytes, bytes};
    if (bytes > message->count - raw_bytes) return false;

    /* The varint that follows the tag, or the fixed width, as a number. */
    if (type == TYPE_VARINT) {
        size_t first = 0;
        while (raw[first] & 0x80) first++;
        for (size_t i = first + 1; i < raw_bytes; i++)
            out->value |= (uint64_t)(raw[i] & 0x7f) << (7 * (i - first - 1));
    } else if (type != TYPE_COUNTED) {
        for (size_t i = 0; i < bytes; i++) out->value |= (uint64_t)out->bytes.bytes[i] << (8 * i);
    }
    message->bytes += raw_bytes + bytes;
    message->count -= raw_bytes + bytes;
    return true;
}

size_t kv_wire_data_head(uint8_t target[KV_WIRE_DATA_HEAD_MAX], uint64_t bytes) {
    size_t count = 0;
    target[count++] = KV_WIRE_DATA_FIELD << 3 | TYPE_COUNTED;
    for (; bytes > 0x7f; bytes >>= 7) target[count++] = (uint8_t)(bytes | 0x80);
    target[count++] = (uint8_t)bytes;
    return count;
}
