/* SPDX-License-Identifier: Apache-2.0 */
/* commands_service.c - ping, status, layouts, stats. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "clients/cli/kivictl.h"

static int run_ping(struct ctl *ctl, int argc, const char **argv) {
    int count = 1, exit_code;
    const struct poptOption own[] = {
        {"count", 'c', POPT_ARG_INT, &count, 0, "how often (1)", "N"}, POPT_TABLEEND};
    if (!ctl_options(ctl, argc, argv, own, "[OPTIONS]",
                     "Exit code 0 when the service answers and is ready for work, 1 when it is not ready.\n",
                     0, 0, &exit_code))
        return exit_code;
    if (!ctl_connect(ctl)) return EXIT_USAGE;

    double best = 1e300;
    bool serving = false;
    for (int i = 0; i < count; i++) {
        double begin = ctl_seconds();
        if (kivi_client_ping(ctl->client, "", &serving, 0, &ctl->error)) return ctl_failed(ctl);
        double us = (ctl_seconds() - begin) * 1e6;
        if (us < best) best = us;
        if (!ctl->json)
            printf("%s, answered after %s\n", serving ? "ready" : "not ready", text_us(us));
    }
    if (ctl->json) json_print(json_pack("{s:b, s:f}", "ready", serving, "best_us", best));
    return serving ? EXIT_DONE : EXIT_REFUSED;
}

static const char *tier_text(const struct kivi_tier_stats *tier) {
    static char texts[2][80];
    static unsigned next;
    char *text = texts[next++ % 2];
    snprintf(text, sizeof texts[0], "%" PRIu64 " blocks, %s of %s", tier->blocks,
             text_bytes(tier->bytes), text_bytes(tier->bytes_max));
    return text;
}

static void status_print(const struct kivi_stats *stats) {
    struct table table;
    table_begin(&table, "kivid|");
#define ROW(name, ...) (table_cell(&table, name), table_cell(&table, __VA_ARGS__))
    ROW("version", "%s", stats->version);
    ROW("ready", "%s, up %s", stats->ready ? "yes" : "no", text_us((double)stats->uptime_ms * 1e3));
    ROW("backend", "%s", stats->backend);
    ROW("disk engine", "%s", stats->io_engine);
    ROW("host", "%s", tier_text(&stats->host));
    ROW("nvme", "%s", tier_text(&stats->nvme));
    ROW("blocks", "%" PRIu64 " of %" PRIu64, stats->blocks, stats->blocks_max);
    ROW("sessions", "%" PRIu64 " known, %" PRIu64 " open, of %" PRIu64, stats->sessions_known,
        stats->sessions_open, stats->sessions_max);
    ROW("tails", "%s of %s", text_bytes(stats->tail_bytes), text_bytes(stats->tail_bytes_max));
    ROW("served", "%" PRIu64 " requests, %" PRIu64 " errors, %" PRIu64 " tokens in, %" PRIu64
        " rows attended", stats->requests, stats->errors, stats->tokens_appended,
        stats->rows_attended);
    ROW("damage", "%" PRIu64 " checksum failures, %" PRIu64 " disk errors, %" PRIu64
        " segments lost", stats->corruptions, stats->io_errors, stats->segments_lost);
    ROW("last start", "%s stop before it, %" PRIu64 " blocks and %" PRIu64 " sessions found in %s",
        stats->recovery_clean ? "clean" : "no clean", stats->recovered_blocks,
        stats->recovered_sessions, text_us((double)stats->recovery_us));
#undef ROW
    table_print(&table);
}

static int run_status(struct ctl *ctl, int argc, const char **argv) {
    int exit_code;
    struct kivi_stats stats;
    if (!ctl_options(ctl, argc, argv, NULL, "[OPTIONS]", NULL, 0, 0, &exit_code)) return exit_code;
    if (!ctl_connect(ctl)) return EXIT_USAGE;
    if (kivi_client_stats(ctl->client, &stats, 0, &ctl->error)) return ctl_failed(ctl);
    if (ctl->json) json_print(json_stats(&stats));
    else status_print(&stats);
    return stats.ready ? EXIT_DONE : EXIT_REFUSED;
}

static int run_layouts(struct ctl *ctl, int argc, const char **argv) {
    int exit_code;
    struct kivi_layout_info *infos;
    size_t count;
    if (!ctl_options(ctl, argc, argv, NULL, "[OPTIONS]", NULL, 0, 0, &exit_code)) return exit_code;
    if (!ctl_connect(ctl)) return EXIT_USAGE;
    if (kivi_layout_list(ctl->client, &infos, &count, 0, &ctl->error)) return ctl_failed(ctl);

    json_t *list = json_array();
    struct table table;
    table_begin(&table, "fingerprint|model|codec|>layers|>kv heads|>q heads|>dim|>bits/element");
    for (size_t i = 0; i < count; i++) {
        const struct kivi_layout *layout = &infos[i].layout;
        json_array_append_new(list, json_layout(&infos[i]));
        table_cell(&table, "%s", text_hex(infos[i].fingerprint.bytes, 8));
        table_cell(&table, "%s", layout->model);
        table_cell(&table, "%s", layout->codec.preset);
        table_cell(&table, "%u", layout->layers);
        table_cell(&table, "%u", layout->kv_heads);
        table_cell(&table, "%u", layout->query_heads);
        table_cell(&table, "%u", layout->head_dim);
        table_cell(&table, "%.4g", infos[i].bits_per_element);
    }
    kivi_free(infos);
    if (ctl->json) {
        json_print(json_pack("{s:O}", "layouts", list));
        table_free(&table);
    } else {
        table_print(&table);
    }
    json_decref(list);
    return EXIT_DONE;
}

/* One line of change since the last look. */
static void watch_print(const struct kivi_stats *now, const struct kivi_stats *last,
                        double seconds, unsigned line) {
    if (line % 20 == 0)
        puts(" tokens/s   rows/s     in      out   sealed shared evicted spills restores "
             "sessions   host     nvme");
#define RATE(name) ((double)(now->name - last->name) / seconds)
    printf("%9.0f %8.0f %8s %8s %7" PRIu64 " %6" PRIu64 " %7" PRIu64 " %6" PRIu64 " %8" PRIu64
           " %8" PRIu64 " %8s %8s\n",
           RATE(tokens_appended), RATE(rows_attended), text_bytes((uint64_t)RATE(bytes_in)),
           text_bytes((uint64_t)RATE(bytes_out)), now->blocks_sealed - last->blocks_sealed,
           now->blocks_shared - last->blocks_shared, now->evictions - last->evictions,
           now->spills - last->spills, now->restores - last->restores, now->sessions_open,
           text_bytes(now->host.bytes), text_bytes(now->nvme.bytes));
#undef RATE
    fflush(stdout);
}

