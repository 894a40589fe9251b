/* SPDX-License-Identifier: Apache-2.0 */
/* commands_tensors.c - append, attend, fetch: between files and sessions. */
#include "clients/cli/commands_tensors.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clients/cli/tensors.h"

enum { APPEND_STEP = 1024, FETCH_STEP = 1024 }; /* tokens between two looks at the clock */

void *ctl_alloc(size_t bytes) {
    void *memory = calloc(1, bytes ? bytes : 1);
    if (memory) return memory;
    fprintf(stderr, "kivictl: out of memory\n");
    exit(EXIT_REFUSED);
}

bool layout_of_file(struct ctl *ctl, const struct kvfile *kv,
                    const struct layout_options *options, struct kivi_layout_info *info) {
    struct kivi_layout layout = kvfile_layout(kv);
    snprintf(layout.codec.preset, sizeof layout.codec.preset, "%s",
             options->codec ? options->codec : "kivi2");
    snprintf(layout.model, sizeof layout.model, "%s", options->model ? options->model : "");
    if (options->window_tokens >= 0 || options->sink_blocks >= 0) {
        bool paper = strstr(layout.codec.preset, "paper") != NULL;
        layout.has_exact = true;
        layout.window_tokens = options->window_tokens >= 0 ? (uint32_t)options->window_tokens : 128;
        layout.sink_blocks =
            options->sink_blocks >= 0 ? (uint32_t)options->sink_blocks : (paper ? 0 : 1);
    }
    return kivi_layout_register(ctl->client, &layout, info, NULL, 0, &ctl->error) == KIVI_OK;
}

bool session_existing(struct ctl *ctl, const char *name, const char *salt,
                      struct kivi_session **session, struct kivi_session_state *state,
                      bool *was_open) {
    struct kivi_session_info info;
    if (kivi_session_describe(ctl->client, name, &info, NULL, NULL, NULL, 0, &ctl->error))
        return false;
    *was_open = info.open;
    struct kivi_session_options options = {.name = name,
                                           .mode = KIVI_OPEN_EXISTING,
                                           .salt = salt,
                                           .salt_bytes = salt ? strlen(salt) : 0};
    options.fingerprint = info.fingerprint;
    return kivi_session_open(ctl->client, &options, session, state, 0, &ctl->error) == KIVI_OK;
}

void session_leave(struct kivi_session *session, bool was_open) {
    if (was_open) kivi_session_abandon(session);
    else kivi_session_close(session, true, 0, NULL);
}

static bool file_open(struct ctl *ctl, const char *path, struct kvfile *kv) {
    char why[ST_WHY_BYTES];
    if (kvfile_open(kv, path, why)) return true;
    kvfile_close(kv);
    ctl_say(ctl, EXIT_USAGE, "%s: %s", path, why);
    return false;
}

static bool file_fits(struct ctl *ctl, const struct kvfile *kv, const struct kivi_layout *layout) {
    bool fits = kv->layers == layout->layers && kv->kv_heads == layout->kv_heads &&
                kv->query_heads == layout->query_heads && kv->head_dim == layout->head_dim &&
                kv->dtype == layout->dtype;
    if (!fits) ctl_say(ctl, EXIT_USAGE, "the file's shape is not that of the session's layout");
    return fits;
}

/* ---- append ------------------------------------------------------------------------------ */

struct append_options {
    char *session, *salt, *commit;
    int tokens, no_ids, no_energy, prefix;
    struct layout_options layout;
};

