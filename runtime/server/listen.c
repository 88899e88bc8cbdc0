// SPDX-License-Identifier: Apache-2.0
// Addresses and accepting. "host:port" goes through getaddrinfo with numeric hosts and "localhost"
// alone: a server's own address is never looked up in a name service. "unix:/path" replaces a
// socket file that nobody listens on any more, and refuses one that is alive.
//
// When accept fails for want of descriptors the listeners rest until the next tick instead of
// spinning.
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/log.h"
#include "runtime/server/internal.h"

enum { BACKLOG = 512 };

static void address_text(const struct sockaddr *address, char *out, size_t bytes)
{
    char host[64] = "", port[16] = "";
    if (address->sa_family == AF_UNIX) {
        (void)snprintf(out, bytes, "unix");
        return;
    }
    socklen_t length =
        address->sa_family == AF_INET6 ? sizeof(struct sockaddr_in6) : sizeof(struct sockaddr_in);
    if (getnameinfo(address, length, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV))
        (void)snprintf(host, sizeof host, "unknown");
    (void)snprintf(out, bytes, address->sa_family == AF_INET6 ? "[%s]:%s" : "%s:%s", host, port);
}

static void on_accept(struct evconnlistener *listener, evutil_socket_t descriptor,
                      struct sockaddr *address, int length, void *context)
{
    (void)listener;
    (void)length;
    char peer[64];
    address_text(address, peer, sizeof peer);
    int one = 1;
    if (address->sa_family != AF_UNIX) {
        (void)setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        (void)setsockopt(descriptor, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    }
    connection_accepted(context, descriptor, peer);
}

static void on_accept_error(struct evconnlistener *listener, void *context)
{
    (void)listener;
    struct server *server = context;
    log_line(LOG_WARN, "accepting a connection failed: %s", strerror(errno));
    server->listeners_off = true;
    for (int i = 0; i < SERVER_LISTEN_MAX; i++) {
        if (server->listeners[i])
            (void)evconnlistener_disable(server->listeners[i]);
    }
}

void listen_enable(struct server *server)
{
    server->listeners_off = false;
    for (int i = 0; i < SERVER_LISTEN_MAX; i++) {
        if (server->listeners[i])
            (void)evconnlistener_enable(server->listeners[i]);
    }
}

static enum status adopt(struct server *server, int index, int descriptor, struct fault *fault)
{
    struct evconnlistener *listener =
        evconnlistener_new(server->base, on_accept, server,
                           LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC, BACKLOG, descriptor);
    if (!listener) {
        (void)close(descriptor);
        return fault_set(fault, STATUS_IO, "cannot listen on %s: %s.",
                         server->options.listen[index], strerror(errno));
    }
    evconnlistener_set_error_cb(listener, on_accept_error);
    server->listeners[index] = listener;
    return STATUS_OK;
}

static bool somebody_listens(const struct sockaddr_un *address)
{
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (probe < 0)
        return false;
    bool alive = connect(probe, (const struct sockaddr *)address, sizeof *address) == 0;
    (void)close(probe);
    return alive;
}

static enum status open_unix(struct server *server, int index, const char *path,
                             struct fault *fault)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path || *path != '/')
        return fault_set(fault, STATUS_INVALID,
                         "the socket path %s must be absolute and shorter than %zu "
                         "bytes.",
                         path, sizeof address.sun_path);
    (void)snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    struct stat info;
    if (lstat(path, &info) == 0) {
        if (!S_ISSOCK(info.st_mode) || somebody_listens(&address))
            return fault_set(fault, STATUS_EXISTS, "%s is in use.", path);
        (void)unlink(path);
    }
    int descriptor = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    mode_t before = umask(0117); // the owner and the group may connect
    int bound = descriptor < 0 ? -1 : bind(descriptor, (struct sockaddr *)&address, sizeof address);
    int error = errno;
    (void)umask(before);
    if (bound) {
        if (descriptor >= 0)
            (void)close(descriptor);
        return fault_set(fault, STATUS_IO, "cannot listen on %s: %s.", path, strerror(error));
    }
    (void)snprintf(server->unix_paths[index], sizeof server->unix_paths[index], "%s", path);
    return adopt(server, index, descriptor, fault);
}

