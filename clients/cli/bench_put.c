/* SPDX-License-Identifier: Apache-2.0 */
/* bench_put.c - how fast full-precision blocks go in, quantization left out.
 *
 * Ours: raw16 blocks through Put to a kivid on its unix socket, from the first page to the last
 * result.  Opponent: a bare stream with messages of the same size that nobody reads.  The same
 * 64 MiB of data are walked through by both, so neither lives in a cache.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clients/cli/bench.h"
#include "clients/cli/benches.h"
#include "clients/cli/daemon.h"
#include "clients/cli/opponent.h"
#include "clients/cli/tensors.h"

enum {
    LAYERS = 4,
    HEADS = 8,
    HEAD_DIM = 128,
    PAGE_BYTES = 2 * KIVI_BLOCK_TOKENS * HEADS * HEAD_DIM * 2, /* 512 KiB: one message */
    DATA_BYTES = 64 << 20,
    UNDER_WAY = 6, /* blocks sent whose result is still to come: below the service's credit */
};

struct bench_put {
    struct ctl *ctl;
    struct kivi_client *client;
    struct kivi_layout_info info;
    const uint8_t *data;
    uint64_t blocks; /* of one run */
    uint64_t next;   /* digests given out so far */
};

/* A digest nobody has used: the service does not ask what it stands for. */
static struct kivi_digest digest_next(struct bench_put *bench) {
    struct kivi_digest digest = {{0}};
    uint64_t number = ++bench->next, time = (uint64_t)(ctl_seconds() * 1e6);
    memcpy(digest.bytes, &number, sizeof number);
    memcpy(digest.bytes + 8, &time, sizeof time);
    return digest;
}

static bool result_take(struct bench_put *bench, struct kivi_put *put, uint64_t *taken) {
    struct kivi_put_result result;
    struct kivi_error *error = &bench->ctl->error;
    if (kivi_put_result(put, &result, 0, error)) return false;
    (*taken)++;
    if (result.code == KIVI_OK) return true;
    memset(error, 0, sizeof *error);
    error->code = result.code;
    snprintf(error->message, sizeof error->message, "%s", result.message);
    return false;
}

/* One run: seconds, or a negative number with ctl->error. */
static double ours_run(struct bench_put *bench) {
    struct kivi_put *put;
    double began = ctl_seconds();
    uint64_t taken = 0;
    size_t at = 0;
    bool good = true;
    if (kivi_put_open(bench->client, &bench->info, &put, &bench->ctl->error)) return -1;
    for (uint64_t block = 0; block < bench->blocks && good; block++) {
        struct kivi_digest digest = digest_next(bench);
        for (uint32_t layer = 0; layer < LAYERS && good; layer++) {
            struct kivi_put_page page = {.digest = &digest, .layer = layer,
                                         .form = KIVI_FORM_FULL, .data = bench->data + at,
                                         .data_bytes = PAGE_BYTES};
            good = !kivi_put_page(put, &page, 0, &bench->ctl->error);
            at = (at + PAGE_BYTES) % DATA_BYTES;
        }
        if (good && block - taken >= UNDER_WAY) good = result_take(bench, put, &taken);
    }
    while (good && taken < bench->blocks) good = result_take(bench, put, &taken);
    struct kivi_error closing;
    if (kivi_put_close(put, 0, &closing) && good) {
        bench->ctl->error = closing;
        good = false;
    }
    return good ? ctl_seconds() - began : -1;
}

static bool layout_register(struct bench_put *bench) {
    struct kivi_layout layout;
    memset(&layout, 0, sizeof layout);
    snprintf(layout.model, sizeof layout.model, "kivictl bench put");
    snprintf(layout.codec.preset, sizeof layout.codec.preset, "raw16");
    layout.layers = LAYERS;
    layout.kv_heads = HEADS;
    layout.query_heads = HEADS;
    layout.head_dim = HEAD_DIM;
    layout.dtype = KIVI_F16;
    return !kivi_layout_register(bench->client, &layout, &bench->info, NULL, 0,
                                 &bench->ctl->error);
}

