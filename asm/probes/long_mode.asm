; Long mode with 4-level paging: 64-bit registers and an address in the upper half.
%include "probe.inc"
bits 16
org 0x1000

    enter_long_mode
    step 1
    mov dx, NONCE
    in eax, dx
    mov ebx, eax
    shl rax, 32
    or rax, rbx
    mov r15, ALIAS
    mov [r15 + 0x10], rax       ; the number twice, side by side, at TARGET + 0x10
    step 2
    push rbx
    call .triple
    mov [RESULT], eax
    step 3
    hlt
.triple:
    mov rax, [rsp + 8]
    lea rax, [rax + rax * 2]
    ret
