/* SPDX-License-Identifier: Apache-2.0 */
/* log_files.c - the directory: its lock, its files, its beginning and its end. */
#include "storage/log.h"

#include "proto/kv_check.h"
#include "storage/clock.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    LOCK_TRIES = 400,        /* times 5 ms: a killed process's last writes may take a moment */
    SLOTS_MAX = 1 << 20,
    FILES_SPARE = 256,       /* descriptors left to the rest of the process */
    RUN_GROUP = 64,
    /* Of the cap, for what is not segments: the superblock, the directory, the file system's own
     * blocks. */
    OVERHEAD_BYTES = 64 * 1024,
};

static void slot_name(uint32_t slot, char name[32]) {
    snprintf(name, 32, "segment-%05u", slot);
}

/* ---- The directory ------------------------------------------------------------------------- */

static enum kv_status directory_open(struct kv_log *log, char *why, size_t why_bytes) {
    const char *path = log->options.path;
    if (mkdir(path, 0700) != 0 && errno != EEXIST) {
        snprintf(why, why_bytes, "cannot create %s: %s", path, strerror(errno));
        return KV_IO_ERROR;
    }
    log->directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (log->directory < 0) {
        snprintf(why, why_bytes, "cannot open %s: %s", path, strerror(errno));
        return KV_IO_ERROR;
    }
    return KV_OK;
}

/* Which slots have files, as the highest plus one.  Anything else in the directory means that it
 * is not ours, and nothing in it is touched. */
static enum kv_status directory_read(struct kv_log *log, uint32_t *slots, char *why,
                                     size_t why_bytes) {
    DIR *listing = opendir(log->options.path);
    if (listing == NULL) {
        snprintf(why, why_bytes, "cannot list %s: %s", log->options.path, strerror(errno));
        return KV_IO_ERROR;
    }
    enum kv_status status = KV_OK;
    *slots                = 0;
    for (struct dirent *entry; status == KV_OK && (entry = readdir(listing)) != NULL;) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        if (strcmp(entry->d_name, "superblock") == 0) continue;
        if (strcmp(entry->d_name, "lost+found") == 0) continue; /* a file system of its own */
        unsigned slot;
        char name[32];
        if (sscanf(entry->d_name, "segment-%u", &slot) == 1 && slot < SLOTS_MAX) {
            slot_name(slot, name);
            if (strcmp(name, entry->d_name) == 0) {
                if (slot + 1 > *slots) *slots = slot + 1;
                continue;
            }
        }
        snprintf(why, why_bytes, "%s holds something else: %s", log->options.path, entry->d_name);
        status = KV_INVALID;
    }
    closedir(listing);
    return status;
}

/* ---- Files --------------------------------------------------------------------------------- */

static int file_open(struct kv_log *log, const char *name) {
    int flags = O_RDWR | O_CREAT | O_CLOEXEC;
    int file  = -1;
    if (!log->buffered) {
        file = openat(log->directory, name, flags | O_DIRECT, 0600);
        if (file < 0 && errno == EINVAL) log->buffered = true;
    }
    if (log->buffered) file = openat(log->directory, name, flags, 0600);
    return file;
}

/* The superblock is the lock.  The I/O engine registers it too (io_uring.c says why). */
static enum kv_status superblock_lock(struct kv_log *log, char *why, size_t why_bytes) {
    log->superblock_file = file_open(log, "superblock");
    if (log->superblock_file < 0) {
        snprintf(why, why_bytes, "cannot open the superblock: %s", strerror(errno));
        return KV_IO_ERROR;
    }
    for (int i = 0; i < LOCK_TRIES; i++) {
        if (flock(log->superblock_file, LOCK_EX | LOCK_NB) == 0) return KV_OK;
        struct timespec pause = {.tv_nsec = 5 * 1000 * 1000};
        nanosleep(&pause, NULL);
    }
    snprintf(why, why_bytes, "another process has %s", log->options.path);
    return KV_BUSY;
}

static bool all_zero(const uint8_t *memory, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
        if (memory[i] != 0) return false;
    }
    return true;
}

