// SPDX-License-Identifier: Apache-2.0
// The registry and its residency in a real pool over a fake link: exact counts of what is fetched
// and given back, removal while in use, reads that fail, 2,000 adapters.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "adapters/price.h"
#include "tests/test_adapters_tool.h"

enum { PAGE = 32768, MANY = 2000 };

struct world {
    char *scratch;
    struct adapter_base base;
    char small[TOOL_PATH + 64], large[TOOL_PATH + 64]; // stores of 1 and of 2 pages
    struct tool_rig rig;
};

static void store_make(const struct world *world, uint32_t rank, const char *path, uint32_t pages)
{
    struct tool_adapter adapter;
    struct adapter_report report;
    tool_adapter_begin(&adapter, world->scratch);
    adapter.count = 0;
    (void)snprintf(adapter.config, sizeof adapter.config,
                   "{\"peft_type\": \"LORA\", \"r\": %u, \"lora_alpha\": 8, \"target_modules\": "
                   "[\"q_proj\", \"v_proj\"]}",
                   rank);
    for (int layer = 0; layer < 2; layer++) {
        char module[64];
        (void)snprintf(module, sizeof module, "layers.%d.self_attn.q_proj", layer);
        tool_pair_add(&adapter, module, rank, 64, 64);
        (void)snprintf(module, sizeof module, "layers.%d.self_attn.v_proj", layer);
        tool_pair_add(&adapter, module, rank, 64, 32);
    }
    tool_adapter_write(&adapter);
    assert_int_equal(adapter_convert(adapter.directory, &world->base, PAGE, path, &report, NULL),
                     STATUS_OK);
    assert_int_equal(report.bytes, pages * (uint64_t)PAGE);
}

static void begin(struct world *world, char *scratch, uint32_t device_pages, uint32_t adapters_max)
{
    world->scratch = scratch;
    world->base = tool_base(DTYPE_BF16);
    (void)snprintf(world->small, sizeof world->small, "%s/small.adapter", scratch);
    (void)snprintf(world->large, sizeof world->large, "%s/large.adapter", scratch);
    if (access(world->small, F_OK) != 0) {
        store_make(world, 4, world->small, 1);
        store_make(world, 64, world->large, 2);
    }
    tool_rig_make(&world->rig, &world->base, PAGE, device_pages, 8, adapters_max);
}

static adapter_id add(struct world *world, const char *name, const char *store)
{
    adapter_id id;
    struct fault fault = {.text = ""};
    if (adapter_register(world->rig.adapters, name, store, 3, &id, &fault))
        fail_msg("%s: %s", name, fault.text);
    return id;
}

static void bring(struct world *world, adapter_id id)
{
    assert_int_equal(adapter_fetch(world->rig.adapters, id, COPY_STANDARD, COPY_ADAPTER),
                     STATUS_OK);
    tool_rig_settle(&world->rig);
    assert_int_equal(adapter_fetch_status(world->rig.adapters, id), STATUS_OK);
    assert_true(adapter_is_resident(world->rig.adapters, id));
}

// A request that came and went.
static void visit(struct world *world, adapter_id id)
{
    adapter_acquire(world->rig.adapters, id);
    adapter_release(world->rig.adapters, id);
}

static struct adapters_stats stats_of(const struct world *world)
{
    struct adapters_stats stats;
    adapters_stats(world->rig.adapters, &stats);
    return stats;
}

static uint32_t pool_pages(const struct world *world)
{
    struct pool_stats stats;
    pool_stats(world->rig.pool, &stats);
    return stats.device_by_kind[PAGE_ADAPTER];
}

static uint32_t open_files(void)
{
    uint32_t count = 0;
    DIR *directory = opendir("/proc/self/fd");
    assert_non_null(directory);
    while (readdir(directory))
        count++;
    (void)closedir(directory);
    return count;
}

// ---- price ----

