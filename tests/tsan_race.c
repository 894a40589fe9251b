/* SPDX-License-Identifier: Apache-2.0 */
/* tsan_race.c - two races, for tests/tsan_test.sh: the sanitizer builds must still see both.
 *
 * `plain` is an access the compiler instrumented; `copied` goes through memcpy, as those of the libraries
 * in tests/tsan.supp do; `none` has a lock and must pass. The threads meet at nothing but their creation
 * and their end. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { ROUNDS = 1000, BYTES = 256 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static volatile long counter;
static char shared[BYTES];
static const char *kind;

static void *racer(void *number) {
    char mine[BYTES];
    volatile size_t bytes = BYTES; /* unknown to the compiler, so that memcpy stays a call */
    memset(mine, *(const int *)number, sizeof mine);
    for (int i = 0; i < ROUNDS; i++) {
        if (!strcmp(kind, "none")) pthread_mutex_lock(&lock);
        if (!strcmp(kind, "copied")) {
            memcpy(shared, mine, bytes);
        } else {
            counter++;
        }
        if (!strcmp(kind, "none")) pthread_mutex_unlock(&lock);
        if (i % 100 == 0) usleep(100);
    }
    return NULL;
}

int main(int argc, char **argv) {
    static int numbers[2] = {1, 2};
    pthread_t threads[2];
    kind = argc == 2 ? argv[1] : "";
    if (strcmp(kind, "none") && strcmp(kind, "plain") && strcmp(kind, "copied")) return 2;
    for (int i = 0; i < 2; i++) {
        if (pthread_create(&threads[i], NULL, racer, &numbers[i])) return 3;
    }
    for (int i = 0; i < 2; i++) {
        if (pthread_join(threads[i], NULL)) return 3;
    }
    printf("%ld\n", counter + shared[0]);
    return 0;
}
