; The code segment's selector in SS.
%include "probe.inc"
bits 16
org 0x1000

    enter_protected_mode
    mov ax, 0x08
    mov ss, ax
