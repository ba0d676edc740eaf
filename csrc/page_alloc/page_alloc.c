/* The buddy system: making a zone, allocating, freeing. Walks are in page_walk.c, page bytes in
 * page_content.c. */
#include <string.h>

#include "page_alloc/page_alloc_internal.h"

/* ---- free lists ---- */

static void list_push(struct pa_zone *zone, struct pa_page *map, uint32_t at, uint32_t order)
{
    struct pa_free_area *area = &zone->free_area[order];
    struct pa_page *page = &map[at];
    page->order = (uint8_t)order;
    page->flags = PA_F_FREE;
    page->owner = PA_OWNER_NONE;
    page->tag = 0;
    page->prev = PA_NIL;
    page->next = area->head;
    if (area->head <
        zone->end_pfn - zone->base_pfn) /* PA_NIL is not; neither is a damaged head, left to pa_verify */
        map[area->head].prev = at;
    area->head = at;
    area->count++;
}

/* Take a free block off its list. RAM may have come out of a migration damaged, so links are checked before
 * they are followed: a broken one is reported, never written through. */
int pa_list_remove(struct pa_zone *zone, struct pa_page *map, uint32_t at, uint32_t order)
{
    struct pa_free_area *area = &zone->free_area[order];
    struct pa_page *page = &map[at];
    uint64_t pages = zone->end_pfn - zone->base_pfn;
    uint32_t next = page->next, prev = page->prev;
    if (page->flags != PA_F_FREE || page->order != order || area->count == 0)
        return PA_ECORRUPT;
    if (next != PA_NIL && (next >= pages || map[next].prev != at))
        return PA_ECORRUPT;
    if (prev == PA_NIL ? area->head != at : (prev >= pages || map[prev].next != at))
        return PA_ECORRUPT;
    if (next != PA_NIL)
        map[next].prev = prev;
    if (prev != PA_NIL)
        map[prev].next = next;
    else
        area->head = next;
    area->count--;
    page->flags = 0;
    return 0;
}

/* ---- the zone ---- */

uint64_t pa_zone_bytes(uint64_t pages)
{
    return PA_MEM_MAP_OFFSET + pages * sizeof(struct pa_page);
}

int pa_init(const struct pa_view *view, uint64_t base_pfn, uint64_t end_pfn, uint64_t watermark_min,
            uint64_t content_seed)
{
    if (base_pfn >= end_pfn || end_pfn - base_pfn >= PA_NIL ||
        pa_zone_bytes(end_pfn - base_pfn) > view->zone_bytes)
        return PA_EINVAL;
    struct pa_zone *zone = pa_zone_of(view);
    memset(view->zone, 0, pa_zone_bytes(end_pfn - base_pfn));
    zone->magic = PA_ZONE_MAGIC;
    zone->version = PA_ZONE_VERSION;
    zone->base_pfn = base_pfn;
    zone->end_pfn = end_pfn;
    zone->mem_map = PA_MEM_MAP_OFFSET;
    zone->watermark_min = watermark_min;
    zone->content_seed = content_seed;
    for (uint32_t order = 0; order < PA_MAX_ORDER; order++)
        zone->free_area[order].head = PA_NIL;
    return 0;
}

int pa_add_range(const struct pa_view *view, uint64_t start_pfn, uint64_t end_pfn)
{
    struct pa_zone *zone = pa_zone_of(view);
    struct pa_page *map = pa_map_of(view);
    if (start_pfn >= end_pfn || start_pfn < zone->base_pfn || end_pfn > zone->end_pfn)
        return PA_EPFN;
    for (uint64_t pfn = start_pfn; pfn < end_pfn; pfn++) {
        if (pa_page_address(view, pfn) == NULL)
            return PA_EPFN;
        if (map[pfn - zone->base_pfn].flags != 0)
            return PA_EPFN;
    }
    /* From the top down: lists are last in, first out, so low addresses come out first. */
    uint64_t end = end_pfn;
    while (end > start_pfn) {
        uint32_t order = PA_TOP_ORDER;
        while (end & (((uint64_t)1 << order) - 1) || end - start_pfn < (uint64_t)1 << order)
            order--;
        end -= (uint64_t)1 << order;
        list_push(zone, map, (uint32_t)(end - zone->base_pfn), order);
    }
    zone->managed_pages += end_pfn - start_pfn;
    zone->free_pages += end_pfn - start_pfn;
    return 0;
}

