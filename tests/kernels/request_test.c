/* SPDX-License-Identifier: Apache-2.0 */
/* What a request must not do: read pages after it was cancelled, or allocate.
 *
 * Pages are counted by the processor: each lies in memory of its own that nobody may touch yet.  The first
 * touch of one is a fault, whose handler counts the page and opens it.  The handler also is who cancels, in
 * the middle of a chosen page, so that nothing depends on when.
 *
 * Allocations are counted by the linker: this program is linked with --wrap for every function that gives memory.
 */
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "kernels/cpu.h"
#include "tests/kernels/cases.h"

/* ---- allocations ---------------------------------------------------------------------------- */

static atomic_uint allocations;

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *memory, size_t bytes);
void *__real_aligned_alloc(size_t alignment, size_t bytes);
int __real_posix_memalign(void **out, size_t alignment, size_t bytes);
void *__real_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
void __real_free(void *memory);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t bytes);
void *__wrap_realloc(void *memory, size_t bytes);
void *__wrap_aligned_alloc(size_t alignment, size_t bytes);
int __wrap_posix_memalign(void **out, size_t alignment, size_t bytes);
void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
void __wrap_free(void *memory);

void *__wrap_malloc(size_t bytes) {
    atomic_fetch_add(&allocations, 1);
    return __real_malloc(bytes);
}
void *__wrap_calloc(size_t count, size_t bytes) {
    atomic_fetch_add(&allocations, 1);
    return __real_calloc(count, bytes);
}
void *__wrap_realloc(void *memory, size_t bytes) {
    atomic_fetch_add(&allocations, 1);
    return __real_realloc(memory, bytes);
}
void *__wrap_aligned_alloc(size_t alignment, size_t bytes) {
    atomic_fetch_add(&allocations, 1);
    return __real_aligned_alloc(alignment, bytes);
}
int __wrap_posix_memalign(void **out, size_t alignment, size_t bytes) {
    atomic_fetch_add(&allocations, 1);
    return __real_posix_memalign(out, alignment, bytes);
}
void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
    atomic_fetch_add(&allocations, 1);
    return __real_mmap(at, bytes, protection, flags, fd, offset);
}
void __wrap_free(void *memory) {
    atomic_fetch_add(&allocations, 1);
    __real_free(memory);
}

/* ---- pages that know whether they were touched -------------------------------------------------- */

enum { PAGES = 64, D = 128, GROUP = 4, ROWS = 16 };

static struct guarded {
    uint8_t *memory;
    size_t pitch;           /* of pages in memory */
    atomic_uint touched;    /* pages, so far */
    atomic_uint at_cancel;  /* pages touched when the request was cancelled */
    uint32_t cancel_after;  /* cancel with the touch of that many pages; 0: never */
    atomic_bool cancel;
} guarded;

static void page_touched(int signal, siginfo_t *info, void *context) {
    size_t offset = (size_t)((uint8_t *)info->si_addr - guarded.memory);
    if (offset >= PAGES * guarded.pitch) _exit(3); /* somebody else's fault */
    mprotect(guarded.memory + offset / guarded.pitch * guarded.pitch, guarded.pitch, PROT_READ);
    uint32_t touched = atomic_fetch_add(&guarded.touched, 1) + 1;
    if (touched != guarded.cancel_after) return;
    atomic_store(&guarded.at_cancel, touched);
    atomic_store(&guarded.cancel, true);
}

