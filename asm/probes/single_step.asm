; Eight instructions of one byte each: single step stops once after every one. The end is no HLT, for a
; KVM that interprets may step over it.
%include "probe.inc"
bits 16
org 0x1000

    times 8 inc ax
    step DONE
    jmp $
