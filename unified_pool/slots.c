// SPDX-License-Identifier: Apache-2.0
// Contiguous runs of slot numbers, because an object's page table is one array that never moves.
// Boundary tags: the first and last slot of a free run hold its size, so that giving a run back
// finds both neighbours at once. Free runs stand in bins by the power of two of their size. Objects
// of one kind mostly have one size, so a run that was given back fits the next one.
#include "unified_pool/internal.h"

enum { TRIES = 8 }; // runs of the own bin that are looked at before a larger one is split

static uint32_t bin_of(uint32_t size)
{
    return 31u - (uint32_t)__builtin_clz(size);
}

static void link_run(struct run_table *table, uint32_t first, uint32_t size)
{
    uint32_t *head = &table->bins[bin_of(size)];
    table->runs[first] = (struct run){.size = size, .next = *head, .prev = NONE, .is_free = true};
    if (size > 1)
        table->runs[first + size - 1] =
            (struct run){.size = size, .next = NONE, .prev = NONE, .is_free = true};
    if (*head != NONE)
        table->runs[*head].prev = first;
    *head = first;
}

static void unlink_run(struct run_table *table, uint32_t first)
{
    struct run *run = &table->runs[first];
    if (run->prev != NONE)
        table->runs[run->prev].next = run->next;
    else
        table->bins[bin_of(run->size)] = run->next;
    if (run->next != NONE)
        table->runs[run->next].prev = run->prev;
    table->runs[first + run->size - 1].is_free = false;
    run->is_free = false;
}

void pool__runs_init(struct run_table *table)
{
    for (int i = 0; i < RUN_BINS; i++)
        table->bins[i] = NONE;
    link_run(table, 0, table->count);
}

static uint32_t search(const struct run_table *table, uint32_t bin, uint32_t size, uint32_t tries)
{
    for (uint32_t at = table->bins[bin]; at != NONE && tries--; at = table->runs[at].next)
        if (table->runs[at].size >= size)
            return at;
    return NONE;
}

uint32_t pool__runs_take(struct run_table *table, uint32_t size)
{
    CHECK(size > 0);
    uint32_t bin = bin_of(size);
    uint32_t at = search(table, bin, size, TRIES);
    for (uint32_t larger = bin + 1; at == NONE && larger < RUN_BINS; larger++)
        at = table->bins[larger];
    if (at == NONE)
        at = search(table, bin, size, UINT32_MAX);
    if (at == NONE)
        return NONE;
    uint32_t whole = table->runs[at].size;
    unlink_run(table, at);
    if (whole > size)
        link_run(table, at + size, whole - size);
    return at;
}

void pool__runs_give(struct run_table *table, uint32_t first, uint32_t size)
{
    CHECK(first + size <= table->count);
    uint32_t after = first + size;
    if (after < table->count && table->runs[after].is_free) {
        size += table->runs[after].size;
        unlink_run(table, after);
    }
    if (first && table->runs[first - 1].is_free) {
        uint32_t before = table->runs[first - 1].size;
        first -= before;
        size += before;
        unlink_run(table, first);
    }
    link_run(table, first, size);
}

void pool__runs_check(const struct run_table *table, uint32_t used)
{
    uint32_t unused = 0;
    for (uint32_t b = 0; b < RUN_BINS; b++) {
        uint32_t prev = NONE;
        for (uint32_t at = table->bins[b]; at != NONE; at = table->runs[at].next) {
            const struct run *run = &table->runs[at];
            CHECK(run->is_free && run->prev == prev && bin_of(run->size) == b);
            CHECK(table->runs[at + run->size - 1].is_free);
            CHECK(table->runs[at + run->size - 1].size == run->size);
            unused += run->size;
            prev = at;
        }
    }
    CHECK(used + unused == table->count);
}
