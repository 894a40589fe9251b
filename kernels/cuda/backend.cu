/* SPDX-License-Identifier: Apache-2.0 */
/* backend.cu - device, memory, streams, tickets and notifications on CUDA.
 *
 * A ticket is an event.  Events rather than a counter that the device writes: an event of a
 * failed context answers with the failure, so a ticket is reached whatever happens.
 *
 * A notification is a thread's work: each stream has a watcher that sleeps until there is
 * one, spins on its event for as long as a decode step takes, and then blocks on it.
 * cudaLaunchHostFunc() would hold the stream up until its function has run, and does not
 * run it at all after a failure.
 */
#include "kernels/cuda/cuda.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "kernels/cuda/attend.h"
#include "proto/kv_check.h"

enum { ALIGNMENT = 4096, SPIN_US = 300, CAPABILITY_MIN = 80 };

/* One allocation: the CUDA allocators promise 256 bytes of alignment, device.h a page. */
struct cuda_memory {
    struct cuda_memory *next;
    void *aligned;
    void *base;
};

bool cuda_ok(struct cuda_device *device, cudaError_t error) {
    if (error == cudaSuccess) return true;
    int none = cudaSuccess; /* the first is the cause, what follows its consequence */
    device->failure.compare_exchange_strong(none, error, std::memory_order_relaxed);
    device->failed.store(true, std::memory_order_relaxed);
    return false;
}

/* ---- device ------------------------------------------------------------------------ */

/* "cuda" is device 0. */
static enum kv_status parse_ordinal(const char *name, int *out) {
    *out = 0;
    if (strcmp(name, "cuda") == 0) return KV_OK;
    if (strncmp(name, "cuda:", 5) != 0 || name[5] < '0' || name[5] > '9') return KV_INVALID;
    char *end;
    errno = 0;
    long ordinal = strtol(name + 5, &end, 10);
    if (*end != '\0' || errno != 0 || ordinal > 1023) return KV_INVALID;
    *out = (int)ordinal;
    return KV_OK;
}

static enum kv_status device_open(const struct kv_device_options *options, struct kv_device **out) {
    int ordinal, count = 0;
    enum kv_status status = parse_ordinal(options->name, &ordinal);
    if (status != KV_OK) return status;
    if (cudaGetDeviceCount(&count) != cudaSuccess || ordinal >= count) return KV_NOT_FOUND;

    int major, minor, processors, shared_max;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, ordinal) != cudaSuccess ||
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, ordinal) != cudaSuccess ||
        cudaDeviceGetAttribute(&shared_max, cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal) !=
            cudaSuccess ||
        10 * major + minor < CAPABILITY_MIN || cudaSetDevice(ordinal) != cudaSuccess)
        return KV_NOT_FOUND;

    struct cuda_device *device = (struct cuda_device *)calloc(1, sizeof *device);
    if (device == NULL) return KV_BUSY;
    snprintf(device->name, sizeof device->name, "cuda");
    device->base.backend = &kv_cuda_backend;
    device->base.name = device->name;
    device->ordinal = ordinal;
    device->processors = (uint32_t)processors;
    device->shared_max = (uint32_t)shared_max;
    device->overlaps = major >= 9;
    pthread_mutex_init(&device->lock, NULL);
    status = cuda_attend_open(device);
    if (status == KV_OK) status = cuda_quantize_open();
    if (status == KV_OK) status = cuda_dequantize_open();
    if (status != KV_OK) {
        free(device);
        return status;
    }
    *out = &device->base;
    return KV_OK;
}

static void device_close(struct kv_device *base) {
    struct cuda_device *device = (struct cuda_device *)base;
    KV_CHECK(device->memory == NULL);
    pthread_mutex_destroy(&device->lock);
    free(device);
}

static enum kv_status device_status(const struct kv_device *base) {
    const struct cuda_device *device = (const struct cuda_device *)base;
    return device->failed.load(std::memory_order_relaxed) ? KV_UNAVAILABLE : KV_OK;
}

