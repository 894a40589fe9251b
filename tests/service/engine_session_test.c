/* SPDX-License-Identifier: Apache-2.0 */
/* engine_session_test.c - the life of a session: append, attend, seal, share, commit, come back. */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/page.h"
#include "tests/service/engine_lab.h"

/* A text: rows of every layer and token ids, the same for the same seed. */
struct text {
    struct kv_layout layout;
    uint32_t tokens;
    size_t row;
    float *keys, *values; /* [layers][tokens][row] */
    uint32_t *ids;
};

static struct text text_make(const struct kv_layout *layout, uint32_t tokens, uint64_t seed) {
    struct text text = {.layout = *layout, .tokens = tokens};
    text.row = (size_t)layout->heads * layout->head_dim;
    size_t count = layout->layers * tokens * text.row;
    struct lab_random random = {seed};
    text.keys = malloc(count * sizeof(float));
    text.values = malloc(count * sizeof(float));
    text.ids = malloc(tokens * sizeof(uint32_t));
    lab_rows(&random, text.keys, count, layout->head_dim);
    lab_rows(&random, text.values, count, layout->head_dim);
    for (uint32_t i = 0; i < tokens; i++) text.ids[i] = (uint32_t)(lab_uniform(&random) * 50000);
    return text;
}

static void text_free(struct text *text) {
    free(text->keys);
    free(text->values);
    free(text->ids);
}

static const float *keys_of(const struct text *text, uint32_t layer, uint32_t token) {
    return text->keys + ((size_t)layer * text->tokens + token) * text->row;
}

static const float *values_of(const struct text *text, uint32_t layer, uint32_t token) {
    return text->values + ((size_t)layer * text->tokens + token) * text->row;
}

/* Appends tokens [begin, end) of one layer, in frames of at most 256. */
static void append_layer(struct lab *lab, uint64_t session, const struct text *text,
                         uint32_t layer, uint32_t begin, uint32_t end, bool ids) {
    for (uint32_t t = begin; t < end; t += 256) {
        uint32_t tokens = end - t < 256 ? end - t : 256;
        struct kv_request *request =
            lab_append(lab, session, &text->layout, layer, t, tokens, keys_of(text, layer, t),
                       values_of(text, layer, t), ids ? text->ids + t : NULL);
        if (request->status != KV_OK) print_error("%s: %s\n", request->field, request->message);
        assert_int_equal(request->status, KV_OK);
        assert_int_equal(request->append.length, t + tokens);
        lab_done(lab, request);
    }
}

static void append_all(struct lab *lab, uint64_t session, const struct text *text, uint32_t begin,
                       uint32_t end, bool ids) {
    for (uint32_t l = 0; l < text->layout.layers; l++)
        append_layer(lab, session, text, l, begin, end, ids);
}

/* What Fetch says in the layout's dtype is what it says in F32, to a place of that dtype: both
 * round the same x^ once, the one to 8 bits where it is bf16. */
static void check_own_dtype(struct lab *lab, uint64_t session, const struct kv_layout *layout,
                            uint32_t layer, uint32_t length, const float *keys,
                            const float *values) {
    size_t count = (size_t)length * layout->heads * layout->head_dim;
    float *own[2] = {malloc((count + 1) * sizeof(float)), malloc((count + 1) * sizeof(float))};
    float place = layout->dtype == KV_DTYPE_BF16 ? 0x1.02p-8f : 0x1.02p-11f;
    assert_int_equal(lab_fetch(lab, session, layout, layer, length, own[0], own[1]), KV_OK);
    for (size_t i = 0; i < count; i++) {
        assert_true(fabsf(own[0][i] - keys[i]) <= place * fabsf(keys[i]) + 1e-7f);
        assert_true(fabsf(own[1][i] - values[i]) <= place * fabsf(values[i]) + 1e-7f);
    }
    free(own[0]);
    free(own[1]);
}

/* What Attend says equals the naive definition on what Fetch says; returns the distance of Fetch
 * from the text itself. */
