/* SPDX-License-Identifier: Apache-2.0 */
/* engine_model_test.c - random operations against a model that knows only lengths.
 *
 * A few sessions over two texts (so that they share blocks, or do not) live through appends of
 * random layers and sizes, attends with and without an append, commits, closes, restarts and
 * deletions, in an arena that is too small for all of them.  After each step:
 *
 *   - lengths are what the model says;
 *   - what Attend says is attention over what Fetch says, and that is the text, to quantization;
 *   - a session that was committed comes back with the length it was committed with.
 *
 * A block may be evicted when there is no disk, so there is one here, large enough. */
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "tests/service/engine_lab.h"

enum { SESSIONS = 4, LAYERS = 3, HEADS = 2, DIM = 64, ROW = HEADS * DIM, TOKENS = 1500, TEXTS = 2 };

struct model_session {
    char name[8];
    int text;
    bool ids;
    bool exists, open, committed;
    uint64_t handle;
    uint32_t length[LAYERS];
    uint32_t committed_length;
};

struct model {
    struct lab lab;
    struct lab_options options;
    struct lab_random random;
    struct kv_layout layout;
    struct kv_digest fingerprint;
    struct model_session sessions[SESSIONS];
    uint32_t ids[TEXTS][TOKENS];
    float *keys[TEXTS], *values[TEXTS]; /* [LAYERS][TOKENS][ROW] */
    float *fetched_keys, *fetched_values;
    uint32_t step;
};

static uint32_t below(struct model *m, uint32_t bound) {
    return (uint32_t)(lab_uniform(&m->random) * bound);
}

static uint32_t common_length(const struct model_session *s) {
    uint32_t length = s->length[0];
    for (int l = 1; l < LAYERS; l++)
        if (s->length[l] < length) length = s->length[l];
    return length;
}

static const float *row_of(float *const *text, const struct model_session *s, uint32_t layer,
                           uint32_t token) {
    return text[s->text] + ((size_t)layer * TOKENS + token) * ROW;
}

static void engine_start(struct model *m) {
    lab_open(&m->lab, &m->options);
    m->fingerprint = lab_register(&m->lab, &m->layout);
}

static void session_open(struct model *m, struct model_session *s) {
    if (!s->exists) {
        s->text = (int)below(m, TEXTS);
        s->ids = below(m, 4) > 0;
    }
    struct kv_request *request = lab_request(&m->lab, KV_REQUEST_OPEN);
    strcpy(request->open.name, s->name);
    request->open.fingerprint = m->fingerprint;
    request->open.mode = s->exists ? KV_OPEN_EXISTING : KV_OPEN_CREATE;
    bool attach = !s->exists && s->ids && below(m, 2);
    if (attach) {
        request->open.token_count = below(m, TOKENS);
        memcpy(request->staging, m->ids[s->text], request->open.token_count * 4);
    }
    uint32_t offered = request->open.token_count;
    lab_call(&m->lab, request);
    if (request->status != KV_OK) print_error("%s %s\n", request->field, request->message);
    assert_int_equal(request->status, KV_OK);
    assert_int_equal(request->open.created, !s->exists);
    uint64_t length = request->open.length;
    assert_int_equal(request->open.usable, length);
    if (s->exists) assert_int_equal(length, s->committed_length);
    else assert_true(length % KV_BLOCK_TOKENS == 0 && length <= offered);
    s->handle = request->open.session;
    lab_done(&m->lab, request);
    for (int l = 0; l < LAYERS; l++) s->length[l] = (uint32_t)length;
    s->exists = s->open = true;
}

static void session_append(struct model *m, struct model_session *s) {
    uint32_t layer = below(m, LAYERS), begin = s->length[layer];
    /* Mostly the layer that is furthest behind, so that blocks complete. */
    for (uint32_t l = 0; l < LAYERS && below(m, 4); l++)
        if (s->length[l] < begin) begin = s->length[layer = l];
    uint32_t tokens = 1 + below(m, below(m, 3) ? 300 : 5);
    if (begin + tokens > TOKENS) tokens = TOKENS - begin;
    if (tokens == 0) return;
    struct kv_request *request =
        lab_append(&m->lab, s->handle, &m->layout, layer, begin, tokens,
                   row_of(m->keys, s, layer, begin), row_of(m->values, s, layer, begin),
                   s->ids ? m->ids[s->text] + begin : NULL);
    if (request->status == KV_OK) {
        s->length[layer] += tokens;
        assert_int_equal(request->append.length, s->length[layer]);
        assert_int_equal(request->append.session_length, common_length(s));
    } else { /* the arena is small; a failed append has changed nothing */
        assert_int_equal(request->status, KV_BUSY);
    }
    lab_done(&m->lab, request);
}

