// SPDX-License-Identifier: Apache-2.0
// Parts: pages of expert LoRA that come and go one by one, in a real pool over a fake link. Which
// pages a gate brings, what the page table says, who goes under pressure, reads that fail.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tests/test_adapters_tool.h"

enum { PAGE = 32768, RANK = 256, MOE = 1 };

struct world {
    struct adapter_base base;
    char store[TOOL_PATH + 64];
    struct tool_rig rig;
};

static void store_make(struct world *world, const char *scratch)
{
    struct tool_adapter adapter;
    struct adapter_report report;
    static const char *const names[] = {"gate_proj", "up_proj", "down_proj"};
    char module[80];
    tool_adapter_begin(&adapter, scratch);
    adapter.count = 0;
    (void)snprintf(adapter.config, sizeof adapter.config,
                   "{\"peft_type\": \"LORA\", \"r\": %d, \"lora_alpha\": 8, \"target_modules\": "
                   "[\"q_proj\", \"gate_proj\", \"up_proj\", \"down_proj\"]}",
                   RANK);
    for (int layer = 0; layer < 2; layer++) {
        (void)snprintf(module, sizeof module, "layers.%d.self_attn.q_proj", layer);
        tool_pair_add(&adapter, module, RANK, 64, 64);
        for (int e = 0; e < (layer ? 4 : 1); e++)
            for (int m = 0; m < 3; m++) {
                char expert[16] = "";
                uint64_t units = layer ? 24 : 96;
                if (layer)
                    (void)snprintf(expert, sizeof expert, "experts.%d.", e);
                (void)snprintf(module, sizeof module, "layers.%d.mlp.%s%s", layer, expert,
                               names[m]);
                tool_pair_add(&adapter, module, RANK, m == 2 ? units : 64, m == 2 ? 64 : units);
            }
    }
    tool_adapter_write(&adapter);
    assert_int_equal(
        adapter_convert(adapter.directory, &world->base, PAGE, world->store, &report, NULL),
        STATUS_OK);
}

static void begin(struct world *world, const char *scratch, uint32_t device_pages)
{
    world->base = tool_base(DTYPE_BF16);
    (void)snprintf(world->store, sizeof world->store, "%s/parts.adapter", scratch);
    if (access(world->store, F_OK) != 0)
        store_make(world, scratch);
    tool_rig_make(&world->rig, &world->base, PAGE, device_pages, 64, 4);
}

static adapter_id add(struct world *world, const char *name)
{
    adapter_id id;
    struct fault fault = {.text = ""};
    if (adapter_register(world->rig.adapters, name, world->store, 3, &id, &fault))
        fail_msg("%s: %s", name, fault.text);
    return id;
}

static const struct lora_adapter_view *view_of(const struct world *world, adapter_id id)
{
    return &adapters_views(world->rig.adapters)[adapter_view_index(world->rig.adapters, id)];
}

static struct lora_part part_of(const struct world *world, adapter_id id, uint32_t expert)
{
    return view_of(world, id)->parts[MOE * 4 + expert];
}

// Of the pages of a part those that the page table names.
static uint32_t shown(const struct world *world, adapter_id id, uint32_t expert)
{
    struct lora_part part = part_of(world, id, expert);
    uint32_t count = 0;
    for (uint32_t i = 0; i < part.count; i++)
        count += view_of(world, id)->pages[part.first + i] != PAGE_NONE;
    return count;
}

static enum status gate(struct world *world, adapter_id id, uint32_t expert, uint32_t *started)
{
    struct adapters *adapters = world->rig.adapters;
    *started = 0;
    return adapters_gate_bring(adapters, adapter_view_index(adapters, id), MOE, expert,
                               COPY_STANDARD, started);
}

static void gate_through(struct world *world, adapter_id id, uint32_t expert)
{
    uint32_t started;
    enum status status;
    assert_int_equal(gate(world, id, expert, &started), STATUS_OK);
    tool_rig_settle(&world->rig);
    assert_true(adapters_gate_ready(world->rig.adapters, &status));
    assert_int_equal(status, STATUS_OK);
    tool_rig_settle(&world->rig);
    adapters_gate_done(world->rig.adapters);
}

