; The same as real/accesses.asm for 64-bit code, where prefixes name registers, and paging puts the device elsewhere.
bits 64
org 0x1000
%include "ports.inc"
%include "accesses.inc"

DEVICE      equ 0x40000000          ; what is mapped here
PHYSICAL    equ 0xD0000000          ; is this
; The entry of the page tables that the host made (common::long_mode) which says so.
ENTRY       equ 0xC000
LARGE_PAGE  equ 0x83

    BEGIN_ACCESSES
    mov eax, PHYSICAL | LARGE_PAGE
    mov [ENTRY], rax
    mov rax, cr3
    mov cr3, rax
    mov rsp, 0x8000

    mov edi, DEVICE
    mov rax, 0x8877665544332211
    mov r8, 0x1817161514131211
    mov sil, 0x77
    mov dh, 0x99
    EXITS 1, mov [rdi], al
    EXITS 1, mov [rdi], sil         ; without its prefix it would be DH
    EXITS 1, mov [rdi], dh
    EXITS 1, mov [rdi], r8d         ; and this EAX
    EXITS 1, mov [rdi], eax
    EXITS 1, mov [rdi], ax
    EXITS 1, mov [rdi], rax
    mov al, 0x44                    ; as a prefix it would name another register
    EXITS 1, mov [rdi], al
    mov ecx, 3
    EXITS 1, mov [rdi + rcx * 8 + 4], r8w
    EXITS 1, mov qword [rdi + 8], -2
    EXITS 1, mov r9, [rdi]
    EXITS 1, movzx eax, byte [rdi]
    EXITS 2, xchg [rdi], eax        ; read, and write
    EXITS 2, or dword [rdi], 1
    EXITS 2, mov [rdi + 0xFFC], r8  ; to two pages
    EXITS 3, rep stosq
    EXITS 1, push qword [rdi]

    mov edx, 0x80
    EXITS 1, out dx, eax
    EXITS 1, in al, dx
    mov ecx, 3
    mov esi, 0x2000
    EXITS 3, rep outsb

    xor eax, eax
    EXITS 1, out DEBUG_EXIT, al
