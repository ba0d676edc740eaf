/* What another process gave to this one, and can still spoil: memory that it cuts off, descriptors that it
 * blocks.
 *
 * This header is also read by cffi: no guards, inlines, attributes or shifts in macros here; peer.h includes
 * it. Functions return 0 or a negative errno unless they say otherwise.
 */

/* ---- memory that its owner can cut off ----
 *
 * Access to a mapping of a file past that file's end is SIGBUS, in whichever thread and whatever code, and
 * the owner may shorten the file at any time. With the handler, a fault inside a guarded range puts zeros in
 * place of all of the range and marks it lost: the access goes on, and whoever looks at the mark ends what it
 * was for. A system call on such memory is not a fault: it fails with EFAULT and marks nothing.
 *
 * The table of ranges and the handler belong to the process: a signal handler has no argument. Any thread may
 * call these functions at any time. */

struct peer_range;

/* Take SIGBUS over for good. What is no fault in a guarded range goes on to the handler of before, or kills
 * as it would have. Again is no error; a handler installed over this one by somebody else must pass on what
 * is not his. */
int peer_guard_install(void);
/* Guard a mapping of `len` bytes in pages of `page_size` bytes. NULL if there is no memory for that. */
struct peer_range *peer_guard(void *start, uint64_t len, uint64_t page_size);
/* Before the mapping is removed. */
void peer_unguard(struct peer_range *range);
/* Whether the memory was cut off: from the first fault on, what is read there is not the owner's. */
int peer_lost(const struct peer_range *range);

/* ---- descriptors that their owner can block ----
 *
 * Whether a read or write waits is a flag of the open file description, which the owner has, too: it is his,
 * and may change at any moment. So each call here says for itself that it does not wait. No call says so for
 * a write to an eventfd, which waits while the counter is full; the kernel's own signal, given when
 * asynchronous I/O is complete, never does: at a full counter nothing is added, and the reader is woken all
 * the same. So a read of nothing is submitted, which is complete at once. */

struct peer_signals {
    uint64_t context;
    int nothing; /* an empty file */
};

/* May fail with ENOSYS or EPERM (not allowed here), EAGAIN (fs.aio-max-nr of them are in use), EMFILE. */
int peer_signals_open(struct peer_signals *signals);
/* Signal an eventfd, or a socket: eight bytes, as to the other. -EAGAIN: the socket is full of earlier ones.
 * -EINVAL: neither. */
int peer_signal(struct peer_signals *signals, int fd);
void peer_signals_close(struct peer_signals *signals);
/* Take the signals that have come to an eventfd or a socket. Returns bytes, 0 if a socket's other end is
 * closed; -EAGAIN: none has come. */
int64_t peer_take_signals(int fd);
