/*
 * Hostile arguments: every hypercall but those that end the domain or the machine, with pseudo-random numbers and
 * pointers from a list of nasty ones (seed=N calls=N). Nothing of it is compared with a real run: the kernel
 * must come to its last line, and no result may be outside 0, small counts and -1 to -133. Frames offered as targets
 * are those of eight victim pages, arena[8] to arena[15], which nothing else uses.
 */
#include "lib.h"

static u64 rng;
static u64 rnd(u64 n) { rng = rng * 6364136223846793005ul + 1442695040888963407ul; return (rng >> 24) % n; }
static u8 arena[16][4096] __attribute__((aligned(4096)));

static u64 pointer(void)
{
    switch (rnd(12)) {
    case 0: return 0;
    case 1: return (u64)EFAULT_ADDR + rnd(64);
    case 2: return (u64)XEN_ADDR + rnd(4096);
    case 3: return (u64)NONCANON;
    case 4: return (u64)arena[3] + PAGE - rnd(64);   /* runs into an unmapped page */
    case 5: return (u64)arena[6] + rnd(PAGE);        /* read-only */
    case 6: return 0xffff800000000000 + rnd(PAGE);   /* M2P */
    case 7: return 0xffff87ffffffffff - rnd(64);     /* the end of Xen's area */
    case 8: return ~0ul - rnd(64);
    default: return (u64)arena[rnd(3)] + rnd(PAGE / 8) * 8;
    }
}
static u64 value(void)
{
    switch (rnd(10)) {
    case 0: return 0;
    case 1: return rnd(4);
    case 2: return rnd(64);
    case 3: return rnd(PAGE);
    case 4: return 1ul << rnd(64);
    case 5: return ~0ul >> rnd(64);
    case 6: return DOMID_SELF + rnd(5);
    case 7: return MFN(arena[8 + rnd(8)]);
    case 8: return rnd(2) ? ~rnd(PAGE) : 0x7fffffff + rnd(3);
    default: return pointer();
    }
}
/* Commands whose success would end the run or take from the kernel what it stands on. */
static int allowed(u32 n, u64 cmd)
{
    cmd = (u32)cmd;
    switch (n) {
    case HC_iret: case HC_set_trap_table: case HC_set_callbacks: case HC_callback_op: case HC_stack_switch:
    case HC_multicall: case HC_set_gdt: case HC_nmi_op: case HC_mmu_update: case HC_update_va_mapping:
    case HC_update_va_mapping_otherdomain: case HC_set_debugreg:
        return 0; /* fuzzed by hostile() below, with limits */
    case HC_sched_op: case HC_sched_op_compat: return cmd != 1 && cmd != 2 && cmd != 3 && cmd != 4 && cmd != 5 && cmd != 6;
    case HC_console_io: return cmd != 0;
    case HC_event_channel_op: return cmd != 10 && cmd != 3; /* reset, close: the console's */
    case HC_vcpu_op: return cmd != 2 && cmd != 6 && cmd != 10; /* down, periodic timer, register_vcpu_info */
    case HC_mmuext_op: return 1;
    case HC_memory_op: return (cmd & 63) > 1 && (cmd & 63) != 6; /* reservations */
    case HC_vm_assist: return 1;
    case HC_platform_op: case HC_kexec_op: case HC_domctl: case HC_sysctl: case HC_physdev_op: case HC_physdev_op_compat:
    case HC_xsm_op: case 48: return !priv();
    case HC_set_timer_op: return 1;
    }
    return n < 56;
}
/* Those that are only safe with a pointer that cannot succeed, or on a page of the arena. */
static long hostile(u32 n)
{
    u64 bad[] = { (u64)EFAULT_ADDR, (u64)XEN_ADDR, (u64)NONCANON, ~0ul - 64 }, p = bad[rnd(4)];
    switch (n) {
    case HC_set_trap_table: return HC1(n, p);
    case HC_callback_op: case HC_nmi_op: return HC2(n, rnd(3), p);
    case HC_multicall: return HC2(n, p, rnd(100));
    case HC_set_gdt: return HC2(n, p, 1 + value() % 10000);
    case HC_mmu_update: return rnd(2) ? HC(n, p, value(), pointer(), value()) : mmu_update1(value(), value(), 0);
    case HC_update_va_mapping: return HC3(n, arena[8 + rnd(8)], value(), value() & 7);
    case HC_update_va_mapping_otherdomain: return HC(n, arena[8 + rnd(8)], value(), value() & 7, value());
    case HC_set_debugreg: return HC2(n, rnd(12) == 7 ? 0 : rnd(7), value());
    case HC_sched_op: return HC2(n, 2 + rnd(2), p);
    case HC_console_io: return HC3(n, 0, 1 + rnd(1000000), p);
    }
    return 0;
}

void test(void)
{
    long calls = num("calls", 2000);
    u32 strange = 0, faults = 0;
    rng = num("seed", 1) * 2654435761ul + 777;
    remap(arena[4], 0);
    set_ro(arena[6]);
    for (long i = 0; i < calls; i++) {
        u32 n = rnd(64);
        u64 a[5];
        long r = 0;
        for (u32 p = 0; p < 3; p++)
            for (u32 w = 0; w < 8; w++)
                ((u64 *)arena[p])[rnd(512)] = value();
        for (u32 k = 0; k < 5; k++)
            a[k] = rnd(3) ? value() : pointer();
        if (rnd(2))
            a[0] = rnd(24);
        if (n == HC_mmuext_op || n == HC_grant_table_op) /* at most a few structures */
            a[n == HC_mmuext_op ? 1 : 2] = rnd(4);
        if (n == HC_mmuext_op && a[0] - (u64)arena < 3 * PAGE)
            ((u64 *)(a[0] & ~7ul))[0] = 5 + rnd(20) == 5 ? 6 : 6 + rnd(20); /* no base pointer of nothing good */
        if (n == HC_set_segment_base && a[0] > 3)
            a[0] = rnd(6);
        if (allowed(n, a[0])) {
            if (num("log", 0)) say("%ld: %u %lx %lx %lx %lx %lx\n", i, n, a[0], a[1], a[2], a[3], a[4]);
            r = HC5(n, a[0], a[1], a[2], a[3], a[4]);
        } else
            r = hostile(n);
        faults += r == -14;
        if ((r < -133 || r > 1l << 47) && n != HC_get_debugreg && n != HC_memory_op) { /* these give back what they like */
            strange++;
            say("call %ld: hypercall %u %lx gave %lx\n", i, n, a[0], r);
        }
        VI->upcall_mask = 1;
        if (!(i & 63)) { /* whatever was done to them, the arena's pages come back */
            for (u32 k = 0; k < 16; k++)
                if (k != 4 && k != 6)
                    set_rw(arena[k]);
        }
    }
    HC3(HC_vcpu_op, 7, 0, 0); HC3(HC_vcpu_op, 9, 0, 0); HC1(HC_set_timer_op, 0);
    say("calls made, strange results %u, some -EFAULT %d\n", strange, faults > 0);
}
