/* The split virtqueue (VIRTIO 1.2 to 1.4, section 2.7), both halves, and the table of guest memory they work
 * on.
 *
 * This header is also read by cffi: no guards, inlines, attributes or shifts in macros here; vring.h includes
 * it. Nothing here allocates, blocks (beyond a bound the caller gives), keeps globals or knows Python.
 */

/* ---- errors: one enum for all of csrc/vring; functions return a count >= 0 or one of these ---- */

enum vq_error {
    VQ_ESIZE =
        -1, /* queue size is 0, over 32768 or no power of two                 split.layout, ring.size-1 */
    VQ_EALIGN =
        -2, /* ring part misaligned: 16, 2, 4 bytes                            split.layout.driver-1 */
    VQ_ERANGE_RING = -3, /* ring part not inside one region of guest memory */
    VQ_EBROKEN = -4,     /* the queue broke earlier and waits for a reset */
    VQ_EINVAL = -5,      /* the caller's argument is wrong */
    VQ_ENOTHELD = -6,    /* device half: the caller returns a head it does not hold, or not in that order */
    VQ_ESTATE = -7,      /* driver half: the saved private state is no state of this queue, or damaged */
    VQ_ECLOSED = -8,     /* the table of guest memory is empty: it was unmapped, and the ring with it */
    /* found by the device half in what the driver wrote */
    VQ_EAVAIL_AHEAD =
        -16, /* avail idx is further ahead than the queue size, or was moved back  split.avail.driver-1 */
    VQ_EHEAD = -17, /* avail ring names a descriptor outside the table */
    VQ_ENEXT = -18, /* a next field points outside the table */
    VQ_ELOOP =
        -19, /* a chain is longer than the table: it loops                        split.desc.driver-1 */
    VQ_EORDER = -20, /* a readable descriptor after a writable one split.framing.driver-1 */
    VQ_EZERO = -21,  /* a descriptor of length 0 */
    VQ_EADDR = -22,  /* a buffer (or indirect table) is not inside guest memory */
    VQ_ETOTAL =
        -23, /* a chain of more than 2^32 bytes                                   split.desc.driver-1 */
    VQ_EINDIRECT = -24,      /* INDIRECT although not negotiated      split.indirect.driver-1 */
    VQ_EINDIRECT_NEST = -25, /* an indirect table inside another split.indirect.driver-2 */
    VQ_EINDIRECT_NEXT = -26, /* INDIRECT together with NEXT split.indirect.driver-4 */
    VQ_EINDIRECT_SIZE = -27, /* indirect table empty, or no multiple of 16; longer than the queue size is
                              * allowed, for that bounds the chain, not the table */
    VQ_ESEGS =
        -28, /* the caller's segment array cannot hold one whole chain (caller's fault, queue unharmed) */
    VQ_EINUSE = -29, /* the same head was made available twice before it was used */
    /* found by the driver half in what the device wrote */
    VQ_EUSED_AHEAD = -40, /* used idx is further ahead than buffers are outstanding, or moved back */
    VQ_EUSED_ID = -41,    /* a used element names no outstanding chain */
    VQ_EUSED_LEN = -42,   /* used len is larger than the writable part of the chain   split.used.device-2 */
    /* found by the driver half in what its caller asks; nothing was added */
    VQ_ETOOLONG = -48,  /* a chain longer than the queue size, or of no segment  split.indirect.driver-3 */
    VQ_EBADSEG = -49,   /* a segment of length 0 or with unknown flags, or a chain over 2^32 bytes */
    VQ_EBADORDER = -50, /* a readable segment after a writable one split.framing.driver-1 */
};

/* ---- layout facts, written once ---- */

#define VRING_DESC_F_NEXT          1
#define VRING_DESC_F_WRITE         2
#define VRING_DESC_F_INDIRECT      4
#define VRING_AVAIL_F_NO_INTERRUPT 1
#define VRING_USED_F_NO_NOTIFY     1
#define VRING_MAX_SIZE             32768

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

#define VQ_MAX_REGIONS 64

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

/* ---- what both halves take and give ---- */

#define VQ_F_EVENT_IDX 1 /* EVENT_IDX was negotiated */
#define VQ_F_INDIRECT  2 /* INDIRECT_DESC was negotiated */
#define VQ_F_LAX_LEN                                                                                         \
    4 /* driver half: cut a used len that is too large instead of breaking the queue (some devices           \
       * report lengths for buffers they only read) */

#define VQ_SEG_WRITE 2 /* the device writes this segment; otherwise it reads it */