static void test_adapters_price(void **state)
{
    struct adapter_heat cold = {.uses = 0}, once = {.uses = 0}, often = {.uses = 0};
    uint64_t now = 5000000;
    (void)state;
    adapter__heat_add(&once, now);
    for (int i = 0; i < 20; i++)
        adapter__heat_add(&often, now);
    assert_true(adapter__price(&cold, 0, 0.5f, now) == 0);
    float p1 = adapter__price(&once, 0, 0.5f, now), p20 = adapter__price(&often, 0, 0.5f, now);
    assert_true(p1 > 0 && p20 > p1 && p20 <= 0.5f);
    // One use, 60 s half-life, a horizon of half a second: 1 - exp(-ln 2 / 120) = 0.005759.
    assert_true(p1 > 0.5f * 0.00575f && p1 < 0.5f * 0.00577f);
    uint64_t later = now + ADAPTER_HALF_LIFE_US;
    assert_true(adapter__heat_at(&once, later) == 0.5);
    assert_true(adapter__price(&once, 0, 0.5f, later) < p1);
    adapter__heat_keep(&once, later); // in use all the time: did not cool
    assert_true(adapter__price(&once, 0, 0.5f, later) == p1);
    // Held by a request costs more than any idle one.
    assert_true(adapter__price(&cold, 1, 0.5f, now) >= 0.5f);
    assert_true(adapter__price(&cold, 2, 0.5f, now) >= 1.0f);
    // clock behind
    assert_true(adapter__price(&once, 1, 0.5f, 0) == adapter__price(&once, 1, 0.5f, now));
}

// ---- registry ----

static void name_of(uint32_t number, char out[32])
{
    (void)snprintf(out, 32, "tenant-%04u", number);
}

static void test_adapters_two_thousand(void **state)
{
    struct rlimit limit;
    struct world world;
    struct adapter_info info;
    adapter_id id, ids[MANY];
    char name[32];
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    limit.rlim_cur = limit.rlim_max < 4096 ? limit.rlim_max : 4096;
    if (limit.rlim_cur < MANY + 64 || setrlimit(RLIMIT_NOFILE, &limit) != 0) {
        (void)printf("skipped: this process may not open %d files\n", MANY + 64);
        return;
    }
    begin(&world, *state, 16, MANY);
    uint32_t files = open_files();
    for (uint32_t i = 0; i < MANY; i++) { // 1237 and 2000 have no common divisor
        name_of(i * 1237 % MANY, name);
        ids[i * 1237 % MANY] = add(&world, name, world.small);
    }
    assert_int_equal(open_files(), files + MANY);
    assert_int_equal(adapters_count(world.rig.adapters), MANY);
    assert_int_equal(adapter_register(world.rig.adapters, "one-more", world.small, 0, &id, NULL),
                     STATUS_LIMIT);
    for (uint32_t i = 0; i < MANY; i++) {
        name_of(i, name);
        assert_true(adapter_at(world.rig.adapters, i, &info));
        assert_string_equal(info.name, name);
        assert_int_equal(info.owner, 3);
        assert_int_equal(adapter_find(world.rig.adapters, name, &id), STATUS_OK);
        assert_int_equal(id.bits, ids[i].bits);
        assert_int_equal(adapter_register(world.rig.adapters, name, world.small, 0, &id, NULL),
                         STATUS_EXISTS);
    }
    assert_false(adapter_at(world.rig.adapters, MANY, &info));
    for (uint32_t i = 0; i < MANY; i++)
        bring(&world, ids[i]);
    assert_int_equal(stats_of(&world).fetches, MANY);
    assert_int_equal(stats_of(&world).given_back, MANY - 16);
    assert_int_equal(stats_of(&world).resident, 16);
    for (uint32_t i = 0; i < MANY; i += 2) {
        name_of(i, name);
        assert_int_equal(adapter_remove(world.rig.adapters, name), STATUS_OK);
        assert_int_equal(adapter_remove(world.rig.adapters, name), STATUS_NOT_FOUND);
        assert_int_equal(adapter_find(world.rig.adapters, name, &id), STATUS_NOT_FOUND);
    }
    assert_int_equal(adapters_count(world.rig.adapters), MANY / 2);
    assert_int_equal(open_files(), files + MANY / 2);
    assert_int_equal(pool_pages(&world), 8);
    id = add(&world, "tenant-0000", world.small);
    assert_int_equal(id.bits & 0xffff, ids[MANY - 2].bits & 0xffff); // the slot freed last, and yet
    assert_int_not_equal(id.bits, ids[MANY - 2].bits);               // another registration
    tool_rig_clear(&world.rig);
    assert_int_equal(open_files(), files);
}