/* Reads A and B, or begins a new store if neither was ever written. */
static enum kv_status superblock_read(struct kv_log *log, uint32_t slots, char *why,
                                      size_t why_bytes) {
    uint8_t *pages = aligned_alloc(KV_PAGE, 2 * KV_PAGE);
    if (pages == NULL) {
        snprintf(why, why_bytes, "out of memory");
        return KV_BUSY;
    }
    memset(pages, 0, 2 * KV_PAGE);
    ssize_t got = pread(log->superblock_file, pages, 2 * KV_PAGE, 0);
    struct kv_superblock a, b;
    bool has_a = got >= KV_PAGE && kv_superblock_decode(pages, &a);
    bool has_b = got >= 2 * KV_PAGE && kv_superblock_decode(pages + KV_PAGE, &b);
    bool blank = got >= 0 && all_zero(pages, (size_t)got);
    free(pages);
    if (got < 0) {
        snprintf(why, why_bytes, "cannot read the superblock: %s", strerror(errno));
        return KV_IO_ERROR;
    }
    if (has_a || has_b) {
        log->superblock = has_a && (!has_b || a.epoch > b.epoch) ? a : b;
        if (log->superblock.segment_bytes != log->options.segment_bytes) {
            snprintf(why, why_bytes, "%s was made with segments of %llu bytes, not %llu",
                     log->options.path, (unsigned long long)log->superblock.segment_bytes,
                     (unsigned long long)log->options.segment_bytes);
            return KV_INVALID;
        }
        return KV_OK;
    }
    if (!blank) {
        snprintf(why, why_bytes, "%s/superblock is not one of ours, or both copies are damaged",
                 log->options.path);
        return KV_INVALID;
    }
    /* A blank superblock beside segments: the process died before its first write.  Whatever the
     * segments hold belongs to another store and is refused one by one. */
    (void)slots;
    log->fresh                    = true;
    log->superblock               = (struct kv_superblock){.next_sequence = 1};
    log->superblock.segment_bytes = log->options.segment_bytes;
    ssize_t random                = getrandom(log->superblock.store, KV_IDENTITY_BYTES, 0);
    KV_CHECK(random == KV_IDENTITY_BYTES);
    return KV_OK;
}

/* One descriptor per segment: asks for as many as the hard limit allows. */
static enum kv_status files_limit(struct kv_log *log, char *why, size_t why_bytes) {
    struct rlimit limit;
    uint64_t need = (uint64_t)log->slot_count + FILES_SPARE;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= need) return KV_OK;
    limit.rlim_cur = need < limit.rlim_max ? need : limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (limit.rlim_cur >= need) return KV_OK;
    snprintf(why, why_bytes,
             "%u segments need %llu file descriptors, the limit is %llu: raise it "
             "(LimitNOFILE=), or use larger segments",
             log->slot_count, (unsigned long long)need, (unsigned long long)limit.rlim_max);
    return KV_INVALID;
}

static enum kv_status files_open(struct kv_log *log, char *why, size_t why_bytes) {
    enum kv_status status = files_limit(log, why, why_bytes);
    if (status != KV_OK) return status;
    log->files[0] = log->superblock_file;
    for (uint32_t slot = 0; slot < log->slot_count; slot++) {
        char name[32];
        slot_name(slot, name);
        int file = log->files[kv_log_file(slot)] = file_open(log, name);
        struct stat found;
        if (file < 0 || fstat(file, &found) != 0) {
            snprintf(why, why_bytes, "cannot open %s/%s: %s", log->options.path, name,
                     strerror(errno));
            return KV_IO_ERROR;
        }
        struct kv_segment *segment = &log->segments[slot];
        segment->state = found.st_size == 0 ? KV_SEGMENT_ABSENT : KV_SEGMENT_FREE;
        segment->index = UINT32_MAX;
        kv_list_init(&segment->live);
        if (found.st_size != 0) log->allocated++;
    }
    /* New names last as long as what will be written under them. */
    if (fsync(log->directory) != 0) {
        snprintf(why, why_bytes, "cannot sync %s: %s", log->options.path, strerror(errno));
        return KV_IO_ERROR;
    }
    return KV_OK;
}

