/* SPDX-License-Identifier: Apache-2.0 */
/* table.c - open addressing over fixed entries, and lists through them.
 *
 * The hash table holds entry indices, is at most half full, probes linearly and closes gaps when
 * an entry leaves, so that it needs neither markers nor rehashing.  Keys may be chosen by clients,
 * so the hash is keyed with random words: nobody can aim many keys at one place. */
#include "storage/table.h"

#include "proto/kv_check.h"
#include "storage/segment.h"

#include <stdlib.h>
#include <sys/random.h>

struct kv_table {
    uint32_t capacity;
    uint32_t used;
    uint32_t free_head; /* through age.next */
    uint32_t slot_mask;
    uint64_t seed[4];
    uint32_t *slots; /* KV_ENTRY_NONE: empty */
    struct kv_entry *entries;
};

enum kv_status kv_table_open(uint32_t entries, struct kv_table **out) {
    KV_CHECK(entries > 0 && entries < 1u << 30);
    struct kv_table *table = calloc(1, sizeof *table);
    if (table == NULL) return KV_BUSY;
    uint32_t slots = 4;
    while (slots < 2 * entries) slots *= 2;
    table->capacity  = entries;
    table->slot_mask = slots - 1;
    table->slots     = malloc(slots * sizeof *table->slots);
    table->entries   = calloc(entries, sizeof *table->entries);
    if (table->slots == NULL || table->entries == NULL ||
        getrandom(table->seed, sizeof table->seed, 0) != (ssize_t)sizeof table->seed) {
        kv_table_close(table);
        return KV_BUSY;
    }
    memset(table->slots, 0xff, slots * sizeof *table->slots);
    for (uint32_t i = 0; i < entries; i++) {
        table->entries[i].age.next = i + 1 < entries ? i + 1 : KV_ENTRY_NONE;
    }
    *out = table;
    return KV_OK;
}

void kv_table_close(struct kv_table *table) {
    if (table == NULL) return;
    free(table->slots);
    free(table->entries);
    free(table);
}

struct kv_entry *kv_table_entry(struct kv_table *table, uint32_t index) {
    KV_CHECK(index < table->capacity);
    return &table->entries[index];
}

uint32_t kv_table_capacity(const struct kv_table *table) {
    return table->capacity;
}

uint32_t kv_table_used(const struct kv_table *table) {
    return table->used;
}

/* ---- Finding ------------------------------------------------------------------------------- */

static uint32_t slot_of(const struct kv_table *table, const struct kv_digest *key) {
    uint64_t words[4];
    memcpy(words, key->bytes, sizeof words);
    uint64_t hash = 0;
    for (int i = 0; i < 4; i++) {
        __uint128_t product = (__uint128_t)(words[i] ^ table->seed[i]) * (hash ^ 0x9e3779b97f4a7c15u);
        hash = (uint64_t)product ^ (uint64_t)(product >> 64) ^ words[i];
    }
    return (uint32_t)(hash ^ hash >> 32) & table->slot_mask;
}

static enum kv_entry_kind kind_of(const struct kv_entry *entry) {
    switch ((enum kv_entry_state)entry->state) {
    case KV_ENTRY_FILLING: return KV_KIND_FILLING;
    case KV_ENTRY_TOMBSTONE: return KV_KIND_TOMBSTONE;
    case KV_ENTRY_RESIDENT:
    case KV_ENTRY_RESTORING:
    case KV_ENTRY_COLD: return KV_KIND_VISIBLE;
    case KV_ENTRY_GONE:
    case KV_ENTRY_FREE: break;
    }
    KV_CHECK(entry->state == KV_ENTRY_GONE);
    return KV_KIND_GONE;
}

static uint32_t find(struct kv_table *table, const struct kv_digest *key, enum kv_entry_kind kind,
                     bool commit_pinned) {
    for (uint32_t slot = slot_of(table, key);; slot = (slot + 1) & table->slot_mask) {
        uint32_t index = table->slots[slot];
        if (index == KV_ENTRY_NONE) return KV_ENTRY_NONE;
        const struct kv_entry *entry = &table->entries[index];
        if (kind_of(entry) == kind && kv_digest_equal(&entry->key, key) &&
            (!commit_pinned || entry->commit_pins > 0))
            return index;
    }
}

uint32_t kv_table_find(struct kv_table *table, const struct kv_digest *key,
                       enum kv_entry_kind kind) {
    return find(table, key, kind, false);
}

uint32_t kv_table_find_gone_pinned(struct kv_table *table, const struct kv_digest *key) {
    return find(table, key, KV_KIND_GONE, true);
}

/* ---- Coming and going ---------------------------------------------------------------------- */

uint32_t kv_table_insert(struct kv_table *table, const struct kv_digest *key,
                         enum kv_entry_state state) {
    uint32_t index = table->free_head;
    if (index == KV_ENTRY_NONE) return KV_ENTRY_NONE;
    struct kv_entry *entry = &table->entries[index];
    KV_CHECK(entry->state == KV_ENTRY_FREE && state != KV_ENTRY_FREE);
    table->free_head = entry->age.next;
    *entry           = (struct kv_entry){.key = *key, .state = (uint8_t)state};
    entry->unit      = UINT32_MAX;

    uint32_t slot = slot_of(table, key);
    while (table->slots[slot] != KV_ENTRY_NONE) slot = (slot + 1) & table->slot_mask;
    table->slots[slot] = index;
    table->used++;
    return index;
}

