/* SPDX-License-Identifier: Apache-2.0 */
/* io_test.c - both engines keep the one promise of storage/io.h: whole, or failed with a reason. */
#include "tests/storage/harness.h"

#include "storage/clock.h"
#include "storage/io.h"

#include <errno.h>
#include <fcntl.h>
#include <seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MEMORY = 1 << 20, REQUESTS = 16 };

struct io_lab {
    struct kv_io *io;
    int files[2];
    char names[2][512]; /* Bazel's directories for tests have long names */
    uint8_t *memory;
};

static struct kv_io *engine_open(struct io_lab *lab, bool threads) {
    struct kv_io_options options = {
        .files = lab->files, .file_count = 2, .requests_max = REQUESTS, .threads = 4,
        .use_threads = threads, .memory = lab->memory, .memory_bytes = MEMORY};
    struct kv_io *io;
    assert_int_equal(kv_io_open(&options, &io), KV_OK);
    return io;
}

static int setup(void **state) {
    struct io_lab *lab = calloc(1, sizeof *lab);
    const char *parent = getenv("TEST_TMPDIR");
    for (int i = 0; i < 2; i++) {
        snprintf(lab->names[i], sizeof lab->names[i], "%s/kivid-io-XXXXXX",
                 parent != NULL ? parent : "/tmp");
        int file = mkstemp(lab->names[i]);
        close(file);
        lab->files[i] = open(lab->names[i], O_RDWR | O_DIRECT | O_CLOEXEC);
        if (lab->files[i] < 0) lab->files[i] = open(lab->names[i], O_RDWR | O_CLOEXEC);
        assert_true(lab->files[i] >= 0);
    }
    lab->memory = aligned_alloc(4096, MEMORY);
    lab->io     = engine_open(lab, harness_threads());
    *state      = lab;
    return 0;
}

static int teardown(void **state) {
    struct io_lab *lab = *state;
    bad_disk_clear();
    kv_io_close(lab->io);
    for (int i = 0; i < 2; i++) {
        close(lab->files[i]);
        unlink(lab->names[i]);
    }
    free(lab->memory);
    free(lab);
    return 0;
}

static void note_done(struct kv_io_request *request) {
    uint32_t *left = request->owner;
    --*left;
}

static void run(struct io_lab *lab, struct kv_io_request *requests, uint32_t count) {
    uint32_t left = count;
    for (uint32_t i = 0; i < count; i++) {
        requests[i].on_done = note_done;
        requests[i].owner   = &left;
        kv_io_submit(lab->io, &requests[i]);
    }
    assert_int_equal(left, count); /* never inside submit */
    uint64_t began = kv_clock_us();
    while (left > 0) {
        kv_io_wait(lab->io, -1, 1000000);
        kv_io_poll(lab->io);
        assert_true(kv_clock_us() - began < 20000000);
    }
    assert_int_equal(kv_io_in_flight(lab->io), 0);
}

static int run_one(struct io_lab *lab, enum kv_io_kind kind, uint8_t *memory, uint64_t bytes,
                   uint64_t offset) {
    struct kv_io_request request = {
        .kind = kind, .file = 1, .memory = memory, .bytes = bytes, .offset = offset};
    run(lab, &request, 1);
    return request.error;
}

static void what_is_written_is_read(void **state) {
    struct io_lab *lab = *state;
    assert_int_equal(run_one(lab, KV_IO_ALLOCATE, NULL, MEMORY, 0), 0);
    struct kv_io_request requests[REQUESTS];
    for (int pass = 0; pass < 2; pass++) {
        for (uint32_t i = 0; i < REQUESTS; i++) {
            uint8_t *memory = lab->memory + i * 65536u;
            if (pass == 0) content_fill(memory, 65536, i, 1, 0);
            else memset(memory, 0, 65536);
            requests[i] = (struct kv_io_request){.kind = pass == 0 ? KV_IO_WRITE : KV_IO_READ,
                                                 .file = 1, .memory = memory, .bytes = 65536,
                                                 .offset = (15 - i) * 65536u};
        }
        run(lab, requests, REQUESTS);
        for (uint32_t i = 0; i < REQUESTS; i++) assert_int_equal(requests[i].error, 0);
        assert_int_equal(run_one(lab, KV_IO_SYNC, NULL, 0, 0), 0);
    }
    for (uint32_t i = 0; i < REQUESTS; i++) {
        assert_true(content_right(lab->memory + i * 65536u, 65536, i, 1, 0));
    }
    /* Memory that is not registered works too. */
    uint8_t *other = aligned_alloc(4096, 65536);
    assert_int_equal(run_one(lab, KV_IO_READ, other, 65536, 0), 0);
    assert_true(content_right(other, 65536, 15, 1, 0));
    free(other);
}

static void beyond_the_end_there_are_zeros(void **state) {
    struct io_lab *lab = *state;
    content_fill(lab->memory, 8192, 1, 1, 0);
    assert_int_equal(run_one(lab, KV_IO_WRITE, lab->memory, 8192, 0), 0);
    assert_int_equal(truncate(lab->names[1], 5000), 0);
    memset(lab->memory, 0xff, 16384);
    assert_int_equal(run_one(lab, KV_IO_READ, lab->memory, 16384, 0), 0);
    assert_true(content_right(lab->memory, 5000, 1, 1, 0));
    for (int i = 5000; i < 16384; i++) assert_int_equal(lab->memory[i], 0);
    memset(lab->memory, 0xff, 4096);
    assert_int_equal(run_one(lab, KV_IO_READ, lab->memory, 4096, 1 << 20), 0);
    assert_int_equal(lab->memory[0] | lab->memory[4095], 0);
}