static void test_adapters_views_and_facts(void **state)
{
    struct world world;
    begin(&world, *state, 8, 4);
    adapter_id id = add(&world, "large", world.large);
    assert_int_equal(adapter_page_count(world.rig.adapters, id), 2);
    assert_int_equal(adapter_rank_max(world.rig.adapters, id), 64);
    assert_true(adapter_has_module(world.rig.adapters, id, LORA_Q));
    assert_false(adapter_has_module(world.rig.adapters, id, LORA_GATE));
    assert_false(adapter_is_resident(world.rig.adapters, id));
    bring(&world, id);
    const struct lora_adapter_view *view =
        &adapters_views(world.rig.adapters)[adapter_view_index(world.rig.adapters, id)];
    assert_int_equal(view->experts, 1); // no expert has LoRA
    const struct lora_pair *pair = lora_pair_at(view, 1, LORA_V, 0);
    assert_int_equal(pair->a.rank, 64);
    assert_true(pair->scale == 8.0f / 64);
    assert_int_equal(pair->a.row_bytes, 128);
    assert_int_equal(pair->b.row_bytes, 64);
    assert_int_equal(lora_pair_at(view, 1, LORA_K, 0)->a.rank, 0);
    struct adapter_info info;
    assert_true(adapter_at(world.rig.adapters, 0, &info));
    assert_true(info.resident && info.pages == 2 && info.users == 0);
    struct digest digest = adapter_digest(world.rig.adapters, id);
    assert_true(digest_equal(&digest, &info.report.digest));
    tool_rig_clear(&world.rig);
}

// What a kernel would read at the end of the last slice.
static float last_element(const struct world *world, adapter_id id)
{
    const struct lora_adapter_view *view =
        &adapters_views(world->rig.adapters)[adapter_view_index(world->rig.adapters, id)];
    const struct lora_slice *slice = &lora_pair_at(view, 1, LORA_V, 0)->b;
    return tool_element(&world->rig, &world->base, view, slice, slice->rank - 1, 31);
}

static void test_adapters_page_table_follows_the_pages(void **state)
{
    struct world world;
    begin(&world, *state, 2, 4);
    adapter_id large = add(&world, "large", world.large), small = add(&world, "small", world.small);
    bring(&world, small);
    float of_small = last_element(&world, small);
    bring(&world, large);
    float of_large = last_element(&world, large);
    assert_true(of_small < of_large || of_small > of_large);
    assert_false(adapter_is_resident(world.rig.adapters, small));
    for (int i = 0; i < 5; i++) {
        bring(&world, small);
        assert_true(last_element(&world, small) == of_small);
        // Here and given back again between two flushes.
        assert_int_equal(adapter_fetch(world.rig.adapters, large, COPY_STANDARD, COPY_ADAPTER),
                         STATUS_OK);
        for (int n = 0; n < 1000 && !adapter_is_resident(world.rig.adapters, large); n++) {
            pool_poll(world.rig.pool);
            world.rig.now_us += 100;
        }
        assert_true(adapter_is_resident(world.rig.adapters, large));
        bring(&world, small);
        assert_true(last_element(&world, small) == of_small);
        bring(&world, large);
        assert_true(last_element(&world, large) == of_large);
    }
    assert_int_equal(adapter_remove(world.rig.adapters, "large"), STATUS_OK);
    large = add(&world, "again", world.large); // other slots of the pool, perhaps
    bring(&world, large);
    assert_true(last_element(&world, large) == of_large);
    tool_rig_clear(&world.rig);
}

static void test_adapters_larger_than_the_pool(void **state)
{
    struct world world;
    struct fault fault;
    adapter_id id;
    begin(&world, *state, 1, 4);
    assert_int_equal(adapter_register(world.rig.adapters, "big", world.large, 0, &id, &fault),
                     STATUS_LIMIT);
    assert_non_null(strstr(fault.text, "adapter \"big\" needs 2 pages at once; the pool has 1"));
    assert_int_equal(adapter_register(world.rig.adapters, "a b", world.large, 0, &id, &fault),
                     STATUS_INVALID);
    assert_int_equal(adapter_register(world.rig.adapters, "none", "/nowhere", 0, &id, &fault),
                     STATUS_NOT_FOUND);
    assert_int_equal(adapters_count(world.rig.adapters), 0);
    tool_rig_clear(&world.rig);
}

// ---- pressure ----

