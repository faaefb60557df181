"""What third parties add - designs, hypervisors, parties, laws - and how their code is called and looked at."""
