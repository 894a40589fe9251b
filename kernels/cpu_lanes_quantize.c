/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_quantize.c - 16-bit elements to codes, for AVX-512 and AVX2 (see cpu_lanes.h).
 *
 * A lane is a group: sixteen channels of K, or sixteen tokens of V, are searched side by side, and no
 * sum ever crosses lanes.  V is turned first, so that one routine serves both:
 *
 *     x[n][16] binary32  --fix-->  pair[n / 2][16]  --choose-->  best range per lane  --code-->  bytes
 *
 * A pair is two consecutive elements' u of one lane, each times 16, in the halves of a 32-bit lane: what
 * the 16-bit multiply-adds take.
 *
 * The search is exact in 16-bit integers.  rint((u - A) m) of page.h is
 *
 *     X    = (16 max(u - A, 0) * M) >> 16,   M = m 2^(f + 12), an integer because m is a binary16
 *     code = min((X + 2^(f - 1)) >> f, top), f = 12 for 2 bits and 10 for 4
 *
 * X is the product cut off f bits below the point.  Rounding half up on it differs from rounding half to
 * even on the product only where the product lies exactly on a half; no m of the tables reaches one for
 * any u in 0 .. 2047 (tests/kernel_check compares all of them).
 *
 * Everything that is not a search is page.h's binary32, operation by operation.
 */
#include "kernels/cpu_lanes.h"
#include "kernels/cpu_lanes_words.h"
#include "kernels/half.h"

#include <math.h>

enum { T = KV_BLOCK_TOKENS, D_MAX = KV_HEAD_DIM_MAX, N_MAX = 256, WIDTH_MAX = 4 };

/* Groups as the header's "Group" leaves them, by lane. */
struct fixed {
    float low[16], unit[16], mean[16], power[16];
    int32_t sum[16]; /* SU; power 0 means a constant group */
};

/* What the search chose at one width, by lane. */
struct choice {
    int32_t sum[16]; /* SC */
    float scale[16], error[16];
    int32_t
        offset[16]; /* 16 A, or 16 times the mean's floor at width 1; in both halves of the lane */
    int32_t multiplier[16]; /* M, alike */
};

struct work {
    float x[N_MAX][16];
    vi pair[D_MAX / 16]
           [T / 2]; /* K: [16 channels][token pair], then by slot; V uses the first D / 2 */
    vi by_slot[T / 2];
    float row[16][D_MAX];
    uint8_t code[D_MAX][D_MAX]; /* K [token][slot], V [channel][token] */
    float mean[D_MAX], unit[D_MAX], power[D_MAX];
    int32_t sum[D_MAX];
    float importance[D_MAX], error[WIDTH_MAX + 1][D_MAX];
    struct choice choice[WIDTH_MAX + 1][D_MAX / 16]; /* by slot */
};
static_assert(sizeof(struct work) <= KV_CPU_SCRATCH, "a worker's scratch");

/* ---- the group rule ------------------------------------------------------------------ */

/* x[n][16] to pairs. */
static void fix(const float (*x)[16], uint32_t n, vi *pair, struct fixed *fixed) {
    vf low = v_load(x[0]), high = low;
    for (uint32_t i = 1; i < n; i++) {
        low  = v_min(low, v_load(x[i]));
        high = v_max(high, v_load(x[i]));
    }
    low          = v_add(low, v_zero()); /* a minimum of -0 is +0 */
    vf span      = v_sub(high, low);
    vm constant  = v_le(span, v_set(1e-8f));
    vf units_per = v_select(constant, v_zero(), v_div(v_set((float)KV_UNITS), span));
    vi sum = v_zero_i(), squares = v_zero_i(), one = v_set_i(0x00010001);
    for (uint32_t i = 0; i < n; i += 2) {
        vi a    = v_round_i(v_mul(v_sub(v_load(x[i]), low), units_per));
        vi b    = v_round_i(v_mul(v_sub(v_load(x[i + 1]), low), units_per));
        vi u    = v_or(a, v_shl(b, 16));
        sum     = v_dot_16(sum, u, one);
        squares = v_dot_16(squares, u, u);
        v_store_i(&pair[i / 2], v_shl(u, 4));
    }
    int32_t square[16];
    v_store_i(fixed->sum, sum);
    v_store_i(square, squares);
    for (int lane = 0; lane < 16; lane++)
        fixed->power[lane] =
            (float)((int64_t)n * square[lane] - (int64_t)fixed->sum[lane] * fixed->sum[lane]);
    vf unit = v_select(constant, v_zero(), v_div(span, v_set((float)KV_UNITS)));
    v_store(fixed->unit, unit);
    v_store(fixed->mean, v_add(low, v_mul(v_div(v_to_f(sum), v_set((float)n)), unit)));
}

