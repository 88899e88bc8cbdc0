// SPDX-License-Identifier: Apache-2.0
// A state directory for the time of one run, when none was given: in /tmp, locked while the program
// lives. What a killed run left is removed by the next one: it finds the directory unlocked.
#ifndef POLDER_BENCH_BENCH_STATE_H
#define POLDER_BENCH_BENCH_STATE_H

enum { BENCH_STATE_PATH = 64 };

struct bench_state {
    char path[BENCH_STATE_PATH]; // "": there is none
    int lock;
};

// NULL: none could be made. bench_state_end removes it; NULL and an empty one are fine.
const char *bench_state_begin(struct bench_state *state);
void bench_state_end(struct bench_state *state);

#endif
