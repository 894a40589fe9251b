/* SPDX-License-Identifier: Apache-2.0 */
/* Streams, tickets and the rows' way in and out, on the CPU backend.
 *
 * What could go wrong: work overtakes work, a ticket is reached before its results are
 * there, a wake-up is lost, a cancelled call never ends, a fault is reported at the wrong
 * element, energy drifts.
 */
#include <errno.h>
#include <math.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "kernels/half.h"
#include "tests/kernels/cases.h"

static struct lab lab;

static int open_lab(void **state) {
    return lab_open(&lab, "scalar", 3) ? 0 : 1;
}

static int close_lab(void **state) {
    lab_close(&lab);
    return 0;
}

static void devices_are_found_by_name(void **state) {
    struct kv_device *device = NULL;
    struct kv_device_options options = {.name = "abacus", .workers = 1};
    assert_int_equal(kv_device_open(&options, &device), KV_INVALID);
    options.name = "cuda1";
    assert_int_equal(kv_device_open(&options, &device), KV_INVALID);
    options.name = "scalar";
    options.workers = 257;
    assert_int_equal(kv_device_open(&options, &device), KV_INVALID);
    options.workers = 0; /* one per CPU */
    assert_int_equal(kv_device_open(&options, &device), KV_OK);
    assert_string_equal(kv_device_name(device), "scalar");
    assert_true(kv_device_is_host(device));
    assert_int_equal(kv_device_status(device), KV_OK);
    kv_device_close(device);
    options.name = "auto";
    assert_int_equal(kv_device_open(&options, &device), KV_OK);
    kv_device_close(device);
}

static void memory_is_aligned_and_zero(void **state) {
    for (int kind = 0; kind < 2; kind++) {
        uint8_t *memory;
        assert_int_equal(kv_device_alloc(lab.device, (enum kv_memory)kind, 10000, (void **)&memory),
                         KV_OK);
        assert_int_equal((uintptr_t)memory % 4096, 0);
        for (int i = 0; i < 10000; i++) assert_int_equal(memory[i], 0);
        kv_device_free(lab.device, (enum kv_memory)kind, memory, 10000);
    }
    void *none;
    assert_int_equal(kv_device_alloc(lab.device, KV_MEMORY_DEVICE, (size_t)1 << 60, &none), KV_BUSY);
}

/* A chain of copies through the ring, several times round, with pieces larger than a task:
 * any overtaking leaves a wrong byte at the end. */
static void work_is_done_in_order(void **state) {
    enum { BYTES = 700 << 10, ROUNDS = 20, LINKS = 12 };
    uint8_t *chain[LINKS + 1];
    lab_clear(&lab);
    for (int i = 0; i <= LINKS; i++) chain[i] = lab_device(&lab, BYTES);
    for (int round = 0; round < ROUNDS; round++) {
        memset(chain[0], round + 1, BYTES);
        for (int i = 0; i < LINKS; i++) kv_stream_copy(lab.stream, chain[i + 1], chain[i], BYTES);
        kv_stream_copy(lab.stream, chain[0], chain[0], 0);
        lab_wait(&lab);
        for (size_t i = 0; i < BYTES; i += 4093)
            assert_int_equal(chain[LINKS][i], round + 1);
        assert_int_equal(chain[LINKS][BYTES - 1], round + 1);
    }
}

/* The ring's full depth, filled at once, again and again. */
static void a_stream_takes_its_depth(void **state) {
    enum { COUNT = KV_STREAM_DEPTH };
    static uint64_t numbers[COUNT + 1];
    for (uint64_t round = 1; round <= 30; round++) {
        numbers[0] = round;
        for (int i = 0; i < COUNT; i++)
            kv_stream_copy(lab.stream, &numbers[i + 1], &numbers[i], sizeof numbers[0]);
        lab_wait(&lab);
        for (int i = 0; i <= COUNT; i++) assert_int_equal(numbers[i], round);
    }
}

static void tickets_are_reached_with_their_results(void **state) {
    static uint32_t source[2], target[2];
    for (uint32_t i = 1; i <= 3000; i++) {
        source[0] = i;
        source[1] = ~i;
        kv_stream_copy(lab.stream, &target[0], &source[0], 4);
        uint64_t first = kv_stream_mark(lab.stream);
        kv_stream_copy(lab.stream, &target[1], &source[1], 4);
        uint64_t second = kv_stream_mark(lab.stream);
        assert_true(second > first);
        while (!kv_stream_reached(lab.stream, first)) {}
        assert_int_equal(target[0], i);
        while (!kv_stream_reached(lab.stream, second)) {}
        assert_int_equal(target[1], ~i);
        assert_true(kv_stream_reached(lab.stream, first));
    }
}

