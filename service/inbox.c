/* SPDX-License-Identifier: Apache-2.0 */
/* inbox.c - lists that many threads share, without a lock.
 *
 * Three of them.  Free requests and free staging buffers are stacks of indices; the head carries a
 * count of changes beside the index, so that a head that went away and came back is not mistaken
 * for one that stayed.  The inbox is a stack of pointers that the engine takes whole and turns
 * round: what is taken is never put back, so it needs no count.
 *
 * Waking.  A write to an eventfd is a system call, and a busy engine does not need it.  So the
 * engine says when it dozes: it sets `dozing` and then looks once more; a producer pushes and then
 * looks at `dozing`.  Both orders are sequentially consistent, so that at least one of the two
 * sees the other.
 */
#include "service/inbox.h"

#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "proto/kv_check.h"

enum { NONE = UINT32_MAX };

/* [changes 32][index 32] */
struct stack {
    _Atomic uint64_t head;
    _Atomic uint32_t *next; /* [count] */
};

struct kv_inbox {
    struct kv_inbox_options options;
    struct kv_request *requests; /* [request_count] */
    uint8_t *staging;            /* [staging_count][staging_bytes] */
    struct stack free_requests, free_staging;
    _Atomic(struct kv_request *) pushed;
    atomic_bool dozing;
    int wake_fd;
    void (*on_free)(void *context);
    void *on_free_context;
};

/* Stands in `pushed` once the inbox is closed. */
static struct kv_request closed;

static bool stack_open(struct stack *stack, uint32_t count) {
    stack->next = calloc(count ? count : 1, sizeof stack->next[0]);
    if (!stack->next) return false;
    for (uint32_t i = 0; i < count; i++) atomic_init(&stack->next[i], i + 1 < count ? i + 1 : NONE);
    atomic_init(&stack->head, count ? 0 : NONE);
    return true;
}

static uint32_t stack_pop(struct stack *stack) {
    uint64_t head = atomic_load_explicit(&stack->head, memory_order_acquire); /* pairs with push */
    for (;;) {
        uint32_t index = (uint32_t)head;
        if (index == NONE) return NONE;
        /* May read a link that another pop is just giving away; then the count has changed and
         * the exchange below fails. */
        uint32_t next = atomic_load_explicit(&stack->next[index], memory_order_relaxed);
        uint64_t changed = ((head >> 32) + 1) << 32 | next;
        if (atomic_compare_exchange_weak_explicit(&stack->head, &head, changed,
                                                  memory_order_acquire, memory_order_acquire))
            return index;
    }
}

static void stack_push(struct stack *stack, uint32_t index) {
    uint64_t head = atomic_load_explicit(&stack->head, memory_order_relaxed);
    for (;;) {
        atomic_store_explicit(&stack->next[index], (uint32_t)head, memory_order_relaxed);
        uint64_t changed = ((head >> 32) + 1) << 32 | index;
        if (atomic_compare_exchange_weak_explicit(&stack->head, &head, changed,
                                                  memory_order_release, memory_order_relaxed))
            return; /* release: what the last owner wrote is seen by who pops it */
    }
}

static size_t staging_pool_bytes(const struct kv_inbox_options *options) {
    return options->staging_count * options->staging_bytes;
}

enum kv_status kv_inbox_open(const struct kv_inbox_options *options, struct kv_inbox **out) {
    struct kv_inbox *inbox = calloc(1, sizeof *inbox);
    if (!inbox) return KV_BUSY;
    inbox->options = *options;
    inbox->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    inbox->requests = calloc(options->request_count, sizeof inbox->requests[0]);
    bool ok = inbox->wake_fd >= 0 && inbox->requests &&
              stack_open(&inbox->free_requests, options->request_count) &&
              stack_open(&inbox->free_staging, options->staging_count);
    if (ok && options->staging_count) {
        ok = kv_device_alloc(options->device, KV_MEMORY_PINNED, staging_pool_bytes(options),
                             (void **)&inbox->staging) == KV_OK;
    }
    if (!ok) {
        kv_inbox_free(inbox);
        return KV_BUSY;
    }
    *out = inbox;
    return KV_OK;
}

