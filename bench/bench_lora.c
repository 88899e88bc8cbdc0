// SPDX-License-Identifier: Apache-2.0
// Random LoRA adapters, made the way real ones come: a PEFT directory per rank is written,
// converted by the stack and registered once for every adapter of that rank.
//
// Each adapter has a pool object and pages of its own. Those of one rank share their numbers, since
// what a step reads, and how long that takes, depends on where slices lie and not on what is in
// them. So the files are one per rank, and the registry keeps them open: they are removed before
// the adapters are fetched.
//
// Numbers: A and B are uniform with the standard deviation SD, all cut from one random block, and
// alpha sets the size of the whole: an adapter adds STRENGTH of what a projection of random weights
// gives for inputs near 1. That is enough to change what is sampled and little enough that the
// router of a random MoE model spreads rows as it does without.
//
// Does not decide what an adapter costs or whether that is good (bench_step.c).
#include "bench/bench_lora.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/arith.h"
#include "base/check.h"
#include "base/rng.h"

enum { BLOCK_ELEMENTS = 1 << 20, ROW_ALIGN = 64, SEED = 11 };

#define SD 0.02
#define STRENGTH 0.05

void bench_lora_name(uint32_t index, char out[ADAPTER_NAME_MAX])
{
    (void)snprintf(out, ADAPTER_NAME_MAX, "lora-%u", index);
}

bool bench_lora_targets_parse(const char *text, enum bench_lora_targets *out)
{
    for (int t = BENCH_LORA_ALL; t <= BENCH_LORA_EXPERTS; t++) {
        if (!strcmp(text, bench_lora_targets_name((enum bench_lora_targets)t))) {
            *out = (enum bench_lora_targets)t;
            return true;
        }
    }
    return false;
}

const char *bench_lora_targets_name(enum bench_lora_targets targets)
{
    static const char *const names[] = {"all", "attention", "experts"};
    return names[targets];
}

static uint32_t rank_of(const struct bench_lora *lora, uint32_t index)
{
    return lora->rank[index % lora->ranks];
}

// ---- the matrices of an adapter ----

// All zero before the first.
struct matrix {
    bool begun, is_expert;
    uint32_t layer, module, expert, d_in, d_out;
};

// The next one, in the order of the store: layer, q k v o, then gate up down expert by expert; of
// these only the targets.
static bool next_matrix(const struct bench_lora *lora, const struct adapter_base *base,
                        struct matrix *m)
{
    uint32_t first = lora->targets == BENCH_LORA_EXPERTS ? LORA_GATE : LORA_Q;
    bool mlp = lora->targets != BENCH_LORA_ATTENTION;
    bool stays = m->begun && (m->module < LORA_O || (m->module == LORA_O && mlp) ||
                              m->module == LORA_GATE || m->module == LORA_UP);
    if (stays) {
        m->module++;
    } else if (m->begun && m->is_expert && m->expert + 1 < base->experts) {
        m->module = LORA_GATE;
        m->expert++;
    } else {
        *m = (struct matrix){.begun = true, .layer = m->begun ? m->layer + 1 : 0, .module = first};
    }
    if (m->layer == base->layers)
        return false;
    m->is_expert = m->module >= LORA_GATE && base->is_moe[m->layer];
    uint32_t q = base->heads * base->head_dim, kv = base->kv_heads * base->head_dim;
    uint32_t units = m->is_expert ? base->moe_intermediate : base->intermediate;
    const uint32_t in[LORA_MODULES] = {
        [LORA_Q] = base->hidden,    [LORA_K] = base->hidden,  [LORA_V] = base->hidden, [LORA_O] = q,
        [LORA_GATE] = base->hidden, [LORA_UP] = base->hidden, [LORA_DOWN] = units};
    const uint32_t out[LORA_MODULES] = {[LORA_Q] = q,
                                        [LORA_K] = kv,
                                        [LORA_V] = kv,
                                        [LORA_O] = base->hidden,
                                        [LORA_GATE] = units,
                                        [LORA_UP] = units,
                                        [LORA_DOWN] = base->hidden};
    m->d_in = in[m->module];
    m->d_out = out[m->module];
    return true;
}

// ---- sizes ----

static uint64_t pages_of(const struct bench_lora *lora, const struct adapter_base *base,
                         size_t page_bytes, uint32_t rank)
{
    uint64_t pages = 1;
    size_t used = 0;
    for (struct matrix m = {0}; next_matrix(lora, base, &m);) {
        const uint32_t dims[] = {m.d_in, m.d_out};
        for (uint32_t i = 0; i < 2 * rank; i++) {
            size_t row = round_up(dims[i / rank] * dtype_bytes(base->dtype), ROW_ALIGN);
            if (page_bytes - used < row) {
                pages++;
                used = 0;
            }
            used += row;
        }
    }
    return pages;
}

