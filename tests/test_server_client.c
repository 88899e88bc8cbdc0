// SPDX-License-Identifier: Apache-2.0
// clients/c against the server over the fake engine, by TCP and by Unix socket. POLDER_TEST_SERVER
// names the server program.
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/hash.h"
#include "clients/c/polder_client.h"
#include "clients/c/polder_client_json.h"

struct fixture {
    pid_t server;
    char folder[64], tcp[64], local[128];
};

static void write_tenants(const char *path)
{
    char hex[2 * DIGEST_BYTES + 1];
    struct digest digest = hash_bytes(NULL, "key-acme", 8);
    digest_hex(&digest, hex);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    (void)fprintf(file, "tenants:\n  - {name: acme, keys_blake2b: [%s], manage_adapters: true}\n",
                  hex);
    (void)fclose(file);
}

static int start(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    const char *program = getenv("POLDER_TEST_SERVER");
    int pipes[2];
    char tenants[96], line[256] = "";
    if (!f || !program || pipe(pipes))
        return -1;
    (void)snprintf(f->folder, sizeof f->folder, "/tmp/polder-client-XXXXXX");
    if (!mkdtemp(f->folder))
        return -1;
    (void)snprintf(tenants, sizeof tenants, "%s/tenants.yaml", f->folder);
    (void)snprintf(f->local, sizeof f->local, "unix:%s/sock", f->folder);
    write_tenants(tenants);
    f->server = fork();
    if (f->server == 0) {
        (void)dup2(pipes[1], 1);
        (void)execl(program, program, "--listen", "127.0.0.1:0", "--listen", f->local, "--tenants",
                    tenants, "--delay-us", "300", (char *)NULL);
        _exit(127);
    }
    (void)close(pipes[1]);
    FILE *output = fdopen(pipes[0], "r");
    if (!output || !fgets(line, sizeof line, output) || sscanf(line, "ready %63s", f->tcp) != 1)
        return -1;
    (void)fclose(output);
    *state = f;
    return 0;
}

static int stop(void **state)
{
    struct fixture *f = *state;
    char path[96];
    int code = 0;
    (void)kill(f->server, SIGTERM);
    (void)waitpid(f->server, &code, 0);
    (void)snprintf(path, sizeof path, "%s/tenants.yaml", f->folder);
    (void)unlink(path);
    (void)rmdir(f->folder);
    free(f);
    return code;
}

struct collected {
    char text[4096];
    size_t bytes;
    uint32_t tokens, stop_after;
};

static bool collect(void *context, const struct polder_token *token)
{
    struct collected *c = context;
    memcpy(c->text + c->bytes, token->text, token->text_bytes);
    c->bytes += token->text_bytes;
    c->tokens++;
    return c->tokens != c->stop_after;
}

static void test_server_client_generates(void **state)
{
    const struct fixture *f = *state;
    const char *const addresses[] = {f->tcp, f->local};
    for (int i = 0; i < 2; i++) {
        struct polder_error error;
        struct polder_result result;
        struct collected c = {.bytes = 0};
        struct polder_client *client = polder_open(addresses[i], "key-acme", 10000, &error);
        assert_non_null(client);
        struct polder_generate ask = {.prompt = "zw\xc3\xb6lf ",
                                      .max_tokens = 14,
                                      .temperature = 0,
                                      .has_seed = true,
                                      .seed = 9};
        assert_int_equal(polder_generate(client, &ask, collect, &c, &result, &error), 0);
        assert_string_equal(result.text, "zw\xc3\xb6lf zw\xc3\xb6lf ");
        assert_int_equal(c.bytes, result.text_bytes);
        assert_memory_equal(c.text, result.text, c.bytes);
        assert_string_equal(result.finish_reason, "length");
        assert_int_equal(c.tokens, 14);
        assert_true(result.seed == 9 && result.prompt_tokens == 7 &&
                    result.completion_tokens == 14);
        polder_result_free(&result);
        static const int32_t ids[] = {65, 66};
        static const char *const stops[] = {"BAB"};
        ask = (struct polder_generate){.prompt_tokens = ids,
                                       .prompt_token_count = 2,
                                       .temperature = -1,
                                       .stop = stops,
                                       .stop_count = 1};
        assert_int_equal(polder_generate(client, &ask, NULL, NULL, &result, &error), 0);
        assert_string_equal(result.finish_reason, "stop");
        polder_result_free(&result);
        polder_close(client);
    }
}

