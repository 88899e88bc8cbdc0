// SPDX-License-Identifier: Apache-2.0
// One status type for the whole project. 0 is success everywhere; every function that can fail
// returns `enum status`, and its results leave by the last parameters. `struct fault` carries the
// sentence for the person who has to act: what was wrong, where, and what to do.
#ifndef POLDER_BASE_STATUS_H
#define POLDER_BASE_STATUS_H

#define MUST_USE __attribute__((warn_unused_result))
#define PRINTF_LIKE(f, a) __attribute__((format(printf, f, a)))

// name, wire code (docs/protocol.md), sentence
#define STATUS_LIST(X)                                                                             \
    X(OK, "ok", "success")                                                                         \
    X(INVALID, "invalid_argument", "the request is malformed")                                     \
    X(NOT_FOUND, "not_found", "there is no such thing")                                            \
    X(EXISTS, "already_exists", "the name is taken")                                               \
    X(UNAUTHENTICATED, "unauthenticated", "the key is missing or wrong")                           \
    X(DENIED, "permission_denied", "this tenant may not do that")                                  \
    X(LIMIT, "resource_exhausted", "a limit was reached")                                          \
    X(NO_MEMORY, "out_of_memory", "the host ran out of memory")                                    \
    X(FULL, "pool_full", "the pool or queue has no room now")                                      \
    X(BUSY, "busy", "the thing is in use")                                                         \
    X(UNSUPPORTED, "unsupported", "this form is known but not supported")                          \
    X(CORRUPT, "corrupt", "the file is damaged or lies about itself")                              \
    X(IO, "io_error", "reading or writing failed")                                                 \
    X(CANCELLED, "cancelled", "the request was cancelled")                                         \
    X(DEADLINE, "deadline_exceeded", "the deadline passed")                                        \
    X(SHUTTING_DOWN, "unavailable", "the server is shutting down")                                 \
    X(NUMERIC, "numeric", "the model produced a value that is not a number")                       \
    X(DEVICE, "device_error", "the device failed")                                                 \
    X(INTERNAL, "internal", "an error inside the server")

enum status {
#define X(name, code, sentence) STATUS_##name,
    STATUS_LIST(X)
#undef X
        STATUS_COUNT
};

const char *status_code(enum status status);     // wire code, never NULL
const char *status_sentence(enum status status); // never NULL

// The sentence that goes with a failure. Callers that do not care pass NULL.
struct fault {
    enum status status;
    char text[320];
};

// Fill `fault` (may be NULL) and return `status`, so that `return fault_set(...)` is one line.
enum status fault_set(struct fault *fault, enum status status, const char *format, ...)
    PRINTF_LIKE(3, 4);

#endif
