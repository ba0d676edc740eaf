/* The driver half of a split virtqueue: adds buffers, publishes them, collects what the device used.
 *
 * Nothing the device can write is trusted. The private state (free descriptors, tokens, lengths) is never
 * rebuilt from the shared table, and indices taken from it are masked, so even a scribbled state cannot lead
 * outside it.
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

static uint16_t *used_event(struct vq_driver *q)
{
    return q->avail + WORD_AVAIL_RING + q->mask + 1;
}

static uint16_t *avail_event(struct vq_driver *q)
{
    return q->used + WORD_USED_RING + 4 * ((size_t)q->mask + 1);
}

/* Fill the binding's pointers; checks what a struct vq_ring says, not the lists. */
static int bind_parts(struct vq_driver *q, const struct vq_memory *mem, void *state,
                      const struct vq_ring *ring, uint64_t indirect, uint32_t indirect_len)
{
    struct vq_driver_state *st = state;
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
    }
    q->state = st;
    q->heads = (struct vq_driver_head *)(st + 1);
    q->free_ring = (uint16_t *)(q->heads + ring->size);
    q->next = q->free_ring + ring->size;
    q->desc = parts.desc;
    q->avail = parts.avail;
    q->used = parts.used;
    q->mask = ring->size - 1;
    q->flags = ring->flags;
    return 0;
}

/* Bring lists, indices and the two rings to where a device expects them after a reset. */
static void start_over(struct vq_driver *q, uint16_t base)
{
    struct vq_driver_state *st = q->state;
    uint32_t size = q->mask + 1;

    memset(q->heads, 0, size * sizeof(*q->heads));
    memset(q->next, 0, size * sizeof(*q->next));
    for (uint32_t i = 0; i < size; i++)
        q->free_ring[i] = (uint16_t)i;
    st->free_head = 0;
    st->free_tail = (uint16_t)size;
    st->avail_next = st->avail_published = st->used_next = st->used_seen = base;
    st->outstanding = 0;
    st->error = st->pending = 0;
    st->bad_index = st->bad_id = 0;

    memset(q->avail, 0, vq_avail_bytes(size));
    memset(q->used, 0, vq_used_bytes(size)); /* flags too: split.availnotif.driver-1 */
    store16(q->used + WORD_IDX, base);
    store16(avail_event(q), base); /* so that the first buffer is kicked wherever the indices start */
    store16(used_event(q), base);
    store16_release(q->avail + WORD_IDX, base); /* pairs with the device's first acquire of avail idx */
}

int vq_driver_init(struct vq_driver *q, const struct vq_memory *mem, const struct vq_ring *ring,
                   uint64_t indirect, uint32_t indirect_len, uint16_t base, void *state)
{
    struct vq_driver_state *st = state;
    int err;

    if (!state || (uintptr_t)state & 7)
        return VQ_EINVAL;
    err = bind_parts(q, mem, state, ring, indirect, indirect_len);
    if (err)
        return err;
    memset(st, 0, sizeof(*st));
    st->magic = STATE_MAGIC;
    st->size = ring->size;
    st->flags = ring->flags;
    st->desc = ring->desc;
    st->avail = ring->avail;
    st->used = ring->used;
    st->indirect = q->indirect_len ? indirect : 0;
    st->indirect_len = q->indirect_len;
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
    const struct vq_driver_state *st = q->state;
    uint64_t seen[VRING_MAX_SIZE / 64] = {0};
    uint32_t size = q->mask + 1, total = vq_driver_num_free(q), chains = 0;

    if (total > size)
        return 0;
    for (uint32_t i = 0; i < total; i++) {
        uint16_t d = q->free_ring[(st->free_head + i) & q->mask];

        if (d >= size || !mark(seen, d) || q->heads[d].count)
            return 0;
    }
    for (uint32_t head = 0; head < size; head++) {
        uint32_t count = q->heads[head].count, d = head;

        if (!count)
            continue;
        chains++;
        total += count;
        if (total > size)
            return 0; /* also what bounds this loop */
        for (uint32_t i = 0; i < count; i++) {
            if (d >= size || !mark(seen, (uint16_t)d) || (i && q->heads[d].count))
                return 0;
            d = q->next[d];
        }
    }
    return total == size && chains == st->outstanding &&
           (uint16_t)(st->avail_next - st->used_next) == chains &&
           (uint16_t)(st->avail_published - st->used_next) <= chains &&
           (uint16_t)(st->used_seen - st->used_next) <= (uint16_t)(st->avail_published - st->used_next);
}

