/* SPDX-License-Identifier: Apache-2.0 */
/* config_test.c - who wins, what is refused and with which words. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <stdlib.h>
#include <unistd.h>

#include "service/config.h"

static char why[KV_CONFIG_WHY_MAX];

static enum kv_status read_yaml(struct kv_config *config, const char *text) {
    kv_config_defaults(config);
    why[0] = 0;
    return kv_config_yaml(config, "kivid.yaml", (const uint8_t *)text, strlen(text), why);
}

static void refused(const char *text, const char *words) {
    static struct kv_config config;
    assert_int_equal(read_yaml(&config, text), KV_INVALID);
    if (!strstr(why, words)) fail_msg("'%s' does not say '%s'", why, words);
}

/* Writes a file that the test's command line can name. */
static const char *write_file(const char *text) {
    static char path[256];
    const char *directory = getenv("TEST_TMPDIR");
    snprintf(path, sizeof path, "%s/kivid-XXXXXX", directory ? directory : "/tmp");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
    return path;
}

static enum kv_status load(struct kv_config *config, const char *const *flags,
                           enum kv_config_wish *wish) {
    const char *arguments[16] = {"kivid"};
    int count = 1;
    for (; *flags; flags++) arguments[count++] = *flags;
    why[0] = 0;
    return kv_config_load(config, count, arguments, wish, why);
}

static const char *source_of(const struct kv_config *config, const char *key) {
    for (size_t i = 0; i < kv_config_key_count(); i++)
        if (strcmp(kv_config_key(i), key) == 0) return config->sources[i];
    fail_msg("no key %s", key);
    return NULL;
}

static void test_defaults_make_sense(void **state) {
    static struct kv_config config;
    kv_config_defaults(&config);
    assert_int_equal(kv_config_check(&config, why), KV_OK);
    assert_int_equal(config.message_bytes_max, 4 << 20);
    assert_string_equal(config.listen, "unix:///run/kivid/kivid.sock");
}

static void test_flags_win_over_environment_over_file_over_defaults(void **state) {
    static struct kv_config config;
    enum kv_config_wish wish;
    char file_flag[300];
    snprintf(file_flag, sizeof file_flag, "--config=%s",
             write_file("io_depth: 5\nworkers: 6\nsync_ms: 7\n"));
    setenv("KIVID_WORKERS", "16", 1);
    setenv("KIVID_SYNC_MS", "17", 1);
    setenv("KIVID_SERVICE_HOST", "10.0.0.1", 1); /* a cluster's, not ours */
    const char *flags[] = {file_flag, "--sync-ms", "27", "--io-threads", NULL};
    enum kv_status status = load(&config, flags, &wish);
    unsetenv("KIVID_WORKERS");
    unsetenv("KIVID_SYNC_MS");
    unsetenv("KIVID_SERVICE_HOST");

    assert_int_equal(status, KV_OK);
    assert_int_equal(wish, KV_WISH_RUN);
    assert_int_equal(config.io_depth, 5);
    assert_int_equal(config.workers, 16);
    assert_int_equal(config.sync_ms, 27);
    assert_true(config.io_threads);
    assert_int_equal(config.rpc_threads, 1);
    assert_non_null(strstr(source_of(&config, "io_depth"), ":1"));
    assert_string_equal(source_of(&config, "workers"), "KIVID_WORKERS");
    assert_string_equal(source_of(&config, "sync_ms"), "--sync-ms");
    assert_string_equal(source_of(&config, "rpc_threads"), "default");
}

static void test_a_wrong_file_names_the_line(void **state) {
    refused("workers: 2\narena_byte: 1GiB\n", "kivid.yaml:2: arena_byte: there is no such key");
    refused("\n\nworkers: many\n", "kivid.yaml:3: workers: 'many' is not a number");
    refused("workers: 257\n", "kivid.yaml:1: workers: 257 is not in 0 .. 256");
    refused("workers: -1\n", "is not a number");
    refused("workers: 1\nworkers: 1\n", "kivid.yaml:2: workers: comes twice");
    refused("arena_bytes: 1GB\n", "is not a number of bytes");
    refused("arena_bytes: 99999999999999999999\n", "is not a number of bytes");
    refused("arena_bytes: 18014398509481984KiB\n", "is not a number of bytes");
    refused("io_threads: perhaps\n", "'perhaps' is neither true nor false");
    refused("log_level: loud\n", "'loud' is not one of: debug info warn error");
    refused("log_level: inf\n", "is not one of");
    refused("listen: \"a\\tb\"\n", "holds a control character");
    refused("listen: \"a\\0b\"\n", "holds a zero byte");
    refused("workers: [1, 2]\n", "kivid.yaml:1: workers: must be a single value");
    refused("workers:\n  cpu: 1\n", "must be a single value");
    refused("- workers\n", "must be lines of `key: value`");
    refused("workers: 1\n---\nworkers: 2\n", "a second document");
    refused("workers: *alias\n", "kivid.yaml:1: ");
    refused("workers: \"1\n", "kivid.yaml:");
    refused("a: &x 1\n", "there is no such key");
}

static void test_a_file_may_be_empty_or_only_comments(void **state) {
    static struct kv_config config;
    assert_int_equal(read_yaml(&config, ""), KV_OK);
    assert_int_equal(read_yaml(&config, "# nothing\n"), KV_OK);
    assert_int_equal(read_yaml(&config, "workers: 3 # threads\nlisten_tcp: \"\"\n"), KV_OK);
    assert_int_equal(config.workers, 3);
}

