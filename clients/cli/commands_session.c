/* SPDX-License-Identifier: Apache-2.0 */
/* commands_session.c - sessions ls, show, rm. */
#include <inttypes.h>
#include <stdio.h>

#include "clients/cli/commands_tensors.h"
#include "clients/cli/kivictl.h"

static double ratio(const struct kivi_session_info *info) {
    return info->bytes_held ? (double)info->bytes_full / (double)info->bytes_held : 0;
}

static int run_ls(struct ctl *ctl, int argc, const char **argv) {
    char *after = NULL;
    int limit = 0, exit_code;
    const struct poptOption own[] = {
        {"after", 0, POPT_ARG_STRING, &after, 0, "names behind this one", "NAME"},
        {"limit", 0, POPT_ARG_INT, &limit, 0, "at most so many", "N"}, POPT_TABLEEND};
    struct kivi_session_info *infos;
    size_t count;
    if (!ctl_options(ctl, argc, argv, own, "[PREFIX] [OPTIONS]", NULL, 0, 1, &exit_code))
        return exit_code;
    if (!ctl_connect(ctl)) return EXIT_USAGE;
    const char *prefix = ctl->argument_count ? ctl->arguments[0] : NULL;
    if (kivi_session_list(ctl->client, prefix, after, limit > 0 ? (uint32_t)limit : 0, &infos,
                          &count, 0, &ctl->error))
        return ctl_failed(ctl);

    json_t *list = json_array();
    struct table table;
    table_begin(&table, "name|>tokens|>committed|>held|>ratio|>host|>nvme|>missing|open|>idle");
    for (size_t i = 0; i < count; i++) {
        const struct kivi_session_info *info = &infos[i];
        json_array_append_new(list, json_session(info));
        table_cell(&table, "%s", info->name);
        table_cell(&table, "%" PRIu64, info->length);
        table_cell(&table, "%" PRIu64, info->length_committed);
        table_cell(&table, "%s", text_bytes(info->bytes_held));
        table_cell(&table, "%.2f", ratio(info));
        table_cell(&table, "%u", info->blocks_host);
        table_cell(&table, "%u", info->blocks_nvme);
        table_cell(&table, "%u", info->blocks_missing);
        table_cell(&table, "%s", info->open ? "open" : "");
        table_cell(&table, "%s", text_us((double)info->age_ms * 1e3));
    }
    kivi_free(infos);
    if (ctl->json) {
        json_print(json_pack("{s:O}", "sessions", list));
        table_free(&table);
    } else {
        table_print(&table);
    }
    json_decref(list);
    return EXIT_DONE;
}

static void show_print(const struct kivi_session_info *info, const struct kivi_layout_info *layout,
                       const struct kivi_digest *digests, size_t count) {
    static const char *const durabilities[] = {"nothing", "in memory", "written", "synced"};
    struct table table;
    table_begin(&table, "session|");
#define ROW(name, ...) (table_cell(&table, name), table_cell(&table, __VA_ARGS__))
    ROW("name", "%s%s", info->name, info->open ? " (open)" : "");
    ROW("layout", "%s  %s, %u layers, %u KV heads, %u query heads of %u",
        text_hex(info->fingerprint.bytes, 8), layout->layout.codec.preset, layout->layout.layers,
        layout->layout.kv_heads, layout->layout.query_heads, layout->layout.head_dim);
    ROW("tokens", "%" PRIu64 ", of them %" PRIu64 " in blocks", info->length, info->sealed_tokens);
    ROW("durable", "%" PRIu64 " tokens, %s", info->length_committed,
        durabilities[info->durability <= KIVI_SYNCED ? info->durability : 0]);
    ROW("held", "%s, %.2f times less than 16 bits (%s)", text_bytes(info->bytes_held), ratio(info),
        text_bytes(info->bytes_full));
    ROW("blocks", "%u in host memory, %u on disk, %u missing", info->blocks_host,
        info->blocks_nvme, info->blocks_missing);
    ROW("idle", "%s", text_us((double)info->age_ms * 1e3));
    for (size_t i = 0; i < count; i++)
        ROW(i ? "" : "digests", "%5zu  %s", i, text_hex(digests[i].bytes, KIVI_DIGEST_BYTES));
#undef ROW
    table_print(&table);
}

static int run_show(struct ctl *ctl, int argc, const char **argv) {
    int with_digests = 0, exit_code;
    const struct poptOption own[] = {
        {"digests", 'd', POPT_ARG_NONE, &with_digests, 0, "also the digests of its blocks", NULL},
        POPT_TABLEEND};
    struct kivi_session_info info;
    struct kivi_layout_info layout;
    struct kivi_digest *digests;
    size_t count;
    if (!ctl_options(ctl, argc, argv, own, "NAME [OPTIONS]", NULL, 1, 1, &exit_code))
        return exit_code;
    if (!ctl_connect(ctl)) return EXIT_USAGE;
    if (kivi_session_describe(ctl->client, ctl->arguments[0], &info, &layout, &digests, &count, 0,
                              &ctl->error))
        return ctl_failed(ctl);
    if (!with_digests) count = 0;
    if (ctl->json) {
        json_t *value = json_session(&info), *list = json_array();
        json_object_set_new(value, "layout", json_layout(&layout));
        for (size_t i = 0; i < count; i++)
            json_array_append_new(list, json_string(text_hex(digests[i].bytes, KIVI_DIGEST_BYTES)));
        if (with_digests) json_object_set(value, "digests", list);
        json_decref(list);
        json_print(value);
    } else {
        show_print(&info, &layout, digests, count);
    }
    kivi_free(digests);
    return EXIT_DONE;
}

static int run_rm(struct ctl *ctl, int argc, const char **argv) {
    int exit_code;
    if (!ctl_options(ctl, argc, argv, NULL, "NAME... [OPTIONS]",
                     "Stops at the first that cannot be removed.\n", 1, 1 << 20, &exit_code))
        return exit_code;
    if (!ctl_connect(ctl)) return EXIT_USAGE;
    for (int i = 0; i < ctl->argument_count; i++)
        if (kivi_session_delete(ctl->client, ctl->arguments[i], 0, &ctl->error))
            return ctl_failed(ctl);
    if (ctl->json) json_print(json_pack("{s:i}", "removed", ctl->argument_count));
    return EXIT_DONE;
}

const struct command SESSION_COMMANDS[] = {
    {"sessions ls", "[PREFIX]", "sessions by name", run_ls},
    {"sessions show", "NAME", "one session", run_show},
    {"sessions rm", "NAME...", "forget sessions, durably", run_rm},
    {"append", "FILE --session NAME", "K and V of a file into a session", run_append},
    {"attend", "FILE --session NAME", "attention of the queries of a file", run_attend},
    {"fetch", "--session NAME --out FILE", "K and V out of a session, dequantized", run_fetch},
    {NULL, NULL, NULL, NULL},
};
