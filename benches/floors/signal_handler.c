/* The floor under `fault="inline"`: the touching thread brings its own page, in the handler of SIGBUS. With a file
 * it reads the page from there first. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static int uffd = -1;
static long page;
static void *hot;
static char *base;
static int file = -1;

static void handler(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    int saved = errno;
    struct uffdio_copy copy = {
        .dst = (uintptr_t)info->si_addr & ~(uint64_t)(page - 1),
        .src = (uintptr_t)hot,
        .len = page,
    };
    if (file >= 0 && pread(file, hot, page, copy.dst - (uintptr_t)base) != page)
        _exit(70);
    if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST)
        _exit(70);
    errno = saved;
}

/* Memory of `length` bytes, none of it present. 0 or an errno; the address goes to `*address`.
 * `fd` is the file that the pages come from, -1 for none; one thread at a time may touch then. */
int signal_handler_map(size_t length, int fd, void **address)
{
    file = fd;
    page = sysconf(_SC_PAGESIZE);
    uffd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (uffd < 0)
        return errno;
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_SIGBUS};
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
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (sigaction(SIGBUS, &action, NULL))
        return errno;
    base = memory;
    *address = memory;
    return 0;
}
