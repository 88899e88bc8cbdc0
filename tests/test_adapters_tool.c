// SPDX-License-Identifier: Apache-2.0
#include "tests/test_adapters_tool.h"

#include <dirent.h>
#include <stdarg.h>
#include <setjmp.h>
#include <cmocka.h>
#include <stdio.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/rng.h"

struct adapter_base tool_base(enum dtype dtype)
{
    static const uint8_t is_moe[2] = {0, 1};
    struct adapter_base base = {.layers = 2,
                                .hidden = 64,
                                .heads = 4,
                                .kv_heads = 2,
                                .head_dim = 16,
                                .intermediate = 96,
                                .experts = 4,
                                .moe_intermediate = 24,
                                .vocab = 100,
                                .is_moe = is_moe,
                                .dtype = dtype};
    base.digest = hash_bytes(NULL, "tiny", 4);
    return base;
}

void tool_adapter_begin(struct tool_adapter *adapter, const char *scratch)
{
    static uint32_t number;
    memset(adapter, 0, sizeof *adapter);
    (void)snprintf(adapter->directory, sizeof adapter->directory, "%s/a%u", scratch, number);
    assert_int_equal(mkdir(adapter->directory, 0700), 0);
    adapter->type = "F32";
    adapter->seed = ++number;
    tool_config(adapter, "\"target_modules\": [\"q_proj\", \"v_proj\"]");
    for (int layer = 0; layer < 2; layer++) {
        char module[64];
        (void)snprintf(module, sizeof module, "layers.%d.self_attn.q_proj", layer);
        tool_pair_add(adapter, module, 4, 64, 64);
        (void)snprintf(module, sizeof module, "layers.%d.self_attn.v_proj", layer);
        tool_pair_add(adapter, module, 4, 64, 32);
    }
}

void tool_tensor_add(struct tool_adapter *adapter, const char *name, uint32_t dims, uint64_t a,
                     uint64_t b, uint64_t c)
{
    assert_true(adapter->count < TOOL_TENSORS);
    struct tool_tensor *tensor = &adapter->tensors[adapter->count++];
    (void)snprintf(tensor->name, sizeof tensor->name, "%s", name);
    tensor->dims = dims;
    tensor->shape[0] = a;
    tensor->shape[1] = b;
    tensor->shape[2] = c;
}

void tool_pair_add(struct tool_adapter *adapter, const char *module, uint64_t rank, uint64_t d_in,
                   uint64_t d_out)
{
    char name[160];
    (void)snprintf(name, sizeof name, "base_model.model.model.%s.lora_A.weight", module);
    tool_tensor_add(adapter, name, 2, rank, d_in, 0);
    (void)snprintf(name, sizeof name, "base_model.model.model.%s.lora_B.weight", module);
    tool_tensor_add(adapter, name, 2, d_out, rank, 0);
}

void tool_config(struct tool_adapter *adapter, const char *rest)
{
    (void)snprintf(adapter->config, sizeof adapter->config,
                   "{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 8, %s}", rest);
}

static size_t elements_of(const struct tool_tensor *tensor)
{
    size_t elements = 1;
    for (uint32_t i = 0; i < tensor->dims; i++)
        elements *= tensor->shape[i];
    return elements;
}

static void value_write(const char *type, float value, uint8_t *out)
{
    uint32_t bits;
    double wide = value;
    memcpy(&bits, &value, 4);
    uint16_t half = (uint16_t)(bits >> 16);
    if (strcmp(type, "F32") == 0)
        memcpy(out, &bits, 4);
    else if (strcmp(type, "F64") == 0)
        memcpy(out, &wide, 8);
    else
        memcpy(out, &half, 2); // bf16; as f16 the same bits are other numbers, finite as well
}

