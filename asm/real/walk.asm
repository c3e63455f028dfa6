; The first guest of stage 03. It asks its processor who it is, adds 1 to 10 in a loop, calls a
; subroutine, leaves the results in memory for the host to find, and ends with HLT.
bits 16
org 0x1000

VENDOR  equ 0x2000              ; 12 bytes: what CPUID leaf 0 says
SUM     equ 0x2010              ; 16 bits: 1 + 2 + ... + 10
SQUARE  equ 0x2012              ; 32 bits: the sum times itself

    xor eax, eax                ; leaf 0: the vendor, in EBX, EDX, ECX
    cpuid
    mov [VENDOR], ebx
    mov [VENDOR + 4], edx
    mov [VENDOR + 8], ecx

    xor ax, ax
    mov cx, 10
add_next:
    add ax, cx
    loop add_next               ; CX goes down to 0
    mov [SUM], ax

    call square
    mov [SQUARE], eax
    hlt

; EAX = AX * AX
square:
    movzx eax, ax
    imul eax, eax
    ret
