/* What the test kernels share: the ABI they need, hypercalls, printing, traps that can be watched. */
#ifndef LIB_H
#define LIB_H
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef int s32;
typedef long s64;

#define PAGE 4096ul
#define DOMID_SELF 0x7ff0
#define DOMID_IO 0x7ff1
#define DOMID_XEN 0x7ff2
#define DOMID_INVALID 0x7ff4
#define SIF_PRIVILEGED 1
#define SIF_INITDOMAIN 2
#define P 1ul      /* page-table entry bits */
#define RW 2ul
#define US 4ul
#define PWT 8ul
#define PCD 16ul
#define A 32ul
#define D 64ul
#define PSE 128ul
#define G 256ul
#define NX (1ul << 63)
#define KCS 0xe033
#define KDS 0xe02b
#define EFAULT_ADDR ((void *)0x0000700000001000) /* canonical, never mapped */
#define XEN_ADDR ((void *)0xffff830000000000)    /* Xen's direct map: out of a guest's reach */
#define NONCANON ((void *)0x8000000000001000)

enum { HC_set_trap_table, HC_mmu_update, HC_set_gdt, HC_stack_switch, HC_set_callbacks, HC_fpu_taskswitch,
       HC_sched_op_compat, HC_platform_op, HC_set_debugreg, HC_get_debugreg, HC_update_descriptor,
       HC_memory_op = 12, HC_multicall, HC_update_va_mapping, HC_set_timer_op, HC_event_channel_op_compat,
       HC_xen_version, HC_console_io, HC_physdev_op_compat, HC_grant_table_op, HC_vm_assist,
       HC_update_va_mapping_otherdomain, HC_iret, HC_vcpu_op, HC_set_segment_base, HC_mmuext_op, HC_xsm_op,
       HC_nmi_op, HC_sched_op, HC_callback_op, HC_xenoprof_op, HC_event_channel_op, HC_physdev_op, HC_hvm_op,
       HC_sysctl, HC_domctl, HC_kexec_op, HC_tmem_op, HC_argo_op, HC_xenpmu_op };

struct start_info {
    char magic[32];
    u64 nr_pages, shared_info;
    u32 flags;
    u64 store_mfn;
    u32 store_evtchn;
    u64 console_mfn; /* domU */
    u32 console_evtchn;
    u64 pt_base, nr_pt_frames, *mfn_list, mod_start, mod_len;
    char cmd_line[1024];
};
struct time_info {
    u32 version, pad0;
    u64 tsc_timestamp, system_time;
    u32 tsc_to_system_mul;
    signed char tsc_shift;
    u8 flags, pad1[2];
};
struct vcpu_info {
    u8 upcall_pending, upcall_mask, pad[6];
    u64 pending_sel, cr2, arch_pad;
    struct time_info time;
};
struct shared_info {
    struct vcpu_info vcpu[32];
    u64 pending[64], mask[64];
    u32 wc_version, wc_sec, wc_nsec, wc_sec_hi;
    u64 max_pfn, p2m_frame_list_list, nmi_reason, p2m_cr3, p2m_vaddr, p2m_generation;
};
struct trap_info {
    u8 vector, flags; /* flags: DPL in bits 0-1, 4 = mask events */
    u16 cs;
    u64 address;
};
/* A frame as start.S leaves it: the registers, then what Xen pushed. */
struct regs {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    u64 vector, error, rip, cs, rflags, rsp, ss;
};
enum { V_EVENT = 0x100, V_FAILSAFE, V_SYSCALL, V_SYSCALL32, V_SYSENTER };
struct mmu_update { u64 ptr, val; };
struct mmuext_op { u32 cmd; u64 arg1, arg2; };

extern struct start_info *si;
extern char shared_page[4096], stack_top[], stack_bottom[], trap_entries[];
extern u64 failsafe_sel[4];
#define SI ((volatile struct shared_info *)shared_page)
#define VI (&SI->vcpu[0])
extern char upcall_entry[], failsafe_entry[], syscall_entry[], syscall32_entry[], sysenter_entry[], do_iret[];

/* Hypercalls. */
#ifdef RAW
#define HC5(n, a, b, c, d, e) ({ long r_ = (n); register long r10_ __asm__("r10") = (long)(d); \
    register long r8_ __asm__("r8") = (long)(e); long a_ = (long)(a), b_ = (long)(b), c_ = (long)(c); \
    __asm__ volatile("syscall" : "+a"(r_), "+D"(a_), "+S"(b_), "+d"(c_), "+r"(r10_), "+r"(r8_) \
      : : "rcx", "r11", "memory"); r_; })
