; Counts from 1 to 20, one number a line, and ends by the debug-exit port.
bits 16
org 0x1000
%include "ports.inc"

LAST    equ 20

    mov si, label
    xor cx, cx                  ; numbers as wide as they are
    mov eax, 1
next:
    call put_text
    call put_number
    call new_line
    inc eax
    cmp eax, LAST
    jbe next

    mov al, 0                   ; 0: it ended well
    out DEBUG_EXIT, al

label:
    db "count ", 0

%include "print.inc"
