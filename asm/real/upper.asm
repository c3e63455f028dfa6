; Prints what is typed in capital letters, by the hypercall ports: no status to poll, no wait loop.
; A read of 32 bits tells the end of input, -1, from every byte.
bits 16
org 0x1000
%include "ports.inc"

next:
    mov dx, HYPER_GETCHAR
    in eax, dx
    cmp eax, -1
    je end
    cmp al, 'a'
    jb print
    cmp al, 'z'
    ja print
    sub al, 'a' - 'A'
print:
    mov dx, HYPER_PUTCHAR
    out dx, al
    jmp next
end:
    EXIT_WELL
