// SPDX-License-Identifier: Apache-2.0
// Sequences: slots, lists by state, admission, making room, coming back.
//
// Owns which sequences are running; does not decide rows (plan.c) nor touch the device (forward.c).
// Invariants: 1. a slot is in exactly the list of its state. 2. lists QUEUED, RUNNING and OUT are
// ordered by (class, arrival). 3. a sequence in a step is RUNNING, or ENDED with surplus rows, and
// is neither swapped nor dropped. 4. every sequence that left FREE gives one DONE event and then
// returns to FREE, when no step holds it any more.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/check.h"
#include "runtime/engine/internal.h"

// BESIDE_US: about a step, and who comes meanwhile waits that much longer; gates cost more than
// BESIDE_MIN_US saves.
enum { PARTS_WAIT_US = 2000000, CROWDED_US = 1000000, BESIDE_MIN_US = 5000, BESIDE_US = 30000 };

static bool goes_before(const struct sequence *a, const struct sequence *b)
{
    return a->class != b->class ? a->class < b->class : a->arrival < b->arrival;
}

static void list_remove(struct engine *e, struct sequence_list *list, uint32_t slot)
{
    struct sequence *s = &e->sequences[slot];
    if (s->previous == NO_SLOT)
        list->head = s->next;
    else
        e->sequences[s->previous].next = s->next;
    if (s->next == NO_SLOT)
        list->tail = s->previous;
    else
        e->sequences[s->next].previous = s->previous;
    list->count--;
}

// Keeps (class, arrival) order, searching from the tail, where a newcomer usually belongs.
static void list_insert(struct engine *e, struct sequence_list *list, uint32_t slot, bool ordered)
{
    struct sequence *s = &e->sequences[slot];
    uint32_t after = list->tail;
    while (ordered && after != NO_SLOT && goes_before(s, &e->sequences[after]))
        after = e->sequences[after].previous;
    s->previous = after;
    s->next = after == NO_SLOT ? list->head : e->sequences[after].next;
    if (s->next == NO_SLOT)
        list->tail = slot;
    else
        e->sequences[s->next].previous = slot;
    if (after == NO_SLOT)
        list->head = slot;
    else
        e->sequences[after].next = slot;
    list->count++;
}

static void adapter_runs(struct engine *engine, struct sequence *s, bool runs)
{
    if (runs == s->runs_adapter)
        return;
    s->runs_adapter = runs;
    if (runs)
        adapter_run(engine->options.adapters, s->adapter);
    else
        adapter_rest(engine->options.adapters, s->adapter);
}

void sequence_move(struct engine *engine, uint32_t slot, enum sequence_state state)
{
    struct sequence *s = &engine->sequences[slot];
    list_remove(engine, &engine->lists[s->state], slot);
    s->state = state;
    adapter_runs(engine, s, state == SEQUENCE_RUNNING && s->has_adapter);
    bool ordered = state == SEQUENCE_QUEUED || state == SEQUENCE_RUNNING || state == SEQUENCE_OUT;
    list_insert(engine, &engine->lists[state], slot, ordered);
}

uint32_t sequence_find(const struct engine *engine, uint64_t id)
{
    for (uint32_t slot = 0; slot < engine->sequence_slots; slot++) {
        const struct sequence *s = &engine->sequences[slot];
        if (s->state != SEQUENCE_FREE && s->state != SEQUENCE_ENDED && s->id == id)
            return slot;
    }
    return NO_SLOT;
}

static void release_held(struct engine *engine, struct sequence *s)
{
    if (s->has_kv)
        kv_close(engine->options.kv, s->kv);
    adapter_runs(engine, s, false);
    if (s->has_adapter)
        adapter_release(engine->options.adapters, s->adapter);
    s->has_kv = s->has_adapter = false;
}

