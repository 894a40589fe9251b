/* SPDX-License-Identifier: Apache-2.0 */
/* kvfile_test.c - files that lie.
 *
 * What could go wrong: a header that promises what the file does not hold, sizes that overflow when
 * multiplied, tensors that overlap, JSON that is none. Each is refused with a sentence; a good file
 * comes out as it went in; random damage of a good file is either refused or harmless, for every
 * tensor that is handed out lies inside the file (asan reads them all).
 */
#include "clients/cli/kvfile.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

enum { DAMAGED = 3000 };

static char path[256];
static unsigned seed;

static void write_bytes(const void *bytes, size_t count) {
    FILE *out = fopen(path, "wb");
    assert_non_null(out);
    assert_int_equal(fwrite(bytes, 1, count, out), count);
    fclose(out);
}

/* A file of this header and so many bytes of data. */
static void write_file(const char *header, size_t data_bytes) {
    uint64_t length = strlen(header);
    uint8_t *bytes = calloc(1, 8 + length + data_bytes);
    memcpy(bytes, &length, 8);
    memcpy(bytes + 8, header, length);
    write_bytes(bytes, 8 + length + data_bytes);
    free(bytes);
}

static void assert_refused(const char *header, size_t data_bytes, const char *sentence) {
    char why[ST_WHY_BYTES] = "";
    write_file(header, data_bytes);
    assert_null(st_open(path, why));
    if (!strstr(why, sentence)) fail_msg("'%s' does not say '%s'", why, sentence);
}

