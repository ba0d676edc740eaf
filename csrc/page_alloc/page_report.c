/* Free page reporting: free blocks of the largest order taken out for a while, and put back marked as told
 * of. */
#include "page_alloc/page_alloc_internal.h"

#define BLOCK_PAGES ((uint64_t)1 << PA_TOP_ORDER)

/* Length of the list, which is no longer than there is room for blocks; or PA_ECORRUPT. What walks it goes no
 * further than that, and finds PA_NIL there, or the list runs in a circle. */
static int64_t list_length(const struct pa_span *span)
{
    uint64_t count = pa_load64(&span->zone->free_area[PA_TOP_ORDER].count);
    return count <= span->pages / BLOCK_PAGES ? (int64_t)count : PA_ECORRUPT;
}

int64_t pa_report_take(const struct pa_view *view, uint64_t n, uint64_t *out)
{
    struct pa_span span;
    int error = pa_begin(view, &span);
    int64_t left = error ? error : list_length(&span);
    if (left < 0)
        return left;
    struct pa_zone *zone = span.zone;
    uint64_t free_pages = pa_load64(&zone->free_pages), kept = pa_load64(&zone->watermark_min), got = 0;
    uint64_t spare = free_pages > kept ? free_pages - kept : 0;
    if (n > spare / BLOCK_PAGES)
        n = spare / BLOCK_PAGES;
    uint32_t at = pa_load32(&zone->free_area[PA_TOP_ORDER].head);
    for (; got < n && at != PA_NIL; left--) {
        error = left == 0 || !pa_fits(&span, at, PA_TOP_ORDER) ? PA_ECORRUPT : 0;
        if (error)
            break;
        struct pa_page *page = &span.map[at];
        uint32_t next = pa_load32(&page->next);
        if (pa_mark_of(page).tag != PA_TAG_REPORTED) {
            error = pa_list_remove(&span, at, PA_TOP_ORDER);
            if (error)
                break;
            page->next = 0;
            page->prev = 0;
            page->flags = PA_F_ALLOC;
            page->owner = PA_OWNER_REPORT;
            page->tag = 0;
            free_pages -= BLOCK_PAGES;
            zone->free_pages = free_pages;
            out[got++] = span.base + at;
        }
        at = next;
    }
    return got || !error ? (int64_t)got : error;
}

/* Index of the last block of the list, or PA_NIL if it is empty; or PA_ECORRUPT. */
static int64_t list_tail(const struct pa_span *span)
{
    uint32_t at = pa_load32(&span->zone->free_area[PA_TOP_ORDER].head), last = PA_NIL;
    int64_t left = list_length(span);
    for (; left > 0 && at < span->pages; left--) {
        last = at;
        at = pa_load32(&span->map[at].next);
    }
    return left == 0 && at == PA_NIL ? (int64_t)last : PA_ECORRUPT;
}

int pa_report_return(const struct pa_view *view, uint64_t n, const uint64_t *pfns, uint32_t reported)
{
    struct pa_span span;
    int error = pa_begin(view, &span);
    int64_t tail = error ? error : list_tail(&span);
    if (tail < 0)
        return (int)tail;
    struct pa_free_area *area = &span.zone->free_area[PA_TOP_ORDER];
    for (uint64_t i = 0; i < n; i++) {
        uint64_t pfn = pfns[i];
        if (!pa_holds(&span, pfn, BLOCK_PAGES) || pfn & (BLOCK_PAGES - 1))
            return PA_EPFN;
        uint32_t at = (uint32_t)(pfn - span.base);
        struct pa_page *page = &span.map[at];
        struct pa_mark mark = pa_mark_of(page);
        if (mark.flags != PA_F_ALLOC || mark.owner != PA_OWNER_REPORT || mark.order != PA_TOP_ORDER)
            return PA_ENOTALLOC;
        page->flags = PA_F_FREE;
        page->owner = PA_OWNER_NONE;
        page->tag = reported ? PA_TAG_REPORTED : 0;
        page->prev = (uint32_t)tail;
        page->next = PA_NIL;
        if (tail == PA_NIL)
            area->head = at;
        else
            span.map[tail].next = at;
        tail = at;
        area->count++;
        span.zone->free_pages += BLOCK_PAGES;
    }
    return 0;
}

int64_t pa_report_marked(const struct pa_view *view)
{
    struct pa_span span;
    int error = pa_begin(view, &span);
    int64_t left = error ? error : list_length(&span), marked = 0;
    if (left < 0)
        return left;
    uint32_t at = pa_load32(&span.zone->free_area[PA_TOP_ORDER].head);
    for (; at != PA_NIL; left--) {
        if (left == 0 || at >= span.pages)
            return PA_ECORRUPT;
        marked += pa_mark_of(&span.map[at]).tag == PA_TAG_REPORTED;
        at = pa_load32(&span.map[at].next);
    }
    return left == 0 ? marked : PA_ECORRUPT;
}
