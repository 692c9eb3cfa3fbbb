/* What is noted of a guest without Python (notes.py): calls of functions that are watched, the returns from them, and
 * hypercalls that crossing.c does by itself. Part of crossing.c.
 *
 * Python sees each call once, says what is to be noted of it, and isn't asked again while the call is the same: by the
 * same vCPU, with the same arguments, and with the same bytes where the first of them points to. Otherwise, and whenever
 * something isn't as it should be, nothing is done here but asking it.
 */
enum { CLOCK = 6808, COUNT = 6800, TICK_SHIFT = 3 };
enum { MOST_OPEN = 8, MOST_RETURNS = 64, MOST_KNOWN = 1024, NEAR = 8, SEEN = 256, OPERATIONS = 16 };
enum { EVENT_CHANNEL_OP = 32, MOST_READ = 4 * 8 };
#define FINISHED (1ull << 32)
#define READ (1ull << 33)

struct note {
    u64 events, values;         /* how long both lists were: see struct book */
    u64 number;                 /* what it is; Python knows */
    u64 ticks;                  /* the guest's TSC */
    /* Of a hypercall: */
    u64 hypercall;              /* its number; FINISHED: there is a result; READ: from `first[2]` on stands what the
                                   struct of an event channel operation had in it */
    u64 first[6], result;       /* its arguments */
};

struct book {
    u64 used, room;
    u64 taken;                  /* changes when what stands here is taken away */
    const u64 *events, *values; /* where Python has the lengths of two lists, so that what it puts there itself and what
                                   stands here can be brought into one order */
    struct note note[];
};

/* One function, or one place to which calls return. */
struct site {
    struct cpu *cpu;
    void (*ask)(void *uc, u64 va, u32 size, void *data);
    u64 first, second;          /* which bits of two arguments say what a call is */
    u64 size;                   /* how many bytes at the first must be as they were */
    u64 returns;                /* the return from it is noted too */
};

struct known {
    struct site *site;
    struct vcpu *vcpu;
    u64 first, second;
    u64 generation;
    u64 enter, leave;           /* numbers, and one more; 0: nothing to note */
    u8 seen[SEEN];
};

struct side {
    struct vcpu *vcpu;
    u64 hypercalls, upcalls;    /* as above */
    u64 depth;
    struct { u64 sp, leave; } open[MOST_OPEN];
};

struct calls {
    struct book *book;          /* 0: nothing is noted */
    void (*full)(void);         /* takes away what is in it */
    const u64 *generation;      /* what is known is good for as long as this is the same */
    u64 asked;                  /* calls whose return Python waits for */
    u64 sides;
    struct side *side;
    u64 hypercalls;             /* how many there are */
    u64 sizes[OPERATIONS];      /* of the structs of event channel operations; 0: of no interest */
    u64 returns, back[MOST_RETURNS]; /* addresses to which calls return, and are seen to */
    struct known known[MOST_KNOWN];
};

static struct note *note(struct cpu *c, u64 number)
{
    struct book *b = c->calls->book;
    u8 *env = c->env;
    struct note *n;

    if (b->used >= b->room)
        c->calls->full();
    if (b->used >= b->room)
        return NULL;
    n = b->note + b->used++;
    n->events = *b->events;
    n->values = *b->values;
    n->number = number - 1;
    n->ticks = ((E64(CLOCK) - E64(COUNT)) << TICK_SHIFT) + *c->tsc_offset;
    return n;
}

static struct side *side_of(struct calls *calls, struct vcpu *v)
{
    for (u64 i = 0; i < calls->sides; i++)
        if (calls->side[i].vcpu == v)
            return calls->side + i;
    return NULL;
}

/* Are those bytes at a guest's address? Or, to `keep` them, are there any? */
static int seen(struct cpu *c, struct vcpu *v, u64 va, u64 size, u8 *bytes, int keep)
{
    while (size) {
        u64 part = 0x1000 - (va & 0xFFF);
        u8 *at;
        part = part < size ? part : size;
        at = translate(c, v->walk_root >> 9, va, 0, part);
        if (!at)
            return 0;
        for (u64 i = 0; i < part; i++) {
            if (keep)
                bytes[i] = at[i];
            else if (bytes[i] != at[i])
                return 0;
        }
        va += part;
        bytes += part;
        size -= part;
    }
    return 1;
}

/* One that is about to be made. */
static struct note *note_hypercall(struct cpu *c, struct vcpu *v, u64 number)
{
    static const u8 argument[] = { RDI, RSI, RDX, R10, R8, R9 };
    struct side *side = c->calls && c->calls->book ? side_of(c->calls, v) : NULL;
    struct note *n;
    u8 *env = c->env;
    u64 size;