int vq_driver_bind(struct vq_driver *q, const struct vq_memory *mem, void *state, uint64_t state_bytes)
{
    const struct vq_driver_state *st = state;
    struct vq_ring ring;
    int err;

    if (!state || (uintptr_t)state & 7)
        return VQ_EINVAL;
    if (state_bytes < sizeof(*st) || st->magic != STATE_MAGIC || vq_desc_bytes(st->size) == 0 ||
        state_bytes < vq_driver_state_bytes(st->size))
        return VQ_ESTATE;
    ring.size = st->size;
    ring.flags = st->flags;
    ring.desc = st->desc;
    ring.avail = st->avail;
    ring.used = st->used;
    err = bind_parts(q, mem, state, &ring, st->indirect, st->indirect_len);
    if (err)
        return err == VQ_EINVAL ? VQ_ESTATE : err;
    return lists_consistent(q) ? 0 : VQ_ESTATE;
}

uint32_t vq_driver_num_free(const struct vq_driver *q)
{
    return (uint16_t)(q->state->free_tail - q->state->free_head);
}

/* ---- adding ---- */

static int seg_bad(const struct vq_seg *s)
{
    return (s->len == 0) | ((s->flags & ~(uint32_t)VQ_SEG_WRITE) != 0);
}

/* The common case: every buffer is one segment. Pointers are copied to locals because stores to shared memory
 * might, for all the compiler knows, change *q. */
static int add_single(struct vq_driver *q, const struct vq_seg *segs, const uint64_t *tokens, uint32_t n)
{
    struct vq_driver_state *st = q->state;
    struct vq_driver_head *heads = q->heads;
    struct vring_desc *desc = q->desc;
    const uint16_t *free_ring = q->free_ring;
    const uint32_t mask = q->mask;
    uint16_t *ring = q->avail + WORD_AVAIL_RING;
    uint32_t free_head = st->free_head, position = st->avail_next, room = vq_driver_num_free(q);

    if (n > room)
        n = room;
    for (uint32_t i = 0; i < n; i++, free_head++, position++) {
        /* Oldest free descriptor first: a device that works in order then sees heads in sequence. */
        uint32_t d = free_ring[free_head & mask] & mask;
        struct vq_driver_head *h = &heads[d];
        uint64_t len_and_flags = read_pair(&segs[i].len);

        if (seg_bad(&segs[i])) {
            /* Indices were not moved, so only the marks have to go. */
            for (; i; i--)
                heads[free_ring[--free_head & mask] & mask].count = 0;
            return VQ_EBADSEG;
        }
        store64(&desc[d].addr, segs[i].addr);
        store64(&desc[d].len, len_and_flags); /* flags are 0 or WRITE, so this is len, flags, next 0 */
        h->token = tokens[i];
        h->writable = segs[i].flags ? segs[i].len : 0;
        h->count = 1;
        h->position = (uint16_t)position;
        update16(&ring[position & mask], (uint16_t)d);
    }
    st->free_head = (uint16_t)free_head;
    st->avail_next = (uint16_t)position;
    st->outstanding = (uint16_t)(st->outstanding + n);
    return (int)n;
}

static uint32_t descs_needed(const struct vq_driver *q, uint32_t count)
{
    return count >= 2 && count <= q->indirect_len ? 1 : count;
}

static int chain_bad(const struct vq_driver *q, const struct vq_seg *segs, uint32_t count)
{
    uint64_t total = 0;
    int written = 0;

    if (count == 0 || count > q->mask + 1)
        return VQ_ETOOLONG;
    for (uint32_t i = 0; i < count; i++) {
        if (seg_bad(&segs[i]))
            return VQ_EBADSEG;
        if (written && !segs[i].flags)
            return VQ_EBADORDER;
        written |= segs[i].flags != 0;
        total += segs[i].len;
    }
    return total > (uint64_t)1 << 32 ? VQ_EBADSEG : 0;
}

