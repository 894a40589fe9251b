/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_backend.c - the verbs but attend on worker threads, and the CPU backend's table.
 *
 * Each verb is the same three things: a struct with a copy of the arguments, a function
 * that runs one task of it, and a function that cuts the call into tasks and queues it.
 *
 *   copy        pieces of COPY_BYTES; rows: a row
 *   ingest      an item's tokens in slabs of about SLAB_ELEMENTS, keys and values
 *   emit        likewise
 *   quantize    a KV head of an item; a whole page where the codec is RAW
 *   dequantize  likewise
 *   observe     an item
 *
 * Attend is long enough for a file of its own: cpu_attend.c.
 */
#include <float.h>
#include <math.h>

#include "kernels/cpu_attend.h"
#include "kernels/cpu_pool.h"
#include "proto/kv_check.h"

/* Large enough that claiming a task costs nothing beside it.  Slabs are a page of a small model: several
 * workers have the pages of several layers or sessions to share, and to wake all of them for one page
 * took Put from 1.9 to 1.7 GB/s on two cores that had the sockets to serve as well. */
enum { COPY_BYTES = 256 << 10, SLAB_ELEMENTS = 128 << 10 };

/* For kv_cpu_estimate(): of a byte copied, an element brought in or out, an element of a query row, with 512
 * bit vectors.  What quantizes or dequantizes a page is never short. */
enum { COPY_PS = 100, CONVERT_PS = 500, OBSERVE_PS = 500 };

/* ---- copy ------------------------------------------------------------------------- */

struct copy_call {
    uint8_t *target;
    const uint8_t *source;
    size_t bytes;
};

static void copy_run(const struct kv_cpu_op *op, uint32_t task, struct kv_cpu_worker *worker) {
    const struct copy_call *call = op->arguments;
    size_t start = (size_t)task * COPY_BYTES, left = call->bytes - start;
    memcpy(call->target + start, call->source + start, left < COPY_BYTES ? left : COPY_BYTES);
}

static void copy(struct kv_stream *stream, void *target, const void *source, size_t bytes) {
    struct copy_call *call = kv_cpu_arguments(stream, sizeof *call);
    *call = (struct copy_call){.target = target, .source = source, .bytes = bytes};
    kv_cpu_submit(stream, &(struct kv_cpu_op){
                              .run = {copy_run},
                              .tasks = {(uint32_t)((bytes + COPY_BYTES - 1) / COPY_BYTES)},
                              .arguments = call,
                              .nanoseconds = kv_cpu_estimate(stream, bytes, COPY_PS),
                              .notify_fd = -1,
                          });
}

struct copy_rows_call {
    struct kv_rows target;
    struct kv_rows_const source;
    size_t bytes;
};

static void copy_rows_run(const struct kv_cpu_op *op, uint32_t task,
                          struct kv_cpu_worker *worker) {
    const struct copy_rows_call *call = op->arguments;
    memcpy((uint8_t *)call->target.memory + task * call->target.pitch,
           (const uint8_t *)call->source.memory + task * call->source.pitch, call->bytes);
}

static void copy_rows(struct kv_stream *stream, struct kv_rows target, struct kv_rows_const source,
                      size_t bytes, uint32_t rows) {
    struct copy_rows_call *call = kv_cpu_arguments(stream, sizeof *call);
    *call = (struct copy_rows_call){.target = target, .source = source, .bytes = bytes};
    kv_cpu_submit(stream, &(struct kv_cpu_op){
                              .run = {copy_rows_run},
                              .tasks = {rows},
                              .arguments = call,
                              .nanoseconds = kv_cpu_estimate(stream, rows * bytes, COPY_PS),
                              .notify_fd = -1,
                          });
}

/* ---- ingest and emit ---------------------------------------------------------------- */

/* Items cut into slabs of tokens, numbered through. */
struct slabs {
    uint32_t slab_tokens;
    uint32_t first[KV_ITEMS_MAX + 1]; /* first task of each item, and of the one behind */
};

static uint32_t slab_tokens(const struct kv_shape *shape) {
    uint32_t per_token = (uint32_t)shape->heads * shape->head_dim;
    return per_token >= SLAB_ELEMENTS ? 1 : SLAB_ELEMENTS / per_token;
}

