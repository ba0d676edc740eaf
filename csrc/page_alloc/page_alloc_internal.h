/* Helpers shared by the files of the page allocator; not for users. */
#ifndef VIRTIO_BALLOON_PAGE_ALLOC_INTERNAL_H
#define VIRTIO_BALLOON_PAGE_ALLOC_INTERNAL_H

#include "page_alloc/page_alloc.h"

#define PA_MEM_MAP_OFFSET 512
#define PA_TOP_ORDER      (PA_MAX_ORDER - 1)

static inline struct pa_zone *pa_zone_of(const struct pa_view *view)
{
    return (struct pa_zone *)(void *)view->zone;
}

static inline struct pa_page *pa_map_of(const struct pa_view *view)
{
    /* The offset in the header is checked by pa_attach to be this one. */
    return (struct pa_page *)(void *)(view->zone + PA_MEM_MAP_OFFSET);
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
static inline uint64_t pa_block_pages(const struct pa_zone *zone, const struct pa_page *map, uint64_t at)
{
    const struct pa_page *page = &map[at];
    if (page->flags == 0)
        return 1;
    if (page->order > PA_TOP_ORDER)
        return 0;
    uint64_t pages = (uint64_t)1 << page->order;
    return pages <= zone->end_pfn - zone->base_pfn - at ? pages : 0;
}

/* page_alloc.c: take a free block off its list. 0, or PA_ECORRUPT with nothing changed. */
int pa_list_remove(struct pa_zone *zone, struct pa_page *map, uint32_t at, uint32_t order);

/* page_content.c: overwrite a block's pages with the poison value, stamping the journal around it. */
void pa_poison_block(const struct pa_view *view, uint64_t pfn, uint32_t order, uint32_t value);

#endif