/* Write one checked chain that fits; returns its head. */
static uint16_t write_chain(struct vq_driver *q, const struct vq_seg *segs, uint32_t count)
{
    struct vq_driver_state *st = q->state;
    uint16_t head = q->free_ring[st->free_head & q->mask] & q->mask;
    uint64_t writable = 0;

    for (uint32_t i = 0; i < count; i++)
        writable += segs[i].flags ? segs[i].len : 0;
    if (descs_needed(q, count) < count) {
        struct vring_desc *table = q->indirect + (size_t)head * q->indirect_len;
        uint64_t at = st->indirect + (uint64_t)head * q->indirect_len * sizeof(*table);

        for (uint32_t i = 0; i < count; i++) {
            uint16_t more = i + 1 < count ? VRING_DESC_F_NEXT : 0;

            write_desc(&table[i], segs[i].addr, segs[i].len, (uint16_t)(segs[i].flags | more),
                       more ? (uint16_t)(i + 1) : 0);
        }
        write_desc(&q->desc[head], at, (uint32_t)(count * sizeof(*table)), VRING_DESC_F_INDIRECT, 0);
        st->free_head++;
        q->heads[head].count = 1;
    } else {
        for (uint32_t i = 0; i < count; i++) {
            uint16_t d = q->free_ring[(st->free_head + i) & q->mask] & q->mask;
            uint16_t next = q->free_ring[(st->free_head + i + 1) & q->mask] & q->mask;
            uint16_t more = i + 1 < count ? VRING_DESC_F_NEXT : 0;

            write_desc(&q->desc[d], segs[i].addr, segs[i].len, (uint16_t)(segs[i].flags | more),
                       more ? next : 0);
            q->next[d] = next;
        }
        st->free_head = (uint16_t)(st->free_head + count);
        q->heads[head].count = (uint16_t)count;
    }
    q->heads[head].writable = writable > UINT32_MAX ? UINT32_MAX : (uint32_t)writable;
    return head;
}

static int add_chains(struct vq_driver *q, const struct vq_seg *segs, const uint32_t *counts,
                      const uint64_t *tokens, uint32_t n)
{
    struct vq_driver_state *st = q->state;
    uint32_t room = vq_driver_num_free(q), fit = 0;
    size_t at = 0;

    /* First check, then write: an error leaves nothing half done. */
    for (; fit < n; fit++) {
        int err = chain_bad(q, segs + at, counts[fit]);

        if (err)
            return err;
        if (descs_needed(q, counts[fit]) > room)
            break;
        room -= descs_needed(q, counts[fit]);
        at += counts[fit];
    }
    at = 0;
    for (uint32_t i = 0; i < fit; i++) {
        uint16_t head = write_chain(q, segs + at, counts[i]);

        q->heads[head].token = tokens[i];
        q->heads[head].position = st->avail_next;
        update16(q->avail + WORD_AVAIL_RING + (st->avail_next & q->mask), head);
        st->avail_next++;
        at += counts[i];
    }
    st->outstanding = (uint16_t)(st->outstanding + fit);
    return (int)fit;
}

int vq_driver_add(struct vq_driver *q, const struct vq_seg *segs, const uint32_t *counts,
                  const uint64_t *tokens, uint32_t n)
{
    if (q->state->error)
        return VQ_EBROKEN;
    if (n == 0)
        return 0;
    if (!segs || !tokens)
        return VQ_EINVAL;
    return counts ? add_chains(q, segs, counts, tokens, n) : add_single(q, segs, tokens, n);
}

int vq_driver_publish(struct vq_driver *q)
{
    struct vq_driver_state *st = q->state;
    uint16_t old = st->avail_published, now = st->avail_next;

    if (st->error)
        return VQ_EBROKEN;
    if (old == now)
        return 0;
    st->avail_published = now;
    /* Release: descriptors and avail entries before the index; pairs with the acquire in the device's fetch
     * of avail idx (split.supply.driver-1). */
    store16_release(q->avail + WORD_IDX, now);
    /* Pairs with the full barrier in vq_device_enable_notify: it writes the event or flag, then reads avail
     * idx. */
    full_barrier();
    if (q->flags & VQ_F_EVENT_IDX)
        return need_event(load16(avail_event(q)), now, old);
    return !(load16(q->used + WORD_FLAGS) & VRING_USED_F_NO_NOTIFY);
}

