; FXSAVE, FXRSTOR, XSAVE and XRSTOR in ring 0, by which a kernel switches between threads.
%include "probe.inc"
bits 16
org 0x1000

AREA    equ 0x22000

    enter_long_mode
    mov dx, NONCE
    in eax, dx
    movd xmm0, eax
    step 1
    fxsave [AREA]
    step 2
    pxor xmm0, xmm0
    fxrstor [AREA]
    movd [RESULT], xmm0
    mov eax, 1
    cpuid
    bt ecx, 26                  ; does this processor have XSAVE?
    jnc .end
    mov rax, cr4
    or eax, CR4_OSXSAVE
    mov cr4, rax
    xor ecx, ecx
    xor edx, edx
    mov eax, 3                  ; x87 and SSE
    xsetbv
    step 3
    xsave [AREA + 0x1000]
    step 4
    pxor xmm0, xmm0
    mov eax, 3
    xrstor [AREA + 0x1000]
    step 5
.end:
    movd [RESULT + 4], xmm0
    hlt
