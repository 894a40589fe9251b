/* SPDX-License-Identifier: Apache-2.0 */
/* engine.h - one thread that turns requests into storage and kernel work.
 *
 * The engine is where the two halves meet: storage/ finds the bytes, kernels/ does the
 * arithmetic, and neither knows the other.  Requests flow one way:
 *
 *    rpc thread             engine thread                        rpc thread
 *    acquire, decode  -->   pin or reserve, kernels,        -->  encode, release
 *             submit        commit or unpin, on_done
 *
 * Baton.   A request has one owner at a time, and only the owner's thread touches it: the
 *          rpc layer until kv_engine_submit(), the engine until on_done(), the rpc layer again
 *          until kv_engine_release().  The one exception is `cancelled`, which any thread may
 *          set at any time.
 * Memory.  kv_engine_open() makes request_count requests and staging_count staging buffers of
 *          pinned memory.  A request that carries data takes a staging buffer with it.  When
 *          none is free kv_engine_acquire() returns NULL: the rpc layer stops reading from that
 *          stream until one is (back-pressure), or answers RESOURCE_EXHAUSTED.
 * Order.   Requests are started in the order in which they were submitted; requests that touch
 *          the same session and layer are also finished in that order.
 * Errors.  `status`, the field at fault and a sentence, in the request.  A request that failed
 *          has changed nothing.
 */
#ifndef KV_SERVICE_ENGINE_H
#define KV_SERVICE_ENGINE_H

#include <stdatomic.h>

#include "kernels/device.h"
#include "kernels/page.h"
#include "proto/kv_types.h"
#include "storage/gpu_tier.h"
#include "storage/store.h"

struct kv_engine;

enum {
    KV_NAME_MAX = 200,          /* bytes of a session name */
    KV_MODEL_MAX = 256,         /* bytes of a layout's model text */
    KV_SALT_MAX = 64,
    KV_ATTEND_ITEMS_MAX = 64,
    KV_LOOKUP_BLOCKS_MAX = 8192,
    KV_GET_BLOCKS_MAX = 4096,
    KV_PUT_OPEN_MAX = 8,        /* incomplete blocks of one Put stream: the credit */
    KV_LEASE_MS_MAX = 600000,
};

enum kv_form { KV_FORM_FULL = 1, KV_FORM_PACKED = 2 };
enum kv_open_mode { KV_OPEN_OR_CREATE = 0, KV_OPEN_CREATE = 1, KV_OPEN_EXISTING = 2 };
enum kv_mask { KV_MASK_ALL = 0, KV_MASK_CAUSAL = 1 };
enum kv_scope { KV_SCOPE_NONE = 0, KV_SCOPE_TENANT, KV_SCOPE_NODE, KV_SCOPE_TIER };

struct kv_salt {
    uint8_t bytes[KV_SALT_MAX];
    uint32_t count;
};

/* A registered layout, every default written out. */
struct kv_layout_info {
    struct kv_digest fingerprint;
    struct kv_layout layout;
    char model[KV_MODEL_MAX + 1];
    uint64_t page_bytes_packed;
    uint64_t page_bytes_raw;
    double bits_per_element;
};

struct kv_session_info {
    char name[KV_NAME_MAX + 1];
    struct kv_digest fingerprint;
    uint64_t length, length_committed, sealed_tokens;
    uint64_t bytes_held, bytes_full;
    uint32_t blocks_host, blocks_nvme, blocks_missing;
    bool open;
    uint64_t age_ms;
    enum kv_durability durability;
};

enum kv_request_kind {
    KV_REQUEST_REGISTER,
    KV_REQUEST_LAYOUTS,
    KV_REQUEST_LOOKUP,
    KV_REQUEST_PUT,     /* one page */
    KV_REQUEST_PUT_END, /* the stream is over: incomplete blocks are abandoned */
    KV_REQUEST_GET,     /* one page */
    KV_REQUEST_OPEN,
    KV_REQUEST_COMMIT,
    KV_REQUEST_CLOSE,
    KV_REQUEST_DELETE,
    KV_REQUEST_LIST,    /* up to a staging buffer full */
    KV_REQUEST_DESCRIBE,
    KV_REQUEST_APPEND,
    KV_REQUEST_ATTEND,
    KV_REQUEST_FETCH,   /* one layer, at most 128 tokens */
    KV_REQUEST_STATS,
};