/* ---- collecting ---- */

static int broken(struct vq_driver *q, int code, uint32_t index, uint32_t id)
{
    q->state->bad_index = index;
    q->state->bad_id = id;
    return code;
}

/* Read used idx again. Returns how many used elements wait, or an error code that is not yet made sticky. */
static int fetch_used(struct vq_driver *q)
{
    struct vq_driver_state *st = q->state;
    /* Acquire: elements and buffer contents after the index; pairs with the release in vq_device_push. */
    uint16_t idx = load16_acquire(q->used + WORD_IDX);
    uint16_t ready = (uint16_t)(idx - st->used_next);

    if (ready > (uint16_t)(st->avail_published - st->used_next) ||
        ready < (uint16_t)(st->used_seen - st->used_next))
        return broken(q, VQ_EUSED_AHEAD, st->used_next, idx);
    st->used_seen = idx;
    return ready;
}

/* Whether an outstanding head was added but never shown to the device. */
static int unpublished(const struct vq_driver *q, uint32_t head)
{
    const struct vq_driver_state *st = q->state;
    uint16_t position = q->heads[head].position;

    /* The position of a buffer held for 65536 others can look recent; the ring entry there tells the two
     * apart. */
    return (uint16_t)(position - st->avail_published) < (uint16_t)(st->avail_next - st->avail_published) &&
           load16(q->avail + WORD_AVAIL_RING + (position & q->mask)) == head;
}

/* Give the chain's descriptors back to the free list. */
static void release_chain(struct vq_driver *q, uint32_t head)
{
    struct vq_driver_state *st = q->state;
    uint32_t count = q->heads[head].count, d = head;

    q->heads[head].count = 0;
    for (uint32_t i = 0; i < count && i <= q->mask; i++) {
        q->free_ring[st->free_tail & q->mask] = (uint16_t)d;
        st->free_tail++;
        d = q->next[d] & q->mask;
    }
}

static int collect_ready(struct vq_driver *q, uint64_t *tokens, uint32_t *lens, uint32_t n)
{
    struct vq_driver_state *st = q->state;
    struct vq_driver_head *heads = q->heads;
    uint16_t *free_ring = q->free_ring;
    const uint32_t mask = q->mask;
    const uint16_t *ring = q->used + WORD_USED_RING;
    const int hidden = st->avail_next != st->avail_published;
    uint32_t at = st->used_next, free_tail = st->free_tail, i;
    int err = 0;

    for (i = 0; i < n; i++, at++) {
        const uint16_t *element = ring + 4 * (size_t)(at & mask);
        uint32_t id = load32(element), len = load32(element + 2), count;
        struct vq_driver_head *h = &heads[id & mask];

        count = h->count;
        if (id > mask || !count || (hidden && unpublished(q, id))) {
            err = broken(q, VQ_EUSED_ID, at & 0xffff, id);
            break;
        }
        if (len > h->writable) {
            if (!(q->flags & VQ_F_LAX_LEN)) {
                err = broken(q, VQ_EUSED_LEN, at & 0xffff, len);
                break;
            }
            st->cut_lens++;
            len = h->writable;
        }
        tokens[i] = h->token;
        lens[i] = len;
        if (count == 1) {
            h->count = 0;
            free_ring[free_tail & mask] = (uint16_t)id;
            free_tail++;
        } else {
            st->free_tail = (uint16_t)free_tail;
            release_chain(q, id);
            free_tail = st->free_tail;
        }
    }
    st->free_tail = (uint16_t)free_tail;
    st->used_next = (uint16_t)at;
    st->outstanding = (uint16_t)(st->outstanding - i);
    if (err && i == 0)
        return st->error = err;
    st->pending = err;
    return (int)i;
}

