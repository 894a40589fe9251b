/* SPDX-License-Identifier: Apache-2.0 */
/* config.c - the table of keys, and what can be said from it alone.
 *
 * A new key is a member of struct kv_config and one row here; config_load.c finds flags and
 * environment in the table, config_yaml.c the keys of a file.
 */
#include "service/config.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "proto/kv_check.h"
#include "service/log.h"

enum kind {
    KIND_TEXT,   /* char [KV_CONFIG_TEXT_MAX] */
    KIND_BYTES,  /* uint64_t: a number with an optional KiB, MiB, GiB or TiB */
    KIND_COUNT,  /* uint32_t */
    KIND_BOOL,   /* bool */
    KIND_CHOICE, /* uint32_t: index into the words of `standard`'s alternatives */
};

struct key {
    const char *group; /* a heading before this key, or NULL */
    const char *name;
    enum kind kind;
    size_t offset;
    const char *standard; /* the default, as one would write it */
    uint64_t least, most; /* BYTES, COUNT */
    const char *choices;  /* CHOICE: words with spaces between */
    const char *help;
};

#define KIB (1ull << 10)
#define MIB (1ull << 20)
#define GIB (1ull << 30)
#define TIB (1ull << 40)
#define AT(member) offsetof(struct kv_config, member)