static void test_bytes_have_units(void **state) {
    static struct kv_config config;
    assert_int_equal(read_yaml(&config, "arena_bytes: 3G\nsegment_bytes: 2097152\n"
                                        "disk_bytes: 1TiB\nmessage_bytes_max: 512KiB\n"),
                     KV_OK);
    assert_true(config.arena_bytes == 3ull << 30 && config.segment_bytes == 2 << 20 &&
                config.disk_bytes == 1ull << 40 && config.message_bytes_max == 512 << 10);
}

static void test_a_wrong_flag_or_variable_is_named(void **state) {
    static struct kv_config config;
    enum kv_config_wish wish;
    const char *unknown[] = {"--arena-byte=1", NULL}, *bad[] = {"--workers=x", NULL},
               *stray[] = {"start", NULL}, *missing[] = {"--config=/missing-file", NULL},
               *none[] = {NULL};
    assert_int_equal(load(&config, unknown, &wish), KV_INVALID);
    assert_non_null(strstr(why, "--arena-byte"));
    assert_int_equal(load(&config, bad, &wish), KV_INVALID);
    assert_non_null(strstr(why, "--workers: workers: 'x' is not a number"));
    assert_int_equal(load(&config, stray, &wish), KV_INVALID);
    assert_non_null(strstr(why, "start"));
    assert_int_equal(load(&config, missing, &wish), KV_INVALID);
    assert_non_null(strstr(why, "/missing-file: No such file"));
    setenv("KIVID_WORKERS", "x", 1);
    assert_int_equal(load(&config, none, &wish), KV_INVALID);
    unsetenv("KIVID_WORKERS");
    assert_non_null(strstr(why, "KIVID_WORKERS: workers: 'x'"));
}

static void test_contradictions_are_refused(void **state) {
    static const struct {
        const char *flags[4], *words;
    } cases[] = {
        {{"--listen=", NULL}, "nobody could reach it"},
        {{"--listen=tcp://x", NULL}, "listen: must be unix:///path"},
        {{"--listen-tcp=0.0.0.0:1", NULL}, "listen_tcp: is not on the loopback"},
        {{"--listen-tcp=1271:1", NULL}, "listen_tcp: is not on the loopback"},
        {{"--listen-tcp=nothing", NULL}, "listen_tcp: must be address:port"},
        {{"--arena-bytes=1073741825", NULL}, "arena_bytes: must be a multiple of 2MiB"},
        {{"--arena-bytes=128MiB", NULL}, "tail_bytes_max: is more than arena_bytes"},
        {{"--segment-bytes=1048577", NULL}, "segment_bytes: must be a multiple"},
        {{"--disk-path=here", NULL}, "disk_path: must be absolute"},
        {{"--disk-bytes=255MiB", NULL}, "disk_bytes: is less than 4 segment_bytes"},
        {{"--sessions-max=10", NULL}, "sessions_open_max: is more than sessions_max"},
        {{"--staging-count=200", NULL}, "staging_count: is more than request_count"},
        {{"--rpc-bytes-max=32MiB", NULL}, "rpc_bytes_max: is less than 16 message_bytes_max"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        static struct kv_config config;
        enum kv_config_wish wish;
        assert_int_equal(load(&config, cases[i].flags, &wish), KV_INVALID);
        if (!strstr(why, cases[i].words)) fail_msg("'%s' does not say '%s'", why, cases[i].words);
    }
    static struct kv_config config;
    enum kv_config_wish wish;
    const char *allowed[] = {"--listen-tcp=0.0.0.0:1", "--tcp-insecure", NULL};
    assert_int_equal(load(&config, allowed, &wish), KV_OK);
}

/* What the example says is what holds without it: uncommented, it changes nothing. */
static void test_the_example_is_the_defaults(void **state) {
    static struct kv_config config, defaults;
    char *text = NULL, *line, *rest;
    size_t bytes = 0;
    FILE *out = open_memstream(&text, &bytes);
    kv_config_example(out);
    fclose(out);

    char *active = calloc(1, bytes + 1);
    for (line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
        if (line[0] == '#' && line[1] != ' ') strcat(strcat(active, line + 1), "\n");
    assert_int_equal(read_yaml(&config, active), KV_OK);
    kv_config_defaults(&defaults);
    memcpy(config.sources, defaults.sources, sizeof config.sources);
    assert_memory_equal(&config, &defaults, sizeof config);
    size_t keys = 0;
    for (const char *c = active; *c; c++) keys += *c == '\n';
    assert_int_equal(keys, kv_config_key_count());
    free(active);
    free(text);
}

static void test_memory_is_the_sum_of_its_parts(void **state) {
    static struct kv_config config;
    kv_config_defaults(&config);
    struct kv_config_memory memory = kv_config_memory(&config);
    assert_true(memory.staging == 16 * (12ull * (1 << 20) + (64 << 10)));
    assert_true(memory.total == memory.arena + memory.staging + memory.requests + memory.transport +
                                    memory.calls + memory.index + memory.fixed);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults_make_sense),
        cmocka_unit_test(test_flags_win_over_environment_over_file_over_defaults),
        cmocka_unit_test(test_a_wrong_file_names_the_line),
        cmocka_unit_test(test_a_file_may_be_empty_or_only_comments),
        cmocka_unit_test(test_bytes_have_units),
        cmocka_unit_test(test_a_wrong_flag_or_variable_is_named),
        cmocka_unit_test(test_contradictions_are_refused),
        cmocka_unit_test(test_the_example_is_the_defaults),
        cmocka_unit_test(test_memory_is_the_sum_of_its_parts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
