/* SPDX-License-Identifier: Apache-2.0 */
/* commands_tensors.h - the commands that move tensors, for the tables that list them. */
#ifndef KIVI_CLIENTS_CLI_COMMANDS_TENSORS_H
#define KIVI_CLIENTS_CLI_COMMANDS_TENSORS_H

#include "clients/cli/kivictl.h"

int run_append(struct ctl *ctl, int argc, const char **argv);
int run_attend(struct ctl *ctl, int argc, const char **argv);
int run_fetch(struct ctl *ctl, int argc, const char **argv);

#endif
