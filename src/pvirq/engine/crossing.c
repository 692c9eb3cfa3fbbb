/* What a PV guest does most, without Python: crossings between its kernel and its user mode, the hypercalls of a context
 * switch, and the exchange of two vCPUs on one engine.
 *
 * Each function here does what Python does as well (pvirq.pv.vcpu, pvirq.engine.unicorn), in the ordinary case only.
 * It looks first, and changes nothing before it knows that the case is ordinary: else it leaves all of it to Python. An
 * event that is due, an NMI, a frame on two pages, segments that aren't flat: none of these is ordinary.
 *
 * `make crossing` compiles it to crossing.bin, which runs wherever it is put in memory: no data, no library, nothing
 * outside but by the pointers in struct cpu. crossing.py and protocol.py have names for the fields of both structs.
 */
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

/* struct CPUX86State and struct segment_cache; see unicorn_state.py, which has tried each offset. */
enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 };
enum { EIP = 128, EFLAGS = 136, CC_DST = 144, CC_SRC = 152, CC_SRC2 = 160, CC_OP = 168, DF = 172, HFLAGS = 176 };
enum { SEGMENTS = 184, SEGMENT = 24, BASE = 8, LIMIT = 16, KIND = 20, ES = 0, CS, SS, DS, FS, GS };
enum { CS_SELECTOR = 208, SS_SELECTOR = 232, SS_FLAGS = 252, FS_BASE = 288, GS_BASE = 312, CR2 = 440, CR3 = 448 };
enum { STATE = 5608 };

/* The TLB in front of it: two of its parts for each MMU index. */
enum { TLB_DESCRIPTOR = 696, TLB_WINDOW = 16, TLB_FAST = 16, TLB_INDEXES = 3, ASIDE = 0, USED = 1 };
enum { JUMPS = 32768 }; /* bytes of a CPU's cache of jump targets */
enum { PAGES = 32 };

enum { HF_MODE = 0x8070, HF_LONG_MODE = 0x8030 };
#define HF_OTHER_SPACE (1u << 26)
enum { CC_OP_EFLAGS = 1, FLAT_FLAGS = 0xC0F300 };
#define SEGMENT_P (1ull << 47)
#define SEGMENT_S (1ull << 44)
#define CODE_L (1ull << 53)
enum { SEGMENT_KIND = 0xF0FF00, GRANULAR = 1 << 23 };
#define ARITHMETIC 0x8D5ull
#define FLAG_TF (1ull << 8)
#define FLAG_IF (1ull << 9)
#define FLAG_DF (1ull << 10)
#define FLAG_IOPL (3ull << 12)
#define FLAG_NT (1ull << 14)
#define FLAG_RF (1ull << 16)
#define FLAG_VM (1ull << 17)
#define FLAG_AC (1ull << 18)
#define STORED (0xFFFFFFFFull & ~(ARITHMETIC | FLAG_DF))
#define CLEARED_ON_TRAP (FLAG_AC | FLAG_VM | FLAG_RF | FLAG_NT | FLAG_TF)

enum { FLAT_CS32 = 0xE023, FLAT_CS64 = 0xE033, FLAT_SS = 0xE02B, VGCF_in_syscall = 1 << 8 };
enum { STACK_SWITCH = 3, IRET = 23, SET_SEGMENT_BASE = 25 };
enum { SEGBASE_FS, SEGBASE_GS_USER, SEGBASE_GS_KERNEL };
enum { SHORT = 1, NOTED = 2 };
#define XEN_START 0xFFFF800000000000ull
#define XEN_END 0xFFFF880000000000ull
#define LOWER_END (1ull << 47)
enum { PRESENT = 1, RW = 2, PAGE_FAULT = 14, SYSCALL_LENGTH = 2 };
#define ADDRESS 0xFFFFFFFFFF000ull

