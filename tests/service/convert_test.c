/* SPDX-License-Identifier: Apache-2.0 */
/* convert_test.c - messages to requests: what arrives, what is refused and under which field; and the
 * codes and sentences on the way back. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <stdlib.h>

#include "proto/kivi/v1/kivi.pb-c.h"
#include "service/convert.h"

enum { MESSAGE_MAX = 4096, STAGING = 256 << 10 };

static struct kv_request request;
static struct kv_plan plan;
static uint8_t *staging, wire_bytes[MESSAGE_MAX], scratch[MESSAGE_MAX], memory[64 << 10];

/* Splits what a client would have packed, for a decoder. */
static struct kv_inbound inbound(const ProtobufCMessage *message) {
    static struct kv_span piece;
    static struct kv_digest fingerprint;
    static bool has_fingerprint;
    struct kv_inbound in = {.memory = memory, .memory_bytes = sizeof memory,
                            .fingerprint = &fingerprint, .has_fingerprint = &has_fingerprint};
    has_fingerprint = false;
    assert_true(protobuf_c_message_get_packed_size(message) <= MESSAGE_MAX);
    piece = (struct kv_span){wire_bytes, protobuf_c_message_pack(message, wire_bytes)};
    assert_int_equal(kv_wire_split(&piece, 1, scratch, sizeof scratch, &in.wire), KV_OK);
    memset(&request, 0, sizeof request);
    memset(&plan, 0, sizeof plan);
    request.staging = staging;
    request.staging_bytes = STAGING;
    return in;
}

static enum kv_status decode(kv_decode *how, const ProtobufCMessage *message) {
    struct kv_inbound in = inbound(message);
    return how(&in, &request);
}
static enum kv_status decode_plan(kv_decode_plan *how, const ProtobufCMessage *message) {
    struct kv_inbound in = inbound(message);
    return how(&in, &plan, &request);
}

static void refused(enum kv_status status, const char *field) {
    assert_int_equal(status, KV_INVALID);
    assert_int_equal(request.status, KV_INVALID);
    assert_string_equal(request.field, field);
    assert_true(request.message[0] != 0);
}

static uint8_t digest[KV_DIGEST_BYTES + 1] = {1, 2, 3};
static ProtobufCBinaryData digest_of(size_t bytes) {
    return (ProtobufCBinaryData){bytes, digest};
}

static void names(void **state) {
    Kivi__V1__OpenSessionRequest message = KIVI__V1__OPEN_SESSION_REQUEST__INIT;
    uint32_t ids[3] = {5, 6, 7};
    char longest[KV_NAME_MAX + 2] = "";
    message.fingerprint = digest_of(KV_DIGEST_BYTES);
    message.name = "chat-\xc3\xa9";
    message.n_token_ids = 3;
    message.token_ids = ids;
    assert_int_equal(decode(kv_decode_open, &message.base), KV_OK);
    assert_string_equal(request.open.name, "chat-\xc3\xa9");
    assert_memory_equal(request.open.fingerprint.bytes, digest, KV_DIGEST_BYTES);
    assert_int_equal(request.open.token_count, 3);
    assert_memory_equal(request.staging, ids, sizeof ids);

    memset(longest, 'x', KV_NAME_MAX);
    message.name = longest;
    assert_int_equal(decode(kv_decode_open, &message.base), KV_OK);
    longest[KV_NAME_MAX] = 'x';
    refused(decode(kv_decode_open, &message.base), "name");
    static char *const bad[] = {"", "a\nb", "\x7f", "\xff", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80",
                                "cut \xe2\x82"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        message.name = bad[i];
        refused(decode(kv_decode_open, &message.base), "name");
    }
}

static void digests_salts_and_modes(void **state) {
    Kivi__V1__OpenSessionRequest message = KIVI__V1__OPEN_SESSION_REQUEST__INIT;
    uint8_t salt[KV_SALT_MAX + 1] = {9};
    message.name = "n";
    for (size_t bytes = 0; bytes <= KV_DIGEST_BYTES + 1; bytes++) {
        message.fingerprint = digest_of(bytes);
        enum kv_status status = decode(kv_decode_open, &message.base);
        if (bytes == KV_DIGEST_BYTES) assert_int_equal(status, KV_OK);
        else refused(status, "fingerprint");
    }
    message.fingerprint = digest_of(KV_DIGEST_BYTES);
    message.salt = (ProtobufCBinaryData){KV_SALT_MAX, salt};
    assert_int_equal(decode(kv_decode_open, &message.base), KV_OK);
    assert_int_equal(request.open.salt.count, KV_SALT_MAX);
    message.salt.len++;
    refused(decode(kv_decode_open, &message.base), "salt");
    message.salt.len = 0;
    message.mode = (Kivi__V1__OpenSessionRequest__Mode)3;
    refused(decode(kv_decode_open, &message.base), "mode");
    message.mode = (Kivi__V1__OpenSessionRequest__Mode)-1;
    refused(decode(kv_decode_open, &message.base), "mode");
}

