/* Random operations on the page allocator, checked against a plain table of who owns what.
 *
 * cc -std=c11 -g -O1 -fsanitize=address,undefined -Icsrc csrc/tests/page_alloc_test.c
 * csrc/page_alloc/[a-z]*.c Arguments: seed, seconds (5000 operations at least).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "page_alloc/page_alloc.h"

#define PAGES      4096
#define HOLE_START 2000
#define HOLE_END   2100
#define MAX_BLOCKS PAGES
#define WATERMARK  16

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                  \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

struct block {
    uint64_t pfn;
    uint32_t order;
    uint32_t owner;
};

struct test {
    struct pa_view view;
    uint8_t *ram;
    uint8_t *journal;
    uint8_t *taken; /* owner of each page, 0 when free */
    struct block *blocks;
    uint64_t count;
    uint64_t free_pages;
    uint64_t random;
};

static uint64_t next_random(struct test *t)
{
    t->random ^= t->random << 13;
    t->random ^= t->random >> 7;
    t->random ^= t->random << 17;
    return t->random;
}

static struct pa_zone *zone_of(struct test *t)
{
    return (struct pa_zone *)(void *)t->view.zone;
}

static void setup(struct test *t, uint64_t seed)
{
    uint64_t zone_pages = (pa_zone_bytes(PAGES) + PA_PAGE_SIZE - 1) / PA_PAGE_SIZE;
    memset(t, 0, sizeof(*t));
    t->random = seed | 1;
    t->ram = aligned_alloc(PA_PAGE_SIZE, (size_t)PAGES * PA_PAGE_SIZE);
    t->journal = aligned_alloc(PA_PAGE_SIZE, PA_JOURNAL_HEADER + PAGES * 8);
    t->taken = calloc(PAGES, 1);
    t->blocks = calloc(MAX_BLOCKS, sizeof(*t->blocks));
    CHECK(t->ram && t->journal && t->taken && t->blocks);
    memset(t->ram, 0x5a, (size_t)PAGES * PA_PAGE_SIZE);
    memset(t->journal, 0, PA_JOURNAL_HEADER + PAGES * 8);
    struct pa_journal *journal = (struct pa_journal *)(void *)t->journal;
    journal->magic = PA_JOURNAL_MAGIC;
    journal->version = PA_JOURNAL_VERSION;
    journal->header_bytes = PA_JOURNAL_HEADER;
    journal->pages = PAGES;
    t->view.zone = t->ram;
    t->view.zone_bytes = zone_pages * PA_PAGE_SIZE;
    t->view.region_count = 2;
    t->view.region[0] = (struct pa_region){0, HOLE_START, t->ram};
    t->view.region[1] = (struct pa_region){HOLE_END, PAGES, t->ram + (uint64_t)HOLE_END * PA_PAGE_SIZE};
    CHECK(pa_attach(&t->view) == PA_VHEADER);
    CHECK(pa_init(&t->view, zone_pages, PAGES, WATERMARK, 99) == 0);
    CHECK(pa_add_range(&t->view, zone_pages, PAGES) == PA_EPFN);
    CHECK(pa_add_range(&t->view, HOLE_END, PAGES) == 0);
    CHECK(pa_add_range(&t->view, zone_pages, HOLE_START) == 0);
    CHECK(pa_add_range(&t->view, zone_pages, HOLE_START) == PA_EPFN);
    CHECK(pa_attach(&t->view) == 0);
    CHECK(pa_journal_use(&t->view, t->journal, PA_JOURNAL_HEADER + PAGES * 8 - 8) == PA_EJOURNAL);
    CHECK(pa_journal_use(&t->view, t->journal, PA_JOURNAL_HEADER + PAGES * 8) == 0);
    memset(t->taken, 0xff, zone_pages);
    memset(t->taken + HOLE_START, 0xff, HOLE_END - HOLE_START);
    t->free_pages = PAGES - zone_pages - (HOLE_END - HOLE_START);
}

static void took(struct test *t, uint64_t pfn, uint32_t order, uint32_t owner)
{
    CHECK((pfn & (((uint64_t)1 << order) - 1)) == 0 && pfn + ((uint64_t)1 << order) <= PAGES);
    for (uint64_t i = 0; i < (uint64_t)1 << order; i++) {
        CHECK(t->taken[pfn + i] == 0);
        t->taken[pfn + i] = (uint8_t)owner;
    }
    CHECK(t->count < MAX_BLOCKS);
    t->blocks[t->count++] = (struct block){pfn, order, owner};
    t->free_pages -= (uint64_t)1 << order;
}

