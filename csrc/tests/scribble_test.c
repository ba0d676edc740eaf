/* A peer that writes into everything it can reach while the other side works there, for the sanitizers: rings
 * and the driver's private state, the allocator's zone and its journal. What comes out may be nonsense, but
 * no call takes more than it was given, leads outside or never ends.
 *
 * scribble_test [SEED [SECONDS]]. Exit 0, or 1 with a line that names the seed.
 */

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "page_alloc/page_alloc.h"
#include "vring/vring.h"

static uint64_t seed, random_state;

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static uint32_t below(uint32_t n)
{
    return (uint32_t)(next_random(&random_state) >> 33) % n;
}

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: %s (seed %llu)\n", __FILE__, __LINE__, #condition,                       \
                    (unsigned long long)seed);                                                               \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

static void *allocate(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 63) / 64 * 64);

    CHECK(p);
    memset(p, 0, bytes);
    return p;
}

/* ---- the peer ---- */

enum { PLACES = 6 };

struct scribbler {
    pthread_t thread;
    int stop;
    uint64_t random;
    uint32_t count;
    struct place {
        uint8_t *at;    /* aligned to 8 */
        uint8_t *sound; /* what stood there when the work began: put back now and then, or nothing gets far */
        size_t bytes;
    } place[PLACES];
};

static void scribble_on(struct scribbler *s, void *at, size_t bytes)
{
    struct place *p = &s->place[s->count++];

    CHECK(s->count <= PLACES);
    p->at = at;
    p->bytes = bytes / 8 * 8;
    p->sound = allocate(p->bytes);
    memcpy(p->sound, at, p->bytes);
}

static void put(uint8_t *at, uint32_t width, uint64_t value)
{
    if (width == 0)
        __atomic_store_n(at, (uint8_t)value, __ATOMIC_RELAXED);
    else if (width == 1)
        __atomic_store_n((uint16_t *)(void *)at, (uint16_t)value, __ATOMIC_RELAXED);
    else if (width == 2)
        __atomic_store_n((uint32_t *)(void *)at, (uint32_t)value, __ATOMIC_RELAXED);
    else
        __atomic_store_n((uint64_t *)(void *)at, value, __ATOMIC_RELAXED);
}

static void *scribble(void *argument)
{
    static const uint64_t odd[] = {
        0,   1,      2,      3,      4,          15,         16,         17,
        512, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0xffffffff, UINT64_MAX, UINT64_MAX - 1};
    struct scribbler *s = argument;

    while (!__atomic_load_n(&s->stop, __ATOMIC_RELAXED)) {
        struct place *p = &s->place[next_random(&s->random) % s->count];
        /* The front has the fields that matter most. */
        size_t reach = next_random(&s->random) % 2 && p->bytes > 512 ? 512 : p->bytes;
        uint32_t width = next_random(&s->random) % 4;
        size_t at = (next_random(&s->random) >> 8) % (reach >> width) << width;
        uint64_t value = next_random(&s->random) % 3
                             ? odd[next_random(&s->random) % (sizeof(odd) / sizeof(odd[0]))]
                             : next_random(&s->random);

        put(p->at + at, width, value);
        if (next_random(&s->random) % 16 == 0) {
            for (size_t i = 0; i < p->bytes; i += 8) {
                uint64_t word;

                memcpy(&word, p->sound + i, 8);
                put(p->at + i, 3, word);
            }
        }
    }
    return NULL;
}

static void begin(struct scribbler *s)
{
    s->stop = 0;
    s->random = next_random(&random_state) | 1;
    CHECK(pthread_create(&s->thread, NULL, scribble, s) == 0);
}

static void end(struct scribbler *s)
{
    __atomic_store_n(&s->stop, 1, __ATOMIC_RELAXED);
    CHECK(pthread_join(s->thread, NULL) == 0);
    for (uint32_t i = 0; i < s->count; i++)
        free(s->place[i].sound);
}

/* ---- a queue ---- */

enum { SIZE = 16, REGION = 0x2000, TURNS = 2000 };

/* Memory of exactly the size that is needed, so that one item too many is caught. */
struct arrays {
    struct vq_seg *segs;
    uint32_t *counts, *lens, *heads;
    uint64_t *tokens, *done;
    struct vq_chain *chains;
};

static struct vq_memory guest(void)
{
    struct vq_memory mem = {.count = 2};

    for (uint32_t i = 0; i < 2; i++)
        mem.region[i] = (struct vq_region){(uint64_t)i * 0x100000, REGION, allocate(REGION)};
    return mem;
}

