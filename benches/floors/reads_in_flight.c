/* The floor under `fault="threads"` with many touching threads: memory whose missing pages come from a file on a
 * disk, read by O_DIRECT while no handler waits for them. There is no limit, no table, no deadline, and nothing leaves.
 *
 * "ring": one handler. Messages and reads are waited for in one io_uring. It takes at most FEW of each in a turn: with
 * sixteen it put everything that had arrived in place before it asked for more, and the disk stood still meanwhile.
 * "pair": two handlers and native asynchronous reads. One reads messages and asks for what they need; the other one
 * puts in place what has arrived.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE = 4096, PLACES = 256, FEW = 4, MANY = 16 };

#define MESSAGES UINT64_MAX

static int uffd = -1, file = -1;
static char *base;

/* Pages under way: where each is read to, and where it goes. */
static char *buffers;
static uint64_t goes_to[PLACES];
static unsigned free_places[PLACES], free_count;
static pthread_spinlock_t places;

static void never(void)
{
    _exit(70);
}

static unsigned take_place(const struct uffd_msg *message)
{
    pthread_spin_lock(&places);
    if (!free_count)
        never();
    unsigned place = free_places[--free_count];
    pthread_spin_unlock(&places);
    goes_to[place] = message->arg.pagefault.address & ~(uint64_t)(PAGE - 1);
    return place;
}

static void put_in_place(unsigned place, int64_t result)
{
    struct uffdio_copy copy = {
        .dst = goes_to[place],
        .src = (uintptr_t)(buffers + place * PAGE),
        .len = PAGE,
    };
    /* Two threads may have asked for one page. */
    if (result != PAGE || (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST))
        never();
    pthread_spin_lock(&places);
    free_places[free_count++] = place;
    pthread_spin_unlock(&places);
}

static int messages(struct uffd_msg *into, int most)
{
    ssize_t got = read(uffd, into, most * sizeof *into);
    return got < 0 ? 0 : got / (ssize_t)sizeof *into;
}

/* One handler, io_uring. */

static struct {
    int fd;
    unsigned *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    unsigned queued;
} ring;

static int ring_open(void)
{
    struct io_uring_params params = {.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN};
    ring.fd = syscall(SYS_io_uring_setup, PLACES, &params);
    if (ring.fd < 0)
        return errno;
    size_t submission = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t completion = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    char *rings = mmap(NULL, submission > completion ? submission : completion, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQ_RING);
    ring.sqes = mmap(NULL, params.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_POPULATE, ring.fd, IORING_OFF_SQES);
    if (rings == MAP_FAILED || ring.sqes == MAP_FAILED)
        return errno;
    ring.sq_tail = (unsigned *)(rings + params.sq_off.tail);
    ring.sq_mask = (unsigned *)(rings + params.sq_off.ring_mask);
    ring.sq_array = (unsigned *)(rings + params.sq_off.array);
    ring.cq_head = (unsigned *)(rings + params.cq_off.head);
    ring.cq_tail = (unsigned *)(rings + params.cq_off.tail);
    ring.cq_mask = (unsigned *)(rings + params.cq_off.ring_mask);
    ring.cqes = (struct io_uring_cqe *)(rings + params.cq_off.cqes);
    return 0;
}

static void queue(struct io_uring_sqe entry)
{
    unsigned tail = *ring.sq_tail, index = tail & *ring.sq_mask;
    ring.sqes[index] = entry;
    ring.sq_array[index] = index;
    __atomic_store_n(ring.sq_tail, tail + 1, __ATOMIC_RELEASE);
    ring.queued++;
}

static void queue_poll(void)
{
    queue((struct io_uring_sqe){
        .opcode = IORING_OP_POLL_ADD,
        .fd = uffd,
        .poll32_events = POLLIN,
        .len = IORING_POLL_ADD_MULTI,
        .user_data = MESSAGES,
    });
}

static void enter(unsigned least)
{
    int taken = syscall(SYS_io_uring_enter, ring.fd, ring.queued, least, IORING_ENTER_GETEVENTS, NULL, 0);
    if (taken >= 0)
        ring.queued -= taken;
    else if (errno != EINTR && errno != EBUSY && errno != EAGAIN)
        never();
}

static int ring_failed = -1;
static pthread_barrier_t ring_tried;