static int stats_watch(struct ctl *ctl, int interval_ms, int count) {
    struct kivi_stats last = {0}, now;
    double last_at = 0;
    for (unsigned line = 0; count == 0 || line < (unsigned)count; line++) {
        if (kivi_client_stats(ctl->client, &now, 0, &ctl->error)) return ctl_failed(ctl);
        double at = ctl_seconds();
        if (ctl->json) {
            json_t *value = json_stats(&now);
            json_dumpf(value, stdout, JSON_COMPACT);
            puts("");
            fflush(stdout);
            json_decref(value);
        } else {
            watch_print(&now, line ? &last : &now, line ? at - last_at : 1, line);
        }
        last = now;
        last_at = at;
        struct timespec pause = {interval_ms / 1000, interval_ms % 1000 * 1000000};
        nanosleep(&pause, NULL);
    }
    return EXIT_DONE;
}

static int run_stats(struct ctl *ctl, int argc, const char **argv) {
    int watch = 0, interval_ms = 1000, count = 0, exit_code;
    const struct poptOption own[] = {
        {"watch", 'w', POPT_ARG_NONE, &watch, 0, "a line for every interval, until interrupted", NULL},
        {"interval-ms", 0, POPT_ARG_INT, &interval_ms, 0, "for --watch (1000)", "MS"},
        {"count", 'c', POPT_ARG_INT, &count, 0, "for --watch: stop after so many", "N"},
        POPT_TABLEEND};
    struct kivi_stats stats;
    if (!ctl_options(ctl, argc, argv, own, "[OPTIONS]",
                     "With --watch --json, one JSON object a line.\n", 0, 0, &exit_code))
        return exit_code;
    if (interval_ms < 1 || count < 0) return ctl_say(ctl, EXIT_USAGE, "numbers begin at 1");
    if (!ctl_connect(ctl)) return EXIT_USAGE;
    if (watch) return stats_watch(ctl, interval_ms, count);
    if (kivi_client_stats(ctl->client, &stats, 0, &ctl->error)) return ctl_failed(ctl);
    if (ctl->json) {
        json_print(json_stats(&stats));
        return EXIT_DONE;
    }
    struct table table;
    table_begin(&table, "counter|>value");
    json_t *all = json_stats(&stats), *value;
    const char *name;
    json_object_foreach(all, name, value) {
        if (!json_is_integer(value)) continue;
        table_cell(&table, "%s", name);
        table_cell(&table, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
    }
    json_decref(all);
    table_print(&table);
    return EXIT_DONE;
}

const struct command SERVICE_COMMANDS[] = {
    {"ping", "", "is it there and ready", run_ping},
    {"status", "", "what it holds and how it is", run_status},
    {"stats", "[--watch]", "its counters", run_stats},
    {"layouts", "", "cache shapes it knows", run_layouts},
    {NULL, NULL, NULL, NULL},
};
