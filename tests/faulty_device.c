// SPDX-License-Identifier: Apache-2.0
// The CPU device with faults: linked beside the objects of the binary `polder` with
// --wrap=device_create_cpu, so that all but the device is the product (tests/test_e2e_fault.py).
//
// It fails as a GPU does: a segment that is refused or that ends badly, and from then on memory and
// submits answer DEVICE. Copies go on (the CPU's link is a thread; sim_engine loses them). What it
// does is said by the environment, which only this file reads:
//   FAULTY_KIND    "refuse": submit fails; "segment": the segment runs and ends badly; "nan": the
//                  first row that is sampled next has a logit that is not a number, once
//   FAULTY_FILE    the fault is armed once this file exists; FAULTY_FILE.at gets the monotonic time
//                  in seconds at which the engine is told of it
//   FAULTY_AFTER   submits that go well after that
//   FAULTY_SLOW    microseconds that each submit takes longer, so that a test can see states pass
//   FAULTY_MEMORY  bytes of device memory; alloc answers NO_MEMORY beyond them
//
// The device is the CPU's own with another table, a copy in which some entries are these; what they
// need stands behind that copy.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "kernels/device.h"

enum status __real_device_create_cpu(const struct cpu_options *options, struct device **out,
                                     struct fault *fault);
enum status __wrap_device_create_cpu(const struct cpu_options *options, struct device **out,
                                     struct fault *fault);

struct faulty {
    struct device_table table; // first: device->table points to it
    const struct device_table *real;
    const char *kind, *file;
    uint64_t after;
    useconds_t slow;
    size_t memory, taken; // memory 0: as much as there is
    bool armed, ends_badly, failed;
    bool spoils, spoilt; // a row of the segment in flight; done
    float nan[16];
};

static struct faulty *faulty_of(const struct device *device)
{
    return (struct faulty *)(uintptr_t)device->table;
}

// ---- the fault ----

static void strike(struct faulty *f)
{
    char path[1100];
    struct timespec now;
    f->failed = true;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    (void)snprintf(path, sizeof path, "%s.at", f->file);
    FILE *file = fopen(path, "w");
    if (!file)
        return;
    (void)fprintf(file, "%lld.%09ld\n", (long long)now.tv_sec, now.tv_nsec);
    (void)fclose(file);
}

static enum status faulty_submit(struct stream *stream)
{
    struct faulty *f = faulty_of(stream->device);
    if (f->failed)
        return STATUS_DEVICE;
    if (f->kind && !f->armed)
        f->armed = access(f->file, F_OK) == 0;
    (void)usleep(f->slow);
    if (!f->armed || !strcmp(f->kind, "nan") || f->after--)
        return f->real->submit(stream);
    if (!strcmp(f->kind, "refuse")) {
        strike(f);
        return STATUS_DEVICE;
    }
    f->ends_badly = true;
    return f->real->submit(stream);
}

// A row of logits is spoilt on its way to the sampler.
static void faulty_sample(struct stream *stream, const struct sample_args *a)
{
    struct faulty *f = faulty_of(stream->device);
    if (f->armed && !strcmp(f->kind, "nan") && !f->spoilt) {
        f->real->copy(stream, (void *)(uintptr_t)a->logits, f->nan, sizeof f->nan);
        f->spoils = true;
    }
    f->real->sample(stream, a);
}

static void ended(struct faulty *f, struct segment_result *result)
{
    if (f->spoils) // after a miss the sampler did not run; it is recorded again
        f->spoilt = !result->missed;
    f->spoils = false;
    if (f->ends_badly && !f->failed)
        strike(f);
    if (f->failed)
        *result = (struct segment_result){.status = STATUS_DEVICE};
}

static bool faulty_poll(struct stream *stream, struct segment_result *result)
{
    struct faulty *f = faulty_of(stream->device);
    if (!f->real->poll(stream, result))
        return false;
    ended(f, result);
    return true;
}

static enum status faulty_wait(struct stream *stream, struct segment_result *result)
{
    struct faulty *f = faulty_of(stream->device);
    enum status status = f->real->wait(stream, result);
    ended(f, result);
    return f->failed ? STATUS_DEVICE : status;
}

// ---- memory ----

static enum status faulty_alloc(struct device *device, size_t bytes, void **out)
{
    struct faulty *f = faulty_of(device);
    *out = NULL;
    if (f->failed)
        return STATUS_DEVICE;
    if (f->memory && bytes > f->memory - f->taken)
        return STATUS_NO_MEMORY;
    enum status status = f->real->alloc(device, bytes, out);
    f->taken += status || !f->memory ? 0 : bytes;
    return status;
}

static size_t faulty_free_bytes(const struct device *device)
{
    const struct faulty *f = faulty_of(device);
    return f->memory ? f->memory - f->taken : SIZE_MAX;
}

static enum status faulty_upload(struct device *device, void *to, const void *from, size_t bytes)
{
    struct faulty *f = faulty_of(device);
    return f->failed ? STATUS_DEVICE : f->real->upload(device, to, from, bytes);
}

static enum status faulty_download(struct device *device, void *to, const void *from, size_t bytes)
{
    struct faulty *f = faulty_of(device);
    return f->failed ? STATUS_DEVICE : f->real->download(device, to, from, bytes);
}

static enum status faulty_zero_now(struct device *device, void *to, size_t bytes)
{
    struct faulty *f = faulty_of(device);
    return f->failed ? STATUS_DEVICE : f->real->zero_now(device, to, bytes);
}

// ---- life ----

static void faulty_destroy(struct device *device)
{
    struct faulty *f = faulty_of(device);
    device->table = f->real;
    f->real->destroy(device);
    free(f);
}

enum status __wrap_device_create_cpu(const struct cpu_options *options, struct device **out,
                                     struct fault *fault)
{
    const char *after = getenv("FAULTY_AFTER"), *memory = getenv("FAULTY_MEMORY");
    const char *slow = getenv("FAULTY_SLOW");
    struct faulty *f = calloc(1, sizeof *f);
    if (!f)
        return fault_set(fault, STATUS_NO_MEMORY, "no memory for the faulty device");
    enum status status = __real_device_create_cpu(options, out, fault);
    if (status) {
        free(f);
        return status;
    }
    f->real = (*out)->table;
    f->table = *f->real;
    f->file = getenv("FAULTY_FILE");
    f->kind = f->file ? getenv("FAULTY_KIND") : NULL;
    f->after = after ? strtoull(after, NULL, 10) : 0;
    f->slow = slow ? (useconds_t)strtoul(slow, NULL, 10) : 0;
    f->memory = memory ? strtoull(memory, NULL, 10) : 0;
    for (int i = 0; i < 16; i++)
        f->nan[i] = NAN;
    f->table.destroy = faulty_destroy;
    f->table.alloc = faulty_alloc;
    f->table.free_bytes = faulty_free_bytes;
    f->table.upload = faulty_upload;
    f->table.download = faulty_download;
    f->table.zero_now = faulty_zero_now;
    f->table.submit = faulty_submit;
    f->table.sample = faulty_sample;
    f->table.poll = faulty_poll;
    f->table.wait = faulty_wait;
    (*out)->table = &f->table;
    return STATUS_OK;
}
