; Writes to the pages that it is told, by number, one after the other: the dirty log has to name these.
; It leaves in each what it was told. Page 0 ends it.
%include "probe.inc"
bits 16
org 0x1000

.next:
    mov dx, ANSWER
    in eax, dx
    test eax, eax
    jz .end
    mov bx, ax
    shl bx, 8                   ; a page is 0x100 paragraphs
    mov es, bx
    mov [es:0], eax
    jmp .next
.end:
    hlt
