// SPDX-License-Identifier: Apache-2.0
// Shared inside experts/: where a record stands in the store file (store.c).
#ifndef POLDER_EXPERTS_LAYOUT_H
#define POLDER_EXPERTS_LAYOUT_H

#include "experts/experts.h"

// Byte offset of the first page of (layer, expert).
uint64_t expert_store_offset(const struct expert_shape *shape, uint32_t layer, uint32_t expert);

#endif
