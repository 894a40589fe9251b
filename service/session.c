/* SPDX-License-Identifier: Apache-2.0 */
/* session.c - what session.h says, in terms of one list and a few arrays.
 *
 * Live blocks are a list, not an array: there are two or three of them in a conversation, and a
 * prompt that arrives layer by layer may have hundreds, which only its layers walk through.
 */
#include "service/session.h"

#include "proto/kv_check.h"

enum { KEYS_FIRST = 64 }; /* 2 KiB, a chain of 8192 tokens */

static size_t live_bytes(const struct session *session) {
    return sizeof(struct live_block) +
           session->layout->info.layout.layers * sizeof(struct live_page);
}

static uint32_t layers_of(const struct session *session) {
    return session->layout->info.layout.layers;
}

enum kv_status session_init(struct session *session, struct tail_memory *memory,
                            struct layout_entry *layout, const struct kv_salt *salt,
                            const uint8_t nonce[16]) {
    KV_CHECK(!session->open);
    size_t layers = layout->info.layout.layers;
    size_t bytes = ((layers + 1) * layout->energy_count + 2 * layers + 1) * 4;
    void *arrays = NULL;
    enum kv_status status = tail_alloc(memory, bytes, &arrays);
    if (status != KV_OK) return status;

    memset(arrays, 0, bytes);
    session->arrays = arrays;
    session->arrays_bytes = bytes;
    session->energy = arrays;
    session->energy_staged = session->energy + layers * layout->energy_count;
    session->rows_seen = (uint32_t *)(session->energy_staged + layout->energy_count);
    session->rows_staged = session->rows_seen + layers;
    session->length = session->rows_staged + 1;

    session->layout = layout;
    session->open = true;
    session->dirty = true;
    session->commits = 0;
    session->ids_mode = IDS_UNDECIDED;
    session->ids_length = session->ids_staged = 0;
    session->head = kv_chain_root(&layout->info.fingerprint, salt);
    memcpy(session->nonce, nonce, sizeof session->nonce);
    session->keys = NULL;
    session->block_count = session->block_capacity = 0;
    session->live_first = session->live_last = NULL;
    return KV_OK;
}

static void page_free(struct session *session, struct tail_memory *memory,
                      struct live_page *page) {
    tail_free(memory, page->raw, session->layout->raw_bytes);
    page->raw = NULL;
}

/* What is reserved for a block that is FILLING. */
static void fill_abandon(struct live_block *live, struct tail_memory *memory) {
    if (live->state != LIVE_FILLING) return;
    kv_store_abandon(memory->store, &live->slot);
    if (live->device) kv_gpu_free(memory->gpu, live->device);
    live->device = NULL;
}

void session_clear(struct session *session, struct tail_memory *memory) {
    KV_CHECK(session->open);
    while (session->live_first) {
        struct live_block *live = session->live_first;
        session->live_first = live->next;
        for (uint32_t l = 0; l < layers_of(session); l++)
            page_free(session, memory, &live->pages[l]);
        fill_abandon(live, memory);
        tail_free(memory, live, live_bytes(session));
    }
    session->live_last = NULL;
    tail_free(memory, session->keys, session->block_capacity * sizeof session->keys[0]);
    tail_free(memory, session->arrays, session->arrays_bytes);
    session->keys = NULL;
    session->arrays = NULL;
    session->open = false;
}

uint32_t session_length(const struct session *session) {
    uint32_t length = session->length[0];
    for (uint32_t l = 1; l < layers_of(session); l++)
        if (session->length[l] < length) length = session->length[l];
    return length;
}

struct live_block *session_live(const struct session *session, uint32_t index) {
    struct live_block *live = session->live_first;
    while (live && live->index != index) live = live->next;
    return live;
}

enum kv_status session_reserve_keys(struct session *session, struct tail_memory *memory,
                                    uint32_t count) {
    if (count <= session->block_capacity) return KV_OK;
    uint32_t capacity = session->block_capacity ? session->block_capacity : KEYS_FIRST;
    while (capacity < count) capacity *= 2;
    void *keys = NULL;
    enum kv_status status = tail_alloc(memory, capacity * sizeof session->keys[0], &keys);
    if (status != KV_OK) return status;
    if (session->block_count)
        memcpy(keys, session->keys, session->block_count * sizeof session->keys[0]);
    tail_free(memory, session->keys, session->block_capacity * sizeof session->keys[0]);
    session->keys = keys;
    session->block_capacity = capacity;
    return KV_OK;
}

