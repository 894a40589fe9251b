/* SPDX-License-Identifier: Apache-2.0 */
/* engine_blocks_test.c - PUT, GET, LOOKUP: the cache below the sessions, by digest. */
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include <math.h>
#include <stdlib.h>

#include "kernels/page.h"
#include "tests/service/engine_lab.h"

enum { LAYERS = 3, HEADS = 2, DIM = 64, ROW = HEADS * DIM, PAGE = 2 * KV_BLOCK_TOKENS * ROW };

struct setting {
    struct lab lab;
    struct kv_layout layout;
    struct kv_digest fingerprint, root;
    float pages[8][LAYERS][PAGE]; /* K rows, V rows */
    uint32_t ids[8][KV_BLOCK_TOKENS];
    struct kv_digest digests[8];
};

static int setting_open(void **state) {
    struct setting *s = calloc(1, sizeof *s);
    struct lab_random random = {3};
    struct kv_salt salt = {.count = 0};
    lab_open(&s->lab, NULL);
    s->layout = lab_layout("kivi2", LAYERS, HEADS, 4, DIM, KV_DTYPE_F16);
    s->fingerprint = lab_register(&s->lab, &s->layout);
    s->root = kv_chain_root(&s->fingerprint, &salt);
    lab_rows(&random, s->pages[0][0], sizeof s->pages / 4, DIM);
    for (int b = 0; b < 8; b++) {
        for (int t = 0; t < KV_BLOCK_TOKENS; t++)
            s->ids[b][t] = (uint32_t)(lab_uniform(&random) * 1000);
        s->digests[b] = kv_chain_next(b ? &s->digests[b - 1] : &s->root, s->ids[b]);
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

/* A page as a client would send it: by parent and token ids. */
static struct kv_request *put_request(struct setting *s, uint64_t stream, int block,
                                      uint32_t layer) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_PUT);
    request->put.stream = stream;
    request->put.fingerprint = s->fingerprint;
    request->put.has_parent = block > 0;
    if (block) request->put.parent = s->digests[block - 1];
    memcpy(request->put.token_ids, s->ids[block], sizeof s->ids[block]);
    request->put.layer = layer;
    request->put.form = KV_FORM_FULL;
    request->put.raw = block == 0;
    lab_encode(KV_DTYPE_F16, s->pages[block][layer], request->staging, PAGE);
    request->bytes_in = PAGE * 2;
    return request;
}

static void put_end(struct setting *s, uint64_t stream) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_PUT_END);
    request->put.stream = stream;
    assert_int_equal(lab_call(&s->lab, request)->status, KV_OK);
    lab_done(&s->lab, request);
}

/* True if the page completed the block. */
static bool put_page(struct setting *s, uint64_t stream, int block, uint32_t layer) {
    struct kv_request *request = put_request(s, stream, block, layer);
    lab_call(&s->lab, request);
    if (request->status != KV_OK) print_error("%s: %s\n", request->field, request->message);
    assert_int_equal(request->status, KV_OK);
    assert_true(kv_digest_equal(&request->put.digest, &s->digests[block]));
    bool complete = request->put.complete;
    lab_done(&s->lab, request);
    return complete;
}

static void put_block(struct setting *s, uint64_t stream, int block) {
    for (uint32_t l = 0; l < LAYERS; l++)
        assert_int_equal(put_page(s, stream, block, l), l == LAYERS - 1);
}

static struct kv_request *get(struct setting *s, int block, uint32_t layer, enum kv_form form) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_GET);
    request->get.fingerprint = s->fingerprint;
    request->get.digest = s->digests[block];
    request->get.layer = layer;
    request->get.form = form;
    return lab_call(&s->lab, request);
}

