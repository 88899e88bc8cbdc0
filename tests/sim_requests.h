// SPDX-License-Identifier: Apache-2.0
// The front end of the simulation: random requests and commands by seed, and the book in which
// every event of the engine is checked against the reference.
//
// Invariants that it holds the engine to: 1. every request ends with exactly one DONE. 2. each
// token, its index, logprob and top list are those of the reference, and nothing follows the token
// that must be the last. 3. the text that was given out is the reference's text, cut at the stop
// string. 4. the finish reason and the status are ones that this request may have. 5. commands with
// a reply are answered once.
#ifndef POLDER_TESTS_SIM_REQUESTS_H
#define POLDER_TESTS_SIM_REQUESTS_H

#include "sim_world.h"

enum { BOOK_ROOM = 64, BOOK_NAMES = 6, BOOK_TEXT = 1024 };

struct book_request {
    bool live, paused, cancelled, after_drain, not_found;
    struct engine_request r;
    int32_t prompt[SIM_CONTEXT];
    int32_t stop_token[ENGINE_STOPS_MAX];
    char stop[ENGINE_STOPS_MAX][8];
    const struct sim_adapter *adapter;
    struct sim_reference reference;
    bool started, ended; // reference fed with the prompt; the last token was seen
    enum engine_finish finish;
    uint32_t got;
    int32_t next;
    uint8_t decode_state[8];
    char text[BOOK_TEXT]; // by the reference
    uint32_t text_bytes, text_got;
    uint64_t sent_us, order;
};

struct book_counts {
    uint64_t sent, done, tokens, stops, lengths, cancelled, deadlines, refused, numeric, failed,
        texts_cut, adapters_added, adapters_removed, replies, keeps, keeps_done;
    uint64_t wait_max_us; // longest time in which the head of the order got nothing
};

struct book {
    struct sim_world *world;
    struct rng rng;
    struct book_request requests[BOOK_ROOM];
    uint32_t live, live_max;
    uint64_t ids, orders, reply_ids;
    const struct sim_adapter *names[BOOK_NAMES]; // what a name means for the next request
    uint32_t replies_due;
    enum status reply_expected[256]; // by reply id % 256
    bool draining, quitting, stopped;
    bool faults;              // IO, DEVICE and FULL may end a request
    bool mild;                // no cancels, deadlines, pauses, refusals: everything must end well
    uint32_t whole_per_mille; // prompts that are whole shared blocks: copy-on-write
    uint32_t only_class;      // ENGINE_CLASSES: any
    uint64_t head_since_us, head_id;
    uint32_t head_got;
    struct book_counts counts;
};

void book_begin(struct book *book, struct sim_world *world, uint64_t seed);
// Sends a random request; false when the book or the command ring is full.
bool book_send_request(struct book *book);
// Fills *r with a random request, to be changed and sent by book_send.
struct book_request *book_new(struct book *book);
bool book_send(struct book *book, struct book_request *r);
// One random command that is not a request: cancel, pause, resume, add, remove, load, unload,
// pin, unpin, stats, list, nonsense.
void book_send_other(struct book *book);
bool book_control(struct book *book, enum engine_command_kind kind, uint64_t id);
void book_resume_all(struct book *book);
bool book_has_class(const struct book *book, uint32_t class); // does a request of this class live?
// Registers content under name number n (at start, through the port).
void book_name(struct book *book, uint32_t name, uint32_t content);
void book_take_events(struct book *book, uint32_t events_max);
// Aborts when the request at the head of the order got nothing for bound_us.
void book_watch(struct book *book, uint64_t bound_us);

#endif
