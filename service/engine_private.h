/* SPDX-License-Identifier: Apache-2.0 */
/* engine_private.h - what the engine's files share.
 *
 *   engine.c          open, close, the loop, the stats
 *   engine_task.c     tasks, turns, lanes: who runs when
 *   engine_layouts.c  REGISTER, LAYOUTS
 *   engine_session.c  sessions by name and by handle; OPEN
 *   engine_close.c    COMMIT, CLOSE, DELETE
 *   engine_list.c     DESCRIBE, LIST
 *   engine_load.c     a snapshot back into a session
 *   engine_commit.c   a session into its snapshot
 *   engine_recover.c  what a directory held when the engine opened
 *   engine_stage.c    new tokens into a tail, and full blocks out of it
 *   engine_append.c   APPEND
 *   engine_attend*.c  ATTEND: append, then waves of pages through the kernel
 *   engine_get.c      FETCH, GET: one page back
 *   engine_put.c      PUT, PUT_END: one page in
 *   engine_land.c     pages that lanes put into their blocks themselves
 *   engine_gpu.c      which copies of blocks a device with memory of its own has
 *   engine_lookup.c   LOOKUP, and the prefix that OPEN starts with
 *
 * A request becomes a *task*: a step function and what it waits for.  Tasks that touch a session
 * hold its *turn*: they queue per session in the order of arrival, so whoever runs has the session
 * for itself and everything about it can be plain code.  (A session is a conversation: its layers
 * depend on each other, and what could run beside is another session.)  A task that uses kernels
 * or pins holds a *lane*: a stream and room for the operation's notes.
 *
 *      start --> [turns] --> [lane] --> step, wait, step, ... --> finish
 *
 * Turns of a task are all taken at once, in the order of arrival: there is no cycle to wait in.
 *
 * A task whose client is gone, or whose deadline has passed, is *stopped*.  If it waits for the
 * store it is answered at once and ends when the store calls back; if a kernel still uses the
 * request's buffers, the kernel is told to hurry and the answer follows it.
 */
#ifndef KV_SERVICE_ENGINE_PRIVATE_H
#define KV_SERVICE_ENGINE_PRIVATE_H

#include "kernels/kernel.h"
#include "proto/kv_check.h"
#include "service/engine.h"
#include "service/inbox.h"
#include "service/layout.h"
#include "service/names.h"
#include "service/session.h"
#include "service/snapshot.h"

#include <pthread.h>

enum {
    LANES = 16,            /* operations with kernels or pins at once; 150 KB of notes each */
    SYNCS = 64,            /* blocks a commit waits for at once */
    SLOTS_EXTRA = 8,       /* sessions bound while they are deleted or described */
    SLICE_BLOCKS = 256,    /* digests, finds per step: about 100 us */
    SLICE_BYTES = 1 << 20, /* copied by the engine thread per step: about 100 us */
    SLICE_COPIES = 64,     /* queued on a lane's stream per step */
    RETRY_US = 1000,
    MEMORY_WAIT_US = 1000000, /* how long room is waited for before the answer is BUSY */
    RETRY_MS = 100,        /* advice that goes with BUSY */
    ENERGY_GIVEN_ROWS = 128, /* what a client's query energy weighs, in rows seen */
};

/* Tags of KEEP records; blocks have the first 8 bytes of their layout's fingerprint. */
#define TAG_LAYOUT 0x3154554f59414c4bull  /* "KLAYOUT1" */
#define TAG_SESSION 0x314e4f495353454bull /* "KESSION1" */
#define TAG_TAIL 0x314c494154564b4bull    /* "KKVTAIL1" */

struct kv_engine;
struct task;
typedef void step_fn(struct kv_engine *engine, struct task *task);

struct turn {
    struct task *task;
    struct session *session;
    struct turn *next; /* behind it in the session's queue */
};

enum wait {
    WAIT_TURN,
    WAIT_LANE,
    WAIT_TICKET, /* the lane's stream reaches `ticket` */
    WAIT_STORE,  /* store_pending callbacks */
    WAIT_MEMORY, /* the store makes progress, or RETRY_US pass */
    WAIT_AGAIN,  /* nothing: everybody else has a turn of the loop first */
    WAIT_ENDED,
};

