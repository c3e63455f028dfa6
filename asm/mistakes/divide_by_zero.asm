; A division by zero before there is an IDT.
bits 64
org 0x1000

    xor edx, edx
    xor ecx, ecx
    div ecx
