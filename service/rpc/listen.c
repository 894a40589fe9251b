/* SPDX-License-Identifier: Apache-2.0 */
/* listen.c - sockets: who may connect, how many, and what happens when descriptors run out.
 *
 * Connections are accepted here and handed to gRPC, instead of letting gRPC listen:
 *
 *    - gRPC 1.51 stops listening for good after one EMFILE (CVE-2023-4785), and Debian's package
 *      has no fix; here a descriptor kept in reserve lets the connection be accepted and closed
 *    - nothing in gRPC bounds the number of connections
 *    - a unix socket must be closed to others before it exists: directory 0700, socket 0600
 *
 * gRPC owns a connection's descriptor and does not say when it closes it.  A duplicate stays in our
 * epoll set: when either side hangs up it reports that, and is closed; it is what is counted.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <grpc/grpc_posix.h>
#include <grpc/grpc_security.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "service/rpc/internal.h"

enum { SOCKETS_MAX = 2, BACKLOG = 128, EVENTS = 32 };

struct listener {
    struct kv_rpc *rpc;
    grpc_server_credentials *credentials;
    int sockets[SOCKETS_MAX]; /* unix, TCP; -1: none */
    int epoll, wake, reserve;
    char path[108]; /* of the unix socket; "": none */
    uint32_t connections;
    pthread_t thread;
    bool started;
};

/* ---- The unix socket -------------------------------------------------------------------------------- */

static enum kv_status fail(char *why, const char *what, const char *name) {
    snprintf(why, KV_CONFIG_WHY_MAX, "%s: %s: %s", name, what, strerror(errno));
    return KV_IO_ERROR;
}

/* Makes the directories above `path` that are missing, for our eyes only. */
static enum kv_status make_directories(const char *path, char *why) {
    char part[108];
    snprintf(part, sizeof part, "%s", path);
    for (char *slash = strchr(part + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        if (mkdir(part, 0700) < 0 && errno != EEXIST)
            return fail(why, "cannot make the directory", part);
        *slash = '/';
    }
    return KV_OK;
}

/* Removes a socket that nobody listens at any more; refuses anything else that is in the way. */
static enum kv_status clear_stale(const struct sockaddr_un *address, char *why) {
    const char *path = address->sun_path;
    struct stat about;
    if (lstat(path, &about) < 0) return errno == ENOENT ? KV_OK : fail(why, "cannot look", path);
    if (!S_ISSOCK(about.st_mode)) {
        snprintf(why, KV_CONFIG_WHY_MAX, "listen: %s exists and is not a socket", path);
        return KV_INVALID;
    }
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool refused = connect(probe, (const struct sockaddr *)address, sizeof *address) < 0 &&
                   errno == ECONNREFUSED;
    close(probe);
    if (!refused) {
        snprintf(why, KV_CONFIG_WHY_MAX, "listen: someone answers at %s already", path);
        return KV_BUSY;
    }
    return unlink(path) == 0 ? KV_OK : fail(why, "cannot remove the stale socket", path);
}

static enum kv_status open_unix(struct listener *listener, const char *target, char *why) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *path = target + strlen("unix:");
    if (strncmp(path, "//", 2) == 0) path += 2;
    if (strlen(path) >= sizeof address.sun_path) {
        snprintf(why, KV_CONFIG_WHY_MAX, "listen: a socket's path has at most %zu bytes",
                 sizeof address.sun_path - 1);
        return KV_INVALID;
    }
    strcpy(address.sun_path, path);
    enum kv_status status = make_directories(path, why);
    if (status == KV_OK) status = clear_stale(&address, why);
    if (status != KV_OK) return status;

    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    listener->sockets[0] = fd;
    /* The mask decides the socket's mode as it is made: there is no moment when others may. */
    mode_t mask = umask(0177);
    int bound = bind(fd, (struct sockaddr *)&address, sizeof address);
    umask(mask);
    if (bound < 0) return fail(why, "cannot bind", path);
    strcpy(listener->path, path);
    return listen(fd, BACKLOG) == 0 ? KV_OK : fail(why, "cannot listen", path);
}

/* ---- TCP ---------------------------------------------------------------------------------------------- */

/* "127.0.0.1:7411", "[::1]:7411", "localhost:7411"; numbers only, so that no resolver is asked. */
static bool parse_address(const char *text, struct sockaddr_storage *out, socklen_t *bytes) {
    char host[64];
    const char *colon = strrchr(text, ':');
    char *end;
    unsigned long port = strtoul(colon + 1, &end, 10);
    size_t count = (size_t)(colon - text);
    if (colon[1] == 0 || *end || port > 65535 || count >= sizeof host) return false;
    memcpy(host, text, count);
    host[count] = 0;
    if (strcmp(host, "localhost") == 0) strcpy(host, "127.0.0.1");

    struct sockaddr_in *v4 = (struct sockaddr_in *)out;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)out;
    *out = (struct sockaddr_storage){0};
    if (host[0] == '[' && host[count - 1] == ']') {
        host[count - 1] = 0;
        v6->sin6_family = AF_INET6;
        v6->sin6_port = htons((uint16_t)port);
        *bytes = sizeof *v6;
        return inet_pton(AF_INET6, host + 1, &v6->sin6_addr) == 1;
    }
    v4->sin_family = AF_INET;
    v4->sin_port = htons((uint16_t)port);
    *bytes = sizeof *v4;
    return inet_pton(AF_INET, host, &v4->sin_addr) == 1;
}

