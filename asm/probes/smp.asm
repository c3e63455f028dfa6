; A second vCPU, started as Linux does: the first one sends it INIT and STARTUP through its local APIC.
; Both begin at 0x1000, the second one with CS 0x0100.
%include "probe.inc"
bits 16
org 0x1000

SVR     equ 0xFEE000F0
ICR     equ 0xFEE00300
ICR_HIGH equ 0xFEE00310

    jmp 0:both
both:
    xor ax, ax
    mov ds, ax
    mov al, 1
    lock xadd [RESULT + 8], al
    test al, al
    jnz second
    enter_protected_mode
    step 1
    mov dword [SVR], 0x1FF          ; an APIC is enabled before it is used
    mov dword [ICR_HIGH], 1 << 24   ; to APIC ID 1
    mov dword [ICR], 0x4500         ; INIT, assert
    mov dword [ICR_HIGH], 1 << 24
    mov dword [ICR], 0x4601         ; STARTUP at page 1
.wait:
    pause
    cmp dword [RESULT], 0
    je .wait
    step DONE
    jmp $

bits 16
second:
    mov dx, NONCE
    in eax, dx
    mov [RESULT], eax
    step DONE
    jmp $
