/* SPDX-License-Identifier: Apache-2.0 */
/* published.h - a MINMAX page as KIVI's reference code holds it, and back.
 *
 * The published layout, for one page of H KV heads, T = 128 tokens, D channels, width w and
 * group g; code j of a 32-bit word stands in bits [w j, w j + w):
 *
 *   key_codes     [H][D][T w / 32]     consecutive tokens of a channel
 *   key_scale     [H][D][T / g]        key_min alike
 *   value_codes   [H][T][D w / 32]     consecutive channels of a token
 *   value_scale   [H][T][D / g]        value_min alike
 *
 * Scales and minima are 16-bit elements of the shape's dtype.  A longer cache is such pages
 * side by side along T.  Both ways are exact and lose nothing: a page exported and imported
 * is the same page to the byte.
 *
 * Threads.  Any.  Memory.  The caller's, host memory; nothing allocates.
 * Errors.   None: shape.codec must be MINMAX and valid, which is checked.  What is imported
 *           may be anything; ask kv_page_valid() before using it.
 */
#ifndef KV_KERNELS_PUBLISHED_H
#define KV_KERNELS_PUBLISHED_H

#include "kernels/page.h"

struct kv_published {
    uint32_t *key_codes;
    uint16_t *key_scale;
    uint16_t *key_min;
    uint32_t *value_codes;
    uint16_t *value_scale;
    uint16_t *value_min;
};

/* Elements of key_codes (keys true) or value_codes: 32-bit words. */
size_t kv_published_words(const struct kv_shape *shape, bool keys);

/* Elements of key_scale and of key_min, which is also those of value_scale and value_min. */
size_t kv_published_groups(const struct kv_shape *shape);

/* Every element of every array is written. */
void kv_published_export(const struct kv_shape *shape, const void *page,
                         const struct kv_published *out);

/* Every byte of the page, kv_page_bytes(), is written; in is only read. */
void kv_published_import(const struct kv_shape *shape, const struct kv_published *in,
                         void *page);

#endif