uint64_t bench_lora_pages(const struct bench_lora *lora, const struct adapter_base *base,
                          size_t page_bytes)
{
    uint64_t pages = 0;
    for (uint32_t r = 0; r < lora->ranks && r < lora->count; r++) {
        uint32_t adapters = (lora->count - r + lora->ranks - 1) / lora->ranks;
        pages += adapters * pages_of(lora, base, page_bytes, lora->rank[r]);
    }
    return pages;
}

double bench_lora_work(const struct bench_lora *lora, const struct adapter_base *base,
                       uint32_t top_k, uint32_t rank)
{
    double dims = 0;
    for (struct matrix m = {0}; next_matrix(lora, base, &m);)
        if (!m.is_expert || m.expert < top_k)
            dims += (double)m.d_in + m.d_out;
    return dims * rank;
}

double bench_lora_step_bytes(const struct bench_lora *lora, const struct adapter_base *base,
                             uint32_t top_k, uint32_t batch)
{
    double ranks = 0;
    for (uint32_t i = 0; i < lora->count && i < batch; i++)
        ranks += rank_of(lora, i);
    return bench_lora_work(lora, base, top_k, 1) * ranks * (double)dtype_bytes(base->dtype);
}

// ---- a PEFT directory ----

static void print_tensor(FILE *file, const struct matrix *m, bool is_b, uint32_t rank, uint64_t *at)
{
    static const char *const words[LORA_MODULES] = {"q", "k", "v", "o", "gate", "up", "down"};
    uint64_t begin = *at;
    char experts[32] = "";
    if (m->is_expert)
        (void)snprintf(experts, sizeof experts, "experts.%u.", m->expert);
    *at += 2ull * rank * (is_b ? m->d_out : m->d_in);
    (void)fprintf(file,
                  "%s\"base_model.model.model.layers.%u.%s.%s%s_proj.lora_%s.weight\":"
                  "{\"dtype\":\"BF16\",\"shape\":[%u,%u],\"data_offsets\":[%llu,%llu]}",
                  begin ? "," : "{", m->layer, m->module < LORA_GATE ? "self_attn" : "mlp", experts,
                  words[m->module], is_b ? "B" : "A", is_b ? m->d_out : rank, is_b ? rank : m->d_in,
                  (unsigned long long)begin, (unsigned long long)*at);
}

static void write_header(FILE *file, const struct bench_lora *lora, const struct adapter_base *base,
                         uint32_t rank)
{
    char *text = NULL;
    size_t bytes = 0;
    uint64_t at = 0;
    FILE *header = open_memstream(&text, &bytes);
    CHECK(header);
    for (struct matrix m = {0}; next_matrix(lora, base, &m);) {
        print_tensor(header, &m, false, rank, &at);
        print_tensor(header, &m, true, rank, &at);
    }
    (void)fputs("}", header);
    CHECK(!fclose(header));
    uint64_t length = bytes;
    (void)fwrite(&length, sizeof length, 1, file);
    (void)fwrite(text, 1, bytes, file);
    free(text);
}

// Elements cut from the block, beginning anywhere.
static void write_elements(FILE *file, const uint16_t *block, uint64_t place, uint64_t elements)
{
    for (uint64_t at = place % BLOCK_ELEMENTS, n; elements; elements -= n, at = 0) {
        n = min_size((size_t)elements, (size_t)(BLOCK_ELEMENTS - at));
        (void)fwrite(block + at, sizeof *block, n, file);
    }
}

static void write_weights(FILE *file, const struct bench_lora *lora,
                          const struct adapter_base *base, uint32_t rank, const uint16_t *block)
{
    uint64_t tensor = 0;
    write_header(file, lora, base, rank);
    for (struct matrix m = {0}; next_matrix(lora, base, &m); tensor += 2) {
        write_elements(file, block, rng_at(SEED, rank, tensor), (uint64_t)rank * m.d_in);
        write_elements(file, block, rng_at(SEED, rank, tensor + 1), (uint64_t)rank * m.d_out);
    }
}

