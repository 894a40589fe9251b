/* SPDX-License-Identifier: Apache-2.0 */
/* session.h - a chain of sealed blocks and a tail of exact pages, as data.
 *
 *      block    0        1        2        3        4        5
 *           [sealed] [sealed] [  live ] [ live ] [ live ] [ live ]
 *  layer 0   \__ keys[] __/    packed    packed    raw      raw 40
 *  layer 1                     packed    raw       raw 90
 *  layer 2                     raw       raw 12
 *
 * A block is *sealed* when every layer's page is packed and the store holds it under keys[i].
 * Until then it is *live*: each layer's page of it is raw (exact, in tail memory), or already
 * packed in memory the store has reserved, because layers arrive in any order.  A layer's tokens
 * are contiguous: it has pages for blocks 0 .. length / 128.
 *
 * Staging.  A request changes a session in two steps.  Staging takes memory, writes rows behind a
 *           layer's length and packed pages beside raw ones; none of that is visible.  Publishing
 *           makes it so, and cannot fail; rolling back gives everything back.
 * Threads.  The engine thread.
 * Memory.   Out of the tail memory, given back by session_clear().
 */
#ifndef KV_SERVICE_SESSION_H
#define KV_SERVICE_SESSION_H

#include "service/engine.h"
#include "service/layout.h"
#include "service/tail_memory.h"

struct known;
struct turn;

/* A registered layout with what is computed from it once. */
struct layout_entry {
    struct kv_layout_info info;
    struct kv_shape shape;     /* of packed pages */
    struct kv_shape shape_raw; /* of the same pages in 16 bits */
    uint64_t tag;              /* of its blocks: the first 8 bytes of the fingerprint */
    uint32_t packed_bytes;     /* of a page */
    uint32_t raw_bytes;
    size_t row_bytes;   /* K (or V) of one token on the wire */
    size_t query_bytes; /* one query row on the wire */
    size_t energy_count;
};

enum page_state {
    PAGE_NONE,
    PAGE_RAW,     /* exact */
    PAGE_SEALING, /* staged: exact and packed */
    PAGE_SEALED,  /* packed */
};
/* A sealed page keeps its exact rows for another 128 tokens, or until the block is complete: a
 * commit between two layers of a decode step finds the other layers' page still raw, and would
 * have to cut the session there if this one were not. */
struct live_page {
    uint8_t *raw; /* NONE: NULL.  SEALED: may be */
    enum page_state state;
};

enum live_state {
    LIVE_RAW,     /* no layer is packed yet */
    LIVE_FILLING, /* packed pages are in `slot`, under `key` */
    LIVE_SHARED,  /* somebody else's block is in the store under `key`: ours are dropped */
};
struct live_block {
    struct live_block *next;
    uint32_t index;               /* 0: the session's first block */
    enum live_state state;
    uint32_t sealed_count;        /* layers whose page is SEALED */
    struct kv_digest digest;      /* once its tokens are known: see session_names_block() */
    struct kv_digest key;         /* FILLING, SHARED */
    struct kv_slot slot;          /* FILLING */
    uint8_t *device;              /* FILLING: its bytes in the gpu tier until it is committed; NULL: none */
    uint32_t ids[KV_BLOCK_TOKENS];
    struct live_page pages[];     /* [layers] */
};

/* Where kernels pack the pages of a block that is FILLING, and find them. */
static inline uint8_t *live_packed(const struct live_block *live) {
    return live->device ? live->device : live->slot.address;
}

enum ids_mode { IDS_UNDECIDED, IDS_GIVEN, IDS_NONE };

struct session {
    /* Of the slot; outlives what is open in it. */
    uint32_t slot;
    uint32_t generation;
    struct known *known;                   /* the name it belongs to; NULL: the slot is free */
    struct turn *turn_first, *turn_last;   /* who may touch it: the first; the others wait */
    bool open;                             /* what follows is valid */
    bool dirty;                            /* differs from its snapshot */
    uint64_t used_us;

