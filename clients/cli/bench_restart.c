/* SPDX-License-Identifier: Apache-2.0 */
/* bench_restart.c - how long a kivid takes to find everything again.
 *
 * A kivid with a disk is filled with blocks that are WRITTEN, then stopped politely and started, and
 * killed and started, in turn.  It says itself how long its scan took and what it read.  The time for
 * 1 TB is by arithmetic: after a clean stop it grows with what is held; after kill -9 the segments
 * that were open are read besides, and those do not grow.
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

enum { LAYERS = 4, HEADS = 8, HEAD_DIM = 128 };
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

/* Packed pages of zeros are as good as any: what is in them is not looked at on the way in, and a
 * start does not read them. */
static bool fill(struct bench_restart *bench) {
    struct kivi_client *client = bench->daemon.client;
    struct kivi_error *error = &bench->ctl->error;
    struct kivi_layout layout;
    struct kivi_layout_info info;
    struct kivi_put *put;
    memset(&layout, 0, sizeof layout);
    snprintf(layout.model, sizeof layout.model, "kivictl bench restart");
    layout.layers = LAYERS;
    layout.kv_heads = layout.query_heads = HEADS;
    layout.head_dim = HEAD_DIM;
    layout.dtype = KIVI_F16;
    if (kivi_layout_register(client, &layout, &info, NULL, 0, error)) return false;
    if (kivi_put_open(client, &info, &put, error)) return false;

    uint8_t *page = ctl_alloc(info.page_bytes_packed);
    struct progress progress;
    bool good = true;
    uint64_t taken = 0;
    progress_begin(&progress, "fill", bench->blocks, bench->ctl->quiet);
    for (uint64_t block = 0; taken < bench->blocks && good; block++) {
        struct kivi_digest digest = {{0}};
        uint64_t number = block + 1;
        memcpy(digest.bytes, &number, sizeof number);
        for (uint32_t layer = 0; layer < LAYERS && good && block < bench->blocks; layer++) {
            struct kivi_put_page send = {.digest = &digest, .layer = layer,
                                         .form = KIVI_FORM_PACKED, .durability = KIVI_WRITTEN,
                                         .data = page, .data_bytes = info.page_bytes_packed};
            good = !kivi_put_page(put, &send, 0, error);
        }
        if (block < 4) continue; /* so many under way */
        struct kivi_put_result result = {.code = KIVI_OK};
        good = good && !kivi_put_result(put, &result, 0, error);
        if (good && result.code != KIVI_OK) {
            good = false;
            error->code = result.code;
            snprintf(error->message, sizeof error->message, "%s", result.message);
        }
        taken += good;
        progress_update(&progress, taken);
    }
    progress_end(&progress);
    kivi_put_close(put, 0, NULL);
    free(page);
    struct kivi_stats stats;
    good = good && !kivi_client_stats(client, &stats, 0, error);
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

static void report(struct bench_restart *bench, struct restarts *clean, struct restarts *hard,
                   int runs, struct bench *out) {
    double clean_s = bench_median(clean->seconds, runs), hard_s = bench_median(hard->seconds, runs);
    double scale = TERABYTE / (double)bench->bytes;
    double extra = hard_s > clean_s ? hard_s - clean_s : 0;
    bench_row(out, (struct bench_row){.name = "clean stop: blocks found", .unit = "blocks/s",
                                      .ours = (double)bench->blocks / clean_s});
    bench_row(out, (struct bench_row){.name = "clean stop: read by the start", .unit = "MB/s",
                                      .ours = bench_median(clean->bytes, runs) / clean_s / 1e6});
    bench_row(out, (struct bench_row){.name = "kill -9: blocks found", .unit = "blocks/s",
                                      .ours = (double)bench->blocks / hard_s});
    bench_row(out, (struct bench_row){.name = "kill -9: read by the start", .unit = "MB/s",
                                      .ours = bench_median(hard->bytes, runs) / hard_s / 1e6});
    bench_row(out, (struct bench_row){.name = "1 TB after a clean stop, implied", .unit = "s",
                                      .ours = clean_s * scale, .opponent = 2,
                                      .opponent_name = "figure to reach", .goal = 1,
                                      .less_is_better = true});
    bench_row(out, (struct bench_row){.name = "1 TB after kill -9, implied", .unit = "s",
                                      .ours = clean_s * scale + extra, .opponent = 10,
                                      .opponent_name = "figure to reach", .goal = 1,
                                      .less_is_better = true});
}

static int measure(struct bench_restart *bench, int runs) {
    struct restarts clean, hard;
    struct bench out = {.name = "restart"};
    if (!daemon_start(bench->ctl, &bench->daemon, bench->flags)) return EXIT_REFUSED;
    if (!fill(bench)) return ctl_failed(bench->ctl);
    for (int i = 0; i < runs; i++)
        if (!restart(bench, SIGTERM, &clean.seconds[i], &clean.bytes[i]) ||
            !restart(bench, SIGKILL, &hard.seconds[i], &hard.bytes[i]))
            return EXIT_REFUSED;
    report(bench, &clean, &hard, runs, &out);
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
