// SPDX-License-Identifier: Apache-2.0
// A seeded random run of the real pool, copy queues and KV cache on a fake clock, link and file:
// sequences of several tenants share prefixes, grow, swap and close; experts and adapters are
// fetched, promoted, cancelled and dropped; segments open epochs, pin, and retire out of order;
// copies are slow and fail.
//
//   sim_pool [seed [steps]]       the same seed gives the same run; both are printed when something
//   breaks
//
// After every step: pool_check and kv_check. When a segment retires, all that it could read (also
// what was given back since) must still hold its bytes. New KV pages must not show another owner's
// bytes. At the end everything is closed and every page must be free again.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "base/rng.h"
#include "fakes.h"
#include "runtime/kv/kv.h"
#include "unified_pool/pool.h"

enum {
    PAGE = 32 << 10,
    SEQUENCES = 12,
    BLOCKS = 16,
    TOKENS = BLOCKS * 8,
    FILED = 20, // the first FILED_EXPERTS are experts, the rest adapters
    FILED_EXPERTS = 13,
    SLOTS_MAX = 5,
    SEGMENTS = 4,
    SEEN = 6,
    OWNERS = 3,
    FILE_SEED = 77
};

struct actor {                   // a sequence
    bool is_open, is_taken_back; // it will write other tokens into a block that was full
    kv_sequence handle;
    uint32_t owner, length, computed;
    int32_t tokens[TOKENS];
    uint64_t values[TOKENS];
};

struct filed { // an expert or adapter
    pool_object object;
    enum page_kind kind;
    uint64_t used_us;
    uint64_t first_page; // in the file
};

struct seen {             // what a segment may read
    int32_t actor, filed; // -1: not that; actor also tells what is pinned
    bool is_pinned;
    pool_object object;
    uint64_t first_page;
    uint32_t count; // positions or slots
    uint32_t pages[BLOCKS * 2];
    uint64_t values[TOKENS];
};

struct segment {
    bool is_open;
    uint64_t epoch;
    uint32_t seen_count;
    struct seen seen[SEEN];
};

struct sim {
    uint64_t seed, step, steps;
    struct rng rng;
    uint64_t now;
    struct fake_link link;
    struct fake_reader file;
    struct copy_queues *copies;
    uint8_t *device, *host;
    uint32_t device_pages, host_pages;
    struct pool *pool;
    struct kv *kv;
    struct kv_shape shape;
    struct digest roots[OWNERS];
    struct actor actors[SEQUENCES];
    struct filed filed[FILED];
    struct segment segments[SEGMENTS];
    uint64_t opened, verified, lost, full;
};

static struct sim *running; // for the signal handler only

static void on_abort(int signal_number)
{
    char line[128];
    int n = snprintf(line, sizeof line, "sim_pool: failed with seed %llu at step %llu of %llu\n",
                     (unsigned long long)running->seed, (unsigned long long)running->step,
                     (unsigned long long)running->steps);
    ssize_t written = write(2, line, (size_t)n);
    (void)written;
    (void)signal(signal_number, SIG_DFL);
    (void)raise(signal_number);
}

static uint32_t pick(struct sim *sim, uint32_t n)
{
    return (uint32_t)rng_below(&sim->rng, n);
}

static bool chance(struct sim *sim, uint32_t percent)
{
    return pick(sim, 100) < percent;
}

// ---- experts and adapters: offered by age ----

static struct filed *filed_of(struct sim *sim, pool_object object)
{
    for (int i = 0; i < FILED; i++)
        if (sim->filed[i].object.bits == object.bits)
            return &sim->filed[i];
    CHECK(false);
}

static bool cheapest(struct sim *sim, enum page_kind kind, struct pool_offer *out)
{
    bool found = false;
    for (int i = 0; i < FILED; i++) {
        struct filed *filed = &sim->filed[i];
        if (filed->kind != kind || !pool_is_resident(sim->pool, filed->object) ||
            pool_pins(sim->pool, filed->object))
            continue;
        float price = 0.02f / (1.0f + (float)(sim->now - filed->used_us) * 1e-4f);
        if (!found || price < out->price)
            *out = (struct pool_offer){filed->object, price};
        found = true;
    }
    return found;
}

