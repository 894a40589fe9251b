/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_scalar.c - the CPU backend in plain C: the definition of every answer.
 *
 * Written for reading beside page.h, sentence by sentence.  The other instruction sets and
 * the GPU are tested against it: packed pages byte for byte, attention to a bound.
 */
#include "kernels/cpu_scalar.h"

#include <math.h>
#include <string.h>

#include "kernels/half.h"

static bool available(void) {
    return true;
}

/* Rows from the wire begin at any byte. */
static uint16_t narrow_at(const void *source, size_t i) {
    uint16_t element;
    memcpy(&element, (const uint8_t *)source + i * sizeof element, sizeof element);
    return element;
}

static float wide_at(const void *source, size_t i) {
    float element;
    memcpy(&element, (const uint8_t *)source + i * sizeof element, sizeof element);
    return element;
}

/* Turns one element; the switch on types stands outside the loops over elements. */
#define CONVERT(element)                                                    \
    for (size_t i = 0; i < count; i++) {                                    \
        target[i] = (element);                                              \
        /* A NaN compares false with everything, so it fails here too. */   \
        if (!(fabsf(kv_f32_of_element(target[i], (uint8_t)to)) <= limit)) return i; \
    }

static size_t convert(const void *source, enum kv_dtype from, enum kv_dtype to, float limit,
                      uint16_t *target, size_t count) {
    if (limit > 0x1.fffffep127f) limit = 0x1.fffffep127f; /* infinity is above every limit */
    if (from != KV_DTYPE_F32) {
        CONVERT(narrow_at(source, i))
    } else if (to == KV_DTYPE_F16) {
        CONVERT(kv_f16_of_f32(wide_at(source, i)))
    } else {
        CONVERT(kv_bf16_of_f32(wide_at(source, i)))
    }
    return count;
}

static void widen(const void *source, enum kv_dtype from, float factor, float *target,
                  size_t count) {
    const float *wide = source;
    const uint16_t *narrow = source;
    if (from == KV_DTYPE_F32) {
        for (size_t i = 0; i < count; i++) target[i] = wide[i] * factor;
    } else if (from == KV_DTYPE_F16) {
        for (size_t i = 0; i < count; i++) target[i] = kv_f32_of_f16(narrow[i]) * factor;
    } else {
        for (size_t i = 0; i < count; i++) target[i] = kv_f32_of_bf16(narrow[i]) * factor;
    }
}

void kv_scalar_rotate(float *y, uint32_t head_dim) {
    uint32_t N = head_dim & -head_dim; /* the largest power of two that divides D */
    float norm = (float)(1.0 / sqrt((double)N));
    for (uint32_t stride = 1; stride < N; stride *= 2)
        for (uint32_t run = 0; run < head_dim; run += 2 * stride)
            for (uint32_t c = run; c < run + stride; c++) {
                float a = y[c], b = y[c + stride];
                y[c] = a + b;
                y[c + stride] = a - b;
            }
    for (uint32_t c = 0; c < head_dim; c++) y[c] *= norm;
}

const struct kv_cpu_isa kv_cpu_scalar = {
    .name = "scalar",
    .lanes = 1,
    .available = available,
    .quantize = kv_scalar_quantize,
    .dequantize = kv_scalar_dequantize,
    .attend = kv_scalar_attend,
    .convert = convert,
    .convert_away = convert,
    .widen = widen,
};
