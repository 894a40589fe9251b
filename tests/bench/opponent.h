/* SPDX-License-Identifier: Apache-2.0 */
/* opponent.h - attention on keys and values that nobody compressed: what kivid has to beat.
 *
 * Opponents have it easy: keys and values of a head lie in one piece, token after token, and no
 * result carries a log-sum-exp.  They are blocked by 128 tokens, use AVX-512, read every key
 * and value once for all query heads of a group, and share heads and stretches of context
 * among all threads.  They need AVX-512 F and FMA: ask opponent_available().
 */
#ifndef KV_TESTS_BENCH_OPPONENT_H
#define KV_TESTS_BENCH_OPPONENT_H

#include <stdbool.h>
#include <stdint.h>

#include "tests/bench/team.h"

enum { OPPONENT_GROUP = 4, OPPONENT_D = 128, OPPONENT_SPLITS_MAX = 64 };

struct opponent {
    struct team *team;
    uint32_t heads;   /* KV heads; query heads are OPPONENT_GROUP times as many */
    uint32_t tokens;  /* a multiple of 128 */
    const void *keys; /* [head][token][OPPONENT_D], float or binary16 */
    const void *values;
    const float *query; /* [heads * OPPONENT_GROUP][OPPONENT_D], times the scale of scores */
    float *out;         /* like query */
    float *scratch;     /* opponent_scratch_floats() */
};

bool opponent_available(void);
uint64_t opponent_scratch_floats(uint32_t heads, uint32_t tokens);

void opponent_fp32(const struct opponent *opponent);
void opponent_fp16(const struct opponent *opponent); /* widened on the fly */

/* The same in OpenBLAS's matrix products, where that library is installed; false: it is not. */
bool opponent_openblas(const struct opponent *opponent, uint32_t threads);

#endif