void tool_adapter_write(const struct tool_adapter *adapter)
{
    char path[TOOL_PATH + 64];
    size_t width = strcmp(adapter->type, "F32") == 0   ? 4
                   : strcmp(adapter->type, "F64") == 0 ? 8
                                                       : 2;
    size_t room = 64 * 1024, header = 8, data = 0;
    for (uint32_t i = 0; i < adapter->count; i++)
        data += elements_of(&adapter->tensors[i]) * width;
    uint8_t *file = calloc(1, room + data);
    assert_non_null(file);
    file[header++] = '{';
    size_t at = 0;
    for (uint32_t i = 0; i < adapter->count; i++) {
        const struct tool_tensor *t = &adapter->tensors[i];
        size_t bytes = elements_of(t) * width;
        char shape[80];
        (void)snprintf(shape, sizeof shape,
                       t->dims == 3   ? "%u,%u,%u"
                       : t->dims == 2 ? "%u,%u"
                                      : "%u",
                       (unsigned)t->shape[0], (unsigned)t->shape[1], (unsigned)t->shape[2]);
        header += (size_t)snprintf(
            (char *)file + header, room - header,
            "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}", i ? "," : "",
            t->name, adapter->type, shape, at, at + bytes);
        at += bytes;
    }
    file[header++] = '}';
    uint64_t length = header - 8;
    memcpy(file, &length, 8);
    for (size_t i = 0; i < data / width; i++)
        value_write(adapter->type, rng_uniform(adapter->seed, 1, i) - 0.5f,
                    file + header + i * width);
    if (adapter->poison != 0)
        value_write(adapter->type, adapter->poison, file + header + (data / width - 3) * width);
    (void)snprintf(path, sizeof path, "%s/adapter_model.safetensors", adapter->directory);
    tool_file_write(path, file, header + data);
    free(file);
    (void)snprintf(path, sizeof path, "%s/adapter_config.json", adapter->directory);
    tool_file_write(path, adapter->config, strlen(adapter->config));
}

char *tool_scratch(void)
{
    char template[] = "/tmp/test_adapters."
                      "XX"
                      "XX"
                      "XX";
    assert_non_null(mkdtemp(template));
    return strdup(template);
}

static void remove_tree(const char *path)
{
    DIR *directory = opendir(path);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        char inner[1024];
        struct stat info;
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        (void)snprintf(inner, sizeof inner, "%s/%s", path, entry->d_name);
        if (lstat(inner, &info) == 0 && S_ISDIR(info.st_mode))
            remove_tree(inner);
        else
            (void)unlink(inner);
    }
    if (directory)
        (void)closedir(directory);
    (void)rmdir(path);
}

void tool_scratch_remove(char *scratch)
{
    remove_tree(scratch);
    free(scratch);
}

void tool_file_write(const char *path, const void *bytes, size_t count)
{
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(bytes, 1, count, file), count);
    assert_int_equal(fclose(file), 0);
}

void *tool_file_read(const char *path, size_t *count)
{
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    (void)fseek(file, 0, SEEK_END);
    *count = (size_t)ftell(file);
    (void)fseek(file, 0, SEEK_SET);
    uint8_t *bytes = malloc(*count + 1);
    assert_non_null(bytes);
    assert_int_equal(fread(bytes, 1, *count, file), *count);
    (void)fclose(file);
    return bytes;
}

