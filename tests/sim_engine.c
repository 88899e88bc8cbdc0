// SPDX-License-Identifier: Apache-2.0
// The engine under simulation: everything real but the device's arithmetic, the link, the storage
// and the clock (sim_world.h), random work by seed (sim_requests.h), every invariant checked while
// it runs.
//
//   sim_engine [--mode random|forced|entry|faults] [--seed N] [--seeds N] [--steps N] [--thorough]
//
// random   small pools, bursts, cancels, pauses, deadlines, adapters that come and go; by seed
//          some steps are forced to be left. --steps engine steps over --seeds seeds.
// forced   every step is left at every preemption point; nothing may run twice.
// entry    long batch work, now and then an interactive request: how many half-layers pass before
//          it enters.
// faults   the n-th allocation, submit, segment or chunk of a read or copy fails, for n over a
//          short scenario (--thorough: each n).
//
// A failure prints the command line that shows it again.
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "sim_requests.h"

// Ten times the longest wait seen in 1 M steps (fake time; a chunk on the link takes up to 210 us).
enum { HEAD_WAIT_MAX_US = 2000000, CLOSING_TURNS_MAX = 3000000, POSITIONS = 40 };

struct arguments {
    const char *mode;
    uint64_t seed, seeds, steps;
    bool thorough, verbose;
    uint64_t fail_alloc, fail_chunk, fail_submit, fail_segment, lose_copies;
};

struct sim {
    struct sim_world world;
    struct book book;
    struct rng rng;
    uint64_t turns;
    uint64_t pinned_turns; // in which some adapter was pinned
    uint32_t check_every, leave_per_mille, arrivals_per_mille, others_per_mille, phase_left,
        stall_left;
    uint64_t halves_at_arrival, entries, entry_halves, entry_halves_max; // mode entry
    bool entry_waits, step_is_urgent; // the last step that was entered has class 0
};

struct totals {
    struct engine_counters engine;
    struct book_counts book;
    uint64_t turns, pinned_turns, entry_halves_max, submits, chunks, allocs;
    struct pool_stats pool;
    struct kv_stats kv;
};

// For the signal handler alone.
static char again[256];

static void on_abort(int signal_number)
{
    (void)signal_number;
    ssize_t ignored = write(STDERR_FILENO, again, strlen(again));
    (void)ignored;
    _exit(1);
}

static void remember(const struct arguments *a, uint32_t seed_count)
{
    (void)snprintf(
        again, sizeof again,
        "again: sim_engine --mode %s --seed %llu --seeds %u --steps %llu%s --fail-alloc %llu "
        "--fail-chunk %llu --fail-submit %llu --fail-segment %llu --lose-copies %llu\n",
        a->mode, (unsigned long long)a->seed, seed_count, (unsigned long long)(a->steps / a->seeds),
        a->thorough ? " --thorough" : "", (unsigned long long)a->fail_alloc,
        (unsigned long long)a->fail_chunk, (unsigned long long)a->fail_submit,
        (unsigned long long)a->fail_segment, (unsigned long long)a->lose_copies);
}

static uint32_t below(struct sim *sim, uint32_t n)
{
    return (uint32_t)rng_below(&sim->rng, n);
}

// ---- hooks ----

static bool leave(void *context, uint32_t step_class, uint32_t half)
{
    struct sim *sim = context;
    (void)step_class;
    (void)half;
    return below(sim, 1000) < sim->leave_per_mille;
}

static void on_plan(void *context, const char *line)
{
    struct sim *sim = context;
    struct fake_device_counts counts;
    sim->step_is_urgent = strstr(line, " class 0 rows ");
    if (!sim->entry_waits || !sim->step_is_urgent)
        return;
    fake_device_counts(sim->world.device, &counts);
    uint64_t halves = counts.halves - sim->halves_at_arrival;
    sim->entry_waits = false;
    sim->entries++;
    sim->entry_halves += halves;
    if (halves > sim->entry_halves_max)
        sim->entry_halves_max = halves;
}

// ---- one turn ----