struct task_list {
    struct task *first, *last;
};

/* Blocks [from, to) of a part: what one attend item of a wave covers. */
struct range {
    uint32_t part, from, to;
};

/* A sealed block of a wave: its copy in the gpu tier, its number in the pin, or both. */
struct wave_block {
    uint32_t gpu;  /* KV_GPU_NONE: it has none */
    uint16_t host; /* WAVE_NOT_PINNED: the copy is all that is needed */
};
#define WAVE_NOT_PINNED UINT16_MAX

/* Pages that are held and attended together. */
struct wave {
    enum { WAVE_FREE, WAVE_PINNING, WAVE_READY, WAVE_RUNNING, WAVE_FAILED } state;
    enum kv_status status; /* FAILED */
    struct kv_pin pin;     /* count 0: nothing had to be pinned */
    struct kv_digest keys[KV_PIN_MAX];
    uint8_t *addresses[KV_PIN_MAX];
    uint32_t entries[KV_PIN_MAX];
    struct wave_block blocks[KV_ATTEND_PAGES_MAX]; /* in the order of their pages */
    uint32_t block_count;
    uint32_t part, block; /* where it began */
    struct range ranges[KV_ATTEND_ITEMS_MAX];
    uint32_t range_count;
    uint64_t ticket; /* RUNNING */
};

/* One session's share of a request: tokens to append to some of its layers, rows to attend. */
struct part {
    struct session *session;
    uint32_t item;                     /* of an attend request */
    enum kv_status status;             /* not KV_OK: it takes no further part */
    uint32_t layer, layer_count;       /* it is about layers layer .. layer + layer_count - 1 */
    uint32_t tokens;                   /* to append */
    const uint8_t *data;               /* per layer: K, V */
    const float *energy;               /* given with it, per layer; NULL: none */
    uint32_t fault_first, fault_count; /* its words in lane->faults */
    bool staged;                       /* pages are reserved: publish or roll back */
    bool sealing;                      /* pages of it are staged for sealing */

    /* attend */
    const uint8_t *query;
    uint32_t rows;
    const uint32_t *visible_given;
    enum kv_mask mask;
    bool observed;  /* energy is staged */
    uint32_t seen;  /* tokens that the row which sees most sees */
    bool started;   /* out and lse hold something to merge with */
    uint8_t *reply;
    size_t reply_bytes;
};

struct lane {
    struct kv_stream *stream;
    struct task *task; /* NULL: free */
    atomic_bool cancel;
    struct wave waves[2];
    struct part parts[KV_ATTEND_ITEMS_MAX];
    uint32_t part_count;
    uint32_t *faults; /* pinned, [fault_max] */
    uint32_t fault_count;
    struct kv_sync syncs[SYNCS];
};

struct put_block;

struct task {
    struct task *next, *prev;
    struct task_list *list;
    struct kv_request *request; /* NULL: answered already, or the engine's own */
    step_fn *step;
    enum wait wait;
    enum kv_status stopped; /* KV_OK, or why nobody needs the result */
    uint64_t deadline_us;
    uint64_t retry_us, give_up_us;
    struct lane *lane;
    uint64_t ticket;
    uint32_t store_pending;
    enum kv_status store_status; /* the first that was not KV_OK */
    bool no_disk;                /* a sync said so */
    bool is_put;                 /* a page of put.stream */
    struct kv_sync sync;
    struct turn turns[KV_ATTEND_ITEMS_MAX];
    uint32_t turn_count, turns_missing;