/* Tokens begin .. end - 1 of the file, all layers, some at a time. */
static bool append_tokens(struct ctl *ctl, const struct append_options *options,
                          const struct kvfile *kv, struct kivi_session *session, uint64_t begin,
                          uint64_t end, struct kivi_appended *result) {
    size_t row_bytes = (size_t)kv->kv_heads * kv->head_dim * kivi_dtype_bytes(kv->dtype);
    const void *k[KVFILE_LAYERS_MAX], *v[KVFILE_LAYERS_MAX];
    uint8_t *rows = ctl_alloc(2 * kv->layers * APPEND_STEP * row_bytes);
    float *energy = NULL;
    if (kv->has_energy && !options->no_energy) {
        energy = ctl_alloc((size_t)kv->layers * kv->kv_heads * kv->head_dim * sizeof *energy);
        kvfile_energy(kv, energy);
    }
    for (uint32_t i = 0; i < kv->layers; i++) {
        k[i] = rows + 2 * i * APPEND_STEP * row_bytes;
        v[i] = rows + (2 * i + 1) * APPEND_STEP * row_bytes;
    }

    struct progress progress;
    progress_begin(&progress, "append", end - begin, ctl->quiet);
    int code = KIVI_OK;
    for (uint64_t at = begin; at < end && code == KIVI_OK; at += APPEND_STEP) {
        uint64_t count = end - at < APPEND_STEP ? end - at : APPEND_STEP;
        for (uint32_t i = 0; i < kv->layers; i++) {
            kvfile_turn(kv, kv->k[i], at, count, (void *)k[i]);
            kvfile_turn(kv, kv->v[i], at, count, (void *)v[i]);
        }
        struct kivi_append append = {
            .all_layers = true,
            .expected_length = at,
            .tokens = count,
            .k = k,
            .v = v,
            .token_ids = kv->token_ids && !options->no_ids ? kv->token_ids + at : NULL,
            .query_energy = energy,
        };
        struct kivi_appended step;
        code = kivi_session_append(session, &append, &step, 0, &ctl->error);
        step.blocks_shared += result->blocks_shared;
        *result = step;
        progress_update(&progress, at + count - begin);
    }
    progress_end(&progress);
    free(energy);
    free(rows);
    return code == KIVI_OK;
}

static bool durability_parse(const char *text, uint32_t *durability) {
    if (!text || strcmp(text, "written") == 0) *durability = KIVI_WRITTEN;
    else if (strcmp(text, "synced") == 0) *durability = KIVI_SYNCED;
    else if (strcmp(text, "none") == 0) *durability = 0;
    else return false;
    return true;
}

static int append_file(struct ctl *ctl, const struct append_options *options,
                       const struct kvfile *kv, uint32_t durability) {
    static const char *const reached_names[] = {"none", "volatile", "written", "synced"};
    struct kivi_layout_info info;
    struct kivi_session *session;
    struct kivi_session_state state;
    struct kivi_appended result = {0};
    if (!layout_of_file(ctl, kv, &options->layout, &info)) return ctl_failed(ctl);

    uint64_t end = options->tokens > 0 && (uint64_t)options->tokens < kv->tokens
                       ? (uint64_t)options->tokens : kv->tokens;
    struct kivi_session_options open = {
        .name = options->session,
        .salt = options->salt,
        .salt_bytes = options->salt ? strlen(options->salt) : 0,
        .token_ids = options->prefix ? kv->token_ids : NULL,
        .token_count = options->prefix ? end : 0,
    };
    open.fingerprint = info.fingerprint;
    struct kivi_session_info before = {.open = false};
    kivi_session_describe(ctl->client, options->session, &before, NULL, NULL, NULL, 0, NULL);
    double began = ctl_seconds();
    if (kivi_session_open(ctl->client, &open, &session, &state, 0, &ctl->error))
        return ctl_failed(ctl);

    uint64_t begin = state.length < end ? state.length : end;
    bool good = begin == end || append_tokens(ctl, options, kv, session, begin, end, &result);
    double appended = ctl_seconds();
    uint32_t reached = 0;
    if (good && durability)
        good = !kivi_session_commit(session, durability, &reached, NULL, 0, &ctl->error);
    double committed = ctl_seconds();
    session_leave(session, before.open || !durability);
    if (!good) return ctl_failed(ctl);

    uint64_t bytes = (end - begin) * kv->layers * 2 * kv->kv_heads * kv->head_dim *
                     kivi_dtype_bytes(kv->dtype);
    const char *durable = reached_names[reached <= KIVI_SYNCED ? reached : 0];
    if (ctl->json) {
        json_t *value = json_pack(
            "{s:s, s:b, s:I, s:I, s:I, s:I, s:i, s:f, s:f, s:s}", "session", options->session,
            "created", state.created, "tokens", (json_int_t)(end - begin), "length",
            (json_int_t)end, "bytes_in", (json_int_t)bytes, "sealed_tokens",
            (json_int_t)result.sealed_tokens, "blocks_shared", (int)result.blocks_shared,
            "append_seconds", appended - began, "commit_seconds", committed - appended,
            "durability", durable);
        json_object_set_new(value, "layout", json_layout(&info));
        json_print(value);
    } else {
        printf("%s: %" PRIu64 " tokens appended (%s in %s, %s), length %" PRIu64
               ", %u blocks shared, %s\n",
               options->session, end - begin, text_bytes(bytes),
               text_us((appended - began) * 1e6), text_rate((double)bytes, appended - began), end,
               result.blocks_shared, durability ? durable : "not committed");
    }
    return EXIT_DONE;
}