/* "in" fields are set by the rpc layer, "out" fields by the engine.  Variable-length parts lie
 * in the staging buffer; offsets are from its start and multiples of 64. */

struct kv_register { /* REGISTER */
    struct kv_layout layout;         /* in: with defaults filled in by layout.h */
    char model[KV_MODEL_MAX + 1];    /* in */
    struct kv_layout_info info;      /* out */
    bool created;                    /* out */
};

struct kv_layouts { /* LAYOUTS */
    uint32_t first;                  /* in: skip so many */
    uint32_t count;                  /* out: struct kv_layout_info [count] at reply */
    bool more;                       /* out */
};

struct kv_lookup { /* LOOKUP */
    struct kv_digest fingerprint;    /* in */
    struct kv_salt salt;             /* in */
    uint32_t token_count;            /* in: u32 [token_count] at staging 0, or else */
    uint32_t digest_count;           /* in: struct kv_digest [digest_count] at staging 0 */
    uint32_t lease_ms;               /* in; out: granted */
    uint32_t block_count;            /* out: struct kv_lookup_block [block_count] at reply */
    uint64_t load_us;                /* out */
};
struct kv_lookup_block {
    struct kv_digest digest;
    uint64_t bytes;
    enum kv_tier tier;
};

struct kv_put { /* PUT, PUT_END */
    uint64_t stream;                 /* in: the rpc layer's number of the stream */
    struct kv_digest fingerprint;    /* in */
    bool has_digest;                 /* in: digest given; else parent (or root) and token ids */
    struct kv_digest digest;         /* in; out */
    bool has_parent;                 /* in */
    struct kv_digest parent;         /* in */
    struct kv_salt salt;             /* in */
    uint32_t token_ids[KV_BLOCK_TOKENS]; /* in, unless has_digest */
    uint32_t layer;                  /* in */
    enum kv_form form;               /* in */
    bool raw;                        /* in: keep in 16 bits */
    enum kv_durability durability;   /* in (of the block's first page); out: reached */
    bool has_energy;                 /* in: float [heads][head_dim] at energy_offset */
    uint32_t energy_count;           /* in: how many floats came; the engine checks it */
    uint64_t energy_offset;          /* in */
    /* page data: bytes_in bytes at staging 0, or, if there are pieces, in these; their array lies in
     * staging, what they point to stays until on_done.  Only FULL pages, and only if the engine
     * takes pieces. */
    const struct kv_span *pieces;    /* in, or NULL */
    uint32_t piece_count;            /* in */
    bool landed;                     /* in: kv_engine_land() has put it into its block */
    uint32_t fault;                  /* in, if it landed: what kv_kernel_ingest_here() found */
    bool complete;                   /* out: this page finished the block (or it existed): the
                                        other out fields hold.  false: page taken, go on */
    bool existed;                    /* out */
    uint64_t bytes_held;             /* out */
};

struct kv_get { /* GET */
    struct kv_digest fingerprint;    /* in */
    struct kv_digest digest;         /* in */
    uint32_t layer;                  /* in */
    enum kv_form form;               /* in; out: what the reply holds */
};

struct kv_open { /* OPEN.  KV_NOT_FOUND, field "fingerprint": no such layout is registered */
    char name[KV_NAME_MAX + 1];      /* in */
    struct kv_digest fingerprint;    /* in */
    struct kv_salt salt;             /* in */
    enum kv_open_mode mode;          /* in */
    uint32_t token_count;            /* in: u32 [token_count] at staging 0 */
    uint64_t session, length, usable;/* out */
    bool created;                    /* out */
    struct kv_layout_info info;      /* out */
};

struct kv_commit { /* COMMIT, CLOSE */
    uint64_t session;                /* in */
    bool commit;                     /* in: CLOSE commits first */
    enum kv_durability durability;   /* in: to wait for; out: reached */
    uint64_t length;                 /* out */
};

struct kv_named { /* DELETE, DESCRIBE */
    char name[KV_NAME_MAX + 1];      /* in */
    struct kv_session_info info;     /* out, DESCRIBE */
    struct kv_layout_info layout;    /* out, DESCRIBE */
    uint32_t digest_count;           /* out, DESCRIBE: struct kv_digest [digest_count] at reply */
};

