/* SPDX-License-Identifier: Apache-2.0 */
/* io_uring.c - the engine that hands requests to the kernel through a shared ring.
 *
 * One ring, used by one thread.  Measured on 256 KiB writes at depth 8: registered buffers and
 * files with SINGLE_ISSUER | DEFER_TASKRUN take half the processor time of a ring without them
 * (8.5 against 16.6 % of a core), so all three are asked for; each may be refused alone, and then
 * the ring works without it: the flags by kernels before 6.1, the buffers by RLIMIT_MEMLOCK.
 *
 * Registering the files has a second use.  The ring holds the lock file too, so the lock of a
 * process that was killed is released only when the last request it had in flight is over: whoever
 * gets the lock knows that nobody writes any more.
 *
 * Sleeping waits for completions; the wake-up eventfd is one of them, as a poll request that is
 * renewed whenever it has fired. */
#include "proto/kv_check.h"
#include "storage/io_engine.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The kernel takes registered buffers of up to 1 GiB. */
#define BUFFER_BYTES (1ull << 30)

enum { BUFFERS_MAX = 1024 };

struct uring {
    struct io_uring ring;
    bool ring_made;
    bool files_registered;
    uint32_t buffer_count; /* 0: memory is not registered */
    const int *files;
    uint8_t *memory;
    uint64_t memory_bytes;
    int polled_fd; /* the eventfd that a poll request waits for, or -1 */
    bool woken;    /* it has fired: the next wait returns at once, whoever reaped it */
    struct kv_io_request *finished; /* reaped while waiting or making room */
};

static const char wake_tag, cancel_tag; /* their addresses are the user data of those requests */

/* ---- Opening ------------------------------------------------------------------------------- */

/* Every operation that will be used, or 0. */
static int ring_lacks(struct io_uring *ring) {
    static const int needed[] = {IORING_OP_READ,  IORING_OP_WRITE,     IORING_OP_READ_FIXED,
                                 IORING_OP_FSYNC, IORING_OP_FALLOCATE, IORING_OP_WRITE_FIXED,
                                 IORING_OP_POLL_ADD, IORING_OP_ASYNC_CANCEL};
    struct io_uring_probe *probe = io_uring_get_probe_ring(ring);
    if (probe == NULL) return ENOSYS;
    int lacks = 0;
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        if (!io_uring_opcode_supported(probe, needed[i])) lacks = ENOSYS;
    }
    io_uring_free_probe(probe);
    return lacks;
}

static int ring_make(struct uring *uring, uint32_t entries) {
    struct io_uring_params params = {
        .flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_CLAMP};
    int error = io_uring_queue_init_params(entries, &uring->ring, &params);
    if (error == -EINVAL) {
        memset(&params, 0, sizeof params);
        error = io_uring_queue_init_params(entries, &uring->ring, &params);
    }
    if (error != 0) return -error;
    uring->ring_made = true;
    io_uring_ring_dontfork(&uring->ring);
    return ring_lacks(&uring->ring);
}

/* Each request can do without: failure only costs time. */
static void memory_register(struct uring *uring) {
    uint64_t count = (uring->memory_bytes + BUFFER_BYTES - 1) / BUFFER_BYTES;
    if (count == 0 || count > BUFFERS_MAX) return;
    struct iovec *buffers = calloc(count, sizeof *buffers);
    if (buffers == NULL) return;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t left       = uring->memory_bytes - i * BUFFER_BYTES;
        buffers[i].iov_base = uring->memory + i * BUFFER_BYTES;
        buffers[i].iov_len  = left < BUFFER_BYTES ? left : BUFFER_BYTES;
    }
    if (io_uring_register_buffers(&uring->ring, buffers, (unsigned)count) == 0)
        uring->buffer_count = (uint32_t)count;
    free(buffers);
}

static void uring_close(void *engine) {
    struct uring *uring = engine;
    if (uring->ring_made) io_uring_queue_exit(&uring->ring);
    free(uring);
}

static int uring_open(const struct kv_io_options *options, void **engine, bool *registered,
                      char *why, size_t why_bytes) {
    struct uring *uring = calloc(1, sizeof *uring);
    if (uring == NULL) return ENOMEM;
    uring->files        = options->files;
    uring->memory       = options->memory;
    uring->memory_bytes = options->memory_bytes;
    uring->polled_fd    = -1;
    int error           = ring_make(uring, options->requests_max + 4);
    if (error != 0) {
        const char *hint = error == EPERM    ? " (a seccomp profile or kernel.io_uring_disabled)"
                           : error == ENOSYS ? " (the kernel has no or too old an io_uring)"
                           : error == ENOMEM ? " (raise RLIMIT_MEMLOCK)"
                           : error == EMFILE ? " (raise RLIMIT_NOFILE)"
                                             : "";
        snprintf(why, why_bytes, "io_uring: %s%s", strerror(error), hint);
        uring_close(uring);
        return error;
    }
    uring->files_registered =
        io_uring_register_files(&uring->ring, options->files, options->file_count) == 0;
    memory_register(uring);
    *registered = uring->buffer_count > 0;
    *engine     = uring;
    return 0;
}

/* ---- Requests ------------------------------------------------------------------------------ */

