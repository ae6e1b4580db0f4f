/* How often a first-in-first-out memory of `slots` pages misses on a trace: what a simpler engine would do. */
#include <stdint.h>
#include <stdlib.h>

/* Misses among the operations from `from` on; the ones before only fill the memory. */
uint64_t fifo_misses(const uint32_t *pages, uint64_t count, uint64_t from, uint64_t total_pages, uint64_t slots)
{
    uint8_t *inside = calloc(total_pages, 1);
    uint32_t *queue = malloc(slots * sizeof *queue);
    uint64_t held = 0, oldest = 0, misses = 0;
    for (uint64_t i = 0; i < count; i++) {
        if (inside[pages[i]])
            continue;
        misses += i >= from;
        if (held == slots)
            inside[queue[oldest]] = 0;
        else
            held++;
        queue[oldest] = pages[i];
        oldest = (oldest + 1) % slots;
        inside[pages[i]] = 1;
    }
    free(inside);
    free(queue);
    return misses;
}
