// SPDX-License-Identifier: Apache-2.0
// Shared inside runtime/model: typed, ranged reading of a JSON object's fields, with a sentence for
// each way to be wrong. `file` names the file in faults. A field that is null counts as absent.
#ifndef POLDER_RUNTIME_MODEL_FIELDS_H
#define POLDER_RUNTIME_MODEL_FIELDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/json.h"
#include "base/status.h"

struct fields {
    const char *file;
    const struct json *object;
};

// Parses text that must be a JSON object. The caller frees *out with json_free.
MUST_USE enum status fields_parse(const char *file, const char *text, size_t bytes,
                                  struct json **out, struct fault *fault);

bool fields_has(const struct fields *fields, const char *name);
// Absent: *out keeps its value (the default) when !required, else INVALID.
MUST_USE enum status fields_u32(const struct fields *fields, const char *name, bool required,
                                uint32_t min, uint32_t max, uint32_t *out, struct fault *fault);
MUST_USE enum status fields_number(const struct fields *fields, const char *name, double min,
                                   double max, double *out, struct fault *fault);
MUST_USE enum status fields_bool(const struct fields *fields, const char *name, bool *out,
                                 struct fault *fault);
MUST_USE enum status fields_string(const struct fields *fields, const char *name, const char **out,
                                   struct fault *fault);

#endif
