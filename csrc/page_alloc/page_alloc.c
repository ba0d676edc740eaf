/* The buddy system: making a zone, allocating, freeing. Walks are in page_walk.c, page bytes in
 * page_content.c. */
#include <string.h>

#include "page_alloc/page_alloc_internal.h"

/* ---- free lists ---- */

static void list_push(const struct pa_span *span, uint32_t at, uint32_t order)
{
    struct pa_free_area *area = &span->zone->free_area[order];
    struct pa_page *page = &span->map[at];
    uint32_t head = pa_load32(&area->head);
    page->order = (uint8_t)order;
    page->flags = PA_F_FREE;
    page->owner = PA_OWNER_NONE;
    page->tag = 0;
    page->prev = PA_NIL;
    page->next = head;
    if (head < span->pages) /* PA_NIL is not; neither is a damaged head, left to pa_verify */
        span->map[head].prev = at;
    area->head = at;
    area->count++;
}

/* Take a free block off its list. RAM may have come out of a migration damaged, so links are checked before
 * they are followed: a broken one is reported, never written through. */
int pa_list_remove(const struct pa_span *span, uint32_t at, uint32_t order)
{
    struct pa_free_area *area = &span->zone->free_area[order];
    struct pa_page *map = span->map, *page = &map[at];
    struct pa_mark mark = pa_mark_of(page);
    uint32_t next = pa_load32(&page->next), prev = pa_load32(&page->prev);
    uint64_t count = pa_load64(&area->count);
    if (mark.flags != PA_F_FREE || mark.order != order || count == 0)
        return PA_ECORRUPT;
    if (next != PA_NIL && (next >= span->pages || pa_load32(&map[next].prev) != at))
        return PA_ECORRUPT;
    if (prev == PA_NIL ? pa_load32(&area->head) != at
                       : (prev >= span->pages || pa_load32(&map[prev].next) != at))
        return PA_ECORRUPT;
    if (next != PA_NIL)
        map[next].prev = prev;
    if (prev != PA_NIL)
        map[prev].next = next;
    else
        area->head = next;
    area->count = count - 1;
    page->flags = 0;
    return 0;
}

/* ---- the zone ---- */

uint64_t pa_zone_bytes(uint64_t pages)
{
    return PA_MEM_MAP_OFFSET + pages * sizeof(struct pa_page);
}

/* Whether a zone of these pages can be in `zone_bytes`, and behind no region's end: where journal and dirty
 * log end, too. */
static int span_ok(const struct pa_view *view, uint64_t base_pfn, uint64_t end_pfn)
{
    uint64_t last = 0;
    for (uint32_t i = 0; i < view->region_count && i < PA_MAX_REGIONS; i++) {
        if (view->region[i].end_pfn > last)
            last = view->region[i].end_pfn;
    }
    return ((uintptr_t)view->zone & 7) == 0 && base_pfn < end_pfn && end_pfn <= last &&
           end_pfn - base_pfn < PA_NIL && pa_zone_bytes(end_pfn - base_pfn) <= view->zone_bytes;
}

int pa_init(struct pa_view *view, uint64_t base_pfn, uint64_t end_pfn, uint64_t watermark_min,
            uint64_t content_seed)
{
    if (!span_ok(view, base_pfn, end_pfn))
        return PA_EINVAL;
    struct pa_zone *zone = (struct pa_zone *)(void *)view->zone;
    memset(view->zone, 0, pa_zone_bytes(end_pfn - base_pfn));
    zone->magic = PA_ZONE_MAGIC;
    zone->version = PA_ZONE_VERSION;
    zone->base_pfn = view->base_pfn = base_pfn;
    zone->end_pfn = view->end_pfn = end_pfn;
    zone->mem_map = PA_MEM_MAP_OFFSET;
    zone->watermark_min = watermark_min;
    zone->content_seed = content_seed;
    for (uint32_t order = 0; order < PA_MAX_ORDER; order++)
        zone->free_area[order].head = PA_NIL;
    return 0;
}