    /* The operation's own. */
    union {
        struct {
            struct layout_entry *layout; /* of all items */
            uint32_t part, block; /* where the next wave begins */
            uint32_t wave;        /* which of the two that is */
            uint32_t wave_blocks; /* limit, halved when it did not fit */
            bool layer_pins;      /* pin parts, not blocks */
            bool admits;          /* what is not in the gpu tier is copied there */
        } attend;
        struct {
            struct put_block *block;
            uint64_t stream;
            uint8_t *scratch; /* the page before it is packed, in the gpu tier; NULL: in staging */
        } put;
        struct {
            struct session *session;
            bool pinned;
            uint32_t gpu_held; /* 0, or 1 + the copy in the gpu tier that is read */
            void *scratch;     /* in the gpu tier; NULL: in staging */
        } page;
        struct {
            uint32_t block, count;
            struct kv_digest digest;
            bool unprotected;
        } chain;
        struct {
            struct session *session;
            bool commit, close;
            enum kv_durability durability, reached;
            uint64_t generation;
            uint32_t length, block_count, chunk_count, chunk_layers, chunk;
            struct kv_slot slot;
            uint32_t layer, page; /* within the chunk and the layer's tail, to be copied next */
            uint32_t sync_next; /* chunks, then blocks */
            uint32_t syncs_used;
            bool snapshot_done;
        } commit;
        struct {
            struct session *session;
            struct known *known;
            bool created;
            uint32_t block;     /* whose key is looked for */
            /* loading */
            uint32_t chunk, layer, page; /* where the copy goes on; within the chunk, the layer's tail */
            uint32_t chunk_count, chunk_layers;
            uint64_t length, generation;
            uint8_t nonce[16];
        } open;
    };
};

struct kv_engine {
    struct kv_engine_options options;
    struct kv_inbox *inbox;
    size_t staging_bytes;
    bool is_host;
    uint64_t now_us; /* at the start of this turn of the loop */
    uint64_t opened_us;
    uint64_t housekeeping_us; /* when it is due */
    atomic_bool stopping;
    atomic_bool ready;
    bool draining;        /* no new requests: open sessions are being committed */
    bool store_progress;  /* in this turn of the loop */

    struct task *tasks;   /* [task_count] */
    uint32_t task_count;
    struct task_list free_tasks, blocked, laneless, running;
    struct lane lanes[LANES];
    uint32_t lanes_free;
    uint32_t fault_max;

    struct layout_entry *layouts; /* [layouts_max] */
    uint32_t layout_count;
    struct names names;
    struct session *sessions; /* [sessions_open_max + SLOTS_EXTRA] */
    uint32_t session_count, sessions_open;
    struct tail_memory tail;
    struct kv_gpu_tier *gpu; /* NULL: device memory is host memory */

    struct put_block *puts; /* [put_max] */
    uint32_t put_max;
    pthread_mutex_t land_lock;
    struct landing *landings; /* [put_max], beside puts; with their list under land_lock */
    struct landing *landing_first;

    /* Arguments of one kernel call, which copies them. */
    struct kv_ingest ingests[KV_ITEMS_MAX];
    struct kv_quantize quantizes[KV_ITEMS_MAX], quantizes_raw[KV_ITEMS_MAX];
    struct kv_observe observes[KV_ITEMS_MAX];
    struct kv_attend attends[KV_ITEMS_MAX];
    struct kv_page_ref refs[KV_ATTEND_PAGES_MAX];
    uint32_t visible[KV_ATTEND_ITEMS_MAX][KV_ROWS_MAX];

    struct kv_engine_stats stats;
};

uint64_t engine_clock_us(void);

/* ---- engine_task.c: who runs when ------------------------------------------------------ */

void list_append(struct task_list *list, struct task *task);
void list_remove(struct task *task);

/* The answer: status (KV_OK or not) is in the request already. */
void task_answer(struct kv_engine *engine, struct task *task);
/* Notes why a request failed.  field may be "". */
__attribute__((format(printf, 4, 5))) void
request_fail(struct kv_request *request, enum kv_status status, const char *field,
             const char *format, ...);
/* KV_BUSY and KV_UNAVAILABLE from tail_alloc, kv_store_reserve: the answer to a client. */
void request_fail_memory(struct kv_engine *engine, struct kv_request *request);

/* Joins a session's queue.  Once per task and session. */
void task_take_turn(struct task *task, struct session *session);
/* The turns are taken: run `step` when they are ours and a lane is free. */
void task_enqueue(struct kv_engine *engine, struct task *task, step_fn *step);
/* No turn, no lane: run `step` in the next turn of the loop. */
void task_run(struct kv_engine *engine, struct task *task, step_fn *step);

