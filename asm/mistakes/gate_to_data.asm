; A gate with the data segment's selector.
bits 64
org 0x1000
%include "modes.inc"
%include "long.inc"

    LOAD_TABLES
    GATE 6, handler, 0, 0
    mov word [IDT + 6 * 16 + 2], KERNEL_DATA
    ud2
handler:
    iretq
    TABLES
