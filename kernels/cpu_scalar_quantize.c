/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_scalar_quantize.c - 16-bit elements to codes, as page.h defines it.
 *
 * Read it beside "UNBIASED: from 16-bit elements to codes" and "MINMAX: the published
 * algorithm" of page.h; names are the same.  Every binary32 operation stands in the order
 * written there, and the file is compiled without contraction: a rounding more or less
 * would be a different code.
 *
 *     16-bit elements --fix--> integers u --choose--> codes, sums --finish--> metadata
 */
#include <math.h>
#include <stdlib.h>

#include "kernels/cpu_codes.h"
#include "kernels/cpu_scalar.h"
#include "kernels/half.h"

enum { T = KV_BLOCK_TOKENS, D_MAX = KV_HEAD_DIM_MAX, WIDTH_MAX = 4 };

/* ---- the group rule -------------------------------------------------------------- */

/* A group in fixed point.  power = 0: the group is constant. */
struct fixed {
    uint32_t n;
    float unit;
    float mean;
    int32_t sum;   /* SU */
    int64_t power; /* P */
    int32_t u[D_MAX];
};

/* What the group rule chose at one width. */
struct choice {
    float scale;  /* s, before the page's factor */
    float error;  /* e */
    int32_t sum;  /* SC */
};

static void fix(struct fixed *group, const float *x, uint32_t n) {
    float low = x[0], high = x[0];
    for (uint32_t i = 1; i < n; i++) {
        if (x[i] < low) low = x[i];
        if (x[i] > high) high = x[i];
    }
    low += 0.0f; /* a minimum of -0 is +0, whichever zero came first */
    float span = high - low;
    *group = (struct fixed){.n = n, .mean = low};
    if (span <= 1e-8f) return;

    float units_per = (float)KV_UNITS / span;
    int64_t squares = 0;
    for (uint32_t i = 0; i < n; i++) {
        int32_t u = (int32_t)kv_scalar_round((x[i] - low) * units_per);
        group->u[i] = u;
        group->sum += u;
        squares += u * u;
    }
    group->power = (int64_t)n * squares - (int64_t)group->sum * group->sum;
    group->unit = span / (float)KV_UNITS;
    group->mean = low + ((float)group->sum / (float)n) * group->unit;
}

/* Sums that judge one candidate. */
struct merit {
    int32_t sum;       /* SC */
    int32_t covariance; /* X */
    int32_t variance;  /* Q */
};

static struct merit judge(const struct fixed *group, const uint8_t *codes) {
    int32_t sum = 0, squares = 0, products = 0, n = (int32_t)group->n;
    for (uint32_t i = 0; i < group->n; i++) {
        sum += codes[i];
        squares += codes[i] * codes[i];
        products += codes[i] * group->u[i];
    }
    return (struct merit){
        .sum = sum,
        .covariance = n * products - sum * group->sum,
        .variance = n * squares - sum * sum,
    };
}

static void code_above_mean(const struct fixed *group, uint8_t *codes) {
    for (uint32_t i = 0; i < group->n; i++)
        codes[i] = (int32_t)group->n * group->u[i] > group->sum;
}

static void code_range(const struct fixed *group, uint32_t width, uint32_t a, uint32_t b,
                       uint8_t *codes) {
    float m = kv_f32_of_f16(width == 2 ? kv_range_step2[a][b] : kv_range_step4[a][b]);
    int32_t offset = kv_range_offset[a], top = (1 << width) - 1;
    for (uint32_t i = 0; i < group->n; i++) {
        int32_t code = (int32_t)kv_scalar_round((float)(group->u[i] - offset) * m);
        code = code < 0 ? 0 : code;
        codes[i] = (uint8_t)(code > top ? top : code);
    }
}

/* The codes of a group at a width, best candidate first found. */
static struct choice choose(const struct fixed *group, uint32_t width, uint8_t *codes) {
    struct choice choice = {0};
    memset(codes, 0, group->n);
    if (group->power == 0) return choice;

    float best = 0;
    struct merit best_merit = {0};
    uint8_t tried[D_MAX];
    uint32_t candidates = width == 1 ? 1 : KV_RANGES * KV_RANGES;
    for (uint32_t i = 0; i < candidates; i++) {
        if (width == 1)
            code_above_mean(group, tried);
        else
            code_range(group, width, i / KV_RANGES, i % KV_RANGES, tried);
        struct merit found = judge(group, tried);
        if (found.variance == 0 || found.covariance <= 0) continue;
        float merit =
            ((float)found.covariance * (float)found.covariance) / (float)found.variance;
        if (!(merit > best)) continue;
        best = merit;
        best_merit = found;
        memcpy(codes, tried, group->n);
    }

