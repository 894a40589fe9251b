/* SPDX-License-Identifier: Apache-2.0 */
/* main.c - the daemon: opens the rooms in order, runs, and closes them in the other.
 *
 *    main thread     opens device, store, engine, rpc; then is the engine thread
 *    signal thread   sleeps in sigwait; SIGTERM and SIGINT drain, the second one hurries
 *
 * Exit codes:  0 stopped as asked   1 stopped, but calls had to be cut off   2 the configuration
 * is wrong   3 it could not start (the log says why)
 */
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include "kernels/device.h"
#include "proto/kv_check.h"
#include "service/config.h"
#include "service/engine.h"
#include "service/log.h"
#include "service/rpc/rpc.h"
#include "service/version.h"
#include "storage/store.h"

/* A decode step goes through all layers in less; until then what it uses stays on the GPU. */
enum { GPU_KEEP_MS = 50 };

enum { EXIT_DONE = 0, EXIT_CUT_OFF = 1, EXIT_CONFIG = 2, EXIT_START = 3 };

struct daemon {
    struct kv_config config;
    struct kv_device *device;
    struct kv_store *store;
    struct kv_engine *engine;
    struct kv_rpc *rpc;
    sigset_t signals;
    pthread_t drainer;
    bool polite;
};

/* Messages come and go in pieces of 64 KiB.  With the stock settings malloc gives such memory back to
 * the kernel and faults it in again for every message: half of the throughput is lost to that. */
static void tune_malloc(void) {
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 64 << 20);
    mallopt(M_TOP_PAD, 16 << 20);
}

/* As many descriptors as we are allowed: one connection is two. */
static void raise_descriptors(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0) return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

/* ---- Opening ---------------------------------------------------------------------------------------- */

static enum kv_status open_device(struct daemon *daemon, char *why) {
    struct kv_device_options options = {.name    = daemon->config.backend,
                                        .workers = daemon->config.workers};
    enum kv_status status = kv_device_open(&options, &daemon->device);
    if (status != KV_OK)
        snprintf(why, KV_CONFIG_WHY_MAX, "backend %s: %s", options.name,
                 status == KV_INVALID     ? "there is no such backend"
                 : status == KV_NOT_FOUND ? kv_device_missing(options.name)
                                          : "not enough memory or threads");
    return status;
}

static enum kv_status open_store(struct daemon *daemon, char *why) {
    const struct kv_config *config = &daemon->config;
    struct kv_store_options options = {
        .device        = daemon->device,
        .arena_bytes   = config->arena_bytes,
        .blocks_max    = config->blocks_max,
        .path          = config->disk_path[0] ? config->disk_path : NULL,
        .disk_bytes    = config->disk_bytes,
        .segment_bytes = config->segment_bytes,
        .io_depth      = config->io_depth,
        .io_threads    = config->io_threads,
        .sync_ms       = config->sync_ms,
    };
    enum kv_status status = kv_store_open(&options, &daemon->store, why, KV_CONFIG_WHY_MAX);
    if (status != KV_OK) return status;
    const struct kv_store_stats *stats = kv_store_stats(daemon->store);
    const char *reason = kv_store_io_reason(daemon->store);
    kv_log(KV_LOG_INFO, "store: %s%s%s; recovered %llu blocks in %llu ms after a %s stop",
           kv_store_io_engine(daemon->store), reason[0] ? ", because " : "", reason,
           (unsigned long long)stats->recovered_blocks,
           (unsigned long long)stats->recovery_us / 1000, stats->recovery_clean ? "clean" : "hard");
    return KV_OK;
}

static enum kv_status open_engine(struct daemon *daemon, char *why) {
    const struct kv_config *config = &daemon->config;
    struct kv_engine_options options = {
        .device             = daemon->device,
        .store              = daemon->store,
        .gpu_arena_bytes    = config->gpu_arena_bytes,
        .gpu_keep_ms        = GPU_KEEP_MS,
        .arena_bytes        = config->arena_bytes,
        .disk_bytes         = config->disk_path[0] ? config->disk_bytes : 0,
        .blocks_max         = config->blocks_max,
        .request_count      = config->request_count,
        .staging_count      = config->staging_count,
        .message_bytes_max  = (uint32_t)config->message_bytes_max,
        .layouts_max        = config->layouts_max,
        .sessions_max       = config->sessions_max,
        .sessions_open_max  = config->sessions_open_max,
        .session_tokens_max = config->session_tokens_max,
        .tail_bytes_max     = config->tail_bytes_max,
        .session_idle_ms    = config->session_idle_ms,
        .deadline_ms_max    = config->deadline_ms_max,
    };
    return kv_engine_open(&options, &daemon->engine, why, KV_CONFIG_WHY_MAX);
}

