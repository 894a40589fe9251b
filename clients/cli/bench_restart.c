/* SPDX-License-Identifier: Apache-2.0 */
/* bench_restart.c - how long a kivid takes to find everything again.
 *
 * A kivid with a disk is filled with blocks that are WRITTEN, then stopped politely and started, and
 * killed and started, in turn.  It says itself how long its scan took and what it read.  The time for
 * 1 TB is by arithmetic: what a start takes beyond that of an empty disk grows with what is held;
 * after kill -9 the segments that were open are read besides, and those do not grow.
 */
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clients/cli/bench.h"
#include "clients/cli/benches.h"
#include "clients/cli/daemon.h"
#include "clients/cli/tensors.h"

enum { LAYERS = 4, HEADS = 8, HEAD_DIM = 128, UNDER_WAY = 4 };
static const double TERABYTE = 1e12;

struct bench_restart {
    struct ctl *ctl;
    struct daemon daemon;
    const char *const *flags;
    uint64_t blocks;
    uint64_t bytes; /* held on disk */
};

struct restarts {
    double seconds[BENCH_RUNS_MAX], bytes[BENCH_RUNS_MAX];
};

static bool layout_register(struct bench_restart *bench, struct kivi_layout_info *info) {
    struct kivi_layout layout;
    memset(&layout, 0, sizeof layout);
    snprintf(layout.model, sizeof layout.model, "kivictl bench restart");
    layout.layers = LAYERS;
    layout.kv_heads = layout.query_heads = HEADS;
    layout.head_dim = HEAD_DIM;
    layout.dtype = KIVI_F16;
    return !kivi_layout_register(bench->daemon.client, &layout, info, NULL, 0, &bench->ctl->error);
}

static struct kivi_digest digest_of(uint64_t number) {
    struct kivi_digest digest = {{0}};
    memcpy(digest.bytes, &number, sizeof number);
    return digest;
}

/* The pages of one block; without a result to wait for yet. */
static bool block_send(struct bench_restart *bench, struct kivi_put *put, uint64_t number,
                       uint32_t form, const void *page, size_t page_bytes) {
    struct kivi_digest digest = digest_of(number);
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        struct kivi_put_page send = {.digest = &digest, .layer = layer, .form = form,
                                     .durability = KIVI_WRITTEN, .data = page,
                                     .data_bytes = page_bytes};
        if (kivi_put_page(put, &send, 0, &bench->ctl->error)) return false;
    }
    return true;
}

static bool block_result(struct bench_restart *bench, struct kivi_put *put) {
    struct kivi_put_result result;
    struct kivi_error *error = &bench->ctl->error;
    if (kivi_put_result(put, &result, 0, error)) return false;
    if (result.code == KIVI_OK) return true;
    memset(error, 0, sizeof *error);
    error->code = result.code;
    snprintf(error->message, sizeof error->message, "%s", result.message);
    return false;
}

/* Packs one block, by putting it in full and getting it packed: block 0. */
static bool page_make(struct bench_restart *bench, struct kivi_put *put,
                      const struct kivi_layout_info *info, uint8_t *page) {
    uint8_t *full = ctl_alloc(info->page_bytes_full);
    struct kivi_digest digest = digest_of(0);
    struct kivi_get *get = NULL;
    struct kivi_got_page got = {.code = KIVI_OK};
    bool done = false;
    bench_fill((uint16_t *)full, info->page_bytes_full / 2);
    bool good = block_send(bench, put, 0, KIVI_FORM_FULL, full, info->page_bytes_full) &&
                block_result(bench, put) &&
                !kivi_get_open(bench->daemon.client, &info->fingerprint, &digest, 1, NULL, 0,
                               KIVI_FORM_PACKED, &get, 0, &bench->ctl->error) &&
                !kivi_get_next(get, &got, page, info->page_bytes_packed, &done, 0,
                               &bench->ctl->error);
    kivi_get_close(get);
    free(full);
    return good && !done && got.code == KIVI_OK;
}

/* Blocks 1, 2, ... with the pages of block 0: packed pages cost nothing to take in. */
static bool fill(struct bench_restart *bench) {
    struct kivi_layout_info info;
    struct kivi_put *put;
    struct progress progress;
    if (!layout_register(bench, &info)) return false;
    if (kivi_put_open(bench->daemon.client, &info, &put, &bench->ctl->error)) return false;
    uint8_t *page = ctl_alloc(info.page_bytes_packed);
    bool good = page_make(bench, put, &info, page);
    progress_begin(&progress, "fill", bench->blocks, bench->ctl->quiet);
    for (uint64_t sent = 1, taken = 1; taken < bench->blocks && good;) {
        if (sent < bench->blocks && sent - taken < UNDER_WAY)
            good = block_send(bench, put, sent++, KIVI_FORM_PACKED, page, info.page_bytes_packed);
        else
            good = block_result(bench, put) && ++taken;
        progress_update(&progress, taken);
    }
    progress_end(&progress);
    kivi_put_close(put, 0, NULL);
    free(page);
    struct kivi_stats stats;
    good = good && !kivi_client_stats(bench->daemon.client, &stats, 0, &bench->ctl->error);
    if (good) bench->bytes = stats.nvme.bytes;
    return good;
}