struct kv_list { /* LIST */
    char prefix[KV_NAME_MAX + 1];    /* in */
    char after[KV_NAME_MAX + 1];     /* in */
    uint32_t limit;                  /* in: 0: as many as fit */
    uint32_t count;                  /* out: struct kv_session_info [count] at reply; blocks_*
                                        are 0, counting them is DESCRIBE's */
    bool more;                       /* out */
};

struct kv_append { /* APPEND */
    uint64_t session;                /* in */
    uint32_t layer;                  /* in */
    bool all_layers;                 /* in */
    uint64_t expected_length;        /* in */
    uint32_t tokens;                 /* in: K, V rows at staging 0, bytes_in bytes */
    bool has_token_ids;              /* in: u32 [tokens] at token_ids_offset */
    uint64_t token_ids_offset;       /* in */
    bool has_energy;                 /* in: float at energy_offset */
    uint32_t energy_count;           /* in: how many floats came; the engine checks it */
    uint64_t energy_offset;          /* in */
    uint64_t length, session_length, sealed_tokens; /* out */
    uint32_t blocks_shared;          /* out */
};

struct kv_attend_item {
    uint64_t session;                /* in */
    uint32_t rows;                   /* in */
    enum kv_mask mask;               /* in */
    bool has_visible;                /* in: u32 [rows] at visible_offset */
    uint64_t visible_offset;         /* in */
    uint32_t append_tokens;          /* in */
    uint64_t expected_length;        /* in */
    bool has_token_ids;              /* in: u32 [append_tokens] at token_ids_offset */
    uint64_t token_ids_offset;       /* in */
    bool no_energy;                  /* in */
    uint64_t data_offset;            /* in: q, then k, then v in staging, in wire order; the rpc
                                        layer cannot know the sizes: the engine computes it */
    enum kv_status status;           /* out */
    char field[48];                  /* out */
    char message[160];               /* out */
    uint64_t length;                 /* out */
};
struct kv_attend_request { /* ATTEND */
    uint64_t id;                     /* in: the client's, comes back with the answer */
    uint32_t layer;                  /* in */
    uint32_t item_count;             /* in */
    struct kv_attend_item items[KV_ATTEND_ITEMS_MAX];
    /* q, k, v of all items: bytes_in bytes at staging 0.  Reply: per item with KV_OK, out and
     * lse, f32, one behind the other. */
};

struct kv_fetch { /* FETCH */
    uint64_t session;                /* in */
    uint32_t layer;                  /* in */
    uint64_t begin;                  /* in */
    uint32_t tokens;                 /* in: 1 .. 128, not across a multiple of 128 */
    enum kv_dtype dtype;             /* in: of the reply; 0: the layout's.  Else that, or F32 */
    /* out: the layer's length, or what all layers have when `layer` names none; also when tokens
     * is 0 (a question) */
    uint64_t length;
    uint32_t layers;                 /* out: the layout's */
};

struct kv_engine_stats {
    const char *backend;
    const char *io_engine;
    bool ready;
    uint64_t uptime_ms;
    uint64_t arena_bytes_max, disk_bytes_max, blocks_max;
    uint64_t sessions_open, sessions_known, sessions_max, layouts;
    uint64_t tail_bytes, tail_bytes_max;
    uint64_t requests, errors, tokens_appended, rows_attended, bytes_in, bytes_out;
    uint64_t blocks_sealed, blocks_shared, pages_from_gpu, pages_from_host, pages_from_nvme;
    uint64_t recovered_sessions;
    struct kv_store_stats store;
    struct kv_gpu_stats gpu;      /* zero without a gpu tier */
};

struct kv_request {
    enum kv_request_kind kind;
    uint64_t deadline_us;            /* monotonic; 0: the configured maximum */
    atomic_bool cancelled;           /* [any thread] set: nobody waits for the answer */

    uint8_t *staging;                /* staging_bytes, pinned, 4096-aligned; NULL: none taken */
    size_t staging_bytes;
    size_t bytes_in;                 /* payload bytes at staging 0 */
    size_t reply_offset;             /* out: payload of the answer, in staging */
    size_t reply_bytes;              /* out */

    enum kv_status status;           /* out */
    char field[48];                  /* out: the field at fault, "" if none */
    char message[200];               /* out: a sentence */
    enum kv_scope scope;             /* out, KV_BUSY */
    uint32_t retry_ms;               /* out, KV_BUSY */