struct vcpu {
    u64 user_mode;
    u64 kernel_root, user_root; /* frames */
    u64 walk_root;              /* of the two, the one in use, as an index of 64-bit items */
    u64 other_gs;               /* of the mode that isn't running */
    u64 kernel_sp, kernel_ss;
    u64 syscall_entry, syscall_masks;
    u64 info;                   /* where struct vcpu_info is */
    u64 nmi_pending, nmi_masked;
    u64 iopl, architectural_iopl;
    u64 gdt;                    /* where the entries of the page table are that maps its GDT, of 16 pages */
    u64 hypercalls;             /* SHORT: there may be short cuts past them; NOTED: see notes.c */
    u64 fault_entry, fault_masks; /* of the trap table */
    u64 runstate_area;          /* where the guest wants the rest of this line: struct vcpu_runstate_info */
    u64 runstate, since, times[4];
    /* While another has its turn: */
    u64 there;                  /* it has had one before */
    u64 cr3_aside, code_seen;
    u64 flushes, pages, code;   /* what they were then: see fresh() */
    u64 spare[9];
    u64 tlb[2][(TLB_DESCRIPTOR + TLB_FAST) / 8];
    u64 state[STATE / 8];
    u64 jumps[JUMPS / 8];
};

struct cpu {
    struct vcpu *vcpu;          /* whose turn it is; 0: leave all to Python */
    u8 *env, *object, *memory;
    u64 memory_bytes;
    void (*on_syscall)(void *uc, void *data);
    void (*on_interrupt)(void *uc, u32 vector, void *data);
    u64 (*compute_flags)(u64 dst, u64 src, u64 src2, int op);
    void (*update_cr3)(void *env, u64 value);
    void (*flush)(void *object);
    void (*flush_page)(void *object, u64 va);
    u8 *descriptors, *fast;     /* of the TLB's indexes */
    u16 *dirty;
    u64 *jumps;
    u64 *code;                  /* where the next translation goes */
    u32 *error_code, *is_int, *old_exception;
    u64 *tsc_offset;
    u64 cr3_aside, code_seen;   /* whose translations the TLB set aside holds, and how much code there was then */
    u64 code_before;            /* see note_code */
    u64 flushes;                /* of the TLB as a whole */
    u64 pages;                  /* flushes of one page; the last of them: */
    u64 page[PAGES];
    u64 done;                   /* what Python had nothing to do with */
    u64 failures;               /* exceptions of Python's */
    struct calls *calls;        /* what is noted of its guest: see notes.c; 0: nothing */
};

#define E64(at) (*(u64 *)(env + (at)))
#define E32(at) (*(u32 *)(env + (at)))
#define REG(n) E64((n) * 8)

static inline void timeless(struct cpu *c)
{
    for (int i = 0; i < TLB_INDEXES; i++)
        *(u64 *)(c->descriptors + i * TLB_DESCRIPTOR + TLB_WINDOW) = 1ull << 62;
}

/* When there is no more room for translations all are dropped, which is as good as a flush. */
static inline void note_code(struct cpu *c)
{
    u64 code = *c->code;
    c->flushes += code < c->code_before;
    c->code_before = code;
}

static inline u64 canonical(u64 va)
{
    return va < LOWER_END || va >= -LOWER_END;
}

/* GuestMemory.translate, and the host's address of it. */
static u8 *translate(struct cpu *c, u64 root, u64 va, u64 wanted, u64 size)
{
    u64 entry = root << 12, flags = wanted | PRESENT;

    if ((va & 0xFFF) + size > 0x1000 || (va >= LOWER_END && va < XEN_END))
        return NULL;
    for (int shift = 39; shift >= 12; shift -= 9) {
        u64 at = (entry & ADDRESS) + (va >> shift & 511) * 8;
        if (at >= c->memory_bytes)
            return NULL;
        entry = *(u64 *)(c->memory + at);
        flags &= entry;
        if (!(entry & PRESENT))
            return NULL;
    }
    if (flags != (wanted | PRESENT) || (entry & ADDRESS) >= c->memory_bytes)
        return NULL;
    return c->memory + ((entry & ADDRESS) | (va & 0xFFF));
}

#include "notes.c"

static u64 flags(struct cpu *c)
{
    u8 *env = c->env;
    u32 op = E32(CC_OP);
    u64 arithmetic = op == CC_OP_EFLAGS ? E64(CC_SRC) : c->compute_flags(E64(CC_DST), E64(CC_SRC), E64(CC_SRC2), op);
    return (E64(EFLAGS) & STORED) | (arithmetic & ARITHMETIC) | (E32(DF) & FLAG_DF);
}

