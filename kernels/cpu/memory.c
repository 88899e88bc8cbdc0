// SPDX-License-Identifier: Apache-2.0
// Device memory: zeroed, in huge pages when large. A block of 2 MiB or more is its own mapping,
// aligned to 2 MiB and advised to be huge (random tile reads over small pages lose a tenth of the
// bandwidth to the TLB); smaller ones come from the heap, so that AddressSanitizer sees their ends.
// 64 bytes before every block say what it is.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kernels/cpu/cpu.h"

enum { HEADER = 64, SMALL_PAGE = 4096 };
static const size_t huge = (size_t)2 << 20;

struct header {
    uint64_t magic;
    void *base;
    size_t bytes; // of the mapping; 0: heap
};
static const uint64_t header_magic = 0x706f6c6465720001u;

static void *map_huge(size_t bytes)
{
    size_t total;
    if (!add_size(bytes, 2 * huge, &total))
        return NULL;
    total = round_up(total, huge);
    uint8_t *base = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
    uint8_t *memory = (uint8_t *)round_up((size_t)base + SMALL_PAGE, huge);
    (void)madvise(memory, round_up(bytes, huge), MADV_HUGEPAGE);
    struct header h = {header_magic, base, total};
    memcpy(memory - HEADER, &h, sizeof h);
    return memory;
}

enum status cpu__alloc(struct device *device, size_t bytes, void **out)
{
    (void)device;
    *out = NULL;
    if (bytes >= huge) {
        *out = map_huge(bytes);
        return *out ? STATUS_OK : STATUS_NO_MEMORY;
    }
    size_t total = round_up(bytes + HEADER + 1, 64);
    uint8_t *base = aligned_alloc(64, total);
    if (!base)
        return STATUS_NO_MEMORY;
    memset(base, 0, total);
    struct header h = {header_magic, base, 0};
    memcpy(base, &h, sizeof h);
    *out = base + HEADER;
    return STATUS_OK;
}

void cpu__release(struct device *device, void *memory)
{
    (void)device;
    if (!memory)
        return;
    struct header h;
    memcpy(&h, (uint8_t *)memory - HEADER, sizeof h);
    CHECK(h.magic == header_magic);
    if (h.bytes)
        munmap(h.base, h.bytes);
    else
        free(h.base);
}
