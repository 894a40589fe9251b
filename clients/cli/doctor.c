/* SPDX-License-Identifier: Apache-2.0 */
/* doctor.c - what of this machine kivid can use, what it cannot, and what to do about it.
 *
 * Each check is a function that fills in one finding.  It looks, it changes nothing (but for one
 * small file in --dir, which it removes).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "clients/cli/kivictl.h"

enum verdict { FINE, NOTE, WORSE, BROKEN };
static const char *const VERDICTS[] = {"ok", "note", "slower", "broken"};

enum { FINDING_BYTES = 200, DIRECT_BYTES = 4096 };

struct finding {
    const char *name;
    enum verdict verdict;
    char found[FINDING_BYTES];
    char advice[FINDING_BYTES];
};

struct doctor {
    struct ctl *ctl;
    const char *dir;
};

static void say(struct finding *finding, enum verdict verdict, const char *found,
                const char *advice) {
    finding->verdict = verdict;
    snprintf(finding->found, sizeof finding->found, "%s", found);
    snprintf(finding->advice, sizeof finding->advice, "%s", advice);
}

static void check_versions(struct doctor *doctor, struct finding *finding) {
    char text[FINDING_BYTES];
    snprintf(text, sizeof text, "libkivi %s, gRPC core %s", kivi_version(), kivi_transport_version());
    say(finding, FINE, text, "");
}

static void check_kernel(struct doctor *doctor, struct finding *finding) {
    struct utsname name;
    uname(&name);
    int major = 0, minor = 0;
    sscanf(name.release, "%d.%d", &major, &minor);
    bool recent = major > 6 || (major == 6 && minor >= 1);
    say(finding, recent ? FINE : NOTE, name.release,
        recent ? "" : "6.1 or later spares the disk engine some wake-ups");
}

static void check_cpu(struct doctor *doctor, struct finding *finding) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2"), avx512 = __builtin_cpu_supports("avx512bw"),
         vnni = __builtin_cpu_supports("avx512vnni");
    char text[FINDING_BYTES];
    snprintf(text, sizeof text, "%ld cores, %s%s", sysconf(_SC_NPROCESSORS_ONLN),
             avx512 ? "AVX-512" : avx2 ? "AVX2" : "neither AVX2 nor AVX-512", vnni ? " with VNNI" : "");
    say(finding, avx2 || avx512 ? FINE : WORSE, text,
        avx2 || avx512 ? "" : "the scalar backend will do the arithmetic, many times slower");
#else
    say(finding, WORSE, "not x86-64", "the scalar backend will do the arithmetic");
#endif
}

static void check_gpu(struct doctor *doctor, struct finding *finding) {
    char text[FINDING_BYTES] = "";
    FILE *file = fopen("/proc/driver/nvidia/version", "r");
    if (file && fgets(text, sizeof text, file)) text[strcspn(text, "\n")] = 0;
    if (file) fclose(file);
    if (access("/dev/nvidia0", R_OK | W_OK) == 0) say(finding, FINE, text[0] ? text : "/dev/nvidia0", "--backend cuda uses it, with a kivid that `kivid --version` calls built with CUDA");
    else if (text[0]) say(finding, WORSE, text, "the driver is there, /dev/nvidia0 cannot be opened: pass the GPU to this container or user");
    else say(finding, NOTE, "none seen", "the CPU will do the arithmetic, whether or not kivid was built with CUDA");
}

static void check_memlock(struct doctor *doctor, struct finding *finding) {
    struct rlimit limit;
    getrlimit(RLIMIT_MEMLOCK, &limit);
    char text[FINDING_BYTES];
    if (limit.rlim_cur == RLIM_INFINITY) snprintf(text, sizeof text, "unlimited");
    else snprintf(text, sizeof text, "%s", text_bytes(limit.rlim_cur));
    bool enough = limit.rlim_cur == RLIM_INFINITY || limit.rlim_cur >= 1ull << 30 || geteuid() == 0;
    say(finding, enough ? FINE : WORSE, text,
        enough ? "" : "the arena cannot be registered with io_uring: LimitMEMLOCK=infinity (systemd), --ulimit memlock=-1 (docker)");
}

static void check_nofile(struct doctor *doctor, struct finding *finding) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    char text[FINDING_BYTES];
    snprintf(text, sizeof text, "%llu", (unsigned long long)limit.rlim_max);
    say(finding, limit.rlim_max >= 4096 ? FINE : WORSE, text,
        limit.rlim_max >= 4096 ? "" : "each connection takes one: raise LimitNOFILE");
}

/* The system call itself, so that the answer is the kernel's and not a library's. */
static void check_io_uring(struct doctor *doctor, struct finding *finding) {
    struct io_uring_params params = {0};
    long fd = syscall(__NR_io_uring_setup, 4, &params);
    if (fd >= 0) {
        close((int)fd);
        say(finding, FINE, "available", "");
        return;
    }
    int disabled = 0;
    FILE *file = fopen("/proc/sys/kernel/io_uring_disabled", "r");
    if (file && fscanf(file, "%d", &disabled) != 1) disabled = 0;
    if (file) fclose(file);
    char text[FINDING_BYTES];
    snprintf(text, sizeof text, "refused: %s", strerror(errno));
    say(finding, WORSE, text,
        errno == ENOSYS ? "this kernel (or sandbox) has none; kivid will use threads for the disk"
        : disabled ? "sysctl kernel.io_uring_disabled forbids it; kivid will use threads for the disk"
        : errno == EPERM ? "a seccomp profile forbids it (containers do by default): allow io_uring_setup, io_uring_enter and io_uring_register; until then kivid uses threads"
                         : "kivid will use threads for the disk");
}

