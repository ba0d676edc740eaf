/* Which pages of a file are dirty in the page cache: cachestat(2), Linux 6.5, and the calls that go with it.
 *
 * cachestat only counts, so ranges are halved until the count says all or none. What this is worth (which
 * file systems, who else may clean pages) is the caller's business.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "dirty/dirty.h"

/* Headers older than the system call lack all three; the number is the same on every architecture. */
#define NR_CACHESTAT 451

struct cache_range {
    uint64_t offset, length;
};

struct cache_counts {
    uint64_t cached, dirty, writeback, evicted, recently_evicted;
};

/* Pages asked for at once before halving: one node of the page cache's tree. The kernel walks all of a range
 * to count it, so larger windows are walked again and again (512 pages take twice as long when a few are
 * dirty). */
#define WINDOW 64

static int count_pages(int fd, uint64_t at, uint64_t length, struct cache_counts *counts)
{
    struct cache_range range = {at, length};
    return syscall(NR_CACHESTAT, fd, &range, counts, 0u) ? -errno : 0;
}

int64_t dirty_cachestat_scan(int fd, uint64_t offset, uint64_t len, uint64_t first_page, uint64_t *into)
{
    if (offset % DIRTY_PAGE_SIZE || len % DIRTY_PAGE_SIZE)
        return -EINVAL;
    uint64_t pages = len / DIRTY_PAGE_SIZE;
    int64_t found = 0;
    for (uint64_t window = 0; window < pages; window += WINDOW) {
        /* Each halving leaves one half on the stack; 64 pages halve 6 times. */
        struct {
            uint64_t first, n;
        } todo[8];
        unsigned depth = 0;
        todo[depth].first = window;
        todo[depth++].n = pages - window < WINDOW ? pages - window : WINDOW;
        while (depth) {
            uint64_t first = todo[--depth].first, n = todo[depth].n;
            struct cache_counts counts;
            int error = count_pages(fd, offset + first * DIRTY_PAGE_SIZE, n * DIRTY_PAGE_SIZE, &counts);
            if (error)
                return error;
            /* On its way to disk means dirty a moment ago: somebody else's writeback must not hide it. */
            if (!counts.dirty && !counts.writeback)
                continue;
            if (n == 1 || counts.dirty >= n || counts.writeback >= n) {
                dirty_set(into, first_page + first, n);
                found += (int64_t)n;
                continue;
            }
            todo[depth].first = first + n / 2;
            todo[depth++].n = n - n / 2;
            todo[depth].first = first;
            todo[depth++].n = n / 2;
        }
    }
    return found;
}

int64_t dirty_cachestat_lost(int fd, const uint64_t *offsets, uint64_t n)
{
    int64_t lost = 0;
    for (uint64_t i = 0; i < n; i++) {
        struct cache_counts counts;
        int error = count_pages(fd, offsets[i], DIRTY_PAGE_SIZE, &counts);
        if (error)
            return error;
        lost += !counts.dirty;
    }
    return lost;
}

int dirty_file_clean(int fd, uint64_t offset, uint64_t len)
{
    /* All three flags make it wait like fdatasync does, without the journal and the disk's cache: the point
     * is that the pages become clean and write-protected, not that they last. */
    unsigned flags = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
    if (!sync_file_range(fd, (off_t)offset, (off_t)len, flags))
        return 0;
    if (errno != ENOSYS && errno != EINVAL && errno != ESPIPE)
        return -errno;
    return fdatasync(fd) ? -errno : 0;
}
