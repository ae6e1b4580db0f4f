/* The floor under `fault="threads"`: memory whose missing pages a bare handler thread brings; and under
 * `userfault.serve`: a bare handler process.
 *
 * One thread blocks in read(2) on the userfaultfd, answers with UFFDIO_COPY of a page that is hot in its cache,
 * and does nothing else. No engine can be faster than this in the same placement of threads. With a file it reads
 * the page from there first, as whoever pages a file has to.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static int uffd = -1;
static long page;
static void *hot;
static char *base;
static int file = -1;

static void *handler(void *unused)
{
    (void)unused;
    struct uffd_msg message;
    while (read(uffd, &message, sizeof message) == sizeof message) {
        struct uffdio_copy copy = {
            .dst = message.arg.pagefault.address & ~(uint64_t)(page - 1),
            .src = (uintptr_t)hot,
            .len = page,
        };
        if (file >= 0 && pread(file, hot, page, copy.dst - (uintptr_t)base) != page)
            _exit(70);
        ioctl(uffd, UFFDIO_COPY, &copy);
    }
    return NULL;
}

/* Registered memory of `length` bytes, none of it present. 0 or an errno. */
static int prepare(size_t length, int fd)
{
    file = fd;
    page = sysconf(_SC_PAGESIZE);
    uffd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (uffd < 0)
        return errno;
    struct uffdio_api api = {.api = UFFD_API};
    if (ioctl(uffd, UFFDIO_API, &api))
        return errno;
    char *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        return errno;
    madvise(memory, length, MADV_NOHUGEPAGE);
    hot = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (hot == MAP_FAILED)
        return errno;
    memset(hot, 7, page);
    struct uffdio_register registration = {
        .range = {.start = (uintptr_t)memory, .len = length},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    if (ioctl(uffd, UFFDIO_REGISTER, &registration))
        return errno;
    base = memory;
    return 0;
}

/* Memory of `length` bytes, none of it present. 0 or an errno; the address goes to `*address`.
 * `fd` is the file that the pages come from, -1 for none. */
int handler_thread_map(size_t length, int fd, void **address)
{
    int failed = prepare(length, fd);
    pthread_t thread;
    if (!failed)
        failed = pthread_create(&thread, NULL, handler, NULL);
    *address = base;
    return failed;
}

/* The same, with the handler in a process of its own, whose number goes to `*pid`. */
int handler_process_map(size_t length, void **address, int *pid)
{
    int failed = prepare(length, -1);
    if (failed)
        return failed;
    *pid = fork();
    if (*pid < 0)
        return errno;
    if (*pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        handler(NULL);
        _exit(0);
    }
    *address = base;
    return 0;
}
