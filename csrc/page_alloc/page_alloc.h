/* C entry point to the page allocator: see page_alloc_api.h for the interface. */
#ifndef VIRTIO_BALLOON_PAGE_ALLOC_H
#define VIRTIO_BALLOON_PAGE_ALLOC_H

#include <stddef.h>
#include <stdint.h>

#include "page_alloc/page_alloc_api.h"

_Static_assert(sizeof(struct pa_page) == 16, "mem_map entries are 16 bytes in guest RAM");
_Static_assert(sizeof(struct pa_zone) <= 512, "mem_map starts 512 bytes after the header");
_Static_assert(sizeof(struct pa_journal) <= PA_JOURNAL_HEADER, "journal entries start after the header");

#endif