int pa_add_range(const struct pa_view *view, uint64_t start_pfn, uint64_t end_pfn)
{
    struct pa_span span;
    int error = pa_begin(view, &span);
    if (error)
        return error;
    if (start_pfn >= end_pfn || !pa_holds(&span, start_pfn, end_pfn - start_pfn))
        return PA_EPFN;
    for (uint64_t pfn = start_pfn; pfn < end_pfn; pfn++) {
        if (pa_page_address(view, pfn) == NULL || pa_mark_of(&span.map[pfn - span.base]).flags != 0)
            return PA_EPFN;
    }
    /* From the top down: lists are last in, first out, so low addresses come out first. */
    uint64_t end = end_pfn;
    while (end > start_pfn) {
        uint32_t order = PA_TOP_ORDER;
        while (end & (((uint64_t)1 << order) - 1) || end - start_pfn < (uint64_t)1 << order)
            order--;
        end -= (uint64_t)1 << order;
        list_push(&span, (uint32_t)(end - span.base), order);
    }
    span.zone->managed_pages += end_pfn - start_pfn;
    span.zone->free_pages += end_pfn - start_pfn;
    return 0;
}

int pa_check_header(const struct pa_view *view, uint64_t *base_pfn, uint64_t *end_pfn)
{
    const struct pa_zone *zone = (const struct pa_zone *)(const void *)view->zone;
    if (view->zone_bytes < PA_MEM_MAP_OFFSET || (uintptr_t)view->zone & 7)
        return PA_VHEADER;
    if (pa_load64(&zone->magic) != PA_ZONE_MAGIC || pa_load32(&zone->version) != PA_ZONE_VERSION ||
        pa_load64(&zone->mem_map) != PA_MEM_MAP_OFFSET)
        return PA_VHEADER;
    uint64_t base = pa_load64(&zone->base_pfn), end = pa_load64(&zone->end_pfn);
    uint64_t free_pages = pa_load64(&zone->free_pages), managed = pa_load64(&zone->managed_pages);
    if (!span_ok(view, base, end) || free_pages > managed || managed > end - base)
        return PA_VHEADER;
    *base_pfn = base;
    *end_pfn = end;
    return 0;
}

int pa_attach(struct pa_view *view)
{
    return pa_check_header(view, &view->base_pfn, &view->end_pfn);
}

/* ---- allocating ---- */

/* Whether this zone is to let allocations fail. */
static int may_inject(const struct pa_zone *zone)
{
    return pa_load32(&zone->fail_next) != 0 || pa_load32(&zone->fail_every) != 0;
}

/* Whether fault injection makes this allocation fail. */
static int injected(struct pa_zone *zone, uint32_t order)
{
    if (order < pa_load32(&zone->fail_min_order))
        return 0;
    uint32_t next = pa_load32(&zone->fail_next), every = pa_load32(&zone->fail_every);
    if (next != 0) {
        zone->fail_next = next - 1;
        return 1;
    }
    if (every == 0)
        return 0;
    uint32_t count = pa_load32(&zone->fail_count) + 1;
    zone->fail_count = count < every ? count : 0;
    return count >= every;
}

