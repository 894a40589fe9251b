/* SPDX-License-Identifier: Apache-2.0 */
/* engine_errors_test.c - every way a request can be wrong: the code of the contract, the field
 * named, and nothing changed by it. */
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>

#include "tests/service/engine_lab.h"

/* One lab for all: 2 layers, 2 KV heads, 4 query heads, 64 channels, f32, a session of 200. */
struct setting {
    struct lab lab;
    struct kv_layout layout;
    struct kv_digest fingerprint;
    uint64_t session;
    float rows[256 * 128];
    uint32_t ids[256];
};

static int setting_open(void **state) {
    struct setting *s = calloc(1, sizeof *s);
    struct lab_random random = {1};
    lab_open(&s->lab, NULL);
    s->layout = lab_layout("kivi2", 2, 2, 4, 64, KV_DTYPE_F32);
    s->fingerprint = lab_register(&s->lab, &s->layout);
    s->session = lab_open_session(&s->lab, "base", &s->fingerprint);
    lab_rows(&random, s->rows, 256 * 128, 64);
    for (uint32_t i = 0; i < 256; i++) s->ids[i] = i;
    for (uint32_t l = 0; l < 2; l++) {
        struct kv_request *r = lab_append(&s->lab, s->session, &s->layout, l, 0, 200, s->rows,
                                          s->rows, s->ids);
        assert_int_equal(r->status, KV_OK);
        lab_done(&s->lab, r);
    }
    *state = s;
    return 0;
}

static int setting_close(void **state) {
    struct setting *s = *state;
    lab_close(&s->lab);
    free(s);
    return 0;
}

/* Nothing that a refused request could have left is there. */
static void unchanged(struct setting *s, const struct kv_engine_stats *before) {
    struct kv_engine_stats after = lab_stats(&s->lab);
    assert_int_equal(after.tail_bytes, before->tail_bytes);
    assert_int_equal(after.store.blocks, before->store.blocks);
    assert_int_equal(after.store.arena_bytes_used, before->store.arena_bytes_used);
    assert_int_equal(after.tokens_appended, before->tokens_appended);
    assert_int_equal(after.sessions_open, before->sessions_open);
    assert_int_equal(after.sessions_known, before->sessions_known);
    assert_int_equal(after.layouts, before->layouts);
}

/* Calls, looks at the answer, and that nothing changed. */
static void refused(struct setting *s, struct kv_request *request, enum kv_status status,
                    const char *field) {
    struct kv_engine_stats before = lab_stats(&s->lab);
    lab_call(&s->lab, request);
    if (request->status != status || strcmp(request->field, field) != 0)
        print_error("%d %s: %s\n", request->status, request->field, request->message);
    assert_int_equal(request->status, status);
    assert_string_equal(request->field, field);
    assert_true(request->message[0] != 0);
    assert_int_equal(request->reply_bytes, 0);
    lab_done(&s->lab, request);
    unchanged(s, &before);
}

/* ---- Layouts ---------------------------------------------------------------------------------- */

struct bad_layout {
    const char *field;
    void (*spoil)(struct kv_layout *layout);
};
#define SPOIL(name, ...) \
    static void name(struct kv_layout *l) { __VA_ARGS__; }