    /* The whole range is always a candidate: its codes reach both 0 and top. */
    float power = (float)group->power;
    choice.sum = best_merit.sum;
    choice.scale = (power / (float)best_merit.covariance) * group->unit;
    choice.error = power * (power / best - 1.0f);
    return choice;
}

/* Stores one kind of scales as e4m3 under the page's factor, and leaves in scale[] what
 * the reader will have. */
static uint16_t store_scales(float *scale, uint32_t count, uint8_t *stored) {
    float largest = 0;
    for (uint32_t i = 0; i < count; i++)
        if (scale[i] > largest) largest = scale[i];
    uint16_t factor = kv_f16_saturated(largest);
    float step = kv_f32_of_f16(factor) / 448.0f;
    for (uint32_t i = 0; i < count; i++) {
        stored[i] = factor == 0 ? 0 : kv_e4m3_saturated(scale[i] / step);
        scale[i] = kv_f32_of_e4m3(stored[i]) * step;
    }
    return factor;
}

static void store_f16(uint8_t *target, uint32_t index, uint16_t half) {
    memcpy(target + 2 * index, &half, sizeof half);
}

/* ---- UNBIASED keys --------------------------------------------------------------- */

/* All that is known of a page's key channels before a mix is chosen. */
struct key_channels {
    float importance[D_MAX];
    float mean[D_MAX];
    float error[WIDTH_MAX + 1][D_MAX]; /* weighted, by width */
    struct choice choice[WIDTH_MAX + 1][D_MAX];
    uint8_t codes[WIDTH_MAX + 1][D_MAX][T];
    uint8_t packing[D_MAX][T]; /* by slot */
};

static bool codec_uses_width(const struct kv_codec *codec, uint32_t width) {
    for (uint32_t i = 0; i < codec->mix_count; i++)
        for (uint32_t q = 0; q < KV_QUARTERS; q++)
            if (codec->mixes[i][q] == width) return true;
    return false;
}

static void weigh_channel(struct key_channels *channels, const struct kv_codec *codec,
                          uint32_t c, const float x[T], float energy) {
    struct fixed group;
    fix(&group, x, T);
    float weight = (group.unit * group.unit) * energy;
    channels->mean[c] = group.mean;
    channels->importance[c] = (float)group.power * weight;
    channels->error[0][c] = (float)group.power * weight;
    for (uint32_t width = 1; width <= WIDTH_MAX; width++) {
        if (!codec_uses_width(codec, width)) continue;
        struct choice choice = choose(&group, width, channels->codes[width][c]);
        channels->choice[width][c] = choice;
        channels->error[width][c] = choice.error * weight;
    }
}

/* Slots by falling importance, ties by rising channel: an insertion sort is stable. */
static void order_slots(const float *importance, uint32_t D, uint8_t *order) {
    for (uint32_t c = 0; c < D; c++) {
        uint32_t slot = c;
        while (slot > 0 && importance[order[slot - 1]] < importance[c]) {
            order[slot] = order[slot - 1];
            slot--;
        }
        order[slot] = (uint8_t)c;
    }
}

static uint32_t choose_mix(const struct key_channels *channels, const struct kv_codec *codec,
                           uint32_t D, const uint8_t *order) {
    uint32_t best = 0;
    float best_cost = INFINITY;
    for (uint32_t i = 0; i < codec->mix_count; i++) {
        float cost = 0;
        for (uint32_t slot = 0; slot < D; slot++)
            cost += channels->error[codec->mixes[i][slot / (D / KV_QUARTERS)]][order[slot]];
        if (cost < best_cost) {
            best_cost = cost;
            best = i;
        }
    }
    return best;
}

