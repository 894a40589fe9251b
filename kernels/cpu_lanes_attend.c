/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_attend.c - attention on codes, for AMX, AVX-512 and AVX2 (see cpu_lanes.h).
 *
 * Page by page, with a running maximum and sum per query vector (flash attention's):
 *
 *   q.k = sum_c (q_c s_c) code_c + sum_c q_c z_c
 *   out = sum_t (p_t s_t) code_t + sum_t p_t z_t + (sum_t p_t) mean
 *
 * The first sums run on codes as they lie, unsigned bytes, against q s and p s written as
 * two signed bytes each, x = step (256 hi + lo), step = max |x| / 32639 over the page.  The
 * products are exact integers; the rest is binary32.  Scores and maxima are in units of log 2, so that
 * p = 2^(score - maximum) needs no product.
 *
 * Error.  Digits are off by at most half a step, uniformly: step / sqrt(12) rms.  What of it meets
 * the middle code, top / 2, is put back through the zeros, so that only a code's distance from the
 * middle counts.  Values: at most step sqrt(128 var(code) / 12) = 4 steps (2 bits; 15 at 4 bits, of
 * a fifth the size) rms, or 1.1e-4 of the greatest p s of the page; pages average it.  Keys: a score
 * is off by
 *
 *     noise = step sqrt(sum over slots of var(code) / 12),  var(code) <= top (top + 2) / 12
 *
 * rms, which is 3e-4 of the largest |q s| at worst.  That is an absolute error of the score, so
 * a relative one of p: where noise would exceed NOISE_MAX = 2^-13, as it does for peaked softmax,
 * or be large beside the scores themselves, as with one outlying channel, a third digit is
 * multiplied, and it is 256 times less.
 *
 * Work for one page goes in this order, so that codes are unpacked once for any number of
 * query vectors and everything but the page itself stays in the nearest caches:
 *
 *   for each BLOCK of query vectors:
 *   digits of q s (and once: panel of K), scores, softmax, digits of p s (and once: panel of V), output
 *
 * Four vectors go through each step together: what a page gives is loaded once for them, and sums across
 * lanes, which are chains of shuffles, are made for four at a time.  The next page's bytes are asked for
 * a few lines at a time all along the way.
 */
#include "kernels/cpu_lanes_product.h"
#include "kernels/cpu_lanes_raw.h"
#include "kernels/cpu_lanes_terms.h"

#include <math.h>

enum {
    BLOCK       = 64,    /* query vectors at a time: what they need stays in the second cache */
    DIGITS_MAX  = 32639, /* 127 * 256 + 127 */
    VECTORS_MAX = KV_ROWS_MAX * KV_GROUP_HEADS_MAX,
    AHEAD_STEP  = 7, /* lines of the next page asked for beside a step of four vectors */
};

static const float NOISE_MAX       = 0x1p-13f;
static const float NOISE_SHARE_MAX = 0x1p-17f; /* of the size that scores can have */
static const float LOG2_E          = 0x1.715476p+0f;
static const float LN_2            = 0x1.62e430p-1f;

/* Scratch of one call.  Vectors i of a block are i = 0 .. BLOCK - 1. */
struct work {
    uint8_t panel[2][KV_PANEL_BYTES];
    product_sum sums[PRODUCT_TILES];
    float score[BLOCK][T]; /* then p; packed pages: in rows of a key tile (cpu_lanes_terms.h) */
    float scaled[4][KV_HEAD_DIM_MAX]; /* q s or p s of the four vectors at hand */
    int8_t digit[(BLOCK * DIGITS + 16) * KV_HEAD_DIM_MAX];
    int8_t by_channel[DIGITS][KV_HEAD_DIM_MAX];
    struct page_terms terms;
    struct ahead ahead;
    uint32_t bundle, pitch; /* of digits: cpu_lanes_product.h */
    uint32_t rows;          /* of a tile of the keys' panel */
    bool fine[BLOCK];       /* three digits */
    float step[BLOCK], bias[BLOCK], fade[BLOCK], mass[BLOCK];
    float row[16][KV_HEAD_DIM_MAX]; /* raw tokens, widened */
    float maximum[VECTORS_MAX], sum[VECTORS_MAX];
    float coded[VECTORS_MAX * KV_HEAD_DIM_MAX]; /* the part of out that is still rotated */
};
static_assert(sizeof(struct work) <= KV_CPU_SCRATCH, "a worker's scratch");

/* ---- digits ------------------------------------------------------------------------- */

/* Where digit d of vector i of the block begins. */
KV_INLINE int8_t *digit_row(struct work *work, uint32_t i, uint32_t d) {
    uint32_t row = (i / BUNDLE * DIGITS + d) * work->bundle + i % BUNDLE;
    return work->digit + (size_t)row * work->pitch;
}

/* count values (a multiple of 16) to digits in units of step, which is returned; the rest of the last 64 is
 * zero.  `most` is the greatest magnitude; rows: see v_digits(). */
KV_INLINE float digits(const float *x, uint32_t count, float most, bool fine, const int rows,
                       int8_t *hi, int8_t *lo, int8_t *third) {
    float limit = (float)DIGITS_MAX * (fine ? 256.0f : 1.0f);
    float scale = most > 0 ? limit / most : 0;
    if (!(scale < INFINITY)) scale = 0; /* too small for binary32 to invert: as good as zero */
    for (uint32_t i = 0; i < count; i += 64) {
        vi whole[4];
#pragma GCC unroll 4
        for (uint32_t j = 0; j < 4; j++)
            whole[j] = i + 16 * j < count ? v_round_i(v_mul(v_load(x + i + 16 * j), v_set(scale)))
                                          : v_zero_i();
        if (fine) {
            int8_t none[64];
            vi low[4];
#pragma GCC unroll 4
            for (uint32_t j = 0; j < 4; j++) {
                low[j]   = v_and(whole[j], v_set_i(0xff));
                whole[j] = v_sar(v_add_i(whole[j], v_set_i(128)), 8);
            }
            v_digits(low, rows, none, third + i);
        }
        v_digits(whole, rows, hi + i, lo + i);
    }
    return most / limit;
}

/* Digits of q s by slot of one vector, step, and what the digits make of sum q s top / 2, in steps. */
KV_INLINE vf query_slots(struct work *work, uint32_t i, const uint32_t D, bool identity, float most,
                         const float *scaled) {
    const struct page_terms *terms = &work->terms;
    int8_t *to[DIGITS]             = {digit_row(work, i, 0), digit_row(work, i, 1),
                                      digit_row(work, i, 2)};
    bool fine                      = work->fine[i];
    uint32_t count                 = (D + 63) & ~63u;
    if (identity) {
        work->step[i] = digits(scaled, D, most, fine, 0, to[0], to[1], to[2]);
    } else {
        uint32_t tables = D <= 64 ? 1 : D <= 128 ? 2 : 4;
        work->step[i]   = digits(scaled, D, most, fine, 0, work->by_channel[0], work->by_channel[1],
                                 work->by_channel[2]);
        v_permute_bytes(to[0], work->by_channel[0], terms->order, count, tables);
        v_permute_bytes(to[1], work->by_channel[1], terms->order, count, tables);
        if (fine) v_permute_bytes(to[2], work->by_channel[2], terms->order, count, tables);
    }
    vi sum[DIGITS] = {v_zero_i(), v_zero_i(), v_zero_i()};
    for (uint32_t slot = 0; slot < D; slot += 64) {
        vi top = v_load_i(terms->key_top + slot);
        sum[0] = v_dot_8(sum[0], top, v_load_i(to[0] + slot));
        sum[1] = v_dot_8(sum[1], top, v_load_i(to[1] + slot));
        if (fine) sum[2] = v_dot_8(sum[2], top, v_load_i(to[2] + slot));
    }
    vf middle = v_to_f(v_add_i(v_shl(sum[0], 8), sum[1]));
    return fine ? v_fma(middle, v_set(256.0f), v_to_f(sum[2])) : middle;
}

/* q s of some vectors in one key group: digits, step, and the bias of every score of the group, which is
 * sum q (z + s top / 2) less what the digits make of sum q s top / 2. */
KV_INLINE void query_digits(struct work *work, uint32_t group, const uint32_t D, bool identity,
                            const float *query, uint32_t i, const int vectors) {
    const struct page_terms *terms = &work->terms;
    vf greatest[4], total[4], bias[4];
    float most[4], reach[4], sums[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++)
        greatest[b] = total[b] = bias[b] = v_zero();
    for (uint32_t c = 0; c < D; c += 16) {
        vf scale = v_load(terms->key_scale[group] + c), zero = v_load(terms->key_zero[group] + c);
#pragma GCC unroll 4
        for (int b = 0; b < vectors; b++) {
            vf q = v_load(query + (uint32_t)b * D + c), x = v_mul(q, scale), size = v_abs(x);
            v_store(work->scaled[b] + c, x);
            greatest[b] = v_max(greatest[b], size);
            total[b]    = v_add(total[b], size);
            bias[b]     = v_fma(q, zero, bias[b]);
        }
    }
    v_greatest_four(greatest, most);
    v_sum_four(total, reach);
#pragma GCC unroll 4
    for (int b = 0; b < vectors; b++) {
        uint32_t at       = i + (uint32_t)b;
        float noise       = terms->key_noise * most[b] / (float)DIGITS_MAX;
        float share       = NOISE_SHARE_MAX * 0.5f * (float)terms->key_top[0]; /* the widest */
        work->fine[at]    = noise > NOISE_MAX || noise > share * reach[b];
        vf middle         = query_slots(work, at, D, identity, most[b], work->scaled[b]);
        bias[b]           = v_fma(middle, v_set(-0.5f * work->step[at]), bias[b]);
    }
    v_sum_four(bias, sums);
    for (int b = 0; b < vectors; b++) {
        work->bias[i + (uint32_t)b] = sums[b] * LOG2_E;
        work->step[i + (uint32_t)b] *= LOG2_E;
    }
}

/* p s of some vectors in one value group, likewise; the bias is that of every channel of the group. */
KV_INLINE void weight_digits(struct work *work, uint32_t group, int32_t tops, uint32_t i,
                             const int vectors) {
    const struct page_terms *terms = &work->terms;
    vf greatest[4], bias[4];
    float most[4], sums[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++)
        greatest[b] = bias[b] = v_zero();
    for (uint32_t t = 0; t < T; t += 16) {
        vf scale = v_load(terms->value_scale[group] + t), zero = v_load(terms->value_zero[group] + t);
#pragma GCC unroll 4
        for (int b = 0; b < vectors; b++) {
            vf p = v_load(work->score[i + (uint32_t)b] + t), x = v_mul(p, scale);
            v_store(work->scaled[b] + t, x);
            greatest[b] = v_max(greatest[b], x); /* neither p nor a scale is negative */
            bias[b]     = v_fma(p, zero, bias[b]);
        }
    }
    v_greatest_four(greatest, most);
#pragma GCC unroll 4
    for (int b = 0; b < vectors; b++) {
        uint32_t at = i + (uint32_t)b;
        int8_t *hi = digit_row(work, at, 0), *lo = digit_row(work, at, 1);
        work->step[at] = digits(work->scaled[b], T, most[b], false, 1, hi, lo, NULL);
        vi sum[2]      = {v_zero_i(), v_zero_i()};
#pragma GCC unroll 2
        for (uint32_t t = 0; t < T; t += 64) {
            sum[0] = v_dot_8(sum[0], v_set_i(tops), v_load_i(hi + t));
            sum[1] = v_dot_8(sum[1], v_set_i(tops), v_load_i(lo + t));
        }
        vf middle = v_to_f(v_add_i(v_shl(sum[0], 8), sum[1]));
        bias[b]   = v_fma(middle, v_set(-0.5f * work->step[at]), bias[b]);
    }
    v_sum_four(bias, sums);
    memcpy(work->bias + i, sums, (size_t)vectors * sizeof *sums);
}

/* ---- softmax ---------------------------------------------------------------------- */

struct span {
    uint32_t first, count; /* query vectors of the block */
    uint32_t token;        /* the page's first token */
    uint32_t tokens;       /* of the page */
};

/* How many tokens of the page vector i may see. */
KV_INLINE uint32_t span_limit(const struct kv_cpu_attend *task, const struct span *span,
                              uint32_t i) {
    uint32_t visible = task->visible[(span->first + i) / task->group];
    uint32_t seen    = visible > span->token ? visible - span->token : 0;
    return seen < span->tokens ? seen : span->tokens;
}

/* Scores of a page of some tokens, in whole registers; what lies behind them is nobody's. */
KV_INLINE uint32_t span_scores(const struct span *span) {
    return (span->tokens + 15) & ~15u;
}

/* Tokens from the limit on are not seen. */
static void score_limit(float *score, uint32_t scores, uint32_t limit, vi lane_tokens) {
    for (uint32_t t = 0; t < scores; t += 16) {
        vm seen = v_gt_i(v_set_i((int32_t)limit - (int32_t)t), lane_tokens);
        v_store(score + t, v_select(seen, v_load(score + t), v_set(-INFINITY)));
    }
}

/* Scores of some vectors to p = 2^(score - maximum).  fade is what older sums are worth under the new
 * maximum, mass the sum of the new p. */
KV_INLINE void softmax(const struct kv_cpu_attend *task, struct work *work, const struct span *span,
                       vi lane_tokens, uint32_t i, const int vectors) {
    float *maximum = work->maximum + span->first + i, *sum = work->sum + span->first + i;
    float now[16] = {0}, old[16] = {0}, fade[16], mass[4];
    uint32_t scores = span_scores(span);
    vf most[4], total[4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++)
        most[b] = v_set(-INFINITY), total[b] = v_zero();
    for (int b = 0; b < vectors; b++) {
        uint32_t limit = span_limit(task, span, i + (uint32_t)b);
        if (limit < scores) score_limit(work->score[i + (uint32_t)b], scores, limit, lane_tokens);
    }
    for (uint32_t t = 0; t < scores; t += 16)
#pragma GCC unroll 4
        for (int b = 0; b < vectors; b++)
            most[b] = v_max(most[b], v_load(work->score[i + (uint32_t)b] + t));
    v_greatest_four(most, now);
    for (int b = 0; b < vectors; b++) {
        old[b]     = maximum[b];
        now[b]     = now[b] > old[b] ? now[b] : old[b];
        maximum[b] = now[b];
    }
    v_store(fade, v_exp2(v_sub(v_load(old), v_load(now)))); /* of nothing seen so far: 0 */
    for (uint32_t t = 0; t < scores; t += 16)
#pragma GCC unroll 4
        for (int b = 0; b < vectors; b++) {
            float *score = work->score[i + (uint32_t)b] + t;
            vf p         = v_exp2(v_sub(v_load(score), v_set(now[b])));
            v_store(score, p);
            total[b] = v_add(total[b], p);
        }
    v_sum_four(total, mass);
    for (int b = 0; b < vectors; b++) {
        sum[b]                      = sum[b] * fade[b] + mass[b];
        work->fade[i + (uint32_t)b] = fade[b];
        work->mass[i + (uint32_t)b] = mass[b];
    }
}

static void span_softmax(const struct kv_cpu_attend *task, struct work *work,
                         const struct span *span, vi lane_tokens) {
    uint32_t i = 0;
    for (; i + 4 <= span->count; i += 4) {
        softmax(task, work, span, lane_tokens, i, 4);
        ahead_step(&work->ahead, AHEAD_STEP);
    }
    for (; i < span->count; i++)
        softmax(task, work, span, lane_tokens, i, 1);
}

/* ---- packed pages --------------------------------------------------------------------- */

KV_INLINE void span_query_digits_of(const struct kv_cpu_attend *task, struct work *work,
                                    const struct span *span, uint32_t group, const bool identity,
                                    const uint32_t D) {
    const float *query = task->query + (size_t)span->first * D;
    uint32_t i         = 0;
    for (; i + 4 <= span->count; i += 4) {
        query_digits(work, group, D, identity, query + (size_t)i * D, i, 4);
        ahead_step(&work->ahead, AHEAD_STEP);
    }
    for (; i < span->count; i++)
        query_digits(work, group, D, identity, query + (size_t)i * D, i, 1);
}

/* head_dim as a constant where most models have it: loops of a few steps disappear. */
static void span_query_digits(const struct kv_cpu_attend *task, struct work *work,
                              const struct span *span, uint32_t group, bool identity) {
    uint32_t D = task->shape->head_dim;
    if (D == 128 && !identity)
        span_query_digits_of(task, work, span, group, false, 128);
    else
        span_query_digits_of(task, work, span, group, identity, D);
}

static void span_weight_digits(struct work *work, const struct span *span, uint32_t group,
                               int32_t tops) {
    uint32_t i = 0;
    for (; i + 4 <= span->count; i += 4) {
        weight_digits(work, group, tops, i, 4);
        ahead_step(&work->ahead, AHEAD_STEP);
    }
    for (; i < span->count; i++)
        weight_digits(work, group, tops, i, 1);
}

/* The product of up to four tiles with the bundle whose first vector is i; `of` gives panel and rows. */
KV_INLINE void span_product(struct work *work, const struct span *span, struct product *of,
                            uint32_t i) {
    uint32_t left = span->count - i;
    of->vectors   = left < BUNDLE ? left : BUNDLE;
    of->bundle    = work->bundle;
    of->digit     = digit_row(work, i, 0);
    of->pitch     = work->pitch;
    product(of, work->sums);
    ahead_step(&work->ahead, AHEAD_STEP);
}

/* Tiles come in even numbers for every head_dim and group. */
KV_INLINE uint32_t tiles_together(uint32_t left) {
    return left >= 4 ? 4 : 2;
}

/* Sums of a bundle, whose first vector is i, to scores. */
KV_INLINE void scores_store(struct work *work, const struct product *of, uint32_t i, uint32_t tile,
                            const uint32_t tiles, const bool fine) {
    for (uint32_t b = 0; b < of->vectors; b++) {
        /* Two digits beside another vector's three: the same number in finer units. */
        bool finer = fine && !work->fine[i + b];
        vf step    = v_set(finer ? work->step[i + b] / 256 : work->step[i + b]);
        vf bias    = v_set(work->bias[i + b]);
#pragma GCC unroll 4
        for (uint32_t a = 0; a < tiles; a++)
            v_store(work->score[i + b] + 16 * (tile + a),
                    v_fma(product_value(work->sums[a], of->bundle, b, fine), step, bias));
    }
}

/* And to outputs: to[vector][D] at the first tile's channels. */
KV_INLINE void values_add(struct work *work, const struct product *of, uint32_t i, uint32_t tile,
                          const uint32_t tiles, const bool with_mean, float *to, uint32_t D) {
    for (uint32_t b = 0; b < of->vectors; b++, to += D) {
        vf step = v_set(work->step[i + b]), bias = v_set(work->bias[i + b]),
           fade = v_set(work->fade[i + b]), mass = v_set(work->mass[i + b]);
#pragma GCC unroll 4
        for (uint32_t a = 0; a < tiles; a++) {
            vf x = v_fma(product_value(work->sums[a], of->bundle, b, false), step, bias);
            if (with_mean) x = v_fma(mass, v_load(work->terms.mean + 16 * (tile + a)), x);
            v_store(to + 16 * a, v_fma(v_load(to + 16 * a), fade, x));
        }
    }
}

/* Third digits of those vectors of a bundle, whose first one is i, that have two. */
static void third_digits_clear(struct work *work, uint32_t i, uint32_t count, uint32_t D) {
    for (uint32_t b = i; b < count && b < i + BUNDLE; b++)
        if (!work->fine[b]) memset(digit_row(work, b, 2), 0, (D + 63) & ~63u);
}

/* The panel is made by the first block, behind its first digits: these are out of the store buffer by the
 * time the product, which may load them in other pieces than they were stored in, asks for them. */
static void packed_scores(const struct kv_cpu_attend *task, struct work *work,
                          const struct span *span, const uint8_t *record) {
    const struct kv_shape *shape = task->shape;
    bool minmax                  = shape->codec.kind == KV_CODEC_MINMAX;
    uint32_t groups = minmax ? T / shape->codec.group : 1, tiles = 8 / groups;
    for (uint32_t group = 0; group < groups; group++) {
        span_query_digits(task, work, span, group, minmax);
        if (group == 0 && span->first == 0)
            work->rows = panel_keys(shape, task->map, record, &work->ahead, work->panel[0]);
        uint32_t rows = work->rows;
        for (uint32_t i = 0; i < span->count; i += BUNDLE) {
            struct product of = {.rows = rows};
            for (uint32_t b = i; b < span->count && b < i + BUNDLE; b++)
                of.fine |= work->fine[b];
            if (of.fine) third_digits_clear(work, i, span->count, shape->head_dim);
            for (uint32_t tile = group * tiles; tile < (group + 1) * tiles; tile += of.tiles) {
                of.tiles = tiles_together((group + 1) * tiles - tile);
                of.panel = work->panel[0] + tile * rows * KV_PANEL_ROW;
                span_product(work, span, &of, i);
                if (of.fine)
                    scores_store(work, &of, i, tile, of.tiles, true);
                else if (of.tiles == 4)
                    scores_store(work, &of, i, tile, 4, false);
                else
                    scores_store(work, &of, i, tile, 2, false);
            }
        }
    }
}

/* Adds the page's values to out (what is not rotated) and coded (what is; the same memory if nothing is). */
static void packed_values(const struct kv_cpu_attend *task, struct work *work,
                          const struct span *span, const uint8_t *record) {
    const struct kv_shape *shape   = task->shape;
    const struct page_terms *terms = &work->terms;
    uint32_t D                     = shape->head_dim;
    bool minmax = shape->codec.kind == KV_CODEC_MINMAX, rotated = shape->codec.value_rotated;
    bool with_mean = !minmax && !rotated;
    uint32_t groups = minmax ? D / shape->codec.group : 1, tiles = D / 16 / groups;
    /* One block needs one panel at a time: the values' may lie where the keys' is still in the cache. */
    uint8_t *panel = work->panel[task->rows * task->group > BLOCK];
    float *coded = (rotated ? work->coded : task->out) + (size_t)span->first * D;
    int32_t tops = ((1 << shape->codec.value_bits) - 1) * 0x01010101;

    for (uint32_t group = 0; group < groups; group++) {
        span_weight_digits(work, span, group, tops);
        if (group == 0 && span->first == 0)
            panel_values(shape, task->map, record, &work->ahead, panel);
        for (uint32_t i = 0; i < span->count; i += BUNDLE) {
            struct product of = {.rows = T / 4};
            for (uint32_t tile = group * tiles; tile < (group + 1) * tiles; tile += of.tiles) {
                of.tiles = tiles_together((group + 1) * tiles - tile);
                of.panel = panel + tile * of.rows * KV_PANEL_ROW;
                span_product(work, span, &of, i);
                float *to = coded + (size_t)i * D + 16 * tile;
                if (with_mean && of.tiles == 4)
                    values_add(work, &of, i, tile, 4, true, to, D);
                else
                    values_add(work, &of, i, tile, of.tiles, with_mean, to, D);
            }
        }
    }
    for (uint32_t i = 0; rotated && i < span->count; i++) {
        float *to = task->out + (size_t)(span->first + i) * D;
        for (uint32_t c = 0; c < D; c += 16)
            v_store(to + c, v_fma(v_load(to + c), v_set(work->fade[i]),
                                  v_mul(v_set(work->mass[i]), v_load(terms->mean + c))));
    }
}

static void page_packed(const struct kv_cpu_attend *task, struct work *work, const uint8_t *record,
                        uint32_t token) {
    const struct kv_shape *shape = task->shape;
    uint32_t n                   = task->rows * task->group;
    if (shape->codec.kind == KV_CODEC_MINMAX)
        terms_minmax(shape, task->map, record, &work->terms);
    else
        terms_unbiased(shape, task->map, record, &work->terms);
    for (uint32_t i = 0; i < n; i += BLOCK) {
        struct span span = {i, n - i < BLOCK ? n - i : BLOCK, token, T};
        packed_scores(task, work, &span, record);
        span_softmax(task, work, &span, v_row_tokens());
        packed_values(task, work, &span, record);
    }
}

/* ---- raw pages -------------------------------------------------------------------------- */

/* Four vectors and no more: see cpu_lanes_raw.h. */
KV_INLINE void raw_scores_four(struct work *work, const struct span *span, const float *query,
                               const uint16_t *keys, uint32_t D, const enum raw_kind kind) {
    for (uint32_t t = 0; t < span->tokens; t += 4) {
        const void *row[4];
        for (uint32_t j = 0; j < 4; j++)
            row[j] = keys + (t + j < span->tokens ? t + j : span->tokens - 1) * D;
        raw_dot(query, D, row, kind, 4, LOG2_E, work->score[0] + t);
    }
}

static void raw_scores_many(struct work *work, const struct span *span, const float *query,
                            const uint16_t *keys, uint32_t D, int bf16) {
    const void *const row[4] = {work->row[0], work->row[1], work->row[2], work->row[3]};
    for (uint32_t t = 0; t < span->tokens; t += 4) {
        for (uint32_t j = 0; j < 4; j++) {
            /* Rows past the end repeat the last one: their scores are not seen, but are finite. */
            const uint16_t *key = keys + (t + j < span->tokens ? t + j : span->tokens - 1) * D;
            for (uint32_t c = 0; c < D; c += 16)
                v_store(work->row[j] + c, v_load_half(key + c, bf16));
        }
        uint32_t i = 0;
        for (; i + 4 <= span->count; i += 4)
            raw_dot(query + (size_t)i * D, D, row, RAW_WIDE, 4, LOG2_E, work->score[i] + t);
        for (; i < span->count; i++)
            raw_dot(query + (size_t)i * D, D, row, RAW_WIDE, 1, LOG2_E, work->score[i] + t);
    }
}

static void raw_scores(const struct kv_cpu_attend *task, struct work *work, const struct span *span,
                       const uint16_t *keys) {
    uint32_t D         = task->shape->head_dim;
    int bf16           = task->shape->dtype == KV_DTYPE_BF16;
    const float *query = task->query + (size_t)span->first * D;
    if (span->count != 4) raw_scores_many(work, span, query, keys, D, bf16);
    else if (bf16) raw_scores_four(work, span, query, keys, D, RAW_BF16);
    else raw_scores_four(work, span, query, keys, D, RAW_F16);
    for (uint32_t t = (span->tokens + 3) & ~3u; t < span_scores(span); t++)
        for (uint32_t i = 0; i < span->count; i++)
            work->score[i][t] = 0;
}

static void fade_rows(float *rows, uint32_t D, const float *fade, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t c = 0; c < D; c += 16)
            v_store(rows + i * D + c, v_mul(v_load(rows + i * D + c), v_set(fade[i])));
}

