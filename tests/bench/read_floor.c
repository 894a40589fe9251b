/* SPDX-License-Identifier: Apache-2.0 */
/* read_floor.c - see read_floor.h. */
#include "tests/bench/read_floor.h"

#include <immintrin.h>

enum { PART_BYTES = 256 << 10 };

struct area {
    const char *memory;
    size_t bytes;
};

static void part_read(void *context, uint32_t index) {
    const struct area *area = context;
    size_t from = (size_t)index * PART_BYTES, to = from + PART_BYTES;
    if (to > area->bytes) to = area->bytes;
    __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                      _mm512_setzero_si512()};
    for (; from + 256 <= to; from += 256)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            sum[i] = _mm512_xor_si512(sum[i], _mm512_load_si512(area->memory + from + 64 * i));
    __m512i all =
        _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
    __asm__ volatile("" : : "v"(all)); /* the sum is looked at */
}

void read_floor(struct team *team, const void *memory, size_t bytes) {
    struct area area = {memory, bytes};
    team_run(team, (uint32_t)((bytes + PART_BYTES - 1) / PART_BYTES), part_read, &area);
}
