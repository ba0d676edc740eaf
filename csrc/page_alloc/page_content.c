/* What is in the pages: contents that can be checked, poison, and the journal of writes. */
#include <stdatomic.h>
#include <string.h>

#include "page_alloc/page_alloc_internal.h"

#define WORDS (PA_PAGE_SIZE / 8)
#define BATCH 32 /* pages between two fences */

/* ---- one page ---- */

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t page_key(uint64_t seed, uint64_t pfn, uint32_t version)
{
    return mix(mix(seed ^ mix(pfn + 1)) + version) | 1;
}

/* Constant trip counts and no branches inside, so that the compiler makes vector code of both. */
static void fill_page(uint8_t *page, uint64_t key)
{
    uint64_t *word = (uint64_t *)(void *)page;
    for (uint64_t i = 0; i < WORDS; i++) {
        uint64_t x = key + i * PA_CONTENT_STEP;
        word[i] = x ^ x >> 29;
    }
}

static int page_differs(const uint8_t *page, uint64_t key)
{
    const uint64_t *word = (const uint64_t *)(const void *)page;
    uint64_t difference = 0;
    for (uint64_t i = 0; i < WORDS; i++) {
        uint64_t x = key + i * PA_CONTENT_STEP;
        difference |= word[i] ^ x ^ x >> 29;
    }
    return difference != 0;
}

/* ---- the journal ---- */

int pa_journal_use(struct pa_view *view, uint8_t *base, uint64_t bytes)
{
    view->journal = NULL;
    view->journal_pages = 0;
    if (base == NULL)
        return 0;
    const struct pa_journal *journal = (const struct pa_journal *)(const void *)base;
    if (bytes < PA_JOURNAL_HEADER || (uintptr_t)base & 7)
        return PA_EJOURNAL;
    uint64_t pages = pa_load64(&journal->pages);
    if (pa_load64(&journal->magic) != PA_JOURNAL_MAGIC ||
        pa_load32(&journal->version) != PA_JOURNAL_VERSION ||
        pa_load32(&journal->header_bytes) != PA_JOURNAL_HEADER || pages > (bytes - PA_JOURNAL_HEADER) / 8)
        return PA_EJOURNAL;
    for (uint32_t i = 0; i < view->region_count; i++) {
        if (view->region[i].end_pfn > pages)
            return PA_EJOURNAL;
    }
    view->journal = base;
    view->journal_pages = pages;
    return 0;
}

int pa_dirty_log_use(struct pa_view *view, uint64_t *log, uint64_t pages)
{
    view->dirty_log = NULL;
    for (uint32_t i = 0; log != NULL && i < view->region_count; i++) {
        if (view->region[i].end_pfn > pages)
            return PA_EJOURNAL;
    }
    view->dirty_log = log;
    return 0;
}

/* After the stores: who fetches the bit (acquire) sees them. */
static void mark_dirty(const struct pa_view *view, uint64_t count, const uint64_t *pfns, uint64_t pages)
{
    if (view->dirty_log == NULL)
        return;
    for (uint64_t i = 0; i < count; i++) {
        for (uint64_t pfn = pfns[i]; pfn < pfns[i] + pages; pfn++)
            atomic_fetch_or_explicit((_Atomic uint64_t *)&view->dirty_log[pfn / 64], UINT64_C(1) << pfn % 64,
                                     memory_order_release);
    }
}

static void stamp(const struct pa_view *view, uint64_t pfn, uint32_t epoch)
{
    _Atomic uint64_t *entry = (_Atomic uint64_t *)(void *)(view->journal + PA_JOURNAL_HEADER) + pfn;
    uint64_t old = atomic_load_explicit(entry, memory_order_relaxed);
    if (old == 0 || old >> 32 != epoch)
        atomic_store_explicit(entry, (uint64_t)epoch << 32 | ((uint32_t)old + 1), memory_order_release);
}

/* Acquire: pairs with the host's increment, so that what the host did before it is seen. */
static uint32_t current_epoch(const struct pa_view *view)
{
    struct pa_journal *journal = (struct pa_journal *)(void *)view->journal;
    return atomic_load_explicit((_Atomic uint32_t *)&journal->epoch, memory_order_acquire);
}

/* `count` blocks of `pages` pages each, all of them RAM. */
static void stamp_blocks(const struct pa_view *view, uint64_t count, const uint64_t *pfns, uint64_t pages)
{
    if (view->journal == NULL)
        return;
    uint32_t epoch = current_epoch(view);
    for (uint64_t i = 0; i < count; i++) {
        for (uint64_t j = 0; j < pages; j++)
            stamp(view, pfns[i] + j, epoch);
    }
}

/* The stamp comes before the stores: nobody may see content that is not in the journal yet. */
static void stamp_before(const struct pa_view *view, uint64_t count, const uint64_t *pfns, uint64_t pages)
{
    stamp_blocks(view, count, pfns, pages);
    atomic_thread_fence(memory_order_release);
}

/* The stores, then a look at the epoch. Without the full fence the load may overtake the stores: the host
 * could move the epoch, read the old content, and find the new content stamped with the old epoch. Pairs with
 * the host's fence between moving the epoch and reading pages. */
static void stamp_after(const struct pa_view *view, uint64_t count, const uint64_t *pfns, uint64_t pages)
{
    mark_dirty(view, count, pfns, pages);
    if (view->journal == NULL)
        return;
    atomic_thread_fence(memory_order_seq_cst);
    stamp_blocks(view, count, pfns, pages);
}

static int check_pages(const struct pa_view *view, uint64_t n, const uint64_t *pfns)
{
    for (uint64_t i = 0; i < n; i++) {
        if (pa_page_address(view, pfns[i]) == NULL)
            return PA_EPFN;
    }
    return 0;
}

