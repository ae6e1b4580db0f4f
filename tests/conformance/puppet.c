/* A process whose memory a test uses: it does what it is told and knows nothing of userfaultfd.
 *
 * Each thread serves one socket: a request comes in, the answer goes out when it is done. A thread that
 * sleeps on a fault simply does not answer, and the test, in another process, is free to serve it. Signals
 * that an access raises (SIGBUS, SIGSEGV) are part of the answer.
 *
 * usage: puppet FD    (FD: a SOCK_SEQPACKET socket)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SYSCALL, LOAD, STORE, READ, WRITE, THREAD, FORK, SEND_FD, RECEIVE_FD, BUMP };
enum { PAYLOAD = 1 << 16, SECONDS_TO_LIVE = 300 };

struct request {
    uint64_t op;      /* low byte: what to do; bit 8+i: argument i of a SYSCALL is the payload's address */
    uint64_t a[7];
    uint64_t length;  /* of the payload */
};

struct reply {
    int64_t result;
    int64_t error;    /* errno */
    int64_t signal;   /* that the access raised, 0: none */
    int64_t code;     /* si_code */
    int64_t cures;    /* how often the signal handler ran the cure */
    uint64_t length;
};

/* What a signal handler does about a SIGBUS before the access is tried again. */
struct cure {
    int fd;
    unsigned long request;
    void *argument;
};

struct worker {
    int socket;
    sigjmp_buf back;
    int code;
    struct cure cure;
    int64_t cures;
    int received;     /* descriptor that came with the request, or -1 */
    int sent;         /* descriptor that goes with the answer, or -1 */
    struct { struct request head; unsigned char payload[PAYLOAD]; } in;
    struct { struct reply head; unsigned char payload[PAYLOAD]; } out;
};

static __thread struct worker *self;

static void on_fault(int signal, siginfo_t *info, void *context)
{
    (void)context;
    if (signal == SIGBUS && self->cure.argument && self->cures < 8) {
        self->cures++;
        if (ioctl(self->cure.fd, self->cure.request, self->cure.argument) == 0)
            return; /* the access is tried again */
    }
    self->code = info->si_code;
    siglongjmp(self->back, signal);
}

/* Receives one packet into `in`. */
static ssize_t receive(struct worker *w)
{
    char control[CMSG_SPACE(sizeof(int))];
    struct iovec vector = {&w->in, sizeof w->in};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1,
                             .msg_control = control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(w->socket, &message, MSG_CMSG_CLOEXEC);
    struct cmsghdr *c = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    w->received = -1;
    if (c && c->cmsg_type == SCM_RIGHTS)
        memcpy(&w->received, CMSG_DATA(c), sizeof w->received);
    return got;
}

static void answer(struct worker *w)
{
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec vector = {&w->out, sizeof w->out.head + w->out.head.length};
    struct msghdr message = {.msg_iov = &vector, .msg_iovlen = 1};
    if (w->sent >= 0) {
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *c = CMSG_FIRSTHDR(&message);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof w->sent);
        memcpy(CMSG_DATA(c), &w->sent, sizeof w->sent);
    }
    if (sendmsg(w->socket, &message, MSG_NOSIGNAL) < 0)
        _exit(3);
}

/* One page of the stress test: a lock, a counter, and the counter again in its last bytes. */
struct page_head {
    uint32_t lock;
    uint32_t unused;
    uint64_t counter;
};

/* Locks random pages and counts up in each. -1: a page that was not whole was seen. */
static int64_t bump(uintptr_t base, uint64_t page, uint64_t pages, uint64_t seed, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        uintptr_t at = base + (seed >> 33) % pages * page;
        struct page_head *head = (struct page_head *)at;
        volatile uint64_t *tail = (volatile uint64_t *)(at + page - sizeof *tail);
        /* The first touch is a read, as a test of the fault's flags. A counter is never 0. */
        if (*(volatile uint64_t *)&head->counter == 0)
            return -1;
        while (__atomic_exchange_n(&head->lock, 1, __ATOMIC_ACQUIRE))
            sched_yield();
        if (*(volatile uint64_t *)&head->counter != *tail)
            return -1;
        *(volatile uint64_t *)&head->counter += 1;
        *tail += 1;
        __atomic_store_n(&head->lock, 0, __ATOMIC_RELEASE);
    }
    return count;
}

