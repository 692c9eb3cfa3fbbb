/*
 * The second vCPU: vcpu_op initialise (arch_set_info_guest and what it refuses), up, is_up, down and up again,
 * events between the two, runstates, and the failsafe callback, which takes a second vCPU to provoke: a segment
 * register holds an LDT selector whose descriptor goes bad, and the context switch cannot load it any more
 * (load_segments). Runs with two vCPUs (for a dom0: dom0_max_vcpus=2). Only vCPU 0 prints.
 */
#include "lib.h"

struct context {
    u8 fpu[512];
    u64 flags; /* 1 i387 valid, 4 in kernel, 32 online */
    u64 r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, error_vector, rip, cs, rflags, rsp, ss, es, ds, fs, gs;
    struct trap_info traps[256];
    u64 ldt_base, ldt_ents, gdt_frames[16], gdt_ents, kernel_ss, kernel_sp, ctrlreg[8], debugreg[8], event_callback, failsafe_callback,
        syscall_callback, vm_assist, fs_base, gs_base_kernel, gs_base_user;
};
static struct context ctx __attribute__((aligned(16))), blank;
static u8 stack1[8192] __attribute__((aligned(4096)));
static volatile u64 stage, go, entry_regs[8], failsafe_seen[12], fs_now;
static u32 to1, to0;
static u64 *ldt;

static s64 vop(u32 cmd, u32 vcpu, void *arg) { return HC3(HC_vcpu_op, cmd, vcpu, arg); }
static void wait_for(u64 n)
{
    for (u32 spins = 0; stage < n; spins++) {
        HC2(HC_sched_op, 0, 0);
        if (spins > 10000000) {
            say("vCPU 1 does not come to stage %ld\n", n);
            shutdown(3);
        }
    }
}
static void poll(u32 port)
{
    struct { const u32 *ports; u32 nr; u64 timeout; } p = { &port, 1, 0 };
    HC2(HC_sched_op, 3, &p);
}
static void clear(u32 port) { __atomic_and_fetch((u64 *)&SI->pending[port / 64], ~(1ul << port % 64), __ATOMIC_SEQ_CST); }

static int failsafe(struct regs *r)
{
    if (r->vector != V_FAILSAFE)
        return 0;
    for (int i = 0; i < 4; i++)
        failsafe_seen[i] = failsafe_sel[i];
    failsafe_seen[4] = r->cs; failsafe_seen[5] = SI->vcpu[1].upcall_mask; failsafe_seen[6]++;
    failsafe_seen[7] = (u64)r - (u64)stack1 < sizeof stack1;
    return 1;
}

/* vCPU 1. */
void __attribute__((used)) second(void)
{
    u64 fs;
    stage = 1;
    poll(to1); clear(to1);                     /* 1: woken by an event */
    stage = 2;
    EV(4, &to0);
    poll(to1); clear(to1);
    { struct mmuext_op o = { 13, (u64)ldt, 8 }; HC(HC_mmuext_op, &o, 1, 0, DOMID_SELF); }
    __asm__ volatile("mov %w0, %%fs" : : "r"(7));
    HC2(HC_update_descriptor, MFN(ldt) << 12, 0);
    stage = 3;
    poll(to1); clear(to1);                     /* vCPU 0 runs; back here the segment cannot be loaded */
    __asm__ volatile("mov %%fs, %0" : "=r"(fs));
    fs_now = fs;
    stage = 4;
    vop(2, 1, 0);                              /* down */
    stage = 5;                                 /* and up again, where it stopped */
    vop(2, 1, 0);
    for (;;)
        ;
}
__asm__(".pushsection .text\nstart1: mov %rdi, entry_regs; mov %rsi, entry_regs+8; mov %rax, entry_regs+16; pushfq; popq entry_regs+24;"
        "mov %cs, %rax; mov %rax, entry_regs+32; mov %ss, %rax; mov %rax, entry_regs+40; mov %fs:0, %rax; mov %rax, entry_regs+48;"
        "mov %rsp, entry_regs+56; cld; call second\n.popsection");
extern char start1[];

static void fill(void)
{
    u64 cr3;
    __asm__ volatile("mov %%cr3, %0" : "=r"(cr3));
    ctx = blank;
    ctx.flags = 4; /* not online (32): such a vCPU counts as up, but nothing ever wakes it */
    ctx.rdi = 0xd1; ctx.rsi = 0x51; ctx.rax = 0xa0;
    ctx.rip = (u64)start1; ctx.cs = KCS; ctx.rflags = 0x202; ctx.rsp = (u64)stack1 + sizeof stack1; ctx.ss = KDS;
    ctx.kernel_ss = KDS; ctx.kernel_sp = (u64)stack1 + sizeof stack1;
    for (u32 v = 0; v < 32; v++)
        if (v != 2 && v != 15)
            ctx.traps[v] = (struct trap_info){ v, 0, KCS, (u64)trap_entries + v * 32 };
    ctx.ctrlreg[3] = cr3;
    ctx.event_callback = (u64)upcall_entry; ctx.failsafe_callback = (u64)failsafe_entry; ctx.syscall_callback = (u64)syscall_entry;
    ctx.fs_base = (u64)pages[1];
}
static void refuse(const char *name) { rc(name, vop(0, 1, &ctx)); fill(); }