static bool cheapest_expert(void *context, struct pool_offer *out)
{
    return cheapest(context, PAGE_EXPERT, out);
}

static bool cheapest_adapter(void *context, struct pool_offer *out)
{
    return cheapest(context, PAGE_ADAPTER, out);
}

static void give_back(void *context, pool_object object)
{
    struct sim *sim = context;
    (void)filed_of(sim, object);
    pool_drop_device(sim->pool, object);
}

static void make_filed(struct sim *sim, struct filed *filed)
{
    struct pool_object_options options = {.kind = filed->kind,
                                          .owner = pick(sim, OWNERS),
                                          .slots = 1 + pick(sim, SLOTS_MAX),
                                          .file = &sim->file.reader,
                                          .file_offset = filed->first_page * PAGE};
    CHECK(pool_object_create(sim->pool, &options, &filed->object) == STATUS_OK);
}

static void check_filed_page(struct sim *sim, uint64_t file_page, uint32_t page)
{
    CHECK(fake_content_is(FILE_SEED, file_page * PAGE, sim->device + (size_t)page * PAGE, PAGE));
    sim->verified++;
}

static void check_filed(struct sim *sim, const struct filed *filed)
{
    const uint32_t *pages = pool_device_pages(sim->pool, filed->object);
    for (uint32_t s = 0; s < pool_slots(sim->pool, filed->object); s++)
        check_filed_page(sim, filed->first_page + s, pages[s]);
}

static void act_filed(struct sim *sim)
{
    struct filed *filed = &sim->filed[pick(sim, FILED)];
    struct pool *pool = sim->pool;
    bool pinned = pool_pins(pool, filed->object);
    uint32_t what = pick(sim, 100);
    if (what < 70) {
        enum status status =
            pool_fetch(pool, filed->object, (enum copy_class)pick(sim, COPY_CLASSES),
                       (enum copy_need)pick(sim, COPY_NEEDS));
        CHECK(status == STATUS_OK || status == STATUS_FULL);
        sim->full += status == STATUS_FULL;
        filed->used_us = sim->now;
    } else if (what < 78) {
        pool_fetch_cancel(pool, filed->object);
    } else if (what < 85 && !pinned) {
        pool_drop_device(pool, filed->object);
    } else if (what < 90) {
        if (!pool_is_fetching(pool, filed->object))
            pool_drop_host(pool, filed->object);
    } else if (what < 94 && !pinned) {
        pool_object_destroy(pool, filed->object);
        filed->first_page = pick(sim, 1000);
        make_filed(sim, filed);
    } else if (pool_is_resident(pool, filed->object)) {
        check_filed(sim, filed);
    }
}

// ---- sequences ----

static void copy_bytes(void *context, void *to, const void *from, size_t bytes)
{
    (void)context;
    memcpy(to, from, bytes);
}

static void write_text(struct sim *sim, struct actor *actor)
{
    uint32_t text = pick(sim, 4), common = pick(sim, TOKENS + 1);
    uint64_t unique = ++sim->opened, value = actor->owner;
    for (uint32_t i = 0; i < TOKENS; i++) {
        uint64_t which = i < common ? text : 100 + unique;
        actor->tokens[i] = (int32_t)(rng_at(3, which, i) % 8192);
        value = rng_mix(value ^ (uint32_t)actor->tokens[i]);
        actor->values[i] = value >> 8 | (uint64_t)(actor->owner + 1) << 56;
    }
}

static void check_positions(struct sim *sim, const uint32_t *pages, const uint64_t *values,
                            uint32_t count)
{
    for (uint32_t p = 0; p < count; p++)
        CHECK(fake_kv_is(sim->device, PAGE, &sim->shape, pages, p, values[p]));
    sim->verified += count;
}

static void check_actor(struct sim *sim, const struct actor *actor)
{
    uint32_t pages[BLOCKS * 2];
    kv_fill_pages(sim->kv, actor->handle, pages, BLOCKS);
    check_positions(sim, pages, actor->values, actor->computed);
}

