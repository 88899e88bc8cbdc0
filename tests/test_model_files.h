// SPDX-License-Identifier: Apache-2.0
// Checkpoints of tests: a scratch directory, a synthetic model in it, its tensors in memory to be
// changed and written back. Everything that fails here ends the test.
#ifndef POLDER_TESTS_TEST_MODEL_FILES_H
#define POLDER_TESTS_TEST_MODEL_FILES_H

#include <stddef.h>
#include <stdint.h>

enum { FILES_ITEMS_MAX = 512 };

struct files_item {
    char name[96];
    const char *dtype; // as in the file
    uint32_t dims;
    uint64_t shape[3];
    uint8_t *data;
    size_t bytes;
};

struct files {
    struct files_item items[FILES_ITEMS_MAX];
    size_t count;
};

// A new directory below /tmp; the caller passes it to files_remove (which removes what is in it).
void files_scratch(char out[64]);
void files_remove(const char *directory);
void files_write_text(const char *directory, const char *name, const char *text);

// directory/model.safetensors into memory, and back into directory/`name`.
void files_read(const char *directory, struct files *out);
void files_write(const char *directory, const char *name, const struct files *files);
void files_clear(struct files *files);
struct files_item *files_find(struct files *files, const char *name);
// Adds a zeroed tensor; shape 0 ends the list of dimensions.
struct files_item *files_add(struct files *files, const char *name, const char *dtype,
                             const uint64_t shape[3]);
void files_drop(struct files *files, const char *name);

#endif
