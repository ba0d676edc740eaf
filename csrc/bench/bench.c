/* Drives the two rings on one thread or in two processes and takes the time. */

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "bench/bench.h"

#define MAX_BATCH BENCH_RING_SIZE
#define SPINS     2000 /* per call, between looks at the clock */

/* What the two processes tell each other besides the ring. */
struct control {
    uint32_t ready;
    uint32_t finished;
    uint64_t sum;
    int32_t error;
};

uint64_t bench_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int bench_late(struct bench_clock *clock)
{
    return ++clock->looks % 4096 == 0 && bench_now() > clock->deadline;
}

/* One side of each ring, with everything it keeps to itself. */
struct driver_side {
    struct plain_driver plain;
    struct vq_driver q;
    struct vq_driver_io io;
    struct vq_seg segs[MAX_BATCH];
    uint64_t tokens[MAX_BATCH], done_tokens[BENCH_RING_SIZE], plain_tokens[BENCH_RING_SIZE];
    uint32_t done_lens[BENCH_RING_SIZE];
    uint64_t added, done, token_sum, expect;
} __attribute__((aligned(BENCH_LINE)));

struct device_side {
    struct plain_device plain;
    struct vq_device q;
    struct vq_device_io io;
    struct vq_device_head held[BENCH_RING_SIZE];
    struct vq_chain chains[BENCH_RING_SIZE];
    struct vq_seg segs[BENCH_RING_SIZE];
    uint32_t heads[BENCH_RING_SIZE], lens[BENCH_RING_SIZE], to_push;
    uint64_t used, sum;
} __attribute__((aligned(BENCH_LINE)));

struct run {
    struct driver_side driver;
    struct device_side device;
    struct vq_memory mem;
};

/* A turn of a side returns how many buffers it moved, or an error. */

static int driver_turn(int kind, struct driver_side *s, uint32_t batch, uint64_t buffers, uint32_t spins)
{
    uint32_t n = buffers - s->added < batch ? (uint32_t)(buffers - s->added) : batch;
    int moved = 0;

    if (kind == BENCH_PLAIN) {
        uint64_t token;
        uint32_t len;

        /* As the usual test does: one in, one out, until neither goes. */
        for (uint32_t i = 0; i < batch; i++) {
            int progress = 0;

            if (s->added < buffers && plain_add(&s->plain, bench_addr(s->added), 64, s->added)) {
                s->expect += bench_addr(s->added);
                s->added++;
                progress = 1;
            }
            if (plain_get(&s->plain, &token, &len)) {
                s->token_sum += token;
                s->done++;
                progress = 1;
            }
            if (!progress)
                break;
            moved++;
        }
        if (!moved)
            plain_poll(&s->plain.used[1], s->plain.last_used, spins);
        return moved;
    }
    for (uint32_t i = 0; i < n; i++) {
        s->segs[i].addr = bench_addr(s->added + i);
        s->segs[i].len = 64;
        s->segs[i].flags = VQ_SEG_WRITE;
        s->tokens[i] = s->added + i;
    }
    moved = vq_driver_exchange(&s->q, &s->io, n, spins);
    if (moved < 0)
        return moved;
    for (uint32_t i = 0; i < s->io.n_added; i++)
        s->expect += s->segs[i].addr;
    for (int i = 0; i < moved; i++)
        s->token_sum += s->done_tokens[i];
    s->added += s->io.n_added;
    s->done += (uint64_t)moved;
    return moved + (int)s->io.n_added;
}

static int device_turn(int kind, struct device_side *s, uint32_t batch, uint32_t spins)
{
    int n = 0;

    if (kind == BENCH_PLAIN) {
        uint64_t addr;
        uint32_t len;

        while ((uint32_t)n < batch && plain_use(&s->plain, &addr, &len)) {
            s->sum += addr;
            n++;
        }
        s->used += (uint64_t)n;
        if (!n)
            plain_poll(&s->plain.avail[1], s->plain.used_idx, spins);
        return n;
    }
    n = vq_device_exchange(&s->q, &s->io, s->to_push, batch, spins);
    if (n < 0)
        return n;
    s->used += s->to_push;
    s->to_push = (uint32_t)n;
    for (int i = 0; i < n; i++)
        s->sum += s->segs[s->chains[i].first_seg].addr;
    return n;
}

