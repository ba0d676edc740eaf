/* Memory that is cut off while it is used, by loads, stores and memcpy, in one thread and in several; faults
 * that are none of a guarded range; eventfds that are full.
 *
 * Arguments: seed, seconds (200 rounds at least).
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "peer/peer.h"

#define PAGE    4096
#define PAGES   64
#define RANGES  20
#define THREADS 4

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s (seed %u)\n", __FILE__, __LINE__, #condition, seed);                  \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

struct memory {
    int fd;
    uint8_t *at;
    struct peer_range *range;
};

static unsigned seed;
static sigjmp_buf passed_on;
static volatile int old_calls;

static void old_handler(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info, (void)context;
    old_calls++;
    siglongjmp(passed_on, 1);
}

static struct memory make(void)
{
    struct memory m = {.fd = memfd_create("ram", MFD_CLOEXEC)};

    CHECK(m.fd >= 0 && !ftruncate(m.fd, PAGES * PAGE));
    m.at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, m.fd, 0);
    CHECK(m.at != MAP_FAILED);
    memset(m.at, 0x5a, PAGES * PAGE);
    m.range = peer_guard(m.at, PAGES * PAGE, PAGE);
    CHECK(m.range && !peer_lost(m.range));
    return m;
}

static void drop(struct memory *m)
{
    peer_unguard(m->range);
    munmap(m->at, PAGES * PAGE);
    close(m->fd);
}

static void cut(const struct memory *m, int pages)
{
    CHECK(!ftruncate(m->fd, (off_t)pages * PAGE));
}

/* One access to the part that is gone. */
static void touch(uint8_t *p, int how)
{
    static uint8_t copy[PAGE];

    if (how == 0)
        CHECK(*(volatile uint8_t *)p == 0);
    else if (how == 1)
        *(volatile uint8_t *)p = 1;
    else
        memcpy(copy, p, 64);
}

static void one_round(void)
{
    struct memory m[RANGES];
    int lost[RANGES] = {0};

    for (int i = 0; i < RANGES; i++)
        m[i] = make();
    for (int n = 0; n < RANGES / 2; n++) {
        int i = rand_r(&seed) % RANGES, left = rand_r(&seed) % PAGES;

        if (lost[i])
            continue;
        cut(&m[i], left);
        CHECK(left == 0 || m[i].at[0] == 0x5a);
        CHECK(!peer_lost(m[i].range));
        touch(m[i].at + (left + rand_r(&seed) % (PAGES - left)) * PAGE, n % 3);
        lost[i] = 1;
        for (int p = 0; p < PAGES; p++) /* no fault any more, wherever */
            m[i].at[p * PAGE + 1]++;
    }
    for (int i = 0; i < RANGES; i++) {
        CHECK(peer_lost(m[i].range) == lost[i]);
        CHECK(lost[i] || m[i].at[PAGES * PAGE - 1] == 0x5a);
        drop(&m[i]);
    }
}

static void *many(void *argument)
{
    unsigned mine = *(unsigned *)argument;

    for (int n = 0; n < 200; n++) {
        struct memory m = make();
        int page = rand_r(&mine) % PAGES;

        cut(&m, page);
        touch(m.at + page * PAGE, 0);
        CHECK(peer_lost(m.range));
        drop(&m);
    }
    return NULL;
}

static void test_threads(void)
{
    pthread_t thread[THREADS];
    unsigned seeds[THREADS];

    for (int i = 0; i < THREADS; i++) {
        seeds[i] = seed + (unsigned)i;
        CHECK(!pthread_create(&thread[i], NULL, many, &seeds[i]));
    }
    for (int i = 0; i < THREADS; i++)
        CHECK(!pthread_join(thread[i], NULL));
}

/* A fault outside of all ranges, or inside one that is guarded no longer, is the old handler's. */
static void test_others_faults(void)
{
    struct memory m = make();

    cut(&m, 0);
    peer_unguard(m.range);
    old_calls = 0;
    if (!sigsetjmp(passed_on, 1))
        touch(m.at, 0);
    CHECK(old_calls == 1);
    if (!sigsetjmp(passed_on, 1))
        raise(SIGBUS); /* sent, not a fault */
    CHECK(old_calls == 2);
    munmap(m.at, PAGES * PAGE);
    close(m.fd);
}