static void trunk_bring(struct world *world, adapter_id id)
{
    assert_int_equal(adapter_fetch(world->rig.adapters, id, COPY_STANDARD, COPY_ADAPTER),
                     STATUS_OK);
    tool_rig_settle(&world->rig);
    assert_true(adapter_is_resident(world->rig.adapters, id));
}

static void test_adapters_parts_come_expert_by_expert(void **state)
{
    struct world world;
    struct adapter_info info;
    struct adapters_stats stats;
    enum status status;
    uint32_t started;
    begin(&world, *state, 64);
    adapter_id id = add(&world, "x");
    struct adapters *adapters = world.rig.adapters;
    struct lora_part part = part_of(&world, id, 2);
    assert_true(adapter_has_parts(adapters, id) && part.count >= 4);
    assert_true(adapter_page_count(adapters, id) < adapter_pages_whole(adapters, id));
    assert_int_equal(part_of(&world, id, 0).first + 0u,
                     adapter_page_count(adapters, id) - part.count); // right behind the trunk
    trunk_bring(&world, id);
    assert_false(adapter_is_whole(adapters, id));
    for (uint32_t e = 0; e < 4; e++)
        assert_int_equal(shown(&world, id, e), 0);
    assert_int_equal(gate(&world, id, 2, &started), STATUS_OK);
    assert_int_equal(started, part.count);
    assert_false(adapters_gate_ready(adapters, &status));
    tool_rig_settle(&world.rig);
    assert_true(adapters_gate_ready(adapters, &status));
    tool_rig_settle(&world.rig);
    assert_int_equal(shown(&world, id, 2), part.count);
    assert_int_equal(shown(&world, id, 0), 0);
    assert_int_equal(gate(&world, id, 2, &started), STATUS_OK); // there already
    assert_int_equal(started, 0);
    adapters_gate_done(adapters);
    assert_true(adapter_at(adapters, 0, &info));
    assert_int_equal(info.device_pages, info.trunk_pages + part.count);
    assert_int_equal(info.host_pages, info.trunk_pages + part.count); // what came stays there
    assert_int_equal(info.loads.part_misses, part.count);
    tool_rig_bring(&world.rig, id);
    adapters_stats(adapters, &stats);
    assert_int_equal(stats.resident_pages, adapter_pages_whole(adapters, id));
    for (uint32_t e = 0; e < 4; e++)
        assert_int_equal(shown(&world, id, e), part_of(&world, id, e).count);
    tool_rig_clear(&world.rig);
}

// What kernels have marked as used stays, the rest goes; what is held never goes.
static void test_adapters_parts_unused_for_longest_go_first(void **state)
{
    struct world world;
    struct segment_result result;
    struct pool_stats pool;
    uint32_t started;
    begin(&world, *state, 40);
    struct adapters *adapters = world.rig.adapters;
    adapter_id id = add(&world, "x");
    adapter_acquire(adapters, id);
    tool_rig_bring(&world.rig, id);
    adapter_pin(adapters, id);
    struct lora_part used = part_of(&world, id, 1), held = part_of(&world, id, 3);
    for (uint32_t i = 0; i < used.count; i++)
        adapters_page_used(adapters)[view_of(&world, id)->pages[used.first + i]] = 1;
    adapters_step(adapters);
    adapters_record_used(adapters, world.rig.stream);
    assert_int_equal(world.rig.device->table->submit(world.rig.stream), STATUS_OK);
    assert_int_equal(world.rig.device->table->wait(world.rig.stream, &result), STATUS_OK);
    adapters_take_used(adapters);
    for (uint32_t i = 0; i < 40; i++)
        assert_int_equal(adapters_page_used(adapters)[i], 0);
    assert_int_equal(gate(&world, id, 3, &started), STATUS_OK);
    pool_stats(world.rig.pool, &pool);
    // All but the trunk, the used ones and the held ones; neighbours may share a page.
    uint32_t most =
        adapter_pages_whole(adapters, id) - part_of(&world, id, 0).first - used.count - held.count;
    assert_int_equal(pool_make_room(world.rig.pool, pool.device_free + most), STATUS_OK);
    tool_rig_settle(&world.rig);
    assert_int_equal(shown(&world, id, 1), used.count);
    assert_int_equal(shown(&world, id, 3), held.count);
    assert_true(shown(&world, id, 0) <= 1 && shown(&world, id, 2) <= 2);
    assert_int_equal(pool_make_room(world.rig.pool, 40), STATUS_FULL);
    adapters_gate_done(adapters);
    adapter_unpin(adapters, id);
    assert_int_equal(pool_make_room(world.rig.pool, 40), STATUS_OK);
    adapter_release(adapters, id);
    tool_rig_settle(&world.rig);
    for (uint32_t e = 0; e < 4; e++)
        assert_int_equal(shown(&world, id, e), 0);
    tool_rig_clear(&world.rig);
}

