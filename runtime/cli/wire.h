// SPDX-License-Identifier: Apache-2.0
// Shared inside runtime/cli only: from settings to a running stack with its tokenizer.
#ifndef POLDER_RUNTIME_CLI_WIRE_H
#define POLDER_RUNTIME_CLI_WIRE_H

#include "runtime/cli/options.h"
#include "runtime/engine/stack.h"
#include "runtime/tokenizer/tokenizer.h"
#include "tenants/tenants.h"

// A tokenizer with the working memory of one thread.
struct wire_text {
    struct tokenizer *tokenizer;
    struct token_scratch *scratch;
    struct token_list list;
};

// Loads <model>/tokenizer.json. wire_text_clear frees.
MUST_USE enum status wire_text_load(const struct settings *settings, struct wire_text *out,
                                    struct fault *fault);
void wire_text_clear(struct wire_text *text);
MUST_USE enum status wire_encode(struct wire_text *text, const char *bytes, size_t count,
                                 int32_t *out, size_t max, size_t *tokens);
MUST_USE enum status wire_decode(const struct wire_text *text, const int32_t *tokens, size_t count,
                                 char *out, size_t max, size_t *bytes);
// --state-dir, or its default.
MUST_USE enum status wire_state_directory(const struct settings *settings, char *out, size_t room,
                                          struct fault *fault);
// Fills stack options from settings; `state` holds the expanded state directory and outlives them.
MUST_USE enum status wire_stack_options(const struct settings *settings,
                                        const struct tokenizer *tokenizer, char *state,
                                        size_t state_room, struct stack_options *out,
                                        struct fault *fault);
// Makes the stack and registers what --lora-modules names, and what the state directory holds. A
// server owns its state directory.
MUST_USE enum status wire_stack(const struct settings *settings, const struct tokenizer *tokenizer,
                                const struct tenants *tenants, bool server, struct stack **out,
                                struct fault *fault);
// The name requests use for the base model: --served-model-name, or the directory's last part.
void wire_model_name(const struct settings *settings, char *out, size_t room);

#endif
