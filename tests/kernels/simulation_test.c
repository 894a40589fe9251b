/* SPDX-License-Identifier: Apache-2.0 */
/* The pages are those that were simulated, and cost attention what was simulated.
 *
 * Real keys and values (tests/data/BUILD says of what) go through the backend and through
 * the simulation (simulation.h).  Fixed point against floating point may decide a code or a
 * range differently now and then; the reconstruction must err as much as the simulated one,
 * layer by layer and head by head, and nearly all codes must be equal.
 *
 * Attention: the 32 newest queries of the 4096-token fixture, each seeing the tokens up to
 * its own, over the first block and the newest 128 tokens exact and everything between
 * packed, against attention over the full KV.  Relative error, both layers and all rows
 * together: 0.166 for kivi2, 0.286 for kivi2-paper (which keeps no first block).
 */
#include <math.h>

#include "tests/kernels/cases.h"
#include "tests/kernels/simulation.h"

enum { D = 128, H = 2, HEADS_Q = 8, ROWS = 32, LAYERS_MAX = 3 };

static struct lab lab;

static int open_lab(void **state) {
    return lab_open(&lab, "auto", 2) ? 0 : 1;
}

static int close_lab(void **state) {
    lab_close(&lab);
    return 0;
}

static struct tensor find(const struct fixture *file, const char *what, int layer) {
    char name[16];
    struct tensor tensor;
    snprintf(name, sizeof name, "%s.%d", what, layer);
    assert_true(fixture_find(file, name, &tensor));
    return tensor;
}

/* One block of all heads as a raw page. */
static void block_copy(const struct fixture *file, int layer, uint32_t block, uint16_t *raw) {
    struct tensor k = find(file, "k", layer), v = find(file, "v", layer);
    for (uint32_t head = 0; head < H; head++) {
        size_t from = ((size_t)head * k.shape[1] + block * T) * D, to = (size_t)head * T * D;
        memcpy(raw + to, (const uint16_t *)k.data + from, T * D * 2);
        memcpy(raw + H * T * D + to, (const uint16_t *)v.data + from, T * D * 2);
    }
}

/* ---- reconstruction ---------------------------------------------------------------------------- */

/* Sums over the blocks of one layer and head; [0] keys, [1] values.  Errors of keys count by
 * their channel's energy, as they do in the choice of a mix: where two mixes cost nearly the
 * same, a page may take the other one, and only the weighted errors are then alike. */
struct tally {
    double ours[2];
    double simulated[2];
    double codes[2];
    double codes_equal[2];
};

static void tally_page(struct tally *tally, const struct kv_shape *shape, const uint8_t *record,
                       const double *const x[2], const float *energy,
                       const struct simulated *sim) {
    double *hat[2] = {allocate(T * D * sizeof(double)), allocate(T * D * sizeof(double))};
    decode_record(shape, record, hat[0], hat[1]);
    const double *simulated[2] = {sim->keys, sim->values};
    for (int side = 0; side < 2; side++)
        for (uint32_t i = 0; i < T * D; i++) {
            double weight = side == 0 && energy != NULL ? (double)energy[i % D] : 1;
            tally->ours[side] += weight * pow(hat[side][i] - x[side][i], 2);
            tally->simulated[side] += weight * pow(simulated[side][i] - x[side][i], 2);
        }
    const uint8_t *order = record + kv_page_map(shape).key_order;
    for (uint32_t slot = 0; slot < D; slot++) {
        uint32_t c = order[slot], width = shape->codec.mixes[record[0]][slot / (D / 4)];
        for (uint32_t t = 0; t < T; t++) {
            tally->codes[0]++;
            tally->codes_equal[0] += width == sim->key_width[c] &&
                                     decode_key_code(shape, record, slot, t) == sim->key_codes[c * T + t];
        }
    }
    for (uint32_t i = 0; i < T * D; i++) {
        tally->codes[1]++;
        tally->codes_equal[1] += decode_value_code(shape, record, i / D, i % D) == sim->value_codes[i];
    }
    free(hat[0]);
    free(hat[1]);
}

