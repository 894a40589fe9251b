/* SPDX-License-Identifier: Apache-2.0 */
/* arena.h - extents of a region of memory that lies elsewhere.
 *
 * The arena hands out runs of 4 KiB units of a region and takes them back.  It never touches the
 * region itself, so the region may be host memory, GPU memory or a file.  Best fit: of all free
 * runs that are large enough the smallest, and of those the first; neighbours coalesce at once.
 * Allocating and freeing are O(log n) in the number of free runs.
 *
 * Memory.  8 bytes per unit and 20 per free run it can have, allocated at open.
 * Threads. One.
 */
#ifndef KV_STORAGE_ARENA_H
#define KV_STORAGE_ARENA_H

#include "proto/kv_types.h"

enum { KV_ARENA_UNIT = 4096 };
#define KV_ARENA_NONE UINT32_MAX

struct kv_arena;

/* A region of `units` units, 1 .. 2^31.  KV_BUSY: out of memory. */
enum kv_status kv_arena_open(uint32_t units, struct kv_arena **out);
void kv_arena_close(struct kv_arena *arena); /* NULL is closed */

/* The first unit of a run of `units` > 0, or KV_ARENA_NONE. */
uint32_t kv_arena_alloc(struct kv_arena *arena, uint32_t units);
/* `unit` is what alloc returned. */
void kv_arena_free(struct kv_arena *arena, uint32_t unit);

/* Units of the run that alloc returned as `unit`. */
uint32_t kv_arena_units(const struct kv_arena *arena, uint32_t unit);
uint32_t kv_arena_units_total(const struct kv_arena *arena);
uint32_t kv_arena_units_used(const struct kv_arena *arena);
/* The longest free run. */
uint32_t kv_arena_units_largest(const struct kv_arena *arena);

/* Stops the program if the arena contradicts itself; for tests. */
void kv_arena_check(const struct kv_arena *arena);

#endif