void tool_rig_make(struct tool_rig *rig, const struct adapter_base *base, size_t page_bytes,
                   uint32_t device_pages, uint32_t host_pages, uint32_t adapters_max)
{
    memset(rig, 0, sizeof *rig);
    rig->page_bytes = page_bytes;
    rig->now_us = 1000;
    rig->device_arena = calloc(device_pages, page_bytes);
    rig->host_arena = calloc(host_pages, page_bytes);
    assert_true(rig->device_arena && rig->host_arena);
    struct cpu_options cpu = {.threads = 1, .dtype = base->dtype};
    assert_int_equal(device_create_cpu(&cpu, &rig->device, NULL), STATUS_OK);
    assert_int_equal(rig->device->table->stream_create(rig->device, 4, &rig->stream), STATUS_OK);
    fake_link_init(&rig->link, 7, &rig->now_us);
    struct copy_options copies = {.link = &rig->link.link,
                                  .clock = clock_fake(&rig->now_us),
                                  .copies_max = device_pages + host_pages,
                                  .owners_max = 8};
    assert_int_equal(copy_create(&copies, &rig->copies), STATUS_OK);
    struct pool_options pool = {.page_bytes = page_bytes,
                                .device_pages = device_pages,
                                .host_pages = host_pages,
                                .objects_max = adapters_max + 64,
                                .slots_max = adapters_max * 8 + 512,
                                .owners_max = 8,
                                .device_arena = rig->device_arena,
                                .host_arena = rig->host_arena,
                                .copies = rig->copies};
    assert_int_equal(pool_create(&pool, &rig->pool, NULL), STATUS_OK);
    struct adapter_options options = {.pool = rig->pool,
                                      .device = rig->device,
                                      .arena = rig->device_arena,
                                      .base = *base,
                                      .clock = clock_fake(&rig->now_us),
                                      .adapters_max = adapters_max,
                                      .resident_max = adapters_max,
                                      .fetch_us_per_byte = 0.0001f};
    assert_int_equal(adapters_create(&options, &rig->adapters), STATUS_OK);
}

void tool_rig_clear(struct tool_rig *rig)
{
    adapters_destroy(rig->adapters);
    pool_check(rig->pool);
    copy_destroy(rig->copies);
    pool_destroy(rig->pool);
    rig->device->table->stream_destroy(rig->stream);
    rig->device->table->destroy(rig->device);
    free(rig->device_arena);
    free(rig->host_arena);
}

void tool_rig_settle(struct tool_rig *rig)
{
    for (int i = 0; i < 10000; i++) {
        pool_poll(rig->pool);
        rig->now_us += 100;
        if (copy_is_idle(rig->copies))
            break;
    }
    pool_poll(rig->pool);
    pool_check(rig->pool);
    struct segment_result result;
    adapters_flush(rig->adapters, rig->stream);
    assert_int_equal(rig->device->table->submit(rig->stream), STATUS_OK);
    assert_int_equal(rig->device->table->wait(rig->stream, &result), STATUS_OK);
}

bool tool_padding_is_zero(const struct tool_rig *rig, const struct adapter_base *base,
                          const struct lora_adapter_view *view, const struct lora_slice *slice,
                          uint32_t row, uint32_t dim)
{
    const uint8_t *at = lora_row_at(rig->device_arena, rig->page_bytes, view->pages, slice, row);
    for (size_t i = dim * dtype_bytes(base->dtype); i < slice->row_bytes; i++)
        if (at[i])
            return false;
    return true;
}

float tool_element(const struct tool_rig *rig, const struct adapter_base *base,
                   const struct lora_adapter_view *view, const struct lora_slice *slice,
                   uint32_t row, uint32_t i)
{
    const uint8_t *at = lora_row_at(rig->device_arena, rig->page_bytes, view->pages, slice, row);
    float value;
    uint16_t half;
    if (base->dtype == DTYPE_F32) {
        memcpy(&value, at + 4 * (size_t)i, 4);
        return value;
    }
    memcpy(&half, at + 2 * (size_t)i, 2);
    return bf16_to_f32(half);
}

void tool_rig_bring(struct tool_rig *rig, adapter_id id)
{
    assert_int_equal(adapter_fetch(rig->adapters, id, COPY_STANDARD, COPY_ADAPTER), STATUS_OK);
    uint32_t next = 0;
    assert_true(adapter_fetch_parts(rig->adapters, id, COPY_STANDARD, INFINITY, &next));
    for (int i = 0; i < 1000 && adapter_parts_coming(rig->adapters, id); i++)
        tool_rig_settle(rig);
    tool_rig_settle(rig);
    assert_true(adapter_is_resident(rig->adapters, id) && adapter_is_whole(rig->adapters, id));
}
