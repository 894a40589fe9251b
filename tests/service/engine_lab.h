/* SPDX-License-Identifier: Apache-2.0 */
/* engine_lab.h - an engine on a thread of its own, and calls that wait for their answer.
 *
 * A test says what it wants in one line and looks at the request that comes back, which is valid
 * until lab_done().  Everything goes through service/engine.h. */
#ifndef KV_TESTS_SERVICE_ENGINE_LAB_H
#define KV_TESTS_SERVICE_ENGINE_LAB_H

#include <pthread.h>
#include <semaphore.h>

#include "service/engine.h"
#include "service/layout.h"

struct lab_options {
    const char *path;          /* NULL: no disk */
    const char *device;        /* NULL: auto.  "shadow": tests/kernels/shadow.h over that, and so is
                                  every lab's NULL where the environment says KV_LAB_SHADOW=1 */
    size_t device_bytes;       /* the shadow's memory; 0: enough */
    uint64_t gpu_arena_bytes;  /* 0: KV_LAB_GPU_MIB of the environment, or 16 MiB */
    uint32_t gpu_keep_ms;
    uint64_t arena_bytes;      /* 0: 64 MiB */
    uint64_t disk_bytes;       /* 0: 256 MiB */
    uint64_t tail_bytes_max;   /* 0: half of the arena */
    uint32_t message_bytes;    /* 0: 1 MiB */
    uint32_t sessions_max;     /* 0: 64 */
    uint32_t sessions_open_max;/* 0: 16 */
    uint32_t session_idle_ms;
    uint32_t request_count;    /* 0: 64 */
    uint32_t tokens_max;       /* 0: 1 << 20 */
    uint32_t layouts_max;      /* 0: 8 */
    bool expect_failure;       /* of opening */
};

struct lab {
    struct lab_options options;
    bool shadow;
    struct kv_device *device;
    struct kv_store *store;
    struct kv_engine *engine;
    pthread_t thread;
    sem_t opened, closing;
    enum kv_status status;     /* of opening */
    char why[256];
};

void lab_open(struct lab *lab, const struct lab_options *options);
void lab_close(struct lab *lab); /* stops, waits, closes */

/* A directory that is removed with lab_directory_remove(). */
void lab_directory(char path[64]);
void lab_directory_remove(const char *path);

/* A request, with staging.  Never NULL: a lab has enough of them. */
struct kv_request *lab_request(struct lab *lab, enum kv_request_kind kind);
void lab_submit(struct lab *lab, struct kv_request *request); /* does not wait */
void lab_wait(struct kv_request *request);
struct kv_request *lab_call(struct lab *lab, struct kv_request *request); /* both */
void lab_done(struct lab *lab, struct kv_request *request);

/* ---- Whole calls; those without a result must succeed --------------------------------------- */

struct kv_layout lab_layout(const char *preset, uint16_t layers, uint16_t heads, uint16_t heads_q,
                            uint16_t head_dim, enum kv_dtype dtype);
struct kv_digest lab_register(struct lab *lab, const struct kv_layout *layout);
uint64_t lab_open_session(struct lab *lab, const char *name, const struct kv_digest *fingerprint);

/* f32 rows [tokens][heads][head_dim] of one layer; ids may be NULL. */
struct kv_request *lab_append(struct lab *lab, uint64_t session, const struct kv_layout *layout,
                              uint32_t layer, uint64_t expected, uint32_t tokens,
                              const float *keys, const float *values, const uint32_t *ids);
/* rows of q [heads_q][head_dim]; the request's reply is out and lse. */
struct kv_request *lab_attend(struct lab *lab, uint64_t session, const struct kv_layout *layout,
                              uint32_t layer, uint32_t rows, enum kv_mask mask, const float *query);
struct kv_engine_stats lab_stats(struct lab *lab);
enum kv_status lab_commit(struct lab *lab, uint64_t session, enum kv_durability durability);
enum kv_status lab_close_session(struct lab *lab, uint64_t session, bool commit);

/* K and V of tokens [0, length) of a layer as floats, through FETCH: [tokens][heads][head_dim].
 * In between they are of the layout's dtype, or of the one that is named.  KV_OK, or the first
 * failure. */
enum kv_status lab_fetch(struct lab *lab, uint64_t session, const struct kv_layout *layout,
                         uint32_t layer, uint32_t length, float *keys, float *values);
enum kv_status lab_fetch_as(struct lab *lab, uint64_t session, const struct kv_layout *layout,
                            enum kv_dtype dtype, uint32_t layer, uint32_t length, float *keys,
                            float *values);

/* The definition, once more and naive: double precision, one row. */
void lab_reference(const struct kv_layout *layout, const float *query, const float *keys,
                   const float *values, uint32_t visible, float *out, float *lse);

/* Relative L2 distance. */
double lab_distance(const float *a, const float *b, size_t count);

/* Rows like a model's: channels of different sizes.  Deterministic. */
struct lab_random {
    uint64_t state;
};
double lab_uniform(struct lab_random *random);
void lab_rows(struct lab_random *random, float *rows, size_t count, uint32_t head_dim);
uint64_t lab_seed(void); /* KV_TEST_SEED, or of the clock; printed */

/* Elements to and from the wire's dtype. */
void lab_encode(enum kv_dtype dtype, const float *from, void *out, size_t count);
void lab_decode(enum kv_dtype dtype, const void *from, float *out, size_t count);

#endif