int run_append(struct ctl *ctl, int argc, const char **argv) {
    struct append_options options = {.layout = LAYOUT_OPTIONS_INIT};
    const struct poptOption own[] = {
        {"session", 's', POPT_ARG_STRING, &options.session, 0, "the session's name", "NAME"},
        {"salt", 0, POPT_ARG_STRING, &options.salt, 0, "makes equal texts different ones", "TEXT"},
        {"tokens", 'n', POPT_ARG_INT, &options.tokens, 0, "append up to this length (all)", "N"},
        {"prefix", 0, POPT_ARG_NONE, &options.prefix, 0,
         "a new session starts with what the service holds of this text", NULL},
        {"no-token-ids", 0, POPT_ARG_NONE, &options.no_ids, 0, "share nothing", NULL},
        {"no-energy", 0, POPT_ARG_NONE, &options.no_energy, 0, "do not send q_energy.L", NULL},
        {"commit", 0, POPT_ARG_STRING, &options.commit, 0,
         "wait until it is: none, written, synced (written)", "WHEN"},
        LAYOUT_OPTIONS(options.layout), POPT_TABLEEND};
    struct kvfile kv;
    uint32_t durability;
    int exit_code;
    if (!ctl_options(ctl, argc, argv, own, "FILE --session NAME [OPTIONS]",
                     "FILE is safetensors: k.L and v.L [kv heads, tokens, dim], optionally q.L (for the number\n"
                     "of query heads), q_energy.L and token_ids. A session that has some of the tokens gets\n"
                     "the rest.\n", 1, 1, &exit_code))
        return exit_code;
    if (!options.session) return ctl_say(ctl, EXIT_USAGE, "--session is missing");
    if (!durability_parse(options.commit, &durability))
        return ctl_say(ctl, EXIT_USAGE, "--commit is none, written or synced");
    if (!file_open(ctl, ctl->arguments[0], &kv)) return EXIT_USAGE;
    exit_code = ctl_connect(ctl) ? append_file(ctl, &options, &kv, durability) : EXIT_USAGE;
    kvfile_close(&kv);
    return exit_code;
}

/* ---- attend ------------------------------------------------------------------------------ */

/* Turns [rows][heads][width] to [heads][rows][width]. */
static void rows_turn(const float *from, uint64_t rows, uint64_t heads, uint64_t width, float *to) {
    for (uint64_t row = 0; row < rows; row++)
        for (uint64_t head = 0; head < heads; head++)
            memcpy(to + (head * rows + row) * width, from + (row * heads + head) * width,
                   width * sizeof *to);
}

/* The newest `rows` queries of one layer, each up to its own token; results [heads][rows][..]. */
static bool attend_layer(struct ctl *ctl, const struct kvfile *kv, struct kivi_session *session,
                         uint32_t layer, uint64_t length, uint64_t rows, float *out, float *lse) {
    size_t q_row = (size_t)kv->query_heads * kv->head_dim;
    uint8_t *q = ctl_alloc(rows * q_row * kivi_dtype_bytes(kv->dtype));
    float *out_rows = ctl_alloc(rows * q_row * sizeof(float));
    float *lse_rows = ctl_alloc(rows * kv->query_heads * sizeof(float));
    uint32_t visible[KIVI_ROWS_MAX];
    kvfile_turn(kv, kv->q[layer], kv->rows - rows, rows, q);

    int code = KIVI_OK;
    for (uint64_t at = 0; at < rows && code == KIVI_OK; at += KIVI_ROWS_MAX) {
        uint32_t count = rows - at < KIVI_ROWS_MAX ? (uint32_t)(rows - at) : KIVI_ROWS_MAX;
        for (uint32_t i = 0; i < count; i++) visible[i] = (uint32_t)(length - rows + at + i + 1);
        struct kivi_attend_item item = {
            .session = session,
            .q = q + at * q_row * kivi_dtype_bytes(kv->dtype),
            .rows = count,
            .visible = visible,
            .no_energy = true,
            .out = out_rows + at * q_row,
            .lse = lse_rows + at * kv->query_heads,
        };
        code = kivi_session_attend(layer, &item, 0, &ctl->error);
    }
    rows_turn(out_rows, rows, kv->query_heads, kv->head_dim, out);
    rows_turn(lse_rows, rows, kv->query_heads, 1, lse);
    free(q);
    free(out_rows);
    free(lse_rows);
    return code == KIVI_OK;
}

