/* SPDX-License-Identifier: Apache-2.0 */
/* safetensors.c - reading and writing tensors by name. */
#include "clients/cli/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jansson.h>

enum {
    LENGTH_BYTES = 8,
    HEADER_BYTES_MAX = 100 << 20, /* the format's own limit */
    HEADER_ALIGNMENT = 8,
};

struct st_file {
    void *map;
    size_t map_bytes;
    json_t *header; /* owns the names */
    struct st_tensor *tensors;
    size_t count;
};

static size_t dtype_bytes(const char *dtype) {
    static const struct {
        const char *name;
        size_t bytes;
    } dtypes[] = {{"BOOL", 1}, {"U8", 1},   {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
                  {"I16", 2},  {"U16", 2},  {"F16", 2}, {"BF16", 2},    {"I32", 4},
                  {"U32", 4},  {"F32", 4},  {"I64", 8}, {"U64", 8},     {"F64", 8}};
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (strcmp(dtypes[i].name, dtype) == 0) return dtypes[i].bytes;
    return 0;
}

static bool natural(const json_t *value, uint64_t *number) {
    if (!json_is_integer(value) || json_integer_value(value) < 0) return false;
    *number = (uint64_t)json_integer_value(value);
    return true;
}

/* One entry of the header, checked against the data that there is. */
static bool tensor_read(const char *name, const json_t *entry, const uint8_t *data,
                        size_t data_bytes, struct st_tensor *tensor, char *why) {
    const json_t *shape = json_object_get(entry, "shape");
    const json_t *offsets = json_object_get(entry, "data_offsets");
    const char *dtype = json_string_value(json_object_get(entry, "dtype"));
    uint64_t begin, end;
    if (!dtype || !json_is_array(shape) || json_array_size(offsets) != 2 ||
        !natural(json_array_get(offsets, 0), &begin) || !natural(json_array_get(offsets, 1), &end)) {
        snprintf(why, ST_WHY_BYTES, "tensor '%.80s' lacks dtype, shape or data_offsets", name);
        return false;
    }
    *tensor = (struct st_tensor){.name = name, .dtype = dtype, .element_bytes = dtype_bytes(dtype),
                                 .rank = json_array_size(shape)};
    if (tensor->element_bytes == 0 || tensor->rank > ST_RANK_MAX) {
        snprintf(why, ST_WHY_BYTES, "tensor '%.80s' has a dtype or rank that is not known", name);
        return false;
    }
    uint64_t bytes = tensor->element_bytes;
    for (size_t i = 0; i < tensor->rank; i++) {
        if (!natural(json_array_get(shape, i), &tensor->shape[i]) ||
            __builtin_mul_overflow(bytes, tensor->shape[i], &bytes)) {
            snprintf(why, ST_WHY_BYTES, "tensor '%.80s' has an impossible shape", name);
            return false;
        }
    }
    if (begin > end || end > data_bytes || end - begin != bytes) {
        snprintf(why, ST_WHY_BYTES,
                 "tensor '%.80s' needs %" PRIu64 " bytes, its offsets are %" PRIu64 " .. %" PRIu64
                 " of %zu",
                 name, bytes, begin, end, data_bytes);
        return false;
    }
    tensor->data = data + begin;
    tensor->bytes = (size_t)bytes;
    return true;
}

static int tensor_compare(const void *a, const void *b) {
    const struct st_tensor *left = a, *right = b;
    if (left->data != right->data) return left->data < right->data ? -1 : 1;
    return left->bytes < right->bytes ? -1 : left->bytes > right->bytes;
}

/* Every byte of the data belongs to exactly one tensor. */
static bool tensors_tile(struct st_file *file, const uint8_t *data, size_t data_bytes, char *why) {
    qsort(file->tensors, file->count, sizeof *file->tensors, tensor_compare);
    const uint8_t *next = data;
    for (size_t i = 0; i < file->count; i++) {
        if ((const uint8_t *)file->tensors[i].data != next) {
            snprintf(why, ST_WHY_BYTES, "tensor '%.80s' overlaps another or follows a hole",
                     file->tensors[i].name);
            return false;
        }
        next += file->tensors[i].bytes;
    }
    if (next == data + data_bytes) return true;
    snprintf(why, ST_WHY_BYTES, "%zu bytes at the end belong to no tensor",
             (size_t)(data + data_bytes - next));
    return false;
}

static bool header_read(struct st_file *file, char *why) {
    uint64_t length;
    if (file->map_bytes < LENGTH_BYTES) {
        snprintf(why, ST_WHY_BYTES, "too short to be a safetensors file");
        return false;
    }
    memcpy(&length, file->map, LENGTH_BYTES);
    if (length > HEADER_BYTES_MAX || length > file->map_bytes - LENGTH_BYTES) {
        snprintf(why, ST_WHY_BYTES, "not a safetensors file: a header of %" PRIu64 " bytes", length);
        return false;
    }

    const char *text = (const char *)file->map + LENGTH_BYTES;
    json_error_t error;
    file->header = json_loadb(text, (size_t)length, JSON_REJECT_DUPLICATES, &error);
    if (!json_is_object(file->header)) {
        snprintf(why, ST_WHY_BYTES, "the header is not a JSON object: %.150s",
                 file->header ? "" : error.text);
        return false;
    }
    file->tensors = calloc(json_object_size(file->header) + 1, sizeof *file->tensors);
    if (!file->tensors) {
        snprintf(why, ST_WHY_BYTES, "out of memory");
        return false;
    }
    const uint8_t *data = (const uint8_t *)text + length;
    size_t data_bytes = file->map_bytes - LENGTH_BYTES - (size_t)length;
    const char *name;
    json_t *entry;
    json_object_foreach(file->header, name, entry) {
        if (strcmp(name, "__metadata__") == 0) continue;
        if (!tensor_read(name, entry, data, data_bytes, &file->tensors[file->count++], why))
            return false;
    }
    return tensors_tile(file, data, data_bytes, why);
}

static bool file_map(struct st_file *file, const char *path, char *why) {
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool good = fd >= 0 && fstat(fd, &status) == 0;
    if (good && status.st_size > 0) {
        file->map = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        good = file->map != MAP_FAILED;
        if (good) file->map_bytes = (size_t)status.st_size;
        else file->map = NULL;
    }
    if (!good) snprintf(why, ST_WHY_BYTES, "%s", strerror(errno));
    if (fd >= 0) close(fd);
    return good;
}

struct st_file *st_open(const char *path, char why[ST_WHY_BYTES]) {
    struct st_file *file = calloc(1, sizeof *file);
    if (!file) {
        snprintf(why, ST_WHY_BYTES, "out of memory");
        return NULL;
    }
    if (!file_map(file, path, why) || !header_read(file, why)) {
        st_close(file);
        return NULL;
    }
    return file;
}

void st_close(struct st_file *file) {
    if (!file) return;
    json_decref(file->header);
    free(file->tensors);
    if (file->map) munmap(file->map, file->map_bytes);
    free(file);
}

const struct st_tensor *st_find(const struct st_file *file, const char *name) {
    for (size_t i = 0; i < file->count; i++)
        if (strcmp(file->tensors[i].name, name) == 0) return &file->tensors[i];
    return NULL;
}

size_t st_count(const struct st_file *file) {
    return file->count;
}

const struct st_tensor *st_at(const struct st_file *file, size_t index) {
    return &file->tensors[index];
}

/* The header of these tensors laid one behind the other. */
static char *header_write(const struct st_tensor *tensors, size_t count) {
    json_t *header = json_object();
    uint64_t offset = 0;
    for (size_t i = 0; i < count; i++) {
        json_t *shape = json_array();
        for (size_t j = 0; j < tensors[i].rank; j++)
            json_array_append_new(shape, json_integer((json_int_t)tensors[i].shape[j]));
        json_object_set_new(header, tensors[i].name,
                            json_pack("{s:s, s:o, s:[I, I]}", "dtype", tensors[i].dtype, "shape",
                                      shape, "data_offsets", (json_int_t)offset,
                                      (json_int_t)(offset + tensors[i].bytes)));
        offset += tensors[i].bytes;
    }
    char *text = json_dumps(header, JSON_COMPACT);
    json_decref(header);
    return text;
}

bool st_write(const char *path, const struct st_tensor *tensors, size_t count,
              char why[ST_WHY_BYTES]) {
    char *header = header_write(tensors, count);
    FILE *out = header ? fopen(path, "wb") : NULL;
    if (!out) {
        snprintf(why, ST_WHY_BYTES, "%s", strerror(errno));
        free(header);
        return false;
    }
    size_t text_bytes = strlen(header);
    uint64_t length = (text_bytes + HEADER_ALIGNMENT - 1) / HEADER_ALIGNMENT * HEADER_ALIGNMENT;
    fwrite(&length, 1, LENGTH_BYTES, out);
    fprintf(out, "%s%*s", header, (int)(length - text_bytes), "");
    for (size_t i = 0; i < count; i++) fwrite(tensors[i].data, 1, tensors[i].bytes, out);
    free(header);
    bool good = !ferror(out);
    if (fclose(out) != 0) good = false;
    if (!good) snprintf(why, ST_WHY_BYTES, "%s", strerror(errno));
    return good;
}