/* The three sums that judge a candidate, X and Q in `judge`. */
struct sums {
    vi code, square, product;
};

KV_INLINE void sums_add(struct sums *sums, vi code, vi u) {
    sums->code    = v_dot_16(sums->code, code, v_set_i(0x00010001));
    sums->square  = v_dot_16(sums->square, code, code);
    sums->product = v_dot_16(sums->product, code, u);
}

/* The best candidate so far, by lane. */
struct best {
    vf merit, covariance;
    vi sum, offset, multiplier;
};

KV_INLINE void judge(struct best *best, const struct sums *sums, vi su, uint32_t n, vi offset,
                     vi multiplier) {
    vi count         = v_set_i((int32_t)n);
    vi covariance    = v_sub_i(v_mul_i(count, v_shr(sums->product, 4)), v_mul_i(sums->code, su));
    vi variance      = v_sub_i(v_mul_i(count, sums->square), v_mul_i(sums->code, sums->code));
    vf x             = v_to_f(covariance);
    vf merit         = v_div(v_mul(x, x), v_to_f(variance));
    vm candidate     = v_both(v_gt_i(variance, v_zero_i()), v_gt_i(covariance, v_zero_i()));
    vm better        = v_both(candidate, v_lt(best->merit, merit));
    best->merit      = v_select(better, merit, best->merit);
    best->covariance = v_select(better, x, best->covariance);
    best->sum        = v_select_i(better, sums->code, best->sum);
    best->offset     = v_select_i(better, offset, best->offset);
    best->multiplier = v_select_i(better, multiplier, best->multiplier);
}

KV_INLINE vi code_range(vi u, vi offset, vi multiplier, const uint32_t width) {
    vi x = v_mulhi_u16(v_subs_u16(u, offset), multiplier);
    return v_min_u16(v_mulhrs_16(x, v_set_i(width == 2 ? 0x00080008 : 0x00200020)),
                     v_set_i(width == 2 ? 0x00030003 : 0x000f000f));
}

KV_INLINE vi code_above_mean(vi u, vi floor_mean) {
    return v_min_u16(v_subs_u16(u, floor_mean), v_set_i(0x00010001));
}

/* Both halves of a 32-bit lane. */
KV_INLINE int32_t twice(uint32_t x) {
    return (int32_t)(x | x << 16);
}

KV_INLINE int32_t range_multiplier(const uint32_t width, uint32_t a, uint32_t b) {
    return twice(
        (uint32_t)(kv_f32_of_f16(width == 2 ? kv_range_step2[a][b] : kv_range_step4[a][b]) *
                   (width == 2 ? 0x1p24f : 0x1p22f)));
}