SPOIL(no_layers, l->layers = 0)
SPOIL(many_layers, l->layers = 257)
SPOIL(no_heads, l->heads = 0)
SPOIL(many_heads, l->heads = 129; l->heads_q = 129)
SPOIL(no_query_heads, l->heads_q = 0)
SPOIL(odd_query_heads, l->heads_q = 5)
SPOIL(wide_group, l->heads = 1; l->heads_q = 17)
SPOIL(odd_dim, l->head_dim = 80)
SPOIL(zero_dim, l->head_dim = 0)
SPOIL(no_dtype, l->dtype = 0)
SPOIL(odd_block, l->block_tokens = 64)
SPOIL(odd_window, l->window_tokens = 100)
SPOIL(wide_window, l->window_tokens = 1152)
SPOIL(many_sinks, l->sink_blocks = 9)
SPOIL(zero_scale, l->score_scale = 0)
SPOIL(negative_scale, l->score_scale = -1)
SPOIL(nan_scale, l->score_scale = NAN)
SPOIL(infinite_scale, l->score_scale = INFINITY)
SPOIL(reserved, l->reserved = 1)
SPOIL(odd_kind, l->codec.kind = 3)
SPOIL(odd_value_bits, l->codec.value_bits = 3)
SPOIL(no_mixes, l->codec.mix_count = 0)
SPOIL(many_mixes, l->codec.mix_count = 5)
SPOIL(rising_mix, l->codec.mixes[0][3] = 4)
SPOIL(odd_width, l->codec.mixes[0][0] = 3)
SPOIL(odd_group, l->codec = (struct kv_codec){.kind = 1, .key_bits = 2, .value_bits = 2, .group = 48})
SPOIL(wide_codes, l->codec = (struct kv_codec){.kind = 1, .key_bits = 8, .value_bits = 2, .group = 32})
SPOIL(group_beyond, l->codec = (struct kv_codec){.kind = 1, .key_bits = 2, .value_bits = 2, .group = 128})
/* 256 layers of the largest heads: 2^31 bytes a block and more, which must be seen as too large
 * and not wrap around to something small. */
SPOIL(absurd, l->layers = 256; l->heads = 128; l->heads_q = 128; l->head_dim = 256)

static void layouts_that_cannot_be(void **state) {
    static const struct bad_layout bad[] = {
        {"layout.layers", no_layers},         {"layout.layers", many_layers},
        {"layout.kv_heads", no_heads},        {"layout.kv_heads", many_heads},
        {"layout.query_heads", no_query_heads}, {"layout.query_heads", odd_query_heads},
        {"layout.query_heads", wide_group},   {"layout.head_dim", odd_dim},
        {"layout.head_dim", zero_dim},        {"layout.dtype", no_dtype},
        {"layout.block_tokens", odd_block},   {"layout.exact.window_tokens", odd_window},
        {"layout.exact.window_tokens", wide_window}, {"layout.exact.sink_blocks", many_sinks},
        {"layout.softmax_scale", zero_scale}, {"layout.softmax_scale", negative_scale},
        {"layout.softmax_scale", nan_scale},  {"layout.softmax_scale", infinite_scale},
        {"layout", reserved},                 {"layout.codec.kind", odd_kind},
        {"layout.codec.value_bits", odd_value_bits}, {"layout.codec.mixes", no_mixes},
        {"layout.codec.mixes", many_mixes},   {"layout.codec.mixes", rising_mix},
        {"layout.codec.mixes", odd_width},    {"layout.codec.group", odd_group},
        {"layout.codec.key_bits", wide_codes}, {"layout.codec.group", group_beyond},
        {"layout.kv_heads", absurd},
    };
    struct setting *s = *state;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct kv_request *request = lab_request(&s->lab, KV_REQUEST_REGISTER);
        request->reg.layout = s->layout;
        bad[i].spoil(&request->reg.layout);
        refused(s, request, KV_INVALID, bad[i].field);
    }
}

static void a_block_larger_than_the_arena_is_refused(void **state) {
    struct setting *s = *state;
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_REGISTER);
    request->reg.layout = lab_layout("kivi2", 256, 4, 4, 64, KV_DTYPE_F16);
    request->reg.layout.heads = request->reg.layout.heads_q = 16; /* sinks: 256 * 512 KiB */
    refused(s, request, KV_INVALID, "layout.layers");
}

static void registering_again_is_the_same(void **state) {
    struct setting *s = *state;
    struct kv_digest again = lab_register(&s->lab, &s->layout);
    assert_true(kv_digest_equal(&again, &s->fingerprint));
    assert_int_equal(lab_stats(&s->lab).layouts, 1);
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_LAYOUTS);
    lab_call(&s->lab, request);
    assert_int_equal(request->layouts.count, 1);
    const struct kv_layout_info *info =
        (const struct kv_layout_info *)(request->staging + request->reply_offset);
    assert_memory_equal(&info->layout, &s->layout, sizeof s->layout);
    assert_string_equal(info->model, "lab");
    lab_done(&s->lab, request);
}

/* ---- Open ---------------------------------------------------------------------------------------- */

