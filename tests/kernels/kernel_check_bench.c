/* SPDX-License-Identifier: Apache-2.0 */
/* kernel_check_bench.c - how fast a backend is.
 *
 * Each row is ours against an opponent, in turn, in this run: medians of RUNS.  The
 * opponents are the scalar definition, memcpy of the same bytes on one thread, and this
 * backend itself doing the same work in another way.  ratio > 1: ours is better.
 */
#include <stdarg.h>

#include "kernels/half.h"
#include "proto/kv_check.h"
#include "tests/kernels/kernel_check.h"

enum { RUNS = 7, PAGES = 16, CONTEXT_PAGES = 128, HEADS = 8, GROUP = 4 };

struct bench {
    struct lab ours;
    struct lab scalar;
    FILE *table;
    FILE *json;
    bool first_row;
    bool met;
};

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *times) {
    qsort(times, RUNS, sizeof *times, by_size);
    return times[RUNS / 2];
}

/* goal 0: reported only. */
struct row {
    char name[96];
    double ours;
    double opponent;
    const char *opponent_name;
    const char *unit;
    bool more_is_better;
    double goal;
};

static void row_print(struct bench *bench, const struct row *row) {
    double ratio = row->more_is_better ? row->ours / row->opponent : row->opponent / row->ours;
    bool met = row->goal == 0 || ratio >= row->goal;
    bench->met &= met;
    fprintf(bench->table, "  %-48s %10.4g %-5s %10.4g %-22s %7.2fx", row->name, row->ours,
            row->unit, row->opponent, row->opponent_name, ratio);
    if (row->goal != 0) fprintf(bench->table, "  goal %g%s", row->goal, met ? "" : "  MISSED");
    fprintf(bench->table, "\n");
    if (bench->json == NULL) return;
    fprintf(bench->json,
            "%s\n  {\"name\": \"%s\", \"ours\": %.6g, \"opponent\": %.6g, \"opponent_name\": \"%s\", "
            "\"unit\": \"%s\", \"ratio\": %.6g, \"goal\": ",
            bench->first_row ? "" : ",", row->name, row->ours, row->opponent, row->opponent_name,
            row->unit, ratio);
    if (row->goal == 0)
        fprintf(bench->json, "null, \"met\": null}");
    else
        fprintf(bench->json, "%g, \"met\": %s}", row->goal, met ? "true" : "false");
    bench->first_row = false;
}

__attribute__((format(printf, 2, 3))) static void row_name(struct row *row, const char *format,
                                                           ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(row->name, sizeof row->name, format, arguments);
    va_end(arguments);
}

/* ---- pages -------------------------------------------------------------------------------- */

struct pages {
    struct kv_quantize quantize[PAGES];
    struct kv_dequantize dequantize[PAGES];
};

static void pages_make(struct lab *lab, const struct kv_shape *shape, struct pages *pages) {
    struct dice dice = {1};
    size_t elements = 2 * kv_shape_elements(shape);
    uint16_t *raw = malloc(elements * sizeof *raw);
    KV_CHECK(raw != NULL);
    for (uint32_t i = 0; i < PAGES; i++) {
        pattern_fill(PATTERN_NORMAL, &dice, shape, raw);
        pattern_fill(PATTERN_NORMAL, &dice, shape, raw + elements / 2);
        pages->quantize[i].raw = lab_put(lab, raw, elements * sizeof *raw);
        pages->quantize[i].packed = lab_device(lab, kv_page_bytes(shape));
        pages->quantize[i].energy = NULL;
        pages->dequantize[i].packed = pages->quantize[i].packed;
        pages->dequantize[i].raw = lab_device(lab, elements * sizeof *raw);
        pages->dequantize[i].dtype = (enum kv_dtype)shape->dtype;
    }
    free(raw);
    kv_kernel_quantize(lab->stream, shape, PAGES, pages->quantize);
    lab_wait(lab);
}

static double time_quantize(struct lab *lab, const struct kv_shape *shape,
                            const struct pages *pages) {
    double start = lab_seconds();
    kv_kernel_quantize(lab->stream, shape, PAGES, pages->quantize);
    lab_wait(lab);
    return lab_seconds() - start;
}

static double time_dequantize(struct lab *lab, const struct kv_shape *shape,
                              const struct pages *pages) {
    double start = lab_seconds();
    kv_kernel_dequantize(lab->stream, shape, PAGES, pages->dequantize);
    lab_wait(lab);
    return lab_seconds() - start;
}

static double time_memcpy(uint8_t *target, const uint8_t *source, size_t bytes) {
    double start = lab_seconds();
    memcpy(target, source, bytes);
    __asm__ volatile("" : : "r"(target) : "memory"); /* the copy is looked at */
    return lab_seconds() - start;
}