void test(void)
{
    struct { u32 vcpu, port; } bi = { 1, 0 };
    struct { u32 state, pad; u64 entry, time[4]; } rs;
    ldt = (u64 *)pages[0];
    ldt[0] = 0x00cff3000000ffffull;
    set_ro(ldt);
    *(u64 *)pages[1] = 0xf5;

    say("-- before\n");
    rc("is_up 1", vop(3, 1, 0)); rc("up 1", vop(1, 1, 0)); rc("down 1", vop(2, 1, 0)); rc("is_up 2", vop(3, 2, 0));
    rc("get_runstate_info", vop(4, 1, &rs)); say("  state %u\n", rs.state);
    rc("bind_ipi to vcpu 1", EV(7, &bi)); to1 = bi.port;
    bi.vcpu = 0; EV(7, &bi); to0 = bi.port;
    { struct { u32 virq, vcpu, port; } bv = { 0, 1, 0 }; rc("VIRQ_TIMER of vcpu 1", EV(1, &bv)); EV(3, &bv.port); }

    say("-- initialise\n");
    fill();
    ctx.rip = (u64)NONCANON; refuse("rip non-canonical");
    ctx.kernel_sp = (u64)NONCANON; refuse("kernel_sp non-canonical");
    ctx.traps[77].address = (u64)NONCANON; refuse("trap address non-canonical");
    ctx.ldt_base = (u64)pages[0] + 8; ctx.ldt_ents = 1; refuse("ldt unaligned");
    ctx.ldt_ents = 9000; refuse("ldt too long");
    ctx.gdt_ents = 9000; refuse("gdt too long");
    ctx.gdt_ents = 8; ctx.gdt_frames[0] = 0xfffffffff; refuse("gdt frame nothing");
    ctx.gdt_ents = 8; ctx.gdt_frames[0] = MFN(pages[5]); refuse("gdt frame writable");
    ctx.ctrlreg[3] = 0; refuse("cr3 zero");
    ctx.ctrlreg[3] = MFN(pages[5]) << 12; refuse("cr3 a plain page");
    ctx.ctrlreg[3] = 0xfffffffff000; refuse("cr3 nothing");
    rc("bad pointer", vop(0, 1, EFAULT_ADDR));
    rc("initialise 2", vop(0, 2, &ctx));
    rc("is_up 1", vop(3, 1, 0));
    rc("good", vop(0, 1, &ctx));
    rc("again", vop(0, 1, &ctx));
    rc("is_up 1", vop(3, 1, 0));
    rc("get_runstate_info", vop(4, 1, &rs)); say("  state %u\n", rs.state);
    HC2(HC_sched_op, 0, 0); say("  has run %d\n", stage != 0);

    say("-- up\n");
    rc("up", vop(1, 1, 0)); rc("up again", vop(1, 1, 0)); rc("is_up 1", vop(3, 1, 0));
    wait_for(1);
    say("  rdi %lx rsi %lx rax %lx flags %lx cs %lx ss %lx fs:0 %lx rsp is %d\n", entry_regs[0], entry_regs[1], entry_regs[2], entry_regs[3] & 0x247700,
        entry_regs[4] & 0xffff, entry_regs[5] & 0xffff, entry_regs[6], entry_regs[7] == (u64)stack1 + sizeof stack1);
    say("  its mask %d\n", SI->vcpu[1].upcall_mask);
    for (u32 i = 0; i < 50; i++) HC2(HC_sched_op, 0, 0);
    rc("get_runstate_info", vop(4, 1, &rs)); say("  state %u\n", rs.state);
    rc("send to it", EV(4, &to1));
    wait_for(2); poll(to0);
    say("  answer pending %ld for vcpu 0: sel %ld, for vcpu 1: sel %ld\n", SI->pending[0] >> to0 & 1, VI->pending_sel & 1, SI->vcpu[1].pending_sel & 1);
    clear(to0); VI->upcall_pending = 0; VI->pending_sel = 0;

    say("-- failsafe callback\n");
    trap_hook = failsafe;
    EV(4, &to1);
    wait_for(3);
    for (u32 i = 0; i < 50; i++) HC2(HC_sched_op, 0, 0);
    EV(4, &to1);
    wait_for(4);
    say("called %ld ds %lx es %lx fs %lx gs %lx cs %lx mask %lx mask inside %ld on its stack %ld, fs then %lx\n", failsafe_seen[6], failsafe_seen[0], failsafe_seen[1],
        failsafe_seen[2], failsafe_seen[3], failsafe_seen[4] & 0xffff, failsafe_seen[4] >> 32, failsafe_seen[5], failsafe_seen[7], fs_now & 0xffff);
    trap_hook = 0;

    say("-- down\n");
    while (vop(3, 1, 0)) HC2(HC_sched_op, 0, 0);
    rc("is_up 1", vop(3, 1, 0)); say("  stage %ld\n", stage);
    rc("get_runstate_info", vop(4, 1, &rs)); say("  state %u\n", rs.state);
    rc("send to it", EV(4, &to1));
    rc("down again", vop(2, 1, 0));
    rc("initialise again", vop(0, 1, &ctx));
    rc("up", vop(1, 1, 0)); wait_for(5); say("  stage %ld\n", stage);
    while (vop(3, 1, 0)) HC2(HC_sched_op, 0, 0);
    rc("is_up 1", vop(3, 1, 0));
    { struct { u32 port, vcpu; } bv = { to1, 0 }; rc("bind_vcpu of an ipi", EV(8, &bv)); }
    { u64 mask = 2; rc("TLB_FLUSH_MULTI of it", mmuext1(8, 0, (u64)&mask)); mask = 4; rc("TLB_FLUSH_MULTI of vcpu 2", mmuext1(8, 0, (u64)&mask)); }
}