static void test_adapters_coldest_leaves_first(void **state)
{
    struct world world;
    adapter_id ids[6];
    begin(&world, *state, 4, 8);
    for (int i = 0; i < 6; i++) {
        char name[16];
        (void)snprintf(name, sizeof name, "a%d", i);
        ids[i] = add(&world, name, world.small);
    }
    for (int i = 0; i < 4; i++) {
        for (int n = 0; n < 4 - i; n++) // a0 is the warmest, a3 the coldest
            visit(&world, ids[i]);
        bring(&world, ids[i]);
    }
    assert_int_equal(pool_pages(&world), 4);
    adapter_acquire(world.rig.adapters, ids[3]); // held: now a2 is the cheapest
    bring(&world, ids[4]);
    assert_false(adapter_is_resident(world.rig.adapters, ids[2]));
    assert_true(adapter_is_resident(world.rig.adapters, ids[3]));
    bring(&world, ids[5]); // nobody asked for a4
    assert_false(adapter_is_resident(world.rig.adapters, ids[4]));
    assert_int_equal(stats_of(&world).given_back, 2);
    assert_int_equal(stats_of(&world).fetches, 6);
    const adapter_id held[4] = {ids[0], ids[1], ids[3], ids[5]};
    for (int i = 0; i < 4; i++)
        adapter_pin(world.rig.adapters, held[i]);
    assert_int_equal(adapter_fetch(world.rig.adapters, ids[2], COPY_INTERACTIVE, COPY_GATE),
                     STATUS_FULL);
    assert_int_equal(stats_of(&world).given_back, 2);
    adapter_unpin(world.rig.adapters, ids[3]); // held, and still the only one that can go
    bring(&world, ids[2]);
    assert_false(adapter_is_resident(world.rig.adapters, ids[3]));
    for (int i = 0; i < 4; i++)
        if (i != 2)
            adapter_unpin(world.rig.adapters, held[i]);
    adapter_release(world.rig.adapters, ids[3]);
    assert_int_equal(stats_of(&world).resident, 4);
    assert_int_equal(stats_of(&world).resident_pages, 4);
    tool_rig_clear(&world.rig);
}

// A host copy stays when the device pages go: coming back reads no file.
static void test_adapters_kept_stays_under_pressure(void **state)
{
    struct world world;
    struct fault fault = {.text = ""};
    char name[32];
    adapter_id ids[12];
    begin(&world, *state, 8, 12);
    struct adapters *adapters = world.rig.adapters;
    for (uint32_t i = 0; i < 12; i++) {
        name_of(i, name);
        ids[i] = add(&world, name, world.small);
    }
    assert_int_equal(adapter_keeper(adapters, ids[0], 0), ADAPTER_NO_KEEPER);
    assert_int_equal(adapter_keep(adapters, ids[0], 5), STATUS_OK);
    assert_int_equal(adapter_keep(adapters, ids[1], 6), STATUS_OK);
    assert_int_equal(adapters_kept_pages(adapters), 2); // before they are there
    assert_int_equal(adapters_kept_pages_of(adapters, 5), 1);
    assert_false(adapter_is_resident(adapters, ids[0]));
    adapters_fetch_kept(adapters);
    adapters_fetch_kept(adapters);
    tool_rig_settle(&world.rig);
    assert_int_equal(stats_of(&world).fetches, 2);
    assert_int_equal(adapter_unload(adapters, ids[0], &fault), STATUS_BUSY);
    assert_non_null(strstr(fault.text, "pinned"));
    for (uint32_t round = 0; round < 3; round++)
        for (uint32_t i = 2; i < 12; i++)
            bring(&world, ids[i]); // ten that want six pages
    assert_true(adapter_is_resident(adapters, ids[0]) && adapter_is_resident(adapters, ids[1]));
    assert_int_equal(stats_of(&world).kept, 2);
    assert_int_equal(stats_of(&world).resident, 8);
    assert_int_equal(stats_of(&world).fetches, stats_of(&world).given_back + 8);
    assert_true(stats_of(&world).given_back >= 10);
    // let go, removed and replaced: as any other
    adapter_let_go(adapters, ids[0], 5);
    adapter_let_go(adapters, ids[0], 5);
    assert_int_equal(adapters_kept_pages(adapters), 1);
    assert_int_equal(adapter_replace(adapters, "tenant-0001", world.small, 3, &ids[1], &fault),
                     STATUS_LIMIT); // twelve slots, all taken
    assert_int_equal(adapter_remove(adapters, "tenant-0011"), STATUS_OK);
    assert_int_equal(adapter_replace(adapters, "tenant-0001", world.small, 3, &ids[1], &fault),
                     STATUS_OK);
    assert_int_equal(adapters_kept_pages(adapters), 0);
    assert_int_equal(adapter_keeper(adapters, ids[1], 0), ADAPTER_NO_KEEPER);
    for (uint32_t i = 2; i < 11; i++) {
        visit(&world, ids[i]);
        bring(&world, ids[i]);
    }
    assert_false(adapter_is_resident(adapters, ids[0])); // nobody asked for it
    assert_int_equal(adapter_keep(adapters, ids[2], 5), STATUS_OK);
    assert_int_equal(adapter_remove(adapters, "tenant-0002"), STATUS_OK);
    assert_int_equal(adapters_kept_pages(adapters), 0);
    tool_rig_clear(&world.rig);
}