static void set_flags(u8 *env, u64 value)
{
    E64(CC_SRC) = value & ARITHMETIC;
    E32(CC_OP) = CC_OP_EFLAGS;
    E32(DF) = value & FLAG_DF ? -1u : 1;
    E64(EFLAGS) = (value & STORED) | 2;
}

/* 64-bit code is running with a stack segment of this kind: of others of the same only the selectors differ
 * (UnicornEngine.set_code_stack).
 */
static int is_loaded(u8 *env, u32 stack_flags)
{
    return (E32(HFLAGS) & HF_MODE) == HF_LONG_MODE && (E32(SS_FLAGS) & SEGMENT_KIND) == stack_flags;
}

/* descriptors.descriptor_of, for the GDT; 0 where there is none. */
static u64 descriptor_of(struct cpu *c, struct vcpu *v, u64 selector)
{
    u64 entry, at;

    if (selector & 4)
        return 0;
    entry = *(u64 *)(c->memory + v->gdt + (selector >> 12) * 8);
    at = (entry & ADDRESS) + (selector & 0xFF8);
    return entry & PRESENT && at < c->memory_bytes ? *(u64 *)(c->memory + at) : 0;
}

/* descriptors.load_code_stack, as far as selectors are all that changes. */
static int may_load(struct cpu *c, struct vcpu *v, u64 cs, u64 ss)
{
    u64 code = descriptor_of(c, v, cs), stack = descriptor_of(c, v, ss);

    return code & SEGMENT_P && (code >> 40 & 0x18) == 0x18 && code & CODE_L &&
           stack & SEGMENT_P && (stack >> 40 & 0x1A) == 0x12 && is_loaded(c->env, stack >> 32 & SEGMENT_KIND);
}

static void swap(u8 *a, u8 *b, unsigned size)
{
    u64 *left = (u64 *)a, *right = (u64 *)b;
    for (unsigned i = 0; i < size / 8; i++) {
        u64 item = left[i];
        left[i] = right[i];
        right[i] = item;
    }
}

static void copy(void *to, const void *from, unsigned size)
{
    u64 count = size / 8;
    __asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
}

/* UnicornEngine.switch_space */
static void switch_space(struct cpu *c, u64 value, u64 other)
{
    u8 *env = c->env;
    u64 old = E64(CR3), code = *c->code;

    swap(c->descriptors + ASIDE * TLB_DESCRIPTOR, c->descriptors + USED * TLB_DESCRIPTOR, TLB_DESCRIPTOR);
    swap(c->fast + ASIDE * TLB_FAST, c->fast + USED * TLB_FAST, TLB_FAST);
    *c->dirty |= 3;
    E32(HFLAGS) = (E32(HFLAGS) & ~HF_OTHER_SPACE) | (other ? HF_OTHER_SPACE : 0);
    if (c->cr3_aside == value && c->code_seen == code) {
        E64(CR3) = value;
    } else {
        timeless(c);
        c->update_cr3(env, value);
        c->flushes++;
    }
    c->cr3_aside = old;
    c->code_seen = code;
}

/* PvVcpu.toggle_mode */
static void toggle(struct cpu *c, struct vcpu *v)
{
    u8 *env = c->env;
    u64 root = v->user_mode ? v->kernel_root : v->user_root, gs = E64(GS_BASE);

    v->user_mode = !v->user_mode;
    E64(GS_BASE) = v->other_gs;
    v->other_gs = gs;
    v->walk_root = root << 9;
    switch_space(c, root << 12, v->user_mode);
}

