/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_attend.c - attention cut into tasks.
 *
 * An item is cut three ways: by KV head, by rows, so that the query vectors of a task are at
 * most KV_CPU_VECTORS, and, where the context is long, by runs of pages called chunks.
 *
 *     item --> KV head --> block of rows --> chunk of pages     one task of the first phase
 *
 * With one chunk the task writes the result.  With several each leaves its output and
 * log-sum-exp in the stream's partial area, [KV head][chunk][query vector], and a task of
 * the second phase per KV head and block of rows puts them together.
 *
 * How an item is cut depends on that item alone: not on the workers there are nor on what
 * else is in the call, so that the same question has the same answer to the bit.
 */
#include "kernels/cpu_attend.h"

#include <math.h>

#include "kernels/cpu_pool.h"

enum {
    /* Shortest chunk: below it, starting a task, waiting for its first page, which nobody asked for ahead, and
     * joining its part would show. */
    CHUNK_PAGES_MIN = 8,
    /* Most chunks of an item: enough to feed a large machine from one long context. */
    CHUNKS_MAX = 64,
    /* For kv_cpu_estimate(): an element met by a query vector, and how many vectors' time it takes to bring
     * the element in.  Measured with AVX-512 and 1 to 16 vectors: raw pages 18 to 30, packed ones less. */
    MEET_PS = 16,
    BRING_VECTORS = 4,
};

struct item {
    struct kv_attend call; /* its pages and visible point into the arguments */
    uint32_t group;
    uint32_t rows_per_task;
    uint32_t row_blocks;
    uint32_t chunk_pages;
    uint32_t chunks;
    uint32_t first_task[KV_CPU_PHASES]; /* of each phase */
    size_t partial;                     /* first query vector in the partial area */
};

struct attend_call {
    struct kv_shape shape;
    struct kv_page_map map;
    uint32_t count;
    size_t partial_vectors; /* in all: outputs of the area come first, then log-sum-exps */
    struct item items[KV_ITEMS_MAX];
};
static_assert(sizeof(struct attend_call) <= KV_ITEMS_MAX * 256, "the arguments' spare part");

/* Where a task stands. */
struct place {
    const struct item *item;
    uint32_t head;
    uint32_t row; /* first row */
    uint32_t rows;
    uint32_t chunk;
};

/* ---- parts ------------------------------------------------------------------------------ */

static uint32_t item_vectors(const struct item *item) {
    return item->call.rows * item->group;
}

/* The partial area's index of a task's first query vector. */
static size_t partial_index(const struct place *place, uint32_t chunk) {
    const struct item *item = place->item;
    size_t part = (size_t)place->head * item->chunks + chunk;
    return item->partial + part * item_vectors(item) + (size_t)place->row * item->group;
}

static float *partial_out(const struct kv_cpu_op *op, size_t vector) {
    const struct attend_call *call = op->arguments;
    return (float *)op->partial + vector * call->shape.head_dim;
}

static float *partial_lse(const struct kv_cpu_op *op, size_t vector) {
    const struct attend_call *call = op->arguments;
    return (float *)op->partial + call->partial_vectors * call->shape.head_dim + vector;
}

/* The weights of two parts that are merged, and the log-sum-exp of both. */
struct merged {
    float a;
    float b;
    float lse;
};

static struct merged merge_weights(float lse_a, float lse_b) {
    float most = lse_a > lse_b ? lse_a : lse_b;
    if (most == -INFINITY) return (struct merged){.lse = -INFINITY};
    float a = expf(lse_a - most), b = expf(lse_b - most);
    return (struct merged){.a = a / (a + b), .b = b / (a + b), .lse = most + logf(a + b)};
}

/* out_a, lse_a become those of both parts. */
static void merge_vector(float *out_a, float *lse_a, const float *out_b, float lse_b,
                         uint32_t D) {
    struct merged weights = merge_weights(*lse_a, lse_b);
    *lse_a = weights.lse;
    for (uint32_t c = 0; c < D; c++) out_a[c] = weights.a * out_a[c] + weights.b * out_b[c];
}

/* From a task's dense vectors to the caller's [row][query head], over or into what is there. */
static void result_store(const struct place *place, uint32_t D, const float *out,
                         const float *lse) {
    const struct kv_attend *call = &place->item->call;
    uint32_t group = place->item->group;
    for (uint32_t r = 0; r < place->rows; r++) {
        size_t first = (size_t)(place->row + r) * call->heads_q + place->head * group;
        for (uint32_t i = 0; i < group; i++) {
            const float *part = out + (size_t)(r * group + i) * D;
            float *target = call->out + (first + i) * D;
            if (call->merge) {
                merge_vector(target, &call->lse[first + i], part, lse[r * group + i], D);
            } else {
                memcpy(target, part, D * sizeof *target);
                call->lse[first + i] = lse[r * group + i];
            }
        }
    }
}