/* Results of all layers as out.L and lse.L. */
static bool outputs_write(struct ctl *ctl, const struct kvfile *kv, const char *path,
                          uint64_t rows, float *const *out, float *const *lse) {
    struct st_tensor tensors[2 * KVFILE_LAYERS_MAX];
    char names[2 * KVFILE_LAYERS_MAX][32], why[ST_WHY_BYTES];
    for (uint32_t i = 0; i < 2 * kv->layers; i++) {
        bool is_lse = i % 2;
        snprintf(names[i], sizeof names[i], "%s.%u", is_lse ? "lse" : "out", kv->numbers[i / 2]);
        tensors[i] = (struct st_tensor){.name = names[i], .dtype = "F32", .rank = is_lse ? 2 : 3,
                                        .shape = {kv->query_heads, rows, kv->head_dim}};
        tensors[i].bytes = kv->query_heads * rows * (is_lse ? 1 : kv->head_dim) * sizeof(float);
        tensors[i].data = is_lse ? lse[i / 2] : out[i / 2];
    }
    if (st_write(path, tensors, 2 * kv->layers, why)) return true;
    ctl_say(ctl, EXIT_REFUSED, "%s: %s", path, why);
    return false;
}

static int attend_file(struct ctl *ctl, const struct kvfile *kv, const char *name,
                       const char *salt, uint64_t rows, const char *path) {
    struct kivi_session *session;
    struct kivi_session_state state;
    bool was_open;
    if (!session_existing(ctl, name, salt, &session, &state, &was_open)) return ctl_failed(ctl);
    if (rows > state.length) rows = state.length;
    if (!file_fits(ctl, kv, &state.info.layout) || rows == 0) {
        session_leave(session, was_open);
        return rows ? EXIT_USAGE : ctl_say(ctl, EXIT_REFUSED, "the session is empty");
    }

    float *out[KVFILE_LAYERS_MAX], *lse[KVFILE_LAYERS_MAX];
    struct progress progress;
    progress_begin(&progress, "attend", kv->layers, ctl->quiet);
    bool good = true;
    double began = ctl_seconds();
    for (uint32_t i = 0; i < kv->layers; i++) {
        out[i] = ctl_alloc(kv->query_heads * rows * kv->head_dim * sizeof(float));
        lse[i] = ctl_alloc(kv->query_heads * rows * sizeof(float));
        good = good && attend_layer(ctl, kv, session, i, state.length, rows, out[i], lse[i]);
        progress_update(&progress, i + 1);
    }
    progress_end(&progress);
    double seconds = ctl_seconds() - began;
    session_leave(session, was_open);

    int exit_code = EXIT_DONE;
    if (!good) exit_code = ctl_failed(ctl);
    else if (path && !outputs_write(ctl, kv, path, rows, out, lse)) exit_code = EXIT_REFUSED;
    else if (ctl->json)
        json_print(json_pack("{s:s, s:I, s:I, s:i, s:f}", "session", name, "length",
                             (json_int_t)state.length, "rows", (json_int_t)rows, "layers",
                             (int)kv->layers, "seconds", seconds));
    else
        printf("%s: %" PRIu64 " rows on %" PRIu64 " tokens, %u layers, in %s\n", name, rows,
               state.length, kv->layers, text_us(seconds * 1e6));
    for (uint32_t i = 0; i < kv->layers; i++) {
        free(out[i]);
        free(lse[i]);
    }
    return exit_code;
}

