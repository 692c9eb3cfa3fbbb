/*
 * What makes Xen crash the domain (domain_crash): which=N chooses. The transcript ends with "before"; a line
 * "survived" would be wrong, "done" never comes.
 */
#include "lib.h"

void test(void)
{
    u32 which = num("which", 0);
    say("before %u\n", which);
    switch (which) {
    case 0: /* iret to user mode without a user page table */
        enter_user(0x400000, 0x401000, 0x202, 0, 0xe033);
        break;
    case 1: /* iret with an unreadable frame */
        __asm__ volatile("mov %0, %%rsp; jmp do_iret" : : "r"((u64)EFAULT_ADDR + 0x800));
        break;
    case 2: /* an exception without a handler */
        HC1(HC_set_trap_table, 0);
        __asm__ volatile("ud2");
        break;
    case 3: /* an exception with nowhere to put its frame */
        __asm__ volatile("mov %0, %%rsp; ud2" : : "r"((u64)EFAULT_ADDR + 0x800));
        break;
    case 4: /* an event without a callback */
        HC3(HC_set_callbacks, 0, failsafe_entry, syscall_entry);
        VI->upcall_pending = 1;
        VI->upcall_mask = 0;
        HC2(HC_xen_version, 0, 0);
        break;
    case 5: /* shutdown with reason crash */
        shutdown(3);
        break;
    case 6: /* stack in Xen's memory */
        __asm__ volatile("mov %0, %%rsp; ud2" : : "r"((u64)XEN_ADDR + 0x800));
        break;
    case 7: { /* an iret inside a multicall */
        static struct { u64 op, result, args[6]; } mc;
        mc.op = HC_iret;
        HC2(HC_multicall, &mc, 1);
        break;
    }
    case 8: /* the upcall frame has no stack */
        VI->upcall_pending = 1;
        VI->upcall_mask = 0;
        __asm__ volatile("mov %0, %%rsp; mov $17, %%eax; mov $7, %%edi; syscall" : : "r"((u64)EFAULT_ADDR + 0x800));
        break;
    case 9: /* non-canonical stack */
        __asm__ volatile("mov %0, %%rsp; ud2" : : "r"((u64)NONCANON + 0x800));
    }
    say("survived\n");
}
