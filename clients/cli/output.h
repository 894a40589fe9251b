/* SPDX-License-Identifier: Apache-2.0 */
/* output.h - what kivictl says: tables for people, JSON for programs, progress for the patient.
 *
 * Results go to stdout, everything else to stderr.
 */
#ifndef KIVI_CLIENTS_CLI_OUTPUT_H
#define KIVI_CLIENTS_CLI_OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "clients/c/kivi.h"

/* ---- Tables: columns as wide as they need, numbers to the right ----------------------------- */

enum { TABLE_COLUMNS_MAX = 12 };

struct table {
    size_t columns;
    bool right[TABLE_COLUMNS_MAX];
    char **cells; /* row after row; the first row is the heading */
    size_t cell_count;
};

/* Headings separated by '|'; one that begins with '>' is a column of numbers. */
void table_begin(struct table *table, const char *headings);
void table_cell(struct table *table, const char *format, ...) __attribute__((format(printf, 2, 3)));
void table_print(struct table *table); /* prints and frees; nothing but the heading: "(none)" */
void table_free(struct table *table);

/* ---- JSON --------------------------------------------------------------------------------- */

void json_print(json_t *value); /* prints and releases */
json_t *json_error(const struct kivi_error *error);
json_t *json_layout(const struct kivi_layout_info *info);
json_t *json_session(const struct kivi_session_info *info);
json_t *json_stats(const struct kivi_stats *stats);

/* ---- Texts; each call of one of these uses one of 8 buffers in turn --------------------------- */

const char *text_bytes(uint64_t bytes);   /* "8.5 MB" */
const char *text_us(double us);           /* "12.3 ms" */
const char *text_hex(const uint8_t *bytes, size_t count);
const char *text_rate(double bytes, double seconds); /* "1.2 GB/s" */

/* ---- Progress: a line on stderr that rewrites itself, when that is a terminal ----------------- */

struct progress {
    bool shown;
    const char *what;
    uint64_t total, next_us;
};

void progress_begin(struct progress *progress, const char *what, uint64_t total, bool quiet);
void progress_update(struct progress *progress, uint64_t done);
void progress_end(struct progress *progress);

#endif