void kv_table_remove(struct kv_table *table, uint32_t index) {
    struct kv_entry *entry = kv_table_entry(table, index);
    KV_CHECK(entry->state != KV_ENTRY_FREE);
    KV_CHECK(entry->age.list == NULL && entry->live.list == NULL);

    uint32_t mask = table->slot_mask;
    uint32_t gap  = slot_of(table, &entry->key);
    while (table->slots[gap] != index) gap = (gap + 1) & mask;
    table->slots[gap] = KV_ENTRY_NONE;
    /* Whatever probed past the gap moves into it, so that probing still finds it. */
    for (uint32_t slot = (gap + 1) & mask; table->slots[slot] != KV_ENTRY_NONE;
         slot          = (slot + 1) & mask) {
        uint32_t home = slot_of(table, &table->entries[table->slots[slot]].key);
        if (((slot - home) & mask) >= ((slot - gap) & mask)) {
            table->slots[gap]  = table->slots[slot];
            table->slots[slot] = KV_ENTRY_NONE;
            gap                = slot;
        }
    }
    entry->state     = KV_ENTRY_FREE;
    entry->age.next  = table->free_head;
    table->free_head = index;
    table->used--;
}

/* ---- Lists --------------------------------------------------------------------------------- */

static struct kv_entry_link *link_of(struct kv_table *table, enum kv_entry_links which,
                                     uint32_t index) {
    struct kv_entry *entry = kv_table_entry(table, index);
    return which == KV_LINK_AGE ? &entry->age : &entry->live;
}

void kv_list_init(struct kv_entry_list *list) {
    list->head = list->tail = KV_ENTRY_NONE;
}

void kv_list_push(struct kv_table *table, struct kv_entry_list *list, enum kv_entry_links which,
                  uint32_t index) {
    struct kv_entry_link *link = link_of(table, which, index);
    KV_CHECK(link->list == NULL);
    *link = (struct kv_entry_link){.previous = list->tail, .next = KV_ENTRY_NONE, .list = list};
    if (list->tail != KV_ENTRY_NONE) {
        link_of(table, which, list->tail)->next = index;
    } else {
        list->head = index;
    }
    list->tail = index;
}

void kv_list_push_head(struct kv_table *table, struct kv_entry_list *list,
                       enum kv_entry_links which, uint32_t index) {
    struct kv_entry_link *link = link_of(table, which, index);
    KV_CHECK(link->list == NULL);
    *link = (struct kv_entry_link){.previous = KV_ENTRY_NONE, .next = list->head, .list = list};
    if (list->head != KV_ENTRY_NONE) {
        link_of(table, which, list->head)->previous = index;
    } else {
        list->tail = index;
    }
    list->head = index;
}

void kv_list_remove(struct kv_table *table, enum kv_entry_links which, uint32_t index) {
    struct kv_entry_link *link = link_of(table, which, index);
    struct kv_entry_list *list = link->list;
    if (list == NULL) return;
    if (link->previous != KV_ENTRY_NONE) {
        link_of(table, which, link->previous)->next = link->next;
    } else {
        list->head = link->next;
    }
    if (link->next != KV_ENTRY_NONE) {
        link_of(table, which, link->next)->previous = link->previous;
    } else {
        list->tail = link->previous;
    }
    link->list = NULL;
}

/* ---- Ages ---------------------------------------------------------------------------------- */

void kv_ages_init(struct kv_ages *ages, uint64_t arena_units) {
    kv_list_init(&ages->probation);
    kv_list_init(&ages->hot);
    ages->hot_units     = 0;
    ages->hot_units_max = arena_units / 4 * 3;
}

void kv_ages_use(struct kv_entry *entry, uint64_t now_us) {
    entry->used = true;
    if (now_us >= entry->arrived_us + KV_CORRELATED_US) entry->hot = true;
}

/* Arena units are record pages: header and payload stand in memory as they do on disk. */
static uint32_t units_of(const struct kv_entry *entry) {
    return kv_record_pages(entry->extent.part_count, entry->extent.part_bytes);
}

void kv_ages_add(struct kv_table *table, struct kv_ages *ages, uint32_t index) {
    struct kv_entry *entry = kv_table_entry(table, index);
    if (!entry->hot) {
        kv_list_push(table, &ages->probation, KV_LINK_AGE, index);
        return;
    }
    kv_list_push(table, &ages->hot, KV_LINK_AGE, index);
    ages->hot_units += units_of(entry);
    while (ages->hot_units > ages->hot_units_max && ages->hot.head != index) {
        uint32_t coldest      = ages->hot.head;
        struct kv_entry *cold = kv_table_entry(table, coldest);
        kv_ages_remove(table, ages, coldest);
        cold->hot = false;
        kv_list_push(table, &ages->probation, KV_LINK_AGE, coldest);
    }
}

void kv_ages_remove(struct kv_table *table, struct kv_ages *ages, uint32_t index) {
    struct kv_entry *entry = kv_table_entry(table, index);
    if (entry->age.list != &ages->hot && entry->age.list != &ages->probation) return;
    if (entry->age.list == &ages->hot) ages->hot_units -= units_of(entry);
    kv_list_remove(table, KV_LINK_AGE, index);
}

uint32_t kv_ages_coldest(const struct kv_ages *ages) {
    return ages->probation.head != KV_ENTRY_NONE ? ages->probation.head : ages->hot.head;
}
