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

COUNTS_BITS int64_t dirty_set(uint64_t *map, uint64_t first, uint64_t n)
{
    const uint64_t end = first + n;
    int64_t set = 0;
    while (first < end) {
        const uint64_t stop = (first | (WORD_BITS - 1)) + 1 < end ? (first | (WORD_BITS - 1)) + 1 : end;
        const uint64_t bits = mask(first % WORD_BITS, stop - (first & ~(uint64_t)(WORD_BITS - 1)));
        set += __builtin_popcountll(bits & ~map[first / WORD_BITS]);
        map[first / WORD_BITS] |= bits;
        first = stop;
    }
    return set;
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

/* The pages wholly inside bytes [addr, addr + len); rounded inwards, since a page of which only a part was
 * hinted must be sent. */
static struct dirty_run whole_pages(uint64_t addr, uint64_t len)
{
    const uint64_t end = (addr + len < addr ? UINT64_MAX : addr + len) / DIRTY_PAGE_SIZE;
    const uint64_t first = addr / DIRTY_PAGE_SIZE + (addr % DIRTY_PAGE_SIZE != 0);
    return (struct dirty_run){first, first < end ? end - first : 0, 0};
}

/* The pages that bytes [addr, addr + len) touch. */
static struct dirty_run touched_pages(uint64_t addr, uint64_t len)
{
    const uint64_t first = addr / DIRTY_PAGE_SIZE;
    if (!len)
        return (struct dirty_run){first, 0, 0};
    const uint64_t last = (addr + len - 1 < addr ? UINT64_MAX : addr + len - 1) / DIRTY_PAGE_SIZE;
    return (struct dirty_run){first, last - first + 1, 0};
}

/* The first run that ends after a page, `count` if none does. */
static uint64_t run_of(const struct dirty_layout *layout, uint64_t page)
{
    uint64_t low = 0, high = layout->count;
    while (low < high) {
        const uint64_t middle = low + (high - low) / 2;
        if (layout->run[middle].first + layout->run[middle].pages <= page)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Cut the next part that exists off the front of `want`; *slot is its first bit. Returns its pages, 0 when
 * there is no more. `at` is the run looked at last: most requests lie in one run, and in the same as the one
 * before. */
static inline uint64_t next_part(const struct dirty_layout *layout, uint64_t *at, struct dirty_run *want,
                                 uint64_t *slot)
{
    if (!want->pages)
        return 0;
    if (*at >= layout->count || want->first - layout->run[*at].first >= layout->run[*at].pages) {
        *at = run_of(layout, want->first);
        if (*at >= layout->count)
            return 0;
    }
    const struct dirty_run *run = &layout->run[*at];
    const uint64_t before = run->first > want->first ? run->first - want->first : 0; /* pages of a hole */
    if (before >= want->pages)
        return 0;
    const uint64_t skip = want->first + before - run->first, room = run->pages - skip;
    const uint64_t pages = want->pages - before < room ? want->pages - before : room;
    *slot = run->slot + skip;
    want->first += before + pages;
    want->pages -= before + pages;
    return pages;
}

int64_t dirty_clear_ranges(uint64_t *map, const struct dirty_layout *layout, const uint64_t *addr,
                           const uint64_t *len, uint64_t count)
{
    int64_t cleared = 0;
    uint64_t at = 0, slot, n;
    for (uint64_t i = 0; i < count; i++) {
        struct dirty_run want = whole_pages(addr[i], len[i]);
        while ((n = next_part(layout, &at, &want, &slot)))
            cleared += dirty_clear(map, slot, n);
    }
    return cleared;
}

int64_t dirty_set_ranges(uint64_t *map, const struct dirty_layout *layout, const uint64_t *addr,
                         const uint64_t *len, uint64_t count)
{
    int64_t set = 0;
    uint64_t at = 0, slot, n;
    for (uint64_t i = 0; i < count; i++) {
        struct dirty_run want = whole_pages(addr[i], len[i]);
        while ((n = next_part(layout, &at, &want, &slot)))
            set += dirty_set(map, slot, n);
    }
    return set;
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

void dirty_log_mark_ranges(uint64_t *log, const struct dirty_layout *layout, const uint64_t *addr,
                           const uint64_t *len, uint64_t count)
{
    uint64_t at = 0, slot, n;
    for (uint64_t i = 0; i < count; i++) {
        struct dirty_run want = touched_pages(addr[i], len[i]);
        while ((n = next_part(layout, &at, &want, &slot)))
            dirty_log_mark(log, slot, n);
    }
}

COUNTS_BITS int64_t dirty_log_fetch(uint64_t *log, uint64_t *into, uint64_t pages)
{
    int64_t moved = 0;
    for (uint64_t w = 0; w * WORD_BITS < pages; w++) {
        const uint64_t here =
            pages - w * WORD_BITS; /* what others set past the last page counts for nothing */
        if (!__atomic_load_n(&log[w], __ATOMIC_RELAXED))
            continue;
        /* Fetch and clear in one step: a mark between the two would be lost. Acquire pairs with
         * dirty_log_mark. */
        const uint64_t bits =
            __atomic_exchange_n(&log[w], 0, __ATOMIC_ACQUIRE) & mask(0, here < WORD_BITS ? here : WORD_BITS);
        moved += __builtin_popcountll(bits);
        into[w] |= bits;
    }
    return moved;
}