static void check_rows(struct model *m, const struct model_session *s, uint32_t layer,
                       uint32_t length) {
    double k = lab_distance(m->fetched_keys, row_of(m->keys, s, layer, 0), (size_t)length * ROW);
    double v = lab_distance(m->fetched_values, row_of(m->values, s, layer, 0), (size_t)length * ROW);
    if (k > 0.5 || v > 0.5) print_error("step %u: keys %g, values %g away\n", m->step, k, v);
    assert_true(k < 0.5 && v < 0.5); /* two texts are 1.4 apart */
}

static void session_attend(struct model *m, struct model_session *s) {
    uint32_t layer = below(m, LAYERS), rows = 1 + below(m, 3), begin = s->length[layer];
    uint32_t tokens = below(m, 2) && begin + rows <= TOKENS ? rows : 0;
    float query[3 * 4 * DIM], out[4 * DIM], lse[4];
    size_t q = 4 * DIM;
    lab_rows(&m->random, query, rows * q, DIM);
    struct kv_request *request = lab_request(&m->lab, KV_REQUEST_ATTEND);
    struct kv_attend_item *item = &request->attend.items[0];
    request->attend.layer = layer;
    request->attend.item_count = 1;
    *item = (struct kv_attend_item){.session = s->handle,
                                    .rows = rows,
                                    .mask = tokens ? KV_MASK_CAUSAL : KV_MASK_ALL,
                                    .append_tokens = tokens,
                                    .expected_length = begin};
    uint8_t *at = request->staging;
    lab_encode(KV_DTYPE_F16, query, at, rows * q);
    lab_decode(KV_DTYPE_F16, at, query, rows * q);
    at += rows * q * 2;
    if (tokens) {
        lab_encode(KV_DTYPE_F16, row_of(m->keys, s, layer, begin), at, tokens * ROW);
        lab_encode(KV_DTYPE_F16, row_of(m->values, s, layer, begin), at + tokens * ROW * 2,
                   tokens * ROW);
    }
    request->bytes_in = (rows * q + 2 * tokens * ROW) * 2;
    if (tokens && s->ids) {
        item->has_token_ids = true;
        item->token_ids_offset = (request->bytes_in + 63) / 64 * 64;
        memcpy(request->staging + item->token_ids_offset, m->ids[s->text] + begin, tokens * 4);
    }
    lab_call(&m->lab, request);
    assert_int_equal(request->status, KV_OK);
    if (item->status == KV_BUSY) {
        assert_int_equal(item->length, begin);
        lab_done(&m->lab, request);
        return;
    }
    if (item->status != KV_OK) print_error("step %u: %s %s\n", m->step, item->field, item->message);
    assert_int_equal(item->status, KV_OK);
    uint32_t length = begin + tokens;
    s->length[layer] = length;
    assert_int_equal(item->length, length);

    assert_int_equal(lab_fetch(&m->lab, s->handle, &m->layout, layer, length, m->fetched_keys,
                               m->fetched_values),
                     KV_OK);
    check_rows(m, s, layer, length);
    const float *got = (const float *)(request->staging + request->reply_offset);
    for (uint32_t r = 0; r < rows; r++) {
        uint32_t visible = tokens ? length - rows + 1 + r : length;
        lab_reference(&m->layout, query + r * q, m->fetched_keys, m->fetched_values, visible, out,
                      lse);
        double distance = lab_distance(got + r * q, out, q);
        if (distance > 3e-3) print_error("step %u: row %u is %g away\n", m->step, r, distance);
        assert_true(distance < 3e-3);
        for (int h = 0; h < 4 && visible; h++)
            assert_true(fabsf(got[rows * q + r * 4 + h] - lse[h]) < 3e-3f * (1 + fabsf(lse[h])));
    }
    lab_done(&m->lab, request);
}

/* The length a commit keeps: all that every layer has, unless layers are so far apart that a block
 * below it is packed in some of them only; then less, and the answer says how much. */
static void session_commit(struct model *m, struct model_session *s, bool close) {
    struct kv_request *request =
        lab_request(&m->lab, close ? KV_REQUEST_CLOSE : KV_REQUEST_COMMIT);
    request->commit.session = s->handle;
    request->commit.commit = true;
    request->commit.durability = below(m, 2) ? KV_SYNCED : KV_WRITTEN;
    lab_call(&m->lab, request);
    if (request->status == KV_OK) {
        uint32_t length = common_length(s), most = 0;
        for (int l = 0; l < LAYERS; l++)
            if (s->length[l] > most) most = s->length[l];
        if (most - length < KV_BLOCK_TOKENS) assert_int_equal(request->commit.length, length);
        else assert_true(request->commit.length <= length);
        assert_true(request->commit.durability >= KV_WRITTEN);
        s->committed = true;
        s->committed_length = (uint32_t)request->commit.length;
        s->open = !close;
    } else {
        assert_int_equal(request->status, KV_BUSY);
    }
    lab_done(&m->lab, request);
}