/* What the goals speak of; what is slower is reported. */
static bool has_goals(const char *backend) {
    return strcmp(backend, "avx512") == 0 || strcmp(backend, "amx") == 0;
}

/* Bytes in per second, on one worker, against memcpy of the same bytes: what issue-level
 * goals speak of.  Only the codecs they name have one. */
static double memcpy_goal(const char *backend, const char *preset) {
    if (!has_goals(backend)) return 0;
    if (strcmp(preset, "kivi2-paper") == 0) return 0.25;
    return strcmp(preset, "kivi2") == 0 ? 0.1 : 0;
}

static void bench_pages(struct bench *bench, const struct kv_preset *preset) {
    struct kv_shape shape = {
        .heads = 2, .head_dim = 128, .dtype = KV_DTYPE_F16, .codec = preset->codec};
    const char *name = kv_device_name(bench->ours.device);
    size_t bytes = PAGES * kv_shape_bytes_raw(&shape);
    struct pages ours, scalar;
    lab_clear(&bench->ours);
    lab_clear(&bench->scalar);
    pages_make(&bench->ours, &shape, &ours);
    pages_make(&bench->scalar, &shape, &scalar);
    uint8_t *target = lab_device(&bench->scalar, bytes);
    const uint8_t *source = lab_device(&bench->scalar, bytes);

    double quantize[2][RUNS], dequantize[2][RUNS], copy[RUNS];
    for (int run = 0; run < RUNS; run++) {
        quantize[0][run] = time_quantize(&bench->ours, &shape, &ours);
        quantize[1][run] = time_quantize(&bench->scalar, &shape, &scalar);
        dequantize[0][run] = time_dequantize(&bench->ours, &shape, &ours);
        dequantize[1][run] = time_dequantize(&bench->scalar, &shape, &scalar);
        copy[run] = time_memcpy(target, source, bytes);
    }
    double gigabytes = 1e-9 * (double)bytes;
    double goal = has_goals(name) ? 10 : 0;
    struct row row = {.unit = "GB/s", .more_is_better = true, .goal = goal,
                      .opponent_name = "scalar"};
    row_name(&row, "quantize %s %s", name, preset->name);
    row.ours = gigabytes / median(quantize[0]);
    row.opponent = gigabytes / median(quantize[1]);
    row_print(bench, &row);
    double ours_quantize = row.ours;

    row_name(&row, "dequantize %s %s", name, preset->name);
    row.ours = gigabytes / median(dequantize[0]);
    row.opponent = gigabytes / median(dequantize[1]);
    row_print(bench, &row);

    row_name(&row, "quantize %s %s, one core", name, preset->name);
    row.ours = ours_quantize;
    row.opponent = gigabytes / median(copy);
    row.opponent_name = "memcpy of the input";
    row.goal = memcpy_goal(name, preset->name);
    row_print(bench, &row);
}

/* ---- attention ------------------------------------------------------------------------------ */

struct asking {
    struct kv_attend item;
    struct kv_page_ref refs[CONTEXT_PAGES];
    uint32_t visible[KV_ROWS_MAX];
};

static void asking_make(struct lab *lab, const struct kv_shape *shape, struct asking *asking) {
    struct dice dice = {2};
    size_t elements = 2 * kv_shape_elements(shape);
    size_t query_bytes = sizeof(float) * KV_ROWS_MAX * HEADS * GROUP * shape->head_dim;
    uint16_t *raw = malloc(elements * sizeof *raw);
    uint8_t *packed = malloc(kv_page_bytes(shape));
    float *query = malloc(query_bytes);
    KV_CHECK(raw != NULL && packed != NULL && query != NULL);
    pattern_fill(PATTERN_NORMAL, &dice, shape, raw);
    pattern_fill(PATTERN_NORMAL, &dice, shape, raw + elements / 2);
    lab_quantize(lab, shape, raw, NULL, packed);
    for (uint32_t i = 0; i < CONTEXT_PAGES; i++)
        asking->refs[i] = (struct kv_page_ref){lab_put(lab, packed, kv_page_bytes(shape)),
                                               KV_BLOCK_TOKENS, 0};
    for (size_t i = 0; i < query_bytes / sizeof(float); i++) query[i] = dice_normal(&dice);
    for (uint32_t i = 0; i < KV_ROWS_MAX; i++)
        asking->visible[i] = CONTEXT_PAGES * KV_BLOCK_TOKENS;
    asking->item = (struct kv_attend){
        .query = lab_put(lab, query, query_bytes),
        .dtype = KV_DTYPE_F32,
        .heads_q = HEADS * GROUP,
        .rows = 1,
        .score_scale = 0.088f,
        .page_count = CONTEXT_PAGES,
        .pages = asking->refs,
        .visible = asking->visible,
        .out = lab_pinned(lab, query_bytes),
        .lse = lab_pinned(lab, sizeof(float) * KV_ROWS_MAX * HEADS * GROUP),
    };
    free(raw);
    free(packed);
    free(query);
}