// Each tenant has a claim of its own: one that unpins takes nothing from another.
static void test_adapters_kept_by_several(void **state)
{
    struct world world;
    struct fault fault;
    begin(&world, *state, 8, 2);
    struct adapters *adapters = world.rig.adapters;
    adapter_id id = add(&world, "x", world.small), other = add(&world, "y", world.small);
    assert_int_equal(adapter_keep(adapters, id, 5), STATUS_OK);
    assert_int_equal(adapter_keep(adapters, id, 6), STATUS_OK);
    assert_int_equal(adapter_keep(adapters, id, 6), STATUS_OK); // once is enough
    assert_int_equal(adapters_kept_pages(adapters), 1);
    assert_int_equal(adapters_kept_pages_of(adapters, 5), 1);
    assert_int_equal(adapters_kept_pages_of(adapters, 6), 1);
    assert_true(adapter_keeper(adapters, id, 0) == 5 && adapter_keeper(adapters, id, 1) == 6);
    assert_int_equal(adapter_keeper(adapters, id, 2), ADAPTER_NO_KEEPER);
    adapter_let_go(adapters, id, 7); // has no claim
    adapter_let_go(adapters, id, 5);
    assert_true(adapter_is_kept(adapters, id) && adapter_is_kept_by(adapters, id, 6));
    assert_false(adapter_is_kept_by(adapters, id, 5));
    assert_int_equal(adapters_kept_pages(adapters), 1);
    adapters_fetch_kept(adapters);
    tool_rig_settle(&world.rig);
    assert_int_equal(adapter_unload(adapters, id, &fault), STATUS_BUSY);
    adapter_let_go(adapters, id, 6);
    assert_int_equal(adapters_kept_pages(adapters), 0);
    assert_int_equal(adapter_unload(adapters, id, &fault), STATUS_OK);
    for (uint32_t keeper = 0; keeper < 8; keeper++) // two places, four claims for each
        assert_int_equal(adapter_keep(adapters, keeper % 2 ? id : other, keeper), STATUS_OK);
    assert_int_equal(adapter_keep(adapters, id, 8), STATUS_LIMIT);
    assert_int_equal(adapter_remove(adapters, "y"), STATUS_OK); // and the claims on it
    assert_int_equal(adapter_keep(adapters, id, 8), STATUS_OK);
    assert_int_equal(adapters_kept_pages(adapters), 1);
    tool_rig_clear(&world.rig);
}

static void test_adapters_load_and_unload(void **state)
{
    struct world world;
    struct fault fault;
    begin(&world, *state, 8, 2);
    struct adapters *adapters = world.rig.adapters;
    adapter_id id = add(&world, "x", world.large);
    assert_int_equal(adapter_unload(adapters, id, &fault), STATUS_OK); // it is not there
    assert_int_equal(adapter_load(adapters, id), STATUS_OK);
    assert_int_equal(adapter_unload(adapters, id, &fault), STATUS_BUSY); // on its way
    tool_rig_settle(&world.rig);
    assert_int_equal(adapter_load(adapters, id), STATUS_OK);
    assert_true(adapter_is_resident(adapters, id));
    assert_int_equal(stats_of(&world).fetches, 1);
    adapter_acquire(adapters, id);
    assert_int_equal(adapter_unload(adapters, id, &fault), STATUS_BUSY);
    assert_non_null(strstr(fault.text, "is in use"));
    adapter_release(adapters, id);
    adapter_pin(adapters, id);
    assert_int_equal(adapter_unload(adapters, id, &fault), STATUS_BUSY);
    adapter_unpin(adapters, id);
    assert_int_equal(adapter_unload(adapters, id, &fault), STATUS_OK);
    assert_false(adapter_is_resident(adapters, id));
    assert_int_equal(pool_pages(&world), 0);
    bring(&world, id);
    tool_rig_clear(&world.rig);
}

