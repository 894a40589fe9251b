/* SPDX-License-Identifier: Apache-2.0 */
/* log.c - formats a line, decides whether its place has spoken too often, writes it.
 *
 * A place is known by the address of its format.  The table of places is small and open: a place
 * that collides with another just shares its allowance.
 */
#include "service/log.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { PLACES = 64 };

struct place {
    const char *format;
    int64_t second;   /* the one `spoken` counts in */
    uint32_t spoken;
    uint32_t omitted; /* since the last line that was written */
};

static struct {
    pthread_mutex_t lock;
    enum kv_log_level least;
    bool json;
    struct place places[PLACES];
} state = {.lock = PTHREAD_MUTEX_INITIALIZER, .least = KV_LOG_INFO};

static const char *const level_names[] = {"debug", "info", "warn", "error"};

void kv_log_start(enum kv_log_level least, bool json) {
    state.least = least;
    state.json = json;
}

/* True if the place may speak now; then *omitted is how often it has been kept from it. */
static bool place_allows(const char *format, int64_t second, uint32_t *omitted) {
    struct place *place = &state.places[((uintptr_t)format >> 3) % PLACES];
    if (place->format != format || place->second != second) {
        if (place->format != format) place->omitted = 0;
        place->format = format;
        place->second = second;
        place->spoken = 0;
    }
    if (place->spoken == KV_LOG_BURST) {
        place->omitted++;
        return false;
    }
    place->spoken++;
    *omitted = place->omitted;
    place->omitted = 0;
    return true;
}

/* Appends `text` as the inside of a JSON string; what is not ASCII passes as the UTF-8 it is. */
static size_t json_text(char *line, size_t used, size_t size, const char *text) {
    for (; *text && used + 7 < size; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') {
            line[used++] = '\\';
            line[used++] = (char)c;
        } else if (c < 0x20) {
            used += (size_t)snprintf(line + used, size - used, "\\u%04x", c);
        } else {
            line[used++] = (char)c;
        }
    }
    return used;
}

void kv_log(enum kv_log_level level, const char *format, ...) {
    if (level < state.least) return;

    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    uint32_t omitted = 0;
    pthread_mutex_lock(&state.lock);
    bool allowed = place_allows(format, now.tv_sec, &omitted);
    pthread_mutex_unlock(&state.lock);
    if (!allowed) return;

    char message[KV_LOG_LINE_MAX / 2];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);

    struct tm utc;
    gmtime_r(&now.tv_sec, &utc);
    char moment[32], line[KV_LOG_LINE_MAX];
    size_t used = strftime(moment, sizeof moment, "%Y-%m-%dT%H:%M:%S", &utc);
    snprintf(moment + used, sizeof moment - used, ".%03ldZ", now.tv_nsec / 1000000);

    if (state.json) {
        used = (size_t)snprintf(line, sizeof line, "{\"time\":\"%s\",\"level\":\"%s\",", moment,
                                level_names[level]);
        if (omitted)
            used += (size_t)snprintf(line + used, sizeof line - used, "\"omitted\":%u,", omitted);
        used += (size_t)snprintf(line + used, sizeof line - used, "\"message\":\"");
        used = json_text(line, used, sizeof line - 4, message);
        used += (size_t)snprintf(line + used, sizeof line - used, "\"}\n");
    } else {
        /* One line stays one line, whatever a client put into a name. */
        for (char *c = message; *c; c++)
            if ((unsigned char)*c < 0x20) *c = ' ';
        used = (size_t)snprintf(line, sizeof line, "%s %-5s %s", moment, level_names[level],
                                message);
        if (omitted)
            used += (size_t)snprintf(line + used, sizeof line - used, " (%u like it left out)",
                                     omitted);
        line[used++] = '\n';
    }
    /* Nobody can be told that standard error is broken. */
    if (write(STDERR_FILENO, line, used) < 0) return;
}