void sequence_end(struct engine *engine, uint32_t slot, enum status status,
                  enum engine_finish finish, const char *message)
{
    struct sequence *s = &engine->sequences[slot];
    CHECK(s->state != SEQUENCE_FREE && s->state != SEQUENCE_ENDED);
    if (!s->in_steps)
        release_held(engine, s);
    s->end_status = status;
    s->finish = finish;
    (void)snprintf(s->message, sizeof s->message, "%s", message ? message : "");
    sequence_move(engine, slot, SEQUENCE_ENDED);
}

static bool emit_done(struct engine *engine, struct sequence *s)
{
    uint64_t now = clock_now_us(&engine->options.clock);
    sequence_adapter_came(engine, s);
    struct engine_done done = {.kind = ENGINE_DONE,
                               .status = (uint32_t)s->end_status,
                               .id = s->id,
                               .finish = (uint32_t)s->finish,
                               .prompt_tokens = s->prompt,
                               .cached_tokens = s->cached,
                               .generated_tokens = s->generated,
                               .queue_us = s->admitted_us ? s->admitted_us - s->arrived_us : 0,
                               .first_token_us =
                                   s->first_token_us ? s->first_token_us - s->arrived_us : 0,
                               .total_us = now - s->arrived_us,
                               .adapter_us = s->adapter_us,
                               .text_bytes = s->text.held_bytes};
    memcpy(done.message, s->message, sizeof done.message);
    memcpy(engine->record, &done, sizeof done);
    memcpy(engine->record + sizeof done, s->text.held, s->text.held_bytes);
    return output_event(engine, engine->record, sizeof done + s->text.held_bytes);
}

void sequence_flush_ended(struct engine *engine)
{
    struct sequence_list *list = &engine->lists[SEQUENCE_ENDED];
    for (uint32_t slot = list->head; slot != NO_SLOT;) {
        struct sequence *s = &engine->sequences[slot];
        uint32_t next = s->next;
        if (!s->done_sent) {
            if (!emit_done(engine, s))
                return;
            s->done_sent = true;
            engine->counters.finished += s->end_status == STATUS_OK;
            engine->counters.failed += s->end_status != STATUS_OK;
        }
        if (!s->in_steps)
            sequence_move(engine, slot, SEQUENCE_FREE);
        slot = next;
    }
}

// A step has released its rows: what had ended meanwhile lets go of what it holds.
void sequence_leave_step(struct engine *engine, uint32_t slot)
{
    struct sequence *s = &engine->sequences[slot];
    if (s->state == SEQUENCE_ENDED && !s->in_steps)
        release_held(engine, s);
}

bool sequence_is_over(const struct sequence *sequence, uint64_t now)
{
    return sequence->cancelled || (sequence->deadline_us && now >= sequence->deadline_us);
}

// Ends what was cancelled or is past its deadline.
bool sequence_end_if_over(struct engine *engine, uint32_t slot, uint64_t now)
{
    if (!sequence_is_over(&engine->sequences[slot], now))
        return false;
    if (engine->sequences[slot].cancelled)
        sequence_end(engine, slot, STATUS_CANCELLED, ENGINE_FINISH_CANCELLED,
                     "The request was cancelled.");
    else
        sequence_end(engine, slot, STATUS_DEADLINE, ENGINE_FINISH_ERROR,
                     "The deadline passed before the answer was complete.");
    return true;
}

// A paused step may wait for long: when one of its requests is over, or all had ended before, the
// step is given up. Its other rows are planned again from where they stood before it.
static void abandon_paused(struct engine *e, uint64_t now)
{
    for (int class = 0; class < ENGINE_CLASSES; class ++) {
        struct step *step = &e->steps[class];
        bool over = false;
        for (uint32_t i = 0; step->state == STEP_PAUSED && i < step->plan.runs; i++) {
            const struct sequence *s = &e->sequences[step->runs[i].slot];
            over = over || (s->state == SEQUENCE_RUNNING && sequence_is_over(s, now));
        }
        if (over)
            step_release_rows(e, step);
        else if (step->state == STEP_PAUSED)
            (void)ahead_give_up_surplus(e, step);
    }
}

