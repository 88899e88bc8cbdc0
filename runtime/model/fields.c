// SPDX-License-Identifier: Apache-2.0
#include "runtime/model/fields.h"

enum status fields_parse(const char *file, const char *text, size_t bytes, struct json **out,
                         struct fault *fault)
{
    struct json *root = NULL;
    enum status status = json_parse(file, text, bytes, NULL, &root, fault);
    if (status)
        return status;
    if (json_kind_of(root) != JSON_KIND_OBJECT) {
        json_free(root);
        return fault_set(fault, STATUS_INVALID, "%s: not a JSON object.", file);
    }
    *out = root;
    return STATUS_OK;
}

// NULL when absent or null.
static const struct json *get(const struct fields *fields, const char *name)
{
    const struct json *value = json_find(fields->object, name);
    return json_kind_of(value) == JSON_KIND_NULL ? NULL : value;
}

bool fields_has(const struct fields *fields, const char *name)
{
    return get(fields, name) != NULL;
}

enum status fields_u32(const struct fields *fields, const char *name, bool required, uint32_t min,
                       uint32_t max, uint32_t *out, struct fault *fault)
{
    const struct json *value = get(fields, name);
    if (!value)
        return required
                   ? fault_set(fault, STATUS_INVALID, "%s: \"%s\" is missing.", fields->file, name)
                   : STATUS_OK;
    uint32_t number = 0;
    if (!json_as_u32(value, &number) || number < min || number > max)
        return fault_set(fault, STATUS_INVALID, "%s: \"%s\" must be a whole number from %u to %u.",
                         fields->file, name, min, max);
    *out = number;
    return STATUS_OK;
}

enum status fields_number(const struct fields *fields, const char *name, double min, double max,
                          double *out, struct fault *fault)
{
    const struct json *value = get(fields, name);
    if (!value)
        return STATUS_OK;
    double number = 0;
    if (!json_as_double(value, &number) || number < min || number > max)
        return fault_set(fault, STATUS_INVALID, "%s: \"%s\" must be a number from %g to %g.",
                         fields->file, name, min, max);
    *out = number;
    return STATUS_OK;
}

enum status fields_bool(const struct fields *fields, const char *name, bool *out,
                        struct fault *fault)
{
    const struct json *value = get(fields, name);
    if (!value)
        return STATUS_OK;
    if (!json_as_bool(value, out))
        return fault_set(fault, STATUS_INVALID, "%s: \"%s\" must be true or false.", fields->file,
                         name);
    return STATUS_OK;
}

enum status fields_string(const struct fields *fields, const char *name, const char **out,
                          struct fault *fault)
{
    const struct json *value = get(fields, name);
    if (!value)
        return STATUS_OK;
    if (!json_as_string(value, out))
        return fault_set(fault, STATUS_INVALID, "%s: \"%s\" must be a string.", fields->file, name);
    return STATUS_OK;
}
