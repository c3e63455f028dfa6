; CMPXCHG16B in ring 0, which Linux uses in its memory allocator.
%include "probe.inc"
bits 16
org 0x1000

    enter_long_mode
    step 1
    mov dx, NONCE
    in eax, dx
    mov ebx, eax
    xor eax, eax                ; compare with zero, which TARGET holds ...
    xor edx, edx
    xor ecx, ecx
    lock cmpxchg16b [TARGET]       ; ... and put RCX:RBX there
    setz [RESULT]
    step 2
    hlt