static void find_prefix(struct sim *sim, struct actor *actor)
{
    actor->computed = kv_match_prefix(sim->kv, actor->handle, actor->tokens, actor->length);
    CHECK(actor->computed < actor->length);
    check_actor(sim, actor);
}

static void open_actor(struct sim *sim, struct actor *actor)
{
    *actor = (struct actor){.owner = pick(sim, OWNERS), .length = 1 + pick(sim, TOKENS)};
    CHECK(kv_open(sim->kv, actor->owner, &sim->roots[actor->owner], &actor->handle) == STATUS_OK);
    actor->is_open = true;
    write_text(sim, actor);
    find_prefix(sim, actor);
}

// Bytes of a page that this owner may see: nothing, or his own.
static void check_page_is_clean(struct sim *sim, uint32_t page, uint32_t owner)
{
    const uint8_t *memory = sim->device + (size_t)page * PAGE;
    for (size_t i = 0; i < PAGE; i += 8) {
        uint64_t word;
        memcpy(&word, memory + i, 8);
        CHECK(word == 0 || word >> 56 == owner + 1);
    }
}

static void grow_actor(struct sim *sim, struct actor *actor)
{
    uint32_t pages[BLOCKS * 2];
    uint32_t bt = sim->shape.block_tokens, ppb = sim->shape.pages_per_block;
    uint32_t most = chance(sim, 70) ? 4 : 48, to = actor->computed + 1 + pick(sim, most);
    if (to > TOKENS)
        to = TOKENS;
    if (to == actor->computed)
        return;
    struct kv_copier copier = {copy_bytes, NULL};
    enum status status = kv_reserve(sim->kv, actor->handle, to, &copier);
    CHECK(status == STATUS_OK || status == STATUS_FULL);
    sim->full += status == STATUS_FULL;
    if (status)
        return;
    kv_fill_pages(sim->kv, actor->handle, pages, BLOCKS);
    check_positions(sim, pages, actor->values, actor->computed);
    for (uint32_t b = actor->computed / bt; b <= (to - 1) / bt; b++)
        for (uint32_t p = 0; p < ppb; p++)
            check_page_is_clean(sim, pages[b * ppb + p], actor->owner);
    for (uint32_t p = actor->computed; p < to; p++)
        fake_kv_write(sim->device, PAGE, &sim->shape, pages, p, actor->values[p]);
    kv_commit(sim->kv, actor->handle, actor->tokens, to);
    actor->computed = to;
    actor->is_taken_back = false;
    if (actor->length < to)
        actor->length = to;
}

static bool is_pinned(const struct sim *sim, const struct actor *actor)
{
    for (int s = 0; s < SEGMENTS; s++)
        for (uint32_t i = 0; sim->segments[s].is_open && i < sim->segments[s].seen_count; i++) {
            const struct seen *seen = &sim->segments[s].seen[i];
            if (seen->actor == actor - sim->actors && seen->is_pinned)
                return true;
        }
    return false;
}

// A sequence that nobody pins must not be looked at later when one that took tokens back shares a
// block with it: once alone, that one writes in place.
static bool any_taken_back(const struct sim *sim)
{
    for (int i = 0; i < SEQUENCES; i++)
        if (sim->actors[i].is_open && sim->actors[i].is_taken_back)
            return true;
    return false;
}

static bool any_segment(const struct sim *sim)
{
    for (int s = 0; s < SEGMENTS; s++)
        if (sim->segments[s].is_open)
            return true;
    return false;
}

static void take_back(struct sim *sim, struct actor *actor)
{
    uint32_t to = actor->computed - pick(sim, actor->computed < 6 ? actor->computed + 1 : 6);
    kv_commit(sim->kv, actor->handle, actor->tokens, to);
    actor->computed = to;
    actor->is_taken_back = true;
    // Other tokens follow, from here on.
    uint64_t value = to ? actor->values[to - 1] : actor->owner;
    uint64_t unique = ++sim->opened;
    for (uint32_t i = to; i < TOKENS; i++) {
        actor->tokens[i] = (int32_t)(rng_at(3, 100 + unique, i) % 8192);
        value = rng_mix(value ^ (uint32_t)actor->tokens[i]);
        actor->values[i] = value >> 8 | (uint64_t)(actor->owner + 1) << 56;
    }
}

