/* SPDX-License-Identifier: Apache-2.0 */
/* opponent_blocked.h - blocked decode attention in AVX-512; the including file defines
 *
 *     element           what keys and values are made of
 *     load(const element *)   sixteen of them as floats
 *
 * Per 128 tokens: scores of 4 tokens x 4 query heads at a time, sixteen sums in registers, turned
 * into four lanes each; softmax with a running maximum; then the output 64 channels x 4 heads at a
 * time, sixteen sums again.  The context is split so that every thread has work.
 */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "tests/bench/opponent.h"

enum { G = OPPONENT_GROUP, D = OPPONENT_D, BLOCK = 128, STATE = G * D + 2 * G };

/* e^x for x <= 0: 2^(x / ln 2), the fraction by a polynomial. */
static inline __m512 exp_vector(__m512 x) {
    __m512 t = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-87)), _mm512_set1_ps(1.44269504f));
    __m512 n = _mm512_roundscale_ps(t, 0);
    __m512 f = _mm512_mul_ps(_mm512_sub_ps(t, n), _mm512_set1_ps(0.69314718f));
    __m512 p = _mm512_set1_ps(1.0f / 720);
    const float c[6] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    for (int i = 0; i < 6; i++)
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c[i]));
    return _mm512_scalef_ps(p, n);
}

/* Sums of four vectors, as four floats. */
static inline __m128 sum_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 s  = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 t  = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
    return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
}

static inline void block_scores(const element *keys, const float *query, float score[G][BLOCK]) {
    for (uint32_t t = 0; t < BLOCK; t += 4) {
        __m512 sum[G][4];
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sum[g][j] = _mm512_setzero_ps();
        for (uint32_t c = 0; c < D; c += 16) {
            __m512 k[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                k[j] = load(keys + (t + j) * D + c);
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                __m512 q = _mm512_loadu_ps(query + g * D + c);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    sum[g][j] = _mm512_fmadd_ps(q, k[j], sum[g][j]);
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
            _mm_storeu_ps(score[g] + t, sum_four(sum[g][0], sum[g][1], sum[g][2], sum[g][3]));
    }
}

static inline void block_values(const element *values, float p[G][BLOCK], const float *fade,
                                float *out) {
    for (uint32_t c = 0; c < D; c += 64) {
        __m512 sum[G][4];
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sum[g][j] = _mm512_mul_ps(_mm512_loadu_ps(out + g * D + c + 16 * j),
                                          _mm512_set1_ps(fade[g]));
        for (uint32_t t = 0; t < BLOCK; t++) {
            __m512 v[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                v[j] = load(values + t * D + c + 16 * j);
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                __m512 weight = _mm512_set1_ps(p[g][t]);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    sum[g][j] = _mm512_fmadd_ps(weight, v[j], sum[g][j]);
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                _mm512_storeu_ps(out + g * D + c + 16 * j, sum[g][j]);
    }
}

/* state: out [G][D], then maximum [G] and sum [G] of the stretch. */
static void stretch(const element *keys, const element *values, uint32_t tokens, const float *query,
                    float *state) {
    float *maximum = state + G * D, *sum = maximum + G;
    memset(state, 0, STATE * sizeof(float));
    for (int g = 0; g < G; g++)
        maximum[g] = -INFINITY;
    for (uint32_t t = 0; t < tokens; t += BLOCK) {
        float score[G][BLOCK], fade[G];
        block_scores(keys + (uint64_t)t * D, query, score);
        for (int g = 0; g < G; g++) {
            __m512 most = _mm512_set1_ps(maximum[g]), total = _mm512_setzero_ps();
            for (uint32_t i = 0; i < BLOCK; i += 16)
                most = _mm512_max_ps(most, _mm512_loadu_ps(score[g] + i));
            float now = _mm512_reduce_max_ps(most);
            for (uint32_t i = 0; i < BLOCK; i += 16) {
                __m512 p =
                    exp_vector(_mm512_sub_ps(_mm512_loadu_ps(score[g] + i), _mm512_set1_ps(now)));
                _mm512_storeu_ps(score[g] + i, p);
                total = _mm512_add_ps(total, p);
            }
            fade[g]    = expf(maximum[g] - now);
            sum[g]     = sum[g] * fade[g] + _mm512_reduce_add_ps(total);
            maximum[g] = now;
        }
        block_values(values + (uint64_t)t * D, score, fade, state);
    }
}

struct split {
    const struct opponent *opponent;
    uint32_t parts, tokens; /* of one head; of one part */
};

static void split_part(void *context, uint32_t index) {
    const struct split *split       = context;
    const struct opponent *opponent = split->opponent;
    uint32_t head = index / split->parts, first = index % split->parts * split->tokens;
    uint64_t at   = ((uint64_t)head * opponent->tokens + first) * D;
    uint32_t left = opponent->tokens - first;
    stretch((const element *)opponent->keys + at, (const element *)opponent->values + at,
            left < split->tokens ? left : split->tokens, opponent->query + head * G * D,
            opponent->scratch + (uint64_t)index * STATE);
}

static void join(const struct opponent *opponent, const struct split *split) {
    for (uint32_t head = 0; head < opponent->heads; head++)
        for (int g = 0; g < G; g++) {
            const float *states = opponent->scratch + (uint64_t)head * split->parts * STATE;
            float *out = opponent->out + (head * G + (uint32_t)g) * D, maximum = -INFINITY, sum = 0;
            for (uint32_t i = 0; i < split->parts; i++)
                maximum = fmaxf(maximum, states[i * STATE + G * D + g]);
            memset(out, 0, D * sizeof *out);
            for (uint32_t i = 0; i < split->parts; i++) {
                const float *state = states + i * STATE;
                float weight       = expf(state[G * D + g] - maximum);
                sum += weight * state[G * D + G + g];
                for (uint32_t c = 0; c < D; c++)
                    out[c] += weight * state[g * D + c];
            }
            for (uint32_t c = 0; c < D; c++)
                out[c] /= sum;
        }
}

static void blocked(const struct opponent *opponent) {
    uint32_t blocks    = opponent->tokens / BLOCK;
    uint32_t parts     = blocks < 8 ? blocks : 8; /* 64 parts: even shares for any few threads */
    uint32_t each      = (blocks + parts - 1) / parts;
    struct split split = {opponent, (blocks + each - 1) / each, each * BLOCK};
    team_run(opponent->team, opponent->heads * split.parts, split_part, &split);
    join(opponent, &split);
}
