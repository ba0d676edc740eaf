/* What both halves share: access to memory the other side writes at the same time, and index arithmetic.
 *
 * Shared memory is touched only through these helpers: each call is exactly one access, so that a value that
 * was checked is the value that is used. Byte order is little-endian, as VIRTIO 1.x wants it.
 */
#ifndef VIRTIO_BALLOON_VRING_INTERNAL_H
#define VIRTIO_BALLOON_VRING_INTERNAL_H

#include <string.h>

#include "vring/vring.h"

/* Which region holds an address; VQ_MAX_REGIONS if none does. */
uint32_t vq_memory_region(const struct vq_memory *mem, uint64_t addr);

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "ring fields are little-endian and are accessed as they are"
#endif

_Static_assert(sizeof(struct vring_desc) == 16, "descriptor");
_Static_assert(sizeof(struct vring_used_elem) == 8, "used element");
_Static_assert(sizeof(struct vq_seg) == 16, "segment");
_Static_assert(sizeof(struct vq_driver_head) == 16, "driver head");
_Static_assert(sizeof(struct vq_driver_state) == 128, "driver state: part of the guest's saved memory");

typedef uint16_t __attribute__((may_alias)) shared_u16;
typedef uint32_t __attribute__((may_alias)) shared_u32;
typedef uint64_t __attribute__((may_alias)) shared_u64;

/* An aligned avail or used ring is an array of 16-bit words. */
enum { WORD_FLAGS = 0, WORD_IDX = 1, WORD_AVAIL_RING = 2, WORD_USED_RING = 2 };

static inline uint16_t load16(const uint16_t *p)
{
    return __atomic_load_n((const shared_u16 *)p, __ATOMIC_RELAXED);
}

static inline uint16_t load16_acquire(const uint16_t *p)
{
    return __atomic_load_n((const shared_u16 *)p, __ATOMIC_ACQUIRE);
}

static inline void store16(uint16_t *p, uint16_t v)
{
    __atomic_store_n((shared_u16 *)p, v, __ATOMIC_RELAXED);
}

static inline void store16_release(uint16_t *p, uint16_t v)
{
    __atomic_store_n((shared_u16 *)p, v, __ATOMIC_RELEASE);
}

static inline uint64_t load64(const void *p)
{
    return __atomic_load_n((const shared_u64 *)p, __ATOMIC_RELAXED);
}

static inline uint32_t load32(const void *p)
{
    return __atomic_load_n((const shared_u32 *)p, __ATOMIC_RELAXED);
}

static inline void store32(void *p, uint32_t v)
{
    __atomic_store_n((shared_u32 *)p, v, __ATOMIC_RELAXED);
}

static inline void store64(void *p, uint64_t v)
{
    __atomic_store_n((shared_u64 *)p, v, __ATOMIC_RELAXED);
}

/* Store what is not there already. Ring entries often come out as they were one turn ago (heads in sequence,
 * length 0); a line that is not written stays in both processors' caches. A peer that changes the entry
 * meanwhile reads its own. */
static inline void update16(uint16_t *p, uint16_t v)
{
    if (load16(p) != v)
        store16(p, v);
}

static inline void update32(void *p, uint32_t v)
{
    if (load32(p) != v)
        store32(p, v);
}

/* A full barrier: the index store before it is seen before the suppression fields after it are read, and the
 * other way round on the other side. Without it both sides may miss each other and sleep
 * (split.kick.driver-1). */
static inline void full_barrier(void)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* A descriptor as its two words, `addr` and (from the low end) len, flags, next. */
static inline struct vring_desc desc_of(uint64_t addr, uint64_t rest)
{
    struct vring_desc d = {addr, (uint32_t)rest, (uint16_t)(rest >> 32), (uint16_t)(rest >> 48)};

    return d;
}

/* Copy a descriptor of the table, which is aligned. */
static inline struct vring_desc read_desc(const struct vring_desc *p)
{
    return desc_of(load64(&p->addr), load64(&p->len));
}

/* Copy a descriptor from anywhere: an indirect table may lie at any address. Where no aligned access will do,
 * each byte is read once, and the empty asm keeps the compiler from going back for what it already has. */
static inline struct vring_desc read_desc_anywhere(const void *p)
{
    uint64_t words[2];

    if (((uintptr_t)p & 7) == 0)
        return read_desc(p);
    memcpy(words, p, sizeof(words));
    __asm__ volatile("" : "+r"(words[0]), "+r"(words[1]));
    return desc_of(words[0], words[1]);
}

/* Two neighbouring 32-bit fields of private memory at once, the first in the low half. */
static inline uint64_t read_pair(const uint32_t *p)
{
    uint64_t v;

    memcpy(&v, p, 8);
    return v;
}

static inline void write_pair(uint32_t *p, uint64_t v)
{
    memcpy(p, &v, 8);
}

static inline void write_desc(struct vring_desc *p, uint64_t addr, uint32_t len, uint16_t flags,
                              uint16_t next)
{
    store64(&p->addr, addr);
    store64(&p->len, (uint64_t)len | (uint64_t)flags << 32 | (uint64_t)next << 48);
}

/* Change a figure of a driver's queue: the binding's is the one that counts, the state's is for whoever binds
 * to it next. */
#define vq_keep(q, field, value) ((q)->state->field = (q)->field = (value))

/* Whether moving an index from old to new passes `event`, modulo 65536 (ring.eventidx-1). */
static inline int need_event(uint16_t event, uint16_t now, uint16_t old)
{
    return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("" ::: "memory");
#endif
}

/* Where the driver says which used index it wants to hear of, and the device which avail index. */
static inline uint16_t *driver_used_event(const struct vq_driver *q)
{
    return q->avail + WORD_AVAIL_RING + q->mask + 1;
}

static inline uint16_t *driver_avail_event(const struct vq_driver *q)
{
    return q->used + WORD_USED_RING + 4 * ((size_t)q->mask + 1);
}

/* The three parts of a ring in this process. */
struct vq_parts {
    struct vring_desc *desc;
    uint16_t *avail;
    uint16_t *used;
};

/* Check a ring and find it in memory. Returns 0, VQ_ESIZE, VQ_EALIGN or VQ_ERANGE_RING. */
int vq_parts_find(struct vq_parts *parts, const struct vq_memory *mem, const struct vq_ring *ring);

#endif