static const struct key keys[] = {
    {"Who may reach it", "listen", KIND_TEXT, AT(listen), "unix:///run/kivid/kivid.sock", 0, 0, NULL,
     "Unix socket, as unix:///path. Its directory is made if it is missing, and only the user "
     "kivid runs as may open either. Empty: none."},
    {NULL, "listen_tcp", KIND_TEXT, AT(listen_tcp), "", 0, 0, NULL,
     "TCP address as address:port (127.0.0.1:7411, [::1]:7411), without encryption or "
     "authentication, so only on the loopback. Empty: none."},
    {NULL, "tcp_insecure", KIND_BOOL, AT(tcp_insecure), "false", 0, 0, NULL,
     "Allow listen_tcp beyond the loopback: whoever reaches the port can read and delete "
     "everything."},

    {"Where the bytes are", "arena_bytes", KIND_BYTES, AT(arena_bytes), "1GiB", 4 * MIB, 64 * TIB,
     NULL, "Host memory for blocks and tails, a multiple of 2MiB. All of it is taken at start."},
    {NULL, "gpu_arena_bytes", KIND_BYTES, AT(gpu_arena_bytes), "4GiB", 2 * MIB, 4 * TIB, NULL,
     "GPU memory for copies of hot blocks and for tails, with backend cuda; not used otherwise. All of "
     "it is taken at start; attention needs some beside it, so leave 1GiB of the card free."},
    {NULL, "disk_path", KIND_TEXT, AT(disk_path), "/var/lib/kivid", 0, 0, NULL,
     "Directory of the segment log, on a local file system. Empty: nothing is ever on disk, and "
     "nothing survives a restart."},
    {NULL, "disk_bytes", KIND_BYTES, AT(disk_bytes), "16GiB", 4 * MIB, 1024 * TIB, NULL,
     "Hard cap on that directory, at least 4 segments. When it is full the oldest blocks go."},
    {NULL, "segment_bytes", KIND_BYTES, AT(segment_bytes), "64MiB", 1 * MIB, 1 * GIB, NULL,
     "Size of one file of the log, a multiple of 1MiB. A block must fit into one."},
    {NULL, "blocks_max", KIND_COUNT, AT(blocks_max), "262144", 64, 1u << 30, NULL,
     "Blocks known at once, in all tiers."},
    {NULL, "io_depth", KIND_COUNT, AT(io_depth), "32", 1, 256, NULL, "Disk requests in flight."},
    {NULL, "io_threads", KIND_BOOL, AT(io_threads), "false", 0, 0, NULL,
     "Use threads for the disk even where io_uring is allowed."},
    {NULL, "sync_ms", KIND_COUNT, AT(sync_ms), "1000", 0, 3600000, NULL,
     "Milliseconds within which what is written also survives power loss. 0: only on demand."},

    {"What computes", "backend", KIND_TEXT, AT(backend), "auto", 0, 0, NULL,
     "auto (the fastest this machine has without a GPU), scalar, avx2, avx512, amx, cuda or cuda:N."},
    {NULL, "workers", KIND_COUNT, AT(workers), "0", 0, 256, NULL,
     "Threads of a CPU backend. 0: one per CPU this process may use, and each stays on its own."},

    {"How much at once", "layouts_max", KIND_COUNT, AT(layouts_max), "64", 1, 65536, NULL,
     "Registered layouts."},
    {NULL, "sessions_max", KIND_COUNT, AT(sessions_max), "65536", 1, 1u << 24, NULL,
     "Sessions known by name."},
    {NULL, "sessions_open_max", KIND_COUNT, AT(sessions_open_max), "1024", 1, 1u << 20, NULL,
     "Sessions open at once, with a tail in memory."},
    {NULL, "session_tokens_max", KIND_COUNT, AT(session_tokens_max), "131072", KV_BLOCK_TOKENS,
     1u << 24, NULL, "Longest session, in tokens."},
    {NULL, "tail_bytes_max", KIND_BYTES, AT(tail_bytes_max), "256MiB", 1 * MIB, 64 * TIB, NULL,
     "Exact tokens of open sessions, out of the arena."},
    {NULL, "session_idle_ms", KIND_COUNT, AT(session_idle_ms), "900000", 0, UINT32_MAX, NULL,
     "Milliseconds after which an open session nobody uses is committed and closed. 0: never."},
    {NULL, "request_count", KIND_COUNT, AT(request_count), "128", 8, 4096, NULL,
     "Requests inside the engine at once."},
    {NULL, "staging_count", KIND_COUNT, AT(staging_count), "16", 2, 4096, NULL,
     "Requests that carry data at once; each has a buffer of 3 message_bytes_max + 64KiB."},
    {NULL, "message_bytes_max", KIND_BYTES, AT(message_bytes_max), "4MiB", 64 * KIB, 64 * MIB, NULL,
     "Largest message in. Stock gRPC clients refuse answers above 4MiB unless told otherwise."},
    {NULL, "connections_max", KIND_COUNT, AT(connections_max), "256", 1, 65536, NULL,
     "Connections at once; one more is closed at once."},
    {NULL, "streams_max", KIND_COUNT, AT(streams_max), "256", 1, 65536, NULL,
     "Calls at once on one connection; a client waits with more."},
    {NULL, "calls_max", KIND_COUNT, AT(calls_max), "1024", 8, 1u << 20, NULL,
     "Calls at once on all connections; one more is answered RESOURCE_EXHAUSTED."},
    {NULL, "rpc_bytes_max", KIND_BYTES, AT(rpc_bytes_max), "256MiB", 16 * MIB, 1 * TIB, NULL,
     "Memory for messages on their way in and out of the transport, at least 16 "
     "message_bytes_max. Clients that need more of it than there is are cut off."},
    {NULL, "rpc_threads", KIND_COUNT, AT(rpc_threads), "1", 1, 64, NULL,
     "Threads that decode and encode. One serves several GB/s; more help only with many clients and "
     "many cores, and cost latency otherwise."},
    {NULL, "spin_us", KIND_COUNT, AT(spin_us), "0", 0, 1000000, NULL,
     "Microseconds such a thread looks for work before it sleeps. 50 halves the latency of a "
     "decode step and costs a core per thread while there is traffic."},

    {"How long", "deadline_ms_max", KIND_COUNT, AT(deadline_ms_max), "30000", 1, 3600000, NULL,
     "Milliseconds a request may take that came without a deadline, or with a longer one."},
    {NULL, "stall_ms", KIND_COUNT, AT(stall_ms), "20000", 10, 3600000, NULL,
     "Milliseconds after which a client that does not read its answers is cut off."},
    {NULL, "grace_ms", KIND_COUNT, AT(grace_ms), "5000", 0, 3600000, NULL,
     "Milliseconds that calls in flight get to finish after SIGTERM."},

    {"What it says", "log_level", KIND_CHOICE, AT(log_level), "info", 0, 0, "debug info warn error",
     "The least that is said."},
    {NULL, "log_format", KIND_CHOICE, AT(log_format), "text", 0, 0, "text json",
     "Lines for people, or one JSON object a line."},
};
enum { KEY_COUNT = sizeof keys / sizeof keys[0] };
static_assert((int)KEY_COUNT <= (int)KV_CONFIG_KEYS_MAX, "sources has room for every key");

size_t kv_config_key_count(void) {
    return KEY_COUNT;
}
const char *kv_config_key(size_t index) {
    return keys[index].name;
}
bool kv_config_key_is_flag(size_t index) {
    return keys[index].kind == KIND_BOOL;
}

/* ---- One value -------------------------------------------------------------------------------- */

