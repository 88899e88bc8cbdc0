// SPDX-License-Identifier: Apache-2.0
// tokenizer.json from outside to a struct tokenizer: the parts, in the order they depend on each
// other, and what is refused. A failure frees all; the sentence names the file and the part.
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/reader.h"
#include "runtime/tokenizer/internal.h"

enum { JSON_DEPTH_MAX = 24 };

enum status tokenizer__known(const struct json *object, const char *what, const char *const *known,
                             size_t count, struct fault *fault)
{
    const char *key = json_unknown_key(object, known, count);
    if (!key)
        return STATUS_OK;
    return fault_set(fault, STATUS_UNSUPPORTED, "%s: the setting '%.80s' is not supported", what,
                     key);
}

static enum status load_form(struct tokenizer *t, const struct json *value, struct fault *fault)
{
    static const char *const names[] = {"NFC", "NFD", "NFKC", "NFKD"};
    static const char *const known[] = {"type"};
    const char *type;
    enum status status = json_get_string(value, "type", &type, fault);
    if (status)
        return status;
    size_t form = 0;
    while (form < ARRAY_COUNT(names) && strcmp(type, names[form]) != 0)
        form++;
    if (form == ARRAY_COUNT(names))
        return fault_set(fault, STATUS_UNSUPPORTED, "the normalizer '%.80s' is not supported",
                         type);
    if (t->form_count == FORMS_MAX)
        return fault_set(fault, STATUS_LIMIT, "more than %d normalizers", FORMS_MAX);
    t->forms[t->form_count++] = (enum normal_form)form;
    return tokenizer__known(value, "normalizer", known, ARRAY_COUNT(known), fault);
}

static enum status load_normalizer(struct tokenizer *t, const struct json *value,
                                   struct fault *fault)
{
    static const char *const known[] = {"type", "normalizers"};
    const char *type;
    const struct json *list;
    if (json_kind_of(value) == JSON_KIND_NULL)
        return STATUS_OK;
    enum status status = json_get_string(value, "type", &type, fault);
    if (status || strcmp(type, "Sequence") != 0)
        return status ? status : load_form(t, value, fault);
    status = tokenizer__known(value, "normalizer", known, ARRAY_COUNT(known), fault);
    if (!status)
        status = json_get_array(value, "normalizers", &list, fault);
    for (size_t i = 0; !status && i < json_count(list); i++)
        status = load_form(t, json_at(list, i), fault);
    return status;
}

// ByteLevel as decoder or post-processor; its settings only move offsets, which we do not give.
static enum status check_byte_level(const struct json *value, const char *what, struct fault *fault)
{
    static const char *const known[] = {"type", "add_prefix_space", "trim_offsets", "use_regex"};
    const char *type;
    enum status status = json_get_string(value, "type", &type, fault);
    if (!status && strcmp(type, "ByteLevel") != 0)
        return fault_set(fault, STATUS_UNSUPPORTED, "the %s '%.80s' is not supported", what, type);
    return status ? status : tokenizer__known(value, what, known, ARRAY_COUNT(known), fault);
}

static enum status load_decoder(const struct json *value, struct fault *fault)
{
    static const char *const known[] = {"type", "decoders"};
    const char *type;
    const struct json *list;
    if (json_kind_of(value) == JSON_KIND_NULL)
        return fault_set(fault, STATUS_UNSUPPORTED, "a file without a decoder is not supported");
    enum status status = json_get_string(value, "type", &type, fault);
    if (status || strcmp(type, "Sequence") != 0)
        return status ? status : check_byte_level(value, "decoder", fault);
    status = tokenizer__known(value, "decoder", known, ARRAY_COUNT(known), fault);
    if (!status)
        status = json_get_array(value, "decoders", &list, fault);
    if (!status && json_count(list) != 1)
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "a decoder sequence other than one ByteLevel is not supported");
    return status ? status : check_byte_level(json_at(list, 0), "decoder", fault);
}

