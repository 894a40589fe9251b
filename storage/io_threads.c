/* SPDX-License-Identifier: Apache-2.0 */
/* io_threads.c - the engine for where io_uring is forbidden: a pool of threads.
 *
 * Started requests queue under one lock; each thread takes one, calls the kernel, and appends it
 * to the finished ones, writing the eventfd when that list was empty.  For blocks of 256 KiB and
 * more this moves as many bytes as io_uring, at up to three times the processor time. */
#include "proto/kv_check.h"
#include "storage/io_engine.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct list {
    struct kv_io_request *head, *tail;
};

struct threads {
    const int *files;
    int event; /* readable: `finished` is not empty */
    uint32_t thread_count;
    bool stop;
    bool locks_made;
    pthread_mutex_t lock; /* guards stop, queued, finished */
    pthread_cond_t work;
    struct list started;  /* not yet flushed; the caller's thread only */
    struct list queued;
    struct list finished;
    pthread_t ids[64];
};

static void list_push(struct list *list, struct kv_io_request *request) {
    request->next_private = NULL;
    if (list->head == NULL) {
        list->head = request;
    } else {
        list->tail->next_private = request;
    }
    list->tail = request;
}

static struct kv_io_request *list_pop(struct list *list) {
    struct kv_io_request *request = list->head;
    if (request != NULL) list->head = request->next_private;
    return request;
}

/* One attempt. */
static int64_t request_run(const struct threads *threads, const struct kv_io_request *request) {
    int file        = threads->files[request->file];
    uint8_t *memory = request->memory + request->moved_private;
    uint64_t offset = request->offset + request->moved_private;
    int64_t result  = -1;
    switch (request->kind) {
    case KV_IO_READ: result = pread(file, memory, kv_io_left(request), (off_t)offset); break;
    case KV_IO_WRITE: result = pwrite(file, memory, kv_io_left(request), (off_t)offset); break;
    case KV_IO_SYNC: result = fdatasync(file); break;
    case KV_IO_ALLOCATE: result = fallocate(file, 0, 0, (off_t)request->bytes); break;
    case KV_IO_KINDS: break;
    }
    return result < 0 ? -errno : result;
}

static void *thread_main(void *argument) {
    struct threads *threads = argument;
    pthread_mutex_lock(&threads->lock);
    for (;;) {
        struct kv_io_request *request = list_pop(&threads->queued);
        if (request == NULL) {
            if (threads->stop) break;
            pthread_cond_wait(&threads->work, &threads->lock);
            continue;
        }
        pthread_mutex_unlock(&threads->lock);
        request->result_private = request_run(threads, request);
        pthread_mutex_lock(&threads->lock);
        bool first = threads->finished.head == NULL;
        list_push(&threads->finished, request);
        if (first) {
            uint64_t one = 1;
            ssize_t put  = write(threads->event, &one, sizeof one);
            (void)put; /* fails only when the counter is full: readable all the same */
        }
    }
    pthread_mutex_unlock(&threads->lock);
    return NULL;
}

static void threads_close(void *engine) {
    struct threads *threads = engine;
    if (threads->locks_made) {
        pthread_mutex_lock(&threads->lock);
        threads->stop = true;
        pthread_cond_broadcast(&threads->work);
        pthread_mutex_unlock(&threads->lock);
        for (uint32_t i = 0; i < threads->thread_count; i++) pthread_join(threads->ids[i], NULL);
        pthread_cond_destroy(&threads->work);
        pthread_mutex_destroy(&threads->lock);
    }
    if (threads->event >= 0) close(threads->event);
    free(threads);
}

static int threads_open(const struct kv_io_options *options, void **engine, bool *registered,
                        char *why, size_t why_bytes) {
    struct threads *threads = calloc(1, sizeof *threads);
    if (threads == NULL) return ENOMEM;
    threads->files = options->files;
    threads->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int error      = threads->event < 0 ? errno : 0;
    if (error == 0) {
        pthread_mutex_init(&threads->lock, NULL);
        pthread_cond_init(&threads->work, NULL);
        threads->locks_made = true;
    }
    /* Signals are the engine thread's business. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (error == 0 && threads->thread_count < options->threads) {
        error = pthread_create(&threads->ids[threads->thread_count], NULL, thread_main, threads);
        if (error == 0) threads->thread_count++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (threads->thread_count > 0) error = 0; /* fewer than asked for is slower, not wrong */
    if (error != 0) {
        threads_close(threads);
        return error;
    }
    *registered = false;
    *engine     = threads;
    return 0;
}

static void threads_start(void *engine, struct kv_io_request *request) {
    struct threads *threads = engine;
    list_push(&threads->started, request);
}

static void threads_flush(void *engine) {
    struct threads *threads = engine;
    if (threads->started.head == NULL) return;
    pthread_mutex_lock(&threads->lock);
    for (struct kv_io_request *request; (request = list_pop(&threads->started)) != NULL;) {
        list_push(&threads->queued, request);
        pthread_cond_signal(&threads->work);
    }
    pthread_mutex_unlock(&threads->lock);
}

static struct kv_io_request *threads_reap(void *engine) {
    struct threads *threads = engine;
    pthread_mutex_lock(&threads->lock);
    struct kv_io_request *list = threads->finished.head;
    threads->finished.head     = NULL;
    /* Cleared under the lock: a write of the next finisher cannot be lost. */
    if (list != NULL) kv_io_event_clear(threads->event);
    pthread_mutex_unlock(&threads->lock);
    return list;
}

static void threads_wait(void *engine, int wake_fd, uint64_t timeout_us) {
    struct threads *threads = engine;
    struct pollfd fds[2]    = {
        {.fd = threads->event, .events = POLLIN},
        {.fd = wake_fd, .events = POLLIN},
    };
    struct timespec timeout = {
        .tv_sec  = (time_t)(timeout_us / 1000000),
        .tv_nsec = (long)(timeout_us % 1000000) * 1000,
    };
    int ready = ppoll(fds, wake_fd >= 0 ? 2 : 1, &timeout, NULL);
    if (ready > 0 && wake_fd >= 0 && (fds[1].revents & POLLIN)) kv_io_event_clear(wake_fd);
}

const struct kv_io_engine kv_io_engine_threads = {
    .name  = "threads",
    .open  = threads_open,
    .close = threads_close,
    .start = threads_start,
    .flush = threads_flush,
    .reap  = threads_reap,
    .wait  = threads_wait,
};
