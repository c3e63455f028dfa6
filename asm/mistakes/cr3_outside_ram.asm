; Page tables at 1 GiB, where this machine has no memory.
bits 64
org 0x1000

    mov eax, 0x40000000
    mov cr3, rax
    nop