static struct kv_request *open_request(struct setting *s, const char *name,
                                       enum kv_open_mode mode) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_OPEN);
    strcpy(request->open.name, name);
    request->open.fingerprint = s->fingerprint;
    request->open.mode = mode;
    return request;
}

static void opens_that_are_refused(void **state) {
    struct setting *s = *state;
    refused(s, open_request(s, "", KV_OPEN_OR_CREATE), KV_INVALID, "name");
    refused(s, open_request(s, "a\nb", KV_OPEN_OR_CREATE), KV_INVALID, "name");
    refused(s, open_request(s, "\xff", KV_OPEN_OR_CREATE), KV_INVALID, "name");
    refused(s, open_request(s, "\xc3", KV_OPEN_OR_CREATE), KV_INVALID, "name");
    refused(s, open_request(s, "base", KV_OPEN_CREATE), KV_EXISTS, "name");
    refused(s, open_request(s, "none", KV_OPEN_EXISTING), KV_NOT_FOUND, "name");
    struct kv_request *request = open_request(s, "base", KV_OPEN_OR_CREATE);
    request->open.salt = (struct kv_salt){.count = 1};
    refused(s, request, KV_MISMATCH, "salt");
    request = open_request(s, "x", KV_OPEN_OR_CREATE);
    request->open.fingerprint.bytes[0] ^= 1;
    refused(s, request, KV_NOT_FOUND, "fingerprint");
    request = open_request(s, "x", KV_OPEN_OR_CREATE);
    request->open.token_count = UINT32_MAX;
    refused(s, request, KV_INVALID, "token_ids");

    struct kv_layout other = lab_layout("raw16", 2, 2, 4, 64, KV_DTYPE_F32);
    struct kv_digest fingerprint = lab_register(&s->lab, &other);
    request = open_request(s, "base", KV_OPEN_OR_CREATE);
    request->open.fingerprint = fingerprint;
    refused(s, request, KV_MISMATCH, "fingerprint");

    /* Opening what is open gives the same handle. */
    assert_int_equal(lab_open_session(&s->lab, "base", &s->fingerprint), s->session);
}

/* ---- Append ---------------------------------------------------------------------------------------- */

/* 8 more tokens for layer 0, right in every way. */
static struct kv_request *append_request(struct setting *s) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_APPEND);
    request->append.session = s->session;
    request->append.expected_length = 200;
    request->append.tokens = 8;
    request->bytes_in = 8 * 128 * 4 * 2;
    memcpy(request->staging, s->rows, request->bytes_in);
    request->append.has_token_ids = true;
    request->append.token_ids_offset = request->bytes_in;
    memcpy(request->staging + request->bytes_in, s->ids, 32);
    return request;
}

static void appends_that_are_refused(void **state) {
    struct setting *s = *state;
    struct kv_request *request;
#define REFUSE(status, field, statement)  \
    do {                                  \
        request = append_request(s);      \
        statement;                        \
        refused(s, request, status, field); \
    } while (0)
    REFUSE(KV_NOT_FOUND, "session", request->append.session = 0);
    REFUSE(KV_NOT_FOUND, "session", request->append.session ^= 1ull << 40);
    REFUSE(KV_NOT_FOUND, "session", request->append.session = UINT64_MAX);
    REFUSE(KV_INVALID, "layer", request->append.layer = 2);
    REFUSE(KV_INVALID, "layer", request->append.layer = UINT32_MAX);
    REFUSE(KV_INVALID, "tokens", request->append.tokens = 0; request->bytes_in = 0);
    REFUSE(KV_INVALID, "data", request->append.tokens = 9);
    REFUSE(KV_INVALID, "data", request->append.tokens = UINT32_MAX);
    REFUSE(KV_INVALID, "data", request->append.all_layers = true);
    REFUSE(KV_INVALID, "data", request->bytes_in = 0);
    REFUSE(KV_INVALID, "data", request->bytes_in -= 4);
    REFUSE(KV_ABORTED, "expected_length", request->append.expected_length = 199);
    REFUSE(KV_ABORTED, "expected_length", request->append.expected_length = 0);
    REFUSE(KV_ABORTED, "expected_length", request->append.expected_length = UINT64_MAX);
    REFUSE(KV_INVALID, "token_ids", request->append.has_token_ids = false);
    REFUSE(KV_INVALID, "data", ((float *)request->staging)[5] = NAN);
    REFUSE(KV_INVALID, "data", ((float *)request->staging)[8 * 128 + 3] = INFINITY);
    REFUSE(KV_INVALID, "data", ((float *)request->staging)[1] = 65600.0f);
    REFUSE(KV_INVALID, "query_energy", request->append.has_energy = true;
           request->append.energy_offset = 16384;
           ((float *)(request->staging + 16384))[100] = -1);
    REFUSE(KV_INVALID, "query_energy", request->append.has_energy = true;
           request->append.energy_offset = 16384;
           ((float *)(request->staging + 16384))[0] = NAN);
    REFUSE(KV_INVALID, "query_energy", request->append.has_energy = true;
           request->append.energy_offset = 16384;
           ((float *)(request->staging + 16384))[7] = 2 * KV_ENERGY_MAX);

    /* The good one still works, and then layer 1 must bring the same ids. */
    request = append_request(s);
    lab_call(&s->lab, request);
    assert_int_equal(request->status, KV_OK);
    assert_int_equal(request->append.length, 208);
    assert_int_equal(request->append.session_length, 200);
    lab_done(&s->lab, request);
    REFUSE(KV_INVALID, "token_ids", request->append.layer = 1;
           ((uint32_t *)(request->staging + request->append.token_ids_offset))[7] = 99);
    REFUSE(KV_ABORTED, "expected_length", ); /* layer 0 has gone on */
}

