; Ring 3 and back in long mode: IRETQ, INT 0x80, SYSCALL and SYSRET, and a privileged instruction,
; which must be refused.
%include "probe.inc"
bits 16
org 0x1000

    enter_long_mode
    lidt [idtr]
    ; A 64-bit TSS of which only RSP0 is used (Intel SDM vol. 3, 8.7).
    mov rax, 0x0000890000000067 | ((TSS & 0xFFFF) << 16) | ((TSS >> 16) << 32)
    mov [tss_descriptor], rax
    mov qword [TSS + 4], STACK
    mov ax, 0x28
    ltr ax
    mov ecx, 0xC0000081         ; STAR: kernel selectors from 0x08, user ones from 0x10
    xor eax, eax
    mov edx, 0x00100008
    wrmsr
    inc ecx                     ; LSTAR
    mov eax, by_syscall
    xor edx, edx
    wrmsr
    mov ecx, 0xC0000084         ; SFMASK
    xor eax, eax
    wrmsr
    mov dx, NONCE
    in eax, dx
    mov ebx, eax
    step 1
    push 0x1B
    push STACK - 0x400
    push 0x2
    push 0x23
    push user
    iretq

user:
    mov eax, cs
    mov [RESULT], eax           ; 0x23: the selector with its ring
    int 0x80
    syscall
    hlt                         ; #GP

by_int:
    mov eax, [rsp + 8]
    mov [RESULT + 4], eax       ; from where it came: 0x23 again
    step 2
    iretq

by_syscall:
    mov [RESULT + 8], ebx       ; the number that ring 3 kept in its register
    mov r15, rcx
    step 3
    mov rcx, r15
    o64 sysret

refused:
    mov eax, [rsp + 16]
    mov [RESULT + 12], eax      ; the CS of the one that was refused, behind the error code
    step 4
    hlt

STACK   equ 0xF000
TSS     equ 0x10000

align 8
idt:
    times 13 dq 0, 0
    dw refused, 0x08, 0x8E00, 0
    dq 0
    times 0x80 - 14 dq 0, 0
    dw by_int, 0x08, 0xEE00, 0
    dq 0
idtr:
    dw $ - idt - 1
    dq idt
