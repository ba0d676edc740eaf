/* Timing of rings in C: the batched halves of csrc/vring against a plain unbatched ring.
 *
 * This header is also read by cffi: no guards, inlines, attributes or shifts in macros here; bench.h includes
 * it.
 */

#define BENCH_RING_SIZE 256

/* The plain ring: one add, one publish, one pop, one push, one collect per buffer, both sides polling, no
 * kick checks; private state of each side on cache lines of its own. */
#define BENCH_PLAIN 0
/* csrc/vring with EVENT_IDX: `batch` buffers per call, every check and the notify decision included. */
#define BENCH_BATCHED 1

struct bench_result {
    double ns;       /* per buffer, there and back */
    uint64_t done;   /* buffers that came back */
    uint64_t sum;    /* of the addresses the device saw */
    uint64_t expect; /* what that sum must be */
};

/* Pass `buffers` buffers with both sides on the calling thread, taking turns of `batch`.
 * Returns 0 or a negative errno or VQ_ code. */
int bench_same_thread(int kind, uint32_t batch, uint64_t buffers, struct bench_result *result);

/* The same with the device in a forked process, over a memfd each maps for itself. The caller is the driver
 * and is pinned to driver_cpu for the time, the child to device_cpu (-1: not pinned). -ETIMEDOUT after
 * `seconds`. */
int bench_two_processes(int kind, uint32_t batch, uint64_t buffers, int driver_cpu, int device_cpu,
                        double seconds, struct bench_result *result);

/* How long one cache line takes to the other processor and back, with nothing around it, over `rounds`
 * rounds: the state of the machine that the figures of two processes hang on. Nanoseconds, or a negative
 * errno. */
double bench_line_round_trip(uint32_t rounds, int cpu, int other_cpu, double seconds);
