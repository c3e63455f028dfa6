; Writes behind the end of a data segment of 4 KiB. Where that is not checked, the guest ends well.
%include "probe.inc"
%include "ports.inc"
bits 16
org 0x1000

    enter_protected_mode
    lgdt [gdtr]
    mov ax, 0x10
    mov ds, ax
    mov [0x1FFE], eax
    xor eax, eax
    out DEBUG_EXIT, al
    align 8
gdt:
    dq 0
    dq 0x00CF9B000000FFFF       ; code
    dq 0x0040930000000FFF       ; data with the limit 0xFFF
gdtr:
    dw $ - gdt - 1
    dd gdt
