/* Helpers shared by the files of the page allocator; not for users. */
#ifndef VIRTIO_BALLOON_PAGE_ALLOC_INTERNAL_H
#define VIRTIO_BALLOON_PAGE_ALLOC_INTERNAL_H

#include "page_alloc/page_alloc.h"

#define PA_MEM_MAP_OFFSET 512
#define PA_TOP_ORDER      (PA_MAX_ORDER - 1)

/* ---- fields that somebody else may be writing: one load each ---- */

typedef uint32_t __attribute__((may_alias)) pa_shared_u32;
typedef uint64_t __attribute__((may_alias)) pa_shared_u64;

static inline uint32_t pa_load32(const void *p)
{
    return __atomic_load_n((const pa_shared_u32 *)p, __ATOMIC_RELAXED);
}

static inline uint64_t pa_load64(const void *p)
{
    return __atomic_load_n((const pa_shared_u64 *)p, __ATOMIC_RELAXED);
}

/* What mem_map says of a page besides its links: its last four bytes, read together. */
struct pa_mark {
    uint8_t order, flags, owner, tag;
};

_Static_assert(offsetof(struct pa_page, order) == 12 && offsetof(struct pa_page, tag) == 15, "one word");

static inline struct pa_mark pa_mark_of(const struct pa_page *page)
{
    uint32_t word = pa_load32(&page->order);
    return (struct pa_mark){(uint8_t)word, (uint8_t)(word >> 8), (uint8_t)(word >> 16),
                            (uint8_t)(word >> 24)};
}

static inline int pa_is_owned(struct pa_mark mark, uint32_t owner, uint32_t tag)
{
    return mark.flags == PA_F_ALLOC && (owner == PA_ANY || mark.owner == owner) &&
           (tag == PA_ANY || mark.tag == tag);
}

/* ---- the zone as one call sees it ---- */

struct pa_span {
    struct pa_zone *zone;
    struct pa_page *map;
    uint64_t base;  /* first page */
    uint64_t pages; /* entries of `map` */
};

/* Begin a call. PA_ECORRUPT if there is no zone yet, or its header says another place than it once did. */
static inline int pa_begin(const struct pa_view *view, struct pa_span *span)
{
    span->zone = (struct pa_zone *)(void *)view->zone;
    span->map = (struct pa_page *)(void *)(view->zone + PA_MEM_MAP_OFFSET);
    span->base = view->base_pfn;
    span->pages = view->end_pfn - view->base_pfn;
    if (span->pages == 0 || pa_load64(&span->zone->base_pfn) != view->base_pfn ||
        pa_load64(&span->zone->end_pfn) != view->end_pfn)
        return PA_ECORRUPT;
    return 0;
}

/* Whether `pages` pages from `pfn` on are all in the zone. */
static inline int pa_holds(const struct pa_span *span, uint64_t pfn, uint64_t pages)
{
    return pfn >= span->base && pfn - span->base < span->pages && pages <= span->pages - (pfn - span->base);
}

/* Where a page is mapped in this process, or NULL if it is no RAM. */
static inline uint8_t *pa_page_address(const struct pa_view *view, uint64_t pfn)
{
    for (uint32_t i = 0; i < view->region_count; i++) {
        const struct pa_region *region = &view->region[i];
        if (pfn >= region->start_pfn && pfn < region->end_pfn)
            return region->host + (pfn - region->start_pfn) * PA_PAGE_SIZE;
    }
    return NULL;
}

/* Pages of the block that starts at index `at`: its order's for a marked block, else the one reserved page.
 * 0: corrupt. */
static inline uint64_t pa_block_pages(const struct pa_span *span, uint64_t at, struct pa_mark mark)
{
    if (mark.flags == 0)
        return 1;
    if (mark.order > PA_TOP_ORDER)
        return 0;
    uint64_t pages = (uint64_t)1 << mark.order;
    return pages <= span->pages - at ? pages : 0;
}

/* Whether a free block of `order` can start at index `at`. */
static inline int pa_fits(const struct pa_span *span, uint32_t at, uint32_t order)
{
    uint64_t size = (uint64_t)1 << order;
    return at < span->pages && size <= span->pages - at && ((span->base + at) & (size - 1)) == 0;
}

/* page_alloc.c: check a header; 0 with where the zone lies, or PA_VHEADER. */
int pa_check_header(const struct pa_view *view, uint64_t *base_pfn, uint64_t *end_pfn);

/* page_alloc.c: take a free block off its list. 0, or PA_ECORRUPT with nothing changed. */
int pa_list_remove(const struct pa_span *span, uint32_t at, uint32_t order);

/* page_content.c: overwrite a block's pages with the poison value, stamping the journal around it. */
void pa_poison_block(const struct pa_view *view, uint64_t pfn, uint32_t order, uint32_t value);

#endif
