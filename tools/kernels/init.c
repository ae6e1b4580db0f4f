/* The first process of an emulated machine: makes the host's file system usable, runs one command, ends.
 *
 * Linked statically, since nothing else is there when it begins. The order of events:
 *
 *   modules      /modules/NN, in order: virtio, 9p, overlay
 *   /machine     the host's root by 9p, read-only (QEMU refuses writes, whatever the guest asks)
 *   /guest       an overlay: /machine below, memory above, so programs may write anywhere and nothing stays
 *   /guest/run/job  a folder of the host: argv, environment and folder come from there, status goes there
 *
 * argv and environment are files of strings that end in NUL. The second serial line is the command's output.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define MOST 4096

static void end(void) {
    sync();
    /* QEMU runs with -no-reboot: asking for one is the end of it on every machine type. */
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

static void die(const char *what) {
    fprintf(stderr, "init: %s: %s\n", what, strerror(errno));
    end();
}

static void mounted(const char *type, const char *at, unsigned long flags, const char *options) {
    mkdir(at, 0755);
    if (mount(type, at, type, flags, options) < 0)
        die(at);
}

static void load_modules(void) {
    for (int number = 0; number < 100; number++) {
        char path[32];
        snprintf(path, sizeof path, "/modules/%02d", number);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return;
        if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)
            die(path);
        close(fd);
        unlink(path);
    }
}

/* A file of strings that end in NUL, as an array that ends in NULL. */
static char **strings(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat about;
    if (fd < 0 || fstat(fd, &about) < 0)
        die(path);
    char *text = malloc(about.st_size + 1), **list = calloc(MOST + 1, sizeof *list);
    ssize_t have = 0, more;
    while ((more = read(fd, text + have, about.st_size - have)) > 0)
        have += more;
    close(fd);
    text[have] = 0;
    int count = 0;
    for (char *at = text; at < text + have && count < MOST; at += strlen(at) + 1)
        list[count++] = at;
    return list;
}

/* Bytes of the command come out as they are: no line is cooked, nothing is echoed. */
static int output(void) {
    int fd = open("/dev/ttyS1", O_RDWR | O_NOCTTY);
    struct termios raw;
    if (fd < 0 || tcgetattr(fd, &raw) < 0)
        die("/dev/ttyS1");
    cfmakeraw(&raw);
    cfsetspeed(&raw, B115200);
    tcsetattr(fd, TCSANOW, &raw);
    return fd;
}

static void loopback(void) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    if (fd >= 0) {
        ioctl(fd, SIOCSIFFLAGS, &request);
        close(fd);
    }
}

static void report(int status) {
    char text[16];
    int fd = open("/run/job/status", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    int length = snprintf(text, sizeof text, "%d\n", status);
    if (fd < 0 || write(fd, text, length) != length)
        die("/run/job/status");
    close(fd);
}

int main(void) {
    mounted("devtmpfs", "/dev", 0, "");
    /* The kernel opened the console before there was a /dev, and may have failed. */
    int console = open("/dev/console", O_WRONLY | O_NOCTTY);
    dup2(console, 1);
    dup2(console, 2);
    load_modules();
    mkdir("/machine", 0755);
    if (mount("machine", "/machine", "9p", MS_RDONLY, "trans=virtio,version=9p2000.L,msize=512000,cache=loose") < 0)
        die("the host's file system");
    mounted("tmpfs", "/above", 0, "mode=755,size=75%");
    mkdir("/above/files", 0755);
    mkdir("/above/work", 0755);
    mkdir("/guest", 0755);
    if (mount("overlay", "/guest", "overlay", 0, "lowerdir=/machine,upperdir=/above/files,workdir=/above/work") < 0)
        die("the overlay");

    if (chdir("/guest") < 0 || mount("/dev", "dev", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0)
        die("/guest");
    mounted("proc", "/proc", 0, "");
    mounted("sysfs", "/sys", 0, "");
    mounted("tmpfs", "/run", 0, "mode=755");
    mounted("tmpfs", "/dev/shm", 0, "mode=1777");
    mounted("devpts", "/dev/pts", 0, "mode=620,ptmxmode=666");
    mounted("hugetlbfs", "/dev/hugepages", 0, "");
    mounted("cgroup2", "/sys/fs/cgroup", 0, "");
    symlink("/proc/self/fd", "/dev/fd");
    mkdir("/run/scratch", 01777);
    mkdir("/run/job", 0755);
    if (mount("job", "/run/job", "9p", 0, "trans=virtio,version=9p2000.L,msize=512000,cache=none") < 0)
        die("/run/job");
    loopback();

    char **arguments = strings("/run/job/argv"), **environment = strings("/run/job/environment");
    char *folder = strings("/run/job/folder")[0];
    int out = output();
    pid_t command = fork();
    if (command == 0) {
        setsid();
        int nothing = open("/dev/null", O_RDONLY);
        dup2(nothing, 0);
        dup2(out, 1);
        dup2(out, 2);
        close(nothing);
        close(out);
        close(console);
        if (chdir(folder) == 0)
            execvpe(arguments[0], arguments, environment);
        dprintf(2, "%s in %s: %s\n", arguments[0], folder, strerror(errno));
        _exit(127);
    }
    /* Orphans become children of the first process: they are reaped here, and the command among them. */
    for (int status;;) {
        pid_t ended = wait(&status);
        if (ended == command) {
            tcdrain(out);
            report(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
            end();
        }
    }
}
