// SPDX-License-Identifier: Apache-2.0
// The commands on adapters: register, remove, load, unload, pin, unpin.
//
// A tenant's word counts for its own adapters and the operator's; another tenant's do not exist for
// it.
//
// Pinning takes pages away from everything else until it is undone, so it is refused unless all
// that the engine has promised can still be kept beside it: a sequence of the whole context, every
// request that was accepted, what is on the device now, each with one token's experts. The same
// count is made when a request comes (fits_pool) and when a step is planned
// (sequence_pages_allow).
#include <string.h>

#include "base/arith.h"
#include "base/check.h"
#include "runtime/engine/internal.h"

static bool is_its_own(const struct engine *e, adapter_id id, uint32_t tenant)
{
    uint32_t owner = adapter_owner(e->options.adapters, id);
    return owner >= e->options.tenants_max || owner == tenant;
}

enum status residents_find(const struct engine *e, const char *name, uint32_t tenant,
                           adapter_id *out)
{
    enum status status = adapter_find(e->options.adapters, name, out);
    return status || is_its_own(e, *out, tenant) ? status : STATUS_NOT_FOUND;
}

// The operator's adapters serve all tenants: one of several may not replace or remove them. The
// operator itself, and who is alone (open access), may.
static bool may_change(const struct engine *e, adapter_id id, uint32_t tenant)
{
    bool is_operator = tenant >= e->options.tenants_max || e->options.tenants_max == 1;
    return is_operator ? is_its_own(e, id, tenant)
                       : adapter_owner(e->options.adapters, id) == tenant;
}

// What the tenant has registered, with the new one in the place of its old version. Where several
// register, one leaves the others half of the places and pages.
static enum status check_quota(const struct engine *e, const struct engine_adapter_command *c,
                               struct fault *fault)
{
    struct adapter_summary summary;
    struct pool_stats pool;
    if (!(c->owned_bytes_max || c->shared) || adapter_inspect(c->store_path, false, &summary, NULL))
        return STATUS_OK; // what cannot be read is refused where it is opened
    pool_stats(e->options.pool, &pool);
    struct adapters_owned owned = adapters_owned(e->options.adapters, c->owner, c->name);
    uint64_t bytes = owned.pages * pool.page_bytes;
    uint64_t pages = owned.pages + summary.report.bytes / pool.page_bytes;
    if (c->owned_bytes_max && bytes + summary.report.bytes > c->owned_bytes_max)
        return fault_set(fault, STATUS_LIMIT,
                         "It has %llu bytes; this tenant's other adapters have %llu of at most "
                         "%llu (adapter_bytes): remove one.",
                         (unsigned long long)summary.report.bytes, (unsigned long long)bytes,
                         (unsigned long long)c->owned_bytes_max);
    if (c->shared && owned.count >= (owned.count_max + 1) / 2)
        return fault_set(fault, STATUS_LIMIT,
                         "This tenant has %u adapters, half of what the server holds "
                         "(--max-adapters): remove one.",
                         owned.count);
    if (c->shared && owned.pages_max && pages > owned.pages_max / 2)
        return fault_set(fault, STATUS_LIMIT,
                         "With it this tenant would have %llu pages of adapters, and it may have "
                         "%llu, half of what the server holds: remove one.",
                         (unsigned long long)pages, (unsigned long long)owned.pages_max / 2);
    return STATUS_OK;
}

// Another tenant's adapter cannot be replaced: to this one the name is taken.
static enum status register_adapter(struct engine *e, const struct engine_adapter_command *c,
                                    struct fault *fault)
{
    const struct engine_options *o = &e->options;
    adapter_id id;
    bool replace = c->replace && adapter_find(o->adapters, c->name, &id) == STATUS_OK;
    replace = replace && may_change(e, id, c->owner);
    // Owners beyond the tenants stand for the operator, who shares a number with the base model.
    uint32_t owner = c->owner > o->tenants_max ? o->tenants_max : c->owner;
    if (o->model->share.world > 1)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "Adapters cannot be served by a model that several ranks share.");
    enum status status = check_quota(e, c, fault);
    if (status)
        return status;
    return replace ? adapter_replace(o->adapters, c->name, c->store_path, owner, &id, fault)
                   : adapter_register(o->adapters, c->name, c->store_path, owner, &id, fault);
}

enum status engine_register_adapter(struct engine *engine, const char *name, const char *store_path,
                                    uint32_t owner, struct fault *fault)
{
    struct engine_adapter_command command = {.kind = ENGINE_ADAPTER_ADD, .owner = owner};
    if (strlen(name) >= sizeof command.name || strlen(store_path) >= sizeof command.store_path)
        return fault_set(fault, STATUS_INVALID, "The name or the path is too long.");
    strcpy(command.name, name);
    strcpy(command.store_path, store_path);
    return register_adapter(engine, &command, fault);
}

// ---- pin ----

// Pages of the adapters that steps hold on the device now.
static uint64_t pinned_by_steps(const struct engine *e)
{
    uint64_t pages = 0;
    for (uint32_t i = 0; i < e->sequence_slots; i++) {
        const struct sequence *s = &e->sequences[i];
        bool counted = !s->has_adapter || !s->adapter_pinned;
        for (uint32_t k = 0; k < i && !counted; k++) {
            const struct sequence *before = &e->sequences[k];
            counted = before->has_adapter && before->adapter_pinned &&
                      before->adapter.bits == s->adapter.bits;
        }
        pages += counted ? 0 : adapter_page_count(e->options.adapters, s->adapter);
    }
    return pages;
}

// Would every accepted request, alone, still fit beside what is pinned and `id`, pinned as well?
static bool promises_hold(const struct engine *e, adapter_id id, uint32_t total)
{
    const struct model *model = e->options.model;
    uint64_t kept =
        adapters_kept_pages(e->options.adapters) + adapter_pages_whole(e->options.adapters, id);
    uint64_t beside = kept + engine_expert_floor(&model->expert_shape, model->config.top_k);
    const adapter_id none = {0};
    if (sequence_pages_needed(e, e->options.context_max, false, none) + beside > total ||
        kept > pool_limit(e->options.pool, PAGE_ADAPTER))
        return false;
    for (int state = SEQUENCE_QUEUED; state <= SEQUENCE_OUT; state++)
        for (uint32_t slot = e->lists[state].head; slot != NO_SLOT;
             slot = e->sequences[slot].next) {
            const struct sequence *s = &e->sequences[slot];
            bool counts = s->has_adapter && s->adapter.bits != id.bits;
            uint32_t tokens = s->prompt + s->max_tokens;
            uint32_t adapter_pages = sequence_adapter_pages(e, counts, s->adapter);
            if (sequence_pages_needed(e, tokens, counts, s->adapter) + beside > total ||
                adapter_pages + kept > pool_limit(e->options.pool, PAGE_ADAPTER))
                return false;
        }
    return true;
}

static enum status keep(struct engine *e, const struct engine_adapter_command *c, adapter_id id,
                        struct fault *fault)
{
    enum status status = adapter_keep(e->options.adapters, id, c->owner);
    return status ? fault_set(fault, status, "Too many adapters are pinned: unpin another one.")
                  : STATUS_OK;
}

static enum status pin(struct engine *e, const struct engine_adapter_command *c, adapter_id id,
                       struct fault *fault)
{
    struct adapters *adapters = e->options.adapters;
    struct pool_stats pool;
    pool_stats(e->options.pool, &pool);
    if (adapter_is_kept_by(adapters, id, c->owner))
        return STATUS_OK;
    uint32_t pages = adapter_pages_whole(adapters, id);
    uint64_t mine = adapters_kept_pages_of(adapters, c->owner) * pool.page_bytes;
    uint64_t bytes = (uint64_t)pages * pool.page_bytes;
    if (mine + bytes > c->pinned_bytes_max)
        return fault_set(fault, STATUS_LIMIT,
                         "It has %llu bytes; this tenant has pinned %llu of at most %llu "
                         "(pinned_adapter_bytes): unpin another one.",
                         (unsigned long long)bytes, (unsigned long long)mine,
                         (unsigned long long)c->pinned_bytes_max);
    if (adapter_is_kept(adapters, id)) // by another tenant: its pages are counted already
        return keep(e, c, id, fault);
    if (!promises_hold(e, id, pool.device_total))
        return fault_set(fault, STATUS_LIMIT,
                         "With its %u pages pinned the pool of %u could not hold what it must: "
                         "unpin another one or raise --pool-bytes.",
                         pages, pool.device_total);
    uint64_t now = pages + pinned_by_steps(e);
    if (now > pool.device_total || !sequence_pages_allow(e, (uint32_t)now) ||
        !sequence_adapters_allow(e, (uint32_t)now))
        return fault_set(fault, STATUS_FULL,
                         "Running requests need the pages now: pin it again a little later.");
    return keep(e, c, id, fault);
}

// What a request on it would be refused for, too: beside one token's experts, if nothing else were
// there.
static enum status load_ever(const struct engine *e, adapter_id id, uint32_t total,
                             struct fault *fault)
{
    const struct model *model = e->options.model;
    uint32_t pages = adapter_page_count(e->options.adapters, id);
    uint32_t limit = pool_limit(e->options.pool, PAGE_ADAPTER);
    uint32_t floor =
        e->options.experts ? engine_expert_floor(&model->expert_shape, model->config.top_k) : 0;
    if (pages <= limit && (uint64_t)pages + floor <= total)
        return STATUS_OK;
    return fault_set(fault, STATUS_LIMIT,
                     "Its %u pages never fit: the pool has %u, %u of them for one token's experts, "
                     "and adapters may have %u: raise --pool-bytes.",
                     pages, total, floor, limit);
}

static enum status load(struct engine *e, adapter_id id, struct fault *fault)
{
    uint64_t pages = adapter_page_count(e->options.adapters, id) + pinned_by_steps(e);
    struct pool_stats pool;
    pool_stats(e->options.pool, &pool);
    enum status status = load_ever(e, id, pool.device_total, fault);
    if (status)
        return status;
    status = STATUS_FULL;
    if (pages <= pool.device_total && sequence_pages_allow(e, (uint32_t)pages))
        status = adapter_load(e->options.adapters, id);
    return status ? fault_set(fault, status,
                              "There is no room for its pages now: load it again a little later, "
                              "or let a request bring it.")
                  : STATUS_OK;
}

enum status residents_command(struct engine *e, const struct engine_adapter_command *c,
                              struct fault *fault)
{
    struct adapters *adapters = e->options.adapters;
    adapter_id id;
    if (c->kind == ENGINE_ADAPTER_ADD)
        return register_adapter(e, c, fault);
    enum status status = residents_find(e, c->name, c->owner, &id);
    if (status)
        return status;
    if (c->kind == ENGINE_ADAPTER_REMOVE && !may_change(e, id, c->owner))
        return fault_set(fault, STATUS_DENIED, "it is the operator's.");
    switch (c->kind) {
    case ENGINE_ADAPTER_REMOVE:
        return adapter_remove(adapters, c->name);
    case ENGINE_ADAPTER_LOAD:
        return load(e, id, fault);
    case ENGINE_ADAPTER_UNLOAD:
        return adapter_unload(adapters, id, fault);
    case ENGINE_ADAPTER_PIN:
        return pin(e, c, id, fault);
    case ENGINE_ADAPTER_UNPIN:
        adapter_let_go(adapters, id, c->owner); // its own claim; those of others stay
        return STATUS_OK;
    default:
        return STATUS_INVALID;
    }
}
