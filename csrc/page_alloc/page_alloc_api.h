/* The guest's page allocator: a buddy system whose whole state lives inside guest RAM.
 *
 * This header is also read by cffi: no guards, inlines, attributes or shifts in macros here; page_alloc.h
 * includes it. Nothing here allocates, blocks, keeps globals or knows Python. One thread at a time may use a
 * zone.
 *
 * Errors: what can fail returns a count, a page number or 0 when all went well, and else a negative code of
 * enum pa_error. A call for many that may stop half way returns how many it did, and the error only if it did
 * none; `*error` (may be NULL) says why there are fewer, 0 if there are not.
 *
 * Guest RAM is shared, with a host that may write anything there and after a migration that damaged it: where
 * the zone lies counts as pa_init or pa_attach found it, each field of the zone is read once, and nothing
 * read there leads outside the zone or makes a walk endless. What makes no sense is PA_ECORRUPT. Arrays that
 * are handed in are the caller's own and do not change during the call.
 *
 * A page is 4096 bytes; its number (pfn) is its guest physical address divided by 4096. The zone is a header
 * with the heads of the free lists, followed by `mem_map`, one struct pa_page for each page from base_pfn to
 * end_pfn. Links are indices into mem_map, so a zone means the same in every process that maps the RAM. The
 * bytes of free pages are never read or written (unless poisoning is on): freeing dirties mem_map and nothing
 * else.
 *
 * Policy, so that two runs agree: an allocation takes the most recently freed block of the smallest order
 * that has one; a larger block is cut from its low end; what is left of it becomes the largest possible
 * blocks. A fresh zone hands out ascending addresses. Freeing merges with free buddies at once, as far as it
 * goes.
 */

enum pa_error {
    PA_ENOMEM = -1,     /* no free block of this order or a larger one */
    PA_EWATERMARK = -2, /* there is one, but taking it would go below the watermark */
    PA_EINJECTED = -3,  /* fault injection said no */
    PA_EINVAL = -4,     /* an argument is wrong: order, owner, count, room */
    PA_EPFN = -5,       /* a page outside the zone or outside RAM, or a block not aligned to its order */
    PA_ENOTALLOC = -6, /* freeing what is not the first page of an allocated block (a double free, for one) */
    PA_EORDER = -7,    /* freeing a block with another order than it was allocated with */
    PA_ECORRUPT = -8,  /* the zone's own state makes no sense; nothing was followed outside it */
    PA_EJOURNAL = -9,  /* the journal is too small for this RAM, or none of ours */
    /* found by pa_verify */
    PA_VHEADER = -32,  /* header: magic, version, bounds */
    PA_VLINK = -33,    /* a free list's links do not match each other, or leave the zone */
    PA_VENTRY = -34,   /* a page on a free list is not marked free at that order */
    PA_VALIGN = -35,   /* a block not aligned to its order, or reaching past the end of the zone */
    PA_VBUDDY = -36,   /* two free buddies were not merged */
    PA_VOVERLAP = -37, /* a block starts inside another */
    PA_VCOUNT = -38,   /* counters differ from what the lists and mem_map say */
    PA_VOWNER = -39,   /* an allocated block without owner, or a free one with */
};

#define PA_PAGE_SIZE    4096
#define PA_MAX_ORDER    11 /* number of orders: 0 to 10, blocks of 4 KiB to 4 MiB */
#define PA_NIL          0xffffffff
#define PA_MAX_REGIONS  64
#define PA_ZONE_MAGIC   0x3130454e4f5a4256 /* VBZONE01 */
#define PA_ZONE_VERSION 1

/* Whom a block belongs to; other values up to 254 are the caller's to give. 0 is for free pages. */
enum pa_owner {
    PA_OWNER_NONE = 0,
    PA_OWNER_KERNEL = 1,
    PA_OWNER_WORKLOAD = 2,
    PA_OWNER_BALLOON = 3,
    PA_OWNER_HINT = 4,
    PA_OWNER_REPORT = 5,
    PA_OWNER_DRIVER = 6,
    PA_OWNER_FREE = 255, /* only for pa_bitmap: the free pages */
};

#define PA_ANY 255 /* as an owner or tag to look for: any */

enum pa_alloc_flags {
    PA_ATOMIC = 1, /* ignore the watermark */
};

enum pa_page_flags {
    PA_F_FREE = 1,  /* first page of a free block */
    PA_F_ALLOC = 2, /* first page of an allocated block */
};

/* One page. Pages that start no block have flags 0: inside a block, a hole, or never given to the zone. */
struct pa_page {
    uint32_t version; /* of the content, see pa_write; survives freeing */
    uint32_t next;    /* free list links, indices into mem_map, PA_NIL at the ends; 0 when allocated */
    uint32_t prev;
    uint8_t order;
    uint8_t flags;
    uint8_t owner;
    uint8_t tag; /* the owner's own */
};

struct pa_free_area {
    uint32_t head;
    uint32_t reserved;
    uint64_t count; /* blocks */
};

