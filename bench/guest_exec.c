/* guest_exec COMMAND ...: from a privileged container in the guest's own PID namespace, runs a command where the agent is
 * and as the agent would (its mount and cgroup namespace, the root cgroup), and prints the nanoseconds from starting it to
 * its first octet.
 *
 * The cgroup namespace is what matters: with the mount option nsdelegate the kernel lets a process of a container's cgroup
 * namespace move none into a cgroup outside of it, and says ENOENT (cgroup-v2.rst, "Delegation Containment"). */

#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int fail(const char *what)
{
    perror(what);
    return 1;
}

static long long now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

int main(int argc, char **argv)
{
    char *environment[] = { "PATH=/usr/sbin:/usr/bin:/sbin:/bin", 0 };
    char octets[4096];
    int cgroup = open("/proc/1/ns/cgroup", O_RDONLY | O_CLOEXEC), mounts = open("/proc/1/ns/mnt", O_RDONLY | O_CLOEXEC);
    int procs, ends[2], status;
    long long began, first;
    pid_t child;

    if (argc < 2 || cgroup < 0 || mounts < 0)
        return fail("the namespaces of PID 1");
    if (setns(cgroup, CLONE_NEWCGROUP) || setns(mounts, CLONE_NEWNS) || chdir("/"))
        return fail("setns");
    procs = open("/sys/fs/cgroup/cgroup.procs", O_WRONLY | O_CLOEXEC);
    if (procs < 0 || write(procs, "0", 1) != 1)
        return fail("the root cgroup");
    if (pipe2(ends, O_CLOEXEC))
        return fail("pipe");
    began = now();
    child = vfork();
    if (child == 0) {
        dup2(ends[1], 1);
        execvpe(argv[1], argv + 1, environment);
        _exit(127);
    }
    close(ends[1]);
    if (child < 0 || read(ends[0], octets, 1) != 1)
        return fail("the command said nothing");
    first = now();
    while (read(ends[0], octets, sizeof octets) > 0)
        ;
    if (waitpid(child, &status, 0) != child || status)
        return fail("the command failed");
    printf("%lld\n", first - began);
    return 0;
}
