/*
 * Privileged and otherwise special instructions in kernel mode: emul-priv-op.c (in, out, mov cr and dr, clts,
 * wbinvd, rdmsr, wrmsr, cpuid, rdtsc), emul-inv-op.c (the forced cpuid), set_debugreg and get_debugreg. Register
 * values are shown only where they do not depend on the processor.
 */
#include "lib.h"

static u64 lo, hi;
static void rd(const char *name, u32 msr)
{
    lo = 0xdead, hi = 0;
    TRY("rdmsr", R("+a"(lo), "+d"(hi)), R("c"(msr)));
    show(name);
    lo = (u32)lo | hi << 32;
}
static void wr(const char *name, u32 msr, u64 v)
{
    TRY("wrmsr", , R("c"(msr), "a"((u32)v), "d"((u32)(v >> 32))));
    show(name);
}
static u64 rflags(void) { u64 f; __asm__ volatile("pushfq; pop %0" : "=r"(f)); return f; }
static void cpuid(u32 leaf, u32 sub, u32 *r)
{
    __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub));
}
static void xen_cpuid(u32 leaf, u32 sub, u32 *r)
{
    __asm__ volatile(".byte 0x0f, 0x0b, 'x', 'e', 'n'; cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub));
}

void test(void)
{
    u64 x = 0, y = 0;
    u32 r[4];

    say("-- flags\n");
    say("rflags %lx\n", rflags() & 0x247700);
    TRY("cli", , ); show("cli");
    TRY("sti", , ); show("sti");
    say("rflags %lx mask %d\n", rflags() & 0x247700, VI->upcall_mask);
    TRY("pushq $0x2; popfq", , ); show("popf without IF");
    say("rflags %lx mask %d\n", rflags() & 0x247700, VI->upcall_mask);
    TRY("pushq $0x3202; popfq", , ); show("popf with IOPL 3");
    say("rflags %lx\n", rflags() & 0x247700);
    { u32 iopl = 1; rc("set_iopl 1", HC2(HC_physdev_op, 6, &iopl)); }
    say("rflags %lx\n", rflags() & 0x247700);
    TRY("cli", , ); show("cli with iopl 1");
    TRY("sti", , ); show("sti with iopl 1");
    say("rflags %lx mask %d\n", rflags() & 0x247700, VI->upcall_mask);
    { u32 iopl = 0; rc("set_iopl 0", HC2(HC_physdev_op, 6, &iopl)); }
    TRY("cli", , ); show("cli with iopl 0");
    { u32 iopl = 4; rc("set_iopl 4", HC2(HC_physdev_op, 6, &iopl)); }
    TRY("hlt", , ); show("hlt");

    say("-- ports\n");
    TRY("in $0x80, %%al", R("=a"(x)), ); show("in, iopl 0");
    TRY("out %%al, $0x80", , R("a"(0))); show("out, iopl 0");
    TRY("insb", , R("D"(pages[0]), "d"(0x80))); show("ins, iopl 0");
    { u32 iopl = 1; HC2(HC_physdev_op, 6, &iopl); }
    TRY("in $0x80, %%al", R("=a"(x)), ); show("in");
    TRY("out %%al, $0x80", , R("a"(0))); show("out");
    TRY("in %%dx, %%eax", R("=a"(x)), R("d"(0xcf8))); show("inl cf8");
    TRY("out %%eax, %%dx", , R("a"(0x80000000), "d"(0xcf8))); show("outl cf8");
    TRY("in %%dx, %%eax", R("=a"(x)), R("d"(0xcf8))); say("cf8 reads back %x\n", (u32)x);
    TRY("out %%eax, %%dx", , R("a"(0), "d"(0xcf8)));
    x = 0x1234567890;
    TRY("in %%dx, %%al", R("+a"(x)), R("d"(0x70))); show("in rtc index");
    say("upper part kept %d\n", (x & ~0xfful) == 0x1234567800);
    x = 0x1234567890;
    TRY("in %%dx, %%eax", R("+a"(x)), R("d"(0xcf8))); say("inl clears the upper half %d\n", x >> 32 == 0);
    { u64 dst = (u64)pages[0], cnt = 4; memset(pages[0], 0x55, 16);
      TRY("rep insb", R("+D"(dst), "+c"(cnt)), R("d"(0x70))); show("rep ins");
      say("  moved %ld left %ld behind %x\n", dst - (u64)pages[0], cnt, pages[0][4]); }
    TRY("insb", , R("D"(EFAULT_ADDR), "d"(0x70))); show("ins to unmapped");
    if (seen.n) say("  cr2 %lx\n", seen.cr2);
    TRY("outsb", , R("S"(EFAULT_ADDR), "d"(0x80))); show("outs from unmapped");
    if (seen.n) say("  cr2 %lx\n", seen.cr2);
    { u32 iopl = 0; HC2(HC_physdev_op, 6, &iopl); }
    { struct { u8 *bitmap; u32 nr; } b = { pages[1], 65536 };
      memset(pages[1], 0xff, 4096); memset(pages[2], 0xff, 4096); memset(pages[3], 0xff, 4096);
      pages[1][0x80 / 8] = 0xfe;
      rc("set_iobitmap", HC2(HC_physdev_op, 7, &b));
      TRY("in $0x80, %%al", R("=a"(x)), ); show("in 80, allowed");
      TRY("in $0x80, %%ax", R("=a"(x)), ); show("inw 80, half allowed");
      TRY("in $0x81, %%al", R("=a"(x)), ); show("in 81");
      b.nr = 0x80; rc("set_iobitmap, short", HC2(HC_physdev_op, 7, &b));
      TRY("in $0x80, %%al", R("=a"(x)), ); show("in 80");
      b.nr = 65537; rc("set_iobitmap, long", HC2(HC_physdev_op, 7, &b));
      b.nr = 65536; b.bitmap = XEN_ADDR; rc("set_iobitmap, Xen's address", HC2(HC_physdev_op, 7, &b));
      b.nr = 0; b.bitmap = 0; rc("set_iobitmap, none", HC2(HC_physdev_op, 7, &b)); }

    say("-- control registers\n");
    TRY("mov %%cr0, %0", R("=r"(x)), ); show("read cr0"); say("  %lx\n", x & 0xe005003f);
    TRY("mov %0, %%cr0", , R("r"(x))); show("write cr0 back");
    TRY("mov %0, %%cr0", , R("r"(x ^ 0x10000))); show("write cr0 without WP");
    TRY("mov %0, %%cr0", , R("r"(x | 8))); show("write cr0.TS");
    TRY("mov %%cr0, %0", R("=r"(y)), ); say("  TS %ld\n", y >> 3 & 1);
    TRY("clts", , ); show("clts");
    TRY("mov %%cr0, %0", R("=r"(y)), ); say("  TS %ld\n", y >> 3 & 1);
    TRY("lmsw %w0", , R("r"((u32)x))); show("lmsw");
    TRY("mov %0, %%cr2", , R("r"(0x123456789abul))); show("write cr2");
    TRY("mov %%cr2, %0", R("=r"(x)), ); show("read cr2"); say("  %lx vcpu_info %lx\n", x, VI->cr2);
    TRY("movb 0x77, %b0", R("=r"(x)), ); TRY("mov %%cr2, %0", R("=r"(x)), ); say("  after a fault %lx vcpu_info %lx\n", x, VI->cr2);
    TRY("mov %%cr3, %0", R("=r"(x)), ); show("read cr3"); say("  is the page table %d\n", x >> 12 == MFN(si->pt_base));
    TRY("mov %0, %%cr3", , R("r"(x))); show("write cr3 back");
    TRY("mov %0, %%cr3", , R("r"(MFN(pages[0]) << 12))); show("write cr3, a plain page");
    TRY("mov %0, %%cr3", , R("r"(0xfffffffff000ul))); show("write cr3, nonsense");
    TRY("mov %%cr4, %0", R("=r"(x)), ); show("read cr4"); say("  PAE %ld PGE %ld DE %ld TSD %ld\n", x >> 5 & 1, x >> 7 & 1, x >> 3 & 1, x >> 2 & 1);
    TRY("mov %0, %%cr4", , R("r"(x))); show("write cr4 back");
    TRY("mov %0, %%cr4", , R("r"(x | 8))); show("write cr4.DE");
    TRY("mov %%cr4, %0", R("=r"(y)), ); say("  changed %lx\n", x ^ y);
    TRY("mov %0, %%cr4", , R("r"(x | 4))); show("write cr4.TSD");
    TRY("mov %%cr4, %0", R("=r"(y)), ); say("  changed %lx\n", x ^ y);
    TRY("rdtsc", R("=a"(lo), "=d"(hi)), ); show("rdtsc with TSD");
    TRY("mov %0, %%cr4", , R("r"(x ^ 0x20))); show("write cr4 without PAE");
    TRY("mov %%cr4, %0", R("=r"(y)), ); say("  changed %lx\n", x ^ y);
    TRY("mov %0, %%cr4", , R("r"(x)));
    TRY("mov %%cr8, %0", R("=r"(y)), ); show("read cr8");
    TRY("mov %0, %%cr8", , R("r"(0ul))); show("write cr8");

    say("-- debug registers\n");
    TRY("mov %0, %%db0", , R("r"(0x1234ul))); show("write dr0");
    TRY("mov %%db0, %0", R("=r"(x)), ); show("read dr0"); say("  %lx get_debugreg %lx\n", x, HC1(HC_get_debugreg, 0));
    TRY("mov %0, %%db0", , R("r"(XEN_ADDR))); show("write dr0, Xen's address");
    TRY("mov %%db6, %0", R("=r"(x)), ); show("read dr6"); say("  %lx get_debugreg %lx\n", x, HC1(HC_get_debugreg, 6));
    TRY("mov %%db7, %0", R("=r"(x)), ); show("read dr7"); say("  %lx get_debugreg %lx\n", x, HC1(HC_get_debugreg, 7));
    TRY("mov %0, %%db7", , R("r"(0x2400ul))); show("write dr7.GD");
    TRY("mov %0, %%db7", , R("r"(1ul << 32))); show("write dr7, upper bit");
    TRY("mov %%db4, %0", R("=r"(x)), ); show("read dr4");
    for (u32 i = 0; i < 10; i++) { say("set_debugreg %u: %e", i, HC2(HC_set_debugreg, i, 0)); say(" get %lx\n", HC1(HC_get_debugreg, i)); }
    rc("set_debugreg 1, Xen's address", HC2(HC_set_debugreg, 1, XEN_ADDR));
    rc("set_debugreg 6, upper bit", HC2(HC_set_debugreg, 6, 1ul << 32));
    rc("set_debugreg 6, ones", HC2(HC_set_debugreg, 6, 0xffffffff)); say("  get %lx\n", HC1(HC_get_debugreg, 6));
    rc("set_debugreg 7, ones", HC2(HC_set_debugreg, 7, 0xffffffff));
    rc("set_debugreg 7, io without DE", HC2(HC_set_debugreg, 7, 0x20002));
    rc("set_debugreg 7, reserved", HC2(HC_set_debugreg, 7, 0xd800)); say("  get %lx\n", HC1(HC_get_debugreg, 7));
    /* A data breakpoint on a write of eight bytes at x. */
    rc("set_debugreg 6", HC2(HC_set_debugreg, 6, 0));
    rc("set_debugreg 0", HC2(HC_set_debugreg, 0, &x));
    rc("set_debugreg 7", HC2(HC_set_debugreg, 7, 0x90002));
    TRY("movq $5, %0", R("=m"(x)), ); show("write to the watched word");
    say("  dr6 %lx\n", HC1(HC_get_debugreg, 6) & 0xf00f);
    rc("set_debugreg 7", HC2(HC_set_debugreg, 7, 0));

    say("-- MSRs\n");
    rd("EFER", 0xc0000080); say("  SCE %ld LME %ld LMA %ld NX %ld\n", lo & 1, lo >> 8 & 1, lo >> 10 & 1, lo >> 11 & 1);
    wr("EFER back", 0xc0000080, lo);
    wr("EFER without SCE", 0xc0000080, lo ^ 1);
    rd("APIC_BASE", 0x1b); say("  %lx\n", lo);
    wr("APIC_BASE", 0x1b, lo);
    rd("STAR", 0xc0000081); rd("LSTAR", 0xc0000082); rd("CSTAR", 0xc0000083); rd("SFMASK", 0xc0000084);
    wr("STAR", 0xc0000081, 0); wr("LSTAR", 0xc0000082, 0);
    wr("FS_BASE", 0xc0000100, 0x1234567000); rd("FS_BASE", 0xc0000100); say("  %lx\n", lo);
    wr("GS_BASE", 0xc0000101, 0x2345678000); rd("GS_BASE", 0xc0000101); say("  %lx\n", lo);
    wr("KERNEL_GS_BASE", 0xc0000102, 0x3456789000); rd("KERNEL_GS_BASE", 0xc0000102); say("  %lx\n", lo);
    wr("FS_BASE non-canonical", 0xc0000100, 1ul << 63);
    rd("PAT", 0x277); say("  %lx\n", lo);
    wr("PAT back", 0x277, lo);
    wr("PAT other", 0x277, 0x0007040600070406);
    rd("PLATFORM_INFO", 0xce); rd("MISC_FEATURES", 0x140);
    rd("SYSENTER_CS", 0x174); rd("SYSENTER_EIP", 0x176);
    rd("MCG_CAP", 0x179); rd("MCG_STATUS", 0x17a);
    rd("MTRRCAP", 0xfe); rd("MTRR_DEF_TYPE", 0x2ff);
    rd("hypercall page MSR", 0x40000000); wr("hypercall page MSR", 0x40000000, MFN(pages[4]) << 12);
    say("  written %d\n", pages[4][0] != 0);
    wr("hypercall page MSR, page 1", 0x40000000, MFN(pages[4]) << 12 | 1);
    wr("hypercall page MSR, nonsense", 0x40000000, 0xfffffffff000ul);
    rd("X2APIC", 0x800); rd("no such", 0xdeadbeef); wr("no such", 0xdeadbeef, 0); rd("0", 0); rd("ffffffff", 0xffffffff);
    rd("TSC", 0x10); x = lo; rd("TSC", 0x10); say("  goes on %d\n", lo > x);
    rd("TSC_AUX", 0xc0000103); wr("TSC_AUX", 0xc0000103, 0);
    rd("PERF_CAPABILITIES", 0x345); rd("BIOS_SIGN_ID", 0x8b); rd("SPEC_CTRL", 0x48); rd("PRED_CMD", 0x49);

    say("-- cpuid\n");
    xen_cpuid(0x40000000, 0, r); say("40000000: at least 40000005 %d signature %x %x %x\n", r[0] >= 0x40000005, r[1], r[2], r[3]);
    xen_cpuid(0x40000001, 0, r); say("40000001: major %d ebx %x ecx %x edx %x\n", r[0] >> 16, r[1], r[2], r[3]);
    xen_cpuid(0x40000002, 0, r); say("40000002: pages %d msr %x features %x edx %x\n", r[0], r[1], r[2], r[3]);
    xen_cpuid(0x40000003, 0, r); say("40000003.0: edx %x\n", r[3]); /* ecx is 0 for a dom0 only */
    xen_cpuid(0x40000003, 2, r); say("40000003.2: some kHz %d\n", r[0] > 1000);
    xen_cpuid(0x40000004, 0, r); say("40000004: %x %x %x %x\n", r[0], r[1], r[2], r[3]);
    xen_cpuid(0x40000005, 0, r); say("40000005: width ok %d ecx %x edx %x\n", r[1] > 0, r[2], r[3]);
    xen_cpuid(0x40000100, 0, r); say("40000100: %x %x %x %x\n", r[0], r[1], r[2], r[3]);
    xen_cpuid(1, 0, r);
    say("1: hypervisor %d sse2 %d fpu %d pse %d pge %d vme %d apic %d sep %d\n", r[2] >> 31, r[3] >> 26 & 1, r[3] & 1,
        r[3] >> 3 & 1, r[3] >> 13 & 1, r[3] >> 1 & 1, r[3] >> 9 & 1, r[3] >> 11 & 1);
    say("1: monitor %d vmx %d pcid %d x2apic %d\n", r[2] >> 3 & 1, r[2] >> 5 & 1, r[2] >> 17 & 1, r[2] >> 21 & 1);
    DOM0
        say("1: mtrr %d acpi %d\n", r[3] >> 12 & 1, r[3] >> 22 & 1);
    xen_cpuid(0x80000001, 0, r); say("80000001: syscall %d nx %d lm %d svm %d\n", r[3] >> 11 & 1, r[3] >> 20 & 1, r[3] >> 29 & 1, r[2] >> 2 & 1);
    cpuid(0, 0, r); { u32 q[4]; xen_cpuid(0, 0, q); say("vendor is the same natively %d\n", r[1] == q[1] && r[2] == q[2] && r[3] == q[3]); }
    TRY(".byte 0x0f, 0x0b, 'x', 'e', 'm'; cpuid", , R("a"(0))); show("prefix misspelt");
    TRY(".byte 0x0f, 0x0b, 'x', 'e', 'n'; nop", , ); show("prefix before a nop");

    say("-- others\n");
    TRY("rdtsc", R("=a"(lo), "=d"(hi)), ); show("rdtsc");
    TRY("wbinvd", , ); show("wbinvd");
    TRY("invd", , ); show("invd");
    TRY("invlpg (%0)", , R("r"(pages[0]))); show("invlpg");
    TRY("lgdt (%0)", , R("r"(pages[0]))); show("lgdt");
    TRY("lidt (%0)", , R("r"(pages[0]))); show("lidt");
    TRY("lldt %w0", , R("r"(0))); show("lldt");
    TRY("ltr %w0", , R("r"(0))); show("ltr");
    TRY("sysretq", , R("c"(0))); show("sysret");
    TRY("swapgs", , ); show("swapgs");
    TRY("monitor", , R("a"(pages[0]), "c"(0), "d"(0))); show("monitor");
    TRY("vmcall", , ); show("vmcall");
    TRY("vmmcall", , ); show("vmmcall");
    TRY("rdpmc", , R("c"(0))); show("rdpmc");
}
