/* SPDX-License-Identifier: Apache-2.0 */
/* wire_test.c - the splitter finds the payload wherever the pieces are cut, and refuses damage. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "proto/kivi/v1/kivi.pb-c.h"
#include "service/wire.h"

enum { PIECES = 64 };

/* Cuts a message into `count` pieces, some of them empty. */
static size_t cut(const uint8_t *message, size_t bytes, size_t step, struct kv_span *pieces) {
    size_t count = 0;
    pieces[count++] = (struct kv_span){message, 0};
    for (size_t at = 0; at < bytes && count + 2 < PIECES; at += step) {
        size_t run = bytes - at < step || count + 4 >= PIECES ? bytes - at : step;
        pieces[count++] = (struct kv_span){message + at, run};
        pieces[count++] = (struct kv_span){message + at + run, 0};
        if (run > step) break;
    }
    return count;
}

/* A message as a client packs it: 40 bytes of payload, and fields before it. */
static size_t sample(uint8_t *out) {
    static uint8_t data[40];
    for (unsigned i = 0; i < sizeof data; i++) data[i] = (uint8_t)i;
    Kivi__V1__AppendRequest message = KIVI__V1__APPEND_REQUEST__INIT;
    uint32_t ids[3] = {7, 8, 9};
    message.session = 1ull << 60;
    message.tokens = 3;
    message.n_token_ids = 3;
    message.token_ids = ids;
    message.data = (ProtobufCBinaryData){sizeof data, data};
    return kivi__v1__append_request__pack(&message, out);
}

static void test_payload_is_found_at_every_cut(void **state) {
    uint8_t message[256], scratch[256], payload[40];
    struct kv_span pieces[PIECES];
    size_t bytes = sample(message);
    for (size_t step = 1; step <= bytes; step++) {
        struct kv_wire wire;
        size_t count = cut(message, bytes, step, pieces);
        assert_int_equal(kv_wire_split(pieces, count, scratch, sizeof scratch, &wire), KV_OK);
        assert_int_equal(wire.data_bytes, 40);
        kv_wire_gather(&wire, payload);
        for (unsigned i = 0; i < 40; i++) assert_int_equal(payload[i], i);

        Kivi__V1__AppendRequest *rest =
            kivi__v1__append_request__unpack(NULL, wire.rest_bytes, wire.rest);
        assert_non_null(rest);
        assert_true(rest->session == 1ull << 60 && rest->tokens == 3 && rest->n_token_ids == 3);
        assert_int_equal(rest->data.len, 0);
        kivi__v1__append_request__free_unpacked(rest, NULL);
    }
}

static void test_every_truncation_is_refused_or_shorter(void **state) {
    uint8_t message[256], scratch[256];
    size_t bytes = sample(message);
    for (size_t end = 0; end < bytes; end++) {
        struct kv_span piece = {message, end};
        struct kv_wire wire;
        enum kv_status status = kv_wire_split(&piece, 1, scratch, sizeof scratch, &wire);
        Kivi__V1__AppendRequest *whole = kivi__v1__append_request__unpack(NULL, end, message);
        assert_int_equal(status == KV_OK, whole != NULL);
        if (whole) kivi__v1__append_request__free_unpacked(whole, NULL);
    }
}

static void test_the_last_payload_wins(void **state) {
    const uint8_t message[] = {0x7a, 2, 'a', 'b', 0x08, 5, 0x7a, 1, 'c'};
    uint8_t scratch[16], payload[2];
    struct kv_span piece = {message, sizeof message};
    struct kv_wire wire;
    assert_int_equal(kv_wire_split(&piece, 1, scratch, sizeof scratch, &wire), KV_OK);
    assert_int_equal(wire.data_bytes, 1);
    kv_wire_gather(&wire, payload);
    assert_int_equal(payload[0], 'c');
    assert_int_equal(wire.rest_bytes, 2);
}

