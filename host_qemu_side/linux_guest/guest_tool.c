/* What runs inside the Linux guest: fills and empties memory (churn), dirties it (writer), and keeps pages
 * whose content can be judged from a memory image alone (tagger; the reader is tags.py, which repeats the
 * layout below).
 *
 * Linked statically against libc, started by the guest's /init. Knows nothing of balloons or migration.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE  4096u
#define WORDS (PAGE / 8)

/* ---- numbers ---- */

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

struct rng {
    uint64_t key, at;
};

static uint64_t next(struct rng *r)
{
    return mix(r->key + 0x9e3779b97f4a7c15u * r->at++);
}

static uint64_t size_arg(const char *text)
{
    char *end;
    double value = strtod(text, &end);
    switch (*end) {
    case 'K':
    case 'k':
        value *= 1024;
        break;
    case 'M':
    case 'm':
        value *= 1048576;
        break;
    case 'G':
    case 'g':
        value *= 1073741824;
        break;
    default:
        break;
    }
    return (uint64_t)value;
}

static const char *option(int argc, char **argv, const char *name, const char *fallback)
{
    for (int i = 2; i + 1 < argc; i++)
        if (!strcmp(argv[i], name))
            return argv[i + 1];
    return fallback;
}

static int flag(int argc, char **argv, const char *name)
{
    for (int i = 2; i < argc; i++)
        if (!strcmp(argv[i], name))
            return 1;
    return 0;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* A line of /proc/meminfo in bytes, 0 if it is not there. */
static uint64_t meminfo(int fd, const char *field)
{
    char text[4096];
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    if (n <= 0)
        return 0;
    text[n] = 0;
    char *at = strstr(text, field);
    return at ? strtoull(at + strlen(field), NULL, 10) * 1024 : 0;
}

static void oom_score(const char *text)
{
    int fd = open("/proc/self/oom_score_adj", O_WRONLY);
    if (fd >= 0) {
        if (write(fd, text, strlen(text)) < 0)
            perror("oom_score_adj");
        close(fd);
    }
}

/* ---- churn: use nearly all memory, then free all but a share, in extents ---- */

/* Shared with the child that fills. */
struct filling {
    uint64_t filled, extents, files;
};

/* Extents are folders of files written one after another, so their pages are mostly neighbours. */
static void fill(struct filling *s, struct rng *r, const char *dir, int me, uint64_t extent, uint64_t file,
                 uint64_t limit, uint64_t reserve, int info)
{
    static uint64_t chunk[256 * 1024 / 8];
    uint64_t inside = extent;
    char path[256];
    int full = 0;
    while (!full) {
        if (inside >= extent) {
            snprintf(path, sizeof path, "%s/e%d.%llu", dir, me, (unsigned long long)s->extents);
            if (mkdir(path, 0700) && errno != EEXIST)
                break;
            s->extents++;
            inside = 0;
        }
        snprintf(path, sizeof path, "%s/e%d.%llu/f%llu", dir, me, (unsigned long long)(s->extents - 1),
                 (unsigned long long)s->files);
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        if (fd < 0)
            break;
        s->files++;
        uint64_t want = file / 2 + next(r) % file; /* mean: `file` */
        want = (want + PAGE - 1) / PAGE * PAGE;
        while (want && !full) {
            uint64_t n = want < sizeof chunk ? want : sizeof chunk;
            for (uint64_t i = 0; i < n / 8; i++)
                chunk[i] = next(r);
            ssize_t done = write(fd, chunk, n);
            if (done > 0) {
                s->filled += (uint64_t)done;
                inside += (uint64_t)done;
            }
            want -= n;
            full = done != (ssize_t)n || (limit && s->filled >= limit) || meminfo(info, "MemFree:") < reserve;
        }
        close(fd);
    }
}

static int churn(int argc, char **argv)
{
    const char *dir = option(argc, argv, "--dir", "/fill");
    double keep = strtod(option(argc, argv, "--keep", "10"), NULL) / 100.0;
    uint64_t extent = size_arg(option(argc, argv, "--extent", "16M"));
    uint64_t file = size_arg(option(argc, argv, "--file", "256K"));
    uint64_t limit = size_arg(option(argc, argv, "--limit", "0"));
    struct rng r = {mix(strtoull(option(argc, argv, "--seed", "1"), NULL, 0)), 0};
    int info = open("/proc/meminfo", O_RDONLY);
    uint64_t total = meminfo(info, "MemTotal:");
    uint64_t reserve = size_arg(option(argc, argv, "--reserve", "0"));
    if (!reserve)
        reserve = total / 64 > (6u << 20) ? total / 64 : 6u << 20;
    if (keep < 0 || keep > 1 || !extent || file < PAGE || info < 0) {
        fprintf(stderr, "churn: --keep is 0 to 100 per cent, --extent and --file are sizes\n");
        return 2;
    }
    char path[256];
    double began = now();
    int me = (int)getpid(); /* in the names: what an earlier churn left stays apart */
    struct filling *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (s == MAP_FAILED) {
        perror("churn");
        return 1;
    }
    /* How much of MemFree can be had nobody tells (a part is kept for atomic allocations): a child fills, and
     * if the kernel has to kill it, memory is full. What it had written down holds. */
    enum { SPARE = 2u << 20 }; /* given back when the child is dead: then nobody else has to go */
    void *spare =
        mmap(NULL, SPARE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    oom_score("-800");
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) {
        perror("churn");
        return 1;
    }
    if (!child) {
        oom_score("900");
        fill(s, &r, dir, me, extent, file, limit, reserve, info);
        _exit(0);
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    if (spare != MAP_FAILED)
        munmap(spare, SPARE);
    uint64_t filled = s->filled, extents = s->extents, files = s->files;
    r.at = (uint64_t)1 << 32; /* behind everything the child drew */
    double fill_time = now() - began;
    uint64_t free_full = meminfo(info, "MemFree:");

    /* Which extents stay: a seeded choice of exactly round(keep * extents). */
    unsigned char *stay = calloc(extents ? extents : 1, 1);
    uint64_t left = (uint64_t)(keep * (double)extents + 0.5), kept = left;
    for (uint64_t i = 0; stay && i < extents; i++)
        if (next(&r) % (extents - i) < left) {
            stay[i] = 1;
            left--;
        }
    began = now();
    uint64_t f = 0;
    for (uint64_t e = 0; stay && e < extents; e++) {
        while (f < files) {
            snprintf(path, sizeof path, "%s/e%d.%llu/f%llu", dir, me, (unsigned long long)e,
                     (unsigned long long)f);
            if (stay[e] ? access(path, F_OK) : unlink(path))
                break;
            f++;
        }
        snprintf(path, sizeof path, "%s/e%d.%llu", dir, me, (unsigned long long)e);
        if (!stay[e])
            rmdir(path);
    }
    printf(
        "total=%llu filled=%llu files=%llu extents=%llu kept_extents=%llu free_when_full=%llu free_now=%llu "
        "fill_s=%.3f delete_s=%.3f\n",
        (unsigned long long)total, (unsigned long long)filled, (unsigned long long)files,
        (unsigned long long)extents, (unsigned long long)kept, (unsigned long long)free_full,
        (unsigned long long)meminfo(info, "MemFree:"), fill_time, now() - began);
    free(stay);
    close(info);
    return 0;
}

/* ---- in the background ---- */

static int ready_pipe = -1;

/* Fork before any memory is set up, so that no page of the workload has a second owner. The parent returns to
 * the shell only when the child called ready(). Returns in the child alone. */
static void background(void)
{
    int ends[2];
    if (pipe(ends))
        exit(1);
    pid_t pid = fork();
    if (pid < 0) {
        perror("fork");
        exit(1);
    }
    if (pid) {
        char c;
        close(ends[1]);
        if (read(ends[0], &c, 1) != 1) {
            fprintf(stderr, "the workload ended before it was ready\n");
            exit(1);
        }
        printf("pid=%d\n", (int)pid);
        exit(0);
    }
    close(ends[0]);
    ready_pipe = ends[1];
    setsid();
    oom_score("-900");
}

static void ready(void)
{
    int null = open("/dev/null", O_RDWR);
    if (write(ready_pipe, "r", 1) != 1)
        exit(1);
    close(ready_pipe);
    for (int i = 0; i < 3 && null >= 0; i++)
        dup2(null, i);
}

/* How many steps are due at `rate` per second; sleeps when none is. A backlog of over a second (the guest was
 * frozen) is dropped. */
static uint64_t due(double rate, double *since)
{
    for (;;) {
        double t = now(), owed = (t - *since) * rate;
        if (t - *since > 1.0) {
            *since = t - 1.0;
            owed = rate;
        }
        if (owed >= 1) {
            uint64_t n = (uint64_t)owed;
            *since += (double)n / rate;
            return n;
        }
        struct timespec nap = {rate > 0 ? 0 : 1, 5000000};
        nanosleep(&nap, NULL);
    }
}

static uint8_t *pages_of_our_own(uint64_t n)
{
    uint8_t *base = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mlockall(MCL_CURRENT)) {
        perror("memory for the workload");
        exit(1);
    }
    return base;
}

/* ---- writer: rewrites random pages ---- */

static int writer(int argc, char **argv)
{
    uint64_t n = strtoull(option(argc, argv, "--pages", "1024"), NULL, 0);
    double rate = strtod(option(argc, argv, "--rate", "1000"), NULL);
    int same = flag(argc, argv, "--same");
    struct rng r = {mix(strtoull(option(argc, argv, "--seed", "1"), NULL, 0) ^ 0x7772), 0};
    if (!n)
        return 2;
    background();
    uint8_t *base = pages_of_our_own(n);
    for (uint64_t i = 0; i < n * WORDS; i++)
        ((volatile uint64_t *)base)[i] = next(&r);
    ready();
    double since = now();
    for (;;)
        for (uint64_t k = due(rate, &since); k; k--) {
            volatile uint64_t *page = (volatile uint64_t *)(base + next(&r) % n * PAGE);
            for (unsigned i = 0; i < WORDS; i++)
                page[i] = same ? page[i] : next(&r);
        }
}

/* ---- tagger ---- */

/* Words of a tagged page: 0 magic, 1 nonce, 2 id, 3 version (stored first), 4..509 pattern, 510 check,
 * 511 version (stored last). Words of the ledger: 0 magic, 1 nonce, 2 number of pages, 3 updates begun,
 * 4 updates finished, 5 check. Update u (from 0) gives page u % pages the version 2 + u / pages; all begin
 * with 1. */
#define TAG_MAGIC    0x7461676765642d70u
#define LEDGER_MAGIC 0x6c65646765722d70u

static uint64_t tag_key(uint64_t nonce, uint64_t id, uint64_t version)
{
    return mix(nonce ^ mix(id ^ mix(version)));
}

/* One CPU stops at an instruction boundary and x86 keeps stores in order, so the compiler is all there is to
 * order. */
#define ORDER() __asm__ volatile("" ::: "memory")

static void tag(volatile uint64_t *page, uint64_t nonce, uint64_t id, uint64_t version)
{
    uint64_t key = tag_key(nonce, id, version);
    page[3] = version;
    ORDER();
    page[0] = TAG_MAGIC;
    page[1] = nonce;
    page[2] = id;
    for (unsigned i = 4; i < WORDS - 2; i++)
        page[i] = mix(key + i);
    page[WORDS - 2] = mix(key + WORDS - 2);
    ORDER();
    page[WORDS - 1] = version;
    ORDER();
}

static int tagger(int argc, char **argv)
{
    uint64_t n = strtoull(option(argc, argv, "--pages", "1024"), NULL, 0);
    double rate = strtod(option(argc, argv, "--rate", "1000"), NULL);
    uint64_t nonce = strtoull(option(argc, argv, "--nonce", "1"), NULL, 0);
    if (!n)
        return 2;
    background();
    uint8_t *base = pages_of_our_own(n + 1);
    volatile uint64_t *ledger = (volatile uint64_t *)(base + n * PAGE);
    for (uint64_t i = 0; i < n; i++)
        tag((volatile uint64_t *)(base + i * PAGE), nonce, i, 1);
    ledger[1] = nonce;
    ledger[2] = n;
    ledger[3] = ledger[4] = 0;
    ledger[5] = tag_key(nonce, n, LEDGER_MAGIC);
    ORDER();
    ledger[0] = LEDGER_MAGIC;
    ready();
    double since = now();
    for (uint64_t u = 0;;)
        for (uint64_t k = due(rate, &since); k; k--, u++) {
            ledger[3] = u + 1;
            ORDER();
            tag((volatile uint64_t *)(base + u % n * PAGE), nonce, u % n, 2 + u / n);
            ledger[4] = u + 1;
            ORDER();
        }
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1 && !strcmp(argv[1], "churn"))
        return churn(argc, argv);
    if (argc > 1 && !strcmp(argv[1], "writer"))
        return writer(argc, argv);
    if (argc > 1 && !strcmp(argv[1], "tagger"))
        return tagger(argc, argv);
    fprintf(
        stderr,
        "usage: guest_tool churn [--keep PERCENT] [--extent SIZE] [--file SIZE] [--seed N] [--limit SIZE]\n"
        "                        [--reserve SIZE] [--dir DIR]\n"
        "       guest_tool writer [--pages N] [--rate PER_SECOND] [--seed N] [--same]\n"
        "       guest_tool tagger [--pages N] [--rate PER_SECOND] [--nonce N]\n");
    return 2;
}
