/*
 * evconf: a long pseudo-random sequence of event-channel operations on one or two vCPUs. Its transcript, every result
 * and after every step a hash of all memory shared with the hypervisor, is to be the same byte for byte wherever it
 * runs: tests/conformance.py compares real Xen with pvirq (docs/conformance.md).
 *
 *   seed=N ops=N   which sequence, and how long
 *   abi=0|1|2      two-level; FIFO from the start; two-level, going over to FIFO (and, by reset, back) on the way
 *   vcpus=1|2
 *   dump=N last=N  prints all the memory itself after steps N to N
 *
 * What keeps it independent of time and scheduling: one vCPU acts, the other waits, with its upcalls open or closed,
 * or sleeps in SCHEDOP_block or SCHEDOP_poll. After each step the one that acts waits until the other has come to
 * rest, which it tells by its runstate or by rounds of its waiting loop. What would notify a vCPU twice is only done
 * while that one can't see it (`alone`). Timers are far in the future, in the past, or waited for.
 */
#include "evconf.h"

static u32 top;                        /* the highest port seen */
static int abi, nest;                  /* nest: hypercalls that upcall handlers may still make in this step */
static long step_nr, steps, dump_first, dump_last;

/* A port as argument: mostly one in use, sometimes none at all. */
static u32 port_in(u64 *state)
{
    u32 k = draw(state, 40);
    return k == 0 ? 0 : k == 1 ? 4094 + draw(state, 5) : k == 2 ? draw(state, 1u << 31) * 2 : k < 12 ? draw(state, top + 3) : 1 + draw(state, top < 40 ? top + 1 : 40);
}
static u32 any_port(void) { return port_in(&rng); }
static u32 any_vcpu(void) { return rnd(16) ? rnd(vcpus) : rnd(4) ? vcpus : rnd(1u << 31) * 2; }
static u16 any_domain(u32 odd) { return rnd(odd) ? DOMID_SELF : (u16[]){ 0, 5, DOMID_IO, DOMID_XEN, DOMID_INVALID }[rnd(5)]; }
/* Nobody else can be disturbed: there is no other vCPU, or it waits with its upcalls closed. */
static int alone(int d) { return vcpus == 1 || (!parked[!d] && closed[!d]); }
/* The other vCPU's turn to act. */
static void pass(int d, int mask)
{
    closed[d] = mask;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    driver = !d;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static void bound(int d, s64 rc, u32 port, u32 vcpu)
{
    if (result(d, rc))
        return;
    arg(d, port);
    owner[port & 0x1ffff] = vcpu;
    if (port > top)
        top = port;
}
static s64 ev1(u32 op, u32 port) { return EV(op, &port); }
static void forget(u32 port)
{
    owner[port & 0x1ffff] = 0;         /* as bind_interdomain will have it, which raises its event at once */
    for (int v = 0; v < 2; v++)
        if (timer_port[v] == port)
            timer_port[v] = 0;
}
static s64 close(u32 port)
{
    s64 rc = ev1(3, port);
    if (!rc)
        forget(port);
    return rc;
}
static s64 bind_vcpu(u32 port, u32 vcpu)
{
    struct { u32 port, vcpu; } a = { port, vcpu };
    s64 rc = EV(8, &a);
    if (!rc)
        owner[port & 0x1ffff] = vcpu;
    return rc;
}

/* ---- upcalls ---- */
/* What a handler may do with a port besides taking its event; on the acting vCPU only. */
static void handle(int v, u32 port)
{
    u64 *r = &upcall_rng[v];
    handled[v]++;
    if (v != driver || nest <= 0 || draw(r, 3))
        return;
    nest--;
    if (!draw(r, 3))
        port = port_in(r);
    switch (draw(r, 7)) {
    case 0: word(v, "!send"); arg(v, port); result(v, ev1(4, port)); break;
    case 1: word(v, "!unmask"); arg(v, port); result(v, ev1(9, port)); break;
    case 2: word(v, "!mask"); arg(v, port); change(port, MASKED, 1); break;
    case 3: word(v, "!clear"); arg(v, port); change(port, MASKED, 0); break;
    case 4: word(v, "!close"); arg(v, port); result(v, close(port)); break;
    case 5: { u32 to = draw(r, vcpus); word(v, "!bind_vcpu"); arg(v, port); arg(v, to); result(v, bind_vcpu(port, to)); break; }
    case 6: { struct { u32 port, prio; } a = { port, draw(r, 16) }; word(v, "!priority"); arg(v, port); arg(v, a.prio); result(v, EV(13, &a)); break; }
    }
}
/* Takes up to `limit` events; of what is left `keep` leaves the selector or READY bits set, else they are lost. */
static void scan_2l(int v, u32 limit, int keep)
{
    u64 sel = __atomic_exchange_n(&vi[v]->pending_sel, 0, __ATOMIC_SEQ_CST);
    for (u32 w = 0; w < 64; w++)
        for (u32 b = 0; (sel >> w & 1) && b < 64; b++) {
            u32 port = w * 64 + b;
            if (!(SI->pending[w] & ~SI->mask[w] & 1ul << b) || owner[port] != v)
                continue;
            if (!limit--) {
                if (keep)
                    vi[v]->pending_sel |= sel >> w << w;
                return;
            }
            __atomic_and_fetch(&SI->pending[w], ~(1ul << b), __ATOMIC_SEQ_CST);
            arg(v, port);
            handle(v, port);
        }
}
static void scan_fifo(int v, u32 limit, int keep)
{
    volatile u32 *ready = block[v];
    if (!ready)
        return;
    u32 r = __atomic_exchange_n(ready, 0, __ATOMIC_SEQ_CST);
    for (u32 q = 0; q < 16; q++)
        while (r >> q & 1) {
            u32 head = ready[2 + q];
            if (!head)
                r &= ~(1u << q);
            while (head) {
                if (!limit-- || !has_word(head)) { /* a link out of the array: a scribble's */
                    ready[2 + q] = has_word(head) ? head : 0;
                    if (keep)
                        *ready |= r;
                    return;
                }
                u32 link = array[head] & LINK;
                __atomic_and_fetch(&array[head], ~(LINKED | LINK), __ATOMIC_SEQ_CST);
                if ((array[head] & (PENDING | MASKED)) == PENDING) {
                    __atomic_and_fetch(&array[head], ~PENDING, __ATOMIC_SEQ_CST);
                    put(v, ' '); putn(v, q, 10); put(v, ':'); putn(v, head, 10);
                    handle(v, head);
                }
                head = link;
                if (!head)
                    r &= ~(1u << q);
                ready = block[v];
                if (!ready)
                    return;
                ready[2 + q] = head;
            }
            r |= __atomic_exchange_n(ready, 0, __ATOMIC_SEQ_CST);
        }
}
static void scan(int v, u32 limit, int keep)
{
    vi[v]->upcall_pending = 0;
    (fifo ? scan_fifo : scan_2l)(v, limit, keep);
}
void __attribute__((used)) conf_upcall(u64 v)
{
    u64 *r = &upcall_rng[v];
    upcalls_of[v]++;
    word(v, "^");
    if (draw(r, 8))
        scan(v, 100000, 1);
    else {
        u32 limit = draw(r, 4);
        scan(v, limit, draw(r, 4));
    }
    if (v == (u64)driver && nest > 0 && !draw(r, 6)) { /* open for what came meanwhile: upcalls nest */
        nest--;
        word(v, "(");
        vi[v]->upcall_mask = 0;
        HC2(HC_xen_version, 0, 0);
        vi[v]->upcall_mask = 1;
        word(v, ")");
    }
}
#define ENTRY(n) ".p2align 4\nconf_entry" #n ": mov (%rsp), %rcx; mov 8(%rsp), %r11; add $16, %rsp; push %rax; push %rcx; push %rdx; " \
    "push %rbx; push %rbp; push %rsi; push %rdi; push %r8; push %r9; push %r10; push %r11; mov $" #n ", %edi; cld; call conf_upcall; " \
    "pop %r11; pop %r10; pop %r9; pop %r8; pop %rdi; pop %rsi; pop %rbp; pop %rbx; pop %rdx; pop %rcx; pop %rax; jmp do_iret\n"
__asm__(".pushsection .text\n" ENTRY(0) ENTRY(1) ".popsection");
extern char conf_entry0[], conf_entry1[];

/* ---- the operations ---- */
static void op_alloc(int d)
{
    struct { u16 dom, rdom; u32 port; } a = { any_domain(12), any_domain(6), 0 };
    arg(d, a.dom); arg(d, a.rdom);
    s64 rc = EV(6, &a);
    bound(d, rc, a.port, 0);
}
static void op_interdomain(int d)
{
    struct { u16 dom; u32 rport, port; } a = { any_domain(12), any_port(), 0 };
    arg(d, a.dom); arg(d, a.rport);
    s64 rc = EV(0, &a);
    bound(d, rc, a.port, 0);
}
static void op_virq(int d)
{
    struct { u32 virq, vcpu, port; } a = { rnd(16) ? rnd(24) : rnd(1u << 31) * 2, 0, 0 };
    a.vcpu = any_vcpu();
    if (!rnd(3))
        a.virq = 0;
    if (a.virq == 2 || a.virq == 8)    /* VIRQ_CONSOLE, VIRQ_CON_RING: Xen's console raises them in its own time */
        a.virq = 1;
    arg(d, a.virq); arg(d, a.vcpu);
    s64 rc = EV(1, &a);
    bound(d, rc, a.port, a.vcpu);
    if (!rc && !a.virq)
        timer_port[a.vcpu] = a.port;
}
static void op_ipi(int d)
{
    struct { u32 vcpu, port; } a = { any_vcpu(), 0 };
    arg(d, a.vcpu);
    s64 rc = EV(7, &a);
    bound(d, rc, a.port, a.vcpu);
}
static void op_pirq(int d)
{
    struct { u32 pirq, flags, port; } a = { 100000 + rnd(1u << 31), rnd(2), 0 };
    arg(d, a.pirq);
    result(d, EV(2, &a));
}
static void op_close(int d) { u32 p = any_port(); arg(d, p); result(d, close(p)); }
static void op_send(int d) { u32 p = any_port(); arg(d, p); result(d, ev1(4, p)); }
static void op_unmask(int d) { u32 p = any_port(); arg(d, p); result(d, ev1(9, p)); }
static void op_status(int d)
{
    struct { u16 dom, pad; u32 port, status, vcpu; u64 u; } a;
    memset(&a, 0x5a, sizeof a);
    a.dom = any_domain(8);
    a.port = any_port();
    arg(d, a.dom); arg(d, a.port);
    result(d, EV(5, &a));
    arg(d, a.status); arg(d, a.vcpu); arg(d, a.u);
}
static void op_bind_vcpu(int d)
{
    u32 p = any_port(), v = any_vcpu();
    arg(d, p); arg(d, v);
    result(d, bind_vcpu(p, v));
}
static void op_priority(int d)
{
    struct { u32 port, prio; } a = { any_port(), rnd(8) ? rnd(16) : rnd(1u << 31) * 2 };
    arg(d, a.port); arg(d, a.prio);
    result(d, EV(13, &a));
}
static void op_mask(int d) { u32 p = any_port(); arg(d, p); change(p, MASKED, 1); }
static void op_clear_mask(int d) { u32 p = any_port(); arg(d, p); change(p, MASKED, 0); }
/* Unmasking as a kernel does it: in memory where it can, by the hypercall where an event came meanwhile. */
static void op_kernel_unmask(int d)
{
    u32 p = any_port();
    arg(d, p);
    if (fifo) {
        if (!has_word(p) || (array[p] & BUSY))
            return;
        change(p, MASKED, 0);
        if (array[p] & PENDING)
            result(d, ev1(9, p));
    } else if (p < 4096 && owner[p] == d) {
        change(p, MASKED, 0);
        if (is_pending(p) && !(vi[d]->pending_sel >> p / 64 & 1)) {
            vi[d]->pending_sel |= 1ul << p / 64;
            vi[d]->upcall_pending = 1;
            if (!vi[d]->upcall_mask)
                HC2(HC_xen_version, 0, 0);
        }
    } else
        result(d, ev1(9, p));
}
static void op_cli(int d) { vi[d]->upcall_mask = 1; }
static void op_sti(int d) { vi[d]->upcall_mask = 0; HC2(HC_xen_version, 0, 0); }
/* Takes events without an upcall, as a kernel that polls would. */
static void op_drain(int d)
{
    u32 limit = rnd(3) ? 100000 : rnd(4);
    u8 mask = vi[d]->upcall_mask;
    arg(d, limit);
    vi[d]->upcall_mask = 1;
    scan(d, limit, rnd(4));
    vi[d]->upcall_mask = mask;
    if (!mask)
        HC2(HC_xen_version, 0, 0);
}
/* Looks for all that partial scans and scribbles have left behind. */
static void op_recover(int d)
{
    if (!fifo)
        vi[d]->pending_sel = ~0ul;
    for (u32 q = 0; fifo && block[d] && q < 16; q++)
        if (block[d][2 + q])
            block[d][0] |= 1u << q;
    if (alone(d) && !rnd(3)) {         /* and takes apart queues that have come to pieces */
        word(d, "all");
        vi[d]->upcall_mask = 1;
        for (u32 v = 0; v < vcpus; v++)
            scan(v, 100000, 1);
        for (u32 p = 0; fifo && p < array_pages * 1024; p++)
            array[p] &= ~(LINKED | LINK | BUSY | PENDING);
        for (u32 w = 0; !fifo && w < 64; w++)
            SI->pending[w] = 0;
    }
    vi[d]->upcall_pending = 1;
    vi[d]->upcall_mask = 0;
    HC2(HC_xen_version, 0, 0);
}
/* Bits set and cleared that are the guest's to set, and some that aren't. */
static void op_scribble(int d)
{
    u32 p = any_port(), what = rnd(10);
    arg(d, what);
    if (what == 0)
        vi[d]->upcall_pending = rnd(3);
    else if (what == 1)
        vi[d]->pending_sel ^= 1ul << rnd(rnd(2) ? 2 : 64);
    else if (what == 2 && block[d])
        block[d][0] ^= 1u << rnd(16);
    else if (what < 6) {
        arg(d, p);
        change(p, PENDING, 0);
    } else if (what < 8) {
        arg(d, p);
        change(p, PENDING, 1);
    } else if (fifo && has_word(p) && !rnd(4)) {
        u32 bits = rnd(3) ? 1u << (27 + rnd(2)) : rnd(2) ? LINKED : rnd(top + 1);
        arg(d, p); arg(d, bits);
        array[p] ^= bits;
    }
    if (!vi[d]->upcall_mask)
        HC2(HC_xen_version, 0, 0);
}
static void op_init_control(int d)
{
    static const u16 offsets[] = { 0, 8, 4024, 4028, 4, 2048, 4032 };
    struct { u64 gfn; u32 offset, vcpu; u8 link_bits, pad[7]; } a = { 0, offsets[rnd(7)], any_vcpu(), 0x5a, { 0 } };
    u32 v = a.vcpu & 1, kind = rnd(8);
    if (!abi)
        return;
    a.gfn = kind == 0 ? ~0ul : kind == 1 ? MFN(si->pt_base) : kind == 2 ? 1 : MFN(control[v]);
    arg(d, a.vcpu); arg(d, a.offset); arg(d, kind);
    s64 rc = result(d, EV(11, &a));
    arg(d, a.link_bits);
    if (rc)
        return;
    fifo = 1;
    block[v] = control[v] + a.offset / 4;
}
static void op_expand(int d)
{
    u32 kind = rnd(8);
    u64 gfn = kind == 0 ? ~0ul : kind == 1 ? MFN(si->pt_base) : array_pages == ARRAY_PAGES ? 1ul << 40 : MFN((u64)array + array_pages * 4096);
    arg(d, kind);
    if (!fifo) {
        result(d, EV(12, &gfn));
        return;
    }
    array_pages++;                     /* the events of the new page may come before the hypercall is back */
    if (result(d, EV(12, &gfn)))
        array_pages--;
}
/* FIFO for all vCPUs, with one page of words. */
static s64 start_fifo(void)
{
    s64 rc = 0;
    u64 gfn = MFN(array);
    for (u32 v = 0; v < vcpus; v++) {
        struct { u64 gfn; u32 offset, vcpu; u8 link_bits, pad[7]; } a = { MFN(control[v]), v * 1024, v, 0, { 0 } };
        block[v] = control[v] + a.offset / 4;
        fifo = 1;
        rc |= EV(11, &a);
    }
    array_pages = 1;                   /* the events of the page may come before the hypercall is back */
    rc |= EV(12, &gfn);
    return rc;
}
static void op_reset(int d)
{
    u16 dom = any_domain(4);
    u32 op = rnd(8) ? 10 : 14, keep = rnd(2);
    if (rnd(abi == 1 ? 8 : 4))
        return;
    arg(d, op); arg(d, dom);
    s64 rc = result(d, EV(op, &dom));
    if (rc)
        return;
    memset(owner, 0, sizeof owner);
    timer_port[0] = timer_port[1] = 0;
    fifo = 0;
    array_pages = 0;
    block[0] = block[1] = 0;
    if (!keep) {
        memset(control, 0, sizeof control);
        memset((void *)array, 0, sizeof array);
    }
    if (abi == 1 ? rnd(8) : abi && rnd(2))
        result(d, start_fifo());
}
/* Many ports at once: buckets and event words beyond the first, and no port left. */
static void op_fill(int d)
{
    static const u16 sizes[] = { 5, 20, 70, 70, 300, 1100, 4200 };
    u32 want = sizes[rnd(4) ? rnd(3) : rnd(7)], n = 0;
    s64 rc = 0;
    struct { u32 vcpu, port; } a = { rnd(vcpus), 0 };
    arg(d, want); arg(d, a.vcpu);
    for (; n < want && !(rc = EV(7, &a)); n++) {
        owner[a.port & 0x1ffff] = a.vcpu;
        if (a.port > top)
            top = a.port;
    }
    result(d, rc); arg(d, n); arg(d, a.port);
}
static void op_thin(int d)
{
    u32 from = rnd(top + 1), to = rnd(4) ? top : from + rnd(100), closed = 0;
    arg(d, from); arg(d, to);
    for (u32 p = from; p <= to; p++)
        closed += !close(p);
    arg(d, closed);
    if (to >= top && from > 8)
        top = from - 1;
}
static void op_burst(int d)
{
    u32 from = rnd(top + 1), n = 2 + rnd(rnd(8) ? 8 : 200), good = 0;
    arg(d, from); arg(d, n);
    if (!alone(d))
        return;
    for (u32 i = 0; i < n; i++)
        good += !ev1(rnd(8) ? 4 : 9, from + i);
    arg(d, good);
}
static void op_multicall(int d)
{
    static struct { u64 op; s64 result; u64 args[6]; } calls[6], inner;
    static u32 ports[6];
    static struct { const u32 *ports; u32 nr; u64 timeout; } poll;
    u32 n = 1 + rnd(6);
    if (!alone(d))
        return;
    memset(calls, 0, sizeof calls);
    for (u32 i = 0; i < n; i++) {
        static const u8 ops[] = { 4, 4, 4, 9, 9, 3 };
        u32 k = rnd(16);
        ports[i] = any_port();
        calls[i].result = 77;
        if (k < 12) {
            calls[i].op = HC_event_channel_op; calls[i].args[0] = ops[k % 6]; calls[i].args[1] = (u64)&ports[i];
        } else if (k == 12) {
            calls[i].op = HC_sched_op; /* yield */
        } else if (k == 13) {
            poll.timeout = 1;
            calls[i].op = HC_sched_op; calls[i].args[0] = 3; calls[i].args[1] = (u64)&poll;
        } else if (k == 14) {
            calls[i].op = HC_multicall; calls[i].args[0] = (u64)&inner; calls[i].args[1] = rnd(2);
        } else if (rnd(2)) {
            calls[i].op = HC_set_timer_op; calls[i].args[0] = 1;
        } else
            calls[i].op = rnd(2) ? 1000 + rnd(1000) : HC_sched_op_compat; /* none; yield */
        arg(d, calls[i].op); arg(d, calls[i].args[0]); arg(d, k < 12 ? ports[i] : 0);
    }
    result(d, HC2(HC_multicall, calls, n));
    for (u32 i = 0; i < n; i++) {
        put(d, ' ');
        dec(d, calls[i].result);
        if (!calls[i].result && calls[i].op == HC_event_channel_op && calls[i].args[0] == 3)
            forget(ports[i]);
    }
}
static void op_compat(int d)
{
    struct { u32 cmd, u[6]; } a = { rnd(4) ? 4 : rnd(4) ? 9 : 10 + rnd(6), { any_port() } };
    arg(d, a.cmd); arg(d, a.u[0]);
    result(d, HC1(HC_event_channel_op_compat, &a));
}
static void op_bad_pointer(int d)
{
    void *where[] = { EFAULT_ADDR, XEN_ADDR, NONCANON, 0, (void *)-8ul };
    u32 op = rnd(20), k = rnd(5);
    arg(d, op); arg(d, k);
    result(d, EV(op, where[k]));
}
/* The operation is done, but its result can't be written. */
static void op_read_only(int d)
{
    static const u8 ops[] = { 0, 1, 5, 6, 7 };
    u32 *a = (u32 *)pages[0], op = ops[rnd(5)];
    set_rw(a);
    memset(a, 0, 32);
    a[0] = op == 1 ? 5 : op == 7 ? rnd(vcpus) : op == 6 ? DOMID_SELF << 16 | DOMID_SELF : DOMID_SELF;
    a[1] = op == 1 ? 0 : op == 6 || op == 7 ? 0 : any_port();
    set_ro(a);
    arg(d, op); arg(d, a[0]); arg(d, a[1]);
    result(d, EV(op, a));
}
static void op_unknown(int d)
{
    u32 op = rnd(2) ? 15 + rnd(20) : rnd(1u << 31) * 2;
    arg(d, op);
    result(d, EV(op, pages[1]));
}

/* ---- sleeping and time ---- */
static u32 poll_ports[140];
static struct { const u32 *ports; u32 nr; u64 timeout; } poll_arg;
static void poll_list(int d)
{
    static const u32 longer[] = { 5, 20, 128, 129, 140, 0xffffffff };
    poll_arg.ports = poll_ports;
    poll_arg.nr = rnd(12) ? rnd(5) : longer[rnd(6)];
    arg(d, poll_arg.nr);
    for (u32 i = 0; i < 140; i++)
        poll_ports[i] = 1 + rnd(top);
    for (u32 i = 0; i < 4 && i < poll_arg.nr; i++)
        arg(d, poll_ports[i] = any_port());
    if (!rnd(20)) {
        void *where[] = { EFAULT_ADDR, XEN_ADDR, NONCANON, 0 };
        u32 k = rnd(4);
        poll_arg.ports = where[k];
        word(d, "bad"); arg(d, k);
    }
}
/* A poll that ends by itself: an event is pending, or the time is past or near. */
static void op_poll(int d)
{
    u32 kind = rnd(8);
    u8 mask = vi[d]->upcall_mask;
    poll_list(d);
    arg(d, kind);
    poll_arg.timeout = kind < 3 ? 1 : kind == 3 ? 1ul << 63 | rnd(100) : now() + 1000 + rnd(40000);
    if (rnd(4))
        vi[d]->upcall_mask = 1;
    result(d, HC2(HC_sched_op, 3, &poll_arg));
    vi[d]->upcall_mask = mask;
    HC2(HC_xen_version, 0, 0);
}
/* Sleep with no end of its own; the other vCPU goes on, and an event (or an NMI) wakes this one. */
static void op_sleep(int d)
{
    u32 kind = rnd(4);
    arg(d, kind);
    if (vcpus == 1 || parked[!d]) { /* only where it can't come to that */
        if (vi[d]->upcall_pending && vi[d]->upcall_mask)
            result(d, HC2(HC_sched_op, 1, 0));
        return;
    }
    if (kind)
        poll_list(d);
    poll_arg.timeout = kind == 1 ? now() + NEVER : 0;
    nest = 0;
    parked[d] = 1;
    pass(d, kind ? vi[d]->upcall_mask : 0);
    s64 rc = kind ? HC2(HC_sched_op, 3, &poll_arg) : HC2(rnd(2) ? HC_sched_op : HC_sched_op_compat, 1, 0);
    word(d, "awake"); result(d, rc);
    parked[d] = 0;
}
static void op_nmi(int d)
{
    u32 v = rnd(vcpus);
    arg(d, v);
    result(d, vop(11, v, rnd(8) ? 0 : (void *)8));
}
static void op_runstate(int d)
{
    u32 v = any_vcpu();
    int s = runstate(v);
    arg(d, v);
    if (s == 0)                        /* whether it runs at this moment is time's */
        s = 1;
    result(d, s);
}
/* Waits for VIRQ_TIMER that is due about now; `n` is handled[d] when it was not. */
static void await_timer(int d, u32 n)
{
    u64 end = now() + 3000000000ul;
    while (!is_pending(timer_port[d]) && handled[d] == n)
        if (now() > end) {
            word(d, "never");
            return;
        }
}
static void op_timer(int d)
{
    struct { u64 when; u32 flags; } s = { 0, rnd(2) };
    u64 period = 1000000;
    u32 kind = rnd(12), n = handled[d], port = timer_port[d], other = any_vcpu();
    u8 mask = vi[d]->upcall_mask;
    arg(d, kind);
    switch (kind) {
    case 0: result(d, HC1(HC_set_timer_op, 1 + rnd(1000))); break;
    case 1: s.when = rnd(1000); result(d, vop(8, d, &s)); break;
    case 2: result(d, HC1(HC_set_timer_op, now() + (NEVER >> rnd(4)))); break;
    case 3: s.when = now() + NEVER; result(d, vop(8, d, &s)); break;
    case 4: result(d, HC1(HC_set_timer_op, 0)); break;
    case 5: result(d, vop(9, d, 0)); break;
    case 6: if (other != (u32)d) { arg(d, other); s.when = 1; result(d, vop(8 + rnd(2), other, &s)); } break;
    case 7: arg(d, other); result(d, vop(7, other, 0)); break;
    case 8: period = rnd(3) ? 1 + rnd(999999) : ~0ul >> rnd(3); arg(d, period >> 40); result(d, vop(6, other, &period));
            result(d, vop(7, other, 0)); break;
    case 9: case 10:                   /* a few microseconds from now, or a period of the shortest */
    case 11:
        if (!port || !(fifo ? has_word(port) && block[d] : port < 4096))
            return;
        change(port, PENDING, 0);
        if (kind == 11) {
            vi[d]->upcall_mask = 1;    /* it may come twice, and be seen but once */
            other = vop(6, d, &period);
            await_timer(d, n);
            result(d, (s32)other);
            result(d, vop(7, d, 0));
            vi[d]->upcall_mask = mask;
            HC2(HC_xen_version, 0, 0);
            break;
        }
        s.when = now() + 2000 + rnd(20000);
        other = kind == 9 ? HC1(HC_set_timer_op, s.when) : vop(8, d, &s);
        await_timer(d, n);
        result(d, (s32)other);         /* behind the upcall, which may come at any moment */
    }
}
static void op_vcpu_info(int d)
{
    struct { u64 mfn; u32 offset, pad; } a = { MFN(pages[2 + d]), rnd(8) * 64 + (rnd(4) ? 0 : rnd(64)), 0 };
    static int moved[2];
    u32 v = rnd(4) ? (u32)d : any_vcpu();
    if (rnd(40) && !moved[d])
        return;
    u8 mask = vi[d]->upcall_mask;
    arg(d, v); arg(d, a.offset);
    vi[d]->upcall_mask = 1;            /* an upcall is due as soon as it has moved */
    if (!result(d, vop(10, v, &a))) {
        moved[v] = 1;
        vi[v] = (void *)(pages[2 + v] + a.offset);
    }
    vi[d]->upcall_mask = mask;
    if (!mask)
        HC2(HC_xen_version, 0, 0);
}
static void op_nothing(int d) { (void)d; HC2(HC_xen_version, 0, 0); }

static const struct { u16 weight; const char *name; void (*run)(int d); } operations[] = {
    { 80, "alloc", op_alloc }, { 130, "interdomain", op_interdomain }, { 50, "virq", op_virq }, { 110, "ipi", op_ipi },
    { 4, "pirq", op_pirq }, { 80, "close", op_close }, { 620, "send", op_send }, { 150, "unmask", op_unmask },
    { 60, "status", op_status }, { 110, "bind_vcpu", op_bind_vcpu }, { 110, "priority", op_priority }, { 70, "mask", op_mask },
    { 30, "clear_mask", op_clear_mask }, { 100, "kernel_unmask", op_kernel_unmask }, { 50, "cli", op_cli }, { 120, "sti", op_sti },
    { 60, "drain", op_drain }, { 60, "recover", op_recover }, { 50, "scribble", op_scribble }, { 30, "init_control", op_init_control }, { 25, "expand", op_expand },
    { 12, "reset", op_reset }, { 6, "fill", op_fill }, { 8, "thin", op_thin }, { 40, "burst", op_burst }, { 60, "multicall", op_multicall },
    { 20, "compat", op_compat }, { 10, "bad_pointer", op_bad_pointer }, { 10, "read_only", op_read_only }, { 5, "unknown", op_unknown },
    { 60, "poll", op_poll }, { 90, "sleep", op_sleep }, { 20, "nmi", op_nmi }, { 10, "runstate", op_runstate }, { 70, "timer", op_timer },
    { 10, "vcpu_info", op_vcpu_info }, { 20, "nothing", op_nothing },
};
#define NR_OPERATIONS (sizeof operations / sizeof *operations)

/* ---- steps ---- */
static void step(int d)
{
    u32 total = 0, k, i = 0;
    for (u32 j = 0; j < NR_OPERATIONS; j++)
        total += operations[j].weight;
    for (k = rnd(total); k >= operations[i].weight; i++)
        k -= operations[i].weight;
    putn(d, step_nr++, 10);
    put(d, "ab"[d]);
    word(d, operations[i].name);
    nest = alone(d) ? 3 : 0;
    operations[i].run(d);
}
/* Waits until the other vCPU has seen what there is for it to see, and is asleep or back in its loop. */
static void settle(int d)
{
    if (alone(d))
        return;
    while (parked[!d] && !asleep(!d))
        yield();
    if (!parked[!d])
        for (u32 b = beat[!d]; beat[!d] - b < 2;)
            yield();
}
static void end_line(int d)
{
    settle(d);
    take_log(d);
    if (vcpus == 2 && logs[!d].len) {
        out[out_len++] = ' '; out[out_len++] = '|';
        take_log(!d);
    }
    if (asleep(!d))
        word(d, "z");
    word(d, "#");
    putn(d, state_hash(), 16);
    put(d, '\n');
    take_log(d);
    if (step_nr > dump_first && step_nr <= dump_last + 1) {
        emit();
        dump_state();
    }
}
static volatile int unfinished, finished;      /* a line is: its vCPU went to sleep and left that to the other */
static void act(int me)
{
    while (!finished) {
        if (driver != me) {
            yield();
            beat[me]++;
            continue;
        }
        if (unfinished) {
            unfinished = 0;
            settle(me);
            take_log(!me);
            end_line(me);
        }
        if (step_nr >= steps && !asleep(!me)) {
            finished = 1;
            break;
        }
        if (vcpus == 2 && asleep(!me)) {
            if (step_nr >= steps || !rnd(12)) { /* an NMI, for which there is no handler, wakes whatever sleeps */
                word(me, "wake"); arg(me, vop(11, !me, 0));
                end_line(me);
                continue;
            }
        } else if (vcpus == 2 && !rnd(6)) {
            pass(me, vi[me]->upcall_mask);
            continue;
        }
        unfinished = 1;
        step(me);
        if (driver == me) {
            unfinished = 0;
            end_line(me);
        }
    }
}

/* ---- the second vCPU ---- */
struct context {
    u8 fpu[512];
    u64 flags;
    u64 r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, error_vector, rip, cs, rflags, rsp, ss, es, ds, fs, gs;
    struct trap_info traps[256];
    u64 ldt_base, ldt_ents, gdt_frames[16], gdt_ents, kernel_ss, kernel_sp, ctrlreg[8], debugreg[8], event_callback, failsafe_callback,
        syscall_callback, vm_assist, fs_base, gs_base_kernel, gs_base_user;
};
static struct context context __attribute__((aligned(16)));
static u8 stack1[32768] __attribute__((aligned(4096)));

void __attribute__((used)) second(void)
{
    vop(7, 1, 0); /* stop_periodic_timer */
    act(1);
    vop(2, 1, 0); /* down */
}
static void start_second(void)
{
    u64 cr3;
    __asm__ volatile("mov %%cr3, %0" : "=r"(cr3));
    context.flags = 4;
    context.rip = (u64)second; context.cs = KCS; context.rflags = 0x202; context.rsp = (u64)stack1 + sizeof stack1 - 8; context.ss = KDS;
    context.kernel_ss = KDS; context.kernel_sp = (u64)stack1 + sizeof stack1;
    for (u32 v = 0; v < 32; v++)
        if (v != 2 && v != 15)
            context.traps[v] = (struct trap_info){ v, 0, KCS, (u64)trap_entries + v * 32 };
    context.ctrlreg[3] = cr3;
    context.event_callback = (u64)conf_entry1; context.failsafe_callback = (u64)failsafe_entry; context.syscall_callback = (u64)syscall_entry;
    rc("initialise", vop(0, 1, &context));
    rc("up", vop(1, 1, 0));
    while (beat[1] < 2)
        yield();
}

void test(void)
{
    s64 seed = num("seed", 1);
    steps = num("ops", 1000); abi = num("abi", 0); vcpus = num("vcpus", 1);
    say("evconf seed=%ld ops=%ld abi=%d vcpus=%u\n", seed, steps, abi, vcpus);
    dump_first = num("dump", 1l << 60);
    dump_last = num("last", dump_first);
    vi[0] = &SI->vcpu[0];
    vi[1] = &SI->vcpu[1];
    rng = (seed * 3 + abi) * 2 + vcpus;
    for (int i = 0; i < 4; i++)
        rng = rng * 6364136223846793005ul + 99991;
    upcall_rng[0] = rng ^ 0x5555;
    upcall_rng[1] = rng ^ 0xaaaa0000;
    top = 8;
    HC3(HC_set_callbacks, conf_entry0, failsafe_entry, syscall_entry);
    if (abi == 1)
        rc("init_control and expand_array", start_fifo());
    if (vcpus == 2)
        start_second();
    vi[0]->upcall_mask = 0;
    act(0);
    if (vcpus == 2)
        while (vop(3, 1, 0))           /* until it is down */
            yield();
    emit();
    say("upcalls %u %u handled %u %u\n", upcalls_of[0], upcalls_of[1], handled[0], handled[1]);
}
