/* SPDX-License-Identifier: Apache-2.0 */
/* engine_gpu_test.c - the gpu tier, on a device whose memory the CPU cannot touch (shadow.h).
 *
 * The other engine tests run on that device too; here is what only exists there: what is hot and what
 * is not, what a device that is full or broken does, and that a copy never outlives its block. */
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "kernels/page.h"
#include "tests/kernels/shadow.h"
#include "tests/service/engine_lab.h"

enum { LAYERS = 4, HEADS = 2, HEADS_Q = 4, DIM = 64, ROW = HEADS * DIM, STEP = 128 };
enum { ANSWER = HEADS_Q * DIM + HEADS_Q };

static struct kv_layout layout_of_test(void) {
    return lab_layout("kivi2", LAYERS, HEADS, HEADS_Q, DIM, KV_DTYPE_F16);
}

/* Deterministic rows of a step of 128 tokens: the same for whoever asks with the same seed. */
static void step_rows(uint64_t seed, uint32_t step, uint32_t layer, float *keys, float *values) {
    struct lab_random random = {seed * 1000003 + step * 64 + layer};
    lab_rows(&random, keys, STEP * ROW, DIM);
    lab_rows(&random, values, STEP * ROW, DIM);
}

static enum kv_status append_step(struct lab *lab, uint64_t session, uint64_t seed, uint32_t step) {
    static float keys[STEP * ROW], values[STEP * ROW];
    uint32_t ids[STEP]; /* equal seeds are equal texts, and share their blocks */
    struct kv_layout layout = layout_of_test();
    enum kv_status status = KV_OK;
    for (uint32_t i = 0; i < STEP; i++) ids[i] = (uint32_t)seed * 100000 + step * STEP + i;
    for (uint32_t l = 0; l < LAYERS && status == KV_OK; l++) {
        step_rows(seed, step, l, keys, values);
        struct kv_request *request =
            lab_append(lab, session, &layout, l, step * STEP, STEP, keys, values, ids);
        status = request->status;
        lab_done(lab, request);
    }
    return status;
}

static uint64_t session_make(struct lab *lab, const char *name, uint64_t seed, uint32_t steps) {
    struct kv_layout layout = layout_of_test();
    struct kv_digest fingerprint = lab_register(lab, &layout);
    uint64_t session = lab_open_session(lab, name, &fingerprint);
    for (uint32_t i = 0; i < steps; i++)
        assert_int_equal(append_step(lab, session, seed, i), KV_OK);
    return session;
}

static void query_row(float query[HEADS_Q * DIM]) {
    struct lab_random random = {77};
    lab_rows(&random, query, HEADS_Q * DIM, DIM);
}

/* One row, all layers. */
static void answer(struct lab *lab, uint64_t session, float out[LAYERS][ANSWER]) {
    struct kv_layout layout = layout_of_test();
    float query[HEADS_Q * DIM];
    query_row(query);
    for (uint32_t l = 0; l < LAYERS; l++) {
        struct kv_request *request = lab_attend(lab, session, &layout, l, 1, KV_MASK_CAUSAL, query);
        assert_int_equal(request->status, KV_OK);
        assert_int_equal(request->attend.items[0].status, KV_OK);
        memcpy(out[l], request->staging + request->reply_offset, sizeof out[l]);
        lab_done(lab, request);
    }
}

/* What the plain CPU engine says to the same tokens. */
static void answer_plain(uint64_t seed, uint32_t steps, float out[LAYERS][ANSWER]) {
    struct lab lab;
    lab_open(&lab, &(struct lab_options){.device = "auto"});
    answer(&lab, session_make(&lab, "plain", seed, steps), out);
    lab_close(&lab);
}

static void answers_equal(float a[LAYERS][ANSWER], float b[LAYERS][ANSWER]) {
    for (uint32_t l = 0; l < LAYERS; l++) assert_true(lab_distance(a[l], b[l], ANSWER) < 1e-6);
}

