/* SPDX-License-Identifier: Apache-2.0 */
/* engine_lab.c - see engine_lab.h. */
#include "tests/service/engine_lab.h"

#include <ftw.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "kernels/device.h"
#include "proto/kv_check.h"
#include "tests/kernels/shadow.h"

/* ---- Opening and closing --------------------------------------------------------------------- */

static enum kv_status open_all(struct lab *lab) {
    const struct lab_options *o = &lab->options;
    const char *name = o->device && !lab->shadow ? o->device : "auto";
    const struct shadow_options shadow = {.inner = {.name = name, .workers = 2},
                                          .device_bytes = o->device_bytes};
    enum kv_status status = lab->shadow ? shadow_open(&shadow, &lab->device)
                                        : kv_device_open(&shadow.inner, &lab->device);
    if (status != KV_OK) return status;
    const struct kv_store_options store = {
        .device = lab->device,
        .arena_bytes = o->arena_bytes,
        .blocks_max = 1 << 14,
        .path = o->path,
        .disk_bytes = o->disk_bytes,
        .segment_bytes = 4 << 20,
        .io_depth = 32,
    };
    status = kv_store_open(&store, &lab->store, lab->why, sizeof lab->why);
    if (status != KV_OK) return status;
    const struct kv_engine_options engine = {
        .device = lab->device,
        .store = lab->store,
        .gpu_arena_bytes = o->gpu_arena_bytes,
        .gpu_keep_ms = o->gpu_keep_ms,
        .arena_bytes = o->arena_bytes,
        .disk_bytes = o->disk_bytes,
        .blocks_max = store.blocks_max,
        .request_count = o->request_count,
        .staging_count = o->request_count,
        .message_bytes_max = o->message_bytes,
        .layouts_max = o->layouts_max,
        .sessions_max = o->sessions_max,
        .sessions_open_max = o->sessions_open_max,
        .session_tokens_max = o->tokens_max,
        .tail_bytes_max = o->tail_bytes_max,
        .session_idle_ms = o->session_idle_ms,
        .deadline_ms_max = 20000,
    };
    return kv_engine_open(&engine, &lab->engine, lab->why, sizeof lab->why);
}

static void *engine_thread(void *argument) {
    struct lab *lab = argument;
    lab->status = open_all(lab);
    bool open = lab->status == KV_OK;
    sem_post(&lab->opened);
    if (open) kv_engine_run(lab->engine);
    sem_wait(&lab->closing); /* other threads may still ask an engine that has stopped */
    if (lab->engine) kv_engine_close(lab->engine);
    if (lab->store) kv_store_close(lab->store);
    if (lab->device) kv_device_close(lab->device);
    return NULL;
}

#define DEFAULT(field, value) \
    if (!lab->options.field) lab->options.field = (value)

void lab_open(struct lab *lab, const struct lab_options *options) {
    memset(lab, 0, sizeof *lab);
    if (options) lab->options = *options;
    DEFAULT(arena_bytes, 64 << 20);
    const char *shadow = getenv("KV_LAB_SHADOW"), *mib = getenv("KV_LAB_GPU_MIB");
    lab->shadow = lab->options.device ? strcmp(lab->options.device, "shadow") == 0 : shadow != NULL;
    DEFAULT(gpu_arena_bytes, (mib ? strtoull(mib, NULL, 10) : 16) << 20);
    DEFAULT(disk_bytes, 256 << 20);
    DEFAULT(tail_bytes_max, lab->options.arena_bytes / 2);
    DEFAULT(message_bytes, 1 << 20);
    DEFAULT(sessions_max, 64);
    DEFAULT(sessions_open_max, 16);
    DEFAULT(request_count, 64);
    DEFAULT(tokens_max, 1 << 20);
    DEFAULT(layouts_max, 8);
    sem_init(&lab->opened, 0, 0);
    sem_init(&lab->closing, 0, 0);
    KV_CHECK(pthread_create(&lab->thread, NULL, engine_thread, lab) == 0);
    sem_wait(&lab->opened);
    if (lab->status == KV_OK || lab->options.expect_failure) return;
    fprintf(stderr, "the lab does not open: %d, %s\n", lab->status, lab->why);
    abort();
}