/* Streams opened and closed around work that still runs. */
static void streams_run_beside_each_other(void **state) {
    enum { STREAMS = 9, BYTES = 300 << 10 };
    lab_clear(&lab);
    uint8_t *source = lab_device(&lab, BYTES), *target[STREAMS];
    memset(source, 0x5a, BYTES);
    for (int i = 0; i < STREAMS; i++) target[i] = lab_device(&lab, BYTES);
    for (int round = 0; round < 20; round++) {
        struct kv_stream *streams[STREAMS];
        for (int i = 0; i < STREAMS; i++) {
            memset(target[i], 0, BYTES);
            assert_int_equal(kv_stream_open(lab.device, &streams[i]), KV_OK);
        }
        for (int again = 0; again < 4; again++)
            for (int i = 0; i < STREAMS; i++)
                kv_stream_copy(streams[i], target[i], source, BYTES);
        for (int i = 0; i < STREAMS; i++) {
            kv_stream_close(streams[i]); /* waits */
            assert_memory_equal(target[i], source, BYTES);
        }
    }
}

/* The only worker copies for milliseconds.  A short copy on another stream that may run in place is there when
 * the call returns, and so is its ticket; a second long one has to wait its turn. */
static void short_work_runs_in_place(void **state) {
    enum { LONG = 32 << 20, SHORT = 4096 };
    struct kv_device_options options = {.name = "auto", .workers = 1};
    struct kv_device *device;
    struct kv_stream *busy, *quick;
    assert_int_equal(kv_device_open(&options, &device), KV_OK);
    if (strcmp(kv_device_name(device), "scalar") == 0) { /* the definition never runs in place */
        kv_device_close(device);
        return;
    }
    assert_int_equal(kv_stream_open(device, &busy), KV_OK);
    assert_int_equal(kv_stream_open(device, &quick), KV_OK);
    uint8_t *from, *to, *page;
    assert_int_equal(kv_device_alloc(device, KV_MEMORY_DEVICE, LONG, (void **)&from), KV_OK);
    assert_int_equal(kv_device_alloc(device, KV_MEMORY_DEVICE, LONG, (void **)&to), KV_OK);
    assert_int_equal(kv_device_alloc(device, KV_MEMORY_DEVICE, SHORT, (void **)&page), KV_OK);
    memset(from, 7, LONG);

    kv_stream_copy(busy, to, from, LONG);
    kv_stream_in_place(quick, true);
    kv_stream_copy(quick, page, from, SHORT);
    bool there = kv_stream_reached(quick, kv_stream_mark(quick));
    bool still_busy = !kv_stream_reached(busy, kv_stream_mark(busy));
    assert_true(there);
    assert_true(still_busy);
    assert_memory_equal(page, from, SHORT);

    kv_stream_copy(quick, to, from, LONG / 2); /* too long: a worker's */
    kv_stream_copy(quick, page, from + SHORT, SHORT); /* behind it, so a worker's as well */
    assert_false(kv_stream_reached(quick, kv_stream_mark(quick)));

    kv_stream_close(quick);
    kv_stream_close(busy);
    kv_device_free(device, KV_MEMORY_DEVICE, from, LONG);
    kv_device_free(device, KV_MEMORY_DEVICE, to, LONG);
    kv_device_free(device, KV_MEMORY_DEVICE, page, SHORT);
    kv_device_close(device);
}

static void streams_have_a_limit(void **state) {
    struct kv_stream *streams[100];
    int count = 0;
    while (count < 100 && kv_stream_open(lab.device, &streams[count]) == KV_OK) count++;
    assert_int_equal(count, 63); /* and the lab's own */
    while (count > 0) kv_stream_close(streams[--count]);
    assert_int_equal(kv_stream_open(lab.device, &streams[0]), KV_OK);
    kv_stream_close(streams[0]);
}

/* Whoever sleeps on the eventfd finds the ticket reached, also when nothing else was
 * queued; the workers sleep in between, so their own wake-up is tried too. */