static void restart_actor(struct sim *sim, struct actor *actor)
{
    kv_drop(sim->kv, actor->handle);
    actor->computed = 0;
    actor->is_taken_back = false;
    find_prefix(sim, actor);
}

static void act_resident(struct sim *sim, struct actor *actor)
{
    uint32_t what = pick(sim, 100);
    bool pinned = is_pinned(sim, actor);
    if (what < 62) {
        grow_actor(sim, actor);
    } else if (what < 70) {
        check_actor(sim, actor);
    } else if (what < 82 && !pinned) {
        enum status status =
            kv_swap_out(sim->kv, actor->handle, (enum copy_class)pick(sim, COPY_CLASSES));
        CHECK(status == STATUS_OK || status == STATUS_FULL);
    } else if (what < 86 && !any_segment(sim)) { // it rewrites a cached block that is not pinned
        take_back(sim, actor);
    } else if (what < 88 && !pinned) {
        restart_actor(sim, actor);
    } else if (what < 96 && !pinned) {
        kv_close(sim->kv, actor->handle);
        actor->is_open = false;
    }
}

static void act_sequence(struct sim *sim)
{
    struct actor *actor = &sim->actors[pick(sim, SEQUENCES)];
    if (!actor->is_open) {
        open_actor(sim, actor);
        return;
    }
    enum kv_state state = kv_state(sim->kv, actor->handle);
    if (state == KV_RESIDENT) {
        act_resident(sim, actor);
    } else if (state == KV_LOST) {
        sim->lost++;
        restart_actor(sim, actor);
    } else if (chance(sim, 3)) {
        kv_close(sim->kv, actor->handle); // in the middle of it
        actor->is_open = false;
    } else if (state == KV_SWAPPED && chance(sim, 40)) {
        enum status status = chance(sim, 85) ? kv_swap_in(sim->kv, actor->handle, COPY_STANDARD)
                                             : kv_swap_out(sim->kv, actor->handle, COPY_BATCH);
        CHECK(status == STATUS_OK || status == STATUS_FULL);
        sim->full += status == STATUS_FULL;
    }
}

// ---- segments ----

static void see_actor(struct sim *sim, struct segment *segment)
{
    struct actor *actor = &sim->actors[pick(sim, SEQUENCES)];
    if (!actor->is_open || !actor->computed || kv_state(sim->kv, actor->handle) != KV_RESIDENT)
        return;
    struct seen *seen = &segment->seen[segment->seen_count++];
    seen->actor = (int32_t)(actor - sim->actors);
    seen->filed = -1;
    seen->is_pinned = any_taken_back(sim) || chance(sim, 60);
    seen->count = actor->computed;
    kv_fill_pages(sim->kv, actor->handle, seen->pages, BLOCKS);
    memcpy(seen->values, actor->values, sizeof seen->values);
    if (seen->is_pinned)
        kv_pin(sim->kv, actor->handle);
}

static void see_filed(struct sim *sim, struct segment *segment)
{
    struct filed *filed = &sim->filed[pick(sim, FILED)];
    if (!pool_is_resident(sim->pool, filed->object))
        return;
    struct seen *seen = &segment->seen[segment->seen_count++];
    seen->actor = -1;
    seen->filed = (int32_t)(filed - sim->filed);
    seen->is_pinned = chance(sim, 50);
    seen->object = filed->object;
    seen->first_page = filed->first_page;
    seen->count = pool_slots(sim->pool, filed->object);
    memcpy(seen->pages, pool_device_pages(sim->pool, filed->object),
           seen->count * sizeof seen->pages[0]);
    if (seen->is_pinned)
        pool_pin(sim->pool, filed->object);
    filed->used_us = sim->now;
}

static void submit(struct sim *sim, struct segment *segment)
{
    segment->seen_count = 0;
    for (int i = 0; i < SEEN; i++) {
        if (chance(sim, 50))
            see_actor(sim, segment);
        else
            see_filed(sim, segment);
    }
    segment->epoch = pool_epoch_open(sim->pool);
    segment->is_open = true;
}

