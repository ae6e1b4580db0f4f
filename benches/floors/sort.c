/* A parallel quicksort of uint64 that every contestant runs on its own memory.
 *
 * All threads partition the whole together, then split into two teams for the two halves, and so on down to one
 * thread, which sorts its part alone, with a function that the caller gives (NumPy's, whose vector instructions leave
 * more of the time to the paging, which is what is measured) or with the one that is here. While threads partition together each takes a piece from the left end or
 * the right end as it needs one; what is left over of their pieces in the middle is partitioned by one thread.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Words of a piece: 64 KiB. */
enum { PIECE = 8192 };

static void swap_words(uint64_t *a, uint64_t *b)
{
    uint64_t t = *a;
    *a = *b;
    *b = t;
}

static void insertion_sort(uint64_t *a, size_t n)
{
    for (size_t i = 1; i < n; i++) {
        uint64_t v = a[i];
        size_t j = i;
        for (; j && a[j - 1] > v; j--)
            a[j] = a[j - 1];
        a[j] = v;
    }
}

static uint64_t median_of_three(uint64_t a, uint64_t b, uint64_t c)
{
    if (a > b)
        swap_words(&a, &b);
    return c < a ? a : c > b ? b : c;
}

static void sift_down(uint64_t *a, size_t root, size_t n)
{
    for (size_t child; (child = 2 * root + 1) < n; root = child) {
        if (child + 1 < n && a[child + 1] > a[child])
            child++;
        if (a[root] >= a[child])
            return;
        swap_words(&a[root], &a[child]);
    }
}

static void heap_sort(uint64_t *a, size_t n)
{
    for (size_t i = n / 2; i-- > 0;)
        sift_down(a, i, n);
    for (size_t end = n; end-- > 1;) {
        swap_words(&a[0], &a[end]);
        sift_down(a, 0, end);
    }
}

/* Words that one look at either end classifies, without a branch for each (Edelkamp and Weiss, BlockQuicksort). */
enum { LOOK = 128 };

/* What one end still has on the wrong side, as offsets into the words looked at. */
struct wrong {
    uint8_t at[LOOK];
    int from, to;
};

static void look_left(struct wrong *wrong, const uint64_t *words, uint64_t pivot)
{
    wrong->from = wrong->to = 0;
    for (int i = 0; i < LOOK; i++) {
        wrong->at[wrong->to] = i;
        wrong->to += words[i] >= pivot;
    }
}

static void look_right(struct wrong *wrong, const uint64_t *words, uint64_t pivot)
{
    wrong->from = wrong->to = 0;
    for (int i = 0; i < LOOK; i++) {
        wrong->at[wrong->to] = i;
        wrong->to += words[i] < pivot;
    }
}

static void exchange(struct wrong *l, uint64_t *left, struct wrong *r, uint64_t *right)
{
    int pairs = l->to - l->from < r->to - r->from ? l->to - l->from : r->to - r->from;
    for (int i = 0; i < pairs; i++)
        swap_words(&left[l->at[l->from + i]], &right[r->at[r->from + i]]);
    l->from += pairs;
    r->from += pairs;
}

/* Number of words below the pivot; they stand first afterwards. */
static size_t partition_alone(uint64_t *a, size_t n, uint64_t pivot)
{
    struct wrong l = {.from = 0, .to = 0}, r = {.from = 0, .to = 0};
    size_t i = 0, j = n;
    while (j - i >= 2 * LOOK) {
        if (l.from == l.to)
            look_left(&l, a + i, pivot);
        if (r.from == r.to)
            look_right(&r, a + j - LOOK, pivot);
        exchange(&l, a + i, &r, a + j - LOOK);
        if (l.from == l.to)
            i += LOOK;
        if (r.from == r.to)
            j -= LOOK;
    }
    for (;;) {
        while (i < j && a[i] < pivot)
            i++;
        while (i < j && a[j - 1] >= pivot)
            j--;
        if (i >= j)
            return i;
        swap_words(&a[i++], &a[--j]);
    }
}