// A read that fails is not tried again at every turn.
static void test_adapters_kept_that_cannot_be_read(void **state)
{
    struct world world;
    char path[TOOL_PATH + 64];
    begin(&world, *state, 8, 2);
    struct adapters *adapters = world.rig.adapters;
    (void)snprintf(path, sizeof path, "%s/cut.adapter", world.scratch);
    store_make(&world, 4, path, 1);
    adapter_id id = add(&world, "x", path);
    assert_int_equal(truncate(path, PAGE), 0);
    assert_int_equal(adapter_keep(adapters, id, 5), STATUS_OK);
    for (int turn = 0; turn < 10; turn++) {
        adapters_fetch_kept(adapters);
        tool_rig_settle(&world.rig);
    }
    assert_int_equal(stats_of(&world).fetches, 1);
    assert_int_equal(adapter_fetch_status(adapters, id), STATUS_IO);
    tool_rig_clear(&world.rig);
}

static void test_adapters_comes_back_from_the_host_tier(void **state)
{
    struct world world;
    struct copy_stats before, after;
    begin(&world, *state, 2, 4);
    adapter_id a = add(&world, "a", world.large), b = add(&world, "b", world.large);
    bring(&world, a);
    bring(&world, b);
    copy_stats(world.rig.copies, &before);
    bring(&world, a);
    copy_stats(world.rig.copies, &after);
    assert_int_equal(before.bytes[COPY_READ], 4 * PAGE);
    assert_int_equal(after.bytes[COPY_READ], 4 * PAGE);
    assert_int_equal(after.bytes[COPY_H2D], 6 * PAGE);
    tool_rig_clear(&world.rig);
}

// ---- removal ----

static void test_adapters_removed_while_in_use(void **state)
{
    struct world world;
    adapter_id found;
    begin(&world, *state, 8, 2);
    uint32_t files = open_files();
    adapter_id old = add(&world, "x", world.large);
    adapter_acquire(world.rig.adapters, old);
    adapter_acquire(world.rig.adapters, old);
    bring(&world, old);
    adapter_pin(world.rig.adapters, old);
    assert_int_equal(adapter_remove(world.rig.adapters, "x"), STATUS_OK);
    assert_int_equal(adapter_find(world.rig.adapters, "x", &found), STATUS_NOT_FOUND);
    adapter_id new = add(&world, "x", world.small); // the name is free at once
    assert_int_not_equal(old.bits, new.bits);
    assert_int_equal(adapter_page_count(world.rig.adapters, new), 1);
    assert_int_equal(adapter_page_count(world.rig.adapters, old), 2);
    assert_true(adapter_is_resident(world.rig.adapters, old));
    assert_int_equal(stats_of(&world).leaving, 1);
    adapter_release(world.rig.adapters, old);
    adapter_release(world.rig.adapters, old);
    assert_int_equal(stats_of(&world).leaving, 1); // a submitted segment still reads it
    assert_int_equal(pool_pages(&world), 2);
    adapter_unpin(world.rig.adapters, old);
    assert_int_equal(stats_of(&world).leaving, 0);
    assert_int_equal(pool_pages(&world), 0);
    assert_int_equal(open_files(), files + 1);
    tool_rig_clear(&world.rig);
}

