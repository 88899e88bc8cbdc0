// SPDX-License-Identifier: Apache-2.0
// The link of a device with copy engines of its own: host-to-device and device-to-host chunks go to
// the device table's copy_start, file reads to the thread link's readers. Speeds are not paced
// here: they are what the hardware gives. Host pages must be alloc_host memory.
#include <stdlib.h>

#include "base/check.h"
#include "kernels/device.h"
#include "unified_pool/copy.h"

struct device_link {
    struct link link;
    struct device *device;
    struct link *reads; // owned
    struct started {    // what copy_start said, of those under way
        enum status status[DEVICE_COPIES_MAX];
        uint32_t first, count;
    } started[COPY_RESOURCES];
};

static enum copy_direction direction_of(enum copy_resource resource)
{
    return resource == COPY_H2D ? COPY_TO_DEVICE : COPY_TO_HOST;
}

static void device_link_start(struct link *link, const struct copy_chunk *chunk)
{
    struct device_link *self = (struct device_link *)link;
    if (chunk->resource == COPY_READ) {
        self->reads->start(self->reads, chunk);
        return;
    }
    struct started *started = &self->started[chunk->resource];
    uint32_t at = (started->first + started->count++) % DEVICE_COPIES_MAX;
    started->status[at] = self->device->table->copy_start(
        self->device, direction_of(chunk->resource), chunk->to, chunk->from, chunk->bytes);
}

static bool device_link_poll(struct link *link, enum copy_resource resource, enum status *status)
{
    struct device_link *self = (struct device_link *)link;
    struct started *started = &self->started[resource];
    if (resource == COPY_READ)
        return self->reads->poll(self->reads, resource, status);
    if (!started->count)
        return true;
    if (started->status[started->first]) // the device does not know of it
        *status = started->status[started->first];
    else if (!self->device->table->copy_poll(self->device, direction_of(resource), status))
        return false;
    started->first = (started->first + 1) % DEVICE_COPIES_MAX;
    started->count--;
    return true;
}

static void device_link_destroy(struct link *link)
{
    struct device_link *self = (struct device_link *)link;
    enum status ignored;
    for (int r = COPY_H2D; r <= COPY_D2H; r++)
        while (self->started[r].count)
            (void)device_link_poll(link, (enum copy_resource)r, &ignored); // a few MiB at most
    self->reads->destroy(self->reads);
    free(self);
}

enum status copy_link_device(struct device *device, const struct link_options *options,
                             struct link **out)
{
    struct device_link *self = calloc(1, sizeof *self);
    if (!self)
        return STATUS_NO_MEMORY;
    // The pages of adapters are hashed as they are read, slower than a page cache gives them.
    struct link_options reads = *options;
    reads.read_threads = COPY_READ_THREADS_MAX;
    enum status status = copy_link_threads(&reads, &self->reads);
    if (status) {
        free(self);
        return status;
    }
    self->link = (struct link){.start = device_link_start,
                               .poll = device_link_poll,
                               .destroy = device_link_destroy,
                               .depth = {[COPY_H2D] = DEVICE_COPIES_MAX,
                                         [COPY_D2H] = DEVICE_COPIES_MAX,
                                         [COPY_READ] = self->reads->depth[COPY_READ]}};
    self->device = device;
    *out = &self->link;
    return STATUS_OK;
}