int vq_driver_collect(struct vq_driver *q, uint64_t *tokens, uint32_t *lens, uint32_t max)
{
    struct vq_driver_state *st = q->state;
    int ready;

    if (st->error)
        return VQ_EBROKEN;
    if (st->pending)
        return st->error = st->pending;
    if (max == 0)
        return 0;
    ready = (uint16_t)(st->used_seen - st->used_next);
    if ((uint32_t)ready < max) { /* what was seen last time does not do: look at the shared line */
        ready = fetch_used(q);
        if (ready < 0)
            return st->error = ready;
    }
    return collect_ready(q, tokens, lens, (uint32_t)ready < max ? (uint32_t)ready : max);
}

int vq_driver_exchange(struct vq_driver *q, struct vq_driver_io *io, uint32_t n_add, uint32_t spins)
{
    const struct vq_seg *segs = io->segs;
    int n;

    io->n_added = io->n_done = io->kick = 0;
    for (;;) {
        n = vq_driver_collect(q, io->done_tokens + io->n_done, io->done_lens + io->n_done,
                              io->max_done - io->n_done);
        if (n < 0)
            return n;
        io->n_done += (uint32_t)n;
        if (io->n_added < n_add) {
            const uint32_t *counts = io->counts ? io->counts + io->n_added : NULL;

            n = vq_driver_add(q, segs, counts, io->tokens + io->n_added, n_add - io->n_added);
            if (n < 0)
                return n;
            for (int i = 0; counts && i < n; i++)
                segs += counts[i];
            segs += counts ? 0 : n;
            io->n_added += (uint32_t)n;
            n = vq_driver_publish(q);
            if (n < 0)
                return n;
            io->kick |= (uint32_t)n;
        }
        /* Enough was done, or the device sleeps and must be kicked first, or there is nothing to wait for. */
        if (io->kick || io->n_done == io->max_done || (n_add ? io->n_added == n_add : io->n_done != 0))
            return (int)io->n_done;
        if (q->state->avail_published == q->state->used_next)
            return (int)io->n_done;
        for (;;) {
            uint16_t ready;

            if (spins == 0)
                return (int)io->n_done;
            spins--;
            /* No order needed: the collect that follows acquires. Wait for enough to fit the rest, not for a
             * first one, or the batches fall apart into single buffers. */
            ready = (uint16_t)(load16(q->used + WORD_IDX) - q->state->used_next);
            if (n_add ? ready + vq_driver_num_free(q) >= n_add - io->n_added ||
                            ready >= io->max_done - io->n_done
                      : ready != 0)
                break;
            cpu_relax();
        }
    }
}

/* ---- interrupts ---- */

int vq_driver_enable_cb(struct vq_driver *q, uint32_t delay)
{
    struct vq_driver_state *st = q->state;
    uint16_t waiting = (uint16_t)(st->avail_published - st->used_next);
    int ready;

    if (st->error)
        return VQ_EBROKEN;
    if (q->flags & VQ_F_EVENT_IDX) {
        if (delay && delay >= waiting)
            delay =
                waiting ? waiting - 1u : 0; /* an event that nothing outstanding reaches would never come */
        store16(used_event(q), (uint16_t)(st->used_next + delay));
    } else {
        delay = 0;
        store16(q->avail + WORD_FLAGS, 0);
    }
    /* Pairs with the full barrier in vq_device_push: it writes used idx, then reads the event or flag. Then
     * look at the real index: what was used before our store interrupts nobody. */
    full_barrier();
    ready = fetch_used(q);
    if (ready < 0)
        return st->error = ready;
    return (uint32_t)ready > delay;
}

int vq_driver_disable_cb(struct vq_driver *q)
{
    if (q->state->error)
        return VQ_EBROKEN;
    if (q->flags & VQ_F_EVENT_IDX)
        store16(used_event(q), (uint16_t)(q->state->used_next - 1)); /* just passed: 65535 buffers away */
    else
        store16(q->avail + WORD_FLAGS, VRING_AVAIL_F_NO_INTERRUPT);
    return 0;
}

/* ---- reset ---- */

int vq_driver_detach(struct vq_driver *q, uint64_t *tokens, uint32_t max)
{
    uint32_t n = 0;

    if (q->state->outstanding > max)
        return VQ_EINVAL;
    for (uint32_t head = 0; head <= q->mask && n < max; head++) {
        if (q->heads[head].count)
            tokens[n++] = q->heads[head].token;
    }
    start_over(q, 0);
    return (int)n;
}