static void compare_layer(const struct fixture *file, const struct kv_shape *shape, int layer,
                          bool with_energy, struct tally *total) {
    const float *energy = with_energy ? find(file, "q_energy", layer).data : NULL;
    uint32_t blocks = find(file, "k", layer).shape[1] / T;
    uint16_t *raw = allocate(kv_shape_bytes_raw(shape));
    uint8_t *page = allocate(kv_page_bytes(shape));
    struct simulated sim = {allocate(T * D * 8), allocate(T * D * 8), allocate(T * D),
                            allocate(T * D), {0}};
    double *x[2] = {allocate(T * D * 8), allocate(T * D * 8)};
    struct tally tallies[H] = {0};
    for (uint32_t block = 0; block < blocks; block++) {
        block_copy(file, layer, block, raw);
        lab_quantize(&lab, shape, raw, energy, page);
        for (uint32_t head = 0; head < H; head++) {
            decode_raw(shape, raw, head, x[0], x[1]);
            const float *own = energy == NULL ? NULL : energy + head * D;
            simulate_page(&shape->codec, D, x[0], x[1], own, &sim);
            tally_page(&tallies[head], shape, page + head * kv_page_map(shape).record_bytes,
                       (const double *const *)x, own, &sim);
        }
    }
    for (uint32_t head = 0; head < H; head++)
        for (int side = 0; side < 2; side++) {
            struct tally *t = &tallies[head];
            double ratio = sqrt(t->ours[side] / t->simulated[side]);
            print_message("layer %d head %u %s: error %.5f of the simulated, codes equal %.4f %%\n", layer,
                          head, side ? "values" : "keys  ", ratio,
                          100 * t->codes_equal[side] / t->codes[side]);
            assert_true(fabs(ratio - 1) < 0.005);
            total->codes[side] += t->codes[side];
            total->codes_equal[side] += t->codes_equal[side];
        }
    for (int side = 0; side < 2; side++) free(x[side]);
    free(sim.keys);
    free(sim.values);
    free(sim.key_codes);
    free(sim.value_codes);
    free(raw);
    free(page);
}

static void compare_fixture(const char *name, const char *preset, const int *layers, int count,
                            bool with_energy) {
    struct fixture file;
    struct kv_shape shape = shape_of(preset, H, D, KV_DTYPE_F16);
    struct tally total = {0};
    assert_true(fixture_open(&file, fixture_path(name)));
    for (int i = 0; i < count; i++) compare_layer(&file, &shape, layers[i], with_energy, &total);
    for (int side = 0; side < 2; side++) {
        double equal = total.codes_equal[side] / total.codes[side];
        print_message("%s %s: codes equal %.4f %%\n", preset, side ? "values" : "keys", 100 * equal);
        assert_true(equal > 0.99);
    }
    fixture_close(&file);
}

static const int layers_640[] = {0, 3, 7}, layers_4k[] = {0, 5};

static void kivi2_reconstructs_what_was_simulated(void **state) {
    compare_fixture("data/llama30m-wikitext.safetensors", "kivi2", layers_640, 3, false);
}

static void kivi2_with_query_energy_reconstructs_what_was_simulated(void **state) {
    compare_fixture("data/llama30m-wikitext-4k.safetensors", "kivi2", layers_4k, 2, true);
}

static void rotated_values_reconstruct_what_was_simulated(void **state) {
    compare_fixture("data/llama30m-wikitext.safetensors", "kivi1.5", layers_640, 3, false);
}

/* ---- attention error ------------------------------------------------------------------------------ */

/* The context of one layer as pages: sink_blocks raw, then packed, the last block raw. */
struct pages {
    uint32_t count;
    struct kv_page_ref refs[64];
};

