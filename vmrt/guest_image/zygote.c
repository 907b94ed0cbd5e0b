/*
 * vmrt-zygote.so: keeps crun loaded, so that a container does not wait for its libraries (vmrt/agent/zygote.py).
 *
 *     LD_PRELOAD=/usr/lib/vmrt-zygote.so crun REQUESTS
 *
 * Loading and relocating crun's eleven libraries takes an emulated guest longer than all that crun does. Here the dynamic
 * loader does it once: this library stands before crun's main(), waits for requests on the SOCK_SEQPACKET socket whose
 * descriptor is REQUESTS, and lets main() run in a copy of the process that has never run it. So nothing of one
 * command can reach the next: what they share is what the loader had made before the first one.
 *
 * A request is the command's words, each ended by a zero octet, with three descriptors (SCM_RIGHTS) for its standard
 * streams. The copy is what posix_spawn(3) would start: those three and no other descriptor, a session of its own,
 * signals as they were at the start. It is a child of our parent (CLONE_PARENT), the agent, which waits for it as for
 * any other. The C library is not told of the new process: its only wrong notion is then the thread id, as in the
 * process of the container, which crun makes in the same way.
 *
 * An answer is 'P' with the child's pid, or 'E' with errno, 4 octets, little-endian. The end of the requests is the end
 * of this program.
 *
 * No C library here either (bare.h), because the machine that compiles this may have a newer one than the guest; dlsym
 * alone is taken from the guest's.
 */

#include <asm/unistd.h>
#include <linux/errno.h>
#include <linux/sched.h>

#pragma GCC visibility push(hidden) /* our memcpy must not become crun's */
#include "bare.h"

enum { REQUEST_MAX = 16384, WORDS_MAX = 64, STREAMS = 3, SIGCHLD_NUMBER = 17 };
enum { MSG_NOSIGNAL_FLAG = 0x4000, MSG_TRUNC_FLAG = 0x20, MSG_CTRUNC_FLAG = 8 };
#define NEXT ((void *)-1l) /* RTLD_NEXT of dlsym(3) */

struct message { void *name; u64 name_length; void *vectors; u64 vector_count; void *control; u64 control_length; i64 flags; };
struct vector { void *base; u64 length; };
struct rights { u64 length; u32 level, type; int descriptors[STREAMS]; int padding; };

typedef int Main(int, char **, char **);
typedef int Start(Main *, int, char **, void (*)(void), void (*)(void), void (*)(void), void *);

static Main *crun;
static char words[REQUEST_MAX];
static char *arguments[WORDS_MAX + 1];

__attribute__((noreturn)) static void leave(int status)
{
    for (;;)
        CALL1(__NR_exit_group, status);
}

static void answer(i64 requests, char kind, i64 number)
{
    char text[5] = { kind };
    u32 value = (u32)number;

    memcpy(text + 1, &value, sizeof value);
    CALL6(__NR_sendto, requests, text, sizeof text, MSG_NOSIGNAL_FLAG, 0, 0);
}

/* Takes one request; returns how many words it has, or -errno for one that is not as it should be. */
static i64 receive(i64 requests, int *streams)
{
    struct vector vector = { words, sizeof words };
    struct rights rights = { 0 };
    /* Without the padding: it would take one descriptor more. */
    struct message message = { 0, 0, &vector, 1, &rights, sizeof rights - sizeof rights.padding, 0 };
    u64 head = (u64)((char *)rights.descriptors - (char *)&rights);
    i64 size, count = 0;

    do
        size = CALL3(__NR_recvmsg, requests, &message, 0);
    while (size == -EINTR);
    if (size <= 0)
        leave(size < 0);
    for (u64 i = 0; i < STREAMS; i++) /* none come as another type from our parent's kind of socket */
        streams[i] = rights.length >= head + (i + 1) * sizeof(int) ? rights.descriptors[i] : -1;
    if (message.flags & (MSG_TRUNC_FLAG | MSG_CTRUNC_FLAG) || streams[STREAMS - 1] < 0 || words[size - 1])
        return -EINVAL;
    for (i64 at = 0; at < size; at += (i64)length(words + at) + 1) {
        if (count == WORDS_MAX)
            return -E2BIG;
        arguments[count++] = words + at;
    }
    arguments[count] = 0;
    return count;
}

/* In the new process: becomes one that a program could have been started in. */
static void settle(const int *streams)
{
    int high[STREAMS];

    /* Away from 0 to 2 first: the streams themselves may lie there. */
    for (int i = 0; i < STREAMS; i++)
        high[i] = (int)CALL3(__NR_fcntl, streams[i], 0 /* F_DUPFD */, STREAMS);
    for (int i = 0; i < STREAMS; i++)
        if (high[i] < 0 || CALL3(__NR_dup3, high[i], i, 0) < 0)
            leave(127);
    if (CALL3(__NR_close_range, STREAMS, ~0U, 0) < 0 || CALL0(__NR_setsid) < 0)
        leave(127);
}

static int number(const char *text)
{
    int value = 0;

    while (*text >= '0' && *text <= '9')
        value = value * 10 + (*text++ - '0');
    return value;
}

/* Stands in for crun's main(); returns in new processes only. */
static int serve(int argc, char **argv, char **environment)
{
    char **kept = environment;
    i64 requests;

    if (argc != 2)
        leave(2);
    requests = number(argv[1]);
    /* The loader has read them; crun's hooks must not. */
    for (char **it = environment; *it; it++)
        if (!((*it)[0] == 'L' && (*it)[1] == 'D' && (*it)[2] == '_'))
            *kept++ = *it;
    *kept = 0;
    for (;;) {
        int streams[STREAMS];
        i64 count = receive(requests, streams);
        i64 result = count;

        if (count > 0) {
            result = CALL5(__NR_clone, CLONE_PARENT | SIGCHLD_NUMBER, 0, 0, 0, 0);
            if (result == 0) {
                settle(streams);
                return crun((int)count, arguments, environment);
            }
        }
        for (int i = 0; i < STREAMS; i++)
            if (streams[i] >= 0)
                CALL1(__NR_close, streams[i]);
        memset(words, 0, sizeof words); /* a command is nobody else's business */
        answer(requests, result < 0 ? 'E' : 'P', result < 0 ? -result : result);
    }
}

#pragma GCC visibility pop

void *dlsym(void *, const char *);

/* The C library's, which every program's start calls with its main(). */
int __libc_start_main(Main *program, int argc, char **argv, void (*init)(void), void (*fini)(void), void (*loader)(void), void *stack)
{
    Start *start = (Start *)dlsym(NEXT, "__libc_start_main");

    if (!start)
        leave(3);
    crun = program;
    return start(serve, argc, argv, init, fini, loader, stack);
}