/* How a process ends whose SIGBUS had `action` before. */
static int ends_by(void (*action)(int), int sent)
{
    int status;
    pid_t child = fork();

    CHECK(child >= 0);
    if (!child) {
        struct memory m;

        signal(SIGBUS, action);
        if (peer_guard_install())
            _exit(2);
        m = make();
        cut(&m, 0);
        touch(m.at, 0); /* guarded: lives */
        peer_unguard(m.range);
        munmap(m.at, PAGES * PAGE);
        m = make();
        peer_unguard(m.range);
        cut(&m, 0);
        if (sent)
            raise(SIGBUS);
        else
            *(volatile uint8_t *)m.at = 1;
        _exit(3);
    }
    CHECK(waitpid(child, &status, 0) == child);
    return WIFSIGNALED(status) ? WTERMSIG(status) : -WEXITSTATUS(status);
}

/* Sockets, read and written without the flag that says not to wait, and eventfds read so. */
static void fd_flags_stay(struct peer_signals *signals, int fd)
{
    int ends[2], n = 0, result;

    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
    CHECK(peer_take_signals(ends[0]) == -EAGAIN && peer_take_signals(fd) == -EAGAIN);
    CHECK(!peer_signal(signals, ends[1]) && !peer_signal(signals, ends[1]) && !peer_signal(signals, fd));
    CHECK(peer_take_signals(ends[0]) == 16 && peer_take_signals(fd) == 8);
    while (!(result = peer_signal(signals, ends[1])))
        n++;
    CHECK(result == -EAGAIN && n > 10);
    CHECK(!(fcntl(ends[1], F_GETFL) & O_NONBLOCK) && !(fcntl(fd, F_GETFL) & O_NONBLOCK));
    while (peer_take_signals(ends[0]) > 0) {
    }
    close(ends[0]);
    CHECK(peer_signal(signals, ends[1]) == -EPIPE && peer_take_signals(ends[1]) == 0);
    close(ends[1]);
}

static void test_signals(void)
{
    struct peer_signals signals;
    uint64_t value = UINT64_MAX - 1;
    int fd = eventfd(0, EFD_CLOEXEC), file = memfd_create("file", MFD_CLOEXEC), ends[2];
    struct pollfd wait = {.fd = fd, .events = POLLIN};

    CHECK(!peer_signals_open(&signals) && fd >= 0 && file >= 0 && !pipe(ends));
    CHECK(!peer_signal(&signals, fd) && !peer_signal(&signals, fd));
    CHECK(read(fd, &value, 8) == 8 && value == 2);
    value = UINT64_MAX - 1;
    CHECK(write(fd, &value, 8) == 8);
    for (int n = 0; n < 1000; n++) /* a write would wait for ever */
        CHECK(!peer_signal(&signals, fd));
    CHECK(poll(&wait, 1, 0) == 1);
    CHECK(read(fd, &value, 8) == 8 && value >= UINT64_MAX - 1);
    CHECK(poll(&wait, 1, 0) == 0);
    fd_flags_stay(&signals, fd);
    CHECK(peer_signal(&signals, file) == -EINVAL && peer_signal(&signals, ends[1]) == -EINVAL);
    CHECK(peer_signal(&signals, -1) == -EBADF);
    CHECK(!peer_signal(&signals, fd));
    peer_signals_close(&signals);
    peer_signals_close(&signals);
    close(fd), close(file), close(ends[0]), close(ends[1]);
}

int main(int argc, char **argv)
{
    struct sigaction old = {.sa_flags = SA_SIGINFO};
    time_t end = time(NULL) + (argc > 2 ? atoi(argv[2]) : 1);
    int rounds = 0;

    seed = argc > 1 ? (unsigned)atoi(argv[1]) : 1;
    test_signals();
    CHECK(ends_by(SIG_DFL, 0) == SIGBUS && ends_by(SIG_DFL, 1) == SIGBUS);
    CHECK(ends_by(SIG_IGN, 0) == SIGBUS && ends_by(SIG_IGN, 1) == -3);
    old.sa_sigaction = old_handler;
    sigaction(SIGBUS, &old, NULL);
    CHECK(!peer_guard_install() && !peer_guard_install());
    test_others_faults();
    while (rounds++ < 200 || time(NULL) < end)
        one_round();
    test_threads();
    printf("peer_test: ok, %d rounds\n", rounds);
    return 0;
}
