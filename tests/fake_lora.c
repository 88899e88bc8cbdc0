// SPDX-License-Identifier: Apache-2.0
#include "fake_lora.h"

#include "base/check.h"
#include "kernels/device.h"

static uint64_t lora_word(const struct lora_batch *b, const struct lora_adapter_view *view,
                          const struct lora_slice *slice, uint32_t row)
{
    size_t in_first = (b->page_bytes - slice->first_byte) / slice->row_bytes;
    if (row >= in_first)
        CHECK(view->pages[slice->first_slot + 1] != PAGE_NONE);
    else
        CHECK(view->pages[slice->first_slot] != PAGE_NONE);
    return print_word(lora_row_at(b->arena, b->page_bytes, view->pages, slice, row));
}

void fake_run_shrink(const struct lora_shrink_args *a)
{
    const struct lora_batch *b = a->batch;
    for (uint32_t s = 0; s < b->segments; s++) {
        if (b->adapter[s] == 0xffffffff)
            continue;
        const struct lora_adapter_view *view = &b->adapters[b->adapter[s]];
        const struct lora_pair *pair = lora_pair_at(view, a->layer, a->module, 0);
        CHECK(pair->a.rank <= b->rank_max);
        for (uint32_t j = 0; j < pair->a.rank; j++) {
            uint64_t weight = lora_word(b, view, &pair->a, j);
            for (uint32_t r = b->row_begin[s]; r < b->row_begin[s + 1]; r++) {
                uint32_t h = print_shrink(get(a->x, ACT, r), weight, j);
                memcpy(a->hidden + (size_t)r * b->rank_max + j, &h, sizeof h);
            }
        }
    }
}

// A by token: a row of A stands for what shrink makes of x.
void fake_run_lora_gather(const struct lora_gather_args *a)
{
    const struct lora_batch *b = a->batch;
    for (uint32_t s = 0; s < b->segments; s++) {
        if (b->adapter[s] == 0xffffffff)
            continue;
        const struct lora_adapter_view *view = &b->adapters[b->adapter[s]];
        const struct lora_pair *pair = lora_pair_at(view, a->layer, a->module, 0);
        for (uint32_t r = b->row_begin[s]; pair->a.rank && r < b->row_begin[s + 1]; r++) {
            bool lost = a->token[r] < 0 || (uint32_t)a->token[r] >= a->vocab;
            uint64_t word = lost ? 0 : lora_word(b, view, &pair->a, (uint32_t)a->token[r]);
            for (uint32_t j = 0; j < pair->a.rank; j++) {
                uint32_t h = print_shrink(1, word, j);
                memcpy(a->hidden + (size_t)r * b->rank_max + j, &h, sizeof h);
            }
        }
    }
}

void fake_run_expand(const struct lora_expand_args *a)
{
    const struct lora_batch *b = a->batch;
    float *y = a->interleave_half == 1 ? a->y + 8 : a->y;
    for (uint32_t s = 0; s < b->segments; s++) {
        if (b->adapter[s] == 0xffffffff)
            continue;
        const struct lora_adapter_view *view = &b->adapters[b->adapter[s]];
        const struct lora_pair *pair = lora_pair_at(view, a->layer, a->module, 0);
        for (uint32_t r = b->row_begin[s]; pair->b.rank && r < b->row_begin[s + 1]; r++) {
            uint64_t sum = 0;
            for (uint32_t j = 0; j < pair->b.rank; j++) {
                uint32_t h;
                memcpy(&h, a->hidden + (size_t)r * b->rank_max + j, sizeof h);
                sum += print_expand(h, lora_word(b, view, &pair->b, j), j);
            }
            put(y, f32(a->y_stride), r,
                get(y, f32(a->y_stride), r) + print_scaled(sum, pair->scale));
        }
    }
}

uint64_t fake_expert_lora(const struct lora_batch *b, uint32_t row, uint32_t layer,
                          enum lora_module module, uint32_t expert, uint64_t x)
{
    uint32_t s = 0;
    while (b && s < b->segments && row >= b->row_begin[s + 1])
        s++;
    if (!b || s == b->segments || b->adapter[s] == 0xffffffff)
        return 0;
    const struct lora_adapter_view *view = &b->adapters[b->adapter[s]];
    const struct lora_pair *pair = lora_pair_at(view, layer, module, expert);
    uint64_t sum = 0;
    for (uint32_t j = 0; j < pair->a.rank; j++)
        sum += print_expand(print_shrink(x, lora_word(b, view, &pair->a, j), j),
                            lora_word(b, view, &pair->b, j), j);
    return pair->a.rank ? print_scaled(sum, pair->scale) : 0;
}
