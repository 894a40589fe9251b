/* SPDX-License-Identifier: Apache-2.0 */
/* cpu_pool.c - worker threads and in-order streams.
 *
 * Three hand-overs, each through one atomic:
 *
 *   pending   operations of a stream that are not finished.  Whoever takes it from 0 to 1
 *             (the engine, submitting to an idle stream) or leaves it above 0 (a worker,
 *             finishing an operation) holds the stream's baton: the right to start its next
 *             operation.  There is never a second holder.
 *   claims    {activation number, tasks nobody has claimed}.  The baton holder publishes
 *             it; workers count it down.  The number keeps a late worker from taking a task
 *             of the next operation for one of the last.
 *   unclosed  tasks that are not finished.  The worker that brings it to 0 has the baton.
 *
 * Sleep.  A worker that finds nothing to claim watches `signal` and sleeps on it by futex.
 * At most one worker at a time watches without sleeping, and only while that has paid off:
 * waking a thread costs 5 to 50 us on the machines measured, the operations of a decode
 * step follow each other faster than that, and a machine with two cores has none to waste.
 *
 * Places. With as many workers as there are CPUs, each has one of its own. Woken together by a
 * thread that sleeps right after, several can be put on one CPU beside an idle one, and short
 * operations end before the kernel's balancing looks (kernels/NOTES.md has what it cost). Fewer
 * workers go where the kernel puts them: others have a claim to the CPUs then.
 */
#include "kernels/cpu_pool.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "proto/kv_check.h"

/* How long the one watching worker goes on before it sleeps: about what a wake-up costs, so
 * that watching in vain never costs more than twice what sleeping at once would have. */
enum { SPIN_NS = 30 * 1000 };

/* Between two looks at the clock while watching. */
enum { SPIN_LOOKS = 64 };

/* Operations of one stream that a worker starts and serves in a row, which spares waking
 * another worker, before it looks at the other streams. */
enum { STAYS_MAX = 16 };

enum { CACHE_LINE = 64 };

struct pool;

struct stream {
    struct kv_stream base;
    struct pool *pool;
    bool open;

    /* The engine thread's. */
    uint64_t submitted;
    uint8_t *arguments;
    size_t argument_position;

    /* The baton holder's. */
    uint64_t finished;
    uint32_t phase;
    uint32_t activations;
    const struct kv_cpu_op *active; /* workers read it after a successful claim */
    void *partial;

    struct kv_cpu_op ops[KV_STREAM_DEPTH];

    _Alignas(CACHE_LINE) _Atomic uint32_t pending;
    _Atomic uint64_t reached;
    _Alignas(CACHE_LINE) _Atomic uint64_t claims;
    _Atomic uint32_t unclosed;
};

struct thread {
    pthread_t id;
    struct pool *pool;
    int cpu; /* its own, or -1 */
    struct kv_cpu_worker worker;
    uint32_t next_stream;
    uint32_t stays;
    bool may_spin; /* the last wait was short */
};

struct pool {
    struct kv_device base;
    struct kv_cpu_worker caller; /* what runs in place has this */
    const struct kv_cpu_isa *isa;
    uint32_t thread_count;
    bool can_spin;
    struct thread threads[KV_CPU_WORKERS_MAX];
    struct stream streams[KV_CPU_STREAMS_MAX];

    _Alignas(CACHE_LINE) _Atomic uint32_t signal; /* futex: changes when work appears */
    _Atomic uint32_t sleepers;
    _Atomic uint32_t spinners;
    _Atomic uint32_t stream_limit; /* streams[0 .. limit) have been open at some time */
    atomic_bool stopping;
};

/* Room for the arguments of a full ring and for the end that a wrap leaves unused. */
static const size_t argument_ring_bytes =
    (size_t)(KV_STREAM_DEPTH + 1) * KV_CPU_ARGUMENT_BYTES;

