/* SPDX-License-Identifier: Apache-2.0 */
/* harness.c - see harness.h. */
#include "tests/storage/harness.h"

#include "storage/clock.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SLOWER = 8 };
#else
enum { SLOWER = 1 };
#endif

enum { WAIT_MOST_US = 30 * 1000 * 1000 };

static bool use_threads;

void harness_arguments(int argc, char **argv) {
    use_threads = argc > 1 && strcmp(argv[1], "threads") == 0;
    if (getenv("KV_TEST_FILTER") != NULL) cmocka_set_test_filter(getenv("KV_TEST_FILTER"));
}

bool harness_threads(void) {
    return use_threads;
}

uint32_t harness_rounds(uint32_t optimized) {
    return optimized / SLOWER > 0 ? optimized / SLOWER : 1;
}

/* ---- The store ----------------------------------------------------------------------------- */

void harness_setup(struct harness *h) {
    memset(h, 0, sizeof *h);
    /* Bazel's directory for tests can be longer than a path here may be. */
    const char *parent = getenv("TEST_TMPDIR");
    snprintf(h->root, sizeof h->root, "%s/kivid-storage-XXXXXX",
             parent != NULL && strlen(parent) < 90 ? parent : "/tmp");
    assert_non_null(mkdtemp(h->root));
    snprintf(h->path, sizeof h->path, "%s/store", h->root);
    h->options = (struct kv_store_options){
        .arena_bytes   = 4 * MIB,
        .blocks_max    = 4096,
        .path          = h->path,
        .disk_bytes    = 17 * MIB,
        .segment_bytes = 1 * MIB,
        .io_depth      = 8,
        .io_threads    = use_threads,
    };
}

enum kv_status harness_try_open(struct harness *h) {
    if (h->options.path != NULL) h->options.path = h->path;
    return kv_store_open(&h->options, &h->store, h->why, sizeof h->why);
}

void harness_open(struct harness *h) {
    enum kv_status status = harness_try_open(h);
    if (status != KV_OK) fail_msg("open: status %d: %s", status, h->why);
}

void harness_close(struct harness *h) {
    kv_store_close(h->store);
    h->store = NULL;
}

static void directory_remove(const char *path) {
    DIR *listing = opendir(path);
    if (listing == NULL) return;
    for (struct dirent *entry; (entry = readdir(listing)) != NULL;) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        char name[512];
        snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
        if (unlink(name) != 0) directory_remove(name);
    }
    closedir(listing);
    rmdir(path);
}

void harness_teardown(struct harness *h) {
    bad_disk_clear();
    harness_close(h);
    directory_remove(h->root);
}

