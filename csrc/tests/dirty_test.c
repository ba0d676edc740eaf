/* Random operations on page bitmaps, logs and page contents, checked against a plain array of flags.
 *
 * Arguments: seed, seconds (2000 operations at least). Bitmaps are exactly as long as they have to be, so
 * that a sanitizer sees a word too many.
 */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "dirty/dirty.h"

#define PAGES 1000
#define WORDS ((PAGES + 63) / 64)
#define RAM   96 /* pages with content */

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s (seed %llu)\n", __FILE__, __LINE__, #condition,                       \
                    (unsigned long long)seed);                                                               \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

static uint64_t seed, random_state;
static uint64_t *map, *log_map, *into;
static unsigned char model[PAGES], log_model[PAGES], into_model[PAGES];

/* The pages that exist: slots 0 to 999 are these page numbers. */
#define RUNS 4
static const struct dirty_run exist[RUNS] = {{2, 300, 0}, {305, 1, 300}, {400, 499, 301}, {1000, 200, 800}};
static const struct dirty_layout layout = {exist, RUNS};

static uint64_t page_in(uint64_t slot)
{
    for (int i = 0; i < RUNS; i++) {
        if (slot - exist[i].slot < exist[i].pages)
            return exist[i].first + slot - exist[i].slot;
    }
    abort();
}

static uint64_t next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static uint64_t below(uint64_t n)
{
    return next_random() % n;
}

static uint64_t *bitmap(uint64_t words)
{
    uint64_t *made = calloc(words, sizeof(*made));

    CHECK(made);
    return made;
}

static int bit(const uint64_t *bits, uint64_t p)
{
    return (int)(bits[p / 64] >> (p & 63) & 1);
}

static void same(const uint64_t *bits, const unsigned char *flags)
{
    for (uint64_t p = 0; p < PAGES; p++)
        CHECK(bit(bits, p) == flags[p]);
}

/* A byte range: mostly sensible, sometimes past the end or round the address space. */
static void range(uint64_t *addr, uint64_t *len)
{
    *addr = below(PAGES + 250) * DIRTY_PAGE_SIZE + (below(3) ? 0 : below(DIRTY_PAGE_SIZE));
    *len = below(300) * DIRTY_PAGE_SIZE + (below(3) ? 0 : below(DIRTY_PAGE_SIZE));
    if (!below(8))
        *addr = UINT64_MAX - below(3 * DIRTY_PAGE_SIZE);
    if (!below(8))
        *len = UINT64_MAX - below(3 * DIRTY_PAGE_SIZE);
}

/* Whether [addr, addr + len) has all of page p, or any of it. 128 bits do not wrap. */
static int covers(uint64_t addr, uint64_t len, uint64_t p, int all)
{
    __extension__ typedef unsigned __int128 wide;
    wide start = addr, end = start + len, from = (wide)p * DIRTY_PAGE_SIZE, to = from + DIRTY_PAGE_SIZE;

    return all ? start <= from && end >= to : len && start < to && end > from;
}

static void plain(void)
{
    uint64_t first = below(PAGES), n = below(PAGES - first + 1), set = 0;

    for (uint64_t p = first; p < first + n; p++)
        set += model[p];
    CHECK(dirty_count(map, first, n) == (int64_t)set);
    if (below(2)) {
        CHECK(dirty_set(map, first, n) == (int64_t)(n - set));
        memset(model + first, 1, n);
    } else {
        CHECK(dirty_clear(map, first, n) == (int64_t)set);
        memset(model + first, 0, n);
    }
}

static void ranges(void)
{
    uint64_t addr[5], len[5], count = below(6), changed = 0;
    int set = (int)below(2);

    for (uint64_t i = 0; i < count; i++) {
        range(&addr[i], &len[i]);
        for (uint64_t p = 0; p < PAGES; p++) {
            if (covers(addr[i], len[i], page_in(p), 1)) {
                changed += model[p] != set;
                model[p] = (unsigned char)set;
            }
        }
    }
    if (set)
        CHECK(dirty_set_ranges(map, &layout, addr, len, count) == (int64_t)changed);
    else
        CHECK(dirty_clear_ranges(map, &layout, addr, len, count) == (int64_t)changed);
}

