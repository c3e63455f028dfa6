; A loop that waits for the keyboard controller's input buffer to be empty. This machine has no such controller.
bits 64
org 0x1000

.wait:
    in al, 0x64
    test al, 2
    jnz .wait
    hlt
