; The guest of common::touch: reads and writes 32 bits anywhere in guest-physical memory, on order.
; Each order ends with HLT. Wherever the address is, its page is mapped at ALIAS first, by one entry of
; the last page table.
%include "probe.inc"
bits 16
org 0x1000

    enter_long_mode
    mov r15, ALIAS
    mov dx, ANSWER
.next:
    hlt
    in eax, dx                  ; the order: 0 read, 1 write
    mov ebp, eax
    in eax, dx                  ; the address, low half first
    mov ebx, eax
    in eax, dx
    shl rax, 32
    or rbx, rax
    mov rax, rbx
    and rax, -0x1000
    or rax, PRESENT | WRITE
    mov [TABLE3 + 8], rax
    invlpg [r15]
    and ebx, 0xFFF
    in eax, dx                  ; the value
    test ebp, ebp
    jz .read
    mov [r15 + rbx], eax
    jmp .next
.read:
    mov eax, [r15 + rbx]
    out dx, eax
    jmp .next