static void slabs_add(struct slabs *slabs, uint32_t item, uint32_t tokens) {
    uint32_t count = (tokens + slabs->slab_tokens - 1) / slabs->slab_tokens;
    slabs->first[item + 1] = slabs->first[item] + count;
}

struct slab {
    uint32_t item;
    uint32_t token; /* counted from the item's first */
    uint32_t tokens;
};

static struct slab slab_find(const struct slabs *slabs, uint32_t task) {
    struct slab slab = {0};
    while (slabs->first[slab.item + 1] <= task) slab.item++;
    slab.token = (task - slabs->first[slab.item]) * slabs->slab_tokens;
    return slab;
}

static uint32_t slab_end(const struct slabs *slabs, struct slab slab, uint32_t tokens) {
    uint32_t end = slab.token + slabs->slab_tokens;
    return end < tokens ? end : tokens;
}

/* Where a row of a raw page's keys or values stands, in elements. */
static size_t raw_row(const struct kv_shape *shape, uint32_t head, uint32_t token) {
    return ((size_t)head * KV_BLOCK_TOKENS + token) * shape->head_dim;
}

struct ingest_call {
    struct kv_shape shape;
    uint32_t count;
    struct slabs slabs;
    struct kv_ingest items[KV_ITEMS_MAX];
    _Atomic uint32_t faults[KV_ITEMS_MAX]; /* the smallest found so far, or 0 */
};
static_assert(sizeof(struct ingest_call) <= KV_CPU_ARGUMENT_BYTES, "fits");

/* Several slabs of an item run at once; whoever comes last must leave the smallest. */
static void fault_note(_Atomic uint32_t *fault, size_t found) {
    /* Relaxed: read again only in finish(), which the pool orders behind every task. */
    uint32_t seen = atomic_load_explicit(fault, memory_order_relaxed);
    while (seen == 0 || found < seen)
        if (atomic_compare_exchange_weak_explicit(fault, &seen, (uint32_t)found,
                                                  memory_order_relaxed, memory_order_relaxed))
            return;
}

/* Token-major rows of K or V into a raw page's half.  Returns the index of the first bad
 * element, or the item's number of elements.  Head by head, so that the page, which no cache holds
 * yet, is written from front to back; what is read was written a moment ago. */
static size_t ingest_rows(const struct ingest_call *call, const struct kv_ingest *item,
                          uint32_t token, uint32_t end, const void *source, uint16_t *half,
                          const struct kv_cpu_isa *isa) {
    const struct kv_shape *shape = &call->shape;
    uint32_t D = shape->head_dim, H = shape->heads;
    float limit = shape->codec.kind == KV_CODEC_RAW ? FLT_MAX : 65504.0f;
    size_t first_bad = (size_t)item->tokens * H * D;
    for (uint32_t head = 0; head < H; head++)
        for (uint32_t t = token; t < end; t++) {
            size_t index = ((size_t)t * H + head) * D;
            const uint8_t *row = (const uint8_t *)source + index * kv_dtype_bytes(item->dtype);
            size_t good = isa->convert(row, item->dtype, (enum kv_dtype)shape->dtype, limit,
                                       half + raw_row(shape, head, item->token + t), D);
            if (good == D) continue;
            if (index + good < first_bad) first_bad = index + good;
            break;
        }
    return first_bad;
}

/* Where a walk through an item's pieces stands. */
struct walk {
    uint32_t piece;
    size_t begin; /* of the piece, in the item's bytes */
};

/* `bytes` bytes at `offset` of an item's pieces: where they lie, or put together in `scratch` if they are
 * cut. */
static const void *pieces_at(const struct kv_ingest *item, struct walk *walk, size_t offset,
                             size_t bytes, uint8_t *scratch) {
    const struct kv_span *piece = &item->pieces[walk->piece];
    while (offset >= walk->begin + piece->count) {
        walk->begin += piece->count;
        piece++;
        walk->piece++;
        KV_CHECK(walk->piece < item->piece_count);
    }
    size_t from = offset - walk->begin;
    const uint8_t *whole = piece->bytes + from;
    if (from + bytes <= piece->count) return whole;
    for (size_t done = 0; done < bytes; piece++, from = 0) {
        KV_CHECK(piece < item->pieces + item->piece_count);
        size_t run = piece->count - from < bytes - done ? piece->count - from : bytes - done;
        memcpy(scratch + done, piece->bytes + from, run);
        done += run;
    }
    return scratch;
}

