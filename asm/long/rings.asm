; Rings: into ring 3 by IRETQ, and back by the two ways of a system call, SYSCALL and INT; then ring 3
; tries what it may not. (Intel SDM vol. 3, 6.8; AMD APM vol. 2, 6.1.)
bits 64
org 0x1000

%include "modes.inc"
%include "long.inc"

; What was seen, 64 bits each: CS in ring 0 on each entry and, where the processor tells, the CS that it
; came from; and the error code and RIP of the general protection fault at the end.
SYSCALL_CS  equ RECORDS
SYSCALL_RIP equ RECORDS + 8
INT_CS      equ RECORDS + 16
INT_FROM    equ RECORDS + 24
FAULT_CODE  equ RECORDS + 32
FAULT_RIP   equ RECORDS + 40
FAULT_FROM  equ RECORDS + 48

STAR        equ 0xC0000081
LSTAR       equ 0xC0000082
SFMASK      equ 0xC0000084
RFLAGS_IF   equ 1 << 9
RFLAGS_DF   equ 1 << 10
RFLAGS_TF   equ 1 << 8

; The program's page: 2 MiB, the only one that ring 3 may touch.
USER_PAGE   equ 0x200000
USER_STACK  equ USER_PAGE + 0x10000
USER_CS     equ USER_PAGE + 0x1000      ; where the program leaves the CS that it read

    LOAD_TABLES
    GATE 13, general_protection, 0, 0
    GATE 0x80, by_int, 0, 3     ; ring 3 may come through this one

    ; ANCHOR: user
    ; Ring 3 gets one page. Its right to it must stand at every level on the way down.
    mov rax, cr3                ; the PML4
    or qword [rax], USER
    mov rax, [rax]
    and rax, ~0xFFF             ; the page-directory-pointer table
    or qword [rax], USER
    mov rax, [rax]
    and rax, ~0xFFF             ; the page directory
    or qword [rax + (USER_PAGE >> 21) * 8], USER
    mov rax, cr3                ; what the processor remembers of the tables is out of date
    mov cr3, rax
    ; ANCHOR_END: user

    ; The program.
    mov esi, user
    mov edi, USER_PAGE
    mov ecx, user_end - user
    rep movsb

    ; SYSCALL: which segments, which address, which flags to clear.
    mov ecx, EFER
    rdmsr
    or eax, EFER_SCE
    wrmsr
    mov ecx, STAR
    xor eax, eax
    mov edx, (USER_DATA - 8) << 16 | KERNEL_CODE
    wrmsr
    mov ecx, LSTAR
    mov eax, by_syscall
    xor edx, edx
    wrmsr
    mov ecx, SFMASK
    mov eax, RFLAGS_IF | RFLAGS_DF | RFLAGS_TF
    xor edx, edx
    wrmsr

    ; ANCHOR: down
    ; Down: IRETQ takes the less privileged segments from the stack as if it returned there.
    SAY "ring 0: going down to ring 3", 13, 10
    push USER_DATA
    push USER_STACK
    push 2                      ; RFLAGS, of which bit 1 is always set
    push USER_CODE
    push USER_PAGE
    iretq
    ; ANCHOR_END: down

; SYSCALL leaves the program's RIP in RCX and its RFLAGS in R11, and its stack where it is.
by_syscall:
    mov [user_rsp], rsp
    mov rsp, RSP0_TOP
    mov [SYSCALL_RIP], rcx
    xor eax, eax
    mov ax, cs
    mov [SYSCALL_CS], rax
    push rcx
    SAY "ring 0: called by syscall", 13, 10
    pop rcx
    mov rsp, [user_rsp]
    o64 sysret

; INT goes through the IDT: the processor itself has switched to RSP0 and pushed where it came from.
by_int:
    mov rax, [rsp + 8]
    mov [INT_FROM], rax
    xor eax, eax
    mov ax, cs
    mov [INT_CS], rax
    SAY "ring 0: called by int 0x80", 13, 10
    iretq

general_protection:
    mov rax, [rsp]
    mov [FAULT_CODE], rax
    mov rax, [rsp + 8]
    mov [FAULT_RIP], rax
    mov rax, [rsp + 16]
    mov [FAULT_FROM], rax
    SAY "ring 0: a general protection fault: ring 3 may not HLT", 13, 10
    END 0

; The program. It is copied elsewhere, so it jumps nowhere. RBX is a register that both ways of calling
; keep.
user:
    xor ebx, ebx
    mov bx, cs
    syscall
    int 0x80
    mov [USER_CS], rbx
    hlt
user_end:

    align 8
user_rsp:
    dq 0
    TABLES