static const char *const units[] = {"", "KiB", "MiB", "GiB", "TiB"};

/* "64", "64KiB"; a bare K, M, G or T means the same, because 1000s help nobody here. */
static bool parse_number(const char *text, bool bytes, uint64_t *out) {
    char *end;
    if (!isdigit((unsigned char)*text)) return false;
    errno = 0;
    unsigned long long number = strtoull(text, &end, 10);
    if (errno) return false;
    unsigned shift = 0;
    if (*end && bytes) {
        for (unsigned i = 1; i < 5; i++)
            if (*end == units[i][0] && (end[1] == 0 || strcmp(end, units[i]) == 0)) shift = 10 * i;
        if (shift == 0) return false;
    } else if (*end) {
        return false;
    }
    if (number << shift >> shift != number) return false;
    *out = number << shift;
    return true;
}

static void print_number(char *out, size_t size, uint64_t number, bool bytes) {
    unsigned unit = 0;
    while (bytes && unit < 4 && number > 0 && number % 1024 == 0) {
        number /= 1024;
        unit++;
    }
    snprintf(out, size, "%" PRIu64 "%s", number, units[unit]);
}

static bool parse_bool(const char *text, bool *out) {
    static const char *const yes[] = {"true", "yes", "on", "1"}, *const no[] = {"false", "no",
                                                                                "off", "0"};
    for (unsigned i = 0; i < 4; i++) {
        if (strcmp(text, yes[i]) == 0) return *out = true, true;
        if (strcmp(text, no[i]) == 0) return *out = false, true;
    }
    return false;
}

/* The index of `text` among words with spaces between, or -1. */
static int find_choice(const char *choices, const char *text) {
    size_t count = strlen(text);
    int index = 0;
    for (const char *word = choices; word && count > 0; index++) {
        if (strncmp(word, text, count) == 0 && (word[count] == ' ' || word[count] == 0))
            return index;
        word = strchr(word, ' ');
        if (word) word++;
    }
    return -1;
}

static enum kv_status set_number(const struct key *key, void *member, const char *value, char *why) {
    bool bytes = key->kind == KIND_BYTES;
    uint64_t number;
    char least[32], most[32];
    if (!parse_number(value, bytes, &number)) {
        snprintf(why, KV_CONFIG_WHY_MAX, "%s: '%.80s' is not a number%s", key->name, value,
                 bytes ? " of bytes (64KiB, 4MiB, 1GiB)" : "");
        return KV_INVALID;
    }
    if (number < key->least || number > key->most) {
        print_number(least, sizeof least, key->least, bytes);
        print_number(most, sizeof most, key->most, bytes);
        snprintf(why, KV_CONFIG_WHY_MAX, "%s: %.80s is not in %s .. %s", key->name, value, least,
                 most);
        return KV_INVALID;
    }
    if (bytes)
        *(uint64_t *)member = number;
    else
        *(uint32_t *)member = (uint32_t)number;
    return KV_OK;
}

static enum kv_status set_text(const struct key *key, char *member, const char *value, char *why) {
    size_t count = strlen(value);
    if (count >= KV_CONFIG_TEXT_MAX) {
        snprintf(why, KV_CONFIG_WHY_MAX, "%s: %zu bytes are more than %d", key->name, count,
                 KV_CONFIG_TEXT_MAX - 1);
        return KV_INVALID;
    }
    for (const char *c = value; *c; c++)
        if ((unsigned char)*c < 0x20) {
            snprintf(why, KV_CONFIG_WHY_MAX, "%s: holds a control character", key->name);
            return KV_INVALID;
        }
    memcpy(member, value, count + 1);
    return KV_OK;
}

static enum kv_status set_value(const struct key *key, void *member, const char *value, char *why) {
    switch (key->kind) {
    case KIND_TEXT: return set_text(key, member, value, why);
    case KIND_BYTES:
    case KIND_COUNT: return set_number(key, member, value, why);
    case KIND_BOOL:
        if (parse_bool(value, member)) return KV_OK;
        snprintf(why, KV_CONFIG_WHY_MAX, "%s: '%.80s' is neither true nor false", key->name, value);
        return KV_INVALID;
    case KIND_CHOICE: {
        int choice = find_choice(key->choices, value);
        if (choice < 0) {
            snprintf(why, KV_CONFIG_WHY_MAX, "%s: '%.80s' is not one of: %s", key->name, value,
                     key->choices);
            return KV_INVALID;
        }
        *(uint32_t *)member = (uint32_t)choice;
        return KV_OK;
    }
    }
    return KV_INVALID;
}