static void sort_alone(uint64_t *a, size_t n, int depth)
{
    while (n > 24) {
        if (depth-- == 0) {
            heap_sort(a, n);
            return;
        }
        uint64_t pivot = median_of_three(median_of_three(a[0], a[n / 8], a[n / 4]),
                                         median_of_three(a[n / 2 - 1], a[n / 2], a[n / 2 + 1]),
                                         median_of_three(a[3 * (n / 4)], a[7 * (n / 8)], a[n - 1]));
        size_t below = partition_alone(a, n, pivot);
        if (below == 0) {
            /* The pivot is the smallest: all that equal it go first, and are in place. */
            if (pivot == UINT64_MAX)
                return;
            below = partition_alone(a, n, pivot + 1);
            a += below;
            n -= below;
        } else if (below < n - below) {
            sort_alone(a, below, depth);
            a += below;
            n -= below;
        } else {
            sort_alone(a + below, n - below, depth);
            n = below;
        }
    }
    insertion_sort(a, n);
}

struct partition {
    uint64_t *a;
    uint64_t pivot;
    size_t left, right; /* the pieces nobody has taken are [left, right), in words */
    pthread_mutex_t lock;
};

/* The piece of either end that a thread holds, and how many of its words it has gone through. */
struct held {
    struct partition *shared;
    size_t left, left_done, right, right_done;
    int has_left, has_right;
};

static int take(struct partition *p, size_t *piece, int from_left)
{
    pthread_mutex_lock(&p->lock);
    int there = p->right - p->left >= PIECE;
    if (there) {
        if (from_left) {
            *piece = p->left;
            p->left += PIECE;
        } else {
            p->right -= PIECE;
            *piece = p->right;
        }
    }
    pthread_mutex_unlock(&p->lock);
    return there;
}

static void *partition_pieces(void *argument)
{
    struct held *own = argument;
    struct partition *p = own->shared;
    struct wrong l = {.from = 0, .to = 0}, r = {.from = 0, .to = 0};
    for (;;) {
        if (!own->has_left) {
            if (!take(p, &own->left, 1))
                return NULL;
            own->has_left = 1;
            own->left_done = 0;
        }
        if (!own->has_right) {
            if (!take(p, &own->right, 0))
                return NULL;
            own->has_right = 1;
            own->right_done = 0;
        }
        while (own->left_done < PIECE && own->right_done < PIECE) {
            uint64_t *left = p->a + own->left + own->left_done, *right = p->a + own->right + own->right_done;
            if (l.from == l.to)
                look_left(&l, left, p->pivot);
            if (r.from == r.to)
                look_right(&r, right, p->pivot);
            exchange(&l, left, &r, right);
            if (l.from == l.to)
                own->left_done += LOOK;
            if (r.from == r.to)
                own->right_done += LOOK;
        }
        own->has_left = own->left_done < PIECE;
        own->has_right = own->right_done < PIECE;
    }
}

static int by_place(const void *a, const void *b)
{
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return x < y ? -1 : x > y;
}

static void swap_pieces(uint64_t *a, size_t x, size_t y)
{
    if (x == y)
        return;
    for (size_t i = 0; i < PIECE; i++)
        swap_words(&a[x + i], &a[y + i]);
}

/* Number of words below the pivot; they stand first afterwards. */
static size_t partition_together(uint64_t *a, size_t n, uint64_t pivot, int threads)
{
    struct partition shared = {.a = a, .pivot = pivot, .left = 0, .right = n, .lock = PTHREAD_MUTEX_INITIALIZER};
    struct held *own = calloc(threads, sizeof *own);
    pthread_t *ids = calloc(threads, sizeof *ids);
    for (int t = 0; t < threads; t++) {
        own[t].shared = &shared;
        if (t)
            pthread_create(&ids[t], NULL, partition_pieces, &own[t]);
    }
    partition_pieces(&own[0]);
    for (int t = 1; t < threads; t++)
        pthread_join(ids[t], NULL);

    /* Unfinished pieces are moved next to the middle: those of the left to its left end, farthest first. */
    size_t *lefts = calloc(threads, sizeof *lefts), *rights = calloc(threads, sizeof *rights);
    size_t nl = 0, nr = 0;
    for (int t = 0; t < threads; t++) {
        if (own[t].has_left)
            lefts[nl++] = own[t].left;
        if (own[t].has_right)
            rights[nr++] = own[t].right;
    }
    qsort(lefts, nl, sizeof *lefts, by_place);
    qsort(rights, nr, sizeof *rights, by_place);
    size_t from = shared.left, to = shared.right;
    for (size_t i = nl; i-- > 0;) {
        from -= PIECE;
        swap_pieces(a, lefts[i], from);
    }
    for (size_t i = 0; i < nr; i++) {
        swap_pieces(a, rights[i], to);
        to += PIECE;
    }
    free(own);
    free(ids);
    free(lefts);
    free(rights);

    return from + partition_alone(a + from, to - from, pivot);
}

