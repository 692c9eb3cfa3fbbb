/*
 * Software interrupts from kernel mode: do_general_protection's part for INT n (permit_softint with the gate's
 * DPL) and int80_direct_trap.
 *
 * QEMU up to version 8 reports such a fault in long mode with the error code vector * 16 + 2 instead of
 * vector * 8 + 2, so that Xen takes the vector for twice what it is. With `intbug=1` (used to record the
 * transcript) the gates are registered where Xen will look, and error codes are halved before they are shown.
 */
#include "lib.h"

static u32 bug;
static void gate(u8 vec, u8 flags) { set_gate(vec << bug, flags, (u64)trap_entries + 32 * (vec == 0x20 ? 32 : 33)); }
static void show_int(const char *name)
{
    if (seen.n && seen.vec == 13)
        seen.err = (seen.err >> 3 >> bug) << 3 | (seen.err & 7);
    show_full(name);
}

void test(void)
{
    bug = num("intbug", 0);
    TRY("int $0", , ); show_int("int 0");
    TRY("int $1", , ); show_int("int 1");
    TRY("int $3", , ); show_full("int 3");
    TRY("int $4", , ); show_full("int 4");
    TRY("int $6", , ); show_int("int 6");
    TRY("int $13", , ); show_int("int d");
    TRY("int $14", , ); show_int("int e");
    TRY("int $0x20", , ); show_int("int 20, no gate");
    TRY("int $0x7f", , ); show_int("int 7f, no gate");
    for (u32 flags = 0; flags < 8; flags++) {
        gate(0x20, flags);
        VI->upcall_mask = 0;
        TRY("int $0x20", , );
        say("int 20, gate flags %u: ", flags); show_int("");
        say("mask after: %d\n", VI->upcall_mask);
    }
    VI->upcall_mask = 1;
    gate(0x21, 7);
    TRY("int $0x21", , ); show_int("int 21, events masked");
    TRY(".byte 0x66; int $0x21", , ); show_int("int 21 with a prefix"); /* Xen adds two to rip, whatever the length */

    /* 0x80 has a gate of its own, which does not ask for the DPL. */
    HC1(HC_set_trap_table, 0);
    { struct trap_info t[2] = { { 13, 0, KCS, (u64)trap_entries + 13 * 32 }, { 0, 0, 0, 0 } }; set_traps(t); }
    TRY("int $0x80", , ); show_full("int 80, no gate");
    for (u32 flags = 0; flags < 8; flags++) {
        set_gate(0x80, flags, (u64)trap_entries + 34 * 32);
        VI->upcall_mask = 0;
        TRY("int $0x80", , );
        say("int 80, gate flags %u: ", flags); show_full("");
    }
}
