/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_terms.h - what a page's keys and values multiply with, as floats.  Private to kernels/.
 *
 * Filled from a record once per page, for however many query vectors.  What belongs to keys stands by
 * channel, as queries do; what belongs to tokens in the order of a key tile's rows, as scores do.
 */
#ifndef KV_KERNELS_CPU_LANES_TERMS_H
#define KV_KERNELS_CPU_LANES_TERMS_H

#include "kernels/cpu_lanes_panel.h"

#include <math.h>

enum { T = KV_BLOCK_TOKENS };

struct page_terms {
    float key_scale[4][KV_HEAD_DIM_MAX]; /* [key group][channel] */
    float key_zero[4][KV_HEAD_DIM_MAX];  /* z + s top / 2 */
    uint8_t key_top[KV_HEAD_DIM_MAX];    /* by slot: 2^width - 1 */
    uint8_t order[KV_HEAD_DIM_MAX];      /* slot -> channel */
    uint8_t slot[256];                   /* channel -> slot; any byte may index it */
    float key_noise;                     /* noise of a score in steps */
    float value_scale[8][T];             /* [value group][token, in rows] */
    float value_zero[8][T];              /* z + s top / 2, as of keys */
    float mean[KV_HEAD_DIM_MAX];
};

/* Noise of a score in steps: see cpu_lanes_attend.c. */
static float keys_noise(const uint8_t width[KV_QUARTERS], uint32_t D) {
    float variance = 0;
    for (int q = 0; q < KV_QUARTERS; q++) {
        float top = (float)((1u << width[q]) - 1);
        variance += (float)(D / KV_QUARTERS) * top * (top + 2);
    }
    return sqrtf(variance) / 12;
}

/* Scales and zeros of keys from slots to channels, as the bytes that they are in the record. */
static void terms_keys(const struct kv_page_map *map, const uint8_t *record, uint32_t D, float step,
                       struct page_terms *terms) {
    enum { SCALE, TOP, LOW, HIGH, KINDS };
    const uint16_t *zero = (const uint16_t *)(record + map->key_zero);
    uint32_t tables = D <= 64 ? 1 : D <= 128 ? 2 : 4, count = (D + 63) & ~63u;
    int8_t by_slot[KINDS][KV_HEAD_DIM_MAX], by_channel[KINDS][KV_HEAD_DIM_MAX];
    for (uint32_t slot = 0; slot < D; slot++)
        terms->slot[record[map->key_order + slot]] = (uint8_t)slot;
    memcpy(by_slot[SCALE], record + map->key_scale, D);
    memcpy(by_slot[TOP], terms->key_top, D);
    for (uint32_t slot = 0; slot < D; slot += 16) {
        vi half = v_load_u16(zero + slot);
        v_store_u8((uint8_t *)by_slot[LOW] + slot, v_and(half, v_set_i(0xff)));
        v_store_u8((uint8_t *)by_slot[HIGH] + slot, v_shr(half, 8));
    }
    for (int kind = 0; kind < KINDS; kind++)
        v_permute_bytes(by_channel[kind], by_slot[kind], terms->slot, count, tables);
    for (uint32_t c = 0; c < D; c += 16) {
        vf top = v_to_f(v_load_u8((const uint8_t *)by_channel[TOP] + c));
        vi low = v_load_u8((const uint8_t *)by_channel[LOW] + c);
        vi high = v_load_u8((const uint8_t *)by_channel[HIGH] + c);
        vf s = v_mul(v_load_e4m3((const uint8_t *)by_channel[SCALE] + c), v_set(step));
        s    = v_select(v_lt(v_zero(), top), s, v_zero());
        v_store(terms->key_scale[0] + c, s);
        v_store(terms->key_zero[0] + c, v_fma(s, v_mul(top, v_set(0.5f)),
                                              v_from_f16(v_or(low, v_shl(high, 8)))));
    }
}

static void terms_unbiased(const struct kv_shape *shape, const struct kv_page_map *map,
                           const uint8_t *record, struct page_terms *terms) {
    const struct kv_page_header *header = (const struct kv_page_header *)record;
    uint32_t D                          = shape->head_dim;
    uint8_t width[KV_QUARTERS];
    panel_widths(&shape->codec, record, width);
    uint16_t factors[16] = {header->key_factor, header->value_factor};
    float factor[16];
    v_store(factor, v_div(v_load_f16(factors), v_set(448.0f)));

    uint32_t value_top = (1u << shape->codec.value_bits) - 1;
    memcpy(terms->order, record + map->key_order, D);
    for (uint32_t slot = 0; slot < D; slot += 8) {
        uint32_t top = (1u << width[slot / (D / 4)]) - 1;
        memset(terms->key_top + slot, (int)top, 8);
    }
    terms->key_noise = keys_noise(width, D);
    terms_keys(map, record, D, factor[0], terms);
    for (uint32_t t = 0; t < T; t += 16) {
        vf s  = v_mul(v_load_e4m3(record + map->value_scale + t), v_set(factor[1]));
        vf zq = v_to_f(v_load_i8((const int8_t *)record + map->value_zero + t));
        vf z  = v_mul(s, v_fma(zq, v_set(0.25f), v_set(0.5f * (float)value_top)));
        v_store(terms->value_scale[0] + t, v_tokens_to_rows(s));
        v_store(terms->value_zero[0] + t, v_tokens_to_rows(z));
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
            z    = v_fma(s, v_set(0.5f * (float)value_top), z);
            v_store(terms->value_scale[group] + t, v_tokens_to_rows(s));
            v_store(terms->value_zero[group] + t, v_tokens_to_rows(z));
        }
}

#endif
