/* SPDX-License-Identifier: Apache-2.0 */
/* engine_faults_test.c - a bad disk, as a client sees it.
 *
 * Storage has its own tests of every failing read and write; here is what becomes of them on the way out:
 * the code of the contract, nothing wrong in an answer, nothing left behind, and the service goes on.
 *
 * A session of 1280 tokens is committed and the engine started anew, so that every block is on disk only
 * and an Attend has to read.  The disk's mood is the test's to change at any time. */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "storage/io_fault.h"
#include "tests/service/engine_lab.h"

enum { TOKENS = 1280, HEADS = 2, HEADS_Q = 4, DIM = 64, ANSWER = HEADS_Q * DIM + HEADS_Q };

/* Which requests fail, how, and how late they are.  Written by the test, read by the engine thread. */
static struct {
    atomic_int kind, error;
    atomic_uint_fast64_t delay_us;
    atomic_uint failed;
} mood;

static void mood_ask(void *context, const struct kv_io_request *request, struct kv_io_fault *fault) {
    if ((int)request->kind != atomic_load(&mood.kind)) return;
    fault->error = atomic_load(&mood.error);
    fault->delay_us = atomic_load(&mood.delay_us);
    if (fault->error || fault->delay_us) atomic_fetch_add(&mood.failed, 1);
}

static void mood_set(enum kv_io_kind kind, int error, uint64_t delay_us) {
    atomic_store(&mood.error, 0);
    atomic_store(&mood.delay_us, 0);
    atomic_store(&mood.failed, 0);
    atomic_store(&mood.kind, (int)kind);
    atomic_store(&mood.delay_us, delay_us);
    atomic_store(&mood.error, error);
}

static void mood_good(void) {
    mood_set(KV_IO_KINDS, 0, 0);
}

static uint64_t clock_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

struct setting {
    char path[64];
    struct lab lab;
    struct lab_options options;
    struct kv_layout layout;
    struct kv_digest fingerprint;
    uint64_t session;
    float *rows;
    float truth[ANSWER]; /* what the session answers while all is well */
};

static enum kv_status append(struct setting *s, uint64_t session, uint32_t begin, uint32_t end) {
    size_t row = HEADS * DIM;
    enum kv_status status = KV_OK;
    for (uint32_t t = begin; t < end && status == KV_OK; t += 128)
        for (uint32_t l = 0; l < s->layout.layers && status == KV_OK; l++) {
            const float *from = s->rows + ((size_t)l * TOKENS + t) * row;
            struct kv_request *request =
                lab_append(&s->lab, session, &s->layout, l, t, 128, from, from + 64, NULL);
            status = request->status;
            lab_done(&s->lab, request);
        }
    return status;
}

static struct kv_request *attend_begin(struct setting *s, uint64_t deadline_us) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_ATTEND);
    size_t count = HEADS_Q * DIM;
    request->deadline_us = deadline_us;
    request->attend.item_count = 1;
    request->attend.items[0] =
        (struct kv_attend_item){.session = s->session, .rows = 1, .no_energy = true};
    lab_encode(s->layout.dtype, s->rows, request->staging, count);
    request->bytes_in = count * kv_dtype_bytes(s->layout.dtype);
    lab_submit(&s->lab, request);
    return request;
}

/* The item's status, or the request's if it did not get that far. */
static enum kv_status attend(struct setting *s, float answer[ANSWER]) {
    struct kv_request *request = attend_begin(s, 0);
    lab_wait(request);
    enum kv_status status = request->status;
    if (status == KV_OK) {
        const struct kv_attend_item *item = &request->attend.items[0];
        status = item->status;
        /* A client learns whose cache it was, and from which token on. */
        if (status != KV_OK) {
            assert_string_equal(item->field, "session");
            assert_non_null(strstr(item->message, "the block at token "));
            assert_int_equal(item->length, TOKENS); /* and that its length is what it was */
        }
    }
    assert_int_equal(request->reply_bytes, status == KV_OK ? ANSWER * sizeof(float) : 0);
    if (status == KV_OK)
        memcpy(answer, request->staging + request->reply_offset, ANSWER * sizeof(float));
    lab_done(&s->lab, request);
    return status;
}

static void attends_rightly(struct setting *s) {
    float answer[ANSWER];
    assert_int_equal(attend(s, answer), KV_OK);
    assert_memory_equal(answer, s->truth, sizeof answer);
}

static void reopen(struct setting *s) {
    lab_open(&s->lab, &s->options);
    s->fingerprint = lab_register(&s->lab, &s->layout);
    s->session = lab_open_session(&s->lab, "text", &s->fingerprint);
}

