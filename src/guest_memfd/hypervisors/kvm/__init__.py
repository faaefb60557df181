"""KVM: default.py without, pkvm.py with a host stage 2; coco.py, tdx.py, snp.py, cca.py, s390.py where hardware does it."""