void task_wait_ticket(struct kv_engine *engine, struct task *task, step_fn *step);
void task_wait_store(struct task *task, step_fn *step);
void task_again(struct task *task, step_fn *step);
/* False: it has waited long enough, answer BUSY. */
bool task_wait_memory(struct kv_engine *engine, struct task *task, step_fn *step);

/* Answers if that has not happened, gives back lane and turns, forgets the task. */
void task_finish(struct kv_engine *engine, struct task *task);

/* The same, with a status, the field at fault and a sentence as the answer. */
void task_fail(struct kv_engine *engine, struct task *task, enum kv_status status,
               const char *field, const char *message);
/* True and the task ended: it was stopped while it waited. */
bool task_was_stopped(struct kv_engine *engine, struct task *task);

/* One task runs and no request waits: what it does on this thread holds up nobody. */
bool engine_is_free(const struct kv_engine *engine);

/* A task of the engine's own; NULL: none is free. */
struct task *task_create(struct kv_engine *engine, struct kv_request *request);
bool engine_step_tasks(struct kv_engine *engine); /* true: something moved */
void engine_expire_tasks(struct kv_engine *engine);

/* Waits for one block to become durable; the result is in store_status and no_disk. */
void task_sync(struct kv_engine *engine, struct task *task, struct kv_sync *sync,
               const struct kv_digest *key, enum kv_durability durability);
void task_on_pinned(struct kv_pin *pin, enum kv_status status);
/* Pins one block (or one part of it) in the lane's first wave: status, addresses[0] when the
 * task's wait for the store is over.  Does not touch store_status. */
void pin_one(struct kv_engine *engine, struct task *task, const struct kv_digest *key,
             uint64_t tag, int32_t part);

/* ---- sessions ---------------------------------------------------------------------------- */

struct session *engine_session(struct kv_engine *engine, uint64_t handle); /* or NULL */
uint64_t session_handle(const struct session *session);
struct layout_entry *engine_layout(struct kv_engine *engine, const struct kv_digest *fingerprint);

/* Binds a name to a free slot; NULL: none is free. */
struct session *session_bind(struct kv_engine *engine, struct known *known, bool to_open);
/* What is open in the slot is gone; snapshots are untouched. */
void session_unload(struct kv_engine *engine, struct session *session);

/* DELETE, DESCRIBE: takes the turn of the session that the request names, then `begin` runs with
 * task->open.session.  False: there is none, and the task ended. */
bool session_named(struct kv_engine *engine, struct task *task, step_fn *begin);

void open_start(struct kv_engine *engine, struct task *task);
void close_start(struct kv_engine *engine, struct task *task); /* COMMIT, CLOSE */
void delete_start(struct kv_engine *engine, struct task *task);
void describe_start(struct kv_engine *engine, struct task *task);
void list_start(struct kv_engine *engine, struct task *task);
bool session_close_idle(struct kv_engine *engine, struct session *session);

/* engine_load.c: continues an OPEN whose name has a snapshot.  `loaded` is the step behind it;
 * store_status says how it went. */
void load_begin(struct kv_engine *engine, struct task *task);
void open_loaded(struct kv_engine *engine, struct task *task);

/* engine_commit.c: the session of task->commit to its snapshot; then commit_done runs. */
void commit_begin(struct kv_engine *engine, struct task *task);
void commit_done(struct kv_engine *engine, struct task *task);

/* engine_recover.c */
enum kv_status engine_recover(struct kv_engine *engine, char *why, size_t why_bytes);

/* ---- layouts, blocks ---------------------------------------------------------------------- */

void register_start(struct kv_engine *engine, struct task *task);
void layouts_start(struct kv_engine *engine, struct task *task);
struct layout_entry *layout_add(struct kv_engine *engine, const struct kv_layout *layout,
                                const char *model);
/* A layout's KEEP record.  False: it cannot be read. */
enum { LAYOUT_RECORD_BYTES = 512 };
bool layout_record_decode(const uint8_t *bytes, struct kv_layout *layout,
                          char model[KV_MODEL_MAX + 1]);

void lookup_start(struct kv_engine *engine, struct task *task);
/* True if a block of the chain is in the cache in the form its position needs. */
bool block_find(struct kv_engine *engine, const struct layout_entry *layout, uint32_t index,
                const struct kv_digest *key, struct kv_block_info *info);

