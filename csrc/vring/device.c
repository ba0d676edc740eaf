/* The device half of a split virtqueue: pops what the driver made available, pushes it back used.
 *
 * The driver is hostile and may write shared memory at any time: each field is read once into a local,
 * checked, and only the local is used. Every loop is bounded by the queue size. Nothing is ever written but
 * the used ring.
 */

#include "vring/vring_internal.h"

static uint16_t *used_event(struct vq_device *q)
{
    return q->avail + WORD_AVAIL_RING + q->size;
}

static uint16_t *avail_event(struct vq_device *q)
{
    return q->used + WORD_USED_RING + 4 * (size_t)q->size;
}

/* Why nothing can be done with the queue, or 0. */
static inline int unusable(const struct vq_device *q)
{
    if (!q->mem->count)
        return VQ_ECLOSED;
    return q->error ? VQ_EBROKEN : 0;
}

int vq_device_init(struct vq_device *q, const struct vq_memory *mem, const struct vq_ring *ring,
                   uint16_t base, struct vq_device_head *heads)
{
    struct vq_parts parts;
    int err = vq_parts_find(&parts, mem, ring);

    if (err)
        return err;
    if (!heads || ring->flags & ~(uint32_t)(VQ_F_EVENT_IDX | VQ_F_INDIRECT))
        return VQ_EINVAL;
    memset(q, 0, sizeof(*q));
    memset(heads, 0, ring->size * sizeof(*heads));
    q->mem = mem;
    q->desc = parts.desc;
    q->avail = parts.avail;
    q->used = parts.used;
    q->heads = heads;
    q->size = ring->size;
    q->flags = ring->flags;
    q->avail_next = q->avail_seen = q->used_next = base;
    q->ring = *ring;
    return 0;
}

int vq_device_rebind(struct vq_device *q, const struct vq_memory *mem)
{
    struct vq_parts parts;
    int err = vq_parts_find(&parts, mem, &q->ring);

    if (err)
        return err;
    q->mem = mem;
    q->desc = parts.desc;
    q->avail = parts.avail;
    q->used = parts.used;
    q->region = 0;
    return 0;
}

/* ---- taking buffers ---- */

/* Flags as they lie in the second word of a descriptor, and of a segment. */
#define FOLLOWED ((uint64_t)(VRING_DESC_F_NEXT | VRING_DESC_F_INDIRECT) << 32)
#define WRITTEN  ((uint64_t)VRING_DESC_F_WRITE << 32)

static int bad(struct vq_device *q, int code, uint32_t desc, uint64_t addr)
{
    q->bad_desc = desc;
    q->bad_addr = addr;
    return code;
}

/* Whether a buffer is guest memory; most lie in the same region as the one before. */
static inline int covered(struct vq_device *q, uint64_t addr, uint32_t len)
{
    const struct vq_memory *mem = q->mem;
    const struct vq_region *r = &mem->region[q->region];

    if (addr - r->gpa < r->size && len <= r->size - (addr - r->gpa)) /* below gpa wraps to huge */
        return 1;
    const uint32_t found = vq_memory_region(mem, addr);

    if (found == VQ_MAX_REGIONS)
        return 0;
    q->region = found;
    return vq_memory_covers(mem, addr, len);
}

/* One descriptor of an indirect table known to be guest memory, of which an entry may lie across two regions.
 */
static struct vring_desc read_indirect(const struct vq_memory *mem, uint64_t addr)
{
    const void *p = vq_memory_at(mem, addr, sizeof(struct vring_desc));
    uint8_t copy[sizeof(struct vring_desc)] = {0};

    if (p)
        return read_desc_anywhere(p);
    for (uint32_t i = 0; i < sizeof(copy); i++) {
        const volatile uint8_t *byte = vq_memory_at(mem, addr + i, 1);

        if (byte)
            copy[i] = *byte;
    }
    return read_desc_anywhere(copy);
}