typedef size_t convert_fn(const void *source, enum kv_dtype from, enum kv_dtype to, float limit,
                          uint16_t *target, size_t count);

/* As ingest_rows, for the half of an item's pieces that begins at `start`; token by token, because
 * that is how they are cut. */
static size_t ingest_pieces(const struct kv_shape *shape, const struct kv_ingest *item,
                            uint32_t token, uint32_t end, size_t start, uint16_t *half,
                            convert_fn *convert, void *scratch) {
    uint32_t D = shape->head_dim, H = shape->heads;
    size_t row_bytes = (size_t)H * D * kv_dtype_bytes(item->dtype);
    float limit = shape->codec.kind == KV_CODEC_RAW ? FLT_MAX : 65504.0f;
    struct walk walk = {0};
    for (uint32_t t = token; t < end; t++) {
        const uint8_t *row =
            pieces_at(item, &walk, start + t * row_bytes, row_bytes, scratch);
        for (uint32_t head = 0; head < H; head++) {
            size_t good = convert(
                row + head * (row_bytes / H), item->dtype, (enum kv_dtype)shape->dtype, limit,
                half + raw_row(shape, head, item->token + t), D);
            if (good < D) return ((size_t)t * H + head) * D + good;
        }
    }
    return (size_t)item->tokens * H * D;
}

static void ingest_run(const struct kv_cpu_op *op, uint32_t task, struct kv_cpu_worker *worker) {
    struct ingest_call *call = op->arguments;
    struct slab slab = slab_find(&call->slabs, task);
    const struct kv_ingest *item = &call->items[slab.item];
    uint32_t end = slab_end(&call->slabs, slab, item->tokens);
    size_t elements = (size_t)item->tokens * call->shape.heads * call->shape.head_dim;
    uint16_t *keys = item->page, *values = keys + kv_shape_elements(&call->shape);

    size_t bytes = elements * kv_dtype_bytes(item->dtype);
    size_t good = item->pieces
                      ? ingest_pieces(&call->shape, item, slab.token, end, 0, keys,
                                      worker->isa->convert, worker->scratch)
                      : ingest_rows(call, item, slab.token, end, item->keys, keys, worker->isa);
    if (good < elements) {
        fault_note(&call->faults[slab.item], 1 + good);
        return; /* any fault among the values is a larger one */
    }
    good = item->pieces
               ? ingest_pieces(&call->shape, item, slab.token, end, bytes, values,
                               worker->isa->convert, worker->scratch)
               : ingest_rows(call, item, slab.token, end, item->values, values, worker->isa);
    if (good < elements) fault_note(&call->faults[slab.item], 1 + elements + good);
}

static uint32_t ingest_here(const struct kv_device *device, const struct kv_shape *shape,
                            const struct kv_ingest *item, void *scratch) {
    convert_fn *convert = kv_cpu_device_isa(device)->convert_away;
    size_t elements = (size_t)item->tokens * shape->heads * shape->head_dim;
    size_t bytes = elements * kv_dtype_bytes(item->dtype);
    uint16_t *keys = item->page, *values = keys + kv_shape_elements(shape);
    size_t good = ingest_pieces(shape, item, 0, item->tokens, 0, keys, convert, scratch);
    if (good == elements)
        good += ingest_pieces(shape, item, 0, item->tokens, bytes, values, convert, scratch);
    kv_cpu_away_done();
    return good == 2 * elements ? 0 : (uint32_t)(1 + good);
}

static void ingest_finish(const struct kv_cpu_op *op) {
    struct ingest_call *call = op->arguments;
    for (uint32_t i = 0; i < call->count; i++) {
        uint32_t fault = atomic_load_explicit(&call->faults[i], memory_order_relaxed);
        if (fault != 0) *call->items[i].fault = fault;
    }
}

