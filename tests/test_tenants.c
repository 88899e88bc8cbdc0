// SPDX-License-Identifier: Apache-2.0
// tenants/tenants.h: identity, patterns, admission with exact counts, numbers that survive reloads.
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "base/check.h"
#include "base/hash.h"
#include "tenants/tenants.h"

static const char *hash_of(const char *key, char out[2 * DIGEST_BYTES + 1])
{
    struct digest digest = hash_bytes(NULL, key, strlen(key));
    digest_hex(&digest, out);
    return out;
}

static struct tenants *parsed(const char *text, const struct tenants *previous)
{
    struct tenants *tenants = NULL;
    struct fault fault = {0};
    if (tenants_parse("t.yaml", text, strlen(text), previous, &tenants, &fault))
        fail_msg("%s", fault.text);
    return tenants;
}

static void test_tenants_key_gives_identity(void **state)
{
    (void)state;
    char a[65], b[65], c[65], text[1024];
    (void)snprintf(text, sizeof text,
                   "tenants:\n  - name: one\n    keys_blake2b: [%s, %s]\n  - name: two\n"
                   "    keys_blake2b: [%s]\n    priority_class: interactive\n    weight: 2.5\n"
                   "    pinned_adapter_bytes: 1099511627776\n    adapter_bytes: 5\n",
                   hash_of("key-a", a), hash_of("key-b", b), hash_of("key-c", c));
    struct tenants *tenants = parsed(text, NULL);
    uint32_t number = 9;
    assert_true(tenants_find_key(tenants, "key-a", 5, &number) && number == 0);
    assert_true(tenants_find_key(tenants, "key-b", 5, &number) && number == 0);
    assert_true(tenants_find_key(tenants, "key-c", 5, &number) && number == 1);
    assert_false(tenants_find_key(tenants, "key-d", 5, &number));
    assert_false(tenants_find_key(tenants, "", 0, &number));
    assert_false(tenants_find_key(tenants, a, 64, &number)); // the hash is not the key
    assert_int_equal(tenants_at(tenants, 1)->class, TENANT_INTERACTIVE);
    assert_true(tenants_at(tenants, 1)->weight == 2.5);
    assert_true(tenants_at(tenants, 1)->pinned_adapter_bytes == 1ull << 40);
    assert_true(tenants_at(tenants, 1)->adapter_bytes == 5);
    assert_true(tenants_at(tenants, 0)->pinned_adapter_bytes == 0);
    assert_null(tenants_at(tenants, 2));
    tenants_free(tenants);
}

static void test_tenants_patterns(void **state)
{
    (void)state;
    static const struct {
        const char *pattern, *name;
        bool matches;
    } rows[] = {
        {"*", "", true},
        {"*", "x", true},
        {"a", "a", true},
        {"a", "ab", false},
        {"a*", "a", true},
        {"a*", "ab", true},
        {"a*", "ba", false},
        {"*-x", "a-x", true},
        {"*-x", "a-xy", false},
        {"a*b*c", "aXbYc", true},
        {"a*b*c", "aXbY", false},
        {"", "", true},
        {"", "a", false},
        {"a**b", "ab", true},
        {"?", "a", false},
        {"*a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", false},
    };
    for (size_t i = 0; i < ARRAY_COUNT(rows); i++)
        assert_int_equal(tenant_pattern_matches(rows[i].pattern, rows[i].name), rows[i].matches);
    struct tenants *tenants =
        parsed("tenants:\n- {name: a, allowed_adapters: [\"a-*\", shared]}\n- {name: b}\n", NULL);
    assert_true(tenants_allow_adapter(tenants, 0, "a-1"));
    assert_true(tenants_allow_adapter(tenants, 0, "shared"));
    assert_false(tenants_allow_adapter(tenants, 0, "b-1"));
    assert_false(tenants_allow_adapter(tenants, 1, "a-1"));
    assert_false(tenants_allow_adapter(tenants, 7, "a-1"));
    tenants_free(tenants);
}