    struct layout_entry *layout;
    uint8_t nonce[16];
    uint64_t commits;        /* snapshots begun since it was opened: with the nonce, their names */
    enum ids_mode ids_mode;
    uint64_t ids_length;     /* tokens whose ids are known */
    uint64_t ids_staged;     /* and staged: >= ids_length */
    struct kv_digest head;   /* of the last sealed block, or the root */

    struct kv_digest *keys;  /* [block_count] of block_capacity */
    uint32_t block_count, block_capacity;
    struct live_block *live_first, *live_last;

    uint8_t *arrays;         /* one allocation that holds the rest */
    size_t arrays_bytes;
    float *energy;           /* [layers][energy_count] */
    float *energy_staged;    /* [energy_count]: of one layer */
    uint32_t *rows_seen;     /* [layers]; 0: energy is not known */
    uint32_t *rows_staged;   /* one */
    uint32_t *length;        /* [layers] */
};

/* An empty session in a slot that is not open.  KV_BUSY, KV_UNAVAILABLE: see tail_alloc(). */
enum kv_status session_init(struct session *session, struct tail_memory *memory,
                            struct layout_entry *layout, const struct kv_salt *salt,
                            const uint8_t nonce[16]);
/* Gives back all memory; live blocks that are FILLING are abandoned. */
void session_clear(struct session *session, struct tail_memory *memory);

/* Tokens that every layer has. */
uint32_t session_length(const struct session *session);

/* The live block of that number, or NULL. */
struct live_block *session_live(const struct session *session, uint32_t index);

/* Room for so many keys. */
enum kv_status session_reserve_keys(struct session *session, struct tail_memory *memory,
                                    uint32_t count);

/* Raw pages for tokens length .. length + tokens - 1 of a layer.  All or nothing but for what
 * session_rollback() gives back. */
enum kv_status session_stage_pages(struct session *session, struct tail_memory *memory,
                                   uint32_t layer, uint32_t tokens);

/* Ids of `count` tokens from `begin`, whose pages are staged; NULL: none were given.
 * KV_INVALID and a sentence: they contradict what is known, or are missing. */
enum kv_status session_stage_ids(struct session *session, uint64_t begin, uint32_t count,
                                 const uint32_t *ids, const char **message);

/* True if the block's tokens, staged ones included, are all known: its digest is. */
bool session_names_block(const struct session *session, const struct live_block *live);

/* True if a page must be packed once the layer is `length` tokens long. */
bool session_page_due(const struct session *session, const struct live_block *live,
                      uint32_t length);

/* Bytes of a page of this block once sealed, and whether that is its raw form. */
bool session_block_raw(const struct layout_entry *layout, uint32_t index);
uint32_t session_page_bytes(const struct layout_entry *layout, uint32_t index);

/* A layer is `tokens` longer, its staged pages are sealed.  Blocks whose last page that was stay
 * live until session_pop(). */
void session_publish(struct session *session, struct tail_memory *memory, uint32_t layer,
                     uint32_t tokens);
/* Token ids become known; once per request, after publishing its layers. */
void session_publish_ids(struct session *session);
/* Undoes what was staged for a layer. */
void session_rollback(struct session *session, struct tail_memory *memory, uint32_t layer);

/* The first live block when all its pages are sealed, or NULL. */
struct live_block *session_complete(const struct session *session);
/* Moves it, now in the store under its key, into the chain. */
void session_pop(struct session *session, struct tail_memory *memory);

/* Where a layer's page of a block is. */
struct page_source {
    const struct kv_digest *key; /* the store holds the block under this key, or else */
    const void *memory;          /* the page is here; NULL with a NULL key: there is none */
    bool raw;
    uint32_t tokens; /* 1 .. 128 that exist */
};
/* length: of the layer, staged tokens included if they are to be seen.  live: the live block of
 * that number, NULL for a sealed one. */
struct page_source session_source(const struct session *session, uint32_t layer, uint32_t index,
                                  const struct live_block *live, uint32_t length);

/* A fresh live block behind the last, or the first after the chain. */
enum kv_status session_push_live(struct session *session, struct tail_memory *memory,
                                 struct live_block **out);
enum kv_status session_page_alloc(struct session *session, struct tail_memory *memory,
                                  struct live_page *page);

#endif