/* In every test, for cmocka has a handler of its own around each. */
static void guarded_open(const struct kv_shape *shape, struct kv_page_ref *refs) {
    size_t bytes = shape->codec.kind == KV_CODEC_RAW ? kv_shape_bytes_raw(shape)
                                                     : kv_page_bytes(shape);
    struct sigaction action = {.sa_sigaction = page_touched, .sa_flags = SA_SIGINFO | SA_NODEFER};
    assert_int_equal(sigaction(SIGSEGV, &action, NULL), 0);
    memset(&guarded, 0, sizeof guarded);
    guarded.pitch  = (bytes + 4095) / 4096 * 4096;
    guarded.memory = mmap(NULL, PAGES * guarded.pitch, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(guarded.memory != MAP_FAILED);
    uint16_t *raw   = raw_page(shape, PATTERN_NORMAL, 7);
    uint8_t *packed = allocate(bytes);
    struct lab lab;
    assert_true(lab_open(&lab, "scalar", 1));
    lab_quantize(&lab, shape, raw, NULL, packed);
    lab_close(&lab);
    for (uint32_t i = 0; i < PAGES; i++) {
        memcpy(guarded.memory + i * guarded.pitch, packed, bytes);
        refs[i] = (struct kv_page_ref){guarded.memory + i * guarded.pitch, T, 0};
    }
    free(packed);
    free(raw);
}

/* Nothing was touched yet. */
static void guarded_shut(uint32_t cancel_after) {
    assert_int_equal(mprotect(guarded.memory, PAGES * guarded.pitch, PROT_NONE), 0);
    atomic_store(&guarded.touched, 0);
    atomic_store(&guarded.cancel, false);
    guarded.cancel_after = cancel_after;
}

static void guarded_close(void) {
    munmap(guarded.memory, PAGES * guarded.pitch);
}

static const char *const codecs[] = {"kivi2", "kivi1.5", "kivi2-paper", "raw16"};
enum { CODECS = sizeof codecs / sizeof codecs[0] };

static void fill(float *query, size_t count) {
    struct dice dice = {3};
    for (size_t i = 0; i < count; i++)
        query[i] = 0.1f * dice_normal(&dice);
}

/* ---- cancelled ------------------------------------------------------------------------------------- */

/* One task of one instruction set: not one page more. */
static void a_cancelled_task_stops_at_the_next_page(void **state) {
    static const char *const names[] = {"scalar", "avx2", "avx512", "amx"};
    static float query[ROWS * GROUP * D] __attribute__((aligned(64)));
    static float out[ROWS * GROUP * D] __attribute__((aligned(64)));
    float lse[ROWS * GROUP];
    uint32_t visible[ROWS];
    fill(query, ROWS * GROUP * D);
    for (int i = 0; i < ROWS; i++) visible[i] = PAGES * T;
    void *scratch = aligned_alloc(4096, KV_CPU_SCRATCH);
    assert_non_null(scratch);
    for (int c = 0; c < CODECS; c++) {
        struct kv_shape shape = shape_of(codecs[c], 1, D, KV_DTYPE_F16);
        struct kv_page_ref refs[PAGES];
        struct kv_page_map map = {0};
        if (shape.codec.kind != KV_CODEC_RAW) map = kv_page_map(&shape);
        guarded_open(&shape, refs);
        for (int n = 0; n < 4; n++) {
            const struct kv_cpu_isa *isa = kv_cpu_isa_find(names[n]);
            if (isa == NULL || !isa->available()) {
                print_message("%s: not on this machine\n", names[n]);
                continue;
            }
            for (uint32_t rows = 1; rows <= ROWS; rows += ROWS - 1)
                for (uint32_t after = 0; after <= 33; after += 11) {
                    guarded_shut(after);
                    isa->attend(&(struct kv_cpu_attend){
                        .shape = &shape, .map = &map, .group = GROUP, .rows = rows,
                        .query = query, .pages = refs, .page_count = PAGES, .visible = visible,
                        .out = out, .lse = lse, .cancel = &guarded.cancel, .scratch = scratch});
                    assert_int_equal(atomic_load(&guarded.touched), after == 0 ? PAGES : after);
                }
        }
        guarded_close();
    }
    free(scratch);
}

/* A whole request: each worker ends the page that it is in, and takes no other. */
static void a_cancelled_request_ends_the_pages_at_hand(void **state) {
    enum { WORKERS = 3 };
    struct lab lab;
    assert_true(lab_open(&lab, "auto", WORKERS));
    uint32_t all = PAGES * T;
    float *query = lab_pinned(&lab, GROUP * D * sizeof(float));
    fill(query, GROUP * D);
    for (int c = 0; c < CODECS; c++) {
        struct kv_shape shape = shape_of(codecs[c], 1, D, KV_DTYPE_F16);
        struct kv_page_ref refs[PAGES];
        guarded_open(&shape, refs);
        for (uint32_t after = 0; after <= 20; after += 5) {
            guarded_shut(after);
            struct kv_attend item = {
                .query = query, .dtype = KV_DTYPE_F32, .heads_q = GROUP, .rows = 1,
                .score_scale = 1, .page_count = PAGES, .pages = refs, .visible = &all,
                .out = lab_pinned(&lab, GROUP * D * sizeof(float)),
                .lse = lab_pinned(&lab, GROUP * sizeof(float)), .cancel = &guarded.cancel};
            kv_kernel_attend(lab.stream, &shape, 1, &item);
            lab_wait(&lab);
            uint32_t touched = atomic_load(&guarded.touched);
            if (after == 0) {
                assert_int_equal(touched, PAGES);
                continue;
            }
            assert_int_equal(atomic_load(&guarded.at_cancel), after);
            assert_in_range(touched, after, after + WORKERS - 1);
        }
        guarded_close();
    }
    lab_close(&lab);
}

/* ---- memory ------------------------------------------------------------------------------------------ */

static void attend_allocates_nothing(void **state) {
    struct lab lab;
    uint32_t visible[ROWS];
    for (int i = 0; i < ROWS; i++) visible[i] = PAGES * T;
    for (uint32_t workers = 1; workers <= 3; workers += 2) {
        assert_true(lab_open(&lab, "auto", workers));
        float *query = lab_pinned(&lab, ROWS * GROUP * D * sizeof(float));
        fill(query, ROWS * GROUP * D);
        for (int c = 0; c < CODECS; c++) {
            struct kv_shape shape = shape_of(codecs[c], 1, D, KV_DTYPE_F16);
            struct kv_page_ref refs[PAGES];
            guarded_open(&shape, refs);
            struct kv_attend item = {
                .query = query, .dtype = KV_DTYPE_F32, .heads_q = GROUP, .score_scale = 1,
                .pages = refs, .visible = visible,
                .out = lab_pinned(&lab, ROWS * GROUP * D * sizeof(float)),
                .lse = lab_pinned(&lab, ROWS * GROUP * sizeof(float))};
            uint32_t before = atomic_load(&allocations);
            assert_true(before > 0); /* the count counts: guarded_open() allocated */
            for (uint32_t call = 0; call < 20; call++) { /* the first one too */
                item.rows = call % 2 ? ROWS : 1;
                item.page_count = call % 3 ? PAGES : call % 5;
                kv_kernel_attend(lab.stream, &shape, 1, &item);
                lab_wait(&lab);
            }
            assert_int_equal(atomic_load(&allocations), before);
            guarded_close();
        }
        lab_close(&lab);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_cancelled_task_stops_at_the_next_page),
        cmocka_unit_test(a_cancelled_request_ends_the_pages_at_hand),
        cmocka_unit_test(attend_allocates_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