/* What was packed on the device is attended there; no byte of it goes back and forth. */
static void what_is_packed_is_hot(void **state) {
    struct lab lab;
    float here[LAYERS][ANSWER], plain[LAYERS][ANSWER];
    lab_open(&lab, &(struct lab_options){.device = "shadow"});
    uint64_t session = session_make(&lab, "hot", 5, 20);
    answer(&lab, session, here);
    struct kv_engine_stats stats = lab_stats(&lab);
    assert_int_equal(stats.pages_from_gpu, LAYERS * 19); /* and the window, which is no block yet */
    assert_int_equal(stats.gpu.copies, 0);
    assert_int_equal(stats.gpu.adopted, 19);
    lab_close(&lab);
    answer_plain(5, 20, plain);
    answers_equal(here, plain);
}

/* After a restart everything is cold: the first reader brings it up, the second finds it. */
static void a_reader_brings_blocks_up(void **state) {
    char path[64];
    struct lab lab;
    float before[LAYERS][ANSWER], after[LAYERS][ANSWER];
    struct kv_layout layout = layout_of_test();
    lab_directory(path);
    const struct lab_options options = {.device = "shadow", .path = path};
    lab_open(&lab, &options);
    uint64_t session = session_make(&lab, "talk", 6, 20);
    answer(&lab, session, before);
    assert_int_equal(lab_close_session(&lab, session, true), KV_OK);
    lab_close(&lab);

    lab_open(&lab, &options);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    session = lab_open_session(&lab, "talk", &fingerprint);
    answer(&lab, session, after);
    answers_equal(before, after);
    struct kv_engine_stats first = lab_stats(&lab);
    assert_int_equal(first.gpu.copies, 19);
    assert_int_equal(first.pages_from_nvme, 19); /* the first layer; the others found them */
    assert_int_equal(first.pages_from_gpu, (LAYERS - 1) * 19);
    answer(&lab, session, after);
    answers_equal(before, after);
    struct kv_engine_stats second = lab_stats(&lab);
    assert_int_equal(second.pages_from_gpu, first.pages_from_gpu + LAYERS * 19);
    assert_int_equal(second.pages_from_nvme, first.pages_from_nvme);
    lab_close(&lab);
    lab_directory_remove(path);
}

/* Sessions that do not fit together take turns, through host memory and disk, and stay what they are. */
static void sessions_take_turns(void **state) {
    char path[64];
    struct lab lab;
    enum { SESSIONS = 6, STEPS = 12 };
    uint64_t sessions[SESSIONS];
    float plain[SESSIONS][LAYERS][ANSWER], here[LAYERS][ANSWER];
    lab_directory(path);
    lab_open(&lab, &(struct lab_options){.device = "shadow", .path = path,
                                         .arena_bytes = 6 << 20, .tail_bytes_max = 4 << 20,
                                         .gpu_arena_bytes = 4 << 20});
    for (uint32_t s = 0; s < SESSIONS; s++) {
        char name[8];
        snprintf(name, sizeof name, "s%u", s);
        sessions[s] = session_make(&lab, name, 10 + s, STEPS);
        answer_plain(10 + s, STEPS, plain[s]);
    }
    for (uint32_t round = 0; round < 3; round++)
        for (uint32_t s = 0; s < SESSIONS; s++) {
            answer(&lab, sessions[s], here);
            answers_equal(here, plain[s]);
        }
    struct kv_engine_stats stats = lab_stats(&lab);
    assert_true(stats.gpu.evictions > 0);
    assert_true(stats.gpu.copies > 0);
    assert_true(stats.pages_from_gpu > 0);
    assert_true(stats.gpu.bytes_used <= stats.gpu.bytes_max);
    lab_close(&lab);
    lab_directory_remove(path);
}