static void retire(struct sim *sim, struct segment *segment)
{
    for (uint32_t i = 0; i < segment->seen_count; i++) {
        const struct seen *seen = &segment->seen[i];
        if (seen->actor >= 0) {
            check_positions(sim, seen->pages, seen->values, seen->count);
            if (seen->is_pinned)
                kv_unpin(sim->kv, sim->actors[seen->actor].handle);
        } else {
            for (uint32_t s = 0; s < seen->count; s++)
                check_filed_page(sim, seen->first_page + s, seen->pages[s]);
            if (seen->is_pinned)
                pool_unpin(sim->pool, seen->object);
        }
    }
    pool_epoch_retire(sim->pool, segment->epoch);
    segment->is_open = false;
}

static void act_segment(struct sim *sim)
{
    struct segment *segment = &sim->segments[pick(sim, SEGMENTS)];
    if (segment->is_open)
        retire(sim, segment);
    else if (chance(sim, 50))
        submit(sim, segment);
}

// ---- the run ----

static void set_up(struct sim *sim)
{
    sim->rng.seed = sim->seed;
    sim->device_pages = 24 + pick(sim, 60);
    sim->host_pages = 8 + pick(sim, 60);
    fake_link_init(&sim->link, sim->seed + 1, &sim->now);
    fake_reader_init(&sim->file, FILE_SEED, 1 << 30);
    struct copy_options copies = {.link = &sim->link.link,
                                  .clock = clock_fake(&sim->now),
                                  .copies_max = chance(sim, 30) ? 3 : 256,
                                  .owners_max = OWNERS,
                                  .chunk_bytes = chance(sim, 50) ? PAGE / 2 : 0};
    CHECK(copy_create(&copies, &sim->copies) == STATUS_OK);
    sim->device = malloc((size_t)sim->device_pages * PAGE);
    sim->host = malloc((size_t)sim->host_pages * PAGE);
    CHECK(sim->device && sim->host);
    memset(sim->device, 0xdd, (size_t)sim->device_pages * PAGE);
    struct pool_options pool = {.page_bytes = PAGE,
                                .device_pages = sim->device_pages,
                                .host_pages = sim->host_pages,
                                .objects_max = FILED + (chance(sim, 30) ? 24 : 256),
                                .slots_max = 512,
                                .owners_max = OWNERS,
                                .device_arena = sim->device,
                                .host_arena = sim->host,
                                .copies = sim->copies};
    CHECK(pool_create(&pool, &sim->pool, NULL) == STATUS_OK);
    uint32_t layers = chance(sim, 50) ? 8 : 16; // one or two pages a block
    CHECK(kv_shape_choose(layers, 2, 64, DTYPE_BF16, PAGE, &sim->shape, NULL) == STATUS_OK);
    struct kv_options kv = {.pool = sim->pool,
                            .clock = clock_fake(&sim->now),
                            .shape = sim->shape,
                            .page_bytes = PAGE,
                            .sequences_max = SEQUENCES,
                            .blocks_max = BLOCKS,
                            .recompute_us_per_token = 50,
                            .prefix_sharing = true};
    kv.secret = hash_bytes(NULL, &sim->seed, sizeof sim->seed);
    CHECK(kv_create(&kv, &sim->kv) == STATUS_OK);
    pool_set_pressure(sim->pool, PAGE_EXPERT,
                      &(struct pool_pressure){sim, cheapest_expert, give_back});
    pool_set_pressure(sim->pool, PAGE_ADAPTER,
                      &(struct pool_pressure){sim, cheapest_adapter, give_back});
    for (uint32_t o = 0; o < OWNERS; o++)
        sim->roots[o] = hash_bytes(NULL, &o, sizeof o);
    for (int i = 0; i < FILED; i++) {
        sim->filed[i].kind = i < FILED_EXPERTS ? PAGE_EXPERT : PAGE_ADAPTER;
        sim->filed[i].first_page = pick(sim, 1000);
        make_filed(sim, &sim->filed[i]);
    }
}

static void set_weather(struct sim *sim)
{
    static const uint64_t delays[] = {0, 10, 100, 1000};
    static const uint32_t failures[] = {0, 0, 5, 50};
    sim->link.delay_max_us = delays[pick(sim, 4)];
    sim->link.fail_per_mille = failures[pick(sim, 4)];
    for (int r = 0; r < COPY_RESOURCES; r++)
        sim->link.held[r] = chance(sim, 10);
}

