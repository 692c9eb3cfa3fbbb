/*
 * Two of these on one host, `peer=` naming the other's domain id: with `give=1` one grants pages and waits for what
 * becomes of them, the other maps them. Not recorded: a real Xen boots only one domain by itself.
 */
#include "lib.h"

#define GT(op, arg, n) HC3(HC_grant_table_op, op, arg, n)
struct entry { u16 flags, domid; u32 frame; };
struct map_op { u64 addr; u32 flags, ref; u16 dom; short status; u32 handle; u64 bus; };
struct unmap_op { u64 addr, bus; u32 handle; short status; };
struct ptr { union { u32 ref; u64 mfn; } u; u16 domid, offset; };
struct copy_op { struct ptr src, dst; u16 len, flags; short status; };

static void yield(void) { flush(); HC2(HC_sched_op, 0, 0); }

static void give(u16 peer)
{
    u64 frames[1];
    volatile u8 *page = pages[0], *code = pages[1];
    volatile struct entry *gt = (void *)pages[8];
    struct { u16 dom; u32 nr; short status; u64 *list; } s = { DOMID_SELF, 1, 99, frames };
    GT(2, &s, 1);
    remap(pages[8], frames[0] << 12 | P | RW);
    page[0] = 1;
    code[0] = 0xb8; code[1] = 11; code[2] = code[3] = code[4] = 0; code[5] = 0xc3; /* mov $11, %eax; ret */
    say("code gives %d\n", ((int (*)(void))code)());
    gt[20] = (struct entry){ 1, peer, MFN(page) };
    gt[21] = (struct entry){ 1, peer, MFN(code) };
    gt[22] = (struct entry){ 5, peer, MFN(pages[2]) };
    say("granted\n");
    while (page[0] != 2)
        yield();
    say("the peer wrote %d flags %x\n", page[1], gt[20].flags);
    rc("pin what it maps", (set_ro(page), mmuext1(0, MFN(page), 0)));
    while (code[1] != 22)
        yield();
    say("code gives %d\n", ((int (*)(void))code)());
    page = 0;
    for (;;)
        yield();
}

static void take(u16 peer)
{
    volatile u8 *window = pages[1];
    struct map_op m = { (u64)window, 2, 20, peer, 99, 0, 0 };
    struct unmap_op u;
    struct copy_op c = { { { .mfn = 0 }, DOMID_SELF, 1 }, { { .ref = 21 }, peer, 1 }, 1, 2, 99 };
    while (m.status) {
        GT(0, &m, 1);
        yield();
    }
    say("mapped: reads %d\n", window[0]);
    rc("map it by hand", remap(pages[3], m.bus | P));
    window[1] = 33; window[0] = 2;
    pages[2][1] = 22; c.src.u.mfn = MFN(pages[2]);
    rc("copy", GT(5, &c, 1)); say("  status %d\n", c.status);
    say("go on\n");
    for (;;) { /* until the peer is gone */
        struct map_op r = { (u64)pages[3], 2 | 4, 22, peer, 99, 0, 0 };
        GT(0, &r, 1);
        if (r.status)
            break;
        u = (struct unmap_op){ (u64)pages[3], 0, r.handle, 99 };
        GT(1, &u, 1);
        yield();
    }
    u = (struct unmap_op){ (u64)window, 0, m.handle, 99 };
    say("still there: %d %d\n", window[0], window[1]);
    rc("unmap", GT(1, &u, 1)); say("  status %d\n", u.status);
    TRY("cmpb $0, (%0)", , R("r"(window))); show("read");
    GT(0, &m, 1); say("map: status %d\n", m.status);
}

void test(void)
{
    if (num("give", 0))
        give(num("peer", 0));
    else
        take(num("peer", 0));
}
