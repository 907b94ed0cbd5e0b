/*
 * vmrt-pause: process 1 of the PID namespace that a pod's containers may share (vmrt/agent/sandbox.py). It does nothing.
 *
 * A process of its own, because a fork of the agent costs an emulated guest 77 ms and the pages that the two then no
 * longer share. Orphans of the namespace become its children: with SIGCHLD ignored the kernel reaps them (sigaction(2)).
 * It has no handler for any other signal, so the namespace's processes cannot end it (pid_namespaces(7)), and as it is
 * not dumpable they get at nothing of the guest through it.
 */

#include <asm/unistd.h>
#include <linux/prctl.h>

#include "bare.h"

enum { SIGCHLD_NUMBER = 17 };
#define IGNORE 1ul /* SIG_IGN */

__attribute__((noreturn, used)) static void start(void)
{
    static const struct { u64 handler, flags, restorer, mask; } ignored = { IGNORE, 0, 0, 0 };

    CALL5(__NR_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0);
    CALL5(__NR_prctl, PR_SET_NAME, "pause", 0, 0, 0);
    CALL4(__NR_rt_sigaction, SIGCHLD_NUMBER, &ignored, 0, sizeof ignored.mask);
    CALL3(__NR_close_range, 0, ~0U, 0);
    for (;;)
        CALL0(__NR_pause);
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tand $-16, %rsp\n\tcall start\n");
