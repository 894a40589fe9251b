/* SPDX-License-Identifier: Apache-2.0 */
/* kivi.h - libkivi, the C client of kivid.  This header is the manual.
 *
 * kivid holds the key/value cache of language models outside the inference engine, packed to
 * two bits, and answers attention on it.  Four nouns:
 *
 *   client    a connection to a kivid
 *   layout    a model's cache shape; registered once, named by its fingerprint afterwards
 *   session   a named conversation: open, append K and V, attend, commit, close, open again
 *   block     128 tokens of all layers under a digest; put, looked up and got by anyone
 *
 * A decode step with everything that is needed around it:
 *
 *     struct kivi_options options = KIVI_OPTIONS_INIT;
 *     struct kivi_client *client = NULL;
 *     struct kivi_session *session = NULL;
 *     struct kivi_error error;
 *
 *     if (kivi_client_open(&options, &client, &error)) goto failed;
 *     if (kivi_layout_register(client, &layout, &info, NULL, 0, &error)) goto failed;
 *     struct kivi_session_options chat = { .name = "chat-17", .fingerprint = info.fingerprint };
 *     if (kivi_session_open(client, &chat, &session, NULL, 0, &error)) goto failed;
 *
 *     struct kivi_attend_item step = {
 *         .session = session, .q = q, .rows = 1,
 *         .k = k, .v = v, .append_tokens = 1, .expected_length = length,
 *         .out = out, .lse = lse };
 *     if (kivi_session_attend(layer, &step, 0, &error)) goto failed;
 *
 * Results.   Every function that can fail returns an enum kivi_code, 0 for success, and then
 *            explains itself in *error, which may be NULL.  On failure outputs are untouched,
 *            unless the function says otherwise.
 * Time.      Every function that talks to the service blocks until it is done, at most
 *            timeout_ms; 0 is the client's default.  When the time is over the call is
 *            cancelled and returns KIVI_DEADLINE_EXCEEDED; whether the service did the work is
 *            then unknown, and kivi_session_describe() tells.
 * Threads.   A client may be used by any number of threads at once.  A session, a put and a get
 *            by one at a time.  What was opened from a client is closed before the client.
 * Memory.    The caller's buffers are lent for the length of a call, except where a function
 *            says longer.  Tensors of 16 KiB and more are sent from where they lie and received
 *            where they shall lie: nothing is packed.  What the library allocates for the caller
 *            is given back to kivi_free().
 * Values.    Little endian, rows without padding, in the dtype of the layout.  Shapes below name
 *            the slowest dimension first.
 * Globals.   None, but gRPC's own.  Do not fork() without exec() after kivi_client_open().
 *
 * Caveats
 *   - No TLS yet: use a unix socket, or a network that is yours.
 *   - glibc returns the memory of large messages to the kernel at once and fetches it anew for
 *     each.  A program that streams gigabytes doubles its speed with three lines at its start:
 *         mallopt(M_MMAP_THRESHOLD, 32 << 20);
 *         mallopt(M_TRIM_THRESHOLD, 1 << 30);
 *         mallopt(M_TOP_PAD, 64 << 20);
 *     A library must not do that to its host, so it is left to you.
 *   - A call that fails while the service has stopped reading returns only when gRPC has let go
 *     of the caller's buffers, at the latest when the connection is found dead (40 s).
 *   - Calls of the contract that kivid does not serve yet (Fork, Truncate, Pin, ...) have no
 *     function here yet.
 */
#ifndef KIVI_CLIENTS_C_KIVI_H
#define KIVI_CLIENTS_C_KIVI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised in the first number when a program must be compiled again, in the second when
 * something was added.  kivi_version() is the version of the library that was loaded. */
#define KIVI_VERSION "0.1.0"
const char *kivi_version(void);
/* The version of gRPC C core below it. */
const char *kivi_transport_version(void);

/* ---- Errors ------------------------------------------------------------------------------ */