void sequence_expire(struct engine *engine)
{
    uint64_t now = clock_now_us(&engine->options.clock);
    abandon_paused(engine, now);
    for (int state = SEQUENCE_QUEUED; state <= SEQUENCE_OUT; state++) {
        for (uint32_t slot = engine->lists[state].head; slot != NO_SLOT;) {
            const struct sequence *s = &engine->sequences[slot];
            uint32_t next = s->next;
            if (!s->in_steps) // what a step holds is looked at with its results (output.c)
                (void)sequence_end_if_over(engine, slot, now);
            slot = next;
        }
    }
}

// ---- room ----

static uint32_t pages_of_tokens(const struct engine *e, uint32_t tokens)
{
    const struct kv_shape *shape = &e->options.kv_shape;
    return (uint32_t)div_up(tokens, shape->block_tokens) * shape->pages_per_block;
}

// Would `more_pages` beside the KV of all sequences, on the device or on their way to it, the
// adapters of paused steps and those that are pinned leave the experts their floor?
bool sequence_pages_allow(const struct engine *engine, uint32_t more_pages)
{
    struct pool_stats pool;
    pool_stats(engine->options.pool, &pool);
    uint64_t held = pool.device_by_kind[PAGE_KV] - (uint64_t)kv_cached_blocks(engine->options.kv) *
                                                       engine->options.kv_shape.pages_per_block;
    for (int class = 0; class < ENGINE_CLASSES; class ++) {
        const struct step *step = &engine->steps[class];
        held += step->state == STEP_PAUSED ? step->adapter_pages : 0;
    }
    if (engine->options.adapters)
        held += adapters_kept_pages(engine->options.adapters);
    uint32_t floor = engine->options.experts
                         ? engine_expert_floor(&engine->options.model->expert_shape,
                                               engine->options.model->config.top_k)
                         : 0;
    return held + more_pages + floor <= pool.device_total;
}

// Would the adapters of paused steps, pinned ones and these pages keep to what the pool lets
// adapters have?
bool sequence_adapters_allow(const struct engine *engine, uint32_t adapter_pages)
{
    uint64_t held = adapter_pages;
    if (engine->options.adapters)
        held += adapters_kept_pages(engine->options.adapters);
    for (int class = 0; class < ENGINE_CLASSES; class ++) {
        const struct step *step = &engine->steps[class];
        held += step->state == STEP_PAUSED ? step->adapter_pages : 0;
    }
    return held <= pool_limit(engine->options.pool, PAGE_ADAPTER);
}

void sequence_drop_kv(struct engine *engine, uint32_t slot)
{
    struct sequence *s = &engine->sequences[slot];
    CHECK(!s->in_steps);
    if (s->has_kv)
        kv_close(engine->options.kv, s->kv);
    s->has_kv = false;
    s->computed = s->reserved = 0;
    engine->counters.drops++;
    sequence_move(engine, slot, SEQUENCE_QUEUED);
}

static bool someone_is_leaving(const struct engine *e)
{
    for (uint32_t slot = e->lists[SEQUENCE_OUT].head; slot != NO_SLOT;
         slot = e->sequences[slot].next) {
        if (kv_state(e->options.kv, e->sequences[slot].kv) == KV_LEAVING)
            return true;
    }
    return false;
}

// Notes who waits for room; of several the first in the order.
void sequence_want(struct engine *engine, uint32_t slot, uint32_t pages)
{
    struct want *want = &engine->want_next;
    if (want->slot == NO_SLOT ||
        goes_before(&engine->sequences[slot], &engine->sequences[want->slot]))
        *want = (struct want){.slot = slot, .pages = pages};
}

// Pages that this sequence must leave to one before it in the order that waits for them.
static uint32_t owed_pages(const struct engine *e, uint32_t slot)
{
    const struct want *want = &e->want;
    if (want->slot == NO_SLOT || want->slot == slot)
        return 0;
    const struct sequence *before = &e->sequences[want->slot];
    bool lives = before->state != SEQUENCE_FREE && before->state != SEQUENCE_ENDED;
    return lives && goes_before(before, &e->sequences[slot]) ? want->pages : 0;
}

