/* SPDX-License-Identifier: Apache-2.0 */
/* store_lab.c - opening, waiting, and judging bytes. */
#include "tests/storage/store_lab.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

/* A lab cannot go on without its bench. */
#define LAB_NEED(condition)                                                              \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            fprintf(stderr, "%s:%d: the lab needs %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                     \
        }                                                                                \
    } while (0)

/* ---- numbers ------------------------------------------------------------------------------ */

/* splitmix64: every state gives a good number, so any seed will do. */
static uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
    return value ^ (value >> 31);
}

uint64_t dice_bits(struct dice *dice) {
    return mix(dice->state += 0x9e3779b97f4a7c15ull);
}

uint32_t dice_below(struct dice *dice, uint32_t limit) {
    return (uint32_t)(dice_bits(dice) % limit);
}

uint64_t lab_seed(const char *test) {
    const char *given = getenv("KIVI_TEST_SEED");
    uint64_t seed     = given != NULL ? strtoull(given, NULL, 0) : mix(lab_now_us()) >> 16;
    printf("%s: KIVI_TEST_SEED=%llu replays this\n", test, (unsigned long long)seed);
    fflush(stdout);
    return seed;
}

uint64_t lab_now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* ---- the directory ------------------------------------------------------------------------ */

/* Room for two labs at work at once, copies of their disks included. */
#define MEMORY_DISK_BYTES (2ull << 30)

static bool use_memory;

void lab_use_memory(void) {
    /* A container has 64 MiB of it, or none. */
    struct statvfs found;
    use_memory = access("/dev/shm", W_OK) == 0 && statvfs("/dev/shm", &found) == 0 &&
                 (uint64_t)found.f_bavail * found.f_frsize >= MEMORY_DISK_BYTES;
}

static void path_make(char path[LAB_PATH_BYTES]) {
    const char *base = use_memory ? "/dev/shm" : getenv("TEST_TMPDIR");
    if (base == NULL) base = getenv("TMPDIR");
    if (base == NULL) base = "/tmp";
    int length = snprintf(path, LAB_PATH_BYTES, "%s/store-XXXXXX", base);
    LAB_NEED(length > 0 && length < LAB_PATH_BYTES);
    LAB_NEED(mkdtemp(path) != NULL);
}

static void name_in(const struct lab *lab, const char *name, char out[LAB_PATH_BYTES + 256]) {
    snprintf(out, LAB_PATH_BYTES + 256, "%s/%s", lab->path, name);
}

static bool is_dots(const char *name) {
    return strcmp(name, ".") == 0 || strcmp(name, "..") == 0;
}

static void each_file(const struct lab *lab,
                      void (*visit)(const struct lab *lab, const char *name, void *context),
                      void *context) {
    DIR *listing = opendir(lab->path);
    LAB_NEED(listing != NULL);
    for (struct dirent *entry; (entry = readdir(listing)) != NULL;) {
        if (!is_dots(entry->d_name)) visit(lab, entry->d_name, context);
    }
    closedir(listing);
}

static void file_remove(const struct lab *lab, const char *name, void *context) {
    char path[LAB_PATH_BYTES + 256];
    name_in(lab, name, path);
    LAB_NEED(unlink(path) == 0);
}

static void file_measure(const struct lab *lab, const char *name, void *context) {
    char path[LAB_PATH_BYTES + 256];
    struct stat found;
    name_in(lab, name, path);
    LAB_NEED(stat(path, &found) == 0);
    *(uint64_t *)context += (uint64_t)found.st_blocks * 512;
}

static void file_copy(const struct lab *lab, const char *name, void *context) {
    size_t bytes;
    uint8_t *memory = lab_file_read(lab, name, &bytes);
    lab_file_write(context, name, memory, bytes);
    free(memory);
}

uint64_t lab_disk_bytes(const struct lab *lab) {
    struct stat directory;
    LAB_NEED(stat(lab->path, &directory) == 0);
    uint64_t bytes = (uint64_t)directory.st_blocks * 512;
    each_file(lab, file_measure, &bytes);
    return bytes;
}

uint8_t *lab_file_read(const struct lab *lab, const char *name, size_t *bytes) {
    char path[LAB_PATH_BYTES + 256];
    struct stat found;
    name_in(lab, name, path);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    LAB_NEED(file >= 0 && fstat(file, &found) == 0);
    *bytes          = (size_t)found.st_size;
    uint8_t *memory = malloc(*bytes + 1);
    LAB_NEED(memory != NULL);
    LAB_NEED(pread(file, memory, *bytes, 0) == (ssize_t)*bytes);
    close(file);
    return memory;
}

