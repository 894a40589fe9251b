/* SPDX-License-Identifier: Apache-2.0 */
/* disk_bench.c - spill and restore through the store against fio, in turn, on one file system.
 *
 *     disk_bench DIRECTORY [ROUNDS [BLOCK_KIB [DEPTH [threads]]]]
 *
 * Spill: blocks are reserved and committed as fast as the store takes them until 512 MiB are written,
 * checksums included; restore: all of them are read back through pins of one block, DEPTH at a time,
 * verified.  The log has gone round once before, as fio's file is laid out before: neither pays for
 * first writes.  The spills that are compared come before any restore: blocks that were read since they were
 * written are carried forward when their segment goes, up to a quarter of it, and fio carries nothing.  What
 * that costs is a row of its own, without a goal: each spill follows a restore of the one before.  fio does the same bytes with io_uring, O_DIRECT, registered buffers and files, the
 * same block size and depth.  Filling memory with content is not part of a spill, so blocks are
 * committed with whatever the arena holds.  Prints one JSON object of the shape that all benches
 * share; ratio is ours / fio's, of medians. */
#include "storage/clock.h"
#include "storage/store.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>

enum { MIB = 1 << 20, ARENA_MIB = 256, TOTAL_MIB = 512, ROUNDS_MAX = 25, DEPTH_MAX = 256 };

struct bench {
    struct kv_store *store;
    struct kv_block_extent extent;
    uint32_t count; /* blocks of a round */
    uint32_t depth;
    uint32_t waiting;
    bool failed;
};

static struct kv_digest key_of(uint64_t round, uint64_t number) {
    struct kv_digest key = {{0}};
    memcpy(key.bytes, &round, 8);
    memcpy(key.bytes + 8, &number, 8);
    return key;
}

static void turn(struct bench *bench) {
    kv_store_wait(bench->store, -1, 100000);
    kv_store_poll(bench->store);
}

static double rate(struct bench *bench, uint64_t began) {
    double bytes = (double)bench->count * bench->extent.part_count * bench->extent.part_bytes;
    return bytes / (double)(kv_clock_us() - began);
}

/* MB/s, from the first reserve to the last byte written. */
static double spill(struct bench *bench, uint64_t round) {
    uint64_t began = kv_clock_us();
    for (uint32_t i = 0; i < bench->count; i++) {
        struct kv_digest key = key_of(round, i);
        struct kv_slot slot;
        enum kv_status status;
        while ((status = kv_store_reserve(bench->store, &key, KV_CLASS_BLOCK, &bench->extent,
                                          &slot)) == KV_BUSY)
            turn(bench);
        if (status != KV_OK) bench->failed = true;
        if (status != KV_OK) return 0;
        kv_store_commit(bench->store, &slot, false);
        kv_store_poll(bench->store);
    }
    const struct kv_store_stats *stats = kv_store_stats(bench->store);
    while (stats->blocks_on_disk < stats->blocks) {
        turn(bench);
        stats = kv_store_stats(bench->store);
    }
    return rate(bench, began);
}

struct read {
    struct bench *bench;
    struct kv_pin pin;
    struct kv_digest key;
    uint8_t *address;
    uint32_t entry;
    bool busy;
};

static void on_ready(struct kv_pin *pin, enum kv_status status) {
    struct read *read = pin->owner;
    read->busy        = false;
    read->bench->waiting--;
    if (status == KV_OK) kv_store_unpin(read->bench->store, pin);
    else read->bench->failed = true;
}

/* MB/s of all blocks of a round, coldest first, so that each comes from disk. */
static double restore(struct bench *bench, uint64_t round) {
    static struct read reads[DEPTH_MAX];
    uint64_t began = kv_clock_us();
    uint32_t next  = 0;
    while (next < bench->count || bench->waiting > 0) {
        for (uint32_t i = 0; i < bench->depth && next < bench->count; i++) {
            struct read *read = &reads[i];
            if (read->busy) continue;
            *read     = (struct read){.bench = bench, .busy = true, .key = key_of(round, next++)};
            read->pin = (struct kv_pin){.keys = &read->key, .addresses = &read->address,
                                        .count = 1, .part = -1, .on_ready = on_ready,
                                        .owner = read, .entries_private = &read->entry};
            bench->waiting++;
            kv_store_pin(bench->store, &read->pin);
        }
        turn(bench);
    }
    return rate(bench, began);
}

