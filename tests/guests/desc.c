/*
 * Descriptor tables: set_gdt, update_descriptor, MMUEXT_SET_LDT and segment loads from them (descriptor-tables.c,
 * and the lazy mapping of LDT pages by page fault, pv_map_ldt_shadow_page).
 */
#include "lib.h"

static u64 *gdt, *ldt;
static long update(u64 *table, u32 i, u64 v) { return HC2(HC_update_descriptor, (MFN(table) << 12) + 8 * i, v); }
#define DATA 0x00cff3000000ffffull   /* ring 3, writable */
#define DATA0 0x00cf93000000ffffull  /* ring 0 */
#define CODE64 0x00affb000000ffffull
#define CODE32 0x00cffb000000ffffull

static void load(const char *name, u16 sel)
{
    u64 back = 0;
    TRY("mov %w1, %%fs; mov %%fs, %0", R("+r"(back)), R("r"(sel)));
    show(name);
    if (!seen.n)
        say("  selector %lx\n", back & 0xffff);
    TRY("mov %w0, %%fs", , R("r"(0)));
}
static void load_ss(const char *name, u16 sel)
{
    TRY("mov %w0, %%ss", , R("r"(sel)));
    show(name);
    TRY("mov %w0, %%ss", , R("r"(0xe02b)));
}