    /* Called once, on the engine thread.  Must not block: hands the request back. */
    void (*on_done)(struct kv_request *request);
    void *owner;                     /* the rpc layer's own */

    union {
        struct kv_register reg;
        struct kv_layouts layouts;
        struct kv_lookup lookup;
        struct kv_put put;
        struct kv_get get;
        struct kv_open open;
        struct kv_commit commit;
        struct kv_named named;
        struct kv_list list;
        struct kv_append append;
        struct kv_attend_request attend;
        struct kv_fetch fetch;
        struct kv_engine_stats stats;
    };

    struct kv_request *next_private; /* the owner's list */
    void *engine_private;
};

/* device and store are borrowed and were opened by the thread that will call kv_engine_run(). */
struct kv_engine_options {
    struct kv_device *device;
    struct kv_store *store;
    uint64_t gpu_arena_bytes;     /* device memory for copies of blocks; not used where the device's
                                     memory is the host's */
    uint32_t gpu_keep_ms;         /* a copy used within so long makes no room for another */
    uint64_t arena_bytes;         /* the store's options, for decisions and for Stats */
    uint64_t disk_bytes;
    uint32_t blocks_max;
    uint32_t request_count;       /* requests that exist: 8 .. 4096 */
    uint32_t staging_count;       /* staging buffers */
    uint32_t message_bytes_max;   /* largest payload in; a staging buffer is 3 times that and
                                     64 KiB, so that an answer always fits behind a question */
    uint32_t layouts_max;
    uint32_t sessions_max;        /* known by name */
    uint32_t sessions_open_max;   /* with a tail in memory */
    uint32_t session_tokens_max;  /* longest session: 128 .. 1 << 24 */
    uint64_t tail_bytes_max;      /* exact tokens of open sessions, out of the arena */
    uint32_t session_idle_ms;     /* an open session nobody used is committed and closed; 0: never */
    uint32_t deadline_ms_max;     /* a request without a deadline gets this one */
};

/* KV_INVALID, KV_BUSY; `why` (at least 256 bytes) says it in words. */
enum kv_status kv_engine_open(const struct kv_engine_options *options, struct kv_engine **out,
                              char *why, size_t why_bytes);
void kv_engine_close(struct kv_engine *engine); /* after run has returned */

/* [any thread] True if a Put's page may come as kv_put.pieces. */
bool kv_engine_takes_pieces(const struct kv_engine *engine);

/* [any thread] Puts a page that came as pieces into its block, here and now, if the engine has made room for
 * the block: a page that stays in 16 bits, behind the first of its block.  Nothing else is done with the
 * request, which stays the caller's; put.stream is set.
 *    KV_LANDED_NOT    submit it as it is
 *    KV_LANDED        the page is in: release the request, there is nothing to answer
 *    KV_LANDED_TELL   submit it: it may complete its block, or was bad */
enum kv_landed { KV_LANDED_NOT, KV_LANDED, KV_LANDED_TELL };
enum kv_landed kv_engine_land(struct kv_engine *engine, struct kv_request *request);

/* [any thread] A free request, zeroed but for its staging fields, or NULL.  with_staging: it
 * brings a staging buffer.  `on_free` (may be NULL) is called on the releasing thread whenever
 * a request or a buffer becomes free, so that waiting streams can try again. */
struct kv_request *kv_engine_acquire(struct kv_engine *engine, bool with_staging);
void kv_engine_release(struct kv_engine *engine, struct kv_request *request);
void kv_engine_on_free(struct kv_engine *engine, void (*on_free)(void *context), void *context);

/* [any thread] Gives the request to the engine.  Cannot fail: the inbox has room for every
 * request there is.  After run has returned on_done comes at once, with KV_UNAVAILABLE, on the
 * submitting thread. */
void kv_engine_submit(struct kv_engine *engine, struct kv_request *request);

/* Makes the calling thread the engine thread until kv_engine_stop(); then commits open
 * sessions, answers what is queued with KV_UNAVAILABLE and returns. */
void kv_engine_run(struct kv_engine *engine);

/* [any thread, or a signal handler] Asks run to return. */
void kv_engine_stop(struct kv_engine *engine);

/* [any thread] False once the backend has failed or stop was asked for: readiness. */
bool kv_engine_ready(const struct kv_engine *engine);

#endif
