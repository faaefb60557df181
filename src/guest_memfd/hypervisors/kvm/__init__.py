"""KVM: default.py without, pkvm.py with a host stage 2."""