void put_start(struct kv_engine *engine, struct task *task);
void put_end_start(struct kv_engine *engine, struct task *task);
enum kv_status engine_puts_open(struct kv_engine *engine);

/* engine_land.c.  `index` is of a put and its landing.  begin: pages of this block may be claimed from now on,
 * and land at `address` if that is not NULL.  claim: false, the page came before.  count: pages that have
 * landed.  end: none may land any more; false: a lane still writes to the block. */
enum kv_status engine_landings_open(struct kv_engine *engine, uint32_t count);
void engine_landings_close(struct kv_engine *engine);
void landing_begin(struct kv_engine *engine, uint32_t index, const struct kv_put *put,
                   const struct layout_entry *layout, uint8_t *address);
bool landing_claim(struct kv_engine *engine, uint32_t index, uint32_t layer);
uint32_t landing_count(struct kv_engine *engine, uint32_t index);
bool landing_end(struct kv_engine *engine, uint32_t index);
void engine_puts_close(struct kv_engine *engine);
void get_start(struct kv_engine *engine, struct task *task);
void fetch_start(struct kv_engine *engine, struct task *task);

/* ---- engine_gpu.c: copies in the gpu tier -------------------------------------------------- */

/* The copy of a block, pinned, if work on `stream` may read it now; or KV_GPU_NONE. */
uint32_t gpu_hold(struct kv_engine *engine, const struct kv_stream *stream,
                  const struct kv_digest *key);
void gpu_release(struct kv_engine *engine, uint32_t block); /* KV_GPU_NONE: nothing */
/* A block that was just committed was filled in the tier, at `memory` (NULL: it was not). */
void gpu_adopt(struct kv_engine *engine, const struct kv_digest *key, uint8_t *memory);
/* Device memory for one operation; NULL: use pinned memory. */
void *gpu_scratch(struct kv_engine *engine, uint64_t bytes);
void gpu_scratch_free(struct kv_engine *engine, void *memory);

/* Queues copies of blocks that the wave has pinned and the tier has room for. */
void wave_admit(struct kv_engine *engine, struct lane *lane, struct wave *wave);
/* Unpins the wave's copies. */
void wave_gpu_release(struct kv_engine *engine, struct wave *wave);

/* A raw page's first rows to and from a snapshot.  True: that was queued on the stream. */
bool rows_save(struct kv_engine *engine, struct kv_stream *stream, const struct kv_shape *shape,
               const uint8_t *page, uint32_t tokens, uint8_t *out);
bool rows_load(struct kv_engine *engine, struct kv_stream *stream, const struct kv_shape *shape,
               uint8_t *page, uint32_t tokens, const uint8_t *from);

/* ---- engine_stage.c: tokens in, blocks out -------------------------------------------------- */

/* Checks a part's append against its session: length, token ids.  Fails the status and says
 * field and sentence. */
enum kv_status stage_check(struct kv_engine *engine, const struct part *part,
                           uint64_t expected_length, const char **field, char message[160]);
/* Pages and ids.  KV_BUSY, KV_UNAVAILABLE: no memory (rolled back).  KV_INVALID: ids. */
enum kv_status stage_reserve(struct kv_engine *engine, struct part *part, const uint32_t *ids,
                             const char **message);
/* Enqueues the copy of a part's rows into its pages. */
void stage_ingest(struct kv_engine *engine, struct lane *lane, struct part *part);
/* KV_OK, or KV_INVALID and a sentence that names the element. */
enum kv_status stage_fault(const struct lane *lane, const struct part *part, char message[160]);
/* True if the part's layers will have pages to seal. */
bool stage_due(const struct part *part);
/* Enqueues packing of what is due.  Whatever finds no room stays exact for now. */
void stage_seal(struct kv_engine *engine, struct lane *lane, struct part *part);
void stage_publish(struct kv_engine *engine, struct part *part);
void stage_rollback(struct kv_engine *engine, struct part *part);

/* Query energy from outside: every number is in 0 .. KV_ENERGY_MAX. */
bool energy_valid(const float *energy, size_t count);

void append_start(struct kv_engine *engine, struct task *task);
void attend_start(struct kv_engine *engine, struct task *task);

#endif