static int setup(void **state) {
    struct setting *s = calloc(1, sizeof *s);
    lab_directory(s->path);
    mood_good();
    kv_io_fault_set(mood_ask, NULL);
    s->options = (struct lab_options){.path = s->path, .arena_bytes = 8 << 20, .tail_bytes_max = 4 << 20};
    s->layout = lab_layout("kivi2", 2, HEADS, HEADS_Q, DIM, KV_DTYPE_F16);
    size_t count = (size_t)s->layout.layers * TOKENS * HEADS * DIM + 64;
    s->rows = malloc(count * sizeof(float));
    struct lab_random random = {9};
    lab_rows(&random, s->rows, count, DIM);
    reopen(s);
    assert_int_equal(append(s, s->session, 0, TOKENS), KV_OK);
    assert_int_equal(attend(s, s->truth), KV_OK);
    assert_int_equal(lab_commit(&s->lab, s->session, KV_SYNCED), KV_OK);
    lab_close(&s->lab);
    reopen(s);
    *state = s;
    return 0;
}

static int teardown(void **state) {
    struct setting *s = *state;
    mood_good();
    lab_close(&s->lab);
    kv_io_fault_set(NULL, NULL);
    lab_directory_remove(s->path);
    free(s->rows);
    free(s);
    return 0;
}

/* ---- Reads --------------------------------------------------------------------------------------- */

static void a_read_that_fails_is_said_and_may_be_repeated(void **state) {
    struct setting *s = *state;
    float answer[ANSWER], *keys = malloc(TOKENS * HEADS * DIM * sizeof(float));
    float *values = malloc(TOKENS * HEADS * DIM * sizeof(float));
    mood_set(KV_IO_READ, EIO, 0);
    assert_int_equal(attend(s, answer), KV_IO_ERROR);
    assert_int_equal(lab_fetch(&s->lab, s->session, &s->layout, 0, TOKENS, keys, values), KV_IO_ERROR);
    assert_true(atomic_load(&mood.failed) >= 2);
    assert_true(kv_engine_ready(s->lab.engine));
    mood_good();
    attends_rightly(s);
    assert_int_equal(lab_fetch(&s->lab, s->session, &s->layout, 0, TOKENS, keys, values), KV_OK);
    assert_int_equal(lab_stats(&s->lab).store.corruptions, 0);
    free(keys);
    free(values);
}

/* Every page of every segment is spoilt in its middle while the engine runs. */
static void spoil_segments(const char *path) {
    char name[512];
    DIR *directory = opendir(path);
    assert_non_null(directory);
    for (struct dirent *entry; (entry = readdir(directory));) {
        if (strncmp(entry->d_name, "segment-", 8) != 0) continue;
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        int file = open(name, O_RDWR | O_CLOEXEC);
        assert_true(file >= 0);
        uint8_t byte;
        for (off_t at = 2048; pread(file, &byte, 1, at) == 1; at += 4096) {
            byte ^= 0x10;
            assert_int_equal(pwrite(file, &byte, 1, at), 1);
        }
        fsync(file);
        close(file);
    }
    closedir(directory);
}

static void spoilt_bytes_are_never_attended(void **state) {
    struct setting *s = *state;
    float answer[ANSWER];
    spoil_segments(s->path);
    assert_int_equal(attend(s, answer), KV_CORRUPT);
    /* The block is gone and stays gone: a second try must not find it either. */
    assert_int_not_equal(attend(s, answer), KV_OK);
    assert_true(lab_stats(&s->lab).store.corruptions > 0);
    assert_true(kv_engine_ready(s->lab.engine));
    uint64_t other = lab_open_session(&s->lab, "another", &s->fingerprint);
    assert_int_equal(append(s, other, 0, TOKENS), KV_OK);
    s->session = other;
    attends_rightly(s);
}

/* ---- A restore that takes long --------------------------------------------------------------------- */

/* The answer comes at the deadline, not when the disk is done; then all is as it was. */
static void a_deadline_does_not_wait_for_the_disk(void **state) {
    struct setting *s = *state;
    const uint64_t slow = 3000000, patience = 100000;
    mood_set(KV_IO_READ, 0, slow);
    uint64_t began = clock_us();
    struct kv_request *request = attend_begin(s, began + patience);
    lab_wait(request);
    uint64_t took = clock_us() - began;
    assert_int_equal(request->status, KV_DEADLINE);
    assert_int_equal(request->reply_bytes, 0);
    assert_true(atomic_load(&mood.failed) > 0); /* it was reading */
    assert_true(took >= patience && took < slow);
    lab_done(&s->lab, request);
    mood_good();
    attends_rightly(s);
}

