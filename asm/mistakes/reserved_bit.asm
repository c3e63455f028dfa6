; An entry of the PML4 with bit 7 set, as in an entry that maps a large page.
%include "probe.inc"
bits 64
org 0x1000

    mov rax, cr3
    mov rcx, [rax]
    or rcx, LARGE
    mov [rax + 8], rcx
    mov rbx, 0x8000000000       ; entry 1 is for this
    mov al, [rbx]