static void runs(void)
{
    uint64_t start = below(PAGES), end = start + below(PAGES - start + 1), at = start, starts[7], lengths[7];
    unsigned char seen[PAGES] = {0};

    while (at < end) {
        uint64_t resume = at;
        int64_t n = dirty_runs(map, at, end, starts, lengths, 1 + below(7), &resume);

        CHECK(n >= 0 && n <= 7 && (n > 0 || resume == end));
        for (int64_t i = 0; i < n; i++) {
            CHECK(lengths[i] > 0 && starts[i] >= at && starts[i] + lengths[i] <= end);
            memset(seen + starts[i], 1, lengths[i]);
        }
        CHECK(resume > at && resume <= end);
        at = resume;
    }
    for (uint64_t p = start; p < end; p++)
        CHECK(seen[p] == model[p]);
}

static void shared_log(void)
{
    uint64_t addr, len, first = below(PAGES), n = below(PAGES - first + 1), moved = 0;

    dirty_log_mark(log_map, first, n);
    memset(log_model + first, 1, n);
    range(&addr, &len);
    dirty_log_mark_ranges(log_map, &layout, &addr, &len, 1);
    for (uint64_t p = 0; p < PAGES; p++)
        log_model[p] |= (unsigned char)covers(addr, len, page_in(p), 0);
    same(log_map, log_model);
    log_map[WORDS - 1] |= ~UINT64_C(0) << PAGES % 64; /* a writer that scribbles behind the last page */
    if (below(3))
        return;
    for (uint64_t p = 0; p < PAGES; p++) {
        moved += log_model[p];
        into_model[p] |= log_model[p];
    }
    CHECK(dirty_log_fetch(log_map, into, PAGES) == (int64_t)moved);
    memset(log_model, 0, sizeof(log_model));
    same(into, into_model);
    same(log_map, log_model);
}

/* Pages of zeros, of content and holes: digests, what is taken to be sent, and where there is memory. */
static void contents(int fd, uint8_t *ram)
{
    uint64_t base = below(3) * 100, words = (base + RAM + 63) / 64, room = 1 + below(20), at = base;
    uint64_t *wanted = bitmap(words), *present = bitmap(words), *found = bitmap(words);
    uint64_t *digests = malloc(RAM * sizeof(*digests)), *pages = malloc(room * sizeof(*pages));
    uint64_t *zeros = malloc(room * sizeof(*zeros)), sent = 0, empty = 0, want = 0;
    uint8_t *data = malloc(room * DIRTY_PAGE_SIZE);

    CHECK(digests && pages && zeros && data);
    CHECK(ftruncate(fd, 0) == 0 && ftruncate(fd, RAM * DIRTY_PAGE_SIZE) == 0);
    for (uint64_t p = 0; p < RAM; p++) {
        uint64_t kind = below(4);

        if (kind)
            ram[p * DIRTY_PAGE_SIZE + below(DIRTY_PAGE_SIZE)] = kind > 1 ? (uint8_t)(1 + below(255)) : 0;
        if (kind)
            present[(base + p) / 64] |= (uint64_t)1 << ((base + p) & 63);
        if (below(3))
            wanted[(base + p) / 64] |= (uint64_t)1 << ((base + p) & 63);
    }
    CHECK(dirty_present_scan(fd, 0, RAM * DIRTY_PAGE_SIZE, base, found) == dirty_count(present, base, RAM));
    CHECK(!memcmp(found, present, words * sizeof(*found)));
    for (uint64_t i = 0; i < words; i++)
        found[i] = next_random();
    CHECK(dirty_present_check(fd, 0, base, RAM, wanted, found) == 0);
    for (uint64_t p = base; p < base + RAM; p++)
        CHECK(!bit(wanted, p) || bit(found, p) == bit(present, p));

    dirty_digest_pages(ram, RAM, present, base, digests);
    for (uint64_t p = 0; p < RAM; p++)
        CHECK(!digests[p] == (!bit(present, base + p) || dirty_page_is_zero(ram + p * DIRTY_PAGE_SIZE)));
    want = (uint64_t)dirty_count(wanted, base, RAM);
    while (at < base + RAM) {
        struct dirty_take out;

        dirty_take_pages(wanted, present, ram, base, &at, base + RAM, data, pages, room, zeros, room, &out);
        CHECK(out.n_pages <= room && out.n_zeros <= room);
        for (uint64_t i = 0; i < out.n_pages; i++) {
            CHECK(digests[pages[i] - base]);
            CHECK(!memcmp(data + i * DIRTY_PAGE_SIZE, ram + (pages[i] - base) * DIRTY_PAGE_SIZE,
                          DIRTY_PAGE_SIZE));
        }
        for (uint64_t i = 0; i < out.n_zeros; i++)
            CHECK(!digests[zeros[i] - base]);
        sent += out.n_pages;
        empty += out.n_zeros;
    }
    CHECK(sent + empty == want && dirty_count(wanted, base, RAM) == 0);
    memset(found, 0, words * sizeof(*found));
    CHECK(dirty_present_scan(fd, 0, RAM * DIRTY_PAGE_SIZE, base, found) ==
          dirty_count(present, base, RAM)); /* nothing that only looks has allocated a hole */
    free(wanted);
    free(present);
    free(found);
    free(digests);
    free(pages);
    free(zeros);
    free(data);
}