static double check_layer(struct lab *lab, uint64_t session, const struct text *text,
                          uint32_t layer, uint32_t length) {
    const struct kv_layout *layout = &text->layout;
    enum { ROWS = 3 };
    size_t q = (size_t)layout->heads_q * layout->head_dim, count = length * text->row;
    float *keys = malloc((count + 1) * sizeof(float)), *values = malloc((count + 1) * sizeof(float));
    float *query = malloc(ROWS * q * sizeof(float)), *out = malloc(q * sizeof(float));
    float lse[KV_HEADS_Q_MAX];
    const double bound = 1e-3;
    struct lab_random random = {layer * 1000 + length};
    lab_rows(&random, query, ROWS * q, layout->head_dim);

    struct kv_request *request =
        lab_attend(lab, session, layout, layer, ROWS, KV_MASK_CAUSAL, query);
    assert_int_equal(request->status, KV_OK);
    if (request->attend.items[0].status != KV_OK)
        print_error("%s\n", request->attend.items[0].message);
    assert_int_equal(request->attend.items[0].status, KV_OK);
    assert_int_equal(request->attend.items[0].length, length);
    const float *got = (const float *)(request->staging + request->reply_offset);
    assert_int_equal(
        lab_fetch_as(lab, session, layout, KV_DTYPE_F32, layer, length, keys, values), KV_OK);

    uint8_t wire[ROWS * 4 * 16 * 256];
    lab_encode(layout->dtype, query, wire, ROWS * q);
    lab_decode(layout->dtype, wire, query, ROWS * q);
    for (uint32_t r = 0; r < ROWS; r++) {
        uint32_t visible = length + 1 + r > ROWS ? length + 1 + r - ROWS : 0;
        lab_reference(layout, query + r * q, keys, values, visible, out, lse);
        double out_error = lab_distance(got + r * q, out, q);
        if (out_error > bound) print_error("row %u of layer %u: %g\n", r, layer, out_error);
        assert_true(out_error < bound);
        for (uint32_t h = 0; h < layout->heads_q; h++) {
            float theirs = got[ROWS * q + r * layout->heads_q + h];
            if (visible == 0) assert_true(isinf(theirs) && theirs < 0);
            else assert_true(fabsf(theirs - lse[h]) < (float)bound * (1 + fabsf(lse[h])));
        }
    }
    double distance = lab_distance(keys, keys_of(text, layer, 0), count) +
                      lab_distance(values, values_of(text, layer, 0), count);
    check_own_dtype(lab, session, layout, layer, length, keys, values);
    lab_done(lab, request);
    free(keys);
    free(values);
    free(query);
    free(out);
    return distance;
}

static void check_all(struct lab *lab, uint64_t session, const struct text *text,
                      uint32_t length) {
    for (uint32_t l = 0; l < text->layout.layers; l++)
        check_layer(lab, session, text, l, length);
}

/* Every codec: what a session answers is attention over what it holds, at lengths around every
 * edge; nothing packed is exact and nothing exact is packed. */
static void attention_is_over_what_fetch_returns(void **state) {
    static const struct {
        const char *preset;
        enum kv_dtype dtype;
    } cases[] = {
        {"raw16", KV_DTYPE_F32},   {"raw16", KV_DTYPE_BF16},       {"kivi2", KV_DTYPE_F16},
        {"kivi2", KV_DTYPE_F32},   {"kivi2", KV_DTYPE_BF16},       {"kivi1.5", KV_DTYPE_BF16},
        {"kivi1.75", KV_DTYPE_F16}, {"kivi2-paper", KV_DTYPE_BF16}, {"kivi2-paper", KV_DTYPE_F16},
    };
    static const uint32_t lengths[] = {1, 127, 128, 129, 255, 256, 257, 384, 385, 700};
    for (size_t p = 0; p < sizeof cases / sizeof cases[0]; p++) {
        struct lab lab;
        lab_open(&lab, NULL);
        struct kv_layout layout = lab_layout(cases[p].preset, 2, 2, 6, 64, cases[p].dtype);
        struct kv_digest fingerprint = lab_register(&lab, &layout);
        struct text text = text_make(&layout, 700, p + 1);
        uint64_t session = lab_open_session(&lab, "life", &fingerprint);
        uint32_t length = 0;
        for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
            append_all(&lab, session, &text, length, lengths[i], p % 2 == 0);
            length = lengths[i];
            check_all(&lab, session, &text, length);
        }
        text_free(&text);
        lab_close(&lab);
    }
}

