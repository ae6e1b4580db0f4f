/* Ways to touch memory. Every contestant is given the same ones: only the memory differs. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static uint64_t next_random(uint64_t *state)
{
    /* xorshift64* */
    uint64_t x = *state;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    *state = x;
    return x * 2685821657736338717u;
}

/* Touches each of `count` pages once, in an order that no read-ahead can guess, and writes the seconds that each
 * touch took to `seconds`. `order` is a permutation of 0 .. count-1. */
uint64_t touch_each(const volatile char *memory, uint64_t page, const uint64_t *order, uint64_t count,
                    double *seconds)
{
    uint64_t sum = 0;
    for (uint64_t i = 0; i < count; i++) {
        double begin = now();
        sum += memory[order[i] * page];
        seconds[i] = now() - begin;
    }
    return sum;
}

/* Sum of `count` words, read in sequence. */
uint64_t sum_words(const uint64_t *words, uint64_t count)
{
    uint64_t a = 0, b = 0, c = 0, d = 0;
    uint64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        a += words[i];
        b += words[i + 1];
        c += words[i + 2];
        d += words[i + 3];
    }
    for (; i < count; i++)
        a += words[i];
    return a + b + c + d;
}

/* Writes every word. */
void write_words(uint64_t *words, uint64_t count, uint64_t value)
{
    for (uint64_t i = 0; i < count; i++)
        words[i] = value + i;
}

/* Reads `reads` words at random places, each place depending on the word before: latency, not throughput. */
uint64_t walk_words(const uint64_t *words, uint64_t count, uint64_t reads)
{
    uint64_t state = 88172645463325252u, sum = 0;
    for (uint64_t i = 0; i < reads; i++) {
        uint64_t word = words[next_random(&state) % count];
        sum += word;
        /* The word takes part, so that the next read cannot start before this one is done. */
        state ^= (word & 1) ? 0 : 0x9e3779b97f4a7c15u;
        state |= 1;
    }
    return sum;
}

struct share {
    char *memory;
    const uint32_t *pages; /* which page each operation touches */
    const uint8_t *writes; /* whether it writes; may be NULL */
    uint64_t page, count, sum;
};

static void *operate(void *argument)
{
    struct share *share = argument;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < share->count; i++) {
        /* All of the page is read: what a 4 KiB read means elsewhere. */
        uint64_t *words = (uint64_t *)(share->memory + share->pages[i] * share->page);
        for (uint64_t w = 0; w < share->page / 8; w += 8)
            sum += words[w];
        if (share->writes && share->writes[i])
            words[i % (share->page / 8)] = i;
    }
    share->sum = sum;
    return NULL;
}

/* Performs `count` operations on whole pages, shared between `threads` threads. Returns the seconds it took. */
double page_operations(char *memory, uint64_t page, const uint32_t *pages, const uint8_t *writes, uint64_t count,
                       uint64_t threads, uint64_t *sum)
{
    struct share *shares = calloc(threads, sizeof *shares);
    pthread_t *ids = calloc(threads, sizeof *ids);
    double begin = now();
    for (uint64_t t = 0; t < threads; t++) {
        uint64_t from = count * t / threads, to = count * (t + 1) / threads;
        shares[t] = (struct share){memory, pages + from, writes ? writes + from : NULL, page, to - from, 0};
        pthread_create(&ids[t], NULL, operate, &shares[t]);
    }
    for (uint64_t t = 0; t < threads; t++) {
        pthread_join(ids[t], NULL);
        *sum += shares[t].sum;
    }
    double took = now() - begin;
    free(shares);
    free(ids);
    return took;
}
