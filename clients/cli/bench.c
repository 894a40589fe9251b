/* SPDX-License-Identifier: Apache-2.0 */
/* bench.c - how measurements are reported, and the ones that other programs make. */
#include "clients/cli/bench.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "clients/cli/benches.h"
#include "clients/cli/daemon.h"

void bench_row(struct bench *bench, struct bench_row row) {
    if (bench->row_count < BENCH_ROWS_MAX) bench->rows[bench->row_count++] = row;
}

static int double_compare(const void *a, const void *b) {
    double left = *(const double *)a, right = *(const double *)b;
    return left < right ? -1 : left > right;
}

double bench_median(double *values, int count) {
    qsort(values, (size_t)count, sizeof *values, double_compare);
    return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

void bench_fill(uint16_t *halves, size_t count) {
    uint32_t state = 1;
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525 + 1013904223;
        /* Sign and mantissa at random, exponent 2^-3 .. 2^0. */
        halves[i] = (uint16_t)((state >> 16 & 0x83FF) | (12 + (state >> 8 & 3)) << 10);
    }
}

static void machine_name(char *text, size_t bytes) {
    char line[256], model[128] = "unknown CPU";
    FILE *file = fopen("/proc/cpuinfo", "r");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "model name : %127[^\n]", model) == 1) break;
    if (file) fclose(file);
    struct utsname name;
    uname(&name);
    snprintf(text, bytes, "%s, %ld cores, Linux %s", model, sysconf(_SC_NPROCESSORS_ONLN),
             name.release);
}

/* Of the checkout we stand in, if we stand in one. */
static void commit_name(char *text, size_t bytes) {
    snprintf(text, bytes, "unknown");
    FILE *git = popen("git rev-parse --short=12 HEAD 2>/dev/null", "r");
    char line[64];
    if (git && fgets(line, sizeof line, git)) snprintf(text, bytes, "%.*s", (int)strcspn(line, "\n"), line);
    if (git) pclose(git);
}

static double row_ratio(const struct bench_row *row) {
    return row->less_is_better ? row->opponent / row->ours : row->ours / row->opponent;
}

int bench_print(struct ctl *ctl, const struct bench *bench) {
    char machine[320], commit[64];
    machine_name(machine, sizeof machine);
    commit_name(commit, sizeof commit);
    bool missed = false;
    json_t *rows = json_array();
    struct table table;
    table_begin(&table, "what|>ours|>opponent||unit|>ratio|>goal|");
    for (int i = 0; i < bench->row_count; i++) {
        const struct bench_row *row = &bench->rows[i];
        bool compared = row->opponent > 0 && row->ours > 0;
        double ratio = compared ? row_ratio(row) : 0;
        bool has_goal = compared && row->goal > 0, met = has_goal && ratio >= row->goal;
        missed |= has_goal && !met;
        json_t *value = json_pack("{s:s, s:f, s:o, s:o, s:s, s:o, s:o, s:o}", "name", row->name,
                                  "ours", row->ours, "opponent",
                                  compared ? json_real(row->opponent) : json_null(),
                                  "opponent_name",
                                  compared ? json_string(row->opponent_name) : json_null(), "unit",
                                  row->unit, "ratio", compared ? json_real(ratio) : json_null(),
                                  "goal", has_goal ? json_real(row->goal) : json_null(), "met",
                                  has_goal ? json_boolean(met) : json_null());
        json_array_append_new(rows, value);
        table_cell(&table, "%s", row->name);
        table_cell(&table, "%.4g", row->ours);
        if (compared) table_cell(&table, "%.4g", row->opponent);
        else table_cell(&table, "-");
        table_cell(&table, "%s", compared ? row->opponent_name : "");
        table_cell(&table, "%s", row->unit);
        if (compared) table_cell(&table, "%.2f", ratio);
        else table_cell(&table, "-");
        if (has_goal) table_cell(&table, "%.2f", row->goal);
        else table_cell(&table, "-");
        table_cell(&table, "%s", !has_goal ? "" : met ? "met" : "MISSED");
    }
    if (ctl->json) {
        json_print(json_pack("{s:s, s:s, s:s, s:O}", "bench", bench->name, "machine", machine,
                             "commit", commit, "rows", rows));
        table_free(&table);
    } else {
        printf("%s  (%s, commit %s)\n", bench->name, machine, commit);
        table_print(&table);
    }
    json_decref(rows);
    return missed ? EXIT_MISSED : EXIT_DONE;
}

/* ---- Measurements inside a room are made by that room's own program ------------------------- */

/* Names given in the report of another program; the report owns them. */
static double number_of(const json_t *row, const char *key) {
    return json_number_value(json_object_get(row, key));
}
static const char *text_of(const json_t *row, const char *key) {
    const char *text = json_string_value(json_object_get(row, key));
    return text ? text : "";
}

