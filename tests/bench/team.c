/* SPDX-License-Identifier: Apache-2.0 */
/* team.c - see team.h.  Threads sleep between jobs and take parts from a counter. */
#include "tests/bench/team.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>

#include "proto/kv_check.h"

enum { THREADS_MAX = 256 };

struct team {
    uint32_t threads;
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
};

static void take_parts(struct team *team) {
    for (uint32_t i; (i = atomic_fetch_add(&team->next, 1)) < team->parts;)
        team->part(team->context, i);
}

static void *member(void *argument) {
    struct team *team = argument;
    uint64_t seen     = 0;
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
    take_parts(team);
    pthread_mutex_lock(&team->mutex);
    while (team->busy != 0)
        pthread_cond_wait(&team->done, &team->mutex);
    pthread_mutex_unlock(&team->mutex);
}

uint32_t team_threads(const struct team *team) {
    return team->threads;
}