struct pa_zone {
    uint64_t magic;
    uint32_t version;
    uint32_t reserved;
    uint64_t base_pfn;
    uint64_t end_pfn;
    uint64_t mem_map; /* bytes from this header */
    uint64_t managed_pages;
    uint64_t free_pages;
    uint64_t watermark_min; /* pages that only PA_ATOMIC allocations may use */
    uint64_t content_seed;
    uint32_t poison_on;
    uint32_t poison_val; /* repeated over every page of a block when it is freed, if poison_on */
    /* fault injection, for allocations of at least fail_min_order */
    uint32_t fail_next;  /* so many allocations fail from now on */
    uint32_t fail_every; /* every n-th allocation fails; 0: none */
    uint32_t fail_count; /* allocations counted towards fail_every */
    uint32_t fail_min_order;
    /* statistics, since pa_init */
    uint64_t allocations; /* blocks */
    uint64_t failures;    /* calls that got less than they asked for */
    uint64_t frees;       /* blocks */
    struct pa_free_area free_area[PA_MAX_ORDER];
};

/* How this process reaches the zone and the pages. Not part of the state: each process has its own. */
struct pa_region {
    uint64_t start_pfn;
    uint64_t end_pfn;
    uint8_t *host; /* where start_pfn is mapped */
};

struct pa_view {
    uint8_t *zone;       /* where the zone's header is mapped, 64-byte aligned */
    uint64_t zone_bytes; /* room for header and mem_map there */
    uint8_t *journal;    /* struct pa_journal, or NULL */
    uint64_t journal_pages;
    uint64_t *dirty_log; /* bitmap of pages shared with a host that cannot see writes by itself, or NULL */
    uint64_t base_pfn;   /* of the zone, from pa_init or pa_attach; both 0 before */
    uint64_t end_pfn;
    uint32_t region_count;
    uint32_t reserved;
    struct pa_region region[PA_MAX_REGIONS];
};

/* ---- the zone ---- */

/* Bytes of state for `pages` pages, header included. */
uint64_t pa_zone_bytes(uint64_t pages);
/* Make a zone for pages [base_pfn, end_pfn), all of them reserved for now. 0, or PA_EINVAL (also if it would
 * end behind the last region). */
int pa_init(struct pa_view *view, uint64_t base_pfn, uint64_t end_pfn, uint64_t watermark_min,
            uint64_t content_seed);
/* Give reserved pages [start_pfn, end_pfn) to the zone as free pages. They must be RAM. 0, PA_EPFN,
 * PA_ECORRUPT. */
int pa_add_range(const struct pa_view *view, uint64_t start_pfn, uint64_t end_pfn);
/* Check that the header is one of ours and fits its room and RAM, and note where the zone lies; call it once
 * per process. 0 or PA_VHEADER. */
int pa_attach(struct pa_view *view);

/* Allocate one block of 2^order pages; returns its pfn. */
int64_t pa_alloc(const struct pa_view *view, uint32_t order, uint32_t flags, uint32_t owner, uint32_t tag);
/* Allocate up to `n` blocks in one call, exactly those that n calls of pa_alloc would give. Stops at the
 * first failure; returns how many there are in `out`. */
int64_t pa_alloc_bulk(const struct pa_view *view, uint32_t order, uint64_t n, uint32_t flags, uint32_t owner,
                      uint32_t tag, uint64_t *out, int *error);
/* Free a block. 0; or an error with nothing changed; or PA_ECORRUPT: it is free, but could not be merged. */
int pa_free(const struct pa_view *view, uint64_t pfn, uint32_t order);
/* Free `n` blocks in the order given, up to the first that cannot be. Returns how many were freed. */
int64_t pa_free_bulk(const struct pa_view *view, uint32_t order, uint64_t n, const uint64_t *pfns,
                     int *error);
/* Free all blocks of that owner and tag (PA_ANY: any) that start in [start_pfn, end_pfn). Returns pages
 * freed. */
int64_t pa_free_owned(const struct pa_view *view, uint64_t start_pfn, uint64_t end_pfn, uint32_t owner,
                      uint32_t tag);

/* ---- free page reporting ---- */

/* A free block of the largest order can carry a mark in `tag`: the host has been told that it is free. The
 * mark is gone as soon as the block is allocated, split or freed again, so nothing is reported twice without
 * having been in use. */
#define PA_TAG_REPORTED 1

/* Take up to `n` free, unmarked blocks of the largest order off the free list, without going below the
 * watermark; they belong to PA_OWNER_REPORT. Their pages are not touched and no statistics change. Returns
 * how many; PA_ECORRUPT if damage was met before the first. */
int64_t pa_report_take(const struct pa_view *view, uint64_t n, uint64_t *out);
/* Put such blocks back, marked if `reported`, behind all others of the list, so that they are used last.
 * Nothing is poisoned. Returns 0; PA_EPFN, PA_ENOTALLOC if one is no block of PA_OWNER_REPORT (those before
 * it are back); PA_ECORRUPT if the list is damaged (none is back). */
int pa_report_return(const struct pa_view *view, uint64_t n, const uint64_t *pfns, uint32_t reported);
/* How many free blocks of the largest order are marked; or PA_ECORRUPT. */
int64_t pa_report_marked(const struct pa_view *view);

