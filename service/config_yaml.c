/* SPDX-License-Identifier: Apache-2.0 */
/* config_yaml.c - reads one flat mapping, and says which line is wrong.
 *
 *     stream start, document start, mapping start, (key scalar, value scalar)*, mapping end, ...
 *
 * Anything else (a list, a mapping inside, an alias, a second document, a key that comes twice)
 * is an error: nobody should have to guess what such a file means.
 */
#include <yaml.h>

#include "service/config.h"

struct reader {
    struct kv_config *config;
    const char *name;
    yaml_parser_t parser;
    yaml_event_t event;
    uint64_t seen; /* keys that came, a bit each */
    char *why;
};
static_assert(KV_CONFIG_KEYS_MAX <= 64, "one bit per key");

static enum kv_status fail(struct reader *reader, size_t line, const char *what) {
    snprintf(reader->why, KV_CONFIG_WHY_MAX, "%.200s:%zu: %.280s", reader->name, line + 1, what);
    return KV_INVALID;
}

/* The next event; the one before is given back. */
static enum kv_status next(struct reader *reader) {
    yaml_event_delete(&reader->event);
    if (yaml_parser_parse(&reader->parser, &reader->event)) return KV_OK;
    reader->event = (yaml_event_t){0};
    size_t line = reader->parser.problem_mark.line;
    return fail(reader, line,
                reader->parser.problem ? reader->parser.problem : "is not YAML");
}

static enum kv_status expect(struct reader *reader, yaml_event_type_t type, const char *what) {
    enum kv_status status = next(reader);
    if (status != KV_OK) return status;
    return reader->event.type == type ? KV_OK
                                      : fail(reader, reader->event.start_mark.line, what);
}

/* A scalar that is a C string: libyaml's may hold zero bytes. */
static enum kv_status read_text(struct reader *reader, char *text, size_t size, const char *what) {
    size_t line = reader->event.start_mark.line, bytes = reader->event.data.scalar.length;
    if (reader->event.type != YAML_SCALAR_EVENT) return fail(reader, line, what);
    if (bytes >= size) return fail(reader, line, "is too long");
    memcpy(text, reader->event.data.scalar.value, bytes);
    text[bytes] = 0;
    return strlen(text) == bytes ? KV_OK : fail(reader, line, "holds a zero byte");
}

static enum kv_status mark_seen(struct reader *reader, const char *key, size_t line) {
    char what[2 * KV_CONFIG_TEXT_MAX];
    for (size_t i = 0; i < kv_config_key_count(); i++) {
        if (strcmp(kv_config_key(i), key) != 0) continue;
        if (reader->seen >> i & 1) {
            snprintf(what, sizeof what, "%s: comes twice", key);
            return fail(reader, line, what);
        }
        reader->seen |= 1ull << i;
    }
    return KV_OK;
}

/* One key and its value; the key's event is current. */
static enum kv_status read_pair(struct reader *reader) {
    char key[KV_CONFIG_TEXT_MAX], value[2 * KV_CONFIG_TEXT_MAX], source[KV_CONFIG_TEXT_MAX];
    char what[KV_CONFIG_WHY_MAX];
    size_t line = reader->event.start_mark.line;

    enum kv_status status = read_text(reader, key, sizeof key, "a key must be a word");
    if (status == KV_OK) status = mark_seen(reader, key, line);
    if (status == KV_OK) status = next(reader);
    if (status == KV_OK) {
        snprintf(what, sizeof what, "%s: must be a single value", key);
        status = read_text(reader, value, sizeof value, what);
    }
    if (status != KV_OK) return status;

    snprintf(source, sizeof source, "%.200s:%zu", reader->name, line + 1);
    status = kv_config_set(reader->config, key, value, source, what);
    return status == KV_OK ? KV_OK : fail(reader, line, what);
}

static enum kv_status read_document(struct reader *reader) {
    enum kv_status status = expect(reader, YAML_STREAM_START_EVENT, "is not YAML");
    if (status == KV_OK) status = next(reader);
    /* A file of comments only is a configuration of defaults. */
    if (status != KV_OK || reader->event.type == YAML_STREAM_END_EVENT) return status;
    if (reader->event.type != YAML_DOCUMENT_START_EVENT)
        return fail(reader, reader->event.start_mark.line, "is not YAML");
    status = expect(reader, YAML_MAPPING_START_EVENT, "must be lines of `key: value`");
    if (status == KV_OK) status = next(reader);
    while (status == KV_OK && reader->event.type != YAML_MAPPING_END_EVENT) {
        status = read_pair(reader);
        if (status == KV_OK) status = next(reader);
    }
    if (status == KV_OK) status = expect(reader, YAML_DOCUMENT_END_EVENT, "is not YAML");
    if (status == KV_OK)
        status = expect(reader, YAML_STREAM_END_EVENT, "a second document is one too many");
    return status;
}

enum kv_status kv_config_yaml(struct kv_config *config, const char *name, const uint8_t *text,
                              size_t bytes, char *why) {
    struct reader reader = {.config = config, .name = name, .why = why};
    if (!yaml_parser_initialize(&reader.parser)) return KV_BUSY;
    yaml_parser_set_input_string(&reader.parser, text, bytes);
    enum kv_status status = read_document(&reader);
    yaml_event_delete(&reader.event);
    yaml_parser_delete(&reader.parser);
    return status;
}