static void *ring_handler(void *unused)
{
    (void)unused;
    /* A ring of a single issuer belongs to the thread that opens it. */
    ring_failed = ring_open();
    int failed = ring_failed;
    pthread_barrier_wait(&ring_tried);
    if (failed)
        return NULL;
    queue_poll();
    for (;;) {
        struct uffd_msg some[FEW];
        int asked = messages(some, FEW), landed = 0;
        for (int i = 0; i < asked; i++) {
            unsigned place = take_place(&some[i]);
            queue((struct io_uring_sqe){
                .opcode = IORING_OP_READ,
                .fd = file,
                .off = goes_to[place] - (uintptr_t)base,
                .addr = (uintptr_t)(buffers + place * PAGE),
                .len = PAGE,
                .user_data = place,
            });
        }
        if (ring.queued)
            enter(0);
        unsigned head = *ring.cq_head;
        while (landed < FEW && head != __atomic_load_n(ring.cq_tail, __ATOMIC_ACQUIRE)) {
            struct io_uring_cqe entry = ring.cqes[head & *ring.cq_mask];
            __atomic_store_n(ring.cq_head, ++head, __ATOMIC_RELEASE);
            if (entry.user_data != MESSAGES) {
                put_in_place(entry.user_data, entry.res);
                landed++;
            } else if (!(entry.flags & IORING_CQE_F_MORE)) {
                queue_poll();
            }
        }
        if (!asked && !landed)
            enter(1);
    }
}

/* Two handlers, native asynchronous reads. */

static aio_context_t context;

static void *asker(void *unused)
{
    (void)unused;
    for (;;) {
        struct uffd_msg some[MANY];
        struct iocb orders[MANY], *pointers[MANY];
        int asked = messages(some, MANY);
        for (int i = 0; i < asked; i++) {
            unsigned place = take_place(&some[i]);
            orders[i] = (struct iocb){
                .aio_data = place,
                .aio_lio_opcode = IOCB_CMD_PREAD,
                .aio_fildes = file,
                .aio_buf = (uintptr_t)(buffers + place * PAGE),
                .aio_nbytes = PAGE,
                .aio_offset = goes_to[place] - (uintptr_t)base,
            };
            pointers[i] = &orders[i];
        }
        if (asked && syscall(SYS_io_submit, context, asked, pointers) != asked)
            never();
    }
    return NULL;
}

static void *placer(void *unused)
{
    (void)unused;
    for (;;) {
        struct io_event some[MANY / 2];
        int landed = syscall(SYS_io_getevents, context, 1, MANY / 2, some, NULL);
        for (int i = 0; i < landed; i++)
            put_in_place(some[i].data, some[i].res);
    }
    return NULL;
}

/* Registered memory of `length` bytes over the file at `path`, none of it present. 0 or an errno; the address goes to
 * `*address`. `one` is one handler, else there are two. */
int reads_in_flight_map(const char *path, size_t length, int one, void **address)
{
    file = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (file < 0)
        return errno;
    uffd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY | (one ? O_NONBLOCK : 0));
    if (uffd < 0)
        return errno;
    struct uffdio_api api = {.api = UFFD_API};
    if (ioctl(uffd, UFFDIO_API, &api))
        return errno;
    base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    buffers = mmap(NULL, PLACES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || buffers == MAP_FAILED)
        return errno;
    madvise(base, length, MADV_NOHUGEPAGE);
    memset(buffers, 1, PLACES * PAGE);
    pthread_spin_init(&places, 0);
    for (; free_count < PLACES; free_count++)
        free_places[free_count] = free_count;
    struct uffdio_register registration = {
        .range = {.start = (uintptr_t)base, .len = length},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    if (ioctl(uffd, UFFDIO_REGISTER, &registration))
        return errno;
    *address = base;
    pthread_t thread;
    if (!one) {
        if (syscall(SYS_io_setup, PLACES, &context))
            return errno;
        int failed = pthread_create(&thread, NULL, asker, NULL);
        return failed ? failed : pthread_create(&thread, NULL, placer, NULL);
    }
    pthread_barrier_init(&ring_tried, NULL, 2);
    int failed = pthread_create(&thread, NULL, ring_handler, NULL);
    if (failed)
        return failed;
    pthread_barrier_wait(&ring_tried);
    return ring_failed;
}