/* Where a queue lies, as the transport tells it. Addresses are guest addresses. */
struct vq_ring {
    uint32_t size;  /* entries, a power of two up to VRING_MAX_SIZE */
    uint32_t flags; /* VQ_F_... */
    uint64_t desc;
    uint64_t avail;
    uint64_t used;
};

/* One piece of a buffer. */
struct vq_seg {
    uint64_t addr;  /* guest address */
    uint32_t len;   /* bytes, never 0 */
    uint32_t flags; /* 0 or VQ_SEG_WRITE */
};

/* One buffer as the device half hands it out: segs[first_seg .. first_seg + n_segs), readable ones first. */
struct vq_chain {
    uint32_t head; /* what to give to vq_device_push */
    uint32_t n_segs;
    uint32_t first_seg;
    uint32_t n_readable; /* segments */
    uint64_t readable;   /* bytes */
    uint64_t writable;   /* bytes */
};

/* Bytes of the three parts of a ring of `size` entries (0 for a bad size). */
uint64_t vq_desc_bytes(uint32_t size);
uint64_t vq_avail_bytes(uint32_t size);
uint64_t vq_used_bytes(uint32_t size);

/* Whether [addr, addr + len) is all guest memory, in one region or in several that touch. 1 or 0. */
int vq_memory_covers(const struct vq_memory *mem, uint64_t addr, uint64_t len);
/* Host address of [addr, addr + len), NULL unless one region holds it all. */
void *vq_memory_at(const struct vq_memory *mem, uint64_t addr, uint64_t len);

/* ---- driver half ----
 *
 * Its private state may lie inside guest RAM, so that it travels with a migrated guest: it holds guest
 * addresses and counters, no pointers. struct vq_driver is the binding of one process to such a state.
 *
 * The device can write that state, so it is written and not believed: places, sizes, indices and errors count
 * as the binding has them, which are read from the state once, by vq_driver_bind. Lists and tokens are in
 * the state alone; numbers found there are masked or bounded, and a token is to be checked by who gets it. */

struct vq_driver_head { /* one per descriptor, in use where it heads a chain */
    uint64_t token;
    uint32_t writable; /* bytes the device may write, cut to 2^32 - 1 */
    uint16_t count;    /* descriptors of the table in the chain; 0: heads no chain */
    uint16_t position; /* avail idx it was added at */
};

struct vq_driver_state { /* followed by struct vq_driver_head[size], uint16_t free_ring[size], uint16_t
                            next[size] */
    uint32_t magic;
    uint32_t size;
    uint32_t flags;
    uint32_t indirect_len; /* descriptors of one indirect table, 0 for none */
    uint64_t desc;
    uint64_t avail;
    uint64_t used;
    uint64_t indirect;        /* guest address of size * indirect_len descriptors */
    uint16_t avail_next;      /* avail idx after everything added */
    uint16_t avail_published; /* avail idx the device may see */
    uint16_t used_next;       /* used idx up to which buffers were collected */
    uint16_t used_seen;       /* device's used idx when last read */
    uint16_t free_head; /* free_ring[free_head .. free_tail) are free descriptors, positions mod 65536 */
    uint16_t free_tail;
    uint16_t outstanding; /* chains added and not collected */
    uint16_t reserved;
    int32_t error;       /* code that broke the queue, or 0 */
    uint32_t bad_index;  /* with it: used ring position */
    uint32_t bad_id;     /* and what stood there */
    uint32_t cut_lens;   /* used lengths cut under VQ_F_LAX_LEN */
    int32_t pending;     /* error found behind good buffers, for the next call */
    uint8_t padding[44]; /* to 128 bytes */
};

struct vq_driver {
    struct vq_driver_state *state;
    struct vq_driver_head *heads;
    uint16_t *free_ring;
    uint16_t *next;
    struct vring_desc *desc;
    struct vring_desc *indirect;
    uint16_t *avail; /* flags, idx, ring[size], used_event */
    uint16_t *used;  /* flags, idx, elements, avail_event */
    const struct vq_memory *mem;
    uint32_t mask; /* size - 1 */
    uint32_t flags;
    /* as in the state */
    uint16_t avail_next;
    uint16_t avail_published;
    uint16_t used_next;
    uint16_t used_seen;
    uint16_t free_head;
    uint16_t free_tail;
    uint16_t outstanding;
    uint16_t reserved;
    int32_t error;
    int32_t pending;
    uint32_t bad_index;
    uint32_t bad_id;
    uint32_t cut_lens;
    uint32_t indirect_len;
    uint64_t indirect_addr; /* guest address of the tables at `indirect` */
    struct vq_ring ring;
};

