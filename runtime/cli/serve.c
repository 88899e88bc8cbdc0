// SPDX-License-Identifier: Apache-2.0
// polder serve, its dry run, and polder check-config.
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/sysinfo.h>

#include "base/log.h"
#include "runtime/cli/adapter.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/wire.h"
#include "runtime/server/server.h"
#include "tenants/tenants.h"

enum { ADDRESS_ROOM = 300 };

// ---- seams between the server and what is below it ----

struct face {
    struct stack *stack;
    struct wire_text text;
};

static enum status encode(void *context, const char *text, size_t bytes, int32_t *out, size_t max,
                          size_t *count)
{
    struct face *face = context;
    return wire_encode(&face->text, text, bytes, out, max, count);
}

static enum status decode(void *context, const int32_t *tokens, size_t count, char *out, size_t max,
                          size_t *bytes)
{
    const struct face *face = context;
    return wire_decode(&face->text, tokens, count, out, max, bytes);
}

static enum status convert(void *context, const char *directory, const char *old_path,
                           const char *store_path, char *report, size_t report_bytes,
                           struct fault *fault)
{
    const struct face *face = context;
    struct adapter_report r;
    const struct adapter_base *base = stack_adapter_base(face->stack);
    size_t page_bytes = stack_page_bytes(face->stack);
    uint32_t version = adapter_version_at(old_path, NULL, base, page_bytes, NULL);
    enum status status =
        adapter_convert_version(directory, base, page_bytes, version + 1, store_path, &r, fault);
    if (!status)
        adapter_report_json(&r, report, report_bytes);
    return status;
}

static void ready(void *context, const char *addresses)
{
    (void)context;
    log_line(LOG_INFO, "ready on %s", addresses);
    // One line on standard output for scripts that wait for it.
    (void)printf("polder: ready on %s\n", addresses);
    (void)fflush(stdout);
}

static enum status count_tenants(const char *path, uint32_t *count, struct fault *fault)
{
    struct tenants *tenants = NULL;
    enum status status = tenants_load(path, NULL, &tenants, fault);
    if (status)
        return status;
    *count = tenants_count(tenants);
    tenants_free(tenants);
    return STATUS_OK;
}

// ---- dry run ----

static double mib(uint64_t bytes)
{
    return (double)bytes / 1048576.0;
}

static void show_fit(const struct stack_fit *fit)
{
    (void)printf("model            %s, %u layers, hidden %u, %u experts\n",
                 fit->model.config.architecture, fit->model.config.layers, fit->model.config.hidden,
                 fit->model.config.experts);
    (void)printf("static weights   %10.1f MiB\n", mib(fit->model.static_bytes));
    (void)printf("pool             %10.1f MiB, %llu pages of %zu KiB\n", mib(fit->pool_bytes),
                 (unsigned long long)fit->pool_pages, fit->model.page_bytes / 1024);
    (void)printf("  all experts    %10.1f MiB, %llu pages%s\n",
                 mib(fit->expert_pages * fit->model.page_bytes),
                 (unsigned long long)fit->expert_pages,
                 fit->expert_pages > fit->pool_pages ? " (more than the pool: offloaded)" : "");
    (void)printf("  KV             %10llu tokens beside all experts, %llu bytes each\n",
                 (unsigned long long)fit->kv_tokens, (unsigned long long)fit->kv_bytes_per_token);
    (void)printf(
        "  adapters       %10llu of rank 16 on q, k, v, o beside all experts, %.2f MiB each\n",
        (unsigned long long)fit->adapters_that_fit, mib(fit->adapter_bytes));
    (void)printf("host tier        %10.1f MiB\n", mib(fit->host_bytes));
    (void)printf("work areas       %10.1f MiB\n", mib(fit->work_bytes));
    (void)printf("tables, queues   %10.1f MiB\n", mib(fit->table_bytes));
}

