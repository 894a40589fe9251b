/* SPDX-License-Identifier: Apache-2.0 */
/* opponent_fp32.c - attention on binary32 keys and values: our own, and OpenBLAS's products. */
#include <dlfcn.h>
#include <immintrin.h>
#include <stdint.h>

typedef float element;

static inline __m512 load(const element *from) {
    return _mm512_loadu_ps(from);
}

#include "tests/bench/opponent_blocked.h"

bool opponent_available(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("fma");
}

uint64_t opponent_scratch_floats(uint32_t heads, uint32_t tokens) {
    uint64_t scores = (uint64_t)G * tokens, states = (uint64_t)heads * OPPONENT_SPLITS_MAX * STATE;
    return scores > states ? scores : states;
}

void opponent_fp32(const struct opponent *opponent) {
    blocked(opponent);
}

/* ---- OpenBLAS, found when the program runs: nothing here is built against it ---- */

enum { ROW_MAJOR = 101, NO_TRANSPOSE = 111, TRANSPOSE = 112 };
typedef void sgemm_function(int order, int transpose_a, int transpose_b, int m, int n, int k,
                            float alpha, const float *a, int lda, const float *b, int ldb,
                            float beta, float *c, int ldc);

static void soften(float *score, uint32_t tokens) {
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (uint32_t t = 0; t < tokens; t += 16)
        most = _mm512_max_ps(most, _mm512_loadu_ps(score + t));
    __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (uint32_t t = 0; t < tokens; t += 16) {
        __m512 p = exp_vector(_mm512_sub_ps(_mm512_loadu_ps(score + t), maximum));
        _mm512_storeu_ps(score + t, p);
        total = _mm512_add_ps(total, p);
    }
    __m512 scale = _mm512_set1_ps(1 / _mm512_reduce_add_ps(total));
    for (uint32_t t = 0; t < tokens; t += 16)
        _mm512_storeu_ps(score + t, _mm512_mul_ps(_mm512_loadu_ps(score + t), scale));
}

bool opponent_openblas(const struct opponent *opponent, uint32_t threads) {
    static sgemm_function *sgemm;
    static void (*set_threads)(int);
    static bool looked;
    if (!looked) {
        looked        = true;
        void *library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
        if (library != NULL) {
            *(void **)&sgemm       = dlsym(library, "cblas_sgemm");
            *(void **)&set_threads = dlsym(library, "openblas_set_num_threads");
        }
    }
    if (sgemm == NULL || set_threads == NULL) return false;
    set_threads((int)threads);
    int tokens = (int)opponent->tokens;
    for (uint32_t head = 0; head < opponent->heads; head++) {
        uint64_t at  = (uint64_t)head * opponent->tokens * D;
        float *score = opponent->scratch;
        sgemm(ROW_MAJOR, NO_TRANSPOSE, TRANSPOSE, G, tokens, D, 1, opponent->query + head * G * D,
              D, (const float *)opponent->keys + at, D, 0, score, tokens);
        for (int g = 0; g < G; g++)
            soften(score + (uint64_t)g * opponent->tokens, opponent->tokens);
        sgemm(ROW_MAJOR, NO_TRANSPOSE, NO_TRANSPOSE, G, D, tokens, 1, score, tokens,
              (const float *)opponent->values + at, D, 0, opponent->out + head * G * D, D);
    }
    return true;
}
