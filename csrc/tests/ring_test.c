/* The split ring without Python, for the sanitizers: ordinary traffic through both halves, then random
 * hostile rings.
 *
 * ring_test [SEED [SECONDS]]. Exit 0, or 1 with a line that names the seed.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "vring/vring.h"

enum { SIZE = 16, REGION = 0x4000 };

static uint64_t seed, random_state;

static uint64_t rnd(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static uint32_t below(uint32_t n)
{
    return (uint32_t)(rnd() >> 33) % n;
}

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s (seed %llu)\n", __FILE__, __LINE__, #condition,                       \
                    (unsigned long long)seed);                                                               \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

/* Two regions that touch and one apart, each an allocation of its own so that one byte too far is caught. */
struct guest {
    struct vq_memory mem;
    struct vq_ring ring;
    uint64_t state, indirect;
};

static void guest_open(struct guest *g, uint32_t flags)
{
    static const uint64_t at[] = {0, REGION, 0x100000};

    memset(g, 0, sizeof(*g));
    g->mem.count = 3;
    for (int i = 0; i < 3; i++) {
        g->mem.region[i].gpa = at[i];
        g->mem.region[i].size = REGION;
        g->mem.region[i].host = aligned_alloc(64, REGION);
        CHECK(g->mem.region[i].host);
        memset(g->mem.region[i].host, 0, REGION);
    }
    g->ring.size = SIZE;
    g->ring.flags = flags;
    /* Each part ends where its region ends, or nearly. */
    g->ring.desc = REGION - SIZE * 16;
    g->ring.avail = REGION + REGION - vq_avail_bytes(SIZE);
    g->ring.used = 0x100000 + ((REGION - vq_used_bytes(SIZE)) & ~(uint64_t)3);
    g->state = 0;
    g->indirect = 0x100000;
}

static void guest_close(struct guest *g)
{
    for (uint32_t i = 0; i < g->mem.count; i++)
        free(g->mem.region[i].host);
}

/* A copy of the state in memory of exactly its size. */
static void *state_copy(const struct guest *g)
{
    uint64_t bytes = vq_driver_state_bytes(SIZE);
    void *copy = aligned_alloc(8, bytes);

    CHECK(copy);
    memcpy(copy, g->mem.region[0].host + g->state, bytes);
    return copy;
}

/* ---- both halves keep the rules ---- */

static void ordinary(uint32_t flags, uint16_t base)
{
    struct guest g;
    struct vq_driver driver;
    struct vq_device device;
    struct vq_device_head held[SIZE];
    struct vq_chain chains[SIZE];
    struct vq_seg segs[SIZE], got[SIZE];
    uint32_t counts[SIZE], heads[SIZE], lens[SIZE], done_lens[SIZE], n_held = 0;
    uint64_t tokens[SIZE], done[SIZE], next_token = 1, added = 0, collected = 0, sum = 0;

    guest_open(&g, flags);
    CHECK(vq_driver_init(&driver, &g.mem, &g.ring, g.indirect, 4, base, g.mem.region[0].host) == 0);
    g.ring.flags = flags & ~(uint32_t)VQ_F_LAX_LEN;
    CHECK(vq_device_init(&device, &g.mem, &g.ring, base, held) == 0);
    for (int turn = 0; turn < 20000; turn++) {
        uint32_t n = below(SIZE), at = 0, i;
        int result;

        switch (below(7)) {
        case 0: /* add */
            for (i = 0; i < n; i++) {
                counts[i] = 1 + below(4);
                if (at + counts[i] > SIZE)
                    break;
                for (uint32_t k = 0; k < counts[i]; k++, at++) {
                    segs[at].addr = REGION - 64 + below(64);
                    segs[at].len = 1 + below(128); /* often across the two regions */
                    segs[at].flags = k >= counts[i] / 2 ? VQ_SEG_WRITE : 0;
                }
                tokens[i] = next_token + i;
            }
            result = vq_driver_add(&driver, segs, counts, tokens, i);
            CHECK(result >= 0 && result <= (int)i);
            next_token += (uint64_t)result;
            added += (uint64_t)result;
            break;
        case 1:
            CHECK(vq_driver_publish(&driver) >= 0);
            break;
        case 2: /* pop */
            result = vq_device_pop(&device, chains, n, got, SIZE);
            CHECK(result >= 0 && result <= (int)n);
            for (i = 0; i < (uint32_t)result; i++) {
                CHECK(chains[i].n_segs >= 1 && chains[i].n_segs <= 4);
                heads[n_held] = chains[i].head;
                lens[n_held++] = (uint32_t)chains[i].writable;
            }
            if (result && below(4) == 0) {
                CHECK(vq_device_unpop(&device, heads + n_held - 1, 1) == 0);
                n_held--;
            }
            break;
        case 3: /* push some, from the back */
            n = n < n_held ? n : n_held;
            CHECK(vq_device_push(&device, heads + n_held - n, lens + n_held - n, n) >= 0);
            n_held -= n;
            break;
        case 4:
            result = vq_driver_collect(&driver, done, done_lens, n);
            CHECK(result >= 0);
            for (i = 0; i < (uint32_t)result; i++)
                sum += done[i];
            collected += (uint64_t)result;
            break;
        case 5:
            CHECK(vq_driver_enable_cb(&driver, n) >= 0 && vq_driver_disable_cb(&driver) == 0);
            CHECK(vq_device_enable_notify(&device) >= 0 && vq_device_disable_notify(&device) == 0);
            break;
        case 6: /* the driver's process is replaced by another one */
            CHECK(vq_driver_bind(&driver, &g.mem, g.mem.region[0].host, REGION) == 0);
            CHECK(vq_device_rebind(&device, &g.mem) == 0);
            break;
        }
        CHECK(driver.state->outstanding == added - collected);
    }
    CHECK(added > 1000);
    for (int left = vq_driver_detach(&driver, tokens, SIZE); left > 0; left--)
        sum += tokens[left - 1];
    CHECK(sum == (next_token - 1) * next_token / 2); /* every token came back once */
    guest_close(&g);
}

