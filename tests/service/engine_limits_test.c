/* SPDX-License-Identifier: Apache-2.0 */
/* engine_limits_test.c - full, late, cancelled, stopping: the answer is prompt and right, and
 * afterwards everything is as it was. */
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "tests/service/engine_lab.h"

static uint64_t clock_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static float rows[1024 * 128];

static int rows_fill(void **state) {
    struct lab_random random = {4};
    lab_rows(&random, rows, 1024 * 128, 64);
    return 0;
}

/* Appends without ids; the status. */
static enum kv_status append(struct lab *lab, uint64_t session, const struct kv_layout *layout,
                             uint32_t layer, uint64_t expected, uint32_t tokens) {
    struct kv_request *request =
        lab_append(lab, session, layout, layer, expected, tokens, rows, rows, NULL);
    enum kv_status status = request->status;
    if (status == KV_BUSY) {
        assert_int_equal(request->scope, KV_SCOPE_NODE);
        assert_true(request->retry_ms > 0 && request->message[0]);
    }
    lab_done(lab, request);
    return status;
}

/* ---- Full ---------------------------------------------------------------------------------------- */

/* The tail's cap: the append that does not fit is BUSY and changes nothing; closing gives all of
 * it back. */
static void the_tail_has_a_cap(void **state) {
    struct lab_options options = {.tail_bytes_max = 1 << 20};
    struct lab lab;
    lab_open(&lab, &options);
    struct kv_layout layout = lab_layout("kivi2", 4, 2, 2, 64, KV_DTYPE_F16);
    layout.sink_blocks = 0;
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    struct kv_engine_stats before = lab_stats(&lab);
    uint64_t sessions[8];
    uint32_t fit = 0;
    for (; fit < 8; fit++) { /* 4 layers of 64 KiB each */
        char name[16];
        snprintf(name, sizeof name, "s%u", fit);
        sessions[fit] = lab_open_session(&lab, name, &fingerprint);
        enum kv_status status = KV_OK;
        for (uint32_t l = 0; l < 4 && status == KV_OK; l++)
            status = append(&lab, sessions[fit], &layout, l, 0, 10);
        if (status == KV_BUSY) break;
        assert_int_equal(status, KV_OK);
    }
    assert_true(fit >= 2 && fit < 8);
    struct kv_engine_stats full = lab_stats(&lab);
    assert_true(full.tail_bytes <= full.tail_bytes_max);
    assert_int_equal(append(&lab, sessions[fit], &layout, 3, 0, 10), KV_BUSY);
    assert_int_equal(lab_stats(&lab).tail_bytes, full.tail_bytes);
    for (uint32_t i = 0; i <= fit; i++)
        assert_int_equal(lab_close_session(&lab, sessions[i], false), KV_OK);
    struct kv_engine_stats after = lab_stats(&lab);
    assert_int_equal(after.tail_bytes, 0);
    assert_int_equal(after.sessions_known, 0);
    assert_int_equal(after.store.arena_bytes_used, before.store.arena_bytes_used);
    lab_close(&lab);
}

/* Prefills that have brought one layer of many hold reserved blocks; when the arena is full of
 * them the next one is BUSY, and closing them makes room again. */
static void half_done_prefills_fill_the_arena(void **state) {
    struct lab_options options = {.arena_bytes = 4 << 20, .tail_bytes_max = 3 << 20};
    struct lab lab;
    lab_open(&lab, &options);
    struct kv_layout layout = lab_layout("kivi2", 8, 2, 2, 64, KV_DTYPE_F16);
    layout.sink_blocks = 0;
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    uint64_t baseline = lab_stats(&lab).store.arena_bytes_used;
    uint64_t session = lab_open_session(&lab, "half", &fingerprint);
    uint32_t length = 0;
    enum kv_status status = KV_OK;
    while (status == KV_OK && length < 100000) {
        status = append(&lab, session, &layout, 0, length, 512);
        if (status == KV_OK) length += 512;
    }
    assert_int_equal(status, KV_BUSY);
    assert_true(length > 2048);
    assert_int_equal(lab_close_session(&lab, session, false), KV_OK);
    assert_int_equal(lab_stats(&lab).store.arena_bytes_used, baseline);
    session = lab_open_session(&lab, "whole", &fingerprint);
    for (uint32_t l = 0; l < 8; l++)
        assert_int_equal(append(&lab, session, &layout, l, 0, 256), KV_OK);
    lab_close(&lab);
}

