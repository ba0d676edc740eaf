/* The private state of the driver half: starting it, binding to it in another process, giving everything up.
 *
 * The state may lie inside guest RAM and outlive the process that wrote it, so binding reads each field once
 * and checks all of it.
 */

#include "vring/vring_internal.h"

#define STATE_MAGIC 0x31647176u /* "vqd1" */
#define KNOWN_FLAGS (VQ_F_EVENT_IDX | VQ_F_INDIRECT | VQ_F_LAX_LEN)

uint64_t vq_driver_state_bytes(uint32_t size)
{
    if (vq_desc_bytes(size) == 0)
        return 0;
    return sizeof(struct vq_driver_state) +
           (uint64_t)size * (sizeof(struct vq_driver_head) + 2 * sizeof(uint16_t));
}

/* Make the binding from what is said about the ring; checks that, not the lists. */
static int bind_parts(struct vq_driver *q, const struct vq_memory *mem, struct vq_driver_state *state,
                      const struct vq_ring *ring, uint64_t indirect, uint32_t indirect_len)
{
    struct vq_parts parts;
    int err = vq_parts_find(&parts, mem, ring);

    if (err)
        return err;
    if (ring->flags & ~(uint32_t)KNOWN_FLAGS || indirect_len > ring->size || indirect_len == 1)
        return VQ_EINVAL;
    memset(q, 0, sizeof(*q));
    if (ring->flags & VQ_F_INDIRECT && indirect_len) {
        uint64_t bytes = (uint64_t)ring->size * indirect_len * sizeof(struct vring_desc);

        q->indirect = vq_memory_at(mem, indirect, bytes);
        if (!q->indirect)
            return VQ_ERANGE_RING;
        if ((indirect | (uintptr_t)q->indirect) & 7)
            return VQ_EALIGN;
        q->indirect_len = indirect_len;
        q->indirect_addr = indirect;
    }
    q->state = state;
    q->heads = (struct vq_driver_head *)(state + 1);
    q->free_ring = (uint16_t *)(q->heads + ring->size);
    q->next = q->free_ring + ring->size;
    q->desc = parts.desc;
    q->avail = parts.avail;
    q->used = parts.used;
    q->mem = mem;
    q->mask = ring->size - 1;
    q->flags = ring->flags;
    q->ring = *ring;
    return 0;
}

/* Bring state and the two rings to where a device expects them after a reset. All of the state is written:
 * whatever was scribbled there is gone. */
static void start_over(struct vq_driver *q, uint16_t base)
{
    struct vq_driver_state *st = q->state;
    uint32_t size = q->mask + 1;

    memset(st, 0, sizeof(*st));
    st->magic = STATE_MAGIC;
    st->size = size;
    st->flags = q->flags;
    st->indirect_len = q->indirect_len;
    st->desc = q->ring.desc;
    st->avail = q->ring.avail;
    st->used = q->ring.used;
    st->indirect = q->indirect_addr;
    st->cut_lens = q->cut_lens;
    memset(q->heads, 0, size * sizeof(*q->heads));
    memset(q->next, 0, size * sizeof(*q->next));
    for (uint32_t i = 0; i < size; i++)
        q->free_ring[i] = (uint16_t)i;
    vq_keep(q, free_head, 0);
    vq_keep(q, free_tail, (uint16_t)size);
    vq_keep(q, avail_next, base);
    vq_keep(q, avail_published, base);
    vq_keep(q, used_next, base);
    vq_keep(q, used_seen, base);
    vq_keep(q, outstanding, 0);
    vq_keep(q, error, 0);
    vq_keep(q, pending, 0);
    vq_keep(q, bad_index, 0);
    vq_keep(q, bad_id, 0);

    memset(q->avail, 0, vq_avail_bytes(size));
    memset(q->used, 0, vq_used_bytes(size)); /* flags too: split.availnotif.driver-1 */
    store16(q->used + WORD_IDX, base);
    store16(driver_avail_event(q), base); /* so that the first buffer is kicked wherever the indices start */
    store16(driver_used_event(q), base);
    store16_release(q->avail + WORD_IDX, base); /* pairs with the device's first acquire of avail idx */
}

int vq_driver_init(struct vq_driver *q, const struct vq_memory *mem, const struct vq_ring *ring,
                   uint64_t indirect, uint32_t indirect_len, uint16_t base, void *state)
{
    struct vq_driver fresh;
    int err;

    if (!state || (uintptr_t)state & 7)
        return VQ_EINVAL;
    err = bind_parts(&fresh, mem, state, ring, indirect, indirect_len);
    if (err)
        return err;
    *q = fresh;
    start_over(q, base);
    return 0;
}

