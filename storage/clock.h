/* SPDX-License-Identifier: Apache-2.0 */
/* clock.h - the monotonic clock in microseconds: the only time that storage/ knows. */
#ifndef KV_STORAGE_CLOCK_H
#define KV_STORAGE_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline uint64_t kv_clock_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

#endif