static enum kv_status try_open(struct lab *lab, const char *name,
                               const struct kv_digest *fingerprint, uint64_t *session) {
    struct kv_request *request = lab_request(lab, KV_REQUEST_OPEN);
    strcpy(request->open.name, name);
    request->open.fingerprint = *fingerprint;
    enum kv_status status = lab_call(lab, request)->status;
    *session = request->open.session;
    lab_done(lab, request);
    return status;
}

static void tables_are_bounded(void **state) {
    struct lab_options options = {.sessions_open_max = 3, .sessions_max = 5, .layouts_max = 2};
    struct lab lab;
    lab_open(&lab, &options);
    struct kv_layout layout = lab_layout("raw16", 1, 1, 1, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    uint64_t handles[8];
    static const char *const names[] = {"a", "b", "c", "d", "e", "f"};
    for (int i = 0; i < 3; i++)
        assert_int_equal(try_open(&lab, names[i], &fingerprint, &handles[i]), KV_OK);
    assert_int_equal(try_open(&lab, "d", &fingerprint, &handles[3]), KV_BUSY);
    assert_int_equal(lab_stats(&lab).sessions_known, 3);
    assert_int_equal(lab_close_session(&lab, handles[0], true), KV_OK);
    for (int i = 3; i < 5; i++) { /* committed ones stay known */
        assert_int_equal(try_open(&lab, names[i], &fingerprint, &handles[i]), KV_OK);
        assert_int_equal(lab_close_session(&lab, handles[i], true), KV_OK);
    }
    assert_int_equal(try_open(&lab, "f", &fingerprint, &handles[5]), KV_BUSY);
    assert_int_equal(try_open(&lab, "a", &fingerprint, &handles[0]), KV_OK);

    layout.window_tokens = 256;
    lab_register(&lab, &layout);
    struct kv_request *request = lab_request(&lab, KV_REQUEST_REGISTER);
    request->reg.layout = layout;
    request->reg.layout.window_tokens = 512;
    assert_int_equal(lab_call(&lab, request)->status, KV_BUSY);
    lab_done(&lab, request);
    assert_int_equal(lab_stats(&lab).layouts, 2);
    lab_close(&lab);
}

static void the_longest_session_is_a_limit(void **state) {
    struct lab_options options = {.tokens_max = 300};
    struct lab lab;
    lab_open(&lab, &options);
    struct kv_layout layout = lab_layout("raw16", 1, 1, 1, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    uint64_t session = lab_open_session(&lab, "long", &fingerprint);
    assert_int_equal(append(&lab, session, &layout, 0, 0, 301), KV_INVALID);
    assert_int_equal(append(&lab, session, &layout, 0, 0, 299), KV_OK);
    assert_int_equal(append(&lab, session, &layout, 0, 299, 2), KV_INVALID);
    assert_int_equal(append(&lab, session, &layout, 0, 299, 1), KV_OK);
    lab_close(&lab);
}

static void a_directory_with_more_than_allowed_is_refused(void **state) {
    char path[64];
    lab_directory(path);
    struct lab_options options = {.path = path};
    struct lab lab;
    lab_open(&lab, &options);
    struct kv_layout layout = lab_layout("raw16", 1, 1, 1, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    for (int i = 0; i < 3; i++) {
        char name[8];
        snprintf(name, sizeof name, "n%d", i);
        uint64_t session = lab_open_session(&lab, name, &fingerprint);
        assert_int_equal(lab_close_session(&lab, session, true), KV_OK);
    }
    lab_close(&lab);
    options.sessions_max = options.sessions_open_max = 2;
    options.expect_failure = true;
    lab_open(&lab, &options);
    assert_int_equal(lab.status, KV_INVALID);
    assert_non_null(strstr(lab.why, "sessions_max"));
    lab_close(&lab);
    lab_directory_remove(path);
}

/* ---- Late and cancelled ------------------------------------------------------------------------------ */

/* A session whose attention takes long, and requests that ask for it. */
enum { SLOW = 1024, SLOW_ROWS = 64 }; /* with 32 heads: a third of a second, unvectorized */
struct slow {
    struct lab lab;
    struct kv_layout layout;
    uint64_t session, other;
};

static void slow_open(struct slow *s) {
    struct lab_options options = {
        .device = "scalar", .message_bytes = 4 << 20, .arena_bytes = 128 << 20};
    lab_open(&s->lab, &options);
    s->layout = lab_layout("kivi2", 1, 2, 32, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&s->lab, &s->layout);
    s->session = lab_open_session(&s->lab, "slow", &fingerprint);
    s->other = lab_open_session(&s->lab, "other", &fingerprint);
    for (uint32_t t = 0; t < SLOW; t += 1024)
        assert_int_equal(append(&s->lab, s->session, &s->layout, 0, t, 1024), KV_OK);
}

static struct kv_request *slow_request(struct slow *s) {
    struct kv_request *request = lab_request(&s->lab, KV_REQUEST_ATTEND);
    request->attend.item_count = 1;
    request->attend.items[0] = (struct kv_attend_item){
        .session = s->session,
        .rows = SLOW_ROWS, .append_tokens = 1, .expected_length = SLOW};
    request->bytes_in = SLOW_ROWS * 32 * 64 * 2 + 2 * 128 * 2;
    memset(request->staging, 0, request->bytes_in);
    return request;
}

/* The kernel stops at the next page, the answer says why, the token was not appended. */
static void a_running_attention_can_be_cancelled(void **state) {
    struct slow s;
    slow_open(&s);
    struct kv_request *request = slow_request(&s);
    uint64_t begin = clock_us();
    lab_submit(&s.lab, request);
    lab_wait(request);
    uint64_t whole = clock_us() - begin;
    assert_int_equal(request->attend.items[0].status, KV_OK);
    assert_int_equal(request->attend.items[0].length, SLOW + 1);
    lab_done(&s.lab, request);

    request = slow_request(&s);
    request->attend.items[0].expected_length = SLOW + 1;
    begin = clock_us();
    lab_submit(&s.lab, request);
    usleep((unsigned)(whole / 10));
    atomic_store(&request->cancelled, true);
    lab_wait(request);
    uint64_t cut = clock_us() - begin;
    print_message("whole %llu us, cancelled after a tenth %llu us\n", (unsigned long long)whole,
                  (unsigned long long)cut);
    assert_int_equal(request->status, KV_CANCELLED);
    lab_done(&s.lab, request);
    if (whole > 100000) assert_true(cut < whole / 2);
    assert_int_equal(append(&s.lab, s.session, &s.layout, 0, SLOW + 1, 1), KV_OK);
    lab_close(&s.lab);
}

/* What waits behind it for the session's turn is late, and is told so while the other runs. */
static void a_request_that_waits_can_be_late(void **state) {
    struct slow s;
    slow_open(&s);
    struct kv_request *first = slow_request(&s), *late = slow_request(&s);
    struct kv_request *gone = slow_request(&s), *third = lab_request(&s.lab, KV_REQUEST_FETCH);
    late->deadline_us = clock_us() + 1;
    third->fetch.session = s.session;
    atomic_store(&gone->cancelled, true);
    lab_submit(&s.lab, first);
    lab_submit(&s.lab, late);
    lab_submit(&s.lab, gone);
    lab_submit(&s.lab, third);
    lab_wait(late);
    assert_int_equal(late->status, KV_DEADLINE);
    lab_wait(gone);
    assert_int_equal(gone->status, KV_CANCELLED);
    lab_wait(first);
    assert_int_equal(first->status, KV_OK);
    assert_int_equal(first->attend.items[0].length, SLOW + 1);
    lab_wait(third); /* the queue behind them is whole */
    assert_int_equal(third->fetch.length, SLOW + 1);
    lab_done(&s.lab, first);
    lab_done(&s.lab, late);
    lab_done(&s.lab, gone);
    lab_done(&s.lab, third);
    lab_close(&s.lab);
}

/* Requests of one session are answered in order, and those of another do not wait for them. */
static void sessions_do_not_wait_for_each_other(void **state) {
    struct slow s;
    slow_open(&s);
    struct kv_request *slow = slow_request(&s);
    lab_submit(&s.lab, slow);
    uint64_t begin = clock_us();
    assert_int_equal(append(&s.lab, s.other, &s.layout, 0, 0, 1), KV_OK);
    print_message("the other session's append took %llu us\n",
                  (unsigned long long)(clock_us() - begin));
    lab_wait(slow);
    lab_done(&s.lab, slow);
    lab_close(&s.lab);
}

/* ---- Stopping -------------------------------------------------------------------------------------------- */

struct flood {
    struct lab *lab;
    struct kv_layout layout;
    uint64_t session;
    bool started;
    _Atomic uint32_t answered;
    uint32_t unavailable, other;
};

static void *flood_thread(void *argument) {
    struct flood *flood = argument;
    while (flood->unavailable == 0) {
        struct kv_request *request = lab_request(flood->lab, KV_REQUEST_ATTEND);
        request->attend.item_count = 1;
        request->attend.items[0] = (struct kv_attend_item){.session = flood->session, .rows = 1};
        request->bytes_in = 64 * 2;
        memset(request->staging, 0, request->bytes_in);
        lab_call(flood->lab, request);
        flood->answered++;
        if (request->status == KV_UNAVAILABLE) flood->unavailable++;
        else if (request->status != KV_OK || request->attend.items[0].status != KV_OK) flood->other++;
        lab_done(flood->lab, request);
    }
    return NULL;
}

/* Everything submitted is answered, before, while and after the engine stops. */
static void stopping_answers_everybody(void **state) {
    struct lab lab;
    lab_open(&lab, NULL);
    struct kv_layout layout = lab_layout("kivi2", 1, 1, 1, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    struct flood floods[3];
    pthread_t threads[3];
    for (int i = 0; i < 3; i++) {
        char name[8];
        snprintf(name, sizeof name, "f%d", i);
        floods[i] = (struct flood){.lab = &lab, .layout = layout};
        floods[i].session = lab_open_session(&lab, name, &fingerprint);
        assert_int_equal(append(&lab, floods[i].session, &layout, 0, 0, 500), KV_OK);
    }
    for (int i = 0; i < 3; i++) pthread_create(&threads[i], NULL, flood_thread, &floods[i]);
    /* Each of them is in the middle of it, however the scheduler treats them. */
    for (int i = 0; i < 3; i++)
        while (atomic_load(&floods[i].answered) < 2) usleep(1000);
    kv_engine_stop(lab.engine);
    assert_false(kv_engine_ready(lab.engine));
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        assert_true(floods[i].answered > 1);
        assert_int_equal(floods[i].other, 0);
    }
    lab_close(&lab);
}

/* Many threads, few requests: a caller without one is told so and gets one later. */
static void requests_are_bounded(void **state) {
    struct lab_options options = {.request_count = 8};
    struct lab lab;
    lab_open(&lab, &options);
    struct kv_request *taken[8];
    for (int i = 0; i < 8; i++) assert_non_null(taken[i] = kv_engine_acquire(lab.engine, i % 2));
    assert_null(kv_engine_acquire(lab.engine, false));
    assert_null(kv_engine_acquire(lab.engine, true));
    kv_engine_release(lab.engine, taken[3]);
    assert_non_null(taken[3] = kv_engine_acquire(lab.engine, true));
    for (int i = 0; i < 8; i++) kv_engine_release(lab.engine, taken[i]);
    lab_close(&lab);
}

/* What a decode step costs besides the arithmetic: printed, not judged. */
static void a_step_is_timed(void **state) {
    struct lab lab;
    lab_open(&lab, NULL);
    struct kv_layout layout = lab_layout("kivi2", 1, 2, 4, 64, KV_DTYPE_F16);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    uint64_t session = lab_open_session(&lab, "step", &fingerprint);
    assert_int_equal(append(&lab, session, &layout, 0, 0, 128), KV_OK);
    enum { STEPS = 100 };
    uint64_t took = UINT64_MAX, stats = UINT64_MAX;
    for (uint32_t i = 0; i < STEPS; i++) {
        struct kv_request *request = lab_request(&lab, KV_REQUEST_ATTEND);
        request->attend.item_count = 1;
        request->attend.items[0] = (struct kv_attend_item){
            .session = session, .rows = 1, .append_tokens = 1, .expected_length = 128 + i};
        request->bytes_in = (4 * 64 + 2 * 128) * 2;
        memset(request->staging, 0, request->bytes_in);
        uint64_t begin = clock_us();
        lab_call(&lab, request);
        if (clock_us() - begin < took) took = clock_us() - begin;
        assert_int_equal(request->attend.items[0].status, KV_OK);
        lab_done(&lab, request);
        begin = clock_us();
        lab_stats(&lab);
        if (clock_us() - begin < stats) stats = clock_us() - begin;
    }
    print_message("fastest step %llu us, fastest empty request %llu us\n",
                  (unsigned long long)took, (unsigned long long)stats);
    lab_close(&lab);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_tail_has_a_cap),
        cmocka_unit_test(half_done_prefills_fill_the_arena),
        cmocka_unit_test(tables_are_bounded),
        cmocka_unit_test(the_longest_session_is_a_limit),
        cmocka_unit_test(a_directory_with_more_than_allowed_is_refused),
        cmocka_unit_test(a_running_attention_can_be_cancelled),
        cmocka_unit_test(a_request_that_waits_can_be_late),
        cmocka_unit_test(sessions_do_not_wait_for_each_other),
        cmocka_unit_test(stopping_answers_everybody),
        cmocka_unit_test(requests_are_bounded),
        cmocka_unit_test(a_step_is_timed),
    };
    return cmocka_run_group_tests(tests, rows_fill, NULL);
}
