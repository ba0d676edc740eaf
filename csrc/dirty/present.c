/* Which pages of a file hold data: holes are found with SEEK_DATA, without reading, hence without allocating.
 */

#include <errno.h>
#include <unistd.h>

#include "dirty/dirty.h"

int64_t dirty_present_scan(int fd, uint64_t offset, uint64_t len, uint64_t first_page, uint64_t *into)
{
    uint64_t at = offset, end = offset + len;
    if (offset % DIRTY_PAGE_SIZE || end < offset)
        return -EINVAL;
    int64_t found = 0;
    while (at < end) {
        off_t data = lseek(fd, (off_t)at, SEEK_DATA);
        if (data < 0)
            return errno == ENXIO ? found : -errno; /* nothing but a hole up to the end */
        if ((uint64_t)data >= end)
            break;
        off_t hole = lseek(fd, data, SEEK_HOLE);
        if (hole < 0)
            return errno == ENXIO ? found : -errno; /* cut off meanwhile: nothing more */
        if (hole <= data)
            hole = data + 1; /* punched meanwhile: it did hold data, and one page a turn is the least */
        uint64_t first = ((uint64_t)data - offset) / DIRTY_PAGE_SIZE;
        uint64_t last = (uint64_t)hole < end ? (uint64_t)hole : end;
        last = (last - offset + DIRTY_PAGE_SIZE - 1) / DIRTY_PAGE_SIZE;
        dirty_set(into, first_page + first, last - first);
        found += (int64_t)(last - first);
        at = offset + last * DIRTY_PAGE_SIZE;
    }
    return found;
}

int dirty_present_check(int fd, uint64_t offset, uint64_t first_page, uint64_t n, const uint64_t *wanted,
                        uint64_t *present)
{
    uint64_t data = 0; /* page where the next data after a hole begins, as far as that was asked */

    if (offset % DIRTY_PAGE_SIZE)
        return -EINVAL;
    for (uint64_t i = 0; i < n; i++) {
        uint64_t page = first_page + i, bit = (uint64_t)1 << (page & 63);

        if (!(page & 63) && n - i >= 64 && !wanted[page >> 6]) {
            i += 63;
            continue;
        }
        if (!(wanted[page >> 6] & bit))
            continue;
        if (i >= data) {
            off_t at = lseek(fd, (off_t)(offset + i * DIRTY_PAGE_SIZE), SEEK_DATA);

            if (at < 0 && errno != ENXIO)
                return -errno;
            data = at < 0 ? n : ((uint64_t)at - offset) / DIRTY_PAGE_SIZE;
        }
        if (i >= data)
            present[page >> 6] |= bit;
        else
            present[page >> 6] &= ~bit;
    }
    return 0;
}
