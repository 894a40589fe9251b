/* SPDX-License-Identifier: Apache-2.0 */
/* kernel_check_attend.c - attention of two backends, to a bound.
 *
 * The bound.  Every backend computes
 *
 *     score_t = scale q.k_t      p_t = e^(score_t - lse)      out = sum_t p_t v_t
 *
 * on the same x^, and differs from exact arithmetic in two places.  Maxima over t are over
 * the whole context, whatever a row sees of it.
 *
 * Scores.  Let  S = scale * sum_c |q_c| max_t |k_tc|,  above which no partial sum of a score
 * can rise.  A binary32 sum of D products errs by a few 2^-24 S: 2^-18 S covers it.
 * A backend that multiplies codes by q s in two signed 8-bit digits rounds each q_c s_c to a
 * step of 2^-14 of the largest one of the page.  That hurts most where a page mixes widths:
 * a channel of 4 bits has codes up to 15 and shares the step with a channel of 2 bits whose s
 * is four times its own.  With a quarter of the channels so, and errors adding up like
 * noise, one standard deviation is 2^-15.8 S; seven of them are 2^-13 S.  Such a backend must
 * take more digits where the noise in absolute terms, which is what the exponential sees,
 * exceeds 2^-12 (one standard deviation): so never more than 2^-9.  Together
 *
 *     e = min(2^-13 S, 2^-9) + 2^-18 S + 2^-18
 *
 * A log-sum-exp moves by no more than its scores do, and its own rounding is 2^-22 of it:
 * |lse - lse'| <= e + 2^-20 |lse|.
 *
 * Outputs.  An output is a convex combination of the visible v_t, so errors of e in every
 * score move it by at most 2 e V, V = max_t |v_t| (the weights change by factors between
 * e^-2e and e^2e; their sum stays 1).  Weights in two 8-bit digits under one scale per 128
 * tokens err by 2^-15 of the largest each, like noise: 2^-12 V covers it.
 * |out - out'| <= (2 e + 2^-12) V, in the 2-norm.  It never needs to exceed 2 V.
 *
 * That is for inputs that an adversary chose.  Ordinary data must come much closer: the
 * relative error of all outputs together, over the patterns normal and biased and the
 * fixture, may be ERROR_ORDINARY, a three-hundredth of what quantizing itself costs.
 *
 * Exactly: a row that sees nothing gives 0 and -inf (or what it is merged into, unchanged),
 * and no result is NaN.
 */
#include <math.h>

#include "kernels/half.h"
#include "proto/kv_check.h"
#include "tests/kernels/kernel_check.h"

enum { T = KV_BLOCK_TOKENS, PAGES_MAX = 12, HEADS_MAX = 4 };

struct context {
    uint32_t page_count;
    struct kv_page_ref refs[PAGES_MAX];
    uint32_t tokens;
    /* How large x^ is, by KV head: max_t |k_tc| and max_t |v_t|. */
    double keys[HEADS_MAX][KV_HEAD_DIM_MAX];
    double values[HEADS_MAX];
};

/* x^ rounded to 16 bits will do: it only measures how large things are. */
static void context_append(struct context *context, const struct kv_shape *shape,
                           const uint16_t *raw, uint32_t tokens) {
    uint32_t D = shape->head_dim;
    size_t half = kv_shape_elements(shape);
    KV_CHECK(shape->heads <= HEADS_MAX);
    for (uint32_t head = 0; head < shape->heads; head++)
        for (uint32_t t = 0; t < tokens; t++) {
            const uint16_t *k = raw + ((size_t)head * T + t) * D;
            double square = 0, *largest = context->keys[head];
            for (uint32_t c = 0; c < D; c++) {
                double v = (double)kv_f32_of_element(k[half + c], shape->dtype);
                largest[c] = fmax(largest[c], fabs((double)kv_f32_of_element(k[c], shape->dtype)));
                square += v * v;
            }
            context->values[head] = fmax(context->values[head], sqrt(square));
        }
    context->tokens += tokens;
}

/* Packed, raw and partly filled pages in any order, as sinks, blocks and a tail are. */
static void context_draw(struct context *context, struct bench_pair *pair,
                         const struct check_case *check, struct dice *dice) {
    const struct kv_shape *shape = &check->shape;
    size_t raw_bytes = kv_shape_bytes_raw(shape), packed_bytes = kv_page_bytes(shape);
    memset(context, 0, sizeof *context);
    context->page_count = dice_below(dice, 4) == 0 ? dice_below(dice, PAGES_MAX + 1)
                                                   : dice_below(dice, 4);
    uint16_t *seen = malloc(raw_bytes);
    KV_CHECK(seen != NULL);

    for (uint32_t i = 0; i < context->page_count; i++) {
        struct kv_page_ref *ref = &context->refs[i];
        uint16_t *raw = malloc(raw_bytes);
        KV_CHECK(raw != NULL);
        case_page(check, dice, i, raw);
        ref->raw = dice_below(dice, 3) == 0;
        ref->tokens = ref->raw && dice_bits(dice) & 1 ? (uint16_t)(1 + dice_below(dice, T)) : T;
        if (ref->raw) {
            ref->page = raw;
            context_append(context, shape, raw, ref->tokens);
            continue;
        }
        uint8_t *packed = malloc(packed_bytes);
        KV_CHECK(packed != NULL);
        lab_quantize(&pair->truth, shape, raw, NULL, packed);
        lab_dequantize(&pair->truth, shape, packed, (enum kv_dtype)shape->dtype, seen);
        context_append(context, shape, seen, T);
        ref->page = packed;
        free(raw);
    }
    free(seen);
}

