/* SPDX-License-Identifier: Apache-2.0 */
/* config_fuzz.c - any bytes as a configuration file.
 *
 * It is read, or refused with the file's name and a line; what was read can be checked and printed.
 */
#include <stdlib.h>
#include <string.h>

#include "proto/kv_check.h"
#include "service/config.h"

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t bytes) {
    static struct kv_config config;
    char why[KV_CONFIG_WHY_MAX] = "";
    kv_config_defaults(&config);
    enum kv_status status = kv_config_yaml(&config, "fuzz.yaml", input, bytes, why);
    if (status != KV_OK) {
        KV_CHECK(strncmp(why, "fuzz.yaml:", 10) == 0 && why[10] >= '1' && why[10] <= '9');
        return 0;
    }
    kv_config_check(&config, why);
    FILE *nowhere = fopen("/dev/null", "w");
    KV_CHECK(nowhere);
    kv_config_print(&config, nowhere);
    fclose(nowhere);
    return 0;
}