/* Ranges that no bitmap has bits for are refused before anything is asked. */
static void odd_ranges(int fd)
{
    const uint64_t page = DIRTY_PAGE_SIZE, far = UINT64_MAX - page + 1;

    CHECK(dirty_pagemap_scan(fd, page, page + 1, 0, into) == -EINVAL);
    CHECK(dirty_pagemap_scan(fd, page + 8, page, 0, into) == -EINVAL);
    CHECK(dirty_pagemap_scan(fd, far, 2 * page, 0, into) == -EINVAL);
    CHECK(dirty_present_scan(fd, 1, page, 0, into) == -EINVAL);
    CHECK(dirty_present_scan(fd, far, 2 * page, 0, into) == -EINVAL);
    CHECK(dirty_cachestat_scan(fd, 0, page + 1, 0, into) == -EINVAL);
    CHECK(dirty_pagemap_scan(fd, page, page, 0, into) == -ENOTTY); /* a memory object is no pagemap */
    CHECK(dirty_pagemap_scan(-1, page, page, 0, into) == -EBADF);
}

/* A kernel that says it has scanned and has not, made of one where ioctl returns 0 and does nothing: an
 * error, not an empty log. */
static void scan_without_progress(int fd)
{
    struct sock_filter nothing[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0), /* the system call's number */
                                    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 1),
                                    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO),
                                    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {sizeof(nothing) / sizeof(nothing[0]), nothing};
    int status = 0;
    pid_t child = fork();

    if (child == 0) {
        if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
            _exit(2);
        _exit(dirty_pagemap_scan(fd, DIRTY_PAGE_SIZE, 8 * DIRTY_PAGE_SIZE, 0, into) == -EIO ? 0 : 1);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char **argv)
{
    uint64_t operations = 0;
    time_t end = time(NULL) + (argc > 2 ? atoi(argv[2]) : 5);
    int fd = memfd_create("dirty_test", 0);
    uint8_t *ram;

    seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    random_state = seed * 0x9e3779b97f4a7c15u | 1;
    map = bitmap(WORDS);
    log_map = bitmap(WORDS);
    into = bitmap(WORDS);
    CHECK(fd >= 0);
    ram = mmap(NULL, RAM * DIRTY_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(ram != MAP_FAILED);
    odd_ranges(fd);
    scan_without_progress(fd);
    for (; operations < 2000 || time(NULL) < end; operations++) {
        switch (below(5)) {
        case 0:
            ranges();
            break;
        case 1:
            runs();
            break;
        case 2:
            shared_log();
            break;
        case 3:
            contents(fd, ram);
            break;
        default:
            plain();
        }
        same(map, model);
    }
    munmap(ram, RAM * DIRTY_PAGE_SIZE);
    close(fd);
    free(map);
    free(log_map);
    free(into);
    printf("dirty_test: ok, seed %llu, %llu operations\n", (unsigned long long)seed,
           (unsigned long long)operations);
    return 0;
}