static void new_phase(struct sim *sim)
{
    static const uint32_t arrivals[] = {1, 5, 20, 100}, lives[] = {1, 3, 10, 24, BOOK_ROOM};
    sim->phase_left = 100 + below(sim, 4000);
    sim->arrivals_per_mille = arrivals[below(sim, 4)];
    uint32_t places = sim->world.options.sequences_max + sim->world.options.queue_max;
    sim->book.live_max = lives[below(sim, 5)];
    if (sim->book.live_max > places && below(sim, 8))
        sim->book.live_max = places / 2 + below(sim, places);
    if (below(sim, 12) == 0)
        sim->stall_left = below(sim, 3000); // a front end that does not drain
}

static void advance_clock(struct sim *sim, enum engine_turn turn)
{
    uint64_t *now = &sim->world.now_us, next = sim_world_next_us(&sim->world);
    if (turn == ENGINE_BUSY)
        *now += below(sim, 3);
    else if (next == UINT64_MAX)
        *now += 20;
    else
        *now = (next > *now ? next : *now) + below(sim, 3);
}

static enum engine_turn one_turn(struct sim *sim)
{
    enum engine_turn turn = engine_turn(sim->world.engine);
    if (++sim->turns % sim->check_every == 0)
        engine_check(sim->world.engine);
    sim->pinned_turns += adapters_kept_pages(sim->world.adapters) > 0;
    if (sim->stall_left)
        sim->stall_left--;
    else
        book_take_events(&sim->book, 1 + below(sim, 64));
    if (sim->turns % 8 == 0)
        book_watch(&sim->book, HEAD_WAIT_MAX_US);
    advance_clock(sim, turn);
    return turn;
}

static void work(struct sim *sim)
{
    if (!sim->phase_left--)
        new_phase(sim);
    uint32_t draw = below(sim, 1000);
    if (draw < sim->arrivals_per_mille || !sim->book.live)
        (void)book_send_request(&sim->book);
    else if (draw > 1000 - sim->others_per_mille)
        book_send_other(&sim->book);
}

// Ends by drain or by quit, and checks that nothing is left.
static void close_sim(struct sim *sim, bool quit, struct totals *totals)
{
    struct book *book = &sim->book;
    struct fake_device_counts device;
    uint64_t limit = sim->turns + CLOSING_TURNS_MAX;
    bool told = false;
    while (one_turn(sim) != ENGINE_HALTED) {
        if (!told)
            told = book_control(book, quit ? ENGINE_QUIT : ENGINE_DRAIN, 0);
        book->draining = told || book->draining;
        book->quitting = (told && quit) || book->quitting;
        book_resume_all(book);
        CHECK(sim->turns < limit);
    }
    sim->stall_left = 0;
    book_take_events(book, UINT32_MAX);
    CHECK(book->stopped && !book->live && !book->replies_due);
    CHECK(book->counts.sent == book->counts.done);
    engine_check(sim->world.engine);
    engine_counters(sim->world.engine, &totals->engine);
    totals->book = book->counts;
    totals->turns = sim->turns;
    totals->pinned_turns = sim->pinned_turns;
    totals->entry_halves_max = sim->entry_halves_max;
    pool_stats(sim->world.pool, &totals->pool);
    kv_stats(sim->world.kv, &totals->kv);
    fake_device_counts(sim->world.device, &device);
    totals->submits = device.submits;
    totals->allocs = device.allocs;
    totals->chunks = sim->world.link.chunks;
    CHECK(totals->kv.sequences == 0);
    CHECK(totals->engine.half_rows_run == totals->engine.half_rows_due);
    CHECK(totals->engine.rows_recomputed == 0 || totals->engine.drops);
    CHECK(totals->engine.running == 0 && totals->engine.waiting == 0);
    bool ahead = !sim->world.options.no_plan_ahead;
    CHECK(ahead || !(totals->engine.planned_ahead | totals->engine.rows_surplus));
    CHECK(!ahead || totals->engine.planned_ahead || totals->engine.steps < 500);
    sim_world_clear(&sim->world);
}

// ---- worlds by seed ----

