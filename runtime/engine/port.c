// SPDX-License-Identifier: Apache-2.0
// See port.h. The eventfds are non-blocking counters: a wake that is not consumed is not lost.
#include "runtime/engine/port.h"

#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum status engine_port_create(size_t command_bytes, size_t event_bytes, struct engine_port *out)
{
    memset(out, 0, sizeof *out);
    out->command_wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    out->event_wake = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (out->command_wake < 0 || out->event_wake < 0 ||
        ring_create(command_bytes, &out->commands) || ring_create(event_bytes, &out->events)) {
        engine_port_destroy(out);
        return STATUS_NO_MEMORY;
    }
    return STATUS_OK;
}

void engine_port_destroy(struct engine_port *port)
{
    ring_destroy(port->commands);
    ring_destroy(port->events);
    if (port->command_wake > 0)
        (void)close(port->command_wake);
    if (port->event_wake > 0)
        (void)close(port->event_wake);
    memset(port, 0, sizeof *port);
}

enum status engine_send(struct engine_port *port, const void *record, size_t bytes)
{
    enum status status = ring_push(port->commands, record, bytes);
    uint64_t one = 1;
    if (!status && write(port->command_wake, &one, sizeof one) < 0)
        status = STATUS_OK; // the counter is saturated: the engine is awake anyway
    return status;
}
