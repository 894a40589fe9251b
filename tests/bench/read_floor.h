/* SPDX-License-Identifier: Apache-2.0 */
/* read_floor.h - how long it takes to read bytes and do next to nothing with them: below that no
 * kernel gets.  AVX-512, all threads of the team. */
#ifndef KV_TESTS_BENCH_READ_FLOOR_H
#define KV_TESTS_BENCH_READ_FLOOR_H

#include <stddef.h>

#include "tests/bench/team.h"

/* Reads whole cache lines; memory is 64-byte aligned. */
void read_floor(struct team *team, const void *memory, size_t bytes);

#endif
