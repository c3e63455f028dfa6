; A counted loop in ring 0: asks how often, loops, says so; ends when the answer is 0.
%include "probe.inc"
bits 16
org 0x1000

    enter_long_mode
    xor ebx, ebx
.ask:
    mov dx, ANSWER
    in eax, dx
    mov ecx, eax
    jrcxz .end
.loop:                          ; LOOP_INSTRUCTIONS of checkup.rs a turn
    inc rbx
    dec ecx
    jnz .loop
    step 1
    jmp .ask
.end:
    mov [RESULT], rbx           ; turns in all
    hlt
