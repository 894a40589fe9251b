/* SPDX-License-Identifier: Apache-2.0 */
/* Attention is what kernel.h's three lines say, computed plainly in binary64.
 *
 * The reference decodes every page by formula (decode.c) and takes exp and sums in order.
 * Held to it: the scalar definition at 2e-5, which is binary32's own noise for the sizes
 * here, and the best backend of this machine at 1e-3 (kernel_check has the argued bound).
 */
#include <math.h>

#include "kernels/half.h"
#include "tests/kernels/cases.h"

static struct lab labs_of[2];
static const double tolerance[2] = {2e-5, 1e-3};

static int open_labs(void **state) {
    return lab_open(&labs_of[0], "scalar", 1) && lab_open(&labs_of[1], "auto", 3) ? 0 : 1;
}

static int close_labs(void **state) {
    lab_close(&labs_of[0]);
    lab_close(&labs_of[1]);
    return 0;
}

enum { PAGES_MAX = 24 };

struct context {
    struct kv_shape shape;
    uint32_t page_count;
    uint32_t tokens;
    struct kv_page_ref refs[PAGES_MAX];
    double *keys; /* [head][token][channel] of x^ */
    double *values;
};

static void context_open(struct context *context, const struct kv_shape *shape) {
    memset(context, 0, sizeof *context);
    context->shape = *shape;
    size_t bytes = (size_t)shape->heads * PAGES_MAX * T * shape->head_dim * sizeof(double);
    context->keys = allocate(bytes);
    context->values = allocate(bytes);
}

static void context_close(struct context *context) {
    for (uint32_t i = 0; i < context->page_count; i++) free((void *)context->refs[i].page);
    free(context->keys);
    free(context->values);
}

/* tokens < 128: a raw page partly filled; what lies behind must not be read, so it is NaN. */
static void context_add(struct context *context, bool raw, uint32_t tokens, enum pattern pattern,
                        uint64_t seed) {
    const struct kv_shape *shape = &context->shape;
    uint32_t D = shape->head_dim;
    uint16_t *elements = raw_page(shape, pattern, seed);
    double *k = allocate(T * D * sizeof(double)), *v = allocate(T * D * sizeof(double));
    uint8_t *packed = allocate(kv_page_bytes(shape));
    if (!raw) lab_quantize(&labs_of[0], shape, elements, NULL, packed);
    for (uint32_t head = 0; head < shape->heads; head++) {
        if (raw || shape->codec.kind == KV_CODEC_RAW)
            decode_raw(shape, elements, head, k, v);
        else
            decode_record(shape, packed + head * kv_page_map(shape).record_bytes, k, v);
        size_t at = ((size_t)head * PAGES_MAX * T + context->tokens) * D;
        memcpy(context->keys + at, k, tokens * D * sizeof(double));
        memcpy(context->values + at, v, tokens * D * sizeof(double));
        for (uint32_t i = tokens * D; i < T * D; i++) {
            elements[head * T * D + i] = 0x7fff;
            elements[kv_shape_elements(shape) + head * T * D + i] = 0x7fff;
        }
    }
    free(k);
    free(v);
    free(raw ? (void *)packed : (void *)elements);
    context->refs[context->page_count++] =
        (struct kv_page_ref){raw ? (void *)elements : (void *)packed, (uint16_t)tokens, raw};
    context->tokens += tokens;
    assert_true(context->page_count <= PAGES_MAX);
}