/* Which registered buffer holds [memory, memory + bytes), or -1. */
static int buffer_of(const struct uring *uring, const uint8_t *memory, uint64_t bytes) {
    if (uring->buffer_count == 0 || memory < uring->memory) return -1;
    uint64_t begin = (uint64_t)(memory - uring->memory);
    if (begin + bytes > uring->memory_bytes) return -1;
    uint64_t first = begin / BUFFER_BYTES, last = (begin + bytes - 1) / BUFFER_BYTES;
    return first == last ? (int)first : -1;
}

static struct io_uring_sqe *ring_entry(struct uring *uring) {
    struct io_uring_sqe *entry = io_uring_get_sqe(&uring->ring);
    if (entry == NULL) {
        io_uring_submit(&uring->ring);
        entry = io_uring_get_sqe(&uring->ring);
    }
    /* requests_max and two for the eventfd fit in the ring. */
    KV_CHECK(entry != NULL);
    return entry;
}

static void uring_start(void *engine, struct kv_io_request *request) {
    struct uring *uring        = engine;
    struct io_uring_sqe *entry = ring_entry(uring);
    int file        = uring->files_registered ? (int)request->file : uring->files[request->file];
    uint8_t *memory = request->memory + request->moved_private;
    uint64_t offset = request->offset + request->moved_private;
    unsigned bytes  = (unsigned)kv_io_left(request);
    int buffer      = request->kind <= KV_IO_WRITE ? buffer_of(uring, memory, bytes) : -1;
    switch (request->kind) {
    case KV_IO_READ:
        if (buffer >= 0) {
            io_uring_prep_read_fixed(entry, file, memory, bytes, offset, buffer);
        } else {
            io_uring_prep_read(entry, file, memory, bytes, offset);
        }
        break;
    case KV_IO_WRITE:
        if (buffer >= 0) {
            io_uring_prep_write_fixed(entry, file, memory, bytes, offset, buffer);
        } else {
            io_uring_prep_write(entry, file, memory, bytes, offset);
        }
        break;
    case KV_IO_SYNC: io_uring_prep_fsync(entry, file, IORING_FSYNC_DATASYNC); break;
    case KV_IO_ALLOCATE: io_uring_prep_fallocate(entry, file, 0, 0, (off_t)request->bytes); break;
    case KV_IO_KINDS: break;
    }
    if (uring->files_registered) entry->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(entry, request);
}

static void uring_flush(void *engine) {
    struct uring *uring = engine;
    if (io_uring_sq_ready(&uring->ring) > 0) io_uring_submit(&uring->ring);
}

/* Moves completions to `finished`; notes that the eventfd's poll has fired. */
static void ring_drain(struct uring *uring) {
    struct io_uring_cqe *completion;
    unsigned head, count = 0;
    io_uring_for_each_cqe(&uring->ring, head, completion) {
        count++;
        void *data = io_uring_cqe_get_data(completion);
        if (data == (void *)&cancel_tag) continue;
        if (data == (void *)&wake_tag) {
            uring->woken     = completion->res > 0;
            uring->polled_fd = -1;
            continue;
        }
        struct kv_io_request *request = data;
        request->result_private       = completion->res;
        request->next_private         = uring->finished;
        uring->finished               = request;
    }
    io_uring_cq_advance(&uring->ring, count);
}

static struct kv_io_request *uring_reap(void *engine) {
    struct uring *uring = engine;
    /* With DEFER_TASKRUN completions appear only when the ring is entered. */
    if (io_uring_cq_ready(&uring->ring) == 0) io_uring_get_events(&uring->ring);
    ring_drain(uring);
    struct kv_io_request *list = uring->finished;
    uring->finished            = NULL;
    return list;
}

static void poll_renew(struct uring *uring, int wake_fd) {
    if (uring->polled_fd == wake_fd) return;
    if (uring->polled_fd >= 0) { /* another eventfd than last time: rare */
        struct io_uring_sqe *cancel = ring_entry(uring);
        io_uring_prep_cancel(cancel, (void *)&wake_tag, 0);
        io_uring_sqe_set_data(cancel, (void *)&cancel_tag);
        while (uring->polled_fd >= 0) {
            io_uring_submit_and_wait(&uring->ring, 1);
            ring_drain(uring);
        }
    }
    if (wake_fd < 0) return;
    struct io_uring_sqe *entry = ring_entry(uring);
    io_uring_prep_poll_add(entry, wake_fd, POLLIN);
    io_uring_sqe_set_data(entry, (void *)&wake_tag);
    uring->polled_fd = wake_fd;
}

static void uring_wait(void *engine, int wake_fd, uint64_t timeout_us) {
    struct uring *uring = engine;
    poll_renew(uring, wake_fd);
    if (uring->finished != NULL || uring->woken) timeout_us = 0;
    struct __kernel_timespec timeout = {
        .tv_sec  = (long long)(timeout_us / 1000000),
        .tv_nsec = (long long)(timeout_us % 1000000) * 1000,
    };
    struct io_uring_cqe *completion;
    io_uring_submit_and_wait_timeout(&uring->ring, &completion, 1, &timeout, NULL);
    ring_drain(uring);
    if (uring->woken) kv_io_event_clear(wake_fd);
    uring->woken = false;
}

const struct kv_io_engine kv_io_engine_uring = {
    .name  = "io_uring",
    .open  = uring_open,
    .close = uring_close,
    .start = uring_start,
    .flush = uring_flush,
    .reap  = uring_reap,
    .wait  = uring_wait,
};
