; Writes by DS, which holds the null selector. Where that is not checked, the guest ends well.
%include "probe.inc"
%include "ports.inc"
bits 16
org 0x1000

    enter_protected_mode
    xor eax, eax
    mov ds, ax
    mov [0x2000], eax
    xor eax, eax
    out DEBUG_EXIT, al
