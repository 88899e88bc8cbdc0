// SPDX-License-Identifier: Apache-2.0
// Streams one answer to standard output:  polder_client_example ADDRESS KEY PROMPT [MODEL]
#include <stdio.h>

#include "polder_client.h"

static bool on_token(void *context, const struct polder_token *token)
{
    (void)context;
    (void)fwrite(token->text, 1, token->text_bytes, stdout);
    (void)fflush(stdout);
    return true;
}

int main(int count, char **arguments)
{
    struct polder_error error;
    struct polder_result result;
    if (count < 4) {
        (void)fprintf(stderr, "usage: %s ADDRESS KEY PROMPT [MODEL]\n", arguments[0]);
        return 2;
    }
    struct polder_client *client = polder_open(arguments[1], arguments[2], 30000, &error);
    if (!client) {
        (void)fprintf(stderr, "%s: %s\n", error.code, error.message);
        return 1;
    }
    struct polder_generate ask = {.prompt = arguments[3],
                                  .model = count > 4 ? arguments[4] : NULL,
                                  .max_tokens = 64,
                                  .temperature = -1};
    int rc = polder_generate(client, &ask, on_token, NULL, &result, &error);
    if (rc) {
        (void)fprintf(stderr, "%s: %s\n", error.code, error.message);
    } else {
        (void)printf("\n[%s, %llu tokens, first after %.1f ms]\n", result.finish_reason,
                     (unsigned long long)result.completion_tokens, result.ttft_ms);
        polder_result_free(&result);
    }
    polder_close(client);
    return rc ? 1 : 0;
}