static void quantize_keys(const struct kv_shape *shape, const struct kv_page_map *map,
                          const uint16_t *keys, const float *energy, uint8_t *record,
                          struct key_channels *channels) {
    uint32_t D = shape->head_dim;
    for (uint32_t c = 0; c < D; c++) {
        float x[T];
        for (uint32_t t = 0; t < T; t++) x[t] = kv_f32_of_element(keys[t * D + c], shape->dtype);
        weigh_channel(channels, &shape->codec, c, x, energy != NULL ? energy[c] : 1.0f);
    }

    uint8_t *order = record + map->key_order;
    order_slots(channels->importance, D, order);
    uint32_t mix = choose_mix(channels, &shape->codec, D, order);
    const uint8_t *widths = shape->codec.mixes[mix];

    float scale[D_MAX];
    for (uint32_t slot = 0; slot < D; slot++) {
        uint32_t width = widths[slot / (D / KV_QUARTERS)], c = order[slot];
        scale[slot] = width == 0 ? 0 : channels->choice[width][c].scale;
        if (width != 0) memcpy(channels->packing[slot], channels->codes[width][c], T);
    }
    uint16_t factor = store_scales(scale, D, record + map->key_scale);
    for (uint32_t slot = 0; slot < D; slot++) {
        uint32_t width = widths[slot / (D / KV_QUARTERS)], c = order[slot];
        float zero = channels->mean[c];
        if (width != 0) zero -= scale[slot] * ((float)channels->choice[width][c].sum / (float)T);
        store_f16(record + map->key_zero, slot, kv_f16_saturated(zero));
    }
    kv_codes_pack_keys(widths, D, channels->packing[0], record + map->key_codes);

    struct kv_page_header header = {.mix = (uint8_t)mix, .key_factor = factor};
    memcpy(record, &header, sizeof header);
}

/* ---- UNBIASED values ------------------------------------------------------------- */

/* The mean over tokens of every channel, rounded to what the record holds.  Eight partial
 * sums, because that is the order a vector of eight lanes has. */
static void mean_over_tokens(const struct kv_shape *shape, const uint16_t *values,
                             uint8_t *stored, float *mean) {
    uint32_t D = shape->head_dim;
    for (uint32_t c = 0; c < D; c++) {
        float part[8] = {0};
        for (uint32_t t = 0; t < T; t++)
            part[t % 8] += kv_f32_of_element(values[t * D + c], shape->dtype);
        float sum = ((part[0] + part[1]) + (part[2] + part[3])) +
                    ((part[4] + part[5]) + (part[6] + part[7]));
        uint16_t half = kv_f16_saturated(sum / (float)T);
        store_f16(stored, c, half);
        mean[c] = kv_f32_of_f16(half);
    }
}

struct value_tokens {
    float mean[T]; /* of the token's group */
    float scale[T];
    int32_t sum[T];
    uint8_t codes[T * D_MAX]; /* [token][channel], D to a row */
};

/* A token whose zero would leave the byte's range is kept as a constant: its scale is
 * chosen so that zero = mean comes out near +-124 quarters. */
static void quantize_token(struct value_tokens *tokens, uint32_t t, const float *y, uint32_t D,
                           uint32_t width) {
    struct fixed group;
    fix(&group, y, D);
    struct choice choice = choose(&group, width, tokens->codes + t * D);
    float zero = group.mean - choice.scale * ((float)choice.sum / (float)D);
    if (choice.scale == 0 || fabsf(zero) > 31.0f * choice.scale) {
        memset(tokens->codes + t * D, 0, D);
        choice.sum = 0;
        choice.scale = fabsf(group.mean) / 31.0f;
    }
    tokens->mean[t] = group.mean;
    tokens->scale[t] = choice.scale;
    tokens->sum[t] = choice.sum;
}

static int8_t value_zero(float mean, float scale, int32_t sum, uint32_t D) {
    if (scale == 0) return 0;
    float quarters = (mean - scale * ((float)sum / (float)D)) / (scale / 4.0f);
    if (quarters < -128.0f) return -128;
    if (quarters > 127.0f) return 127;
    return (int8_t)kv_scalar_round(quarters);
}

static void quantize_values(const struct kv_shape *shape, const struct kv_page_map *map,
                            const uint16_t *values, uint8_t *record,
                            struct value_tokens *tokens) {
    uint32_t D = shape->head_dim, width = shape->codec.value_bits;
    float mean[D_MAX], y[D_MAX];
    mean_over_tokens(shape, values, record + map->value_mean, mean);
    for (uint32_t t = 0; t < T; t++) {
        for (uint32_t c = 0; c < D; c++)
            y[c] = kv_f32_of_element(values[t * D + c], shape->dtype) - mean[c];
        if (shape->codec.value_rotated) kv_scalar_rotate(y, D);
        quantize_token(tokens, t, y, D, width);
    }

    uint16_t factor = store_scales(tokens->scale, T, record + map->value_scale);
    memcpy(record + offsetof(struct kv_page_header, value_factor), &factor, sizeof factor);
    for (uint32_t t = 0; t < T; t++)
        record[map->value_zero + t] =
            (uint8_t)value_zero(tokens->mean[t], tokens->scale[t], tokens->sum[t], D);
    kv_codes_pack_values(width, D, tokens->codes, record + map->value_codes);
}