/* gRPC's status codes, by number. */
enum kivi_code {
    KIVI_OK = 0,
    KIVI_CANCELLED = 1,
    KIVI_UNKNOWN = 2,
    KIVI_INVALID_ARGUMENT = 3,    /* a rule is broken: `field` names what */
    KIVI_DEADLINE_EXCEEDED = 4,
    KIVI_NOT_FOUND = 5,           /* no such session, block, layout; or a handle from before a
                                     restart of the service: open the session again */
    KIVI_ALREADY_EXISTS = 6,
    KIVI_PERMISSION_DENIED = 7,
    KIVI_RESOURCE_EXHAUSTED = 8,  /* a limit is in use: `scope` says whose, `retry_ms` when to
                                     try again */
    KIVI_FAILED_PRECONDITION = 9, /* the name exists with another layout or salt */
    KIVI_ABORTED = 10,            /* the session's length is not the expected one */
    KIVI_OUT_OF_RANGE = 11,
    KIVI_UNIMPLEMENTED = 12,      /* this version of the service does not serve it */
    KIVI_INTERNAL = 13,
    KIVI_UNAVAILABLE = 14,        /* nobody listens, or the service is draining: try again */
    KIVI_DATA_LOSS = 15,          /* stored bytes failed their checksum; the block is gone */
    KIVI_UNAUTHENTICATED = 16,
};

/* "NOT_FOUND" and so on; "UNKNOWN" for a number that is none. */
const char *kivi_code_name(int code);

struct kivi_error {
    int code;          /* enum kivi_code */
    bool retry;        /* the same call may succeed later, unchanged */
    uint32_t retry_ms; /* the service's advice how much later; 0: none given */
    char field[64];    /* the field at fault, as the contract spells it; "" if none */
    char scope[16];    /* RESOURCE_EXHAUSTED: "tenant", "node" or "tier" */
    char message[424]; /* a sentence */
};

/* Frees what the library allocated.  NULL is fine. */
void kivi_free(void *memory);

/* ---- Client ------------------------------------------------------------------------------ */

struct kivi_client;

/* Begin with KIVI_OPTIONS_INIT and change what you need. */
struct kivi_options {
    size_t struct_bytes; /* sizeof(struct kivi_options): lets the library grow this struct */

    /* unix:///path/to/socket, host:port, ipv4:a.b.c.d:port or dns:///name:port (the first address
     * that answers).  NULL: $KIVID_TARGET, or else unix:///run/kivid/kivid.sock. */
    const char *target;

    /* For calls that give no time of their own.  0: 30000. */
    uint32_t timeout_ms;

    /* How long a waiting thread looks for the answer before it sleeps.  Waking costs 20 to 60 us
     * on most machines, a decode step's answer takes less: 50 to 200 buys latency for a busy
     * core.  0: sleep at once. */
    uint32_t spin_us;

    /* Payload of one message when a long append is cut into several.  0: 1 MiB, at which a
     * connection is fastest.  Must not exceed the service's limit. */
    uint32_t message_bytes;

    /* Calls wait for the service to appear instead of failing with KIVI_UNAVAILABLE. */
    bool wait_for_service;
};
#define KIVI_OPTIONS_INIT { sizeof(struct kivi_options), NULL, 0, 0, 0, false }

/* Makes a client.  Connects at the first call, so that it succeeds also when nobody listens; and
 * connects again by itself when the service was restarted.  KIVI_INVALID_ARGUMENT: an option. */
int kivi_client_open(const struct kivi_options *options, struct kivi_client **out,
                     struct kivi_error *error);
void kivi_client_close(struct kivi_client *client);

/* Asks the service for its health; `service` is "" for all of it (liveness is that it answers,
 * readiness is `serving`).  KIVI_NOT_FOUND: it knows no such service. */
int kivi_client_ping(struct kivi_client *client, const char *service, bool *serving,
                     uint32_t timeout_ms, struct kivi_error *error);

struct kivi_tier_stats {
    uint64_t blocks, bytes, bytes_max;
};

/* The service's counters, by the names and with the meaning of StatsResponse in
 * proto/kivi/v1/admin.proto. */
struct kivi_stats {
    char version[32], backend[16], io_engine[16];
    uint64_t uptime_ms;
    bool ready;
    struct kivi_tier_stats host, nvme;
    uint64_t blocks, blocks_max;
    uint64_t sessions_open, sessions_known, sessions_max, layouts;
    uint64_t tail_bytes, tail_bytes_max;
    uint64_t requests, errors, tokens_appended, rows_attended, bytes_in, bytes_out;
    uint64_t blocks_sealed, blocks_shared, pages_from_host, pages_from_nvme;
    uint64_t evictions, drops, spills, restores, corruptions, io_errors;
    uint64_t bytes_written, bytes_read, segments_lost;
    uint64_t recovered_blocks, recovered_sessions, recovery_us, recovery_bytes;
    bool recovery_clean;
    struct kivi_tier_stats gpu; /* bytes_max 0: it has no GPU */
    uint64_t pages_from_gpu, gpu_copies, gpu_bytes_copied, gpu_evictions, gpu_refusals;
    uint64_t reserved[8];
};
int kivi_client_stats(struct kivi_client *client, struct kivi_stats *stats, uint32_t timeout_ms,
                      struct kivi_error *error);

