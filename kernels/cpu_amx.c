/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_amx.c - the AVX-512 kernels with attention's products on the AMX unit. */
#include <sys/syscall.h>
#include <unistd.h>

#include "kernels/cpu.h"

size_t kv_avx512_convert(const void *, enum kv_dtype, enum kv_dtype, float, uint16_t *, size_t);
size_t kv_avx512_convert_away(const void *, enum kv_dtype, enum kv_dtype, float, uint16_t *,
                              size_t);
void kv_avx512_widen(const void *, enum kv_dtype, float, float *, size_t);
void kv_amx_attend(const struct kv_cpu_attend *);
void kv_avx512_quantize(const struct kv_shape *, const struct kv_page_map *, const uint16_t *,
                        const uint16_t *, const float *, uint8_t *, void *);
void kv_avx512_dequantize(const struct kv_shape *, const struct kv_page_map *, const uint8_t *,
                          enum kv_dtype, uint16_t *, uint16_t *, void *);

/* arch_prctl(2): state component 18, the tiles' data, is given to processes that ask. */
enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };

/* Asked once, of the processor and then of the operating system, which makes it the whole process's. */
static bool available(void) {
    static int answer; /* 0: not asked; several threads that ask at once get the same answer */
    if (__atomic_load_n(&answer, __ATOMIC_RELAXED) == 0) {
        bool can = kv_cpu_avx512.available() && __builtin_cpu_supports("amx-tile") &&
                   __builtin_cpu_supports("amx-int8") &&
                   syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
        __atomic_store_n(&answer, can ? 1 : -1, __ATOMIC_RELAXED);
    }
    return __atomic_load_n(&answer, __ATOMIC_RELAXED) == 1;
}

const struct kv_cpu_isa kv_cpu_amx = {
    .name       = "amx",
    .lanes      = 16,
    .available  = available,
    .quantize   = kv_avx512_quantize,
    .dequantize = kv_avx512_dequantize,
    .attend     = kv_amx_attend,
    .convert    = kv_avx512_convert,
    .convert_away = kv_avx512_convert_away,
    .widen      = kv_avx512_widen,
};
