/* SPDX-License-Identifier: Apache-2.0 */
/* page_check.h - may a packed page from outside be let in?
 *
 * A client that puts packed pages says what their bits mean, and kernels index by them.  So before
 * a page is stored, everything in it that is not a code is looked at: mixes exist, an order is a
 * permutation, numbers are finite.  Codes may be anything.
 *
 * Threads.  [any thread]  Pure.
 */
#ifndef KV_SERVICE_PAGE_CHECK_H
#define KV_SERVICE_PAGE_CHECK_H

#include "kernels/page.h"

/* NULL: it may.  Otherwise what is wrong, in words; head: of which KV head. */
const char *page_check(const struct kv_shape *shape, const uint8_t *page, uint32_t *head);

#endif
