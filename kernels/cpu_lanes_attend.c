/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_attend.c - attention on codes, for AVX-512 and AVX2 (see cpu_lanes.h).
 *
 * Page by page, with a running maximum and sum per query vector (flash attention's):
 *
 *   q.k = sum_c (q_c s_c) code_c + sum_c q_c z_c
 *   out = sum_t (p_t s_t) code_t + sum_t p_t z_t + (sum_t p_t) mean
 *
 * The first sums run on codes as they lie, unsigned bytes, against q s and p s written as
 * two signed bytes each, x = step (256 hi + lo), step = max |x| / 32639 over the page.  The
 * products are exact integers; the rest is binary32.
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
 *   panel of K; panel of V; then for each BLOCK of up to 64 query vectors:
 *   digits of q s, scores, softmax, digits of p s, output
 */
#include "kernels/cpu_lanes_panel.h"

#include <math.h>

enum {
    BLOCK       = 64,    /* query vectors at a time: scores and digits of a block are 64 KiB */
    DIGITS      = 3,     /* at most, of a query; p has 2 */
    DIGITS_MAX  = 32639, /* 127 * 256 + 127 */
    VECTORS_MAX = KV_ROWS_MAX * KV_GROUP_HEADS_MAX,
    T           = KV_BLOCK_TOKENS,
};

static const float NOISE_MAX       = 0x1p-13f;
static const float NOISE_SHARE_MAX = 0x1p-17f; /* of the size that scores can have */

/* What a page's keys and values multiply with, as floats: filled from a record once per page. */
struct page_terms {
    float key_scale[4][KV_HEAD_DIM_MAX]; /* [key group][channel] */
    float key_zero[4][KV_HEAD_DIM_MAX];  /* z + s top / 2 */
    uint8_t key_top[KV_HEAD_DIM_MAX];    /* by slot: 2^width - 1 */
    uint8_t order[KV_HEAD_DIM_MAX];      /* slot -> channel */
    float key_noise;                     /* noise of a score in steps */
    float value_scale[8][T];             /* [value group][token] */
    float value_zero[8][T];              /* z + s top / 2, as of keys */
    float mean[KV_HEAD_DIM_MAX];
};

/* Scratch of one call.  Vectors i of a block are i = 0 .. BLOCK - 1. */
struct work {
    uint8_t panel[2][KV_PANEL_BYTES];
    struct page_terms terms;
    float score[BLOCK][T];                        /* then p */
    int8_t digit[BLOCK][DIGITS][KV_HEAD_DIM_MAX]; /* the highest first */
    int8_t by_channel[DIGITS][KV_HEAD_DIM_MAX];
    bool fine[BLOCK]; /* three digits */
    float step[BLOCK], bias[BLOCK], fade[BLOCK], mass[BLOCK];
    float row[16][KV_HEAD_DIM_MAX]; /* raw tokens, widened */
    float maximum[VECTORS_MAX], sum[VECTORS_MAX];
    float coded[VECTORS_MAX * KV_HEAD_DIM_MAX]; /* the part of out that is still rotated */
};
static_assert(sizeof(struct work) <= KV_CPU_SCRATCH, "a worker's scratch");

/* ---- dot: panels by digits -------------------------------------------------------- */

/* out[tile][vector]. */
typedef vf dot_out[4][4];
typedef int8_t digit_rows[DIGITS][KV_HEAD_DIM_MAX];

/* Sums of `tiles` tiles and `vectors` query vectors over `rows` rows, in units of a step.  The counts are
 * constants where this is inlined, and the unrolled sums stay in registers. */
KV_INLINE void dot_shape(const uint8_t *panel, uint32_t rows, const digit_rows *digit,
                         const int digits, const int tiles, const int vectors, dot_out out) {
    vi sum[4][4][DIGITS];
#pragma GCC unroll 4
    for (int a = 0; a < tiles; a++)
#pragma GCC unroll 4
        for (int b = 0; b < vectors; b++)
#pragma GCC unroll 3
            for (int d = 0; d < digits; d++)
                sum[a][b][d] = v_zero_i();
    for (uint32_t row = 0; row < rows; row++) {
        vi code[4];
#pragma GCC unroll 4
        for (int a = 0; a < tiles; a++)
            code[a] = v_load_i(panel + (a * rows + row) * KV_PANEL_ROW);
#pragma GCC unroll 4
        for (int b = 0; b < vectors; b++)
#pragma GCC unroll 3
            for (int d = 0; d < digits; d++) {
                int32_t word;
                memcpy(&word, digit[b][d] + 4 * row, 4);
                vi x = v_set_i(word);
#pragma GCC unroll 4
                for (int a = 0; a < tiles; a++)
                    sum[a][b][d] = v_dot_8(sum[a][b][d], code[a], x);
            }
    }
#pragma GCC unroll 4
    for (int a = 0; a < tiles; a++)
#pragma GCC unroll 4
        for (int b = 0; b < vectors; b++) {
            vf x      = v_to_f(v_add_i(v_shl(sum[a][b][0], 8), sum[a][b][1]));
            out[a][b] = digits == 2 ? x : v_fma(x, v_set(256.0f), v_to_f(sum[a][b][digits - 1]));
        }
}

/* tiles 2 or 4; vectors 1 .. 4, with 4 tiles 1 or 2. */
KV_INLINE void dot(const uint8_t *panel, uint32_t rows, const digit_rows *digit, const int digits,
                   uint32_t tiles, uint32_t vectors, dot_out out) {
    if (tiles == 4 && vectors == 1)
        dot_shape(panel, rows, digit, digits, 4, 1, out);
    else if (tiles == 4)
        dot_shape(panel, rows, digit, digits, 4, 2, out);
    else if (vectors == 1)
        dot_shape(panel, rows, digit, digits, 2, 1, out);
    else if (vectors == 2)
        dot_shape(panel, rows, digit, digits, 2, 2, out);
    else if (vectors == 3)
        dot_shape(panel, rows, digit, digits, 2, 3, out);
    else
        dot_shape(panel, rows, digit, digits, 2, 4, out);
}

/* How many tiles to take at once: enough sums in flight to cover the product's latency, few enough for the
 * registers.  Tiles come in even numbers for every head_dim. */
KV_INLINE uint32_t dot_tiles(uint32_t tiles, uint32_t vectors) {
    return vectors <= 2 && tiles >= 4 ? 4 : 2;
}

/* ---- page terms --------------------------------------------------------------------- */

/* Noise of a score in steps: see Error above. */
static float keys_noise(const uint8_t width[KV_QUARTERS], uint32_t D) {
    float variance = 0;
    for (int q = 0; q < KV_QUARTERS; q++) {
        float top = (float)((1u << width[q]) - 1);
        variance += (float)(D / KV_QUARTERS) * top * (top + 2);
    }
    return sqrtf(variance) / 12;
}

static void terms_unbiased(const struct kv_shape *shape, const struct kv_page_map *map,
                           const uint8_t *record, ptrdiff_t ahead, struct page_terms *terms) {
    const struct kv_page_header *header = (const struct kv_page_header *)record;
    uint32_t D                          = shape->head_dim;
    uint8_t width[KV_QUARTERS];
    panel_widths(&shape->codec, record, width);
    uint16_t factors[16] = {header->key_factor, header->value_factor};
    float factor[16];
    v_store(factor, v_div(v_load_f16(factors), v_set(448.0f)));

    uint32_t value_top   = (1u << shape->codec.value_bits) - 1;
    const uint8_t *order = record + map->key_order;
    for (const uint8_t *line = record; line < record + map->key_codes; line += 64)
        _mm_prefetch((const char *)line + ahead, _MM_HINT_T0);
    for (const uint8_t *line = record + map->value_mean; line < record + map->value_codes;
         line += 64)
        _mm_prefetch((const char *)line + ahead, _MM_HINT_T0);
    memcpy(terms->order, order, D);
    for (uint32_t slot = 0; slot < D; slot += 8) {
        uint32_t top = (1u << width[slot / (D / 4)]) - 1;
        memset(terms->key_top + slot, (int)top, 8);
    }
    terms->key_noise = keys_noise(width, D);
    for (uint32_t slot = 0; slot < D; slot += 16) {
        float scale[16], zero[16], top[16];
        v_store(top, v_to_f(v_load_u8(terms->key_top + slot)));
        vf s = v_mul(v_load_e4m3(record + map->key_scale + slot), v_set(factor[0]));
        s    = v_select(v_lt(v_zero(), v_load(top)), s, v_zero());
        vf z = v_load_f16((const uint16_t *)(record + map->key_zero) + slot);
        v_store(scale, s);
        v_store(zero, v_fma(s, v_mul(v_load(top), v_set(0.5f)), z));
        for (uint32_t i = 0; i < 16; i++) {
            uint32_t channel             = order[slot + i] < D ? order[slot + i] : slot + i;
            terms->key_scale[0][channel] = scale[i];
            terms->key_zero[0][channel]  = zero[i];
        }
    }
    for (uint32_t t = 0; t < T; t += 16) {
        vf s  = v_mul(v_load_e4m3(record + map->value_scale + t), v_set(factor[1]));
        vf zq = v_to_f(v_load_i8((const int8_t *)record + map->value_zero + t));
        v_store(terms->value_scale[0] + t, s);
        v_store(terms->value_zero[0] + t,
                v_mul(s, v_fma(zq, v_set(0.25f), v_set(0.5f * (float)value_top))));
    }
    for (uint32_t c = 0; c < D; c += 16)
        v_store(terms->mean + c, v_load_f16((const uint16_t *)(record + map->value_mean) + c));
}

static void terms_minmax(const struct kv_shape *shape, const struct kv_page_map *map,
                         const uint8_t *record, struct page_terms *terms) {
    uint32_t D = shape->head_dim, top = (1u << shape->codec.key_bits) - 1;
    uint32_t value_top = (1u << shape->codec.value_bits) - 1;
    int bf16           = shape->dtype == KV_DTYPE_BF16;
    for (uint32_t c = 0; c < D; c++)
        terms->order[c] = (uint8_t)c;
    memset(terms->key_top, (int)top, D);
    uint8_t width[KV_QUARTERS];
    panel_widths(&shape->codec, record, width);
    terms->key_noise = keys_noise(width, D);
    for (uint32_t group = 0; group < T / shape->codec.group; group++)
        for (uint32_t c = 0; c < D; c += 16) {
            vf s = v_load_half((const uint16_t *)(record + map->key_scale) + group * D + c, bf16);
            vf z = v_load_half((const uint16_t *)(record + map->key_zero) + group * D + c, bf16);
            v_store(terms->key_scale[group] + c, s);
            v_store(terms->key_zero[group] + c, v_fma(s, v_set(0.5f * (float)top), z));
        }
    for (uint32_t group = 0; group < D / shape->codec.group; group++)
        for (uint32_t t = 0; t < T; t += 16) {
            vf s = v_load_half((const uint16_t *)(record + map->value_scale) + group * T + t, bf16);
            vf z = v_load_half((const uint16_t *)(record + map->value_zero) + group * T + t, bf16);
            v_store(terms->value_scale[group] + t, s);
            v_store(terms->value_zero[group] + t, v_fma(s, v_set(0.5f * (float)value_top), z));
        }
}

/* ---- digits ------------------------------------------------------------------------- */

/* count values (a multiple of 16) to digits in units of step, which is returned; the rest of the last 64 is
 * zero.  `most` is the greatest magnitude. */
KV_INLINE float digits(const float *x, uint32_t count, float most, bool fine, digit_rows to) {
    float limit = (float)DIGITS_MAX * (fine ? 256.0f : 1.0f);
    float scale = most > 0 ? limit / most : 0;
    if (!(scale < INFINITY)) scale = 0; /* too small for binary32 to invert: as good as zero */
    for (uint32_t i = 0; i < count; i += 64) {
        vi whole[4];
        for (uint32_t j = 0; j < 4; j++)
            whole[j] = i + 16 * j < count ? v_round_i(v_mul(v_load(x + i + 16 * j), v_set(scale)))
                                          : v_zero_i();
        if (fine) {
            int8_t none[64];
            vi low[4];
            for (uint32_t j = 0; j < 4; j++) {
                low[j]   = v_and(whole[j], v_set_i(0xff));
                whole[j] = v_sar(v_add_i(whole[j], v_set_i(128)), 8);
            }
            v_digits(low, none, to[2] + i);
        } else {
            memset(to[2] + i, 0, 64);
        }
        v_digits(whole, to[0] + i, to[1] + i);
    }
    return most / limit;
}

/* q s of one query vector in one key group: digits by slot, step, and the bias of every score of the group:
 * sum q (z + s top / 2) less what the digits make of sum q s top / 2. */
static void query_digits(const struct page_terms *terms, uint32_t group, uint32_t D, bool identity,
                         const float *query, struct work *work, uint32_t i) {
    float product[KV_HEAD_DIM_MAX];
    vf greatest = v_zero(), total = v_zero(), bias = v_zero();
    for (uint32_t c = 0; c < D; c += 16) {
        vf q = v_load(query + c);
        vf x = v_mul(q, v_load(terms->key_scale[group] + c));
        v_store(product + c, x);
        greatest = v_max(greatest, v_abs(x));
        total    = v_add(total, v_abs(x));
        bias     = v_fma(q, v_load(terms->key_zero[group] + c), bias);
    }
    float most  = v_greatest(greatest);
    float noise = terms->key_noise * most / (float)DIGITS_MAX;
    float reach =
        v_sum(total) * (0.5f * (float)terms->key_top[0]); /* the first quarter is the widest */
    bool fine                       = noise > NOISE_MAX || noise > NOISE_SHARE_MAX * reach;
    work->fine[i]                   = fine;
    int8_t(*digit)[KV_HEAD_DIM_MAX] = work->digit[i];
    if (identity) {
        work->step[i] = digits(product, D, most, fine, digit);
    } else {
        work->step[i]   = digits(product, D, most, fine, work->by_channel);
        uint32_t tables = D <= 64 ? 1 : D <= 128 ? 2 : 4, count = (D + 63) & ~63u;
        for (int d = 0; d < (fine ? 3 : 2); d++)
            v_permute_bytes(digit[d], work->by_channel[d], terms->order, count, tables);
        if (!fine) memset(digit[2], 0, D);
    }
    vi sum[DIGITS] = {v_zero_i(), v_zero_i(), v_zero_i()};
    for (uint32_t slot = 0; slot < D; slot += 64) {
        vi top = v_load_i(terms->key_top + slot);
        for (int d = 0; d < DIGITS; d++)
            sum[d] = v_dot_8(sum[d], top, v_load_i(digit[d] + slot));
    }
    vf middle = v_to_f(v_add_i(v_shl(sum[0], 8), sum[1]));
    if (fine) middle = v_fma(middle, v_set(256.0f), v_to_f(sum[2]));
    work->bias[i] = v_sum(v_fma(middle, v_set(-0.5f * work->step[i]), bias));
}

/* ---- softmax ---------------------------------------------------------------------- */

/* Scores of one vector to p = e^(score - maximum); tokens from `limit` on are not seen.  fade is what older
 * sums are worth under the new maximum, mass the sum of the new p. */
KV_INLINE void softmax(float *score, uint32_t limit, float *maximum, float *sum, float *fade,
                       float *mass) {
    vf most = v_set(-INFINITY);
    for (uint32_t t = 0; t < T; t += 16) {
        vf s = v_load(score + t);
        if (limit < t + 16) {
            s = v_select(v_first(limit > t ? limit - t : 0), s, v_set(-INFINITY));
            v_store(score + t, s);
        }
        most = v_max(most, s);
    }
    float old = *maximum, now = v_greatest(most);
    if (now < old) now = old;
    *fade    = old == now ? 1.0f : old == -INFINITY ? 0.0f : expf(old - now);
    vf total = v_zero();
    for (uint32_t t = 0; t < T; t += 16) {
        vf p = now == -INFINITY ? v_zero() : v_exp(v_sub(v_load(score + t), v_set(now)));
        v_store(score + t, p);
        total = v_add(total, p);
    }
    *mass    = v_sum(total);
    *maximum = now;
    *sum     = *sum * *fade + *mass;
}

/* ---- one page ----------------------------------------------------------------------- */

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

static void span_softmax(const struct kv_cpu_attend *task, struct work *work,
                         const struct span *span) {
    for (uint32_t i = 0; i < span->count; i++)
        softmax(work->score[i], span_limit(task, span, i), &work->maximum[span->first + i],
                &work->sum[span->first + i], &work->fade[i], &work->mass[i]);
}

static void packed_scores(const struct kv_cpu_attend *task, struct work *work,
                          const struct span *span, uint32_t rows) {
    const struct kv_shape *shape = task->shape;
    uint32_t D                   = shape->head_dim;
    bool minmax                  = shape->codec.kind == KV_CODEC_MINMAX;
    uint32_t groups = minmax ? T / shape->codec.group : 1, tiles = 8 / groups;
    for (uint32_t group = 0; group < groups; group++) {
        for (uint32_t i = 0; i < span->count; i++)
            query_digits(&work->terms, group, D, minmax,
                         task->query + (size_t)(span->first + i) * D, work, i);
        for (uint32_t i = 0, n; i < span->count; i += n) {
            n                 = span->count - i < 4 ? span->count - i : 4;
            uint32_t together = dot_tiles(tiles, n);
            bool fine         = false;
            for (uint32_t b = 0; b < n; b++)
                fine |= work->fine[i + b];
            for (uint32_t tile = group * tiles; tile < (group + 1) * tiles; tile += together) {
                dot_out out;
                const uint8_t *panel = work->panel[0] + tile * rows * KV_PANEL_ROW;
                if (fine)
                    dot(panel, rows, work->digit + i, 3, together, n, out);
                else
                    dot(panel, rows, work->digit + i, 2, together, n, out);
                for (uint32_t b = 0; b < n; b++) {
                    /* Two digits beside another vector's three: the same number in finer units. */
                    vf step = v_set(fine && !work->fine[i + b] ? work->step[i + b] / 256
                                                               : work->step[i + b]);
                    for (uint32_t a = 0; a < together; a++)
                        v_store(work->score[i + b] + 16 * (tile + a),
                                v_fma(v_rows_to_tokens(out[a][b]), step, v_set(work->bias[i + b])));
                }
            }
        }
    }
}

/* Adds the page's values to out (what is not rotated) and coded (what is; the same memory if nothing is). */
static void packed_values(const struct kv_cpu_attend *task, struct work *work,
                          const struct span *span, const uint8_t *panel) {
    const struct kv_shape *shape   = task->shape;
    const struct page_terms *terms = &work->terms;
    uint32_t D                     = shape->head_dim;
    bool minmax = shape->codec.kind == KV_CODEC_MINMAX, rotated = shape->codec.value_rotated;
    uint32_t groups = minmax ? D / shape->codec.group : 1, tiles = D / 16 / groups;
    float *coded = rotated ? work->coded : task->out;
    int32_t tops = ((1 << shape->codec.value_bits) - 1) * 0x01010101;

    for (uint32_t group = 0; group < groups; group++) {
        for (uint32_t i = 0; i < span->count; i++) {
            float product[T];
            vf greatest = v_zero(), zero = v_zero();
            for (uint32_t t = 0; t < T; t += 16) {
                vf p = v_load(work->score[i] + t);
                vf x = v_mul(p, v_load(terms->value_scale[group] + t));
                v_store(product + t, x);
                greatest = v_max(greatest, v_abs(x));
                zero     = v_fma(p, v_load(terms->value_zero[group] + t), zero);
            }
            work->step[i] = digits(product, T, v_greatest(greatest), false, work->digit[i]);
            vi sum[2]     = {v_zero_i(), v_zero_i()};
            for (uint32_t t = 0; t < T; t += 64)
                for (int d = 0; d < 2; d++)
                    sum[d] = v_dot_8(sum[d], v_set_i(tops), v_load_i(work->digit[i][d] + t));
            vf middle     = v_to_f(v_add_i(v_shl(sum[0], 8), sum[1]));
            work->bias[i] = v_sum(v_fma(middle, v_set(-0.5f * work->step[i]), zero));
        }
        for (uint32_t i = 0, n; i < span->count; i += n) {
            n = span->count - i < 4 ? span->count - i : 4;
            for (uint32_t tile = group * tiles, together; tile < (group + 1) * tiles;
                 tile += together) {
                together = dot_tiles((group + 1) * tiles - tile, n);
                dot_out out;
                dot(panel + tile * 32 * KV_PANEL_ROW, 32, work->digit + i, 2, together, n, out);
                for (uint32_t b = 0; b < n; b++) {
                    float *to = coded + (size_t)(span->first + i + b) * D;
                    vf step = v_set(work->step[i + b]), bias = v_set(work->bias[i + b]),
                       fade = v_set(work->fade[i + b]);
                    vf mass = v_set(minmax || rotated ? 0.0f : work->mass[i + b]);
                    for (uint32_t a = 0; a < together; a++) {
                        uint32_t c = 16 * (tile + a);
                        vf x       = v_fma(out[a][b], step, bias);
                        x          = v_fma(mass, v_load(terms->mean + c), x);
                        v_store(to + c, v_fma(v_load(to + c), fade, x));
                    }
                }
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

/* Raw pages: the elements are widened once, a few tokens at a time, and then met by every vector of the
 * block: four tokens by four vectors, or four pieces of output by four vectors, are sixteen sums in flight. */
KV_INLINE void raw_dot(const float *query, uint32_t D, const float (*row)[KV_HEAD_DIM_MAX],
                       const int vectors, float (*score)[T]) {
    vf sum[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            sum[i][j] = v_zero();
    for (uint32_t c = 0; c < D; c += 16) {
        vf key[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
            key[j] = v_load(row[j] + c);
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            vf q = v_load(query + (uint32_t)i * D + c);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sum[i][j] = v_fma(q, key[j], sum[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++)
        v_sum_four(sum[i], score[i]);
}

static void raw_scores(const struct kv_cpu_attend *task, struct work *work, const struct span *span,
                       const uint16_t *keys) {
    uint32_t D = task->shape->head_dim;
    int bf16   = task->shape->dtype == KV_DTYPE_BF16;
    for (uint32_t t = 0; t < span->tokens; t += 4) {
        for (uint32_t j = 0; j < 4; j++) {
            /* Rows past the end repeat the last one: their scores are not seen, but are finite. */
            const uint16_t *key = keys + (t + j < span->tokens ? t + j : span->tokens - 1) * D;
            for (uint32_t c = 0; c < D; c += 16)
                v_store(work->row[j] + c, v_load_half(key + c, bf16));
        }
        const float(*row)[KV_HEAD_DIM_MAX] = (const float(*)[KV_HEAD_DIM_MAX])work->row;
        const float *query                 = task->query + (size_t)span->first * D;
        uint32_t i                         = 0;
        for (; i + 4 <= span->count; i += 4) {
            float score[4][T];
            raw_dot(query + (size_t)i * D, D, row, 4, score);
            for (uint32_t k = 0; k < 4; k++)
                memcpy(work->score[i + k] + t, score[k], 16);
        }
        for (; i < span->count; i++) {
            float score[1][T];
            raw_dot(query + (size_t)i * D, D, row, 1, score);
            memcpy(work->score[i] + t, score[0], 16);
        }
    }
    for (uint32_t t = (span->tokens + 3) & ~3u; t < T; t++)
        for (uint32_t i = 0; i < span->count; i++)
            work->score[i][t] = 0;
}

/* Adds p times `tokens` widened rows to a piece of `pieces` x 16 channels of some vectors' outputs. */
KV_INLINE void raw_add(float (*p)[T], uint32_t tokens, const float *row, float *out, uint32_t D,
                       const int pieces, const int vectors) {
    vf sum[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++)
#pragma GCC unroll 4
        for (int j = 0; j < pieces; j++)
            sum[i][j] = v_load(out + (uint32_t)i * D + 16 * j);
    for (uint32_t t = 0; t < tokens; t++) {
        vf value[4];
#pragma GCC unroll 4
        for (int j = 0; j < pieces; j++)
            value[j] = v_load(row + t * KV_HEAD_DIM_MAX + 16 * j);
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            vf weight = v_set(p[i][t]);
#pragma GCC unroll 4
            for (int j = 0; j < pieces; j++)
                sum[i][j] = v_fma(weight, value[j], sum[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++)
#pragma GCC unroll 4
        for (int j = 0; j < pieces; j++)
            v_store(out + (uint32_t)i * D + 16 * j, sum[i][j]);
}

static void fade_rows(float *rows, uint32_t D, const float *fade, uint32_t count) {
    for (uint32_t i = 0; i < count; i++)
        for (uint32_t c = 0; c < D; c += 16)
            v_store(rows + i * D + c, v_mul(v_load(rows + i * D + c), v_set(fade[i])));
}

static void raw_values(const struct kv_cpu_attend *task, struct work *work, const struct span *span,
                       const uint16_t *values) {
    uint32_t D = task->shape->head_dim;
    int bf16   = task->shape->dtype == KV_DTYPE_BF16;
    float *out = task->out + (size_t)span->first * D;
    fade_rows(out, D, work->fade, span->count);
    if (task->shape->codec.value_rotated)
        fade_rows(work->coded + (size_t)span->first * D, D, work->fade, span->count);
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
                float *to = out + (size_t)i * D + c;
                if (n == 4)
                    raw_add(p, tokens, work->row[0] + c, to, D, 2, 4);
                else
                    raw_add(p, tokens, work->row[0] + c, to, D, 2, 1);
            }
        }
    }
}

static void page_packed(const struct kv_cpu_attend *task, struct work *work, const uint8_t *record,
                        ptrdiff_t ahead, uint32_t token) {
    const struct kv_shape *shape = task->shape;
    uint32_t n                   = task->rows * task->group;
    if (shape->codec.kind == KV_CODEC_MINMAX)
        terms_minmax(shape, task->map, record, &work->terms);
    else
        terms_unbiased(shape, task->map, record, ahead, &work->terms);
    uint32_t rows = panel_keys(shape, task->map, record, ahead, work->panel[0]);
    if (n > BLOCK) panel_values(shape, task->map, record, ahead, work->panel[1]);

    for (uint32_t i = 0; i < n; i += BLOCK) {
        struct span span = {i, n - i < BLOCK ? n - i : BLOCK, token, T};
        packed_scores(task, work, &span, rows);
        span_softmax(task, work, &span);
        /* One block needs one panel at a time: the values' may lie where the keys' is still in the cache. */
        if (n <= BLOCK) panel_values(shape, task->map, record, ahead, work->panel[0]);
        packed_values(task, work, &span, work->panel[n > BLOCK]);
    }
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
        span_softmax(task, work, &span);
        raw_values(task, work, &span, values);
    }
}

/* ---- the end -------------------------------------------------------------------------- */

static void finish(const struct kv_cpu_attend *task, struct work *work, uint32_t i) {
    uint32_t D = task->shape->head_dim;
    float *out = task->out + (size_t)i * D, sum = work->sum[i];
    task->lse[i] = sum > 0 ? work->maximum[i] + logf(sum) : -INFINITY;
    if (task->shape->codec.value_rotated) {
        float *coded = work->coded + (size_t)i * D;
        lanes_rotate(coded, D, (float)(1.0 / sqrt((double)(D & (0 - D)))));
        for (uint32_t c = 0; c < D; c++)
            out[c] += coded[c];
    }
    float scale = sum > 0 ? 1.0f / sum : 0.0f;
    for (uint32_t c = 0; c < D; c++)
        out[c] *= scale;
}

/* From a packed page to the one that follows it, or 0. */
static ptrdiff_t next_page(const struct kv_page_ref *page, uint32_t left) {
    return left > 1 && !page[1].raw ? (const uint8_t *)page[1].page - (const uint8_t *)page[0].page
                                    : 0;
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
    /* Digits come in 64s: past head_dim they meet codes of 0 and a top of 0. */
    memset(work->terms.order, 0, sizeof work->terms.order);
    memset(work->terms.key_top, 0, sizeof work->terms.key_top);
    memset(work->terms.mean, 0, sizeof work->terms.mean); /* MINMAX has none */

    uint32_t token = task->token;
    for (uint32_t p = 0; p < task->page_count && token < most; p++) {
        const struct kv_page_ref *page = &task->pages[p];
        if (task->cancel && atomic_load_explicit(task->cancel, memory_order_relaxed)) return;
        if (page->raw || task->shape->codec.kind == KV_CODEC_RAW)
            page_raw(task, work, page, token);
        else
            page_packed(task, work,
                        (const uint8_t *)page->page + (size_t)task->head * task->map->record_bytes,
                        next_page(page, task->page_count - p), token);
        token += page->tokens;
    }
    for (uint32_t i = 0; i < n; i++)
        finish(task, work, i);
}
