/* Free page reporting: free blocks of the largest order taken out for a while, and put back marked as told of. */
#include "page_alloc/page_alloc_internal.h"

#define BLOCK_PAGES ((uint64_t)1 << PA_TOP_ORDER)

int64_t pa_report_take(const struct pa_view *view, uint64_t n, uint64_t *out)
{
    struct pa_zone *zone = pa_zone_of(view);
    struct pa_page *map = pa_map_of(view);
    const struct pa_free_area *area = &zone->free_area[PA_TOP_ORDER];
    uint64_t pages = zone->end_pfn - zone->base_pfn, got = 0;
    uint64_t spare = zone->free_pages > zone->watermark_min ? zone->free_pages - zone->watermark_min : 0;
    if (n > spare / BLOCK_PAGES)
        n = spare / BLOCK_PAGES;
    uint32_t at = area->head;
    for (uint64_t left = area->count; got < n && left > 0 && at != PA_NIL; left--) {
        if (at >= pages || BLOCK_PAGES > pages - at)
            return PA_ECORRUPT;
        uint32_t next = map[at].next;
        if (map[at].tag != PA_TAG_REPORTED) {
            int error = pa_list_remove(zone, map, at, PA_TOP_ORDER);
            if (error)
                return error;
            struct pa_page *page = &map[at];
            page->next = 0;
            page->prev = 0;
            page->flags = PA_F_ALLOC;
            page->owner = PA_OWNER_REPORT;
            page->tag = 0;
            zone->free_pages -= BLOCK_PAGES;
            out[got++] = zone->base_pfn + at;
        }
        at = next;
    }
    return (int64_t)got;
}

/* Index of the last block of the list, or PA_NIL; walks no further than the list says it is long. */
static uint32_t list_tail(const struct pa_zone *zone, const struct pa_page *map)
{
    const struct pa_free_area *area = &zone->free_area[PA_TOP_ORDER];
    uint64_t pages = zone->end_pfn - zone->base_pfn;
    uint32_t at = area->head, last = PA_NIL;
    for (uint64_t left = area->count; left > 0 && at < pages; left--) {
        last = at;
        at = map[at].next;
    }
    return last;
}

int pa_report_return(const struct pa_view *view, uint64_t n, const uint64_t *pfns, uint32_t reported)
{
    struct pa_zone *zone = pa_zone_of(view);
    struct pa_page *map = pa_map_of(view);
    struct pa_free_area *area = &zone->free_area[PA_TOP_ORDER];
    uint32_t tail = list_tail(zone, map);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t pfn = pfns[i];
        if (pfn < zone->base_pfn || pfn >= zone->end_pfn || zone->end_pfn - pfn < BLOCK_PAGES ||
            pfn & (BLOCK_PAGES - 1))
            return PA_EPFN;
        uint32_t at = (uint32_t)(pfn - zone->base_pfn);
        struct pa_page *page = &map[at];
        if (page->flags != PA_F_ALLOC || page->owner != PA_OWNER_REPORT || page->order != PA_TOP_ORDER)
            return PA_ENOTALLOC;
        page->flags = PA_F_FREE;
        page->owner = PA_OWNER_NONE;
        page->tag = reported ? PA_TAG_REPORTED : 0;
        page->prev = tail;
        page->next = PA_NIL;
        if (tail == PA_NIL)
            area->head = at;
        else
            map[tail].next = at;
        tail = at;
        area->count++;
        zone->free_pages += BLOCK_PAGES;
    }
    return 0;
}

int64_t pa_report_marked(const struct pa_view *view)
{
    const struct pa_zone *zone = pa_zone_of(view);
    const struct pa_page *map = pa_map_of(view);
    const struct pa_free_area *area = &zone->free_area[PA_TOP_ORDER];
    uint64_t pages = zone->end_pfn - zone->base_pfn;
    int64_t marked = 0;
    uint32_t at = area->head;
    for (uint64_t left = area->count; left > 0 && at != PA_NIL; left--) {
        if (at >= pages)
            return PA_ECORRUPT;
        marked += map[at].tag == PA_TAG_REPORTED;
        at = map[at].next;
    }
    return marked;
}