#else
extern char hypercall_page[4096];
#define HC5(n, a, b, c, d, e) ({ long r_; register long r10_ __asm__("r10") = (long)(d); \
    register long r8_ __asm__("r8") = (long)(e); long a_ = (long)(a), b_ = (long)(b), c_ = (long)(c); \
    __asm__ volatile("call *%[p]" : "=a"(r_), "+D"(a_), "+S"(b_), "+d"(c_), "+r"(r10_), "+r"(r8_) \
      : [p] "r"(hypercall_page + (u64)(n) * 32) : "rcx", "r11", "memory"); r_; })
#endif
#define HC(n, a, b, c, d) HC5(n, a, b, c, d, 0)
#define HC1(n, a) HC5(n, a, 0, 0, 0, 0)
#define HC2(n, a, b) HC5(n, a, b, 0, 0, 0)
#define HC3(n, a, b, c) HC5(n, a, b, c, 0, 0)
#define EV(op, arg) HC2(HC_event_channel_op, op, arg)

/* Printing: %d %u (32 bits), %ld, %x (32), %lx, %s, %c, %e (0, a count, or an errno's name). */
void say(const char *fmt, ...);
void rc(const char *name, long value); /* "name: value as %e" */
void flush(void);
long num(const char *key, long dflt);  /* key=NUMBER of the command line */
void *memcpy(void *d, const void *s, u64 n);
void *memset(void *d, int c, u64 n);
int memcmp(const void *a, const void *b, u64 n);
int priv(void);                        /* booted as the privileged initial domain */
/* Lines only an initial domain prints; they are marked, so that a comparison for another domain can drop them. */
extern const char *line_tag;
#define DOM0 for (int once_ = priv() ? (line_tag = "[dom0] ", 1) : 0; once_; once_ = 0, line_tag = "")
void shutdown(u32 reason);

/* Memory. The image, p2m list, page tables and boot stack are mapped at BASE + pfn * 4096. */
extern u64 *p2m;
#define PFN(va) (((u64)(va) - BASE) >> 12)
#define MFN(va) (p2m[PFN(va)])
#define M2P ((volatile u64 *)0xffff800000000000)
#define PTE(va, flags) (MFN(va) << 12 | (flags))
static inline void *va_of_mfn(u64 mfn) { return (void *)(BASE + (M2P[mfn] << 12)); }
u64 *l1e_of(u64 va);                   /* the (read-only mapped) L1 entry of a mapped address, or 0 */
u64 l1e_maddr(u64 va);                 /* its machine address */
long remap(volatile void *va, u64 pte);         /* update_va_mapping with a local flush */
long set_ro(volatile void *va);
long set_rw(volatile void *va);
long mmu_update1(u64 ptr, u64 val, u32 *done);
long mmuext1(u32 cmd, u64 arg1, u64 arg2);
extern u8 pages[48][4096];             /* page-aligned, for whatever the kernel wants */

/* Traps. `seen` is the last one since TRY; the handler goes on behind the probed instruction. */
struct seen {
    u64 n, vec, err, rip, cs, flags, rsp, ss, cr2, rax, rcx, r11, mask_inside, flags_inside, sp_inside;
    u64 log[8];                        /* the vectors, in order */
};
extern volatile struct seen seen;
extern volatile u64 probe_rip, probe_resume, probe_rsp;
extern int (*trap_hook)(struct regs *r);   /* non-zero: handled */
extern void (*upcall_hook)(struct regs *r);
extern volatile u32 upcalls, fired[4096];
#define R(...) __VA_ARGS__
#define TRY(code, outs, ins) do { seen.n = 0; __asm__ volatile( \
    "movq $771f, probe_rip\n\tmovq $772f, probe_resume\n\tmovq %%rsp, probe_rsp\n\t" \
    "771: " code "\n\t772: movq $0, probe_resume" : outs : ins : "memory", "cc"); } while (0)
void show(const char *name);               /* the last trap: vector, error code, rip as offset */
void show_full(const char *name);          /* and cs, flags, masks, stack */
long set_traps(const struct trap_info *t);
void set_gate(u8 vec, u8 flags, u64 address);
/* User mode (start.S): enter_user returns when a trap or syscall hook calls leave_user. */
long enter_user(u64 rip, u64 rsp, u64 rflags, u64 vgcf, u64 cs);
void leave_user(void) __attribute__((noreturn));
void enable_events(void);
void disable_events(void);
u64 system_time(volatile struct time_info *t); /* in ns, by the time-stamp counter of the vCPU whose `t` is */
void test(void);                           /* the kernel itself */
#endif