static int setup(int kind, struct run *run, uint8_t *memory)
{
    struct vq_ring ring = {BENCH_RING_SIZE, VQ_F_EVENT_IDX, BENCH_DESC, BENCH_AVAIL, BENCH_USED};
    struct driver_side *d = &run->driver;
    struct device_side *v = &run->device;
    int err;

    memset(run, 0, sizeof(*run));
    run->mem.count = 1;
    run->mem.region[0].size = BENCH_BYTES;
    run->mem.region[0].host = memory;
    if (kind == BENCH_PLAIN) {
        plain_init(&d->plain, &v->plain, memory, d->plain_tokens);
        return 0;
    }
    err = vq_driver_init(&d->q, &run->mem, &ring, 0, 0, 0, memory + BENCH_STATE);
    if (err)
        return err;
    d->io.segs = d->segs;
    d->io.tokens = d->tokens;
    d->io.done_tokens = d->done_tokens;
    d->io.done_lens = d->done_lens;
    d->io.max_done = BENCH_RING_SIZE;
    v->io.chains = v->chains;
    v->io.segs = v->segs;
    v->io.heads = v->heads;
    v->io.lens = v->lens;
    v->io.max_chains = v->io.max_segs = BENCH_RING_SIZE;
    err = vq_device_init(&v->q, &run->mem, &ring, 0, v->held);
    if (err)
        return err;
    /* Both sides poll: nobody wants a kick or an interrupt, but each publish asks. */
    err = vq_driver_disable_cb(&d->q);
    return err ? err : vq_device_disable_notify(&v->q);
}

static struct run *map_run(size_t bytes, int fd)
{
    void *p =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);

    if (p == MAP_FAILED)
        return NULL;
    return p;
}

static int conclude(const struct driver_side *d, uint64_t device_sum, uint64_t start, uint64_t buffers,
                    struct bench_result *result)
{
    result->ns = (double)(bench_now() - start) / (double)buffers;
    result->done = d->done;
    result->sum = device_sum;
    result->expect = d->expect;
    /* Every token once, every address seen. */
    return device_sum == d->expect && d->token_sum == buffers * (buffers - 1) / 2 ? 0 : -EBADMSG;
}

int bench_same_thread(int kind, uint32_t batch, uint64_t buffers, struct bench_result *result)
{
    struct run *run = map_run(sizeof(*run), -1);
    uint8_t *memory = (uint8_t *)map_run(BENCH_BYTES, -1);
    int err = run && memory ? 0 : -ENOMEM;
    uint64_t start;

    if (batch == 0 || batch > MAX_BATCH || buffers == 0)
        err = -EINVAL;
    if (!err)
        err = setup(kind, run, memory);
    start = bench_now();
    while (!err && run->driver.done < buffers) {
        int moved = driver_turn(kind, &run->driver, batch, buffers, 0);
        int used = moved < 0 ? moved : device_turn(kind, &run->device, batch, 0);

        err = used < 0 ? used : 0;
    }
    if (!err)
        err = conclude(&run->driver, run->device.sum, start, buffers, result);
    if (run)
        munmap(run, sizeof(*run));
    if (memory)
        munmap(memory, BENCH_BYTES);
    return err;
}

static void pin(int cpu)
{
    cpu_set_t set;

    if (cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof(set), &set);
}

/* The child: be the device until everything was used. */
static int device_process(int kind, struct run *run, struct control *control, uint32_t batch,
                          uint64_t buffers, struct bench_clock *clock)
{
    __atomic_store_n(&control->ready, 1,
                     __ATOMIC_RELEASE); /* pairs with the parent's acquire before its first buffer */
    while (run->device.used < buffers) {
        int n = device_turn(kind, &run->device, batch, SPINS);

        if (n < 0)
            return n;
        if (n == 0 && bench_late(clock))
            return -ETIMEDOUT;
    }
    control->sum = run->device.sum;
    return 0;
}

static int driver_process(int kind, struct run *run, struct control *control, uint32_t batch,
                          uint64_t buffers, struct bench_clock *clock, uint64_t *start)
{
    while (!__atomic_load_n(&control->ready, __ATOMIC_ACQUIRE)) {
        if (bench_late(clock))
            return -ETIMEDOUT;
    }
    *start = bench_now();
    while (run->driver.done < buffers) {
        int n = driver_turn(kind, &run->driver, batch, buffers, SPINS);

        if (n < 0)
            return n;
        if (n == 0 && bench_late(clock))
            return -ETIMEDOUT;
    }
    return 0;
}

