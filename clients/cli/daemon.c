/* SPDX-License-Identifier: Apache-2.0 */
/* daemon.c - starting, stopping and forgetting a kivid. */
#include "clients/cli/daemon.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { START_SECONDS = 60, STOP_SECONDS = 30, PAUSE_NS = 5000000 };

extern char **environ;

static void pause_briefly(void) {
    struct timespec pause = {0, PAUSE_NS};
    nanosleep(&pause, NULL);
}

bool program_find(const char *name, const char *bazel_path, char *path, size_t path_bytes) {
    char self[DAEMON_PATH_BYTES];
    ssize_t bytes = readlink("/proc/self/exe", self, sizeof self - 1);
    if (bytes > 0) {
        self[bytes] = 0;
        char *slash = strrchr(self, '/');
        if (slash) *slash = 0;
        snprintf(path, path_bytes, "%s/%s", self, name);
        if (access(path, X_OK) == 0) return true;
        snprintf(path, path_bytes, "%s/../../%s", self, bazel_path);
        if (access(path, X_OK) == 0) return true;
    }
    const char *directories = getenv("PATH");
    while (directories && *directories) {
        size_t length = strcspn(directories, ":");
        snprintf(path, path_bytes, "%.*s/%s", (int)length, directories, name);
        if (access(path, X_OK) == 0) return true;
        directories += length + (directories[length] == ':');
    }
    return false;
}

bool daemon_prepare(struct ctl *ctl, struct daemon *daemon, const char *binary,
                    const char *parent) {
    memset(daemon, 0, sizeof *daemon);
    if (binary) {
        snprintf(daemon->binary, sizeof daemon->binary, "%s", binary);
    } else if (!program_find("kivid", "service/kivid", daemon->binary, sizeof daemon->binary)) {
        ctl_say(ctl, EXIT_USAGE, "kivid is not beside kivictl; build it: bazel build "
                                 "//service:kivid, or name it with --kivid");
        return false;
    }
    if (!parent) parent = getenv("TMPDIR");
    snprintf(daemon->dir, sizeof daemon->dir, "%s/kivictl-XXXXXX", parent ? parent : "/tmp");
    if (!mkdtemp(daemon->dir)) {
        ctl_say(ctl, EXIT_REFUSED, "%s: %s", daemon->dir, strerror(errno));
        daemon->dir[0] = 0;
        return false;
    }
    snprintf(daemon->target, sizeof daemon->target, "unix://%s/kivid.sock", daemon->dir);
    return true;
}

static void log_show(const struct daemon *daemon) {
    char path[DAEMON_PATH_BYTES + 16], line[512];
    snprintf(path, sizeof path, "%s/kivid.log", daemon->dir);
    FILE *file = fopen(path, "r");
    while (file && fgets(line, sizeof line, file)) fprintf(stderr, "  %s", line);
    if (file) fclose(file);
}

static bool daemon_spawn(struct daemon *daemon, const char *const *flags) {
    unlink(daemon->target + strlen("unix://")); /* a killed one leaves its socket */
    char listen[DAEMON_PATH_BYTES + 96], disk[DAEMON_PATH_BYTES + 32];
    char log[DAEMON_PATH_BYTES + 16];
    snprintf(listen, sizeof listen, "--listen=%s", daemon->target);
    snprintf(disk, sizeof disk, "--disk-path=%s/data", daemon->dir);
    snprintf(log, sizeof log, "%s/kivid.log", daemon->dir);
    const char *arguments[DAEMON_FLAGS_MAX + 4] = {daemon->binary, listen, disk};
    int count = 3;
    for (int i = 0; flags && flags[i] && i < DAEMON_FLAGS_MAX; i++) arguments[count++] = flags[i];

    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, 1, log, O_CREAT | O_WRONLY | O_APPEND, 0600);
    posix_spawn_file_actions_adddup2(&files, 1, 2);
    int failed = posix_spawn(&daemon->pid, daemon->binary, &files, NULL, (char **)arguments, environ);
    posix_spawn_file_actions_destroy(&files);
    if (failed) daemon->pid = 0;
    return !failed;
}

/* Asks until it is ready, has ended, or the time is over.  Not before there is a socket: a connection
 * that was refused is not tried again at once. */
static bool daemon_wait(struct ctl *ctl, struct daemon *daemon) {
    struct kivi_options options = KIVI_OPTIONS_INIT;
    options.target = daemon->target;
    options.spin_us = (uint32_t)ctl->spin_us;
    options.timeout_ms = (uint32_t)ctl->timeout_ms;
    if (kivi_client_open(&options, &daemon->client, &ctl->error)) return false;
    double until = ctl_seconds() + START_SECONDS;
    while (ctl_seconds() < until) {
        bool serving, listens = access(daemon->target + strlen("unix://"), F_OK) == 0;
        if (listens && kivi_client_ping(daemon->client, "", &serving, 1000, NULL) == KIVI_OK &&
            serving)
            return true;
        if (waitpid(daemon->pid, NULL, WNOHANG) == daemon->pid) {
            daemon->pid = 0;
            return false;
        }
        pause_briefly();
    }
    return false;
}

bool daemon_start(struct ctl *ctl, struct daemon *daemon, const char *const *flags) {
    if (daemon_spawn(daemon, flags) && daemon_wait(ctl, daemon)) return true;
    ctl_say(ctl, EXIT_REFUSED, "%s did not get ready; its log:", daemon->binary);
    log_show(daemon);
    daemon_stop(daemon, SIGKILL);
    return false;
}

void daemon_stop(struct daemon *daemon, int signal_number) {
    kivi_client_close(daemon->client);
    daemon->client = NULL;
    if (daemon->pid == 0) return;
    kill(daemon->pid, signal_number);
    double until = ctl_seconds() + STOP_SECONDS;
    while (waitpid(daemon->pid, NULL, WNOHANG) == 0) {
        pause_briefly();
        if (ctl_seconds() > until) kill(daemon->pid, SIGKILL);
    }
    daemon->pid = 0;
}

static int entry_remove(const char *path, const struct stat *status, int kind, struct FTW *walk) {
    remove(path);
    return 0;
}

void directory_remove(const char *path) {
    nftw(path, entry_remove, 16, FTW_DEPTH | FTW_PHYS);
}

void daemon_remove(struct daemon *daemon) {
    daemon_stop(daemon, SIGKILL);
    if (daemon->dir[0]) directory_remove(daemon->dir);
}