static void daemon_close(struct daemon *daemon) {
    if (daemon->rpc) kv_rpc_close(daemon->rpc);
    if (daemon->engine) kv_engine_close(daemon->engine);
    if (daemon->store) kv_store_close(daemon->store);
    if (daemon->device) kv_device_close(daemon->device);
}

static enum kv_status daemon_open(struct daemon *daemon, char *why) {
    enum kv_status status = open_device(daemon, why);
    if (status == KV_OK) status = open_store(daemon, why);
    if (status == KV_OK) status = open_engine(daemon, why);
    if (status == KV_OK) status = kv_rpc_open(&daemon->config, daemon->engine, &daemon->rpc, why);
    if (status != KV_OK) daemon_close(daemon);
    return status;
}

/* ---- Running ---------------------------------------------------------------------------------------- */

/* The second signal while the first one drains. */
static void *hurry_run(void *context) {
    struct daemon *daemon = context;
    int signal_number;
    sigwait(&daemon->signals, &signal_number);
    kv_log(KV_LOG_WARN, "signal %d again: no more grace", signal_number);
    kv_rpc_hurry(daemon->rpc);
    return NULL;
}

static void *drain_run(void *context) {
    struct daemon *daemon = context;
    int signal_number;
    sigwait(&daemon->signals, &signal_number);
    kv_log(KV_LOG_INFO, "signal %d: stopping within %u ms", signal_number, daemon->config.grace_ms);

    pthread_t hurry;
    bool watched = pthread_create(&hurry, NULL, hurry_run, daemon) == 0;
    daemon->polite = kv_rpc_drain(daemon->rpc, daemon->config.grace_ms);
    if (watched) {
        pthread_cancel(hurry); /* sigwait is a place where a thread may be cancelled */
        pthread_join(hurry, NULL);
    }
    kv_engine_stop(daemon->engine);
    return NULL;
}

static int daemon_run(struct daemon *daemon) {
    if (pthread_create(&daemon->drainer, NULL, drain_run, daemon) != 0) {
        kv_log(KV_LOG_ERROR, "kivid: cannot start a thread");
        kv_rpc_drain(daemon->rpc, 0);
        daemon_close(daemon);
        return EXIT_START;
    }
    kv_log(KV_LOG_INFO, "kivid " KV_VERSION ": ready, backend %s, built with%s CUDA",
           kv_device_name(daemon->device), kv_device_knows_cuda() ? "" : "out");
    kv_engine_run(daemon->engine);
    pthread_join(daemon->drainer, NULL);
    daemon_close(daemon);
    kv_log(KV_LOG_INFO, "kivid: stopped");
    return daemon->polite ? EXIT_DONE : EXIT_CUT_OFF;
}

/* True if the command line asked for something that is printed, and it was. */
static bool wish_granted(enum kv_config_wish wish) {
    if (wish == KV_WISH_HELP) kv_config_help(stdout);
    if (wish == KV_WISH_EXAMPLE) kv_config_example(stdout);
    if (wish == KV_WISH_VERSION) printf("kivid %s, built with%s CUDA\n", KV_VERSION, kv_device_knows_cuda() ? "" : "out");
    return wish == KV_WISH_HELP || wish == KV_WISH_EXAMPLE || wish == KV_WISH_VERSION;
}

int main(int argc, char **argv) {
    static struct daemon daemon;
    char why[KV_CONFIG_WHY_MAX] = "";
    enum kv_config_wish wish;

    tune_malloc();
    enum kv_status status =
        kv_config_load(&daemon.config, argc, (const char **)argv, &wish, why);
    if (wish_granted(wish)) return EXIT_DONE;
    if (status != KV_OK) {
        fprintf(stderr, "kivid: %s\n", why);
        return EXIT_CONFIG;
    }
    if (wish == KV_WISH_CHECK) {
        kv_config_print(&daemon.config, stdout);
        return EXIT_DONE;
    }
    kv_log_start((enum kv_log_level)daemon.config.log_level,
                daemon.config.log_format == KV_LOG_JSON);
    raise_descriptors();

    /* Blocked before any thread exists, so that all inherit it and only sigwait sees them. */
    sigemptyset(&daemon.signals);
    sigaddset(&daemon.signals, SIGTERM);
    sigaddset(&daemon.signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &daemon.signals, NULL);
    signal(SIGPIPE, SIG_IGN);

    status = daemon_open(&daemon, why);
    if (status != KV_OK) {
        kv_log(KV_LOG_ERROR, "kivid: cannot start: %s", why);
        return EXIT_START;
    }
    return daemon_run(&daemon);
}