/* ---- Sealing ----------------------------------------------------------------------------------- */

/* Sinks and the newest window are exact, what lies between is not: at 700 tokens of kivi2, block 0
 * is a sink, blocks 1 .. 3 are packed (the block that ends at 512 is 188 tokens old), the rest is
 * the window. */
static void the_ends_stay_exact(void **state) {
    struct lab lab;
    lab_open(&lab, NULL);
    struct kv_layout layout = lab_layout("kivi2", 1, 2, 4, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    struct text text = text_make(&layout, 700, 5);
    uint64_t session = lab_open_session(&lab, "ends", &fingerprint);
    append_all(&lab, session, &text, 0, 700, true);
    float *keys = malloc(700 * text.row * 4), *values = malloc(700 * text.row * 4);
    float *exact = malloc(700 * text.row * 4);
    assert_int_equal(lab_fetch(&lab, session, &layout, 0, 700, keys, values), KV_OK);
    _Float16 *half = malloc(700 * text.row * 2);
    lab_encode(KV_DTYPE_F16, keys_of(&text, 0, 0), half, 700 * text.row);
    lab_decode(KV_DTYPE_F16, half, exact, 700 * text.row);
    for (uint32_t token = 0; token < 700; token++) {
        bool same = memcmp(keys + token * text.row, exact + token * text.row, text.row * 4) == 0;
        bool must = token < 128 || token >= 512;
        assert_int_equal(same, must);
    }
    assert_int_equal(lab_stats(&lab).blocks_sealed, 4);
    free(keys);
    free(values);
    free(exact);
    free(half);
    text_free(&text);
    lab_close(&lab);
}

/* A prefill brings layer after layer; blocks are sealed when the last one is there, and attention
 * on a layer works as soon as that layer is. */
static void layers_may_come_one_after_the_other(void **state) {
    struct lab lab;
    lab_open(&lab, NULL);
    struct kv_layout layout = lab_layout("kivi2", 3, 2, 2, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    struct text text = text_make(&layout, 1000, 6);
    uint64_t session = lab_open_session(&lab, "prefill", &fingerprint);
    static const uint32_t order[] = {2, 0, 1};
    for (int i = 0; i < 3; i++) {
        assert_int_equal(lab_stats(&lab).blocks_sealed, 0);
        append_layer(&lab, session, &text, order[i], 0, 1000, i == 0); /* ids with the first */
        check_layer(&lab, session, &text, order[i], 1000);
    }
    assert_int_equal(lab_stats(&lab).blocks_sealed, 6);
    check_all(&lab, session, &text, 1000);
    text_free(&text);
    lab_close(&lab);
}

/* Decode steps: append one token and attend in one frame.  The answer counts the new token. */
static void a_step_appends_and_attends(void **state) {
    struct lab lab;
    lab_open(&lab, NULL);
    struct kv_layout layout = lab_layout("kivi2", 2, 2, 4, 128, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    struct text text = text_make(&layout, 400, 7);
    uint64_t session = lab_open_session(&lab, "decode", &fingerprint);
    append_all(&lab, session, &text, 0, 200, true);
    size_t q = (size_t)layout.heads_q * layout.head_dim;
    float *query = malloc(q * 4), *out = malloc(q * 4), lse[4];
    float *keys = malloc(400 * text.row * 4), *values = malloc(400 * text.row * 4);
    struct lab_random random = {8};
    for (uint32_t t = 200; t < 400; t++) {
        for (uint32_t l = 0; l < 2; l++) {
            lab_rows(&random, query, q, 128);
            struct kv_request *request = lab_request(&lab, KV_REQUEST_ATTEND);
            request->attend.layer = l;
            request->attend.item_count = 1;
            struct kv_attend_item *item = &request->attend.items[0];
            *item = (struct kv_attend_item){.session = session,
                                            .rows = 1,
                                            .mask = KV_MASK_CAUSAL,
                                            .append_tokens = 1,
                                            .expected_length = t,
                                            .has_token_ids = l == 0};
            uint8_t *at = request->staging;
            lab_encode(KV_DTYPE_F16, query, at, q);
            lab_decode(KV_DTYPE_F16, at, query, q);
            lab_encode(KV_DTYPE_F16, keys_of(&text, l, t), at + 2 * q, text.row);
            lab_encode(KV_DTYPE_F16, values_of(&text, l, t), at + 2 * (q + text.row), text.row);
            request->bytes_in = 2 * (q + 2 * text.row);
            item->token_ids_offset = (request->bytes_in + 63) / 64 * 64;
            memcpy(at + item->token_ids_offset, &text.ids[t], 4);
            lab_call(&lab, request);
            assert_int_equal(request->status, KV_OK);
            assert_int_equal(item->status, KV_OK);
            assert_int_equal(item->length, t + 1);
            assert_int_equal(request->reply_bytes, (q + 4) * 4);
            bool look = t % 17 == 0 || t == 383 || t == 384; /* 384: a block is sealed in it */
            if (look) {
                assert_int_equal(lab_fetch(&lab, session, &layout, l, t + 1, keys, values), KV_OK);
                lab_reference(&layout, query, keys, values, t + 1, out, lse);
                const float *got = (const float *)(request->staging + request->reply_offset);
                assert_true(lab_distance(got, out, q) < 2e-3);
            }
            lab_done(&lab, request);
        }
    }
    struct kv_engine_stats stats = lab_stats(&lab);
    assert_int_equal(stats.blocks_sealed, 2);
    assert_int_equal(stats.tokens_appended, 2 * 400);
    assert_int_equal(stats.rows_attended, 2 * 200);
    free(query);
    free(out);
    free(keys);
    free(values);
    text_free(&text);
    lab_close(&lab);
}

/* ---- Sharing ------------------------------------------------------------------------------------- */

/* The second session with the same tokens packs nothing and holds nothing twice. */
static void equal_prompts_are_held_once(void **state) {
    struct lab lab;
    lab_open(&lab, NULL);
    struct kv_layout layout = lab_layout("kivi2", 2, 2, 4, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    struct text text = text_make(&layout, 800, 9);
    uint64_t a = lab_open_session(&lab, "a", &fingerprint);
    append_all(&lab, a, &text, 0, 800, true);
    struct kv_engine_stats first = lab_stats(&lab);
    uint64_t b = lab_open_session(&lab, "b", &fingerprint);
    append_all(&lab, b, &text, 0, 800, true);
    struct kv_engine_stats second = lab_stats(&lab);
    assert_int_equal(first.blocks_sealed, 5);
    assert_int_equal(second.blocks_sealed, 5);
    assert_int_equal(second.blocks_shared, 5);
    assert_int_equal(second.store.blocks, first.store.blocks);
    check_all(&lab, b, &text, 800);
    text_free(&text);
    lab_close(&lab);
}

/* Both fill the same blocks at the same time, layer by layer: nobody waits, both are right, and
 * who completes second drops its copy. */
static void equal_prompts_at_the_same_time(void **state) {
    struct lab lab;
    lab_open(&lab, NULL);
    struct kv_layout layout = lab_layout("kivi2", 3, 2, 4, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    struct text text = text_make(&layout, 600, 10);
    uint64_t sessions[2] = {lab_open_session(&lab, "a", &fingerprint),
                            lab_open_session(&lab, "b", &fingerprint)};
    for (uint32_t l = 0; l < 3; l++)
        for (int i = 0; i < 2; i++) {
            append_layer(&lab, sessions[i], &text, l, 0, 600, l == 0);
            check_layer(&lab, sessions[i], &text, l, 600);
        }
    struct kv_engine_stats stats = lab_stats(&lab);
    assert_int_equal(stats.blocks_sealed, 3);
    assert_int_equal(stats.blocks_shared, 3);
    for (int i = 0; i < 2; i++) check_all(&lab, sessions[i], &text, 600);

    /* And one that began a block and went away leaves nothing in the way of the other. */
    uint64_t stuck = lab_open_session(&lab, "stuck", &fingerprint);
    struct text other = text_make(&layout, 600, 11);
    append_layer(&lab, stuck, &other, 0, 0, 600, true);
    uint64_t c = lab_open_session(&lab, "c", &fingerprint);
    append_all(&lab, c, &other, 0, 600, true);
    check_all(&lab, c, &other, 600);
    assert_int_equal(lab_close_session(&lab, stuck, false), KV_OK);
    check_all(&lab, c, &other, 600);
    text_free(&other);
    text_free(&text);
    lab_close(&lab);
}

/* A new session begins with the longest prefix that is in the cache, and goes on from there. */
static void a_session_starts_with_the_cached_prefix(void **state) {
    struct lab lab;
    lab_open(&lab, NULL);
    struct kv_layout layout = lab_layout("kivi2", 2, 2, 2, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    struct text text = text_make(&layout, 900, 12);
    uint64_t a = lab_open_session(&lab, "a", &fingerprint);
    append_all(&lab, a, &text, 0, 600, true); /* seals 0 .. 2 */

    struct kv_request *request = lab_request(&lab, KV_REQUEST_OPEN);
    strcpy(request->open.name, "b");
    request->open.fingerprint = fingerprint;
    request->open.token_count = 900;
    memcpy(request->staging, text.ids, 900 * 4);
    lab_call(&lab, request);
    assert_int_equal(request->status, KV_OK);
    assert_true(request->open.created);
    assert_int_equal(request->open.length, 384);
    assert_int_equal(request->open.usable, 384);
    uint64_t b = request->open.session;
    lab_done(&lab, request);
    append_all(&lab, b, &text, 384, 900, true);
    check_all(&lab, b, &text, 900);
    text_free(&text);
    lab_close(&lab);
}

/* ---- Coming back --------------------------------------------------------------------------------- */

/* The reply of one attend, to be compared to the byte. */
static void answer_of(struct lab *lab, uint64_t session, const struct kv_layout *layout,
                      float *out, size_t count) {
    float query[4 * 128];
    struct lab_random random = {77};
    lab_rows(&random, query, 4 * 128, layout->head_dim);
    struct kv_request *request = lab_attend(lab, session, layout, 1, 1, KV_MASK_ALL, query);
    assert_int_equal(request->status, KV_OK);
    assert_int_equal(request->attend.items[0].status, KV_OK);
    memcpy(out, request->staging + request->reply_offset, count * 4);
    lab_done(lab, request);
}

static uint64_t open_existing(struct lab *lab, const char *name,
                              const struct kv_digest *fingerprint, uint64_t length) {
    struct kv_request *request = lab_request(lab, KV_REQUEST_OPEN);
    strcpy(request->open.name, name);
    request->open.fingerprint = *fingerprint;
    request->open.mode = KV_OPEN_EXISTING;
    lab_call(lab, request);
    if (request->status != KV_OK) print_error("%s\n", request->message);
    assert_int_equal(request->status, KV_OK);
    assert_false(request->open.created);
    assert_int_equal(request->open.length, length);
    assert_int_equal(request->open.usable, length);
    uint64_t session = request->open.session;
    lab_done(lab, request);
    return session;
}

/* With and without token ids; the second run also continues where the first one stopped. */
static void a_session_survives_a_restart(void **state) {
    char path[64];
    lab_directory(path);
    struct lab_options options = {.path = path};
    struct kv_layout layout = lab_layout("kivi2", 3, 2, 4, 64, KV_DTYPE_F16);
    struct text text = text_make(&layout, 1200, 13);
    float before[2][4 * 64 + 4], after[4 * 64 + 4];
    static const char *const names[2] = {"with ids", "without"};
    struct kv_digest fingerprint;

    struct lab lab;
    lab_open(&lab, &options);
    fingerprint = lab_register(&lab, &layout);
    for (int i = 0; i < 2; i++) {
        uint64_t session = lab_open_session(&lab, names[i], &fingerprint);
        append_all(&lab, session, &text, 0, 900, i == 0);
        answer_of(&lab, session, &layout, before[i], 4 * 64 + 4);
        assert_int_equal(lab_commit(&lab, session, i ? KV_SYNCED : KV_WRITTEN), KV_OK);
    }
    lab_close(&lab);

    lab_open(&lab, &options);
    assert_int_equal(lab_stats(&lab).recovered_sessions, 2);
    assert_int_equal(lab_stats(&lab).layouts, 1);
    for (int i = 0; i < 2; i++) {
        uint64_t session = open_existing(&lab, names[i], &fingerprint, 900);
        answer_of(&lab, session, &layout, after, 4 * 64 + 4);
        assert_memory_equal(before[i], after, sizeof after);
        append_all(&lab, session, &text, 900, 1200, i == 0);
        check_all(&lab, session, &text, 1200);
        assert_int_equal(lab_close_session(&lab, session, true), KV_OK);
    }
    lab_close(&lab);

    lab_open(&lab, &options);
    for (int i = 0; i < 2; i++) {
        uint64_t session = open_existing(&lab, names[i], &fingerprint, 1200);
        check_all(&lab, session, &text, 1200);
    }
    lab_close(&lab);
    text_free(&text);
    lab_directory_remove(path);
}

/* What a child committed as WRITTEN is there after it was killed, to the byte; what it appended
 * behind that is not. */
static void a_session_survives_kill_9(void **state) {
    char path[64];
    lab_directory(path);
    struct lab_options options = {.path = path};
    struct kv_layout layout = lab_layout("kivi2", 2, 2, 4, 64, KV_DTYPE_F16);
    struct text text = text_make(&layout, 1500, 14);
    for (uint32_t round = 0; round < 4; round++) {
        int pipes[2];
        assert_int_equal(pipe(pipes), 0);
        uint32_t length = 300 + round * 290;
        pid_t child = fork();
        if (child == 0) {
            struct lab lab;
            lab_open(&lab, &options);
            struct kv_digest fingerprint = lab_register(&lab, &layout);
            struct { float answer[4 * 64 + 4]; } message;
            uint64_t session = lab_open_session(&lab, "k", &fingerprint);
            append_all(&lab, session, &text, round ? length - 290 : 0, length, true);
            answer_of(&lab, session, &layout, message.answer, 4 * 64 + 4);
            if (lab_commit(&lab, session, KV_WRITTEN) != KV_OK) _exit(1);
            append_all(&lab, session, &text, length, length + 140, true);
            ssize_t written = write(pipes[1], &message, sizeof message);
            (void)written;
            for (;;) pause();
        }
        float before[4 * 64 + 4], after[4 * 64 + 4];
        assert_int_equal(read(pipes[0], before, sizeof before), sizeof before);
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        close(pipes[0]);
        close(pipes[1]);

        struct lab lab;
        lab_open(&lab, &options);
        struct kv_digest fingerprint = lab_register(&lab, &layout);
        uint64_t session = open_existing(&lab, "k", &fingerprint, length);
        answer_of(&lab, session, &layout, after, 4 * 64 + 4);
        assert_memory_equal(before, after, sizeof after);
        assert_int_equal(lab_close_session(&lab, session, false), KV_OK);
        lab_close(&lab);
    }
    text_free(&text);
    lab_directory_remove(path);
}

/* A session that goes on differently than it did before it lost its memory finds nothing of that
 * other life, although it has no token ids to tell them apart. */
static void another_life_leaves_no_blocks(void **state) {
    struct lab lab;
    lab_open(&lab, NULL);
    struct kv_layout layout = lab_layout("kivi2", 1, 1, 1, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    struct text one = text_make(&layout, 900, 15), two = text_make(&layout, 900, 16);
    uint64_t session = lab_open_session(&lab, "x", &fingerprint);
    append_all(&lab, session, &two, 0, 200, false);
    assert_int_equal(lab_commit(&lab, session, KV_WRITTEN), KV_OK);
    append_all(&lab, session, &one, 200, 900, false);
    assert_int_equal(lab_close_session(&lab, session, false), KV_OK);

    session = open_existing(&lab, "x", &fingerprint, 200);
    append_all(&lab, session, &two, 200, 900, false);
    double distance = check_layer(&lab, session, &two, 0, 900);
    assert_true(distance < 1.0); /* two texts that have nothing in common are 2.8 apart */
    text_free(&one);
    text_free(&two);
    lab_close(&lab);
}

/* ---- Memory ------------------------------------------------------------------------------------------ */

/* Twice the arena and more, streamed through it from disk page by page, gives what an arena that
 * holds it all gives. */
static void a_session_may_be_larger_than_the_arena(void **state) {
    char path[64];
    lab_directory(path);
    struct kv_layout layout = lab_layout("kivi2", 8, 2, 4, 64, KV_DTYPE_F16);
    struct text text = text_make(&layout, 16384, 17);
    float answers[2][4 * 64 + 4];
    for (int small = 0; small < 2; small++) {
        struct lab lab;
        struct lab_options options = {.arena_bytes = 64 << 20};
        if (small) options = (struct lab_options){.path = path, .arena_bytes = 4 << 20, .gpu_arena_bytes = 2 << 20};
        options.tail_bytes_max = 3 << 20;
        lab_open(&lab, &options);
        struct kv_digest fingerprint = lab_register(&lab, &layout);
        uint64_t session = lab_open_session(&lab, "large", &fingerprint);
        for (uint32_t t = 0; t < 16384; t += 128) append_all(&lab, session, &text, t, t + 128, true);
        answer_of(&lab, session, &layout, answers[small], 4 * 64 + 4);
        struct kv_engine_stats stats = lab_stats(&lab);
        if (small) {
            assert_true(stats.pages_from_nvme > 0);
            assert_true(stats.store.bytes_written > 2 * options.arena_bytes);
        }
        lab_close(&lab);
    }
    assert_true(lab_distance(answers[0], answers[1], 4 * 64) < 1e-5);
    text_free(&text);
    lab_directory_remove(path);
}

/* ---- Names --------------------------------------------------------------------------------------------- */

static uint32_t list(struct lab *lab, const char *prefix, const char *after, uint32_t limit,
                     char names[16][KV_NAME_MAX + 1]) {
    struct kv_request *request = lab_request(lab, KV_REQUEST_LIST);
    strcpy(request->list.prefix, prefix);
    strcpy(request->list.after, after);
    request->list.limit = limit;
    lab_call(lab, request);
    assert_int_equal(request->status, KV_OK);
    uint32_t count = request->list.count;
    const struct kv_session_info *infos =
        (const struct kv_session_info *)(request->staging + request->reply_offset);
    for (uint32_t i = 0; i < count; i++) strcpy(names[i], infos[i].name);
    lab_done(lab, request);
    return count;
}

static enum kv_status delete_session(struct lab *lab, const char *name) {
    struct kv_request *request = lab_request(lab, KV_REQUEST_DELETE);
    strcpy(request->named.name, name);
    enum kv_status status = lab_call(lab, request)->status;
    lab_done(lab, request);
    return status;
}

static void names_are_listed_described_and_deleted(void **state) {
    char path[64], names[16][KV_NAME_MAX + 1];
    lab_directory(path);
    struct lab_options options = {.path = path};
    struct lab lab;
    lab_open(&lab, &options);
    struct kv_layout layout = lab_layout("kivi2", 2, 2, 2, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    struct text text = text_make(&layout, 600, 18);
    static const char *const all[] = {"b/2", "a", "b/1", "c", "b"};
    for (int i = 0; i < 5; i++) {
        uint64_t session = lab_open_session(&lab, all[i], &fingerprint);
        append_all(&lab, session, &text, 0, 600, true);
        assert_int_equal(lab_close_session(&lab, session, true), KV_OK);
    }
    assert_int_equal(list(&lab, "", "", 0, names), 5);
    assert_string_equal(names[0], "a");
    assert_string_equal(names[4], "c");
    assert_int_equal(list(&lab, "b", "", 0, names), 3);
    assert_string_equal(names[0], "b");
    assert_int_equal(list(&lab, "b", "b/1", 0, names), 1);
    assert_string_equal(names[0], "b/2");
    assert_int_equal(list(&lab, "", "a", 2, names), 2);
    assert_int_equal(list(&lab, "d", "", 0, names), 0);

    struct kv_request *request = lab_request(&lab, KV_REQUEST_DESCRIBE);
    strcpy(request->named.name, "b");
    lab_call(&lab, request);
    assert_int_equal(request->status, KV_OK);
    const struct kv_session_info *info = &request->named.info;
    assert_int_equal(info->length, 600);
    assert_int_equal(info->length_committed, 600);
    assert_int_equal(info->sealed_tokens, 384);
    assert_int_equal(info->blocks_host + info->blocks_nvme, 3);
    assert_int_equal(info->bytes_full, 600 * 2 * 2 * 2 * 64 * 2);
    assert_false(info->open);
    assert_int_equal(request->named.digest_count, 3);
    struct kv_salt salt = {.count = 0};
    struct kv_digest root = kv_chain_root(&fingerprint, &salt);
    struct kv_digest digest = kv_chain_next(&root, text.ids);
    assert_memory_equal(request->staging + request->reply_offset, digest.bytes, 32);
    lab_done(&lab, request);

    assert_int_equal(delete_session(&lab, "b"), KV_OK);
    assert_int_equal(delete_session(&lab, "b"), KV_NOT_FOUND);
    uint64_t open = open_existing(&lab, "a", &fingerprint, 600);
    assert_int_equal(delete_session(&lab, "a"), KV_OK);
    assert_int_equal(lab_commit(&lab, open, KV_WRITTEN), KV_NOT_FOUND);
    assert_int_equal(list(&lab, "", "", 0, names), 3);
    lab_close(&lab);

    lab_open(&lab, &options); /* gone for good */
    assert_int_equal(list(&lab, "", "", 0, names), 3);
    assert_int_equal(delete_session(&lab, "a"), KV_NOT_FOUND);
    lab_close(&lab);
    text_free(&text);
    lab_directory_remove(path);
}

/* Nobody used it: it is committed, closed, and opens again as it was.  The old handle is dead. */
static void an_idle_session_is_committed_and_closed(void **state) {
    struct lab_options options = {.session_idle_ms = 60};
    struct lab lab;
    lab_open(&lab, &options);
    struct kv_layout layout = lab_layout("kivi2", 2, 2, 4, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    struct text text = text_make(&layout, 300, 19);
    float before[4 * 64 + 4], after[4 * 64 + 4];
    uint64_t session = lab_open_session(&lab, "idle", &fingerprint);
    append_all(&lab, session, &text, 0, 300, true);
    answer_of(&lab, session, &layout, before, 4 * 64 + 4);
    for (int i = 0; i < 200 && lab_stats(&lab).sessions_open; i++) usleep(20000);
    assert_int_equal(lab_stats(&lab).sessions_open, 0);
    assert_int_equal(lab_stats(&lab).tail_bytes, 0);
    assert_int_equal(lab_commit(&lab, session, KV_WRITTEN), KV_NOT_FOUND);
    session = open_existing(&lab, "idle", &fingerprint, 300);
    answer_of(&lab, session, &layout, after, 4 * 64 + 4);
    assert_memory_equal(before, after, sizeof after);
    text_free(&text);
    lab_close(&lab);
}

/* Stopping commits what is open. */
static void stopping_commits_open_sessions(void **state) {
    char path[64];
    lab_directory(path);
    struct lab_options options = {.path = path};
    struct kv_layout layout = lab_layout("raw16", 2, 1, 1, 64, KV_DTYPE_BF16);
    struct text text = text_make(&layout, 333, 20);
    struct lab lab;
    lab_open(&lab, &options);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    uint64_t session = lab_open_session(&lab, "open", &fingerprint);
    append_all(&lab, session, &text, 0, 333, true);
    lab_close(&lab);
    lab_open(&lab, &options);
    session = open_existing(&lab, "open", &fingerprint, 333);
    check_all(&lab, session, &text, 333);
    lab_close(&lab);
    text_free(&text);
    lab_directory_remove(path);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_is_over_what_fetch_returns),
        cmocka_unit_test(the_ends_stay_exact),
        cmocka_unit_test(layers_may_come_one_after_the_other),
        cmocka_unit_test(a_step_appends_and_attends),
        cmocka_unit_test(equal_prompts_are_held_once),
        cmocka_unit_test(equal_prompts_at_the_same_time),
        cmocka_unit_test(a_session_starts_with_the_cached_prefix),
        cmocka_unit_test(a_session_survives_a_restart),
        cmocka_unit_test(a_session_survives_kill_9),
        cmocka_unit_test(another_life_leaves_no_blocks),
        cmocka_unit_test(a_session_may_be_larger_than_the_arena),
        cmocka_unit_test(names_are_listed_described_and_deleted),
        cmocka_unit_test(an_idle_session_is_committed_and_closed),
        cmocka_unit_test(stopping_commits_open_sessions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
