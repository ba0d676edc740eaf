/* Outlives memory that its owner cuts off: the table of guarded ranges and the handler of SIGBUS.
 *
 * The handler takes no lock and allocates nothing: ranges are a list that only grows, a range that is not
 * used any more is taken by the next that is. */

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "peer/peer.h"

enum { FREE, CLAIMED, GUARDED };

struct peer_range {
    struct peer_range *next; /* never changes once the range is in the list */
    _Atomic int state;
    _Atomic int lost;
    _Atomic uintptr_t start;
    _Atomic uint64_t len;
    _Atomic uint64_t page_size;
};

static struct peer_range *_Atomic ranges;
static struct sigaction before;
static _Atomic int installed;

static struct peer_range *range_of(uintptr_t address)
{
    for (struct peer_range *r = atomic_load(&ranges); r; r = r->next) {
        /* Acquire pairs with the release in peer_guard: who sees the state sees the rest. */
        if (atomic_load_explicit(&r->state, memory_order_acquire) == GUARDED && address - r->start < r->len)
            return r;
    }
    return NULL;
}

static int put_zeros(void *at, uint64_t len)
{
    int flags = MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

    return mmap(at, len, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED ? -1 : 0;
}

/* All of it at once: a page at a time, its owner could have the mapping split until the system refuses more.
 * Only where so much cannot be promised (strict overcommit), the one page. */
static int cut_off(struct peer_range *r, uintptr_t address)
{
    uintptr_t start = r->start, page = start + ((address - start) & ~(r->page_size - 1));

    atomic_store(&r->lost, 1);
    return put_zeros((void *)start, r->len) && put_zeros((void *)page, r->page_size);
}

static void pass_on(int number, siginfo_t *info, void *context)
{
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    } else if (before.sa_handler == SIG_DFL || info->si_code > 0) {
        /* The same access faults again, now with nobody to handle it; a signal that was sent is sent again.
         */
        sigaction(number, &(struct sigaction){.sa_handler = SIG_DFL}, NULL);
        if (info->si_code <= 0)
            raise(number);
    }
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    int error = errno;
    /* Only of a fault (si_code above 0) is there an address. */
    struct peer_range *r = info->si_code > 0 ? range_of((uintptr_t)info->si_addr) : NULL;

    if (!r || cut_off(r, (uintptr_t)info->si_addr))
        pass_on(number, info, context);
    errno = error;
}

int peer_guard_install(void)
{
    struct sigaction action = {.sa_flags = SA_SIGINFO | SA_ONSTACK};
    int no = 0;

    if (!atomic_compare_exchange_strong(&installed, &no, 1))
        return 0;
    action.sa_sigaction = on_sigbus;
    sigemptyset(&action.sa_mask);
    if (sigaction(SIGBUS, NULL, &before) || sigaction(SIGBUS, &action, NULL)) {
        atomic_store(&installed, 0);
        return -errno;
    }
    return 0;
}

/* Returns a range that nobody else has, in the list or new. */
static struct peer_range *claim(void)
{
    struct peer_range *r;

    for (r = atomic_load(&ranges); r; r = r->next) {
        int free_one = FREE;

        if (atomic_compare_exchange_strong(&r->state, &free_one, CLAIMED))
            return r;
    }
    r = calloc(1, sizeof(*r));
    if (!r)
        return NULL;
    atomic_init(&r->state, CLAIMED);
    r->next = atomic_load(&ranges);
    while (!atomic_compare_exchange_weak(&ranges, &r->next, r)) {
    }
    return r;
}

struct peer_range *peer_guard(void *start, uint64_t len, uint64_t page_size)
{
    struct peer_range *r = claim();

    if (!r)
        return NULL;
    r->start = (uintptr_t)start;
    r->len = len;
    r->page_size = page_size;
    r->lost = 0;
    atomic_store_explicit(&r->state, GUARDED, memory_order_release);
    return r;
}

void peer_unguard(struct peer_range *range)
{
    atomic_store_explicit(&range->state, FREE, memory_order_release);
}

int peer_lost(const struct peer_range *range)
{
    return atomic_load(&((struct peer_range *)range)->lost);
}
