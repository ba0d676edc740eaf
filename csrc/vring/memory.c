/* Finding guest addresses in this process. The table is the caller's and trusted; the addresses are not. */

#include "vring/vring_internal.h"

static int size_ok(uint32_t size)
{
    return size != 0 && size <= VRING_MAX_SIZE && (size & (size - 1)) == 0;
}

uint64_t vq_desc_bytes(uint32_t size)
{
    return size_ok(size) ? (uint64_t)size * sizeof(struct vring_desc) : 0;
}

uint64_t vq_avail_bytes(uint32_t size)
{
    return size_ok(size) ? 6 + (uint64_t)size * 2 : 0; /* flags, idx, ring, used_event */
}

uint64_t vq_used_bytes(uint32_t size)
{
    return size_ok(size) ? 6 + (uint64_t)size * sizeof(struct vring_used_elem)
                         : 0; /* flags, idx, ring, avail_event */
}

uint32_t vq_memory_region(const struct vq_memory *mem, uint64_t addr)
{
    const uint32_t count = mem->count < VQ_MAX_REGIONS ? mem->count : VQ_MAX_REGIONS;
    uint32_t low = 0, high = count;

    while (low < high) { /* the first region that begins after addr */
        uint32_t middle = (low + high) / 2;

        if (mem->region[middle].gpa <= addr)
            low = middle + 1;
        else
            high = middle;
    }
    return low && addr - mem->region[low - 1].gpa < mem->region[low - 1].size ? low - 1 : VQ_MAX_REGIONS;
}

void *vq_memory_at(const struct vq_memory *mem, uint64_t addr, uint64_t len)
{
    const uint32_t i = vq_memory_region(mem, addr);
    const struct vq_region *r = &mem->region[i];

    if (i == VQ_MAX_REGIONS || len > r->size - (addr - r->gpa))
        return NULL;
    return r->host + (addr - r->gpa);
}

int vq_memory_covers(const struct vq_memory *mem, uint64_t addr, uint64_t len)
{
    if (len == 0 || addr + len < addr)
        return 0;
    for (;;) { /* eat the range from its front */
        const uint32_t i = vq_memory_region(mem, addr);
        const struct vq_region *r = &mem->region[i];

        if (i == VQ_MAX_REGIONS)
            return 0;
        if (len <= r->size - (addr - r->gpa))
            return 1;
        len -= r->size - (addr - r->gpa);
        addr = r->gpa + r->size;
    }
}

static void *part_at(const struct vq_memory *mem, uint64_t addr, uint64_t len, uint64_t align, int *error)
{
    uint8_t *p = vq_memory_at(mem, addr, len);

    if (!p)
        *error = VQ_ERANGE_RING;
    else if ((addr | (uintptr_t)p) & (align - 1))
        *error = VQ_EALIGN; /* the mapping counts too: an emulator's buffer may start anywhere */
    return p;
}

int vq_parts_find(struct vq_parts *parts, const struct vq_memory *mem, const struct vq_ring *ring)
{
    int error = 0;

    if (!size_ok(ring->size))
        return VQ_ESIZE;
    if (ring->desc & 15 || ring->avail & 1 || ring->used & 3)
        return VQ_EALIGN; /* split.layout.driver-1 */
    parts->desc = part_at(mem, ring->desc, vq_desc_bytes(ring->size), 16, &error);
    parts->avail = part_at(mem, ring->avail, vq_avail_bytes(ring->size), 2, &error);
    parts->used = part_at(mem, ring->used, vq_used_bytes(ring->size), 4, &error);
    return error;
}