/* The message says where the element is. */
static void a_nan_is_found_where_it_is(void **state) {
    struct setting *s = *state;
    struct kv_request *request = append_request(s);
    request->append.layer = 1;
    /* V, row 3 of the message, head 1, channel 17. */
    ((float *)request->staging)[8 * 128 + 3 * 128 + 64 + 17] = NAN;
    lab_call(&s->lab, request);
    assert_int_equal(request->status, KV_INVALID);
    assert_non_null(strstr(request->message, "v of layer 1, token 203, head 1, channel 17"));
    lab_done(&s->lab, request);
}

/* A block that is due in the very message that holds a NaN is not packed with it. */
static void a_nan_in_a_sink_is_not_sealed(void **state) {
    struct setting *s = *state;
    uint64_t session = lab_open_session(&s->lab, "sink", &s->fingerprint);
    static float rows[128 * 128];
    memcpy(rows, s->rows, sizeof rows);
    for (uint32_t l = 0; l < 2; l++) {
        rows[5000] = l ? NAN : 0;
        struct kv_request *request =
            lab_append(&s->lab, session, &s->layout, l, 0, 128, rows, rows, l ? NULL : s->ids);
        assert_int_equal(request->status, l ? KV_INVALID : KV_OK);
        lab_done(&s->lab, request);
    }
    rows[5000] = 0;
    struct kv_request *request =
        lab_append(&s->lab, session, &s->layout, 1, 0, 128, rows, rows, NULL);
    assert_int_equal(request->status, KV_OK);
    assert_int_equal(request->append.sealed_tokens, 128);
    lab_done(&s->lab, request);
}

/* All or none: a session that began without ids takes none later, and the other way round. */
static void ids_are_all_or_none(void **state) {
    struct setting *s = *state;
    uint64_t session = lab_open_session(&s->lab, "none", &s->fingerprint);
    struct kv_request *request =
        lab_append(&s->lab, session, &s->layout, 0, 0, 8, s->rows, s->rows, NULL);
    assert_int_equal(request->status, KV_OK);
    lab_done(&s->lab, request);
    request = lab_append(&s->lab, session, &s->layout, 0, 8, 8, s->rows, s->rows, s->ids);
    assert_int_equal(request->status, KV_INVALID);
    assert_string_equal(request->field, "token_ids");
    lab_done(&s->lab, request);
    request = lab_append(&s->lab, session, &s->layout, 1, 0, 8, s->rows, s->rows, s->ids);
    assert_int_equal(request->status, KV_INVALID);
    lab_done(&s->lab, request);
}

/* ---- Attend ------------------------------------------------------------------------------------------ */