static void file_copy(const char *from, const char *to) {
    int in = open(from, O_RDONLY), out = open(to, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    assert_true(in >= 0 && out >= 0);
    static char buffer[1 << 16];
    for (ssize_t got; (got = read(in, buffer, sizeof buffer)) > 0;) {
        assert_int_equal(write(out, buffer, (size_t)got), got);
    }
    close(in);
    close(out);
}

void harness_copy(const struct harness *from, struct harness *to, const char *name) {
    *to       = *from;
    to->store = NULL;
    snprintf(to->path, sizeof to->path, "%s/%s", from->root, name);
    directory_remove(to->path);
    assert_int_equal(mkdir(to->path, 0700), 0);
    DIR *listing = opendir(from->path);
    assert_non_null(listing);
    for (struct dirent *entry; (entry = readdir(listing)) != NULL;) {
        if (entry->d_name[0] == '.') continue;
        char a[512], b[512];
        snprintf(a, sizeof a, "%s/%s", from->path, entry->d_name);
        snprintf(b, sizeof b, "%s/%s", to->path, entry->d_name);
        file_copy(a, b);
    }
    closedir(listing);
}

uint64_t harness_disk_bytes(const struct harness *h) {
    struct stat found;
    assert_int_equal(stat(h->path, &found), 0);
    uint64_t bytes = (uint64_t)found.st_blocks * 512;
    DIR *listing   = opendir(h->path);
    assert_non_null(listing);
    for (struct dirent *entry; (entry = readdir(listing)) != NULL;) {
        if (entry->d_name[0] == '.') continue;
        char name[512];
        snprintf(name, sizeof name, "%s/%s", h->path, entry->d_name);
        if (stat(name, &found) == 0) bytes += (uint64_t)found.st_blocks * 512;
    }
    closedir(listing);
    return bytes;
}

/* ---- Blocks -------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

struct kv_digest key_of(uint64_t number) {
    struct kv_digest key;
    for (int i = 0; i < 4; i++) {
        uint64_t word = mix(number * 4 + (uint64_t)i);
        memcpy(key.bytes + 8 * i, &word, 8);
    }
    return key;
}

static uint64_t content_word(uint64_t number, uint64_t version, uint64_t word) {
    return mix(number * 0x10001 + version) + word * 0x9e3779b97f4a7c15u;
}

void content_fill(uint8_t *memory, size_t bytes, uint64_t number, uint64_t version,
                  uint64_t offset) {
    for (size_t i = 0; i < bytes;) {
        uint64_t at = offset + i, word = content_word(number, version, at / 8);
        size_t skip = at % 8, now = 8 - skip < bytes - i ? 8 - skip : bytes - i;
        memcpy(memory + i, (uint8_t *)&word + skip, now);
        i += now;
    }
}

bool content_right(const uint8_t *memory, size_t bytes, uint64_t number, uint64_t version,
                   uint64_t offset) {
    for (size_t i = 0; i < bytes;) {
        uint64_t at = offset + i, word = content_word(number, version, at / 8);
        size_t skip = at % 8, now = 8 - skip < bytes - i ? 8 - skip : bytes - i;
        if (memcmp(memory + i, (uint8_t *)&word + skip, now) != 0) return false;
        i += now;
    }
    return true;
}

void turn_store(struct harness *h) {
    kv_store_wait(h->store, -1, 20000);
    kv_store_poll(h->store);
}

static void patience(uint64_t began) {
    if (kv_clock_us() - began > WAIT_MOST_US) fail_msg("waited for half a minute");
}

enum kv_status put_try(struct harness *h, const struct put *wanted) {
    struct kv_block_extent extent = {
        .tag        = wanted->version,
        .part_count = wanted->part_count,
        .part_bytes = wanted->part_bytes,
    };
    struct kv_digest key = key_of(wanted->number);
    struct kv_slot slot;
    enum kv_status status = kv_store_reserve(h->store, &key, wanted->class, &extent, &slot);
    if (status != KV_OK) return status;
    content_fill(slot.address, (size_t)extent.part_count * extent.part_bytes, wanted->number,
                 wanted->version, 0);
    kv_store_commit(h->store, &slot, wanted->pinned);
    return KV_OK;
}

enum kv_status put_block(struct harness *h, const struct put *wanted) {
    uint64_t began = kv_clock_us();
    enum kv_status status;
    while ((status = put_try(h, wanted)) == KV_BUSY) {
        turn_store(h);
        patience(began);
    }
    return status;
}

void put(struct harness *h, uint64_t number) {
    struct put wanted = {.number     = number,
                         .version    = 1,
                         .part_count = PARTS,
                         .part_bytes = PART_BYTES,
                         .class      = KV_CLASS_BLOCK};
    assert_int_equal(put_block(h, &wanted), KV_OK);
}

void put_keep(struct harness *h, uint64_t number, uint64_t version) {
    struct put wanted = {.number     = number,
                         .version    = version,
                         .part_count = PARTS,
                         .part_bytes = PART_BYTES,
                         .class      = KV_CLASS_KEEP};
    assert_int_equal(put_block(h, &wanted), KV_OK);
}

struct sync_note {
    struct kv_sync sync;
    bool done;
    enum kv_status status;
};

static void sync_done(struct kv_sync *sync, enum kv_status status) {
    struct sync_note *note = sync->owner;
    assert_false(note->done);
    note->done   = true;
    note->status = status;
}

enum kv_status sync_wait(struct harness *h, uint64_t number, enum kv_durability durability) {
    struct sync_note note = {
        .sync = {.key = key_of(number), .durability = durability, .on_done = sync_done}};
    note.sync.owner = &note;
    kv_store_sync(h->store, &note.sync);
    assert_false(note.done); /* never inside the call */
    for (uint64_t began = kv_clock_us(); !note.done; patience(began)) turn_store(h);
    return note.status;
}