static void print_value(const struct kv_config *config, const struct key *key, char *out,
                        size_t size) {
    const char *member = (const char *)config + key->offset;
    switch (key->kind) {
    case KIND_TEXT: snprintf(out, size, "%s", member); break;
    case KIND_BYTES: print_number(out, size, *(const uint64_t *)(const void *)member, true); break;
    case KIND_COUNT: print_number(out, size, *(const uint32_t *)(const void *)member, false); break;
    case KIND_BOOL: snprintf(out, size, "%s", *(const bool *)member ? "true" : "false"); break;
    case KIND_CHOICE: {
        const char *word = key->choices;
        for (uint32_t i = *(const uint32_t *)(const void *)member; i > 0; i--)
            word = strchr(word, ' ') + 1;
        snprintf(out, size, "%.*s", (int)strcspn(word, " "), word);
        break;
    }
    }
}

enum kv_status kv_config_set(struct kv_config *config, const char *key, const char *value,
                             const char *source, char *why) {
    for (size_t i = 0; i < KEY_COUNT; i++) {
        if (strcmp(keys[i].name, key) != 0) continue;
        enum kv_status status =
            set_value(&keys[i], (char *)config + keys[i].offset, value, why);
        if (status == KV_OK)
            snprintf(config->sources[i], sizeof config->sources[i], "%s", source);
        return status;
    }
    snprintf(why, KV_CONFIG_WHY_MAX, "%.80s: there is no such key", key);
    return KV_NOT_FOUND;
}

void kv_config_defaults(struct kv_config *config) {
    *config = (struct kv_config){0};
    for (size_t i = 0; i < KEY_COUNT; i++) {
        char why[KV_CONFIG_WHY_MAX];
        enum kv_status status =
            kv_config_set(config, keys[i].name, keys[i].standard, "default", why);
        KV_CHECK(status == KV_OK);
    }
}

/* ---- All of them together ---------------------------------------------------------------------- */

static bool is_loopback(const char *address) {
    return strncmp(address, "127.", 4) == 0 || strncmp(address, "[::1]:", 6) == 0 ||
           strncmp(address, "localhost:", 10) == 0;
}

enum kv_status kv_config_check(const struct kv_config *config, char *why) {
    const char *broken = NULL;
    bool unix_socket = config->listen[0] != 0, tcp = config->listen_tcp[0] != 0;

    if (!unix_socket && !tcp)
        broken = "listen: empty, and so is listen_tcp: nobody could reach it";
    else if (unix_socket && strncmp(config->listen, "unix:/", 6) != 0)
        broken = "listen: must be unix:///path with an absolute path";
    else if (tcp && !strrchr(config->listen_tcp, ':'))
        broken = "listen_tcp: must be address:port";
    else if (tcp && !config->tcp_insecure && !is_loopback(config->listen_tcp))
        broken = "listen_tcp: is not on the loopback, and anyone could read and delete everything; "
                 "tcp_insecure allows it";
    else if (config->arena_bytes % (2 * MIB) != 0)
        broken = "arena_bytes: must be a multiple of 2MiB";
    else if (config->tail_bytes_max > config->arena_bytes)
        broken = "tail_bytes_max: is more than arena_bytes, which it is part of";
    else if (config->segment_bytes % MIB != 0)
        broken = "segment_bytes: must be a multiple of 1MiB";
    else if (config->disk_path[0] && config->disk_path[0] != '/')
        broken = "disk_path: must be absolute";
    else if (config->disk_path[0] && config->disk_bytes < 4 * config->segment_bytes)
        broken = "disk_bytes: is less than 4 segment_bytes";
    else if (config->sessions_open_max > config->sessions_max)
        broken = "sessions_open_max: is more than sessions_max";
    else if (config->staging_count > config->request_count)
        broken = "staging_count: is more than request_count; the rest could never be used";
    else if (config->rpc_bytes_max < 16 * config->message_bytes_max)
        broken = "rpc_bytes_max: is less than 16 message_bytes_max";

    if (!broken) return KV_OK;
    snprintf(why, KV_CONFIG_WHY_MAX, "%s", broken);
    return KV_INVALID;
}