static enum kv_status memory_open(struct kv_log *log) {
    uint32_t records  = log->segment_pages;
    log->index_bytes  = (size_t)kv_footer_pages(records) * KV_PAGE;
    log->files        = malloc((1 + (size_t)log->slot_count) * sizeof *log->files);
    log->segments     = calloc(log->slot_count, sizeof *log->segments);
    log->header_memory     = aligned_alloc(KV_PAGE, KV_SEGMENT_HEADER_PAGES * KV_PAGE);
    log->superblock_memory = aligned_alloc(KV_PAGE, KV_PAGE);
    bool all = log->files != NULL && log->segments != NULL && log->header_memory != NULL &&
               log->superblock_memory != NULL;
    for (uint32_t i = 0; i < KV_LOG_INDEXES; i++) {
        log->index_owner[i]  = KV_SEGMENT_NONE;
        log->index_memory[i] = aligned_alloc(KV_PAGE, log->index_bytes);
        all                  = all && log->index_memory[i] != NULL;
    }
    if (log->files != NULL) {
        for (uint32_t i = 0; i <= log->slot_count; i++) log->files[i] = -1;
    }
    return all ? KV_OK : KV_BUSY;
}

/* ---- Open and close ------------------------------------------------------------------------ */

static enum kv_status engine_open(struct kv_log *log, char *why, size_t why_bytes) {
    struct kv_io_options options = {
        .files        = log->files,
        .file_count   = 1 + log->slot_count,
        /* Beside the store's own requests: the superblock, and for each segment that holds an
         * index buffer or is being opened its own. */
        .requests_max = log->options.io_depth + RUN_GROUP + KV_LOG_INDEXES + 2,
        .threads      = log->options.io_threads,
        .use_threads  = log->options.use_threads,
        .memory       = log->options.memory,
        .memory_bytes = log->options.memory_bytes,
    };
    enum kv_status status = kv_io_open(&options, &log->io);
    if (status != KV_OK) snprintf(why, why_bytes, "cannot start the I/O threads");
    return status;
}

enum kv_status kv_log_open(const struct kv_log_options *options, struct kv_log **out, char *why,
                           size_t why_bytes) {
    struct kv_log *log = calloc(1, sizeof *log);
    if (log == NULL) {
        snprintf(why, why_bytes, "out of memory");
        return KV_BUSY;
    }
    log->options         = *options;
    log->directory       = -1;
    log->superblock_file = -1;
    log->open = log->next = KV_SEGMENT_NONE;
    log->segment_pages   = (uint32_t)(options->segment_bytes / KV_PAGE);
    log->segments_max =
        (uint32_t)((options->disk_bytes - OVERHEAD_BYTES) / options->segment_bytes);
    log->now_us = kv_clock_us();

    uint32_t slots        = 0;
    enum kv_status status = directory_open(log, why, why_bytes);
    if (status == KV_OK) status = directory_read(log, &slots, why, why_bytes);
    if (status == KV_OK) status = superblock_lock(log, why, why_bytes);
    if (status == KV_OK) status = superblock_read(log, slots, why, why_bytes);
    if (status == KV_OK) {
        log->slot_count = slots > log->segments_max ? slots : log->segments_max;
        status          = memory_open(log);
        if (status != KV_OK) snprintf(why, why_bytes, "out of memory");
    }
    if (status == KV_OK) status = files_open(log, why, why_bytes);
    if (status == KV_OK) status = engine_open(log, why, why_bytes);
    if (status != KV_OK) {
        kv_log_close(log);
        return status;
    }
    *out = log;
    return KV_OK;
}

void kv_log_close(struct kv_log *log) {
    if (log == NULL) return;
    kv_io_close(log->io);
    for (uint32_t slot = 0; log->files != NULL && slot < log->slot_count; slot++) {
        if (log->files[kv_log_file(slot)] >= 0) close(log->files[kv_log_file(slot)]);
    }
    /* Given back in words: the kernel frees a ring, and the descriptors registered with it, only some
     * time after it was closed, and whoever opens this directory next would have to wait. */
    if (log->superblock_file >= 0) {
        flock(log->superblock_file, LOCK_UN);
        close(log->superblock_file);
    }
    if (log->directory >= 0) close(log->directory);
    for (uint32_t i = 0; i < KV_LOG_INDEXES; i++) free(log->index_memory[i]);
    free(log->header_memory);
    free(log->superblock_memory);
    free(log->segments);
    free(log->files);
    free(log);
}

/* ---- Beginning and end --------------------------------------------------------------------- */

static void run_done(struct kv_io_request *request) {
    uint32_t *left = request->owner;
    --*left;
}

