// SPDX-License-Identifier: Apache-2.0
#include "test_model_files.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/check.h"
#include "base/safetensors.h"

void files_scratch(char out[64])
{
    (void)snprintf(out, 64, "/tmp/test_model.XXXXXX");
    CHECK(mkdtemp(out));
}

void files_remove(const char *directory)
{
    DIR *d = opendir(directory);
    CHECK(d);
    for (struct dirent *entry; (entry = readdir(d));) {
        char path[512];
        (void)snprintf(path, sizeof path, "%s/%s", directory, entry->d_name);
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0 && unlink(path))
            files_remove(path);
    }
    (void)closedir(d);
    CHECK(rmdir(directory) == 0);
}

static FILE *create(const char *directory, const char *name)
{
    char path[512];
    (void)snprintf(path, sizeof path, "%s/%s", directory, name);
    FILE *file = fopen(path, "wb");
    CHECK(file);
    return file;
}

void files_write_text(const char *directory, const char *name, const char *text)
{
    FILE *file = create(directory, name);
    CHECK(fputs(text, file) >= 0 && fclose(file) == 0);
}

void files_read(const char *directory, struct files *out)
{
    struct reader *reader = NULL;
    struct safetensors *file = NULL;
    CHECK(!reader_open_in(directory, "model.safetensors", &reader, NULL));
    CHECK(!safetensors_open(reader, "model.safetensors", &file, NULL));
    *out = (struct files){0};
    for (size_t i = 0; i < safetensors_count(file); i++) {
        const struct tensor *tensor = safetensors_at(file, i);
        uint64_t shape[3] = {0};
        memcpy(shape, tensor->shape, tensor->dims * sizeof shape[0]);
        struct files_item *item =
            files_add(out, tensor->name, tensor_type_name(tensor->type), shape);
        CHECK(item->bytes == tensor->bytes);
        CHECK(!safetensors_read(file, tensor, 0, item->data, item->bytes, NULL));
    }
    safetensors_close(file);
    reader_close(reader);
}

void files_write(const char *directory, const char *name, const struct files *files)
{
    FILE *file = create(directory, name);
    char *header = NULL;
    size_t bytes = 0, at = 0;
    FILE *text = open_memstream(&header, &bytes);
    CHECK(text);
    for (size_t i = 0; i < files->count; i++) {
        const struct files_item *item = &files->items[i];
        (void)fprintf(text, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", i ? "," : "{", item->name,
                      item->dtype);
        for (uint32_t d = 0; d < item->dims; d++)
            (void)fprintf(text, "%s%llu", d ? "," : "", (unsigned long long)item->shape[d]);
        (void)fprintf(text, "],\"data_offsets\":[%zu,%zu]}", at, at + item->bytes);
        at += item->bytes;
    }
    (void)fputc('}', text);
    CHECK(fclose(text) == 0);
    uint64_t length = bytes;
    CHECK(fwrite(&length, sizeof length, 1, file) == 1 && fwrite(header, 1, bytes, file) == bytes);
    for (size_t i = 0; i < files->count; i++)
        CHECK(fwrite(files->items[i].data, 1, files->items[i].bytes, file) ==
              files->items[i].bytes);
    CHECK(fclose(file) == 0);
    free(header);
}

void files_clear(struct files *files)
{
    for (size_t i = 0; i < files->count; i++)
        free(files->items[i].data);
    *files = (struct files){0};
}

struct files_item *files_find(struct files *files, const char *name)
{
    for (size_t i = 0; i < files->count; i++)
        if (!strcmp(files->items[i].name, name))
            return &files->items[i];
    CHECK(files->count == FILES_ITEMS_MAX + 1); // there is no tensor of this name
    return NULL;
}

struct files_item *files_add(struct files *files, const char *name, const char *dtype,
                             const uint64_t shape[3])
{
    CHECK(files->count < FILES_ITEMS_MAX);
    struct files_item *item = &files->items[files->count++];
    *item = (struct files_item){.dtype = dtype};
    (void)snprintf(item->name, sizeof item->name, "%s", name);
    size_t elements = 1;
    for (; item->dims < 3 && shape[item->dims]; item->dims++) {
        item->shape[item->dims] = shape[item->dims];
        elements *= (size_t)shape[item->dims];
    }
    item->bytes = elements * (!strcmp(dtype, "F32") ? 4 : !strcmp(dtype, "U8") ? 1 : 2);
    item->data = calloc(1, item->bytes);
    CHECK(item->data);
    return item;
}

void files_drop(struct files *files, const char *name)
{
    struct files_item *item = files_find(files, name);
    free(item->data);
    size_t index = (size_t)(item - files->items);
    memmove(item, item + 1, (--files->count - index) * sizeof *item);
}
