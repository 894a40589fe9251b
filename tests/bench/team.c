/* SPDX-License-Identifier: Apache-2.0 */
/* team.c - see team.h.  Threads sleep between jobs and take parts from a counter.  Where there are as many as
 * CPUs each has one of its own, as kivid's workers have. */
#include "tests/bench/team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#include "proto/kv_check.h"

enum { THREADS_MAX = 256 };

struct team {
    uint32_t threads;
    bool placed;      /* each member on a CPU of its own: */
    cpu_set_t usable; /* one of these */
    pthread_t thread[THREADS_MAX];
    pthread_mutex_t mutex; /* guards all that is not atomic */
    pthread_cond_t work, done;
    uint64_t job; /* number of the current one */
    uint32_t busy;
    bool closing;
    void (*part)(void *context, uint32_t index);
    void *context;
    uint32_t parts;
    atomic_uint next;
    atomic_uint members; /* numbered so far */
};

static void take_parts(struct team *team) {
    for (uint32_t i; (i = atomic_fetch_add(&team->next, 1)) < team->parts;)
        team->part(team->context, i);
}

/* The calling thread, to the usable CPU with this index. */
static void stay_on(const struct team *team, uint32_t index) {
    cpu_set_t own;
    CPU_ZERO(&own);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &team->usable) && index-- == 0) CPU_SET(cpu, &own);
    sched_setaffinity(0, sizeof own, &own);
}

static void *member(void *argument) {
    struct team *team = argument;
    uint64_t seen     = 0;
    if (team->placed) stay_on(team, atomic_fetch_add(&team->members, 1));
    pthread_mutex_lock(&team->mutex);
    for (;;) {
        while (team->job == seen && !team->closing)
            pthread_cond_wait(&team->work, &team->mutex);
        if (team->closing) break;
        seen = team->job;
        pthread_mutex_unlock(&team->mutex);
        take_parts(team);
        pthread_mutex_lock(&team->mutex);
        if (--team->busy == 0) pthread_cond_signal(&team->done);
    }
    pthread_mutex_unlock(&team->mutex);
    return NULL;
}

struct team *team_open(uint32_t threads) {
    KV_CHECK(threads >= 1 && threads <= THREADS_MAX);
    struct team *team = calloc(1, sizeof *team);
    KV_CHECK(team != NULL);
    team->threads = threads;
    team->placed  = threads > 1 && sched_getaffinity(0, sizeof team->usable, &team->usable) == 0 &&
                   CPU_COUNT(&team->usable) == (int)threads;
    atomic_init(&team->members, 1); /* the caller of team_run() is the first */
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->work, NULL);
    pthread_cond_init(&team->done, NULL);
    for (uint32_t i = 1; i < threads; i++)
        KV_CHECK(pthread_create(&team->thread[i], NULL, member, team) == 0);
    return team;
}

void team_close(struct team *team) {
    pthread_mutex_lock(&team->mutex);
    team->closing = true;
    pthread_cond_broadcast(&team->work);
    pthread_mutex_unlock(&team->mutex);
    for (uint32_t i = 1; i < team->threads; i++)
        pthread_join(team->thread[i], NULL);
    free(team);
}

void team_run(struct team *team, uint32_t parts, void (*part)(void *context, uint32_t index),
              void *context) {
    pthread_mutex_lock(&team->mutex);
    team->part    = part;
    team->context = context;
    team->parts   = parts;
    team->busy    = team->threads - 1;
    atomic_store(&team->next, 0);
    team->job++;
    pthread_cond_broadcast(&team->work);
    pthread_mutex_unlock(&team->mutex);
    if (team->placed) stay_on(team, 0);
    take_parts(team);
    if (team->placed) sched_setaffinity(0, sizeof team->usable, &team->usable);
    pthread_mutex_lock(&team->mutex);
    while (team->busy != 0)
        pthread_cond_wait(&team->done, &team->mutex);
    pthread_mutex_unlock(&team->mutex);
}

uint32_t team_threads(const struct team *team) {
    return team->threads;
}
