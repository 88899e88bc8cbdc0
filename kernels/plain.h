// SPDX-License-Identifier: Apache-2.0
// Entries of the device table for devices whose memory is plain host memory (the CPU, fakes):
// everything is done at once by the calling thread; units mean nothing. See device.h.
#ifndef POLDER_KERNELS_PLAIN_H
#define POLDER_KERNELS_PLAIN_H

#include "kernels/device.h"

enum status plain_move(struct device *device, void *to, const void *from, size_t bytes);
enum status plain_zero(struct device *device, void *to, size_t bytes);
size_t plain_free_bytes(const struct device *device); // SIZE_MAX
enum status plain_copy_start(struct device *device, enum copy_direction direction, void *to,
                             const void *from, size_t bytes);
bool plain_copy_poll(struct device *device, enum copy_direction direction, enum status *status);
void plain_unit(struct stream *s);
uint64_t plain_captures(const struct stream *s);

#endif
