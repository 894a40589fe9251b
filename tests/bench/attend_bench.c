/* SPDX-License-Identifier: Apache-2.0 */
/* attend_bench.c - attention on packed pages against attention on keys and values left alone.
 *
 *     attend_bench [--json FILE] [--codec NAME] [--threads N] [--grow TOKENS] [--backend NAME]
 *
 * One layer of 8 KV heads, 4 query heads to each, 128 channels, one query row: a decode step.
 * All take the same memory's contents and the same number of threads, in turn, in this run; figures
 * are medians of RUNS, ratios are of medians.  Ours goes through the verbs that the engine calls,
 * worker pool and wake-up included.  The rows:
 *
 *   fp32      the faster of opponent_fp32() and OpenBLAS on binary32
 *   fp16      opponent_fp16()
 *   floor     reading the packed bytes, adding them up, and nothing else
 *   16 rows   ours with sixteen rows on the same context, a row
 *
 * at 16384 tokens, on one thread and on N (two if not given); --grow adds the first three from 128
 * tokens up to TOKENS, doubling.  tests/bench/plot_attend.py draws that.
 */
#include <getopt.h>
#include <math.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "kernels/half.h"
#include "kernels/kernel.h"
#include "proto/kv_check.h"
#include "tests/bench/opponent.h"
#include "tests/bench/read_floor.h"

enum { HEADS = 8, GROUP = OPPONENT_GROUP, D = OPPONENT_D, T = KV_BLOCK_TOKENS, RUNS = 9 };
enum { TOKENS = 16384, ROWS = 16 };

struct bench {
    FILE *table, *json;
    bool first_row;
    const char *codec, *backend;
    struct kv_shape shape;
    uint32_t threads;
    struct team *team;
    struct kv_device *device;
    struct kv_stream *stream;
    int done; /* eventfd */

    uint32_t tokens;
    uint8_t *packed;
    size_t packed_bytes;
    float *keys, *values;
    uint16_t *keys16, *values16;
    float *query, *out, *lse, *scratch;
    struct kv_page_ref *pages;
    bool openblas;
};

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void *memory(size_t bytes) {
    void *piece = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    KV_CHECK(piece != NULL);
    return piece;
}

static void wait_for_stream(struct bench *bench) {
    uint64_t count, ticket = kv_stream_mark(bench->stream);
    kv_stream_notify(bench->stream, bench->done);
    while (!kv_stream_reached(bench->stream, ticket))
        KV_CHECK(read(bench->done, &count, sizeof count) == sizeof count);
}

/* ---- the context ----------------------------------------------------------------------- */

/* About normal: the sum of twelve. */
static float noise(uint64_t *state) {
    float sum = -6;
    for (int i = 0; i < 12; i++) {
        *state = *state * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(*state >> 40) * 0x1p-24f;
    }
    return sum;
}

/* One page of noise, again and again: speed does not hang on values, but must not meet zeros. */
static void context_make(struct bench *bench, uint32_t tokens) {
    uint64_t state = 1;
    size_t plane = (size_t)T * D, half = HEADS * plane;
    uint16_t *raw = memory(2 * half * sizeof *raw);
    for (size_t i = 0; i < 2 * half; i++)
        raw[i] = kv_f16_of_f32(noise(&state));
    size_t page_bytes           = kv_page_bytes(&bench->shape);
    uint8_t *page               = memory(page_bytes);
    struct kv_quantize quantize = {.raw = raw, .packed = page};
    kv_kernel_quantize(bench->stream, &bench->shape, 1, &quantize);
    wait_for_stream(bench);

    size_t elements     = (size_t)HEADS * tokens * D;
    bench->tokens       = tokens;
    bench->packed_bytes = page_bytes * (tokens / T);
    bench->packed       = memory(bench->packed_bytes);
    bench->pages        = memory(tokens / T * sizeof *bench->pages);
    bench->keys         = memory(elements * sizeof(float));
    bench->values       = memory(elements * sizeof(float));
    bench->keys16       = memory(elements * sizeof(uint16_t));
    bench->values16     = memory(elements * sizeof(uint16_t));
    bench->query        = memory((size_t)ROWS * HEADS * GROUP * D * sizeof(float));
    bench->out          = memory((size_t)ROWS * HEADS * GROUP * D * sizeof(float));
    bench->lse          = memory((size_t)ROWS * HEADS * GROUP * sizeof(float));
    bench->scratch      = memory(opponent_scratch_floats(HEADS, tokens) * sizeof(float));
    for (uint32_t p = 0; p < tokens / T; p++) {
        memcpy(bench->packed + p * page_bytes, page, page_bytes);
        bench->pages[p] = (struct kv_page_ref){bench->packed + p * page_bytes, T, 0};
        for (uint32_t head = 0; head < HEADS; head++) {
            size_t at = ((size_t)head * tokens + p * T) * D;
            memcpy(bench->keys16 + at, raw + head * plane, plane * 2);
            memcpy(bench->values16 + at, raw + half + head * plane, plane * 2);
            for (size_t i = 0; i < plane; i++) {
                bench->keys[at + i]   = kv_f32_of_f16(raw[head * plane + i]);
                bench->values[at + i] = kv_f32_of_f16(raw[half + head * plane + i]);
            }
        }
    }
    for (size_t i = 0; i < (size_t)ROWS * HEADS * GROUP * D; i++)
        bench->query[i] = noise(&state) * 0.0884f;
    free(raw);
    free(page);
}

