/* The reference: a split ring as plain as can be, without checks, one buffer at a time.
 *
 * Free descriptors are linked through the shared table, as the first implementations did it; what each side
 * keeps to itself has cache lines of its own, which alone is worth a factor of two over leaving it next to
 * the ring.
 */

#include <string.h>

#include "bench/bench.h"

#define MASK (BENCH_RING_SIZE - 1)

void plain_init(struct plain_driver *driver, struct plain_device *device, uint8_t *memory, uint64_t *tokens)
{
    memset(memory, 0, BENCH_STATE);
    memset(driver, 0, sizeof(*driver));
    memset(device, 0, sizeof(*device));
    driver->desc = device->desc = (struct vring_desc *)(memory + BENCH_DESC);
    driver->avail = device->avail = (uint16_t *)(memory + BENCH_AVAIL);
    driver->used = device->used = (uint16_t *)(memory + BENCH_USED);
    driver->tokens = tokens;
    driver->num_free = BENCH_RING_SIZE;
    for (uint16_t i = 0; i < BENCH_RING_SIZE; i++)
        driver->desc[i].next = (uint16_t)(i + 1);
}

int plain_add(struct plain_driver *q, uint64_t addr, uint32_t len, uint64_t token)
{
    uint16_t head = q->free_head;
    struct vring_desc *d = &q->desc[head & MASK];

    if (!q->num_free)
        return 0;
    q->num_free--;
    d->addr = addr;
    d->len = len;
    d->flags = VRING_DESC_F_WRITE;
    q->free_head = d->next;
    q->tokens[head & MASK] = token;
    q->avail[2 + (q->avail_idx & MASK)] = head;
    q->avail_idx++;
    __atomic_store_n(&q->avail[1], q->avail_idx, __ATOMIC_RELEASE); /* pairs with the acquire in plain_use */
    return 1;
}

int plain_get(struct plain_driver *q, uint64_t *token, uint32_t *len)
{
    const struct vring_used_elem *elements = (const struct vring_used_elem *)(q->used + 2);
    uint32_t id;

    if (__atomic_load_n(&q->used[1], __ATOMIC_ACQUIRE) ==
        q->last_used) /* pairs with the release in plain_use */
        return 0;
    id = elements[q->last_used & MASK].id & MASK;
    *len = elements[q->last_used & MASK].len;
    *token = q->tokens[id];
    q->desc[id].next = q->free_head;
    q->free_head = (uint16_t)id;
    q->num_free++;
    q->last_used++;
    return 1;
}

int plain_use(struct plain_device *q, uint64_t *addr, uint32_t *len)
{
    struct vring_used_elem *elements = (struct vring_used_elem *)(q->used + 2);
    struct vring_desc *d;
    uint16_t head;

    if (__atomic_load_n(&q->avail[1], __ATOMIC_ACQUIRE) == q->used_idx)
        return 0;
    head = q->avail[2 + (q->used_idx & MASK)] & MASK;
    d = &q->desc[head];
    *addr = d->addr;
    *len = d->len;
    elements[q->used_idx & MASK].id = head;
    elements[q->used_idx & MASK].len = 0;
    q->used_idx++;
    __atomic_store_n(&q->used[1], q->used_idx, __ATOMIC_RELEASE); /* pairs with the acquire in plain_get */
    return 1;
}

void plain_poll(const uint16_t *idx, uint16_t seen, uint32_t spins)
{
    while (spins &&
           __atomic_load_n(idx, __ATOMIC_RELAXED) == seen) /* no order: whoever takes the buffer acquires */
        spins--;
}