/* ---- Layouts ----------------------------------------------------------------------------- */

enum kivi_dtype { KIVI_F16 = 1, KIVI_BF16 = 2, KIVI_F32 = 3 };
enum kivi_codec_kind { KIVI_CODEC_RAW = 1, KIVI_CODEC_MINMAX = 2, KIVI_CODEC_UNBIASED = 3 };
enum { KIVI_BLOCK_TOKENS = 128, KIVI_DIGEST_BYTES = 32, KIVI_ROWS_MAX = 128 };

struct kivi_digest {
    uint8_t bytes[KIVI_DIGEST_BYTES];
};

/* How blocks are packed: a preset's name, or every field, or both where they agree. */
struct kivi_codec {
    char preset[24];    /* raw16, kivi2-paper, kivi4-paper, kivi2.5, kivi2, kivi1.75, kivi1.5 */
    uint32_t kind;      /* enum kivi_codec_kind; 0 with a preset */
    uint32_t key_bits;  /* MINMAX: 2 or 4 */
    uint32_t value_bits;
    uint32_t group;     /* MINMAX: 32, 64 or 128 */
    bool value_rotated; /* UNBIASED */
    uint32_t mix_count; /* UNBIASED: 1 .. 4 */
    uint8_t mixes[4][4];
};

/* A model's cache shape.  All zero but the first six: the default codec, kivi2. */
struct kivi_layout {
    char model[257];       /* tells models of one shape apart */
    uint32_t layers;       /* 1 .. 256 */
    uint32_t kv_heads;     /* 1 .. 128 */
    uint32_t query_heads;  /* a multiple of kv_heads, at most 16 times */
    uint32_t head_dim;     /* 64, 96, 128 or 256 */
    uint32_t dtype;        /* enum kivi_dtype, of K, V and Q as you send them */
    struct kivi_codec codec;
    float softmax_scale;   /* 0: 1 / sqrt(head_dim) */
    bool has_exact;        /* the next two count; false: what the codec suggests */
    uint32_t window_tokens;/* newest tokens never packed: a multiple of 128, at most 1024 */
    uint32_t sink_blocks;  /* first blocks never packed: at most 8 */
    uint32_t reserved[4];
};

/* A layout as the service holds it, every default written out. */
struct kivi_layout_info {
    struct kivi_digest fingerprint;
    struct kivi_layout layout;
    uint64_t page_bytes_packed; /* one layer of one block */
    uint64_t page_bytes_full;   /* the same in 16 bits */
    double bits_per_element;    /* of a packed page, metadata counted */
};

/* Idempotent.  `created` may be NULL.  KIVI_INVALID_ARGUMENT names the field that cannot be
 * represented; KIVI_RESOURCE_EXHAUSTED: the service holds as many layouts as it may. */
int kivi_layout_register(struct kivi_client *client, const struct kivi_layout *layout,
                         struct kivi_layout_info *info, bool *created, uint32_t timeout_ms,
                         struct kivi_error *error);

/* All layouts, in order of registration.  *infos goes back to kivi_free(). */
int kivi_layout_list(struct kivi_client *client, struct kivi_layout_info **infos, size_t *count,
                     uint32_t timeout_ms, struct kivi_error *error);

/* Bytes of one element of a dtype; 0 if it is none. */
size_t kivi_dtype_bytes(uint32_t dtype);

/* ---- Sessions ---------------------------------------------------------------------------- */

struct kivi_session;

enum kivi_durability {
    KIVI_VOLATILE = 1, /* in memory */
    KIVI_WRITTEN = 2,  /* survives a crash of the service */
    KIVI_SYNCED = 3,   /* survives power loss */
};

