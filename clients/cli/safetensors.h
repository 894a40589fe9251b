/* SPDX-License-Identifier: Apache-2.0 */
/* safetensors.h - tensors by name in a file.
 *
 *   length of the header, u64 | header, JSON | data
 *
 * The header is one object: "name": {"dtype": "F16", "shape": [..], "data_offsets": [begin, end]},
 * offsets from the beginning of the data, plus an optional "__metadata__" of texts.  The file is
 * mapped, so opening reads the header only; everything the header says is checked before anything
 * is believed: sizes that do not multiply out, offsets outside the file, tensors that overlap or
 * leave holes are refused.
 */
#ifndef KIVI_CLIENTS_CLI_SAFETENSORS_H
#define KIVI_CLIENTS_CLI_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { ST_RANK_MAX = 8, ST_WHY_BYTES = 256 };

struct st_tensor {
    const char *name;
    const char *dtype; /* as the format spells it: F16, BF16, F32, I32, ... */
    size_t element_bytes;
    size_t rank;
    uint64_t shape[ST_RANK_MAX];
    const void *data; /* may be unaligned */
    size_t bytes;
};

struct st_file;

/* NULL on failure, with a sentence in `why`. */
struct st_file *st_open(const char *path, char why[ST_WHY_BYTES]);
void st_close(struct st_file *file);

/* Borrowed until st_close(); NULL if there is no such tensor. */
const struct st_tensor *st_find(const struct st_file *file, const char *name);
size_t st_count(const struct st_file *file);
const struct st_tensor *st_at(const struct st_file *file, size_t index); /* in order of the data */

/* Writes a file of these tensors.  element_bytes is not looked at. */
bool st_write(const char *path, const struct st_tensor *tensors, size_t count,
              char why[ST_WHY_BYTES]);

#endif
