/* SPDX-License-Identifier: Apache-2.0 */
/* config_load.c - one configuration out of four sources.
 *
 * The command line is read first, because it names the file, and applied last.
 */
#include <ctype.h>
#include <errno.h>
#include <popt.h>
#include <stdlib.h>

#include "service/config.h"

static const char *const standard_path = "/etc/kivid/kivid.yaml";

enum { FLAGS_MAX = KV_CONFIG_KEYS_MAX + 8 };

/* What popt fills: a flag's text, or NULL if it was not given. */
struct flags {
    struct poptOption options[FLAGS_MAX];
    char names[KV_CONFIG_KEYS_MAX][KV_CONFIG_TEXT_MAX];
    char *values[KV_CONFIG_KEYS_MAX];
    char *path;
    int check, example, help, version;
};

/* "arena_bytes" as a flag is "arena-bytes", in the environment "KIVID_ARENA_BYTES". */
static void flag_name(char *out, const char *key) {
    for (; *key; key++) *out++ = *key == '_' ? '-' : *key;
    *out = 0;
}
static void variable_name(char *out, const char *key) {
    out = stpcpy(out, "KIVID_");
    for (; *key; key++) *out++ = (char)toupper((unsigned char)*key);
    *out = 0;
}

static void flags_prepare(struct flags *flags) {
    size_t count = 0;
    flags->options[count++] = (struct poptOption){.longName = "config", .argInfo = POPT_ARG_STRING,
                                                  .arg = &flags->path};
    flags->options[count++] = (struct poptOption){.longName = "check-config", .arg = &flags->check};
    flags->options[count++] =
        (struct poptOption){.longName = "example-config", .arg = &flags->example};
    flags->options[count++] =
        (struct poptOption){.longName = "help", .shortName = 'h', .arg = &flags->help};
    flags->options[count++] = (struct poptOption){.longName = "version", .arg = &flags->version};
    for (size_t i = 0; i < kv_config_key_count(); i++) {
        flag_name(flags->names[i], kv_config_key(i));
        /* A boolean's value is optional: "--io-threads" is "--io-threads=true". */
        unsigned optional = kv_config_key_is_flag(i) ? POPT_ARGFLAG_OPTIONAL : 0;
        flags->options[count++] = (struct poptOption){.longName = flags->names[i],
                                                      .argInfo  = POPT_ARG_STRING | optional,
                                                      .arg      = &flags->values[i],
                                                      .val      = (int)i + 1};
    }
}

static void flags_free(struct flags *flags) {
    for (size_t i = 0; i < KV_CONFIG_KEYS_MAX; i++) free(flags->values[i]);
    free(flags->path);
}

static enum kv_status flags_read(struct flags *flags, int argc, const char **argv, char *why) {
    flags_prepare(flags);
    poptContext context = poptGetContext("kivid", argc, argv, flags->options, 0);
    enum kv_status status = KV_OK;
    int got;
    while ((got = poptGetNextOpt(context)) > 0) {
        size_t key = (size_t)got - 1;
        if (!flags->values[key] && kv_config_key_is_flag(key)) flags->values[key] = strdup("true");
    }
    if (got < -1) {
        snprintf(why, KV_CONFIG_WHY_MAX, "%.200s: %s", poptBadOption(context, POPT_BADOPTION_NOALIAS),
                 got == POPT_ERROR_BADOPT ? "there is no such flag" : poptStrerror(got));
        status = KV_INVALID;
    } else if (poptPeekArg(context)) {
        snprintf(why, KV_CONFIG_WHY_MAX, "%.200s: is not a flag", poptPeekArg(context));
        status = KV_INVALID;
    }
    poptFreeContext(context);
    return status;
}

static enum kv_status load_file(struct kv_config *config, const char *path, bool optional,
                                char *why) {
    FILE *file = fopen(path, "rb");
    if (!file && optional && errno == ENOENT) return KV_OK;
    uint8_t *text = file ? malloc(KV_CONFIG_FILE_MAX) : NULL;
    size_t bytes = text ? fread(text, 1, KV_CONFIG_FILE_MAX, file) : 0;
    enum kv_status status;
    if (!text || ferror(file)) {
        snprintf(why, KV_CONFIG_WHY_MAX, "%.200s: %s", path, strerror(errno));
        status = KV_INVALID;
    } else if (bytes == KV_CONFIG_FILE_MAX) {
        snprintf(why, KV_CONFIG_WHY_MAX, "%.200s: is too long to be a configuration", path);
        status = KV_INVALID;
    } else {
        status = kv_config_yaml(config, path, text, bytes, why);
    }
    free(text);
    if (file) fclose(file);
    return status;
}

static enum kv_status load_environment(struct kv_config *config, char *why) {
    for (size_t i = 0; i < kv_config_key_count(); i++) {
        char name[KV_CONFIG_TEXT_MAX], what[KV_CONFIG_WHY_MAX];
        variable_name(name, kv_config_key(i));
        const char *value = getenv(name);
        if (!value || kv_config_set(config, kv_config_key(i), value, name, what) == KV_OK) continue;
        snprintf(why, KV_CONFIG_WHY_MAX, "%.60s: %.400s", name, what);
        return KV_INVALID;
    }
    return KV_OK;
}

static enum kv_status load_flags(struct kv_config *config, const struct flags *flags, char *why) {
    for (size_t i = 0; i < kv_config_key_count(); i++) {
        char source[KV_CONFIG_TEXT_MAX + 2], what[KV_CONFIG_WHY_MAX];
        if (!flags->values[i]) continue;
        snprintf(source, sizeof source, "--%.200s", flags->names[i]);
        if (kv_config_set(config, kv_config_key(i), flags->values[i], source, what) == KV_OK)
            continue;
        snprintf(why, KV_CONFIG_WHY_MAX, "%.60s: %.400s", source, what);
        return KV_INVALID;
    }
    return KV_OK;
}

enum kv_status kv_config_load(struct kv_config *config, int argc, const char **argv,
                              enum kv_config_wish *wish, char *why) {
    struct flags flags = {0};
    enum kv_status status = flags_read(&flags, argc, argv, why);
    *wish = flags.help      ? KV_WISH_HELP
            : flags.version ? KV_WISH_VERSION
            : flags.example ? KV_WISH_EXAMPLE
            : flags.check   ? KV_WISH_CHECK
                            : KV_WISH_RUN;

    const char *path = flags.path ? flags.path : getenv("KIVID_CONFIG");
    kv_config_defaults(config);
    if (status == KV_OK)
        status = load_file(config, path ? path : standard_path, path == NULL, why);
    if (status == KV_OK) status = load_environment(config, why);
    if (status == KV_OK) status = load_flags(config, &flags, why);
    if (status == KV_OK) status = kv_config_check(config, why);
    flags_free(&flags);
    return status;
}
