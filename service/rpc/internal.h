/* SPDX-License-Identifier: Apache-2.0 */
/* internal.h - what the files of this folder share: the server, its lanes, its calls.
 *
 * A *lane* is a completion queue and the one thread that empties it; a call stays on the lane that
 * accepted it.  A call is a small state machine.  Three threads move it: its lane (gRPC's events),
 * the engine (a request is done), and the helper (waiting and timeouts).  Each locks the call, notes
 * what happened, and runs call_step(), which does whatever can be done next.
 *
 *    flight   one message of a call and the request it became:
 *
 *      FREE --accept--> DECODING --> HELD --submit--> ENGINE --done--> READY --sent--> FREE
 *
 *             DECODING without the call's lock: the payload is copied there.
 *             HELD: a frame of Append or Attend waits for the frame before it, because a frame
 *             that fails must leave the ones behind it undone.
 *
 * Locks.   call->lock, then any of gRPC's.  rpc->lock guards the pool, the waiting list and
 *          the drain; it is the innermost: nothing is called with it held.  gRPC may call
 *          kv_engine_release() (through a slice) under its own locks, and that reaches on_free,
 *          which takes rpc->lock only.
 * Sending  on the engine thread.  When a request is done the engine thread packs the answer's
 *          head and starts gRPC's send itself, some 10 us including the system call.  C core has no
 *          public way to wake a completion queue from outside (alarms are C++), and a hand-over
 *          to another thread of ours costs one more sleep and wake-up, 20 to 50 us on a virtual
 *          machine: as much as the whole call.  Payloads are not copied there beyond COPY_MAX.
 *          Measured on two shared cores, unix socket, spin_us 0, p50: an Attend frame through the
 *          fake engine's thread 31 us, an empty unary call (no other thread) 26 us.
 */
#ifndef KV_SERVICE_RPC_INTERNAL_H
#define KV_SERVICE_RPC_INTERNAL_H

#include <grpc/grpc.h>
#include <pthread.h>

#include "proto/kv_check.h"
#include "service/convert.h"
#include "service/log.h"
#include "service/rpc/rpc.h"
#include "service/standard.h"

enum {
    FLIGHTS_MAX = KV_PUT_OPEN_MAX,
    ARMED = 2,             /* calls accepted ahead, a method and lane */
    PLANS_MAX = 64,        /* calls at once that answer with many messages: 128 KiB each */
    SPARE_CALLS = 64,      /* beyond calls_max, for calls that are only told so */
    PIECES_MAX = 4096,     /* of one message: gRPC delivers 8 to 64 KiB each */
    COPY_MAX = 16 << 10,   /* payloads up to this are copied and their staging is freed at once */
    SMALL_FRAME = 24 << 10, /* two of them fit the window that HTTP/2 begins with, 64 KiB less 1 */
    PROBE = 64,            /* small frames between two looks at whether the client sends ahead */
    TICK_MS = 100,         /* of the helper */
    UNARY_WAIT_MS = 1000,  /* for a free request, then RESOURCE_EXHAUSTED */
    CROWDED_STALL_MS = 500, /* allowed to a client that does not read while others wait */
    DRAIN_IDLE_MS = 500,   /* a stream without traffic is ended this long into a drain */
    RETRY_MS = 20,         /* advice with RESOURCE_EXHAUSTED from here */
    TRAILERS_MAX = 3,
};

struct call;
struct lane;

struct tag {
    void (*run)(struct call *call, bool ok); /* call locked */
    struct call *call;
};

enum shape {
    SHAPE_UNARY,
    SHAPE_DUPLEX,     /* frames in, answers out */
    SHAPE_PAGES,      /* one question, many answers */
    SHAPE_CHECK,      /* health */
    SHAPE_WATCH,
    SHAPE_REFLECTION,
    SHAPE_UNKNOWN,    /* the generic call: UNIMPLEMENTED */
};

/* What becomes of a request that is done. */
enum verdict { VERDICT_ANSWER, VERDICT_SILENT, VERDICT_FAIL, VERDICT_KEEP };

struct method {
    const char *path;
    enum shape shape;
    uint32_t flights;
    bool staging; /* its requests carry data, in or out */
    bool serial;  /* frames behind one that fails must not have run */
    kv_decode *decode;
    kv_encode *encode;
    kv_decode_plan *plan;
};
extern const struct method methods[];
extern const size_t method_count;

enum flight_state { FLIGHT_FREE, FLIGHT_DECODING, FLIGHT_HELD, FLIGHT_ENGINE, FLIGHT_READY };

struct flight {
    struct call *call;
    enum flight_state state;
    uint64_t sequence;
    struct kv_request *request; /* DECODING to ENGINE; READY: a List page being told */
    grpc_byte_buffer *message;  /* DECODING to ENGINE: what the request was lent, or NULL */
    grpc_byte_buffer *answer;   /* READY */
    uint32_t index;             /* Get: the digest asked for; List: entries told */
    bool failed;                /* Get: the answer says so */
};

struct pages; /* pages.c */

/* How a call ends. */
struct ending {
    grpc_status_code code;
    char text[272];
    char field[48];
    enum kv_scope scope;
    uint32_t retry_ms;
};

struct call {
    pthread_mutex_t lock; /* the slot's, for good; what follows is one client's */
    struct kv_rpc *rpc;
    struct lane *lane;
    const struct method *method;
    uint32_t refs; /* batches, flights in the engine, the waiting list */