int run_attend(struct ctl *ctl, int argc, const char **argv) {
    char *session = NULL, *salt = NULL, *path = NULL;
    int rows = 0, exit_code;
    const struct poptOption own[] = {
        {"session", 's', POPT_ARG_STRING, &session, 0, "the session's name", "NAME"},
        {"salt", 0, POPT_ARG_STRING, &salt, 0, "the one it was made with", "TEXT"},
        {"rows", 'r', POPT_ARG_INT, &rows, 0, "of the newest queries (all in the file)", "N"},
        {"out", 'o', POPT_ARG_STRING, &path, 0,
         "write out.L [query heads, rows, dim] and lse.L [query heads, rows], F32, safetensors",
         "FILE"},
        POPT_TABLEEND};
    struct kvfile kv;
    if (!ctl_options(ctl, argc, argv, own, "FILE --session NAME [OPTIONS]",
                     "FILE holds q.L [query heads, rows, dim], the queries of the session's newest tokens; each\n"
                     "sees the tokens up to its own. They are left out of the session's query energy.\n",
                     1, 1, &exit_code))
        return exit_code;
    if (!session) return ctl_say(ctl, EXIT_USAGE, "--session is missing");
    if (!file_open(ctl, ctl->arguments[0], &kv)) return EXIT_USAGE;
    uint64_t wanted = rows > 0 && (uint64_t)rows < kv.rows ? (uint64_t)rows : kv.rows;
    if (wanted == 0)
        exit_code = ctl_say(ctl, EXIT_USAGE, "%s: there is no q.L", ctl->arguments[0]);
    else
        exit_code = ctl_connect(ctl) ? attend_file(ctl, &kv, session, salt, wanted, path) : EXIT_USAGE;
    kvfile_close(&kv);
    return exit_code;
}

/* ---- fetch ------------------------------------------------------------------------------- */

static const char *dtype_text(uint32_t dtype) {
    return dtype == KIVI_F16 ? "F16" : dtype == KIVI_BF16 ? "BF16" : "F32";
}

/* [tokens][heads][dim] as it comes into its place in [heads][tokens][dim]. */
static void fetch_turn(const uint8_t *from, const struct kivi_layout *layout, uint32_t dtype,
                       uint64_t offset, uint64_t count, uint64_t tokens, uint8_t *to) {
    size_t row_bytes = layout->head_dim * kivi_dtype_bytes(dtype);
    for (uint64_t i = 0; i < count; i++)
        for (uint32_t head = 0; head < layout->kv_heads; head++)
            memcpy(to + (head * tokens + offset + i) * row_bytes,
                   from + (i * layout->kv_heads + head) * row_bytes, row_bytes);
}

static bool fetch_layer(struct ctl *ctl, struct kivi_session *session, uint32_t layer,
                        uint32_t dtype, uint64_t begin, uint64_t end, uint8_t *k, uint8_t *v) {
    const struct kivi_layout *layout = &kivi_session_layout(session)->layout;
    size_t step_bytes =
        (size_t)FETCH_STEP * layout->kv_heads * layout->head_dim * kivi_dtype_bytes(dtype);
    uint8_t *rows = ctl_alloc(2 * step_bytes);
    int code = KIVI_OK;
    for (uint64_t at = begin; at < end && code == KIVI_OK; at += FETCH_STEP) {
        uint64_t count = end - at < FETCH_STEP ? end - at : FETCH_STEP;
        code = kivi_session_fetch(session, layer, at, at + count, dtype, rows, rows + step_bytes,
                                  0, &ctl->error);
        if (code != KIVI_OK) break;
        fetch_turn(rows, layout, dtype, at - begin, count, end - begin, k);
        fetch_turn(rows + step_bytes, layout, dtype, at - begin, count, end - begin, v);
    }
    free(rows);
    return code == KIVI_OK;
}