static void pin_ready(struct kv_pin *pin, enum kv_status status) {
    struct pinned *pinned = pin->owner;
    assert_false(pinned->ready);
    pinned->ready  = true;
    pinned->status = status;
}

void pin_begin(struct harness *h, struct pinned *pinned, const uint64_t *numbers, uint32_t count,
               int32_t part, uint64_t tag) {
    pinned->ready = false;
    for (uint32_t i = 0; i < count; i++) pinned->keys[i] = key_of(numbers[i]);
    pinned->pin = (struct kv_pin){
        .keys            = pinned->keys,
        .addresses       = pinned->addresses,
        .count           = count,
        .part            = part,
        .tag             = tag,
        .on_ready        = pin_ready,
        .owner           = pinned,
        .entries_private = pinned->entries,
    };
    kv_store_pin(h->store, &pinned->pin);
    assert_false(pinned->ready); /* never inside the call */
}

enum kv_status pin_end(struct harness *h, struct pinned *pinned) {
    for (uint64_t began = kv_clock_us(); !pinned->ready; patience(began)) turn_store(h);
    return pinned->status;
}

enum kv_status get_part(struct harness *h, uint64_t number, int32_t part) {
    struct kv_block_info info;
    if (!find(h, number, &info)) return KV_NOT_FOUND;
    static struct pinned pinned;
    pin_begin(h, &pinned, &number, 1, part, info.extent.tag);
    enum kv_status status = pin_end(h, &pinned);
    if (status != KV_OK) return status;
    size_t bytes    = info.extent.part_bytes;
    uint64_t offset = part < 0 ? 0 : (uint64_t)part * bytes;
    if (part < 0) bytes *= info.extent.part_count;
    if (!content_right(pinned.addresses[0], bytes, number, info.extent.tag, offset))
        fail_msg("block %llu part %d: WRONG BYTES were returned", (unsigned long long)number, part);
    kv_store_unpin(h->store, &pinned.pin);
    return KV_OK;
}

enum kv_status get(struct harness *h, uint64_t number) {
    return get_part(h, number, -1);
}

void settle(struct harness *h) {
    for (uint64_t began = kv_clock_us();; patience(began)) {
        const struct kv_store_stats *stats = kv_store_stats(h->store);
        if (stats->blocks_on_disk == stats->blocks) return;
        turn_store(h);
    }
}

bool find(struct harness *h, uint64_t number, struct kv_block_info *info) {
    struct kv_digest key = key_of(number);
    return kv_store_find(h->store, &key, info);
}

/* ---- The bad disk -------------------------------------------------------------------------- */

static void bad_disk_hook(void *context, const struct kv_io_request *request,
                          struct kv_io_fault *fault) {
    struct bad_disk *disk = context;
    if (disk->kind >= 0 && (int)request->kind != disk->kind) return;
    disk->seen++;
    if (disk->nth == 0 || disk->seen < disk->nth || (disk->seen > disk->nth && !disk->forever))
        return;
    disk->hits++;
    *fault = disk->fault;
}

void bad_disk_set(struct bad_disk *disk) {
    disk->seen = disk->hits = 0;
    kv_io_fault_set(bad_disk_hook, disk);
}

void bad_disk_clear(void) {
    kv_io_fault_set(NULL, NULL);
}

/* ---- Randomness ---------------------------------------------------------------------------- */

uint64_t random_seed(const char *what) {
    const char *given = getenv("KV_TEST_SEED");
    uint64_t seed     = given != NULL ? strtoull(given, NULL, 0) : kv_clock_us();
    printf("%s: KV_TEST_SEED=%llu\n", what, (unsigned long long)seed);
    fflush(stdout);
    return seed;
}

uint64_t random_next(uint64_t *state) {
    *state += 0x9e3779b97f4a7c15u;
    return mix(*state);
}