// Ahead of need it takes what idle adapters have, not what running ones have used a moment ago.
static void test_adapters_parts_ahead_of_need_leave_running_ones_alone(void **state)
{
    struct world world;
    uint32_t next = 0;
    begin(&world, *state, 36);
    struct adapters *adapters = world.rig.adapters;
    adapter_id a = add(&world, "a"), b = add(&world, "b");
    uint32_t whole = adapter_pages_whole(adapters, a);
    assert_true(whole <= 36 && 2 * whole > 36);
    adapter_acquire(adapters, a);
    adapter_acquire(adapters, b);
    tool_rig_bring(&world.rig, a);
    trunk_bring(&world, b);
    struct adapters_stats before, after;
    adapters_stats(adapters, &before);
    assert_true(
        adapter_fetch_parts(adapters, b, COPY_STANDARD, 1, &next)); // as far as there is room
    tool_rig_settle(&world.rig);
    adapters_stats(adapters, &after);
    assert_int_equal(after.parts_given_back, before.parts_given_back);
    assert_false(adapter_is_whole(adapters, b));
    adapter_release(adapters, a);
    for (int i = 0; i < 100; i++)
        adapters_step(adapters);
    world.rig.now_us += 3600u * 1000000u;
    next = 0;
    assert_true(adapter_fetch_parts(adapters, b, COPY_STANDARD, 1, &next));
    tool_rig_settle(&world.rig);
    assert_true(adapter_is_whole(adapters, b) && !adapter_is_whole(adapters, a));
    adapter_release(adapters, b);
    tool_rig_clear(&world.rig);
}

// The gate goes on; whoever uses the adapter has to be ended, and the next one tries again.
static void test_adapters_parts_that_cannot_be_read_break_their_adapter_alone(void **state)
{
    struct world world;
    enum status status;
    uint32_t started;
    begin(&world, *state, 64);
    struct adapters *adapters = world.rig.adapters;
    adapter_id bad = add(&world, "bad"), good = add(&world, "good");
    adapter_acquire(adapters, bad);
    adapter_acquire(adapters, good);
    trunk_bring(&world, bad);
    trunk_bring(&world, good);
    adapter_pin(adapters, bad);
    world.rig.link.fail_at = world.rig.link.chunks + 2;
    assert_int_equal(gate(&world, bad, 0, &started), STATUS_OK);
    assert_int_equal(gate(&world, good, 1, &started), STATUS_OK);
    for (int i = 0; i < 10000 && !adapters_gate_ready(adapters, &status); i++)
        world.rig.now_us += 100;
    assert_int_equal(status, STATUS_OK);
    assert_true(adapter_is_broken(adapters, bad) && !adapter_is_broken(adapters, good));
    tool_rig_settle(&world.rig);
    assert_true(adapters_view_is_broken(adapters, adapter_view_index(adapters, bad)));
    assert_int_equal(adapter_parts_status(adapters, bad), STATUS_IO);
    assert_int_equal(shown(&world, bad, 0), part_of(&world, bad, 0).count - 1);
    assert_int_equal(shown(&world, good, 1), part_of(&world, good, 1).count);
    adapters_gate_done(adapters);
    adapter_unpin(adapters, bad);
    adapter_release(adapters, bad);
    assert_false(adapter_is_broken(adapters, bad));
    tool_rig_settle(&world.rig);
    adapter_acquire(adapters, bad);
    gate_through(&world, bad, 0);
    assert_false(adapter_is_broken(adapters, bad));
    adapter_release(adapters, bad);
    tool_rig_bring(&world.rig, bad); // asked from the start: what failed once is forgotten
    assert_int_equal(adapter_parts_status(adapters, bad), STATUS_OK);
    assert_int_equal(shown(&world, bad, 0), part_of(&world, bad, 0).count);
    assert_int_equal(adapter_fetch_status(adapters, good), STATUS_OK);
    adapter_release(adapters, good);
    tool_rig_clear(&world.rig);
}

