/* SPDX-License-Identifier: Apache-2.0 */
/* kv_check.h - assertions that stay on in production.
 *
 * KV_CHECK states something the code around it makes true.  When it is false
 * the program is wrong, and stopping is the only safe answer.  Conditions that
 * the outside world can cause (a request, a disk, a peer) are statuses, never
 * checks.  Conditions have no side effects.
 */
#ifndef KV_PROTO_KV_CHECK_H
#define KV_PROTO_KV_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define KV_CHECK(condition)                                                                \
    do {                                                                                   \
        if (__builtin_expect(!(condition), 0)) {                                           \
            fprintf(stderr, "%s:%d: %s: check failed: %s\n", __FILE__, __LINE__, __func__, \
                    #condition);                                                           \
            abort();                                                                       \
        }                                                                                  \
    } while (0)

#endif