/* Sorts a part in one thread. */
typedef void (*alone)(uint64_t *a, size_t n);

struct team {
    uint64_t *a;
    size_t n;
    int threads;
    alone alone;
};

static int depth_limit(size_t n)
{
    int depth = 0;
    for (; n; n >>= 1)
        depth += 2;
    return depth;
}

/* A few short runs spread over the whole: every place that is looked at may be a block to bring. */
static uint64_t choose_pivot(const uint64_t *a, size_t n)
{
    enum { PLACES = 8, RUN = 128 };
    static _Thread_local uint64_t sample[PLACES * RUN];
    for (size_t p = 0; p < PLACES; p++)
        memcpy(sample + p * RUN, a + (n - RUN) / (PLACES - 1) * p, RUN * sizeof *a);
    sort_alone(sample, PLACES * RUN, 64);
    return sample[PLACES * RUN / 2];
}

static void *sort_by_team(void *argument)
{
    struct team team = *(struct team *)argument;
    if (team.threads == 1 || team.n < 4 * PIECE) {
        if (team.n > 1)
            team.alone(team.a, team.n);
        return NULL;
    }
    size_t below = partition_together(team.a, team.n, choose_pivot(team.a, team.n), team.threads);
    if (below == 0 || below == team.n) {
        team.alone(team.a, team.n);
        return NULL;
    }
    int left = (int)((double)below / team.n * team.threads + 0.5);
    left = left < 1 ? 1 : left > team.threads - 1 ? team.threads - 1 : left;
    struct team first = {team.a, below, left, team.alone};
    struct team second = {team.a + below, team.n - below, team.threads - left, team.alone};
    pthread_t id;
    pthread_create(&id, NULL, sort_by_team, &first);
    sort_by_team(&second);
    pthread_join(id, NULL);
    return NULL;
}

static void sort_here(uint64_t *a, size_t n)
{
    sort_alone(a, n, depth_limit(n));
}

/* Sorts `n` words in ascending order with `threads` threads, each part by `sort_part` if that is not NULL. */
void sort_words(uint64_t *a, uint64_t n, int threads, alone sort_part)
{
    struct team all = {a, n, threads, sort_part ? sort_part : sort_here};
    sort_by_team(&all);
}

/* Writes `n` random words to a file. 0 or an errno; their sum goes to `*sum`. */
int write_random_words(int fd, uint64_t n, uint64_t seed, uint64_t *sum)
{
    enum { CHUNK = 1 << 17 };
    uint64_t *chunk = malloc(CHUNK * sizeof *chunk), state = seed * 2 + 1;
    *sum = 0;
    while (n) {
        size_t now = n < CHUNK ? n : CHUNK;
        for (size_t i = 0; i < now; i++) {
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            chunk[i] = state * 2685821657736338717u;
            *sum += chunk[i];
        }
        for (size_t done = 0; done < now * sizeof *chunk;) {
            ssize_t wrote = write(fd, (char *)chunk + done, now * sizeof *chunk - done);
            if (wrote < 0) {
                free(chunk);
                return errno;
            }
            done += wrote;
        }
        n -= now;
    }
    free(chunk);
    return 0;
}

/* 1 if the file holds `n` words in ascending order whose sum is `sum`, else 0; -1 if it cannot be read. */
int file_is_sorted(int fd, uint64_t n, uint64_t sum)
{
    enum { CHUNK = 1 << 17 };
    uint64_t *chunk = malloc(CHUNK * sizeof *chunk), last = 0, total = 0, count = 0;
    int sorted = 1;
    ssize_t got;
    while ((got = pread(fd, chunk, CHUNK * sizeof *chunk, count * sizeof *chunk)) > 0) {
        for (size_t i = 0; i < got / sizeof *chunk; i++) {
            sorted &= chunk[i] >= last;
            last = chunk[i];
            total += chunk[i];
        }
        count += got / sizeof *chunk;
    }
    free(chunk);
    return got < 0 ? -1 : sorted && count == n && total == sum;
}
