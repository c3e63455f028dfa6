; A far jump to a descriptor that was left empty.
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
    dq 0                        ; should be code
    dq 0x00CF93000000FFFF
gdtr:
    dw $ - gdt - 1
    dd gdt
