/*
 * Every exception a 64-bit PV kernel can raise by itself, and the frame it gets. Probes set_trap_table
 * (do_set_trap_table), create_bounce_frame, pv_inject_event and the exception handlers of traps.c. What the
 * emulated processor gets wrong (SIMD exceptions, int1) is left out.
 */
#include "lib.h"

static u32 nested_at;
static int nested(struct regs *r)
{
    (void)r;
    if (seen.n == 1 && nested_at++ == 0) { /* in the handler of the first: a second */
        say("  outer vec %lx rip +%ld\n", r->vector, r->rip - probe_rip);
        __asm__ volatile("int3");
        say("  back in outer, seen %ld inner vec %lx inner cs %lx mask %lx\n", seen.n, seen.vec, seen.cs & 0xffff, seen.cs >> 32);
        return 0;
    }
    return r->vector == 3;
}
static u32 steps;
static int single_step(struct regs *r)
{
    if (r->vector != 1)
        return 0;
    if (++steps == 3)
        r->rflags &= ~0x100ul;
    return 1;
}

/* HYPERVISOR_iret to rip (0: to a place right here), everything as given; a trap there ends it as in TRY. */
static volatile u64 target, arrived_rsp, words[5];
static void __attribute__((noinline)) try_iret(u64 rip, u64 cs, u64 ss, u64 flags, u64 vgcf)
{
    seen.n = 0;
    words[0] = vgcf; words[1] = cs; words[2] = flags; words[3] = ss; target = rip;
    __asm__ volatile("movq $772f, probe_resume; movq $771f, probe_rip; movq %%rsp, probe_rsp; cmpq $0, %1; jne 1f; movq $771f, %1; 1:"
                     "mov %%rsp, %%rax; push 24+%2; push %%rax; push 16+%2; push 8+%2; push %1; push %2; jmp do_iret_flags;"
                     "771: mov %%rsp, %0; nop; 772: movq $0, probe_resume"
                     : "=m"(arrived_rsp), "+m"(target) : "m"(words[0]) : "rax", "rcx", "r11", "memory", "cc");
}

