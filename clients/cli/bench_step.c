/* SPDX-License-Identifier: Apache-2.0 */
/* bench_step.c - one layer's decode step, round trip.
 *
 * Ours: a frame that appends one token and attends with its query rows, on a session of 128 tokens;
 * the context is brought back to 128 by a new session every 32 steps.  Opponent: the emptiest call
 * there is, a health check, by the same library over the same connection.  One is a stream message,
 * the other a unary call: that is how each is used.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clients/cli/bench.h"
#include "clients/cli/benches.h"
#include "clients/cli/daemon.h"
#include "clients/cli/tensors.h"

enum {
    HEADS = 8,
    GROUP = 4, /* query heads per KV head */
    HEAD_DIM = 128,
    CONTEXT = 128,
    STEPS = 32, /* of one session */
    KV_ROW = HEADS * HEAD_DIM,
    Q_ROW = KV_ROW * GROUP,
};

struct bench_step {
    struct ctl *ctl;
    struct kivi_client *client;
    struct kivi_digest fingerprint;
    uint16_t *data; /* CONTEXT K rows, CONTEXT V rows, one q row */
    uint64_t sessions;
};

static bool session_begin(struct bench_step *bench, struct kivi_session **session, char *name) {
    snprintf(name, 64, "kivictl-bench-step-%llu", (unsigned long long)bench->sessions++);
    struct kivi_session_options options = {.name = name};
    options.fingerprint = bench->fingerprint;
    if (kivi_session_open(bench->client, &options, session, NULL, 0, &bench->ctl->error))
        return false;
    const void *k = bench->data, *v = bench->data + CONTEXT * KV_ROW;
    struct kivi_append append = {.layer = 0, .tokens = CONTEXT, .k = &k, .v = &v};
    struct kivi_appended result;
    return !kivi_session_append(*session, &append, &result, 0, &bench->ctl->error);
}

/* The times of STEPS steps of one session, into us[]. */
static bool steps_run(struct bench_step *bench, double *us, float *out, float *lse) {
    struct kivi_session *session = NULL;
    char name[64];
    bool good = session_begin(bench, &session, name);
    for (uint64_t i = 0; i < STEPS && good; i++) {
        struct kivi_attend_item item = {
            .session = session,
            .q = bench->data + 2 * CONTEXT * KV_ROW,
            .rows = 1,
            .k = bench->data + i * KV_ROW,
            .v = bench->data + (CONTEXT + i) * KV_ROW,
            .append_tokens = 1,
            .expected_length = CONTEXT + i,
            .out = out,
            .lse = lse,
        };
        double began = ctl_seconds();
        good = !kivi_session_attend(0, &item, 0, &bench->ctl->error);
        us[i] = (ctl_seconds() - began) * 1e6;
    }
    if (session && good) good = !kivi_session_close(session, false, 0, &bench->ctl->error);
    else kivi_session_abandon(session);
    if (good) kivi_session_delete(bench->client, name, 0, NULL);
    return good;
}

static bool pings_run(struct bench_step *bench, double *us) {
    for (int i = 0; i < STEPS; i++) {
        bool serving;
        double began = ctl_seconds();
        if (kivi_client_ping(bench->client, "", &serving, 0, &bench->ctl->error)) return false;
        us[i] = (ctl_seconds() - began) * 1e6;
    }
    return true;
}

/* One run: `sessions` times STEPS steps and as many pings, in turn; both p50s. */
static bool run_once(struct bench_step *bench, int sessions, double *step_us, double *ping_us) {
    double *steps = ctl_alloc((size_t)sessions * STEPS * sizeof *steps);
    double *pings = ctl_alloc((size_t)sessions * STEPS * sizeof *pings);
    float *out = ctl_alloc(Q_ROW * sizeof *out), *lse = ctl_alloc(HEADS * GROUP * sizeof *lse);
    bool good = true;
    for (int i = 0; i < sessions && good; i++)
        good = steps_run(bench, steps + i * STEPS, out, lse) && pings_run(bench, pings + i * STEPS);
    *step_us = bench_median(steps, sessions * STEPS);
    *ping_us = bench_median(pings, sessions * STEPS);
    free(steps);
    free(pings);
    free(out);
    free(lse);
    return good;
}