void kv_log_run(struct kv_log *log, struct kv_io_request *requests, uint32_t count) {
    for (uint32_t first = 0; first < count; first += RUN_GROUP) {
        uint32_t group = count - first < RUN_GROUP ? count - first : RUN_GROUP;
        uint32_t left  = group;
        for (uint32_t i = first; i < first + group; i++) {
            requests[i].on_done = run_done;
            requests[i].owner   = &left;
            kv_io_submit(log->io, &requests[i]);
        }
        while (left > 0) {
            kv_io_wait(log->io, -1, 1000000);
            kv_io_poll(log->io);
        }
    }
}

static int superblock_write(struct kv_log *log) {
    log->superblock.epoch++;
    kv_superblock_encode(&log->superblock, log->superblock_memory);
    struct kv_io_request request = {
        .kind   = KV_IO_WRITE,
        .file   = 0,
        .memory = log->superblock_memory,
        .bytes  = KV_PAGE,
        .offset = log->superblock.epoch % 2 * KV_PAGE,
    };
    kv_log_run(log, &request, 1);
    if (request.error != 0) return request.error;
    request.kind = KV_IO_SYNC;
    kv_log_run(log, &request, 1);
    return request.error;
}

int kv_log_begin(struct kv_log *log, uint64_t next_sequence) {
    log->superblock.clean             = false;
    log->superblock.next_sequence     = next_sequence;
    log->superblock.newest_generation = log->newest_generation;
    return superblock_write(log);
}

void kv_log_resume(struct kv_log *log, uint32_t slot, uint32_t end_page, uint32_t record_count) {
    struct kv_segment *segment = kv_log_segment(log, slot);
    KV_CHECK(log->open == KV_SEGMENT_NONE && log->index_owner[0] == KV_SEGMENT_NONE);
    segment->state        = KV_SEGMENT_OPEN;
    segment->end_page     = end_page;
    segment->record_count = record_count;
    segment->index        = 0;
    log->index_owner[0]   = slot;
    log->open             = slot;
}

/* What is open or about to be gets its footer, be it an empty one, so that the next start need not
 * scan it. */
static bool finish_step(struct kv_log *log) {
    if (log->open != KV_SEGMENT_NONE) {
        log->segments[log->open].state = KV_SEGMENT_FULL;
        log->open                      = KV_SEGMENT_NONE;
    }
    bool over = !log->superblock_busy;
    if (log->next != KV_SEGMENT_NONE && log->segments[log->next].state == KV_SEGMENT_READY) {
        for (uint32_t i = 0; i < KV_LOG_INDEXES; i++) {
            if (log->index_owner[i] != KV_SEGMENT_NONE) continue;
            log->index_owner[i]             = log->next;
            log->segments[log->next].index  = i;
            log->segments[log->next].state  = KV_SEGMENT_FULL;
            log->next                       = KV_SEGMENT_NONE;
            break;
        }
    }
    over = over && log->next == KV_SEGMENT_NONE;
    for (uint32_t i = 0; i < KV_LOG_INDEXES; i++) {
        over = over && log->index_owner[i] == KV_SEGMENT_NONE;
    }
    return over;
}

void kv_log_finish(struct kv_log *log, uint64_t next_sequence, uint64_t deadline_us) {
    bool over = false;
    while (!over && kv_clock_us() < deadline_us) {
        over = finish_step(log);
        if (over) break;
        kv_log_poll(log, kv_clock_us());
        kv_io_wait(log->io, -1, 10000);
        kv_io_poll(log->io);
    }
    while (kv_io_in_flight(log->io) > 0) { /* memory of requests must outlive them */
        kv_io_wait(log->io, -1, 10000);
        kv_io_poll(log->io);
    }
    bool all_have_footers = over;
    uint64_t oldest       = log->newest_generation + 1;
    for (uint32_t slot = 0; slot < log->slot_count; slot++) {
        const struct kv_segment *segment = &log->segments[slot];
        if (segment->state < KV_SEGMENT_OPENING) continue;
        if (segment->state != KV_SEGMENT_SEALED || segment->footer_failed) all_have_footers = false;
        if (segment->header.generation < oldest) oldest = segment->header.generation;
    }
    log->superblock.clean             = all_have_footers;
    log->superblock.next_sequence     = next_sequence;
    log->superblock.newest_generation = log->newest_generation;
    log->superblock.oldest_generation = oldest;
    superblock_write(log);
}