static uint32_t lookup(struct setting *s, bool by_digest, uint32_t blocks, uint32_t lease_ms) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_LOOKUP);
    request->lookup.fingerprint = s->fingerprint;
    request->lookup.lease_ms = lease_ms;
    if (by_digest) {
        request->lookup.digest_count = blocks;
        memcpy(request->staging, s->digests, blocks * sizeof s->digests[0]);
    } else {
        request->lookup.token_count = blocks * KV_BLOCK_TOKENS + 5;
        memcpy(request->staging, s->ids, blocks * sizeof s->ids[0]);
    }
    lab_call(&s->lab, request);
    assert_int_equal(request->status, KV_OK);
    assert_int_equal(request->lookup.lease_ms, lease_ms);
    uint32_t count = request->lookup.block_count;
    const struct kv_lookup_block *found =
        (const struct kv_lookup_block *)(request->staging + request->reply_offset);
    for (uint32_t i = 0; i < count; i++) {
        assert_true(kv_digest_equal(&found[i].digest, &s->digests[i]));
        assert_int_equal(found[i].tier, KV_TIER_HOST);
    }
    lab_done(&s->lab, request);
    return count;
}

static uint64_t blocks_now(struct setting *s) {
    return lab_stats(&s->lab).store.blocks;
}

/* Layers in any order, blocks interleaved; each is visible once it is whole, and comes back. */
static void a_block_is_visible_when_it_is_whole(void **state) {
    struct setting *s = *state;
    uint64_t before = blocks_now(s);
    assert_false(put_page(s, 1, 0, 2));
    assert_false(put_page(s, 1, 1, 1));
    assert_false(put_page(s, 1, 0, 0));
    assert_int_equal(lookup(s, true, 2, 0), 0);
    struct kv_request *request = get(s, 0, 0, KV_FORM_FULL);
    assert_int_equal(request->status, KV_NOT_FOUND);
    lab_done(&s->lab, request);
    assert_true(put_page(s, 1, 0, 1));
    assert_int_equal(lookup(s, true, 2, 0), 1);
    assert_false(put_page(s, 1, 1, 1)); /* the same page again */
    assert_false(put_page(s, 1, 1, 0));
    assert_true(put_page(s, 1, 1, 2));
    assert_int_equal(lookup(s, false, 2, 1000), 2);
    assert_int_equal(blocks_now(s), before + 2);

    for (int b = 0; b < 2; b++)
        for (uint32_t l = 0; l < LAYERS; l++) {
            static float back[PAGE], sent[PAGE];
            static uint16_t wire[PAGE];
            request = get(s, b, l, KV_FORM_FULL);
            assert_int_equal(request->status, KV_OK);
            assert_int_equal(request->reply_bytes, PAGE * 2);
            lab_decode(KV_DTYPE_F16, request->staging + request->reply_offset, back, PAGE);
            lab_encode(KV_DTYPE_F16, s->pages[b][l], wire, PAGE);
            lab_decode(KV_DTYPE_F16, wire, sent, PAGE);
            lab_done(&s->lab, request);
            if (b == 0) assert_memory_equal(back, sent, sizeof back); /* raw */
            else assert_true(lab_distance(back, sent, PAGE) < 0.5);
        }
    request = get(s, 0, 0, KV_FORM_PACKED); /* of a raw block: FULL, and it says so */
    assert_int_equal(request->get.form, KV_FORM_FULL);
    lab_done(&s->lab, request);
}

/* What one service packed another takes as it is, byte for byte. */
static void packed_pages_travel(void **state) {
    struct setting *s = *state;
    put_block(s, 1, 0);
    put_block(s, 1, 1);
    struct kv_shape shape = kv_layout_shape(&s->layout);
    size_t bytes = kv_page_bytes(&shape);
    struct kv_request *request = NULL;
    for (uint32_t l = 0; l < LAYERS; l++) {
        struct kv_request *packed = get(s, 1, l, KV_FORM_PACKED);
        assert_int_equal(packed->status, KV_OK);
        assert_int_equal(packed->reply_bytes, bytes);
        request = put_request(s, 2, 5, l);
        request->put.form = KV_FORM_PACKED;
        request->bytes_in = bytes;
        memcpy(request->staging, packed->staging + packed->reply_offset, bytes);
        lab_call(&s->lab, request);
        assert_int_equal(request->status, KV_OK);
        assert_int_equal(request->put.complete, l == LAYERS - 1);
        if (request->put.complete) assert_int_equal(request->put.bytes_held, LAYERS * bytes);
        lab_done(&s->lab, request);
        if (l == LAYERS - 1) {
            struct kv_request *again = get(s, 5, 0, KV_FORM_PACKED);
            struct kv_request *first = get(s, 1, 0, KV_FORM_PACKED);
            assert_memory_equal(again->staging + again->reply_offset,
                                first->staging + first->reply_offset, bytes);
            lab_done(&s->lab, again);
            lab_done(&s->lab, first);
        }
        lab_done(&s->lab, packed);
    }
}