int pa_attach(const struct pa_view *view)
{
    const struct pa_zone *zone = pa_zone_of(view);
    if (view->zone_bytes < PA_MEM_MAP_OFFSET || zone->magic != PA_ZONE_MAGIC ||
        zone->version != PA_ZONE_VERSION)
        return PA_VHEADER;
    if (zone->base_pfn >= zone->end_pfn || zone->end_pfn - zone->base_pfn >= PA_NIL ||
        zone->mem_map != PA_MEM_MAP_OFFSET)
        return PA_VHEADER;
    if (pa_zone_bytes(zone->end_pfn - zone->base_pfn) > view->zone_bytes)
        return PA_VHEADER;
    if (zone->free_pages > zone->managed_pages || zone->managed_pages > zone->end_pfn - zone->base_pfn)
        return PA_VHEADER;
    return 0;
}

/* ---- allocating ---- */

/* Whether fault injection makes this allocation fail. */
static int injected(struct pa_zone *zone, uint32_t order)
{
    if (order < zone->fail_min_order)
        return 0;
    if (zone->fail_next != 0) {
        zone->fail_next--;
        return 1;
    }
    if (zone->fail_every == 0)
        return 0;
    zone->fail_count++;
    if (zone->fail_count < zone->fail_every)
        return 0;
    zone->fail_count = 0;
    return 1;
}

/* Index of the block to cut from, taken off its list, with its order in *from; or an error. */
static int64_t take_block(struct pa_zone *zone, struct pa_page *map, uint32_t order, uint32_t *from)
{
    for (uint32_t k = order; k < PA_MAX_ORDER; k++) {
        uint32_t at = zone->free_area[k].head;
        if (at == PA_NIL)
            continue;
        uint64_t pages = zone->end_pfn - zone->base_pfn;
        if (at >= pages || (uint64_t)1 << k > pages - at)
            return PA_ECORRUPT;
        int error = pa_list_remove(zone, map, at, k);
        if (error)
            return error;
        *from = k;
        return at;
    }
    return PA_ENOMEM;
}

int64_t pa_alloc_bulk(const struct pa_view *view, uint32_t order, uint64_t n, uint32_t flags, uint32_t owner,
                      uint32_t tag, uint64_t *out, int *error)
{
    struct pa_zone *zone = pa_zone_of(view);
    struct pa_page *map = pa_map_of(view);
    if (order >= PA_MAX_ORDER || owner == PA_OWNER_NONE || owner >= PA_OWNER_FREE || tag >= PA_ANY)
        return PA_EINVAL;
    int failed = 0;
    uint64_t got = 0;
    while (got < n) {
        uint64_t most = n - got;
        if (zone->fail_next || zone->fail_every) {
            if (injected(zone, order)) {
                failed = PA_EINJECTED;
                break;
            }
            most = 1; /* so that every block is one attempt */
        }
        if (!(flags & PA_ATOMIC)) {
            uint64_t spare =
                zone->free_pages > zone->watermark_min ? zone->free_pages - zone->watermark_min : 0;
            if (spare >> order == 0) {
                failed = PA_EWATERMARK;
                break;
            }
            if (most > spare >> order)
                most = spare >> order;
        }
        uint32_t from = 0;
        int64_t at = take_block(zone, map, order, &from);
        if (at < 0) {
            failed = (int)at;
            break;
        }
        /* Cut as many as wanted off the low end in one go. Single allocations would come to the same: all
         * smaller lists are empty, or this block would not have been taken, so each cut leaves the next one
         * on top. */
        uint64_t take = (uint64_t)1 << (from - order);
        if (take > most)
            take = most;
        for (uint64_t i = 0; i < take; i++) {
            struct pa_page *page = &map[(uint64_t)at + (i << order)];
            page->next = 0;
            page->prev = 0;
            page->order = (uint8_t)order;
            page->flags = PA_F_ALLOC;
            page->owner = (uint8_t)owner;
            page->tag = (uint8_t)tag;
            out[got++] = zone->base_pfn + (uint64_t)at + (i << order);
        }
        uint64_t used = take << order;
        while (used < (uint64_t)1 << from) {
            uint32_t k = (uint32_t)__builtin_ctzll(used);
            list_push(zone, map, (uint32_t)((uint64_t)at + used), k);
            used += (uint64_t)1 << k;
        }
        zone->free_pages -= take << order;
    }
    zone->allocations += got;
    if (failed)
        zone->failures++;
    if (error)
        *error = failed;
    return got || !failed ? (int64_t)got : failed;
}

