/* SPDX-License-Identifier: Apache-2.0 */
/* commands_block.c - put and lookup: the cache below the sessions. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clients/cli/tensors.h"

struct put_totals {
    uint64_t blocks, existed, bytes_in, bytes_held;
};

static const char *const DURABILITIES[] = {"none", "volatile", "written", "synced"};

/* A file whose token ids name its blocks, and the layout it gets. */
static bool file_ready(struct ctl *ctl, const char *path, struct kvfile *kv) {
    char why[ST_WHY_BYTES];
    bool opened = kvfile_open(kv, path, why);
    if (opened && kv->token_ids) return true;
    ctl_say(ctl, EXIT_USAGE, "%s: %s", path,
            opened ? "there are no token_ids to name blocks by" : why);
    kvfile_close(kv);
    return false;
}

/* One block: its pages out, its result in.  The next block needs this one's digest for its
 * parent, so blocks go one after the other. */
static bool put_block(struct ctl *ctl, struct kivi_put *put, const struct kvfile *kv,
                      uint64_t block, const char *salt, uint32_t durability, uint8_t *rows,
                      struct kivi_digest *parent, struct put_totals *totals) {
    uint64_t begin = block * KIVI_BLOCK_TOKENS;
    size_t half = (size_t)KIVI_BLOCK_TOKENS * kv->kv_heads * kv->head_dim *
                  kivi_dtype_bytes(kv->dtype);
    for (uint32_t layer = 0; layer < kv->layers; layer++) {
        uint8_t *page = rows + layer * 2 * half;
        kvfile_turn(kv, kv->k[layer], begin, KIVI_BLOCK_TOKENS, page);
        kvfile_turn(kv, kv->v[layer], begin, KIVI_BLOCK_TOKENS, page + half);
        struct kivi_put_page send = {
            .parent = block > 0 ? parent : NULL,
            .token_ids = kv->token_ids + begin,
            .salt = salt,
            .salt_bytes = salt ? strlen(salt) : 0,
            .layer = layer,
            .form = KIVI_FORM_FULL,
            .durability = durability,
            .query_energy = kv->energy[layer] ? kv->energy[layer]->data : NULL,
            .data = page,
            .data_bytes = 2 * half,
        };
        if (kivi_put_page(put, &send, 0, &ctl->error)) return false;
    }
    struct kivi_put_result result;
    if (kivi_put_result(put, &result, 0, &ctl->error)) return false;
    if (result.code != KIVI_OK) {
        memset(&ctl->error, 0, sizeof ctl->error);
        ctl->error.code = result.code;
        snprintf(ctl->error.message, sizeof ctl->error.message, "%s", result.message);
        return false;
    }
    *parent = result.digest;
    totals->blocks++;
    totals->existed += result.existed;
    totals->bytes_in += kv->layers * 2 * half;
    totals->bytes_held += result.bytes_held;
    return true;
}

static bool put_blocks(struct ctl *ctl, const struct kvfile *kv,
                       const struct kivi_layout_info *info, const char *salt, uint32_t durability,
                       struct put_totals *totals) {
    struct kivi_put *put;
    if (kivi_put_open(ctl->client, info, &put, &ctl->error)) return false;
    size_t page_bytes = 2 * (size_t)KIVI_BLOCK_TOKENS * kv->kv_heads * kv->head_dim *
                        kivi_dtype_bytes(kv->dtype);
    uint8_t *rows = ctl_alloc(kv->layers * page_bytes);
    struct kivi_digest parent;
    struct progress progress;
    uint64_t blocks = kv->tokens / KIVI_BLOCK_TOKENS;
    bool good = true;
    progress_begin(&progress, "put", blocks, ctl->quiet);
    for (uint64_t i = 0; i < blocks && good; i++) {
        good = put_block(ctl, put, kv, i, salt, durability, rows, &parent, totals);
        progress_update(&progress, i + 1);
    }
    progress_end(&progress);
    struct kivi_error closing;
    int code = kivi_put_close(put, 0, &closing);
    if (good && code != KIVI_OK) ctl->error = closing;
    free(rows);
    return good && code == KIVI_OK;
}

static int put_file(struct ctl *ctl, const struct kvfile *kv, const struct layout_options *layout,
                    const char *salt, uint32_t durability) {
    struct kivi_layout_info info;
    struct put_totals totals = {0};
    double began = ctl_seconds();
    if (!layout_of_file(ctl, kv, layout, &info) ||
        !put_blocks(ctl, kv, &info, salt, durability, &totals))
        return ctl_failed(ctl);
    double seconds = ctl_seconds() - began;
    if (ctl->json)
        json_print(json_pack("{s:I, s:I, s:I, s:I, s:f, s:s}", "blocks", (json_int_t)totals.blocks,
                             "existed", (json_int_t)totals.existed, "bytes_in",
                             (json_int_t)totals.bytes_in, "bytes_held",
                             (json_int_t)totals.bytes_held, "seconds", seconds, "durability",
                             DURABILITIES[durability]));
    else
        printf("%" PRIu64 " blocks (%" PRIu64 " were there), %s in, %s held, in %s\n",
               totals.blocks, totals.existed, text_bytes(totals.bytes_in),
               text_bytes(totals.bytes_held), text_us(seconds * 1e6));
    return EXIT_DONE;
}

