/* SPDX-License-Identifier: Apache-2.0 */
/* daemon.h - a kivid of one's own, for a measurement: in a directory that goes when it goes. */
#ifndef KIVI_CLIENTS_CLI_DAEMON_H
#define KIVI_CLIENTS_CLI_DAEMON_H

#include <sys/types.h>

#include "clients/cli/kivictl.h"

enum { DAEMON_PATH_BYTES = 512, DAEMON_FLAGS_MAX = 16 };

struct daemon {
    char dir[DAEMON_PATH_BYTES];     /* holds socket, log and data */
    char binary[DAEMON_PATH_BYTES];
    char target[DAEMON_PATH_BYTES + 64];
    pid_t pid;                       /* 0: not running */
    struct kivi_client *client;      /* while it runs */
};

/* Finds a program that was built with this one: beside kivictl, in its place in Bazel's output
 * (`bazel_path`, as "service/kivid"), or in PATH.  False: nowhere. */
bool program_find(const char *name, const char *bazel_path, char *path, size_t path_bytes);

/* Makes the directory below `parent` (NULL: $TMPDIR or /tmp) and finds kivid (`binary`, or by
 * program_find).  False with the reason said. */
bool daemon_prepare(struct ctl *ctl, struct daemon *daemon, const char *binary, const char *parent);

/* Starts it with these flags besides --listen and --disk-path, NULL at the end, and waits until it
 * is ready.  False with the reason said, and its log shown. */
bool daemon_start(struct ctl *ctl, struct daemon *daemon, const char *const *flags);

/* Ends it with SIGTERM (waits for a clean stop) or SIGKILL. */
void daemon_stop(struct daemon *daemon, int signal_number);

/* Removes a directory with all that is in it. */
void directory_remove(const char *path);

/* Stops it hard if it runs and removes the directory. */
void daemon_remove(struct daemon *daemon);

#endif
