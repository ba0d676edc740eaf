/* Page bitmaps, page contents, and the kernel's ways to tell which pages were written.
 *
 * This header is also read by cffi: no guards, inlines, attributes or shifts in macros here; dirty.h includes
 * it. A bitmap is an array of uint64_t, bit s % 64 of word s / 64 stands for slot s: the place of a page
 * among those that exist (struct dirty_layout). A page is 4096 bytes. Functions that can fail return what
 * they are asked for (a count, a descriptor, or 0) or a negative errno; `into` may hold a part of the answer
 * then. A bitmap that is handed in has room for every page that the call is about.
 */

#define DIRTY_PAGE_SIZE 4096

/* ---- which pages exist ---- */

/* `pages` pages from page number `first` on (guest address / 4096), whose bits begin at `slot`. */
struct dirty_run {
    uint64_t first, pages, slot;
};
/* All runs, ascending and apart, their slots one after another: bookkeeping has no room for holes. */
struct dirty_layout {
    const struct dirty_run *run;
    uint64_t count;
};

/* ---- bitmaps owned by one thread ---- */

/* Set, clear or count bits [first, first + n); set and clear return how many of them changed. */
int64_t dirty_set(uint64_t *map, uint64_t first, uint64_t n);
int64_t dirty_clear(uint64_t *map, uint64_t first, uint64_t n);
int64_t dirty_count(const uint64_t *map, uint64_t first, uint64_t n);

/* Clear or set the bits of the pages that lie wholly inside `count` byte ranges of guest addresses (a hint's
 * blocks); what does not exist is left out. Returns how many bits changed. */
int64_t dirty_clear_ranges(uint64_t *map, const struct dirty_layout *layout, const uint64_t *addr,
                           const uint64_t *len, uint64_t count);
int64_t dirty_set_ranges(uint64_t *map, const struct dirty_layout *layout, const uint64_t *addr,
                         const uint64_t *len, uint64_t count);

/* The runs of set bits in [first, end): writes up to `max` (start, length) pairs, returns how many;
 * *resume is where to go on, `end` when all was seen. */
int64_t dirty_runs(const uint64_t *map, uint64_t first, uint64_t end, uint64_t *starts, uint64_t *lengths,
                   uint64_t max, uint64_t *resume);

/* ---- a log shared between writers and one reader, in one process or several ---- */

/* Mark pages written, after the store or the completion of the I/O. Release order: whoever fetches the bit
 * sees the store that came before. */
void dirty_log_mark(uint64_t *log, uint64_t first, uint64_t n);
/* Mark every page that the `count` byte ranges of guest addresses touch; what does not exist is left out. */
void dirty_log_mark_ranges(uint64_t *log, const struct dirty_layout *layout, const uint64_t *addr,
                           const uint64_t *len, uint64_t count);
/* Move the log into `into` (or-ed) and clear it, word by word atomically, acquire order. Returns bits moved.
 */
int64_t dirty_log_fetch(uint64_t *log, uint64_t *into, uint64_t pages);

/* ---- page contents ---- */

/* Whether a page is all zero. */
int dirty_page_is_zero(const uint8_t *page);

/* Digest of each of `n` pages at `base`; 0 stands for an all-zero page and only for that.
 * Pages whose bit in `present` (from bit `first`) is clear are holes: digest 0, not read. `present` may be
 * NULL. */
void dirty_digest_pages(const uint8_t *base, uint64_t n, const uint64_t *present, uint64_t first,
                        uint64_t *digests);

/* Take pages with a set bit from [*cursor, end) for sending and clear their bits.
 * Page p lies at base + (p - base_page) * 4096. Holes (clear in `present`) count as zero and are not read.
 * Non-zero pages are copied one after another into `data` (room for max_pages), their numbers into `pages`;
 * zero pages go to `zeros` (room for max_zeros). Stops at `end` or when either is full. *cursor moves on. */
struct dirty_take {
    uint64_t n_pages;
    uint64_t n_zeros;
};
void dirty_take_pages(uint64_t *map, const uint64_t *present, const uint8_t *base, uint64_t base_page,
                      uint64_t *cursor, uint64_t end, uint8_t *data, uint64_t *pages, uint64_t max_pages,
                      uint64_t *zeros, uint64_t max_zeros, struct dirty_take *out);

/* ---- userfaultfd WP_ASYNC and PAGEMAP_SCAN (Linux 6.7) ---- */

/* Open a userfaultfd for asynchronous write protection (USER_MODE_ONLY, no privilege needed). Returns the
 * descriptor. */
int dirty_uffd_open(void);
/* Register a mapping of the calling process and write-protect it. */
int dirty_uffd_register(int uffd, uint64_t start, uint64_t len);
/* From a descriptor of /proc/PID/pagemap: or the pages of [start, start + len) written since the last scan
 * into `into` (bit first_page stands for the page at `start`) and re-protect them, in one step per page.
 * Returns how many were written; -EINVAL if the range is not whole pages, -EPERM if it is not registered for
 * asynchronous write protection, -EIO if the kernel does not get on with it. After an error some pages may
 * have been re-protected that are not in `into`. I/O into pages that the kernel pins (O_DIRECT reads,
 * registered buffers of io_uring) counts as written when they are pinned; data that lands after a scan is in
 * no later one. Mark such pages by dirty_log_mark_ranges when the I/O has completed, and fetch that log into
 * the same bitmap after each scan. */
int64_t dirty_pagemap_scan(int pagemap, uint64_t start, uint64_t len, uint64_t first_page, uint64_t *into);

/* ---- cachestat (Linux 6.5) ---- */

/* Or the pages of the file range [offset, offset + len) that are dirty in the page cache into `into` (bit
 * first_page stands for the page at `offset`), by bisection. Returns how many, or a negative errno. */
int64_t dirty_cachestat_scan(int fd, uint64_t offset, uint64_t len, uint64_t first_page, uint64_t *into);
/* How many of the `n` pages at these file offsets are not dirty, or a negative errno. */
int64_t dirty_cachestat_lost(int fd, const uint64_t *offsets, uint64_t n);
/* Write the dirty pages of a file range back and wait: they are clean and write-protected in all mappings
 * after it. Not durable. Returns 0 or a negative errno. */
int dirty_file_clean(int fd, uint64_t offset, uint64_t len);
/* Or the pages of a file range that hold data (are no holes, SEEK_DATA) into `into`. Returns how many, or a
 * negative errno. Moves the descriptor's file position. */
int64_t dirty_present_scan(int fd, uint64_t offset, uint64_t len, uint64_t first_page, uint64_t *into);
/* The same only for those of `n` pages from `first_page` (at file offset `offset`) that are set in `wanted`:
 * their bits in `present` are set or cleared, all others stay. About 0.2 us a page, where a scan of
 * everything costs 0.05 us for each page that holds data. Returns 0 or a negative errno. */
int dirty_present_check(int fd, uint64_t offset, uint64_t first_page, uint64_t n, const uint64_t *wanted,
                        uint64_t *present);