    grpc_call *grpc;
    grpc_call_details details; /* generic only */
    gpr_timespec deadline;
    grpc_metadata_array metadata;
    grpc_byte_buffer *arriving; /* gRPC's to write until `received` runs */
    grpc_byte_buffer *in;  /* arrived, not yet accepted */
    grpc_byte_buffer *out; /* being sent */
    int cancelled;         /* gRPC writes it before `over` runs */
    struct tag accepted, over, greeted, received, sent, finished;

    bool armed;     /* waits for a client */
    bool greeting;  /* initial metadata went out, or goes with the status */
    bool reading, accepting, sending, finishing;
    bool ending;    /* no more input: `end` says how it ends once all is answered */
    bool gone;      /* cancelled: nobody reads answers */
    bool put_ended;
    struct ending end;
    uint64_t end_sequence; /* answers from here on are dropped; UINT64_MAX: none */
    uint64_t active_ms;    /* last time anything came or went */
    uint64_t since_ms;     /* what is being sent, since when */
    uint64_t wait_ms;      /* since when it has waited for a request; 0: it does not */
    bool pins_staging;     /* what is being sent lies in staging */
    bool sends_ahead;      /* its last message came before the answer to the one before it */
    size_t accepted_bytes; /* of the last message that was accepted */

    struct flight flights[FLIGHTS_MAX];
    uint64_t sequence_next, sequence_answer;
    struct pages *pages;
    struct kv_digest fingerprint; /* Put: of the stream */
    bool has_fingerprint;
    uint64_t number;              /* Put: the stream's, unique */
    char service[64];             /* Watch */
    int told;                     /* Watch: last status sent, -1: none */

    struct call *next_wait;
    bool in_wait;
    struct call *next_free;
    grpc_metadata trailers[TRAILERS_MAX];
    size_t trailer_count;
    grpc_slice end_text;
};

/* Room to take messages apart, one a thread. */
struct workspace {
    struct kv_span pieces[PIECES_MAX];
    uint8_t *scratch, *memory;
    size_t scratch_bytes, memory_bytes;
};

struct lane {
    struct kv_rpc *rpc;
    grpc_completion_queue *queue;
    pthread_t thread;
    bool started;
    struct workspace workspace;
};

enum { LANES_MAX = 64, METHODS_MAX = 24 };

struct kv_rpc {
    const struct kv_config *config;
    struct kv_engine *engine;
    struct kv_standard *standard;
    bool lend; /* the engine takes payloads where gRPC put them */
    grpc_server *server;
    grpc_resource_quota *quota;
    void *registered[METHODS_MAX];
    struct lane lanes[LANES_MAX];
    uint32_t lane_count;
    struct listener *listener;

    struct call *calls; /* the pool */
    uint32_t call_count;

    pthread_mutex_t lock;
    pthread_cond_t changed; /* for the helper */
    pthread_cond_t drained; /* for kv_rpc_drain */
    struct call *free_calls;
    uint32_t live;          /* calls with a client */
    struct { uint32_t method, lane; } *debts; /* that could not be armed for want of a call */
    uint32_t debt_count;
    uint32_t plans;
    uint64_t streams;
    struct call *wait_first, **wait_last;
    bool freed;             /* a request became free, and someone waits */
    bool draining, hurry, shut, closing;
    struct tag shut_tag;

    pthread_t helper;
    bool helper_started;
    struct workspace helper_workspace;
};

uint64_t now_ms(void);

/* server.c */
void server_arm(struct kv_rpc *rpc, uint32_t method, uint32_t lane);
bool server_ready(struct kv_rpc *rpc);

/* call.c: all with the call locked, but for the first two. */
struct call *call_take(struct kv_rpc *rpc); /* NULL: the pool is empty */
void call_prepare(struct call *call, const struct method *method, struct lane *lane,
                  void (*accepted)(struct call *call, bool ok));
void call_unlock(struct call *call, uint32_t refs); /* drops refs, recycles at zero */
void call_begin(struct call *call);                 /* a client came */
void call_read(struct call *call);
void call_send(struct call *call, grpc_byte_buffer *message);
void call_finish(struct call *call, grpc_byte_buffer *last); /* as call->end says */
void call_end(struct call *call, enum kv_status status, const char *text);
void call_end_with(struct call *call, const struct kv_request *request, uint64_t sequence);
uint64_t call_deadline_us(const struct call *call);
size_t call_pieces(grpc_byte_buffer *message, struct kv_span *pieces); /* 0: too many */

/* serve.c */
void call_step(struct call *call, struct workspace *workspace); /* NULL: no decoding here */
struct kv_request *flight_request(struct call *call); /* or NULL, and the call waits for one */
struct flight *flight_take(struct call *call, enum flight_state state, struct kv_request *request);
struct flight *flight_free(struct call *call);
bool call_has_work(const struct call *call); /* in the engine */
void flight_submit(struct flight *flight);

/* pages.c */
void pages_accept(struct call *call, struct workspace *workspace);
void pages_step(struct call *call);
enum verdict pages_done(struct flight *flight, const struct kv_request *request);
void pages_encode(struct flight *flight, const struct kv_request *request, kv_room *room,
                  void *context);
bool pages_drop(struct flight *flight); /* an answer not to be sent after all */
void pages_free(struct call *call);

/* local.c: health and reflection */
void local_step(struct call *call, struct workspace *workspace);

/* helper.c */
enum kv_status helper_open(struct kv_rpc *rpc);
void helper_close(struct kv_rpc *rpc);
void helper_wait(struct call *call);
void helper_unwait(struct call *call);
void helper_freed(void *rpc);
void helper_nudge(struct kv_rpc *rpc);

/* listen.c */
enum kv_status listener_open(struct kv_rpc *rpc, struct listener **out, char *why);
void listener_stop(struct listener *listener); /* nobody new */
void listener_close(struct listener *listener);

#endif