enum kivi_open_mode {
    KIVI_OPEN_OR_CREATE = 0,
    KIVI_OPEN_CREATE = 1,   /* KIVI_ALREADY_EXISTS if the name is taken */
    KIVI_OPEN_EXISTING = 2, /* KIVI_NOT_FOUND if it is not */
};

struct kivi_session_options {
    const char *name;               /* 1 .. 200 bytes of UTF-8 */
    struct kivi_digest fingerprint; /* of its layout */
    const void *salt;               /* makes equal texts different ones; NULL: none */
    size_t salt_bytes;              /* at most 64 */
    uint32_t mode;                  /* enum kivi_open_mode */
    /* A new session starts with the longest prefix of these tokens that the service holds, in
     * whole blocks: append from kivi_session_state.length on.  NULL: it starts empty. */
    const uint32_t *token_ids;
    size_t token_count;
};

struct kivi_session_state {
    uint64_t length; /* tokens it holds */
    uint64_t usable; /* below length when a block was evicted: the tokens before it */
    bool created;
    struct kivi_layout_info info;
};

/* Opens a session, new or as it was last committed.  `state` may be NULL.  The session refers to
 * a handle of the service, which ends with kivi_session_close(), the service's idle limit, or
 * its restart: calls are KIVI_NOT_FOUND from then on, and the session is opened again. */
int kivi_session_open(struct kivi_client *client, const struct kivi_session_options *options,
                      struct kivi_session **out, struct kivi_session_state *state,
                      uint32_t timeout_ms, struct kivi_error *error);

/* Ends the service's handle; with `commit`, what was appended is made durable first, otherwise
 * what was not committed is lost.  Frees the session also when it fails. */
int kivi_session_close(struct kivi_session *session, bool commit, uint32_t timeout_ms,
                       struct kivi_error *error);

/* Frees the session and leaves the service's handle to its idle limit.  NULL is fine. */
void kivi_session_abandon(struct kivi_session *session);

/* Where the layout of an open session is; borrowed until it is closed. */
const struct kivi_layout_info *kivi_session_layout(const struct kivi_session *session);

/* The service's number for it, as it stands in frames of the contract. */
uint64_t kivi_session_handle(const struct kivi_session *session);

/* New tokens of one layer, or of all. */
struct kivi_append {
    uint32_t layer;           /* unless all_layers */
    bool all_layers;
    uint64_t expected_length; /* of the layer: compare-and-append */
    uint64_t tokens;          /* any number: long ones travel in several messages */
    /* [layers] pointers with all_layers, else one: [tokens][kv_heads][head_dim] each */
    const void *const *k;
    const void *const *v;
    /* [tokens], with whichever layer brings them first; NULL for the others, or for a session
     * that shares nothing */
    const uint32_t *token_ids;
    /* Running mean of q^2, [kv_heads][head_dim], times [layers] with all_layers.  NULL: as seen
     * in attends. */
    const float *query_energy;
};

struct kivi_appended {
    uint64_t length;         /* of the layer */
    uint64_t session_length; /* tokens that every layer has */
    uint64_t sealed_tokens;
    uint32_t blocks_shared;  /* blocks completed by this call that the service held already */
};

/* `result` is filled on failure too, with the last part that is known to be appended; zero if none
 * is.  KIVI_ABORTED: the length is not the expected one. */
int kivi_session_append(struct kivi_session *session, const struct kivi_append *append,
                        struct kivi_appended *result, uint32_t timeout_ms,
                        struct kivi_error *error);

enum kivi_mask {
    KIVI_MASK_ALL = 0,    /* every row sees everything */
    KIVI_MASK_CAUSAL = 1, /* the rows are the newest tokens, each sees up to itself */
};

/* Attention of query rows on one session, after an optional append. */
struct kivi_attend_item {
    struct kivi_session *session;
    const void *q;            /* [rows][query_heads][head_dim] */
    uint32_t rows;            /* 0 .. KIVI_ROWS_MAX */
    uint32_t mask;            /* enum kivi_mask */
    const uint32_t *visible;  /* [rows] overrides mask: row r sees tokens 0 .. visible[r] - 1 */
    const void *k, *v;        /* [append_tokens][kv_heads][head_dim] */
    uint32_t append_tokens;
    uint64_t expected_length; /* of the layer, when appending */
    const uint32_t *token_ids;/* [append_tokens] or NULL */
    bool no_energy;           /* leave these rows out of the session's query energy */