enum kv_status session_push_live(struct session *session, struct tail_memory *memory,
                                 struct live_block **out) {
    uint32_t index = session->live_last ? session->live_last->index + 1 : session->block_count;
    enum kv_status status = session_reserve_keys(session, memory, index + 1);
    void *address = NULL;
    if (status == KV_OK) status = tail_alloc(memory, live_bytes(session), &address);
    if (status != KV_OK) return status;

    struct live_block *live = address;
    memset(live, 0, live_bytes(session));
    live->index = index;
    if (session->live_last) session->live_last->next = live;
    else session->live_first = live;
    session->live_last = live;
    *out = live;
    return KV_OK;
}

enum kv_status session_page_alloc(struct session *session, struct tail_memory *memory,
                                  struct live_page *page) {
    KV_CHECK(page->state == PAGE_NONE);
    void *address = NULL;
    enum kv_status status = tail_alloc_page(memory, session->layout->raw_bytes, &address);
    if (status != KV_OK) return status;
    page->raw = address;
    page->state = PAGE_RAW;
    return KV_OK;
}

enum kv_status session_stage_pages(struct session *session, struct tail_memory *memory,
                                   uint32_t layer, uint32_t tokens) {
    uint32_t first = session->length[layer] / KV_BLOCK_TOKENS;
    uint32_t last = (session->length[layer] + tokens - 1) / KV_BLOCK_TOKENS;
    struct live_block *live = session_live(session, first);
    for (uint32_t index = first; index <= last; index++) {
        enum kv_status status = KV_OK;
        if (!live) status = session_push_live(session, memory, &live);
        if (status != KV_OK) return status;
        KV_CHECK(live->index == index);
        if (live->pages[layer].state == PAGE_NONE)
            status = session_page_alloc(session, memory, &live->pages[layer]);
        if (status != KV_OK) return status;
        live = live->next;
    }
    return KV_OK;
}

bool session_names_block(const struct session *session, const struct live_block *live) {
    if (session->ids_mode == IDS_NONE) return true;
    return session->ids_staged >= (uint64_t)(live->index + 1) * KV_BLOCK_TOKENS;
}

/* Digests of live blocks that the staged ids have completed.  A digest needs the one before it,
 * and those of live blocks stay beside them. */
static void name_blocks(struct session *session) {
    const struct kv_digest *parent = &session->head;
    for (struct live_block *live = session->live_first; live; live = live->next) {
        uint64_t end = (uint64_t)(live->index + 1) * KV_BLOCK_TOKENS;
        if (end > session->ids_staged) return;
        if (end > session->ids_length) live->digest = kv_chain_next(parent, live->ids);
        parent = &live->digest;
    }
}

enum kv_status session_stage_ids(struct session *session, uint64_t begin, uint32_t count,
                                 const uint32_t *ids, const char **message) {
    if (session->ids_mode == IDS_UNDECIDED) {
        session->ids_mode = ids ? IDS_GIVEN : IDS_NONE;
    } else if ((session->ids_mode == IDS_GIVEN) != (ids != NULL)) {
        bool known = session->ids_mode == IDS_GIVEN && begin + count <= session->ids_staged;
        if (known) return KV_OK; /* another layer brought them */
        *message = ids ? "this session began without token ids, and it is all or none"
                       : "nobody has given the ids of these tokens yet, and it is all or none";
        return KV_INVALID;
    }
    if (!ids) return KV_OK;

    struct live_block *live = session_live(session, (uint32_t)(begin / KV_BLOCK_TOKENS));
    for (uint32_t i = 0; i < count; i++) {
        uint64_t token = begin + i;
        while (live->index < token / KV_BLOCK_TOKENS) live = live->next;
        uint32_t *id = &live->ids[token % KV_BLOCK_TOKENS];
        if (token < session->ids_staged && *id != ids[i]) {
            *message = "another layer brought other ids for these tokens";
            return KV_INVALID;
        }
        *id = ids[i];
    }
    if (begin + count > session->ids_staged) {
        session->ids_staged = begin + count;
        name_blocks(session);
    }
    return KV_OK;
}

bool session_block_raw(const struct layout_entry *layout, uint32_t index) {
    return index < layout->info.layout.sink_blocks || layout->shape.codec.kind == KV_CODEC_RAW;
}

uint32_t session_page_bytes(const struct layout_entry *layout, uint32_t index) {
    return session_block_raw(layout, index) ? layout->raw_bytes : layout->packed_bytes;
}

/* Length at which a layer's page of the block is due. */
static uint64_t due_length(const struct session *session, const struct live_block *live) {
    const struct kv_layout *layout = &session->layout->info.layout;
    /* A sink stays exact, so there is nothing to wait for. */
    uint32_t window = live->index < layout->sink_blocks ? 0 : layout->window_tokens;
    return (uint64_t)(live->index + 1) * KV_BLOCK_TOKENS + window;
}

