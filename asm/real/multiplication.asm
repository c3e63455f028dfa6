; The multiplication table up to 9 times 9.
bits 16
org 0x1000
%include "ports.inc"

    mov cx, 3                   ; columns as wide as 81 and a blank
    mov ebx, 1                  ; the row
row:
    mov edi, 1                  ; the column
column:
    mov eax, ebx
    mul edi
    call put_number
    inc edi
    cmp edi, 9
    jbe column
    call new_line
    inc ebx
    cmp ebx, 9
    jbe row
    EXIT_WELL

%include "print.inc"
