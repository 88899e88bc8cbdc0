// SPDX-License-Identifier: Apache-2.0
// Runs a fuzz target over the files of its seed corpus, for builds without libFuzzer.
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int run_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        return 1;
    static uint8_t bytes[1 << 20];
    size_t n = fread(bytes, 1, sizeof bytes, file);
    (void)fclose(file);
    // An exact-size copy, so that the address sanitizer sees reads past the end.
    uint8_t *copy = malloc(n ? n : 1);
    if (!copy)
        return 1;
    for (size_t i = 0; i < n; i++)
        copy[i] = bytes[i];
    (void)LLVMFuzzerTestOneInput(copy, n);
    free(copy);
    return 0;
}

int main(int count, char **arguments)
{
    int files = 0;
    for (int i = 1; i < count; i++) {
        DIR *directory = opendir(arguments[i]);
        if (!directory) {
            (void)fprintf(stderr, "no corpus directory %s\n", arguments[i]);
            return 1;
        }
        for (struct dirent *entry; (entry = readdir(directory));) {
            char path[1200];
            (void)snprintf(path, sizeof path, "%s/%s", arguments[i], entry->d_name);
            if (entry->d_name[0] != '.')
                files += run_file(path) == 0;
        }
        (void)closedir(directory);
    }
    (void)printf("%d seed inputs run\n", files);
    return files ? 0 : 1;
}
