/* SPDX-License-Identifier: Apache-2.0 */
/* simulation.c - see simulation.h. */
#include "tests/kernels/simulation.h"

#include <math.h>
#include <stdlib.h>

enum { T = KV_BLOCK_TOKENS, D_MAX = KV_HEAD_DIM_MAX };

/* To the nearest of a format with `fraction` bits behind the leading one and a smallest step. */
static double round_to(double x, int fraction, double smallest) {
    if (x == 0) return 0;
    int exponent;
    frexp(x, &exponent);
    double step = fmax(ldexp(1, exponent - 1 - fraction), smallest);
    return nearbyint(x / step) * step;
}

static double half(double x) {
    return round_to(x, 10, 0x1p-24);
}

static double e4m3(double x) {
    return fmin(round_to(x, 3, 0x1p-9), 448);
}

/* ---- one group: the range with the least error once slope and mean are right ---------------- */

struct group {
    double scale;
    double mean;
    double mean_code;
    uint8_t codes[D_MAX];
};

static void group_candidate(const double *x, uint32_t n, uint32_t bits, double low, double step,
                            double mean, uint8_t *codes) {
    int top = (1 << bits) - 1;
    for (uint32_t i = 0; i < n; i++) {
        double code = bits == 1 ? x[i] > mean : nearbyint((x[i] - low) / fmax(step, 1e-8));
        codes[i] = (uint8_t)fmin(fmax(code, 0), top);
    }
}

static struct group group_choose(const double *x, uint32_t n, uint32_t bits) {
    static const double shares[4] = {0, .08, .16, .24};
    double low = x[0], high = x[0], mean = 0, power = 0, least = INFINITY;
    for (uint32_t i = 0; i < n; i++) {
        low = fmin(low, x[i]);
        high = fmax(high, x[i]);
        mean += x[i] / n;
    }
    for (uint32_t i = 0; i < n; i++) power += (x[i] - mean) * (x[i] - mean);
    power = fmax(power, 1e-12);
    double span = high - low;
    struct group best = {.mean = mean};
    for (uint32_t candidate = 0; candidate < (bits == 1 ? 1 : 16); candidate++) {
        double a = shares[candidate / 4], b = shares[candidate % 4];
        uint8_t codes[D_MAX];
        group_candidate(x, n, bits, low + a * span, (1 - a - b) * span / ((1 << bits) - 1), mean,
                        codes);
        double mean_code = 0, product = 0, error = 0;
        for (uint32_t i = 0; i < n; i++) mean_code += (double)codes[i] / n;
        for (uint32_t i = 0; i < n; i++) product += (codes[i] - mean_code) * (x[i] - mean);
        double scale = power / fmax(product, 1e-12);
        for (uint32_t i = 0; i < n; i++)
            error += pow(scale * (codes[i] - mean_code) - (x[i] - mean), 2);
        if (!(error < least)) continue;
        least = error;
        best.scale = scale;
        best.mean_code = mean_code;
        memcpy(best.codes, codes, n);
    }
    if (span <= 1e-8) best.scale = 0;
    return best;
}

/* Scales of a page share one half-precision factor. */
static void store_scales(struct group *groups, uint32_t count) {
    double largest = 1e-8;
    for (uint32_t i = 0; i < count; i++) largest = fmax(largest, groups[i].scale);
    double factor = half(largest) / 448;
    for (uint32_t i = 0; i < count; i++)
        groups[i].scale = fmax(e4m3(groups[i].scale / factor) * factor, 1e-8);
}

/* ---- keys -------------------------------------------------------------------------------------- */

struct key_plan {
    struct group groups[5][D_MAX]; /* by width */
    double hat[5][D_MAX][T];
    double error[5][D_MAX];
    double importance[D_MAX];
    uint32_t order[D_MAX];
};

/* The simulation stores every width's scales under a factor of their own. */
static void plan_width(struct key_plan *plan, uint32_t bits, uint32_t D, double (*x)[T],
                       const float *energy) {
    for (uint32_t c = 0; c < D && bits > 0; c++) plan->groups[bits][c] = group_choose(x[c], T, bits);
    if (bits > 0) store_scales(plan->groups[bits], D);
    for (uint32_t c = 0; c < D; c++) {
        struct group *g = &plan->groups[bits][c];
        double zero = bits > 0 ? half(g->mean - g->scale * g->mean_code) : half(plan->groups[2][c].mean);
        plan->error[bits][c] = 0;
        for (uint32_t t = 0; t < T; t++) {
            plan->hat[bits][c][t] = bits > 0 ? g->codes[t] * g->scale + zero : zero;
            plan->error[bits][c] += pow(plan->hat[bits][c][t] - x[c][t], 2);
        }
        plan->error[bits][c] *= energy != NULL ? (double)energy[c] : 1;
    }
}