static void context_free(struct bench *bench) {
    void *pieces[] = {bench->packed,   bench->pages, bench->keys, bench->values, bench->keys16,
                      bench->values16, bench->query, bench->out,  bench->lse,    bench->scratch};
    for (size_t i = 0; i < sizeof pieces / sizeof pieces[0]; i++)
        free(pieces[i]);
}

/* ---- who runs ---------------------------------------------------------------------------- */

static void run_ours(struct bench *bench, uint32_t rows) {
    uint32_t visible[ROWS];
    for (uint32_t r = 0; r < rows; r++)
        visible[r] = bench->tokens;
    struct kv_attend item = {
        .query       = bench->query,
        .dtype       = KV_DTYPE_F32,
        .heads_q     = HEADS * GROUP,
        .rows        = rows,
        .score_scale = 1,
        .page_count  = bench->tokens / T,
        .pages       = bench->pages,
        .visible     = visible,
        .out         = bench->out,
        .lse         = bench->lse,
    };
    kv_kernel_attend(bench->stream, &bench->shape, 1, &item);
    wait_for_stream(bench);
}

static struct opponent opponent(struct bench *bench, bool half) {
    return (struct opponent){
        .team    = bench->team,
        .heads   = HEADS,
        .tokens  = bench->tokens,
        .keys    = half ? (const void *)bench->keys16 : bench->keys,
        .values  = half ? (const void *)bench->values16 : bench->values,
        .query   = bench->query,
        .out     = bench->out,
        .scratch = bench->scratch,
    };
}

enum runner { OURS, OURS_ROWS, FP32, FP16, FLOOR, OPENBLAS, RUNNERS };

static void run(struct bench *bench, enum runner runner) {
    struct opponent full = opponent(bench, false), half = opponent(bench, true);
    switch (runner) {
    case OURS: run_ours(bench, 1); break;
    case OURS_ROWS: run_ours(bench, ROWS); break;
    case FP32: opponent_fp32(&full); break;
    case OPENBLAS:
        bench->openblas = opponent_openblas(&full, bench->threads);
        if (bench->openblas) usleep(50000); /* its threads go on spinning for a while */
        break;
    case FP16: opponent_fp16(&half); break;
    default: read_floor(bench->team, bench->packed, bench->packed_bytes); break;
    }
}

/* An opponent that computes something else would be easy to beat: all three agree. */
static void opponents_check(struct bench *bench) {
    enum { N = HEADS * GROUP * D };
    static float truth[N];
    static const enum runner others[] = {OPENBLAS, FP16};
    run(bench, FP32);
    memcpy(truth, bench->out, sizeof truth);
    for (int i = 0; i < 2; i++) {
        double error = 0, size = 0;
        run(bench, others[i]);
        for (int j = 0; j < N; j++) {
            error += pow((double)bench->out[j] - truth[j], 2);
            size += pow(truth[j], 2);
        }
        KV_CHECK(error <= 1e-8 * size);
    }
}

/* ---- figures -------------------------------------------------------------------------------- */

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void row(struct bench *bench, const char *what, double ours, const char *opponent_name,
                double theirs, double goal) {
    double ratio = theirs / ours;
    char name[96], met[48] = "\"goal\": null, \"met\": null";
    snprintf(name, sizeof name, "attend %s, %u tokens, %u thread%s%s", bench->codec, bench->tokens,
             bench->threads, bench->threads == 1 ? "" : "s", what);
    if (goal != 0)
        snprintf(met, sizeof met, "\"goal\": %g, \"met\": %s", goal,
                 ratio >= goal ? "true" : "false");
    fprintf(bench->table, "  %-52s %10.1f us  %-18s %10.1f us  %6.2fx", name, 1e6 * ours, opponent_name,
           1e6 * theirs, ratio);
    if (goal != 0) fprintf(bench->table, "  goal %g%s", goal, ratio >= goal ? "" : "  MISSED");
    fprintf(bench->table, "\n");
    if (bench->json == NULL) return;
    fprintf(bench->json,
            "%s\n  {\"name\": \"%s\", \"tokens\": %u, \"threads\": %u, \"ours\": %.6g, "
            "\"opponent\": %.6g, \"opponent_name\": \"%s\", \"unit\": \"us\", \"ratio\": %.6g, %s}",
            bench->first_row ? "" : ",", name, bench->tokens, bench->threads, 1e6 * ours,
            1e6 * theirs, opponent_name, ratio, met);
    bench->first_row = false;
}

