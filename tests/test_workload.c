// SPDX-License-Identifier: Apache-2.0
// Workload generator: moments, independence of its streams, files. Numbers are compared with what
// the distributions promise, within a few deviations of the mean of N draws; the generator is
// deterministic, so what passes once passes always.
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <setjmp.h>
#include <cmocka.h>

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/hash.h"
#include "bench/workload.h"

enum { DRAWS = 200000 };

static struct workload make(const char *spec_text)
{
    struct workload_spec spec;
    struct workload workload = {0};
    struct fault fault = {.text = ""};
    if (workload_spec_parse(spec_text, "spec", &spec, &fault) ||
        workload_make(&spec, &workload, &fault))
        fail_msg("%s", fault.text);
    return workload;
}

static double interval(const struct workload *w, uint32_t i)
{
    return (double)(w->requests[i].time_us - (i ? w->requests[i - 1].time_us : 0)) * 1e-6;
}

static void test_workload_intervals_have_the_mean_and_cv_asked_for(void **state)
{
    static const double cvs[] = {0, 0.5, 1, 2, 4};
    (void)state;
    for (size_t c = 0; c < sizeof cvs / sizeof *cvs; c++) {
        char text[128];
        (void)snprintf(text, sizeof text, "phase rate=20 cv=%g requests=%d", cvs[c], DRAWS);
        struct workload w = make(text);
        double sum = 0, squares = 0;
        for (uint32_t i = 0; i < w.count; i++) {
            double x = interval(&w, i);
            sum += x;
            squares += x * x;
        }
        double mean = sum / w.count, cv = sqrt(fabs(squares / w.count - mean * mean)) / mean;
        assert_int_equal(w.count, DRAWS);
        assert_true(fabs(mean * 20 - 1) < 4 * (cvs[c] + 0.001) / sqrt(DRAWS));
        assert_true(fabs(cv - cvs[c]) < 0.03 * cvs[c] + 0.001);
        workload_clear(&w);
    }
}

// At cv 1 intervals are exponential: a share e^-1 of them is above the mean. A wrong shape with the
// right two moments would not show above.
static void test_workload_of_cv_1_is_poisson(void **state)
{
    (void)state;
    char text[128];
    (void)snprintf(text, sizeof text, "phase rate=20 cv=1 requests=%d", DRAWS);
    struct workload w = make(text);
    uint32_t above = 0, far_above = 0;
    for (uint32_t i = 0; i < w.count; i++) {
        above += interval(&w, i) > 0.05;
        far_above += interval(&w, i) > 0.15;
    }
    assert_true(fabs((double)above / DRAWS - exp(-1)) < 0.005);
    assert_true(fabs((double)far_above / DRAWS - exp(-3)) < 0.002);
    workload_clear(&w);
}

static void count_adapters(const struct workload *w, uint32_t *count)
{
    for (uint32_t i = 0; i < w->count; i++)
        count[w->requests[i].adapter]++;
}

static void test_workload_popularity_falls_as_the_power_law(void **state)
{
    (void)state;
    uint32_t one[100] = {0}, two[100] = {0}, none[100] = {0};
    char text[128];
    uint32_t *const counts[] = {none, one, two};
    for (int alpha = 0; alpha < 3; alpha++) {
        (void)snprintf(text, sizeof text, "phase alpha=%d adapters=100 requests=%d", alpha, DRAWS);
        struct workload w = make(text);
        assert_int_equal(w.adapters, 100);
        count_adapters(&w, counts[alpha]);
        workload_clear(&w);
    }
    double harmonic = 0;
    for (int i = 1; i <= 100; i++)
        harmonic += 1.0 / i;
    assert_true(fabs(one[0] / (DRAWS / harmonic) - 1) < 0.03);
    assert_true(fabs((double)one[0] / one[9] / 10 - 1) < 0.1);
    assert_true(fabs((double)two[0] / two[9] / 100 - 1) < 0.2);
    for (int i = 0; i < 100; i++)
        assert_true(fabs(none[i] / (DRAWS / 100.0) - 1) < 0.12);
}