static void context_free(struct context *context) {
    for (uint32_t i = 0; i < context->page_count; i++) free((void *)context->refs[i].page);
}

/* sum_c |q_c| max_t |k_tc|: S of the bound, but for the scale. */
static double score_size(const struct context *context, uint32_t head, uint32_t D,
                         const float *query) {
    double size = 0;
    for (uint32_t c = 0; c < D; c++) size += fabs((double)query[c]) * context->keys[head][c];
    return size;
}

struct question {
    struct kv_attend item;
    float *query; /* as the backends read it, in binary32 */
    void *encoded;
    uint32_t *visible;
    float *out[2];
    float *lse[2];
    float *merged_out; /* what the answer is merged into */
    float *merged_lse;
};

static void query_encode(struct question *question, size_t elements) {
    enum kv_dtype dtype = question->item.dtype;
    for (size_t i = 0; i < elements; i++) {
        if (dtype == KV_DTYPE_F32) {
            ((float *)question->encoded)[i] = question->query[i];
            continue;
        }
        uint16_t element = kv_element_saturated(question->query[i], (uint8_t)dtype);
        ((uint16_t *)question->encoded)[i] = element;
        question->query[i] = kv_f32_of_element(element, (uint8_t)dtype);
    }
}

static void question_draw(struct question *question, const struct context *context,
                          const struct kv_shape *shape, struct dice *dice) {
    static const uint32_t rows[] = {1, 1, 1, 2, 5, 16, 33, 128};
    static const uint32_t groups[] = {1, 2, 4, 4, 7, 8, 16};
    static const enum kv_dtype dtypes[] = {KV_DTYPE_F16, KV_DTYPE_BF16, KV_DTYPE_F32};
    uint32_t group = groups[dice_below(dice, 7)], D = shape->head_dim;
    memset(question, 0, sizeof *question);
    struct kv_attend *item = &question->item;
    item->dtype = dtypes[dice_below(dice, 3)];
    item->heads_q = shape->heads * group;
    item->rows = rows[dice_below(dice, group > 4 ? 6 : 8)];
    item->page_count = context->page_count;
    item->pages = context->refs;
    item->merge = dice_below(dice, 4) == 0;

    size_t vectors = (size_t)item->rows * item->heads_q, elements = vectors * D;
    question->query = malloc(elements * sizeof(float));
    question->encoded = malloc(elements * sizeof(float));
    question->visible = malloc(item->rows * sizeof(uint32_t));
    question->merged_out = malloc(elements * sizeof(float));
    question->merged_lse = malloc(vectors * sizeof(float));
    KV_CHECK(question->query != NULL && question->encoded != NULL && question->visible != NULL);
    KV_CHECK(question->merged_out != NULL && question->merged_lse != NULL);
    for (size_t i = 0; i < elements; i++) {
        question->query[i] = dice_normal(dice);
        question->merged_out[i] = dice_normal(dice);
    }
    for (size_t i = 0; i < vectors; i++)
        question->merged_lse[i] = dice_below(dice, 3) == 0 ? -INFINITY : dice_normal(dice) * 5;
    query_encode(question, elements);

    /* Usually the causal limits of the newest rows, sometimes any, past the end included. */
    bool causal = dice_below(dice, 3) != 0;
    for (uint32_t r = 0; r < item->rows; r++) {
        uint32_t after = item->rows - 1 - r;
        question->visible[r] = causal ? (context->tokens > after ? context->tokens - after : 0)
                                      : dice_below(dice, context->tokens + 20);
    }
    item->query = question->encoded;
    item->visible = question->visible;

    /* Scores between flat and a softmax with one winner, whatever the data's size. */
    double typical = score_size(context, 0, D, question->query);
    static const float spans[] = {1, 10, 40, 40, 200, 2000};
    item->score_scale = typical > 0 ? (float)(spans[dice_below(dice, 6)] / typical) : 0.1f;

    for (int i = 0; i < 2; i++) {
        question->out[i] = malloc(elements * sizeof(float));
        question->lse[i] = malloc(vectors * sizeof(float));
        KV_CHECK(question->out[i] != NULL && question->lse[i] != NULL);
        memcpy(question->out[i], question->merged_out, elements * sizeof(float));
        memcpy(question->lse[i], question->merged_lse, vectors * sizeof(float));
    }
}

