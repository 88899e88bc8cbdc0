// SPDX-License-Identifier: Apache-2.0
// A device for simulation: the real table, real argument structs and real page tables, but every
// operation computes fingerprints (sim_fingerprint.h) and a segment takes as long as the fake clock
// says. Commands run when the segment is submitted, when it ends, or half and half, so that
// whatever is changed under a segment in flight shows in its tokens.
//
// Reads that a real device would do in silence are checked: KV of a slot that nobody wrote, pages
// outside the arena, arrays outside their allocation. One thread.
#ifndef POLDER_TESTS_FAKE_DEVICE_H
#define POLDER_TESTS_FAKE_DEVICE_H

#include <stdint.h>

#include "kernels/device.h"

enum fake_timing { FAKE_AT_SUBMIT, FAKE_AT_END, FAKE_IN_BETWEEN };

struct fake_device_options {
    const uint64_t *now_us;
    enum fake_timing timing;
    uint32_t base_us;      // of a segment
    uint32_t row_ns;       // of a row in a half-layer
    uint64_t fail_alloc;   // the n-th allocation fails (streams count), from 1; 0: none
    uint64_t fail_submit;  // the n-th submit is refused
    uint64_t fail_segment; // the n-th segment ends with a device error
    uint32_t pages;        // of the arena, to check page numbers against
    size_t page_bytes;
};

struct fake_device_counts {
    uint64_t allocs, live;      // asked for; not yet released
    uint64_t submits, commands; // segments; commands that ran
    uint64_t halves;            // half-layers that were completed
    uint64_t rows;              // rows of all half-layers
};

enum status fake_device_create(const struct fake_device_options *options, struct device **out);
void fake_device_counts(const struct device *device, struct fake_device_counts *out);
// When the segment in flight ends, UINT64_MAX: none.
uint64_t fake_device_ready_us(const struct device *device);

#endif
