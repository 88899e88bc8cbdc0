// SPDX-License-Identifier: Apache-2.0
// Swapping sequences out to host pages and back.
//
//   RESIDENT --kv_swap_out--> LEAVING --all written--> SWAPPED --kv_swap_in--> COMING --all
//   there--> RESIDENT
//                                |                        |                      |
//                                +--- a copy failed ------+--- block given back -+---> LOST
//                                --kv_drop--> RESIDENT
//
// A block goes when the last sequence that is not swapped lets go of it. A block that is being
// written may be taken into use again; when it has been written it then stays on the device and the
// host copy goes.
#include "runtime/kv/internal.h"

void kv__write_backs_end(struct kv *kv)
{
    struct pool *pool = kv->options.pool;
    for (uint32_t index = kv->lists[KV_LEAVING_LIST].head; index != NONE;) {
        struct block *block = &kv->blocks[index];
        uint32_t next = block->next;
        if (!pool_is_writing_back(pool, block->object)) {
            bool written = pool_is_written_back(pool, block->object);
            kv__list_remove(kv, index);
            block->write_failed = !written && !block->active;
            if (written && block->active)
                pool_drop_host(pool, block->object);
            kv__block_settle(kv, index);
        }
        index = next;
    }
}

static void set_active(struct kv *kv, struct sequence *sequence, bool active)
{
    const uint32_t *table = kv__table(kv, sequence);
    if (sequence->is_active == active)
        return;
    sequence->is_active = active;
    for (uint32_t i = sequence->blocks; i-- > 0;) {
        struct block *block = &kv->blocks[table[i]];
        if (active) {
            block->active++;
            block->write_failed = false;
        } else {
            block->active--;
        }
        kv__block_settle(kv, table[i]);
    }
}

// Starts the write-backs of blocks that nobody active uses; all or none.
static enum status write_back_unused(struct kv *kv, const struct sequence *sequence,
                                     enum copy_class class)
{
    struct pool *pool = kv->options.pool;
    const uint32_t *table = kv__table(kv, sequence);
    uint32_t started = 0;
    for (uint32_t i = 0; i < sequence->blocks; i++) {
        struct block *block = &kv->blocks[table[i]];
        if (block->list != KV_HELD)
            continue;
        enum status status = pool_write_back(pool, block->object, class);
        if (status) {
            while (started) {
                uint32_t index = kv->scratch[--started];
                kv__list_remove(kv, index);
                pool_drop_host(pool, kv->blocks[index].object);
                kv__block_settle(kv, index);
            }
            return status;
        }
        block->write_failed = false;
        kv__list_append(kv, table[i], KV_LEAVING_LIST);
        kv->scratch[started++] = table[i];
    }
    return STATUS_OK;
}

enum status kv_swap_out(struct kv *kv, kv_sequence handle, enum copy_class class)
{
    struct sequence *sequence = kv__sequence(kv, handle);
    CHECK(!sequence->pins);
    kv__write_backs_end(kv);
    if (sequence->state != KV_RESIDENT && sequence->state != KV_SWAPPED)
        return STATUS_BUSY;
    bool was_active = sequence->is_active;
    set_active(kv, sequence, false);
    enum status status = write_back_unused(kv, sequence, class);
    if (status) {
        set_active(kv, sequence, was_active);
        return status;
    }
    sequence->state = KV_LEAVING;
    return STATUS_OK;
}

static bool has_lost_block(const struct kv *kv, const struct sequence *sequence)
{
    const uint32_t *table = kv__table(kv, sequence);
    for (uint32_t i = 0; i < sequence->blocks; i++)
        if (!kv->blocks[table[i]].object.bits)
            return true;
    return false;
}

enum status kv_swap_in(struct kv *kv, kv_sequence handle, enum copy_class class)
{
    struct sequence *sequence = kv__sequence(kv, handle);
    struct pool *pool = kv->options.pool;
    const uint32_t *table = kv__table(kv, sequence);
    if (kv_state(kv, handle) != KV_SWAPPED)
        return sequence->state == KV_LEAVING ? STATUS_BUSY : STATUS_OK;
    if (has_lost_block(kv, sequence)) {
        sequence->state = KV_LOST;
        return STATUS_OK;
    }
    set_active(kv, sequence, true);
    uint32_t missing = 0;
    for (uint32_t i = 0; i < sequence->blocks; i++) {
        pool_object object = kv->blocks[table[i]].object;
        missing += !pool_is_resident(pool, object) && !pool_is_fetching(pool, object);
    }
    enum status status = pool_make_room(pool, missing * kv->options.shape.pages_per_block);
    for (uint32_t i = 0; i < sequence->blocks && !status; i++)
        status = pool_fetch(pool, kv->blocks[table[i]].object, class, COPY_KV);
    if (status) {
        set_active(kv, sequence, false); // cancels the fetches nobody else wants
        return status;
    }
    sequence->state = KV_COMING;
    return STATUS_OK;
}

// SWAPPED, LOST, or still LEAVING.
static enum kv_state look_leaving(struct kv *kv, const struct sequence *sequence)
{
    const uint32_t *table = kv__table(kv, sequence);
    for (uint32_t i = 0; i < sequence->blocks; i++)
        if (kv->blocks[table[i]].list == KV_LEAVING_LIST && !kv->blocks[table[i]].active)
            return KV_LEAVING;
    for (uint32_t i = 0; i < sequence->blocks; i++)
        if (kv->blocks[table[i]].write_failed || !kv->blocks[table[i]].object.bits)
            return KV_LOST;
    kv->swapped_out++;
    return KV_SWAPPED;
}

// RESIDENT, LOST, or still COMING.
static enum kv_state look_coming(struct kv *kv, const struct sequence *sequence)
{
    struct pool *pool = kv->options.pool;
    const uint32_t *table = kv__table(kv, sequence);
    bool all_here = true;
    for (uint32_t i = 0; i < sequence->blocks; i++) {
        pool_object object = kv->blocks[table[i]].object;
        bool here = pool_is_resident(pool, object);
        if (!here && !pool_is_fetching(pool, object))
            return KV_LOST;
        all_here &= here;
    }
    if (!all_here)
        return KV_COMING;
    for (uint32_t i = 0; i < sequence->blocks; i++)
        if (kv->blocks[table[i]].list != KV_LEAVING_LIST)
            pool_drop_host(pool, kv->blocks[table[i]].object);
    kv->swapped_in++;
    return KV_RESIDENT;
}

enum kv_state kv_state(struct kv *kv, kv_sequence handle)
{
    struct sequence *sequence = kv__sequence(kv, handle);
    kv__write_backs_end(kv);
    if (sequence->state == KV_LEAVING)
        sequence->state = look_leaving(kv, sequence);
    else if (sequence->state == KV_COMING)
        sequence->state = look_coming(kv, sequence);
    return sequence->state;
}
