/* SPDX-License-Identifier: Apache-2.0 */
/* output.c - tables, JSON and progress. */
#include "clients/cli/output.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    TEXT_BUFFERS = 8,
    TEXT_BYTES = 80,
    PROGRESS_EVERY_US = 100000,
};

/* ---- Tables ------------------------------------------------------------------------------ */

static void table_append(struct table *table, char *text) {
    if ((table->cell_count & (table->cell_count - 1)) == 0) {
        size_t capacity = table->cell_count ? 2 * table->cell_count : 1;
        table->cells = realloc(table->cells, capacity * sizeof *table->cells);
    }
    if (!table->cells || !text) abort();
    table->cells[table->cell_count++] = text;
}

void table_begin(struct table *table, const char *headings) {
    memset(table, 0, sizeof *table);
    for (const char *at = headings; at && table->columns < TABLE_COLUMNS_MAX;) {
        size_t bytes = strcspn(at, "|");
        bool right = at[0] == '>';
        table->right[table->columns++] = right;
        table_append(table, strndup(at + right, bytes - right));
        at = at[bytes] == '|' ? at + bytes + 1 : NULL;
    }
}

void table_cell(struct table *table, const char *format, ...) {
    char *text = NULL;
    va_list arguments;
    va_start(arguments, format);
    int bytes = vasprintf(&text, format, arguments);
    va_end(arguments);
    table_append(table, bytes < 0 ? NULL : text);
}

void table_free(struct table *table) {
    for (size_t i = 0; i < table->cell_count; i++) free(table->cells[i]);
    free(table->cells);
}

void table_print(struct table *table) {
    size_t widths[TABLE_COLUMNS_MAX] = {0};
    for (size_t i = 0; i < table->cell_count; i++) {
        size_t width = strlen(table->cells[i]);
        if (width > widths[i % table->columns]) widths[i % table->columns] = width;
    }
    for (size_t i = 0; i < table->cell_count; i++) {
        size_t column = i % table->columns;
        bool last = column + 1 == table->columns;
        int width = (int)widths[column];
        if (table->right[column]) printf("%*s", width, table->cells[i]);
        else printf("%-*s", last ? 0 : width, table->cells[i]);
        fputs(last ? "\n" : "  ", stdout);
    }
    if (table->cell_count == table->columns) puts("(none)");
    table_free(table);
}

/* ---- JSON -------------------------------------------------------------------------------- */