static bool is_loopback(const struct sockaddr *address)
{
    if (address->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)(const void *)address)->sin_addr.s_addr) >> 24 ==
               127;
    return IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)(const void *)address)->sin6_addr);
}

static int bind_to(const struct addrinfo *info)
{
    int descriptor = socket(info->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (descriptor < 0)
        return -1;
    int one = 1;
    (void)setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(descriptor, info->ai_addr, info->ai_addrlen) == 0)
        return descriptor;
    int error = errno;
    (void)close(descriptor);
    errno = error;
    return -1;
}

// "host:port", "[v6]:port", ":port". false: not of that form.
static bool split_address(const char *text, char host[64], char port[8])
{
    const char *colon = strrchr(text, ':');
    if (!colon || !colon[1] || strlen(colon + 1) > 5 ||
        strspn(colon + 1, "0123456789") != strlen(colon + 1) ||
        strtoul(colon + 1, NULL, 10) > 65535)
        return false;
    size_t length = (size_t)(colon - text);
    if (length >= 2 && text[0] == '[' && text[length - 1] == ']') {
        text++;
        length -= 2;
    } else if (memchr(text, ':', length)) {
        return false;
    }
    if (length >= 64)
        return false;
    memcpy(host, text, length);
    host[length] = 0;
    (void)snprintf(port, 8, "%s", colon + 1);
    return true;
}

static enum status open_tcp(struct server *server, int index, const char *text, struct fault *fault)
{
    char host[64], port[8];
    if (!split_address(text, host, port))
        return fault_set(fault, STATUS_INVALID,
                         "the address \"%s\" must be host:port, [v6]:port, :port or "
                         "unix:/path.",
                         text);
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM,
                             .ai_flags = AI_PASSIVE | AI_NUMERICHOST | AI_NUMERICSERV};
    struct addrinfo *info = NULL;
    const char *name = !strcmp(host, "localhost") ? "127.0.0.1" : *host ? host : NULL;
    if (getaddrinfo(name, port, &hints, &info) || !info)
        return fault_set(fault, STATUS_INVALID, "\"%s\" is not a numeric address.", host);
    enum status status = STATUS_OK;
    int descriptor = -1;
    if (server->options.open_access && !is_loopback(info->ai_addr))
        status = fault_set(fault, STATUS_DENIED,
                           "a server without keys listens on loopback or Unix sockets "
                           "only, not on %s.",
                           text);
    else if ((descriptor = bind_to(info)) < 0)
        status = fault_set(fault, STATUS_IO, "cannot listen on %s: %s.", text, strerror(errno));
    freeaddrinfo(info);
    return status ? status : adopt(server, index, descriptor, fault);
}

static void name_bound(const struct server *server, int index, char *out, size_t bytes)
{
    if (server->unix_paths[index][0]) {
        (void)snprintf(out, bytes, "unix:%s", server->unix_paths[index]);
        return;
    }
    struct sockaddr_storage address;
    socklen_t length = sizeof address;
    (void)snprintf(out, bytes, "?");
    if (!getsockname(evconnlistener_get_fd(server->listeners[index]), (struct sockaddr *)&address,
                     &length))
        address_text((struct sockaddr *)&address, out, bytes);
}

enum status listen_open(struct server *server, char *addresses, size_t bytes, struct fault *fault)
{
    size_t used = 0;
    addresses[0] = 0;
    for (int i = 0; i < SERVER_LISTEN_MAX && server->options.listen[i]; i++) {
        const char *text = server->options.listen[i];
        enum status status = !strncmp(text, "unix:", 5) ? open_unix(server, i, text + 5, fault)
                                                        : open_tcp(server, i, text, fault);
        if (status)
            return status;
        char name[128];
        name_bound(server, i, name, sizeof name);
        used += (size_t)snprintf(addresses + used, bytes - used, "%s%s", used ? " " : "", name);
        if (used >= bytes)
            used = bytes - 1;
    }
    return used ? STATUS_OK
                : fault_set(fault, STATUS_INVALID, "the server has no address to listen on.");
}

void listen_close(struct server *server)
{
    for (int i = 0; i < SERVER_LISTEN_MAX; i++) {
        if (server->listeners[i])
            evconnlistener_free(server->listeners[i]);
        server->listeners[i] = NULL;
        if (server->unix_paths[i][0])
            (void)unlink(server->unix_paths[i]);
        server->unix_paths[i][0] = 0;
    }
}