static void test_tenants_refuses_bad_files(void **state)
{
    (void)state;
    static const char hash[] = "0000000000000000000000000000000000000000000000000000000000000000";
    char twice[400];
    (void)snprintf(twice, sizeof twice,
                   "tenants:\n- {name: a, keys_blake2b: [%s]}\n- {name: b, keys_blake2b: [%s]}\n",
                   hash, hash);
    const struct {
        const char *text, *part;
    } rows[] = {
        {"", "t.yaml:1:1: there are no tenants"},
        {"tenants: []\n", "there are no tenants"},
        {"tenants: 5\n", "t.yaml:1:10: tenants must be a list"},
        {"tenant: []\n", "unknown key \"tenant\"; known: tenants"},
        {"tenants:\n- {name: a, rpm: 5}\n", "t.yaml:2:18: unknown key \"rpm\"; known: name, keys"},
        {"tenants:\n- {weight: 1}\n", "t.yaml:2:3: a tenant needs a name"},
        {"tenants:\n- {name: a/b}\n", "a tenant needs a name"},
        {"tenants:\n- {name: .a}\n", "a tenant needs a name"},
        {"tenants:\n- {name: a}\n- {name: a}\n", "t.yaml:3:3: the tenant \"a\" is there twice"},
        {"tenants:\n- {name: a, keys_blake2b: [secret]}\n", "never the keys themselves"},
        {"tenants:\n- {name: a, priority_class: fast}\n", "interactive, standard or batch"},
        {"tenants:\n- {name: a, rpm_limit: -1}\n", "rpm_limit must be a whole number from 0"},
        {"tenants:\n- {name: a, weight: 0}\n", "weight must be a number from 0.01 to 100"},
        {"tenants:\n- {name: a, manage_adapters: yes}\n", "must be true or false"},
        {"tenants:\n- {name: a, pinned_adapter_bytes: 1G}\n",
         "pinned_adapter_bytes must be a whole"},
        {twice, "t.yaml:3:3: a key of \"b\" belongs to another tenant"},
    };
    for (size_t i = 0; i < ARRAY_COUNT(rows); i++) {
        struct tenants *tenants = NULL;
        struct fault fault = {0};
        assert_int_equal(
            tenants_parse("t.yaml", rows[i].text, strlen(rows[i].text), NULL, &tenants, &fault),
            STATUS_INVALID);
        assert_null(tenants);
        if (!strstr(fault.text, rows[i].part))
            fail_msg("\"%s\" lacks \"%s\"", fault.text, rows[i].part);
    }
}

static void test_tenants_reload_keeps_numbers(void **state)
{
    (void)state;
    struct tenants *first = parsed("tenants:\n- {name: a}\n- {name: b}\n- {name: c}\n", NULL);
    struct tenants *second = parsed("tenants:\n- {name: d}\n- {name: c}\n", first);
    tenants_free(first);
    assert_int_equal(tenants_count(second), 4);
    assert_string_equal(tenants_at(second, 2)->name, "c");
    assert_string_equal(tenants_at(second, 3)->name, "d");
    assert_true(tenants_at(second, 2)->active && tenants_at(second, 3)->active);
    assert_false(tenants_at(second, 0)->active || tenants_at(second, 1)->active);
    struct tenants *third = parsed("tenants:\n- {name: b}\n", second);
    assert_int_equal(tenants_count(third), 4);
    assert_true(tenants_at(third, 1)->active);
    assert_false(tenants_at(third, 3)->active);
    tenants_free(second);
    tenants_free(third);
}

static const uint64_t second_us = 1000000;

static bool ask(const struct tenant *tenant, struct tenant_counters *counters, uint64_t now_us,
                struct tenant_refusal *refusal)
{
    struct tenant_ask one = {.sequences = 1, .prompt_tokens = 10, .max_tokens = 10};
    bool in = tenants_admit(tenant, counters, &one, now_us, refusal);
    if (in)
        tenant_sequence_ended(counters, false);
    return in;
}

static void test_tenants_rpm_exact(void **state)
{
    (void)state;
    struct tenant tenant = {.rpm_limit = 3, .max_parallel_requests = 9, .max_queue = 9};
    struct tenant_counters counters = {0};
    struct tenant_refusal refusal = {0};
    uint64_t start = 1000 * second_us + 400000;
    assert_true(ask(&tenant, &counters, start, &refusal));
    assert_true(ask(&tenant, &counters, start + 10 * second_us, &refusal));
    assert_true(ask(&tenant, &counters, start + 20 * second_us, &refusal));
    assert_false(ask(&tenant, &counters, start + 30 * second_us, &refusal));
    assert_int_equal(refusal.kind, TENANT_LIMIT_RPM);
    assert_int_equal(refusal.limit, 3);
    assert_int_equal(refusal.remaining, 0);
    assert_false(refusal.billed);
    assert_int_equal(refusal.retry_after_ms, 30600); // second 1000 leaves at 1061.0, now is 1030.4
    uint64_t retry = start + 30 * second_us + refusal.retry_after_ms * 1000;
    assert_false(ask(&tenant, &counters, retry - 1000, &refusal));
    assert_true(ask(&tenant, &counters, retry, &refusal));
    assert_false(ask(&tenant, &counters, retry, &refusal));
    assert_int_equal(counters.admitted, 4);
    assert_int_equal(counters.refused, 3);
    assert_false(
        ask(&tenant, &counters, start, &refusal)); // a clock that goes back forgets nothing
    for (int i = 0; i < 3; i++)
        assert_true(ask(&tenant, &counters, start + 4000 * second_us, &refusal));
    assert_false(ask(&tenant, &counters, start + 4000 * second_us, &refusal));
}