void json_print(json_t *value) {
    json_dumpf(value, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    putchar('\n');
    fflush(stdout);
    json_decref(value);
}

json_t *json_error(const struct kivi_error *error) {
    return json_pack("{s:{s:i, s:s, s:s, s:s, s:s, s:b, s:i}}", "error", "code", error->code, "name",
                     kivi_code_name(error->code), "field", error->field, "message", error->message,
                     "scope", error->scope, "retry", error->retry, "retry_ms",
                     (int)error->retry_ms);
}

static const char *dtype_name(uint32_t dtype) {
    static const char *const names[] = {"?", "f16", "bf16", "f32"};
    return names[dtype <= KIVI_F32 ? dtype : 0];
}

json_t *json_layout(const struct kivi_layout_info *info) {
    const struct kivi_layout *layout = &info->layout;
    return json_pack("{s:s, s:s, s:i, s:i, s:i, s:i, s:s, s:s, s:f, s:i, s:i, s:I, s:I, s:f}",
                     "fingerprint", text_hex(info->fingerprint.bytes, KIVI_DIGEST_BYTES), "model",
                     layout->model, "layers", (int)layout->layers, "kv_heads",
                     (int)layout->kv_heads, "query_heads", (int)layout->query_heads, "head_dim",
                     (int)layout->head_dim, "dtype", dtype_name(layout->dtype), "codec",
                     layout->codec.preset, "softmax_scale", (double)layout->softmax_scale,
                     "window_tokens", (int)layout->window_tokens, "sink_blocks",
                     (int)layout->sink_blocks, "page_bytes_packed",
                     (json_int_t)info->page_bytes_packed, "page_bytes_full",
                     (json_int_t)info->page_bytes_full, "bits_per_element",
                     info->bits_per_element);
}

json_t *json_session(const struct kivi_session_info *info) {
    static const char *const durabilities[] = {"none", "volatile", "written", "synced"};
    return json_pack(
        "{s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:i, s:i, s:i, s:b, s:I, s:s}", "name", info->name,
        "fingerprint", text_hex(info->fingerprint.bytes, KIVI_DIGEST_BYTES), "length",
        (json_int_t)info->length, "length_committed", (json_int_t)info->length_committed,
        "sealed_tokens", (json_int_t)info->sealed_tokens, "bytes_held",
        (json_int_t)info->bytes_held, "bytes_full", (json_int_t)info->bytes_full, "blocks_host",
        (int)info->blocks_host, "blocks_nvme", (int)info->blocks_nvme, "blocks_missing",
        (int)info->blocks_missing, "open", info->open, "age_ms", (json_int_t)info->age_ms,
        "durability", durabilities[info->durability <= KIVI_SYNCED ? info->durability : 0]);
}

static json_t *json_tier(const struct kivi_tier_stats *tier) {
    return json_pack("{s:I, s:I, s:I}", "blocks", (json_int_t)tier->blocks, "bytes",
                     (json_int_t)tier->bytes, "bytes_max", (json_int_t)tier->bytes_max);
}

json_t *json_stats(const struct kivi_stats *stats) {
    json_t *value = json_pack("{s:s, s:s, s:s, s:b, s:b}", "version", stats->version, "backend",
                              stats->backend, "io_engine", stats->io_engine, "ready", stats->ready,
                              "recovery_clean", stats->recovery_clean);
    json_object_set_new(value, "host", json_tier(&stats->host));
    json_object_set_new(value, "nvme", json_tier(&stats->nvme));
    if (stats->gpu.bytes_max) json_object_set_new(value, "gpu", json_tier(&stats->gpu));
#define SET(name) json_object_set_new(value, #name, json_integer((json_int_t)stats->name))
    SET(uptime_ms);
    SET(blocks);
    SET(blocks_max);
    SET(sessions_open);
    SET(sessions_known);
    SET(sessions_max);
    SET(layouts);
    SET(tail_bytes);
    SET(tail_bytes_max);
    SET(requests);
    SET(errors);
    SET(tokens_appended);
    SET(rows_attended);
    SET(bytes_in);
    SET(bytes_out);
    SET(blocks_sealed);
    SET(blocks_shared);
    SET(pages_from_host);
    SET(pages_from_nvme);
    SET(pages_from_gpu);
    SET(gpu_copies);
    SET(gpu_bytes_copied);
    SET(gpu_evictions);
    SET(gpu_refusals);
    SET(evictions);
    SET(drops);
    SET(spills);
    SET(restores);
    SET(corruptions);
    SET(io_errors);
    SET(bytes_written);
    SET(bytes_read);
    SET(segments_lost);
    SET(recovered_blocks);
    SET(recovered_sessions);
    SET(recovery_us);
    SET(recovery_bytes);
#undef SET
    return value;
}

/* ---- Texts ------------------------------------------------------------------------------- */

static char *text_buffer(void) {
    static char buffers[TEXT_BUFFERS][TEXT_BYTES];
    static unsigned next;
    return buffers[next++ % TEXT_BUFFERS];
}

const char *text_bytes(uint64_t bytes) {
    static const char *const units[] = {"B", "kB", "MB", "GB", "TB", "PB"};
    char *text = text_buffer();
    double value = (double)bytes;
    size_t unit = 0;
    while (value >= 999.5 && unit < 5) {
        value /= 1000;
        unit++;
    }
    int digits = unit == 0 || value >= 99.95 ? 0 : 1;
    snprintf(text, TEXT_BYTES, "%.*f %s", digits, value, units[unit]);
    return text;
}

const char *text_us(double us) {
    char *text = text_buffer();
    if (us < 1e3) snprintf(text, TEXT_BYTES, "%.1f us", us);
    else if (us < 1e6) snprintf(text, TEXT_BYTES, "%.1f ms", us / 1e3);
    else snprintf(text, TEXT_BYTES, "%.2f s", us / 1e6);
    return text;
}

const char *text_hex(const uint8_t *bytes, size_t count) {
    char *text = text_buffer();
    text[0] = 0;
    for (size_t i = 0; i < count && 2 * i + 2 < TEXT_BYTES; i++)
        snprintf(text + 2 * i, 3, "%02x", bytes[i]);
    return text;
}

const char *text_rate(double bytes, double seconds) {
    char *text = text_buffer();
    snprintf(text, TEXT_BYTES, "%s/s", text_bytes(seconds > 0 ? (uint64_t)(bytes / seconds) : 0));
    return text;
}

/* ---- Progress ---------------------------------------------------------------------------- */

static uint64_t clock_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

void progress_begin(struct progress *progress, const char *what, uint64_t total, bool quiet) {
    *progress = (struct progress){
        .shown = !quiet && isatty(STDERR_FILENO), .what = what, .total = total ? total : 1};
}

void progress_update(struct progress *progress, uint64_t done) {
    uint64_t now = clock_us();
    if (!progress->shown || now < progress->next_us) return;
    progress->next_us = now + PROGRESS_EVERY_US;
    unsigned percent = (unsigned)(100 * done / progress->total);
    char bar[26];
    for (unsigned i = 0; i < 25; i++) bar[i] = i < percent / 4 ? '#' : '.';
    bar[25] = 0;
    fprintf(stderr, "\r%s [%s] %3u%%", progress->what, bar, percent);
}

void progress_end(struct progress *progress) {
    if (progress->shown) fprintf(stderr, "\r\033[K");
}