/* Mark descriptor d as seen once; returns 0 if it was seen before. */
static int mark(uint64_t *seen, uint16_t d)
{
    uint64_t bit = (uint64_t)1 << (d & 63);
    int fresh = !(seen[d >> 6] & bit);

    seen[d >> 6] |= bit;
    return fresh;
}

/* Every descriptor is either free or in exactly one chain, and the counters agree. */
static int lists_consistent(const struct vq_driver *q)
{
    uint64_t seen[VRING_MAX_SIZE / 64] = {0};
    uint32_t size = q->mask + 1, total = vq_driver_num_free(q), chains = 0;

    if (total > size)
        return 0;
    for (uint32_t i = 0; i < total; i++) {
        uint16_t d = load16(&q->free_ring[(q->free_head + i) & q->mask]);

        if (d >= size || !mark(seen, d) || load16(&q->heads[d].count))
            return 0;
    }
    for (uint32_t head = 0; head < size; head++) {
        uint32_t count = load16(&q->heads[head].count), d = head;

        if (!count)
            continue;
        chains++;
        total += count;
        if (total > size)
            return 0; /* also what bounds this loop */
        for (uint32_t i = 0; i < count; i++) {
            if (d >= size || !mark(seen, (uint16_t)d) || (i && load16(&q->heads[d].count)))
                return 0;
            d = load16(&q->next[d]);
        }
    }
    return total == size && chains == q->outstanding && (uint16_t)(q->avail_next - q->used_next) == chains &&
           (uint16_t)(q->avail_published - q->used_next) <= chains &&
           (uint16_t)(q->used_seen - q->used_next) <= (uint16_t)(q->avail_published - q->used_next);
}

/* Copy the fixed part of a state, each word once. */
static struct vq_driver_state read_state(const void *state)
{
    struct vq_driver_state copy;
    const uint64_t *from = state;

    for (size_t i = 0; i < sizeof(copy) / 8; i++) {
        uint64_t word = load64(&from[i]);

        memcpy((uint8_t *)&copy + 8 * i, &word, 8);
    }
    return copy;
}

/* What a queue can have found in the used ring, or nothing. */
static int is_found(int32_t code)
{
    return code == 0 || code == VQ_EUSED_AHEAD || code == VQ_EUSED_ID || code == VQ_EUSED_LEN;
}

int vq_driver_bind(struct vq_driver *q, const struct vq_memory *mem, void *state, uint64_t state_bytes)
{
    struct vq_driver_state st;
    struct vq_driver found;
    struct vq_ring ring;
    int err;

    if (!state || (uintptr_t)state & 7)
        return VQ_EINVAL;
    if (state_bytes < sizeof(st))
        return VQ_ESTATE;
    st = read_state(state);
    if (st.magic != STATE_MAGIC || vq_desc_bytes(st.size) == 0 ||
        state_bytes < vq_driver_state_bytes(st.size) || !is_found(st.error) || !is_found(st.pending))
        return VQ_ESTATE;
    ring = (struct vq_ring){st.size, st.flags, st.desc, st.avail, st.used};
    err = bind_parts(&found, mem, state, &ring, st.indirect, st.indirect_len);
    if (err)
        return err == VQ_EINVAL ? VQ_ESTATE : err;
    found.avail_next = st.avail_next;
    found.avail_published = st.avail_published;
    found.used_next = st.used_next;
    found.used_seen = st.used_seen;
    found.free_head = st.free_head;
    found.free_tail = st.free_tail;
    found.outstanding = st.outstanding;
    found.error = st.error;
    found.pending = st.pending;
    found.bad_index = st.bad_index;
    found.bad_id = st.bad_id;
    found.cut_lens = st.cut_lens;
    if (!lists_consistent(&found))
        return VQ_ESTATE;
    *q = found;
    return 0;
}

uint32_t vq_driver_num_free(const struct vq_driver *q)
{
    return (uint16_t)(q->free_tail - q->free_head);
}

/* ---- reset ---- */

int vq_driver_detach(struct vq_driver *q, uint64_t *tokens, uint32_t max)
{
    uint32_t n = 0, outstanding = q->outstanding;

    if (!q->mem->count)
        return VQ_ECLOSED;
    if (outstanding > max)
        return VQ_EINVAL;
    for (uint32_t head = 0; head <= q->mask && n < outstanding; head++) {
        if (load16(&q->heads[head].count))
            tokens[n++] = load64(&q->heads[head].token);
    }
    start_over(q, 0);
    return (int)n;
}