// Its pages and its place are free when its copies have ended, whatever was on its way.
static void test_adapters_parts_removed_on_their_way(void **state)
{
    struct world world;
    struct pool_stats pool;
    uint32_t next = 0;
    begin(&world, *state, 64);
    struct adapters *adapters = world.rig.adapters;
    for (int round = 0; round < 12; round++) {
        adapter_id id = add(&world, "x");
        next = 0;
        trunk_bring(&world, id);
        (void)adapter_fetch_parts(adapters, id, COPY_STANDARD, INFINITY, &next);
        for (int i = 0; i < round; i++) {
            pool_poll(world.rig.pool);
            world.rig.now_us += 100;
        }
        assert_int_equal(adapter_remove(adapters, "x"), STATUS_OK);
        tool_rig_settle(&world.rig);
        pool_stats(world.rig.pool, &pool);
        assert_int_equal(pool.device_free, 64);
        assert_int_equal(adapter_parts_coming(adapters, add(&world, "y")), 0);
        assert_int_equal(adapter_remove(adapters, "y"), STATUS_OK);
    }
    tool_rig_clear(&world.rig);
}

static void test_adapters_parts_pinned_and_unloaded(void **state)
{
    struct world world;
    struct fault fault;
    struct pool_stats pool;
    begin(&world, *state, 64);
    struct adapters *adapters = world.rig.adapters;
    adapter_id id = add(&world, "x");
    assert_int_equal(adapter_keep(adapters, id, 5), STATUS_OK);
    for (int i = 0; i < 4; i++) {
        adapters_fetch_kept(adapters);
        tool_rig_settle(&world.rig);
    }
    assert_true(adapter_is_whole(adapters, id) && adapter_is_resident(adapters, id));
    pool_stats(world.rig.pool, &pool);
    assert_int_equal(pool_make_room(world.rig.pool, pool.device_free + 1), STATUS_FULL);
    adapter_let_go(adapters, id, 5);
    assert_int_equal(pool_make_room(world.rig.pool, pool.device_free + 1), STATUS_OK);
    assert_int_equal(adapter_unload(adapters, id, &fault), STATUS_OK);
    tool_rig_settle(&world.rig);
    pool_stats(world.rig.pool, &pool);
    assert_int_equal(pool.device_free, 64);
    assert_int_equal(shown(&world, id, 3), 0);
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
        cmocka_unit_test(test_adapters_parts_come_expert_by_expert),
        cmocka_unit_test(test_adapters_parts_unused_for_longest_go_first),
        cmocka_unit_test(test_adapters_parts_ahead_of_need_leave_running_ones_alone),
        cmocka_unit_test(test_adapters_parts_that_cannot_be_read_break_their_adapter_alone),
        cmocka_unit_test(test_adapters_parts_removed_on_their_way),
        cmocka_unit_test(test_adapters_parts_pinned_and_unloaded),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