/* ---- MINMAX ---------------------------------------------------------------------- */

/* One group: n elements `stride` apart, codes alike.  Every step is rounded to the element
 * type, because that is the type the published code computes in. */
static void minmax_group(uint8_t dtype, uint32_t n, uint32_t top, const uint16_t *x,
                         size_t x_stride, uint8_t *codes, size_t code_stride,
                         uint8_t *scale_out, uint8_t *min_out) {
    float low = kv_f32_of_element(x[0], dtype), high = low;
    for (uint32_t i = 1; i < n; i++) {
        float v = kv_f32_of_element(x[i * x_stride], dtype);
        if (v < low) low = v;
        if (v > high) high = v;
    }
    low += 0.0f; /* as in fix(): -0 becomes +0 */
    high += 0.0f;
    float span = kv_f32_of_element(kv_element_saturated(high - low, dtype), dtype);
    uint16_t scale16 = kv_element_saturated(span / (float)top, dtype);
    float scale = kv_f32_of_element(scale16, dtype);

    for (uint32_t i = 0; i < n; i++) {
        float v = kv_f32_of_element(x[i * x_stride], dtype);
        float above = kv_f32_of_element(kv_element_saturated(v - low, dtype), dtype);
        float code = scale == 0 ? 0 : above / scale;
        code = kv_f32_of_element(kv_element_saturated(code, dtype), dtype);
        code = code > (float)top ? (float)top : code; /* never below 0: v >= low */
        codes[i * code_stride] = (uint8_t)kv_scalar_round(code);
    }
    uint16_t min16 = kv_element_saturated(low, dtype);
    store_f16(scale_out, 0, scale16);
    store_f16(min_out, 0, min16);
}

static void minmax_keys(const struct kv_shape *shape, const struct kv_page_map *map,
                        const uint16_t *keys, uint8_t *record, uint8_t *codes) {
    const struct kv_codec *codec = &shape->codec;
    uint32_t D = shape->head_dim, n = codec->group, top = (1u << codec->key_bits) - 1;
    for (uint32_t group = 0; group < T / n; group++)
        for (uint32_t c = 0; c < D; c++) {
            uint32_t index = group * D + c;
            minmax_group(shape->dtype, n, top, keys + (size_t)group * n * D + c, D,
                         codes + c * T + group * n, 1, record + map->key_scale + 2 * index,
                         record + map->key_zero + 2 * index);
        }
    const uint8_t widths[KV_QUARTERS] = {codec->key_bits, codec->key_bits, codec->key_bits,
                                         codec->key_bits};
    kv_codes_pack_keys(widths, D, codes, record + map->key_codes);
}

static void minmax_values(const struct kv_shape *shape, const struct kv_page_map *map,
                          const uint16_t *values, uint8_t *record, uint8_t *codes) {
    const struct kv_codec *codec = &shape->codec;
    uint32_t D = shape->head_dim, n = codec->group, top = (1u << codec->value_bits) - 1;
    for (uint32_t group = 0; group < D / n; group++)
        for (uint32_t t = 0; t < T; t++) {
            uint32_t index = group * T + t, start = t * D + group * n;
            minmax_group(shape->dtype, n, top, values + start, 1, codes + start, 1,
                         record + map->value_scale + 2 * index,
                         record + map->value_zero + 2 * index);
        }
    kv_codes_pack_values(codec->value_bits, D, codes, record + map->value_codes);
}

/* ---- one head record ------------------------------------------------------------- */

static_assert(sizeof(struct key_channels) <= KV_CPU_SCRATCH, "the worker's scratch holds it");
static_assert(sizeof(struct value_tokens) <= KV_CPU_SCRATCH, "the worker's scratch holds it");

void kv_scalar_quantize(const struct kv_shape *shape, const struct kv_page_map *map,
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