static double time_attend(struct lab *lab, const struct kv_shape *shape, struct asking *asking,
                          uint32_t rows) {
    asking->item.rows = rows;
    double start = lab_seconds();
    kv_kernel_attend(lab->stream, shape, 1, &asking->item);
    lab_wait(lab);
    return lab_seconds() - start;
}

static void bench_attend(struct bench *bench, const struct kv_preset *preset) {
    struct kv_shape shape = {
        .heads = HEADS, .head_dim = 128, .dtype = KV_DTYPE_F16, .codec = preset->codec};
    const char *name = kv_device_name(bench->ours.device);
    static struct asking ours, scalar;
    lab_clear(&bench->ours);
    lab_clear(&bench->scalar);
    asking_make(&bench->ours, &shape, &ours);
    asking_make(&bench->scalar, &shape, &scalar);
    double one[2][RUNS], sixteen[RUNS];
    time_attend(&bench->ours, &shape, &ours, 1); /* the first call touches new memory */
    for (int run = 0; run < RUNS; run++) {
        one[0][run] = time_attend(&bench->ours, &shape, &ours, 1);
        one[1][run] = time_attend(&bench->scalar, &shape, &scalar, 1);
        sixteen[run] = time_attend(&bench->ours, &shape, &ours, 16);
    }
    struct row row = {.unit = "us", .opponent_name = "scalar"};
    row_name(&row, "attend %s %s, 16K tokens, 1 row", name, preset->name);
    row.goal = has_goals(name) ? 10 : 0;
    row.ours = 1e6 * median(one[0]);
    row.opponent = 1e6 * median(one[1]);
    row_print(bench, &row);

    row_name(&row, "attend %s %s, 16 rows, a row", name, preset->name);
    row.opponent = row.ours;
    row.ours = 1e6 * median(sixteen) / 16;
    row.opponent_name = "1 row";
    row.goal = has_goals(name) && strcmp(preset->name, "kivi2") == 0 ? 3 : 0;
    row_print(bench, &row);
}

/* ---- the run ---------------------------------------------------------------------------------- */

static void machine_name(char *name, size_t bytes) {
    snprintf(name, bytes, "unknown");
    FILE *file = fopen("/proc/cpuinfo", "r");
    char line[256];
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || colon == NULL) continue;
        colon[strcspn(colon, "\n\"\\")] = 0;
        snprintf(name, bytes, "%s", colon + 2);
        break;
    }
    if (file != NULL) fclose(file);
}

static void bench_backend(struct bench *bench, const char *backend, uint32_t workers) {
    if (!lab_open(&bench->ours, backend, workers)) {
        fprintf(bench->table, "%s: not on this machine\n", backend);
        return;
    }
    KV_CHECK(lab_open(&bench->scalar, "scalar", workers));
    size_t presets;
    const struct kv_preset *preset = kv_presets(&presets);
    fprintf(bench->table, "%s\n", backend);
    for (size_t i = 0; i < presets; i++) {
        if (preset[i].codec.kind != KV_CODEC_RAW) bench_pages(bench, &preset[i]);
        bench_attend(bench, &preset[i]);
    }
    lab_close(&bench->ours);
    lab_close(&bench->scalar);
}

bool kernel_bench(const struct bench_options *options) {
    static const char *const names[] = {"scalar", "avx2", "avx512", "amx", "cuda"};
    bool to_stdout = options->json != NULL && strcmp(options->json, "-") == 0;
    struct bench bench = {.first_row = true, .met = true, .table = to_stdout ? stderr : stdout};
    char machine[128];
    machine_name(machine, sizeof machine);
    if (options->json != NULL) {
        bench.json = to_stdout ? stdout : fopen(options->json, "w");
        if (bench.json == NULL) return false;
        const char *commit = getenv("KV_COMMIT");
        fprintf(bench.json,
                "{\"bench\": \"kernel_check\", \"machine\": \"%s\", \"commit\": \"%s\", \"rows\": [",
                machine, commit != NULL ? commit : "unknown");
    }
    uint32_t workers = options->workers != 0 ? options->workers : 1;
    fprintf(bench.table, "%s, %u worker%s, medians of %d\n", machine, workers,
            workers == 1 ? "" : "s", RUNS);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (options->backend == NULL || strcmp(options->backend, names[i]) == 0)
            bench_backend(&bench, names[i], workers);
    if (bench.json != NULL) {
        fprintf(bench.json, "\n]}\n");
        if (fclose(bench.json) != 0) return false;
    }
    return bench.met;
}