static void ingest(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                   const struct kv_ingest *items) {
    struct ingest_call *call = kv_cpu_arguments(stream, sizeof *call);
    call->shape = *shape;
    call->count = count;
    memcpy(call->items, items, count * sizeof *items);
    call->slabs.slab_tokens = slab_tokens(shape);
    call->slabs.first[0] = 0;
    uint64_t elements = 0;
    for (uint32_t i = 0; i < count; i++) {
        elements += 2ull * items[i].tokens * shape->heads * shape->head_dim;
        slabs_add(&call->slabs, i, items[i].tokens);
        atomic_init(&call->faults[i], 0);
    }
    kv_cpu_submit(stream, &(struct kv_cpu_op){
                              .run = {ingest_run},
                              .tasks = {call->slabs.first[count]},
                              .finish = ingest_finish,
                              .arguments = call,
                              .nanoseconds = kv_cpu_estimate(stream, elements, CONVERT_PS),
                              .notify_fd = -1,
                          });
}

struct emit_call {
    struct kv_shape shape;
    struct slabs slabs;
    struct kv_emit items[KV_ITEMS_MAX];
};
static_assert(sizeof(struct emit_call) <= KV_CPU_ARGUMENT_BYTES, "fits");

static void emit_rows(const struct kv_shape *shape, const struct kv_emit *item, uint32_t token,
                      uint32_t end, const uint16_t *half, void *target,
                      const struct kv_cpu_isa *isa) {
    uint32_t D = shape->head_dim, H = shape->heads;
    for (; token < end; token++)
        for (uint32_t head = 0; head < H; head++) {
            const uint16_t *row = half + raw_row(shape, head, item->token + token);
            size_t index = ((size_t)token * H + head) * D;
            if (item->dtype == KV_DTYPE_F32)
                isa->widen(row, (enum kv_dtype)shape->dtype, 1.0f, (float *)target + index, D);
            else
                memcpy((uint16_t *)target + index, row, D * sizeof *row);
        }
}

static void emit_run(const struct kv_cpu_op *op, uint32_t task, struct kv_cpu_worker *worker) {
    const struct emit_call *call = op->arguments;
    struct slab slab = slab_find(&call->slabs, task);
    const struct kv_emit *item = &call->items[slab.item];
    uint32_t end = slab_end(&call->slabs, slab, item->tokens);
    const uint16_t *keys = item->page, *values = keys + kv_shape_elements(&call->shape);
    emit_rows(&call->shape, item, slab.token, end, keys, item->keys, worker->isa);
    emit_rows(&call->shape, item, slab.token, end, values, item->values, worker->isa);
}

static void emit(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                 const struct kv_emit *items) {
    struct emit_call *call = kv_cpu_arguments(stream, sizeof *call);
    call->shape = *shape;
    memcpy(call->items, items, count * sizeof *items);
    call->slabs.slab_tokens = slab_tokens(shape);
    call->slabs.first[0] = 0;
    uint64_t elements = 0;
    for (uint32_t i = 0; i < count; i++) {
        elements += 2ull * items[i].tokens * shape->heads * shape->head_dim;
        slabs_add(&call->slabs, i, items[i].tokens);
    }
    kv_cpu_submit(stream, &(struct kv_cpu_op){
                              .run = {emit_run},
                              .tasks = {call->slabs.first[count]},
                              .arguments = call,
                              .nanoseconds = kv_cpu_estimate(stream, elements, CONVERT_PS),
                              .notify_fd = -1,
                          });
}

/* ---- quantize and dequantize ---------------------------------------------------------- */

struct quantize_call {
    struct kv_shape shape;
    struct kv_page_map map;
    struct kv_quantize items[KV_ITEMS_MAX];
};
static_assert(sizeof(struct quantize_call) <= KV_CPU_ARGUMENT_BYTES, "fits");

struct dequantize_call {
    struct kv_shape shape;
    struct kv_page_map map;
    struct kv_dequantize items[KV_ITEMS_MAX];
};
static_assert(sizeof(struct dequantize_call) <= KV_CPU_ARGUMENT_BYTES, "fits");

static bool is_raw(const struct kv_shape *shape) {
    return shape->codec.kind == KV_CODEC_RAW;
}

static uint32_t page_tasks(const struct kv_shape *shape, uint32_t count) {
    return is_raw(shape) ? count : count * shape->heads;
}

