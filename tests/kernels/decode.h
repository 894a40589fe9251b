/* SPDX-License-Identifier: Apache-2.0 */
/* decode.h - reads packed pages by the formulas of page.h, one code at a time, in binary64.
 *
 * Written apart from kernels/, so that tests hold two readings of the same prose together.
 */
#ifndef KV_TESTS_KERNELS_DECODE_H
#define KV_TESTS_KERNELS_DECODE_H

#include "kernels/page.h"

/* The code of K at (slot, token), of V at (token, channel), of one head record. */
uint32_t decode_key_code(const struct kv_shape *shape, const uint8_t *record, uint32_t slot,
                         uint32_t token);
uint32_t decode_value_code(const struct kv_shape *shape, const uint8_t *record, uint32_t token,
                           uint32_t channel);

/* x^ of one head, [128][head_dim] each, exact up to binary64 (rotation included). */
void decode_record(const struct kv_shape *shape, const uint8_t *record, double *keys,
                   double *values);

/* A raw page's head, likewise. */
void decode_raw(const struct kv_shape *shape, const uint16_t *raw, uint32_t head, double *keys,
                double *values);

/* 16-bit patterns and e4m3 by definition: ldexp of the fields. */
double decode_element(uint16_t element, uint8_t dtype);
double decode_e4m3(uint8_t byte);

#endif
