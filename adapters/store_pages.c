// SPDX-License-Identifier: Apache-2.0
// Pages of a store file on their way to the disk. Whoever converts fills one page after the other;
// a thread hashes and writes them, so that reading, hashing and the disk go on at once. One thread:
// hashing and writing a page takes about as long as reading, hashing and transposing it.
//
//   FREE --adapter__pages_next--> open (the filler's) --adapter__pages_put--> FULL --> the thread's
//     ^                                                                                     |
//     +-------------------------------------------------------------------------------------+
//
// The disk is asked to begin with every page as it comes, so that the sync at the end finds little
// left to do.
//
// Invariants: 1. pages go out in the order in which they were put, and into the digest. 2. buffers
// are as many as `alive`, whatever the size of the file. 3. the first failure counts; after it
// pages are thrown away.
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "adapters/store.h"
#include "base/arith.h"
#include "base/check.h"
#include "base/files.h"

// ALIVE_BYTES: what is between the filler and the disk at most; about what a cache holds.
enum { THREADS = 1, ALIVE_BYTES = 4 << 20, ALIVE_MIN = 4, ALIVE_MAX = 64 };
enum { DIGESTS_MIN = 64 };

struct adapter_pages {
    pthread_t thread;
    bool running;
    pthread_mutex_t lock;
    pthread_cond_t filled, freed;
    int descriptor;
    uint64_t next; // the thread's: where its next page goes
    size_t page_bytes;
    uint32_t alive, free_count, full_first, full_count;
    uint8_t *free_pages[ALIVE_MAX];
    uint8_t *full[ALIVE_MAX]; // a ring
    uint8_t *open;            // the filler's
    struct digest *digests;   // of blocks; the thread's, until it has ended
    size_t digests_count, digests_room;
    int error; // errno of the first failure
    bool ended;
};

static bool add_digests(struct adapter_pages *pages, const uint8_t *page)
{
    size_t block = adapter__block_bytes(pages->page_bytes), more = pages->page_bytes / block;
    if (pages->digests_count + more > pages->digests_room) {
        size_t room = 2 * pages->digests_room + DIGESTS_MIN;
        struct digest *grown = realloc(pages->digests, room * sizeof *grown);
        if (!grown)
            return false;
        pages->digests = grown;
        pages->digests_room = room;
    }
    for (size_t i = 0; i < more; i++)
        pages->digests[pages->digests_count++] = adapter__block_digest(page + i * block, block);
    return true;
}

static bool page_out(struct adapter_pages *pages, const uint8_t *page)
{
    if (!add_digests(pages, page))
        return false;
    if (!file_write_at(pages->descriptor, page, pages->page_bytes, pages->next))
        return false;
    (void)sync_file_range(pages->descriptor, (off64_t)pages->next, (off64_t)pages->page_bytes,
                          SYNC_FILE_RANGE_WRITE);
    pages->next += pages->page_bytes;
    return true;
}

static void *pages_main(void *context)
{
    struct adapter_pages *pages = context;
    (void)pthread_mutex_lock(&pages->lock);
    for (;;) {
        while (!pages->full_count && !pages->ended)
            (void)pthread_cond_wait(&pages->filled, &pages->lock);
        if (!pages->full_count)
            break;
        uint8_t *page = pages->full[pages->full_first];
        pages->full_first = (pages->full_first + 1) % pages->alive;
        pages->full_count--;
        bool failed = pages->error != 0;
        (void)pthread_mutex_unlock(&pages->lock);
        int error = failed || page_out(pages, page) ? 0 : errno ? errno : EIO;
        (void)pthread_mutex_lock(&pages->lock);
        if (error && !pages->error)
            pages->error = error;
        pages->free_pages[pages->free_count++] = page;
        (void)pthread_cond_signal(&pages->freed);
    }
    (void)pthread_mutex_unlock(&pages->lock);
    return NULL;
}

enum status adapter__pages_begin(int descriptor, uint64_t offset, size_t page_bytes,
                                 struct adapter_pages **out)
{
    struct adapter_pages *pages = calloc(1, sizeof *pages);
    if (!pages)
        return STATUS_NO_MEMORY;
    size_t alive = min_size(max_size(ALIVE_BYTES / page_bytes, ALIVE_MIN), ALIVE_MAX);
    pages->descriptor = descriptor;
    pages->next = offset;
    pages->page_bytes = page_bytes;
    pages->alive = (uint32_t)alive;
    (void)pthread_mutex_init(&pages->lock, NULL);
    (void)pthread_cond_init(&pages->filled, NULL);
    (void)pthread_cond_init(&pages->freed, NULL);
    bool good = true;
    while (good && pages->free_count < pages->alive) {
        uint8_t *page = aligned_alloc(HASH_PIECE, page_bytes);
        good = page != NULL;
        if (good)
            pages->free_pages[pages->free_count++] = page;
    }
    pages->running = good && !pthread_create(&pages->thread, NULL, pages_main, pages);
    if (pages->running) {
        *out = pages;
        return STATUS_OK;
    }
    adapter__pages_abandon(pages);
    return STATUS_NO_MEMORY;
}

uint8_t *adapter__pages_next(struct adapter_pages *pages)
{
    (void)pthread_mutex_lock(&pages->lock);
    CHECK(!pages->open);
    while (!pages->free_count)
        (void)pthread_cond_wait(&pages->freed, &pages->lock);
    if (!pages->error)
        pages->open = pages->free_pages[--pages->free_count];
    (void)pthread_mutex_unlock(&pages->lock);
    return pages->open;
}

void adapter__pages_put(struct adapter_pages *pages)
{
    (void)pthread_mutex_lock(&pages->lock);
    CHECK(pages->open && pages->full_count < pages->alive);
    pages->full[(pages->full_first + pages->full_count++) % pages->alive] = pages->open;
    pages->open = NULL;
    (void)pthread_cond_signal(&pages->filled);
    (void)pthread_mutex_unlock(&pages->lock);
}

// Waits for the thread. 0 or the errno of the first failure.
static int pages_finish(struct adapter_pages *pages, bool wanted, struct digest *out)
{
    (void)pthread_mutex_lock(&pages->lock);
    pages->ended = true;
    if (!wanted && !pages->error)
        pages->error = ECANCELED; // what is still full need not be written
    (void)pthread_cond_signal(&pages->filled);
    (void)pthread_mutex_unlock(&pages->lock);
    if (pages->running)
        (void)pthread_join(pages->thread, NULL);
    size_t list = pages->digests_count * sizeof *pages->digests;
    if (!pages->error && !file_write_at(pages->descriptor, pages->digests, list, pages->next))
        pages->error = errno ? errno : EIO;
    int error = pages->error;
    if (!error)
        *out = hash_bytes(NULL, pages->digests, list);
    free(pages->digests);
    while (pages->free_count)
        free(pages->free_pages[--pages->free_count]);
    free(pages->open);
    (void)pthread_mutex_destroy(&pages->lock);
    (void)pthread_cond_destroy(&pages->filled);
    (void)pthread_cond_destroy(&pages->freed);
    free(pages);
    return error;
}

enum status adapter__pages_end(struct adapter_pages *pages, struct digest *out)
{
    int error = pages_finish(pages, true, out);
    errno = error;
    return error ? STATUS_IO : STATUS_OK;
}

void adapter__pages_abandon(struct adapter_pages *pages)
{
    (void)pages_finish(pages, false, NULL);
}