static void test_tenants_changes_have_a_window_of_their_own(void **state)
{
    (void)state;
    struct tenant tenant = {
        .rpm_limit = 1, .adapter_rpm_limit = 2, .max_parallel_requests = 9, .max_queue = 9};
    struct tenant_counters counters = {0};
    struct tenant_refusal refusal = {0};
    uint64_t start = 1000 * second_us;
    assert_true(tenants_admit_change(&tenant, &counters, start, &refusal));
    assert_true(tenants_admit_change(&tenant, &counters, start, &refusal));
    assert_true(ask(&tenant, &counters, start, &refusal));
    assert_false(tenants_admit_change(&tenant, &counters, start + second_us, &refusal));
    assert_int_equal(refusal.kind, TENANT_LIMIT_ADAPTER_RPM);
    assert_string_equal(tenant_limit_name(refusal.kind), "adapter_rpm_limit");
    assert_int_equal(refusal.retry_after_ms, 60000);
    assert_true(tenants_admit_change(&tenant, &counters, start + 61 * second_us, &refusal));
    tenant.adapter_rpm_limit = 0; // no limit
    for (int i = 0; i < 1000; i++)
        assert_true(tenants_admit_change(&tenant, &counters, start + 61 * second_us, &refusal));
}

// Every 60 s window of a greedy client's admissions holds at most rpm_limit, and the long-run rate
// is rpm_limit per 61 s.
static void test_tenants_rpm_holds_in_every_window(void **state)
{
    (void)state;
    enum { LIMIT = 7, ASKS = 40000 };
    struct tenant tenant = {.rpm_limit = LIMIT, .max_parallel_requests = 9, .max_queue = 9};
    struct tenant_counters counters = {0};
    struct tenant_refusal refusal = {0};
    static uint64_t when[ASKS];
    size_t admitted = 0;
    for (uint64_t i = 0; i < ASKS; i++) {
        uint64_t now = i * 17321;
        if (ask(&tenant, &counters, now, &refusal))
            when[admitted++] = now;
    }
    for (size_t i = LIMIT; i < admitted; i++)
        assert_true(when[i] - when[i - LIMIT] >= 60 * second_us);
    assert_int_equal(admitted, 84); // 692.8 s = 11 full windows of 61 s and one begun
}

static void test_tenants_parallel_queue_and_sizes(void **state)
{
    (void)state;
    struct tenant tenant = {
        .max_parallel_requests = 4, .max_queue = 2, .max_tokens = 100, .max_context_tokens = 150};
    struct tenant_counters counters = {0};
    struct tenant_refusal refusal = {0};
    struct tenant_ask one = {.sequences = 1, .prompt_tokens = 10, .max_tokens = 100};
    struct tenant_ask three = {.sequences = 3, .prompt_tokens = 10, .max_tokens = 100};
    assert_true(tenants_admit(&tenant, &counters, &one, 0, &refusal));
    assert_true(tenants_admit(&tenant, &counters, &one, 0, &refusal));
    assert_false(tenants_admit(&tenant, &counters, &one, 0, &refusal));
    assert_int_equal(refusal.kind, TENANT_LIMIT_QUEUE);
    tenant_sequence_started(&counters);
    tenant_sequence_started(&counters);
    assert_false(tenants_admit(&tenant, &counters, &three, 0, &refusal));
    assert_int_equal(refusal.kind, TENANT_LIMIT_PARALLEL);
    assert_int_equal(refusal.remaining, 2);
    assert_int_equal(refusal.retry_after_ms, 0);
    assert_true(tenants_admit(&tenant, &counters, &one, 0, &refusal));
    tenant_sequence_ended(&counters, true);
    tenant_sequence_ended(&counters, true);
    tenant_sequence_ended(&counters, false);
    assert_int_equal(counters.parallel, 0);
    assert_int_equal(counters.waiting, 0);
    one.max_tokens = 101;
    assert_false(tenants_admit(&tenant, &counters, &one, 0, &refusal));
    assert_int_equal(refusal.kind, TENANT_LIMIT_MAX_TOKENS);
    one = (struct tenant_ask){.sequences = 1, .prompt_tokens = 51, .max_tokens = 100};
    assert_false(tenants_admit(&tenant, &counters, &one, 0, &refusal));
    assert_int_equal(refusal.kind, TENANT_LIMIT_CONTEXT);
    assert_int_equal(refusal.remaining, 99);
    assert_string_equal(tenant_limit_name(refusal.kind), "max_context_tokens");
}

static void test_tenants_order(void **state)
{
    (void)state;
    struct tenant_place a = {0, 9}, b = {1, 2}, c = {1, 3};
    assert_true(tenant_order(&a, &b) < 0 && tenant_order(&b, &a) > 0);
    assert_true(tenant_order(&b, &c) < 0 && tenant_order(&c, &b) > 0);
    assert_int_equal(tenant_order(&b, &b), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tenants_key_gives_identity),
        cmocka_unit_test(test_tenants_patterns),
        cmocka_unit_test(test_tenants_refuses_bad_files),
        cmocka_unit_test(test_tenants_reload_keeps_numbers),
        cmocka_unit_test(test_tenants_rpm_exact),
        cmocka_unit_test(test_tenants_changes_have_a_window_of_their_own),
        cmocka_unit_test(test_tenants_rpm_holds_in_every_window),
        cmocka_unit_test(test_tenants_parallel_queue_and_sizes),
        cmocka_unit_test(test_tenants_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
