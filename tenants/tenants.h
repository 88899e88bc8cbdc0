// SPDX-License-Identifier: Apache-2.0
// Tenants: who a key belongs to, what each one may do, and whether a request may enter now.
//
// A table is read from tenants.yaml and never changes afterwards: a reload builds a new one beside
// it and the owner swaps pointers. A tenant's number is its index; pool owners, prefix-key salts
// and counters hang on it, so a reload keeps the number of every name it knows. A tenant that left
// the file keeps its number as an inactive entry without keys; its number is never given to another
// name.
//
//   tenants:
//     - name: acme                      # [A-Za-z0-9._-], 1..63
//       keys_blake2b: [<64 hex>, ...]   # of each key: printf %s KEY | b2sum -l 256
//       allowed_adapters: ["acme-*"]    # "*" stands for any run of characters; missing: none
//       priority_class: standard        # interactive | standard | batch
//       weight: 1                       # share within the class, 0.01..100
//       rpm_limit: 600                  # requests in any 60 s; 0: no limit
//       max_parallel_requests: 64       # sequences accepted and not finished
//       max_queue: 64                   # of these, sequences without a first token yet
//       max_tokens: 1024                # of one answer; 0: what the model allows
//       max_context_tokens: 4096        # prompt + max_tokens; 0: what the model allows
//       manage_adapters: false          # adapters.register, remove, pin ...
//       adapter_rpm_limit: 120          # of these, in any 60 s; 0: no limit
//       see_tenants: false              # all tenants in stats, all use of adapters in their lists
//       adapter_bytes: 0                # of the adapters it has registered; 0: no limit
//       pinned_adapter_bytes: 0         # of adapters it may pin on the device; 0: none
//
// Tables: any thread may read. Counters: the thread that owns them. Time is passed in.
#ifndef POLDER_TENANTS_TENANTS_H
#define POLDER_TENANTS_TENANTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/hash.h"
#include "base/status.h"

enum {
    TENANT_NAME_BYTES = 64,
    TENANT_KEYS_MAX = 16,
    TENANT_PATTERNS_MAX = 64,
    TENANTS_MAX = 1024,
    TENANT_KEY_BYTES_MAX = 256 // of a key as the client sends it
};

#define TENANT_BYTES_MAX ((uint64_t)1 << 62)

enum tenant_class { TENANT_INTERACTIVE, TENANT_STANDARD, TENANT_BATCH, TENANT_CLASSES };

struct tenant {
    char name[TENANT_NAME_BYTES];
    bool active; // false: it was in an earlier table and is not any more
    enum tenant_class class;
    double weight;
    uint32_t rpm_limit, max_parallel_requests, max_queue, max_tokens, max_context_tokens;
    bool manage_adapters, see_tenants;
    uint32_t adapter_rpm_limit;
    uint64_t adapter_bytes, pinned_adapter_bytes;
};

struct tenants;

// `previous` (may be NULL) gives the numbers. STATUS_INVALID with "file:line:column: sentence";
// nothing that was in force is touched then. The caller frees.
MUST_USE enum status tenants_parse(const char *name, const char *text, size_t bytes,
                                   const struct tenants *previous, struct tenants **out,
                                   struct fault *fault);
MUST_USE enum status tenants_load(const char *path, const struct tenants *previous,
                                  struct tenants **out, struct fault *fault);
// One tenant "local" without keys that may do everything: for a server without access control.
#define TENANT_LOCAL "local"
MUST_USE enum status tenants_open_access(struct tenants **out, struct fault *fault);
void tenants_free(struct tenants *tenants);

uint32_t tenants_count(const struct tenants *tenants);
const struct tenant *tenants_at(const struct tenants *tenants, uint32_t number);

// Whose key is it? Hashes the key and compares with every stored hash in constant time.
bool tenants_find_key(const struct tenants *tenants, const char *key, size_t bytes,
                      uint32_t *number);
bool tenants_find_digest(const struct tenants *tenants, const struct digest *digest,
                         uint32_t *number);
bool tenants_allow_adapter(const struct tenants *tenants, uint32_t number, const char *adapter);
// "*" matches any run of characters, everything else itself. Time O(pattern x name).
bool tenant_pattern_matches(const char *pattern, const char *name);

const char *tenant_class_name(enum tenant_class class);
bool tenant_class_from_name(const char *name, enum tenant_class *out);

// ---- admission: pure functions on counters -----------------------------------------------------

enum { TENANT_WINDOW_SECONDS = 60 };

struct tenant_window {
    uint64_t second;                                // of its newest entry
    uint32_t per_second[TENANT_WINDOW_SECONDS + 1]; // admitted, by second modulo 61
};

struct tenant_counters {
    struct tenant_window requests, changes; // changes: of adapters
    uint32_t parallel, waiting;             // sequences
    uint64_t admitted, refused;             // requests
};

struct tenant_ask {
    uint32_t sequences; // n
    uint32_t prompt_tokens, max_tokens;
};

enum tenant_limit {
    TENANT_LIMIT_NONE,
    TENANT_LIMIT_RPM,
    TENANT_LIMIT_PARALLEL,
    TENANT_LIMIT_QUEUE,
    TENANT_LIMIT_MAX_TOKENS,
    TENANT_LIMIT_CONTEXT,
    TENANT_LIMIT_ADAPTER_RPM,
    TENANT_LIMIT_COUNT
};

// The one refusal model. retry_after_ms 0: waiting does not help (the request itself is too large,
// or nobody knows when). billed: whether the attempt used up some of a limit; refusals here never
// do.
struct tenant_refusal {
    enum tenant_limit kind;
    uint64_t limit, remaining, retry_after_ms;
    bool billed;
};
const char *tenant_limit_name(enum tenant_limit kind); // the key in tenants.yaml

// May it enter now? true: it is counted (window, parallel, waiting). false: *refusal says why.
// No more than rpm_limit requests enter in any 60 s.
bool tenants_admit(const struct tenant *tenant, struct tenant_counters *counters,
                   const struct tenant_ask *ask, uint64_t now_us, struct tenant_refusal *refusal);
// The same for one change of an adapter: registering, removing, bringing it to the device or away.
bool tenants_admit_change(const struct tenant *tenant, struct tenant_counters *counters,
                          uint64_t now_us, struct tenant_refusal *refusal);
void tenant_sequence_started(struct tenant_counters *counters); // first token: it waits no longer
void tenant_sequence_ended(struct tenant_counters *counters, bool started);

// Who goes first: smaller class, then smaller arrival. <0, 0, >0 as qsort wants.
struct tenant_place {
    uint32_t class;
    uint64_t arrival;
};
int tenant_order(const struct tenant_place *a, const struct tenant_place *b);

#endif
