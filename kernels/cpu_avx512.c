/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_avx512.c - the table of the AVX-512 kernels.  The kernels are in cpu_lanes_*.c. */
#include "kernels/cpu.h"

size_t kv_avx512_convert(const void *, enum kv_dtype, enum kv_dtype, float, uint16_t *, size_t);
size_t kv_avx512_convert_away(const void *, enum kv_dtype, enum kv_dtype, float, uint16_t *,
                              size_t);
void kv_avx512_widen(const void *, enum kv_dtype, float, float *, size_t);
void kv_avx512_attend(const struct kv_cpu_attend *);
void kv_avx512_quantize(const struct kv_shape *, const struct kv_page_map *, const uint16_t *,
                        const uint16_t *, const float *, uint8_t *, void *);
void kv_avx512_dequantize(const struct kv_shape *, const struct kv_page_map *, const uint8_t *,
                          enum kv_dtype, uint16_t *, uint16_t *, void *);

/* What BUILD's flags let the compiler use in those files.  The builtins also ask whether the operating
 * system saves the registers. */
static bool available(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("gfni") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
}

const struct kv_cpu_isa kv_cpu_avx512 = {
    .name       = "avx512",
    .lanes      = 16,
    .available  = available,
    .quantize   = kv_avx512_quantize,
    .dequantize = kv_avx512_dequantize,
    .attend     = kv_avx512_attend,
    .convert    = kv_avx512_convert,
    .convert_away = kv_avx512_convert_away,
    .widen      = kv_avx512_widen,
};