/* PvVcpu._bounce_from, and 1; 0 where that isn't ordinary. `error`: NULL for an entry without an error code. */
static int bounce(struct cpu *c, struct vcpu *v, u64 cs, u64 ss, u64 target, u64 masks, u64 rip, u64 rflags, u64 *error,
                  u64 rcx, u64 r11)
{
    u8 *env = c->env, *info = c->memory + v->info;
    u64 old_sp = REG(RSP), sp = v->user_mode ? v->kernel_sp : old_sp, pushed = rflags & ~(FLAG_IF | FLAG_IOPL);
    u8 mask = info[1];
    u64 *frame;

    sp &= ~15ull;
    if (!target || !is_loaded(env, FLAT_FLAGS) || (info[0] && !mask && !masks) || (sp > XEN_START && sp < XEN_END + 64))
        return 0;
    sp -= error ? 64 : 56;
    frame = (u64 *)translate(c, v->kernel_root, sp, RW, error ? 64 : 56);
    if (!frame)
        return 0;
    if (v->user_mode)
        toggle(c, v);
    else
        cs &= 0xFFFC;
    if (masks)
        info[1] = mask | 1;
    if (!mask)
        pushed |= FLAG_IF;
    if (v->architectural_iopl)
        pushed |= v->iopl;
    *frame++ = rcx;
    *frame++ = r11;
    if (error)
        *frame++ = *error;
    *frame++ = rip;
    *frame++ = cs | (u64)mask << 32;
    *frame++ = pushed;
    *frame++ = old_sp;
    *frame = ss;
    REG(RSP) = sp;
    E32(CS_SELECTOR) = FLAT_CS64;
    E32(SS_SELECTOR) = FLAT_SS;
    set_flags(env, (rflags & ~CLEARED_ON_TRAP) | FLAG_IF);
    return 1;
}

/* PvVcpu._user_syscall */
static int user_syscall(struct cpu *c, struct vcpu *v)
{
    u8 *env = c->env;
    u64 rip = E64(EIP) + SYSCALL_LENGTH, rflags = flags(c);

    if ((u16)E32(CS_SELECTOR) == FLAT_CS32 ||
        !bounce(c, v, FLAT_CS64, FLAT_SS, v->syscall_entry, v->syscall_masks, rip, rflags, NULL, rip, rflags))
        return 0;
    REG(RCX) = rip;
    REG(R11) = rflags;
    E64(EIP) = v->syscall_entry - SYSCALL_LENGTH;
    return 1;
}

/* PvVcpu._iret */
static int iret(struct cpu *c, struct vcpu *v)
{
    u8 *env = c->env, *info = c->memory + v->info;
    struct { u64 rax, r11, rcx, flags, rip, cs, rflags, rsp, ss; } *frame;
    u64 cs, ss, rip, rflags;
    int in_syscall;

    frame = (void *)translate(c, v->kernel_root, REG(RSP), 0, sizeof *frame);
    if (!frame || v->nmi_pending || v->nmi_masked)
        return 0;
    in_syscall = !!(frame->flags & VGCF_in_syscall);
    rip = frame->rip;
    cs = (frame->cs & 0xFFFF) | 3;
    ss = (frame->ss & 0xFFFF) | 3;
    if (in_syscall && canonical(rip) && cs != FLAT_CS32) {
        cs = FLAT_CS64;
        ss = FLAT_SS;
    }
    if (!may_load(c, v, cs, ss) || (frame->rflags & FLAG_TF) || (info[0] && frame->rflags & FLAG_IF))
        return 0;
    rflags = (frame->rflags & ~(FLAG_IOPL | FLAG_VM) & 0xFFFFFFFF) | FLAG_IF;
    if ((frame->cs & 3) == 3) {
        if (!v->user_root)
            return 0;
        toggle(c, v);
    }
    if (v->architectural_iopl)
        v->iopl = frame->rflags & FLAG_IOPL;
    info[1] = !(frame->rflags & FLAG_IF);
    REG(RAX) = frame->rax;
    REG(RCX) = in_syscall ? rip : frame->rcx;
    REG(R11) = in_syscall ? rflags : frame->r11;
    REG(RSP) = frame->rsp;
    E32(CS_SELECTOR) = cs;
    E32(SS_SELECTOR) = ss;
    set_flags(env, rflags);
    E64(EIP) = rip - SYSCALL_LENGTH;
    return 1;
}