/* ---- walks ---- */

/* Or the bits of the pages that belong to `owner` into `map`, bit = pfn, `words` long.
 * PA_OWNER_NONE stands for all allocated pages, PA_OWNER_FREE for all free ones. Returns how many pages;
 * PA_EINVAL if `map` is shorter than the zone. */
int64_t pa_bitmap(const struct pa_view *view, uint32_t owner, uint64_t *map, uint64_t words);
/* Count the pages of each owner; counts[0] is for free pages. Returns blocks seen. */
int64_t pa_count_owners(const struct pa_view *view, uint64_t counts[256]);
/* List allocated blocks of owner and tag (PA_ANY: any) that start at or after *cursor, ascending. Looks at no
 * more than `scan` blocks and lists no more than `max`; *cursor moves on to where to continue, base to end of
 * the zone. `orders` may be NULL. Returns how many were listed. */
int64_t pa_owned(const struct pa_view *view, uint64_t *cursor, uint64_t scan, uint32_t owner, uint32_t tag,
                 uint64_t max, uint64_t *pfns, uint8_t *orders);
/* Check every invariant. 0, or PA_V... with the page concerned in *where. */
int pa_verify(const struct pa_view *view, uint64_t *where);

/* ---- content ---- */

/* The content of a page is 512 words made from (seed, pfn, version): all different, none zero.
 *   key = mix(mix(seed ^ mix(pfn + 1)) + version) | 1
 *   x_i = key + i * PA_CONTENT_STEP          (odd, hence never 0; the step is even, hence all differ)
 *   word_i = x_i ^ (x_i >> 29)
 * where mix is the output function of splitmix64. Words are little-endian. */
#define PA_CONTENT_STEP 0xbf56b6b81a7d383a

struct pa_check_result {
    uint64_t pages;       /* looked at */
    uint64_t wrong;       /* with other content than they should have */
    uint64_t first_wrong; /* pfn, or all ones */
};

/* Write the content of (seed, pfn, version) into each page and mark it in the dirty log. No journal, no
 * mem_map. 0 or PA_EPFN (some pages may have been written). `versions` NULL stands for all zero. */
int pa_fill(const struct pa_view *view, uint64_t n, const uint64_t *pfns, uint64_t seed,
            const uint32_t *versions);
/* Compare each page with what it should hold. 0 or PA_EPFN. */
int pa_check(const struct pa_view *view, uint64_t n, const uint64_t *pfns, uint64_t seed,
             const uint32_t *versions, struct pa_check_result *result);
/* What a workload does: for each page of `n` blocks of 2^order pages stamp the journal, add `bump` to the
 * version in mem_map, write the content for it with the zone's seed, stamp the journal again. bump 0 rewrites
 * the same content. Returns pages written, or PA_EPFN with nothing written. */
int64_t pa_write(const struct pa_view *view, uint32_t order, uint64_t n, const uint64_t *pfns, uint32_t bump);
/* Compare all pages of allocated blocks of owner and tag (PA_ANY: any) that start in [start_pfn, end_pfn)
 * with the version in mem_map and the zone's seed. 0 or PA_ECORRUPT. */
int pa_check_owned(const struct pa_view *view, uint64_t start_pfn, uint64_t end_pfn, uint32_t owner,
                   uint32_t tag, struct pa_check_result *result);

/* ---- the journal of writes: evidence for a test's oracle, outside guest RAM, in shared memory of its own
 * ----
 *
 * The header is followed, PA_JOURNAL_HEADER bytes from the start, by one u64 per page, index = pfn:
 *   high 32 bits: the epoch of the last write; low 32 bits: in how many distinct epochs the page was written.
 * 0 means never written. The host adds 1 to `epoch` before it issues a command id (sequentially consistent,
 * and before it reads any page). The guest stamps a page with the epoch before it stores to it and, behind a
 * full fence, again after: if the second stamp still has the old epoch then the stores are visible to whoever
 * saw the new one. */
#define PA_JOURNAL_MAGIC   0x4c4e52554f4a4256 /* VBJOURNL */
#define PA_JOURNAL_VERSION 1
#define PA_JOURNAL_HEADER  4096

struct pa_journal {
    uint64_t magic;
    uint32_t version;
    uint32_t header_bytes;
    uint64_t pages;
    uint32_t epoch;
    uint32_t reserved;
};

/* Use the journal mapped at `base`, `bytes` long; NULL to use none. 0 or PA_EJOURNAL. */
int pa_journal_use(struct pa_view *view, uint8_t *base, uint64_t bytes);
/* Mark pages written from now on in a bitmap of `pages` bits, after each store and with release order;
 * whoever fetches a word clears it in one atomic step. NULL to mark none. 0 or PA_EJOURNAL if it is shorter
 * than this RAM. */
int pa_dirty_log_use(struct pa_view *view, uint64_t *log, uint64_t pages);
/* Stamp pages with the current epoch; for writers other than pa_write, before and after their store. 0 or
 * PA_EPFN. */
int pa_journal_stamp(const struct pa_view *view, uint64_t n, const uint64_t *pfns);