int64_t pa_alloc(const struct pa_view *view, uint32_t order, uint32_t flags, uint32_t owner, uint32_t tag)
{
    uint64_t pfn = 0;
    int64_t got = pa_alloc_bulk(view, order, 1, flags, owner, tag, &pfn, NULL);
    return got == 1 ? (int64_t)pfn : got;
}

/* ---- freeing ---- */

int pa_free(const struct pa_view *view, uint64_t pfn, uint32_t order)
{
    struct pa_zone *zone = pa_zone_of(view);
    struct pa_page *map = pa_map_of(view);
    uint64_t base = zone->base_pfn, end = zone->end_pfn;
    if (order >= PA_MAX_ORDER)
        return PA_EINVAL;
    if (pfn < base || pfn >= end || end - pfn < (uint64_t)1 << order || pfn & (((uint64_t)1 << order) - 1))
        return PA_EPFN;
    struct pa_page *page = &map[pfn - base];
    if (page->flags != PA_F_ALLOC)
        return PA_ENOTALLOC;
    if (page->order != order)
        return PA_EORDER;
    if (zone->poison_on)
        pa_poison_block(view, pfn, order, zone->poison_val);
    page->flags = 0;
    page->owner = PA_OWNER_NONE;
    page->tag = 0;
    zone->free_pages += (uint64_t)1 << order;
    zone->frees++;
    int error = 0;
    while (order < PA_TOP_ORDER) {
        uint64_t buddy = pfn ^ (uint64_t)1 << order;
        if (buddy < base || buddy >= end || end - buddy < (uint64_t)1 << order)
            break;
        const struct pa_page *other = &map[buddy - base];
        if (other->flags != PA_F_FREE || other->order != order)
            break;
        error = pa_list_remove(zone, map, (uint32_t)(buddy - base), order);
        if (error)
            break; /* the lists were damaged before; the block itself is freed all the same */
        pfn &= buddy;
        order++;
    }
    list_push(zone, map, (uint32_t)(pfn - base), order);
    return error;
}

int64_t pa_free_bulk(const struct pa_view *view, uint32_t order, uint64_t n, const uint64_t *pfns, int *error)
{
    *error = 0;
    for (uint64_t i = 0; i < n; i++) {
        *error = pa_free(view, pfns[i], order);
        if (*error)
            return (int64_t)i;
    }
    return (int64_t)n;
}

int64_t pa_free_owned(const struct pa_view *view, uint64_t start_pfn, uint64_t end_pfn, uint32_t owner,
                      uint32_t tag)
{
    struct pa_zone *zone = pa_zone_of(view);
    struct pa_page *map = pa_map_of(view);
    if (start_pfn < zone->base_pfn)
        start_pfn = zone->base_pfn;
    if (end_pfn > zone->end_pfn)
        end_pfn = zone->end_pfn;
    int64_t freed = 0;
    /* Page by page, for merging moves the heads of free blocks while we walk; pages inside a block have flags
     * 0. */
    for (uint64_t pfn = start_pfn; pfn < end_pfn; pfn++) {
        const struct pa_page *page = &map[pfn - zone->base_pfn];
        if (page->flags != PA_F_ALLOC || (owner != PA_ANY && page->owner != owner) ||
            (tag != PA_ANY && page->tag != tag))
            continue;
        uint32_t order = page->order;
        int error = pa_free(view, pfn, order);
        if (error)
            return error;
        freed += (int64_t)1 << order;
    }
    return freed;
}