static void plan_order(struct key_plan *plan, uint32_t D) {
    for (uint32_t c = 0; c < D; c++) {
        uint32_t slot = c;
        for (; slot > 0 && plan->importance[plan->order[slot - 1]] < plan->importance[c]; slot--)
            plan->order[slot] = plan->order[slot - 1];
        plan->order[slot] = c;
    }
}

static void simulate_keys(const struct kv_codec *codec, uint32_t D, const double *keys,
                          const float *energy, struct simulated *out) {
    struct key_plan *plan = calloc(1, sizeof *plan);
    double(*x)[T] = calloc(D, sizeof *x);
    for (uint32_t c = 0; c < D; c++)
        for (uint32_t t = 0; t < T; t++) x[c][t] = keys[t * D + c];
    static const uint32_t widths[] = {2, 0, 1, 4}; /* 2 first: it brings the means */
    for (int i = 0; i < 4; i++) plan_width(plan, widths[i], D, x, energy);
    for (uint32_t c = 0; c < D; c++) {
        double power = 0;
        for (uint32_t t = 0; t < T; t++) power += pow(x[c][t] - plan->groups[2][c].mean, 2);
        plan->importance[c] = power * (energy != NULL ? (double)energy[c] : 1);
    }
    plan_order(plan, D);

    uint32_t best = 0;
    double least = INFINITY;
    for (uint32_t m = 0; m < codec->mix_count; m++) {
        double cost = 0;
        for (uint32_t slot = 0; slot < D; slot++)
            cost += plan->error[codec->mixes[m][slot / (D / 4)]][plan->order[slot]];
        if (!(cost < least)) continue;
        least = cost;
        best = m;
    }
    for (uint32_t slot = 0; slot < D; slot++) {
        uint32_t c = plan->order[slot], width = codec->mixes[best][slot / (D / 4)];
        out->key_width[c] = (uint8_t)width;
        for (uint32_t t = 0; t < T; t++) {
            out->keys[t * D + c] = plan->hat[width][c][t];
            out->key_codes[c * T + t] = width > 0 ? plan->groups[width][c].codes[t] : 0;
        }
    }
    free(plan);
    free(x);
}

/* ---- values ------------------------------------------------------------------------------------- */

/* y <- y H / sqrt D; H by the parity of i & j.  D is a power of two in all that was simulated. */
static void rotate(double *y, uint32_t D) {
    double out[D_MAX] = {0};
    for (uint32_t i = 0; i < D; i++)
        for (uint32_t j = 0; j < D; j++)
            out[i] += (__builtin_popcount(i & j) & 1 ? -y[j] : y[j]) / sqrt(D);
    memcpy(y, out, D * sizeof *y);
}

static void simulate_values(const struct kv_codec *codec, uint32_t D, const double *values,
                            struct simulated *out) {
    double mean[D_MAX] = {0};
    struct group *groups = calloc(T, sizeof *groups);
    for (uint32_t c = 0; c < D; c++) {
        for (uint32_t t = 0; t < T; t++) mean[c] += values[t * D + c] / T;
        mean[c] = half(mean[c]);
    }
    for (uint32_t t = 0; t < T; t++) {
        double y[D_MAX];
        for (uint32_t c = 0; c < D; c++) y[c] = values[t * D + c] - mean[c];
        if (codec->value_rotated) rotate(y, D);
        groups[t] = group_choose(y, D, codec->value_bits);
    }
    store_scales(groups, T);
    for (uint32_t t = 0; t < T; t++) {
        struct group *g = &groups[t];
        double quarter = g->scale / 4, *row = out->values + t * D;
        double zero = nearbyint((g->mean - g->scale * g->mean_code) / quarter);
        zero = fmin(fmax(zero, -128), 127) * quarter;
        for (uint32_t c = 0; c < D; c++) {
            row[c] = g->codes[c] * g->scale + zero;
            out->value_codes[t * D + c] = g->codes[c];
        }
        if (codec->value_rotated) rotate(row, D);
        for (uint32_t c = 0; c < D; c++) row[c] += mean[c];
    }
    free(groups);
}

void simulate_page(const struct kv_codec *codec, uint32_t head_dim, const double *keys,
                   const double *values, const float *energy, struct simulated *out) {
    simulate_keys(codec, head_dim, keys, energy, out);
    simulate_values(codec, head_dim, values, out);
}
