; Ring 3 on pages that are the kernel's.
bits 64
org 0x1000
%include "modes.inc"
%include "long.inc"

    LOAD_TABLES
    push USER_DATA
    push 0x18000
    push 2
    push USER_CODE
    push user
    iretq
user:
    nop
    TABLES