static void test_workload_lengths_are_uniform_from_end_to_end(void **state)
{
    (void)state;
    char text[128];
    (void)snprintf(text, sizeof text, "phase input=8..512 output=5 requests=%d", DRAWS);
    struct workload w = make(text);
    uint32_t least = UINT32_MAX, most = 0;
    double sum = 0;
    for (uint32_t i = 0; i < w.count; i++) {
        least = w.requests[i].input < least ? w.requests[i].input : least;
        most = w.requests[i].input > most ? w.requests[i].input : most;
        sum += w.requests[i].input;
        assert_int_equal(w.requests[i].output, 5);
    }
    assert_int_equal(least, 8);
    assert_int_equal(most, 512);
    assert_int_equal(w.tokens_max, 517);
    assert_true(fabs(sum / w.count - 260) < 2);
    workload_clear(&w);
}

static void test_workload_is_the_same_on_every_machine(void **state)
{
    static const char text[] = "seed 7\n"
                               "repeat 2\n"
                               "phase rate=3 cv=0.7 alpha=0.9 adapters=77 tenants=5 requests=500\n"
                               "phase rate=9 cv=3 alpha=0 adapters=9 input=1..9 seconds=60\n";
    (void)state;
    struct workload w = make(text);
    struct digest key = {{0}};
    char hex[2 * DIGEST_BYTES + 1];
    struct digest digest = hash_bytes(&key, w.requests, w.count * sizeof *w.requests);
    digest_hex(&digest, hex);
    hex[16] = 0;
    assert_string_equal(hex, "fd9e08eaa4e31267");
    workload_clear(&w);
}

static void test_workload_of_more_adapters_is_the_same_load(void **state)
{
    (void)state;
    struct workload one = make("phase adapters=1 requests=1000");
    struct workload many = make("phase adapters=2000 alpha=0 requests=1000");
    struct workload base = make("phase adapters=0 requests=1000");
    for (uint32_t i = 0; i < one.count; i++) {
        assert_int_equal(one.requests[i].time_us, many.requests[i].time_us);
        assert_int_equal(one.requests[i].input, many.requests[i].input);
        assert_int_equal(one.requests[i].output, many.requests[i].output);
        assert_int_equal(one.requests[i].adapter, 0);
        assert_int_equal(base.requests[i].adapter, WORKLOAD_BASE);
        assert_int_equal(base.requests[i].output, many.requests[i].output);
    }
    assert_int_equal(many.adapters, 2000);
    assert_true(many.used > 700 && many.used < 850); // 2000 (1 - e^-0.5) = 787
    assert_int_equal(one.used, 1);
    assert_int_equal(base.used, 0);
    assert_int_equal(base.adapters, 0);
    workload_clear(&one);
    workload_clear(&many);
    workload_clear(&base);
}

static void test_workload_phases_follow_each_other(void **state)
{
    (void)state;
    struct workload w = make("repeat 2\n"
                             "phase rate=10 seconds=30 adapters=4 tenants=3\n"
                             "phase rate=100 cv=0 requests=50 adapters=0 # the base alone\n");
    uint32_t base = 0, last = 0;
    for (uint32_t i = 0; i < w.count; i++) {
        const struct workload_request *r = &w.requests[i];
        if (r->adapter == WORKLOAD_BASE) {
            assert_true(base >= 50 || (r->time_us > 30000000 && r->time_us <= 30500000));
            base++;
            last = i;
        } else {
            assert_int_equal(r->tenant, r->adapter % 3);
        }
        assert_true(!i || r->time_us >= w.requests[i - 1].time_us);
    }
    assert_int_equal(base, 100);
    assert_int_equal(last, w.count - 1);
    assert_int_equal(w.requests[last].time_us, 61000000);
    assert_true(w.count > 600 && w.count < 800);
    workload_clear(&w);
}