/* PvVcpu.syscall for stack_switch and set_segment_base (pvirq.pv.hypercalls.state). */
static int hypercall(struct cpu *c, struct vcpu *v, u64 number)
{
    u8 *env = c->env, *info = c->memory + v->info;
    u64 first = REG(RDI), second = REG(RSI);

    if (!(v->hypercalls & SHORT) || (u16)E32(CS_SELECTOR) != FLAT_CS64 || (info[0] && !info[1]))
        return 0;
    if (number == SET_SEGMENT_BASE && (!canonical(second) || (u32)first > SEGBASE_GS_KERNEL))
        return 0;
    if (v->hypercalls & NOTED) {
        struct note *n = note_hypercall(c, v, number);
        if (!n)
            return 0;
        n->hypercall |= FINISHED;
    }
    if (number == STACK_SWITCH) {
        v->kernel_ss = first | 3;
        v->kernel_sp = second;
    } else if ((u32)first == SEGBASE_FS) {
        E64(FS_BASE) = second;
    } else if ((u32)first == SEGBASE_GS_USER) {
        v->other_gs = second;
    } else {
        E64(GS_BASE) = second;
    }
    REG(RAX) = 0;
    REG(RCX) = E64(EIP) + SYSCALL_LENGTH;
    REG(R11) = (E64(EFLAGS) & STORED) | (E32(DF) & FLAG_DF);
    return 1;
}

/* A hypercall that is noted, and what it came to: nothing, if the guest has crashed, or it is to be made again. */
static void noted_syscall(void *uc, struct cpu *c, struct vcpu *v)
{
    u8 *env = c->env;
    struct note *n = note_hypercall(c, v, REG(RAX));
    struct book *b = n ? c->calls->book : NULL;
    u64 taken = n ? b->taken : 0, failures = c->failures, rip = E64(EIP) + SYSCALL_LENGTH;

    c->on_syscall(uc, NULL);
    if (n && c->calls->book == b && b->taken == taken && c->failures == failures && REG(RCX) == rip) {
        n->result = REG(RAX);
        n->hypercall |= FINISHED;
    }
}

/* Unicorn's hook of SYSCALL. RIP is at the instruction, whose length is added to it afterwards. */
void on_syscall(void *uc, struct cpu *c)
{
    struct vcpu *v = c->vcpu;
    u8 *env = c->env;
    int done = 0;

    note_code(c);
    if (v) {
        u64 number = REG(RAX);
        if (v->user_mode)
            done = user_syscall(c, v);
        else if (number == IRET)
            done = iret(c, v);
        else if (number == STACK_SWITCH || number == SET_SEGMENT_BASE)
            done = hypercall(c, v, number);
    }
    if (done)
        c->done++;
    else if (v && !v->user_mode && v->hypercalls & NOTED && REG(RAX) != IRET)
        noted_syscall(uc, c, v);
    else
        c->on_syscall(uc, NULL);
}

/* Unicorn's hook of exceptions. Ordinary is a page fault of the guest's own, for want of a page in its lower half. */
void on_interrupt(void *uc, u32 vector, struct cpu *c)
{
    struct vcpu *v = c->vcpu;
    u8 *env = c->env;

    note_code(c);
    if (v && vector == PAGE_FAULT && !*c->is_int && E64(CR2) < LOWER_END && (v->user_mode || !(*c->error_code & PRESENT))) {
        u64 error = (*c->error_code & ~4u) | (v->user_mode ? 4 : 0);
        if (bounce(c, v, (u16)E32(CS_SELECTOR), (u16)E32(SS_SELECTOR), v->fault_entry, v->fault_masks, E64(EIP), flags(c),
                   &error, REG(RCX), REG(R11))) {
            *(u64 *)(c->memory + v->info + 16) = E64(CR2);
            *c->old_exception = -1u;
            E64(EIP) = v->fault_entry;
            c->done++;
            return;
        }
    }
    c->on_interrupt(uc, vector, NULL);
}

/* What this vCPU's TLB and jumps were at the end of its turn, they still are, but for few pages. With new code, stores
 * to its page must be noticed that weren't.
 */
static int fresh(struct cpu *c, struct vcpu *v)
{
    return v->there && v->flushes == c->flushes && v->code == *c->code && c->pages - v->pages <= PAGES;
}

