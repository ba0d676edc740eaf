/* What the batch allocation API saves, without Python: run by alloc_bulk.py, prints "order blocks one bulk
 * free freebulk". */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "page_alloc/page_alloc.h"

#define PAGES  262144
#define ROUNDS 15

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values)
{
    qsort(values, ROUNDS, sizeof(*values), ascending);
    return values[ROUNDS / 2];
}

int main(void)
{
    static const uint32_t orders[] = {0, 4, 10};
    struct pa_view view = {0};
    view.zone_bytes = pa_zone_bytes(PAGES);
    view.zone = aligned_alloc(4096, (view.zone_bytes + 4095) / 4096 * 4096);
    uint64_t *pfns = calloc(PAGES, sizeof(*pfns));
    view.region_count = 1;
    view.region[0] = (struct pa_region){0, PAGES, view.zone}; /* pages are never touched */
    if (!view.zone || !pfns || pa_init(&view, 0, PAGES, 0, 0) || pa_add_range(&view, 0, PAGES))
        return 1;
    for (uint32_t o = 0; o < sizeof(orders) / sizeof(orders[0]); o++) {
        uint32_t order = orders[o];
        uint64_t n = PAGES >> order;
        uint64_t repeat = n < 4096 ? 4096 / n : 1;
        double took[4][ROUNDS] = {{0}};
        for (uint32_t round = 0; round < ROUNDS; round++) {
            for (uint64_t k = 0; k < repeat; k++) {
                int error;
                double t0 = now();
                for (uint64_t i = 0; i < n; i++)
                    pfns[i] = (uint64_t)pa_alloc(&view, order, 0, PA_OWNER_KERNEL, 0);
                double t1 = now();
                for (uint64_t i = 0; i < n; i++)
                    pa_free(&view, pfns[i], order);
                double t2 = now();
                if (pa_alloc_bulk(&view, order, n, 0, PA_OWNER_KERNEL, 0, pfns, &error) != (int64_t)n)
                    return 1;
                double t3 = now();
                if (pa_free_bulk(&view, order, n, pfns, &error) != (int64_t)n)
                    return 1;
                double t4 = now();
                took[0][round] += t1 - t0;
                took[1][round] += t3 - t2;
                took[2][round] += t2 - t1;
                took[3][round] += t4 - t3;
            }
        }
        printf("%u %llu", order, (unsigned long long)n);
        for (uint32_t i = 0; i < 4; i++)
            printf(" %.2f", median(took[i]) / (double)(n * repeat));
        printf("\n");
    }
    free(view.zone);
    free(pfns);
    return 0;
}
