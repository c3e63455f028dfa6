; Fibonacci's numbers as far as 32 bits hold them: F(0) to F(47), one a line.
bits 16
org 0x1000
%include "ports.inc"

    xor eax, eax                ; F(n)
    mov ebx, 1                  ; F(n+1)
    xor cx, cx
next:
    call put_number
    call new_line
    add eax, ebx                ; F(n) + F(n+1)
    xchg eax, ebx               ; n = n + 1
    jnc next                    ; XCHG leaves the flags: the carry is ADD's
    call put_number             ; F(47) is in EAX, and F(48) did not fit
    call new_line
    EXIT_WELL

%include "print.inc"
