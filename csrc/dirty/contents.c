/* What is in a page: zero or not, its digest, and taking pages for sending. */
#include "dirty/dirty.h"

#include <string.h>

#define WORDS (DIRTY_PAGE_SIZE / 8)

static int bit(const uint64_t *map, uint64_t n)
{
    return map[n / 64] >> n % 64 & 1;
}

int dirty_page_is_zero(const uint8_t *page)
{
    /* Most pages that are not zero show it at once; the rest is read in strides the compiler can vectorise.
     */
    uint64_t head[8];
    memcpy(head, page, sizeof head);
    if (head[0] | head[1] | head[2] | head[3] | head[4] | head[5] | head[6] | head[7])
        return 0;
    for (size_t at = 0; at < DIRTY_PAGE_SIZE; at += 256) {
        uint64_t block[32], any = 0;
        memcpy(block, page + at, sizeof block);
        for (size_t i = 0; i < 32; i++)
            any |= block[i];
        if (any)
            return 0;
    }
    return 1;
}

static uint64_t fold(uint64_t a, uint64_t b)
{
    const unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* 64 bits over one page: four lanes, each a chain of 64x64->128 multiplications folded by xor. Each word
 * enters together with its position's odd constant, so neither swapped words nor shifted content give the
 * same digest. */
static uint64_t digest(const uint8_t *page)
{
    static const uint64_t key[4] = {UINT64_C(0x9e6c63d0a51b2f37), UINT64_C(0xc2b2ae3d4b9f1e85),
                                    UINT64_C(0x8a5cd789635d2dff), UINT64_C(0xd6e8feb86659fd93)};
    uint64_t lane[4] = {key[1], key[2], key[3], key[0]};
    for (size_t w = 0; w < WORDS; w += 8) {
        uint64_t in[8];
        memcpy(in, page + w * 8, sizeof in);
        for (size_t i = 0; i < 4; i++)
            lane[i] = fold(in[2 * i] ^ key[i], in[2 * i + 1] ^ lane[i]) + (lane[i] << 1 | lane[i] >> 63);
    }
    return fold(lane[0] ^ (lane[1] + key[0]), lane[2] ^ (lane[3] + key[2])) ^
           fold(lane[1] ^ key[3], lane[3] ^ lane[0]);
}

void dirty_digest_pages(const uint8_t *base, uint64_t n, const uint64_t *present, uint64_t first,
                        uint64_t *digests)
{
    for (uint64_t i = 0; i < n; i++) {
        const uint8_t *page = base + i * DIRTY_PAGE_SIZE;
        if ((present && !bit(present, first + i)) || dirty_page_is_zero(page)) {
            /* An untouched array of zeros stays untouched: for a sparse guest most of it is never allocated.
             */
            if (digests[i])
                digests[i] = 0;
            continue;
        }
        const uint64_t d = digest(page);
        digests[i] = d ? d : 1;
    }
}

void dirty_take_pages(uint64_t *map, const uint64_t *present, const uint8_t *base, uint64_t base_page,
                      uint64_t *cursor, uint64_t end, uint8_t *data, uint64_t *pages, uint64_t max_pages,
                      uint64_t *zeros, uint64_t max_zeros, struct dirty_take *out)
{
    uint64_t at = *cursor;
    out->n_pages = out->n_zeros = 0;
    while (at < end && out->n_pages < max_pages && out->n_zeros < max_zeros) {
        const uint64_t rest = map[at / 64] & (~UINT64_C(0) << at % 64);
        if (!rest) {
            at = (at | 63) + 1;
            continue;
        }
        const uint64_t page = (at & ~UINT64_C(63)) + (uint64_t)__builtin_ctzll(rest);
        if (page >= end)
            break;
        const uint8_t *from = base + (page - base_page) * DIRTY_PAGE_SIZE;
        map[page / 64] &= ~(UINT64_C(1) << page % 64);
        if (present && !bit(present, page)) {
            zeros[out->n_zeros++] = page;
        } else {
            /* Copy first, then look: the guest may write while we read, and what was judged must be what is
             * sent. */
            uint8_t *copy = data + out->n_pages * DIRTY_PAGE_SIZE;
            memcpy(copy, from, DIRTY_PAGE_SIZE);
            if (dirty_page_is_zero(copy))
                zeros[out->n_zeros++] = page;
            else
                pages[out->n_pages++] = page;
        }
        at = page + 1;
    }
    *cursor = at < end ? at : end;
    if (out->n_pages < max_pages && out->n_zeros < max_zeros)
        *cursor = end;
}