// The ids of one special token of a template go to the list of the side it stands on.
static enum status template_token(struct tokenizer *t, const struct json *special_tokens,
                                  const struct json *piece, bool behind, struct fault *fault)
{
    const char *name;
    const struct json *entry, *ids;
    enum status status = json_get_string(piece, "id", &name, fault);
    if (!status)
        status = json_get_object(special_tokens, name, &entry, fault);
    if (!status)
        status = json_get_array(entry, "ids", &ids, fault);
    for (size_t i = 0; !status && i < json_count(ids); i++) {
        size_t *count = behind ? &t->after_count : &t->before_count;
        uint32_t id;
        if (!json_as_u32(json_at(ids, i), &id) || id >= t->id_limit || !t->entries[id].flags)
            return fault_set(fault, STATUS_CORRUPT, "the template token '%.80s' has an unknown id",
                             name);
        if (*count == TEMPLATE_MAX)
            return fault_set(fault, STATUS_LIMIT, "more than %d template tokens", TEMPLATE_MAX);
        (behind ? t->after : t->before)[(*count)++] = id;
    }
    return status;
}

static enum status template_piece(struct tokenizer *t, const struct json *special_tokens,
                                  const struct json *piece, bool *text_seen, struct fault *fault)
{
    static const char *const known[] = {"SpecialToken", "Sequence"};
    const struct json *token, *sequence;
    enum status status =
        tokenizer__known(piece, "template piece", known, ARRAY_COUNT(known), fault);
    if (!status)
        status = json_get_object_or_null(piece, "SpecialToken", &token, fault);
    if (!status)
        status = json_get_object_or_null(piece, "Sequence", &sequence, fault);
    if (status)
        return status;
    if (json_count(piece) != 1)
        return fault_set(fault, STATUS_CORRUPT, "a template piece must be one thing");
    if (token)
        return template_token(t, special_tokens, token, *text_seen, fault);
    const char *name;
    status = json_get_string(sequence, "id", &name, fault);
    if (!status && (strcmp(name, "A") != 0 || *text_seen))
        return fault_set(fault, STATUS_UNSUPPORTED,
                         "a template that does not have the text A exactly once is not supported");
    *text_seen = true;
    return status;
}

// The template for pairs is not read: texts are encoded alone.
static enum status load_template(struct tokenizer *t, const struct json *value, struct fault *fault)
{
    static const char *const known[] = {"type", "single", "pair", "special_tokens"};
    const struct json *single, *special_tokens;
    bool text_seen = false;
    enum status status =
        tokenizer__known(value, "post-processor", known, ARRAY_COUNT(known), fault);
    if (!status)
        status = json_get_array(value, "single", &single, fault);
    if (!status)
        status = json_get_object(value, "special_tokens", &special_tokens, fault);
    for (size_t i = 0; !status && i < json_count(single); i++)
        status = template_piece(t, special_tokens, json_at(single, i), &text_seen, fault);
    if (!status && !text_seen)
        status = fault_set(fault, STATUS_UNSUPPORTED, "a template without the text A");
    return status;
}

static enum status load_processor(struct tokenizer *t, const struct json *value, bool *has_template,
                                  struct fault *fault)
{
    const char *type;
    enum status status = json_get_string(value, "type", &type, fault);
    if (status || strcmp(type, "TemplateProcessing") != 0)
        return status ? status : check_byte_level(value, "post-processor", fault);
    if (*has_template)
        return fault_set(fault, STATUS_UNSUPPORTED, "two templates are not supported");
    *has_template = true;
    return load_template(t, value, fault);
}

static enum status load_processors(struct tokenizer *t, const struct json *value,
                                   struct fault *fault)
{
    static const char *const known[] = {"type", "processors"};
    const char *type;
    const struct json *list;
    bool has_template = false;
    if (json_kind_of(value) == JSON_KIND_NULL)
        return STATUS_OK;
    enum status status = json_get_string(value, "type", &type, fault);
    if (status || strcmp(type, "Sequence") != 0)
        return status ? status : load_processor(t, value, &has_template, fault);
    status = tokenizer__known(value, "post-processor", known, ARRAY_COUNT(known), fault);
    if (!status)
        status = json_get_array(value, "processors", &list, fault);
    for (size_t i = 0; !status && i < json_count(list); i++)
        status = load_processor(t, json_at(list, i), &has_template, fault);
    return status;
}