static int measure(struct bench_step *bench, int runs, int sessions) {
    double ours[BENCH_RUNS_MAX], theirs[BENCH_RUNS_MAX];
    struct kivi_layout layout;
    struct kivi_layout_info info;
    memset(&layout, 0, sizeof layout);
    snprintf(layout.model, sizeof layout.model, "kivictl bench step");
    layout.layers = 1;
    layout.kv_heads = HEADS;
    layout.query_heads = HEADS * GROUP;
    layout.head_dim = HEAD_DIM;
    layout.dtype = KIVI_F16;
    if (kivi_layout_register(bench->client, &layout, &info, NULL, 0, &bench->ctl->error))
        return ctl_failed(bench->ctl);
    bench->fingerprint = info.fingerprint;

    struct progress progress;
    progress_begin(&progress, "bench step", (uint64_t)runs + 1, bench->ctl->quiet);
    for (int i = -1; i < runs; i++) { /* run -1 warms up */
        double step_us, ping_us;
        if (!run_once(bench, sessions, &step_us, &ping_us)) return ctl_failed(bench->ctl);
        progress_update(&progress, (uint64_t)i + 2);
        if (i < 0) continue;
        ours[i] = step_us;
        theirs[i] = ping_us;
    }
    progress_end(&progress);
    struct bench report = {.name = "step"};
    bench_row(&report, (struct bench_row){
        .name = "append 1 token and attend, p50", .ours = bench_median(ours, runs),
        .opponent = bench_median(theirs, runs), .opponent_name = "empty unary call", .unit = "us",
        .less_is_better = true, .goal = 0.5});
    return bench_print(bench->ctl, &report);
}

int run_bench_step(struct ctl *ctl, int argc, const char **argv) {
    char *kivid = NULL, spin[64];
    int runs = BENCH_RUNS, sessions = 30, server_spin_us = 0, exit_code;
    const struct poptOption own[] = {
        {"kivid", 0, POPT_ARG_STRING, &kivid, 0, "the daemon to start (beside kivictl)", "PATH"},
        {"runs", 'n', POPT_ARG_INT, &runs, 0, "(5)", "N"},
        {"sessions", 0, POPT_ARG_INT, &sessions, 0, "of 32 steps each, in one run (30)", "N"},
        {"server-spin-us", 0, POPT_ARG_INT, &server_spin_us, 0, "spin_us of the daemon (0)", "US"},
        POPT_TABLEEND};
    if (!ctl_options(ctl, argc, argv, own, "[OPTIONS]",
                     "8 KV heads of 128 channels, 4 query heads each, 128 tokens of context. Starts a kivid of\n"
                     "its own unless --target names a running one. A ratio of 0.5 is twice the empty call.\n",
                     0, 0, &exit_code))
        return exit_code;
    if (runs < BENCH_RUNS || runs > BENCH_RUNS_MAX || sessions < 1 || sessions > 10000)
        return ctl_say(ctl, EXIT_USAGE, "%d to %d runs, 1 to 10000 sessions", BENCH_RUNS,
                       BENCH_RUNS_MAX);

    struct daemon daemon = {.pid = 0};
    struct bench_step bench = {.ctl = ctl};
    bench.data = ctl_alloc((2 * CONTEXT * KV_ROW + Q_ROW) * sizeof *bench.data);
    bench_fill(bench.data, 2 * CONTEXT * KV_ROW + Q_ROW);
    bool running;
    if (ctl->target) {
        running = ctl_connect(ctl);
        bench.client = ctl->client;
    } else {
        snprintf(spin, sizeof spin, "--spin-us=%d", server_spin_us);
        const char *const flags[] = {"--disk-path=", "--arena-bytes=64MiB", "--tail-bytes-max=32MiB",
                                     "--log-level=warn", spin, NULL};
        running = daemon_prepare(ctl, &daemon, kivid, NULL) && daemon_start(ctl, &daemon, flags);
        bench.client = daemon.client;
    }
    exit_code = running ? measure(&bench, runs, sessions) : EXIT_REFUSED;
    daemon_remove(&daemon);
    free(bench.data);
    return exit_code;
}