static void check_direct(struct doctor *doctor, struct finding *finding) {
    char path[512], text[FINDING_BYTES];
    snprintf(path, sizeof path, "%s/.kivictl-doctor-%ld", doctor->dir, (long)getpid());
    int fd = open(path, O_CREAT | O_EXCL | O_RDWR | O_DIRECT | O_CLOEXEC, 0600);
    void *block = aligned_alloc(DIRECT_BYTES, DIRECT_BYTES);
    bool good = fd >= 0 && block && pwrite(fd, memset(block, 0, DIRECT_BYTES), DIRECT_BYTES, 0) == DIRECT_BYTES;
    int reason = errno;
    if (fd >= 0) close(fd);
    unlink(path);
    free(block);
    if (good) snprintf(text, sizeof text, "works in %s", doctor->dir);
    else snprintf(text, sizeof text, "%s: %s", doctor->dir, strerror(reason));
    say(finding, good ? FINE : reason == ENOENT || reason == EACCES ? BROKEN : WORSE, text,
        good ? "" : reason == ENOENT || reason == EACCES
                 ? "give --dir the directory that disk_path names, and the user the right to write there"
                 : "put disk_path on ext4 or xfs on a local disk");
}

static void check_space(struct doctor *doctor, struct finding *finding) {
    struct statfs status;
    char text[FINDING_BYTES];
    if (statfs(doctor->dir, &status) != 0) {
        say(finding, BROKEN, strerror(errno), "give --dir the directory that disk_path names");
        return;
    }
    uint64_t bytes = (uint64_t)status.f_bavail * (uint64_t)status.f_bsize;
    snprintf(text, sizeof text, "%s free in %s", text_bytes(bytes), doctor->dir);
    say(finding, bytes >= 1ull << 30 ? FINE : WORSE, text,
        bytes >= 1ull << 30 ? "" : "disk_bytes is a cap; set it below what is free");
}

/* The file behind unix:///path, or NULL for another kind of address. */
static const char *socket_path(const char *target) {
    if (strncmp(target, "unix:///", 8) == 0) return target + 7;
    return strncmp(target, "unix:/", 6) == 0 ? target + 5 : NULL;
}

static const char *target_of(const struct ctl *ctl) {
    const char *target = ctl->target ? ctl->target : getenv("KIVID_TARGET");
    return target && target[0] ? target : "unix:///run/kivid/kivid.sock";
}

