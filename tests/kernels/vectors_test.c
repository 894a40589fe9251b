/* SPDX-License-Identifier: Apache-2.0 */
/* Scalar pages are those that page.h's prose gives.
 *
 * tests/vectors/make_vectors.py computed packed pages from the prose alone, in Python with
 * exact fractions.  Each case's input is made here by the same formula, quantized, and must
 * be equal to the byte.  A difference means that the prose, the Python or the C is wrong.
 */
#include <math.h>

#include "kernels/half.h"
#include "tests/kernels/cases.h"

/* x -> 6364136223846793005 x + 1442695040888963407 mod 2^64; the upper 32 bits. */
static uint32_t next(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 32);
}

static float element_of(const char *kind, uint32_t t, uint32_t c, int bell, int shift, int bias) {
    if (strcmp(kind, "bell") == 0) return ldexpf((float)bell, shift - 14);
    if (strcmp(kind, "biased") == 0)
        return ldexpf((float)bell, shift - 14) + ldexpf((float)bias, -6);
    switch ((c + 3 * (t / 64)) % 8) {
    case 0: return ldexpf((float)bias, -8);
    case 1: return bell & 1 ? -0.0f : 0.0f;
    case 2: return ldexpf((float)bell, -30);
    case 3: return ldexpf((float)bell, -12) + (t == 77 ? 10000.0f : 0.0f);
    case 4: return bell & 1 ? 65280.0f : -65280.0f;
    case 5: return (float)((t ^ c) & 1) - 0.5f;
    case 6: return ldexpf((float)(((bell % 5) + 5) % 5), -2); /* Python's modulo */
    default: return ldexpf((float)bell, -11);
    }
}

static void fill(const char *kind, const struct kv_shape *shape, uint64_t seed, uint16_t *half) {
    uint32_t D = shape->head_dim;
    int shift[KV_HEAD_DIM_MAX], bias[KV_HEAD_DIM_MAX];
    for (uint32_t c = 0; c < D; c++) shift[c] = (int)(next(&seed) % 7);
    for (uint32_t c = 0; c < D; c++) bias[c] = (int)(next(&seed) % 4096) - 2048;
    for (uint32_t t = 0; t < T; t++)
        for (uint32_t c = 0; c < D; c++) {
            int bell = -4094;
            for (int i = 0; i < 4; i++) bell += (int)(next(&seed) % 2048);
            half[t * D + c] = kv_element_saturated(
                element_of(kind, t, c, bell, shift[c], bias[c]), shape->dtype);
        }
}

/* "preset head_dim dtype kind energy|plain" */
struct vector_case {
    struct kv_shape shape;
    char kind[16];
    bool energy;
};

static struct vector_case case_parse(const char *name) {
    char preset[32], dtype[8], energy[8];
    unsigned head_dim;
    struct vector_case c = {0};
    assert_int_equal(
        sscanf(name, "%31s %u %7s %15s %7s", preset, &head_dim, dtype, c.kind, energy), 5);
    struct kv_preset found;
    assert_int_equal(kv_preset_find(preset, &found), KV_OK);
    c.shape = (struct kv_shape){
        .heads = 1,
        .head_dim = (uint16_t)head_dim,
        .dtype = strcmp(dtype, "bf16") == 0 ? KV_DTYPE_BF16 : KV_DTYPE_F16,
        .codec = found.codec,
    };
    assert_true(kv_shape_valid(&c.shape));
    c.energy = strcmp(energy, "energy") == 0;
    return c;
}

static void quantize_case(struct lab *lab, uint32_t number, const char *name, uint8_t *page) {
    struct vector_case c = case_parse(name);
    static uint16_t raw[2 * T * KV_HEAD_DIM_MAX];
    float energy[KV_HEAD_DIM_MAX];
    uint64_t seed = 1000 + number;
    fill(c.kind, &c.shape, 2 * number + 1, raw);
    fill(c.kind, &c.shape, 2 * number + 2, raw + kv_shape_elements(&c.shape));
    for (uint32_t i = 0; i < c.shape.head_dim; i++)
        energy[i] = ldexpf((float)(next(&seed) % 1000), -7);
    lab_quantize(lab, &c.shape, raw, c.energy ? energy : NULL, page);
}

static uint32_t length_at(const struct fixture *file, size_t at) {
    uint32_t length;
    assert_true(at + 4 <= file->size);
    memcpy(&length, file->bytes + at, 4);
    assert_true(at + 4 + length <= file->size);
    return length;
}

static void scalar_pages_are_those_of_the_prose(void **state) {
    struct fixture file;
    assert_true(fixture_open(&file, fixture_path("vectors/page_vectors.bin")));
    assert_memory_equal(file.bytes, "KVVEC001", 8);
    struct lab lab;
    assert_true(lab_open(&lab, "scalar", 1));
    uint32_t number = 0;
    for (size_t at = 8; at < file.size; number++) {
        char name[64] = {0};
        uint32_t bytes = length_at(&file, at);
        assert_true(bytes < sizeof name);
        memcpy(name, file.bytes + at + 4, bytes);
        at += 4 + bytes;
        bytes = length_at(&file, at);
        static uint8_t page[64 << 10];
        quantize_case(&lab, number, name, page);
        print_message("%s: %u bytes\n", name, bytes);
        struct vector_case c = case_parse(name);
        assert_int_equal(bytes, kv_page_bytes(&c.shape));
        assert_memory_equal(page, file.bytes + at + 4, bytes);
        assert_true(kv_page_valid(&c.shape, page));
        at += 4 + bytes;
    }
    assert_int_equal(number, 15);
    lab_close(&lab);
    fixture_close(&file);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(scalar_pages_are_those_of_the_prose)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