int pa_journal_stamp(const struct pa_view *view, uint64_t n, const uint64_t *pfns)
{
    int error = check_pages(view, n, pfns);
    if (error)
        return error;
    atomic_thread_fence(memory_order_seq_cst); /* serves before and after a store alike */
    stamp_blocks(view, n, pfns, 1);
    atomic_thread_fence(memory_order_release);
    return 0;
}

/* ---- many pages ---- */

int pa_fill(const struct pa_view *view, uint64_t n, const uint64_t *pfns, uint64_t seed,
            const uint32_t *versions)
{
    for (uint64_t i = 0; i < n; i++) {
        uint8_t *page = pa_page_address(view, pfns[i]);
        if (page == NULL)
            return PA_EPFN;
        fill_page(page, page_key(seed, pfns[i], versions ? versions[i] : 0));
        mark_dirty(view, 1, &pfns[i], 1);
    }
    return 0;
}

static void check_one(const uint8_t *page, uint64_t pfn, uint64_t key, struct pa_check_result *result)
{
    result->pages++;
    if (page_differs(page, key)) {
        if (result->wrong++ == 0)
            result->first_wrong = pfn;
    }
}

int pa_check(const struct pa_view *view, uint64_t n, const uint64_t *pfns, uint64_t seed,
             const uint32_t *versions, struct pa_check_result *result)
{
    *result = (struct pa_check_result){0, 0, UINT64_MAX};
    for (uint64_t i = 0; i < n; i++) {
        const uint8_t *page = pa_page_address(view, pfns[i]);
        if (page == NULL)
            return PA_EPFN;
        check_one(page, pfns[i], page_key(seed, pfns[i], versions ? versions[i] : 0), result);
    }
    return 0;
}

/* A piece of at most BATCH pages, already known to be RAM and inside the zone. */
static void write_piece(const struct pa_view *view, const struct pa_span *span, uint64_t count,
                        const uint64_t *pfns, uint64_t pages, uint32_t bump)
{
    const uint64_t seed = pa_load64(&span->zone->content_seed);
    stamp_before(view, count, pfns, pages);
    for (uint64_t i = 0; i < count; i++) {
        for (uint64_t pfn = pfns[i]; pfn < pfns[i] + pages; pfn++) {
            struct pa_page *page = &span->map[pfn - span->base];
            uint32_t version = pa_load32(&page->version) + bump;
            page->version = version;
            fill_page(pa_page_address(view, pfn), page_key(seed, pfn, version));
        }
    }
    stamp_after(view, count, pfns, pages);
}

int64_t pa_write(const struct pa_view *view, uint32_t order, uint64_t n, const uint64_t *pfns, uint32_t bump)
{
    struct pa_span span;
    int error = pa_begin(view, &span);
    if (error)
        return error;
    if (order >= PA_MAX_ORDER)
        return PA_EINVAL;
    uint64_t pages = (uint64_t)1 << order;
    for (uint64_t i = 0; i < n; i++) {
        if (!pa_holds(&span, pfns[i], pages))
            return PA_EPFN;
        for (uint64_t j = 0; j < pages; j++) {
            if (pa_page_address(view, pfns[i] + j) == NULL)
                return PA_EPFN;
        }
    }
    uint64_t step = pages < BATCH ? BATCH / pages : 1;
    uint64_t piece = pages < BATCH ? pages : BATCH; /* a large block is written in pieces */
    for (uint64_t i = 0; i < n; i += step) {
        uint64_t count = n - i < step ? n - i : step;
        for (uint64_t j = 0; j < pages; j += piece) {
            uint64_t first = pfns[i] + j;
            if (pages == piece)
                write_piece(view, &span, count, pfns + i, piece, bump);
            else
                write_piece(view, &span, 1, &first, piece, bump);
        }
    }
    return (int64_t)(n << order);
}

int pa_check_owned(const struct pa_view *view, uint64_t start_pfn, uint64_t end_pfn, uint32_t owner,
                   uint32_t tag, struct pa_check_result *result)
{
    struct pa_span span;
    int error = pa_begin(view, &span);
    *result = (struct pa_check_result){0, 0, UINT64_MAX};
    if (error)
        return error;
    const uint64_t seed = pa_load64(&span.zone->content_seed);
    if (start_pfn < span.base)
        start_pfn = span.base;
    if (end_pfn > span.base + span.pages)
        end_pfn = span.base + span.pages;
    while (start_pfn < end_pfn) {
        const struct pa_page *page = &span.map[start_pfn - span.base];
        struct pa_mark mark = pa_mark_of(page);
        uint64_t n = pa_block_pages(&span, start_pfn - span.base, mark);
        if (n == 0)
            return PA_ECORRUPT;
        if (pa_is_owned(mark, owner, tag)) {
            for (uint64_t i = 0; i < n; i++) {
                uint64_t pfn = start_pfn + i;
                const uint8_t *bytes = pa_page_address(view, pfn);
                if (bytes == NULL)
                    return PA_ECORRUPT;
                check_one(bytes, pfn, page_key(seed, pfn, pa_load32(&page[i].version)), result);
            }
        }
        start_pfn += n;
    }
    return 0;
}

void pa_poison_block(const struct pa_view *view, uint64_t pfn, uint32_t order, uint32_t value)
{
    uint64_t pages = (uint64_t)1 << order;
    uint64_t twice = (uint64_t)value << 32 | value;
    stamp_before(view, 1, &pfn, pages);
    for (uint64_t i = 0; i < pages; i++) {
        uint8_t *page = pa_page_address(view, pfn + i);
        if (page == NULL)
            continue;
        for (uint64_t j = 0; j < WORDS; j++)
            memcpy(page + j * 8, &twice, 8);
    }
    stamp_after(view, 1, &pfn, pages);
}
