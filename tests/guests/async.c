/*
 * What interrupts a PV kernel between two of its instructions, and in the middle of a multicall: events, timers due at
 * once, NMIs. Found by the conformance kernel (evconf.c), here one by one.
 */
#include "lib.h"

static u32 ipi, tport, step, at_step[16], seen_ports[16], nr_seen;
static struct { u64 op; s64 result; u64 args[6]; } calls[4];

static void watch(struct regs *r)
{
    (void)r;
    u64 sel = __atomic_exchange_n(&VI->pending_sel, 0, __ATOMIC_SEQ_CST);
    for (u32 p = 0; sel && p < 64; p++)
        if (SI->pending[0] & ~SI->mask[0] & 1ul << p) {
            __atomic_and_fetch(&SI->pending[0], ~(1ul << p), __ATOMIC_SEQ_CST);
            for (u32 i = 0; i < 4; i++) /* how far the multicall has come */
                step += calls[i].op && calls[i].result != 77;
            at_step[nr_seen & 15] = step;
            seen_ports[nr_seen++ & 15] = p;
            step = 0;
        }
}
static void report(const char *name)
{
    say("%s:", name);
    for (u32 i = 0; i < nr_seen; i++)
        say(" %s after %u", seen_ports[i] == ipi ? "ipi" : seen_ports[i] == tport ? "timer" : "?", at_step[i]);
    say("%s\n", nr_seen ? "" : " no upcall");
    nr_seen = 0;
}
static void multicall(const char *name, u32 n)
{
    for (u32 i = 0; i < 4; i++)
        calls[i].result = 77;
    for (u32 i = n; i < 4; i++)
        calls[i].op = 0;
    rc(name, HC2(HC_multicall, calls, n));
    for (u32 i = 0; i < n; i++)
        rc("  result", calls[i].result);
    report("  upcalls");
    memset(calls, 0, sizeof calls);
}
static void call(u32 i, u64 op, u64 a, u64 b) { calls[i].op = op; calls[i].args[0] = a; calls[i].args[1] = b; }

static u32 nmis, depth, deepest, again;
static int nmi(struct regs *r)
{
    if (r->vector != 2)
        return 0;
    nmis++;
    if (++depth > deepest)
        deepest = depth;
    if (again) {
        again--;
        rc("  another, from its handler", HC3(HC_vcpu_op, 11, 0, 0));
        say("  so far %u\n", nmis);
    }
    say("  in the handler: mask %d, frame mask %ld\n", VI->upcall_mask, r->cs >> 32);
    depth--;
    return 1;
}

void test(void)
{
    struct { u32 vcpu, port; } bi = { 0, 0 };
    struct { u32 virq, vcpu, port; } bv = { 0, 0, 0 };
    u32 masked = 0;
    for (int v = 0; v < 32; v++)
        masked |= (u32)SI->vcpu[v].upcall_mask << v;
    say("upcalls are masked for %x\n", masked);
    upcall_hook = watch;
    rc("bind_ipi", EV(7, &bi)); ipi = bi.port;
    rc("bind VIRQ_TIMER", EV(1, &bv)); tport = bv.port;
    enable_events();

    say("-- timers due at once\n");
    rc("set_timer_op, past", HC1(HC_set_timer_op, 1)); report("  upcalls");
    { struct { u64 when; u32 flags; } ss = { 1, 0 };
      rc("singleshot, past", HC3(HC_vcpu_op, 8, 0, &ss)); report("  upcalls"); }
    disable_events();
    rc("set_timer_op, past, masked", HC1(HC_set_timer_op, 1)); say("  pending %ld\n", SI->pending[0] >> tport & 1);
    enable_events(); report("  upcalls");
    { u64 period = ~0ul >> 2;
      rc("the longest period", HC3(HC_vcpu_op, 6, 0, &period)); period++;
      rc("one more", HC3(HC_vcpu_op, 6, 0, &period));
      rc("stop", HC3(HC_vcpu_op, 7, 0, 0)); }

    say("-- multicall\n");
    call(0, HC_xen_version, 0, 0); call(1, HC_event_channel_op, 4, (u64)&ipi); call(2, HC_xen_version, 0, 0); call(3, HC_event_channel_op, 4, (u64)&ipi);
    multicall("events", 4);
    call(0, HC_xen_version, 0, 0); call(1, HC_set_timer_op, 1, 0); call(2, HC_xen_version, 0, 0);
    multicall("a timer", 3);
    disable_events();
    call(0, HC_event_channel_op, 4, (u64)&ipi); call(1, HC_set_timer_op, 1, 0); call(2, HC_xen_version, 0, 0);
    multicall("masked", 3);
    enable_events(); report("  upcalls");
    call(0, HC_event_channel_op, 4, (u64)&ipi); call(1, HC_multicall, (u64)calls, 1); call(2, 1234, 0, 0); call(3, HC_sched_op, 0, 0);
    multicall("nested, unknown, yield", 4);

    say("-- NMI\n");
    rc("send, no handler", HC3(HC_vcpu_op, 11, 0, 0));
    rc("send, with an argument", HC3(HC_vcpu_op, 11, 0, pages[0]));
    rc("send to vcpu 1", HC3(HC_vcpu_op, 11, 1, 0));
    { struct { u64 address, pad; } cb = { (u64)trap_entries + 2 * 32, 0 };
      trap_hook = nmi;
      rc("register", HC2(HC_nmi_op, 0, &cb)); }
    say("the lost one does not come: %u\n", nmis);
    rc("send", HC3(HC_vcpu_op, 11, 0, 0)); say("  came %u mask %d\n", nmis, VI->upcall_mask);
    again = 1;
    rc("send", HC3(HC_vcpu_op, 11, 0, 0)); say("  came %u deepest %u mask %d\n", nmis, deepest, VI->upcall_mask);
    disable_events();
    EV(4, &ipi);
    rc("send, upcalls masked", HC3(HC_vcpu_op, 11, 0, 0)); say("  came %u mask %d\n", nmis, VI->upcall_mask);
    call(0, HC_xen_version, 0, 0); call(1, HC_vcpu_op, 11, 0); call(2, HC_xen_version, 0, 0);
    multicall("from a multicall", 3); say("  came %u\n", nmis);
    enable_events(); report("  upcalls");
    rc("unregister", HC2(HC_nmi_op, 1, 0));
    rc("send", HC3(HC_vcpu_op, 11, 0, 0)); say("  came %u\n", nmis);
}