KV_INLINE void raw_values_four(struct work *work, const struct span *span, const uint16_t *values,
                               float *out, uint32_t D, const enum raw_kind kind) {
    for (uint32_t c = 0; c < D; c += 64) {
        struct raw_rows rows = {values, D, c, span->tokens};
        raw_add(work->score, rows, kind, out + c, D, 4, 4);
    }
}

static void raw_values_many(struct work *work, const struct span *span, const uint16_t *values,
                            float *out, uint32_t D, int bf16) {
    for (uint32_t t = 0; t < span->tokens; t += 16) {
        uint32_t tokens = span->tokens - t < 16 ? span->tokens - t : 16;
        for (uint32_t j = 0; j < tokens; j++)
            for (uint32_t c = 0; c < D; c += 16)
                v_store(work->row[j] + c, v_load_half(values + (t + j) * D + c, bf16));
        for (uint32_t i = 0, n; i < span->count; i += n) {
            n = span->count - i >= 4 ? 4 : 1;
            float p[4][T]; /* only 16 of a row are used */
            for (uint32_t k = 0; k < n; k++)
                memcpy(p[k], work->score[i + k] + t, 16 * sizeof(float));
            for (uint32_t c = 0; c < D; c += 32) {
                float *to            = out + (size_t)i * D + c;
                struct raw_rows rows = {work->row[0], KV_HEAD_DIM_MAX, c, tokens};
                if (n == 4)
                    raw_add(p, rows, RAW_WIDE, to, D, 2, 4);
                else
                    raw_add(p, rows, RAW_WIDE, to, D, 2, 1);
            }
        }
    }
}