/* Score, softmax and sum in binary64; returns the log-sum-exp. */
static double reference(const struct context *context, uint32_t head, uint32_t visible,
                        const double *query, double scale, double *out) {
    uint32_t D = context->shape.head_dim;
    const double *k = context->keys + (size_t)head * PAGES_MAX * T * D;
    const double *v = context->values + (size_t)head * PAGES_MAX * T * D;
    if (visible > context->tokens) visible = context->tokens;
    for (uint32_t c = 0; c < D; c++) out[c] = 0;
    double most = -INFINITY, sum = 0, scores[PAGES_MAX * T];
    for (uint32_t t = 0; t < visible; t++) {
        scores[t] = 0;
        for (uint32_t c = 0; c < D; c++) scores[t] += query[c] * k[t * D + c];
        scores[t] *= scale;
        most = fmax(most, scores[t]);
    }
    for (uint32_t t = 0; t < visible; t++) {
        double p = exp(scores[t] - most);
        sum += p;
        for (uint32_t c = 0; c < D; c++) out[c] += p * v[t * D + c];
    }
    for (uint32_t c = 0; c < D && sum > 0; c++) out[c] /= sum;
    return most + log(sum);
}

struct ask {
    uint32_t heads_q;
    uint32_t rows;
    enum kv_dtype dtype;
    float scale;
    bool merge;
    const uint32_t *visible; /* NULL: causal, the last row sees everything */
};

/* Asks both backends and holds every vector to the reference. */
static void ask_and_compare(const struct context *context, const struct ask *ask, uint64_t seed) {
    const struct kv_shape *shape = &context->shape;
    uint32_t D = shape->head_dim, group = ask->heads_q / shape->heads;
    size_t vectors = (size_t)ask->rows * ask->heads_q, elements = vectors * D;
    struct dice dice = {seed};
    double *query = allocate(elements * sizeof(double));
    void *encoded = allocate(elements * 4);
    uint32_t visible[KV_ROWS_MAX];
    float *out[2], *lse[2], *before = allocate(elements * 4), *before_lse = allocate(vectors * 4);
    for (size_t i = 0; i < elements; i++) {
        float q = dice_normal(&dice);
        uint16_t element = kv_element_saturated(q, (uint8_t)ask->dtype);
        if (ask->dtype == KV_DTYPE_F32)
            ((float *)encoded)[i] = q;
        else
            ((uint16_t *)encoded)[i] = element;
        query[i] = ask->dtype == KV_DTYPE_F32 ? (double)q : decode_element(element, (uint8_t)ask->dtype);
        before[i] = dice_normal(&dice);
    }
    for (size_t i = 0; i < vectors; i++) before_lse[i] = i % 3 == 2 ? -INFINITY : dice_normal(&dice);
    for (uint32_t r = 0; r < ask->rows; r++) {
        uint32_t after = ask->rows - 1 - r;
        visible[r] = ask->visible != NULL      ? ask->visible[r]
                     : context->tokens > after ? context->tokens - after
                                               : 0;
    }
    for (int l = 0; l < 2; l++) {
        out[l] = allocate(elements * 4);
        lse[l] = allocate(vectors * 4);
        memcpy(out[l], before, elements * 4);
        memcpy(lse[l], before_lse, vectors * 4);
        struct kv_attend item = {.query = encoded,
                                 .dtype = ask->dtype,
                                 .heads_q = ask->heads_q,
                                 .rows = ask->rows,
                                 .score_scale = ask->scale,
                                 .page_count = context->page_count,
                                 .pages = context->refs,
                                 .visible = visible,
                                 .merge = ask->merge,
                                 .out = out[l],
                                 .lse = lse[l]};
        lab_attend(&labs_of[l], shape, &item);
    }

    double expected[KV_HEAD_DIM_MAX];
    for (size_t i = 0; i < vectors; i++) {
        uint32_t row = (uint32_t)(i / ask->heads_q), head = (uint32_t)(i % ask->heads_q) / group;
        double b = reference(context, head, visible[row], query + i * D, (double)ask->scale, expected);
        double a = ask->merge ? (double)before_lse[i] : -INFINITY, total = a > b ? a : b;
        if (total > -INFINITY) {
            double wa = exp(a - total), wb = exp(b - total);
            for (uint32_t c = 0; c < D; c++)
                expected[c] = (wa * (double)before[i * D + c] + wb * expected[c]) / (wa + wb);
            total += log(wa + wb);
        }
        double size = 0;
        for (uint32_t c = 0; c < D; c++) size += expected[c] * expected[c];
        for (int l = 0; l < 2; l++) {
            double off = 0;
            for (uint32_t c = 0; c < D; c++) off += pow(out[l][i * D + c] - expected[c], 2);
            assert_true(sqrt(off) <= tolerance[l] * (sqrt(size) + 1));
            if (total == -INFINITY)
                assert_true(lse[l][i] == -INFINITY && size == 0 && off == 0);
            else
                assert_true(fabs((double)lse[l][i] - total) <= tolerance[l] * (fabs(total) + 1));
        }
    }
    for (int l = 0; l < 2; l++) {
        free(out[l]);
        free(lse[l]);
    }
    free(query);
    free(encoded);
    free(before);
    free(before_lse);
}

