; A far jump behind the end of a code segment of 4 KiB.
bits 16
org 0x1000

    cli
    lgdt [gdtr]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp dword 0x08:0x2000
    align 8
gdt:
    dq 0
    dq 0x00409B0000000FFF       ; code with the limit 0xFFF
gdtr:
    dw $ - gdt - 1
    dd gdt
