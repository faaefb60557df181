"""What is explored: a world (one design under one hypervisor in one scene), its scenarios, and which engine takes them."""
