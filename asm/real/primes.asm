; The primes below 1000 by the sieve of Eratosthenes, ten a line, and how many there are.
bits 16
org 0x1000
%include "ports.inc"

LIMIT   equ 1000

    ; Strike out the multiples of each number that is not struck out itself.
    mov bx, 2
sieve:
    cmp byte [struck + bx], 0
    jne no_prime
    mov di, bx
    shl di, 1
strike:
    cmp di, LIMIT
    jae no_prime
    mov byte [struck + di], 1
    add di, bx
    jmp strike
no_prime:
    inc bx
    cmp bx, LIMIT
    jb sieve

    ; Print what is left.
    mov cx, 4
    xor eax, eax
    xor ebp, ebp                ; how many
    mov bx, 2
print:
    cmp byte [struck + bx], 0
    jne skip
    movzx eax, bx
    call put_number
    inc bp
    mov ax, bp
    mov dl, 10
    div dl                      ; AH = AX mod 10
    test ah, ah
    jnz skip
    call new_line
skip:
    inc bx
    cmp bx, LIMIT
    jb print

    call new_line
    mov eax, ebp
    xor cx, cx
    call put_number
    mov si, primes_below
    call put_text
    EXIT_WELL

primes_below:
    db " primes below 1000", 10, 0

%include "print.inc"

struck:                         ; memory behind the program is 0
