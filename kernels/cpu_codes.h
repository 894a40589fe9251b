/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_codes.h - the order of codes, walked.  Private to kernels/.
 *
 * page.h says at which word, byte and bits a code stands.  These four functions move whole
 * planes between that order and plain arrays of one code per byte:
 *
 *   keys     uint8 [slot][128 tokens]     MINMAX: slot = channel
 *   values   uint8 [128 tokens][channel]
 *
 * widths are the four quarters' widths: a mix of the codec, or key_bits four times.  Slots
 * of width 0 have no bytes: packing does not read them, unpacking gives 0.
 */
#ifndef KV_KERNELS_CPU_CODES_H
#define KV_KERNELS_CPU_CODES_H

#include "proto/kv_types.h"

void kv_codes_pack_keys(const uint8_t widths[KV_QUARTERS], uint32_t head_dim,
                        const uint8_t *codes, uint8_t *packed);
void kv_codes_unpack_keys(const uint8_t widths[KV_QUARTERS], uint32_t head_dim,
                          const uint8_t *packed, uint8_t *codes);

void kv_codes_pack_values(uint32_t width, uint32_t head_dim, const uint8_t *codes,
                          uint8_t *packed);
void kv_codes_unpack_values(uint32_t width, uint32_t head_dim, const uint8_t *packed,
                            uint8_t *codes);

#endif