static void pages_make(const struct fixture *file, const struct kv_shape *shape, int layer,
                       uint32_t sink_blocks, bool packed, struct pages *pages) {
    const float *energy = find(file, "q_energy", layer).data;
    pages->count = find(file, "k", layer).shape[1] / T;
    assert_true(pages->count <= 64);
    for (uint32_t block = 0; block < pages->count; block++) {
        uint16_t *raw = allocate(kv_shape_bytes_raw(shape));
        block_copy(file, layer, block, raw);
        pages->refs[block] = (struct kv_page_ref){raw, T, 1};
        if (!packed || block < sink_blocks || block == pages->count - 1) continue;
        uint8_t *page = allocate(kv_page_bytes(shape));
        lab_quantize(&lab, shape, raw, energy, page);
        pages->refs[block] = (struct kv_page_ref){page, T, 0};
        free(raw);
    }
}

static void ask(const struct fixture *file, const struct kv_shape *shape, int layer,
                const struct pages *pages, float *out) {
    /* q.L is [query head][newest token][channel]; the call wants rows first. */
    static uint16_t query[ROWS * HEADS_Q * D];
    static float lse[ROWS * HEADS_Q];
    const uint16_t *q = find(file, "q", layer).data;
    uint32_t visible[ROWS];
    for (uint32_t row = 0; row < ROWS; row++) {
        visible[row] = pages->count * T - ROWS + row + 1;
        for (uint32_t head = 0; head < HEADS_Q; head++)
            memcpy(query + (row * HEADS_Q + head) * D, q + (head * ROWS + row) * D, D * 2);
    }
    struct kv_attend item = {.query = query, .dtype = KV_DTYPE_F16, .heads_q = HEADS_Q, .rows = ROWS,
                             .score_scale = 1 / sqrtf(D), .page_count = pages->count,
                             .pages = pages->refs, .visible = visible, .out = out, .lse = lse};
    lab_attend(&lab, shape, &item);
}

static void pages_free(struct pages *pages) {
    for (uint32_t i = 0; i < pages->count; i++) free((void *)pages->refs[i].page);
}

static double attention_error(const char *preset, uint32_t sink_blocks) {
    static float exact[ROWS * HEADS_Q * D], approximate[ROWS * HEADS_Q * D];
    struct kv_shape shape = shape_of(preset, H, D, KV_DTYPE_F16);
    struct fixture file;
    double error = 0, size = 0;
    assert_true(fixture_open(&file, fixture_path("data/llama30m-wikitext-4k.safetensors")));
    for (int i = 0; i < 2; i++) {
        struct pages full, packed;
        double layer_error = 0, layer_size = 0;
        pages_make(&file, &shape, layers_4k[i], 0, false, &full);
        pages_make(&file, &shape, layers_4k[i], sink_blocks, true, &packed);
        ask(&file, &shape, layers_4k[i], &full, exact);
        ask(&file, &shape, layers_4k[i], &packed, approximate);
        for (uint32_t e = 0; e < ROWS * HEADS_Q * D; e++) {
            layer_error += pow((double)approximate[e] - exact[e], 2);
            layer_size += pow((double)exact[e], 2);
        }
        print_message("%s layer %d: relative error %.4f\n", preset, layers_4k[i],
                      sqrt(layer_error / layer_size));
        error += layer_error;
        size += layer_size;
        pages_free(&full);
        pages_free(&packed);
    }
    fixture_close(&file);
    print_message("%s: relative error %.4f\n", preset, sqrt(error / size));
    return sqrt(error / size);
}

static void attention_errs_as_simulated(void **state) {
    assert_true(fabs(attention_error("kivi2", 1) / 0.166 - 1) < 0.03);
    assert_true(fabs(attention_error("kivi2-paper", 0) / 0.286 - 1) < 0.03);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(kivi2_reconstructs_what_was_simulated),
        cmocka_unit_test(kivi2_with_query_energy_reconstructs_what_was_simulated),
        cmocka_unit_test(rotated_values_reconstruct_what_was_simulated),
        cmocka_unit_test(attention_errs_as_simulated),
    };
    return cmocka_run_group_tests(tests, open_lab, close_lab);
}
