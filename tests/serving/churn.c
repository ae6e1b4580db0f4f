/* A process whose memory somebody else serves, and that never leaves it alone.
 *
 * Several threads read, write, discard, unmap, move, protect and fork at random, all on pages of their own that
 * lie between those of the others, so that the server's blocks hold pages of several threads. Each knows what every
 * byte of its pages must be: the store's, by the page's original number; what it wrote; or zeros, once it threw the
 * page away. A forked child checks what it has inherited, and then goes on in the same way for a while.
 *
 * usage: churn SOCKET SEED MILLISECONDS THREADS anon|shmem|hugetlb PAGES FEATURES
 *
 * SOCKET: where the userfaultfd goes, with "ADDRESS LENGTH PAGE\n" beside it; a byte comes back when it is
 * served. FEATURES: of the handshake. Status 0: every byte was right; 3: one was not, and stderr says which.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 4, MOST_CHILDREN = 2 };
enum base { STORE, ZERO, OWN, GONE };

/* What a page must hold. */
struct page {
    char *at;
    int lot;              /* pages of one lot were moved together, and may lie in one mapping */
    enum base base;
    uint64_t own;         /* OWN: every word is this plus its index */
    int patched;          /* a word of it was written since: */
    int word;
    uint64_t value;
};

struct thread {
    int number;
    uint64_t random;
    int count;
    int lots;
    int depth;            /* forks between the first process and this one */
    pid_t children[MOST_CHILDREN];
    int pipe[2];
};

static size_t page_size;
static int huge, shared, threads;
static uint64_t ends;
static struct page *all;

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void fail(const char *format, ...)
{
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (write(2, text, (size_t)length) < 0)
        _exit(4);
    _exit(3);
}

static uint64_t next(struct thread *t)
{
    t->random ^= t->random << 13;
    t->random ^= t->random >> 7;
    t->random ^= t->random << 17;
    return t->random * 0x2545F4914F6CDD1Dull >> 16;
}

static int below(struct thread *t, int end)
{
    return (int)(next(t) % (uint64_t)end);
}

/* The word of the store with this index. */
static uint64_t stored(uint64_t index)
{
    return (index * 0x9E3779B97F4A7C15ull) | 1;
}

static uint64_t expected(const struct page *p, int word)
{
    if (p->patched && p->word == word)
        return p->value;
    if (p->base == ZERO)
        return 0;
    if (p->base == OWN)
        return p->own + (uint64_t)word;
    return stored((uint64_t)(p - all) * (page_size / 8) + (uint64_t)word);
}

static void check_word(struct thread *t, const struct page *p, int word, uint64_t found, const char *how)
{
    uint64_t wanted = expected(p, word);
    if (found != wanted)
        fail("thread %d, %d forks deep: page %d, word %d at %p holds %#llx, not %#llx (%s, %s)\n", t->number,
             t->depth, (int)(p - all), word, (void *)(p->at + word * 8), (unsigned long long)found,
             (unsigned long long)wanted, how,
             p->base == STORE ? "the store's" : p->base == ZERO ? "thrown away" : "its own");
}

static void check_page(struct thread *t, const struct page *p, int whole)
{
    const volatile uint64_t *words = (const volatile uint64_t *)p->at;
    int count = (int)(page_size / 8);
    if (whole && !huge) {
        for (int word = 0; word < count; word++)
            check_word(t, p, word, words[word], "all");
        return;
    }
    int picks[3] = {0, count - 1, below(t, count)};
    for (int i = 0; i < 3; i++)
        check_word(t, p, picks[i], words[picks[i]], "some");
    if (p->patched)
        check_word(t, p, p->word, words[p->word], "the one that was written");
}

/* A run of pages of one chunk that lie one behind the other: the first, and how many. */
static int pick(struct thread *t, struct page **first)
{
    int chunk = below(t, t->count / CHUNK) * CHUNK;
    int from = below(t, CHUNK), most = 1 + below(t, CHUNK - from), count = 0;
    struct page *p = &all[(chunk / CHUNK * threads + t->number) * CHUNK + from];
    if (p->base == GONE)
        return 0;
    while (count < most && p[count].base != GONE && p[count].lot == p->lot &&
           p[count].at == p->at + (size_t)count * page_size)
        count++;
    *first = p;
    return count;
}

static void set(struct page *p, int count, enum base base)
{
    for (int i = 0; i < count; i++) {
        p[i].base = base;
        p[i].patched = 0;
    }
}

static void write_page(struct thread *t, struct page *p)
{
    p->own = next(t);
    p->base = OWN;
    p->patched = 0;
    for (int word = 0; word < (int)(page_size / 8); word++)
        ((volatile uint64_t *)p->at)[word] = p->own + (uint64_t)word;
}

