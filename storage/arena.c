/* SPDX-License-Identifier: Apache-2.0 */
/* arena.c - boundary tags beside the region, free runs in a treap.
 *
 * Two words per unit.  For a run [a, b]:
 *
 *     used   size[a] = length        node[a] = USED      node[b] = USED
 *     free   size[a] = size[b] = length, node[a] = node[b] = its node in the treap
 *
 * so both neighbours of a run that is freed are found in one step; units inside a run hold old
 * words that nobody reads.  The treap is ordered by (length, first unit): the leftmost node that is
 * long enough is the best fit.  A treap because it is a balanced tree of forty lines, and because
 * random priorities cannot be steered by a client's choice of block sizes.
 *
 * Two free runs never touch, so a region of n units has at most (n + 1) / 2 of them. */
#include "storage/arena.h"

#include "proto/kv_check.h"

#include <stdlib.h>
#include <sys/mman.h>

#define NONE UINT32_MAX
#define USED (UINT32_MAX - 1)

struct node {
    uint32_t first; /* unit; in a node that is not in use: the next such node */
    uint32_t units;
    uint32_t left, right;
    uint32_t priority; /* highest at the root */
};

struct kv_arena {
    uint32_t total;
    uint32_t used;
    uint32_t root;
    uint32_t spare; /* nodes not in use */
    uint32_t node_count;
    uint32_t random;
    uint32_t *size; /* [total] */
    uint32_t *node; /* [total] */
    struct node *nodes;
};

/* ---- The treap ----------------------------------------------------------------------------- */

static bool node_before(const struct node *a, uint32_t units, uint32_t first) {
    return a->units != units ? a->units < units : a->first < first;
}

/* Splits `tree` into what lies before (units, first) and the rest. */
static void tree_split(struct kv_arena *arena, uint32_t tree, uint32_t units, uint32_t first,
                       uint32_t *before, uint32_t *rest) {
    while (tree != NONE) {
        struct node *node = &arena->nodes[tree];
        if (node_before(node, units, first)) {
            *before = tree;
            before  = &node->right;
            tree    = node->right;
        } else {
            *rest = tree;
            rest  = &node->left;
            tree  = node->left;
        }
    }
    *before = NONE;
    *rest   = NONE;
}

/* Everything of `a` lies before everything of `b`. */
static uint32_t tree_join(struct kv_arena *arena, uint32_t a, uint32_t b) {
    uint32_t root  = NONE;
    uint32_t *link = &root;
    while (a != NONE && b != NONE) {
        if (arena->nodes[a].priority >= arena->nodes[b].priority) {
            *link = a;
            link  = &arena->nodes[a].right;
            a     = *link;
        } else {
            *link = b;
            link  = &arena->nodes[b].left;
            b     = *link;
        }
    }
    *link = a != NONE ? a : b;
    return root;
}

static uint32_t tree_random(struct kv_arena *arena) {
    arena->random ^= arena->random << 13;
    arena->random ^= arena->random >> 17;
    arena->random ^= arena->random << 5;
    return arena->random;
}

static void tree_insert(struct kv_arena *arena, uint32_t first, uint32_t units) {
    uint32_t index = arena->spare;
    KV_CHECK(index != NONE);
    struct node *node = &arena->nodes[index];
    arena->spare      = node->first;
    *node = (struct node){.first = first, .units = units, .priority = tree_random(arena)};

    uint32_t *link = &arena->root;
    while (*link != NONE && arena->nodes[*link].priority >= node->priority) {
        struct node *above = &arena->nodes[*link];
        link               = node_before(above, units, first) ? &above->right : &above->left;
    }
    tree_split(arena, *link, units, first, &node->left, &node->right);
    *link = index;

    arena->size[first] = arena->size[first + units - 1] = units;
    arena->node[first] = arena->node[first + units - 1] = index;
}

static void tree_remove(struct kv_arena *arena, uint32_t index) {
    struct node *node = &arena->nodes[index];
    uint32_t *link    = &arena->root;
    while (*link != index) {
        KV_CHECK(*link != NONE);
        struct node *above = &arena->nodes[*link];
        link = node_before(above, node->units, node->first) ? &above->right : &above->left;
    }
    *link        = tree_join(arena, node->left, node->right);
    node->first  = arena->spare;
    arena->spare = index;
}

/* ---- The arena ----------------------------------------------------------------------------- */