static void run_step(struct sim *sim)
{
    if (sim->step % 500 == 0)
        set_weather(sim);
    uint32_t what = pick(sim, 100);
    if (what < 45)
        act_sequence(sim);
    else if (what < 65)
        act_filed(sim);
    else if (what < 75)
        act_segment(sim);
    else
        sim->now += pick(sim, 60);
    if (what >= 50)
        pool_poll(sim->pool);
    pool_check(sim->pool);
    kv_check(sim->kv);
}

// Everything ends; every page must come back.
static void wind_up(struct sim *sim)
{
    for (int s = 0; s < SEGMENTS; s++)
        if (sim->segments[s].is_open)
            retire(sim, &sim->segments[s]);
    for (int i = 0; i < SEQUENCES; i++)
        if (sim->actors[i].is_open)
            kv_close(sim->kv, sim->actors[i].handle);
    for (int i = 0; i < FILED; i++)
        pool_object_destroy(sim->pool, sim->filed[i].object);
    for (int r = 0; r < COPY_RESOURCES; r++)
        sim->link.held[r] = false;
    for (int i = 0; i < 1000000 && !copy_is_idle(sim->copies); i++) {
        sim->now += 100;
        pool_poll(sim->pool);
    }
    CHECK(copy_is_idle(sim->copies));
    pool_set_pressure(sim->pool, PAGE_EXPERT, &(struct pool_pressure){0});
    pool_set_pressure(sim->pool, PAGE_ADAPTER, &(struct pool_pressure){0});
    CHECK(pool_make_room(sim->pool, sim->device_pages) == STATUS_OK);
    pool_check(sim->pool);
    kv_check(sim->kv);
    struct pool_stats pool;
    struct kv_stats kv;
    pool_stats(sim->pool, &pool);
    kv_stats(sim->kv, &kv);
    CHECK(pool.device_free == sim->device_pages && pool.host_free == sim->host_pages);
    CHECK(kv.blocks == 0 && kv.sequences == 0);
    printf(
        "sim_pool: seed %llu, %llu steps, %u device and %u host pages: %llu fetches, "
        "%llu failed, %llu given back, %llu written back, %llu swapped in, %llu copied on write, "
        "%llu of %llu prompt tokens found, %llu lost, %llu times full, %llu contents checked\n",
        (unsigned long long)sim->seed, (unsigned long long)sim->steps, sim->device_pages,
        sim->host_pages, (unsigned long long)pool.fetches, (unsigned long long)pool.fetch_failures,
        (unsigned long long)pool.give_backs, (unsigned long long)pool.write_backs,
        (unsigned long long)kv.swapped_in, (unsigned long long)kv.copies_on_write,
        (unsigned long long)kv.prefix_hits, (unsigned long long)kv.prefix_queries,
        (unsigned long long)sim->lost, (unsigned long long)sim->full,
        (unsigned long long)sim->verified);
    if (sim->steps >= 20000) // a run that does nothing proves nothing
        CHECK(pool.fetches && pool.fetch_failures && pool.give_backs && pool.write_backs &&
              kv.swapped_in && kv.prefix_hits && sim->full);
    kv_destroy(sim->kv);
    copy_destroy(sim->copies);
    pool_destroy(sim->pool);
    free(sim->device);
    free(sim->host);
}

int main(int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    uint64_t steps = argc > 2 ? strtoull(argv[2], NULL, 0) : 100000;
    // Several worlds: sizes and limits are drawn from the seed, too.
    for (uint64_t done = 0, world = seed; done < steps; world++) {
        struct sim *sim = calloc(1, sizeof *sim);
        CHECK(sim);
        sim->seed = world;
        sim->steps = steps - done < 25000 ? steps - done : 25000;
        running = sim;
        (void)signal(SIGABRT, on_abort);
        set_up(sim);
        for (sim->step = 0; sim->step < sim->steps; sim->step++)
            run_step(sim);
        wind_up(sim);
        done += sim->steps;
        free(sim);
    }
    return 0;
}