/* MB/s that fio reports, or 0. */
static double fio(const char *directory, const char *how, const struct bench *bench) {
    char command[1024];
    uint64_t block = (uint64_t)bench->extent.part_count * bench->extent.part_bytes;
    snprintf(command, sizeof command,
             "fio --name=kivid --filename='%s/fio.dat' --rw=%s --bs=%llu --iodepth=%u --size=%dM "
             "--ioengine=io_uring --direct=1 --fixedbufs --registerfiles --randrepeat=0 "
             "--output-format=terse --terse-version=3 --fallocate=none 2>/dev/null",
             directory, how, (unsigned long long)block, bench->depth, TOTAL_MIB);
    FILE *pipe = popen(command, "r");
    if (pipe == NULL) return 0;
    char line[8192];
    double kib = 0;
    while (fgets(line, sizeof line, pipe) != NULL) {
        /* Terse version 3: field 7 is the read bandwidth, field 48 the write bandwidth, in KiB/s. */
        int wanted = strcmp(how, "read") == 0 ? 7 : 48, field = 1;
        for (char *at = strtok(line, ";"); at != NULL; at = strtok(NULL, ";"), field++) {
            if (field == wanted) kib = atof(at);
        }
    }
    pclose(pipe);
    return kib * 1024 / 1e6;
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *values, uint32_t count) {
    qsort(values, count, sizeof *values, by_value);
    return values[count / 2];
}

static void row(const char *name, double ours, double opponent, double goal, bool last) {
    double ratio = opponent > 0 ? ours / opponent : 0;
    char wanted[32] = "\"goal\": null, \"met\": null";
    if (goal > 0)
        snprintf(wanted, sizeof wanted, "\"goal\": %.1f, \"met\": %s", goal,
                 ratio >= goal ? "true" : "false");
    printf("  {\"name\": \"%s\", \"ours\": %.1f, \"opponent\": %.1f, \"opponent_name\": \"fio\", "
           "\"unit\": \"MB/s\", \"ratio\": %.3f, %s}%s\n",
           name, ours, opponent, ratio, wanted, last ? "" : ",");
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: disk_bench DIRECTORY [ROUNDS [BLOCK_KIB [DEPTH [threads]]]]\n");
        return 2;
    }
    uint32_t rounds = argc > 2 ? (uint32_t)atoi(argv[2]) : 5;
    uint32_t kib    = argc > 3 ? (uint32_t)atoi(argv[3]) : 1024;
    uint32_t depth  = argc > 4 ? (uint32_t)atoi(argv[4]) : 32;
    if (rounds < 1 || rounds > ROUNDS_MAX || kib < 32 || kib > 16384 || depth < 1 ||
        depth > DEPTH_MAX) {
        fprintf(stderr, "disk_bench: ROUNDS 1 to 25, BLOCK_KIB 32 to 16384, DEPTH 1 to 256\n");
        return 2;
    }
    char path[512], why[256];
    snprintf(path, sizeof path, "%s/store", argv[1]);
    struct kv_device *device = NULL;
    struct kv_device_options device_options = {.name = "scalar", .workers = 1};
    if (kv_device_open(&device_options, &device) != KV_OK) {
        fprintf(stderr, "disk_bench: no device\n");
        return 1;
    }
    struct kv_store_options options = {
        .device = device, .arena_bytes = (uint64_t)ARENA_MIB * MIB, .blocks_max = 1 << 17,
        .path = path, .disk_bytes = (uint64_t)(TOTAL_MIB * 2 + 256) * MIB, .io_depth = depth,
        .io_threads = argc > 5 && strcmp(argv[5], "threads") == 0};
    struct bench bench = {.depth = depth, .count = TOTAL_MIB * 1024u / kib,
                          .extent = {.part_count = 32, .part_bytes = kib * 1024 / 32}};
    if (kv_store_open(&options, &bench.store, why, sizeof why) != KV_OK) {
        fprintf(stderr, "disk_bench: %s\n", why);
        return 1;
    }
    for (uint64_t warm = 0; warm < 3; warm++) spill(&bench, warm);
    fio(argv[1], "write", &bench);
    double values[6][ROUNDS_MAX];
    for (uint32_t i = 0; i < rounds && !bench.failed; i++) {
        values[0][i] = spill(&bench, 100 + i);
        values[1][i] = fio(argv[1], "write", &bench);
    }
    for (uint32_t i = 0; i < rounds && !bench.failed; i++) {
        values[2][i] = restore(&bench, 100 + rounds - 1);
        values[3][i] = fio(argv[1], "read", &bench);
    }
    for (uint32_t i = 0; i < rounds && !bench.failed; i++) {
        values[4][i] = spill(&bench, 200 + i);
        values[5][i] = fio(argv[1], "write", &bench);
        restore(&bench, 200 + i);
    }
    struct utsname machine;
    uname(&machine);
    printf("{\"bench\": \"disk\", \"machine\": \"%s %s\", \"commit\": \"\", \"engine\": \"%s\", "
           "\"block_kib\": %u, \"depth\": %u, \"rows\": [\n",
           machine.sysname, machine.release, kv_store_io_engine(bench.store), kib, depth);
    if (!bench.failed) {
        row("spill", median(values[0], rounds), median(values[1], rounds), 0.9, false);
        row("restore", median(values[2], rounds), median(values[3], rounds), 0.9, false);
        row("spill, a quarter carried", median(values[4], rounds), median(values[5], rounds), 0, true);
    }
    printf("]}\n");
    kv_store_close(bench.store);
    kv_device_close(device);
    return bench.failed ? 1 : 0;
}