static void test_workload_lists_come_back_as_they_were_written(void **state)
{
    (void)state;
    char path[] = "/tmp/polder-test-workload-XXXXXX";
    struct workload w = make("phase adapters=9 tenants=4 requests=300\n"
                             "phase adapters=0 requests=3\n"),
                    again;
    struct fault fault = {.text = ""};
    int descriptor = mkstemp(path);
    assert_true(descriptor >= 0);
    (void)close(descriptor);
    assert_int_equal(workload_write(&w, path, &fault), STATUS_OK);
    assert_int_equal(workload_open(path, NULL, &again, &fault), STATUS_OK);
    assert_int_equal(again.count, w.count);
    assert_memory_equal(again.requests, w.requests, w.count * sizeof *w.requests);
    assert_int_equal(again.adapters, w.adapters);
    assert_int_equal(again.used, w.used);
    workload_clear(&again);
    assert_int_equal(workload_open(path, "rate=3", &again, &fault), STATUS_INVALID);
    (void)unlink(path);
    workload_clear(&w);
}

static void test_workload_refuses_what_it_cannot_read(void **state)
{
    static const struct {
        bool list;
        const char *text, *says;
    } cases[] = {
        {false, "", "has no phase"},
        {false, "seed 1\nphase rate=ten", "line 2: rate=ten"},
        {false, "phase rate=0", "rate=0"},
        {false, "phase cv=-1", "cv=-1"},
        {false, "phase cv=nan", "cv=nan"},
        {false, "phase input=9..8", "input=9..8"},
        {false, "phase output=0", "output=0"},
        {false, "phase adapters=1.5", "adapters=1.5"},
        {false, "phase colour=red", "no \"colour\""},
        {false, "phase rate", "not key=value"},
        {false, "phases", "begins with"},
        {true, "# nothing\n", "has no request"},
        {true, "1 0 5 5 0\n0 0 5 5 0", "line 2: earlier"},
        {true, "1 0 5 5", "line 1: not"},
        {true, "1 0 5 5 0 6", "line 1: not"},
        {true, "1 x 5 5 0", "line 1: not"},
        {true, "1 0 0 5 0", "line 1: not"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct fault fault = {.text = ""};
        struct workload_spec spec;
        struct workload workload;
        assert_int_equal(cases[i].list ? workload_parse(cases[i].text, "text", &workload, &fault)
                                       : workload_spec_parse(cases[i].text, "text", &spec, &fault),
                         STATUS_INVALID);
        if (!strstr(fault.text, cases[i].says))
            fail_msg("\"%s\" gave: %s", cases[i].text, fault.text);
    }
}

static void test_workload_without_an_end_is_refused(void **state)
{
    (void)state;
    struct workload_spec spec;
    struct workload workload;
    struct fault fault = {.text = ""};
    assert_int_equal(workload_spec_parse("phase requests=0", "text", &spec, &fault), STATUS_OK);
    assert_int_equal(workload_make(&spec, &workload, &fault), STATUS_INVALID);
    assert_int_equal(workload_spec_parse("phase rate=1e6 seconds=1e6", "text", &spec, &fault),
                     STATUS_OK);
    assert_int_equal(workload_make(&spec, &workload, &fault), STATUS_LIMIT);
}

static void test_workload_files_of_the_tree_can_be_opened(void **state)
{
    static const char *const names[] = {"slora", "uniform", "tenants", "shift", "one", "forty"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[64];
        struct workload w;
        struct fault fault = {.text = ""};
        (void)snprintf(path, sizeof path, "bench/workloads/%s.txt", names[i]);
        if (workload_open(path, "seed=5,tenants=2", &w, &fault))
            fail_msg("%s", fault.text);
        assert_true(w.count >= 60 && w.tenants <= 2);
        workload_clear(&w);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_workload_intervals_have_the_mean_and_cv_asked_for),
        cmocka_unit_test(test_workload_of_cv_1_is_poisson),
        cmocka_unit_test(test_workload_popularity_falls_as_the_power_law),
        cmocka_unit_test(test_workload_lengths_are_uniform_from_end_to_end),
        cmocka_unit_test(test_workload_is_the_same_on_every_machine),
        cmocka_unit_test(test_workload_of_more_adapters_is_the_same_load),
        cmocka_unit_test(test_workload_phases_follow_each_other),
        cmocka_unit_test(test_workload_lists_come_back_as_they_were_written),
        cmocka_unit_test(test_workload_refuses_what_it_cannot_read),
        cmocka_unit_test(test_workload_without_an_end_is_refused),
        cmocka_unit_test(test_workload_files_of_the_tree_can_be_opened),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