/* Index of the block to cut from, taken off its list, with its order in *from; or an error. */
static int64_t take_block(const struct pa_span *span, uint32_t order, uint32_t *from)
{
    for (uint32_t k = order; k < PA_MAX_ORDER; k++) {
        uint32_t at = pa_load32(&span->zone->free_area[k].head);
        if (at == PA_NIL)
            continue;
        if (!pa_fits(span, at, k))
            return PA_ECORRUPT;
        int error = pa_list_remove(span, at, k);
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
    struct pa_span span;
    int failed = pa_begin(view, &span);
    if (!failed &&
        (order >= PA_MAX_ORDER || owner == PA_OWNER_NONE || owner >= PA_OWNER_FREE || tag >= PA_ANY))
        failed = PA_EINVAL;
    if (failed) {
        if (error)
            *error = failed;
        return failed;
    }
    struct pa_zone *zone = span.zone;
    uint64_t got = 0;
    while (got < n) {
        uint64_t most = n - got;
        if (may_inject(zone)) {
            if (injected(zone, order)) {
                failed = PA_EINJECTED;
                break;
            }
            most = 1; /* so that every block is one attempt */
        }
        uint64_t free_pages = pa_load64(&zone->free_pages), spare = free_pages;
        if (!(flags & PA_ATOMIC)) {
            uint64_t kept = pa_load64(&zone->watermark_min);
            spare = spare > kept ? spare - kept : 0;
            if (spare >> order == 0) {
                failed = PA_EWATERMARK;
                break;
            }
        }
        if (spare >> order == 0) {
            failed = PA_ENOMEM;
            break;
        }
        if (most > spare >> order)
            most = spare >> order;
        uint32_t from = 0;
        int64_t at = take_block(&span, order, &from);
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
            struct pa_page *page = &span.map[(uint64_t)at + (i << order)];
            page->next = 0;
            page->prev = 0;
            page->order = (uint8_t)order;
            page->flags = PA_F_ALLOC;
            page->owner = (uint8_t)owner;
            page->tag = (uint8_t)tag;
            out[got++] = span.base + (uint64_t)at + (i << order);
        }
        uint64_t used = take << order;
        while (used < (uint64_t)1 << from) {
            uint32_t k = (uint32_t)__builtin_ctzll(used);
            list_push(&span, (uint32_t)((uint64_t)at + used), k);
            used += (uint64_t)1 << k;
        }
        zone->free_pages = free_pages - (take << order);
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

static int free_block(const struct pa_view *view, const struct pa_span *span, uint64_t pfn, uint32_t order)
{
    struct pa_zone *zone = span->zone;
    if (order >= PA_MAX_ORDER)
        return PA_EINVAL;
    if (!pa_holds(span, pfn, (uint64_t)1 << order) || pfn & (((uint64_t)1 << order) - 1))
        return PA_EPFN;
    struct pa_page *page = &span->map[pfn - span->base];
    struct pa_mark mark = pa_mark_of(page);
    if (mark.flags != PA_F_ALLOC)
        return PA_ENOTALLOC;
    if (mark.order != order)
        return PA_EORDER;
    if (pa_load32(&zone->poison_on))
        pa_poison_block(view, pfn, order, pa_load32(&zone->poison_val));
    page->flags = 0;
    page->owner = PA_OWNER_NONE;
    page->tag = 0;
    zone->free_pages += (uint64_t)1 << order;
    zone->frees++;
    int error = 0;
    while (order < PA_TOP_ORDER) {
        uint64_t buddy = pfn ^ (uint64_t)1 << order;
        if (!pa_holds(span, buddy, (uint64_t)1 << order))
            break;
        struct pa_mark other = pa_mark_of(&span->map[buddy - span->base]);
        if (other.flags != PA_F_FREE || other.order != order)
            break;
        error = pa_list_remove(span, (uint32_t)(buddy - span->base), order);
        if (error)
            break; /* the lists were damaged before; the block itself is freed all the same */
        pfn &= buddy;
        order++;
    }
    list_push(span, (uint32_t)(pfn - span->base), order);
    return error;
}

int pa_free(const struct pa_view *view, uint64_t pfn, uint32_t order)
{
    struct pa_span span;
    int error = pa_begin(view, &span);
    return error ? error : free_block(view, &span, pfn, order);
}

int64_t pa_free_bulk(const struct pa_view *view, uint32_t order, uint64_t n, const uint64_t *pfns, int *error)
{
    struct pa_span span;
    int failed = pa_begin(view, &span);
    uint64_t done = 0;
    while (!failed && done < n) {
        failed = free_block(view, &span, pfns[done], order);
        done += !failed;
    }
    if (error)
        *error = failed;
    return done || !failed ? (int64_t)done : failed;
}

int64_t pa_free_owned(const struct pa_view *view, uint64_t start_pfn, uint64_t end_pfn, uint32_t owner,
                      uint32_t tag)
{
    struct pa_span span;
    int error = pa_begin(view, &span);
    if (error)
        return error;
    if (start_pfn < span.base)
        start_pfn = span.base;
    if (end_pfn > span.base + span.pages)
        end_pfn = span.base + span.pages;
    int64_t freed = 0;
    /* Page by page, for merging moves the heads of free blocks while we walk; pages inside a block have flags
     * 0. */
    for (uint64_t pfn = start_pfn; pfn < end_pfn; pfn++) {
        struct pa_mark mark = pa_mark_of(&span.map[pfn - span.base]);
        if (!pa_is_owned(mark, owner, tag))
            continue;
        error = free_block(view, &span, pfn, mark.order);
        if (error)
            return PA_ECORRUPT; /* what mem_map says of the block, it does not stand by */
        freed += (int64_t)1 << mark.order;
    }
    return freed;
}
