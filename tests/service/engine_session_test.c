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
    /* Fetch rounds what it returns to the wire's dtype; attention does not. */
    double bound = layout->dtype == KV_DTYPE_BF16 ? 1e-2 : 2e-3;
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
    assert_int_equal(lab_fetch(lab, session, layout, layer, length, keys, values), KV_OK);

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
    static const char *const presets[] = {"raw16", "kivi2", "kivi1.5", "kivi2-paper"};
    static const uint32_t lengths[] = {1, 127, 128, 129, 255, 256, 257, 384, 385, 700};
    for (size_t p = 0; p < sizeof presets / sizeof presets[0]; p++) {
        struct lab lab;
        lab_open(&lab, NULL);
        enum kv_dtype dtype = p % 2 ? KV_DTYPE_F16 : p ? KV_DTYPE_BF16 : KV_DTYPE_F32;
        struct kv_layout layout = lab_layout(presets[p], 2, 2, 6, 64, dtype);
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

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attention_is_over_what_fetch_returns),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
