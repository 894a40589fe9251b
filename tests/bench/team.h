/* SPDX-License-Identifier: Apache-2.0 */
/* team.h - threads that run the parts of one job, for opponents and for reading memory. */
#ifndef KV_TESTS_BENCH_TEAM_H
#define KV_TESTS_BENCH_TEAM_H

#include <stdint.h>

struct team;

/* The caller is one of the threads.  Ends the program if there are no threads to be had. */
struct team *team_open(uint32_t threads);
void team_close(struct team *team);

/* Calls part(context, 0 .. parts - 1), each once, on all threads; returns when all are done. */
void team_run(struct team *team, uint32_t parts, void (*part)(void *context, uint32_t index),
              void *context);
uint32_t team_threads(const struct team *team);

#endif
