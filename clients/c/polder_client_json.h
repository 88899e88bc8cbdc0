// SPDX-License-Identifier: Apache-2.0
// JSON in, JSON out, for the command line (`polder call METHOD JSON`).
#ifndef POLDER_CLIENT_JSON_H
#define POLDER_CLIENT_JSON_H

#include "polder_client.h"

// params: the text of a JSON object, or NULL. *result: JSON text, indented by `indent` spaces (0:
// one line); the caller frees it. JSON that is not an object fails with code "invalid_argument".
int polder_call_json(struct polder_client *client, const char *method, const char *params,
                     size_t indent, polder_on_token on_token, void *context, char **result,
                     struct polder_error *error);

#endif