static void session_close(struct model *m, struct model_session *s) {
    assert_int_equal(lab_close_session(&m->lab, s->handle, false), KV_OK);
    s->open = false;
    s->exists = s->committed;
}

static void session_delete(struct model *m, struct model_session *s) {
    struct kv_request *request = lab_request(&m->lab, KV_REQUEST_DELETE);
    strcpy(request->named.name, s->name);
    enum kv_status status = lab_call(&m->lab, request)->status;
    assert_int_equal(status, s->exists ? KV_OK : KV_NOT_FOUND);
    lab_done(&m->lab, request);
    s->exists = s->open = s->committed = false;
}

/* A clean stop commits what is open; a name that then has a snapshot keeps what it says. */
static void restart(struct model *m) {
    for (int i = 0; i < SESSIONS; i++) {
        struct model_session *s = &m->sessions[i];
        if (!s->open) continue;
        if (below(m, 2)) session_commit(m, s, true);
        if (s->open) session_close(m, s);
    }
    lab_close(&m->lab);
    engine_start(m);
    uint32_t expected = 0;
    for (int i = 0; i < SESSIONS; i++) expected += m->sessions[i].exists;
    assert_int_equal(lab_stats(&m->lab).recovered_sessions, expected);
}

static void one_step(struct model *m) {
    struct model_session *s = &m->sessions[below(m, SESSIONS)];
    uint32_t dice = below(m, 100);
    if (dice < 2) restart(m);
    else if (dice < 4) session_delete(m, s);
    else if (!s->open) session_open(m, s);
    else if (dice < 55) session_append(m, s);
    else if (dice < 88) session_attend(m, s);
    else if (dice < 93) session_commit(m, s, false);
    else if (dice < 97) session_commit(m, s, true);
    else session_close(m, s);
}

static void run(const char *preset, uint64_t seed, uint32_t steps) {
    char path[64];
    lab_directory(path);
    struct model *m = calloc(1, sizeof *m);
    size_t count = (size_t)LAYERS * TOKENS * ROW;
    m->random.state = seed;
    m->layout = lab_layout(preset, LAYERS, HEADS, 4, DIM, KV_DTYPE_F16);
    m->options = (struct lab_options){
        .path = path, .arena_bytes = 6 << 20, .tail_bytes_max = 4 << 20, .disk_bytes = 512 << 20};
    m->fetched_keys = malloc(TOKENS * ROW * 4);
    m->fetched_values = malloc(TOKENS * ROW * 4);
    for (int t = 0; t < TEXTS; t++) {
        m->keys[t] = malloc(count * 4);
        m->values[t] = malloc(count * 4);
        lab_rows(&m->random, m->keys[t], count, DIM);
        lab_rows(&m->random, m->values[t], count, DIM);
        for (int i = 0; i < TOKENS; i++) m->ids[t][i] = below(m, 1 << 17);
    }
    /* Both texts begin alike, as two questions to one system prompt do. */
    memcpy(m->ids[1], m->ids[0], 300 * 4);
    for (int l = 0; l < LAYERS; l++) {
        size_t at = (size_t)l * TOKENS * ROW;
        memcpy(m->keys[1] + at, m->keys[0] + at, 300 * ROW * 4);
        memcpy(m->values[1] + at, m->values[0] + at, 300 * ROW * 4);
    }
    for (int i = 0; i < SESSIONS; i++) snprintf(m->sessions[i].name, 8, "s%d", i);

    engine_start(m);
    for (m->step = 0; m->step < steps; m->step++) one_step(m);
    for (int i = 0; i < SESSIONS; i++)
        if (m->sessions[i].open) session_close(m, &m->sessions[i]);
    assert_int_equal(lab_stats(&m->lab).tail_bytes, 0);
    assert_int_equal(lab_stats(&m->lab).sessions_open, 0);
    assert_int_equal(lab_stats(&m->lab).store.corruptions, 0);
    lab_close(&m->lab);

    for (int t = 0; t < TEXTS; t++) {
        free(m->keys[t]);
        free(m->values[t]);
    }
    free(m->fetched_keys);
    free(m->fetched_values);
    free(m);
    lab_directory_remove(path);
}

static void random_lives_of_kivi2(void **state) {
    run("kivi2", lab_seed(), 250);
}

static void random_lives_of_raw16(void **state) {
    run("raw16", lab_seed() + 1, 250);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_lives_of_kivi2),
        cmocka_unit_test(random_lives_of_raw16),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