    float *out;               /* [rows][query_heads][head_dim]; a row that sees nothing: 0 */
    float *lse;               /* [rows][query_heads], natural log; that row: -inf */

    int code;                 /* result of this item: enum kivi_code */
    uint64_t length;          /* result: of the layer now */
};

/* One layer, 1 .. 64 sessions of one layout, in one message and one answer.  Returns KIVI_OK when
 * every item is; otherwise the code of the first that is not, which `error` explains.  Items
 * stand for themselves: those with code KIVI_OK have their results whatever became of others.
 * When the call as a whole fails, every item has its code.  The frame must fit one message of
 * the service. */
int kivi_attend(struct kivi_client *client, uint32_t layer, struct kivi_attend_item *items,
                size_t count, uint32_t timeout_ms, struct kivi_error *error);

/* The same for one session: a decode step. */
int kivi_session_attend(uint32_t layer, struct kivi_attend_item *item, uint32_t timeout_ms,
                        struct kivi_error *error);

/* K and V of tokens begin .. end - 1 of one layer, as attends see them, into k and v:
 * [end - begin][kv_heads][head_dim] each, of `dtype`: 0, the layout's, or KIVI_F32, which is nearer
 * to what attends see (bf16 rounds it to 8 bits, KIVI_F32 to 11).  On failure the buffers' contents
 * are undefined. */
int kivi_session_fetch(struct kivi_session *session, uint32_t layer, uint64_t begin, uint64_t end,
                       uint32_t dtype, void *k, void *v, uint32_t timeout_ms,
                       struct kivi_error *error);

/* Makes the session as it is now durable.  `durability` is what to wait for: KIVI_WRITTEN or
 * KIVI_SYNCED; `reached` and `length` may be NULL. */
int kivi_session_commit(struct kivi_session *session, uint32_t durability, uint32_t *reached,
                        uint64_t *length, uint32_t timeout_ms, struct kivi_error *error);

struct kivi_session_info {
    char name[201];
    struct kivi_digest fingerprint;
    uint64_t length;           /* tokens that every layer has */
    uint64_t length_committed; /* tokens that survive a restart */
    uint64_t sealed_tokens;    /* of them in blocks; the rest is the exact tail */
    uint64_t bytes_held;       /* packed blocks, sinks and tail */
    uint64_t bytes_full;       /* the same tokens at 16 bits an element */
    uint32_t blocks_host, blocks_nvme;
    uint32_t blocks_missing;   /* evicted: their tokens must be appended again */
    bool open;
    uint64_t age_ms;           /* since the last use */
    uint32_t durability;       /* of length_committed */
    uint32_t reserved[5];
};

/* By name, open or not.  `layout`, `digests` and `digest_count` may be NULL; *digests, those of
 * the sealed blocks in order, goes back to kivi_free(). */
int kivi_session_describe(struct kivi_client *client, const char *name,
                          struct kivi_session_info *info, struct kivi_layout_info *layout,
                          struct kivi_digest **digests, size_t *digest_count, uint32_t timeout_ms,
                          struct kivi_error *error);

/* Sessions in order of name: those that begin with `prefix` (NULL: all) and stand behind `after`
 * (NULL: from the first), at most `limit` (0: all).  *infos goes back to kivi_free(). */
int kivi_session_list(struct kivi_client *client, const char *prefix, const char *after,
                      uint32_t limit, struct kivi_session_info **infos, size_t *count,
                      uint32_t timeout_ms, struct kivi_error *error);

/* Forgets a session, durably. */
int kivi_session_delete(struct kivi_client *client, const char *name, uint32_t timeout_ms,
                        struct kivi_error *error);

/* ---- Blocks ------------------------------------------------------------------------------ */

enum kivi_tier { KIVI_TIER_GPU = 1, KIVI_TIER_HOST = 2, KIVI_TIER_NVME = 3, KIVI_TIER_REMOTE = 4 };
enum kivi_form {
    KIVI_FORM_FULL = 1,   /* K [128][kv_heads][head_dim], then V alike */
    KIVI_FORM_PACKED = 2, /* the codec's packed page, bit for bit */
};