/* A duplicate is success, said once, on this stream or another; nothing is packed for it. */
static void a_block_that_is_there_is_success(void **state) {
    struct setting *s = *state;
    put_block(s, 1, 1);
    uint64_t before = blocks_now(s), sealed = lab_stats(&s->lab).blocks_sealed;
    for (uint64_t stream = 1; stream < 3; stream++) {
        for (uint32_t l = 0; l < LAYERS; l++) {
            struct kv_request *request = put_request(s, stream, 1, l);
            lab_call(&s->lab, request);
            assert_int_equal(request->status, KV_OK);
            assert_int_equal(request->put.complete, l == 0);
            assert_int_equal(request->put.existed, l == 0);
            lab_done(&s->lab, request);
        }
    }
    assert_int_equal(blocks_now(s), before);
    assert_int_equal(lab_stats(&s->lab).blocks_sealed, sealed);
}

/* Incomplete blocks are gone with their stream, and their memory with them. */
static void a_stream_that_ends_leaves_nothing(void **state) {
    struct setting *s = *state;
    uint64_t arena = lab_stats(&s->lab).store.arena_bytes_used;
    for (int b = 0; b < 5; b++) assert_false(put_page(s, 9, b, 0));
    assert_true(lab_stats(&s->lab).store.arena_bytes_used > arena);
    put_end(s, 9);
    assert_int_equal(lab_stats(&s->lab).store.arena_bytes_used, arena);
    put_block(s, 10, 1); /* and nothing is in the way */
}

/* A stream may have so many incomplete blocks, another stream as many again. */
static void credit_is_per_stream(void **state) {
    struct setting *s = *state;
    for (int b = 0; b < KV_PUT_OPEN_MAX; b++) assert_false(put_page(s, 1, b, 0));
    struct kv_request *request = put_request(s, 1, 0, 0);
    request->put.token_ids[0] ^= 1;
    lab_call(&s->lab, request);
    assert_int_equal(request->status, KV_BUSY);
    assert_true(request->retry_ms > 0);
    assert_int_equal(request->scope, KV_SCOPE_NODE);
    lab_done(&s->lab, request);
    request = put_request(s, 2, 0, 0);
    request->put.token_ids[0] ^= 1;
    assert_int_equal(lab_call(&s->lab, request)->status, KV_OK);
    lab_done(&s->lab, request);
    request = put_request(s, 2, 3, 0); /* stream 1 fills it */
    assert_int_equal(lab_call(&s->lab, request)->status, KV_BUSY);
    lab_done(&s->lab, request);
    put_end(s, 1);
    put_end(s, 2);
}

static void expect(struct setting *s, struct kv_request *request, enum kv_status status,
                   const char *field) {
    lab_call(&s->lab, request);
    if (request->status != status || strcmp(request->field, field) != 0)
        print_error("%d %s: %s\n", request->status, request->field, request->message);
    assert_int_equal(request->status, status);
    assert_string_equal(request->field, field);
    lab_done(&s->lab, request);
}