/* Candidates that share A share the first subtraction: four at a time, twelve sums in flight. */
KV_INLINE void choose_range(const vi *pair, uint32_t n, vi su, const uint32_t width,
                            struct best *best) {
    for (uint32_t a = 0; a < KV_RANGES; a++) {
        vi offset = v_set_i(twice(16u * kv_range_offset[a])), multiplier[KV_RANGES];
        struct sums sums[KV_RANGES];
        for (uint32_t b = 0; b < KV_RANGES; b++) {
            multiplier[b] = v_set_i(range_multiplier(width, a, b));
            sums[b]       = (struct sums){v_zero_i(), v_zero_i(), v_zero_i()};
        }
#pragma GCC unroll 1
        for (uint32_t first = 0; first < KV_RANGES; first += KV_LANES_RANGES) {
            for (uint32_t i = 0; i < n / 2; i++) {
                vi u = v_load_i(&pair[i]);
#pragma GCC unroll 4
                for (uint32_t b = 0; b < KV_LANES_RANGES; b++)
                    sums_add(&sums[first + b], code_range(u, offset, multiplier[first + b], width),
                             u);
            }
        }
        for (uint32_t b = 0; b < KV_RANGES; b++)
            judge(best, &sums[b], su, n, offset, multiplier[b]);
    }
}

/* The group rule for sixteen groups at one width. */
static void choose(const vi *pair, uint32_t n, const int32_t *su, const float *power,
                   const float *unit, uint32_t width, struct choice *choice) {
    struct best best = {v_zero(), v_zero(), v_zero_i(), v_zero_i(), v_zero_i()};
    vi sum           = v_load_i(su);
    if (width == 4) {
        choose_range(pair, n, sum, 4, &best);
    } else if (width == 2) {
        choose_range(pair, n, sum, 2, &best);
    } else {
        int32_t floor_mean[16];
        for (int lane = 0; lane < 16; lane++)
            floor_mean[lane] = twice(16u * ((uint32_t)su[lane] / n));
        struct sums sums = {v_zero_i(), v_zero_i(), v_zero_i()};
        for (uint32_t i = 0; i < n / 2; i++) {
            vi u = v_load_i(&pair[i]);
            sums_add(&sums, code_above_mean(u, v_load_i(floor_mean)), u);
        }
        judge(&best, &sums, sum, n, v_load_i(floor_mean), v_zero_i());
    }
    vf p        = v_load(power);
    vm constant = v_eq(p, v_zero());
    v_store_i(choice->sum, best.sum);
    v_store_i(choice->offset,
              v_select_i(constant, v_set_i(-1), best.offset)); /* above every u: codes 0 */
    v_store_i(choice->multiplier, best.multiplier);
    v_store(choice->scale,
            v_select(constant, v_zero(), v_mul(v_div(p, best.covariance), v_load(unit))));
    v_store(choice->error,
            v_select(constant, v_zero(), v_mul(p, v_sub(v_div(p, best.merit), v_set(1.0f)))));
}

KV_INLINE vi code(vi u, const struct choice *choice, uint32_t width) {
    vi offset = v_load_i(choice->offset), multiplier = v_load_i(choice->multiplier);
    if (width == 1) return code_above_mean(u, offset);
    return width == 2 ? code_range(u, offset, multiplier, 2) : code_range(u, offset, multiplier, 4);
}

/* Stores one kind of scales as e4m3 under the page's factor, and leaves in scale[] what the reader has. */
static uint16_t store_scales(float *scale, uint32_t count, uint8_t *stored) {
    float largest = 0;
    for (uint32_t i = 0; i < count; i++)
        largest = scale[i] > largest ? scale[i] : largest;
    uint16_t factor = kv_f16_saturated(largest);
    float step      = kv_f32_of_f16(factor) / 448.0f;
    for (uint32_t i = 0; i < count; i++) {
        stored[i] = factor == 0 ? 0 : kv_e4m3_saturated(scale[i] / step);
        scale[i]  = kv_f32_of_e4m3(stored[i]) * step;
    }
    return factor;
}

/* ---- UNBIASED keys -------------------------------------------------------------------- */