static void quantize_run(const struct kv_cpu_op *op, uint32_t task,
                         struct kv_cpu_worker *worker) {
    const struct quantize_call *call = op->arguments;
    const struct kv_shape *shape = &call->shape;
    if (is_raw(shape)) {
        memcpy(call->items[task].packed, call->items[task].raw, kv_shape_bytes_raw(shape));
        return;
    }
    const struct kv_quantize *item = &call->items[task / shape->heads];
    uint32_t head = task % shape->heads;
    const uint16_t *keys = (const uint16_t *)item->raw + raw_row(shape, head, 0);
    const float *energy = item->energy == NULL ? NULL : item->energy + head * shape->head_dim;
    uint8_t *record = (uint8_t *)item->packed + (size_t)head * call->map.record_bytes;
    worker->isa->quantize(shape, &call->map, keys, keys + kv_shape_elements(shape), energy,
                          record, worker->scratch);
}

static void quantize(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                     const struct kv_quantize *items) {
    struct quantize_call *call = kv_cpu_arguments(stream, sizeof *call);
    call->shape = *shape;
    if (!is_raw(shape)) call->map = kv_page_map(shape);
    memcpy(call->items, items, count * sizeof *items);
    kv_cpu_submit(stream, &(struct kv_cpu_op){
                              .run = {quantize_run},
                              .tasks = {page_tasks(shape, count)},
                              .arguments = call,
                              .nanoseconds = UINT64_MAX,
                              .notify_fd = -1,
                          });
}

static void dequantize_run(const struct kv_cpu_op *op, uint32_t task,
                           struct kv_cpu_worker *worker) {
    const struct dequantize_call *call = op->arguments;
    const struct kv_shape *shape = &call->shape;
    if (is_raw(shape)) {
        memcpy(call->items[task].raw, call->items[task].packed, kv_shape_bytes_raw(shape));
        return;
    }
    const struct kv_dequantize *item = &call->items[task / shape->heads];
    uint32_t head = task % shape->heads;
    uint16_t *keys = (uint16_t *)item->raw + raw_row(shape, head, 0);
    const uint8_t *record =
        (const uint8_t *)item->packed + (size_t)head * call->map.record_bytes;
    worker->isa->dequantize(shape, &call->map, record, item->dtype, keys,
                            keys + kv_shape_elements(shape), worker->scratch);
}

static void dequantize(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                       const struct kv_dequantize *items) {
    struct dequantize_call *call = kv_cpu_arguments(stream, sizeof *call);
    call->shape = *shape;
    if (!is_raw(shape)) call->map = kv_page_map(shape);
    memcpy(call->items, items, count * sizeof *items);
    kv_cpu_submit(stream, &(struct kv_cpu_op){
                              .run = {dequantize_run},
                              .tasks = {page_tasks(shape, count)},
                              .arguments = call,
                              .nanoseconds = UINT64_MAX,
                              .notify_fd = -1,
                          });
}

/* ---- observe -------------------------------------------------------------------------- */

struct observe_call {
    struct kv_shape shape;
    struct kv_observe items[KV_ITEMS_MAX];
};
static_assert(sizeof(struct observe_call) <= KV_CPU_ARGUMENT_BYTES, "fits");

enum { ENERGY_ELEMENTS = KV_HEADS_MAX * KV_HEAD_DIM_MAX };
static_assert((ENERGY_ELEMENTS + KV_HEADS_Q_MAX * KV_HEAD_DIM_MAX) * sizeof(float) <=
                  KV_CPU_SCRATCH,
              "the sums of an item and one row of it fit the worker's scratch");

static bool all_finite(const float *row, size_t count) {
    uint32_t others = 0; /* as wide as a float: the compiler makes vectors of it */
    for (size_t i = 0; i < count; i++) others |= fabsf(row[i]) <= FLT_MAX ? 0u : 1u;
    return others == 0;
}

/* Adds q^2 of every query head to the sums of its KV head. */
static void energy_add(float *sums, const float *row, uint32_t heads_q, uint32_t group,
                       uint32_t D) {
    for (uint32_t head = 0; head < heads_q; head++) {
        float *sum = sums + head / group * D;
        const float *q = row + head * D;
        for (uint32_t c = 0; c < D; c++) sum[c] += q[c] * q[c];
    }
}

