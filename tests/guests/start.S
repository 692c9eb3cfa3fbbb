/* Entry point, ELF notes, event upcall and trap entries of a test kernel (64-bit Xen PV). */
#define ELFNOTE(type, desc...)            \
    .pushsection .note.Xen, "a", @note;   \
    .p2align 2;                           \
    .long 4, 2f - 1f, type;               \
    .asciz "Xen";                         \
1:  desc;                                 \
2:  .p2align 2;                           \
    .popsection

    ELFNOTE(6,  .asciz "pvirq-test")      /* GUEST_OS */
    ELFNOTE(8,  .asciz "generic")         /* LOADER */
    ELFNOTE(5,  .asciz "xen-3.0")         /* XEN_VERSION */
    ELFNOTE(3,  .quad BASE)               /* VIRT_BASE */
    ELFNOTE(1,  .quad _start)             /* ENTRY */
#ifndef RAW
    ELFNOTE(2,  .quad hypercall_page)     /* HYPERCALL_PAGE */
#endif
    ELFNOTE(10, .asciz "!writable_page_tables|pae_pgdir_above_4gb")
    ELFNOTE(9,  .asciz "yes")             /* PAE_MODE */

    .text
    .globl _start
_start:
    cld
    mov $stack_top, %rsp
    mov %rsi, %rdi
    xor %ebp, %ebp
    call kmain
1:  jmp 1b

    /* Return through HYPERVISOR_iret; on the stack: rip, cs, rflags, rsp, ss. */
    .globl do_iret
do_iret:
    push $0                               /* flags: no VGCF_in_syscall */
    .globl do_iret_flags
do_iret_flags:                            /* the same with the flags word already pushed */
#ifdef RAW
    push %rcx
    push %r11
    push %rax
    mov $23, %eax
    syscall
#else
    jmp hypercall_page + 23 * 32          /* the stub pushes rcx, r11, rax itself */
#endif

.macro PUSH_ALL
    push %rax; push %rcx; push %rdx; push %rbx; push %rbp; push %rsi; push %rdi
    push %r8; push %r9; push %r10; push %r11; push %r12; push %r13; push %r14; push %r15
.endm
.macro POP_ALL
    pop %r15; pop %r14; pop %r13; pop %r12; pop %r11; pop %r10; pop %r9; pop %r8
    pop %rdi; pop %rsi; pop %rbp; pop %rbx; pop %rdx; pop %rcx; pop %rax
.endm

    /* Every frame from Xen starts with rcx, r11 and then the error code, if there is one. */
    .globl upcall_entry
upcall_entry:
    mov (%rsp), %rcx
    mov 8(%rsp), %r11
    movq $0, 8(%rsp)                      /* error code */
    movq $0x100, (%rsp)                   /* "vector" of an event */
    PUSH_ALL
    mov %rsp, %rdi
    pushfq
    pop %rsi
    cld
    call lib_upcall
    jmp trap_return

trap_common:
    PUSH_ALL
    mov %rsp, %rdi
    pushfq
    pop %rsi
    cld
    call lib_trap
trap_return:
    POP_ALL
    add $16, %rsp
    jmp do_iret

    /* 32 trap entries and one for each software vector 0x20, 0x21 and 0x80, 32 bytes apart. */
.macro NOERR vec
    .p2align 5
    mov (%rsp), %rcx
    mov 8(%rsp), %r11
    movq $0, 8(%rsp)
    movq $\vec, (%rsp)
    jmp trap_common
.endm
.macro ERR vec
    .p2align 5
    mov (%rsp), %rcx
    mov 8(%rsp), %r11
    add $8, %rsp                          /* the error code is where it belongs */
    movq $\vec, (%rsp)
    jmp trap_common
.endm
    .p2align 5
    .globl trap_entries
trap_entries:
    .irp v, 0, 1, 2, 3, 4, 5, 6, 7
    NOERR \v
    .endr
    ERR 8
    NOERR 9
    .irp v, 10, 11, 12, 13, 14
    ERR \v
    .endr
    .irp v, 15, 16
    NOERR \v
    .endr
    ERR 17
    .irp v, 18, 19, 20
    NOERR \v
    .endr
    ERR 21
    .irp v, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 0x20, 0x21, 0x80
    NOERR \v
    .endr

    /* failsafe callback frame: rcx, r11, ds, es, fs, gs, rip, cs, rflags, rsp, ss */
    .globl failsafe_entry
failsafe_entry:
    mov 16(%rsp), %rcx
    mov %rcx, failsafe_sel
    mov 24(%rsp), %rcx
    mov %rcx, failsafe_sel + 8
    mov 32(%rsp), %rcx
    mov %rcx, failsafe_sel + 16
    mov 40(%rsp), %rcx
    mov %rcx, failsafe_sel + 24
    mov (%rsp), %rcx
    mov 8(%rsp), %r11
    add $32, %rsp
    movq $0, 8(%rsp)
    movq $0x101, (%rsp)
    jmp trap_common

    .globl syscall_entry, syscall32_entry, sysenter_entry
    .p2align 5
syscall_entry:
    mov (%rsp), %rcx
    mov 8(%rsp), %r11
    movq $0, 8(%rsp)
    movq $0x102, (%rsp)
    jmp trap_common
    .p2align 5
syscall32_entry:
    mov (%rsp), %rcx
    mov 8(%rsp), %r11
    movq $0, 8(%rsp)
    movq $0x103, (%rsp)
    jmp trap_common
    .p2align 5
sysenter_entry:
    mov (%rsp), %rcx
    mov 8(%rsp), %r11
    movq $0, 8(%rsp)
    movq $0x104, (%rsp)
    jmp trap_common

    /* enter_user(rip, rsp, rflags, vgcf, cs): the user sees rax, rbx, rcx, r11 = 0xa, 0xb, 0xc, 0x11 */
    .globl enter_user, leave_user
enter_user:
    push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15
    mov %rsp, user_ksp
    push $0xe02b
    push %rsi
    push %rdx
    push %r8
    push %rdi
    push %rcx
    mov $0xa, %eax
    mov $0xb, %ebx
    mov $0xc, %ecx
    mov $0x11, %r11d
    jmp do_iret_flags
leave_user:
    mov user_ksp, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx
    ret

    .data
user_ksp: .quad 0
    .p2align 12
    .globl shared_page
shared_page: .skip 4096
    .globl failsafe_sel
failsafe_sel: .quad 0, 0, 0, 0
    .bss
    .p2align 12
    .globl stack_top, stack_bottom
stack_bottom: .skip 32768
stack_top:
#ifndef RAW
    .section .text.hcall, "ax", @progbits
    .p2align 12
    .globl hypercall_page
hypercall_page: .skip 4096
#endif
    .section .note.GNU-stack, "", @progbits