static void durabilities(void **state) {
    Kivi__V1__CommitRequest message = KIVI__V1__COMMIT_REQUEST__INIT;
    message.session = 1ull << 63;
    assert_int_equal(decode(kv_decode_commit, &message.base), KV_OK);
    assert_true(request.commit.session == 1ull << 63);
    assert_int_equal(request.commit.durability, KV_WRITTEN);
    message.durability = KIVI__V1__DURABILITY__SYNCED;
    assert_int_equal(decode(kv_decode_commit, &message.base), KV_OK);
    assert_int_equal(request.commit.durability, KV_SYNCED);
    message.durability = KIVI__V1__DURABILITY__VOLATILE; /* there is nothing to wait for */
    refused(decode(kv_decode_commit, &message.base), "durability");
    message.durability = (Kivi__V1__Durability)4;
    refused(decode(kv_decode_commit, &message.base), "durability");
}

static void layouts(void **state) {
    Kivi__V1__RegisterLayoutRequest message = KIVI__V1__REGISTER_LAYOUT_REQUEST__INIT;
    Kivi__V1__Layout layout = KIVI__V1__LAYOUT__INIT;
    Kivi__V1__Codec codec = KIVI__V1__CODEC__INIT;
    refused(decode(kv_decode_register, &message.base), "layout");

    message.layout = &layout;
    layout.layers = 4, layout.kv_heads = 2, layout.query_heads = 8, layout.head_dim = 64;
    layout.dtype = KIVI__V1__DTYPE__DTYPE_BF16;
    assert_int_equal(decode(kv_decode_register, &message.base), KV_OK);
    const struct kv_layout *got = &request.reg.layout;
    assert_int_equal(got->heads_q, 8);
    assert_int_equal(got->dtype, KV_DTYPE_BF16);
    assert_int_equal(got->block_tokens, KV_BLOCK_TOKENS);
    assert_true(got->score_scale == 0.125f);
    assert_string_equal(kv_codec_name(&got->codec), "kivi2");

    layout.layers = 65536 + 4; /* must not wrap around to 4 */
    refused(decode(kv_decode_register, &message.base), "layout.layers");
    layout.layers = 4;
    layout.head_dim = UINT32_MAX;
    refused(decode(kv_decode_register, &message.base), "layout.head_dim");
    layout.head_dim = 64;

    layout.codec = &codec;
    codec.preset = "kivi9";
    refused(decode(kv_decode_register, &message.base), "layout.codec.preset");
    codec.preset = "kivi2-paper";
    assert_int_equal(decode(kv_decode_register, &message.base), KV_OK);
    codec.key_bits = 4; /* not what that preset says */
    refused(decode(kv_decode_register, &message.base), "layout.codec.kind");
    codec.kind = KIVI__V1__CODEC__KIND__MINMAX;
    refused(decode(kv_decode_register, &message.base), "layout.codec");
    uint32_t mixes[5] = {4, 2, 2, 0, 2};
    codec.preset = "", codec.kind = KIVI__V1__CODEC__KIND__UNBIASED, codec.key_bits = 0;
    codec.mixes = mixes, codec.n_mixes = 5;
    refused(decode(kv_decode_register, &message.base), "layout.codec.mixes");
    codec.n_mixes = 4, mixes[3] = 256;
    refused(decode(kv_decode_register, &message.base), "layout.codec.mixes");
}

