/*
 * Event delivery to a PV vCPU: upcalls by mask and pending bits, delivery on hypercall exit and on iret, sched_op
 * (yield, block, poll), VIRQ_TIMER by set_timer_op and by the vcpu_op timers. Times are not shown, only order
 * and bounds.
 */
#include "lib.h"
#define now() system_time(&VI->time)

static u32 ipi, tport;
static int mask_inside = -1, pending_inside;
static u64 frame_mask, frame_rip;
static void watch(struct regs *r)
{
    mask_inside = VI->upcall_mask; pending_inside = VI->upcall_pending;
    frame_mask = r->cs >> 32; frame_rip = r->rip;
    VI->pending_sel = 0;
    for (int i = 0; i < 64; i++) SI->pending[i] = 0;
}
static void state(const char *name)
{
    say("%s: upcalls %u pending %d mask %d sel %lx ipi pending %ld fired %u\n", name, upcalls, VI->upcall_pending, VI->upcall_mask,
        VI->pending_sel, SI->pending[0] >> ipi & 1, fired[ipi]);
}
#define MS 1000000ul

void test(void)
{
    struct { u32 vcpu, port; } bi = { 0, 0 };
    struct { u32 virq, vcpu, port; } bv = { 0, 0, 0 };
    u32 p;
    u64 t0, t;

    say("-- upcalls\n");
    rc("bind_ipi", EV(7, &bi)); ipi = bi.port;
    state("start");
    rc("send, masked", EV(4, &ipi)); state("  then");
    enable_events(); state("unmasked");
    rc("send, open", EV(4, &ipi)); state("  then");
    __atomic_or_fetch((u64 *)&SI->mask[0], 1ul << ipi, __ATOMIC_SEQ_CST);
    rc("send, port masked", EV(4, &ipi)); state("  then");
    p = ipi; rc("unmask op", EV(9, &p)); state("  then");
    disable_events();
    rc("send twice", EV(4, &ipi) | EV(4, &ipi)); state("  then");
    upcall_hook = watch;
    VI->upcall_mask = 0; HC2(HC_sched_op, 0, 0); /* yield: delivered at its end */
    say("inside: mask %d pending %d, frame mask %ld\n", mask_inside, pending_inside, frame_mask);
    say("after: mask %d\n", VI->upcall_mask);
    disable_events(); VI->upcall_pending = 1;
    for (volatile int i = 0; i < 1000; i++) ;
    say("setting the pending byte does nothing by itself: upcalls %u\n", upcalls);
    { u64 there;
      __asm__ volatile("mov %%rsp, %%rax; push $0xe02b; push %%rax; push $0x202; push $0xe030; push $1f; jmp do_iret; 1: mov $1b, %0" : "=r"(there) : : "rax", "memory");
      say("iret with IF delivers: upcalls %u at its target %d frame mask %ld\n", upcalls, frame_rip == there, frame_mask);
      say("after: mask %d\n", VI->upcall_mask); }
    disable_events(); VI->upcall_pending = 0;
    upcall_hook = 0;

    say("-- sched_op\n");
    VI->upcall_mask = 1;
    EV(4, &ipi); rc("block with an event pending", HC2(HC_sched_op, 1, 0)); state("  then");
    rc("yield", HC2(HC_sched_op, 0, 0));
    disable_events();
    { struct { u32 *ports; u32 nr; u64 timeout; } poll = { &ipi, 1, 0 };
      u32 bad = 5000;
      EV(4, &ipi); rc("poll, pending", HC2(HC_sched_op, 3, &poll)); state("  then");
      SI->pending[0] = 0; VI->upcall_pending = 0; VI->pending_sel = 0;
      t0 = now(); poll.timeout = t0 + 5 * MS; rc("poll, timeout", HC2(HC_sched_op, 3, &poll)); t = now();
      say("  waited %d not long %d\n", t - t0 >= 5 * MS, t - t0 < 1000 * MS); state("  then");
      poll.timeout = 1; rc("poll, timeout in the past", HC2(HC_sched_op, 3, &poll));
      poll.nr = 0; t0 = now(); poll.timeout = t0 + 2 * MS; rc("poll, no ports", HC2(HC_sched_op, 3, &poll)); say("  waited %d\n", now() - t0 >= 2 * MS);
      poll.nr = 129; rc("poll, 129 ports", HC2(HC_sched_op, 3, &poll));
      poll.nr = 1; poll.ports = &bad; rc("poll, port 5000", HC2(HC_sched_op, 3, &poll));
      poll.ports = EFAULT_ADDR; rc("poll, bad list", HC2(HC_sched_op, 3, &poll)); }
    rc("poll, bad pointer", HC2(HC_sched_op, 3, EFAULT_ADDR));
    rc("watchdog, new", ({ struct { u32 id, timeout; } w = { 0, 60 }; HC2(HC_sched_op, 6, &w); }));
    rc("watchdog 2, new", ({ struct { u32 id, timeout; } w = { 0, 60 }; HC2(HC_sched_op, 6, &w); }));
    rc("a third watchdog", ({ struct { u32 id, timeout; } w = { 0, 60 }; HC2(HC_sched_op, 6, &w); }));
    rc("watchdog 1, off", ({ struct { u32 id, timeout; } w = { 1, 0 }; HC2(HC_sched_op, 6, &w); }));
    rc("watchdog 2, off", ({ struct { u32 id, timeout; } w = { 2, 0 }; HC2(HC_sched_op, 6, &w); }));
    rc("watchdog 7", ({ struct { u32 id, timeout; } w = { 7, 0 }; HC2(HC_sched_op, 6, &w); }));
    rc("sched_op 99", HC2(HC_sched_op, 99, 0));
    rc("sched_op_compat yield", HC2(HC_sched_op_compat, 0, 0));
    rc("sched_op_compat 99", HC2(HC_sched_op_compat, 99, 0));

    say("-- timers\n");
    rc("bind VIRQ_TIMER", EV(1, &bv)); tport = bv.port;
    rc("again", EV(1, &bv));
    enable_events();
    t0 = now(); rc("set_timer_op", HC1(HC_set_timer_op, t0 + 3 * MS));
    HC2(HC_sched_op, 1, 0); t = now();
    say("  fired %u in time %d not early %d\n", fired[tport], t - t0 < 1000 * MS, t - t0 >= 3 * MS);
    rc("set_timer_op in the past", HC1(HC_set_timer_op, 1)); HC2(HC_sched_op, 0, 0); say("  fired %u\n", fired[tport]);
    t0 = now(); rc("set_timer_op", HC1(HC_set_timer_op, t0 + 1000000 * MS)); rc("cancel", HC1(HC_set_timer_op, 0));
    { struct { u64 timeout; u32 flags; } ss = { now() + 3 * MS, 0 };
      t0 = now(); rc("singleshot", HC3(HC_vcpu_op, 8, 0, &ss)); HC2(HC_sched_op, 1, 0); t = now();
      say("  fired %u not early %d\n", fired[tport], t >= ss.timeout);
      ss.timeout = 1; rc("singleshot, past", HC3(HC_vcpu_op, 8, 0, &ss)); HC2(HC_sched_op, 0, 0); say("  fired %u\n", fired[tport]);
      ss.flags = 1; rc("singleshot, past, must be future", HC3(HC_vcpu_op, 8, 0, &ss)); HC2(HC_sched_op, 0, 0); say("  fired %u\n", fired[tport]);
      ss.timeout = now() + 2 * MS; rc("singleshot, future", HC3(HC_vcpu_op, 8, 0, &ss)); HC2(HC_sched_op, 1, 0); say("  fired %u\n", fired[tport]);
      ss.timeout = now() + 1000000 * MS; rc("singleshot", HC3(HC_vcpu_op, 8, 0, &ss)); rc("stop", HC3(HC_vcpu_op, 9, 0, 0));
      rc("singleshot, vcpu 1", HC3(HC_vcpu_op, 8, 1, &ss));
      rc("singleshot, bad pointer", HC3(HC_vcpu_op, 8, 0, EFAULT_ADDR)); }
    { u64 period = 2 * MS; u32 before = fired[tport];
      rc("periodic 2 ms", HC3(HC_vcpu_op, 6, 0, &period)); t0 = now();
      while (fired[tport] - before < 5 && now() - t0 < 3000 * MS) HC2(HC_sched_op, 0, 0);
      t = now(); say("  five ticks, not early %d not late %d\n", t - t0 >= 7 * MS, t - t0 < 1000 * MS);
      /* The periodic timer stands still while the vCPU is blocked, and ticks once when it is scheduled again. */
      { struct { u32 *ports; u32 nr; u64 timeout; } poll = { 0, 0, now() + 30 * MS };
        before = fired[tport]; HC2(HC_sched_op, 3, &poll); say("  polled 30 ms: not a tick per 2 ms %d\n", fired[tport] - before <= 3); }
      rc("stop", HC3(HC_vcpu_op, 7, 0, 0)); rc("stop again", HC3(HC_vcpu_op, 7, 0, 0));
      period = 999999; rc("periodic below 1 ms", HC3(HC_vcpu_op, 6, 0, &period));
      period = 1000000; rc("periodic 1 ms", HC3(HC_vcpu_op, 6, 0, &period));
      period = ~0ul; rc("periodic, huge", HC3(HC_vcpu_op, 6, 0, &period));
      period = 0; rc("periodic 0", HC3(HC_vcpu_op, 6, 0, &period));
      rc("stop", HC3(HC_vcpu_op, 7, 0, 0)); }
    { u32 n = 0, back = 0; u64 last = 0;
      for (; n < 2000; n++) { t = now(); back += t < last; last = t; }
      say("clock went back %u times in %u\n", back, n); }
    say("time version even %d wall clock version even %d after 2020 %d\n", !(VI->time.version & 1), !(SI->wc_version & 1), SI->wc_sec > 1577836800u || SI->wc_sec_hi);
    disable_events();

    say("-- event_channel_op\n");
    { struct { u16 dom; u32 port; u32 status, vcpu; u32 u[2]; } st = { DOMID_SELF, ipi, 0, 0, { 0, 0 } };
      rc("status of the ipi", EV(5, &st)); say("  %u vcpu %u\n", st.status, st.vcpu);
      st.port = tport; rc("status of the timer", EV(5, &st)); say("  %u vcpu %u virq %u\n", st.status, st.vcpu, st.u[0]); }
    p = tport; rc("close", EV(3, &p)); rc("close again", EV(3, &p)); p = 0; rc("close 0", EV(3, &p)); p = 5000; rc("close 5000", EV(3, &p));
    rc("send on a closed one", EV(4, &tport));
    bv.virq = 99; rc("bind_virq 99", EV(1, &bv)); bv.virq = 0; bv.vcpu = 1; rc("bind_virq, vcpu 1", EV(1, &bv)); bi.vcpu = 1; rc("bind_ipi, vcpu 1", EV(7, &bi));
    rc("op 99", EV(99, 0)); rc("bad pointer", EV(4, EFAULT_ADDR));
    { struct { u32 cmd; union { struct { u16 dom, rdom; u32 port; } a; u32 w[8]; } u; } old = { 6, { { DOMID_SELF, DOMID_SELF, 0 } } };
      rc("event_channel_op_compat alloc_unbound", HC1(HC_event_channel_op_compat, &old)); }
}
