/* SPDX-License-Identifier: Apache-2.0 */
/* engine_land_test.c - pages that go into their block on the thread that received them.
 *
 * What could go wrong: a page at the wrong place, a block that is complete too early or never, a bad page
 * that is not noticed, memory that is freed while a lane writes to it, or never.  The last test is for the
 * thread sanitizer as much as for its own checks. */
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include <sched.h>
#include <stdlib.h>

#include "kernels/page.h"
#include "tests/service/engine_lab.h"

enum { LAYERS = 5, HEADS = 2, DIM = 64, ROW = HEADS * DIM, PAGE = 2 * KV_BLOCK_TOKENS * ROW, PIECES = 3 };

struct setting {
    struct lab lab;
    struct kv_layout layout;
    struct kv_digest fingerprint;
    uint16_t pages[LAYERS][PAGE]; /* K rows, V rows */
};

static int setting_open(void **state) {
    struct setting *s = calloc(1, sizeof *s);
    lab_open(&s->lab, NULL);
    s->layout = lab_layout("kivi2", LAYERS, HEADS, 4, DIM, KV_DTYPE_F16);
    s->fingerprint = lab_register(&s->lab, &s->layout);
    for (int l = 0; l < LAYERS; l++)
        for (int i = 0; i < PAGE; i++) s->pages[l][i] = (uint16_t)((i * 31 + l * 7) % 0x7c00);
    *state = s;
    return 0;
}

static int setting_close(void **state) {
    struct setting *s = *state;
    lab_close(&s->lab);
    free(s);
    return 0;
}

static struct kv_digest digest_of(uint64_t block) {
    struct kv_digest digest = {{1}};
    memcpy(digest.bytes + 8, &block, sizeof block);
    return digest;
}

/* A page that stays where gRPC put it, in pieces that begin at odd addresses. */
static struct kv_request *page_of(struct setting *s, uint64_t stream, uint64_t block, uint32_t layer,
                                  const uint16_t *data) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_PUT);
    struct kv_span *pieces = (struct kv_span *)request->staging;
    const uint8_t *bytes = (const uint8_t *)data;
    size_t cut[PIECES + 1] = {0, 1001, 30007, PAGE * 2};
    for (int i = 0; i < PIECES; i++)
        pieces[i] = (struct kv_span){bytes + cut[i], cut[i + 1] - cut[i]};
    request->put.stream = stream;
    request->put.fingerprint = s->fingerprint;
    request->put.has_digest = true;
    request->put.digest = digest_of(block);
    request->put.layer = layer;
    request->put.form = KV_FORM_FULL;
    request->put.raw = true;
    request->put.pieces = pieces;
    request->put.piece_count = PIECES;
    request->bytes_in = PAGE * 2;
    return request;
}

static bool submit(struct setting *s, struct kv_request *request, enum kv_status status) {
    lab_call(&s->lab, request);
    if (request->status != status) print_error("%s: %s\n", request->field, request->message);
    assert_int_equal(request->status, status);
    bool complete = request->put.complete;
    lab_done(&s->lab, request);
    return complete;
}

static enum kv_landed land(struct setting *s, uint64_t stream, uint64_t block, uint32_t layer) {
    struct kv_request *request = page_of(s, stream, block, layer, s->pages[layer]);
    enum kv_landed landed = kv_engine_land(s->lab.engine, request);
    if (landed == KV_LANDED_TELL) assert_true(submit(s, request, KV_OK));
    else lab_done(&s->lab, request);
    return landed;
}

static void stream_end(struct setting *s, uint64_t stream) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_PUT_END);
    request->put.stream = stream;
    assert_int_equal(lab_call(&s->lab, request)->status, KV_OK);
    lab_done(&s->lab, request);
}

static void check_block(struct setting *s, uint64_t block) {
    for (uint32_t l = 0; l < LAYERS; l++) {
        struct kv_request *request = lab_request(&s->lab, KV_REQUEST_GET);
        request->get.fingerprint = s->fingerprint;
        request->get.digest = digest_of(block);
        request->get.layer = l;
        request->get.form = KV_FORM_FULL;
        assert_int_equal(lab_call(&s->lab, request)->status, KV_OK);
        assert_int_equal(request->reply_bytes, PAGE * 2);
        assert_memory_equal(request->staging + request->reply_offset, s->pages[l], PAGE * 2);
        lab_done(&s->lab, request);
    }
}