static void base_options(struct sim *sim, const struct arguments *a, struct sim_options *o)
{
    static const size_t chunks[] = {8192, 32768, 1u << 20};
    *o = (struct sim_options){.seed = a->seed,
                              .sequences_max = 2 + below(sim, 7),
                              .queue_max = 4 + below(sim, 24),
                              .halves_max = 2 + below(sim, 11),
                              .host_pages = 6 + below(sim, 40),
                              .event_bytes = 65536,
                              .chunk_bytes = chunks[below(sim, 3)],
                              .timing = (enum fake_timing)below(sim, 3),
                              .base_us = 2 + below(sim, 40),
                              .row_ns = 100 + below(sim, 4000),
                              .delay_min_us = below(sim, 10),
                              .context = sim,
                              .fail_alloc = a->fail_alloc,
                              .fail_chunk = a->fail_chunk,
                              .fail_submit = a->fail_submit,
                              .fail_segment = a->fail_segment,
                              .lose_copies = a->lose_copies};
    o->rows_max = o->sequences_max + below(sim, 40);
    o->no_plan_ahead = a->seed % 8 == 7;
    o->delay_max_us = o->delay_min_us + below(sim, 200);
}

static void begin(struct sim *sim, const struct arguments *a)
{
    memset(sim, 0, sizeof *sim);
    sim->rng.seed = rng_mix(a->seed);
    sim->check_every = a->thorough ? 1 : 16;
    sim->others_per_mille = 20;
}

static void name_adapters(struct sim *sim)
{
    for (uint32_t i = 0; i < BOOK_NAMES; i++)
        book_name(&sim->book, i, i);
}

static void run_random(struct sim_model *model, const struct arguments *a, struct totals *totals)
{
    struct sim *sim = malloc(sizeof *sim);
    struct sim_options options;
    struct engine_counters counters;
    CHECK(sim);
    begin(sim, a);
    base_options(sim, a, &options);
    uint32_t least = sim_pages_min(model);
    options.device_pages = least + (below(sim, 3) ? below(sim, least) : 0);
    sim->leave_per_mille = below(sim, 2) ? (below(sim, 3) ? below(sim, 500) : 1000) : 0;
    if (sim->leave_per_mille)
        options.force_leave = leave;
    CHECK(sim_world_make(&sim->world, model, &options) == STATUS_OK);
    book_begin(&sim->book, &sim->world, a->seed);
    name_adapters(sim);
    do {
        work(sim);
        (void)one_turn(sim);
        engine_counters(sim->world.engine, &counters);
    } while (counters.steps < a->steps / a->seeds);
    close_sim(sim, below(sim, 2), totals);
    free(sim);
}

// Everything left at every preemption point, room for all: nothing may be computed twice.
static void run_forced(struct sim_model *model, const struct arguments *a, struct totals *totals)
{
    struct sim *sim = malloc(sizeof *sim);
    struct sim_options options;
    struct engine_counters counters;
    CHECK(sim);
    begin(sim, a);
    base_options(sim, a, &options);
    options.device_pages = 10 * sim_pages_min(model);
    options.queue_max = BOOK_ROOM;
    sim->leave_per_mille = 1000;
    options.force_leave = leave;
    CHECK(sim_world_make(&sim->world, model, &options) == STATUS_OK);
    book_begin(&sim->book, &sim->world, a->seed);
    sim->book.mild = true;
    name_adapters(sim);
    do {
        work(sim);
        (void)one_turn(sim);
        engine_counters(sim->world.engine, &counters);
    } while (counters.steps < a->steps / a->seeds);
    close_sim(sim, false, totals);
    // Leaving recomputes nothing; what memory pressure dropped is another matter, and rare.
    CHECK(totals->engine.rows_recomputed == 0 || totals->engine.drops);
    CHECK(totals->engine.drops * 100 <= totals->engine.steps);
    CHECK(totals->engine.half_rows_run == totals->engine.half_rows_due);
    // Steps without a row that is still wanted are given up.
    uint64_t whole = totals->engine.steps - totals->engine.rows_surplus;
    CHECK(totals->engine.pauses >= whole * (2 * model->model.config.layers - 1));
    CHECK(totals->book.failed == 0 && totals->book.refused == 0);
    free(sim);
}

