; A write to a read-only page. Without CR0.WP the kernel could.
%include "probe.inc"
bits 64
org 0x1000

CR0_WP      equ 1 << 16

    mov rax, cr0
    or eax, CR0_WP
    mov cr0, rax
    and qword [0xB000 + 8], ~WRITE
    mov rax, cr3
    mov cr3, rax
    mov [0x200000], al