static void check_socket(struct doctor *doctor, struct finding *finding) {
    const char *path = socket_path(target_of(doctor->ctl));
    struct stat status;
    char text[FINDING_BYTES];
    if (!path) {
        say(finding, NOTE, target_of(doctor->ctl), "not a unix socket; TCP has no encryption yet");
    } else if (stat(path, &status) != 0) {
        snprintf(text, sizeof text, "%.120s: %s", path, strerror(errno));
        say(finding, BROKEN, text, "kivid is not running, listens elsewhere (--target), or its directory is closed to you");
    } else if (!S_ISSOCK(status.st_mode)) {
        snprintf(text, sizeof text, "%.120s is not a socket", path);
        say(finding, BROKEN, text, "--target names another file");
    } else {
        bool wide = (status.st_mode & 077) != 0, mine = access(path, R_OK | W_OK) == 0;
        snprintf(text, sizeof text, "%.120s, mode %03o, owner %u", path, status.st_mode & 0777,
                 status.st_uid);
        say(finding, !mine ? BROKEN : wide ? WORSE : FINE, text,
            !mine ? "run as the socket's owner" : wide ? "others may open it, and whoever opens it may do everything" : "");
    }
}

static void check_service(struct doctor *doctor, struct finding *finding) {
    struct ctl *ctl = doctor->ctl;
    struct kivi_stats stats;
    char text[FINDING_BYTES];
    if (kivi_client_stats(ctl->client, &stats, 2000, &ctl->error)) {
        snprintf(text, sizeof text, "%s: %.140s", kivi_code_name(ctl->error.code), ctl->error.message);
        say(finding, BROKEN, text, "start kivid, or name its address with --target");
        return;
    }
    snprintf(text, sizeof text, "version %s, backend %s, disk by %s, %s", stats.version,
             stats.backend, stats.io_engine, stats.ready ? "ready" : "not ready");
    bool damaged = stats.corruptions || stats.io_errors || stats.segments_lost;
    say(finding, !stats.ready ? BROKEN : damaged ? WORSE : FINE, text,
        damaged ? "it has met damage on the disk: see kivictl stats, and the log" : "");
}

static const struct {
    const char *name;
    void (*check)(struct doctor *doctor, struct finding *finding);
} CHECKS[] = {
    {"versions", check_versions}, {"kernel", check_kernel},     {"cpu", check_cpu},
    {"gpu", check_gpu},           {"memlock", check_memlock},   {"descriptors", check_nofile},
    {"io_uring", check_io_uring}, {"direct i/o", check_direct}, {"space", check_space},
    {"socket", check_socket},     {"service", check_service},
};
enum { CHECK_COUNT = sizeof CHECKS / sizeof *CHECKS };

static int run_doctor(struct ctl *ctl, int argc, const char **argv) {
    char *dir = NULL;
    int exit_code;
    const struct poptOption own[] = {
        {"dir", 'd', POPT_ARG_STRING, &dir, 0,
         "the directory kivid keeps its segments in (/var/lib/kivid if it is there, else /tmp)",
         "DIR"},
        POPT_TABLEEND};
    if (!ctl_options(ctl, argc, argv, own, "[OPTIONS]", NULL, 0, 0, &exit_code)) return exit_code;
    if (!ctl_connect(ctl)) return EXIT_USAGE;
    const char *standard = access("/var/lib/kivid", F_OK) == 0 ? "/var/lib/kivid" : "/tmp";
    struct doctor doctor = {.ctl = ctl, .dir = dir ? dir : standard};

    json_t *list = json_array();
    struct table table;
    enum verdict worst = FINE;
    table_begin(&table, "check|verdict|found");
    for (int i = 0; i < CHECK_COUNT; i++) {
        struct finding finding = {.name = CHECKS[i].name};
        CHECKS[i].check(&doctor, &finding);
        if (finding.verdict > worst) worst = finding.verdict;
        json_array_append_new(list, json_pack("{s:s, s:s, s:s, s:s}", "check", finding.name,
                                              "verdict", VERDICTS[finding.verdict], "found",
                                              finding.found, "advice", finding.advice));
        table_cell(&table, "%s", finding.name);
        table_cell(&table, "%s", VERDICTS[finding.verdict]);
        table_cell(&table, "%s%s%s", finding.found, finding.advice[0] ? ". " : "", finding.advice);
    }
    if (ctl->json) {
        json_print(json_pack("{s:b, s:O}", "ok", worst < WORSE, "checks", list));
        table_free(&table);
    } else {
        table_print(&table);
    }
    json_decref(list);
    return worst < WORSE ? EXIT_DONE : EXIT_MISSED;
}

const struct command DOCTOR_COMMANDS[] = {
    {"doctor", "", "what kivid can use here, and what to do", run_doctor},
    {NULL, NULL, NULL, NULL},
};
