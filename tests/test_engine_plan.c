// SPDX-License-Identifier: Apache-2.0
// The step plan is a pure function: exact plans for exact candidates.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <string.h>

#include "runtime/engine/plan.h"

static struct plan_candidate candidate(uint32_t slot, uint32_t class, uint64_t arrival,
                                       uint32_t position, uint32_t pending)
{
    return (struct plan_candidate){.slot = slot,
                                   .class = class,
                                   .arrival = arrival,
                                   .tenant = slot % 2,
                                   .position = position,
                                   .pending = pending,
                                   .adapter = PLAN_NO_ADAPTER};
}

static const struct plan_limits WIDE = {
    .rows_max = 100, .runs_max = 8, .class_below = 3, .less_urgent_prefill_max = 25};

static void assert_run(const struct plan_run *run, uint32_t slot, uint32_t position, uint32_t count,
                       bool samples)
{
    assert_int_equal(run->slot, slot);
    assert_int_equal(run->position, position);
    assert_int_equal(run->count, count);
    assert_int_equal(run->samples, samples);
}

static void test_engine_plan_nothing(void **state)
{
    (void)state;
    struct plan_candidate none[1];
    struct plan_run out[8];
    assert_int_equal(plan_choose(none, 0, &WIDE, out), 0);
    none[0] = candidate(0, 0, 0, 4, 0); // all of its tokens are computed
    assert_int_equal(plan_choose(none, 1, &WIDE, out), 0);
    none[0] = candidate(0, 2, 0, 0, 5);
    struct plan_limits limits = WIDE;
    limits.class_below = 2; // a batch step is paused
    assert_int_equal(plan_choose(none, 1, &limits, out), 0);
}

static void test_engine_plan_decodes_first(void **state)
{
    (void)state;
    struct plan_candidate c[] = {candidate(0, 1, 0, 0, 40), candidate(1, 1, 1, 17, 1),
                                 candidate(2, 1, 2, 0, 90), candidate(3, 1, 3, 30, 1)};
    struct plan_run out[8];
    assert_int_equal(plan_choose(c, 4, &WIDE, out), 4);
    assert_run(&out[0], 1, 17, 1, true);
    assert_run(&out[1], 3, 30, 1, true);
    assert_run(&out[2], 0, 0, 40, true);
    assert_run(&out[3], 2, 0, 58, false); // 100 - 1 - 1 - 40
}

static void test_engine_plan_orders_by_class_then_arrival(void **state)
{
    (void)state;
    struct plan_candidate c[] = {candidate(0, 2, 0, 9, 1), candidate(1, 0, 5, 9, 1),
                                 candidate(2, 0, 4, 9, 1), candidate(3, 1, 1, 9, 1)};
    struct plan_run out[8];
    struct plan_limits limits = WIDE;
    limits.rows_max = 3;
    assert_int_equal(plan_choose(c, 4, &limits, out), 3);
    assert_int_equal(out[0].slot, 2);
    assert_int_equal(out[1].slot, 1);
    assert_int_equal(out[2].slot, 3);
    limits.rows_max = 100;
    limits.runs_max = 2;
    assert_int_equal(plan_choose(c, 4, &limits, out), 2);
    limits.runs_max = 8;
    limits.class_below = 1;
    assert_int_equal(plan_choose(c, 4, &limits, out), 2);
    assert_int_equal(out[1].slot, 1);
}

static void test_engine_plan_bounds_less_urgent_prefill(void **state)
{
    (void)state;
    // The step is interactive: batch prefill together gets 25 rows, in order.
    struct plan_candidate c[] = {candidate(0, 0, 9, 5, 1), candidate(1, 2, 0, 0, 20),
                                 candidate(2, 2, 1, 0, 50), candidate(3, 2, 2, 0, 50)};
    struct plan_run out[8];
    assert_int_equal(plan_choose(c, 4, &WIDE, out), 3);
    assert_run(&out[0], 0, 5, 1, true);
    assert_run(&out[1], 1, 0, 20, true);
    assert_run(&out[2], 2, 0, 5, false);
    // The same work alone is not bounded.
    assert_int_equal(plan_choose(c + 1, 3, &WIDE, out), 3);
    assert_run(&out[2], 3, 0, 30, false);
}

