; The TSS loaded twice.
bits 64
org 0x1000
%include "modes.inc"
%include "long.inc"

    LOAD_TABLES
    mov ax, TSS
    ltr ax
    TABLES