static void test_adapters_replaced_while_in_use(void **state)
{
    struct world world;
    struct fault fault;
    adapter_id found, new;
    begin(&world, *state, 8, 2);
    uint32_t files = open_files();
    adapter_id old = add(&world, "x", world.large);
    adapter_acquire(world.rig.adapters, old);
    bring(&world, old);
    assert_int_equal(adapter_replace(world.rig.adapters, "x", world.small, 7, &new, &fault),
                     STATUS_OK);
    assert_int_equal(adapter_find(world.rig.adapters, "x", &found), STATUS_OK);
    assert_int_equal(found.bits, new.bits);
    assert_int_not_equal(old.bits, new.bits);
    assert_int_equal(adapter_owner(world.rig.adapters, new), 3); // a name stays whose it is
    assert_true(adapter_is_resident(world.rig.adapters, old));
    assert_int_equal(adapter_page_count(world.rig.adapters, old), 2);
    assert_int_equal(adapter_page_count(world.rig.adapters, new), 1);
    assert_int_equal(adapters_count(world.rig.adapters), 1);
    assert_int_equal(stats_of(&world).leaving, 1);
    // both slots are taken; what fails changes nothing
    assert_int_equal(adapter_replace(world.rig.adapters, "x", world.large, 7, &found, &fault),
                     STATUS_LIMIT);
    assert_int_equal(adapter_find(world.rig.adapters, "x", &found), STATUS_OK);
    assert_int_equal(found.bits, new.bits);
    adapter_release(world.rig.adapters, old);
    assert_int_equal(stats_of(&world).leaving, 0);
    assert_int_equal(pool_pages(&world), 0);
    assert_int_equal(open_files(), files + 1);
    adapters_limit_rank(world.rig.adapters, 63);
    assert_int_equal(adapter_replace(world.rig.adapters, "x", world.large, 3, &found, &fault),
                     STATUS_LIMIT);
    assert_non_null(strstr(fault.text, "rank 64"));
    assert_int_equal(adapter_replace(world.rig.adapters, "x", "/nowhere", 3, &found, &fault),
                     STATUS_NOT_FOUND);
    assert_int_equal(adapter_find(world.rig.adapters, "x", &found), STATUS_OK);
    assert_int_equal(found.bits, new.bits);
    assert_int_equal(adapter_replace(world.rig.adapters, "y", world.small, 7, &found, &fault),
                     STATUS_OK); // of a free name it is the first
    assert_int_equal(adapter_owner(world.rig.adapters, found), 7);
    assert_int_equal(open_files(), files + 2);
    tool_rig_clear(&world.rig);
}

static void test_adapters_removed_while_it_is_read(void **state)
{
    struct world world;
    begin(&world, *state, 8, 2);
    uint32_t files = open_files();
    adapter_id id = add(&world, "x", world.large);
    world.rig.link.held[COPY_READ] = true;
    assert_int_equal(adapter_fetch(world.rig.adapters, id, COPY_BATCH, COPY_PREFETCH), STATUS_OK);
    pool_poll(world.rig.pool);
    assert_int_equal(adapter_remove(world.rig.adapters, "x"), STATUS_OK);
    assert_int_equal(open_files(), files + 1); // the link still reads from it
    world.rig.link.held[COPY_READ] = false;
    tool_rig_settle(&world.rig);
    id = add(&world, "x", world.small);
    assert_int_equal(open_files(), files + 1);
    bring(&world, id);
    assert_int_equal(adapter_remove(world.rig.adapters, "x"), STATUS_OK);
    id = add(&world, "y", world.large);
    assert_int_equal(adapter_fetch(world.rig.adapters, id, COPY_BATCH, COPY_PREFETCH), STATUS_OK);
    pool_poll(world.rig.pool);
    tool_rig_clear(&world.rig); // destroyed while it is read
    assert_int_equal(open_files(), files);
}

// Hits and misses at admission, loads and how long they took; a failed one is none.
static void test_adapters_count_loads(void **state)
{
    struct world world;
    struct adapter_info info;
    begin(&world, *state, 8, 2);
    adapter_id id = add(&world, "x", world.large);
    visit(&world, id);
    world.rig.link.held[COPY_READ] = true;
    assert_int_equal(adapter_fetch(world.rig.adapters, id, COPY_STANDARD, COPY_ADAPTER), STATUS_OK);
    pool_poll(world.rig.pool);
    world.rig.now_us += 700;
    world.rig.link.held[COPY_READ] = false;
    uint64_t asked = world.rig.now_us - 700;
    tool_rig_settle(&world.rig);
    uint64_t took = world.rig.now_us - asked;
    visit(&world, id);
    visit(&world, id);
    assert_true(adapter_at(world.rig.adapters, 0, &info));
    assert_int_equal(info.loads.hits, 2);
    assert_int_equal(info.loads.misses, 1);
    assert_int_equal(info.loads.loads, 1);
    assert_in_range(info.loads.load_us, 700, took);
    assert_int_equal(info.loads.load_us_max, info.loads.load_us);
    world.rig.link.fail_at = world.rig.link.chunks + 1;
    id = add(&world, "y", world.small);
    assert_int_equal(adapter_fetch(world.rig.adapters, id, COPY_STANDARD, COPY_ADAPTER), STATUS_OK);
    tool_rig_settle(&world.rig);
    assert_true(adapter_at(world.rig.adapters, 1, &info));
    assert_int_equal(info.loads.loads, 0);
    assert_int_equal(adapter_remove(world.rig.adapters, "x"), STATUS_OK);
    assert_int_equal(stats_of(&world).loads.hits, 2); // also of those that went
    assert_int_equal(stats_of(&world).loads.loads, 1);
    tool_rig_clear(&world.rig);
}