static void pages_that_are_refused(void **state) {
    struct setting *s = *state;
    struct kv_request *request;
    uint64_t arena = lab_stats(&s->lab).store.arena_bytes_used;
#define PUT(status, field, statement)       \
    do {                                    \
        request = put_request(s, 3, 1, 0);  \
        statement;                          \
        expect(s, request, status, field);  \
    } while (0)
    PUT(KV_NOT_FOUND, "fingerprint", request->put.fingerprint.bytes[3] ^= 1);
    PUT(KV_INVALID, "layer", request->put.layer = LAYERS);
    PUT(KV_INVALID, "form", request->put.form = 0);
    PUT(KV_INVALID, "raw", request->put.form = KV_FORM_PACKED; request->put.raw = true);
    PUT(KV_INVALID, "data", request->bytes_in -= 2);
    PUT(KV_INVALID, "data", request->put.form = KV_FORM_PACKED);
    PUT(KV_INVALID, "data", ((uint16_t *)request->staging)[ROW * KV_BLOCK_TOKENS + 9] = 0x7c01);
    PUT(KV_INVALID, "query_energy", request->put.has_energy = true;
        request->put.energy_offset = request->bytes_in;
        memset(request->staging + request->bytes_in, 0xff, ROW * 4));
    PUT(KV_INVALID, "query_energy", request->put.has_energy = true;
        request->put.energy_offset = request->bytes_in;
        memset(request->staging + request->bytes_in, 0, ROW * 4);
        ((float *)(request->staging + request->bytes_in))[ROW - 1] = 2 * KV_ENERGY_MAX);
    assert_int_equal(lab_stats(&s->lab).store.arena_bytes_used, arena);
    assert_false(put_page(s, 3, 1, 0));
    PUT(KV_INVALID, "raw", request->put.layer = 1; request->put.raw = true);
    PUT(KV_INVALID, "data", request->put.layer = 1; ((uint16_t *)request->staging)[0] = 0x7c00);
    put_end(s, 3);
    assert_int_equal(lab_stats(&s->lab).store.arena_bytes_used, arena);

    request = get(s, 1, 0, KV_FORM_FULL);
    assert_int_equal(request->status, KV_NOT_FOUND);
    lab_done(&s->lab, request);
    request = lab_request(&s->lab, KV_REQUEST_GET);
    request->get.fingerprint = s->fingerprint;
    request->get.form = KV_FORM_FULL;
    request->get.layer = LAYERS;
    expect(s, request, KV_INVALID, "layers");
    request = lab_request(&s->lab, KV_REQUEST_LOOKUP);
    expect(s, request, KV_NOT_FOUND, "fingerprint");
    request = lab_request(&s->lab, KV_REQUEST_LOOKUP);
    request->lookup.fingerprint = s->fingerprint;
    request->lookup.digest_count = KV_LOOKUP_BLOCKS_MAX + 1;
    expect(s, request, KV_INVALID, "digests");
}

/* A packed page from outside may hold any codes, and nothing that a kernel would follow out of
 * its memory. */
static void packed_pages_are_looked_at(void **state) {
    struct setting *s = *state;
    put_block(s, 1, 1);
    struct kv_shape shape = kv_layout_shape(&s->layout);
    struct kv_page_map map = kv_page_map(&shape);
    size_t bytes = kv_page_bytes(&shape);
    struct kv_request *packed = get(s, 1, 0, KV_FORM_PACKED);
    const uint8_t *page = packed->staging + packed->reply_offset;
    const struct {
        uint32_t at;
        uint8_t value;
    } bad[] = {
        {0, 4},                               /* a fifth mix */
        {3, 0x7c},                            /* an infinite factor */
        {map.key_order + 5, 200},             /* a channel beyond head_dim */
        {map.key_order + 5, page[map.key_order]}, /* a channel twice */
        {map.key_scale + 1, 0x7f},            /* not a number */
        {map.key_zero + 3, 0x7c},             /* infinite */
        {map.value_mean + 1, 0xfc},           /* minus infinite */
        {map.value_scale + 7, 0xff},          /* not a number */
        {map.record_bytes, 9},                /* the second head's mix */
    };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        struct kv_request *request = put_request(s, 4, 6, 0);
        request->put.form = KV_FORM_PACKED;
        request->bytes_in = bytes;
        memcpy(request->staging, page, bytes);
        request->staging[bad[i].at] = bad[i].value;
        expect(s, request, KV_INVALID, "data");
    }
    lab_done(&s->lab, packed);
    put_end(s, 4);
}

