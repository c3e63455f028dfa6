; 32-bit paging: a 4 MiB page for the probe itself and a 4 KiB one which is moved.
%include "probe.inc"
bits 16
org 0x1000

    enter_protected_mode
    step 1
    mov dword [TABLE0], PRESENT | WRITE | LARGE
    mov dword [TABLE0 + 0x200 * 4], TABLE1 + (PRESENT | WRITE)
    mov dword [TABLE1 + 4], TARGET + (PRESENT | WRITE)
    mov eax, cr4
    or eax, CR4_PSE
    mov cr4, eax
    mov eax, TABLE0
    mov cr3, eax
    mov eax, cr0
    or eax, CR0_PG
    mov cr0, eax
    jmp .paged
.paged:
    step 2
    mov dx, NONCE
    in eax, dx
    mov ebx, eax
    mov [0x80001010], eax       ; lands at TARGET + 0x10
    step 3
    mov dword [TABLE1 + 4], TARGET + 0x1000 + (PRESENT | WRITE)
    invlpg [0x80001000]
    lea eax, [ebx + ebx * 2]
    mov [0x80001010], eax       ; lands a page further
    step 4
    hlt
