/*
 * What the guest's freestanding programs (init.c, exec.c) share: system calls and the little of a C library they need.
 *
 * No libc on purpose: these programs run while somebody waits, on a CPU that may be emulated, and a static glibc costs
 * more to start than they do to run. x86_64 only, as the guest is.
 */

#ifndef VMRT_BARE_H
#define VMRT_BARE_H

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long i64;

/* Returns what the kernel does: -errno for an error. */
static inline i64 call(i64 n, i64 a, i64 b, i64 c, i64 d, i64 e, i64 f)
{
    i64 r;
    register i64 r10 __asm__("r10") = d;
    register i64 r8 __asm__("r8") = e;
    register i64 r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(r)
                     : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return r;
}

#define CALL0(n) call(n, 0, 0, 0, 0, 0, 0)
#define CALL1(n, a) call(n, (i64)(a), 0, 0, 0, 0, 0)
#define CALL2(n, a, b) call(n, (i64)(a), (i64)(b), 0, 0, 0, 0)
#define CALL3(n, a, b, c) call(n, (i64)(a), (i64)(b), (i64)(c), 0, 0, 0)
#define CALL4(n, a, b, c, d) call(n, (i64)(a), (i64)(b), (i64)(c), (i64)(d), 0, 0)
#define CALL5(n, a, b, c, d, e) call(n, (i64)(a), (i64)(b), (i64)(c), (i64)(d), (i64)(e), 0)
#define CALL6(n, a, b, c, d, e, f) call(n, (i64)(a), (i64)(b), (i64)(c), (i64)(d), (i64)(e), (i64)(f))

/* The compiler may call these for any loop or initialiser. */
void *memset(void *to, int value, u64 count)
{
    char *p = to;
    while (count--)
        *p++ = (char)value;
    return to;
}

void *memcpy(void *to, const void *from, u64 count)
{
    char *p = to;
    const char *q = from;
    while (count--)
        *p++ = *q++;
    return to;
}

static inline u64 length(const char *s)
{
    u64 n = 0;
    while (s[n])
        n++;
    return n;
}

static inline int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

#endif
