; A page fault's handler which does what raised the fault, until its stack is full.
bits 64
org 0x1000
%include "modes.inc"
%include "long.inc"

    LOAD_TABLES
    GATE 14, handler, 0, 0
    mov qword [0xB000 + 8], 0   ; from 2 MiB to 4 MiB
    mov rax, cr3
    mov cr3, rax
    mov rsp, 0x400100
    mov rbx, 0x4000000000
    mov al, [rbx]
handler:
    mov rax, cr2
    mov al, [rax]
    iretq
    TABLES