static void gave(struct test *t, uint64_t at)
{
    struct block block = t->blocks[at];
    memset(t->taken + block.pfn, 0, (size_t)1 << block.order);
    t->blocks[at] = t->blocks[--t->count];
    t->free_pages += (uint64_t)1 << block.order;
}

static void allocate(struct test *t)
{
    uint64_t out[64];
    uint32_t order = (uint32_t)(next_random(t) % PA_MAX_ORDER), owner = 1 + (uint32_t)(next_random(t) % 6);
    uint32_t flags = next_random(t) % 4 ? 0 : PA_ATOMIC;
    uint64_t n = next_random(t) % 2 ? 1 : next_random(t) % 64;
    uint64_t limit = flags || t->free_pages < WATERMARK ? t->free_pages : t->free_pages - WATERMARK;
    int error = 0;
    int64_t got = pa_alloc_bulk(&t->view, order, n, flags, owner, 1, out, &error);
    if (got < 0) {
        CHECK(got == PA_ENOMEM || got == PA_EWATERMARK);
        CHECK(got != PA_EWATERMARK || !flags);
        CHECK(order > 0 || limit == 0 || (!flags && t->free_pages <= WATERMARK));
        return;
    }
    CHECK(((uint64_t)got == n) == (error == 0));
    CHECK((uint64_t)got <= n && (uint64_t)got << order <= limit);
    for (int64_t i = 0; i < got; i++)
        took(t, out[i], order, owner);
}

static void release(struct test *t)
{
    if (t->count == 0)
        return;
    uint64_t at = next_random(t) % t->count;
    struct block block = t->blocks[at];
    CHECK(pa_free(&t->view, block.pfn, (block.order + 1) % PA_MAX_ORDER) < 0);
    CHECK(pa_free(&t->view, block.pfn, block.order) == 0);
    gave(t, at);
    CHECK(pa_free(&t->view, block.pfn, block.order) == PA_ENOTALLOC);
}

static void release_many(struct test *t)
{
    uint64_t pfns[32], n = 0;
    uint32_t order = (uint32_t)(next_random(t) % 4);
    int error = 0;
    for (uint64_t at = t->count; at-- > 0 && n < 32;) {
        if (t->blocks[at].order == order) {
            pfns[n++] = t->blocks[at].pfn;
            gave(t, at);
        }
    }
    CHECK(pa_free_bulk(&t->view, order, n, pfns, &error) == (int64_t)n && error == 0);
    if (n) {
        CHECK(pa_free_bulk(&t->view, order, n, pfns, &error) == PA_ENOTALLOC);
        CHECK(error == PA_ENOTALLOC);
    }
}

static void write_block(struct test *t)
{
    struct pa_check_result result;
    if (t->count == 0)
        return;
    struct block block = t->blocks[next_random(t) % t->count];
    CHECK(pa_write(&t->view, block.order, 1, &block.pfn, 1) == (int64_t)1 << block.order);
    CHECK(pa_check_owned(&t->view, block.pfn, block.pfn + 1, PA_ANY, PA_ANY, &result) == 0);
    CHECK(result.pages == (uint64_t)1 << block.order && result.wrong == 0);
    const uint64_t *entry = (const uint64_t *)(const void *)(t->journal + PA_JOURNAL_HEADER);
    CHECK((uint32_t)entry[block.pfn] >= 1);
    uint8_t *byte = t->ram + block.pfn * PA_PAGE_SIZE + next_random(t) % PA_PAGE_SIZE;
    *byte ^= 4;
    CHECK(pa_check_owned(&t->view, block.pfn, block.pfn + 1, PA_ANY, PA_ANY, &result) == 0);
    CHECK(result.wrong == 1 && result.first_wrong == block.pfn);
    *byte ^= 4;
}

