; Recursion without end into a guard page that is not mapped. There are handlers, but no stack for them.
bits 64
org 0x1000
%include "modes.inc"
%include "long.inc"

    LOAD_TABLES
    GATE 8, handler, 0, 0
    GATE 14, handler, 0, 0
    mov qword [0xB000 + 8], 0   ; from 2 MiB to 4 MiB
    mov rax, cr3
    mov cr3, rax
    mov rsp, 0x400040
deeper:
    call deeper
handler:
    iretq
    TABLES
