/* SPDX-License-Identifier: Apache-2.0 */
/* opponent_fp16.c - attention on binary16 keys and values, widened as they are loaded. */
#include <immintrin.h>
#include <stdint.h>

typedef uint16_t element;

static inline __m512 load(const element *from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}

#include "tests/bench/opponent_blocked.h"

void opponent_fp16(const struct opponent *opponent) {
    blocked(opponent);
}
