/* SPDX-License-Identifier: Apache-2.0 */
/* tensors.h - options and steps that the commands on tensors share. */
#ifndef KIVI_CLIENTS_CLI_TENSORS_H
#define KIVI_CLIENTS_CLI_TENSORS_H

#include "clients/cli/kivictl.h"
#include "clients/cli/kvfile.h"

/* Which layout a file gets. */
struct layout_options {
    char *codec, *model;
    int window_tokens, sink_blocks; /* -1: what the codec suggests */
};
#define LAYOUT_OPTIONS_INIT { NULL, NULL, -1, -1 }
#define LAYOUT_OPTIONS(options)                                                                \
    {"codec", 0, POPT_ARG_STRING, &(options).codec, 0,                                         \
     "raw16, kivi2-paper, kivi4-paper, kivi2.5, kivi2, kivi1.75, kivi1.5 (kivi2)", "PRESET"},  \
    {"model", 0, POPT_ARG_STRING, &(options).model, 0, "name of the model (\"\")", "NAME"},    \
    {"window", 0, POPT_ARG_INT, &(options).window_tokens, 0,                                   \
     "newest tokens never packed (as the codec suggests)", "TOKENS"},                          \
    {"sinks", 0, POPT_ARG_INT, &(options).sink_blocks, 0,                                      \
     "first blocks never packed (as the codec suggests)", "BLOCKS"}

/* Registers the layout of a file.  False: ctl->error. */
bool layout_of_file(struct ctl *ctl, const struct kvfile *kv,
                    const struct layout_options *options, struct kivi_layout_info *info);

/* Opens a session by name that must exist.  False: ctl->error. */
bool session_existing(struct ctl *ctl, const char *name, const char *salt,
                      struct kivi_session **session, struct kivi_session_state *state,
                      bool *was_open);

/* Leaves it as it was found: open if somebody else has it open, closed otherwise, so that a command
 * leaves no tail in the service's memory. */
void session_leave(struct kivi_session *session, bool was_open);

/* Memory, or the end: kivictl has nothing to fall back on. */
void *ctl_alloc(size_t bytes);

#endif