static int run_put(struct ctl *ctl, int argc, const char **argv) {
    struct layout_options layout = LAYOUT_OPTIONS_INIT;
    char *salt = NULL, *wait = NULL;
    int exit_code;
    const struct poptOption own[] = {
        {"salt", 0, POPT_ARG_STRING, &salt, 0, "makes equal texts different ones", "TEXT"},
        {"wait", 0, POPT_ARG_STRING, &wait, 0,
         "until each block is: volatile, written, synced (volatile)", "WHEN"},
        LAYOUT_OPTIONS(layout), POPT_TABLEEND};
    struct kvfile kv;
    if (!ctl_options(ctl, argc, argv, own, "FILE [OPTIONS]",
                     "FILE is as for append, with token_ids. Its whole blocks of 128 tokens are put; a rest is\n"
                     "left out.\n", 1, 1, &exit_code))
        return exit_code;
    uint32_t durability = KIVI_VOLATILE;
    while (wait && durability <= KIVI_SYNCED && strcmp(DURABILITIES[durability], wait) != 0)
        durability++;
    if (durability > KIVI_SYNCED)
        return ctl_say(ctl, EXIT_USAGE, "--wait is volatile, written or synced");
    if (!file_ready(ctl, ctl->arguments[0], &kv)) return EXIT_USAGE;
    exit_code = ctl_connect(ctl) ? put_file(ctl, &kv, &layout, salt, durability) : EXIT_USAGE;
    kvfile_close(&kv);
    return exit_code;
}

static void found_print(struct ctl *ctl, const struct kivi_found *found) {
    static const char *const tiers[] = {"?", "gpu", "host", "nvme", "remote"};
    json_t *list = json_array();
    struct table table;
    table_begin(&table, "digest|tier|>bytes");
    for (size_t i = 0; i < found->block_count; i++) {
        const struct kivi_found_block *block = &found->blocks[i];
        const char *tier = tiers[block->tier <= KIVI_TIER_REMOTE ? block->tier : 0];
        const char *digest = text_hex(block->digest.bytes, KIVI_DIGEST_BYTES);
        json_array_append_new(list, json_pack("{s:s, s:s, s:I}", "digest", digest, "tier", tier,
                                              "bytes", (json_int_t)block->bytes));
        table_cell(&table, "%s", digest);
        table_cell(&table, "%s", tier);
        table_cell(&table, "%" PRIu64, block->bytes);
    }
    if (ctl->json) {
        json_print(json_pack("{s:I, s:I, s:O}", "tokens", (json_int_t)found->tokens, "load_us",
                             (json_int_t)found->load_us, "blocks", list));
        table_free(&table);
    } else {
        table_print(&table);
        printf("%" PRIu64 " tokens, about %s to load\n", found->tokens,
               text_us((double)found->load_us));
    }
    json_decref(list);
}

static int lookup_file(struct ctl *ctl, const struct kvfile *kv,
                       const struct layout_options *layout, const char *salt) {
    struct kivi_layout_info info;
    struct kivi_found found;
    if (!layout_of_file(ctl, kv, layout, &info)) return ctl_failed(ctl);
    struct kivi_lookup lookup = {
        .salt = salt,
        .salt_bytes = salt ? strlen(salt) : 0,
        .token_ids = kv->token_ids,
        .token_count = kv->tokens,
    };
    lookup.fingerprint = info.fingerprint;
    if (kivi_block_lookup(ctl->client, &lookup, &found, 0, &ctl->error)) return ctl_failed(ctl);
    found_print(ctl, &found);
    kivi_free(found.blocks);
    return EXIT_DONE;
}

static int run_lookup(struct ctl *ctl, int argc, const char **argv) {
    struct layout_options layout = LAYOUT_OPTIONS_INIT;
    char *salt = NULL;
    int exit_code;
    const struct poptOption own[] = {
        {"salt", 0, POPT_ARG_STRING, &salt, 0, "of the chain", "TEXT"},
        LAYOUT_OPTIONS(layout), POPT_TABLEEND};
    struct kvfile kv;
    if (!ctl_options(ctl, argc, argv, own, "FILE [OPTIONS]",
                     "The longest prefix of the file's token_ids that the service holds.\n", 1, 1,
                     &exit_code))
        return exit_code;
    if (!file_ready(ctl, ctl->arguments[0], &kv)) return EXIT_USAGE;
    exit_code = ctl_connect(ctl) ? lookup_file(ctl, &kv, &layout, salt) : EXIT_USAGE;
    kvfile_close(&kv);
    return exit_code;
}

const struct command BLOCK_COMMANDS[] = {
    {"put", "FILE", "whole blocks of a file into the cache", run_put},
    {"lookup", "FILE", "what the cache holds of a text", run_lookup},
    {NULL, NULL, NULL, NULL},
};
