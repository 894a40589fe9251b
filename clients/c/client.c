/* SPDX-License-Identifier: Apache-2.0 */
/* client.c - the connection, and the questions about the service as a whole. */
#include "clients/c/client.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "grpc/health/v1/health.pb-c.h"

enum {
    TIMEOUT_MS = 30000,
    MESSAGE_BYTES = 1 << 20,
    MESSAGE_BYTES_MIN = 4 << 10,
    MESSAGE_BYTES_MAX = 32 << 20,
    SPIN_US_MAX = 1000000,
};
#define DEFAULT_TARGET "unix:///run/kivid/kivid.sock"

void text_set(char *to, size_t to_bytes, const char *from) {
    snprintf(to, to_bytes, "%s", from ? from : "");
}

bool digest_set(struct kivi_digest *to, ProtobufCBinaryData from) {
    if (from.len != KIVI_DIGEST_BYTES) return false;
    memcpy(to->bytes, from.data, KIVI_DIGEST_BYTES);
    return true;
}

static int options_check(const struct kivi_options *options, struct kivi_error *error) {
    if (options->struct_bytes != sizeof *options)
        return error_set(error, KIVI_INVALID_ARGUMENT, "struct_bytes",
                         "begin with KIVI_OPTIONS_INIT; this program was compiled for another libkivi");
    if (options->spin_us > SPIN_US_MAX)
        return error_set(error, KIVI_INVALID_ARGUMENT, "spin_us", "%u is above %d",
                         options->spin_us, SPIN_US_MAX);
    if (options->message_bytes != 0 && (options->message_bytes < MESSAGE_BYTES_MIN ||
                                        options->message_bytes > MESSAGE_BYTES_MAX))
        return error_set(error, KIVI_INVALID_ARGUMENT, "message_bytes", "%u is not in %d .. %d",
                         options->message_bytes, MESSAGE_BYTES_MIN, MESSAGE_BYTES_MAX);
    return KIVI_OK;
}

int kivi_client_open(const struct kivi_options *options, struct kivi_client **out,
                     struct kivi_error *error) {
    int code = options_check(options, error);
    if (code != KIVI_OK) return code;

    struct kivi_options filled = *options;
    if (!filled.target) filled.target = getenv("KIVID_TARGET");
    if (!filled.target || !filled.target[0]) filled.target = DEFAULT_TARGET;
    if (filled.timeout_ms == 0) filled.timeout_ms = TIMEOUT_MS;
    if (filled.message_bytes == 0) filled.message_bytes = MESSAGE_BYTES;

    struct kivi_client *client = calloc(1, sizeof *client);
    if (!client) return error_set(error, KIVI_RESOURCE_EXHAUSTED, "", "out of memory");
    client->message_bytes = filled.message_bytes;
    client->transport = transport_open(&filled, error);
    if (!client->transport) {
        free(client);
        return KIVI_RESOURCE_EXHAUSTED;
    }
    *out = client;
    return KIVI_OK;
}

void kivi_client_close(struct kivi_client *client) {
    if (!client) return;
    transport_close(client->transport);
    free(client);
}

int kivi_client_ping(struct kivi_client *client, const char *service, bool *serving,
                     uint32_t timeout_ms, struct kivi_error *error) {
    Grpc__Health__V1__HealthCheckRequest question = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    Grpc__Health__V1__HealthCheckResponse *answer;
    question.service = (char *)service;
    int code = CLIENT_CALL(client, METHOD_HEALTH_CHECK, &question,
                           grpc__health__v1__health_check_response, &answer, timeout_ms, error);
    if (code != KIVI_OK) return code;
    *serving = answer->status == GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
    protobuf_c_message_free_unpacked(&answer->base, NULL);
    return KIVI_OK;
}

static struct kivi_tier_stats tier_stats(const Kivi__V1__StatsResponse__Tier *tier) {
    struct kivi_tier_stats stats = {0};
    if (tier) stats = (struct kivi_tier_stats){tier->blocks, tier->bytes, tier->bytes_max};
    return stats;
}

int kivi_client_stats(struct kivi_client *client, struct kivi_stats *stats, uint32_t timeout_ms,
                      struct kivi_error *error) {
    Kivi__V1__StatsRequest question = KIVI__V1__STATS_REQUEST__INIT;
    Kivi__V1__StatsResponse *answer;
    int code = CLIENT_CALL(client, METHOD_STATS, &question, kivi__v1__stats_response, &answer,
                           timeout_ms, error);
    if (code != KIVI_OK) return code;

    memset(stats, 0, sizeof *stats);
    text_set(stats->version, sizeof stats->version, answer->version);
    text_set(stats->backend, sizeof stats->backend, answer->backend);
    text_set(stats->io_engine, sizeof stats->io_engine, answer->io_engine);
    stats->ready = answer->ready;
    stats->host = tier_stats(answer->host);
    stats->nvme = tier_stats(answer->nvme);
    stats->gpu = tier_stats(answer->gpu);
    stats->recovery_clean = answer->recovery_clean;
#define COPY(name) stats->name = answer->name
    COPY(uptime_ms);
    COPY(blocks);
    COPY(blocks_max);
    COPY(sessions_open);
    COPY(sessions_known);
    COPY(sessions_max);
    COPY(layouts);
    COPY(tail_bytes);
    COPY(tail_bytes_max);
    COPY(requests);
    COPY(errors);
    COPY(tokens_appended);
    COPY(rows_attended);
    COPY(bytes_in);
    COPY(bytes_out);
    COPY(blocks_sealed);
    COPY(blocks_shared);
    COPY(pages_from_host);
    COPY(pages_from_nvme);
    COPY(pages_from_gpu);
    COPY(gpu_copies);
    COPY(gpu_bytes_copied);
    COPY(gpu_evictions);
    COPY(gpu_refusals);
    COPY(evictions);
    COPY(drops);
    COPY(spills);
    COPY(restores);
    COPY(corruptions);
    COPY(io_errors);
    COPY(bytes_written);
    COPY(bytes_read);
    COPY(segments_lost);
    COPY(recovered_blocks);
    COPY(recovered_sessions);
    COPY(recovery_us);
    COPY(recovery_bytes);
#undef COPY
    protobuf_c_message_free_unpacked(&answer->base, NULL);
    return KIVI_OK;
}