/* A context that takes more than half of the tier is not brought up: it would push itself out. */
static void a_large_context_is_read_across_the_bus(void **state) {
    char path[64];
    struct lab lab;
    float here[LAYERS][ANSWER], again[LAYERS][ANSWER], plain[LAYERS][ANSWER];
    struct kv_layout layout = layout_of_test();
    lab_directory(path);
    lab_open(&lab, &(struct lab_options){.device = "shadow", .path = path});
    uint64_t session = session_make(&lab, "large", 7, 60);
    assert_int_equal(lab_close_session(&lab, session, true), KV_OK);
    lab_close(&lab);

    lab_open(&lab, &(struct lab_options){.device = "shadow", .path = path,
                                         .gpu_arena_bytes = 2 << 20});
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    session = lab_open_session(&lab, "large", &fingerprint);
    answer(&lab, session, here);
    answer(&lab, session, again);
    assert_int_equal(lab_stats(&lab).gpu.copies, 0);
    lab_close(&lab);
    answer_plain(7, 60, plain);
    answers_equal(here, plain);
    answers_equal(again, plain);
    lab_directory_remove(path);
}

/* What was used a moment ago makes no room for what comes now. */
static void a_copy_in_use_is_kept(void **state) {
    char path[64];
    struct lab lab;
    float out[LAYERS][ANSWER];
    struct kv_layout layout = layout_of_test();
    lab_directory(path);
    struct lab_options options = {.device = "shadow", .path = path};
    lab_open(&lab, &options);
    const char *const names[] = {"a", "b", "c"};
    uint64_t sessions[3];
    for (uint32_t s = 0; s < 3; s++) {
        sessions[s] = session_make(&lab, names[s], s, 20);
        assert_int_equal(lab_close_session(&lab, sessions[s], true), KV_OK);
    }
    lab_close(&lab);

    options.gpu_arena_bytes = 3 << 20; /* a session's blocks are 1 MB, its tail a quarter */
    options.gpu_keep_ms = 600000;
    lab_open(&lab, &options);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    for (uint32_t s = 0; s < 3; s++) sessions[s] = lab_open_session(&lab, names[s], &fingerprint);
    for (uint32_t s = 0; s < 3; s++) answer(&lab, sessions[s], out);
    struct kv_engine_stats stats = lab_stats(&lab);
    assert_int_equal(stats.gpu.evictions, 0);
    assert_true(stats.gpu.refusals > 0);
    lab_close(&lab);
    lab_directory_remove(path);
}

/* ---- A copy never outlives its block ------------------------------------------------------------------ */

static enum kv_status put_block(struct lab *lab, const struct kv_digest *fingerprint, uint8_t name,
                                uint64_t seed) {
    static float rows[2][STEP * ROW];
    enum kv_status status = KV_OK;
    for (uint32_t l = 0; l < LAYERS && status == KV_OK; l++) {
        struct kv_request *request = lab_request(lab, KV_REQUEST_PUT);
        request->put.stream = 1;
        request->put.fingerprint = *fingerprint;
        request->put.has_digest = true;
        memset(request->put.digest.bytes, name, sizeof request->put.digest.bytes);
        request->put.layer = l;
        request->put.form = KV_FORM_FULL;
        step_rows(seed, 0, l, rows[0], rows[1]);
        lab_encode(KV_DTYPE_F16, rows[0], request->staging, 2 * STEP * ROW);
        request->bytes_in = 2 * STEP * ROW * sizeof(uint16_t);
        status = lab_call(lab, request)->status;
        lab_done(lab, request);
    }
    return status;
}

/* A packed page of layer 0; false: the block is not there. */
static bool get_packed(struct lab *lab, const struct kv_digest *fingerprint, uint8_t name,
                       uint8_t *out, size_t bytes) {
    struct kv_request *request = lab_request(lab, KV_REQUEST_GET);
    request->get.fingerprint = *fingerprint;
    memset(request->get.digest.bytes, name, sizeof request->get.digest.bytes);
    request->get.form = KV_FORM_PACKED;
    bool found = lab_call(lab, request)->status == KV_OK;
    if (found) {
        assert_int_equal(request->reply_bytes, bytes);
        memcpy(out, request->staging + request->reply_offset, bytes);
    }
    lab_done(lab, request);
    return found;
}

/* Without a disk a block that is pushed out of host memory is gone, whatever the device still holds; and
 * when its name is stored again with other bytes, those are what comes back. */
