/* Signals, and is signalled, without ever waiting for the other end. */

#include <errno.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "peer/peer.h"

/* What was submitted is complete, and its result is of no interest; without room for another none can be. */
static void forget_results(struct peer_signals *signals)
{
    struct io_event results[2];
    struct timespec at_once = {0, 0};

    while (syscall(SYS_io_getevents, (aio_context_t)signals->context, 0L, 2L, results, &at_once) == 2) {
    }
}

int peer_signals_open(struct peer_signals *signals)
{
    aio_context_t context = 0;

    signals->context = 0;
    signals->nothing = memfd_create("nothing", MFD_CLOEXEC);
    if (signals->nothing < 0)
        return -errno;
    if (syscall(SYS_io_setup, 1, &context)) {
        int error = -errno;

        close(signals->nothing);
        return error;
    }
    signals->context = context;
    return 0;
}

static int signal_eventfd(struct peer_signals *signals, int fd)
{
    uint8_t byte;
    struct iocb read_nothing = {
        .aio_lio_opcode = IOCB_CMD_PREAD,
        .aio_fildes = (uint32_t)signals->nothing,
        .aio_buf = (uintptr_t)&byte,
        .aio_nbytes = sizeof(byte),
        .aio_flags = IOCB_FLAG_RESFD,
        .aio_resfd = (uint32_t)fd,
    };
    struct iocb *list[] = {&read_nothing};
    int error = syscall(SYS_io_submit, (aio_context_t)signals->context, 1L, list) == 1 ? 0 : -errno;

    forget_results(signals);
    return error;
}

int peer_signal(struct peer_signals *signals, int fd)
{
    uint64_t one = 1;

    if (send(fd, &one, sizeof(one), MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
        return 0;
    return errno == ENOTSOCK ? signal_eventfd(signals, fd) : -errno;
}

int64_t peer_take_signals(int fd)
{
    uint8_t taken[4096];
    struct iovec into = {taken, sizeof(taken)};
    int64_t n = recv(fd, taken, sizeof(taken), MSG_DONTWAIT);

    if (n < 0 && errno == ENOTSOCK) /* -1: from no position, as read() */
        n = syscall(SYS_preadv2, fd, &into, 1L, -1L, -1L, (long)RWF_NOWAIT);
    return n < 0 ? -errno : n;
}

void peer_signals_close(struct peer_signals *signals)
{
    if (!signals->context)
        return;
    syscall(SYS_io_destroy, (aio_context_t)signals->context);
    close(signals->nothing);
    signals->context = 0;
}
