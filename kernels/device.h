/* SPDX-License-Identifier: Apache-2.0 */
/* device.h - memory and order on one compute device.
 *
 * This is the only part of kernels/ that storage/ may see: where bytes can live, and how
 * to know that queued work has passed a point.  Nothing here knows what the bytes mean.
 *
 * A stream runs its work in call order; different streams run beside each other.  A
 * ticket is a position in a stream: take one after queueing work, and the work is done
 * once the ticket is reached.  Tickets are numbers; there is nothing to free.
 *
 * Threads.  One thread uses a device and its streams: the engine thread.
 * Errors.   A device failure is sticky: later work is skipped, tickets are still
 *           reached, and kv_device_status() says so until the process restarts.
 * Bounds.   A stream holds at most KV_STREAM_DEPTH operations that have not been
 *           reached; one more is a bug of the caller, who counts.
 */
#ifndef KV_KERNELS_DEVICE_H
#define KV_KERNELS_DEVICE_H

#include "proto/kv_types.h"

#ifdef __cplusplus
extern "C" {
#endif

struct kv_device;
struct kv_stream;

enum { KV_STREAM_DEPTH = 256 };

enum kv_memory {
    KV_MEMORY_DEVICE, /* where kernels run; on "cuda" the CPU may not dereference it */
    KV_MEMORY_PINNED, /* host memory that the device and O_DIRECT can both reach */
};

struct kv_device_options {
    /* "auto" (the fastest CPU backend this machine has), "scalar", "avx2", "avx512", "amx",
     * "cuda" or "cuda:N". */
    const char *name;
    uint32_t workers; /* CPU backends: threads, 1 .. 256; 0: one per CPU this process may use */
};

/* KV_NOT_FOUND: no such device on this machine.  KV_INVALID: no such name.  KV_BUSY: out of
 * memory or threads.  Close every stream and free every allocation before closing. */
enum kv_status kv_device_open(const struct kv_device_options *options, struct kv_device **out);
void kv_device_close(struct kv_device *device);

/* Whether "cuda" was built in: there was an nvcc.  That says nothing about this machine. */
bool kv_device_knows_cuda(void);

/* Why kv_device_open() said KV_NOT_FOUND to that name, for people; static. */
const char *kv_device_missing(const char *name);

/* [any thread] The backend in use: "scalar", "avx2", "avx512", "amx", "cuda". */
const char *kv_device_name(const struct kv_device *device);

/* True when both kinds of memory are one: a CPU backend.  Copies between them are then
 * never needed. */
bool kv_device_is_host(const struct kv_device *device);

/* Start-up only.  4096-byte aligned, zeroed.  KV_BUSY: out of memory. */
enum kv_status kv_device_alloc(struct kv_device *device, enum kv_memory kind, size_t bytes,
                               void **out);
void kv_device_free(struct kv_device *device, enum kv_memory kind, void *memory, size_t bytes);

enum kv_status kv_stream_open(struct kv_device *device, struct kv_stream **out);
void kv_stream_close(struct kv_stream *stream); /* waits for its work */

/* Queues a copy between any two memories of the device. */
void kv_stream_copy(struct kv_stream *stream, void *target, const void *source, size_t bytes);

/* The same for `rows` runs of `bytes` that begin a pitch apart, which is at least `bytes`. */
struct kv_rows {
    void *memory;
    size_t pitch;
};
struct kv_rows_const {
    const void *memory;
    size_t pitch;
};
void kv_stream_copy_rows(struct kv_stream *stream, struct kv_rows target,
                         struct kv_rows_const source, size_t bytes, uint32_t rows);

/* May short work run inside the call that queues it?  Closed at first.  Open, the caller says that it has
 * nothing better to do than wait: a hand-over to a worker and back is two wake-ups, 25 to 35 us each on a
 * virtual machine, and a decode step over a short context is less than that.  What runs there is bounded: an
 * operation of at most KV_IN_PLACE_NS by estimate, in vector code, on a stream where nothing is queued
 * before it.  All other work goes to the workers as ever, the scalar definition's always; so do a GPU's
 * kernels.  Tickets tell the same either way: one that is reached at once has nothing to wait for. */
enum { KV_IN_PLACE_NS = 50 * 1000 };
void kv_stream_in_place(struct kv_stream *stream, bool open);

/* A ticket for everything queued so far. */
uint64_t kv_stream_mark(struct kv_stream *stream);

/* [any thread] True once the work before the ticket is done and its results are visible to
 * the calling thread. */
bool kv_stream_reached(struct kv_stream *stream, uint64_t ticket);

/* Queues one 8-byte write of 1 to `eventfd`, so that a sleeping engine wakes. */
void kv_stream_notify(struct kv_stream *stream, int eventfd);

/* [any thread] KV_OK, or KV_UNAVAILABLE after a device failure. */
enum kv_status kv_device_status(const struct kv_device *device);

/* [any thread] What that failure was, in the words of whoever found it; static. */
const char *kv_device_failure(const struct kv_device *device);

#ifdef __cplusplus
}
#endif
#endif
