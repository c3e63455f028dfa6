; IRETQ with nothing on the stack.
bits 64
org 0x1000
%include "modes.inc"
%include "long.inc"

    LOAD_TABLES
    mov rsp, 0x30000
    iretq
    TABLES