static void measure(struct bench *bench, uint32_t tokens, bool goals) {
    double times[RUNNERS][RUNS], middle[RUNNERS];
    context_make(bench, tokens);
    opponents_check(bench);
    run(bench, OURS);
    for (int i = 0; i < RUNS; i++)
        for (int r = 0; r < RUNNERS; r++) {
            if ((r == OURS_ROWS && !goals) || (r == OPENBLAS && !bench->openblas)) continue;
            double start = seconds(), rest = r == OPENBLAS ? 0.05 : 0;
            run(bench, (enum runner)r);
            times[r][i] = seconds() - start - rest;
        }
    for (int r = 0; r < RUNNERS; r++) {
        qsort(times[r], RUNS, sizeof(double), by_size);
        middle[r] = times[r][RUNS / 2];
    }
    bool blas = bench->openblas && middle[OPENBLAS] < middle[FP32];
    row(bench, "", middle[OURS], blas ? "fp32, OpenBLAS" : "fp32", middle[blas ? OPENBLAS : FP32],
        goals ? 3 : 0);
    row(bench, "", middle[OURS], "fp16", middle[FP16], goals ? 1.5 : 0);
    row(bench, "", middle[OURS], "floor", middle[FLOOR], 0);
    if (goals) row(bench, ", 16 rows, a row", middle[OURS_ROWS] / ROWS, "1 row", middle[OURS], 3);
    context_free(bench);
}

static void measure_threads(struct bench *bench, uint32_t threads, uint32_t grow) {
    struct kv_device_options options = {.name = bench->backend, .workers = threads};
    bench->threads                   = threads;
    bench->team                      = team_open(threads);
    KV_CHECK(kv_device_open(&options, &bench->device) == KV_OK);
    KV_CHECK(kv_stream_open(bench->device, &bench->stream) == KV_OK);
    fprintf(bench->table, "%s, %u thread%s\n", kv_device_name(bench->device), threads, threads == 1 ? "" : "s");
    measure(bench, TOKENS, true);
    for (uint32_t tokens = T; tokens <= grow; tokens *= 2)
        measure(bench, tokens, false);
    kv_stream_close(bench->stream);
    kv_device_close(bench->device);
    team_close(bench->team);
}

static void usage(FILE *to) {
    fprintf(to, "usage: attend_bench [--json FILE] [--codec NAME] [--threads N] [--grow TOKENS]\n"
                "                    [--backend NAME]\n\n"
                "A decode step's attention on packed pages against fp32 and fp16 attention on the same\n"
                "tokens, and against reading the packed bytes; 16384 tokens, on 1 and on N (2) threads.\n"
                "--grow adds 128 to TOKENS, doubling.  --json writes the rows to FILE, - is stdout.\n");
}

int main(int argc, char **argv) {
    static const struct option known[] = {{"json", required_argument, NULL, 'j'},
                                          {"codec", required_argument, NULL, 'c'},
                                          {"threads", required_argument, NULL, 't'},
                                          {"grow", required_argument, NULL, 'g'},
                                          {"backend", required_argument, NULL, 'b'},
                                          {"help", no_argument, NULL, 'h'},
                                          {NULL, 0, NULL, 0}};
    struct bench bench = {.table = stdout, .first_row = true, .codec = "kivi2", .backend = "auto", .done = eventfd(0, 0)};
    uint32_t threads = 2, grow = 0;
    const char *json = NULL;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        if (option == 'j')
            json = optarg;
        else if (option == 'c')
            bench.codec = optarg;
        else if (option == 't')
            threads = (uint32_t)strtoul(optarg, NULL, 10);
        else if (option == 'g')
            grow = (uint32_t)strtoul(optarg, NULL, 10);
        else if (option == 'b')
            bench.backend = optarg;
        else {
            usage(option == 'h' ? stdout : stderr);
            return option == 'h' ? 0 : 2;
        }
    }
    struct kv_preset preset;
    if (kv_preset_find(bench.codec, &preset) != KV_OK || threads < 1 || threads > 256) {
        fprintf(stderr, "attend_bench: no such codec, or not 1 to 256 threads\n");
        return 2;
    }
    if (!opponent_available()) {
        fprintf(stderr, "attend_bench: the opponents need AVX-512\n");
        return 1;
    }
    bench.shape = (struct kv_shape){
        .heads = HEADS, .head_dim = D, .dtype = KV_DTYPE_F16, .codec = preset.codec};
    if (json != NULL) {
        bool to_stdout = strcmp(json, "-") == 0;
        bench.json     = to_stdout ? stdout : fopen(json, "w");
        bench.table    = to_stdout ? stderr : stdout;
        if (bench.json == NULL) return 1;
        const char *commit = getenv("KV_COMMIT");
        fprintf(bench.json, "{\"bench\": \"attend\", \"commit\": \"%s\", \"rows\": [",
                commit != NULL ? commit : "unknown");
    }
    measure_threads(&bench, 1, grow);
    if (threads > 1) measure_threads(&bench, threads, grow);
    if (bench.json != NULL) {
        fprintf(bench.json, "\n]}\n");
        if (fclose(bench.json) != 0) return 1;
    }
    return 0;
}
