/* The split virtqueue (VIRTIO 1.2 to 1.4, section 2.7), both halves, and the table of guest memory they work on.
 *
 * This header is also read by cffi: no guards, inlines, attributes or shifts in macros here; vring.h includes it.
 * Nothing here allocates, blocks (beyond a bound the caller gives), keeps globals or knows Python.
 */

/* ---- errors: one enum for all of csrc/vring; functions return a count >= 0 or one of these ---- */

enum vq_error {
    VQ_ESIZE = -1,         /* queue size is 0, over 32768 or no power of two                 split.layout, ring.size-1 */
    VQ_EALIGN = -2,        /* ring part misaligned: 16, 2, 4 bytes                            split.layout.driver-1 */
    VQ_ERANGE_RING = -3,   /* ring part not inside one region of guest memory */
    VQ_EBROKEN = -4,       /* the queue broke earlier and waits for a reset */
    VQ_EINVAL = -5,        /* the caller's argument is wrong */
    /* found by the device half in what the driver wrote */
    VQ_EAVAIL_AHEAD = -16, /* avail idx is further ahead than the queue size, or was moved back  split.avail.driver-1 */
    VQ_EHEAD = -17,        /* avail ring names a descriptor outside the table */
    VQ_ENEXT = -18,        /* a next field points outside the table */
    VQ_ELOOP = -19,        /* a chain is longer than the table: it loops                        split.desc.driver-1 */
    VQ_EORDER = -20,       /* a readable descriptor after a writable one                        split.framing.driver-1 */
    VQ_EZERO = -21,        /* a descriptor of length 0 */
    VQ_EADDR = -22,        /* a buffer (or indirect table) is not inside guest memory */
    VQ_ETOTAL = -23,       /* a chain of more than 2^32 bytes                                   split.desc.driver-1 */
    VQ_EINDIRECT = -24,    /* INDIRECT although not negotiated                                  split.indirect.driver-1 */
    VQ_EINDIRECT_NEST = -25, /* an indirect table inside another                                split.indirect.driver-2 */
    VQ_EINDIRECT_NEXT = -26, /* INDIRECT together with NEXT                                     split.indirect.driver-4 */
    VQ_EINDIRECT_SIZE = -27, /* indirect table empty, no multiple of 16, or over the queue size split.indirect.driver-3 */
    VQ_ESEGS = -28,        /* the caller's segment array cannot hold one whole chain (caller's fault, queue unharmed) */
    VQ_EINUSE = -29,       /* the same head was made available twice before it was used */
    /* found by the driver half in what the device wrote */
    VQ_EUSED_AHEAD = -40,  /* used idx is further ahead than buffers are outstanding, or moved back */
    VQ_EUSED_ID = -41,     /* a used element names no outstanding chain */
    VQ_EUSED_LEN = -42,    /* used len is larger than the writable part of the chain            split.used.device-2 */
    /* found by the driver half in what its caller asks */
    VQ_ETOOLONG = -48,     /* a chain longer than the queue size */
};

/* ---- layout facts, written once ---- */

#define VRING_DESC_F_NEXT 1
#define VRING_DESC_F_WRITE 2
#define VRING_DESC_F_INDIRECT 4
#define VRING_AVAIL_F_NO_INTERRUPT 1
#define VRING_USED_F_NO_NOTIFY 1
#define VRING_MAX_SIZE 32768

struct vring_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};

struct vring_used_elem {
    uint32_t id;
    uint32_t len;
};

/* ---- guest memory: the regions a queue may reach ---- */

#define VQ_MAX_REGIONS 16

struct vq_region {
    uint64_t gpa;  /* first guest physical address */
    uint64_t size; /* bytes */
    uint8_t *host; /* where it is mapped in this process */
};

struct vq_memory {
    uint32_t count;
    uint32_t reserved;
    struct vq_region region[VQ_MAX_REGIONS]; /* sorted by gpa, not overlapping */
};