/* ---- claims -------------------------------------------------------------------------------------- */

static float usual_scale(uint32_t head_dim) {
    return 1 / sqrtf((float)head_dim);
}

/* Sink, packed blocks and a tail of 37 tokens in one softmax: one row, and several. */
static void every_codec_and_head_dim_attends(void **state) {
    size_t count;
    const struct kv_preset *presets = kv_presets(&count);
    for (size_t p = 0; p < count; p++)
        for (uint32_t d = 0; d < HEAD_DIMS; d++)
            for (uint8_t dtype = KV_DTYPE_F16; dtype <= KV_DTYPE_BF16; dtype++) {
                struct kv_shape shape = shape_of(presets[p].name, 2, head_dims[d], dtype);
                struct context context;
                context_open(&context, &shape);
                context_add(&context, true, T, PATTERN_NORMAL, 1);
                context_add(&context, false, T, PATTERN_BIASED, 2);
                context_add(&context, false, T, PATTERN_NORMAL, 3);
                context_add(&context, true, 37, PATTERN_NORMAL, 4);
                struct ask one = {8, 1, (enum kv_dtype)dtype, usual_scale(head_dims[d]), false, NULL};
                struct ask many = {4, 5, KV_DTYPE_F32, usual_scale(head_dims[d]), false, NULL};
                ask_and_compare(&context, &one, 10);
                ask_and_compare(&context, &many, 11);
                context_close(&context);
            }
}

static void every_grouping_of_heads_attends(void **state) {
    static const uint32_t groupings[][2] = {{1, 1}, {3, 3}, {2, 8}, {1, 7}, {1, 16}, {4, 64}};
    for (size_t i = 0; i < sizeof groupings / sizeof groupings[0]; i++) {
        struct kv_shape shape = shape_of("kivi2", groupings[i][0], 64, KV_DTYPE_F16);
        struct context context;
        context_open(&context, &shape);
        context_add(&context, false, T, PATTERN_NORMAL, 1);
        context_add(&context, true, 9, PATTERN_NORMAL, 2);
        struct ask ask = {groupings[i][1], 3, KV_DTYPE_F16, 0.125f, false, NULL};
        ask_and_compare(&context, &ask, 12);
        context_close(&context);
    }
}

/* Limits inside pages, at their edges, past the end, and nothing at all. */
static void each_row_sees_its_own_tokens(void **state) {
    static const uint32_t visible[] = {0, 1, 127, 128, 129, 255, 256, 300, 301, 5000, 0, 64};
    struct kv_shape shape = shape_of("kivi2", 2, 96, KV_DTYPE_F16);
    struct context context;
    context_open(&context, &shape);
    context_add(&context, false, T, PATTERN_NORMAL, 1);
    context_add(&context, false, T, PATTERN_NORMAL, 2);
    context_add(&context, true, 45, PATTERN_NORMAL, 3);
    struct ask ask = {4, 12, KV_DTYPE_BF16, 0.1f, false, visible};
    ask_and_compare(&context, &ask, 13);
    ask.merge = true;
    ask_and_compare(&context, &ask, 14);
    context_close(&context);
}

