/* SPDX-License-Identifier: Apache-2.0 */
/* layout.h - layouts and chains: what is allowed, and how things are named.
 *
 * Fingerprint of a layout, 32 bytes:
 *     SHA-256("kivi.layout.v1" 00, page version u32, the 44 bytes of struct kv_layout little
 *             endian, length of model u32, model)
 * Root of a chain and digest of a block:
 *     root     = SHA-256("kivi.chain.v1" 00, tenant secret [32], fingerprint [32], salt)
 *     digest i = SHA-256("kivi.block.v1" 00, digest i-1 (or root) [32], 128 token ids u32)
 * Strings are given with their terminating zero ("00").  Test vectors: tests/vectors/chain.json.
 * A block without token ids (a session that shares nothing) and a session's snapshot:
 *     digest   = SHA-256("kivi.private.v1" 00, 16 random bytes of the session, block number u64)
 *     snapshot = SHA-256("kivi.session.v1" 00, tenant secret [32], name)
 *     tail     = SHA-256("kivi.tail.v1" 00, 16 random bytes of the session, generation u64,
 *                chunk u32)
 *     layout   = SHA-256("kivi.record.layout.v1" 00, fingerprint)
 *
 * Threads.  [any thread]  Pure functions.
 */
#ifndef KV_SERVICE_LAYOUT_H
#define KV_SERVICE_LAYOUT_H

#include "proto/kv_types.h"
#include "service/engine.h"

/* KV_OK, or KV_INVALID with the field's name in `field` ("layout.head_dim") and a sentence with
 * the value and what is allowed in `message`. */
enum kv_status kv_layout_check(const struct kv_layout *layout, const char *model, char field[48],
                               char message[200]);

struct kv_digest kv_layout_fingerprint(const struct kv_layout *layout, const char *model);
struct kv_digest kv_chain_root(const struct kv_digest *fingerprint, const struct kv_salt *salt);
struct kv_digest kv_chain_next(const struct kv_digest *parent,
                               const uint32_t token_ids[KV_BLOCK_TOKENS]);
struct kv_digest kv_digest_private(const uint8_t nonce[16], uint64_t block);
struct kv_digest kv_digest_session(const char *name);
struct kv_digest kv_digest_tail(const uint8_t nonce[16], uint64_t generation, uint32_t chunk);
struct kv_digest kv_digest_layout_record(const struct kv_digest *fingerprint);

#endif
