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
    const struct pa_zone *zone = pa_zone_of(view);
    const struct pa_page *map = pa_map_of(view);
    uint64_t pages = zone->end_pfn - zone->base_pfn;
    if (words < (zone->end_pfn + 63) / 64)
        return PA_EINVAL;
    int64_t total = 0;
    for (uint64_t at = 0; at < pages;) {
        uint64_t n = pa_block_pages(zone, map, at);
        if (n == 0)
            return PA_ECORRUPT;
        const struct pa_page *page = &map[at];
        int wanted;
        if (owner == PA_OWNER_FREE)
            wanted = page->flags == PA_F_FREE;
        else
            wanted = page->flags == PA_F_ALLOC && (owner == PA_OWNER_NONE || page->owner == owner);
        if (wanted) {
            set_bits(map_out, zone->base_pfn + at, n);
            total += (int64_t)n;
        }
        at += n;
    }
    return total;
}

int64_t pa_count_owners(const struct pa_view *view, uint64_t counts[256])
{
    const struct pa_zone *zone = pa_zone_of(view);
    const struct pa_page *map = pa_map_of(view);
    uint64_t pages = zone->end_pfn - zone->base_pfn;
    int64_t blocks = 0;
    for (uint32_t i = 0; i < 256; i++)
        counts[i] = 0;
    for (uint64_t at = 0; at < pages;) {
        uint64_t n = pa_block_pages(zone, map, at);
        if (n == 0)
            return PA_ECORRUPT;
        if (map[at].flags) {
            counts[map[at].flags == PA_F_FREE ? 0 : map[at].owner] += n;
            blocks++;
        }
        at += n;
    }
    return blocks;
}

int64_t pa_owned(const struct pa_view *view, uint64_t *cursor, uint64_t scan, uint32_t owner, uint32_t tag,
                 uint64_t max, uint64_t *pfns, uint8_t *orders)
{
    const struct pa_zone *zone = pa_zone_of(view);
    const struct pa_page *map = pa_map_of(view);
    uint64_t at = *cursor > zone->base_pfn ? *cursor - zone->base_pfn : 0;
    uint64_t pages = zone->end_pfn - zone->base_pfn, got = 0;
    for (uint64_t seen = 0; at < pages && got < max && seen < scan; seen++) {
        uint64_t n = pa_block_pages(zone, map, at);
        if (n == 0)
            return PA_ECORRUPT;
        const struct pa_page *page = &map[at];
        if (page->flags == PA_F_ALLOC && (owner == PA_ANY || page->owner == owner) &&
            (tag == PA_ANY || page->tag == tag)) {
            if (orders != NULL)
                orders[got] = page->order;
            pfns[got++] = zone->base_pfn + at;
        }
        at += n;
    }
    *cursor = zone->base_pfn + (at < pages ? at : pages);
    return (int64_t)got;
}

/* One free list: links, marks, length. */
static int verify_list(const struct pa_zone *zone, const struct pa_page *map, uint32_t order, uint64_t *where)
{
    const struct pa_free_area *area = &zone->free_area[order];
    uint64_t pages = zone->end_pfn - zone->base_pfn, seen = 0;
    uint32_t at = area->head, before = PA_NIL;
    while (at != PA_NIL) {
        *where = zone->base_pfn + (before == PA_NIL ? 0 : before);
        if (at >= pages)
            return PA_VLINK;
        *where = zone->base_pfn + at;
        if (seen++ == area->count) /* longer than counted; also ends a loop */
            return PA_VCOUNT;
        if (map[at].flags != PA_F_FREE || map[at].order != order)
            return PA_VENTRY;
        if (map[at].prev != before)
            return PA_VLINK;
        before = at;
        at = map[at].next;
    }
    return seen == area->count ? 0 : PA_VCOUNT;
}

/* Whether the buddy of the free block at `at` is free as well, at the same order. */
static int buddy_is_free(const struct pa_zone *zone, const struct pa_page *map, uint64_t at)
{
    if (map[at].order == PA_TOP_ORDER)
        return 0;
    uint64_t size = (uint64_t)1 << map[at].order, buddy = (zone->base_pfn + at) ^ size;
    if (buddy < zone->base_pfn || buddy >= zone->end_pfn || zone->end_pfn - buddy < size)
        return 0;
    const struct pa_page *other = &map[buddy - zone->base_pfn];
    return other->flags == PA_F_FREE && other->order == map[at].order;
}

/* One block of mem_map, from its first page to its last. */
static int verify_block(const struct pa_zone *zone, const struct pa_page *map, uint64_t at, uint64_t *where)
{
    const struct pa_page *page = &map[at];
    *where = zone->base_pfn + at;
    if (page->flags == 0)
        return 0;
    if (page->flags != PA_F_FREE && page->flags != PA_F_ALLOC)
        return PA_VENTRY;
    uint64_t n = pa_block_pages(zone, map, at);
    if (n == 0 || (zone->base_pfn + at) & (n - 1))
        return PA_VALIGN;
    if ((page->flags == PA_F_FREE) != (page->owner == PA_OWNER_NONE) || page->owner == PA_OWNER_FREE)
        return PA_VOWNER;
    for (uint64_t i = 1; i < n; i++) {
        if (map[at + i].flags != 0) {
            *where = zone->base_pfn + at + i;
            return PA_VOVERLAP;
        }
    }
    return page->flags == PA_F_FREE && buddy_is_free(zone, map, at) ? PA_VBUDDY : 0;
}

int pa_verify(const struct pa_view *view, uint64_t *where)
{
    const struct pa_zone *zone = pa_zone_of(view);
    const struct pa_page *map = pa_map_of(view);
    *where = 0;
    int error = pa_attach(view);
    if (error)
        return error;
    for (uint32_t order = 0; order < PA_MAX_ORDER; order++) {
        error = verify_list(zone, map, order, where);
        if (error)
            return error;
    }
    /* Lists are sound chains of distinct free heads. If mem_map has as many of each order, they are the same
     * ones. */
    uint64_t free_blocks[PA_MAX_ORDER] = {0}, free_pages = 0, managed = 0;
    uint64_t pages = zone->end_pfn - zone->base_pfn;
    for (uint64_t at = 0; at < pages;) {
        error = verify_block(zone, map, at, where);
        if (error)
            return error;
        uint64_t n = pa_block_pages(zone, map, at);
        if (map[at].flags)
            managed += n;
        if (map[at].flags == PA_F_FREE) {
            free_blocks[map[at].order]++;
            free_pages += n;
        }
        at += n;
    }
    *where = zone->base_pfn;
    for (uint32_t order = 0; order < PA_MAX_ORDER; order++) {
        if (free_blocks[order] != zone->free_area[order].count)
            return PA_VCOUNT;
    }
    return free_pages == zone->free_pages && managed == zone->managed_pages ? 0 : PA_VCOUNT;
}