// Batch work all the time; an interactive request comes when none lives and no step of its class
// runs (one that was planned before its interactive rows turned out to be surplus is not left). It
// enters at the next preemption point: at most the rest of the segment in flight runs before, and
// one half-layer more when the pages that it is given are still being left by a copy.
static void run_entry(struct sim_model *model, const struct arguments *a, struct totals *totals)
{
    struct sim *sim = malloc(sizeof *sim);
    struct sim_options options;
    struct engine_counters counters;
    struct fake_device_counts device;
    CHECK(sim);
    begin(sim, a);
    base_options(sim, a, &options);
    options.device_pages = 10 * sim_pages_min(model);
    options.rows_max = 48;
    options.queue_max = BOOK_ROOM;
    options.row_ns = 20000 + below(sim, 40000); // a half-layer of 48 rows takes 1 to 3 ms
    options.trace = on_plan;
    CHECK(sim_world_make(&sim->world, model, &options) == STATUS_OK);
    book_begin(&sim->book, &sim->world, a->seed);
    sim->book.mild = true;
    for (uint64_t last = 0;;) {
        struct book_request *q = NULL;
        bool urgent = sim->turns > last + 100 && !sim->step_is_urgent &&
                      !book_has_class(&sim->book, ENGINE_INTERACTIVE) && below(sim, 20) == 0;
        sim->book.only_class = urgent ? ENGINE_INTERACTIVE : ENGINE_BATCH;
        if (urgent || sim->book.live < 6)
            q = book_new(&sim->book);
        if (q && book_send(&sim->book, q) && urgent) {
            fake_device_counts(sim->world.device, &device);
            sim->halves_at_arrival = device.halves;
            sim->entry_waits = true;
            last = sim->turns;
        }
        (void)one_turn(sim);
        engine_counters(sim->world.engine, &counters);
        if (counters.steps >= a->steps / a->seeds)
            break;
    }
    close_sim(sim, false, totals);
    if (sim->entries)
        printf("  entries %llu, half-layers before entering: mean %.2f, most %llu (segments of at "
               "most %u)\n",
               (unsigned long long)sim->entries, (double)sim->entry_halves / (double)sim->entries,
               (unsigned long long)sim->entry_halves_max, options.halves_max);
    CHECK(sim->entries > 10 && totals->engine.pauses > 0);
    CHECK(sim->entry_halves_max <= options.halves_max + 1);
    free(sim);
}

// ---- faults ----

// Did what was to fail take place?
static bool has_failed(const struct sim *sim, const struct arguments *a)
{
    struct fake_device_counts device;
    fake_device_counts(sim->world.device, &device);
    return sim->world.link.chunks >= a->fail_chunk && device.submits >= a->fail_submit &&
           device.submits >= a->fail_segment && device.allocs >= a->fail_alloc &&
           (!a->lose_copies || sim->world.link.is_lost);
}

// What is still under way may be what fails; whether the engine halted.
static bool settle(struct sim *sim)
{
    for (int i = 0; i < 100; i++)
        if (one_turn(sim) == ENGINE_HALTED)
            return true;
    return false;
}

// A short scenario; false when the world could not be made. *reached: the fault took place.
static bool run_fault(struct sim_model *model, const struct arguments *a, struct totals *totals,
                      bool *reached)
{
    struct sim *sim = malloc(sizeof *sim);
    struct sim_options options;
    CHECK(sim);
    begin(sim, a);
    base_options(sim, a, &options);
    options.device_pages = sim_pages_min(model) + 4;
    options.sequences_max = 6;
    options.rows_max = 24;
    options.host_pages = 24;
    options.queue_max = BOOK_ROOM;
    options.may_block = a->fail_segment != 0;
    *reached = true;
    if (sim_world_make(&sim->world, model, &options)) {
        CHECK(a->fail_alloc);
        free(sim);
        return false;
    }
    book_begin(&sim->book, &sim->world, a->seed);
    sim->book.mild = sim->book.faults = true;
    // What the engine allocates after its start are the tables of adapters: test_adapters_faults
    // has each of those fail.
    struct fake_device_counts made;
    fake_device_counts(sim->world.device, &made);
    if (a->fail_alloc > made.allocs) {
        *reached = false;
        close_sim(sim, false, totals);
        free(sim);
        return true;
    }
    name_adapters(sim);
    bool halted = false;
    for (uint32_t sent = 0; (sent < 24 || sim->book.live) && !halted;) {
        if (sent < 24 && below(sim, 10) == 0)
            sent += book_send_request(&sim->book);
        halted = one_turn(sim) == ENGINE_HALTED;
    }
    halted = halted || settle(sim);
    // After a failed copy everything works again, also what it hit; a failed device stops the
    // engine.
    sim->book.faults = halted || !has_failed(sim, a);
    for (uint32_t sent = 0; (sent < 12 || sim->book.live) && !halted;) {
        if (sent < 12)
            sent += book_send_request(&sim->book);
        halted = one_turn(sim) == ENGINE_HALTED;
    }
    halted = halted || settle(sim);
    *reached = has_failed(sim, a);
    sim->book.draining = sim->book.quitting = halted;
    CHECK(halted == (*reached && (a->fail_submit || a->fail_segment || a->lose_copies)));
    close_sim(sim, false, totals);
    free(sim);
    return true;
}