static void fix_channels(const struct kv_shape *shape, const uint16_t *keys, struct work *work) {
    uint32_t D = shape->head_dim;
    int bf16   = shape->dtype == KV_DTYPE_BF16;
    for (uint32_t c = 0; c < D; c += 16) {
        struct fixed fixed;
        for (uint32_t t = 0; t < T; t++)
            v_store(work->x[t], v_load_half(keys + t * D + c, bf16));
        fix((const float(*)[16])work->x, T, work->pair[c / 16], &fixed);
        memcpy(work->mean + c, fixed.mean, sizeof fixed.mean);
        memcpy(work->unit + c, fixed.unit, sizeof fixed.unit);
        memcpy(work->power + c, fixed.power, sizeof fixed.power);
        memcpy(work->sum + c, fixed.sum, sizeof fixed.sum);
    }
}

/* A channel's slot is how many go before it: those of greater importance, and equal ones of lower number. */
static void order_slots(const float *importance, uint32_t D, uint8_t *order) {
    int32_t before[D_MAX] = {0};
    for (uint32_t other = 0; other < D; other++) {
        vf theirs = v_set(importance[other]);
        for (uint32_t c = 0; c < D; c += 16) {
            vf ours  = v_load(importance + c);
            vm less  = v_lt(ours, theirs);
            vm tie   = v_eq(ours, theirs);
            vm ahead = other < c         ? tie
                       : other >= c + 15 ? v_first(0)
                                         : v_both(tie, v_later(other - c));
            v_store_i(before + c,
                      v_add_i(v_load_i(before + c),
                              v_select_i(v_either(less, ahead), v_set_i(1), v_zero_i())));
        }
    }
    for (uint32_t c = 0; c < D; c++)
        order[before[c]] = (uint8_t)c;
}

/* Whether some mix gives width w to a slot of first .. first + 15. */
static bool width_needed(const struct kv_codec *codec, uint32_t D, uint32_t first, uint32_t w) {
    for (uint32_t i = 0; i < codec->mix_count; i++)
        for (uint32_t q = first / (D / 4); q <= (first + 15) / (D / 4); q++)
            if (codec->mixes[i][q] == w) return true;
    return false;
}

/* Pairs of sixteen slots, gathered from where their channels are. */
static void gather_slots(const struct work *work, const uint8_t *order, uint32_t slot, vi *to) {
    vi channel = v_load_u8(order + slot);
    /* pair[c / 16][row] lane c % 16, in words */
    vi at = v_add_i(v_mul_i(v_shr(channel, 4), v_set_i(T / 2 * 16)), v_and(channel, v_set_i(15)));
    for (uint32_t row = 0; row < T / 2; row++)
        v_store_i(&to[row], v_gather((const int32_t *)work->pair + 16 * row, at));
}

static uint32_t choose_mix(const struct kv_codec *codec, uint32_t D, const struct work *work) {
    float cost[KV_MIX_COUNT_MAX] = {0};
    for (uint32_t slot = 0; slot < D; slot++)
        for (uint32_t i = 0; i < codec->mix_count; i++)
            cost[i] += work->error[codec->mixes[i][slot / (D / 4)]][slot];
    uint32_t best = 0;
    for (uint32_t i = 1; i < codec->mix_count; i++)
        if (cost[i] < cost[best]) best = i;
    return best;
}

/* Codes of sixteen slots at a width: rows of slots. */
static void code_slots(const vi *pair, const struct choice *choice, uint32_t width, uint8_t *to) {
    for (uint32_t row = 0; row < T / 2; row++) {
        vi both = code(v_load_i(&pair[row]), choice, width);
        v_store_u8(to + 2 * row * D_MAX, v_and(both, v_set_i(0xff)));
        v_store_u8(to + (2 * row + 1) * D_MAX, v_shr(both, 16));
    }
}

