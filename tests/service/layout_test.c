/* SPDX-License-Identifier: Apache-2.0 */
/* layout_test.c - names equal the vectors that tests/vectors/make_chain.py computed without us. */
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>

#include <jansson.h>
#include <stdio.h>

#include "service/layout.h"

static const char *vectors_path = "tests/vectors/chain.json";

static void expect_hex(const json_t *object, const char *key, const void *bytes, size_t count) {
    char hex[2 * 64 + 1] = "";
    assert_true(count <= 64);
    for (size_t i = 0; i < count; i++) sprintf(hex + 2 * i, "%02x", ((const uint8_t *)bytes)[i]);
    const char *expected = json_string_value(json_object_get(object, key));
    assert_non_null(expected);
    assert_string_equal(hex, expected);
}

static size_t unhex(const json_t *object, const char *key, uint8_t *out) {
    const char *hex = json_string_value(json_object_get(object, key));
    size_t count = strlen(hex) / 2;
    for (size_t i = 0; i < count; i++) {
        unsigned byte;
        assert_int_equal(sscanf(hex + 2 * i, "%2x", &byte), 1);
        out[i] = (uint8_t)byte;
    }
    return count;
}

static uint32_t number(const json_t *object, const char *key) {
    return (uint32_t)json_integer_value(json_object_get(object, key));
}

static struct kv_layout layout_from(const json_t *from) {
    struct kv_layout layout = {
        .layers = (uint16_t)number(from, "layers"),
        .heads = (uint16_t)number(from, "heads"),
        .heads_q = (uint16_t)number(from, "heads_q"),
        .head_dim = (uint16_t)number(from, "head_dim"),
        .block_tokens = KV_BLOCK_TOKENS,
        .window_tokens = (uint16_t)number(from, "window_tokens"),
        .sink_blocks = (uint16_t)number(from, "sink_blocks"),
        .dtype = (uint8_t)number(from, "dtype"),
        .score_scale = (float)json_number_value(json_object_get(from, "score_scale")),
        .codec = {.kind = (uint8_t)number(from, "kind"),
                  .key_bits = (uint8_t)number(from, "key_bits"),
                  .value_bits = (uint8_t)number(from, "value_bits"),
                  .group = (uint8_t)number(from, "group"),
                  .value_rotated = (uint8_t)number(from, "value_rotated")},
    };
    const json_t *mixes = json_object_get(from, "mixes");
    layout.codec.mix_count = (uint8_t)json_array_size(mixes);
    for (size_t m = 0; m < layout.codec.mix_count; m++)
        for (size_t q = 0; q < KV_QUARTERS; q++)
            layout.codec.mixes[m][q] =
                (uint8_t)json_integer_value(json_array_get(json_array_get(mixes, m), q));
    return layout;
}

static json_t *load(void) {
    json_error_t error;
    json_t *all = json_load_file(vectors_path, 0, &error);
    if (!all) print_error("%s: %s\n", vectors_path, error.text);
    assert_non_null(all);
    return all;
}

static void chains_equal_the_vectors(void **state) {
    json_t *all = load();
    const json_t *chains = json_object_get(all, "chains");
    assert_int_equal(json_array_size(chains), 3);
    for (size_t i = 0; i < json_array_size(chains); i++) {
        const json_t *chain = json_array_get(chains, i);
        struct kv_layout layout = layout_from(json_object_get(chain, "layout"));
        const char *model = json_string_value(json_object_get(chain, "model"));
        char field[48] = "", message[200] = "";
        assert_int_equal(kv_layout_check(&layout, model, field, message), KV_OK);
        expect_hex(chain, "layout_bytes", &layout, sizeof layout);
        struct kv_digest fingerprint = kv_layout_fingerprint(&layout, model);
        expect_hex(chain, "fingerprint", fingerprint.bytes, 32);
        struct kv_digest record = kv_digest_layout_record(&fingerprint);
        expect_hex(chain, "layout_record", record.bytes, 32);

        struct kv_salt salt;
        salt.count = (uint32_t)unhex(chain, "salt", salt.bytes);
        struct kv_digest digest = kv_chain_root(&fingerprint, &salt);
        expect_hex(chain, "root", digest.bytes, 32);
        uint32_t x = number(chain, "token_seed"), ids[KV_BLOCK_TOKENS];
        const json_t *digests = json_object_get(chain, "digests");
        for (size_t b = 0; b < json_array_size(digests); b++) {
            for (int t = 0; t < KV_BLOCK_TOKENS; t++) {
                x = x * 1664525u + 1013904223u;
                ids[t] = x >> 15;
            }
            digest = kv_chain_next(&digest, ids);
            json_t *one = json_pack("{s:O}", "digest", json_array_get(digests, b));
            expect_hex(one, "digest", digest.bytes, 32);
            json_decref(one);
        }
    }
    json_decref(all);
}

static void other_names_equal_the_vectors(void **state) {
    json_t *all = load();
    size_t i;
    json_t *one;
    uint8_t nonce[16];
    json_array_foreach(json_object_get(all, "private"), i, one) {
        assert_int_equal(unhex(one, "nonce", nonce), 16);
        uint64_t block = (uint64_t)json_integer_value(json_object_get(one, "block"));
        struct kv_digest digest = kv_digest_private(nonce, block);
        expect_hex(one, "digest", digest.bytes, 32);
    }
    json_array_foreach(json_object_get(all, "tails"), i, one) {
        assert_int_equal(unhex(one, "nonce", nonce), 16);
        uint64_t generation = (uint64_t)json_integer_value(json_object_get(one, "generation"));
        struct kv_digest digest = kv_digest_tail(nonce, generation, number(one, "chunk"));
        expect_hex(one, "digest", digest.bytes, 32);
    }
    json_array_foreach(json_object_get(all, "sessions"), i, one) {
        struct kv_digest digest =
            kv_digest_session(json_string_value(json_object_get(one, "name")));
        expect_hex(one, "digest", digest.bytes, 32);
    }
    json_decref(all);
}

int main(int argc, char **argv) {
    if (argc > 1) vectors_path = argv[1];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chains_equal_the_vectors),
        cmocka_unit_test(other_names_equal_the_vectors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
