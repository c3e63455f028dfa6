; The smallest guest: it does nothing, and says so by HLT (KVM_EXIT_HLT).
bits 16
org 0x1000

    hlt
