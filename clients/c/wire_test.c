/* SPDX-License-Identifier: Apache-2.0 */
/* wire_test.c - the splitter against protobuf-c, which is the truth.
 *
 * What could go wrong: a field that ends inside a piece, a varint cut in two, a length that lies,
 * a field given twice.  Random messages are packed by protobuf-c, cut into random pieces, and must
 * come apart into the same fields and the same payload; random damage must never be read beyond
 * the end (asan) and, whatever is accepted, must be what protobuf-c would have read.
 */
#include "clients/c/wire.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "proto/kivi/v1/kivi.pb-c.h"

enum { MESSAGES = 2000, BYTES_MAX = 3000, PIECES_MAX = BYTES_MAX + 1 };

static unsigned seed;

static unsigned dice(unsigned sides) {
    return (unsigned)rand() % sides;
}

/* Cuts bytes into pieces of random lengths, some of them empty. Each is a copy of its own, so that
 * a sanitizer sees a step beyond its end. */
static size_t cut(const uint8_t *bytes, size_t count, struct wire_piece *pieces) {
    size_t piece_count = 0, sides = 1 + dice(dice(4) == 0 ? 500 : 8);
    while (count > 0 || piece_count == 0) {
        size_t run = dice((unsigned)sides + 1);
        if (piece_count > BYTES_MAX / 2) run = count; /* enough of empty pieces */
        if (run > count) run = count;
        uint8_t *copy = malloc(run ? run : 1);
        memcpy(copy, bytes, run);
        pieces[piece_count++] = (struct wire_piece){copy, run};
        bytes += run;
        count -= run;
    }
    return piece_count;
}

static void pieces_free(struct wire_piece *pieces, size_t count) {
    for (size_t i = 0; i < count; i++) free((void *)pieces[i].data);
}

/* An append frame with random fields, packed by protobuf-c with its payload inside. */
static size_t random_frame(uint8_t *to) {
    uint32_t ids[40];
    float energy[20];
    uint8_t data[1500];
    Kivi__V1__AppendRequest frame = KIVI__V1__APPEND_REQUEST__INIT;
    frame.session = (uint64_t)rand() << dice(32);
    frame.layer = dice(300);
    frame.all_layers = dice(2);
    frame.tokens = dice(5);
    frame.n_token_ids = dice(41);
    frame.token_ids = ids;
    frame.n_query_energy = dice(21);
    frame.query_energy = energy;
    frame.data.len = dice(3) ? dice(sizeof data) : 0;
    frame.data.data = data;
    for (size_t i = 0; i < 40; i++) ids[i] = (uint32_t)rand();
    for (size_t i = 0; i < 20; i++) energy[i] = (float)rand();
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)rand();
    return kivi__v1__append_request__pack(&frame, to);
}

/* The whole message as protobuf-c sees it, against header and payload as wire_split() left them. */
static void assert_same(const uint8_t *bytes, size_t count, const struct wire_message *message) {
    Kivi__V1__AppendRequest *whole = kivi__v1__append_request__unpack(NULL, count, bytes);
    if (!whole) return; /* protobuf-c refuses more, in the small fields, which it is given too */
    Kivi__V1__AppendRequest *header =
        kivi__v1__append_request__unpack(NULL, message->header_bytes, message->header);
    assert_non_null(header);

    assert_int_equal(message->payload_bytes, whole->data.len);
    uint8_t *payload = malloc(message->payload_bytes + 1);
    wire_gather(message, 0, message->payload_bytes, payload);
    assert_memory_equal(payload, whole->data.data, whole->data.len);

    header->data = (ProtobufCBinaryData){.len = whole->data.len, .data = payload};
    size_t size = kivi__v1__append_request__get_packed_size(whole);
    assert_int_equal(kivi__v1__append_request__get_packed_size(header), size);
    uint8_t *a = malloc(2 * size + 1), *b = a + size;
    kivi__v1__append_request__pack(whole, a);
    kivi__v1__append_request__pack(header, b);
    assert_memory_equal(a, b, size);
    free(a);
    header->data = (ProtobufCBinaryData){0};
    free(payload);
    kivi__v1__append_request__free_unpacked(header, NULL);
    kivi__v1__append_request__free_unpacked(whole, NULL);
}

static void split_agrees_with_protobuf(void **state) {
    struct wire_message message = {0};
    struct wire_piece pieces[PIECES_MAX];
    uint8_t bytes[BYTES_MAX];
    for (int i = 0; i < MESSAGES; i++) {
        size_t count = random_frame(bytes);
        size_t piece_count = cut(bytes, count, pieces);
        assert_true(wire_split(&message, pieces, piece_count));
        assert_same(bytes, count, &message);
        pieces_free(pieces, piece_count);
    }
    wire_message_free(&message);
}