/* Arguments and results of vq_driver_exchange that stay the same from call to call. */
struct vq_driver_io {
    const struct vq_seg *segs; /* in: buffers to add, as for vq_driver_add */
    const uint32_t *counts;
    const uint64_t *tokens;
    uint64_t *done_tokens; /* out: buffers collected, as for vq_driver_collect */
    uint32_t *done_lens;
    uint32_t max_done;
    uint32_t n_added; /* results */
    uint32_t n_done;
    uint32_t kick;
};

/* Bytes of private state for a queue of `size` entries; 0 for a bad size. Align it to 8 (64 is faster). */
uint64_t vq_driver_state_bytes(uint32_t size);

/* Start a queue: check `ring`, zero avail and used ring (split.availnotif.driver-1), write the state, bind to
 * it. `mem` must live as long as the queue; every call but vq_driver_num_free returns VQ_ECLOSED once its
 * count is 0. `indirect` is the guest address of size * indirect_len descriptors, used for chains of 2 to
 * indirect_len segments when VQ_F_INDIRECT is set. `base` is the first avail and used idx: 0 for a fresh
 * queue. The device must not be running on this ring. Callbacks start enabled. Returns 0, VQ_ESIZE,
 * VQ_EALIGN, VQ_ERANGE_RING, or VQ_EINVAL (state NULL or misaligned, indirect_len over size); on error *q is
 * as it was. */
int vq_driver_init(struct vq_driver *q, const struct vq_memory *mem, const struct vq_ring *ring,
                   uint64_t indirect, uint32_t indirect_len, uint16_t base, void *state);

/* Bind to a state that vq_driver_init wrote, in this process or another one, and go on with it: the binding
 * before it must not be used again. `state_bytes` is how much memory there is at `state`. The state is
 * checked as a whole; nothing is written. Returns as vq_driver_init, or VQ_ESTATE. */
int vq_driver_bind(struct vq_driver *q, const struct vq_memory *mem, void *state, uint64_t state_bytes);

/* Add n buffers; the device sees them after vq_driver_publish. counts[i] segments make buffer i; counts NULL:
 * one each. Segments are not checked to be guest memory: the device does that. Returns how many fitted (the
 * first so many), VQ_EBROKEN, VQ_EINVAL, VQ_ETOOLONG, VQ_EBADSEG or VQ_EBADORDER. */
int vq_driver_add(struct vq_driver *q, const struct vq_seg *segs, const uint32_t *counts,
                  const uint64_t *tokens, uint32_t n);

/* Show the device everything added. Returns 1 if it must now be kicked, 0 if not, or VQ_EBROKEN. */
int vq_driver_publish(struct vq_driver *q);

/* Take up to max used buffers: their tokens and how many bytes the device wrote.
 * Returns how many; VQ_EUSED_AHEAD, VQ_EUSED_ID, VQ_EUSED_LEN (once, and the queue is broken from then on;
 * buffers before the bad one in the same batch are returned first, the error by the next call), then
 * VQ_EBROKEN. */
int vq_driver_collect(struct vq_driver *q, uint64_t *tokens, uint32_t *lens, uint32_t max);

/* Collect, add n_add buffers of io->segs, publish. When not all of them fitted (n_add 0: when nothing was
 * collected) and no kick is due, poll the used ring up to `spins` times and go on. io gets n_added, n_done,
 * kick. Returns n_done or an error of the three (buffers collected before it are still in io). */
int vq_driver_exchange(struct vq_driver *q, struct vq_driver_io *io, uint32_t n_add, uint32_t spins);

/* Ask for an interrupt once `delay` more buffers than the next one were used (cut to what is outstanding; 0:
 * at the next one; without EVENT_IDX always 0). One interrupt: collect everything and call it again for
 * another. Returns 1 if that point has passed already: no interrupt will come, collect. 0 otherwise, or an
 * error as collect, also one that was found behind the buffers collected last. */
int vq_driver_enable_cb(struct vq_driver *q, uint32_t delay);

/* Ask for no interrupts (a hint: they may still come, split.usednotif.driver-5). Returns 0 or VQ_EBROKEN. */
int vq_driver_disable_cb(struct vq_driver *q);

/* After a reset of the device: give up all outstanding buffers, published or not, in no particular order, and
 * start the ring again from index 0. Works on a broken queue. Returns how many tokens were written, at most
 * as many as buffers are outstanding; VQ_EINVAL and no effect if those are more than max. */
int vq_driver_detach(struct vq_driver *q, uint64_t *tokens, uint32_t max);

/* Free descriptors of the table. */
uint32_t vq_driver_num_free(const struct vq_driver *q);

/* ---- device half: its state is the host process's own ---- */