// ---- trouble ----

static void test_adapters_every_copy_fails_once(void **state)
{
    struct world world;
    for (uint64_t n = 1; n <= 4; n++) { // 2 reads and 2 copies
        begin(&world, *state, 4, 2);
        adapter_id id = add(&world, "x", world.large);
        adapter_acquire(world.rig.adapters, id);
        world.rig.link.fail_at = n;
        assert_int_equal(adapter_fetch(world.rig.adapters, id, COPY_STANDARD, COPY_ADAPTER),
                         STATUS_OK);
        tool_rig_settle(&world.rig);
        assert_int_equal(world.rig.link.failed, 1);
        assert_false(adapter_is_resident(world.rig.adapters, id));
        assert_int_equal(adapter_fetch_status(world.rig.adapters, id), STATUS_IO);
        assert_int_equal(pool_pages(&world), 0);
        assert_int_equal(stats_of(&world).resident + stats_of(&world).fetching, 0);
        adapter_release(world.rig.adapters, id);
        adapter_acquire(world.rig.adapters, id); // a new request is not blamed for the old failure
        assert_int_equal(adapter_fetch_status(world.rig.adapters, id), STATUS_OK);
        bring(&world, id);
        adapter_release(world.rig.adapters, id);
        tool_rig_clear(&world.rig);
    }
}

static void test_adapters_file_cut_short_while_serving(void **state)
{
    struct world world;
    char path[TOOL_PATH + 64];
    size_t count;
    begin(&world, *state, 4, 2);
    (void)snprintf(path, sizeof path, "%s/cut.adapter", world.scratch);
    void *bytes = tool_file_read(world.large, &count);
    tool_file_write(path, bytes, count);
    free(bytes);
    adapter_id id = add(&world, "x", path);
    assert_int_equal(truncate(path, (off_t)count - PAGE), 0);
    assert_int_equal(adapter_fetch(world.rig.adapters, id, COPY_STANDARD, COPY_ADAPTER), STATUS_OK);
    tool_rig_settle(&world.rig);
    assert_int_equal(adapter_fetch_status(world.rig.adapters, id), STATUS_IO);
    assert_false(adapter_is_resident(world.rig.adapters, id));
    assert_int_equal(pool_pages(&world), 0);
    adapter_id other = add(&world, "y", world.small); // others are not touched
    bring(&world, other);
    tool_rig_clear(&world.rig);
}

static int setup(void **state)
{
    *state = tool_scratch();
    return 0;
}

static int teardown(void **state)
{
    tool_scratch_remove(*state);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_adapters_price),
        cmocka_unit_test(test_adapters_two_thousand),
        cmocka_unit_test(test_adapters_views_and_facts),
        cmocka_unit_test(test_adapters_page_table_follows_the_pages),
        cmocka_unit_test(test_adapters_larger_than_the_pool),
        cmocka_unit_test(test_adapters_coldest_leaves_first),
        cmocka_unit_test(test_adapters_kept_stays_under_pressure),
        cmocka_unit_test(test_adapters_load_and_unload),
        cmocka_unit_test(test_adapters_kept_that_cannot_be_read),
        cmocka_unit_test(test_adapters_kept_by_several),
        cmocka_unit_test(test_adapters_comes_back_from_the_host_tier),
        cmocka_unit_test(test_adapters_removed_while_in_use),
        cmocka_unit_test(test_adapters_replaced_while_in_use),
        cmocka_unit_test(test_adapters_removed_while_it_is_read),
        cmocka_unit_test(test_adapters_count_loads),
        cmocka_unit_test(test_adapters_every_copy_fails_once),
        cmocka_unit_test(test_adapters_file_cut_short_while_serving),
    };
    return cmocka_run_group_tests_name("adapters_pool", tests, setup, teardown);
}