static bool restart(struct bench_restart *bench, int signal_number, double *seconds,
                    double *bytes) {
    struct kivi_stats stats;
    daemon_stop(&bench->daemon, signal_number);
    if (!daemon_start(bench->ctl, &bench->daemon, bench->flags)) return false;
    if (kivi_client_stats(bench->daemon.client, &stats, 0, &bench->ctl->error)) {
        ctl_failed(bench->ctl);
        return false;
    }
    if (stats.recovered_blocks < bench->blocks ||
        stats.recovery_clean != (signal_number == SIGTERM)) {
        ctl_say(bench->ctl, EXIT_REFUSED,
                "the start after %s found %" PRIu64 " of %" PRIu64 " blocks and calls the stop %s",
                signal_number == SIGTERM ? "SIGTERM" : "kill -9", stats.recovered_blocks,
                bench->blocks, stats.recovery_clean ? "clean" : "not clean");
        return false;
    }
    *seconds = (double)stats.recovery_us * 1e-6;
    *bytes = (double)stats.recovery_bytes;
    return true;
}

static void report(struct bench_restart *bench, struct restarts *empty, struct restarts *clean,
                   struct restarts *hard, int runs, struct bench *out) {
    double empty_s = bench_median(empty->seconds, runs);
    double clean_s = bench_median(clean->seconds, runs), hard_s = bench_median(hard->seconds, runs);
    double growing_s = clean_s > empty_s ? clean_s - empty_s : 0;
    double terabyte_s = empty_s + growing_s * TERABYTE / (double)bench->bytes;
    double extra_s = hard_s > clean_s ? hard_s - clean_s : 0;
#define ROW(what, in, value) \
    bench_row(out, (struct bench_row){.name = what, .unit = in, .ours = value})
    ROW("empty disk: scan", "ms", empty_s * 1e3);
    ROW("clean stop: scan", "ms", clean_s * 1e3);
    ROW("clean stop: blocks found", "blocks/s", (double)bench->blocks / clean_s);
    ROW("clean stop: bytes read", "MB/s", bench_median(clean->bytes, runs) / clean_s / 1e6);
    ROW("kill -9: scan", "ms", hard_s * 1e3);
    ROW("kill -9: blocks found", "blocks/s", (double)bench->blocks / hard_s);
    ROW("kill -9: bytes read", "MB/s", bench_median(hard->bytes, runs) / hard_s / 1e6);
    ROW("implied for 1 TB, clean stop", "s", terabyte_s);
    ROW("implied for 1 TB, kill -9", "s", terabyte_s + extra_s);
#undef ROW
}

static int measure(struct bench_restart *bench, int runs) {
    struct restarts empty, clean, hard;
    struct bench out = {.name = "restart"};
    uint64_t blocks = bench->blocks;
    if (!daemon_start(bench->ctl, &bench->daemon, bench->flags)) return EXIT_REFUSED;
    bench->blocks = 0;
    for (int i = 0; i < runs; i++)
        if (!restart(bench, SIGTERM, &empty.seconds[i], &empty.bytes[i])) return EXIT_REFUSED;
    bench->blocks = blocks;
    if (!fill(bench)) return ctl_failed(bench->ctl);
    for (int i = 0; i < runs; i++)
        if (!restart(bench, SIGTERM, &clean.seconds[i], &clean.bytes[i]) ||
            !restart(bench, SIGKILL, &hard.seconds[i], &hard.bytes[i]))
            return EXIT_REFUSED;
    report(bench, &empty, &clean, &hard, runs, &out);
    return bench_print(bench->ctl, &out);
}

int run_bench_restart(struct ctl *ctl, int argc, const char **argv) {
    char *kivid = NULL, *dir = NULL, cap[64];
    int runs = BENCH_RUNS, blocks = 2000, exit_code;
    const struct poptOption own[] = {
        {"kivid", 0, POPT_ARG_STRING, &kivid, 0, "the daemon to start (beside kivictl)", "PATH"},
        {"dir", 'd', POPT_ARG_STRING, &dir, 0, "where to put its data ($TMPDIR or /tmp)", "DIR"},
        {"blocks", 0, POPT_ARG_INT, &blocks, 0, "to find again (2000, of 295 kB each)", "N"},
        {"runs", 'n', POPT_ARG_INT, &runs, 0, "of each kind (5)", "N"}, POPT_TABLEEND};
    if (!ctl_options(ctl, argc, argv, own, "[OPTIONS]",
                     "Each block is 4 layers of 8 KV heads of 128 channels, packed by kivi2.\n", 0, 0,
                     &exit_code))
        return exit_code;
    if (runs < BENCH_RUNS || runs > BENCH_RUNS_MAX || blocks < 1 || blocks > 200000)
        return ctl_say(ctl, EXIT_USAGE, "%d to %d runs, 1 to 200000 blocks", BENCH_RUNS,
                       BENCH_RUNS_MAX);

    uint64_t disk_bytes = (((uint64_t)blocks * 400000 >> 26) + 8) << 26; /* whole segments, and room */
    snprintf(cap, sizeof cap, "--disk-bytes=%" PRIu64, disk_bytes);
    const char *const flags[] = {"--arena-bytes=256MiB", cap, "--log-level=warn", NULL};
    struct bench_restart bench = {.ctl = ctl, .flags = flags, .blocks = (uint64_t)blocks};
    if (!daemon_prepare(ctl, &bench.daemon, kivid, dir)) return EXIT_USAGE;
    exit_code = measure(&bench, runs);
    daemon_remove(&bench.daemon);
    return exit_code;
}
