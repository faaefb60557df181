"""KVM: default.py without, pkvm.py with a host stage 2; tdx.py, snp.py where the processor keeps guests apart."""