/* Zero pages that cost nothing until touched: most of a large arena's words never are. */
static void *lazy_alloc(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static void lazy_free(void *memory, size_t bytes) {
    if (memory != NULL) munmap(memory, bytes);
}

static size_t word_bytes(const struct kv_arena *arena) {
    return (size_t)arena->total * sizeof(uint32_t);
}

enum kv_status kv_arena_open(uint32_t units, struct kv_arena **out) {
    KV_CHECK(units > 0 && units <= 1u << 31);
    struct kv_arena *arena = calloc(1, sizeof *arena);
    if (arena == NULL) return KV_BUSY;
    arena->total      = units;
    arena->root       = NONE;
    arena->random     = 0x9e3779b9u;
    arena->node_count = units / 2 + 1;
    arena->size       = lazy_alloc(word_bytes(arena));
    arena->node       = lazy_alloc(word_bytes(arena));
    arena->nodes      = lazy_alloc(arena->node_count * sizeof *arena->nodes);
    if (arena->size == NULL || arena->node == NULL || arena->nodes == NULL) {
        kv_arena_close(arena);
        return KV_BUSY;
    }
    for (uint32_t i = 0; i < arena->node_count; i++) {
        arena->nodes[i].first = i + 1 < arena->node_count ? i + 1 : NONE;
    }
    tree_insert(arena, 0, units);
    *out = arena;
    return KV_OK;
}

void kv_arena_close(struct kv_arena *arena) {
    if (arena == NULL) return;
    lazy_free(arena->size, word_bytes(arena));
    lazy_free(arena->node, word_bytes(arena));
    lazy_free(arena->nodes, arena->node_count * sizeof *arena->nodes);
    free(arena);
}

uint32_t kv_arena_alloc(struct kv_arena *arena, uint32_t units) {
    KV_CHECK(units > 0);
    uint32_t best = NONE;
    for (uint32_t at = arena->root; at != NONE;) {
        const struct node *node = &arena->nodes[at];
        if (node->units >= units) {
            best = at;
            at   = node->left;
        } else {
            at = node->right;
        }
    }
    if (best == NONE) return KV_ARENA_NONE;

    uint32_t first = arena->nodes[best].first;
    uint32_t rest  = arena->nodes[best].units - units;
    tree_remove(arena, best);
    if (rest > 0) tree_insert(arena, first + units, rest);
    arena->size[first] = units;
    arena->node[first] = arena->node[first + units - 1] = USED;
    arena->used += units;
    return first;
}

void kv_arena_free(struct kv_arena *arena, uint32_t unit) {
    KV_CHECK(unit < arena->total && arena->node[unit] == USED);
    uint32_t first = unit;
    uint32_t units = arena->size[unit];
    arena->used -= units;

    uint32_t behind = first + units;
    if (behind < arena->total && arena->node[behind] != USED) {
        units += arena->size[behind];
        tree_remove(arena, arena->node[behind]);
    }
    if (first > 0 && arena->node[first - 1] != USED) {
        uint32_t before = arena->size[first - 1];
        tree_remove(arena, arena->node[first - 1]);
        first -= before;
        units += before;
    }
    tree_insert(arena, first, units);
}

uint32_t kv_arena_units(const struct kv_arena *arena, uint32_t unit) {
    KV_CHECK(unit < arena->total && arena->node[unit] == USED);
    return arena->size[unit];
}

uint32_t kv_arena_units_total(const struct kv_arena *arena) {
    return arena->total;
}

uint32_t kv_arena_units_used(const struct kv_arena *arena) {
    return arena->used;
}

uint32_t kv_arena_units_largest(const struct kv_arena *arena) {
    uint32_t largest = 0;
    for (uint32_t at = arena->root; at != NONE; at = arena->nodes[at].right) {
        largest = arena->nodes[at].units;
    }
    return largest;
}

void kv_arena_check(const struct kv_arena *arena) {
    uint32_t used = 0;
    bool free_before = false;
    for (uint32_t unit = 0; unit < arena->total;) {
        uint32_t units = arena->size[unit];
        KV_CHECK(units > 0 && units <= arena->total - unit);
        KV_CHECK(arena->node[unit] == arena->node[unit + units - 1]);
        bool is_free = arena->node[unit] != USED;
        KV_CHECK(!(is_free && free_before)); /* neighbours coalesce */
        if (is_free) {
            const struct node *node = &arena->nodes[arena->node[unit]];
            KV_CHECK(node->first == unit && node->units == units);
        } else {
            used += units;
        }
        free_before = is_free;
        unit += units;
    }
    KV_CHECK(used == arena->used);
}