static void a_short_transfer_is_continued(void **state) {
    struct io_lab *lab   = *state;
    struct bad_disk disk = {.kind = -1, .nth = 1, .forever = true, .fault = {.move_bytes = 4096}};
    bad_disk_set(&disk);
    content_fill(lab->memory, 65536, 1, 1, 0);
    assert_int_equal(run_one(lab, KV_IO_WRITE, lab->memory, 65536, 0), 0);
    memset(lab->memory, 0, 65536);
    assert_int_equal(run_one(lab, KV_IO_READ, lab->memory, 65536, 0), 0);
    assert_true(content_right(lab->memory, 65536, 1, 1, 0));
    assert_int_equal(disk.hits, 2);
}

static void faults_happen_as_told(void **state) {
    struct io_lab *lab   = *state;
    struct bad_disk disk = {.kind = KV_IO_WRITE, .nth = 2, .fault = {.error = EIO}};
    memset(lab->memory, 7, 65536);
    bad_disk_set(&disk);
    assert_int_equal(run_one(lab, KV_IO_WRITE, lab->memory, 4096, 0), 0);
    assert_int_equal(run_one(lab, KV_IO_WRITE, lab->memory, 4096, 0), EIO);
    assert_int_equal(run_one(lab, KV_IO_WRITE, lab->memory, 4096, 0), 0);
    disk = (struct bad_disk){.kind = KV_IO_WRITE, .nth = 1,
                             .fault = {.error = ENOSPC, .move_bytes = 8192, .torn = true}};
    bad_disk_set(&disk);
    assert_int_equal(run_one(lab, KV_IO_WRITE, lab->memory, 65536, 0), ENOSPC);
    bad_disk_clear();
    assert_int_equal(run_one(lab, KV_IO_READ, lab->memory, 65536, 0), 0);
    assert_int_equal(lab->memory[8191], 7); /* torn: two pages of it are there */
    assert_int_equal(lab->memory[8192], 0);
    disk = (struct bad_disk){.kind = -1, .nth = 1, .fault = {.delay_us = 50000}};
    bad_disk_set(&disk);
    uint64_t began = kv_clock_us();
    assert_int_equal(run_one(lab, KV_IO_READ, lab->memory, 4096, 0), 0);
    assert_true(kv_clock_us() - began >= 50000);
}

static void a_real_error_comes_through(void **state) {
    struct io_lab *lab = *state;
    int read_only      = open(lab->names[0], O_RDONLY | O_CLOEXEC);
    int keep           = lab->files[0];
    kv_io_close(lab->io);
    lab->files[0] = read_only;
    lab->io       = engine_open(lab, harness_threads());
    struct kv_io_request request = {
        .kind = KV_IO_WRITE, .file = 0, .memory = lab->memory, .bytes = 4096};
    run(lab, &request, 1);
    assert_int_equal(request.error, EBADF);
    kv_io_close(lab->io);
    lab->files[0] = keep;
    close(read_only);
    lab->io = engine_open(lab, harness_threads());
}

static void the_eventfd_is_not_lost(void **state) {
    struct io_lab *lab = *state;
    int wake           = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    uint64_t one       = 1, count;
    kv_io_wait(lab->io, wake, 1000);
    for (int i = 0; i < 100; i++) {
        assert_int_equal(write(wake, &one, 8), 8);
        /* A request that is polled for in between must not eat the wake-up. */
        if (i % 2) assert_int_equal(run_one(lab, KV_IO_READ, lab->memory, 4096, 0), 0);
        uint64_t began = kv_clock_us();
        kv_io_wait(lab->io, wake, 5000000);
        assert_true(kv_clock_us() - began < 2000000);
        while (read(wake, &count, 8) == 8) kv_io_wait(lab->io, wake, 1000);
    }
    close(wake);
}

/* What a container's default profile does: io_uring answers EPERM, and all goes on with threads. */
static void refused_io_uring_falls_back(void **state) {
    struct io_lab *lab = *state;
    const int refusals[] = {EPERM, ENOSYS, ENOMEM, EMFILE};
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            scmp_filter_ctx filter = seccomp_init(SCMP_ACT_ALLOW);
            int error = seccomp_rule_add(filter, SCMP_ACT_ERRNO((uint16_t)refusals[i]),
                                         SCMP_SYS(io_uring_setup), 0);
            if (error != 0 || seccomp_load(filter) != 0) _exit(2);
            struct kv_io_options options = {.files = lab->files, .file_count = 2,
                                            .requests_max = REQUESTS, .threads = 4,
                                            .memory = lab->memory, .memory_bytes = MEMORY};
            struct kv_io *io;
            if (kv_io_open(&options, &io) != KV_OK) _exit(3);
            if (strcmp(kv_io_name(io), "threads") != 0) _exit(4);
            if (strstr(kv_io_reason(io), strerror(refusals[i])) == NULL) _exit(5);
            _exit(0);
        }
        int status;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFEXITED(status));
        assert_int_equal(WEXITSTATUS(status), 0);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(int argc, char **argv) {
    harness_arguments(argc, argv);
    const struct CMUnitTest tests[] = {
        TEST(what_is_written_is_read),
        TEST(beyond_the_end_there_are_zeros),
        TEST(a_short_transfer_is_continued),
        TEST(faults_happen_as_told),
        TEST(a_real_error_comes_through),
        TEST(the_eventfd_is_not_lost),
        TEST(refused_io_uring_falls_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