/* Contexts long enough to be cut into chunks, with 128 rows cut into blocks. */
static void long_contexts_and_many_rows_attend(void **state) {
    struct kv_shape shape = shape_of("kivi1.75", 1, 64, KV_DTYPE_F16);
    struct context context;
    context_open(&context, &shape);
    for (uint32_t i = 0; i < 22; i++) context_add(&context, i == 0, T, PATTERN_NORMAL, i);
    context_add(&context, true, 100, PATTERN_NORMAL, 99);
    struct ask one = {2, 1, KV_DTYPE_F16, 0.125f, false, NULL};
    struct ask many = {4, 128, KV_DTYPE_F16, 0.125f, true, NULL};
    ask_and_compare(&context, &one, 15);
    ask_and_compare(&context, &many, 16);
    context_close(&context);
}

/* Partly filled raw pages may stand anywhere; tokens are counted through. */
static void partial_pages_in_the_middle_count_their_tokens(void **state) {
    struct kv_shape shape = shape_of("kivi2-paper", 2, 128, KV_DTYPE_F16);
    struct context context;
    context_open(&context, &shape);
    context_add(&context, true, 1, PATTERN_NORMAL, 1);
    context_add(&context, false, T, PATTERN_NORMAL, 2);
    context_add(&context, true, 77, PATTERN_NORMAL, 3);
    for (uint32_t i = 0; i < 6; i++) context_add(&context, false, T, PATTERN_NORMAL, 4 + i);
    context_add(&context, true, 128, PATTERN_NORMAL, 20);
    struct ask ask = {2, 7, KV_DTYPE_F16, 0.09f, false, NULL};
    ask_and_compare(&context, &ask, 17);
    context_close(&context);
}

/* One token takes all: e^score spans the range of binary32 and beyond.  At scales where the
 * rounding of a score is an error of the output, only sanity is asked. */
static void a_peaked_softmax_stays_finite(void **state) {
    struct kv_shape shape = shape_of("kivi2", 1, 128, KV_DTYPE_F16);
    struct context context;
    context_open(&context, &shape);
    for (uint32_t i = 0; i < 6; i++) context_add(&context, i % 2 == 0, T, PATTERN_NORMAL, i + 5);
    struct ask ask = {4, 2, KV_DTYPE_F32, 0, false, NULL};
    static const float scales[] = {0, 1, 8, -8, 40};
    for (size_t i = 0; i < sizeof scales / sizeof scales[0]; i++) {
        ask.scale = scales[i];
        if (fabsf(ask.scale) <= 1) ask_and_compare(&context, &ask, 18);
        float out[2 * 4 * 128], lse[2 * 4], query[2 * 4 * 128];
        uint32_t visible[2] = {context.tokens, context.tokens};
        struct dice dice = {19};
        for (int q = 0; q < 2 * 4 * 128; q++) query[q] = dice_normal(&dice);
        for (int l = 0; l < 2; l++) {
            struct kv_attend item = {.query = query, .dtype = KV_DTYPE_F32, .heads_q = 4, .rows = 2,
                                     .score_scale = ask.scale, .page_count = context.page_count,
                                     .pages = context.refs, .visible = visible, .out = out, .lse = lse};
            lab_attend(&labs_of[l], &shape, &item);
            for (int q = 0; q < 2 * 4 * 128; q++) assert_true(fabsf(out[q]) < 20);
            for (int q = 0; q < 8; q++) assert_true(isfinite(lse[q]));
        }
    }
    context_close(&context);
}