// A GPU holds weights, pool and work areas, the host the rest. A GPU that cannot be asked is no
// refusal (the dry run may be made elsewhere), but is said, and *checked stays false.
static enum status fit_gpu(const struct stack_options *o, const struct stack_fit *fit,
                           uint64_t memory, bool *checked, struct fault *fault)
{
    struct fault why = {.text = ""};
    uint64_t available = 0, host = fit->host_bytes + fit->table_bytes;
    // A pool whose size nobody gave is cut to what is free.
    uint64_t device = fit->model.static_bytes + fit->work_bytes + o->pool_bytes;
    enum status status = stack_device_free(o, &available, &why);
    if (status == STATUS_INVALID)
        return fault_set(fault, status, "%s", why.text);
    *checked = !status;
    if (status)
        (void)printf("%-16s memory not checked: %s\n", o->device, why.text);
    else
        (void)printf("%-16s %10.1f MiB of %.1f MiB that are free%s\n", o->device, mib(device),
                     mib(available), o->pool_bytes ? "" : "; the pool takes at most the rest");
    (void)printf("host             %10.1f MiB of %.1f MiB; context %u tokens\n", mib(host),
                 mib(memory), fit->context_max);
    if (*checked && device > available)
        return fault_set(fault, STATUS_NO_MEMORY,
                         "%llu MiB are needed on %s and %llu MiB are free there: lower "
                         "--pool-bytes or --max-num-batched-tokens.",
                         (unsigned long long)(device >> 20), o->device,
                         (unsigned long long)(available >> 20));
    if (memory && host > memory)
        return fault_set(fault, STATUS_NO_MEMORY,
                         "%llu MiB of host memory are needed and this machine has %llu MiB: lower "
                         "--host-bytes.",
                         (unsigned long long)(host >> 20), (unsigned long long)(memory >> 20));
    return STATUS_OK;
}

static int dry_run(const struct settings *settings)
{
    struct fault fault = {.text = ""};
    struct stack_options options;
    char state[ENGINE_PATH];
    struct stack_fit fit;
    struct sysinfo info;
    bool gpu = strcmp(settings->device, "cpu") != 0, checked = true;
    if (wire_stack_options(settings, NULL, state, sizeof state, &options, &fault))
        return complain(&fault);
    uint64_t memory = sysinfo(&info) == 0 ? (uint64_t)info.totalram * info.mem_unit : 0;
    enum status status = stack_fit(&options, gpu ? 0 : memory, &fit, &fault);
    if (fit.model.config.layers) {
        show_fit(&fit);
        if (!gpu)
            (void)printf("in all           %10.1f MiB of %.1f MiB; context %u tokens\n",
                         mib(fit.total_bytes), mib(memory), fit.context_max);
        else if (!status)
            status = fit_gpu(&options, &fit, memory, &checked, &fault);
    }
    model_config_clear(&fit.model.config);
    if (status)
        return complain(&fault);
    if (checked)
        (void)printf("fits\n");
    else
        (void)printf("fits the host; whether it fits %s was not checked\n", settings->device);
    return EXIT_DONE;
}

// ---- serving ----

static enum status check_listen(const struct settings *s, struct fault *fault)
{
    if (s->no_tcp && !s->uds)
        return fault_set(fault, STATUS_INVALID,
                         "--no-tcp leaves no address to listen on; give --uds PATH.");
    if (s->port > UINT16_MAX)
        return fault_set(fault, STATUS_INVALID, "--port %u: TCP ports end at %d.", s->port,
                         UINT16_MAX);
    return STATUS_OK;
}

static void fill_listen(const struct settings *s, struct server_options *o, char *tcp, char *uds)
{
    int n = 0;
    if (!s->no_tcp) {
        (void)snprintf(tcp, ADDRESS_ROOM, "%s:%u", s->host, s->port);
        o->listen[n++] = tcp;
    }
    if (s->uds) {
        (void)snprintf(uds, ADDRESS_ROOM, "unix:%s", s->uds);
        o->listen[n++] = uds;
    }
}

// Clients name absolute paths, so the roots are made absolute too.
static enum status absolute_roots(const struct settings *s,
                                  char roots[SERVER_ADAPTER_DIRS_MAX][ENGINE_PATH],
                                  struct server_options *o, struct fault *fault)
{
    if (s->adapter_dirs.count > SERVER_ADAPTER_DIRS_MAX)
        return fault_set(fault, STATUS_INVALID, "at most %d --adapter-dir are taken.",
                         SERVER_ADAPTER_DIRS_MAX);
    for (uint32_t i = 0; i < s->adapter_dirs.count; i++) {
        char path[PATH_MAX];
        if (!realpath(s->adapter_dirs.item[i], path) || strlen(path) >= ENGINE_PATH)
            return fault_set(fault, STATUS_NOT_FOUND, "--adapter-dir %s is not a directory.",
                             s->adapter_dirs.item[i]);
        (void)snprintf(roots[i], ENGINE_PATH, "%s", path);
        o->adapter_dirs[i] = roots[i];
    }
    return STATUS_OK;
}

