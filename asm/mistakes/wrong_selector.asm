; A far jump to a selector that the GDT is too short for.
%include "probe.inc"
bits 16
org 0x1000

    enter_protected_mode
    jmp 0x30:.there
.there:
