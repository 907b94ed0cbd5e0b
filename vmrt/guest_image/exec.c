/*
 * vmrt-exec: starts one more process in a running container, for the agent (vmrt/agent/enter.py).
 *
 *     vmrt-exec PLAN REPORT TARGET
 *
 * Three inherited descriptors: the plan, a memfd of records; a SOCK_SEQPACKET socket on which to report; a pidfd of the
 * container's main process. What `crun exec` does, without its 50 ms of libraries, JSON and state under emulation. The
 * order, and why:
 *
 *     undumpable, cgroup, limits,    while the guest's own /proc, /sys and files are in view and nothing of the container
 *     label, filter                  can reach us: no path of the container's is opened before its namespaces are ours
 *     setns, close                   all namespaces at once; then nothing of the guest is open but the report
 *     clone(CLONE_PARENT)            into the container's PID namespace; the child is the agent's own
 *     terminal, directory, program   as root of the container, as crun looks for them
 *     filter, capabilities, user     a filter needs CAP_SYS_ADMIN unless no_new_privs is set: then it comes last
 *     execve                         closes the report: its end of file is the agent's "started"
 *
 * While the child is inside and not yet the container's program, it cannot be traced: it is not dumpable, and its memory
 * belongs to the guest's user namespace. /proc/PID/exe of it is this file, on the guest's read-only root image.
 *
 * A plan's record is a letter and a value, ended by a zero octet:
 *
 *     N flags of setns(2)     U be root of the user namespace     G a cgroup.procs to enter    L an AppArmor profile
 *     O oom_score_adj         R rlimit, "number soft hard"        S file with a seccomp filter F its flags
 *     u uid  g gid  x one more gid  m umask  n no_new_privs  c working directory  e NAME=value  a argument
 *     t a terminal, "rows columns"
 *     B P E I A               capability sets: bounding, permitted, effective, inheritable, ambient
 *
 * Reports: 'P' and the child's pid (4 octets); 'T' with the terminal's master as SCM_RIGHTS; 'E', a letter for who is to
 * blame ('c': the command or directory, 's': anything else), errno (4 octets) and a text. Numbers are little-endian.
 */

#include <asm/ioctls.h>
#include <asm/stat.h>
#include <asm/unistd.h>
#include <linux/capability.h>
#include <linux/errno.h>
#include <linux/fcntl.h>
#include <linux/filter.h>
#include <linux/magic.h>
#include <linux/mman.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <linux/stat.h>

#include "bare.h"

enum { PATH_SIZE = 4096, FILTER_MAX = BPF_MAXINSNS, CAPABILITIES_MAX = 64, SIGCHLD_NUMBER = 17, SIGNALS = 64 };
enum { SOL_SOCKET_LEVEL = 1, SCM_RIGHTS_TYPE = 1, MSG_NOSIGNAL_FLAG = 0x4000 };
enum { PTMX_DEVICE = 5 << 8 | 2 };
enum { X_OK_MODE = 1, SEEK_TO_END = 2 };

struct rlimit_record { u64 soft, hard; };
/* statfs(2): only the type is of interest. */
struct statfs_buffer { i64 type; i64 rest[15]; };
struct message { void *name; u64 name_length; void *vectors; u64 vector_count; void *control; u64 control_length; i64 flags; };
struct vector { void *base; u64 length; };
struct rights { u64 length; u32 level, type; int fd, padding; };

static struct {
    i64 namespaces, seccomp_flags, umask;
    u64 bounding, permitted, effective, inheritable, ambient;
    u32 uid, gid;
    u8 root_of_user_namespace, no_new_privileges, terminal;
    unsigned short rows, columns;
    const char *cgroup, *label, *oom_score, *filter, *directory, *path;
    u64 group_count, limit_count;
    u32 *groups;
    const char **limits;
    char **arguments, **environment;
} plan;

static i64 report = -1;
static struct sock_filter filter[FILTER_MAX];
static u64 filter_length;

static u64 put(char *into, u64 at, u64 size, const char *text)
{
    while (*text && at < size)
        into[at++] = *text++;
    return at;
}

__attribute__((noreturn)) static void leave(int status)
{
    for (;;)
        CALL1(__NR_exit_group, status);
}

__attribute__((noreturn)) static void fail_around(char blame, const char *what, const char *which, const char *end, i64 error)
{
    char text[1024] = { 'E', blame };
    u32 number = error < 0 ? (u32)-error : 0;
    u64 size = 6;

    memcpy(text + 2, &number, sizeof number);
    size = put(text, size, sizeof text, what);
    size = put(text, size, sizeof text, which);
    size = put(text, size, sizeof text, end);
    CALL3(__NR_write, report, text, size);
    leave(1);
}

__attribute__((noreturn)) static void fail(char blame, const char *what, const char *which, i64 error)
{
    fail_around(blame, what, which, "", error);
}

static i64 check(i64 result, const char *what)
{
    if (result < 0)
        fail('s', what, "", result);
    return result;
}

/* A decimal number; moves the text behind it and one separator. A sign is taken for rlimits' -1. */
static u64 number(const char **text)
{
    const char *p = *text;
    u64 value = 0;
    int negative = *p == '-';

    p += negative;
    if (*p < '0' || *p > '9')
        fail('s', "plan: no number: ", *text, -EINVAL);
    while (*p >= '0' && *p <= '9')
        value = value * 10 + (u64)(*p++ - '0');
    *text = p + (*p == ' ');
    return negative ? 0 - value : value;
}