static void raw_values(const struct kv_cpu_attend *task, struct work *work, const struct span *span,
                       const uint16_t *values) {
    uint32_t D = task->shape->head_dim;
    int bf16   = task->shape->dtype == KV_DTYPE_BF16;
    float *out = task->out + (size_t)span->first * D;
    fade_rows(out, D, work->fade, span->count);
    if (task->shape->codec.value_rotated)
        fade_rows(work->coded + (size_t)span->first * D, D, work->fade, span->count);
    if (span->count != 4 || D % 64 != 0) raw_values_many(work, span, values, out, D, bf16);
    else if (bf16) raw_values_four(work, span, values, out, D, RAW_BF16);
    else raw_values_four(work, span, values, out, D, RAW_F16);
}

static void page_raw(const struct kv_cpu_attend *task, struct work *work,
                     const struct kv_page_ref *page, uint32_t token) {
    uint32_t n             = task->rows * task->group;
    size_t plane           = (size_t)T * task->shape->head_dim;
    const uint16_t *keys   = (const uint16_t *)page->page + task->head * plane;
    const uint16_t *values = keys + task->shape->heads * plane;
    for (uint32_t i = 0; i < n; i += BLOCK) {
        struct span span = {i, n - i < BLOCK ? n - i : BLOCK, token, page->tokens};
        raw_scores(task, work, &span, keys);
        span_softmax(task, work, &span, v_lane_tokens());
        raw_values(task, work, &span, values);
    }
}