static void send_out(struct engine *e, uint32_t slot, enum copy_class class)
{
    if (kv_swap_out(e->options.kv, e->sequences[slot].kv, class)) {
        sequence_drop_kv(e, slot);
    } else {
        e->counters.swaps_out++;
        sequence_move(e, slot, SEQUENCE_OUT);
    }
}

// Whom to send out for a sequence: one that its client has paused, else the last in the order, if
// it comes after. NO_SLOT: nobody.
static uint32_t find_victim(const struct engine *e, uint32_t for_slot)
{
    const struct sequence *wanting = &e->sequences[for_slot];
    uint32_t last = NO_SLOT;
    for (uint32_t slot = e->lists[SEQUENCE_RUNNING].tail; slot != NO_SLOT;
         slot = e->sequences[slot].previous) {
        const struct sequence *victim = &e->sequences[slot];
        if (slot == for_slot || victim->in_steps || !victim->has_kv)
            continue;
        if (victim->paused)
            return slot;
        if (last == NO_SLOT && goes_before(wanting, victim))
            last = slot;
    }
    return last;
}

// Takes pages from another sequence. True when pages are on their way; the caller tries again at
// the next turn, and until then those after it in the order leave it `pages`.
bool sequence_make_room(struct engine *engine, uint32_t for_slot, uint32_t pages)
{
    sequence_want(engine, for_slot, pages);
    engine->short_of_room = true;
    if (engine->plans_ahead)
        return false; // the plan after the running step does it
    if (someone_is_leaving(engine))
        return true;
    uint32_t victim = find_victim(engine, for_slot);
    if (victim == NO_SLOT)
        return false;
    send_out(engine, victim, (enum copy_class)engine->sequences[for_slot].class);
    return true;
}

uint32_t sequence_adapter_pages(const struct engine *engine, bool has_adapter, adapter_id adapter)
{
    const struct adapters *adapters = engine->options.adapters;
    return has_adapter && !adapter_is_kept(adapters, adapter)
               ? adapter_page_count(adapters, adapter)
               : 0;
}

// Pages with which a sequence of `tokens` tokens can run, beside the adapters that are pinned.
uint32_t sequence_pages_needed(const struct engine *engine, uint32_t tokens, bool has_adapter,
                               adapter_id adapter)
{
    return pages_of_tokens(engine, tokens) + sequence_adapter_pages(engine, has_adapter, adapter);
}

// Would the KV of all sequences, and these tokens more, keep to what the pool lets KV have?
static bool kv_limit_allows(const struct engine *e, uint32_t tokens, uint32_t more_pages)
{
    struct pool_stats pool;
    pool_stats(e->options.pool, &pool);
    uint64_t held = pool.device_by_kind[PAGE_KV] -
                    (uint64_t)kv_cached_blocks(e->options.kv) * e->options.kv_shape.pages_per_block;
    return held + pages_of_tokens(e, tokens) + more_pages <= pool_limit(e->options.pool, PAGE_KV);
}

static uint32_t pages_to_start(const struct engine *e, const struct sequence *s)
{
    // A token more than it has, so that it does not leave again at once.
    uint32_t tokens = s->length < e->options.context_max ? s->length + 1 : s->length;
    return sequence_pages_needed(e, tokens, s->has_adapter, s->adapter);
}

// Not held by a step, or by the running one alone while the next is planned ahead.
static bool may_be_planned(const struct sequence *s)
{
    return !s->in_steps || s->ahead.goes_on;
}

// A seat: sequences_max sequences of its class and of more urgent ones may take part in planning.
// Those of less urgent classes keep their KV and wait; those of paused steps and of paused clients
// do not count.
static bool has_seat(const struct engine *e, uint32_t slot)
{
    uint32_t class = e->sequences[slot].class, seats = 0;
    for (uint32_t i = e->lists[SEQUENCE_RUNNING].head; i != NO_SLOT; i = e->sequences[i].next)
        seats += e->sequences[i].class <= class && !e->sequences[i].paused &&
                 may_be_planned(&e->sequences[i]);
    for (uint32_t i = e->lists[SEQUENCE_OUT].head; i != NO_SLOT; i = e->sequences[i].next)
        seats += e->sequences[i].class <= class && !e->sequences[i].paused &&
                 kv_state(e->options.kv, e->sequences[i].kv) == KV_COMING;
    return seats < e->options.sequences_max;
}

