// SPDX-License-Identifier: Apache-2.0
// Writing whole buffers to descriptors. false with errno; part of it may have been written.
#ifndef POLDER_BASE_FILES_H
#define POLDER_BASE_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

bool file_write(int descriptor, const void *from, size_t bytes); // at the descriptor's place
bool file_write_at(int descriptor, const void *from, size_t bytes, uint64_t offset);

#endif