static const char *device_failure(const struct kv_device *base) {
    const struct cuda_device *device = (const struct cuda_device *)base;
    return cudaGetErrorString((cudaError_t)device->failure.load(std::memory_order_relaxed));
}

/* ---- memory ------------------------------------------------------------------------- */

static enum kv_status memory_alloc(struct kv_device *base, enum kv_memory kind, size_t bytes,
                                   void **out) {
    struct cuda_device *device = (struct cuda_device *)base;
    struct cuda_memory *memory = (struct cuda_memory *)calloc(1, sizeof *memory);
    if (memory == NULL) return KV_BUSY;
    cudaError_t error = kind == KV_MEMORY_DEVICE
                            ? cudaMalloc(&memory->base, bytes + ALIGNMENT)
                            : cudaHostAlloc(&memory->base, bytes + ALIGNMENT, cudaHostAllocPortable);
    if (error != cudaSuccess) {
        cudaGetLastError(); /* out of memory is an answer, not a failure of the device */
        free(memory);
        return KV_BUSY;
    }
    memory->aligned = (void *)(((uintptr_t)memory->base + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
    if (kind == KV_MEMORY_DEVICE)
        cuda_ok(device, cudaMemset(memory->aligned, 0, bytes)) &&
            cuda_ok(device, cudaDeviceSynchronize());
    else
        memset(memory->aligned, 0, bytes);
    pthread_mutex_lock(&device->lock);
    memory->next = device->memory;
    device->memory = memory;
    pthread_mutex_unlock(&device->lock);
    *out = memory->aligned;
    return KV_OK;
}

static void memory_free(struct kv_device *base, enum kv_memory kind, void *aligned, size_t bytes) {
    struct cuda_device *device = (struct cuda_device *)base;
    pthread_mutex_lock(&device->lock);
    struct cuda_memory **link = &device->memory;
    while (*link != NULL && (*link)->aligned != aligned) link = &(*link)->next;
    struct cuda_memory *memory = *link;
    KV_CHECK(memory != NULL);
    *link = memory->next;
    pthread_mutex_unlock(&device->lock);
    if (kind == KV_MEMORY_DEVICE)
        cudaFree(memory->base);
    else
        cudaFreeHost(memory->base);
    free(memory);
}

/* ---- streams ------------------------------------------------------------------------- */

static struct cuda_stream *stream_of(struct kv_stream *base) {
    return (struct cuda_stream *)base;
}

static bool reached(struct kv_stream *base, uint64_t ticket) {
    struct cuda_stream *stream = stream_of(base);
    /* Acquire pairs with the release below: who sees the ticket sees the results too. */
    if (stream->reached.load(std::memory_order_acquire) >= ticket) return true;
    if (stream->device->failed.load(std::memory_order_relaxed)) return true;
    /* The event may have been recorded again for a later ticket: then the answer is late,
     * never early. */
    cudaError_t error = cudaEventQuery(stream->events[ticket % TICKETS]);
    if (error == cudaErrorNotReady) return false;
    if (!cuda_ok(stream->device, error)) return true;
    uint64_t seen = stream->reached.load(std::memory_order_relaxed);
    while (seen < ticket &&
           !stream->reached.compare_exchange_weak(seen, ticket, std::memory_order_release,
                                                  std::memory_order_relaxed)) {
    }
    return true;
}

static uint64_t mark(struct kv_stream *base) {
    struct cuda_stream *stream = stream_of(base);
    uint64_t ticket = ++stream->tickets;
    cuda_ok(stream->device, cudaEventRecord(stream->events[ticket % TICKETS], stream->queue));
    return ticket;
}

static uint64_t now_us(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000 + (uint64_t)time.tv_nsec / 1000;
}

static void wait_ticket(struct cuda_stream *stream, uint64_t ticket) {
    uint64_t until = now_us() + SPIN_US;
    while (!reached(&stream->base, ticket) && now_us() < until) __builtin_ia32_pause();
    if (!reached(&stream->base, ticket))
        cuda_ok(stream->device, cudaEventSynchronize(stream->events[ticket % TICKETS]));
}

static void wake(int eventfd) {
    uint64_t one = 1;
    while (write(eventfd, &one, sizeof one) < 0 && errno == EINTR) {
    }
}

static void *watch(void *argument) {
    struct cuda_stream *stream = (struct cuda_stream *)argument;
    cudaSetDevice(stream->device->ordinal);
    pthread_mutex_lock(&stream->lock);
    for (;;) {
        while (stream->notice_count == 0 && !stream->closing)
            pthread_cond_wait(&stream->changed, &stream->lock);
        if (stream->notice_count == 0) break;
        struct cuda_notice notice = stream->notices[stream->notice_first];
        pthread_mutex_unlock(&stream->lock);
        wait_ticket(stream, notice.ticket);
        wake(notice.eventfd);
        pthread_mutex_lock(&stream->lock);
        stream->notice_first = (stream->notice_first + 1) % TICKETS;
        stream->notice_count--;
    }
    pthread_mutex_unlock(&stream->lock);
    return NULL;
}

static void notify(struct kv_stream *base, int eventfd) {
    struct cuda_stream *stream = stream_of(base);
    struct cuda_notice notice = {.ticket = mark(base), .eventfd = eventfd};
    pthread_mutex_lock(&stream->lock);
    KV_CHECK(stream->notice_count < TICKETS);
    stream->notices[(stream->notice_first + stream->notice_count++) % TICKETS] = notice;
    pthread_cond_signal(&stream->changed);
    pthread_mutex_unlock(&stream->lock);
}

static void copy(struct kv_stream *base, void *target, const void *source, size_t bytes) {
    struct cuda_stream *stream = stream_of(base);
    if (bytes > 0)
        cuda_ok(stream->device, cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, stream->queue));
}

static void copy_rows(struct kv_stream *base, struct kv_rows target, struct kv_rows_const source,
                      size_t bytes, uint32_t rows) {
    struct cuda_stream *stream = stream_of(base);
    cuda_ok(stream->device, cudaMemcpy2DAsync(target.memory, target.pitch, source.memory, source.pitch,
                                              bytes, rows, cudaMemcpyDefault, stream->queue));
}

struct cuda_upload cuda_upload_reserve(struct cuda_stream *stream, size_t bytes) {
    KV_CHECK(bytes <= UPLOAD_SEGMENT_BYTES);
    if (stream->upload_used + bytes > UPLOAD_SEGMENT_BYTES) {
        cuda_ok(stream->device,
                cudaEventRecord(stream->upload_done[stream->upload_segment], stream->queue));
        stream->upload_segment = (stream->upload_segment + 1) % UPLOAD_SEGMENTS;
        stream->upload_used = 0;
        /* Three segments of copies ago: done, unless the device is that far behind. */
        cuda_ok(stream->device, cudaEventSynchronize(stream->upload_done[stream->upload_segment]));
    }
    size_t at = (size_t)stream->upload_segment * UPLOAD_SEGMENT_BYTES + stream->upload_used;
    stream->upload_used += (bytes + 255) & ~(size_t)255;
    return (struct cuda_upload){stream->upload_host + at, stream->upload_device + at};
}

void cuda_upload_send(struct cuda_stream *stream, struct cuda_upload upload, size_t bytes) {
    cuda_ok(stream->device, cudaMemcpyAsync(upload.device, upload.host, bytes,
                                            cudaMemcpyHostToDevice, stream->queue));
}

static void stream_close(struct kv_stream *base) {
    struct cuda_stream *stream = stream_of(base);
    if (stream->queue != NULL) cuda_ok(stream->device, cudaStreamSynchronize(stream->queue));
    if (stream->watcher != 0) {
        pthread_mutex_lock(&stream->lock);
        stream->closing = true;
        pthread_cond_signal(&stream->changed);
        pthread_mutex_unlock(&stream->lock);
        pthread_join(stream->watcher, NULL);
    }
    for (uint32_t i = 0; i < TICKETS; i++)
        if (stream->events[i] != NULL) cudaEventDestroy(stream->events[i]);
    for (uint32_t i = 0; i < UPLOAD_SEGMENTS; i++)
        if (stream->upload_done[i] != NULL) cudaEventDestroy(stream->upload_done[i]);
    if (stream->upload_host != NULL) cudaFreeHost(stream->upload_host);
    cudaFree(stream->upload_device);
    cudaFree(stream->parts);
    cudaFree(stream->counters);
    cudaFree(stream->faults);
    if (stream->queue != NULL) cudaStreamDestroy(stream->queue);
    pthread_cond_destroy(&stream->changed);
    pthread_mutex_destroy(&stream->lock);
    free(stream);
}

static bool stream_allocate(struct cuda_stream *stream) {
    size_t upload = (size_t)UPLOAD_SEGMENTS * UPLOAD_SEGMENT_BYTES;
    stream->parts_max = (size_t)stream->device->processors * BLOCKS_PER_SM_MAX;
    if (cudaStreamCreateWithFlags(&stream->queue, cudaStreamNonBlocking) != cudaSuccess) return false;
    for (uint32_t i = 0; i < TICKETS; i++)
        if (cudaEventCreateWithFlags(&stream->events[i],
                                     cudaEventDisableTiming | cudaEventBlockingSync) != cudaSuccess)
            return false;
    for (uint32_t i = 0; i < UPLOAD_SEGMENTS; i++)
        if (cudaEventCreateWithFlags(&stream->upload_done[i], cudaEventDisableTiming) != cudaSuccess)
            return false;
    return cudaHostAlloc((void **)&stream->upload_host, upload, cudaHostAllocPortable) == cudaSuccess &&
           cudaMalloc((void **)&stream->upload_device, upload) == cudaSuccess &&
           cudaMalloc((void **)&stream->parts, stream->parts_max * PART_FLOATS * sizeof(float)) ==
               cudaSuccess &&
           cudaMalloc((void **)&stream->counters, COUNTERS * sizeof(unsigned)) == cudaSuccess &&
           cudaMemset(stream->counters, 0, COUNTERS * sizeof(unsigned)) == cudaSuccess &&
           cudaMalloc((void **)&stream->faults, KV_ITEMS_MAX * 2 * sizeof(uint32_t)) == cudaSuccess &&
           cudaMemset(stream->faults, 0, KV_ITEMS_MAX * 2 * sizeof(uint32_t)) == cudaSuccess &&
           cudaDeviceSynchronize() == cudaSuccess;
}

static enum kv_status stream_open(struct kv_device *base, struct kv_stream **out) {
    struct cuda_stream *stream = (struct cuda_stream *)calloc(1, sizeof *stream);
    if (stream == NULL) return KV_BUSY;
    stream->base.backend = &kv_cuda_backend;
    stream->device = (struct cuda_device *)base;
    pthread_mutex_init(&stream->lock, NULL);
    pthread_cond_init(&stream->changed, NULL);
    if (!stream_allocate(stream) || pthread_create(&stream->watcher, NULL, watch, stream) != 0) {
        cudaGetLastError();
        stream_close(&stream->base);
        return KV_BUSY;
    }
    *out = &stream->base;
    return KV_OK;
}

const struct kv_backend kv_cuda_backend = {
    .is_host = false,
    .open = device_open,
    .close = device_close,
    .alloc = memory_alloc,
    .free = memory_free,
    .status = device_status,
    .failure = device_failure,
    .stream_open = stream_open,
    .stream_close = stream_close,
    .copy = copy,
    .copy_rows = copy_rows,
    .mark = mark,
    .reached = reached,
    .notify = notify,
    .ingest = cuda_ingest,
    .emit = cuda_emit,
    .quantize = cuda_quantize,
    .dequantize = cuda_dequantize,
    .observe = cuda_observe,
    .attend = cuda_attend,
};
