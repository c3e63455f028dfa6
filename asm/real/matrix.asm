; Multiplies two matrices of 3 times 3.
bits 16
org 0x1000
%include "ports.inc"

N       equ 3

    ; PRODUCT[row][column] = the sum over k of LEFT[row][k] * RIGHT[k][column]
    mov word [row], 0
next_row:
    mov word [column], 0
next_column:
    xor ecx, ecx                ; the sum
    mov word [k], 0
next_k:
    imul si, [row], N
    add si, [k]
    shl si, 2                   ; elements of 4 bytes
    mov eax, [left + si]
    imul di, [k], N
    add di, [column]
    shl di, 2
    imul eax, [right + di]
    add ecx, eax
    inc word [k]
    cmp word [k], N
    jb next_k

    imul di, [row], N
    add di, [column]
    shl di, 2
    mov [product + di], ecx
    inc word [column]
    cmp word [column], N
    jb next_column
    inc word [row]
    cmp word [row], N
    jb next_row

    mov si, by
    mov bx, left
    call put_matrix
    call put_text
    mov bx, right
    call put_matrix
    mov si, equals
    call put_text
    mov bx, product
    call put_matrix
    EXIT_WELL

; Prints the matrix at BX, a row a line.
put_matrix:
    pushad
    mov cx, 5
    mov dx, N
.row:
    mov di, N
.element:
    mov eax, [bx]
    call put_number
    add bx, 4
    dec di
    jnz .element
    call new_line
    dec dx
    jnz .row
    popad
    ret

by:     db "times", 10, 0
equals: db "is", 10, 0

%include "print.inc"

align 4
left:
    dd 1, 2, 3
    dd 4, 5, 6
    dd 7, 8, 9
right:
    dd 9, 8, 7
    dd 6, 5, 4
    dd 3, 2, 1
product:
    times N * N dd 0
row:    dw 0
column: dw 0
k:      dw 0
