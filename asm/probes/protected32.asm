; 32-bit protected mode without paging: a segment with a base, a call, a software interrupt.
%include "probe.inc"
bits 16
org 0x1000

    enter_protected_mode
    step 1
    lidt [idtr]
    mov ax, 0x18
    mov fs, ax
    mov dx, NONCE
    in eax, dx
    mov [fs:0x10], eax          ; segment base TARGET
    step 2
    mov eax, [fs:0x10]
    int 2
    hlt

tripled:                        ; the handler of INT 2
    lea eax, [eax + eax * 2]
    mov [RESULT], eax
    step 3
    iretd

align 8
idt:
    dq 0, 0
    dw tripled, 0x08, 0x8E00, 0
idtr:
    dw $ - idt - 1
    dd idt
