; An SSE instruction, as compilers make them, before CR4.OSFXSR is set.
bits 64
org 0x1000

    movaps xmm0, xmm1