bool session_page_due(const struct session *session, const struct live_block *live,
                      uint32_t length) {
    return length >= due_length(session, live);
}

void session_publish(struct session *session, struct tail_memory *memory, uint32_t layer,
                     uint32_t tokens) {
    session->length[layer] += tokens;
    session->dirty = true;
    for (struct live_block *live = session->live_first; live; live = live->next) {
        struct live_page *page = &live->pages[layer];
        if (page->state == PAGE_NONE) break;
        if (page->state == PAGE_SEALING) {
            page->state = PAGE_SEALED;
            live->sealed_count++;
        }
        bool passed = session->length[layer] >= due_length(session, live) + KV_BLOCK_TOKENS;
        if (page->state == PAGE_SEALED && passed) page_free(session, memory, page);
    }
}

void session_publish_ids(struct session *session) {
    session->ids_length = session->ids_staged;
}

/* A block that no layer has packed gives its reservation back. */
static void live_undo(struct live_block *live, struct tail_memory *memory) {
    if (live->sealed_count > 0) return;
    fill_abandon(live, memory);
    live->state = LIVE_RAW;
}

static bool live_empty(const struct session *session, const struct live_block *live) {
    for (uint32_t l = 0; l < layers_of(session); l++)
        if (live->pages[l].state != PAGE_NONE) return false;
    return true;
}

/* Blocks behind the last one that has any page. */
static void drop_empty(struct session *session, struct tail_memory *memory) {
    struct live_block **link = &session->live_first, *last = NULL;
    while (*link && !live_empty(session, *link)) {
        last = *link;
        link = &last->next;
    }
    struct live_block *empty = *link;
    *link = NULL;
    session->live_last = last;
    while (empty) {
        struct live_block *next = empty->next;
        KV_CHECK(empty->state == LIVE_RAW && live_empty(session, empty));
        tail_free(memory, empty, live_bytes(session));
        empty = next;
    }
}

void session_rollback(struct session *session, struct tail_memory *memory, uint32_t layer) {
    for (struct live_block *live = session->live_first; live; live = live->next) {
        struct live_page *page = &live->pages[layer];
        if (page->state == PAGE_SEALING) page->state = PAGE_RAW;
        live_undo(live, memory);
        if ((uint64_t)live->index * KV_BLOCK_TOKENS >= session->length[layer] &&
            page->state == PAGE_RAW) {
            page_free(session, memory, page);
            page->state = PAGE_NONE;
        }
    }
    drop_empty(session, memory);
    session->ids_staged = session->ids_length;
    bool used = session->block_count > 0 || session->live_first;
    if (!used) session->ids_mode = IDS_UNDECIDED;
}

struct live_block *session_complete(const struct session *session) {
    struct live_block *live = session->live_first;
    return live && live->sealed_count == layers_of(session) ? live : NULL;
}

void session_pop(struct session *session, struct tail_memory *memory) {
    struct live_block *live = session_complete(session);
    KV_CHECK(live && live->index == session->block_count);
    KV_CHECK(session->block_count < session->block_capacity);
    session->keys[session->block_count++] = live->key;
    session->head = live->digest;
    session->live_first = live->next;
    if (!live->next) session->live_last = NULL;
    for (uint32_t l = 0; l < layers_of(session); l++) page_free(session, memory, &live->pages[l]);
    tail_free(memory, live, live_bytes(session));
}

struct page_source session_source(const struct session *session, uint32_t layer, uint32_t index,
                                  const struct live_block *live, uint32_t length) {
    struct page_source source = {.raw = session_block_raw(session->layout, index)};
    uint32_t begin = index * KV_BLOCK_TOKENS;
    source.tokens = length - begin < KV_BLOCK_TOKENS ? length - begin : KV_BLOCK_TOKENS;
    if (!live) {
        KV_CHECK(index < session->block_count);
        source.key = &session->keys[index];
        return source;
    }
    const struct live_page *page = &live->pages[layer];
    bool packed = page->state == PAGE_SEALING || page->state == PAGE_SEALED;
    if (!packed) {
        source.raw = true;
        source.memory = page->raw;
    } else if (live->state == LIVE_SHARED) {
        source.key = &live->key;
    } else {
        KV_CHECK(live->state == LIVE_FILLING);
        source.memory = live_packed(live) +
                        (size_t)layer * session_page_bytes(session->layout, index);
    }
    return source;
}