/* Another vCPU's turn: UnicornEngine.exchange. In `to` there is what it was, or with what it begins. */
void exchange(struct cpu *c, struct vcpu *from, struct vcpu *to)
{
    u8 *env = c->env;
    u64 offset = *c->tsc_offset;

    note_code(c);
    copy(from->state, env, STATE);
    copy(env, to->state, STATE);
    *c->tsc_offset = offset;
    for (int i = 0; i < 2; i++) {
        copy(from->tlb[i], c->descriptors + i * TLB_DESCRIPTOR, TLB_DESCRIPTOR);
        copy(&from->tlb[i][TLB_DESCRIPTOR / 8], c->fast + i * TLB_FAST, TLB_FAST);
        copy(c->descriptors + i * TLB_DESCRIPTOR, to->tlb[i], TLB_DESCRIPTOR);
        copy(c->fast + i * TLB_FAST, &to->tlb[i][TLB_DESCRIPTOR / 8], TLB_FAST);
    }
    *c->dirty |= 3;
    copy(from->jumps, c->jumps, JUMPS);
    from->there = 1;
    from->cr3_aside = c->cr3_aside;
    from->code_seen = c->code_seen;
    from->flushes = c->flushes;
    from->pages = c->pages;
    from->code = *c->code;
    c->cr3_aside = to->cr3_aside;
    if (fresh(c, to)) {
        c->code_seen = to->code_seen;
        copy(c->jumps, to->jumps, JUMPS);
        for (u64 i = to->pages; i < c->pages; i++)
            c->flush_page(c->object, c->page[i % PAGES]);
    } else {
        c->code_seen = *c->code; /* nothing is set aside */
        timeless(c);
        c->flush(c->object);
    }
}

/* PvVcpu.reload_segments, and 1; 0 where one of them isn't ordinary. */
int reload(struct cpu *c, struct vcpu *v)
{
    const u8 segments[] = { ES, DS, FS, GS };
    u64 descriptors[sizeof segments];
    u8 *env = c->env;

    for (unsigned i = 0; i < sizeof segments; i++) {
        u16 selector = E32(SEGMENTS + segments[i] * SEGMENT);
        descriptors[i] = selector > 3 ? descriptor_of(c, v, selector) : 0;
        if (selector > 3 && (~descriptors[i] & (SEGMENT_P | SEGMENT_S)))
            return 0;
    }
    for (unsigned i = 0; i < sizeof segments; i++) {
        u64 at = SEGMENTS + segments[i] * SEGMENT, low = (u32)descriptors[i], high = descriptors[i] >> 32;
        u32 limit = (low & 0xFFFF) | (high & 0xF0000);
        if (!descriptors[i])
            continue;
        if (segments[i] != FS && segments[i] != GS)
            E64(at + BASE) = low >> 16 | (high & 0xFF) << 16 | (high & 0xFF000000);
        E32(at + LIMIT) = high & GRANULAR ? limit << 12 | 0xFFF : limit;
        E32(at + KIND) = high & SEGMENT_KIND;
    }
    return 1;
}

/* PvGuest._change_runstate, and 1; 0 where the guest's area is to be written, and can't be in one go. */
int change_runstate(struct cpu *c, struct vcpu *v, u64 state, u64 now, int write)
{
    u8 *area;

    v->times[v->runstate] += now - v->since;
    v->runstate = state;
    v->since = now + !now; /* never 0, as Xen has always been up for a while */
    if (!write || !v->runstate_area)
        return 1;
    area = translate(c, v->kernel_root, v->runstate_area, RW, 48);
    if (area)
        copy(area, &v->runstate, 48);
    return !!area;
}

/* The event callback of PvVcpu.deliver_events, and 1; 0 where that isn't ordinary. */
int upcall(struct cpu *c, struct vcpu *v, u64 target, u64 rip)
{
    u8 *env = c->env;

    if (!bounce(c, v, (u16)E32(CS_SELECTOR), (u16)E32(SS_SELECTOR), target, 1, rip, flags(c), NULL, REG(RCX), REG(R11)))
        return 0;
    note_upcall(c, v);
    return 1;
}