/* One row of q, no append. */
static struct kv_request *attend_request(struct setting *s) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_ATTEND);
    request->attend.item_count = 1;
    request->attend.items[0] = (struct kv_attend_item){.session = s->session, .rows = 1};
    request->bytes_in = 4 * 64 * 4;
    memcpy(request->staging, s->rows, request->bytes_in);
    return request;
}

static void frames_that_are_refused(void **state) {
    struct setting *s = *state;
    struct kv_request *request;
#define FRAME(status, field, statement)     \
    do {                                    \
        request = attend_request(s);        \
        statement;                          \
        refused(s, request, status, field); \
    } while (0)
    FRAME(KV_INVALID, "items", request->attend.item_count = 0);
    FRAME(KV_INVALID, "items", request->attend.item_count = 65);
    FRAME(KV_INVALID, "layer", request->attend.layer = 2);
    FRAME(KV_INVALID, "items.rows", request->attend.items[0].rows = 129);
    FRAME(KV_INVALID, "items.rows", request->attend.items[0].rows = UINT32_MAX);
    FRAME(KV_INVALID, "data", request->bytes_in -= 1);
    FRAME(KV_INVALID, "data", request->attend.items[0].append_tokens = UINT32_MAX);
    FRAME(KV_INVALID, "items", request->attend.item_count = 2;
          request->attend.items[1] = request->attend.items[0];
          request->attend.items[1].append_tokens = 1; request->bytes_in *= 3);
}

/* Items fail one by one; the others are answered, side by side. */
static void items_fail_alone(void **state) {
    struct setting *s = *state;
    struct kv_engine_stats before = lab_stats(&s->lab);
    struct kv_request *request = attend_request(s);
    request->attend.item_count = 6;
    struct kv_attend_item *items = request->attend.items;
    size_t q = 4 * 64 * 4, kv = 128 * 4;
    for (int i = 1; i < 6; i++) items[i] = items[0];
    items[1].session = 12345;         /* unknown */
    items[2].has_visible = true;      /* sees more than there is */
    items[2].visible_offset = 65536;
    ((uint32_t *)(request->staging + 65536))[0] = 201;
    items[3].has_visible = true;      /* sees nothing */
    items[3].visible_offset = 65536 + 64;
    ((uint32_t *)(request->staging + 65536 + 64))[0] = 0;
    items[4].has_visible = true;      /* sees one */
    items[4].visible_offset = 65536 + 128;
    ((uint32_t *)(request->staging + 65536 + 128))[0] = 1;
    items[5].rows = 0;
    request->bytes_in = 5 * q;
    for (int i = 0; i < 5; i++) memcpy(request->staging + i * q, s->rows, q);
    lab_call(&s->lab, request);
    assert_int_equal(request->status, KV_OK);
    assert_int_equal(items[0].status, KV_OK);
    assert_int_equal(items[1].status, KV_NOT_FOUND);
    assert_string_equal(items[1].field, "session");
    assert_int_equal(items[2].status, KV_INVALID);
    assert_string_equal(items[2].field, "items.visible");
    assert_int_equal(items[3].status, KV_OK);
    assert_int_equal(items[4].status, KV_OK);
    assert_int_equal(items[5].status, KV_OK);
    size_t answer = (4 * 64 + 4) * 4;
    assert_int_equal(request->reply_bytes, 3 * answer);
    const float *empty = (const float *)(request->staging + request->reply_offset + answer);
    assert_true(empty[0] == 0 && isinf(empty[4 * 64]) && empty[4 * 64] < 0);
    /* One token: out is its v, which is exact in a tail but for the rounding to f16. */
    const float *one = (const float *)(request->staging + request->reply_offset + 2 * answer);
    assert_true(fabsf(one[0] - s->rows[0]) < 1e-3f);
    lab_done(&s->lab, request);

    /* Appends: a stale length, missing ids, a NaN. */
    request = attend_request(s);
    items = request->attend.items;
    items[0].append_tokens = 1;
    items[0].expected_length = 199;
    items[0].rows = 0;
    request->bytes_in = 2 * kv;
    lab_call(&s->lab, request);
    assert_int_equal(items[0].status, KV_ABORTED);
    assert_string_equal(items[0].field, "expected_length");
    assert_int_equal(items[0].length, 200);
    lab_done(&s->lab, request);

    request = attend_request(s);
    items = request->attend.items;
    items[0].append_tokens = 1;
    items[0].expected_length = 200;
    request->bytes_in = q + 2 * kv;
    memcpy(request->staging + q, s->rows, 2 * kv);
    lab_call(&s->lab, request);
    assert_int_equal(items[0].status, KV_INVALID);
    assert_string_equal(items[0].field, "token_ids");
    lab_done(&s->lab, request);

    request = attend_request(s);
    items = request->attend.items;
    items[0].append_tokens = 1;
    items[0].expected_length = 200;
    items[0].has_token_ids = true;
    items[0].token_ids_offset = 65536;
    request->bytes_in = q + 2 * kv;
    memcpy(request->staging + q, s->rows, 2 * kv);
    ((float *)(request->staging + q))[130] = NAN;
    lab_call(&s->lab, request);
    assert_int_equal(items[0].status, KV_INVALID);
    assert_string_equal(items[0].field, "data");
    assert_non_null(strstr(items[0].message, "v of layer 0, token 200, head 0, channel 2"));
    assert_int_equal(items[0].length, 200);
    assert_int_equal(request->reply_bytes, 0);
    lab_done(&s->lab, request);
    unchanged(s, &before);
}

