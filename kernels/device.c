/* SPDX-License-Identifier: Apache-2.0 */
/* device.c - chooses a backend by name, once; the rest of the calls go through its table. */
#include "kernels/backend.h"
#include "kernels/cpu.h"
#include "proto/kv_check.h"

/* "cuda" or "cuda:N".  That N is a number is the CUDA backend's to see. */
static bool names_cuda(const char *name) {
    return strcmp(name, "cuda") == 0 || strncmp(name, "cuda:", 5) == 0;
}

static bool names_cpu(const char *name) {
    static const char *const names[] = {"auto", "scalar", "avx2", "avx512", "amx"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(names[i], name) == 0) return true;
    return false;
}

enum kv_status kv_device_open(const struct kv_device_options *options, struct kv_device **out) {
    if (names_cpu(options->name)) return kv_cpu_backend.open(options, out);
    if (!names_cuda(options->name)) return KV_INVALID;
#ifdef KV_HAVE_CUDA
    return kv_cuda_backend.open(options, out);
#else
    return KV_NOT_FOUND;
#endif
}

bool kv_device_knows_cuda(void) {
#ifdef KV_HAVE_CUDA
    return true;
#else
    return false;
#endif
}

const char *kv_device_missing(const char *name) {
    if (!names_cuda(name)) return "this machine's CPU does not have it";
#ifdef KV_HAVE_CUDA
    return kv_cuda_missing(name);
#else
    return "this kivid was built without CUDA: there was no nvcc ($CUDA_HOME/bin/nvcc)";
#endif
}

void kv_device_close(struct kv_device *device) {
    if (device != NULL) device->backend->close(device);
}

const char *kv_device_name(const struct kv_device *device) {
    return device->name;
}

bool kv_device_is_host(const struct kv_device *device) {
    return device->backend->is_host;
}

enum kv_status kv_device_alloc(struct kv_device *device, enum kv_memory kind, size_t bytes,
                               void **out) {
    KV_CHECK(kind == KV_MEMORY_DEVICE || kind == KV_MEMORY_PINNED);
    KV_CHECK(bytes > 0);
    return device->backend->alloc(device, kind, bytes, out);
}

void kv_device_free(struct kv_device *device, enum kv_memory kind, void *memory, size_t bytes) {
    if (memory != NULL) device->backend->free(device, kind, memory, bytes);
}

enum kv_status kv_device_status(const struct kv_device *device) {
    return device->backend->status(device);
}

const char *kv_device_failure(const struct kv_device *device) {
    return device->backend->failure(device);
}

enum kv_status kv_stream_open(struct kv_device *device, struct kv_stream **out) {
    return device->backend->stream_open(device, out);
}

void kv_stream_close(struct kv_stream *stream) {
    if (stream != NULL) stream->backend->stream_close(stream);
}

void kv_stream_copy(struct kv_stream *stream, void *target, const void *source, size_t bytes) {
    KV_CHECK(bytes == 0 || (target != NULL && source != NULL));
    stream->backend->copy(stream, target, source, bytes);
}

void kv_stream_copy_rows(struct kv_stream *stream, struct kv_rows target,
                         struct kv_rows_const source, size_t bytes, uint32_t rows) {
    KV_CHECK(target.memory != NULL && source.memory != NULL);
    KV_CHECK(bytes <= target.pitch && bytes <= source.pitch);
    stream->backend->copy_rows(stream, target, source, bytes, rows);
}

void kv_stream_in_place(struct kv_stream *stream, bool open) {
    stream->in_place = open;
}

uint64_t kv_stream_mark(struct kv_stream *stream) {
    return stream->backend->mark(stream);
}

bool kv_stream_reached(struct kv_stream *stream, uint64_t ticket) {
    return stream->backend->reached(stream, ticket);
}

void kv_stream_notify(struct kv_stream *stream, int eventfd) {
    KV_CHECK(eventfd >= 0);
    stream->backend->notify(stream, eventfd);
}
