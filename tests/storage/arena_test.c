/* SPDX-License-Identifier: Apache-2.0 */
/* arena_test.c - extents never overlap, always coalesce, and fit as well as they can.
 *
 * The model is an array with one owner per unit; best fit is found in it by looking at every run. */
#include "tests/storage/harness.h"

#include "storage/arena.h"

#include <stdlib.h>

enum { UNITS = 700, HELD_MAX = 200 };

struct model {
    uint32_t owner[UNITS]; /* 0: free, else the first unit of the extent plus 1 */
};

static uint32_t model_best(const struct model *model, uint32_t units) {
    uint32_t best = KV_ARENA_NONE, best_units = UINT32_MAX;
    for (uint32_t unit = 0; unit < UNITS;) {
        uint32_t run = 0;
        while (unit + run < UNITS && model->owner[unit + run] == 0) run++;
        if (run >= units && run < best_units) {
            best       = unit;
            best_units = run;
        }
        unit += run + 1;
    }
    return best;
}

static void random_walk_agrees_with_the_model(void **state) {
    uint64_t seed = random_seed("arena");
    struct kv_arena *arena;
    static struct model model;
    uint32_t held[HELD_MAX], sizes[HELD_MAX], count = 0;
    memset(&model, 0, sizeof model);
    assert_int_equal(kv_arena_open(UNITS, &arena), KV_OK);
    for (uint32_t step = 0; step < harness_rounds(40000); step++) {
        if (count < HELD_MAX && random_below(&seed, 2) == 0) {
            uint32_t most  = random_below(&seed, 10) == 0 ? 200 : 20;
            uint32_t units = 1 + (uint32_t)random_below(&seed, most);
            uint32_t want  = model_best(&model, units);
            uint32_t unit  = kv_arena_alloc(arena, units);
            assert_int_equal(unit, want);
            if (unit == KV_ARENA_NONE) {
                assert_true(kv_arena_units_largest(arena) < units);
                continue;
            }
            assert_int_equal(kv_arena_units(arena, unit), units);
            for (uint32_t i = 0; i < units; i++) model.owner[unit + i] = unit + 1;
            sizes[count]  = units;
            held[count++] = unit;
        } else if (count > 0) {
            uint32_t which = (uint32_t)random_below(&seed, count);
            kv_arena_free(arena, held[which]);
            memset(&model.owner[held[which]], 0, sizes[which] * sizeof *model.owner);
            held[which]  = held[--count];
            sizes[which] = sizes[count];
        }
        if (step % 64 == 0) kv_arena_check(arena);
    }
    while (count > 0) kv_arena_free(arena, held[--count]);
    kv_arena_check(arena);
    assert_int_equal(kv_arena_units_used(arena), 0);
    assert_int_equal(kv_arena_units_largest(arena), UNITS);
    kv_arena_close(arena);
}

static void the_smallest_arena_works(void **state) {
    struct kv_arena *arena;
    assert_int_equal(kv_arena_open(1, &arena), KV_OK);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(kv_arena_alloc(arena, 2), KV_ARENA_NONE);
        assert_int_equal(kv_arena_alloc(arena, 1), 0);
        assert_int_equal(kv_arena_alloc(arena, 1), KV_ARENA_NONE);
        kv_arena_check(arena);
        kv_arena_free(arena, 0);
    }
    kv_arena_close(arena);
}

/* Alternating used and free units: the most free runs there can be. */
static void as_many_runs_as_possible(void **state) {
    struct kv_arena *arena;
    assert_int_equal(kv_arena_open(UNITS, &arena), KV_OK);
    for (uint32_t i = 0; i < UNITS; i++) assert_int_equal(kv_arena_alloc(arena, 1), i);
    for (uint32_t i = 0; i < UNITS; i += 2) kv_arena_free(arena, i);
    kv_arena_check(arena);
    assert_int_equal(kv_arena_units_largest(arena), 1);
    for (uint32_t i = 1; i < UNITS; i += 2) kv_arena_free(arena, i);
    kv_arena_check(arena);
    assert_int_equal(kv_arena_units_largest(arena), UNITS);
    kv_arena_close(arena);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_walk_agrees_with_the_model),
        cmocka_unit_test(the_smallest_arena_works),
        cmocka_unit_test(as_many_runs_as_possible),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
