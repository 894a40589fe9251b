/* SPDX-License-Identifier: Apache-2.0 */
/* wire_fuzz.c - the splitter against protobuf-c's own unpacking of the whole message.
 *
 * The first byte says how the message is cut into pieces.  If the splitter takes it, then what is
 * left unpacks exactly when the whole does, to the same message but for `data`, and the
 * gathered payload is the whole's `data`.  If it refuses, the whole is refused too, unless the
 * reason is the one rule that protobuf-c does not know (no field has number 0).
 */
#include <stdlib.h>

#include "proto/kivi/v1/kivi.pb-c.h"
#include "proto/kv_check.h"
#include "service/wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t bytes);

enum { PIECES = 16, MESSAGE_MAX = 4096 };

static bool has_field_0(const uint8_t *message, size_t bytes) {
    struct kv_span rest = {message, bytes};
    struct kv_wire_field field;
    while (kv_wire_next(&rest, &field)) {
    }
    /* The walk stopped at a tag below 8, whatever its length: a varint whose low bits say so. */
    uint64_t tag = 0;
    for (size_t i = 0; i < rest.count && i < 5; i++) {
        tag |= (uint64_t)(rest.bytes[i] & 0x7f) << (7 * i);
        if (!(rest.bytes[i] & 0x80)) return (uint32_t)(tag >> 3) == 0;
    }
    return false;
}

static void compare(const struct kv_wire *wire, Kivi__V1__AppendRequest *whole) {
    static uint8_t payload[MESSAGE_MAX], a[2 * MESSAGE_MAX], b[2 * MESSAGE_MAX];
    Kivi__V1__AppendRequest *rest =
        kivi__v1__append_request__unpack(NULL, wire->rest_bytes, wire->rest);
    KV_CHECK((rest != NULL) == (whole != NULL));
    if (!rest) return;

    kv_wire_gather(wire, payload);
    KV_CHECK(whole->data.len == wire->data_bytes);
    KV_CHECK(wire->data_bytes == 0 || !memcmp(payload, whole->data.data, wire->data_bytes));
    KV_CHECK(rest->data.len == 0);
    rest->data = whole->data;
    size_t count = kivi__v1__append_request__get_packed_size(whole);
    KV_CHECK(count <= sizeof a && count == kivi__v1__append_request__get_packed_size(rest));
    kivi__v1__append_request__pack(whole, a);
    kivi__v1__append_request__pack(rest, b);
    KV_CHECK(memcmp(a, b, count) == 0);
    rest->data = (ProtobufCBinaryData){0, NULL};
    kivi__v1__append_request__free_unpacked(rest, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t bytes) {
    static uint8_t scratch[MESSAGE_MAX];
    struct kv_span pieces[PIECES];
    struct kv_wire wire;
    if (bytes == 0 || bytes > MESSAGE_MAX) return 0;
    size_t step = 1 + input[0] % 37, count = 0;
    input++;
    bytes--;
    for (size_t at = 0; at < bytes; at += step, count++) {
        if (count == PIECES - 1) step = bytes - at;
        pieces[count] = (struct kv_span){input + at, bytes - at < step ? bytes - at : step};
    }

    Kivi__V1__AppendRequest *whole = kivi__v1__append_request__unpack(NULL, bytes, input);
    enum kv_status status = kv_wire_split(pieces, count, scratch, sizeof scratch, &wire);
    KV_CHECK(status != KV_BUSY); /* the scratch is as large as any message here */
    if (status == KV_OK)
        compare(&wire, whole);
    else
        KV_CHECK(!whole || has_field_0(input, bytes));
    if (whole) kivi__v1__append_request__free_unpacked(whole, NULL);
    return 0;
}
