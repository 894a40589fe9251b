/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_lanes_rows.c - elements between types, for AVX-512 and AVX2 (see cpu_lanes.h). */
#include "kernels/cpu.h"
#include "kernels/cpu_lanes.h"
#include "kernels/half.h"

#include <math.h>

size_t KV_LANES_FN(convert)(const void *source, enum kv_dtype from, enum kv_dtype to, float limit,
                            uint16_t *target, size_t count);
size_t KV_LANES_FN(convert_away)(const void *source, enum kv_dtype from, enum kv_dtype to, float limit,
                                 uint16_t *target, size_t count);
void KV_LANES_FN(widen)(const void *source, enum kv_dtype from, float factor, float *target,
                        size_t count);

/* Sixteen elements, or the last few, from `i` on. */
KV_INLINE vf load_some(const void *source, enum kv_dtype from, size_t i, size_t count) {
    size_t some = count - i < 16 ? count - i : 16;
    if (some == 16 && from == KV_DTYPE_F32) return v_load((const float *)source + i);
    if (some == 16) return v_load_half((const uint16_t *)source + i, from == KV_DTYPE_BF16);
    if (from == KV_DTYPE_F32) {
        float part[16] = {0};
        memcpy(part, (const float *)source + i, some * sizeof(float));
        return v_load(part);
    }
    uint16_t part[16] = {0};
    memcpy(part, (const uint16_t *)source + i, some * sizeof(uint16_t));
    return v_load_half(part, from == KV_DTYPE_BF16);
}

/* The bits of the largest element that is at most `limit`; a finite element's magnitude rises with
 * its bits, and infinities and NaNs stand above all of them. */
static uint16_t bits_most(float limit, int bf16) {
    /* Called for every head of every token: the usual limits without arithmetic. */
    if (limit >= (bf16 ? 0x1.fep+127f : 65504.0f)) return bf16 ? 0x7f7f : 0x7bff;
    uint16_t bits = bf16 ? kv_bf16_of_f32(limit) : kv_f16_of_f32(limit);
    float rounded = bf16 ? kv_f32_of_bf16(bits) : kv_f32_of_f16(bits);
    return rounded > limit ? (uint16_t)(bits - 1) : bits;
}

/* Rows that keep their type: copied and compared as integers, 32 elements at a time, and looked at
 * twice only if something was wrong.  Returns how many were taken in full. */
KV_INLINE size_t copy_good(const uint16_t *source, uint16_t most, uint16_t *target, size_t count,
                           bool away) {
    vi magnitude = v_set_i(0x7fff7fff), largest = v_set_i(most << 16 | most), above = v_zero_i();
    size_t i = 0;
    for (; i + 32 <= count; i += 32) {
        vi x = v_load_i(source + i);
        if (away) v_store_away(target + i, x);
        else v_store_i(target + i, x);
        above = v_or(above, v_subs_u16(v_and(x, magnitude), largest));
    }
    return v_truths(v_gt_i(above, v_zero_i())) ? 0 : i;
}

size_t KV_LANES_FN(convert)(const void *source, enum kv_dtype from, enum kv_dtype to, float limit,
                            uint16_t *target, size_t count) {
    int bf16 = to == KV_DTYPE_BF16;
    float largest =
        bf16 ? 0x1.fep+127f : 65504.0f; /* infinity is above every limit, NaN below none */
    if (limit > largest) limit = largest;
    vf most = v_set(limit);
    size_t begin = from == to ? copy_good(source, bits_most(limit, bf16), target, count, false) : 0;
    for (size_t i = begin; i < count; i += 16) {
        size_t some = count - i < 16 ? count - i : 16;
        uint16_t half[16];
        if (from == to) {
            memcpy(half, (const uint16_t *)source + i, some * sizeof(uint16_t));
            memset(half + some, 0, (16 - some) * sizeof(uint16_t));
        } else if (bf16) {
            float part[16];
            v_store(part, load_some(source, from, i, count));
            for (int j = 0; j < 16; j++)
                half[j] = kv_bf16_of_f32(part[j]);
        } else {
            v_store_f16(half, load_some(source, from, i, count));
        }
        memcpy(target + i, half, some * sizeof(uint16_t));
        uint32_t good = v_truths(v_le(v_abs(v_load_half(half, bf16)), most));
        if (good != 0xffff) return i + (size_t)__builtin_ctz(~good);
    }
    return count;
}

size_t KV_LANES_FN(convert_away)(const void *source, enum kv_dtype from, enum kv_dtype to, float limit,
                                 uint16_t *target, size_t count) {
    if (from == to && count % 32 == 0 && (uintptr_t)target % 64 == 0 &&
        copy_good(source, bits_most(limit, to == KV_DTYPE_BF16), target, count, true) == count)
        return count;
    return KV_LANES_FN(convert)(source, from, to, limit, target, count);
}

void KV_LANES_FN(widen)(const void *source, enum kv_dtype from, float factor, float *target,
                        size_t count) {
    size_t i = 0;
    for (; i + 16 <= count; i += 16)
        v_store(target + i, v_mul(load_some(source, from, i, count), v_set(factor)));
    if (i == count) return;
    float part[16];
    v_store(part, v_mul(load_some(source, from, i, count), v_set(factor)));
    memcpy(target + i, part, (count - i) * sizeof(float));
}
