// SPDX-License-Identifier: Apache-2.0
// The real server over the fake engine, as a program: what the Python, Neovim and C client tests
// talk to.
//   test_server_main --listen ADDRESS [--listen ADDRESS] (--tenants FILE | --open)
//                    [--adapters DIR --store DIR] [--delay-us N] [--limit NAME=N]...
//                    [--broken NAME@TENANT]... [--numbers]
// Prints "ready ADDRESSES" when it listens.
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "tests/fake_engine.h"

// A directory with a file "sync-fails" in it cannot be synced.
int __real_fsync(int descriptor);
int __wrap_fsync(int descriptor);

int __wrap_fsync(int descriptor)
{
    if (faccessat(descriptor, "sync-fails", F_OK, 0) != 0)
        return __real_fsync(descriptor);
    errno = EIO;
    return -1;
}

static void ready(void *context, const char *addresses)
{
    (void)context;
    (void)printf("ready %s\n", addresses);
    (void)fflush(stdout);
}

static bool set_limit(struct server_limits *limits, const char *text)
{
    const struct {
        const char *name;
        uint32_t *small;
        size_t *large;
    } rows[] = {
        {"connections_max", &limits->connections_max, NULL},
        {"connections_per_tenant", &limits->connections_per_tenant, NULL},
        {"unauthenticated_max", &limits->unauthenticated_max, NULL},
        {"requests_max", &limits->requests_max, NULL},
        {"requests_per_connection", &limits->requests_per_connection, NULL},
        {"frame_bytes", NULL, &limits->frame_bytes},
        {"output_high_bytes", NULL, &limits->output_high_bytes},
        {"output_max_bytes", NULL, &limits->output_max_bytes},
        {"buffer_bytes", NULL, &limits->buffer_bytes},
        {"auth_timeout_ms", &limits->auth_timeout_ms, NULL},
        {"idle_timeout_ms", &limits->idle_timeout_ms, NULL},
        {"frame_timeout_ms", &limits->frame_timeout_ms, NULL},
        {"slow_reader_timeout_ms", &limits->slow_reader_timeout_ms, NULL},
        {"upload_timeout_ms", &limits->upload_timeout_ms, NULL},
        {"shutdown_timeout_ms", &limits->shutdown_timeout_ms, NULL},
    };
    const char *equals = strchr(text, '=');
    for (size_t i = 0; equals && i < ARRAY_COUNT(rows); i++) {
        size_t length = (size_t)(equals - text);
        if (strlen(rows[i].name) != length || memcmp(rows[i].name, text, length))
            continue;
        unsigned long value = strtoul(equals + 1, NULL, 10);
        if (rows[i].small)
            *rows[i].small = (uint32_t)value;
        else
            *rows[i].large = value;
        return true;
    }
    return false;
}

// "name@tenant", or "name@" for the operator's.
static bool broken_add(struct server_options *options, const char *text)
{
    enum { BROKEN_MAX = 8 };
    static struct server_broken broken[BROKEN_MAX];
    const char *at = strchr(text, '@');
    if (!at || options->broken_count == BROKEN_MAX)
        return false;
    struct server_broken *entry = &broken[options->broken_count++];
    (void)snprintf(entry->name, sizeof entry->name, "%.*s", (int)(at - text), text);
    (void)snprintf(entry->tenant, sizeof entry->tenant, "%s", at + 1);
    (void)snprintf(entry->why, sizeof entry->why, "the store file is too short.");
    options->broken = broken;
    return true;
}

static bool read_arguments(int count, char **arguments, struct server_options *options,
                           struct fake_engine_options *engine)
{
    int listen = 0;
    for (int i = 1; i < count; i++) {
        const char *name = arguments[i], *value = i + 1 < count ? arguments[i + 1] : "";
        i++;
        if (!strcmp(name, "--open")) {
            options->open_access = true;
            i--;
        } else if (!strcmp(name, "--numbers")) {
            engine->numbers = true;
            i--;
        } else if (!strcmp(name, "--listen") && listen < SERVER_LISTEN_MAX)
            options->listen[listen++] = value;
        else if (!strcmp(name, "--tenants"))
            options->tenants_path = value;
        else if (!strcmp(name, "--adapters"))
            options->adapter_dirs[0] = value;
        else if (!strcmp(name, "--state"))
            options->state_dir = value;
        else if (!strcmp(name, "--upload-bytes"))
            options->upload_bytes_max = strtoull(value, NULL, 10);
        else if (!strcmp(name, "--broken") && broken_add(options, value))
            ;
        else if (!strcmp(name, "--delay-us"))
            engine->delay_us = (uint32_t)strtoul(value, NULL, 10);
        else if (strcmp(name, "--limit") || !set_limit(&options->limits, value))
            return false;
    }
    return true;
}

int main(int count, char **arguments)
{
    struct engine_port port;
    struct fake_engine *engine = NULL;
    struct fault fault = {.text = ""};
    struct fake_engine_options engine_options = {.port = &port,
                                                 .delay_us = 1000,
                                                 .tenants = SERVER_OWNER_OPERATOR,
                                                 .operator_adapters = true};
    struct server_options options = {.port = &port,
                                     .engine = fake_engine_limits(),
                                     .tokenizer = fake_tokenizer(),
                                     .clock = clock_monotonic(),
                                     .ready = ready};
    if (!read_arguments(count, arguments, &options, &engine_options)) {
        (void)fprintf(stderr, "bad arguments\n");
        return 2;
    }
    if (options.state_dir)
        options.converter = fake_converter();
    if (engine_port_create(1 << 20, 1 << 20, &port))
        return 2;
    if (fake_engine_start(&engine_options, &engine))
        return 2;
    enum status status = server_run(&options, &fault);
    if (status)
        (void)fprintf(stderr, "%s\n", fault.text);
    fake_engine_stop(engine);
    engine_port_destroy(&port);
    return status ? 1 : 0;
}
