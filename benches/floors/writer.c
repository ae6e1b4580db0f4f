// Who writes while a point is taken: single pages to make dirty, and a thread that writes at a steady rate.

#define _GNU_SOURCE
#ifdef __x86_64__
#include <immintrin.h>
#endif
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state >> 11;
}

// Private anonymous memory, touched; huge asks for transparent huge pages.
void *private_memory(uint64_t length, int huge) {
    uint64_t spare = 2u << 20;
    char *raw = mmap(0, length + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) return 0;
    char *base = (char *)(((uintptr_t)raw + spare - 1) & ~(uintptr_t)(spare - 1));
    madvise(base, length, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    return base;
}

// No child of fork() gets it, so that no write to it is ever copied for one.
int keep_from_children(void *base, uint64_t length) { return madvise(base, length, MADV_DONTFORK); }

// Fill with words that are all different, so that nothing compresses and nothing is zero.
void fill_words(void *base, uint64_t length, uint64_t seed) {
    uint64_t *words = base, state = seed * 2654435761u + 1;
    for (uint64_t i = 0; i < length / 8; i++) words[i] = next(&state) | 1;
}

// Write one word to each of `count` different pages, chosen at random.
void dirty_pages(void *base, uint64_t length, uint64_t count, uint64_t seed) {
    uint64_t pages = length / 4096, state = seed * 88172645463325252u + 1;
    unsigned char *done = calloc(pages, 1);
    while (count > 0) {
        uint64_t page = next(&state) % pages;
        if (done[page]) continue;
        done[page] = 1;
        ((volatile uint64_t *)base)[page * 512 + next(&state) % 512] = next(&state);
        count--;
    }
    free(done);
}

struct part {
    char *base, *into;
    uint32_t *pages;
    uint64_t count;
};

#ifdef __x86_64__
// Whole lines past the caches, which is the quickest way to copy pages that nobody reads soon: of four pages in turn
// two lines each, while the first lines of the next four are fetched.
__attribute__((target("avx512f"))) static uint64_t copy_lines(const struct part *p) {
    uint64_t i = 0;
    for (; i + 4 <= p->count; i += 4) {
        for (uint64_t next = i + 4; next < i + 8 && next < p->count; next++) {
            const char *from = p->base + (uint64_t)p->pages[next] * 4096;
            _mm_prefetch(from, _MM_HINT_T0);
            _mm_prefetch(from + 64, _MM_HINT_T0);
        }
        for (int at = 0; at < 4096; at += 128)
            for (int page = 0; page < 4; page++) {
                const char *from = p->base + (uint64_t)p->pages[i + page] * 4096 + at;
                char *into = p->into + (i + page) * 4096 + at;
                _mm512_stream_si512((void *)into, _mm512_loadu_si512(from));
                _mm512_stream_si512((void *)(into + 64), _mm512_loadu_si512(from + 64));
            }
    }
    return i;
}
#endif

static void *copy_part(void *argument) {
    struct part *p = argument;
    uint64_t i = 0;
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f") && (uintptr_t)p->into % 64 == 0) i = copy_lines(p);
#endif
    for (; i < p->count; i++) memcpy(p->into + i * 4096, p->base + (uint64_t)p->pages[i] * 4096, 4096);
#ifdef __x86_64__
    _mm_sfence();
#endif
    return 0;
}

// Seconds that two threads take to copy the pages which dirty_pages() wrote, and nothing else: they know
// them beforehand, and `into` has room for all.
double copy_dirty(void *base, uint64_t length, uint64_t count, uint64_t seed, void *into) {
    uint64_t pages = length / 4096, state = seed * 88172645463325252u + 1, n = 0;
    unsigned char *done = calloc(pages, 1);
    uint32_t *list = malloc(count * sizeof *list + 1);
    for (uint64_t left = count; left > 0;) {
        uint64_t page = next(&state) % pages;
        if (done[page]) continue;
        done[page] = 1;
        next(&state);
        next(&state);
        left--;
    }
    for (uint64_t page = 0; page < pages; page++)
        if (done[page]) list[n++] = (uint32_t)page;
    struct part first = {base, into, list, n / 2};
    struct part second = {base, (char *)into + n / 2 * 4096, list + n / 2, n - n / 2};
    pthread_t other;
    uint64_t begin = now_ns();
    pthread_create(&other, 0, copy_part, &second);
    copy_part(&first);
    pthread_join(other, 0);
    uint64_t end = now_ns();
    free(done);
    free(list);
    return (double)(end - begin) / 1e9;
}

// Writes memory into a file; 1 if all of it is written.
static int save(const char *base, uint64_t length, const char *path) {
    uint64_t done = 0;
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    while (file >= 0 && done < length) {
        uint64_t part = length - done < (1u << 20) ? length - done : (1u << 20);
        ssize_t wrote = write(file, base + done, part);
        if (wrote <= 0) break;
        done += (uint64_t)wrote;
    }
    return done == length;
}

// Seconds that fork() keeps its caller. The child saves its copy in `path`, if that is not null, and leaves after
// `linger_us` at least, with status 0 if all was well.
double timed_fork(int *child, int linger_us, const void *base, uint64_t length, const char *path) {
    uint64_t begin = now_ns();
    pid_t pid = fork();
    if (pid == 0) {
        int well = !path || save(base, length, path);
        uint64_t until = begin + (uint64_t)linger_us * 1000, now = now_ns();
        if (now < until) usleep((useconds_t)((until - now) / 1000));
        _exit(!well);
    }
    uint64_t end = now_ns();
    *child = pid;
    return (double)(end - begin) / 1e9;
}

struct writer {
    pthread_t thread;
    volatile uint64_t *words, *beside;
    uint64_t count, period_ns;
    volatile int stop;
    uint32_t *latencies, *latencies_beside;
    uint64_t room;
    volatile uint64_t written;
};

// Writes a word; nanoseconds that it took.
static uint32_t timed_write(volatile uint64_t *word, uint64_t value) {
    uint64_t begin = now_ns();
    *word = value;
    uint64_t took = now_ns() - begin;
    return took > UINT32_MAX ? UINT32_MAX : (uint32_t)took;
}

static void *write_steadily(void *argument) {
    struct writer *w = argument;
    uint64_t state = 0x9E3779B97F4A7C15u, due = now_ns();
    while (!w->stop) {
        uint64_t at = now_ns();
        if (at < due) {
            struct timespec pause = {0, (long)(due - at)};
            // Short pauses would cost more than they last: sleep only for a batch of writes.
            if (due - at > 500000) nanosleep(&pause, 0);
            continue;
        }
        uint64_t word = next(&state) % w->count, value = next(&state), n = w->written;
        uint32_t took = timed_write(w->words + word, value);
        uint32_t beside = w->beside ? timed_write(w->beside + next(&state) % w->count, value) : 0;
        if (n < w->room) {
            w->latencies[n] = took;
            if (w->beside) w->latencies_beside[n] = beside;
        }
        w->written = n + 1;
        due += w->period_ns;
        // A writer that fell behind does not catch up in a burst.
        if (due + 1000000 < at) due = at;
    }
    return 0;
}

// A thread that makes `rate` random 8-byte writes a second and notes how long each takes (nanoseconds). Right after
// each it makes one to as much other memory, if that is not null, and notes that, too.
void *start_writer(void *base, uint64_t length, uint64_t rate, uint32_t *latencies, uint64_t room, void *beside,
                   uint32_t *latencies_beside) {
    struct writer *w = calloc(1, sizeof *w);
    w->words = base;
    w->count = length / 8;
    w->period_ns = 1000000000u / rate;
    w->latencies = latencies;
    w->beside = beside;
    w->latencies_beside = latencies_beside;
    w->room = room;
    pthread_create(&w->thread, 0, write_steadily, w);
    return w;
}

uint64_t written(void *writer) { return ((struct writer *)writer)->written; }

uint64_t stop_writer(void *writer) {
    struct writer *w = writer;
    w->stop = 1;
    pthread_join(w->thread, 0);
    uint64_t count = w->written;
    free(w);
    return count;
}

// Writes 8 bytes at random until the time is over; returns writes a second.
double scatter(void *base, uint64_t length, double seconds) {
    uint64_t begin = now_ns(), until = begin + (uint64_t)(seconds * 1e9), count = 0, state = 7777777;
    volatile uint64_t *words = base;
    while (now_ns() < until) {
        for (int i = 0; i < 10000; i++) words[next(&state) % (length / 8)] = state;
        count += 10000;
    }
    return (double)count / ((double)(now_ns() - begin) / 1e9);
}

// Rewrites all words until the time is over; returns bytes a second.
double rewrite(void *base, uint64_t length, double seconds) {
    uint64_t begin = now_ns(), until = begin + (uint64_t)(seconds * 1e9), bytes = 0;
    unsigned char value = 1;
    while (now_ns() < until) {
        for (uint64_t at = 0; at < length; at += 4u << 20) {
            uint64_t part = length - at < (4u << 20) ? length - at : (4u << 20);
            memset((char *)base + at, value, part);
            bytes += part;
        }
        value++;
    }
    return (double)bytes / ((double)(now_ns() - begin) / 1e9);
}