/* Take blocks to report, look at what is left meanwhile, put them back with or without a mark. */
static void report(struct test *t)
{
    uint64_t out[3], where = 0, block = (uint64_t)1 << (PA_MAX_ORDER - 1);
    int64_t marked = pa_report_marked(&t->view);
    int64_t got = pa_report_take(&t->view, 1 + next_random(t) % 3, out);
    CHECK(marked >= 0 && got >= 0 && got <= 3);
    CHECK(got == 0 || t->free_pages - (uint64_t)got * block >= WATERMARK);
    for (int64_t i = 0; i < got; i++) {
        for (uint64_t j = 0; j < block; j++)
            CHECK(t->taken[out[i] + j] == 0);
    }
    CHECK(zone_of(t)->free_pages == t->free_pages - (uint64_t)got * block);
    CHECK(pa_verify(&t->view, &where) == 0 && pa_report_marked(&t->view) == marked);
    uint32_t reported = next_random(t) % 2;
    CHECK(pa_report_return(&t->view, (uint64_t)got, out, reported) == 0);
    CHECK(got == 0 || pa_report_return(&t->view, (uint64_t)got, out, reported) == PA_ENOTALLOC);
    CHECK(pa_report_marked(&t->view) == marked + (reported ? got : 0));
    out[0] = PAGES;
    CHECK(pa_report_return(&t->view, 1, out, 0) == PA_EPFN);
    out[0] = 2049;
    CHECK(pa_report_return(&t->view, 1, out, 0) == PA_EPFN);
}

static void check_all(struct test *t)
{
    uint64_t where = 0, map[PAGES / 64] = {0}, counts[256];
    CHECK(pa_verify(&t->view, &where) == 0);
    CHECK(zone_of(t)->free_pages == t->free_pages);
    pa_bitmap(&t->view, PA_OWNER_NONE, map, PAGES / 64);
    for (uint64_t i = 0; i < PAGES; i++)
        CHECK((map[i / 64] >> i % 64 & 1) == (t->taken[i] != 0 && t->taken[i] != 0xff));
    CHECK(pa_count_owners(&t->view, counts) >= 0 && counts[0] == t->free_pages);
}

/* Damage the state at random: everything has to come back, with an error or without. */
static void damage(struct test *t)
{
    uint64_t out[16], where;
    int error;
    struct pa_check_result result;
    uint64_t base = zone_of(t)->base_pfn;
    struct pa_page *map = (struct pa_page *)(void *)(t->view.zone + zone_of(t)->mem_map);
    for (uint32_t i = 0; i < 200; i++) {
        struct pa_page *page = &map[next_random(t) % (PAGES - base)];
        uint8_t *byte = (uint8_t *)page + next_random(t) % sizeof(*page);
        *byte = (uint8_t)next_random(t);
    }
    for (uint32_t i = 0; i < 2000; i++) {
        uint32_t order = (uint32_t)(next_random(t) % PA_MAX_ORDER);
        int64_t got = pa_alloc_bulk(&t->view, order, 1 + next_random(t) % 16, PA_ATOMIC, 2, 0, out, &error);
        if (got > 0 && next_random(t) % 2)
            pa_free_bulk(&t->view, order, (uint64_t)got, out, &error);
        pa_free(&t->view, next_random(t) % PAGES, order);
        got = pa_report_take(&t->view, 2, out);
        if (got > 0)
            pa_report_return(&t->view, (uint64_t)got, out, next_random(t) % 2);
        pa_report_marked(&t->view);
    }
    uint64_t bits[PAGES / 64];
    uint64_t cursor = 0;
    pa_verify(&t->view, &where);
    pa_bitmap(&t->view, PA_OWNER_NONE, bits, PAGES / 64);
    pa_owned(&t->view, &cursor, PAGES, PA_ANY, PA_ANY, 16, out, NULL);
    pa_check_owned(&t->view, 0, PAGES, PA_ANY, PA_ANY, &result);
}

int main(int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1, operations = 0;
    time_t end = time(NULL) + (argc > 2 ? atoi(argv[2]) : 5);
    struct test t;
    setup(&t, seed);
    check_all(&t);
    for (; operations < 5000 || time(NULL) < end; operations++) {
        switch (next_random(&t) % 9) {
        case 0:
        case 1:
            allocate(&t);
            break;
        case 2:
            write_block(&t);
            break;
        case 3:
            release_many(&t);
            break;
        case 4:
            report(&t);
            break;
        default:
            release(&t);
        }
        if (operations % 64 == 0)
            check_all(&t);
    }
    while (t.count)
        release(&t);
    check_all(&t);
    damage(&t);
    free(t.ram);
    free(t.journal);
    free(t.taken);
    free(t.blocks);
    printf("page_alloc_test: ok, seed %llu, %llu operations\n", (unsigned long long)seed,
           (unsigned long long)operations);
    return 0;
}
