// SPDX-License-Identifier: Apache-2.0
// What a stack needs to know about kinds of devices; stack.c alone includes it.
#ifndef POLDER_RUNTIME_ENGINE_STACK_DEVICE_H
#define POLDER_RUNTIME_ENGINE_STACK_DEVICE_H

#include "runtime/engine/stack.h"

// Opens options->device. UNSUPPORTED or INVALID with a sentence when it cannot be had.
MUST_USE enum status stack__device_open(const struct stack_options *options, struct device **out,
                                        struct fault *fault);
// The link that fits the device.
MUST_USE enum status stack__link_open(const struct stack_options *options, struct device *device,
                                      struct link **out);
// Whether the engine thread may wait inside a turn: where it computes itself, yes; beside a GPU it
// polls, so that copies go on.
bool stack__may_block(const struct device *device);
// A pool whose size nobody gave: gpu_memory_utilization of what is free when that was given, else
// at most nine tenths of it. Whole pages.
void stack__fit_pool(const struct stack_options *options, const struct device *device,
                     size_t page_bytes, uint64_t *pool_bytes);
// NO_MEMORY: what was asked for and what was free.
enum status stack__no_room(const struct device *device, const char *what, uint64_t bytes,
                           const char *option, struct fault *fault);

#endif
