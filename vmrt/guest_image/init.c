/*
 * /init of vmrt's initramfs: loads the drivers, finds the root disk, hands over to the agent.
 *
 * Freestanding on purpose: no libc, no shell, no fork. A shell script would cost one fork and exec per module, which is
 * most of what this phase takes when the CPU is emulated. What to do is decided when the image is built and written
 * into /plan (see vmrt/guest_image/initramfs.py), one step a line. A kernel that has its drivers built in mounts the root
 * disk itself and starts the same program from there; its plan, which only has to name the agent, lies in /usr/lib.
 *
 *     load PATH            finit_module(2) with that file; a module that the machine has no device for is no error
 *     root SERIAL FSTYPE   mount, read-only, the virtio-blk disk with that serial, and make it the root
 *     exec PATH ARG...     become that program
 *
 * Every failure ends in one line on the console that starts with "vmrt-init:", and in an exit, which makes the kernel
 * panic: with panic=-1 the VM ends and the daemon reports the console's tail.
 */

#include "bare.h"

enum {
    SYS_read = 0, SYS_write = 1, SYS_open = 2, SYS_close = 3, SYS_nanosleep = 35, SYS_execve = 59, SYS_exit = 60,
    SYS_chdir = 80, SYS_mkdir = 83, SYS_rmdir = 84, SYS_unlink = 87, SYS_chroot = 161, SYS_mount = 165,
    SYS_umount2 = 166, SYS_finit_module = 313,
};
enum { ENODEV = 19, ENOENT = 2, EEXIST = 17, O_CLOEXEC = 02000000 };
enum { MS_RDONLY = 1, MS_NOSUID = 2, MS_NODEV = 4, MS_NOEXEC = 8, MS_MOVE = 8192, MNT_DETACH = 2 };
/* virtio-blk registers its disks while its module loads; this is for a slow one. */
enum { ROOT_TRIES = 2000, ROOT_WAIT_NS = 1000000 };
enum { PLAN_MAX = 8192, WORDS_MAX = 32 };

#define MOUNT(from, to, type, flags) CALL5(SYS_mount, from, to, type, flags, 0)

static void say(const char *s)
{
    CALL3(SYS_write, 2, s, length(s));
}

__attribute__((noreturn)) static void die(const char *what, const char *which, i64 error)
{
    char digits[24];
    char *p = digits + sizeof digits;
    u64 n = error < 0 ? (u64)-error : 0;

    *--p = 0;
    do
        *--p = (char)('0' + n % 10);
    while (n /= 10);
    say("vmrt-init: ");
    say(what);
    say(" ");
    say(which);
    say(": errno ");
    say(p);
    say("\n");
    for (;;)
        CALL1(SYS_exit, 1);
}

static i64 slurp(const char *path, char *into, u64 size)
{
    i64 fd = CALL3(SYS_open, path, O_CLOEXEC, 0);
    u64 have = 0;
    i64 n = 0;

    if (fd < 0)
        return fd;
    while (have < size - 1 && (n = CALL3(SYS_read, fd, into + have, size - 1 - have)) > 0)
        have += (u64)n;
    CALL1(SYS_close, fd);
    if (n < 0)
        return n;
    into[have] = 0;
    return (i64)have;
}

static void load(const char *path)
{
    i64 fd = CALL3(SYS_open, path, O_CLOEXEC, 0);
    i64 r;

    if (fd < 0)
        die("cannot open module", path, fd);
    r = CALL3(SYS_finit_module, fd, "", 0);
    CALL1(SYS_close, fd);
    if (r < 0 && r != -EEXIST && r != -ENODEV)
        die("cannot load module", path, r);
    /* The initramfs is memory that nobody frees later: give the file's pages back now. */
    CALL1(SYS_unlink, path);
}

static int find_disk(const char *serial, char *device)
{
    char path[] = "/sys/block/vd?/serial";
    char found[64];

    for (char letter = 'a'; letter <= 'z'; letter++) {
        i64 n;
        path[13] = letter;
        n = slurp(path, found, sizeof found);
        if (n < 0)
            continue;
        if (n > 0 && found[n - 1] == '\n')
            found[n - 1] = 0;
        if (same(found, serial)) {
            device[7] = letter;
            return 1;
        }
    }
    return 0;
}

static void root(const char *serial, const char *type)
{
    static const struct { i64 seconds, nanoseconds; } pause = { 0, ROOT_WAIT_NS };
    char device[] = "/dev/vd?";
    int tries = 0;
    i64 r;

    if ((r = MOUNT("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)) < 0)
        die("cannot mount", "/sys", r);
    while (!find_disk(serial, device)) {
        if (tries++ == ROOT_TRIES)
            die("no virtio-blk disk has the serial", serial, -ENOENT);
        CALL2(SYS_nanosleep, &pause, 0);
    }
    CALL2(SYS_umount2, "/sys", MNT_DETACH);
    if ((r = MOUNT("devtmpfs", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC)) < 0)
        die("cannot mount", "/dev", r);
    if ((r = MOUNT(device, "/root", type, MS_RDONLY | MS_NODEV)) < 0)
        die("cannot mount the root disk as", type, r);
    if ((r = MOUNT("/dev", "/root/dev", 0, MS_MOVE)) < 0)
        die("cannot move", "/dev", r);
    /* What switch_root(8) does: the rest of the initramfs is freed, then the new root is moved over the old one. */
    CALL1(SYS_unlink, "/plan");
    CALL1(SYS_unlink, "/init");
    CALL1(SYS_chdir, "/root");
    if ((r = MOUNT(".", "/", 0, MS_MOVE)) < 0)
        die("cannot move the root to", "/", r);
    if ((r = CALL1(SYS_chroot, ".")) < 0)
        die("cannot change root to", "/", r);
    CALL1(SYS_chdir, "/");
}

/* Cut a line into words in place; return how many, the list ended by a null pointer. */
static int split(char *line, char **words)
{
    int n = 0;

    while (*line && n < WORDS_MAX - 1) {
        while (*line == ' ')
            *line++ = 0;
        if (!*line)
            break;
        words[n++] = line;
        while (*line && *line != ' ')
            line++;
    }
    words[n] = 0;
    return n;
}

__attribute__((noreturn, used)) static void run(void)
{
    static char plan[PLAN_MAX];
    static char *words[WORDS_MAX];
    static char *environment[] = {
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "LANG=C.UTF-8", "TERM=dumb", 0,
    };
    i64 n = slurp("/plan", plan, sizeof plan);

    if (n == -ENOENT)
        n = slurp("/usr/lib/vmrt-plan", plan, sizeof plan);
    if (n < 0)
        die("cannot read", "/plan", n);
    for (char *line = plan; *line;) {
        char *end = line;
        int count;

        while (*end && *end != '\n')
            end++;
        if (*end)
            *end++ = 0;
        count = split(line, words);
        line = end;
        if (count == 2 && same(words[0], "load")) {
            load(words[1]);
        } else if (count == 3 && same(words[0], "root")) {
            root(words[1], words[2]);
        } else if (count >= 2 && same(words[0], "exec")) {
            n = CALL3(SYS_execve, words[1], words + 1, environment);
            die("cannot start", words[1], n);
        } else if (count) {
            die("unknown step in /plan:", words[0], 0);
        }
    }
    die("no exec step in", "/plan", 0);
}

/* The kernel enters with the stack aligned to 16 octets; a C function expects to have been called. */
__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tcall run\n");