// More than 49 days are as good as for ever.
static uint32_t milliseconds(uint32_t seconds)
{
    return seconds > UINT32_MAX / 1000 ? UINT32_MAX : seconds * 1000;
}

// What the engine could not register, for the server to tell its owners. The caller frees.
static const struct server_broken *broken_of(const struct stack *stack, size_t *count)
{
    const struct stack_left *left = stack_left_alone(stack, count);
    struct server_broken *broken = calloc(*count + 1, sizeof *broken);
    for (size_t i = 0; broken && i < *count; i++) {
        memcpy(broken[i].name, left[i].name, sizeof broken[i].name);
        memcpy(broken[i].tenant, left[i].tenant, sizeof broken[i].tenant);
        memcpy(broken[i].why, left[i].why, sizeof broken[i].why);
    }
    *count = broken ? *count : 0;
    return broken;
}

static int serve_stack(const struct settings *s, struct face *face, struct fault *fault)
{
    char tcp[ADDRESS_ROOM], uds[ADDRESS_ROOM], state[ENGINE_PATH];
    struct stack_options paths;
    if (wire_stack_options(s, NULL, state, sizeof state, &paths, fault))
        return complain(fault);
    struct server_options o = {
        .port = stack_port(face->stack),
        .engine = stack_limits(face->stack),
        .tokenizer = {.context = face, .encode = encode, .decode = decode},
        .converter = {.context = face,
                      .convert = s->adapter_dirs.count || s->max_upload_bytes ? convert : NULL},
        .upload_bytes_max = s->max_upload_bytes,
        .state_dir = state,
        .tenants_path = s->tenants,
        .open_access = !s->tenants,
        .clock = clock_monotonic(),
        .limits = {.connections_max = s->max_connections,
                   .frame_bytes = s->max_frame_bytes,
                   .idle_timeout_ms = milliseconds(s->idle_timeout),
                   .slow_reader_timeout_ms = milliseconds(s->slow_reader_timeout),
                   .shutdown_timeout_ms = milliseconds(s->shutdown_timeout)},
        .ready = ready};
    char roots[SERVER_ADAPTER_DIRS_MAX][ENGINE_PATH];
    if (absolute_roots(s, roots, &o, fault))
        return complain(fault);
    wire_model_name(s, o.engine.model_name, sizeof o.engine.model_name);
    fill_listen(s, &o, tcp, uds);
    o.broken = broken_of(face->stack, &o.broken_count);
    if (stack_start(face->stack)) {
        (void)fault_set(fault, STATUS_NO_MEMORY, "the engine thread could not be started.");
        return complain(fault);
    }
    if (!s->tenants)
        log_line(LOG_WARN, "no --tenants file: anyone who can connect is served, as one tenant");
    enum status status = server_run(&o, fault);
    free((void *)(uintptr_t)o.broken);
    return status ? complain(fault) : EXIT_DONE;
}

// Every registered adapter keeps its store file open, every client a socket.
static void raise_file_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0)
        return;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0)
        log_line(LOG_WARN, "the limit on open files stays at its default");
}

int command_serve(const struct settings *settings)
{
    struct fault fault = {.text = ""};
    struct face face = {0};
    if (settings->dry_run)
        return dry_run(settings);
    if (check_listen(settings, &fault))
        return complain(&fault);
    raise_file_limit();
    struct tenants *tenants = NULL;
    if (settings->tenants && tenants_load(settings->tenants, NULL, &tenants, &fault))
        return complain(&fault);
    int code = EXIT_FAILED;
    if (wire_text_load(settings, &face.text, &fault) ||
        wire_stack(settings, face.text.tokenizer, tenants, true, &face.stack, &fault))
        code = complain(&fault);
    else
        code = serve_stack(settings, &face, &fault);
    stack_destroy(face.stack);
    wire_text_clear(&face.text);
    tenants_free(tenants);
    return code;
}

int command_check_config(const struct settings *settings)
{
    struct fault fault = {.text = ""};
    uint32_t tenants = 0;
    if (check_listen(settings, &fault))
        return complain(&fault);
    if (settings->tenants && count_tenants(settings->tenants, &tenants, &fault))
        return complain(&fault);
    if (settings->model) {
        struct model_config config;
        if (model_config_load(settings->model, &config, &fault))
            return complain(&fault);
        (void)printf("model: %s, %u layers\n", config.architecture, config.layers);
        model_config_clear(&config);
    }
    (void)printf("options are in order");
    if (settings->tenants)
        (void)printf("; %u tenants", tenants);
    (void)printf("\n");
    return EXIT_DONE;
}