void lab_file_write(const struct lab *lab, const char *name, const uint8_t *memory, size_t bytes) {
    char path[LAB_PATH_BYTES + 256];
    name_in(lab, name, path);
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    LAB_NEED(file >= 0);
    LAB_NEED(pwrite(file, memory, bytes, 0) == (ssize_t)bytes);
    close(file);
}

void lab_segment_name(uint32_t slot, char name[32]) {
    snprintf(name, 32, "segment-%05u", slot);
}

/* ---- open, close -------------------------------------------------------------------------- */

static struct kv_device *device_open(void) {
    struct kv_device_options options = {.name = "scalar", .workers = 1};
    struct kv_device *device;
    LAB_NEED(kv_device_open(&options, &device) == KV_OK);
    return device;
}

void lab_open(struct lab *lab) {
    *lab = (struct lab){0};
    path_make(lab->path);
    lab->options = (struct kv_store_options){
        .arena_bytes   = 4 * LAB_MIB,
        .blocks_max    = 1024,
        .path          = lab->path,
        .disk_bytes    = 32 * LAB_MIB,
        .segment_bytes = LAB_MIB,
        .io_depth      = 16,
    };
}

void lab_close(struct lab *lab) {
    if (lab->store != NULL) lab_stop(lab);
    each_file(lab, file_remove, NULL);
    LAB_NEED(rmdir(lab->path) == 0);
}

enum kv_status lab_try_start(struct lab *lab, char why[256]) {
    LAB_NEED(lab->store == NULL);
    lab->options.device   = device_open();
    enum kv_status status = kv_store_open(&lab->options, &lab->store, why, 256);
    if (status != KV_OK) kv_device_close(lab->options.device);
    return status;
}

void lab_start(struct lab *lab) {
    char why[256]         = "";
    enum kv_status status = lab_try_start(lab, why);
    if (status != KV_OK) fail_msg("the store does not open: %d, %s", (int)status, why);
}

void lab_stop(struct lab *lab) {
    kv_store_close(lab->store);
    kv_device_close(lab->options.device);
    lab->store = NULL;
}

void lab_crash(const struct lab *lab, struct lab *image) {
    *image = (struct lab){.options = lab->options};
    path_make(image->path);
    image->options.path = image->path;
    each_file(lab, file_copy, image);
}

void lab_filter(void) {
    const char *pattern = getenv("KIVI_TEST_FILTER");
    if (pattern != NULL) cmocka_set_test_filter(pattern);
}

/* ---- blocks ------------------------------------------------------------------------------- */

struct kv_digest lab_key(uint64_t number) {
    struct kv_digest key;
    memcpy(key.bytes, &number, sizeof number);
    for (size_t i = 1; i < KV_DIGEST_BYTES / sizeof number; i++) {
        uint64_t word = mix(number + i);
        memcpy(key.bytes + i * sizeof word, &word, sizeof word);
    }
    return key;
}

uint64_t lab_key_number(const struct kv_digest *key) {
    uint64_t number;
    memcpy(&number, key->bytes, sizeof number);
    return number;
}

struct kv_block_extent lab_extent(uint64_t number) {
    static const uint32_t sizes[] = {16, 100, 512, 1000, 2048, 4095, 4096, 4097, 4352};
    uint64_t bits = mix(number);
    return (struct kv_block_extent){
        .tag        = LAB_TAG,
        .part_count = 1 + (uint32_t)(bits >> 8) % 9,
        .part_bytes = sizes[bits % (sizeof sizes / sizeof sizes[0])],
    };
}

size_t lab_extent_bytes(const struct kv_block_extent *extent) {
    return (size_t)extent->part_count * extent->part_bytes;
}

/* The bytes of a part: number, version, part, then a stream that depends on all three.  A part of
 * fewer than 24 bytes holds the beginning of this. */
static uint64_t word_of(uint64_t number, uint64_t version, uint32_t part, size_t word) {
    if (word == 0) return number + 0x6b69766900000000ull; /* never zero, as lost bytes are */
    if (word == 1) return version;
    if (word == 2) return part;
    return mix(number * 0x9e3779b97f4a7c15ull + version * 0xd1342543de82ef95ull +
               part * 0x2545f4914f6cdd1dull + word);
}

static void part_make(uint8_t *memory, uint64_t number, uint64_t version, uint32_t part,
                      size_t bytes) {
    for (size_t at = 0; at < bytes; at += 8) {
        uint64_t word = word_of(number, version, part, at / 8);
        memcpy(memory + at, &word, bytes - at < 8 ? bytes - at : 8);
    }
}