static void a_cancelled_restore_is_let_go(void **state) {
    struct setting *s = *state;
    mood_set(KV_IO_READ, 0, 2000000);
    uint64_t began = clock_us();
    struct kv_request *request = attend_begin(s, 0);
    while (atomic_load(&mood.failed) == 0 && clock_us() - began < 10000000) usleep(1000);
    atomic_store(&request->cancelled, true);
    lab_wait(request);
    assert_int_equal(request->status, KV_CANCELLED);
    assert_int_equal(request->reply_bytes, 0);
    lab_done(&s->lab, request);
    mood_good();
    attends_rightly(s);
    assert_int_equal(lab_close_session(&s->lab, s->session, false), KV_OK);
}

/* How many requests with a buffer can be had at once; all are given back. */
static uint32_t buffers_free(struct setting *s) {
    struct kv_request *taken[256];
    uint32_t count = 0;
    while (count < 256 && (taken[count] = kv_engine_acquire(s->lab.engine, true))) count++;
    for (uint32_t i = 0; i < count; i++) kv_engine_release(s->lab.engine, taken[i]);
    return count;
}

/* Deadlines and cancellations at any moment of a restore from disk: in time there is the right answer, too
 * late the right code and nothing else.  What was being read is whole and is served afterwards, every
 * buffer is back, and (lab_close() checks it) no block is left pinned. */
static void a_restore_may_be_stopped_at_any_moment(void **state) {
    enum { ROUNDS = 40, SLOW_US = 20000 };
    struct setting *s = *state;
    struct lab_random random = {lab_seed()};
    uint32_t buffers = buffers_free(s), stopped = 0;
    for (int i = 0; i < ROUNDS; i++) {
        lab_close(&s->lab); /* cold again */
        reopen(s);
        mood_set(KV_IO_READ, 0, SLOW_US);
        bool by_deadline = i % 2;
        uint64_t moment = (uint64_t)(lab_uniform(&random) * 2 * SLOW_US);
        struct kv_request *request = attend_begin(s, by_deadline ? clock_us() + moment : 0);
        if (!by_deadline) {
            usleep((useconds_t)moment);
            atomic_store(&request->cancelled, true);
        }
        lab_wait(request);
        if (request->status == KV_OK) {
            assert_int_equal(request->attend.items[0].status, KV_OK);
            assert_memory_equal(request->staging + request->reply_offset, s->truth, sizeof s->truth);
        } else {
            assert_int_equal(request->status, by_deadline ? KV_DEADLINE : KV_CANCELLED);
            assert_int_equal(request->reply_bytes, 0);
            stopped++;
        }
        lab_done(&s->lab, request);
        mood_good();
        attends_rightly(s);
        assert_int_equal(buffers_free(s), buffers);
        assert_int_equal(lab_stats(&s->lab).store.corruptions, 0);
    }
    assert_true(stopped > ROUNDS / 8); /* else it tests nothing */
}

/* A page of a block in the middle of the context: layer 1's, by the session or by the block's digest. */
static struct kv_request *page_request(struct setting *s, enum kv_request_kind kind,
                                       const struct kv_digest *digest) {
    struct kv_request *request = lab_request(&s->lab, kind);
    if (kind == KV_REQUEST_FETCH) {
        request->fetch = (struct kv_fetch){.session = s->session, .layer = 1, .begin = 640, .tokens = 128};
    } else {
        request->get = (struct kv_get){.fingerprint = s->fingerprint, .digest = *digest, .layer = 1};
        request->get.form = KV_FORM_FULL;
    }
    return request;
}

/* The digest of the block whose first token is 640. */
static struct kv_digest digest_in_the_middle(struct setting *s) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_DESCRIBE);
    strcpy(request->named.name, "text");
    assert_int_equal(lab_call(&s->lab, request)->status, KV_OK);
    assert_true(request->named.digest_count > 5);
    struct kv_digest digest;
    memcpy(&digest, request->staging + request->reply_offset + 5 * sizeof digest, sizeof digest);
    lab_done(&s->lab, request);
    return digest;
}