// Those that have arrived run again; those whose KV was lost on the way start anew.
static void settle_out(struct engine *e)
{
    for (uint32_t slot = e->lists[SEQUENCE_OUT].head; slot != NO_SLOT;) {
        uint32_t next = e->sequences[slot].next;
        enum kv_state state = kv_state(e->options.kv, e->sequences[slot].kv);
        if (state == KV_RESIDENT)
            sequence_move(e, slot, SEQUENCE_RUNNING);
        else if (state == KV_LOST)
            sequence_drop_kv(e, slot);
        slot = next;
    }
}

// Pages of the adapters that the sequences of coming steps need, but for this one's: those that
// run, without what paused steps hold, which sequence_pages_allow counts.
static uint32_t adapters_beside(const struct engine *e, const struct sequence *s)
{
    const adapter_id none = {0};
    if (!e->options.adapters)
        return 0;
    uint32_t pages =
        adapters_running_pages(e->options.adapters, s->has_adapter ? s->adapter : none);
    for (int class = 0; class < ENGINE_CLASSES; class ++) {
        const struct step *step = &e->steps[class];
        uint32_t held = step->state == STEP_PAUSED ? step->adapter_pages : 0;
        pages -= held < pages ? held : pages;
    }
    return pages;
}

void sequence_bring_back(struct engine *engine)
{
    struct kv *kv = engine->options.kv;
    settle_out(engine);
    for (uint32_t slot = engine->lists[SEQUENCE_OUT].head; slot != NO_SLOT;) {
        struct sequence *s = &engine->sequences[slot];
        uint32_t next = s->next;
        if (!s->paused && kv_state(kv, s->kv) == KV_SWAPPED) {
            uint32_t pages = pages_to_start(engine, s);
            if (!has_seat(engine, slot))
                return; // in order: nobody behind it may take what it waits for
            uint32_t beside = adapters_beside(engine, s) + owed_pages(engine, slot);
            if (!sequence_pages_allow(engine, pages + beside) ||
                !kv_limit_allows(engine, s->length + 1, owed_pages(engine, slot)) ||
                kv_swap_in(kv, s->kv, (enum copy_class)s->class)) {
                (void)sequence_make_room(engine, slot, pages);
                return;
            }
            engine->counters.swaps_in++;
        }
        slot = next;
    }
}

// ---- admission ----

// When nobody runs who would wait with it, a sequence begins while the last parts come: gates bring
// those that its first layers need. How long that takes is told by how long the others took.
static bool may_begin_beside(const struct engine *e, const struct sequence *s, uint32_t coming)
{
    uint32_t there = adapter_parts_there(e->options.adapters, s->adapter);
    uint32_t came = there > s->parts_had ? there - s->parts_had : 0;
    uint64_t took_us = clock_now_us(&e->options.clock) - s->parts_asked_us;
    return !e->lists[SEQUENCE_RUNNING].count &&
           took_us * coming >= (uint64_t)BESIDE_MIN_US * came &&
           took_us * coming <= (uint64_t)BESIDE_US * came;
}

// Its trunk is there, and of its parts what could be had when it came: so the batch does not wait
// at gates for one sequence's adapter. After PARTS_WAIT_US they have to bring the rest.
static bool adapter_ready(const struct engine *e, const struct sequence *s)
{
    struct adapters *adapters = e->options.adapters;
    if (!s->has_adapter)
        return true;
    if (!adapter_is_resident(adapters, s->adapter))
        return false;
    if (adapter_is_whole(adapters, s->adapter))
        return true;
    uint32_t coming = adapter_parts_coming(adapters, s->adapter);
    return (s->parts_begun && (!coming || may_begin_beside(e, s, coming))) ||
           (s->parts_asked_us &&
            clock_now_us(&e->options.clock) - s->parts_asked_us >= PARTS_WAIT_US);
}