static void quantize_keys(const struct kv_shape *shape, const struct kv_page_map *map,
                          const uint16_t *keys, const float *energy, uint8_t *record,
                          struct work *work) {
    const struct kv_codec *codec = &shape->codec;
    uint32_t D = shape->head_dim, quarter = D / 4;
    fix_channels(shape, keys, work);
    float weight[D_MAX];
    for (uint32_t c = 0; c < D; c++) {
        weight[c]           = (work->unit[c] * work->unit[c]) * (energy ? energy[c] : 1.0f);
        work->importance[c] = work->power[c] * weight[c];
    }
    uint8_t *order = record + map->key_order;
    order_slots(work->importance, D, order);

    float scale[D_MAX];
    for (uint32_t slot = 0; slot < D; slot += 16) {
        float power[16], unit[16];
        int32_t sum[16];
        for (uint32_t i = 0; i < 16; i++) {
            uint32_t c = order[slot + i];
            power[i] = work->power[c], unit[i] = work->unit[c], sum[i] = work->sum[c];
            work->error[0][slot + i] = work->importance[c];
        }
        gather_slots(work, order, slot, work->by_slot);
        for (uint32_t w = 1; w <= WIDTH_MAX; w *= 2) {
            if (!width_needed(codec, D, slot, w)) continue;
            struct choice *choice = &work->choice[w][slot / 16];
            choose(work->by_slot, T, sum, power, unit, w, choice);
            for (uint32_t i = 0; i < 16; i++)
                work->error[w][slot + i] = choice->error[i] * weight[order[slot + i]];
        }
    }
    uint32_t mix          = choose_mix(codec, D, work);
    const uint8_t *widths = codec->mixes[mix];

    for (uint32_t slot = 0; slot < D; slot++) {
        uint32_t w  = widths[slot / quarter];
        scale[slot] = w == 0 ? 0 : work->choice[w][slot / 16].scale[slot % 16];
    }
    uint16_t factor = store_scales(scale, D, record + map->key_scale);
    for (uint32_t slot = 0; slot < D; slot++) {
        uint32_t w = widths[slot / quarter];
        float zero = work->mean[order[slot]];
        if (w != 0)
            zero -= scale[slot] * ((float)work->choice[w][slot / 16].sum[slot % 16] / (float)T);
        uint16_t half = kv_f16_saturated(zero);
        memcpy(record + map->key_zero + 2 * slot, &half, sizeof half);
    }
    /* Sixteen slots may lie in two quarters (D = 96): the second one's codes then overwrite the
     * first one's beyond the border. */
    for (uint32_t slot = 0; slot < D; slot += 16) {
        uint32_t first = widths[slot / quarter], last = widths[(slot + 15) / quarter];
        if (first == 0) break;
        gather_slots(work, order, slot, work->by_slot);
        code_slots(work->by_slot, &work->choice[first][slot / 16], first, work->code[0] + slot);
        if (last == first || last == 0) continue;
        uint8_t second[T][D_MAX];
        uint32_t border = (slot + 15) / quarter * quarter;
        code_slots(work->by_slot, &work->choice[last][slot / 16], last, second[0]);
        for (uint32_t t = 0; t < T; t++)
            memcpy(work->code[t] + border, second[t] + (border - slot), slot + 16 - border);
    }
    words_keys(widths, D, work->code[0], D_MAX, record + map->key_codes);
    struct kv_page_header header = {.mix = (uint8_t)mix, .key_factor = factor};
    memcpy(record, &header, sizeof header);
}

/* ---- UNBIASED values ---------------------------------------------------------------------- */

