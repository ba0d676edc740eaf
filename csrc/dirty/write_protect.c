/* userfaultfd in asynchronous write-protect mode, and PAGEMAP_SCAN (Linux 6.7).
 *
 * The numbers below are the kernel's ABI. They are written here because the headers of Debian 12 are older
 * than 6.7. */
#include "dirty/dirty.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#define FEATURE_WP_HUGETLBFS_SHMEM (UINT64_C(1) << 12)
#define FEATURE_WP_UNPOPULATED     (UINT64_C(1) << 13)
#define FEATURE_WP_ASYNC           (UINT64_C(1) << 15)

struct scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
struct scan_region {
    uint64_t start, end, categories;
};
#define PAGEMAP_SCAN_IOCTL _IOWR('f', 16, struct scan_arg)
#define SCAN_WP_MATCHING   (UINT64_C(1) << 0)
#define SCAN_CHECK_WPASYNC (UINT64_C(1) << 1)
#define CATEGORY_WRITTEN   (UINT64_C(1) << 1)
#define REGIONS_PER_CALL   256

int dirty_uffd_open(void)
{
    const int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (fd < 0)
        return -errno;
    struct uffdio_api api = {
        .api = UFFD_API, .features = FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_WP_HUGETLBFS_SHMEM};
    if (ioctl(fd, UFFDIO_API, &api)) {
        const int error = errno;
        close(fd);
        return -error;
    }
    return fd;
}

int dirty_uffd_register(int uffd, uint64_t start, uint64_t len)
{
    struct uffdio_register reg = {.range = {.start = start, .len = len}, .mode = UFFDIO_REGISTER_MODE_WP};
    if (ioctl(uffd, UFFDIO_REGISTER, &reg))
        return -errno;
    struct uffdio_writeprotect protect = {.range = {.start = start, .len = len},
                                          .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    if (ioctl(uffd, UFFDIO_WRITEPROTECT, &protect))
        return -errno;
    /* A forked child would share the pages but not the protection: its writes would go unseen. */
    if (madvise((void *)(uintptr_t)start, len, MADV_DONTFORK))
        return -errno;
    return 0;
}

int64_t dirty_pagemap_scan(int pagemap, uint64_t start, uint64_t len, uint64_t first_page, uint64_t *into)
{
    struct scan_region found[REGIONS_PER_CALL];
    int64_t written = 0;
    const uint64_t end = start + len;
    uint64_t at = start;
    if (start % DIRTY_PAGE_SIZE || len % DIRTY_PAGE_SIZE || end < start)
        return -EINVAL; /* the kernel rounds up: it would report a page that `into` has no bit for */
    while (at < end) {
        struct scan_arg arg = {.size = sizeof arg,
                               .flags = SCAN_WP_MATCHING | SCAN_CHECK_WPASYNC,
                               .start = at,
                               .end = end,
                               .vec = (uint64_t)(uintptr_t)found,
                               .vec_len = REGIONS_PER_CALL,
                               .category_mask = CATEGORY_WRITTEN,
                               .return_mask = CATEGORY_WRITTEN};
        const int n = ioctl(pagemap, PAGEMAP_SCAN_IOCTL, &arg);
        if (n < 0) {
            if (errno == EINTR || errno == EAGAIN)
                continue; /* nothing was reported and nothing re-protected */
            return -errno;
        }
        for (int i = 0; i < n; i++) {
            const uint64_t pages = (found[i].end - found[i].start) / DIRTY_PAGE_SIZE;
            dirty_set(into, first_page + (found[i].start - start) / DIRTY_PAGE_SIZE, pages);
            written += (int64_t)pages;
        }
        if (arg.walk_end <= at)
            return -EIO; /* no progress: neither spin, nor pass for a scan of the rest */
        at = arg.walk_end;
    }
    return written;
}