static void an_empty_context_gives_zero_and_minus_infinity(void **state) {
    struct kv_shape shape = shape_of("kivi2", 2, 128, KV_DTYPE_F16);
    struct context context;
    context_open(&context, &shape);
    struct ask ask = {8, 3, KV_DTYPE_F16, 0.1f, false, NULL};
    ask_and_compare(&context, &ask, 20);
    ask.merge = true;
    ask_and_compare(&context, &ask, 21);
    context_close(&context);
}

/* Two halves merged are the whole. */
static void parts_merge_to_the_whole(void **state) {
    struct kv_shape shape = shape_of("kivi2", 1, 128, KV_DTYPE_F16);
    struct context context;
    context_open(&context, &shape);
    for (uint32_t i = 0; i < 6; i++) context_add(&context, false, T, PATTERN_NORMAL, i + 30);
    float query[4 * 128], whole[4 * 128], parts[4 * 128], lse_whole[4], lse_parts[4];
    struct dice dice = {22};
    for (int i = 0; i < 4 * 128; i++) query[i] = dice_normal(&dice);
    uint32_t all = context.tokens;
    for (int l = 0; l < 2; l++) {
        struct kv_attend item = {.query = query, .dtype = KV_DTYPE_F32, .heads_q = 4, .rows = 1,
                                 .score_scale = 0.2f, .page_count = 6, .pages = context.refs,
                                 .visible = &all, .out = whole, .lse = lse_whole};
        lab_attend(&labs_of[l], &shape, &item);
        item.out = parts;
        item.lse = lse_parts;
        item.page_count = 2;
        lab_attend(&labs_of[l], &shape, &item);
        item.pages = context.refs + 2;
        item.page_count = 4;
        item.merge = true;
        lab_attend(&labs_of[l], &shape, &item);
        for (int i = 0; i < 4 * 128; i++) assert_true(fabsf(whole[i] - parts[i]) < 1e-4f);
        for (int i = 0; i < 4; i++) assert_true(fabsf(lse_whole[i] - lse_parts[i]) < 1e-4f);
    }
    context_close(&context);
}

/* The same question has the same answer to the bit, whatever the workers. */
static void answers_do_not_depend_on_the_workers(void **state) {
    struct kv_shape shape = shape_of("kivi2", 2, 64, KV_DTYPE_F16);
    struct context context;
    context_open(&context, &shape);
    for (uint32_t i = 0; i < 20; i++) context_add(&context, false, T, PATTERN_NORMAL, i + 50);
    float query[4 * 64], out[2][4 * 64], lse[2][4];
    struct dice dice = {23};
    for (int i = 0; i < 4 * 64; i++) query[i] = dice_normal(&dice);
    uint32_t all = context.tokens;
    for (uint32_t l = 0; l < 2; l++) {
        struct lab lab;
        assert_true(lab_open(&lab, "auto", 1 + 4 * l));
        struct kv_attend item = {.query = query, .dtype = KV_DTYPE_F32, .heads_q = 4, .rows = 1,
                                 .score_scale = 0.2f, .page_count = 20, .pages = context.refs,
                                 .visible = &all, .out = out[l], .lse = lse[l]};
        lab_attend(&lab, &shape, &item);
        lab_close(&lab);
    }
    assert_memory_equal(out[0], out[1], sizeof out[0]);
    assert_memory_equal(lse[0], lse[1], sizeof lse[0]);
    context_close(&context);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_codec_and_head_dim_attends),
        cmocka_unit_test(every_grouping_of_heads_attends),
        cmocka_unit_test(each_row_sees_its_own_tokens),
        cmocka_unit_test(long_contexts_and_many_rows_attend),
        cmocka_unit_test(partial_pages_in_the_middle_count_their_tokens),
        cmocka_unit_test(a_peaked_softmax_stays_finite),
        cmocka_unit_test(an_empty_context_gives_zero_and_minus_infinity),
        cmocka_unit_test(parts_merge_to_the_whole),
        cmocka_unit_test(answers_do_not_depend_on_the_workers),
    };
    return cmocka_run_group_tests(tests, open_labs, close_labs);
}
