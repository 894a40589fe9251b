/* SPDX-License-Identifier: Apache-2.0 */
/* bench.h - one shape for every measurement.
 *
 *   {"bench", "machine", "commit", "rows": [{"name", "ours", "opponent", "opponent_name", "unit",
 *    "ratio", "goal", "met"}]}
 *
 * Ours and the opponent's are medians of at least five runs each, taken in turn in one process's
 * life; a ratio above 1 means that ours is better.  A row without goal is a report: goal and met are
 * null, and without opponent the ratio too.
 */
#ifndef KIVI_CLIENTS_CLI_BENCH_H
#define KIVI_CLIENTS_CLI_BENCH_H

#include "clients/cli/kivictl.h"

enum { BENCH_RUNS = 5, BENCH_RUNS_MAX = 101, BENCH_ROWS_MAX = 16 };

struct bench_row {
    const char *name, *opponent_name, *unit;
    double ours, opponent; /* opponent 0: a report without one */
    bool less_is_better;
    double goal;           /* of the ratio */
};

struct bench {
    const char *name;
    struct bench_row rows[BENCH_ROWS_MAX];
    int row_count;
};

void bench_row(struct bench *bench, struct bench_row row);

/* Prints table or JSON; EXIT_MISSED if a goal was missed. */
int bench_print(struct ctl *ctl, const struct bench *bench);

double bench_median(double *values, int count); /* sorts them */

/* Numbers that look like keys and values: fp16 of magnitude below 2, the same every time. */
void bench_fill(uint16_t *halves, size_t count);

#endif