void kv_inbox_free(struct kv_inbox *inbox) {
    if (!inbox) return;
    if (inbox->staging)
        kv_device_free(inbox->options.device, KV_MEMORY_PINNED, inbox->staging,
                       staging_pool_bytes(&inbox->options));
    if (inbox->wake_fd >= 0) close(inbox->wake_fd);
    free((void *)inbox->free_requests.next);
    free((void *)inbox->free_staging.next);
    free(inbox->requests);
    free(inbox);
}

struct kv_request *kv_inbox_acquire(struct kv_inbox *inbox, bool with_staging) {
    uint32_t buffer = NONE;
    if (with_staging) {
        buffer = stack_pop(&inbox->free_staging);
        if (buffer == NONE) return NULL;
    }
    uint32_t index = stack_pop(&inbox->free_requests);
    if (index == NONE) {
        if (buffer != NONE) stack_push(&inbox->free_staging, buffer);
        return NULL;
    }
    struct kv_request *request = &inbox->requests[index];
    memset(request, 0, sizeof *request);
    if (buffer != NONE) {
        request->staging_bytes = inbox->options.staging_bytes;
        request->staging = inbox->staging + buffer * inbox->options.staging_bytes;
    }
    return request;
}

void kv_inbox_release(struct kv_inbox *inbox, struct kv_request *request) {
    size_t index = (size_t)(request - inbox->requests);
    KV_CHECK(index < inbox->options.request_count);
    if (request->staging) {
        size_t offset = (size_t)(request->staging - inbox->staging);
        KV_CHECK(offset % inbox->options.staging_bytes == 0);
        stack_push(&inbox->free_staging, (uint32_t)(offset / inbox->options.staging_bytes));
        request->staging = NULL;
    }
    stack_push(&inbox->free_requests, (uint32_t)index);
    if (inbox->on_free) inbox->on_free(inbox->on_free_context);
}

void kv_inbox_on_free(struct kv_inbox *inbox, void (*on_free)(void *context), void *context) {
    inbox->on_free_context = context;
    inbox->on_free = on_free;
}

bool kv_inbox_push(struct kv_inbox *inbox, struct kv_request *request) {
    struct kv_request *head = atomic_load_explicit(&inbox->pushed, memory_order_relaxed);
    do {
        if (head == &closed) return false;
        request->next_private = head;
        /* Sequentially consistent for `dozing`; releases the request to take(). */
    } while (!atomic_compare_exchange_weak(&inbox->pushed, &head, request));
    if (atomic_load(&inbox->dozing)) kv_inbox_wake(inbox); /* pairs with doze() */
    return true;
}

static struct kv_request *take_and_leave(struct kv_inbox *inbox, struct kv_request *left) {
    struct kv_request *newest = atomic_exchange(&inbox->pushed, left); /* pairs with push() */
    struct kv_request *oldest = NULL;
    KV_CHECK(newest != &closed);
    while (newest) {
        struct kv_request *next = newest->next_private;
        newest->next_private = oldest;
        oldest = newest;
        newest = next;
    }
    return oldest;
}

bool kv_inbox_waiting(const struct kv_inbox *inbox) {
    return atomic_load_explicit(&inbox->pushed, memory_order_relaxed) != NULL;
}

struct kv_request *kv_inbox_take(struct kv_inbox *inbox) {
    if (!atomic_load_explicit(&inbox->pushed, memory_order_relaxed)) return NULL;
    return take_and_leave(inbox, NULL);
}

struct kv_request *kv_inbox_close(struct kv_inbox *inbox) {
    return take_and_leave(inbox, &closed);
}

bool kv_inbox_doze(struct kv_inbox *inbox) {
    atomic_store(&inbox->dozing, true);
    if (!atomic_load(&inbox->pushed)) return true; /* pairs with push() */
    kv_inbox_awake(inbox);
    return false;
}

void kv_inbox_awake(struct kv_inbox *inbox) {
    atomic_store_explicit(&inbox->dozing, false, memory_order_relaxed);
}

int kv_inbox_wake_fd(const struct kv_inbox *inbox) {
    return inbox->wake_fd;
}

void kv_inbox_wake(struct kv_inbox *inbox) {
    uint64_t one = 1;
    ssize_t written = write(inbox->wake_fd, &one, sizeof one);
    (void)written; /* EAGAIN: it is full of wake-ups already */
}
