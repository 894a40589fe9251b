/* SPDX-License-Identifier: Apache-2.0 */
/* backend.h - what one device implementation provides.  Private to kernels/.
 *
 * device.c chooses a table once, when the device is opened; nothing asks for CPU flags or
 * a GPU afterwards.  Two stand behind it: kv_cpu_backend runs the CPU instruction-set
 * tables (cpu.h: scalar, avx2, avx512, amx) on worker threads; kv_cuda_backend, in cuda/, runs
 * kernels on streams.
 * The functions have the meaning given in device.h and kernel.h and may assume that
 * kernel.c has checked their arguments.  Every entry is present unless it says for whom it is; a backend that
 * cannot do something is not finished.
 */
#ifndef KV_KERNELS_BACKEND_H
#define KV_KERNELS_BACKEND_H

#include "kernels/kernel.h"

#ifdef __cplusplus
extern "C" {
#endif

struct kv_backend {
    bool is_host;

    enum kv_status (*open)(const struct kv_device_options *options, struct kv_device **out);
    void (*close)(struct kv_device *device);
    enum kv_status (*alloc)(struct kv_device *device, enum kv_memory kind, size_t bytes,
                            void **out);
    void (*free)(struct kv_device *device, enum kv_memory kind, void *memory, size_t bytes);
    enum kv_status (*status)(const struct kv_device *device);
    const char *(*failure)(const struct kv_device *device);

    enum kv_status (*stream_open)(struct kv_device *device, struct kv_stream **out);
    void (*stream_close)(struct kv_stream *stream);
    void (*copy)(struct kv_stream *stream, void *target, const void *source, size_t bytes);
    void (*copy_rows)(struct kv_stream *stream, struct kv_rows target, struct kv_rows_const source,
                      size_t bytes, uint32_t rows);
    uint64_t (*mark)(struct kv_stream *stream);
    bool (*reached)(struct kv_stream *stream, uint64_t ticket);
    void (*notify)(struct kv_stream *stream, int eventfd);

    void (*ingest)(struct kv_stream *, const struct kv_shape *, uint32_t, const struct kv_ingest *);
    uint32_t (*ingest_here)(const struct kv_device *, const struct kv_shape *, const struct kv_ingest *,
                            void *scratch); /* is_host only */
    void (*emit)(struct kv_stream *, const struct kv_shape *, uint32_t, const struct kv_emit *);
    void (*quantize)(struct kv_stream *, const struct kv_shape *, uint32_t,
                     const struct kv_quantize *);
    void (*dequantize)(struct kv_stream *, const struct kv_shape *, uint32_t,
                       const struct kv_dequantize *);
    void (*observe)(struct kv_stream *, const struct kv_shape *, uint32_t,
                    const struct kv_observe *);
    void (*attend)(struct kv_stream *, const struct kv_shape *, uint32_t,
                   const struct kv_attend *);
};

/* The first member of every backend's device and stream; open() and stream_open() fill it in. */
struct kv_device {
    const struct kv_backend *backend;
    const char *name; /* what kv_device_name() answers; static */
};
struct kv_stream {
    const struct kv_backend *backend;
    bool in_place; /* kv_stream_in_place() */
};

extern const struct kv_backend kv_cpu_backend;
/* Only where KV_HAVE_CUDA is defined.  kv_cuda_missing() is kv_device_missing() for "cuda" and "cuda:N". */
extern const struct kv_backend kv_cuda_backend;
const char *kv_cuda_missing(const char *name);

#ifdef __cplusplus
}
#endif
#endif