/* dtype 0: the layout's */
static int fetch_session(struct ctl *ctl, const char *name, const char *salt, uint32_t dtype,
                         uint64_t begin, uint64_t end, const char *path) {
    struct kivi_session *session;
    struct kivi_session_state state;
    bool was_open;
    if (!session_existing(ctl, name, salt, &session, &state, &was_open)) return ctl_failed(ctl);
    const struct kivi_layout *layout = &state.info.layout;
    if (dtype == 0) dtype = layout->dtype;
    if (end == 0 || end > state.length) end = state.length;
    if (begin >= end) {
        session_leave(session, was_open);
        return ctl_say(ctl, EXIT_REFUSED, "the session has no such tokens");
    }

    struct st_tensor tensors[2 * KVFILE_LAYERS_MAX];
    char names[2 * KVFILE_LAYERS_MAX][32], why[ST_WHY_BYTES];
    size_t bytes =
        (size_t)(end - begin) * layout->kv_heads * layout->head_dim * kivi_dtype_bytes(dtype);
    struct progress progress;
    progress_begin(&progress, "fetch", layout->layers, ctl->quiet);
    bool good = true;
    double began = ctl_seconds();
    for (uint32_t i = 0; i < 2 * layout->layers; i++) {
        snprintf(names[i], sizeof names[i], "%c.%u", i % 2 ? 'v' : 'k', i / 2);
        tensors[i] = (struct st_tensor){.name = names[i], .dtype = dtype_text(dtype),
                                        .rank = 3, .data = ctl_alloc(bytes), .bytes = bytes,
                                        .shape = {layout->kv_heads, end - begin, layout->head_dim}};
    }
    for (uint32_t i = 0; i < layout->layers && good; i++) {
        good = fetch_layer(ctl, session, i, dtype, begin, end, (void *)tensors[2 * i].data,
                           (void *)tensors[2 * i + 1].data);
        progress_update(&progress, i + 1);
    }
    progress_end(&progress);
    double seconds = ctl_seconds() - began;
    session_leave(session, was_open);

    int exit_code = EXIT_DONE;
    uint64_t bytes_out = 2ull * layout->layers * bytes;
    if (!good) exit_code = ctl_failed(ctl);
    else if (path && !st_write(path, tensors, 2 * layout->layers, why))
        exit_code = ctl_say(ctl, EXIT_REFUSED, "%s: %s", path, why);
    else if (ctl->json)
        json_print(json_pack("{s:s, s:I, s:I, s:I, s:f}", "session", name, "begin",
                             (json_int_t)begin, "end", (json_int_t)end, "bytes_out",
                             (json_int_t)bytes_out, "seconds", seconds));
    else
        printf("%s: tokens %" PRIu64 " .. %" PRIu64 ", %s in %s (%s)\n", name, begin, end - 1,
               text_bytes(bytes_out), text_us(seconds * 1e6),
               text_rate((double)bytes_out, seconds));
    for (uint32_t i = 0; i < 2 * layout->layers; i++) free((void *)tensors[i].data);
    return exit_code;
}

int run_fetch(struct ctl *ctl, int argc, const char **argv) {
    char *session = NULL, *salt = NULL, *path = NULL;
    long begin = 0, end = 0;
    int exit_code, f32 = 0;
    const struct poptOption own[] = {
        {"session", 's', POPT_ARG_STRING, &session, 0, "the session's name", "NAME"},
        {"salt", 0, POPT_ARG_STRING, &salt, 0, "the one it was made with", "TEXT"},
        {"begin", 0, POPT_ARG_LONG, &begin, 0, "first token (0)", "N"},
        {"end", 0, POPT_ARG_LONG, &end, 0, "token behind the last (the session's length)", "N"},
        {"f32", 0, POPT_ARG_NONE, &f32, 0,
         "binary32 whatever the session's elements are: nearer to what attends see", NULL},
        {"out", 'o', POPT_ARG_STRING, &path, 0,
         "write k.L and v.L [kv heads, tokens, dim] of layers 0, 1, ..., safetensors", "FILE"},
        POPT_TABLEEND};
    if (!ctl_options(ctl, argc, argv, own, "--session NAME --out FILE [OPTIONS]", NULL, 0, 0,
                     &exit_code))
        return exit_code;
    if (!session) return ctl_say(ctl, EXIT_USAGE, "--session is missing");
    if (begin < 0 || end < 0) return ctl_say(ctl, EXIT_USAGE, "tokens begin at 0");
    if (!ctl_connect(ctl)) return EXIT_USAGE;
    return fetch_session(ctl, session, salt, f32 ? KIVI_F32 : 0, (uint64_t)begin, (uint64_t)end,
                         path);
}
