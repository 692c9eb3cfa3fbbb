/*
 * User mode of a 64-bit PV guest: HYPERVISOR_iret, MMUEXT_NEW_USER_BASEPTR, the syscall callback, traps from
 * user mode on the kernel stack of stack_switch, %fs and %gs bases. Probes do_iret, toggle_guest_mode,
 * switch_to_kernel and int80_direct_trap of entry.S, create_bounce_frame's user part, do_set_segment_base.
 */
#include "lib.h"

#define UCODE 0x400000ul
#define UDATA 0x401000ul
#define URO 0x402000ul
#define USTACK (UDATA + 0xff0)
#define SNIPPET(name, code) \
    __asm__(".pushsection .rodata\n" #name "_start: " code "\n" #name "_end: .popsection"); \
    extern char name##_start[], name##_end[]

SNIPPET(u_syscall, "mov %rcx, %r12; mov %r11, %r13; mov $0x55, %eax; syscall; ud2");
SNIPPET(u_hypercall, "mov $17, %eax; xor %edi, %edi; syscall; ud2");
SNIPPET(u_ud2, "ud2");
SNIPPET(u_int3, "int3");
SNIPPET(u_div, "xor %ecx, %ecx; div %ecx");
SNIPPET(u_read_np, "mov 0x500000, %eax");
SNIPPET(u_write_np, "mov %eax, 0x500000");
SNIPPET(u_read_kernel, "mov $shared_page, %rax; mov (%rax), %eax");
SNIPPET(u_write_ro, "mov %eax, 0x402008");
SNIPPET(u_read_ro, "mov 0x402008, %eax; ud2");
SNIPPET(u_read_xen, "movabs $0xffff830000000000, %rax; mov (%rax), %eax");
SNIPPET(u_read_m2p, "movabs $0xffff800000000000, %rax; mov (%rax), %eax");
SNIPPET(u_noncanon, "movabs $0x8000000000000000, %rax; mov (%rax), %eax");
SNIPPET(u_jump_kernel, "mov $shared_page, %rax; jmp *%rax");
SNIPPET(u_cli, "cli");
SNIPPET(u_hlt, "hlt");
SNIPPET(u_rdmsr, "mov $0xc0000080, %ecx; rdmsr");
SNIPPET(u_in, "in $0x80, %al");
SNIPPET(u_cr0, "mov %cr0, %rax");
SNIPPET(u_cr2, "mov %rax, %cr2");
SNIPPET(u_clts, "clts");
SNIPPET(u_dr, "mov %dr7, %rax");
SNIPPET(u_lgdt, "lgdt 0x401000");
SNIPPET(u_cpuid, "xor %eax, %eax; cpuid; mov $1, %eax; ud2");
SNIPPET(u_fcpuid, "mov $0x40000000, %eax; .byte 0x0f, 0x0b, 'x', 'e', 'n'; cpuid; ud2");
SNIPPET(u_rdtsc, "rdtsc; ud2");
SNIPPET(u_int80, "int $0x80");
SNIPPET(u_int20, "int $0x20");
SNIPPET(u_popf, "pushq $0x3202; popfq; pushfq; pop %rax; ud2");
SNIPPET(u_gs, "mov %gs:0, %rax; mov %fs:0, %rbx; ud2");
SNIPPET(u_sel, "xor %eax, %eax; xor %ebx, %ebx; mov %ds, %eax; mov %gs, %ebx; ud2");
SNIPPET(u_loadsel, "mov $0xe02b, %eax; mov %eax, %ds; mov %eax, %es; xor %eax, %eax; mov %ds, %eax; ud2");
SNIPPET(u_badsel, "mov $0x1237, %eax; mov %eax, %ds");
SNIPPET(u_step, "nop; nop; ud2");
SNIPPET(u_nop, "nop; ud2");
SNIPPET(u_syscall32, ".byte 0x0f, 0x05, 0x0f, 0x0b"); /* run as 32-bit code */
SNIPPET(u_compat, ".byte 0x48, 0x0f, 0x0b");           /* 32-bit: dec %eax; ud2 */
SNIPPET(u_sysenter, "sysenter; ud2");

static u8 *code, *data, *ro, *kstack;
static struct regs got;
static u32 inside_mask;
static u64 inside_sp, snippet_len;

static int from_user(struct regs *r)
{
    if ((r->cs & 3) != 3)
        return 0;
    got = *r;
    inside_mask = VI->upcall_mask;
    inside_sp = (u64)(r + 1);
    leave_user();
}
static void event_from_user(struct regs *r)
{
    VI->pending_sel = 0;
    from_user(r);
}
static void run_cs(const char *name, const char *start, const char *end, u64 rflags, u64 vgcf, u64 cs)
{
    snippet_len = end - start;
    memset(code, 0xcc, 256);
    memcpy(code, start, snippet_len);
    memset(&got, 0, sizeof got);
    seen.n = 0;
    VI->upcall_mask = 1;
    enter_user(UCODE, USTACK, rflags, vgcf, cs);
    say("%s: trap %lx err %lx ", name, got.vector, got.error);
    say(got.rip - UCODE < PAGE ? "rip +%ld" : "rip elsewhere", got.rip - UCODE);
    say(" cs %lx mask %lx flags %lx rsp %ld ss %lx inside: mask %x flags %lx kstack %ld\n", got.cs & 0xffff, got.cs >> 32,
        got.rflags & 0x247700, got.rsp - USTACK, got.ss, inside_mask, seen.flags_inside & 0x44500,
        (u64)kstack + PAGE - inside_sp);
    if (got.vector == 14)
        say("  cr2 %lx\n", VI->cr2 >= BASE ? VI->cr2 - (u64)shared_page : VI->cr2);
}
#define RUN(name) run_cs(#name, name##_start, name##_end, 0x202, 0, 0xe033)
#define RUNF(name, rflags, vgcf) run_cs(#name, name##_start, name##_end, rflags, vgcf, 0xe033)

static void user_gs_base(void)
{
    u64 lo = 0, hi = 0;
    TRY("rdmsr", R("=a"(lo), "=d"(hi)), R("c"(0xc0000102)));
    say("  user gs base %lx\n", lo | hi << 32);
}
static void entry(const char *name, u64 *table, u32 i) { say("%s entry flags %lx%s\n", name, table[i] & 0xfff, table[i] >> 63 ? " nx" : ""); }

void test(void)
{
    u64 *l4 = (u64 *)pages[0], *l3 = (u64 *)pages[1], *l2 = (u64 *)pages[2], *l1 = (u64 *)pages[3];
    code = pages[4]; data = pages[5]; ro = pages[6]; kstack = pages[7];
    l1[0] = PTE(code, P | US);
    l1[1] = PTE(data, P | RW | US | A | D);
    l1[2] = PTE(ro, P | US);
    l2[UCODE >> 21 & 511] = PTE(l1, P | RW | US | A);
    l3[0] = PTE(l2, P | RW | US | A);
    l4[0] = PTE(l3, P | RW | US | A);
    say("-- page table\n");
    rc("user baseptr, still writable", mmuext1(15, MFN(l4), 0));
    rc("ro", set_ro(l4)); rc("ro", set_ro(l3)); rc("ro", set_ro(l2)); rc("ro", set_ro(l1));
    rc("user baseptr of an L3", mmuext1(15, MFN(l3), 0));
    rc("user baseptr", mmuext1(15, MFN(l4), 0));
    rc("again", mmuext1(15, MFN(l4), 0));
    rc("nonsense", mmuext1(15, 0xfffffffff, 0));
    entry("L4[0]", l4, 0); entry("L3[0]", l3, 0); entry("L2[2]", l2, 2);
    entry("L1[0]", l1, 0); entry("L1[1]", l1, 1); entry("L1[2]", l1, 2);
    say("Xen slots of the L4 visible: %d %d\n", l4[256] != 0, l4[511] != 0);
    rc("stack_switch", HC2(HC_stack_switch, 0xe02b, kstack + PAGE));
    trap_hook = from_user;
    upcall_hook = event_from_user;

    say("-- syscall\n");
    RUN(u_syscall);
    say("  rax %lx rbx %lx rcx-UCODE %ld r11 %lx user saw rcx %lx r11 %lx\n", got.rax, got.rbx, got.rcx - UCODE, got.r11 & 0x247700, got.r12, got.r13);
    RUNF(u_syscall, 0x202, 0x100);
    say("  rax %lx user saw rcx-UCODE %ld r11 %lx\n", got.rax, got.r12 - UCODE, got.r13 & 0x247700);
    RUN(u_hypercall);
    say("  rax %lx\n", got.rax);
    RUNF(u_syscall, 0x002, 0);
    RUNF(u_syscall, 0x202 | 0x400, 0); /* DF */
    RUNF(u_ud2, 0x202 | 0x44500, 0); /* DF, NT, AC and TF */
    RUNF(u_syscall, 0x202 | 0x4000, 0); /* NT */
    RUNF(u_syscall, 0x202 | 0x3000, 0); /* IOPL */
    RUNF(u_syscall, 0x202 | 0x40000, 0); /* AC */
    RUNF(u_syscall, 0x202 | 0x20000, 0); /* VM */
    { struct { u16 type, flags; u64 address; } cb = { 2, 1, (u64)syscall_entry };
      rc("syscall callback that masks", HC2(HC_callback_op, 0, &cb));
      RUN(u_syscall);
      cb.flags = 0;
      rc("that does not", HC2(HC_callback_op, 0, &cb));
      RUN(u_syscall);
      cb.address = 0;
      rc("none", HC2(HC_callback_op, 0, &cb));
      RUN(u_syscall);
      cb.address = (u64)syscall_entry;
      HC2(HC_callback_op, 0, &cb); }

    say("-- faults\n");
    RUN(u_ud2); RUN(u_int3); RUN(u_div); RUN(u_read_np); RUN(u_write_np); RUN(u_read_kernel); RUN(u_write_ro);
    RUN(u_read_ro); RUN(u_read_xen); RUN(u_read_m2p); RUN(u_noncanon); RUN(u_badsel);
    RUN(u_jump_kernel);
    RUNF(u_ud2, 0x002, 0);
    RUNF(u_step, 0x302, 0);
    set_gate(6, 4, (u64)trap_entries + 6 * 32);
    RUN(u_ud2);
    set_gate(6, 0, (u64)trap_entries + 6 * 32);

    say("-- privileged instructions\n");
    RUN(u_cli); RUN(u_hlt); RUN(u_rdmsr); RUN(u_in); RUN(u_cr0); RUN(u_cr2); RUN(u_clts); RUN(u_dr); RUN(u_lgdt);
    RUN(u_cpuid);
    RUN(u_fcpuid); say("  signature %x %x %x\n", (u32)got.rbx, (u32)got.rcx, (u32)got.rdx);
    RUN(u_rdtsc);
    RUN(u_popf); say("  flags then %lx\n", got.rax & 0x247700);

    say("-- software interrupts\n");
    RUN(u_int80);
    set_gate(0x80, 0, (u64)trap_entries + 34 * 32); RUN(u_int80);
    set_gate(0x80, 3, (u64)trap_entries + 34 * 32); RUN(u_int80);
    set_gate(0x80, 7, (u64)trap_entries + 34 * 32); RUN(u_int80);
    { u32 bug = num("intbug", 0); /* see softint.c */
      for (u32 flags = 0; flags < 4; flags++) {
          set_gate(0x20 << bug, flags, (u64)trap_entries + 32 * 32);
          memcpy(code, u_int20_start, 2);
          enter_user(UCODE, USTACK, 0x202, 0, 0xe033);
          if (got.vector == 13)
              got.error = (got.error >> 3 >> bug) << 3 | (got.error & 7);
          say("int 20, gate flags %u: trap %lx err %lx rip +%ld\n", flags, got.vector, got.error, got.rip - UCODE);
      } }

    say("-- kernel stack\n");
    for (u32 off = 0; off < 24; off += 5) {
        HC2(HC_stack_switch, 0xe02b, kstack + PAGE - off);
        RUN(u_ud2);
    }
    rc("stack_switch with ss 0", HC2(HC_stack_switch, 0, kstack + PAGE));
    RUN(u_ud2);
    rc("stack_switch", HC2(HC_stack_switch, 0xe02b, kstack + PAGE));

    say("-- segment bases\n");
    *(u64 *)data = 0x1111; *(u64 *)(data + 8) = 0x2222;
    rc("GS_USER", HC2(HC_set_segment_base, 1, UDATA)); user_gs_base();
    rc("FS", HC2(HC_set_segment_base, 0, UDATA + 8));
    rc("GS_KERNEL", HC2(HC_set_segment_base, 2, data));
    { u64 v = 0; TRY("mov %%gs:8, %0", R("=r"(v)), ); say("kernel gs:8 %lx\n", v); }
    RUN(u_gs); say("  gs:0 %lx fs:0 %lx\n", got.rax, got.rbx);
    { u64 v = 0; TRY("mov %%gs:8, %0", R("=r"(v)), ); say("kernel gs:8 %lx\n", v); }
    TRY("swapgs", , ); show("swapgs");
    rc("GS_USER_SEL 0", HC2(HC_set_segment_base, 3, 0));
    RUN(u_sel); say("  ds %lx gs %lx\n", got.rax, got.rbx);
    user_gs_base();
    rc("GS_USER_SEL e02b", HC2(HC_set_segment_base, 3, 0xe02b));
    RUN(u_sel); say("  ds %lx gs %lx\n", got.rax, got.rbx); user_gs_base();
    rc("GS_USER_SEL 1234", HC2(HC_set_segment_base, 3, 0x1234));
    RUN(u_sel); say("  ds %lx gs %lx\n", got.rax, got.rbx);
    rc("GS_USER_SEL 2", HC2(HC_set_segment_base, 3, 2));
    RUN(u_sel); say("  ds %lx gs %lx\n", got.rax, got.rbx);
    { u64 v = 0; TRY("mov %%gs:8, %0", R("=r"(v)), ); say("kernel gs:8 %lx\n", v); }
    rc("FS non-canonical", HC2(HC_set_segment_base, 0, NONCANON));
    rc("GS_USER non-canonical", HC2(HC_set_segment_base, 1, NONCANON));
    rc("GS_KERNEL non-canonical", HC2(HC_set_segment_base, 2, NONCANON));
    rc("which 4", HC2(HC_set_segment_base, 4, 0));
    RUN(u_loadsel); say("  ds %lx\n", got.rax);
    { u64 v = 0; TRY("mov %%ds, %0", R("=r"(v)), ); say("kernel ds %lx\n", v & 0xffff); }

    say("-- events\n");
    VI->upcall_pending = 1;
    RUN(u_nop);
    VI->upcall_pending = 1;
    RUNF(u_nop, 2, 0);
    VI->upcall_pending = 0;

    say("-- 32-bit code\n");
    run_cs("compat", u_compat_start, u_compat_end, 0x202, 0, 0xe023);
    run_cs("syscall32, no callback", u_syscall32_start, u_syscall32_end, 0x202, 0, 0xe023);
    { struct { u16 type, flags; u64 address; } cb = { 7, 0, (u64)syscall32_entry };
      rc("syscall32 callback", HC2(HC_callback_op, 0, &cb));
      run_cs("syscall32", u_syscall32_start, u_syscall32_end, 0x202, 0, 0xe023); }

    say("-- other page table\n");
    rc("user baseptr 0", mmuext1(15, 0, 0));
    rc("user baseptr back", mmuext1(15, MFN(l4), 0));
    RUN(u_ud2);
    rc("user code writable, L1 through mmu_update", mmu_update1(MFN(l1) << 12, PTE(code, P | RW | US), 0));
    rc("not present", mmu_update1(MFN(l1) << 12 | 8, 0, 0));
    mmuext1(6, 0, 0);
    RUN(u_ud2);
}
