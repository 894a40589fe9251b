/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_scalar.h - what the files of the scalar definition share.  Private to them.
 *
 *   cpu_scalar.c           the table, convert, widen
 *   cpu_scalar_quantize.c  16-bit elements -> codes
 *   cpu_scalar_attend.c    codes -> binary32 -> 16-bit elements, and attention
 */
#ifndef KV_KERNELS_CPU_SCALAR_H
#define KV_KERNELS_CPU_SCALAR_H

#include "kernels/cpu.h"

/* Rounds to an integer, ties to even, |x| < 2^22: in [2^23, 2^24) the last place of
 * binary32 is 1.  Unlike rintf() a compiler can make vectors of it without SSE4.1. */
static inline float kv_scalar_round(float x) {
    const float magic = 0x1.8p23f;
    return (x + magic) - magic;
}

/* R of page.h, in place: y is one token's D channels.  R is its own inverse. */
void kv_scalar_rotate(float *y, uint32_t head_dim);

void kv_scalar_quantize(const struct kv_shape *shape, const struct kv_page_map *map,
                        const uint16_t *keys, const uint16_t *values, const float *energy,
                        uint8_t *record, void *scratch);
void kv_scalar_dequantize(const struct kv_shape *shape, const struct kv_page_map *map,
                          const uint8_t *record, enum kv_dtype dtype, uint16_t *keys,
                          uint16_t *values, void *scratch);
void kv_scalar_attend(const struct kv_cpu_attend *task);

#endif