static void write_config(FILE *file, const struct bench_lora *lora, const struct adapter_base *base,
                         uint32_t rank)
{
    static const char *const modules[] = {
        [BENCH_LORA_ALL] = ("\"q_proj\",\"k_proj\",\"v_proj\",\"o_proj\","
                            "\"gate_proj\",\"up_proj\",\"down_proj\""),
        [BENCH_LORA_ATTENTION] = "\"q_proj\",\"k_proj\",\"v_proj\",\"o_proj\"",
        [BENCH_LORA_EXPERTS] = "\"gate_proj\",\"up_proj\",\"down_proj\""};
    double scale = STRENGTH / (SD * SD * sqrt((double)base->hidden * rank));
    (void)fprintf(file,
                  "{\"peft_type\":\"LORA\",\"r\":%u,\"lora_alpha\":%.6g,\"target_modules\":[%s]}",
                  rank, scale * rank, modules[lora->targets]);
}

struct directory {
    char path[ENGINE_PATH - 40], config[ENGINE_PATH], weights[ENGINE_PATH];
};

static enum status write_fault(const char *path, struct fault *fault)
{
    return fault_set(fault, STATUS_IO, "writing %.200s failed: %s.", path, strerror(errno));
}

static enum status write_directory(const struct directory *d, const struct bench_lora *lora,
                                   const struct adapter_base *base, uint32_t rank,
                                   const uint16_t *block, struct fault *fault)
{
    if (mkdir(d->path, 0700) != 0 && errno != EEXIST)
        return write_fault(d->path, fault);
    FILE *file = fopen(d->config, "w");
    if (!file)
        return write_fault(d->config, fault);
    write_config(file, lora, base, rank);
    bool failed = ferror(file);
    if (fclose(file) || failed)
        return write_fault(d->config, fault);
    file = fopen(d->weights, "w");
    if (!file)
        return write_fault(d->weights, fault);
    write_weights(file, lora, base, rank, block);
    failed = ferror(file);
    return fclose(file) || failed ? write_fault(d->weights, fault) : STATUS_OK;
}

// ---- into the stack ----

static void fill_block(uint16_t *block)
{
    for (uint32_t i = 0; i < BLOCK_ELEMENTS; i++) {
        double centred = rng_uniform(SEED, 0, i) - 0.5;
        block[i] = bf16_from_f32((float)(centred * sqrt(12) * SD));
    }
}

static void name_directory(const char *path, struct directory *d)
{
    (void)snprintf(d->path, sizeof d->path, "%.900s", path);
    (void)snprintf(d->config, sizeof d->config, "%s/adapter_config.json", d->path);
    (void)snprintf(d->weights, sizeof d->weights, "%s/adapter_model.safetensors", d->path);
}

enum status bench_lora_peft(const struct bench_lora *lora, struct stack *stack, uint32_t r,
                            const char *path, struct fault *fault)
{
    struct directory d;
    uint16_t *block = malloc(BLOCK_ELEMENTS * sizeof *block);
    if (!block)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for random adapters.");
    fill_block(block);
    name_directory(path, &d);
    enum status status =
        write_directory(&d, lora, stack_adapter_base(stack), lora->rank[r], block, fault);
    free(block);
    return status;
}

void bench_lora_peft_remove(const char *path)
{
    struct directory d;
    name_directory(path, &d);
    (void)unlink(d.config);
    (void)unlink(d.weights);
    (void)rmdir(d.path);
}

enum status bench_lora_store(const struct bench_lora *lora, struct stack *stack, uint32_t r,
                             const char *scratch, char store[ENGINE_PATH], struct fault *fault)
{
    struct adapter_report report;
    char name[ADAPTER_NAME_MAX], path[ENGINE_PATH];
    *store = 0;
    (void)snprintf(path, sizeof path, "%.800s/peft", scratch);
    (void)snprintf(name, sizeof name, "%s-%u-%u", bench_lora_targets_name(lora->targets),
                   lora->rank[r], r);
    enum status status = bench_lora_peft(lora, stack, r, path, fault);
    if (!status)
        status = stack_convert_adapter(stack, name, path, store, ENGINE_PATH, &report, fault);
    bench_lora_peft_remove(path);
    return status;
}

// Every adapter of the r-th rank: one store file, registered under each of their names.
static enum status add_rank(const struct bench_lora *lora, struct stack *stack, uint32_t r,
                            const char *scratch, struct fault *fault)
{
    char name[ADAPTER_NAME_MAX], store[ENGINE_PATH];
    enum status status = bench_lora_store(lora, stack, r, scratch, store, fault);
    for (uint32_t i = r; !status && i < lora->count; i += lora->ranks) {
        bench_lora_name(i, name);
        status = engine_register_adapter(stack_engine(stack), name, store, UINT32_MAX, fault);
    }
    if (*store)
        (void)unlink(store); // the registry has it open
    return status;
}

