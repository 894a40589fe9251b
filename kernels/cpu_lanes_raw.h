/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_raw.h - the inner loops of attention over raw pages.  Private to kernels/.
 *
 * The elements are widened once, a few tokens at a time, and then met by every vector of the block: four
 * tokens by four vectors, or four pieces of output by four vectors, are sixteen sums in flight.
 */
#ifndef KV_KERNELS_CPU_LANES_RAW_H
#define KV_KERNELS_CPU_LANES_RAW_H

#include "kernels/cpu_lanes_terms.h"

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

#endif