/* The report of a helper as our own: the same shape, with machine and commit filled in. */
static int helper_report(struct ctl *ctl, const char *name, FILE *out) {
    json_error_t error;
    json_t *report = json_loadf(out, JSON_DISABLE_EOF_CHECK, &error), *row;
    size_t index;
    if (!report) return ctl_say(ctl, EXIT_REFUSED, "its report is no JSON: %s", error.text);
    struct bench bench = {.name = name};
    json_array_foreach(json_object_get(report, "rows"), index, row) {
        double ours = number_of(row, "ours"), opponent = number_of(row, "opponent");
        bool less = opponent > 0 && (number_of(row, "ratio") > 1) != (ours > opponent);
        bench_row(&bench, (struct bench_row){.name = text_of(row, "name"),
                                             .opponent_name = text_of(row, "opponent_name"),
                                             .unit = text_of(row, "unit"), .ours = ours,
                                             .opponent = opponent, .less_is_better = less,
                                             .goal = number_of(row, "goal")});
    }
    int exit_code = bench_print(ctl, &bench);
    json_decref(report);
    return exit_code;
}

/* Runs PROGRAM ARGUMENTS, whose report goes to the file named last on its command line or, without
 * `to_file`, to its stdout. */
static int helper_run(struct ctl *ctl, const char *name, const char *program,
                      const char *bazel_path, const char *arguments, bool to_file) {
    char path[DAEMON_PATH_BYTES], file[] = "/tmp/kivictl-bench-XXXXXX";
    char line[3 * DAEMON_PATH_BYTES];
    if (!program_find(program, bazel_path, path, sizeof path))
        return ctl_say(ctl, EXIT_USAGE, "%s is not beside kivictl; build it: bazel build //%.*s:%s",
                       program, (int)(strlen(bazel_path) - strlen(program) - 1), bazel_path,
                       program);
    int fd = mkstemp(file);
    if (fd < 0) return ctl_say(ctl, EXIT_REFUSED, "%s cannot be written", file);
    snprintf(line, sizeof line, to_file ? "'%s' %s '%s' >&2" : "'%s' %s >'%s'", path, arguments,
             file);
    int status = system(line);
    FILE *out = fdopen(fd, "r");
    int exit_code = status == 0 ? helper_report(ctl, name, out)
                                : ctl_say(ctl, EXIT_REFUSED, "%s failed", path);
    fclose(out);
    unlink(file);
    return exit_code;
}

static int run_bench_disk(struct ctl *ctl, int argc, const char **argv) {
    char *dir = NULL, arguments[DAEMON_PATH_BYTES];
    int runs = BENCH_RUNS, kib = 1024, depth = 32, exit_code;
    const struct poptOption own[] = {
        {"dir", 'd', POPT_ARG_STRING, &dir, 0, "on the file system to measure (/tmp)", "DIR"},
        {"runs", 'n', POPT_ARG_INT, &runs, 0, "of each side (5)", "N"},
        {"kib", 0, POPT_ARG_INT, &kib, 0, "of a block (1024)", "KIB"},
        {"depth", 0, POPT_ARG_INT, &depth, 0, "requests in flight (32)", "N"}, POPT_TABLEEND};
    if (!ctl_options(ctl, argc, argv, own, "[OPTIONS]", "Needs fio, and 2 GB in DIR.\n", 0, 0,
                     &exit_code))
        return exit_code;
    if (runs < BENCH_RUNS) return ctl_say(ctl, EXIT_USAGE, "at least %d runs", BENCH_RUNS);
    char made[DAEMON_PATH_BYTES];
    snprintf(made, sizeof made, "%s/kivictl-disk-XXXXXX", dir ? dir : "/tmp");
    if (strchr(made, '\'') || !mkdtemp(made))
        return ctl_say(ctl, EXIT_USAGE, "%s: %s", made, strerror(errno));
    snprintf(arguments, sizeof arguments, "'%.300s' %d %d %d", made, runs, kib, depth);
    exit_code = helper_run(ctl, "disk", "disk_bench", "tests/storage/disk_bench", arguments, false);
    directory_remove(made);
    return exit_code;
}

static int run_bench_attend(struct ctl *ctl, int argc, const char **argv) {
    char *codec = NULL, arguments[128];
    int exit_code;
    const struct poptOption own[] = {
        {"codec", 0, POPT_ARG_STRING, &codec, 0, "a preset (kivi2)", "PRESET"}, POPT_TABLEEND};
    if (!ctl_options(ctl, argc, argv, own, "[OPTIONS]",
                     "One layer, 8 KV heads x 128 channels, 4 query heads to each, 16384 tokens, on one\n"
                     "thread and on two, against fp32 and fp16 attention on the same tokens uncompressed,\n"
                     "a read of the packed bytes, and 16 rows against one.  Needs no server.\n",
                     0, 0, &exit_code))
        return exit_code;
    if (codec && strspn(codec, "abcdefghijklmnopqrstuvwxyz0123456789.-") != strlen(codec))
        return ctl_say(ctl, EXIT_USAGE, "--codec is a preset's name");
    snprintf(arguments, sizeof arguments, "%s%.64s --json", codec ? "--codec " : "",
             codec ? codec : "");
    return helper_run(ctl, "attend", "attend_bench", "tests/bench/attend_bench", arguments, true);
}

const struct command BENCH_COMMANDS[] = {
    {"bench put", "", "blocks in, against a bare gRPC stream", run_bench_put},
    {"bench step", "", "a decode step, against an empty call", run_bench_step},
    {"bench restart", "", "finding everything again after a stop", run_bench_restart},
    {"bench disk", "", "spill and restore, against fio", run_bench_disk},
    {"bench attend", "", "attention on packed pages, against fp32", run_bench_attend},
    {NULL, NULL, NULL, NULL},
};
