/* The driver half of a split virtqueue: adds buffers, publishes them, collects what the device used.
 *
 * Nothing the device can write is trusted. The private state (free descriptors, tokens, lengths) is never
 * rebuilt from the shared table; it may itself lie where the device can write, so what is read from it is
 * read once, and masked: even a scribbled state cannot lead outside it.
 */

#include "vring/vring_internal.h"

/* Why nothing can be done with the queue, or 0. */
static inline int unusable(const struct vq_driver *q)
{
    if (!q->mem->count)
        return VQ_ECLOSED;
    return q->error ? VQ_EBROKEN : 0;
}

/* ---- adding ---- */

static int seg_bad(const struct vq_seg *s)
{
    return (s->len == 0) | ((s->flags & ~(uint32_t)VQ_SEG_WRITE) != 0);
}

/* The common case: every buffer is one segment. Pointers are copied to locals because stores to shared memory
 * might, for all the compiler knows, change *q. */
static inline int add_single(struct vq_driver *q, const struct vq_seg *segs, const uint64_t *tokens,
                             uint32_t n)
{
    struct vq_driver_head *heads = q->heads;
    struct vring_desc *desc = q->desc;
    const uint16_t *free_ring = q->free_ring;
    const uint32_t mask = q->mask;
    uint16_t *ring = q->avail + WORD_AVAIL_RING;
    uint32_t free_head = q->free_head, position = q->avail_next, room = vq_driver_num_free(q);

    if (n > room)
        n = room;
    for (uint32_t i = 0; i < n; i++, free_head++, position++) {
        /* Oldest free descriptor first: a device that works in order then sees heads in sequence. */
        uint32_t d = load16(&free_ring[free_head & mask]) & mask;
        struct vq_driver_head *h = &heads[d];
        uint64_t len_and_flags = read_pair(&segs[i].len);

        if (seg_bad(&segs[i])) {
            /* Indices were not moved, so only the marks have to go. */
            for (; i; i--)
                heads[load16(&free_ring[--free_head & mask]) & mask].count = 0;
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
    vq_keep(q, free_head, (uint16_t)free_head);
    vq_keep(q, avail_next, (uint16_t)position);
    vq_keep(q, outstanding, (uint16_t)(q->outstanding + n));
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
    uint16_t head = load16(&q->free_ring[q->free_head & q->mask]) & q->mask;
    uint64_t writable = 0;

    for (uint32_t i = 0; i < count; i++)
        writable += segs[i].flags ? segs[i].len : 0;
    if (descs_needed(q, count) < count) {
        struct vring_desc *table = q->indirect + (size_t)head * q->indirect_len;
        uint64_t at = q->indirect_addr + (uint64_t)head * q->indirect_len * sizeof(*table);

        for (uint32_t i = 0; i < count; i++) {
            uint16_t more = i + 1 < count ? VRING_DESC_F_NEXT : 0;

            write_desc(&table[i], segs[i].addr, segs[i].len, (uint16_t)(segs[i].flags | more),
                       more ? (uint16_t)(i + 1) : 0);
        }
        write_desc(&q->desc[head], at, (uint32_t)(count * sizeof(*table)), VRING_DESC_F_INDIRECT, 0);
        vq_keep(q, free_head, q->free_head + 1);
        q->heads[head].count = 1;
    } else {
        uint16_t d = head;

        for (uint32_t i = 0; i < count; i++) {
            uint16_t next = load16(&q->free_ring[(q->free_head + i + 1) & q->mask]) & q->mask;
            uint16_t more = i + 1 < count ? VRING_DESC_F_NEXT : 0;

            write_desc(&q->desc[d], segs[i].addr, segs[i].len, (uint16_t)(segs[i].flags | more),
                       more ? next : 0);
            q->next[d] = next;
            d = next;
        }
        vq_keep(q, free_head, (uint16_t)(q->free_head + count));
        q->heads[head].count = (uint16_t)count;
    }
    q->heads[head].writable = writable > UINT32_MAX ? UINT32_MAX : (uint32_t)writable;
    return head;
}

static int add_chains(struct vq_driver *q, const struct vq_seg *segs, const uint32_t *counts,
                      const uint64_t *tokens, uint32_t n)
{
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
        q->heads[head].position = q->avail_next;
        update16(q->avail + WORD_AVAIL_RING + (q->avail_next & q->mask), head);
        vq_keep(q, avail_next, q->avail_next + 1);
        at += counts[i];
    }
    vq_keep(q, outstanding, (uint16_t)(q->outstanding + fit));
    return (int)fit;
}

int vq_driver_add(struct vq_driver *q, const struct vq_seg *segs, const uint32_t *counts,
                  const uint64_t *tokens, uint32_t n)
{
    int err = unusable(q);

    if (err)
        return err;
    if (n == 0)
        return 0;
    if (!segs || !tokens)
        return VQ_EINVAL;
    return counts ? add_chains(q, segs, counts, tokens, n) : add_single(q, segs, tokens, n);
}

static inline int publish(struct vq_driver *q)
{
    uint16_t old = q->avail_published, now = q->avail_next;

    if (old == now)
        return 0;
    vq_keep(q, avail_published, now);
    /* Release: descriptors and avail entries before the index; pairs with the acquire in the device's fetch
     * of avail idx (split.supply.driver-1). */
    store16_release(q->avail + WORD_IDX, now);
    /* Pairs with the full barrier in vq_device_enable_notify: it writes the event or flag, then reads avail
     * idx. */
    full_barrier();
    if (q->flags & VQ_F_EVENT_IDX)
        return need_event(load16(driver_avail_event(q)), now, old);
    return !(load16(q->used + WORD_FLAGS) & VRING_USED_F_NO_NOTIFY);
}

int vq_driver_publish(struct vq_driver *q)
{
    int err = unusable(q);

    return err ? err : publish(q);
}

/* ---- collecting ---- */

static int broken(struct vq_driver *q, int code, uint32_t index, uint32_t id)
{
    vq_keep(q, bad_index, index);
    vq_keep(q, bad_id, id);
    return code;
}

/* From now on the queue waits for a reset. */
static int stop(struct vq_driver *q, int code)
{
    vq_keep(q, error, code);
    return code;
}

/* Read used idx again. Returns how many used elements wait, or an error code that is not yet made sticky. */
static inline int fetch_used(struct vq_driver *q)
{
    /* Acquire: elements and buffer contents after the index; pairs with the release in vq_device_push. */
    uint16_t idx = load16_acquire(q->used + WORD_IDX);
    uint16_t ready = (uint16_t)(idx - q->used_next);

    if (ready > (uint16_t)(q->avail_published - q->used_next) ||
        ready < (uint16_t)(q->used_seen - q->used_next))
        return broken(q, VQ_EUSED_AHEAD, q->used_next, idx);
    vq_keep(q, used_seen, idx);
    return ready;
}

/* Whether an outstanding head was added but never shown to the device. */
static int unpublished(const struct vq_driver *q, uint32_t head)
{
    uint16_t position = load16(&q->heads[head].position);

    /* The position of a buffer held for 65536 others can look recent; the ring entry there tells the two
     * apart. */
    return (uint16_t)(position - q->avail_published) < (uint16_t)(q->avail_next - q->avail_published) &&
           load16(q->avail + WORD_AVAIL_RING + (position & q->mask)) == head;
}

/* Put the `count` descriptors of a chain on the free list behind free_tail; returns where it ends then. */
static uint32_t release_chain(struct vq_driver *q, uint32_t head, uint32_t count, uint32_t free_tail)
{
    uint32_t d = head;

    q->heads[head].count = 0;
    for (uint32_t i = 0; i < count; i++) {
        q->free_ring[free_tail++ & q->mask] = (uint16_t)d;
        d = load16(&q->next[d]) & q->mask;
    }
    return free_tail;
}

static inline int collect_ready(struct vq_driver *q, uint64_t *tokens, uint32_t *lens, uint32_t n)
{
    struct vq_driver_head *heads = q->heads;
    uint16_t *free_ring = q->free_ring;
    const uint32_t mask = q->mask;
    const uint16_t *ring = q->used + WORD_USED_RING;
    const int hidden = q->avail_next != q->avail_published;
    const uint32_t all_free = q->free_head + mask + 1; /* where the free list ends when it has them all */
    uint32_t at = q->used_next, free_tail = q->free_head + vq_driver_num_free(q), i;
    int err = 0;

    for (i = 0; i < n; i++, at++) {
        const uint16_t *element = ring + 4 * (size_t)(at & mask);
        uint32_t id = load32(element), len = load32(element + 2), count, writable;
        struct vq_driver_head *h = &heads[id & mask];

        count = load16(&h->count);
        /* No chain (count - 1 wraps), or more descriptors than are in use: the state was scribbled on. */
        if (id > mask || count - 1 >= all_free - free_tail || (hidden && unpublished(q, id))) {
            err = broken(q, VQ_EUSED_ID, at & 0xffff, id);
            break;
        }
        writable = load32(&h->writable);
        if (len > writable) {
            if (!(q->flags & VQ_F_LAX_LEN)) {
                err = broken(q, VQ_EUSED_LEN, at & 0xffff, len);
                break;
            }
            vq_keep(q, cut_lens, q->cut_lens + 1);
            len = writable;
        }
        tokens[i] = load64(&h->token);
        lens[i] = len;
        if (count == 1) {
            h->count = 0;
            free_ring[free_tail & mask] = (uint16_t)id;
            free_tail++;
        } else {
            free_tail = release_chain(q, id, count, free_tail);
        }
    }
    vq_keep(q, free_tail, (uint16_t)free_tail);
    vq_keep(q, used_next, (uint16_t)at);
    vq_keep(q, outstanding, (uint16_t)(q->outstanding - i));
    if (err && i == 0)
        return stop(q, err);
    if (err)
        vq_keep(q, pending, err);
    return (int)i;
}

static inline int collect(struct vq_driver *q, uint64_t *tokens, uint32_t *lens, uint32_t max)
{
    int ready;

    if (q->pending)
        return stop(q, q->pending);
    if (max == 0)
        return 0;
    ready = (uint16_t)(q->used_seen - q->used_next);
    if ((uint32_t)ready < max) { /* what was seen last time does not do: look at the shared line */
        ready = fetch_used(q);
        if (ready < 0)
            return stop(q, ready);
    }
    return collect_ready(q, tokens, lens, (uint32_t)ready < max ? (uint32_t)ready : max);
}

int vq_driver_collect(struct vq_driver *q, uint64_t *tokens, uint32_t *lens, uint32_t max)
{
    int err = unusable(q);

    return err ? err : collect(q, tokens, lens, max);
}

int vq_driver_exchange(struct vq_driver *q, struct vq_driver_io *io, uint32_t n_add, uint32_t spins)
{
    const struct vq_seg *segs = io->segs;
    int n = unusable(q);

    io->n_added = io->n_done = io->kick = 0;
    if (n)
        return n;
    for (;;) {
        n = collect(q, io->done_tokens + io->n_done, io->done_lens + io->n_done, io->max_done - io->n_done);
        if (n < 0)
            return n;
        io->n_done += (uint32_t)n;
        if (io->n_added < n_add) {
            const uint32_t *counts = io->counts ? io->counts + io->n_added : NULL;

            n = counts ? add_chains(q, segs, counts, io->tokens + io->n_added, n_add - io->n_added)
                       : add_single(q, segs, io->tokens + io->n_added, n_add - io->n_added);
            if (n < 0)
                return n;
            for (int i = 0; counts && i < n; i++)
                segs += counts[i];
            segs += counts ? 0 : n;
            io->n_added += (uint32_t)n;
            io->kick |= (uint32_t)publish(q);
        }
        /* Enough was done, or the device sleeps and must be kicked first, or there is nothing to wait for. */
        if (io->kick || io->n_done == io->max_done || (n_add ? io->n_added == n_add : io->n_done != 0))
            return (int)io->n_done;
        if (q->avail_published == q->used_next)
            return (int)io->n_done;
        for (;;) {
            uint16_t ready;

            if (spins == 0)
                return (int)io->n_done;
            spins--;
            /* No order needed: the collect that follows acquires. Wait for enough to fit the rest, not for a
             * first one, or the batches fall apart into single buffers. */
            ready = (uint16_t)(load16(q->used + WORD_IDX) - q->used_next);
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
    uint16_t waiting = (uint16_t)(q->avail_published - q->used_next);
    int ready = unusable(q);

    if (ready)
        return ready;
    if (q->pending) /* else whoever sleeps until the next interrupt learns of it late, or never */
        return stop(q, q->pending);
    if (q->flags & VQ_F_EVENT_IDX) {
        if (delay && delay >= waiting)
            delay =
                waiting ? waiting - 1u : 0; /* an event that nothing outstanding reaches would never come */
        store16(driver_used_event(q), (uint16_t)(q->used_next + delay));
    } else {
        delay = 0;
        store16(q->avail + WORD_FLAGS, 0);
    }
    /* Pairs with the full barrier in vq_device_push: it writes used idx, then reads the event or flag. Then
     * look at the real index: what was used before our store interrupts nobody. */
    full_barrier();
    ready = fetch_used(q);
    if (ready < 0)
        return stop(q, ready);
    return (uint32_t)ready > delay;
}

int vq_driver_disable_cb(struct vq_driver *q)
{
    int err = unusable(q);

    if (err)
        return err;
    if (q->flags & VQ_F_EVENT_IDX)
        store16(driver_used_event(q), (uint16_t)(q->used_next - 1)); /* just passed: 65535 buffers away */
    else
        store16(q->avail + WORD_FLAGS, VRING_AVAIL_F_NO_INTERRUPT);
    return 0;
}
