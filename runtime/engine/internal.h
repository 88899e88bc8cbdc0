// SPDX-License-Identifier: Apache-2.0
// Shared inside runtime/engine only: the engine's state.
//
// Files: engine.c (life, the turn), commands.c (the port's commands), residents.c (those on
// adapters), sequence.c (slots, lists, admission, swapping), plan.c (pure policy), step.c (planning
// and the step's state machine), gate.c (missing experts and parts of adapters), ahead.c (planning
// the next step while one runs), forward.c (recording the model's half-layers into the stream),
// output.c (sampled tokens to text and events), report.c (stats).
#ifndef POLDER_RUNTIME_ENGINE_INTERNAL_H
#define POLDER_RUNTIME_ENGINE_INTERNAL_H

#include "runtime/engine/engine.h"
#include "runtime/engine/plan.h"
#include "runtime/engine/text.h"

// ---- sequences ----
//
//   FREE -> QUEUED -> RUNNING <-> OUT (swapped out, or leaving / coming back)
//            any of them -> ENDED (its DONE waits for room in the event ring) -> FREE
// A sequence whose KV was dropped goes back to QUEUED with everything it has generated. One that
// ends while a step still has rows of it (planned before its end was known) gives its DONE, keeps
// its slot, KV and adapter, and becomes FREE when that step has released its rows.

enum sequence_state {
    SEQUENCE_FREE,
    SEQUENCE_QUEUED,
    SEQUENCE_RUNNING,
    SEQUENCE_OUT,
    SEQUENCE_ENDED
};

enum { NO_SLOT = 0xffffffff };

// Why a sequence that was chosen for a step does not take part; while a step is planned.
enum sequence_lacks { LACKS_NOTHING, LACKS_ADAPTER, LACKS_ROOM };

struct sequence {
    enum sequence_state state;
    enum sequence_lacks lacks;
    uint32_t next, previous; // in the list of its state
    uint64_t id, arrival;
    uint32_t tenant, class;
    adapter_id adapter;
    bool runs_adapter; // has told so (adapter_run)
    bool has_adapter, adapter_pinned, has_kv, paused, cancelled, emitted_first, done_sent;
    uint8_t in_steps; // steps with rows of it: one, and the next when that is planned ahead
    // While the next step is planned ahead: where it stands after the running one.
    struct sequence_ahead {
        bool goes_on;    // it has rows in the running step and may have some in the next
        bool samples;    // the running step samples a token that nobody knows yet,
        uint32_t sample; // in this place
        uint32_t computed;
    } ahead;
    kv_sequence kv;
    int32_t *tokens;   // [context_max] prompt, then generated
    uint32_t length;   // tokens known
    uint32_t computed; // tokens with KV
    uint32_t reserved; // positions with blocks, when more than computed
    uint32_t prompt, generated, max_tokens, cached;
    uint32_t high_water; // most tokens that ever had KV: rows below it are recomputed
    struct sample_params sampling;
    uint32_t tops;
    bool want_logprob, ignore_eos;
    uint32_t stop_tokens;
    int32_t stop_token[ENGINE_STOPS_MAX];
    struct text_output text;
    uint64_t deadline_us, arrived_us, admitted_us, first_token_us;
    // Of its adapter's parts: the first time they were asked for (0: not yet), how far that came,
    // and whether to the end.
    uint64_t parts_asked_us;
    uint32_t parts_next, parts_had; // had: there when they were first asked for
    bool parts_begun;
    bool is_crowded;     // by those that run, when it was last looked at
    uint64_t crowded_us; // since when others leave its adapter's parts no room; 0: never
    uint64_t adapter_since_us, adapter_us; // waits for its adapter since (0: does not); has waited
    // the end
    enum status end_status;
    enum engine_finish finish;
    char message[200];
};

struct sequence_list {
    uint32_t head, tail, count;
};

// ---- steps ----

enum step_state {
    STEP_NONE,
    STEP_READY,  // its next half-layer can be recorded
    STEP_FLIGHT, // a segment is submitted
    STEP_GATE,   // a gate waits for experts
    STEP_PAUSED  // left at a preemption point
};

// The arrays a step's commands read, on the host and, at the same offsets, on the device.
struct step_block {
    uint8_t *host, *device;
    size_t bytes;
};

// What a request is told that was not in the step when the device failed.
#define ENGINE_BROKEN "The device failed; the server has to be started anew."

struct step_arrays {
    int32_t *token;
    uint32_t *position, *sequence, *lora_row, *lora_adapter, *gather;
    uint32_t *lora_sample; // as lora_row, over the samples
    uint32_t *follow;      // by sample of the step before: the row its token goes to, or rows_max
    struct sample_params *sample;
    uint32_t *pages;
};

