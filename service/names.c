/* SPDX-License-Identifier: Apache-2.0 */
/* names.c - a sorted array of indices: a hundred thousand names are 400 KB to shift, once per
 * session created, and everything else is a binary search. */
#include "service/names.h"

#include <stdlib.h>

#include "proto/kv_check.h"

bool names_open(struct names *names, uint32_t max) {
    names->max = max;
    names->entries = calloc(max, sizeof names->entries[0]);
    names->order = calloc(max, sizeof names->order[0]);
    names->unused = calloc(max, sizeof names->unused[0]);
    if (!names->entries || !names->order || !names->unused) return false;
    for (uint32_t i = 0; i < max; i++) names->unused[i] = max - 1 - i;
    return true;
}

void names_close(struct names *names) {
    free(names->entries);
    free(names->order);
    free(names->unused);
    memset(names, 0, sizeof *names);
}

/* Position of the first name that is not below `name`. */
static uint32_t lower_bound(const struct names *names, const char *name) {
    uint32_t low = 0, high = names->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (strcmp(names->entries[names->order[middle]].name, name) < 0) low = middle + 1;
        else high = middle;
    }
    return low;
}

struct known *names_find(const struct names *names, const char *name) {
    uint32_t position = lower_bound(names, name);
    if (position == names->count) return NULL;
    struct known *known = &names->entries[names->order[position]];
    return strcmp(known->name, name) == 0 ? known : NULL;
}

struct known *names_insert(struct names *names, const char *name) {
    if (names->count == names->max) return NULL;
    KV_CHECK(!names_find(names, name) && strlen(name) <= KV_NAME_MAX);
    uint32_t position = lower_bound(names, name);
    uint32_t entry = names->unused[names->max - names->count - 1];
    memmove(&names->order[position + 1], &names->order[position],
            (names->count - position) * sizeof names->order[0]);
    names->order[position] = entry;
    names->count++;

    struct known *known = &names->entries[entry];
    memset(known, 0, sizeof *known);
    memcpy(known->name, name, strlen(name));
    return known;
}

void names_remove(struct names *names, struct known *known) {
    uint32_t position = lower_bound(names, known->name);
    uint32_t entry = (uint32_t)(known - names->entries);
    KV_CHECK(position < names->count && names->order[position] == entry);
    memmove(&names->order[position], &names->order[position + 1],
            (names->count - position - 1) * sizeof names->order[0]);
    names->unused[names->max - names->count] = entry;
    names->count--;
}

uint32_t names_first(const struct names *names, const char *prefix, const char *after) {
    if (strcmp(prefix, after) > 0) return lower_bound(names, prefix);
    uint32_t position = lower_bound(names, after);
    bool same = position < names->count &&
                strcmp(names->entries[names->order[position]].name, after) == 0;
    return after[0] && same ? position + 1 : position;
}
