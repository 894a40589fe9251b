/* SPDX-License-Identifier: Apache-2.0 */
/* config.h - what the daemon was told, by whom, and whether it makes sense.
 *
 * One table (config.c) says everything about every key: type, default, range, help.  The flags,
 * the environment's names, the YAML reader, --help and the commented example deploy/kivid.yaml
 * all come from it.  A key `arena_bytes` is
 *
 *     --arena-bytes 4GiB   over   KIVID_ARENA_BYTES=4GiB   over   arena_bytes: 4GiB   over default
 *
 * An unknown key in a file and an unknown flag are errors that name the line; so is a value that
 * does not parse or is out of range.  An unknown KIVID_ name in the environment is not: a cluster
 * puts names of its own there (KIVID_SERVICE_HOST, for a service called kivid).
 *
 * Every limit of the daemon is here.  kv_config_memory() adds up what they allow it to occupy.
 *
 * Threads.  One, at start.  Afterwards the configuration is read only.
 */
#ifndef KV_SERVICE_CONFIG_H
#define KV_SERVICE_CONFIG_H

#include <stdio.h>

#include "proto/kv_types.h"

enum {
    KV_CONFIG_TEXT_MAX = 256,   /* bytes of a text value, its end included */
    KV_CONFIG_KEYS_MAX = 64,
    KV_CONFIG_WHY_MAX = 512,    /* bytes of an explanation */
    KV_CONFIG_FILE_MAX = 1 << 20,
    KV_CONFIG_REQUEST_BYTES = 32 << 10, /* of the engine's struct kv_request, rounded up */
};

enum kv_log_format { KV_LOG_TEXT = 0, KV_LOG_JSON = 1 };

struct kv_config {
    /* Who may reach it. */
    char listen[KV_CONFIG_TEXT_MAX];     /* unix:///path, or "": no unix socket */
    char listen_tcp[KV_CONFIG_TEXT_MAX]; /* address:port, or "" */
    bool tcp_insecure;
    /* Where the bytes are. */
    uint64_t arena_bytes;
    uint64_t gpu_arena_bytes;            /* of the device's own memory */
    char disk_path[KV_CONFIG_TEXT_MAX];  /* "": nothing is ever on disk */
    uint64_t disk_bytes, segment_bytes;
    uint32_t blocks_max;
    uint32_t io_depth;
    bool io_threads;
    uint32_t sync_ms;
    /* What computes. */
    char backend[KV_CONFIG_TEXT_MAX];
    uint32_t workers;
    /* How much at once. */
    uint32_t layouts_max, sessions_max, sessions_open_max, session_tokens_max;
    uint64_t tail_bytes_max;
    uint32_t session_idle_ms;
    uint32_t request_count, staging_count;
    uint64_t message_bytes_max;
    uint32_t connections_max, streams_max, calls_max;
    uint64_t rpc_bytes_max;
    uint32_t rpc_threads, spin_us;
    /* How long. */
    uint32_t deadline_ms_max, stall_ms, grace_ms;
    /* What it says. */
    uint32_t log_level;  /* enum kv_log_level */
    uint32_t log_format; /* enum kv_log_format */

    /* Where each value came from, in the table's order: "default", "kivid.yaml:12",
     * "KIVID_WORKERS", "--workers". */
    char sources[KV_CONFIG_KEYS_MAX][KV_CONFIG_TEXT_MAX];
};

/* What the command line asks for besides running. */
enum kv_config_wish {
    KV_WISH_RUN,
    KV_WISH_CHECK,   /* --check-config */
    KV_WISH_HELP,    /* --help */
    KV_WISH_EXAMPLE, /* --example-config */
    KV_WISH_VERSION, /* --version */
};

void kv_config_defaults(struct kv_config *config);

/* Sets one key by name from a text; `source` is remembered.  KV_NOT_FOUND: no such key.
 * KV_INVALID.  `why` (KV_CONFIG_WHY_MAX) says it in words without naming the source. */
enum kv_status kv_config_set(struct kv_config *config, const char *key, const char *value,
                             const char *source, char *why);

/* Everything in a YAML text: one mapping of scalars.  `name` is the file's, for messages.
 * KV_INVALID: `why` begins with "name:line: ". */
enum kv_status kv_config_yaml(struct kv_config *config, const char *name, const uint8_t *text,
                              size_t bytes, char *why);

/* Defaults, then the file (--config, or KIVID_CONFIG, or /etc/kivid/kivid.yaml if it exists),
 * the environment and the flags; then checks what only makes sense together. */
enum kv_status kv_config_load(struct kv_config *config, int argc, const char **argv,
                              enum kv_config_wish *wish, char *why);

/* What no single key can be blamed for alone.  KV_INVALID. */
enum kv_status kv_config_check(const struct kv_config *config, char *why);

/* The most resident memory this configuration allows, in bytes, and its parts. */
struct kv_config_memory {
    uint64_t arena, staging, requests, transport, calls, index, fixed, total;
};
struct kv_config_memory kv_config_memory(const struct kv_config *config);

void kv_config_print(const struct kv_config *config, FILE *out);   /* --check-config */
void kv_config_example(FILE *out);                                 /* --example-config */
void kv_config_help(FILE *out);                                    /* --help */

/* ---- The table, for the readers of flags and environment ------------------------------------ */

size_t kv_config_key_count(void);
const char *kv_config_key(size_t index);
bool kv_config_key_is_flag(size_t index); /* a boolean: its flag may stand without a value */

#endif