static void a_copy_is_of_one_record(void **state) {
    struct lab lab;
    struct kv_layout layout = layout_of_test();
    struct kv_shape shape = kv_layout_shape(&layout);
    size_t bytes = kv_page_bytes(&shape);
    uint8_t *first = malloc(bytes), *second = malloc(bytes), *other = malloc(bytes);
    lab_open(&lab, &(struct lab_options){.device = "shadow", .arena_bytes = 4 << 20,
                                         .tail_bytes_max = 1 << 20, .gpu_arena_bytes = 64 << 20});
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    assert_int_equal(put_block(&lab, &fingerprint, 1, 100), KV_OK);
    assert_true(get_packed(&lab, &fingerprint, 1, first, bytes));
    uint8_t name = 2;
    for (; name < 250 && lab_stats(&lab).store.drops == 0; name++)
        assert_int_equal(put_block(&lab, &fingerprint, name, name), KV_OK);
    for (uint8_t more = 0; more < 60; more++, name++)
        assert_int_equal(put_block(&lab, &fingerprint, name, name), KV_OK);
    assert_false(get_packed(&lab, &fingerprint, 1, other, bytes));

    assert_int_equal(put_block(&lab, &fingerprint, 1, 200), KV_OK);
    assert_true(get_packed(&lab, &fingerprint, 1, second, bytes));
    assert_memory_not_equal(first, second, bytes);
    assert_true(lab_stats(&lab).pages_from_gpu >= 2);
    lab_close(&lab);
    free(first);
    free(second);
    free(other);
}

/* The same by way of a session: what it refers to is gone from the store, so it is gone. */
static void a_block_that_is_gone_is_gone(void **state) {
    struct lab lab;
    struct kv_layout layout = layout_of_test();
    float query[HEADS_Q * DIM], out[LAYERS][ANSWER];
    lab_open(&lab, &(struct lab_options){.device = "shadow", .arena_bytes = 4 << 20,
                                         .tail_bytes_max = 1 << 20, .gpu_arena_bytes = 64 << 20});
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    uint64_t session = session_make(&lab, "gone", 30, 8);
    answer(&lab, session, out);
    for (uint8_t name = 1; name < 120; name++)
        assert_int_equal(put_block(&lab, &fingerprint, name, name), KV_OK);
    query_row(query);
    struct kv_request *request = lab_attend(&lab, session, &layout, 0, 1, KV_MASK_CAUSAL, query);
    assert_int_equal(request->status, KV_OK);
    assert_int_equal(request->attend.items[0].status, KV_NOT_FOUND);
    lab_done(&lab, request);
    lab_close(&lab);
}

/* Many readers want the same blocks at the same moment, on streams of their own, when they are in host
 * memory only: one of them copies, and nobody reads a copy that is not there yet. */
static void readers_at_the_same_time(void **state) {
    enum { READERS = 8, STEPS = 20, OTHERS = 8 };
    char name[8];
    struct lab lab;
    float plain[LAYERS][ANSWER], query[HEADS_Q * DIM];
    uint64_t sessions[READERS];
    struct kv_request *requests[READERS];
    answer_plain(31, STEPS, plain);
    query_row(query);
    lab_open(&lab, &(struct lab_options){.device = "shadow", .gpu_arena_bytes = 8 << 20});
    for (uint32_t r = 0; r < READERS; r++) {
        snprintf(name, sizeof name, "r%u", r);
        sessions[r] = session_make(&lab, name, 31, STEPS);
    }
    for (uint32_t o = 0; o < OTHERS; o++) { /* these push the blocks out */
        snprintf(name, sizeof name, "o%u", o);
        uint64_t other = session_make(&lab, name, 40 + o, STEPS);
        assert_int_equal(lab_close_session(&lab, other, false), KV_OK);
    }
    for (uint32_t r = 0; r < READERS; r++) {
        requests[r] = lab_request(&lab, KV_REQUEST_ATTEND);
        requests[r]->attend.item_count = 1;
        requests[r]->attend.items[0] = (struct kv_attend_item){
            .session = sessions[r], .rows = 1, .mask = KV_MASK_CAUSAL, .no_energy = true};
        lab_encode(KV_DTYPE_F16, query, requests[r]->staging, HEADS_Q * DIM);
        requests[r]->bytes_in = HEADS_Q * DIM * sizeof(uint16_t);
        lab_submit(&lab, requests[r]);
    }
    for (uint32_t r = 0; r < READERS; r++) {
        lab_wait(requests[r]);
        assert_int_equal(requests[r]->status, KV_OK);
        assert_int_equal(requests[r]->attend.items[0].status, KV_OK);
        const float *out = (const float *)(requests[r]->staging + requests[r]->reply_offset);
        assert_true(lab_distance(out, plain[0], ANSWER) < 1e-6);
        lab_done(&lab, requests[r]);
    }
    assert_int_equal(lab_stats(&lab).gpu.copies, STEPS - 1);
    lab_close(&lab);
}