static void liars_are_refused(void **state) {
    assert_refused("", 0, "not a JSON object");
    assert_refused("[]", 0, "not a JSON object");
    assert_refused("{\"a\":", 0, "not a JSON object");
    assert_refused("{\"a\":1}", 0, "lacks");
    assert_refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4, "lacks");
    assert_refused("{\"a\":{\"dtype\":\"F33\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "not known");
    assert_refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", 4, "shape");
    assert_refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1.0],\"data_offsets\":[0,4]}}", 4, "shape");
    assert_refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904,4],"
                   "\"data_offsets\":[0,0]}}", 0, "shape");
    assert_refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, "needs 8");
    assert_refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 4, "needs 8");
    assert_refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,4]}}", 8, "needs 4");
    assert_refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 8, "belong to no");
    assert_refused("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]},"
                   "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4, "overlaps");
    assert_refused("{\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]},"
                   "\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[1,2]}}", 2, "duplicate");

    char why[ST_WHY_BYTES];
    write_bytes("1234567", 7);
    assert_null(st_open(path, why));
    write_bytes("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10); /* a header of 2^64 - 1 bytes */
    assert_null(st_open(path, why));
    assert_null(st_open("missing/file", why));
    assert_non_null(strstr(why, "No such file"));
}

/* K and V of layers 3 and 12, 2 heads, 5 tokens of 4 channels; ids; element [h][t][c] of k.3 is
 * 100 h + 10 t + c. */
static void write_good(void) {
    static float k[2 * 5 * 4], other[2 * 5 * 4], q[4 * 3 * 4], energy[2 * 4];
    static int64_t ids[5] = {7, 8, 9, 10, 11};
    for (int i = 0; i < 40; i++) k[i] = (float)(100 * (i / 20) + 10 * (i / 4 % 5) + i % 4);
    for (int i = 0; i < 8; i++) energy[i] = (float)i;
    const struct st_tensor tensors[] = {
        {.name = "k.3", .dtype = "F32", .rank = 3, .shape = {2, 5, 4}, .data = k, .bytes = 160},
        {.name = "v.3", .dtype = "F32", .rank = 3, .shape = {2, 5, 4}, .data = other, .bytes = 160},
        {.name = "v.12", .dtype = "F32", .rank = 3, .shape = {2, 5, 4}, .data = other, .bytes = 160},
        {.name = "k.12", .dtype = "F32", .rank = 3, .shape = {2, 5, 4}, .data = other, .bytes = 160},
        {.name = "q.3", .dtype = "F32", .rank = 3, .shape = {4, 3, 4}, .data = q, .bytes = 192},
        {.name = "q.12", .dtype = "F32", .rank = 3, .shape = {4, 3, 4}, .data = q, .bytes = 192},
        {.name = "q_energy.12", .dtype = "F32", .rank = 2, .shape = {2, 4}, .data = energy, .bytes = 32},
        {.name = "token_ids", .dtype = "I64", .rank = 1, .shape = {5}, .data = ids, .bytes = 40},
    };
    char why[ST_WHY_BYTES];
    assert_true(st_write(path, tensors, 8, why));
}

static void a_good_file_comes_back(void **state) {
    struct kvfile kv;
    char why[ST_WHY_BYTES] = "";
    write_good();
    if (!kvfile_open(&kv, path, why)) fail_msg("%s", why);
    assert_int_equal(kv.layers, 2);
    assert_int_equal(kv.numbers[0], 3);
    assert_int_equal(kv.numbers[1], 12);
    assert_int_equal(kv.kv_heads, 2);
    assert_int_equal(kv.query_heads, 4);
    assert_int_equal(kv.tokens, 5);
    assert_int_equal(kv.rows, 3);
    assert_int_equal(kv.dtype, KIVI_F32);
    assert_false(kv.has_energy); /* layer 3 has none */
    assert_int_equal(kv.token_ids[4], 11);

    float turned[2 * 2 * 4];
    kvfile_turn(&kv, kv.k[0], 3, 2, turned);
    for (int i = 0; i < 16; i++)
        assert_true(turned[i] == (float)(100 * (i / 4 % 2) + 10 * (3 + i / 8) + i % 4));
    kvfile_close(&kv);
}

static void shapes_must_agree(void **state) {
    static float data[64];
    char why[ST_WHY_BYTES] = "";
    struct kvfile kv;
    struct st_tensor tensors[] = {
        {.name = "k.0", .dtype = "F32", .rank = 3, .shape = {1, 2, 4}, .data = data, .bytes = 32},
        {.name = "v.0", .dtype = "F32", .rank = 3, .shape = {1, 2, 4}, .data = data, .bytes = 32},
        {.name = "k.1", .dtype = "F32", .rank = 3, .shape = {1, 3, 4}, .data = data, .bytes = 48},
    };
    assert_true(st_write(path, tensors, 1, why));
    assert_false(kvfile_open(&kv, path, why)); /* no v.0 */
    kvfile_close(&kv);
    assert_true(st_write(path, tensors, 3, why));
    assert_false(kvfile_open(&kv, path, why)); /* layer 1 is longer, and lacks v.1 */
    assert_non_null(strstr(why, "layer 1"));
    kvfile_close(&kv);
    assert_true(st_write(path, tensors, 2, why));
    assert_true(kvfile_open(&kv, path, why));
    kvfile_close(&kv);
}

static void damage_is_refused_or_harmless(void **state) {
    write_good();
    FILE *in = fopen(path, "rb");
    uint8_t good[4096], bad[4096];
    size_t count = fread(good, 1, sizeof good, in);
    fclose(in);
    int refused = 0;
    unsigned sum = 0;
    for (int i = 0; i < DAMAGED; i++) {
        memcpy(bad, good, count);
        size_t kept = rand() % 4 ? count : (size_t)rand() % count;
        for (int flips = rand() % 4; flips >= 0; flips--)
            bad[(size_t)rand() % 700] = (uint8_t)(rand() % 2 ? rand() : "0123456789[]{}\",:."[rand() % 18]);
        write_bytes(bad, kept);
        struct kvfile kv;
        char why[ST_WHY_BYTES] = "";
        if (!kvfile_open(&kv, path, why)) {
            assert_true(why[0]);
            refused++;
        } else {
            for (size_t j = 0; j < st_count(kv.file); j++)
                for (size_t b = 0; b < st_at(kv.file, j)->bytes; b++)
                    sum += ((const uint8_t *)st_at(kv.file, j)->data)[b];
        }
        kvfile_close(&kv);
    }
    printf("%d of %d refused, the sum of the others is %u\n", refused, DAMAGED, sum);
    assert_true(refused > DAMAGED / 4);
}

int main(int argc, char **argv) {
    seed = argc > 1 ? (unsigned)strtoul(argv[1], NULL, 0) : (unsigned)time(NULL);
    printf("seed %u (give it as an argument to see the same again)\n", seed);
    srand(seed);
    const char *dir = getenv("TEST_TMPDIR");
    snprintf(path, sizeof path, "%s/kvfile-test-%ld", dir ? dir : "/tmp", (long)getpid());
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(liars_are_refused),
        cmocka_unit_test(a_good_file_comes_back),
        cmocka_unit_test(shapes_must_agree),
        cmocka_unit_test(damage_is_refused_or_harmless),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(path);
    return failed;
}
