; Does what the list behind it says: reads and writes of 1, 2, 4 or 8 bytes anywhere in the first megabyte. What a read
; gave stands in the list afterwards. The grader appends the list.
bits 16
org 0x1000
%include "hypercall.inc"

; An entry of the list.
SIZE        equ 0                   ; bytes; 0 ends the list
WRITE       equ 1                   ; 1 to write, 0 to read
ADDRESS     equ 4
VALUE       equ 8
ENTRY       equ 16

    xor ax, ax
    mov ds, ax
    mov si, list
next:
    ; As segment and offset: 16 bytes are between two segments.
    mov eax, [si + ADDRESS]
    mov di, ax
    and di, 15
    shr eax, 4
    mov es, ax
    mov cl, [si + SIZE]
    cmp byte [si + WRITE], 0
    jne .write

    cmp cl, 1
    jb .end
    je .read_1
    cmp cl, 4
    jb .read_2
    je .read_4
    movq mm0, [es:di]
    movq [si + VALUE], mm0
    jmp .done
.read_1:
    mov al, [es:di]
    mov [si + VALUE], al
    jmp .done
.read_2:
    mov ax, [es:di]
    mov [si + VALUE], ax
    jmp .done
.read_4:
    mov eax, [es:di]
    mov [si + VALUE], eax
    jmp .done

.write:
    cmp cl, 1
    je .write_1
    cmp cl, 4
    jb .write_2
    je .write_4
    movq mm0, [si + VALUE]
    movq [es:di], mm0
    jmp .done
.write_1:
    mov al, [si + VALUE]
    mov [es:di], al
    jmp .done
.write_2:
    mov ax, [si + VALUE]
    mov [es:di], ax
    jmp .done
.write_4:
    mov eax, [si + VALUE]
    mov [es:di], eax
.done:
    add si, ENTRY
    jmp next
.end:
    END_WELL

    align 16
list:
