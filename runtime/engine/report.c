// SPDX-License-Identifier: Apache-2.0
// Numbers as JSON text for stats and adapters.list. Names were checked when they were registered,
// so they need no escaping.
#include <stdarg.h>
#include <stdio.h>

#include "runtime/engine/internal.h"

// ADAPTER_BYTES: one adapter as text, with a margin.
enum { ADAPTER_BYTES = 2048 };

struct writer {
    char *out;
    size_t room, at;
};

static void put(struct writer *w, const char *format, ...) PRINTF_LIKE(2, 3);

static void put(struct writer *w, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    int n = vsnprintf(w->out + w->at, w->room - w->at, format, list);
    va_end(list);
    if (n > 0)
        w->at += (size_t)n < w->room - w->at ? (size_t)n : w->room - w->at - 1;
}

static void put_pool(struct writer *w, struct engine *e)
{
    static const char *const kinds[PAGE_KINDS] = {"kv", "adapter", "expert"};
    struct pool_stats p;
    pool_stats(e->options.pool, &p);
    put(w, "\"pool\":{\"page_bytes\":%zu,\"pages\":%u,\"free\":%u,\"waiting\":%u", p.page_bytes,
        p.device_total, p.device_free, p.device_waiting);
    for (int k = 0; k < PAGE_KINDS; k++)
        put(w, ",\"%s\":%u", kinds[k], p.device_by_kind[k]);
    put(w,
        ",\"host_pages\":%u,\"host_free\":%u,\"fetches\":%llu,\"give_backs\":%llu,\"write_backs\":%"
        "llu",
        p.host_total, p.host_free, (unsigned long long)p.fetches, (unsigned long long)p.give_backs,
        (unsigned long long)p.write_backs);
    put(w, ",\"taken_from\":{");
    for (int k = 0; k < PAGE_KINDS; k++) {
        put(w, "%s\"%s\":{", k ? "," : "", kinds[k]);
        for (int f = 0; f < PAGE_KINDS; f++)
            put(w, "%s\"%s\":%llu", f ? "," : "", kinds[f], (unsigned long long)p.taken_from[k][f]);
        put(w, "}");
    }
    put(w, "}}");
}

static void put_kv(struct writer *w, struct engine *e)
{
    struct kv_stats k;
    kv_stats(e->options.kv, &k);
    put(w,
        ",\"kv\":{\"reserved_bytes\":%llu,\"used_bytes\":%llu,\"cached_blocks\":%llu,"
        "\"prefix_queries\":%llu,\"prefix_hits\":%llu,\"swapped_out\":%llu,\"swapped_in\":%llu}",
        (unsigned long long)k.reserved_bytes, (unsigned long long)k.used_bytes,
        (unsigned long long)k.cached_blocks, (unsigned long long)k.prefix_queries,
        (unsigned long long)k.prefix_hits, (unsigned long long)k.swapped_out,
        (unsigned long long)k.swapped_in);
}

static void put_copies(struct writer *w, struct engine *e)
{
    struct copy_stats c;
    copy_stats(e->options.copies, &c);
    put(w,
        ",\"copies\":{\"h2d_bytes\":%llu,\"d2h_bytes\":%llu,\"read_bytes\":%llu,\"cancelled\":%"
        "llu}",
        (unsigned long long)c.bytes[COPY_H2D], (unsigned long long)c.bytes[COPY_D2H],
        (unsigned long long)c.bytes[COPY_READ], (unsigned long long)c.cancelled);
}

static void put_experts(struct writer *w, struct engine *e)
{
    struct expert_stats x = {0};
    if (e->options.experts)
        experts_stats(e->options.experts, &x);
    put(w,
        ",\"experts\":{\"resident\":%llu,\"total\":%llu,\"hits\":%llu,\"misses\":%llu,"
        "\"fetched_bytes\":%llu}",
        (unsigned long long)x.resident, (unsigned long long)x.total, (unsigned long long)x.hits,
        (unsigned long long)x.misses, (unsigned long long)x.fetched_bytes);
}

static void put_loads(struct writer *w, const struct adapter_loads *l)
{
    put(w,
        "\"hits\":%llu,\"misses\":%llu,\"loads\":%llu,\"load_us\":%llu,\"load_us_max\":%llu,"
        "\"part_pages\":%llu,\"part_misses\":%llu",
        (unsigned long long)l->hits, (unsigned long long)l->misses, (unsigned long long)l->loads,
        (unsigned long long)l->load_us, (unsigned long long)l->load_us_max,
        (unsigned long long)l->part_pages, (unsigned long long)l->part_misses);
}

static void put_adapters(struct writer *w, struct engine *e)
{
    struct adapters_stats a = {0};
    struct pool_stats p;
    pool_stats(e->options.pool, &p);
    if (e->options.adapters)
        adapters_stats(e->options.adapters, &a);
    put(w,
        ",\"adapters\":{\"registered\":%u,\"leaving\":%u,\"pinned\":%u,\"pinned_bytes\":%llu,"
        "\"resident\":%u,\"fetching\":%u,"
        "\"resident_bytes\":%llu,\"fetches\":%llu,\"given_back\":%llu,\"parts_given_back\":%llu,",
        a.registered, a.leaving, a.kept, (unsigned long long)a.kept_pages * p.page_bytes,
        a.resident, a.fetching, (unsigned long long)a.resident_pages * p.page_bytes,
        (unsigned long long)a.fetches, (unsigned long long)a.given_back,
        (unsigned long long)a.parts_given_back);
    put_loads(w, &a.loads);
    put(w, "}");
}

size_t report_stats(struct engine *engine, char *out, size_t room)
{
    struct writer w = {.out = out, .room = room};
    struct engine_counters c;
    engine_counters(engine, &c);
    put(&w,
        "{\"requests\":{\"total\":%llu,\"finished\":%llu,\"failed\":%llu,\"running\":%u,"
        "\"waiting\":%u}",
        (unsigned long long)c.requests, (unsigned long long)c.finished,
        (unsigned long long)c.failed, c.running, c.waiting);
    put(&w, ",\"tokens\":{\"prompt\":%llu,\"cached\":%llu,\"generated\":%llu}",
        (unsigned long long)c.prompt_tokens, (unsigned long long)c.cached_tokens,
        (unsigned long long)c.generated_tokens);
    put(&w,
        ",\"engine\":{\"steps\":%llu,\"rows\":%llu,\"segments\":%llu,\"gate_misses\":%llu,"
        "\"pauses\":%llu,\"swaps_out\":%llu,\"swaps_in\":%llu,\"drops\":%llu,"
        "\"half_rows_run\":%llu,\"half_rows_due\":%llu,\"rows_recomputed\":%llu,"
        "\"planned_ahead\":%llu,\"ahead_dropped\":%llu,\"rows_surplus\":%llu},",
        (unsigned long long)c.steps, (unsigned long long)c.rows, (unsigned long long)c.segments,
        (unsigned long long)c.gate_misses, (unsigned long long)c.pauses,
        (unsigned long long)c.swaps_out, (unsigned long long)c.swaps_in,
        (unsigned long long)c.drops, (unsigned long long)c.half_rows_run,
        (unsigned long long)c.half_rows_due, (unsigned long long)c.rows_recomputed,
        (unsigned long long)c.planned_ahead, (unsigned long long)c.ahead_dropped,
        (unsigned long long)c.rows_surplus);
    put_pool(&w, engine);
    put_kv(&w, engine);
    put_copies(&w, engine);
    put_experts(&w, engine);
    put_adapters(&w, engine);
    put(&w, "}");
    return w.at;
}

// claimed: the tenant that asks has pinned it.
static void put_adapter(struct writer *w, const struct engine *e, const struct adapter_info *info,
                        uint32_t tenant, size_t page_bytes)
{
    const struct adapters *adapters = e->options.adapters;
    char digest[2 * DIGEST_BYTES + 1], source[2 * DIGEST_BYTES + 1];
    unsigned long long bytes = (unsigned long long)info->pages * page_bytes;
    digest_hex(&info->report.digest, digest);
    digest_hex(&info->report.source, source);
    put(w, "{\"name\":\"%s\",\"owner\":%u,\"pinned\":%s,\"claimed\":%s", info->name, info->owner,
        adapter_is_kept(adapters, info->id) ? "true" : "false",
        adapter_is_kept_by(adapters, info->id, tenant) ? "true" : "false");
    put(w,
        ",\"resident\":%s,\"pages\":%u,\"users\":%u,"
        "\"device_bytes\":%llu,\"host_bytes\":%llu,\"file_bytes\":%llu,"
        "\"rank_min\":%u,\"rank_max\":%u,\"bytes\":%llu,\"applied\":%u,\"possible\":%u,"
        "\"layout\":\"%s\",\"version\":%u,\"digest\":\"%s\",\"source\":\"%s\",",
        info->resident ? "true" : "false", info->pages, info->users,
        (unsigned long long)info->device_pages * page_bytes,
        (unsigned long long)info->host_pages * page_bytes, bytes, info->report.rank_min,
        info->report.rank_max, (unsigned long long)info->report.bytes,
        info->report.matrices_applied, info->report.matrices_possible, info->report.layout,
        info->report.version, digest, source);
    put_loads(w, &info->loads);
    put(w, "}");
}

size_t report_adapters(struct engine *engine, const struct engine_list *list, char *out,
                       size_t room)
{
    struct writer w = {.out = out, .room = room};
    const struct adapters *adapters = engine->options.adapters;
    struct adapter_info info;
    struct pool_stats p;
    pool_stats(engine->options.pool, &p);
    uint32_t at = adapters ? adapters_behind(adapters, list->after) : 0, count = 0;
    put(&w, "{\"adapters\":[");
    for (; adapters && count < list->limit && w.at + ADAPTER_BYTES < room &&
           adapter_at(adapters, at + count, &info);
         count++) {
        put(&w, "%s", count ? "," : "");
        put_adapter(&w, engine, &info, list->tenant, p.page_bytes);
    }
    bool more = adapters && at + count < adapters_count(adapters);
    put(&w, "],\"more\":%s}", more ? "true" : "false");
    return w.at;
}