static void question_free(struct question *question) {
    free(question->query);
    free(question->encoded);
    free(question->visible);
    free(question->merged_out);
    free(question->merged_lse);
    for (int i = 0; i < 2; i++) {
        free(question->out[i]);
        free(question->lse[i]);
    }
}

static void question_ask(struct question *question, struct lab *lab, const struct kv_shape *shape,
                         int side) {
    struct kv_attend item = question->item;
    item.out = question->out[side];
    item.lse = question->lse[side];
    lab_attend(lab, shape, &item);
}

static double distance(const float *a, const float *b, uint32_t D) {
    double square = 0;
    for (uint32_t c = 0; c < D; c++) square += ((double)a[c] - b[c]) * ((double)a[c] - b[c]);
    return sqrt(square);
}

static bool ordinary(const struct check_case *check) {
    return check->fixture != NULL || check->pattern == PATTERN_NORMAL ||
           check->pattern == PATTERN_BIASED;
}

/* Compares one query vector's results; false: they differ by more than the bound. */
static bool compare_vector(struct bench_pair *pair, const struct check_case *check,
                           const struct context *context, const struct question *question,
                           uint32_t row, uint32_t head_q) {
    const struct kv_shape *shape = &check->shape;
    const struct kv_attend *item = &question->item;
    uint32_t D = shape->head_dim, head = head_q / (item->heads_q / shape->heads);
    size_t vector = (size_t)row * item->heads_q + head_q;
    const float *truth = question->out[0] + vector * D, *tested = question->out[1] + vector * D;
    float lse = question->lse[0][vector], lse_tested = question->lse[1][vector];
    uint32_t visible = question->visible[row];
    if (visible == 0 || context->tokens == 0) {
        bool was = item->merge && question->merged_lse[vector] != -INFINITY;
        for (uint32_t c = 0; c < D; c++)
            if (tested[c] != (was ? question->merged_out[vector * D + c] : 0)) return false;
        return lse_tested == (was ? question->merged_lse[vector] : -INFINITY);
    }

    double score = score_size(context, head, D, question->query + vector * D);
    double value = context->values[head];
    if (item->merge) value = fmax(value, sqrt(D) * 5);
    double S = score * fabs((double)item->score_scale);
    double e = fmin(0x1p-13 * S, 0x1p-9) + 0x1p-18 * S + 0x1p-18;
    double bound_lse = e + fabs((double)lse) * 0x1p-20;
    double bound_out = fmin(2 * e + 0x1p-12, 2) * value + 1e-30;
    double error_out = distance(truth, tested, D), error_lse = fabs((double)lse - lse_tested);
    if (!(error_out <= bound_out) || !(error_lse <= bound_lse)) return false;
    pair->worst_out = fmax(pair->worst_out, error_out / bound_out);
    pair->worst_lse = fmax(pair->worst_lse, error_lse / bound_lse);
    if (ordinary(check))
        for (uint32_t c = 0; c < D; c++) {
            pair->square_error += pow((double)truth[c] - tested[c], 2);
            pair->square_output += (double)truth[c] * truth[c];
        }
    return true;
}

static void compare_answers(struct bench_pair *pair, const struct check_case *check,
                            const struct context *context, const struct question *question) {
    const struct kv_attend *item = &question->item;
    for (uint32_t row = 0; row < item->rows; row++)
        for (uint32_t head = 0; head < item->heads_q; head++) {
            if (compare_vector(pair, check, context, question, row, head)) continue;
            size_t vector = (size_t)row * item->heads_q + head;
            uint32_t D = check->shape.head_dim;
            char what[200];
            snprintf(what, sizeof what,
                     "attend: row %u of %u head %u of %u, %u pages, %u of %u tokens%s: off by %.3g, "
                     "lse %.7g for %.7g",
                     row, item->rows, head, item->heads_q, item->page_count,
                     question->visible[row], context->tokens, item->merge ? ", merged" : "",
                     distance(question->out[0] + vector * D, question->out[1] + vector * D, D),
                     (double)question->lse[1][vector], (double)question->lse[0][vector]);
            case_fail(pair, check, what);
            return; /* one line per question */
        }
}

void check_attend(struct bench_pair *pair, const struct check_case *check) {
    struct dice dice = {check->seed ^ 0x61747465u};
    struct context context;
    struct question question;
    context_draw(&context, pair, check, &dice);
    question_draw(&question, &context, &check->shape, &dice);
    question_ask(&question, &pair->truth, &check->shape, 0);
    question_ask(&question, &pair->tested, &check->shape, 1);
    compare_answers(pair, check, &context, &question);
    question_free(&question);
    context_free(&context);
}