// Fails position 1, 1 + step, ... until the scenario ends before the position is reached.
static void sweep(struct sim_model *model, struct arguments *a, uint64_t *position,
                  const char *what, uint64_t total)
{
    uint64_t step = a->thorough ? 1 : 1 + total / POSITIONS, tried = 0, failed = 0, hit = 0;
    bool reached = true;
    for (uint64_t n = 1; reached; n += step) {
        struct totals totals = {.turns = 0};
        *position = n;
        remember(a, 1);
        bool made = run_fault(model, a, &totals, &reached);
        CHECK(!made || !reached || position != &a->fail_alloc);
        tried += reached;
        failed += totals.book.failed;
        hit += totals.book.failed > 0;
    }
    *position = 0;
    printf("  %s: %llu positions of %llu, %llu of them ended %llu requests with an error\n", what,
           (unsigned long long)tried, (unsigned long long)total, (unsigned long long)hit,
           (unsigned long long)failed);
}

static void run_faults(struct sim_model *model, struct arguments *a, bool once)
{
    struct totals totals = {.turns = 0};
    bool reached;
    if (once) {
        (void)run_fault(model, a, &totals, &reached);
        return;
    }
    (void)run_fault(model, a, &totals, &reached); // without a fault, to count
    sweep(model, a, &a->fail_alloc, "allocations", totals.allocs);
    sweep(model, a, &a->fail_submit, "submits", totals.submits);
    sweep(model, a, &a->fail_segment, "segments", totals.submits);
    sweep(model, a, &a->fail_chunk, "reads and copies", totals.chunks);
    sweep(model, a, &a->lose_copies, "copies of a lost device", totals.chunks);
}

// ---- main ----

static void parse(int argc, char **argv, struct arguments *a)
{
    struct {
        const char *name;
        uint64_t *value;
    } numbers[] = {{"--seed", &a->seed},
                   {"--seeds", &a->seeds},
                   {"--steps", &a->steps},
                   {"--fail-alloc", &a->fail_alloc},
                   {"--fail-chunk", &a->fail_chunk},
                   {"--fail-submit", &a->fail_submit},
                   {"--fail-segment", &a->fail_segment},
                   {"--lose-copies", &a->lose_copies}};
    for (int i = 1; i < argc; i++) {
        bool known = false;
        for (size_t n = 0; n < ARRAY_COUNT(numbers) && i + 1 < argc && !known; n++) {
            if (!strcmp(argv[i], numbers[n].name)) {
                *numbers[n].value = strtoull(argv[++i], NULL, 10);
                known = true;
            }
        }
        if (known)
            continue;
        if (!strcmp(argv[i], "--thorough")) {
            a->thorough = true;
        } else if (!strcmp(argv[i], "--verbose")) {
            a->verbose = true;
        } else if (!strcmp(argv[i], "--mode") && i + 1 < argc) {
            a->mode = argv[++i];
        } else {
            fprintf(stderr, "unknown argument %s; see the top of tests/sim_engine.c\n", argv[i]);
            exit(2);
        }
    }
    if (!a->seeds)
        a->seeds = 1;
}

