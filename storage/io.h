/* SPDX-License-Identifier: Apache-2.0 */
/* io.h - reads, writes and syncs of files, in the background, by one of two engines.
 *
 * "io_uring" where the kernel and the container allow it, else "threads": a pool that calls
 * pread() and pwrite().  Both have the same behaviour behind this header, the choice is made once
 * at open, and kv_io_reason() keeps why.
 *
 * A request belongs to the caller, who fills it in, submits it, and gets it back in its on_done,
 * called from kv_io_poll() and nowhere else.  Any number may be submitted up to requests_max.
 * Order between requests is not kept.
 *
 * Whole or failed.  A read or write that moves fewer bytes than asked is continued until it is
 * whole; EINTR and EAGAIN are tried again.  A read beyond the end of a file finds zeros (which no
 * checksum will take for a record); a write that cannot move a byte is ENOSPC.
 *
 * Files are opened by the caller and known here by their number.  If possible they are opened
 * with O_DIRECT, so memory, offsets and sizes are multiples of 4096.
 *
 * Threads. One; the thread-pool engine's own threads touch a request only between submit and
 *          on_done.
 */
#ifndef KV_STORAGE_IO_H
#define KV_STORAGE_IO_H

#include "proto/kv_types.h"

struct kv_io;

enum kv_io_kind {
    KV_IO_READ,
    KV_IO_WRITE,
    KV_IO_SYNC,     /* fdatasync */
    KV_IO_ALLOCATE, /* fallocate: `bytes` from 0 on; the file grows */
    KV_IO_KINDS,
};

struct kv_io_request {
    enum kv_io_kind kind;
    uint32_t file;     /* index into kv_io_options.files */
    uint8_t *memory;   /* READ, WRITE */
    uint64_t bytes;
    uint64_t offset;
    void (*on_done)(struct kv_io_request *request);
    void *owner;       /* the caller's */
    int error;         /* out: 0 or an errno */

    uint64_t moved_private;    /* so far */
    uint64_t due_us_private;   /* fault injection: not before */
    uint64_t limit_private;    /* fault injection: move at most so many bytes at first */
    int64_t result_private;    /* of the last attempt: bytes moved, or -errno */
    struct kv_io_request *next_private;
};

struct kv_io_options {
    const int *files;      /* borrowed until close; not closed here */
    uint32_t file_count;
    uint32_t requests_max; /* submitted and not yet done: 1 .. 4096 */
    uint32_t threads;      /* of the pool: 1 .. 64 */
    bool use_threads;      /* even if io_uring would do */
    uint8_t *memory;       /* where most requests' memory lies: registered if allowed */
    uint64_t memory_bytes;
};

/* KV_BUSY: not enough memory or threads. */
enum kv_status kv_io_open(const struct kv_io_options *options, struct kv_io **out);
/* Everything submitted must be done.  NULL is closed. */
void kv_io_close(struct kv_io *io);

const char *kv_io_name(const struct kv_io *io);
/* Why it is not io_uring, or "". */
const char *kv_io_reason(const struct kv_io *io);
/* False when RLIMIT_MEMLOCK forbade registering the memory: each request then maps its own. */
bool kv_io_registered(const struct kv_io *io);

void kv_io_submit(struct kv_io *io, struct kv_io_request *request);
/* Starts what was submitted since the last flush, in one system call. */
void kv_io_flush(struct kv_io *io);
/* Runs on_done of what has finished; returns how many.  An on_done may submit. */
uint32_t kv_io_poll(struct kv_io *io);
/* Flushes, then sleeps until something has finished, wake_fd (an eventfd, or -1) is readable,
 * or timeout_us has passed.  wake_fd is read and so cleared. */
void kv_io_wait(struct kv_io *io, int wake_fd, uint64_t timeout_us);
uint32_t kv_io_in_flight(const struct kv_io *io);

/* The same sleep for who has no files: until wake_fd is readable, or timeout_us has passed. */
void kv_io_sleep(int wake_fd, uint64_t timeout_us);

#endif