static void driver_turn(struct vq_driver *q, const struct arrays *a)
{
    uint32_t n = 1 + below(SIZE), max = below(n + 1), at = 0;
    struct vq_driver_io io = {a->segs, below(2) ? a->counts : NULL, a->tokens, a->done, a->lens, max, 0, 0,
                              0};
    int got;

    for (uint32_t i = 0; i < n; i++) {
        a->counts[i] = 1 + below(3);
        if (at + a->counts[i] > SIZE)
            n = i;
        else
            at += a->counts[i];
    }
    switch (below(6)) {
    case 0:
        got = vq_driver_add(q, a->segs, below(2) ? a->counts : NULL, a->tokens, n);
        CHECK(got <= (int)n);
        break;
    case 1:
        CHECK(vq_driver_publish(q) <= 1);
        break;
    case 2:
        CHECK(vq_driver_collect(q, a->done, a->lens, max) <= (int)max);
        break;
    case 3:
        got = vq_driver_exchange(q, &io, n, below(64));
        CHECK(got <= (int)max && io.n_done <= max && io.n_added <= n);
        break;
    case 4:
        CHECK(vq_driver_enable_cb(q, below(SIZE)) <= 1 && vq_driver_disable_cb(q) <= 0);
        break;
    case 5:
        if (below(8) == 0)
            CHECK(vq_driver_detach(q, a->done, SIZE) <= SIZE);
        break;
    }
    CHECK(vq_driver_num_free(q) <= SIZE && q->mask == SIZE - 1);
}

static void device_turn(struct vq_device *q, const struct vq_memory *mem, const struct arrays *a)
{
    uint32_t max = below(SIZE + 1), lens[SIZE] = {0};
    int got = vq_device_pop(q, a->chains, max, a->segs, SIZE);

    CHECK(got <= (int)max);
    for (int i = 0; i < got; i++) {
        const struct vq_chain *chain = &a->chains[i];

        a->heads[i] = chain->head;
        CHECK(chain->head < SIZE && chain->n_segs >= 1 && chain->first_seg + chain->n_segs <= SIZE);
        for (uint32_t k = chain->first_seg; k < chain->first_seg + chain->n_segs; k++)
            CHECK(a->segs[k].len && vq_memory_covers(mem, a->segs[k].addr, a->segs[k].len));
    }
    if (got > 0)
        CHECK(vq_device_push(q, a->heads, lens, (uint32_t)got) >= 0);
    CHECK(vq_device_enable_notify(q) <= 1 && vq_device_disable_notify(q) <= 0);
}

static unsigned long queues(void)
{
    struct scribbler s = {0};
    struct vq_memory mem = guest();
    uint32_t flags = below(4);
    struct vq_ring ring = {SIZE, flags, 0, 0x400, 0x100000};
    uint64_t bytes = vq_driver_state_bytes(SIZE);
    void *state = aligned_alloc(8, bytes);
    struct vq_device_head *held = malloc(SIZE * sizeof(*held));
    struct arrays a = {malloc(SIZE * sizeof(*a.segs)),
                       malloc(SIZE * 4),
                       malloc(SIZE * 4),
                       malloc(SIZE * 4),
                       malloc(SIZE * 8),
                       malloc(SIZE * 8),
                       malloc(SIZE * sizeof(*a.chains))};
    struct vq_driver driver;
    struct vq_device device;
    unsigned long bound = 0;

    CHECK(state && held && a.segs && a.counts && a.lens && a.heads && a.tokens && a.done && a.chains);
    for (uint32_t i = 0; i < SIZE; i++) {
        a.segs[i] = (struct vq_seg){0x1000 + 16 * i, 16, VQ_SEG_WRITE};
        a.tokens[i] = i;
        a.counts[i] = 1;
    }
    CHECK(vq_driver_init(&driver, &mem, &ring, 0x100400, 4, 0, state) == 0);
    CHECK(vq_driver_add(&driver, a.segs, NULL, a.tokens, 6) == 6);
    CHECK(vq_driver_publish(&driver) >= 0);
    scribble_on(&s, state, bytes);
    scribble_on(&s, mem.region[0].host, 0x800);
    scribble_on(&s, mem.region[1].host, 0xc00);
    begin(&s);
    for (int turn = 0; turn < TURNS; turn++) {
        struct vq_driver other;
        uint32_t n = below(SIZE + 1);

        driver_turn(&driver, &a);
        for (uint32_t i = 0; i < n; i++) /* what a broken queue wrote over */
            a.segs[i] = (struct vq_seg){0x1000 + 16 * i, 16, VQ_SEG_WRITE};
        if (vq_driver_bind(&other, &mem, state, bytes) == 0) {
            driver = other;
            bound++;
        } else if (driver.error) {
            CHECK(vq_driver_init(&driver, &mem, &ring, 0x100400, 4, 0, state) == 0);
        }
        if (turn % 32 == 0)
            CHECK(vq_device_init(&device, &mem, &ring, 0, held) == 0);
        device_turn(&device, &mem, &a);
    }
    end(&s);
    free(a.segs);
    free(a.counts);
    free(a.lens);
    free(a.heads);
    free(a.tokens);
    free(a.done);
    free(a.chains);
    free(held);
    free(state);
    free(mem.region[0].host);
    free(mem.region[1].host);
    return bound;
}