void *kv_cpu_map(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void kv_cpu_unmap(void *memory, size_t bytes) {
    if (memory != NULL) KV_CHECK(munmap(memory, bytes) == 0);
}

/* ---- waking and waiting ------------------------------------------------------------ */

static void futex_wait(_Atomic uint32_t *word, uint32_t seen) {
    /* A signal or a changed word both just mean: look again. */
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, uint32_t count) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

/* `tasks` have been published, of which the caller will serve `own`.  The sum on signal and the
 * look at sleepers are both sequentially consistent, as are a worker's announcement in sleepers
 * and its futex's comparison with signal: one of the two sees the other, so no wake-up is lost. */
static void announce(struct pool *pool, uint32_t tasks, uint32_t own) {
    atomic_fetch_add_explicit(&pool->signal, 1, memory_order_seq_cst);
    uint32_t awake = atomic_load_explicit(&pool->spinners, memory_order_seq_cst);
    uint32_t asleep = atomic_load_explicit(&pool->sleepers, memory_order_seq_cst);
    if (tasks <= awake + own || asleep == 0) return;
    uint32_t wanted = tasks - awake - own;
    futex_wake(&pool->signal, wanted < asleep ? wanted : asleep);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Watches the signal until it changes or the time is over. */
static void watch(struct pool *pool, uint32_t seen, uint64_t start) {
    do {
        for (uint32_t i = 0; i < SPIN_LOOKS; i++) {
            if (atomic_load_explicit(&pool->signal, memory_order_relaxed) != seen) return;
            relax();
        }
    } while (now_ns() - start < SPIN_NS);
}

/* Returns when the signal may have changed since it was `seen`. */
static void wait_for_signal(struct thread *thread, uint32_t seen) {
    struct pool *pool = thread->pool;
    uint64_t start = now_ns();
    if (thread->may_spin) {
        if (atomic_fetch_add_explicit(&pool->spinners, 1, memory_order_seq_cst) == 0)
            watch(pool, seen, start);
        atomic_fetch_sub_explicit(&pool->spinners, 1, memory_order_seq_cst);
    }
    if (atomic_load_explicit(&pool->signal, memory_order_seq_cst) == seen) {
        atomic_fetch_add_explicit(&pool->sleepers, 1, memory_order_seq_cst);
        futex_wait(&pool->signal, seen);
        atomic_fetch_sub_explicit(&pool->sleepers, 1, memory_order_seq_cst);
    }
    thread->may_spin = pool->can_spin && now_ns() - start < SPIN_NS;
}

/* ---- the life of an operation -------------------------------------------------------- */

/* Publishes the tasks of the next phase that has any.  False: there is none. */
static bool phase_start(struct stream *stream, const struct kv_cpu_op *op, uint32_t own) {
    while (stream->phase < KV_CPU_PHASES && op->tasks[stream->phase] == 0) stream->phase++;
    if (stream->phase == KV_CPU_PHASES) return false;

    uint32_t tasks = op->tasks[stream->phase];
    stream->active = op;
    stream->activations++;
    /* Relaxed: the release of claims below publishes it, and active, to whoever claims. */
    atomic_store_explicit(&stream->unclosed, tasks, memory_order_relaxed);
    atomic_store_explicit(&stream->claims, (uint64_t)stream->activations << 32 | tasks,
                          memory_order_release);
    announce(stream->pool, tasks, own);
    return true;
}

/* Makes the front operation reached.  True: the baton is still ours, there is a next one. */
static bool op_finish(struct stream *stream, const struct kv_cpu_op *op) {
    if (op->finish != NULL) op->finish(op);
    /* Once reached, the engine may use the ring's place for another operation. */
    int notify_fd = op->notify_fd;
    stream->phase = 0;
    stream->finished++;
    /* Pairs with the acquire in reached(): the results are visible with the ticket. */
    atomic_store_explicit(&stream->reached, stream->finished, memory_order_release);
    if (notify_fd >= 0) {
        /* After reached, so that who is woken finds it so.  Failing means the counter is
         * full: the sleeper has not looked yet and will wake anyway. */
        uint64_t one = 1;
        ssize_t written = write(notify_fd, &one, sizeof one);
        (void)written;
    }
    /* Release: what we did to the stream, to the next baton holder.  Acquire: operations
     * that the engine submitted before it counted them. */
    return atomic_fetch_sub_explicit(&stream->pending, 1, memory_order_acq_rel) > 1;
}

/* The baton holder starts what can be started, and with it gives the baton away.  own: the
 * tasks that it will claim itself. */
static void stream_advance(struct stream *stream, uint32_t own) {
    for (;;) {
        const struct kv_cpu_op *op = &stream->ops[stream->finished % KV_STREAM_DEPTH];
        if (phase_start(stream, op, own)) return;
        if (!op_finish(stream, op)) return;
    }
}

/* Claims a task.  Acquire on success pairs with the release in phase_start(). */
static bool task_claim(struct stream *stream, uint32_t *left) {
    uint64_t claims = atomic_load_explicit(&stream->claims, memory_order_relaxed);
    while ((uint32_t)claims != 0) {
        if (atomic_compare_exchange_weak_explicit(&stream->claims, &claims, claims - 1,
                                                  memory_order_acquire, memory_order_relaxed)) {
            *left = (uint32_t)claims;
            return true;
        }
    }
    return false;
}

/* left: claims that were left before ours; tasks go out in rising order.  True: it was the
 * last of its phase to finish. */
static bool task_run(struct stream *stream, uint32_t left, struct kv_cpu_worker *worker) {
    const struct kv_cpu_op *op = stream->active;
    uint32_t phase = stream->phase;
    op->run[phase](op, op->tasks[phase] - left, worker);
    /* Release: this task's results; acquire, for the last one: everybody else's. */
    return atomic_fetch_sub_explicit(&stream->unclosed, 1, memory_order_acq_rel) == 1;
}

/* One task of any stream, beginning behind the stream served last. */
static bool run_one(struct thread *thread) {
    struct pool *pool = thread->pool;
    /* Pairs with the release in stream_open(): the stream's fields are there. */
    uint32_t limit = atomic_load_explicit(&pool->stream_limit, memory_order_acquire);
    for (uint32_t i = 0; i < limit; i++) {
        uint32_t index = (thread->next_stream + i) % limit, left;
        struct stream *stream = &pool->streams[index];
        if (!task_claim(stream, &left)) continue;
        bool last = task_run(stream, left, &thread->worker);
        bool stay = last && thread->stays < STAYS_MAX;
        thread->stays = stay ? thread->stays + 1 : 0;
        thread->next_stream = stay ? index : index + 1;
        if (last) {
            stream->phase++;
            stream_advance(stream, stay ? 1 : 0);
        }
        return true;
    }
    return false;
}

/* A CPU that went away meanwhile is no reason to fail: the thread runs anywhere then. */
static void stay_on(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void *thread_main(void *argument) {
    struct thread *thread = argument;
    struct pool *pool = thread->pool;
    if (thread->cpu >= 0) stay_on(thread->cpu);
    for (;;) {
        /* Read before looking for work: what is published later changes it.  Acquire, so
         * that the claims published before the signal are seen. */
        uint32_t seen = atomic_load_explicit(&pool->signal, memory_order_acquire);
        if (run_one(thread)) continue;
        if (atomic_load_explicit(&pool->stopping, memory_order_acquire)) return NULL;
        wait_for_signal(thread, seen);
    }
}

/* ---- what the engine thread calls ---------------------------------------------------- */

void *kv_cpu_arguments(struct kv_stream *base, size_t bytes) {
    struct stream *stream = (struct stream *)base;
    KV_CHECK(bytes <= KV_CPU_ARGUMENT_BYTES);
    /* An idle stream starts over, so that a lightly used one stays in the cache. */
    if (atomic_load_explicit(&stream->pending, memory_order_acquire) == 0)
        stream->argument_position = 0;

    size_t size = (bytes + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE;
    if (stream->argument_position + size > argument_ring_bytes) stream->argument_position = 0;
    void *memory = stream->arguments + stream->argument_position;
    stream->argument_position += size;
    return memory;
}

uint64_t kv_cpu_estimate(const struct kv_stream *base, uint64_t count, uint32_t each) {
    uint32_t lanes = ((const struct stream *)base)->pool->isa->lanes;
    if (lanes == 1 || count > UINT32_MAX) return UINT64_MAX;
    return count * each * 16 / lanes / 1000;
}

/* Pending is 0: the baton is ours for as long as we submit nothing, for nobody else can take it. */
static bool fits_in_place(struct stream *stream, const struct kv_cpu_op *op) {
    return stream->base.in_place && op->nanoseconds <= KV_IN_PLACE_NS &&
           atomic_load_explicit(&stream->pending, memory_order_acquire) == 0;
}

static void run_in_place(struct stream *stream, struct kv_cpu_op *op) {
    for (uint32_t phase = 0; phase < KV_CPU_PHASES; phase++)
        for (uint32_t task = 0; task < op->tasks[phase]; task++)
            op->run[phase](op, task, &stream->pool->caller);
    /* Counted as pending, so that finishing it is what finishing any other is. */
    atomic_fetch_add_explicit(&stream->pending, 1, memory_order_relaxed);
    bool more = op_finish(stream, op);
    KV_CHECK(!more);
}

void kv_cpu_submit(struct kv_stream *base, const struct kv_cpu_op *op) {
    struct stream *stream = (struct stream *)base;
    /* Acquire: the worker that reached an operation is through with its place. */
    uint64_t reached = atomic_load_explicit(&stream->reached, memory_order_acquire);
    KV_CHECK(stream->submitted - reached < KV_STREAM_DEPTH);

    struct kv_cpu_op *place = &stream->ops[stream->submitted % KV_STREAM_DEPTH];
    *place = *op;
    place->partial = stream->partial;
    stream->submitted++;
    if (fits_in_place(stream, place)) {
        run_in_place(stream, place);
        return;
    }
    /* Release: the operation, to the worker that finds it counted.  Acquire: the stream as
     * the last worker left it, if the baton is ours. */
    if (atomic_fetch_add_explicit(&stream->pending, 1, memory_order_acq_rel) == 0)
        stream_advance(stream, 0);
}

uint64_t kv_cpu_stream_mark(struct kv_stream *base) {
    return ((struct stream *)base)->submitted;
}

bool kv_cpu_stream_reached(struct kv_stream *base, uint64_t ticket) {
    struct stream *stream = (struct stream *)base;
    /* Pairs with the release in op_finish(). */
    return atomic_load_explicit(&stream->reached, memory_order_acquire) >= ticket;
}

enum kv_status kv_cpu_stream_open(struct kv_device *device, struct kv_stream **out) {
    struct pool *pool = (struct pool *)device;
    uint32_t index = 0;
    while (index < KV_CPU_STREAMS_MAX && pool->streams[index].open) index++;
    if (index == KV_CPU_STREAMS_MAX) return KV_BUSY;

    struct stream *stream = &pool->streams[index];
    stream->arguments = kv_cpu_map(argument_ring_bytes);
    stream->partial = kv_cpu_map(KV_CPU_PARTIAL_BYTES);
    if (stream->arguments == NULL || stream->partial == NULL) {
        kv_cpu_unmap(stream->arguments, argument_ring_bytes);
        kv_cpu_unmap(stream->partial, KV_CPU_PARTIAL_BYTES);
        return KV_BUSY;
    }
    stream->base.backend = device->backend;
    stream->pool = pool;
    stream->open = true;
    if (index >= atomic_load_explicit(&pool->stream_limit, memory_order_relaxed))
        atomic_store_explicit(&pool->stream_limit, index + 1, memory_order_release);
    *out = &stream->base;
    return KV_OK;
}

/* The stream's place stays where it is, numbers and all: a worker may be looking at its
 * claims, of which there are none. */
void kv_cpu_stream_close(struct kv_stream *base) {
    struct stream *stream = (struct stream *)base;
    KV_CHECK(stream->open);
    const struct timespec nap = {.tv_nsec = 20 * 1000};
    while (atomic_load_explicit(&stream->pending, memory_order_acquire) != 0)
        nanosleep(&nap, NULL);
    kv_cpu_unmap(stream->arguments, argument_ring_bytes);
    kv_cpu_unmap(stream->partial, KV_CPU_PARTIAL_BYTES);
    stream->arguments = NULL;
    stream->argument_position = 0;
    stream->partial = NULL;
    stream->open = false;
}

/* ---- opening and closing --------------------------------------------------------------- */

static const size_t worker_bytes =
    KV_CPU_SCRATCH + (2 * KV_HEAD_DIM_MAX + 1) * KV_CPU_VECTORS * sizeof(float);

/* The CPUs that this process may use, KV_CPU_WORKERS_MAX at the most. */
struct cpus {
    uint32_t count;
    int number[KV_CPU_WORKERS_MAX]; /* -1: not known */
};

static void cpus_usable(struct cpus *cpus) {
    cpu_set_t set;
    cpus->count = 0;
    /* Fails where there are more CPUs than the set has bits: then there are enough. */
    bool known = sched_getaffinity(0, sizeof set, &set) == 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && cpus->count < KV_CPU_WORKERS_MAX; cpu++)
        if (!known || CPU_ISSET(cpu, &set)) cpus->number[cpus->count++] = known ? cpu : -1;
}

static bool worker_open(struct kv_cpu_worker *worker, const struct kv_cpu_isa *isa) {
    uint8_t *memory = kv_cpu_map(worker_bytes);
    if (memory == NULL) return false;
    size_t vectors_bytes = sizeof(float[KV_CPU_VECTORS][KV_HEAD_DIM_MAX]);
    *worker = (struct kv_cpu_worker){
        .isa = isa,
        .scratch = memory,
        .query = (void *)(memory + KV_CPU_SCRATCH),
        .out = (void *)(memory + KV_CPU_SCRATCH + vectors_bytes),
        .lse = (void *)(memory + KV_CPU_SCRATCH + 2 * vectors_bytes),
    };
    return true;
}

const struct kv_cpu_isa *kv_cpu_device_isa(const struct kv_device *device) {
    return ((const struct pool *)device)->isa;
}

static enum kv_status thread_start(struct pool *pool, struct thread *thread) {
    if (!worker_open(&thread->worker, pool->isa)) return KV_BUSY;
    thread->pool = pool;
    thread->may_spin = pool->can_spin;

    /* Signals are for the threads of the service that wait for them; but a fault is the thread's own, and who
     * has a handler for it (a sanitizer, a crash report) wants to see it. */
    static const int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    sigset_t all, before;
    sigfillset(&all);
    for (size_t i = 0; i < sizeof faults / sizeof faults[0]; i++)
        sigdelset(&all, faults[i]);
    KV_CHECK(pthread_sigmask(SIG_SETMASK, &all, &before) == 0);
    int error = pthread_create(&thread->id, NULL, thread_main, thread);
    KV_CHECK(pthread_sigmask(SIG_SETMASK, &before, NULL) == 0);
    if (error == 0) {
        pool->thread_count++;
        return KV_OK;
    }
    kv_cpu_unmap(thread->worker.scratch, worker_bytes);
    return KV_BUSY;
}

enum kv_status kv_cpu_open(const struct kv_device_options *options, struct kv_device **out) {
    if (options->workers > KV_CPU_WORKERS_MAX) return KV_INVALID;
    const struct kv_cpu_isa *isa = kv_cpu_isa_find(options->name);
    if (isa == NULL || !isa->available()) return KV_NOT_FOUND;
    KV_CHECK(isa->lanes > 0);
    struct pool *pool = kv_cpu_map(sizeof *pool);
    if (pool == NULL) return KV_BUSY;

    pool->base.backend = &kv_cpu_backend;
    pool->base.name = isa->name;
    pool->isa = isa;
    struct cpus cpus;
    cpus_usable(&cpus);
    pool->can_spin = cpus.count > 1;
    if (!worker_open(&pool->caller, isa)) {
        kv_cpu_unmap(pool, sizeof *pool);
        return KV_BUSY;
    }
    uint32_t workers = options->workers != 0 ? options->workers : cpus.count;
    for (uint32_t i = 0; i < workers; i++) {
        pool->threads[i].cpu = workers == cpus.count ? cpus.number[i] : -1;
        enum kv_status status = thread_start(pool, &pool->threads[i]);
        if (status == KV_OK) continue;
        kv_cpu_close(&pool->base);
        return status;
    }
    *out = &pool->base;
    return KV_OK;
}

void kv_cpu_close(struct kv_device *device) {
    struct pool *pool = (struct pool *)device;
    for (uint32_t i = 0; i < KV_CPU_STREAMS_MAX; i++) KV_CHECK(!pool->streams[i].open);
    atomic_store_explicit(&pool->stopping, true, memory_order_release);
    atomic_fetch_add_explicit(&pool->signal, 1, memory_order_seq_cst);
    futex_wake(&pool->signal, INT_MAX);
    for (uint32_t i = 0; i < pool->thread_count; i++) {
        KV_CHECK(pthread_join(pool->threads[i].id, NULL) == 0);
        kv_cpu_unmap(pool->threads[i].worker.scratch, worker_bytes);
    }
    kv_cpu_unmap(pool->caller.scratch, worker_bytes);
    kv_cpu_unmap(pool, sizeof *pool);
}