static enum status add_all(const struct bench_lora *lora, struct stack *stack, const char *scratch,
                           struct fault *fault)
{
    enum status status = STATUS_OK;
    for (uint32_t r = 0; !status && r < lora->ranks && r < lora->count; r++)
        status = add_rank(lora, stack, r, scratch, fault);
    return status;
}

static adapter_id id_of(struct stack *stack, uint32_t index)
{
    char name[ADAPTER_NAME_MAX];
    adapter_id id;
    bench_lora_name(index, name);
    CHECK(!adapter_find(stack_adapters(stack), name, &id));
    return id;
}

static enum status cannot_hold(const struct bench_lora *lora, struct stack *stack,
                               struct fault *fault)
{
    const struct expert_shape *shape = &stack_model(stack)->expert_shape;
    struct pool_stats pool;
    uint64_t adapters = 0;
    pool_stats(stack_pool(stack), &pool);
    for (uint32_t i = 0; i < lora->count; i++)
        adapters += adapter_page_count(stack_adapters(stack), id_of(stack, i));
    return fault_set(fault, STATUS_LIMIT,
                     "the pool of %u pages cannot hold %u adapters (%llu pages), %llu pages of "
                     "experts and the KV all at once.",
                     pool.device_total, lora->count, (unsigned long long)adapters,
                     (unsigned long long)shape->layers * shape->experts * shape->pages_per_expert);
}

enum status bench_lora_check(const struct bench_lora *lora, struct stack *stack,
                             struct fault *fault)
{
    struct adapters_stats stats;
    adapters_stats(stack_adapters(stack), &stats);
    return stats.resident == lora->count && !stats.given_back ? STATUS_OK
                                                              : cannot_hold(lora, stack, fault);
}

// One round over the adapters: *missing counts those that are not resident.
static enum status fetch_round(const struct bench_lora *lora, struct stack *stack,
                               uint32_t *missing, struct fault *fault)
{
    struct adapters *adapters = stack_adapters(stack);
    struct adapters_stats stats;
    bool refused = false;
    *missing = 0;
    for (uint32_t i = 0; i < lora->count; i++) {
        adapter_id id = id_of(stack, i);
        if (adapter_is_resident(adapters, id))
            continue;
        if (adapter_fetch_status(adapters, id) == STATUS_IO)
            return fault_set(fault, STATUS_IO, "reading an adapter's store file failed.");
        refused = adapter_fetch(adapters, id, COPY_STANDARD, COPY_ADAPTER) || refused;
        ++*missing;
    }
    adapters_stats(adapters, &stats);
    // What is refused while others arrive may only want a host page that they hold.
    return stats.given_back || (refused && !stats.fetching) ? cannot_hold(lora, stack, fault)
                                                            : STATUS_OK;
}

enum status bench_lora_load(const struct bench_lora *lora, struct stack *stack, const char *scratch,
                            struct fault *fault)
{
    const struct model *model = stack_model(stack);
    const struct expert_shape *shape = &model->expert_shape;
    struct pool_stats pool;
    pool_stats(stack_pool(stack), &pool);
    enum status status = add_all(lora, stack, scratch, fault);
    if (status)
        return status;
    uint64_t pages = bench_lora_pages(lora, stack_adapter_base(stack), pool.page_bytes) +
                     (uint64_t)shape->layers * shape->experts * shape->pages_per_expert;
    if (pages > pool.device_total)
        return cannot_hold(lora, stack, fault);
    for (uint32_t missing = 1; missing && !status;) {
        status = fetch_round(lora, stack, &missing, fault);
        if (!status && engine_turn(stack_engine(stack)) != ENGINE_BUSY)
            (void)usleep(50);
    }
    return status ? status : bench_lora_check(lora, stack, fault);
}

void bench_remove_tree(const char *path)
{
    DIR *directory = opendir(path);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        char inner[1024];
        struct stat info;
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        (void)snprintf(inner, sizeof inner, "%.700s/%s", path, entry->d_name);
        if (lstat(inner, &info) == 0 && S_ISDIR(info.st_mode))
            bench_remove_tree(inner);
        else
            (void)unlink(inner);
    }
    if (directory)
        (void)closedir(directory);
    (void)rmdir(path);
}

uint32_t bench_parse_list(const char *text, char separator, uint32_t *out, uint32_t room)
{
    char *end = NULL;
    for (uint32_t count = 0; count < room; text = end + 1) {
        out[count++] = (uint32_t)strtoul(text, &end, 10);
        if (end == text || !out[count - 1])
            return 0;
        if (!*end)
            return count;
        if (*end != separator)
            return 0;
    }
    return 0;
}
