; A stack where nothing is mapped.
bits 64
org 0x1000

    mov rsp, 0x4000001000
    push rax