static void test_a_rest_that_does_not_fit_is_busy(void **state) {
    uint8_t message[256], scratch[256];
    size_t bytes = sample(message);
    struct kv_span piece = {message, bytes};
    struct kv_wire wire;
    size_t needed = bytes - 42; /* all but the payload and its head */
    assert_int_equal(kv_wire_split(&piece, 1, scratch, needed, &wire), KV_OK);
    assert_int_equal(kv_wire_split(&piece, 1, scratch, needed - 1, &wire), KV_BUSY);
}

static void test_damage_is_refused(void **state) {
    static const struct {
        uint8_t bytes[16];
        size_t count;
    } damaged[] = {
        {{0x00, 0x01}, 2},                                     /* field 0 */
        {{0x0b}, 1}, {{0x0c}, 1},                              /* groups */
        {{0x0e}, 1}, {{0x0f, 0}, 2},                           /* no such wire type */
        {{0x7a, 0xff, 0xff, 0xff, 0xff, 0x0f}, 6},             /* 4 GiB of payload */
        {{0x0a, 0x80, 0x80, 0x80, 0x80, 0x80, 0x00}, 7},       /* a length of 6 bytes */
        {{0x08, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0}, 12},
        {{0x80, 0x80, 0x80, 0x80, 0x80, 0x01}, 6},             /* a tag of 6 bytes */
        {{0x09, 1, 2, 3}, 4}, {{0x0d, 1}, 2},                  /* fixed widths cut short */
    };
    for (size_t i = 0; i < sizeof damaged / sizeof damaged[0]; i++) {
        uint8_t scratch[16];
        struct kv_span piece = {damaged[i].bytes, damaged[i].count};
        struct kv_wire wire;
        assert_int_equal(kv_wire_split(&piece, 1, scratch, sizeof scratch, &wire), KV_INVALID);
    }
}

static void test_an_empty_message_is_one(void **state) {
    struct kv_wire wire;
    assert_int_equal(kv_wire_split(NULL, 0, NULL, 0, &wire), KV_OK);
    assert_int_equal(wire.rest_bytes + wire.data_bytes, 0);
}

/* Head and payload sent one behind the other are byte for byte what protobuf-c packs. */
static void test_data_head_is_what_protobuf_writes(void **state) {
    static const size_t sizes[] = {1, 127, 128, 16383, 16384, 70000};
    static uint8_t data[70000], packed[70100];
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        uint8_t head[KV_WIRE_DATA_HEAD_MAX];
        Kivi__V1__FetchResponse message = KIVI__V1__FETCH_RESPONSE__INIT;
        message.data = (ProtobufCBinaryData){sizes[i], data};
        size_t bytes = kivi__v1__fetch_response__pack(&message, packed);
        size_t count = kv_wire_data_head(head, sizes[i]);
        assert_int_equal(count + sizes[i], bytes);
        assert_memory_equal(head, packed, count);
    }
}

static void test_fields_are_walked_with_their_values(void **state) {
    const uint8_t bytes[] = {0x08, 0xac, 0x02, 0x12, 2, 'h', 'i', 0x1d, 1, 2, 3, 4, 0x21, 1,
                             0,    0,    0,    0,    0, 0,   2,   0x2a};
    struct kv_span message = {bytes, sizeof bytes};
    struct kv_wire_field field;
    assert_true(kv_wire_next(&message, &field) && field.number == 1 && field.value == 300);
    assert_true(kv_wire_next(&message, &field) && field.number == 2 && field.bytes.count == 2 &&
                field.bytes.bytes[0] == 'h');
    assert_true(kv_wire_next(&message, &field) && field.value == 0x04030201);
    assert_true(kv_wire_next(&message, &field) && field.value == 0x0200000000000001);
    assert_false(kv_wire_next(&message, &field)); /* a tag without its length */
    assert_int_equal(message.count, 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_payload_is_found_at_every_cut),
        cmocka_unit_test(test_every_truncation_is_refused_or_shorter),
        cmocka_unit_test(test_the_last_payload_wins),
        cmocka_unit_test(test_a_rest_that_does_not_fit_is_busy),
        cmocka_unit_test(test_damage_is_refused),
        cmocka_unit_test(test_an_empty_message_is_one),
        cmocka_unit_test(test_data_head_is_what_protobuf_writes),
        cmocka_unit_test(test_fields_are_walked_with_their_values),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
