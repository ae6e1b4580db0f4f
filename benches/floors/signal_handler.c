/* The floor under `fault="inline"`: the touching thread brings its own page, in the handler of SIGBUS. */
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
    if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST)
        _exit(70);
    errno = saved;
}

/* Memory of `length` bytes, none of it present. 0 or an errno; the address goes to `*address`. */
int signal_handler_map(size_t length, void **address)
{
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
    *address = memory;
    return 0;
}