/* ---- A device that is full, too small or broken ---------------------------------------------------------- */

static void too_little_device_memory_is_said(void **state) {
    struct lab lab;
    lab_open(&lab, &(struct lab_options){.device = "shadow", .device_bytes = 8 << 20,
                                         .gpu_arena_bytes = 16 << 20, .expect_failure = true});
    assert_int_equal(lab.status, KV_BUSY);
    assert_non_null(strstr(lab.why, "gpu_arena_bytes"));
    lab_close(&lab);
}

/* A device that fails takes nothing with it that was on disk; everything that needs it says so, nothing
 * of what it left half-way is kept, and the service is not ready any more. */
static void a_failed_device_is_told(void **state) {
    char path[64];
    struct lab lab;
    float before[LAYERS][ANSWER], after[LAYERS][ANSWER];
    struct kv_layout layout = layout_of_test();
    lab_directory(path);
    const struct lab_options options = {.device = "shadow", .path = path};
    lab_open(&lab, &options);
    uint64_t session = session_make(&lab, "broken", 8, 10);
    answer(&lab, session, before);
    assert_int_equal(lab_commit(&lab, session, KV_SYNCED), KV_OK);
    assert_int_equal(append_step(&lab, session, 8, 10), KV_OK); /* these are lost */
    struct kv_engine_stats stats = lab_stats(&lab);

    shadow_fail(lab.device);
    assert_int_equal(append_step(&lab, session, 8, 11), KV_UNAVAILABLE);
    float query[HEADS_Q * DIM] = {1};
    struct kv_request *request = lab_attend(&lab, session, &layout, 0, 1, KV_MASK_CAUSAL, query);
    assert_int_equal(request->status, KV_UNAVAILABLE);
    lab_done(&lab, request);
    struct kv_digest fingerprint = lab_register(&lab, &layout);
    assert_int_equal(put_block(&lab, &fingerprint, 9, 9), KV_UNAVAILABLE);
    assert_int_equal(lab_commit(&lab, session, KV_WRITTEN), KV_UNAVAILABLE);
    assert_int_equal(lab_stats(&lab).store.blocks, stats.store.blocks);
    for (int i = 0; i < 200 && kv_engine_ready(lab.engine); i++) usleep(10000);
    assert_false(kv_engine_ready(lab.engine));
    lab_close(&lab);

    lab_open(&lab, &options);
    fingerprint = lab_register(&lab, &layout);
    session = lab_open_session(&lab, "broken", &fingerprint);
    answer(&lab, session, after);
    answers_equal(before, after);
    lab_close(&lab);
    lab_directory_remove(path);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_packed_is_hot),
        cmocka_unit_test(a_reader_brings_blocks_up),
        cmocka_unit_test(sessions_take_turns),
        cmocka_unit_test(a_large_context_is_read_across_the_bus),
        cmocka_unit_test(a_copy_in_use_is_kept),
        cmocka_unit_test(a_copy_is_of_one_record),
        cmocka_unit_test(a_block_that_is_gone_is_gone),
        cmocka_unit_test(readers_at_the_same_time),
        cmocka_unit_test(too_little_device_memory_is_said),
        cmocka_unit_test(a_failed_device_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
