/* SPDX-License-Identifier: Apache-2.0 */
/* io.c - chooses the engine, makes requests whole, and injects faults.
 *
 * A request is either with the engine, or in `held` (an injected fault or delay whose time has
 * not come).  Both end in request_step(), which starts another attempt or reports the end. */
#include "storage/io.h"

#include "proto/kv_check.h"
#include "storage/clock.h"
#include "storage/io_engine.h"
#include "storage/io_fault.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

struct kv_io {
    const struct kv_io_engine *engine;
    void *state;
    uint32_t requests_max;
    uint32_t in_flight;
    bool registered;
    struct kv_io_request *held;
    char reason[160];
};

static struct {
    kv_io_fault_hook *hook;
    void *context;
} fault;

void kv_io_fault_set(kv_io_fault_hook *hook, void *context) {
    fault.hook    = hook;
    fault.context = context;
}

void kv_io_event_clear(int fd) {
    uint64_t count;
    ssize_t got = read(fd, &count, sizeof count);
    (void)got; /* already cleared: just as good */
}

/* ---- Opening ------------------------------------------------------------------------------- */

enum kv_status kv_io_open(const struct kv_io_options *options, struct kv_io **out) {
    KV_CHECK(options->requests_max >= 1 && options->requests_max <= 4096);
    KV_CHECK(options->threads >= 1 && options->threads <= 64);
    struct kv_io *io = calloc(1, sizeof *io);
    if (io == NULL) return KV_BUSY;
    io->requests_max = options->requests_max;

    int error = 0;
    if (options->use_threads) {
        snprintf(io->reason, sizeof io->reason, "the thread pool was asked for");
    } else {
        io->engine = &kv_io_engine_uring;
        error = io->engine->open(options, &io->state, &io->registered, io->reason, sizeof io->reason);
    }
    if (options->use_threads || error != 0) {
        char why[sizeof io->reason];
        io->engine = &kv_io_engine_threads;
        error = io->engine->open(options, &io->state, &io->registered, why, sizeof why);
    }
    if (error != 0) {
        free(io);
        return KV_BUSY;
    }
    *out = io;
    return KV_OK;
}

void kv_io_close(struct kv_io *io) {
    if (io == NULL) return;
    KV_CHECK(io->in_flight == 0);
    io->engine->close(io->state);
    free(io);
}

const char *kv_io_name(const struct kv_io *io) {
    return io->engine->name;
}

const char *kv_io_reason(const struct kv_io *io) {
    return io->reason;
}

bool kv_io_registered(const struct kv_io *io) {
    return io->registered;
}

uint32_t kv_io_in_flight(const struct kv_io *io) {
    return io->in_flight;
}

/* ---- Requests ------------------------------------------------------------------------------ */

void kv_io_submit(struct kv_io *io, struct kv_io_request *request) {
    KV_CHECK(io->in_flight < io->requests_max);
    KV_CHECK(request->kind < KV_IO_KINDS);
    KV_CHECK(request->offset % 4096 == 0 && request->bytes % 4096 == 0);
    io->in_flight++;
    request->error          = 0;
    request->moved_private  = 0;
    request->due_us_private = 0;
    request->limit_private  = 0;
    request->result_private = 0;

    if (fault.hook != NULL) {
        struct kv_io_fault found = {0};
        fault.hook(fault.context, request, &found);
        request->limit_private = found.move_bytes;
        if (found.error != 0 && !found.torn) request->result_private = -found.error;
        if (found.error != 0 && found.torn) request->error = found.error;
        if (found.delay_us != 0) request->due_us_private = kv_clock_us() + found.delay_us;
        if (found.delay_us != 0 || request->result_private != 0) {
            request->next_private = io->held;
            io->held              = request;
            return;
        }
    }
    io->engine->start(io->state, request);
}

/* One attempt is over: starts another one, or returns true when the request is done. */
static bool request_step(struct kv_io *io, struct kv_io_request *request) {
    int64_t result         = request->result_private;
    request->limit_private = 0;
    if (result == -EINTR || result == -EAGAIN) {
        io->engine->start(io->state, request);
        return false;
    }
    if (result < 0) {
        request->error = (int)-result;
        return true;
    }
    if (request->error != 0) return true; /* torn on purpose: a part of it has been moved */
    if (request->kind != KV_IO_READ && request->kind != KV_IO_WRITE) return true;
    if (result == 0 && request->moved_private < request->bytes) {
        if (request->kind == KV_IO_WRITE) {
            request->error = ENOSPC;
        } else {
            memset(request->memory + request->moved_private, 0,
                   request->bytes - request->moved_private);
        }
        return true;
    }
    /* With O_DIRECT the next attempt must start on a page again: what was moved of the last one
     * is moved once more.  A read that ends inside a page has met the end of the file. */
    uint64_t moved = request->moved_private + (uint64_t)result;
    if (moved >= request->bytes) return true;
    if (moved % 4096 != 0 && request->kind == KV_IO_READ) {
        memset(request->memory + moved, 0, request->bytes - moved);
        return true;
    }
    request->moved_private = moved - moved % 4096;
    io->engine->start(io->state, request);
    return false;
}

void kv_io_flush(struct kv_io *io) {
    io->engine->flush(io->state);
}

/* Takes out of `held` what is due: failures are done, delayed requests start. */
static struct kv_io_request *held_reap(struct kv_io *io) {
    struct kv_io_request *done  = NULL;
    struct kv_io_request **link = &io->held;
    uint64_t now                = io->held != NULL ? kv_clock_us() : 0;
    while (*link != NULL) {
        struct kv_io_request *request = *link;
        if (request->due_us_private > now) {
            link = &request->next_private;
            continue;
        }
        *link = request->next_private;
        if (request->result_private != 0) {
            request->next_private = done;
            done                  = request;
        } else {
            io->engine->start(io->state, request);
        }
    }
    return done;
}

static uint32_t finish(struct kv_io *io, struct kv_io_request *list) {
    uint32_t count = 0;
    while (list != NULL) {
        struct kv_io_request *request = list;
        list                          = request->next_private;
        if (!request_step(io, request)) continue;
        io->in_flight--;
        count++;
        request->on_done(request);
    }
    return count;
}

uint32_t kv_io_poll(struct kv_io *io) {
    if (io->in_flight == 0) return 0;
    uint32_t count = finish(io, held_reap(io));
    count += finish(io, io->engine->reap(io->state));
    io->engine->flush(io->state);
    return count;
}

void kv_io_wait(struct kv_io *io, int wake_fd, uint64_t timeout_us) {
    for (const struct kv_io_request *held = io->held; held != NULL; held = held->next_private) {
        uint64_t now  = kv_clock_us();
        uint64_t left = held->due_us_private > now ? held->due_us_private - now : 0;
        if (left < timeout_us) timeout_us = left;
    }
    io->engine->flush(io->state);
    io->engine->wait(io->state, wake_fd, timeout_us);
}

void kv_io_sleep(int wake_fd, uint64_t timeout_us) {
    struct pollfd wake      = {.fd = wake_fd, .events = POLLIN};
    struct timespec timeout = {
        .tv_sec  = (time_t)(timeout_us / 1000000),
        .tv_nsec = (long)(timeout_us % 1000000) * 1000,
    };
    if (ppoll(&wake, 1, &timeout, NULL) > 0 && (wake.revents & POLLIN)) kv_io_event_clear(wake_fd);
}