static void fetches(void **state) {
    Kivi__V1__FetchRequest message = KIVI__V1__FETCH_REQUEST__INIT;
    uint32_t wanted[2] = {7, 3};
    message.session = 4, message.begin = 10, message.end = 20;
    message.layers = wanted, message.n_layers = 2;
    message.dtype = KIVI__V1__DTYPE__DTYPE_F32;
    assert_int_equal(decode_plan(kv_decode_fetch, &message.base), KV_OK);
    assert_true(plan.session == 4 && plan.begin == 10 && plan.end == 20);
    assert_true(plan.layer_count == 2 && plan.layers[0] == 7 && plan.layers[1] == 3);
    assert_int_equal(plan.dtype, KV_DTYPE_F32);
    message.end = 9;
    refused(decode_plan(kv_decode_fetch, &message.base), "end");
    message.end = 0;
    assert_int_equal(decode_plan(kv_decode_fetch, &message.base), KV_OK);
    message.dtype = (Kivi__V1__Dtype)4;
    refused(decode_plan(kv_decode_fetch, &message.base), "dtype");
    message.dtype = (Kivi__V1__Dtype)-1;
    refused(decode_plan(kv_decode_fetch, &message.base), "dtype");
    message.dtype = 0;
    wanted[0] = 65536; /* must not wrap around to layer 0 */
    refused(decode_plan(kv_decode_fetch, &message.base), "layers");
}

static void gets(void **state) {
    Kivi__V1__GetRequest message = KIVI__V1__GET_REQUEST__INIT;
    ProtobufCBinaryData digests[2] = {digest_of(KV_DIGEST_BYTES), digest_of(KV_DIGEST_BYTES - 1)};
    message.fingerprint = digest_of(KV_DIGEST_BYTES);
    refused(decode_plan(kv_decode_get, &message.base), "digests");
    message.digests = digests, message.n_digests = 1;
    assert_int_equal(decode_plan(kv_decode_get, &message.base), KV_OK);
    assert_int_equal(plan.digest_count, 1);
    assert_int_equal(plan.form, KV_FORM_FULL);
    message.n_digests = 2;
    refused(decode_plan(kv_decode_get, &message.base), "digests");
    message.n_digests = 1;
    message.form = (Kivi__V1__Form)3;
    refused(decode_plan(kv_decode_get, &message.base), "form");
}

/* The payload goes to the front of staging, what stands beside it behind, aligned. */
static void appends(void **state) {
    Kivi__V1__AppendRequest message = KIVI__V1__APPEND_REQUEST__INIT;
    uint8_t data[300];
    uint32_t ids[3] = {70000, 1, UINT32_MAX};
    for (size_t i = 0; i < sizeof data; i++) data[i] = (uint8_t)(i * 7);
    message.session = 3, message.tokens = 3, message.expected_length = 1ull << 40;
    message.token_ids = ids, message.n_token_ids = 3;
    message.data = (ProtobufCBinaryData){sizeof data, data};
    assert_int_equal(decode(kv_decode_append, &message.base), KV_OK);
    assert_int_equal(request.kind, KV_REQUEST_APPEND);
    assert_true(request.append.expected_length == 1ull << 40);
    assert_int_equal(request.bytes_in, sizeof data);
    assert_memory_equal(request.staging, data, sizeof data);
    assert_true(request.append.has_token_ids);
    assert_int_equal(request.append.token_ids_offset % 64, 0);
    assert_true(request.append.token_ids_offset >= sizeof data);
    assert_memory_equal(request.staging + request.append.token_ids_offset, ids, sizeof ids);
}

/* A message that is small on the wire and large unpacked: refused, not allocated. */
static void a_message_of_very_many_parts(void **state) {
    Kivi__V1__LookupRequest message = KIVI__V1__LOOKUP_REQUEST__INIT;
    static ProtobufCBinaryData empty[1500];
    message.fingerprint = digest_of(KV_DIGEST_BYTES);
    message.digests = empty, message.n_digests = sizeof empty / sizeof *empty;
    struct kv_inbound in = inbound(&message.base);
    in.memory_bytes = 8192;
    refused(kv_decode_lookup(&in, &request), "");
}

static void codes_and_sentences(void **state) {
    static const uint32_t codes[] = {
        [KV_OK] = 0, [KV_CANCELLED] = 1, [KV_INVALID] = 3, [KV_DEADLINE] = 4, [KV_NOT_FOUND] = 5,
        [KV_EXISTS] = 6, [KV_BUSY] = 8, [KV_MISMATCH] = 9, [KV_ABORTED] = 10, [KV_UNSUPPORTED] = 12,
        [KV_IO_ERROR] = 14, [KV_UNAVAILABLE] = 14, [KV_CORRUPT] = 15,
    };
    char text[32];
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++) {
        assert_int_equal(kv_status_code((enum kv_status)i), codes[i]);
        kv_status_text((enum kv_status)i, "", "", text, sizeof text);
        assert_true(i == KV_OK || text[0] != 0);
    }
    assert_int_equal(kv_status_code((enum kv_status)99), 2);
    kv_status_text(KV_INVALID, "layers", "too many", text, sizeof text);
    assert_string_equal(text, "layers: too many");
    kv_status_text(KV_INVALID, "a_field_with_a_name", "and a long sentence", text, sizeof text);
    assert_int_equal(strlen(text), sizeof text - 1); /* cut, and still a string */
}