static void *serve(void *argument);

static void start_thread(int socket)
{
    pthread_t thread;
    struct worker *w = calloc(1, sizeof *w);
    if (!w)
        _exit(4);
    w->socket = socket;
    /* The worker's own memory is touched now, so that it never faults later. */
    memset(&w->in, 1, sizeof w->in);
    memset(&w->out, 1, sizeof w->out);
    if (pthread_create(&thread, NULL, serve, w))
        _exit(4);
    pthread_detach(thread);
}

static void call(struct worker *w)
{
    uint64_t *a = w->in.head.a;
    for (int i = 0; i < 7; i++)
        if (w->in.head.op >> (8 + i) & 1)
            a[i] = (uintptr_t)w->in.payload;
    long result = syscall(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    w->out.head.result = result;
    w->out.head.error = result == -1 ? errno : 0;
    /* What the call wrote into the payload goes back. */
    w->out.head.length = w->in.head.length;
    memcpy(w->out.payload, w->in.payload, w->in.head.length);
}

/* LOAD address; STORE address value. With a payload, a[2] and a[3] are the descriptor and the request of the
 * cure, and the payload is its struct. */
static void touch(struct worker *w, int store)
{
    uint64_t *a = w->in.head.a;
    if (w->in.head.length) {
        w->cure.fd = a[2];
        w->cure.request = a[3];
        w->cure.argument = w->in.payload;
    }
    volatile unsigned char *byte = (volatile unsigned char *)a[0];
    if (store)
        *byte = a[1];
    else
        w->out.head.result = *byte;
}

static void *serve(void *argument)
{
    struct worker *w = self = argument;
    for (;;) {
        if (receive(w) <= 0)
            return NULL;
        w->sent = -1;
        memset(&w->out.head, 0, sizeof w->out.head);
        w->cures = 0;
        memset(&w->cure, 0, sizeof w->cure);
        uint64_t *a = w->in.head.a;
        int signal = sigsetjmp(w->back, 1);
        if (signal == 0) {
            switch (w->in.head.op & 0xff) {
            case SYSCALL:
                call(w);
                break;
            case LOAD:
                touch(w, 0);
                break;
            case STORE:
                touch(w, 1);
                break;
            case READ:
                memcpy(w->out.payload, (void *)a[0], a[1]);
                w->out.head.length = a[1];
                break;
            case WRITE:
                memcpy((void *)a[0], w->in.payload, w->in.head.length);
                break;
            case THREAD:
                start_thread(w->received);
                break;
            case FORK: {
                pid_t child = fork();
                if (child == 0) {
                    prctl(PR_SET_PDEATHSIG, SIGKILL);
                    w->socket = w->received;
                    child = getpid();
                } else {
                    close(w->received);
                }
                w->out.head.result = child;
                w->out.head.error = child < 0 ? errno : 0;
                break;
            }
            case SEND_FD:
                w->sent = a[0];
                break;
            case RECEIVE_FD:
                w->out.head.result = w->received;
                break;
            case BUMP:
                w->out.head.result = bump(a[0], a[1], a[2], a[3], a[4]);
                break;
            }
        } else {
            w->out.head.signal = signal;
            w->out.head.code = w->code;
        }
        w->out.head.cures = w->cures;
        answer(w);
    }
}

int main(int argc, char **argv)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (argc != 2)
        return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(SECONDS_TO_LIVE);
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
    struct worker *w = calloc(1, sizeof *w);
    if (!w)
        return 4;
    w->socket = atoi(argv[1]);
    serve(w);
    return 0;
}