struct vq_device_head { /* one per descriptor; zero before vq_device_init */
    uint32_t writable;  /* bytes, cut to 2^32 - 1 */
    uint16_t position;  /* avail idx it was popped at */
    uint16_t held;      /* 1 from pop to push */
};

struct vq_device {
    const struct vq_memory *mem;
    struct vring_desc *desc;
    uint16_t *avail;
    uint16_t *used;
    struct vq_device_head *heads; /* caller's memory */
    uint32_t size;
    uint32_t flags;
    uint32_t region;     /* region that held the last buffer */
    uint16_t avail_next; /* next avail ring position to pop: the base index for GET_VRING_BASE */
    uint16_t avail_seen; /* driver's avail idx when last read */
    uint16_t used_next;
    uint16_t reserved;
    uint32_t in_flight;
    int32_t pending;    /* error found behind good chains, for the next call */
    int32_t error;      /* code that broke the queue, or 0 */
    uint32_t bad_index; /* with it: avail ring position */
    uint32_t bad_desc;  /* and descriptor (of the indirect table where that is bad) */
    uint64_t bad_addr;  /* and the address or value in question */
    struct vq_ring ring;
};

/* Arguments and results of vq_device_exchange that stay the same from call to call. */
struct vq_device_io {
    struct vq_chain *chains; /* out */
    struct vq_seg *segs;     /* out */
    uint32_t *heads;         /* in: heads to push; out: heads of the chains popped */
    uint32_t *lens;          /* in: bytes written; out: 0 for each chain popped */
    uint32_t max_chains;
    uint32_t max_segs; /* at least the queue size, or long chains give VQ_ESEGS */
    uint32_t n_chains; /* results */
    uint32_t n_segs;
    uint32_t notify;
};

/* Attach to a ring that a driver set up. `mem` must live as long as the queue; every call returns VQ_ECLOSED
 * once its count is 0. `heads` is memory for ring->size entries and is zeroed; `base` the
 * avail idx to start from, and the used idx (nothing is in flight): 0 or what SET_VRING_BASE said. Returns 0,
 * VQ_ESIZE, VQ_EALIGN, VQ_ERANGE_RING or VQ_EINVAL. */
int vq_device_init(struct vq_device *q, const struct vq_memory *mem, const struct vq_ring *ring,
                   uint16_t base, struct vq_device_head *heads);

/* Go on with another table of the same guest memory. Returns as vq_device_init; on error nothing has changed.
 */
int vq_device_rebind(struct vq_device *q, const struct vq_memory *mem);

/* Take up to max_chains buffers. Every segment is checked to be guest memory.
 * Returns how many; 0 if there is none; one of VQ_EAVAIL_AHEAD to VQ_EINUSE (once, and the queue is broken
 * from then on; buffers before the bad one in the same batch are returned first, the error by the next call),
 * then VQ_EBROKEN. VQ_ESEGS: max_segs cannot hold the next chain; nothing was taken, the queue is unharmed.
 */
int vq_device_pop(struct vq_device *q, struct vq_chain *chains, uint32_t max_chains, struct vq_seg *segs,
                  uint32_t max_segs);

/* Give n buffers back, in any order; lens[i] is how many bytes were written into buffer i from its first
 * writable one. Returns 1 if the driver must now be interrupted, 0 if not; VQ_ENOTHELD or VQ_EINVAL (len over
 * the writable part) and nothing was given back; VQ_EBROKEN. */
int vq_device_push(struct vq_device *q, const uint32_t *heads, const uint32_t *lens, uint32_t n);

/* Push the first n_push of io->heads and io->lens, then pop up to max_pop (at most io->max_chains) into io.
 * When there is nothing to pop and no interrupt is due, poll the avail ring up to `spins` times.
 * Returns as vq_device_pop, or an error of vq_device_push (then nothing was popped); io->notify is always
 * set. */
int vq_device_exchange(struct vq_device *q, struct vq_device_io *io, uint32_t n_push, uint32_t max_pop,
                       uint32_t spins);

/* Ask to be kicked at the next buffer. Returns 1 if buffers are pending already (no kick will come: pop), 0
 * if not, or an error as pop, also one that was found behind the buffers popped last. One kick: drain the
 * queue and call it again for another. */
int vq_device_enable_notify(struct vq_device *q);

/* Ask for no kicks (a hint: they may still come, split.availnotif.device-5). Returns 0 or VQ_EBROKEN. */
int vq_device_disable_notify(struct vq_device *q);

/* Undo the pop of the n most recently popped buffers, given in the order they were popped, none pushed since.
 * avail_next moves back by n; a device saved now finds them again. Returns 0, or VQ_ENOTHELD and no effect.
 */
int vq_device_unpop(struct vq_device *q, const uint32_t *heads, uint32_t n);