/* Check the descriptor of an indirect table; the number of its entries, or an error. */
static int enter_indirect(struct vq_device *q, const struct vring_desc *d, uint32_t index, int nested)
{
    if (!(q->flags & VQ_F_INDIRECT))
        return bad(q, VQ_EINDIRECT, index, d->flags);
    if (nested)
        return bad(q, VQ_EINDIRECT_NEST, index, d->addr);
    if (d->flags & VRING_DESC_F_NEXT)
        return bad(q, VQ_EINDIRECT_NEXT, index, d->flags);
    if (d->len == 0 || d->len % sizeof(*d))
        return bad(q, VQ_EINDIRECT_SIZE, index, d->len);
    if (!vq_memory_covers(q->mem, d->addr, d->len))
        return bad(q, VQ_EADDR, index, d->addr);
    return (int)(d->len / sizeof(*d)); /* WRITE is disregarded: split.indirect.device-1 */
}

/* Check and copy out one segment behind chain->n_segs others. */
static int take_segment(struct vq_device *q, const struct vring_desc *d, uint32_t index, struct vq_seg *seg,
                        struct vq_chain *chain)
{
    if (d->len == 0)
        return bad(q, VQ_EZERO, index, d->addr);
    if (d->flags & VRING_DESC_F_WRITE) {
        chain->writable += d->len;
    } else {
        if (chain->n_readable != chain->n_segs)
            return bad(q, VQ_EORDER, index, d->addr);
        chain->n_readable++;
        chain->readable += d->len;
    }
    if (chain->readable + chain->writable > (uint64_t)1 << 32)
        return bad(q, VQ_ETOTAL, index, chain->readable + chain->writable);
    if (!covered(q, d->addr, d->len))
        return bad(q, VQ_EADDR, index, d->addr);
    seg->addr = d->addr;
    seg->len = d->len;
    seg->flags = d->flags & VRING_DESC_F_WRITE;
    chain->n_segs++;
    return 0;
}

/* Follow a chain from its first descriptor, already read. Returns 0, an error of the driver, or VQ_ESEGS. */
static int walk_chain(struct vq_device *q, struct vring_desc d, struct vq_chain *chain, struct vq_seg *segs,
                      uint32_t room)
{
    uint32_t index = chain->head, entries = q->size;
    uint64_t table = 0;
    int indirect = 0;

    /* Each turn takes a segment or enters the one table there may be: at most size + 1 turns. */
    for (;;) {
        int err;

        if (d.flags & VRING_DESC_F_INDIRECT) {
            err = enter_indirect(q, &d, index, indirect);
            if (err < 0)
                return err;
            indirect = 1;
            table = d.addr;
            entries = (uint32_t)err;
            index = 0;
            d = read_indirect(q->mem, table);
            continue;
        }
        if (chain->n_segs == q->size)
            return bad(q, VQ_ELOOP, index, d.addr);
        if (chain->n_segs == room)
            return VQ_ESEGS;
        err = take_segment(q, &d, index, &segs[chain->n_segs], chain);
        if (err)
            return err;
        if (!(d.flags & VRING_DESC_F_NEXT))
            return 0;
        if (d.next >= entries)
            return bad(q, VQ_ENEXT, index, d.next);
        index = d.next;
        d = indirect ? read_indirect(q->mem, table + (uint64_t)index * sizeof(d))
                     : read_desc(&q->desc[index]);
    }
}

/* Read avail idx again. Returns how many buffers wait, or an error code that is not yet made sticky. */
static int fetch_avail(struct vq_device *q)
{
    /* Acquire: ring entries, descriptors and buffers after the index; pairs with the release in
     * vq_driver_publish. */
    uint16_t idx = load16_acquire(q->avail + WORD_IDX);
    uint16_t ready = (uint16_t)(idx - q->avail_next);

    if (ready + q->in_flight > q->size || ready < (uint16_t)(q->avail_seen - q->avail_next)) {
        q->bad_index = q->avail_next;
        return bad(q, VQ_EAVAIL_AHEAD, 0, idx);
    }
    q->avail_seen = idx;
    return ready;
}

/* Take the buffer of one head, already inside the table. Returns 0, an error of the driver, or VQ_ESEGS. */
static int take_chain(struct vq_device *q, uint32_t head, const struct vring_desc *d, struct vq_chain *chain,
                      struct vq_seg *segs, uint32_t room)
{
    chain->n_segs = chain->n_readable = 0;
    chain->readable = chain->writable = 0;
    if (q->heads[head].held)
        return bad(q, VQ_EINUSE, head, head);
    return walk_chain(q, *d, chain, segs, room);
}

