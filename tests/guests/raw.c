/*
 * A kernel without a hypercall page: every hypercall is the syscall instruction itself, HYPERVISOR_iret with the
 * frame of nine words, VIRT_BASE 0 (the pfn of an address is its page number). Probes lstar_enter, pv_hypercall's
 * register rules, hypercall page initialisation left undone.
 */
#include "lib.h"

static u64 clobber[8];
static void call(const char *name, u64 nr, u64 a1)
{
    u64 ret, rcx, rdi = a1, rsi = 0x51, rdx = 0xd1;
    __asm__ volatile("mov $0x101010, %%r10d; mov $0x080808, %%r8d; mov $0x090909, %%r9d; mov $0x0c0c0c, %%r12d; mov $0xc, %%ecx; mov $0x11, %%r11d;"
                     "syscall; 1: lea 1b(%%rip), %%rbx; sub %%rcx, %%rbx;"
                     "mov %%r10, clobber10; mov %%r8, clobber10+8; mov %%r9, clobber10+16; mov %%r12, clobber10+24"
                     : "=a"(ret), "=b"(rcx), "+D"(rdi), "+S"(rsi), "+d"(rdx) : "a"(nr) : "rcx", "r8", "r9", "r10", "r11", "r12", "memory");
    say("%s: %e", name, ret);
    say(" rcx is the next rip %d rdi %d rsi %lx rdx %lx r10 %lx r8 %lx r9 %lx r12 %lx\n", rcx == 0, rdi == a1, rsi, rdx, clobber[0], clobber[1], clobber[2], clobber[3]);
}
u64 *const clobber_ref __attribute__((used)) = clobber;
__asm__(".globl clobber10\n.set clobber10, clobber");

static int through(struct regs *r) { return r->vector == 3; }

void test(void)
{
    u64 before = 0x1234, after = 0, r11 = 0;
    say("magic %c%c%c%c cmdline given %d pages %d\n", si->magic[0], si->magic[1], si->magic[2], si->magic[3], si->cmd_line[0] != 0, si->nr_pages > 1000);
    say("pt_base is cr3 %d first p2m is pfn 0 %d\n", ({ u64 c; __asm__ volatile("mov %%cr3, %0" : "=r"(c)); c >> 12; }) == MFN(si->pt_base), M2P[p2m[0]] == 0);
    call("pagesize with an argument", HC_xen_version, 7);
    call("no such version command", HC_xen_version, 11);
    call("unknown", 63, 0);
    call("huge", 1ul << 32, 0);
    call("number with upper half", 1ul << 32 | HC_xen_version, 7);
    call("-1", -1ul, 0);
    __asm__ volatile("mov $17, %%eax; mov $7, %%edi; syscall; mov %%r11, %0" : "=r"(r11) : : "rax", "rcx", "rdi", "r11", "memory");
    say("r11 has the flags, IF %ld\n", r11 >> 9 & 1);
    /* iret by hand: rax, r11, rcx, flags, rip, cs, rflags, rsp, ss */
    __asm__ volatile("mov %%rsp, %%rbx; push $0xe02b; push %%rbx; push $0x202; push $0xe030; push $1f; push $0; push $0xcc; push $0xbb; push $0xaa;"
                     "mov $23, %%eax; syscall; 1: mov %%rax, %0; mov %%rcx, %1; mov %%r11, %2"
                     : "=m"(after), "=m"(before), "=m"(r11) : : "rax", "rbx", "rcx", "r11", "memory");
    say("iret: rax %lx rcx %lx r11 %lx mask %d\n", after, before, r11, VI->upcall_mask);
    __asm__ volatile("mov %%rsp, %%rbx; push $0xe02b; push %%rbx; push $0x002; push $0xe032; push $1f; push $0x100; push $0xcc; push $0xbb; push $0xaa;"
                     "mov $23, %%eax; syscall; 1: mov %%rax, %0; sub $1b, %%rcx; mov %%rcx, %1; mov %%r11, %2"
                     : "=m"(after), "=m"(before), "=m"(r11) : : "rax", "rbx", "rcx", "r11", "memory");
    say("iret in_syscall: rax %lx rcx-rip %lx r11 IF %ld mask %d\n", after, before, r11 >> 9 & 1, VI->upcall_mask);
    trap_hook = through;
    TRY("int3", , ); show_full("int3");
    trap_hook = 0;
    TRY("ud2", , ); show_full("ud2");
    TRY("movb 0x7fffffff, %%al", , ); show_full("null-ish"); say("  cr2 %lx\n", seen.cr2);
    rc("page 0 mapped, unmap", remap((void *)0, 0));
    TRY("movb 8, %%al", , ); show_full("null"); say("  cr2 %lx\n", seen.cr2);
}
