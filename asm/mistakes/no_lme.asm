; Long mode without EFER.LME: what CR3 names is taken for the tables of PAE paging.
%include "probe.inc"
bits 16
org 0x1000

    enter_protected_mode
    mov dword [TABLE0], TABLE1 + (PRESENT | WRITE)
    mov dword [TABLE1], TABLE2 + (PRESENT | WRITE)
    mov dword [TABLE2], PRESENT | WRITE | LARGE
    mov eax, cr4
    or eax, CR4_PAE
    mov cr4, eax
    mov eax, TABLE0
    mov cr3, eax
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
