/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_raw.h - the inner loops of attention over raw pages.  Private to kernels/.
 *
 * Four tokens by four vectors, or four pieces of output by four vectors, are sixteen sums in flight.  A block
 * of more vectors than that meets elements that were widened once, a few tokens at a time; one of exactly four
 * (a decode step with four query heads to a KV head) widens them in registers on their only way through.  Both
 * are the same operations in the same order, so that a row's answer does not depend on its company.
 */
#ifndef KV_KERNELS_CPU_LANES_RAW_H
#define KV_KERNELS_CPU_LANES_RAW_H

#include "kernels/cpu_lanes_terms.h"

enum raw_kind { RAW_WIDE, RAW_F16, RAW_BF16 };

KV_INLINE vf raw_load(const void *row, uint32_t at, const enum raw_kind kind) {
    if (kind == RAW_WIDE) return v_load((const float *)row + at);
    return v_load_half((const uint16_t *)row + at, kind == RAW_BF16);
}

/* Scores of four tokens, times `scale`, of one or four vectors: the second's T behind the first's. */
KV_INLINE void raw_dot(const float *query, uint32_t D, const void *const row[4],
                       const enum raw_kind kind, const int vectors, float scale, float *score) {
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
            key[j] = raw_load(row[j], c, kind);
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            vf q = v_load(query + (uint32_t)i * D + c);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sum[i][j] = v_fma(q, key[j], sum[i][j]);
        }
    }
    if (vectors == 4) {
        v_sum_four_fours(sum, scale, score, T);
    } else {
        v_sum_four(sum[0], score);
        for (int j = 0; j < 4; j++) score[j] *= scale;
    }
}

/* Adds p times `tokens` rows, `pitch` elements apart, to a piece of `pieces` x 16 channels, beginning at
 * `at`, of some vectors' outputs. */
struct raw_rows {
    const void *memory;
    uint32_t pitch, at, tokens;
};
KV_INLINE void raw_add(float (*p)[T], struct raw_rows rows, const enum raw_kind kind, float *out,
                       uint32_t D, const int pieces, const int vectors) {
    vf sum[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < vectors; i++)
#pragma GCC unroll 4
        for (int j = 0; j < pieces; j++)
            sum[i][j] = v_load(out + (uint32_t)i * D + 16 * j);
    for (uint32_t t = 0; t < rows.tokens; t++) {
        vf value[4];
#pragma GCC unroll 4
        for (int j = 0; j < pieces; j++)
            value[j] = raw_load(rows.memory, t * rows.pitch + rows.at + 16 * (uint32_t)j, kind);
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

#endif