/* page.h's eight partial sums. */
static void mean_over_tokens(const struct kv_shape *shape, const uint16_t *values, uint8_t *stored,
                             float *mean) {
    uint32_t D = shape->head_dim;
    int bf16   = shape->dtype == KV_DTYPE_BF16;
    for (uint32_t c = 0; c < D; c += 16) {
        vf part[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
            part[j] = v_zero();
        for (uint32_t t = 0; t < T; t += 8)
#pragma GCC unroll 8
            for (uint32_t j = 0; j < 8; j++)
                part[j] = v_add(part[j], v_load_half(values + (t + j) * D + c, bf16));
        vf sum = v_add(v_add(v_add(part[0], part[1]), v_add(part[2], part[3])),
                       v_add(v_add(part[4], part[5]), v_add(part[6], part[7])));
        uint16_t half[16];
        v_store_half(half, v_div(sum, v_set((float)T)), 0);
        memcpy(stored + 2 * c, half, sizeof half);
        v_store(mean + c, v_load_f16(half));
    }
}

/* work->row[16 tokens][D] to work->x[D][16 tokens]. */
static void turn_rows(struct work *work, uint32_t D) {
    for (uint32_t c = 0; c < D; c += 16) {
        vf x[16];
#pragma GCC unroll 16
        for (int t = 0; t < 16; t++)
            x[t] = v_load(work->row[t] + c);
        v_turn_16(x);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            v_store(work->x[c + i], x[i]);
    }
}

static int8_t value_zero(float mean, float scale, int32_t sum, uint32_t D) {
    if (scale == 0) return 0;
    float quarters = (mean - scale * ((float)sum / (float)D)) / (scale / 4.0f);
    return (int8_t)(quarters < -128.0f ? -128 : quarters > 127.0f ? 127 : (int)rintf(quarters));
}

static void quantize_values(const struct kv_shape *shape, const struct kv_page_map *map,
                            const uint16_t *values, uint8_t *record, struct work *work) {
    uint32_t D = shape->head_dim, w = shape->codec.value_bits;
    int bf16 = shape->dtype == KV_DTYPE_BF16;
    float mean[D_MAX], token_mean[T], scale[T], norm = (float)(1.0 / sqrt((double)(D & (0 - D))));
    int32_t sum[T];
    mean_over_tokens(shape, values, record + map->value_mean, mean);

    for (uint32_t t = 0; t < T; t += 16) {
        for (uint32_t i = 0; i < 16; i++) {
            for (uint32_t c = 0; c < D; c += 16)
                v_store(work->row[i] + c,
                        v_sub(v_load_half(values + (t + i) * D + c, bf16), v_load(mean + c)));
            if (shape->codec.value_rotated) lanes_rotate(work->row[i], D, norm);
        }
        turn_rows(work, D);
        struct fixed fixed;
        struct choice choice;
        vi *pair = work->pair[0];
        fix((const float(*)[16])work->x, D, pair, &fixed);
        choose(pair, D, fixed.sum, fixed.power, fixed.unit, w, &choice);
        for (uint32_t i = 0; i < 16; i++) {
            float s = choice.scale[i], zero = fixed.mean[i] - s * ((float)choice.sum[i] / (float)D);
            if (s == 0 || fabsf(zero) > 31.0f * s) { /* nearly constant */
                choice.offset[i] = -1;
                choice.sum[i]    = 0;
                s                = fabsf(fixed.mean[i]) / 31.0f;
            }
            token_mean[t + i] = fixed.mean[i], scale[t + i] = s, sum[t + i] = choice.sum[i];
        }
        for (uint32_t c = 0; c < D; c += 2) {
            vi both = code(v_load_i(&pair[c / 2]), &choice, w);
            v_store_u8(work->code[c] + t, v_and(both, v_set_i(0xff)));
            v_store_u8(work->code[c + 1] + t, v_shr(both, 16));
        }
    }
    uint16_t factor = store_scales(scale, T, record + map->value_scale);
    memcpy(record + offsetof(struct kv_page_header, value_factor), &factor, sizeof factor);
    for (uint32_t t = 0; t < T; t++)
        record[map->value_zero + t] = (uint8_t)value_zero(token_mean[t], scale[t], sum[t], D);
    words_values(w, D, work->code[0], D_MAX, record + map->value_codes);
}

/* ---- MINMAX ---------------------------------------------------------------------------------- */

/* One group per lane, x[n][16]; codes to[i * stride + lane].  Every step is rounded to the element type. */
static void minmax(const float (*x)[16], uint32_t n, uint32_t top, int bf16, uint8_t *to,
                   uint32_t stride, uint16_t scale_out[16], uint16_t low_out[16]) {
    vf low = v_load(x[0]), high = low;
    for (uint32_t i = 1; i < n; i++) {
        low  = v_min(low, v_load(x[i]));
        high = v_max(high, v_load(x[i]));
    }
    low      = v_add(low, v_zero());
    vf span  = v_add(v_sub(high, low), v_zero()); /* never -0 either */
    vf scale = v_round_half(v_div(v_round_half(span, bf16), v_set((float)top)), bf16);
    vm flat  = v_eq(scale, v_zero());
    vf most  = v_set((float)top);
    for (uint32_t i = 0; i < n; i++) {
        vf above = v_round_half(v_sub(v_load(x[i]), low), bf16);
        vf at    = v_min(v_round_half(v_div(above, scale), bf16), most);
        v_store_u8(to + i * stride, v_round_i(v_select(flat, v_zero(), at)));
    }
    v_store_half(scale_out, scale, bf16);
    v_store_half(low_out, low, bf16);
}

static void minmax_keys(const struct kv_shape *shape, const struct kv_page_map *map,
                        const uint16_t *keys, uint8_t *record, struct work *work) {
    uint32_t D = shape->head_dim, n = shape->codec.group, bits = shape->codec.key_bits;
    int bf16 = shape->dtype == KV_DTYPE_BF16;
    for (uint32_t group = 0; group < T / n; group++)
        for (uint32_t c = 0; c < D; c += 16) {
            uint16_t scale[16], low[16];
            for (uint32_t i = 0; i < n; i++)
                v_store(work->x[i], v_load_half(keys + (group * n + i) * D + c, bf16));
            minmax((const float(*)[16])work->x, n, (1u << bits) - 1, bf16,
                   work->code[group * n] + c, D_MAX, scale, low);
            memcpy(record + map->key_scale + 2 * (group * D + c), scale, sizeof scale);
            memcpy(record + map->key_zero + 2 * (group * D + c), low, sizeof low);
        }
    const uint8_t widths[KV_QUARTERS] = {(uint8_t)bits, (uint8_t)bits, (uint8_t)bits,
                                         (uint8_t)bits};
    words_keys(widths, D, work->code[0], D_MAX, record + map->key_codes);
}

static void minmax_values(const struct kv_shape *shape, const struct kv_page_map *map,
                          const uint16_t *values, uint8_t *record, struct work *work) {
    uint32_t D = shape->head_dim, n = shape->codec.group, bits = shape->codec.value_bits;
    int bf16 = shape->dtype == KV_DTYPE_BF16;
    for (uint32_t t = 0; t < T; t += 16) {
        for (uint32_t i = 0; i < 16; i++)
            for (uint32_t c = 0; c < D; c += 16)
                v_store(work->row[i] + c, v_load_half(values + (t + i) * D + c, bf16));
        turn_rows(work, D);
        for (uint32_t group = 0; group < D / n; group++) {
            uint16_t scale[16], low[16];
            minmax((const float(*)[16])work->x + group * n, n, (1u << bits) - 1, bf16,
                   work->code[group * n] + t, D_MAX, scale, low);
            memcpy(record + map->value_scale + 2 * (group * T + t), scale, sizeof scale);
            memcpy(record + map->value_zero + 2 * (group * T + t), low, sizeof low);
        }
    }
    words_values(bits, D, work->code[0], D_MAX, record + map->value_codes);
}

/* ---- one head record ---------------------------------------------------------------------------- */

void KV_LANES_FN(quantize)(const struct kv_shape *shape, const struct kv_page_map *map,
                           const uint16_t *keys, const uint16_t *values, const float *energy,
                           uint8_t *record, void *scratch);
void KV_LANES_FN(quantize)(const struct kv_shape *shape, const struct kv_page_map *map,
                           const uint16_t *keys, const uint16_t *values, const float *energy,
                           uint8_t *record, void *scratch) {
    memset(record, 0, map->record_bytes);
    if (shape->codec.kind == KV_CODEC_MINMAX) {
        minmax_keys(shape, map, keys, record, scratch);
        minmax_values(shape, map, values, record, scratch);
    } else {
        quantize_keys(shape, map, keys, energy, record, scratch);
        quantize_values(shape, map, values, record, scratch);
    }
}