static double seconds(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void print_totals(uint64_t seed, uint32_t variant, const struct totals *t)
{
    const struct engine_counters *e = &t->engine;
    const struct book_counts *b = &t->book;
    printf("seed %llu model %u: %llu steps %llu turns %llu rows | requests %llu tokens %llu stop "
           "%llu cut "
           "%llu length %llu cancelled %llu late %llu refused %llu nan %llu | misses %llu pauses "
           "%llu out "
           "%llu in %llu drops %llu again %llu | ahead %llu given up %llu surplus %llu | taken",
           (unsigned long long)seed, variant, (unsigned long long)e->steps,
           (unsigned long long)t->turns, (unsigned long long)e->rows, (unsigned long long)b->sent,
           (unsigned long long)b->tokens, (unsigned long long)b->stops,
           (unsigned long long)b->texts_cut, (unsigned long long)b->lengths,
           (unsigned long long)b->cancelled, (unsigned long long)b->deadlines,
           (unsigned long long)b->refused, (unsigned long long)b->numeric,
           (unsigned long long)e->gate_misses, (unsigned long long)e->pauses,
           (unsigned long long)e->swaps_out, (unsigned long long)e->swaps_in,
           (unsigned long long)e->drops, (unsigned long long)e->rows_recomputed,
           (unsigned long long)e->planned_ahead, (unsigned long long)e->ahead_dropped,
           (unsigned long long)e->rows_surplus);
    for (int k = 0; k < PAGE_KINDS; k++) {
        for (int f = 0; f < PAGE_KINDS; f++) {
            if (k != f)
                printf(" %llu", (unsigned long long)t->pool.taken_from[k][f]);
        }
    }
    printf(
        " | cached %llu cow %llu | pinned in %llu turns, %llu of %llu orders done | longest wait "
        "%llu us\n",
        (unsigned long long)e->cached_tokens, (unsigned long long)t->kv.copies_on_write,
        (unsigned long long)t->pinned_turns, (unsigned long long)b->keeps_done,
        (unsigned long long)b->keeps, (unsigned long long)b->wait_max_us);
}

int main(int argc, char **argv)
{
    struct arguments a = {.mode = "random", .seed = 1, .seeds = 4, .steps = 4000};
    parse(argc, argv, &a);
    (void)setvbuf(stdout, NULL, _IOLBF, 0);
    log_set_level(a.verbose ? LOG_DEBUG : LOG_ERROR + 1);
    (void)signal(SIGABRT, on_abort);
    (void)signal(SIGSEGV, on_abort);
    struct sim_model models[SIM_VARIANTS];
    for (uint32_t v = 0; v < SIM_VARIANTS; v++)
        sim_model_make(&models[v], v);
    bool once = a.fail_alloc || a.fail_chunk || a.fail_submit || a.fail_segment || a.lose_copies;
    double began = seconds();
    uint64_t first = a.seed, steps = 0, turns = 0;
    for (uint64_t i = 0; i < a.seeds; i++) {
        struct totals totals = {.turns = 0};
        a.seed = first + i;
        uint32_t variant = (uint32_t)(a.seed % SIM_VARIANTS);
        remember(&a, 1);
        if (!strcmp(a.mode, "faults"))
            run_faults(&models[variant], &a, once);
        else if (!strcmp(a.mode, "forced"))
            run_forced(&models[variant], &a, &totals);
        else if (!strcmp(a.mode, "entry"))
            run_entry(&models[variant], &a, &totals);
        else
            run_random(&models[variant], &a, &totals);
        if (strcmp(a.mode, "faults") != 0)
            print_totals(a.seed, variant, &totals);
        steps += totals.engine.steps;
        turns += totals.turns;
        fflush(stdout);
    }
    double took = seconds() - began;
    printf("%s: %llu seeds from %llu, %llu steps, %llu turns, %.1f s, %.0f steps/s\n", a.mode,
           (unsigned long long)a.seeds, (unsigned long long)first, (unsigned long long)steps,
           (unsigned long long)turns, took, (double)steps / took);
    for (uint32_t v = 0; v < SIM_VARIANTS; v++)
        sim_model_clear(&models[v]);
    return 0;
}