static enum kv_status open_tcp(struct listener *listener, const char *text, char *why) {
    struct sockaddr_storage address;
    socklen_t bytes;
    if (!parse_address(text, &address, &bytes)) {
        snprintf(why, KV_CONFIG_WHY_MAX, "listen_tcp: %s is not address:port in numbers", text);
        return KV_INVALID;
    }
    int fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), yes = 1;
    if (fd < 0) return fail(why, "cannot make a socket", text);
    listener->sockets[1] = fd;
    /* A port in its last minute of TIME_WAIT is ours again; one that another process holds is not,
     * which is why there is no SO_REUSEPORT (gRPC's own listeners set it). */
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(fd, (struct sockaddr *)&address, bytes) < 0) return fail(why, "cannot bind", text);
    if (listen(fd, BACKLOG) < 0) return fail(why, "cannot listen", text);
    getsockname(fd, (struct sockaddr *)&address, &bytes);
    in_port_t port = address.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&address)->sin6_port
                                                   : ((struct sockaddr_in *)&address)->sin_port;
    kv_log(KV_LOG_INFO, "rpc: listening on tcp port %u of %s", ntohs(port), text);
    return KV_OK;
}

/* ---- Accepting ----------------------------------------------------------------------------------------- */

static void watch(struct listener *listener, int fd, uint32_t events) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    epoll_ctl(listener->epoll, EPOLL_CTL_ADD, fd, &event);
}

static int open_reserve(void) {
    return open("/dev/null", O_RDONLY | O_CLOEXEC);
}

/* Out of descriptors: gives the reserve up for a moment, so that the client hears a close instead of
 * silence and the queue of connections does not stay full. */
static void accept_and_drop(struct listener *listener, int socket_fd) {
    kv_log(KV_LOG_ERROR, "rpc: out of file descriptors; connections are refused");
    if (listener->reserve >= 0) close(listener->reserve);
    int fd = accept4(socket_fd, NULL, NULL, SOCK_CLOEXEC);
    if (fd >= 0) close(fd);
    listener->reserve = open_reserve();
}

static void accept_one(struct listener *listener, int socket_fd) {
    uint32_t most = listener->rpc->config->connections_max;
    int fd = accept4(socket_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK), yes = 1;
    if (fd < 0) {
        if (errno == EMFILE || errno == ENFILE) accept_and_drop(listener, socket_fd);
        return; /* anything else concerns that client only */
    }
    int twin = listener->connections < most ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1;
    if (twin < 0) {
        kv_log(KV_LOG_WARN, "rpc: a connection was refused, %u are open", listener->connections);
        close(fd);
        return;
    }
    if (socket_fd == listener->sockets[1])
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    listener->connections++;
    watch(listener, twin, EPOLLRDHUP);
    grpc_server_add_channel_from_fd(listener->rpc->server, fd, listener->credentials);
}

static void *listener_run(void *context) {
    struct listener *listener = context;
    for (;;) {
        struct epoll_event events[EVENTS];
        int count = epoll_wait(listener->epoll, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            int fd = events[i].data.fd;
            if (fd == listener->wake) return NULL;
            if (fd == listener->sockets[0] || fd == listener->sockets[1]) {
                accept_one(listener, fd);
            } else {
                /* Taken out by hand: closing is not enough while gRPC has the other twin. */
                epoll_ctl(listener->epoll, EPOLL_CTL_DEL, fd, NULL);
                close(fd);
                listener->connections--;
            }
        }
    }
}

/* ---- Opening and closing --------------------------------------------------------------------------------- */

enum kv_status listener_open(struct kv_rpc *rpc, struct listener **out, char *why) {
    const struct kv_config *config = rpc->config;
    struct listener *listener = calloc(1, sizeof *listener);
    if (!listener) return KV_BUSY;
    *out = listener;
    *listener = (struct listener){.rpc = rpc, .sockets = {-1, -1}};
    listener->credentials = grpc_insecure_server_credentials_create();
    listener->epoll = epoll_create1(EPOLL_CLOEXEC);
    listener->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    listener->reserve = open_reserve();

    enum kv_status status = KV_OK;
    if (config->listen[0]) status = open_unix(listener, config->listen, why);
    if (status == KV_OK && config->listen_tcp[0])
        status = open_tcp(listener, config->listen_tcp, why);
    if (status != KV_OK) return status;

    watch(listener, listener->wake, EPOLLIN);
    for (int i = 0; i < SOCKETS_MAX; i++)
        if (listener->sockets[i] >= 0) watch(listener, listener->sockets[i], EPOLLIN);
    listener->started = pthread_create(&listener->thread, NULL, listener_run, listener) == 0;
    if (!listener->started) return KV_BUSY;
    if (config->listen[0]) kv_log(KV_LOG_INFO, "rpc: listening on %s", config->listen);
    return KV_OK;
}

void listener_stop(struct listener *listener) {
    if (!listener) return;
    if (listener->started) {
        uint64_t one = 1;
        ssize_t written = write(listener->wake, &one, sizeof one);
        KV_CHECK(written == sizeof one);
        pthread_join(listener->thread, NULL);
        listener->started = false;
    }
    /* The path first, so that a successor may take it while we drain. */
    if (listener->path[0]) unlink(listener->path);
    listener->path[0] = 0;
    for (int i = 0; i < SOCKETS_MAX; i++) {
        if (listener->sockets[i] >= 0) close(listener->sockets[i]);
        listener->sockets[i] = -1;
    }
}

void listener_close(struct listener *listener) {
    listener_stop(listener);
    /* Twins of connections that are still open go with the process: nobody else knows them. */
    grpc_server_credentials_release(listener->credentials);
    close(listener->epoll);
    close(listener->wake);
    if (listener->reserve >= 0) close(listener->reserve);
    free(listener);
}
