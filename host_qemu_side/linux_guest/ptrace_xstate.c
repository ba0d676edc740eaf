/* A ptrace() to be preloaded into User-Mode Linux: completes writes of processor state that are too short.
 *
 * Kernels up to 6.12 keep 2696 bytes of extended state (NT_X86_XSTATE: SSE, AVX, AVX-512, PKRU) for a
 * process. A host with more of it (AMX: 11008 bytes) reads as much of it as the buffer takes, but accepts
 * only the whole of it back: EFAULT, and the guest panics with its first program. Here such a write is laid
 * over zeros of the whole size, so that what the guest does not know is in its initial state; all else is
 * passed on as it is.
 *
 * `ptrace_xstate.py` compiles it, puts it in place and reads the counters. Knows nothing of guests.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

#define COUNTERS_FD "PTRACE_XSTATE_COUNTERS"

/* Shared with whoever started this program; only ever counted up, read without order. */
struct counters {
    _Atomic uint64_t calls, completed;
};

static struct counters unshared, *counters = &unshared;
static long (*real_ptrace)(enum __ptrace_request, ...);

/* Not on the stack: User-Mode Linux calls from kernel stacks of 16 KiB. The kernels that need this run one
 * process at a time; newer ones have buffers of the whole size. */
static _Alignas(64) unsigned char state[64 << 10];

__attribute__((constructor)) static void begin(void)
{
    *(void **)&real_ptrace = dlsym(RTLD_NEXT, "ptrace");
    const char *fd = getenv(COUNTERS_FD);
    if (fd) {
        void *shared = mmap(NULL, sizeof *counters, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(fd), 0);
        if (shared != MAP_FAILED)
            counters = shared;
    }
}

/* Bytes of the whole state as the host's kernel has it, 0 if it does not say. */
static size_t whole_size(pid_t pid)
{
    static size_t size;
    if (!size) {
        struct iovec all = {state, sizeof state};
        if (real_ptrace(PTRACE_GETREGSET, pid, (void *)NT_X86_XSTATE, &all) == 0 &&
            all.iov_len < sizeof state)
            size = all.iov_len;
    }
    return size;
}

long ptrace(enum __ptrace_request request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    pid_t pid = va_arg(arguments, pid_t);
    void *addr = va_arg(arguments, void *);
    void *data = va_arg(arguments, void *);
    va_end(arguments);

    atomic_fetch_add_explicit(&counters->calls, 1, memory_order_relaxed);
    if (request == PTRACE_SETREGSET && (uintptr_t)addr == NT_X86_XSTATE) {
        const struct iovec *given = data;
        size_t whole = whole_size(pid);
        if (given->iov_base && given->iov_len && given->iov_len < whole) {
            struct iovec all = {state, whole};
            memcpy(state, given->iov_base, given->iov_len);
            memset(state + given->iov_len, 0, whole - given->iov_len);
            atomic_fetch_add_explicit(&counters->completed, 1, memory_order_relaxed);
            return real_ptrace(request, pid, addr, &all);
        }
    }
    return real_ptrace(request, pid, addr, data);
}