static int measure(struct bench_put *bench, struct opponent *opponent, int runs) {
    double ours[BENCH_RUNS_MAX], theirs[BENCH_RUNS_MAX];
    uint64_t messages = bench->blocks * LAYERS;
    double bytes = (double)messages * PAGE_BYTES;
    struct progress progress;
    if (!layout_register(bench)) return ctl_failed(bench->ctl);
    progress_begin(&progress, "bench put", (uint64_t)runs + 1, bench->ctl->quiet);
    for (int i = -1; i < runs; i++) { /* run -1 warms both up */
        double seconds = opponent_stream(opponent, bench->data, DATA_BYTES, PAGE_BYTES, messages);
        double our_seconds = ours_run(bench);
        if (our_seconds < 0) return ctl_failed(bench->ctl);
        if (seconds < 0) return ctl_say(bench->ctl, EXIT_REFUSED, "the bare stream failed");
        progress_update(&progress, (uint64_t)i + 2);
        if (i < 0) continue;
        ours[i] = bytes / our_seconds / 1e9;
        theirs[i] = bytes / seconds / 1e9;
    }
    progress_end(&progress);
    struct bench report = {.name = "put"};
    bench_row(&report, (struct bench_row){
        .name = "raw16 blocks, 512 KiB messages", .ours = bench_median(ours, runs),
        .opponent = bench_median(theirs, runs), .opponent_name = "bare C-core stream",
        .unit = "GB/s", .goal = 0.7});
    return bench_print(bench->ctl, &report);
}

int run_bench_put(struct ctl *ctl, int argc, const char **argv) {
    char *kivid = NULL;
    int runs = BENCH_RUNS, mebibytes = 256, exit_code;
    const struct poptOption own[] = {
        {"kivid", 0, POPT_ARG_STRING, &kivid, 0, "the daemon to start (beside kivictl)", "PATH"},
        {"runs", 'n', POPT_ARG_INT, &runs, 0, "of each side (5)", "N"},
        {"mib", 0, POPT_ARG_INT, &mebibytes, 0, "of one run (256)", "MIB"}, POPT_TABLEEND};
    if (!ctl_options(ctl, argc, argv, own, "[OPTIONS]",
                     "Starts a kivid of its own, without a disk, unless --target names a running one.\n",
                     0, 0, &exit_code))
        return exit_code;
    if (runs < BENCH_RUNS || runs > BENCH_RUNS_MAX || mebibytes < 4)
        return ctl_say(ctl, EXIT_USAGE, "%d to %d runs of at least 4 MiB", BENCH_RUNS, BENCH_RUNS_MAX);

    struct daemon daemon;
    if (!daemon_prepare(ctl, &daemon, kivid, NULL)) return EXIT_USAGE;
    char path[DAEMON_PATH_BYTES + 32];
    snprintf(path, sizeof path, "%s/opponent.sock", daemon.dir);
    pid_t server = opponent_serve(path); /* before gRPC is used here */
    struct opponent *opponent = opponent_open(path, (uint32_t)ctl->spin_us);
    uint16_t *data = ctl_alloc(DATA_BYTES);
    bench_fill(data, DATA_BYTES / 2);

    struct bench_put bench = {.ctl = ctl, .data = (const uint8_t *)data};
    bench.blocks = ((uint64_t)mebibytes << 20) / (LAYERS * PAGE_BYTES);
    static const char *const flags[] = {"--disk-path=", "--arena-bytes=512MiB",
                                        "--log-level=warn", NULL};
    bool running = ctl->target ? ctl_connect(ctl) : daemon_start(ctl, &daemon, flags);
    bench.client = ctl->target ? ctl->client : daemon.client;
    exit_code = running ? measure(&bench, opponent, runs) : EXIT_REFUSED;

    opponent_close(opponent);
    if (server) kill(server, SIGKILL);
    daemon_remove(&daemon);
    free(data);
    return exit_code;
}