/* What was put is what a session with the same tokens begins with. */
static void a_session_begins_with_what_was_put(void **state) {
    struct setting *s = *state;
    for (int b = 0; b < 4; b++) put_block(s, 1, b);
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_OPEN);
    strcpy(request->open.name, "from blocks");
    request->open.fingerprint = s->fingerprint;
    request->open.token_count = 6 * KV_BLOCK_TOKENS;
    memcpy(request->staging, s->ids, sizeof s->ids);
    lab_call(&s->lab, request);
    assert_int_equal(request->open.length, 4 * KV_BLOCK_TOKENS);
    uint64_t session = request->open.session;
    lab_done(&s->lab, request);

    static float keys[4 * KV_BLOCK_TOKENS * ROW], values[4 * KV_BLOCK_TOKENS * ROW];
    float query[4 * DIM], out[4 * DIM], lse[4];
    uint16_t wire[4 * DIM];
    struct lab_random random = {5};
    lab_rows(&random, query, 4 * DIM, DIM);
    lab_encode(KV_DTYPE_F16, query, wire, 4 * DIM);
    lab_decode(KV_DTYPE_F16, wire, query, 4 * DIM);
    assert_int_equal(lab_fetch(&s->lab, session, &s->layout, 2, 512, keys, values), KV_OK);
    request = lab_attend(&s->lab, session, &s->layout, 2, 1, KV_MASK_ALL, query);
    assert_int_equal(request->attend.items[0].status, KV_OK);
    lab_reference(&s->layout, query, keys, values, 512, out, lse);
    assert_true(lab_distance((const float *)(request->staging + request->reply_offset), out,
                             4 * DIM) < 2e-3);
    lab_done(&s->lab, request);
}

/* A sink that somebody put packed does not fit a session's first position: it is not used. */
static void a_packed_sink_is_not_taken(void **state) {
    struct setting *s = *state;
    for (uint32_t l = 0; l < LAYERS; l++) {
        struct kv_request *request = put_request(s, 1, 0, l);
        request->put.raw = false;
        assert_int_equal(lab_call(&s->lab, request)->status, KV_OK);
        lab_done(&s->lab, request);
    }
    assert_int_equal(lookup(s, true, 1, 0), 0);
    uint64_t session = lab_open_session(&s->lab, "sink", &s->fingerprint);
    static float keys[KV_BLOCK_TOKENS * ROW], values[KV_BLOCK_TOKENS * ROW], sent[PAGE];
    uint16_t wire[PAGE];
    for (uint32_t l = 0; l < LAYERS; l++) {
        struct kv_request *request =
            lab_append(&s->lab, session, &s->layout, l, 0, KV_BLOCK_TOKENS, s->pages[0][l],
                       s->pages[0][l] + PAGE / 2, l ? NULL : s->ids[0]);
        assert_int_equal(request->status, KV_OK);
        lab_done(&s->lab, request);
    }
    assert_int_equal(lab_fetch(&s->lab, session, &s->layout, 1, 128, keys, values), KV_OK);
    lab_encode(KV_DTYPE_F16, s->pages[0][1], wire, PAGE);
    lab_decode(KV_DTYPE_F16, wire, sent, PAGE);
    assert_memory_equal(keys, sent, sizeof keys);
}

int main(void) {
    const struct CMUnitTest tests[] = {
#define CASE(name) cmocka_unit_test_setup_teardown(name, setting_open, setting_close)
        CASE(a_block_is_visible_when_it_is_whole),
        CASE(packed_pages_travel),
        CASE(a_block_that_is_there_is_success),
        CASE(a_stream_that_ends_leaves_nothing),
        CASE(credit_is_per_stream),
        CASE(pages_that_are_refused),
        CASE(packed_pages_are_looked_at),
        CASE(a_session_begins_with_what_was_put),
        CASE(a_packed_sink_is_not_taken),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