static void energy_update(const struct kv_observe *item, const float *sums, size_t count,
                          uint32_t rows, uint32_t group) {
    uint32_t seen = *item->rows_seen;
    bool plain = seen == 0 || (uint64_t)seen + rows < 33;
    float keep = plain ? (float)seen / (float)(seen + rows) : powf(0.9f, (float)rows / 32.0f);
    for (size_t i = 0; i < count; i++) {
        float mean = sums[i] / (float)(rows * group);
        float old = seen == 0 ? 0 : item->energy[i];
        float energy = keep * old + (1.0f - keep) * mean;
        item->energy[i] = energy < KV_ENERGY_MAX ? energy : KV_ENERGY_MAX;
    }
    *item->rows_seen = seen > UINT32_MAX - rows ? UINT32_MAX : seen + rows;
}

static void observe_run(const struct kv_cpu_op *op, uint32_t task,
                        struct kv_cpu_worker *worker) {
    const struct observe_call *call = op->arguments;
    const struct kv_observe *item = &call->items[task];
    uint32_t D = call->shape.head_dim, group = item->heads_q / call->shape.heads;
    size_t count = (size_t)call->shape.heads * D, row_elements = (size_t)item->heads_q * D;
    float *sums = worker->scratch, *row = sums + ENERGY_ELEMENTS;

    uint32_t rows = 0;
    memset(sums, 0, count * sizeof *sums);
    for (uint32_t r = 0; r < item->rows; r++) {
        const uint8_t *source =
            (const uint8_t *)item->query + r * row_elements * kv_dtype_bytes(item->dtype);
        worker->isa->widen(source, item->dtype, 1.0f, row, row_elements);
        if (!all_finite(row, row_elements)) continue;
        energy_add(sums, row, item->heads_q, group, D);
        rows++;
    }
    if (rows > 0) energy_update(item, sums, count, rows, group);
}

static void observe(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                    const struct kv_observe *items) {
    struct observe_call *call = kv_cpu_arguments(stream, sizeof *call);
    call->shape = *shape;
    memcpy(call->items, items, count * sizeof *items);
    uint64_t elements = 0;
    for (uint32_t i = 0; i < count; i++)
        elements += (uint64_t)items[i].rows * items[i].heads_q * shape->head_dim;
    kv_cpu_submit(stream, &(struct kv_cpu_op){
                              .run = {observe_run},
                              .tasks = {count},
                              .arguments = call,
                              .nanoseconds = kv_cpu_estimate(stream, elements, OBSERVE_PS),
                              .notify_fd = -1,
                          });
}

/* ---- the table -------------------------------------------------------------------------- */

static void notify(struct kv_stream *stream, int eventfd) {
    kv_cpu_submit(stream, &(struct kv_cpu_op){.notify_fd = eventfd});
}

/* Both kinds of memory are ordinary pages. */
static enum kv_status memory_alloc(struct kv_device *device, enum kv_memory kind, size_t bytes,
                                   void **out) {
    void *memory = kv_cpu_map(bytes);
    if (memory == NULL) return KV_BUSY;
    *out = memory;
    return KV_OK;
}

static void memory_free(struct kv_device *device, enum kv_memory kind, void *memory,
                        size_t bytes) {
    kv_cpu_unmap(memory, bytes);
}

/* A CPU that fails takes the process with it. */
static enum kv_status status(const struct kv_device *device) {
    return KV_OK;
}

static const char *failure(const struct kv_device *device) {
    return "";
}

const struct kv_backend kv_cpu_backend = {
    .is_host = true,
    .open = kv_cpu_open,
    .close = kv_cpu_close,
    .alloc = memory_alloc,
    .free = memory_free,
    .status = status,
    .failure = failure,
    .stream_open = kv_cpu_stream_open,
    .stream_close = kv_cpu_stream_close,
    .copy = copy,
    .copy_rows = copy_rows,
    .mark = kv_cpu_stream_mark,
    .reached = kv_cpu_stream_reached,
    .notify = notify,
    .ingest = ingest,
    .ingest_here = ingest_here,
    .emit = emit,
    .quantize = quantize,
    .dequantize = dequantize,
    .observe = observe,
    .attend = kv_cpu_attend_submit,
};