static enum status refuse_settings(const struct json *root, struct fault *fault)
{
    static const char *const known[] = {"version",        "truncation", "padding",
                                        "added_tokens",   "normalizer", "pre_tokenizer",
                                        "post_processor", "decoder",    "model"};
    static const char *const unused[] = {"truncation", "padding"};
    const char *version;
    if (json_kind_of(root) != JSON_KIND_OBJECT)
        return fault_set(fault, STATUS_CORRUPT, "it must be an object, not %s",
                         json_kind_name(root));
    enum status status = tokenizer__known(root, "top level", known, ARRAY_COUNT(known), fault);
    if (!status)
        status = json_get_string_or(root, "version", "1.0", &version, fault);
    if (!status && strcmp(version, "1.0") != 0)
        status = fault_set(fault, STATUS_UNSUPPORTED, "version '%.80s' is not supported", version);
    for (size_t i = 0; !status && i < ARRAY_COUNT(unused); i++)
        if (json_kind_of(json_find(root, unused[i])) != JSON_KIND_NULL)
            status = fault_set(fault, STATUS_UNSUPPORTED, "'%s' is not supported", unused[i]);
    return status;
}

static enum status load_parts(struct tokenizer *t, const struct json *root, struct fault *fault)
{
    const struct json *model, *added;
    enum status status = refuse_settings(root, fault);
    if (!status)
        status = json_get_object(root, "model", &model, fault);
    if (!status)
        status = tokenizer__load_model(t, model, fault);
    if (!status)
        status = load_normalizer(t, json_find(root, "normalizer"), fault);
    if (!status)
        status = json_get_array_or_null(root, "added_tokens", &added, fault);
    if (!status)
        status = tokenizer__load_added(t, added, json_find(model, "vocab"), fault);
    if (!status)
        status = tokenizer__load_splits(t, json_find(root, "pre_tokenizer"), fault);
    if (!status)
        status = load_decoder(json_find(root, "decoder"), fault);
    if (!status)
        status = load_processors(t, json_find(root, "post_processor"), fault);
    return status;
}

enum status tokenizer_load(const char *label, const char *json, size_t bytes,
                           struct tokenizer **out, struct fault *fault)
{
    const struct json_limits limits = {.bytes_max = TOKENIZER_FILE_MAX,
                                       .depth_max = JSON_DEPTH_MAX};
    struct json *root;
    struct fault local = {0};
    *out = NULL;
    enum status status = json_parse(label, json, bytes, &limits, &root, fault);
    if (status)
        return status == STATUS_INVALID ? STATUS_CORRUPT : status;
    struct tokenizer *t = calloc(1, sizeof *t);
    status = t ? load_parts(t, root, &local) : STATUS_NO_MEMORY;
    json_free(root);
    if (!status) {
        *out = t;
        return STATUS_OK;
    }
    tokenizer_free(t);
    status = status == STATUS_INVALID ? STATUS_CORRUPT : status;
    return fault_set(fault, status, "%s: %s", label,
                     local.text[0] ? local.text : status_sentence(status));
}

enum status tokenizer_load_in(const char *directory, struct tokenizer **out, struct fault *fault)
{
    char *text;
    size_t bytes;
    *out = NULL;
    enum status status =
        reader_slurp_in(directory, "tokenizer.json", TOKENIZER_FILE_MAX, &text, &bytes, fault);
    if (status)
        return status;
    status = tokenizer_load("tokenizer.json", text, bytes, out, fault);
    free(text);
    return status;
}

void tokenizer_free(struct tokenizer *t)
{
    if (!t)
        return;
    for (size_t i = 0; i < t->stage_count; i++)
        pcre2_code_free(t->stages[i].code);
    pcre2_code_free(t->word_character);
    tokenizer__free_added(t);
    free(t->words);
    free(t->merges);
    free(t->blob);
    free(t->entries);
    free(t);
}