/* ---- first phase: a head, a block of rows, a chunk ----------------------------------------- */

static const struct item *item_of_task(const struct attend_call *call, uint32_t task,
                                       uint32_t phase) {
    uint32_t i = call->count - 1;
    while (call->items[i].first_task[phase] > task) i--;
    return &call->items[i];
}

static struct place place_find(const struct attend_call *call, uint32_t task, uint32_t phase) {
    const struct item *item = item_of_task(call, task, phase);
    struct place place = {.item = item};
    uint32_t index = task - item->first_task[phase];
    if (phase == 0) {
        place.chunk = index % item->chunks;
        index /= item->chunks;
    }
    place.row = index % item->row_blocks * item->rows_per_task;
    place.head = index / item->row_blocks;
    uint32_t left = item->call.rows - place.row;
    place.rows = left < item->rows_per_task ? left : item->rows_per_task;
    return place;
}

static bool cancelled(const struct item *item) {
    /* Relaxed: it only says that nobody waits for the answer any more. */
    return item->call.cancel != NULL &&
           atomic_load_explicit(item->call.cancel, memory_order_relaxed);
}

/* The task's query vectors, dense, in binary32, times score_scale. */
static void query_gather(const struct place *place, uint32_t D, const struct kv_cpu_isa *isa,
                         float *query) {
    const struct kv_attend *call = &place->item->call;
    uint32_t group = place->item->group;
    for (uint32_t r = 0; r < place->rows; r++) {
        size_t first = ((size_t)(place->row + r) * call->heads_q + place->head * group) * D;
        const uint8_t *source = (const uint8_t *)call->query + first * kv_dtype_bytes(call->dtype);
        isa->widen(source, call->dtype, call->score_scale, query + (size_t)r * group * D,
                   (size_t)group * D);
    }
}

static uint32_t tokens_before(const struct kv_page_ref *pages, uint32_t count) {
    uint32_t tokens = 0;
    for (uint32_t i = 0; i < count; i++) tokens += pages[i].tokens;
    return tokens;
}

static void chunk_run(const struct kv_cpu_op *op, uint32_t task, struct kv_cpu_worker *worker) {
    const struct attend_call *call = op->arguments;
    struct place place = place_find(call, task, 0);
    const struct item *item = place.item;
    if (cancelled(item)) return;

    uint32_t D = call->shape.head_dim, first_page = place.chunk * item->chunk_pages;
    uint32_t pages_left = item->call.page_count - first_page;
    float *out = worker->out[0], *lse = worker->lse;
    if (item->chunks > 1) {
        size_t vector = partial_index(&place, place.chunk);
        out = partial_out(op, vector);
        lse = partial_lse(op, vector);
    }
    query_gather(&place, D, worker->isa, worker->query[0]);
    worker->isa->attend(&(struct kv_cpu_attend){
        .shape = &call->shape,
        .map = &call->map,
        .head = place.head,
        .group = item->group,
        .rows = place.rows,
        .query = worker->query[0],
        .pages = item->call.pages + first_page,
        .page_count = pages_left < item->chunk_pages ? pages_left : item->chunk_pages,
        .token = tokens_before(item->call.pages, first_page),
        .visible = item->call.visible + place.row,
        .out = out,
        .lse = lse,
        .cancel = item->call.cancel,
        .scratch = worker->scratch,
    });
    if (item->chunks == 1) result_store(&place, D, out, lse);
}

/* ---- second phase: the chunks of a head and a block of rows ---------------------------------- */

static void join_run(const struct kv_cpu_op *op, uint32_t task, struct kv_cpu_worker *worker) {
    const struct attend_call *call = op->arguments;
    struct place place = place_find(call, task, 1);
    if (cancelled(place.item)) return;

    uint32_t D = call->shape.head_dim, vectors = place.rows * place.item->group;
    float *out = worker->out[0];
    size_t first = partial_index(&place, 0);
    memcpy(out, partial_out(op, first), (size_t)vectors * D * sizeof *out);
    memcpy(worker->lse, partial_lse(op, first), vectors * sizeof *worker->lse);
    for (uint32_t chunk = 1; chunk < place.item->chunks; chunk++) {
        size_t vector = partial_index(&place, chunk);
        for (uint32_t i = 0; i < vectors; i++)
            merge_vector(out + (size_t)i * D, &worker->lse[i], partial_out(op, vector + i),
                         *partial_lse(op, vector + i), D);
    }
    result_store(&place, D, out, worker->lse);
}