void sequence_adapter_lacks(struct engine *engine, struct sequence *sequence)
{
    if (!sequence->adapter_since_us)
        sequence->adapter_since_us = clock_now_us(&engine->options.clock);
}

void sequence_adapter_came(struct engine *engine, struct sequence *sequence)
{
    if (sequence->adapter_since_us)
        sequence->adapter_us += clock_now_us(&engine->options.clock) - sequence->adapter_since_us;
    sequence->adapter_since_us = 0;
}

// That some token of a prompt of this length goes to an expert, if they are chosen evenly.
static float expert_likely(const struct engine *e, uint32_t tokens)
{
    const struct model_config *c = &e->options.model->config;
    return 1.0f - powf(1.0f - (float)c->top_k / (float)c->experts, (float)tokens);
}

static void fetch_adapter(struct engine *e, struct sequence *s)
{
    struct adapters *adapters = e->options.adapters;
    enum status status =
        adapter_fetch(adapters, s->adapter, (enum copy_class)s->class, COPY_ADAPTER);
    if (status || s->parts_begun)
        return; // no room now: the next turn tries again; a failed read ends the request there
    if (!s->parts_asked_us) {
        s->parts_asked_us = clock_now_us(&e->options.clock) | 1;
        s->parts_had = adapter_parts_there(adapters, s->adapter);
    }
    s->parts_begun = adapter_fetch_parts(adapters, s->adapter, (enum copy_class)s->class,
                                         expert_likely(e, s->length), &s->parts_next);
}

void sequence_continue_parts(struct engine *engine)
{
    for (uint32_t slot = engine->lists[SEQUENCE_QUEUED].head; slot != NO_SLOT;
         slot = engine->sequences[slot].next) {
        struct sequence *s = &engine->sequences[slot];
        if (s->parts_asked_us && !s->parts_begun && !s->cancelled)
            fetch_adapter(engine, s);
    }
}

static struct digest prefix_root(const struct engine *e, const struct sequence *s)
{
    struct {
        struct digest salt, base, adapter;
    } parts;
    memset(&parts, 0, sizeof parts);
    parts.salt = e->salts[s->tenant];
    parts.base = e->options.model->digests.model;
    if (s->has_adapter)
        parts.adapter = adapter_digest(e->options.adapters, s->adapter);
    return hash_bytes(&e->options.secret, &parts, sizeof parts);
}

static bool start(struct engine *e, uint32_t slot)
{
    struct sequence *s = &e->sequences[slot];
    struct digest root = prefix_root(e, s);
    if (kv_open(e->options.kv, s->tenant, &root, &s->kv))
        return false;
    s->has_kv = true;
    s->computed = kv_match_prefix(e->options.kv, s->kv, s->tokens, s->length);
    if (!s->admitted_us) {
        s->admitted_us = clock_now_us(&e->options.clock);
        s->cached = s->computed < s->prompt ? s->computed : s->prompt;
        e->counters.cached_tokens += s->cached;
    }
    sequence_adapter_came(e, s);
    sequence_move(e, slot, SEQUENCE_RUNNING);
    return true;
}

// The first swapped-out sequence that wants to come back.
static uint32_t first_out(const struct engine *e)
{
    uint32_t slot = e->lists[SEQUENCE_OUT].head;
    while (slot != NO_SLOT && e->sequences[slot].paused)
        slot = e->sequences[slot].next;
    return slot;
}

// A fetch that it waits for has failed.
static bool adapter_is_lost(const struct engine *e, const struct sequence *s)
{
    struct adapters *adapters = e->options.adapters;
    return s->has_adapter &&
           (adapter_fetch_status(adapters, s->adapter) == STATUS_IO ||
            (s->parts_asked_us && adapter_parts_status(adapters, s->adapter) == STATUS_IO));
}

