/* SPDX-License-Identifier: Apache-2.0 */
/* names.h - every session there is, by name, open or not.
 *
 * What List can answer without touching the disk, in order of name.  Pointers to entries are good
 * until names_remove().
 *
 * Threads.  The engine thread.     Memory.  All of it from names_open().
 */
#ifndef KV_SERVICE_NAMES_H
#define KV_SERVICE_NAMES_H

#include "service/engine.h"

struct session;
struct layout_entry;

struct known {
    char name[KV_NAME_MAX + 1];
    struct layout_entry *layout;
    struct kv_salt salt;
    struct session *session; /* the slot it is bound to; NULL: nobody uses it */
    uint64_t used_us;

    /* Its snapshot. */
    bool committed;          /* there is one; what follows is of it */
    uint8_t nonce[16];
    uint64_t generation;     /* names the tail chunks */
    uint32_t chunk_count;
    uint32_t block_count;
    uint64_t length;
    enum kv_durability durability;
};

struct names {
    struct known *entries;  /* [max] */
    uint32_t *order;        /* [count]: entries by rising name */
    uint32_t *unused;       /* [max - count] */
    uint32_t count, max;
};

/* False: out of memory. */
bool names_open(struct names *names, uint32_t max);
void names_close(struct names *names);

struct known *names_find(const struct names *names, const char *name);

/* A new entry, zeroed but for its name, which is not there yet.  NULL: all are in use. */
struct known *names_insert(struct names *names, const char *name);
void names_remove(struct names *names, struct known *known);

/* Position in `order` of the first name that is at least `prefix` and behind `after`. */
uint32_t names_first(const struct names *names, const char *prefix, const char *after);

#endif
