/* SPDX-License-Identifier: Apache-2.0 */
/* io_engine.h - what io.c asks of an engine; seen by io*.c only.
 *
 * An engine makes one attempt per start: it calls the kernel once for the rest of the request
 * (from moved_private on, at most limit_private bytes) and reports result_private.  io.c decides
 * whether that was all.  Reaped requests come back linked through next_private. */
#ifndef KV_STORAGE_IO_ENGINE_H
#define KV_STORAGE_IO_ENGINE_H

#include "storage/io.h"

struct kv_io_engine {
    const char *name;
    /* 0, or an errno.  `why` is a sentence. */
    int (*open)(const struct kv_io_options *options, void **engine, bool *registered, char *why,
                size_t why_bytes);
    void (*close)(void *engine);
    void (*start)(void *engine, struct kv_io_request *request);
    void (*flush)(void *engine);
    struct kv_io_request *(*reap)(void *engine);
    void (*wait)(void *engine, int wake_fd, uint64_t timeout_us);
};

extern const struct kv_io_engine kv_io_engine_uring;
extern const struct kv_io_engine kv_io_engine_threads;

/* What is left of a request for the next attempt. */
static inline uint64_t kv_io_left(const struct kv_io_request *request) {
    uint64_t left = request->bytes - request->moved_private;
    uint64_t most = request->limit_private != 0 ? request->limit_private : 1ull << 30;
    return left < most ? left : most;
}

/* Reads and so clears an eventfd. */
void kv_io_event_clear(int fd);

#endif