/* ---- one half against noise ---- */

/* Values near the borders that matter, rarely anything. */
static uint64_t odd_value(void)
{
    static const uint64_t odd[] = {0,        1,          SIZE - 1,   SIZE,       SIZE + 1,        16,
                                   32,       REGION - 1, REGION,     2 * REGION, 2 * REGION - 16, 0x100000,
                                   0x80000,  0xffff,     0xffffffff, UINT64_MAX, UINT64_MAX - 15, 0x8000,
                                   16 * SIZE};

    return below(8) ? odd[below(sizeof(odd) / sizeof(odd[0]))] + below(2) : rnd();
}

static void scribble_descs(struct vring_desc *d, uint32_t n)
{
    static const uint16_t flags[] = {0, 1, 2, 3, 4, 1, 3, 5, 6, 7, 0xfff8};

    for (uint32_t i = 0; i < n; i++) {
        d[i].addr = below(4) ? below(2) * 0x100000 + below(REGION) : odd_value();
        d[i].len = below(4) ? 16 * (1 + below(SIZE)) : (uint32_t)odd_value();
        d[i].flags = flags[below(sizeof(flags) / sizeof(flags[0]))];
        d[i].next = below(8) ? (uint16_t)below(SIZE) : (uint16_t)odd_value();
    }
}

static void hostile_driver(uint32_t flags)
{
    struct guest g;
    struct vq_device device;
    struct vq_device_head held[SIZE];
    struct vq_chain chains[SIZE];
    struct vq_seg segs[SIZE];
    uint16_t base = (uint16_t)rnd(), *avail;

    guest_open(&g, flags);
    scribble_descs((struct vring_desc *)vq_memory_at(&g.mem, g.ring.desc, 16), SIZE);
    scribble_descs((struct vring_desc *)g.mem.region[0].host, 64);
    scribble_descs((struct vring_desc *)g.mem.region[2].host, 64);
    avail = vq_memory_at(&g.mem, g.ring.avail, 2);
    avail[1] = (uint16_t)(base + below(SIZE + 1));
    for (int i = 0; i <= SIZE; i++)
        avail[2 + i] = below(8) ? (uint16_t)below(SIZE) : (uint16_t)odd_value();
    CHECK(vq_device_init(&device, &g.mem, &g.ring, base, held) == 0);
    for (int turn = 0; turn < 12; turn++) {
        uint32_t room = below(SIZE + 1);
        int n = vq_device_pop(&device, chains, below(SIZE + 1), segs, room);

        for (int i = 0; i < n; i++) {
            uint32_t len = below(4) ? 0 : (uint32_t)rnd();

            CHECK(chains[i].head < SIZE && chains[i].n_segs >= 1 && chains[i].n_segs <= room);
            for (uint32_t k = 0; k < chains[i].n_segs; k++) {
                const struct vq_seg *s = &segs[chains[i].first_seg + k];

                CHECK(s->len && vq_memory_covers(&g.mem, s->addr, s->len));
                CHECK((k < chains[i].n_readable) == !s->flags);
            }
            if (below(2))
                vq_device_push(&device, &chains[i].head, &len, 1);
        }
        if (below(4) == 0)
            avail[1] = (uint16_t)(avail[1] + (below(4) ? below(3) : rnd()));
        vq_device_enable_notify(&device);
        vq_device_disable_notify(&device);
    }
    guest_close(&g);
}

