/* SPDX-License-Identifier: Apache-2.0 */
/* simulation.h - the codecs as they were simulated before they were built.
 *
 * The figures the codecs were chosen by (perplexity, KL, attention error) came from a
 * simulation in floating point with no packed page: ranges in real numbers instead of
 * 2047ths, sums in whatever order.  This is that simulation again, in plain C and binary64,
 * one page of one KV head at a time.  It shares nothing with kernels/.
 */
#ifndef KV_TESTS_KERNELS_SIMULATION_H
#define KV_TESTS_KERNELS_SIMULATION_H

#include "proto/kv_types.h"

/* What the simulation makes of a page: x^ [128][head_dim], and for keys what was chosen. */
struct simulated {
    double *keys;
    double *values;
    uint8_t *key_codes;   /* [channel][token] */
    uint8_t *value_codes; /* [token][channel] */
    uint8_t key_width[KV_HEAD_DIM_MAX];
};

/* keys, values: [128][head_dim].  energy: [head_dim] or NULL. */
void simulate_page(const struct kv_codec *codec, uint32_t head_dim, const double *keys,
                   const double *values, const float *energy, struct simulated *out);

#endif