// All pages of the adapters beside its own that run for sequences as urgent as this one. What
// clients have paused does not count.
static uint64_t running_whole(const struct engine *e, const struct sequence *s)
{
    uint64_t pages = 0;
    for (uint32_t i = e->lists[SEQUENCE_RUNNING].head; i != NO_SLOT; i = e->sequences[i].next) {
        const struct sequence *other = &e->sequences[i];
        bool counts = other->has_adapter && !other->paused && other->class <= s->class &&
                      other->adapter.bits != s->adapter.bits;
        for (uint32_t k = other->previous; counts && k != NO_SLOT; k = e->sequences[k].previous)
            counts = !e->sequences[k].has_adapter || e->sequences[k].paused ||
                     e->sequences[k].adapter.bits != other->adapter.bits;
        pages += counts ? adapter_pages_whole(e->options.adapters, other->adapter) : 0;
    }
    return pages;
}

// May its adapter run beside those that run (and `awaited` pages) without that their parts drive
// each other and the experts out, step by step? Within half a second a sequence touches most parts
// of its adapter, so they are counted whole; experts as far as they could all be there, else half
// the pool. Too tight is slow, not wrong: somebody may always run.
static bool parts_have_room(const struct engine *e, const struct sequence *s, uint64_t awaited)
{
    struct pool_stats pool;
    struct expert_stats experts;
    pool_stats(e->options.pool, &pool);
    experts_stats(e->options.experts, &experts);
    uint64_t all = experts.total * e->options.model->expert_shape.pages_per_expert;
    uint64_t others = running_whole(e, s) + awaited;
    uint64_t held = pool.device_by_kind[PAGE_KV] -
                    (uint64_t)kv_cached_blocks(e->options.kv) * e->options.kv_shape.pages_per_block;
    held += all < pool.device_total ? all : pool.device_total / 2;
    return !others || held + others + adapter_pages_whole(e->options.adapters, s->adapter) <=
                          pool.device_total;
}

// Does a queued sequence before this one use the same adapter?
static bool queued_before(const struct engine *e, uint32_t slot)
{
    const struct sequence *s = &e->sequences[slot];
    for (uint32_t i = s->previous; i != NO_SLOT; i = e->sequences[i].previous)
        if (e->sequences[i].has_adapter && e->sequences[i].adapter.bits == s->adapter.bits)
            return true;
    return false;
}

// Does it wait until adapters that run leave room for its adapter's parts? It does not stop those
// behind it then. CROWDED_US is the longest: then it goes all the same, one such in that time, so
// that nobody is kept out for as long as others care to run, and not many drive each other out.
static bool waits_for_parts(struct engine *e, uint32_t slot, uint64_t awaited)
{
    struct sequence *s = &e->sequences[slot];
    struct adapters *adapters = e->options.adapters;
    if (!s->has_adapter || s->parts_asked_us || !adapter_has_parts(adapters, s->adapter) ||
        parts_have_room(e, s, queued_before(e, slot) ? 0 : awaited))
        return false;
    uint64_t now = clock_now_us(&e->options.clock);
    s->crowded_us = s->crowded_us ? s->crowded_us : now;
    if (now - s->crowded_us < CROWDED_US || now - e->crowded_us < CROWDED_US)
        return true;
    e->crowded_us = now;
    return false;
}