/* Fetch and Get of a block on disk, stopped at any moment of reading it: as for Attend above. */
static void pages_may_be_stopped_at_any_moment(struct setting *s, enum kv_request_kind kind) {
    enum { ROUNDS = 40, SLOW_US = 10000 };
    struct lab_random random = {lab_seed()};
    uint32_t buffers = buffers_free(s), stopped = 0;
    struct kv_digest digest = digest_in_the_middle(s);
    struct kv_request *request = lab_call(&s->lab, page_request(s, kind, &digest));
    assert_int_equal(request->status, KV_OK);
    size_t bytes = request->reply_bytes;
    uint8_t *truth = malloc(bytes);
    memcpy(truth, request->staging + request->reply_offset, bytes);
    lab_done(&s->lab, request);

    for (int i = 0; i < ROUNDS; i++) {
        lab_close(&s->lab); /* cold again */
        reopen(s);
        mood_set(KV_IO_READ, 0, SLOW_US);
        bool by_deadline = i % 2;
        uint64_t moment = (uint64_t)(lab_uniform(&random) * 2 * SLOW_US);
        request = page_request(s, kind, &digest);
        if (by_deadline) request->deadline_us = clock_us() + moment;
        lab_submit(&s->lab, request);
        if (!by_deadline) {
            usleep((useconds_t)moment);
            atomic_store(&request->cancelled, true);
        }
        lab_wait(request);
        if (request->status != KV_OK) {
            assert_int_equal(request->status, by_deadline ? KV_DEADLINE : KV_CANCELLED);
            assert_int_equal(request->reply_bytes, 0);
            lab_done(&s->lab, request);
            mood_good();
            request = lab_call(&s->lab, page_request(s, kind, &digest));
            assert_int_equal(request->status, KV_OK);
            stopped++;
        }
        assert_int_equal(request->reply_bytes, bytes);
        assert_memory_equal(request->staging + request->reply_offset, truth, bytes);
        lab_done(&s->lab, request);
        mood_good();
        assert_int_equal(buffers_free(s), buffers);
        assert_int_equal(lab_stats(&s->lab).store.corruptions, 0);
    }
    free(truth);
    assert_true(stopped > ROUNDS / 8); /* else it tests nothing */
}

static void a_fetch_may_be_stopped_at_any_moment(void **state) {
    pages_may_be_stopped_at_any_moment(*state, KV_REQUEST_FETCH);
}

static void a_get_may_be_stopped_at_any_moment(void **state) {
    pages_may_be_stopped_at_any_moment(*state, KV_REQUEST_GET);
}

/* ---- Writes -------------------------------------------------------------------------------------- */

/* While the disk refuses, what is in memory stays there and is answered from; a commit says that it has
 * not happened; when the disk is well again it does. */
static void refused_writes(struct setting *s, enum kv_io_kind kind, int error,
                           enum kv_durability durability) {
    uint64_t other = lab_open_session(&s->lab, "new", &s->fingerprint);
    mood_set(kind, error, 0);
    assert_int_equal(append(s, other, 0, TOKENS), KV_OK);
    s->session = other;
    attends_rightly(s);
    enum kv_status status = lab_commit(&s->lab, other, durability);
    if (status != KV_IO_ERROR && status != KV_BUSY) print_error("commit: %d\n", status);
    assert_true(status == KV_IO_ERROR || status == KV_BUSY);
    assert_true(atomic_load(&mood.failed) > 0);
    assert_true(kv_engine_ready(s->lab.engine));
    attends_rightly(s);
    mood_good();
    uint64_t began = clock_us();
    do status = lab_commit(&s->lab, other, durability);
    while (status != KV_OK && clock_us() - began < 20000000 && usleep(50000) == 0);
    assert_int_equal(status, KV_OK);
    lab_close(&s->lab);
    reopen(s);
    s->session = lab_open_session(&s->lab, "new", &s->fingerprint);
    attends_rightly(s);
}

static void writes_that_fail(void **state) {
    refused_writes(*state, KV_IO_WRITE, EIO, KV_WRITTEN);
}
static void a_full_disk(void **state) {
    refused_writes(*state, KV_IO_WRITE, ENOSPC, KV_WRITTEN);
}
static void a_sync_that_fails(void **state) {
    refused_writes(*state, KV_IO_SYNC, EIO, KV_SYNCED);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(a_read_that_fails_is_said_and_may_be_repeated),
        TEST(spoilt_bytes_are_never_attended),
        TEST(a_deadline_does_not_wait_for_the_disk),
        TEST(a_cancelled_restore_is_let_go),
        TEST(a_restore_may_be_stopped_at_any_moment),
        TEST(a_fetch_may_be_stopped_at_any_moment),
        TEST(a_get_may_be_stopped_at_any_moment),
        TEST(writes_that_fail),
        TEST(a_full_disk),
        TEST(a_sync_that_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
