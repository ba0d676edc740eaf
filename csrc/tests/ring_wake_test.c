/* Two threads that sleep whenever there is nothing to do: a wake-up lost between an index store and the look
 * at the other side's wish leaves both asleep. This is what the full barriers are for; only a tight loop in C
 * finds them gone.
 *
 * ring_wake_test [SEED [SECONDS]]. Exit 0, or 1 when nobody moves for two seconds.
 */

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "vring/vring.h"

enum { SIZE = 4, BYTES = 0x4000 };

static struct {
    struct vq_memory mem;
    struct vq_ring ring;
    uint64_t seconds;
    /* Doorbells: counters, each rung by one side and slept on by the other. */
    uint32_t kicks __attribute__((aligned(128)));
    uint32_t calls __attribute__((aligned(128)));
    uint32_t stop __attribute__((aligned(128)));
    uint64_t naps;
} shared;

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void ring_bell(uint32_t *bell)
{
    __atomic_fetch_add(bell, 1, __ATOMIC_RELEASE);
}

/* Sleep until the bell has rung more often than `seen`; what it has rung now. */
static uint32_t sleep_on(const uint32_t *bell, uint32_t seen, const char *who)
{
    uint64_t start = now_ns();
    uint32_t rung, looks = 0;

    while ((rung = __atomic_load_n(bell, __ATOMIC_ACQUIRE)) == seen &&
           !__atomic_load_n(&shared.stop, __ATOMIC_RELAXED)) {
        if (++looks % 1024 == 0)
            sched_yield();
        if (looks % 65536 == 0 && now_ns() - start > 2000000000u) {
            fprintf(stderr, "ring_wake_test: the %s sleeps for ever: lost wake-up\n", who);
            exit(1);
        }
    }
    return rung;
}

static void *device_thread(void *unused)
{
    struct vq_device q;
    struct vq_device_head held[SIZE];
    struct vq_chain chains[SIZE];
    struct vq_seg segs[SIZE];
    uint32_t seen = 0, len = 0;

    (void)unused;
    if (vq_device_init(&q, &shared.mem, &shared.ring, 0, held))
        exit(1);
    while (!__atomic_load_n(&shared.stop, __ATOMIC_RELAXED)) {
        uint32_t rung = __atomic_load_n(&shared.kicks, __ATOMIC_ACQUIRE);
        int n = vq_device_pop(&q, chains, SIZE, segs, SIZE);

        for (int i = 0; i < n; i++) {
            int notify = vq_device_push(&q, &chains[i].head, &len, 1);

            if (notify > 0)
                ring_bell(&shared.calls);
            n = notify < 0 ? notify : n;
        }
        if (n < 0)
            exit(1);
        if (n == 0) {
            n = vq_device_enable_notify(&q);
            if (n < 0)
                exit(1);
            seen = rung;
            if (n == 0)
                sleep_on(&shared.kicks, seen, "device");
            vq_device_disable_notify(&q);
        }
    }
    return NULL;
}

static uint64_t drive(uint64_t end)
{
    static uint64_t state[512];
    struct vq_driver q;
    struct vq_seg seg = {0x3000, 64, VQ_SEG_WRITE};
    uint64_t token = 0, back[SIZE], done = 0;
    uint32_t lens[SIZE];

    if (vq_driver_state_bytes(SIZE) > sizeof(state) ||
        vq_driver_init(&q, &shared.mem, &shared.ring, 0, 0, 0, state))
        exit(1);
    while (done % 256 || now_ns() < end) {
        uint32_t rung = __atomic_load_n(&shared.calls, __ATOMIC_ACQUIRE);
        int added = vq_driver_add(&q, &seg, NULL, &token, 1), kick = vq_driver_publish(&q);
        int n = vq_driver_collect(&q, back, lens, SIZE);

        if (added < 0 || kick < 0 || n < 0)
            exit(1);
        if (kick)
            ring_bell(&shared.kicks);
        done += (uint64_t)n;
        if (n == 0) {
            n = vq_driver_enable_cb(&q, 0);
            if (n < 0)
                exit(1);
            if (n == 0) {
                shared.naps++;
                sleep_on(&shared.calls, rung, "driver");
            }
            vq_driver_disable_cb(&q);
        }
    }
    return done;
}

int main(int argc, char **argv)
{
    double seconds = argc > 2 ? atof(argv[2]) : 5;

    for (uint32_t flags = 0; flags <= VQ_F_EVENT_IDX; flags++) {
        uint8_t *memory = aligned_alloc(4096, BYTES);
        pthread_t device;
        uint64_t done;

        if (!memory)
            return 1;
        memset(memory, 0, BYTES);
        memset(&shared, 0, sizeof(shared));
        shared.mem.count = 1;
        shared.mem.region[0] = (struct vq_region){0, BYTES, memory};
        shared.ring = (struct vq_ring){SIZE, flags, 0, 0x1000, 0x2000};
        /* The device may look before the driver has started the ring: it is all zero, so empty. */
        if (pthread_create(&device, NULL, device_thread, NULL))
            return 1;
        done = drive(now_ns() + (uint64_t)(seconds / 2 * 1e9));
        __atomic_store_n(&shared.stop, 1, __ATOMIC_RELAXED);
        pthread_join(device, NULL);
        free(memory);
        printf("ring_wake_test: ok, flags %u, %llu buffers, %llu naps of the driver\n", flags,
               (unsigned long long)done, (unsigned long long)shared.naps);
    }
    return 0;
}