static uint8_t sent[MESSAGE_MAX];
static size_t sent_bytes;
static uint8_t *room(void *context, size_t bytes) {
    assert_int_equal(sent_bytes, 0); /* asked once, with the exact number */
    assert_true(bytes <= sizeof sent);
    sent_bytes = bytes;
    return sent;
}

static void a_fetched_page_says_what_it_is(void **state) {
    memset(&request, 0, sizeof request);
    request.fetch.layer = 7, request.fetch.begin = 1ull << 33, request.fetch.tokens = 128;
    request.reply_bytes = 1000;
    sent_bytes = 0;
    kv_encode_fetch(&request, room, NULL);
    /* The payload comes right behind: what was packed ends with its tag and length. */
    assert_true(sent_bytes + request.reply_bytes <= sizeof sent);
    memset(sent + sent_bytes, 0x5a, request.reply_bytes);
    Kivi__V1__FetchResponse *answer =
        kivi__v1__fetch_response__unpack(NULL, sent_bytes + request.reply_bytes, sent);
    assert_non_null(answer);
    assert_true(answer->layer == 7 && answer->begin == 1ull << 33 && answer->tokens == 128);
    assert_int_equal(answer->data.len, 1000);
    assert_true(answer->data.data[0] == 0x5a && answer->data.data[999] == 0x5a);
    kivi__v1__fetch_response__free_unpacked(answer, NULL);
}

/* A cold block that cannot be read or does not verify costs its own item, and says so to the client in
 * gRPC's words; the items beside it are answered. */
static void an_attended_item_that_failed(void **state) {
    memset(&request, 0, sizeof request);
    request.attend.id = 77, request.attend.item_count = 3;
    struct kv_attend_item *items = request.attend.items;
    items[0].status = KV_CORRUPT, items[0].length = 300;
    strcpy(items[0].field, "session");
    strcpy(items[0].message, "the block at token 128 failed its checksum and is gone");
    items[1].status = KV_IO_ERROR, items[1].length = 400;
    strcpy(items[1].field, "session");
    strcpy(items[1].message, "the block at token 0 could not be read");
    items[2].status = KV_OK, items[2].length = 500;
    request.reply_bytes = 1000; /* the third's */
    sent_bytes = 0;
    kv_encode_attend(&request, room, NULL);
    assert_true(sent_bytes + request.reply_bytes <= sizeof sent);
    memset(sent + sent_bytes, 0x5a, request.reply_bytes);
    Kivi__V1__AttendResponse *answer =
        kivi__v1__attend_response__unpack(NULL, sent_bytes + request.reply_bytes, sent);
    assert_non_null(answer);
    assert_int_equal(answer->id, 77);
    assert_int_equal(answer->n_items, 3);
    assert_int_equal(answer->items[0]->code, 15); /* DATA_LOSS */
    assert_string_equal(answer->items[0]->message,
                        "session: the block at token 128 failed its checksum and is gone");
    assert_int_equal(answer->items[1]->code, 14); /* UNAVAILABLE: may be tried again */
    assert_string_equal(answer->items[1]->message, "session: the block at token 0 could not be read");
    assert_int_equal(answer->items[2]->code, 0);
    assert_true(answer->items[0]->length == 300 && answer->items[2]->length == 500);
    kivi__v1__attend_response__free_unpacked(answer, NULL);
}

static int setup(void **state) {
    staging = aligned_alloc(4096, STAGING);
    return staging == NULL;
}
static int teardown(void **state) {
    free(staging);
    return 0;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names),
        cmocka_unit_test(digests_salts_and_modes),
        cmocka_unit_test(durabilities),
        cmocka_unit_test(layouts),
        cmocka_unit_test(fetches),
        cmocka_unit_test(gets),
        cmocka_unit_test(appends),
        cmocka_unit_test(a_message_of_very_many_parts),
        cmocka_unit_test(codes_and_sentences),
        cmocka_unit_test(a_fetched_page_says_what_it_is),
        cmocka_unit_test(an_attended_item_that_failed),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
