// SPDX-License-Identifier: Apache-2.0
#include "kernels/plain.h"

#include <string.h>

enum status plain_move(struct device *device, void *to, const void *from, size_t bytes)
{
    (void)device;
    memcpy(to, from, bytes);
    return STATUS_OK;
}

enum status plain_zero(struct device *device, void *to, size_t bytes)
{
    (void)device;
    memset(to, 0, bytes);
    return STATUS_OK;
}

size_t plain_free_bytes(const struct device *device)
{
    (void)device;
    return SIZE_MAX;
}

enum status plain_copy_start(struct device *device, enum copy_direction direction, void *to,
                             const void *from, size_t bytes)
{
    (void)direction;
    return plain_move(device, to, from, bytes);
}

bool plain_copy_poll(struct device *device, enum copy_direction direction, enum status *status)
{
    (void)device;
    (void)direction;
    *status = STATUS_OK;
    return true;
}

void plain_unit(struct stream *s)
{
    (void)s;
}

uint64_t plain_captures(const struct stream *s)
{
    (void)s;
    return 0;
}