static void *memory(u64 size)
{
    i64 at = CALL6(__NR_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    return (void *)check(at, "mmap");
}

static void write_file(const char *path, const char *text, const char *what)
{
    i64 fd = CALL3(__NR_open, path, O_WRONLY | O_CLOEXEC, 0);

    if (fd < 0)
        fail('s', what, path, fd);
    check(CALL3(__NR_write, fd, text, length(text)), what);
    CALL1(__NR_close, fd);
}

/* --- the plan ----------------------------------------------------------------------------------------------------- */

static void take(char *record, u64 *arguments, u64 *environment)
{
    const char *value = record + 1;

    switch (record[0]) {
    case 'N': plan.namespaces = (i64)number(&value); break;
    case 'U': plan.root_of_user_namespace = 1; break;
    case 'G': plan.cgroup = value; break;
    case 'L': plan.label = value; break;
    case 'O': plan.oom_score = value; break;
    case 'R': plan.limits[plan.limit_count++] = value; break;
    case 'S': plan.filter = value; break;
    case 'F': plan.seccomp_flags = (i64)number(&value); break;
    case 'u': plan.uid = (u32)number(&value); break;
    case 'g': plan.gid = (u32)number(&value); break;
    case 'x': plan.groups[plan.group_count++] = (u32)number(&value); break;
    case 'm': plan.umask = (i64)number(&value); break;
    case 'n': plan.no_new_privileges = 1; break;
    case 't':
        plan.terminal = 1;
        plan.rows = (unsigned short)number(&value);
        plan.columns = (unsigned short)number(&value);
        break;
    case 'c': plan.directory = value; break;
    case 'B': plan.bounding = number(&value); break;
    case 'P': plan.permitted = number(&value); break;
    case 'E': plan.effective = number(&value); break;
    case 'I': plan.inheritable = number(&value); break;
    case 'A': plan.ambient = number(&value); break;
    case 'a': plan.arguments[(*arguments)++] = record + 1; break;
    case 'e':
        plan.environment[(*environment)++] = record + 1;
        if (value[0] == 'P' && value[1] == 'A' && value[2] == 'T' && value[3] == 'H' && value[4] == '=')
            plan.path = value + 5;
        break;
    default: fail('s', "plan: unknown record: ", record, -EINVAL);
    }
}

static void read_plan(i64 fd)
{
    u64 size = (u64)check(CALL3(__NR_lseek, fd, 0, SEEK_TO_END), "plan: size");
    u64 records = 0, arguments = 0, environment = 0;
    char *text;

    if (size == 0)
        fail('s', "plan: empty", "", -EINVAL);
    text = (char *)check(CALL6(__NR_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0), "plan: mmap");
    CALL1(__NR_close, fd);
    if (text[size - 1])
        fail('s', "plan: the last record has no end", "", -EINVAL);
    for (u64 at = 0; at < size; at++)
        records += !text[at];
    plan.arguments = memory((records + 1) * sizeof(char *));
    plan.environment = memory((records + 1) * sizeof(char *));
    plan.limits = memory((records + 1) * sizeof(char *));
    plan.groups = memory((records + 1) * sizeof(u32));
    for (u64 at = 0; at < size; at += length(text + at) + 1)
        take(text + at, &arguments, &environment);
    if (!arguments || !plan.directory)
        fail('s', "plan: no argument or no directory", "", -EINVAL);
}

/* --- in the guest ------------------------------------------------------------------------------------------------- */

static void load_filter(void)
{
    i64 fd = CALL3(__NR_open, plan.filter, O_RDONLY | O_CLOEXEC, 0);
    u64 have = 0;
    i64 n;

    /* A container with a profile never gets a process without one. */
    if (fd < 0)
        fail('s', "seccomp filter ", plan.filter, fd);
    while (have < sizeof filter && (n = check(CALL3(__NR_read, fd, (char *)filter + have, sizeof filter - have), "seccomp filter")) > 0)
        have += (u64)n;
    CALL1(__NR_close, fd);
    filter_length = have / sizeof filter[0];
    if (filter_length == 0 || have % sizeof filter[0])
        fail('s', "seccomp filter: not whole: ", plan.filter, -EINVAL);
}

static void set_label(void)
{
    static const char *const files[] = { "/proc/thread-self/attr/apparmor/exec", "/proc/thread-self/attr/exec" };
    char text[PATH_SIZE];
    char enabled = 'N';
    u64 size;
    i64 fd = CALL3(__NR_open, "/sys/module/apparmor/parameters/enabled", O_RDONLY | O_CLOEXEC, 0);

    if (fd >= 0) {
        CALL3(__NR_read, fd, &enabled, 1);
        CALL1(__NR_close, fd);
    }
    if (enabled != 'Y')
        return; /* the container's own process has no profile either */
    size = put(text, 0, sizeof text, "exec ");
    size = put(text, size, sizeof text, plan.label);
    if (size == sizeof text)
        fail('s', "AppArmor profile: name too long", "", -ENAMETOOLONG);
    fd = CALL3(__NR_open, files[0], O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0)
        fd = CALL3(__NR_open, files[1], O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0)
        fail('s', "AppArmor: ", files[1], fd);
    /* Kept over clone(2), so that it need not be written through the container's /proc. */
    fd = CALL3(__NR_write, fd, text, size);
    if (fd < 0)
        fail('s', "AppArmor profile ", plan.label, fd);
}

static void set_limits(void)
{
    for (u64 i = 0; i < plan.limit_count; i++) {
        const char *value = plan.limits[i];
        struct rlimit_record limit;
        u64 resource = number(&value);

        limit.soft = number(&value);
        limit.hard = number(&value);
        check(CALL4(__NR_prlimit64, 0, resource, &limit, 0), "setrlimit");
    }
}

/* What is ignored stays ignored over execve: by Python, and two signals of its own by glibc's posix_spawn. */
static void reset_signals(void)
{
    static const struct { u64 handler, flags, restorer, mask; } standard;

    for (int n = 1; n <= SIGNALS; n++)
        CALL4(__NR_rt_sigaction, n, &standard, 0, sizeof standard.mask);
}

static void enter(i64 target)
{
    if (plan.namespaces)
        check(CALL2(__NR_setns, target, plan.namespaces), "setns");
    if (plan.root_of_user_namespace) {
        /* Root's id outside has no name inside. A namespace without a root has the process's own user instead. */
        if (CALL3(__NR_setresgid, 0, 0, 0) < 0)
            check(CALL3(__NR_setresgid, plan.gid, plan.gid, plan.gid), "setresgid");
        if (CALL3(__NR_setresuid, 0, 0, 0) < 0)
            check(CALL3(__NR_setresuid, plan.uid, plan.uid, plan.uid), "setresuid");
    }
    /* Whatever was inherited: 0 to 2 are the process's, the report is ours. */
    if (report > 3)
        check(CALL3(__NR_close_range, 3, report - 1, 0), "close_range");
    check(CALL3(__NR_close_range, report + 1, ~0U, 0), "close_range");
}

/* --- in the container --------------------------------------------------------------------------------------------- */

static void send_terminal(int master)
{
    char letter = 'T';
    struct vector vector = { &letter, 1 };
    struct rights rights = { 20, SOL_SOCKET_LEVEL, SCM_RIGHTS_TYPE, master, 0 };
    struct message message = { 0, 0, &vector, 1, &rights, sizeof rights, 0 };

    check(CALL3(__NR_sendmsg, report, &message, MSG_NOSIGNAL_FLAG), "send the terminal");
}

/* A new terminal of the container's own devpts. The container may have put anything in the place of /dev/ptmx. */
static void open_terminal(void)
{
    int unlocked = 0;
    unsigned short size[4] = { plan.rows, plan.columns, 0, 0 }; /* struct winsize */
    struct stat info;
    struct statfs_buffer place;
    i64 slave, master;

    master = check(CALL3(__NR_open, "/dev/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC, 0), "open /dev/ptmx");
    check(CALL2(__NR_fstat, master, &info), "fstat /dev/ptmx");
    check(CALL2(__NR_fstatfs, master, &place), "fstatfs /dev/ptmx");
    if ((info.st_mode & S_IFMT) != S_IFCHR || info.st_rdev != PTMX_DEVICE)
        fail('s', "/dev/ptmx is no terminal multiplexer", "", -ENOTTY);
    check(CALL3(__NR_ioctl, master, TIOCSPTLCK, &unlocked), "unlock the terminal");
    slave = check(CALL3(__NR_ioctl, master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC), "open the terminal");
    check(CALL2(__NR_fstatfs, slave, &place), "fstatfs of the terminal");
    if (place.type != DEVPTS_SUPER_MAGIC)
        fail('s', "the terminal is not of a devpts", "", -ENOTTY);
    check(CALL3(__NR_ioctl, slave, TIOCSWINSZ, size), "set the terminal's size");
    for (int fd = 0; fd < 3; fd++)
        check(CALL3(__NR_dup3, slave, fd, 0), "dup the terminal");
    check(CALL3(__NR_ioctl, 0, TIOCSCTTY, 0), "make the terminal controlling");
    if (plan.uid)
        check(CALL3(__NR_fchown, 0, plan.uid, -1), "chown the terminal");
    send_terminal((int)master);
    CALL1(__NR_close, slave);
    CALL1(__NR_close, master);
}

static i64 executable(const char *path)
{
    struct stat info;
    i64 r = CALL4(__NR_faccessat2, AT_FDCWD, path, X_OK_MODE, AT_EACCESS);

    if (r < 0 || (r = CALL2(__NR_stat, path, &info)) < 0)
        return r;
    return (info.st_mode & S_IFMT) == S_IFREG ? 0 : -EPERM;
}

/* The program's path, by $PATH where its name has no slash; relative ones from the working directory (libcrun's rules). */
static i64 find(const char *name, char *path)
{
    const char *it = plan.path ? plan.path : "";
    i64 error = -ENOENT;
    u64 size = 0;
    int has_slash = 0;

    for (const char *p = name; *p; p++)
        has_slash |= *p == '/';
    if (has_slash || name[0] == '.') {
        if (name[0] != '/') {
            size = put(path, size, PATH_SIZE, plan.directory[0] == '/' ? "" : "/");
            size = put(path, size, PATH_SIZE, plan.directory);
            size = put(path, size, PATH_SIZE, "/");
        }
        size = put(path, size, PATH_SIZE, name);
        if (size == PATH_SIZE)
            return -ENAMETOOLONG;
        path[size] = 0;
        return executable(path);
    }
    for (;;) {
        const char *end = it;
        i64 r;

        while (*end && *end != ':')
            end++;
        size = 0;
        while (it < end && size < PATH_SIZE)
            path[size++] = *it++;
        if (size == 0)
            path[size++] = '.';
        size = put(path, size, PATH_SIZE, "/");
        size = put(path, size, PATH_SIZE, name);
        if (size < PATH_SIZE) {
            path[size] = 0;
            r = executable(path);
            if (r == 0)
                return 0;
            if (r != -ENOENT)
                error = r;
        }
        if (!*end)
            return error;
        it = end + 1;
    }
}

static i64 change_directory(void)
{
    static char here[PATH_SIZE];
    i64 r = CALL1(__NR_chdir, plan.directory);

    if (r < 0)
        return r;
    /* A directory that is not below our root is "(unreachable)". */
    r = CALL2(__NR_getcwd, here, sizeof here);
    return r < 0 ? r : here[0] == '/' ? 0 : -EXDEV;
}

static void own_streams(void)
{
    struct stat info;

    /* Pipes only: /dev/null is everybody's, a terminal has its owner. */
    for (int fd = 0; fd < 3; fd++)
        if (CALL2(__NR_fstat, fd, &info) == 0 && (info.st_mode & S_IFMT) == S_IFIFO)
            CALL3(__NR_fchown, fd, plan.uid, plan.gid); /* a user who is not mapped here goes without */
}

static void apply_filter(void)
{
    struct sock_fprog program = { (unsigned short)filter_length, filter };
    i64 r;

    if (!filter_length)
        return;
    r = CALL3(__NR_seccomp, SECCOMP_SET_MODE_FILTER, plan.seccomp_flags, &program);
    if (r == -EINVAL) /* a flag that the kernel does not know */
        r = CALL3(__NR_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
    check(r, "seccomp");
}

static void become_user(void)
{
    struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
    struct __user_cap_data_struct data[2];
    i64 r;

    for (int i = 0; i < 2; i++) {
        data[i].effective = (u32)(plan.effective >> (32 * i));
        data[i].permitted = (u32)(plan.permitted >> (32 * i));
        data[i].inheritable = (u32)(plan.inheritable >> (32 * i));
    }
    for (int n = 0; n < CAPABILITIES_MAX; n++) {
        if (plan.bounding >> n & 1)
            continue;
        r = CALL5(__NR_prctl, PR_CAPBSET_DROP, n, 0, 0, 0);
        if (r == -EINVAL)
            break; /* behind the kernel's last */
        check(r, "drop a bounding capability");
    }
    check(CALL5(__NR_prctl, PR_SET_KEEPCAPS, 1, 0, 0, 0), "keep capabilities");
    check(CALL3(__NR_setresgid, plan.gid, plan.gid, plan.gid), "setresgid");
    check(CALL3(__NR_setresuid, plan.uid, plan.uid, plan.uid), "setresuid");
    check(CALL2(__NR_capset, &header, data), "capset");
    check(CALL5(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "clear ambient capabilities");
    for (int n = 0; n < CAPABILITIES_MAX; n++)
        if (plan.ambient >> n & 1) {
            /* As crun: one that is not permitted and inheritable is left out. */
            r = CALL5(__NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, n, 0, 0);
            if (r != -EPERM && r != -EINVAL)
                check(r, "raise an ambient capability");
        }
    if (plan.no_new_privileges)
        check(CALL5(__NR_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
}

__attribute__((noreturn)) static void become_process(void)
{
    static char path[PATH_SIZE + 1];
    const char *name = plan.arguments[0];
    i64 moved, found;

    check(CALL0(__NR_setsid), "setsid");
    if (plan.terminal)
        open_terminal();
    moved = change_directory();
    found = find(name, path);
    if (found == -ENOENT)
        fail_around('c', "executable file `", name, "` not found in $PATH", found);
    own_streams();
    CALL1(__NR_umask, plan.umask);
    check(CALL2(__NR_setgroups, plan.group_count, plan.groups), "setgroups");
    if (!plan.no_new_privileges)
        apply_filter();
    become_user();
    /* A file system (NFS) may tell its user more than root. */
    if (found < 0 && (found = find(name, path)) < 0)
        fail_around('c', "open executable `", name, "`", found);
    if (moved < 0 && (moved = change_directory()) < 0)
        fail_around('c', "chdir `", plan.directory, "`", moved);
    if (plan.no_new_privileges)
        apply_filter();
    fail_around('c', "exec `", name, "`", CALL3(__NR_execve, path, plan.arguments, plan.environment));
}

__attribute__((noreturn, used)) static void start(u64 *stack)
{
    i64 count = (i64)stack[0], descriptors[3], child;
    const char **words = (const char **)(stack + 1);

    if (count != 4)
        leave(2);
    for (int i = 0; i < 3; i++)
        descriptors[i] = (i64)number(&words[i + 1]);
    report = descriptors[1];
    check(CALL3(__NR_fcntl, report, F_SETFD, FD_CLOEXEC), "report");
    check(CALL5(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0), "undumpable");
    reset_signals();
    read_plan(descriptors[0]);
    if (plan.cgroup)
        write_file(plan.cgroup, "0", "enter cgroup ");
    if (plan.filter)
        load_filter();
    if (plan.oom_score)
        write_file("/proc/self/oom_score_adj", plan.oom_score, "oom_score_adj: ");
    if (plan.label)
        set_label();
    set_limits(); /* the container's user namespace could not raise one */
    enter(descriptors[2]);
    child = check(CALL5(__NR_clone, CLONE_PARENT | SIGCHLD_NUMBER, 0, 0, 0, 0), "clone");
    if (child == 0)
        become_process();
    {
        char text[5] = { 'P' };
        u32 pid = (u32)child;

        memcpy(text + 1, &pid, sizeof pid);
        CALL3(__NR_write, report, text, sizeof text);
    }
    leave(0);
}

/* The stack as the kernel leaves it: argc, argv. A C function expects to have been called on an aligned one. */
__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall start\n");