int bench_two_processes(int kind, uint32_t batch, uint64_t buffers, int driver_cpu, int device_cpu,
                        double seconds, struct bench_result *result)
{
    struct bench_clock clock = {bench_now() + (uint64_t)(seconds * 1e9), 0};
    int fd = memfd_create("bench-ring", MFD_CLOEXEC), err = 0, status;
    uint8_t *memory = NULL;
    struct run *run = map_run(sizeof(*run), -1);
    struct control *control;
    uint64_t start = 0, end_ns;
    cpu_set_t before;
    pid_t child;

    if (batch == 0 || batch > MAX_BATCH || buffers == 0)
        err = -EINVAL;
    if (!err && (fd < 0 || ftruncate(fd, BENCH_BYTES) || !run))
        err = fd < 0 ? -errno : -ENOMEM;
    if (!err && !(memory = (uint8_t *)map_run(BENCH_BYTES, fd)))
        err = -ENOMEM;
    if (!err)
        err = setup(kind, run, memory);
    if (err)
        goto out;
    control = (struct control *)(memory + BENCH_CONTROL);
    sched_getaffinity(0, sizeof(before), &before);
    child = fork();
    if (child < 0) {
        err = -errno;
        goto out;
    }
    if (child == 0) {
        /* The run's private part is a copy now; the ring is mapped anew, at another address. */
        uint8_t *mine = (uint8_t *)map_run(BENCH_BYTES, fd);

        prctl(PR_SET_PDEATHSIG, SIGKILL);
        pin(device_cpu);
        if (!mine)
            _exit(1);
        run->mem.region[0].host = mine;
        if (kind == BENCH_PLAIN) {
            run->device.plain.desc = (struct vring_desc *)(mine + BENCH_DESC);
            run->device.plain.avail = (uint16_t *)(mine + BENCH_AVAIL);
            run->device.plain.used = (uint16_t *)(mine + BENCH_USED);
        } else if (vq_device_rebind(&run->device.q, &run->mem)) {
            _exit(1);
        }
        control = (struct control *)(mine + BENCH_CONTROL);
        control->error = device_process(kind, run, control, batch, buffers, &clock);
        _exit(control->error ? 1 : 0);
    }
    pin(driver_cpu);
    err = driver_process(kind, run, control, batch, buffers, &clock, &start);
    end_ns = bench_now();
    sched_setaffinity(0, sizeof(before), &before);
    if (err)
        kill(child, SIGKILL);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    if (!err && !(WIFEXITED(status) && WEXITSTATUS(status) == 0))
        err = control->error ? control->error : -ECHILD;
    if (!err) {
        err = conclude(&run->driver, control->sum, start, buffers, result);
        result->ns = (double)(end_ns - start) / (double)buffers;
    }
out:
    if (run)
        munmap(run, sizeof(*run));
    if (memory)
        munmap(memory, BENCH_BYTES);
    if (fd >= 0)
        close(fd);
    return err;
}

/* Bounce a counter: odd values are written by the child, even ones by the parent. Returns 0 or -ETIMEDOUT. */
static int bounce(uint32_t *word, uint32_t rounds, uint32_t odd, struct bench_clock *clock)
{
    for (uint32_t i = 0; i < rounds; i++) {
        /* No data rides along, so no order is needed. */
        while (__atomic_load_n(word, __ATOMIC_RELAXED) != 2 * i + odd) {
            if (bench_late(clock))
                return -ETIMEDOUT;
        }
        __atomic_store_n(word, 2 * i + odd + 1, __ATOMIC_RELAXED);
    }
    return 0;
}

double bench_line_round_trip(uint32_t rounds, int cpu, int other_cpu, double seconds)
{
    struct bench_clock clock = {bench_now() + (uint64_t)(seconds * 1e9), 0};
    uint32_t *word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint64_t start;
    cpu_set_t before;
    pid_t child;
    int err;

    if (word == MAP_FAILED)
        return -errno;
    sched_getaffinity(0, sizeof(before), &before);
    child = fork();
    if (child < 0) {
        err = -errno;
        munmap(word, 4096);
        return err;
    }
    if (child == 0) {
        pin(other_cpu);
        _exit(bounce(word, rounds, 1, &clock) ? 1 : 0);
    }
    pin(cpu);
    bounce(word, 1, 0, &clock);
    while (__atomic_load_n(word, __ATOMIC_RELAXED) != 2 && !bench_late(&clock))
        ; /* the child runs: start the clock now */
    start = bench_now();
    err = 0;
    for (uint32_t i = 1; !err && i < rounds; i++) {
        __atomic_store_n(word, 2 * i + 1, __ATOMIC_RELAXED);
        while (!err && __atomic_load_n(word, __ATOMIC_RELAXED) != 2 * i + 2)
            err = bench_late(&clock) ? -ETIMEDOUT : 0;
    }
    seconds = (double)(bench_now() - start);
    sched_setaffinity(0, sizeof(before), &before);
    if (err)
        kill(child, SIGKILL);
    while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
        ;
    munmap(word, 4096);
    return err ? err : seconds / (rounds - 1);
}
