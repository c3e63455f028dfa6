; A far jump to code whose descriptor has its present bit clear.
bits 16
org 0x1000

    cli
    lgdt [gdtr]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp dword 0x08:flat
flat:
    align 8
gdt:
    dq 0
    dq 0x00CF1B000000FFFF       ; code, but bit 47 is missing
gdtr:
    dw $ - gdt - 1
    dd gdt
