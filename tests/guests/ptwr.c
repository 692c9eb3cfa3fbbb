/*
 * Writes to a page table through its read-only mapping, with VMASST_TYPE_writable_pagetables and without:
 * ro-page-fault.c (ptwr_emulated_update and what of the instruction set goes there). The table is pinned as L1
 * and not in use; `t` is its read-only mapping.
 */
#include "lib.h"

static u64 *t, good, other;
static u64 flags_of(u64 e) { return e & 0xfff0000000000fff; }
static void result(const char *name)
{
    u64 e = t[0];
    show(name);
    if (seen.n && seen.vec == 14)
        say("  cr2 +%lx\n", seen.cr2 - (u64)t);
    if (!(e & P) && (e ^ good) << 12 >> 24)
        say("  entry %lx\n", e);
    else
        say("  entry flags %lx frame %s\n", flags_of(e), (e ^ good) << 12 >> 24 == 0 ? "good" : (e ^ other) << 12 >> 24 == 0 ? "other" : "unknown");
}
static void reset(u64 v) { mmu_update1(MFN(t) << 12, v, 0); }

void test(void)
{
    u64 x;
    t = (u64 *)pages[0];
    good = PTE(pages[1], P | RW | A | D);
    other = PTE(pages[2], P | RW);
    set_ro(t);
    say("-- a read-only page that is no page table\n");
    TRY("movq %0, (%1)", , R("r"(good), "r"(t))); result("mov");
    rc("pin", mmuext1(0, MFN(t), 0));
    say("-- without the assist\n");
    rc("vm_assist disable", HC2(HC_vm_assist, 1, 2));
    TRY("movq %0, (%1)", , R("r"(good), "r"(t))); result("mov");
    say("-- with it\n");
    rc("vm_assist enable", HC2(HC_vm_assist, 0, 2));
    TRY("movq %0, (%1)", , R("r"(good), "r"(t))); result("mov 8");
    TRY("movq %0, (%1)", , R("r"(other), "r"(t))); result("mov 8 over");
    TRY("movq $0, (%0)", , R("r"(t))); result("mov imm32");
    TRY("movq %0, (%1)", , R("r"(0xdead0000ul), "r"(t))); result("mov not present");
    reset(good); TRY("movl %k0, (%1)", , R("r"(other), "r"(t))); result("mov 4, low");
    reset(good); TRY("movl %k0, 4(%1)", , R("r"(good >> 32), "r"(t))); result("mov 4, high");
    reset(good); TRY("movw %w0, (%1)", , R("r"(good), "r"(t))); result("mov 2");
    reset(good); TRY("movb $0x61, (%0)", , R("r"(t))); result("mov 1");
    reset(0x1230); TRY("movb $0x44, (%0)", , R("r"(t))); result("mov 1 not present");
    reset(good); TRY("movq %0, 4(%1)", , R("r"(0ul), "r"(t))); result("unaligned");
    reset(good);
    x = other; TRY("xchg %0, (%1)", R("+r"(x)), R("r"(t))); result("xchg"); say("  old is good %d\n", (x ^ good) << 12 >> 24 == 0);
    x = 0; TRY("xchg %0, (%1)", R("+r"(x)), R("r"(t))); result("xchg 0"); say("  old is other %d\n", (x ^ other) << 12 >> 24 == 0);
    x = 0; TRY("lock cmpxchg %1, (%2)", R("+a"(x)), R("r"(good), "r"(t))); result("lock cmpxchg, equal"); say("  rax %lx\n", x);
    { u64 zf; x = 0x777; TRY("lock cmpxchg %2, (%3); setz %b1", R("+a"(x), "=q"(zf)), R("r"(other), "r"(t))); result("lock cmpxchg, not equal");
      say("  zf %d rax is the entry %d\n", (u8)zf, x == t[0]); }
    x = t[0]; TRY("cmpxchg %1, (%2)", R("+a"(x)), R("r"(other), "r"(t))); result("cmpxchg, equal");
    { u32 lo = t[0]; TRY("lock cmpxchgl %1, (%2)", R("+a"(lo)), R("r"((u32)good), "r"(t))); result("lock cmpxchg 4"); }
    { u64 w = t[0]; TRY("lock cmpxchg8b (%4)", R("+a"(w)), R("d"((u32)(t[0] >> 32)), "b"((u32)good), "c"((u32)(good >> 32)), "r"(t))); result("lock cmpxchg8b"); }
    reset(good); TRY("lock orq $0x200, (%0)", , R("r"(t))); result("lock or");
    TRY("lock andq $-3, (%0)", , R("r"(t))); result("lock and, RW off");
    TRY("lock btrq $0, (%0)", , R("r"(t))); result("lock btr, P off");
    TRY("lock btsq $0, (%0)", , R("r"(t))); result("lock bts, P on");
    TRY("lock btrq $5, (%0)", , R("r"(t))); result("lock btr, A off");
    TRY("lock btrl $9, (%0)", , R("r"(t))); result("lock btr 4");
    TRY("orq $0x400, (%0)", , R("r"(t))); result("or");
    TRY("andb $0xdf, (%0)", , R("r"(t))); result("and 1");
    TRY("addq $0x100, (%0)", , R("r"(t))); result("add");
    x = 0x200; TRY("lock xaddq %0, (%1)", R("+r"(x)), R("r"(t))); result("lock xadd");
    reset(good - 1); TRY("lock incq (%0)", , R("r"(t))); result("lock inc, P on");
    reset(0); TRY("notq (%0)", , R("r"(t))); result("not");
    reset(0);
    { u64 *d = t, c = 1; TRY("rep stosq", R("+D"(d), "+c"(c)), R("a"(good))); result("rep stos 1"); say("  moved %ld left %ld\n", d - t, c); }
    { u64 *d = t, c = 3; TRY("rep stosq", R("+D"(d), "+c"(c)), R("a"(other))); result("rep stos 3"); say("  moved %ld left %ld third flags %lx\n", d - t, c, flags_of(t[2])); }
    { u64 *d = t, *s = &good; TRY("movsq", R("+D"(d), "+S"(s)), ); result("movs"); say("  moved %ld\n", d - t); }
    reset(0); TRY("movq %0, (%1)", , R("r"(PTE(t, P | RW)), "r"(t))); result("itself, writable");
    TRY("movq %0, (%1)", , R("r"(PTE(t, P)), "r"(t))); result("itself, read-only");
    reset(0); TRY("movq %0, (%1)", , R("r"(PTE(si->pt_base, P | RW)), "r"(t))); result("the L4, writable");
    TRY("movq %0, (%1)", , R("r"(0xfffffffffful << 12 | 1), "r"(t))); result("no memory");
    TRY("movq %%xmm0, (%0)", , R("r"(t))); result("sse store");
    reset(good); TRY("movnti %0, (%1)", , R("r"(other), "r"(t))); result("movnti");
    reset(0); TRY("push %0; pop (%1)", , R("r"(good), "r"(t))); result("pop to memory");
    rc("unpin", mmuext1(4, MFN(t), 0));
    TRY("movq %0, (%1)", , R("r"(good), "r"(t))); result("mov, unpinned, still read-only");
    rc("writable", set_rw(t));
    TRY("movq %0, (%1)", , R("r"(0ul), "r"(t))); result("mov");

    say("-- the page tables in use\n");
    { u8 *a = pages[5]; u64 *e = l1e_of((u64)a), old = *e;
      *a = 1;
      TRY("movq %0, (%1)", , R("r"(PTE(pages[6], P | RW)), "r"(e))); show("L1 in use");
      pages[6][0] = 0x66; __asm__ volatile("" ::: "memory");
      mmuext1(7, (u64)a, 0); say("  now reads %x\n", *a);
      TRY("lock btrq $1, (%0)", , R("r"(e))); mmuext1(7, (u64)a, 0);
      TRY("movb $1, (%0)", , R("r"(a))); show("write after RW is off");
      TRY("movq %0, (%1)", , R("r"(old), "r"(e))); show("L1 back"); mmuext1(7, (u64)a, 0);
      u64 *l4 = (u64 *)si->pt_base;
      TRY("movq %0, (%1)", , R("r"(l4[511]), "r"(l4 + 511))); show("L4 by mov");
      u64 *l3 = va_of_mfn((l4[511] & 0xffffffffff000) >> 12);
      TRY("movq %0, (%1)", , R("r"(0ul), "r"(l3 + 1))); show("L3 by mov");
      TRY("movb %b0, (%1)", , R("r"(0), "r"(p2m))); show("the p2m list"); }
    rc("vm_assist disable", HC2(HC_vm_assist, 1, 2));
}