/* ---- cutting and queueing --------------------------------------------------------------------- */

/* Pages of a chunk.  Long enough that the parts of every item of a call together fit the
 * partial area: an item of p pages has less than 2 p / chunk_pages chunks if it has more
 * than one, and a call has at most KV_ATTEND_PAGES_MAX pages. */
static uint32_t chunk_pages(const struct kv_shape *shape, const struct kv_attend *item) {
    uint64_t part_bytes = (uint64_t)item->rows * item->heads_q *
                          ((uint64_t)shape->head_dim + 1) * sizeof(float);
    uint64_t fitting = 2 * KV_ATTEND_PAGES_MAX * part_bytes / KV_CPU_PARTIAL_BYTES + 1;
    uint64_t pages = (item->page_count + CHUNKS_MAX - 1) / CHUNKS_MAX;
    if (pages < CHUNK_PAGES_MIN) pages = CHUNK_PAGES_MIN;
    return (uint32_t)(pages > fitting ? pages : fitting);
}

static void item_cut(const struct kv_shape *shape, struct item *item) {
    const struct kv_attend *call = &item->call;
    item->group = call->heads_q / shape->heads;
    item->rows_per_task = KV_CPU_VECTORS / item->group;
    item->row_blocks = (call->rows + item->rows_per_task - 1) / item->rows_per_task;
    item->chunk_pages = chunk_pages(shape, call);
    item->chunks = (call->page_count + item->chunk_pages - 1) / item->chunk_pages;
    if (item->chunks == 0) item->chunks = 1; /* an empty context has an answer too */
}

/* Elements of the pages times query vectors: less than 2^52 of an item. */
static uint64_t item_work(const struct kv_shape *shape, const struct item *item) {
    uint64_t tokens = tokens_before(item->call.pages, item->call.page_count);
    uint64_t elements = 2 * tokens * shape->heads * shape->head_dim;
    return elements * (item_vectors(item) + BRING_VECTORS);
}

/* Copies the page references and limits behind the call, and points the item at them. */
static void *item_copy_lists(struct item *item, uint8_t *free) {
    struct kv_attend *call = &item->call;
    size_t pages_bytes = call->page_count * sizeof *call->pages;
    size_t visible_bytes = call->rows * sizeof *call->visible;
    if (pages_bytes > 0) memcpy(free, call->pages, pages_bytes);
    call->pages = (const struct kv_page_ref *)free;
    free += pages_bytes;
    memcpy(free, call->visible, visible_bytes);
    call->visible = (const uint32_t *)free;
    /* Limits are 4 bytes each; the next item's references want 8. */
    return free + (visible_bytes + 7) / 8 * 8;
}

static size_t arguments_bytes(uint32_t count, const struct kv_attend *items) {
    size_t bytes = sizeof(struct attend_call);
    for (uint32_t i = 0; i < count; i++)
        bytes += items[i].page_count * sizeof(struct kv_page_ref) +
                 (items[i].rows * sizeof(uint32_t) + 7) / 8 * 8;
    return bytes;
}

void kv_cpu_attend_submit(struct kv_stream *stream, const struct kv_shape *shape, uint32_t count,
                          const struct kv_attend *items) {
    struct attend_call *call = kv_cpu_arguments(stream, arguments_bytes(count, items));
    call->shape = *shape;
    if (shape->codec.kind != KV_CODEC_RAW) call->map = kv_page_map(shape);
    call->count = count;
    call->partial_vectors = 0;

    uint32_t tasks[KV_CPU_PHASES] = {0};
    uint64_t work = 0;
    uint8_t *free = (uint8_t *)(call + 1);
    for (uint32_t i = 0; i < count; i++) {
        struct item *item = &call->items[i];
        item->call = items[i];
        free = item_copy_lists(item, free);
        item_cut(shape, item);
        work += item_work(shape, item);
        for (uint32_t phase = 0; phase < KV_CPU_PHASES; phase++)
            item->first_task[phase] = tasks[phase];
        uint32_t joins = shape->heads * item->row_blocks;
        tasks[0] += joins * item->chunks;
        if (item->chunks == 1) continue;
        tasks[1] += joins;
        item->partial = call->partial_vectors;
        call->partial_vectors += (size_t)shape->heads * item->chunks * item_vectors(item);
    }
    kv_cpu_submit(stream, &(struct kv_cpu_op){
                              .run = {chunk_run, join_run},
                              .tasks = {tasks[0], tasks[1]},
                              .arguments = call,
                              .nanoseconds = kv_cpu_estimate(stream, work, MEET_PS),
                              .notify_fd = -1,
                          });
}