void test(void)
{
    u64 x = 0, sel = 0;
    u8 *ro = pages[0], *np = pages[1];

    say("-- faults\n");
    TRY("divl %%ecx", R("+a"(x)), R("c"(0), "d"(0))); show_full("#DE");
    TRY("ud2", , ); show_full("#UD ud2");
    TRY(".byte 0xf0, 0x90", , ); show_full("#UD lock");
    TRY("int3", , ); show_full("#BP int3");
    TRY(".byte 0xcd, 3", , ); show_full("#BP int $3");
    TRY(".byte 0xcd, 4", , ); show_full("#OF int $4");
    trap_hook = single_step;
    TRY("pushfq; orq $0x100, (%%rsp); popfq; nop; nop; nop; nop", , ); say("single step: %u traps, last", steps); show_full("");
    trap_hook = 0;

    say("-- #GP\n");
    TRY("rdmsr", R("+a"(x), "=d"(sel)), R("c"(0xdeadbeef))); show_full("rdmsr unknown");
    TRY("mov (%1), %0", R("+r"(x)), R("r"(NONCANON))); show_full("non-canonical load");
    TRY("mov %0, (%1)", , R("r"(x), "r"(NONCANON))); show_full("non-canonical store");
    TRY("jmp *%0", , R("r"(NONCANON)));
    say("non-canonical jump: trap %lx err %lx at jump or target %d\n", seen.vec, seen.err, seen.rip == (u64)NONCANON || seen.rip == probe_rip);
    TRY("mov %w0, %%ds", , R("r"(0x1234))); show_full("mov ds, beyond the GDT");
    TRY("mov %w0, %%es", , R("r"(0x54))); show_full("mov es, LDT selector");
    TRY("mov %w0, %%ss", , R("r"(0))); show_full("mov ss, 0");
    TRY("mov %w0, %%fs", , R("r"(0xe008))); show_full("mov fs, Xen's code");
    TRY("ljmp *%0", , R("m"(*(char *)pages[2]))); show_full("ljmp 0:0");
    TRY("lcall *%0", , R("m"(*(char *)pages[2]))); show_full("lcall 0:0");

    say("-- event mask in frames\n");
    VI->upcall_mask = 0;
    TRY("ud2", , ); show_full("#UD unmasked");
    say("mask after: %d\n", VI->upcall_mask);
    set_gate(6, 4, (u64)trap_entries + 6 * 32);
    TRY("ud2", , ); show_full("#UD unmasked, masking gate");
    say("mask after: %d\n", VI->upcall_mask);
    VI->upcall_mask = 1;
    TRY("ud2", , ); show_full("#UD masked, masking gate");
    say("mask after: %d\n", VI->upcall_mask);
    VI->upcall_mask = 0x5a;
    TRY("ud2", , ); show_full("#UD mask byte 5a");
    say("mask after: %d\n", VI->upcall_mask);
    set_gate(6, 0, (u64)trap_entries + 6 * 32);

    say("-- #NM\n");
    rc("fpu_taskswitch 1", HC1(HC_fpu_taskswitch, 1));
    TRY("mov %%cr0, %0", R("=r"(x)), ); say("cr0.TS %ld\n", x >> 3 & 1);
    TRY("fninit", , ); show_full("fninit with TS");
    TRY("mov %%cr0, %0", R("=r"(x)), ); say("cr0.TS %ld\n", x >> 3 & 1); /* delivering #NM clears it */
    TRY("fninit", , ); show_full("fninit again");
    HC1(HC_fpu_taskswitch, 1);
    TRY("movaps %%xmm0, %%xmm1", , ); show_full("sse with TS");
    HC1(HC_fpu_taskswitch, 1);
    TRY("fwait", , ); show_full("fwait with TS");
    HC1(HC_fpu_taskswitch, 1);
    TRY("clts", , ); show("clts");
    TRY("mov %%cr0, %0", R("=r"(x)), ); say("cr0.TS %ld\n", x >> 3 & 1);
    TRY("fninit", , ); show_full("fninit after clts");
    HC1(HC_fpu_taskswitch, 1);
    rc("fpu_taskswitch 0", HC1(HC_fpu_taskswitch, 0));
    TRY("fninit", , ); show_full("fninit");
    rc("fpu_taskswitch 77", HC1(HC_fpu_taskswitch, 77));
    rc("fpu_taskswitch 0", HC1(HC_fpu_taskswitch, 0));
    TRY("fninit", , ); show_full("fninit");

    say("-- #MF\n");
    { u16 cw = 0x37b; TRY("fninit; fldcw %0; fld1; fldz; fdivrp; fwait", , R("m"(cw))); say("#MF: trap %lx err %lx\n", seen.n ? seen.vec : 0, seen.err);
      TRY("fnclex; fninit", , ); show("fnclex"); }

    say("-- #PF\n");
    rc("unmap", remap(np, 0));
    rc("read-only", set_ro(ro));
    TRY("movb (%1), %b0", R("+r"(x)), R("r"(np + 5))); show_full("read not present"); say("cr2 %lx\n", seen.cr2 - (u64)np);
    TRY("movb %b0, (%1)", , R("r"(x), "r"(np + 6))); show_full("write not present"); say("cr2 %lx\n", seen.cr2 - (u64)np);
    TRY("movb %b0, (%1)", , R("r"(x), "r"(ro + 7))); show_full("write read-only"); say("cr2 %lx\n", seen.cr2 - (u64)ro);
    TRY("movb (%1), %b0", R("+r"(x)), R("r"(EFAULT_ADDR))); show_full("read no L4"); say("cr2 %lx\n", seen.cr2);
    TRY("jmp *%0", , R("r"(np))); say("jump to not present: trap %lx err %lx at target %d\n", seen.vec, seen.err, seen.rip == (u64)np);
    TRY("movb (%1), %b0", R("+r"(x)), R("r"(XEN_ADDR))); show_full("read Xen's memory"); say("cr2 %lx\n", seen.cr2);
    TRY("movb %b0, (%1)", , R("r"(x), "r"(XEN_ADDR))); show_full("write Xen's memory"); say("cr2 %lx\n", seen.cr2);
    TRY("movb (%1), %b0", R("+r"(x)), R("r"(0xffff800000000000))); show_full("read M2P");
    TRY("movb %b0, (%1)", , R("r"(x), "r"(0xffff800000000000))); show_full("write M2P");
    rc("not executable", remap(ro, PTE(ro, P | RW | US | A | NX)));
    TRY("jmp *%0", , R("r"(ro))); say("jump to not executable: trap %lx err %lx at target %d\n", seen.vec, seen.err, seen.rip == (u64)ro);
    rc("remap", set_rw(np));
    set_rw(ro);

    say("-- nested\n");
    trap_hook = nested;
    TRY("ud2", , ); say("nested: seen %ld\n", seen.n);
    trap_hook = 0;

    say("-- mov ss shadow, unaligned stack\n");
    TRY("sub $5, %%rsp; ud2", , ); /* the frame sits on a 16-byte boundary below */
    __asm__ volatile("" ::: "memory");
    say("unaligned: trap %lx rsp %ld depth %ld\n", seen.vec, seen.rsp - probe_rsp, (seen.rsp & ~15ul) - seen.sp_inside);

    say("-- iret to nowhere\n");
    { static const struct { const char *name; u64 cs, ss, rip, flags; } to[] = {
          { "good", 0xe030, 0xe02b, 0, 2 }, { "cs beyond the GDT", 0x1230, 0xe02b, 0, 2 }, { "cs null", 0, 0xe02b, 0, 2 },
          { "cs is data", 0xe028, 0xe02b, 0, 2 }, { "cs is Xen's", 0xe008, 0xe02b, 0, 2 }, { "ss beyond the GDT", 0xe030, 0x1233, 0, 2 },
          { "ss null", 0xe030, 0, 0, 2 }, { "ss is code", 0xe030, 0xe033, 0, 2 }, { "rip non-canonical", 0xe030, 0xe02b, 0x8000000000001000, 2 },
          { "rip not mapped", 0xe030, 0xe02b, 0x700000001000, 2 }, { "rip in Xen", 0xe030, 0xe02b, 0xffff830000000000, 2 },
          { "flags VM and IOPL", 0xe030, 0xe02b, 0, 0x23002 }, { "flags TF", 0xe030, 0xe02b, 0, 0x102 }, { "flags all", 0xe030, 0xe02b, 0, ~0x100ul & 0x3fffff },
          { "upper half of cs", 0x10000e030, 0xe02b, 0, 2 }, { "RPL 1", 0xe031, 0xe029, 0, 2 }, { "in syscall", 0xe030, 0xe02b, 0, 2 },
          { "in syscall, cs bad", 0x1230, 0, 0, 2 }, { "in syscall, rip not mapped", 0xe030, 0xe02b, 0x700000001000, 2 } };
      for (u32 i = 0; i < sizeof to / sizeof *to; i++) {
          try_iret(to[i].rip, to[i].cs, to[i].ss, to[i].flags, i >= 16 ? 0x100 : 0);
          if (!seen.n)
              say("%s: arrived, rsp %ld\n", to[i].name, arrived_rsp - probe_rsp);
          else
              say("%s: trap %lx err %lx at target %d cs %lx ss %lx rsp %ld failsafe %lx %lx\n", to[i].name, seen.vec, seen.err,
                  seen.rip == target, seen.cs & 0xffff, seen.ss, seen.rsp - probe_rsp, failsafe_sel[0], failsafe_sel[1]);
      } }

    say("-- set_trap_table\n");
    rc("null", HC1(HC_set_trap_table, 0));
    rc("bad pointer", HC1(HC_set_trap_table, EFAULT_ADDR));
    rc("Xen pointer", HC1(HC_set_trap_table, XEN_ADDR));
    { struct trap_info t[3] = { { 0x21, 0, KCS, (u64)NONCANON }, { 6, 0, KCS, 1 }, { 0, 0, 0, 0 } };
      rc("non-canonical address", set_traps(t)); }
    { struct trap_info t[2] = { { 0x21, 0, 0xe008, (u64)trap_entries }, { 0, 0, 0, 0 } };
      rc("Xen's code selector", set_traps(t)); }
    { struct trap_info t[2] = { { 0x21, 0, 0, (u64)trap_entries }, { 0, 0, 0, 0 } };
      rc("null selector", set_traps(t)); }
}
