/* SPDX-License-Identifier: Apache-2.0 */
/* benches.h - the measurements kivictl makes itself, for the table that lists them. */
#ifndef KIVI_CLIENTS_CLI_BENCHES_H
#define KIVI_CLIENTS_CLI_BENCHES_H

#include "clients/cli/kivictl.h"

int run_bench_put(struct ctl *ctl, int argc, const char **argv);
int run_bench_step(struct ctl *ctl, int argc, const char **argv);
int run_bench_restart(struct ctl *ctl, int argc, const char **argv);

#endif
