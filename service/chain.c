/* SPDX-License-Identifier: Apache-2.0 */
/* chain.c - how everything that is stored gets its name.
 *
 * layout.h writes down what goes into each digest.  Every name is SHA-256 over a string that says
 * what kind of name it is, with its terminating zero, so that no two kinds can ever collide, and
 * then over fields of fixed size.  Numbers are little endian, which is how this machine holds them.
 */
#include "service/layout.h"

/* The low-level calls: the EVP ones allocate, and a digest is computed on the request path, where
 * nothing does.  Both end up in the same assembly. */
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/sha.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "digests hash little-endian numbers");
static_assert(SHA256_DIGEST_LENGTH == KV_DIGEST_BYTES, "a digest is SHA-256");

/* Until tenants exist everybody is the same one, whose secret is nothing. */
static const uint8_t tenant_secret[32];

static SHA256_CTX hash_begin(const char *kind) {
    SHA256_CTX hash;
    SHA256_Init(&hash);
    SHA256_Update(&hash, kind, strlen(kind) + 1);
    return hash;
}

static struct kv_digest hash_end(SHA256_CTX *hash) {
    struct kv_digest digest;
    SHA256_Final(digest.bytes, hash);
    return digest;
}

struct kv_digest kv_layout_fingerprint(const struct kv_layout *layout, const char *model) {
    const uint32_t page_version = KV_PAGE_VERSION;
    const uint32_t model_bytes = (uint32_t)strlen(model);
    SHA256_CTX hash = hash_begin("kivi.layout.v1");
    SHA256_Update(&hash, &page_version, sizeof page_version);
    SHA256_Update(&hash, layout, sizeof *layout);
    SHA256_Update(&hash, &model_bytes, sizeof model_bytes);
    SHA256_Update(&hash, model, model_bytes);
    return hash_end(&hash);
}

struct kv_digest kv_chain_root(const struct kv_digest *fingerprint, const struct kv_salt *salt) {
    SHA256_CTX hash = hash_begin("kivi.chain.v1");
    SHA256_Update(&hash, tenant_secret, sizeof tenant_secret);
    SHA256_Update(&hash, fingerprint->bytes, KV_DIGEST_BYTES);
    SHA256_Update(&hash, salt->bytes, salt->count);
    return hash_end(&hash);
}

struct kv_digest kv_chain_next(const struct kv_digest *parent,
                               const uint32_t token_ids[KV_BLOCK_TOKENS]) {
    SHA256_CTX hash = hash_begin("kivi.block.v1");
    SHA256_Update(&hash, parent->bytes, KV_DIGEST_BYTES);
    SHA256_Update(&hash, token_ids, KV_BLOCK_TOKENS * sizeof token_ids[0]);
    return hash_end(&hash);
}

struct kv_digest kv_digest_private(const uint8_t nonce[16], uint64_t block) {
    SHA256_CTX hash = hash_begin("kivi.private.v1");
    SHA256_Update(&hash, nonce, 16);
    SHA256_Update(&hash, &block, sizeof block);
    return hash_end(&hash);
}

struct kv_digest kv_digest_session(const char *name) {
    SHA256_CTX hash = hash_begin("kivi.session.v1");
    SHA256_Update(&hash, tenant_secret, sizeof tenant_secret);
    SHA256_Update(&hash, name, strlen(name));
    return hash_end(&hash);
}

struct kv_digest kv_digest_tail(const uint8_t nonce[16], uint64_t generation, uint32_t chunk) {
    SHA256_CTX hash = hash_begin("kivi.tail.v1");
    SHA256_Update(&hash, nonce, 16);
    SHA256_Update(&hash, &generation, sizeof generation);
    SHA256_Update(&hash, &chunk, sizeof chunk);
    return hash_end(&hash);
}

struct kv_digest kv_digest_layout_record(const struct kv_digest *fingerprint) {
    SHA256_CTX hash = hash_begin("kivi.record.layout.v1");
    SHA256_Update(&hash, fingerprint->bytes, KV_DIGEST_BYTES);
    return hash_end(&hash);
}
