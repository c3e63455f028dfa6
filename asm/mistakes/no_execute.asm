; A jump into a page that is marked no-execute.
%include "probe.inc"
bits 64
org 0x1000

EFER_NXE    equ 1 << 11

    mov ecx, EFER
    rdmsr
    or eax, EFER_NXE
    wrmsr
    bts qword [0xB000 + 8], 63  ; the second entry of the first page directory: see common's layout.rs
    mov rax, cr3
    mov cr3, rax
    mov eax, 0x200000
    jmp rax