static inline int pop(struct vq_device *q, struct vq_chain *chains, uint32_t max_chains, struct vq_seg *segs,
                      uint32_t max_segs)
{
    const uint32_t mask = q->size - 1;
    const uint16_t *ring = q->avail + WORD_AVAIL_RING;
    const struct vring_desc *table = q->desc;
    struct vq_device_head *heads = q->heads;
    uint64_t region_gpa, region_size;
    uint32_t n = 0, used_segs = 0;
    uint16_t at = q->avail_next;
    int ready, err = 0;

    if (q->pending)
        return q->error = q->pending;
    if (max_chains == 0)
        return 0;
    ready = (uint16_t)(q->avail_seen - at);
    if ((uint32_t)ready < max_chains) { /* what was seen last time does not do: look at the shared line */
        ready = fetch_avail(q);
        if (ready < 0)
            return q->error = ready;
    }
    if ((uint32_t)ready > max_chains)
        ready = (int)max_chains;
    region_gpa = q->mem->region[q->region].gpa;
    region_size = q->mem->region[q->region].size;
    for (; n < (uint32_t)ready; n++, at++) {
        uint32_t head = load16(&ring[at & mask]), len, written;
        struct vq_device_head *h = &heads[head & mask];
        struct vq_chain *chain = &chains[n];
        uint64_t addr, rest;

        chain->head = head;
        chain->first_seg = used_segs;
        if (head > mask) {
            err = bad(q, VQ_EHEAD, head, head);
            break;
        }
        addr = load64(&table[head].addr);
        rest = load64(&table[head].len);
        len = (uint32_t)rest;
        if (!h->held && used_segs < max_segs && len != 0 && addr - region_gpa < region_size &&
            len <= region_size - (addr - region_gpa) && !(rest & FOLLOWED)) {
            /* One segment near the one before: nearly every buffer of a balloon. The other path knows no
             * less. */
            struct vq_seg *seg = &segs[used_segs++];

            written = rest & WRITTEN ? len : 0;
            seg->addr = addr;
            write_pair(&seg->len, rest & (WRITTEN | UINT32_MAX));
            chain->n_segs = 1;
            chain->n_readable = written == 0;
            chain->readable = len - written;
            chain->writable = written;
        } else {
            struct vring_desc d = desc_of(addr, rest);

            err = take_chain(q, head, &d, chain, segs + used_segs, max_segs - used_segs);
            if (err)
                break;
            used_segs += chain->n_segs;
            written = chain->writable > UINT32_MAX ? UINT32_MAX : (uint32_t)chain->writable;
        }
        h->writable = written;
        h->position = at;
        h->held = 1;
    }
    q->in_flight += n;
    q->avail_next = at;
    if (err == VQ_ESEGS) {
        err = 0;
        if (n == 0)
            return VQ_ESEGS;
    }
    if (err) {
        q->bad_index = at;
        q->pending = err;
        if (n == 0)
            return q->error = err;
    }
    return (int)n;
}

int vq_device_pop(struct vq_device *q, struct vq_chain *chains, uint32_t max_chains, struct vq_seg *segs,
                  uint32_t max_segs)
{
    int err = unusable(q);

    return err ? err : pop(q, chains, max_chains, segs, max_segs);
}

int vq_device_unpop(struct vq_device *q, const uint32_t *heads, uint32_t n)
{
    uint16_t first = (uint16_t)(q->avail_next - n);

    if (n > q->in_flight)
        return VQ_ENOTHELD;
    for (uint32_t i = 0; i < n; i++) {
        const struct vq_device_head *h = &q->heads[heads[i] & (q->size - 1)];

        if (heads[i] >= q->size || !h->held || h->position != (uint16_t)(first + i))
            return VQ_ENOTHELD;
    }
    for (uint32_t i = 0; i < n; i++)
        q->heads[heads[i]].held = 0;
    q->in_flight -= n;
    q->avail_next = first;
    return 0;
}

/* ---- giving them back ---- */