static void test_server_client_cancels(void **state)
{
    const struct fixture *f = *state;
    struct polder_error error;
    struct polder_result result;
    struct collected c = {.stop_after = 5};
    struct polder_client *client = polder_open(f->tcp, "key-acme", 10000, &error);
    assert_non_null(client);
    struct polder_generate ask = {.prompt = "abc", .max_tokens = 1900, .temperature = -1};
    assert_int_equal(polder_generate(client, &ask, collect, &c, &result, &error), 0);
    assert_string_equal(result.finish_reason, "cancelled");
    assert_true(result.completion_tokens < 1900);
    polder_result_free(&result);
    const msgpack_object *pong;
    assert_int_equal(polder_call(client, "ping", NULL, NULL, NULL, &pong, &error), 0);
    polder_close(client);
}

static void test_server_client_errors(void **state)
{
    const struct fixture *f = *state;
    struct polder_error error;
    struct polder_result result;
    assert_null(polder_open(f->tcp, "wrong", 10000, &error));
    assert_string_equal(error.code, "unauthenticated");
    assert_null(polder_open("127.0.0.1:1", NULL, 10000, &error));
    assert_string_equal(error.code, "connection");
    assert_null(polder_open("nonsense", NULL, 10000, &error));
    struct polder_client *client = polder_open(f->local, "key-acme", 10000, &error);
    assert_non_null(client);
    struct polder_generate ask = {.prompt = "abc", .model = "nope", .temperature = -1};
    assert_int_equal(polder_generate(client, &ask, NULL, NULL, &result, &error), -1);
    assert_string_equal(error.code, "not_found");
    assert_string_equal(error.message, "there is no model \"nope\".");
    ask = (struct polder_generate){.prompt = "abc", .temperature = 3};
    assert_int_equal(polder_generate(client, &ask, NULL, NULL, &result, &error), -1);
    assert_string_equal(error.code, "invalid_argument");
    assert_int_equal(error.type, 1);
    const msgpack_object *answer;
    assert_int_equal(polder_call(client, "no.such", NULL, NULL, NULL, &answer, &error), -1);
    assert_string_equal(error.code, "not_found");
    polder_close(client);
}

static void test_server_client_json(void **state)
{
    const struct fixture *f = *state;
    struct polder_error error;
    char *text = NULL;
    struct polder_client *client = polder_open(f->local, "key-acme", 10000, &error);
    assert_non_null(client);
    assert_int_equal(polder_call_json(client, "ping", NULL, 0, NULL, NULL, &text, &error), 0);
    assert_string_equal(text, "\"pong\"");
    free(text);
    assert_int_equal(polder_call_json(client, "tokenize", "{\"text\": \"Hi\\u00e9\"}", 0, NULL,
                                      NULL, &text, &error),
                     0);
    assert_string_equal(text, "{\"count\": 4, \"tokens\": [72, 105, 195, 169]}");
    free(text);
    assert_int_equal(polder_call_json(client, "ping", "[1]", 0, NULL, NULL, &text, &error), -1);
    assert_int_equal(polder_call_json(client, "ping", "{", 0, NULL, NULL, &text, &error), -1);
    assert_string_equal(error.code, "invalid_argument");
    assert_int_equal(polder_call_json(client, "generate", "{\"prompt\": \"a\", \"n\": 0}", 0, NULL,
                                      NULL, &text, &error),
                     -1);
    assert_string_equal(error.message, "n must be an integer from 1 to 8.");
    polder_close(client);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_server_client_generates),
        cmocka_unit_test(test_server_client_cancels),
        cmocka_unit_test(test_server_client_errors),
        cmocka_unit_test(test_server_client_json),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
