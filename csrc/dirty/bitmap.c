/* Page bitmaps: the private kind, and the log that writers in other threads or processes mark. */
#include "dirty/dirty.h"

#define WORD_BITS 64u

/* Bits [from, to) of one word, 0 <= from < to <= 64. */
static uint64_t mask(uint64_t from, uint64_t to)
{
    return (~UINT64_C(0) << from) & (~UINT64_C(0) >> (WORD_BITS - to));
}

/* The popcnt instruction where the machine has it: the library call is what made counting dear. The choice
 * between clones is made by the dynamic linker (an ifunc), which of the libraries here only glibc's can. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define COUNTS_BITS __attribute__((target_clones("popcnt", "default")))
#else
#define COUNTS_BITS
#endif

void dirty_set(uint64_t *map, uint64_t first, uint64_t n)
{
    const uint64_t end = first + n;
    while (first < end) {
        const uint64_t stop = (first | (WORD_BITS - 1)) + 1 < end ? (first | (WORD_BITS - 1)) + 1 : end;
        map[first / WORD_BITS] |= mask(first % WORD_BITS, stop - (first & ~(uint64_t)(WORD_BITS - 1)));
        first = stop;
    }
}

COUNTS_BITS int64_t dirty_clear(uint64_t *map, uint64_t first, uint64_t n)
{
    const uint64_t end = first + n;
    int64_t cleared = 0;
    while (first < end) {
        const uint64_t stop = (first | (WORD_BITS - 1)) + 1 < end ? (first | (WORD_BITS - 1)) + 1 : end;
        const uint64_t bits = mask(first % WORD_BITS, stop - (first & ~(uint64_t)(WORD_BITS - 1)));
        cleared += __builtin_popcountll(map[first / WORD_BITS] & bits);
        map[first / WORD_BITS] &= ~bits;
        first = stop;
    }
    return cleared;
}

COUNTS_BITS int64_t dirty_count(const uint64_t *map, uint64_t first, uint64_t n)
{
    const uint64_t end = first + n;
    int64_t count = 0;
    while (first < end) {
        const uint64_t stop = (first | (WORD_BITS - 1)) + 1 < end ? (first | (WORD_BITS - 1)) + 1 : end;
        const uint64_t bits = mask(first % WORD_BITS, stop - (first & ~(uint64_t)(WORD_BITS - 1)));
        count += __builtin_popcountll(map[first / WORD_BITS] & bits);
        first = stop;
    }
    return count;
}

/* The pages wholly inside bytes [addr, addr + len), cut to the bitmap; rounded inwards, since a page of which
 * only a part was hinted must be sent. */
static uint64_t whole_pages(uint64_t addr, uint64_t len, uint64_t pages, uint64_t *first)
{
    uint64_t end = (addr + len < addr ? UINT64_MAX : addr + len) / DIRTY_PAGE_SIZE;
    if (end > pages)
        end = pages;
    *first = addr / DIRTY_PAGE_SIZE + (addr % DIRTY_PAGE_SIZE != 0);
    return *first < end ? end - *first : 0;
}

int64_t dirty_clear_ranges(uint64_t *map, uint64_t pages, const uint64_t *addr, const uint64_t *len,
                           uint64_t count)
{
    int64_t cleared = 0;
    uint64_t first;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t n = whole_pages(addr[i], len[i], pages, &first);
        cleared += dirty_clear(map, first, n);
    }
    return cleared;
}

void dirty_set_ranges(uint64_t *map, uint64_t pages, const uint64_t *addr, const uint64_t *len,
                      uint64_t count)
{
    uint64_t first;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t n = whole_pages(addr[i], len[i], pages, &first);
        dirty_set(map, first, n);
    }
}

int64_t dirty_runs(const uint64_t *map, uint64_t first, uint64_t end, uint64_t *starts, uint64_t *lengths,
                   uint64_t max, uint64_t *resume)
{
    uint64_t found = 0, at = first;
    while (at < end && found < max) {
        uint64_t word = map[at / WORD_BITS] & (~UINT64_C(0) << at % WORD_BITS);
        if (!word) { /* nothing more in this word */
            at = (at | (WORD_BITS - 1)) + 1;
            continue;
        }
        const uint64_t start = (at & ~(uint64_t)(WORD_BITS - 1)) + (uint64_t)__builtin_ctzll(word);
        if (start >= end) {
            at = end;
            break;
        }
        at = start;
        while (at < end) { /* to the first clear bit */
            word = ~map[at / WORD_BITS] & (~UINT64_C(0) << at % WORD_BITS);
            if (word) {
                at = (at & ~(uint64_t)(WORD_BITS - 1)) + (uint64_t)__builtin_ctzll(word);
                break;
            }
            at = (at | (WORD_BITS - 1)) + 1;
        }
        if (at > end)
            at = end;
        starts[found] = start;
        lengths[found] = at - start;
        found++;
    }
    *resume = at < end ? at : end;
    return (int64_t)found;
}

void dirty_log_mark(uint64_t *log, uint64_t first, uint64_t n)
{
    const uint64_t end = first + n;
    while (first < end) {
        const uint64_t stop = (first | (WORD_BITS - 1)) + 1 < end ? (first | (WORD_BITS - 1)) + 1 : end;
        const uint64_t bits = mask(first % WORD_BITS, stop - (first & ~(uint64_t)(WORD_BITS - 1)));
        /* Release, pairs with the acquire of dirty_log_fetch: who sees the bit sees the store before it. */
        __atomic_fetch_or(&log[first / WORD_BITS], bits, __ATOMIC_RELEASE);
        first = stop;
    }
}

void dirty_log_mark_ranges(uint64_t *log, uint64_t pages, const uint64_t *addr, const uint64_t *len,
                           uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        if (!len[i])
            continue;
        const uint64_t first = addr[i] / DIRTY_PAGE_SIZE;
        uint64_t last =
            (addr[i] + len[i] - 1 < addr[i] ? UINT64_MAX : addr[i] + len[i] - 1) / DIRTY_PAGE_SIZE;
        if (last >= pages)
            last = pages - 1;
        if (first < pages)
            dirty_log_mark(log, first, last - first + 1);
    }
}

COUNTS_BITS int64_t dirty_log_fetch(uint64_t *log, uint64_t *into, uint64_t pages)
{
    int64_t moved = 0;
    for (uint64_t w = 0; w < (pages + WORD_BITS - 1) / WORD_BITS; w++) {
        if (!__atomic_load_n(&log[w], __ATOMIC_RELAXED))
            continue;
        /* Fetch and clear in one step: a mark between the two would be lost. Acquire pairs with
         * dirty_log_mark. */
        const uint64_t bits = __atomic_exchange_n(&log[w], 0, __ATOMIC_ACQUIRE);
        moved += __builtin_popcountll(bits);
        into[w] |= bits;
    }
    return moved;
}