static void pages_land_behind_the_first(void **state) {
    struct setting *s = *state;
    uint64_t bytes_in = lab_stats(&s->lab).bytes_in;
    assert_int_equal(land(s, 1, 7, 3), KV_LANDED_NOT); /* the block has no room yet */
    assert_false(submit(s, page_of(s, 1, 7, 2, s->pages[2]), KV_OK));
    assert_int_equal(land(s, 1, 7, 4), KV_LANDED);
    assert_int_equal(land(s, 1, 7, 4), KV_LANDED_NOT); /* it came before */
    assert_false(submit(s, page_of(s, 1, 7, 4, s->pages[4]), KV_OK));
    assert_int_equal(land(s, 1, 7, 0), KV_LANDED);
    assert_int_equal(land(s, 1, 7, 3), KV_LANDED);
    assert_int_equal(lab_stats(&s->lab).blocks_sealed, 0);
    assert_int_equal(land(s, 1, 7, 1), KV_LANDED_TELL); /* which completed the block */
    assert_int_equal(lab_stats(&s->lab).blocks_sealed, 1);
    assert_int_equal(lab_stats(&s->lab).bytes_in - bytes_in, (LAYERS + 1) * PAGE * 2);
    check_block(s, 7);
    assert_int_equal(land(s, 1, 7, 1), KV_LANDED_NOT);
    stream_end(s, 1);
}

static void what_does_not_fit_does_not_land(void **state) {
    struct setting *s = *state;
    assert_false(submit(s, page_of(s, 1, 1, 0, s->pages[0]), KV_OK));
#define NOT(statement)                                                                 \
    do {                                                                               \
        struct kv_request *request = page_of(s, 1, 1, 1, s->pages[1]);                 \
        statement;                                                                     \
        assert_int_equal(kv_engine_land(s->lab.engine, request), KV_LANDED_NOT);       \
        assert_false(request->put.landed);                                             \
        lab_done(&s->lab, request);                                                    \
    } while (0)
    NOT(request->put.stream = 2);
    NOT(request->put.digest.bytes[31] ^= 1);
    NOT(request->put.fingerprint.bytes[0] ^= 1);
    NOT(request->put.layer = LAYERS);
    NOT(request->put.layer = UINT32_MAX);
    NOT(request->put.raw = false);
    NOT(request->bytes_in -= 2);
    NOT(request->put.pieces = NULL);
    NOT(request->put.has_digest = false);
    NOT(request->put.has_energy = true);
    /* None of these claimed the page. */
    assert_int_equal(land(s, 1, 1, 1), KV_LANDED);
    stream_end(s, 1);
    /* Pages that will be packed do not land. */
    struct kv_request *first = page_of(s, 3, 2, 0, s->pages[0]);
    first->put.raw = false;
    assert_false(submit(s, first, KV_OK));
    NOT(request->put.stream = 3; request->put.digest = digest_of(2); request->put.raw = false);
    stream_end(s, 3);
}

static void a_bad_page_that_lands_ends_its_block(void **state) {
    struct setting *s = *state;
    uint64_t arena = lab_stats(&s->lab).store.arena_bytes_used;
    static uint16_t bad[PAGE];
    memcpy(bad, s->pages[1], sizeof bad);
    bad[PAGE / 2 + 3 * ROW + DIM + 5] = 0xfc00; /* v of token 3, head 1, channel 5 */
    assert_false(submit(s, page_of(s, 1, 1, 0, s->pages[0]), KV_OK));
    struct kv_request *request = page_of(s, 1, 1, 1, bad);
    assert_int_equal(kv_engine_land(s->lab.engine, request), KV_LANDED_TELL);
    assert_int_equal(lab_call(&s->lab, request)->status, KV_INVALID);
    assert_string_equal(request->field, "data");
    assert_non_null(strstr(request->message, "v of token 3, head 1, channel 5 "));
    lab_done(&s->lab, request);
    assert_int_equal(land(s, 1, 1, 2), KV_LANDED_NOT);
    assert_int_equal(lab_stats(&s->lab).store.arena_bytes_used, arena);
    stream_end(s, 1);
}