struct step {
    enum step_state state;
    struct step_plan plan;
    struct plan_run *runs; // [sequences_max]
    struct step_block block;
    struct step_arrays host, device;
    float *x; // [rows_max][hidden] residual rows: with the KV, all that a paused step keeps
    // Of all rows; of the sampled ones, in the same segments.
    struct lora_batch lora, lora_head;
    uint32_t lora_modules; // bit m: some adapter of the step has module m
    bool has_parts;        // some adapter has parts that come expert by expert
    uint32_t tops;         // top_logprobs asked for by the step's samples
    uint32_t half;         // next half-layer, 2 * layers: the head
    uint32_t segment_end;  // halves [half, segment_end) are in flight
    bool resume_gate;      // the first half of the next segment starts at its gate
    bool segment_head;     // the segment in flight ends with the head
    bool places_changed;   // the block must be copied to the device before the next segment
    bool ahead_tried;      // the next step was planned, or could not be, while this one runs
    uint32_t followed;     // samples of the step before, whose tokens are this one's input; 0: none
    uint32_t result_set;   // of scratch.results
    uint32_t halves_run;
    uint32_t adapter_pages; // of its adapters, kept free for it while it is paused
    uint64_t epoch;
    uint64_t started_us;
};

// What a step sampled, in host-visible memory. There are two sets: one is read, by the host and as
// input of the step after, while the other is written.
struct result_set {
    int32_t *token;
    float *logprob;
    int32_t *top_token;
    float *top_logprob;
};

// The step that has retired last, until its results have gone out. Its rows are still held.
struct results {
    bool waiting;
    struct step_plan plan;
    struct plan_run *runs; // [sequences_max]
    uint32_t tops, halves_run, set;
};

// Copies of KV blocks that the next segment takes along. Until that has retired nobody else may get
// the pages they read and write, so they have an epoch of their own.
struct block_copies {
    struct block_copy {
        void *to;
        const void *from;
        size_t bytes;
    } * list; // [sequences_max * pages_per_block]
    uint32_t count, room;
    uint64_t epoch; // while count
    bool in_flight; // recorded in the segment that is submitted, under flight_epoch
    uint64_t flight_epoch;
};

// Work areas shared by all steps (nothing here outlives a preemption point, except while a gate
// waits).
struct scratch {
    void *act, *attention, *mid;
    float *normed, *qkv, *gate_up;
    float *lora_hidden[3];
    float *partial; // [rows][hidden] of ranks above 0
    struct moe_work moe;
    uint32_t *need;        // [moe layers][experts], host-visible
    uint8_t *expert_state; // [experts] of the gate that fired, host-visible
    uint8_t *gate_state;   // [experts] which of them are brought in this round
    // [sequences_max][experts], host-visible: 1 where the step's i-th run of rows with one adapter
    // needs its part for an expert that is missing
    uint8_t *part_wanted;
    float *last; // [sequences_max][hidden]
    void *last_act;
    float *logits;
    struct result_set results[2];
};

struct engine {
    struct engine_options options;
    const struct device_table *table;
    struct stream *stream;
    struct step steps[ENGINE_CLASSES];
    struct step *current; // READY, FLIGHT or GATE; NULL between steps
    // Steps are planned here and change places with the one of their class when they are entered.
    // READY: planned ahead, while `current` runs its last segment. The device arrays and x are
    // those of the class.
    struct step next;
    uint32_t next_queued; // sequences that were left waiting when it was planned
    bool plans_ahead;     // while planning: the current step is running
    uint64_t crowded_us;  // when a sequence last began though parts had no room
    bool gate_alone;      // the last gate found no room: the first expert that waits, and no other
    bool short_of_room;   // somebody found no room in the last planning
    struct results results;
    struct block_copies copies;
    struct scratch scratch;
    size_t refused_bytes; // at start: the area the device had no room for
    float *logits;        // [vocab] where engine_logits brings them to, or NULL
    uint32_t *moe_index;  // [layers] number of the layer among MoE layers, or NO_SLOT

    struct sequence *sequences;
    int32_t *tokens;
    uint32_t sequence_slots;
    struct sequence_list lists[SEQUENCE_ENDED + 1];
    struct plan_candidate *candidates; // [sequence_slots]
    struct plan_run *runs;             // [sequences_max], while planning
    struct digest *salts;              // [tenants_max]
    // Pages that the most urgent sequence without room is waiting for: kept free of those that come
    // after it.
    struct want {
        uint32_t slot, pages; // NO_SLOT: nobody
    } want, want_next;        // of the last planning; of this one
    uint64_t arrivals, steps_made;
    bool draining, halted, quit, broken; // broken: the device failed
    struct engine_counters counters;
    float half_us_per_row; // measured, for the length of segments
    uint64_t submitted_us;
    char *line; // trace and JSON text
    size_t line_bytes;
    uint8_t *record; // one event
};