/* Bytes flipped, the end cut off. protobuf-c and the splitter need not refuse the same messages
 * (the splitter reads no small field), but what both accept must be the same. */
static void split_survives_damage(void **state) {
    struct wire_message message = {0};
    struct wire_piece pieces[PIECES_MAX];
    uint8_t bytes[BYTES_MAX];
    int refused = 0;
    for (int i = 0; i < MESSAGES; i++) {
        size_t count = random_frame(bytes);
        for (unsigned flips = dice(4); flips > 0 && count > 0; flips--)
            bytes[dice(2) ? dice((unsigned)count) : dice(count < 40 ? (unsigned)count : 40)] ^=
                (uint8_t)(1u << dice(8));
        if (dice(2) && count > 0) count = dice((unsigned)count);
        size_t piece_count = cut(bytes, count, pieces);
        if (wire_split(&message, pieces, piece_count)) assert_same(bytes, count, &message);
        else refused++;
        pieces_free(pieces, piece_count);
    }
    assert_true(refused > MESSAGES / 10);
    wire_message_free(&message);
}

static bool split_one(struct wire_message *message, const void *bytes, size_t count) {
    struct wire_piece piece = {bytes, count};
    return wire_split(message, &piece, 1);
}

static void split_refuses_what_is_no_message(void **state) {
    struct wire_message message = {0};
    assert_true(split_one(&message, "", 0));
    assert_false(split_one(&message, "\x00", 1));         /* field 0 */
    assert_false(split_one(&message, "\x7a\x05" "abcd", 6)); /* payload shorter than it says */
    assert_false(split_one(&message, "\x7a", 1));         /* no length */
    assert_false(split_one(&message, "\x08\x80", 2));     /* varint without an end */
    assert_false(split_one(&message, "\x0b\x0c", 2));     /* a group */
    assert_false(split_one(&message, "\x09" "1234567", 8)); /* eight bytes, seven there */
    assert_false(split_one(&message, "\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 12));
    wire_message_free(&message);
}

static void last_payload_counts(void **state) {
    struct wire_message message = {0};
    uint8_t got[3];
    assert_true(split_one(&message, "\x7a\x02zz\x08\x07\x7a\x03new", 11));
    assert_int_equal(message.payload_bytes, 3);
    wire_gather(&message, 0, 3, got);
    assert_memory_equal(got, "new", 3);
    assert_int_equal(message.header_bytes, 2);
    wire_message_free(&message);
}

static void small_fields_are_bounded(void **state) {
    struct wire_message message = {0};
    size_t count = WIRE_HEADER_MAX + 100;
    uint8_t *bytes = calloc(1, count);
    for (size_t i = 0; i + 1 < count; i += 2) bytes[i] = 0x08; /* field 1, value 0, for ever */
    assert_false(split_one(&message, bytes, count & ~(size_t)1));
    free(bytes);
    wire_message_free(&message);
}

/* Header, tag, length and payload, one behind the other, are what protobuf-c would have packed. */
static void pack_is_ordinary_protobuf(void **state) {
    static const size_t sizes[] = {0, 1, 127, 128, 16383, 16384, 70000};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        Kivi__V1__FetchResponse frame = KIVI__V1__FETCH_RESPONSE__INIT;
        frame.layer = 3;
        frame.begin = 1u << 20;
        uint8_t *ours = malloc(wire_pack_max(&frame.base) + sizes[i]);
        uint8_t *data = calloc(1, sizes[i] + 1);
        size_t bytes = wire_pack(&frame.base, sizes[i], ours);
        memcpy(ours + bytes, data, sizes[i]);

        frame.data = (ProtobufCBinaryData){.len = sizes[i], .data = data};
        size_t expected = kivi__v1__fetch_response__get_packed_size(&frame);
        uint8_t *theirs = malloc(expected);
        kivi__v1__fetch_response__pack(&frame, theirs);
        assert_int_equal(bytes + sizes[i], expected);
        assert_memory_equal(ours, theirs, expected);
        free(theirs);
        free(data);
        free(ours);
    }
}

int main(int argc, char **argv) {
    seed = argc > 1 ? (unsigned)strtoul(argv[1], NULL, 0) : (unsigned)time(NULL);
    printf("seed %u (give it as an argument to see the same again)\n", seed);
    srand(seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(split_agrees_with_protobuf),
        cmocka_unit_test(split_survives_damage),
        cmocka_unit_test(split_refuses_what_is_no_message),
        cmocka_unit_test(last_payload_counts),
        cmocka_unit_test(small_fields_are_bounded),
        cmocka_unit_test(pack_is_ordinary_protobuf),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