void lab_fill(uint8_t *memory, uint64_t number, uint64_t version,
              const struct kv_block_extent *extent) {
    for (uint32_t part = 0; part < extent->part_count; part++) {
        part_make(memory + (size_t)part * extent->part_bytes, number, version, part,
                  extent->part_bytes);
    }
}

bool lab_part_valid(const uint8_t *memory, uint64_t number, uint32_t part,
                    const struct kv_block_extent *extent, uint64_t *version) {
    *version = 0;
    if (extent->part_bytes >= 16) memcpy(version, memory + 8, sizeof *version);
    for (size_t at = 0; at < extent->part_bytes; at += 8) {
        uint64_t word = word_of(number, *version, part, at / 8);
        size_t bytes  = extent->part_bytes - at < 8 ? extent->part_bytes - at : 8;
        if (memcmp(memory + at, &word, bytes) != 0) return false;
    }
    return true;
}

bool lab_block_valid(const uint8_t *memory, uint64_t number, const struct kv_block_extent *extent,
                     uint64_t *version) {
    for (uint32_t part = 0; part < extent->part_count; part++) {
        uint64_t found;
        if (!lab_part_valid(memory + (size_t)part * extent->part_bytes, number, part, extent,
                            &found))
            return false;
        if (part > 0 && found != *version) return false;
        *version = found;
    }
    return true;
}

/* ---- waiting ------------------------------------------------------------------------------ */

void lab_turn(struct lab *lab) {
    if (kv_store_poll(lab->store) == 0) kv_store_wait(lab->store, -1, 1000);
}

static void patience_end(struct lab *lab) {
    const struct kv_store_stats *stats = kv_store_stats(lab->store);
    fprintf(stderr,
            "nothing for %d s: %llu blocks, %llu resident, %llu cold, %llu on disk, arena %llu, "
            "disk %llu, errors %llu, corruptions %llu, engine %s\n",
            LAB_PATIENCE_S, (unsigned long long)stats->blocks,
            (unsigned long long)stats->blocks_resident, (unsigned long long)stats->blocks_cold,
            (unsigned long long)stats->blocks_on_disk, (unsigned long long)stats->arena_bytes_used,
            (unsigned long long)stats->disk_bytes_used, (unsigned long long)stats->io_errors,
            (unsigned long long)stats->corruptions, kv_store_io_engine(lab->store));
    abort();
}

void lab_until(struct lab *lab, bool (*done)(struct lab *lab, void *context), void *context) {
    uint64_t end = lab_now_us() + LAB_PATIENCE_S * 1000000ull;
    while (!done(lab, context)) {
        lab_turn(lab);
        if (lab_now_us() > end) patience_end(lab);
    }
}

void lab_turns_for(struct lab *lab, uint64_t us) {
    for (uint64_t end = lab_now_us() + us; lab_now_us() < end;) lab_turn(lab);
}

/* ---- writing ------------------------------------------------------------------------------ */

enum kv_status lab_put_as(struct lab *lab, uint64_t number, uint64_t version,
                          enum kv_block_class class, const struct kv_block_extent *extent,
                          bool pinned) {
    struct kv_digest key = lab_key(number);
    struct kv_slot slot;
    enum kv_status status;
    uint64_t end = lab_now_us() + LAB_PATIENCE_S * 1000000ull;
    while ((status = kv_store_reserve(lab->store, &key, class, extent, &slot)) == KV_BUSY) {
        lab_turn(lab);
        if (lab_now_us() > end) patience_end(lab);
    }
    if (status != KV_OK) return status;
    lab_fill(slot.address, number, version, extent);
    kv_store_commit(lab->store, &slot, pinned);
    return KV_OK;
}

void lab_put(struct lab *lab, uint64_t number) {
    struct kv_block_extent extent = lab_extent(number);
    assert_int_equal(lab_put_as(lab, number, 0, KV_CLASS_BLOCK, &extent, false), KV_OK);
}

struct sync_result {
    bool done;
    enum kv_status status;
};

static void sync_done(struct kv_sync *sync, enum kv_status status) {
    struct sync_result *result = sync->owner;
    LAB_NEED(!result->done);
    *result = (struct sync_result){.done = true, .status = status};
}

static bool sync_is_done(struct lab *lab, void *context) {
    return ((struct sync_result *)context)->done;
}

enum kv_status lab_sync(struct lab *lab, uint64_t number, enum kv_durability durability) {
    struct sync_result result = {0};
    struct kv_sync sync       = {
        .key = lab_key(number), .durability = durability, .on_done = sync_done, .owner = &result};
    kv_store_sync(lab->store, &sync);
    lab_until(lab, sync_is_done, &result);
    return result.status;
}