void test(void)
{
    u64 frames[16];
    gdt = (u64 *)pages[0]; ldt = (u64 *)pages[1];
    say("-- set_gdt\n");
    frames[0] = MFN(gdt);
    rc("empty", HC2(HC_set_gdt, frames, 0));
    rc("writable page", HC2(HC_set_gdt, frames, 512));
    set_ro(gdt);
    rc("read-only page of zeroes", HC2(HC_set_gdt, frames, 512));
    rc("page writable again", set_rw(gdt));
    rc("eight entries", HC2(HC_set_gdt, frames, 8));
    rc("too many", HC2(HC_set_gdt, frames, 14 * 512 + 1));
    frames[1] = 0xfffffffff;
    rc("second frame nothing", HC2(HC_set_gdt, frames, 513));
    frames[1] = MFN(si->pt_base);
    rc("second frame a page table", HC2(HC_set_gdt, frames, 513));
    frames[1] = frames[0];
    rc("the same frame twice", HC2(HC_set_gdt, frames, 1024));
    rc("bad pointer", HC2(HC_set_gdt, EFAULT_ADDR, 512));
    rc("Xen's pointer", HC2(HC_set_gdt, XEN_ADDR, 512));
    rc("set", HC2(HC_set_gdt, frames, 512));
    rc("page writable", set_rw(gdt));

    say("-- update_descriptor\n");
    rc("data", update(gdt, 1, DATA)); say("  %lx\n", gdt[1]);
    rc("data, DPL 0", update(gdt, 2, DATA0)); say("  %lx\n", gdt[2]);
    rc("code", update(gdt, 3, CODE64)); say("  %lx\n", gdt[3]);
    rc("not present", update(gdt, 4, DATA & ~(1ull << 47))); say("  %lx\n", gdt[4]);
    rc("TSS", update(gdt, 5, 0x0000890000000067ull));
    rc("LDT", update(gdt, 5, 0x0000820000000fffull));
    rc("interrupt gate", update(gdt, 5, 0x00008e0000000000ull | 0xe033u << 16));
    rc("call gate to the kernel's code", update(gdt, 5, 0x00008c0000000000ull | 0xe033u << 16)); say("  %lx\n", gdt[5]);
    rc("call gate, DPL 3", update(gdt, 6, 0x0000ec0000000000ull | 0xe033u << 16)); say("  %lx\n", gdt[6]);
    rc("call gate to Xen's code", update(gdt, 7, 0x00008c0000000000ull | 0xe008u << 16)); say("  %lx\n", gdt[7]);
    rc("call gate with a count", update(gdt, 7, 0x00008c0100000000ull | 0xe033u << 16));
    rc("call gate, null", update(gdt, 7, 0x00008c0000000000ull));
    rc("type 0", update(gdt, 7, 0x0000800000000000ull));
    rc("unaligned", HC2(HC_update_descriptor, (MFN(gdt) << 12) + 4, DATA));
    rc("in a plain page", update((u64 *)pages[2], 1, DATA)); say("  %lx\n", ((u64 *)pages[2])[1]);
    rc("invalid, in a plain page", update((u64 *)pages[2], 2, 0x0000890000000067ull));
    rc("in a page table", update((u64 *)si->pt_base, 1, 0));
    rc("in nothing", HC2(HC_update_descriptor, 0xfffffffff008, DATA));
    rc("user data for offset 510", update(gdt, 510, DATA));
    TRY("movq %0, 8(%1)", , R("r"(DATA), "r"(gdt))); show("write to the GDT");

    say("-- loads\n");
    load("fs, data", 1 << 3 | 3); load("fs, data, RPL 0", 1 << 3); load("fs, data made of DPL 0", 2 << 3 | 3); load("fs, code", 3 << 3 | 3);
    load("fs, not present", 4 << 3 | 3); load("fs, call gate", 5 << 3 | 3); load("fs, entry 510", 510 << 3 | 3); load("fs, beyond", 512 << 3 | 3);
    load("fs, null 3", 3); load("fs, flat ring 3", 0xe02b); load("fs, Xen's data", 0xe010); load("fs, flat ring 3, RPL 0", 0xe028);
    load_ss("ss, data", 1 << 3 | 3); load_ss("ss, data, RPL 0", 1 << 3); load_ss("ss, code", 3 << 3 | 3); load_ss("ss, not present", 4 << 3 | 3);
    { static struct { u64 off; u16 sel; } there __asm__("there_off") __attribute__((used)), back __asm__("back_off") __attribute__((used)); /* into the guest's own code segment and back */
      u64 cs = 0;
      there.sel = 3 << 3 | 3; back.sel = KCS;
      TRY("movq $773f, there_off; movq $774f, back_off; rex64 ljmp *there_off; 773: mov %%cs, %0; rex64 ljmp *back_off; 774:", R("+r"(cs)), );
      show("ljmp to own code segment"); say("  cs %lx\n", cs & 0xffff); }

    say("-- LDT\n");
    load("fs, no LDT", 0x7);
    ldt[0] = DATA; ldt[1] = DATA0; ldt[2] = CODE32;
    rc("SET_LDT unaligned", mmuext1(13, (u64)ldt + 8, 8));
    rc("SET_LDT too many", mmuext1(13, (u64)ldt, 8193));
    rc("SET_LDT Xen's", mmuext1(13, (u64)XEN_ADDR, 8));
    rc("SET_LDT non-canonical", mmuext1(13, (u64)NONCANON, 8));
    rc("SET_LDT of a writable page", mmuext1(13, (u64)ldt, 512));
    load("fs, LDT page writable", 0x7); say("  cr2 is the descriptor %d\n", seen.cr2 == (u64)ldt);
    set_ro(ldt);
    load("fs, LDT", 0x7);
    load("fs, LDT 1", 0xf); load("fs, LDT 2", 0x17); load("fs, LDT 3, empty", 0x1f);
    rc("page writable", set_rw(ldt));
    rc("update_descriptor in the LDT", update(ldt, 3, DATA)); load("fs, LDT 3", 0x1f);
    rc("SET_LDT 2 entries", mmuext1(13, (u64)ldt, 2));
    load("fs, LDT 1", 0xf); load("fs, LDT 2, beyond", 0x17);
    rc("SET_LDT unmapped", mmuext1(13, (u64)EFAULT_ADDR & ~4095ul, 8));
    load("fs, unmapped LDT", 0x7);
    rc("SET_LDT none", mmuext1(13, 0, 0));
    load("fs, none", 0x7);
    rc("page writable", set_rw(ldt));
    rc("SET_LDT, bad descriptor inside", (ldt[4] = 0x0000890000000067ull, set_ro(ldt), mmuext1(13, (u64)ldt, 512)));
    load("fs", 0x7);
    rc("SET_LDT none", mmuext1(13, 0, 0));
    rc("no GDT", HC2(HC_set_gdt, frames, 0));
    load("fs, old GDT entry", 1 << 3 | 3);
    rc("GDT page writable", set_rw(gdt));
    rc("bad descriptor in a new GDT", (gdt[9] = 0x0000890000000067ull, set_ro(gdt), HC2(HC_set_gdt, frames, 512)));
}