static void a_stream_that_ends_takes_what_landed_along(void **state) {
    struct setting *s = *state;
    uint64_t arena = lab_stats(&s->lab).store.arena_bytes_used;
    for (uint64_t b = 0; b < KV_PUT_OPEN_MAX; b++) {
        assert_false(submit(s, page_of(s, 4, b, 0, s->pages[0]), KV_OK));
        assert_int_equal(land(s, 4, b, 1), KV_LANDED);
    }
    stream_end(s, 4);
    assert_int_equal(lab_stats(&s->lab).store.arena_bytes_used, arena);
    assert_int_equal(land(s, 4, 0, 2), KV_LANDED_NOT);
}

/* ---- Both threads at once -------------------------------------------------------------------------- */

struct client {
    struct setting *s;
    uint64_t stream;
    pthread_t thread;
    uint32_t completed, refused;
    const uint16_t *bad;
};

enum { ROUNDS = 150, CLIENTS = 3 };

/* A block whose first page is still on its way, and is bad every third time, while the others land. */
static void client_block(struct client *client, uint64_t round) {
    struct setting *s = client->s;
    uint64_t block = client->stream * 1000 + round;
    struct kv_request *told[LAYERS];
    uint32_t count = 1;
    told[0] = page_of(s, client->stream, block, 0, round % 3 == 0 ? client->bad : s->pages[0]);
    lab_submit(&s->lab, told[0]);
    for (uint32_t l = 1; l < LAYERS; l++) {
        struct kv_request *request = page_of(s, client->stream, block, l, s->pages[l]);
        if (round % 5 == 0) sched_yield();
        if (kv_engine_land(s->lab.engine, request) == KV_LANDED) {
            lab_done(&s->lab, request);
        } else {
            lab_submit(&s->lab, request);
            told[count++] = request;
        }
    }
    bool complete = false, refused = false;
    for (uint32_t i = 0; i < count; i++) {
        lab_wait(told[i]);
        refused |= told[i]->status != KV_OK;
        complete |= told[i]->status == KV_OK && told[i]->put.complete;
        lab_done(&s->lab, told[i]);
    }
    client->completed += complete;
    client->refused += refused;
    /* As after any refusal, the stream ends and another begins. */
    if (!refused) return;
    stream_end(s, client->stream);
}

static void *client_run(void *argument) {
    struct client *client = argument;
    for (uint64_t round = 0; round < ROUNDS; round++) client_block(client, round);
    stream_end(client->s, client->stream);
    return NULL;
}

static void blocks_fail_under_lanes(void **state) {
    struct setting *s = *state;
    static uint16_t bad[PAGE];
    memcpy(bad, s->pages[0], sizeof bad);
    bad[PAGE - 1] = 0x7e00;
    struct client clients[CLIENTS];
    for (uint64_t i = 0; i < CLIENTS; i++) {
        clients[i] = (struct client){.s = s, .stream = i + 1, .bad = bad};
        pthread_create(&clients[i].thread, NULL, client_run, &clients[i]);
    }
    for (int i = 0; i < CLIENTS; i++) {
        pthread_join(clients[i].thread, NULL);
        assert_int_equal(clients[i].completed, ROUNDS - ROUNDS / 3);
        assert_int_equal(clients[i].refused, ROUNDS / 3);
    }
    assert_int_equal(lab_stats(&s->lab).blocks_sealed, CLIENTS * (ROUNDS - ROUNDS / 3));
    for (uint64_t i = 1; i <= CLIENTS; i++) check_block(s, i * 1000 + ROUNDS - 1);
}

int main(void) {
    const struct CMUnitTest tests[] = {
#define CASE(name) cmocka_unit_test_setup_teardown(name, setting_open, setting_close)
        CASE(pages_land_behind_the_first),
        CASE(what_does_not_fit_does_not_land),
        CASE(a_bad_page_that_lands_ends_its_block),
        CASE(a_stream_that_ends_takes_what_landed_along),
        CASE(blocks_fail_under_lanes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