/* ---- the end -------------------------------------------------------------------------- */

static void finish(const struct kv_cpu_attend *task, struct work *work, uint32_t i) {
    uint32_t D = task->shape->head_dim;
    float *out = task->out + (size_t)i * D, sum = work->sum[i];
    task->lse[i] = sum > 0 ? work->maximum[i] * LN_2 + logf(sum) : -INFINITY;
    if (task->shape->codec.value_rotated) {
        float *coded = work->coded + (size_t)i * D;
        lanes_rotate(coded, D, (float)(1.0 / sqrt((double)(D & (0 - D)))));
        for (uint32_t c = 0; c < D; c += 16)
            v_store(out + c, v_add(v_load(out + c), v_load(coded + c)));
    }
    vf scale = v_set(sum > 0 ? 1.0f / sum : 0.0f);
    for (uint32_t c = 0; c < D; c += 16)
        v_store(out + c, v_mul(v_load(out + c), scale));
}

/* The record of the packed page that follows, if one does; `left` pages are left, this one counted. */
static struct ahead next_record(const struct kv_cpu_attend *task, const struct kv_page_ref *page,
                                uint32_t left) {
    if (left < 2 || page[1].raw) return (struct ahead){0};
    size_t bytes         = task->map->record_bytes;
    const uint8_t *first = (const uint8_t *)page[1].page + task->head * bytes;
    return (struct ahead){first, first + bytes};
}