// sequence.c
void sequence_move(struct engine *engine, uint32_t slot, enum sequence_state state);
void sequence_end(struct engine *engine, uint32_t slot, enum status status,
                  enum engine_finish finish, const char *message);
void sequence_flush_ended(struct engine *engine);
void sequence_expire(struct engine *engine);
uint32_t sequence_find(const struct engine *engine, uint64_t id);
void sequence_admit(struct engine *engine);
uint32_t sequence_candidates(struct engine *engine);
bool sequence_make_room(struct engine *engine, uint32_t for_slot, uint32_t pages);
bool sequence_end_if_over(struct engine *engine, uint32_t slot, uint64_t now);
bool sequence_is_over(const struct sequence *sequence, uint64_t now);
void sequence_leave_step(struct engine *engine, uint32_t slot);
void sequence_want(struct engine *engine, uint32_t slot, uint32_t pages);
// It could go on but for its adapter; it has it, or has ended.
void sequence_adapter_lacks(struct engine *engine, struct sequence *sequence);
void sequence_adapter_came(struct engine *engine, struct sequence *sequence);
// Fetches more of the parts that queued sequences have asked for; at every turn.
void sequence_continue_parts(struct engine *engine);
void sequence_fetch_ahead(struct engine *engine, uint32_t class_below);
// Pages of its adapter, 0 when tenants have pinned that: adapters_kept_pages counts those.
uint32_t sequence_adapter_pages(const struct engine *engine, bool has_adapter, adapter_id adapter);
uint32_t sequence_pages_needed(const struct engine *engine, uint32_t tokens, bool has_adapter,
                               adapter_id adapter);
void sequence_bring_back(struct engine *engine);
void sequence_drop_kv(struct engine *engine, uint32_t slot);
uint32_t sequence_waiting_class(const struct engine *engine);
bool sequence_pages_allow(const struct engine *engine, uint32_t more_pages);
bool sequence_adapters_allow(const struct engine *engine, uint32_t adapter_pages);

// step.c
bool step_plan(struct engine *engine);  // into engine->next
void step_enter(struct engine *engine); // what was planned becomes the current step
void step_submit(struct engine *engine, struct step *step);
bool step_advance(struct engine *engine); // false: nothing could be done now
struct step *step_paused_most_urgent(struct engine *engine);
void step_release_rows(struct engine *engine, struct step *step);
void step_release_runs(struct engine *engine, const struct plan_run *runs, uint32_t count);
void step_run_copies(struct engine *engine); // when no segment will take them along
// A step that cannot go on ends its requests; others are not touched.
void step_fail(struct engine *engine, struct step *step, enum status status, const char *message);

// gate.c
void gate_bring(struct engine *engine, struct step *step);   // what the map found missing
bool gate_advance(struct engine *engine, struct step *step); // false: it is on its way
void gate_let_go(struct engine *engine, uint32_t moe);       // what the gate of a layer holds
// The MoE layers among the halves [from, to) are done: their pairs count as uses.
void gate_done(struct engine *engine, uint32_t from, uint32_t to);

// ahead.c
void ahead_plan(struct engine *engine, struct step *running);
void ahead_drop(struct engine *engine);
bool ahead_give_up_surplus(struct engine *engine, struct step *step);
bool ahead_is_wanted(const struct engine *engine); // may what was planned ahead be entered?

// forward.c
void forward_begin(struct engine *engine, struct step *step);
void forward_half(struct engine *engine, struct step *step, uint32_t half, bool from_gate);
void forward_head(struct engine *engine, struct step *step);

// output.c
bool output_results(struct engine *engine); // false: the event ring has no room
void output_drop(struct engine *engine);    // gives waiting results up
bool output_event(struct engine *engine, const void *record, size_t bytes);
size_t output_room_needed(const struct engine *engine, uint32_t samples);

// residents.c: an answer to a command on adapters; NOT_FOUND without a sentence.
// NOT_FOUND also for what is another tenant's.
enum status residents_find(const struct engine *engine, const char *name, uint32_t tenant,
                           adapter_id *out);
enum status residents_command(struct engine *engine, const struct engine_adapter_command *command,
                              struct fault *fault);

// commands.c
bool commands_take(struct engine *engine); // true when something was taken

// report.c
size_t report_stats(struct engine *engine, char *out, size_t room);
// Those that a list asks for, and whether there are more.
size_t report_adapters(struct engine *engine, const struct engine_list *list, char *out,
                       size_t room);

#endif