/* What chain to look for: token ids from the start of the text, or digests in order. */
struct kivi_lookup {
    struct kivi_digest fingerprint;
    const void *salt;
    size_t salt_bytes;
    const uint32_t *token_ids;
    size_t token_count;
    const struct kivi_digest *digests;
    size_t digest_count;
    uint32_t lease_ms; /* keep what is found from being dropped for so long; at most 600000 */
};
struct kivi_found_block {
    struct kivi_digest digest;
    uint32_t tier; /* enum kivi_tier */
    uint64_t bytes;
};
struct kivi_found {
    struct kivi_found_block *blocks; /* the usable prefix; goes back to kivi_free() */
    size_t block_count;
    uint64_t tokens;
    uint64_t load_us;  /* estimated, to bring the cold ones up */
    uint32_t lease_ms; /* granted */
};

/* Never touches the disk. */
int kivi_block_lookup(struct kivi_client *client, const struct kivi_lookup *lookup,
                      struct kivi_found *found, uint32_t timeout_ms, struct kivi_error *error);

/* A put is a stream of pages into the service: the pages of a block in any order, several blocks
 * at a time, one result per block when it is complete or has failed. */
struct kivi_put;

struct kivi_put_page {
    const struct kivi_digest *digest; /* of the block; or NULL, and the service computes it from: */
    const struct kivi_digest *parent; /*   the block before; NULL: the root of the chain */
    const uint32_t *token_ids;        /*   [128] */
    const void *salt;                 /*   of the chain */
    size_t salt_bytes;
    uint32_t layer;
    uint32_t form;             /* enum kivi_form; 0: FULL */
    uint32_t durability;       /* in a block's first page: when to answer; 0: KIVI_VOLATILE */
    const float *query_energy; /* FULL: [kv_heads][head_dim] or NULL */
    bool raw;                  /* keep this block in 16 bits */
    const void *data;
    size_t data_bytes;
};

struct kivi_put_result {
    struct kivi_digest digest;
    int code;             /* of this block: enum kivi_code; 0: the service holds it */
    bool existed;         /* it did before */
    uint32_t durability;  /* reached */
    uint32_t credit;      /* blocks that may be incomplete on this stream at once */
    uint64_t bytes_held;
    char message[200];
};

int kivi_put_open(struct kivi_client *client, const struct kivi_layout_info *info,
                  struct kivi_put **out, struct kivi_error *error);

/* Sends one page.  `data` is lent until the result of its block was taken, or the put closed.
 * Blocks while the connection is full.  KIVI_INVALID_ARGUMENT: an earlier page broke a rule; the
 * stream is over. */
int kivi_put_page(struct kivi_put *put, const struct kivi_put_page *page, uint32_t timeout_ms,
                  struct kivi_error *error);

/* Takes the next result, in the order in which blocks were finished.  Take them as you go: with
 * more than a few thousand untaken the service stops reading. */
int kivi_put_result(struct kivi_put *put, struct kivi_put_result *result, uint32_t timeout_ms,
                    struct kivi_error *error);

/* Ends the stream.  With error status if results were still to come for complete blocks or the
 * stream had failed.  Incomplete blocks leave nothing behind.  Frees the put also when it fails;
 * NULL is fine. */
int kivi_put_close(struct kivi_put *put, uint32_t timeout_ms, struct kivi_error *error);

/* A get is a stream of pages out of the service, layer-major. */
struct kivi_get;

struct kivi_got_page {
    uint32_t index;    /* into the digests asked for */
    uint32_t layer;
    int code;          /* not 0: this block cannot be had, and why */
    uint32_t form;
    size_t data_bytes; /* written to the buffer */
    char message[200];
};

/* layers NULL: all. */
int kivi_get_open(struct kivi_client *client, const struct kivi_digest *fingerprint,
                  const struct kivi_digest *digests, size_t digest_count, const uint32_t *layers,
                  size_t layer_count, uint32_t form, struct kivi_get **out, uint32_t timeout_ms,
                  struct kivi_error *error);

/* The next page, its data into `buffer`, of which there must be enough for a page of the form
 * asked for (see struct kivi_layout_info; FULL in the dtype of the layout).  *done is set, and
 * the page is none, after the last. */
int kivi_get_next(struct kivi_get *get, struct kivi_got_page *page, void *buffer,
                  size_t buffer_bytes, bool *done, uint32_t timeout_ms, struct kivi_error *error);

/* Also before the end.  NULL is fine. */
void kivi_get_close(struct kivi_get *get);

#ifdef __cplusplus
}
#endif

#endif