struct kv_config_memory kv_config_memory(const struct kv_config *config) {
    /* What one of each takes, rounded up; the tests hold a running daemon against the sum. */
    enum { CALL_BYTES = 24 << 10, BLOCK_BYTES = 256, SESSION_BYTES = 1024 };
    struct kv_config_memory memory = {
        .arena     = config->arena_bytes,
        .staging   = config->staging_count * (3 * config->message_bytes_max + 64 * KIB),
        .requests  = (uint64_t)config->request_count * KV_CONFIG_REQUEST_BYTES,
        /* Each thread that decodes also has room for one message taken apart. */
        .transport = config->rpc_bytes_max +
                     (config->rpc_threads + 1) * (3 * config->message_bytes_max + 64 * KIB),
        .calls     = (uint64_t)config->calls_max * CALL_BYTES,
        .index     = (uint64_t)config->blocks_max * BLOCK_BYTES +
                     (uint64_t)config->sessions_max * SESSION_BYTES,
        .fixed     = 64 * MIB, /* program, libraries, stacks, malloc's slack */
    };
    memory.total = memory.arena + memory.staging + memory.requests + memory.transport +
                   memory.calls + memory.index + memory.fixed;
    return memory;
}

/* ---- Telling ------------------------------------------------------------------------------------ */

/* `text` in lines of at most 92 columns, each behind `before`. */
static void print_wrapped(FILE *out, const char *before, const char *text) {
    const size_t columns = 92;
    while (*text) {
        size_t count = strlen(text);
        if (count > columns) {
            count = columns;
            while (text[count] != ' ') count--;
        }
        fprintf(out, "%s%.*s\n", before, (int)count, text);
        text += count;
        while (*text == ' ') text++;
    }
}

/* An empty text needs its quotes to be a text in YAML. */
static const char *yaml_text(const char *value) {
    return *value ? value : "\"\"";
}

void kv_config_print(const struct kv_config *config, FILE *out) {
    for (size_t i = 0; i < KEY_COUNT; i++) {
        char value[KV_CONFIG_TEXT_MAX], pair[2 * KV_CONFIG_TEXT_MAX];
        print_value(config, &keys[i], value, sizeof value);
        snprintf(pair, sizeof pair, "%s: %s", keys[i].name, yaml_text(value));
        fprintf(out, "%-48s # %s\n", pair, config->sources[i]);
    }
    struct kv_config_memory memory = kv_config_memory(config);
    fprintf(out,
            "# memory at most, MiB: arena %" PRIu64 ", staging %" PRIu64 ", requests %" PRIu64
            ", transport %" PRIu64 ", calls %" PRIu64 ", index %" PRIu64 ", fixed %" PRIu64
            ", total %" PRIu64 "\n",
            memory.arena >> 20, memory.staging >> 20, memory.requests >> 20, memory.transport >> 20,
            memory.calls >> 20, memory.index >> 20, memory.fixed >> 20, memory.total >> 20);
}

void kv_config_example(FILE *out) {
    fprintf(out, "# kivid's configuration: every key with its default. Written by "
                 "`kivid --example-config`.\n"
                 "# A flag (--arena-bytes) wins over the environment (KIVID_ARENA_BYTES), which "
                 "wins over this file.\n");
    for (size_t i = 0; i < KEY_COUNT; i++) {
        if (keys[i].group) fprintf(out, "\n# ---- %s\n", keys[i].group);
        fputc('\n', out);
        print_wrapped(out, "# ", keys[i].help);
        if (keys[i].choices) fprintf(out, "# One of: %s\n", keys[i].choices);
        fprintf(out, "#%s: %s\n", keys[i].name, yaml_text(keys[i].standard));
    }
}

void kv_config_help(FILE *out) {
    fprintf(out, "kivid [--key value]...   holds KV caches outside the inference engine\n\n"
                 "  --config FILE      read this file (default /etc/kivid/kivid.yaml if it exists)\n"
                 "  --check-config     print the effective configuration, and stop\n"
                 "  --example-config   print a commented configuration file, and stop\n"
                 "  --version, --help\n\n"
                 "Each key is also an environment variable (KIVID_ARENA_BYTES) and a line of the "
                 "file (arena_bytes: 1GiB).\n");
    for (size_t i = 0; i < KEY_COUNT; i++) {
        if (keys[i].group) fprintf(out, "\n%s\n", keys[i].group);
        char flag[KV_CONFIG_TEXT_MAX];
        snprintf(flag, sizeof flag, "%s", keys[i].name);
        for (char *c = flag; *c; c++)
            if (*c == '_') *c = '-';
        fprintf(out, "  --%s %s\n", flag,
                keys[i].kind == KIND_CHOICE ? keys[i].choices : yaml_text(keys[i].standard));
        print_wrapped(out, "      ", keys[i].help);
    }
}