static bool all_on_disk(struct lab *lab, void *context) {
    const struct kv_store_stats *stats = kv_store_stats(lab->store);
    return stats->blocks_on_disk == stats->blocks;
}

void lab_settle(struct lab *lab) {
    lab_until(lab, all_on_disk, NULL);
    while (kv_store_poll(lab->store) > 0) continue;
}

/* ---- reading ------------------------------------------------------------------------------ */

static void pin_ready(struct kv_pin *pin, enum kv_status status) {
    struct lab_pin *lab_pin = pin->owner;
    lab_pin->status         = status;
    lab_pin->calls++;
}

void lab_pin_prepare(struct lab_pin *pin, const uint64_t *numbers, uint32_t count, int32_t part) {
    LAB_NEED(count <= KV_PIN_MAX);
    for (uint32_t i = 0; i < count; i++) pin->keys[i] = lab_key(numbers[i]);
    pin->calls = 0;
    pin->pin   = (struct kv_pin){
          .keys            = pin->keys,
          .addresses       = pin->addresses,
          .entries_private = pin->entries,
          .count           = count,
          .part            = part,
          .tag             = LAB_TAG,
          .on_ready        = pin_ready,
          .owner           = pin,
    };
}

static bool pin_is_ready(struct lab *lab, void *context) {
    return ((struct lab_pin *)context)->calls > 0;
}

enum kv_status lab_pin(struct lab *lab, struct lab_pin *pin, const uint64_t *numbers,
                       uint32_t count, int32_t part) {
    lab_pin_prepare(pin, numbers, count, part);
    kv_store_pin(lab->store, &pin->pin);
    lab_until(lab, pin_is_ready, pin);
    LAB_NEED(pin->calls == 1);
    return pin->status;
}

void lab_unpin(struct lab *lab, struct lab_pin *pin) {
    kv_store_unpin(lab->store, &pin->pin);
}

enum kv_status lab_read(struct lab *lab, uint64_t number, const struct kv_block_extent *extent,
                        uint64_t *version) {
    static struct lab_pin pin;
    enum kv_status status = lab_pin(lab, &pin, &number, 1, -1);
    if (status != KV_OK) return status;
    if (!lab_block_valid(pin.addresses[0], number, extent, version))
        fail_msg("wrong bytes in block %llu", (unsigned long long)number);
    lab_unpin(lab, &pin);
    return KV_OK;
}

enum kv_status lab_read_part(struct lab *lab, uint64_t number,
                             const struct kv_block_extent *extent, int32_t part,
                             uint64_t *version) {
    static struct lab_pin pin;
    enum kv_status status = lab_pin(lab, &pin, &number, 1, part);
    if (status != KV_OK) return status;
    if (!lab_part_valid(pin.addresses[0], number, (uint32_t)part, extent, version))
        fail_msg("wrong bytes in part %d of block %llu", part, (unsigned long long)number);
    lab_unpin(lab, &pin);
    return KV_OK;
}

enum kv_status lab_get(struct lab *lab, uint64_t number) {
    struct kv_block_extent extent = lab_extent(number);
    uint64_t version;
    return lab_read(lab, number, &extent, &version);
}

bool lab_has(struct lab *lab, uint64_t number) {
    struct kv_digest key = lab_key(number);
    struct kv_block_info info;
    return kv_store_find(lab->store, &key, &info);
}

struct kv_block_info lab_find(struct lab *lab, uint64_t number) {
    struct kv_digest key = lab_key(number);
    struct kv_block_info info;
    if (!kv_store_find(lab->store, &key, &info))
        fail_msg("block %llu is not there", (unsigned long long)number);
    return info;
}

void lab_make_cold(struct lab *lab, uint64_t number, uint64_t filler) {
    struct kv_block_extent extent = {.tag = LAB_TAG, .part_count = 1, .part_bytes = 60 * 1024};
    uint64_t first                = filler;
    while (lab_find(lab, number).tier != KV_TIER_NVME) {
        assert_int_equal(lab_put_as(lab, filler++, 0, KV_CLASS_BLOCK, &extent, false), KV_OK);
        LAB_NEED((filler - first) * extent.part_bytes <= 4 * lab->options.arena_bytes);
    }
    lab_settle(lab);
    for (; first < filler; first++) {
        struct kv_digest key = lab_key(first);
        if (lab_has(lab, first)) assert_int_equal(kv_store_drop(lab->store, &key), KV_OK);
    }
}