    if (!side || !side->hypercalls || number >= c->calls->hypercalls)
        return NULL;
    n = note(c, side->hypercalls);
    if (!n)
        return NULL;
    n->hypercall = number;
    for (unsigned i = 0; i < sizeof argument; i++)
        n->first[i] = REG(argument[i]);
    if (number == EVENT_CHANNEL_OP && (u32)REG(RDI) < OPERATIONS) {
        size = c->calls->sizes[(u32)REG(RDI)];
        if (size && size <= MOST_READ && seen(c, v, REG(RSI), size, (u8 *)&n->first[2], 1))
            n->hypercall |= READ;
    }
    n->result = 0;
    return n;
}

static void note_upcall(struct cpu *c, struct vcpu *v)
{
    struct side *side = c->calls && c->calls->book ? side_of(c->calls, v) : NULL;

    if (side && side->upcalls)
        note(c, side->upcalls);
}

/* The first of a few places where a call may be kept. */
static struct known *place(struct site *s, struct vcpu *v, u64 first, u64 second)
{
    u64 hash = (first ^ second << 32 ^ (u64)v >> 4 ^ (u64)s << 20) * 0x9E3779B97F4A7C15ull >> 40;
    return s->cpu->calls->known + hash % (MOST_KNOWN - NEAR);
}

static int is_call(struct known *k, struct site *s, struct vcpu *v, u64 first, u64 second)
{
    return k->site == s && k->vcpu == v && k->first == first && k->second == second;
}

static int noted_call(struct cpu *c, struct site *s)
{
    struct calls *calls = c->calls;
    struct vcpu *v = c->vcpu;
    u8 *env = c->env;
    u64 first = REG(RDI) & s->first, second = REG(RSI) & s->second, back = 0, i;
    struct side *side = NULL;
    struct known *k, *end;

    if (!v || !calls->book)
        return 0;
    k = place(s, v, first, second);
    for (end = k + NEAR; k < end && !is_call(k, s, v, first, second); k++)
        ;
    if (k == end || k->generation != *calls->generation || !seen(c, v, REG(RDI), s->size, k->seen, 0))
        return 0;
    if (s->returns) {
        u64 *stack = (u64 *)translate(c, v->walk_root >> 9, REG(RSP), 0, 8);
        side = side_of(calls, v);
        if (!stack || !side)
            return 0;
        back = *stack;
        for (i = 0; i < calls->returns && calls->back[i] != back; i++)
            ;
        if (i == calls->returns)
            return 0;
    }
    if (k->enter && !note(c, k->enter))
        return 0;
    if (s->returns) {
        if (side->depth == MOST_OPEN)
            side->depth = 0;
        side->open[side->depth].sp = REG(RSP) + 8;
        side->open[side->depth++].leave = k->leave;
    }
    return 1;
}

/* Unicorn's hook of a function's first instruction. */
void on_call(void *uc, u64 va, u32 size, struct site *s)
{
    if (!noted_call(s->cpu, s))
        s->ask(uc, va, size, NULL);
}

/* Of an instruction to which calls return. Others come that way too; who returns has the stack that its caller had. */
void on_return(void *uc, u64 va, u32 size, struct site *s)
{
    struct cpu *c = s->cpu;
    struct calls *calls = c->calls;
    struct side *side = c->vcpu ? side_of(calls, c->vcpu) : NULL;
    u8 *env = c->env;

    if (side && calls->book && side->depth && side->open[side->depth - 1].sp == REG(RSP)) {
        if (side->open[--side->depth].leave)
            note(c, side->open[side->depth].leave);
    } else if (calls->asked) {
        s->ask(uc, va, size, NULL);
    }
}

/* From now on, this is what is to be noted of the call that is being made now, by Python asked for. */
void know(struct site *s, u64 enter, u64 leave)
{
    struct cpu *c = s->cpu;
    struct vcpu *v = c->vcpu;
    u8 *env = c->env;
    u64 first = REG(RDI) & s->first, second = REG(RSI) & s->second;
    struct known *k, *start, *end;

    if (!v || s->size > SEEN)
        return;
    start = place(s, v, first, second);
    for (k = start, end = k + NEAR; k < end && k->site && !is_call(k, s, v, first, second); k++)
        ;
    if (k == end)
        k = start; /* others have the room */
    k->site = NULL;
    if (!seen(c, v, REG(RDI), s->size, k->seen, 1))
        return;
    k->site = s;
    k->vcpu = v;
    k->first = first;
    k->second = second;
    k->generation = *c->calls->generation;
    k->enter = enter;
    k->leave = leave;
}