/* ---- Fetch, names --------------------------------------------------------------------------------------- */

static struct kv_request *fetch_request(struct setting *s) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_FETCH);
    request->fetch.session = s->session;
    request->fetch.tokens = 10;
    return request;
}

static void fetches_that_are_refused(void **state) {
    struct setting *s = *state;
    struct kv_request *request;
#define FETCH(status, field, statement)     \
    do {                                    \
        request = fetch_request(s);         \
        statement;                          \
        refused(s, request, status, field); \
    } while (0)
    FETCH(KV_NOT_FOUND, "session", request->fetch.session = 7);
    FETCH(KV_INVALID, "layers", request->fetch.layer = 2);
    FETCH(KV_INVALID, "end", request->fetch.begin = 191);
    FETCH(KV_INVALID, "end", request->fetch.begin = UINT64_MAX);
    FETCH(KV_INVALID, "begin", request->fetch.begin = 120);
    FETCH(KV_INVALID, "dtype", request->fetch.dtype = KV_DTYPE_BF16);
    FETCH(KV_INVALID, "dtype", request->fetch.dtype = (enum kv_dtype)4);
    request = fetch_request(s);
    request->fetch.tokens = 0; /* a question */
    lab_call(&s->lab, request);
    assert_int_equal(request->status, KV_OK);
    assert_int_equal(request->fetch.length, 200);
    assert_int_equal(request->fetch.layers, 2);
    lab_done(&s->lab, request);
}

static void names_that_are_not_there(void **state) {
    struct setting *s = *state;
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_DELETE);
    strcpy(request->named.name, "nobody");
    refused(s, request, KV_NOT_FOUND, "name");
    request = lab_request(&s->lab, KV_REQUEST_DESCRIBE);
    strcpy(request->named.name, "nobody");
    refused(s, request, KV_NOT_FOUND, "name");
    request = lab_request(&s->lab, KV_REQUEST_COMMIT);
    request->commit.session = 99;
    refused(s, request, KV_NOT_FOUND, "session");
    request = lab_request(&s->lab, KV_REQUEST_CLOSE);
    request->commit.session = 99;
    refused(s, request, KV_NOT_FOUND, "session");
}

int main(void) {
    const struct CMUnitTest tests[] = {
#define CASE(name) cmocka_unit_test_setup_teardown(name, setting_open, setting_close)
        CASE(layouts_that_cannot_be),
        CASE(a_block_larger_than_the_arena_is_refused),
        CASE(registering_again_is_the_same),
        CASE(opens_that_are_refused),
        CASE(appends_that_are_refused),
        CASE(a_nan_is_found_where_it_is),
        CASE(a_nan_in_a_sink_is_not_sealed),
        CASE(ids_are_all_or_none),
        CASE(frames_that_are_refused),
        CASE(items_fail_alone),
        CASE(fetches_that_are_refused),
        CASE(names_that_are_not_there),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