void lab_close(struct lab *lab) {
    if (lab->status == KV_OK) kv_engine_stop(lab->engine);
    sem_post(&lab->closing);
    pthread_join(lab->thread, NULL);
    sem_destroy(&lab->opened);
    sem_destroy(&lab->closing);
}

void lab_directory(char path[64]) {
    const char *base = getenv("TEST_TMPDIR");
    snprintf(path, 64, "%s/kv-engine-XXXXXX", base && strlen(base) < 40 ? base : "/tmp");
    KV_CHECK(mkdtemp(path) != NULL);
}

static int remove_one(const char *path, const struct stat *info, int flag, struct FTW *ftw) {
    return remove(path);
}

void lab_directory_remove(const char *path) {
    nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* ---- Requests ------------------------------------------------------------------------------------ */

static void on_done(struct kv_request *request) {
    sem_post(request->owner);
}

struct kv_request *lab_request(struct lab *lab, enum kv_request_kind kind) {
    struct kv_request *request = kv_engine_acquire(lab->engine, true);
    KV_CHECK(request != NULL);
    sem_t *done = malloc(sizeof *done);
    sem_init(done, 0, 0);
    request->kind = kind;
    request->owner = done;
    request->on_done = on_done;
    return request;
}

void lab_submit(struct lab *lab, struct kv_request *request) {
    kv_engine_submit(lab->engine, request);
}

void lab_wait(struct kv_request *request) {
    struct timespec limit;
    clock_gettime(CLOCK_REALTIME, &limit);
    limit.tv_sec += 60;
    if (sem_timedwait(request->owner, &limit) == 0) return;
    fprintf(stderr, "a request of kind %d is not answered\n", request->kind);
    abort();
}

struct kv_request *lab_call(struct lab *lab, struct kv_request *request) {
    lab_submit(lab, request);
    lab_wait(request);
    return request;
}

void lab_done(struct lab *lab, struct kv_request *request) {
    sem_destroy(request->owner);
    free(request->owner);
    kv_engine_release(lab->engine, request);
}

static void must(const struct kv_request *request) {
    if (request->status == KV_OK) return;
    fprintf(stderr, "request of kind %d: %d %s: %s\n", request->kind, request->status,
            request->field, request->message);
    abort();
}

/* ---- Whole calls ------------------------------------------------------------------------------------ */

struct kv_layout lab_layout(const char *preset, uint16_t layers, uint16_t heads, uint16_t heads_q,
                            uint16_t head_dim, enum kv_dtype dtype) {
    struct kv_preset found;
    KV_CHECK(kv_preset_find(preset, &found) == KV_OK);
    return (struct kv_layout){
        .layers = layers,
        .heads = heads,
        .heads_q = heads_q,
        .head_dim = head_dim,
        .block_tokens = KV_BLOCK_TOKENS,
        .window_tokens = found.window_tokens,
        .sink_blocks = found.sink_blocks,
        .dtype = dtype,
        .score_scale = 1.0f / sqrtf(head_dim),
        .codec = found.codec,
    };
}

struct kv_digest lab_register(struct lab *lab, const struct kv_layout *layout) {
    struct kv_request *request = lab_request(lab, KV_REQUEST_REGISTER);
    request->reg.layout = *layout;
    strcpy(request->reg.model, "lab");
    must(lab_call(lab, request));
    struct kv_digest fingerprint = request->reg.info.fingerprint;
    lab_done(lab, request);
    return fingerprint;
}

uint64_t lab_open_session(struct lab *lab, const char *name,
                          const struct kv_digest *fingerprint) {
    struct kv_request *request = lab_request(lab, KV_REQUEST_OPEN);
    strcpy(request->open.name, name);
    request->open.fingerprint = *fingerprint;
    must(lab_call(lab, request));
    uint64_t session = request->open.session;
    lab_done(lab, request);
    return session;
}

struct kv_request *lab_append(struct lab *lab, uint64_t session, const struct kv_layout *layout,
                              uint32_t layer, uint64_t expected, uint32_t tokens,
                              const float *keys, const float *values, const uint32_t *ids) {
    struct kv_request *request = lab_request(lab, KV_REQUEST_APPEND);
    size_t count = (size_t)tokens * layout->heads * layout->head_dim;
    size_t bytes = count * kv_dtype_bytes(layout->dtype);
    request->append.session = session;
    request->append.layer = layer;
    request->append.expected_length = expected;
    request->append.tokens = tokens;
    KV_CHECK(2 * bytes + 4096 + tokens * 4 <= request->staging_bytes);
    lab_encode(layout->dtype, keys, request->staging, count);
    lab_encode(layout->dtype, values, request->staging + bytes, count);
    request->bytes_in = 2 * bytes;
    if (ids) {
        request->append.has_token_ids = true;
        request->append.token_ids_offset = (2 * bytes + 63) / 64 * 64;
        memcpy(request->staging + request->append.token_ids_offset, ids, tokens * sizeof ids[0]);
    }
    return lab_call(lab, request);
}

struct kv_request *lab_attend(struct lab *lab, uint64_t session, const struct kv_layout *layout,
                              uint32_t layer, uint32_t rows, enum kv_mask mask,
                              const float *query) {
    struct kv_request *request = lab_request(lab, KV_REQUEST_ATTEND);
    size_t count = (size_t)rows * layout->heads_q * layout->head_dim;
    request->attend.layer = layer;
    request->attend.item_count = 1;
    request->attend.items[0] =
        (struct kv_attend_item){.session = session, .rows = rows, .mask = mask, .no_energy = true};
    lab_encode(layout->dtype, query, request->staging, count);
    request->bytes_in = count * kv_dtype_bytes(layout->dtype);
    return lab_call(lab, request);
}

struct kv_engine_stats lab_stats(struct lab *lab) {
    struct kv_request *request = lab_request(lab, KV_REQUEST_STATS);
    must(lab_call(lab, request));
    struct kv_engine_stats stats = request->stats;
    lab_done(lab, request);
    return stats;
}

static enum kv_status commit_call(struct lab *lab, enum kv_request_kind kind, uint64_t session,
                                  bool commit, enum kv_durability durability) {
    struct kv_request *request = lab_request(lab, kind);
    request->commit.session = session;
    request->commit.commit = commit;
    request->commit.durability = durability;
    enum kv_status status = lab_call(lab, request)->status;
    lab_done(lab, request);
    return status;
}

enum kv_status lab_commit(struct lab *lab, uint64_t session, enum kv_durability durability) {
    return commit_call(lab, KV_REQUEST_COMMIT, session, false, durability);
}

enum kv_status lab_close_session(struct lab *lab, uint64_t session, bool commit) {
    return commit_call(lab, KV_REQUEST_CLOSE, session, commit, KV_WRITTEN);
}

enum kv_status lab_fetch(struct lab *lab, uint64_t session, const struct kv_layout *layout,
                         uint32_t layer, uint32_t length, float *keys, float *values) {
    return lab_fetch_as(lab, session, layout, layout->dtype, layer, length, keys, values);
}

enum kv_status lab_fetch_as(struct lab *lab, uint64_t session, const struct kv_layout *layout,
                            enum kv_dtype dtype, uint32_t layer, uint32_t length, float *keys,
                            float *values) {
    size_t row = (size_t)layout->heads * layout->head_dim;
    for (uint32_t begin = 0; begin < length; begin += KV_BLOCK_TOKENS) {
        uint32_t tokens = length - begin < KV_BLOCK_TOKENS ? length - begin : KV_BLOCK_TOKENS;
        struct kv_request *request = lab_request(lab, KV_REQUEST_FETCH);
        request->fetch.session = session;
        request->fetch.layer = layer;
        request->fetch.begin = begin;
        request->fetch.tokens = tokens;
        request->fetch.dtype = dtype;
        enum kv_status status = lab_call(lab, request)->status;
        if (status == KV_OK) {
            const uint8_t *reply = request->staging + request->reply_offset;
            KV_CHECK(request->reply_bytes ==
                     2 * tokens * row * kv_dtype_bytes(dtype));
            lab_decode(dtype, reply, keys + begin * row, tokens * row);
            lab_decode(dtype, reply + request->reply_bytes / 2, values + begin * row,
                       tokens * row);
        }
        lab_done(lab, request);
        if (status != KV_OK) return status;
    }
    return KV_OK;
}

/* ---- Arithmetic -------------------------------------------------------------------------------------- */

void lab_reference(const struct kv_layout *layout, const float *query, const float *keys,
                   const float *values, uint32_t visible, float *out, float *lse) {
    uint32_t D = layout->head_dim, group = layout->heads_q / layout->heads;
    double *scores = malloc((visible + 1) * sizeof scores[0]);
    for (uint32_t h = 0; h < layout->heads_q; h++) {
        const float *q = query + h * D;
        double most = -INFINITY, sum = 0;
        for (uint32_t t = 0; t < visible; t++) {
            const float *k = keys + ((size_t)t * layout->heads + h / group) * D;
            double score = 0;
            for (uint32_t c = 0; c < D; c++) score += (double)q[c] * k[c];
            scores[t] = score * layout->score_scale;
            if (scores[t] > most) most = scores[t];
        }
        for (uint32_t t = 0; t < visible; t++) sum += exp(scores[t] - most);
        lse[h] = visible ? (float)(most + log(sum)) : -INFINITY;
        for (uint32_t c = 0; c < D; c++) {
            double value = 0;
            for (uint32_t t = 0; t < visible; t++)
                value += exp(scores[t] - most) *
                         values[((size_t)t * layout->heads + h / group) * D + c];
            out[h * D + c] = visible ? (float)(value / sum) : 0;
        }
    }
    free(scores);
}

double lab_distance(const float *a, const float *b, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

double lab_uniform(struct lab_random *random) {
    random->state += 0x9e3779b97f4a7c15ull; /* splitmix64 */
    uint64_t z = random->state;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return (double)((z ^ z >> 31) >> 11) / 9007199254740992.0;
}

void lab_rows(struct lab_random *random, float *rows, size_t count, uint32_t head_dim) {
    for (size_t i = 0; i < count; i++) {
        double size = 0.3 + 2.0 * (i % head_dim % 7 == 3);
        rows[i] = (float)(size * (lab_uniform(random) + lab_uniform(random) - 1));
    }
}

uint64_t lab_seed(void) {
    const char *given = getenv("KV_TEST_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 0) : (uint64_t)time(NULL) ^ (uint64_t)getpid();
    printf("KV_TEST_SEED=%llu\n", (unsigned long long)seed);
    return seed;
}

void lab_encode(enum kv_dtype dtype, const float *from, void *out, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (dtype == KV_DTYPE_F32) ((float *)out)[i] = from[i];
        else if (dtype == KV_DTYPE_F16) ((_Float16 *)out)[i] = (_Float16)from[i];
        else {
            uint32_t bits;
            memcpy(&bits, &from[i], 4);
            ((uint16_t *)out)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
        }
    }
}

void lab_decode(enum kv_dtype dtype, const void *from, float *out, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (dtype == KV_DTYPE_F32) out[i] = ((const float *)from)[i];
        else if (dtype == KV_DTYPE_F16) out[i] = (float)((const _Float16 *)from)[i];
        else {
            uint32_t bits = (uint32_t)((const uint16_t *)from)[i] << 16;
            memcpy(&out[i], &bits, 4);
        }
    }
}
