// SPDX-License-Identifier: Apache-2.0
// Python regular expressions for the three uses PEFT makes of them, on PCRE2.
//
// Most patterns in the wild are plain names ("q_proj", "layers.3.mlp.down_proj"): letters, digits,
// "_" and ".", where "." is any character. Those are matched by hand, which is exact because such a
// pattern has a fixed length; the rest is compiled. The text is an outsider's, so its length, the
// steps of a match and the depth are bounded. A match that runs into the bound is not "no": the
// answer is unknown, and whoever asked must refuse the adapter (peft_config.c).
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "adapters/peft.h"
#include "base/check.h"

enum { PATTERN_BYTES_MAX = 4096, MATCH_STEPS_MAX = 4000, MATCH_DEPTH_MAX = 1000 };

struct peft_pattern {
    enum peft_match match;
    const char *what;
    char *text;
    bool is_plain; // matched by hand; nothing below is set
    size_t length;
    pcre2_code *code;
    pcre2_match_data *data;
    pcre2_match_context *context;
};

static bool is_plain(const char *text)
{
    if (!*text)
        return false;
    for (; *text; text++)
        if (!((*text >= 'a' && *text <= 'z') || (*text >= 'A' && *text <= 'Z') ||
              (*text >= '0' && *text <= '9') || *text == '_' || *text == '.'))
            return false;
    return true;
}

static enum status compile(struct peft_pattern *pattern, struct fault *fault)
{
    static const char *const before[] = {"", "(.*\\.)?(", "(?:^|.*?\\.)"};
    static const char *const after[] = {"", ")$", "\\.(?P<idx>\\d+)\\."};
    char whole[PATTERN_BYTES_MAX + 64];
    int error;
    PCRE2_SIZE at;
    int length = snprintf(whole, sizeof whole, "%s%s%s", before[pattern->match], pattern->text,
                          after[pattern->match]);
    uint32_t options = PCRE2_ANCHORED | PCRE2_UTF | PCRE2_NEVER_BACKSLASH_C;
    if (pattern->match == PEFT_MATCH_FULL)
        options |= PCRE2_ENDANCHORED;
    pattern->code =
        pcre2_compile((PCRE2_SPTR)whole, (PCRE2_SIZE)length, options, &error, &at, NULL);
    if (!pattern->code) {
        PCRE2_UCHAR message[120] = "";
        (void)pcre2_get_error_message(error, message, sizeof message);
        return fault_set(fault, STATUS_INVALID, "%s: \"%.100s\" is no regular expression: %s.",
                         pattern->what, pattern->text, (const char *)message);
    }
    pattern->data = pcre2_match_data_create_from_pattern(pattern->code, NULL);
    pattern->context = pcre2_match_context_create(NULL);
    if (!pattern->data || !pattern->context)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for a pattern of %s.",
                         pattern->what);
    (void)pcre2_set_match_limit(pattern->context, MATCH_STEPS_MAX);
    (void)pcre2_set_depth_limit(pattern->context, MATCH_DEPTH_MAX);
    return STATUS_OK;
}

enum status peft__pattern_create(const char *text, enum peft_match match, const char *what,
                                 struct peft_pattern **out, struct fault *fault)
{
    if (strlen(text) > PATTERN_BYTES_MAX)
        return fault_set(fault, STATUS_LIMIT, "%s: a pattern has more than %d bytes.", what,
                         PATTERN_BYTES_MAX);
    struct peft_pattern *pattern = calloc(1, sizeof *pattern);
    if (!pattern)
        return fault_set(fault, STATUS_NO_MEMORY, "out of memory for a pattern of %s.", what);
    pattern->match = match;
    pattern->what = what;
    pattern->length = strlen(text);
    pattern->is_plain = match != PEFT_MATCH_LAYER && is_plain(text);
    pattern->text = strdup(text);
    enum status status = STATUS_OK;
    if (!pattern->text)
        status = fault_set(fault, STATUS_NO_MEMORY, "out of memory for a pattern of %s.", what);
    else if (!pattern->is_plain)
        status = compile(pattern, fault);
    if (status)
        peft__pattern_destroy(pattern);
    else
        *out = pattern;
    return status;
}

void peft__pattern_destroy(struct peft_pattern *pattern)
{
    if (!pattern)
        return;
    free(pattern->text);
    pcre2_match_context_free(pattern->context);
    pcre2_match_data_free(pattern->data);
    pcre2_code_free(pattern->code);
    free(pattern);
}

static bool plain_matches(const struct peft_pattern *pattern, const char *name)
{
    size_t length = strlen(name);
#ifndef POLDER_PLANT_BUG // without it the fuzzer must find the names that are shorter
    if (length < pattern->length)
        return false;
#endif
    size_t skipped = length - pattern->length;
    if (skipped && (pattern->match == PEFT_MATCH_FULL || name[skipped - 1] != '.'))
        return false;
    for (size_t i = 0; i < pattern->length; i++)
        if (pattern->text[i] != '.' && pattern->text[i] != name[skipped + i])
            return false;
    return true;
}

enum peft_found peft__pattern_matches(struct peft_pattern *pattern, const char *name,
                                      uint32_t *layer)
{
    if (pattern->is_plain)
        return plain_matches(pattern, name) ? PEFT_FOUND : PEFT_FOUND_NOT;
    int found = pcre2_match(pattern->code, (PCRE2_SPTR)name, strlen(name), 0, 0, pattern->data,
                            pattern->context);
    if (found < 0)
        return found == PCRE2_ERROR_NOMATCH ? PEFT_FOUND_NOT : PEFT_FOUND_UNKNOWN;
    if (pattern->match == PEFT_MATCH_LAYER) {
        PCRE2_UCHAR digits[12];
        PCRE2_SIZE length = sizeof digits;
        if (pcre2_substring_copy_byname(pattern->data, (PCRE2_SPTR) "idx", digits, &length) != 0)
            return PEFT_FOUND_NOT;
        *layer = (uint32_t)strtoul((const char *)digits, NULL, 10);
    }
    return PEFT_FOUND;
}

enum status peft__pattern_unknown(const struct peft_pattern *pattern, struct fault *fault)
{
    return fault_set(fault, STATUS_LIMIT,
                     "%s: \"%.100s\" takes more than %d steps to match; write it more simply.",
                     pattern->what, pattern->text, MATCH_STEPS_MAX);
}