static void test_engine_plan_keeps_room_for_urgent_prefill(void **state)
{
    (void)state;
    struct plan_candidate c[6];
    struct plan_run out[8];
    for (uint32_t i = 0; i < 5; i++)
        c[i] = candidate(i, 2, i, 20, 1);
    c[5] = candidate(5, 0, 9, 0, 30);
    struct plan_limits limits = WIDE;
    limits.runs_max = 3; // one of them is kept
    assert_int_equal(plan_choose(c, 6, &limits, out), 3);
    assert_run(&out[0], 0, 20, 1, true);
    assert_run(&out[1], 1, 20, 1, true);
    assert_run(&out[2], 5, 0, 30, true);
    limits.runs_max = 8;
    limits.rows_max = 6; // three rows are kept
    assert_int_equal(plan_choose(c, 6, &limits, out), 4);
    assert_int_equal(out[2].slot, 2);
    assert_run(&out[3], 5, 0, 3, false);
    limits.runs_max = limits.rows_max = 1;
    assert_int_equal(plan_choose(c, 6, &limits, out), 1);
    assert_run(&out[0], 5, 0, 1, false);
}

static void test_engine_plan_layout_sorts_by_adapter(void **state)
{
    (void)state;
    struct plan_run runs[] = {
        {.slot = 4, .class = 1, .adapter = PLAN_NO_ADAPTER, .count = 3, .samples = true},
        {.slot = 5, .class = 2, .adapter = 7, .count = 1, .samples = true},
        {.slot = 6, .class = 1, .adapter = 2, .count = 4},
        {.slot = 7, .class = 1, .adapter = 7, .count = 2, .samples = true}};
    struct step_plan plan = {.step = 3};
    plan_layout(runs, 4, &plan);
    assert_int_equal(plan.class, 1);
    assert_int_equal(plan.rows, 10);
    assert_int_equal(plan.runs, 4);
    assert_int_equal(plan.samples, 3);
    assert_int_equal(plan.lora_segments, 3);
    const uint32_t slots[] = {6, 5, 7, 4}, rows[] = {0, 4, 5, 7};
    for (int i = 0; i < 4; i++) {
        assert_int_equal(runs[i].slot, slots[i]); // equal adapters keep their order
        assert_int_equal(runs[i].row, rows[i]);
    }
    plan_layout(runs, 0, &plan);
    assert_int_equal(plan.rows + plan.runs + plan.samples + plan.lora_segments, 0);
}

static void test_engine_plan_leaves_for_the_more_urgent(void **state)
{
    (void)state;
    for (uint32_t step = 0; step < 3; step++) {
        for (uint32_t waiting = 0; waiting < 3; waiting++) {
            struct plan_leave_inputs in = {.step_class = step, .waiting_class = waiting};
            assert_int_equal(plan_should_leave(&in), waiting < step);
            in.forced = true;
            assert_true(plan_should_leave(&in));
        }
        struct plan_leave_inputs nobody = {.step_class = step, .waiting_class = UINT32_MAX};
        assert_false(plan_should_leave(&nobody));
    }
}

static void test_engine_plan_prints(void **state)
{
    (void)state;
    struct plan_run runs[] = {
        {.slot = 6, .class = 1, .tenant = 3, .adapter = 2, .position = 8, .count = 4},
        {.slot = 4,
         .class = 2,
         .adapter = PLAN_NO_ADAPTER,
         .position = 30,
         .count = 1,
         .samples = true}};
    struct step_plan plan = {.step = 12};
    char text[256], small[20];
    plan_layout(runs, 2, &plan);
    const char *expected = "step 12 class 1 rows 5 runs 2 samples 1 adapters 2"
                           " | slot 6 tenant 3 class 1 adapter 2 pos 8+4"
                           " | slot 4 tenant 0 class 2 adapter -1 pos 30+1 sample";
    assert_int_equal(plan_print(&plan, runs, text, sizeof text), strlen(expected));
    assert_string_equal(text, expected);
    assert_int_equal(plan_print(&plan, runs, small, sizeof small), strlen(expected));
    assert_string_equal(small, "step 12 class 1 row");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_engine_plan_nothing),
        cmocka_unit_test(test_engine_plan_decodes_first),
        cmocka_unit_test(test_engine_plan_orders_by_class_then_arrival),
        cmocka_unit_test(test_engine_plan_bounds_less_urgent_prefill),
        cmocka_unit_test(test_engine_plan_keeps_room_for_urgent_prefill),
        cmocka_unit_test(test_engine_plan_layout_sorts_by_adapter),
        cmocka_unit_test(test_engine_plan_leaves_for_the_more_urgent),
        cmocka_unit_test(test_engine_plan_prints),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