static inline int push(struct vq_device *q, const uint32_t *heads, const uint32_t *lens, uint32_t n)
{
    const uint32_t mask = q->size - 1;
    struct vq_device_head *held =
        q->heads; /* a local: stores to shared memory might change *q, for the compiler */
    uint16_t *ring = q->used + WORD_USED_RING;
    uint16_t old = q->used_next, now = old;

    if (n == 0)
        return 0;
    if (n > q->in_flight) /* also what bounds the reading of `heads`, if it is as long as the queue */
        return VQ_ENOTHELD;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t head = heads[i], len = lens[i];
        struct vq_device_head *h = &held[head & mask];
        uint16_t *element = ring + 4 * (size_t)(now & mask);

        if (head > mask || !h->held || len > h->writable) {
            int err = head > mask || !h->held ? VQ_ENOTHELD : VQ_EINVAL;

            while (i--) /* the driver has seen nothing of it: the index was not moved */
                held[heads[i]].held = 1;
            return err;
        }
        h->held = 0;
        update32(element, head);
        update32(element + 2, len);
        now++;
    }
    q->in_flight -= n;
    q->used_next = now;
    /* Release: elements and what was written into buffers before the index (split.used.device-1, -2); pairs
     * with the acquire in the driver's fetch of used idx. */
    store16_release(q->used + WORD_IDX, now);
    /* Pairs with the full barrier in vq_driver_enable_cb: it writes the event or flag, then reads used idx.
     */
    full_barrier();
    if (q->flags & VQ_F_EVENT_IDX)
        return need_event(load16(used_event(q)), now, old);
    return !(load16(q->avail + WORD_FLAGS) & VRING_AVAIL_F_NO_INTERRUPT);
}

int vq_device_push(struct vq_device *q, const uint32_t *heads, const uint32_t *lens, uint32_t n)
{
    int err = unusable(q);

    return err ? err : push(q, heads, lens, n);
}

int vq_device_exchange(struct vq_device *q, struct vq_device_io *io, uint32_t n_push, uint32_t max_pop,
                       uint32_t spins)
{
    const struct vq_chain *chains = io->chains;
    uint32_t *heads = io->heads;
    int n = unusable(q);

    io->n_chains = io->n_segs = io->notify = 0;
    if (n)
        return n;
    n = push(q, io->heads, io->lens, n_push);
    if (n < 0)
        return n;
    io->notify = (uint32_t)n;
    if (max_pop > io->max_chains)
        max_pop = io->max_chains;
    n = pop(q, io->chains, max_pop, io->segs, io->max_segs);
    if (n == 0 && max_pop && !io->notify) {
        while (spins &&
               load16(q->avail + WORD_IDX) == q->avail_next) { /* no order needed: the pop acquires */
            spins--;
            cpu_relax();
        }
        if (spins)
            n = pop(q, io->chains, max_pop, io->segs, io->max_segs);
    }
    if (n <= 0)
        return n;
    for (int i = 0; i < n; i++)
        heads[i] = chains[i].head;
    memset(io->lens, 0, (size_t)n * sizeof(*io->lens));
    io->n_chains = (uint32_t)n;
    io->n_segs = io->chains[n - 1].first_seg + io->chains[n - 1].n_segs;
    return n;
}

/* ---- kicks ---- */

int vq_device_enable_notify(struct vq_device *q)
{
    int ready = unusable(q);

    if (ready)
        return ready;
    if (q->pending)
        return q->error = q->pending;
    if (q->flags & VQ_F_EVENT_IDX)
        store16(avail_event(q), q->avail_next);
    else
        store16(q->used + WORD_FLAGS, 0);
    /* Pairs with the full barrier in vq_driver_publish: it writes avail idx, then reads the event or flag.
     * Then look at the real index: what was published before our store kicks nobody. */
    full_barrier();
    ready = fetch_avail(q);
    if (ready < 0)
        return q->error = ready;
    return ready != 0;
}

int vq_device_disable_notify(struct vq_device *q)
{
    int err = unusable(q);

    if (err)
        return err;
    if (q->flags & VQ_F_EVENT_IDX)
        store16(avail_event(q), (uint16_t)(q->avail_next - 1)); /* just passed: 65535 buffers away */
    else
        store16(q->used + WORD_FLAGS, VRING_USED_F_NO_NOTIFY);
    return 0;
}