void KV_LANES_FN(attend)(const struct kv_cpu_attend *task);
void KV_LANES_FN(attend)(const struct kv_cpu_attend *task) {
    struct work *work = task->scratch;
    uint32_t n = task->rows * task->group, D = task->shape->head_dim, most = 0;
    for (uint32_t i = 0; i < n; i++)
        work->maximum[i] = -INFINITY, work->sum[i] = 0;
    for (uint32_t r = 0; r < task->rows; r++)
        most = task->visible[r] > most ? task->visible[r] : most;
    memset(task->out, 0, (size_t)n * D * sizeof(float));
    if (task->shape->codec.value_rotated) memset(work->coded, 0, (size_t)n * D * sizeof(float));
    /* Digits come in 64s: past head_dim they are the zero that stands behind the channels. */
    memset(work->terms.order, D % 64 ? (int)D : 0, sizeof work->terms.order);
    memset(work->terms.key_top, 0, sizeof work->terms.key_top);
    memset(work->terms.mean, 0, sizeof work->terms.mean); /* MINMAX has none */

    work->bundle = n < BUNDLE ? n : BUNDLE;
    work->pitch  = D <= T ? T : KV_HEAD_DIM_MAX;
    bool products = false; /* raw pages do without */
    uint32_t token = task->token;
    for (uint32_t p = 0; p < task->page_count && token < most; p++) {
        const struct kv_page_ref *page = &task->pages[p];
        if (task->cancel && atomic_load_explicit(task->cancel, memory_order_relaxed)) {
            if (products) product_end();
            return;
        }
        if (page->raw || task->shape->codec.kind == KV_CODEC_RAW) {
            page_raw(task, work, page, token);
        } else {
            if (!products) product_begin(work->bundle);
            products = true;
            work->ahead = next_record(task, page, task->page_count - p);
            page_packed(task, work,
                        (const uint8_t *)page->page + (size_t)task->head * task->map->record_bytes,
                        token);
        }
        token += page->tokens;
    }
    if (products) product_end();
    for (uint32_t i = 0; i < n; i++)
        finish(task, work, i);
}