static void notify_wakes_after_the_ticket(void **state) {
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    assert_true(fd >= 0);
    static uint64_t source, target;
    for (uint64_t i = 1; i <= 300; i++) {
        source = i;
        if (i % 3 != 0) kv_stream_copy(lab.stream, &target, &source, sizeof source);
        kv_stream_notify(lab.stream, fd);
        uint64_t ticket = kv_stream_mark(lab.stream), count = 0;
        struct pollfd wait = {.fd = fd, .events = POLLIN};
        assert_int_equal(poll(&wait, 1, 10000), 1);
        assert_true(kv_stream_reached(lab.stream, ticket));
        assert_int_equal(read(fd, &count, sizeof count), sizeof count);
        assert_int_equal(count, 1);
        if (i % 3 != 0) assert_int_equal(target, i);
        if (i % 10 == 0) nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
    close(fd);
}

/* A cancelled attend ends early, and what is queued behind it is done. */
static void a_cancelled_attend_ends(void **state) {
    enum { PAGES = 1024 };
    struct kv_shape shape = shape_of("kivi2", 1, 128, KV_DTYPE_F16);
    uint16_t *raw = raw_page(&shape, PATTERN_NORMAL, 1);
    uint8_t *packed = allocate(kv_page_bytes(&shape));
    lab_quantize(&lab, &shape, raw, NULL, packed);
    static struct kv_page_ref refs[PAGES];
    for (int i = 0; i < PAGES; i++) refs[i] = (struct kv_page_ref){packed, T, 0};
    static float query[16 * 128], out[16 * 128], lse[16];
    static uint32_t visible[1] = {PAGES * T}, source = 7, target;
    static atomic_bool cancel;
    atomic_store(&cancel, false);
    struct kv_attend item = {.query = query, .dtype = KV_DTYPE_F32, .heads_q = 16, .rows = 1,
                             .score_scale = 0.1f, .page_count = PAGES, .pages = refs,
                             .visible = visible, .out = out, .lse = lse, .cancel = &cancel};
    double start = lab_seconds();
    kv_kernel_attend(lab.stream, &shape, 1, &item);
    lab_wait(&lab);
    double whole = lab_seconds() - start;

    start = lab_seconds();
    for (int i = 0; i < 20; i++) kv_kernel_attend(lab.stream, &shape, 1, &item);
    kv_stream_copy(lab.stream, &target, &source, 4);
    atomic_store(&cancel, true);
    lab_wait(&lab);
    assert_true(lab_seconds() - start < 10 * whole); /* of 20 */
    assert_int_equal(target, 7);
    free(raw);
    free(packed);
}

/* ---- rows in and out ------------------------------------------------------------------------------ */

static uint32_t ingest(const struct kv_shape *shape, enum kv_dtype dtype, uint32_t token,
                       uint32_t tokens, const void *keys, const void *values, uint16_t *page) {
    uint32_t fault = 0;
    struct kv_ingest item = {.keys = keys, .values = values, .dtype = dtype, .token = token,
                             .tokens = tokens, .page = page, .fault = &fault};
    kv_kernel_ingest(lab.stream, shape, 1, &item);
    lab_wait(&lab);
    return fault;
}

/* Token-major rows land head-major, at their token, and nothing else is touched; emit
 * brings them back. */
static void rows_go_in_and_come_out(void **state) {
    struct kv_shape shape = shape_of("kivi2", 3, 96, KV_DTYPE_F16);
    enum { FIRST = 50, TOKENS = 70, PER_TOKEN = 3 * 96, COUNT = TOKENS * PER_TOKEN };
    static float keys[COUNT], values[COUNT], back[2][COUNT];
    uint16_t *page = allocate(kv_shape_bytes_raw(&shape));
    memset(page, 0xee, kv_shape_bytes_raw(&shape));
    for (int i = 0; i < COUNT; i++) {
        keys[i] = (float)(i % 2039) - 1000; /* exact in f16 */
        values[i] = -keys[i] / 4;
    }
    assert_int_equal(ingest(&shape, KV_DTYPE_F32, FIRST, TOKENS, keys, values, page), 0);
    for (uint32_t head = 0; head < 3; head++)
        for (uint32_t t = 0; t < T; t++)
            for (uint32_t c = 0; c < 96; c++) {
                uint16_t k = page[(head * T + t) * 96 + c];
                uint16_t v = page[((3 + head) * T + t) * 96 + c];
                if (t < FIRST || t >= FIRST + TOKENS) {
                    assert_int_equal(k, 0xeeee);
                    assert_int_equal(v, 0xeeee);
                    continue;
                }
                float expected = keys[(t - FIRST) * PER_TOKEN + head * 96 + c];
                assert_true(kv_f32_of_f16(k) == expected && kv_f32_of_f16(v) == -expected / 4);
            }
    struct kv_emit item = {.page = page, .token = FIRST, .tokens = TOKENS, .dtype = KV_DTYPE_F32,
                           .keys = back[0], .values = back[1]};
    kv_kernel_emit(lab.stream, &shape, 1, &item);
    lab_wait(&lab);
    assert_memory_equal(back[0], keys, sizeof keys);
    assert_memory_equal(back[1], values, sizeof values);
    free(page);
}

/* bf16 comes out as binary32 without a change: what is compared with attention's own view of it. */
static void bf16_pages_come_out_as_f32(void **state) {
    struct kv_shape shape = shape_of("kivi2", 2, 64, KV_DTYPE_BF16);
    enum { TOKENS = 128, COUNT = TOKENS * 2 * 64 };
    static uint16_t keys[COUNT], values[COUNT];
    static float back[2][COUNT];
    uint16_t *page = allocate(kv_shape_bytes_raw(&shape));
    struct dice dice = {78};
    for (int i = 0; i < COUNT; i++) {
        keys[i] = (uint16_t)(0x3000 + dice_below(&dice, 0x1000));
        values[i] = (uint16_t)(0xb000 + dice_below(&dice, 0x1000));
    }
    assert_int_equal(ingest(&shape, KV_DTYPE_BF16, 0, TOKENS, keys, values, page), 0);
    struct kv_emit item = {.page = page, .tokens = TOKENS, .dtype = KV_DTYPE_F32,
                           .keys = back[0], .values = back[1]};
    kv_kernel_emit(lab.stream, &shape, 1, &item);
    lab_wait(&lab);
    for (int i = 0; i < COUNT; i++) {
        assert_true(back[0][i] == kv_f32_of_bf16(keys[i]));
        assert_true(back[1][i] == kv_f32_of_bf16(values[i]));
    }
    free(page);
}

/* The smallest bad element is named, keys before values, however the work was cut. */
static void faults_name_the_first_bad_element(void **state) {
    struct kv_shape shape = shape_of("kivi2", 10, 256, KV_DTYPE_F16); /* several tasks */
    enum { TOKENS = 128, COUNT = TOKENS * 10 * 256 };
    float *keys = calloc(COUNT, 4), *values = calloc(COUNT, 4);
    uint16_t *page = allocate(kv_shape_bytes_raw(&shape));
    struct dice dice = {77};
    static const float bad[] = {NAN, INFINITY, -INFINITY, 65520, -70000, 1e30f};
    for (int round = 0; round < 60; round++) {
        float *half = round % 2 ? keys : values;
        uint32_t at = dice_below(&dice, COUNT), later = at + dice_below(&dice, COUNT - at);
        half[at] = bad[round % 6];
        half[later] = later == at ? half[at] : NAN;
        if (round % 4 == 1) values[dice_below(&dice, COUNT)] = NAN; /* keys go first */
        uint32_t expected = 1 + at + (round % 2 ? 0 : COUNT);
        assert_int_equal(ingest(&shape, KV_DTYPE_F32, 0, TOKENS, keys, values, page), expected);
        memset(keys, 0, COUNT * 4);
        memset(values, 0, COUNT * 4);
    }
    keys[5] = 65519; /* rounds to 65504 */
    assert_int_equal(ingest(&shape, KV_DTYPE_F32, 0, TOKENS, keys, values, page), 0);
    free(keys);
    free(values);
    free(page);
}

/* Cuts `bytes` anywhere, the last piece included; some pieces are empty. */
static uint32_t cut(struct dice *dice, const uint8_t *bytes, size_t count, struct kv_span *pieces,
                    uint32_t most) {
    uint32_t n = 0;
    for (size_t at = 0; at < count; n++) {
        size_t run = dice_below(dice, 8) == 0 ? 0 : dice_below(dice, 3000);
        if (n + 1 == most || run > count - at) run = count - at;
        pieces[n] = (struct kv_span){bytes + at, run};
        at += run;
    }
    return n;
}

/* The page that the calling thread makes of them, by the definition and by the fastest table. */
static void rows_taken_here(const struct kv_shape *shape, const struct kv_ingest *item, uint32_t expected,
                            const uint16_t *page) {
    static const char *const names[] = {"scalar", "auto"};
    uint8_t *scratch = allocate(shape->heads * shape->head_dim * sizeof(float));
    for (int i = 0; i < 2; i++) {
        struct kv_device *device = NULL;
        struct kv_device_options options = {.name = names[i], .workers = 1};
        assert_int_equal(kv_device_open(&options, &device), KV_OK);
        struct kv_ingest own = *item;
        own.page = allocate(kv_shape_bytes_raw(shape));
        memset(own.page, 0xee, kv_shape_bytes_raw(shape));
        assert_int_equal(kv_kernel_ingest_here(device, shape, &own, scratch), expected);
        if (expected == 0) assert_memory_equal(own.page, page, kv_shape_bytes_raw(shape));
        free(own.page);
        kv_device_close(device);
    }
    free(scratch);
}

/* Rows that lie in pieces make the same page and name the same fault, at any address. */
static void rows_come_in_pieces(void **state) {
    enum { TOKENS = 100, PER_TOKEN = 10 * 128, COUNT = 2 * TOKENS * PER_TOKEN, PIECES = 4096 };
    static const enum kv_dtype dtypes[] = {KV_DTYPE_F16, KV_DTYPE_F32, KV_DTYPE_BF16};
    static struct kv_span pieces[PIECES];
    struct dice dice = {78};
    uint8_t *memory = allocate(COUNT * 4 + 64);
    for (int round = 0; round < 30; round++) {
        enum kv_dtype dtype = dtypes[round % 3];
        struct kv_shape shape = shape_of(
            "raw16", 10, 128, dtype == KV_DTYPE_BF16 ? KV_DTYPE_BF16 : KV_DTYPE_F16);
        size_t element = kv_dtype_bytes(dtype), bytes = COUNT * element;
        for (size_t i = 0; i < bytes; i++) memory[i] = (uint8_t)(dice_below(&dice, 256) & 0x3b);
        if (round >= 15) /* all ones is a NaN in every type */
            memset(memory + dice_below(&dice, COUNT) * element, 0xff, element);
        uint16_t *page[2] = {allocate(kv_shape_bytes_raw(&shape)), allocate(kv_shape_bytes_raw(&shape))};
        memset(page[0], 0xee, kv_shape_bytes_raw(&shape));
        memset(page[1], 0xee, kv_shape_bytes_raw(&shape));
        uint32_t expected = ingest(&shape, dtype, 20, TOKENS, memory, memory + bytes / 2, page[0]);

        uint32_t shift = dice_below(&dice, 64), fault = 0;
        memmove(memory + shift, memory, bytes);
        struct kv_ingest item = {
            .dtype = dtype, .token = 20, .tokens = TOKENS, .page = page[1], .fault = &fault,
            .pieces = pieces, .piece_count = cut(&dice, memory + shift, bytes, pieces, PIECES)};
        kv_kernel_ingest(lab.stream, &shape, 1, &item);
        lab_wait(&lab);
        assert_int_equal(fault, expected);
        assert_true((expected != 0) == (round >= 15));
        if (expected == 0) assert_memory_equal(page[0], page[1], kv_shape_bytes_raw(&shape));
        rows_taken_here(&shape, &item, expected, page[0]);
        free(page[0]);
        free(page[1]);
    }
    free(memory);
}

/* bf16 holds more than f16 does: refused for packed codecs, taken by raw16. */
static void the_limit_depends_on_the_codec(void **state) {
    struct kv_shape packed = shape_of("kivi2", 1, 64, KV_DTYPE_BF16);
    struct kv_shape raw = shape_of("raw16", 1, 64, KV_DTYPE_BF16);
    uint16_t keys[64] = {0}, values[64] = {0};
    uint16_t *page = allocate(kv_shape_bytes_raw(&packed));
    values[9] = 0x477f; /* 65280 */
    assert_int_equal(ingest(&packed, KV_DTYPE_BF16, 3, 1, keys, values, page), 0);
    values[9] = 0x4780; /* 65536 */
    assert_int_equal(ingest(&packed, KV_DTYPE_BF16, 3, 1, keys, values, page), 1 + 64 + 9);
    values[9] = 0xff7f; /* the most negative */
    assert_int_equal(ingest(&raw, KV_DTYPE_BF16, 3, 1, keys, values, page), 0);
    values[9] = 0xff80; /* -inf */
    assert_int_equal(ingest(&raw, KV_DTYPE_BF16, 3, 1, keys, values, page), 1 + 64 + 9);
    free(page);
}

/* ---- observe ---------------------------------------------------------------------------------------- */

static void observe(const struct kv_shape *shape, const float *query, uint32_t heads_q,
                    uint32_t rows, float *energy, uint32_t *seen) {
    struct kv_observe item = {.query = query, .dtype = KV_DTYPE_F32, .heads_q = heads_q,
                              .rows = rows, .energy = energy, .rows_seen = seen};
    kv_kernel_observe(lab.stream, shape, 1, &item);
    lab_wait(&lab);
}

/* 20 and 12 rows are averaged; the 32 after them weigh a tenth, and so do 32 single ones. */
static void energy_is_a_running_mean(void **state) {
    struct kv_shape shape = shape_of("kivi2", 2, 64, KV_DTYPE_F16);
    enum { HEADS_Q = 4, PER_ROW = HEADS_Q * 64 };
    static float query[32 * PER_ROW];
    float energy[2 * 64] = {0};
    uint32_t seen = 0;
    for (int i = 0; i < 32 * PER_ROW; i++) query[i] = i / 64 % 2 ? 1 : 3; /* a group: mean 5 */
    observe(&shape, query, HEADS_Q, 20, energy, &seen);
    assert_int_equal(seen, 20);
    for (int i = 0; i < 128; i++) assert_true(fabsf(energy[i] - 5) < 1e-5f);
    for (int i = 0; i < 32 * PER_ROW; i++) query[i] = 4;
    observe(&shape, query, HEADS_Q, 12, energy, &seen);
    assert_int_equal(seen, 32);
    float mean = (20 * 5 + 12 * 16) / 32.0f;
    for (int i = 0; i < 128; i++) assert_true(fabsf(energy[i] - mean) < 1e-4f);
    for (int i = 0; i < 32 * PER_ROW; i++) query[i] = 10;
    observe(&shape, query, HEADS_Q, 32, energy, &seen);
    mean = 0.9f * mean + 0.1f * 100;
    for (int i = 0; i < 128; i++) assert_true(fabsf(energy[i] - mean) < 1e-3f);
    for (int row = 0; row < 32; row++) observe(&shape, query, HEADS_Q, 1, energy, &seen);
    assert_int_equal(seen, 96);
    mean = 0.9f * mean + 0.1f * 100;
    for (int i = 0; i < 128; i++) assert_true(fabsf(energy[i] - mean) < 1e-3f);
}

static void rows_that_are_not_finite_are_left_out(void **state) {
    struct kv_shape shape = shape_of("kivi2", 1, 64, KV_DTYPE_F16);
    float query[3 * 64], energy[64] = {0};
    uint32_t seen = 0;
    for (int i = 0; i < 3 * 64; i++) query[i] = (float)(i / 64 + 1);
    query[64 + 7] = NAN;
    observe(&shape, query, 1, 3, energy, &seen);
    assert_int_equal(seen, 2);
    for (int i = 0; i < 64; i++) assert_true(fabsf(energy[i] - 5) < 1e-5f); /* (1 + 9) / 2 */
    query[0] = INFINITY;
    query[2 * 64] = -INFINITY;
    observe(&shape, query, 1, 3, energy, &seen);
    assert_int_equal(seen, 2);
    for (int i = 0; i < 64; i++) query[i] = 1e18f;
    query[5] = 1e25f; /* the square is past binary32 */
    observe(&shape, query, 1, 1, energy, &seen);
    for (int i = 0; i < 64; i++) assert_true(energy[i] >= 0 && energy[i] <= KV_ENERGY_MAX);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(devices_are_found_by_name),
        cmocka_unit_test(memory_is_aligned_and_zero),
        cmocka_unit_test(work_is_done_in_order),
        cmocka_unit_test(a_stream_takes_its_depth),
        cmocka_unit_test(tickets_are_reached_with_their_results),
        cmocka_unit_test(streams_run_beside_each_other),
        cmocka_unit_test(short_work_runs_in_place),
        cmocka_unit_test(streams_have_a_limit),
        cmocka_unit_test(notify_wakes_after_the_ticket),
        cmocka_unit_test(a_cancelled_attend_ends),
        cmocka_unit_test(rows_go_in_and_come_out),
        cmocka_unit_test(bf16_pages_come_out_as_f32),
        cmocka_unit_test(faults_name_the_first_bad_element),
        cmocka_unit_test(rows_come_in_pieces),
        cmocka_unit_test(the_limit_depends_on_the_codec),
        cmocka_unit_test(energy_is_a_running_mean),
        cmocka_unit_test(rows_that_are_not_finite_are_left_out),
    };
    return cmocka_run_group_tests(tests, open_lab, close_lab);
}
