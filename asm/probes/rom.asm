; A read-only slot at 0xA0000: reads are memory, a write becomes an exit and changes nothing.
%include "probe.inc"
bits 16
org 0x1000

    xor ax, ax
    mov ds, ax
    mov ax, 0xA000
    mov es, ax
    mov eax, [es:0]
    mov [RESULT], eax
    not eax
    mov [es:0], eax             ; KVM_EXIT_MMIO
    mov eax, [es:0]
    mov [RESULT + 4], eax
    hlt
