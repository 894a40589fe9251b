/* SPDX-License-Identifier: Apache-2.0 */
/* shadow.c - see shadow.h. */
#include "tests/kernels/shadow.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "kernels/backend.h"
#include "proto/kv_check.h"

enum { AREAS_MAX = 16, NAP_BYTES = 512 << 10, NAPS_MAX = 8 };

/* Device memory as its users see it, and where its bytes are. */
struct area {
    uint8_t *seen;
    uint8_t *real;
    size_t bytes;
};

struct shadow {
    struct kv_device base;
    struct kv_device *inner;
    struct area areas[AREAS_MAX];
    size_t bytes_left;
    atomic_bool failed;
    uint32_t naps;
};

struct shadow_stream {
    struct kv_stream base;
    struct shadow *device;
    struct kv_stream *inner;
    uint64_t last; /* ticket */
    uint8_t *bed;  /* two times NAP_BYTES, copied to pass the time */
    struct kv_page_ref refs[KV_ATTEND_PAGES_MAX];
};

static const struct kv_backend shadow_backend;

static struct shadow *shadow_of(const struct kv_device *device) {
    return (struct shadow *)device;
}

static struct shadow_stream *stream_of(struct kv_stream *stream) {
    return (struct shadow_stream *)stream;
}

/* ---- Memory ---------------------------------------------------------------------------- */

static void *real(const struct shadow *shadow, const void *address) {
    for (uint32_t i = 0; i < AREAS_MAX; i++) {
        const struct area *area = &shadow->areas[i];
        uintptr_t offset = (uintptr_t)address - (uintptr_t)area->seen;
        if (area->seen && offset < area->bytes) return area->real + offset;
    }
    return (void *)(uintptr_t)address; /* pinned, or the caller's own */
}

static enum kv_status memory_alloc(struct kv_device *device, enum kv_memory kind, size_t bytes,
                                   void **out) {
    struct shadow *shadow = shadow_of(device);
    if (kind == KV_MEMORY_PINNED) return kv_device_alloc(shadow->inner, kind, bytes, out);
    if (bytes > shadow->bytes_left) return KV_BUSY;
    uint32_t i = 0;
    while (shadow->areas[i].seen) KV_CHECK(++i < AREAS_MAX);
    void *behind;
    enum kv_status status = kv_device_alloc(shadow->inner, kind, bytes, &behind);
    if (status != KV_OK) return status;
    void *seen = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    KV_CHECK(seen != MAP_FAILED);
    shadow->areas[i] = (struct area){.seen = seen, .real = behind, .bytes = bytes};
    shadow->bytes_left -= bytes;
    *out = seen;
    return KV_OK;
}

static void memory_free(struct kv_device *device, enum kv_memory kind, void *memory,
                        size_t bytes) {
    struct shadow *shadow = shadow_of(device);
    if (kind == KV_MEMORY_PINNED) {
        kv_device_free(shadow->inner, kind, memory, bytes);
        return;
    }
    uint32_t i = 0;
    while (shadow->areas[i].seen != memory) KV_CHECK(++i < AREAS_MAX);
    kv_device_free(shadow->inner, kind, shadow->areas[i].real, bytes);
    KV_CHECK(munmap(memory, bytes) == 0);
    shadow->areas[i] = (struct area){0};
    shadow->bytes_left += bytes;
}

/* ---- Streams ------------------------------------------------------------------------------ */

static enum kv_status stream_open(struct kv_device *device, struct kv_stream **out) {
    struct shadow_stream *stream = calloc(1, sizeof *stream);
    if (!stream) return KV_BUSY;
    stream->base.backend = &shadow_backend;
    stream->device = shadow_of(device);
    stream->bed = calloc(2, NAP_BYTES);
    KV_CHECK(stream->bed != NULL);
    enum kv_status status = kv_stream_open(stream->device->inner, &stream->inner);
    if (status == KV_OK) {
        *out = &stream->base;
    } else {
        free(stream->bed);
        free(stream);
    }
    return status;
}

static void stream_close(struct kv_stream *base) {
    struct shadow_stream *stream = stream_of(base);
    kv_stream_close(stream->inner);
    free(stream->bed);
    free(stream);
}

static uint64_t mark(struct kv_stream *base) {
    struct shadow_stream *stream = stream_of(base);
    return stream->last = kv_stream_mark(stream->inner);
}

static bool reached(struct kv_stream *base, uint64_t ticket) {
    return kv_stream_reached(stream_of(base)->inner, ticket);
}

static void notify(struct kv_stream *base, int eventfd) {
    kv_stream_notify(stream_of(base)->inner, eventfd);
}

/* The stream that does the work, or NULL when the device has failed. */
static struct kv_stream *begin(struct kv_stream *base) {
    struct shadow_stream *stream = stream_of(base);
    if (atomic_load(&stream->device->failed)) return NULL;
    if (kv_stream_reached(stream->inner, stream->last)) {
        /* Short ones and long ones, so that streams overtake each other. */
        for (uint32_t naps = ++stream->device->naps % 3 ? 1 : NAPS_MAX; naps; naps--)
            kv_stream_copy(stream->inner, stream->bed, stream->bed + NAP_BYTES, NAP_BYTES);
        stream->last = kv_stream_mark(stream->inner);
    }
    return stream->inner;
}

static void copy(struct kv_stream *base, void *target, const void *source, size_t bytes) {
    const struct shadow *shadow = stream_of(base)->device;
    struct kv_stream *inner = begin(base);
    if (inner) kv_stream_copy(inner, real(shadow, target), real(shadow, source), bytes);
}

