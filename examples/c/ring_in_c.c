/* Both halves of a split virtqueue in C, without Python: a driver offers buffers, a device fills them.
 *
 *     cc -std=c11 -Icsrc examples/c/ring_in_c.c csrc/vring/?*.c -o ring_in_c
 *
 * The memory of the "guest" is one array; in an emulator it is what the emulator has already. */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "vring/vring.h"

enum { SIZE = 8, RAM_BYTES = 0x4000, RAM_AT = 0x80000000, BUFFERS = RAM_AT + 0x2000, EACH = 16 };

static _Alignas(4096) uint8_t ram[RAM_BYTES];

static void check(int result, const char *what)
{
    if (result < 0) {
        fprintf(stderr, "%s: error %d\n", what, result);
        exit(1);
    }
}

/* Fill every writable byte of whatever is there, and give it back. Returns 1 if the driver is to be called.
 */
static int device_serve(struct vq_device *device, const struct vq_memory *mem)
{
    struct vq_chain chains[SIZE];
    struct vq_seg segs[SIZE];
    int call = 0, n;

    do {
        while ((n = vq_device_pop(device, chains, SIZE, segs, SIZE)) > 0) {
            uint32_t heads[SIZE], lens[SIZE];

            for (int i = 0; i < n; i++) {
                for (uint32_t s = chains[i].n_readable; s < chains[i].n_segs; s++) {
                    const struct vq_seg *seg = &segs[chains[i].first_seg + s];
                    memset(vq_memory_at(mem, seg->addr, seg->len), 'a' + i, seg->len);
                }
                heads[i] = chains[i].head;
                lens[i] = (uint32_t)chains[i].writable;
            }
            int due = vq_device_push(device, heads, lens, (uint32_t)n);
            check(due, "push");
            call |= due;
        }
        if (n < 0)
            return n;
    } while ((n = vq_device_enable_notify(device)) > 0); /* something came while we looked */
    return n < 0 ? n : call;
}

int main(void)
{
    struct vq_memory mem = {.count = 1, .region = {{.gpa = RAM_AT, .size = RAM_BYTES, .host = ram}}};
    struct vq_ring ring = {.size = SIZE, .flags = VQ_F_EVENT_IDX, .desc = RAM_AT};
    struct vq_device_head held[SIZE];
    struct vq_driver driver;
    struct vq_device device;
    uint64_t tokens[SIZE];
    uint32_t lens[SIZE], written = 0;

    ring.avail = ring.desc + vq_desc_bytes(SIZE);
    ring.used = (ring.avail + vq_avail_bytes(SIZE) + 63) & ~UINT64_C(63);
    void *state = aligned_alloc(64, (vq_driver_state_bytes(SIZE) + 63) & ~UINT64_C(63));
    if (!state)
        return 1;
    check(vq_driver_init(&driver, &mem, &ring, 0, 0, 0, state), "driver");
    check(vq_device_init(&device, &mem, &ring, 0, held), "device");

    /* Three buffers in one batch; publishing tells whether the device wants to be kicked. */
    struct vq_seg segs[3];
    for (int i = 0; i < 3; i++) {
        segs[i] = (struct vq_seg){.addr = BUFFERS + (uint64_t)i * EACH, .len = EACH, .flags = VQ_SEG_WRITE};
        tokens[i] = 100 + (uint64_t)i;
    }
    check(vq_driver_add(&driver, segs, NULL, tokens, 3), "add");
    int kick = vq_driver_publish(&driver);
    int call = kick ? device_serve(&device, &mem) : 0;
    check(call, "serve");
    printf("kick %d, call %d\n", kick, call);

    int n = vq_driver_collect(&driver, tokens, lens, SIZE);
    check(n, "collect");
    for (int i = 0; i < n; i++) {
        printf("token %" PRIu64 ": %.*s\n", tokens[i], (int)lens[i],
               (char *)ram + (BUFFERS - RAM_AT) + i * EACH);
        written += lens[i];
    }

    /* A driver that names memory that is not there: an error, and nothing is touched. */
    struct vq_seg bad = {.addr = 0x1000, .len = EACH, .flags = VQ_SEG_WRITE};
    check(vq_driver_add(&driver, &bad, NULL, tokens, 1), "add");
    check(vq_driver_publish(&driver), "publish");
    printf("%d buffers used, %" PRIu32 " bytes written; a bad address: error %d and the queue stops\n", n,
           written, device_serve(&device, &mem));
    free(state);
    return 0;
}
