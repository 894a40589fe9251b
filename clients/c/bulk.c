/* SPDX-License-Identifier: Apache-2.0 */
/* bulk.c - see bulk.h. */
#include "clients/c/bulk.h"

#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>

/* The kernel takes no more of it than net.core.wmem_max says, and doubles that: 416 KiB as it comes. */
enum { SEND_BYTES = 1 << 20 };

static bool path_of(const char *target, struct sockaddr_un *address) {
    if (strncmp(target, "unix:", 5) != 0) return false;
    const char *path = target + 5;
    if (strncmp(path, "//", 2) == 0) path += 2; /* an empty host */
    if (path != target + 5 && path[0] != '/') return false;
    size_t bytes = strlen(path);
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    if (bytes == 0 || bytes >= sizeof address->sun_path) return false;
    memcpy(address->sun_path, path, bytes);
    return true;
}

grpc_channel *bulk_channel_open(const char *target, const grpc_channel_args *arguments) {
    struct sockaddr_un address;
    if (!path_of(target, &address)) return NULL;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), bytes = SEND_BYTES;
    if (fd < 0) return NULL;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes); /* if not, it is only slower */
    if (connect(fd, (const struct sockaddr *)&address, sizeof address) != 0) {
        close(fd);
        return NULL;
    }
    grpc_channel_credentials *credentials = grpc_insecure_credentials_create();
    grpc_channel *channel = grpc_channel_create_from_fd(target, fd, credentials, arguments);
    grpc_channel_credentials_release(credentials);
    return channel;
}
