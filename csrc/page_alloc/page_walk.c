/* Walks over the whole zone: bitmaps, lists of blocks, and the check of every invariant. They change nothing.
 */
#include "page_alloc/page_alloc_internal.h"

static void set_bits(uint64_t *map, uint64_t first, uint64_t n)
{
    uint64_t end = first + n;
    while (first < end) {
        uint64_t bit = first % 64, run = 64 - bit;
        if (run > end - first)
            run = end - first;
        uint64_t mask = run == 64 ? ~(uint64_t)0 : (((uint64_t)1 << run) - 1) << bit;
        map[first / 64] |= mask;
        first += run;
    }
}

int64_t pa_bitmap(const struct pa_view *view, uint32_t owner, uint64_t *map_out, uint64_t words)
{
    struct pa_span span;
    int error = pa_begin(view, &span);
    if (error)
        return error;
    if (words <= (span.base + span.pages - 1) / 64)
        return PA_EINVAL;
    int64_t total = 0;
    for (uint64_t at = 0; at < span.pages;) {
        struct pa_mark mark = pa_mark_of(&span.map[at]);
        uint64_t n = pa_block_pages(&span, at, mark);
        if (n == 0)
            return PA_ECORRUPT;
        int wanted;
        if (owner == PA_OWNER_FREE)
            wanted = mark.flags == PA_F_FREE;
        else
            wanted = pa_is_owned(mark, owner == PA_OWNER_NONE ? PA_ANY : owner, PA_ANY);
        if (wanted) {
            set_bits(map_out, span.base + at, n);
            total += (int64_t)n;
        }
        at += n;
    }
    return total;
}

int64_t pa_count_owners(const struct pa_view *view, uint64_t counts[256])
{
    struct pa_span span;
    int error = pa_begin(view, &span);
    if (error)
        return error;
    int64_t blocks = 0;
    for (uint32_t i = 0; i < 256; i++)
        counts[i] = 0;
    for (uint64_t at = 0; at < span.pages;) {
        struct pa_mark mark = pa_mark_of(&span.map[at]);
        uint64_t n = pa_block_pages(&span, at, mark);
        if (n == 0)
            return PA_ECORRUPT;
        if (mark.flags) {
            counts[mark.flags == PA_F_FREE ? 0 : mark.owner] += n;
            blocks++;
        }
        at += n;
    }
    return blocks;
}

int64_t pa_owned(const struct pa_view *view, uint64_t *cursor, uint64_t scan, uint32_t owner, uint32_t tag,
                 uint64_t max, uint64_t *pfns, uint8_t *orders)
{
    struct pa_span span;
    int error = pa_begin(view, &span);
    if (error)
        return error;
    uint64_t at = *cursor > span.base ? *cursor - span.base : 0, got = 0;
    for (uint64_t seen = 0; at < span.pages && got < max && seen < scan; seen++) {
        struct pa_mark mark = pa_mark_of(&span.map[at]);
        uint64_t n = pa_block_pages(&span, at, mark);
        if (n == 0)
            return PA_ECORRUPT;
        if (pa_is_owned(mark, owner, tag)) {
            if (orders != NULL)
                orders[got] = mark.order;
            pfns[got++] = span.base + at;
        }
        at += n;
    }
    *cursor = span.base + (at < span.pages ? at : span.pages);
    return (int64_t)got;
}

/* One free list: links, marks, length. */
static int verify_list(const struct pa_span *span, uint32_t order, uint64_t *where)
{
    const struct pa_free_area *area = &span->zone->free_area[order];
    uint64_t count = pa_load64(&area->count), seen = 0;
    uint32_t at = pa_load32(&area->head), before = PA_NIL;
    if (count > span->pages >> order)
        return PA_VCOUNT;
    while (at != PA_NIL) {
        *where = span->base + (before == PA_NIL ? 0 : before);
        if (at >= span->pages)
            return PA_VLINK;
        *where = span->base + at;
        if (seen++ == count) /* longer than counted; also ends a loop */
            return PA_VCOUNT;
        struct pa_mark mark = pa_mark_of(&span->map[at]);
        if (mark.flags != PA_F_FREE || mark.order != order)
            return PA_VENTRY;
        if (pa_load32(&span->map[at].prev) != before)
            return PA_VLINK;
        before = at;
        at = pa_load32(&span->map[at].next);
    }
    return seen == count ? 0 : PA_VCOUNT;
}

/* Whether the buddy of the free block of `order` at `at` is free as well, at the same order. */
static int buddy_is_free(const struct pa_span *span, uint64_t at, uint32_t order)
{
    uint64_t size = (uint64_t)1 << order, buddy = (span->base + at) ^ size;
    if (order == PA_TOP_ORDER || !pa_holds(span, buddy, size))
        return 0;
    struct pa_mark other = pa_mark_of(&span->map[buddy - span->base]);
    return other.flags == PA_F_FREE && other.order == order;
}

/* One block of mem_map, from its first page to its last. */
static int verify_block(const struct pa_span *span, uint64_t at, struct pa_mark mark, uint64_t *where)
{
    *where = span->base + at;
    if (mark.flags == 0)
        return 0;
    if (mark.flags != PA_F_FREE && mark.flags != PA_F_ALLOC)
        return PA_VENTRY;
    uint64_t n = pa_block_pages(span, at, mark);
    if (n == 0 || (span->base + at) & (n - 1))
        return PA_VALIGN;
    if ((mark.flags == PA_F_FREE) != (mark.owner == PA_OWNER_NONE) || mark.owner == PA_OWNER_FREE)
        return PA_VOWNER;
    for (uint64_t i = 1; i < n; i++) {
        if (pa_mark_of(&span->map[at + i]).flags != 0) {
            *where = span->base + at + i;
            return PA_VOVERLAP;
        }
    }
    return mark.flags == PA_F_FREE && buddy_is_free(span, at, mark.order) ? PA_VBUDDY : 0;
}

int pa_verify(const struct pa_view *view, uint64_t *where)
{
    struct pa_span span;
    uint64_t base, end;
    *where = 0;
    int error = pa_check_header(view, &base, &end);
    if (!error && pa_begin(view, &span))
        error = PA_VHEADER;
    if (error)
        return error;
    for (uint32_t order = 0; order < PA_MAX_ORDER; order++) {
        error = verify_list(&span, order, where);
        if (error)
            return error;
    }
    /* Lists are sound chains of distinct free heads. If mem_map has as many of each order, they are the same
     * ones. */
    uint64_t free_blocks[PA_MAX_ORDER] = {0}, free_pages = 0, managed = 0;
    for (uint64_t at = 0; at < span.pages;) {
        struct pa_mark mark = pa_mark_of(&span.map[at]);
        error = verify_block(&span, at, mark, where);
        if (error)
            return error;
        uint64_t n = pa_block_pages(&span, at, mark);
        if (mark.flags)
            managed += n;
        if (mark.flags == PA_F_FREE) {
            free_blocks[mark.order]++;
            free_pages += n;
        }
        at += n;
    }
    *where = span.base;
    for (uint32_t order = 0; order < PA_MAX_ORDER; order++) {
        if (free_blocks[order] != pa_load64(&span.zone->free_area[order].count))
            return PA_VCOUNT;
    }
    return free_pages == pa_load64(&span.zone->free_pages) && managed == pa_load64(&span.zone->managed_pages)
               ? 0
               : PA_VCOUNT;
}
