/* C entry point to the ring benchmarks, and what their files share; see bench_api.h. */
#ifndef VIRTIO_BALLOON_BENCH_H
#define VIRTIO_BALLOON_BENCH_H

#include <stddef.h>
#include <stdint.h>

#include "bench/bench_api.h"
#include "vring/vring.h"

#define BENCH_LINE 256 /* bytes kept between what different sides write: no prefetcher reaches across */

/* Guest memory of one run: ring, private state, the area buffers point into. Offsets are guest addresses. */
enum {
    BENCH_DESC = 0x0,
    BENCH_AVAIL = 0x2000,
    BENCH_USED = 0x4000,
    BENCH_STATE = 0x8000,
    BENCH_CONTROL = 0x10000,
    BENCH_DATA = 0x11000,
    BENCH_BYTES = 0x40000,
};

/* Each turn has a clock look so that a dead peer ends the run. */
struct bench_clock {
    uint64_t deadline;
    uint32_t looks;
};

uint64_t bench_now(void);
int bench_late(struct bench_clock *clock);

/* The address buffer number i has. */
static inline uint64_t bench_addr(uint64_t i)
{
    return BENCH_DATA + (i & 1023) * 64;
}

/* ---- the plain ring (plain.c) ---- */

struct plain_driver {
    struct vring_desc *desc;
    uint16_t *avail, *used;
    uint64_t *tokens; /* private, by descriptor */
    uint16_t avail_idx, last_used, num_free, free_head;
} __attribute__((aligned(BENCH_LINE)));

struct plain_device {
    struct vring_desc *desc;
    uint16_t *avail, *used;
    uint16_t used_idx;
} __attribute__((aligned(BENCH_LINE)));

void plain_init(struct plain_driver *driver, struct plain_device *device, uint8_t *memory, uint64_t *tokens);
/* Add and publish one buffer; 0 if there is no room. */
int plain_add(struct plain_driver *q, uint64_t addr, uint32_t len, uint64_t token);
/* Collect one; 0 if there is none. */
int plain_get(struct plain_driver *q, uint64_t *token, uint32_t *len);
/* Pop and push one; 0 if there is none. */
int plain_use(struct plain_device *q, uint64_t *addr, uint32_t *len);
/* Look at an index until it moves, at most `spins` times. */
void plain_poll(const uint16_t *idx, uint16_t seen, uint32_t spins);

#endif