static void copy_rows(struct kv_stream *base, struct kv_rows target, struct kv_rows_const source,
                      size_t bytes, uint32_t rows) {
    const struct shadow *shadow = stream_of(base)->device;
    struct kv_stream *inner = begin(base);
    target.memory = real(shadow, target.memory);
    source.memory = real(shadow, source.memory);
    if (inner) kv_stream_copy_rows(inner, target, source, bytes, rows);
}

/* ---- The verbs: items with every pointer led to the real memory ------------------------------- */

static void ingest(struct kv_stream *base, const struct kv_shape *shape, uint32_t count,
                   const struct kv_ingest *items) {
    const struct shadow *shadow = stream_of(base)->device;
    struct kv_stream *inner = begin(base);
    struct kv_ingest own[KV_ITEMS_MAX];
    for (uint32_t i = 0; i < count; i++) {
        own[i] = items[i];
        own[i].keys = real(shadow, items[i].keys);
        own[i].values = real(shadow, items[i].values);
        own[i].page = real(shadow, items[i].page);
    }
    if (inner) kv_kernel_ingest(inner, shape, count, own);
}

static void emit(struct kv_stream *base, const struct kv_shape *shape, uint32_t count,
                 const struct kv_emit *items) {
    const struct shadow *shadow = stream_of(base)->device;
    struct kv_stream *inner = begin(base);
    struct kv_emit own[KV_ITEMS_MAX];
    for (uint32_t i = 0; i < count; i++) {
        own[i] = items[i];
        own[i].page = real(shadow, items[i].page);
        own[i].keys = real(shadow, items[i].keys);
        own[i].values = real(shadow, items[i].values);
    }
    if (inner) kv_kernel_emit(inner, shape, count, own);
}

static void quantize(struct kv_stream *base, const struct kv_shape *shape, uint32_t count,
                     const struct kv_quantize *items) {
    const struct shadow *shadow = stream_of(base)->device;
    struct kv_stream *inner = begin(base);
    struct kv_quantize own[KV_ITEMS_MAX];
    for (uint32_t i = 0; i < count; i++) {
        own[i] = items[i];
        own[i].raw = real(shadow, items[i].raw);
        own[i].packed = real(shadow, items[i].packed);
    }
    if (inner) kv_kernel_quantize(inner, shape, count, own);
}

static void dequantize(struct kv_stream *base, const struct kv_shape *shape, uint32_t count,
                       const struct kv_dequantize *items) {
    const struct shadow *shadow = stream_of(base)->device;
    struct kv_stream *inner = begin(base);
    struct kv_dequantize own[KV_ITEMS_MAX];
    for (uint32_t i = 0; i < count; i++)
        own[i] = (struct kv_dequantize){.packed = real(shadow, items[i].packed),
                                        .raw = real(shadow, items[i].raw),
                                        .dtype = items[i].dtype};
    if (inner) kv_kernel_dequantize(inner, shape, count, own);
}

static void observe(struct kv_stream *base, const struct kv_shape *shape, uint32_t count,
                    const struct kv_observe *items) {
    const struct shadow *shadow = stream_of(base)->device;
    struct kv_stream *inner = begin(base);
    struct kv_observe own[KV_ITEMS_MAX];
    for (uint32_t i = 0; i < count; i++) {
        own[i] = items[i];
        own[i].query = real(shadow, items[i].query);
    }
    if (inner) kv_kernel_observe(inner, shape, count, own);
}

static void attend(struct kv_stream *base, const struct kv_shape *shape, uint32_t count,
                   const struct kv_attend *items) {
    struct shadow_stream *stream = stream_of(base);
    struct kv_stream *inner = begin(base);
    struct kv_attend own[KV_ITEMS_MAX];
    uint32_t used = 0;
    for (uint32_t i = 0; i < count; i++) {
        own[i] = items[i];
        own[i].query = real(stream->device, items[i].query);
        own[i].out = real(stream->device, items[i].out);
        own[i].lse = real(stream->device, items[i].lse);
        own[i].pages = &stream->refs[used];
        for (uint32_t p = 0; p < items[i].page_count; p++, used++) {
            stream->refs[used] = items[i].pages[p];
            stream->refs[used].page = real(stream->device, items[i].pages[p].page);
        }
    }
    if (inner) kv_kernel_attend(inner, shape, count, own);
}

/* ---- The device --------------------------------------------------------------------------------- */

void shadow_fail(struct kv_device *device) {
    atomic_store(&shadow_of(device)->failed, true);
}

static enum kv_status device_status(const struct kv_device *device) {
    return atomic_load(&shadow_of(device)->failed) ? KV_UNAVAILABLE : KV_OK;
}

static const char *device_failure(const struct kv_device *device) {
    return device_status(device) == KV_OK ? "" : "the test broke it";
}

static void device_close(struct kv_device *device) {
    struct shadow *shadow = shadow_of(device);
    for (uint32_t i = 0; i < AREAS_MAX; i++) KV_CHECK(!shadow->areas[i].seen);
    kv_device_close(shadow->inner);
    free(shadow);
}

enum kv_status shadow_open(const struct shadow_options *options, struct kv_device **out) {
    struct shadow *shadow = calloc(1, sizeof *shadow);
    KV_CHECK(shadow != NULL);
    shadow->base.backend = &shadow_backend;
    shadow->base.name = "shadow";
    shadow->bytes_left = options->device_bytes ? options->device_bytes : SIZE_MAX;
    enum kv_status status = kv_device_open(&options->inner, &shadow->inner);
    if (status != KV_OK) {
        free(shadow);
        return status;
    }
    *out = &shadow->base;
    return KV_OK;
}

static const struct kv_backend shadow_backend = {
    .is_host = false,
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
    .ingest = ingest,
    .emit = emit,
    .quantize = quantize,
    .dequantize = dequantize,
    .observe = observe,
    .attend = attend,
};
