/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_pool.h - worker threads and in-order streams of the CPU backend.  Private to kernels/.
 *
 * A stream is a ring of operations.  The one at the front is *active*: it is cut into tasks
 * that workers claim one by one, in any order and beside each other; when the last task is
 * finished its worker makes the next operation active.  Streams run beside each other: a
 * worker goes from stream to stream, a task at a time.
 *
 *     engine thread  --submit-->  [op][op][op]  --claim-->  workers  --reached-->  ticket
 *
 * An operation has up to two phases, the second one starting when every task of the first
 * is finished: attention over chunks of context, and then putting the chunks together.
 *
 * In place.  An operation that is short by its estimate runs inside kv_cpu_submit() where the stream's owner
 * allowed that (device.h) and the stream is idle: no other thread ever sees it.
 *
 * Memory.  A worker owns a struct kv_cpu_worker, and the thread that submits has one too; a stream owns the arguments of its
 * operations and one area for partial results, lent to the active operation.  All of it is
 * reserved by open and touched when first used.
 */
#ifndef KV_KERNELS_CPU_POOL_H
#define KV_KERNELS_CPU_POOL_H

#include "kernels/backend.h"
#include "kernels/cpu.h"

enum {
    KV_CPU_WORKERS_MAX = 256,
    KV_CPU_STREAMS_MAX = 64,
    KV_CPU_PHASES = 2,

    /* Query vectors of one task: their outputs (128 KiB at 128 channels) stay in the second
     * level cache while pages stream by.  At least KV_GROUP_HEADS_MAX. */
    KV_CPU_VECTORS = 256,

    /* Arguments of one operation: the largest attend call with its page references and
     * limits, and some to spare. */
    KV_CPU_ARGUMENT_BYTES = KV_ITEMS_MAX * 256 +
                            KV_ATTEND_PAGES_MAX * sizeof(struct kv_page_ref) +
                            KV_ITEMS_MAX * KV_ROWS_MAX * sizeof(uint32_t),
    KV_CPU_PARTIAL_BYTES = 32 << 20,
};

struct kv_cpu_worker {
    const struct kv_cpu_isa *isa;
    void *scratch;                                /* KV_CPU_SCRATCH bytes, for the isa's calls */
    float (*query)[KV_HEAD_DIM_MAX];              /* KV_CPU_VECTORS of them, used densely */
    float (*out)[KV_HEAD_DIM_MAX];                /* likewise */
    float *lse;                                   /* KV_CPU_VECTORS */
};

struct kv_cpu_op {
    /* Runs one task of a phase; a phase of 0 tasks is skipped. */
    void (*run[KV_CPU_PHASES])(const struct kv_cpu_op *op, uint32_t task,
                               struct kv_cpu_worker *worker);
    uint32_t tasks[KV_CPU_PHASES];
    /* Once, after the last task and before the ticket is reached; may be NULL. */
    void (*finish)(const struct kv_cpu_op *op);
    void *arguments; /* from kv_cpu_arguments(), or NULL */
    uint64_t nanoseconds; /* in all, on one thread, by estimate; UINT64_MAX: not for the calling thread */
    void *partial;   /* KV_CPU_PARTIAL_BYTES; set by kv_cpu_submit() */
    int notify_fd;   /* written when the ticket has been reached; -1: nobody asked */
};

/* How long `count` steps of `each` picoseconds at 16 numbers an instruction take the device's instruction
 * set, in nanoseconds; UINT64_MAX where that is scalar.  Right within a factor of two: it only decides who
 * runs the operation. */
uint64_t kv_cpu_estimate(const struct kv_stream *stream, uint64_t count, uint32_t each);

/* Memory for the arguments of the next submitted operation, 64-byte aligned, at most
 * KV_CPU_ARGUMENT_BYTES.  It is the operation's until it is reached. */
void *kv_cpu_arguments(struct kv_stream *stream, size_t bytes);

/* Queues a copy of *op. */
void kv_cpu_submit(struct kv_stream *stream, const struct kv_cpu_op *op);

/* The pool's half of kv_cpu_backend. */
enum kv_status kv_cpu_open(const struct kv_device_options *options, struct kv_device **out);
void kv_cpu_close(struct kv_device *device);
const struct kv_cpu_isa *kv_cpu_device_isa(const struct kv_device *device);
enum kv_status kv_cpu_stream_open(struct kv_device *device, struct kv_stream **out);
void kv_cpu_stream_close(struct kv_stream *stream);
uint64_t kv_cpu_stream_mark(struct kv_stream *stream);
bool kv_cpu_stream_reached(struct kv_stream *stream, uint64_t ticket);

/* Zeroed, 4096-byte aligned, resident when touched; NULL: out of memory. */
void *kv_cpu_map(size_t bytes);
void kv_cpu_unmap(void *memory, size_t bytes);

#endif
