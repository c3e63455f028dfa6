; A jump to where memory is mapped, but none is there.
bits 64
org 0x1000

    mov eax, 0x8000000
    jmp rax