/* ---- a zone ---- */

enum { PAGES = 4096, BASE = 512 };

static void zone_turn(const struct pa_view *view, uint64_t *out, uint64_t *map)
{
    uint32_t order = below(PA_MAX_ORDER), n = 1 + below(16);
    uint64_t cursor = 0, where, counts[256];
    uint8_t orders[16];
    struct pa_check_result result;
    int64_t got;
    int error;

    switch (below(8)) {
    case 0:
    case 1:
        got = pa_alloc_bulk(view, order, n, below(2) * PA_ATOMIC, 2, 0, out, &error);
        CHECK(got <= (int64_t)n);
        for (int64_t i = 0; i < got; i++)
            CHECK(out[i] >= view->base_pfn && out[i] + (UINT64_C(1) << order) <= view->end_pfn &&
                  (out[i] & ((UINT64_C(1) << order) - 1)) == 0);
        if (got > 0)
            CHECK(pa_write(view, order, (uint64_t)got, out, 1) <= got << order);
        if (got > 0 && below(4))
            CHECK(pa_free_bulk(view, order, (uint64_t)got, out, &error) <= got);
        break;
    case 2:
        pa_free(view, below(PAGES + 100), order);
        break;
    case 3:
        got = pa_report_take(view, n, out);
        CHECK(got <= (int64_t)n);
        if (got > 0)
            pa_report_return(view, (uint64_t)got, out, below(2));
        CHECK(pa_report_marked(view) <= PAGES >> 10);
        break;
    case 4:
        CHECK(pa_owned(view, &cursor, PAGES, PA_ANY, PA_ANY, 16, out, orders) <= 16 && cursor <= PAGES);
        break;
    case 5:
        pa_verify(view, &where);
        CHECK(pa_count_owners(view, counts) <= PAGES);
        break;
    case 6:
        CHECK(pa_bitmap(view, below(3) ? PA_OWNER_FREE : PA_OWNER_NONE, map, PAGES / 64) <= PAGES);
        pa_check_owned(view, 0, UINT64_MAX, PA_ANY, PA_ANY, &result);
        CHECK(result.pages <= PAGES);
        break;
    case 7:
        if (below(16) == 0)
            CHECK(pa_free_owned(view, 0, UINT64_MAX, PA_ANY, PA_ANY) <= PAGES);
        break;
    }
}

static unsigned long zones(void)
{
    struct scribbler s = {0};
    struct pa_view view = {.region_count = 1}, again;
    uint64_t bytes = PA_JOURNAL_HEADER + PAGES * 8, out[16], map[PAGES / 64];
    uint64_t *log = allocate(PAGES / 8);
    struct pa_journal *journal = allocate(bytes);
    unsigned long attached = 0;

    *journal = (struct pa_journal){PA_JOURNAL_MAGIC, PA_JOURNAL_VERSION, PA_JOURNAL_HEADER, PAGES, 1, 0};
    view.region[0] = (struct pa_region){0, PAGES, allocate((size_t)PAGES * PA_PAGE_SIZE)};
    view.zone_bytes = pa_zone_bytes(PAGES - BASE);
    view.zone = malloc(view.zone_bytes);
    CHECK(view.zone && pa_init(&view, BASE, PAGES, 16, 7) == 0 && pa_add_range(&view, BASE, PAGES) == 0);
    CHECK(pa_journal_use(&view, (uint8_t *)journal, bytes) == 0 && pa_dirty_log_use(&view, log, PAGES) == 0);
    CHECK(pa_alloc_bulk(&view, 3, 16, 0, 3, 1, out, NULL) == 16);
    scribble_on(&s, view.zone, view.zone_bytes);
    scribble_on(&s, view.zone, 512); /* the header, as often as all the rest */
    scribble_on(&s, journal, bytes);
    begin(&s);
    for (int turn = 0; turn < TURNS; turn++) {
        zone_turn(&view, out, map);
        again = view;
        if (pa_attach(&again) == 0) {
            CHECK(again.base_pfn < again.end_pfn &&
                  pa_zone_bytes(again.end_pfn - again.base_pfn) <= view.zone_bytes);
            zone_turn(&again, out, map);
            attached++;
        }
        pa_journal_use(&again, (uint8_t *)journal, bytes);
    }
    end(&s);
    free(view.region[0].host);
    free(view.zone);
    free(journal);
    free(log);
    return attached;
}

int main(int argc, char **argv)
{
    time_t until = time(NULL) + (argc > 2 ? atoi(argv[2]) : 5);
    unsigned long rounds = 0, bound = 0, attached = 0;

    seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    random_state = seed * 0x9e3779b97f4a7c15u | 1;
    do {
        bound += queues();
        attached += zones();
        rounds++;
    } while (time(NULL) < until || !bound || !attached);
    printf("scribble_test: ok, seed %llu, %lu rounds, %lu times bound, %lu attached\n",
           (unsigned long long)seed, rounds, bound, attached);
    return 0;
}