static void hostile_device(uint32_t flags)
{
    struct guest g;
    struct vq_driver driver;
    struct vq_seg segs[SIZE];
    uint32_t counts[SIZE], lens[SIZE];
    uint64_t tokens[SIZE], done[SIZE];
    uint16_t *used;
    struct vring_used_elem *elements;

    guest_open(&g, flags);
    CHECK(vq_driver_init(&driver, &g.mem, &g.ring, g.indirect, 4, (uint16_t)rnd(), g.mem.region[0].host) ==
          0);
    used = vq_memory_at(&g.mem, g.ring.used, 4);
    elements = (struct vring_used_elem *)(used + 2);
    for (int turn = 0; turn < 12; turn++) {
        uint32_t n = 1 + below(6), at = 0;
        struct vq_driver_io io = {segs, counts, tokens, done, lens, SIZE, 0, 0, 0};

        for (uint32_t i = 0; i < n; i++) {
            counts[i] = 1 + below(2);
            tokens[i] = i;
            for (uint32_t k = 0; k < counts[i]; k++, at++) {
                segs[at].addr = rnd();
                segs[at].len = 1 + below(64);
                segs[at].flags = VQ_SEG_WRITE;
            }
        }
        for (int i = 0; i < SIZE; i++) {
            elements[i].id = below(16) ? below(SIZE) : (uint32_t)odd_value();
            elements[i].len = below(16) ? below(2) : (uint32_t)odd_value();
        }
        used[0] = (uint16_t)rnd();
        used[1] = (uint16_t)(driver.state->used_next + (below(8) ? below(3) : rnd()));
        vq_driver_exchange(&driver, &io, n, below(4));
        CHECK(vq_driver_num_free(&driver) <= SIZE);
        vq_driver_enable_cb(&driver, below(8));
        vq_driver_disable_cb(&driver);
        if (below(8) == 0)
            CHECK(vq_driver_detach(&driver, tokens, SIZE) >= 0 && vq_driver_num_free(&driver) == SIZE);
    }
    guest_close(&g);
}

/* A saved state with a byte changed is refused or works, and never leads outside. */
static void damaged_state(uint32_t flags)
{
    struct guest g;
    struct vq_driver driver;
    struct vq_seg segs[4] = {{1, 1, 0}, {2, 2, 2}, {3, 3, 2}, {4, 4, 0}};
    uint32_t counts[2] = {3, 1}, lens[SIZE];
    uint64_t tokens[2] = {1, 2}, done[SIZE];
    uint64_t bytes = vq_driver_state_bytes(SIZE);
    uint8_t *copy;

    guest_open(&g, flags);
    CHECK(vq_driver_init(&driver, &g.mem, &g.ring, g.indirect, 2, 0, g.mem.region[0].host) == 0);
    CHECK(vq_driver_add(&driver, segs, counts, tokens, 2) == 2);
    copy = state_copy(&g);
    for (uint32_t i = below(4); i < 4; i++)
        copy[below((uint32_t)bytes)] = (uint8_t)odd_value();
    if (vq_driver_bind(&driver, &g.mem, copy, bytes) == 0) {
        vq_driver_publish(&driver);
        /* Bound, then damaged: still confined to its memory. */
        for (uint32_t i = below(32); i < 32; i++)
            copy[below((uint32_t)bytes)] = (uint8_t)rnd();
        vq_driver_collect(&driver, done, lens, SIZE);
        vq_driver_add(&driver, segs, counts, tokens, 2);
        vq_driver_add(&driver, segs, NULL, tokens, 2);
        vq_driver_detach(&driver, done, SIZE);
    }
    free(copy);
    guest_close(&g);
}

int main(int argc, char **argv)
{
    double seconds = argc > 2 ? atof(argv[2]) : 5;
    time_t end = time(NULL) + (time_t)seconds;
    unsigned long rounds = 0;

    seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    random_state = seed * 0x9e3779b97f4a7c15u | 1;
    for (uint32_t flags = 0; flags < 8; flags++)
        ordinary(flags, (uint16_t)(65536 - 3000 * (flags & 1)));
    do {
        for (int i = 0; i < 200; i++, rounds++) {
            uint32_t flags = below(4);

            hostile_driver(flags);
            hostile_device(flags | (below(2) ? VQ_F_LAX_LEN : 0));
            damaged_state(flags);
        }
    } while (time(NULL) < end);
    printf("ring_test: ok, seed %llu, %lu hostile rings of each kind\n", (unsigned long long)seed, rounds);
    return 0;
}