static void write_word(struct thread *t, struct page *p)
{
    int word = below(t, (int)(page_size / 8));
    if (p->patched)
        word = p->word;
    p->value = next(t);
    p->word = word;
    p->patched = 1;
    ((volatile uint64_t *)p->at)[word] = p->value;
}

static void discard(struct page *p, int count)
{
    if (madvise(p->at, (size_t)count * page_size, shared ? MADV_REMOVE : MADV_DONTNEED) < 0)
        fail("madvise: %s\n", strerror(errno));
    set(p, count, ZERO);
}

static void unmap(struct page *p, int count)
{
    if (munmap(p->at, (size_t)count * page_size) < 0)
        fail("munmap: %s\n", strerror(errno));
    set(p, count, GONE);
}

static char *reserve(size_t length)
{
    size_t align = huge ? page_size : 4096;
    char *at = mmap(NULL, length + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        fail("mmap: %s\n", strerror(errno));
    char *start = (char *)(((uintptr_t)at + align - 1) / align * align);
    if (start > at)
        munmap(at, (size_t)(start - at));
    munmap(start + length, (size_t)(at + length + align - (start + length)));
    return start;
}

static void move(struct thread *t, struct page *p, int count)
{
    size_t length = (size_t)count * page_size;
    char *old = p->at, *to;
    if (!huge && below(t, 2)) {
        /* To where the kernel likes: often to what another thread has just given up. What stays is empty. */
        to = mremap(old, length, length, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
        if (to == MAP_FAILED && errno == EFAULT)
            return; /* it lies in several mappings, since protect() */
        if (to == MAP_FAILED)
            fail("mremap DONTUNMAP: %s\n", strerror(errno));
        if (!shared && *(volatile uint64_t *)old != 0)
            fail("thread %d: what was moved away from %p left %#llx behind\n", t->number, (void *)old,
                 (unsigned long long)*(volatile uint64_t *)old);
        munmap(old, length);
    } else {
        char *place = reserve(length);
        to = mremap(old, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, place);
        if (to == MAP_FAILED && errno == EFAULT)
            return; /* likewise; the place may have been unmapped by now, so it is left alone */
        if (to == MAP_FAILED)
            fail("mremap FIXED: %s\n", strerror(errno));
    }
    t->lots++;
    for (int i = 0; i < count; i++) {
        p[i].at = to + (size_t)i * page_size;
        p[i].lot = t->lots;
    }
}

static void protect(struct thread *t, struct page *p, int count)
{
    /* Splits the mapping, and lets a fill meet several. */
    mprotect(p->at, (size_t)count * page_size, PROT_READ);
    check_page(t, p, 0);
    mprotect(p->at, (size_t)count * page_size, PROT_READ | PROT_WRITE);
}

static void through_a_pipe(struct thread *t, struct page *p)
{
    uint64_t words[64];
    int from = below(t, (int)(page_size / 8) - 64);
    if (write(t->pipe[1], p->at + from * 8, sizeof words) != sizeof words) {
        if (errno == EFAULT)
            return; /* this machine does not let system calls wait for pages */
        fail("write: %s\n", strerror(errno));
    }
    if (read(t->pipe[0], words, sizeof words) != sizeof words)
        fail("read: %s\n", strerror(errno));
    for (int i = 0; i < 64; i++)
        check_word(t, p, from + i, words[i], "by a system call");
}

static void churn(struct thread *t, uint64_t until);

static void reap(struct thread *t, int slot)
{
    int status;
    if (t->children[slot] <= 0)
        return;
    if (waitpid(t->children[slot], &status, 0) != t->children[slot])
        fail("waitpid: %s\n", strerror(errno));
    t->children[slot] = 0;
    if (status != 0)
        fail("a child ended with %#x\n", status);
}

static void fork_one(struct thread *t)
{
    int slot = below(t, MOST_CHILDREN);
    reap(t, slot);
    if (t->depth >= 2)
        return;
    pid_t pid = fork();
    if (pid < 0)
        fail("fork: %s\n", strerror(errno));
    if (pid == 0) {
        t->depth++;
        for (int i = 0; i < MOST_CHILDREN; i++)
            t->children[i] = 0;
        if (pipe(t->pipe) < 0)
            fail("pipe: %s\n", strerror(errno));
        for (int chunk = 0; chunk < t->count / CHUNK; chunk++)
            for (int i = 0; i < CHUNK; i++) {
                struct page *p = &all[(chunk * threads + t->number) * CHUNK + i];
                if (p->base != GONE && below(t, 3) == 0)
                    check_page(t, p, below(t, 4) == 0);
            }
        if (!shared)
            churn(t, now_ms() + (uint64_t)below(t, 60));
        _exit(0);
    }
    t->children[slot] = pid;
    if (shared)
        reap(t, slot); /* what the parent throws away meanwhile, the child would miss */
}

static void churn(struct thread *t, uint64_t until)
{
    while (now_ms() < until && now_ms() < ends) {
        struct page *p = NULL;
        int count = pick(t, &p), dice = below(t, 1000);
        if (count == 0)
            continue;
        if (dice < 450)
            check_page(t, &p[below(t, count)], dice < 100);
        else if (dice < 600)
            write_word(t, p);
        else if (dice < 680)
            write_page(t, p);
        else if (dice < 780)
            discard(p, count);
        else if (dice < 880)
            move(t, p, count);
        else if (dice < 920)
            protect(t, p, count);
        else if (dice < 970)
            through_a_pipe(t, p);
        else if (dice < 975)
            unmap(p, count);
        else if (dice < 985)
            fork_one(t);
    }
    for (int slot = 0; slot < MOST_CHILDREN; slot++)
        reap(t, slot);
}

static void *run(void *argument)
{
    struct thread *t = argument;
    churn(t, UINT64_MAX);
    /* At the end, every byte. */
    for (int chunk = 0; chunk < t->count / CHUNK; chunk++)
        for (int i = 0; i < CHUNK; i++) {
            struct page *p = &all[(chunk * threads + t->number) * CHUNK + i];
            if (p->base != GONE)
                check_page(t, p, 1);
        }
    return NULL;
}

static void hand_over(int connection, int uffd, const char *text)
{
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec vector = {(void *)text, strlen(text)};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1, .msg_control = control,
                             .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &uffd, sizeof uffd);
    char answer;
    if (sendmsg(connection, &message, 0) < 0 || read(connection, &answer, 1) != 1)
        fail("handing over: %s\n", strerror(errno));
}

int main(int argc, char **argv)
{
    if (argc != 8)
        fail("usage: see the source\n");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int connection = atoi(argv[1]);
    uint64_t seed = strtoull(argv[2], NULL, 10);
    uint64_t milliseconds = strtoull(argv[3], NULL, 10);
    threads = atoi(argv[4]);
    huge = strcmp(argv[5], "hugetlb") == 0;
    shared = strcmp(argv[5], "anon") != 0;
    page_size = huge ? 2 << 20 : (size_t)sysconf(_SC_PAGESIZE);
    int count = atoi(argv[6]) / (CHUNK * threads) * CHUNK * threads;
    size_t length = (size_t)count * page_size;

    char *memory;
    if (shared) {
        int fd = memfd_create("churn", MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0));
        if (fd < 0 || ftruncate(fd, (off_t)length) < 0)
            fail("memfd: %s\n", strerror(errno));
        memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
    } else {
        memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        madvise(memory, length, MADV_NOHUGEPAGE);
    }
    if (memory == MAP_FAILED)
        fail("mmap: %s\n", strerror(errno));
    all = mmap(NULL, (size_t)count * sizeof *all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < count; i++)
        all[i].at = memory + (size_t)i * page_size;

    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API, .features = strtoull(argv[7], NULL, 0)};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0)
        fail("userfaultfd: %s\n", strerror(errno));
    struct uffdio_register range = {{(uintptr_t)memory, length}, UFFDIO_REGISTER_MODE_MISSING, 0};
    if (getenv("CHURN_WP"))
        range.mode |= UFFDIO_REGISTER_MODE_WP;
    if (getenv("CHURN_MINOR"))
        range.mode |= UFFDIO_REGISTER_MODE_MINOR;
    if (ioctl(uffd, UFFDIO_REGISTER, &range) < 0)
        fail("register: %s\n", strerror(errno));
    char text[128];
    snprintf(text, sizeof text, "%llu %zu %zu\n", (unsigned long long)(uintptr_t)memory, length, page_size);
    hand_over(connection, uffd, text);

    ends = now_ms() + milliseconds;
    pthread_t handles[threads];
    struct thread *state = calloc((size_t)threads, sizeof *state);
    for (int i = 0; i < threads; i++) {
        state[i].number = i;
        state[i].count = count / threads;
        state[i].random = (seed * 64 + (uint64_t)i + 1) * 0x9E3779B97F4A7C15ull | 1;
        for (int warm = 0; warm < 8; warm++)
            next(&state[i]);
        if (pipe(state[i].pipe) < 0)
            fail("pipe: %s\n", strerror(errno));
    }
    for (int i = 0; i < threads; i++)
        pthread_create(&handles[i], NULL, run, &state[i]);
    for (int i = 0; i < threads; i++)
        pthread_join(handles[i], NULL);
    return 0;
}