// Queued sequences in order, as long as seats and pages last. A sequence whose adapter is on its
// way waits alone; one that finds no pages stops those behind it, so that big requests are not
// starved.
void sequence_admit(struct engine *engine)
{
    const struct engine_options *o = &engine->options;
    uint32_t awaited = 0, awaited_kv = 0; // pages of those whose adapter is on its way
    uint64_t awaited_whole = 0;
    for (uint32_t slot = engine->lists[SEQUENCE_QUEUED].head; slot != NO_SLOT;) {
        struct sequence *s = &engine->sequences[slot];
        uint32_t next = s->next, out = first_out(engine);
        if (out != NO_SLOT && goes_before(&engine->sequences[out], s))
            return;
        if (adapter_is_lost(engine, s)) {
            sequence_end(engine, slot, STATUS_IO, ENGINE_FINISH_ERROR,
                         "Reading the adapter from its store failed; ask the operator.");
        } else if (!s->paused) {
            uint32_t pages = pages_to_start(engine, s);
            uint32_t kv = pages_of_tokens(engine, s->length + 1);
            uint32_t adapters = adapters_beside(engine, s) + awaited - awaited_kv;
            if (!has_seat(engine, slot))
                return;
            s->is_crowded = waits_for_parts(engine, slot, awaited_whole);
            if (s->is_crowded) {
                slot = next;
                continue;
            }
            if (!sequence_pages_allow(engine,
                                      pages + adapters + awaited_kv + owed_pages(engine, slot)) ||
                !kv_limit_allows(engine, s->length + 1, awaited_kv + owed_pages(engine, slot)) ||
                !sequence_adapters_allow(engine, pages - kv + adapters)) {
                if (!awaited)
                    (void)sequence_make_room(engine, slot, pages);
                return;
            }
            if (!adapter_ready(engine, s)) {
                sequence_adapter_lacks(engine, s);
                fetch_adapter(engine, s);
                sequence_want(engine, slot, pages);
                awaited += pages;
                awaited_kv += kv;
                if (!queued_before(engine, slot))
                    awaited_whole += adapter_pages_whole(o->adapters, s->adapter);
            } else if (!start(engine, slot)) {
                return;
            }
        }
        slot = next;
    }
}

uint32_t sequence_candidates(struct engine *engine)
{
    uint32_t count = 0;
    for (uint32_t slot = engine->lists[SEQUENCE_RUNNING].head; slot != NO_SLOT;
         slot = engine->sequences[slot].next) {
        const struct sequence *s = &engine->sequences[slot];
        if (!may_be_planned(s) || s->paused || s->cancelled)
            continue;
        uint32_t computed = s->ahead.goes_on ? s->ahead.computed : s->computed;
        uint32_t length = s->length + (s->ahead.goes_on && s->ahead.samples);
        engine->candidates[count++] = (struct plan_candidate){
            .slot = slot,
            .class = s->class,
            .arrival = s->arrival,
            .tenant = s->tenant,
            .position = computed,
            .pending = length - computed,
            .adapter = s->has_adapter ? adapter_view_index(engine->options.adapters, s->adapter)
                                      : PLAN_NO_ADAPTER,
        };
    }
    return count;
}

// Adapters of queued sequences that are more urgent than the running step come while it runs.
void sequence_fetch_ahead(struct engine *engine, uint32_t class_below)
{
    for (uint32_t slot = engine->lists[SEQUENCE_QUEUED].head; slot != NO_SLOT;
         slot = engine->sequences[slot].next) {
        struct sequence *s = &engine->sequences[slot];
        if (s->class >= class_below)
            return;
        if (s->paused || s->cancelled || adapter_ready(engine, s))
            continue;
        if (sequence_pages_allow(engine, pages_to_start(engine, s)))
            fetch_adapter(engine, s);
        return; // one at a time: they are in order
    }
}

// The most urgent class that has something to run outside the steps, for preemption.
// Nothing that it waits for is still to come, as far as can be seen without looking for room.
static bool could_run(const struct engine *e, const struct sequence *s)
{
    if (s->in_steps || s->paused || s->cancelled)
        return false;
    if (s->state == SEQUENCE_QUEUED)
        return !s->is_crowded && adapter_ready(e, s);
    return !s->has_adapter || adapter_is_resident(e->options.adapters, s->adapter);
}

uint32_t sequence_waiting_class(const struct engine *engine)
{
    uint32_t class = UINT32_MAX;
    for (int state = SEQUENCE_QUEUED; state <= SEQUENCE_RUNNING; state++) {
        for (uint32_t slot = engine->lists[state].head; slot != NO_SLOT;
             slot = engine->sequences[slot].next) {
            const struct sequence *s = &engine->sequences[slot];
            if (!could_run(engine, s))
                continue;
            if (s->class < class)
                class = s->class;
            break; // the list is ordered
        }
    }
    return class;
}
